//! A client of QEMU's GDB stub: packets out, answers back, each within its time.
//!
//! Knows what the stub can be asked and nothing of QMP. Connecting stops the guest. Nothing may be sent while the
//! guest runs but an interrupt, for QEMU takes any byte for one. Source: GDB manual, "Packets"; QEMU `gdbstub/`.

mod begin;
mod steps;

use super::description::Description;
use super::qmp::{GRACE, nonsense};
use super::replies::{StopReply, ThreadId, refusal, register_bytes, stop_reply, unescape};
use super::socket::{Socket, SocketAddress, timed_out};
use crate::addr::{PhysAddr, VirtAddr};
use crate::arch::x86_64::RegisterFile;
use crate::backend::live::{Go, LiveError, Point, StopReason};
use crate::bytes::printable;
use crate::rsp::{self, Event, Framer};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io::{Read, Write};
use std::time::{Duration, Instant};

/// What the stub answers at once; the main loop of a QEMU that loads a snapshot does not.
const SOON: Duration = Duration::from_secs(10);
/// How long an answer is waited for behind a stop before its question counts as dropped.
const DROPPED: Duration = Duration::from_millis(500);
/// The longest packet that is taken: QEMU's are 4 KiB.
const LONGEST_PACKET: usize = 1 << 20;
/// The largest part of a target description.
const LONGEST_ANNEX: usize = 1 << 20;
/// No machine has more vCPUs.
const MOST_THREADS: usize = 4096;
/// Bytes of memory in one packet: two digits each within QEMU's 4096.
const WRITE_AT_ONCE: usize = 1024;
/// How often a vCPU that took no step is asked again.
const STEP_TRIES: usize = 3;
/// The protocol's numbers for a stop that was asked for, and one by a step or a breakpoint.
const SIGINT: u8 = 2;
const SIGTRAP: u8 = 5;
/// Flags of QEMU's with which a step is none.
const NO_STEPS: &[u8] = b"0x0";
/// Where kernels are: every address space has the same there, wherever it has it at all.
pub(super) const KERNEL_HALF: VirtAddr = VirtAddr(1 << 63);

/// A connection to the stub.
pub(super) struct Stub {
    socket: Socket,
    framer: Framer,
    arrived: VecDeque<Vec<u8>>,
    acks: bool,
    features: String,
    description: Description,
    threads: Vec<ThreadId>,
    /// The vCPU that `g` and `P` are about.
    selected: Option<ThreadId>,
    /// The vCPU that stopped the guest last.
    stopped_on: Option<ThreadId>,
    /// Whether it was let run and did not say since that it stopped.
    running: bool,
    /// vCPUs that were to take a step and have not said that they did.
    steps: BTreeSet<u32>,
    /// What `g` said of vCPUs since they stand.
    seen: BTreeMap<u32, Vec<u8>>,
    /// The packet that lets vCPUs step, and how often it may be sent again.
    step: Option<(Vec<u8>, usize)>,
    /// A stop that came before what was asked for could begin.
    early: Option<StopReply>,
}

/// Stops the guest from beside the connection.
pub(super) struct Interrupter(Socket);

impl Interrupter {
    /// For a guest that runs only; one that stands takes it for nothing.
    pub(super) fn interrupt(&mut self) -> Result<(), LiveError> {
        self.0.write_all(b"\x03").map_err(|error| gone(&error.to_string()))
    }
}

fn gone(why: &str) -> LiveError {
    LiveError::Gone(format!("the connection to its GDB stub ended: {why}"))
}

impl Stub {
    /// Whether the stub said at the start that it can do this.
    pub(super) fn offers(&self, feature: &str) -> bool {
        self.features.split(';').any(|one| one == feature)
    }

    /// The vCPUs in the stub's order.
    pub(super) fn threads(&self) -> &[ThreadId] {
        &self.threads
    }

    /// Whether the guest was let run and has not stopped since.
    pub(super) fn is_running(&self) -> bool {
        self.running
    }

    /// What asks a guest that runs to stop, while this connection waits for the stop.
    pub(super) fn interrupter(&self) -> Result<Interrupter, LiveError> {
        self.socket.try_clone().map(Interrupter).map_err(|error| gone(&error.to_string()))
    }

    /// Takes note that the guest stands still, though the stub did not say so.
    pub(super) fn set_stopped(&mut self) {
        self.running = false;
        self.seen.clear();
    }

    /// Stops a guest that somebody else let run; the stop comes through [`Self::wait`]. Any other packet stops it, too, but
    /// is lost, and since QEMU 8.1 nothing is said of it.
    pub(super) fn halt(&mut self) -> Result<(), LiveError> {
        (self.running, self.step) = (true, None);
        self.interrupter()?.interrupt()
    }

