//! Zones: nodes' pieces of memory, their free lists, per-CPU lists and counters.
//!
//! Source: `include/linux/mmzone.h` (`struct zone`, `per_cpu_pages`, `pageblock-flags.h`), `mm/vmstat.c`.

use super::cpus::POSSIBLE;
use super::page::{PageMap, SECTION_PAGES};
use super::{CpuId, Kernel, Object, ObjectError};
use crate::addr::{Pfn, VirtAddr};
use crate::debuginfo::types::{Class, Shape};
use std::collections::HashMap;

/// `MAX_NUMNODES` is at most 1024 on x86-64.
const NODES_MAX: u64 = 1024;

/// A zone of a node.
#[derive(Clone, Copy)]
pub struct Zone<'k> {
    /// Number of the node.
    pub node: u64,
    /// Number of the zone in its node.
    pub index: u64,
    /// Its `struct zone`.
    pub zone: Object<'k>,
}

/// A free block found in a free list or on a CPU's list.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FreeBlock {
    /// Its first page.
    pub pfn: Pfn,
    /// Log2 of its pages.
    pub order: u32,
    /// Which of the migrate types' lists it is on.
    pub migratetype: u64,
}

/// What the lists of free pages hold, and where they are broken.
#[derive(Default)]
pub struct FreeLists {
    /// Blocks in the order of the lists.
    pub blocks: Vec<FreeBlock>,
    /// Broken lists.
    pub problems: Vec<String>,
}

impl Kernel {
    /// `struct pglist_data` of every node that exists.
    pub fn nodes(&self) -> Result<Vec<(u64, Object<'_>)>, ObjectError> {
        let Some((table, size)) = self.symbol_and_size("node_data") else {
            // Without CONFIG_NUMA there is one node.
            return Ok(vec![(0, self.global("pglist_data", "contig_page_data")?)]);
        };
        let mut nodes = Vec::new();
        for node in 0..(size / 8).min(NODES_MAX) {
            if let Some(at) = self.read_u64(table.wrapping_add(node * 8)).filter(|&at| at != 0) {
                nodes.push((node, self.object("pglist_data", VirtAddr(at))?));
            }
        }
        Ok(nodes)
    }

    /// Every zone of every node, empty ones included.
    pub fn zones(&self) -> Result<Vec<Zone<'_>>, ObjectError> {
        let mut zones = Vec::new();
        for (node, data) in self.nodes()? {
            let array = data.member("node_zones")?;
            for index in 0..array.count()?.min(8) {
                zones.push(Zone { node, index, zone: array.index(index)? });
            }
        }
        Ok(zones)
    }

    /// The names of `enum migratetype` by number, without their prefix.
    pub fn migratetypes(&self) -> Vec<String> {
        let values = self.enum_values("migratetype");
        let count = values.iter().find(|(name, _)| name == "MIGRATE_TYPES").map_or(0, |(_, n)| *n).min(16);
        let name = |wanted: i64| {
            let plain = |name: &&(String, i64)| {
                name.1 == wanted && name.0 != "MIGRATE_PCPTYPES" && name.0.starts_with("MIGRATE_")
            };
            let found = values.iter().find(plain).and_then(|(name, _)| name.strip_prefix("MIGRATE_"));
            found.map_or_else(|| wanted.to_string(), str::to_lowercase)
        };
        (0..count).map(name).collect()
    }

    /// Names and values of an enumeration; empty where the kernel has none.
    pub fn enum_values(&self, name: &str) -> Vec<(String, i64)> {
        let Some(types) = self.types() else { return Vec::new() };
        match types.find(Class::Enum, name).and_then(|id| types.strip(id)).map(|(_, ty)| ty.shape.clone()) {
            Some(Shape::Enum { values, .. }) => values,
            _ => Vec::new(),
        }
    }

    /// Log2 of the pages of a pageblock, the unit that has a migrate type.
    pub fn pageblock_order(&self) -> u32 {
        // With huge pages of either kind a pageblock is one of them; else it is the largest free block.
        let huge = ["hstates", "transparent_hugepage_flags"].iter().any(|name| self.symbol(name).is_some());
        let largest = self.member("zone", "free_area[1]").map_or(11, |area| {
            let all = self.member("zone", "free_area").and_then(|all| all.size).unwrap_or(0);
            all / area.size.unwrap_or(1).max(1)
        });
        if huge { 9 } else { (largest as u32).saturating_sub(1).min(10) }
    }

    /// The migrate type of the pageblock that holds `pfn`.
    pub fn pageblock_migratetype(&self, map: &PageMap, pfn: Pfn) -> Option<u64> {
        let usage = map.section(pfn)?.usage;
        let bitmap = usage.wrapping_add(self.member("mem_section_usage", "pageblock_flags")?.offset);
        // Since about v6.18 isolation is a bit of its own, and a pageblock has eight bits.
        let own_bits = self
            .enum_values("pageblock_bits")
            .iter()
            .find(|(n, _)| n == "__NR_PAGEBLOCK_BITS")
            .map(|(_, n)| *n);
        let width = own_bits.map_or(4, |bits| (bits.clamp(1, 16) as u64).next_power_of_two());
        let bit = ((pfn.0 % SECTION_PAGES) >> self.pageblock_order()) * width;
        let word = self.read_u64(bitmap.wrapping_add(bit / 64 * 8))? >> (bit % 64);
        let isolated = own_bits.is_some() && word >> 4 & 1 == 1;
        let isolate = self.types().and_then(|types| types.constant("MIGRATE_ISOLATE"));
        match isolate {
            Some(isolate) if isolated => Some(isolate as u64),
            _ => Some(word & 7),
        }
    }
}

