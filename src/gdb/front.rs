//! One client's session: every packet it sends gets exactly one answer, whatever it is.
//!
//! Owns acknowledgement, the packets that gdbstub lacks or that need other words for a target that cannot
//! run, and all bulk memory; asks [`Engine`] for the rest. Knows no socket.
//! Source: GDB manual, "Packets", "Stop Reply Packets", "General Query Packets", "Packet
//! Acknowledgment"; QEMU `gdbstub/gdbstub.c` for `qqemu.*`.

use super::Settings;
use super::engine::Engine;
use super::files::{Files, OpenFiles};
use super::live::{Live, Session};
use super::memory::{self, Space};
use super::selection::Selection;
use super::target::{Target, errno};
use super::threads::{Choice, Thread, Threads};
use super::{Show, bulk, osdata};
use crate::command::{Focus, Form};
use crate::kernel::Machine;
use crate::rsp::{self, Event};
use std::sync::Arc;

/// The longest packet the client may send, announced as `PacketSize`; replies are no longer. Memory comes twice as fast
/// as with a quarter of it, and gdb and lldb ask for no more memory than they want.
pub const MAX_REQUEST: usize = 0x40000;

/// The longest body of a reply, which with its frame is to stay within `PacketSize`, too.
const MAX_REPLY: usize = MAX_REQUEST - 16;

/// The most bytes one reply carries even if each of them takes two: in hex, or all escaped.
const MAX_PAYLOAD: usize = MAX_REPLY / 2;

const CANNOT_RUN: &str = "This is a crash dump: it cannot run or step.\n";
const CANNOT_WRITE: &[u8] = b"E.this is a crash dump, its registers cannot be changed";

/// Whether the session goes on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Flow {
    /// More packets may come.
    Continue,
    /// The client has said goodbye (`D`, `k`, `vKill`): send what was written, then close.
    End,
}

/// What the client said of itself in `qSupported`.
#[derive(Clone, Copy, Default)]
pub(super) struct Client {
    /// Thread ids carry a process: `p1.2`.
    multiprocess: bool,
    /// It is gdb. lldb takes some replies otherwise, and only gdb announces thread events.
    pub(super) gdb: bool,
    /// It selects a thread before each command: gdb since 16, which is also the first to announce long errors.
    pub(super) selects_for_commands: bool,
    /// It expands run lengths. Every client should, and those made for stubs that send none do not: gdb is known by the probe
    /// that no other client has.
    knows_runs: bool,
    /// It is to be told that a stop is by a breakpoint of its own: else it takes a pc behind one for that, as x86 has it.
    pub(super) tells_breakpoints: bool,
}

/// One client's session.
pub struct Front {
    pub(super) machine: Arc<Machine>,
    pub(super) engine: Engine,
    pub(super) client: Client,
    pub(super) selection: Selection,
    /// Our answer to the first `qSupported` that named features; repeated to later ones.
    supported: Option<Vec<u8>>,
    acknowledge: bool,
    /// The last packet sent, for a client that asks for it again.
    last_packet: Vec<u8>,
    /// For memory on its way to the client.
    room: Vec<u8>,
    physical: bool,
    pub(super) files: OpenFiles,
    /// What `info os` was last asked for, and the document.
    table: (Vec<u8>, String),
    /// The list of threads, and whether the ids in it name the process.
    thread_list: Option<(bool, String)>,
    show: Show,
    /// The way to the guest, where it is none but a dump.
    pub(super) live: Option<Session>,
    /// The guest runs, and the client is answered when it stops.
    pub(super) owes_stop: bool,
}

/// The packets to send for one request: rarely more than one.
pub(super) enum Reply {
    One(Vec<u8>),
    /// Once the guest stops.
    Later,
    /// What was asked for by `m` or `x`: much, so it is written to where it is sent from.
    Memory,
    /// Console text for the user, then the answer.
    Console(String, Vec<u8>),
}

impl From<&[u8]> for Reply {
    fn from(body: &[u8]) -> Self {
        Self::One(body.to_vec())
    }
}

