//! The kernel's unwind tables in its own memory: read where a lookup leads, and each row once.
//!
//! Source: `arch/x86/kernel/unwind_orc.c` (`orc_find`, the fast lookup table), `include/asm-generic/vmlinux.lds.h`,
//! `arch/x86/include/asm/module.h` (`struct mod_arch_specific`).

use super::runtime_code::RuntimeKind;
use crate::addr::VirtAddr;
use crate::arch::x86_64::disasm::{self, Call};
use crate::debuginfo::DebugInfo;
use crate::debuginfo::cfi::{CallFrames, CfiRow};
use crate::debuginfo::orc::{
    self, ENTRY_SIZE, Flags, Format, IP_SIZE, LOOKUP_BLOCK_SIZE, Numbers, OrcEntry, OrcTable,
};
use crate::kernel::Kernel;
use crate::unwind::Tables;
use std::collections::HashMap;
use std::sync::{OnceLock, RwLock};

/// Rows of one table: the largest kernels have some two million.
const ROWS_MAX: u64 = 16 << 20;
/// Rows of one module.
const MODULE_ROWS_MAX: u64 = 1 << 20;
/// Rows looked at to tell the format: more where rare bits must tell.
const SAMPLE: u64 = 512;
const LONG_SAMPLE: u64 = 1 << 14;
/// Rows remembered.
const MEMO_MAX: usize = 1 << 16;
/// Rows between two elements of the fast lookup table; a block of code with more is none.
const BLOCK_ROWS_MAX: u64 = 1 << 12;

/// All unwind tables of a kernel.
pub struct CodeTables {
    image: Option<ImageOrc>,
    format: Format,
    /// By index in the list of modules.
    modules: OnceLock<Vec<OnceLock<Option<OrcTable>>>>,
    rows: RwLock<HashMap<u64, Option<OrcEntry>>>,
    frames: OnceLock<Option<CallFrames>>,
    /// By index in the list of modules.
    module_frames: OnceLock<Vec<OnceLock<Option<CallFrames>>>>,
}

/// Where the kernel image's ORC is.
struct ImageOrc {
    ips: u64,
    rows: u64,
    count: u64,
    /// `orc_lookup`, its number of blocks, and the address that the first is about.
    lookup: Option<(u64, u64, u64)>,
}

impl CodeTables {
    /// Finds them; reads little.
    pub fn of(kernel: &Kernel) -> Self {
        let image = ImageOrc::of(kernel);
        let format = image.as_ref().map(|image| {
            let header = kernel.symbol("__start_orc_header").is_some();
            // From the middle: ordinary functions.
            let count = image.count.min(if header { SAMPLE } else { LONG_SAMPLE });
            let from = (image.count - count) / 2;
            let mut sample = vec![0; count as usize * ENTRY_SIZE];
            let filled =
                kernel.read(VirtAddr(image.rows.wrapping_add(from * ENTRY_SIZE as u64)), &mut sample).filled;
            sample.truncate(filled);
            Format::tell(header, &sample)
        });
        let format = format.unwrap_or(Format { flags: Flags::Typed, numbers: Numbers::Old });
        Self {
            image,
            format,
            modules: OnceLock::new(),
            rows: RwLock::default(),
            frames: OnceLock::new(),
            module_frames: OnceLock::new(),
        }
    }

    fn find(&self, kernel: &Kernel, pc: u64) -> Option<OrcEntry> {
        let at = VirtAddr(pc);
        let image = self.image.as_ref();
        if kernel.is_image_text(at) {
            return image?.find(kernel, pc, self.format);
        }
        let modules = self.modules.get_or_init(|| one_for_each_module(kernel));
        if let Some(index) = kernel.modules().list.iter().position(|module| module.contains(at)) {
            let table = modules.get(index)?.get_or_init(|| self.read_module(kernel, index));
            return table.as_ref()?.row(pc);
        }
        // A copy of one of the kernel's own trampolines is unwound like the original.
        let code = kernel.runtime_code(at)?;
        let RuntimeKind::Ftrace { original } = code.kind else { return None };
        image?.find(kernel, original.wrapping_add(pc.wrapping_sub(code.start)), self.format)
    }

    fn read_module(&self, kernel: &Kernel, index: usize) -> Option<OrcTable> {
        let module = kernel.modules().list.get(index)?;
        let member = |path| Some(module.at.wrapping_add(kernel.member("module", path)?.offset));
        let count = u64::from(kernel.read_u32(member("arch.num_orcs")?)?).min(MODULE_ROWS_MAX);
        let ips_at = kernel.read_u64(member("arch.orc_unwind_ip")?)?;
        let rows_at = kernel.read_u64(member("arch.orc_unwind")?)?;
        let some = |at: u64, size: usize| {
            let mut bytes = vec![0; count as usize * size];
            kernel.read(VirtAddr(at), &mut bytes).stopped.is_none().then_some(bytes)
        };
        Some(OrcTable::new(self.format, ips_at, some(ips_at, IP_SIZE)?, some(rows_at, ENTRY_SIZE)?))
    }
}

fn one_for_each_module<T>(kernel: &Kernel) -> Vec<OnceLock<T>> {
    kernel.modules().list.iter().map(|_| OnceLock::new()).collect()
}

