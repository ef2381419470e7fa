//! Per-CPU memory: each CPU's copy of a variable, and back from an address to the variable and the CPU.
//!
//! A per-CPU symbol or `__percpu` pointer is no address: `__per_cpu_offset[cpu]` makes one of it. Static variables
//! stand in a template, linked at zero before Linux commit 9d7de2aa8b41 ("x86/percpu/64: Use relative percpu
//! offsets") (in v6.15) and inside the image since; modules' and allocated ones lie in the same CPUs' units of chunks.
//! Source: `mm/percpu.c`, `mm/percpu-internal.h`, `include/asm-generic/percpu.h`.

use super::cpus::{ONLINE, POSSIBLE};
use super::discover::START_KERNEL_MAP;
use super::module::Module;
use super::{CpuId, Kernel, Symbolized};
use crate::addr::VirtAddr;
use crate::bytes::printable;
use crate::debuginfo::SymbolTable;
use std::fmt;
use std::ops::Range;

/// Chunks looked at: each holds at least 32 KiB for every CPU.
const CHUNKS_MAX: usize = 1 << 16;
/// Lists of chunks; `pcpu_nr_slots` follows from the size of a unit and is about 20.
const SLOTS_MAX: u64 = 256;
/// A name from the symbol table may hide behind labels and constants: so many are passed over.
const LABELS_MAX: usize = 64;

/// What per-CPU memory belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PerCpuOwner<'k> {
    /// A static variable.
    Variable {
        /// Its name: untrusted text.
        name: &'k str,
        /// The module it is of; `None` for the kernel image.
        module: Option<&'k str>,
    },
    /// A static variable of this module that has no name.
    Module(&'k str),
    /// `alloc_percpu`, or a static area without symbols: the offset is the `__percpu` pointer.
    Allocated,
}

/// An address in per-CPU memory, taken apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PerCpuPlace<'k> {
    /// Whose memory it is.
    pub owner: PerCpuOwner<'k>,
    /// Bytes from the start of what the owner has.
    pub offset: u64,
    /// Whose copy.
    pub cpu: CpuId,
}

impl fmt::Display for PerCpuPlace<'_> {
    /// `runqueues+0x40 cpu 3`
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.owner {
            PerCpuOwner::Variable { name, module } => {
                f.write_str(&printable(name))?;
                if self.offset != 0 {
                    write!(f, "+{:#x}", self.offset)?;
                }
                if let Some(module) = module {
                    write!(f, " [{}]", printable(module))?;
                }
            }
            PerCpuOwner::Module(name) => {
                write!(f, "per-CPU memory of {}+{:#x}", printable(name), self.offset)?;
            }
            PerCpuOwner::Allocated => write!(f, "__percpu {:#x}", self.offset)?,
        }
        write!(f, " cpu {}", self.cpu)
    }
}

/// Where per-CPU memory lies; read once.
#[derive(Debug)]
pub(super) struct Areas {
    /// The template, at run-time addresses; those of symbols.
    template: Range<u64>,
    /// `__per_cpu_offset` of each possible CPU, by ascending start of its static area.
    offsets: Vec<(u64, CpuId)>,
    /// `pcpu_unit_offsets` of each possible CPU, ascending.
    units: Vec<(u64, CpuId)>,
    unit_size: u64,
    /// Base addresses of chunks.
    chunks: Vec<u64>,
}

impl Kernel {
    fn per_cpu_areas(&self) -> Option<&Areas> {
        self.per_cpu.get_or_init(|| self.find_per_cpu_areas()).as_ref()
    }

    fn find_per_cpu_areas(&self) -> Option<Areas> {
        // Without CONFIG_SMP there is no table, and a per-CPU variable is a variable.
        self.symbol("__per_cpu_offset")?;
        let template = self.symbol("__per_cpu_start")?.0..self.symbol("__per_cpu_end")?.0;
        if template.is_empty() {
            return None;
        }
        let possible = self.cpu_mask(&POSSIBLE)?;
        let mut offsets: Vec<_> =
            possible.iter().filter_map(|&cpu| Some((self.per_cpu_offset(cpu)?, cpu))).collect();
        offsets.sort_unstable_by_key(|&(offset, _)| template.start.wrapping_add(offset));
        let unit_offsets = self.symbol("pcpu_unit_offsets").and_then(|at| self.read_u64(at));
        let mut units: Vec<_> = possible
            .iter()
            .filter_map(|&cpu| {
                Some((self.read_u64(VirtAddr(unit_offsets?.wrapping_add(u64::from(cpu.0) * 8)))?, cpu))
            })
            .collect();
        units.sort_unstable();
        let unit_size = self.symbol("pcpu_unit_size").and_then(|at| self.read_u32(at)).unwrap_or(0).into();
        let chunks = self.per_cpu_chunks();
        Some(Areas { template, offsets, units, unit_size, chunks })
    }

