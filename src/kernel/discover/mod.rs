//! Finding the kernel in a machine's memory, with no help from the guest: release, KASLR, page tables.
//!
//! Three sources, each checked against memory before it is believed: the VMCOREINFO note of the dump, a copy
//! of that text found by scanning RAM, and, with neither, the page tables that a CPU's CR3 points to.
//! A kernel that is gone (kexec leaves its memory behind, page tables and all) passes every check but one:
//! no CPU runs on its tables. So CR3, where the source has it, decides. After a crash into a capture kernel both
//! can have CPUs, the crashed one's being halted: then the note's wins, and those of the other are named.
//!
//! Source: `arch/x86/kernel/vmcore_info_64.c`, `arch/x86/include/asm/page_64_types.h` (`__START_KERNEL_map`).

mod kallsyms;
mod page_tables;
mod scan;

use crate::addr::{PhysAddr, VirtAddr};
use crate::arch::x86_64::{AddressSpace, Reg, RegisterFile, TranslateError};
use crate::backend::Backend;
use crate::bytes::printable;
use crate::memory::Unreadable;
use crate::vmcoreinfo::VmcoreInfo;
use std::fmt;

pub use kallsyms::{NoKallsyms, find as find_kallsyms};

/// `__START_KERNEL_map`: virtual addresses of the kernel image are this plus physical minus `phys_base`.
pub const START_KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;
/// Where `_text` is linked with the default `CONFIG_PHYSICAL_START`; the KASLR offset is counted from there.
const DEFAULT_LINK_TEXT: u64 = 0xffff_ffff_8100_0000;
/// Room for the kernel image and its modules (`KERNEL_IMAGE_SIZE` at its largest).
const KERNEL_IMAGE_SIZE: u64 = 1 << 30;
/// The image starts on such a boundary and is mapped in pages of this size.
const IMAGE_ALIGN: u64 = 2 << 20;
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
        "no Linux kernel found: no VMCOREINFO note, no copy of it in RAM{}; \
         Linux must run when a dump is taken or a guest is looked at (QEMU: '-device vmcoreinfo' helps)",
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
    let cpus = cpu_tables(backend);
    let mut rejected = None;
    let mut best = Best::default();
    if let Some(note) = backend.vmcoreinfo_note() {
        match check(backend, VmcoreInfo::parse(note), FoundBy::Note, &cpus) {
            Ok(found) if found.problems.is_empty() => return Ok(found),
            Ok(found) => best.offer(found),
            Err(why) => {
                tracing::info!("the dump's own VMCOREINFO was not taken: {}", printable(&why));
                rejected = Some(format!("the dump's note: {why}"));
            }
        }
    }
    let decided = |found: &Found| !cpus.is_empty() && found.problems.is_empty();
    scan::for_each_vmcoreinfo(backend, progress, &mut |at, info| match check(
        backend,
        info,
        FoundBy::Scan(at),
        &cpus,
    ) {
        Ok(found) => {
            let stop = decided(&found);
            best.offer(found);
            stop
        }
        Err(why) => {
            tracing::info!("the VMCOREINFO at {at} was not taken: {}", printable(&why));
            rejected.get_or_insert(format!("the copy at {at}: {why}"));
            false
        }
    });
    if let Some(found) = best.into_found() {
        return Ok(found);
    }
    if let Some(found) =
        cpus.iter().take(ROOTS_SEARCHED).find_map(|tables| page_tables::find(backend, *tables))
    {
        return Ok(found);
    }
    Err(match rejected {
        Some(why) => DiscoverError::Contradicted(why),
        None => DiscoverError::Nothing { had_cr3: !cpus.is_empty() },
    })
}

/// Whether the CPU with these registers walks `space`'s kernel: its tables lead to the same top-level table for
/// the kernel's own address of it. `None` where its registers or tables do not tell.
///
/// An address in the image is compared, not an entry of the top table: the tables for EFI calls share the lower
/// levels only (`efi_sync_low_kernel_mappings`).
pub fn runs_on(
    backend: &dyn Backend,
    space: &AddressSpace,
    phys_base: u64,
    regs: &RegisterFile,
) -> Option<bool> {
    let at = VirtAddr(START_KERNEL_MAP.wrapping_add(space.root.0.wrapping_sub(phys_base)));
    let tables = tables_of(regs);
    if tables.is_empty() {
        return None;
    }
    let mut told = None;
    for tables in tables {
        let tables = AddressSpace { sme_mask: space.sme_mask, ..tables };
        match tables.translate(backend, at) {
            Ok(translation) if translation.phys == space.root => return Some(true),
            Err(TranslateError::TableUnreadable { .. }) => {}
            _ => told = Some(false),
        }
    }
    told
}

