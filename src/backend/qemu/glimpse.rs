//! A look at a guest that is stopped for it, as shortly as that goes.
//!
//! What changes rarely is known before; QEMU writes the registers down while memory is read, and is told to let the
//! guest go before it has sent them. Source: QEMU `docs/interop/qmp-spec.rst` (commands are executed in their order).

use super::guard::{Errand, Guardian};
use super::guest::{Guest, REGISTERS, saved_cpus};
use super::qmp::lock;
use super::state::FLUSHED;
use crate::backend::Backend;
use crate::backend::live::{Glimpse, LiveError, RunState};
use qapi::qmp::{cont, stop};
use std::sync::Arc;
use std::time::Instant;

impl Guest {
    /// Shows the guest to `look` while it stands; stops it for that if it runs.
    pub(super) fn show_standing(
        &self,
        look: &mut dyn FnMut(&Arc<dyn Backend>),
    ) -> Result<Glimpse, LiveError> {
        let before = self.take_snapshot()?;
        if before.state() != RunState::Running {
            let machine: Arc<dyn Backend> = Arc::new(before);
            look(&machine);
            return Ok(Glimpse { machine, stood: None });
        }
        if self.is_attached() {
            let why = "kstub lets it run under run control: interrupt it instead".to_owned();
            return Err(LiveError::NotNow { what: "stopping the guest for a moment".into(), why });
        }
        let qmp = self.address().clone();
        let errand = Errand { stub: None, qmp, runs: true, stepped: false, started: false, directory: None };
        *lock(&self.guardian) = Guardian::start(&errand);
        let (_ours, start) = (self.events.ours(), Instant::now());
        self.events.changed();
        let stopped = self.qmp.send(stop {})?;
        let registers = self.qmp.send_human(REGISTERS, None);
        let stands = stopped.answer(FLUSHED);
        let standing = before.stopped_at(self.events.generation(), before.saved_cpus().to_vec());
        let standing = Arc::new(standing);
        if stands.is_ok() {
            look(&(Arc::clone(&standing) as _));
        }
        // Whatever went wrong meanwhile, it goes on: a QEMU that is late stops it all the same, and then hears this.
        // Without an answer to that the guardian goes without a farewell.
        let guardian = lock(&self.guardian).take();
        let resumed = self.qmp.send(cont {})?;
        let registers = registers.and_then(|asked| asked.text(FLUSHED));
        resumed.answer(FLUSHED)?;
        let stood = self.events.went_on_after(start).unwrap_or_else(|| start.elapsed());
        guardian.into_iter().for_each(Guardian::farewell);
        stands?;
        let cpus = saved_cpus(registers?)?;
        let machine = Arc::new(standing.stopped_at(standing.generation(), cpus));
        Ok(Glimpse { machine, stood: Some(stood) })
    }
}
