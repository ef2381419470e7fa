//! Which vmlinux is a kernel's, and what it tells of where the kernel is.
//!
//! Knows files and the kernel in memory, and that both must say the same: a build-id, or the banner.
//! Source: `arch/x86/kernel/vmlinux.lds.S` (`__start_notes`), `init/version.c` (`linux_banner`).

use super::discover::{self, Found};
use super::{Kernel, OpenError, Options, TypesFrom};
use crate::addr::VirtAddr;
use crate::arch::x86_64::AddressSpace;
use crate::backend::Backend;
use crate::debuginfo::{self, DebugInfo, find};

/// The vmlinux to use: the one asked for if it fits, or the first that is found and fits; else what to do about it.
pub(super) fn choose_debug_info(
    backend: &dyn Backend,
    found: &mut Found,
    options: &Options,
    problems: &mut Vec<String>,
) -> Result<Result<DebugInfo, String>, OpenError> {
    let by_page_tables = found.by == discover::FoundBy::PageTables;
    let fits = |info: &DebugInfo| {
        let at = |text: VirtAddr| {
            let mut there = Found { text, ..found.clone() };
            if let (true, Some(linked)) = (by_page_tables, info.first_load()) {
                there.kaslr_offset = there.text.0.wrapping_sub(linked);
            }
            belongs(backend, &there, info)?;
            if by_page_tables && !is_relocated(backend, &there, info) {
                return Err(format!("is of an image at {text} that was unpacked there and not started"));
            }
            Ok((there.text, there.kaslr_offset))
        };
        // While the kernel starts, more is mapped below the image: it is where its build-id is.
        let above = || image_places(found.text).find_map(|text| at(text).ok());
        at(found.text).or_else(|why| if by_page_tables { above().ok_or(why) } else { Err(why) })
    };
    let chosen = match &options.vmlinux {
        Some(path) => {
            let info = DebugInfo::open(path)?;
            let path = path.display().to_string();
            fits(&info).map_err(|why| OpenError::Mismatch { path, why })?;
            find::remember(&options.places, &info);
            Ok(info)
        }
        None => {
            let wanted = find::Wanted { release: &found.release, build_id: found.build_id.as_deref() };
            let search = find::vmlinux(&wanted, &options.places, &|info| fits(info).map(|_| ()));
            match search.found {
                Some(info) => Ok(info),
                None => Err(report_search(&search, found, problems)),
            }
        }
    };
    if let Ok(info) = &chosen {
        tracing::info!("'{}' is this kernel's vmlinux", info.path().display());
        if let Ok((text, kaslr_offset)) = fits(info) {
            let moved = text != found.text;
            (found.text, found.kaslr_offset) = (text, kaslr_offset);
            if let (true, Ok(start)) = (moved, found.space.walk(backend, text, &mut |_| ())) {
                found.phys_base = start.phys.0.wrapping_sub(text.0.wrapping_sub(discover::START_KERNEL_MAP));
            }
        }
        if by_page_tables {
            prefer_own_tables(backend, found, info);
        }
        if !info.has_symbols() {
            problems.push(format!(
                "'{}' has no symbol table (stripped?): gdb finds no names in it; use the unstripped vmlinux",
                info.path().display()
            ));
        }
    }
    Ok(chosen)
}

/// Whether pointers in the image are those of where it is: what unpacked the kernel leaves a copy where they are not.
fn is_relocated(backend: &dyn Backend, found: &Found, info: &DebugInfo) -> bool {
    let (Some(table), Some(first)) = (info.symbol("sys_call_table"), info.symbol("__x64_sys_read")) else {
        return true;
    };
    let mut entry = [0; 8];
    let at = VirtAddr(table.addr.wrapping_add(found.kaslr_offset));
    let read = found.space.read(backend, at, &mut entry);
    read.stopped.is_some() || u64::from_le_bytes(entry) == first.addr.wrapping_add(found.kaslr_offset)
}

/// Where an image can be that is not at `text`: KASLR moves it in steps of 2 MiB up to where modules begin.
fn image_places(text: VirtAddr) -> impl Iterator<Item = VirtAddr> {
    const STEP: usize = 2 << 20;
    const END: u64 = 0xffff_ffff_c000_0000;
    (text.0..END).step_by(STEP).skip(1).map(VirtAddr)
}

