//! Finding the kernel in a machine's memory, with no help from the guest: release, KASLR, page tables.
//!
//! Three sources, each checked against memory before it is believed: the VMCOREINFO note of the dump, a copy
//! of that text found by scanning RAM, and, with neither, the page tables that a CPU's CR3 points to.
//! A kernel that is gone (kexec leaves its memory behind, page tables and all) passes every check but one:
//! no CPU runs on its tables. So CR3, where the source has it, decides.
//!
//! Source: `arch/x86/kernel/vmcore_info_64.c`, `arch/x86/include/asm/page_64_types.h` (`__START_KERNEL_map`).

mod page_tables;
mod scan;

use crate::addr::{PhysAddr, VirtAddr};
use crate::arch::x86_64::{AddressSpace, Reg, TranslateError};
use crate::backend::Backend;
use crate::memory::Unreadable;
use crate::vmcoreinfo::VmcoreInfo;
use std::fmt;

/// `__START_KERNEL_map`: virtual addresses of the kernel image are this plus physical minus `phys_base`.
pub const START_KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;
/// Where `_text` is linked with the default `CONFIG_PHYSICAL_START`; the KASLR offset is counted from there.
const DEFAULT_LINK_TEXT: u64 = 0xffff_ffff_8100_0000;
/// Room for the kernel image and its modules (`KERNEL_IMAGE_SIZE` at its largest).
const KERNEL_IMAGE_SIZE: u64 = 1 << 30;
/// `__NEW_UTS_LEN + 1`: each field of `struct new_utsname`; `release` is the third.
const UTS_FIELD: usize = 65;

/// Which evidence led to the kernel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FoundBy {
    /// The VMCOREINFO note of the dump.
    Note,
    /// A VMCOREINFO text at this physical address.
    Scan(PhysAddr),
    /// The page tables of a CPU, without any VMCOREINFO.
    PageTables,
}

impl fmt::Display for FoundBy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Note => write!(f, "VMCOREINFO note"),
            Self::Scan(at) => write!(f, "VMCOREINFO found in RAM at {at}"),
            Self::PageTables => write!(f, "page tables of a CPU (no VMCOREINFO)"),
        }
    }
}

/// The kernel that runs in a machine, and how to address its memory.
#[derive(Clone, Debug)]
pub struct Found {
    /// Which evidence led here.
    pub by: FoundBy,
    /// The kernel's description of itself; empty when found by page tables.
    pub vmcoreinfo: VmcoreInfo,
    /// What `uname -r` prints.
    pub release: String,
    /// The GNU build-id in lower-case hex, where the kernel tells.
    pub build_id: Option<String>,
    /// How far KASLR moved the image up, in bytes.
    pub kaslr_offset: u64,
    /// Physical minus (virtual minus `__START_KERNEL_map`) of the image, in two's complement.
    pub phys_base: u64,
    /// The kernel's own page tables.
    pub space: AddressSpace,
    /// Run-time address of `_text`.
    pub text: VirtAddr,
    /// What could not be checked, or contradicts; one sentence each.
    pub problems: Vec<String>,
}

/// Why no kernel was found.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DiscoverError {
    /// No VMCOREINFO and no page tables to go by.
    #[error(
        "no Linux kernel found in the dump: no VMCOREINFO note, no copy of it in RAM{}; \
         dump the guest while Linux runs (QEMU: '-device vmcoreinfo' helps)",
        if *.had_cr3 { ", and no kernel mapped by any CPU's page tables" } else { ", and no CR3 to find page tables by" }
    )]
    Nothing {
        /// Whether any CPU's CR3 was saved.
        had_cr3: bool,
    },
    /// VMCOREINFO exists, but memory contradicts every copy.
    #[error("VMCOREINFO was found, but memory does not fit it: {0}")]
    Contradicted(String),
}

/// Called now and then with bytes done and bytes to do of a long scan.
pub type Progress<'a> = &'a (dyn Fn(u64, u64) + Sync);

