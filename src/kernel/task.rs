//! Tasks: what runs on a CPU. Source: `include/linux/sched.h` (`struct task_struct`), `mm_types.h`.

use super::Kernel;
use crate::addr::VirtAddr;
use crate::arch::x86_64::AddressSpace;

/// `TASK_COMM_LEN`, the size of `comm` on all kernels; used only where the types do not tell.
const TASK_COMM_LEN: usize = 16;

/// What identifies a task.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Task {
    /// Address of its `struct task_struct`.
    pub at: VirtAddr,
    /// `pid`: the thread's own number; 0 for the idle tasks.
    pub pid: Option<i32>,
    /// `comm`: untrusted bytes, shown lossily.
    pub comm: Option<String>,
    /// `mm`: its user address space; `Some(None)` for a kernel thread.
    pub mm: Option<Option<VirtAddr>>,
}

impl Kernel {
    /// Reads the task at `at`; a member that is missing or unreadable costs only itself.
    pub fn task(&self, at: VirtAddr) -> Task {
        let member = |name| Some(at.wrapping_add(self.member("task_struct", name)?.offset));
        let comm = member("comm").and_then(|at| self.read_array::<TASK_COMM_LEN>(at)).map(|field| {
            let text = field.split(|&b| b == 0).next().unwrap_or_default();
            String::from_utf8_lossy(text).into_owned()
        });
        let pid = member("pid").and_then(|at| self.read_u32(at)).map(|pid| pid as i32);
        let mm = member("mm").and_then(|at| self.read_u64(at)).map(|mm| (mm != 0).then_some(VirtAddr(mm)));
        Task { at, pid, comm, mm }
    }

    /// The user address space of `mm`: its `pgd` is a pointer into the direct map.
    pub fn user_space(&self, mm: VirtAddr) -> Option<AddressSpace> {
        let pgd = self.read_u64(mm.wrapping_add(self.member("mm_struct", "pgd")?.offset))?;
        let root = self.found.space.translate(&*self.backend, VirtAddr(pgd)).ok()?.phys;
        Some(AddressSpace { root, ..self.found.space })
    }
}
