//! Whether a CPU was spinning: the loop that its pc was in, the word it waits for, and who holds that, where the
//! kernel records it.
//!
//! The code around the pc decides, as it is in memory; function names only say how a lock's word is to be read. Refuses
//! to guess who holds a lock that does not record its owner. Sources: `kernel/locking/{qspinlock,osq_lock,mutex,rwsem,
//! qrwlock}.c`, `include/linux/bit_spinlock.h`, `kernel/smp.c` (`csd_lock_wait`), `arch/x86/lib/delay.c`.

mod lock;
mod queue;
mod word;

pub use queue::{QueuedSpinLock, Waiter};
pub use word::Word;

use super::{CpuId, Kernel};
use crate::addr::VirtAddr;
use crate::arch::x86_64::loops::{Access, Atomic, Code, Loop, Use};
use crate::arch::x86_64::{Reg, RegisterFile};
use crate::unwind::Regs;
use std::fmt;

/// Code looked at behind the pc.
const BEHIND: u64 = 2048;
/// A function that starts further before the pc is not followed.
const BEFORE_MAX: u64 = 48 << 10;
/// A loop that only reads, without `pause`, waits for what it reads if it is no longer than this.
const POLL_MAX: usize = 8;

/// What kind of wait a loop is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// For a spinlock, on the lock's own word.
    SpinLock,
    /// For a spinlock, on the CPU's own node in the queue behind it.
    SpinLockQueue,
    /// For a reader-writer lock that spins.
    RwLock,
    /// `bit_spin_lock`: for one bit of a word.
    BitLock,
    /// For a mutex or rw_semaphore whose owner runs.
    SleepingLock,
    /// In the queue of those that spin for a mutex or rw_semaphore.
    OptimisticQueue,
    /// For another CPU to have run a function.
    CallFunction,
    /// For time to pass.
    Delay,
    /// The idle task, which polls for work.
    Idle,
    /// Tries a compare-and-exchange until it succeeds.
    Retry,
    /// For a word in memory to change: what that means is not known.
    Memory,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::SpinLock => "spinlock",
            Self::SpinLockQueue => "queue of a spinlock",
            Self::RwLock => "reader-writer lock",
            Self::BitLock => "bit lock",
            Self::SleepingLock => "sleeping lock, its owner runs",
            Self::OptimisticQueue => "queue for a sleeping lock",
            Self::CallFunction => "function call on another CPU",
            Self::Delay => "delay loop",
            Self::Idle => "idle polling",
            Self::Retry => "compare-and-exchange retry",
            Self::Memory => "a word in memory",
        })
    }
}

impl Kind {
    /// Whether it waits for somebody: neither for time nor for work.
    pub fn is_contention(self) -> bool {
        !matches!(self, Self::Delay | Self::Idle)
    }
}

/// Who holds a lock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Owner {
    /// This `struct task_struct`: the lock has it.
    Task(VirtAddr),
    /// What is waited for is up to this CPU.
    Cpu(CpuId),
    /// The lock's word says that nobody does.
    Nobody,
    /// The kernel does not record it; why, as half a sentence.
    Unknown(&'static str),
}

/// A CPU that waits without sleeping.
#[derive(Clone, Debug)]
pub struct Spin {
    /// For what.
    pub kind: Kind,
    /// The function whose loop it is, with offset: untrusted text.
    pub function: Option<String>,
    /// The pc that was in the loop.
    pub pc: VirtAddr,
    /// Instructions in the loop, by address, from the pc on.
    pub instructions: Vec<u64>,
    /// `pause` is among them.
    pub pauses: bool,
    /// The lock's own word, or else the word that the loop looks at; `None` where registers do not tell.
    pub word: Option<Word>,
    /// The word that the loop looks at, where that is another.
    pub polled: Option<Word>,
    /// Bit of the word, of a bit lock.
    pub bit: Option<u32>,
    /// Of a queued spinlock: its word decoded, and who waits.
    pub queue: Option<QueuedSpinLock>,
    /// Who holds it; `None` where nothing is held.
    pub owner: Option<Owner>,
    /// What is odd: the word says the lock is free, the queue has a hole.
    pub notes: Vec<String>,
}

