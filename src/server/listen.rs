//! Where to listen, and the care that takes: loopback unless told otherwise, sockets only the user can open.

use super::session::Client;
use anyhow::{Context, bail, ensure};
use std::fs::Permissions;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, ToSocketAddrs};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use tokio::net::{TcpListener, UnixListener};

/// An address to serve on; that one exists means that it is allowed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listen {
    /// A TCP address; port 0 lets the system choose.
    Tcp(SocketAddr),
    /// A Unix socket at this path.
    Unix(PathBuf),
    /// Standard input and output: one session.
    Stdio,
}

impl Listen {
    /// Reads `127.0.0.1:1234`, `[::1]:1234`, `localhost:1234`, `:1234` (loopback), `unix:PATH` or `-`.
    ///
    /// A dump holds everything the machine knew, and the protocol has no password: an address that other
    /// machines can reach is refused unless `allow_remote`.
    pub fn parse(text: &str, allow_remote: bool) -> anyhow::Result<Self> {
        if text == "-" {
            return Ok(Self::Stdio);
        }
        if let Some(path) = text.strip_prefix("unix:") {
            ensure!(!path.is_empty(), "'unix:' needs the path of a socket after it");
            return Ok(Self::Unix(path.into()));
        }
        let forms = "use ADDRESS:PORT such as 127.0.0.1:1234, :PORT for loopback, unix:PATH or - for standard input and output";
        let (host, port) =
            text.rsplit_once(':').with_context(|| format!("'{text}' is no address; {forms}"))?;
        let port: u16 = port.parse().with_context(|| format!("'{port}' in '{text}' is no port; {forms}"))?;
        let ip = match host {
            "" | "localhost" => IpAddr::V4(Ipv4Addr::LOCALHOST),
            host => match host.trim_start_matches('[').trim_end_matches(']').parse() {
                Ok(ip) => ip,
                Err(_) => {
                    resolve(host).with_context(|| format!("'{host}' in '{text}' is no address; {forms}"))?
                }
            },
        };
        if !ip.is_loopback() && !allow_remote {
            bail!(
                "{text} can be reached from other machines, and whoever connects reads the whole dump or guest without \
                 a password; use 127.0.0.1:{port} with an ssh tunnel, or pass --allow-remote if you mean it"
            );
        }
        Ok(Self::Tcp(SocketAddr::new(ip, port)))
    }
}

fn resolve(host: &str) -> io::Result<IpAddr> {
    let first = (host, 0).to_socket_addrs()?.next();
    first.map(|address| address.ip()).ok_or_else(|| ErrorKind::NotFound.into())
}

/// A bound address.
pub(super) enum Listener {
    Tcp(TcpListener, SocketAddr),
    Unix(UnixListener, SocketFile),
}

impl Listener {
    pub(super) async fn bind(listen: &Listen) -> anyhow::Result<Self> {
        match listen {
            Listen::Tcp(address) => {
                let listener = TcpListener::bind(address).await.map_err(|error| match error.kind() {
                    ErrorKind::AddrInUse => anyhow::anyhow!(
                        "{address} is already in use, perhaps by another kstub; stop it, or choose another \
                         port (port 0 finds a free one)"
                    ),
                    _ => anyhow::Error::new(error).context(format!("cannot listen on {address}")),
                })?;
                let address = listener.local_addr().context("cannot tell the address that was bound")?;
                Ok(Self::Tcp(listener, address))
            }
            Listen::Unix(path) => {
                let (listener, file) = bind_unix(path)?;
                Ok(Self::Unix(listener, file))
            }
            Listen::Stdio => bail!("standard input and output are not listened on"),
        }
    }

    /// What gdb's `target remote` takes.
    pub(super) fn address(&self) -> String {
        match self {
            Self::Tcp(_, address) => address.to_string(),
            Self::Unix(_, file) => file.path.display().to_string(),
        }
    }

    pub(super) async fn accept(&self) -> io::Result<Client> {
        match self {
            Self::Tcp(listener, _) => {
                let stream = listener.accept().await?.0.into_std()?;
                stream.set_nonblocking(false)?;
                // Requests and replies are small and take turns.
                stream.set_nodelay(true)?;
                Ok(Client::Tcp(stream))
            }
            Self::Unix(listener, _) => {
                let stream = listener.accept().await?.0.into_std()?;
                stream.set_nonblocking(false)?;
                Ok(Client::Unix(stream))
            }
        }
    }
}

