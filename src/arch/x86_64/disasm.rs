//! Machine code as text, in the syntax of objdump and gdb, with what each instruction refers to.
//!
//! The only place that names the disassembler. Knows no symbol: addresses come back as numbers. Source: Intel SDM
//! vol. 2; the syntax is that of the GNU assembler's manual, "80386 Dependent Features".

use iced_x86::{
    Code, Decoder, DecoderOptions, Formatter, GasFormatter, Instruction as Iced, IntelFormatter, Mnemonic,
    OpKind, Register,
};

use super::Reg;
use std::collections::HashMap;

/// Longest instruction.
pub const LEN_MAX: u64 = 15;

/// How operands are written.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub enum Syntax {
    /// `mov %rsp,%rbp`: gdb's default.
    #[default]
    Att,
    /// `mov rbp,rsp`
    Intel,
}

/// What an instruction's operands refer to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reference {
    /// It jumps or calls there.
    Branch(u64),
    /// It reads, writes or takes the address of memory there: relative to rip, or the base of a table.
    Memory(u64),
    /// The offset from the gs base of what it reads or writes: in the kernel, a per-CPU variable.
    Gs(u64),
    /// It has this number in it.
    Immediate(u64),
}

/// One instruction.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Instruction {
    /// Where it is.
    pub at: u64,
    /// Its bytes: at least one.
    pub bytes: Vec<u8>,
    /// Mnemonic and operands; `(bad)` for what is no instruction.
    pub text: String,
    /// What it refers to, if its operands tell.
    pub refers_to: Option<Reference>,
}

/// The instructions in `code`, which is at `at`; one that is cut off at the end is left out.
pub fn decode(code: &[u8], at: u64, syntax: Syntax) -> Vec<Instruction> {
    let mut formatter: Box<dyn Formatter> = match syntax {
        Syntax::Att => Box::new(GasFormatter::new()),
        Syntax::Intel => Box::new(IntelFormatter::new()),
    };
    let options = formatter.options_mut();
    options.set_uppercase_hex(false);
    options.set_hex_prefix("0x");
    options.set_hex_suffix("");
    options.set_small_hex_numbers_in_decimal(false);
    options.set_branch_leading_zeros(false);
    options.set_leading_zeros(false);
    options.set_rip_relative_addresses(true);
    options.set_always_show_scale(true);
    options.set_space_after_operand_separator(false);
    options.set_first_operand_char_index(7);
    let mut decoder = Decoder::with_ip(64, code, at, DecoderOptions::NONE);
    let mut instructions = Vec::new();
    let mut iced = Iced::default();
    while decoder.can_decode() {
        let start = decoder.position();
        decoder.decode_out(&mut iced);
        let bytes = code.get(start..decoder.position()).unwrap_or_default().to_vec();
        if iced.is_invalid() {
            // Cut off, or none at all: which, the longest length tells.
            if ((code.len() - start) as u64) < LEN_MAX {
                break;
            }
            instructions.push(Instruction { at: iced.ip(), bytes, text: "(bad)".into(), refers_to: None });
            continue;
        }
        let mut text = String::new();
        // objdump has names for comparisons by number (`cmpltps`), and shows both registers of a product that are the same.
        formatter.options_mut().set_use_pseudo_ops(iced.mnemonic() != Mnemonic::Imul);
        formatter.format(&iced, &mut text);
        // With the scale always shown, as objdump has it, there is a comma where nothing is to be scaled.
        let mut text = text.replace(",)", ")");
        if syntax == Syntax::Att {
            name_segments(&iced, &mut text);
        }
        instructions.push(Instruction { at: iced.ip(), bytes, text, refers_to: reference(&iced) });
    }
    instructions
}

/// String instructions are shown with the segments that they use, as objdump does.
fn name_segments(iced: &Iced, text: &mut String) {
    for operand in 0..iced.op_count() {
        let (place, named) = match iced.op_kind(operand) {
            OpKind::MemoryESRDI => ("(%rdi)", "%es:(%rdi)"),
            OpKind::MemorySegRSI if iced.segment_prefix() == Register::None => ("(%rsi)", "%ds:(%rsi)"),
            _ => continue,
        };
        *text = text.replace(place, named);
    }
}

fn reference(iced: &Iced) -> Option<Reference> {
    for operand in 0..iced.op_count() {
        match iced.op_kind(operand) {
            OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 => {
                return Some(Reference::Branch(iced.near_branch_target()));
            }
            OpKind::Memory => {
                let relative = iced.is_ip_rel_memory_operand();
                let address = match (relative, iced.memory_base()) {
                    (true, _) => iced.ip_rel_memory_address(),
                    (false, Register::None) => iced.memory_displacement64(),
                    (false, _) => continue,
                };
                return match iced.memory_segment() {
                    Register::GS => Some(Reference::Gs(address)),
                    Register::FS => None,
                    _ => Some(Reference::Memory(address)),
                };
            }
            OpKind::Immediate32to64 | OpKind::Immediate64 => {
                return Some(Reference::Immediate(iced.immediate(operand)));
            }
            _ => {}
        }
    }
    None
}