impl From<Vec<u8>> for Reply {
    fn from(body: Vec<u8>) -> Self {
        Self::One(body)
    }
}

/// `Enn`: failed for the reason that the errno gives.
pub(super) fn error(errno: u8) -> Vec<u8> {
    let mut body = b"E".to_vec();
    rsp::encode(&[errno], &mut body);
    body
}

impl Front {
    /// A session on `machine` that is told of no files.
    pub fn new(machine: Arc<Machine>) -> Self {
        Self::with(machine, Files::none().into())
    }

    /// A session on `machine`.
    pub fn with(machine: Arc<Machine>, settings: Settings) -> Self {
        let threads = Threads::new(&machine, settings.show);
        let first = threads.on(machine.first_cpu());
        let target = Target {
            threads,
            machine: Arc::clone(&machine),
            selected: first,
            command_thread: first,
            console: None,
            focus: Focus::default(),
        };
        Self {
            selection: Selection::new(first),
            machine,
            engine: Engine::new(target),
            client: Client::default(),
            supported: None,
            acknowledge: true,
            last_packet: Vec::new(),
            room: Vec::new(),
            physical: false,
            files: OpenFiles::new(settings.files),
            table: Default::default(),
            thread_list: None,
            show: settings.show,
            live: None,
            owes_stop: false,
        }
    }

    /// A session on a guest, which this client controls if it is the first to ask how it stands.
    pub fn on_guest(live: &Arc<Live>, settings: Settings) -> std::io::Result<Self> {
        let session = live.session()?;
        let files = live.files().unwrap_or(settings.files);
        let front = Self::with(live.machine(), Settings { files, ..settings });
        Ok(Self { live: Some(session), ..front })
    }

    /// Goes on with another moment of the machine.
    pub(super) fn see(&mut self, machine: Arc<Machine>) {
        let target = &mut self.engine.target;
        target.threads = Threads::new(&machine, self.show);
        target.machine = Arc::clone(&machine);
        self.machine = machine;
        self.thread_list = None;
        self.table = Default::default();
        let first = self.first();
        let selected = self.engine.target.selected;
        if !self.engine.target.threads.has(selected) {
            self.selection.stopped_on(first);
            if self.engine.select(first).is_err() {
                tracing::error!("{first:?} cannot be selected");
            }
        }
    }

    /// Handles one event and appends what is to be sent to `out`.
    pub fn handle(&mut self, event: Event, out: &mut Vec<u8>) -> Flow {
        match event {
            Event::Packet(body) => return self.packet(&body, out),
            Event::TooLong => {
                self.ack(out);
                self.send(error(errno::E2BIG), out);
            }
            Event::BadChecksum if self.acknowledge => out.push(b'-'),
            // Without acknowledgement the client does not send it again: it must not wait for an answer.
            Event::BadChecksum => self.send(error(errno::EINVAL), out),
            Event::Nak if self.acknowledge => out.extend_from_slice(&self.last_packet),
            // Of a dump nothing ever runs that Ctrl-C could stop.
            Event::Interrupt => self.interrupt(out),
            Event::Nak | Event::Ack => {}
        }
        Flow::Continue
    }

    fn packet(&mut self, body: &[u8], out: &mut Vec<u8>) -> Flow {
        self.ack(out);
        tracing::debug!("<- {}", abbreviated(body));
        match body {
            b"QStartNoAckMode" => self.acknowledge = false,
            b"vMustReplyEmpty" => self.client.knows_runs = self.client.gdb,
            _ => {}
        }
        self.catch_up();
        self.follow_selection(body);
        let reply = self.answer(body);
        self.reply(reply, body, out);
        if is_goodbye(body) { Flow::End } else { Flow::Continue }
    }

