//! A dump of the guest that QEMU writes, into a file of ours where that can be.
//!
//! Knows QEMU's formats by name only. The file is opened here and its descriptor goes to QEMU through the monitor's
//! socket, so that neither QEMU's rights nor its view of the filesystem matter; where none can be passed (TCP), QEMU
//! opens the file itself. Source: QEMU `qapi/dump.json`, `dump/dump.c`, `qapi/misc.json` (`getfd`).

use super::events::Events;
use super::new_file::NewFile;
use super::qmp::{Qmp, nonsense};
use crate::backend::live::{DumpOrder, LiveError};
use crate::bytes::{ByteSize, printable};
use qapi::qmp::{
    DumpGuestMemoryFormat, closefd, dump_guest_memory, query_dump, query_dump_guest_memory_capability,
};
use serde_json::Value;
use std::os::fd::AsFd;
use std::time::Duration;

/// The monitor's name for our descriptor.
const FD_NAME: &str = "kstub-dump";
/// How long QEMU may take to begin: with `paging` it walks all page tables first.
const BEGINNING: Duration = Duration::from_secs(300);
/// How often it is asked how far it is.
const LOOK: Duration = Duration::from_millis(200);
/// Less room than this is none.
const FULL: u64 = 1 << 20;

/// The formats that QEMU offers, in its order; without those that are not Linux's.
pub(super) fn formats(qmp: &Qmp) -> Result<Vec<String>, LiveError> {
    let answer = qmp.execute(query_dump_guest_memory_capability {})?;
    let formats = answer.get("formats").and_then(Value::as_array);
    let formats =
        formats.ok_or_else(|| nonsense("query-dump-guest-memory-capability", &answer.to_string()))?;
    let known = formats.iter().filter_map(Value::as_str).filter(|name| format(name).is_some());
    Ok(known.map(str::to_owned).collect())
}

fn format(name: &str) -> Option<DumpGuestMemoryFormat> {
    name.parse().ok().filter(|format| *format != DumpGuestMemoryFormat::win_dmp)
}

/// Has QEMU write a dump as ordered, of which `least` bytes are known to be needed, and returns its size once it is
/// complete and has its name. `progress` gets bytes done and bytes to do. The caller sees to the guest.
pub(super) fn write(
    qmp: &Qmp,
    events: &Events,
    order: &DumpOrder<'_>,
    least: u64,
    progress: &dyn Fn(u64, u64),
) -> Result<u64, LiveError> {
    let what = format!("writing the dump '{}'", printable(&order.path.display().to_string()));
    let not_now = |why: String| LiveError::NotNow { what: what.clone(), why };
    let format = offered(&formats(qmp)?, order).map_err(not_now)?;
    let create = |named| {
        let file = NewFile::create(order.path, order.replace, named);
        file.map_err(|error| not_now(error.to_string()))
    };
    let mut file = create(false)?;
    if let Some(room) = file.room().filter(|&room| room < least) {
        let (room, least) = (ByteSize(room), ByteSize(least));
        return Err(not_now(format!("it takes {least}, and there is room for {room}; {ROOM}")));
    }
    let passed = match qmp.pass_fd(FD_NAME, file.as_fd()) {
        Ok(()) => true,
        Err(LiveError::Refused { why, .. }) => {
            tracing::info!("QEMU opens the dump itself: {why}");
            file = create(true)?;
            false
        }
        Err(error) => return Err(error),
    };
    let protocol = match file.name_now().filter(|_| !passed) {
        Some(path) => {
            format!("file:{}", path.to_str().ok_or_else(|| not_now("its name is no UTF-8".into()))?)
        }
        None => format!("fd:{FD_NAME}"),
    };
    events.forget_dump();
    let (detach, format, paging) = (Some(true), Some(format), order.paging);
    let command = dump_guest_memory { begin: None, length: None, detach, format, paging, protocol };
    let written = qmp.execute_within(command, BEGINNING).and_then(|_| wait(qmp, events, progress));
    if let Err(error) = written {
        if passed {
            // Gone already if QEMU has begun.
            let _ = qmp.execute(closefd { fdname: FD_NAME.to_owned() });
        }
        return Err(match error {
            LiveError::Refused { why, .. } => {
                let full = file.room().is_some_and(|room| room < FULL);
                let cure =
                    if full { format!("; the filesystem is full: {ROOM}") } else { own_rights(passed) };
                LiveError::Refused { what, why: why + &cure }
            }
            other => other,
        });
    }
    let len = file.len().map_err(|error| not_now(error.to_string()))?;
    if len == 0 {
        let named = file.name_now().unwrap_or(file.path()).display();
        return Err(not_now(format!(
            "QEMU says that it is written, and here it is empty: QEMU sees other files (another machine, a \
             container) and has it as '{named}'; connect by its unix QMP socket"
        )));
    }
    file.publish().map_err(|error| not_now(error.to_string()))?;
    Ok(len)
}

