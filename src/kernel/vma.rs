//! Areas of an address space: what a process has mapped where.
//!
//! Source: `include/linux/mm_types.h` (`struct vm_area_struct`), `include/linux/mm.h` (flags),
//! `fs/proc/task_mmu.c` (names).

use super::fields::Fields;
use super::list::ENTRIES_MAX;
use super::vfs::FileInfo;
use super::{Kernel, Object, ObjectError};
use crate::addr::VirtAddr;
use std::collections::HashSet;

/// Flags by bit, those that have been the same since v5.10 or had no other meaning before.
const FLAGS: [(u32, &str); 33] = [
    (0, "READ"),
    (1, "WRITE"),
    (2, "EXEC"),
    (3, "SHARED"),
    (4, "MAYREAD"),
    (5, "MAYWRITE"),
    (6, "MAYEXEC"),
    (7, "MAYSHARE"),
    (8, "GROWSDOWN"),
    (9, "UFFD_MISSING"),
    (10, "PFNMAP"),
    (12, "UFFD_WP"),
    (13, "LOCKED"),
    (14, "IO"),
    (15, "SEQ_READ"),
    (16, "RAND_READ"),
    (17, "DONTCOPY"),
    (18, "DONTEXPAND"),
    (19, "LOCKONFAULT"),
    (20, "ACCOUNT"),
    (21, "NORESERVE"),
    (22, "HUGETLB"),
    (23, "SYNC"),
    (24, "PAT"),
    (25, "WIPEONFORK"),
    (26, "DONTDUMP"),
    (27, "SOFTDIRTY"),
    (28, "MIXEDMAP"),
    (29, "HUGEPAGE"),
    (30, "NOHUGEPAGE"),
    (31, "MERGEABLE"),
    (40, "DROPPABLE"),
    (42, "SEALED"),
];

/// One area.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vma {
    /// Its `struct vm_area_struct`.
    pub at: VirtAddr,
    /// First byte.
    pub start: u64,
    /// One past the last byte.
    pub end: u64,
    /// `vm_flags`.
    pub flags: u64,
    /// Offset in the file, in bytes; 0 without a file.
    pub offset: u64,
    /// Its `struct file` and what that is of.
    pub file: Option<(VirtAddr, FileInfo)>,
    /// What `/proc/PID/maps` calls an area without a file: `[heap]`, `[stack]`, `[vdso]`, ... Untrusted.
    pub name: Option<String>,
}

impl Vma {
    /// `rwxp`, as `/proc/PID/maps` has it.
    pub fn permissions(&self) -> String {
        let letter = |bit: u64, letter| if self.flags & bit != 0 { letter } else { '-' };
        let share = if self.flags & 8 != 0 { 's' } else { 'p' };
        [letter(1, 'r'), letter(2, 'w'), letter(4, 'x'), share].into_iter().collect()
    }

    /// The flags that are set, by name; those without one by number.
    pub fn flag_names(&self, kernel: &Kernel) -> Vec<String> {
        // VM_DENYWRITE had the bit until about v5.16.
        let has_guards = kernel.types().is_some_and(|types| types.constant("VMA_MAYBE_GUARD_BIT").is_some());
        let set = (0..64).filter(|bit| self.flags >> bit & 1 == 1);
        let name = |bit| match FLAGS.iter().find(|(number, _)| *number == bit) {
            Some((_, name)) => (*name).to_owned(),
            None if bit == 11 && has_guards => "MAYBE_GUARD".to_owned(),
            None if bit == 11 && kernel.has_member("vm_area_struct", "vm_next") => "DENYWRITE".to_owned(),
            None => format!("bit {bit}"),
        };
        set.map(name).collect()
    }
}

/// The areas of an address space.
#[derive(Clone, Debug, Default)]
pub struct Vmas {
    /// By address.
    pub areas: Vec<Vma>,
    /// What was broken.
    pub problem: Option<String>,
}

const START: usize = 0;
const END: usize = 1;
const VMA_FLAGS: usize = 2;
const PGOFF: usize = 3;
const FILE: usize = 4;
const OPS: usize = 5;
const PRIVATE: usize = 6;
const NEXT: usize = 7;
const ANON_NAME: usize = 8;

impl Kernel {
    /// The area of the `struct mm_struct` at `mm` that `at` lies in.
    pub fn vma_at(&self, mm: VirtAddr, at: VirtAddr) -> Result<Option<Vma>, ObjectError> {
        Ok(self.vmas(mm)?.areas.into_iter().find(|vma| (vma.start..vma.end).contains(&at.0)))
    }

