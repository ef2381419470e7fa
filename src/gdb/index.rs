//! gdb's index cache: a vmlinux takes gdb many seconds to search, and well under one with an index.
//!
//! gdb would write the same file itself at the end of a first slow session; here it is made once, with
//! something to show meanwhile. Changes no setting of the user's: `set` lasts for one gdb process.
//! Source: GDB manual, "Index Files Speed Up GDB" and "Automatic symbol index cache".

use crate::debuginfo::find::user_caches;
use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Begins the names of directories that gdb works in.
pub(super) const WORK_PREFIX: &str = ".kstub-";
/// gdb needs minutes at most.
const STALE: Duration = Duration::from_secs(24 * 60 * 60);

/// Why there is no index. Only speed is lost.
#[derive(Debug, thiserror::Error)]
pub enum IndexError {
    /// Neither `XDG_CACHE_HOME` nor `HOME` says where caches are.
    #[error("no cache directory for gdb's index: neither XDG_CACHE_HOME nor HOME is an absolute path")]
    NoCacheDirectory,
    /// A build-id that is no hex string would make a file name of someone else's choice.
    #[error("'{0}' is no build-id")]
    NotABuildId(String),
    /// The cache directory or the file in it.
    #[error("gdb's index cache {}: {source}", .path.display())]
    Cache {
        /// File or directory.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// gdb did not start.
    #[error("cannot run '{}': {source}", .program.display())]
    Start {
        /// The gdb that was to run.
        program: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// gdb ran and wrote no index.
    #[error("gdb wrote no index for {}: {said}", .vmlinux.display())]
    NoIndex {
        /// The file to be indexed.
        vmlinux: PathBuf,
        /// The last line of gdb's own words.
        said: String,
    },
}

/// What [`prepare`] found or did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Index {
    /// The cache has had one.
    Cached(PathBuf),
    /// gdb has just made it.
    Made(PathBuf),
    /// The file carries an index of its own.
    BuiltIn,
}

impl fmt::Display for Index {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cached(path) => write!(f, "{} was there", path.display()),
            Self::Made(path) => write!(f, "{} was made", path.display()),
            Self::BuiltIn => f.write_str("it has one of its own"),
        }
    }
}

/// gdb's command that turns its index cache `on` or `off`.
///
/// `set index-cache on` became `set index-cache enabled on`, and gdb complains about the wrong one of the two. To ask it
/// which it has would be to start it once more.
pub(crate) fn set_cache(value: &str) -> String {
    let attempts = format!(
        "for form in 'enabled {value}', '{value}':\\n try: gdb.execute('set index-cache ' + form); break"
    );
    format!("python exec(\"{attempts}\\n except gdb.error: pass\")")
}

/// Makes sure that gdb's cache has an index of `vmlinux`, whose build-id is `build_id` in hex.
///
/// While gdb works, `progress` is called several times a second with the time gone by.
pub fn prepare(
    gdb: &Path,
    vmlinux: &Path,
    build_id: &str,
    progress: &mut dyn FnMut(Duration),
) -> Result<Index, IndexError> {
    let directory = cache_directory().ok_or(IndexError::NoCacheDirectory)?;
    prepare_in(&directory, gdb, vmlinux, build_id, progress)
}

fn prepare_in(
    directory: &Path,
    gdb: &Path,
    vmlinux: &Path,
    build_id: &str,
    progress: &mut dyn FnMut(Duration),
) -> Result<Index, IndexError> {
    if build_id.is_empty() || !build_id.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(IndexError::NotABuildId(build_id.to_owned()));
    }
    remove_stale(directory);
    let file = directory.join(format!("{}.gdb-index", build_id.to_ascii_lowercase()));
    if file.is_file() {
        return Ok(Index::Cached(file));
    }
    let cache_error = |path: &Path| {
        let path = path.to_owned();
        move |source| IndexError::Cache { path, source }
    };
    std::fs::create_dir_all(directory).map_err(cache_error(directory))?;
    // Inside the cache, so that the finished file can be moved in at once.
    let work =
        tempfile::Builder::new().prefix(WORK_PREFIX).tempdir_in(directory).map_err(cache_error(directory))?;
    let save: [OsString; 2] = ["-ex".into(), "save gdb-index .".into()];
    let vmlinux_at = std::path::absolute(vmlinux).unwrap_or_else(|_| vmlinux.to_owned());
    let arguments: Vec<_> = save.into_iter().chain([vmlinux_at.into_os_string()]).collect();
    let said = run_gdb(gdb, &arguments, work.path(), progress)?;
    let made = std::fs::read_dir(work.path())
        .map_err(cache_error(work.path()))?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|extension| extension == "gdb-index"));
    match made {
        Some(made) => {
            std::fs::rename(&made, &file).map(|()| Index::Made(file.clone())).map_err(cache_error(&file))
        }
        None if said.contains("Cannot use an index to create the index") => Ok(Index::BuiltIn),
        None => {
            let said =
                said.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("it said nothing").to_owned();
            Err(IndexError::NoIndex { vmlinux: vmlinux.to_owned(), said })
        }
    }
}