/// What helps against a full filesystem.
const ROOM: &str = "make room, name another place, or take a smaller format (--format kdump-zlib)";

/// What helps where QEMU opens the file itself.
fn own_rights(passed: bool) -> String {
    let cure = "; QEMU opens the file itself: it must be allowed to, or kstub connect by a unix QMP socket";
    if passed { String::new() } else { cure.to_owned() }
}

/// The format that is ordered, if it is one of `formats`; else why not.
fn offered(formats: &[String], order: &DumpOrder<'_>) -> Result<DumpGuestMemoryFormat, String> {
    let format = format(order.format).filter(|_| formats.iter().any(|name| name == order.format));
    let Some(format) = format else {
        let (name, formats) = (printable(order.format), printable(&formats.join(", ")));
        return Err(format!("this QEMU has no format '{name}'; it has: {formats}"));
    };
    if order.paging && format != DumpGuestMemoryFormat::elf {
        return Err("--paging is for the format elf only".to_owned());
    }
    Ok(format)
}

/// Waits for the end of a dump.
fn wait(qmp: &Qmp, events: &Events, progress: &dyn Fn(u64, u64)) -> Result<(), LiveError> {
    const WHAT: &str = "dump-guest-memory";
    let refused = |why: String| LiveError::Refused { what: WHAT.to_owned(), why };
    loop {
        if let Some(end) = events.dump_ended(LOOK) {
            return end.map_err(refused);
        }
        let answer = qmp.execute(query_dump {})?;
        let number = |name| answer.get(name).and_then(Value::as_u64).unwrap_or(0);
        match answer.get("status").and_then(Value::as_str) {
            Some("active") => progress(number("completed"), number("total")),
            // The event tells why, and comes about now.
            Some("completed" | "failed") => {
                let end = events.dump_ended(super::qmp::SOON);
                return end.unwrap_or_else(|| Err("it ended without a word".to_owned())).map_err(refused);
            }
            _ => return Err(nonsense("query-dump", &answer.to_string())),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::qmp::lock;
    use super::super::qmp::tests::{fake, reply};
    use super::*;
    use std::io::Write;
    use std::sync::{Arc, Mutex};

    const FORMATS: &str = "{\"formats\": [\"elf\", \"win-dmp\", \"a-later-one\", \"kdump-zlib\"]}";

    /// What QEMU was asked, in order, and how a dump went with it; `refused` is what it refuses, with its words.
    fn told(order: &DumpOrder<'_>, refused: &'static str) -> (Vec<String>, Result<u64, LiveError>) {
        let told = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&told);
        let (qmp, _) = fake(move |command, to| {
            let name = command["execute"].as_str().unwrap().to_owned();
            lock(&seen).push(name.clone());
            match name.as_str() {
                name if name == refused => {
                    let id = &command["id"];
                    let _ =
                        writeln!(to, "{{\"error\": {{\"class\": \"x\", \"desc\": \"no\"}}, \"id\": {id}}}");
                }
                "query-dump-guest-memory-capability" => reply(command, FORMATS, to),
                "query-dump" => reply(command, "{\"status\": \"none\"}", to),
                _ => reply(command, "{}", to),
            }
        });
        let outcome = write(&qmp, &Events::default(), order, 0, &|_, _| ());
        drop(qmp);
        (lock(&told).clone(), outcome)
    }

    #[test]
    fn what_was_given_to_qemu_is_taken_back() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vmcore");
        let order = DumpOrder { path: &path, format: "elf", paging: true, replace: false };
        let (told, outcome) = told(&order, "dump-guest-memory");
        let wanted = ["query-dump-guest-memory-capability", "getfd", "dump-guest-memory", "closefd"];
        assert_eq!(told, wanted);
        let said = outcome.unwrap_err().to_string();
        assert!(said.starts_with("writing the dump '") && said.ends_with("': QEMU refuses: no"), "{said}");
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_qemu_that_takes_no_descriptor_opens_the_file_itself() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vmcore");
        let order = DumpOrder { path: &path, format: "kdump-zlib", paging: false, replace: false };
        let (told, outcome) = told(&order, "getfd");
        assert_eq!(told.get(1..3).unwrap(), ["getfd", "dump-guest-memory"]);
        // A dump that is none, once it should have begun.
        assert!(matches!(outcome, Err(LiveError::Nonsense { .. })), "{outcome:?}");
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[test]
    fn formats_that_cannot_be_had() {
        let path = std::path::PathBuf::from("/nowhere/at/all");
        for (format, paging, words) in [
            ("win-dmp", false, "it has: elf, kdump-zlib"),
            ("kdump-lzo", false, "it has: elf, kdump-zlib"),
            ("kdump-zlib", true, "--paging is for the format elf only"),
        ] {
            let (told, outcome) = told(&DumpOrder { path: &path, format, paging, replace: false }, "");
            assert_eq!(told.len(), 1);
            assert!(outcome.unwrap_err().to_string().contains(words), "{format}");
        }
    }
}
