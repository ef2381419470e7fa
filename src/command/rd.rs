//! `rd`: memory as numbers, text or symbols.

use super::args::{Address, Options, address as plain_address, count, hexadecimal};
use super::expression::address;
use super::{Command, CommandError, Context, Output, printable};
use crate::addr::{PhysAddr, VirtAddr};
use crate::kernel::Kernel;
use crate::kernel::page::about::About;
use serde_json::json;
use std::fmt::Write;

pub const COMMAND: Command = Command {
    name: "rd",
    arguments: "[-8|-16|-32|-64] [-p|-u] [-s|-S|-a|-d|-D] [-x] [-o OFFSET] [-e END] ADDR [COUNT]",
    summary: "read memory: numbers, text or symbols",
    help: "COUNT units (1 without it) from ADDR: an address, symbol or expression; phys:ADDR is physical. Text stands \
           behind them. What cannot be read is said, and ends the answer.\n\n\
           -8 -16 -32 -64   bits of a unit; 64 without one\n\
           -p               ADDR is physical\n\
           -u               ADDR is in the user memory of the task on the selected CPU, or of the one chosen with set\n\
           -s               symbols in place of numbers that are their addresses\n\
           -S               as -s, and the slab cache of those that point at an object; poison by its name\n\
           -d, -D           signed or unsigned decimal numbers\n\
           -a               text, to the first byte that is none\n\
           -x               no text behind the numbers\n\
           -o OFFSET        added to ADDR (hexadecimal)\n\
           -e END           up to END in place of a COUNT\n\n\
           Examples:\n  rd jiffies\n  rd -s $rsp 20\n  rd -a linux_banner\n  rd -32 init_task 8\n  rd -p 1000 4\n",
    run,
};

/// Bytes in one answer.
const BYTES_MAX: u64 = 4 << 20;
/// Text of `-a` in a line, as in crash.
const TEXT_IN_LINE: usize = 60;

fn run(context: &Context<'_>, arguments: &[&str]) -> Result<Output, CommandError> {
    const KNOWN: [&str; 14] = ["8", "16", "32", "64", "p", "u", "s", "S", "d", "D", "a", "x", "o:", "e:"];
    let options = Options::read("rd", &KNOWN, true, arguments)?;
    let width = ["8", "16", "32", "64"].into_iter().find(|width| options.has(width));
    let width = width.and_then(|bits| bits.parse::<u64>().ok()).map_or(8, |bits| bits / 8);
    let (place, units) = match options.rest.as_slice() {
        [] => return Err(CommandError("read what? try 'help rd'".into())),
        [place @ .., last] if !place.is_empty() && count(last).is_ok() => {
            (place.join(" "), Some(count(last)?))
        }
        place => (place.join(" "), None),
    };
    let from = options.value("o").map_or(Ok(0), hexadecimal)?;
    let space = Space::of(context, &options, &place)?;
    let start = match &space {
        Space::Physical => physical(context, &options, &place)?,
        Space::Virtual | Space::Task => address(context, &place)?.0,
    };
    let start = start.wrapping_add(from);
    if options.has("a") {
        return text(context, &space, start, units);
    }
    let units = match (options.value("e"), units) {
        (Some(end), None) => {
            let end = if let Space::Physical = space { hexadecimal(end)? } else { address(context, end)?.0 };
            let bytes = end.checked_sub(start).filter(|&bytes| bytes > 0);
            let bytes = bytes.ok_or_else(|| CommandError(format!("{end:#x} is not above {start:#x}")))?;
            bytes.div_ceil(width)
        }
        (Some(_), Some(_)) => return Err(CommandError("'rd' takes a COUNT or -e END, not both".into())),
        (None, units) => units.unwrap_or(1),
    };
    if units == 0 || units > BYTES_MAX / width {
        return Err(CommandError(format!("'rd' reads 1 to {} units of {width} bytes", BYTES_MAX / width)));
    }
    let mut bytes = vec![0; (units * width) as usize];
    let (filled, why) = space.read(context, start, &mut bytes)?;
    bytes.truncate(filled - filled % width as usize);
    if let (true, Some(why)) = (bytes.is_empty(), &why) {
        return Err(CommandError(why.clone()));
    }
    Ok(Numbers { context, options: &options, width, start }.output(&bytes, why))
}