/// Removes what a kstub left behind that was killed while gdb worked; a younger directory may be in use.
pub(super) fn remove_stale(directory: &Path) {
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        let is_ours = entry.file_name().to_string_lossy().starts_with(WORK_PREFIX);
        // Of the entry itself: a link is none of ours.
        let Some(metadata) = entry.metadata().ok().filter(|metadata| is_ours && metadata.is_dir()) else {
            continue;
        };
        let age = metadata.modified().ok().and_then(|time| time.elapsed().ok());
        if age.is_some_and(|age| age > STALE)
            && let Err(error) = std::fs::remove_dir_all(entry.path())
        {
            tracing::debug!("{} stays: {error}", entry.path().display());
        }
    }
}

/// Runs gdb with these arguments in the directory `work`; returns what it printed as errors.
pub(super) fn run_gdb(
    gdb: &Path,
    arguments: &[OsString],
    work: &Path,
    progress: &mut dyn FnMut(Duration),
) -> Result<String, IndexError> {
    let start = |source| IndexError::Start { program: gdb.to_owned(), source };
    let complaints = work.join("stderr");
    let stderr = std::fs::File::create(&complaints)
        .map_err(|source| IndexError::Cache { path: complaints.clone(), source })?;
    let mut child = Command::new(gdb)
        // Without the user's settings its cache is off.
        .args(["-nx", "-batch"])
        // The file is at hand; nothing is to be asked of servers.
        .env_remove("DEBUGINFOD_URLS")
        // A relative name: gdb takes the rest of the line as it is, and the cache's path may hold anything.
        .current_dir(work)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(stderr)
        .spawn()
        .map_err(start)?;
    let started = Instant::now();
    while child.try_wait().map_err(start)?.is_none() {
        progress(started.elapsed());
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(std::fs::read(&complaints).map(|text| String::from_utf8_lossy(&text).into_owned()).unwrap_or_default())
}

/// Where gdb keeps its index cache by default.
fn cache_directory() -> Option<PathBuf> {
    Some(user_caches()?.join("gdb"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    /// A script in place of gdb, so that nothing here depends on one.
    fn fake_gdb(directory: &Path, script: &str) -> PathBuf {
        let path = directory.join("gdb");
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    #[test]
    fn the_index_is_made_once_and_moved_in() {
        let dir = tempfile::tempdir().unwrap();
        let cache = dir.path().join("cache/gdb");
        let gdb = fake_gdb(dir.path(), "case \"$*\" in *save*) echo index > vmlinux.gdb-index;; esac");
        let prepare = |id: &str| prepare_in(&cache, &gdb, Path::new("vmlinux"), id, &mut |_| {});
        let file = cache.join("00aa.gdb-index");
        assert_eq!(prepare("00AA").unwrap(), Index::Made(file.clone()));
        assert_eq!(prepare("00aa").unwrap(), Index::Cached(file.clone()));
        assert_eq!(std::fs::read_dir(&cache).unwrap().count(), 1, "no temporary file is left");
        assert!(matches!(prepare("../x"), Err(IndexError::NotABuildId(_))));
        assert!(matches!(prepare(""), Err(IndexError::NotABuildId(_))));
    }

    #[test]
    fn what_was_left_behind_is_removed_once_it_is_old() {
        let dir = tempfile::tempdir().unwrap();
        let make = |name: &str, hours: u64| {
            let path = dir.path().join(name);
            std::fs::create_dir(&path).unwrap();
            std::fs::write(path.join("stderr"), "").unwrap();
            let then = std::time::SystemTime::now() - Duration::from_secs(hours * 3600);
            std::fs::File::open(&path).unwrap().set_modified(then).unwrap();
            path
        };
        let (old, young, theirs) = (make(".kstub-old", 25), make(".kstub-young", 23), make("old", 99));
        std::os::unix::fs::symlink(&theirs, dir.path().join(".kstub-link")).unwrap();
        remove_stale(dir.path());
        assert!(!old.exists() && young.exists() && theirs.join("stderr").exists());
        remove_stale(&dir.path().join("absent"));
    }

    #[test]
    fn failures_carry_gdbs_words() {
        let dir = tempfile::tempdir().unwrap();
        let cache = dir.path().join("c");
        let prepare = |gdb: &Path| prepare_in(&cache, gdb, Path::new("v"), "ab", &mut |_| {});
        let gdb = fake_gdb(dir.path(), "echo 'v: No such file.' >&2");
        let error = prepare(&gdb).unwrap_err().to_string();
        assert_eq!(error, "gdb wrote no index for v: v: No such file.");
        let gdb = fake_gdb(
            dir.path(),
            "echo 'Error while writing index: Cannot use an index to create the index' >&2",
        );
        assert_eq!(prepare(&gdb).unwrap(), Index::BuiltIn);
        assert!(matches!(prepare(&dir.path().join("none")), Err(IndexError::Start { .. })));
    }
}
