//! A guest's RAM, read from beside QEMU: by file where it is shared, else from QEMU's own memory, else by the monitor.
//!
//! Everything is a `pread`, of the RAM's file or of `/proc/PID/mem`, or for large parts of a process's memory
//! `process_vm_readv`, which copies them once where a `pread` copies them twice, page by page: a truncated file is a
//! short read, where a mapping of it would end this process by SIGBUS (as it ends QEMU), and no slice ever lies over
//! memory that changes.
//! A read of eight bytes costs one system call, which a page cache over a guest that stands still makes up for.
//! Whether the bytes are the guest's is not believed but compared with what the monitor shows.
//! Source: `proc_pid_mem(5)`, `proc_pid_fd(5)`; QEMU `qapi/qom.json` (`MemoryBackendFileProperties`),
//! `hmp-commands.hx` (`gpa2hva`, `xp`).

use super::mtree::{Region, regions};
use super::process::{Opened, Process};
use super::qmp::{Qmp, nonsense};
use crate::addr::{PAGE_SIZE, PhysAddr, PhysRange, join_ranges};
use crate::backend::live::LiveError;
use crate::bytes::{printable, u64_at};
use crate::memory::{ReadOutcome, Unreadable};
use qapi::qmp::{qom_get, query_memdev};
use serde_json::Value;
use std::collections::HashMap;
use std::fs::File;
use std::sync::Arc;

/// How many places of a region are looked at for bytes to compare, and how many are compared.
const LOOKED_AT: u64 = 64;
const COMPARED: u32 = 3;
/// How often a place of a guest that runs is compared before it counts as different.
const TRIES: u32 = 5;
/// A process whose memory differs from the guest's in this much of RAM is not QEMU. Less may be what firmware has just moved.
const TELLING: u64 = 1 << 20;
/// How many parts the address space may have: a machine has some ten, and each costs questions.
const MOST_REGIONS: usize = 4096;
/// How much the monitor is asked for at once.
const MONITOR_READ: usize = 8 << 10;

/// Where the guest's RAM can be read.
pub(super) struct Memory {
    pieces: Vec<Piece>,
    ranges: Vec<PhysRange>,
    monitor: Arc<Qmp>,
    problems: Vec<String>,
}

/// RAM or ROM that lies in one piece in one place.
struct Piece {
    range: PhysRange,
    rom: bool,
    source: Source,
}

#[derive(Clone)]
enum Source {
    /// At this offset of a file, which is of RAM or of a process.
    File(Arc<Opened>, u64),
    /// Nowhere but through QEMU's human monitor.
    Monitor,
}

impl Memory {
    /// Finds the guest's RAM by QEMU's memory map (`info mtree -f`) and the best way to each part of it.
    pub(super) fn open(monitor: &Arc<Qmp>, mtree: &str) -> Result<Self, LiveError> {
        const WHAT: &str = "monitor command 'info mtree -f'";
        let regions = regions(mtree).ok_or_else(|| nonsense(WHAT, mtree))?;
        let mut finder = Finder::new(monitor)?;
        if let Some(more @ 1..) = regions.len().checked_sub(MOST_REGIONS) {
            finder.problems.push(format!(
                "QEMU's memory map has {} parts: the last {more}, from {:#x} on, are not read (a machine with so many is \
                 no x86-64 that kstub knows)",
                regions.len(),
                regions.get(MOST_REGIONS).map_or(PhysAddr(0), |region| region.range.start),
            ));
        }
        let mut pieces = Vec::new();
        for region in regions.into_iter().take(MOST_REGIONS) {
            let source = finder.source(&region)?;
            pieces.push(Piece { range: region.range, rom: region.rom, source });
        }
        let ranges = join_ranges(pieces.iter().map(|piece| piece.range).collect());
        if ranges.is_empty() {
            return Err(nonsense(WHAT, "no RAM"));
        }
        Ok(Self { pieces, ranges, monitor: Arc::clone(monitor), problems: finder.problems })
    }

    /// RAM and ROM, joined.
    pub(super) fn ranges(&self) -> &[PhysRange] {
        &self.ranges
    }

    /// Whether `at` is RAM or ROM.
    pub(super) fn contains(&self, at: PhysAddr) -> bool {
        self.piece(at).is_some()
    }

    /// Whether all of `range` is RAM that a write changes.
    pub(super) fn is_writable(&self, range: PhysRange) -> bool {
        let mut at = range.start;
        while at < range.end {
            match self.piece(at) {
                Some(piece) if !piece.rom => at = piece.range.end,
                _ => return false,
            }
        }
        true
    }

    /// What cannot be read well, and the cure.
    pub(super) fn problems(&self) -> &[String] {
        &self.problems
    }

