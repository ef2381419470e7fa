//! Listeners, sessions and shutdown: how clients reach a machine.
//!
//! Knows sockets and processes, not what a packet means. tokio waits for clients, signals and children; each
//! client then has a thread of its own, so one that stalls, floods or vanishes holds up nobody but itself.
//! Only this module names tokio.

mod debugger;
mod listen;
mod session;

pub use debugger::{Debugger, gdb};
pub use listen::Listen;

use crate::gdb::{Front, Live, Settings};
use crate::kernel::Machine;
use anyhow::Context;
use listen::Listener;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::Runtime;
use tokio::signal::unix::{SignalKind, signal};

/// The context of every error about the address to listen on.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("cannot listen")]
pub struct CannotListen;

/// What is served.
#[derive(Clone)]
pub enum Source {
    /// A dump.
    Dump(Arc<Machine>),
    /// A guest that lives.
    Guest(Arc<Live>),
}

impl From<Arc<Machine>> for Source {
    fn from(machine: Arc<Machine>) -> Self {
        Self::Dump(machine)
    }
}

impl Source {
    /// A client's session with it.
    fn front(&self, settings: Settings) -> std::io::Result<Front> {
        match self {
            Self::Dump(machine) => Ok(Front::with(Arc::clone(machine), settings)),
            Self::Guest(live) => Front::on_guest(live, settings),
        }
    }

    /// The machine as it was last seen.
    pub fn machine(&self) -> Arc<Machine> {
        match self {
            Self::Dump(machine) => Arc::clone(machine),
            Self::Guest(live) => live.machine(),
        }
    }

    /// Leaves a guest as it is to be left; sessions may still be at work.
    fn leave(&self) {
        if let Self::Guest(live) = self {
            live.release();
        }
    }
}

/// Serves `source` until SIGINT or SIGTERM, or for `-` until the one client leaves.
///
/// Once clients can connect, `on_ready` gets what gdb's `target remote` wants to hear; it is not called for
/// `-`, where nobody connects.
pub fn serve(
    source: impl Into<Source>,
    settings: impl Into<Settings>,
    listen: Listen,
    on_ready: impl FnOnce(&str),
) -> anyhow::Result<()> {
    let (source, settings) = (&source.into(), settings.into());
    if listen == Listen::Stdio {
        return session::over_stdio(source, settings);
    }
    // A list of ten thousand tasks is read before anyone waits for it: gdb gives up after 2 s.
    drop(source.front(settings.clone()).context("no session")?);
    let runtime = runtime()?;
    // Sessions that are still at work when this returns end with the process.
    let served = runtime.block_on(async {
        // Before anyone is told that we are ready, so that a signal from then on ends us cleanly.
        let mut interrupt = signal(SignalKind::interrupt()).context("cannot handle SIGINT")?;
        let mut terminate = signal(SignalKind::terminate()).context("cannot handle SIGTERM")?;
        let listener = Listener::bind(&listen).await.context(CannotListen)?;
        on_ready(&listener.address());
        tokio::select! {
            never = accept(&listener, source, &settings) => match never {},
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
        Ok(())
    });
    source.leave();
    served
}

fn runtime() -> anyhow::Result<Runtime> {
    // It only waits; the work is done on the sessions' threads.
    tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start the event loop")
}

/// Gives every client a session, for ever.
async fn accept(listener: &Listener, source: &Source, settings: &Settings) -> Infallible {
    loop {
        match listener.accept().await {
            Ok(client) => session::start(source.clone(), settings.clone(), client),
            Err(error) => {
                // Such as too many open files: passes when a client leaves.
                tracing::warn!("cannot accept a client: {error}");
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        }
    }
}