    /// Sends what answers `body`.
    pub(super) fn reply(&mut self, reply: Reply, body: &[u8], out: &mut Vec<u8>) {
        match reply {
            Reply::One(body) => self.send(body, out),
            Reply::Later => {}
            Reply::Memory => {
                let mut room = std::mem::take(&mut self.room);
                self.send_with(out, |front, packet| front.read_memory(body, &mut room, packet));
                self.room = room;
            }
            Reply::Console(text, body) => {
                self.say(&text, out);
                self.send(body, out);
            }
        }
    }

    /// Sends text for the user, behind which the answer is still to come.
    pub(super) fn say(&mut self, text: &str, out: &mut Vec<u8>) {
        let mut console = b"O".to_vec();
        rsp::encode(text.as_bytes(), &mut console);
        self.send(console, out);
    }

    fn ack(&self, out: &mut Vec<u8>) {
        if self.acknowledge {
            out.push(b'+');
        }
    }

    /// Keeps up with the thread that the user has selected.
    fn follow_selection(&mut self, body: &[u8]) {
        let threads = &self.engine.target.threads;
        let one = |thread: &[u8]| match Choice::parse(thread)? {
            Choice::One(thread) => threads.has(thread).then_some(thread),
            Choice::Whichever => None,
        };
        if body.starts_with(b"qXfer:threads:read:") || body == b"qfThreadInfo" {
            self.selection.listed();
        } else if let Some(thread) = body.strip_prefix(b"T").and_then(one) {
            self.selection.asked_alive(thread, threads.len(), threads.iter());
        } else if let Some(thread) = body.strip_prefix(b"Hg").and_then(one) {
            self.selection.selected(thread);
        } else if !body.starts_with(b"qRcmd,") {
            self.selection.other();
        }
    }

    fn send(&mut self, body: Vec<u8>, out: &mut Vec<u8>) {
        self.send_with(out, |_, packet| packet.extend_from_slice(&body));
    }

    /// Sends the body that `write` appends.
    fn send_with(&mut self, out: &mut Vec<u8>, write: impl FnOnce(&Self, &mut Vec<u8>)) {
        let start = out.len();
        rsp::frame_into(out, |packet| {
            let body = packet.len();
            write(self, packet);
            tracing::debug!("-> {}", abbreviated(packet.get(body..).unwrap_or_default()));
        });
        if self.acknowledge {
            self.last_packet = out.get(start..).unwrap_or_default().to_vec();
        }
    }

    fn answer(&mut self, body: &[u8]) -> Reply {
        if let Some(reply) = self.live_answer(body) {
            return reply;
        }
        match body {
            b"QStartNoAckMode" => b"OK"[..].into(),
            b"qSupported" => self.supported(b""),
            [b'q', b'S', b'u', b'p', b'p', b'o', b'r', b't', b'e', b'd', b':', features @ ..] => {
                self.supported(features)
            }
            b"?" => self.stopped(b"T05", self.first()).into(),
            b"qC" => [b"QC", self.id(self.engine.target.selected).as_bytes()].concat().into(),
            b"vCont?" => b"vCont;c;C;s;S"[..].into(),
            [b'H', operation, thread @ ..] => self.select(*operation, thread).into(),
            [b'm' | b'x', ..] => Reply::Memory,
            // Empty would make gdb try another way to write; an error ends it with a sentence of gdb's own.
            [b'M' | b'X', ..] => error(errno::EROFS).into(),
            [b'P' | b'G', ..] if self.client.gdb => CANNOT_WRITE.into(),
            [b'P' | b'G', ..] => error(errno::EROFS).into(),
            [b'c' | b'C' | b's' | b'S', ..] => self.refuse_to_run(b""),
            _ if body.starts_with(b"vCont;") => self.refuse_to_run(body),
            _ if is_goodbye(body) => b"OK"[..].into(),
            _ if body.starts_with(b"qRcmd,") => self.monitor(body),
            _ if body.starts_with(b"qXfer:threads:read:") => self.thread_list(body).into(),
            _ if body.starts_with(b"qXfer:osdata:read:") => self.osdata(body).into(),
            b"qkstub.kernel" => {
                let number = self.live.as_ref().map_or(0, Session::kernels);
                format!("{number:x}").into_bytes().into()
            }
            _ if body.starts_with(b"qkstub.") => self.bulk(body).into(),
            _ => {
                let ours = self.files.answer(body).or_else(|| self.qemu(body));
                ours.unwrap_or_else(|| self.ask(body)).into()
            }
        }
    }

