//! Code that is in no file: made while the kernel runs by ftrace, kprobes and BPF.
//!
//! Names are those that the kernel's own messages have. Source: `kernel/trace/ftrace.c`, `kernel/kprobes.c`,
//! `kernel/bpf/core.c`, `include/linux/bpf.h` (`struct bpf_ksym`).

use crate::addr::VirtAddr;
use crate::kernel::{Kernel, Symbolized};

/// Pieces of code listed.
const PIECES_MAX: usize = 1 << 16;
/// A page of probed instructions' copies.
const PROBE_PAGE: u64 = 4096;
/// The longest piece believed.
const LEN_MAX: u64 = 16 << 20;

/// What a piece of code is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RuntimeKind {
    /// A BPF program or trampoline: keeps frame pointers.
    Bpf,
    /// A copy of one of ftrace's trampolines in the kernel image, which is here.
    Ftrace {
        /// The original's run-time address.
        original: u64,
    },
    /// Copies of probed instructions.
    Kprobe,
    /// Detours of optimised kprobes: they save registers at their stack pointer when they call.
    Optprobe,
}

/// A piece of code made at run time.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RuntimeCode {
    /// First byte.
    pub start: u64,
    /// One past the last.
    pub end: u64,
    /// What it is.
    pub kind: RuntimeKind,
    /// Its name: untrusted text.
    pub name: String,
    /// What stands where a module's name would.
    pub owner: &'static str,
}

/// All of them, sorted by start.
#[derive(Default)]
pub struct RuntimePieces(Vec<RuntimeCode>);

impl Kernel {
    /// The piece of code made at run time that `at` is in.
    pub fn runtime_code(&self, at: VirtAddr) -> Option<&RuntimeCode> {
        let pieces = &self.stacks().pieces(self).0;
        let after = pieces.partition_point(|piece| piece.start <= at.0);
        pieces.get(after.checked_sub(1)?).filter(|piece| at.0 < piece.end)
    }

    /// The name of code made at run time.
    pub fn symbolize_runtime(&self, at: VirtAddr) -> Option<Symbolized<'_>> {
        let code = self.runtime_code(at)?;
        Some(Symbolized { name: &code.name, offset: at.0 - code.start, module: Some(code.owner) })
    }
}

impl RuntimePieces {
    pub fn of(kernel: &Kernel) -> Self {
        let mut pieces = Vec::new();
        bpf(kernel, &mut pieces);
        ftrace(kernel, &mut pieces);
        probes(kernel, "kprobe_insn_slots", ("kprobe_insn_page", RuntimeKind::Kprobe), &mut pieces);
        probes(kernel, "kprobe_optinsn_slots", ("kprobe_optinsn_page", RuntimeKind::Optprobe), &mut pieces);
        pieces.retain(|piece| {
            piece.end.checked_sub(piece.start).is_some_and(|len| (1..=LEN_MAX).contains(&len))
        });
        pieces.truncate(PIECES_MAX);
        pieces.sort_by_key(|piece| piece.start);
        Self(pieces)
    }
}

/// Since Linux commit bfea9a8574f3 ("bpf: Add name to struct bpf_ksym") (in v5.7).
fn bpf(kernel: &Kernel, pieces: &mut Vec<RuntimeCode>) -> Option<()> {
    let head = kernel.symbol("bpf_kallsyms")?;
    let offset = |path| kernel.member("bpf_ksym", path).map(|member| member.offset);
    let (node, start, end, name) = (offset("lnode")?, offset("start")?, offset("end")?, offset("name")?);
    for at in kernel.list_within(head, PIECES_MAX).nodes {
        let at = at.wrapping_add(node.wrapping_neg());
        let word = |offset| kernel.read_u64(at.wrapping_add(offset));
        if let (Some(start), Some(end)) = (word(start), word(end)) {
            let name = kernel.text_at(at.wrapping_add(name), 512).unwrap_or_else(|_| "bpf_prog".to_owned());
            pieces.push(RuntimeCode { start, end, kind: RuntimeKind::Bpf, name, owner: "bpf" });
        }
    }
    Some(())
}

fn ftrace(kernel: &Kernel, pieces: &mut Vec<RuntimeCode>) -> Option<()> {
    const FTRACE_OPS_FL_SAVE_REGS: u64 = 1 << 2;
    let head = kernel.symbol("ftrace_ops_trampoline_list")?;
    let offset = |path| kernel.member("ftrace_ops", path).map(|member| member.offset);
    let (node, flags) = (offset("list")?, offset("flags")?);
    let (start, size) = (offset("trampoline")?, offset("trampoline_size")?);
    for at in kernel.list_within(head, PIECES_MAX).nodes {
        let at = at.wrapping_add(node.wrapping_neg());
        let word = |offset| kernel.read_u64(at.wrapping_add(offset));
        let (Some(start), Some(size), Some(flags)) = (word(start), word(size), word(flags)) else { continue };
        let regs = flags & FTRACE_OPS_FL_SAVE_REGS != 0;
        let original = kernel.symbol(if regs { "ftrace_regs_caller" } else { "ftrace_caller" })?.0;
        pieces.push(RuntimeCode {
            start,
            end: start.wrapping_add(size),
            kind: RuntimeKind::Ftrace { original },
            name: "ftrace_trampoline".to_owned(),
            owner: "__builtin__ftrace",
        });
    }
    Some(())
}

fn probes(
    kernel: &Kernel,
    cache: &str,
    (name, kind): (&str, RuntimeKind),
    pieces: &mut Vec<RuntimeCode>,
) -> Option<()> {
    let pages = kernel.symbol(cache)?.wrapping_add(kernel.member("kprobe_insn_cache", "pages")?.offset);
    let offset = |path| kernel.member("kprobe_insn_page", path).map(|member| member.offset);
    let (node, code) = (offset("list")?, offset("insns")?);
    for at in kernel.list_within(pages, PIECES_MAX).nodes {
        let at = at.wrapping_add(node.wrapping_neg());
        let Some(start) = kernel.read_u64(at.wrapping_add(code)) else { continue };
        let (end, name) = (start.wrapping_add(PROBE_PAGE), name.to_owned());
        pieces.push(RuntimeCode { start, end, kind, name, owner: "__builtin__kprobes" });
    }
    Some(())
}
