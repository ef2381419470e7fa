//! Tasks: what runs on a CPU. Source: `include/linux/sched.h` (`struct task_struct`), `mm_types.h`.

use super::cpus::POSSIBLE;
use super::list::ENTRIES_MAX;
use super::{Kernel, Object, ObjectError};
use crate::addr::VirtAddr;
use crate::arch::x86_64::AddressSpace;
use crate::parallel;
use std::sync::atomic::{AtomicUsize, Ordering};

/// `TASK_COMM_LEN`, the size of `comm` on all kernels; used only where the types do not tell.
const TASK_COMM_LEN: usize = 16;
/// Lists of threads that are worth a thread of ours; few have more than one entry.
const LISTS: usize = 256;

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

/// All tasks that the kernel's lists lead to.
#[derive(Default)]
pub struct Tasks<'k> {
    /// Each a `struct task_struct`: the idle tasks by CPU, then every process's leader followed by its threads.
    pub tasks: Vec<Object<'k>>,
    /// Lists that are broken.
    pub problems: Vec<String>,
}

impl Kernel {
    /// Every task: idle ones, processes and threads.
    pub fn tasks(&self) -> Result<Tasks<'_>, ObjectError> {
        let mut all = Tasks::default();
        // The boot CPU's idle task is init_task; the others' are in no list, only in their runqueue.
        let init_task = self.global("task_struct", "init_task")?;
        all.tasks.push(init_task);
        for cpu in self.cpu_mask(&POSSIBLE).unwrap_or_default() {
            let idle = self.runqueue(cpu).and_then(|rq| rq.at("idle")).ok().flatten();
            all.tasks.extend(idle.filter(|idle| idle.at != init_task.at));
        }
        let offset = |path| Ok::<_, ObjectError>(init_task.member(path)?.at.0.wrapping_sub(init_task.at.0));
        let (in_tasks, in_threads) = (offset("tasks")?, offset("thread_node")?);
        let task_around = |node: VirtAddr, offset: u64| {
            let mut task = init_task;
            task.at = node.wrapping_add(offset.wrapping_neg());
            task
        };
        let processes = self.long_list(init_task.at.wrapping_add(in_tasks));
        all.problems.extend(processes.problem);
        let leaders: Vec<_> = processes.nodes.iter().map(|node| task_around(*node, in_tasks)).collect();
        // A list is read node by node; the lists of many processes are read at the same time.
        let left = AtomicUsize::new(ENTRIES_MAX);
        let threads_of = |leader: &Object<'_>| {
            let Some(signal) = leader.at("signal")? else { return Ok::<_, ObjectError>(None) };
            let head = signal.member("thread_head")?.at;
            let most = left.load(Ordering::Relaxed);
            if most == 0 {
                return Ok(None);
            }
            let threads = self.list_within(head, most);
            let seen = threads.nodes.len();
            let _ = left
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| Some(left.saturating_sub(seen)));
            Ok(Some(threads))
        };
        let lists = parallel::map(&leaders, LISTS, threads_of);
        for (leader, threads) in leaders.into_iter().zip(lists) {
            all.tasks.push(leader);
            let Some(left) = ENTRIES_MAX.checked_sub(all.tasks.len()).filter(|&left| left > 0) else {
                all.problems.push(format!("more than {ENTRIES_MAX} tasks"));
                break;
            };
            match threads {
                Ok(Some(threads)) => {
                    all.problems.extend(threads.problem);
                    let threads = threads.nodes.into_iter().map(|node| task_around(node, in_threads));
                    all.tasks.extend(threads.filter(|thread| thread.at != leader.at).take(left));
                }
                Ok(None) => {}
                Err(error) => all.problems.push(format!("threads of the task at {}: {error}", leader.at)),
            }
        }
        Ok(all)
    }

    /// The task whose `pid` (a thread's own number) this is.
    pub fn find_task(&self, pid: i32) -> Result<Option<Object<'_>>, ObjectError> {
        let all = self.tasks()?;
        Ok(all.tasks.into_iter().find(|task| task.get("pid").is_ok_and(|found| found as i32 == pid)))
    }

    /// `struct rq` of `cpu`.
    pub fn runqueue(&self, cpu: super::CpuId) -> Result<Object<'_>, ObjectError> {
        let no_symbol = || ObjectError::NoSymbol("runqueues".into());
        self.object("rq", self.per_cpu("runqueues", cpu).ok_or_else(no_symbol)?)
    }

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

    /// The user address space of `mm`: its `pgd` is a pointer into the direct map. The error says why it is unknown.
    pub fn user_space(&self, mm: VirtAddr) -> Result<AddressSpace, String> {
        let lost = |why: String| format!("the page tables of mm {mm} cannot be found: {why}");
        let member =
            self.member("mm_struct", "pgd").ok_or_else(|| lost("no type tells mm_struct.pgd".to_owned()))?;
        let mut pgd = [0; 8];
        if let Some(why) = self.read(mm.wrapping_add(member.offset), &mut pgd).stopped {
            return Err(lost(format!("mm_struct.pgd: {why}")));
        }
        let root = self.found.space.translate(&*self.backend, VirtAddr(u64::from_le_bytes(pgd)));
        root.map(|root| AddressSpace { root: root.phys, ..self.found.space })
            .map_err(|why| lost(why.to_string()))
    }
}
