//! Page frames: where their `struct page`s lie, and what the words of one say.
//!
//! Knows sections, the vmemmap and the direct map, compound pages and page types. What else points at a page (lists,
//! mappings, page tables) is in the files beside. Source: `include/linux/mm_types.h`, `page-flags.h`, `mmzone.h`
//! (`struct mem_section`), `Documentation/arch/x86/x86_64/mm.rst`.

pub mod about;
pub mod census;
pub mod flags;
pub mod holder;
pub mod kind;
pub mod mapping;
pub mod owners;
pub mod page_owner;
mod types;
pub mod users;

pub use flags::FlagsLayout;
pub use kind::{Free, Kind};
pub use types::PageTypes;

use super::{Kernel, ObjectError};
use crate::addr::{PAGE_SIZE, Pfn, PhysAddr, VirtAddr};
use crate::bytes::{u32_at, u64_at};

/// `PAGES_PER_SECTION`: SECTION_SIZE_BITS is 27 on x86-64, with four and with five levels.
pub const SECTION_PAGES: u64 = 1 << (27 - 12);
/// Sections of 2^52 bytes, the most that five levels map.
const SECTIONS_MAX: u64 = 1 << (52 - 27);
/// `SECTION_HAS_MEM_MAP`.
const HAS_MEM_MAP: u64 = 1 << 1;
/// `SECTION_IS_EARLY`: every page of it has an initialised `struct page`.
const IS_EARLY: u64 = 1 << 3;
/// Bits of `section_mem_map` that are flags; the map itself is page-aligned.
const SECTION_FLAGS: u64 = 0xfff;

/// 128 MiB of physical memory that the kernel has `struct page`s for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Section {
    /// Its first page frame.
    pub start: Pfn,
    /// Where the `struct page` of frame 0 would lie, were the map one array.
    map: u64,
    /// Whether all of its pages exist; else the subsection map tells.
    early: bool,
    /// Its `struct mem_section_usage`; 0 without.
    pub usage: VirtAddr,
    /// `page_ext` as stored; 0 without.
    pub page_ext: u64,
}

/// Where this kernel keeps its `struct page`s, and how to read one.
pub struct PageMap {
    /// Present sections, ascending.
    pub sections: Vec<Section>,
    /// First address of the direct map of physical memory.
    pub direct_map: VirtAddr,
    /// First and one past the last address for vmalloc.
    pub vmalloc: (VirtAddr, VirtAddr),
    /// First address of the vmemmap.
    pub vmemmap: VirtAddr,
    /// Bytes of a `struct page`.
    pub page_bytes: u64,
    /// What the bits of `flags` mean.
    pub flags: FlagsLayout,
    /// What `page_type` means.
    pub types: PageTypes,
    offsets: Offsets,
}

/// Where the words of a `struct page` lie.
#[derive(Clone, Copy, Debug)]
struct Offsets {
    flags: u64,
    compound: u64,
    lru: u64,
    mapping: u64,
    index: u64,
    private: u64,
    mapcount: u64,
    refcount: u64,
    memcg: Option<u64>,
    slab_cache: Option<u64>,
    dtor: Option<u64>,
}

/// The words of one `struct page`, each as it stands in memory: which of them mean anything depends on the page.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct RawPage {
    /// `flags`.
    pub flags: u64,
    /// `compound_head`, since about v7.0 `compound_info`: bit 0 marks a tail page.
    pub compound: u64,
    /// `lru.next`, the same word as `compound`.
    pub lru: u64,
    /// `mapping`.
    pub mapping: u64,
    /// `index`.
    pub index: u64,
    /// `private`.
    pub private: u64,
    /// `_mapcount`, which `page_type` overlays.
    pub mapcount: u32,
    /// `_refcount`.
    pub refcount: i32,
    /// `memcg_data`, before v5.11 `mem_cgroup`; 0 where the kernel has neither.
    pub memcg: u64,
    /// `slab_cache` of a slab.
    pub slab_cache: u64,
    /// `compound_dtor` of a first tail page, in kernels that have it.
    pub dtor: Option<u8>,
}

