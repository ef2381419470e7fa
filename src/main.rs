//! Parse, run, print the error chain, exit code.

use clap::Parser;
use kstub::cli;
use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments = cli::Cli::parse();
    let default = ["warn", "kstub=info", "kstub=trace"][usize::from(arguments.verbose.min(2))];
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(default));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).without_time().init();
    match cli::run(arguments) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("kstub: {error:#}");
            ExitCode::from(cli::exit_code(&error))
        }
    }
}
