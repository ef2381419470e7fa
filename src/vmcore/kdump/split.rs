//! Whether files are the parts of one dump, and which parts are missing.
//!
//! Source: makedumpfile(8), `--split`: every part has both headers, the notes and both bitmaps of the whole
//! dump; `start_pfn` and `end_pfn` of the sub header tell the page frames whose pages it has.

use super::bitmap::Bitmaps;
use super::header::Header;
use super::part::Part;
use crate::vmcore::error::Error;
use crate::vmcore::file::Source;
use std::ops::Range;

/// Page frames whose part is not there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::vmcore) struct Missing {
    pub pfns: Range<u64>,
    /// How many of them were dumped.
    pub pages: u64,
}

/// Puts `files` in the order of their page frames; refuses those that do not belong together.
pub(super) fn sort(files: &mut [(Source, Header)]) -> Result<(), Error> {
    if let [_, _, ..] = files
        && let Some((source, _)) = files.iter().find(|(_, header)| header.split.is_none())
    {
        return Err(Error::NotAPart { path: source.path.clone() });
    }
    let range = |header: &Header| header.split.clone().unwrap_or(0..u64::MAX);
    files.sort_by_key(|(_, header)| (range(header).start, range(header).end));
    for pair in files.windows(2) {
        let [(a, first), (b, second)] = pair else { continue };
        if let Some(what) = first.differs(second) {
            return Err(Error::OtherDump { path: a.path.clone(), other: b.path.clone(), what });
        }
        let (one, two) = (range(first), range(second));
        if one == two && !one.is_empty() {
            return Err(Error::PartTwice {
                path: a.path.clone(),
                other: b.path.clone(),
                start_pfn: one.start,
                end_pfn: one.end,
            });
        }
        if two.start < one.end {
            let what = "their page ranges overlap";
            return Err(Error::OtherDump { path: a.path.clone(), other: b.path.clone(), what });
        }
    }
    Ok(())
}

/// Where dumped pages lie that no part has.
pub(super) fn missing(parts: &[Part], bitmaps: &Bitmaps) -> Vec<Missing> {
    let mut missing = Vec::new();
    let mut at = 0;
    let mut rank = 0;
    let ends = parts.iter().map(|part| (part.pfns.clone(), part.first_rank, part.pages));
    let last = (bitmaps.pages..bitmaps.pages, bitmaps.dumped_pages, 0);
    for (pfns, first_rank, pages) in ends.chain([last]) {
        let lost = first_rank.saturating_sub(rank);
        if lost > 0 {
            missing.push(Missing { pfns: at..pfns.start, pages: lost });
        }
        (at, rank) = (pfns.end, first_rank.saturating_add(pages));
    }
    missing
}
