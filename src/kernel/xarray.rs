//! XArrays: the kernel's map from an index to an entry, behind the page cache, IDRs, IRQs and more.
//!
//! Knows `struct xarray` since v4.20, which is `struct radix_tree_root` and `struct idr`'s tree as well; not the
//! radix tree before it, whose tags differ. Entries come back as they are stored: who asks knows whether they are
//! pointers, tagged pointers or values. Source: `include/linux/xarray.h`, `lib/xarray.c`.

use super::list::Reader;
use super::{Kernel, ObjectError};
use crate::addr::VirtAddr;
use crate::bytes::{array_at, u64_at};
use std::collections::HashSet;

/// Entries of one tree: 64 GiB of page cache in base pages. More is damage, or more than a list should hold.
pub const ENTRIES_MAX: usize = 16 << 20;
/// `XA_CHUNK_SIZE` is 64, or 16 with CONFIG_BASE_SMALL.
const CHUNK_MAX: u64 = 64;
/// Bytes of a node up to the end of its slots; it has been 576 in all.
const NODE_MAX: u64 = 2048;
/// Internal entries above this are nodes (`xa_is_node`).
const NODE_MIN: u64 = 4096;

/// One entry of an XArray.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Entry {
    /// The first index it is stored at.
    pub index: u64,
    /// How many indexes it covers: 1, or a power of two for a multi-index entry (a large folio).
    pub span: u64,
    /// The entry as stored: a pointer, a tagged pointer, or a value in the upper 63 bits with bit 0 set.
    pub entry: u64,
}

impl Entry {
    /// The number in a value entry (`xa_to_value`): a shadow of an evicted page, a swap entry.
    pub fn value(&self) -> Option<u64> {
        value(self.entry)
    }

    /// The address in an entry that is a pointer without a tag.
    pub fn pointer(&self) -> Option<VirtAddr> {
        (self.entry & 3 == 0).then_some(VirtAddr(self.entry))
    }
}

/// The number in a value entry.
pub fn value(entry: u64) -> Option<u64> {
    (entry & 1 == 1).then_some(entry >> 1)
}

/// What a walk found, and why it is incomplete if it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct XarrayWalk {
    /// By index. Empty, reserved (`XA_ZERO_ENTRY`) and retry entries are left out.
    pub entries: Vec<Entry>,
    /// The first thing that was broken: names the node. Other branches were walked all the same.
    pub problem: Option<String>,
}

impl Kernel {
    /// All entries of the `struct xarray` (or `struct radix_tree_root`) at `root`.
    pub fn xarray(&self, root: VirtAddr) -> XarrayWalk {
        match Layout::of(self) {
            Ok(layout) => layout.walk(&|at, buf| self.fill(at, buf), root),
            Err(error) => XarrayWalk { entries: Vec::new(), problem: Some(error.to_string()) },
        }
    }

    /// The entry at `index` of the `struct xarray` at `root`, as [`Entry::entry`]; `None` if there is none. The
    /// error says where the tree is broken.
    pub fn xarray_load(&self, root: VirtAddr, index: u64) -> Result<Option<u64>, String> {
        let layout = Layout::of(self).map_err(|error| error.to_string())?;
        layout.load(&|at, buf| self.fill(at, buf), root, index)
    }
}

/// Where this kernel's XArrays have what.
#[derive(Clone, Copy, Debug)]
struct Layout {
    head: u64,
    shift: u64,
    slots: u64,
    /// Slots in a node, a power of two.
    chunk: u64,
}

/// A node, read once.
struct Node {
    at: VirtAddr,
    shift: u32,
    slots: Vec<u64>,
}

/// What a slot holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Slot {
    Empty,
    Entry(u64),
    Node(VirtAddr),
    /// The entry is that of another slot of the same node.
    Sibling(usize),
}

fn slot(word: u64) -> Slot {
    match word {
        0 => Slot::Empty,
        // xa_is_internal: siblings are numbers of slots, 256 is retry and 257 zero, larger ones are nodes.
        _ if word & 3 == 2 && word > NODE_MIN && word < NODE_MIN.wrapping_neg() => {
            Slot::Node(VirtAddr(word - 2))
        }
        _ if word & 3 == 2 && word >> 2 < CHUNK_MAX => Slot::Sibling((word >> 2) as usize),
        _ if word & 3 == 2 => Slot::Empty,
        _ => Slot::Entry(word),
    }
}

impl Layout {
    fn of(kernel: &Kernel) -> Result<Self, ObjectError> {
        let types = kernel.image_types()?;
        let member = |container: &str, path: &str| {
            let id = types.composite(container).ok_or_else(|| ObjectError::NoType(container.into()))?;
            types
                .member(id, path)
                .ok_or_else(|| ObjectError::NoMember { container: container.into(), path: path.into() })
        };
        let slots = member("xa_node", "slots")?;
        let wrong = || ObjectError::NotA { what: "xa_node.slots".into(), wanted: "an array of 16 or 64" };
        let chunk = slots.size.map(|size| size / 8);
        let chunk = chunk.filter(|n| n.is_power_of_two() && (2..=CHUNK_MAX).contains(n)).ok_or_else(wrong)?;
        let shift = member("xa_node", "shift")?.offset;
        if slots.offset + chunk * 8 > NODE_MAX || shift >= NODE_MAX {
            return Err(wrong());
        }
        Ok(Self { head: member("xarray", "xa_head")?.offset, shift, slots: slots.offset, chunk })
    }

