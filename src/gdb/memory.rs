//! Reads of memory: `m` (hex) and `x` (binary) through one path.
//!
//! A reply may be shorter than asked: it ends exactly where memory becomes unreadable. A first byte that
//! cannot be read is an error, never zeros. Source: GDB manual, "Packets" (`m`, `x`).

use super::target::errno;
use crate::addr::{PhysAddr, VirtAddr};
use crate::arch::x86_64::{TranslateError, VirtError, VirtOutcome};
use crate::kernel::{CpuId, Machine};
use crate::rsp;

/// Which memory addresses mean.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Space {
    /// What the CPU sees.
    Virtual(CpuId),
    /// What the task (address of its `struct task_struct`) sees.
    Task(VirtAddr),
    /// The machine's physical memory (`Qqemu.PhyMemMode:1`).
    Physical,
}

/// Reads what `ADDR,LEN` asks for, at most `max` bytes of it, into `room`, which grows as needed and is there to be used
/// again; the error is an errno.
pub(super) fn read<'r>(
    machine: &Machine,
    space: Space,
    request: &[u8],
    max: usize,
    room: &'r mut Vec<u8>,
) -> Result<&'r [u8], u8> {
    let (at, len) = parse(request).ok_or(errno::EINVAL)?;
    let wanted = usize::try_from(len).unwrap_or(usize::MAX).min(max);
    if room.len() < wanted {
        room.resize(wanted, 0);
    }
    let bytes = room.get_mut(..wanted).unwrap_or_default();
    let filled = match space {
        Space::Virtual(cpu) => {
            let own = |at, buf: &mut [u8]| machine.read_virt(cpu, at, buf);
            read_virtual(machine, &own, &|| Some(cpu), VirtAddr(at), bytes)
        }
        Space::Task(task) => {
            let own = |at, buf: &mut [u8]| machine.read_as_task(task, at, buf);
            read_virtual(machine, &own, &|| last_cpu(machine, task), VirtAddr(at), bytes)
        }
        Space::Physical => machine.backend().read_phys(PhysAddr(at), bytes).filled,
    };
    if filled == 0 && len > 0 {
        return Err(errno::EFAULT);
    }
    Ok(bytes.get(..filled).unwrap_or_default())
}

/// The CPU that a task runs on or last ran on.
fn last_cpu(machine: &Machine, task: VirtAddr) -> Option<CpuId> {
    let kernel = machine.kernel()?;
    kernel.task_cpu(kernel.object("task_struct", task).ok()?).ok()
}

/// Reads virtual memory of a thread by `own`, but for per-CPU variables: where gdb has them there is only the template
/// they were made of, or nothing, so that its `p runqueues` means the copy of the thread's CPU.
///
/// Before about v6.15 gdb's addresses of them are in the user's half. What the thread's own tables map there is
/// the user's.
fn read_virtual(
    machine: &Machine,
    own: &dyn Fn(VirtAddr, &mut [u8]) -> VirtOutcome,
    cpu: &dyn Fn() -> Option<CpuId>,
    at: VirtAddr,
    buf: &mut [u8],
) -> usize {
    let window = machine.kernel().and_then(|kernel| Some((kernel, kernel.per_cpu_window()?)));
    let Some((kernel, window)) = window else { return own(at, buf).filled };
    let beyond =
        |at: VirtAddr, end: VirtAddr| usize::try_from(end.0.saturating_sub(at.0)).unwrap_or(usize::MAX);
    if at >= window.end || beyond(at, window.start) >= buf.len() {
        return own(at, buf).filled;
    }
    let mut filled = 0;
    while filled < buf.len() {
        let here = at.wrapping_add(filled as u64);
        let copy =
            if window.contains(&here) { cpu().and_then(|cpu| kernel.per_cpu_alias(here, cpu)) } else { None };
        let len = match &copy {
            Some(_) => beyond(here, window.end).min(here.left_in_page() as usize),
            None if here < window.start => beyond(here, window.start),
            None => usize::MAX,
        };
        let end = filled.saturating_add(len).min(buf.len());
        let Some(piece) = buf.get_mut(filled..end) else { break };
        let wanted = piece.len();
        let got = match copy {
            Some(copy) if here.0 >> 63 == 1 => kernel.read(copy, piece).filled,
            Some(copy) => match own(here, piece) {
                VirtOutcome { filled: 0, stopped: Some(VirtError::Translate(why)) } if maps_nothing(&why) => {
                    kernel.read(copy, piece).filled
                }
                outcome => outcome.filled,
            },
            None => own(here, piece).filled,
        };
        filled += got;
        if got < wanted {
            break;
        }
    }
    filled
}

/// Whether it is certain that nothing is there.
fn maps_nothing(why: &TranslateError) -> bool {
    matches!(why, TranslateError::NotPresent { .. } | TranslateError::NoTables { .. })
}

fn parse(request: &[u8]) -> Option<(u64, u64)> {
    let comma = request.iter().position(|&b| b == b',')?;
    let (at, len) = request.split_at(comma);
    Some((rsp::parse_u64(at)?, rsp::parse_u64(len.get(1..)?)?))
}
