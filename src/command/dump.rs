//! `dump`: a dump of a running guest, written by QEMU and looked at once it is there.
//!
//! Source: QEMU `qapi/dump.json` (`dump-guest-memory`).

use super::args::Options;
use super::{Command, CommandError, Context, Output, printable};
use crate::backend::live::{DumpOrder, Dumped, RunState};
use crate::backend::{Backend, Dump};
use crate::bytes::ByteSize;
use crate::kernel::discover::{Found, discover};
use serde_json::json;
use std::fmt::Write;
use std::path::Path;

pub const COMMAND: Command = Command {
    name: "dump",
    arguments: "FILE [--format FORMAT] [--paging] [--force]",
    summary: "write a dump of the guest, which kstub opens later (live guests)",
    help: "QEMU stops the guest while it writes, and lets it run again if it ran; how long it stood is told. FILE is there \
           once the dump is complete, for its owner only. Then kstub looks whether it finds the kernel in it.\n\n\
           --format FORMAT  elf (the default: as large as RAM), kdump-zlib, kdump-lzo or kdump-snappy; what QEMU offers \
           depends on how it was built\n\
           --paging         an ELF file of what the CPUs' page tables map, by virtual addresses; QEMU takes much memory \
           to make it, and kstub does not need it\n\
           --force          replace FILE if it exists\n\n\
           Breakpoints of kstub's and gdb's are not in the dump: QEMU's TCG puts none into memory, and what KVM puts there \
           is taken out meanwhile. A guest under KVM that was let run is dumped with them, which is told.\n\n\
           In gdb this is 'monitor dump', or 'kstub dump'; its own 'dump' writes memory that it reads.\n\n\
           Examples:\n  dump vmcore\n  dump /var/tmp/vmcore --format kdump-zlib\n",
    run,
};

fn run(context: &Context<'_>, arguments: &[&str]) -> Result<Output, CommandError> {
    let Some(live) = context.machine.backend().live() else {
        return Err(CommandError("this is a crash dump already: there is no guest to dump".into()));
    };
    let options = Options::read("dump", &["-format:", "-paging", "-force"], true, arguments)?;
    let [file] = options.rest.as_slice() else {
        return Err(CommandError(
            "'dump' takes the name of one file, without blanks; try 'help dump'".into(),
        ));
    };
    let path = std::path::absolute(file)
        .map_err(|error| CommandError(format!("'{}' is no file's name: {error}", printable(file))))?;
    let format = options.value("-format").unwrap_or("elf");
    let (paging, replace) = (options.has("-paging"), options.has("-force"));
    let order = DumpOrder { path: &path, format, paging, replace };
    let progress = |done, of| {
        if let Some(progress) = &context.focus.progress {
            progress(done, of);
        }
    };
    let dumped = live.dump(&order, &progress).map_err(|error| CommandError(error.to_string()))?;
    let expected = context.machine.kernel().map(|kernel| kernel.found());
    Ok(account(&order, &dumped, &Look::at(&path, expected)))
}

/// What is seen in the file.
struct Look {
    /// What it calls its format.
    format: Option<String>,
    /// How many CPUs' registers are in it.
    cpus: usize,
    found: Option<Found>,
    problems: Vec<String>,
}

impl Look {
    /// Opens the dump as any other; `expected` is the kernel that should be in it.
    fn at(path: &Path, expected: Option<&Found>) -> Self {
        let dump = match Dump::open(path) {
            Ok(dump) => dump,
            Err(error) => {
                return Self { format: None, cpus: 0, found: None, problems: vec![error.to_string()] };
            }
        };
        let format = dump.facts().into_iter().find(|fact| fact.name == "format").map(|fact| fact.value);
        let mut problems = dump.problems();
        let found = discover(&dump, &|_, _| ())
            .map_err(|error| expected.is_some().then(|| problems.push(error.to_string())))
            .ok();
        if let (Some(expected), Some(found)) = (expected, &found)
            && (expected.release != found.release || expected.text != found.text)
        {
            let kernel = |found: &Found| format!("{} at {}", printable(&found.release), found.text);
            problems.push(format!(
                "the guest has the kernel {}, the dump {}",
                kernel(expected),
                kernel(found)
            ));
        }
        Self { format, cpus: dump.saved_cpus().len(), found, problems }
    }
}

