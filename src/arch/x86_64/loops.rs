//! The small loop that an instruction is in, and the memory that it looks at each time round.
//!
//! Follows jumps within one function's code; calls are stepped over and code out of line is not followed. Knows no
//! symbol and no lock. Source: Intel SDM vol. 2 (`PAUSE`, `LOCK`, `RDTSC`), vol. 1 chapter 7 (control flow).

use super::regs::{Reg, RegisterFile};
use iced_x86::{
    Decoder, DecoderOptions, FlowControl, Instruction as Iced, InstructionInfoFactory, Mnemonic, OpAccess,
    OpKind, Register,
};
use std::collections::{HashMap, VecDeque};

/// A loop with more instructions than this is not one that only waits.
const LOOP_MAX: usize = 64;
/// Longest code looked at, in bytes; functions are shorter.
const CODE_MAX: usize = 64 << 10;
/// How far behind a load the instruction may be that tests what was loaded.
const TEST_DISTANCE: usize = 3;

/// Where an instruction looks: what its operand says, and the address where registers tell it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Operand {
    base: Register,
    index: Register,
    scale: u32,
    displacement: u64,
    gs: bool,
}

/// What an instruction does with memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Use {
    /// Reads it.
    Read,
    /// Writes it, whether or not it reads it, too.
    Write,
    /// Reads and writes it in one locked step.
    Atomic(Atomic),
}

/// Locked instructions that locks are made of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Atomic {
    /// `cmpxchg`, `cmpxchg16b`
    CompareExchange,
    /// `xchg`, with or without the prefix.
    Exchange,
    /// `bts` of this bit; `None` if the bit is in a register.
    BitSet(Option<u32>),
    /// `add`, `xadd`, `or`, …
    Other,
}

/// One use of memory in a loop.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Access {
    /// The instruction.
    pub instruction: u64,
    /// Its operand.
    pub operand: Operand,
    /// Bytes.
    pub size: usize,
    /// How.
    pub usage: Use,
    /// The address is the same each time round.
    pub is_steady: bool,
    /// On the stack, by the stack pointer: a variable that had no register.
    pub is_spill: bool,
    /// The address; `None` where registers do not tell.
    pub address: Option<u64>,
    /// The bits that are tested of what is read, if only some are.
    pub tested: Option<u64>,
}

/// The shortest way from an instruction back to itself.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Loop {
    /// Its instructions, in the order in which they run.
    pub path: Vec<u64>,
    /// `pause` is in it.
    pub pauses: bool,
    /// `rdtsc` or `rdtscp` is in it.
    pub reads_clock: bool,
    /// A call is in it.
    pub calls: bool,
    /// What memory it uses.
    pub accesses: Vec<Access>,
}

/// A function's instructions.
pub struct Code {
    instructions: Vec<Iced>,
    by_address: HashMap<u64, usize>,
}

impl Code {
    /// The instructions in `code`, which starts at `at`; it may be longer than the function.
    pub fn new(code: &[u8], at: u64) -> Self {
        let code = code.get(..CODE_MAX).unwrap_or(code);
        let mut decoder = Decoder::with_ip(64, code, at, DecoderOptions::NONE);
        let mut instructions = Vec::new();
        while decoder.can_decode() {
            instructions.push(decoder.decode());
        }
        let by_address = instructions.iter().enumerate().map(|(i, one)| (one.ip(), i)).collect();
        Self { instructions, by_address }
    }

    /// Where control goes from an instruction, within the code.
    pub(super) fn successors(&self, index: usize) -> Vec<usize> {
        let Some(one) = self.instructions.get(index).filter(|one| !one.is_invalid()) else {
            return Vec::new();
        };
        let next = Some(index + 1).filter(|&next| next < self.instructions.len());
        let target = || self.by_address.get(&one.near_branch_target()).copied();
        match one.flow_control() {
            FlowControl::Next | FlowControl::Call | FlowControl::IndirectCall => next.into_iter().collect(),
            FlowControl::ConditionalBranch => next.into_iter().chain(target()).collect(),
            FlowControl::UnconditionalBranch => target().into_iter().collect(),
            _ => Vec::new(),
        }
    }

