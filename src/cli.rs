//! The command line: what can be typed, its help, and the exit codes. Runs nothing.

mod generate;

pub use generate::{completions, man};

use clap::{Args, Parser, Subcommand, ValueEnum, ValueHint};
use std::ffi::OsString;
use std::path::PathBuf;

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
    /// QEMU cannot be reached, or refuses.
    pub const GUEST: u8 = 7;
}

/// A Linux-aware GDB server over kernel crash dumps and QEMU guests.
#[derive(Parser, Debug)]
#[command(version, propagate_version = true, subcommand_value_name = "COMMAND", after_help = AFTER_HELP)]
pub struct Cli {
    /// Say more about what is done; twice for everything. RUST_LOG overrides it.
    #[arg(short, long, action = clap::ArgAction::Count, global = true)]
    pub verbose: u8,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

const AFTER_HELP: &str = "\
Examples:
  kstub gdb vmcore                        start gdb on a dump, with symbols
  kstub gdb vmcore -- -batch -ex bt       the panicking CPU's backtrace, and exit
  kstub info vmcore                       what the dump is and which kernel is in it
  kstub run vmcore ps 'task 1'            commands, without gdb
  kstub gdb vmcore --debug-dir /srv/debug look there for the vmlinux, by build-id
  kstub serve vmcore                      then: gdb -ex 'target remote 127.0.0.1:1234'
  kstub gdb --qemu unix:/run/vm/qmp.sock  start gdb on a running guest
  kstub run --qemu /run/vm/qmp.sock ps    look into it without stopping it

Exit codes:
  0  success (kstub gdb: gdb's own exit code)
  1  other errors
  2  wrong arguments
  3  not a dump that can be used (format, architecture, damage)
  4  the vmlinux is unusable or belongs to another kernel
  5  cannot listen on the address
  6  a file cannot be read
  7  QEMU cannot be reached, or refuses";

const RUN_HELP: &str = "\
Behind the dump, each argument that begins with a command's name is a command; '-' reads commands from standard input,
one a line. What one chooses ('set PID') holds for those behind it. 'help' lists the commands.

Examples:
  kstub run vmcore log
  kstub run vmcore 'ps -S' 'task 1' 'struct task_struct.comm init_task'
  kstub run vmcore --json ps | jq -r '.result.tasks[].comm'
  kstub run vmcore - < commands.txt
  kstub run --qemu unix:/run/vm/qmp.sock ps 'foreach UN bt'
  kstub run --qemu unix:/run/vm/qmp.sock --pause 'bt -a'
  kstub run --qemu unix:/run/vm/qmp.sock 'dump vmcore --format kdump-zlib'

A guest is not stopped, unless --pause says so, or it is dumped: what is read may change while it is read. A command
that met a contradiction is run again, up to three times, and if that does not help says so.

With --json each command gives one line: {\"schema\": 1, \"command\": ..., \"result\": ...}, or \"error\" in place of
\"result\". Keys may be added under the same schema number; none changes its meaning or goes.

The exit code is 1 if a command failed; those behind it were run all the same.";

/// What to do.
#[derive(Subcommand, Debug)]
#[allow(missing_docs)] // The fields' docs are their help.
pub enum Command {
    /// Start gdb on a dump or a guest: right vmlinux, KASLR offset, index cache
    #[command(
        after_help = "In gdb, kstub's commands are commands: ps, log, files 229; 'kstub help' lists them.\n\n\
                      Examples:\n  kstub gdb vmcore\n  kstub gdb vmcore -- -batch -ex 'thread apply all bt'\n  \
                      kstub gdb vmcore -- -batch -ex ps -ex 'p $task(1)->mm'\n  \
                      kstub gdb vmcore --threads all -- -batch -ex 'thread apply all bt'\n  \
                      kstub gdb --qemu unix:/run/vm/qmp.sock -- -ex 'hbreak do_sys_openat2' -ex c"
    )]
    Gdb {
        #[command(flatten)]
        target: Target,
        /// The gdb to start
        #[arg(long, value_name = "PROGRAM", default_value = "gdb", env = "KSTUB_GDB", value_hint = ValueHint::CommandName)]
        gdb: PathBuf,
        /// What gdb is shown as threads
        #[arg(long, value_name = "WHAT", value_enum, default_value_t = Threads::Cpus)]
        threads: Threads,
        #[command(flatten)]
        control: Control,
        /// Arguments for gdb, after '--'
        #[arg(last = true, value_name = "GDB ARGS")]
        args: Vec<OsString>,
    },
    /// Serve a dump or a guest to gdb clients, any number at once
    #[command(
        after_help = "Examples:\n  kstub serve vmcore\n  kstub serve vmcore --listen unix:/tmp/kstub.sock\n  \
                            kstub serve vmcore --listen 0.0.0.0:1234 --allow-remote --files serve\n  \
                            kstub serve vmcore --threads tasks\n  \
                            kstub serve --qemu unix:/run/vm/qmp.sock\n  \
                            gdb -ex 'target remote | kstub serve vmcore --listen -'"
    )]
    Serve {
        #[command(flatten)]
        target: Target,
        /// HOST:PORT, unix:PATH, or - for standard input and output
        #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:1234")]
        listen: String,
        /// Allow an address that other machines can reach (there is no authentication)
        #[arg(long)]
        allow_remote: bool,
        /// How gdb gets at the vmlinux without being given one
        #[arg(long, value_name = "HOW", value_enum, default_value_t = ServeFiles::Local)]
        files: ServeFiles,
        /// What clients are shown as threads
        #[arg(long, value_name = "WHAT", value_enum, default_value_t = Threads::Cpus)]
        threads: Threads,
        #[command(flatten)]
        control: Control,
    },
    /// Run commands on a dump or a guest and print what they answer
    #[command(after_help = RUN_HELP)]
    Run {
        #[command(flatten)]
        target: Target,
        /// Print one line of JSON for each command
        #[arg(long)]
        json: bool,
        /// Run the commands for this CPU instead of the one that panicked
        #[arg(short, long, value_name = "CPU")]
        cpu: Option<u32>,
        /// Stop the guest for the moment in which each command's registers and stacks are read
        #[arg(long, requires = "qemu")]
        pause: bool,
    },
    /// Print what a dump or guest is, which kernel is in it, and what is missing
    #[command(
        after_help = "Examples:\n  kstub info vmcore\n  kstub info vmcore --json | jq .kernel.release\n  \
                            kstub info part1 part2 part3\n  kstub info low.bin@0 high.bin@0x100000000"
    )]
    Info {
        #[command(flatten)]
        target: Target,
        /// Print one JSON object instead of text
        #[arg(long)]
        json: bool,
    },
    /// Print the script that completes commands and options in a shell
    #[command(
        after_help = "Examples:\n  kstub completions bash > ~/.local/share/bash-completion/completions/kstub\n  \
                            kstub completions zsh > /usr/local/share/zsh/site-functions/_kstub\n  \
                            kstub completions fish > ~/.config/fish/completions/kstub.fish"
    )]
    Completions {
        /// The shell to complete in
        #[arg(value_enum)]
        shell: Shell,
    },
    /// Give a guest back whose kstub was killed
    #[command(hide = true, name = "__guard")]
    Guard,
    /// Print the manual page
    #[command(
        after_help = "Examples:\n  kstub man | man -l -\n  kstub man > /usr/local/share/man/man1/kstub.1"
    )]
    Man,
}