/// The copies that passed, as far as they matter: the one with the fewest doubts, and one of another kernel.
#[derive(Default)]
struct Best {
    found: Option<Found>,
    /// Release and tables of a second kernel.
    rival: Option<(String, PhysAddr)>,
}

impl Best {
    fn offer(&mut self, mut found: Found) {
        let Some(best) = &mut self.found else {
            self.found = Some(found);
            return;
        };
        if found.problems.len() < best.problems.len() {
            std::mem::swap(best, &mut found);
        }
        if found.space.root != best.space.root {
            self.rival = Some((found.release, found.space.root));
        }
    }

    fn into_found(self) -> Option<Found> {
        let mut found = self.found?;
        if let Some((release, root)) = self.rival {
            found.problems.push(format!(
                "memory also holds kernel {release} (page tables at {root}); nothing tells which of the two ran last"
            ));
        }
        Some(found)
    }
}

/// Each root searched for a kernel image costs up to 1 GiB of reads; all CPUs of one kernel show the same image.
const ROOTS_SEARCHED: usize = 4;
/// CPUs asked on whose tables they run; one that agrees is enough.
const CPUS_ASKED: usize = 1024;

/// The page tables the CPUs walk.
fn cpu_tables(backend: &dyn Backend) -> Vec<AddressSpace> {
    let all = backend.saved_cpus().iter().take(CPUS_ASKED).flat_map(|cpu| tables_of(&cpu.regs));
    let mut tables: Vec<AddressSpace> = all.collect();
    tables.sort_by_key(|tables| (tables.root, tables.levels));
    tables.dedup();
    tables
}

/// The tables in a CPU's CR3 and, because page-table isolation may have switched to the user's half of the pair
/// (bit 12, `PTI_USER_PGTABLE_BIT`), the kernel's half too.
fn tables_of(regs: &RegisterFile) -> Vec<AddressSpace> {
    let cr3 = regs.u64(Reg::Cr3).filter(|_| regs.u64(Reg::Cr4).is_some());
    let tables =
        cr3.and_then(|cr3| AddressSpace::from_control_registers(regs.u64(Reg::Cr0), cr3, regs.u64(Reg::Cr4)));
    let Some(tables) = tables else { return Vec::new() };
    let kernel_half = AddressSpace { root: PhysAddr(tables.root.0 & !0x1000), ..tables };
    if kernel_half == tables { vec![tables] } else { vec![tables, kernel_half] }
}

/// Holds a VMCOREINFO text against memory. `Err` says what contradicts it.
fn check(
    backend: &dyn Backend,
    info: VmcoreInfo,
    by: FoundBy,
    cpus: &[AddressSpace],
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
    check_cpus(backend, &space, table, cpus)?;

    let kaslr_offset = info.kernel_offset().unwrap_or(0);
    // _text begins on a 2 MiB boundary (CONFIG_PHYSICAL_ALIGN is at least that); in older kernels _stext follows
    // the head of the text.
    let text = info.symbol("_stext").map(|stext| VirtAddr(stext.0 & !(IMAGE_ALIGN - 1)));
    let text = text.unwrap_or(VirtAddr(DEFAULT_LINK_TEXT.wrapping_add(kaslr_offset)));
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

/// Some CPU must walk tables that lead to `space`'s top-level table at the kernel's own address of it: all tables
/// of one kernel do, and those of an earlier kernel do not.
fn check_cpus(
    backend: &dyn Backend,
    space: &AddressSpace,
    table: VirtAddr,
    cpus: &[AddressSpace],
) -> Result<(), String> {
    let mut told = false;
    for cpu in cpus {
        let cpu = AddressSpace { sme_mask: space.sme_mask, ..*cpu };
        match cpu.translate(backend, table) {
            Ok(translation) if translation.phys == space.root => return Ok(()),
            Err(TranslateError::TableUnreadable { .. }) => {}
            _ => told = true,
        }
    }
    if !told {
        return Ok(());
    }
    Err(format!("no CPU runs on its page tables at {}: an earlier kernel's remains", space.root))
}
