//! A guest's run control in packets: stop replies, resuming, breakpoints, writes.
//!
//! Knows what a client may ask of a guest that runs, and what it is told; [`super::live`] does it. A dump never comes
//! here. Source: GDB manual, "Packets" (`vCont`, `Z`, `bc`), "Stop Reply Packets".

use super::front::{Front, Reply, error};
use super::live::{Resumed, Session};
use super::target::errno;
use super::threads::{Choice, Thread};
use crate::addr::{PAGE_SIZE, VirtAddr};
use crate::arch::x86_64::Reg;
use crate::backend::live::{Go, LiveError, Point, StopReason};
use crate::rsp;

/// A request to let threads run, as `vCont` and its older forms have it.
type Actions = Vec<(Option<u32>, Go)>;

impl Front {
    /// The guest's part of the answers; `None` for what a guest answers as a dump does.
    pub(super) fn live_answer(&mut self, body: &[u8]) -> Option<Reply> {
        let live = self.live.as_ref()?;
        if body.starts_with(b"qXfer:libraries:read:") {
            live.follow_modules();
            return None;
        }
        Some(match body {
            b"?" => {
                live.greet();
                self.catch_up();
                // gdb takes the first packet for the answer, whatever it is: words wait for the next stop.
                self.stop_reply().into()
            }
            b"bc" => self.go(body, true, Vec::new(), |control| control.reverse(Go::Continue)),
            b"bs" => self.go(body, true, Vec::new(), |control| control.reverse(Go::Step)),
            [b'c' | b'C' | b's' | b'S', ..] | [b'v', b'C', b'o', b'n', b't', b';', ..] => {
                match self.actions(body) {
                    Ok(actions) => {
                        self.go(body, false, actions.clone(), move |control| control.resume(&actions))
                    }
                    Err(why) => self.no_run(body, why),
                }
            }
            [b'Z', rest @ ..] => self.point(true, rest).into(),
            [b'z', rest @ ..] => self.point(false, rest).into(),
            [b'M', rest @ ..] => self.write(rest, rsp::decode).into(),
            [b'X', rest @ ..] => self.write(rest, rsp::unescape).into(),
            [b'P', rest @ ..] => self.write_register(rest).into(),
            [b'G', ..] => error(errno::EROFS).into(),
            b"qqemu.sstep" | b"qqemu.sstepbits" | b"Qqemu.sstepbits" => self.step_flags(body)?.into(),
            [b'Q', b'q', b'e', b'm', b'u', b'.', b's', b's', b't', b'e', b'p', b'=', ..] => {
                self.step_flags(body)?.into()
            }
            _ => {
                let line = rsp::decode(body.strip_prefix(b"qRcmd,")?)?;
                let line = String::from_utf8_lossy(&line).into_owned();
                let what = line.trim().strip_prefix("control")?;
                if !what.is_empty() && !what.starts_with(' ') {
                    return None;
                }
                let text = live.control_command(what.trim());
                self.catch_up();
                self.console_answer(text, b"OK".to_vec())
            }
        })
    }

    /// Whether the guest runs and the client is owed an answer when it stops.
    pub fn is_running(&self) -> bool {
        self.owes_stop
    }

    /// What becomes readable when the guest has stopped.
    pub fn wake(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
        use std::os::fd::AsFd;
        self.live.as_ref().map(AsFd::as_fd)
    }

    /// The guest has stopped: appends the answer that was owed to `out`.
    pub fn woken(&mut self, out: &mut Vec<u8>) {
        let Some(live) = &self.live else { return };
        live.forget_wakes();
        if std::mem::take(&mut self.owes_stop) {
            self.catch_up();
            let reply = self.stop_with_news();
            self.reply(reply, b"", out);
        }
    }

    /// Ctrl-C.
    pub(super) fn interrupt(&mut self, out: &mut Vec<u8>) {
        let Some(live) = self.live.as_ref().filter(|_| self.owes_stop) else { return };
        match live.interrupt() {
            Ok(true) => {}
            // It only looks on: it stands where it stood, and is shown what is there now.
            Ok(false) => {
                self.owes_stop = false;
                self.catch_up();
                let stop = self.stop_of_now(b"");
                self.reply(stop.into(), b"", out);
            }
            // It runs on, and so does the waiting for its stop.
            Err(error) => self.say(&format!("{error}\n"), out),
        }
    }

