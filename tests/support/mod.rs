//! Writers of what kstub reads: core files, page tables, a tiny kernel.
//!
//! Each writer follows the published definition of its format and shares no struct, constant or helper with
//! kstub's own parsers, so a layout that is wrong in the parser cannot agree with itself here.
#![allow(dead_code, unused_imports, missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

pub mod damaged;
pub mod elf_core;
pub mod elf_file;
pub mod flat_memory;
pub mod flattened;
pub mod gdb_session;
pub mod kallsyms;
pub mod kdump;
pub mod lab;
pub mod lime;
pub mod live;
pub mod model;
pub mod notes;
pub mod page_tables;
pub mod put;
pub mod rng;
pub mod tiny_kernel;

pub use flat_memory::FlatMemory;
pub use model::Model;
pub use rng::Rng;

/// One page of data, boxed.
pub type Page = Box<[u8; 4096]>;

/// A file in a temporary directory of its own, removed when dropped.
pub struct TempFile {
    dir: tempfile::TempDir,
    path: std::path::PathBuf,
}

impl TempFile {
    pub fn new(bytes: &[u8]) -> Self {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("vmcore");
        std::fs::write(&path, bytes).expect("temporary file");
        Self { dir, path }
    }

    /// Replaces what the file holds.
    pub fn rewrite(&self, bytes: &[u8]) {
        std::fs::write(&self.path, bytes).expect("temporary file");
    }

    pub fn path(&self) -> &std::path::Path {
        &self.path
    }

    /// The directory that has nothing else in it.
    pub fn dir(&self) -> &std::path::Path {
        self.dir.path()
    }

    /// A further file beside this one.
    pub fn sibling(&self, name: &str, bytes: &[u8]) -> std::path::PathBuf {
        let path = self.dir.path().join(name);
        std::fs::write(&path, bytes).expect("temporary file");
        path
    }
}
