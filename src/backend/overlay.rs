//! Pages that were copied at one moment, over the memory of a machine that has gone on since.

use super::live::LiveControl;
use super::{Backend, Fact, SavedCpu};
use crate::addr::{PAGE_SIZE, PhysAddr, PhysRange};
use crate::memory::{PhysicalMemory, ReadOutcome};
use std::collections::HashMap;
use std::sync::Arc;

/// A machine of which some pages are as they were.
pub struct Overlay {
    under: Arc<dyn Backend>,
    pages: HashMap<u64, Box<[u8; PAGE_SIZE as usize]>>,
}

impl Overlay {
    /// Copies the pages that begin at `pages`; those that cannot be read stay what they are.
    pub fn copy(under: Arc<dyn Backend>, pages: impl IntoIterator<Item = PhysAddr>) -> Self {
        let copy = |page: PhysAddr| {
            let mut bytes = Box::new([0; PAGE_SIZE as usize]);
            under.read_phys_exact(page, &mut *bytes).ok().map(|()| (page.0, bytes))
        };
        let pages = pages.into_iter().filter_map(|page| copy(page.page_start())).collect();
        Self { under, pages }
    }
}

impl PhysicalMemory for Overlay {
    fn read_phys(&self, at: PhysAddr, buf: &mut [u8]) -> ReadOutcome {
        let mut filled = 0;
        while filled < buf.len() {
            let here = PhysAddr(at.0.wrapping_add(filled as u64));
            // What is under is read up to the next page that was copied.
            let mut len = (here.left_in_page() as usize).min(buf.len() - filled);
            let page = self.pages.get(&here.page_start().0);
            if page.is_none() {
                while filled + len < buf.len()
                    && !self.pages.contains_key(
                        &here.page_start().0.wrapping_add((here.page_offset() as usize + len) as u64),
                    )
                {
                    len = (len + PAGE_SIZE as usize).min(buf.len() - filled);
                }
            }
            let Some(to) = buf.get_mut(filled..filled + len) else { break };
            match page.and_then(|page| page.get(here.page_offset() as usize..)?.get(..len)) {
                Some(bytes) => to.copy_from_slice(bytes),
                None => {
                    let outcome = self.under.read_phys(here, to);
                    if outcome.stopped.is_some() {
                        return ReadOutcome { filled: filled + outcome.filled, ..outcome };
                    }
                }
            }
            filled += len;
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
        let overlay = Overlay::copy(machine.clone(), [PhysAddr(4096), PhysAddr(3 * 4096), PhysAddr(1 << 40)]);
        fill(2);
        let mut all = [0; 5 * 4096 - 1];
        assert_eq!(overlay.read_phys(PhysAddr(1), &mut all), ReadOutcome::complete(all.len()));
        for (i, byte) in all.iter().enumerate() {
            let page = (i + 1) / 4096;
            assert_eq!(*byte, if page == 1 || page == 3 { 1 } else { 2 }, "{i}");
        }
        // It stops where what is under stops.
        let mut beyond = [0; 8192];
        let outcome = overlay.read_phys(PhysAddr(4 * 4096 - 10), &mut beyond);
        assert_eq!((outcome.filled, outcome.stopped.unwrap().at), (4106, PhysAddr(5 * 4096)));
    }
}
