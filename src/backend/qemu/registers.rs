//! The registers of every vCPU from the text of the monitor's `info registers -a`.
//!
//! Knows the text only, as a vCPU in 64-bit code writes it and as one in 32- or 16-bit code does. What it lacks
//! (`k_gs_base`, `cr8`, the x87 pointers; `r8` and up and all of the segments' bases outside 64-bit code) stays not saved. `st0` to `st7` are QEMU's
//! physical registers, as its GDB stub has them too. Source: QEMU `target/i386/cpu-dump.c`, `x86_cpu_dump_state`.

use crate::arch::x86_64::{Reg, RegisterFile, Saved};

/// No machine has more vCPUs, and no hostile text makes more.
const MOST_CPUS: usize = 4096;
/// `EFER.LMA`.
const LONG_MODE: u64 = 1 << 10;

/// Each vCPU's registers, by its index, in the order of the text.
pub(super) fn parse(text: &str) -> Vec<(u32, RegisterFile)> {
    let mut cpus: Vec<(u32, RegisterFile)> = Vec::new();
    let mut narrow = false;
    for line in text.lines() {
        if let Some(index) = line.trim().strip_prefix("CPU#") {
            let Ok(index) = index.parse() else { continue };
            if cpus.len() == MOST_CPUS {
                break;
            }
            cpus.push((index, RegisterFile::default()));
            narrow = false;
        } else if let Some((_, regs)) = cpus.last_mut() {
            read_line(line, regs);
            narrow |= line.starts_with("EIP=");
            // 32-bit code of a 64-bit kernel: of a base the lower half is shown.
            if narrow && regs.u64(Reg::Efer).is_some_and(|efer| efer & LONG_MODE != 0) {
                regs.set(Reg::FsBase, Saved::NotSaved);
                regs.set(Reg::GsBase, Saved::NotSaved);
            }
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

#[cfg(test)]
mod tests {
    #![allow(clippy::panic)]
    use super::*;

    /// QEMU 7.2: a CPU in 64-bit user code with AVX; one before its first instruction; one in 32-bit code with SSE
    /// only, x87 in use and GS set.
    const TEXT: &str = "\r
CPU#0\r
RAX=1112131415161718 RBX=2122232425262728 RCX=3132333435363738 RDX=4142434445464748\r
RSI=5152535455565758 RDI=6162636465666768 RBP=7172737475767778 RSP=00007ffc1ac1ca58\r
R8 =8182838485868788 R9 =9192939495969798 R10=a1a2a3a4a5a6a7a8 R11=b1b2b3b4b5b6b7b8\r
R12=c1c2c3c4c5c6c7c8 R13=d1d2d3d4d5d6d7d8 R14=e1e2e3e4e5e6e7e8 R15=f1f2f3f4f5f6f7f8\r
RIP=0000000000401791 RFL=00000246 [---Z-P-] CPL=3 II=0 A20=1 SMM=0 HLT=0\r
ES =0000 0000000000000000 00000000 00000000\r
CS =0033 0000000000000000 ffffffff 00affb00 DPL=3 CS64 [-RA]\r
SS =002b 0000000000000000 ffffffff 00cff300 DPL=3 DS   [-WA]\r
DS =0000 0000000000000000 00000000 00000000\r
FS =0000 00005f5e5d5c5000 00000000 00000000\r
GS =0000 00006f6e6d6c6000 00000000 00000000\r
LDT=0000 0000000000000000 00000000 00008200 DPL=0 LDT\r
TR =0040 fffffe000003e000 00004087 00008900 DPL=0 TSS64-avl\r
GDT=     fffffe000003c000 0000007f\r
IDT=     fffffe0000000000 00000fff\r
CR0=80050033 CR2=000000001a5a36d8 CR3=00000000102b6000 CR4=00750ea0\r
DR0=0000000000000000 DR1=0000000000000000 DR2=0000000000000000 DR3=0000000000000000 \r
DR6=00000000ffff0ff0 DR7=0000000000000400\r
EFER=0000000000000d01\r
FCW=037f FSW=0000 [ST=0] FTW=00 MXCSR=00001f80\r
FPR0=0000000000000000 0000 FPR1=0000000000000000 0000\r
YMM00=0000000000000000 0000000000000000 0f0e0d0c0b0a0908 0706050403020100\r
YMM15=00000000000000aa 00000000000000bb fffefdfcfbfaf9f8 f7f6f5f4f3f2f1f0\r
\r
CPU#1\r
EAX=00000000 EBX=00000000 ECX=00000000 EDX=00060fb1\r
ESI=00000000 EDI=00000000 EBP=00000000 ESP=00000000\r
EIP=0000fff0 EFL=00000002 [-------] CPL=0 II=0 A20=1 SMM=0 HLT=1\r
ES =0000 00000000 0000ffff 00009300\r
CS =f000 ffff0000 0000ffff 00009b00\r
CR0=60000010 CR2=00000000 CR3=00000000 CR4=00000000\r
EFER=0000000000000000\r
\r
CPU#12\r
EAX=00000001 EBX=00000002 ECX=00000003 EDX=00000004\r
EIP=08048000 EFL=00000246 [---Z-P-] CPL=3 II=0 A20=1 SMM=0 HLT=0\r
CS =0023 00000000 ffffffff 00cffb00 DPL=3 CS32 [-RA]\r
GS =0063 f7c01500 ffffffff 00d0f300 DPL=3 DS   [-WA]\r
FCW=037f FSW=3800 [ST=7] FTW=80 MXCSR=00001f80\r
FPR6=0000000000000000 0000 FPR7=c90fdaa22168c235 4000\r
XMM00=0011223344556677 8899aabbccddeeff XMM01=0000000000000000 0000000000000001\r
";

    /// 32-bit code of a 64-bit kernel: its bases are cut, and its control registers are not.
    #[test]
    fn halves_of_bases_are_none() {
        let text = "CPU#0\r\nEAX=00000001\r\nEIP=08048000 EFL=00000246 [---Z-P-] CPL=3\r\n\
                    GS =0063 f7c01500 ffffffff 00d0f300 DPL=3 DS   [-WA]\r\n\
                    CR0=80050033 CR2=00007ffe12345678 CR3=00000001102b6000 CR4=00750ea0\r\n\
                    EFER=0000000000000d01\r\nCPU#1\r\nRIP=ffffffff81000000\r\n\
                    GS =0000 ffff888000000000 00000000 00000000\r\nEFER=0000000000000d01\r\n";
        let [(_, compat), (_, kernel)] = &parse(text)[..] else { panic!() };
        assert_eq!((compat.get(Reg::GsBase), compat.u64(Reg::Gs)), (Saved::NotSaved, Some(0x63)));
        assert_eq!(compat.u64(Reg::Cr3), Some(0x1_102b_6000));
        assert_eq!(compat.u64(Reg::Cr2), Some(0x7ffe_1234_5678));
        assert_eq!(kernel.u64(Reg::GsBase), Some(0xffff_8880_0000_0000));
    }

    #[test]
    fn every_mode_of_a_cpu() {
        let cpus = parse(TEXT);
        assert_eq!(cpus.iter().map(|(index, _)| *index).collect::<Vec<_>>(), [0, 1, 12]);
        let [(_, user), (_, reset), (_, compat)] = cpus.as_slice() else { panic!("{cpus:?}") };
        use Reg::*;
        let planted = [Rax, Rbx, Rcx, Rdx, Rsi, Rdi, Rbp, R8, R9, R10, R11, R12, R13, R14, R15];
        for (digit, reg) in (1u64..).zip(planted) {
            // 1112131415161718, 2122…28, and so on.
            let value = (1..9).fold(0, |value, low| value << 8 | digit << 4 | low);
            assert_eq!(user.u64(reg), Some(value), "{reg:?}");
        }
        for (reg, value) in [
            (Rsp, 0x7ffc_1ac1_ca58),
            (Rip, 0x40_1791),
            (Eflags, 0x246),
            (Cs, 0x33),
            (Ss, 0x2b),
            (Ds, 0),
            (Es, 0),
            (Fs, 0),
            (Gs, 0),
            (FsBase, 0x5f5e_5d5c_5000),
            (GsBase, 0x6f6e_6d6c_6000),
            (Cr0, 0x8005_0033),
            (Cr2, 0x1a5a_36d8),
            (Cr3, 0x102b_6000),
            (Cr4, 0x75_0ea0),
            (Efer, 0xd01),
            (Fctrl, 0x37f),
            (Mxcsr, 0x1f80),
        ] {
            assert_eq!(user.u64(reg), Some(value), "{reg:?}");
        }
        let xmm = |reg| user.get(reg).value();
        assert_eq!(xmm(Xmm0), Some(0x0f0e_0d0c_0b0a_0908_0706_0504_0302_0100));
        assert_eq!(xmm(Xmm15), Some(0xfffe_fdfc_fbfa_f9f8_f7f6_f5f4_f3f2_f1f0));
        for reg in [KGsBase, Cr8, Ftag, Fop, Fioff] {
            assert_eq!(user.get(reg), Saved::NotSaved, "{reg:?}");
        }
        assert_eq!(
            (reset.u64(Rip), reset.u64(Cs), reset.u64(Rdx)),
            (Some(0xfff0), Some(0xf000), Some(0x6_0fb1))
        );
        assert_eq!((reset.get(R8), reset.get(Xmm0)), (Saved::NotSaved, Saved::NotSaved));
        assert_eq!((compat.u64(GsBase), compat.u64(Gs)), (Some(0xf7c0_1500), Some(0x63)));
        assert_eq!(compat.get(St7), Saved::Known(0x4000_c90f_daa2_2168_c235));
        assert_eq!(compat.get(Xmm0), Saved::Known(0x0011_2233_4455_6677_8899_aabb_ccdd_eeff));
        assert_eq!(compat.get(Xmm1), Saved::Known(1));
        assert_eq!(compat.u64(Fstat), Some(0x3800));
    }

    #[test]
    fn any_damage_is_survived() {
        for cut in 0..TEXT.len() {
            parse(&TEXT[..cut]);
            let (before, after) = TEXT.split_at(cut);
            parse(&format!("{before}={}", after.get(1..).unwrap_or_default()));
            parse(&format!("{before}\u{e9}\u{2003}{after}"));
        }
        parse(&"CPU#1\n".repeat(10_000));
        assert_eq!(parse("CPU#1\n".repeat(10_000).as_str()).len(), MOST_CPUS);
        assert_eq!(parse("RAX=0000000000000001"), []);
        parse("CPU#0\nXMM99=1 2 XMM00= XMM01=1 =2 == RAX= FPR9=1 2\nES =\n");
    }
}