    /// The ways by which the RAM is read, each with how much of it.
    pub(super) fn ways(&self) -> Vec<(String, u64)> {
        let mut ways: Vec<(String, u64)> = Vec::new();
        for piece in &self.pieces {
            let name = match &piece.source {
                Source::File(opened, _) => &opened.name,
                Source::Monitor => "QEMU's monitor",
            };
            match ways.iter_mut().find(|(way, _)| way == name) {
                Some((_, bytes)) => *bytes += piece.range.len(),
                None => ways.push((name.to_owned(), piece.range.len())),
            }
        }
        ways
    }

    /// Fills `buf` from `at` up to the first byte that is no RAM or cannot be read.
    pub(super) fn read(&self, at: PhysAddr, buf: &mut [u8]) -> ReadOutcome {
        let mut filled = 0;
        while let Some(rest) = buf.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            let here = at.wrapping_add(filled as u64);
            // An address space that wraps around has no RAM at its end.
            let Some(piece) = self.piece(here) else {
                return ReadOutcome::stopped(filled, here, Unreadable::NotRam);
            };
            let into = piece.range.start.0.abs_diff(here.0);
            let left = usize::try_from(piece.range.len() - into).unwrap_or(usize::MAX);
            let wanted = rest.len().min(left);
            let part = rest.get_mut(..wanted).unwrap_or_default();
            let (read, why) = self.read_piece(piece, into, here, part);
            filled += read;
            if let Some(why) = why {
                return ReadOutcome::stopped(filled, here.wrapping_add(read as u64), why);
            }
        }
        ReadOutcome::complete(filled)
    }

    fn piece(&self, at: PhysAddr) -> Option<&Piece> {
        let after = self.pieces.partition_point(|piece| piece.range.start <= at);
        self.pieces.get(after.checked_sub(1)?).filter(|piece| piece.range.contains(at))
    }

    fn read_piece(
        &self,
        piece: &Piece,
        into: u64,
        here: PhysAddr,
        buf: &mut [u8],
    ) -> (usize, Option<Unreadable>) {
        match &piece.source {
            Source::File(opened, base) => opened.read(base.wrapping_add(into), buf),
            Source::Monitor => read_by_monitor(&self.monitor, here, buf),
        }
    }
}

/// Reads whole words by `xp`, which shows them as numbers.
fn read_by_monitor(monitor: &Qmp, at: PhysAddr, buf: &mut [u8]) -> (usize, Option<Unreadable>) {
    let mut filled = 0;
    let mut here = at;
    for part in buf.chunks_mut(MONITOR_READ) {
        let start = here.0 & !7;
        let skip = (here.0 - start) as usize;
        let words = (skip + part.len()).div_ceil(8);
        let bytes = match monitor.human(&format!("xp /{words}gx {start:#x}")) {
            Ok(text) => words_of(&text),
            Err(error) => {
                return (filled, Some(Unreadable::Io { offset: here.0, message: error.to_string() }));
            }
        };
        let Some(bytes) = bytes.get(skip..skip + part.len()) else {
            let message = "QEMU's monitor does not show it".into();
            return (filled, Some(Unreadable::Io { offset: here.0, message }));
        };
        part.copy_from_slice(bytes);
        filled += part.len();
        here = here.wrapping_add(part.len() as u64);
    }
    (filled, None)
}

/// The bytes of `00000000000ffff0: 0x2f3630f000e05bea 0x00fc0039392f3332`, line by line.
fn words_of(text: &str) -> Vec<u8> {
    let words = text.split_whitespace().filter_map(|word| word.strip_prefix("0x"));
    words.map_while(|word| u64::from_str_radix(word, 16).ok()).flat_map(u64::to_le_bytes).collect()
}

/// Finds for each region the best way to its bytes.
struct Finder<'a> {
    monitor: &'a Qmp,
    /// Shared memory backends by id.
    backends: HashMap<String, Backing>,
    process: Option<Process>,
    problems: Vec<String>,
}

enum Backing {
    Unopened,
    Opened(Arc<Opened>, u64),
    Unusable,
}

impl<'a> Finder<'a> {
    fn new(monitor: &'a Qmp) -> Result<Self, LiveError> {
        let devices = monitor.execute(query_memdev {})?;
        let devices = devices.as_array().map(Vec::as_slice).unwrap_or_default();
        let shared = devices.iter().filter(|one| one.get("share").and_then(Value::as_bool) == Some(true));
        let ids = shared.filter_map(|one| one.get("id").and_then(Value::as_str));
        let backends = ids.map(|id| (id.to_owned(), Backing::Unopened)).collect();
        let mut problems = Vec::new();
        let confidential =
            qom_get { path: "/machine".to_owned(), property: "confidential-guest-support".to_owned() };
        if let Ok(Value::String(object)) = monitor.execute(confidential)
            && !object.is_empty()
        {
            problems.push(format!(
                "the guest's memory is encrypted ({}): what is read is ciphertext; start QEMU without \
                 confidential-guest-support to look into it",
                printable(&object)
            ));
        }
        let process = monitor.peer().map(|(pid, _)| Process::new(pid, &mut problems));
        Ok(Self { monitor, backends, process, problems })
    }

