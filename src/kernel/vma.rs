//! Areas of user memory: the one that an address lies in.
//!
//! Source: `include/linux/mm_types.h` (`struct vm_area_struct`), `include/linux/maple_tree.h`.

use super::page::mapping;
use super::{Kernel, Object, ObjectError};
use crate::addr::VirtAddr;

/// Areas of one process are at most `max_map_count`, 65530 by default.
const AREAS_MAX: usize = 1 << 20;
/// Levels of a maple tree over all of 64 bits.
const DEPTH: usize = 32;
/// `vm_flags` that are permissions.
const PERMISSIONS: [(u64, char); 4] = [(1, 'r'), (2, 'w'), (4, 'x'), (8, 's')];

/// An area of user memory.
#[derive(Clone, Copy)]
pub struct Vma<'k> {
    /// Its `struct vm_area_struct`.
    pub vma: Object<'k>,
    /// First address.
    pub start: VirtAddr,
    /// One past the last.
    pub end: VirtAddr,
}

impl<'k> Vma<'k> {
    fn new(vma: Object<'k>) -> Result<Self, ObjectError> {
        Ok(Self { vma, start: VirtAddr(vma.get("vm_start")?), end: VirtAddr(vma.get("vm_end")?) })
    }

    /// `rw-p` as in `/proc/PID/maps`.
    pub fn permissions(&self) -> String {
        let flags = self.vma.get("vm_flags").unwrap_or(0);
        let letter = |&(bit, letter): &(u64, char)| match (flags & bit != 0, letter) {
            (true, letter) => letter,
            (false, 's') => 'p',
            (false, _) => '-',
        };
        PERMISSIONS.iter().map(letter).collect()
    }

    /// Path of the file it maps, from the root of its file system; `None` for anonymous memory.
    pub fn file(&self) -> Option<String> {
        mapping::path(self.vma.at("vm_file").ok()??.at("f_path.dentry").ok()??)
    }
}

impl Kernel {
    /// The area of the address space `mm` that `at` lies in.
    pub fn vma_at<'k>(&'k self, mm: Object<'k>, at: VirtAddr) -> Result<Option<Vma<'k>>, ObjectError> {
        let found = match mm.member("mm_mt") {
            // Since Linux commit d4af56c5c7c6 ("mm: start tracking VMAs with maple tree") (in v6.1).
            Ok(tree) => maple_load(tree, at.0)?,
            Err(_) => list_find(mm, at)?,
        };
        let Some(found) = found else { return Ok(None) };
        let vma = Vma::new(self.object("vm_area_struct", found)?)?;
        Ok((vma.start <= at && at < vma.end).then_some(vma))
    }
}

/// The list of areas in order of address.
fn list_find(mm: Object<'_>, at: VirtAddr) -> Result<Option<VirtAddr>, ObjectError> {
    let mut next = mm.at("mmap")?;
    for _ in 0..AREAS_MAX {
        let Some(vma) = next else { break };
        if at.0 < vma.get("vm_end")? {
            return Ok(Some(vma.at));
        }
        next = vma.at("vm_next")?;
    }
    Ok(None)
}

/// The entry of a maple tree at `index`.
fn maple_load(tree: Object<'_>, index: u64) -> Result<Option<VirtAddr>, ObjectError> {
    let kernel = tree.kernel();
    let mut entry = tree.get("ma_root")?;
    let leaf = |entry: u64| (entry != 0 && entry & 3 == 0).then_some(VirtAddr(entry));
    // Only the root is marked as a node; below it, the level tells.
    if entry & 3 != 2 || entry <= 4096 {
        return Ok(leaf(entry));
    }
    for _ in 0..DEPTH {
        // The lowest byte holds the node's type in bits 3 to 6.
        let (node, kind) = (VirtAddr(entry & !0xff), entry >> 3 & 0xf);
        let name = match kind {
            1 | 2 => "maple_range_64",
            3 => "maple_arange_64",
            _ => {
                return Err(ObjectError::NotA {
                    what: format!("maple node {entry:#x}"),
                    wanted: "of a type that is known",
                });
            }
        };
        let node = kernel.object(name, node)?;
        let (pivots, slots) = (node.member("pivot")?, node.member("slot")?);
        let count = pivots.count()?.min(64);
        let mut slot = count;
        for i in 0..count {
            let pivot = pivots.index(i)?.u64()?;
            // The first pivot may be 0; any other that is ends the node.
            if index <= pivot || i > 0 && pivot == 0 {
                slot = i;
                break;
            }
        }
        entry = slots.index(slot)?.u64()?;
        if kind == 1 {
            return Ok(leaf(entry));
        }
    }
    Err(ObjectError::NotA { what: format!("maple tree at {}", tree.at), wanted: "of sane depth" })
}