/// Which memory is read.
enum Space {
    Physical,
    /// Of the kernel, or of the task on the selected CPU.
    Virtual,
    /// Of the task chosen with `set`.
    Task,
}

impl Space {
    fn of(context: &Context<'_>, options: &Options<'_>, place: &str) -> Result<Self, CommandError> {
        Ok(if options.has("p") || place.starts_with("phys:") {
            Self::Physical
        } else if options.has("u") && context.focus.task.get().is_some() {
            Self::Task
        } else {
            Self::Virtual
        })
    }

    /// Fills `buf` as far as it can be read, and says why not further.
    fn read(
        &self,
        context: &Context<'_>,
        at: u64,
        buf: &mut [u8],
    ) -> Result<(usize, Option<String>), CommandError> {
        let backend = context.machine.backend();
        Ok(match self {
            Self::Physical => {
                let read = backend.read_phys(PhysAddr(at), buf);
                (read.filled, read.stopped.map(|why| why.to_string()))
            }
            Self::Virtual => {
                let read = context.machine.read_virt(context.cpu, VirtAddr(at), buf);
                (read.filled, read.stopped.map(|why| why.to_string()))
            }
            Self::Task => {
                let kernel = context.kernel()?;
                let task = context.task()?;
                let mm = task.get("mm")?;
                if mm == 0 {
                    return Err(CommandError(format!("the task at {} has no user memory", task.at)));
                }
                let space = kernel.user_space(VirtAddr(mm)).map_err(CommandError)?;
                let read = space.read(&**backend, VirtAddr(at), buf);
                (read.filled, read.stopped.map(|why| why.to_string()))
            }
        })
    }
}

fn physical(context: &Context<'_>, options: &Options<'_>, place: &str) -> Result<u64, CommandError> {
    match plain_address(context, place)? {
        Address::Physical(at) => Ok(at.0),
        Address::Virtual(_) if options.has("p") => hexadecimal(place),
        Address::Virtual(at) => Ok(at.0),
    }
}

struct Numbers<'a, 'k> {
    context: &'a Context<'k>,
    options: &'a Options<'a>,
    width: u64,
    start: u64,
}

impl Numbers<'_, '_> {
    fn output(&self, bytes: &[u8], why: Option<String>) -> Output {
        let decimal = self.options.has("d") || self.options.has("D");
        let symbols = self.options.has("s") || self.options.has("S");
        let in_line = if self.width == 8 || decimal && self.width < 8 { 16 } else { 16.max(self.width) };
        let mut text = String::new();
        let (mut values, mut names) = (Vec::new(), Vec::new());
        for (i, line) in bytes.chunks(in_line as usize).enumerate() {
            let at = self.start.wrapping_add(i as u64 * in_line);
            let _ = write!(text, "{at:16x}:  ");
            for unit in line.chunks(self.width as usize) {
                let value = unit.iter().rev().fold(0u64, |value, &byte| value << 8 | u64::from(byte));
                let kernel = self.context.machine.kernel().filter(|_| symbols && self.width == 8);
                let slab = |kernel: &Kernel| match self.options.has("S") {
                    true => slab_cache(kernel, VirtAddr(value)).map(|name| format!("[{name}]")),
                    false => None,
                };
                let poison = || poison(value).filter(|_| self.options.has("S")).map(str::to_owned);
                let name = kernel.and_then(|kernel| {
                    kernel.describe_address(VirtAddr(value)).or_else(|| slab(kernel)).or_else(poison)
                });
                let shown = match &name {
                    Some(name) => name.clone(),
                    None => self.number(value),
                };
                let _ = write!(text, "{shown:<w$} ", w = self.column(decimal));
                values.push(format!("{value:#x}"));
                names.push(name);
            }
            if !self.options.has("x") && !decimal && !symbols {
                let room = (in_line as usize - line.len()) / self.width as usize * (self.column(decimal) + 1);
                let _ = write!(text, "{:room$}  {}", "", ascii(line));
            }
            text.truncate(text.trim_end().len());
            text.push('\n');
        }
        if let Some(why) = &why {
            let at = self.start.wrapping_add(bytes.len() as u64);
            let _ = writeln!(text, "{at:16x}:  {why}");
        }
        let mut json = json!({ "address": format!("{:#x}", self.start), "width": self.width * 8, "values": values, "problem": why });
        if symbols && let Some(json) = json.as_object_mut() {
            json.insert("symbols".into(), json!(names));
        }
        Output { text, json }
    }

