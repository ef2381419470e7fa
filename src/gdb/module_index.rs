//! gdb's indexes of modules, each made once for wherever the module is loaded.
//!
//! gdb's own cache keeps indexes by build-id, with the addresses that a module's sections happened to have: another boot
//! has others. Here gdb makes an index with [`SPACE`] of its own for each section of code, and each session gets a copy
//! with the addresses of its dump.
//! Source: GDB manual, "Index Section Format", "Automatic symbol index cache".

use super::index::{IndexError, WORK_PREFIX, remove_stale, run_gdb};
use crate::debuginfo::find::{ModuleFile, is_hex, user_caches};
use std::ffi::OsString;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Section number N, counted from 0, is indexed at N + 1 times this many bytes.
const SPACE: u64 = 1 << 32;

/// Modules that one gdb indexes: between them progress is told.
const AT_ONCE: usize = 16;

/// Longer than any index: of the biggest modules (amdgpu) it is some 30 MB.
const LEN_MAX: u64 = 1 << 30;

/// Where indexes are kept for one gdb.
pub(super) struct ModuleIndexes {
    gdb: PathBuf,
    directory: PathBuf,
    /// Different for gdbs of different versions, which may not read each other's.
    version: u64,
}

/// A module's file that gdb can index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Indexable {
    build_id: String,
    /// Names of its sections of code, in the order of the file.
    code: Vec<String>,
}

/// What gdb is to be asked for.
pub(super) struct Wanted<'a> {
    pub module: &'a Indexable,
    /// The module's file, with all sections at 0.
    pub file: &'a Path,
}

impl Indexable {
    /// `None` if an index would be of no use, or could not be told where the code is.
    pub(super) fn new(build_id: &str, file: &ModuleFile) -> Option<Self> {
        let code: Vec<_> = file.sections.iter().filter(|s| s.is_code()).map(|s| s.name.clone()).collect();
        // They become words of a command.
        let plain = |b: u8| b.is_ascii_alphanumeric() || b"_-.".contains(&b);
        let are_plain = code.iter().all(|name| !name.is_empty() && name.bytes().all(plain));
        let are_distinct =
            code.iter().enumerate().all(|(n, name)| code.iter().take(n).all(|one| one != name));
        let good = is_hex(build_id) && file.has_plain_dwarf && are_plain && are_distinct && !code.is_empty();
        good.then(|| Self { build_id: build_id.to_ascii_lowercase(), code })
    }

    /// What gdb's cache calls the index.
    pub(super) fn cache_name(&self) -> String {
        format!("{}.gdb-index", self.build_id)
    }

    /// gdb's commands that save an index of `file` in `directory`. There, both are plain names.
    fn commands(&self, file: &str, directory: &str) -> [String; 3] {
        let mut add = format!("add-symbol-file {file}");
        for (name, at) in self.code.iter().zip((1u64..).map(|n| n * SPACE)) {
            add += &format!(" -s {name} {at:#x}");
        }
        // By an address of the first section.
        [add, format!("save gdb-index {directory}"), format!("remove-symbol-file -a {SPACE:#x}")]
    }
}

impl ModuleIndexes {
    /// Those made by the `gdb` of this name or path; `None` if there is nowhere to keep them.
    pub(super) fn of(gdb: &Path) -> Option<Self> {
        Self::kept_in(user_caches()?.join("kstub/gdb"), gdb)
    }

    fn kept_in(directory: PathBuf, gdb: &Path) -> Option<Self> {
        let search = || {
            std::env::split_paths(&std::env::var_os("PATH")?).map(|path| path.join(gdb)).find(|p| p.is_file())
        };
        let program = if gdb.components().count() > 1 { gdb.to_owned() } else { search()? };
        let metadata = program.metadata().ok()?;
        let mut hasher = DefaultHasher::new();
        (program.canonicalize().ok()?, metadata.len(), metadata.mtime(), metadata.ino()).hash(&mut hasher);
        Some(Self { gdb: gdb.to_owned(), directory, version: hasher.finish() })
    }

    /// Where the index of `module` is or will be.
    fn path(&self, module: &Indexable) -> PathBuf {
        let mut hasher = DefaultHasher::new();
        (self.version, &module.code).hash(&mut hasher);
        self.directory.join(format!("{}-{:016x}.gdb-index", module.build_id, hasher.finish()))
    }

    /// Whether there is an index of `module`.
    pub(super) fn has(&self, module: &Indexable) -> bool {
        self.path(module).is_file()
    }

