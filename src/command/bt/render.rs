//! A backtrace as text, in crash's shape.

use crate::addr::VirtAddr;
use crate::arch::x86_64::Reg;
use crate::command::args::Options;
use crate::command::printable;
use crate::command::rd::slab_cache;
use crate::command::task::heading;
use crate::debuginfo::Location;
use crate::kernel::sched::TaskInfo;
use crate::kernel::stack::{Boundary, Ended, Event, Segment, StackBounds, StackKind, Start, Trace};
use crate::kernel::{Kernel, Symbolized};
use crate::unwind::{Frame, Regs};
use std::cell::RefCell;
use std::collections::HashMap;
use std::fmt::{self, Write};
use std::rc::Rc;

/// Words of one frame that are shown: more than a stack has.
const WORDS_MAX: u64 = 64 << 10;

/// What is to be shown.
#[derive(Clone, Copy, Default)]
pub struct Style {
    pub lines: bool,
    pub words: bool,
    pub named_words: bool,
    pub offsets: bool,
    pub decimal: bool,
    pub raw: bool,
    pub why: bool,
}

impl Style {
    pub fn read(options: &Options<'_>) -> Self {
        Self {
            lines: options.has("l"),
            words: options.has("f") || options.has("F"),
            named_words: options.has("F"),
            offsets: options.has("s"),
            decimal: options.has("d"),
            raw: options.has("r"),
            why: options.has("-why"),
        }
    }
}

/// Writes backtraces.
pub struct Renderer<'a> {
    pub kernel: &'a Kernel,
    pub style: Style,
    /// Ten thousand tasks sleep in a hundred places.
    symbols: RefCell<HashMap<u64, Option<Symbolized<'a>>>>,
    /// What a line says of a pc, by the pc and whether it is exact.
    places: RefCell<HashMap<(u64, bool), Rc<str>>>,
    lines: RefCell<HashMap<u64, Rc<[Location]>>>,
    /// Room for a text while it grows: what is given out has its own length and no more.
    room: RefCell<String>,
}

impl<'a> Renderer<'a> {
    /// One for `kernel`, which remembers what it has looked up.
    pub fn new(kernel: &'a Kernel, style: Style) -> Self {
        Self {
            kernel,
            style,
            symbols: RefCell::default(),
            places: RefCell::default(),
            lines: RefCell::default(),
            room: RefCell::default(),
        }
    }

    /// The whole of `trace`, with its heading.
    pub fn text(&self, trace: &Trace, info: Option<&TaskInfo>) -> String {
        let mut room = self.room.borrow_mut();
        room.clear();
        self.write(&mut room, trace, info);
        room.as_str().to_owned()
    }

    fn write(&self, text: &mut String, trace: &Trace, info: Option<&TaskInfo>) {
        if let Some(info) = info {
            text.push_str(&heading(info));
        }
        if let (Some(cpu), None) = (trace.cpu, info) {
            let _ = writeln!(text, "CPU {cpu}");
        }
        if let Some(parked) = trace.parked {
            let _ = writeln!(text, "    (parked in {parked})");
        }
        if !matches!(trace.start, Start::Cpu | Start::SwitchedOut | Start::Given) {
            let _ = writeln!(text, "    ({})", trace.start.words());
        }
        if trace.start == Start::NotSaved {
            text.push_str("    (addresses of code that lie on its stack, stale ones among them: bt -t)\n");
        }
        if self.style.raw {
            self.raw(text, trace);
            return;
        }
        let mut number = 0;
        for (index, segment) in trace.segments.iter().enumerate() {
            for (nth, frame) in segment.frames.iter().enumerate() {
                self.frame(text, number, frame);
                if self.style.words {
                    let (from, to) = words_of(segment, nth);
                    self.words(text, from, to);
                }
                number += 1;
            }
            if let Some(boundary) = &segment.boundary {
                self.boundary(text, boundary);
            }
            // crash marks the end of a stack that was switched to.
            let next = trace.segments.get(index + 1).map(|next| next.stack);
            if let (Some(stack), Some(next)) = (segment.stack, next)
                && next != Some(stack)
                && stack.kind != StackKind::Task
            {
                let _ = writeln!(text, "--- <{}> ---", stack.kind.name());
            }
        }
        self.ended(text, trace);
    }

