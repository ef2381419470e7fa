//! CPUs as threads: thread `n` of the one process is CPU `n - 1`, since the protocol has no thread 0.
//!
//! Knows names and descriptions, not registers. A task's `comm` comes from the dump and is shown on a
//! terminal: nothing but printable text leaves this file.
//! Source: GDB manual, "Packets" (thread-id), "Thread List Format".

use crate::bytes::printable;
use crate::kernel::{Cpu, CpuId, Machine};
use std::fmt::Write;
use std::num::NonZeroUsize;

/// The process all threads belong to; gdbstub hard-codes the same.
const PROCESS: usize = 1;

/// What a thread-id of the protocol chooses.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Choice {
    /// `0`, `-1` or a process alone: the client leaves it to us.
    Whichever,
    /// A thread.
    One(CpuId),
}

impl Choice {
    /// Reads `p1.2`, `p1`, `2`, `0` or `-1`; `None` if malformed or of another process.
    pub(super) fn parse(text: &[u8]) -> Option<Self> {
        let number = |text: &[u8]| match text {
            b"-1" => Some(0),
            text => crate::rsp::parse_u64(text),
        };
        let thread = match text {
            [b'p', ids @ ..] => {
                let mut parts = ids.splitn(2, |&b| b == b'.');
                let process = number(parts.next()?)?;
                if process > PROCESS as u64 {
                    return None;
                }
                parts.next().unwrap_or(b"-1")
            }
            thread => thread,
        };
        match number(thread)? {
            0 => Some(Self::Whichever),
            tid => Some(Self::One(CpuId(u32::try_from(tid - 1).ok()?))),
        }
    }
}

/// The thread that stands for a CPU.
pub(super) fn tid(cpu: CpuId) -> NonZeroUsize {
    NonZeroUsize::MIN.saturating_add(cpu.0 as usize)
}

/// The CPU that a thread stands for, if the machine has it.
pub(super) fn cpu(machine: &Machine, tid: NonZeroUsize) -> Option<&Cpu> {
    let id = CpuId(u32::try_from(tid.get() - 1).ok()?);
    machine.cpu(id)
}

/// The thread-id of a CPU as this client wants it: `p1.4` or `4`.
pub(super) fn id_text(cpu: CpuId, multiprocess: bool) -> String {
    let tid = tid(cpu);
    if multiprocess { format!("p{PROCESS}.{tid:x}") } else { format!("{tid:x}") }
}

/// What a reader must know of a CPU, in a few words: `CPU 3, pid 77, panicked here`.
pub(super) fn describe(cpu: &Cpu) -> String {
    let mut text = format!("CPU {}", cpu.id.0);
    if let Some(pid) = cpu.pid {
        let _ = write!(text, ", pid {pid}");
    }
    for note in &cpu.notes {
        let _ = write!(text, ", {}", printable(note));
    }
    text
}

/// The answer to `qXfer:threads:read`.
pub(super) fn list(machine: &Machine, multiprocess: bool) -> String {
    let mut xml = String::from("<?xml version=\"1.0\"?>\n<threads>\n");
    for cpu in machine.cpus() {
        let _ = write!(xml, "<thread id=\"{}\" core=\"{}\"", id_text(cpu.id, multiprocess), cpu.id.0);
        if let Some(comm) = &cpu.comm {
            let _ = write!(xml, " name=\"{}\"", xml_escape(&printable(comm)));
        }
        let _ = writeln!(xml, ">{}</thread>", xml_escape(&describe(cpu)));
    }
    xml.push_str("</threads>\n");
    xml
}

pub(super) fn xml_escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&apos;"),
            c => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thread_ids_in_every_form() {
        let one = |n| Some(Choice::One(CpuId(n)));
        assert_eq!(Choice::parse(b"1"), one(0));
        assert_eq!(Choice::parse(b"p1.1f"), one(0x1e));
        assert_eq!(Choice::parse(b"p0.2"), one(1));
        for whichever in [&b"0"[..], b"-1", b"p1", b"p1.-1", b"p0.0", b"p-1.-1"] {
            assert_eq!(Choice::parse(whichever), Some(Choice::Whichever));
        }
        for wrong in [&b""[..], b"p", b"p.", b"p1.", b"p2.1", b"-2", b"x", b"100000001", b"p1.1.1"] {
            assert_eq!(Choice::parse(wrong), None, "{}", String::from_utf8_lossy(wrong));
        }
    }

    #[test]
    fn hostile_names_stay_text() {
        let escaped = xml_escape(&printable("<a&b>\"'\x1b[2J\u{202e}é"));
        assert_eq!(escaped, "&lt;a&amp;b&gt;&quot;&apos;\\u{1b}[2J\\u{202e}é");
    }
}
