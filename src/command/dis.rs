//! `dis`: machine code as the memory holds it, which is as the kernel patched it.

use super::args::{Options, count};
use super::expression::address;
use super::{Command, CommandError, Context, Output, printable, source};
use crate::addr::VirtAddr;
use crate::arch::x86_64::disasm::{self, Instruction, LEN_MAX, Reference, Syntax};
use crate::kernel::Kernel;
use serde_json::json;
use std::fmt::Write;

pub const COMMAND: Command = Command {
    name: "dis",
    arguments: "[-r|-f] [-l|-s] [-u] [-d] [-i] ADDR|SYMBOL [COUNT]",
    summary: "disassemble a function or what is at an address",
    help: "A function by name is shown as a whole, an address alone as one instruction, unless COUNT says how many. The \
           code is what the memory holds: with alternatives, static keys, ftrace and breakpoints as they are.\n\n\
           Behind '#' stands what an operand is: the variable behind an address relative to rip, the per-CPU variable \
           behind one relative to gs.\n\n\
           -r   from the start of the function to ADDR\n\
           -f   from ADDR to the end of the function\n\
           -l   source lines, by the vmlinux's DWARF, or that of the module's debug file\n\
           -s   the function's source in place of code: to the line of ADDR, or all of it. Sources are looked for in \
           the directories of --debug-dir, beside the dump and in /usr/src\n\
           -u   ADDR is in the user memory of the task on the selected CPU\n\
           -d   offsets in decimal, as crash has them (-x: in hexadecimal, the default)\n\
           -i   Intel's syntax\n\n\
           Examples:\n  dis schedule\n  dis schedule+0x20 5\n  dis -r $rip\n  dis -s $rip\n",
    run,
};

/// Instructions in one answer; no function has more.
const COUNT_MAX: usize = 1 << 16;
/// Bytes decoded at once: an instruction that is cut off is decoded anew with what follows.
const PIECE: u64 = 4096;

fn run(context: &Context<'_>, arguments: &[&str]) -> Result<Output, CommandError> {
    let options = Options::read("dis", &["r", "f", "l", "s", "u", "x", "d", "i"], true, arguments)?;
    let (place, wanted) = match options.rest.as_slice() {
        [] => return Err(CommandError("disassemble what? try 'help dis'".into())),
        [place @ .., last] if !place.is_empty() && last.bytes().all(|b| b.is_ascii_digit()) => {
            (place.join(" "), Some(count(last)?))
        }
        place => (place.join(" "), None),
    };
    let kernel = context.kernel()?;
    let at = address(context, &place)?;
    let code = Code { context, kernel, user: options.has("u"), syntax: syntax(&options) };
    let symbol = if code.user { None } else { kernel.symbolize(at) };
    let start = symbol.as_ref().map(|symbol| VirtAddr(at.0.wrapping_sub(symbol.offset)));
    let function =
        || start.ok_or_else(|| CommandError(format!("{at} is in no function that is known; give a COUNT")));
    let is_name = kernel.symbol_anywhere(&place) == Some(at);
    let source = options.has("s") && !code.user;
    let (from, wanted) = match (options.has("r"), options.has("f"), wanted) {
        _ if source => (function()?, COUNT_MAX),
        (true, ..) => (function()?, COUNT_MAX),
        (false, true, _) => (at, COUNT_MAX),
        (false, false, Some(wanted)) => {
            (at, usize::try_from(wanted).unwrap_or(COUNT_MAX).clamp(1, COUNT_MAX))
        }
        (false, false, None) => (at, if is_name && start == Some(at) { COUNT_MAX } else { 1 }),
    };
    let in_function = wanted == COUNT_MAX;
    if in_function {
        function()?;
    }
    let goes_on = |one: &Instruction| {
        let here = VirtAddr(one.at);
        let same =
            || kernel.symbolize(here).is_some_and(|s| Some(VirtAddr(here.0.wrapping_sub(s.offset))) == start);
        !in_function || (!options.has("r") || here <= at) && same()
    };
    let (instructions, problem) = code.instructions(from, wanted, &goes_on);
    if let (Some(why), true) = (&problem, instructions.is_empty()) {
        return Err(CommandError(why.clone()));
    }
    if source {
        let all: Vec<VirtAddr> = instructions.iter().map(|one| VirtAddr(one.at)).collect();
        return source::show(kernel, &all, (start != Some(at)).then_some(at));
    }
    let mut text = String::new();
    let mut rows = Vec::new();
    let mut line = None;
    let mut any_line = false;
    for one in &instructions {
        if options.has("l") {
            let here = if code.user { None } else { source_line(kernel, VirtAddr(one.at)) };
            if let (Some(here), true) = (&here, here != line) {
                let _ = writeln!(text, "{}", printable(here));
            }
            any_line |= here.is_some();
            line = here;
        }
        let symbol = if code.user { None } else { code.name(VirtAddr(one.at), options.has("d")) };
        let name = symbol.as_ref().map_or(String::new(), |name| format!(" <{name}>"));
        let target = code.target(one);
        let note = match (&target, one.refers_to) {
            (Some(name), Some(Reference::Branch(_))) => format!(" <{name}>"),
            (Some(name), Some(Reference::Memory(at))) => format!("  # {at:#x} <{name}>"),
            (Some(name), _) => format!("  # <{name}>"),
            (None, Some(Reference::Memory(at))) if one.text.contains("rip") => format!("  # {at:#x}"),
            (None, _) => String::new(),
        };
        let _ = writeln!(text, "{:#x}{name}:\t{}{note}", one.at, one.text);
        let bytes = one.bytes.iter().fold(String::new(), |hex, byte| format!("{hex}{byte:02x}"));
        rows.push(json!({
            "address": format!("{:#x}", one.at),
            "symbol": symbol,
            "bytes": bytes,
            "text": one.text,
            "refers_to": target,
            "line": line,
        }));
    }
    if let Some(why) = &problem {
        let _ = writeln!(text, "{why}");
    }
    let note = (options.has("l") && !any_line && !code.user).then(|| kernel.why_no_lines(from));
    if let Some(note) = &note {
        let _ = writeln!(text, "{note}");
    }
    Ok(Output { text, json: json!({ "instructions": rows, "problem": problem, "note": note }) })
}

