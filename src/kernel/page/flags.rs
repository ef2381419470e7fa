//! `page.flags`: one name for each bit, by what kind of page it is on, and the numbers above the flags.
//!
//! Bits have several names (`PG_swapcache` and `PG_checked` are one); which one holds depends on the page. Where zone,
//! node and LRU generation stand follows from the kernel's own limits and is checked against pages whose zone is
//! known. Source: `include/linux/page-flags.h`, `page-flags-layout.h`.

use super::PageMap;
use crate::addr::Pfn;
use crate::debuginfo::types::{Class, Shape};
use crate::kernel::Kernel;

/// What a page is, as far as the names of its flags depend on it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Context {
    /// Free, in the buddy allocator.
    Buddy,
    /// Head of a slab.
    Slab,
    /// Tail of a compound page: its flags word is mostly the compound page's own use.
    Tail,
    /// Anonymous memory, KSM included.
    Anon,
    /// Page cache with a backing file.
    File,
    /// Page cache of tmpfs, shared memory.
    Shmem,
    /// A kernel page that can be moved (balloon, zsmalloc).
    Movable,
    /// Any other.
    Other,
}

/// Some neighbouring bits of `flags`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Field {
    /// Lowest bit.
    pub shift: u32,
    /// How many.
    pub width: u32,
}

impl Field {
    /// Its value in `flags`.
    pub fn of(self, flags: u64) -> u64 {
        let mask = 1u64.checked_shl(self.width).map_or(u64::MAX, |bit| bit - 1);
        flags.checked_shr(self.shift).unwrap_or(0) & mask
    }
}

/// What the bits of `flags` mean in this kernel.
#[derive(Clone, Debug, Default)]
pub struct FlagsLayout {
    /// Names by bit, in the order of their declaration, without `PG_`.
    names: Vec<(u32, Vec<String>)>,
    /// `__NR_PAGEFLAGS`.
    pub count: u32,
    /// Zone, node, section; `None` where evidence spoke against the layout.
    pub zone: Option<Field>,
    /// See `zone`; width 0 with one node.
    pub node: Option<Field>,
    /// LRU generation plus one, where the kernel has generations.
    pub generation: Option<Field>,
    /// The last CPU and the low bits of the last pid that accessed it, where NUMA balancing keeps them here.
    pub last_cpupid: Option<Field>,
    /// Slabs' own names of bits, since about v6.18 (`enum slab_flags`).
    slab: Vec<(u32, String)>,
}

/// Names that only pages of one kind have, where several share a bit.
const BUDDY: &[&str] = &["reported"];
const ANON: &[&str] = &["swapcache", "anon_exclusive", "reclaim"];
const FILE: &[&str] = &["checked", "mappedtodisk", "private_2"];
const MOVABLE: &[&str] = &["movable_ops_isolated", "isolated", "movable_ops"];
/// Names of bits in the flags word of the first tail page; they are about the whole compound page.
const SECOND: [&str; 4] = ["has_hwpoisoned", "large_rmappable", "partially_mapped", "double_map"];
/// Names that stand on pages of special kinds only, and never are the best guess.
const RARE: &[&str] = &[
    "pinned",
    "savepinned",
    "foreign",
    "xen_remapped",
    "slob_free",
    "reported",
    "isolated",
    "vmemmap_self_hosted",
    "double_map",
    "has_hwpoisoned",
    "large_rmappable",
    "partially_mapped",
    "movable_ops",
    "movable_ops_isolated",
    "readahead",
    "fscache",
    "anon_exclusive",
    "swapcache",
    "checked",
];
/// Before `enum slab_flags`: SLUB's use of two bits.
const SLAB: [(&str, &str); 2] = [("active", "pfmemalloc"), ("workingset", "partial")];

impl FlagsLayout {
    /// The names, without fields: those need pages to be checked against.
    pub(super) fn names_only(kernel: &Kernel) -> Self {
        let mut layout = Self::default();
        let Some(types) = kernel.types() else { return layout };
        let values = |name: &str| {
            let ty = types.strip(types.find(Class::Enum, name)?)?.1;
            match &ty.shape {
                Shape::Enum { values, .. } => Some(values.clone()),
                _ => None,
            }
        };
        for (name, value) in values("pageflags").unwrap_or_default() {
            let Some(bit) = u32::try_from(value).ok().filter(|&bit| bit < 64) else { continue };
            if name == "__NR_PAGEFLAGS" {
                layout.count = bit;
                continue;
            }
            let Some(name) = name.strip_prefix("PG_") else { continue };
            match layout.names.iter_mut().find(|(known, _)| *known == bit) {
                Some((_, names)) => names.push(name.to_owned()),
                None => layout.names.push((bit, vec![name.to_owned()])),
            }
        }
        layout.names.sort_by_key(|(bit, _)| *bit);
        let own = values("slab_flags").unwrap_or_default();
        let own =
            own.iter().filter_map(|(name, bit)| Some((*bit as u32, name.strip_prefix("SL_")?.to_owned())));
        layout.slab = own.collect();
        if layout.slab.is_empty() {
            let bit = |flag| layout.bit(flag);
            layout.slab =
                SLAB.iter().filter_map(|(flag, name)| Some((bit(flag)?, (*name).to_owned()))).collect();
        }
        layout
    }

