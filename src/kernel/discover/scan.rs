//! Scanning RAM for VMCOREINFO texts, on all cores, stopping as soon as one is proven.

use super::Progress;
use crate::addr::{PhysAddr, PhysRange};
use crate::backend::Backend;
use crate::vmcoreinfo::VmcoreInfo;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::Duration;

/// The first key of the text since Linux commit fd59d231f81c ("Add vmcoreinfo") (in v2.6.24).
const NEEDLE: &[u8] = b"OSRELEASE=";
/// One unit of work: small enough that both cores end together, large enough for sequential reads.
const CHUNK: u64 = 4 << 20;
/// The kernel's text is one page (`VMCOREINFO_BYTES`); room for growth.
const TEXT_MAX: usize = 16 << 10;
/// Hostile RAM can hold the needle everywhere; past so many texts more will not help.
const MAX_HITS: usize = 4096;

/// Calls `visit` with each VMCOREINFO text in RAM that names a kernel's page tables, until it returns true.
/// The order is not that of addresses.
pub fn for_each_vmcoreinfo(
    backend: &dyn Backend,
    progress: Progress<'_>,
    visit: &mut dyn FnMut(PhysAddr, VmcoreInfo) -> bool,
) {
    let chunks = chunks(&backend.ranges());
    let total: u64 = chunks.iter().map(PhysRange::len).sum();
    let next = AtomicUsize::new(0);
    let done = AtomicU64::new(0);
    let stop = AtomicBool::new(false);
    let workers = std::thread::available_parallelism().map_or(1, |n| n.get().min(16));
    let (sender, hits) = mpsc::sync_channel(64);
    std::thread::scope(|scope| {
        for _ in 0..workers {
            let sender = sender.clone();
            let (chunks, next, done, stop) = (&chunks, &next, &done, &stop);
            scope.spawn(move || {
                let mut buf = vec![0; CHUNK as usize + NEEDLE.len()];
                while let Some(chunk) = chunks.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                    if !scan_chunk(backend, chunk, &mut buf, &mut |hit| sender.send(hit).is_ok()) {
                        return;
                    }
                    done.fetch_add(chunk.len(), Ordering::Relaxed);
                }
            });
        }
        drop(sender);
        let mut seen = 0;
        // Receiving ends when every worker has; dropping `hits` makes their sends fail, which ends them.
        loop {
            progress(done.load(Ordering::Relaxed), total);
            match hits.recv_timeout(Duration::from_millis(50)) {
                Ok((at, info)) => {
                    seen += 1;
                    if visit(at, info) || seen >= MAX_HITS {
                        break;
                    }
                }
                Err(mpsc::RecvTimeoutError::Timeout) => {}
                Err(mpsc::RecvTimeoutError::Disconnected) => break,
            }
        }
        stop.store(true, Ordering::Relaxed);
        drop(hits);
    });
}

/// Splits RAM into units of work, lowest first: the order in which a dump file has them.
fn chunks(ranges: &[PhysRange]) -> Vec<PhysRange> {
    let mut chunks = Vec::new();
    for range in ranges {
        let mut start = range.start;
        while start < range.end {
            let end = start.checked_add(CHUNK).map_or(range.end, |end| end.min(range.end));
            chunks.push(PhysRange { start, end });
            start = end;
        }
    }
    chunks
}

/// Reports the texts that begin in `chunk`; false when `report` wants no more.
fn scan_chunk(
    backend: &dyn Backend,
    chunk: &PhysRange,
    buf: &mut [u8],
    report: &mut dyn FnMut((PhysAddr, VmcoreInfo)) -> bool,
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
            if let Some(info) = text_at(backend, hit).filter(|_| hit < chunk.end)
                && !report((hit, info))
            {
                return false;
            }
        }
        // Go on behind the hole: at the next page.
        let Some(resume) =
            PhysAddr(at.0 + read.filled as u64).page_start().checked_add(crate::addr::PAGE_SIZE)
        else {
            return true;
        };
        at = if read.stopped.is_some() { resume } else { chunk.end };
    }
    true
}

/// The text at `at`, if it is one: user programs hold the format string, and half-overwritten copies exist.
fn text_at(backend: &dyn Backend, at: PhysAddr) -> Option<VmcoreInfo> {
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
