//! Processes that a test starts, waits for, and kills.

use std::io::Read;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// Polls until `done`, or until the time is over: then false.
pub fn wait_until(patience: Duration, mut done: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + patience;
    loop {
        if done() {
            return true;
        }
        if Instant::now() > deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Sends a signal by its name.
pub fn kill(pid: u32, signal: &str) {
    let _ =
        Command::new("kill").arg(format!("-{signal}")).arg(pid.to_string()).stderr(Stdio::null()).status();
}

/// Whether there is such a process, and it is no zombie.
pub fn is_running(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with('Z')))
}

/// The child processes of `pid` with this name (its first 15 characters).
pub fn children(pid: u32, name: &str) -> Vec<u32> {
    let list = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    let mut found: Vec<u32> = list.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    // kstub's children are of whatever thread started them.
    for entry in std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
        let list = std::fs::read_to_string(entry.path().join("children")).unwrap_or_default();
        found.extend(list.split_whitespace().filter_map(|word| word.parse::<u32>().ok()));
    }
    found.sort_unstable();
    found.dedup();
    found.retain(|pid| {
        std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.trim_end() == name)
    });
    found
}

/// How a program ended, and what it said.
#[derive(Debug)]
pub struct Ended {
    /// `None` if it did not end in time, and was killed.
    pub status: Option<ExitStatus>,
    pub out: String,
    pub err: String,
    pub took: Duration,
}

impl Ended {
    pub fn succeeded(&self) -> bool {
        self.status.is_some_and(|status| status.success())
    }

    /// What it printed, if it succeeded.
    #[track_caller]
    pub fn expect(self, what: &str) -> String {
        assert!(self.succeeded(), "{what}: {:?}: {} {}", self.status, self.out, self.err);
        self.out
    }
}

/// Runs a program to its end.
pub fn finish(command: &mut Command) -> Ended {
    finish_within(command, Duration::from_secs(120))
}

/// Runs a program to its end, or for so long.
pub fn finish_within(command: &mut Command, patience: Duration) -> Ended {
    let start = Instant::now();
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let (out, err) = (collect(child.stdout.take()), collect(child.stderr.take()));
    let mut status = None;
    wait_until(patience, || {
        status = child.try_wait().expect("wait");
        status.is_some()
    });
    let took = start.elapsed();
    if status.is_none() {
        end(&mut child);
    }
    let text = |thread: std::thread::JoinHandle<Vec<u8>>| {
        String::from_utf8_lossy(&thread.join().unwrap_or_default()).into_owned()
    };
    Ended { status, out: text(out), err: text(err), took }
}

/// Kills a program and the gdb it may have started, which holds its pipes open.
pub fn end(child: &mut Child) {
    for gdb in children(child.id(), "gdb") {
        kill(gdb, "KILL");
    }
    let _ = child.kill();
    let _ = child.wait();
}

fn collect(pipe: Option<impl Read + Send + 'static>) -> std::thread::JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            let _ = pipe.read_to_end(&mut bytes);
        }
        bytes
    })
}
