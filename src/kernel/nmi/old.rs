//! Evidence of NMIs that are over: what the last one left on the CPU's NMI stack, and backtraces in the log.
//!
//! Neither says what the CPU does at the end; both are to be marked as old. Source: `arch/x86/entry/entry_64.S`
//! (`asm_exc_nmi`, the diagram of its stack), `lib/nmi_backtrace.c`.

use crate::addr::VirtAddr;
use crate::arch::x86_64::Reg;
use crate::kernel::printk::{Caller, Record};
use crate::kernel::{CpuId, Kernel};
use crate::unwind::{PT_REGS_SIZE, PtRegs, Regs, Stack};

/// Index of the NMI stack in the TSS: `IST_INDEX_NMI`; the same before those names were.
const NMI_IST: u64 = 1;
/// Bytes at the top of the NMI stack: what the processor pushed, `rdx`, the flag, and two copies of what it pushed
/// stand there; `struct pt_regs` ends with the lower copy.
const PUSHED: u64 = 5 * 8;
const BELOW_TOP: u64 = 12 * 8;
/// Lines of one backtrace in the log.
const LINES_MAX: usize = 200;

/// The registers that the last NMI on a CPU has left on its stack.
#[derive(Clone, Debug, PartialEq)]
pub struct OldNmi {
    /// Where the processor pushed them.
    pub at: VirtAddr,
    /// All registers of what it interrupted in the kernel; of what it interrupted in user mode only what the processor
    /// pushes, for the rest goes elsewhere.
    pub regs: Regs,
    /// Where the `struct pt_regs` is, if it is there.
    pub pt_regs: Option<VirtAddr>,
    /// The NMI that is handled will return into the handler: another came while it was, which is handled then.
    pub repeats: bool,
}

/// A backtrace that a CPU made of itself because another asked it to, by an NMI.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoggedBacktrace {
    /// The CPU.
    pub cpu: CpuId,
    /// When, in nanoseconds of the log's clock.
    pub ts_nsec: u64,
    /// Its pc, as it was logged: `default_idle+0xf/0x20`. Untrusted text.
    pub pc: Option<String>,
    /// It was idle and said no more.
    pub was_idle: bool,
    /// The lines, the first one included. Untrusted text.
    pub lines: Vec<String>,
}

struct Words<'k>(&'k Kernel);

impl Stack for Words<'_> {
    fn word(&self, at: u64) -> Option<u64> {
        self.0.read_u64(VirtAddr(at))
    }
}

impl Kernel {
    /// The top of the NMI stack of `cpu`: what its TSS says.
    pub fn nmi_stack_top(&self, cpu: CpuId) -> Option<VirtAddr> {
        // Since Linux commit c482feefe1ae ("x86/entry/64: Make cpu_entry_area TSS read-only") (in v4.15); before, it was
        // cpu_tss.
        let tss = self.per_cpu("cpu_tss_rw", cpu).or_else(|| self.per_cpu("cpu_tss", cpu))?;
        let stacks = self.member("tss_struct", "x86_tss.ist")?;
        self.read_u64(tss.wrapping_add(stacks.offset + NMI_IST * 8)).filter(|&top| top != 0).map(VirtAddr)
    }

    /// What the last NMI that `cpu` took has left on its NMI stack; `None` if there was none since boot. Whether it is
    /// over, a backtrace says: one that is not has these registers in it.
    pub fn last_nmi(&self, cpu: CpuId) -> Option<OldNmi> {
        let top = self.nmi_stack_top(cpu)?;
        let pushed = VirtAddr(top.0.wrapping_sub(PUSHED));
        let word = |i: u64| self.read_u64(pushed.wrapping_add(i * 8));
        let (ip, cs, flags, sp, ss) = (word(0)?, word(1)?, word(2)?, word(3)?, word(4)?);
        // A segment of the kernel's or a user's: else no NMI has been here.
        if !matches!(cs & 0xffff, 0x10 | 0x33 | 0x23) || ip == 0 {
            return None;
        }
        // The copy that the handler returns by; an NMI on top of another puts this in.
        let returns_to = self.read_u64(VirtAddr(top.0.wrapping_sub(BELOW_TOP)));
        let repeats = returns_to.is_some_and(|ip| self.symbol("repeat_nmi") == Some(VirtAddr(ip)));
        let mut old = OldNmi { at: pushed, regs: Regs::default(), pt_regs: None, repeats };
        let named = [
            (Reg::Rip, ip),
            (Reg::Cs, cs & 0xffff),
            (Reg::Eflags, flags),
            (Reg::Rsp, sp),
            (Reg::Ss, ss & 0xffff),
        ];
        let saved = top.0.wrapping_sub(BELOW_TOP + PT_REGS_SIZE);
        if let Some(all) = PtRegs::read(&Words(self), saved, false)
            && named.iter().all(|(reg, value)| all.regs.get(*reg) == Some(*value))
        {
            old.pt_regs = Some(VirtAddr(saved));
            old.regs = all.regs;
        }
        for (reg, value) in named {
            old.regs.set(reg, value);
        }
        Some(old)
    }