    fn ask(&mut self, body: &[u8]) -> Vec<u8> {
        self.engine.ask(body).unwrap_or_else(|_| error(errno::EINVAL))
    }

    /// The thread a client starts on.
    pub(super) fn first(&self) -> Thread {
        self.engine.target.threads.on(self.machine.first_cpu())
    }

    fn id(&self, thread: Thread) -> String {
        thread.id_text(self.client.multiprocess)
    }

    /// `qSupported`. Tools send it again, without features, in the middle of a session: that must change
    /// nothing. Empty features, which gdbstub takes for malformed, are dropped.
    fn supported(&mut self, features: &[u8]) -> Reply {
        if let Some(reply) = &self.supported {
            return reply.clone().into();
        }
        let features: Vec<&[u8]> = features.split(|&b| b == b';').filter(|f| !f.is_empty()).collect();
        let negotiated = match features.is_empty() {
            // gdbstub wants at least one feature.
            true => self.engine.ask(b"qSupported:kstub-"),
            false => self.engine.negotiate([b"qSupported:", &features.join(&b';')[..]].concat()),
        };
        let Ok(theirs) = negotiated else { return error(errno::EINVAL).into() };
        let client = Client {
            multiprocess: features.contains(&&b"multiprocess+"[..]),
            gdb: features.contains(&&b"QThreadEvents+"[..]),
            selects_for_commands: features.contains(&&b"error-message+"[..]),
            knows_runs: false,
            tells_breakpoints: self.live.is_some() && features.contains(&&b"swbreak+"[..]),
        };
        let mut reply =
            format!("PacketSize={MAX_REQUEST:x};qXfer:threads:read+;qXfer:osdata:read+").into_bytes();
        reply.extend_from_slice(self.files.files.features().as_bytes());
        if self.live.as_ref().is_some_and(|live| live.control().can_reverse()) {
            reply.extend_from_slice(b";ReverseContinue+;ReverseStep+");
        }
        if client.gdb {
            reply.extend_from_slice(b";binary-upload+");
        }
        if client.tells_breakpoints {
            reply.extend_from_slice(b";swbreak+;hwbreak+");
        }
        for feature in theirs.split(|&b| b == b';').filter(|f| !f.starts_with(b"PacketSize=")) {
            reply.push(b';');
            reply.extend_from_slice(feature);
        }
        if !features.is_empty() {
            self.client = client;
            self.supported = Some(reply.clone());
        }
        reply.into()
    }

    /// `Hg` and `Hc`: the latter chooses what would run, and nothing does.
    fn select(&mut self, operation: u8, thread: &[u8]) -> Vec<u8> {
        let thread = match Choice::parse(thread) {
            Some(Choice::Whichever) => self.first(),
            Some(Choice::One(thread)) => thread,
            None => return error(errno::EINVAL),
        };
        if !self.engine.target.threads.has(thread) {
            return error(errno::ESRCH);
        }
        match operation {
            b'g' => self.engine.select(thread).unwrap_or_else(|_| error(errno::EINVAL)),
            b'c' => b"OK".to_vec(),
            _ => error(errno::EINVAL),
        }
    }

    pub(super) fn is_physical(&self) -> bool {
        self.physical
    }

    fn space(&self) -> Space {
        let Target { machine, threads, selected, .. } = &self.engine.target;
        match threads.task(machine, *selected) {
            _ if self.physical => Space::Physical,
            Some(task) => Space::Task(task.at),
            None => Space::Virtual(threads.cpu(machine, *selected)),
        }
    }

