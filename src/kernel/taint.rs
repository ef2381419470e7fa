//! Taints: what has happened to a kernel that makes its word worth less.
//!
//! Letters are the kernel's own table's; the words are ours. Source: `kernel/panic.c` (`taint_flags`),
//! `Documentation/admin-guide/tainted-kernels.rst`.

use super::{Kernel, Object};

/// Taints there have been; the table has its own length.
const TAINTS_MAX: u64 = 64;

/// What each bit has always meant.
const WORDS: [&str; 20] = [
    "proprietary module",
    "module loaded by force",
    "kernel on a system that is out of its specification",
    "module unloaded by force",
    "machine check",
    "bad page",
    "taint asked for by user space",
    "oops or BUG",
    "ACPI table overridden",
    "warning",
    "staging driver",
    "workaround for a firmware bug",
    "module from outside the kernel's tree",
    "unsigned module",
    "soft lockup",
    "live patch",
    "auxiliary taint, by the distribution",
    "structure randomization",
    "in-kernel test",
    "fwctl",
];

/// One taint that is set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Taint {
    /// Its bit.
    pub bit: u64,
    /// Its letter in an oops.
    pub letter: char,
    /// What it means; empty for one of a kernel newer than this program.
    pub words: &'static str,
}

impl Kernel {
    /// The taints of the kernel; `None` where they are not known.
    pub fn taints(&self) -> Option<Vec<Taint>> {
        Some(self.taints_in(self.read_u64(self.symbol("tainted_mask")?)?))
    }

    /// The taints whose bits are set in `mask`.
    pub fn taints_in(&self, mask: u64) -> Vec<Taint> {
        let table = self.symbol("taint_flags").and_then(|at| self.value("struct taint_flag [64]", at).ok());
        let set = (0..TAINTS_MAX).filter(|bit| mask >> bit & 1 == 1);
        set.map(|bit| Taint { bit, letter: letter(table, bit), words: words(bit) }).collect()
    }
}

fn letter(table: Option<Object<'_>>, bit: u64) -> char {
    let letter = table.and_then(|table| table.index(bit).ok()?.get("c_true").ok());
    let letter = letter.and_then(|letter| char::from_u32(letter as u32)).filter(char::is_ascii_graphic);
    // Without types: the letters have not changed since they came.
    letter.or_else(|| "PFSRMBUDAWCIOELKXTNJ".chars().nth(bit as usize)).unwrap_or('?')
}

fn words(bit: u64) -> &'static str {
    usize::try_from(bit).ok().and_then(|bit| WORDS.get(bit)).copied().unwrap_or("")
}