    /// The registers of a vCPU.
    pub(super) fn registers(&mut self, thread: ThreadId) -> Result<RegisterFile, LiveError> {
        let reply = self.register_digits(thread)?;
        if let Some(why) = refusal(&reply) {
            return Err(refused("g", why));
        }
        let bytes = register_bytes(&reply).ok_or_else(|| garbled("g", &reply))?;
        Ok(self.description.decode(&bytes))
    }

    /// Sets a register, and sees to it that it has the value.
    pub(super) fn write_register(&mut self, cpu: u32, name: &str, value: &[u8]) -> Result<(), LiveError> {
        let what = format!("setting register '{name}' of CPU {cpu}");
        let (number, width) = self.description.find(name).ok_or_else(|| LiveError::Refused {
            what: what.clone(),
            why: "it has no such register".into(),
        })?;
        let mut bytes = value.to_vec();
        bytes.resize(width, 0);
        let thread = self.thread(cpu)?;
        self.select(thread)?;
        let mut packet = format!("P{number:x}=").into_bytes();
        rsp::encode(&bytes, &mut packet);
        self.expect_ok(&packet, &what)?;
        let reply = self.register_digits(thread)?;
        let all = register_bytes(&reply).ok_or_else(|| garbled("g", &reply))?;
        let from = self.description.offset(number);
        let now = all.get(from..from.saturating_add(width));
        let same = now.is_none_or(|now| now.iter().zip(&bytes).all(|(now, byte)| *now == Some(*byte)));
        if same {
            return Ok(());
        }
        let shown = now.unwrap_or_default().iter().rev().map(|byte| format!("{:02x}", byte.unwrap_or(0)));
        Err(LiveError::Refused { what, why: format!("it now holds 0x{}", shown.collect::<String>()) })
    }

    /// Puts or removes a point.
    pub(super) fn point(&mut self, put: bool, point: Point, at: VirtAddr, len: u64) -> Result<(), LiveError> {
        let number = match point {
            Point::Software => 0,
            Point::Hardware => 1,
            Point::Write => 2,
            Point::Read => 3,
            Point::Access => 4,
        };
        let what = format!(
            "{} a {} at {at:#x}",
            if put { "putting" } else { "removing" },
            match point {
                Point::Software | Point::Hardware => "breakpoint",
                Point::Write | Point::Read | Point::Access => "watchpoint",
            }
        );
        let packet = format!("{}{number},{:x},{:x}", if put { 'Z' } else { 'z' }, at.0, len.max(1));
        let outcome = self.expect_ok(packet.as_bytes(), &what);
        // KVM's is an instruction that is written by the page tables of the vCPU that stopped: those of user mode may lack the
        // kernel's memory.
        if point == Point::Software && at >= KERNEL_HALF && matches!(outcome, Err(LiveError::Refused { .. }))
        {
            return self.by_another_cpu(packet.as_bytes(), &what, outcome);
        }
        outcome
    }

    /// Asks again on behalf of each vCPU until one succeeds.
    fn by_another_cpu(
        &mut self,
        packet: &[u8],
        what: &str,
        mut outcome: Result<(), LiveError>,
    ) -> Result<(), LiveError> {
        for thread in self.threads.clone() {
            if matches!(outcome, Err(LiveError::Refused { .. })) && self.is_about(thread)? {
                outcome = self.expect_ok(packet, what);
            }
        }
        self.about_the_stop()?;
        outcome
    }

    /// Lets vCPUs go; the stop comes through [`Self::wait`].
    pub(super) fn resume(&mut self, actions: &[(Option<u32>, Go)]) -> Result<(), LiveError> {
        let mut packet = String::from("vCont");
        for (cpu, go) in actions {
            packet.push_str(match go {
                Go::Continue => ";c",
                Go::Step => ";s",
            });
            if let Some(cpu) = cpu {
                packet.push_str(&format!(":{}", self.thread(*cpu)?));
            }
        }
        // The first action that names a vCPU is its own.
        let does =
            |cpu: u32| actions.iter().find(|(one, _)| one.is_none_or(|one| one == cpu)).map(|(_, go)| *go);
        // A step of before that another stop came in front of: QEMU would take it when the vCPU goes on.
        let pending = self.steps.iter().copied().filter(|cpu| does(*cpu) == Some(Go::Continue)).collect();
        self.early = self.end_steps_of(&pending)?;
        if self.early.is_some() {
            self.running = true;
            return Ok(());
        }
        let all = self.threads.iter().filter_map(|thread| thread.cpu());
        self.steps.extend(all.filter(|cpu| does(*cpu) == Some(Go::Step)));
        let steps = actions.iter().any(|(_, go)| *go == Go::Step);
        self.step = steps.then(|| (packet.clone().into_bytes(), STEP_TRIES));
        self.go(packet.as_bytes())
    }

