//! ELF core dumps: `/proc/vmcore` copies, `makedumpfile -E`, QEMU's `dump-guest-memory`.
//!
//! Reads physical memory by `p_paddr` only: QEMU writes `p_vaddr = p_paddr`, so virtual addresses in these
//! headers are no translation. Source: gABI ch. 4 and 5, kernel `include/uapi/linux/elf.h` (PN_XNUM),
//! `arch/x86/kernel/crash.c` (kernel text listed twice), QEMU `dump/dump.c`.

// bytes.rs and not the `object` crate: a handful of fields, and program headers are streamed, not mapped.
use super::error::Error;
use super::file::Source;
use super::notes::Notes;
use super::plausible_phys_base;
use super::segments::Backing;
use super::stored::StoredMemory;
use crate::addr::{PhysAddr, PhysRange, join_ranges};
use crate::bytes::{ByteSize, u16_at, u32_at, u64_at};

const HEADER_SIZE: usize = 64;
const PHDR_SIZE: u64 = 56;
const PN_XNUM: u16 = 0xffff;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const ET_CORE: u16 = 4;
/// makedumpfile sets it in `e_flags` when it ran out of disk space.
const DUMP_ELF_INCOMPLETE: u32 = 1;
/// Where the kernel image is mapped (`__START_KERNEL_map`, `arch/x86/include/asm/page_64_types.h`).
const START_KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;
/// The image, slide included, lies in the first GiB above (`KERNEL_IMAGE_SIZE`); modules follow.
const KERNEL_IMAGE_SIZE: u64 = 1 << 30;
/// QEMU with paging on lists every virtual mapping; more than this is no dump.
const MAX_SEGMENTS: u64 = 1 << 20;
const MAX_HINTS: usize = 16;
/// The notes of 8192 CPUs fit many times.
const MAX_NOTES: u64 = 64 << 20;
/// What a segment of notes counts for at least: there is one for each CPU in the kernel's own cores.
const NOTES_READ_COST: u64 = 1 << 10;

/// An ELF core file.
pub(super) struct ElfCore {
    source: Source,
    pub memory: StoredMemory,
    pub ranges: Vec<PhysRange>,
    pub notes: Notes,
    notes_read: u64,
    notes_cut: bool,
    pub phys_base_hints: Vec<u64>,
    pub problems: Vec<String>,
    /// Whether all that was to be written is there.
    pub complete: bool,
    /// Program headers of type PT_LOAD with memory in them.
    pub segments: usize,
}

/// One program header.
struct Phdr {
    kind: u32,
    offset: u64,
    vaddr: u64,
    paddr: u64,
    filesz: u64,
    memsz: u64,
}

impl Phdr {
    fn parse(bytes: &[u8]) -> Option<Self> {
        Some(Self {
            kind: u32_at(bytes, 0)?,
            offset: u64_at(bytes, 8)?,
            vaddr: u64_at(bytes, 16)?,
            paddr: u64_at(bytes, 24)?,
            filesz: u64_at(bytes, 32)?,
            memsz: u64_at(bytes, 40)?,
        })
    }
}

impl ElfCore {
    /// Reads the headers of `source`, which starts with the ELF magic; pages read in part are kept in up to
    /// `cache_bytes`.
    pub fn open(source: Source, cache_bytes: u64) -> Result<Self, Error> {
        let mut ident = [0; 20];
        source.read_exact(0, &mut ident, "the ELF header")?;
        check_kind(&source, &ident)?;
        let mut header = [0; HEADER_SIZE];
        source.read_exact(0, &mut header, "the ELF header")?;

        let mut core = Self {
            memory: StoredMemory::default(),
            ranges: Vec::new(),
            notes: Notes::default(),
            notes_read: 0,
            notes_cut: false,
            phys_base_hints: Vec::new(),
            problems: Vec::new(),
            complete: true,
            segments: 0,
            source,
        };
        let mut needed = 0;
        let loads = core.read_program_headers(&header, &mut needed)?;
        if core.notes.of_a_process {
            return Err(Error::NotADump {
                path: core.source.path.clone(),
                looks_like: "the core file of a process".into(),
                cure: "open that with gdb; kstub reads dumps of a whole machine",
            });
        }
        let listed = core.add_loads(&loads, cache_bytes)?;
        let size = core.source.file.size();
        if needed > size {
            core.complete = false;
            core.problems.push(format!(
                "the file ends at offset {size:#x}, {} before the end that its headers tell: it was cut, \
                 {} of {} of memory are there, and pages beyond read as truncated; copy or take the dump \
                 again",
                ByteSize(needed - size),
                ByteSize(core.memory.bytes_held()),
                ByteSize(listed),
            ));
        }
        if u32_at(&header, 48).is_some_and(|flags| flags & DUMP_ELF_INCOMPLETE != 0) {
            core.complete = false;
            core.problems.push(format!(
                "makedumpfile marked the dump as incomplete: it ran out of space while writing, and {} of {} \
                 of memory are there; dump again with more space or a higher dump level",
                ByteSize(core.memory.bytes_held()),
                ByteSize(core.ranges.iter().map(PhysRange::len).fold(0, u64::saturating_add)),
            ));
        }
        Ok(core)
    }