    /// The areas of the `struct mm_struct` at `mm`.
    pub fn vmas(&self, mm: VirtAddr) -> Result<Vmas, ObjectError> {
        let space = self.object("mm_struct", mm)?;
        let members: &[&[&str]] = &[
            &["vm_start"],
            &["vm_end"],
            &["vm_flags", "__vm_flags"],
            &["vm_pgoff"],
            &["vm_file"],
            &["vm_ops"],
            &["vm_private_data"],
            &["vm_next"],
            &["anon_name"],
        ];
        let fields = Fields::new(self, "vm_area_struct", members)?;
        let (found, problem) = self.vma_addresses(space, &fields)?;
        let names = Names::of(space);
        let mut areas = Vec::new();
        let unnamed = space.get("start_brk").and(space.get("brk")).and(space.get("start_stack")).err();
        let mut broken =
            problem.or_else(|| unnamed.map(|error| format!("[heap] and [stack] are not named: {error}")));
        for at in found {
            let row = fields.read(at);
            let (Some(start), Some(end), Some(flags)) = (row.u64(START), row.u64(END), row.u64(VMA_FLAGS))
            else {
                broken.get_or_insert(format!("the vm_area_struct at {at} cannot be read"));
                continue;
            };
            let file = row.pointer(FILE).and_then(|file| Some((file, self.object("file", file).ok()?)));
            let file = file.map(|(at, file)| (at, self.file_info(file)));
            let offset = row.u64(PGOFF).filter(|_| file.is_some()).unwrap_or(0).wrapping_shl(12);
            let name = match file {
                Some(_) => None,
                None => names.of_area(self, (start, end), row.u64(OPS), row.pointer(PRIVATE)),
            };
            let name = name.or_else(|| {
                let anon = row.pointer(ANON_NAME).filter(|_| file.is_none())?;
                let text = self.object("anon_vma_name", anon).ok()?.member("name").ok()?;
                Some(format!("[anon:{}]", self.text_at(text.at, 80).ok()?))
            });
            areas.push(Vma { at, start, end, flags, offset, file, name });
        }
        Ok(Vmas { areas, problem: broken })
    }

    fn vma_addresses(
        &self,
        space: Object<'_>,
        fields: &Fields<'_>,
    ) -> Result<(Vec<VirtAddr>, Option<String>), ObjectError> {
        // Since Linux commit d4af56c5c7c6 ("mm: start tracking VMAs with maple tree") (in v6.1).
        if let Ok(tree) = space.member("mm_mt") {
            let walk = self.maple_tree(tree.at);
            return Ok((walk.entries.iter().map(|entry| VirtAddr(entry.entry)).collect(), walk.problem));
        }
        let (mut found, mut seen) = (Vec::new(), HashSet::new());
        let mut next = space.member("mmap")?.pointer().map(|at| (at.0 != 0).then_some(at))?;
        while let Some(at) = next {
            if !seen.insert(at) || found.len() >= ENTRIES_MAX {
                return Ok((found, Some(format!("'vm_next' leads to {at} a second time"))));
            }
            let row = fields.read(at);
            if row.u64(NEXT).is_none() {
                return Ok((found, Some(format!("the vm_area_struct at {at} cannot be read"))));
            }
            found.push(at);
            next = row.pointer(NEXT);
        }
        Ok((found, None))
    }
}

/// What names areas without a file.
struct Names {
    brk: Option<(u64, u64)>,
    stack: Option<u64>,
    vdso: Option<u64>,
}

impl Names {
    fn of(space: Object<'_>) -> Self {
        Self {
            brk: space.get("start_brk").ok().zip(space.get("brk").ok()),
            stack: space.get("start_stack").ok(),
            vdso: space.get("context.vdso").ok().filter(|&at| at != 0),
        }
    }

    fn of_area(
        &self,
        kernel: &Kernel,
        (start, end): (u64, u64),
        ops: Option<u64>,
        private: Option<VirtAddr>,
    ) -> Option<String> {
        let ops = ops.filter(|&ops| ops != 0).map(VirtAddr);
        if ops.is_some() && ops == kernel.symbol("special_mapping_vmops") {
            let mapping = kernel.object("vm_special_mapping", private?).ok()?;
            return mapping.member("name").ok()?.text().ok();
        }
        if self.vdso == Some(start) {
            return Some("[vdso]".to_owned());
        }
        if self.brk.is_some_and(|(first, last)| start <= last && end >= first) {
            return Some("[heap]".to_owned());
        }
        self.stack.is_some_and(|stack| start <= stack && end >= stack).then(|| "[stack]".to_owned())
    }
}