impl Kernel {
    /// Where the `struct page`s are.
    pub fn page_map(&self) -> Result<&PageMap, ObjectError> {
        self.page_map.get_or_init(|| PageMap::new(self)).as_ref().map_err(Clone::clone)
    }

    /// The value of a variable that holds an address.
    fn base(&self, symbol: &str) -> Option<VirtAddr> {
        self.read_u64(self.symbol(symbol)?).map(VirtAddr).filter(|at| at.0 >> 63 == 1)
    }
}

impl PageMap {
    fn new(kernel: &Kernel) -> Result<Self, ObjectError> {
        let five = kernel.found().space.levels >= 5;
        // KASLR moves these three regions too, and five levels begin elsewhere: then they are variables.
        let region = |symbol: &str, four_levels: u64, five_levels: u64| {
            kernel.base(symbol).unwrap_or(VirtAddr(if five { five_levels } else { four_levels }))
        };
        let vmalloc = region("vmalloc_base", 0xffff_c900_0000_0000, 0xffa0_0000_0000_0000);
        let vmalloc_bytes = if five { 12_800 << 40 } else { 32 << 40 };
        let page = kernel.object("page", VirtAddr(0))?;
        let offsets = Offsets::new(kernel)?;
        let mut map = Self {
            sections: Vec::new(),
            direct_map: region("page_offset_base", 0xffff_8880_0000_0000, 0xff11_0000_0000_0000),
            vmalloc: (vmalloc, vmalloc.wrapping_add(vmalloc_bytes)),
            vmemmap: region("vmemmap_base", 0xffff_ea00_0000_0000, 0xffd4_0000_0000_0000),
            page_bytes: page.size()?.clamp(8, 512),
            flags: FlagsLayout::names_only(kernel),
            types: PageTypes::new(kernel),
            offsets,
        };
        map.sections = sections(kernel)?;
        map.flags = map.flags.clone().with_fields(kernel, &map);
        Ok(map)
    }

    /// The section that holds `pfn`, if the kernel has `struct page`s for it.
    pub fn section(&self, pfn: Pfn) -> Option<&Section> {
        let start = pfn.0 - pfn.0 % SECTION_PAGES;
        self.sections.get(self.sections.binary_search_by_key(&start, |section| section.start.0).ok()?)
    }

    /// Address of the `struct page` of `pfn`; `None` where the kernel has none.
    pub fn page(&self, pfn: Pfn) -> Option<VirtAddr> {
        let section = self.section(pfn)?;
        Some(VirtAddr(section.map.wrapping_add(pfn.0.wrapping_mul(self.page_bytes))))
    }

    /// The frame whose `struct page` covers the address `at`.
    pub fn pfn(&self, at: VirtAddr) -> Option<Pfn> {
        let within = |section: &Section| {
            let pfn = Pfn(at.0.wrapping_sub(section.map) / self.page_bytes);
            (at.0 >= section.map && pfn.0.wrapping_sub(section.start.0) < SECTION_PAGES).then_some(pfn)
        };
        // With a vmemmap all sections share one map, and the first one's arithmetic is everyone's.
        let first = self.sections.first()?;
        let guess = Pfn(at.0.wrapping_sub(first.map) / self.page_bytes);
        self.section(guess).and_then(within).or_else(|| self.sections.iter().find_map(within))
    }

    /// The address of `pfn` in the direct map.
    pub fn direct(&self, pfn: Pfn) -> VirtAddr {
        self.direct_map.wrapping_add(pfn.0.wrapping_mul(PAGE_SIZE))
    }

    /// The physical address behind an address in the direct map.
    pub fn direct_to_phys(&self, at: VirtAddr) -> Option<PhysAddr> {
        let phys = PhysAddr(at.offset_from(self.direct_map)?);
        self.section(phys.pfn()).map(|_| phys)
    }

    /// Whether `at` lies in the area that vmalloc gives addresses from.
    pub fn is_vmalloc(&self, at: VirtAddr) -> bool {
        self.vmalloc.0 <= at && at < self.vmalloc.1
    }