    /// Runs backwards.
    pub(super) fn reverse(&mut self, go: Go) -> Result<(), LiveError> {
        self.step = None;
        self.go(match go {
            Go::Continue => b"bc",
            Go::Step => b"bs",
        })
    }

    fn go(&mut self, packet: &[u8]) -> Result<(), LiveError> {
        self.still("letting the guest run")?;
        self.send(packet)?;
        self.running = true;
        Ok(())
    }

    /// The stop after a resume, or `None` after `patience`. Text that the stub prints meanwhile is dropped.
    pub(super) fn wait(&mut self, patience: Duration) -> Result<Option<StopReply>, LiveError> {
        let deadline = Instant::now() + patience;
        // Also a stub that never stops talking is left after that time.
        while self.running && Instant::now() < deadline {
            if let Some(stop) = self.early.take() {
                self.running = false;
                return Ok(Some(stop));
            }
            let Some(packet) = self.receive(deadline)? else { return Ok(None) };
            if let Some(stop) = stop_reply(&packet) {
                self.running = false;
                if self.took_no_step(stop)? {
                    continue;
                }
                self.seen.clear();
                self.stopped_on = stop.thread.or(self.stopped_on);
                if let Some(cpu) = stop.thread.and_then(|thread| thread.cpu()) {
                    self.steps.remove(&cpu);
                }
                return Ok(Some(stop));
            }
            // `W` and `X`: QEMU says so when it exits.
            if matches!(packet.first(), Some(b'W' | b'X')) {
                return Err(gone("QEMU exits"));
            }
            if packet.is_empty() || refusal(&packet).is_some() {
                self.running = false;
                return Err(refused("letting the guest run", refusal(&packet).unwrap_or_default()));
            }
        }
        Ok(None)
    }

    /// Writes guest memory by physical address.
    pub(super) fn write_phys(&mut self, at: PhysAddr, bytes: &[u8]) -> Result<(), LiveError> {
        let what = format!("writing {} bytes at physical address {at:#x}", bytes.len());
        self.expect_ok(b"Qqemu.PhyMemMode:1", &what)?;
        let mut outcome = Ok(());
        let mut here = at;
        for part in bytes.chunks(WRITE_AT_ONCE) {
            let mut packet = format!("M{:x},{:x}:", here.0, part.len()).into_bytes();
            rsp::encode(part, &mut packet);
            outcome = self.expect_ok(&packet, &what);
            if outcome.is_err() {
                break;
            }
            here = here.wrapping_add(part.len() as u64);
        }
        // Also after a failure: the mode is QEMU's and outlives this connection.
        self.expect_ok(b"Qqemu.PhyMemMode:0", &what)?;
        outcome
    }

    /// Sends a packet as it is and returns the answer.
    pub(super) fn raw(&mut self, packet: &[u8]) -> Result<Vec<u8>, LiveError> {
        self.ask_bytes(packet, SOON)
    }

    /// Gives the guest up: QEMU removes its breakpoints and lets it run.
    pub(super) fn detach(&mut self) -> Result<(), LiveError> {
        let process = self.threads.first().and_then(|thread| thread.process);
        let packet = process.map_or("D".to_owned(), |process| format!("D;{process:x}"));
        self.expect_ok(packet.as_bytes(), "detaching")
    }

    /// The stub's name of a vCPU.
    fn thread(&self, cpu: u32) -> Result<ThreadId, LiveError> {
        let found = self.threads.iter().find(|thread| thread.cpu() == Some(cpu)).copied();
        found.ok_or_else(|| refused(&format!("CPU {cpu}"), "it has no such CPU".into()))
    }

    fn select(&mut self, thread: ThreadId) -> Result<(), LiveError> {
        if self.selected != Some(thread) {
            self.expect_ok(format!("Hg{thread}").as_bytes(), "choosing a CPU")?;
            self.selected = Some(thread);
        }
        Ok(())
    }

    /// What `g` says of a vCPU.
    fn register_digits(&mut self, thread: ThreadId) -> Result<Vec<u8>, LiveError> {
        self.select(thread)?;
        let reply = self.ask("g")?;
        if let Some(cpu) = thread.cpu() {
            self.seen.insert(cpu, reply.clone());
        }
        Ok(reply)
    }

