//! `sym`: symbols by name and by address.

use super::args::Options;
use super::dis::source_line;
use super::expression::address;
use super::{Command, CommandError, Context, Form, Output, printable};
use crate::addr::VirtAddr;
use crate::debuginfo::Symbol;
use crate::kernel::Kernel;
use crate::kernel::percpu::PerCpuOwner;
use serde_json::{Value, json};
use std::fmt::Write;

pub const COMMAND: Command = Command {
    name: "sym",
    arguments: "[-l | -q TEXT | -m MODULE | [-n|-p] SYMBOL|ADDR…]",
    summary: "symbol of an address, address of a symbol",
    help: "A name is looked up first, then a hexadecimal number is taken for an address. Behind the address stands the \
           letter that nm has for the symbol; behind the name its module, and the source line, if the vmlinux tells. An \
           address in per-CPU memory is told with its CPU; a per-CPU symbol's own address is that of the template.\n\n\
           -l          all symbols of the kernel image and its modules\n\
           -q TEXT     those with TEXT in their names\n\
           -m MODULE   those of a module\n\
           -n, -p      the next or previous symbol, too\n\n\
           Examples:\n  sym schedule\n  sym ffffffff81000123\n  sym -q vmalloc_base\n  sym -n $rip\n",
    run,
};

/// Symbols in one answer: more than any kernel has.
const SYMBOLS_MAX: usize = 1 << 20;

/// One line of the answer.
#[derive(Clone)]
struct Row<'k> {
    at: VirtAddr,
    name: &'k str,
    offset: u64,
    module: Option<&'k str>,
    letter: Option<char>,
    /// Of a place in per-CPU memory.
    cpu: Option<u32>,
}

impl<'k> Row<'k> {
    fn of(symbol: Symbol<'k>, at: VirtAddr, module: Option<&'k str>) -> Self {
        Self { at, name: symbol.name, offset: 0, module, letter: Some(symbol.letter), cpu: None }
    }
}

fn run(context: &Context<'_>, arguments: &[&str]) -> Result<Output, CommandError> {
    let options = Options::read("sym", &["l", "q:", "m:", "n", "p"], true, arguments)?;
    let kernel = context.kernel()?;
    let (text, module) = (options.value("q"), options.value("m"));
    if options.has("l") || text.is_some() || module.is_some() {
        let wanted = |row: &Row<'_>| {
            text.is_none_or(|text| row.name.contains(text))
                && module.is_none_or(|name| row.module == Some(name))
        };
        let rows: Vec<Row<'_>> = all(kernel)?.filter(wanted).take(SYMBOLS_MAX).collect();
        if rows.is_empty() {
            return Err(CommandError("there is no such symbol; 'sym -l' lists all".into()));
        }
        return Ok(output(kernel, &rows, false, context.form));
    }
    if options.rest.is_empty() {
        return Err(CommandError("which symbol? try 'help sym'".into()));
    }
    let mut rows = Vec::new();
    for argument in &options.rest {
        let before = rows.len();
        // Static functions and variables share names: all are shown.
        if kernel.symbol_anywhere(argument).is_some() {
            rows.extend(all(kernel)?.filter(|row| row.name == *argument));
        }
        if rows.len() == before {
            rows.push(by_address(kernel, address(context, argument)?)?);
        }
        let at = rows.last().map_or(VirtAddr(0), |row| row.at);
        if options.has("p") {
            rows.extend(all(kernel)?.filter(|row| row.at < at).max_by_key(|row| row.at));
        }
        if options.has("n") {
            rows.extend(all(kernel)?.filter(|row| row.at > at).min_by_key(|row| row.at));
        }
    }
    Ok(output(kernel, &rows, true, context.form))
}

/// Every symbol of the image, by address, then those of the modules.
fn all(kernel: &Kernel) -> Result<impl Iterator<Item = Row<'_>>, CommandError> {
    let image = kernel.symbols().map_err(|why| CommandError(why.to_string()))?;
    let of_modules = kernel.modules().list.iter().flat_map(move |module| {
        let symbols = kernel.module_symbols(module).iter();
        symbols.map(move |symbol| Row::of(symbol, VirtAddr(symbol.addr), Some(&module.name)))
    });
    Ok(image.iter().map(move |symbol| Row::of(symbol, kernel.slide(symbol.addr), None)).chain(of_modules))
}

fn by_address(kernel: &Kernel, at: VirtAddr) -> Result<Row<'_>, CommandError> {
    let row = |name, offset, module, cpu| Row { at, name, offset, module, letter: None, cpu };
    if let Some(place) = kernel.per_cpu_reverse(at) {
        let (name, module) = match place.owner {
            PerCpuOwner::Variable { name, module } => (name, module),
            PerCpuOwner::Module(module) => ("__percpu", Some(module)),
            PerCpuOwner::Allocated => ("__percpu", None),
        };
        return Ok(row(name, place.offset, module, Some(place.cpu.0)));
    }
    match kernel.symbolize(at).or_else(|| kernel.per_cpu_symbol(at)) {
        Some(found) => Ok(row(found.name, found.offset, found.module, None)),
        None => Err(CommandError(format!("{at} is in no symbol that is known; see 'why {at}'"))),
    }
}

fn output(kernel: &Kernel, rows: &[Row<'_>], with_lines: bool, form: Form) -> Output {
    let mut text = String::new();
    let mut json = Vec::new();
    for row in rows {
        let line = if with_lines && row.cpu.is_none() { source_line(kernel, row.at) } else { None };
        if form.has_text() {
            let letter = row.letter.map_or(String::new(), |letter| format!("({letter}) "));
            let _ = write!(text, "{:x} {letter}{}", row.at.0, printable(row.name));
            if row.offset != 0 {
                let _ = write!(text, "+{:#x}", row.offset);
            }
            if let Some(cpu) = row.cpu {
                let _ = write!(text, " cpu {cpu}");
            } else if kernel.is_per_cpu(row.at) {
                text.push_str(" (per-CPU)");
            }
            if let Some(module) = row.module {
                let _ = write!(text, " [{}]", printable(module));
            }
            if let Some(line) = &line {
                let _ = write!(text, " {}", printable(line));
            }
            text.push('\n');
        }
        if form.has_json() {
            json.push(json!({
                "address": row.at.to_string(),
                "name": row.name,
                "offset": row.offset,
                "module": row.module,
                "letter": row.letter.map(String::from),
                "cpu": row.cpu,
                "line": line,
            }));
        }
    }
    Output { text, json: json!({ "symbols": Value::Array(json) }) }
}
