//! `info os`: tables of the kernel's own view, each one a command's answer.
//!
//! gdb asks for `qXfer:osdata:read:TYPE`, and the words behind the type are the command's arguments
//! (`info os files 123`). Source: GDB manual, "Operating System Auxiliary Information" and "General Query Packets".

use super::threads::xml_escape;
use crate::bytes::printable;
use crate::command::{self, Context};
use serde_json::Value;
use std::fmt::Write;

/// A table: what the user types, the command that answers, the key of the rows in its JSON, and what it is.
struct Table {
    name: &'static str,
    command: &'static str,
    rows: &'static str,
    title: &'static str,
}

const TABLES: &[Table] = &[
    Table { name: "tasks", command: "ps", rows: "tasks", title: "Processes, threads and idle tasks" },
    Table { name: "cpus", command: "info", rows: "cpus", title: "CPUs and what ran on them" },
    Table { name: "modules", command: "mod", rows: "modules", title: "Loaded modules" },
    Table { name: "slabs", command: "kmem -s", rows: "caches", title: "Slab caches" },
    Table { name: "log", command: "log", rows: "records", title: "The kernel's log" },
    Table { name: "files", command: "files", rows: "files", title: "Open files of a task: files PID" },
    Table { name: "mounts", command: "mount", rows: "mounts", title: "Mounted filesystems" },
    Table { name: "vmas", command: "vm", rows: "vmas", title: "Address space of a task: vmas PID" },
];

/// The XML for what stands behind `info os`; a failing command is a table of one row that says why.
pub(super) fn document(context: &Context<'_>, wanted: &str) -> String {
    let (name, arguments) = wanted.split_once(' ').unwrap_or((wanted, ""));
    let Some(table) = TABLES.iter().find(|table| table.name == name) else { return list_of_tables(name) };
    let line = format!("{} {arguments}", table.command);
    let rows = match command::run(context, line.trim()) {
        Ok(output) => rows_of(output.json, table.rows),
        Err(error) => vec![serde_json::json!({ "problem": error.to_string() })],
    };
    let mut xml = start(name);
    for row in &rows {
        let columns = match row {
            Value::Object(fields) => fields.iter().map(|(key, value)| (key.clone(), cell(value))).collect(),
            other => vec![("value".to_owned(), cell(other))],
        };
        item(&mut xml, columns.iter().map(|(key, value)| (key.as_str(), value.as_str())));
    }
    xml + "</osdata>\n"
}

/// `info os` alone, and the answer to a name that there is not.
fn list_of_tables(asked: &str) -> String {
    let mut xml = start("types");
    if asked.is_empty() {
        for table in TABLES {
            item(&mut xml, [("Type", table.name), ("Description", table.title), ("Title", table.title)]);
        }
    } else {
        let known: Vec<&str> = TABLES.iter().map(|table| table.name).collect();
        let problem = format!("there is no table '{}'; there are: {}", printable(asked), known.join(", "));
        item(&mut xml, [("problem", problem.as_str())]);
    }
    xml + "</osdata>\n"
}

fn start(name: &str) -> String {
    let mut xml = String::from("<?xml version=\"1.0\"?>\n<!DOCTYPE osdata SYSTEM \"osdata.dtd\">\n");
    let _ = writeln!(xml, "<osdata type=\"{}\">", xml_escape(&printable(name)));
    xml
}

fn item<'a>(xml: &mut String, columns: impl IntoIterator<Item = (&'a str, &'a str)>) {
    xml.push_str("<item>");
    for (name, value) in columns {
        let (name, value) = (xml_escape(&printable(name)), xml_escape(&printable(value)));
        let _ = write!(xml, "<column name=\"{name}\">{value}</column>");
    }
    xml.push_str("</item>\n");
}

fn rows_of(json: Value, key: &str) -> Vec<Value> {
    match json {
        Value::Array(rows) => rows,
        Value::Object(mut object) => match object.remove(key) {
            Some(Value::Array(rows)) => rows,
            _ => vec![Value::Object(object)],
        },
        other => vec![other],
    }
}

/// A value as it stands in a column.
fn cell(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        Value::Array(values) => values.iter().map(cell).collect::<Vec<_>>().join(", "),
        Value::Object(fields) => {
            let one = |(key, value): (&String, &Value)| format!("{key}={}", cell(value));
            fields.iter().map(one).collect::<Vec<_>>().join(" ")
        }
        other => other.to_string(),
    }
}
