//! A backtrace as text in crash's shape, and as JSON.

use crate::addr::VirtAddr;
use crate::arch::x86_64::Reg;
use crate::command::args::Options;
use crate::command::printable;
use crate::command::task::{heading, identity};
use crate::kernel::Kernel;
use crate::kernel::sched::TaskInfo;
use crate::kernel::stack::{Boundary, Ended, StackKind, Start, Trace, Tracer};
use crate::unwind::{Frame, Regs};
use serde_json::{Value, json};
use std::fmt::Write;

/// What is to be shown.
#[derive(Clone, Copy, Default)]
pub struct Style {
    pub lines: bool,
    pub words: bool,
    pub symbols: bool,
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
            symbols: options.has("F"),
            offsets: options.has("s"),
            decimal: options.has("d"),
            raw: options.has("r"),
            why: options.has("-why"),
        }
    }
}

pub struct Renderer<'a> {
    pub kernel: &'a Kernel,
    pub style: Style,
    pub tracer: &'a Tracer<'a>,
}

impl Renderer<'_> {
    pub fn text(&self, trace: &Trace, info: Option<&TaskInfo>) -> String {
        let mut text = info.map(heading).unwrap_or_default();
        if let Some(parked) = trace.parked {
            let _ = writeln!(text, "    (parked in {parked})");
        }
        if !matches!(trace.start, Start::Cpu | Start::SwitchedOut) {
            let _ = writeln!(text, "    ({})", trace.start.words());
        }
        let mut number = 0;
        let mut last: Option<StackKind> = None;
        for segment in &trace.segments {
            let kind = segment.stack.map(|stack| stack.kind);
            if let (Some(before), true) = (last, kind != last) {
                let _ = writeln!(text, "--- <{}> ---", before.name());
            }
            last = kind.or(last);
            for frame in &segment.frames {
                self.frame(&mut text, number, frame);
                number += 1;
            }
            if let Some(boundary) = &segment.boundary {
                self.boundary(&mut text, boundary);
            }
        }
        self.ended(&mut text, trace);
        text
    }

    fn frame(&self, text: &mut String, number: usize, frame: &Frame) {
        let at = frame.pc_at.filter(|_| !frame.exact).unwrap_or(frame.sp);
        let mark = if frame.source.is_guess() { "? " } else { "" };
        let found = self.kernel.symbolize(VirtAddr(frame.lookup_pc()));
        let (name, module) = match found {
            Some(found) => {
                (printable(found.name), found.module.map(|module| format!(" [{}]", printable(module))))
            }
            None => ("(unknown)".to_owned(), None),
        };
        let offset = match found {
            Some(found) if self.style.offsets => {
                let offset = found.offset + u64::from(!frame.exact);
                if self.style.decimal { format!("+{offset}") } else { format!("+{offset:#x}") }
            }
            _ => String::new(),
        };
        let module = module.unwrap_or_default();
        let _ = writeln!(
            text,
            "{:>3} [{at:016x}] {mark}{name}{offset} at {:016x}{module}",
            format!("#{number}"),
            frame.pc
        );
        if self.style.why {
            let _ = writeln!(text, "    {}", frame.why);
        }
    }

    fn boundary(&self, text: &mut String, boundary: &Boundary) {
        if !boundary.of_user() {
            let pc = boundary.saved.regs.pc().unwrap_or(0);
            let name =
                self.kernel.symbolize(VirtAddr(pc)).map_or("unknown".to_owned(), |found| found.to_string());
            let _ = writeln!(text, "    [exception RIP: {name}]");
        }
        registers(text, &boundary.saved.regs, boundary.saved.orig_ax);
    }

    fn ended(&self, text: &mut String, trace: &Trace) {
        match &trace.ended {
            Ended::User(regs) if trace.segments.is_empty() => {
                text.push_str("    (in user mode)\n");
                registers(text, regs, None);
            }
            Ended::User(_) | Ended::Root { .. } | Ended::NotStarted => {}
            Ended::EntryGap { user, .. } => {
                text.push_str("    (between user mode and the kernel)\n");
                registers(text, user, None);
            }
            Ended::Broken { why, .. } => {
                let _ = writeln!(text, "    (the backtrace ends here: {why})");
            }
        }
    }

    pub fn json(&self, trace: &Trace, info: Option<&TaskInfo>) -> Value {
        let mut json = info.map(identity).unwrap_or_default();
        json.insert("complete".into(), json!(trace.ended.is_complete()));
        Value::Object(json)
    }
}

/// Registers in crash's order.
pub fn registers(text: &mut String, regs: &Regs, orig_ax: Option<u64>) {
    let show =
        |reg: Reg| regs.get(reg).map_or("(not saved)     ".to_owned(), |value| format!("{value:016x}"));
    const ROWS: [[(&str, Reg); 3]; 5] = [
        [("RAX", Reg::Rax), ("RBX", Reg::Rbx), ("RCX", Reg::Rcx)],
        [("RDX", Reg::Rdx), ("RSI", Reg::Rsi), ("RDI", Reg::Rdi)],
        [("RBP", Reg::Rbp), ("R8", Reg::R8), ("R9", Reg::R9)],
        [("R10", Reg::R10), ("R11", Reg::R11), ("R12", Reg::R12)],
        [("R13", Reg::R13), ("R14", Reg::R14), ("R15", Reg::R15)],
    ];
    let short =
        |reg: Reg, width: usize| regs.get(reg).map_or("?".to_owned(), |value| format!("{value:0width$x}"));
    let _ = writeln!(
        text,
        "    RIP: {}  RSP: {}  RFLAGS: {}",
        show(Reg::Rip),
        show(Reg::Rsp),
        short(Reg::Eflags, 8)
    );
    for row in ROWS {
        let cells: Vec<String> = row.iter().map(|(name, reg)| format!("{name:>3}: {}", show(*reg))).collect();
        let _ = writeln!(text, "    {}", cells.join("  "));
    }
    let orig = orig_ax.map_or(String::new(), |value| format!("ORIG_RAX: {value:016x}  "));
    let _ = writeln!(text, "    {orig}CS: {}  SS: {}", short(Reg::Cs, 4), short(Reg::Ss, 4));
}
