//! makedumpfile's flattened stream, read in place as the file that it describes.
//!
//! A stream for pipes: every write becomes a record (offset, size, bytes). It says nothing of what the
//! file is. Source: makedumpfile's `struct makedumpfile_header` and `makedumpfile_data_header`, written
//! by `makedumpfile -F` and QEMU's `dump/dump.c` (`write_buffer`).

use super::error::Error;
use super::file::{FileRead, ReadAt, Source, Stop};
use crate::bytes::array_at;
use std::collections::BinaryHeap;
use std::sync::Arc;

/// The first bytes of a flattened file.
pub const SIGNATURE: &[u8; 16] = b"makedumpfile\0\0\0\0";
/// The records start here.
const HEADER_SIZE: u64 = 4096;
const RECORD_HEADER: u64 = 16;

/// Read ahead while records are small: QEMU writes tens of thousands of 16 KiB, and on a cold file one
/// sequential read is a hundred times faster than as many single ones.
const WINDOW: usize = 256 << 10;
const SMALL_RECORD: u64 = 64 << 10;
/// The index must stay small against the file: this many records are always allowed …
const ALWAYS_RECORDS: u64 = 1 << 16;
/// … and beyond that one for each of these bytes.
const BYTES_PER_RECORD: u64 = 512;

/// A run of bytes of the described file and where the stream has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Piece {
    logical: u64,
    len: u64,
    at: u64,
}

impl Piece {
    // Checked when the record was read.
    fn end(&self) -> u64 {
        self.logical.saturating_add(self.len)
    }
}

/// The file that a flattened stream describes.
pub struct Flattened {
    raw: Arc<dyn ReadAt>,
    /// Sorted by logical offset, apart.
    pieces: Vec<Piece>,
    size: u64,
    records: u64,
    cut: Option<Cut>,
}

/// Where and why the stream stops without its end mark.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    /// File offset.
    pub offset: u64,
    /// Half a sentence.
    pub why: &'static str,
}

impl Flattened {
    /// Indexes the records of `source`, which starts with [`SIGNATURE`].
    pub(super) fn open(source: &Source) -> Result<Self, Error> {
        let mut header = [0; 32];
        source.read_exact(0, &mut header, "the header of the flattened format")?;
        let (kind, version) = (be_i64(&header, 16), be_i64(&header, 24));
        if (kind, version) != (Some(1), Some(1)) {
            return Err(Error::Unsupported {
                path: source.path.clone(),
                what: format!(
                    "a flattened dump of type {} version {}",
                    kind.unwrap_or(-1),
                    version.unwrap_or(-1)
                ),
                cure: "reassemble it with 'makedumpfile -R DUMP < FLATTENED'",
            });
        }
        let (records, cut) = scan(source)?;
        let count = records.len() as u64;
        let pieces = newest_on_top(records);
        let size = pieces.last().map_or(0, Piece::end);
        Ok(Self { raw: Arc::clone(&source.file), pieces, size, records: count, cut })
    }

    /// Number of records in the stream.
    pub fn records(&self) -> u64 {
        self.records
    }

    /// Where the stream was cut; `None` if it has its end mark.
    pub fn cut(&self) -> Option<Cut> {
        self.cut
    }

    /// Index of the piece that holds `offset`, or of the one after the gap around it.
    fn find(&self, offset: u64) -> usize {
        self.pieces.partition_point(|piece| piece.end() <= offset)
    }
}

impl ReadAt for Flattened {
    fn size(&self) -> u64 {
        self.size
    }

    fn stored(&self) -> u64 {
        self.raw.size()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> FileRead {
        let mut filled = 0;
        let mut pieces = self.pieces.iter().skip(self.find(offset));
        let mut next = pieces.next();
        while let Some(rest) = buf.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            let ended = self.cut.map_or(self.raw.size(), |cut| cut.offset);
            let (Some(at), Some(piece)) = (offset.checked_add(filled as u64), next) else {
                return FileRead::ended(filled, ended);
            };
            if at < piece.logical {
                // A file put together from the records has a hole here; but a record that was cut off could
                // have filled it.
                if self.cut.is_some() {
                    return FileRead::ended(filled, ended);
                }
                let n = clamp(piece.logical - at, rest.len());
                rest[..n].fill(0);
                filled += n;
                continue;
            }
            let skip = at - piece.logical;
            let n = clamp(piece.len - skip, rest.len());
            let read = self.raw.read_at(piece.at.saturating_add(skip), &mut rest[..n]);
            filled += read.filled.min(n);
            if let Some(stop) = read.stopped {
                return FileRead { filled, stopped: Some(stop) };
            }
            next = pieces.next();
        }
        FileRead::complete(filled)
    }

