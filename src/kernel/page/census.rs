//! All pages of the machine, counted by what they are used for.
//!
//! The vmemmap is read a section at a time, by as many threads as there are processors. What `struct page`s do not
//! tell ([`Owners`]) is collected before. Source: as for [`super::kind`].

use super::kind::{Kind, Marks};
use super::owners::{Block, Owners};
use super::{PageMap, RawPage, SECTION_PAGES, Section};
use crate::addr::{PAGE_SIZE, Pfn, VirtAddr};
use crate::kernel::Kernel;
use crate::parallel;

/// The `struct page`s of one section, as bytes.
pub struct SectionPages<'m> {
    /// Which section.
    pub section: &'m Section,
    map: &'m PageMap,
    bytes: Vec<u8>,
    /// Bytes of the map, in units of a page, that could not be read.
    unread: Vec<bool>,
}

impl SectionPages<'_> {
    fn read<'m>(kernel: &Kernel, map: &'m PageMap, section: &'m Section) -> SectionPages<'m> {
        let len = (SECTION_PAGES * map.page_bytes) as usize;
        let start = map.page(section.start).unwrap_or_default();
        let mut pages = SectionPages {
            section,
            map,
            bytes: vec![0; len],
            unread: vec![false; len.div_ceil(PAGE_SIZE as usize)],
        };
        let mut done = 0;
        while let Some(rest) = pages.bytes.get_mut(done..).filter(|rest| !rest.is_empty()) {
            let read = kernel.read(start.wrapping_add(done as u64), rest);
            done += read.filled;
            if read.stopped.is_some() {
                if let Some(unread) = pages.unread.get_mut(done / PAGE_SIZE as usize) {
                    *unread = true;
                }
                done = (done / PAGE_SIZE as usize + 1) * PAGE_SIZE as usize;
            }
        }
        pages
    }

    /// The words of the page with this number in the section; `None` where they could not be read.
    pub fn get(&self, index: u64) -> Option<RawPage> {
        let at = index.checked_mul(self.map.page_bytes)?;
        let last = at + self.map.page_bytes - 1;
        let readable = |byte: u64| self.unread.get((byte / PAGE_SIZE) as usize) == Some(&false);
        if !(readable(at) && readable(last)) {
            return None;
        }
        self.map.decode(self.bytes.get(at as usize..)?)
    }
}

