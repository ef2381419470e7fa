//! Stock gdb, started by `kstub gdb`, and what it prints taken apart.

use std::path::Path;
use std::process::{Command, Output};

// Programs outside the package, which write seeds for fuzzing, include this and have none.
pub const KSTUB: &str = match option_env!("CARGO_BIN_EXE_kstub") {
    Some(path) => path,
    None => "kstub",
};

/// kstub without what the user's environment would add.
fn command() -> Command {
    let mut command = Command::new(KSTUB);
    command.env_remove("DEBUGINFOD_URLS");
    command
}

pub fn kstub(arguments: &[&str]) -> Output {
    command().args(arguments).output().unwrap()
}

/// What gdb printed for each of `commands`, and last what it complained of.
pub fn gdb_session(dump: &Path, commands: &[&str]) -> (Vec<String>, String) {
    session(&mut command(), dump, commands)
}

/// As [`gdb_session`], by a kstub prepared by the caller.
pub fn session(kstub: &mut Command, dump: &Path, commands: &[&str]) -> (Vec<String>, String) {
    const MARK: &str = "echo \\n@@@\\n";
    let mut arguments = vec!["gdb", dump.to_str().unwrap(), "--", "-nx", "-batch"];
    for command in commands {
        arguments.extend(["-ex", MARK, "-ex", command]);
    }
    arguments.extend(["-ex", MARK]);
    let output = kstub.args(arguments).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    let parts: Vec<String> =
        printed.split("@@@\n").skip(1).take(commands.len()).map(|part| part.trim().to_owned()).collect();
    assert_eq!(parts.len(), commands.len(), "{}: {printed}\n{said}", dump.display());
    (parts, said)
}

/// What gdb printed for each of `commands`.
pub fn gdb(dump: &Path, commands: &[&str]) -> Vec<String> {
    gdb_session(dump, commands).0
}

/// What gdb says on standard error to `command`; after it the session goes on.
pub fn gdb_complains(dump: &Path, command: &str) -> String {
    let (printed, said) = gdb_session(dump, &[command, "p/x $pc"]);
    assert!(printed[1].contains("= 0x"), "the session is lost after {command}: {printed:?} {said}");
    said
}

/// Functions of the console's own call trace, from `panic` outward; the doubtful ones (`?`) left out.
pub fn console_trace(console: &str) -> Vec<String> {
    let panic = console.find("Kernel panic - not syncing").unwrap();
    let lines = console[panic..].lines().skip_while(|line| !line.contains("Call Trace:")).skip(1);
    let texts = lines.map(|line| line.split_once("] ").map_or(line, |(_, text)| text).trim());
    texts
        .take_while(|text| !text.starts_with("RIP:") && !text.contains("</TASK>"))
        .filter(|text| text.contains("+0x") && !text.starts_with('?'))
        .map(|text| text.split(['+', '.']).next().unwrap().to_owned())
        .skip_while(|function| function != "panic")
        .collect()
}

/// Whether `frames` has all of `expected` in this order, others between them allowed (inlined ones).
pub fn has_in_order(frames: &[String], expected: &[String]) -> bool {
    let mut frames = frames.iter();
    expected.iter().all(|want| frames.any(|frame| frame == want))
}

/// The function names of gdb's `bt`.
pub fn functions(bt: &str) -> Vec<String> {
    let frames = bt.lines().filter(|line| line.starts_with('#'));
    frames
        .filter_map(|line| {
            let rest = line.split_once(' ').unwrap().1.trim_start();
            let rest =
                rest.split_once(" in ").filter(|(at, _)| at.starts_with("0x")).map_or(rest, |(_, rest)| rest);
            rest.split(['.', ' ']).next().map(str::to_owned)
        })
        .collect()
}
