//! `info`: what the dump is, which kernel is in it, what is missing, and the cure.

use super::{Command, CommandError, Context, Output, printable};
use crate::addr::VirtAddr;
use crate::arch::x86_64::{Reg, Saved};
use crate::bytes::ByteSize;
use crate::kernel::{Cpu, Machine};
use serde_json::{Value, json};
use std::fmt::Write;

pub const COMMAND: Command = Command {
    name: "info",
    arguments: "[version]",
    summary: "what the dump or guest is, which kernel is in it, and what is missing",
    help: "Format, compression and filter level of a dump, or how a guest's memory is read; release, build-id, KASLR offset and page tables of the \
           kernel; CPUs and what ran on them; the panic message; problems, each with its cure.\n\n\
           'info version' tells kstub's version; scripts made for QEMU ask for it.\n\n\
           Example:\n  info\n",
    run,
};

/// Ranges of RAM shown before the list is cut; a machine has a handful.
const RANGES_SHOWN: usize = 16;

fn run(context: &Context<'_>, arguments: &[&str]) -> Result<Output, CommandError> {
    match arguments {
        [] => Ok(render(context.machine)),
        ["version"] => Ok(version()),
        // Tools made for QEMU ask for 'info registers' and more of its own.
        [other, ..] => Err(CommandError(format!(
            "there is no 'info {}': this is kstub, not QEMU; there are 'info' and 'info version'",
            printable(other)
        ))),
    }
}

/// The Linux kernel's gdb scripts take whatever answers `monitor info version` for QEMU, which is how they get to
/// work on a CPU per thread (`scripts/gdb/linux/utils.py`, `get_gdbserver_type`).
fn version() -> Output {
    const VERSION: &str = env!("CARGO_PKG_VERSION");
    Output {
        text: format!("kstub {VERSION} (QEMU-compatible GDB server over crash dumps and guests)\n"),
        json: json!({ "kstub": VERSION }),
    }
}

/// What is known of `machine`.
pub fn render(machine: &Machine) -> Output {
    let mut text = String::new();
    let mut line = |name: &str, value: &str| {
        let _ = writeln!(text, "{name:<14} {}", printable(value));
    };
    let facts = machine.backend().facts();
    for fact in &facts {
        line(fact.name, &fact.value);
    }
    let ranges = machine.backend().ranges();
    let bytes: u64 = ranges.iter().map(|range| range.len()).sum();
    line(
        "RAM",
        &format!("{} in {} range{}", ByteSize(bytes), ranges.len(), if ranges.len() == 1 { "" } else { "s" }),
    );
    for range in ranges.iter().take(RANGES_SHOWN) {
        line("", &format!("{range}  {}", ByteSize(range.len())));
    }
    if ranges.len() > RANGES_SHOWN {
        line("", &format!("… {} more", ranges.len() - RANGES_SHOWN));
    }
    let mut kernel_json = Value::Null;
    if let Some(kernel) = machine.kernel() {
        let found = kernel.found();
        let vmlinux = machine.vmlinux().map(|path| path.display().to_string());
        line("release", &found.release);
        line("build-id", found.build_id.as_deref().unwrap_or("not told by this kernel"));
        line("found by", &found.by.to_string());
        line("KASLR offset", &format!("{:#x}", found.kaslr_offset));
        line("phys_base", &signed_hex(found.phys_base));
        let sme = match found.space.sme_mask {
            0 => String::new(),
            mask => format!(", SME mask {mask:#x}"),
        };
        line("page tables", &format!("{} at physical {}{sme}", levels(found.space.levels), found.space.root));
        line("vmlinux", vmlinux.as_deref().unwrap_or("not found"));
        kernel_json = json!({
            "release": found.release,
            "build_id": found.build_id,
            "found_by": found.by.to_string(),
            "kaslr_offset": format!("{:#x}", found.kaslr_offset),
            "phys_base": signed_hex(found.phys_base),
            "page_table_root": found.space.root.to_string(),
            "page_table_levels": found.space.levels,
            "sme_mask": format!("{:#x}", found.space.sme_mask),
            "text": machine.text_base().map(|at| at.to_string()),
            "vmlinux": vmlinux,
        });
    }
    line("CPUs", &machine.cpus().len().to_string());
    for cpu in machine.cpus() {
        line("", &format!("{:>3}{}{}", cpu.id, running(cpu), place(machine, cpu)));
    }
    let failure = machine.kernel().and_then(|kernel| kernel.failure());
    match &failure {
        Some(failure) if failure.is_panic => line("panic", &failure.text),
        Some(failure) => line("oops", &failure.text),
        None => line("panic", "no panic or oops message found"),
    }
    let problems = machine.problems();
    for problem in &problems {
        line("problem", problem);
    }
    let facts: serde_json::Map<_, _> =
        facts.into_iter().map(|f| (f.name.to_owned(), Value::String(f.value))).collect();
    let json = json!({
        "schema": 1,
        "source": facts,
        "ram": ranges.iter().map(|r| json!({ "start": r.start.to_string(), "end": r.end.to_string() })).collect::<Vec<_>>(),
        "kernel": kernel_json,
        "cpus": machine.cpus().iter().map(|cpu| cpu_json(machine, cpu)).collect::<Vec<_>>(),
        "first_cpu": machine.first_cpu().0,
        "panic": failure.as_ref().filter(|failure| failure.is_panic).map(|failure| &failure.text),
        "oops": failure.as_ref().filter(|failure| !failure.is_panic).map(|failure| &failure.text),
        "problems": problems,
    });
    Output { text, json }
}

