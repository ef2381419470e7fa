//! The registers of one CPU, in the order and width of QEMU's x86-64 target description.
//!
//! 66 registers, 608 bytes in a `g` packet: what tools trained on QEMU's stub expect. A value is known,
//! derived (and says from what) or not saved; a register that a dump lacks is never shown as zero.

use std::fmt;

macro_rules! registers {
    ($($variant:ident $name:literal $bits:literal,)*) => {
        /// A register; the discriminant is its number in QEMU's description (and in `p`/`P` packets).
        #[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
        #[repr(u8)]
        #[allow(missing_docs)] // The names are the processor's own.
        pub enum Reg { $($variant,)* }

        impl Reg {
            /// Every register in protocol order.
            pub const ALL: [Reg; 66] = [$(Reg::$variant,)*];

            /// gdb's name: `rax`, `fs_base`, `cr3`, `st0`.
            pub const fn name(self) -> &'static str {
                match self { $(Reg::$variant => $name,)* }
            }
            /// Width in bits: 32, 64, 80 or 128.
            pub const fn bits(self) -> u32 {
                match self { $(Reg::$variant => $bits,)* }
            }
        }
    };
}

registers! {
    Rax "rax" 64, Rbx "rbx" 64, Rcx "rcx" 64, Rdx "rdx" 64, Rsi "rsi" 64, Rdi "rdi" 64, Rbp "rbp" 64, Rsp "rsp" 64,
    R8 "r8" 64, R9 "r9" 64, R10 "r10" 64, R11 "r11" 64, R12 "r12" 64, R13 "r13" 64, R14 "r14" 64, R15 "r15" 64,
    Rip "rip" 64, Eflags "eflags" 32,
    Cs "cs" 32, Ss "ss" 32, Ds "ds" 32, Es "es" 32, Fs "fs" 32, Gs "gs" 32,
    FsBase "fs_base" 64, GsBase "gs_base" 64, KGsBase "k_gs_base" 64,
    Cr0 "cr0" 64, Cr2 "cr2" 64, Cr3 "cr3" 64, Cr4 "cr4" 64, Cr8 "cr8" 64, Efer "efer" 64,
    St0 "st0" 80, St1 "st1" 80, St2 "st2" 80, St3 "st3" 80, St4 "st4" 80, St5 "st5" 80, St6 "st6" 80, St7 "st7" 80,
    Fctrl "fctrl" 32, Fstat "fstat" 32, Ftag "ftag" 32, Fiseg "fiseg" 32, Fioff "fioff" 32, Foseg "foseg" 32,
    Fooff "fooff" 32, Fop "fop" 32,
    Xmm0 "xmm0" 128, Xmm1 "xmm1" 128, Xmm2 "xmm2" 128, Xmm3 "xmm3" 128, Xmm4 "xmm4" 128, Xmm5 "xmm5" 128,
    Xmm6 "xmm6" 128, Xmm7 "xmm7" 128, Xmm8 "xmm8" 128, Xmm9 "xmm9" 128, Xmm10 "xmm10" 128, Xmm11 "xmm11" 128,
    Xmm12 "xmm12" 128, Xmm13 "xmm13" 128, Xmm14 "xmm14" 128, Xmm15 "xmm15" 128,
    Mxcsr "mxcsr" 32,
}

impl Reg {
    /// Width in bytes, as sent in a `g` packet.
    pub const fn bytes(self) -> usize {
        (self.bits() / 8) as usize
    }

    /// The register with this protocol number.
    pub fn from_number(number: usize) -> Option<Self> {
        Self::ALL.get(number).copied()
    }
}

/// One register's value and how far it can be trusted.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Saved {
    /// The source recorded it.
    Known(u128),
    /// The source did not record it; it follows from something else, named here as half a sentence.
    Derived(u128, &'static str),
    /// The source did not record it.
    #[default]
    NotSaved,
}

impl Saved {
    /// The value, if there is one.
    pub fn value(self) -> Option<u128> {
        match self {
            Self::Known(value) | Self::Derived(value, _) => Some(value),
            Self::NotSaved => None,
        }
    }
}

/// All registers of one CPU.
#[derive(Clone, PartialEq, Eq)]
pub struct RegisterFile {
    values: [Saved; Reg::ALL.len()],
}

impl Default for RegisterFile {
    /// Nothing saved.
    fn default() -> Self {
        Self { values: [Saved::NotSaved; Reg::ALL.len()] }
    }
}

impl RegisterFile {
    /// The saved value of `reg`.
    pub fn get(&self, reg: Reg) -> Saved {
        self.values[reg as usize]
    }

    /// The value of a register of at most 64 bits, known or derived.
    pub fn u64(&self, reg: Reg) -> Option<u64> {
        self.get(reg).value().and_then(|v| u64::try_from(v).ok())
    }

    /// Records `value`; bits beyond the register's width are dropped.
    pub fn set(&mut self, reg: Reg, value: Saved) {
        let mask = if reg.bits() >= 128 { u128::MAX } else { (1u128 << reg.bits()) - 1 };
        self.values[reg as usize] = match value {
            Saved::Known(v) => Saved::Known(v & mask),
            Saved::Derived(v, from) => Saved::Derived(v & mask, from),
            Saved::NotSaved => Saved::NotSaved,
        };
    }

    /// Records a value that the source saved.
    pub fn set_known(&mut self, reg: Reg, value: u64) {
        self.set(reg, Saved::Known(value.into()));
    }

    /// Whether the CPU ran user code: the privilege level in `cs` (Intel SDM vol. 3, 5.5) is 3.
    pub fn in_user_mode(&self) -> Option<bool> {
        self.u64(Reg::Cs).map(|cs| cs & 3 == 3)
    }
}

impl fmt::Debug for RegisterFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let saved = Reg::ALL.iter().filter(|&&r| self.get(r) != Saved::NotSaved);
        f.debug_map().entries(saved.map(|&r| (r.name(), self.get(r)))).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layout_is_qemus() {
        assert_eq!(Reg::ALL.iter().map(|r| r.bytes()).sum::<usize>(), 608);
        assert_eq!(Reg::Rip as usize, 16);
        assert_eq!(Reg::Gs as usize, 23);
        assert_eq!(Reg::KGsBase as usize, 26);
        assert_eq!(Reg::Efer as usize, 32);
        assert_eq!(Reg::Mxcsr as usize, 65);
        assert!(Reg::ALL.iter().enumerate().all(|(i, &r)| r as usize == i));
    }

    #[test]
    fn values_keep_to_their_width() {
        let mut regs = RegisterFile::default();
        regs.set_known(Reg::Eflags, 0xffff_ffff_0000_0246);
        assert_eq!(regs.get(Reg::Eflags), Saved::Known(0x246));
        assert_eq!(regs.u64(Reg::Rax), None);
        assert_eq!(regs.in_user_mode(), None);
        regs.set_known(Reg::Cs, 0x33);
        assert_eq!(regs.in_user_mode(), Some(true));
    }
}
