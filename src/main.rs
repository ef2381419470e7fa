//! Parse, run, print the error chain, exit code.

mod moments;
mod open;

use anyhow::Context;
use clap::Parser;
use kstub::backend::live::LiveError;
use kstub::backend::qemu;
use kstub::cli::{Cli, Command, ServeFiles, Target, exit};
use kstub::command::{Focus, Form};
use kstub::debuginfo::DebugInfo;
use kstub::gdb::{Files, Libraries, Settings, Show, Tell, index};
use kstub::kernel::{CpuId, Machine, OpenError};
use kstub::server::Source;
use kstub::{cli, command, debuginfo, server, vmcore};
use moments::How;
use std::ffi::OsStr;
use std::io::{IsTerminal, Write};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Arguments that clap cannot know to be wrong.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Usage(&'static str);

fn main() -> ExitCode {
    let cli = Cli::parse();
    start_log(cli.verbose);
    match run(cli) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("kstub: {}", command::printable(&format!("{error:#}")));
            ExitCode::from(exit_code(&error))
        }
    }
}

/// Events go to standard error, in colour only where someone sees it and wants it (<https://no-color.org>).
fn start_log(verbose: u8) {
    let default = ["warn", "warn,kstub=info", "warn,kstub=trace"][usize::from(verbose.min(2))];
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(default));
    let unwanted = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(!unwanted && std::io::stderr().is_terminal())
        .without_time()
        .init();
}

/// Runs the command and returns the exit code.
fn run(cli: Cli) -> anyhow::Result<u8> {
    match cli.command {
        Command::Gdb { target, gdb, threads, control, args } => {
            only_dump_or_guest(&target)?;
            let (source, libraries) = open::source(&target, control, Some(&gdb), None)?;
            let machine = source.machine();
            // A guest that has not booted has none: symbols would lie where firmware is. kstub.py loads them later.
            let info = machine.kernel().and_then(|kernel| kernel.debug_info());
            let vmlinux = info.map(|info| info.path().to_owned()).or_else(|| libraries.image());
            if let Source::Guest(live) = &source {
                // Without one gdb asks for it.
                let tell = if vmlinux.is_some() { Tell::WhenAsked } else { Tell::Path };
                live.offer(Files::of(&machine, libraries.clone(), tell)?);
            }
            report_problems(&machine);
            fill_gdb_index(info, &gdb, &libraries);
            server::gdb(
                source,
                &server::Debugger {
                    program: gdb,
                    libraries: Some(libraries),
                    vmlinux,
                    show: show(threads),
                    args,
                },
            )
        }
        Command::Serve { target, listen, allow_remote, files, threads, control } => {
            only_dump_or_guest(&target)?;
            let listen = server::Listen::parse(&listen, allow_remote).context(server::CannotListen)?;
            // Whoever reaches a TCP port could have files written as us.
            let anybody = matches!(listen, server::Listen::Tcp(_));
            let no_dumps = anybody.then_some(
                "clients of a TCP port may be anybody, and it writes files; serve on unix:PATH, or use kstub gdb or run",
            );
            let (source, libraries) = open::source(&target, control, None, no_dumps)?;
            let machine = source.machine();
            report_problems(&machine);
            let tell = match files {
                ServeFiles::None => Tell::Nothing,
                ServeFiles::Local => Tell::Path,
                ServeFiles::Serve => Tell::Contents,
            };
            let offered = Files::of(&machine, libraries, tell)?;
            let files = match &source {
                Source::Dump(_) if tell == Tell::Nothing => Files::none(),
                Source::Dump(_) => offered,
                Source::Guest(live) => {
                    live.offer(offered.clone());
                    offered
                }
            };
            server::serve(source, Settings { files, show: show(threads) }, listen, |address| {
                eprintln!("kstub: in gdb: target remote {address}")
            })?;
            Ok(0)
        }
        Command::Run { target, json, cpu, pause } => run_commands(target, json, cpu, pause),
        Command::Info { target, json } => {
            only_dump_or_guest(&target)?;
            let output = command::render_info(&open::machine(&target)?);
            let text = if json { format!("{:#}\n", output.json) } else { output.text };
            print(text.as_bytes())?;
            Ok(0)
        }
        Command::Completions { shell } => {
            print(&cli::completions(shell))?;
            Ok(0)
        }
        Command::Guard => {
            // So that `killall kstub` and `pkill kstub` spare it: it is there for that.
            if let Err(error) = std::fs::write("/proc/self/comm", "guest-guardian") {
                tracing::warn!("this process keeps its name: {error}");
            }
            qemu::guard::run()?;
            Ok(0)
        }
        Command::Man => {
            print(&cli::man().context("cannot write the manual page")?)?;
            Ok(0)
        }
    }
}

