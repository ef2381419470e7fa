//! Reading ahead: who reads a file piece by piece in its order gets most pieces without a system call.
//!
//! One window per thread, over the part of a file that the thread read last. Knows no format, and holds nothing of a
//! file whose owner is gone: every owner has a number of its own. Source: pread(2).

use super::file::{FileRead, ReadAt, Stop};
use std::cell::RefCell;
use std::sync::atomic::{AtomicU64, Ordering};

/// Read ahead when pieces are asked for in the order of the file: sixteen pages, or some fifty compressed ones.
const AHEAD: usize = 64 << 10;
/// Longer pieces are read to where they are wanted: for them it is copying that costs.
const LONG: usize = AHEAD / 4;

/// A number that no other caller gets: by it a window knows whose file it holds.
pub(super) fn new_id() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

thread_local! {
    static WINDOW: RefCell<Window> = RefCell::new(Window::default());
}

/// Fills `buf` from `offset` of `file`, which has the number `id`, as [`ReadAt::read_at`] does.
pub(super) fn read_at(id: u64, file: &dyn ReadAt, offset: u64, buf: &mut [u8]) -> FileRead {
    if buf.len() >= LONG {
        return file.read_at(offset, buf);
    }
    WINDOW.with_borrow_mut(|window| {
        let continues = window.of == id && window.place(offset).is_some();
        if continues && let Fetched { raw, stopped: None } = window.fetch(id, file, offset, buf.len()) {
            buf.copy_from_slice(raw);
            return FileRead::complete(buf.len());
        }
        // To where it is wanted; what is kept of it is only where it ended.
        let read = file.read_at(offset, buf);
        (window.of, window.start, window.filled) = (id, offset.saturating_add(read.filled as u64), 0);
        read
    })
}

/// The part of a file that was read last, as it is there.
#[derive(Default)]
pub(super) struct Window {
    bytes: Vec<u8>,
    of: u64,
    start: u64,
    filled: usize,
}

/// What a read brought.
pub(super) struct Fetched<'a> {
    /// As many bytes as there are.
    pub raw: &'a [u8],
    /// Why they are fewer than were asked for.
    pub stopped: Option<Stop>,
}

impl Window {
    /// The `len` bytes at `offset` of `file`, which has the number `id`.
    pub fn fetch(&mut self, id: u64, file: &dyn ReadAt, offset: u64, len: usize) -> Fetched<'_> {
        let place = self.place(offset).filter(|_| self.of == id);
        if let Some(from) = place
            && let Some(to) = from.checked_add(len).filter(|to| *to <= self.filled)
        {
            let raw = self.bytes.get(from..to).unwrap_or_default();
            return Fetched { raw, stopped: None };
        }
        // It starts where the last read ended.
        let want = if place.is_some() { len.max(AHEAD) } else { len };
        self.bytes.resize(self.bytes.len().max(want), 0);
        let read = file.read_at(offset, self.bytes.get_mut(..want).unwrap_or_default());
        (self.of, self.start, self.filled) = (id, offset, read.filled);
        let have = read.filled.min(len);
        let raw = self.bytes.get(..have).unwrap_or_default();
        Fetched { raw, stopped: read.stopped.filter(|_| have < len) }
    }

    /// How far behind the start of the window `offset` lies: inside it, or at its end.
    fn place(&self, offset: u64) -> Option<usize> {
        let place = offset.checked_sub(self.start).and_then(|place| usize::try_from(place).ok());
        place.filter(|place| *place <= self.filled)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::sync::atomic::AtomicUsize;

    /// A file of words that counts the calls.
    struct Counted(Vec<u8>, AtomicUsize);

    impl ReadAt for Counted {
        fn size(&self) -> u64 {
            self.0.size()
        }
        fn read_at(&self, offset: u64, buf: &mut [u8]) -> FileRead {
            self.1.fetch_add(1, Ordering::Relaxed);
            self.0.read_at(offset, buf)
        }
    }

    fn file(len: u32) -> Counted {
        Counted((0..len / 4).flat_map(u32::to_le_bytes).collect(), AtomicUsize::new(0))
    }

    #[test]
    fn reads_in_any_order_are_those_of_the_file() {
        let files = [(new_id(), file(300_000)), (new_id(), file(150_000))];
        let mut seed = 11u32;
        let mut random = |n: u32| {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (seed >> 8) % n
        };
        let (mut offset, mut chosen) = (0, 0);
        for _ in 0..20_000 {
            match random(8) {
                0 => offset = u64::from(random(310_000)),
                1 => chosen = random(2) as usize,
                _ => {}
            }
            let (id, file) = &files[chosen];
            let most = [10, 5000, 40_000][random(3) as usize];
            let len = random(most) as usize;
            let (mut mine, mut plain) = (vec![0; len], vec![0; len]);
            let read = read_at(*id, file, offset, &mut mine);
            let wanted = file.0.read_at(offset, &mut plain);
            assert_eq!((read.filled, read.stopped.is_some()), (wanted.filled, wanted.stopped.is_some()));
            assert_eq!(mine[..read.filled], plain[..read.filled]);
            offset = offset.saturating_add(read.filled as u64);
        }
    }

    #[test]
    fn pages_in_order_take_few_calls_and_others_one_each() {
        let file = file(1 << 20);
        let id = new_id();
        let mut page = [0; 4096];
        for at in (0..1 << 20).step_by(4096) {
            assert!(read_at(id, &file, at, &mut page).stopped.is_none());
        }
        assert_eq!(file.1.swap(0, Ordering::Relaxed), 1 + (1usize << 20).div_ceil(AHEAD));
        let id = new_id();
        for at in (0..128).rev().map(|n| n * 8192) {
            assert!(read_at(id, &file, at, &mut page).stopped.is_none());
        }
        assert_eq!(file.1.load(Ordering::Relaxed), 128);
    }
}