    fn head(&self, read: Reader<'_>, root: VirtAddr) -> Result<u64, String> {
        let mut word = [0; 8];
        let at = root.wrapping_add(self.head);
        match read(at, &mut word) {
            Ok(()) => Ok(u64::from_le_bytes(word)),
            Err(why) => Err(format!("xarray at {root}: 'xa_head' cannot be read: {why}")),
        }
    }

    /// The node at `at`; its shift must be `below` the parent's by one level.
    fn node(&self, read: Reader<'_>, at: VirtAddr, below: Option<u32>) -> Result<Node, String> {
        let len = (self.slots + self.chunk * 8).max(self.shift + 1);
        let mut bytes = vec![0; len as usize];
        read(at, &mut bytes).map_err(|why| format!("xarray node at {at} cannot be read: {why}"))?;
        let shift = array_at::<1>(&bytes, self.shift as usize).map_or(0, |[shift]| u32::from(shift));
        let bits = self.chunk.trailing_zeros();
        let fits = match below {
            Some(parent) => Some(shift) == parent.checked_sub(bits),
            None => shift < 64 && shift.is_multiple_of(bits),
        };
        if !fits {
            return Err(format!("xarray node at {at} has shift {shift}, which is not that of its level"));
        }
        let word = |i: u64| u64_at(&bytes, (self.slots + i * 8) as usize).unwrap_or(0);
        Ok(Node { at, shift, slots: (0..self.chunk).map(word).collect() })
    }

    fn load(&self, read: Reader<'_>, root: VirtAddr, index: u64) -> Result<Option<u64>, String> {
        let mut word = self.head(read, root)?;
        let mut above = None;
        loop {
            let node = match slot(word) {
                Slot::Node(at) => self.node(read, at, above)?,
                Slot::Entry(entry) => return Ok((above.is_some() || index == 0).then_some(entry)),
                Slot::Empty => return Ok(None),
                Slot::Sibling(_) => return Err(format!("xarray at {root}: {word:#x} is of no slot")),
            };
            let offset = index.checked_shr(node.shift).unwrap_or(0);
            if above.is_none() && offset >= self.chunk {
                return Ok(None);
            }
            let stored = |i: usize| node.slots.get(i).copied().unwrap_or(0);
            word = stored((offset % self.chunk) as usize);
            if let Slot::Sibling(of) = slot(word) {
                word = stored(of);
            }
            above = Some(node.shift);
        }
    }

    fn walk(&self, read: Reader<'_>, root: VirtAddr) -> XarrayWalk {
        let mut walk = XarrayWalk::default();
        let head = match self.head(read, root) {
            Ok(head) => head,
            Err(problem) => return XarrayWalk { problem: Some(problem), ..walk },
        };
        let first = match slot(head) {
            Slot::Node(at) => self.node(read, at, None),
            Slot::Entry(entry) => {
                walk.entries.push(Entry { index: 0, span: 1, entry });
                return walk;
            }
            Slot::Empty | Slot::Sibling(_) => return walk,
        };
        let mut seen = HashSet::new();
        // Nodes under way, each with the index of its first slot and the slot to go on at.
        let mut under_way: Vec<(Node, u64, usize)> = Vec::new();
        match first {
            Ok(node) => under_way.push((node, 0, 0)),
            Err(problem) => walk.problem = Some(problem),
        }
        while let Some((node, base, next)) = under_way.last_mut() {
            let here = *next;
            let Some(&word) = node.slots.get(here) else {
                under_way.pop();
                continue;
            };
            *next += 1;
            let index = base.wrapping_add((here as u64).checked_shl(node.shift).unwrap_or(0));
            match slot(word) {
                Slot::Empty | Slot::Sibling(_) => {}
                Slot::Entry(entry) => {
                    if walk.entries.len() >= ENTRIES_MAX {
                        let more = format!("xarray at {root}: more than {ENTRIES_MAX} entries");
                        walk.problem.get_or_insert(more);
                        return walk;
                    }
                    let siblings = node.slots.iter().skip(here + 1);
                    let siblings = siblings.take_while(|&&word| slot(word) == Slot::Sibling(here)).count();
                    let span = (1 + siblings as u64).checked_shl(node.shift).unwrap_or(u64::MAX);
                    walk.entries.push(Entry { index, span, entry });
                }
                // Levels only go down, so there is no cycle; but two slots may lead to one node.
                Slot::Node(at) if !seen.insert(at) => {
                    let again = format!("xarray node at {at} comes a second time, in {}", node.at);
                    walk.problem.get_or_insert(again);
                }
                Slot::Node(at) => match self.node(read, at, Some(node.shift)) {
                    Ok(child) => under_way.push((child, index, 0)),
                    Err(problem) => {
                        walk.problem.get_or_insert(problem);
                    }
                },
            }
        }
        walk
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::PhysAddr;
    use crate::memory::{MemoryImage, PhysicalMemory};

    const ROOT: u64 = 0x1000;
    const LAYOUT: Layout = Layout { head: 8, shift: 0, slots: 40, chunk: 64 };

    /// Memory with a head and nodes of (address, shift, slots).
    /// A node: where it is, its shift, and its slots that are not empty.
    type Node<'a> = (u64, u8, &'a [(u64, u64)]);

