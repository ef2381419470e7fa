//! Page-table walk: virtual to physical, four or five levels, 4K, 2M and 1G pages.
//!
//! Knows the processor's tables and the one Linux convention that changes an address in them (inverted
//! `PROT_NONE` entries). Knows nothing of where a kernel keeps its tables.
//! Source: Intel SDM vol. 3 ch. 4; AMD APM vol. 2 7.10 (the encryption bit in entries);
//! `arch/x86/include/asm/pgtable-invert.h`.

use crate::addr::{PhysAddr, VirtAddr};
use crate::memory::{MemoryError, PhysicalMemory};
use std::fmt;

const PRESENT: u64 = 1 << 0;
const PAGE_SIZE_BIT: u64 = 1 << 7;
/// In a non-present leaf Linux reuses the global bit: the page is there, but no access is allowed (`PROT_NONE`).
const PROTNONE: u64 = 1 << 8;
/// Bits 51:12 of an entry: the physical address.
const ADDRESS_MASK: u64 = 0x000f_ffff_ffff_f000;

/// A level of the page tables, under the kernel's names.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub enum Level {
    /// Level 1: maps 4 KiB pages.
    Pte,
    /// Level 2: maps 2 MiB pages or points to PTEs.
    Pmd,
    /// Level 3: maps 1 GiB pages or points to PMDs.
    Pud,
    /// Level 4: points to PUDs; the top with four levels.
    P4d,
    /// Level 5: points to P4Ds; only with five levels.
    Pgd,
}

impl Level {
    const FROM_TOP: [Level; 5] = [Self::Pgd, Self::P4d, Self::Pud, Self::Pmd, Self::Pte];

    /// The lowest address bit that this level's index covers: 12 for PTE to 48 for PGD.
    fn shift(self) -> u32 {
        12 + 9 * (self as u32)
    }

    /// Bytes that one entry of this level covers.
    pub fn span(self) -> u64 {
        1 << self.shift()
    }

    /// The kernel's name. With four levels Linux calls the top level PGD; P4D is folded away.
    pub fn name(self, levels: u8) -> &'static str {
        match self {
            Self::Pte => "PTE",
            Self::Pmd => "PMD",
            Self::Pud => "PUD",
            Self::P4d if levels == 4 => "PGD",
            Self::P4d => "P4D",
            Self::Pgd => "PGD",
        }
    }
}

/// One step of a walk: the entry read at one level.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Step {
    /// The level the entry belongs to.
    pub level: Level,
    /// Physical address of the entry itself.
    pub at: PhysAddr,
    /// Its raw value.
    pub entry: u64,
}

/// Where a virtual address leads.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Translation {
    /// The physical address.
    pub phys: PhysAddr,
    /// Bytes from there to the end of the page that maps it.
    pub left_in_page: u64,
    /// Size of that page: 4 KiB, 2 MiB or 1 GiB.
    pub page_size: u64,
    /// The leaf entry.
    pub leaf: Step,
}

/// Why a virtual address leads nowhere.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TranslateError {
    /// Bits 63 down to the sign bit differ.
    #[error("{at} is not canonical with {levels}-level page tables")]
    NonCanonical {
        /// The address asked for.
        at: VirtAddr,
        /// 4 or 5.
        levels: u8,
    },
    /// An entry on the way is not present.
    #[error("{at} is not mapped: {} at {} is {:#x}", .step.level.name(*.levels), .step.at, .step.entry)]
    NotPresent {
        /// The address asked for.
        at: VirtAddr,
        /// The entry without its present bit.
        step: Step,
        /// 4 or 5.
        levels: u8,
    },
    /// A table on the way cannot be read.
    #[error("{at}: the {} for it cannot be read: {source}", .level.name(*.levels))]
    TableUnreadable {
        /// The address asked for.
        at: VirtAddr,
        /// Which level's entry.
        level: Level,
        /// 4 or 5.
        levels: u8,
        /// Where and why.
        source: MemoryError,
    },
    /// A read ran past the last address.
    #[error("a read from {at} runs past the end of the address space")]
    EndOfAddressSpace {
        /// Where the read began.
        at: VirtAddr,
    },
    /// Nobody knows the page tables this address belongs to.
    #[error("{at}: {why}")]
    NoTables {
        /// The address asked for.
        at: VirtAddr,
        /// Why there are none, as half a sentence.
        why: String,
    },
}

