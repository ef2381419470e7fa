//! The code that has to be known by name: entry and exit, trampolines that return addresses lead through, thunks, and
//! where CPUs are parked.
//!
//! Source: `arch/x86/entry/entry_64.S`, `arch/x86/lib/retpoline.S`, `arch/x86/kernel/{ftrace_64.S,rethook.c}`,
//! `arch/x86/include/asm/fred.h`.

use super::{Event, StackBounds, StackKind};
use crate::arch::x86_64::Reg;
use crate::kernel::{CpuId, Kernel};
use crate::unwind::{PtRegs, Regs, Stack};
use std::ops::Range;

/// Functions that never return and in which a CPU waits until the machine is restarted or dumped.
const PARKED: &[&str] = &[
    "stop_this_cpu",
    "crash_nmi_callback",
    "nmi_panic_self_stop",
    "panic_smp_self_stop",
    "kdump_nmi_callback",
];

/// Entry code by name: what is in front of the name of an exception, and which it is. Before v5.8 the names had no
/// `asm_exc_`.
const EXCEPTIONS: &[(&str, &str, u8)] = &[
    ("asm_exc_divide_error", "divide_error", 0),
    ("asm_exc_debug", "debug", 1),
    ("asm_exc_int3", "int3", 3),
    ("asm_exc_overflow", "overflow", 4),
    ("asm_exc_bounds", "bounds", 5),
    ("asm_exc_invalid_op", "invalid_op", 6),
    ("asm_exc_device_not_available", "device_not_available", 7),
    ("asm_exc_double_fault", "double_fault", 8),
    ("asm_exc_invalid_tss", "invalid_TSS", 10),
    ("asm_exc_segment_not_present", "segment_not_present", 11),
    ("asm_exc_stack_segment", "stack_segment", 12),
    ("asm_exc_general_protection", "general_protection", 13),
    ("asm_exc_page_fault", "page_fault", 14),
    ("asm_exc_coprocessor_error", "coprocessor_error", 16),
    ("asm_exc_alignment_check", "alignment_check", 17),
    ("asm_exc_machine_check", "machine_check", 18),
    ("asm_exc_simd_coprocessor_error", "simd_coprocessor_error", 19),
    ("asm_exc_virtualization_exception", "virtualization_exception", 20),
    ("asm_exc_control_protection", "control_protection", 21),
    ("asm_exc_vmm_communication", "vmm_communication", 29),
];

/// Code that the walk treats specially: resolved once.
pub struct KnownCode {
    /// The code of the entry section.
    entry: Range<u64>,
    /// Return addresses that a tracer puts in place of the real ones.
    pub return_trampolines: Vec<(u64, Hook)>,
    /// What a task that has never run begins with.
    pub fork: Vec<u64>,
    parked: Vec<(Range<u64>, &'static str)>,
    /// `cpu_tss_rw.x86_tss.sp2`, from the start of the structure: where the user's stack pointer waits on entry.
    scratch: Option<u64>,
}

/// Who replaced a return address.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Hook {
    /// kretprobes, or rethooks.
    Kretprobe,
    /// The function graph tracer.
    FunctionGraph,
}

impl KnownCode {
    pub fn of(kernel: &Kernel) -> Self {
        let at = |name: &str| kernel.symbol(name).map(|at| at.0);
        let entry = at("__entry_text_start").zip(at("__entry_text_end"));
        let mut return_trampolines = Vec::new();
        // Since Linux commit f3a112c0c40d ("x86,rethook,kprobes: Replace kretprobe with rethook on x86") (in v5.18).
        for name in ["arch_rethook_trampoline", "__kretprobe_trampoline", "kretprobe_trampoline"] {
            return_trampolines.extend(at(name).map(|at| (at, Hook::Kretprobe)));
        }
        return_trampolines.extend(at("return_to_handler").map(|at| (at, Hook::FunctionGraph)));
        let parked = PARKED.iter().filter_map(|name| {
            let (start, size) = kernel.symbol_and_size(name)?;
            let covers = |offset| {
                kernel.symbolize(start.wrapping_add(offset)).is_some_and(|found| found.name == *name)
            };
            // Symbols from memory have no size: as far as the name goes, at most a page.
            let size =
                if size != 0 { size } else { (0..4096).step_by(16).take_while(|&o| covers(o)).last()? + 16 };
            Some((start.0..start.0.wrapping_add(size), *name))
        });
        Self {
            entry: entry.map_or(0..0, |(start, end)| start..end),
            return_trampolines,
            fork: ["ret_from_fork_asm", "ret_from_fork"].iter().filter_map(|name| at(name)).collect(),
            parked: parked.collect(),
            scratch: kernel.member("tss_struct", "x86_tss.sp2").map(|member| member.offset),
        }
    }

