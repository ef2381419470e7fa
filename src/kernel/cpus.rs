//! CPUs as the kernel numbers them: which exist, whose registers are whose, what ran on each.
//!
//! Notes do not say which CPU they are of: the kernel writes one per CPU that answered, and a reader sees them
//! in a row. Each CPU's own copy of its note (`crash_notes`) and its per-CPU base tell.
//! Source: `kernel/crash_core.c` (`crash_notes`), `arch/x86/kernel/setup_percpu.c` (`__per_cpu_offset`).

use super::{CpuId, Kernel, Task};
use crate::addr::VirtAddr;
use crate::arch::x86_64::{Reg, RegisterFile, Saved};
use crate::backend::{RegisterSource, SavedCpu};
use std::collections::{BTreeSet, HashMap};

/// `NR_CPUS` is at most 8192 on x86-64 (`MAXSMP`); hostile masks end here.
const NR_CPUS_MAX: u64 = 8192;
/// An ELF note header and the name `"CORE"`, padded: what stands before the descriptor in `crash_notes`.
const NOTE_HEADER: u64 = 12 + 8;

/// A saved register set and the CPU it is of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Attributed {
    /// The CPU.
    pub cpu: CpuId,
    /// Index into the backend's saved CPUs.
    pub index: usize,
    /// Whether evidence led here, or only the order of the notes.
    pub certain: bool,
}

/// Masks of CPUs; each has been a variable of its own since v4.5, and a bitmap behind a pointer before.
pub const POSSIBLE: [&str; 2] = ["__cpu_possible_mask", "cpu_possible_bits"];
/// CPUs that are plugged in.
pub const PRESENT: [&str; 2] = ["__cpu_present_mask", "cpu_present_bits"];
/// CPUs the scheduler may use.
pub const ONLINE: [&str; 2] = ["__cpu_online_mask", "cpu_online_bits"];

impl Kernel {
    /// The CPUs set in the first of these masks that the kernel has; `None` where it is not known.
    /// A kernel for one CPU only (no CONFIG_SMP) has none and needs none.
    pub fn cpu_mask(&self, names: &[&str]) -> Option<Vec<CpuId>> {
        if self.is_uniprocessor() {
            return Some(vec![CpuId(0)]);
        }
        let (at, size) = names.iter().find_map(|name| self.symbol_and_size(name))?;
        let mut mask = vec![0; usize::try_from(size.min(NR_CPUS_MAX / 8)).ok()?];
        if mask.is_empty() || self.read(at, &mut mask).stopped.is_some() {
            return None;
        }
        let bits = mask.iter().flat_map(|byte| (0..8).map(move |bit| byte >> bit & 1 == 1));
        Some((0..).zip(bits).filter(|&(_, set)| set).map(|(cpu, _)| CpuId(cpu)).collect())
    }

    /// Whether the kernel was built without CONFIG_SMP: it has symbols, but no table of per-CPU offsets.
    fn is_uniprocessor(&self) -> bool {
        self.symbol("init_task").is_some() && self.symbol("__per_cpu_offset").is_none()
    }

    /// `__per_cpu_offset[cpu]`: what is added to a per-CPU symbol for `cpu`, and that CPU's kernel gs base.
    pub fn per_cpu_offset(&self, cpu: CpuId) -> Option<u64> {
        let (table, size) = self.symbol_and_size("__per_cpu_offset")?;
        let slot = u64::from(cpu.0) * 8;
        (slot < size).then(|| self.read_u64(table.wrapping_add(slot)))?
    }

    /// Address of the static per-CPU variable `name` on `cpu`.
    pub fn per_cpu(&self, name: &str, cpu: CpuId) -> Option<VirtAddr> {
        let template = self.symbol(name)?;
        if self.is_uniprocessor() {
            return Some(template);
        }
        Some(template.wrapping_add(self.per_cpu_offset(cpu)?))
    }

    /// The task that runs on `cpu`.
    pub fn current(&self, cpu: CpuId) -> Option<Task> {
        // Since Linux commit e57ef2ed97c1 ("x86: Put hot per CPU variables into a struct") (in v6.2) and until
        // a1e4cc0155ad ("x86/percpu: Move current_task to percpu hot section") (in v6.15) the pointer is
        // pcpu_hot.current_task; before and after it is a variable of its own.
        let at = match self.per_cpu("pcpu_hot", cpu) {
            Some(hot) => hot.wrapping_add(self.member("pcpu_hot", "current_task")?.offset),
            None => self.per_cpu("current_task", cpu)?,
        };
        let task = self.read_u64(at).filter(|&task| task != 0)?;
        Some(self.task(VirtAddr(task)))
    }

    /// The CPU that panicked, or crashed into kdump; `None` if none did.
    pub fn panic_cpu(&self) -> Option<CpuId> {
        // Since Linux commit 1717f2096b54 ("panic, x86: Fix re-entrance problem due to panic on NMI") (in v4.5);
        // x86's own crashing_cpu serves before. Both are -1 until it happens.
        ["panic_cpu", "crashing_cpu"].iter().find_map(|name| {
            let cpu = self.symbol(name).and_then(|at| self.read_u32(at))?;
            (u64::from(cpu) < NR_CPUS_MAX).then_some(CpuId(cpu))
        })
    }