/// Whether a context was spinning.
#[derive(Clone, Debug)]
pub enum Verdict {
    /// It was.
    Spinning(Box<Spin>),
    /// It was not; why, as half a sentence.
    Not(&'static str),
    /// That cannot be told; why, as half a sentence.
    Unknown(&'static str),
}

impl Verdict {
    /// The spin, if it is one.
    pub fn spin(&self) -> Option<&Spin> {
        match self {
            Self::Spinning(spin) => Some(spin),
            _ => None,
        }
    }
}

/// The function that a pc is in, and its loop.
struct Place<'k> {
    kernel: &'k Kernel,
    name: String,
    code: Code,
    start: VirtAddr,
    end: u64,
    regs: &'k RegisterFile,
    pc: VirtAddr,
}

impl Kernel {
    /// Whether a context with `regs` was spinning: those of a CPU, or those that an interrupt, an exception or an NMI
    /// saved of what it interrupted. `regs` needs `rip` and `cs`; the general registers tell the word's address.
    pub fn spinning(&self, regs: &Regs) -> Verdict {
        let mut file = RegisterFile::default();
        for (reg, value) in regs.known() {
            file.set_known(reg, value);
        }
        let regs = &file;
        let Some(pc) = regs.u64(Reg::Rip).map(VirtAddr) else { return Verdict::Unknown("no pc was saved") };
        if regs.in_user_mode() == Some(true) || pc.0 >> 63 == 0 {
            // What a program waits for is its own business: a loop of its own is no lock of the kernel's.
            return Verdict::Not("in user mode");
        }
        let Some(place) = Place::new(self, regs, pc) else {
            return Verdict::Unknown("its code cannot be read, or is of no function that is known");
        };
        let Some(found) = place.code.loop_around(pc.0, regs) else { return Verdict::Not("in no small loop") };
        place.verdict(&found)
    }
}

impl<'k> Place<'k> {
    fn new(kernel: &'k Kernel, regs: &'k RegisterFile, pc: VirtAddr) -> Option<Self> {
        let symbol = kernel.symbolize(pc)?;
        let (name, offset) = (symbol.name.to_owned(), symbol.offset);
        if offset > BEFORE_MAX {
            return None;
        }
        let start = VirtAddr(pc.0.wrapping_sub(offset));
        let mut code = vec![0; (offset + BEHIND) as usize];
        let filled = kernel.read(start, &mut code).filled;
        code.truncate(filled);
        let end = kernel.function_end(start, pc, start.0.wrapping_add(filled as u64));
        Some(Self { kernel, name, code: Code::new(&code, start.0), start, end, regs, pc })
    }

    fn named(&self, part: &str) -> bool {
        self.name.contains(part)
    }

