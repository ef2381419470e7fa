//! A client of debuginfod: debug info by build-id from servers that the user has named, in the cache that elfutils
//! and gdb share.
//!
//! Believes no server: a file counts only if its build-id is the one asked for, and a server that is slow, too
//! generous or gone ends in words. Source: elfutils `debuginfod(8)` (web API), `debuginfod_find_debuginfo(3)` (environment, cache),
//! `debuginfod/debuginfod-client.c`.

use super::DebugInfo;
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use ureq::tls::{RootCerts, TlsConfig};

/// The largest file fetched unless `DEBUGINFOD_MAXSIZE` says otherwise; a vmlinux has a tenth of it.
const MAX_SIZE: u64 = 8 << 30;
/// Bytes that must come within each timeout.
const LEAST: u64 = 100_000;
/// How long a server's "not here" is believed (`cache_miss_s`).
const MISS_KEPT: Duration = Duration::from_secs(600);
const MAX_REDIRECTS: u32 = 5;

/// Gets the bytes so far and, where the server tells, the size.
pub type OnProgress = Box<dyn Fn(u64, Option<u64>) + Send + Sync>;

/// Servers, the cache, and limits.
pub struct Debuginfod {
    /// Base URLs, asked in this order.
    pub urls: Vec<String>,
    /// The cache's directory.
    pub cache: PathBuf,
    /// Within this time the first bytes must come, and then 100 kB each time. `None` waits for ever.
    pub timeout: Option<Duration>,
    /// The largest file accepted, in bytes.
    pub max_size: u64,
    /// Called as bytes arrive.
    pub progress: OnProgress,
}

/// Why a server's file could not be had; each names the URL.
#[derive(Debug, thiserror::Error)]
pub enum DebuginfodError {
    /// The server does not know the build-id.
    #[error("'{url}': the server does not have it")]
    Absent {
        /// What was asked for.
        url: String,
    },
    /// Some other HTTP status.
    #[error(
        "'{url}': the server answered with status {status}; try later, or take it out of DEBUGINFOD_URLS"
    )]
    Status {
        /// What was asked for.
        url: String,
        /// HTTP status.
        status: u16,
    },
    /// Too little came for too long.
    #[error(
        "'{url}': {got} bytes came and then too little within {seconds} s; set DEBUGINFOD_TIMEOUT to more seconds"
    )]
    Slow {
        /// What was asked for.
        url: String,
        /// Bytes received.
        got: u64,
        /// The timeout.
        seconds: u64,
    },
    /// More than is accepted.
    #[error(
        "'{url}': the file has {size} bytes or more, and {max} are accepted; set DEBUGINFOD_MAXSIZE to more"
    )]
    TooLarge {
        /// What was asked for.
        url: String,
        /// What the server announced or had sent.
        size: u64,
        /// The limit.
        max: u64,
    },
    /// Another scheme, or none.
    #[error("'{url}' is no http:// or https:// URL; take it out of DEBUGINFOD_URLS")]
    Scheme {
        /// What was asked for.
        url: String,
    },
    /// The connection, TLS, or HTTP itself.
    #[error("'{url}': {what} after {got} bytes; check the URL in DEBUGINFOD_URLS, or pass --no-debuginfod")]
    Transfer {
        /// What was asked for.
        url: String,
        /// Bytes received.
        got: u64,
        /// What the HTTP client says.
        what: String,
    },
    /// The answer is something else.
    #[error("'{url}': the server's file {what}; take this server out of DEBUGINFOD_URLS")]
    Wrong {
        /// What was asked for.
        url: String,
        /// What is wrong, as the rest of the sentence.
        what: String,
    },
    /// The file cannot be kept.
    #[error("cannot write to debuginfod's cache {}: {source}; set DEBUGINFOD_CACHE_PATH to another directory", .path.display())]
    Cache {
        /// File or directory.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
}

impl Debuginfod {
    /// What the environment says; `None` where it names no server: nothing is fetched unasked.
    pub fn from_environment(caches: Option<&Path>, progress: OnProgress) -> Option<Self> {
        let text = |name| std::env::var(name).ok().filter(|value: &String| !value.is_empty());
        let number = |name| text(name).and_then(|value| value.trim().parse::<u64>().ok());
        // Words such as `ima:enforcing` are policies for signed files, not servers.
        let urls: Vec<String> = text("DEBUGINFOD_URLS")?
            .split_whitespace()
            .filter(|word| !word.starts_with("ima:"))
            .map(str::to_owned)
            .collect();
        let cache = match text("DEBUGINFOD_CACHE_PATH") {
            Some(path) => PathBuf::from(path),
            None => caches?.join("debuginfod_client"),
        };
        let timeout = Some(number("DEBUGINFOD_TIMEOUT").unwrap_or(90)).filter(|&s| s > 0);
        let max_size = number("DEBUGINFOD_MAXSIZE").filter(|&size| size > 0).unwrap_or(MAX_SIZE);
        let timeout = timeout.map(Duration::from_secs);
        (!urls.is_empty()).then_some(Self { urls, cache, timeout, max_size, progress })
    }

    /// Where the cache has, or would have, the file. `build_id` must be hex.
    pub fn cached(&self, build_id: &str) -> PathBuf {
        self.cache.join(build_id).join("debuginfo")
    }

