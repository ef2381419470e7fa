//! The bits of page-table entries by name.
//!
//! Knows the processor's bits and those that Linux uses among the ones left to software; which of the high ones it
//! uses for what has changed, and is told by who knows the kernel. A bit without a known use is `SOFTW` and a number.
//! Source: Intel SDM vol. 3 table 4-14 to 4-20, `arch/x86/include/asm/pgtable_types.h`.

use super::paging::{Level, Step};

const PRESENT: u64 = 1;
const USER: u64 = 1 << 2;
/// In PMD and PUD: the entry maps a page. In a PTE the same bit is PAT.
const LARGE: u64 = 1 << 7;
/// Linux: there, but no access is allowed. The global bit of an entry that is not present.
const PROTNONE: u64 = 1 << 8;

/// Bits that mean the same at every level.
const COMMON: [(u32, &str); 6] =
    [(0, "PRESENT"), (1, "RW"), (2, "USER"), (3, "PWT"), (4, "PCD"), (5, "ACCESSED")];
/// Bits of entries that map a page.
const LEAF: [(u32, &str); 2] = [(6, "DIRTY"), (8, "GLOBAL")];
/// Bits that are left to software.
const SOFTWARE: [(u32, &str); 5] =
    [(9, "SOFTW1"), (10, "SOFTW2"), (11, "SOFTW3"), (57, "SOFTW4"), (58, "SOFTW5")];
/// What Linux uses of them where a page is mapped for a user; for the kernel's own pages they have other uses.
const USER_PAGE: [(u32, &str); 3] = [(9, "SPECIAL"), (10, "UFFD_WP"), (11, "SOFT_DIRTY")];

/// What a kernel uses the high bits that are left to software for, where that is known.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct HighBits {
    /// The bit of `DEVMAP`: memory of a device.
    pub devmap: Option<u32>,
    /// The bit of `SAVED_DIRTY`: written before it became read-only.
    pub saved_dirty: Option<u32>,
}

/// Whether the entry maps a page.
pub fn is_leaf(step: &Step) -> bool {
    step.level == Level::Pte || step.entry & LARGE != 0 && matches!(step.level, Level::Pmd | Level::Pud)
}

/// The names of the bits set in an entry; of one that is not present only what Linux reads from it.
/// `sme_mask` is the encryption bit, 0 without.
pub fn flags(step: &Step, sme_mask: u64, high: HighBits) -> Vec<String> {
    let entry = step.entry;
    if entry & PRESENT == 0 {
        return if entry & PROTNONE != 0 { vec!["PROTNONE".to_owned()] } else { Vec::new() };
    }
    let mut bits: Vec<(u32, &str)> = COMMON.to_vec();
    let mut software = SOFTWARE;
    if is_leaf(step) {
        bits.extend(LEAF);
        let user = USER_PAGE.into_iter().filter(|_| entry & USER != 0);
        let high = [high.devmap.zip(Some("DEVMAP")), high.saved_dirty.zip(Some("SAVED_DIRTY"))];
        for (bit, name) in user.chain(high.into_iter().flatten()) {
            software.iter_mut().filter(|(known, _)| *known == bit).for_each(|known| known.1 = name);
        }
        bits.push(if step.level == Level::Pte { (7, "PAT") } else { (7, "PSE") });
        if step.level != Level::Pte {
            bits.push((12, "PAT"));
        }
    }
    bits.extend(software);
    bits.push((63, "NX"));
    bits.sort_unstable();
    let set = bits.into_iter().filter(|(bit, _)| entry >> bit & 1 == 1);
    let mut names: Vec<String> = set.map(|(_, name)| name.to_owned()).collect();
    let key = entry >> 59 & 0xf;
    if is_leaf(step) && key != 0 {
        names.push(format!("PKEY{key}"));
    }
    if sme_mask != 0 && entry & sme_mask != 0 {
        names.push("ENCRYPTED".to_owned());
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::PhysAddr;

    fn names(level: Level, entry: u64) -> String {
        let high = HighBits { devmap: None, saved_dirty: Some(58) };
        flags(&Step { level, at: PhysAddr(0), entry }, 0, high).join(" ")
    }

    #[test]
    fn one_bit_means_different_things_at_different_levels() {
        assert_eq!(names(Level::Pte, 0x8000_0000_0000_00e7), "PRESENT RW USER ACCESSED DIRTY PAT NX");
        assert_eq!(names(Level::Pmd, 0x0000_0000_0020_01e3), "PRESENT RW ACCESSED DIRTY PSE GLOBAL");
        assert_eq!(
            names(Level::Pmd, 0x0000_0000_0020_1063),
            "PRESENT RW ACCESSED",
            "a table has no dirty bit"
        );
        assert_eq!(names(Level::Pud, 0x0800_0000_4000_0085), "PRESENT USER PSE PKEY1");
        assert_eq!(names(Level::Pte, 0x7fff_ffff_ffff_f100), "PROTNONE");
        assert_eq!(names(Level::Pte, 0x3fff_ffff_ff00), "PROTNONE");
        assert_eq!(names(Level::Pte, 0), "");
    }
    #[test]
    fn bits_left_to_software_have_names_only_where_their_use_is_known() {
        assert_eq!(
            names(Level::Pte, 0x0600_0000_0000_0e05),
            "PRESENT USER SPECIAL UFFD_WP SOFT_DIRTY SOFTW4 SAVED_DIRTY"
        );
        assert_eq!(
            names(Level::Pte, 0x0600_0000_0000_0e01),
            "PRESENT SOFTW1 SOFTW2 SOFTW3 SOFTW4 SAVED_DIRTY"
        );
        assert_eq!(names(Level::Pgd, 0x0400_0000_0000_0001), "PRESENT SOFTW5", "a table has no dirty bit");
    }
}
