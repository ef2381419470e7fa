//! Just enough of a Linux kernel in memory to be discovered: page tables, a banner, `init_uts_ns`, VMCOREINFO.
//!
//! Sources: Linux `kernel/vmcore_info.c` (the text and its note), `arch/x86/kernel/vmcore_info_64.c`,
//! `include/uapi/linux/utsname.h` (six fields of 65 bytes), `arch/x86/include/asm/page_64_types.h` and
//! `Documentation/arch/x86/x86_64/mm.rst` (the address map), `init/version-timestamp.c` (the banner).

use super::FlatMemory;
use super::elf_core::ElfCore;
use super::kdump::Kdump;
use super::notes;
use super::page_tables::{KERNEL, P, PageTables, RW, Size};

/// `__START_KERNEL_map`.
pub const KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;
/// Where `_text` is linked with the usual `CONFIG_PHYSICAL_START`.
pub const LINK_TEXT: u64 = 0xffff_ffff_8100_0000;

const MIB: u64 = 1 << 20;
/// Length of the image mapping.
const IMAGE_LEN: u64 = 8 * MIB;
// Where things lie inside the image.
const BANNER_AT: u64 = 0x20_0400;
const UTS_NS_AT: u64 = 0x40_1240;
const SWAPPER_AT: u64 = 0x60_0000;
const TABLES_AT: u64 = 0x60_1000;
const NODE_ONLINE_MAP_AT: u64 = 0x40_8000;

/// Where VMCOREINFO is to be found in RAM.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum InRam {
    /// Nowhere: dumps of such a kernel have it in their own note or not at all.
    Nowhere,
    /// The page that the kernel appends lines to (`vmcoreinfo_data`).
    Page,
    /// The note that a crash writes (`vmcoreinfo_note`).
    Note,
    Both,
}

/// What of an earlier kernel's remains was overwritten since.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Damage {
    None,
    /// The top-level table is gone.
    Tables,
    /// The release string is gone.
    Uts,
}

#[derive(Clone, Debug)]
pub struct TinyKernel {
    pub release: String,
    pub version: String,
    pub build_id: [u8; 20],
    /// Physical address of `_text`, a multiple of 2 MiB.
    pub load_at: u64,
    /// KASLR's virtual slide, a multiple of 2 MiB.
    pub slide: u64,
    /// 4 or 5.
    pub levels: u32,
    pub sme_mask: u64,
    /// Start of the direct mapping.
    pub page_offset: u64,
    /// Where `init_uts_ns.name` lies in its struct.
    pub uts_name_offset: u64,
    /// Physical address of `vmcoreinfo_data`; its note follows one page later.
    pub info_at: u64,
    pub in_ram: InRam,
    pub damage: Damage,
    /// Write `CRASHTIME=`, which a kernel adds when it panics.
    pub crashed: bool,
    /// RAM that the direct mapping covers.
    pub ram: u64,
}

impl Default for TinyKernel {
    fn default() -> Self {
        Self {
            release: "6.1.0-56-tiny-amd64".into(),
            version: "#1 SMP PREEMPT_DYNAMIC Debian 6.1.1-1 (2025-01-01)".into(),
            build_id: *b"\x91\xcc0123456789abcdefgh",
            load_at: 22 * MIB,
            slide: 0x1d60_0000,
            levels: 4,
            sme_mask: 0,
            page_offset: 0xffff_9a1c_4000_0000,
            uts_name_offset: 0,
            info_at: 4 * MIB,
            in_ram: InRam::Both,
            damage: Damage::None,
            crashed: false,
            ram: 64 * MIB,
        }
    }
}

impl TinyKernel {
    /// An earlier kernel, at other addresses and of another release, so that none of its answers fits by chance.
    pub fn earlier() -> Self {
        Self {
            release: "5.10.0-33-stale-amd64".into(),
            version: "#1 SMP Debian 5.10.226-1 (2024-10-03)".into(),
            build_id: *b"stale build-id 01234",
            load_at: 40 * MIB,
            slide: 0x0b40_0000,
            page_offset: 0xffff_8f00_0000_0000,
            info_at: 2 * MIB,
            ..Self::default()
        }
    }

    /// Five levels: the direct mapping moves below the four-level half of the address space.
    pub fn five_levels(mut self) -> Self {
        self.levels = 5;
        self.page_offset = 0xff11_0000_4000_0000;
        self
    }

