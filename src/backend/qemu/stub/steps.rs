//! Steps: that each is one, and that none is left in QEMU.
//!
//! QEMU marks a vCPU that is to step, and takes the mark away only from the one that stops the guest
//! (`gdb_vm_state_change()`): that of another, or of one that is halted, would stop the guest some time later.
//! Source: QEMU `gdbstub/system.c` (`gdb_continue_partial`, `gdb_vm_state_change`).

use super::*;

impl Stub {
    /// Takes every vCPU for one that was to take a step: an earlier client may have left some.
    pub(in crate::backend::qemu) fn suspect_steps(&mut self) {
        self.steps = self.threads.iter().filter_map(|thread| thread.cpu()).collect();
    }

    /// Ends the steps that vCPUs were to take and have not.
    pub(in crate::backend::qemu) fn end_steps(&mut self) -> Result<(), LiveError> {
        let all = self.steps.clone();
        // A stop of that moment does not matter to who gives the guest up.
        self.end_steps_of(&all).map(drop)
    }

    /// The same of some vCPUs, which run for a moment for that; returns what stopped the guest, if that was not we.
    pub(super) fn end_steps_of(&mut self, cpus: &BTreeSet<u32>) -> Result<Option<StopReply>, LiveError> {
        self.steps.retain(|cpu| !cpus.contains(cpu));
        let of_cpus = |thread: &&ThreadId| thread.cpu().is_some_and(|cpu| cpus.contains(&cpu));
        let go = self.threads.iter().filter(of_cpus).map(|thread| format!(";s:{thread}")).collect::<String>();
        if go.is_empty() {
            return Ok(None);
        }
        let flags = self.ask("qqemu.sstep")?;
        if !flags.starts_with(b"0x") {
            return Err(garbled("qqemu.sstep", &flags));
        }
        // A step that is none: with these flags QEMU takes the mark from whom it steps.
        self.expect_ok(&[b"Qqemu.sstep=", NO_STEPS].concat(), "ending steps")?;
        let stop = self.run_for_a_moment(format!("vCont{go}").as_bytes());
        // Also after a failure: the flags are QEMU's and outlive this connection.
        let restored = self.expect_ok(&[b"Qqemu.sstep=", flags.as_slice()].concat(), "ending steps");
        stop.and_then(|stop| restored.map(|()| stop))
    }

    fn run_for_a_moment(&mut self, packet: &[u8]) -> Result<Option<StopReply>, LiveError> {
        self.step = None;
        self.go(packet)?;
        self.interrupter()?.interrupt()?;
        match self.wait(SOON)? {
            Some(stop) => Ok(Some(stop).filter(|stop| stop.reason != StopReason::Signal(SIGINT))),
            None => {
                let what = "a stop after ending steps".to_owned();
                Err(LiveError::Timeout { what, seconds: SOON.as_secs() })
            }
        }
    }

    /// Whether a vCPU that says that it took a step has taken none: QEMU 7.2's sometimes stops before the instruction,
    /// and gdb would take that for another hit of the breakpoint there. It steps again, then. An instruction that jumps
    /// to itself is taken for none, too, which does no harm.
    pub(super) fn took_no_step(&mut self, stop: StopReply) -> Result<bool, LiveError> {
        let stepped = |thread: &ThreadId| thread.cpu().is_some_and(|cpu| self.steps.contains(&cpu));
        let (Some(thread), StopReason::Signal(SIGTRAP)) = (stop.thread.filter(stepped), stop.reason) else {
            return Ok(false);
        };
        let before = thread.cpu().and_then(|cpu| self.seen.get(&cpu).cloned());
        let Some((packet, tries)) = self.step.take() else { return Ok(false) };
        if tries == 0 || before.is_none() || before != Some(self.register_digits(thread)?) {
            return Ok(false);
        }
        tracing::debug!("QEMU's vCPU {thread} took no step; it is to take it again");
        self.go(&packet)?;
        self.step = Some((packet, tries - 1));
        Ok(true)
    }
}
