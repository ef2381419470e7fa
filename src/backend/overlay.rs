//! Pages that were copied at one moment, over the memory of a machine that has gone on since.

use super::live::LiveControl;
use super::{Backend, Fact, SavedCpu};
use crate::addr::{PAGE_SIZE, PhysAddr, PhysRange, join_ranges};
use crate::memory::{PhysicalMemory, ReadOutcome};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Pages as they were at one moment.
#[derive(Default)]
pub struct Copies {
    /// Pages that follow one another, by the address of the first.
    runs: BTreeMap<PhysAddr, Vec<u8>>,
}

impl Copies {
    /// Room for the pages that begin at `pages`, for [`Self::fill`].
    pub fn with_room(pages: &BTreeSet<PhysAddr>) -> Self {
        let ranges = pages.iter().filter_map(|page| PhysRange::new(page.page_start(), PAGE_SIZE)).collect();
        // Written to, so that the system hands it out now and not when it is filled.
        let room = |range: PhysRange| (range.start, vec![u8::MAX; range.len() as usize]);
        Self { runs: join_ranges(ranges).into_iter().map(room).collect() }
    }

    /// Copies what there is room for; pages that cannot be read are left out.
    pub fn fill(&mut self, from: &dyn PhysicalMemory) {
        const PAGE: usize = PAGE_SIZE as usize;
        for (start, mut bytes) in std::mem::take(&mut self.runs) {
            let mut done = 0;
            while let Some(rest) = bytes.get_mut(done..).filter(|rest| !rest.is_empty()) {
                let (here, wanted) = (start.wrapping_add(done as u64), rest.len());
                let filled = from.read_phys(here, rest).filled;
                let whole = filled - filled % PAGE;
                if done == 0 && whole == wanted {
                    self.runs.insert(start, bytes);
                    break;
                }
                if let Some(read) = rest.get(..whole).filter(|read| !read.is_empty()) {
                    self.runs.insert(here, read.to_vec());
                }
                done += if whole < wanted { whole + PAGE } else { whole };
            }
        }
    }

    /// Copies more pages, but for those that are copied.
    pub fn add(&mut self, from: &dyn PhysicalMemory, mut pages: BTreeSet<PhysAddr>) {
        pages.retain(|page| self.from(page.page_start()).is_none());
        let mut more = Self::with_room(&pages);
        more.fill(from);
        self.runs.append(&mut more.runs);
    }

    /// What was copied from `at` on, to the end of its run.
    fn from(&self, at: PhysAddr) -> Option<&[u8]> {
        let (start, bytes) = self.runs.range(..=at).next_back()?;
        let into = usize::try_from(at.offset_from(*start)?).ok()?;
        bytes.get(into..).filter(|rest| !rest.is_empty())
    }

    /// Where behind `at` the next run begins.
    fn next(&self, at: PhysAddr) -> Option<PhysAddr> {
        self.runs.range(at..).next().map(|(start, _)| *start)
    }
}

/// A machine of which some pages are as they were.
pub struct Overlay {
    under: Arc<dyn Backend>,
    copies: Copies,
}

impl Overlay {
    /// `under` with `copies` in place of its own.
    pub fn new(under: Arc<dyn Backend>, copies: Copies) -> Self {
        Self { under, copies }
    }
}

impl PhysicalMemory for Overlay {
    fn read_phys(&self, at: PhysAddr, buf: &mut [u8]) -> ReadOutcome {
        let mut filled = 0;
        while let Some(rest) = buf.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            let here = at.wrapping_add(filled as u64);
            match self.copies.from(here) {
                Some(copied) => {
                    let len = copied.len().min(rest.len());
                    rest.iter_mut().zip(copied).for_each(|(to, from)| *to = *from);
                    filled += len;
                }
                None => {
                    let left = self.copies.next(here).and_then(|next| next.offset_from(here));
                    let len = left.map_or(rest.len(), |left| {
                        rest.len().min(usize::try_from(left).unwrap_or(usize::MAX))
                    });
                    let outcome = self.under.read_phys(here, rest.get_mut(..len).unwrap_or_default());
                    filled += outcome.filled;
                    if outcome.stopped.is_some() {
                        return ReadOutcome { filled, ..outcome };
                    }
                }
            }
        }
        ReadOutcome::complete(filled)
    }

    fn ranges(&self) -> Vec<PhysRange> {
        self.under.ranges()
    }

    fn stored_ranges(&self) -> Vec<PhysRange> {
        self.under.stored_ranges()
    }

    fn is_ram(&self, at: PhysAddr) -> bool {
        self.under.is_ram(at)
    }
}

