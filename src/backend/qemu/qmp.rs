//! QMP: one JSON object a line, to QEMU and back, with events in between.
//!
//! Commands are qapi's, made from QEMU's schema; the wire is our own, since qapi's client buffers lines of any length
//! and gives up at the first event or value that its schema lacks. A thread reads; whoever asks waits for its answer,
//! and not for ever. Source: QEMU `docs/interop/qmp-spec.rst`.

use super::socket::{Socket, SocketAddress, timed_out};
use crate::backend::live::LiveError;
use crate::bytes::printable;
use qapi::qmp::{getfd, human_monitor_command, qmp_capabilities};
use qapi::{Command, Execute};
use serde::Deserialize;
use serde_json::Value;
use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// The longest line that is read: `info registers -a` takes some 7 KiB a vCPU, and there may be 4096.
const LONGEST_LINE: u64 = 64 << 20;
/// What QEMU answers at once unless it is stopped or very busy.
pub(super) const SOON: Duration = Duration::from_secs(10);
/// Which part of that time QEMU gets once more when it is over.
pub(super) const GRACE: u32 = 10;
/// How long a greeting may take: QEMU sends it unasked.
const GREETING: Duration = Duration::from_secs(5);

/// Gets each event as it comes, on the thread that reads.
pub(super) type Sink = Box<dyn Fn(&str, &Value) + Send>;

/// A connection to a QMP monitor.
pub(super) struct Qmp {
    writer: Mutex<Socket>,
    waiting: Arc<Mutex<Waiting>>,
    next: AtomicU64,
    version: String,
    peer: Option<(u32, u32)>,
}

/// Who waits for which answer; once QEMU is gone, why.
enum Waiting {
    For(HashMap<u64, SyncSender<Answer>>),
    Gone(String),
}

/// What QEMU returned, or why it did not.
type Answer = Result<Value, String>;

#[derive(Deserialize)]
struct Message {
    event: Option<String>,
    #[serde(default)]
    data: Value,
    #[serde(rename = "return")]
    answer: Option<Value>,
    error: Option<Refusal>,
    id: Option<Value>,
}

#[derive(Deserialize)]
struct Refusal {
    desc: String,
}

impl Qmp {
    /// Connects, reads the greeting, and sends every event to `sink` from then on.
    pub(super) fn connect(address: &SocketAddress, sink: Sink) -> Result<Self, LiveError> {
        Self::over(Socket::connect(address)?, &address.to_string(), sink)
    }

    /// The same over a connection that stands; `name` is for messages.
    pub(super) fn over(socket: Socket, name: &str, sink: Sink) -> Result<Self, LiveError> {
        let failed = |error: std::io::Error| LiveError::Gone(format!("{name}: {error}"));
        let peer = socket.peer();
        let writer = socket.try_clone().map_err(failed)?;
        let mut reader = BufReader::new(socket);
        let version = greeting(&mut reader, name)?;
        reader.get_ref().set_read_timeout(None).map_err(failed)?;
        let waiting = Arc::new(Mutex::new(Waiting::For(HashMap::new())));
        let for_thread = Arc::clone(&waiting);
        let start = std::thread::Builder::new().name("qmp".into());
        start.spawn(move || read_until_the_end(reader, &for_thread, &sink)).map_err(failed)?;
        let this = Self { writer: Mutex::new(writer), waiting, next: AtomicU64::new(1), version, peer };
        this.execute(qmp_capabilities { enable: None })?;
        Ok(this)
    }

    /// QEMU's version as it says it: "7.2.22".
    pub(super) fn version(&self) -> &str {
        &self.version
    }

    /// Process and user at the other end; a proxy's if there is one in between.
    pub(super) fn peer(&self) -> Option<(u32, u32)> {
        self.peer
    }

    /// Executes a command that is soon done.
    pub(super) fn execute<C: Command>(&self, command: C) -> Result<Value, LiveError> {
        self.execute_within(command, SOON)
    }

    /// Executes one that may take longer.
    pub(super) fn execute_within<C: Command>(
        &self,
        command: C,
        patience: Duration,
    ) -> Result<Value, LiveError> {
        self.send(command)?.answer(patience)
    }

