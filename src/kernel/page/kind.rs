//! What a page is used for, told from the words of its `struct page` and, for a tail, of its head.
//!
//! Kinds that only other structures tell (per-CPU free lists, vmalloc, stacks) are laid over it: see
//! [`Owners`](super::owners::Owners). Source: `include/linux/page-flags.h`, `fs/proc/page.c` (`stable_page_flags`).

use super::flags::Context;
use super::{PageMap, RawPage};
use crate::addr::{Pfn, VirtAddr};
use crate::kernel::{CpuId, Kernel};
use std::collections::HashMap;

/// What a page is used for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Kind {
    /// Free, in the buddy allocator.
    Free,
    /// Free, on a CPU's own list.
    FreePerCpu,
    /// A slab.
    Slab,
    /// One of kmalloc's that are too large for slabs.
    LargeKmalloc,
    /// Anonymous.
    Anon,
    /// Anonymous, part of a transparent huge page or a smaller large folio.
    AnonLarge,
    /// Anonymous and in the swap cache.
    SwapCache,
    /// Anonymous, merged by KSM.
    Ksm,
    /// Page cache, clean.
    File,
    /// Page cache, dirty or being written.
    FileDirty,
    /// tmpfs and shared memory.
    Shmem,
    /// Of hugetlbfs, free ones included.
    HugeTlb,
    /// A page table.
    PageTable,
    /// A task's kernel stack.
    Stack,
    /// Other memory from vmalloc.
    Vmalloc,
    /// Per-CPU variables.
    PerCpu,
    /// The kernel's image: code, data and what it was loaded with.
    Image,
    /// The `struct page`s themselves.
    Vmemmap,
    /// Ftrace's records of what can be traced.
    Ftrace,
    /// The page of zeros that untouched memory is read from, and the huge one.
    Zero,
    /// Memory of a device (`ZONE_DEVICE`).
    Device,
    /// Offline: balloon, or memory to be unplugged.
    Offline,
    /// Guard page of debug_pagealloc.
    Guard,
    /// zsmalloc's.
    Zsmalloc,
    /// Not yet accepted from the hypervisor.
    Unaccepted,
    /// Kernel pages that can be moved.
    Movable,
    /// Other reserved pages: firmware's, allocated before the page allocator ran, absent.
    Reserved,
    /// Other pages that the kernel holds.
    Kernel,
    /// Without references and on no list that was found.
    Unknown,
}

impl Kind {
    /// Every kind, in the order they are shown in.
    pub const ALL: [Self; 29] = [
        Self::Free,
        Self::FreePerCpu,
        Self::Anon,
        Self::AnonLarge,
        Self::SwapCache,
        Self::Ksm,
        Self::File,
        Self::FileDirty,
        Self::Shmem,
        Self::HugeTlb,
        Self::Slab,
        Self::LargeKmalloc,
        Self::PageTable,
        Self::Stack,
        Self::Vmalloc,
        Self::PerCpu,
        Self::Ftrace,
        Self::Vmemmap,
        Self::Image,
        Self::Zero,
        Self::Kernel,
        Self::Movable,
        Self::Zsmalloc,
        Self::Device,
        Self::Offline,
        Self::Guard,
        Self::Unaccepted,
        Self::Reserved,
        Self::Unknown,
    ];

    /// A short fixed name for tables and JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Free => "free",
            Self::FreePerCpu => "free-per-cpu",
            Self::Slab => "slab",
            Self::LargeKmalloc => "large-kmalloc",
            Self::Anon => "anon",
            Self::AnonLarge => "anon-large",
            Self::SwapCache => "swap-cache",
            Self::Ksm => "ksm",
            Self::File => "file",
            Self::FileDirty => "file-dirty",
            Self::Shmem => "shmem",
            Self::HugeTlb => "hugetlb",
            Self::PageTable => "page-table",
            Self::Stack => "kernel-stack",
            Self::Vmalloc => "vmalloc",
            Self::PerCpu => "percpu",
            Self::Image => "kernel-image",
            Self::Vmemmap => "vmemmap",
            Self::Ftrace => "ftrace",
            Self::Zero => "zero",
            Self::Device => "device",
            Self::Offline => "offline",
            Self::Guard => "guard",
            Self::Zsmalloc => "zsmalloc",
            Self::Unaccepted => "unaccepted",
            Self::Movable => "movable-kernel",
            Self::Reserved => "reserved",
            Self::Kernel => "kernel",
            Self::Unknown => "unknown",
        }
    }

    /// What names its flags go by.
    pub fn context(self) -> Context {
        match self {
            Self::Free => Context::Buddy,
            Self::Slab => Context::Slab,
            Self::Anon | Self::AnonLarge | Self::SwapCache | Self::Ksm => Context::Anon,
            Self::File | Self::FileDirty => Context::File,
            Self::Shmem => Context::Shmem,
            Self::Movable | Self::Zsmalloc => Context::Movable,
            _ => Context::Other,
        }
    }
}

/// Where a free page lies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Free {
    /// First page of the free block.
    pub head: Pfn,
    /// Log2 of its pages.
    pub order: u32,
    /// The CPU whose list it is on; `None` in the buddy allocator.
    pub cpu: Option<CpuId>,
    /// The migrate type of the list, where it was found on one.
    pub migratetype: Option<u64>,
}

