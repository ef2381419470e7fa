//! SLUB: caches, their slabs, and which objects are free.
//!
//! A free object is on a slab's own list, on a CPU's list, or since about v6.18 in a sheaf. A broken list costs only
//! the objects behind the break, and is reported. SLAB and SLOB, gone since v6.5 and v6.4, are not known.
//! Source: `mm/slub.c`, `mm/slab.h` (`struct slab`, `struct kmem_cache`).

mod walk;

pub use walk::{BadPointer, CacheWalk, ObjectState, Place, PlacedSlab};

use super::page::census::{each_page, for_each_section};
use super::page::kind::Marks;
use super::page::{Kind, PageMap};
use super::{Kernel, Object, ObjectError};
use crate::addr::VirtAddr;
use std::collections::HashMap;

/// The most objects in a slab: `objects` has 15 bits.
const OBJECTS_MAX: u64 = 1 << 15;

/// A cache of objects of one size.
#[derive(Clone)]
pub struct Cache<'k> {
    /// Its `struct kmem_cache`.
    pub cache: Object<'k>,
    /// `name`. Untrusted text.
    pub name: String,
    /// Bytes that users get.
    pub object_size: u64,
    /// Bytes from one object to the next.
    pub size: u64,
    /// Log2 of the pages of a slab, as wanted; under pressure slabs are smaller.
    pub order: u32,
    /// Objects in a slab of that order.
    pub per_slab: u64,
    /// Where in a free object the pointer to the next one is.
    offset: u64,
    /// Bytes before each object (`SLAB_RED_ZONE`).
    red_left: u64,
    /// The secret of `CONFIG_SLAB_FREELIST_HARDENED`.
    random: Option<u64>,
}

/// The words of one slab.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Slab {
    /// Its `struct slab`, which is its first `struct page`.
    pub at: VirtAddr,
    /// Address of its memory.
    pub base: VirtAddr,
    /// How many objects it has.
    pub objects: u64,
    /// How many of them are not on its own free list.
    pub inuse: u64,
    /// Whether a CPU owns it.
    pub frozen: bool,
    /// Its own first free object.
    pub freelist: u64,
}

/// Who allocated or freed an object, where `slub_debug=U` recorded it.
#[derive(Clone, Debug)]
pub struct Track {
    /// `alloc` or `free`.
    pub what: &'static str,
    /// The caller: an address in the kernel.
    pub addr: VirtAddr,
    /// Its CPU.
    pub cpu: u64,
    /// Its pid.
    pub pid: i64,
    /// `jiffies` then.
    pub when: u64,
}

/// All caches, and what is broken about them.
#[derive(Default)]
pub struct Caches<'k> {
    /// In the kernel's order: newest first.
    pub caches: Vec<Cache<'k>>,
    /// Broken list, unreadable caches.
    pub problems: Vec<String>,
}

impl Kernel {
    /// Every cache.
    pub fn slab_caches(&self) -> Result<Caches<'_>, ObjectError> {
        let head = self.symbol("slab_caches").ok_or_else(|| ObjectError::NoSymbol("slab_caches".into()))?;
        let walk = self.list(head);
        let mut all = Caches { caches: Vec::new(), problems: walk.problem.into_iter().collect() };
        for node in walk.nodes {
            let cache = self.object("list_head", node)?.container_of("kmem_cache", "list")?;
            match self.slab_cache(cache.at) {
                Ok(cache) => all.caches.push(cache),
                Err(error) => all.problems.push(format!("cache at {}: {error}", cache.at)),
            }
        }
        Ok(all)
    }

    /// The cache whose `struct kmem_cache` is at `at`.
    pub fn slab_cache(&self, at: VirtAddr) -> Result<Cache<'_>, ObjectError> {
        let cache = self.object("kmem_cache", at)?;
        let oo = cache.get("oo.x")?;
        let size = cache.get("size")?;
        if size == 0 {
            return Err(ObjectError::NotA { what: "kmem_cache.size".into(), wanted: "above zero" });
        }
        Ok(Cache {
            cache,
            name: cache.member("name")?.text()?,
            object_size: cache.get("object_size")?,
            size,
            // OO_SHIFT is 16.
            order: (oo >> 16).min(18) as u32,
            per_slab: (oo & 0xffff).min(OBJECTS_MAX),
            offset: cache.get("offset")?,
            red_left: cache.get("red_left_pad").unwrap_or(0),
            random: cache.get("random").ok(),
        })
    }

    /// The slabs of each cache, by a look at every page: full slabs are on no list.
    pub fn slab_pages(&self, map: &PageMap) -> HashMap<VirtAddr, Vec<VirtAddr>> {
        let marks = Marks::new(self, map);
        let found = for_each_section(self, map, |pages| {
            let mut slabs = Vec::new();
            each_page(self, pages, &marks, |pfn, raw, kind, tail| {
                if let (Some(Kind::Slab), false, Some(at)) = (kind, tail, map.page(pfn)) {
                    slabs.push((VirtAddr(raw.slab_cache), at));
                }
            });
            slabs
        });
        let mut by_cache: HashMap<VirtAddr, Vec<VirtAddr>> = HashMap::new();
        for (cache, at) in found.into_iter().flatten() {
            by_cache.entry(cache).or_default().push(at);
        }
        by_cache
    }

    /// Reads the `struct slab` at `at`.
    pub fn slab(&self, map: &PageMap, at: VirtAddr) -> Result<Slab, ObjectError> {
        // Since Linux commit d122019bf061 ("mm: Split slab into its own type") (in v5.17).
        let slab = self.object("slab", at).or_else(|_| self.object("page", at))?;
        let outside = || ObjectError::NotA { what: format!("{at}"), wanted: "a struct page" };
        let pfn = map.pfn(at).filter(|&pfn| map.page(pfn) == Some(at)).ok_or_else(outside)?;
        Ok(Slab {
            at,
            base: map.direct(pfn),
            objects: slab.get("objects")?,
            inuse: slab.get("inuse")?,
            frozen: slab.get("frozen")? != 0,
            freelist: slab.get("freelist")?,
        })
    }
}