    /// The words of the `struct page` at the start of `bytes`.
    pub fn decode(&self, bytes: &[u8]) -> Option<RawPage> {
        let o = &self.offsets;
        let word = |at: u64| u64_at(bytes, at as usize);
        Some(RawPage {
            flags: word(o.flags)?,
            compound: word(o.compound)?,
            lru: word(o.lru)?,
            mapping: word(o.mapping)?,
            index: word(o.index)?,
            private: word(o.private)?,
            mapcount: u32_at(bytes, o.mapcount as usize)?,
            refcount: u32_at(bytes, o.refcount as usize)? as i32,
            memcg: o.memcg.and_then(word).unwrap_or(0),
            slab_cache: o.slab_cache.and_then(word).unwrap_or(0),
            dtor: o.dtor.and_then(|at| bytes.get(at as usize).copied()),
        })
    }

    /// Reads the `struct page` at `at`.
    pub fn read(&self, kernel: &Kernel, at: VirtAddr) -> Result<RawPage, ObjectError> {
        let mut bytes = [0; 512];
        let wanted = bytes.get_mut(..self.page_bytes as usize).unwrap_or_default();
        match kernel.read(at, wanted).stopped {
            Some(why) => {
                Err(ObjectError::Unreadable { what: "struct page".into(), at, why: why.to_string() })
            }
            None => self.decode(wanted).ok_or(ObjectError::NotA {
                what: "struct page".into(),
                wanted: "large enough for its own members",
            }),
        }
    }

    /// Address of the head page, if the page at `at` with these words is a tail page.
    ///
    /// Hugetlb pages whose vmemmap was given back show the head's words in place of tails': `second` reads the
    /// `struct page` after `at`, whose word tells such fake heads apart.
    pub fn head(
        &self,
        at: VirtAddr,
        raw: &RawPage,
        second: impl FnOnce() -> Option<RawPage>,
    ) -> Option<VirtAddr> {
        if raw.compound & 1 == 1 {
            return Some(head_from(at, raw.compound));
        }
        // Since Linux commit e7d324850bfc ("mm: hugetlb: free the 2nd vmemmap page associated with each HugeTLB page")
        // (in v5.18). Only the first struct page in a page of them can be fake.
        if at.page_offset() == 0 && self.flags.is_set(raw.flags, "head") {
            let next = second()?;
            let head = (next.compound & 1 == 1).then(|| head_from(at, next.compound))?;
            return (head != at).then_some(head);
        }
        None
    }

    /// Log2 of the number of pages of the compound page whose head is at `head`; 0 if it is no compound page.
    pub fn order(&self, kernel: &Kernel, head: VirtAddr, raw: &RawPage) -> Result<u32, ObjectError> {
        if !self.flags.is_set(raw.flags, "head") {
            return Ok(0);
        }
        let second = kernel.object("page", head.wrapping_add(self.page_bytes))?;
        let order = match second.member("compound_order") {
            Ok(order) => order.u64()?,
            // Since Linux commit ebc1baf5c9b4 ("mm: free up a word in the first tail page") (in v6.6) the order is the
            // lowest byte of the first tail page's flags; a member _folio_order came and went before.
            Err(_) => match kernel.object("folio", head)?.member("_folio_order") {
                Ok(order) => order.u64()?,
                Err(_) => self.read(kernel, second.at)?.flags & 0xff,
            },
        };
        // The largest page there is has 1 GiB.
        Ok(if order <= 18 { order as u32 } else { 0 })
    }
}

/// The head page that a tail page's word leads to: a pointer with bit 0 set or, since about v7.0 where a `struct
/// page` has a power of two of bytes, a mask that makes the tail's address the head's.
fn head_from(tail: VirtAddr, word: u64) -> VirtAddr {
    let mask = word & !1;
    // No struct page lies in the last 2 GiB, where the image is; a mask has ones there.
    let is_mask = mask >= 0xffff_ffff_8000_0000 && mask.wrapping_neg().is_power_of_two();
    VirtAddr(if is_mask { tail.0 & mask } else { mask })
}