/// `FILE: LINE` of an instruction of the kernel, as crash has it.
pub fn source_line(kernel: &Kernel, at: VirtAddr) -> Option<String> {
    let place = kernel.locate(at)?.into_iter().next()?;
    Some(format!("{}: {}", place.file?, place.line?))
}

fn syntax(options: &Options<'_>) -> Syntax {
    if options.has("i") { Syntax::Intel } else { Syntax::Att }
}

struct Code<'a, 'k> {
    context: &'a Context<'k>,
    kernel: &'k Kernel,
    user: bool,
    syntax: Syntax,
}

impl Code<'_, '_> {
    /// At most `wanted` instructions from `from`, as long as they go on, and what kept more from being read.
    fn instructions(
        &self,
        from: VirtAddr,
        wanted: usize,
        goes_on: &dyn Fn(&Instruction) -> bool,
    ) -> (Vec<Instruction>, Option<String>) {
        let mut all: Vec<Instruction> = Vec::new();
        let mut at = from;
        loop {
            let mut code = vec![0; PIECE.min(LEN_MAX * (wanted - all.len()) as u64) as usize];
            let read = self.context.machine.read_virt(self.context.cpu, at, &mut code);
            code.truncate(read.filled);
            let piece = disasm::decode(&code, at.0, self.syntax);
            let before = all.len();
            for one in piece {
                if all.len() == wanted || !goes_on(&one) {
                    return (all, None);
                }
                at = VirtAddr(one.at).wrapping_add(one.bytes.len() as u64);
                all.push(one);
            }
            if all.len() == wanted {
                return (all, None);
            }
            if let (Some(why), true) = (&read.stopped, all.len() == before || read.filled == 0) {
                return (all, Some(format!("the code at {at} cannot be read: {why}")));
            }
            if all.len() == before {
                return (all, Some(format!("there is no instruction at {at}")));
            }
        }
    }

    fn name(&self, at: VirtAddr, decimal: bool) -> Option<String> {
        if !decimal {
            return self.kernel.describe_address(at);
        }
        let found = self.kernel.symbolize(at)?;
        let name = printable(found.name);
        let module = found.module.map_or(String::new(), |m| format!(" [{}]", printable(m)));
        Some(if found.offset == 0 { name + &module } else { format!("{name}+{}{module}", found.offset) })
    }

    /// The symbol that an instruction refers to.
    fn target(&self, one: &Instruction) -> Option<String> {
        if self.user {
            return None;
        }
        match one.refers_to? {
            Reference::Branch(at) | Reference::Memory(at) | Reference::Immediate(at) => {
                self.kernel.describe_address(VirtAddr(at))
            }
            Reference::Gs(at) => {
                let found = self.kernel.per_cpu_symbol(VirtAddr(at))?;
                let name = printable(found.name);
                Some(if found.offset == 0 { name } else { format!("{name}+{:#x}", found.offset) })
            }
        }
    }
}
