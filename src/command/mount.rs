//! `mount`: what is mounted where.

use super::ps::bare;
use super::table::Table;
use super::{Command, CommandError, Context, Output, args, printable};
use crate::kernel::vfs::Mounts;
use serde_json::json;
use std::fmt::Write;

pub const COMMAND: Command = Command {
    name: "mount",
    arguments: "[-n PID|TASK]",
    summary: "mounted filesystems",
    help: "Those of the mount namespace of the first process, or with -n of another task's. A bind mount's root inside \
           its filesystem stands behind the directory.\n\n\
           Examples:\n  mount\n  mount -n 1234\n",
    run,
};

fn run(context: &Context<'_>, arguments: &[&str]) -> Result<Output, CommandError> {
    let kernel = context.kernel()?;
    let task = match arguments {
        [] => match kernel.find_task(1)? {
            Some(task) => task,
            None => context.task()?,
        },
        ["-n", task] => args::task(context, task)?,
        _ => return Err(CommandError("'mount' takes -n PID or nothing; try 'help mount'".into())),
    };
    let Some(Mounts { mounts, problem }) = kernel.mounts(task)? else {
        return Err(CommandError(format!("the task at {} has no mount namespace: it has ended", task.at)));
    };
    let mut table = Table::new(&["MOUNT", "SUPERBLK", "TYPE", "", "DEVNAME", "DIRNAME"]);
    let mut rows = Vec::new();
    for mount in &mounts {
        let shown = |path: &Result<String, String>| match path {
            Ok(path) => path.clone(),
            Err(why) => format!("({why})"),
        };
        let root = match &mount.root {
            Ok(root) if root == "/" => String::new(),
            root => format!("  (of {})", shown(root)),
        };
        table.row([
            bare(mount.at),
            bare(mount.super_block),
            mount.kind.clone(),
            if mount.read_only { "ro" } else { "rw" }.to_owned(),
            mount.source.clone(),
            shown(&mount.path) + &root,
        ]);
        rows.push(json!({
            "mount": mount.at.to_string(),
            "superblock": mount.super_block.to_string(),
            "id": mount.id,
            "parent_id": mount.parent_id,
            "device": mount.device.map(|(major, minor)| format!("{major}:{minor}")),
            "type": mount.kind,
            "source": mount.source,
            "path": mount.path.as_ref().ok(),
            "root": mount.root.as_ref().ok(),
            "read_only": mount.read_only,
        }));
    }
    let mut text = table.render();
    if let Some(problem) = &problem {
        let _ = writeln!(text, "problem: {}", printable(problem));
    }
    Ok(Output { text, json: json!({ "mounts": rows, "problem": problem }) })
}
