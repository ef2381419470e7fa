//! `log`: the kernel's message buffer.

use super::{Command, CommandError, Context, Output, no_arguments, printable};
use serde_json::json;
use std::fmt::Write;

pub const COMMAND: Command = Command {
    name: "log",
    arguments: "",
    summary: "print the kernel's message buffer (dmesg)",
    help: "Times are seconds since boot. Works without symbols: the dump's VMCOREINFO describes the buffer.\n\n\
           Example:\n  log\n",
    run,
};

fn run(context: &Context<'_>, arguments: &[&str]) -> Result<Output, CommandError> {
    no_arguments("log", arguments)?;
    let kernel = context.kernel()?;
    let records = kernel.log().map_err(|error| CommandError(error.to_string()))?;
    let mut text = String::new();
    for record in &records {
        let (seconds, micros) = (record.ts_nsec / 1_000_000_000, record.ts_nsec / 1000 % 1_000_000);
        for line in record.text.split('\n') {
            let _ = writeln!(text, "[{seconds:5}.{micros:06}] {}", printable(line));
        }
    }
    let json = records.iter().map(|r| json!({ "ts_nsec": r.ts_nsec, "text": r.text })).collect();
    Ok(Output { text, json })
}
