//! QEMU's own note: the registers of one vCPU that `NT_PRSTATUS` has no room for.
//!
//! Source: QEMU `target/i386/arch_dump.c`, `struct QEMUCPUState` (version 1) and `qemu_get_cpustate`.

use crate::bytes::{u32_at, u64_at};

/// A segment register with the descriptor that the CPU cached for it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QemuSegment {
    /// Selector.
    pub selector: u32,
    /// Limit in bytes.
    pub limit: u32,
    /// Descriptor flags as in the second word of a GDT entry.
    pub flags: u32,
    /// Base address.
    pub base: u64,
}

/// The fields of `QEMUCPUState`, in its order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QemuCpu {
    /// `rax rbx rcx rdx rsi rdi rsp rbp r8` … `r15`.
    pub general: [u64; 16],
    /// Instruction pointer.
    pub rip: u64,
    /// Flags.
    pub rflags: u64,
    /// `cs ds es fs gs ss ldt tr gdt idt`.
    pub segments: [QemuSegment; 10],
    /// `cr0` … `cr4`; there is no `cr1`.
    pub cr: [u64; 5],
    /// `MSR_KERNEL_GS_BASE`: appended later without a new version, so only the size tells.
    pub kernel_gs_base: Option<u64>,
}

const GENERAL: usize = 8;
const RIP: usize = GENERAL + 16 * 8;
const RFLAGS: usize = RIP + 8;
const SEGMENTS: usize = RFLAGS + 8;
const SEGMENT_SIZE: usize = 24;
const CR: usize = SEGMENTS + 10 * SEGMENT_SIZE;
const KERNEL_GS_BASE: usize = CR + 5 * 8;

impl QemuCpu {
    /// Reads a note's descriptor; `None` if it is of another version or too short.
    pub fn parse(desc: &[u8]) -> Option<Self> {
        if u32_at(desc, 0)? != 1 {
            return None;
        }
        // What the writer says it wrote; never more than is there.
        let size = usize::try_from(u32_at(desc, 4)?).ok()?;
        let desc = desc.get(..size.min(desc.len()))?;
        let mut general = [0; 16];
        for (i, value) in general.iter_mut().enumerate() {
            *value = u64_at(desc, GENERAL + i * 8)?;
        }
        let mut segments = [QemuSegment::default(); 10];
        for (i, segment) in segments.iter_mut().enumerate() {
            let at = SEGMENTS + i * SEGMENT_SIZE;
            *segment = QemuSegment {
                selector: u32_at(desc, at)?,
                limit: u32_at(desc, at + 4)?,
                flags: u32_at(desc, at + 8)?,
                base: u64_at(desc, at + 16)?,
            };
        }
        let mut cr = [0; 5];
        for (i, value) in cr.iter_mut().enumerate() {
            *value = u64_at(desc, CR + i * 8)?;
        }
        Some(Self {
            general,
            rip: u64_at(desc, RIP)?,
            rflags: u64_at(desc, RFLAGS)?,
            segments,
            cr,
            kernel_gs_base: u64_at(desc, KERNEL_GS_BASE),
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// A state in which every 8-byte word holds its own offset.
    fn state(size: u32) -> Vec<u8> {
        let mut bytes: Vec<u8> = (0..u64::from(size) / 8).flat_map(|i| (i * 8).to_le_bytes()).collect();
        bytes[..4].copy_from_slice(&1u32.to_le_bytes());
        bytes[4..8].copy_from_slice(&size.to_le_bytes());
        bytes
    }

    #[test]
    fn offsets_are_those_of_the_struct() {
        let cpu = QemuCpu::parse(&state(440)).unwrap();
        assert_eq!((cpu.general[0], cpu.general[7], cpu.general[15]), (8, 64, 128));
        assert_eq!((cpu.rip, cpu.rflags), (136, 144));
        assert_eq!((cpu.segments[0].selector, cpu.segments[0].base), (152, 168));
        assert_eq!(cpu.segments[9].base, 384);
        assert_eq!((cpu.cr[0], cpu.cr[4]), (392, 424));
        assert_eq!(cpu.kernel_gs_base, Some(432));
    }

    #[test]
    fn older_and_foreign_states() {
        assert_eq!(QemuCpu::parse(&state(432)).unwrap().kernel_gs_base, None);
        assert!(QemuCpu::parse(&state(424)).is_none());
        // The size field may not promise more than there is, nor hide less.
        let mut short = state(440);
        short[4..8].copy_from_slice(&432u32.to_le_bytes());
        assert_eq!(QemuCpu::parse(&short).unwrap().kernel_gs_base, None);
        short[0] = 2;
        assert!(QemuCpu::parse(&short).is_none());
        assert!((0..432).all(|len| QemuCpu::parse(&state(440)[..len]).is_none()));
    }
}