    /// Appends the answer to `m` or `x` to `body`; `room` is for the bytes. Only gdb knows our form of `x`; an old lldb probes
    /// for another form with an empty read.
    fn read_memory(&self, packet: &[u8], room: &mut Vec<u8>, body: &mut Vec<u8>) {
        let (request, max, binary) = match packet {
            [b'm', request @ ..] => (request, MAX_PAYLOAD, false),
            [b'x', request @ ..] if self.client.gdb => (request, MAX_REPLY, true),
            _ => return,
        };
        let bytes = match memory::read(&self.machine, self.space(), request, max, room) {
            Ok(bytes) => bytes,
            Err(errno) => return body.extend_from_slice(&error(errno)),
        };
        if !binary {
            let encode = if self.client.knows_runs { rsp::encode_runs } else { rsp::encode };
            return encode(bytes, body);
        }
        // Most bytes are sent as they are: the reply has as many as fit.
        body.push(b'b');
        let escape = if self.client.knows_runs { rsp::escape_runs_up_to } else { rsp::escape_up_to };
        escape(bytes, MAX_REPLY - 1, body);
    }

    /// A stop reply. It must name a thread, or gdb warns and selects the first one. The client takes that thread for selected,
    /// as if by `Hg`.
    pub(super) fn stopped(&mut self, signal: &[u8], thread: Thread) -> Vec<u8> {
        self.selection.stopped_on(thread);
        if self.engine.select(thread).is_err() {
            tracing::error!("{thread:?} cannot be selected");
        }
        [signal, b"thread:", self.id(thread).as_bytes(), b";"].concat()
    }

    /// The thread that a request to run is about: the one that it names, else the one that the user has selected.
    pub(super) fn asked_to_run(&self, request: &[u8]) -> Thread {
        let named = request.split(|&b| b == b';').find_map(|action| {
            let colon = action.iter().position(|&b| b == b':')?;
            match Choice::parse(action.get(colon + 1..)?)? {
                Choice::One(thread) => self.engine.target.threads.has(thread).then_some(thread),
                Choice::Whichever => None,
            }
        });
        named.unwrap_or(self.selection.user())
    }

    /// Says why, then reports a stop at once, on the thread that was to run.
    ///
    /// Signal 0 lets gdb print just "stopped". lldb takes it for a request to go on, and takes SIGTRAP for a step that
    /// went nowhere, which it repeats for ever; an exception ends whatever it had planned.
    fn refuse_to_run(&mut self, request: &[u8]) -> Reply {
        let thread = self.asked_to_run(request);
        let stop = match self.client.gdb {
            true => self.stopped(b"T00", thread),
            false => {
                let mut stop = self.stopped(b"T05", thread);
                stop.extend_from_slice(b"reason:exception;description:");
                rsp::encode(b"this is a crash dump", &mut stop);
                stop.push(b';');
                stop
            }
        };
        Reply::Console(CANNOT_RUN.to_owned(), stop)
    }

    /// `qRcmd`. To gdb its output goes as the answer itself: with `O` packets before it, Ctrl-C in gdb would
    /// leave some behind as answers to later requests. Other clients know only `O` packets.
    fn monitor(&mut self, request: &[u8]) -> Reply {
        let followed = self.selection.for_command();
        let exact = !self.client.gdb || self.client.selects_for_commands;
        self.engine.target.command_thread = if exact { self.engine.target.selected } else { followed };
        let answer = self.ask(request);
        match self.engine.target.console.take() {
            Some(text) => self.console_answer(text, answer),
            None => answer.into(),
        }
    }

    /// What a command has printed, and the answer behind it.
    pub(super) fn console_answer(&self, text: String, answer: Vec<u8>) -> Reply {
        if text.is_empty() {
            return answer.into();
        }
        if self.client.gdb {
            let mut body = Vec::new();
            rsp::encode(text.as_bytes(), &mut body);
            return body.into();
        }
        Reply::Console(text, answer)
    }

