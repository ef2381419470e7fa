//! Finding the files of loaded modules: by build-id where distributions put debug files, by name below the
//! directories of the release; a file with another build-id is another module.
//!
//! Compressed files (`.ko.xz`, `.ko.zst`) are passed over: gdb cannot read them either.
//! Source: the packages of Debian and Fedora; `Documentation/kbuild/kbuild.rst` (INSTALL_MOD_PATH).

use super::super::sections::parse;
use super::super::vmlinux::to_hex;
use super::{Places, SYSTEM, for_gdb, is_hex, is_plain_name};
use object::read::elf::SectionHeader;
use object::{Object, ObjectSection, ReadCache, elf};
use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// Names in directories looked at; a distribution's modules are some 5000 files.
const ENTRIES_MAX: usize = 200_000;
const DEPTH_MAX: u32 = 12;

/// The files there are for the modules of one release, by the modules' names.
#[derive(Default)]
pub struct ModuleFiles {
    by_name: HashMap<String, Vec<PathBuf>>,
    build_id_roots: Vec<PathBuf>,
}

/// A section that is loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadedSection {
    /// Its name: `.init.text`.
    pub name: String,
    /// Its length in bytes.
    pub size: u64,
    /// Whether it is for code.
    pub executable: bool,
}

impl LoadedSection {
    /// Whether there is code in it.
    pub fn is_code(&self) -> bool {
        self.executable && self.size != 0
    }
}

/// A module's file.
#[derive(Clone, Default, Debug, PartialEq, Eq)]
pub struct ModuleFile {
    /// Where it is.
    pub path: PathBuf,
    /// The sections that are loaded, in the order of the file.
    pub sections: Vec<LoadedSection>,
    /// Length of the file in bytes.
    pub len: u64,
    /// Whether there is DWARF in it, with no index, and all of it: none shared with other modules in another file.
    pub has_plain_dwarf: bool,
    /// Whether gdb takes it as it is.
    pub suits_gdb: bool,
}

impl ModuleFile {
    /// Writes to `path` what gdb takes in its place: the same, with its sections in another order and all at 0.
    pub fn write_for_gdb(&self, path: &Path) -> std::io::Result<()> {
        std::fs::copy(&self.path, path)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
        for_gdb::cure(&File::options().read(true).write(true).open(path)?)
    }
}

impl ModuleFiles {
    /// Looks for files for the modules of `release`, also near its `vmlinux`.
    pub fn search(release: &str, places: &Places, vmlinux: Option<&Path>) -> Self {
        let mut files = Self::default();
        // Best first: debug files, then what is beside the vmlinux, then what the kernel itself loads.
        let mut roots: Vec<PathBuf> = places.debug_dirs.clone();
        roots.push(SYSTEM.into());
        files.build_id_roots.clone_from(&roots);
        let real = vmlinux.and_then(|path| path.canonicalize().ok());
        roots.extend(real.as_deref().and_then(Path::parent).map(Path::to_owned));
        roots.extend(places.beside.clone());
        roots.push("/".into());
        let mut left = ENTRIES_MAX;
        if is_plain_name(release) {
            for root in &roots {
                for below in ["lib/modules", "usr/lib/modules"] {
                    files.collect(&root.join(below).join(release), 0, &mut left);
                }
            }
        }
        // A file with debug info goes before one that has none.
        for paths in files.by_name.values_mut() {
            paths.sort_by_key(|path| path.extension().is_none_or(|end| end != "debug"));
        }
        files
    }

    fn collect(&mut self, directory: &Path, depth: u32, left: &mut usize) {
        let Ok(entries) = std::fs::read_dir(directory) else { return };
        for entry in entries.flatten() {
            let Some(fewer) = left.checked_sub(1) else { return };
            *left = fewer;
            let path = entry.path();
            // Links lead to the source and in circles.
            match entry.file_type() {
                Ok(kind) if kind.is_dir() && depth < DEPTH_MAX => self.collect(&path, depth + 1, left),
                Ok(kind) if !kind.is_dir() => {
                    let name = entry.file_name().to_string_lossy().into_owned();
                    let Some(name) = name.strip_suffix(".ko").or(name.strip_suffix(".ko.debug")) else {
                        continue;
                    };
                    self.by_name.entry(normal(name)).or_default().push(path);
                }
                _ => {}
            }
        }
    }

    /// The file of the module `name` with this build-id.
    pub fn file(&self, name: &str, build_id: &str) -> Option<ModuleFile> {
        let (dir, rest) = build_id.split_at_checked(2).filter(|_| is_hex(build_id))?;
        let by_id = self.build_id_roots.iter().map(|root| root.join(format!(".build-id/{dir}/{rest}.debug")));
        let by_name = self.by_name.get(&normal(name)).into_iter().flatten().cloned();
        by_id.chain(by_name).find_map(|path| read(path, build_id))
    }
}

/// `dm-mod.ko` holds `dm_mod`.
fn normal(name: &str) -> String {
    name.replace('-', "_")
}

/// The loaded sections of the file, if it is the module with this build-id.
fn read(path: PathBuf, build_id: &str) -> Option<ModuleFile> {
    let cache = ReadCache::new(File::open(&path).ok()?);
    let elf = parse(&path, &cache).ok()?;
    if elf.build_id().ok().flatten().map(to_hex).as_deref() != Some(build_id) {
        return None;
    }
    let endian = elf.endian();
    let mut sections = Vec::new();
    for section in elf.sections() {
        let flags = section.elf_section_header().sh_flags(endian);
        if flags.contains(elf::SHF_ALLOC) {
            let name = section.name().ok()?.to_owned();
            let executable = flags.contains(elf::SHF_EXECINSTR);
            sections.push(LoadedSection { name, size: section.size(), executable });
        }
    }
    let has = |name| elf.section_by_name_bytes(name).is_some();
    let elsewhere = [&b".gdb_index"[..], b".debug_names", b".gnu_debugaltlink"].into_iter().any(has);
    let has_plain_dwarf = has(b".debug_info") && !elsewhere;
    let len = path.metadata().ok()?.len();
    Some(ModuleFile { path, sections, len, has_plain_dwarf, suits_gdb: for_gdb::suits(&elf) })
}