impl TranslateError {
    /// A short fixed name for tables and JSON.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::NonCanonical { .. } => "non-canonical",
            Self::NotPresent { .. } => "not-mapped",
            Self::TableUnreadable { .. } => "table-unreadable",
            Self::EndOfAddressSpace { .. } => "end-of-address-space",
            Self::NoTables { .. } => "no-page-tables",
        }
    }
}

/// A virtual address that could not be read, and why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VirtError {
    /// It leads to no physical address.
    #[error(transparent)]
    Translate(#[from] TranslateError),
    /// It leads to a physical address that cannot be read.
    #[error("{at} is mapped, but {source}")]
    Memory {
        /// The virtual address.
        at: VirtAddr,
        /// The physical address and the reason.
        source: MemoryError,
    },
}

/// How much of a buffer a virtual read filled, from its start, and what stopped it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use]
pub struct VirtOutcome {
    /// Bytes filled from the start of the buffer.
    pub filled: usize,
    /// `None` if and only if the whole buffer was filled.
    pub stopped: Option<VirtError>,
}

/// A tree of page tables.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AddressSpace {
    /// Physical address of the top-level table.
    pub root: PhysAddr,
    /// 4 or 5.
    pub levels: u8,
    /// The encryption bit (SME) that entries carry and addresses do not; 0 without.
    pub sme_mask: u64,
}

impl AddressSpace {
    /// The tables a CPU walks with these control registers; `None` where it does not walk four or five levels:
    /// paging off (CR0.PG) or the tables of 32-bit modes (CR4.PAE clear). Source: Intel SDM vol. 3, 2.5 and 4.1.
    pub fn from_control_registers(cr0: Option<u64>, cr3: u64, cr4: Option<u64>) -> Option<Self> {
        const PG: u64 = 1 << 31;
        const PAE: u64 = 1 << 5;
        const LA57: u64 = 1 << 12;
        if cr0.is_some_and(|cr0| cr0 & PG == 0) || cr4.is_some_and(|cr4| cr4 & PAE == 0) {
            return None;
        }
        let levels = if cr4.is_some_and(|cr4| cr4 & LA57 != 0) { 5 } else { 4 };
        // The low 12 bits are the PCID or cache attributes.
        Some(Self { root: PhysAddr(cr3 & ADDRESS_MASK), levels, sme_mask: 0 })
    }

    /// Whether bits 63 down to bit 47 (four levels) or 56 (five) are all equal.
    pub fn is_canonical(&self, at: VirtAddr) -> bool {
        is_canonical(at, self.levels)
    }

    /// The physical address behind `at`.
    pub fn translate(&self, mem: &dyn PhysicalMemory, at: VirtAddr) -> Result<Translation, TranslateError> {
        self.walk(mem, at, &mut |_| ())
    }

