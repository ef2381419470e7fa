//! x86-64 page tables written into physical memory. Source: Intel SDM vol. 3 ch. 4 (tables 4-14 to 4-20).

use super::FlatMemory;

pub const P: u64 = 1 << 0;
pub const RW: u64 = 1 << 1;
pub const US: u64 = 1 << 2;
pub const ACCESSED: u64 = 1 << 5;
pub const DIRTY: u64 = 1 << 6;
/// Page size, in an entry of level 2 or 3; the PAT bit in one of level 1.
pub const PS: u64 = 1 << 7;
pub const GLOBAL: u64 = 1 << 8;
/// PAT bit of a 2M or 1G page.
pub const PAT_LARGE: u64 = 1 << 12;
pub const NX: u64 = 1 << 63;
/// Physical address bits of a 4K entry.
pub const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
/// What Linux sets in entries that point to tables (`_KERNPG_TABLE`).
pub const TABLE: u64 = P | RW | ACCESSED | DIRTY;
/// What Linux sets in leaf entries of its own memory (`__PAGE_KERNEL`).
pub const KERNEL: u64 = P | RW | ACCESSED | DIRTY | GLOBAL | NX;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Size {
    K4,
    M2,
    G1,
}

impl Size {
    /// The table level that holds the leaf: 1, 2 or 3.
    pub fn level(self) -> u32 {
        match self {
            Self::K4 => 1,
            Self::M2 => 2,
            Self::G1 => 3,
        }
    }
    pub fn bytes(self) -> u64 {
        1 << (12 + 9 * (self.level() - 1))
    }
}

/// Tables under construction. `next` is where the next table goes; it moves up by one page each time.
pub struct PageTables<'a> {
    pub mem: &'a mut FlatMemory,
    /// Physical address of the top-level table.
    pub root: u64,
    pub levels: u32,
    /// Set in every entry that holds an address (the SME encryption bit), 0 for none.
    pub sme_mask: u64,
    next: u64,
}

impl<'a> PageTables<'a> {
    /// An empty tree whose top table lies at `root` and whose further tables follow from `next` up.
    pub fn new(mem: &'a mut FlatMemory, root: u64, next: u64, levels: u32) -> Self {
        mem.write(root, &[0; 4096]);
        Self { mem, root, levels, sme_mask: 0, next }
    }

    pub fn with_sme(mut self, mask: u64) -> Self {
        self.sme_mask = mask;
        self
    }

    /// The first address that no table uses yet.
    pub fn next_table(&self) -> u64 {
        self.next
    }

    /// Maps the page of `size` at `va` to `pa` with `flags` in the leaf (the size bit is added here).
    pub fn map(&mut self, va: u64, pa: u64, size: Size, flags: u64) {
        let ps = if size == Size::K4 { 0 } else { PS };
        self.set(va, size.level(), (pa & !(size.bytes() - 1)) | self.sme_mask | ps | flags);
    }

    /// Maps `len` bytes, which must be a multiple of the size.
    pub fn map_range(&mut self, va: u64, pa: u64, len: u64, size: Size, flags: u64) {
        for offset in (0..len).step_by(size.bytes() as usize) {
            self.map(va + offset, pa + offset, size, flags);
        }
    }

    /// A `PROT_NONE` leaf as Linux writes it since 4.19: not present, bit 8 set, address bits inverted
    /// (`arch/x86/include/asm/pgtable-invert.h`). The encryption bit is no address bit and stays as it is.
    pub fn map_prot_none(&mut self, va: u64, pa: u64, size: Size, inverted: bool) {
        let ps = if size == Size::K4 { 0 } else { PS };
        let mask = ADDRESS & !(size.bytes() - 1) & !self.sme_mask;
        let address = if inverted { !pa & mask } else { pa & mask };
        self.set(va, size.level(), address | self.sme_mask | ps | GLOBAL | US | ACCESSED);
    }

    /// Writes a raw entry for `va` at `level` (1 = PTE … 5), making the tables above it.
    pub fn set(&mut self, va: u64, level: u32, entry: u64) {
        let mut table = self.root;
        for above in (level + 1..=self.levels).rev() {
            let at = table + index(va, above) * 8;
            let old = self.mem.read_u64(at).expect("tables are RAM");
            table = if old & P != 0 {
                old & ADDRESS & !self.sme_mask
            } else {
                let new = self.next;
                self.next += 4096;
                self.mem.write(new, &[0; 4096]);
                self.mem.write_u64(at, new | self.sme_mask | TABLE);
                new
            };
        }
        self.mem.write_u64(table + index(va, level) * 8, entry);
    }

    /// Physical address of the entry for `va` at `level`, following present entries.
    pub fn entry_at(&self, va: u64, level: u32) -> u64 {
        let mut table = self.root;
        for above in (level + 1..=self.levels).rev() {
            let entry = self.mem.read_u64(table + index(va, above) * 8).expect("tables are RAM");
            assert!(entry & P != 0, "no table below level {above} for {va:#x}");
            table = entry & ADDRESS & !self.sme_mask;
        }
        table + index(va, level) * 8
    }
}

fn index(va: u64, level: u32) -> u64 {
    (va >> (12 + 9 * (level - 1))) & 0x1ff
}
