//! Doors for `tests/fuzz` to what reads a QEMU's bytes, with no QEMU behind them.

use super::description::Description;
use super::qmp::Qmp;
use super::socket::Socket;
use super::stub::Stub;
use super::{mtree, registers};
use crate::addr::PhysRange;
use crate::arch::x86_64::RegisterFile;
use crate::backend::live::{Go, LiveError};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// Where the text of `info mtree -f` has RAM and ROM.
pub fn memory_map(text: &str) -> Vec<PhysRange> {
    mtree::regions(text).into_iter().flatten().map(|region| region.range).collect()
}

/// What the text of `info registers -a` has of each vCPU.
pub fn register_listing(text: &str) -> Vec<(u32, RegisterFile)> {
    registers::parse(text)
}

/// Whether a target description, the same for every annex, is of an x86-64.
pub fn target_description(text: &[u8]) -> bool {
    let read = |_: &str| Ok::<_, LiveError>(text.to_vec());
    Description::read(read).is_ok_and(|description| description.is_x86_64())
}

/// Greets the monitor at the other end, and asks it one line.
pub fn monitor(socket: UnixStream) -> Result<String, LiveError> {
    Qmp::over(Socket::Unix(socket), "fuzzing", Box::new(|_, _| {}))?.human("info mtree -f")
}

/// Does with the stub at the other end what a session does: learns its vCPUs and registers, has the first step, and
/// waits for the stop.
pub fn session(socket: UnixStream, patience: Duration) -> Result<(), LiveError> {
    let (mut stub, _) = Stub::over(Socket::Unix(socket))?;
    for thread in stub.threads().to_vec() {
        stub.registers(thread)?;
    }
    let first = stub.threads().first().and_then(|thread| thread.cpu());
    stub.resume(&[(first, Go::Step)])?;
    stub.wait(patience)?;
    if !stub.is_running() {
        stub.detach()?;
    }
    Ok(())
}