/// A dump beside a guest would be one too many.
fn only_dump_or_guest(target: &Target) -> anyhow::Result<()> {
    if target.qemu.is_some() && !target.dump.is_empty() {
        anyhow::bail!(Usage("--qemu names a guest: leave the dump out"));
    }
    Ok(())
}

/// `kstub run`: prints what each command answers; a command that fails does not keep the others from running.
fn run_commands(mut target: Target, json: bool, cpu: Option<u32>, pause: bool) -> anyhow::Result<u8> {
    let first = match target.qemu {
        Some(_) => (!target.dump.is_empty()).then_some(0),
        None => target.dump.iter().skip(1).position(|argument| is_command(argument)).map(|first| first + 1),
    };
    let lines = match first {
        Some(first) => target.dump.split_off(first),
        None if target.qemu.is_some() => anyhow::bail!(Usage("no command; try: kstub run --qemu QMP help")),
        None => anyhow::bail!(Usage("no command behind the dump; try: kstub run DUMP help")),
    };
    let machine = open::machine(&target)?;
    // Commands that miss source lines say so; types are in the kernel's own memory.
    let has_types = machine.kernel().is_some_and(|kernel| kernel.types().is_some());
    let about_gdb = machine.no_vmlinux().filter(|_| has_types);
    for problem in machine.problems() {
        match about_gdb == Some(&problem) {
            true => tracing::info!("{problem}"),
            false => eprintln!("kstub: {}", command::printable(&problem)),
        }
    }
    let cpu = cpu.map_or(machine.first_cpu(), CpuId);
    if machine.cpu(cpu).is_none() {
        anyhow::bail!("there is no CPU {cpu}; 'kstub info' lists them");
    }
    let bar = open::dump_bar();
    let shown = bar.clone();
    let progress = move |done, of| {
        if shown.is_finished() {
            shown.reset();
        }
        shown.set_length(of);
        shown.set_position(done);
    };
    let focus = Focus { progress: Some(Box::new(progress)), ..Focus::default() };
    let form = if json { Form::Json } else { Form::Text };
    let mut failed = false;
    let mut one = |line: &str| -> anyhow::Result<()> {
        // What 'set' has chosen counts from the next command on.
        let cpu = focus.cpu.get().unwrap_or(cpu);
        if pause && !command::only_looks(line) {
            eprintln!(
                "kstub: --pause is for commands that look: '{}' is run as it is",
                command::printable(line)
            );
        }
        let how = match pause {
            _ if !command::only_looks(line) => How::Once,
            true => How::Pausing,
            false => How::Looking,
        };
        let result = moments::run(&machine, how, |machine| {
            // Whether a guest's answer holds together stands in the JSON.
            let form = if machine.backend().live().is_some() { Form::Both } else { form };
            command::run(&command::Context { machine, cpu, task: None, focus: &focus, form }, line)
        })?;
        bar.finish_and_clear();
        failed |= result.is_err();
        if json {
            return print(format!("{}\n", command::envelope(line, result)).as_bytes());
        }
        match result {
            Ok(output) => print(output.text.as_bytes()),
            Err(error) => {
                eprintln!("kstub: {}", command::printable(&error.to_string()));
                Ok(())
            }
        }
    };
    for argument in lines {
        let line = argument.to_string_lossy();
        if line != "-" {
            one(&line)?;
            continue;
        }
        for line in std::io::stdin().lines() {
            let line = line.context("cannot read commands from standard input")?;
            if !line.trim().is_empty() && !line.trim_start().starts_with('#') {
                one(line.trim())?;
            }
        }
    }
    Ok(if failed { exit::FAILURE } else { 0 })
}

