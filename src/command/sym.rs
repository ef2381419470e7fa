//! `sym`: symbols by name and by address.

use super::args::Options;
use super::expression::address;
use super::{Command, CommandError, Context, Output, printable};
use crate::addr::VirtAddr;
use crate::debuginfo::Symbol;
use crate::kernel::Kernel;
use crate::kernel::percpu::PerCpuOwner;
use serde_json::{Value, json};
use std::fmt::Write;

pub const COMMAND: Command = Command {
    name: "sym",
    arguments: "[-l | -q TEXT | [-n|-p] SYMBOL|ADDR…]",
    summary: "symbol of an address, address of a symbol",
    help: "A name is looked up first, then a hexadecimal number is taken for an address. An address in per-CPU memory is \
           told with its CPU; a per-CPU symbol's own address is that of the template.\n\n\
           -l        all symbols of the kernel image\n\
           -q TEXT   symbols with TEXT in their names\n\
           -n, -p    the next or previous symbol, too\n\n\
           Examples:\n  sym schedule\n  sym ffffffff81000123\n  sym -q vmalloc_base\n  sym -n $rip\n",
    run,
};

/// Symbols in one answer: more than any kernel has.
const SYMBOLS_MAX: usize = 1 << 20;

fn run(context: &Context<'_>, arguments: &[&str]) -> Result<Output, CommandError> {
    let options = Options::read("sym", &["l", "q:", "n", "p"], true, arguments)?;
    let kernel = context.kernel()?;
    let mut list = List { kernel, text: String::new(), rows: Vec::new() };
    let symbols = || kernel.symbols().map_err(|why| CommandError(why.to_string()));
    if options.has("l") || options.has("q") {
        let wanted = options.value("q").unwrap_or_default();
        for symbol in symbols()?.iter().filter(|symbol| symbol.name.contains(wanted)).take(SYMBOLS_MAX) {
            list.add(&symbol);
        }
        if list.rows.is_empty() {
            return Err(CommandError(format!("no symbol has '{}' in its name", printable(wanted))));
        }
        return Ok(list.output());
    }
    if options.rest.is_empty() {
        return Err(CommandError("which symbol? try 'help sym'".into()));
    }
    for argument in &options.rest {
        let before = list.rows.len();
        // Static functions and variables share names: all are shown.
        if kernel.symbol(argument).is_some() {
            for symbol in symbols()?.iter().filter(|symbol| symbol.name == *argument) {
                list.add(&symbol);
            }
        }
        if list.rows.len() == before {
            list.address(address(context, argument)?)?;
        }
        if options.has("n") || options.has("p") {
            let at = list
                .rows
                .last()
                .and_then(|row| row["address"].as_str()?.strip_prefix("0x").map(str::to_owned));
            let at = at.and_then(|at| u64::from_str_radix(&at, 16).ok()).unwrap_or(0);
            let by_address = || symbols().map(|symbols| symbols.iter().map(|s| (kernel.slide(s.addr).0, s)));
            if options.has("p")
                && let Some((_, symbol)) =
                    by_address()?.filter(|(other, _)| *other < at).max_by_key(|(at, _)| *at)
            {
                list.add(&symbol);
            }
            if options.has("n")
                && let Some((_, symbol)) =
                    by_address()?.filter(|(other, _)| *other > at).min_by_key(|(at, _)| *at)
            {
                list.add(&symbol);
            }
        }
    }
    Ok(list.output())
}

struct List<'k> {
    kernel: &'k Kernel,
    text: String,
    rows: Vec<Value>,
}

impl List<'_> {
    fn add(&mut self, symbol: &Symbol<'_>) {
        let at = self.kernel.slide(symbol.addr);
        let per_cpu = self.kernel.is_per_cpu(at);
        let note = per_cpu.then_some("per-CPU");
        let _ = writeln!(
            self.text,
            "{:x} ({}) {}{}",
            at.0,
            symbol.letter,
            printable(symbol.name),
            note.map_or(String::new(), |note| format!("  ({note})"))
        );
        self.rows.push(json!({
            "address": at.to_string(),
            "name": symbol.name,
            "offset": 0,
            "cpu": Value::Null,
            "letter": symbol.letter.to_string(),
        }));
    }

    fn row(&mut self, at: VirtAddr, name: &str, offset: u64, cpu: Option<u32>, note: Option<&str>) {
        let beyond = if offset == 0 { String::new() } else { format!("+{offset:#x}") };
        let on = cpu.map_or(String::new(), |cpu| format!(" cpu {cpu}"));
        let note = note.map_or(String::new(), |note| format!("  ({note})"));
        let _ = writeln!(self.text, "{:x} {}{beyond}{on}{note}", at.0, printable(name));
        self.rows.push(json!({ "address": at.to_string(), "name": name, "offset": offset, "cpu": cpu }));
    }

    fn address(&mut self, at: VirtAddr) -> Result<(), CommandError> {
        if let Some(place) = self.kernel.per_cpu_reverse(at) {
            let (name, note) = match place.owner {
                PerCpuOwner::Variable(name) => (name, None),
                PerCpuOwner::Module(name) => (name, Some("per-CPU memory of a module")),
                PerCpuOwner::Allocated => ("__percpu", Some("per-CPU memory")),
            };
            self.row(at, name, place.offset, Some(place.cpu.0), note);
            return Ok(());
        }
        let Some(found) = self.kernel.symbolize(at) else {
            return Err(CommandError(format!("{at} is in no symbol that is known; see 'why {at}'")));
        };
        let note = match found.module {
            Some(module) => Some(module),
            None => self.kernel.is_per_cpu(at).then_some("per-CPU"),
        };
        self.row(at, found.name, found.offset, None, note);
        Ok(())
    }

    fn output(self) -> Output {
        Output { text: self.text, json: json!({ "symbols": self.rows }) }
    }
}
