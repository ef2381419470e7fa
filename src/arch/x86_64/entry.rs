//! The bits of page-table entries by name.
//!
//! Knows the processor's bits and those that Linux uses among the ones left to software.
//! Source: Intel SDM vol. 3 table 4-14 to 4-20, `arch/x86/include/asm/pgtable_types.h`.

use super::paging::{Level, Step};

const PRESENT: u64 = 1;
/// In PMD and PUD: the entry maps a page. In a PTE the same bit is PAT.
const LARGE: u64 = 1 << 7;
/// Linux: there, but no access is allowed. The global bit of an entry that is not present.
const PROTNONE: u64 = 1 << 8;

/// Bits that mean the same at every level.
const COMMON: [(u32, &str); 6] =
    [(0, "PRESENT"), (1, "RW"), (2, "USER"), (3, "PWT"), (4, "PCD"), (5, "ACCESSED")];
/// Bits of entries that map a page; 9 to 11, 57 and 58 are Linux's.
const LEAF: [(u32, &str); 7] = [
    (6, "DIRTY"),
    (8, "GLOBAL"),
    (9, "SPECIAL"),
    (10, "UFFD_WP"),
    (11, "SOFT_DIRTY"),
    (57, "SAVED_DIRTY"),
    (58, "DEVMAP"),
];

/// Whether the entry maps a page.
pub fn is_leaf(step: &Step) -> bool {
    step.level == Level::Pte || step.entry & LARGE != 0 && matches!(step.level, Level::Pmd | Level::Pud)
}

/// The names of the bits set in an entry; of one that is not present only what Linux reads from it.
/// `sme_mask` is the encryption bit, 0 without.
pub fn flags(step: &Step, sme_mask: u64) -> Vec<String> {
    let entry = step.entry;
    if entry & PRESENT == 0 {
        return if entry & PROTNONE != 0 { vec!["PROTNONE".to_owned()] } else { Vec::new() };
    }
    let mut bits: Vec<(u32, &str)> = COMMON.to_vec();
    if is_leaf(step) {
        bits.extend(LEAF);
        bits.push(if step.level == Level::Pte { (7, "PAT") } else { (7, "PSE") });
        if step.level != Level::Pte {
            bits.push((12, "PAT"));
        }
    }
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
        flags(&Step { level, at: PhysAddr(0), entry }, 0).join(" ")
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
}
