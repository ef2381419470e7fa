//! Pages whose use their `struct page` does not tell: who holds them tells it.
//!
//! Knows the CPUs' free lists, vmalloc's areas, per-CPU memory, the kernel's own page tables, tasks' first tables, the
//! vmemmap, the image and ftrace's records. Other holders are not looked for: their pages stay "kernel".
//! Source: `mm/percpu.c`, `mm/sparse-vmemmap.c`, `arch/x86/mm/pgtable.c` (`_pgd_alloc`), `kernel/trace/ftrace.c`.

use super::kind::{Kind, Marks};
use super::{PageMap, RawPage, SECTION_PAGES};
use crate::addr::{PAGE_SIZE, Pfn, PhysAddr, VirtAddr};
use crate::bytes::u64_at;
use crate::kernel::{Kernel, ObjectError};
use std::collections::{HashMap, HashSet};
use std::ops::Range;

/// `MAX_PAGE_ORDER`.
const ORDER_MAX: u32 = 10;
/// More page tables than the kernel's half has on the largest machines.
const TABLES_MAX: usize = 1 << 18;
/// More groups of records than ftrace has: one for the image, and one for each module.
const FTRACE_MAX: usize = 1 << 14;

/// Pages whose kind their `struct page` does not tell.
#[derive(Default)]
pub struct Owners {
    pages: HashMap<Pfn, Kind>,
    /// Large pieces, none of them in another: first frame, and one past the last.
    pieces: Vec<(Range<u64>, Kind)>,
    /// Lists and areas that are broken.
    pub problems: Vec<String>,
}

/// Several pages that were allocated at once without being a compound page: only the first has a reference count.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Block {
    /// Its first page.
    pub head: Pfn,
    /// Log2 of its pages.
    pub order: u32,
    /// What it is used for.
    pub kind: Kind,
}

impl Owners {
    /// Looks through all that is known to hold pages.
    pub fn collect(kernel: &Kernel, map: &PageMap) -> Self {
        let mut owners = Self::default();
        // Where two say something, the later is the more particular.
        if let Err(error) = owners.ftrace(kernel, map) {
            owners.problems.push(format!("records of ftrace: {error}"));
        }
        owners.tables(kernel, map);
        for zone in kernel.zones().unwrap_or_default() {
            for (_, lists) in zone.per_cpu_lists(map) {
                owners.problems.extend(lists.problems);
                for block in lists.blocks {
                    owners.put(block.pfn, 1 << block.order.min(18), Kind::FreePerCpu);
                }
            }
        }
        for (pfn, kind) in kernel.vmalloc_pages(map, &mut owners.problems) {
            owners.pages.insert(pfn, kind);
        }
        for pfn in kernel.first_percpu_chunk(map) {
            owners.pages.insert(pfn, Kind::PerCpu);
        }
        for pfn in zero_pages(kernel, map) {
            owners.pages.insert(pfn, Kind::Zero);
        }
        if let (Some(start), Some(end)) = (image_end(kernel, "_text"), image_end(kernel, "_end")) {
            owners.pieces.push((start.pfn().0..end.0.div_ceil(PAGE_SIZE), Kind::Image));
        }
        owners.pieces.sort_by_key(|(frames, _)| frames.start);
        owners
    }

    fn put(&mut self, first: Pfn, count: u64, kind: Kind) {
        self.pages.extend((0..count).map(|i| (Pfn(first.0.wrapping_add(i)), kind)));
    }

    /// The kind of a page that its own words call `own`, where something else tells more.
    pub fn kind(&self, pfn: Pfn, own: Kind) -> Option<Kind> {
        if !matches!(own, Kind::Kernel | Kind::Unknown | Kind::Reserved) {
            // A slab or page table in vmalloc's hands is still what it is.
            return None;
        }
        let listed = self.pages.get(&pfn).copied();
        listed.or_else(|| {
            // What the image and the vmemmap gave back to the allocator is no longer reserved.
            let at = self.pieces.partition_point(|(frames, _)| frames.start <= pfn.0).checked_sub(1)?;
            let (frames, kind) = self.pieces.get(at)?;
            (frames.contains(&pfn.0) && own == Kind::Reserved).then_some(*kind)
        })
    }

