//! Everything that is known of one page, brought together.
//!
//! Each fact is found by a file beside; a fact that cannot be had is left out and, if something is broken, said.

use super::kind::{self, Free, Kind, Marks};
use super::mapping::{self, FileIdentity, Held, Mapping, SwapEntry};
use super::owners::{Block, Owners};
use super::{PageMap, RawPage, flags};
use crate::addr::{PAGE_SIZE, Pfn, VirtAddr};
use crate::kernel::memcg::MemCgroup;
use crate::kernel::slab::{Cache, Slab};
use crate::kernel::{Kernel, ObjectError};
use std::cell::OnceCell;
use std::collections::HashMap;

/// The compound page that a page is part of.
#[derive(Clone, Copy, Debug)]
pub struct Compound {
    /// Its head's `struct page`.
    pub head: VirtAddr,
    /// The head's frame.
    pub head_pfn: Pfn,
    /// Log2 of its pages.
    pub order: u32,
    /// Number of this page in it; 0 is the head.
    pub index: u64,
}

/// How often a page is mapped.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct MapCount {
    /// This page: by entries of its own and by those of the whole compound page.
    pub page: i64,
    /// The whole compound page, by one entry.
    pub entire: Option<i64>,
    /// All entries for any part of the compound page, where the kernel counts them.
    pub total: Option<i64>,
}

/// What is known of a page.
pub struct About<'k> {
    /// Its frame.
    pub pfn: Pfn,
    /// Its `struct page`.
    pub at: VirtAddr,
    /// The words of it.
    pub raw: RawPage,
    /// The words of its head; its own if it is no tail.
    pub head: RawPage,
    /// Of a compound page.
    pub compound: Option<Compound>,
    /// What it is used for.
    pub kind: Kind,
    /// Where it lies free.
    pub free: Option<Free>,
    /// What it was allocated with, if it is not the first page of that.
    pub block: Option<Block>,
    /// Names of its own flags.
    pub flags: Vec<String>,
    /// What the first tail says of the whole compound page.
    pub compound_flags: Vec<&'static str>,
    /// `page_type` by name.
    pub types: Vec<String>,
    /// `None` for pages that cannot be mapped.
    pub mapcount: Option<MapCount>,
    /// Node and zone.
    pub zone: Option<(u64, String)>,
    /// LRU generation, where the page is in one.
    pub generation: Option<u64>,
    /// `active_anon` and its kin, for a page on an LRU list.
    pub lru: Option<&'static str>,
    /// What `mapping` leads to.
    pub mapping: Mapping<'k>,
    /// The file, if that is a file.
    pub file: Option<FileIdentity>,
    /// Page offset in the mapping.
    pub index: Option<u64>,
    /// What the page cache holds at that offset.
    pub held: Option<Held>,
    /// Where it is in swap.
    pub swap: Option<SwapEntry>,
    /// Whom it is charged to.
    pub memcg: Option<MemCgroup>,
    /// Its slab and the cache.
    pub slab: Option<(Cache<'k>, Slab)>,
    /// Migrate type of its pageblock, by name.
    pub migratetype: Option<String>,
    /// What could not be read, or is broken.
    pub problems: Vec<String>,
}

/// What answers about many pages share: each list is walked once, when it is first needed.
pub struct Pages<'k> {
    kernel: &'k Kernel,
    map: &'k PageMap,
    marks: Marks,
    zones: Vec<(u64, u64, String)>,
    migratetypes: Vec<String>,
    owners: OnceCell<Owners>,
    per_cpu_free: OnceCell<HashMap<Pfn, Free>>,
}

impl<'k> Pages<'k> {
    /// For this kernel.
    pub fn new(kernel: &'k Kernel, map: &'k PageMap) -> Self {
        let zones = kernel.zones().unwrap_or_default();
        Self {
            kernel,
            map,
            marks: Marks::new(kernel, map),
            zones: zones.iter().map(|zone| (zone.node, zone.index, zone.name())).collect(),
            migratetypes: kernel.migratetypes(),
            owners: OnceCell::new(),
            per_cpu_free: OnceCell::new(),
        }
    }

    /// The free block that a page without references lies in.
    fn free(&self, pfn: Pfn) -> Option<Free> {
        let per_cpu = || self.per_cpu_free.get_or_init(|| kind::per_cpu_blocks(self.kernel, self.map));
        kind::buddy_block(self.kernel, self.map, pfn).or_else(|| per_cpu().get(&pfn).copied())
    }

    /// Node and name of the zone, by what the flags say and the node has.
    fn zone(&self, raw: &RawPage) -> Option<(u64, String)> {
        let told = (self.map.flags.node_of(raw.flags)?, self.map.flags.zone_of(raw.flags)?);
        let found = self.zones.iter().find(|(node, index, _)| (*node, *index) == told)?;
        Some((found.0, found.2.clone()))
    }

