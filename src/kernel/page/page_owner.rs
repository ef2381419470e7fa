//! page_owner: who allocated and who freed a page last, where the kernel keeps a record of it (`page_owner=on`).
//!
//! Knows the extension of `struct page` that is kept apart from it, and the record in it; stacks are the depot's. The
//! extensions lie by section: x86-64 has no kernels without SPARSEMEM. Source: `mm/page_owner.c`, `mm/page_ext.c`.

use super::PageMap;
use crate::addr::{Pfn, VirtAddr};
use crate::kernel::stack_depot::StackDepot;
use crate::kernel::{Fields, Kernel, ObjectError};

/// `PAGE_EXT_INVALID`: the section is going offline.
const INVALID: u64 = 1;
/// A page has some dozens of bytes of extensions.
const EXTENSION_MAX: u64 = 4096;
/// Members of `struct page_owner` in the order of [`PageOwners::of`]. Since Linux v6.8 it has who freed the page.
const MEMBERS: [&[&str]; 12] = [
    &["order"],
    &["gfp_mask"],
    &["pid"],
    &["tgid"],
    &["comm"],
    &["ts_nsec"],
    &["free_ts_nsec"],
    &["free_pid"],
    &["free_tgid"],
    &["last_migrate_reason"],
    &["handle"],
    &["free_handle"],
];
/// Flags for allocations by their names in an enumeration, `___GFP_<name>_BIT`; before about v6.10 only macros name them,
/// and their numbers have changed.
const GFP: [&str; 28] = [
    "DMA",
    "HIGHMEM",
    "DMA32",
    "MOVABLE",
    "RECLAIMABLE",
    "HIGH",
    "IO",
    "FS",
    "ZERO",
    "DIRECT_RECLAIM",
    "KSWAPD_RECLAIM",
    "WRITE",
    "NOWARN",
    "RETRY_MAYFAIL",
    "NOFAIL",
    "NORETRY",
    "MEMALLOC",
    "COMP",
    "NOMEMALLOC",
    "HARDWALL",
    "THISNODE",
    "ACCOUNT",
    "ZEROTAGS",
    "SKIP_ZERO",
    "SKIP_KASAN",
    "NOLOCKDEP",
    "NO_OBJ_EXT",
    "NO_CODETAG",
];

/// A stack, or why it cannot be had; `None` where the kernel kept none.
pub type Stack = Option<Result<Vec<VirtAddr>, ObjectError>>;

/// What the kernel keeps of a page that was allocated since page_owner began. Members that this kernel has not, or that
/// cannot be read, are `None`.
#[derive(Clone, Debug)]
pub struct PageOwner {
    /// Whether it is allocated now.
    pub allocated: bool,
    /// Log2 of the pages that were allocated together.
    pub order: Option<u64>,
    /// `gfp_t` of the allocation.
    pub gfp_mask: Option<u32>,
    /// Thread that allocated it.
    pub pid: Option<i32>,
    /// Process that allocated it.
    pub tgid: Option<i32>,
    /// Name of the thread. Untrusted text.
    pub comm: Option<String>,
    /// When it was allocated, by `local_clock`, in nanoseconds.
    pub ts_nsec: Option<u64>,
    /// When it was freed last; 0 for never.
    pub free_ts_nsec: Option<u64>,
    /// Thread that freed it last.
    pub free_pid: Option<i32>,
    /// Process that freed it last.
    pub free_tgid: Option<i32>,
    /// Name of `enum migrate_reason`, if it has been moved since.
    pub migrate_reason: Option<String>,
    /// Where it was allocated.
    pub stack: Stack,
    /// Where it was freed last.
    pub free_stack: Stack,
}

/// The records of a kernel that keeps them.
pub struct PageOwners<'k> {
    kernel: &'k Kernel,
    map: &'k PageMap,
    depot: Result<StackDepot<'k>, ObjectError>,
    fields: Fields<'k>,
    /// Bytes of all extensions of one page, and where among them the record lies.
    extension: u64,
    offset: u64,
    /// Numbers of the bits in `struct page_ext` for a record that is there, and for a page that is allocated.
    tracked_bit: i64,
    allocated_bit: i64,
    gfp: Vec<(u32, &'static str)>,
}