    fn verdict(&self, found: &Loop) -> Verdict {
        let retries = |access: &Access| access.usage == Use::Atomic(Atomic::CompareExchange);
        let polls = found.accesses.iter().filter(|access| access.is_steady && !access.is_spill);
        let only_reads = found.accesses.iter().all(|access| access.usage == Use::Read);
        // Counting down, as kernels do that know no clock: what else a loop without memory is for, its name says.
        let counts = self.named("delay") && found.accesses.is_empty() && !found.calls;
        let waits = found.pauses
            || counts
            || only_reads && !found.calls && found.path.len() <= POLL_MAX && polls.clone().next().is_some()
            || found.path.len() == 1 && found.accesses.is_empty();
        if !waits && !found.accesses.iter().any(retries) {
            return Verdict::Not("in a loop that does not wait");
        }
        let mut spin = Spin {
            kind: Kind::Memory,
            function: self.kernel.symbolize(self.pc).map(|symbol| symbol.to_string()),
            pc: self.pc,
            instructions: found.path.clone(),
            pauses: found.pauses,
            word: None,
            polled: None,
            bit: None,
            queue: None,
            owner: None,
            notes: Vec::new(),
        };
        if !waits {
            spin.kind = Kind::Retry;
            let access = found.accesses.iter().find(|access| retries(access));
            spin.word = access.and_then(|access| self.word(access));
            return Verdict::Spinning(Box::new(spin));
        }
        if found.reads_clock || counts {
            spin.kind = Kind::Delay;
            return Verdict::Spinning(Box::new(spin));
        }
        if self.named("poll_idle") || self.named("cpu_idle_poll") {
            spin.kind = Kind::Idle;
            return Verdict::Spinning(Box::new(spin));
        }
        // What is locked is what the loop looks at, unless its function is known to look at something else first.
        let polled = polled(found);
        spin.word = polled.and_then(|access| self.word(access));
        if self.named("queued_spin_lock_slowpath") {
            self.queued_spin_lock(&mut spin);
        } else if self.named("osq_lock") {
            self.optimistic_queue(&mut spin);
        } else if self.named("spin_on_owner") || self.named("mutex") || self.named("rwsem") {
            self.sleeping_lock(&mut spin, found);
        } else if self.named("queued_read_lock_slowpath") || self.named("queued_write_lock_slowpath") {
            self.rwlock(&mut spin);
        } else if self.named("smp_call_function") || self.named("csd_lock_wait") {
            self.call_function(&mut spin);
        } else if let Some((access, bit)) = polled.and_then(|access| Some((access, self.bit_lock(access)?))) {
            spin.kind = Kind::BitLock;
            spin.bit = Some(bit);
            spin.owner = Some(Owner::Unknown("a bit lock has no room for its owner"));
            let free = |word: &Word| word.value.is_some_and(|value| value >> bit & 1 == 0);
            if self.word(access).as_ref().is_some_and(free) {
                spin.owner = Some(Owner::Nobody);
                spin.notes.push("the bit is clear: the lock was released a moment ago".to_owned());
            }
        } else if !found.pauses && spin.word.is_none() && found.path.len() > 1 {
            return Verdict::Not("in a loop that does not wait");
        }
        Verdict::Spinning(Box::new(spin))
    }

    /// What the memory of an access holds.
    fn word(&self, access: &Access) -> Option<Word> {
        Some(self.kernel.word(VirtAddr(access.address?), access.size))
    }

    /// The bit that a polled word is a lock by: the only one that is tested, if the same function sets it in one
    /// locked step.
    fn bit_lock(&self, polled: &Access) -> Option<u32> {
        let mask = polled.tested.filter(|mask| mask.is_power_of_two())?;
        let set = self.code.atomics(self.end).into_iter().any(|(operand, atomic)| match atomic {
            // With the bit in a register the operand is the bit string's start.
            Atomic::BitSet(bit) => {
                bit.is_none_or(|bit| 1u64.checked_shl(bit) == Some(mask)) && {
                    operand == polled.operand || operand.address(self.regs) == polled.address
                }
            }
            _ => false,
        });
        set.then(|| mask.trailing_zeros())
    }

    /// The lock that the function was called with, by a register that still has it.
    fn argument(&self) -> Option<VirtAddr> {
        let branches = self.kernel.static_branches(self.start..VirtAddr(self.end));
        let holders = self.code.first_argument(self.pc.0, self.end, &branches);
        holders.into_iter().find_map(|reg| self.regs.u64(reg)).map(VirtAddr)
    }
}

/// The access that a loop waits for: a steady read, best one of which single bits are tested.
fn polled(found: &Loop) -> Option<&Access> {
    let mut steady = found.accesses.iter().filter(|access| access.is_steady && !access.is_spill);
    let tested = steady.clone().find(|access| access.tested.is_some_and(|mask| mask.is_power_of_two()));
    tested.or_else(|| steady.clone().find(|access| access.usage == Use::Read)).or_else(|| steady.next())
}

impl Kernel {
    /// Where the function that starts at `start` ends: at the next symbol's start behind `pc`, or at `limit`.
    fn function_end(&self, start: VirtAddr, pc: VirtAddr, limit: u64) -> u64 {
        let is_in = |at: u64| {
            self.symbolize(VirtAddr(at)).is_some_and(|symbol| at.wrapping_sub(symbol.offset) == start.0)
        };
        // Symbols are in ascending order: the first address that is another's lies behind all of this one's.
        let (mut inside, mut outside) = (pc.0, limit);
        while outside.saturating_sub(inside) > 1 {
            let middle = inside + (outside - inside) / 2;
            if is_in(middle) { inside = middle } else { outside = middle }
        }
        outside
    }
}
