//! What a QEMU says: its monitor's lines and listings, its GDB stub's packets.
#![no_main]

use kstub::backend::qemu::fuzzing;
use kstub::rsp::{self, Event, Framer};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// A monitor that says its lines whatever it is asked.
fn monitor(input: &[u8]) {
    // More than a socket holds would have to be read while it is written.
    let Some(said) = input.get(..input.len().min(32 << 10)) else { return };
    let (ours, mut theirs) = UnixStream::pair().expect("a pair of sockets");
    theirs.write_all(said).expect("a socket holds it");
    theirs.shutdown(Shutdown::Write).expect("it is connected");
    let _ = fuzzing::monitor(ours);
}

/// A stub whose next answer, a line each, comes with every packet that it gets, and that ends when it has no more.
fn stub(input: &[u8]) {
    let (ours, mut theirs) = UnixStream::pair().expect("a pair of sockets");
    let answers: Vec<Vec<u8>> = input.split(|&byte| byte == b'\n').map(rsp::frame).collect();
    let at_the_other_end = std::thread::spawn(move || {
        let (mut framer, mut bytes) = (Framer::new(1 << 16), [0; 4096]);
        let mut answers = answers.into_iter();
        while let Ok(read @ 1..) = theirs.read(&mut bytes) {
            for event in framer.events(&bytes[..read]) {
                let Event::Packet(_) = event else { continue };
                let Some(mut answer) = answers.next() else { return };
                // Behind a stop that nobody asked about the answer comes at once.
                while answer.starts_with(b"$T") {
                    let Some(next) = answers.next() else { break };
                    let _ = theirs.write_all(&answer);
                    answer = next;
                }
                let _ = theirs.write_all(&[b"+", &answer[..]].concat());
            }
        }
    });
    let _ = fuzzing::session(ours, Duration::from_secs(5));
    at_the_other_end.join().expect("it does not panic");
}

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let Some((&mode, rest)) = input.split_first() else { return };
    let text = String::from_utf8_lossy(rest);
    match mode {
        b'm' => {
            let map = fuzzing::memory_map(&text);
            assert!(map.windows(2).all(|pair| pair[0].end <= pair[1].start), "{map:x?}");
            assert!(map.iter().all(|range| range.start < range.end), "{map:x?}");
        }
        b'r' => {
            let lines = text.lines().filter(|line| line.trim_start().starts_with("CPU#")).count();
            assert!(fuzzing::register_listing(&text).len() <= lines);
        }
        b'd' => {
            fuzzing::target_description(rest);
        }
        b'q' => monitor(rest),
        _ => stub(rest),
    }
});
