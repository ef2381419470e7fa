//! Where a function's first argument is, once it runs.
//!
//! Follows the argument through registers and the function's own stack along every way that control can take within its
//! code: what holds it on all of them does. Knows no symbol. Source: System V ABI AMD64, 3.2 (`rdi`; registers that a call
//! leaves as they are); Intel SDM vol. 2 (`PUSH`, `POP`).

use super::loops::{Code, reg, written};
use super::regs::Reg;
use iced_x86::{Instruction as Iced, InstructionInfoFactory, Mnemonic, OpKind, Register};
use std::collections::{BTreeSet, HashMap};

/// No compiler keeps a word in more places; hostile code would in thousands.
const HOLDERS_MAX: usize = 16;

/// Something that can hold a word.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Location {
    Register(Register),
    /// On the stack, this far from where its pointer was when the function began.
    Slot(i64),
}

/// What is known before an instruction.
#[derive(Clone, PartialEq, Eq)]
struct State {
    /// What holds the argument.
    holders: BTreeSet<Location>,
    /// Where the stack pointer is; `None` where ways differ, or it was computed.
    depth: Option<i64>,
}

impl State {
    /// As two ways have it in common.
    fn common(&self, other: &Self) -> Self {
        let depth = self.depth.filter(|_| self.depth == other.depth);
        let mut holders = &self.holders & &other.holders;
        holders.retain(|location| depth.is_some() || matches!(location, Location::Register(_)));
        Self { holders, depth }
    }

    fn slot(&self, displacement: u64) -> Option<Location> {
        Some(Location::Slot(self.depth?.checked_add(displacement as i64)?))
    }

    /// The whole register or the place on the stack that an operand is.
    fn location(&self, one: &Iced, operand: u32) -> Option<Location> {
        match one.op_kind(operand) {
            OpKind::Register => {
                Some(one.op_register(operand)).filter(|register| register.is_gpr64()).map(Location::Register)
            }
            OpKind::Memory if one.memory_base() == Register::RSP && one.memory_index() == Register::None => {
                self.slot(one.memory_displacement64())
            }
            _ => None,
        }
    }

    /// As it is behind `one`.
    fn after(&self, one: &Iced, factory: &mut InstructionInfoFactory) -> Self {
        let moved = match one.mnemonic() {
            Mnemonic::Mov => self.location(one, 1).zip(self.location(one, 0)),
            Mnemonic::Push => self.location(one, 0).zip(self.slot(0u64.wrapping_sub(8))),
            Mnemonic::Pop => self.slot(0).zip(self.location(one, 0)),
            _ => None,
        };
        let holds = moved.is_some_and(|(from, _)| self.holders.contains(&from));
        let mut next = self.clone();
        for register in written(factory, one) {
            next.holders.remove(&Location::Register(register));
        }
        if one.mnemonic() == Mnemonic::Push
            && let Some(slot) = self.slot(0u64.wrapping_sub(8))
        {
            next.holders.remove(&slot);
        }
        // What may write to the stack takes every word that it touches.
        if one.op0_kind() == OpKind::Memory
            && let Some(Location::Slot(at)) = self.location(one, 0)
        {
            let end = at.saturating_add_unsigned(one.memory_size().size() as u64);
            let touched = |slot: &i64| *slot < end && at < slot.saturating_add(8);
            next.holders.retain(|location| !matches!(location, Location::Slot(slot) if touched(slot)));
        }
        next.depth = self.depth_after(one, factory);
        if next.depth.is_none() {
            next.holders.retain(|location| matches!(location, Location::Register(_)));
        }
        match moved {
            Some((_, to)) if holds && next.holders.len() < HOLDERS_MAX => {
                next.holders.insert(to);
            }
            Some((_, to)) => {
                next.holders.remove(&to);
            }
            None => {}
        }
        next
    }

    fn depth_after(&self, one: &Iced, factory: &mut InstructionInfoFactory) -> Option<i64> {
        let immediate = matches!(one.op1_kind(), OpKind::Immediate8to64 | OpKind::Immediate32to64);
        match one.mnemonic() {
            Mnemonic::Push | Mnemonic::Pop => self.depth?.checked_add(one.stack_pointer_increment().into()),
            // What it pushes, the other function pops.
            Mnemonic::Call => self.depth,
            Mnemonic::Add | Mnemonic::Sub if one.op0_register() == Register::RSP && immediate => {
                let by = one.immediate(1) as i64;
                let by = if one.mnemonic() == Mnemonic::Sub { by.checked_neg()? } else { by };
                self.depth?.checked_add(by)
            }
            _ => self.depth.filter(|_| !written(factory, one).contains(&Register::RSP)),
        }
    }
}

