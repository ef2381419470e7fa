//! What the fuzz targets share: inputs that describe sparse files and memory, and what must hold of every read.
#![allow(clippy::panic)]

use kstub::addr::{PhysAddr, PhysRange};
use kstub::backend::{Backend, Dump};
use kstub::memory::{MemoryImage, PhysicalMemory, Unreadable};
use kstub::vmcore::{ReadAt, Vmcore};
use std::path::Path;
use std::sync::Arc;

/// The largest file that an input describes.
pub const FILE_MAX: usize = 1 << 20;

/// The pieces that an input describes: a 32-bit offset, a 16-bit length, that many bytes.
///
/// Dumps are mostly zeros, which an input need not carry: seeds stay small, and mutations hit what matters.
pub struct Pieces<'a>(pub &'a [u8]);

impl<'a> Iterator for Pieces<'a> {
    type Item = (u32, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let (at, rest) = self.0.split_first_chunk::<4>()?;
        let (len, rest) = rest.split_first_chunk::<2>()?;
        let (bytes, rest) = rest.split_at(usize::from(u16::from_le_bytes(*len)).min(rest.len()));
        self.0 = rest;
        Some((u32::from_le_bytes(*at), bytes))
    }
}

/// The file that `input` describes.
pub fn file(input: &[u8]) -> Vec<u8> {
    let mut file = Vec::new();
    for (at, bytes) in Pieces(input) {
        let at = at as usize % FILE_MAX;
        let end = (at + bytes.len()).min(FILE_MAX);
        file.resize(file.len().max(end), 0);
        file[at..end].copy_from_slice(&bytes[..end - at]);
    }
    file
}

/// The memory that `input` describes.
pub fn memory(input: &[u8]) -> MemoryImage {
    let mut image = MemoryImage::new();
    for (at, bytes) in Pieces(input) {
        image.write(PhysAddr(at.into()), bytes);
    }
    image
}

/// An input that describes `bytes` at `at`: what [`file`] and [`memory`] take apart again.
pub fn pieces(at: u32, bytes: &[u8]) -> Vec<u8> {
    /// So many zeros are worth a new piece.
    const GAP: [u8; 12] = [0; 12];
    let mut input = Vec::new();
    let mut put = |from: usize, part: &[u8]| {
        input.extend((at + from as u32).to_le_bytes());
        input.extend((part.len() as u16).to_le_bytes());
        input.extend(part);
    };
    let mut from = 0;
    while let Some(zeros) = bytes[from..].iter().position(|&byte| byte != 0) {
        from += zeros;
        let rest = &bytes[from..bytes.len().min(from + 0x8000)];
        let len = rest.windows(GAP.len()).position(|window| window == GAP).unwrap_or(rest.len());
        put(from, &rest[..len]);
        from += len;
    }
    if bytes.ends_with(&[0]) {
        // A file is as long as its last piece reaches.
        put(bytes.len() - 1, &[0]);
    }
    input
}

/// The next `N` bytes of `input`, zeros where it ends.
pub fn take<const N: usize>(input: &mut &[u8]) -> [u8; N] {
    let mut bytes = [0; N];
    let n = N.min(input.len());
    let (now, rest) = input.split_at(n);
    bytes[..n].copy_from_slice(now);
    *input = rest;
    bytes
}

/// The next `u64` of `input`.
pub fn take_u64(input: &mut &[u8]) -> u64 {
    u64::from_le_bytes(take(input))
}

/// As many bytes of `input` as the 16 bits before them say.
pub fn take_bytes<'a>(input: &mut &'a [u8]) -> &'a [u8] {
    let len = usize::from(u16::from_le_bytes(take(input)));
    let (now, rest) = input.split_at(len.min(input.len()));
    *input = rest;
    now
}

