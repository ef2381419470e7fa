//! `tree`: entries of red-black trees, xarrays, radix trees and maple trees.

use super::args::Options;
use super::expression::address;
use super::structure::{Wanted, member_offset};
use super::value::Style;
use super::{Command, CommandError, Context, Output, printable};
use crate::addr::VirtAddr;
use crate::kernel::Kernel;
use serde_json::{Value, json};
use std::fmt::Write;

pub const COMMAND: Command = Command {
    name: "tree",
    arguments: "[-t rbtree|xarray|radix|maple] [-r OFFSET] [-o OFFSET] [-s STRUCT[.MEMBER,…]] [-x] START",
    summary: "entries of a tree",
    help: "START is the address of the root: a struct rb_root or rb_root_cached, xarray, radix_tree_root (or idr), \
           maple_tree. Entries come in the tree's order; with xarrays, radix and maple trees behind their index or range \
           of indexes.\n\n\
           -t TYPE          of the tree; rbtree without it\n\
           -r OFFSET        the root is at OFFSET in what START points at: a number, or STRUCT.MEMBER\n\
           -o OFFSET        of the rb_node in each structure\n\
           -s STRUCT[.M,…]  of each entry the structure, or these members of it\n\
           -x               hexadecimal numbers\n\n\
           A number stored in an xarray in place of a pointer is shown as value N. A tree that is broken is shown as far \
           as it goes.\n\n\
           Examples:\n  tree -t rbtree -o vmap_area.rb_node -s vmap_area.va_start vmap_area_root\n  \
           tree -t xarray -r address_space.i_pages 0xffff888004b2c1f8\n  tree -t maple -s vm_area_struct.vm_start &init_mm.mm_mt\n",
    run,
};

/// One entry: first and last index where there are indexes, and what is stored.
struct Entry {
    indexes: Option<(u64, u64)>,
    stored: u64,
}

fn run(context: &Context<'_>, arguments: &[&str]) -> Result<Output, CommandError> {
    let options = Options::read("tree", &["t:", "r:", "o:", "s:", "x", "d"], true, arguments)?;
    if options.rest.is_empty() {
        return Err(CommandError("which tree? try 'help tree'".into()));
    }
    let kernel = context.kernel()?;
    let offset = |name| options.value(name).map_or(Ok(0), |text| member_offset(kernel, text));
    let root = address(context, &options.rest.join(" "))?.wrapping_add(offset("r")?);
    let (entries, problem) = entries(kernel, options.value("t").unwrap_or("rbtree"), root)?;
    if let (Some(why), true) = (&problem, entries.is_empty()) {
        return Err(CommandError(why.clone()));
    }
    let node = offset("o")?;
    let wanted: Vec<Wanted<'_>> =
        options.values("s").map(|name| Wanted::read(kernel, name)).collect::<Result<_, _>>()?;
    let style = Style { hex: options.has("x") && !options.has("d") };
    let (mut text, mut rows) = (String::new(), Vec::new());
    for entry in &entries {
        match entry.indexes {
            Some((first, last)) if first == last => drop(write!(text, "{first}: ")),
            Some((first, last)) => drop(write!(text, "{first}-{last}: ")),
            None => {}
        }
        let indexes = entry.indexes.map(|(first, last)| json!({ "first": first, "last": last }));
        // An entry with its lowest bit set is a number, which only indexes have.
        let value = entry.indexes.filter(|_| entry.stored & 1 == 1).map(|_| entry.stored >> 1);
        let at = VirtAddr(entry.stored.wrapping_sub(node));
        let mut row =
            json!({ "indexes": indexes, "address": Value::Null, "number": value, "value": Value::Null });
        match value {
            Some(value) => drop(writeln!(text, "value {value}")),
            None => {
                let _ = writeln!(text, "{:x}", at.0);
                row["address"] = json!(at.to_string());
                let mut members = serde_json::Map::new();
                for one in &wanted {
                    let (shown, json) = one.show(kernel, at, style)?;
                    if one.members.is_empty() {
                        let _ = write!(text, "{} ", printable(&kernel.type_table()?.spell(one.ty)));
                    }
                    text.push_str(&shown);
                    if let Value::Object(json) = json {
                        members.extend(json);
                    }
                }
                if !wanted.is_empty() {
                    row["value"] = Value::Object(members);
                }
            }
        }
        rows.push(row);
    }
    if let Some(why) = &problem {
        let _ = writeln!(text, "{why}");
    }
    Ok(Output { text, json: json!({ "entries": rows, "problem": problem }) })
}

fn entries(
    kernel: &Kernel,
    kind: &str,
    root: VirtAddr,
) -> Result<(Vec<Entry>, Option<String>), CommandError> {
    // crash takes the beginnings of these words, too.
    Ok(match kind {
        "rbtree" | "rb" => {
            let walk = kernel.rb_tree(root);
            let entry = |node: VirtAddr| Entry { indexes: None, stored: node.0 };
            (walk.nodes.into_iter().map(entry).collect(), walk.problem)
        }
        "xarray" | "xa" | "x" | "radix" | "ra" => {
            let walk = kernel.xarray(root);
            let entry = |one: crate::kernel::xarray::Entry| Entry {
                indexes: Some((one.index, one.index.saturating_add(one.span.saturating_sub(1)))),
                stored: one.entry,
            };
            (walk.entries.into_iter().map(entry).collect(), walk.problem)
        }
        "maple" | "ma" | "m" => {
            let walk = kernel.maple_tree(root);
            let entry = |one: crate::kernel::maple::Entry| Entry {
                indexes: Some((one.first, one.last)),
                stored: one.entry,
            };
            (walk.entries.into_iter().map(entry).collect(), walk.problem)
        }
        other => {
            return Err(CommandError(format!(
                "there is no tree type '{}'; use rbtree, xarray, radix or maple",
                printable(other)
            )));
        }
    })
}