impl<'k> Zone<'k> {
    /// Its name, `DMA32` or the like.
    pub fn name(&self) -> String {
        self.zone
            .member("name")
            .and_then(|name| name.text())
            .unwrap_or_else(|_| format!("zone {}", self.index))
    }

    fn kernel(&self) -> &'k Kernel {
        self.zone.kernel()
    }

    /// Walks the buddy allocator's free lists.
    pub fn free_lists(&self, map: &PageMap) -> Result<FreeLists, ObjectError> {
        let mut found = FreeLists::default();
        let areas = self.zone.member("free_area")?;
        for order in 0..areas.count()?.min(20) {
            let lists = areas.index(order)?.member("free_list")?;
            for migratetype in 0..lists.count()?.min(16) {
                let head = lists.index(migratetype)?.at;
                collect(self.kernel(), map, head, (order as u32, migratetype), &mut found);
            }
        }
        Ok(found)
    }

    /// The `struct per_cpu_pages` of `cpu`.
    pub fn per_cpu_pages(&self, cpu: CpuId) -> Result<Object<'k>, ObjectError> {
        let kernel = self.kernel();
        let offset = kernel.per_cpu_offset(cpu).unwrap_or(0);
        // Since Linux commit 28f836b6777b ("mm/page_alloc: split per cpu page lists and zone stats") (in v5.14).
        if let Ok(pageset) = self.zone.get("per_cpu_pageset") {
            return kernel.object("per_cpu_pages", VirtAddr(pageset.wrapping_add(offset)));
        }
        let pageset = self.zone.get("pageset")?;
        kernel.object("per_cpu_pageset", VirtAddr(pageset.wrapping_add(offset)))?.member("pcp")
    }

    /// Walks the lists of free pages that CPUs keep for themselves, by CPU.
    pub fn per_cpu_lists(&self, map: &PageMap) -> HashMap<CpuId, FreeLists> {
        let cpus = self.kernel().cpu_mask(&POSSIBLE).unwrap_or_default();
        let of = |cpu: CpuId| {
            let mut found = FreeLists::default();
            if let Err(error) = self.collect_cpu(map, cpu, &mut found) {
                found.problems.push(format!("lists of CPU {cpu} in zone {}: {error}", self.name()));
            }
            (cpu, found)
        };
        cpus.into_iter().map(of).collect()
    }

    fn collect_cpu(&self, map: &PageMap, cpu: CpuId, found: &mut FreeLists) -> Result<(), ObjectError> {
        let lists = self.per_cpu_pages(cpu)?.member("lists")?;
        let types =
            self.kernel().types().and_then(|t| t.constant("MIGRATE_PCPTYPES")).map_or(3, |n| n.max(1) as u64);
        for index in 0..lists.count()?.min(64) {
            // Since Linux commit 44042b449872 ("mm/page_alloc: allow high-order pages to be stored on the per-cpu
            // lists") (in v5.14): lists by order 0 to 3, then those of huge pages.
            let order = match index / types {
                order @ 0..=3 => order as u32,
                _ => self.kernel().pageblock_order(),
            };
            collect(self.kernel(), map, lists.index(index)?.at, (order, index % types), found);
        }
        Ok(())
    }
}

/// The blocks on one list; (order, migrate type) is what the list is for.
fn collect(kernel: &Kernel, map: &PageMap, head: VirtAddr, list: (u32, u64), found: &mut FreeLists) {
    let offset = kernel.member("page", "lru").map_or(8, |member| member.offset);
    let walk = kernel.list(head);
    found.problems.extend(walk.problem);
    for node in walk.nodes {
        match map.pfn(VirtAddr(node.0.wrapping_sub(offset))) {
            Some(pfn) => found.blocks.push(FreeBlock { pfn, order: list.0, migratetype: list.1 }),
            None => {
                found.problems.push(format!("free list at {head}: {node} is in no struct page"));
                return;
            }
        }
    }
}
