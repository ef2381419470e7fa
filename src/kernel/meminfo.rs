//! How much memory is used for what: the counters behind `/proc/meminfo` and `/proc/vmstat`.
//!
//! Counters lag behind by what each CPU has not yet added; those differences are added here.
//! Source: `mm/vmstat.c`, `fs/proc/meminfo.c`, `include/linux/mmzone.h`, `include/linux/vmstat.h`.

use super::{Kernel, Object, ObjectError};
use crate::addr::VirtAddr;

/// One counter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counter {
    /// Name of its enumerator, `NR_FREE_PAGES`.
    pub name: String,
    /// The global value.
    pub global: i64,
    /// What CPUs have not yet added to it.
    pub pending: i64,
}

/// Counters of one kind.
#[derive(Clone, Debug)]
pub struct Counters {
    /// `zone`, `node`, `numa` or `event`.
    pub group: &'static str,
    /// In the order of their enumeration.
    pub counters: Vec<Counter>,
}

impl Kernel {
    /// All counters of `/proc/vmstat`. What this kernel lacks is left out.
    pub fn vm_counters(&self) -> Vec<Counters> {
        let groups = [
            ("zone", "zone_stat_item", "NR_VM_ZONE_STAT_ITEMS"),
            ("node", "node_stat_item", "NR_VM_NODE_STAT_ITEMS"),
            ("event", "vm_event_item", "NR_VM_EVENT_ITEMS"),
        ];
        let all = groups.into_iter().filter_map(|(group, items, end)| {
            let count = self.types()?.constant(end)?.clamp(0, 1024) as usize;
            let (global, pending) = match group {
                "event" => (self.events(count), vec![0; count]),
                _ => (self.longs(&format!("vm_{group}_stat"), count)?, self.pending(group, count)),
            };
            let name = |index: usize| self.item_name(items, index as i64);
            let counter = |(index, (global, pending))| Counter { name: name(index), global, pending };
            let counters = global.into_iter().zip(pending).enumerate().map(counter).collect();
            Some(Counters { group, counters })
        });
        all.collect()
    }

    /// The name of item `value`: the last declared, since bases (`NR_LRU_BASE`) stand before what they begin.
    fn item_name(&self, items: &str, value: i64) -> String {
        let values = self.enum_values(items);
        let named = values.into_iter().rev().find(|(_, known)| *known == value);
        named.map_or_else(|| format!("{items}[{value}]"), |(name, _)| name)
    }

    fn longs(&self, symbol: &str, count: usize) -> Option<Vec<i64>> {
        let at = self.symbol(symbol)?;
        (0..count as u64).map(|i| self.read_u64(at.wrapping_add(i * 8)).map(|value| value as i64)).collect()
    }

    /// Events are counted by CPU only.
    fn events(&self, count: usize) -> Vec<i64> {
        let mut sums = vec![0i64; count];
        for cpu in self.possible_cpus() {
            let Some(at) = self.per_cpu("vm_event_states", cpu) else { continue };
            for (index, sum) in sums.iter_mut().enumerate() {
                *sum = sum.wrapping_add(self.read_u64(at.wrapping_add(index as u64 * 8)).unwrap_or(0) as i64);
            }
        }
        sums
    }

    /// Differences that CPUs keep, summed over zones or nodes.
    fn pending(&self, group: &str, count: usize) -> Vec<i64> {
        let mut sums = vec![0i64; count];
        let mut places: Vec<(u64, &str, &str)> = Vec::new();
        if group == "zone" {
            for zone in self.zones().unwrap_or_default() {
                let stats = zone.zone.get("per_cpu_zonestats").map(|at| (at, "per_cpu_zonestat"));
                // Before v5.14 they stood with the lists of free pages.
                let before = || zone.zone.get("pageset").map(|at| (at, "per_cpu_pageset"));
                if let Ok((at, ty)) = stats.or_else(|_| before()) {
                    places.push((at, ty, "vm_stat_diff"));
                }
            }
        } else {
            for (_, node) in self.nodes().unwrap_or_default() {
                if let Ok(at) = node.get("per_cpu_nodestats") {
                    places.push((at, "per_cpu_nodestat", "vm_node_stat_diff"));
                }
            }
        }
        for cpu in self.possible_cpus() {
            let offset = self.per_cpu_offset(cpu).unwrap_or(0);
            for &(at, ty, member) in &places {
                let diffs = self
                    .object(ty, VirtAddr(at.wrapping_add(offset)))
                    .and_then(|o| o.member(member)?.bytes());
                for (sum, diff) in sums.iter_mut().zip(diffs.unwrap_or_default()) {
                    *sum = sum.wrapping_add(i64::from(diff as i8));
                }
            }
        }
        sums
    }

