//! A client's bytes through framer and front: however they are cut, every packet has one well-formed answer.
#![no_main]

#[path = "../../support/fake_machine.rs"]
#[allow(dead_code)]
mod fake_machine;

use kstub::addr::{PhysAddr, PhysRange};
use kstub::backend::{Backend, Fact, SavedCpu};
use kstub::gdb::{Flow, Front, MAX_REQUEST};
use kstub::kernel::Machine;
use kstub::memory::{PhysicalMemory, ReadOutcome, Unreadable};
use kstub::rsp::{self, Event, Framer};
use std::sync::{Arc, OnceLock};

/// The tests' machine without the page that panics when it is read.
struct Sound {
    inner: Arc<dyn Backend>,
    ranges: Vec<PhysRange>,
}

impl PhysicalMemory for Sound {
    fn read_phys(&self, at: PhysAddr, buf: &mut [u8]) -> ReadOutcome {
        if self.ranges.iter().any(|range| range.contains(at)) {
            return self.inner.read_phys(at, buf);
        }
        if buf.is_empty() {
            ReadOutcome::complete(0)
        } else {
            ReadOutcome::stopped(0, at, Unreadable::NotRam)
        }
    }
    fn ranges(&self) -> Vec<PhysRange> {
        self.ranges.clone()
    }
}

impl Backend for Sound {
    fn saved_cpus(&self) -> &[SavedCpu] {
        &[]
    }
    fn vmcoreinfo_note(&self) -> Option<&[u8]> {
        None
    }
    fn phys_base_hints(&self) -> Vec<u64> {
        Vec::new()
    }
    fn facts(&self) -> Vec<Fact> {
        Vec::new()
    }
    fn problems(&self) -> Vec<String> {
        Vec::new()
    }
}

fn machine() -> Arc<Machine> {
    static MACHINE: OnceLock<Arc<Machine>> = OnceLock::new();
    let machine = MACHINE.get_or_init(|| {
        let fake = fake_machine::fake_machine();
        let inner = Arc::clone(fake.backend());
        let ranges = inner.ranges();
        let sound = Arc::new(Sound { inner, ranges });
        Arc::new(Machine::from_parts(sound, fake.cpus().to_vec(), fake.first_cpu(), fake.text_base()))
    });
    Arc::clone(machine)
}

/// The bodies in `out`, which must be nothing but whole packets after an acknowledgement.
fn packets(out: &[u8]) -> Vec<&[u8]> {
    let mut rest = out.strip_prefix(b"+").unwrap_or(out);
    let mut bodies = Vec::new();
    while let Some(packet) = rest.strip_prefix(b"$") {
        let end = packet.iter().position(|&byte| byte == b'#').expect("a packet ends");
        let (body, tail) = packet.split_at(end);
        assert!(!body.contains(&b'$') && body.len() <= MAX_REQUEST, "{}", body.len());
        let sum = body.iter().fold(0u8, |sum, &byte| sum.wrapping_add(byte));
        assert!(tail.starts_with(format!("#{sum:02x}").as_bytes()), "the checksum is wrong");
        bodies.push(body);
        rest = &tail[3..];
    }
    assert!(rest.is_empty(), "{rest:?}");
    bodies
}

/// What is sent to a client that sends `chunks`.
fn session<'a>(chunks: impl Iterator<Item = &'a [u8]>) -> Vec<u8> {
    let (mut framer, mut front) = (Framer::new(MAX_REQUEST), Front::new(machine()));
    let mut all = Vec::new();
    for chunk in chunks {
        for event in framer.events(chunk) {
            let mut out = Vec::new();
            let flow = front.handle(event.clone(), &mut out);
            match &event {
                Event::Packet(_) | Event::TooLong => {
                    let bodies = packets(&out);
                    let (answer, before) = bodies.split_last().expect("an answer");
                    assert!(before.iter().all(|body| body.starts_with(b"O")), "{event:?}: {bodies:?}");
                    let text = answer.strip_prefix(b"O").filter(|rest| *rest != b"K");
                    // OK is an answer; what else begins with O would be text before one.
                    assert!(text.is_none(), "{event:?}: {bodies:?}");
                }
                Event::BadChecksum if out == b"-" => {}
                Event::BadChecksum | Event::Nak => assert!(packets(&out).len() <= 2),
                Event::Ack | Event::Interrupt => assert!(out.is_empty()),
            }
            all.extend(out);
            if flow == Flow::End {
                return all;
            }
        }
    }
    all
}

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let Some((&mode, rest)) = input.split_first() else { return };
    // Bytes as they come; or a body in each line, framed here, for a checksum is seldom right by chance.
    let stream = match mode {
        b'r' => rest.to_vec(),
        _ => rest
            .split(|&byte| byte == b'\n')
            .flat_map(|line| match line.strip_prefix(b"!") {
                Some(command) => {
                    let mut body = b"qRcmd,".to_vec();
                    rsp::encode(command, &mut body);
                    rsp::frame(&body)
                }
                None => rsp::frame(line),
            })
            .collect(),
    };
    let whole = session(std::iter::once(&stream[..]));
    assert!(session(stream.chunks(1)) == whole, "what is sent depends on how the stream is cut");
});
