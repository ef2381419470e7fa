//! Physical memory of a machine that may be incomplete: reads say how far they got and why they stopped.
//!
//! Knows no file format and no page table. Unreadable is a value: a page the dump's filter left out is
//! not the same as memory the machine never had, and neither is a page of zeros.

mod cache;
mod image;

pub use cache::PageCache;
pub use image::MemoryImage;

use crate::addr::{PhysAddr, PhysRange};
use std::fmt;

/// Why a byte of physical memory cannot be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unreadable {
    /// The machine has this RAM, but the dump's filter left the page out.
    Excluded,
    /// The dump leaves the page out, either as filtered or because it was all zero: the format cannot tell.
    ZeroOrExcluded,
    /// The source knows of no RAM here.
    NotRam,
    /// The file ends before the byte at `offset`.
    Truncated {
        /// File offset that could not be reached.
        offset: u64,
    },
    /// The dump is split, and the part that has these page frames was not given.
    MissingPart {
        /// The first page frame that no part has.
        start_pfn: u64,
        /// One past the last.
        end_pfn: u64,
    },
    /// What the file holds for this page makes no sense.
    Corrupt {
        /// File offset of the damaged structure.
        offset: u64,
        /// What is wrong with it, as half a sentence.
        what: String,
    },
    /// The operating system failed the read.
    Io {
        /// File offset of the failed read.
        offset: u64,
        /// The system's message.
        message: String,
    },
}

impl Unreadable {
    /// A short fixed name for tables and JSON.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Excluded => "excluded",
            Self::ZeroOrExcluded => "zero-or-excluded",
            Self::NotRam => "not-ram",
            Self::Truncated { .. } => "truncated",
            Self::MissingPart { .. } => "missing-part",
            Self::Corrupt { .. } => "corrupt",
            Self::Io { .. } => "io-error",
        }
    }
}

impl fmt::Display for Unreadable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Excluded => write!(f, "excluded by the dump's filter"),
            Self::ZeroOrExcluded => {
                write!(
                    f,
                    "left out of the dump: all zero or excluded by the filter (this format cannot tell)"
                )
            }
            Self::NotRam => write!(f, "not RAM as far as is known"),
            Self::Truncated { offset } => write!(f, "the file ends before offset {offset:#x} (truncated)"),
            Self::MissingPart { start_pfn, end_pfn } => {
                write!(
                    f,
                    "in a part of the split dump that was not given (pages {start_pfn:#x} to {end_pfn:#x})"
                )
            }
            Self::Corrupt { offset, what } => write!(f, "corrupt at file offset {offset:#x}: {what}"),
            Self::Io { offset, message } => {
                write!(f, "reading the file at offset {offset:#x} failed: {message}")
            }
        }
    }
}

/// A physical address that could not be read, and why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("physical address {at:#x}: {why}")]
pub struct MemoryError {
    /// The first unreadable byte.
    pub at: PhysAddr,
    /// Why.
    pub why: Unreadable,
}

/// How much of a buffer a read filled, from its start, and what stopped it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use]
pub struct ReadOutcome {
    /// Bytes filled from the start of the buffer; the rest of the buffer is unspecified.
    pub filled: usize,
    /// `None` if and only if the whole buffer was filled.
    pub stopped: Option<MemoryError>,
}

impl ReadOutcome {
    /// The whole buffer of `len` bytes was filled.
    pub fn complete(len: usize) -> Self {
        Self { filled: len, stopped: None }
    }
    /// The read stopped after `filled` bytes at `at`.
    pub fn stopped(filled: usize, at: PhysAddr, why: Unreadable) -> Self {
        Self { filled, stopped: Some(MemoryError { at, why }) }
    }
}

/// The physical memory of a machine.
pub trait PhysicalMemory: Send + Sync {
    /// Fills `buf` from `at` upward and stops exactly at the first byte that cannot be read.
    /// Never fills a hole with zeros.
    fn read_phys(&self, at: PhysAddr, buf: &mut [u8]) -> ReadOutcome;

    /// The RAM that the source knows of: sorted, apart, never empty ranges. Pages inside may be unreadable.
    fn ranges(&self) -> Vec<PhysRange>;

    /// The part of [`Self::ranges`] whose bytes the source may hold: what is worth searching.
    fn stored_ranges(&self) -> Vec<PhysRange> {
        self.ranges()
    }

    /// Whether `at` is RAM that the source knows of, readable or not.
    fn is_ram(&self, at: PhysAddr) -> bool {
        self.ranges().iter().any(|range| range.contains(at))
    }

    /// Fills the whole of `buf` or says where and why that failed.
    fn read_phys_exact(&self, at: PhysAddr, buf: &mut [u8]) -> Result<(), MemoryError> {
        self.read_phys(at, buf).stopped.map_or(Ok(()), Err)
    }

    /// The little-endian `u64` at `at`.
    fn read_phys_u64(&self, at: PhysAddr) -> Result<u64, MemoryError> {
        let mut word = [0; 8];
        self.read_phys_exact(at, &mut word)?;
        Ok(u64::from_le_bytes(word))
    }
}