impl Code {
    /// Registers that hold the first argument of the function, which this code begins with and which ends at `end`, when the
    /// instruction at `pc` is to be executed. `branches` are places where the kernel puts a jump or takes it away, with
    /// where that leads. None where control comes in ways that neither shows.
    pub fn first_argument(&self, pc: u64, end: u64, branches: &HashMap<u64, u64>) -> Vec<Reg> {
        let mut factory = InstructionInfoFactory::new();
        let begin = State { holders: [Location::Register(Register::RDI)].into(), depth: Some(0) };
        let mut before: HashMap<usize, State> = [(0, begin)].into();
        let mut waiting = vec![0];
        // A state is taken up again only if it has lost something: that ends.
        while let Some(here) = waiting.pop() {
            let Some((one, state)) = self.instruction(here).zip(before.get(&here)) else { continue };
            let after = state.after(one, &mut factory);
            let mut ways = self.successors(here);
            if let Some(&target) = branches.get(&one.ip()) {
                ways.extend([self.index(one.next_ip()), self.index(target)].into_iter().flatten());
            }
            for next in ways {
                if self.instruction(next).is_none_or(|one| one.ip() >= end) {
                    continue;
                }
                let known = before.get(&next).map(|known| known.common(&after));
                let merged = known.unwrap_or_else(|| after.clone());
                if before.get(&next) != Some(&merged) {
                    before.insert(next, merged);
                    waiting.push(next);
                }
            }
        }
        let holders = self.index(pc).and_then(|index| before.get(&index)).map(|state| &state.holders);
        let registers = holders.into_iter().flatten().filter_map(|location| match location {
            Location::Register(register) => reg(*register),
            Location::Slot(_) => None,
        });
        registers.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What holds the argument in front of each instruction of `code`, which begins at 0x1000.
    fn holders(code: &[u8]) -> Vec<Vec<Reg>> {
        let end = 0x1000 + code.len() as u64;
        let code = Code::new(code, 0x1000);
        (0..)
            .map_while(|index| Some(code.first_argument(code.instruction(index)?.ip(), end, &HashMap::new())))
            .collect()
    }

    #[test]
    fn a_copy_survives_the_register_and_a_way_that_restores_it() {
        // As gcc 16 writes osq_lock(): the bounds check out of line keeps the lock on the stack.
        let code = [
            &b"\x48\x83\xec\x20"[..],    // 1000: sub $0x20,%rsp
            b"\x49\x89\xf8",             // 1004: mov %rdi,%r8
            b"\x48\x3d\x00\x20\x00\x00", // 1007: cmp $0x2000,%rax
            b"\x73\x08",                 // 100d: jae 1017
            b"\x31\xff",                 // 100f: xor %edi,%edi
            b"\xf3\x90",                 // 1011: pause
            b"\xeb\xfc",                 // 1013: jmp 1011
            b"\x90\x90",                 // 1015: nop
            b"\x48\x89\x7c\x24\x10",     // 1017: mov %rdi,0x10(%rsp)
            b"\xe8\x00\x00\x00\x00",     // 101c: call 1021
            b"\x4c\x8b\x44\x24\x10",     // 1021: mov 0x10(%rsp),%r8
            b"\xeb\xe7",                 // 1026: jmp 100f
        ]
        .concat();
        let found = holders(&code);
        assert_eq!(found[0], [Reg::Rdi]);
        assert_eq!(found[2], [Reg::Rdi, Reg::R8]);
        // `pause`: rdi was cleared. 1015 is never reached.
        assert_eq!((&found[5][..], &found[7][..]), (&[Reg::R8][..], &[][..]));
        // Another slot, and it is lost where the ways meet.
        let other = [&code[..0x25], &[0x18], &code[0x26..]].concat();
        assert_eq!(holders(&other)[5], []);
    }

    #[test]
    fn a_copy_is_as_good_as_the_register_until_it_changes() {
        // push %rbx; mov %rdi,%rbx; xor %edi,%edi; pop %rbx; ret
        let found = holders(&[0x53, 0x48, 0x89, 0xfb, 0x31, 0xff, 0x5b, 0xc3]);
        assert_eq!((&found[3][..], &found[4][..]), (&[Reg::Rbx][..], &[][..]));
        // mov %rdi,%rsi; xor %esi,%esi; ret
        assert_eq!(holders(&[0x48, 0x89, 0xfe, 0x31, 0xf6, 0xc3])[2], [Reg::Rdi]);
    }

    #[test]
    fn code_behind_a_branch_that_is_off_is_reached_from_it() {
        let code = [
            &b"\x48\x89\xf9"[..], // 1000: mov %rdi,%rcx
            b"\x66\x90",          // 1003: xchg %ax,%ax, or jmp 1008
            b"\x31\xff",          // 1005: xor %edi,%edi
            b"\xc3",              // 1007: ret
            b"\xf3\x90",          // 1008: pause
            b"\xeb\xfc",          // 100a: jmp 1008
        ]
        .concat();
        let on = [&code[..3], b"\xeb\x03", &code[5..]].concat();
        let branches = [(0x1003, 0x1008)].into();
        for code in [code, on] {
            let code = Code::new(&code, 0x1000);
            for pc in [0x1005, 0x1008] {
                assert_eq!(code.first_argument(pc, 0x100c, &branches), [Reg::Rcx, Reg::Rdi]);
            }
            assert_eq!(code.first_argument(0x1007, 0x100c, &branches), [Reg::Rcx]);
            // It is reached by one of them only.
            let reached =
                [0x1005, 0x1008].map(|pc| !code.first_argument(pc, 0x100c, &HashMap::new()).is_empty());
            assert!(reached[0] != reached[1]);
        }
    }

    #[test]
    fn half_a_word_is_no_argument() {
        // mov %rdi,(%rsp); mov (%rsp),%eax; nop: the lower half only
        let found = holders(b"\x48\x89\x3c\x24\x8b\x04\x24\x90");
        assert_eq!(found[2], [Reg::Rdi]);
        // mov %edi,%eax; nop
        assert_eq!(holders(b"\x89\xf8\x90")[1], [Reg::Rdi]);
        // mov %rdi,0x8(%rsp); movups %xmm0,(%rsp), or -0x8(%rsp), or 0x10(%rsp); mov 0x8(%rsp),%rax; nop
        for (at, kept) in [(0x00, false), (0xf8, true), (0x10, true)] {
            let code =
                [&b"\x48\x89\x7c\x24\x08\x0f\x11\x44\x24"[..], &[at], b"\x48\x8b\x44\x24\x08\x90"].concat();
            assert_eq!(holders(&code)[3].contains(&Reg::Rax), kept, "{at:#x}");
        }
    }

    #[test]
    fn hostile_code_takes_little() {
        // mov %rdi,N(%rsp) for thousands of N, then back to the start.
        let spill = |n: u32| [&b"\x48\x89\xbc\x24"[..], &(n * 8).to_le_bytes()].concat();
        let mut code: Vec<u8> = (0..8000).flat_map(spill).collect();
        let back = -(code.len() as i32 + 5);
        code.push(0xe9);
        code.extend(back.to_le_bytes());
        let end = 0x1000 + code.len() as u64;
        let code = Code::new(&code, 0x1000);
        assert_eq!(code.first_argument(0x1000 + 7999 * 8, end, &HashMap::new()), [Reg::Rdi]);
        assert!(code.first_argument(7, end, &HashMap::new()).is_empty());
    }

    #[test]
    fn what_is_saved_by_a_push_comes_back() {
        let code = b"\x57\x53\x48\x83\xec\x08\x31\xff\x48\x83\xc4\x08\x5b\x5f\xf3\x90";
        // push rdi; push rbx; sub $8,rsp; xor edi,edi; add $8,rsp; pop rbx; pop rdi; pause
        let found = holders(code);
        assert_eq!((&found[4][..], &found[7][..]), (&[][..], &[Reg::Rdi][..]));
        // Popped in another order: rbx has it.
        let other = b"\x57\x53\x48\x83\xec\x08\x31\xff\x48\x83\xc4\x08\x5f\x5b\xf3\x90";
        assert_eq!(holders(other)[7], [Reg::Rbx]);
        // A pointer that was computed: nothing on the stack is known.
        let aligned = b"\x57\x53\x48\x83\xe4\xf0\x31\xff\x48\x83\xc4\x08\x5b\x5f\xf3\x90";
        assert_eq!(holders(aligned)[7], []);
    }
}
