//! Opens what the command line names: a dump or a guest, with the places where its files may be.

use anyhow::Context;
use kstub::backend::live::{LiveControl, LiveError, RunState};
use kstub::backend::qemu::{Guest, QmpAddress, guard};
use kstub::backend::{Backend, Dump};
use kstub::cli::{self, Control, Target};
use kstub::debuginfo::DebugInfo;
use kstub::debuginfo::debuginfod::Debuginfod;
use kstub::debuginfo::find::{self, Places};
use kstub::gdb::boot::{self, BootError, Came};
use kstub::gdb::{Libraries, Live, OnDisconnect, OpenLive, Policy};
use kstub::kernel::{Machine, OpenError, Options, TypesFrom};
use kstub::server::Source;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The machine that `target` names: a dump, or a guest at this moment.
pub fn machine(target: &Target) -> anyhow::Result<Machine> {
    let backend: Arc<dyn Backend> = match &target.qemu {
        Some(address) => guest(address, target.allow_write)?.snapshot()?,
        None => Arc::new(Dump::open_arguments(&target.dump)?),
    };
    Ok(Opener::of(target).open(backend)?)
}

/// What `target` names, for clients, and the files of its modules, with indexes if it is for one `gdb`. `no_dumps` says why
/// clients may not have a guest dumped.
pub fn source(
    target: &Target,
    control: Control,
    gdb: Option<&Path>,
    no_dumps: Option<&'static str>,
) -> anyhow::Result<(Source, Libraries)> {
    let Some(address) = &target.qemu else {
        let machine = Arc::new(machine(target)?);
        let libraries = Libraries::new(machine.clone(), places(target), gdb);
        return Ok((Source::Dump(machine), libraries));
    };
    let on_disconnect = match control.on_disconnect {
        cli::OnDisconnect::Restore => OnDisconnect::Restore,
        cli::OnDisconnect::Resume => OnDisconnect::Resume,
        cli::OnDisconnect::Leave => OnDisconnect::Leave,
    };
    let policy = Policy { allow_write: target.allow_write, control: !control.no_stop, on_disconnect };
    let opener = Opener::of(target);
    let guest = guest(address, target.allow_write)?;
    if control.no_stop {
        if target.allow_write {
            eprintln!(
                "kstub: with --no-stop, --allow-write allows 'monitor qemu' only: memory and registers are written \
                 while the guest stands"
            );
        }
        guest.refuse_dumps(
            "QEMU stops the guest while it writes a dump, and kstub was started with --no-stop",
        );
    }
    no_dumps.into_iter().for_each(|why| guest.refuse_dumps(why));
    if let Some(vmlinux) = target.vmlinux.as_deref().filter(|_| control.wait_kernel) {
        wait_kernel(&guest, vmlinux, on_disconnect)?;
    }
    let live = Live::new(guest, policy, Box::new(move |backend| opener.open(backend)));
    let live = live.map_err(|error| match error {
        OpenLive::Guest(error) => anyhow::Error::new(error),
        OpenLive::Kernel(error) => error.into(),
        OpenLive::Thread(error) => error.into(),
    })?;
    let libraries = Libraries::new(live.machine(), places(target), gdb);
    Ok((Source::Guest(live), libraries))
}

/// Lets a guest that has not booted run up to `start_kernel()` of the kernel that `vmlinux` is of. Run control is taken from
/// then on.
fn wait_kernel(guest: &Guest, vmlinux: &Path, on_disconnect: OnDisconnect) -> anyhow::Result<()> {
    let wanted = boot::Wanted::of(&DebugInfo::open(vmlinux)?);
    let wanted = wanted.with_context(|| format!("'{}' has no symbol start_kernel", vmlinux.display()))?;
    let spinner = terminal(indicatif::ProgressBar::new_spinner());
    spinner.set_message("waiting for the kernel to start");
    guest.attach()?;
    guest.on_death(on_disconnect.on_death(true));
    let came = boot::run(guest, &wanted, &|| {
        spinner.tick();
        true
    });
    spinner.finish_and_clear();
    // The guest's own error decides the exit code.
    let came = came.map_err(|error| match error {
        BootError::Guest(error) => anyhow::Error::new(error),
        error => error.into(),
    })?;
    match came {
        Came::Exactly(_) => {}
        Came::About(_) => {
            eprintln!(
                "kstub: under KVM the kernel is found by looking: it may be past start_kernel() already"
            );
        }
        Came::Interrupted(_) => anyhow::bail!("the guest was stopped before a kernel came to start_kernel()"),
    }
    Ok(())
}