    /// How many NMIs `cpu` has taken since boot.
    pub fn nmi_count(&self, cpu: CpuId) -> Option<u64> {
        let stat = self.value("irq_cpustat_t", self.per_cpu("irq_stat", cpu)?).ok()?;
        // Since about v7.0 all are in an array.
        let in_array = || {
            let index =
                self.types()?.constant("IRQ_COUNT_NMI").and_then(|index| u64::try_from(index).ok())?;
            stat.member("counts").ok()?.index(index).ok()?.u64().ok()
        };
        stat.get("__nmi_count").ok().or_else(in_array)
    }

    /// The backtraces by NMI in the log, oldest first.
    pub fn logged_backtraces(&self) -> Vec<LoggedBacktrace> {
        self.log().map(|log| backtraces(&log)).unwrap_or_default()
    }
}

/// The backtraces in `log`.
fn backtraces(log: &[Record]) -> Vec<LoggedBacktrace> {
    let mut all: Vec<(LoggedBacktrace, Option<Caller>, bool)> = Vec::new();
    for record in log {
        for line in record.text.lines() {
            if let Some((cpu, rest)) = header(line) {
                let idle = rest.contains("skipped: idling");
                let pc = rest.split_once("idling at ").map(|(_, pc)| pc.trim().to_owned());
                let one = LoggedBacktrace {
                    cpu,
                    ts_nsec: record.ts_nsec,
                    pc,
                    was_idle: idle,
                    lines: vec![line.to_owned()],
                };
                all.push((one, record.caller, !idle));
                continue;
            }
            // Several CPUs may write at a time: who wrote a line tells whose it is.
            let open = all.iter_mut().rev().find(|(_, caller, open)| *open && *caller == record.caller);
            let Some((one, _, open)) = open else { continue };
            if !is_part(line) || one.lines.len() >= LINES_MAX {
                *open = false;
                continue;
            }
            if let Some((_, pc)) = line.split_once("RIP: ")
                && one.pc.is_none()
            {
                // `0010:function+0x1/0x2`
                one.pc = pc.split_once(':').map(|(_, pc)| pc.trim().to_owned());
            }
            one.lines.push(line.to_owned());
            *open = !line.contains("</TASK>");
        }
    }
    all.into_iter().map(|(one, ..)| one).collect()
}

/// `NMI backtrace for cpu 3 …`
fn header(line: &str) -> Option<(CpuId, &str)> {
    let (_, rest) = line.split_once("NMI backtrace for cpu ")?;
    let digits = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, rest) = rest.split_at_checked(digits)?;
    Some((CpuId(number.parse().ok()?), rest))
}

/// Whether a line can belong to a backtrace: registers, frames, and what stands above them.
fn is_part(line: &str) -> bool {
    const STARTS: [&str; 16] = [
        " ",
        "CPU: ",
        "Tainted: ",
        "Hardware name: ",
        "RIP: ",
        "Code: ",
        "RSP: ",
        "RAX: ",
        "RDX: ",
        "RBP: ",
        "R10: ",
        "R13: ",
        "FS: ",
        "CS: ",
        "CR2: ",
        "Call Trace:",
    ];
    STARTS.iter().any(|start| line.starts_with(start))
        || line.starts_with("DR")
        || line.starts_with("PKRU")
        || line.starts_with("Workqueue: ")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing)]
    use super::*;

    fn record(ts_nsec: u64, cpu: u32, text: &str) -> Record {
        Record { ts_nsec, level: 4, facility: 0, caller: Some(Caller::Cpu(cpu)), text: text.into() }
    }

    /// Lines are those of a 6.12 kernel that was asked by sysrq-l, with two CPUs answering at a time.
    #[test]
    fn backtraces_are_told_apart_by_who_wrote_them() {
        let log = [
            record(1, 0, "Sending NMI from CPU 0 to CPUs 1-3:"),
            record(2, 1, "NMI backtrace for cpu 1"),
            record(3, 2, "NMI backtrace for cpu 2 skipped: idling at default_idle+0xf/0x20"),
            record(4, 3, "NMI backtrace for cpu 3"),
            record(5, 1, "CPU: 1 UID: 0 PID: 289 Comm: kstub-spin Not tainted 6.12.117"),
            record(6, 3, "CPU: 3 UID: 0 PID: 1 Comm: init Not tainted 6.12.117"),
            record(7, 1, "RIP: 0033:0x401791"),
            record(8, 3, "RIP: 0010:delay_tsc+0x2c/0x90"),
            record(9, 3, " </TASK>"),
            record(10, 3, "something else"),
            record(11, 1, "systemd: hello"),
            record(12, 1, "RSP: of something else"),
        ];
        let found = backtraces(&log);
        let short: Vec<_> =
            found.iter().map(|one| (one.cpu.0, one.pc.as_deref(), one.was_idle, one.lines.len())).collect();
        assert_eq!(
            short,
            [
                (1, Some("0x401791"), false, 3),
                (2, Some("default_idle+0xf/0x20"), true, 1),
                (3, Some("delay_tsc+0x2c/0x90"), false, 4)
            ]
        );
    }

    #[test]
    fn hostile_headers() {
        assert_eq!(header("NMI backtrace for cpu "), None);
        assert_eq!(header("NMI backtrace for cpu 99999999999999"), None);
        assert_eq!(header("x NMI backtrace for cpu 3é").unwrap().0, CpuId(3));
    }
}
