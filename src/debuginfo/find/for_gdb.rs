//! A module's file as gdb can take it.
//!
//! In a relocatable file with a section that is not at 0 gdb takes nothing for relocatable: variables come out at wrong
//! addresses. The linker leaves such a one in some kernels (6.12). And gdb counts all sections where it should
//! count those that are loaded: where one comes behind another that is not loaded, it reads past the end of its list of
//! addresses, and some modules have no symbols. binutils 2.47 writes such files. Source: ELF gABI, "Sections" and
//! "Symbol Table"; gdb 13 to 18, `solib-target.c` (`solib_target_relocate_section_addresses`).

use super::super::sections::Elf;
use object::elf::{self, FileHeader64, SectionHeader64, Sym64, SymbolSection};
use object::pod::{Pod, bytes_of, bytes_of_slice, slice_from_bytes_mut};
use object::read::elf::SectionHeader as _;
use object::{LittleEndian as LE, U32};
use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

type Header = SectionHeader64<LE>;

/// The number of no section.
const NONE: u32 = 0;
/// The longest table that is read: a module of 100,000 symbols has some 2 MiB of them.
const TABLE_MAX: u64 = 256 << 20;

/// Whether gdb takes a relocatable file as it is.
pub(super) fn suits(elf: &Elf<'_>) -> bool {
    let endian = elf.endian();
    let mut behind = false;
    elf.elf_section_table().iter().all(|header| {
        let loaded = header.sh_flags(endian).contains(elf::SHF_ALLOC);
        behind |= !loaded && is_counted(header.sh_type(endian));
        header.sh_addr(endian) == 0 && !(loaded && behind)
    })
}

/// Puts all sections of the relocatable `file` at 0, and those that are loaded in front of the others.
pub(super) fn cure(file: &File) -> io::Result<()> {
    arrange(file, is_loaded)
}

/// Puts all sections at 0, and those that `is_front` says in front of the others.
fn arrange(file: &File, is_front: impl Fn(&Header) -> bool) -> io::Result<()> {
    let mut start = Table::read(file, 0, size_of::<FileHeader64<LE>>() as u64)?;
    let [start] = start.entries::<FileHeader64<LE>>() else { return Err(io::ErrorKind::InvalidData.into()) };
    let at = start.e_shoff.get(LE);
    let bytes = u64::from(start.e_shnum.get(LE)) * size_of::<Header>() as u64;
    let mut old = Table::read(file, at, bytes)?;
    let old = old.entries::<Header>();
    // There are more sections than the header has a number for.
    if old.is_empty() {
        return Err(io::ErrorKind::Unsupported.into());
    }

    let (front, rest): (Vec<_>, Vec<_>) =
        (0..).zip(&*old).partition(|(index, header)| *index == NONE || is_front(header));
    let order: Vec<(u32, &Header)> = front.into_iter().chain(rest).collect();
    let moved: HashMap<u32, u32> = (0..).zip(&order).map(|(to, (from, _))| (*from, to)).collect();
    let index = |from: u32| moved.get(&from).copied().unwrap_or(from);
    // Numbers like SHN_ABS are no section's.
    let of_symbol =
        |from: SymbolSection| from.index().map_or(from, |old| SymbolSection::new(index(old.into())));

    let mut headers = Vec::with_capacity(order.len());
    for (_, header) in order {
        let mut header = *header;
        match header.sh_type.get(LE) {
            elf::SHT_SYMTAB => Table::of(file, &header)?.edit(file, |symbols: &mut [Sym64<LE>]| {
                for symbol in symbols {
                    symbol.st_shndx.set(LE, of_symbol(symbol.st_shndx.get(LE)));
                }
            })?,
            // Its first word has flags.
            elf::SHT_GROUP => Table::of(file, &header)?.edit(file, |words: &mut [U32<LE>]| {
                words.iter_mut().skip(1).for_each(|word| word.set(LE, index(word.get(LE))));
            })?,
            // More sections than a symbol has numbers for.
            elf::SHT_SYMTAB_SHNDX => return Err(io::ErrorKind::Unsupported.into()),
            elf::SHT_REL | elf::SHT_RELA => header.sh_info.set(LE, index(header.sh_info.get(LE))),
            _ => {}
        }
        header.sh_addr.set(LE, 0);
        header.sh_link.set(LE, index(header.sh_link.get(LE)));
        headers.push(header);
    }
    file.write_all_at(bytes_of_slice(&headers), at)?;
    start.e_shstrndx.set(LE, of_symbol(start.e_shstrndx.get(LE)));
    file.write_all_at(bytes_of(start), 0)
}

fn is_loaded(header: &Header) -> bool {
    header.sh_flags.get(LE).contains(elf::SHF_ALLOC)
}

/// Whether it is a section to gdb, and no table about others.
fn is_counted(kind: elf::SectionType) -> bool {
    ![elf::SHT_NULL, elf::SHT_REL, elf::SHT_RELA, elf::SHT_SYMTAB, elf::SHT_STRTAB].contains(&kind)
}

/// A part of a file that has entries of one size.
struct Table {
    at: u64,
    bytes: Vec<u8>,
}