    /// Lets gdb index all of `wanted`; while it works, `progress` is called. How many indexes it made.
    pub(super) fn make(
        &self,
        wanted: &[Wanted],
        progress: &mut dyn FnMut(Duration),
    ) -> Result<usize, IndexError> {
        let error = |path: &Path| {
            let path = path.to_owned();
            move |source| IndexError::Cache { path, source }
        };
        std::fs::create_dir_all(&self.directory).map_err(error(&self.directory))?;
        remove_stale(&self.directory);
        let mut made = 0;
        for some in wanted.chunks(AT_ONCE) {
            let work = tempfile::Builder::new().prefix(WORK_PREFIX).tempdir_in(&self.directory);
            let work = work.map_err(error(&self.directory))?;
            let mut arguments = Vec::new();
            for (n, one) in some.iter().enumerate() {
                let (link, saved) = (format!("module{n}"), format!("index{n}"));
                let at = work.path().join(&link);
                std::os::unix::fs::symlink(one.file, &at).map_err(error(&at))?;
                let at = work.path().join(&saved);
                std::fs::create_dir(&at).map_err(error(&at))?;
                let commands = one.module.commands(&link, &saved);
                arguments.extend(commands.into_iter().flat_map(|command| ["-ex".to_owned(), command]));
            }
            let arguments: Vec<_> = arguments.into_iter().map(OsString::from).collect();
            run_gdb(&self.gdb, &arguments, work.path(), progress)?;
            for (n, one) in some.iter().enumerate() {
                let saved = std::fs::read_dir(work.path().join(format!("index{n}")));
                let mut saved = saved.into_iter().flatten().flatten();
                let to = self.path(one.module);
                let kept = match (saved.next(), saved.next()) {
                    (Some(index), None) => std::fs::rename(index.path(), &to).map(|()| made += 1),
                    // An empty file: gdb is not asked for it each time.
                    _ => std::fs::write(&to, []),
                };
                kept.map_err(error(&to))?;
            }
        }
        Ok(made)
    }

    /// Writes the index of `module` to `to`, for its sections of code at these addresses; `false` if there is none.
    pub(super) fn write(&self, module: &Indexable, code: &[u64], to: &Path) -> std::io::Result<bool> {
        let path = self.path(module);
        if code.len() != module.code.len() || path.metadata().is_ok_and(|file| file.len() > LEN_MAX) {
            return Ok(false);
        }
        let index = match std::fs::read(&path) {
            Ok(index) => index,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(error),
        };
        match rebased(&index, code) {
            Some(index) => std::fs::write(to, index).map(|()| true),
            None => Ok(false),
        }
    }
}