/// What telling a page's kind needs, looked up once.
#[derive(Clone, Copy, Debug)]
pub struct Marks {
    slab: u64,
    swapbacked: u64,
    swapcache: u64,
    dirty: u64,
    writeback: u64,
    reserved: u64,
    head: u64,
    /// `HUGETLB_PAGE_DTOR`, where the first tail tells hugetlb pages by their destructor.
    hugetlb_dtor: Option<u8>,
    /// `PG_hugetlb` in the first tail's flags; 0 in kernels without.
    hugetlb: u64,
    device_zone: Option<u64>,
    /// Whether bit 1 of `mapping` alone means movable.
    movable_mapping: bool,
}

impl Marks {
    /// The marks of this kernel.
    pub fn new(kernel: &Kernel, map: &PageMap) -> Self {
        let mask = |name| map.flags.mask(name);
        let constant = |name: &str| kernel.types().and_then(|types| types.constant(name));
        Self {
            slab: mask("slab"),
            swapbacked: mask("swapbacked"),
            swapcache: mask("swapcache"),
            dirty: mask("dirty"),
            writeback: mask("writeback"),
            reserved: mask("reserved"),
            head: mask("head"),
            hugetlb_dtor: constant("HUGETLB_PAGE_DTOR").and_then(|dtor| u8::try_from(dtor).ok()),
            hugetlb: mask("hugetlb"),
            device_zone: constant("ZONE_DEVICE").map(|zone| zone as u64),
            movable_mapping: map.flags.bit("movable_ops").is_none(),
        }
    }

    /// Whether the page is the head of a compound page.
    pub fn is_head(&self, raw: &RawPage) -> bool {
        raw.flags & self.head != 0
    }

    /// The kind of a page that is no tail. `second` reads the `struct page` after it.
    pub fn kind(&self, map: &PageMap, raw: &RawPage, second: impl FnOnce() -> Option<RawPage>) -> Kind {
        if raw.flags & self.slab != 0 {
            return Kind::Slab;
        }
        for name in map.types.of(raw.mapcount) {
            return match name {
                "buddy" => Kind::Free,
                "slab" => Kind::Slab,
                "table" => Kind::PageTable,
                "offline" => Kind::Offline,
                "guard" => Kind::Guard,
                "hugetlb" => Kind::HugeTlb,
                "zsmalloc" => Kind::Zsmalloc,
                "unaccepted" => Kind::Unaccepted,
                "large_kmalloc" => Kind::LargeKmalloc,
                // Only says that the page is charged.
                "kmemcg" => continue,
                _ => Kind::Kernel,
            };
        }
        if self.device_zone.is_some() && map.flags.zone_of(raw.flags) == self.device_zone {
            return Kind::Device;
        }
        if raw.flags & self.reserved != 0 {
            return Kind::Reserved;
        }
        // The destructor until v6.5, then a flag until v6.8; since then it is a page type.
        let is_hugetlb = |second: RawPage| {
            self.hugetlb_dtor.is_some_and(|dtor| second.dtor == Some(dtor))
                || second.flags & self.hugetlb != 0
        };
        let told_by_second = self.hugetlb_dtor.is_some() || self.hugetlb != 0;
        if told_by_second && self.is_head(raw) && second().is_some_and(is_hugetlb) {
            return Kind::HugeTlb;
        }
        if raw.refcount == 0 {
            return Kind::Unknown;
        }
        match raw.mapping & 3 {
            1 if self.swapcache != 0 && raw.flags & self.swapcache != 0 => Kind::SwapCache,
            1 if self.is_head(raw) => Kind::AnonLarge,
            1 => Kind::Anon,
            3 => Kind::Ksm,
            2 if self.movable_mapping => Kind::Movable,
            // A page of tmpfs on its way to swap and back.
            0 if raw.mapping == 0
                && raw.flags & self.swapbacked != 0
                && self.swapcache != 0
                && raw.flags & self.swapcache != 0 =>
            {
                Kind::SwapCache
            }
            0 if raw.mapping >> 63 == 1 => match raw.flags {
                flags if flags & self.swapbacked != 0 => Kind::Shmem,
                flags if flags & (self.dirty | self.writeback) != 0 => Kind::FileDirty,
                _ => Kind::File,
            },
            _ => Kind::Kernel,
        }
    }
}

/// The free block of the buddy allocator that `pfn` lies in.
pub fn buddy_block(kernel: &Kernel, map: &PageMap, pfn: Pfn) -> Option<Free> {
    (0..=10).find_map(|order| {
        let head = Pfn(pfn.0 & !((1 << order) - 1));
        let raw = map.read(kernel, map.page(head)?).ok()?;
        let free = map.types.is(raw.mapcount, "buddy") && (order..=10).contains(&raw.private);
        free.then_some(Free { head, order: raw.private as u32, cpu: None, migratetype: None })
    })
}

/// Every page on a CPU's list of free pages, with the block it lies in.
pub fn per_cpu_blocks(kernel: &Kernel, map: &PageMap) -> HashMap<Pfn, Free> {
    let mut pages = HashMap::new();
    for zone in kernel.zones().unwrap_or_default() {
        for (cpu, lists) in zone.per_cpu_lists(map) {
            for block in lists.blocks {
                let migratetype = Some(block.migratetype);
                let free = Free { head: block.pfn, order: block.order, cpu: Some(cpu), migratetype };
                pages.extend((0..1u64 << block.order.min(18)).map(|i| (Pfn(block.pfn.0 + i), free)));
            }
        }
    }
    pages
}

/// The page after `at`.
pub fn second(kernel: &Kernel, map: &PageMap, at: VirtAddr) -> Option<RawPage> {
    map.read(kernel, at.wrapping_add(map.page_bytes)).ok()
}