    /// Gives QEMU a descriptor under a name, which commands can take it by. Refused where the way to QEMU takes none.
    pub(super) fn pass_fd(&self, name: &str, fd: BorrowedFd<'_>) -> Result<(), LiveError> {
        if !lock(&self.writer).takes_fds() {
            let why = "a TCP connection passes no file descriptors".to_owned();
            return Err(LiveError::Refused { what: getfd::NAME.to_owned(), why });
        }
        let command = getfd { fdname: name.to_owned() };
        self.send_as(command, getfd::NAME.to_owned(), Some(fd))?.answer(SOON).map(drop)
    }

    /// What the human monitor says to `line`, with plain newlines; an error's text comes the same way.
    pub(super) fn human(&self, line: &str) -> Result<String, LiveError> {
        self.human_within(line, None, SOON)
    }

    /// The same for a line that may take long, or is about one vCPU.
    pub(super) fn human_within(
        &self,
        line: &str,
        cpu: Option<u32>,
        patience: Duration,
    ) -> Result<String, LiveError> {
        self.send_human(line, cpu)?.text(patience)
    }

    /// Sends a command, and waits for nothing. QEMU executes what is sent one after the other.
    pub(super) fn send<C: Command>(&self, command: C) -> Result<Asked<'_>, LiveError> {
        self.send_as(command, C::NAME.to_owned(), None)
    }

    /// Sends a line of the human monitor.
    pub(super) fn send_human(&self, line: &str, cpu: Option<u32>) -> Result<Asked<'_>, LiveError> {
        let command = human_monitor_command { cpu_index: cpu.map(i64::from), command_line: line.to_owned() };
        self.send_as(command, format!("monitor command '{}'", printable(line)), None)
    }

    fn send_as<C: Command>(
        &self,
        command: C,
        what: String,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<Asked<'_>, LiveError> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let mut line = serde_json::to_vec(&Execute::with_id(command, id))
            .map_err(|error| nonsense(&what, &error.to_string()))?;
        line.push(b'\n');
        let (sender, answer) = sync_channel(1);
        match &mut *lock(&self.waiting) {
            Waiting::For(waiting) => waiting.insert(id, sender),
            Waiting::Gone(why) => return Err(LiveError::Gone(why.clone())),
        };
        let sent = match fd {
            Some(fd) => lock(&self.writer).write_with_fd(&line, fd),
            None => lock(&self.writer).write_all(&line),
        };
        if let Err(error) = sent {
            // Half a command may be sent: nothing can follow it.
            lock(&self.writer).shutdown();
            end(&self.waiting, &format!("sending to it failed: {error}"));
        }
        Ok(Asked { qmp: self, id, what, answer })
    }
}

/// A command that was sent.
pub(super) struct Asked<'a> {
    qmp: &'a Qmp,
    id: u64,
    what: String,
    answer: Receiver<Answer>,
}

impl Asked<'_> {
    /// What QEMU returned, if it does within `patience`.
    pub(super) fn answer(self, patience: Duration) -> Result<Value, LiveError> {
        // A host that stood still lets the time be over before QEMU has run: it gets a little more.
        let late = |_| self.answer.recv_timeout(patience / GRACE);
        let answer = self.answer.recv_timeout(patience).or_else(late).ok();
        match (answer, &mut *lock(&self.qmp.waiting)) {
            (Some(Ok(value)), _) => Ok(value),
            (Some(Err(why)), _) => Err(LiveError::Refused { what: self.what, why: printable(&why) }),
            (None, Waiting::Gone(why)) => Err(LiveError::Gone(why.clone())),
            (None, Waiting::For(waiting)) => {
                waiting.remove(&self.id);
                Err(LiveError::Timeout { what: self.what, seconds: patience.as_secs() })
            }
        }
    }

    /// The same of a line of the human monitor, with plain newlines.
    pub(super) fn text(self, patience: Duration) -> Result<String, LiveError> {
        let what = self.what.clone();
        match self.answer(patience)? {
            Value::String(text) => Ok(text.replace("\r\n", "\n")),
            other => Err(nonsense(&what, &other.to_string())),
        }
    }
}