/// An index with its addresses where the sections of code are; `None` if it is none.
fn rebased(index: &[u8], code: &[u64]) -> Option<Vec<u8>> {
    // The version, then where in the file its parts are: units, type units, addresses, what follows them.
    const ADDRESSES: usize = 3;
    // From, to, number of the unit.
    const ENTRY: usize = 20;
    let word = |n: usize| index.get(n * 4..)?.first_chunk().map(|bytes| u32::from_le_bytes(*bytes));
    let words = match word(0)? {
        7 | 8 => 6,
        9 => 7,
        _ => return None,
    };
    let offset = |n: usize| usize::try_from(word(n)?).ok();
    let (from, to) = (offset(ADDRESSES)?, offset(ADDRESSES + 1)?);
    let (entries, []) = index.get(from..to)?.as_chunks::<ENTRY>() else { return None };
    let mut moved = index.get(..from)?.to_vec();
    moved.reserve(index.len() - from);
    let at = |address: &[u8]| {
        let address = u64::from_le_bytes(*address.first_chunk()?);
        let section = usize::try_from((address / SPACE).checked_sub(1)?).ok()?;
        Some(code.get(section)?.wrapping_add(address % SPACE).to_le_bytes())
    };
    for entry in entries {
        let [from, to] = [0, 8].map(|n| at(entry.get(n..)?));
        // Else it is of code that the linker has left out.
        if let (Some(from), Some(to)) = (from, to) {
            moved.extend([from, to].concat());
            moved.extend(entry.iter().skip(16));
        }
    }
    let shorter = u32::try_from(to.checked_sub(moved.len())?).ok()?;
    for n in ADDRESSES + 1..words {
        let place = moved.get_mut(n * 4..)?.first_chunk_mut()?;
        *place = word(n)?.checked_sub(shorter)?.to_le_bytes();
    }
    moved.extend(index.get(to..)?);
    Some(moved)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::debuginfo::find::LoadedSection;
    use std::os::unix::fs::PermissionsExt;

    fn index(version: u32, entries: &[(u64, u64, u32)]) -> Vec<u8> {
        let words = if version < 9 { 6 } else { 7 };
        let (start, end) = (4 * words, 4 * words + 20 * entries.len() as u32);
        let header = [version, start, start, start, end, end, end];
        let header = header.into_iter().take(words as usize);
        let mut bytes: Vec<u8> = header.flat_map(u32::to_le_bytes).collect();
        for (from, to, unit) in entries {
            bytes.extend([from.to_le_bytes(), to.to_le_bytes()].concat());
            bytes.extend(unit.to_le_bytes());
        }
        bytes.extend(b"names");
        bytes
    }

    fn module(names: &[&str]) -> Option<Indexable> {
        let section =
            |(name, executable): (&str, bool)| LoadedSection { name: name.into(), size: 1, executable };
        let sections = names.iter().map(|name| section((name, !name.ends_with("data")))).collect();
        let file = ModuleFile { has_plain_dwarf: true, sections, ..ModuleFile::default() };
        Indexable::new("00AB", &file)
    }

    #[test]
    fn addresses_move_to_where_the_sections_are() {
        let (text, init) = (0xffff_ffff_c000_1000, 0xffff_ffff_ffe0_0040);
        let made = [(SPACE + 0x10, SPACE + 0x30, 7), (0x10, 0x20, 1), (2 * SPACE, 2 * SPACE + 9, 8)];
        let moved = [(text + 0x10, text + 0x30, 7), (init, init + 9, 8)];
        for version in [8, 9] {
            assert_eq!(rebased(&index(version, &made), &[text, init]).unwrap(), index(version, &moved));
        }
    }

    #[test]
    fn what_is_no_such_index_is_refused() {
        let good = index(9, &[(SPACE, SPACE + 1, 0)]);
        rebased(&good, &[0]).unwrap();
        assert_eq!(rebased(&index(6, &[]), &[0]), None);
        assert_eq!(rebased(&index(10, &[]), &[0]), None);
        for cut in 0..48 {
            assert_eq!(rebased(&good[..cut], &[0]), None);
        }
        for (word, by) in [(3, 1), (3, 100), (4, 1), (4, 200)] {
            let mut bytes = good.clone();
            bytes[word * 4] += by;
            assert_eq!(rebased(&bytes, &[0]), None, "{word} {by}");
        }
    }

    #[test]
    fn modules_are_indexed_once_for_each_gdb() {
        let dir = tempfile::tempdir().unwrap();
        let gdb = |name: &str| {
            let path = dir.path().join(name);
            // Saves what it is told into each directory that it is to save in.
            let script = "#!/bin/sh\nfor word; do case $word in save*) echo \"$*\" > ${word#save gdb-index }/x; esac; done\n";
            std::fs::write(&path, script).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
            path
        };
        let (one, other) = (gdb("gdb"), gdb("gdb-new"));
        let indexes = ModuleIndexes::kept_in(dir.path().join("kept"), &one).unwrap();
        let module = module(&[".text", ".data", ".init.text"]).unwrap();
        assert!(!indexes.has(&module));
        let wanted = [Wanted { module: &module, file: Path::new("/x y/m.ko") }];
        assert_eq!(indexes.make(&wanted, &mut |_| {}).unwrap(), 1);
        assert!(indexes.has(&module));
        let said = std::fs::read_to_string(indexes.path(&module)).unwrap();
        assert!(
            said.contains("add-symbol-file module0 -s .text 0x100000000 -s .init.text 0x200000000"),
            "{said}"
        );
        assert_eq!(std::fs::read_dir(&indexes.directory).unwrap().count(), 1, "no temporary file is left");
        let others = ModuleIndexes::kept_in(dir.path().join("kept"), &other).unwrap();
        assert!(!others.has(&module));
        let to = dir.path().join("to");
        assert!(!indexes.write(&module, &[0, 0], &to).unwrap(), "that was no index");
        std::fs::write(indexes.path(&module), index(9, &[])).unwrap();
        assert!(indexes.write(&module, &[0, 0], &to).unwrap() && to.exists());
    }

    #[test]
    fn names_that_are_no_plain_words_are_not_told_gdb() {
        assert!(module(&[".text", ".text.unlikely", "odd data"]).is_some());
        for names in [&[".text 1"][..], &["a\nb"], &[".text", ".text"], &[""], &["data"]] {
            assert_eq!(module(names), None, "{names:?}");
        }
    }
}
