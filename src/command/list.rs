//! `list`: entries of linked lists, and members of what they are embedded in.

use super::args::Options;
use super::expression::address;
use super::structure::{Wanted, member_offset};
use super::value::Style;
use super::{Command, CommandError, Context, Output, printable};
use crate::addr::VirtAddr;
use crate::kernel::Kernel;
use crate::kernel::list::ENTRIES_MAX;
use serde_json::{Value, json};
use std::collections::HashSet;
use std::fmt::Write;

pub const COMMAND: Command = Command {
    name: "list",
    arguments: "[-h|-H] [-r] [[-o] OFFSET] [-e END] [-s STRUCT[.MEMBER,…] [-l OFFSET]] [-x] START",
    summary: "entries of a linked list",
    help: "Without -h and -H, START is a structure with a pointer to the next one at OFFSET in it, and the list ends with \
           NULL or back at START.\n\n\
           -h               START is a structure with a list_head at OFFSET in it\n\
           -H               START is a list_head outside of the list's structures; it is no entry itself\n\
           -o OFFSET        of the pointer or list_head in each structure: a number, or STRUCT.MEMBER; the -o may be \
           left out before STRUCT.MEMBER\n\
           -r               backwards, by 'prev'\n\
           -e END           the address that ends the list\n\
           -s STRUCT[.M,…]  of each entry the structure, or these members of it\n\
           -l OFFSET        entries are addresses of what is at OFFSET in the STRUCT of -s\n\
           -x               hexadecimal numbers\n\n\
           A list that is broken, or comes back to other than its start, is shown as far as it goes.\n\n\
           Examples:\n  list task_struct.tasks -s task_struct.pid,comm -h init_task\n  \
           list -H modules -o module.list -s module.name\n  list -H super_blocks -o super_block.s_list\n",
    run,
};

/// How the entries hang together.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Pointers to structures.
    Pointers,
    /// A list_head in START.
    Embedded,
    /// START is the list_head.
    Head,
}

struct Chain<'k> {
    kernel: &'k Kernel,
    kind: Kind,
    /// Of the pointer or list_head, in bytes.
    offset: u64,
    reverse: bool,
    end: Option<VirtAddr>,
}

fn run(context: &Context<'_>, arguments: &[&str]) -> Result<Output, CommandError> {
    let known = ["h", "H", "r", "B", "o:", "e:", "s:", "l:", "x", "d"];
    let options = Options::read("list", &known, true, arguments)?;
    let kernel = context.kernel()?;
    let (offset, start) = match (options.value("o"), options.rest.as_slice()) {
        (_, []) => return Err(CommandError("which list? try 'help list'".into())),
        (None, [offset, start @ ..]) if !start.is_empty() => {
            (member_offset(kernel, offset)?, start.join(" "))
        }
        (Some(offset), start) => (member_offset(kernel, offset)?, start.join(" ")),
        (None, start) => (0, start.join(" ")),
    };
    let kind = match (options.has("H"), options.has("h")) {
        (true, true) => return Err(CommandError("'list' takes -h or -H, not both".into())),
        (true, _) => Kind::Head,
        (_, true) => Kind::Embedded,
        _ => Kind::Pointers,
    };
    let reverse = options.has("r") || options.has("B");
    if reverse && kind == Kind::Pointers {
        return Err(CommandError("only a list of list_heads can be followed backwards: add -h or -H".into()));
    }
    let start = address(context, &start)?;
    let end = options.value("e").map(|end| address(context, end)).transpose()?;
    let (entries, problem) = Chain { kernel, kind, offset, reverse, end }.entries(start);
    let wanted: Vec<Wanted<'_>> =
        options.values("s").map(|name| Wanted::read(kernel, name)).collect::<Result<_, _>>()?;
    let back = options.value("l").map_or(Ok(0), |offset| member_offset(kernel, offset))?;
    let style = Style { hex: options.has("x") && !options.has("d") };
    let (mut text, mut rows) = (String::new(), Vec::new());
    for entry in &entries {
        let _ = writeln!(text, "{:x}", entry.0);
        let mut row = json!({ "address": entry.to_string() });
        for one in &wanted {
            let (shown, json) = one.show(kernel, VirtAddr(entry.0.wrapping_sub(back)), style)?;
            if one.members.is_empty() {
                let _ = write!(text, "{} ", printable(&kernel.type_table()?.spell(one.ty)));
            }
            text.push_str(&shown);
            merge(&mut row, json);
        }
        rows.push(row);
    }
    if let Some(why) = &problem {
        let _ = writeln!(text, "{why}");
    }
    Ok(Output { text, json: json!({ "entries": rows, "problem": problem }) })
}

/// Members of several structures stand in one object, under "value".
fn merge(row: &mut Value, members: Value) {
    if let (Some(row), Value::Object(members)) = (row.as_object_mut(), members) {
        let value = row.entry("value").or_insert_with(|| json!({}));
        if let Some(value) = value.as_object_mut() {
            value.extend(members);
        }
    }
}

impl Chain<'_> {
    /// Addresses of the structures, and what broke the list.
    fn entries(&self, start: VirtAddr) -> (Vec<VirtAddr>, Option<String>) {
        let mut entries = Vec::new();
        let mut seen = HashSet::new();
        // What is followed: nodes where there are list_heads, else structures.
        let first = match self.kind {
            Kind::Pointers | Kind::Head => start,
            Kind::Embedded => start.wrapping_add(self.offset),
        };
        if self.kind != Kind::Head {
            entries.push(start);
        }
        let mut here = first;
        loop {
            let field = match self.kind {
                Kind::Pointers => here.wrapping_add(self.offset),
                // struct list_head { next, prev }
                _ if self.reverse => here.wrapping_add(8),
                _ => here,
            };
            let Some(next) = self.kernel.read_u64(field).map(VirtAddr) else {
                return (
                    entries,
                    Some(format!("the list breaks off: the pointer at {field} cannot be read")),
                );
            };
            let structure = match self.kind {
                Kind::Pointers => next,
                _ => VirtAddr(next.0.wrapping_sub(self.offset)),
            };
            let is_end = |end: VirtAddr| end == next || end == structure;
            if next.0 == 0 || next == first || self.end.is_some_and(is_end) {
                let problem = (next.0 == 0 && self.kind != Kind::Pointers)
                    .then(|| format!("the list breaks off: the pointer at {field} is NULL"));
                return (entries, problem);
            }
            if !seen.insert(next) {
                return (entries, Some(format!("the list goes in a circle: {next} comes a second time")));
            }
            if entries.len() >= ENTRIES_MAX {
                return (entries, Some(format!("the list has more than {ENTRIES_MAX} entries")));
            }
            if self.kernel.read_u64(next).is_none() {
                let why = format!("the list breaks off: {field} leads to {next}, which cannot be read");
                return (entries, Some(why));
            }
            entries.push(structure);
            here = next;
        }
    }
}