    /// The PT_LOAD headers; reads the notes on the way. `needed`: the file size that the headers imply.
    fn read_program_headers(&mut self, header: &[u8], needed: &mut u64) -> Result<Vec<Phdr>, Error> {
        let source = self.source.clone();
        let cut = || source.invalid(0, "the ELF header is incomplete");
        let table = u64_at(header, 32).ok_or_else(cut)?;
        let entry_size = u16_at(header, 54).ok_or_else(cut)?;
        let count = match u16_at(header, 56).ok_or_else(cut)? {
            PN_XNUM => {
                // More than fits in 16 bits: the number is in section header 0, field sh_info.
                let sections = u64_at(header, 40).ok_or_else(cut)?;
                let mut sh_info = [0; 4];
                let at = sections.checked_add(44);
                let at = at.filter(|_| sections != 0).ok_or_else(|| {
                    source.invalid(
                        40,
                        "e_phnum says that section header 0 has the number of segments, but there is none",
                    )
                })?;
                source.read_exact(at, &mut sh_info, "section header 0")?;
                u64::from(u32::from_le_bytes(sh_info))
            }
            count => u64::from(count),
        };
        if u64::from(entry_size) != PHDR_SIZE {
            return Err(
                source.invalid(54, format!("program headers of {entry_size} bytes instead of {PHDR_SIZE}"))
            );
        }
        if count > MAX_SEGMENTS {
            return Err(source.invalid(56, format!("{count} program headers, more than any dump has")));
        }
        let mut loads = Vec::new();
        let mut buf = [0; PHDR_SIZE as usize * 64];
        let mut done = 0;
        while done < count {
            let n = (count - done).min(64);
            let bytes =
                usize::try_from(n * PHDR_SIZE).ok().and_then(|len| buf.get_mut(..len)).ok_or_else(cut)?;
            let at = table
                .checked_add(done * PHDR_SIZE)
                .ok_or_else(|| source.invalid(32, format!("program headers at offset {table:#x}")))?;
            source.read_exact(at, bytes, "the program headers")?;
            for phdr in bytes.chunks_exact(PHDR_SIZE as usize).filter_map(Phdr::parse) {
                if matches!(phdr.kind, PT_LOAD | PT_NOTE) && phdr.filesz > 0 {
                    *needed = (*needed).max(phdr.offset.saturating_add(phdr.filesz));
                }
                match phdr.kind {
                    PT_NOTE => self.read_notes(&phdr),
                    PT_LOAD => loads.push(phdr),
                    _ => {}
                }
            }
            done += n;
        }
        Ok(loads)
    }

    fn read_notes(&mut self, phdr: &Phdr) {
        // All together: a million headers could name the same notes.
        let left = MAX_NOTES.saturating_sub(self.notes_read);
        if left == 0 {
            return;
        }
        let (bytes, stopped) = self.source.read_up_to(phdr.offset, phdr.filesz, left);
        self.notes_read += (bytes.len() as u64).max(NOTES_READ_COST);
        self.notes.add(&bytes, phdr.offset);
        // One is enough said.
        if stopped.is_some() && !std::mem::replace(&mut self.notes_cut, true) {
            self.problems.push(format!(
                "the file ends inside its ELF notes at offset {:#x}: registers or VMCOREINFO may be \
                 missing; copy or take the dump again",
                phdr.offset
            ));
        }
    }

