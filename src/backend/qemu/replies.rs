//! What a stub's packets mean: thread ids, stop replies, errors, register bytes.
//!
//! Knows text only. Source: GDB manual, "Packets" (thread-id syntax), "Stop Reply Packets".

use crate::addr::VirtAddr;
use crate::backend::live::{Point, StopReason};
use crate::rsp;

/// A vCPU by the names of the stub: its process (QEMU: CPU cluster) and thread (index of the vCPU + 1).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct ThreadId {
    /// Absent where the stub has no processes.
    pub(super) process: Option<u64>,
    pub(super) thread: u64,
}

impl ThreadId {
    /// `p1.2`, or `2`.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let (process, thread) = match text.strip_prefix('p') {
            Some(both) => {
                let (process, thread) = both.split_once('.')?;
                (Some(rsp::parse_u64(process.as_bytes())?), thread)
            }
            None => (None, text),
        };
        let thread = rsp::parse_u64(thread.as_bytes()).filter(|&thread| thread > 0)?;
        Some(Self { process, thread })
    }

    /// Index of the vCPU.
    pub(super) fn cpu(self) -> Option<u32> {
        u32::try_from(self.thread.checked_sub(1)?).ok()
    }
}

impl std::fmt::Display for ThreadId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.process {
            Some(process) => write!(f, "p{process:x}.{:x}", self.thread),
            None => write!(f, "{:x}", self.thread),
        }
    }
}

/// A reply that says that the guest stopped, or cannot go on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct StopReply {
    pub(super) thread: Option<ThreadId>,
    pub(super) reason: StopReason,
}

/// Reads a stop reply; `None` for any other packet.
pub(super) fn stop_reply(packet: &[u8]) -> Option<StopReply> {
    let text = std::str::from_utf8(packet).ok()?;
    let kind = text.get(..1)?;
    let signal = || u8::try_from(rsp::parse_u64(text.get(1..3)?.as_bytes())?).ok();
    match kind {
        "S" if text.len() == 3 => Some(StopReply { thread: None, reason: StopReason::Signal(signal()?) }),
        "T" => {
            let mut reply = StopReply { thread: None, reason: StopReason::Signal(signal()?) };
            for (name, value) in text.get(3..)?.split(';').filter_map(|pair| pair.split_once(':')) {
                let watch =
                    |point| rsp::parse_u64(value.as_bytes()).map(|at| StopReason::Watch(point, VirtAddr(at)));
                let reason = match name {
                    "thread" => {
                        reply.thread = ThreadId::parse(value);
                        None
                    }
                    "watch" => watch(Point::Write),
                    "rwatch" => watch(Point::Read),
                    "awatch" => watch(Point::Access),
                    "replaylog" => Some(StopReason::ReplayEnd),
                    _ => None,
                };
                reply.reason = reason.unwrap_or(reply.reason);
            }
            Some(reply)
        }
        // QEMU's answer to `bs` and `bc` where the recording begins.
        "E" if text == "E14" => Some(StopReply { thread: None, reason: StopReason::ReplayEnd }),
        _ => None,
    }
}

/// Why a packet that asked for something was not answered with success.
pub(super) fn refusal(packet: &[u8]) -> Option<String> {
    match packet {
        [] => Some("it does not know this packet".into()),
        [b'E', b'2', b'2'] => Some("error 22 (invalid argument)".into()),
        [b'E', b'1', b'4'] => Some("error 14 (bad address)".into()),
        [b'E', rest @ ..] if rest.len() == 2 => Some(format!("error {}", String::from_utf8_lossy(rest))),
        _ => None,
    }
}

/// The bytes of a `g` reply, where `xx` stands for one that is not available.
pub(super) fn register_bytes(packet: &[u8]) -> Option<Vec<Option<u8>>> {
    let pairs = packet.chunks(2).map(|pair| match pair {
        [b'x', b'x'] => Some(None),
        [_, _] => rsp::decode(pair).and_then(|byte| byte.first().copied()).map(Some),
        _ => None,
    });
    pairs.collect()
}

/// What binary data stands for on the wire: `}` and the byte XOR 0x20.
pub(super) fn unescape(data: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(data.len());
    let mut bytes = data.iter();
    while let Some(&byte) = bytes.next() {
        match byte {
            b'}' => out.extend(bytes.next().map(|escaped| escaped ^ 0x20)),
            byte => out.push(byte),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn stop_replies_of_qemu() {
        let thread = |process, thread| Some(ThreadId { process, thread });
        for (packet, expected_thread, reason) in [
            ("T05thread:p01.01;", thread(Some(1), 1), StopReason::Signal(5)),
            ("T02thread:01;", thread(None, 1), StopReason::Signal(2)),
            ("T05thread:p01.0a;rwatch:ffff888000001000;", thread(Some(1), 10), {
                StopReason::Watch(Point::Read, VirtAddr(0xffff_8880_0000_1000))
            }),
            ("T05awatch:8;thread:2;", thread(None, 2), StopReason::Watch(Point::Access, VirtAddr(8))),
            ("T05replaylog:begin;", None, StopReason::ReplayEnd),
            ("S05", None, StopReason::Signal(5)),
            ("E14", None, StopReason::ReplayEnd),
        ] {
            let reply = stop_reply(packet.as_bytes()).unwrap();
            assert_eq!(reply, StopReply { thread: expected_thread, reason }, "{packet}");
        }
        for packet in ["", "OK", "E22", "T", "T0", "Txx", "O41", "\u{e9}05", "S05x", "W00"] {
            assert_eq!(stop_reply(packet.as_bytes()), None, "{packet}");
        }
        assert_eq!(stop_reply(b"T05thread:\xff;"), None);
        assert_eq!(stop_reply(b"T05thread:p.;watch:zz;").unwrap().thread, None);
    }

    #[test]
    fn thread_ids_both_ways() {
        for (text, cpu) in [("p1.1", 0), ("p2.1f", 30), ("4", 3)] {
            let id = ThreadId::parse(text).unwrap();
            assert_eq!((id.cpu(), id.to_string()), (Some(cpu), text.to_owned()));
        }
        for text in ["", "0", "p1.0", "p1", "-1", "p-1.1", "10000000000000000"] {
            assert_eq!(ThreadId::parse(text), None, "{text}");
        }
        assert_eq!(ThreadId::parse("ffffffffffffffff").unwrap().cpu(), None);
    }

    #[test]
    fn bytes_that_are_not_available() {
        assert_eq!(register_bytes(b"00xxff").unwrap(), [Some(0), None, Some(255)]);
        assert_eq!(register_bytes(b"00x"), None);
        assert_eq!(register_bytes(b"zz"), None);
        assert_eq!(unescape(b"a}\x03}\x5d}"), b"a#}");
    }
}
