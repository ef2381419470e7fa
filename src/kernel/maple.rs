//! Maple trees: the kernel's map from ranges to entries, behind the areas of an address space since v6.1.
//!
//! Knows leaf, range and allocation-range nodes, dense ones too; entries come back as stored.
//! Source: `include/linux/maple_tree.h`, `lib/maple_tree.c` (`mt_dump`), `Documentation/core-api/maple_tree.rst`.

use super::list::{ENTRIES_MAX, Reader, word};
use super::{Kernel, ObjectError};
use crate::addr::VirtAddr;
use crate::bytes::u64_at;
use std::collections::HashSet;

/// Nodes are 256 bytes and aligned to that; the bits below tell the type.
const NODE_LEN: usize = 256;
const NODE_MASK: u64 = 255;
/// `MAPLE_NODE_TYPE_SHIFT` and `MAPLE_NODE_TYPE_MASK`.
const TYPE_SHIFT: u32 = 3;
const TYPE_MASK: u64 = 15;
/// Slots of a node; a dense one has 31.
const SLOTS_MAX: u64 = 31;

/// A range and what is stored for it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Entry {
    /// First index.
    pub first: u64,
    /// Last index, which is part of the range.
    pub last: u64,
    /// The entry as stored.
    pub entry: u64,
}

/// What a walk found, and why it is incomplete if it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MapleWalk {
    /// In order. Ranges without an entry are left out.
    pub entries: Vec<Entry>,
    /// The first thing that was broken: names the node. Other branches were walked all the same.
    pub problem: Option<String>,
}

impl Kernel {
    /// All entries of the `struct maple_tree` at `root`.
    pub fn maple_tree(&self, root: VirtAddr) -> MapleWalk {
        match Layout::of(self) {
            Ok(layout) => layout.walk(&|at, buf| self.fill(at, buf), root),
            Err(error) => MapleWalk { entries: Vec::new(), problem: Some(error.to_string()) },
        }
    }
}

/// Where a type of node has what: offset of the pivots and how many, offset of the slots and how many.
#[derive(Clone, Copy, Debug)]
struct Shape {
    pivots: (u64, u64),
    slots: (u64, u64),
}

/// Where this kernel's maple trees have what.
#[derive(Clone, Copy, Debug)]
struct Layout {
    root: u64,
    range: Shape,
    allocation: Shape,
    dense: Shape,
}

impl Layout {
    fn of(kernel: &Kernel) -> Result<Self, ObjectError> {
        let array = |container: &str, path: &str| {
            let (container, path) = (container.to_owned(), path.to_owned());
            let found = kernel.member(&container, &path);
            let found = found.and_then(|member| Some((member.offset, member.size? / 8)));
            let fits = |&(offset, count): &(u64, u64)| {
                count <= SLOTS_MAX && offset.saturating_add(count * 8) <= NODE_LEN as u64
            };
            found.filter(fits).ok_or(ObjectError::NoMember { container, path })
        };
        let shape = |container| {
            let (pivots, slots) = (array(container, "pivot")?, array(container, "slot")?);
            Ok::<_, ObjectError>(Shape { pivots, slots })
        };
        let root = array("maple_tree", "ma_root")?.0;
        // No tree of the kernel's own has had dense nodes yet.
        let dense = Shape { pivots: (0, 0), slots: array("maple_node", "slot").unwrap_or((0, 0)) };
        Ok(Self { root, range: shape("maple_range_64")?, allocation: shape("maple_arange_64")?, dense })
    }

    /// How a node of this type is laid out, and whether its slots are entries. These numbers are those of
    /// `enum maple_type`.
    fn shape(&self, node: u64) -> Option<(Shape, bool)> {
        match node >> TYPE_SHIFT & TYPE_MASK {
            0 => Some((self.dense, true)),
            1 => Some((self.range, true)),
            2 => Some((self.range, false)),
            3 => Some((self.allocation, false)),
            _ => None,
        }
    }