impl Drop for Qmp {
    fn drop(&mut self) {
        // Ends the thread that reads.
        lock(&self.writer).shutdown();
    }
}

/// An answer that makes no sense, cut to what fits a message.
pub(super) fn nonsense(what: &str, answer: &str) -> LiveError {
    const SHOWN: usize = 120;
    let answer: String = answer.chars().take(SHOWN).collect();
    LiveError::Nonsense { what: what.to_owned(), answer: format!("'{}'", printable(answer.trim())) }
}

/// The lock's content also after a panic elsewhere: each change here is whole before the lock is let go.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The version from QEMU's first line.
fn greeting(reader: &mut BufReader<Socket>, name: &str) -> Result<String, LiveError> {
    let gone = |why: String| LiveError::Gone(format!("{name}: {why}"));
    // A read's timeout is for one read: a line that comes a byte at a time is given up by the clock.
    let deadline = std::time::Instant::now() + GREETING;
    let mut line = Vec::new();
    while !line.ends_with(b"\n") {
        let left = deadline.saturating_duration_since(std::time::Instant::now());
        reader.get_ref().set_read_timeout(Some(left)).map_err(|error| gone(error.to_string()))?;
        let read = if left.is_zero() {
            Err(std::io::ErrorKind::TimedOut.into())
        } else {
            reader.fill_buf().map(|bytes| bytes.first().copied())
        };
        match read {
            Ok(Some(byte)) if line.len() < 4096 => line.push(byte),
            Ok(Some(_)) => return Err(nonsense(name, &String::from_utf8_lossy(&line))),
            Ok(None) => return Err(gone("it closed the connection".into())),
            Err(error) if timed_out(&error) => {
                return Err(LiveError::NotNow {
                    what: name.to_owned(),
                    why:
                        "QEMU does not greet; a QMP socket serves one client at a time: is another connected \
                          (libvirt, another kstub)? give QEMU one more -qmp socket"
                            .into(),
                });
            }
            Err(error) => return Err(gone(error.to_string())),
        }
        reader.consume(1);
    }
    let hello: Value = serde_json::from_slice(&line).unwrap_or_default();
    let version = hello.pointer("/QMP/version/qemu");
    let part = |name| version.and_then(|version| version.get(name)).and_then(Value::as_u64);
    match (part("major"), part("minor"), part("micro")) {
        (Some(major), Some(minor), Some(micro)) => Ok(format!("{major}.{minor}.{micro}")),
        _ => Err(nonsense(&format!("{name}: the greeting of QMP"), &String::from_utf8_lossy(&line))),
    }
}

fn read_until_the_end(mut reader: BufReader<Socket>, waiting: &Mutex<Waiting>, sink: &Sink) {
    let mut line = Vec::new();
    let why = loop {
        line.clear();
        match (&mut reader).take(LONGEST_LINE).read_until(b'\n', &mut line) {
            Ok(_) if line.ends_with(b"\n") => {}
            Ok(read) if read as u64 >= LONGEST_LINE => break "it sent a line without end".to_owned(),
            Ok(_) => break "it closed the connection (it quit, or was killed)".to_owned(),
            Err(error) => break error.to_string(),
        }
        match serde_json::from_slice::<Message>(&line) {
            Ok(Message { event: Some(name), data, .. }) => sink(&name, &data),
            Ok(message) => deliver(message, waiting),
            Err(error) => break format!("what it sent is no QMP: {error}"),
        }
    };
    reader.get_ref().shutdown();
    end(waiting, &why);
    sink("", &Value::Null);
}

/// Gives an answer to who asked; one that nobody waits for any more is dropped.
fn deliver(message: Message, waiting: &Mutex<Waiting>) {
    let id = message.id.as_ref().and_then(Value::as_u64);
    let answer = match (message.answer, message.error) {
        (Some(value), None) => Ok(value),
        (_, Some(refusal)) => Err(refusal.desc),
        (None, None) => Err("an answer without a value".into()),
    };
    if let Waiting::For(waiting) = &mut *lock(waiting)
        && let Some(sender) = id.and_then(|id| waiting.remove(&id))
    {
        // The asker may have given up at this moment.
        let _ = sender.try_send(answer);
    }
}