    /// `qXfer:threads:read::OFFSET,LENGTH`
    /// gdb reads it in pieces of 4 KiB, often, and the threads of a dump stay what they are.
    fn thread_list(&mut self, request: &[u8]) -> Vec<u8> {
        let multiprocess = self.client.multiprocess;
        if self.thread_list.as_ref().is_none_or(|(made_for, _)| *made_for != multiprocess) {
            let xml = self.engine.target.threads.list(&self.machine, multiprocess);
            self.thread_list = Some((multiprocess, xml));
        }
        let xml = self.thread_list.as_ref().map_or("", |(_, xml)| xml);
        window(xml.as_bytes(), request)
    }

    /// `qXfer:osdata:read:TYPE:OFFSET,LENGTH`. gdb reads a long table in pieces: the command runs for the first.
    fn osdata(&mut self, request: &[u8]) -> Vec<u8> {
        let annex = request.strip_prefix(b"qXfer:osdata:read:").unwrap_or_default();
        let end = annex.iter().rposition(|&byte| byte == b':').unwrap_or(annex.len());
        let (annex, window_wanted) = annex.split_at(end);
        if window_wanted.starts_with(b":0,") || self.table.0 != annex {
            let context = self.engine.target.context(self.engine.target.selected, Form::Json);
            let xml = osdata::document(&context, &String::from_utf8_lossy(annex));
            self.table = (annex.to_vec(), xml);
        }
        window(self.table.1.as_bytes(), request)
    }

    /// kstub's own packets.
    fn bulk(&self, body: &[u8]) -> Vec<u8> {
        match bulk::answer(&self.engine.target, self.space(), body) {
            Some(Ok(reply)) => reply,
            Some(Err(errno)) => error(errno),
            // Empty means "not supported".
            None => Vec::new(),
        }
    }

    /// QEMU's own packets, by which tools made for QEMU know it and read physical memory.
    fn qemu(&mut self, body: &[u8]) -> Option<Vec<u8>> {
        match body {
            b"qqemu.Supported" if self.live.is_some() => Some(b"sstepbits;sstep;PhyMemMode".to_vec()),
            b"qqemu.Supported" => Some(b"sstepbits;PhyMemMode".to_vec()),
            b"qqemu.sstepbits" | b"Qqemu.sstepbits" => Some(b"ENABLE=1,NOIRQ=2,NOTIMER=4".to_vec()),
            b"qqemu.PhyMemMode" => Some(if self.physical { b"1" } else { b"0" }.to_vec()),
            b"Qqemu.PhyMemMode:0" | b"Qqemu.PhyMemMode:1" => {
                self.physical = body.ends_with(b"1");
                Some(b"OK".to_vec())
            }
            _ => None,
        }
    }
}

/// A packet for the log: the beginning, and how long it is.
fn abbreviated(body: &[u8]) -> String {
    const SHOWN: usize = 100;
    match body.get(..SHOWN) {
        Some(start) => format!("{}… ({} bytes)", start.escape_ascii(), body.len()),
        None => body.escape_ascii().to_string(),
    }
}

/// `k`, `vKill;…`, `D`, `D;…`: the client leaves. The dump stays, and so do other clients.
fn is_goodbye(body: &[u8]) -> bool {
    matches!(body, b"k" | b"vKill" | b"D") || body.starts_with(b"vKill;") || body.starts_with(b"D;")
}

/// The part of `object` that a `qXfer` `request` wants, which ends in `:OFFSET,LENGTH`.
pub(super) fn window(object: &[u8], request: &[u8]) -> Vec<u8> {
    let window = request.rsplit(|&b| b == b':').next().unwrap_or_default();
    let mut numbers = window.splitn(2, |&b| b == b',').map(rsp::parse_u64);
    let (Some(Some(offset)), Some(Some(length))) = (numbers.next(), numbers.next()) else {
        return error(errno::EINVAL);
    };
    let clamp = |n: u64| usize::try_from(n).unwrap_or(usize::MAX);
    let rest = object.get(clamp(offset)..).unwrap_or_default();
    let part = &rest[..clamp(length).min(MAX_PAYLOAD).min(rest.len())];
    let mut body = if part.len() == rest.len() { b"l".to_vec() } else { b"m".to_vec() };
    rsp::escape(part, &mut body);
    body
}