    fn walk(&self, read: Reader<'_>, tree: VirtAddr) -> MapleWalk {
        let mut walk = MapleWalk::default();
        let at = tree.wrapping_add(self.root);
        let root = match word(read, at) {
            Ok(root) => root,
            Err(why) => {
                walk.problem = Some(format!("maple tree at {tree}: 'ma_root' cannot be read: {why}"));
                return walk;
            }
        };
        // As in an XArray, an internal entry above 4096 is a node (xa_is_node).
        if root & 3 != 2 || root <= 4096 {
            if root != 0 {
                walk.entries.push(Entry { first: 0, last: 0, entry: root });
            }
            return walk;
        }
        let mut seen = HashSet::new();
        // Nodes to visit, the next one last, with their ranges.
        let mut waiting = vec![(root, 0, u64::MAX)];
        while let Some((node, first, last)) = waiting.pop() {
            if let Err(problem) = self.visit(read, node, (first, last), &mut walk.entries, &mut waiting) {
                walk.problem.get_or_insert(problem);
            } else if !seen.insert(node & !NODE_MASK) {
                let again = VirtAddr(node & !NODE_MASK);
                walk.problem = Some(format!("maple tree at {tree}: {again} comes a second time"));
                return walk;
            }
            if walk.entries.len() > ENTRIES_MAX {
                walk.problem = Some(format!("maple tree at {tree}: more than {ENTRIES_MAX} entries"));
                return walk;
            }
        }
        walk
    }

