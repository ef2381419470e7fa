//! What a lock's word says, lock by lock: who holds it where it is recorded.
//!
//! Source: `include/linux/{mutex,rwsem,osq_lock,spinlock_types_raw,smp_types}.h`, `include/asm-generic/qrwlock.h`.

use super::{Kind, Owner, Place, Spin};
use crate::addr::VirtAddr;
use crate::arch::x86_64::loops::{Loop, Use};
use crate::kernel::{CpuId, Kernel, Object};

/// Low bits of `mutex.owner` and `rw_semaphore.owner` that are flags.
const OWNER_FLAGS: u64 = 7;
/// `RWSEM_READER_OWNED`: the task is one that read, not the one that holds it.
const READER_OWNED: u64 = 1;
/// `SPINLOCK_MAGIC`, which debug kernels keep in each.
const SPINLOCK_MAGIC: u64 = 0xdead_4ead;
/// `_QW_LOCKED` and `_QR_BIAS`
const WRITER: u64 = 0xff;
const READER_SHIFT: u32 = 9;

impl Place<'_> {
    /// `queued_spin_lock_slowpath(lock, val)`: waits on the lock's word, or on its own node in the queue.
    pub(super) fn queued_spin_lock(&self, spin: &mut Spin) {
        spin.kind = Kind::SpinLock;
        spin.owner =
            Some(Owner::Unknown("a spinlock does not record its owner without CONFIG_DEBUG_SPINLOCK"));
        let Some(at) = self.argument() else {
            spin.notes.push("no register is known to hold the lock's address".to_owned());
            return;
        };
        let lock = self.kernel.word(at, 4);
        if let Some(polled) = spin.word.take().filter(|polled| polled.at != at) {
            spin.kind = Kind::SpinLockQueue;
            spin.polled = Some(polled);
        }
        if let Some(value) = lock.value {
            let queue = self.kernel.queued_spin_lock(value as u32);
            if !queue.is_locked {
                spin.owner = Some(Owner::Nobody);
                spin.notes.push("the lock is free: it was released a moment ago".to_owned());
            } else if let Some(owner) = self.kernel.debug_owner(at) {
                spin.owner = Some(owner);
            }
            if !queue.is_complete {
                spin.notes.push("the queue cannot be followed to its head".to_owned());
            }
            spin.queue = Some(queue);
        }
        spin.word = Some(lock);
    }

    /// `osq_lock(lock)`: waits on its own node; the lock is a member of a mutex or rw_semaphore.
    pub(super) fn optimistic_queue(&self, spin: &mut Spin) {
        spin.kind = Kind::OptimisticQueue;
        spin.polled = spin.word.take();
        let Some(at) = self.argument() else { return };
        spin.word = Some(self.kernel.word(at, 4));
        let outer = ["mutex", "rw_semaphore"].into_iter().find_map(|ty| {
            let osq = self.kernel.object("optimistic_spin_queue", at).ok()?;
            let outer = osq.container_of(ty, "osq").ok()?;
            self.kernel.is_wait_list(outer).then_some(outer)
        });
        match outer {
            Some(outer) => {
                spin.notes.push(format!("of the {} at {}", outer.type_name(), outer.at));
                spin.owner = Some(self.kernel.owner_word(outer));
            }
            None => spin.owner = Some(Owner::Unknown("the lock around the queue is not recognised")),
        }
    }

    /// `mutex_spin_on_owner`, `rwsem_spin_on_owner` and their callers.
    pub(super) fn sleeping_lock(&self, spin: &mut Spin, found: &Loop) {
        let words = found.accesses.iter().filter(|one| one.usage == Use::Read && one.size == 8);
        let mut candidates: Vec<VirtAddr> = self.argument().into_iter().collect();
        candidates.extend(words.filter_map(|one| one.address).map(VirtAddr));
        let types = if self.named("rwsem") { ["rw_semaphore", "mutex"] } else { ["mutex", "rw_semaphore"] };
        for ty in types {
            for &at in &candidates {
                // By its address, or by that of its owner.
                let Some(owner) = self.kernel.member(ty, "owner") else { continue };
                for at in [at, VirtAddr(at.0.wrapping_sub(owner.offset))] {
                    let Ok(lock) = self.kernel.object(ty, at) else { continue };
                    let Ok(held) = lock.member("owner") else { continue };
                    if self.kernel.is_wait_list(lock) {
                        spin.kind = Kind::SleepingLock;
                        spin.word = Some(self.kernel.word(held.at, 8));
                        spin.owner = Some(self.kernel.owner_word(lock));
                        spin.notes.push(format!("of the {} at {at}", lock.type_name()));
                        return;
                    }
                }
            }
        }
    }

    /// `queued_read_lock_slowpath(lock)` and `queued_write_lock_slowpath(lock)`.
    pub(super) fn rwlock(&self, spin: &mut Spin) {
        spin.kind = Kind::RwLock;
        spin.owner = Some(Owner::Unknown("a reader-writer lock does not record its owner"));
        let word = self.argument().map(|at| self.kernel.word(at, 4)).or(spin.word.take());
        if let Some(value) = word.as_ref().and_then(|word| word.value) {
            let readers = (value as u32) >> READER_SHIFT;
            spin.notes.push(match value & WRITER {
                WRITER => "held by a writer".to_owned(),
                _ if readers > 0 => format!("held by {readers} readers, or readers on their way"),
                _ => "free: it was released a moment ago".to_owned(),
            });
            if value & WRITER != WRITER && readers == 0 {
                spin.owner = Some(Owner::Nobody);
            }
        }
        spin.word = word;
    }

    /// `csd_lock_wait`: the call is in per-CPU memory, and says which CPU is to run it.
    pub(super) fn call_function(&self, spin: &mut Spin) {
        spin.kind = Kind::CallFunction;
        let Some(word) = &spin.word else { return };
        let flags = ["node.u_flags", "flags"].into_iter().find_map(|path| {
            ["__call_single_data", "call_single_data"]
                .iter()
                .find_map(|ty| Some((*ty, self.kernel.member(ty, path)?.offset)))
        });
        let Some((ty, offset)) = flags else { return };
        let Ok(call) = self.kernel.object(ty, VirtAddr(word.at.0.wrapping_sub(offset))) else { return };
        if let Ok(function) = call.get("func")
            && let Some(symbol) = self.kernel.symbolize(VirtAddr(function))
        {
            spin.notes.push(format!("for {symbol}"));
        }
        // Since about v5.9 the node says source and destination, on 64-bit kernels with a debugging option or none;
        // otherwise a call of smp_call_function_many is the destination's own per-CPU memory.
        let destination = call.get("node.dst").ok().map(|cpu| CpuId(cpu as u32));
        let by_memory = || self.kernel.per_cpu_reverse(call.at).map(|place| place.cpu);
        let known = |cpu: &CpuId| self.kernel.possible_cpus().contains(cpu);
        let many = self.named("many");
        let cpu = if many { by_memory().or(destination) } else { destination };
        if let Some(cpu) = cpu.filter(known) {
            spin.owner = Some(Owner::Cpu(cpu));
        }
    }
}

