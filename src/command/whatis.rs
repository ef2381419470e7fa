//! `whatis`: what a name or expression is: its declaration and size.

use super::declare::{Offsets, declaration, members_json};
use super::expression::{Expression, Value};
use super::{Command, CommandError, Context, Output, printable};
use crate::debuginfo::types::{Shape, TypeId};
use crate::kernel::Kernel;
use serde_json::{Value as Json, json};
use std::fmt::Write;

pub const COMMAND: Command = Command {
    name: "whatis",
    arguments: "TYPE|VAR|EXPRESSION",
    summary: "the declaration of a type, or the type of a variable or expression",
    help: "TYPE is a structure, union, enumeration (with or without the word) or typedef. A name that is both a \
           variable's and a type's is shown as both.\n\n\
           Examples:\n  whatis list_head\n  whatis enum zone_type\n  whatis atomic_t\n  whatis jiffies\n  \
           whatis init_task.thread_info.flags\n",
    run,
};

fn run(context: &Context<'_>, arguments: &[&str]) -> Result<Output, CommandError> {
    if arguments.is_empty() {
        return Err(CommandError("what is what? try 'help whatis'".into()));
    }
    let text = arguments.join(" ");
    let kernel = context.kernel()?;
    let types = kernel.type_table()?;
    let (mut out, mut definitions) = (String::new(), Vec::new());
    let ty = types.parse(&text);
    let variable = match ty {
        // A type's name may be a variable's, too.
        Some(_) if kernel.symbol_anywhere(&text).is_none() => None,
        _ => match of_expression(context, kernel, &text) {
            Ok(found) => Some(found),
            Err(error) if ty.is_none() => return Err(error),
            Err(_) => None,
        },
    };
    if let Some((line, json)) = variable {
        out.push_str(&line);
        definitions.push(json);
    }
    if let Some(ty) = ty {
        out.push_str(&declaration(types, ty, Offsets::default()));
        let size = types.size(ty);
        if let Some(size) = size {
            let _ = writeln!(out, "SIZE: {size}");
        }
        definitions.push(json!({
            "kind": "type",
            "type": types.spell(ty),
            "size": size,
            "members": members(kernel, ty)?,
        }));
    }
    Ok(Output { text: out, json: json!({ "expression": text, "definitions": definitions }) })
}

fn members(kernel: &Kernel, ty: TypeId) -> Result<Json, CommandError> {
    let types = kernel.type_table()?;
    Ok(match types.strip(ty).map(|(_, ty)| ty.shape.clone()) {
        Some(Shape::Composite { .. }) => members_json(types, ty),
        Some(Shape::Enum { values, .. }) => {
            values.iter().map(|(name, value)| json!({ "name": name, "value": value })).collect()
        }
        _ => Json::Null,
    })
}

/// A variable is shown as it is declared; of an expression there is only the type.
fn of_expression(context: &Context<'_>, kernel: &Kernel, text: &str) -> Result<(String, Json), CommandError> {
    let types = kernel.type_table()?;
    let is_name = text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
    let ty = match is_name.then(|| kernel.symbol_anywhere(text)).flatten() {
        Some(_) => kernel.variable_type(text),
        None => match Expression::new(context, text)?.value(context)? {
            Value::Place(place) => Some(place.ty),
            Value::Number(number) => match number.ty {
                Some(ty) => Some(ty),
                None => types.parse(match (number.size, number.signed) {
                    (8, true) => "long",
                    (8, false) => "unsigned long",
                    (_, true) => "int",
                    (_, false) => "unsigned int",
                }),
            },
            Value::Symbol(_) => None,
        },
    };
    let Some(ty) = ty else {
        let cure = "it is a function, or the debug info has no types of variables";
        return Err(CommandError(format!("the type of '{}' is not known: {cure}", printable(text))));
    };
    let declared = if is_name { types.declare(ty, text) } else { types.spell(ty) };
    let size = types.size(ty);
    let mut line = format!("{};\n", printable(&declared));
    if let (Some(size), false) = (size, is_name) {
        let _ = writeln!(line, "SIZE: {size}");
    }
    let kind = if is_name { "variable" } else { "expression" };
    Ok((line, json!({ "kind": kind, "type": types.spell(ty), "size": size, "members": Json::Null })))
}