    /// Characters of a number.
    fn column(&self, decimal: bool) -> usize {
        match (decimal, self.width) {
            (false, width) => width as usize * 2,
            (true, 8) => 20,
            (true, 4) => 11,
            (true, 2) => 6,
            (true, _) => 4,
        }
    }

    fn number(&self, value: u64) -> String {
        let unused = 64 - 8 * self.width as u32;
        if self.options.has("d") {
            format!("{:>w$}", (value << unused) as i64 >> unused, w = self.column(true))
        } else if self.options.has("D") {
            format!("{value:>w$}", w = self.column(true))
        } else {
            format!("{value:0w$x}", w = self.width as usize * 2)
        }
    }
}

/// What a word was overwritten with, if it is one of the kernel's marks (`include/linux/poison.h`).
fn poison(word: u64) -> Option<&'static str> {
    /// `CONFIG_ILLEGAL_POINTER_VALUE`.
    const DELTA: u64 = 0xdead_0000_0000_0000;
    let bytes = word.to_le_bytes();
    Some(match (word.wrapping_sub(DELTA), bytes.first()) {
        (0x100, _) => "LIST_POISON1",
        // 0x200 until about v4.15.
        (0x122 | 0x200, _) => "LIST_POISON2",
        (0x300, _) => "TIMER_ENTRY_STATIC",
        (0x400, _) => "TAIL_MAPPING",
        (0x800, _) => "SKB_LIST_POISON_NEXT",
        (_, Some(first)) if bytes.iter().all(|byte| byte == first) => match first {
            0x5a => "POISON_INUSE",
            0x6b => "POISON_FREE",
            0xaa => "PAGE_POISON",
            0xbb => "SLUB_RED_INACTIVE",
            0xcc => "SLUB_RED_ACTIVE",
            _ => return None,
        },
        _ => return None,
    })
}

/// The name of the cache that the object at `at` is of, escaped.
pub(super) fn slab_cache(kernel: &Kernel, at: VirtAddr) -> Option<String> {
    let map = kernel.page_map().ok()?;
    let page = About::new(kernel, map, map.direct_to_phys(at)?.pfn()).ok()?;
    page.slab.map(|(cache, _)| printable(&cache.name))
}

fn ascii(bytes: &[u8]) -> String {
    bytes.iter().map(|&byte| if (b' '..=b'~').contains(&byte) { char::from(byte) } else { '.' }).collect()
}

/// `-a`: lines of text until something else comes, or `units` characters have.
fn text(
    context: &Context<'_>,
    space: &Space,
    start: u64,
    units: Option<u64>,
) -> Result<Output, CommandError> {
    let wanted = units.unwrap_or(BYTES_MAX).min(BYTES_MAX);
    let (mut all, mut problem) = (Vec::new(), None);
    while (all.len() as u64) < wanted {
        let at = start.wrapping_add(all.len() as u64);
        let mut piece = vec![0; VirtAddr(at).left_in_page().min(wanted - all.len() as u64) as usize];
        let (filled, why) = space.read(context, at, &mut piece)?;
        piece.truncate(filled);
        let is_text = |byte: &u8| (b' '..=b'~').contains(byte) || matches!(byte, b'\n' | b'\t');
        let end = piece.iter().position(|byte| !is_text(byte));
        all.extend(piece.iter().take(end.unwrap_or(piece.len())));
        problem = why;
        if end.is_some() || problem.is_some() || piece.is_empty() {
            break;
        }
    }
    if let (Some(why), true) = (&problem, all.is_empty()) {
        return Err(CommandError(why.clone()));
    }
    let mut out = String::new();
    for (i, line) in all.chunks(TEXT_IN_LINE).enumerate() {
        let at = start.wrapping_add((i * TEXT_IN_LINE) as u64);
        let _ = writeln!(out, "{at:16x}:  {}", String::from_utf8_lossy(line).replace(['\n', '\t'], " "));
    }
    if let Some(why) = &problem {
        let _ = writeln!(out, "{:16x}:  {why}", start.wrapping_add(all.len() as u64));
    }
    let json = json!({
        "address": format!("{start:#x}"),
        "text": String::from_utf8_lossy(&all),
        "problem": problem,
    });
    Ok(Output { text: out, json })
}