/// Finds the running kernel in `backend`'s memory.
pub fn discover(backend: &dyn Backend, progress: Progress<'_>) -> Result<Found, DiscoverError> {
    let roots = cr3_tables(backend);
    let mut rejected = None;
    let mut accepted: Vec<Found> = Vec::new();
    if let Some(note) = backend.vmcoreinfo_note() {
        match check(backend, VmcoreInfo::parse(note), FoundBy::Note, &roots) {
            Ok(found) if found.problems.is_empty() => return Ok(found),
            Ok(found) => accepted.push(found),
            Err(why) => rejected = Some(format!("the dump's note: {why}")),
        }
    }
    let decided = |found: &Found| !roots.is_empty() && found.problems.is_empty();
    scan::for_each_vmcoreinfo(backend, progress, &mut |at, info| match check(
        backend,
        info,
        FoundBy::Scan(at),
        &roots,
    ) {
        Ok(found) => {
            let stop = decided(&found);
            accepted.push(found);
            stop
        }
        Err(why) => {
            rejected.get_or_insert(format!("the copy at {at}: {why}"));
            false
        }
    });
    if let Some(found) = choose(accepted) {
        return Ok(found);
    }
    if let Some(found) = roots.iter().find_map(|&root| page_tables::find(backend, root)) {
        return Ok(found);
    }
    Err(match rejected {
        Some(why) => DiscoverError::Contradicted(why),
        None => DiscoverError::Nothing { had_cr3: !roots.is_empty() },
    })
}

/// The best of the copies that passed: the one with the fewest doubts. Copies of one text are one kernel.
fn choose(mut accepted: Vec<Found>) -> Option<Found> {
    accepted.sort_by_key(|found| found.problems.len());
    let mut accepted = accepted.into_iter();
    let mut best = accepted.next()?;
    if let Some(other) = accepted.find(|other| other.space.root != best.space.root) {
        best.problems.push(format!(
            "memory also holds kernel {} (page tables at {}); nothing tells which of the two ran last",
            other.release, other.space.root
        ));
    }
    Some(best)
}

/// A page-table root that a CPU was using, and the number of levels it walks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct CpuTables {
    root: PhysAddr,
    levels: u8,
}

/// The roots in the CPUs' CR3, without the PCID; where page-table isolation may have switched to the user's
/// half of the pair (bit 12, `PTI_USER_PGTABLE_BIT`), the kernel's half too.
fn cr3_tables(backend: &dyn Backend) -> Vec<CpuTables> {
    const CR4_LA57: u64 = 1 << 12;
    const CR0_PG: u64 = 1 << 31;
    let mut tables = Vec::new();
    for cpu in backend.saved_cpus() {
        let (Some(cr3), Some(cr4)) = (cpu.regs.u64(Reg::Cr3), cpu.regs.u64(Reg::Cr4)) else { continue };
        if cpu.regs.u64(Reg::Cr0).is_some_and(|cr0| cr0 & CR0_PG == 0) {
            continue;
        }
        let levels = if cr4 & CR4_LA57 != 0 { 5 } else { 4 };
        for root in [cr3 & 0x000f_ffff_ffff_f000, cr3 & 0x000f_ffff_ffff_e000] {
            let entry = CpuTables { root: PhysAddr(root), levels };
            if !tables.contains(&entry) {
                tables.push(entry);
            }
        }
    }
    tables
}