/// Runs `work` on every section's pages, several at a time; the results are in the order of the sections.
pub fn for_each_section<T: Send>(
    kernel: &Kernel,
    map: &PageMap,
    work: impl Fn(&SectionPages<'_>) -> T + Sync,
) -> Vec<T> {
    parallel::map(&map.sections, 1, |section| work(&SectionPages::read(kernel, map, section)))
}

/// How many pages of each kind there are.
#[derive(Clone, Debug, Default)]
pub struct Census {
    /// (kind, pages, how many of those are tails of compound pages), in the order of [`Kind::ALL`].
    pub kinds: Vec<(Kind, u64, u64)>,
    /// How many pages have each bit of `flags` set, by number of the bit; tails count as they stand in memory.
    pub flags: Vec<u64>,
    /// Pages whose `struct page` could not be read.
    pub unreadable: u64,
    /// Pages marked as hit by a memory error, of whatever kind.
    pub hwpoison: u64,
    /// Broken lists.
    pub problems: Vec<String>,
}

/// What one section holds: by kind in the order of [`Kind::ALL`].
struct Counts {
    kinds: [(u64, u64); Kind::ALL.len()],
    flags: [u64; 64],
    unreadable: u64,
    hwpoison: u64,
}

impl Census {
    /// Counts every page that the kernel has a `struct page` for.
    pub fn take(kernel: &Kernel, map: &PageMap) -> Self {
        let owners = Owners::collect(kernel, map);
        let marks = Marks::new(kernel, map);
        let hwpoison = map.flags.mask("hwpoison");
        let counts = for_each_section(kernel, map, |pages| {
            let mut counts =
                Counts { kinds: [(0, 0); Kind::ALL.len()], flags: [0; 64], unreadable: 0, hwpoison: 0 };
            let mut block: Option<Block> = None;
            each_page(kernel, pages, &marks, |pfn, raw, kind, tail| {
                let Some(kind) = kind else {
                    counts.unreadable += 1;
                    return;
                };
                let mut kind = owners.kind(pfn, kind).unwrap_or(kind);
                if kind == Kind::Unknown {
                    let last = block.filter(|block| pfn.0.wrapping_sub(block.head.0) < 1 << block.order);
                    block = last.or_else(|| owners.block(kernel, map, &marks, pfn));
                    kind = block.map_or(kind, |block| block.kind);
                }
                let slot = counts.kinds.get_mut(kind.index());
                if let Some((pages, tails)) = slot {
                    *pages += 1;
                    *tails += u64::from(tail);
                }
                counts.hwpoison += u64::from(raw.flags & hwpoison != 0);
                let mut left = raw.flags;
                while left != 0
                    && let Some(slot) = counts.flags.get_mut(left.trailing_zeros() as usize)
                {
                    *slot += 1;
                    left &= left - 1;
                }
            });
            counts
        });
        let mut census = Self { problems: owners.problems, ..Self::default() };
        for (index, kind) in Kind::ALL.into_iter().enumerate() {
            let of = |one: &Counts| one.kinds.get(index).copied().unwrap_or_default();
            let pages = counts.iter().map(|one| of(one).0).sum();
            census.kinds.push((kind, pages, counts.iter().map(|one| of(one).1).sum()));
        }
        let with_flag = |bit: usize| counts.iter().filter_map(|one| one.flags.get(bit)).sum();
        census.flags = (0..64).map(with_flag).collect();
        census.unreadable = counts.iter().map(|one| one.unreadable).sum();
        census.hwpoison = counts.iter().map(|one| one.hwpoison).sum();
        census
    }

    /// All pages counted, unreadable ones included.
    pub fn total(&self) -> u64 {
        self.kinds.iter().map(|(_, pages, _)| pages).sum::<u64>() + self.unreadable
    }
}

impl Kind {
    /// Its place in [`Self::ALL`].
    fn index(self) -> usize {
        Self::ALL.iter().position(|&kind| kind == self).unwrap_or(0)
    }
}

/// Calls `visit` for every page of a section with its words, its kind (`None`: unreadable) and whether it is a tail.
/// A tail's kind is its head's; pages inside a free block are free.
pub fn each_page(
    kernel: &Kernel,
    pages: &SectionPages<'_>,
    marks: &Marks,
    mut visit: impl FnMut(Pfn, &RawPage, Option<Kind>, bool),
) {
    let (map, start) = (pages.map, pages.section.start);
    let mut free_until = 0;
    // Tails follow their head, so the last head seen is nearly always the one.
    let mut last_head = (VirtAddr(0), Kind::Unknown);
    let base = map.page(start).unwrap_or_default();
    for index in 0..SECTION_PAGES {
        let pfn = Pfn(start.0 + index);
        let Some(raw) = pages.get(index) else {
            visit(pfn, &RawPage::default(), None, false);
            continue;
        };
        if index < free_until {
            visit(pfn, &raw, Some(Kind::Free), false);
            continue;
        }
        let at = base.wrapping_add(index * map.page_bytes);
        let second = |index: u64| {
            let beyond = || map.read(kernel, map.page(Pfn(start.0 + index + 1))?).ok();
            if index + 1 < SECTION_PAGES { pages.get(index + 1) } else { beyond() }
        };
        if let Some(head) = map.head(at, &raw, || second(index)) {
            if last_head.0 != head {
                let inside = head.0.wrapping_sub(base.0) / map.page_bytes;
                let (words, next) = if head >= base && inside < SECTION_PAGES {
                    (pages.get(inside), second(inside))
                } else {
                    (map.read(kernel, head).ok(), super::kind::second(kernel, map, head))
                };
                last_head = (head, words.map_or(Kind::Unknown, |words| marks.kind(map, &words, || next)));
            }
            visit(pfn, &raw, Some(last_head.1), true);
            continue;
        }
        let kind = marks.kind(map, &raw, || second(index));
        if kind == Kind::Free {
            free_until = index + (1 << raw.private.min(10));
        }
        if marks.is_head(&raw) {
            last_head = (at, kind);
        }
        visit(pfn, &raw, Some(kind), false);
    }
}
