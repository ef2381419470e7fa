//! Sockets to QEMU: a Unix socket's path or a TCP port.
//!
//! Knows how long to wait and no protocol. Source: `unix(7)` (`SO_PEERCRED`; a full backlog blocks `connect`).

use crate::backend::live::LiveError;
use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::PeerCredentials;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use std::fmt;
use std::io::{self, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::net::{Shutdown, TcpStream, ToSocketAddrs};
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long a connection may take to be made, and a write to be taken.
const PATIENCE: Duration = Duration::from_secs(5);

/// Where a QEMU listens.
#[derive(Clone, PartialEq, Eq, Hash, Debug, serde::Serialize, serde::Deserialize)]
pub enum SocketAddress {
    /// A Unix socket.
    Unix(PathBuf),
    /// `HOST:PORT`.
    Tcp(String),
}

impl SocketAddress {
    /// Reads `unix:PATH`, `PATH`, `tcp:HOST:PORT` or `HOST:PORT`; options after a comma, as QEMU takes them
    /// (`,server=on,wait=off`), are dropped.
    pub fn parse(text: &str) -> Result<Self, LiveError> {
        let bad = || LiveError::Address(text.to_owned());
        if let Some(path) = text.strip_prefix("unix:") {
            let path = path.split(',').next().unwrap_or(path);
            return if path.is_empty() { Err(bad()) } else { Ok(Self::Unix(path.into())) };
        }
        if let Some(rest) = text.strip_prefix("tcp:") {
            return Self::host_and_port(rest.split(',').next().unwrap_or(rest)).ok_or_else(bad);
        }
        if text.is_empty() {
            return Err(bad());
        }
        Ok(Self::host_and_port(text).unwrap_or_else(|| Self::Unix(text.into())))
    }

    fn host_and_port(text: &str) -> Option<Self> {
        let (host, port) = text.rsplit_once(':')?;
        let _: u16 = port.parse().ok()?;
        // QEMU leaves the host out to mean this one.
        let host = if host.is_empty() { "127.0.0.1" } else { host };
        (!host.contains('/')).then(|| Self::Tcp(format!("{host}:{port}")))
    }
}

impl fmt::Display for SocketAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(address) => write!(f, "tcp:{address}"),
        }
    }
}

/// A connection to a QEMU. Writes give up after some seconds, reads when they are told to.
pub(super) enum Socket {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Socket {
    pub(super) fn connect(address: &SocketAddress) -> Result<Self, LiveError> {
        let gone = |error: io::Error| {
            LiveError::Gone(format!(
                "connecting to {address} failed: {error}; is QEMU running and listening there?"
            ))
        };
        match address {
            SocketAddress::Unix(path) => connect_unix(path).map(Self::Unix).map_err(gone),
            SocketAddress::Tcp(address) => connect_tcp(address).map(Self::Tcp).map_err(gone),
        }
    }

    /// The process at the other end, if it is one of this machine that this one may see: its number and its user.
    pub(super) fn peer(&self) -> Option<(u32, u32)> {
        let Self::Unix(stream) = self else { return None };
        let peer = getsockopt(stream, PeerCredentials).ok()?;
        // One outside of our pid namespace has the number 0.
        let pid = u32::try_from(peer.pid()).ok().filter(|&pid| pid != 0)?;
        Some((pid, peer.uid()))
    }

    pub(super) fn try_clone(&self) -> io::Result<Self> {
        Ok(match self {
            Self::Unix(stream) => Self::Unix(stream.try_clone()?),
            Self::Tcp(stream) => Self::Tcp(stream.try_clone()?),
        })
    }

    /// Writes `bytes`, and hands `fd` over with the first of them. Only a Unix socket can.
    pub(super) fn write_with_fd(&mut self, bytes: &[u8], fd: BorrowedFd<'_>) -> io::Result<()> {
        let Self::Unix(stream) = self else { return Err(io::ErrorKind::Unsupported.into()) };
        let (pieces, fds) = ([IoSlice::new(bytes)], [fd]);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut with = SendAncillaryBuffer::new(&mut space);
        with.push(SendAncillaryMessage::ScmRights(&fds));
        let sent = rustix::io::retry_on_intr(|| sendmsg(&*stream, &pieces, &mut with, SendFlags::NOSIGNAL))?;
        stream.write_all(bytes.get(sent..).unwrap_or_default())
    }

    /// Whether descriptors can be handed over.
    pub(super) fn takes_fds(&self) -> bool {
        matches!(self, Self::Unix(_))
    }

    /// How long a read waits; `None` is for ever, and no time at all is a millisecond.
    pub(super) fn set_read_timeout(&self, time: Option<Duration>) -> io::Result<()> {
        let time = time.map(|time| time.max(Duration::from_millis(1)));
        match self {
            Self::Unix(stream) => stream.set_read_timeout(time),
            Self::Tcp(stream) => stream.set_read_timeout(time),
        }
    }

    /// Ends the connection for all that share it.
    pub(super) fn shutdown(&self) {
        // It may have ended already.
        let _ = match self {
            Self::Unix(stream) => stream.shutdown(Shutdown::Both),
            Self::Tcp(stream) => stream.shutdown(Shutdown::Both),
        };
    }
}

impl Read for Socket {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.read(buf),
            Self::Tcp(stream) => stream.read(buf),
        }
    }
}

impl Write for Socket {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.write(buf),
            Self::Tcp(stream) => stream.write(buf),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Whether an error of a read or write says that its time was up.
pub(super) fn timed_out(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

fn connect_unix(path: &Path) -> io::Result<UnixStream> {
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    // QEMU serves one client and lets the next ones wait: once its backlog is full, connect would block for ever.
    set_socket_timeout(&socket, Timeout::Send, Some(PATIENCE))?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(UnixStream::from(socket))
}

fn connect_tcp(address: &str) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for one in address.to_socket_addrs()? {
        match TcpStream::connect_timeout(&one, PATIENCE) {
            Ok(stream) => {
                stream.set_nodelay(true)?;
                stream.set_write_timeout(Some(PATIENCE))?;
                return Ok(stream);
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn addresses_as_qemu_writes_them() {
        let unix = |path: &str| SocketAddress::Unix(path.into());
        let tcp = |address: &str| SocketAddress::Tcp(address.to_owned());
        for (text, address) in [
            ("unix:/tmp/qmp", unix("/tmp/qmp")),
            ("unix:/tmp/qmp,server=on,wait=off", unix("/tmp/qmp")),
            ("/tmp/a:1", unix("/tmp/a:1")),
            ("qmp.sock", unix("qmp.sock")),
            ("a:b", unix("a:b")),
            ("localhost:4444", tcp("localhost:4444")),
            ("tcp:127.0.0.1:1,server=on", tcp("127.0.0.1:1")),
            ("tcp::1234", tcp("127.0.0.1:1234")),
            ("[::1]:1234", tcp("[::1]:1234")),
        ] {
            assert_eq!(SocketAddress::parse(text).unwrap(), address, "{text}");
        }
        for text in ["", "unix:", "tcp:", "tcp:host", "tcp:host:99999"] {
            assert!(matches!(SocketAddress::parse(text), Err(LiveError::Address(_))), "{text}");
        }
    }
}
