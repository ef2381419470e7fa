//! A machine made of nothing but what a protocol test needs: three CPUs, page tables, a hole in memory.

use kstub::addr::{PAGE_SIZE, PhysAddr, PhysRange, VirtAddr};
use kstub::arch::x86_64::{Reg, RegisterFile, Saved};
use kstub::backend::{Backend, Fact, SavedCpu};
use kstub::kernel::{Cpu, CpuId, Machine};
use kstub::memory::{MemoryImage, PhysicalMemory, ReadOutcome, Unreadable};
use std::sync::Arc;

/// `_text`, with a KASLR offset.
pub const TEXT: u64 = 0xffff_ffff_9a00_0000;
/// Two readable pages of data; the third is mapped but excluded from the dump, the fourth is not mapped.
pub const DATA: u64 = 0xffff_8880_0010_0000;
/// A page that each CPU maps to memory of its own.
pub const OWN: u64 = 0x0000_7fff_0000_0000;
/// Much memory, for reads of the largest size.
pub const BULK: u64 = 0xffff_8880_1000_0000;
pub const BULK_PAGES: u64 = 64;
/// Reading here is a defect of the backend: it panics.
#[allow(dead_code)]
pub const DEFECT: u64 = 0xffff_8880_2000_0000;

const TEXT_PHYS: u64 = 0x20_0000;
const DATA_PHYS: u64 = 0x10_0000;
const OWN_PHYS: u64 = 0x30_0000;
const BULK_PHYS: u64 = 0x40_0000;
const DEFECT_PHYS: u64 = 0x60_0000;

/// The byte of the data pages at `offset` from their start; every value occurs, `}#$*` among them. From the third page on
/// there are runs, of lengths that fit no block.
pub fn pattern(offset: u64) -> u8 {
    let run = offset / 1237;
    match offset >= 2 * PAGE_SIZE && !run.is_multiple_of(3) {
        true => b"\0\xff\xcc#}\x12"[run as usize * 5 / 3 % 6],
        false => (offset.wrapping_mul(167) >> 1) as u8 ^ (offset >> 8) as u8,
    }
}

struct Ram(MemoryImage);

impl PhysicalMemory for Ram {
    fn read_phys(&self, at: PhysAddr, buf: &mut [u8]) -> ReadOutcome {
        assert!(at.page_start() != PhysAddr(DEFECT_PHYS), "a defect, as the test wants it");
        self.0.read_phys(at, buf)
    }
    fn ranges(&self) -> Vec<PhysRange> {
        self.0.ranges()
    }
}

impl Backend for Ram {
    fn saved_cpus(&self) -> &[SavedCpu] {
        &[]
    }
    fn vmcoreinfo_note(&self) -> Option<&[u8]> {
        None
    }
    fn phys_base_hints(&self) -> Vec<u64> {
        vec![]
    }
    fn facts(&self) -> Vec<Fact> {
        vec![]
    }
    fn problems(&self) -> Vec<String> {
        vec![]
    }
}

/// Page tables under construction: one top level per CPU, tables taken from ever higher addresses.
struct Tables {
    ram: MemoryImage,
    next: u64,
}

impl Tables {
    fn table(&mut self) -> u64 {
        self.next += PAGE_SIZE;
        self.ram.write(PhysAddr(self.next), &[0; PAGE_SIZE as usize]);
        self.next
    }

    fn map(&mut self, root: u64, virt: u64, phys: u64) {
        let mut table = root;
        for shift in [39, 30, 21] {
            let entry = PhysAddr(table + ((virt >> shift) & 0x1ff) * 8);
            let mut below = self.ram.read_phys_u64(entry).unwrap() & !0xfff;
            if below == 0 {
                below = self.table();
                self.ram.write_u64(entry, below | 0x63);
            }
            table = below;
        }
        self.ram.write_u64(PhysAddr(table + ((virt >> 12) & 0x1ff) * 8), phys | 0x63);
    }
}

/// CPUs 0, 1 and 3, of which 3 panicked. Every register of CPUs 0 and 3 has a value of its own; CPU 1 saved
/// only `rip` and `cr3`, and has a hostile name.
pub fn fake_machine() -> Arc<Machine> {
    let mut tables = Tables { ram: MemoryImage::new(), next: 0x1000 };
    let text = [&[0x90; 64][..], &[0xcc; 64][..]].concat();
    tables.ram.write(PhysAddr(TEXT_PHYS), &text);
    let data: Vec<u8> = (0..2 * PAGE_SIZE).map(pattern).collect();
    tables.ram.write(PhysAddr(DATA_PHYS), &data);
    tables.ram.set_unreadable(PhysAddr(DATA_PHYS + 2 * PAGE_SIZE), Unreadable::Excluded);
    for page in 0..BULK_PAGES {
        let bytes: Vec<u8> = (0..PAGE_SIZE).map(|i| pattern(page * PAGE_SIZE + i)).collect();
        tables.ram.write(PhysAddr(BULK_PHYS + page * PAGE_SIZE), &bytes);
    }
    let mut cpus = Vec::new();
    for id in [0, 1, 3] {
        let root = tables.table();
        for page in 0..3 {
            tables.map(root, DATA + page * PAGE_SIZE, DATA_PHYS + page * PAGE_SIZE);
        }
        for page in 0..BULK_PAGES {
            tables.map(root, BULK + page * PAGE_SIZE, BULK_PHYS + page * PAGE_SIZE);
        }
        tables.map(root, TEXT, TEXT_PHYS);
        tables.map(root, DEFECT, DEFECT_PHYS);
        let own = OWN_PHYS + u64::from(id) * PAGE_SIZE;
        tables.map(root, OWN, own);
        tables.ram.write(PhysAddr(own), format!("memory of CPU {id}\0").as_bytes());
        let mut regs = if id == 1 { RegisterFile::default() } else { distinct_registers(id) };
        regs.set_known(Reg::Rip, TEXT + 0x10 + u64::from(id));
        regs.set_known(Reg::Cr3, root);
        let (comm, notes): (&str, &[&str]) = match id {
            0 => ("swapper/0", &["idle"]),
            1 => ("<a&b>\"\x1b[2J}#$*", &["registers not saved"]),
            _ => ("bash", &["panicked here"]),
        };
        let notes = notes.iter().map(|&note| note.to_owned()).collect();
        cpus.push(Cpu { id: CpuId(id), regs, comm: Some(comm.to_owned()), pid: Some(id as i32 * 77), notes });
    }
    let backend = Arc::new(Ram(tables.ram));
    Arc::new(Machine::from_parts(backend, cpus, CpuId(3), Some(VirtAddr(TEXT))))
}

/// The value of `reg` on `cpu` by the rule that no two are alike.
pub fn distinct(cpu: u32, reg: Reg) -> u128 {
    let seed = (reg as u128 + 1) * 0x0101_0101_0101_0101_0101_0101_0101_0101;
    (seed ^ u128::from(cpu) << 4) & (u128::MAX >> (128 - reg.bits()))
}

fn distinct_registers(cpu: u32) -> RegisterFile {
    let mut regs = RegisterFile::default();
    for reg in Reg::ALL {
        regs.set(reg, Saved::Known(distinct(cpu, reg)));
    }
    regs.set_known(Reg::Rsp, DATA + 0x100 + u64::from(cpu) * 8);
    regs.set_known(Reg::Eflags, 0x246);
    regs.set_known(Reg::Cr0, 0x8005_0033);
    // Without LA57: the tables have four levels.
    regs.set_known(Reg::Cr4, 0x37_0ef0 & !(1 << 12));
    regs
}
