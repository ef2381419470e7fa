//! `qemu`: a line for the monitor of the QEMU that runs the guest.
//!
//! Source: QEMU `hmp-commands.hx`.

use super::{Command, CommandError, Context, Output, printable};
use serde_json::json;

pub const COMMAND: Command = Command {
    name: "qemu",
    arguments: "LINE",
    summary: "QEMU's own monitor (live guests)",
    help: "Passes LINE on to QEMU's human monitor and prints what it says. What changes the guest or QEMU (quit, \
           system_reset, device_add, stop, ...) needs --allow-write, and so do x and xp, which read devices' registers, \
           too: use rd.\n\n\
           Examples:\n  qemu info registers -a\n  qemu info mtree -f\n  qemu info chardev\n",
    run,
};

/// The first words of lines that look and change nothing.
const HARMLESS: [&str; 7] = ["info", "p", "print", "gpa2hva", "gpa2hpa", "gva2gpa", "help"];

fn run(context: &Context<'_>, arguments: &[&str]) -> Result<Output, CommandError> {
    let Some(live) = context.machine.backend().live() else {
        return Err(CommandError("this is a crash dump: there is no QEMU behind it".into()));
    };
    let Some(first) = arguments.first() else {
        return Err(CommandError("'qemu' takes a line for QEMU's monitor; try 'help qemu'".into()));
    };
    // A format may stand right behind: `x/4gx`.
    let name = first.split('/').next().unwrap_or_default();
    let line = arguments.join(" ");
    if !HARMLESS.contains(&name) && !live.may_write() {
        return Err(CommandError(format!(
            "'{}' may change the guest or QEMU; start kstub with --allow-write to let it",
            printable(&line)
        )));
    }
    if !HARMLESS.contains(&name) {
        tracing::warn!("QEMU is told: {}", printable(&line));
    }
    let said = live.monitor(&line).map_err(|error| CommandError(error.to_string()))?;
    let mut text: String =
        said.lines().map(|line| printable(line.trim_end_matches('\r')).to_string() + "\n").collect();
    if text.trim().is_empty() {
        text.clear();
    }
    Ok(Output { json: json!({ "text": text }), text })
}