    fn expect_ok(&mut self, packet: &[u8], what: &str) -> Result<(), LiveError> {
        let reply = self.ask_bytes(packet, SOON)?;
        match refusal(&reply) {
            _ if reply == b"OK" => Ok(()),
            Some(why) => Err(LiveError::Refused { what: what.to_owned(), why }),
            None => Err(nonsense(what, &String::from_utf8_lossy(&reply))),
        }
    }

    fn ask(&mut self, packet: &str) -> Result<Vec<u8>, LiveError> {
        self.ask_bytes(packet.as_bytes(), SOON)
    }

    fn ask_bytes(&mut self, packet: &[u8], patience: Duration) -> Result<Vec<u8>, LiveError> {
        self.still(&String::from_utf8_lossy(packet.get(..32).unwrap_or(packet)))?;
        self.send(packet)?;
        let deadline = Instant::now() + patience;
        let mut reply = self.receive(deadline)?;
        if reply.is_none() {
            // As the monitor's answers.
            reply = self.receive(Instant::now() + patience / GRACE)?;
        }
        // A stop that nobody asked about: that of our connecting, whose packet is answered next; or another monitor
        // had let the guest run, and QEMU took our first byte for an interrupt and dropped the rest.
        if packet != b"?" && reply.as_ref().is_some_and(|reply| reply.starts_with(b"T")) {
            reply = self.receive(Instant::now() + DROPPED)?;
            if reply.is_none() {
                self.send(packet)?;
                reply = self.receive(deadline)?;
            }
        }
        match reply {
            Some(reply) => Ok(reply),
            None => {
                // A late answer would be taken for that of the next packet.
                self.socket.shutdown();
                let what = format!("packet '{}' to its GDB stub", String::from_utf8_lossy(packet));
                Err(LiveError::Timeout { what, seconds: patience.as_secs() })
            }
        }
    }

    fn still(&self, what: &str) -> Result<(), LiveError> {
        if self.running {
            let why = "the guest runs; stop it first".to_owned();
            return Err(LiveError::NotNow { what: what.to_owned(), why });
        }
        Ok(())
    }

    fn send(&mut self, packet: &[u8]) -> Result<(), LiveError> {
        // What came unasked is of something that is over: QEMU reports stops that others caused.
        for late in self.arrived.drain(..) {
            tracing::trace!("QEMU's stub, unasked: {}", printable(&String::from_utf8_lossy(&late)));
        }
        tracing::trace!("to QEMU's stub: {}", printable(&String::from_utf8_lossy(packet)));
        self.socket.write_all(&rsp::frame(packet)).map_err(|error| gone(&error.to_string()))
    }

    /// The next packet, or `None` when the time is over.
    fn receive(&mut self, deadline: Instant) -> Result<Option<Vec<u8>>, LiveError> {
        let mut bytes = [0; 4096];
        loop {
            if let Some(packet) = self.arrived.pop_front() {
                tracing::trace!("from QEMU's stub: {}", printable(&String::from_utf8_lossy(&packet)));
                return Ok(Some(packet));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            self.socket.set_read_timeout(Some(left)).map_err(|error| gone(&error.to_string()))?;
            let read = match self.socket.read(&mut bytes) {
                Ok(0) => return Err(gone("QEMU closed it")),
                Ok(read) => bytes.get(..read).unwrap_or_default(),
                Err(error) if timed_out(&error) => continue,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(gone(&error.to_string())),
            };
            let (arrived, mut damaged) = (&mut self.arrived, false);
            self.framer.push(read, |event| match event {
                Event::Packet(packet) => arrived.push_back(packet),
                Event::BadChecksum | Event::TooLong => damaged = true,
                Event::Ack | Event::Nak | Event::Interrupt => {}
            });
            if damaged {
                self.socket.shutdown();
                return Err(nonsense("QEMU's GDB stub", "a damaged packet"));
            }
            if self.acks && !self.arrived.is_empty() {
                self.socket.write_all(b"+").map_err(|error| gone(&error.to_string()))?;
            }
        }
    }
}

impl Drop for Stub {
    fn drop(&mut self) {
        // QEMU serves the next client once this one has gone.
        self.socket.shutdown();
    }
}

fn refused(what: &str, why: String) -> LiveError {
    LiveError::Refused { what: what.to_owned(), why }
}

fn garbled(packet: &str, reply: &[u8]) -> LiveError {
    nonsense(&format!("packet '{packet}' to its GDB stub"), &String::from_utf8_lossy(reply))
}

#[cfg(test)]
mod tests;
