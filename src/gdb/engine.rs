//! gdbstub behind one function: a packet's body in, the reply's body out.
//!
//! gdbstub gives a session up on malformed input. The engine then starts a new one, repeats what the client
//! had negotiated and selected, and reports the one packet as wrong.

use super::target::Target;
use super::threads::Thread;
use crate::rsp::{self, Event, Framer};
use gdbstub::conn::Connection;
use gdbstub::stub::GdbStub;
use gdbstub::stub::state_machine::GdbStubStateMachine;
use std::convert::Infallible;

/// gdbstub scans its whole buffer for each packet, so it starts small (and grows if it must): the packets that
/// are long by nature are the front's own.
const BUFFER: usize = 4096;

type Stub = GdbStubStateMachine<'static, Target, Outbox>;

/// gdbstub and what it takes to start it again.
pub(super) struct Engine {
    /// `None` only while it is being asked, or if it could not be started.
    stub: Option<Stub>,
    pub(super) target: Target,
    /// The client's `qSupported`, once it came.
    negotiated: Option<Vec<u8>>,
}

/// gdbstub could make nothing of a packet.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Malformed;

impl Engine {
    pub(super) fn new(target: Target) -> Self {
        let mut engine = Self { stub: None, target, negotiated: None };
        engine.start();
        engine
    }

    /// gdbstub's reply to a packet; empty if it does not know the packet.
    pub(super) fn ask(&mut self, body: &[u8]) -> Result<Vec<u8>, Malformed> {
        let reply = self.feed(body);
        if reply.is_err() {
            self.start();
        }
        reply
    }

    /// Negotiates features with `request` (a whole `qSupported:…`), now and after each restart.
    pub(super) fn negotiate(&mut self, request: Vec<u8>) -> Result<Vec<u8>, Malformed> {
        let reply = self.ask(&request)?;
        self.negotiated = Some(request);
        Ok(reply)
    }

    /// Makes `thread` the one whose registers and memory are read.
    pub(super) fn select(&mut self, thread: Thread) -> Result<Vec<u8>, Malformed> {
        self.target.selected = thread;
        self.ask(&selection(thread))
    }

    fn start(&mut self) {
        let builder = GdbStub::builder(Outbox::default()).packet_buffer_size(BUFFER);
        self.stub = builder.build().ok().and_then(|stub| stub.run_state_machine(&mut self.target).ok());
        // Acknowledging is the front's; the rest is what the client believes to be set.
        let replay = [
            Some(b"QStartNoAckMode".to_vec()),
            self.negotiated.clone(),
            Some(selection(self.target.selected)),
        ];
        for packet in replay.into_iter().flatten() {
            if self.feed(&packet).is_err() {
                tracing::error!(packet = %packet.escape_ascii(), "the protocol engine does not restart");
            }
        }
    }

    fn feed(&mut self, body: &[u8]) -> Result<Vec<u8>, Malformed> {
        for byte in rsp::frame(body) {
            self.stub = match self.stub.take().ok_or(Malformed)? {
                GdbStubStateMachine::Idle(stub) => stub.incoming_data(&mut self.target, byte).ok(),
                // It leaves the idle state only on packets that the front answers itself.
                _ => None,
            };
        }
        let Some(GdbStubStateMachine::Idle(stub)) = &mut self.stub else { return Err(Malformed) };
        let sent = std::mem::take(&mut stub.borrow_conn().0);
        let mut reply = Vec::new();
        Framer::new(usize::MAX).push(&sent, |event| {
            if let Event::Packet(body) = event {
                reply = body;
            }
        });
        Ok(reply)
    }
}

fn selection(thread: Thread) -> Vec<u8> {
    format!("Hg{}", thread.id_text(true)).into_bytes()
}

/// What gdbstub has sent.
#[derive(Default)]
struct Outbox(Vec<u8>);

impl Connection for Outbox {
    type Error = Infallible;

    fn write(&mut self, byte: u8) -> Result<(), Infallible> {
        self.0.push(byte);
        Ok(())
    }

    fn write_all(&mut self, bytes: &[u8]) -> Result<(), Infallible> {
        self.0.extend_from_slice(bytes);
        Ok(())
    }

    fn flush(&mut self) -> Result<(), Infallible> {
        Ok(())
    }
}
