//! Names of a task's flags: `task_struct.flags` (`PF_*`) and `thread_info.flags` (`TIF_*`).
//!
//! The kernel has them as macros, of which neither BTF nor DWARF tells; which bits are which is told by what came with
//! them. Source: `include/linux/sched.h`, `arch/x86/include/asm/thread_info.h`,
//! `include/asm-generic/thread_info_tif.h`.

use super::{Kernel, Object};

/// A bit and its name.
type Bit = (u32, &'static str);

/// `PF_*` that have kept their bits.
const PROCESS: &[Bit] = &[
    (0, "VCPU"),
    (1, "IDLE"),
    (2, "EXITING"),
    (3, "POSTCOREDUMP"),
    (4, "IO_WORKER"),
    (5, "WQ_WORKER"),
    (6, "FORKNOEXEC"),
    (7, "MCE_PROCESS"),
    (8, "SUPERPRIV"),
    (9, "DUMPCORE"),
    (10, "SIGNALED"),
    (11, "MEMALLOC"),
    (12, "NPROC_EXCEEDED"),
    (13, "USED_MATH"),
    (14, "USER_WORKER"),
    (15, "NOFREEZE"),
    (17, "KSWAPD"),
    (18, "MEMALLOC_NOFS"),
    (19, "MEMALLOC_NOIO"),
    (20, "LOCAL_THROTTLE"),
    (21, "KTHREAD"),
    (22, "RANDOMIZE"),
    (26, "NO_SETAFFINITY"),
    (27, "MCE_EARLY"),
    (31, "SUSPEND_TASK"),
];
/// Those that took the bits of others.
const PROCESS_NEW: &[Bit] =
    &[(16, "KCOMPACTD"), (23, "NO_NOTIFY_SIGNAL"), (28, "MEMALLOC_PIN"), (29, "BLOCK_TS")];
/// Until about v6.0.
const PROCESS_OLD: &[Bit] =
    &[(16, "FROZEN"), (23, "SWAPWRITE"), (28, "MEMALLOC_NOCMA"), (30, "FREEZER_SKIP")];

/// `TIF_*` as architectures share them.
const THREAD: &[Bit] = &[
    (0, "NOTIFY_RESUME"),
    (1, "SIGPENDING"),
    (2, "NOTIFY_SIGNAL"),
    (3, "MEMDIE"),
    (4, "NEED_RESCHED"),
    (5, "NEED_RESCHED_LAZY"),
    (6, "POLLING_NRFLAG"),
    (7, "USER_RETURN_NOTIFY"),
    (8, "UPROBE"),
    (9, "PATCH_PENDING"),
    (10, "RESTORE_SIGMASK"),
    (11, "RSEQ"),
    (12, "HRTIMER_REARM"),
    (16, "SSBD"),
    (17, "SPEC_IB"),
    (18, "SPEC_L1D_FLUSH"),
    (THREAD_FPU, "NEED_FPU_LOAD"),
    (20, "NOCPUID"),
    (21, "NOTSC"),
    (22, "IO_BITMAP"),
    (23, "SPEC_FORCE_UPDATE"),
    (24, "FORCED_TF"),
    (25, "SINGLESTEP"),
    (26, "BLOCKSTEP"),
    (27, "ADDR32"),
];
/// `TIF_NEED_FPU_LOAD`, which the first task has for life: it tells which of the tables is the kernel's.
const THREAD_FPU: u32 = 19;
/// x86's own, from v5.11 on.
const THREAD_X86: &[Bit] = &[
    (1, "NOTIFY_RESUME"),
    (2, "SIGPENDING"),
    (3, "NEED_RESCHED"),
    (4, "SINGLESTEP"),
    (5, "SSBD"),
    (9, "SPEC_IB"),
    (10, "SPEC_L1D_FLUSH"),
    (11, "USER_RETURN_NOTIFY"),
    (12, "UPROBE"),
    (13, "PATCH_PENDING"),
    (THREAD_X86_FPU, "NEED_FPU_LOAD"),
    (15, "NOCPUID"),
    (16, "NOTSC"),
    (17, "NOTIFY_SIGNAL"),
    (20, "MEMDIE"),
    (21, "POLLING_NRFLAG"),
    (22, "IO_BITMAP"),
    (23, "SPEC_FORCE_UPDATE"),
    (24, "FORCED_TF"),
    (25, "BLOCKSTEP"),
    (27, "LAZY_MMU_UPDATES"),
    (29, "ADDR32"),
];
const THREAD_X86_FPU: u32 = 14;
/// Before, when they told of system calls, too.
const THREAD_X86_OLD: &[Bit] = &[
    (0, "SYSCALL_TRACE"),
    (1, "NOTIFY_RESUME"),
    (2, "SIGPENDING"),
    (3, "NEED_RESCHED"),
    (4, "SINGLESTEP"),
    (5, "SSBD"),
    (6, "SYSCALL_EMU"),
    (7, "SYSCALL_AUDIT"),
    (8, "SECCOMP"),
    (9, "SPEC_IB"),
    (10, "SPEC_FORCE_UPDATE"),
    (11, "USER_RETURN_NOTIFY"),
    (12, "UPROBE"),
    (13, "PATCH_PENDING"),
    (THREAD_X86_FPU, "NEED_FPU_LOAD"),
    (15, "NOCPUID"),
    (16, "NOTSC"),
    (17, "IA32"),
    (18, "SLD"),
    (19, "NOTIFY_SIGNAL"),
    (20, "MEMDIE"),
    (21, "POLLING_NRFLAG"),
    (22, "IO_BITMAP"),
    (24, "FORCED_TF"),
    (25, "BLOCKSTEP"),
    (27, "LAZY_MMU_UPDATES"),
    (28, "SYSCALL_TRACEPOINT"),
    (29, "ADDR32"),
    (30, "X32"),
];

/// Names of the bits of a word; `bit N` for those without one.
fn names(word: u64, tables: &[&[Bit]]) -> Vec<String> {
    let name = |bit: u32| tables.iter().flat_map(|table| table.iter()).find(|row| row.0 == bit);
    (0..64)
        .filter(|bit| word >> bit & 1 == 1)
        .map(|bit| name(bit).map_or_else(|| format!("bit {bit}"), |row| row.1.to_owned()))
        .collect()
}

impl Kernel {
    /// Names of `task_struct.flags`, without `PF_`.
    pub fn process_flags(&self, flags: u64) -> Vec<String> {
        // Since Linux commit f5d39b020809 ("freezer,sched: Rewrite core freezer logic") (in v6.1) being frozen is a
        // state, and frozen() a function. Without a freezer none of its bits is ever set.
        let is_old = self.symbol("__refrigerator").is_some() && self.symbol("frozen").is_none();
        names(flags, &[PROCESS, if is_old { PROCESS_OLD } else { PROCESS_NEW }])
    }

    /// Names of `thread_info.flags`, without `TIF_`; `None` where it cannot be told which bits are which.
    pub fn thread_flags(&self, flags: u64) -> Option<Vec<String>> {
        let first = self.symbol("init_task").and_then(|at| self.object("task_struct", at).ok());
        let first = first.and_then(|task: Object<'_>| task.get("thread_info.flags").ok())?;
        let has = |bit: u32| first >> bit & 1 == 1;
        let work_is_apart = self.member("thread_info", "syscall_work").is_some();
        match (has(THREAD_FPU), has(THREAD_X86_FPU), work_is_apart) {
            (true, false, _) => Some(names(flags, &[THREAD])),
            (false, true, true) => Some(names(flags, &[THREAD_X86])),
            (false, true, false) => Some(names(flags, &[THREAD_X86_OLD])),
            _ => None,
        }
    }
}