/// Holds a VMCOREINFO text against memory. `Err` says what contradicts it.
fn check(
    backend: &dyn Backend,
    info: VmcoreInfo,
    by: FoundBy,
    cpu_tables: &[CpuTables],
) -> Result<Found, String> {
    let release = info.release().ok_or("no OSRELEASE")?.to_owned();
    // Before Linux commit 65ade2f872b4 ("x86/boot/64: Rename init_level4_pgt and early_level4_pgt")
    // (in v4.13) the table was called init_level4_pgt.
    let table =
        ["swapper_pg_dir", "init_top_pgt", "init_level4_pgt"].iter().find_map(|name| info.symbol(name));
    let table = table.ok_or("no SYMBOL(swapper_pg_dir)")?;
    let image_offset = table
        .offset_from(VirtAddr(START_KERNEL_MAP))
        .ok_or_else(|| format!("SYMBOL(swapper_pg_dir)={table} lies outside the kernel image"))?;
    let mut problems = Vec::new();

    let sme_mask = info.number("sme_mask").unwrap_or(0);
    let declared = if info.number("pgtable_l5_enabled") == Some(1) { 5 } else { 4 };
    let spaces = phys_bases(backend, &info).into_iter().flat_map(|phys_base| {
        let root = PhysAddr(image_offset.wrapping_add(phys_base));
        [declared, 9 - declared].map(|levels| (phys_base, AddressSpace { root, levels, sme_mask }))
    });
    // The tables must map themselves where the text says they are. A table that lies outside all RAM
    // contradicts; one that the dump lost decides nothing.
    let maps_itself = |space: &AddressSpace| match space.translate(backend, table) {
        Ok(translation) => Some(translation.phys == space.root),
        Err(TranslateError::TableUnreadable { source, .. }) if source.why != Unreadable::NotRam => None,
        Err(_) => Some(false),
    };
    let mut undecided = None;
    let mut proven = None;
    for (phys_base, space) in spaces {
        match maps_itself(&space) {
            Some(true) => {
                proven = Some((phys_base, space));
                break;
            }
            None => undecided = undecided.or(Some((phys_base, space))),
            Some(false) => {}
        }
    }
    let (phys_base, space) = match (proven, undecided) {
        (Some(found), _) => found,
        (None, Some(found)) => {
            problems
                .push("the kernel's page tables cannot be read; kernel memory is out of reach".to_owned());
            found
        }
        (None, None) => return Err(format!("the page tables it names at {table} do not map themselves")),
    };
    check_release(backend, &info, &space, &release)?;
    check_cpus(backend, &space, cpu_tables)?;

    let kaslr_offset = info.kernel_offset().unwrap_or(0);
    let text = info.symbol("_stext").unwrap_or(VirtAddr(DEFAULT_LINK_TEXT.wrapping_add(kaslr_offset)));
    let build_id = info.build_id();
    Ok(Found { by, vmcoreinfo: info, release, build_id, kaslr_offset, phys_base, space, text, problems })
}

/// Candidates for `phys_base`, best first: `NUMBER(phys_base)` (since about v4.10), then what the format hints at.
fn phys_bases(backend: &dyn Backend, info: &VmcoreInfo) -> Vec<u64> {
    let mut bases: Vec<u64> = info.number("phys_base").into_iter().collect();
    for base in backend.phys_base_hints().into_iter().chain([0]) {
        if !bases.contains(&base) {
            bases.push(base);
        }
    }
    bases
}

/// `init_uts_ns` in memory must hold the release that the text claims: memory that was reused fails here.
fn check_release(
    backend: &dyn Backend,
    info: &VmcoreInfo,
    space: &AddressSpace,
    release: &str,
) -> Result<(), String> {
    let (Some(uts), Some(name)) = (info.symbol("init_uts_ns"), info.offset("uts_namespace.name")) else {
        return Ok(());
    };
    let at = uts.wrapping_add(name).wrapping_add(2 * UTS_FIELD as u64);
    let mut field = [0; UTS_FIELD];
    if space.read(backend, at, &mut field).stopped.is_some() {
        return Ok(());
    }
    let in_memory = field.split(|&b| b == 0).next().unwrap_or_default();
    if in_memory == release.as_bytes() {
        return Ok(());
    }
    let in_memory = String::from_utf8_lossy(in_memory);
    Err(format!("it says release '{release}', but init_uts_ns at {uts} holds '{}'", in_memory.escape_debug()))
}

/// Some CPU must run on tables that share the kernel image's top-level entry with `space`: all tables of one
/// kernel do, and those of an earlier kernel do not.
fn check_cpus(backend: &dyn Backend, space: &AddressSpace, cpu_tables: &[CpuTables]) -> Result<(), String> {
    let address = 0x000f_ffff_ffff_f000 & !space.sme_mask;
    let last_entry = |root: PhysAddr| {
        let entry = backend.read_phys_u64(PhysAddr((root.0 & address) | 0xff8)).ok()?;
        Some(entry & address)
    };
    let Some(ours) = last_entry(space.root) else { return Ok(()) };
    let theirs: Vec<_> =
        cpu_tables.iter().filter(|t| t.levels == space.levels).filter_map(|t| last_entry(t.root)).collect();
    if cpu_tables.is_empty() || theirs.contains(&ours) {
        return Ok(());
    }
    Err(format!("no CPU runs on its page tables at {}: an earlier kernel's remains", space.root))
}