    /// Whether `pc` is in entry or exit code.
    pub fn is_entry(&self, pc: u64) -> bool {
        self.entry.contains(&pc)
    }

    /// The function in which a CPU is parked, if `pc` is in one.
    pub fn parked(&self, pc: u64) -> Option<&'static str> {
        self.parked.iter().find(|(range, _)| range.contains(&pc)).map(|(_, name)| *name)
    }

    /// The user's registers at `pc` in the entry or exit code of system calls, where the stack pointer is the user's or
    /// nothing has been saved yet: the processor has put `rip` into `rcx` and the flags into `r11`.
    pub fn in_gap(
        &self,
        kernel: &Kernel,
        cpu: Option<CpuId>,
        name: &str,
        regs: &Regs,
        stack: &dyn Stack,
    ) -> Regs {
        let mut user = Regs::default();
        if name.contains("SYSCALL") || name.contains("SYSRET") {
            user = *regs;
            for reg in [Reg::Rip, Reg::Rsp, Reg::Eflags, Reg::Cs, Reg::Ss] {
                user.forget(reg);
            }
            let mut set = |reg, value: Option<u64>| value.into_iter().for_each(|value| user.set(reg, value));
            set(Reg::Rip, regs.get(Reg::Rcx));
            set(Reg::Eflags, regs.get(Reg::R11));
            let scratch = || {
                let tss = kernel.per_cpu("cpu_tss_rw", cpu?)?;
                kernel.read_u64(tss.wrapping_add(self.scratch?))
            };
            set(Reg::Rsp, regs.sp().filter(|sp| sp >> 63 == 0).or_else(scratch));
            return user;
        }
        // What the processor will return with, or came in with, is at the top of the entry stack.
        let bounds = cpu.map(|cpu| kernel.stacks().of_cpu(kernel, cpu)).unwrap_or_default();
        let holds = |one: &&StackBounds| regs.sp().is_some_and(|sp| one.contains(sp));
        let entry = bounds.iter().find(|one| one.kind == StackKind::Entry).filter(holds);
        if let Some(entry) = entry
            && let Some(saved) =
                PtRegs::read(stack, entry.end.wrapping_sub(crate::unwind::PT_REGS_SIZE), true)
            && saved.of_user()
        {
            user = saved.regs;
        }
        user
    }
}

/// Whether `name` is a thunk: code that is called or jumped to in place of an indirect jump or a return, and that has
/// pushed nothing that would not be there without it. The tables say that some of it cannot be unwound.
pub fn is_thunk(name: &str) -> bool {
    const PREFIXES: [&str; 8] = [
        "__x86_indirect_",
        "__x86_return_thunk",
        "__x86_return_",
        "its_return_thunk",
        "srso_",
        "retbleed_",
        "zen_untrain_ret",
        "entry_untrain_ret",
    ];
    PREFIXES.iter().any(|prefix| name.starts_with(prefix))
}

/// Whether `name` is where a task or a CPU begins: for kernels whose tables do not say so.
pub fn is_root(name: &str) -> bool {
    name.starts_with("ret_from_fork")
        || name.starts_with("secondary_startup_64")
        || name == "common_startup_64"
}