    /// Value of a counter with what is pending; `None` where the kernel has no such.
    pub fn vm_counter(counters: &[Counters], name: &str) -> Option<i64> {
        let all = counters.iter().flat_map(|group| &group.counters);
        all.into_iter().find(|counter| counter.name == name).map(|c| c.global.wrapping_add(c.pending))
    }

    /// The number in a variable.
    fn number(&self, ty: &str, symbol: &str) -> Option<u64> {
        self.value(ty, self.symbol(symbol)?).ok()?.u64().ok()
    }

    /// Sum of a `struct percpu_counter`: its count and every CPU's part.
    fn percpu_counter(&self, counter: Object<'_>) -> Result<i64, ObjectError> {
        let mut sum = counter.member("count")?.i64()?;
        // Without CONFIG_SMP it is only the count.
        if let Ok(parts) = counter.get("counters") {
            for cpu in self.possible_cpus() {
                let at = VirtAddr(parts.wrapping_add(self.per_cpu_offset(cpu).unwrap_or(0)));
                sum = sum.wrapping_add(i64::from(self.read_u32(at).unwrap_or(0) as i32));
            }
        }
        Ok(sum)
    }

    /// Memory by use.
    pub fn meminfo(&self) -> Meminfo {
        let counters = self.vm_counters();
        let counter = |name: &str| Self::vm_counter(&counters, name).map(|n| n.max(0) as u64);
        let buffers = self.block_device_pages();
        let swap_cached = counter("NR_SWAPCACHE").or_else(|| self.swapper_spaces());
        let file = counter("NR_FILE_PAGES");
        let slab = |name: &str| counter(&format!("{name}_B")).or_else(|| counter(name));
        let total = self.number("atomic_long_t", "_totalram_pages");
        let huge = self.hugetlb();
        let huge_pages = huge.iter().map(|pool| pool.total << pool.order.min(18)).sum();
        let swap_total = self.number("long", "total_swap_pages");
        let kbytes = self.number("unsigned long", "sysctl_overcommit_kbytes").filter(|&kbytes| kbytes != 0);
        let ratio = self.number("int", "sysctl_overcommit_ratio").unwrap_or(50).min(1000);
        let limit = total.map(|total: u64| match kbytes {
            Some(kbytes) => kbytes / 4,
            None => total.saturating_sub(huge_pages) * ratio / 100,
        });
        Meminfo {
            total,
            free: counter("NR_FREE_PAGES"),
            shmem: counter("NR_SHMEM"),
            buffers,
            cached: file.map(|file| {
                let less = swap_cached.unwrap_or(0) + buffers.unwrap_or(0);
                file.saturating_sub(less)
            }),
            swap_cached,
            anon: counter("NR_ANON_MAPPED"),
            mapped: counter("NR_FILE_MAPPED"),
            dirty: counter("NR_FILE_DIRTY"),
            writeback: counter("NR_WRITEBACK"),
            slab_reclaimable: slab("NR_SLAB_RECLAIMABLE"),
            slab_unreclaimable: slab("NR_SLAB_UNRECLAIMABLE"),
            page_tables: counter("NR_PAGETABLE"),
            kernel_stack_kb: counter("NR_KERNEL_STACK_KB"),
            huge,
            swap_total,
            swap_free: self.number("atomic_long_t", "nr_swap_pages"),
            commit_limit: limit.map(|limit| limit + swap_total.unwrap_or(0)),
            committed: self
                .global("percpu_counter", "vm_committed_as")
                .and_then(|counter| self.percpu_counter(counter))
                .ok()
                .map(|n| n.max(0) as u64),
        }
    }