impl Cache<'_> {
    /// Number of the object of `slab` that `at` lies in, and where that object begins.
    pub fn object_at(&self, slab: &Slab, at: VirtAddr) -> Option<(u64, VirtAddr)> {
        let index = at.offset_from(slab.base)? / self.size;
        (index < slab.objects).then(|| {
            (index, slab.base.wrapping_add(index.wrapping_mul(self.size)).wrapping_add(self.red_left))
        })
    }

    /// Whether `at` is where an object of `slab` begins.
    pub fn is_object(&self, slab: &Slab, at: u64) -> bool {
        self.object_at(slab, VirtAddr(at.wrapping_sub(self.red_left))).is_some_and(|(_, start)| start.0 == at)
    }

    /// Where the pointer to the next free object is stored in `object`.
    pub fn pointer_at(&self, object: u64) -> VirtAddr {
        VirtAddr(object.wrapping_add(self.offset))
    }

    /// What a stored pointer means, if it is stored at `at`.
    pub fn decode_pointer(&self, stored: u64, at: VirtAddr) -> u64 {
        match self.random {
            // Since Linux commit 1ad53d9fa3f6 ("slub: improve bit diffusion for freelist ptr obfuscation") (in v5.7)
            // the address goes in with its bytes swapped.
            Some(random) => stored ^ random ^ at.0.swap_bytes(),
            None => stored,
        }
    }

    /// Whether pointers in free objects are obfuscated.
    pub fn is_hardened(&self) -> bool {
        self.random.is_some()
    }

    /// Who allocated and freed `object` last, if the cache keeps that.
    pub fn tracks(&self, object: VirtAddr) -> Vec<Track> {
        let kernel = self.cache.kernel();
        // SLAB_STORE_USER; the bits have been an enumeration since about v6.9.
        let bit = kernel
            .types()
            .and_then(|types| types.constant("_SLAB_STORE_USER"))
            .map_or(16, |bit| bit.clamp(0, 63));
        if self.cache.get("flags").is_ok_and(|flags| flags >> bit & 1 == 0) {
            return Vec::new();
        }
        let inuse = self.cache.get("inuse").unwrap_or(self.object_size);
        // The free pointer lies behind the object where it may not overwrite it.
        let end = if self.offset >= inuse { inuse + 8 } else { inuse };
        let track = |index: u64, what| {
            let bytes = kernel.object("track", VirtAddr(0)).and_then(|track| track.size()).ok()?;
            let track = kernel.object("track", object.wrapping_add(end).wrapping_add(index * bytes)).ok()?;
            let addr = track.get("addr").ok().filter(|&addr| addr != 0)?;
            Some(Track {
                what,
                addr: VirtAddr(addr),
                cpu: track.get("cpu").ok()?,
                pid: track.member("pid").and_then(|pid| pid.i64()).ok()?,
                when: track.get("when").ok()?,
            })
        };
        [track(0, "alloc"), track(1, "free")].into_iter().flatten().collect()
    }
}