/// Whether an argument behind the dump is a command and not another part of the dump.
fn is_command(argument: &OsStr) -> bool {
    let Some(text) = argument.to_str() else { return false };
    let name = text.split_whitespace().next();
    text == "-" || name.is_some_and(command::exists) || !Path::new(text).exists() && !text.contains('@')
}

fn show(threads: cli::Threads) -> Show {
    match threads {
        cli::Threads::Cpus => Show::Cpus,
        cli::Threads::Tasks => Show::Tasks,
        cli::Threads::All => Show::All,
    }
}

/// The exit code for an error: the first cause that has one decides.
fn exit_code(error: &anyhow::Error) -> u8 {
    if error.is::<server::CannotListen>() {
        return exit::LISTEN;
    }
    if error.is::<Usage>() {
        return exit::USAGE;
    }
    let code = error.chain().find_map(|cause| {
        if cause.is::<LiveError>() {
            return Some(exit::GUEST);
        }
        if let Some(error) = cause.downcast_ref::<vmcore::Error>() {
            use vmcore::Error::{Denied, Io, Open};
            let unreadable = matches!(error, Open { .. } | Denied { .. } | Io { .. });
            return Some(if unreadable { exit::UNREADABLE } else { exit::NOT_A_DUMP });
        }
        let vmlinux = match cause.downcast_ref::<OpenError>() {
            Some(OpenError::DebugInfo(error)) => Some(error),
            Some(OpenError::Mismatch { .. }) => return Some(exit::VMLINUX),
            // Found unusable only when it was to be served.
            None => cause.downcast_ref::<debuginfo::Error>(),
        };
        let io = matches!(vmlinux?, debuginfo::Error::Io { .. });
        Some(if io { exit::UNREADABLE } else { exit::VMLINUX })
    });
    code.unwrap_or(exit::FAILURE)
}

/// Makes the indexes that let gdb start fast, with something to show meanwhile. Without them only speed is lost.
fn fill_gdb_index(info: Option<&DebugInfo>, gdb: &Path, libraries: &Libraries) {
    let info = info.filter(|info| info.has_dwarf());
    if let Some((info, build_id)) = info.and_then(|info| Some((info, info.build_id()?))) {
        let what = info.path().display().to_string();
        match while_indexing(&what, |progress| index::prepare(gdb, info.path(), build_id, progress)) {
            Ok(made) => tracing::info!("gdb's index of the vmlinux: {made}"),
            Err(error) => eprintln!("kstub: no index, so gdb starts slowly: {error}"),
        }
    }
    match libraries.unindexed() {
        0 => {}
        count => while_indexing(&format!("{count} modules"), |progress| libraries.prepare(progress)),
    }
}

/// Shows what gdb indexes while it does.
fn while_indexing<T>(what: &str, work: impl FnOnce(&mut dyn FnMut(Duration)) -> T) -> T {
    let spinner = open::terminal(indicatif::ProgressBar::new_spinner());
    let done = work(&mut |_| {
        spinner.set_message(format!("gdb indexes {what} (once)"));
        spinner.tick();
    });
    spinner.finish_and_clear();
    done
}

fn report_problems(machine: &Machine) {
    for problem in machine.problems() {
        eprintln!("kstub: {}", command::printable(&problem));
    }
}

/// Writes to standard output; a reader that has gone away (`| head`) is no error.
fn print(text: &[u8]) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text).and_then(|()| out.flush()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        result => result.context("writing to standard output failed"),
    }
}