/// A socket in the file system, removed with its listener.
pub(super) struct SocketFile {
    path: PathBuf,
    /// Device and inode: what is at `path` later may be somebody else's.
    identity: (u64, u64),
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if std::fs::symlink_metadata(&self.path).is_ok_and(|meta| (meta.dev(), meta.ino()) == self.identity) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Binds a socket that never existed with wider permissions than the owner's: it is made in a private
/// directory and then linked to `path`, which fails if something is there.
fn bind_unix(path: &Path) -> anyhow::Result<(UnixListener, SocketFile)> {
    let shown = path.display();
    // `sun_path` holds 108 bytes with the final NUL. The link could be longer, but nobody could connect to it.
    let length = path.as_os_str().len();
    ensure!(length < 108, "{shown}: the path of a socket has at most 107 bytes, and this one has {length}");
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let private = tempfile::Builder::new()
        .prefix(".kstub-")
        .rand_bytes(4)
        .tempdir_in(parent)
        .with_context(|| format!("cannot make a socket in {}", parent.display()))?;
    let made = private.path().join("s");
    let cannot = || format!("cannot listen on unix:{shown}");
    let listener = UnixListener::bind(&made).with_context(cannot)?;
    std::fs::set_permissions(&made, Permissions::from_mode(0o600)).with_context(cannot)?;
    let meta = std::fs::symlink_metadata(&made).with_context(cannot)?;
    let mut linked = std::fs::hard_link(&made, path);
    if linked.as_ref().is_err_and(|error| error.kind() == ErrorKind::AlreadyExists) {
        remove_stale(path)?;
        linked = std::fs::hard_link(&made, path);
    }
    linked.with_context(cannot)?;
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    Ok((listener, SocketFile { path, identity: (meta.dev(), meta.ino()) }))
}

/// Removes a socket that nobody listens on any more; refuses anything else.
fn remove_stale(path: &Path) -> anyhow::Result<()> {
    let shown = path.display();
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket());
    ensure!(is_socket, "{shown} exists and is no socket; choose another path");
    match std::os::unix::net::UnixStream::connect(path) {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).with_context(|| format!("cannot replace the stale socket {shown}"))
        }
        _ => bail!("another server listens on {shown}; stop it or choose another path"),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn addresses_in_every_form() {
        let tcp = |text: &str| Listen::Tcp(text.parse().unwrap());
        for (text, listen) in [
            ("127.0.0.1:1234", tcp("127.0.0.1:1234")),
            (":1234", tcp("127.0.0.1:1234")),
            ("localhost:0", tcp("127.0.0.1:0")),
            ("[::1]:1234", tcp("[::1]:1234")),
            ("-", Listen::Stdio),
            ("unix:/run/x y", Listen::Unix("/run/x y".into())),
        ] {
            assert_eq!(Listen::parse(text, false).unwrap(), listen, "{text}");
        }
        for wrong in ["", "1234", "127.0.0.1", ":", ":x", ":65536", "unix:", "a b:1"] {
            assert!(Listen::parse(wrong, true).is_err(), "{wrong}");
        }
    }

    #[test]
    fn other_machines_only_when_told() {
        for text in ["0.0.0.0:1", "[::]:1", "192.0.2.1:1"] {
            let error = Listen::parse(text, false).unwrap_err().to_string();
            assert!(error.contains("--allow-remote"), "{error}");
            assert!(Listen::parse(text, true).is_ok());
        }
    }

    #[tokio::test]
    async fn unix_sockets_are_private_and_tidy() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let listen = Listen::Unix(path.clone());
        let first = Listener::bind(&listen).await.unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        let error = Listener::bind(&listen).await.err().unwrap().to_string();
        assert!(error.contains("another server"), "{error}");
        drop(first);
        assert!(!path.exists());
        // A socket whose server died without removing it is replaced.
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let second = Listener::bind(&listen).await.unwrap();
        // A successor's socket is not ours to remove.
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "theirs").unwrap();
        drop(second);
        assert!(path.exists());
        let error = Listener::bind(&listen).await.err().unwrap().to_string();
        assert!(error.contains("no socket"), "{error}");
        let long = dir.path().join("x".repeat(108));
        let error = Listener::bind(&Listen::Unix(long)).await.err().unwrap().to_string();
        assert!(error.contains("at most 107 bytes"), "{error}");
    }

    #[tokio::test]
    async fn a_taken_port_is_explained() {
        let first = Listener::bind(&Listen::parse(":0", false).unwrap()).await.unwrap();
        let again = Listen::parse(&first.address(), false).unwrap();
        let error = Listener::bind(&again).await.err().unwrap().to_string();
        assert!(error.contains("already in use"), "{error}");
    }
}