    /// Base addresses of chunks of allocated per-CPU memory, the first chunk's before the others.
    fn per_cpu_chunks(&self) -> Vec<u64> {
        let word = |symbol| self.symbol(symbol).and_then(|at| self.read_u64(at));
        let mut chunks: Vec<u64> = word("pcpu_base_addr").into_iter().collect();
        // Since Linux commit 3c7be18ac9a0 ("mm: memcg/percpu: account percpu memory to memory cgroups") (in v5.9) the
        // lists of slots are pcpu_chunk_lists, two sets of them until about v5.14; before it was pcpu_slot.
        let lists = word("pcpu_chunk_lists").or_else(|| word("pcpu_slot"));
        let slots = self.symbol("pcpu_nr_slots").and_then(|at| self.read_u32(at)).unwrap_or(0);
        let types = self.types().and_then(|types| types.constant("PCPU_NR_CHUNK_TYPES")).unwrap_or(1);
        let member = |path| self.member("pcpu_chunk", path).map(|member| member.offset);
        let (Some(lists), Some(list), Some(base)) = (lists, member("list"), member("base_addr")) else {
            return chunks;
        };
        for slot in 0..(u64::from(slots) * types.clamp(1, 4) as u64).min(SLOTS_MAX) {
            for node in self.list(VirtAddr(lists.wrapping_add(slot * 16))).nodes {
                let at = node.wrapping_add(base.wrapping_sub(list));
                if chunks.len() < CHUNKS_MAX
                    && let Some(base) = self.read_u64(at)
                {
                    chunks.push(base);
                }
            }
        }
        chunks
    }

    /// The possible CPUs; those that have per-CPU memory.
    pub fn possible_cpus(&self) -> Vec<CpuId> {
        self.cpu_mask(&POSSIBLE).unwrap_or_default()
    }

    /// Whether `cpu` is online; `None` where the mask cannot be read.
    pub fn is_online(&self, cpu: CpuId) -> Option<bool> {
        Some(self.cpu_mask(&ONLINE)?.contains(&cpu))
    }

    /// Run-time addresses that per-CPU symbols have; `None` for a kernel without CONFIG_SMP, or without symbols.
    pub fn per_cpu_template(&self) -> Option<Range<VirtAddr>> {
        let template = &self.per_cpu_areas()?.template;
        Some(VirtAddr(template.start)..VirtAddr(template.end))
    }

    /// Whether `at` is the address of a per-CPU symbol, which [`Self::per_cpu_pointer`] makes a place of.
    pub fn is_per_cpu(&self, at: VirtAddr) -> bool {
        let Some(areas) = self.per_cpu_areas() else { return false };
        areas.template.contains(&at.0) || self.per_cpu_module(at).is_some()
    }

    /// The module whose static per-CPU variables a `__percpu` pointer is among, and how far into them.
    fn per_cpu_module(&self, pointer: VirtAddr) -> Option<(&Module, u64)> {
        self.modules().list.iter().find_map(|module| {
            let (start, size) = module.per_cpu?;
            let offset = pointer.0.wrapping_sub(start);
            (offset < size).then_some((module, offset))
        })
    }

    /// `per_cpu_ptr(pointer, cpu)`: the copy that `cpu` has of what a per-CPU symbol or `__percpu` pointer names.
    pub fn per_cpu_pointer(&self, pointer: VirtAddr, cpu: CpuId) -> Option<VirtAddr> {
        match self.per_cpu_areas() {
            Some(areas) => {
                let (offset, _) = areas.offsets.iter().find(|&&(_, one)| one == cpu)?;
                Some(pointer.wrapping_add(*offset))
            }
            None if cpu == CpuId(0) => Some(pointer),
            None => None,
        }
    }

    /// Where gdb has per-CPU symbols once it has moved all of vmlinux's by the KASLR offset: those linked at zero,
    /// too, which the kernel leaves there.
    pub fn per_cpu_window(&self) -> Option<Range<VirtAddr>> {
        let template = self.per_cpu_template()?;
        let moved = if template.start.0 < START_KERNEL_MAP { self.found.kaslr_offset } else { 0 };
        Some(template.start.wrapping_add(moved)..template.end.wrapping_add(moved))
    }

    /// The address in `cpu`'s copy that `at` in [`Self::per_cpu_window`] stands for.
    pub fn per_cpu_alias(&self, at: VirtAddr, cpu: CpuId) -> Option<VirtAddr> {
        let (window, template) = (self.per_cpu_window()?, self.per_cpu_template()?);
        window.contains(&at).then_some(())?;
        self.per_cpu_pointer(template.start.wrapping_add(at.offset_from(window.start)?), cpu)
    }

