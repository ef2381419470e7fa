//! `bt -t`, `-T`, `-e`, `-E` and `-v`: what lies on stacks, read without unwinding.

use crate::addr::VirtAddr;
use crate::arch::x86_64::Reg;
use crate::command::args::Options;
use crate::command::task::{heading, identity};
use crate::command::{CommandError, Context, Output, printable};
use crate::kernel::remains::StackUse;
use crate::kernel::sched::TaskInfo;
use crate::kernel::stack::{BATCH, StackBounds, StackKind, Trace, Tracer};
use crate::kernel::{CpuId, Kernel};
use crate::parallel;
use crate::unwind::PtRegs;
use serde_json::{Value, json};
use std::fmt::Write;

/// `-t`, `-T`, `-e` of `tasks`.
pub fn of_tasks(
    context: &Context<'_>,
    options: &Options<'_>,
    tracer: &Tracer<'_>,
    tasks: &[VirtAddr],
) -> Result<Output, CommandError> {
    let kernel = context.kernel()?;
    let reader = kernel.task_reader()?;
    let (mut text, mut rows) = (String::new(), Vec::new());
    for &task in tasks {
        let info = reader.read(task);
        let _ = write!(text, "{}{}", if text.is_empty() { "" } else { "\n" }, heading(&info));
        let mut row = identity(&info);
        let on = tracer.running_on(task);
        match kernel.task_stack(task).filter(|_| info.stack.is_some()) {
            Some(stack) if options.has("e") => {
                row.insert("exception_frames".into(), frames(kernel, &mut text, &[stack]))
            }
            Some(stack) => {
                // A task that runs is wherever its CPU's stack pointer is, or where its stack was left for another.
                let sp = match on {
                    Some(cpu) => {
                        let trace = tracer.cpu(cpu);
                        let own = trace.segments.iter().find(|segment| segment.stack == Some(stack));
                        let left = own.and_then(|segment| segment.frames.first()).map(|frame| frame.sp);
                        left.or_else(|| context.machine.cpu(cpu)?.regs.u64(Reg::Rsp))
                    }
                    None => info.sp.map(|sp| sp.0),
                };
                let from =
                    sp.filter(|sp| stack.contains(*sp) && !options.has("T")).unwrap_or(stack.start + 8);
                row.insert("text".into(), words(kernel, &mut text, &stack, from))
            }
            None => {
                text.push_str("    (its stack was released)\n");
                None
            }
        };
        rows.push(Value::Object(row));
    }
    Ok(Output { text, json: json!({ "tasks": rows }) })
}

/// Addresses of code on a stack.
fn words(kernel: &Kernel, text: &mut String, stack: &StackBounds, from: u64) -> Value {
    let bytes = kernel.stack_bytes(stack);
    let mut rows = Vec::new();
    for (at, pc) in kernel.text_on_stack(&bytes, from) {
        let symbol = kernel.symbolize_word(pc).map(|symbol| symbol.to_string());
        let _ = writeln!(text, "      [{:016x}] {} at {:016x}", at.0, symbol.as_deref().unwrap_or("?"), pc.0);
        rows.push(json!({ "at": at.to_string(), "pc": pc.to_string(), "symbol": symbol }));
    }
    if let Some(why) = &bytes.problem {
        let _ = writeln!(text, "    ({} cannot be read whole: {})", stack.kind.name(), printable(why));
    }
    Value::Array(rows)
}

/// Saved registers on stacks.
fn frames(kernel: &Kernel, text: &mut String, stacks: &[StackBounds]) -> Value {
    let mut rows = Vec::new();
    for stack in stacks {
        let bytes = kernel.stack_bytes(stack);
        // Only encrypted guests have these.
        if bytes.is_empty()
            && matches!(stack.kind, StackKind::VmmCommunication | StackKind::VmmCommunicationFallback)
        {
            continue;
        }
        for saved in kernel.exception_frames(&bytes) {
            let mode = if saved.of_user() { "USER" } else { "KERNEL" };
            let _ = writeln!(text, "  {mode}-MODE EXCEPTION FRAME AT: {:016x} ({})", saved.at, stack);
            if !saved.of_user() {
                let place = kernel.symbolize(VirtAddr(saved.regs.pc().unwrap_or(0)));
                let place = place.map_or("unknown".to_owned(), |symbol| symbol.to_string());
                let _ = writeln!(text, "    [exception RIP: {place}]");
            }
            super::render::registers(text, &saved.regs, saved.orig_ax);
            rows.push(saved_json(kernel, stack, &saved));
        }
        if let Some(why) = &bytes.problem {
            let _ = writeln!(text, "  ({stack} cannot be read whole: {})", printable(why));
        }
    }
    Value::Array(rows)
}