impl<'k> PageOwners<'k> {
    /// `None` for a kernel without page_owner, or that was booted without it.
    pub fn new(kernel: &'k Kernel, map: &'k PageMap) -> Result<Option<Self>, ObjectError> {
        if kernel.symbol("page_owner_inited").is_none()
            || kernel.global("static_key", "page_owner_inited")?.get("enabled.counter")? == 0
        {
            return Ok(None);
        }
        let types = kernel.image_types()?;
        let bit = |name: &str| types.constant(name).ok_or_else(|| ObjectError::NoType(name.to_owned()));
        let no_size = || ObjectError::NoSymbol("page_ext_size".into());
        let extension =
            kernel.symbol("page_ext_size").and_then(|at| kernel.read_u64(at)).ok_or_else(no_size)?;
        let offset = kernel.global("page_ext_operations", "page_owner_ops")?.get("offset")?;
        if extension > EXTENSION_MAX || offset > extension {
            let what = format!("offset {offset:#x} in {extension:#x} bytes of page_ext");
            return Err(ObjectError::NotA { what, wanted: "where a record can be" });
        }
        let number = |name: &str| u32::try_from(types.constant(&format!("___GFP_{name}_BIT"))?).ok();
        Ok(Some(Self {
            kernel,
            map,
            depot: StackDepot::new(kernel),
            fields: Fields::new(kernel, "page_owner", &MEMBERS)?,
            extension,
            offset,
            tracked_bit: bit("PAGE_EXT_OWNER")?,
            allocated_bit: bit("PAGE_EXT_OWNER_ALLOCATED")?,
            gfp: GFP.iter().filter_map(|&name| Some((number(name)?, name))).collect(),
        }))
    }

    /// What is kept of `pfn`; `None` if it has not been allocated since page_owner began.
    pub fn of(&self, pfn: Pfn) -> Result<Option<PageOwner>, ObjectError> {
        let section = self.map.section(pfn).map_or(0, |section| section.page_ext);
        if section == 0 || section & INVALID != 0 {
            return Ok(None);
        }
        let at = VirtAddr(section.wrapping_add(self.extension.wrapping_mul(pfn.0)));
        let flags = self.kernel.object("page_ext", at)?.get("flags")?;
        let is_set =
            |bit: i64| u32::try_from(bit).ok().and_then(|bit| flags.checked_shr(bit)).unwrap_or(0) & 1 == 1;
        if !is_set(self.tracked_bit) {
            return Ok(None);
        }
        let row = self.fields.read(at.wrapping_add(self.offset));
        let stack = |column| match row.u64(column)? as u32 {
            0 => None,
            handle => Some(self.depot.as_ref().map_err(Clone::clone).and_then(|depot| depot.fetch(handle))),
        };
        Ok(Some(PageOwner {
            allocated: is_set(self.allocated_bit),
            order: row.u64(0),
            gfp_mask: row.u64(1).map(|mask| mask as u32),
            pid: row.i32(2),
            tgid: row.i32(3),
            comm: row.text(4),
            ts_nsec: row.u64(5),
            free_ts_nsec: row.u64(6),
            free_pid: row.i32(7),
            free_tgid: row.i32(8),
            migrate_reason: row.u64(9).and_then(|reason| self.migrate_reason(reason as i16)),
            stack: stack(10),
            free_stack: stack(11),
        }))
    }

    /// -1 is never, and so is `MR_NEVER` of newer kernels.
    fn migrate_reason(&self, reason: i16) -> Option<String> {
        let known = self.kernel.value("enum migrate_reason", VirtAddr(0)).ok().and_then(|reasons| {
            let types = self.kernel.image_types().ok()?;
            types.enumerator(reasons.ty, reason.into())
        });
        let moved = reason >= 0 && known.as_deref() != Some("MR_NEVER");
        moved.then(|| known.unwrap_or_else(|| reason.to_string()))
    }

    /// Names of the flags in `mask`; `None` if this kernel's types do not tell them all.
    pub fn gfp_names(&self, mask: u32) -> Option<Vec<String>> {
        let is_set = |bit: u32| mask.checked_shr(bit).unwrap_or(0) & 1 == 1;
        let set: Vec<_> = self.gfp.iter().filter(|(bit, _)| is_set(*bit)).collect();
        (set.len() as u32 == mask.count_ones())
            .then(|| set.iter().map(|(_, name)| format!("__GFP_{name}")).collect())
    }
}
