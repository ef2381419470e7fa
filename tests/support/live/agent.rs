//! The guest's serial line that takes commands.

use super::{Guest, PATIENCE};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// The serial line that takes commands, and what has arrived of an answer.
pub struct Agent {
    stream: BufReader<UnixStream>,
    part: String,
    lines: Vec<String>,
}

impl Agent {
    pub fn new(stream: UnixStream) -> Self {
        Self { stream: BufReader::new(stream), part: String::new(), lines: Vec::new() }
    }
}

impl Guest {
    /// Sends the guest a command (the head of `qemu/live/init.c` has them) and leaves the answer for [`Self::answer`].
    pub fn send(&self, command: &str) {
        if command == "reboot" {
            self.starts_again();
        }
        let agent = self.agent.lock().unwrap_or_else(|e| e.into_inner());
        agent.stream.get_ref().write_all(format!("{command}\n").as_bytes()).expect("agent");
    }

    /// The lines that answer the last command, or why it failed.
    pub fn answer(&self) -> Result<Vec<String>, String> {
        self.answer_within(PATIENCE)
            .unwrap_or_else(|| Err(format!("no answer; the guest is {}", self.run_state())))
    }

    /// The same, or nothing if no line comes for so long.
    pub fn answer_within(&self, patience: Duration) -> Option<Result<Vec<String>, String>> {
        let mut agent = self.agent.lock().unwrap_or_else(|e| e.into_inner());
        let Agent { stream, part, lines } = &mut *agent;
        stream.get_ref().set_read_timeout(Some(patience)).expect("timeout");
        loop {
            if stream.read_line(part).is_err() {
                return None;
            }
            let line = std::mem::take(part);
            match line.trim_end() {
                "" if line.is_empty() => return Some(Err("the serial line is closed".to_owned())),
                "ok" => return Some(Ok(std::mem::take(lines))),
                error if error.starts_with("error ") => {
                    let said = std::mem::take(lines).join("; ");
                    return Some(Err(format!("{error}; {said}")));
                }
                line => lines.push(line.to_owned()),
            }
        }
    }

    pub fn ask(&self, command: &str) -> Vec<String> {
        self.send(command);
        self.answer().unwrap_or_else(|why| panic!("{command}: {why}; {}", self.console()))
    }

    /// As [`Self::ask`] for an answer of `key=value` lines.
    pub fn ask_facts(&self, command: &str) -> BTreeMap<String, String> {
        let lines = self.ask(command);
        lines.iter().filter_map(|line| line.split_once('=')).map(|(k, v)| (k.into(), v.into())).collect()
    }

    /// The guest as it should be between two checks: running, with nothing planted, and all answers read.
    pub fn settle(&self) {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let token = format!("settle-{}", COUNT.fetch_add(1, Ordering::Relaxed));
        self.send(&format!("ping {token}"));
        // A breakpoint that somebody has left stops it again and again.
        let deadline = Instant::now() + PATIENCE;
        while self
            .answer_within(Duration::from_millis(500))
            .is_none_or(|answer| answer != Ok(vec![token.clone()]))
        {
            assert!(Instant::now() < deadline, "the guest does not go on: {}", self.run_state());
            if self.run_state() != "running" {
                self.cont();
            }
        }
        self.ask("quiet");
        self.events();
    }
}
