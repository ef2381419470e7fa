//! A lock's word: its value, and whose memory it is. Source: see the files of pages, slabs and per-CPU memory.

use crate::addr::{Pfn, VirtAddr};
use crate::bytes::printable;
use crate::kernel::Kernel;
use crate::kernel::page::Kind;
use crate::kernel::page::about::About;

/// A word in memory that a CPU looks at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Word {
    /// Where it is.
    pub at: VirtAddr,
    /// Bytes, 1 to 8.
    pub size: usize,
    /// What it holds; `None` if it cannot be read.
    pub value: Option<u64>,
    /// What it is part of: a variable, per-CPU memory, an object of a slab cache, a page. Escaped text.
    pub place: Option<String>,
}

impl Kernel {
    /// The word of `size` bytes at `at`, and what it is part of.
    pub(super) fn word(&self, at: VirtAddr, size: usize) -> Word {
        let size = size.clamp(1, 8);
        let mut buf = [0; 8];
        let read = buf.get_mut(..size).map(|buf| self.read(at, buf).stopped.is_none());
        let value = (read == Some(true)).then(|| u64::from_le_bytes(buf));
        Word { at, size, value, place: self.describe_place(at) }
    }

    /// What kernel memory at `at` is part of: a symbol, per-CPU memory, a `struct page`, a slab object, a vmalloc
    /// area, a kind of page. Escaped: it comes from the dump.
    pub fn describe_place(&self, at: VirtAddr) -> Option<String> {
        if let Some(name) = self.describe_address(at) {
            return Some(name);
        }
        let map = self.page_map().ok()?;
        if let Some(pfn) = map.pfn(at) {
            let start = map.page(pfn)?;
            let offset = at.0.wrapping_sub(start.0);
            return Some(match offset {
                0 => format!("flags of the struct page of pfn {pfn}"),
                _ => format!("struct page of pfn {pfn}+{offset:#x}"),
            });
        }
        if map.is_vmalloc(at) {
            let area = self.vmap_area_at(at)?;
            let offset = at.0.wrapping_sub(area.start.0);
            let of = area.caller().map_or("vmalloc area".to_owned(), |caller| printable(&caller));
            return Some(format!("{of}+{offset:#x}"));
        }
        let phys = self.found().space.translate(&**self.backend(), at).ok()?.phys;
        let pfn: Pfn = phys.pfn();
        let about = About::new(self, map, pfn).ok()?;
        match (&about.slab, about.kind) {
            (Some((cache, slab)), Kind::Slab) => {
                let (_, object) = cache.object_at(slab, map.direct(pfn).wrapping_add(at.page_offset()))?;
                let offset = at.page_offset().wrapping_add(map.direct(pfn).0).wrapping_sub(object.0);
                Some(format!("{}: object {object}+{offset:#x}", printable(&cache.name)))
            }
            (_, kind) => Some(format!("{} page, pfn {pfn}", kind.name())),
        }
    }
}