impl Backend for Overlay {
    fn saved_cpus(&self) -> &[SavedCpu] {
        self.under.saved_cpus()
    }

    fn vmcoreinfo_note(&self) -> Option<&[u8]> {
        self.under.vmcoreinfo_note()
    }

    fn phys_base_hints(&self) -> Vec<u64> {
        self.under.phys_base_hints()
    }

    fn facts(&self) -> Vec<Fact> {
        self.under.facts()
    }

    fn problems(&self) -> Vec<String> {
        self.under.problems()
    }

    fn has_gone_on(&self) -> bool {
        self.under.has_gone_on()
    }

    fn live(&self) -> Option<&dyn LiveControl> {
        self.under.live()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::memory::MemoryImage;
    use std::sync::Mutex;

    struct Changing(Mutex<MemoryImage>);

    impl PhysicalMemory for Changing {
        fn read_phys(&self, at: PhysAddr, buf: &mut [u8]) -> ReadOutcome {
            self.0.lock().unwrap().read_phys(at, buf)
        }
        fn ranges(&self) -> Vec<PhysRange> {
            self.0.lock().unwrap().ranges()
        }
    }

    impl Backend for Changing {
        fn saved_cpus(&self) -> &[SavedCpu] {
            &[]
        }
        fn vmcoreinfo_note(&self) -> Option<&[u8]> {
            None
        }
        fn phys_base_hints(&self) -> Vec<u64> {
            vec![]
        }
        fn facts(&self) -> Vec<Fact> {
            vec![]
        }
        fn problems(&self) -> Vec<String> {
            vec![]
        }
    }

    #[test]
    fn copied_pages_stay_and_others_change() {
        let machine = Arc::new(Changing(Mutex::new(MemoryImage::new())));
        let fill = |byte| machine.0.lock().unwrap().write(PhysAddr(0), &[byte; 5 * 4096]);
        fill(1);
        let pages = |numbers: &[u64]| numbers.iter().map(|number| PhysAddr(number * 4096)).collect();
        let mut copies = Copies::with_room(&pages(&[1, 4, 5, 1 << 28]));
        copies.fill(&*machine);
        copies.add(&*machine, pages(&[3, 1 << 29]));
        fill(2);
        // What is copied is not copied again.
        copies.add(&*machine, pages(&[1, 4]));
        assert_eq!(copies.runs.values().map(Vec::len).sum::<usize>(), 3 * 4096);
        let overlay = Overlay::new(machine.clone(), copies);
        let mut all = [0; 5 * 4096 - 1];
        assert_eq!(overlay.read_phys(PhysAddr(1), &mut all), ReadOutcome::complete(all.len()));
        for (i, byte) in all.iter().enumerate() {
            let page = (i + 1) / 4096;
            assert_eq!(*byte, if [1, 3, 4].contains(&page) { 1 } else { 2 }, "{i}");
        }
        // Nothing of it can be read: that takes no longer than its length.
        let mut nothing = Copies::with_room(&pages(&(1 << 29..(1 << 29) + 20_000).collect::<Vec<_>>()));
        nothing.fill(&*machine);
        assert!(nothing.runs.is_empty());
        // It stops where what is under stops, and where what was copied does.
        let mut beyond = [0; 8192];
        let outcome = overlay.read_phys(PhysAddr(4 * 4096 - 10), &mut beyond);
        assert_eq!((outcome.filled, outcome.stopped.unwrap().at), (4106, PhysAddr(5 * 4096)));
    }
}
