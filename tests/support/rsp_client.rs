//! A client of the GDB remote protocol that shares no code with the server: framing is written out again.
#![allow(dead_code)]

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// How long an answer may take: QEMU writes a dump of all memory before it says so.
const PATIENCE: Duration = Duration::from_secs(120);

pub trait Stream: Read + Write + Send {}
impl Stream for TcpStream {}
impl Stream for UnixStream {}

pub struct RspClient {
    stream: Box<dyn Stream>,
    /// Received and not yet used.
    pending: Vec<u8>,
    acknowledge: bool,
    knows_runs: bool,
}

/// `$body#cs`
pub fn packet(body: impl AsRef<[u8]>) -> Vec<u8> {
    let body = body.as_ref();
    let sum: u32 = body.iter().map(|&b| u32::from(b)).sum();
    [b"$", body, format!("#{:02x}", sum % 256).as_bytes()].concat()
}

impl RspClient {
    pub fn tcp(address: &str) -> Self {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self { stream: Box::new(stream), pending: Vec::new(), acknowledge: true, knows_runs: false }
    }

    pub fn unix(path: &Path) -> Self {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self { stream: Box::new(stream), pending: Vec::new(), acknowledge: true, knows_runs: false }
    }

    /// What gdb does first.
    pub fn like_gdb(mut self) -> Self {
        let features = self.ask("qSupported:multiprocess+;QThreadEvents+;no-resumed+;xmlRegisters=i386");
        assert!(features.contains("PacketSize="), "{features}");
        assert_eq!(self.ask("QStartNoAckMode"), "OK");
        self.acknowledge = false;
        self
    }

    /// The same, and takes run lengths as gdb does.
    pub fn with_runs(mut self) -> Self {
        assert_eq!(self.ask("vMustReplyEmpty"), "");
        self.knows_runs = true;
        self
    }

    pub fn send_raw(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    /// Like [`Self::send_raw`] where the other side may already have closed.
    pub fn try_send_raw(&mut self, bytes: &[u8]) -> bool {
        self.stream.write_all(bytes).is_ok()
    }

    /// The next packet's body, escapes resolved; `None` if the server closed.
    pub fn receive(&mut self) -> Option<Vec<u8>> {
        loop {
            if let Some(body) = self.take_packet() {
                if self.acknowledge {
                    let _ = self.stream.write_all(b"+");
                }
                return Some(body);
            }
            let mut chunk = [0; 65536];
            match self.stream.read(&mut chunk).unwrap_or_else(|error| panic!("no answer: {error}")) {
                0 => return None,
                n => self.pending.extend_from_slice(&chunk[..n]),
            }
        }
    }

    fn take_packet(&mut self) -> Option<Vec<u8>> {
        let start = self.pending.iter().position(|&b| b == b'$')?;
        let hash = start + self.pending[start..].iter().position(|&b| b == b'#')?;
        let checksum = self.pending.get(hash + 1..hash + 3)?;
        let sum: u32 = self.pending[start + 1..hash].iter().map(|&b| u32::from(b)).sum();
        assert_eq!(String::from_utf8_lossy(checksum), format!("{:02x}", sum % 256), "checksum of a reply");
        // gdb expands run lengths first, others while they look for escapes: both must find the same.
        let mut body = Vec::new();
        let mut bytes = self.pending[start + 1..hash].iter();
        let mut is_escaped = false;
        while let Some(&byte) = bytes.next() {
            match byte {
                b'*' => {
                    assert!(
                        self.knows_runs && !is_escaped,
                        "run lengths are not asked for, or of an escaped byte"
                    );
                    let (&last, count) = (body.last().unwrap(), *bytes.next().unwrap());
                    body.extend(std::iter::repeat_n(last, usize::from(count) - 29));
                }
                b'}' => body.push(bytes.next().unwrap() ^ 0x20),
                byte => body.push(byte),
            }
            is_escaped = byte == b'}';
        }
        self.pending.drain(..hash + 3);
        Some(body)
    }

    pub fn ask_bytes(&mut self, body: impl AsRef<[u8]>) -> Vec<u8> {
        self.send_raw(&packet(body));
        self.receive().expect("the server closed the connection")
    }

    pub fn ask(&mut self, body: impl AsRef<[u8]>) -> String {
        String::from_utf8(self.ask_bytes(body)).unwrap()
    }
}

pub fn from_hex(text: &str) -> Vec<u8> {
    assert!(text.len().is_multiple_of(2), "{text}");
    (0..text.len()).step_by(2).map(|i| u8::from_str_radix(&text[i..i + 2], 16).unwrap()).collect()
}

pub fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
