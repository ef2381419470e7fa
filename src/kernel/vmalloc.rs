//! Areas that vmalloc, ioremap and their kin gave out, and the pages behind them.
//!
//! Source: `include/linux/vmalloc.h` (`struct vmap_area`, `struct vm_struct`), `mm/percpu.c`.

use super::cpus::POSSIBLE;
use super::page::{Kind, PageMap};
use super::{CpuId, Kernel, Object, ObjectError};
use crate::addr::{PAGE_SIZE, Pfn, VirtAddr};
use crate::bytes::u64_at;
use std::collections::HashSet;

/// `vm_struct.flags` by bit (`VM_IOREMAP` and so on); bits above differ between versions.
const FLAGS: [(u64, &str); 7] = [
    (0x1, "ioremap"),
    (0x2, "vmalloc"),
    (0x4, "vmap"),
    (0x8, "user"),
    (0x10, "dma-coherent"),
    (0x20, "uninitialized"),
    (0x40, "no-guard"),
];
/// More areas than any kernel has: hostile lists end here.
const AREAS_MAX: usize = 1 << 20;
/// The most pages looked at in one area.
const PAGES_MAX: u64 = 1 << 24;

/// An area of kernel virtual addresses.
#[derive(Clone, Copy)]
pub struct Area<'k> {
    /// First address.
    pub start: VirtAddr,
    /// One past the last, the guard page included.
    pub end: VirtAddr,
    /// Its `struct vmap_area`.
    pub area: Object<'k>,
    /// Its `struct vm_struct`, if it has one (vm_map_ram's areas have none).
    pub vm: Option<Object<'k>>,
}

/// All areas by address, and what is broken.
#[derive(Default)]
pub struct Areas<'k> {
    /// In ascending order.
    pub areas: Vec<Area<'k>>,
    /// Broken lists and areas.
    pub problems: Vec<String>,
}

impl Area<'_> {
    /// Names of its flags.
    pub fn flags(&self) -> Vec<&'static str> {
        let flags = self.vm.and_then(|vm| vm.get("flags").ok()).unwrap_or(0);
        FLAGS.iter().filter(|(bit, _)| flags & bit != 0).map(|(_, name)| *name).collect()
    }

    /// The function that asked for it: name and offset.
    pub fn caller(&self) -> Option<String> {
        let vm = self.vm?;
        let at = vm.get("caller").ok().filter(|&at| at != 0)?;
        Some(match vm.kernel().symbolize(VirtAddr(at)) {
            Some(found) => found.to_string(),
            None => format!("{at:#x}"),
        })
    }

    /// Pages it has, as far as `vm_struct` tells.
    pub fn page_count(&self) -> Option<u64> {
        self.vm.and_then(|vm| vm.get("nr_pages").ok())
    }
}

