//! `help`: the list of commands, or one command's help.

use super::{COMMANDS, Command, CommandError, Context, Output, find};
use serde_json::json;
use std::fmt::Write;

pub const COMMAND: Command = Command {
    name: "help",
    arguments: "[COMMAND]",
    summary: "list the commands, or explain one",
    help: "Example:\n  help why\n",
    run,
};

fn run(_context: &Context<'_>, arguments: &[&str]) -> Result<Output, CommandError> {
    let mut text = String::new();
    let described = |c: &Command| json!({ "name": c.name, "arguments": c.arguments, "summary": c.summary, "help": c.help });
    match arguments {
        [] => {
            for c in COMMANDS {
                let _ =
                    writeln!(text, "{:<22} {}", format!("{} {}", c.name, c.arguments).trim_end(), c.summary);
            }
            let _ = writeln!(text, "\n'help COMMAND' explains one. In gdb put 'monitor' before each.");
            Ok(Output { text, json: COMMANDS.iter().map(described).collect() })
        }
        [name] => {
            let c = find(name)?;
            let _ = write!(
                text,
                "{}\n\n{}.\n\n{}",
                format!("{} {}", c.name, c.arguments).trim_end(),
                c.summary,
                c.help
            );
            Ok(Output { text, json: described(c) })
        }
        _ => Err(CommandError("'help' takes at most one command".into())),
    }
}
