//! The sections of one ELF file: read whole or piece by piece, decompressed, and relocated where nobody linked them.
//!
//! Knows where bytes are and not what they mean. A module's file (`ET_REL`) is given the addresses that its sections
//! have in memory. Source: the ELF specification; System V ABI, AMD64 supplement, "Relocation".

use super::Error;
use object::read::elf::ElfFile64;
use object::{
    Endianness, Object, ObjectSection, ObjectSymbol, ReadCache, RelocationKind, RelocationTarget, elf,
};
use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub(super) type Elf<'a> = ElfFile64<'a, Endianness, &'a ReadCache<File>>;

/// Addresses by section name; what is not named is at 0.
pub type SectionAddresses = HashMap<String, u64>;

/// Where the sections of a file are.
pub struct Sections {
    path: PathBuf,
    file: Arc<File>,
    by_name: HashMap<String, Section>,
    /// What `nm` calls symbols in the section of each index, from 0.
    letters: Vec<u8>,
    /// Where the sections of a file that is not linked are in memory.
    loaded_at: Option<SectionAddresses>,
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
    /// A section that is already in memory; `path` is named in errors.
    #[cfg(test)]
    pub fn held(bytes: Vec<u8>, path: &str) -> Self {
        Self { bytes: SectionBytes::Held(bytes), path: path.to_owned() }
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        match &self.bytes {
            SectionBytes::InFile { size, .. } => *size,
            SectionBytes::Held(bytes) => bytes.len() as u64,
        }
    }

    /// Fills `buf` with what is at `at`.
    pub fn read_into(&self, at: u64, buf: &mut [u8]) -> Result<(), Error> {
        let past_end = || malformed(Path::new(&self.path), "section read past its end");
        let end = at.checked_add(buf.len() as u64).filter(|&end| end <= self.len()).ok_or_else(past_end)?;
        match &self.bytes {
            SectionBytes::Held(bytes) => {
                buf.copy_from_slice(bytes.get(at as usize..end as usize).ok_or_else(past_end)?);
                Ok(())
            }
            SectionBytes::InFile { file, offset, .. } => file
                .read_exact_at(buf, offset + at)
                .map_err(|source| Error::Io { path: self.path.clone(), source }),
        }
    }

    /// `len` bytes from `at`.
    pub fn read(&self, at: u64, len: u64) -> Result<Vec<u8>, Error> {
        if at.checked_add(len).is_none_or(|end| end > self.len()) {
            return Err(malformed(Path::new(&self.path), "section read past its end"));
        }
        let mut buf = vec![0; len as usize];
        self.read_into(at, &mut buf)?;
        Ok(buf)
    }
}

impl Sections {
    /// The sections of `elf`, which is read from `file` at `path`. `loaded_at` matters for a file that is not linked.
    pub fn new(
        path: &Path,
        file: File,
        elf: &Elf<'_>,
        loaded_at: Option<SectionAddresses>,
    ) -> std::io::Result<Self> {
        let file_len = file.metadata()?.len();
        let relocatable = elf.kind() == object::ObjectKind::Relocatable;
        let loaded_at = relocatable.then(|| loaded_at.unwrap_or_default());
        let mut by_name = HashMap::new();
        let mut letters = Vec::new();
        for section in elf.sections() {
            letters.resize(section.index().0.min(usize::from(u16::MAX)), b'?');
            letters.push(letter(&section));
            // A stripped or separated file keeps headers of sections whose bytes it lacks.
            let (Ok(name), Some((offset, size))) = (section.name(), section.file_range()) else { continue };
            // Sizes are the file's word; nothing is allocated for bytes that are not there.
            if offset.checked_add(size).is_none_or(|end| end > file_len) {
                continue;
            }
            let compressed = section
                .compressed_file_range()
                .is_ok_and(|range| range.format != object::CompressionFormat::None);
            by_name.insert(name.to_owned(), Section { offset, size, compressed, address: section.address() });
        }
        Ok(Self { path: path.to_owned(), file: Arc::new(file), by_name, letters, loaded_at })
    }