    /// The symbol of a frame.
    pub fn symbol(&self, frame: &Frame) -> Option<Symbolized<'a>> {
        let pc = frame.lookup_pc();
        *self.symbols.borrow_mut().entry(pc).or_insert_with(|| self.kernel.symbolize(VirtAddr(pc)))
    }

    /// The source lines of a frame, the innermost inlined function's first.
    pub fn lines(&self, frame: &Frame) -> Rc<[Location]> {
        let find = || {
            let at = self.symbol(frame).map(|_| VirtAddr(frame.lookup_pc()));
            at.and_then(|at| self.kernel.locate(at)).unwrap_or_default().into()
        };
        self.lines.borrow_mut().entry(frame.lookup_pc()).or_insert_with(find).clone()
    }

    /// Whether a frame is of the function, module or address that `what` names.
    pub fn mentions(&self, trace: &Trace, what: &str) -> bool {
        let digits = what.strip_prefix("0x").unwrap_or(what);
        let address = u64::from_str_radix(digits, 16).ok();
        trace.frames().any(|frame| {
            let found = self.symbol(frame);
            found.is_some_and(|found| found.name == what || found.module == Some(what))
                || address.is_some_and(|at| frame.pc == at || frame.sp == at)
        })
    }

    fn frame(&self, text: &mut String, number: usize, frame: &Frame) {
        let at = frame.pc_at.filter(|_| !frame.exact).unwrap_or(frame.sp);
        let mark = if frame.source.is_guess() { "? " } else { "" };
        let align = if number < 10 { " " } else { "" };
        let _ = write!(text, "{align}#{number} [{}] {mark}{}", Digits(Some(at), 16), self.place(frame));
        if let Some(by) = frame.restored {
            let _ = write!(text, " (return address restored: {by})");
        }
        text.push('\n');
        if self.style.why {
            let _ = writeln!(text, "    {}: {}", frame.source.name(), printable(&frame.why.to_string()));
        }
        if self.style.lines {
            self.put_lines(text, frame);
        }
    }

    /// What the line of `frame` says of its pc: the symbol, the address, the module.
    fn place(&self, frame: &Frame) -> Rc<str> {
        let key = (frame.pc, frame.exact);
        if let Some(known) = self.places.borrow().get(&key) {
            return known.clone();
        }
        let found = self.symbol(frame);
        let mut text =
            found.map_or_else(|| "(unknown)".to_owned(), |found| printable(&demangled(found.name)));
        if let Some(found) = found.filter(|_| self.style.offsets) {
            let offset = found.offset + u64::from(!frame.exact);
            let _ = if self.style.decimal { write!(text, "+{offset}") } else { write!(text, "+{offset:#x}") };
        }
        let _ = write!(text, " at {:016x}", frame.pc);
        if let Some(module) = found.and_then(|found| found.module) {
            let _ = write!(text, " [{}]", printable(module));
        }
        let text: Rc<str> = text.into();
        self.places.borrow_mut().insert(key, text.clone());
        text
    }

    fn put_lines(&self, text: &mut String, frame: &Frame) {
        let lines = self.lines(frame);
        for (index, place) in lines.iter().enumerate() {
            // All but the last are inlined into the one behind.
            let inlined = match &place.function {
                Some(name) if index + 1 < lines.len() => {
                    format!("{} (inlined) ", printable(&demangled(name)))
                }
                _ => String::new(),
            };
            let line = place.line.map_or(String::new(), |line| format!(": {line}"));
            if let Some(file) = &place.file {
                let _ = writeln!(text, "    {inlined}{}{line}", printable(file));
            } else if !inlined.is_empty() {
                let _ = writeln!(text, "    {inlined}");
            }
        }
    }

    fn boundary(&self, text: &mut String, boundary: &Boundary) {
        if !boundary.of_user() {
            let name = boundary.saved.regs.pc().and_then(|pc| self.kernel.symbolize(VirtAddr(pc)));
            let name =
                name.map_or_else(|| "unknown or invalid address".to_owned(), |found| found.to_string());
            let _ = writeln!(text, "    [exception RIP: {name}]");
        }
        if let Event::Exception(..) = boundary.event {
            let _ = writeln!(text, "    ({})", boundary.event);
        }
        registers(text, &boundary.saved.regs, boundary.saved.orig_ax);
    }

    fn ended(&self, text: &mut String, trace: &Trace) {
        match &trace.ended {
            Ended::User(regs) if trace.segments.is_empty() => {
                text.push_str("    (in user mode)\n");
                registers(text, regs, None);
            }
            Ended::NotStarted if trace.start == Start::Given => {
                text.push_str("    (no stack pointer is known here; give one with -S)\n");
            }
            Ended::User(_) | Ended::Root { .. } | Ended::NotStarted => {}
            Ended::EntryGap { user, .. } => {
                text.push_str("    (on the way between user mode and the kernel; the user's registers:)\n");
                registers(text, user, None);
            }
            Ended::Broken { why, .. } => {
                let _ = writeln!(text, "    (the backtrace ends here: {})", printable(why));
            }
        }
    }

    /// Words from `from` to and with the one before `to`, two in a line.
    fn words(&self, text: &mut String, from: u64, to: u64) {
        let mut words = self.each_word(from, to).enumerate().peekable();
        while let Some((index, (at, word))) = words.next() {
            if index % 2 == 0 {
                let _ = write!(text, "    {:016x}: ", at.0);
            }
            let _ = match word.map(|word| (word, self.name_of_word(word))) {
                Some((_, Some(name))) => write!(text, "{name:16}"),
                Some((word, None)) => write!(text, "{word:016x}"),
                None => write!(text, "(unreadable)    "),
            };
            text.push(if index % 2 == 1 || words.peek().is_none() { '\n' } else { ' ' });
        }
    }

    /// The words from `from` up to `to`, and where each is.
    pub fn each_word(&self, from: u64, to: u64) -> impl Iterator<Item = (VirtAddr, Option<u64>)> {
        let count = (to.saturating_sub(from) / 8).min(WORDS_MAX);
        let each = (0..count).map(move |index| VirtAddr(from.wrapping_add(index * 8)));
        each.map(|at| (at, self.kernel.read_u64(at)))
    }

    /// The name of a word, where names are wanted and it has one.
    pub fn name_of_word(&self, word: u64) -> Option<String> {
        if !self.style.named_words || word >> 63 == 0 {
            return None;
        }
        let at = VirtAddr(word);
        let caller = || self.kernel.caller_that_ends(at).map(|found| found.to_string());
        let slab = || slab_cache(self.kernel, at).map(|name| format!("[{name}]"));
        caller().or_else(|| self.kernel.describe_address(at)).or_else(slab)
    }

    /// `-r`: the stacks that are shown whole.
    pub fn stacks_of(&self, trace: &Trace) -> Vec<StackBounds> {
        let mut stacks: Vec<StackBounds> = Vec::new();
        let own = trace.task.and_then(|task| self.kernel.task_stack(task));
        for stack in trace.segments.iter().filter_map(|segment| segment.stack).chain(own) {
            if !stacks.contains(&stack) {
                stacks.push(stack);
            }
        }
        stacks
    }

    fn raw(&self, text: &mut String, trace: &Trace) {
        for stack in self.stacks_of(trace) {
            let _ = writeln!(text, "  {}:", stack.kind.name());
            self.words(text, stack.start, stack.end);
        }
    }
}

