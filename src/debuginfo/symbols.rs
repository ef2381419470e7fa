//! A symbol table: address to symbol and name to symbol.
//!
//! Knows ELF's `.symtab` records and nothing of files. Addresses are the giver's: link-time for the kernel image,
//! run-time for modules. The index by name is built when first asked for.
//! Source: the ELF-64 object file format, "Symbol Table"; `nm(1)` (letters).

use crate::bytes::{cstr_at, u16_at, u32_at, u64_at};
use crate::parallel;
use hashbrown::{DefaultHashBuilder, HashTable};
use std::hash::BuildHasher;
use std::sync::OnceLock;

/// A symbol at its address in the table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Symbol<'a> {
    /// Its name.
    pub name: &'a str,
    /// Address: link-time in the kernel image, run-time in a module.
    pub addr: u64,
    /// Size in bytes; 0 where the table has none (assembly labels).
    pub size: u64,
    /// The letter `nm` prints, upper case if global: `t` text, `d` and `b` data, `r` constants, `w` weak;
    /// `?` where the table does not tell.
    pub letter: char,
}

/// A symbol whose name stands elsewhere.
#[derive(Clone, Copy)]
pub(super) struct Entry {
    pub addr: u64,
    pub size: u64,
    /// Offset of its NUL-terminated name in the string table.
    pub name: u32,
    /// As in [`Symbol::letter`], ASCII.
    pub letter: u8,
}

/// Symbols of one file.
#[derive(Default)]
pub struct SymbolTable {
    strings: Vec<u8>,
    /// Sorted by address.
    entries: Vec<Entry>,
    hasher: DefaultHashBuilder,
    /// Indexes into `entries` by hash of the name.
    by_name: OnceLock<HashTable<u32>>,
}

/// Bytes of an `Elf64_Sym`.
const RECORD: usize = 24;
/// So many symbols are worth a thread.
const BATCH: usize = 1 << 13;
const SHN_UNDEF: u16 = 0;
const STT_OBJECT: u8 = 1;
const STT_FUNC: u8 = 2;
const STT_SECTION: u8 = 3;
const STT_FILE: u8 = 4;

impl SymbolTable {
    /// The defined, named symbols in the bytes of a `.symtab` section and of the string table it links to.
    /// Sections' and source files' own symbols are left out; a cut last record is dropped. `of_section` tells the letter
    /// for symbols in the section of an index; where it does not, ELF's types serve.
    pub fn from_elf(symtab: &[u8], strings: Vec<u8>, of_section: &dyn Fn(u16) -> Option<u8>) -> Self {
        Self::from_records(symtab, strings, &|_, section| of_section(section))
    }

    /// The same, with letters like `nm`'s, one for each record, whose case does not count; where they end, ELF's
    /// types serve.
    pub fn from_elf_with_letters(symtab: &[u8], strings: Vec<u8>, letters: &[u8]) -> Self {
        Self::from_records(symtab, strings, &|record, _| letters.get(record).copied())
    }

    fn from_records(symtab: &[u8], strings: Vec<u8>, letter_of: &dyn Fn(usize, u16) -> Option<u8>) -> Self {
        let entry = |(index, record): (usize, &[u8])| {
            let kind = record.get(4)? & 0xf;
            let name = u32_at(record, 0)?;
            let section = u16_at(record, 6)?;
            let wanted = section != SHN_UNDEF && kind != STT_SECTION && kind != STT_FILE;
            (wanted && strings.get(name as usize).is_some_and(|&first| first != 0)).then_some(Entry {
                addr: u64_at(record, 8)?,
                size: u64_at(record, 16)?,
                name,
                letter: letter(*record.get(4)?, letter_of(index, section)),
            })
        };
        let records = symtab.chunks_exact(RECORD);
        // Nearly every record is wanted.
        let mut entries = Vec::with_capacity(records.len());
        entries.extend(records.enumerate().filter_map(entry));
        Self::new(entries, strings)
    }

    /// `entries` with their names in `strings`.
    pub(super) fn new(mut entries: Vec<Entry>, strings: Vec<u8>) -> Self {
        parallel::sort_by_key(&mut entries, BATCH, |entry| (entry.addr, entry.name));
        Self { strings, entries, ..Self::default() }
    }