    /// QEMU's flags for steps, where they are this client's to ask for and to set.
    fn step_flags(&self, packet: &[u8]) -> Option<Vec<u8>> {
        let answer = self.live.as_ref()?.ask_about_steps(packet)?;
        Some(answer.unwrap_or_else(|error| self.refused(&error.to_string())))
    }

    /// Takes over what the last stop has changed.
    pub(super) fn catch_up(&mut self) {
        let Some((machine, files)) = self.live.as_mut().and_then(Session::changed) else { return };
        if let Some(files) = files {
            self.files.files = files;
        }
        self.see(machine);
    }

    fn go(
        &mut self,
        request: &[u8],
        backward: bool,
        actions: Actions,
        go: impl FnOnce(&dyn crate::backend::live::LiveControl) -> Result<(), LiveError>,
    ) -> Reply {
        let Some(live) = &self.live else { return Reply::Later };
        if !live.policy().control && (backward || actions.iter().any(|(_, go)| *go == Go::Step)) {
            let why = "kstub was started with --no-stop: nothing steps. 'continue' waits for Ctrl-C, which looks again.\n";
            return self.no_run(request, why.to_owned());
        }
        // Of several actions for a vCPU the first counts.
        let steps = |cpu| {
            let named = actions.iter().find(|(one, _)| one.is_none_or(|one| one == cpu));
            named.is_some_and(|(_, go)| *go == Go::Step)
        };
        match live.resume(backward, steps, go) {
            Resumed::Later => {
                self.owes_stop = true;
                Reply::Later
            }
            Resumed::Stopped => self.stop_with_news(),
            Resumed::No(why) => self.no_run(request, why),
        }
    }

    /// It does not run: says why, and that it stands where it stood; or that it is gone.
    fn no_run(&mut self, request: &[u8], why: String) -> Reply {
        if self.live.as_ref().is_some_and(|live| live.gone().is_some()) {
            return Reply::Console(why, GONE.to_vec());
        }
        Reply::Console(why, self.stop_of_now(request))
    }

    /// A stop without a cause, on the thread that the request is about.
    fn stop_of_now(&mut self, request: &[u8]) -> Vec<u8> {
        let thread = self.asked_to_run(request);
        let signal = if self.client.gdb { b"T00" } else { b"T05" };
        self.stopped(signal, thread)
    }

    /// How the guest stopped last, and behind a request to run: what else has happened.
    fn stop_with_news(&mut self) -> Reply {
        let Some(live) = &self.live else { return Reply::Later };
        let gone = live.gone().map(|error| format!("{error}\n")).unwrap_or_default();
        match live.news() + &gone {
            news if news.is_empty() => self.stop_reply().into(),
            news => Reply::Console(news, self.stop_reply()),
        }
    }

    /// How the guest stopped last, on the thread that did.
    fn stop_reply(&mut self) -> Vec<u8> {
        let Some(live) = &self.live else { return Vec::new() };
        if live.gone().is_some() {
            return GONE.to_vec();
        }
        let stopped = live.last_stop();
        let index = usize::try_from(stopped.stop.cpu).unwrap_or(usize::MAX);
        let threads = &self.engine.target.threads;
        let thread = self.machine.cpu_of_saved(index).map(|cpu| threads.on(cpu));
        let thread = thread.filter(|&thread| threads.has(thread)).unwrap_or(self.first());
        let why = match stopped.stop.reason {
            StopReason::Signal(_) if stopped.new_module => "T05library:;".to_owned(),
            StopReason::Signal(_) if self.client.tells_breakpoints && stopped.breakpoint.is_some() => {
                let hardware = stopped.breakpoint == Some(Point::Hardware);
                if hardware { "T05hwbreak:;" } else { "T05swbreak:;" }.to_owned()
            }
            StopReason::Signal(signal) => format!("T{signal:02x}"),
            StopReason::Watch(point, at) => {
                let name = match point {
                    Point::Read => "rwatch",
                    Point::Access => "awatch",
                    Point::Write | Point::Software | Point::Hardware => "watch",
                };
                format!("T05{name}:{:x};", live.asked_address(at).0)
            }
            StopReason::ReplayEnd => {
                format!("T05replaylog:{};", if stopped.backward { "begin" } else { "end" })
            }
        };
        self.stopped(why.as_bytes(), thread)
    }