    fn migratetype(&self, pfn: Pfn) -> Option<String> {
        let number = self.kernel.pageblock_migratetype(self.map, pfn)?;
        self.migratetypes.get(number as usize).cloned()
    }

    /// Everything about `pfn` but who maps it.
    pub fn about(&self, pfn: Pfn) -> Result<About<'k>, ObjectError> {
        About::find(self, pfn)
    }
}

impl<'k> About<'k> {
    /// Everything about `pfn` but who maps it.
    pub fn new(kernel: &'k Kernel, map: &'k PageMap, pfn: Pfn) -> Result<Self, ObjectError> {
        Pages::new(kernel, map).about(pfn)
    }

    fn find(pages: &Pages<'k>, pfn: Pfn) -> Result<Self, ObjectError> {
        let (kernel, map, marks) = (pages.kernel, pages.map, &pages.marks);
        let outside = || ObjectError::NotA {
            what: format!("pfn {pfn}"),
            wanted: "a page that the kernel has a struct page for",
        };
        let at = map.page(pfn).ok_or_else(outside)?;
        let raw = map.read(kernel, at)?;
        let mut problems = Vec::new();
        let tail_of = map.head(at, &raw, || kind::second(kernel, map, at));
        let (head_at, head) = match tail_of {
            Some(head) => match map.read(kernel, head) {
                Ok(words) => (head, words),
                Err(error) => {
                    problems.push(format!("its head page: {error}"));
                    (at, raw)
                }
            },
            None => (at, raw),
        };
        let mut kind = marks.kind(map, &head, || kind::second(kernel, map, head_at));
        let (mut free, mut block) = (None, None);
        if kind == Kind::Free || head.refcount == 0 && kind == Kind::Unknown {
            free = pages.free(pfn);
            kind = match free {
                Some(Free { cpu: Some(_), .. }) => Kind::FreePerCpu,
                Some(_) => Kind::Free,
                None => kind,
            };
        }
        if matches!(kind, Kind::Kernel | Kind::Unknown | Kind::Reserved) {
            let owners = pages.owners.get_or_init(|| Owners::collect(kernel, map));
            kind = owners.kind(pfn, kind).unwrap_or(kind);
            if kind == Kind::Unknown {
                block = owners.block(kernel, map, marks, pfn);
                kind = block.map_or(kind, |block| block.kind);
            }
        }
        let compound = compound(kernel, map, pfn, (head_at, &head), tail_of.is_some());
        let is_tail = compound.is_some_and(|compound| compound.index > 0);
        let context = match kind {
            _ if is_tail => flags::Context::Tail,
            Kind::HugeTlb if head.mapping & 1 == 1 => flags::Context::Anon,
            _ => kind.context(),
        };
        let mut about = Self {
            flags: map.flags.names(raw.flags, context).into_iter().map(str::to_owned).collect(),
            types: map.types.of(raw.mapcount).map(str::to_owned).collect(),
            compound_flags: Vec::new(),
            mapcount: None,
            zone: pages.zone(&raw),
            generation: map
                .flags
                .generation
                .map(|field| field.of(head.flags))
                .filter(|&g| g != 0)
                .map(|g| g - 1),
            lru: lru(map, &head, kind),
            mapping: Mapping::None,
            file: None,
            index: None,
            held: None,
            swap: None,
            memcg: None,
            slab: None,
            migratetype: pages.migratetype(pfn),
            problems,
            pfn,
            at,
            raw,
            head,
            compound,
            kind,
            free,
            block,
        };
        about.look_further(kernel, map, head_at, marks);
        Ok(about)
    }

