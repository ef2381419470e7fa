//! The registers of every vCPU from the text of the monitor's `info registers -a`.
//!
//! Knows the text only, as a vCPU in 64-bit code writes it and as one in 32- or 16-bit code does. What it lacks
//! (`k_gs_base`, `cr8`, the x87 pointers; `r8` and up outside 64-bit code) stays not saved. `st0` to `st7` are QEMU's
//! physical registers, as its GDB stub has them too. Source: QEMU `target/i386/cpu-dump.c`, `x86_cpu_dump_state`.

use crate::arch::x86_64::{Reg, RegisterFile, Saved};

/// No machine has more vCPUs, and no hostile text makes more.
const MOST_CPUS: usize = 4096;

/// Each vCPU's registers, by its index, in the order of the text.
pub(super) fn parse(text: &str) -> Vec<(u32, RegisterFile)> {
    let mut cpus: Vec<(u32, RegisterFile)> = Vec::new();
    for line in text.lines() {
        if let Some(index) = line.trim().strip_prefix("CPU#") {
            let Ok(index) = index.parse() else { continue };
            if cpus.len() == MOST_CPUS {
                break;
            }
            cpus.push((index, RegisterFile::default()));
        } else if let Some((_, regs)) = cpus.last_mut() {
            read_line(line, regs);
        }
    }
    cpus
}

/// `NAME=value` one after the other, where a name may be followed by a blank and a value may have several words.
fn read_line(line: &str, regs: &mut RegisterFile) {
    let mut rest = line;
    while let Some((before, after)) = rest.split_once('=') {
        let name = before.split_whitespace().next_back().unwrap_or_default();
        // The value ends where the next name begins, which is the last word in front of the next '='.
        let end = after.find('=').map_or(after.len(), |next| {
            let value = after.get(..next).unwrap_or_default().trim_end();
            value.rfind(' ').map_or(0, |blank| blank + 1)
        });
        let (value, next) = after.split_at_checked(end).unwrap_or((after, ""));
        set(name, value, regs);
        rest = next;
    }
}

fn set(name: &str, value: &str, regs: &mut RegisterFile) {
    let mut words = value.split_whitespace().map(|word| u64::from_str_radix(word, 16).ok());
    let first = words.next().flatten();
    let mut known = |reg: Reg, value: Option<u64>| {
        if let Some(value) = value {
            regs.set_known(reg, value);
        }
    };
    if let Some(reg) = general(name) {
        known(reg, first);
    } else if let Some((selector, base)) = segment(name) {
        known(selector, first);
        if let Some(base) = base {
            known(base, words.next().flatten());
        }
    } else if let Some(number) = name.strip_prefix("FPR") {
        // The mantissa, then sign and exponent.
        if let (Some(reg), Some(mantissa), Some(Some(exponent))) =
            (nth(Reg::St0, 8, number), first, words.next())
        {
            regs.set(reg, Saved::Known(u128::from(exponent) << 64 | u128::from(mantissa)));
        }
    } else if let Some(number) = ["XMM", "YMM", "ZMM"].iter().find_map(|kind| name.strip_prefix(kind)) {
        // The highest word first, whatever the width: the last two are xmm.
        let all: Option<Vec<u64>> = std::iter::once(first).chain(words).collect();
        if let (Some(reg), Some([.., high, low])) = (nth(Reg::Xmm0, 16, number), all.as_deref()) {
            regs.set(reg, Saved::Known(u128::from(*high) << 64 | u128::from(*low)));
        }
    }
}

fn nth(base: Reg, count: usize, number: &str) -> Option<Reg> {
    let number: usize = number.parse().ok().filter(|&number| number < count)?;
    Reg::from_number(base as usize + number)
}

/// A selector's register, and that of its base if there is one.
fn segment(name: &str) -> Option<(Reg, Option<Reg>)> {
    Some(match name {
        "ES" => (Reg::Es, None),
        "CS" => (Reg::Cs, None),
        "SS" => (Reg::Ss, None),
        "DS" => (Reg::Ds, None),
        "FS" => (Reg::Fs, Some(Reg::FsBase)),
        "GS" => (Reg::Gs, Some(Reg::GsBase)),
        _ => return None,
    })
}

fn general(name: &str) -> Option<Reg> {
    use Reg::*;
    Some(match name {
        "RAX" | "EAX" => Rax,
        "RBX" | "EBX" => Rbx,
        "RCX" | "ECX" => Rcx,
        "RDX" | "EDX" => Rdx,
        "RSI" | "ESI" => Rsi,
        "RDI" | "EDI" => Rdi,
        "RBP" | "EBP" => Rbp,
        "RSP" | "ESP" => Rsp,
        "R8" => R8,
        "R9" => R9,
        "R10" => R10,
        "R11" => R11,
        "R12" => R12,
        "R13" => R13,
        "R14" => R14,
        "R15" => R15,
        "RIP" | "EIP" => Rip,
        "RFL" | "EFL" => Eflags,
        "CR0" => Cr0,
        "CR2" => Cr2,
        "CR3" => Cr3,
        "CR4" => Cr4,
        "EFER" => Efer,
        "FCW" => Fctrl,
        "FSW" => Fstat,
        "MXCSR" => Mxcsr,
        _ => return None,
    })
}
