//! LiME memory images: ranges of RAM, each behind a header with its first and last address.
//!
//! No registers, no notes: what kernel this was is for a scan to find. LiME's "padded" variant is a raw image
//! from address 0, its "raw" variant has lost the addresses. Source: LiME `doc/README.md`, "Spec".

use super::error::Error;
use super::file::Source;
use super::raw::RawMemory;
use super::segments::Backing;
use super::stored::StoredMemory;
use crate::addr::{PhysAddr, PhysRange, join_ranges};
use crate::bytes::{ByteSize, u32_at, u64_at};

/// The magic 0x4c694d45, little-endian.
pub(super) const SIGNATURE: &[u8; 4] = b"EMiL";
const HEADER: usize = 32;
/// A machine has a few dozen ranges of RAM.
const MAX_RANGES: usize = 1 << 16;

/// Reads the headers of `source`, which starts with [`SIGNATURE`].
pub(super) fn open(source: Source, cache_bytes: u64) -> Result<RawMemory, Error> {
    let size = source.file.size();
    let mut claims = Vec::new();
    let mut ranges = Vec::new();
    let mut problem = None;
    let mut at = 0;
    while at < size {
        let mut header = [0; HEADER];
        match source.read_exact(at, &mut header, "the header of a range") {
            Err(error @ Error::Io { .. }) => return Err(error),
            Err(error) if ranges.is_empty() => return Err(error),
            Err(_) => {
                problem = Some(format!("it ends at offset {size:#x} inside the header of a range"));
                break;
            }
            Ok(()) => {}
        }
        let version = u32_at(&header, 4).unwrap_or(0);
        if header.starts_with(SIGNATURE) && version != 1 && ranges.is_empty() {
            return Err(Error::Unsupported {
                path: source.path,
                what: format!("a LiME memory image of version {version}"),
                cure: "take it again with LiME's format=lime and without compression",
            });
        }
        let (first, last) = (u64_at(&header, 8).unwrap_or(0), u64_at(&header, 16).unwrap_or(0));
        let len = last.checked_sub(first).and_then(|n| n.checked_add(1));
        let range = len.and_then(|len| PhysRange::new(PhysAddr(first), len));
        let (true, Some(range)) = (header.starts_with(SIGNATURE) && version == 1, range) else {
            let what = format!("what lies at offset {at:#x} is no header of a range");
            if ranges.is_empty() {
                return Err(source.invalid(at, "the first header makes no sense"));
            }
            problem = Some(what);
            break;
        };
        if ranges.len() >= MAX_RANGES {
            problem = Some(format!("it has more than {MAX_RANGES} ranges"));
            break;
        }
        let data = at.saturating_add(HEADER as u64);
        let held = size.saturating_sub(data).min(range.len());
        let middle = PhysAddr(range.start.0.saturating_add(held));
        claims.push((range.start, middle, Backing::File { file: 0, offset: data }));
        claims.push((middle, range.end, Backing::CutOff { file: 0 }));
        ranges.push(range);
        if held < range.len() {
            problem = Some(format!("it ends at offset {size:#x} inside the range from {:#x}", range.start));
            break;
        }
        at = data.saturating_add(held);
    }
    let count = ranges.len();
    let memory = StoredMemory::new(vec![source], claims, cache_bytes);
    let held = memory.bytes_held();
    let problem = problem.map(|what| {
        format!(
            "the LiME image is incomplete: {what}, and what follows is lost ({} are there); copy or take it \
             again",
            ByteSize(held)
        )
    });
    Ok(RawMemory {
        memory,
        ranges: join_ranges(ranges),
        fact: ("ranges", count.to_string()),
        complete: problem.is_none(),
        problems: problem.into_iter().collect(),
    })
}
