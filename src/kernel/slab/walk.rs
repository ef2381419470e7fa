//! Walks over one cache: where its slabs are, and which objects are free where.

use super::{Cache, OBJECTS_MAX, Slab};
use crate::addr::VirtAddr;
use crate::kernel::cpus::POSSIBLE;
use crate::kernel::page::PageMap;
use crate::kernel::{CpuId, Object, ObjectError};
use std::collections::{HashMap, HashSet};

/// More sheaves than a barn keeps, and more slabs than a list of partial ones has.
const CHAIN_MAX: usize = 1 << 20;

/// Where a slab is kept.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Place {
    /// The one that a CPU allocates from.
    Cpu(CpuId),
    /// On a CPU's list of partial slabs.
    CpuPartial(CpuId),
    /// On a node's list of partial slabs.
    Partial(u64),
    /// On no list.
    Full,
}

/// A slab, where it is kept, and how many objects its lists say are free.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PlacedSlab {
    /// The slab.
    pub slab: Slab,
    /// Where it is kept.
    pub place: Place,
    /// Objects on its own free list, as walked.
    pub free: u64,
    /// Objects on the free list of the CPU that allocates from it.
    pub cpu_free: u64,
}

impl PlacedSlab {
    /// Objects on its own free list by the slab's own count, which a broken list does not change.
    pub fn counted_free(&self) -> u64 {
        self.slab.objects.saturating_sub(self.slab.inuse)
    }
}

/// A free list that leads nowhere.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BadPointer {
    /// The CPU whose list it is; `None` for the slab's own.
    pub cpu: Option<CpuId>,
    /// The slab.
    pub slab: VirtAddr,
    /// The free object that holds the pointer; `None` if it is the head of the list.
    pub object: Option<VirtAddr>,
    /// The pointer as stored.
    pub stored: u64,
    /// What it decodes to.
    pub decoded: u64,
    /// What is wrong with it.
    pub why: &'static str,
}

/// What a walk over a cache found.
#[derive(Default)]
pub struct CacheWalk {
    /// Slabs; full ones only where every page was looked at.
    pub slabs: Vec<PlacedSlab>,
    /// Free objects on free lists: of which CPU, `None` for slabs' own lists.
    free: HashMap<u64, Option<CpuId>>,
    /// Free objects in sheaves: how each is free.
    sheaves: HashMap<u64, ObjectState>,
    /// Slabs by the node's counter; `None` where the kernel does not count.
    pub counted_slabs: Option<u64>,
    /// Objects by the node's counter.
    pub counted_objects: Option<u64>,
    /// Free lists that lead nowhere.
    pub bad: Vec<BadPointer>,
    /// Other broken structures.
    pub problems: Vec<String>,
}

/// Whether an object is in use.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ObjectState {
    /// Neither on a free list nor in a sheaf.
    Allocated,
    /// On its slab's free list.
    Free,
    /// On a CPU's free list.
    FreeOnCpu(CpuId),
    /// In a CPU's sheaf, or the node's barn.
    FreeInSheaf(Option<CpuId>),
    /// In a CPU's sheaf of objects that are free once RCU's readers are done (`kfree_rcu()`). When the sheaf is full it
    /// is RCU's, and its objects look allocated until then.
    FreeAfterRcu(CpuId),
}

impl CacheWalk {
    /// Whether the object that begins at `at` is in use.
    pub fn state(&self, at: VirtAddr) -> ObjectState {
        match (self.free.get(&at.0), self.sheaves.get(&at.0)) {
            (Some(Some(cpu)), _) => ObjectState::FreeOnCpu(*cpu),
            (Some(None), _) => ObjectState::Free,
            (None, Some(state)) => *state,
            (None, None) => ObjectState::Allocated,
        }
    }

    /// Objects in all slabs.
    pub fn objects(&self) -> u64 {
        self.counted_objects.unwrap_or_else(|| self.slabs.iter().map(|placed| placed.slab.objects).sum())
    }

    /// Slabs.
    pub fn slab_count(&self) -> u64 {
        self.counted_slabs.unwrap_or(self.slabs.len() as u64)
    }

    /// Objects in use or kept: what `/proc/slabinfo` calls active (`get_slabinfo()`, which takes off only what is free
    /// in the nodes' partial slabs; since about v6.10 that is an estimate for a node with more than 10,000 of these).
    pub fn allocated_or_kept(&self) -> u64 {
        let partial = self.slabs.iter().filter(|placed| matches!(placed.place, Place::Partial(_)));
        self.objects().saturating_sub(partial.map(PlacedSlab::counted_free).sum())
    }

