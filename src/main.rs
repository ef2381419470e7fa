//! Parse, run, print the error chain, exit code.

use anyhow::Context;
use clap::Parser;
use kstub::backend::Dump;
use kstub::cli::{Cli, Command, Target, exit};
use kstub::kernel::{Machine, OpenError, Options};
use kstub::{command, debuginfo, server, vmcore};
use std::io::{IsTerminal, Write};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let default = ["warn", "kstub=info", "kstub=trace"][usize::from(cli.verbose.min(2))];
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(default));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).without_time().init();
    match run(cli) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("kstub: {error:#}");
            ExitCode::from(exit_code(&error))
        }
    }
}

/// Runs the command and returns the exit code.
fn run(cli: Cli) -> anyhow::Result<u8> {
    match cli.command {
        Command::Gdb { target, gdb, args } => {
            let machine = open(&target)?;
            Ok(server::gdb(Arc::new(machine), &gdb, &args)?)
        }
        Command::Serve { target, listen, allow_remote } => {
            let listen = server::Listen::parse(&listen, allow_remote)?;
            let machine = Arc::new(open(&target)?);
            report_problems(&machine);
            server::serve(machine, listen, &|ready| eprintln!("{ready}"))?;
            Ok(0)
        }
        Command::Info { target, json } => {
            let output = command::render_info(&open(&target)?);
            let text = if json { format!("{:#}\n", output.json) } else { output.text };
            print(&text)?;
            Ok(0)
        }
    }
}

/// The exit code for an error: the first cause that has one decides.
fn exit_code(error: &anyhow::Error) -> u8 {
    let code = error.chain().find_map(|cause| {
        if let Some(error) = cause.downcast_ref::<vmcore::Error>() {
            use vmcore::Error::{Denied, Io, Open};
            let unreadable = matches!(error, Open { .. } | Denied { .. } | Io { .. });
            return Some(if unreadable { exit::UNREADABLE } else { exit::NOT_A_DUMP });
        }
        if let Some(error) = cause.downcast_ref::<OpenError>() {
            let io = matches!(error, OpenError::DebugInfo(debuginfo::Error::Io { .. }));
            return Some(if io { exit::UNREADABLE } else { exit::VMLINUX });
        }
        cause.downcast_ref::<server::ListenError>().map(|_| exit::LISTEN)
    });
    code.unwrap_or(exit::FAILURE)
}

fn open(target: &Target) -> anyhow::Result<Machine> {
    let dump = Dump::open(&target.dump)?;
    // A dump reached through a link has its vmlinux beside the link or beside the file.
    let beside =
        target.dump.parent().map(|dir| if dir.as_os_str().is_empty() { Path::new(".") } else { dir });
    let options = Options { vmlinux: target.vmlinux.clone(), beside: beside.map(Path::to_owned) };
    let bar = scan_bar();
    let machine = Machine::open(Arc::new(dump), &options, &|done, total| {
        bar.set_length(total);
        bar.set_position(done);
    });
    bar.finish_and_clear();
    Ok(machine?)
}

/// A bar for the scan of RAM; hidden where standard error is no terminal.
fn scan_bar() -> indicatif::ProgressBar {
    let bar = indicatif::ProgressBar::new(0);
    if !std::io::stderr().is_terminal() {
        bar.set_draw_target(indicatif::ProgressDrawTarget::hidden());
    }
    if let Ok(style) = indicatif::ProgressStyle::with_template(
        "looking for the kernel in RAM {bar:40} {bytes}/{total_bytes}",
    ) {
        bar.set_style(style);
    }
    bar
}

fn report_problems(machine: &Machine) {
    for problem in machine.problems() {
        eprintln!("kstub: {}", command::printable(&problem));
    }
}

/// Writes to standard output; a reader that has gone away (`| head`) is no error.
fn print(text: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        result => result.context("writing to standard output failed"),
    }
}