fn guest(address: &str, allow_write: bool) -> Result<Arc<Guest>, LiveError> {
    let guest = Guest::connect(&QmpAddress::parse(address)?)?;
    guest.set_allow_write(allow_write);
    // If we are killed, somebody must give the guest back.
    match std::env::current_exe() {
        Ok(program) => guard::enable(program, vec!["__guard".into()]),
        Err(error) => tracing::warn!("no guardian: {error}"),
    }
    Ok(guest)
}

/// How often the kernel of a guest that runs is looked for.
const TRIES: usize = 3;

/// What is needed to find the kernel in a machine, more than once.
struct Opener {
    vmlinux: Option<PathBuf>,
    beside: Option<PathBuf>,
    debug_dirs: Vec<PathBuf>,
    types: TypesFrom,
    use_debuginfod: bool,
}

impl Opener {
    fn of(target: &Target) -> Self {
        let Places { beside, debug_dirs, .. } = places(target);
        let types = match target.types {
            cli::Types::Auto => TypesFrom::Any,
            cli::Types::Btf => TypesFrom::Btf,
            cli::Types::Dwarf => TypesFrom::Dwarf,
        };
        let vmlinux = target.vmlinux.clone();
        Self { vmlinux, beside, debug_dirs, types, use_debuginfod: !target.no_debuginfod }
    }

    /// Finds the kernel; in a guest that runs, where what is read may be of two moments, it is looked for again.
    fn open(&self, backend: Arc<dyn Backend>) -> Result<Machine, OpenError> {
        let mut opened = self.open_once(Arc::clone(&backend));
        for _ in 1..TRIES {
            let runs =
                |live: &&dyn LiveControl| live.run_state().is_ok_and(|state| state == RunState::Running);
            let Some(live) = backend.live().filter(|live| opened.is_err() && runs(live)) else { break };
            let Ok(snapshot) = live.snapshot() else { break };
            opened = self.open_once(snapshot);
        }
        opened
    }

    fn open_once(&self, backend: Arc<dyn Backend>) -> Result<Machine, OpenError> {
        let caches = find::user_caches();
        let download = download_bar();
        let bar = download.clone();
        let progress = move |got, size: Option<u64>| {
            bar.set_length(size.unwrap_or(got));
            bar.set_position(got);
        };
        let servers = || Debuginfod::from_environment(caches.as_deref(), Box::new(progress));
        let places = Places {
            debuginfod: if self.use_debuginfod { servers() } else { None },
            memory: caches.as_ref().map(|caches| caches.join("kstub/vmlinux")),
            beside: self.beside.clone(),
            debug_dirs: self.debug_dirs.clone(),
        };
        let options = Options { vmlinux: self.vmlinux.clone(), places, types: self.types };
        let bar = scan_bar();
        let machine = Machine::open(backend, &options, &|done, total| {
            bar.set_length(total);
            bar.set_position(done);
        });
        bar.finish_and_clear();
        download.finish_and_clear();
        machine
    }
}

/// Where files of the kernel's may be, as the user told.
pub fn places(target: &Target) -> Places {
    let beside = target.dump.first().and_then(|dump| Path::new(dump).parent());
    let beside = beside.map(|dir| if dir.as_os_str().is_empty() { Path::new(".") } else { dir });
    let beside = beside.map(Path::to_owned);
    Places { beside, debug_dirs: target.debug_dir.clone(), ..Places::default() }
}

/// A bar for the scan of RAM.
fn scan_bar() -> indicatif::ProgressBar {
    let bar = terminal(indicatif::ProgressBar::new(0));
    if let Ok(style) = indicatif::ProgressStyle::with_template(
        "looking for the kernel in RAM {bar:40} {bytes}/{total_bytes}",
    ) {
        bar.set_style(style);
    }
    bar
}

/// A bar for what comes from debuginfod.
fn download_bar() -> indicatif::ProgressBar {
    let bar = terminal(indicatif::ProgressBar::new(0));
    if let Ok(style) = indicatif::ProgressStyle::with_template(
        "fetching the vmlinux {bar:40} {bytes}/{total_bytes} {bytes_per_sec}",
    ) {
        bar.set_style(style);
    }
    bar
}

/// A bar for a dump that QEMU writes.
pub fn dump_bar() -> indicatif::ProgressBar {
    let bar = terminal(indicatif::ProgressBar::new(0));
    if let Ok(style) = indicatif::ProgressStyle::with_template(
        "QEMU dumps the guest, which stands {bar:20} {bytes}/{total_bytes} {eta}",
    ) {
        bar.set_style(style);
    }
    bar
}

/// Hides `bar` where standard error is no terminal.
pub fn terminal(bar: indicatif::ProgressBar) -> indicatif::ProgressBar {
    if !std::io::stderr().is_terminal() {
        bar.set_draw_target(indicatif::ProgressDrawTarget::hidden());
    }
    bar
}
