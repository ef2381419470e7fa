//! Raw images: files that hold physical memory byte for byte, from an address that only the user knows.
//!
//! Written `FILE@PHYSADDR`, as crash(8) has it ("ramdump@address"). Such memory has no registers and no notes.

use super::error::Error;
use super::file::{DiskFile, Source};
use super::segments::Backing;
use super::stored::StoredMemory;
use super::{flattened, kdump, lime};
use crate::addr::{PhysAddr, PhysRange, join_ranges};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::Arc;

/// x86-64 addresses memory with 52 bits at most (Intel SDM vol. 3, MAXPHYADDR).
const MAX_PHYS: u64 = 1 << 52;

/// Memory without anything else.
pub(super) struct RawMemory {
    pub memory: StoredMemory,
    pub ranges: Vec<PhysRange>,
    /// How many pieces it has, for people.
    pub fact: (&'static str, String),
    pub problems: Vec<String>,
    /// Whether all that was to be written is there.
    pub complete: bool,
}

/// A file and the physical address of its first byte.
pub(super) struct RawImage {
    pub path: PathBuf,
    pub start: PhysAddr,
}

impl RawImage {
    /// Takes `FILE@PHYSADDR` apart; `None` if this is the name of a file or has no `@`.
    pub fn parse(argument: &OsStr) -> Result<Option<Self>, Error> {
        let named = PathBuf::from(argument);
        // A file that is really called so wins.
        if !matches!(named.try_exists(), Ok(false)) {
            return Ok(None);
        }
        let bytes = argument.as_bytes();
        let Some(sign) = bytes.iter().rposition(|&b| b == b'@') else { return Ok(None) };
        let (file, address) =
            (bytes.get(..sign).unwrap_or_default(), bytes.get(sign + 1..).unwrap_or_default());
        let path = PathBuf::from(OsString::from(OsStr::from_bytes(file)));
        let error = |what| Error::RawAddress { argument: named.clone(), what };
        let digits = address.strip_prefix(b"0x").or(address.strip_prefix(b"0X")).unwrap_or(address);
        let hex = std::str::from_utf8(digits).ok().filter(|text| text.bytes().all(|b| b.is_ascii_hexdigit()));
        match hex.map(|text| u64::from_str_radix(text, 16)) {
            Some(Ok(start)) if start < MAX_PHYS => Ok(Some(Self { path, start: PhysAddr(start) })),
            Some(Ok(_)) => Err(error("no machine has memory at that address")),
            Some(Err(_)) if !digits.is_empty() => Err(error("no machine has memory at that address")),
            // Not meant as an address unless there is something for it to be the address of.
            _ if path.is_file() => Err(error("what follows '@' is no hexadecimal address")),
            _ => Ok(None),
        }
    }
}

/// Puts `images` together, keeping up to `cache_bytes` of pages that are read in part.
pub(super) fn open(images: Vec<RawImage>, cache_bytes: u64) -> Result<RawMemory, Error> {
    let mut sources = Vec::new();
    let mut problems = Vec::new();
    let mut pieces: Vec<(PhysRange, PathBuf)> = Vec::new();
    let mut claims = Vec::new();
    for (number, image) in (0u32..).zip(images) {
        let source = Source { file: Arc::new(DiskFile::open(&image.path)?), path: image.path };
        let range = PhysRange::new(image.start, source.file.size()).filter(|range| range.end.0 <= MAX_PHYS);
        let Some(range) = range else {
            let what = "the file reaches beyond all memory that a machine can have";
            return Err(Error::RawAddress { argument: source.path, what });
        };
        let mut start = [0; 16];
        let _ = source.file.read_at(0, &mut start);
        let signatures = [b"\x7fELF", &kdump::SIGNATURE[..], lime::SIGNATURE, flattened::SIGNATURE];
        if signatures.iter().any(|signature| start.starts_with(signature)) {
            problems.push(format!(
                "'{}' starts like a dump but is read as a raw image: leave out '@{:#x}' unless that is meant",
                source.path.display(),
                image.start
            ));
        }
        claims.push((range.start, range.end, Backing::File { file: number, offset: 0 }));
        pieces.push((range, source.path.clone()));
        sources.push(source);
    }
    pieces.sort_by_key(|(range, _)| range.start);
    for pair in pieces.windows(2) {
        if let [(below, path), (above, other)] = pair
            && above.start < below.end
        {
            return Err(Error::RawOverlap { path: path.clone(), other: other.clone(), at: above.start });
        }
    }
    Ok(RawMemory {
        memory: StoredMemory::new(sources, claims, cache_bytes),
        fact: ("images", pieces.len().to_string()),
        ranges: join_ranges(pieces.into_iter().map(|(range, _)| range).collect()),
        problems,
        complete: true,
    })
}
