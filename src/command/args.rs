//! What users type for an address.

use super::{CommandError, Context, printable};
use crate::addr::{PhysAddr, VirtAddr};
use crate::arch::x86_64::Reg;
use crate::kernel::Object;

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
fn register(context: &Context<'_>, name: &str) -> Result<VirtAddr, CommandError> {
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
        Some((name, offset)) => Some(kernel.symbol(name)?.wrapping_add(hex(offset)?)),
        None => kernel.symbol(text),
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