    fn origin(&self, offset: u64) -> u64 {
        match self.pieces.get(self.find(offset)) {
            Some(piece) if piece.logical <= offset => piece.at.saturating_add(offset - piece.logical),
            Some(piece) => piece.at,
            None => self.raw.size(),
        }
    }
}

fn clamp(n: u64, max: usize) -> usize {
    usize::try_from(n).unwrap_or(usize::MAX).min(max)
}

fn be_i64(bytes: &[u8], at: usize) -> Option<i64> {
    array_at(bytes, at).map(i64::from_be_bytes)
}

/// Every record in file order, and where the stream was cut.
fn scan(source: &Source) -> Result<(Vec<Piece>, Option<Cut>), Error> {
    let size = source.file.size();
    let allowed = ALWAYS_RECORDS.max(size / BYTES_PER_RECORD);
    let mut records = Vec::new();
    let mut window = Window { bytes: vec![0; WINDOW], start: 0, filled: 0 };
    let mut at = HEADER_SIZE;
    let mut last_size = 0;
    loop {
        let cut = |why| Some(Cut { offset: at.min(size), why });
        let header = match window.record_header(source, at, last_size < SMALL_RECORD) {
            Ok(Some(header)) => header,
            Ok(None) => return Ok((records, cut("it ends without its end mark"))),
            Err(Stop::Io { offset, source: error }) => {
                return Err(Error::Io { path: source.path.clone(), offset, source: error });
            }
            Err(Stop::Ended { .. }) => return Ok((records, cut("it ends without its end mark"))),
        };
        let (Some(logical), Some(len)) = (be_i64(&header, 0), be_i64(&header, 8)) else {
            return Ok((records, cut("it ends without its end mark")));
        };
        if (logical, len) == (-1, -1) {
            return Ok((records, None));
        }
        let valid = logical.checked_add(len).is_some() && logical >= 0 && len > 0;
        let (Ok(logical), Ok(len), true) = (u64::try_from(logical), u64::try_from(len), valid) else {
            return Ok((records, cut("a record's offset or size makes no sense")));
        };
        let data = at.saturating_add(RECORD_HEADER);
        let have = size.saturating_sub(data).min(len);
        if have > 0 {
            records.push(Piece { logical, len: have, at: data });
        }
        if have < len {
            return Ok((records, Some(Cut { offset: size, why: "it ends inside a record" })));
        }
        if records.len() as u64 > allowed {
            return Err(source.invalid(at, "the flattened format has more records than its size allows"));
        }
        at = data.saturating_add(len);
        last_size = len;
    }
}

/// The part of the file that was read last.
struct Window {
    bytes: Vec<u8>,
    start: u64,
    filled: usize,
}

impl Window {
    /// The 16 bytes at `at`, or `None` past the end; reads more than needed if `ahead`.
    fn record_header(&mut self, source: &Source, at: u64, ahead: bool) -> Result<Option<[u8; 16]>, Stop> {
        if let Some(header) = self.get(at) {
            return Ok(Some(header));
        }
        let want = if ahead { self.bytes.len() } else { RECORD_HEADER as usize };
        let read = source.file.read_at(at, &mut self.bytes[..want]);
        (self.start, self.filled) = (at, read.filled);
        match (self.get(at), read.stopped) {
            (None, Some(stop @ Stop::Io { .. })) => Err(stop),
            (header, _) => Ok(header),
        }
    }

    fn get(&self, at: u64) -> Option<[u8; 16]> {
        let from = usize::try_from(at.checked_sub(self.start)?).ok()?;
        array_at(self.bytes.get(..self.filled)?, from)
    }
}