    /// The static per-CPU variable, of the image or a module, that a per-CPU symbol's address or a `__percpu` pointer
    /// is in.
    pub fn per_cpu_symbol(&self, at: VirtAddr) -> Option<Symbolized<'_>> {
        let areas = self.per_cpu_areas()?;
        if areas.template.contains(&at.0) {
            let moved = if areas.template.start < START_KERNEL_MAP { 0 } else { self.found.kaslr_offset };
            let start = areas.template.start.wrapping_sub(moved);
            let (name, offset) = covering(self.symbols().ok()?, at.0.wrapping_sub(moved), start)?;
            return Some(Symbolized { name, offset, module: None });
        }
        let (module, _) = self.per_cpu_module(at)?;
        let (name, offset) = covering(self.module_symbols(module), at.0, module.per_cpu?.0)?;
        Some(Symbolized { name, offset, module: Some(&module.name) })
    }

    /// Whose per-CPU memory `at` lies in.
    pub fn per_cpu_reverse(&self, at: VirtAddr) -> Option<PerCpuPlace<'_>> {
        let areas = self.per_cpu_areas()?;
        let start = areas.template.start;
        let size = areas.template.end - start;
        let below = areas.offsets.partition_point(|&(offset, _)| start.wrapping_add(offset) <= at.0);
        if let Some(&(offset, cpu)) = below.checked_sub(1).and_then(|i| areas.offsets.get(i))
            && at.0.wrapping_sub(start.wrapping_add(offset)) < size
        {
            let pointer = VirtAddr(at.0.wrapping_sub(offset));
            return Some(self.per_cpu_owner(pointer, cpu));
        }
        let cpu = areas.chunks.iter().find_map(|&base| areas.unit(at.0.checked_sub(base)?))?;
        let (offset, _) = areas.offsets.iter().find(|&&(_, one)| one == cpu)?;
        Some(self.per_cpu_owner(VirtAddr(at.0.wrapping_sub(*offset)), cpu))
    }

    fn per_cpu_owner(&self, pointer: VirtAddr, cpu: CpuId) -> PerCpuPlace<'_> {
        let (owner, offset) = match (self.per_cpu_symbol(pointer), self.per_cpu_module(pointer)) {
            (Some(found), _) => {
                (PerCpuOwner::Variable { name: found.name, module: found.module }, found.offset)
            }
            (None, Some((module, offset))) => (PerCpuOwner::Module(&module.name), offset),
            (None, None) => (PerCpuOwner::Allocated, pointer.0),
        };
        PerCpuPlace { owner, offset, cpu }
    }

    /// What an address is, to stand between `<` and `>` behind it: `init_task+0x40`, `runqueues+0x40 cpu 3`.
    /// Escaped: it comes from the dump.
    pub fn describe_address(&self, at: VirtAddr) -> Option<String> {
        if let Some(place) = self.per_cpu_reverse(at) {
            return Some(place.to_string());
        }
        let found = self.symbolize(at)?;
        Some(match found {
            Symbolized { offset: 0, module: None, .. } => printable(found.name),
            Symbolized { offset: 0, module: Some(module), .. } => {
                format!("{} [{}]", printable(found.name), printable(module))
            }
            found => found.to_string(),
        })
    }
}

/// The symbol that covers `at`, but none below `start`. Zero is also where assembly's constants are, and a label may
/// stand inside a variable: what has a size goes first.
fn covering(symbols: &SymbolTable, at: u64, start: u64) -> Option<(&str, u64)> {
    let mut below = at;
    let mut without_size = None;
    for _ in 0..LABELS_MAX {
        let Some((symbol, offset)) = symbols.at(below).filter(|(symbol, _)| symbol.addr >= start) else {
            break;
        };
        let offset = offset.wrapping_add(at - below);
        if symbol.size > offset {
            return Some((symbol.name, offset));
        }
        if symbol.size == 0 {
            without_size = without_size.or(Some((symbol.name, offset)));
        }
        let Some(next) = symbol.addr.checked_sub(1) else { break };
        below = next;
    }
    without_size
}

impl Areas {
    /// The CPU whose unit has the byte so far from a chunk's base.
    fn unit(&self, from_base: u64) -> Option<CpuId> {
        let below = self.units.partition_point(|&(start, _)| start <= from_base);
        let &(start, cpu) = self.units.get(below.checked_sub(1)?)?;
        (from_base - start < self.unit_size).then_some(cpu)
    }
}
