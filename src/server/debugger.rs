//! `kstub gdb`: a server for one gdb, which gets the terminal.
//!
//! Source: GDB manual, "Choosing Files" (`-iex`), "Types of Remote Connections".

use super::Source;
use super::listen::{Listen, Listener};
use crate::gdb::index::set_cache;
use crate::gdb::{Files, Libraries, PrivateDirectory, Settings, Show};
use anyhow::Context;
use std::ffi::OsString;
use std::io::ErrorKind;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use tokio::process::Command;
use tokio::signal::unix::{SignalKind, signal};

/// The kernel's commands for gdb. It stands in the binary, so that a copied kstub has it too.
const SCRIPT: &str = include_str!("../../scripts/kstub.py");

/// A gdb to be started.
#[derive(Clone)]
pub struct Debugger {
    /// `gdb`, or the path of one.
    pub program: PathBuf,
    /// The kernel's modules as files, if gdb is to have them.
    pub libraries: Option<Libraries>,
    /// What gdb loads symbols from, if there is anything.
    pub vmlinux: Option<PathBuf>,
    /// What are threads.
    pub show: Show,
    /// What the user adds to gdb's command line: `-batch`, `-ex bt`, …
    pub args: Vec<OsString>,
}

/// Runs `debugger` on `source` and returns its exit code once it has ended (128 + the signal, if killed).
pub fn gdb(source: impl Into<Source>, debugger: &Debugger) -> anyhow::Result<u8> {
    let source = &source.into();
    let ended = super::runtime()?.block_on(run(source, debugger));
    source.leave();
    ended.map(exit_code)
}

async fn run(source: &Source, debugger: &Debugger) -> anyhow::Result<ExitStatus> {
    // Ctrl-C and Ctrl-\ go from the terminal to gdb and to us; they are meant for gdb. Handled rather than
    // ignored, because an ignored signal would stay ignored in gdb.
    let _interrupt = signal(SignalKind::interrupt()).context("cannot handle SIGINT")?;
    let _quit = signal(SignalKind::quit()).context("cannot handle SIGQUIT")?;
    let mut terminate = signal(SignalKind::terminate()).context("cannot handle SIGTERM")?;
    let mut hangup = signal(SignalKind::hangup()).context("cannot handle SIGHUP")?;
    // Only we and our child can reach a socket in a directory of mode 0700.
    let private = PrivateDirectory::new().context("cannot make a private directory")?;
    let socket = private.path().join("gdb");
    let script = private.path().join("kstub.py");
    std::fs::write(&script, SCRIPT).context("cannot write the script for gdb")?;
    let listener = Listener::bind(&Listen::Unix(socket.clone())).await?;
    // gdb has the vmlinux on its command line; without one it would ask for it.
    let files = if debugger.vmlinux.is_some() { Files::none() } else { Files::local(None) };
    let files = match &debugger.libraries {
        Some(libraries) => files.with_libraries(libraries.clone()),
        None => files,
    };
    let settings = Settings { files, show: debugger.show };
    // Ready by the time that gdb asks for them; the runtime waits for it in the end.
    if let Some(libraries) = debugger.libraries.clone() {
        tokio::task::spawn_blocking(move || libraries.prepare(&mut |_| {}));
    }
    let mut child =
        command(debugger, &socket, &script).spawn().map_err(|error| cannot_start(debugger, error))?;
    tracing::info!("{} was started", debugger.program.display());
    tokio::select! {
        status = child.wait() => {
            let status = status.context("cannot wait for gdb")?;
            tracing::info!("{} ended: {status}", debugger.program.display());
            Ok(status)
        }
        // gdb then finds the connection closed; the directory is removed.
        _ = terminate.recv() => Ok(ExitStatus::from_raw(SignalKind::terminate().as_raw_value())),
        _ = hangup.recv() => Ok(ExitStatus::from_raw(SignalKind::hangup().as_raw_value())),
        never = super::accept(&listener, source, &settings) => match never {},
    }
}

fn command(debugger: &Debugger, socket: &Path, script: &Path) -> Command {
    let mut command = Command::new(&debugger.program);
    // Files are here: gdb would ask us first.
    command.args(["-q", "-iex", "set sysroot /"]);
    // From a cold disk ten thousand tasks take longer than the 2 s after which gdb gives up. We cannot hang unnoticed:
    // gdb sees the socket close when we die.
    command.args(["-iex", "set remotetimeout 120"]);
    command.args(["-iex", &set_cache("on")]);
    command.args(&debugger.vmlinux);
    // Only the vmlinux's index may come from gdb's own cache: it keeps a module's by build-id too, but with the addresses
    // it was loaded at, which are others in the next dump.
    match debugger.libraries.as_ref().and_then(Libraries::index_cache) {
        Some(indexes) => {
            let mut directory = OsString::from("set index-cache directory ");
            directory.push(indexes);
            command.arg("-ex").arg(directory);
        }
        None => {
            command.args(["-ex", &set_cache("off")]);
        }
    }
    let mut connect = OsString::from("target remote ");
    connect.push(socket);
    let mut source = OsString::from("source ");
    source.push(script);
    command
        .arg("-ex")
        .arg(connect)
        .args(["-ex", &set_cache("off")])
        .arg("-ex")
        .arg(source)
        .args(&debugger.args);
    command
}

fn cannot_start(debugger: &Debugger, error: std::io::Error) -> anyhow::Error {
    let program = debugger.program.display();
    match error.kind() {
        ErrorKind::NotFound => anyhow::anyhow!(
            "there is no '{program}'; install gdb (apt install gdb, dnf install gdb) or name one with --gdb PATH"
        ),
        _ => anyhow::Error::new(error).context(format!("cannot start '{program}'")),
    }
}

fn exit_code(status: ExitStatus) -> u8 {
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or_default());
    u8::try_from(code).unwrap_or(u8::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_as_a_shell_has_them() {
        assert_eq!(exit_code(ExitStatus::from_raw(3 << 8)), 3);
        assert_eq!(exit_code(ExitStatus::from_raw(9)), 137);
    }
}
