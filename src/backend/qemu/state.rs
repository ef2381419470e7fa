//! What the guest does, in QEMU's words, and letting it run.
//!
//! A suspended guest (ACPI S3) counts with those that run: let go, it sleeps on and can be woken.
//! Source: QEMU `qapi/run-state.json`, `system/cpus.c` (`do_vm_stop`, `vm_prepare_start`), `system/runstate.c`.

use super::qmp::{Qmp, nonsense};
use crate::backend::live::{LiveError, RunState};
use qapi::qmp::{cont, query_status};
use serde_json::Value;
use std::time::Duration;

/// How long it may take to stop the guest: QEMU then waits until its disks have what was written.
pub(super) const FLUSHED: Duration = Duration::from_secs(120);

pub(super) const SUSPENDED: RunState = RunState::Stopped("suspended");

/// The names that QEMU has for states in which no vCPU runs.
const STATES: &[&str] = &[
    "debug",
    "inmigrate",
    "internal-error",
    "io-error",
    "paused",
    "postmigrate",
    "prelaunch",
    "finish-migrate",
    "restore-vm",
    "save-vm",
    "shutdown",
    "suspended",
    "watchdog",
    "guest-panicked",
    "colo",
];

pub(super) fn run_state(qmp: &Qmp) -> Result<RunState, LiveError> {
    let answer = qmp.execute(query_status {})?;
    match answer.get("running").and_then(Value::as_bool) {
        Some(true) => Ok(RunState::Running),
        Some(false) => {
            let status = answer.get("status").and_then(Value::as_str);
            let known = STATES.iter().copied().find(|&state| Some(state) == status);
            Ok(RunState::Stopped(known.unwrap_or("stopped")))
        }
        None => Err(nonsense("query-status", &answer.to_string())),
    }
}

/// Whether the guest goes its own way: nobody has stopped it.
pub(super) fn is_live(state: RunState) -> bool {
    state == RunState::Running || state == SUSPENDED
}

/// Whether it stands only for as long as QEMU copies its memory, or until that has come.
pub(super) fn is_passing(state: RunState) -> bool {
    matches!(state, RunState::Stopped("save-vm" | "restore-vm" | "finish-migrate" | "inmigrate"))
}

/// Lets the guest run, unless it does.
pub(super) fn let_run(qmp: &Qmp) -> Result<(), LiveError> {
    match run_state(qmp) {
        Ok(state) if is_live(state) => Ok(()),
        // A QEMU that is busy does in the end, and in its order, what it was told.
        Ok(_) | Err(LiveError::Timeout { .. }) => qmp.execute_within(cont {}, FLUSHED).map(drop),
        Err(error) => Err(error),
    }
}