/// Where the words of a segment's frame begin and end.
pub fn words_of(segment: &Segment, nth: usize) -> (u64, u64) {
    let Some(frame) = segment.frames.get(nth) else { return (0, 0) };
    let next = segment.frames.get(nth + 1).and_then(|next| next.pc_at);
    let to = frame.cfa.or(next).unwrap_or(frame.sp);
    // A call may have switched stacks: its caller's frame is elsewhere, and this one ends with its stack.
    let left = segment.stack.filter(|stack| !(frame.sp..=stack.end).contains(&to));
    (frame.sp, left.map_or(to, |stack| stack.end))
}

/// Registers in crash's order.
pub fn registers(text: &mut String, regs: &Regs, orig_ax: Option<u64>) {
    const ROWS: [[(&str, Reg); 3]; 5] = [
        [("RAX", Reg::Rax), ("RBX", Reg::Rbx), ("RCX", Reg::Rcx)],
        [("RDX", Reg::Rdx), ("RSI", Reg::Rsi), ("RDI", Reg::Rdi)],
        [("RBP", Reg::Rbp), (" R8", Reg::R8), (" R9", Reg::R9)],
        [("R10", Reg::R10), ("R11", Reg::R11), ("R12", Reg::R12)],
        [("R13", Reg::R13), ("R14", Reg::R14), ("R15", Reg::R15)],
    ];
    let (wide, short) = (|reg| Digits(regs.get(reg), 16), |reg, width| Digits(regs.get(reg), width));
    let (rip, rsp) = (wide(Reg::Rip), wide(Reg::Rsp));
    let _ = writeln!(text, "    RIP: {rip}  RSP: {rsp}  RFLAGS: {}", short(Reg::Eflags, 8));
    for row in ROWS {
        let [(a, one), (b, other), (c, third)] = row.map(|(name, reg)| (name, wide(reg)));
        let _ = write!(text, "    {a}: {one}  {b}: {other}  {c}: {third}");
        text.truncate(text.trim_end().len());
        text.push('\n');
    }
    text.push_str("    ");
    if let Some(value) = orig_ax {
        let _ = write!(text, "ORIG_RAX: {value:016x}  ");
    }
    let _ = writeln!(text, "CS: {}  SS: {}", short(Reg::Cs, 4), short(Reg::Ss, 4));
}

