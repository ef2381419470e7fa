//! The GDB remote protocol as bytes: packets out of a stream, checksums, escapes, hex.
//!
//! Knows no packet's meaning, no socket and no machine. Every input is untrusted: nothing here can panic or
//! grow without bound. Source: GDB manual, "Overview" and "Packets".

mod encode;
mod framer;
mod hex;
mod runs;

pub use encode::{escape, escape_up_to, frame, frame_into};
pub use framer::{Event, Framer, unescape};
pub use hex::{decode, encode, parse_u64};
pub use runs::{encode_runs, escape_runs_up_to};

/// The sum of the body's bytes modulo 256, as sent after `#`.
fn checksum(body: &[u8]) -> u8 {
    body.iter().fold(0, |sum, &byte| sum.wrapping_add(byte))
}