    /// The shortest loop that the instruction at `pc` is in; addresses in it by `regs`, as they are at `pc`.
    /// `None`: it is in none, or in none that is small.
    pub fn loop_around(&self, pc: u64, regs: &RegisterFile) -> Option<Loop> {
        let start = *self.by_address.get(&pc)?;
        let mut from: HashMap<usize, (usize, usize)> = HashMap::new();
        let mut waiting = VecDeque::from([(start, 0)]);
        let mut last = None;
        'search: while let Some((here, depth)) = waiting.pop_front() {
            if depth >= LOOP_MAX {
                continue;
            }
            for next in self.successors(here) {
                if next == start {
                    last = Some(here);
                    break 'search;
                }
                if let std::collections::hash_map::Entry::Vacant(slot) = from.entry(next) {
                    slot.insert((here, depth));
                    waiting.push_back((next, depth + 1));
                }
            }
        }
        let mut path = vec![last?];
        while let Some(&here) = path.last().filter(|&&here| here != start) {
            path.push(from.get(&here)?.0);
        }
        path.reverse();
        let path: Vec<&Iced> = path.into_iter().filter_map(|i| self.instructions.get(i)).collect();
        Some(describe(&path, regs))
    }

    /// Locked instructions of the whole code, up to `end`, with the operand of each.
    pub fn atomics(&self, end: u64) -> Vec<(Operand, Atomic)> {
        let within = self.instructions.iter().take_while(|one| one.ip() < end);
        within.filter_map(|one| Some((operand(one)?, atomic(one)?))).collect()
    }

    /// The instruction with this number.
    pub(super) fn instruction(&self, index: usize) -> Option<&Iced> {
        self.instructions.get(index)
    }

    /// The number of the instruction at `pc`.
    pub(super) fn index(&self, pc: u64) -> Option<usize> {
        self.by_address.get(&pc).copied()
    }
}

/// Whole registers that an instruction writes. A call leaves only those that the compiler expects it to keep.
pub(super) fn written(factory: &mut InstructionInfoFactory, one: &Iced) -> Vec<Register> {
    let writes = |access| {
        matches!(
            access,
            OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite
        )
    };
    let mut all: Vec<Register> = factory
        .info(one)
        .used_registers()
        .iter()
        .filter(|used| writes(used.access()))
        .map(|used| used.register().full_register())
        .collect();
    if matches!(one.flow_control(), FlowControl::Call | FlowControl::IndirectCall) {
        use Register::*;
        all.extend([RAX, RCX, RDX, RSI, RDI, R8, R9, R10, R11]);
    }
    all
}

fn operand(one: &Iced) -> Option<Operand> {
    let has_memory = (0..one.op_count()).any(|i| one.op_kind(i) == OpKind::Memory);
    // `lea` and long no-operations name memory and do not touch it.
    if !has_memory || matches!(one.mnemonic(), Mnemonic::Lea | Mnemonic::Nop) || is_prefetch(one) {
        return None;
    }
    let base = one.memory_base();
    // iced gives the address itself as the displacement of an operand relative to rip.
    Some(Operand {
        base: if one.is_ip_rel_memory_operand() { Register::None } else { base.full_register() },
        index: one.memory_index().full_register(),
        scale: one.memory_index_scale(),
        displacement: one.memory_displacement64(),
        gs: one.memory_segment() == Register::GS,
    })
}

fn is_prefetch(one: &Iced) -> bool {
    use Mnemonic::*;
    matches!(one.mnemonic(), Prefetcht0 | Prefetcht1 | Prefetcht2 | Prefetchnta | Prefetchw)
}

fn atomic(one: &Iced) -> Option<Atomic> {
    let in_memory = one.op0_kind() == OpKind::Memory;
    match one.mnemonic() {
        Mnemonic::Xchg if in_memory || one.op1_kind() == OpKind::Memory => Some(Atomic::Exchange),
        _ if !one.has_lock_prefix() => None,
        Mnemonic::Cmpxchg | Mnemonic::Cmpxchg8b | Mnemonic::Cmpxchg16b => Some(Atomic::CompareExchange),
        Mnemonic::Bts => {
            Some(Atomic::BitSet((one.op1_kind() == OpKind::Immediate8).then(|| one.immediate8().into())))
        }
        _ => Some(Atomic::Other),
    }
}

