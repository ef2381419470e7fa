//! A machine as gdbstub's target: registers, threads, description, commands.
//!
//! Read-only, and never an error that would end a session: the error type has no value.
//! Memory is not served here (see [`super::memory`]); gdbstub's `m` misreads around holes.
//! Source: gdbstub's `Target` documentation.

use super::description::TARGET_XML;
use super::registers::{GdbRegister, GdbRegisters, X86_64, bytes_of};
use super::threads::{Thread, Threads};
use crate::arch::x86_64::RegisterFile;
use crate::command::{self, Context, Focus, Form};
use crate::kernel::Machine;
use gdbstub::common::Tid;
use gdbstub::target::ext::base::BaseOps;
use gdbstub::target::ext::base::multithread::MultiThreadBase;
use gdbstub::target::ext::base::single_register_access::{SingleRegisterAccess, SingleRegisterAccessOps};
use gdbstub::target::ext::monitor_cmd::{ConsoleOutput, MonitorCmd, MonitorCmdOps};
use gdbstub::target::ext::section_offsets::{Offsets, SectionOffsets, SectionOffsetsOps};
use gdbstub::target::ext::target_description_xml_override::{
    TargetDescriptionXmlOverride, TargetDescriptionXmlOverrideOps,
};
use gdbstub::target::ext::thread_extra_info::{ThreadExtraInfo, ThreadExtraInfoOps};
use gdbstub::target::{self, TargetError, TargetResult};
use std::convert::Infallible;
use std::sync::Arc;

/// errno values, which are what `Enn` replies carry.
pub(super) mod errno {
    /// No such thread.
    pub(in crate::gdb) const ESRCH: u8 = 3;
    /// A request too long.
    pub(in crate::gdb) const E2BIG: u8 = 7;
    /// Memory that cannot be read.
    pub(in crate::gdb) const EFAULT: u8 = 14;
    /// A request that makes no sense.
    pub(in crate::gdb) const EINVAL: u8 = 22;
    /// Writing to a dump.
    pub(in crate::gdb) const EROFS: u8 = 30;
}

/// One session's view of a machine.
pub(super) struct Target {
    pub(super) machine: Arc<Machine>,
    /// What the client sees as threads.
    pub(super) threads: Threads,
    /// The thread the client has selected (`Hg`): whose memory and registers are read.
    pub(super) selected: Thread,
    /// The thread that commands are about.
    pub(super) command_thread: Thread,
    /// What the last command printed; the front decides how it goes out.
    pub(super) console: Option<String>,
    /// What the user has chosen with commands.
    pub(super) focus: Focus,
}

impl Target {
    /// What a command for `thread` is run with, to answer as `form` says.
    pub(super) fn context(&self, thread: Thread, form: Form) -> Context<'_> {
        let cpu = self.threads.cpu(&self.machine, thread);
        let task = self.threads.task(&self.machine, thread).map(|task| task.at);
        Context { machine: &self.machine, cpu, task, focus: &self.focus, form }
    }

    fn registers(&self, tid: Tid) -> TargetResult<RegisterFile, Self> {
        let regs = Thread::of(tid).and_then(|thread| self.threads.registers(&self.machine, thread));
        regs.ok_or(TargetError::Errno(errno::ESRCH))
    }
}

impl target::Target for Target {
    type Arch = X86_64;
    type Error = Infallible;

