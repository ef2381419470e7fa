//! Red-black trees, walked in order.
//!
//! Source: `include/linux/rbtree_types.h`: a node is the parent and colour, the right child, the left child, and has
//! never been another; `struct rb_root_cached` begins with its `struct rb_root`.

use super::Kernel;
use super::list::{ENTRIES_MAX, Reader, Walk, word};
use crate::addr::VirtAddr;
use crate::bytes::u64_at;
use std::collections::HashSet;

const RIGHT: usize = 8;
const LEFT: usize = 16;
const NODE_LEN: usize = 24;

impl Kernel {
    /// The nodes of the `struct rb_root` (or `struct rb_root_cached`) at `root`, smallest first.
    pub fn rb_tree(&self, root: VirtAddr) -> Walk {
        walk(&|at, buf| self.fill(at, buf), root)
    }
}

fn walk(read: Reader<'_>, root: VirtAddr) -> Walk {
    let mut walk = Walk::default();
    let mut here = match word(read, root) {
        Ok(first) => first,
        Err(why) => {
            walk.problem = Some(format!("rb tree at {root}: its root cannot be read: {why}"));
            return walk;
        }
    };
    let mut seen = HashSet::new();
    // Nodes whose left subtree is done, with their right child.
    let mut under_way: Vec<(VirtAddr, u64)> = Vec::new();
    loop {
        while here != 0 {
            let at = VirtAddr(here);
            let mut node = [0; NODE_LEN];
            if !seen.insert(at) {
                walk.problem.get_or_insert(format!("rb tree at {root}: {at} comes a second time"));
                break;
            }
            if seen.len() > ENTRIES_MAX {
                walk.problem.get_or_insert(format!("rb tree at {root}: more than {ENTRIES_MAX} nodes"));
                return walk;
            }
            if let Err(why) = read(at, &mut node) {
                walk.problem
                    .get_or_insert(format!("rb tree at {root}: the node at {at} cannot be read: {why}"));
                break;
            }
            under_way.push((at, u64_at(&node, RIGHT).unwrap_or(0)));
            here = u64_at(&node, LEFT).unwrap_or(0);
        }
        let Some((at, right)) = under_way.pop() else { return walk };
        walk.nodes.push(at);
        here = right;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::PhysAddr;
    use crate::memory::{MemoryImage, PhysicalMemory};

    const ROOT: u64 = 0x1000;

    /// Memory with a root and nodes of (address, left, right).
    fn found(root: u64, nodes: &[(u64, u64, u64)]) -> Walk {
        let mut image = MemoryImage::new();
        image.write_u64(PhysAddr(ROOT), root);
        for &(at, left, right) in nodes {
            image.write_u64(PhysAddr(at), 1);
            image.write_u64(PhysAddr(at + 8), right);
            image.write_u64(PhysAddr(at + 16), left);
        }
        walk(
            &|at, buf| match image.read_phys(PhysAddr(at.0), buf).stopped {
                None => Ok(()),
                Some(why) => Err(why.to_string()),
            },
            VirtAddr(ROOT),
        )
    }

    fn nodes(walk: &Walk) -> Vec<u64> {
        walk.nodes.iter().map(|node| node.0).collect()
    }

    #[test]
    fn in_order() {
        assert_eq!(found(0, &[]), Walk::default());
        let walk = found(
            0x2000,
            &[
                (0x2000, 0x2100, 0x2200),
                (0x2100, 0, 0x2300),
                (0x2300, 0, 0),
                (0x2200, 0x2400, 0),
                (0x2400, 0, 0),
            ],
        );
        assert_eq!((nodes(&walk), walk.problem), (vec![0x2100, 0x2300, 0x2000, 0x2400, 0x2200], None));
    }

    #[test]
    fn what_is_broken_is_said_and_the_rest_walked() {
        let cycle = found(0x2000, &[(0x2000, 0x2100, 0x2200), (0x2100, 0x2000, 0), (0x2200, 0, 0)]);
        assert_eq!(nodes(&cycle), [0x2100, 0x2000, 0x2200]);
        assert!(cycle.problem.is_some_and(|problem| problem.contains("0x2000 comes a second time")));
        let unreadable = found(0x2000, &[(0x2000, 0x7_0000, 0x2200), (0x2200, 0, 0)]);
        assert_eq!(nodes(&unreadable), [0x2000, 0x2200]);
        assert!(unreadable.problem.is_some_and(|problem| problem.contains("0x70000 cannot be read")));
    }
}
