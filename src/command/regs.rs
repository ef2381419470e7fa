//! `regs`: the registers of the selected CPU, each with how it is known.

use super::{Command, CommandError, Context, Output, about, cpu, cpu_argument};
use crate::addr::VirtAddr;
use crate::arch::x86_64::{Reg, Saved};
use serde_json::json;
use std::fmt::Write;

pub const COMMAND: Command = Command {
    name: "regs",
    arguments: "[CPU]",
    summary: "registers of a CPU: saved, derived or not saved",
    help: "Without a number it is the CPU selected in gdb ('thread N' selects CPU N-1, if none is missing).\n\n\
           A register that is not there is 'not saved', never zero. A derived value says from what it follows.\n\n\
           Examples:\n  regs\n  regs 2\n",
    run,
};

fn run(context: &Context<'_>, arguments: &[&str]) -> Result<Output, CommandError> {
    let cpu = match arguments {
        [] => cpu(context.machine, context.cpu)?,
        [number] => cpu_argument(context, number)?,
        _ => return Err(CommandError("'regs' takes at most one CPU; try 'help regs'".into())),
    };
    let mut text = about(cpu);
    let mut json = serde_json::Map::new();
    let mut not_saved = Vec::new();
    for reg in Reg::ALL {
        let width = reg.bytes() * 2;
        match cpu.regs.get(reg) {
            Saved::NotSaved => {
                not_saved.push(reg.name());
                json.insert(reg.name().into(), json!({ "status": "not saved" }));
            }
            Saved::Known(value) => {
                let _ = writeln!(
                    text,
                    "  {:<9} {value:#0w$x}{}",
                    reg.name(),
                    place(context, reg, value),
                    w = width + 2
                );
                json.insert(reg.name().into(), json!({ "status": "known", "value": format!("{value:#x}") }));
            }
            Saved::Derived(value, from) => {
                let _ = writeln!(text, "  {:<9} {value:#0w$x}  (derived {from})", reg.name(), w = width + 2);
                let value = format!("{value:#x}");
                json.insert(reg.name().into(), json!({ "status": "derived", "value": value, "from": from }));
            }
        }
    }
    if !not_saved.is_empty() {
        let _ = writeln!(text, "  not saved: {}", ranges_of_names(&not_saved));
    }
    Ok(Output { text, json: json!({ "cpu": cpu.id.0, "registers": json }) })
}

/// Where rip points, as a symbol.
fn place(context: &Context<'_>, reg: Reg, value: u128) -> String {
    let at = u64::try_from(value).ok().filter(|_| reg == Reg::Rip).map(VirtAddr);
    let symbol = at.and_then(|at| context.machine.kernel()?.symbolize(at));
    symbol.map_or(String::new(), |symbol| format!("  {symbol}"))
}

/// `xmm0 xmm1 … xmm15` as `xmm0-xmm15`.
fn ranges_of_names(names: &[&str]) -> String {
    let split = |name: &str| {
        let digits = name.len() - name.bytes().rev().take_while(u8::is_ascii_digit).count();
        (name[..digits].to_owned(), name[digits..].parse::<u32>().ok())
    };
    let mut out: Vec<(String, Option<u32>, u32)> = Vec::new();
    for name in names {
        let (stem, number) = split(name);
        match (out.last_mut(), number) {
            (Some((last, Some(first), count)), Some(n)) if *last == stem && *first + *count == n => {
                *count += 1
            }
            _ => out.push((stem, number, 1)),
        }
    }
    let name = |stem: &str, number: Option<u32>| number.map_or(stem.to_owned(), |n| format!("{stem}{n}"));
    let shown = out.iter().map(|(stem, first, count)| match (first, count) {
        (Some(first), 2..) => format!("{}-{}", name(stem, Some(*first)), name(stem, Some(first + count - 1))),
        _ => name(stem, *first),
    });
    shown.collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_names_fold() {
        assert_eq!(
            ranges_of_names(&["cr8", "efer", "st0", "st1", "st2", "fctrl"]),
            "cr8, efer, st0-st2, fctrl"
        );
    }
}