/// Takes the kernel's own tables in place of those of a CPU, which may belong to a process, or only to the kernel's start.
fn prefer_own_tables(backend: &dyn Backend, found: &mut Found, info: &DebugInfo) {
    // init_top_pgt since about v4.13, before that init_level4_pgt.
    let Some(top) = ["init_top_pgt", "init_level4_pgt"].iter().find_map(|name| info.symbol(name)) else {
        return;
    };
    let at = VirtAddr(top.addr.wrapping_add(found.kaslr_offset));
    let Ok(top) = found.space.walk(backend, at, &mut |_| ()) else { return };
    let own = AddressSpace { root: top.phys, ..found.space };
    let same = |space: &AddressSpace| space.walk(backend, found.text, &mut |_| ()).ok().map(|text| text.phys);
    if same(&own).is_some() && same(&own) == same(&found.space) {
        found.space = own;
    }
}

/// Why there are no types, or none of those that were asked for.
pub(super) fn types_missing(kernel: &Kernel, from: TypesFrom) -> Option<String> {
    let wanted = match from {
        TypesFrom::Any => {
            "neither BTF in the kernel's memory that can be read nor types in a vmlinux: commands that look into \
             structures fail; pass --vmlinux FILE with debug info"
        }
        TypesFrom::Btf => {
            "no BTF in the kernel's memory that can be read nor in a vmlinux: no types; drop --types btf"
        }
        TypesFrom::Dwarf => {
            "no vmlinux with DWARF: no types; pass --vmlinux FILE with debug info, or drop --types dwarf"
        }
    };
    kernel.types().is_none().then(|| wanted.to_owned())
}

/// Why there is no vmlinux, and the cures; what is wrong with files and servers is a problem in any case.
fn report_search(search: &find::Search, found: &Found, problems: &mut Vec<String>) -> String {
    let rejected = search.rejected.iter();
    problems.extend(rejected.map(|r| format!("'{}' was not used: it {}", r.path.display(), r.why)));
    problems.extend(search.failures.iter().cloned());
    let release = &found.release;
    // A server cannot be asked for a kernel that does not tell its build-id.
    let (servers, by) = match &found.build_id {
        Some(id) => (", or set DEBUGINFOD_URLS", format!(" for build-id {id}")),
        None => ("", String::new()),
    };
    format!(
        "no vmlinux with debug info for {release}: gdb has no types, source lines or locals; install the kernel's debug package \
         (Debian: linux-image-{release}-dbg), pass --vmlinux FILE or --debug-dir DIR{servers} (searched{by}: {})",
        search.searched.join(", ")
    )
}

/// Whether `info` is the debug info of the kernel at `found`: by build-id or, where the kernel does not tell its
/// own, by the banner that both hold.
fn belongs(backend: &dyn Backend, found: &Found, info: &DebugInfo) -> Result<(), String> {
    let cure = format!("pass --vmlinux FILE built for {}", found.release);
    if let Some(wanted) = &found.build_id {
        return match info.build_id() {
            Some(id) if id == wanted => Ok(()),
            Some(id) => Err(format!("has build-id {id} but the kernel says {wanted}; {cure}")),
            None => Err(format!("has no build-id but the kernel says {wanted}; {cure}")),
        };
    }
    // Before VMCOREINFO told it the kernel had its build-id in its notes already.
    if let Some(id) = info.build_id()
        && let (Some(start), Some(stop)) = (info.symbol("__start_notes"), info.symbol("__stop_notes"))
    {
        let mut notes = vec![0; usize::try_from(stop.addr.saturating_sub(start.addr).min(4096)).unwrap_or(0)];
        let at = VirtAddr(start.addr.wrapping_add(found.kaslr_offset));
        if found.space.read(backend, at, &mut notes).stopped.is_none() && !notes.is_empty() {
            return match debuginfo::build_id_in_notes(&notes) {
                Some(in_memory) if in_memory == id => Ok(()),
                _ => Err(format!("has build-id {id}, which is not in the kernel's notes at {at}; {cure}")),
            };
        }
    }
    let banner = info.symbol("linux_banner").ok_or_else(|| format!("has no symbol linux_banner; {cure}"))?;
    let len = if banner.size == 0 { 64 } else { banner.size.min(512) };
    let in_file =
        info.bytes_at(banner.addr, len).ok_or_else(|| format!("has no bytes for linux_banner; {cure}"))?;
    let mut in_memory = vec![0; in_file.len()];
    let at = VirtAddr(banner.addr.wrapping_add(found.kaslr_offset));
    let read = found.space.read(backend, at, &mut in_memory);
    if read.stopped.is_none() && in_memory == in_file {
        return Ok(());
    }
    Err(format!("is another kernel's: its linux_banner is not the one at {at} in memory; {cure}"))
}
