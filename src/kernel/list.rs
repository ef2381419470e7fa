//! Walks over the kernel's linked structures: every one is bounded, checked for cycles, and says where it broke.
//!
//! Source: `include/linux/list.h`.

use super::Kernel;
use crate::addr::VirtAddr;
use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};

/// No kernel list is longer: PID_MAX_LIMIT, the most there can be of what has one entry a task.
pub const ENTRIES_MAX: usize = 4 << 20;

/// Fills the buffer from memory at the address, or says why it could not. Walks take one so that they can be tested
/// on memory without a kernel around it.
pub(super) type Reader<'r> = &'r dyn Fn(VirtAddr, &mut [u8]) -> Result<(), String>;

/// The word at `at`.
pub(super) fn word(read: Reader<'_>, at: VirtAddr) -> Result<u64, String> {
    let mut bytes = [0; 8];
    read(at, &mut bytes).map(|()| u64::from_le_bytes(bytes))
}

impl Kernel {
    /// Fills the buffer from kernel memory: a [`Reader`].
    pub(super) fn fill(&self, at: VirtAddr, buf: &mut [u8]) -> Result<(), String> {
        match self.read(at, buf).stopped {
            None => Ok(()),
            Some(why) => Err(why.to_string()),
        }
    }
}

/// What a walk found, and why it ended early if it did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Walk {
    /// Addresses of the nodes (not of what they are embedded in), in order.
    pub nodes: Vec<VirtAddr>,
    /// What broke the walk: names the node.
    pub problem: Option<String>,
}

impl Kernel {
    /// The nodes of the `struct list_head` list whose head is at `head`; the head itself is not among them.
    pub fn list(&self, head: VirtAddr) -> Walk {
        self.list_within(head, ENTRIES_MAX)
    }

    /// The same of a list that may be long. Its nodes are found one after the other only: another thread meanwhile goes
    /// the other way, by `prev`, so that each of the two fetches one half of them, and finds the other in the cache.
    pub fn long_list(&self, head: VirtAddr) -> Walk {
        let is_done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut at = head;
                for _ in 0..ENTRIES_MAX {
                    // What it meets that is wrong is seen by the walk itself.
                    let Ok(before) = word(&|at, buf| self.fill(at, buf), at.wrapping_add(8)) else { break };
                    at = VirtAddr(before);
                    if at == head || is_done.load(Ordering::Relaxed) {
                        break;
                    }
                }
            });
            let walk = self.list(head);
            is_done.store(true, Ordering::Relaxed);
            walk
        })
    }

    /// The same as [`Self::list`] with a bound of its own.
    pub fn list_within(&self, head: VirtAddr, max: usize) -> Walk {
        let mut walk = Walk::default();
        let mut seen = HashSet::new();
        let read = |at| word(&|at, buf| self.fill(at, buf), at);
        // struct list_head { next, prev }: its layout has never been another.
        let mut next = match read(head) {
            Ok(first) => VirtAddr(first),
            Err(why) => {
                walk.problem = Some(format!("list at {head}: its 'next' cannot be read: {why}"));
                return walk;
            }
        };
        let mut previous = head;
        while next != head {
            let after = read(next);
            let broken = if !seen.insert(next) {
                Some(format!("list at {head}: {next} comes a second time, after {previous}"))
            } else if walk.nodes.len() >= max {
                Some(format!("list at {head}: more than {max} entries"))
            } else {
                let why = after.as_ref().err();
                why.map(|why| {
                    format!("list at {head}: {previous} leads to {next}, which cannot be read: {why}")
                })
            };
            if let (None, Ok(after)) = (&broken, after) {
                walk.nodes.push(next);
                (previous, next) = (next, VirtAddr(after));
            } else {
                walk.problem = broken;
                return walk;
            }
        }
        walk
    }
}
