//! What users type for an address.

use super::{CommandError, Context, printable};
use crate::addr::{PhysAddr, VirtAddr};
use crate::arch::x86_64::Reg;
use crate::kernel::cpus::POSSIBLE;
use crate::kernel::{CpuId, Object};

/// An address as typed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Address {
    /// `ADDR`, `SYMBOL`, `SYMBOL+OFFSET` or `$REGISTER`.
    Virtual(VirtAddr),
    /// `phys:ADDR`.
    Physical(PhysAddr),
}

/// Parses an address. Numbers are hexadecimal with or without `0x`, as in crash.
pub fn address(context: &Context<'_>, text: &str) -> Result<Address, CommandError> {
    if let Some(number) = text.strip_prefix("phys:") {
        return match hex(number) {
            Some(at) => Ok(Address::Physical(PhysAddr(at))),
            None => Err(CommandError(format!("'{}' is not a hexadecimal address", printable(number)))),
        };
    }
    if let Some(name) = text.strip_prefix('$') {
        return register(context, name).map(Address::Virtual);
    }
    if let Some(at) = symbol(context, text).or_else(|| hex(text).map(VirtAddr)) {
        return Ok(Address::Virtual(at));
    }
    let without_symbols = context.machine.kernel().is_none_or(|kernel| kernel.symbols().is_err());
    let cure = if without_symbols { " (no symbols: pass --vmlinux FILE to name some)" } else { "" };
    Err(CommandError(format!(
        "'{}' is neither a hexadecimal address nor a symbol{cure}; use ADDR, SYMBOL+OFFSET, $REGISTER or phys:ADDR",
        printable(text)
    )))
}

fn hex(text: &str) -> Option<u64> {
    let digits = text.strip_prefix("0x").unwrap_or(text);
    // from_str_radix would take a sign.
    if digits.starts_with(['+', '-']) { None } else { u64::from_str_radix(digits, 16).ok() }
}

/// gdb sends `monitor why $rip` as typed, so registers are resolved here, on the selected CPU.
pub fn register(context: &Context<'_>, name: &str) -> Result<VirtAddr, CommandError> {
    let wanted = match name {
        "pc" => "rip",
        "sp" => "rsp",
        "fp" => "rbp",
        other => other,
    };
    let reg = Reg::ALL.iter().find(|reg| reg.name() == wanted);
    let reg = reg.ok_or_else(|| CommandError(format!("there is no register '${}'", printable(name))))?;
    let value = context.machine.cpu(context.cpu).and_then(|cpu| cpu.regs.u64(*reg));
    value.map(VirtAddr).ok_or_else(|| CommandError(format!("${name} of CPU {} was not saved", context.cpu)))
}

/// A symbol's run-time address; one that is all hex digits (`add`, `fee`) wins over the number, as in crash.
fn symbol(context: &Context<'_>, text: &str) -> Option<VirtAddr> {
    let kernel = context.machine.kernel()?;
    match text.split_once('+') {
        Some((name, offset)) => Some(kernel.symbol_anywhere(name)?.wrapping_add(hex(offset)?)),
        None => kernel.symbol_anywhere(text),
    }
}

/// A task as typed: its pid in decimal, or the address of its `struct task_struct` in hexadecimal, as in crash.
pub fn task<'a>(context: &Context<'a>, text: &str) -> Result<Object<'a>, CommandError> {
    let kernel = context.kernel()?;
    if let Ok(pid) = text.parse::<i32>()
        && let Some(task) = kernel.find_task(pid)?
    {
        return Ok(task);
    }
    let by_address = hex(text).map(VirtAddr);
    let found = kernel.tasks()?.tasks.into_iter().find(|task| Some(task.at) == by_address);
    found.ok_or_else(|| {
        CommandError(format!(
            "'{}' is neither a pid nor the address of a task; 'ps' lists them",
            printable(text)
        ))
    })
}

/// What a command was given, options apart from the rest.
pub struct Options<'a> {
    found: Vec<(&'static str, &'a str)>,
    /// What is no option.
    pub rest: Vec<&'a str>,
}

