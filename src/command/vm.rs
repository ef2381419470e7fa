//! `vm`: the address space of a process.

use super::ps::bare;
use super::table::Table;
use super::task::{chosen, heading, identity};
use super::{Command, CommandError, Context, Output, printable};
use crate::addr::VirtAddr;
use crate::kernel::Kernel;
use crate::kernel::vma::{Vma, Vmas};
use serde_json::{Value, json};
use std::fmt::Write;

pub const COMMAND: Command = Command {
    name: "vm",
    arguments: "[-f FLAGS | [-v] [PID|TASK]...]",
    summary: "address space of a task: its areas, their flags and files",
    help: "Without PID or TASK (the address of a task_struct): the task chosen with 'set', else the one on the CPU \
           selected in gdb. The columns behind the addresses are those of /proc/PID/maps; -v has the flags by name as well, \
           and -f names the flags in a number.\n\n\
           Examples:\n  vm\n  vm 1\n  vm -v 1\n  vm -f 8000875\n  foreach user vm\n",
    run,
};

fn run(context: &Context<'_>, arguments: &[&str]) -> Result<Output, CommandError> {
    let kernel = context.kernel()?;
    let (verbose, words) = match arguments {
        ["-f", flags] => return decode(kernel, flags),
        ["-v", words @ ..] => (true, words),
        [option, ..] if option.starts_with('-') => {
            let option = printable(option);
            return Err(CommandError(format!("'vm' has no option '{option}'; try 'help vm'")));
        }
        words => (false, words),
    };
    let (tasks, sizes) = (kernel.task_reader()?, kernel.mm_reader()?);
    let (mut text, mut rows) = (String::new(), Vec::new());
    let all = chosen(context, words)?;
    let single = all.len() == 1;
    for task in all {
        let info = tasks.read(task.at);
        text += &heading(&info);
        let mut json = identity(&info);
        let Some(mm) = info.mm else {
            text.push_str("No address space: a kernel thread, or a task that has ended\n\n");
            json.insert("mm".into(), Value::Null);
            json.insert("vmas".into(), json!([]));
            rows.push(Value::Object(json));
            continue;
        };
        let size = sizes.size(mm);
        let pgd = kernel.object("mm_struct", mm)?.get("pgd").ok().map(VirtAddr);
        let kib = |bytes: Option<u64>| bytes.map_or_else(|| "?".into(), |bytes| format!("{}k", bytes / 1024));
        let mut table = Table::new(&["MM", "PGD", ">RSS", ">TOTAL_VM"]);
        table.row([
            bare(mm),
            pgd.map_or_else(|| "?".into(), bare),
            kib(size.resident),
            kib(size.virtual_size),
        ]);
        text += &table.render();
        let vmas = kernel
            .vmas(mm)
            .unwrap_or_else(|error| Vmas { areas: Vec::new(), problem: Some(error.to_string()) });
        text += &areas(kernel, &vmas.areas, verbose);
        if let Some(problem) = &vmas.problem {
            let _ = writeln!(text, "problem: {}", printable(problem));
        }
        text.push('\n');
        json.insert("mm".into(), json!(mm.to_string()));
        json.insert("pgd".into(), json!(pgd.map(|pgd| pgd.to_string())));
        json.insert("rss_kib".into(), json!(size.resident.map(|bytes| bytes / 1024)));
        json.insert("vsz_kib".into(), json!(size.virtual_size.map(|bytes| bytes / 1024)));
        json.insert("vmas".into(), vmas.areas.iter().map(|vma| area_json(kernel, vma)).collect());
        json.insert("problem".into(), json!(vmas.problem));
        rows.push(Value::Object(json));
    }
    let json = match (single, rows.pop()) {
        (true, Some(one)) => one,
        (_, last) => {
            rows.extend(last);
            json!({ "tasks": rows })
        }
    };
    Ok(Output { text, json })
}

fn decode(kernel: &Kernel, flags: &str) -> Result<Output, CommandError> {
    let number = u64::from_str_radix(flags.strip_prefix("0x").unwrap_or(flags), 16);
    let flags = number.map_err(|_| CommandError("'vm -f' takes the flags as a hexadecimal number".into()))?;
    let vma = Vma { at: VirtAddr(0), start: 0, end: 0, flags, offset: 0, file: None, name: None };
    let names = vma.flag_names(kernel);
    Ok(Output { text: format!("{flags:x}: {}\n", names.join(" ")), json: json!({ "flags": names }) })
}

pub fn what(vma: &Vma) -> String {
    match (&vma.file, &vma.name) {
        (Some((_, file)), _) => file.shown(),
        (None, Some(name)) => name.clone(),
        (None, None) => String::new(),
    }
}

fn areas(kernel: &Kernel, areas: &[Vma], verbose: bool) -> String {
    let flags = if verbose { "FLAGS BY NAME" } else { "" };
    let mut table = Table::new(&["VMA", ">START", ">END", ">FLAGS", "PERM", ">OFFSET", "FILE", flags]);
    for vma in areas {
        table.row([
            bare(vma.at),
            format!("{:x}", vma.start),
            format!("{:x}", vma.end),
            format!("{:x}", vma.flags),
            vma.permissions(),
            format!("{:x}", vma.offset),
            what(vma),
            if verbose { vma.flag_names(kernel).join(" ") } else { String::new() },
        ]);
    }
    table.render()
}

fn area_json(kernel: &Kernel, vma: &Vma) -> Value {
    let file = vma.file.as_ref();
    json!({
        "vma": vma.at.to_string(),
        "start": format!("{:#x}", vma.start),
        "end": format!("{:#x}", vma.end),
        "flags": format!("{:#x}", vma.flags),
        "flag_names": vma.flag_names(kernel),
        "permissions": vma.permissions(),
        "offset": vma.offset,
        "file": file.map(|(at, _)| at.to_string()),
        "device": file.and_then(|(_, file)| file.device).map(|(major, minor)| format!("{major}:{minor}")),
        "ino": file.and_then(|(_, file)| file.ino),
        "path": match file {
            Some((_, file)) => file.path.clone().ok(),
            None => Some(what(vma)),
        },
        "problem": file.and_then(|(_, file)| file.path.as_ref().err()),
    })
}
