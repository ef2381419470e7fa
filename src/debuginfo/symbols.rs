//! A symbol table: address to symbol and name to symbol, at link-time addresses.

use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
use std::sync::OnceLock;

/// A symbol at its link-time address.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Symbol<'a> {
    /// Its name; untrusted bytes shown lossily.
    pub name: &'a str,
    /// Link-time address.
    pub addr: u64,
    /// Size in bytes; 0 where the table has none (assembly labels).
    pub size: u64,
}

#[derive(Clone, Copy)]
struct Entry {
    addr: u64,
    size: u64,
    name: (u32, u32),
}

/// Symbols of one file.
pub struct SymbolTable {
    names: String,
    /// Sorted by address; of those at one address, the order of the file is kept.
    by_addr: Vec<Entry>,
    /// Hash of the name → index into `by_addr`, sorted; built on the first look-up by name.
    by_name: OnceLock<Vec<(u64, u32)>>,
}

impl SymbolTable {
    /// Builds a table from `(name, address, size)`.
    pub fn new<'a>(symbols: impl Iterator<Item = (&'a str, u64, u64)>) -> Self {
        let mut names = String::new();
        let mut by_addr = Vec::new();
        for (name, addr, size) in symbols {
            let (Ok(start), Ok(len)) = (u32::try_from(names.len()), u32::try_from(name.len())) else { break };
            names.push_str(name);
            by_addr.push(Entry { addr, size, name: (start, len) });
        }
        by_addr.sort_by_key(|entry| entry.addr);
        Self { names, by_addr, by_name: OnceLock::new() }
    }

    /// The first symbol called `name`.
    pub fn lookup(&self, name: &str) -> Option<Symbol<'_>> {
        let by_name = self.by_name.get_or_init(|| {
            let mut index: Vec<_> =
                self.by_addr.iter().zip(0u32..).map(|(e, i)| (hash(self.name(e)), i)).collect();
            index.sort_unstable();
            index
        });
        let wanted = hash(name);
        let first = by_name.partition_point(|&(h, _)| h < wanted);
        let same_hash = by_name.get(first..)?.iter().take_while(|&&(h, _)| h == wanted);
        same_hash.filter_map(|&(_, i)| self.symbol(i as usize)).find(|symbol| symbol.name == name)
    }

    /// The symbol that covers `addr`, and the offset into it: the nearest one below whose size, if it has one,
    /// reaches that far. Of several at one address a sized one wins.
    pub fn at(&self, addr: u64) -> Option<(Symbol<'_>, u64)> {
        let end = self.by_addr.partition_point(|entry| entry.addr <= addr);
        let nearest = self.by_addr.get(end.checked_sub(1)?)?.addr;
        let start = self.by_addr.partition_point(|entry| entry.addr < nearest);
        let group = self.by_addr.get(start..end)?;
        let offset = addr - nearest;
        let best = group.iter().max_by_key(|e| (e.size > offset, e.size == 0))?;
        (best.size == 0 || best.size > offset).then(|| self.resolve(best)).map(|symbol| (symbol, offset))
    }

    /// Number of symbols.
    pub fn len(&self) -> usize {
        self.by_addr.len()
    }

    /// Whether there is no symbol.
    pub fn is_empty(&self) -> bool {
        self.by_addr.is_empty()
    }

    fn name(&self, entry: &Entry) -> &str {
        let (start, len) = (entry.name.0 as usize, entry.name.1 as usize);
        self.names.get(start..start + len).unwrap_or_default()
    }

    fn resolve(&self, entry: &Entry) -> Symbol<'_> {
        Symbol { name: self.name(entry), addr: entry.addr, size: entry.size }
    }

    fn symbol(&self, index: usize) -> Option<Symbol<'_>> {
        self.by_addr.get(index).map(|entry| self.resolve(entry))
    }
}

fn hash(name: &str) -> u64 {
    BuildHasherDefault::<DefaultHasher>::default().hash_one(name)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn by_name_and_by_address() {
        let table = SymbolTable::new(
            [("b", 0x20, 8), ("a", 0x10, 4), ("label", 0x20, 0), ("tail", 0x40, 0)].into_iter(),
        );
        assert_eq!(table.lookup("a").unwrap().addr, 0x10);
        assert_eq!(table.lookup("zz"), None);
        assert_eq!(table.at(0x12).map(|(s, o)| (s.name, o)), Some(("a", 2)));
        assert_eq!(table.at(0x14), None, "past the end of a sized symbol");
        assert_eq!(table.at(0x24).map(|(s, o)| (s.name, o)), Some(("b", 4)));
        assert_eq!(table.at(0x30).map(|(s, o)| (s.name, o)), Some(("label", 0x10)));
        assert_eq!(table.at(0x99).map(|(s, _)| s.name), Some("tail"));
        assert_eq!(table.at(0x0), None);
    }
}
