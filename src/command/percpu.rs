//! `percpu`: each CPU's copy of a per-CPU variable, static, of a module, or allocated.

use super::args::Options;
use super::expression::{Expression, Value, cpu_list};
use super::p;
use super::value::{Style, read};
use super::{Command, CommandError, Context, Output, printable};
use crate::addr::VirtAddr;
use crate::debuginfo::types::Shape;
use crate::kernel::{CpuId, Kernel};
use serde_json::json;
use std::fmt::Write;

pub const COMMAND: Command = Command {
    name: "percpu",
    arguments: "[-x|-d] VAR|EXPRESSION [CPUS]",
    summary: "each CPU's copy of a per-CPU variable",
    help: "EXPRESSION is one over a per-CPU variable (runqueues.nr_running), or a '__percpu' pointer such as those in \
           kmem_cache and net: then what it points at is shown for each CPU. '(TYPE *)ADDR' makes such a pointer of a \
           number.\n\n\
           CPUS are a for all possible CPUs (the default), or numbers and ranges such as 2,4-5. A CPU that is offline \
           is said to be; its copy is as it left it.\n\n\
           -x, -d   hexadecimal or decimal numbers\n\n\
           Examples:\n  percpu runqueues.nr_running\n  percpu runqueues.curr 0-1\n  \
           percpu init_net.mib.net_statistics\n",
    run,
};

fn run(context: &Context<'_>, arguments: &[&str]) -> Result<Output, CommandError> {
    let options = Options::read("percpu", &["x", "d"], false, arguments)?;
    let style = Style { hex: options.has("x") && !options.has("d") };
    let kernel = context.kernel()?;
    let is_list = |text: &str| {
        matches!(text, "a" | "all")
            || text.starts_with(|c: char| c.is_ascii_digit())
                && text.bytes().all(|b| b.is_ascii_digit() || b == b',' || b == b'-')
    };
    let (words, list) = match options.rest.as_slice() {
        [] => return Err(CommandError("which variable? try 'help percpu'".into())),
        [words @ .., list] if !words.is_empty() && is_list(list) => (words, Some(*list)),
        words => (words, None),
    };
    let text = words.join(" ");
    let expression = Expression::new(context, &text)?;
    let cpus = match (list, expression.cpus()) {
        (Some(list), _) => cpu_list(kernel, list)?,
        (None, Some(cpus)) => cpus.to_vec(),
        (None, None) => kernel.possible_cpus(),
    };
    let (mut out, mut values, mut ty) = (String::new(), Vec::new(), None);
    for cpu in cpus {
        let (at, node) = if expression.is_per_cpu() {
            let value = expression.value_on(context, cpu)?;
            let at = match value {
                Value::Place(place) => Some(place.at),
                _ => None,
            };
            let (node, spelled) = p::node(kernel, &value, style)?;
            ty = ty.or(spelled);
            (at, node)
        } else {
            let (at, target) = copy(context, kernel, &expression, &text, cpu)?;
            let object = kernel.object_of(target, at)?;
            ty = ty.or_else(|| Some(object.type_name()));
            (Some(at), read(&object, style))
        };
        let offline = kernel.is_online(cpu) == Some(false);
        let place = at.map_or(String::new(), |at| format!(" at {at}"));
        let _ =
            writeln!(out, "CPU {cpu}{}{place}: {}", if offline { " (offline)" } else { "" }, node.text(0));
        values.push(json!({
            "cpu": cpu.0,
            "online": kernel.is_online(cpu),
            "address": at.map(|at| at.to_string()),
            "value": node.json(),
        }));
    }
    Ok(Output { text: out, json: json!({ "expression": text, "type": ty, "values": values }) })
}

/// `cpu`'s copy of what a `__percpu` pointer names, and its type.
fn copy(
    context: &Context<'_>,
    kernel: &Kernel,
    expression: &Expression<'_>,
    text: &str,
    cpu: CpuId,
) -> Result<(VirtAddr, crate::debuginfo::TypeId), CommandError> {
    let types = kernel.type_table()?;
    let no_pointer = || {
        CommandError(format!(
            "'{}' is neither over a per-CPU variable nor a '__percpu' pointer; cast it: (TYPE *)…",
            printable(text)
        ))
    };
    let (ty, bits) = match expression.value(context)? {
        Value::Place(place) => (place.ty, place.u64().map_err(|_| no_pointer())?),
        Value::Number(number) => (number.ty.ok_or_else(no_pointer)?, number.bits),
        Value::Symbol(_) => return Err(no_pointer()),
    };
    let target = match types.strip(ty).map(|(_, ty)| ty.shape.clone()) {
        Some(Shape::Pointer(target)) => target,
        _ => return Err(no_pointer()),
    };
    if bits == 0 {
        return Err(CommandError(format!("'{}' is NULL", printable(text))));
    }
    let at = kernel.per_cpu_pointer(VirtAddr(bits), cpu);
    let at = at.ok_or_else(|| {
        CommandError(format!("where the per-CPU memory of CPU {cpu} is is not known: no __per_cpu_offset"))
    })?;
    Ok((at, target))
}
