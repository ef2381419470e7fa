//! `log`: the kernel's message buffer.

use super::{Command, CommandError, Context, Output, printable};
use crate::kernel::printk::{Caller, LEVELS, Record};
use crate::kernel::time::Date;
use serde_json::json;
use std::fmt::Write;

pub const COMMAND: Command = Command {
    name: "log",
    arguments: "[-T|-t] [-m] [-c] [-l LEVEL[,LEVEL]...]",
    summary: "print the kernel's message buffer (dmesg)",
    help: "Times are seconds since boot. Works without symbols: VMCOREINFO describes the buffer.\n\n\
           -T        dates in UTC, as far as the clock was not set since\n\
           -t        no times\n\
           -m        <PRIORITY> first: eight times the facility, plus the level\n\
           -c        who said it: T and a pid, or C and a CPU\n\
           -l LEVEL  only these: emerg, alert, crit, err, warn, notice, info, debug, or 0 to 7; err+ is err and all \
           that is worse\n\n\
           Examples:\n  log\n  log -T -l err+\n  log -c\n",
    run,
};

#[derive(Default)]
struct Style {
    /// The wall clock when the kernel booted, in nanoseconds since 1970.
    booted: Option<u64>,
    no_times: bool,
    priority: bool,
    caller: bool,
    levels: Option<Vec<u8>>,
}

fn run(context: &Context<'_>, arguments: &[&str]) -> Result<Output, CommandError> {
    let kernel = context.kernel()?;
    let (mut style, mut note) = (Style::default(), String::new());
    let mut words = arguments.iter();
    while let Some(&word) = words.next() {
        match word {
            "-T" => match kernel.clock() {
                Ok(clock) => style.booted = Some(clock.real.saturating_sub(clock.monotonic)),
                Err(error) => {
                    note = format!("the time of boot is not known, so these are seconds since it: {error}\n");
                }
            },
            "-t" => style.no_times = true,
            "-m" => style.priority = true,
            "-c" => style.caller = true,
            "-l" => style.levels = Some(levels(words.next().copied().unwrap_or_default())?),
            _ => {
                return Err(CommandError(format!(
                    "'log' has no option '{}'; try 'help log'",
                    printable(word)
                )));
            }
        }
    }
    let mut records = kernel.log().map_err(|error| CommandError(error.to_string()))?;
    records.retain(|record| style.levels.as_ref().is_none_or(|levels| levels.contains(&record.level)));
    let text = note + &records.iter().map(|record| lines(record, &style)).collect::<String>();
    let json = records.iter().map(|record| {
        json!({
            "ts_nsec": record.ts_nsec,
            "text": record.text,
            "level": LEVELS.get(usize::from(record.level)),
            "facility": record.facility,
            "caller": record.caller.map(caller),
        })
    });
    Ok(Output { text, json: json.collect() })
}

/// The levels that a list such as `err,warn` or `warn+` means.
fn levels(list: &str) -> Result<Vec<u8>, CommandError> {
    let mut levels = Vec::new();
    for word in list.split(',') {
        let (name, and_worse) = word.strip_suffix('+').map_or((word, false), |name| (name, true));
        let number = (0..).zip(LEVELS).find(|(_, level)| *level == name).map(|(number, _)| number);
        let number = number.or_else(|| name.parse::<u8>().ok()).filter(|&number| number <= 7);
        let number = number.ok_or_else(|| {
            let (name, known) = (printable(name), LEVELS.join(", "));
            CommandError(format!("'{name}' is no level; there are: {known}"))
        })?;
        levels.extend(if and_worse { 0..=number } else { number..=number });
    }
    Ok(levels)
}

fn caller(caller: Caller) -> String {
    match caller {
        Caller::Task(pid) => format!("T{pid}"),
        Caller::Cpu(cpu) => format!("C{cpu}"),
    }
}

fn lines(record: &Record, style: &Style) -> String {
    let mut start = String::new();
    if style.priority {
        let _ = write!(start, "<{}>", u32::from(record.facility) * 8 + u32::from(record.level));
    }
    match style.booted {
        _ if style.no_times => {}
        Some(booted) => {
            let _ = write!(start, "[{}] ", Date(booted.saturating_add(record.ts_nsec)));
        }
        None => {
            let (seconds, micros) = (record.ts_nsec / 1_000_000_000, record.ts_nsec / 1000 % 1_000_000);
            let _ = write!(start, "[{seconds:5}.{micros:06}] ");
        }
    }
    if style.caller {
        let said = record.caller.map_or_else(|| "?".to_owned(), caller);
        let _ = write!(start, "[{said:>6}] ");
    }
    let line = |line| format!("{start}{}\n", escaped(line));
    record.text.split('\n').map(line).collect()
}

/// A line as `dmesg` shows it: tabs stay, other control characters are `\x1b`; and what would reorder the line is
/// escaped, too.
fn escaped(line: &str) -> String {
    let mut out = String::with_capacity(line.len());
    for c in line.chars() {
        match c {
            '\t' => out.push(c),
            c if c.is_control() => {
                for byte in c.encode_utf8(&mut [0; 4]).bytes() {
                    let _ = write!(out, "\\x{byte:02x}");
                }
            }
            c => out.push_str(&printable(c.encode_utf8(&mut [0; 4]))),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::escaped;

    #[test]
    fn control_characters() {
        assert_eq!(escaped("\tSize: 3\u{1b}[31m é"), "\tSize: 3\\x1b[31m é");
        assert_eq!(escaped("a\u{9b}b\u{7f}\u{202e}c\r"), "a\\xc2\\x9bb\\x7f\\u{202e}c\\x0d");
    }
}