    /// Puts a leaf's entries to `entries`, or an inner node's children to `waiting`.
    fn visit(
        &self,
        read: Reader<'_>,
        node: u64,
        (first, last): (u64, u64),
        entries: &mut Vec<Entry>,
        waiting: &mut Vec<(u64, u64, u64)>,
    ) -> Result<(), String> {
        let at = VirtAddr(node & !NODE_MASK);
        let (shape, leaf) =
            self.shape(node).ok_or_else(|| format!("maple node {node:#x} is of no known type"))?;
        let mut bytes = [0; NODE_LEN];
        read(at, &mut bytes).map_err(|why| format!("maple node at {at} cannot be read: {why}"))?;
        let stored = |(offset, count): (u64, u64), i: u64| {
            (i < count).then(|| u64_at(&bytes, (offset + i * 8) as usize)).flatten()
        };
        let mut children = Vec::new();
        let mut start = first;
        for i in 0..shape.slots.1 {
            let end = match stored(shape.pivots, i) {
                // A pivot that was never written is the end of the node.
                Some(0) if i > 0 => last,
                Some(pivot) => pivot,
                // A dense node has one index a slot.
                None if shape.pivots.1 == 0 => start,
                None => last,
            };
            if end < start || end > last {
                return Err(format!(
                    "maple node at {at}: pivot {i} ({end:#x}) lies outside the node's range"
                ));
            }
            let entry = stored(shape.slots, i).unwrap_or(0);
            match leaf {
                // Internal entries mark what is reserved or being changed.
                true if entry == 0 || entry & 3 == 2 => {}
                true => entries.push(Entry { first: start, last: end, entry }),
                false if entry & !NODE_MASK == 0 => {}
                false => children.push((entry, start, end)),
            }
            if end >= last {
                break;
            }
            start = end + 1;
        }
        waiting.extend(children.into_iter().rev());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::PhysAddr;
    use crate::memory::{MemoryImage, PhysicalMemory};

    const TREE: u64 = 0x1000;
    const LAYOUT: Layout = Layout {
        root: 8,
        range: Shape { pivots: (8, 15), slots: (128, 16) },
        allocation: Shape { pivots: (8, 9), slots: (80, 10) },
        dense: Shape { pivots: (0, 0), slots: (8, 31) },
    };
    const LEAF: u64 = 1 << 3 | 4;
    const RANGE: u64 = 2 << 3 | 4;
    const ALLOCATION: u64 = 3 << 3 | 4;

    /// Memory with a root and nodes of (address, offset of the slots, pivots, slots).
    fn found(root: u64, nodes: &[(u64, u64, &[u64], &[u64])]) -> MapleWalk {
        let mut image = MemoryImage::new();
        image.write_u64(PhysAddr(TREE + 8), root);
        for (at, slots_at, pivots, slots) in nodes {
            image.write(PhysAddr(*at), &[0; NODE_LEN]);
            for (i, pivot) in (0..).zip(*pivots) {
                image.write_u64(PhysAddr(at + 8 + i * 8), *pivot);
            }
            for (i, slot) in (0..).zip(*slots) {
                image.write_u64(PhysAddr(at + slots_at + i * 8), *slot);
            }
        }
        LAYOUT.walk(
            &|at, buf| match image.read_phys(PhysAddr(at.0), buf).stopped {
                None => Ok(()),
                Some(why) => Err(why.to_string()),
            },
            VirtAddr(TREE),
        )
    }

    fn entry(first: u64, last: u64, entry: u64) -> Entry {
        Entry { first, last, entry }
    }

    #[test]
    fn empty_and_single() {
        assert_eq!(found(0, &[]), MapleWalk::default());
        assert_eq!(found(0x8000, &[]).entries, [entry(0, 0, 0x8000)]);
    }

    #[test]
    fn one_leaf_with_holes() {
        let walk = found(
            0x2000 | LEAF | 2,
            &[(0x2000, 128, &[0xfff, 0x1fff, 0x2fff, u64::MAX], &[0, 0x8000, 0x8100, 0, 0x9999])],
        );
        assert_eq!(walk.problem, None);
        assert_eq!(walk.entries, [entry(0x1000, 0x1fff, 0x8000), entry(0x2000, 0x2fff, 0x8100)]);
    }

    #[test]
    fn levels_and_full_leaves() {
        // A leaf with all 16 slots: the last one's end is the node's.
        let full: Vec<u64> = (0..15).map(|i| 0x1_0000 + i * 16 + 15).collect();
        let entries: Vec<u64> = (0..16).map(|i| 0x8000 + i * 8).collect();
        let walk = found(
            0x2000 | ALLOCATION | 2,
            &[
                (0x2000, 80, &[0xffff, 0x1_ffff, u64::MAX], &[0x3000 | LEAF, 0x4000 | LEAF, 0x5000 | RANGE]),
                (0x3000, 128, &[0xf, 0], &[0x9000, 0x9100]),
                (0x4000, 128, &full, &entries),
                (0x5000, 128, &[0x2_ffff, u64::MAX], &[0x6000 | LEAF, 0]),
                (0x6000, 128, &[0x2_ffff], &[0xa000]),
            ],
        );
        assert_eq!(walk.problem, None);
        assert_eq!(walk.entries.len(), 2 + 16 + 1);
        assert_eq!(walk.entries[..2], [entry(0, 0xf, 0x9000), entry(0x10, 0xffff, 0x9100)]);
        assert_eq!(walk.entries[2], entry(0x1_0000, 0x1_000f, 0x8000));
        assert_eq!(walk.entries[17], entry(0x1_00f0, 0x1_ffff, 0x8078));
        assert_eq!(walk.entries[18], entry(0x2_0000, 0x2_ffff, 0xa000));
    }

    #[test]
    fn broken_trees_are_said() {
        let says = |walk: MapleWalk, what: &str| {
            assert!(walk.problem.as_ref().is_some_and(|problem| problem.contains(what)), "{walk:?}");
            walk.entries
        };
        let cycle = found(0x2000 | RANGE | 2, &[(0x2000, 128, &[0xff, u64::MAX], &[0x2000 | RANGE, 0])]);
        says(cycle, "0x2000 comes a second time");
        let absent = found(
            0x2000 | RANGE | 2,
            &[
                (0x2000, 128, &[0xff, u64::MAX], &[0x7_0000 | LEAF, 0x3000 | LEAF]),
                (0x3000, 128, &[u64::MAX], &[0x8000]),
            ],
        );
        assert_eq!(says(absent, "0x70000 cannot be read"), [entry(0x100, u64::MAX, 0x8000)]);
        says(found(0x2000 | LEAF | 2, &[(0x2000, 128, &[0xff, 0x7f], &[8, 8])]), "outside the node's range");
        says(found(0x2000 | 9 << 3 | 2, &[]), "no known type");
    }
}