    /// Puts the memory together; how many bytes of it the headers say the file has.
    fn add_loads(&mut self, loads: &[Phdr], cache_bytes: u64) -> Result<u64, Error> {
        let size = self.source.file.size();
        let mut backings = Vec::with_capacity(loads.len());
        let mut ranges = Vec::with_capacity(loads.len());
        let mut beyond = None;
        for phdr in loads {
            // u64::MAX: the kernel knows no physical address (vmalloc and text in /proc/kcore).
            if phdr.memsz == 0 || phdr.paddr == u64::MAX {
                continue;
            }
            // QEMU with paging on: a mapping of device memory, which it has not stored.
            if phdr.filesz == 0 && phdr.offset == u64::MAX {
                continue;
            }
            let Some(range) = PhysRange::new(PhysAddr(phdr.paddr), phdr.memsz) else {
                beyond = beyond.or(Some(phdr));
                continue;
            };
            self.segments += 1;
            ranges.push(range);
            let filesz = phdr.filesz.min(phdr.memsz);
            let held = size.saturating_sub(phdr.offset).min(filesz);
            let at = |n| PhysAddr(phdr.paddr.saturating_add(n));
            let claims = [
                (at(0), at(held), Backing::File { file: 0, offset: phdr.offset }),
                (at(held), at(filesz), Backing::CutOff { file: 0 }),
                (at(filesz), range.end, Backing::Absent),
            ];
            backings.extend(claims.into_iter().filter(|(from, to, _)| from < to));
            self.add_phys_base_hint(phdr);
        }
        if let Some(phdr) = beyond {
            self.problems.push(format!(
                "a segment runs past the end of the address space (p_paddr {:#x}, p_memsz {:#x}) and is left \
                 out; copy or take the dump again",
                phdr.paddr, phdr.memsz
            ));
        }
        if ranges.is_empty() {
            return Err(self.source.invalid(32, "no program header lists memory"));
        }
        self.ranges = join_ranges(ranges);
        self.memory = StoredMemory::new(vec![self.source.clone()], backings, cache_bytes);
        Ok(self.memory.bytes_held().saturating_add(self.memory.bytes_cut()))
    }

    /// A segment of the kernel image tells how far it was moved.
    fn add_phys_base_hint(&mut self, phdr: &Phdr) {
        let image = phdr.vaddr.checked_sub(START_KERNEL_MAP).filter(|&offset| offset < KERNEL_IMAGE_SIZE);
        let hint = image.map(|offset| phdr.paddr.wrapping_sub(offset));
        if let Some(hint) = hint.filter(|&hint| plausible_phys_base(hint))
            && !self.phys_base_hints.contains(&hint)
            && self.phys_base_hints.len() < MAX_HINTS
        {
            self.phys_base_hints.push(hint);
        }
    }
}

/// Refuses what is not an ELF64 little-endian x86-64 core file; `ident` is its first 20 bytes.
fn check_kind(source: &Source, ident: &[u8; 20]) -> Result<(), Error> {
    let path = || source.path.clone();
    let [_, _, _, _, class, data, ..] = *ident;
    let field = |at| match (data, u16_at(ident, at)) {
        // EI_DATA 2: big-endian.
        (2, value) => value.map_or(0, u16::swap_bytes),
        (_, value) => value.unwrap_or(0),
    };
    let (kind, machine) = (field(16), field(18));
    if kind != ET_CORE {
        let (looks_like, cure) = match kind {
            1 => ("an ELF object file (a kernel module?)", "give the dump, not a module"),
            2 | 3 => (
                "an ELF executable or shared object (vmlinux?)",
                "give the dump as the dump, and this file with --vmlinux",
            ),
            _ => ("an ELF file that is no core file", "give the dump itself"),
        };
        return Err(Error::NotADump { path: path(), looks_like: looks_like.into(), cure });
    }
    let bits = if class == 1 { ", 32 bits" } else { "" };
    if machine != 62 || class != 2 || data != 1 {
        let name = match machine {
            3 => "i386 (or of a guest that was not in 64-bit mode)".into(),
            8 => format!("mips{bits}"),
            20 => "ppc".into(),
            21 => if data == 1 { "ppc64le" } else { "ppc64" }.into(),
            22 => format!("s390x{bits}"),
            40 => "arm".into(),
            62 => format!("x86-64 in an ELF file of another kind (class {class}, data {data})"),
            183 => "aarch64".into(),
            243 => format!("riscv{bits}"),
            258 => format!("loongarch{bits}"),
            other => format!("ELF machine {other}{bits}"),
        };
        return Err(Error::OtherMachine { path: path(), machine: name });
    }
    Ok(())
}

#[cfg(test)]
mod tests;
