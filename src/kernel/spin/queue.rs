//! Queued spinlocks: the word taken apart, and the CPUs in the queue behind it.
//!
//! Each CPU has four queue nodes, for a task, a softirq, a hard interrupt and an NMI; the word has the last in the
//! queue, and nodes lead forwards. Source: `kernel/locking/{qspinlock.c,mcs_spinlock.h}`,
//! `include/asm-generic/qspinlock_types.h`.

use crate::addr::VirtAddr;
use crate::kernel::{CpuId, Kernel};
use std::collections::HashMap;

/// `MAX_NODES`
const NODES: u64 = 4;
/// `_Q_PENDING_OFFSET`; with fewer than 16 Ki CPUs, which is all x86-64 kernels, a byte of its own.
const PENDING_SHIFT: u32 = 8;
/// `_Q_TAIL_IDX_OFFSET` and `_Q_TAIL_CPU_OFFSET`
const INDEX_SHIFT: u32 = 16;
const CPU_SHIFT: u32 = 18;

/// One place in the queue.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct Waiter {
    /// The CPU.
    pub cpu: CpuId,
    /// Which of its nodes: 0 is the first lock that it waits for, 1 one in an interrupt on top of that.
    pub index: u32,
    /// `struct mcs_spinlock`
    pub node: VirtAddr,
}

/// A `struct qspinlock`, taken apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QueuedSpinLock {
    /// Its word.
    pub value: u32,
    /// Somebody holds it.
    pub is_locked: bool,
    /// Somebody waits in front of the queue.
    pub is_pending: bool,
    /// The last in the queue.
    pub tail: Option<(CpuId, u32)>,
    /// Those in the queue, first to last.
    pub waiters: Vec<Waiter>,
    /// Whether the queue could be followed to its head.
    pub is_complete: bool,
}

impl Kernel {
    /// The queued spinlock whose word is `value`.
    pub fn queued_spin_lock(&self, value: u32) -> QueuedSpinLock {
        let cpu = value >> CPU_SHIFT;
        let tail = cpu.checked_sub(1).map(|cpu| (CpuId(cpu), value >> INDEX_SHIFT & 3));
        let mut lock = QueuedSpinLock {
            value,
            is_locked: value & 0xff != 0,
            is_pending: value >> PENDING_SHIFT & 0xff != 0,
            tail,
            waiters: Vec::new(),
            is_complete: tail.is_none(),
        };
        let Some((cpu, index)) = tail else { return lock };
        let nodes = self.queue_nodes();
        let Some(last) = nodes.iter().find(|(one, _)| (one.cpu, one.index) == (cpu, index)) else {
            return lock;
        };
        let before: HashMap<VirtAddr, &(Waiter, u64)> =
            nodes.iter().filter(|(_, next)| *next != 0).map(|one| (VirtAddr(one.1), one)).collect();
        let mut here = last;
        lock.waiters.push(here.0);
        while let Some(&previous) = before.get(&here.0.node) {
            if lock.waiters.contains(&previous.0) {
                return lock;
            }
            lock.waiters.push(previous.0);
            here = previous;
        }
        lock.waiters.reverse();
        // The head of the queue has been told so, or found nobody before it: then its node is as it was made.
        lock.is_complete = true;
        lock
    }

    /// Nodes in use, with where each leads.
    fn queue_nodes(&self) -> Vec<(Waiter, u64)> {
        // Since Linux commit 0fa809ca7f81 ("locking/pvqspinlock: Extend node size when pvqspinlock is configured")
        // (in v4.20) a node may be longer than the mcs_spinlock in it; before, it was mcs_nodes.
        let Some(name) = ["qnodes", "mcs_nodes"].into_iter().find(|name| self.symbol(name).is_some()) else {
            return Vec::new();
        };
        let stride = ["qnode", "mcs_spinlock"]
            .iter()
            .find_map(|ty| self.object(ty, VirtAddr(0)).and_then(|node| node.size()).ok())
            .or_else(|| self.symbol_and_size(name).map(|(_, size)| size / NODES).filter(|&size| size != 0));
        let Some(stride) = stride else { return Vec::new() };
        let offset = |member, usual| self.member("mcs_spinlock", member).map_or(usual, |found| found.offset);
        let (next, count) = (offset("next", 0), offset("count", 12));
        let mut all = Vec::new();
        for cpu in self.possible_cpus() {
            let Some(first) = self.per_cpu(name, cpu) else { continue };
            // The count is in the first node.
            let used = self.read_u32(first.wrapping_add(count)).unwrap_or(0);
            for index in 0..NODES.min(used.into()) {
                let node = first.wrapping_add(index * stride);
                if let Some(next) = self.read_u64(node.wrapping_add(next)) {
                    all.push((Waiter { cpu, index: index as u32, node }, next));
                }
            }
        }
        all
    }
}
