//! `struct`, `union` and, short for both, `*`: a type's declaration, or what lies at an address as that type.

use super::args::{Options, count, hexadecimal};
use super::declare::{Offsets, chosen, declaration, members_json};
use super::expression::addresses;
use super::value::{Style, read};
use super::{Command, CommandError, Context, Output, printable};
use crate::addr::VirtAddr;
use crate::debuginfo::types::{Shape, TypeId, TypeTable};
use crate::kernel::{CpuId, Kernel};
use serde_json::{Value, json};
use std::fmt::Write;

const HELP: &str = "Without an address: the declaration and size of NAME, or of its MEMBERs; with -o their offsets.\n\
    With an address (ADDR, SYMBOL, or any expression; ':CPUS' behind a per-CPU variable: a, or 2,4-5): what lies there. \
    An expression that is a pointer means what it points at.\n\n\
    -o          offsets of members; with an address, their addresses\n\
    -x, -d      hexadecimal or decimal numbers\n\
    -l OFFSET   the address is that of a member: its offset, or STRUCT.MEMBER\n\
    -c COUNT    so many in a row; COUNT may stand behind the address, too\n\
    -p          the address is physical\n\n\
    MEMBER is a path such as thread.sp or mem[0]; several have ',' between them. \
    '*' is short for 'struct' and 'union'.\n\n\
    Examples:\n  struct task_struct.pid,comm init_task\n  struct list_head -o\n  struct rq.nr_running runqueues:a\n  \
    struct page.flags,_refcount 0xffffea0000000000 4\n  *list_head init_task.tasks\n";

pub const STRUCT: Command = Command {
    name: "struct",
    arguments: "[-o] [-x] NAME[.MEMBER[,MEMBER…]] [ADDR [COUNT]]",
    summary: "declaration of a structure, or what lies at an address",
    help: HELP,
    run: |context, arguments| run("struct", context, arguments),
};

pub const UNION: Command = Command {
    name: "union",
    summary: "declaration of a union, or what lies at an address",
    run: |context, arguments| run("union", context, arguments),
    ..STRUCT
};

/// Structures in one answer.
const COUNT_MAX: u64 = 65536;

/// A type and the members of it that are wanted, as typed: `page.flags,mapping`.
pub struct Wanted<'a> {
    /// The structure or union.
    pub ty: TypeId,
    /// Paths of members; all if there are none.
    pub members: Vec<&'a str>,
}

impl<'a> Wanted<'a> {
    /// Reads `NAME[.MEMBER[,MEMBER…]]` and checks that this kernel has them.
    pub fn read(kernel: &Kernel, text: &'a str) -> Result<Self, CommandError> {
        let types = kernel.type_table()?;
        let (name, members) = text.split_once('.').unwrap_or((text, ""));
        let is_composite =
            |id: &TypeId| types.strip(*id).is_some_and(|(_, ty)| matches!(ty.shape, Shape::Composite { .. }));
        let ty =
            types.composite(name).or_else(|| types.parse(name).filter(is_composite)).ok_or_else(|| {
                CommandError(format!("this kernel has no structure or union '{}'", printable(name)))
            })?;
        let members: Vec<&str> = members.split(',').filter(|member| !member.is_empty()).collect();
        for member in &members {
            if types.member(ty, member).is_none() {
                return Err(CommandError(format!(
                    "'{}' has no member '{}' in this kernel; 'struct {}' lists them",
                    printable(&types.spell(ty)),
                    printable(member),
                    printable(name)
                )));
            }
        }
        Ok(Self { ty, members })
    }

    /// What lies at `at`: `{…}`, or a line `  member = value` for each wanted.
    pub fn show(&self, kernel: &Kernel, at: VirtAddr, style: Style) -> Result<(String, Value), CommandError> {
        let object = kernel.object_of(self.ty, at)?;
        if self.members.is_empty() {
            let node = read(&object, style);
            return Ok((node.text(0) + "\n", node.json()));
        }
        let mut text = String::new();
        let mut json = serde_json::Map::new();
        for path in &self.members {
            let node = read(&object.member(path)?, style);
            let _ = writeln!(text, "  {} = {}", printable(path), node.text(2));
            json.insert((*path).to_owned(), node.json());
        }
        Ok((text, Value::Object(json)))
    }
}

/// An offset as typed: a number (decimal, or hexadecimal with 0x) or STRUCT.MEMBER.
pub fn member_offset(kernel: &Kernel, text: &str) -> Result<u64, CommandError> {
    let Some((name, path)) = text.split_once('.') else { return count(text) };
    let wanted = Wanted::read(kernel, text)?;
    let member = kernel.type_table()?.member(wanted.ty, path);
    member.map(|member| member.offset).ok_or_else(|| {
        CommandError(format!("'{}' has no member '{}' in this kernel", printable(name), printable(path)))
    })
}

