//! Run queues: what runs on each CPU and what waits to.
//!
//! Knows the fair class (groups included), the real-time class, the deadline class and the stop class; tasks of sched_ext are
//! not queued here. Source: `kernel/sched/sched.h`, `kernel/sched/{fair,rt,deadline,stop_task}.c`.

use super::list::ENTRIES_MAX;
use super::memcg::path;
use super::{CpuId, Kernel, Object, ObjectError};
use crate::addr::VirtAddr;
use std::collections::HashSet;

/// Groups inside groups; a deeper nesting is damage. The kernel has no limit, systemd makes some ten levels.
const DEPTH_MAX: usize = 64;

/// A task that waits for its CPU.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Waiting {
    /// Its `struct task_struct`.
    pub task: VirtAddr,
    /// How many groups it is in.
    pub depth: usize,
    /// Asleep already, and kept in the queue until its lag is used up (`sched_delayed`, since about v6.12).
    pub delayed: bool,
}

/// A queue of a class: the CPU's own, or that of a group of tasks.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct GroupQueue {
    /// Its `struct cfs_rq`, or `struct rt_rq`.
    pub at: VirtAddr,
    /// Whether it is of the real-time class.
    pub real_time: bool,
    /// How many groups it is in; 0 is the CPU's own.
    pub depth: usize,
    /// The `struct task_group`; `None` where the kernel has no groups of this class.
    pub group: Option<VirtAddr>,
    /// The cgroup's path, or `/autogroup-N` as `/proc/PID/autogroup` has it. Untrusted text.
    pub name: Option<String>,
    /// The tasks that wait in it itself, in its order.
    pub tasks: Vec<VirtAddr>,
}

/// One CPU's run queue.
#[derive(Clone, Debug)]
pub struct RunQueue {
    /// The CPU.
    pub cpu: CpuId,
    /// Its `struct rq`.
    pub at: VirtAddr,
    /// What runs.
    pub current: Option<VirtAddr>,
    /// How many tasks are runnable, the current one included.
    pub running: Option<u64>,
    /// The scheduler's clock, in nanoseconds.
    pub clock: Option<u64>,
    /// The fair class, in the order of the tree: by virtual runtime, or by deadline on EEVDF kernels.
    pub fair: Vec<Waiting>,
    /// The real-time class with the priority of each, highest (0) first.
    pub real_time: Vec<(u64, VirtAddr)>,
    /// The deadline class, earliest first.
    pub deadline: Vec<VirtAddr>,
    /// The CPU's stopper (`migration/N`), which goes before all others, if it waits to run.
    pub stop: Option<VirtAddr>,
    /// The queues of the real-time and the fair class, each followed by those of the groups in it.
    pub groups: Vec<GroupQueue>,
    /// What was broken.
    pub problems: Vec<String>,
}

impl Kernel {
    /// The run queue of `cpu`.
    pub fn run_queue(&self, cpu: CpuId) -> Result<RunQueue, ObjectError> {
        let rq = self.runqueue(cpu)?;
        let mut queue = RunQueue {
            cpu,
            at: rq.at,
            current: rq.get("curr").ok().map(VirtAddr).filter(|task| task.0 != 0),
            running: rq.get("nr_running").ok(),
            clock: rq.get("clock").ok(),
            fair: Vec::new(),
            real_time: Vec::new(),
            deadline: Vec::new(),
            stop: None,
            groups: Vec::new(),
            problems: Vec::new(),
        };
        queue.stop = stopper(rq).filter(|&task| Some(task) != queue.current);
        let mut walk = Walk { kernel: self, queue: &mut queue, seen: HashSet::new() };
        for result in [walk.real_time(rq), walk.fair(rq), walk.deadline(rq)] {
            walk.queue.problems.extend(result.err().map(|error| error.to_string()));
        }
        Ok(queue)
    }
}

/// The stop class has one task and no queue.
fn stopper(rq: Object<'_>) -> Option<VirtAddr> {
    let task = rq.at("stop").ok()??;
    task.get("on_rq").is_ok_and(|on_rq| on_rq != 0).then_some(task.at)
}

struct Walk<'a, 'k> {
    kernel: &'k Kernel,
    queue: &'a mut RunQueue,
    /// Queues and entities that were met.
    seen: HashSet<VirtAddr>,
}