    fn base_ops(&mut self) -> BaseOps<'_, Self::Arch, Self::Error> {
        BaseOps::MultiThread(self)
    }

    // gdbstub asks for breakpoints or this promise. gdb's attempt to write one is refused like any write.
    fn guard_rail_implicit_sw_breakpoints(&self) -> bool {
        true
    }

    // The front reads gdbstub's replies, and run lengths buy nothing on a local socket.
    fn use_rle(&self) -> bool {
        false
    }

    // The front refuses to resume, in better words.
    fn use_resume_stub(&self) -> bool {
        false
    }

    fn use_fork_stop_reason(&self) -> bool {
        false
    }

    fn use_vfork_stop_reason(&self) -> bool {
        false
    }

    fn use_vforkdone_stop_reason(&self) -> bool {
        false
    }

    fn support_monitor_cmd(&mut self) -> Option<MonitorCmdOps<'_, Self>> {
        Some(self)
    }

    fn support_section_offsets(&mut self) -> Option<SectionOffsetsOps<'_, Self>> {
        self.machine.text_base().is_some().then_some(self as _)
    }

    fn support_target_description_xml_override(
        &mut self,
    ) -> Option<TargetDescriptionXmlOverrideOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadBase for Target {
    fn read_registers(&mut self, regs: &mut GdbRegisters, tid: Tid) -> TargetResult<(), Self> {
        regs.0 = self.registers(tid)?;
        Ok(())
    }

    fn write_registers(&mut self, _regs: &GdbRegisters, _tid: Tid) -> TargetResult<(), Self> {
        Err(TargetError::Errno(errno::EROFS))
    }

    fn support_single_register_access(&mut self) -> Option<SingleRegisterAccessOps<'_, Tid, Self>> {
        Some(self)
    }

    fn read_addrs(&mut self, _at: u64, _buf: &mut [u8], _tid: Tid) -> TargetResult<usize, Self> {
        Err(TargetError::Errno(errno::EFAULT))
    }

    fn write_addrs(&mut self, _at: u64, _bytes: &[u8], _tid: Tid) -> TargetResult<(), Self> {
        Err(TargetError::Errno(errno::EROFS))
    }

    fn list_active_threads(&mut self, thread_is_active: &mut dyn FnMut(Tid)) -> Result<(), Infallible> {
        self.threads.iter().for_each(|thread| thread_is_active(thread.tid()));
        Ok(())
    }

    fn is_thread_alive(&mut self, tid: Tid) -> Result<bool, Infallible> {
        Ok(Thread::of(tid).is_some_and(|thread| self.threads.has(thread)))
    }

    fn support_thread_extra_info(&mut self) -> Option<ThreadExtraInfoOps<'_, Self>> {
        Some(self)
    }
}

impl SingleRegisterAccess<Tid> for Target {
    fn read_register(
        &mut self,
        tid: Tid,
        register: GdbRegister,
        buf: &mut [u8],
    ) -> TargetResult<usize, Self> {
        let regs = self.registers(tid)?;
        // 0 bytes mean "not available": gdbstub then sends `xx`.
        let Some(bytes) = bytes_of(&regs, register.reg) else { return Ok(0) };
        Ok(copy(&bytes[..register.reg.bytes()], buf))
    }

    fn write_register(&mut self, _tid: Tid, _register: GdbRegister, _value: &[u8]) -> TargetResult<(), Self> {
        Err(TargetError::Errno(errno::EROFS))
    }
}

impl ThreadExtraInfo for Target {
    fn thread_extra_info(&self, tid: Tid, buf: &mut [u8]) -> Result<usize, Infallible> {
        let text =
            Thread::of(tid).map(|thread| self.threads.describe(&self.machine, thread)).unwrap_or_default();
        Ok(copy(text.as_bytes(), buf))
    }
}

impl TargetDescriptionXmlOverride for Target {
    fn target_description_xml(
        &self,
        annex: &[u8],
        offset: u64,
        length: usize,
        buf: &mut [u8],
    ) -> TargetResult<usize, Self> {
        if annex != b"target.xml" {
            return Err(TargetError::Errno(errno::EINVAL));
        }
        let rest = usize::try_from(offset).ok().and_then(|offset| TARGET_XML.as_bytes().get(offset..));
        let rest = rest.unwrap_or_default();
        Ok(copy(&rest[..length.min(rest.len())], buf))
    }
}

impl SectionOffsets for Target {
    fn get_section_offsets(&mut self) -> Result<Offsets<u64>, Infallible> {
        // Segments, not sections: only then does gdb move .rodata, .init and per-CPU symbols along with .text.
        let text_seg = self.machine.text_base().unwrap_or_default().0;
        Ok(Offsets::Segments { text_seg, data_seg: None })
    }
}

impl MonitorCmd for Target {
    fn handle_monitor_cmd(&mut self, line: &[u8], _out: ConsoleOutput<'_>) -> Result<(), Infallible> {
        let context = self.context(self.command_thread, Form::Text);
        let line = String::from_utf8_lossy(line);
        // A command that fails has still answered; its answer says why.
        let text =
            command::run(&context, line.trim()).map_or_else(|error| format!("{error}\n"), |out| out.text);
        self.console = Some(text);
        Ok(())
    }
}

/// Copies as much of `from` as fits and says how much that was.
fn copy(from: &[u8], to: &mut [u8]) -> usize {
    let n = from.len().min(to.len());
    to[..n].copy_from_slice(&from[..n]);
    n
}