/// What ran on a CPU and what else must be known of it, to put behind its number.
pub fn running(cpu: &Cpu) -> String {
    let mut text = match (&cpu.comm, cpu.pid) {
        (Some(comm), Some(pid)) => format!("  pid {pid} {}", printable(comm)),
        (None, Some(pid)) => format!("  pid {pid}"),
        _ => String::new(),
    };
    if !cpu.notes.is_empty() {
        let _ = write!(text, " ({})", cpu.notes.join(", "));
    }
    text
}

fn place(machine: &Machine, cpu: &Cpu) -> String {
    // A placeholder is no place where anything ran.
    let Saved::Known(rip) = cpu.regs.get(Reg::Rip) else { return String::new() };
    let rip = rip as u64;
    match machine.kernel().and_then(|kernel| kernel.symbolize(VirtAddr(rip))) {
        Some(symbol) => format!("  at {symbol}"),
        None => format!("  at {rip:#x}"),
    }
}

fn cpu_json(machine: &Machine, cpu: &Cpu) -> Value {
    let per_cpu_base = machine.kernel().and_then(|kernel| kernel.per_cpu("__per_cpu_start", cpu.id));
    let derived = Reg::ALL.iter().filter_map(|&reg| match cpu.regs.get(reg) {
        Saved::Derived(_, from) => Some((reg.name().to_owned(), Value::from(from))),
        _ => None,
    });
    json!({
        "cpu": cpu.id.0,
        "pid": cpu.pid,
        "comm": cpu.comm,
        "rip": cpu.regs.u64(Reg::Rip).map(|rip| format!("{rip:#x}")),
        "per_cpu_base": per_cpu_base.map(|at| at.to_string()),
        "notes": cpu.notes,
        "derived": derived.collect::<serde_json::Map<_, _>>(),
    })
}

fn levels(levels: u8) -> &'static str {
    if levels == 5 { "5 levels" } else { "4 levels" }
}

/// Two's complement as a signed hexadecimal number: a kernel loaded below its link address has a negative base.
fn signed_hex(value: u64) -> String {
    let signed = value as i64;
    if signed < 0 { format!("-{:#x}", signed.unsigned_abs()) } else { format!("{value:#x}") }
}
