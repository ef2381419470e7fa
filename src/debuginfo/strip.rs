//! A vmlinux without its debug info, put together while it is read: nothing of it is copied beforehand.
//!
//! What is loaded stays where it is in the file, so that program headers, build-id and BTF need no change; the
//! symbol table follows at once, and the headers of all other sections are inactive. Section numbers stay, and
//! with them the symbols. Source: the ELF specification; eu-strip keeps the same sections.

use super::sections::{Elf, malformed};
use super::{DebugInfo, Error};
use object::pod::bytes_of;
use object::read::elf::{FileHeader, ProgramHeader, SectionHeader};
use object::{Endianness, U16, U64, elf};
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;

/// Bytes that can be read like a file: pieces of a file and of memory, zeros between them.
pub struct Contents {
    file: Arc<File>,
    /// In ascending order, without overlap.
    pieces: Vec<Piece>,
    len: u64,
    /// When the file was last changed, in seconds.
    mtime: i64,
}

struct Piece {
    at: u64,
    len: u64,
    from: From,
}

enum From {
    /// Of the file, from this offset.
    File(u64),
    Held(Vec<u8>),
}

impl Contents {
    /// All of the file at `path`.
    pub fn of_file(path: &Path) -> std::io::Result<Self> {
        let file = File::open(path)?;
        let metadata = file.metadata()?;
        let mut contents = Self { file: Arc::new(file), pieces: Vec::new(), len: 0, mtime: metadata.mtime() };
        contents.push(metadata.len(), From::File(0));
        Ok(contents)
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there is not one byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// When the file behind it was last changed, in seconds since 1970.
    pub fn mtime(&self) -> i64 {
        self.mtime
    }

    /// Fills `buf` from `at`; fewer bytes than it holds only at the end.
    pub fn read(&self, at: u64, buf: &mut [u8]) -> std::io::Result<usize> {
        let rest = self.len.saturating_sub(at);
        let n = usize::try_from(rest).unwrap_or(usize::MAX).min(buf.len());
        let buf = &mut buf[..n];
        buf.fill(0);
        let end = at + n as u64;
        for piece in &self.pieces {
            let (from, to) = (piece.at.max(at), (piece.at + piece.len).min(end));
            if from >= to {
                continue;
            }
            // Both differences are within `buf`, whose length is a usize.
            let into = &mut buf[(from - at) as usize..(to - at) as usize];
            let skipped = from - piece.at;
            match &piece.from {
                From::File(offset) => self.file.read_exact_at(into, offset + skipped)?,
                From::Held(bytes) => {
                    let start = skipped as usize;
                    if let Some(bytes) = bytes.get(start..start + into.len()) {
                        into.copy_from_slice(bytes);
                    }
                }
            }
        }
        Ok(n)
    }

    fn push(&mut self, len: u64, from: From) -> u64 {
        let at = self.len;
        self.pieces.push(Piece { at, len, from });
        self.len += len;
        at
    }

    fn align(&mut self) {
        self.len = self.len.next_multiple_of(8);
    }
}

impl DebugInfo {
    /// The file as it is.
    pub fn whole(&self) -> Result<Contents, Error> {
        let mut contents = self.nothing()?;
        let (len, _) = self.metadata()?;
        contents.push(len, From::File(0));
        Ok(contents)
    }

    /// The file without debug info.
    pub fn stripped(&self) -> Result<Contents, Error> {
        let cache = self.read_cache()?;
        let elf = self.parse(&cache)?;
        let (file_len, _) = self.metadata()?;
        let wrong = |what: &str| malformed(self.path(), what);
        let endian = elf.endian();
        let mut header = *elf.elf_header();
        let mut sections: Vec<elf::SectionHeader64<Endianness>> =
            elf.elf_section_table().iter().copied().collect();
        // Beyond this the count would be kept elsewhere; a kernel has a hundred.
        let count = u16::try_from(sections.len())
            .ok()
            .filter(|&n| n < elf::SHN_LORESERVE)
            .ok_or_else(|| wrong("it has too many sections"))?;
        // The first one is: the format wants it so.
        let inactive = *sections.first().ok_or_else(|| wrong("it has no sections"))?;

        let loaded = loaded_part(&elf, file_len).ok_or_else(|| wrong("a program header leads out of it"))?;
        let mut contents = self.nothing()?;
        let header_len = size_of_val(&header) as u64;
        contents.push(header_len, From::Held(Vec::new()));
        contents.push(loaded.saturating_sub(header_len), From::File(header_len));

        let names = usize::from(header.e_shstrndx(endian).0);
        let symbols = sections.iter().position(|s| s.sh_type(endian) == elf::SHT_SYMTAB);
        let strings = symbols.and_then(|i| sections.get(i)).map(|s| s.sh_link(endian) as usize);
        for (i, section) in sections.iter_mut().enumerate() {
            let loaded_section = section.sh_flags(endian).contains(elf::SHF_ALLOC);
            if i == 0 || loaded_section {
                continue;
            }
            if i != names && Some(i) != symbols && Some(i) != strings {
                *section = inactive;
                continue;
            }
            let (offset, size) = (section.sh_offset(endian), section.sh_size(endian));
            if offset.checked_add(size).is_none_or(|end| end > file_len) {
                return Err(wrong("its symbol table leads out of it"));
            }
            contents.align();
            section.sh_offset = U64::new(endian, contents.push(size, From::File(offset)));
        }
        contents.align();
        let headers: Vec<u8> = sections.iter().flat_map(|section| bytes_of(section).to_vec()).collect();
        let at = contents.push(headers.len() as u64, From::Held(headers));
        header.e_shoff = U64::new(endian, at);
        header.e_shnum = U16::new(endian, count);
        if let Some(first) = contents.pieces.first_mut() {
            first.from = From::Held(bytes_of(&header).to_vec());
        }
        Ok(contents)
    }

    fn nothing(&self) -> Result<Contents, Error> {
        let (_, mtime) = self.metadata()?;
        Ok(Contents { file: self.file(), pieces: Vec::new(), len: 0, mtime })
    }

    fn metadata(&self) -> Result<(u64, i64), Error> {
        let metadata = self
            .file()
            .metadata()
            .map_err(|source| Error::Io { path: self.path().display().to_string(), source })?;
        Ok((metadata.len(), metadata.mtime()))
    }
}

/// How much of the file, from its start, holds headers and what is loaded; `None` if they lead out of it.
fn loaded_part(elf: &Elf<'_>, file_len: u64) -> Option<u64> {
    let endian = elf.endian();
    let header = elf.elf_header();
    let table = u64::from(header.e_phnum(endian)) * u64::from(header.e_phentsize(endian));
    let mut end = header.e_phoff(endian).checked_add(table).filter(|&end| end <= file_len)?;
    for segment in elf.elf_program_headers() {
        // In a file of debug info only, segments keep their size and lose their bytes.
        end = end.max(segment.p_offset(endian).checked_add(segment.p_filesz(endian))?.min(file_len));
    }
    for section in elf.elf_section_table().iter() {
        let loaded = section.sh_flags(endian).contains(elf::SHF_ALLOC);
        if let (true, Some((offset, size))) = (loaded, section.file_range(endian)) {
            end = end.max(offset.checked_add(size)?.min(file_len));
        }
    }
    Some(end)
}