    /// Asks the servers in turn until one has the file with this build-id (lower-case hex); returns its path in the
    /// cache, or why no server had it.
    pub fn fetch(&self, build_id: &str) -> Result<PathBuf, Vec<DebuginfodError>> {
        let target = self.cached(build_id);
        let mut errors = Vec::new();
        for url in &self.urls {
            let url = format!("{}/buildid/{build_id}/debuginfo", url.trim_end_matches('/'));
            if recently_missed(&target) {
                errors.push(DebuginfodError::Absent { url });
                continue;
            }
            match self.fetch_from(&url, build_id, &target) {
                Ok(()) => return Ok(target),
                Err(error) => errors.push(error),
            }
        }
        if errors.iter().all(|error| matches!(error, DebuginfodError::Absent { .. })) && !target.exists() {
            // An empty file tells elfutils and gdb, too, not to ask again for a while.
            if let Err(error) = prepare_directory(&target).and_then(|_| File::create(&target)) {
                tracing::debug!("debuginfod's cache: {error}");
            }
        }
        Err(errors)
    }

    fn fetch_from(&self, url: &str, build_id: &str, target: &Path) -> Result<(), DebuginfodError> {
        let transfer = |got, what: &dyn std::fmt::Display| DebuginfodError::Transfer {
            url: url.to_owned(),
            got,
            what: what.to_string(),
        };
        let failed = |got, error: ureq::Error| match error {
            ureq::Error::Timeout(_) => self.slow(url, got),
            ureq::Error::Io(error) => transfer(got, &error),
            error => transfer(got, &error),
        };
        if !url.starts_with("http://") && !url.starts_with("https://") {
            return Err(DebuginfodError::Scheme { url: url.to_owned() });
        }
        let mut response = self.agent().get(url).call().map_err(|error| failed(0, error))?;
        match response.status().as_u16() {
            200 => {}
            404 => return Err(DebuginfodError::Absent { url: url.to_owned() }),
            status => return Err(DebuginfodError::Status { url: url.to_owned(), status }),
        }
        let size = response.body().content_length();
        self.check_size(url, size.unwrap_or(0))?;

        let cache_error = |path: &Path| {
            let path = path.to_owned();
            move |source| DebuginfodError::Cache { path, source }
        };
        let directory = prepare_directory(target).map_err(cache_error(target))?;
        let mut file = tempfile::Builder::new()
            .prefix("debuginfo.")
            .tempfile_in(directory)
            .map_err(cache_error(directory))?;
        let mut body = response.body_mut().as_reader();
        let mut chunk = vec![0; 1 << 16];
        let (mut got, mut window, mut got_before) = (0, Instant::now(), 0);
        loop {
            let n = match body.read(&mut chunk) {
                Ok(0) => break,
                Ok(n) => n,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == std::io::ErrorKind::TimedOut => return Err(self.slow(url, got)),
                Err(error) => return Err(failed(got, ureq::Error::from(error))),
            };
            got += n as u64;
            self.check_size(url, got)?;
            file.write_all(&chunk[..n]).map_err(cache_error(file.path()))?;
            (self.progress)(got, size);
            if self.timeout.is_some_and(|timeout| window.elapsed() >= timeout) {
                if got - got_before < LEAST {
                    return Err(self.slow(url, got));
                }
                (window, got_before) = (Instant::now(), got);
            }
        }
        if size.is_some_and(|size| size != got) {
            return Err(transfer(got, &"the connection ended early"));
        }
        let wrong = |what: String| DebuginfodError::Wrong { url: url.to_owned(), what };
        let info = DebugInfo::open(file.path()).map_err(|_| wrong("is no x86-64 ELF file".to_owned()))?;
        match info.build_id() {
            Some(id) if id == build_id => {}
            Some(id) => return Err(wrong(format!("has build-id {id}, not {build_id}"))),
            None => return Err(wrong(format!("has no build-id, and {build_id} was asked for"))),
        }
        file.persist(target).map_err(|error| cache_error(target)(error.error)).map(drop)
    }

    fn agent(&self) -> ureq::Agent {
        let tls = TlsConfig::builder().root_certs(RootCerts::PlatformVerifier).build();
        ureq::Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(MAX_REDIRECTS)
            .timeout_resolve(self.timeout)
            .timeout_connect(self.timeout)
            .timeout_recv_response(self.timeout)
            .timeout_per_read(self.timeout)
            .user_agent(concat!("kstub/", env!("CARGO_PKG_VERSION")))
            // Content-Length is then the file's, and nothing has to be unpacked.
            .accept_encoding("identity")
            .tls_config(tls)
            .build()
            .new_agent()
    }

    fn slow(&self, url: &str, got: u64) -> DebuginfodError {
        let seconds = self.timeout.map_or(0, |timeout| timeout.as_secs());
        DebuginfodError::Slow { url: url.to_owned(), got, seconds }
    }

    fn check_size(&self, url: &str, size: u64) -> Result<(), DebuginfodError> {
        if size > self.max_size {
            return Err(DebuginfodError::TooLarge { url: url.to_owned(), size, max: self.max_size });
        }
        Ok(())
    }
}

/// Whether the servers said not long ago that they have no such file.
fn recently_missed(target: &Path) -> bool {
    let Ok(metadata) = std::fs::metadata(target) else { return false };
    let age = metadata.modified().ok().and_then(|at| at.elapsed().ok());
    metadata.len() == 0 && age.is_some_and(|age| age < MISS_KEPT)
}

/// Makes the directory that `target` is in, and returns it.
fn prepare_directory(target: &Path) -> std::io::Result<&Path> {
    use std::os::unix::fs::DirBuilderExt;
    let directory = target.parent().unwrap_or(Path::new("."));
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    Ok(directory)
}