/// A call.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Call {
    /// To this address.
    Direct(u64),
    /// To where a register or memory says.
    Indirect,
}

/// Bytes of the longest call: prefixes, opcode, ModRM, SIB and displacement.
pub const CALL_MAX: usize = 9;

/// The call that ends right before `at`, where `code` are the bytes up to there: what a return address is behind. Of
/// several readings one that calls a given address goes first.
pub fn call_before(code: &[u8], at: u64) -> Option<Call> {
    let mut indirect = None;
    for len in 2..=code.len().min(CALL_MAX) {
        let bytes = code.get(code.len() - len..)?;
        // Most words on a stack are not behind one: the decoder costs more than a look.
        if !bytes.iter().any(|byte| matches!(byte, 0xe8 | 0xff)) {
            continue;
        }
        let mut decoder = Decoder::with_ip(64, bytes, at.wrapping_sub(len as u64), DecoderOptions::NONE);
        let iced = decoder.decode();
        if iced.len() != len {
            continue;
        }
        match iced.code() {
            Code::Call_rel32_64 => return Some(Call::Direct(iced.near_branch_target())),
            Code::Call_rm64 => indirect = Some(Call::Indirect),
            _ => {}
        }
    }
    indirect
}

/// What a function has on the stack.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Pushed {
    /// Bytes between its stack pointer and its return address.
    pub bytes: u64,
    /// Registers it must give back, and how far below the return address it has saved each.
    pub saved: Vec<(Reg, u64)>,
}

/// What the function whose first bytes are `code`, from address `start`, has on the stack when it is at `pc`: what it has
/// pushed and taken, followed through its jumps. `None` where that does not follow.
pub fn pushed_at(code: &[u8], start: u64, pc: u64) -> Option<Pushed> {
    let mut saved: Vec<(Reg, u64)> = Vec::new();
    let mut decoder = Decoder::with_ip(64, code, start, DecoderOptions::NONE);
    let mut depths: HashMap<u64, i64> = HashMap::new();
    let mut depth = Some(0i64);
    while decoder.can_decode() {
        // Where code is jumped to, it is as deep as where the jump was.
        depth = depths.get(&decoder.ip()).copied().or(depth);
        if decoder.ip() == pc {
            let bytes = depth.and_then(|depth| u64::try_from(depth).ok())?;
            saved.retain(|(_, depth)| *depth <= bytes);
            return Some(Pushed { bytes, saved });
        }
        let iced = decoder.decode();
        if iced.is_invalid() || decoder.ip() > pc {
            return None;
        }
        let of_rsp = iced.op_count() == 2
            && iced.op0_kind() == OpKind::Register
            && iced.op0_register() == Register::RSP;
        depth = match iced.code() {
            Code::Push_r64 | Code::Pushfq | Code::Pushq_imm8 | Code::Pushq_imm32 | Code::Push_rm64 => {
                depth.map(|depth| depth + 8)
            }
            Code::Pop_r64 | Code::Popfq | Code::Pop_rm64 => depth.map(|depth| depth - 8),
            Code::Sub_rm64_imm8 | Code::Sub_rm64_imm32 if of_rsp => {
                depth.map(|depth| depth.wrapping_add(iced.immediate(1) as i64))
            }
            Code::Add_rm64_imm8 | Code::Add_rm64_imm32 if of_rsp => {
                depth.map(|depth| depth.wrapping_sub(iced.immediate(1) as i64))
            }
            Code::Retnq | Code::Retnq_imm16 | Code::Int3 | Code::Ud2 => None,
            // Anything else that writes to it.
            _ if of_rsp && !matches!(iced.code(), Code::Cmp_r64_rm64 | Code::Test_rm64_r64) => None,
            _ => depth,
        };
        if let (Code::Push_r64, Some(depth), Some(reg)) =
            (iced.code(), depth, kept_by_calls(iced.op0_register()))
            && !saved.iter().any(|(known, _)| *known == reg)
        {
            saved.push((reg, u64::try_from(depth).unwrap_or(0)));
        }
        let calls = iced.code() == Code::Call_rel32_64;
        let branches = iced.op_count() == 1 && iced.op0_kind() == OpKind::NearBranch64 && !calls;
        if let Some(depth) = depth.filter(|_| branches) {
            depths.entry(iced.near_branch_target()).or_insert(depth);
        }
        if matches!(iced.code(), Code::Jmp_rel8_64 | Code::Jmp_rel32_64 | Code::Jmp_rm64) {
            depth = None;
        }
    }
    None
}

