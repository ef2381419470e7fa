//! Which physical address has which backing, when several segments claim the same one.
//!
//! The kernel lists its text twice in `/proc/vmcore` (`crash_prepare_elf64_headers`), QEMU with paging on
//! lists every virtual mapping. A segment that really has bytes wins over one that was cut off, and that one
//! over the memory that a segment only mentions (`p_memsz > p_filesz`).

use crate::addr::{PhysAddr, PhysRange};

/// What stands behind a run of physical addresses; the order is the order of preference.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Backing {
    /// Bytes of a file.
    File {
        /// Which of the dump's files.
        file: u32,
        /// Offset of the first.
        offset: u64,
    },
    /// Bytes that lie past the end of a file.
    CutOff {
        /// Which of the dump's files.
        file: u32,
    },
    /// None: left out by the writer.
    Absent,
}

#[derive(Clone, Copy, Debug)]
struct Piece {
    start: u64,
    end: u64,
    backing: Backing,
}

/// Disjoint pieces, sorted by address.
#[derive(Default)]
pub(super) struct SegmentMap {
    pieces: Vec<Piece>,
}

impl SegmentMap {
    /// Puts together claims of `(start, end, backing)`; empty ones are dropped.
    pub fn new(claims: Vec<(PhysAddr, PhysAddr, Backing)>) -> Self {
        let rank = |backing: &Backing| match backing {
            Backing::File { .. } => 0,
            Backing::CutOff { .. } => 1,
            Backing::Absent => 2,
        };
        let mut layers: [Vec<Piece>; 3] = Default::default();
        for (start, end, backing) in claims {
            if start < end
                && let Some(layer) = layers.get_mut(rank(&backing))
            {
                layer.push(Piece { start: start.0, end: end.0, backing });
            }
        }
        let mut pieces = Vec::new();
        for mut layer in layers {
            // Stable: of two claims from the same start, the first listed is used.
            layer.sort_by_key(|piece| piece.start);
            pieces = fill_gaps(pieces, &layer);
        }
        Self { pieces }
    }

    /// The backing at `at` and how many bytes it goes on for.
    pub fn find(&self, at: PhysAddr) -> Option<(Backing, u64)> {
        let piece = self.pieces.get(self.pieces.partition_point(|piece| piece.end <= at.0))?;
        let skip = at.0.checked_sub(piece.start)?;
        Some((piece.from(skip).backing, piece.end - at.0))
    }

    /// The memory that has bytes in a file.
    pub fn in_files(&self) -> Vec<PhysRange> {
        let pieces = self.pieces.iter().filter(|piece| matches!(piece.backing, Backing::File { .. }));
        pieces.map(|piece| PhysRange { start: PhysAddr(piece.start), end: PhysAddr(piece.end) }).collect()
    }

    /// How many bytes of memory have a backing of some kind.
    pub fn bytes(&self, kind: impl Fn(&Backing) -> bool) -> u64 {
        let pieces = self.pieces.iter().filter(|piece| kind(&piece.backing));
        pieces.map(|piece| piece.end - piece.start).fold(0, u64::saturating_add)
    }
}

impl Piece {
    /// Without its first `skip` bytes.
    fn from(self, skip: u64) -> Self {
        let backing = match self.backing {
            Backing::File { file, offset } => Backing::File { file, offset: offset.saturating_add(skip) },
            other => other,
        };
        Self { start: self.start.saturating_add(skip), end: self.end, backing }
    }

    fn between(self, start: u64, end: u64) -> Option<Self> {
        let (start, end) = (start.max(self.start), end.min(self.end));
        (start < end).then(|| Self { end, ..self.from(start - self.start) })
    }
}

/// `taken` (disjoint, sorted) with what `new` (sorted) has in its gaps.
fn fill_gaps(taken: Vec<Piece>, new: &[Piece]) -> Vec<Piece> {
    let mut all = Vec::with_capacity(taken.len() + new.len());
    let mut taken = taken.into_iter().peekable();
    // Everything below is settled.
    let mut at = 0;
    for &piece in new {
        while at < piece.end {
            match taken.peek() {
                Some(next) if next.start < piece.end => {
                    all.extend(piece.between(at, next.start));
                    at = at.max(next.end);
                    all.extend(taken.next());
                }
                _ => {
                    all.extend(piece.between(at, piece.end));
                    at = piece.end;
                }
            }
        }
    }
    all.extend(taken);
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matches_a_byte_by_byte_model() {
        let mut seed = 3u32;
        let mut random = |n: u32| {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            u64::from((seed >> 8) % n)
        };
        for _ in 0..500 {
            let mut claims = Vec::new();
            for i in 0..random(8) {
                let start = random(60);
                let end = start + random(20);
                let backing = match random(3) {
                    0 => Backing::CutOff { file: 0 },
                    1 => Backing::Absent,
                    _ => Backing::File { file: 0, offset: 1000 * (i + 1) },
                };
                claims.push((PhysAddr(start), PhysAddr(end), backing));
            }
            let map = SegmentMap::new(claims.clone());
            for at in 0..90 {
                let at = PhysAddr(at);
                let inside: Vec<_> = claims.iter().filter(|(s, e, _)| *s <= at && at < *e).collect();
                let files: Vec<u64> = inside
                    .iter()
                    .filter_map(|(s, _, b)| match b {
                        Backing::File { offset, .. } => Some(offset + (at.0 - s.0)),
                        _ => None,
                    })
                    .collect();
                match map.find(at) {
                    None => assert!(inside.is_empty()),
                    Some((Backing::File { offset, .. }, left)) => {
                        assert!(files.contains(&offset) && left > 0);
                    }
                    Some((other, _)) => {
                        assert!(files.is_empty());
                        let is_cut = |b: Backing| matches!(b, Backing::CutOff { .. });
                        assert_eq!(is_cut(other), inside.iter().any(|(_, _, b)| is_cut(*b)));
                    }
                }
            }
        }
    }
}
