//! `mod`: loaded modules.

use super::ps::bare;
use super::table::Table;
use super::{Command, CommandError, Context, Output, printable};
use crate::kernel::Kernel;
use crate::kernel::module::Module;
use serde_json::{Value, json};
use std::fmt::Write;

pub const COMMAND: Command = Command {
    name: "mod",
    arguments: "[-t | -s NAME]",
    summary: "loaded modules",
    help: "BASE is where the module's text begins, SIZE all its memory in bytes; USES counts what uses it. Modules that \
           taint the kernel have their letters.\n\n\
           -t       only those that taint the kernel, with what each letter means\n\
           -s NAME  one module: its memory, sections, build-id, per-CPU data\n\n\
           Examples:\n  mod\n  mod -t\n  mod -s xfs\n",
    run,
};

fn run(context: &Context<'_>, arguments: &[&str]) -> Result<Output, CommandError> {
    let kernel = context.kernel()?;
    let modules = kernel.modules();
    let mut output = match arguments {
        [] => list(kernel, modules.list.iter()),
        ["-t"] => {
            let tainting = modules.list.iter().filter(|module| module.taints.is_some_and(|t| t != 0));
            let mut output = list(kernel, tainting);
            let bits = modules.list.iter().filter_map(|module| module.taints).fold(0, |all, bits| all | bits);
            for taint in kernel.taints_in(bits) {
                let _ = writeln!(output.text, "{}: {}", taint.letter, taint.words);
            }
            output
        }
        ["-s", name] => {
            // The kernel takes a dash for an underscore, too.
            let wanted = name.replace('-', "_");
            let found = modules.list.iter().find(|module| module.name.replace('-', "_") == wanted);
            let found = found.ok_or_else(|| {
                CommandError(format!("no module '{}' is loaded; 'mod' lists them", printable(name)))
            })?;
            one(kernel, found)
        }
        _ => return Err(CommandError("'mod' takes -t or -s NAME; try 'help mod'".into())),
    };
    for problem in &modules.problems {
        let _ = writeln!(output.text, "problem: {}", printable(problem));
    }
    if let Value::Object(object) = &mut output.json {
        object.insert("problems".into(), json!(modules.problems));
    }
    Ok(output)
}

fn size(module: &Module) -> u64 {
    module.regions.iter().fold(0, |sum, region| sum.saturating_add(region.size))
}

fn letters(kernel: &Kernel, module: &Module) -> Option<String> {
    let taints = kernel.taints_in(module.taints?);
    Some(taints.iter().map(|taint| taint.letter).collect())
}

fn list<'m>(kernel: &Kernel, modules: impl Iterator<Item = &'m Module>) -> Output {
    let mut table = Table::new(&["MODULE", "NAME", "BASE", ">SIZE", "STATE", ">USES", "TAINTS", "USED BY"]);
    let mut rows = Vec::new();
    for module in modules {
        table.row([
            bare(module.at),
            module.name.clone(),
            module.regions.first().map_or_else(|| "?".into(), |region| bare(region.start)),
            size(module).to_string(),
            module.state.map_or_else(|| "?".into(), |state| state.to_string()),
            module.uses.map_or_else(|| "?".into(), |uses| uses.to_string()),
            letters(kernel, module).unwrap_or_else(|| "?".into()),
            module.used_by.join(","),
        ]);
        rows.push(module_json(kernel, module));
    }
    let text = if rows.is_empty() { "no such modules\n".to_owned() } else { table.render() };
    Output { text, json: json!({ "modules": rows }) }
}

fn one(kernel: &Kernel, module: &Module) -> Output {
    let mut text = format!("{} at {}\n", printable(&module.name), bare(module.at));
    let mut line = |name: &str, value: &str| {
        let _ = writeln!(text, "  {name:<10} {}", printable(value));
    };
    line("state", &module.state.map_or_else(|| "?".into(), |state| state.to_string()));
    line("build-id", module.build_id.as_deref().unwrap_or("not known"));
    line("taints", &letters(kernel, module).unwrap_or_else(|| "?".into()));
    line("uses", &module.uses.map_or_else(|| "?".into(), |uses| uses.to_string()));
    line("used by", &module.used_by.join(", "));
    for region in &module.regions {
        line(region.kind, &format!("{} {} bytes", bare(region.start), region.size));
    }
    if let Some((at, size)) = module.per_cpu {
        line("per-CPU", &format!("{at:x} {size} bytes"));
    }
    let mut json = module_json(kernel, module);
    let sections = match kernel.module_sections(module) {
        Ok(sections) => {
            for section in &sections {
                let _ = writeln!(text, "    {} {}", bare(section.at), printable(&section.name));
            }
            sections.iter().map(|one| json!({ "name": one.name, "at": one.at.to_string() })).collect()
        }
        Err(error) => {
            let _ = writeln!(text, "  {}", printable(&error.to_string()));
            Value::Null
        }
    };
    if let Value::Object(object) = &mut json {
        object.insert("sections".into(), sections);
    }
    Output { text, json }
}

fn module_json(kernel: &Kernel, module: &Module) -> Value {
    let region = |region: &crate::kernel::module::Region| json!({ "kind": region.kind, "start": region.start.to_string(), "size": region.size });
    json!({
        "name": module.name,
        "module": module.at.to_string(),
        "base": module.regions.first().map(|region| region.start.to_string()),
        "size": size(module),
        "state": module.state.map(|state| state.to_string()),
        "uses": module.uses,
        "used_by": module.used_by,
        "taints": letters(kernel, module),
        "build_id": module.build_id,
        "regions": module.regions.iter().map(region).collect::<Vec<_>>(),
    })
}