    /// The letter that `nm` has for symbols in the section of this index, in lower case.
    pub fn letter(&self, index: u16) -> Option<u8> {
        self.letters.get(usize::from(index)).copied().filter(|&letter| letter != b'?')
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn file(&self) -> &Arc<File> {
        &self.file
    }

    pub fn contains(&self, name: &str) -> bool {
        self.by_name.contains_key(name)
    }

    /// Where the section is in memory: linked or, in a file that is not, loaded; 0 if that is not known.
    pub fn address(&self, name: &str) -> u64 {
        match &self.loaded_at {
            Some(loaded_at) => loaded_at.get(name).copied().unwrap_or(0),
            None => self.by_name.get(name).map_or(0, |section| section.address),
        }
    }

    /// The file for `object` to read.
    pub fn read_cache(&self) -> Result<ReadCache<File>, Error> {
        Ok(ReadCache::new(self.file.try_clone().map_err(|source| self.io(source))?))
    }

    /// The file's bytes at link-time address `at`, `len` of them, if a section in the file holds them.
    pub fn bytes_at(&self, at: u64, len: u64) -> Option<Vec<u8>> {
        let section = self.by_name.values().find(|s| {
            s.address != 0
                && at.checked_sub(s.address).is_some_and(|o| o.checked_add(len).is_some_and(|e| e <= s.size))
        })?;
        let mut buf = vec![0; usize::try_from(len).ok().filter(|&n| n <= 4096)?];
        self.file.read_exact_at(&mut buf, section.offset + (at - section.address)).ok()?;
        Some(buf)
    }

    /// The section, to be read piece by piece; held if it must be decompressed or relocated. Empty if there is none.
    pub fn reader(&self, name: &str) -> Result<SectionReader, Error> {
        let path = self.path.display().to_string();
        let bytes = match self.by_name.get(name) {
            Some(s) if !s.compressed && self.loaded_at.is_none() => {
                SectionBytes::InFile { file: Arc::clone(&self.file), offset: s.offset, size: s.size }
            }
            _ => SectionBytes::Held(self.whole(name)?.unwrap_or_default()),
        };
        Ok(SectionReader { bytes, path })
    }

    /// The whole of a section, decompressed and relocated; `None` where the file does not have it.
    pub fn whole(&self, name: &str) -> Result<Option<Vec<u8>>, Error> {
        let Some(section) = self.by_name.get(name) else { return Ok(None) };
        if !section.compressed && self.loaded_at.is_none() {
            // Its size is within the file's.
            let mut bytes = vec![0; section.size as usize];
            self.file.read_exact_at(&mut bytes, section.offset).map_err(|source| self.io(source))?;
            return Ok(Some(bytes));
        }
        let cache = self.read_cache()?;
        let elf = parse(&self.path, &cache)?;
        let Some(found) = elf.section_by_name(name) else { return Ok(None) };
        let data = found.uncompressed_data();
        let data = data.map_err(|e| malformed(&self.path, format!("section {name}: {e}")))?;
        let mut bytes = data.into_owned();
        if let Some(loaded_at) = &self.loaded_at {
            match name {
                ".symtab" => relocate_symbols(&elf, loaded_at, &mut bytes),
                _ => relocate(&elf, &found, loaded_at, &mut bytes),
            }
        }
        Ok(Some(bytes))
    }

    fn io(&self, source: std::io::Error) -> Error {
        Error::Io { path: self.path.display().to_string(), source }
    }
}

/// Writes addresses and offsets into other sections where the relocations of `section` say they belong.
fn relocate<'a>(
    elf: &Elf<'a>,
    section: &impl ObjectSection<'a>,
    loaded_at: &SectionAddresses,
    bytes: &mut [u8],
) {
    for (at, relocation) in section.relocations() {
        let base = match relocation.target() {
            RelocationTarget::Symbol(index) => {
                let Ok(symbol) = elf.symbol_by_index(index) else { continue };
                let section = symbol.section_index().and_then(|index| elf.section_by_index(index).ok());
                let loaded = section.and_then(|s| loaded_at.get(s.name().ok()?).copied()).unwrap_or(0);
                loaded.wrapping_add(symbol.address())
            }
            _ => 0,
        };
        let value = base.wrapping_add(relocation.addend() as u64).to_le_bytes();
        let width = usize::from(relocation.size() / 8);
        // Debug sections have absolute relocations only, of 4 or 8 bytes.
        if relocation.kind() == RelocationKind::Absolute
            && let Ok(at) = usize::try_from(at)
            && let Some(end) = at.checked_add(width)
            && let (Some(place), Some(value)) = (bytes.get_mut(at..end), value.get(..width))
        {
            place.copy_from_slice(value);
        }
    }
}

/// Turns symbols' offsets in their sections into addresses.
fn relocate_symbols(elf: &Elf<'_>, loaded_at: &SectionAddresses, symtab: &mut [u8]) {
    let bases: Vec<u64> = {
        let names = elf.sections().map(|s| s.name().ok().and_then(|name| loaded_at.get(name).copied()));
        // Section 0 is not among them.
        std::iter::once(0).chain(names.map(Option::unwrap_or_default)).collect()
    };
    for record in symtab.chunks_exact_mut(size_of::<elf::Sym64<Endianness>>()) {
        let section = crate::bytes::u16_at(record, 6).and_then(|index| bases.get(usize::from(index)));
        if let (Some(base), Some(value)) = (section, crate::bytes::u64_at(record, 8))
            && let Some(place) = record.get_mut(8..16)
        {
            place.copy_from_slice(&value.wrapping_add(*base).to_le_bytes());
        }
    }
}

/// By flags; a file of debug info alone has all of the image's sections without bytes, so `.bss` goes by its name.
fn letter<'a>(section: &impl ObjectSection<'a>) -> u8 {
    let object::SectionFlags::Elf { sh_flags, .. } = section.flags() else { return b'?' };
    let has = |flag: elf::SectionFlags| sh_flags & flag == flag;
    let is_bss = section.name().is_ok_and(|name| name.starts_with(".bss") || name.starts_with(".brk"));
    match (has(elf::SHF_ALLOC), has(elf::SHF_EXECINSTR), has(elf::SHF_WRITE)) {
        (false, ..) => b'?',
        (true, true, _) => b't',
        (true, false, true) if is_bss => b'b',
        (true, false, true) => b'd',
        (true, false, false) => b'r',
    }
}

pub(super) fn parse<'a>(path: &Path, cache: &'a ReadCache<File>) -> Result<Elf<'a>, Error> {
    Elf::parse(cache).map_err(|e| malformed(path, format!("{e}")))
}

pub(super) fn malformed(path: &Path, what: impl Into<String>) -> Error {
    Error::Malformed { path: path.display().to_string(), what: what.into() }
}