    /// Pages in the swap cache, before Linux commit b6038942480e ("mm: memcg: add swapcache stat for memcg v2") (in v5.12)
    /// counted them.
    fn swapper_spaces(&self) -> Option<u64> {
        let (spaces, counts) = (self.symbol("swapper_spaces")?, self.symbol("nr_swapper_spaces")?);
        let bytes = self.object("address_space", VirtAddr(0)).ok()?.size().ok()?;
        let mut pages = 0u64;
        // Indexed by swap area, of which there are fewer than 32.
        for area in 0..u64::from(self.swap_areas()?.min(32)) {
            let first = self.read_u64(spaces.wrapping_add(area * 8)).filter(|&at| at != 0);
            let count = self.read_u32(counts.wrapping_add(area * 4)).unwrap_or(0).min(1 << 16);
            for index in first.map_or(0..0, |_| 0..u64::from(count)) {
                let at = VirtAddr(first.unwrap_or(0).wrapping_add(index * bytes));
                pages = pages.saturating_add(self.object("address_space", at).ok()?.get("nrpages").ok()?);
            }
        }
        Some(pages)
    }

    /// How many swap areas have ever been in use at once.
    fn swap_areas(&self) -> Option<u32> {
        self.symbol("nr_swapfiles").and_then(|at| self.read_u32(at))
    }

    /// Pages in the page caches of block devices: what `/proc/meminfo` calls Buffers.
    fn block_device_pages(&self) -> Option<u64> {
        let sb = self.read_u64(self.symbol("blockdev_superblock")?).filter(|&at| at != 0)?;
        let inodes = self.object("super_block", VirtAddr(sb)).ok()?.member("s_inodes").ok()?;
        let mut pages = 0u64;
        for node in self.list(inodes.at).nodes {
            let inode = self.object("list_head", node).ok()?.container_of("inode", "i_sb_list").ok()?;
            let mapping = inode.at("i_mapping").ok()??;
            pages = pages.saturating_add(mapping.get("nrpages").ok()?);
        }
        Some(pages)
    }

    /// The pools of hugetlb pages, one for each size.
    pub fn hugetlb(&self) -> Vec<HugePool> {
        let count = self.symbol("hugetlb_max_hstate").and_then(|at| self.read_u32(at)).unwrap_or(0).min(8);
        let Some(first) = self.symbol("hstates") else { return Vec::new() };
        let pool = |index: u32| {
            let size = self.object("hstate", first).ok()?.size().ok()?;
            let pool = self.object("hstate", first.wrapping_add(size.wrapping_mul(index.into()))).ok()?;
            Some(HugePool {
                at: pool.at,
                name: pool.member("name").ok()?.text().ok()?,
                order: pool.get("order").ok()? as u32,
                total: pool.get("nr_huge_pages").ok()?,
                free: pool.get("free_huge_pages").ok()?,
                reserved: pool.get("resv_huge_pages").ok()?,
                surplus: pool.get("surplus_huge_pages").ok()?,
            })
        };
        (0..count).filter_map(pool).collect()
    }
}

/// A pool of hugetlb pages of one size.
#[derive(Clone, Debug)]
pub struct HugePool {
    /// Its `struct hstate`.
    pub at: VirtAddr,
    /// `hugepages-2048kB`.
    pub name: String,
    /// Log2 of the base pages of one.
    pub order: u32,
    /// Pages there are.
    pub total: u64,
    /// Of those, not in use.
    pub free: u64,
    /// Of the free ones, promised to mappings.
    pub reserved: u64,
    /// Pages beyond the configured number.
    pub surplus: u64,
}

/// Memory by use, in base pages unless the name says otherwise; `None` where this kernel does not tell.
#[derive(Clone, Debug, Default)]
#[allow(missing_docs)]
pub struct Meminfo {
    pub total: Option<u64>,
    pub free: Option<u64>,
    pub shmem: Option<u64>,
    pub buffers: Option<u64>,
    pub cached: Option<u64>,
    pub swap_cached: Option<u64>,
    pub anon: Option<u64>,
    pub mapped: Option<u64>,
    pub dirty: Option<u64>,
    pub writeback: Option<u64>,
    pub slab_reclaimable: Option<u64>,
    pub slab_unreclaimable: Option<u64>,
    pub page_tables: Option<u64>,
    pub kernel_stack_kb: Option<u64>,
    pub huge: Vec<HugePool>,
    pub swap_total: Option<u64>,
    pub swap_free: Option<u64>,
    pub commit_limit: Option<u64>,
    pub committed: Option<u64>,
}