/// What a read gave: the bytes, and where and why it stopped.
pub type Read = (Vec<u8>, Option<(u64, &'static str)>);

/// Reads, and checks what holds of any single read.
pub fn read(memory: &dyn PhysicalMemory, at: u64, len: usize) -> Read {
    let mut buf = vec![0xa5; len];
    let outcome = memory.read_phys(PhysAddr(at), &mut buf);
    assert!(outcome.filled <= len, "{at:#x}+{len:#x}: filled {:#x}", outcome.filled);
    assert_eq!(outcome.filled < len, outcome.stopped.is_some(), "{at:#x}+{len:#x}: {outcome:?}");
    if let Some(stop) = &outcome.stopped {
        let expected = at.checked_add(outcome.filled as u64).unwrap_or(u64::MAX);
        assert_eq!(stop.at.0, expected, "{at:#x}+{len:#x}: {outcome:?}");
    }
    buf.truncate(outcome.filled);
    (buf, outcome.stopped.map(|stop| (stop.at.0, stop.why.kind())))
}

/// Reads, and checks that the same bytes come in one read, again, and in two.
///
/// `exact`: what lies outside `ranges` is not RAM. Only damage can make that untrue, and only in a compressed dump:
/// its first bitmap, which tells the ranges, can lack pages that the second has.
fn check_read(memory: &dyn PhysicalMemory, ranges: &[PhysRange], exact: bool, at: u64, len: usize) {
    let whole = read(memory, at, len);
    assert!(read(memory, at, len) == whole, "{at:#x}+{len:#x}: a second read differs");
    let (bytes, stop) = &whole;
    let in_ranges = |at| ranges.iter().any(|range| range.contains(PhysAddr(at)));
    if let Some(last) = bytes.len().checked_sub(1).filter(|_| exact) {
        assert!(in_ranges(at) && in_ranges(at + last as u64), "{at:#x}+{len:#x}: bytes outside all ranges");
    }
    if let &Some((stopped, why)) = stop {
        let not_ram = Unreadable::NotRam.kind();
        let outside = !in_ranges(stopped);
        assert!(why != not_ram || outside, "{stopped:#x}: not RAM, but within a range");
        assert!(why == not_ram || !outside || !exact, "{stopped:#x}: {why}, but outside all ranges");
        let (none, again) = read(memory, stopped, 1);
        assert!(none.is_empty(), "{stopped:#x}: unreadable ({why}), then readable");
        assert_eq!(again, *stop, "the reason changes");
    }
    let half = bytes.len() / 2;
    if half > 0 {
        let (first, none) = read(memory, at, half);
        assert!(none.is_none() && first == bytes[..half], "{at:#x}+{half:#x}: differs from the longer read");
        let second = read(memory, at + half as u64, len - half);
        assert!(second.0 == bytes[half..] && second.1 == *stop, "{at:#x}+{len:#x}: its second half differs");
    }
}

/// Checks reads of `dump` around the edges of its ranges and at the addresses in `asked`.
pub fn check_memory(dump: &Dump, asked: &[u64]) {
    let exact = !dump.facts().iter().any(|fact| fact.name == "format" && fact.value == "kdump-compressed");
    let memory: &dyn PhysicalMemory = dump;
    let ranges = memory.ranges();
    assert!(ranges.iter().all(|range| !range.is_empty()), "{ranges:?}");
    assert!(ranges.windows(2).all(|pair| pair[0].end < pair[1].start), "{ranges:?}");
    for at in addresses(memory, asked) {
        for len in [1, 100, 4096, 3 * 4096 + 5] {
            check_read(memory, &ranges, exact, at, len);
        }
    }
    // A longer read than caches care for.
    if let Some(range) = ranges.first() {
        check_read(memory, &ranges, exact, range.start.0, 70 * 4096);
    }
}

/// Edges of the first and last ranges of `memory`, and `asked`.
pub fn addresses(memory: &dyn PhysicalMemory, asked: &[u64]) -> Vec<u64> {
    let ranges = memory.ranges();
    let mut all = asked.to_vec();
    for range in ranges.iter().take(4).chain(ranges.iter().rev().take(2)) {
        let (start, end) = (range.start.0, range.end.0);
        all.extend([
            start.saturating_sub(1),
            start,
            start.saturating_add(4095),
            end.saturating_sub(4097),
            end,
        ]);
    }
    all.push(u64::MAX);
    all.sort_unstable();
    all.dedup();
    all
}

/// The last words of an input: addresses that a mutation can choose.
pub fn asked(input: &[u8]) -> [u64; 2] {
    let mut last = &input[input.len().saturating_sub(16)..];
    [take_u64(&mut last), take_u64(&mut last)]
}

/// Text for people: one line, without anything that would steer a terminal.
pub fn check_text(text: &str) {
    assert!(!text.chars().any(char::is_control), "{text:?}");
}

/// Opens `bytes` as a dump and checks what must hold of any; `None` if it is refused.
pub fn dump(bytes: Vec<u8>, asked: &[u64]) -> Option<Dump> {
    let file: Arc<dyn ReadAt> = Arc::new(bytes);
    let open = |cache| Vmcore::from_file(Path::new("dump"), Arc::clone(&file), cache).map(Dump::new);
    let (one, other) = match (open(1 << 20), open(0)) {
        (Ok(one), Ok(other)) => (one, other),
        (Err(one), Err(other)) => {
            check_text(&one.to_string());
            assert_eq!(one.to_string(), other.to_string());
            return None;
        }
        _ => panic!("whether the dump can be read depends on the size of the cache"),
    };
    one.problems().iter().for_each(|text| check_text(text));
    one.facts().iter().for_each(|fact| check_text(&fact.value));
    check_memory(&one, asked);
    same_memory(&one, &other, asked);
    Some(one)
}

/// Checks that two readers of the same memory agree.
pub fn same_memory(one: &dyn PhysicalMemory, other: &dyn PhysicalMemory, asked: &[u64]) {
    assert_eq!(one.ranges(), other.ranges());
    for at in addresses(one, asked) {
        for len in [1, 4096, 20_000] {
            assert!(read(one, at, len) == read(other, at, len), "{at:#x}+{len:#x}: two readers differ");
        }
    }
}

/// Checks that two openings of the same dump have the same contents.
pub fn same_dump(one: &Dump, other: &Dump, asked: &[u64]) {
    same_memory(one, other, asked);
    let regs = |dump: &Dump| format!("{:?}", dump.saved_cpus());
    assert_eq!(regs(one), regs(other));
    assert_eq!(one.vmcoreinfo_note(), other.vmcoreinfo_note());
    assert_eq!(one.phys_base_hints(), other.phys_base_hints());
}
