//! `p`: the value of an expression.

use super::args::Options;
use super::expression::{Expression, Value, points_at};
use super::structure::cpu_line;
use super::value::{Node, Style, integer, number, read};
use super::{Command, CommandError, Context, Output, printable};
use crate::debuginfo::types::Shape;
use crate::kernel::Kernel;
use serde_json::json;
use std::fmt::Write;

pub const COMMAND: Command = Command {
    name: "p",
    arguments: "[-x|-d] EXPRESSION",
    summary: "print the value of a C expression",
    help: "Variables, ->, ., [], *, &, casts, sizeof, arithmetic, comparisons, enumerators and $REGISTER; *POINTER@COUNT \
           for an array. Numbers are decimal unless they begin with 0x. Nothing is called or changed.\n\n\
           A per-CPU variable is the selected CPU's copy; VAR:CPUS is that of others: a for all, or 2,4-5. Its name \
           alone tells its type and addresses. Types of globals come from the debug info, or from a table of the usual \
           ones; others need a cast: *(TYPE *)&VAR.\n\n\
           -x, -d   hexadecimal or decimal numbers\n\n\
           Examples:\n  p jiffies\n  p init_task.comm\n  p -x ((struct task_struct *)0xffff888003a40000)->flags\n  \
           p runqueues:a.nr_running\n  p sizeof(struct page) * 4\n",
    run,
};

fn run(context: &Context<'_>, arguments: &[&str]) -> Result<Output, CommandError> {
    let options = Options::read("p", &["x", "d"], false, arguments)?;
    if options.rest.is_empty() {
        return Err(CommandError("print what? try 'help p'".into()));
    }
    let style = Style { hex: options.has("x") && !options.has("d") };
    let text = options.rest.join(" ");
    let kernel = context.kernel()?;
    let expression = Expression::new(context, &text)?;
    if let (None, Some(name)) = (expression.cpus(), expression.bare_per_cpu_name()) {
        return addresses(context, kernel, &expression, name);
    }
    let (mut out, mut values) = (String::new(), Vec::new());
    for (cpu, value) in expression.values(context)? {
        let label = cpu.map_or_else(|| text.clone(), |cpu| expression.label(cpu));
        let (node, ty) = node(kernel, &value, style)?;
        let _ = writeln!(out, "{} = {}{}", printable(&label), lead(kernel, &value)?, node.text(0));
        let at = match value {
            Value::Place(place) => Some(place.at.to_string()),
            _ => None,
        };
        values.push(json!({ "cpu": cpu.map(|cpu| cpu.0), "type": ty, "address": at, "value": node.json() }));
    }
    Ok(Output { text: out, json: json!({ "expression": text, "values": values }) })
}

/// A value read or computed, and the spelling of its type.
pub fn node(
    kernel: &Kernel,
    value: &Value<'_>,
    style: Style,
) -> Result<(Node, Option<String>), CommandError> {
    let types = kernel.type_table()?;
    Ok(match value {
        Value::Place(place) => (read(place, style), Some(place.type_name())),
        Value::Number(one) => match one.ty {
            Some(ty) => (number(kernel, ty, one.bits, style), Some(types.spell(ty))),
            None => {
                (integer(one.bits, one.size, one.signed, style), Some(plain(one.size, one.signed).into()))
            }
        },
        Value::Symbol(at) if !kernel.is_text(*at) => {
            let name = kernel.describe_address(*at).unwrap_or_default();
            let text = format!("<of a type that is not known, at {at} ({name}); say *(TYPE *)&SYMBOL>");
            (Node::Leaf(text, json!(at.to_string())), None)
        }
        Value::Symbol(at) => {
            let name = kernel.describe_address(*at).map_or(String::new(), |name| format!(" <{name}>"));
            (Node::Leaf(format!("{at}{name}"), json!(at.to_string())), None)
        }
    })
}

fn plain(size: u64, signed: bool) -> &'static str {
    match (size, signed) {
        (8, true) => "long",
        (8, false) => "unsigned long",
        (_, true) => "int",
        (_, false) => "unsigned int",
    }
}

/// `(struct page *) ` before a pointer, as gdb has it.
fn lead(kernel: &Kernel, value: &Value<'_>) -> Result<String, CommandError> {
    let types = kernel.type_table()?;
    let ty = match value {
        Value::Place(place) => Some(place.ty),
        Value::Number(number) => number.ty,
        Value::Symbol(_) => None,
    };
    let is = |ty| types.strip(ty).is_some_and(|(_, ty)| matches!(ty.shape, Shape::Pointer(_)));
    let to_char = |ty| types.spell(ty).trim_start_matches("const ") == "char *";
    Ok(match ty {
        Some(ty) if is(ty) && !to_char(ty) => format!("({}) ", printable(&types.spell(ty))),
        _ => String::new(),
    })
}

/// The name of a per-CPU variable alone: its type, and where each CPU's copy is.
fn addresses(
    context: &Context<'_>,
    kernel: &Kernel,
    expression: &Expression<'_>,
    name: &str,
) -> Result<Output, CommandError> {
    let types = kernel.type_table()?;
    let ty = kernel.variable_type(name);
    let mut text = match ty {
        Some(ty) => format!("PER-CPU DATA TYPE:\n  {};\n", printable(&types.declare(ty, name))),
        None => format!("PER-CPU DATA TYPE:\n  not known for {}\n", printable(name)),
    };
    text.push_str("PER-CPU ADDRESSES:\n");
    let mut values = Vec::new();
    for cpu in kernel.possible_cpus() {
        let at = points_at_place(&expression.value_on(context, cpu)?)?;
        let line = cpu_line(kernel, Some(cpu), at);
        let _ = writeln!(text, "  {}", line.trim_end_matches(':'));
        values.push(json!({ "cpu": cpu.0, "online": kernel.is_online(cpu), "address": at.to_string() }));
    }
    let json = json!({ "expression": name, "type": ty.map(|ty| types.spell(ty)), "addresses": values });
    Ok(Output { text, json })
}

fn points_at_place(value: &Value<'_>) -> Result<crate::addr::VirtAddr, CommandError> {
    match value {
        Value::Place(place) => Ok(place.at),
        other => points_at(other),
    }
}
