//! Finding the vmlinux of a kernel: by its build-id or release where distributions put it, by content where people
//! do, and from debuginfod.
//!
//! What a dump says of itself becomes part of a path only if it is a plain name. Source: the packages of Debian, Fedora
//! and openSUSE; GDB manual, "Separate Debug Files".

mod for_gdb;
mod module;
mod remember;
mod source;
mod walk;

use super::DebugInfo;
use super::debuginfod::Debuginfod;
use crate::bytes::printable;
use std::path::{Path, PathBuf};
use walk::{Bounds, Walk};

pub use module::{LoadedSection, ModuleFile, ModuleFiles};
pub use source::source_text;

/// Where distributions put debug info.
const SYSTEM: &str = "/usr/lib/debug";
/// Bounds of the search by content: a full `/usr/lib/debug` has some ten thousand files.
const EVERYWHERE: Bounds = Bounds { depth: 8, entries: 100_000, files: 20_000 };
/// The dump's directory can be someone's home.
const BESIDE: Bounds = Bounds { depth: 2, entries: 4096, files: 1024 };
/// Without a build-id each candidate costs the reading of its symbols.
const MAX_CANDIDATES: usize = 32;

/// What is known of the kernel whose vmlinux is wanted.
pub struct Wanted<'a> {
    /// `uname -r`; comes out of a dump, so it is checked before it becomes part of a path.
    pub release: &'a str,
    /// Build-id in lower-case hex, likewise.
    pub build_id: Option<&'a str>,
}

/// Where to look besides the places that distributions use.
#[derive(Default)]
pub struct Places {
    /// Directory of the dump.
    pub beside: Option<PathBuf>,
    /// Directories that the user named.
    pub debug_dirs: Vec<PathBuf>,
    /// Directory that keeps where a vmlinux was found.
    pub memory: Option<PathBuf>,
    /// Servers to ask last.
    pub debuginfod: Option<Debuginfod>,
}

/// A file that was considered and turned down, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejected {
    /// The file.
    pub path: PathBuf,
    /// Why, as half a sentence.
    pub why: String,
}

/// What came of a search.
#[derive(Default)]
pub struct Search {
    /// The first file that fits.
    pub found: Option<DebugInfo>,
    /// Files that were looked at and do not.
    pub rejected: Vec<Rejected>,
    /// Where it was looked, to be told if nothing was found.
    pub searched: Vec<String>,
    /// What the servers said.
    pub failures: Vec<String>,
}

/// Where this user's programs keep caches.
pub fn user_caches() -> Option<PathBuf> {
    let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")))
}

/// Looks for a file that `fits`.
pub fn vmlinux(
    wanted: &Wanted<'_>,
    places: &Places,
    fits: &dyn Fn(&DebugInfo) -> Result<(), String>,
) -> Search {
    let build_id = wanted.build_id.filter(|id| is_hex(id));
    let mut search = Search::default();
    let mut seen = Vec::new();
    let mut first_fit = |paths: Vec<PathBuf>, search: &mut Search| {
        for path in paths {
            if search.found.is_some() || seen.contains(&path) || !path.is_file() {
                continue;
            }
            search.consider(&path, fits);
            seen.push(path);
        }
        search.found.is_some()
    };
    let remembered = places.memory.as_deref().zip(build_id);
    let known = remembered.and_then(|(memory, id)| remember::recall(memory, id)).into_iter();
    let known = known.chain(candidates(wanted.release, build_id, places));
    let cached = places.debuginfod.as_ref().zip(build_id).map(|(servers, id)| servers.cached(id));
    // Empty where servers said that they do not have it.
    let cached = cached.filter(|path| path.metadata().is_ok_and(|metadata| metadata.len() > 0));
    if first_fit(known.chain(cached).collect(), &mut search) {
        return search;
    }

    let beside = places.beside.iter().map(|dir| (dir.as_path(), BESIDE));
    let named = places.debug_dirs.iter().map(|dir| (dir.as_path(), EVERYWHERE));
    for (root, bounds) in beside.chain(named).chain([(Path::new(SYSTEM), EVERYWHERE)]) {
        let mut walk = Walk::default();
        walk.search(root, build_id, bounds);
        tracing::info!("searched {} for the vmlinux", describe(root, &walk));
        search.searched.push(describe(root, &walk));
        search.rejected.extend(walk.compressed.into_iter().map(|path| Rejected {
            path,
            why: "is compressed; unpack it (xz -dk, zstd -dk, gzip -dk) and try again".to_owned(),
        }));
        walk.fitting.truncate(MAX_CANDIDATES);
        if first_fit(walk.fitting, &mut search) {
            break;
        }
    }
    if is_plain_name(wanted.release) {
        search.searched.push(format!("/lib/modules/{}, /boot", wanted.release));
    }
    if let (None, Some(servers), Some(id)) = (&search.found, &places.debuginfod, build_id) {
        search.searched.extend(servers.urls.iter().cloned());
        match servers.fetch(id) {
            Ok(path) => search.consider(&path, fits),
            Err(errors) => search.failures.extend(errors.iter().map(|error| format!("debuginfod: {error}"))),
        }
    }
    // Where the known places have it, it needs no remembering.
    if let (Some(info), Some((memory, id))) = (&search.found, remembered) {
        remember::remember(memory, id, info.path());
    }
    search
}