impl Table {
    fn read(file: &File, at: u64, len: u64) -> io::Result<Self> {
        if len > TABLE_MAX {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        let mut bytes = vec![0; len as usize];
        file.read_exact_at(&mut bytes, at)?;
        Ok(Self { at, bytes })
    }

    fn of(file: &File, header: &Header) -> io::Result<Self> {
        Self::read(file, header.sh_offset.get(LE), header.sh_size.get(LE))
    }

    fn entries<T: Pod>(&mut self) -> &mut [T] {
        let count = self.bytes.len() / size_of::<T>();
        slice_from_bytes_mut(&mut self.bytes, count).map_or(Default::default(), |(entries, _)| entries)
    }

    fn edit<T: Pod>(mut self, file: &File, change: impl FnOnce(&mut [T])) -> io::Result<()> {
        change(self.entries());
        file.write_all_at(&self.bytes, self.at)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::super::sections::parse;
    use super::*;
    use object::write::{Comdat, Object as Writer, Relocation, Symbol, SymbolSection as Place};
    use object::{Architecture, BinaryFormat, ComdatKind, Endianness, SectionKind, SymbolFlags, SymbolKind};
    use object::{
        Object, ObjectComdat, ObjectSection, ObjectSymbol, ReadCache, RelocationFlags, RelocationTarget,
    };
    use std::path::Path;

    /// A relocatable file with two sections that are loaded, one that is not in front of the second, and a group.
    fn module() -> Vec<u8> {
        let mut writer = Writer::new(BinaryFormat::Elf, Architecture::X86_64, Endianness::Little);
        let mut add = |name: &str, kind, len: usize| {
            let section = writer.add_section(Vec::new(), name.into(), kind);
            writer.append_section_data(section, &vec![name.len() as u8; len], 8);
            let symbol = writer.add_symbol(Symbol {
                name: format!("in{name}").into_bytes(),
                value: 8,
                size: 8,
                kind: SymbolKind::Data,
                scope: object::SymbolScope::Linkage,
                weak: false,
                section: Place::Section(section),
                flags: SymbolFlags::None,
            });
            (section, symbol)
        };
        let (text, in_text) = add(".text", SectionKind::Text, 64);
        let (info, _) = add(".debug_info", SectionKind::Debug, 32);
        let (_, this) = add(".gnu.linkonce.this_module", SectionKind::Data, 128);
        for (section, offset, symbol) in [(text, 16, this), (info, 8, in_text)] {
            let flags = RelocationFlags::Elf { r_type: elf::R_X86_64_64 };
            writer.add_relocation(section, Relocation { offset, symbol, addend: 3, flags }).unwrap();
        }
        // One that is nowhere, and one that has a number without being a section's.
        for section in [Place::Absolute, Place::Common] {
            let symbol = writer.symbol(this);
            let (name, flags) = (format!("{section:?}").into_bytes(), SymbolFlags::None);
            let symbol = Symbol { name, section, flags, ..*symbol };
            writer.add_symbol(symbol);
        }
        writer.add_comdat(Comdat { kind: ComdatKind::Any, symbol: in_text, sections: vec![text] });
        writer.write().unwrap()
    }

    /// What a file says by names, whatever its numbers are.
    fn says(path: &Path) -> (Vec<String>, bool) {
        let cache = ReadCache::new(File::open(path).unwrap());
        let elf = parse(path, &cache).unwrap();
        let name = |index| elf.section_by_index(index).unwrap().name().unwrap().to_owned();
        let mut all = Vec::new();
        for section in elf.sections() {
            let of = section.name().unwrap();
            all.push(format!("{of}: {} {:?}", section.address(), section.data().unwrap()));
            for (at, relocation) in section.relocations() {
                let RelocationTarget::Symbol(symbol) = relocation.target() else { continue };
                let symbol = elf.symbol_by_index(symbol).unwrap();
                all.push(format!("{of}+{at}: {}+{}", symbol.name().unwrap(), relocation.addend()));
            }
        }
        for symbol in elf.symbols().filter(|symbol| !symbol.is_undefined()) {
            let section = symbol.section_index().map(name);
            let place = (symbol.section(), section);
            let place = if place.1.is_some() { (object::SymbolSection::Unknown, place.1) } else { place };
            all.push(format!("{} {:?} {place:?}", symbol.name().unwrap(), symbol.kind()));
        }
        for group in elf.comdats() {
            let sections: Vec<String> = group.sections().map(name).collect();
            all.push(format!("group {}: {sections:?}", group.name().unwrap()));
        }
        all.retain(|one| !one.starts_with(".symtab") && !one.starts_with(".group"));
        all.sort();
        (all, suits(&elf))
    }

    #[test]
    fn a_file_whose_sections_are_moved_says_the_same() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("module.ko");
        std::fs::write(&path, module()).unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        let (before, suited) = says(&path);
        assert!(!suited);
        let find = |what: &str| before.iter().any(|one| one.starts_with(what));
        assert!(
            find(".text+16: in.gnu.linkonce.this_module+3") && find("group in.text: [\".text\""),
            "{before:?}"
        );
        // The other way round, to see that each of them moves.
        arrange(&file, |header| !is_loaded(header)).unwrap();
        assert_eq!(says(&path), (before.clone(), false));
        cure(&file).unwrap();
        assert_eq!(says(&path), (before.clone(), true));
        // An address is a reason of its own.
        let at = u64::from_le_bytes(std::fs::read(&path).unwrap()[0x28..0x30].try_into().unwrap());
        file.write_all_at(&0x1000u64.to_le_bytes(), at + 64 + 16).unwrap();
        assert!(!says(&path).1);
        cure(&file).unwrap();
        assert_eq!(says(&path), (before, true));
    }

    #[test]
    fn what_is_no_such_file_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("module.ko");
        let whole = module();
        for len in (0..whole.len()).step_by(7) {
            std::fs::write(&path, &whole[..len]).unwrap();
            let file = File::options().read(true).write(true).open(&path).unwrap();
            assert!(cure(&file).is_err(), "{len}");
        }
        // Any number may be anything.
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 0xff;
            std::fs::write(&path, &bytes).unwrap();
            let _ = cure(&File::options().read(true).write(true).open(&path).unwrap());
        }
    }
}