fn run(command: &'static str, context: &Context<'_>, arguments: &[&str]) -> Result<Output, CommandError> {
    let options = Options::read(command, &["o", "x", "d", "p", "l:", "c:"], true, arguments)?;
    let kernel = context.kernel()?;
    let types = kernel.type_table()?;
    // As C has it: `struct page`, `* union foo`.
    let rest = match options.rest.as_slice() {
        ["struct" | "union", rest @ ..] => rest,
        rest => rest,
    };
    let Some((name, rest)) = rest.split_first() else {
        return Err(CommandError(format!("which type? try 'help {command}'")));
    };
    let wanted = Wanted::read(kernel, name)?;
    let hex = options.has("x") && !options.has("d");
    if rest.is_empty() {
        let offsets = Offsets { shown: options.has("o") || !wanted.members.is_empty(), hex, base: None };
        return declared(types, &wanted, offsets);
    }
    let (place, times) = match (options.value("c"), rest) {
        (Some(times), _) => (rest.join(" "), count(times)?),
        (None, [place @ .., last]) if !place.is_empty() && last.bytes().all(|b| b.is_ascii_digit()) => {
            (place.join(" "), count(last)?)
        }
        _ => (rest.join(" "), 1),
    };
    let times = times.clamp(1, COUNT_MAX);
    let starts = match options.has("p") {
        true => vec![(None, in_direct_map(kernel, hexadecimal(&place)?)?)],
        false => addresses(context, &place)?,
    };
    let back = options.value("l").map_or(Ok(0), |offset| member_offset(kernel, offset))?;
    let size = types.size(wanted.ty).unwrap_or(0);
    let of_several = starts.len() > 1 || starts.iter().any(|(cpu, _)| cpu.is_some());
    let (mut text, mut values) = (String::new(), Vec::new());
    for (cpu, start) in starts {
        for i in 0..times {
            let at = VirtAddr(start.0.wrapping_sub(back)).wrapping_add(size.wrapping_mul(i));
            if of_several {
                let _ = writeln!(text, "{}", cpu_line(kernel, cpu, at));
            } else if times > 1 || options.has("o") {
                let _ = writeln!(text, "{at}:");
            }
            let (shown, json) = if options.has("o") {
                let offsets = Offsets { shown: true, hex: true, base: Some(at.0) };
                (offsets_text(types, &wanted, offsets), Value::Null)
            } else {
                wanted.show(kernel, at, Style { hex })?
            };
            // As C has it: `struct list_head {…}`.
            if wanted.members.is_empty() && !options.has("o") {
                let _ = write!(text, "{} ", printable(&types.spell(wanted.ty)));
            }
            text.push_str(&shown);
            values.push(json!({ "cpu": cpu.map(|cpu| cpu.0), "address": at.to_string(), "value": json }));
        }
    }
    let json = json!({ "type": types.spell(wanted.ty), "size": size, "values": values });
    Ok(Output { text, json })
}

/// The line above what one CPU has.
pub fn cpu_line(kernel: &Kernel, cpu: Option<CpuId>, at: VirtAddr) -> String {
    let Some(cpu) = cpu else { return format!("{at}:") };
    let offline = if kernel.is_online(cpu) == Some(false) { " (offline)" } else { "" };
    format!("CPU {cpu}{offline} at {at}:")
}

fn offsets_text(types: &TypeTable, wanted: &Wanted<'_>, offsets: Offsets) -> String {
    if wanted.members.is_empty() {
        return declaration(types, wanted.ty, offsets);
    }
    chosen(types, wanted.ty, &wanted.members, offsets).unwrap_or_default()
}

fn declared(types: &TypeTable, wanted: &Wanted<'_>, offsets: Offsets) -> Result<Output, CommandError> {
    let mut text = offsets_text(types, wanted, offsets);
    let size = types.size(wanted.ty);
    if wanted.members.is_empty() {
        let size = size.unwrap_or(0);
        let _ = if offsets.hex { writeln!(text, "SIZE: {size:#x}") } else { writeln!(text, "SIZE: {size}") };
    }
    let members = match wanted.members.as_slice() {
        [] => members_json(types, wanted.ty),
        paths => paths
            .iter()
            .filter_map(|path| {
                let member = types.member(wanted.ty, path)?;
                let (offset, bits) = match member.bits {
                    Some((lowest, width)) => {
                        let bit = member.offset * 8 + u64::from(lowest);
                        (bit / 8, Some(json!({ "lowest": bit % 8, "width": width })))
                    }
                    None => (member.offset, None),
                };
                Some(json!({
                    "name": path,
                    "type": types.spell(member.ty),
                    "offset": offset,
                    "size": member.size,
                    "bits": bits,
                }))
            })
            .collect(),
    };
    Ok(Output { text, json: json!({ "type": types.spell(wanted.ty), "size": size, "members": members }) })
}

/// Where the kernel maps all of RAM. Source: `arch/x86/include/asm/page_64.h` (`page_offset_base`).
fn in_direct_map(kernel: &Kernel, phys: u64) -> Result<VirtAddr, CommandError> {
    let base = kernel.symbol("page_offset_base").and_then(|at| kernel.read_u64(at));
    base.map(|base| VirtAddr(base.wrapping_add(phys))).ok_or_else(|| {
        CommandError("page_offset_base cannot be read: physical addresses lead nowhere".into())
    })
}