    /// What other structures say of it.
    fn look_further(&mut self, kernel: &'k Kernel, map: &'k PageMap, head_at: VirtAddr, marks: &Marks) {
        if self.compound.is_some() && self.kind.context() != flags::Context::Slab {
            let first_tail = kind::second(kernel, map, head_at);
            self.compound_flags = first_tail.map(|tail| map.flags.second(tail.flags)).unwrap_or_default();
        }
        let user = matches!(
            self.kind,
            Kind::Anon
                | Kind::AnonLarge
                | Kind::SwapCache
                | Kind::Ksm
                | Kind::File
                | Kind::FileDirty
                | Kind::Shmem
                | Kind::HugeTlb
                | Kind::Device
        );
        let in_use = self.free.is_none() && self.kind != Kind::Unknown;
        if user && in_use {
            self.mapcount = Some(self.map_count(kernel, map, head_at));
            match mapping::of(kernel, &self.head, self.kind) {
                Ok(mapping) => self.mapping = mapping,
                Err(error) => self.problems.push(format!("mapping: {error}")),
            }
        }
        if !matches!(self.mapping, Mapping::None | Mapping::Movable(_)) {
            let inside = self.compound.map_or(0, |compound| compound.index);
            self.index = Some(self.head.index.wrapping_add(inside));
        }
        if let Mapping::File(space) = self.mapping {
            match mapping::identity(space) {
                Ok(file) => self.file = Some(file),
                Err(error) => self.problems.push(format!("file: {error}")),
            }
            match mapping::held(space, self.index.unwrap_or(0), self.at, head_at) {
                Ok(held) => self.held = Some(held),
                Err(error) => self.problems.push(error.to_string()),
            }
        }
        if self.kind == Kind::SwapCache {
            // Since Linux commit cfeed8ffe55b ("mm/swap: stop using page->private on tail pages for THP_SWAP") (in v6.6)
            // only the head has it.
            let inside = self.compound.map_or(0, |compound| compound.index);
            let own = SwapEntry::from_value(self.head.private);
            self.swap = Some(SwapEntry { offset: own.offset.wrapping_add(inside), ..own });
        }
        if in_use && self.kind != Kind::Reserved {
            match kernel.memcg_of(self.head.memcg) {
                Ok(memcg) => self.memcg = memcg,
                Err(error) => self.problems.push(format!("memory cgroup: {error}")),
            }
        }
        if self.kind == Kind::Slab {
            let both = kernel.slab_cache(VirtAddr(self.head.slab_cache));
            match both.and_then(|cache| Ok((cache, kernel.slab(map, head_at)?))) {
                Ok(slab) => self.slab = Some(slab),
                Err(error) => self.problems.push(format!("slab: {error}")),
            }
        }
        if marks.is_head(&self.head) && self.compound.is_none() {
            self.problems.push("it is the head of a compound page whose order cannot be read".to_owned());
        }
    }

    fn map_count(&self, kernel: &Kernel, map: &PageMap, head_at: VirtAddr) -> MapCount {
        let own = i64::from(self.raw.mapcount as i32) + 1;
        if self.compound.is_none_or(|compound| compound.order == 0) {
            return MapCount { page: own, entire: None, total: None };
        }
        let plus_one = |place: Result<crate::kernel::Object<'_>, ObjectError>| {
            place.and_then(|p| p.i64()).ok().map(|n| n + 1)
        };
        let second = kernel.object("page", head_at.wrapping_add(map.page_bytes));
        let folio = kernel.object("folio", head_at);
        let entire = match second.and_then(|second| second.member("compound_mapcount")) {
            Ok(count) => plus_one(Ok(count)),
            Err(_) => plus_one(folio.clone().and_then(|folio| folio.member("_entire_mapcount"))),
        };
        let total = plus_one(folio.and_then(|folio| folio.member("_large_mapcount")));
        // Until v6.2 a huge page mapped both ways had one more in every part.
        let doubled = i64::from(self.compound_flags.contains(&"double_map"));
        let parts = if self.kind == Kind::HugeTlb { 0 } else { own };
        MapCount { page: parts + entire.unwrap_or(0) - doubled, entire, total }
    }

    /// Its physical address.
    pub fn phys(&self) -> u64 {
        self.pfn.0.wrapping_mul(PAGE_SIZE)
    }

    /// The page offsets that it may have in its mapping: of hugetlb pages the index has been counted both ways.
    pub fn indexes(&self) -> Vec<u64> {
        let inside = self.compound.map_or(0, |compound| compound.index);
        let mut all: Vec<u64> = self.index.into_iter().collect();
        if let (Kind::HugeTlb, Some(compound)) = (self.kind, self.compound) {
            all.push((self.head.index << compound.order).wrapping_add(inside));
        }
        all
    }
}

fn compound(
    kernel: &Kernel,
    map: &PageMap,
    pfn: Pfn,
    (head_at, head): (VirtAddr, &RawPage),
    is_tail: bool,
) -> Option<Compound> {
    let order = map.order(kernel, head_at, head).ok().filter(|&order| order > 0);
    let head_pfn = map.pfn(head_at)?;
    (order.is_some() || is_tail).then(|| Compound {
        head: head_at,
        head_pfn,
        order: order.unwrap_or(0),
        index: pfn.0.wrapping_sub(head_pfn.0),
    })
}

/// The LRU list that a page is on, by its flags.
fn lru(map: &PageMap, head: &RawPage, kind: Kind) -> Option<&'static str> {
    let set = |name| map.flags.is_set(head.flags, name);
    if !set("lru")
        || !matches!(kind.context(), flags::Context::Anon | flags::Context::File | flags::Context::Shmem)
    {
        return None;
    }
    // Which pair of lists it is goes by swapbacked: tmpfs is with anonymous memory.
    Some(match (set("unevictable"), set("active"), set("swapbacked")) {
        (true, ..) => "unevictable",
        (_, false, true) => "inactive_anon",
        (_, true, true) => "active_anon",
        (_, false, false) => "inactive_file",
        (_, true, false) => "active_file",
    })
}
