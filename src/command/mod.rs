//! Commands: text in, one value out that renders as text or JSON. Knows neither gdb nor stdout.

use crate::kernel::{CpuId, Machine};

/// What a command is run with.
pub struct Context<'a> {
    /// The machine it is about.
    pub machine: &'a Machine,
    /// The CPU the user has selected.
    pub cpu: CpuId,
}

/// What a command answers: one value with two renderings.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Output {
    /// For people; ends with a newline unless empty.
    pub text: String,
    /// For scripts.
    pub json: serde_json::Value,
}

/// A failed command: the text for the user, lower case, with the cure where there is one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct CommandError(pub String);

/// Runs one command line such as `why 0xffff888000000000`.
pub fn run(_context: &Context<'_>, line: &str) -> Result<Output, CommandError> {
    Err(CommandError(format!("unknown command '{line}'; try 'help'")))
}