impl ImageOrc {
    fn of(kernel: &Kernel) -> Option<Self> {
        let at = |name| kernel.symbol(name).map(|at| at.0);
        let (ips, ips_end) = (at("__start_orc_unwind_ip")?, at("__stop_orc_unwind_ip")?);
        let (rows, rows_end) = (at("__start_orc_unwind")?, at("__stop_orc_unwind")?);
        let count = ips_end.checked_sub(ips)? / IP_SIZE as u64;
        let of_rows = rows_end.checked_sub(rows)? / ENTRY_SIZE as u64;
        if count == 0 || count > ROWS_MAX || count != of_rows {
            return None;
        }
        let lookup = || {
            let (start, end) = (at("orc_lookup")?, at("orc_lookup_end")?);
            // The last element only bounds the block before it.
            let blocks = (end.checked_sub(start)? / 4).checked_sub(1)?;
            Some((start, blocks, at("_stext")?))
        };
        Some(Self { ips, rows, count, lookup: lookup() })
    }

    fn find(&self, kernel: &Kernel, pc: u64, format: Format) -> Option<OrcEntry> {
        let index = self.by_lookup(kernel, pc).or_else(|| self.by_search(kernel, pc))?;
        let row = kernel.read_array(VirtAddr(self.rows.wrapping_add(index * ENTRY_SIZE as u64)))?;
        Some(OrcEntry::decode(format, row))
    }

    /// As the kernel does it: the fast table gives the rows among which to search.
    fn by_lookup(&self, kernel: &Kernel, pc: u64) -> Option<u64> {
        let (lookup, blocks, start) = self.lookup?;
        let block = pc.checked_sub(start)? / LOOKUP_BLOCK_SIZE;
        if block >= blocks {
            return None;
        }
        let both: [u8; 8] = kernel.read_array(VirtAddr(lookup.wrapping_add(block * 4)))?;
        let both = u64::from_le_bytes(both);
        let (first, last) = (both & 0xffff_ffff, both >> 32);
        // It is filled in at boot: before, and where the page is lost, it is zeros.
        if last == 0 || last < first || last >= self.count || last - first > BLOCK_ROWS_MAX {
            return None;
        }
        let mut ips = vec![0; (last - first + 1) as usize * IP_SIZE];
        let at = self.ips.wrapping_add(first * IP_SIZE as u64);
        kernel.read(VirtAddr(at), &mut ips).stopped.is_none().then_some(())?;
        Some(first + orc::find(&ips, at, pc)? as u64)
    }

    fn by_search(&self, kernel: &Kernel, pc: u64) -> Option<u64> {
        let (mut low, mut high) = (0, self.count);
        while low < high {
            let middle = low + (high - low) / 2;
            let at = self.ips.wrapping_add(middle * IP_SIZE as u64);
            let code = at.wrapping_add_signed((kernel.read_u32(VirtAddr(at))? as i32).into());
            if code <= pc {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        low.checked_sub(1)
    }
}

/// The tables of one kernel, for the walk.
pub struct KernelTables<'k> {
    pub kernel: &'k Kernel,
    pub tables: &'k CodeTables,
    /// Whether to use ORC.
    pub orc: bool,
}

impl KernelTables<'_> {
    /// The call that a return address is behind.
    pub fn call_before(&self, pc: u64) -> Option<Call> {
        let at = VirtAddr(pc);
        let before = VirtAddr(pc.wrapping_sub(1));
        if !self.kernel.is_code(before) {
            return None;
        }
        let mut code = [0; disasm::CALL_MAX];
        let from = at.wrapping_add((disasm::CALL_MAX as u64).wrapping_neg());
        self.kernel.read(from, &mut code).stopped.is_none().then_some(())?;
        disasm::call_before(&code, pc)
    }
}

impl Tables for KernelTables<'_> {
    fn orc(&self, pc: u64) -> Option<OrcEntry> {
        if !self.orc {
            return None;
        }
        // A poisoned lock would mean that another thread panicked; rows are right all the same.
        let known = |rows: &HashMap<u64, Option<OrcEntry>>| rows.get(&pc).copied();
        if let Some(row) = self.tables.rows.read().ok().and_then(|rows| known(&rows)) {
            return row;
        }
        let row = self.tables.find(self.kernel, pc);
        if let Ok(mut rows) = self.tables.rows.write()
            && rows.len() < MEMO_MAX
        {
            rows.insert(pc, row);
        }
        row
    }

    fn cfi(&self, pc: u64) -> Option<CfiRow> {
        let read = |info: Option<&DebugInfo>| {
            info.map(CallFrames::of)?.unwrap_or_else(|error| {
                tracing::warn!("{error}");
                None
            })
        };
        let kernel = self.kernel;
        let modules = &kernel.modules().list;
        if let Some(index) = modules.iter().position(|module| module.contains(VirtAddr(pc))) {
            let all = self.tables.module_frames.get_or_init(|| one_for_each_module(kernel));
            let info = || modules.get(index).and_then(|module| kernel.module_debug_info(module));
            return all.get(index)?.get_or_init(|| read(info())).as_ref()?.row(pc);
        }
        let frames = self.tables.frames.get_or_init(|| read(kernel.debug_info()));
        frames.as_ref()?.row(pc.wrapping_sub(kernel.found().kaslr_offset))
    }

    fn follows_call(&self, pc: u64) -> bool {
        self.call_before(pc).is_some()
    }
}