    /// With where zone, node and the rest stand.
    pub(super) fn with_fields(mut self, kernel: &Kernel, map: &PageMap) -> Self {
        let power = |n: u64| n.max(1).next_power_of_two().trailing_zeros();
        let constant = |name: &str| kernel.types().and_then(|types| types.constant(name));
        // ZONES_SHIFT.
        let zones = match constant("__MAX_NR_ZONES").unwrap_or(4) {
            ..=1 => 0,
            2 => 1,
            3..=4 => 2,
            _ => 3,
        };
        // MAX_NUMNODES, by an array that has as many elements; where no type tells, every width is tried.
        let slots = |member: &str| kernel.member("kmem_cache", member)?.size;
        let by_types = slots("node").map(|size| size / 8).or_else(|| slots("per_node").map(|size| size / 16));
        let widths = by_types.map(power).into_iter().chain(0..=10);
        let candidates = widths.flat_map(|nodes| [(nodes, 0), (nodes, 19)]).map(|(nodes, section)| {
            let node = Field { shift: 64 - section - nodes, width: nodes };
            (Field { shift: node.shift - zones, width: zones }, node)
        });
        let right = { candidates }.find(|&(zone, node)| self.fits(kernel, map, zone, node));
        let Some((zone, node)) = right else { return self };
        (self.zone, self.node) = (Some(zone), Some(node));
        let mut top = zone.shift;
        let generation = if kernel.has_member("lruvec", "lrugen") {
            // MAX_NR_GENS is 4, and 0 means none: three bits.
            Some(3)
        } else {
            None
        };
        if kernel.has_member("task_struct", "numa_faults") {
            let cpus = kernel.symbol_and_size("__per_cpu_offset").map_or(1, |(_, size)| size / 8);
            let width = 8 + power(cpus);
            if let Some(shift) = top.checked_sub(width).filter(|&s| s >= self.count + generation.unwrap_or(0))
            {
                self.last_cpupid = Some(Field { shift, width });
                top = shift;
            }
        }
        self.generation = generation.and_then(|width| Some(Field { shift: top.checked_sub(width)?, width }));
        self
    }

    /// Whether the first page of every zone says that it is of that zone and node.
    fn fits(&self, kernel: &Kernel, map: &PageMap, zone: Field, node: Field) -> bool {
        let mut told = 0;
        for place in kernel.zones().unwrap_or_default() {
            let first = place.zone.get("zone_start_pfn").map(Pfn);
            let present = place.zone.get("present_pages").unwrap_or(0);
            let (Ok(first), true) = (first, present > 0) else { continue };
            let Some(page) = map.page(first).and_then(|at| map.read(kernel, at).ok()) else { continue };
            if zone.of(page.flags) != place.index || node.of(page.flags) != place.node {
                return false;
            }
            told += 1;
        }
        told > 0
    }

    /// Every flag of this kernel, by bit: several names can share one.
    pub fn all(&self) -> impl Iterator<Item = (u32, &[String])> {
        self.names.iter().map(|(bit, names)| (*bit, names.as_slice()))
    }

    /// The bit called `name` (`"locked"`), if this kernel has it.
    pub fn bit(&self, name: &str) -> Option<u32> {
        self.names.iter().find(|(_, names)| names.iter().any(|known| known == name)).map(|(bit, _)| *bit)
    }

    /// `1 << bit(name)`; 0 for a flag that this kernel does not have.
    pub fn mask(&self, name: &str) -> u64 {
        self.bit(name).map_or(0, |bit| 1 << bit)
    }

    /// Whether `flags` has the bit called `name`.
    pub fn is_set(&self, flags: u64, name: &str) -> bool {
        flags & self.mask(name) != 0
    }

    /// The flags that are set, one name each.
    pub fn names(&self, flags: u64, context: Context) -> Vec<&str> {
        let set = self.names.iter().filter(|(bit, _)| flags >> bit & 1 == 1);
        set.filter_map(|(bit, names)| self.choose(flags, *bit, names, context)).collect()
    }

    fn choose<'a>(&'a self, flags: u64, bit: u32, names: &'a [String], context: Context) -> Option<&'a str> {
        let first_of = |wanted: &[&str]| names.iter().map(String::as_str).find(|name| wanted.contains(name));
        let plain = || {
            names
                .iter()
                .map(String::as_str)
                .find(|name| !RARE.contains(name))
                .or(names.first().map(String::as_str))
        };
        match context {
            Context::Buddy => first_of(BUDDY).or_else(plain),
            Context::Slab => {
                let own = self.slab.iter().find(|(known, _)| *known == bit).map(|(_, name)| name.as_str());
                own.or_else(plain)
            }
            // All else in this word is the compound page's.
            Context::Tail => first_of(&["hwpoison", "anon_exclusive"]),
            Context::Anon | Context::Shmem => first_of(ANON).or_else(plain),
            Context::File => {
                // One bit: to be reclaimed once written, or read-ahead's mark on a page that is not being written.
                let reading = !self.is_set(flags, "writeback") && !self.is_set(flags, "dirty");
                let mark = if reading { first_of(&["readahead"]) } else { first_of(&["reclaim"]) };
                mark.or_else(|| first_of(FILE)).or_else(plain)
            }
            Context::Movable => first_of(MOVABLE).or_else(plain),
            Context::Other => plain(),
        }
    }

    /// What the flags word of the first tail page says of the whole compound page.
    pub fn second(&self, flags: u64) -> Vec<&'static str> {
        SECOND.into_iter().filter(|name| self.is_set(flags, name)).collect()
    }

    /// Address and index are of no use here; the zone's number in `flags`.
    pub fn zone_of(&self, flags: u64) -> Option<u64> {
        self.zone.map(|field| field.of(flags))
    }

    /// The node's number in `flags`.
    pub fn node_of(&self, flags: u64) -> Option<u64> {
        self.node.map(|field| field.of(flags))
    }
}
