//! A guest at one moment: its registers of then, over its memory.
//!
//! While the guest stands still its pages are cached for half a second; while it runs they are, too, but for some
//! milliseconds only: what is read is never older than that, and a walk over many small objects costs no system call for each. From the
//! moment it stops, goes on, or something changes it, each read is of what its memory then holds. Knows nothing of
//! sockets.

use super::guest::Guest;
use super::memory::Memory;
use super::state::is_passing;
use crate::addr::{PAGE_SIZE, PhysAddr, PhysRange};
use crate::backend::live::{LiveControl, RunState};
use crate::backend::{Backend, Fact, SavedCpu};
use crate::bytes::ByteSize;
use crate::memory::{PageCache, PhysicalMemory, ReadOutcome};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Memory for pages of a guest that stands still.
const CACHE_BYTES: u64 = 64 << 20;
/// How old a page of a guest that runs may be.
const RUNNING_AGE: Duration = Duration::from_millis(10);
/// How old one of a guest that stands may be: QEMU does not say when a snapshot is loaded into it.
const STANDING_AGE: Duration = Duration::from_millis(500);
/// Reads of more than this are not worth caching: they are scans.
const LONGEST_CACHED: usize = 16 << 10;

/// A guest and its registers at one moment.
pub struct Snapshot {
    guest: Arc<Guest>,
    memory: Arc<Memory>,
    cpus: Vec<SavedCpu>,
    state: RunState,
    generation: u64,
    taken: Instant,
    cache: PageCache,
}

impl Snapshot {
    /// `generation` is the guest's from before its registers were read.
    pub(super) fn new(
        guest: Arc<Guest>,
        memory: Arc<Memory>,
        cpus: Vec<SavedCpu>,
        state: RunState,
        generation: u64,
    ) -> Self {
        let cache = PageCache::new(CACHE_BYTES, PAGE_SIZE);
        Self { guest, memory, cpus, state, generation, taken: Instant::now(), cache }
    }

    pub(super) fn state(&self) -> RunState {
        self.state
    }

    pub(super) fn generation(&self) -> u64 {
        self.generation
    }

    /// The same guest, stopped by us, with other registers and nothing cached.
    pub(super) fn stopped_at(&self, generation: u64, cpus: Vec<SavedCpu>) -> Self {
        let (guest, memory) = (Arc::clone(&self.guest), Arc::clone(&self.memory));
        Self::new(guest, memory, cpus, RunState::Stopped("paused"), generation)
    }

    /// The name under which a page is cached now, as long as what is cached is what the guest has: its frame number,
    /// below the number of the age in which it was read.
    fn cached_as(&self, at: PhysAddr) -> Option<u64> {
        const FRAME_BITS: u32 = 40;
        // While its memory arrives, pages change though nothing runs.
        if self.guest.generation() != self.generation || is_passing(self.state) {
            return None;
        }
        let longest = match self.state {
            RunState::Running => RUNNING_AGE,
            RunState::Stopped(_) => STANDING_AGE,
        };
        let age = self.taken.elapsed().as_millis() / longest.as_millis();
        let frame = at.0 / PAGE_SIZE;
        // No processor has more physical address bits than 52.
        (frame >> FRAME_BITS == 0).then_some((age as u64) << FRAME_BITS | frame)
    }

    /// What memory holds, breakpoints included.
    fn read(&self, at: PhysAddr, buf: &mut [u8]) -> ReadOutcome {
        if buf.len() > LONGEST_CACHED {
            return self.memory.read(at, buf);
        }
        let mut filled = 0;
        while let Some(rest) = buf.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            let here = at.wrapping_add(filled as u64);
            let len = rest.len().min(here.left_in_page() as usize);
            let outcome = self.read_in_page(here, rest.get_mut(..len).unwrap_or_default());
            filled += outcome.filled;
            if outcome.stopped.is_some() {
                return ReadOutcome { filled, stopped: outcome.stopped };
            }
        }
        ReadOutcome::complete(filled)
    }

    /// Fills the part of `buf` that lies in one page, or says why not all of it.
    fn read_in_page(&self, at: PhysAddr, buf: &mut [u8]) -> ReadOutcome {
        let Some(name) = self.cached_as(at) else { return self.memory.read(at, buf) };
        let offset = at.page_offset() as usize;
        let page = self.cache.get(name).or_else(|| {
            let mut page = vec![0; PAGE_SIZE as usize];
            let whole = self.memory.read(at.page_start(), &mut page).stopped.is_none();
            let page: Arc<[u8]> = page.into();
            // Read while it went on, it may be of any moment.
            if whole && self.cached_as(at) == Some(name) {
                self.cache.insert(name, Arc::clone(&page));
            }
            whole.then_some(page)
        });
        match page.as_ref().and_then(|page| page.get(offset..offset + buf.len())) {
            Some(bytes) => {
                buf.copy_from_slice(bytes);
                ReadOutcome::complete(buf.len())
            }
            // A page that is not RAM to its end.
            None => self.memory.read(at, buf),
        }
    }
}

impl PhysicalMemory for Snapshot {
    fn read_phys(&self, at: PhysAddr, buf: &mut [u8]) -> ReadOutcome {
        let outcome = self.read(at, buf);
        self.guest.without_breakpoints(at, buf.get_mut(..outcome.filled).unwrap_or_default());
        outcome
    }

    fn ranges(&self) -> Vec<PhysRange> {
        self.memory.ranges().to_vec()
    }

    fn is_ram(&self, at: PhysAddr) -> bool {
        self.memory.contains(at)
    }
}

impl Backend for Snapshot {
    fn saved_cpus(&self) -> &[SavedCpu] {
        &self.cpus
    }

    fn vmcoreinfo_note(&self) -> Option<&[u8]> {
        None
    }

    fn phys_base_hints(&self) -> Vec<u64> {
        Vec::new()
    }

    fn facts(&self) -> Vec<Fact> {
        let state = match self.state {
            RunState::Running => "running: registers and memory are of about the same moment",
            RunState::Stopped(why) => why,
        };
        let ways = self.memory.ways().into_iter().map(|(way, bytes)| format!("{way} ({})", ByteSize(bytes)));
        vec![
            Fact { name: "format", value: format!("live guest of QEMU {}", self.guest.version()) },
            Fact { name: "accelerator", value: self.guest.accelerator().to_owned() },
            Fact { name: "qmp", value: self.guest.address().to_string() },
            Fact { name: "state", value: state.to_owned() },
            Fact { name: "memory", value: ways.collect::<Vec<_>>().join(", ") },
        ]
    }

    fn problems(&self) -> Vec<String> {
        self.memory.problems().to_vec()
    }

    fn has_gone_on(&self) -> bool {
        self.state == RunState::Running || self.guest.generation() != self.generation
    }

    fn live(&self) -> Option<&dyn LiveControl> {
        Some(&*self.guest)
    }
}
