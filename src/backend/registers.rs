//! From a dump's notes to registers.
//!
//! What a note does not have stays not saved, never zero. Sources: kernel `include/linux/elfcore.h` (`struct
//! elf_prstatus`), `arch/x86/include/asm/user_64.h` (`struct user_regs_struct`), `arch/x86/include/asm/elf.h`
//! (`ELF_CORE_COPY_REGS`); QEMU `target/i386/arch_dump.c`.

use super::{RegisterSource, SavedCpu};
use crate::arch::x86_64::{Reg, RegisterFile, Saved};
use crate::bytes::{u32_at, u64_at};
use crate::vmcore::{Notes, QemuCpu};

/// `offsetof(struct elf_prstatus, common.pr_pid)`: 12 bytes of siginfo, the signal, two signal sets.
const PR_PID: usize = 32;
/// `offsetof(struct elf_prstatus, pr_reg)`: after four pids and four times of 16 bytes.
const PR_REG: usize = 112;

/// `struct user_regs_struct`, one `unsigned long` each; `None`: not in gdb's view (`orig_ax`).
const USER_REGS: [Option<Reg>; 27] = {
    use Reg::*;
    [
        Some(R15),
        Some(R14),
        Some(R13),
        Some(R12),
        Some(Rbp),
        Some(Rbx),
        Some(R11),
        Some(R10),
        Some(R9),
        Some(R8),
        Some(Rax),
        Some(Rcx),
        Some(Rdx),
        Some(Rsi),
        Some(Rdi),
        None,
        Some(Rip),
        Some(Cs),
        Some(Eflags),
        Some(Rsp),
        Some(Ss),
        Some(FsBase),
        Some(GsBase),
        Some(Ds),
        Some(Es),
        Some(Fs),
        Some(Gs),
    ]
};

/// `QEMUCPUState`'s general registers in its order.
const QEMU_GENERAL: [Reg; 16] = {
    use Reg::*;
    [Rax, Rbx, Rcx, Rdx, Rsi, Rdi, Rsp, Rbp, R8, R9, R10, R11, R12, R13, R14, R15]
};
/// The first six of its segments.
const QEMU_SEGMENTS: [Reg; 6] = [Reg::Cs, Reg::Ds, Reg::Es, Reg::Fs, Reg::Gs, Reg::Ss];
const FS: usize = 3;
const GS: usize = 4;

/// The CPUs that `notes` describe, in file order, and what is wrong with them.
pub(super) fn saved_cpus(notes: &Notes) -> (Vec<SavedCpu>, Vec<String>) {
    let mut problems = Vec::new();
    if notes.qemu.is_empty() {
        let cpus = notes.prstatus.iter().map(|desc| SavedCpu {
            regs: of_kernel(desc),
            source: RegisterSource::KernelPrstatus,
            pid: u32_at(desc, PR_PID),
            prstatus: desc.clone(),
        });
        return (cpus.collect(), problems);
    }
    if notes.qemu.len() != notes.prstatus.len() {
        problems.push(format!(
            "QEMU wrote {} states of CPUs but {} NT_PRSTATUS notes: CPUs without both lack registers; \
             take the dump again",
            notes.qemu.len(),
            notes.prstatus.len()
        ));
    }
    // QEMU writes all NT_PRSTATUS in the order of its vCPUs, then all of its own in the same order.
    let mut cpus = Vec::new();
    for index in 0..notes.qemu.len().max(notes.prstatus.len()) {
        let prstatus = notes.prstatus.get(index);
        let mut regs = prstatus.map(|desc| of_prstatus(desc)).unwrap_or_default();
        match notes.qemu.get(index).map(|desc| QemuCpu::parse(desc)) {
            Some(Some(cpu)) => add_qemu(&mut regs, &cpu),
            Some(None) => problems.push(format!(
                "QEMU's state of vCPU {index} is of a version unknown to kstub: its control registers \
                 are missing"
            )),
            None => {}
        }
        cpus.push(SavedCpu {
            regs,
            source: RegisterSource::Qemu,
            pid: prstatus.and_then(|desc| u32_at(desc, PR_PID)),
            prstatus: prstatus.cloned().unwrap_or_default(),
        });
    }
    (cpus, problems)
}

/// All of `pr_reg` as it stands.
fn of_prstatus(desc: &[u8]) -> RegisterFile {
    let mut regs = RegisterFile::default();
    for (index, reg) in USER_REGS.into_iter().enumerate() {
        if let (Some(reg), Some(value)) = (reg, u64_at(desc, PR_REG + index * 8)) {
            regs.set_known(reg, value);
        }
    }
    regs
}