    /// Like [`Self::translate`], reporting every entry read, top first.
    pub fn walk(
        &self,
        mem: &dyn PhysicalMemory,
        at: VirtAddr,
        visit: &mut dyn FnMut(Step),
    ) -> Result<Translation, TranslateError> {
        let levels = self.levels;
        if !self.is_canonical(at) {
            return Err(TranslateError::NonCanonical { at, levels });
        }
        let address_mask = ADDRESS_MASK & !self.sme_mask;
        let mut table = PhysAddr(self.root.0 & address_mask);
        for &level in &Level::FROM_TOP[5 - usize::from(levels.clamp(4, 5))..] {
            let index = (at.0 >> level.shift()) & 0x1ff;
            let entry_at = PhysAddr(table.0 | (index * 8));
            let entry = mem.read_phys_u64(entry_at).map_err(|source| TranslateError::TableUnreadable {
                at,
                level,
                levels,
                source,
            })?;
            let step = Step { level, at: entry_at, entry };
            visit(step);
            let is_leaf = level == Level::Pte
                || (entry & PAGE_SIZE_BIT != 0 && matches!(level, Level::Pmd | Level::Pud));
            let page_mask = if is_leaf { !((1u64 << level.shift()) - 1) } else { !0xfff };
            let Some(target) = target(mem, entry, address_mask & page_mask, is_leaf) else {
                return Err(TranslateError::NotPresent { at, step, levels });
            };
            if is_leaf {
                let page_size = 1u64 << level.shift();
                let offset = at.0 & (page_size - 1);
                let phys = PhysAddr(target | offset);
                return Ok(Translation { phys, left_in_page: page_size - offset, page_size, leaf: step });
            }
            table = PhysAddr(target);
        }
        // The loop ends at the PTE level, which is always a leaf.
        Err(TranslateError::NonCanonical { at, levels })
    }

    /// Fills `buf` from `at` upward; stops exactly at the first byte that cannot be read.
    pub fn read(&self, mem: &dyn PhysicalMemory, at: VirtAddr, buf: &mut [u8]) -> VirtOutcome {
        let (mut filled, mut ahead) = (0, None);
        while filled < buf.len() {
            let Some(here) = at.checked_add(filled as u64) else {
                let error = TranslateError::EndOfAddressSpace { at };
                return VirtOutcome { filled, stopped: Some(error.into()) };
            };
            let translation = match ahead.take().map_or_else(|| self.translate(mem, here), Ok) {
                Ok(translation) => translation,
                Err(error) => return VirtOutcome { filled, stopped: Some(error.into()) },
            };
            // What lies together in physical memory is read together: each read may cost a system call.
            let wanted = (buf.len() - filled) as u64;
            let mut len = translation.left_in_page;
            while len < wanted
                && let Some(next) = here.checked_add(len)
                && let Ok(next) = self.translate(mem, next)
            {
                if Some(next.phys) != translation.phys.checked_add(len) {
                    ahead = Some(next);
                    break;
                }
                len = len.saturating_add(next.left_in_page);
            }
            let n = usize::try_from(len.min(wanted)).unwrap_or(usize::MAX);
            let read = mem.read_phys(translation.phys, &mut buf[filled..filled + n]);
            filled += read.filled.min(n);
            if let Some(source) = read.stopped {
                let at = at.wrapping_add(filled as u64);
                return VirtOutcome { filled, stopped: Some(VirtError::Memory { at, source }) };
            }
        }
        VirtOutcome { filled, stopped: None }
    }
}

/// Whether bits 63 down to the sign bit of `levels`-level paging are all equal.
pub fn is_canonical(at: VirtAddr, levels: u8) -> bool {
    let unused = if levels >= 5 { 64 - 57 } else { 64 - 48 };
    (((at.0 << unused) as i64) >> unused) as u64 == at.0
}

/// The address in an entry, or `None` if it leads nowhere. `mask` has the entry's address bits: without the
/// encryption bit, and for a huge page without the PAT bit, which is its bit 12.
fn target(mem: &dyn PhysicalMemory, entry: u64, mask: u64, is_leaf: bool) -> Option<u64> {
    if entry & PRESENT != 0 {
        return Some(entry & mask);
    }
    if !is_leaf || entry & PROTNONE == 0 {
        return None;
    }
    // Since Linux commit 6b28baca9b1f ("x86/speculation/l1tf: Protect PROT_NONE PTEs against
    // speculation") (in v4.19) the address bits of such an entry are inverted. An inverted address lies
    // beyond all RAM, which is the point of it, so memory itself tells which of the two it is.
    let ranges = mem.ranges();
    [!entry & mask, entry & mask]
        .into_iter()
        .find(|&at| ranges.iter().any(|range| range.contains(PhysAddr(at))))
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} at {}: {:#x}", self.level, self.at, self.entry)
    }
}