impl Operand {
    /// The address by `regs`, where they are known.
    pub fn address(&self, regs: &RegisterFile) -> Option<u64> {
        let value = |register| match register {
            Register::None => Some(0),
            register => regs.u64(reg(register)?),
        };
        let gs = if self.gs { regs.u64(Reg::GsBase)? } else { 0 };
        let index = value(self.index)?.wrapping_mul(self.scale.into());
        Some(value(self.base)?.wrapping_add(index).wrapping_add(self.displacement).wrapping_add(gs))
    }
}

fn describe(path: &[&Iced], regs: &RegisterFile) -> Loop {
    let mut factory = InstructionInfoFactory::new();
    let changed: Vec<Register> = path.iter().flat_map(|one| written(&mut factory, one)).collect();
    let is = |mnemonics: &[Mnemonic]| path.iter().any(|one| mnemonics.contains(&one.mnemonic()));
    let mut found = Loop {
        path: path.iter().map(|one| one.ip()).collect(),
        pauses: is(&[Mnemonic::Pause]),
        reads_clock: is(&[Mnemonic::Rdtsc, Mnemonic::Rdtscp]),
        calls: path
            .iter()
            .any(|one| matches!(one.flow_control(), FlowControl::Call | FlowControl::IndirectCall)),
        accesses: Vec::new(),
    };
    for (i, one) in path.iter().enumerate() {
        let Some(operand) = operand(one) else { continue };
        let steady = |register: Register| register == Register::None || !changed.contains(&register);
        let is_steady = steady(operand.base) && steady(operand.index);
        let mut reads_only = || {
            let used = factory.info(one).used_memory();
            used.iter().all(|used| matches!(used.access(), OpAccess::Read | OpAccess::CondRead))
        };
        let usage = match atomic(one) {
            Some(atomic) => Use::Atomic(atomic),
            None if reads_only() => Use::Read,
            None => Use::Write,
        };
        // The path goes round: what is tested may stand before the load in it.
        let behind = path.iter().cycle().skip(i).take(TEST_DISTANCE.min(path.len()) + 1);
        found.accesses.push(Access {
            instruction: one.ip(),
            operand,
            size: one.memory_size().size(),
            usage,
            is_steady,
            is_spill: operand.base == Register::RSP,
            address: operand.address(regs).filter(|_| is_steady),
            tested: tested(one, behind.copied()),
        });
    }
    found
}

/// The bits that are tested of what `load` reads: by itself, or by one of those that follow.
fn tested<'a>(load: &Iced, behind: impl Iterator<Item = &'a Iced>) -> Option<u64> {
    let loaded = (load.op0_kind() == OpKind::Register).then(|| load.op0_register().full_register());
    for one in behind {
        let about_it = one.ip() == load.ip()
            || one.op0_kind() == OpKind::Register && Some(one.op0_register().full_register()) == loaded;
        let immediate = (one.op_count() == 2).then(|| one.try_immediate(1).ok()).flatten();
        match (one.mnemonic(), immediate) {
            (Mnemonic::Test, Some(mask)) if about_it => {
                // `test $1,%ah` is about the second byte.
                let high = one.op0_kind() == OpKind::Register
                    && matches!(
                        one.op0_register(),
                        Register::AH | Register::BH | Register::CH | Register::DH
                    );
                let width = if one.op0_kind() == OpKind::Register { one.op0_register().size() } else { 8 };
                let mask = if width < 8 { mask & ((1 << (width * 8)) - 1) } else { mask };
                return Some(if high { mask << 8 } else { mask });
            }
            (Mnemonic::Bt, Some(bit)) if about_it => return 1u64.checked_shl(bit as u32 & 63),
            _ => {}
        }
    }
    None
}

