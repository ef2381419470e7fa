//! Finding the source files that debug info names.
//!
//! Their names are those of the machine that compiled the kernel, so only their ends count, and only below directories
//! that the user named or that distributions unpack sources in: debug info cannot have any other file read.
//! Source: the packages of Debian (`linux-source-6.1`) and Fedora (`/usr/src/debug`).

use super::{Places, is_plain_name};
use std::path::{Path, PathBuf};

/// Where distributions put sources.
const SOURCES: &str = "/usr/src";
/// The kernel's largest source file, of a driver's registers, is a few MiB.
const SOURCE_MAX: u64 = 32 << 20;
/// More names than any such directory has.
const NAMES_MAX: usize = 1024;

/// The text of the source that debug info calls `file`, of the kernel `release`; or why there is none and what would help.
pub fn source_text(file: &str, release: &str, places: &Places) -> Result<String, String> {
    let path = source_file(file, release, places).map_err(|looked| {
        let looked: Vec<String> = looked.iter().map(|root| root.display().to_string()).collect();
        format!(
            "its source was not found below {}; pass --debug-dir DIR that has the kernel's source in it",
            looked.join(", ")
        )
    })?;
    let wrong = |why: String| format!("'{}' cannot be read: {why}", path.display());
    let length = path.metadata().map_err(|error| wrong(error.to_string()))?.len();
    if length > SOURCE_MAX {
        return Err(wrong(format!("{length} bytes are too many for a source")));
    }
    let bytes = std::fs::read(&path).map_err(|error| wrong(error.to_string()))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The file that debug info calls `file`, of the kernel `release`; else the directories it is not in.
fn source_file(file: &str, release: &str, places: &Places) -> Result<PathBuf, Vec<PathBuf>> {
    let parts: Vec<&str> = file.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
    let is_source = [".c", ".h", ".S"].iter().any(|end| file.ends_with(end));
    let roots = roots(release, places);
    if !is_source || !parts.iter().all(|part| is_plain_name(part)) {
        return Err(roots);
    }
    // The longest end is the surest; one name alone would be of any directory.
    let ends = || (0..parts.len().saturating_sub(1)).filter_map(|from| parts.get(from..));
    let places = ends().flat_map(|end| roots.iter().map(move |root| root.join(end.join("/"))));
    let found = places.into_iter().find(|path| path.is_file());
    found.ok_or(roots)
}

/// Directories that can have the source, or the top of its tree, in them.
fn roots(release: &str, places: &Places) -> Vec<PathBuf> {
    let mut roots: Vec<PathBuf> = places.debug_dirs.iter().chain(&places.beside).cloned().collect();
    let version: String = release.split('.').take(2).collect::<Vec<_>>().join(".");
    let is_of_version =
        |name: &str| name.strip_prefix("linux-source-").or(name.strip_prefix("linux-")) == Some(&version);
    let names = std::fs::read_dir(SOURCES).into_iter().flatten().take(NAMES_MAX).flatten();
    roots.extend(names.map(|entry| entry.path()).filter(|path| {
        // A tree of another version would have other lines.
        path.file_name().and_then(|name| name.to_str()).is_some_and(is_of_version)
    }));
    roots.push(Path::new(SOURCES).to_owned());
    roots
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[allow(clippy::unwrap_used)]
    fn only_sources_below_named_directories_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let tree = dir.path().join("tree");
        std::fs::create_dir_all(tree.join("kernel/sched")).unwrap();
        for name in ["tree/kernel/sched/core.c", "tree/kernel/sched/secret", "secret.c"] {
            std::fs::write(dir.path().join(name), name).unwrap();
        }
        let places = Places { debug_dirs: vec![tree.clone()], ..Places::default() };
        let find = |file: &str| source_file(file, "6.1.0", &places).ok();
        let core = Some(tree.join("kernel/sched/core.c"));
        assert_eq!(find("debian/build/build_amd64/kernel/sched/core.c"), core);
        assert_eq!(find("/usr/src/linux-6.1/./kernel/sched/core.c"), core);
        assert_eq!(find("kernel/sched/secret"), None, "no source");
        assert_eq!(find("kernel/../../secret.c"), None, "out of the directory");
        assert_eq!(find("core.c"), None, "any directory's");
        assert_eq!(find(&dir.path().join("secret.c").display().to_string()), None, "not below");
    }
}