/// Says to all who wait, and who will ask, that QEMU is gone. The first reason stays.
fn end(waiting: &Mutex<Waiting>, why: &str) {
    let mut waiting = lock(waiting);
    if let Waiting::For(_) = *waiting {
        *waiting = Waiting::Gone(why.to_owned());
    }
}

#[cfg(test)]
pub(super) mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use super::*;
    use qapi::qmp::{query_status, stop};
    use std::os::unix::net::UnixStream;
    use std::time::Instant;

    const HELLO: &[u8] = b"{\"QMP\": {\"version\": {\"qemu\": {\"micro\": 22, \"minor\": 2, \"major\": 7}, \
        \"package\": \"\"}, \"capabilities\": [\"oob\", 7]}}\r\n";

    /// A QMP server that greets, answers `qmp_capabilities`, then does as the test says with each command.
    pub(in crate::backend::qemu) fn fake(
        mut rest: impl FnMut(&Value, &mut UnixStream) + Send + 'static,
    ) -> (Qmp, Arc<Mutex<Vec<String>>>) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        std::thread::spawn(move || {
            theirs.write_all(HELLO).unwrap();
            let lines = BufReader::new(theirs.try_clone().unwrap()).lines();
            for (number, line) in lines.map_while(Result::ok).enumerate() {
                let command: Value = serde_json::from_str(&line).unwrap();
                if number == 0 {
                    assert_eq!(command["execute"], "qmp_capabilities");
                    reply(&command, "{}", &mut theirs);
                } else {
                    rest(&command, &mut theirs);
                }
            }
        });
        let events = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&events);
        let sink: Sink = Box::new(move |name, _| lock(&seen).push(name.to_owned()));
        (Qmp::over(Socket::Unix(ours), "fake", sink).unwrap(), events)
    }

    pub(in crate::backend::qemu) fn reply(command: &Value, value: &str, to: &mut UnixStream) {
        let _ = write!(to, "{{\"return\": {value}, \"id\": {}}}\r\n", command["id"]);
    }

    #[test]
    fn answers_find_their_askers_and_events_come_first() {
        let (qmp, events) = fake(|command, to| {
            // An event of a later QEMU, an answer to nobody, then the real one in two pieces.
            let _ = to.write_all(b"{\"event\": \"NEWER\", \"data\": {\"a\": [1]}, \"timestamp\": {}}\n");
            let _ = to.write_all(
                b"{\"return\": 7, \"id\": 99999}\n{\"return\": 7}\n{\"return\": 7, \"id\": \"x\"}\n",
            );
            match command["execute"].as_str().unwrap() {
                "human-monitor-command" => {
                    let line = command["arguments"]["command-line"].as_str().unwrap();
                    let text =
                        format!("{{\"return\": \"{line}\\r\\nit is\\r\\n\", \"id\": {}}}\n", command["id"]);
                    let _ = to.write_all(&text.as_bytes()[..10]);
                    std::thread::sleep(Duration::from_millis(20));
                    let _ = to.write_all(&text.as_bytes()[10..]);
                }
                "stop" => {
                    let id = &command["id"];
                    let error = "{\"class\": \"NewClass\", \"desc\": \"not \\u001b[31m now\"}";
                    let _ = writeln!(to, "{{\"error\": {error}, \"id\": {id}}}");
                }
                _ => reply(command, "{\"status\": \"a-state-of-later\", \"running\": false}", to),
            }
        });
        assert_eq!(qmp.version(), "7.2.22");
        assert_eq!(qmp.human("info").unwrap(), "info\nit is\n");
        assert_eq!(lock(&events).len(), 1);
        assert_eq!(qmp.execute(query_status {}).unwrap()["status"], "a-state-of-later");
        let refused = qmp.execute(stop {}).unwrap_err().to_string();
        assert_eq!(refused, "stop: QEMU refuses: not \\u{1b}[31m now");
        let all = std::thread::scope(|scope| {
            let ask = |n: u32| qmp.human(&n.to_string()).unwrap();
            let threads: Vec<_> = (0..8).map(|n| scope.spawn(move || ask(n))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
        });
        assert!(all.iter().enumerate().all(|(n, text)| *text == format!("{n}\nit is\n")));
    }

    #[test]
    fn silence_ends_and_what_comes_late_is_nobodys() {
        let (qmp, _) = fake(|command, to| {
            if command["execute"] == "stop" {
                std::thread::sleep(Duration::from_millis(150));
            }
            reply(command, "{}", to);
        });
        let asked = Instant::now();
        let error = qmp.execute_within(stop {}, Duration::from_millis(50)).unwrap_err();
        assert!(matches!(error, LiveError::Timeout { .. }), "{error}");
        assert!(asked.elapsed() < SOON / 2);
        assert!(qmp.execute(query_status {}).is_ok());
    }

    #[test]
    fn whatever_else_comes_ends_the_connection_and_says_why() {
        for (bytes, why) in [
            (&b"\xff\xfe\0garbage\n"[..], "no QMP"),
            (b"[1,2]\n", "no QMP"),
            (b"{\"event\": 7}\n", "no QMP"),
            (b"{\"return\": 1, \"return\": 2, \"id\": 2}\n", "no QMP"),
            (b"", "closed"),
            (b"{\"return\": {}, \"id\": 2", "closed"),
        ] {
            let (qmp, events) = fake(move |_, to| {
                let _ = to.write_all(bytes);
                let _ = to.shutdown(std::net::Shutdown::Both);
            });
            let error = qmp.execute(query_status {}).unwrap_err();
            assert!(matches!(&error, LiveError::Gone(text) if text.contains(why)), "{error}");
            assert!(matches!(qmp.human("again"), Err(LiveError::Gone(_))));
            // Who waits hears of it first.
            let asked = Instant::now();
            while lock(&events).is_empty() && asked.elapsed() < Duration::from_secs(10) {
                std::thread::sleep(Duration::from_millis(1));
            }
            assert_eq!(*lock(&events), [""]);
        }
        let deep = [vec![b'['; 100_000], b"\n".to_vec()].concat();
        let (qmp, _) = fake(move |_, to| drop(to.write_all(&deep)));
        assert!(matches!(qmp.execute(query_status {}), Err(LiveError::Gone(_))));
    }

    #[test]
    fn a_line_without_end_is_given_up() {
        let (qmp, _) = fake(|_, to| {
            let chunk = vec![b'x'; 1 << 20];
            for _ in 0..=LONGEST_LINE >> 20 {
                let _ = to.write_all(&chunk);
            }
        });
        let error = qmp.execute(query_status {}).unwrap_err();
        assert!(matches!(&error, LiveError::Gone(text) if text.contains("without end")), "{error}");
    }

    #[test]
    fn greetings_that_are_none() {
        for (greeting, expected) in [
            (&b"SSH-2.0-OpenSSH_9.2\n"[..], "makes no sense"),
            (b"{\"QMP\": {}}\n", "makes no sense"),
            (b"{\"QMP\": {\"version\": {\"qemu\": {\"major\": \"7\"}}}}\n", "makes no sense"),
            (b"", "closed the connection"),
            (b"no line", "closed the connection"),
            (&[b'x'; 5000], "makes no sense"),
        ] {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            theirs.write_all(greeting).unwrap();
            theirs.shutdown(std::net::Shutdown::Write).unwrap();
            let error = Qmp::over(Socket::Unix(ours), "fake", Box::new(|_, _| {})).err().unwrap();
            assert!(error.to_string().contains(expected), "{error}");
        }
    }

    /// QEMU serves one client at a time: the next one's connection stands, and nothing is said on it.
    #[test]
    fn no_greeting_means_another_client() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let asked = Instant::now();
        let error = Qmp::over(Socket::Unix(ours), "fake", Box::new(|_, _| {})).err().unwrap();
        assert!(error.to_string().contains("another connected"), "{error}");
        assert!(asked.elapsed() < GREETING + Duration::from_secs(30));
        drop(theirs);
    }
}
