//! Symbols and types from bytes this layer is *given*: an ELF file with debug info; and finding that file.
//! Never reads a machine.
//!
//! Everything above asks [`DebugInfo`] and cannot tell whether BTF or DWARF answered.

mod btf;
pub mod cfi;
pub mod debuginfod;
mod dwarf;
mod dwarf_index;
mod dwarf_scan;
mod dwarf_unit;
pub mod find;
pub mod kallsyms;
mod lines;
pub mod orc;
mod sections;
mod strip;
mod symbols;
pub mod synth;
pub mod types;
mod vmlinux;

pub use btf::Btf;
pub use lines::Location;
pub use sections::SectionAddresses;
pub use strip::Contents;
pub use symbols::{Symbol, SymbolTable};
pub use types::{Class, Member, TypeId, TypeTable};
pub use vmlinux::DebugInfo;

/// The GNU build-id in the bytes of an ELF note section, in lower-case hex. Source: `elf.h`, `NT_GNU_BUILD_ID`.
pub fn build_id_in_notes(notes: &[u8]) -> Option<String> {
    const NT_GNU_BUILD_ID: u32 = 3;
    let mut at = 0usize;
    loop {
        let word = |i: usize| crate::bytes::u32_at(notes, at.checked_add(i)?);
        let (name, desc, kind) = (word(0)? as usize, word(4)? as usize, word(8)?);
        let name_at = at.checked_add(12)?;
        let desc_at = name_at.checked_add(name.checked_next_multiple_of(4)?)?;
        let end = desc_at.checked_add(desc)?;
        if kind == NT_GNU_BUILD_ID && notes.get(name_at..name_at.checked_add(name)?) == Some(b"GNU\0") {
            return notes.get(desc_at..end).map(vmlinux::to_hex);
        }
        at = end.checked_next_multiple_of(4)?;
    }
}

/// What can go wrong with debug info; the text names the file.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be opened or read.
    #[error("cannot read '{path}': {source}")]
    Io {
        /// The file.
        path: String,
        /// The system's error.
        source: std::io::Error,
    },
    /// Not an ELF file, or a damaged one.
    #[error("'{path}' is not a usable vmlinux: {what}")]
    Malformed {
        /// The file.
        path: String,
        /// What is wrong, as half a sentence.
        what: String,
    },
    /// BTF or DWARF makes no sense.
    #[error("{format} at offset {offset:#x}: {what}")]
    Types {
        /// `"BTF"` or `"DWARF"`.
        format: &'static str,
        /// Offset inside the section.
        offset: u64,
        /// What is wrong, as half a sentence.
        what: String,
    },
}