impl<'a> Options<'a> {
    /// Reads `arguments` as `getopt` does. `known` are the options without their `-`, those that take a value with a
    /// `:` behind them; letters may stand in one word. With `anywhere` they may stand behind other arguments, too; a
    /// number with a minus is no option.
    pub fn read(
        command: &str,
        known: &[&'static str],
        anywhere: bool,
        arguments: &[&'a str],
    ) -> Result<Self, CommandError> {
        let mut read = Self { found: Vec::new(), rest: Vec::new() };
        let mut words = arguments.iter().copied();
        while let Some(word) = words.next() {
            let flag = word.strip_prefix('-').filter(|flag| !flag.is_empty());
            let is_number = || flag.is_some_and(|flag| flag.starts_with(|c: char| c.is_ascii_digit()));
            let exact = flag.and_then(|flag| known.iter().find(|one| one.trim_end_matches(':') == flag));
            let Some(flag) = flag.filter(|_| exact.is_some() || !is_number()) else {
                read.rest.push(word);
                if !anywhere {
                    read.rest.extend(words);
                    break;
                }
                continue;
            };
            let unknown = || {
                CommandError(format!("'{command}' has no option '{}'; try 'help {command}'", printable(word)))
            };
            let letters: Vec<&'static str> = match exact {
                Some(one) => vec![one],
                None => {
                    let letter = |c: char| {
                        known.iter().copied().find(|one| one.trim_end_matches(':') == c.to_string())
                    };
                    flag.chars().map(letter).collect::<Option<_>>().ok_or_else(unknown)?
                }
            };
            for one in letters {
                let missing = || {
                    CommandError(format!(
                        "'-{}' wants a value; try 'help {command}'",
                        one.trim_end_matches(':')
                    ))
                };
                let value = if one.ends_with(':') { words.next().ok_or_else(missing)? } else { "" };
                read.found.push((one.trim_end_matches(':'), value));
            }
        }
        Ok(read)
    }

    /// Whether option `name` was given.
    pub fn has(&self, name: &str) -> bool {
        self.value(name).is_some()
    }

    /// The last value of option `name`.
    pub fn value(&self, name: &str) -> Option<&'a str> {
        self.found.iter().rev().find(|(one, _)| *one == name).map(|(_, value)| *value)
    }

    /// All values of option `name`.
    pub fn values(&self, name: &str) -> impl Iterator<Item = &'a str> {
        self.found.iter().filter(move |(one, _)| *one == name).map(|(_, value)| *value)
    }
}

/// A count as typed: decimal, or hexadecimal with 0x.
pub fn count(text: &str) -> Result<u64, CommandError> {
    let parsed = match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    };
    parsed.map_err(|_| CommandError(format!("'{}' is not a count", printable(text))))
}

/// A hexadecimal number, with or without 0x.
pub fn hexadecimal(text: &str) -> Result<u64, CommandError> {
    hex(text).ok_or_else(|| CommandError(format!("'{}' is not a hexadecimal number", printable(text))))
}

/// A CPU that the kernel can have, as typed: its number, with or without `cpu` before it.
pub fn number_of_cpu(context: &Context<'_>, text: &str) -> Result<CpuId, CommandError> {
    let digits = text.strip_prefix("cpu").unwrap_or(text);
    let id = digits.parse().map(CpuId);
    let id = id.map_err(|_| CommandError(format!("'{}' is not the number of a CPU", printable(text))))?;
    let possible = context.kernel()?.cpu_mask(&POSSIBLE).unwrap_or_default();
    match possible.contains(&id) {
        true => Ok(id),
        false => Err(CommandError(format!("there is no CPU {id}; 'info' lists them"))),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use super::*;

    #[test]
    fn options_apart_from_the_rest() {
        let known = ["x", "o:", "16", "s"];
        let read = Options::read("t", &known, true, &["a", "-xs", "-o", "-8", "-1", "b", "-16"]).unwrap();
        assert_eq!(read.rest, ["a", "-1", "b"]);
        assert_eq!((read.has("x"), read.has("s"), read.has("16")), (true, true, true));
        assert_eq!(read.value("o"), Some("-8"));
        let read = Options::read("t", &known, false, &["-x", "a", "-", "-s"]).unwrap();
        assert_eq!((read.has("s"), read.rest), (false, vec!["a", "-", "-s"]));
        for wrong in [&["-y"][..], &["-o"], &["-xy"]] {
            assert!(Options::read("t", &known, true, wrong).is_err(), "{wrong:?}");
        }
    }
}