impl<'k> Walk<'_, 'k> {
    /// The tree of the CPU's fair queue and of the groups in it. What runs is in no tree.
    fn fair(&mut self, rq: Object<'k>) -> Result<(), ObjectError> {
        let mut waiting = vec![(rq.member("cfs")?, 0)];
        while let Some((queue, depth)) = waiting.pop() {
            if !self.seen.insert(queue.at) || depth > DEPTH_MAX || self.seen.len() > ENTRIES_MAX {
                self.queue.problems.push(format!("the fair queue at {} comes a second time", queue.at));
                continue;
            }
            let mut own = self.group_queue(queue, depth, false);
            let tree = self.kernel.rb_tree(queue.member("tasks_timeline")?.at);
            self.queue.problems.extend(tree.problem);
            let node = self.kernel.member("sched_entity", "run_node");
            let node = node.ok_or(ObjectError::NoType("sched_entity".into()))?.offset;
            let entities = tree.nodes.into_iter().map(|at| VirtAddr(at.0.wrapping_sub(node)));
            // The current entity of a group's queue is not in its tree, but its group is the current one's.
            let current = queue.get("curr").ok().filter(|&at| at != 0).map(VirtAddr);
            for at in current.into_iter().chain(entities) {
                let entity = self.kernel.object("sched_entity", at)?;
                match entity.at("my_q").ok().flatten() {
                    Some(group) => waiting.push((group, depth + 1)),
                    None => {
                        let task = entity.container_of("task_struct", "se")?.at;
                        let delayed = entity.get("sched_delayed").is_ok_and(|delayed| delayed != 0);
                        if Some(task) != self.queue.current {
                            self.queue.fair.push(Waiting { task, depth, delayed });
                            own.tasks.push(task);
                        }
                    }
                }
            }
            self.queue.groups.push(own);
        }
        Ok(())
    }

    /// What a queue of a class is and belongs to.
    fn group_queue(&self, queue: Object<'k>, depth: usize, real_time: bool) -> GroupQueue {
        let group = queue.at("tg").ok().flatten();
        let name = group.and_then(|group| self.group_name(group));
        GroupQueue {
            at: queue.at,
            real_time,
            depth,
            group: group.map(|group| group.at),
            name,
            tasks: Vec::new(),
        }
    }

    /// A group is a cgroup's, or made for a session (`kernel/sched/autogroup.c`); the root has both.
    fn group_name(&self, group: Object<'k>) -> Option<String> {
        if Some(group.at) == self.kernel.symbol("root_task_group") {
            return Some("/".to_owned());
        }
        match group.at("autogroup").ok().flatten() {
            Some(own) => Some(format!("/autogroup-{}", own.get("id").ok()?)),
            None => path(group.at("css.cgroup").ok()??.at("kn").ok()??),
        }
    }

    /// A list for each priority, and for groups a queue of their own.
    fn real_time(&mut self, rq: Object<'k>) -> Result<(), ObjectError> {
        let mut waiting = vec![(rq.member("rt")?, 0)];
        while let Some((queue, depth)) = waiting.pop() {
            let active = queue.member("active")?;
            if !self.seen.insert(active.at) || depth > DEPTH_MAX {
                self.queue.problems.push(format!("the real-time queue at {} comes a second time", active.at));
                continue;
            }
            let mut own = self.group_queue(queue, depth, true);
            let queues = active.member("queue")?;
            for prio in 0..queues.count()?.min(128) {
                let head = queues.index(prio)?.at;
                let list = self.kernel.list(head);
                self.queue.problems.extend(list.problem);
                for node in list.nodes {
                    let node = self.kernel.value("struct list_head", node)?;
                    let entity = node.container_of("sched_rt_entity", "run_list")?;
                    match entity.at("my_q").ok().flatten() {
                        Some(group) => waiting.push((group, depth + 1)),
                        None => {
                            let task = entity.container_of("task_struct", "rt")?.at;
                            if Some(task) != self.queue.current {
                                self.queue.real_time.push((prio, task));
                                own.tasks.push(task);
                            }
                        }
                    }
                }
            }
            self.queue.groups.push(own);
        }
        self.queue.real_time.sort_by_key(|(prio, _)| *prio);
        Ok(())
    }

    fn deadline(&mut self, rq: Object<'k>) -> Result<(), ObjectError> {
        let tree = self.kernel.rb_tree(rq.member("dl.root")?.at);
        self.queue.problems.extend(tree.problem);
        for node in tree.nodes {
            let node = self.kernel.object("rb_node", node)?;
            let entity = node.container_of("sched_dl_entity", "rb_node")?;
            // Since about v6.8 a deadline server stands in for the fair class; it is no task.
            if entity.get("dl_server").is_ok_and(|server| server != 0) {
                continue;
            }
            let task = entity.container_of("task_struct", "dl")?.at;
            if Some(task) != self.queue.current {
                self.queue.deadline.push(task);
            }
        }
        Ok(())
    }
}