    /// What `vCont;…`, `c`, `s` and the like ask for. Signals mean nothing to a machine.
    fn actions(&self, body: &[u8]) -> Result<Actions, String> {
        let Some(actions) = body.strip_prefix(b"vCont;") else {
            // `cADDR`, `Csig;ADDR`: from elsewhere than the pc, which would be to write it.
            let elsewhere = match body {
                [b'c' | b's', rest @ ..] => !rest.is_empty(),
                _ => body.contains(&b';'),
            };
            if elsewhere {
                return Err(
                    "Going on at another address is not supported: set $rip (needs --allow-write).\n".into(),
                );
            }
            let go = if matches!(body.first(), Some(b's' | b'S')) { Go::Step } else { Go::Continue };
            // The old forms mean the thread of `Hc`, which clients that use them set to all or to the selected.
            return Ok(match go {
                Go::Continue => vec![(None, go)],
                Go::Step => vec![(Some(self.vcpu(self.selection.user())?), go), (None, Go::Continue)],
            });
        };
        let one = |action: &[u8]| {
            let mut parts = action.splitn(2, |&byte| byte == b':');
            let go = match parts.next().and_then(<[u8]>::first) {
                Some(b'c' | b'C') => Go::Continue,
                Some(b's' | b'S') => Go::Step,
                _ => return Err(format!("unknown action '{}'\n", action.escape_ascii())),
            };
            let thread = match parts.next().map(Choice::parse) {
                None | Some(Some(Choice::Whichever)) => None,
                Some(Some(Choice::One(thread))) => Some(self.vcpu(thread)?),
                Some(None) => return Err(format!("no such thread: '{}'\n", action.escape_ascii())),
            };
            Ok((thread, go))
        };
        actions.split(|&byte| byte == b';').filter(|action| !action.is_empty()).map(one).collect()
    }

    /// The vCPU that a thread runs on now.
    fn vcpu(&self, thread: Thread) -> Result<u32, String> {
        let threads = &self.engine.target.threads;
        let cpu = threads.runs_on(thread).filter(|_| threads.has(thread));
        let cpu = cpu.ok_or("This task does not run: select the thread of a CPU, or of a task on one.\n")?;
        let index = self.machine.saved_of_cpu(cpu).and_then(|index| u32::try_from(index).ok());
        index.ok_or_else(|| format!("QEMU has no vCPU for CPU {cpu}.\n"))
    }

    /// `Z` and `z`: `KIND,ADDR,LEN`, and conditions behind, which are gdb's to check.
    fn point(&mut self, insert: bool, request: &[u8]) -> Vec<u8> {
        let Some(live) = &self.live else { return Vec::new() };
        let mut fields = request.split(|&byte| byte == b';').next().unwrap_or_default().split(|&b| b == b',');
        let mut field = || fields.next().and_then(rsp::parse_u64);
        let (Some(kind), Some(at), Some(len)) = (field(), field(), field()) else {
            return error(errno::EINVAL);
        };
        let point = match kind {
            0 => Point::Software,
            1 => Point::Hardware,
            2 => Point::Write,
            3 => Point::Read,
            4 => Point::Access,
            // Empty: of a kind that is not known.
            _ => return Vec::new(),
        };
        if let Some(why) = live.not_in_control() {
            return self.refused(why);
        }
        let asked = VirtAddr(at);
        let at = match point {
            Point::Software | Point::Hardware => asked,
            Point::Write | Point::Read | Point::Access => self.per_cpu_copy(asked),
        };
        match live.set_point(insert, point, (asked, at), len) {
            Ok(()) => b"OK".to_vec(),
            Err(error) => self.refused(&error.to_string()),
        }
    }

    /// Where the selected thread's copy of a per-CPU variable is that gdb has at `at`; `at` itself for all else.
    fn per_cpu_copy(&self, at: VirtAddr) -> VirtAddr {
        let target = &self.engine.target;
        let copy = || {
            let kernel = self.machine.kernel()?;
            let window = kernel.per_cpu_window()?;
            let cpu = target.threads.cpu(&self.machine, target.selected);
            window.contains(&at).then(|| kernel.per_cpu_alias(at, cpu)).flatten()
        };
        copy().unwrap_or(at)
    }

    /// An error in words, for a gdb that prints them.
    fn refused(&self, why: &str) -> Vec<u8> {
        match self.client.selects_for_commands {
            true => [b"E.", why.as_bytes()].concat(),
            false => error(errno::EINVAL),
        }
    }