/// Keeps for next time where the vmlinux is that the user gave.
pub fn remember(places: &Places, info: &DebugInfo) {
    if let (Some(memory), Some(id)) = (&places.memory, info.build_id()) {
        remember::remember(memory, id, info.path());
    }
}

impl Search {
    fn consider(&mut self, path: &Path, fits: &dyn Fn(&DebugInfo) -> Result<(), String>) {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let opened = match walk::is_compressed_vmlinux(&name) {
            // The search by content names it.
            true => return,
            false => DebugInfo::open(path).map_err(|error| error.to_string()),
        };
        match opened.and_then(|info| fits(&info).map(|()| info)) {
            Ok(info) => self.found = Some(info),
            Err(why) => {
                tracing::info!("'{}' was not taken: it {}", path.display(), printable(&why));
                self.rejected.push(Rejected { path: path.to_owned(), why });
            }
        }
    }
}

fn describe(root: &Path, walk: &Walk) -> String {
    let files = match walk.looked_into {
        1 => "1 file".to_owned(),
        n => format!("{n} files"),
    };
    let root = root.display();
    if walk.cut_short { format!("{root} ({files}, then given up)") } else { format!("{root} ({files})") }
}

/// Where the file may be, best first. `build_id` is hex.
fn candidates(release: &str, build_id: Option<&str>, places: &Places) -> Vec<PathBuf> {
    let mut paths = Vec::new();
    let roots: Vec<&Path> =
        places.debug_dirs.iter().map(PathBuf::as_path).chain([Path::new(SYSTEM)]).collect();
    if let Some((dir, rest)) = build_id.and_then(|id| id.split_at_checked(2)) {
        paths.extend(roots.iter().map(|root| root.join(format!(".build-id/{dir}/{rest}.debug"))));
    }
    if let Some(dir) = &places.beside {
        paths.extend(vmlinux_files_in(dir, release));
    }
    if is_plain_name(release) {
        let below_root = [
            // Debian, Ubuntu.
            format!("boot/vmlinux-{release}"),
            // Fedora, RHEL, Debian's link.
            format!("lib/modules/{release}/vmlinux"),
            format!("usr/lib/modules/{release}/vmlinux"),
            // openSUSE.
            format!("boot/vmlinux-{release}.debug"),
            format!("usr/lib/modules/{release}/vmlinux.debug"),
        ];
        paths.extend(roots.iter().flat_map(|root| below_root.iter().map(|path| root.join(path))));
        paths.extend(
            [
                // A kernel built here.
                format!("/lib/modules/{release}/build/vmlinux"),
                format!("/lib/modules/{release}/vmlinux"),
                format!("/boot/vmlinux-{release}"),
            ]
            .map(PathBuf::from),
        );
    }
    paths
}

/// Files called `vmlinux*` in `dir`, the one with the release in its name first.
fn vmlinux_files_in(dir: &Path, release: &str) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(dir) else { return Vec::new() };
    let mut files: Vec<PathBuf> = entries
        .take(BESIDE.entries)
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("vmlinux")))
        .collect();
    let named_after = |path: &PathBuf| path.to_string_lossy().contains(release);
    files.sort_by_key(|path| (!named_after(path), path.clone()));
    files
}

/// Whether `name` can be one component of a path without leading elsewhere.
fn is_plain_name(name: &str) -> bool {
    !name.is_empty()
        && !name.starts_with('.')
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._+~-".contains(&b))
}

/// Whether this can be a build-id.
pub(crate) fn is_hex(id: &str) -> bool {
    id.len() > 2 && id.bytes().all(|b| b.is_ascii_hexdigit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_release_cannot_lead_out_of_the_directories() {
        let nowhere = Places::default();
        assert_eq!(candidates("../../../etc/passwd", None, &nowhere), Vec::<PathBuf>::new());
        let paths = candidates("6.1.0-56-cloud-amd64", Some("abcdef"), &nowhere);
        assert!(paths.contains(&PathBuf::from("/usr/lib/debug/.build-id/ab/cdef.debug")));
        assert!(paths.contains(&PathBuf::from("/usr/lib/debug/boot/vmlinux-6.1.0-56-cloud-amd64")));
        assert!(!is_hex("../../etc") && !is_hex("") && is_hex("00aa"));
    }
}