    /// The block that a page without references lies in, if it is not its first.
    pub fn block(&self, kernel: &Kernel, map: &PageMap, marks: &Marks, pfn: Pfn) -> Option<Block> {
        let read = |pfn: Pfn| map.read(kernel, map.page(pfn)?).ok();
        let kind_of = |raw: &RawPage, pfn: Pfn| {
            let own = if raw.compound & 1 == 1 { return None } else { marks.kind(map, raw, || None) };
            Some((own, self.kind(pfn, own).unwrap_or(own)))
        };
        let is_rest = |pfn: Pfn| {
            let raw = read(pfn).filter(|raw| raw.refcount == 0);
            raw.and_then(|raw| kind_of(&raw, pfn))
                .is_some_and(|(own, kind)| own == Kind::Unknown && kind == own)
        };
        if !is_rest(pfn) {
            return None;
        }
        // The first page has the lowest number that the order allows, so it is met before any other with references.
        let head = (1..=ORDER_MAX)
            .map(|order| Pfn(pfn.0 & !((1 << order) - 1)))
            .find(|&head| head != pfn && read(head).is_none_or(|raw| raw.refcount != 0))?;
        let first = read(head)?;
        let (own, kind) = kind_of(&first, head)?;
        if own != Kind::Kernel || marks.is_head(&first) || kind == Kind::FreePerCpu {
            return None;
        }
        let most = 1u64 << head.0.trailing_zeros().min(ORDER_MAX);
        let rest = (1..most).take_while(|i| is_rest(Pfn(head.0 + i))).count() as u64;
        let order = (rest + 1).ilog2();
        (pfn.0 - head.0 < 1 << order).then_some(Block { head, order, kind })
    }

    /// The tables that the kernel's half of memory is mapped by, and the pages of the vmemmap; and of each task's half
    /// those above the last two levels, which in older kernels no type marks.
    fn tables(&mut self, kernel: &Kernel, map: &PageMap) {
        let space = kernel.found().space;
        let mask = 0x000f_ffff_ffff_f000 & !space.sme_mask;
        let sections = map.sections.last().map_or(0, |last| last.start.0 + SECTION_PAGES);
        let vmemmap = map.vmemmap.0..map.vmemmap.0.saturating_add(sections.saturating_mul(map.page_bytes));
        let levels = u32::from(space.levels.clamp(4, 5));
        let table = |at: u64, is_user| Table { at: at & mask, below: levels - 1, start: 0, is_user };
        // The first tables have no type either; where each has two (PTI), the second is the rest of its block.
        let mut pending: Vec<Table> =
            first_tables(kernel, map).into_iter().map(|at| table(at, true)).collect();
        pending.push(table(space.root.0, false));
        let mut seen = HashSet::new();
        let mut frames = Vec::new();
        while let Some(table) = pending.pop() {
            if !seen.insert((table.at, table.is_user)) {
                continue;
            }
            if seen.len() > TABLES_MAX {
                self.problems.push(format!("there are more than {TABLES_MAX} page tables"));
                break;
            }
            self.pages.insert(PhysAddr(table.at).pfn(), Kind::PageTable);
            let mut bytes = [0; PAGE_SIZE as usize];
            if table.is_user && table.below < 2
                || kernel.backend().read_phys(PhysAddr(table.at), &mut bytes).stopped.is_some()
            {
                continue;
            }
            for (index, word) in (0u64..).zip(bytes.chunks_exact(8)) {
                let entry = u64_at(word, 0).unwrap_or(0);
                // The upper half of a first table is the kernel's.
                if entry & 1 == 0 || table.below == levels - 1 && table.is_user == (index >= 256) {
                    continue;
                }
                let (at, below) = (table.address(index), table.below);
                if below > 0 && (entry & 0x80 == 0 || below > 2) {
                    pending.push(Table {
                        at: entry & mask,
                        below: below - 1,
                        start: at,
                        is_user: table.is_user,
                    });
                } else if vmemmap.contains(&at) {
                    let first = (entry & mask) >> 12 & !((1 << (9 * below)) - 1);
                    frames.push(first..first + (1 << (9 * below)));
                }
            }
        }
        frames.sort_by_key(|frames| frames.start);
        for frames in frames {
            match self.pieces.last_mut() {
                Some((last, _)) if last.end >= frames.start => last.end = last.end.max(frames.end),
                _ => self.pieces.push((frames, Kind::Vmemmap)),
            }
        }
    }