/// A shell that can be taught to complete.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
#[allow(missing_docs)] // The names are the programs' own.
pub enum Shell {
    Bash,
    Zsh,
    Fish,
}

/// What is a thread to gdb.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum Threads {
    /// The CPUs
    Cpus,
    /// Every task, those that run with their CPU's registers; idle CPUs stay CPUs
    Tasks,
    /// The CPUs, and behind them every task that does not run, with the registers it goes on with
    All,
}

/// How a gdb that was given no file gets at the vmlinux.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum ServeFiles {
    /// By its path, for a gdb on this machine
    Local,
    /// Through the connection, for a gdb on another machine: symbols at once, debug info if gdb has none by build-id
    Serve,
    /// Not at all
    None,
}

/// The dump or guest and what belongs to it.
#[derive(Args, Debug)]
pub struct Target {
    /// The dump: ELF vmcore or kdump-compressed, flattened or not; all parts of a split one, in any order; LiME; or
    /// raw RAM images, each as FILE@PHYSADDR
    #[arg(required_unless_present = "qemu", value_name = "DUMP", value_hint = ValueHint::FilePath)]
    pub dump: Vec<OsString>,
    /// A running QEMU guest in place of a dump, by its QMP socket: unix:PATH, a path, or HOST:PORT
    #[arg(long, value_name = "QMP")]
    pub qemu: Option<String>,
    /// Let the guest's memory and registers be written, and QEMU be told anything
    #[arg(long, requires = "qemu")]
    pub allow_write: bool,
    /// The kernel's vmlinux with debug info [default: found by build-id or release under /usr/lib/debug, beside
    /// the dump, or from the servers in DEBUGINFOD_URLS]
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub vmlinux: Option<PathBuf>,
    /// A directory to search for the vmlinux, by build-id; may be repeated, or be several with ':' between them
    #[arg(long, value_name = "DIR", env = "KSTUB_DEBUG_DIR", value_delimiter = ':', value_hint = ValueHint::DirPath)]
    pub debug_dir: Vec<PathBuf>,
    /// Do not ask the servers in DEBUGINFOD_URLS for a vmlinux
    #[arg(long)]
    pub no_debuginfod: bool,
    /// What tells kstub the kernel's types
    #[arg(long, value_name = "FORMAT", value_enum, default_value_t = Types::Auto)]
    pub types: Types,
}

/// How a guest is controlled.
#[derive(Args, Clone, Copy, Debug)]
pub struct Control {
    /// Never stop the guest: clients see it as it runs, and 'continue' only waits
    #[arg(long, requires = "qemu")]
    pub no_stop: bool,
    /// Let a guest that has not booted (qemu -S) run up to start_kernel(); needs --vmlinux
    #[arg(long, requires_all = ["qemu", "vmlinux"], conflicts_with = "no_stop")]
    pub wait_kernel: bool,
    /// What becomes of the guest when the client that controls it leaves, or dies
    #[arg(long, value_name = "HOW", value_enum, default_value_t = OnDisconnect::Restore, requires = "qemu", conflicts_with = "no_stop")]
    pub on_disconnect: OnDisconnect,
}

/// What becomes of a guest in the end.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum OnDisconnect {
    /// It runs if it ran before the client came
    Restore,
    /// It runs
    Resume,
    /// It stays as it is
    Leave,
}

/// The debug info that tells types.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum Types {
    /// BTF; where there is none, DWARF
    Auto,
    /// BTF, in the dump or in the vmlinux
    Btf,
    /// The vmlinux's DWARF, whatever the kernel's BTF says
    Dwarf,
}