/// The register, if a function has to give it back as it was (System V ABI for x86-64).
fn kept_by_calls(register: Register) -> Option<Reg> {
    match register {
        Register::RBX => Some(Reg::Rbx),
        Register::RBP => Some(Reg::Rbp),
        Register::R12 => Some(Reg::R12),
        Register::R13 => Some(Reg::R13),
        Register::R14 => Some(Reg::R14),
        Register::R15 => Some(Reg::R15),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn depth_follows_pushes_and_jumps() {
        // push %rbx; sub $0x20,%rsp; je 1f; add $0x20,%rsp; pop %rbx; ret; int3; 1: pushf; nop
        let code =
            [0x53, 0x48, 0x83, 0xec, 0x20, 0x74, 7, 0x48, 0x83, 0xc4, 0x20, 0x5b, 0xc3, 0xcc, 0x9c, 0x90];
        let at = |offset: u64| pushed_at(&code, 0x1000, 0x1000 + offset).map(|pushed| pushed.bytes);
        assert_eq!((at(0), at(1), at(5), at(7), at(11)), (Some(0), Some(8), Some(40), Some(40), Some(8)));
        assert_eq!((at(13), at(14), at(15)), (None, Some(40), Some(48)), "behind ret by the jump only");
        assert_eq!(at(2), None, "in the middle of an instruction");
        assert_eq!(at(99), None);
        assert_eq!(pushed_at(&code, 0x1000, 0x100e).unwrap().saved, [(Reg::Rbx, 8)]);
    }

    #[test]
    fn return_addresses_are_behind_calls() {
        let before = |code: &[u8]| call_before(code, 0x1000);
        assert_eq!(before(&[0x90, 0xe8, 0x10, 0, 0, 0]), Some(Call::Direct(0x1010)));
        assert_eq!(before(&[0x90, 0xff, 0xd0]), Some(Call::Indirect), "call *%rax");
        assert_eq!(before(&[0x41, 0xff, 0xd3]), Some(Call::Indirect), "call *%r11");
        assert_eq!(
            before(&[0xff, 0x14, 0x25, 0, 0, 0, 0x82]),
            Some(Call::Indirect),
            "call *0xffffffff82000000"
        );
        assert_eq!(before(&[0x65, 0xff, 0x14, 0x25, 0, 0, 1, 0]), Some(Call::Indirect), "call *%gs:0x10000");
        assert_eq!(before(&[0xe9, 0x10, 0, 0, 0]), None, "jmp");
        assert_eq!(before(&[0xff, 0xe0]), None, "jmp *%rax");
        assert_eq!(before(&[0xff, 0x30]), None, "push (%rax)");
        assert_eq!(before(&[0xc3]), None);
        assert_eq!(before(&[]), None);
    }

    /// Expected text is objdump's.
    #[test]
    fn as_objdump_has_it() {
        let cases: &[(&[u8], &str, Option<Reference>)] = &[
            (&[0x55], "push   %rbp", None),
            (&[0x48, 0x89, 0xe5], "mov    %rsp,%rbp", None),
            (
                &[0x48, 0x69, 0xed, 0x10, 3, 0, 0],
                "imul   $0x310,%rbp,%rbp",
                Some(Reference::Immediate(0x310)),
            ),
            (&[0xe8, 0x10, 0, 0, 0], "call   0x1015", Some(Reference::Branch(0x1015))),
            (&[0xeb, 0xfe], "jmp    0x1000", Some(Reference::Branch(0x1000))),
            (&[0x48, 0x8b, 0x05, 0xf9, 0, 0, 0], "mov    0xf9(%rip),%rax", Some(Reference::Memory(0x1100))),
            (
                &[0x65, 0x48, 0x8b, 0x04, 0x25, 0xc0, 0xfb, 1, 0],
                "mov    %gs:0x1fbc0,%rax",
                Some(Reference::Gs(0x1fbc0)),
            ),
            (&[0x48, 0x8b, 0x45, 0xf8], "mov    -0x8(%rbp),%rax", None),
            (&[0x0f, 0x1f, 0x44, 0, 0], "nopl   (%rax,%rax,1)", None),
            (
                &[0x48, 0xc7, 0xc7, 0, 0, 0, 0x82],
                "mov    $0xffffffff82000000,%rdi",
                Some(Reference::Immediate(0xffff_ffff_8200_0000)),
            ),
            (&[0xf3, 0x48, 0xab], "rep stos %rax,%es:(%rdi)", None),
            (&[0xa4], "movsb  %ds:(%rsi),%es:(%rdi)", None),
            (&[0xc3], "ret", None),
            (&[0xcc], "int3", None),
        ];
        for (code, text, refers_to) in cases {
            let decoded = decode(code, 0x1000, Syntax::Att);
            assert_eq!((decoded[0].text.as_str(), decoded[0].refers_to), (*text, *refers_to));
        }
        assert_eq!(decode(&[0x48, 0x89, 0xe5], 0, Syntax::Intel)[0].text, "mov    rbp,rsp");
    }

    #[test]
    fn what_is_cut_off_is_left_out_and_what_is_none_is_said() {
        assert_eq!(decode(&[0x55, 0xe8, 0x10], 0, Syntax::Att).len(), 1);
        let bad = decode(&[0x06; 20], 0, Syntax::Att);
        assert_eq!(bad[0].text, "(bad)");
        assert!(decode(&[], 0, Syntax::Att).is_empty());
    }
}