/// What is told of a dump.
fn account(order: &DumpOrder<'_>, dumped: &Dumped, look: &Look) -> Output {
    let path = order.path.display().to_string();
    let next = format!("kstub gdb {}", quoted(order.path));
    let mut text = format!(
        "{}: {}, {}, registers of {} CPU{}\n",
        printable(&path),
        ByteSize(dumped.bytes),
        printable(look.format.as_deref().unwrap_or("which cannot be opened")),
        look.cpus,
        if look.cpus == 1 { "" } else { "s" },
    );
    let state = match dumped.state {
        RunState::Running => "running",
        RunState::Stopped(why) => why,
    };
    let stood = dumped.stood.map_or("a while".to_owned(), |stood| format!("{:.2} s", stood.as_secs_f64()));
    let _ = match (dumped.ran, dumped.state) {
        (true, RunState::Running) => writeln!(text, "the guest stood for {stood} and runs again"),
        (true, RunState::Stopped(_)) => writeln!(text, "the guest does not run again: it is '{state}'"),
        (false, RunState::Running) => writeln!(text, "the guest was let run by others meanwhile"),
        (false, RunState::Stopped(_)) => writeln!(text, "the guest stood before, and still does ('{state}')"),
    };
    if dumped.breakpoints > 0 {
        let _ = writeln!(text, "{} breakpoints stand in it as instructions (int3)", dumped.breakpoints);
    }
    let _ = match &look.found {
        Some(found) => writeln!(text, "kernel {} found by {}", printable(&found.release), found.by),
        None => writeln!(text, "no kernel was found in it"),
    };
    for problem in &look.problems {
        let _ = writeln!(text, "problem: {}", printable(problem));
    }
    let _ = writeln!(text, "next: {}", printable(&next));
    let json = json!({
        "path": path,
        "bytes": dumped.bytes,
        "format": order.format,
        "paging": order.paging,
        "cpus": look.cpus,
        "guest": {
            "ran": dumped.ran,
            "state": state,
            "stood_ms": dumped.stood.map(|stood| stood.as_secs_f64() * 1e3),
        },
        "breakpoints": dumped.breakpoints,
        "kernel": look.found.as_ref().map(|found| json!({
            "release": found.release,
            "build_id": found.build_id,
            "found_by": found.by.to_string(),
            "text": found.text.to_string(),
        })),
        "problems": look.problems,
        "next": next,
    });
    Output { text, json }
}

/// A path as a shell wants it.
fn quoted(path: &Path) -> String {
    let text = path.display().to_string();
    let plain = |c: char| c.is_alphanumeric() || "/._-+,:@%".contains(c);
    if text.chars().all(plain) { text } else { format!("'{}'", text.replace('\'', r"'\''")) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;
    use std::time::Duration;

    #[test]
    fn what_became_of_the_guest() {
        let path = PathBuf::from("/tmp/it's");
        let order = DumpOrder { path: &path, format: "elf", paging: false, replace: false };
        let say = |ran, state| {
            let stood = Some(Duration::from_millis(1234));
            let dumped = Dumped { bytes: 3 << 20, ran, stood, state, breakpoints: 0 };
            let look = Look { format: Some("ELF".into()), cpus: 1, found: None, problems: vec!["x".into()] };
            account(&order, &dumped, &look).text
        };
        let runs = say(true, RunState::Running);
        assert!(runs.contains("3.0 MiB, ELF, registers of 1 CPU\n") && runs.contains("for 1.23 s"), "{runs}");
        assert!(runs.ends_with("problem: x\nnext: kstub gdb '/tmp/it'\\''s'\n"), "{runs}");
        assert!(say(true, RunState::Stopped("paused")).contains("does not run again: it is 'paused'"));
        assert!(say(false, RunState::Stopped("debug")).contains("still does ('debug')"));
        assert!(say(false, RunState::Running).contains("by others"));
    }
}