    /// Free objects that CPUs and nodes keep: on CPUs' free lists, in the slabs that CPUs own, and in sheaves.
    pub fn kept(&self) -> u64 {
        let of_cpus = |placed: &&PlacedSlab| matches!(placed.place, Place::Cpu(_) | Place::CpuPartial(_));
        let owned: u64 = self.slabs.iter().filter(of_cpus).map(PlacedSlab::counted_free).sum();
        self.slabs.iter().map(|placed| placed.cpu_free).sum::<u64>() + owned + self.sheaves.len() as u64
    }

    /// Those of the kept ones that wait for RCU.
    pub fn waiting(&self) -> u64 {
        self.sheaves.values().filter(|state| matches!(state, ObjectState::FreeAfterRcu(_))).count() as u64
    }

    /// Objects in use.
    pub fn allocated(&self) -> u64 {
        self.allocated_or_kept().saturating_sub(self.kept())
    }
}

impl<'k> Cache<'k> {
    /// Walks all lists of the cache. `every` are its slabs as found by a look at every page, where that was done.
    pub fn walk(&self, map: &PageMap, every: Option<&[VirtAddr]>) -> CacheWalk {
        let mut walk = CacheWalk::default();
        let mut seen = HashSet::new();
        let note = |walk: &mut CacheWalk, what: &str, result: Result<(), ObjectError>| {
            if let Err(error) = result {
                walk.problems.push(format!("{}: {what}: {error}", self.name));
            }
        };
        for cpu in self.cache.kernel().cpu_mask(&POSSIBLE).unwrap_or_default() {
            if self.cache.has("cpu_slab") {
                let done = self.cpu_slabs(map, cpu, &mut seen, &mut walk);
                note(&mut walk, &format!("slabs of CPU {cpu}"), done);
            }
            if self.cache.has("cpu_sheaves") {
                let done = self.cpu_sheaves(cpu, &mut walk);
                note(&mut walk, &format!("sheaves of CPU {cpu}"), done);
            }
        }
        for (node, _) in self.cache.kernel().nodes().unwrap_or_default() {
            let done = self.node_slabs(map, node, &mut seen, &mut walk);
            note(&mut walk, &format!("slabs of node {node}"), done);
        }
        for &at in every.unwrap_or_default() {
            if seen.insert(at) {
                let done = self.place(map, at, Place::Full, 0, &mut walk);
                note(&mut walk, &format!("slab at {at}"), done);
            }
        }
        if let (Some(counted), Some(every)) = (walk.counted_slabs, every)
            && counted != every.len() as u64
        {
            let found = every.len();
            walk.problems.push(format!("{}: {counted} slabs are counted, {found} are in memory", self.name));
        }
        walk
    }

    fn cpu_slabs(
        &self,
        map: &PageMap,
        cpu: CpuId,
        seen: &mut HashSet<VirtAddr>,
        walk: &mut CacheWalk,
    ) -> Result<(), ObjectError> {
        let kernel = self.cache.kernel();
        let pointer = self.cache.get("cpu_slab")?;
        if pointer == 0 {
            return Ok(());
        }
        let at = VirtAddr(pointer.wrapping_add(kernel.per_cpu_offset(cpu).unwrap_or(0)));
        let own = kernel.object("kmem_cache_cpu", at)?;
        let slab = own.either(&["slab", "page"])?.pointer()?;
        if slab.0 != 0 && seen.insert(slab) {
            self.place(map, slab, Place::Cpu(cpu), own.get("freelist")?, walk)?;
        }
        // With CONFIG_SLUB_CPU_PARTIAL only.
        let Ok(partial) = own.member("partial") else { return Ok(()) };
        let mut next = partial.pointer()?;
        while next.0 != 0 {
            if !seen.insert(next) || seen.len() > CHAIN_MAX {
                walk.problems
                    .push(format!("{}: CPU {cpu}'s partial slabs: {next} comes a second time", self.name));
                break;
            }
            self.place(map, next, Place::CpuPartial(cpu), 0, walk)?;
            let slab = kernel.object("slab", next).or_else(|_| kernel.object("page", next))?;
            next = slab.member("next")?.pointer()?;
        }
        Ok(())
    }

    fn cpu_sheaves(&self, cpu: CpuId, walk: &mut CacheWalk) -> Result<(), ObjectError> {
        let kernel = self.cache.kernel();
        let pointer = self.cache.get("cpu_sheaves")?;
        if pointer == 0 {
            return Ok(());
        }
        let at = VirtAddr(pointer.wrapping_add(kernel.per_cpu_offset(cpu).unwrap_or(0)));
        let own = kernel.object("slub_percpu_sheaves", at)?;
        let kept = ObjectState::FreeInSheaf(Some(cpu));
        for (name, state) in [("main", kept), ("spare", kept), ("rcu_free", ObjectState::FreeAfterRcu(cpu))] {
            if let Some(sheaf) = own.at(name)? {
                self.sheaf(sheaf, state, walk)?;
            }
        }
        Ok(())
    }

