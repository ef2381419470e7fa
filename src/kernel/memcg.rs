//! Memory cgroups: whom a page is charged to. Source: `include/linux/memcontrol.h` (`memcg_data`), `kernfs.h`.

use super::{Kernel, Object, ObjectError};
use crate::addr::VirtAddr;

/// `MEMCG_DATA_OBJEXTS` (before, `MEMCG_DATA_OBJCGS`): a vector, one entry an object of the slab.
const OBJECTS: u64 = 1;
/// Low bits of `memcg_data` that are no address.
const FLAGS: u64 = 0xf;
/// Deeper than any hierarchy of cgroups.
const DEPTH: usize = 256;

/// A memory cgroup.
#[derive(Clone, Debug)]
pub struct MemCgroup {
    /// Its `struct mem_cgroup`.
    pub at: VirtAddr,
    /// Path from the root of the hierarchy. Untrusted text.
    pub path: Option<String>,
    /// Inode number of its directory.
    pub ino: Option<u64>,
}

impl Kernel {
    /// The memory cgroup that `memcg_data` of a page leads to; `None` where it is charged to none, and for slabs,
    /// whose objects are charged one by one.
    pub fn memcg_of(&self, memcg_data: u64) -> Result<Option<MemCgroup>, ObjectError> {
        let at = VirtAddr(memcg_data & !FLAGS);
        if memcg_data & OBJECTS != 0 || at.0 >> 63 != 1 {
            return Ok(None);
        }
        // A kernel page, and in later kernels any page, leads to an obj_cgroup, and that to the mem_cgroup. Which of
        // the two it is shows: every cgroup_subsys_state points at its subsystem.
        let is_memcg = |memcg: &Object<'_>| {
            let subsystem = memcg.get("css.ss").ok();
            subsystem.is_some() && subsystem == self.symbol("memory_cgrp_subsys").map(|at| at.0)
        };
        let direct = self.object("mem_cgroup", at)?;
        let memcg = if is_memcg(&direct) {
            direct
        } else {
            match self.object("obj_cgroup", at)?.at("memcg")?.filter(is_memcg) {
                Some(memcg) => memcg,
                None => return Ok(None),
            }
        };
        let node = memcg.at("css.cgroup").ok().flatten().and_then(|cgroup| cgroup.at("kn").ok().flatten());
        let ino = node.and_then(|node| node.either(&["id.ino", "id"]).ok()?.u64().ok());
        Ok(Some(MemCgroup { at: memcg.at, path: node.and_then(path), ino }))
    }
}

/// The names from the root down to a `struct kernfs_node`.
pub(super) fn path(node: Object<'_>) -> Option<String> {
    let mut names = Vec::new();
    let mut here = node;
    for _ in 0..DEPTH {
        // Since Linux commit 633488947ef6 ("kernfs: Use RCU to access kernfs_node::parent.") (in v6.15).
        let Some(parent) = here.either(&["__parent", "parent"]).ok()?.follow().ok()? else {
            names.reverse();
            return Some(format!("/{}", names.join("/")));
        };
        names.push(here.member("name").ok()?.text().ok()?);
        here = parent;
    }
    None
}
