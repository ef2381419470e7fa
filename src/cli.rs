//! The command line: clap types, checked and turned into a call of a lower layer.

use crate::backend::Dump;
use crate::command;
use crate::kernel::{Machine, OpenError, Options};
use crate::{debuginfo, server, vmcore};
use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Exit codes; `--help` lists them.
pub mod exit {
    /// An error without a code of its own.
    pub const FAILURE: u8 = 1;
    /// Wrong arguments (clap's own code).
    pub const USAGE: u8 = 2;
    /// The file is not a dump kstub can use.
    pub const NOT_A_DUMP: u8 = 3;
    /// The vmlinux cannot be used, or is another kernel's.
    pub const VMLINUX: u8 = 4;
    /// The address cannot be listened on.
    pub const LISTEN: u8 = 5;
    /// A file cannot be read.
    pub const UNREADABLE: u8 = 6;
}

/// A Linux-aware GDB server over kernel crash dumps.
#[derive(Parser, Debug)]
#[command(version, propagate_version = true, after_help = AFTER_HELP)]
pub struct Cli {
    /// Say more about what is done; twice for everything. RUST_LOG overrides it.
    #[arg(short, long, action = clap::ArgAction::Count, global = true)]
    pub verbose: u8,
    #[command(subcommand)]
    command: Command,
}

const AFTER_HELP: &str = "\
Examples:
  kstub gdb vmcore                        start gdb on a dump, with symbols
  kstub gdb vmcore -- -batch -ex bt       the panicking CPU's backtrace, and exit
  kstub info vmcore                       what the dump is and which kernel is in it
  kstub serve vmcore                      then, in gdb: target remote 127.0.0.1:1234

Exit codes:
  0  success (kstub gdb: gdb's own exit code)
  1  other errors
  2  wrong arguments
  3  not a dump that can be used (format, architecture, damage)
  4  the vmlinux is unusable or belongs to another kernel
  5  cannot listen on the address
  6  a file cannot be read";

#[derive(Subcommand, Debug)]
enum Command {
    /// Start gdb on a dump: right vmlinux, KASLR offset, index cache
    #[command(after_help = "Examples:\n  kstub gdb vmcore\n  kstub gdb vmcore -- -batch -ex 'thread apply all bt'")]
    Gdb {
        #[command(flatten)]
        target: Target,
        /// The gdb to start
        #[arg(long, value_name = "PROGRAM", default_value = "gdb", env = "KSTUB_GDB")]
        gdb: PathBuf,
        /// Arguments for gdb, after '--'
        #[arg(last = true, value_name = "GDB ARGS")]
        args: Vec<std::ffi::OsString>,
    },
    /// Serve a dump to gdb clients, any number at once
    #[command(after_help = "Examples:\n  kstub serve vmcore\n  kstub serve vmcore --listen unix:/tmp/kstub.sock\n  \
                            gdb vmlinux -ex 'target remote | kstub serve vmcore --listen -'")]
    Serve {
        #[command(flatten)]
        target: Target,
        /// HOST:PORT, unix:PATH, or - for standard input and output
        #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:1234")]
        listen: String,
        /// Allow an address that other machines can reach (there is no authentication)
        #[arg(long)]
        allow_remote: bool,
    },
    /// Print what a dump is, which kernel is in it, and what is missing
    #[command(after_help = "Examples:\n  kstub info vmcore\n  kstub info vmcore --json | jq .kernel.release")]
    Info {
        #[command(flatten)]
        target: Target,
        /// Print one JSON object instead of text
        #[arg(long)]
        json: bool,
    },
}

#[derive(Args, Debug)]
struct Target {
    /// The dump: ELF vmcore or kdump-compressed, flattened or not
    dump: PathBuf,
    /// The kernel's vmlinux with debug info [default: found by build-id or release under /usr/lib/debug, or beside
    /// the dump]
    #[arg(long, value_name = "FILE")]
    vmlinux: Option<PathBuf>,
}

/// Runs the command and returns the exit code.
pub fn run(cli: Cli) -> anyhow::Result<u8> {
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
pub fn exit_code(error: &anyhow::Error) -> u8 {
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
    let beside = target.dump.parent().map(|dir| if dir.as_os_str().is_empty() { Path::new(".") } else { dir });
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
    if let Ok(style) =
        indicatif::ProgressStyle::with_template("looking for the kernel in RAM {bar:40} {bytes}/{total_bytes}")
    {
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
