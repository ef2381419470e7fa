//! `files`: what a process has open.

use super::ps::bare;
use super::table::Table;
use super::task::{chosen, heading, identity};
use super::{Command, CommandError, Context, Output, printable};
use crate::addr::VirtAddr;
use crate::kernel::vfs::FileInfo;
use crate::kernel::{Kernel, Object};
use serde_json::{Value, json};
use std::fmt::Write;

pub const COMMAND: Command = Command {
    name: "files",
    arguments: "[PID|TASK]...",
    summary: "open files of a task, its root and working directory",
    help: "Without PID or TASK (the address of a task_struct): the task chosen with 'set', else the one on the CPU \
           selected in gdb. Paths are those of the mount namespace, whatever the task was chrooted to. TYPE is REG, DIR, \
           CHR, BLK, FIFO, SOCK, LNK, or UNKN for anonymous inodes.\n\n\
           Examples:\n  files\n  files 1\n  foreach user files\n",
    run,
};

fn run(context: &Context<'_>, arguments: &[&str]) -> Result<Output, CommandError> {
    if let Some(option) = arguments.iter().find(|word| word.starts_with('-')) {
        let option = printable(option);
        return Err(CommandError(format!("'files' has no option '{option}'; try 'help files'")));
    }
    let kernel = context.kernel()?;
    let reader = kernel.task_reader()?;
    let mut text = String::new();
    let mut rows = Vec::new();
    let tasks = chosen(context, arguments)?;
    let single = tasks.len() == 1;
    for task in tasks {
        let info = reader.read(task.at);
        text += &heading(&info);
        let mut json = identity(&info);
        let [root, cwd] = ["root", "pwd"].map(|which| directory(kernel, task, which));
        let shown = |path: &Option<String>| printable(path.as_deref().unwrap_or("none"));
        let _ = writeln!(text, "ROOT: {}    CWD: {}", shown(&root), shown(&cwd));
        json.insert("root".into(), json!(root));
        json.insert("cwd".into(), json!(cwd));
        let mut table = Table::new(&[">FD", "FILE", "DENTRY", "INODE", "TYPE", "PATH"]);
        let mut files = Vec::new();
        match kernel.open_files(task) {
            Ok(Some(open)) => {
                for file in open {
                    let what = &file.what;
                    let address = |at: Option<VirtAddr>| at.map_or_else(|| "?".to_owned(), bare);
                    table.row([
                        file.fd.to_string(),
                        bare(file.file),
                        address(what.dentry),
                        address(what.inode),
                        what.kind().to_owned(),
                        what.shown(),
                    ]);
                    files.push(file_json(file.fd, file.file, what));
                }
                text += &if files.is_empty() { "No open files\n".to_owned() } else { table.render() };
            }
            Ok(None) => text.push_str("No files: the task has ended\n"),
            Err(error) => {
                let _ = writeln!(text, "problem: {}", printable(&error.to_string()));
                json.insert("problem".into(), json!(error.to_string()));
            }
        }
        json.insert("files".into(), Value::Array(files));
        text.push('\n');
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

fn directory(kernel: &Kernel, task: Object<'_>, which: &str) -> Option<String> {
    let path = task.at("fs").ok()??.member(which).ok()?;
    match kernel.path(path) {
        Ok(path) => Some(path),
        Err(error) => Some(format!("({error})")),
    }
}

fn file_json(fd: u64, file: VirtAddr, what: &FileInfo) -> Value {
    json!({
        "fd": fd,
        "file": file.to_string(),
        "dentry": what.dentry.map(|at| at.to_string()),
        "inode": what.inode.map(|at| at.to_string()),
        "ino": what.ino,
        "type": what.kind(),
        "path": what.path.as_ref().ok(),
        "problem": what.path.as_ref().err(),
    })
}
