//! A vmlinux: its build-id, symbols at link-time addresses, and types from BTF or, without it, DWARF.
//!
//! Sections are read when first asked for and only as far as needed. Source: the ELF specification,
//! `include/asm-generic/vmlinux.lds.h` (`.BTF`, `.notes`).

use super::btf::Btf;
use super::types::{Class, Type, TypeId, TypeSource, TypeTable};
use super::{Error, Member, Symbol, SymbolTable};
use object::read::elf::{ElfFile64, FileHeader, ProgramHeader};
use object::{Endianness, Object, ObjectSection, ReadCache, elf};
use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

pub(super) type Elf<'a> = ElfFile64<'a, Endianness, &'a ReadCache<File>>;

/// Debug info of the kernel image.
pub struct DebugInfo {
    path: PathBuf,
    build_id: Option<String>,
    first_load: Option<u64>,
    sections: HashMap<String, Section>,
    file: Arc<File>,
    symbols: OnceLock<SymbolTable>,
    types: OnceLock<TypeTable>,
}

#[derive(Clone, Copy)]
struct Section {
    offset: u64,
    size: u64,
    compressed: bool,
    /// Link-time address, 0 for sections that are not loaded.
    address: u64,
}

/// Bytes of a section, read on demand.
pub struct SectionReader {
    bytes: SectionBytes,
    path: String,
}

enum SectionBytes {
    InFile { file: Arc<File>, offset: u64, size: u64 },
    Held(Vec<u8>),
}

impl SectionReader {
    /// Length in bytes.
    pub fn len(&self) -> u64 {
        match &self.bytes {
            SectionBytes::InFile { size, .. } => *size,
            SectionBytes::Held(bytes) => bytes.len() as u64,
        }
    }

    /// `len` bytes from `at`.
    pub fn read(&self, at: u64, len: u64) -> Result<Vec<u8>, Error> {
        let past_end =
            || Error::Malformed { path: self.path.clone(), what: "section read past its end".into() };
        if at.checked_add(len).is_none_or(|end| end > self.len()) {
            return Err(past_end());
        }
        match &self.bytes {
            SectionBytes::Held(bytes) => {
                bytes.get(at as usize..(at + len) as usize).map(<[u8]>::to_vec).ok_or_else(past_end)
            }
            SectionBytes::InFile { file, offset, .. } => {
                let mut buf = vec![0; len as usize];
                file.read_exact_at(&mut buf, offset + at)
                    .map_err(|source| Error::Io { path: self.path.clone(), source })?;
                Ok(buf)
            }
        }
    }
}

impl DebugInfo {
    /// Opens an x86-64 ELF file and reads its headers and build-id.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let io = |source| Error::Io { path: path.display().to_string(), source };
        let file = File::open(path).map_err(io)?;
        if file.metadata().map_err(io)?.is_dir() {
            return Err(malformed(path, "it is a directory"));
        }
        let cache = ReadCache::new(file.try_clone().map_err(io)?);
        let elf = parse(path, &cache)?;
        if elf.elf_header().e_machine(elf.endian()) != elf::EM_X86_64 {
            return Err(malformed(path, "it is not for x86-64"));
        }
        let build_id = elf.build_id().ok().flatten().map(to_hex);
        let loads = elf.elf_program_headers().iter();
        let first_load = loads
            .filter(|ph| ph.p_type(elf.endian()) == elf::PT_LOAD)
            .map(|ph| ph.p_vaddr(elf.endian()))
            .next();
        let file_len = file.metadata().map_err(io)?.len();
        let mut sections = HashMap::new();
        for section in elf.sections() {
            // A stripped or separated file keeps headers of sections whose bytes it lacks.
            let (Ok(name), Some((offset, size))) = (section.name(), section.file_range()) else { continue };
            // Sizes are the file's word; nothing is allocated for bytes that are not there.
            if offset.checked_add(size).is_none_or(|end| end > file_len) {
                continue;
            }
            let compressed = section
                .compressed_file_range()
                .is_ok_and(|range| range.format != object::CompressionFormat::None);
            sections
                .insert(name.to_owned(), Section { offset, size, compressed, address: section.address() });
        }
        Ok(Self {
            path: path.to_owned(),
            build_id,
            first_load,
            sections,
            file: Arc::new(file),
            symbols: OnceLock::new(),
            types: OnceLock::new(),
        })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The GNU build-id in lower-case hex.
    pub fn build_id(&self) -> Option<&str> {
        self.build_id.as_deref()
    }

    pub(super) fn file(&self) -> Arc<File> {
        Arc::clone(&self.file)
    }

    pub(super) fn read_cache(&self) -> Result<ReadCache<File>, Error> {
        let io = |source| Error::Io { path: self.path.display().to_string(), source };
        Ok(ReadCache::new(self.file.try_clone().map_err(io)?))
    }

