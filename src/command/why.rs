//! `why`: where an address leads, level by level, and why it cannot be read.

use super::args::{self, Address};
use super::expression::place;
use super::{Command, CommandError, Context, Output, about, cpu, cpu_argument};
use crate::kernel::Why;
use serde_json::json;
use std::fmt::Write;

pub const COMMAND: Command = Command {
    name: "why",
    arguments: "[-c CPU] ADDR",
    summary: "where an address leads, and why it cannot be read",
    help: "ADDR is a hexadecimal address, SYMBOL, SYMBOL+OFFSET, $REGISTER, phys:ADDR or an expression. User addresses and registers \
           are those of the CPU selected in gdb, or of the one after -c.\n\n\
           An unreadable page is one of: excluded by the dump's filter; zero or excluded (makedumpfile's ELF \
           cannot tell); not RAM; corrupt; truncated; not mapped, at the level named.\n\n\
           Examples:\n  why 0xffff888000001000\n  why init_task\n  why phys:1000\n  why $rsp\n  why -c 2 $rsp\n",
    run,
};

fn run(context: &Context<'_>, arguments: &[&str]) -> Result<Output, CommandError> {
    let (argument, cpu) = match arguments {
        ["-c", number, argument] => (argument, cpu_argument(context, number)?),
        [argument] if !argument.starts_with('-') => (argument, cpu(context.machine, context.cpu)?),
        _ => {
            return Err(CommandError("'why' takes one address, and -c CPU before it; try 'help why'".into()));
        }
    };
    let context = &Context { cpu: cpu.id, task: context.task.filter(|_| cpu.id == context.cpu), ..*context };
    match place(context, argument)? {
        Address::Physical(at) => {
            let error = context.machine.why_phys(at);
            let verdict = error.as_ref().map_or_else(|| format!("{at} is readable"), ToString::to_string);
            let status = error.as_ref().map_or("readable", |error| error.why.kind());
            let json = json!({ "physical": format!("{at}"), "status": status, "text": verdict });
            Ok(Output { text: format!("{verdict}\n"), json })
        }
        Address::Virtual(at) => {
            let why = context.machine.why(context.cpu, at);
            let in_kernel = context.machine.kernel().is_some() && at.0 >> 63 == 1;
            let is_fixed = args::address(context, argument) == Ok(Address::Virtual(at));
            let depends_on_cpu = argument.starts_with('$') || !in_kernel || !is_fixed;
            let headline = if depends_on_cpu { about(cpu) } else { String::new() };
            let text = headline + &render(context, at, &why);
            let status = match (&why.translation, &why.unreadable) {
                (Err(error), _) => error.kind(),
                (Ok(_), Some(error)) => error.why.kind(),
                (Ok(_), None) => "readable",
            };
            let steps = why.steps.iter().map(|step| {
                json!({ "level": step.level.name(why.levels), "at": format!("{}", step.at), "entry": format!("{:#x}", step.entry) })
            });
            let json = json!({
                "cpu": cpu.id.0,
                "virtual": format!("{at}"),
                "tables": why.tables,
                "steps": steps.collect::<Vec<_>>(),
                "physical": why.translation.as_ref().ok().map(|t| format!("{}", t.phys)),
                "status": status,
                "text": verdict(&why),
            });
            Ok(Output { text, json })
        }
    }
}

fn render(context: &Context<'_>, at: crate::addr::VirtAddr, why: &Why) -> String {
    let mut text = format!("{at}");
    if let Some(name) = context.machine.kernel().and_then(|kernel| kernel.describe_address(at)) {
        let _ = write!(text, " <{name}>");
    }
    if !why.steps.is_empty() {
        let _ = write!(text, ", through {}", super::printable(&why.tables));
    }
    text.push('\n');
    for step in &why.steps {
        let _ = writeln!(
            text,
            "  {:<3} at {:#014x}: {:#018x}",
            step.level.name(why.levels),
            step.at.0,
            step.entry
        );
    }
    if let Ok(t) = &why.translation {
        let size = match t.page_size {
            0x1000 => "4 KiB",
            0x20_0000 => "2 MiB",
            _ => "1 GiB",
        };
        let _ = writeln!(text, "  physical {} in a {size} page", t.phys);
    }
    let _ = writeln!(text, "{}", super::printable(&verdict(why)));
    text
}

fn verdict(why: &Why) -> String {
    match (&why.translation, &why.unreadable) {
        (Err(error), _) => format!("unreadable: {error}"),
        (Ok(_), Some(error)) => format!("unreadable: {error}"),
        (Ok(_), None) => "readable".to_owned(),
    }
}