    /// Where ftrace keeps what can be traced: one piece for the image, and one for each module.
    fn ftrace(&mut self, kernel: &Kernel, map: &PageMap) -> Result<(), ObjectError> {
        let Some(start) = kernel.symbol("ftrace_pages_start").and_then(|at| kernel.read_u64(at)) else {
            return Ok(());
        };
        let mut group = kernel.object("ftrace_page", VirtAddr(start)).map(Some)?;
        for _ in 0..FTRACE_MAX {
            let Some(here) = group.filter(|here| here.at.0 != 0) else { return Ok(()) };
            if let Some(phys) = map.direct_to_phys(VirtAddr(here.get("records")?)) {
                // The rest of its block follows from the first page.
                self.pages.insert(phys.pfn(), Kind::Ftrace);
            }
            group = here.at("next")?;
        }
        Err(ObjectError::NotA { what: "ftrace_page.next".into(), wanted: "a list that ends" })
    }
}

/// A page table to be looked through.
struct Table {
    /// Physical address.
    at: u64,
    /// How many levels lie below it.
    below: u32,
    /// First address of what it maps.
    start: u64,
    /// Whether it belongs to a task's half.
    is_user: bool,
}

impl Table {
    /// First address of what entry `index` maps.
    fn address(&self, index: u64) -> u64 {
        let shift = 12 + 9 * self.below;
        // Addresses of the upper half have ones above those that are translated.
        let high = if self.start == 0 && index >= 256 { u64::MAX << (shift + 9) } else { self.start };
        high | index << shift
    }
}

/// Physical addresses of the first tables of all user memory.
fn first_tables(kernel: &Kernel, map: &PageMap) -> Vec<u64> {
    let tasks = kernel.tasks().map(|all| all.tasks).unwrap_or_default();
    let of = |task: crate::kernel::Object<'_>| {
        let mm = task.at("mm").ok().flatten().or_else(|| task.at("active_mm").ok().flatten())?;
        map.direct_to_phys(VirtAddr(mm.get("pgd").ok()?)).map(|phys| phys.0)
    };
    tasks.into_iter().filter_map(of).collect()
}

/// The pages that are mapped where memory was read and never written.
fn zero_pages(kernel: &Kernel, map: &PageMap) -> Vec<Pfn> {
    let word = |name: &str| kernel.symbol(name).and_then(|at| kernel.read_u64(at));
    let small = ["zero_page_pfn", "zero_pfn"].into_iter().find_map(word);
    let mut pages: Vec<Pfn> = small.map(Pfn).into_iter().collect();
    // Allocated when first needed: until then the pointer is NULL and the frame number all ones.
    let pointer =
        || ["huge_zero_folio", "huge_zero_page"].iter().find_map(|name| map.pfn(VirtAddr(word(name)?)));
    if let Some(huge) = word("huge_zero_pfn").map(Pfn).filter(|&pfn| map.page(pfn).is_some()).or_else(pointer)
    {
        pages.extend((0..512).map(|i| Pfn(huge.0.wrapping_add(i))));
    }
    pages
}

/// Where an end of the image lies in physical memory.
fn image_end(kernel: &Kernel, symbol: &str) -> Option<PhysAddr> {
    // The very end may no longer be mapped; all of the image has one distance.
    let text = kernel.symbol("_text")?;
    let start = kernel.found().space.translate(&**kernel.backend(), text).ok()?.phys;
    Some(PhysAddr(start.0.checked_add(kernel.symbol(symbol)?.offset_from(text)?)?))
}