    fn sheaf(&self, sheaf: Object<'k>, state: ObjectState, walk: &mut CacheWalk) -> Result<(), ObjectError> {
        let objects = sheaf.member("objects")?;
        for index in 0..sheaf.get("size")?.min(OBJECTS_MAX) {
            walk.sheaves.insert(objects.index(index)?.u64()?, state);
        }
        Ok(())
    }

    fn node_slabs(
        &self,
        map: &PageMap,
        node: u64,
        seen: &mut HashSet<VirtAddr>,
        walk: &mut CacheWalk,
    ) -> Result<(), ObjectError> {
        let kernel = self.cache.kernel();
        // Since about v7.0 a node's barn and its lists stand side by side.
        let (own, barn) = match self.cache.member("per_node") {
            Ok(all) => {
                let both = all.index(node)?;
                (both.at("node")?, both.at("barn")?)
            }
            Err(_) => {
                let own = self.cache.member("node")?.index(node)?.follow()?;
                (own, own.and_then(|own| own.at("barn").ok().flatten()))
            }
        };
        if let Some(barn) = barn {
            for list in ["sheaves_full", "sheaves_empty"] {
                let sheaves = kernel.list(barn.member(list)?.at);
                walk.problems.extend(sheaves.problem);
                for link in sheaves.nodes {
                    let sheaf = kernel.object("list_head", link)?.container_of("slab_sheaf", "barn_list")?;
                    self.sheaf(sheaf, ObjectState::FreeInSheaf(None), walk)?;
                }
            }
        }
        let Some(own) = own else { return Ok(()) };
        if let (Ok(slabs), Ok(objects)) = (own.get("nr_slabs"), own.get("total_objects")) {
            walk.counted_slabs = Some(walk.counted_slabs.unwrap_or(0).wrapping_add(slabs));
            walk.counted_objects = Some(walk.counted_objects.unwrap_or(0).wrapping_add(objects));
        }
        let partial = kernel.list(own.member("partial")?.at);
        walk.problems.extend(partial.problem);
        let container = if kernel.object("slab", own.at).is_ok() { "slab" } else { "page" };
        for link in partial.nodes {
            let slab = kernel.object("list_head", link)?.container_of(container, "slab_list")?;
            if seen.insert(slab.at) {
                self.place(map, slab.at, Place::Partial(node), 0, walk)?;
            }
        }
        Ok(())
    }

    /// Notes the slab at `at`, and walks its own list and, of a CPU's slab, the CPU's list from `cpu_list`.
    fn place(
        &self,
        map: &PageMap,
        at: VirtAddr,
        place: Place,
        cpu_list: u64,
        walk: &mut CacheWalk,
    ) -> Result<(), ObjectError> {
        let slab = self.cache.kernel().slab(map, at)?;
        let cpu = if let Place::Cpu(cpu) = place { Some(cpu) } else { None };
        let free = self.follow(&slab, slab.freelist, None, walk);
        let cpu_free = if cpu.is_some() { self.follow(&slab, cpu_list, cpu, walk) } else { 0 };
        let counted = slab.objects.saturating_sub(slab.inuse);
        if free != counted && walk.bad.last().is_none_or(|bad| bad.slab != at) {
            let name = &self.name;
            walk.problems
                .push(format!("{name}: slab at {at} counts {counted} free objects and lists {free}"));
        }
        walk.slabs.push(PlacedSlab { slab, place, free, cpu_free });
        Ok(())
    }

    /// Walks a free list from `first`; the number of objects on it.
    fn follow(&self, slab: &Slab, first: u64, cpu: Option<CpuId>, walk: &mut CacheWalk) -> u64 {
        let mut count = 0;
        let (mut next, mut stored, mut holder) = (first, first, None);
        while next != 0 {
            let bad = |why| BadPointer { cpu, slab: slab.at, object: holder, stored, decoded: next, why };
            if !self.is_object(slab, next) {
                walk.bad.push(bad("is no object of this slab"));
                break;
            }
            if walk.free.contains_key(&next) || count >= slab.objects {
                walk.bad.push(bad("is free already: a cycle, or freed twice"));
                break;
            }
            walk.free.insert(next, cpu);
            count += 1;
            let at = self.pointer_at(next);
            match self.cache.kernel().read_u64(at) {
                Some(word) => {
                    holder = Some(VirtAddr(next));
                    stored = word;
                    next = self.decode_pointer(word, at);
                }
                None => {
                    let what = format!(
                        "{}: free object {next:#x} of the slab at {} cannot be read",
                        self.name, slab.at
                    );
                    walk.problems.push(what);
                    break;
                }
            }
        }
        count
    }
}