    /// Says which CPU each register set is of; `None` where there are no symbols to tell by. Sets that are of no
    /// CPU the kernel can have are left out.
    ///
    /// Evidence, best first: the CPU's own copy of the note; its per-CPU base in one of the gs bases; the pid of the
    /// task that runs on it. What no evidence tells goes by order.
    pub fn attribute(&self, saved: &[SavedCpu]) -> Option<Vec<Attributed>> {
        let possible = self.cpu_mask(&POSSIBLE)?;
        let mut free: BTreeSet<CpuId> = possible.iter().copied().collect();
        let mut attributed = Vec::new();
        let mut unknown = Vec::new();
        let evidence = Evidence::collect(self, &possible, saved);
        for (index, one) in saved.iter().enumerate() {
            match evidence.cpu_of(one).filter(|cpu| free.remove(cpu)) {
                Some(cpu) => attributed.push(Attributed { cpu, index, certain: true }),
                None => unknown.push(index),
            }
        }
        for index in unknown {
            let same_number = possible.get(index).copied().filter(|cpu| free.contains(cpu));
            let Some(cpu) = same_number.or_else(|| free.first().copied()) else { break };
            free.remove(&cpu);
            attributed.push(Attributed { cpu, index, certain: false });
        }
        Some(attributed)
    }

    /// The descriptor of the `NT_PRSTATUS` that `cpu` left in its `crash_notes`.
    fn crash_note(&self, cpu: CpuId, len: usize) -> Option<Vec<u8>> {
        let notes = self.read_u64(self.symbol("crash_notes")?)?;
        let at = VirtAddr(notes.wrapping_add(self.per_cpu_offset(cpu)?).wrapping_add(NOTE_HEADER));
        let mut note = vec![0; len.min(4096)];
        self.read(at, &mut note).stopped.is_none().then_some(note)
    }
}

/// What memory says of the CPUs, to recognise their registers by.
struct Evidence {
    by_note: HashMap<Vec<u8>, CpuId>,
    by_gs_base: HashMap<u64, CpuId>,
    /// Tasks that run on one CPU only: all but the idle ones, whose pid is 0.
    by_pid: HashMap<u32, CpuId>,
}

impl Evidence {
    fn collect(kernel: &Kernel, possible: &[CpuId], saved: &[SavedCpu]) -> Self {
        let note_len = saved.iter().map(|one| one.prstatus.len()).max().unwrap_or(0);
        let mut evidence =
            Self { by_note: HashMap::new(), by_gs_base: HashMap::new(), by_pid: HashMap::new() };
        for &cpu in possible {
            if let Some(note) = kernel.crash_note(cpu, note_len).filter(|note| note.iter().any(|&b| b != 0)) {
                evidence.by_note.insert(note, cpu);
            }
            if let Some(base) = kernel.per_cpu_offset(cpu).filter(|&base| base != 0) {
                evidence.by_gs_base.insert(base, cpu);
            }
            let pid = kernel.current(cpu).and_then(|task| u32::try_from(task.pid?).ok());
            if let Some(pid) = pid.filter(|&pid| pid != 0) {
                evidence.by_pid.insert(pid, cpu);
            }
        }
        evidence
    }

    fn cpu_of(&self, saved: &SavedCpu) -> Option<CpuId> {
        match saved.source {
            RegisterSource::Qemu => [Reg::GsBase, Reg::KGsBase]
                .iter()
                .find_map(|&reg| self.by_gs_base.get(&saved.regs.u64(reg)?))
                .copied(),
            RegisterSource::KernelPrstatus => {
                let by_pid = || self.by_pid.get(&saved.pid?);
                self.by_note.get(&saved.prstatus).or_else(by_pid).copied()
            }
        }
    }
}

/// Fills in what a kernel-written `NT_PRSTATUS` leaves out of the two gs bases: one is the user's, the other the
/// per-CPU base, and the mode tells which was active.
pub fn derive_gs_base(regs: &mut RegisterFile, per_cpu_base: u64) {
    let missing = match regs.in_user_mode() {
        Some(true) => Reg::KGsBase,
        Some(false) => Reg::GsBase,
        None => return,
    };
    if regs.get(missing) == Saved::NotSaved {
        const FROM: &str =
            "from __per_cpu_offset of this CPU; wrong if an NMI hit it between entry and swapgs";
        regs.set(missing, Saved::Derived(per_cpu_base.into(), FROM));
    }
}

/// Marks the segment bases that older kernels took from `current->thread` instead of the CPU: right only as of
/// the last context switch.
pub fn distrust_thread_bases(kernel: &Kernel, regs: &mut RegisterFile) {
    // Since about v4.20 ELF_CORE_COPY_REGS reads the CPU, through this function.
    if kernel.symbol("x86_gsbase_read_cpu_inactive").is_some() || kernel.symbol("init_task").is_none() {
        return;
    }
    for reg in [Reg::FsBase, Reg::GsBase, Reg::KGsBase] {
        if let Saved::Known(value) = regs.get(reg) {
            regs.set(
                reg,
                Saved::Derived(value, "from the task's last context switch; may have changed since"),
            );
        }
    }
}