/// What saved the registers: told by the name of the entry code and what it put into `orig_ax`.
pub fn event(name: &str, saved: &PtRegs) -> Event {
    if saved.fred.1 != 0 {
        return fred_event(saved);
    }
    // An error code stays where `orig_ax` is only until the entry code has taken it out.
    let code = saved.orig_ax.filter(|&code| code <= u32::MAX.into());
    if name.contains("nmi") {
        return Event::Nmi;
    }
    if let Some((.., vector)) = EXCEPTIONS.iter().find(|(new, old, _)| *new == name || *old == name) {
        return Event::Exception(*vector, code.filter(|_| matches!(vector, 8 | 10..=14 | 17 | 21 | 29)));
    }
    let starts = |prefixes: &[&str]| prefixes.iter().any(|prefix| name.starts_with(prefix));
    if starts(&[
        "asm_sysvec_",
        "asm_common_interrupt",
        "asm_spurious_interrupt",
        "common_interrupt",
        "irq_entries",
    ]) || (name.ends_with("_interrupt") || name == "ret_from_intr")
    {
        return Event::Irq(None);
    }
    if starts(&["entry_SYSCALL", "entry_SYSENTER", "entry_INT80", "asm_int80", "ret_from_sys_call"]) {
        return Event::Syscall(saved.orig_ax.unwrap_or(u64::MAX));
    }
    if starts(&["ret_from_fork"]) {
        return Event::Fork;
    }
    if starts(&["arch_rethook", "__kretprobe", "kretprobe", "ftrace_", "kprobe_optinsn", "return_to_handler"])
    {
        return Event::Probe;
    }
    match saved.orig_ax {
        // The way back to the user is shared: only a system call leaves its number.
        Some(number) if saved.of_user() && number < 0x1_0000 => Event::Syscall(number),
        _ => Event::Unknown,
    }
}

/// A FRED processor says itself what it was (`struct fred_ss`).
fn fred_event(saved: &PtRegs) -> Event {
    // `saved.fred.1` begins behind the selector: STI, software event, NMI; vector from bit 16; type from bit 32.
    let (vector, kind) = ((saved.fred.1 >> 16) as u8, saved.fred.1 >> 32 & 0xf);
    match kind {
        0 => Event::Irq(Some(vector)),
        2 => Event::Nmi,
        3..=6 => Event::Exception(vector, saved.orig_ax.filter(|&code| code <= u32::MAX.into())),
        7 => Event::Syscall(saved.orig_ax.unwrap_or(u64::MAX)),
        _ => Event::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn saved(orig_ax: u64, fred_ss: u64, cs: u64) -> PtRegs {
        let mut regs = Regs::default();
        regs.set(Reg::Cs, cs);
        PtRegs { at: 0, regs, orig_ax: Some(orig_ax), fred: (0, fred_ss >> 16) }
    }

    #[test]
    fn events_by_name() {
        let minus_one = u64::MAX;
        assert_eq!(event("end_repeat_nmi", &saved(minus_one, 0, 0x10)), Event::Nmi);
        assert_eq!(event("asm_exc_page_fault", &saved(minus_one, 0, 0x10)), Event::Exception(14, None));
        assert_eq!(event("asm_exc_double_fault", &saved(0, 0, 0x10)), Event::Exception(8, Some(0)));
        assert_eq!(event("asm_sysvec_apic_timer_interrupt", &saved(minus_one, 0, 0x33)), Event::Irq(None));
        assert_eq!(event("entry_SYSCALL_64_after_hwframe", &saved(23, 0, 0x33)), Event::Syscall(23));
        assert_eq!(
            event("swapgs_restore_regs_and_return_to_usermode", &saved(7, 0, 0x33)),
            Event::Syscall(7)
        );
        assert_eq!(event("error_return", &saved(minus_one, 0, 0x33)), Event::Unknown);
    }

    /// Bits as `struct fred_ss` has them: type 48..52, vector 32..40.
    #[test]
    fn events_by_fred() {
        let fred = |kind: u64, vector: u64| saved(5, 0x18 | vector << 32 | kind << 48, 0x10);
        assert_eq!(event("asm_fred_entrypoint_kernel", &fred(0, 0xec)), Event::Irq(Some(0xec)));
        assert_eq!(event("asm_fred_entrypoint_kernel", &fred(2, 2)), Event::Nmi);
        assert_eq!(event("asm_fred_entrypoint_kernel", &fred(3, 14)), Event::Exception(14, Some(5)));
        assert_eq!(event("asm_fred_entrypoint_user", &fred(7, 1)), Event::Syscall(5));
    }

    #[test]
    fn thunks() {
        for name in ["__x86_indirect_thunk_rax", "__x86_indirect_its_thunk_array", "srso_alias_return_thunk"]
        {
            assert!(is_thunk(name), "{name}");
        }
        assert!(!is_thunk("__x86_get_event_constraints"));
    }
}