    /// Whether it has no symbol at all.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// How many symbols it has.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// All symbols by ascending address; those whose name is no UTF-8 are left out.
    pub fn iter(&self) -> impl Iterator<Item = Symbol<'_>> {
        self.entries.iter().filter_map(|entry| self.symbol(entry))
    }

    /// A symbol called `name`; of several (static functions share names) the one at the lowest address.
    pub fn lookup(&self, name: &str) -> Option<Symbol<'_>> {
        let by_name = self.by_name.get_or_init(|| {
            let hashes = parallel::map(&self.entries, BATCH, |entry| self.hasher.hash_one(self.name(entry)));
            let hash = |i: &u32| hashes.get(*i as usize).copied().unwrap_or_default();
            let mut table = HashTable::with_capacity(hashes.len());
            for i in 0..u32::try_from(hashes.len()).unwrap_or(u32::MAX) {
                table.insert_unique(hash(&i), i, hash);
            }
            table
        });
        let named =
            |i: &&u32| self.entries.get(**i as usize).is_some_and(|e| self.name(e) == name.as_bytes());
        let wanted = self.hasher.hash_one(name.as_bytes());
        let first = by_name.iter_hash(wanted).filter(named).min()?;
        self.entries.get(*first as usize).and_then(|entry| self.symbol(entry))
    }

    /// The symbol that covers `addr`, and the offset into it: the nearest one below whose size, if it has one,
    /// reaches that far; one without a size reaches to the next symbol. Of several at one address a sized one wins,
    /// then the first in the table, as in the kernel's own messages; but `const_current_task` is the linker's alias of
    /// `current_task`, and yields to it.
    pub fn at(&self, addr: u64) -> Option<(Symbol<'_>, u64)> {
        let end = self.entries.partition_point(|entry| entry.addr <= addr);
        let nearest = self.entries.get(end.checked_sub(1)?)?.addr;
        let start = self.entries.partition_point(|entry| entry.addr < nearest);
        let offset = addr - nearest;
        let here = self.entries.get(start..end)?;
        let is_alias = |entry: &Entry| {
            let of = self.name(entry).strip_prefix(b"const_");
            of.is_some_and(|of| here.iter().any(|other| self.name(other) == of))
        };
        // One whose name is no text hides none that has a name.
        let named = here.iter().rev().filter_map(|entry| Some((entry, self.symbol(entry)?)));
        let (best, symbol) = named.max_by_key(|(e, _)| (e.size > offset, e.size == 0, !is_alias(e)))?;
        let covers = if best.size == 0 { end < self.entries.len() } else { best.size > offset };
        covers.then_some((symbol, offset))
    }

    fn name(&self, entry: &Entry) -> &[u8] {
        cstr_at(&self.strings, entry.name as usize, usize::MAX).unwrap_or_default()
    }

    fn symbol(&self, entry: &Entry) -> Option<Symbol<'_>> {
        let name = std::str::from_utf8(self.name(entry)).ok()?;
        Some(Symbol { name, addr: entry.addr, size: entry.size, letter: char::from(entry.letter) })
    }
}

/// What `nm` would print, as far as `st_info` tells, or `known`.
fn letter(info: u8, known: Option<u8>) -> u8 {
    const STB_LOCAL: u8 = 0;
    const STB_WEAK: u8 = 2;
    let local = match (known, info & 0xf) {
        (Some(known), _) => known.to_ascii_lowercase(),
        (None, STT_OBJECT) => b'd',
        (None, STT_FUNC) => b't',
        _ => b'?',
    };
    match info >> 4 {
        STB_LOCAL => local,
        STB_WEAK => b'W',
        _ => local.to_ascii_uppercase(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn table(symbols: &[(&str, u64, u64)]) -> SymbolTable {
        let mut strings = vec![0];
        let mut symtab = vec![0; RECORD];
        for (name, addr, size) in symbols {
            symtab.extend((strings.len() as u32).to_le_bytes());
            symtab.extend([0x12, 0, 1, 0]);
            symtab.extend(addr.to_le_bytes());
            symtab.extend(size.to_le_bytes());
            strings.extend(name.bytes().chain([0]));
        }
        SymbolTable::from_elf(&symtab, strings, &|_| None)
    }

    #[test]
    fn by_name_and_by_address() {
        let table =
            table(&[("b", 0x20, 8), ("a", 0x10, 4), ("label", 0x20, 0), ("tail", 0x40, 0), ("a", 0x8, 1)]);
        assert_eq!(table.lookup("a").unwrap().addr, 0x8);
        assert_eq!(table.lookup("tail").unwrap().addr, 0x40);
        assert_eq!(table.lookup("zz"), None);
        assert_eq!(table.at(0x12).map(|(s, o)| (s.name, o)), Some(("a", 2)));
        assert_eq!(table.at(0x14), None, "past the end of a sized symbol");
        assert_eq!(table.at(0x24).map(|(s, o)| (s.name, o)), Some(("b", 4)));
        assert_eq!(table.at(0x30).map(|(s, o)| (s.name, o)), Some(("label", 0x10)));
        let table = self::table(&[("const_current", 0x20, 0), ("current", 0x20, 0), ("const_c", 0x30, 0)]);
        assert_eq!(table.at(0x20).map(|(s, _)| s.name), Some("current"));
        assert_eq!(table.lookup("const_current").unwrap().addr, 0x20);
        let table = self::table(&[("const_a", 0x20, 0), ("b", 0x20, 0), ("c", 0x30, 0)]);
        assert_eq!(table.at(0x20).map(|(s, _)| s.name), Some("const_a"), "no alias of b");
        assert_eq!(table.at(0x99), None, "nothing bounds the last symbol");
        assert_eq!(table.at(0x0), None);
    }
}
