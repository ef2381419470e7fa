//! A vmlinux: its build-id, symbols at link-time addresses, types from BTF or, without it, DWARF, and source lines.
//!
//! Sections are read when first asked for and only as far as needed. Source: the ELF specification,
//! `include/asm-generic/vmlinux.lds.h` (`.BTF`, `.notes`).

use super::btf::Btf;
use super::dwarf::Dwarf;
use super::dwarf_index::user_directory;
use super::dwarf_unit::Units;
use super::lines::{self, Location};
use super::sections::{Elf, SectionAddresses, Sections, malformed, parse};
use super::types::{Class, NoTypes, TypeSource, TypeTable};
use super::{Error, Member, Symbol, SymbolTable};
use object::read::elf::{FileHeader, ProgramHeader};
use object::{Object, ReadCache, elf};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

/// Debug info of the kernel image, or of a module.
pub struct DebugInfo {
    build_id: Option<String>,
    first_load: Option<u64>,
    sections: Arc<Sections>,
    /// `TypeId::source` of its types.
    source: u16,
    /// Where indexes of DWARF are kept.
    indexes: Option<PathBuf>,
    symbols: OnceLock<SymbolTable>,
    types: OnceLock<TypeTable>,
    dwarf: OnceLock<Option<Arc<Dwarf>>>,
    dwarf_types: OnceLock<TypeTable>,
}

impl DebugInfo {
    /// Opens an x86-64 ELF file and reads its headers and build-id.
    pub fn open(path: &Path) -> Result<Self, Error> {
        Self::open_file(path, None, 0)
    }

    /// Opens the file of a module (`.ko`, `.ko.debug`), the sections of which are in memory at `loaded_at`: addresses
    /// are then those in memory. Its types have `source` in their ids.
    pub fn open_module(path: &Path, loaded_at: SectionAddresses, source: u16) -> Result<Self, Error> {
        Self::open_file(path, Some(loaded_at), source)
    }

    fn open_file(path: &Path, loaded_at: Option<SectionAddresses>, source: u16) -> Result<Self, Error> {
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
        Ok(Self {
            build_id,
            first_load,
            sections: Arc::new(Sections::new(path, file, &elf, loaded_at).map_err(io)?),
            source,
            indexes: user_directory(),
            symbols: OnceLock::new(),
            types: OnceLock::new(),
            dwarf: OnceLock::new(),
            dwarf_types: OnceLock::new(),
        })
    }

    /// Keeps indexes of DWARF in `directory`, or nowhere, instead of in the user's cache directory.
    pub fn keep_indexes_in(mut self, directory: Option<PathBuf>) -> Self {
        self.indexes = directory;
        self
    }

    /// The file.
    pub fn path(&self) -> &Path {
        self.sections.path()
    }

    /// The GNU build-id in lower-case hex.
    pub fn build_id(&self) -> Option<&str> {
        self.build_id.as_deref()
    }

    pub(super) fn file(&self) -> Arc<File> {
        Arc::clone(self.sections.file())
    }

    pub(super) fn read_cache(&self) -> Result<ReadCache<File>, Error> {
        self.sections.read_cache()
    }

    pub(super) fn parse<'a>(&self, cache: &'a ReadCache<File>) -> Result<Elf<'a>, Error> {
        parse(self.path(), cache)
    }

    /// Link-time address of the first loaded segment: what gdb's `TextSeg` relocates.
    pub fn first_load(&self) -> Option<u64> {
        self.first_load
    }

    /// Whether there is DWARF for gdb to show source lines and locals by.
    pub fn has_dwarf(&self) -> bool {
        self.sections.contains(".debug_info")
    }

    /// Whether the file has a symbol table.
    pub fn has_symbols(&self) -> bool {
        self.sections.contains(".symtab")
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

    /// The C spelling of the type of the variable called `name`, for [`TypeTable::parse`]: BTF has the types of few
    /// variables, and DWARF those of all.
    pub fn variable_type(&self, name: &str) -> Option<String> {
        let spell = |types: &TypeTable| types.find(Class::Variable, name).map(|ty| types.spell(ty));
        spell(self.types()).or_else(|| spell(self.dwarf_types()?))
    }

    /// Its types by DWARF alone; `None` without DWARF. Their ids mean nothing in [`Self::types`].
    pub fn dwarf_types(&self) -> Option<&TypeTable> {
        let dwarf = self.dwarf()?;
        Some(self.dwarf_types.get_or_init(|| TypeTable::new(dwarf)))
    }

    /// Its DWARF as one source among others of a table; `None` without DWARF.
    pub fn dwarf_source(&self) -> Option<Arc<dyn TypeSource>> {
        Some(self.dwarf()?)
    }

    /// Where the instruction at link-time address `addr` comes from: the innermost inlined function first, the
    /// function that has the code last. `None` without DWARF, or where it knows no code.
    pub fn locate(&self, addr: u64) -> Option<Vec<Location>> {
        self.tell(lines::locate(&*self.dwarf()?, addr))
    }

    /// Where the function with code at link-time address `addr` is declared.
    pub fn declared(&self, addr: u64) -> Option<Location> {
        self.tell(lines::declared(&*self.dwarf()?, addr))
    }

    fn tell<T>(&self, found: Result<Option<T>, Error>) -> Option<T> {
        found.unwrap_or_else(|error| {
            tracing::warn!("{}: {error}", self.path().display());
            None
        })
    }

    /// The file's bytes at link-time address `at`, `len` of them, if a section in the file holds them.
    pub fn bytes_at(&self, at: u64, len: u64) -> Option<Vec<u8>> {
        self.sections.bytes_at(at, len)
    }

    /// The whole of a section; `None` where the file does not have it.
    pub(super) fn section(&self, name: &str) -> Result<Option<Vec<u8>>, Error> {
        self.sections.whole(name)
    }

    /// Where a section was linked to be, or loaded; 0 if that is not known.
    pub(super) fn section_address(&self, name: &str) -> u64 {
        self.sections.address(name)
    }

    fn read_symbols(&self) -> Result<SymbolTable, Error> {
        let symtab = self.sections.whole(".symtab")?.unwrap_or_default();
        let strings = self.sections.whole(".strtab")?.unwrap_or_default();
        Ok(SymbolTable::from_elf(&symtab, strings, &|section| self.sections.letter(section)))
    }

    /// BTF if it is there: it is a fiftieth of the size of DWARF.
    fn open_types(&self) -> Arc<dyn TypeSource> {
        // That of a module continues the image's.
        let btf = match self.source {
            0 => self.sections.whole(".BTF").and_then(|btf| btf.map(Btf::parse).transpose()),
            _ => Ok(None),
        };
        match btf {
            Ok(Some(btf)) => return Arc::new(btf),
            Ok(None) => {}
            Err(error) => tracing::warn!("{}: {error}", self.path().display()),
        }
        match self.dwarf() {
            Some(dwarf) => dwarf,
            None => Arc::new(NoTypes),
        }
    }

    fn dwarf(&self) -> Option<Arc<Dwarf>> {
        let open = || {
            let units = Units::open(Arc::clone(&self.sections));
            let units = self.tell(units.map(Some))?;
            Some(Arc::new(Dwarf::new(units, self.source, self.build_id.clone(), self.indexes.clone())))
        };
        self.dwarf.get_or_init(|| if self.has_dwarf() { open() } else { None }).clone()
    }
}

pub(super) fn to_hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut hex, byte| {
        // Writing to a String cannot fail.
        let _ = write!(hex, "{byte:02x}");
        hex
    })
}