    fn source(&mut self, region: &Region) -> Result<Source, LiveError> {
        if let Some(source) = self.shared_file(region)?
            && self.is_the_guests(region, &source)?
        {
            return Ok(source);
        }
        let host = if self.process.is_some() { self.host_address(region)? } else { None };
        if let (Some(host), Some(process)) = (host, &mut self.process)
            && let Some((opened, offset)) = process.source(host, region.range.len())
        {
            let source = Source::File(opened, offset);
            // Twice: what firmware maps anew meanwhile differs once.
            if self.is_the_guests(region, &source)? || self.is_the_guests(region, &source)? {
                return Ok(source);
            }
            // The process at the other end of the socket is not QEMU but one in between.
            if !region.rom && region.range.len() >= TELLING {
                self.process = None;
            }
        }
        let slow = "part of the guest's RAM can be read only through QEMU's monitor, which is slow: run kstub as the \
                    user of QEMU (or root) over a Unix socket, or give QEMU its RAM as \
                    '-object memory-backend-file,share=on,...'";
        if !region.rom && !self.problems.iter().any(|problem| problem == slow) {
            self.problems.push(slow.to_owned());
        }
        Ok(Source::Monitor)
    }

    /// The file of the memory backend that the region is, if it is shared and can be opened here.
    fn shared_file(&mut self, region: &Region) -> Result<Option<Source>, LiveError> {
        let id = region.name.strip_prefix("/objects/").unwrap_or(&region.name);
        let Some(backing) = self.backends.get_mut(id) else { return Ok(None) };
        if let Backing::Unopened = backing {
            let property = |property: &str| {
                let path = format!("/objects/{id}");
                match self.monitor.execute(qom_get { path, property: property.to_owned() }) {
                    Ok(value) => Ok(Some(value)),
                    // A memfd has no path, and a file no offset before QEMU 8.1.
                    Err(LiveError::Refused { .. }) => Ok(None),
                    Err(error) => Err(error),
                }
            };
            *backing = Backing::Unusable;
            // A path that is a directory has the file in it unlinked: nobody else can open it by name.
            if let Some(Value::String(path)) = property("mem-path")?
                && let Ok(file) = File::open(&path)
                && file.metadata().is_ok_and(|meta| meta.is_file())
            {
                let offset = property("offset")?.and_then(|value| value.as_u64()).unwrap_or(0);
                let name = format!("the file {path}");
                *backing = Backing::Opened(Arc::new(Opened { file, name, process: None }), offset);
            }
        }
        let Backing::Opened(opened, offset) = backing else { return Ok(None) };
        let offset = offset.checked_add(region.offset);
        Ok(offset.map(|offset| Source::File(Arc::clone(opened), offset)))
    }

    /// Where QEMU has the region in its own memory, if it says the same of its two ends.
    fn host_address(&self, region: &Region) -> Result<Option<u64>, LiveError> {
        let last = region.range.len() - 1;
        let ask = |at: u64| -> Result<Option<u64>, LiveError> {
            let text = self.monitor.human(&format!("gpa2hva {at:#x}"))?;
            let address = text.trim().rsplit_once(" is 0x").map(|(_, digits)| digits);
            Ok(address.and_then(|digits| u64::from_str_radix(digits, 16).ok()))
        };
        let (Some(first), Some(end)) = (ask(region.range.start.0)?, ask(region.range.start.0 + last)?) else {
            return Ok(None);
        };
        Ok((end.checked_sub(first) == Some(last)).then_some(first))
    }