/// Cuts records so that none overlap: where two do, the later one in the stream wins, as if written there.
fn newest_on_top(records: Vec<Piece>) -> Vec<Piece> {
    let mut order: Vec<(usize, Piece)> = records.into_iter().enumerate().collect();
    order.sort_unstable_by_key(|(sequence, piece)| (piece.logical, *sequence));
    let apart = order.windows(2).all(|pair| match pair {
        [(_, a), (_, b)] => a.end() <= b.logical,
        _ => true,
    });
    if apart {
        return order.into_iter().map(|(_, piece)| piece).collect();
    }
    let mut starts = order.into_iter().peekable();
    // The records that are open at `at`, the latest on top.
    let mut open: BinaryHeap<(usize, u64, u64, u64)> = BinaryHeap::new();
    let mut pieces: Vec<Piece> = Vec::new();
    let mut at = 0;
    loop {
        while open.peek().is_some_and(|&(_, _, end, _)| end <= at) {
            open.pop();
        }
        if open.is_empty() {
            match starts.peek() {
                Some((_, piece)) => at = piece.logical,
                None => return pieces,
            }
        }
        while let Some((sequence, piece)) = starts.next_if(|(_, piece)| piece.logical <= at) {
            open.push((sequence, piece.logical, piece.end(), piece.at));
        }
        let Some(&(_, logical, end, raw_at)) = open.peek() else { continue };
        let until = starts.peek().map_or(end, |(_, piece)| piece.logical.min(end));
        let raw = raw_at.saturating_add(at - logical);
        match pieces.last_mut() {
            Some(last) if last.end() == at && last.at.saturating_add(last.len) == raw => {
                last.len += until - at
            }
            _ => pieces.push(Piece { logical: at, len: until - at, at: raw }),
        }
        at = until;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn stream(records: &[(i64, &[u8])], end: bool) -> Vec<u8> {
        let mut bytes = SIGNATURE.to_vec();
        bytes.extend(1i64.to_be_bytes());
        bytes.extend(1i64.to_be_bytes());
        bytes.resize(4096, 0);
        for (offset, data) in records {
            bytes.extend(offset.to_be_bytes());
            bytes.extend((data.len() as i64).to_be_bytes());
            bytes.extend(*data);
        }
        if end {
            bytes.extend([0xff; 16]);
        }
        bytes
    }

    fn open(bytes: Vec<u8>) -> Flattened {
        Flattened::open(&Source { path: "flat".into(), file: Arc::new(bytes) }).unwrap()
    }

    fn contents(file: &Flattened) -> Vec<u8> {
        let mut bytes = vec![0xaa; file.size() as usize];
        assert!(file.read_at(0, &mut bytes).stopped.is_none());
        bytes
    }

    #[test]
    fn later_records_win_and_gaps_are_zero() {
        let file = open(stream(
            &[(8, b"wwwwwwww"), (0, b"abcdef"), (2, b"XY"), (12, b"Z"), (1, b"0123"), (20, b"!")],
            true,
        ));
        assert_eq!(contents(&file), b"a0123f\0\0wwwwZwww\0\0\0\0!");
        assert_eq!((file.records(), file.cut()), (6, None));
        let read = file.read_at(18, &mut [0; 8]);
        assert_eq!(read.filled, 3);
        assert!(matches!(read.stopped, Some(Stop::Ended { .. })));
        assert_eq!(file.origin(20), file.stored() - 16 - 1);
    }

    #[test]
    fn overlaps_match_writing_the_records_in_order() {
        let mut seed = 7u32;
        let mut random = |n: u32| {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (seed >> 8) % n
        };
        for _ in 0..300 {
            let records: Vec<(i64, Vec<u8>)> = (0..random(12) + 1)
                .map(|i| (i64::from(random(40)), vec![i as u8 + 1; random(20) as usize + 1]))
                .collect();
            let mut truth = Vec::new();
            for (offset, data) in &records {
                let (from, to) = (*offset as usize, *offset as usize + data.len());
                truth.resize(truth.len().max(to), 0);
                truth[from..to].copy_from_slice(data);
            }
            let slices: Vec<(i64, &[u8])> = records.iter().map(|(o, d)| (*o, &d[..])).collect();
            assert_eq!(contents(&open(stream(&slices, true))), truth, "{records:?}");
        }
    }

    #[test]
    fn a_cut_stream_is_incomplete_and_its_gaps_are_not_zero() {
        let whole = stream(&[(0, b"head"), (16, b"tail")], true);
        for len in 4096..whole.len() {
            let file = open(whole[..len].to_vec());
            let cut = file.cut().unwrap();
            assert!(cut.offset <= len as u64);
            let read = file.read_at(0, &mut [0; 32]);
            assert!(read.filled <= 4, "{len}: {read:?}");
            assert!(matches!(read.stopped, Some(Stop::Ended { .. })));
        }
    }

    #[test]
    fn nonsense_records_end_the_stream() {
        for (offset, size) in [(-2i64, 4i64), (0, -1), (0, 0), (i64::MAX, 2), (-1, 4)] {
            let mut bytes = stream(&[(0, b"head")], false);
            bytes.extend(offset.to_be_bytes());
            bytes.extend(size.to_be_bytes());
            bytes.extend([0; 64]);
            let file = open(bytes);
            assert!(file.cut().is_some());
            assert_eq!(file.size(), 4);
        }
    }

    #[test]
    fn more_records_than_bytes_allow_are_refused() {
        let one: Vec<(i64, &[u8])> = (0..ALWAYS_RECORDS as i64 + 2).map(|i| (i, &b"x"[..])).collect();
        let source = Source { path: "flat".into(), file: Arc::new(stream(&one, true)) };
        assert!(matches!(Flattened::open(&source), Err(Error::Invalid { .. })));
    }
}