/// A register's value in so many digits.
struct Digits(Option<u64>, usize);

impl fmt::Display for Digits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            // `{:016x}` takes four times as long, and a crowd's backtraces have a million of these.
            Self(Some(value), 16) => {
                let digit = |index: u32| b"0123456789abcdef"[(value >> (60 - 4 * index) & 0xf) as usize];
                let digits: [u8; 16] = std::array::from_fn(|index| digit(index as u32));
                f.write_str(std::str::from_utf8(&digits).unwrap_or_default())
            }
            Self(Some(value), width) => write!(f, "{value:0width$x}"),
            Self(None, width) => write!(f, "{:width$}", "(not saved)"),
        }
    }
}

/// A name as its source has it: Rust's are mangled. The hash that tells crates' versions apart is left out.
fn demangled(name: &str) -> String {
    rustc_demangle::try_demangle(name).map_or_else(|_| name.to_owned(), |name| format!("{name:#}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_rust_are_read_back() {
        // As in the kernel's samples/rust, by `rustc -C symbol-mangling-version=v0`.
        assert_eq!(demangled("_RNvNtCs1234_6kernel5print11call_printk"), "kernel::print::call_printk");
        assert_eq!(demangled("_ZN4core9panicking5panic17h0123456789abcdefE"), "core::panicking::panic");
        assert_eq!(demangled("schedule"), "schedule");
        assert_eq!(demangled("_R"), "_R");
    }
}