    fn memory(head: u64, nodes: &[Node<'_>]) -> MemoryImage {
        let mut image = MemoryImage::new();
        image.write_u64(PhysAddr(ROOT + 8), head);
        for (at, shift, slots) in nodes {
            image.write(PhysAddr(*at), &[0; 576]);
            image.write(PhysAddr(*at), &[*shift]);
            for (slot, word) in *slots {
                image.write_u64(PhysAddr(at + 40 + slot * 8), *word);
            }
        }
        image
    }

    fn walk(image: &MemoryImage) -> XarrayWalk {
        LAYOUT.walk(
            &|at, buf| match image.read_phys(PhysAddr(at.0), buf).stopped {
                None => Ok(()),
                Some(why) => Err(why.to_string()),
            },
            VirtAddr(ROOT),
        )
    }

    fn load(image: &MemoryImage, index: u64) -> Result<Option<u64>, String> {
        LAYOUT.load(
            &|at, buf| match image.read_phys(PhysAddr(at.0), buf).stopped {
                None => Ok(()),
                Some(why) => Err(why.to_string()),
            },
            VirtAddr(ROOT),
            index,
        )
    }

    fn entry(index: u64, span: u64, entry: u64) -> Entry {
        Entry { index, span, entry }
    }

    const fn internal(value: u64) -> u64 {
        value << 2 | 2
    }

    #[test]
    fn an_entry_in_the_head_is_that_of_index_zero() {
        let image = memory(0x5000, &[]);
        assert_eq!(walk(&image).entries, [entry(0, 1, 0x5000)]);
        assert_eq!((load(&image, 0), load(&image, 1)), (Ok(Some(0x5000)), Ok(None)));
        assert_eq!(walk(&memory(0, &[])), XarrayWalk::default());
    }

    #[test]
    fn levels_siblings_values_and_reserved_entries() {
        let image = memory(
            0x2002,
            &[
                (0x2000, 6, &[(0, 0x3002), (4, 0x8000), (5, internal(4)), (7, 0x4002)]),
                (0x3000, 0, &[(3, 0x9000), (4, 0x15), (5, internal(256)), (6, internal(257)), (63, 0xa000)]),
                (0x4000, 0, &[(8, 0xb000), (9, internal(8)), (10, internal(8)), (11, internal(8))]),
            ],
        );
        let found = walk(&image);
        assert_eq!(found.problem, None);
        assert_eq!(
            found.entries,
            [
                entry(3, 1, 0x9000),
                entry(4, 1, 0x15),
                entry(63, 1, 0xa000),
                entry(256, 128, 0x8000),
                entry(7 * 64 + 8, 4, 0xb000),
            ]
        );
        assert_eq!((found.entries[1].value(), found.entries[1].pointer()), (Some(10), None));
        // Each index that an entry covers leads to it; those around it lead nowhere.
        for one in &found.entries {
            for index in one.index..one.index + one.span {
                assert_eq!(load(&image, index), Ok(Some(one.entry)), "{index}");
            }
        }
        for index in [0, 2, 5, 6, 62, 64, 255, 384, 455, 460, 4096, 1 << 40, u64::MAX] {
            assert_eq!(load(&image, index), Ok(None), "{index}");
        }
    }

    #[test]
    fn broken_trees_are_said_and_the_rest_is_walked() {
        // A node of its own level below itself, a node twice, one that cannot be read.
        let image = memory(
            0x2002,
            &[
                (0x2000, 6, &[(0, 0x2002), (1, 0x3002), (2, 0x3002), (3, 0x7_0002)]),
                (0x3000, 0, &[(0, 0x9000)]),
            ],
        );
        let found = walk(&image);
        assert_eq!(found.entries, [entry(64, 1, 0x9000)]);
        assert!(found.problem.is_some_and(|problem| problem.contains("0x2000 has shift 6")));
        assert!(load(&image, 0).is_err());
        let twice = memory(0x2002, &[(0x2000, 6, &[(1, 0x3002), (2, 0x3002)]), (0x3000, 0, &[(0, 0x9000)])]);
        assert!(walk(&twice).problem.is_some_and(|problem| problem.contains("second time")));
        let absent = memory(0x7_0002, &[]);
        assert!(walk(&absent).problem.is_some_and(|problem| problem.contains("0x70000 cannot be read")));
        assert!(load(&absent, 0).is_err());
        // A shift that no tree has.
        assert!(walk(&memory(0x2002, &[(0x2000, 200, &[])])).problem.is_some());
    }
}
