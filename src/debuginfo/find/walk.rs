//! Looking into files: the build-id in an ELF file's notes, and directories searched for it, within bounds.
//!
//! Source: the ELF specification (notes), `scripts/link-vmlinux.sh`.

use super::super::sections::parse;
use super::super::vmlinux::to_hex;
use object::read::elf::FileHeader;
use object::{Object, ReadCache, elf};
use std::fs::File;
use std::path::{Path, PathBuf};

/// Bounds of one search.
#[derive(Clone, Copy)]
pub(super) struct Bounds {
    pub depth: u32,
    /// Names in directories.
    pub entries: usize,
    /// Files opened.
    pub files: usize,
}

/// What a search came across.
#[derive(Default)]
pub(super) struct Walk {
    /// Files with the build-id; without one to compare, those that are called `vmlinux*`.
    pub fitting: Vec<PathBuf>,
    /// `vmlinux*` files that would have to be unpacked first.
    pub compressed: Vec<PathBuf>,
    /// Files looked into.
    pub looked_into: usize,
    entries: usize,
    /// Whether the bounds ended the search.
    pub cut_short: bool,
}

impl Walk {
    /// Searches `root` and what is below it; stops at the first file with the build-id.
    pub fn search(&mut self, root: &Path, build_id: Option<&str>, bounds: Bounds) {
        let mut directories = vec![(root.to_owned(), 0)];
        while let Some((directory, depth)) = directories.pop() {
            let Ok(entries) = std::fs::read_dir(&directory) else { continue };
            for entry in entries.flatten() {
                self.entries += 1;
                if self.entries > bounds.entries || self.looked_into >= bounds.files {
                    self.cut_short = true;
                    return;
                }
                // Links to directories are not followed: they lead in circles.
                let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
                let (name, path) = (entry.file_name(), entry.path());
                let name = name.to_string_lossy();
                match is_directory {
                    // `.build-id` and the like hold links to what is found elsewhere.
                    true if depth < bounds.depth && !name.starts_with('.') => {
                        directories.push((path, depth + 1));
                    }
                    false if self.consider(&name, path, build_id) => return,
                    _ => {}
                }
            }
        }
    }

    /// Whether that was it.
    fn consider(&mut self, name: &str, path: PathBuf, build_id: Option<&str>) -> bool {
        if is_compressed_vmlinux(name) {
            self.compressed.push(path);
            return false;
        }
        let Some(wanted) = build_id else {
            if name.starts_with("vmlinux") && path.is_file() {
                self.looked_into += 1;
                self.fitting.push(path);
            }
            return false;
        };
        // Modules are many, and none is a vmlinux.
        if name.ends_with(".ko") || name.ends_with(".ko.debug") || !path.is_file() {
            return false;
        }
        self.looked_into += 1;
        let fits = build_id_of(&path).as_deref() == Some(wanted);
        if fits {
            self.fitting.push(path);
        }
        fits
    }
}

/// Whether `name` is that of a vmlinux in a form that gdb cannot read either.
pub(super) fn is_compressed_vmlinux(name: &str) -> bool {
    name.starts_with("vmlinux") && [".xz", ".zst", ".gz", ".bz2"].iter().any(|end| name.ends_with(end))
}

/// The build-id of an x86-64 ELF file that is no core; reads headers and notes only.
fn build_id_of(path: &Path) -> Option<String> {
    let cache = ReadCache::new(File::open(path).ok()?);
    let elf = parse(path, &cache).ok()?;
    let (header, endian) = (elf.elf_header(), elf.endian());
    let usable = header.e_machine(endian) == elf::EM_X86_64 && header.e_type(endian) != elf::ET_CORE;
    usable.then(|| elf.build_id().ok().flatten().map(to_hex)).flatten()
}