    pub(super) fn parse<'a>(&self, cache: &'a ReadCache<File>) -> Result<Elf<'a>, Error> {
        parse(&self.path, cache)
    }

    /// Link-time address of the first loaded segment: what gdb's `TextSeg` relocates.
    pub fn first_load(&self) -> Option<u64> {
        self.first_load
    }

    /// Whether there is DWARF for gdb to show source lines and locals by.
    pub fn has_dwarf(&self) -> bool {
        self.sections.contains_key(".debug_info")
    }

    /// Whether the file has a symbol table.
    pub fn has_symbols(&self) -> bool {
        self.sections.contains_key(".symtab")
    }

    /// Symbols at link-time addresses; empty where the file has none.
    pub fn symbols(&self) -> &SymbolTable {
        self.symbols.get_or_init(|| {
            self.read_symbols().unwrap_or_else(|error| {
                tracing::warn!("{error}");
                SymbolTable::default()
            })
        })
    }

    /// The symbol called `name`.
    pub fn symbol(&self, name: &str) -> Option<Symbol<'_>> {
        self.symbols().lookup(name)
    }

    /// Its types.
    pub fn types(&self) -> &TypeTable {
        self.types.get_or_init(|| TypeTable::new(self.open_types()))
    }

    /// The member at `path` of `container`, or `None` where this kernel has no such member.
    pub fn member(&self, container: &str, path: &str) -> Option<Member> {
        let types = self.types();
        types.member(types.composite(container)?, path)
    }

    /// The file's bytes at link-time address `at`, `len` of them, if a section in the file holds them.
    pub fn bytes_at(&self, at: u64, len: u64) -> Option<Vec<u8>> {
        let section = self.sections.values().find(|s| {
            s.address != 0
                && at.checked_sub(s.address).is_some_and(|o| o.checked_add(len).is_some_and(|e| e <= s.size))
        })?;
        let mut buf = vec![0; usize::try_from(len).ok().filter(|&n| n <= 4096)?];
        self.file.read_exact_at(&mut buf, section.offset + (at - section.address)).ok()?;
        Some(buf)
    }

    fn read_symbols(&self) -> Result<SymbolTable, Error> {
        let symtab = self.section(".symtab")?.unwrap_or_default();
        Ok(SymbolTable::from_elf(&symtab, self.section(".strtab")?.unwrap_or_default()))
    }

    /// BTF if it is there: it is a fiftieth of the size of DWARF.
    fn open_types(&self) -> Arc<dyn TypeSource> {
        let btf = self.section(".BTF").and_then(|btf| btf.map(Btf::parse).transpose());
        match btf {
            Ok(Some(btf)) => return Arc::new(btf),
            Ok(None) => {}
            Err(error) => tracing::warn!("{}: {error}", self.path.display()),
        }
        Arc::new(NoTypes)
    }

    /// The whole of a section, decompressed; `None` where the file does not have it.
    fn section(&self, name: &str) -> Result<Option<Vec<u8>>, Error> {
        if !self.sections.contains_key(name) {
            return Ok(None);
        }
        let cache = self.read_cache()?;
        let elf = self.parse(&cache)?;
        let data = elf.section_by_name(name).map(|section| section.uncompressed_data()).transpose();
        let data = data.map_err(|e| malformed(&self.path, format!("section {name}: {e}")))?;
        Ok(data.map(std::borrow::Cow::into_owned))
    }
}

/// Stands in where a file has neither BTF nor DWARF.
struct NoTypes;

impl TypeSource for NoTypes {
    fn find(&self, _class: Class, _name: &str) -> Result<Option<TypeId>, Error> {
        Ok(None)
    }
    fn get(&self, id: TypeId) -> Result<Type, Error> {
        Err(Error::Types { format: "no types", offset: id.id.into(), what: "nothing is here".into() })
    }
    fn names(&self, _class: Class) -> Vec<String> {
        Vec::new()
    }
    fn enumerator(&self, _name: &str) -> Result<Option<i64>, Error> {
        Ok(None)
    }
    fn format(&self) -> &'static str {
        "no types"
    }
}

pub(super) fn parse<'a>(path: &Path, cache: &'a ReadCache<File>) -> Result<Elf<'a>, Error> {
    Elf::parse(cache).map_err(|e| malformed(path, format!("{e}")))
}

pub(super) fn malformed(path: &Path, what: impl Into<String>) -> Error {
    Error::Malformed { path: path.display().to_string(), what: what.into() }
}

pub(super) fn to_hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut hex, byte| {
        // Writing to a String cannot fail.
        let _ = write!(hex, "{byte:02x}");
        hex
    })
}
