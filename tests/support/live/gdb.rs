//! Stock gdb on a live guest: one batch of commands, or a session that is typed at and interrupted.

use super::watch::{children, end, kill, wait_until};
use super::{Ended, Guest, PATIENCE, finish};
use std::io::{Read, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

const MARK: &str = "@@@";

/// What `kstub gdb … -- -batch` printed for each command, and how it ended.
pub struct Session {
    pub answers: Vec<String>,
    pub ended: Ended,
}

impl Session {
    /// Runs gdb on the guest with `options` for kstub.
    pub fn run(guest: &Guest, options: &[&str], commands: &[&str]) -> Self {
        let mut kstub = guest.kstub("gdb");
        kstub.args(options).args(["--", "-nx", "-batch"]);
        for command in commands {
            kstub.args(["-ex", &format!("echo \\n{MARK}\\n"), "-ex", command]);
        }
        kstub.args(["-ex", &format!("echo \\n{MARK}\\n")]);
        let ended = finish(&mut kstub);
        let mark = format!("{MARK}\n");
        let parts = ended.out.split(&mark).skip(1).take(commands.len());
        let answers: Vec<String> = parts.map(|part| part.trim().to_owned()).collect();
        assert!(ended.status.is_some(), "gdb hangs: {} {}", ended.out, ended.err);
        assert_eq!(answers.len(), commands.len(), "{} {}", ended.out, ended.err);
        Self { answers, ended }
    }
}

/// An interactive gdb.
pub struct Gdb {
    child: Child,
    stdin: ChildStdin,
    output: Arc<Mutex<String>>,
    /// How much of the output was returned.
    seen: usize,
    /// Number of the last mark, one digit.
    marks: u8,
}

impl Gdb {
    /// Starts `kstub gdb` and waits for gdb's first prompt.
    pub fn start(guest: &Guest, options: &[&str]) -> Self {
        let mut kstub = guest.kstub("gdb");
        kstub.args(options).args(["--", "-nx", "-q", "-ex", "set confirm off", "-ex", "set pagination off"]);
        Self::spawn(&mut kstub)
    }

    /// Starts a program that is, or ends up in, gdb.
    pub fn spawn(command: &mut Command) -> Self {
        // One pipe: what gdb prints on both must come in order.
        let (reader, writer) = std::io::pipe().expect("pipe");
        command.stdin(Stdio::piped()).stdout(writer.try_clone().expect("pipe")).stderr(writer);
        let mut child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let output = Arc::default();
        pump(reader, Arc::clone(&output));
        let stdin = child.stdin.take().expect("stdin");
        let mut gdb = Self { child, stdin, output, seen: 0, marks: 0 };
        gdb.ask("set height 0");
        assert!(!gdb.everything().contains("Remote connection closed"), "{}", gdb.everything());
        gdb
    }

    /// Process id of kstub.
    pub fn kstub_pid(&self) -> u32 {
        self.child.id()
    }

    /// Process id of the gdb below kstub, or of the program itself if it is gdb.
    pub fn gdb_pid(&self) -> u32 {
        children(self.child.id(), "gdb").first().copied().unwrap_or_else(|| self.child.id())
    }

    /// Types a command and does not wait.
    pub fn send(&mut self, command: &str) {
        writeln!(self.stdin, "{command}").expect("gdb is gone");
    }

    /// Types a command and returns what came until gdb has done it.
    pub fn ask(&mut self, command: &str) -> String {
        self.send(command);
        self.wait().unwrap_or_else(|all| panic!("gdb does not come back from {command}: {all}"))
    }

    /// What was printed from the last answer to the end of the command that runs; everything if it does not end.
    pub fn wait(&mut self) -> Result<String, String> {
        self.wait_for(PATIENCE * 4)
    }

    pub fn wait_for(&mut self, patience: Duration) -> Result<String, String> {
        self.marks = (self.marks + 1) % 10;
        // Not typed as it is printed: a terminal's echo would be taken for it.
        let mark = format!("{MARK}{}{MARK}", self.marks);
        let typed = format!("echo {MARK}\\{:o}{MARK}\\n", b'0' + self.marks);
        if writeln!(self.stdin, "{typed}").is_err() {
            return Err(self.everything());
        }
        let mut found = None;
        let came = wait_until(patience, || {
            let output = self.output.lock().unwrap_or_else(|e| e.into_inner());
            found = output[self.seen..].find(&mark).map(|at| at + self.seen);
            found.is_some() || !super::watch::is_running(self.child.id())
        });
        let Some(at) = found.filter(|_| came) else { return Err(self.everything()) };
        let output = self.output.lock().unwrap_or_else(|e| e.into_inner());
        let answer = output[self.seen..at].replace("(gdb) ", "").trim().to_owned();
        self.seen = at + mark.len();
        Ok(answer)
    }

    /// Waits until gdb has printed this since the last answer.
    pub fn wait_text(&self, text: &str) -> bool {
        wait_until(PATIENCE, || {
            self.output.lock().unwrap_or_else(|e| e.into_inner())[self.seen..].contains(text)
        })
    }

    pub fn everything(&self) -> String {
        self.output.lock().unwrap_or_else(|e| e.into_inner()).clone()
    }

    /// Ctrl-C.
    pub fn interrupt(&self) {
        kill(self.gdb_pid(), "INT");
    }

    /// Lets go of the guest as a user does, and waits for the end.
    pub fn quit(mut self) {
        let _ = writeln!(self.stdin, "quit");
        let child = &mut self.child;
        let ended = wait_until(PATIENCE, || child.try_wait().is_ok_and(|status| status.is_some()));
        assert!(ended, "gdb does not quit: {}", self.everything());
    }

    /// Waits for kstub's end, which something else has brought about.
    pub fn wait_end(&mut self) -> bool {
        let child = &mut self.child;
        wait_until(PATIENCE, || child.try_wait().is_ok_and(|status| status.is_some()))
    }
}

impl Drop for Gdb {
    /// A check that failed must not spoil the next: gdb is ended first, so that kstub lets go of the guest.
    fn drop(&mut self) {
        if !matches!(self.child.try_wait(), Ok(None)) {
            return;
        }
        kill(self.gdb_pid(), "KILL");
        let child = &mut self.child;
        wait_until(PATIENCE / 3, || child.try_wait().is_ok_and(|status| status.is_some()));
        end(&mut self.child);
    }
}

fn pump(mut pipe: impl Read + Send + 'static, output: Arc<Mutex<String>>) {
    std::thread::spawn(move || {
        let mut chunk = [0; 4096];
        while let Ok(n @ 1..) = pipe.read(&mut chunk) {
            output.lock().unwrap_or_else(|e| e.into_inner()).push_str(&String::from_utf8_lossy(&chunk[..n]));
        }
    });
}