    /// `M` and `X`: `ADDR,LEN:BYTES`.
    fn write(&mut self, request: &[u8], decode: impl Fn(&[u8]) -> Option<Vec<u8>>) -> Vec<u8> {
        let Some(live) = &self.live else { return Vec::new() };
        let colon = request.iter().position(|&byte| byte == b':').unwrap_or(request.len());
        let (head, bytes) = request.split_at(colon);
        let mut head = head.split(|&byte| byte == b',').map(rsp::parse_u64);
        let (Some(Some(at)), Some(Some(len)), Some(bytes)) =
            (head.next(), head.next(), decode(bytes.get(1..).unwrap_or_default()))
        else {
            return error(errno::EINVAL);
        };
        if bytes.len() as u64 != len {
            return error(errno::EINVAL);
        }
        if !live.policy().allow_write {
            return if len == 0 { b"OK".to_vec() } else { self.read_only() };
        }
        if let Some(why) = live.not_in_control().filter(|_| len > 0) {
            tracing::warn!("writing at {at:#x}: {why}");
            return self.refused(why);
        }
        match self.write_bytes(live, VirtAddr(at), &bytes) {
            Ok(()) => b"OK".to_vec(),
            Err(why) => {
                tracing::warn!("writing at {at:#x}: {why}");
                error(errno::EFAULT)
            }
        }
    }

    fn read_only(&self) -> Vec<u8> {
        match self.client.gdb {
            true => b"E.kstub was started without --allow-write".to_vec(),
            false => error(errno::EROFS),
        }
    }

    fn write_bytes(&self, live: &Session, at: VirtAddr, bytes: &[u8]) -> Result<(), String> {
        let target = &self.engine.target;
        let cpu = target.threads.cpu(&self.machine, target.selected);
        let task = target.threads.task(&self.machine, target.selected).map(|task| task.at);
        let mut done = 0;
        while let Some(rest) = bytes.get(done..).filter(|rest| !rest.is_empty()) {
            let here = self.per_cpu_copy(at.wrapping_add(done as u64));
            let phys = match self.is_physical() {
                true => crate::addr::PhysAddr(here.0),
                false => self.machine.phys_of(cpu, task, here).map_err(|error| error.to_string())?,
            };
            let left = usize::try_from(PAGE_SIZE - phys.0 % PAGE_SIZE).unwrap_or(1);
            let piece = rest.get(..left.min(rest.len())).unwrap_or_default();
            tracing::warn!("a client writes {} at {here} (physical {phys})", shown(piece));
            live.control().write_phys(phys, piece).map_err(|error| error.to_string())?;
            done += piece.len();
        }
        live.changed_by_us().map_err(|error| error.to_string())
    }

    /// `P`: `NUMBER=VALUE`.
    fn write_register(&mut self, request: &[u8]) -> Vec<u8> {
        let Some(live) = &self.live else { return Vec::new() };
        let mut parts = request.splitn(2, |&byte| byte == b'=');
        let number = parts.next().and_then(rsp::parse_u64).and_then(|number| usize::try_from(number).ok());
        let (Some(reg), Some(value)) =
            (number.and_then(Reg::from_number), parts.next().and_then(rsp::decode))
        else {
            return error(errno::EINVAL);
        };
        if !live.policy().allow_write {
            return self.read_only();
        }
        if let Some(why) = live.not_in_control() {
            return self.refused(why);
        }
        let vcpu = match self.vcpu(self.engine.target.selected) {
            Ok(vcpu) => vcpu,
            Err(why) => return self.refused(why.trim_end()),
        };
        tracing::warn!("a client writes {} into {} of vCPU {vcpu}", shown(&value), reg.name());
        let written = live.control().write_register(vcpu, reg.name(), &value);
        match written.and_then(|()| live.changed_by_us()) {
            Ok(()) => {
                self.catch_up();
                b"OK".to_vec()
            }
            Err(error) => self.refused(&error.to_string()),
        }
    }
}

/// Bytes for the log: the first of them, and how many there are.
fn shown(bytes: &[u8]) -> String {
    const SHOWN: usize = 16;
    let mut digits = Vec::new();
    rsp::encode(bytes.get(..SHOWN).unwrap_or(bytes), &mut digits);
    let digits = String::from_utf8_lossy(&digits);
    match bytes.len() {
        count if count > SHOWN => format!("{digits}… ({count} bytes)"),
        _ => digits.into_owned(),
    }
}

/// The stop reply for a guest that is gone: killed by SIGKILL, as far as gdb is concerned.
const GONE: &[u8] = b"X09";