pub(super) fn reg(register: Register) -> Option<Reg> {
    use Register::{R8, R9, R10, R11, R12, R13, R14, R15, RAX, RBP, RBX, RCX, RDI, RDX, RSI, RSP};
    Some(match register.full_register() {
        RAX => Reg::Rax,
        RBX => Reg::Rbx,
        RCX => Reg::Rcx,
        RDX => Reg::Rdx,
        RSI => Reg::Rsi,
        RDI => Reg::Rdi,
        RBP => Reg::Rbp,
        RSP => Reg::Rsp,
        R8 => Reg::R8,
        R9 => Reg::R9,
        R10 => Reg::R10,
        R11 => Reg::R11,
        R12 => Reg::R12,
        R13 => Reg::R13,
        R14 => Reg::R14,
        R15 => Reg::R15,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn regs() -> RegisterFile {
        let mut regs = RegisterFile::default();
        regs.set_known(Reg::Rbx, 0x5000);
        regs.set_known(Reg::Rdi, 0x6000);
        regs.set_known(Reg::GsBase, 0x7000);
        regs
    }

    fn around(code: &[u8], pc: u64) -> Option<Loop> {
        Code::new(code, 0x1000).loop_around(pc, &regs())
    }

    /// `1: pause; mov (%rbx),%eax; test %ax,%ax; jne 1b`, as qspinlock's head of queue has it.
    const PAUSE_LOOP: &[u8] = &[0xf3, 0x90, 0x8b, 0x03, 0x66, 0x85, 0xc0, 0x75, 0xf7, 0xc3];

    #[test]
    fn a_pause_loop_is_found_from_each_of_its_instructions() {
        for pc in [0x1000, 0x1002, 0x1004, 0x1007] {
            let found = around(PAUSE_LOOP, pc).unwrap();
            assert_eq!((found.path.len(), found.path[0], found.pauses), (4, pc, true));
            assert_eq!(found.accesses.len(), 1);
            let access = found.accesses[0];
            assert_eq!((access.address, access.size, access.usage), (Some(0x5000), 4, Use::Read));
        }
        assert_eq!(around(PAUSE_LOOP, 0x1009), None, "behind it");
        assert_eq!(around(PAUSE_LOOP, 0x1001), None, "within an instruction");
    }

    #[test]
    fn the_bits_tested_are_told() {
        // 1: pause; mov (%rbx),%rax; test $0x1000000,%eax; jne 1b
        let code = [0xf3, 0x90, 0x48, 0x8b, 0x03, 0xa9, 0, 0, 0, 1, 0x75, 0xf4];
        assert_eq!(around(&code, 0x1000).unwrap().accesses[0].tested, Some(1 << 24));
        // 1: pause; testb $0x2,0x8(%rdi); jne 1b
        let code = [0xf3, 0x90, 0xf6, 0x47, 0x08, 0x02, 0x75, 0xf8];
        let access = around(&code, 0x1000).unwrap().accesses[0];
        assert_eq!((access.tested, access.address), (Some(2), Some(0x6008)));
    }

    #[test]
    fn a_walk_through_memory_has_no_steady_address() {
        // 1: mov (%rbx),%rbx; test %rbx,%rbx; jne 1b
        let found = around(&[0x48, 0x8b, 0x1b, 0x48, 0x85, 0xdb, 0x75, 0xf8], 0x1000).unwrap();
        assert!(!found.accesses[0].is_steady);
        assert_eq!(found.accesses[0].address, None);
    }

    #[test]
    fn a_retry_is_seen() {
        // 1: mov %eax,%ecx; lock cmpxchg %ecx,(%rbx); jne 1b
        let found = around(&[0x89, 0xc1, 0xf0, 0x0f, 0xb1, 0x0b, 0x75, 0xf8], 0x1002).unwrap();
        assert_eq!(found.accesses[0].usage, Use::Atomic(Atomic::CompareExchange));
        assert!(!found.pauses);
    }

    #[test]
    fn hostile_code_ends() {
        let mut code = vec![0x90u8; 200];
        code.extend([0xe9, 0x33, 0xff, 0xff, 0xff]);
        assert_eq!(around(&code, 0x1000), None, "200 instructions are no small loop");
        assert_eq!(around(&[0xeb, 0xfe], 0x1000).unwrap().path, [0x1000]);
        assert_eq!(around(&[0x06; 64], 0x1000), None);
        assert_eq!(around(&[], 0x1000), None);
    }
}