impl Kernel {
    /// The owner that a debug kernel keeps in the `raw_spinlock` around a qspinlock.
    fn debug_owner(&self, at: VirtAddr) -> Option<Owner> {
        let raw = self.object("raw_spinlock", at).ok()?;
        if raw.get("magic").ok()? != SPINLOCK_MAGIC {
            return None;
        }
        let task = raw.get("owner").ok().filter(|&task| task != 0 && task != u64::MAX)?;
        Some(Owner::Task(VirtAddr(task)))
    }

    /// Whether the list of waiters in what should be a mutex or rw_semaphore is a list.
    fn is_wait_list(&self, lock: Object<'_>) -> bool {
        // Since about v7.0 a mutex leads to its first waiter only.
        let Ok(list) = lock.member("wait_list") else {
            return lock.get("owner").is_ok_and(|owner| self.is_task(owner & !OWNER_FLAGS));
        };
        let Some(next) = self.read_u64(list.at).map(VirtAddr) else { return false };
        self.read_u64(next.wrapping_add(8)) == Some(list.at.0)
    }

    fn is_task(&self, at: u64) -> bool {
        at != 0 && self.tasks().is_ok_and(|all| all.tasks.iter().any(|task| task.at.0 == at))
    }

    /// Who holds a mutex or rw_semaphore, by its `owner`.
    fn owner_word(&self, lock: Object<'_>) -> Owner {
        let Ok(word) = lock.member("owner").and_then(|owner| owner.u64()) else {
            return Owner::Unknown("its owner cannot be read");
        };
        let task = word & !OWNER_FLAGS;
        let by_reader = lock.type_name().contains("rw_semaphore") && word & READER_OWNED != 0;
        match task {
            _ if by_reader => Owner::Unknown("it is held by readers, which are not recorded"),
            0 => Owner::Nobody,
            task if self.is_task(task) => Owner::Task(VirtAddr(task)),
            _ => Owner::Unknown("its owner is no task that is in the list"),
        }
    }
}
