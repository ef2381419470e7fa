//! An ELF file made of names alone: what gives gdb symbols where there is no file of the kernel's or a module's.
//!
//! Knows ELF and no kernel. Sections have an address and a size and no bytes: gdb reads those from the target. What
//! only gdb reads, such as `.debug_frame`, has bytes and no address.
//! Source: the ELF-64 object file format; gdb `elfread.c` (`elf_symtab_read`: what a symbol is, its section tells),
//! `symfile.c` (`qOffsets` wants a program header).

/// What a file is to gdb.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// A program: sections at their addresses, moved as a whole.
    Executable,
    /// A module: sections at 0, each moved by itself; symbols count from the section's start.
    Relocatable,
}

/// A section without bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Section<'a> {
    /// Its name: `.text`.
    pub name: &'a str,
    /// Address of its first byte.
    pub address: u64,
    /// Length in bytes.
    pub size: u64,
    /// Whether its symbols are functions.
    pub executable: bool,
}

/// A symbol at the same kind of address as the sections.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Named<'a> {
    /// Its name; one with a NUL in it is cut there.
    pub name: &'a str,
    /// Address.
    pub address: u64,
    /// Size in bytes, 0 if not known.
    pub size: u64,
    /// Whether it is global.
    pub global: bool,
}

const ELF_HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
const ET_REL: u16 = 1;
const ET_EXEC: u16 = 2;
const EM_X86_64: u16 = 62;
const SHT_PROGBITS: u32 = 1;
const SHT_SYMTAB: u32 = 2;
const SHT_STRTAB: u32 = 3;
const SHT_NOBITS: u32 = 8;
const SHF_WRITE: u64 = 1;
const SHF_ALLOC: u64 = 2;
const SHF_EXECINSTR: u64 = 4;
const STT_OBJECT: u8 = 1;
const STT_FUNC: u8 = 2;
/// `sh_link` and `sh_info` of sections that have none.
const NONE: u32 = 0;

/// The bytes of the file. Symbols outside of all sections are left out; sections must not overlap.
pub fn write<'a>(kind: Kind, sections: &[Section<'_>], symbols: impl Iterator<Item = Named<'a>>) -> Vec<u8> {
    write_with(kind, sections, symbols, &[])
}

/// As [`write`], with `debug` sections: names and bytes.
pub fn write_with<'a>(
    kind: Kind,
    sections: &[Section<'_>],
    symbols: impl Iterator<Item = Named<'a>>,
    debug: &[(&str, &[u8])],
) -> Vec<u8> {
    let (mut locals, mut globals, mut strings) = (vec![0; 24], Vec::new(), vec![0]);
    for symbol in symbols {
        let inside = |s: &Section<'_>| symbol.address.checked_sub(s.address).is_some_and(|at| at < s.size);
        let Some((index, section)) = (1u16..).zip(sections).find(|(_, section)| inside(section)) else {
            continue;
        };
        let kind_of = if section.executable { STT_FUNC } else { STT_OBJECT };
        let value = match kind {
            Kind::Executable => symbol.address,
            Kind::Relocatable => symbol.address - section.address,
        };
        let into = if symbol.global { &mut globals } else { &mut locals };
        put32(into, strings.len() as u32);
        into.extend([u8::from(symbol.global) << 4 | kind_of, 0]);
        put16(into, index);
        put64(into, value);
        put64(into, symbol.size);
        strings.extend(symbol.name.bytes().take_while(|&b| b != 0));
        strings.push(0);
    }
    let first_global = (locals.len() / 24) as u32;
    locals.append(&mut globals);

    let mut names = vec![0];
    let mut name = |text: &str| {
        let at = names.len() as u32;
        names.extend(text.bytes().chain([0]));
        at
    };
    let (count, loads) = (sections.len() as u16, u16::from(kind == Kind::Executable));
    let symtab_at = ELF_HEADER + PROGRAM_HEADER * usize::from(loads);
    let strtab_at = symtab_at + locals.len();
    let mut headers = vec![[0; 64].to_vec()];
    for section in sections {
        let flags = SHF_ALLOC | if section.executable { SHF_EXECINSTR } else { SHF_WRITE };
        let address = if kind == Kind::Executable { section.address } else { 0 };
        headers.push(header(
            name(section.name),
            SHT_NOBITS,
            flags,
            [address, symtab_at as u64, section.size],
            (NONE, NONE),
            0,
        ));
    }
    let sizes = [symtab_at as u64, locals.len() as u64];
    headers.push(header(
        name(".symtab"),
        SHT_SYMTAB,
        0,
        [0, sizes[0], sizes[1]],
        (u32::from(count) + 2, first_global),
        24,
    ));
    headers.push(header(
        name(".strtab"),
        SHT_STRTAB,
        0,
        [0, strtab_at as u64, strings.len() as u64],
        (NONE, NONE),
        0,
    ));
    let shstrtab = name(".shstrtab");
    let debug_names: Vec<u32> = debug.iter().map(|(text, _)| name(text)).collect();
    let names_at = strtab_at + strings.len();
    headers.push(header(shstrtab, SHT_STRTAB, 0, [0, names_at as u64, names.len() as u64], (NONE, NONE), 0));
    let mut end_of_parts = names_at + names.len();
    for (name, (_, bytes)) in debug_names.into_iter().zip(debug) {
        let place = [0, end_of_parts as u64, bytes.len() as u64];
        headers.push(header(name, SHT_PROGBITS, 0, place, (NONE, NONE), 0));
        end_of_parts += bytes.len();
    }
    let headers_at = end_of_parts.next_multiple_of(8);

    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    put16(&mut file, if kind == Kind::Executable { ET_EXEC } else { ET_REL });
    put16(&mut file, EM_X86_64);
    put32(&mut file, 1);
    let start = sections.iter().map(|s| s.address).min().unwrap_or(0);
    let end = sections.iter().map(|s| s.address.saturating_add(s.size)).max().unwrap_or(0);
    put64(&mut file, if kind == Kind::Executable { start } else { 0 });
    put64(&mut file, if loads == 0 { 0 } else { ELF_HEADER as u64 });
    put64(&mut file, headers_at as u64);
    put32(&mut file, 0);
    for field in [ELF_HEADER as u16, PROGRAM_HEADER as u16, loads, 64, headers.len() as u16, count + 3] {
        put16(&mut file, field);
    }
    if loads != 0 {
        // PT_LOAD, readable, writable and executable.
        put32(&mut file, 1);
        put32(&mut file, 7);
        for field in [symtab_at as u64, start, start, 0, end - start, 0x1000] {
            put64(&mut file, field);
        }
    }
    for part in [locals, strings, names] {
        file.extend(part);
    }
    debug.iter().for_each(|(_, bytes)| file.extend_from_slice(bytes));
    file.resize(headers_at, 0);
    file.extend(headers.concat());
    file
}