impl Kernel {
    /// Every area in use.
    pub fn vmap_areas(&self) -> Result<Areas<'_>, ObjectError> {
        let mut all = Areas::default();
        let mut heads = Vec::new();
        // Since Linux commit d093602919ad ("mm: vmalloc: remove global vmap_area_root rb-tree") (in v6.9) areas are
        // spread over nodes.
        if let Some(nodes) = self.symbol("vmap_nodes").and_then(|at| self.read_u64(at)) {
            let count = self.symbol("nr_vmap_nodes").and_then(|at| self.read_u32(at)).unwrap_or(1).min(1024);
            let node = self.object("vmap_node", VirtAddr(nodes))?;
            for index in 0..u64::from(count) {
                let at = node.at.wrapping_add(index.wrapping_mul(node.size()?));
                heads.push(self.object("vmap_node", at)?.member("busy.head")?.at);
            }
        } else {
            let no_symbol = || ObjectError::NoSymbol("vmap_area_list".into());
            heads.push(self.symbol("vmap_area_list").ok_or_else(no_symbol)?);
        }
        for head in heads {
            let walk = self.list(head);
            all.problems.extend(walk.problem);
            for node in walk.nodes.into_iter().take(AREAS_MAX) {
                match self.vmap_area(node) {
                    Ok(area) => all.areas.push(area),
                    Err(error) => all.problems.push(format!("vmap_area at {node}: {error}")),
                }
            }
        }
        all.areas.sort_by_key(|area| area.start);
        Ok(all)
    }

    fn vmap_area(&self, node: VirtAddr) -> Result<Area<'_>, ObjectError> {
        let area = self.object("list_head", node)?.container_of("vmap_area", "list")?;
        let vm = area.at("vm").ok().flatten();
        Ok(Area { start: VirtAddr(area.get("va_start")?), end: VirtAddr(area.get("va_end")?), area, vm })
    }

    /// The area that `at` lies in.
    pub fn vmap_area_at(&self, at: VirtAddr) -> Option<Area<'_>> {
        let all = self.vmap_areas().ok()?;
        all.areas.into_iter().find(|area| area.start <= at && at < area.end)
    }

    /// The pages behind vmalloc's areas, each with what it is used for.
    pub fn vmalloc_pages(&self, map: &PageMap, problems: &mut Vec<String>) -> Vec<(Pfn, Kind)> {
        let areas = match self.vmap_areas() {
            Ok(areas) => areas,
            Err(error) => {
                problems.push(format!("vmalloc areas: {error}"));
                return Vec::new();
            }
        };
        problems.extend(areas.problems);
        let stacks: HashSet<u64> = match self.tasks() {
            Ok(tasks) => tasks.tasks.iter().filter_map(|task| task.get("stack").ok()).collect(),
            Err(_) => HashSet::new(),
        };
        let mut pages = Vec::new();
        for area in areas.areas {
            let Some(vm) = area.vm else { continue };
            let caller = vm
                .get("caller")
                .ok()
                .and_then(|at| self.symbolize(VirtAddr(at)))
                .map_or("", |found| found.name);
            let is_stack = stacks.contains(&area.start.0) || STACK_CALLERS.contains(&caller);
            if vm.get("pages").unwrap_or(0) != 0 {
                let kind = if is_stack { Kind::Stack } else { Kind::Vmalloc };
                pages.extend(self.area_pages(map, &area).into_iter().map(|(pfn, _)| (pfn, kind)));
            } else if caller == "pcpu_get_vm_areas" {
                // Chunks of per-CPU memory are mapped a page at a time, and keep no array.
                pages.extend(self.mapped(map, area.start, area.end).map(|pfn| (pfn, Kind::PerCpu)));
            }
        }
        pages
    }

    /// The pages in an area's own list, each with its address; none of an area without a list.
    pub fn area_pages(&self, map: &PageMap, area: &Area<'_>) -> Vec<(Pfn, VirtAddr)> {
        let member = |path: &str| area.vm.and_then(|vm| vm.get(path).ok()).unwrap_or(0);
        let array = member("pages");
        if array == 0 {
            return Vec::new();
        }
        let mut words = vec![0; member("nr_pages").min(PAGES_MAX) as usize * 8];
        let filled = self.read(VirtAddr(array), &mut words).filled;
        words.truncate(filled);
        let addresses = (0..).map(|page: u64| area.start.wrapping_add(page.wrapping_mul(PAGE_SIZE)));
        let structs = words.chunks_exact(8).map(|word| u64_at(word, 0)).zip(addresses);
        structs.filter_map(|(page, at)| Some((map.pfn(VirtAddr(page?))?, at))).collect()
    }

    /// The RAM that `start..end` is mapped to.
    fn mapped<'m>(
        &'m self,
        map: &'m PageMap,
        start: VirtAddr,
        end: VirtAddr,
    ) -> impl Iterator<Item = Pfn> + 'm {
        let count = (end.0.saturating_sub(start.0) / PAGE_SIZE).min(PAGES_MAX);
        (0..count).filter_map(move |page| {
            let at = start.wrapping_add(page * PAGE_SIZE);
            let pfn = self.found.space.translate(&*self.backend, at).ok()?.phys.pfn();
            map.section(pfn).map(|_| pfn)
        })
    }

    /// The pages of the first chunk of per-CPU memory, which is set up before vmalloc works.
    pub fn first_percpu_chunk(&self, map: &PageMap) -> Vec<Pfn> {
        let base = self.symbol("pcpu_base_addr").and_then(|at| self.read_u64(at));
        let (Some(base), Some((unit, offsets))) = (base, self.per_cpu_units()) else { return Vec::new() };
        // What a unit does not need was given back; the chunk begins behind the variables of the image.
        let used = self.symbol("pcpu_first_chunk").and_then(|at| {
            let chunk = self.object("pcpu_chunk", VirtAddr(self.read_u64(at)?)).ok()?;
            let start = VirtAddr(chunk.get("base_addr").ok()?).offset_from(VirtAddr(base))?;
            start.checked_add(chunk.get("nr_pages").ok()?.checked_mul(PAGE_SIZE)?)
        });
        let unit = used.map_or(unit, |used| used.min(unit));
        let unit_pages = |(_, offset): (CpuId, u64)| {
            let start = VirtAddr(base).wrapping_add(offset);
            self.mapped(map, start, start.wrapping_add(unit)).collect::<Vec<_>>()
        };
        offsets.into_iter().flat_map(unit_pages).collect()
    }

    /// Bytes of a CPU's unit in a chunk of per-CPU memory, and where in a chunk each CPU's is.
    fn per_cpu_units(&self) -> Option<(u64, Vec<(CpuId, u64)>)> {
        let unit = u64::from(self.symbol("pcpu_unit_size").and_then(|at| self.read_u32(at))?);
        let table = VirtAddr(self.read_u64(self.symbol("pcpu_unit_offsets")?)?);
        let offset = |cpu: CpuId| Some((cpu, self.read_u64(table.wrapping_add(u64::from(cpu.0) * 8))?));
        let offsets = self.cpu_mask(&POSSIBLE)?.into_iter().filter_map(offset).collect();
        Some((unit.min(1 << 26), offsets))
    }
}

/// Functions that ask for stacks; freed ones are kept for the next task.
const STACK_CALLERS: [&str; 4] =
    ["dup_task_struct", "alloc_thread_stack_node", "copy_process", "kernel_clone"];