/// As the crashing kernel saves them (`crash_save_cpu`): in kernel mode, after `swapgs`, and
/// `ELF_CORE_COPY_REGS` reads the *inactive* gs base.
fn of_kernel(desc: &[u8]) -> RegisterFile {
    let mut regs = of_prstatus(desc);
    // A CPU that was interrupted in user mode will have that base again when it goes back; for one that was
    // in the kernel it is the base that user space will get, and its own is known only to the kernel.
    if regs.in_user_mode() == Some(false) {
        let inactive = regs.get(Reg::GsBase);
        regs.set(Reg::KGsBase, inactive);
        regs.set(Reg::GsBase, Saved::NotSaved);
    }
    regs
}

/// Adds what only QEMU's own note has; where both have a register, they are equal.
fn add_qemu(regs: &mut RegisterFile, cpu: &QemuCpu) {
    for (reg, value) in QEMU_GENERAL.into_iter().zip(cpu.general) {
        regs.set_known(reg, value);
    }
    regs.set_known(Reg::Rip, cpu.rip);
    regs.set_known(Reg::Eflags, cpu.rflags);
    for (reg, segment) in QEMU_SEGMENTS.into_iter().zip(&cpu.segments) {
        regs.set_known(reg, segment.selector.into());
    }
    regs.set_known(Reg::FsBase, cpu.segments[FS].base);
    regs.set_known(Reg::GsBase, cpu.segments[GS].base);
    let [cr0, _, cr2, cr3, cr4] = cpu.cr;
    for (reg, value) in [(Reg::Cr0, cr0), (Reg::Cr2, cr2), (Reg::Cr3, cr3), (Reg::Cr4, cr4)] {
        regs.set_known(reg, value);
    }
    if let Some(base) = cpu.kernel_gs_base {
        regs.set_known(Reg::KGsBase, base);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every word of `pr_reg` holds its offset in the note, but for `cs`.
    fn prstatus(cs: u64) -> Vec<u8> {
        let mut desc: Vec<u8> = (0..42u64).flat_map(|i| (i * 8).to_le_bytes()).collect();
        desc[32..36].copy_from_slice(&77u32.to_le_bytes());
        desc[248..256].copy_from_slice(&cs.to_le_bytes());
        desc
    }

    #[test]
    fn kernel_prstatus_has_the_inactive_gs_base() {
        let notes = Notes { prstatus: vec![prstatus(0x10), prstatus(0x33)], ..Notes::default() };
        let (cpus, problems) = saved_cpus(&notes);
        assert!(problems.is_empty());
        let kernel = &cpus[0].regs;
        assert_eq!((kernel.u64(Reg::R15), kernel.u64(Reg::Rdi)), (Some(112), Some(224)));
        assert_eq!((kernel.u64(Reg::Rip), kernel.u64(Reg::Rsp)), (Some(240), Some(264)));
        assert_eq!((kernel.u64(Reg::FsBase), kernel.u64(Reg::Gs)), (Some(280), Some(320)));
        assert_eq!((kernel.get(Reg::GsBase), kernel.u64(Reg::KGsBase)), (Saved::NotSaved, Some(288)));
        let user = &cpus[1].regs;
        assert_eq!((user.u64(Reg::GsBase), user.get(Reg::KGsBase)), (Some(288), Saved::NotSaved));
        for reg in [Reg::Cr0, Reg::Cr3, Reg::Efer, Reg::Cr8, Reg::St0, Reg::Xmm0, Reg::Mxcsr, Reg::Fctrl] {
            assert_eq!(kernel.get(reg), Saved::NotSaved, "{reg:?}");
        }
        assert_eq!((cpus[0].pid, cpus[0].source), (Some(77), RegisterSource::KernelPrstatus));
        assert_eq!(cpus[0].prstatus, prstatus(0x10));
    }

    #[test]
    fn qemu_has_control_registers_and_the_active_gs_base() {
        let mut state: Vec<u8> = (0..55u64).flat_map(|i| (1000 + i * 8).to_le_bytes()).collect();
        state[..4].copy_from_slice(&1u32.to_le_bytes());
        state[4..8].copy_from_slice(&440u32.to_le_bytes());
        let notes =
            Notes { prstatus: vec![prstatus(0x10)], qemu: vec![state.clone(), state], ..Notes::default() };
        let (cpus, problems) = saved_cpus(&notes);
        assert_eq!((cpus.len(), problems.len()), (2, 1));
        for cpu in &cpus {
            assert_eq!(cpu.source, RegisterSource::Qemu);
            assert_eq!((cpu.regs.u64(Reg::Rax), cpu.regs.u64(Reg::Rip)), (Some(1008), Some(1136)));
            assert_eq!((cpu.regs.u64(Reg::GsBase), cpu.regs.u64(Reg::KGsBase)), (Some(1264), Some(1432)));
            assert_eq!((cpu.regs.u64(Reg::Cr0), cpu.regs.u64(Reg::Cr4)), (Some(1392), Some(1424)));
            assert_eq!(cpu.regs.get(Reg::Efer), Saved::NotSaved);
        }
        assert_eq!((cpus[0].pid, cpus[1].pid), (Some(77), None));
    }
}
