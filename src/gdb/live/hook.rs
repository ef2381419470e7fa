//! kstub's own breakpoint where every module passes before its init, of which clients know nothing.

use super::{Live, SIGTRAP, STANDSTILL, State};
use crate::addr::VirtAddr;
use crate::backend::live::{Go, LiveError, Point, Stop, StopReason};
use std::time::Duration;

/// How long one instruction may take.
const STEP_PATIENCE: Duration = Duration::from_secs(5);

/// How a vCPU fared that was to get over our breakpoint.
pub(super) enum Passed {
    /// It is over it, or was elsewhere.
    Over,
    /// The guest stopped meanwhile for another reason.
    Stopped(Stop),
    /// It does not stop any more.
    Runs,
}

impl Live {
    /// Sees to it that modules stop the guest before their init, where clients are told of modules.
    pub(super) fn hook_modules(&self) {
        let (machine, hook) = {
            let state = self.state();
            if !state.owner.is_some_and(|owner| state.follow_modules.contains(&owner)) {
                return;
            }
            (state.machine.clone(), state.module_hook)
        };
        let wanted = machine.kernel().and_then(|kernel| kernel.symbol("do_init_module"));
        if wanted == hook {
            return;
        }
        if let Some(Err(error)) = hook.map(|old| self.control.remove(Point::Software, old, 1)) {
            tracing::warn!("{error}");
        }
        self.state().module_hook = wanted.filter(|at| self.set_hook(*at));
    }

    fn set_hook(&self, at: VirtAddr) -> bool {
        let set = self.control.insert(Point::Software, at, 1);
        if let Err(error) = &set {
            tracing::warn!("modules do not stop the guest before their init: {error}");
        }
        set.is_ok()
    }

    /// Gets the vCPU that stands at our own breakpoint over it. If all it does is to step there (`steps`), the breakpoint
    /// is away until it has.
    pub(super) fn pass_hook(&self, steps: bool) -> Result<Passed, LiveError> {
        let (hook, stop) = {
            let state = self.state();
            match state.module_hook.filter(|_| state.is_at_hook()) {
                Some(hook) => (hook, state.stop),
                None => return Ok(Passed::Over),
            }
        };
        self.control.remove(Point::Software, hook, 1)?;
        // It is put back at the next stop, unless that is done here.
        self.state().module_hook = None;
        if steps {
            return Ok(Passed::Over);
        }
        self.control.resume(&[(Some(stop.cpu), Go::Step)])?;
        let mut stepped = self.control.wait_stop(STEP_PATIENCE)?;
        if stepped.is_none() {
            self.control.interrupt()?;
            stepped = self.control.wait_stop(STANDSTILL)?;
        }
        let Some(stopped) = stepped else { return Ok(Passed::Runs) };
        let hook = Some(hook).filter(|at| self.set_hook(*at));
        self.state().module_hook = hook;
        let is_step = stopped.cpu == stop.cpu && stopped.reason == StopReason::Signal(SIGTRAP);
        Ok(if is_step { Passed::Over } else { Passed::Stopped(stopped) })
    }
}

impl State {
    /// Whether the last stop is at our own breakpoint.
    pub(super) fn is_at_hook(&self) -> bool {
        let pc = self.stop_pc();
        self.stop.reason == StopReason::Signal(SIGTRAP) && pc.is_some() && pc == self.module_hook
    }

    /// Whether a client has a breakpoint where the vCPU stands that stopped the guest, and of which kind.
    pub(super) fn breakpoint(&self) -> Option<Point> {
        if self.stop.reason != StopReason::Signal(SIGTRAP) {
            return None;
        }
        let pc = self.stop_pc()?;
        let is_code = |point| matches!(point, Point::Software | Point::Hardware);
        let here = self.points.iter().find(|placed| is_code(placed.point) && placed.at == pc);
        here.map(|placed| placed.point)
    }
}