impl Offsets {
    fn new(kernel: &Kernel) -> Result<Self, ObjectError> {
        let page = kernel.object("page", VirtAddr(0))?;
        let at = |names: &[&str]| page.either(names).map(|member| member.at.0);
        // The slab's words have had a type of their own since Linux commit d122019bf061 ("mm: Split slab into its own
        // type") (in v5.17).
        let slab = kernel.object("slab", VirtAddr(0)).unwrap_or(page);
        let size = page.size()?;
        let second_page = |name: &str| {
            kernel
                .object("folio", VirtAddr(0).wrapping_add(size.wrapping_neg()))?
                .member(name)
                .map(|m| m.at.0)
        };
        Ok(Self {
            flags: at(&["flags"])?,
            compound: at(&["compound_info", "compound_head"])?,
            lru: at(&["lru.next"])?,
            mapping: at(&["mapping"])?,
            index: at(&["__folio_index", "index"])?,
            private: at(&["private"])?,
            mapcount: at(&["_mapcount"])?,
            refcount: at(&["_refcount"])?,
            memcg: at(&["memcg_data", "mem_cgroup"]).ok(),
            slab_cache: slab.member("slab_cache").map(|member| member.at.0).ok(),
            dtor: at(&["compound_dtor"]).or(second_page("_folio_dtor")).ok(),
        })
    }
}

/// Every section that has `struct page`s, ascending.
fn sections(kernel: &Kernel) -> Result<Vec<Section>, ObjectError> {
    let no_symbol = || ObjectError::NoSymbol("mem_section".into());
    let table = kernel.symbol("mem_section").ok_or_else(no_symbol)?;
    let one = kernel.object("mem_section", VirtAddr(0))?;
    let bytes = one.size()?.clamp(8, 4096);
    let offset = |names: &[&str]| one.either(names).map(|member| member.at.0 as usize).ok();
    let map_at = offset(&["section_mem_map"]).unwrap_or(0);
    let (usage_at, ext_at) = (offset(&["usage"]), offset(&["page_ext"]));
    let highest = kernel.symbol("__highest_present_section_nr").and_then(|at| kernel.read_u64(at));
    let end = highest.map_or(SECTIONS_MAX, |highest| highest.saturating_add(1).min(SECTIONS_MAX));
    // With CONFIG_SPARSEMEM_EXTREME the variable is a pointer to pointers to pages of sections; else it is an array,
    // whose first word has flags in its low bits.
    let first = kernel.read_u64(table).ok_or_else(|| ObjectError::Unreadable {
        what: "mem_section".into(),
        at: table,
        why: "the kernel's data cannot be read".into(),
    })?;
    let extreme = first >> 63 == 1 && first & 3 == 0;
    let per_root = if extreme { PAGE_SIZE / bytes } else { end };
    let roots = if extreme {
        let mut words = vec![0; end.div_ceil(per_root).min(SECTIONS_MAX / per_root) as usize * 8];
        let got = kernel.read(VirtAddr(first), &mut words).filled;
        words.truncate(got);
        words.chunks_exact(8).filter_map(|word| u64_at(word, 0)).map(VirtAddr).collect()
    } else {
        vec![table]
    };
    let mut sections = Vec::new();
    for (root, at) in (0u64..).zip(roots).filter(|(_, at)| at.0 != 0) {
        let mut block = vec![0; (per_root.min(end) * bytes).min(1 << 24) as usize];
        let filled = kernel.read(at, &mut block).filled;
        block.truncate(filled);
        for (i, words) in (0u64..).zip(block.chunks_exact(bytes as usize)) {
            let start = Pfn((root * per_root + i).wrapping_mul(SECTION_PAGES));
            let word = |at: Option<usize>| at.and_then(|at| u64_at(words, at)).unwrap_or(0);
            let map = word(Some(map_at));
            if map & HAS_MEM_MAP != 0 {
                sections.push(Section {
                    start,
                    map: map & !SECTION_FLAGS,
                    early: map & IS_EARLY != 0,
                    usage: VirtAddr(word(usage_at)),
                    page_ext: word(ext_at),
                });
            }
        }
    }
    Ok(sections)
}

impl Section {
    /// Whether all its pages have a `struct page` that was initialised.
    pub fn is_early(&self) -> bool {
        self.early
    }
}