    /// Whether the bytes of `source` are those that the monitor shows, at some places that are not zero.
    fn is_the_guests(&self, region: &Region, source: &Source) -> Result<bool, LiveError> {
        let Source::File(opened, base) = source else { return Ok(true) };
        let len = region.range.len();
        let step = (len / LOOKED_AT / PAGE_SIZE).max(1) * PAGE_SIZE;
        let (mut compared, mut into) = (0, 0);
        let word = |into: u64| -> Option<u64> {
            let mut bytes = [0; 8];
            opened.read(base.checked_add(into)?, &mut bytes).1.is_none().then(|| u64::from_le_bytes(bytes))
        };
        while compared < COMPARED && into + 8 <= len {
            match word(into) {
                None => return Ok(false),
                Some(0) => {}
                Some(_) => {
                    let shown = || -> Result<Option<u64>, LiveError> {
                        let at = region.range.start.0 + into;
                        Ok(u64_at(&words_of(&self.monitor.human(&format!("xp /1gx {at:#x}"))?), 0))
                    };
                    let mut same = false;
                    for _ in 0..TRIES {
                        let (before, shown, after) = (word(into), shown()?, word(into));
                        same = shown.is_some() && (shown == before || shown == after);
                        // What changes meanwhile says nothing.
                        if same || before == after {
                            break;
                        }
                    }
                    if !same {
                        tracing::warn!("{} does not hold the guest's RAM at {}", opened.name, region.range);
                        return Ok(false);
                    }
                    compared += 1;
                }
            }
            into += step;
        }
        // The end of the region must be there, too.
        Ok(word(len.saturating_sub(8)).is_some())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::qmp::tests::{fake, reply};
    use super::*;

    #[test]
    fn words_as_the_monitor_shows_them() {
        let text =
            "00000000000ffff0: 0x2f3630f000e05bea 0x00fc0039392f3332\n0000000000100000: 0x0000000000000001\n";
        let bytes = words_of(text);
        assert_eq!(bytes.len(), 24);
        assert_eq!(bytes[..3], [0xea, 0x5b, 0xe0]);
        assert_eq!(bytes[16..], [1, 0, 0, 0, 0, 0, 0, 0]);
        assert!(words_of("0000000090000000: Cannot access memory\n").is_empty());
        assert_eq!(words_of("0: 0x1 0xzz 0x2"), [1, 0, 0, 0, 0, 0, 0, 0]);
    }

    /// The other end of a fake's socket is this process: what it "is" of a guest is ours.
    fn open(monitor: &Arc<Qmp>, regions: &[(u64, u64)]) -> Memory {
        let lines =
            regions.iter().map(|(start, last)| format!("  {start:016x}-{last:016x} (prio 0, ram): r\n"));
        let text = format!("FlatView #0\n AS \"memory\", root: system\n{}", lines.collect::<String>());
        Memory::open(monitor, &text).unwrap()
    }

    #[test]
    fn what_is_wrong_with_a_guests_memory_is_said() {
        let (qmp, _) = fake(|command, to| {
            let value = match command["execute"].as_str().unwrap() {
                "query-memdev" => "[]",
                "qom-get" => "\"/objects/sev0\"",
                _ => "\"\"",
            };
            reply(command, value, to);
        });
        let regions: Vec<(u64, u64)> =
            (0..MOST_REGIONS as u64 + 10).map(|n| (n << 13, (n << 13) + 0xfff)).collect();
        let memory = open(&Arc::new(qmp), &regions);
        assert_eq!(memory.ranges().len(), MOST_REGIONS);
        let said = memory.problems().join("\n");
        assert!(said.contains("4106 parts: the last 10, from 0x2000000 on"), "{said}");
        assert!(said.contains("encrypted (/objects/sev0)"), "{said}");
    }

    /// A small part that differs is read by the monitor, and says nothing of the others.
    #[test]
    fn one_small_difference_makes_no_other_process() {
        let [small, large] = [vec![0x11u8; 0x1_0000], vec![0x22u8; 2 << 20]];
        let (small_at, large_at) = (small.as_ptr() as u64, large.as_ptr() as u64);
        let (qmp, _) = fake(move |command, to| {
            let line = command["arguments"]["command-line"].as_str().unwrap_or_default();
            let number = |text: &str| u64::from_str_radix(text.trim_start_matches("0x"), 16).unwrap();
            let value = match (command["execute"].as_str().unwrap(), line.split_once(' ')) {
                ("query-memdev", _) => "[]".to_owned(),
                (_, Some(("gpa2hva", at))) => {
                    let at = number(at);
                    let host = if at < 0x10_0000 { small_at + at } else { large_at + at - 0x10_0000 };
                    format!("\"Host virtual address for {at:#x} (r) is {host:#x}\"")
                }
                // The same bytes everywhere.
                (_, Some(("xp", _))) => "\"0: 0x2222222222222222\"".to_owned(),
                _ => "\"\"".to_owned(),
            };
            reply(command, &value, to);
        });
        let memory = open(&Arc::new(qmp), &[(0, 0xffff), (0x10_0000, 0x2f_ffff)]);
        let ways = memory.ways();
        assert!(ways[0].0.contains("monitor") && ways[0].1 == 0x1_0000, "{ways:?}");
        assert!(ways[1].0.contains("/mem") && ways[1].1 == 2 << 20, "{ways:?}");
        let mut read = vec![0; 1 << 20];
        assert_eq!(memory.read(PhysAddr(0x10_0000), &mut read), ReadOutcome::complete(1 << 20));
        assert!(read.iter().all(|byte| *byte == 0x22));
        drop((small, large));
    }
}