/// A section header; `place` is its address, offset in the file and size, `links` are `sh_link` and `sh_info`.
fn header(name: u32, kind: u32, flags: u64, place: [u64; 3], links: (u32, u32), entry: u64) -> Vec<u8> {
    let mut header = Vec::with_capacity(64);
    put32(&mut header, name);
    put32(&mut header, kind);
    put64(&mut header, flags);
    place.into_iter().for_each(|field| put64(&mut header, field));
    put32(&mut header, links.0);
    put32(&mut header, links.1);
    put64(&mut header, if entry == 0 { 1 } else { 8 });
    put64(&mut header, entry);
    header
}

fn put16(out: &mut Vec<u8>, n: u16) {
    out.extend(n.to_le_bytes());
}

fn put32(out: &mut Vec<u8>, n: u32) {
    out.extend(n.to_le_bytes());
}

fn put64(out: &mut Vec<u8>, n: u64) {
    out.extend(n.to_le_bytes());
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use object::{Object, ObjectSection, ObjectSymbol, SymbolKind};

    const SECTIONS: [Section<'_>; 2] = [
        Section { name: ".text", address: 0x1000, size: 0x800, executable: true },
        Section { name: ".data", address: 0x2000, size: 0x100, executable: false },
    ];
    const SYMBOLS: [Named<'_>; 4] = [
        Named { name: "function", address: 0x1010, size: 0x20, global: true },
        Named { name: "local", address: 0x1400, size: 0, global: false },
        Named { name: "variable", address: 0x20ff, size: 1, global: true },
        Named { name: "nowhere", address: 0x2100, size: 1, global: true },
    ];

    #[test]
    fn another_reader_sees_the_same() {
        for kind in [Kind::Executable, Kind::Relocatable] {
            let file = write(kind, &SECTIONS, SYMBOLS.into_iter());
            let elf = object::File::parse(&*file).unwrap();
            let base = |address: u64| if kind == Kind::Executable { address } else { 0 };
            let sections: Vec<_> = elf
                .sections()
                .filter(|s| s.address() != 0 || s.size() != 0)
                .map(|s| (s.name().unwrap().to_owned(), s.address(), s.size()))
                .collect();
            assert_eq!(sections[0], (".text".to_owned(), base(0x1000), 0x800));
            assert_eq!(sections[1], (".data".to_owned(), base(0x2000), 0x100));
            let symbols: Vec<_> = elf
                .symbols()
                .map(|s| (s.name().unwrap().to_owned(), s.address(), s.size(), s.is_global(), s.kind()))
                .collect();
            let offset = |at: u64, section: u64| at - section + base(section);
            assert_eq!(
                symbols,
                [
                    ("local".to_owned(), offset(0x1400, 0x1000), 0, false, SymbolKind::Text),
                    ("function".to_owned(), offset(0x1010, 0x1000), 0x20, true, SymbolKind::Text),
                    ("variable".to_owned(), offset(0x20ff, 0x2000), 1, true, SymbolKind::Data),
                ]
            );
        }
    }
}