    pub fn text(&self) -> u64 {
        LINK_TEXT + self.slide
    }
    /// `phys_base`: physical = virtual − `KERNEL_MAP` + this. Negative values wrap.
    pub fn phys_base(&self) -> u64 {
        self.load_at.wrapping_sub(self.text() - KERNEL_MAP)
    }
    pub fn swapper_phys(&self) -> u64 {
        self.load_at + SWAPPER_AT
    }
    pub fn swapper_virt(&self) -> u64 {
        self.text() + SWAPPER_AT
    }
    pub fn uts_ns_virt(&self) -> u64 {
        self.text() + UTS_NS_AT
    }
    pub fn uts_ns_phys(&self) -> u64 {
        self.load_at + UTS_NS_AT
    }
    pub fn banner_virt(&self) -> u64 {
        self.text() + BANNER_AT
    }
    pub fn image_len(&self) -> u64 {
        IMAGE_LEN
    }
    /// What CR3 holds while this kernel runs, with a PCID in the low bits.
    pub fn cr3(&self) -> u64 {
        self.swapper_phys() | self.sme_mask | 0x1
    }
    pub fn banner(&self) -> String {
        format!(
            "Linux version {} (builder@example.org) (gcc-12 (Debian 12.2.0-14) 12.2.0, GNU ld 2.40) {}\n",
            self.release, self.version
        )
    }
    pub fn build_id_hex(&self) -> String {
        self.build_id.iter().map(|b| format!("{b:02x}")).collect()
    }

    /// The VMCOREINFO text of this kernel.
    pub fn vmcoreinfo(&self) -> String {
        let mut text = String::new();
        let mut line = |s: String| {
            text.push_str(&s);
            text.push('\n');
        };
        line(format!("OSRELEASE={}", self.release));
        line(format!("BUILD-ID={}", self.build_id_hex()));
        line("PAGESIZE=4096".into());
        line(format!("SYMBOL(init_uts_ns)={:x}", self.uts_ns_virt()));
        line(format!("OFFSET(uts_namespace.name)={}", self.uts_name_offset));
        line(format!("SYMBOL(node_online_map)={:x}", self.text() + NODE_ONLINE_MAP_AT));
        line(format!("SYMBOL(swapper_pg_dir)={:x}", self.swapper_virt()));
        line(format!("SYMBOL(_stext)={:x}", self.text()));
        line("SIZE(page)=64".into());
        line("SIZE(list_head)=16".into());
        line("OFFSET(page.flags)=0".into());
        line("LENGTH(zone.free_area)=11".into());
        line("NUMBER(NR_FREE_PAGES)=0".into());
        line("NUMBER(PG_slab)=9".into());
        line(format!("NUMBER(phys_base)={}", self.phys_base() as i64));
        line(format!("SYMBOL(init_top_pgt)={:x}", self.swapper_virt()));
        line(format!("NUMBER(pgtable_l5_enabled)={}", u8::from(self.levels == 5)));
        line(format!("KERNELOFFSET={:x}", self.slide));
        line("NUMBER(KERNEL_IMAGE_SIZE)=1073741824".into());
        line(format!("NUMBER(sme_mask)={}", self.sme_mask as i64));
        if self.crashed {
            line("CRASHTIME=1700000000".into());
        }
        text
    }

    /// The address of `at` (physical) in the direct mapping.
    pub fn direct(&self, at: u64) -> u64 {
        self.page_offset + at
    }

