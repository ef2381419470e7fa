//! Scanning RAM for VMCOREINFO texts, on all cores, stopping as soon as one is proven.

use super::Progress;
use crate::addr::{PAGE_SIZE, PhysAddr, PhysRange};
use crate::backend::Backend;
use crate::vmcoreinfo::VmcoreInfo;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError, mpsc};
use std::time::Duration;

/// The first key of the text since Linux commit fd59d231f81c ("Add vmcoreinfo") (in v2.6.24).
const NEEDLE: &[u8] = b"OSRELEASE=";
/// One unit of work: small enough that both cores end together, large enough for sequential reads.
const CHUNK: u64 = 1 << 20;
/// The kernel's text is one page (`VMCOREINFO_BYTES`); room for growth.
const TEXT_MAX: usize = 16 << 10;
/// Hostile RAM can hold the needle everywhere. A busy guest has tens: in logs, page cache and programs.
const MAX_NEEDLES: usize = 16384;

/// Calls `visit` with each VMCOREINFO text in RAM that names a kernel's page tables, lowest first, until it returns true:
/// of the copies that a kernel keeps, the same one is the first each time.
pub fn for_each_vmcoreinfo(
    backend: &dyn Backend,
    progress: Progress<'_>,
    visit: &mut dyn FnMut(PhysAddr, VmcoreInfo) -> bool,
) {
    let ranges = backend.stored_ranges();
    let total = ranges.iter().map(PhysRange::len).fold(0, u64::saturating_add);
    let chunks = Mutex::new(ranges.iter().flat_map(chunks_of).enumerate());
    let needles = AtomicUsize::new(0);
    let done = AtomicU64::new(0);
    let stop = AtomicBool::new(false);
    let workers = std::thread::available_parallelism().map_or(1, |n| n.get().min(16));
    let (sender, scanned) = mpsc::sync_channel(64);
    std::thread::scope(|scope| {
        for _ in 0..workers {
            let sender = sender.clone();
            let (chunks, needles, done, stop) = (&chunks, &needles, &done, &stop);
            scope.spawn(move || {
                let mut buf = vec![0; CHUNK as usize + NEEDLE.len()];
                while let Some((index, chunk)) = next_of(chunks) {
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                    let mut hits = Vec::new();
                    let mut report = |at, is_text| {
                        if is_text {
                            hits.push(at);
                        }
                        needles.fetch_add(1, Ordering::Relaxed) < MAX_NEEDLES
                    };
                    let whole = scan_chunk(backend, &chunk, &mut buf, &mut report);
                    if sender.send((index, hits)).is_err() || !whole {
                        return;
                    }
                    done.fetch_add(chunk.len(), Ordering::Relaxed);
                }
            });
        }
        drop(sender);
        let mut take = |hits: Vec<PhysAddr>| {
            hits.into_iter().any(|at| text_at(backend, at).is_some_and(|info| visit(at, info)))
        };
        // What was scanned before its turn, and whose turn it is.
        let (mut early, mut next, mut taken) = (BTreeMap::new(), 0, false);
        // Receiving ends when every worker has; dropping `scanned` makes their sends fail, which ends them.
        while !taken {
            progress(done.load(Ordering::Relaxed), total);
            match scanned.recv_timeout(Duration::from_millis(50)) {
                Ok((index, hits)) => drop(early.insert(index, hits)),
                Err(mpsc::RecvTimeoutError::Timeout) => {}
                Err(mpsc::RecvTimeoutError::Disconnected) => break,
            }
            while let Some(hits) = early.remove(&next).filter(|_| !taken) {
                taken = take(hits);
                next += 1;
            }
        }
        stop.store(true, Ordering::Relaxed);
        drop(scanned);
        if !taken {
            // A worker that gave up has left a gap, which keeps nothing behind it.
            let _ = early.into_values().any(take);
        }
    });
}

/// Splits a range into units of work, lowest first: the order in which a dump file has them.
fn chunks_of(range: &PhysRange) -> impl Iterator<Item = PhysRange> + use<> {
    let end = range.end;
    std::iter::successors(Some(range.start), |start| start.checked_add(CHUNK))
        .take_while(move |&start| start < end)
        .map(move |start| PhysRange {
            start,
            end: start.checked_add(CHUNK).map_or(end, |next| next.min(end)),
        })
}

/// The next unit of work; a worker that died leaves the rest to the others.
fn next_of<T>(chunks: &Mutex<impl Iterator<Item = T>>) -> Option<T> {
    chunks.lock().unwrap_or_else(PoisonError::into_inner).next()
}

/// Reports each needle that begins in `chunk`, and whether it is a text; false when `report` wants no more.
fn scan_chunk(
    backend: &dyn Backend,
    chunk: &PhysRange,
    buf: &mut [u8],
    report: &mut dyn FnMut(PhysAddr, bool) -> bool,
) -> bool {
    let finder = memchr::memmem::Finder::new(NEEDLE);
    let mut at = chunk.start;
    while at < chunk.end {
        // The needle may straddle two chunks, so read a little past this one's end.
        let want = (chunk.end.0 - at.0) as usize + NEEDLE.len() - 1;
        let Some(window) = buf.get_mut(..want) else { return true };
        let read = backend.read_phys(at, window);
        let readable = window.get(..read.filled).unwrap_or_default();
        for position in finder.find_iter(readable) {
            let hit = PhysAddr(at.0 + position as u64);
            if hit < chunk.end && !report(hit, text_at(backend, hit).is_some()) {
                return false;
            }
        }
        // Go on behind the hole: at the next page.
        let Some(resume) = PhysAddr(at.0 + read.filled as u64).page_start().checked_add(PAGE_SIZE) else {
            return true;
        };
        at = if read.stopped.is_some() { resume } else { chunk.end };
    }
    true
}

/// The text at `at`, if it is one: user programs hold the format string, and half-overwritten copies exist.
fn text_at(backend: &dyn Backend, at: PhysAddr) -> Option<VmcoreInfo> {
    // The kernel's text begins with two lines like these; a needle without them costs no more than this.
    let mut start = [0; 128];
    let filled = backend.read_phys(at, &mut start).filled;
    let first = start.get(..filled)?.split(|&b| b == b'\n').next()?;
    if first.len() == filled || !first.iter().all(u8::is_ascii_graphic) {
        return None;
    }
    let mut text = vec![0; TEXT_MAX];
    let filled = backend.read_phys(at, &mut text).filled;
    text.truncate(filled);
    let end = text.iter().position(|&b| b == 0 || !(b == b'\n' || (b' '..=b'~').contains(&b)));
    text.truncate(end.unwrap_or(filled));
    let info = VmcoreInfo::parse(&text);
    let named =
        ["swapper_pg_dir", "init_top_pgt", "init_level4_pgt"].iter().any(|n| info.symbol(n).is_some());
    (named && info.release().is_some()).then_some(info)
}
