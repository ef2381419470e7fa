//! Finding the vmlinux of a kernel by its build-id or release, where distributions and people put it.

use super::DebugInfo;
use std::path::{Path, PathBuf};

/// Files of the dump's directory looked at for a `vmlinux*`.
const DIRECTORY_MAX: usize = 4096;

/// What is known of the kernel whose vmlinux is wanted.
pub struct Wanted<'a> {
    /// `uname -r`; comes out of a dump, so it is checked before it becomes part of a path.
    pub release: &'a str,
    /// Build-id in lower-case hex.
    pub build_id: Option<&'a str>,
    /// Directory of the dump.
    pub beside: Option<&'a Path>,
}

/// A file that was considered and turned down, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejected {
    /// The file.
    pub path: PathBuf,
    /// Why, as half a sentence.
    pub why: String,
}

/// The first file that `fits`, and those that were looked at and do not.
pub fn vmlinux(
    wanted: &Wanted<'_>,
    fits: &dyn Fn(&DebugInfo) -> Result<(), String>,
) -> (Option<DebugInfo>, Vec<Rejected>) {
    let mut rejected = Vec::new();
    for path in candidates(wanted) {
        if !path.is_file() {
            continue;
        }
        let opened = DebugInfo::open(&path).map_err(|error| error.to_string());
        match opened.and_then(|info| fits(&info).map(|()| info)) {
            Ok(info) => return (Some(info), rejected),
            Err(why) => rejected.push(Rejected { path, why }),
        }
    }
    (None, rejected)
}

/// Where the file may be, best first.
fn candidates(wanted: &Wanted<'_>) -> Vec<PathBuf> {
    let mut paths = Vec::new();
    if let Some((dir, rest)) = wanted.build_id.and_then(|id| id.split_at_checked(2)) {
        paths.push(PathBuf::from(format!("/usr/lib/debug/.build-id/{dir}/{rest}.debug")));
    }
    if let Some(dir) = wanted.beside {
        paths.extend(vmlinux_files_in(dir, wanted.release));
    }
    if is_plain_name(wanted.release) {
        let release = wanted.release;
        paths.extend(
            [
                // Debian, Ubuntu.
                format!("/usr/lib/debug/boot/vmlinux-{release}"),
                // Fedora, RHEL, Debian's link.
                format!("/usr/lib/debug/lib/modules/{release}/vmlinux"),
                format!("/usr/lib/debug/usr/lib/modules/{release}/vmlinux"),
                // openSUSE.
                format!("/usr/lib/debug/boot/vmlinux-{release}.debug"),
                format!("/usr/lib/debug/usr/lib/modules/{release}/vmlinux.debug"),
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
        .take(DIRECTORY_MAX)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_release_cannot_lead_out_of_the_directories() {
        let hostile = Wanted { release: "../../../etc/passwd", build_id: None, beside: None };
        assert_eq!(candidates(&hostile), Vec::<PathBuf>::new());
        let plain = Wanted { release: "6.1.0-56-cloud-amd64", build_id: Some("abcdef"), beside: None };
        let paths = candidates(&plain);
        assert!(paths.contains(&PathBuf::from("/usr/lib/debug/.build-id/ab/cdef.debug")));
        assert!(paths.contains(&PathBuf::from("/usr/lib/debug/boot/vmlinux-6.1.0-56-cloud-amd64")));
    }
}