    /// Puts the kernel into `mem`, which needs no RAM beforehand.
    pub fn install(&self, mem: &mut FlatMemory) {
        assert!(self.load_at.is_multiple_of(2 * MIB) && self.slide.is_multiple_of(2 * MIB));
        let size = |at| self.load_at + at;
        // Code that is unlike zeros, at the start of text.
        let code: Vec<u8> = (0..8192u32).flat_map(|i| (i ^ self.load_at as u32).to_le_bytes()).collect();
        mem.write(self.load_at, &code);
        mem.write(size(BANNER_AT), self.banner().as_bytes());

        let mut uts = vec![0; 6 * 65];
        let fields = ["Linux", "tiny-host", &self.release, &self.version, "x86_64", "(none)"];
        for (i, field) in fields.into_iter().enumerate() {
            uts[i * 65..i * 65 + field.len()].copy_from_slice(field.as_bytes());
        }
        if self.damage == Damage::Uts {
            uts.fill(0xa5);
        }
        mem.write(size(UTS_NS_AT), &vec![0; self.uts_name_offset as usize + uts.len()]);
        mem.write(size(UTS_NS_AT) + self.uts_name_offset, &uts);

        let info = self.vmcoreinfo();
        if matches!(self.in_ram, InRam::Page | InRam::Both) {
            let mut page = vec![0; 4096];
            page[..info.len()].copy_from_slice(info.as_bytes());
            mem.write(self.info_at, &page);
        }
        if matches!(self.in_ram, InRam::Note | InRam::Both) {
            // The note, then an empty one that ends the list.
            let mut note = notes::vmcoreinfo_note(&info);
            note.extend_from_slice(&[0; 12]);
            note.resize(4096, 0);
            mem.write(self.info_at + 4096, &note);
        }

        let (root, next) = (size(SWAPPER_AT), size(TABLES_AT));
        let mut tables = PageTables::new(mem, root, next, self.levels).with_sme(self.sme_mask);
        let text_flags = KERNEL & !(1 << 63);
        tables.map_range(self.text(), self.load_at, IMAGE_LEN, Size::M2, text_flags);
        tables.map_range(self.page_offset, 0, self.ram.next_multiple_of(2 * MIB), Size::M2, KERNEL);
        // A few 4K mappings, as vmalloc has.
        tables.map(VMALLOC, self.load_at + BANNER_AT, Size::K4, P | RW | (1 << 63));
        let end = tables.next_table();
        assert!(end <= self.load_at + IMAGE_LEN, "tables outgrow the image");
        if self.damage == Damage::Tables {
            mem.write(root, &[0xa5; 4096]);
        }
    }

    /// A memory with this kernel alone.
    pub fn memory(&self) -> FlatMemory {
        let mut mem = FlatMemory::new();
        self.install(&mut mem);
        mem
    }

    /// A memory where `earlier` ran before this kernel did.
    pub fn memory_after(&self, earlier: &TinyKernel) -> FlatMemory {
        let mut mem = FlatMemory::new();
        earlier.install(&mut mem);
        self.install(&mut mem);
        mem
    }

    /// `mem` as QEMU dumps it: an ELF core with the registers of `cpus` CPUs, and with VMCOREINFO if the guest handed
    /// it over.
    pub fn qemu_elf(&self, mem: &FlatMemory, cpus: u64, with_info: bool) -> Vec<u8> {
        let cpus: Vec<_> = (0..cpus).map(|cpu| self.cpu(cpu)).collect();
        let info = self.vmcoreinfo();
        // With paging off QEMU writes physical addresses into p_vaddr.
        let mut core =
            ElfCore::of(mem).with_notes(notes::qemu_notes(&cpus, true, with_info.then_some(info.as_str())));
        core.segments.iter_mut().for_each(|segment| segment.vaddr = segment.paddr);
        core.build().bytes
    }

    /// `mem` as makedumpfile writes it after a crash: kdump-compressed, registers by the kernel itself.
    pub fn kdump(&self, mem: &FlatMemory, cpus: u64) -> Vec<u8> {
        let cpus: Vec<_> = (0..cpus).map(|cpu| self.cpu(cpu)).collect();
        let info = TinyKernel { crashed: true, ..self.clone() }.vmcoreinfo();
        let mut builder = Kdump {
            notes: notes::kernel_notes(&cpus, Some(&info)),
            vmcoreinfo: info.into_bytes(),
            phys_base: self.phys_base(),
            dump_level: 31,
            nr_cpus: cpus.len() as u32,
            ..Kdump::of(mem)
        };
        builder.utsname[2] = self.release.clone();
        builder.utsname[3] = self.version.clone();
        builder.build().bytes
    }

    /// Registers of CPU `cpu`, stopped in this kernel's text with this kernel's tables.
    pub fn cpu(&self, cpu: u64) -> notes::CpuValues {
        let mut values = notes::CpuValues::distinct(cpu)
            .set("rip", self.text() + 0x1000 + cpu * 0x40)
            .set("rsp", self.direct(self.load_at + 0x50_0000 + cpu * 0x4000))
            .set("cr3", self.cr3())
            .set("cr0", 0x8005_0033)
            .set("cr4", if self.levels == 5 { 0x1020 } else { 0x20 })
            .set("cs", 0x10)
            .set("ss", 0x18);
        values.pid = 100 + cpu as u32;
        values
    }
}

/// One 4K mapping of the page with the banner.
pub const VMALLOC: u64 = 0xffff_c900_0001_0000;