fn saved_json(kernel: &Kernel, stack: &StackBounds, saved: &PtRegs) -> Value {
    let registers =
        saved.regs.known().map(|(reg, value)| (reg.name().to_owned(), json!(format!("{value:#x}"))));
    let pc = VirtAddr(saved.regs.pc().unwrap_or(0));
    json!({
        "at": format!("{:#x}", saved.at),
        "stack": stack.to_string(),
        "user": saved.of_user(),
        "symbol": if saved.of_user() { None } else { kernel.symbolize(pc).map(|symbol| symbol.to_string()) },
        "orig_ax": saved.orig_ax.map(|value| format!("{value:#x}")),
        "registers": registers.collect::<serde_json::Map<_, _>>(),
    })
}

/// `-E`: saved registers on the interrupt and exception stacks of CPUs.
pub fn of_cpus(context: &Context<'_>, cpus: &[CpuId]) -> Result<Output, CommandError> {
    let kernel = context.kernel()?;
    let (mut text, mut rows) = (String::new(), Vec::new());
    for &cpu in cpus {
        let mut part = String::new();
        let found = frames(kernel, &mut part, &kernel.cpu_stacks(cpu));
        let _ = writeln!(text, "CPU {cpu}:{}", if part.is_empty() { " (none found)" } else { "" });
        text.push_str(&part);
        rows.push(json!({ "cpu": cpu.0, "exception_frames": found }));
    }
    Ok(Output { text, json: json!({ "cpus": rows }) })
}

/// A fault below a stack: its guard page has kept the end marker from being written over.
fn in_guard(trace: &Trace, start: u64) -> Option<String> {
    const GUARD: u64 = 4096;
    let below = |sp: &u64| start.checked_sub(*sp).is_some_and(|by| (1..=GUARD).contains(&by));
    let sp = trace.boundaries().filter_map(|boundary| boundary.saved.regs.sp()).find(below)?;
    Some(format!(
        "its stack pointer was {sp:#x}, below the stack at {start:#x}, when it was interrupted: it has overflowed"
    ))
}

/// `-v`: tasks whose stack has overflowed, and how deep stacks were used.
pub fn overflows(
    context: &Context<'_>,
    tracer: &Tracer<'_>,
    tasks: &[VirtAddr],
) -> Result<Output, CommandError> {
    let kernel = context.kernel()?;
    let reader = kernel.task_reader()?;
    let look = |task: &VirtAddr| -> (TaskInfo, Result<Option<StackUse>, String>) {
        let mut used = kernel.object("task_struct", *task).and_then(|task| kernel.stack_use(task));
        if let (Ok(Some(used)), Some(cpu)) = (&mut used, tracer.running_on(*task)) {
            used.problems.extend(in_guard(&tracer.cpu(cpu), used.start.0));
        }
        (reader.read(*task), used.map_err(|error| error.to_string()))
    };
    let all = parallel::map(tasks, BATCH, look);
    let (mut text, mut rows, mut deepest, mut bad) = (String::new(), Vec::new(), None::<(u64, &TaskInfo)>, 0);
    for (info, used) in &all {
        let mut row = identity(info);
        let problems = match used {
            Ok(Some(used)) => {
                row.insert("stack".into(), json!(used.start.to_string()));
                row.insert("size".into(), json!(used.size));
                row.insert("deepest".into(), json!(used.deepest));
                row.insert("end_word".into(), json!(used.end_word.map(|word| format!("{word:#x}"))));
                if let Some(bytes) = used.deepest
                    && deepest.is_none_or(|(other, _)| other < bytes)
                {
                    deepest = Some((bytes, info));
                }
                used.problems.clone()
            }
            Ok(None) => Vec::new(),
            Err(error) => vec![error.clone()],
        };
        if !problems.is_empty() {
            bad += 1;
            let _ = write!(text, "{}", heading(info));
            for problem in &problems {
                let _ = writeln!(text, "    {}", printable(problem));
            }
        }
        row.insert("problems".into(), json!(problems));
        rows.push(Value::Object(row));
    }
    let _ = match bad {
        0 => writeln!(text, "No stack overflows among {} tasks", all.len()),
        bad => writeln!(text, "{bad} of {} stacks are not as they should be", all.len()),
    };
    if let Some((bytes, info)) = deepest {
        let comm = info.comm.as_deref().map_or(String::new(), printable);
        let _ = writeln!(text, "deepest: {bytes} bytes by pid {} {comm}", info.pid.unwrap_or(0));
    }
    Ok(Output { text, json: json!({ "tasks": rows, "overflows": bad }) })
}
