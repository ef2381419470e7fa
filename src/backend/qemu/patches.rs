//! What breakpoints put into the guest's memory, so that readers see what was there.
//!
//! KVM's software breakpoints are instructions that QEMU writes; TCG's change nothing. Source: QEMU
//! `target/i386/kvm/kvm.c` (`kvm_arch_insert_sw_breakpoint`).

use crate::addr::{PhysAddr, VirtAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{PoisonError, RwLock};

/// `int3`.
pub(super) const INT3: u8 = 0xcc;

/// The bytes that stand where an `int3` is.
#[derive(Default)]
pub(super) struct Patches {
    list: RwLock<Vec<(VirtAddr, PhysAddr, u8)>>,
    /// How many there are: most readers need not look further.
    count: AtomicUsize,
}

impl Patches {
    /// At `at`, which is `phys`, there was `byte` before a breakpoint was put there.
    pub(super) fn add(&self, at: VirtAddr, phys: PhysAddr, byte: u8) {
        self.change(|list| list.push((at, phys, byte)));
    }

    /// The breakpoint is gone.
    pub(super) fn remove(&self, at: VirtAddr) {
        self.change(|list| list.retain(|(put, ..)| *put != at));
    }

    /// All are gone.
    pub(super) fn clear(&self) {
        self.change(Vec::clear);
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }

    /// Puts back into `bytes`, read at `at`, what was there before.
    pub(super) fn undo(&self, at: PhysAddr, bytes: &mut [u8]) {
        if self.count.load(Ordering::Relaxed) == 0 {
            return;
        }
        for (_, phys, before) in self.list.read().unwrap_or_else(PoisonError::into_inner).iter() {
            let index = phys.offset_from(at).and_then(|index| usize::try_from(index).ok());
            if let Some(byte) = index.and_then(|index| bytes.get_mut(index))
                && *byte == INT3
            {
                *byte = *before;
            }
        }
    }

    fn change(&self, change: impl FnOnce(&mut Vec<(VirtAddr, PhysAddr, u8)>)) {
        let mut list = self.list.write().unwrap_or_else(PoisonError::into_inner);
        change(&mut list);
        self.count.store(list.len(), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readers_see_what_was_there() {
        let patches = Patches::default();
        patches.add(VirtAddr(1), PhysAddr(0x1002), 0x55);
        patches.add(VirtAddr(2), PhysAddr(0x2000), 0x66);
        let mut bytes = [0xcc, 1, 0xcc, 3];
        patches.undo(PhysAddr(0x1000), &mut bytes);
        assert_eq!(bytes, [0xcc, 1, 0x55, 3]);
        // The guest has written over it since.
        let mut bytes = [0x90];
        patches.undo(PhysAddr(0x1002), &mut bytes);
        assert_eq!(bytes, [0x90]);
        patches.remove(VirtAddr(1));
        let mut bytes = [0xcc; 4];
        patches.undo(PhysAddr(0x1000), &mut bytes);
        assert_eq!(bytes, [0xcc; 4]);
    }
}
