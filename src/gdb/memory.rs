//! Reads of memory: `m` (hex) and `x` (binary) through one path.
//!
//! A reply may be shorter than asked: it ends exactly where memory becomes unreadable. A first byte that
//! cannot be read is an error, never zeros. Source: GDB manual, "Packets" (`m`, `x`).

use super::target::errno;
use crate::addr::{PhysAddr, VirtAddr};
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

/// Reads what `ADDR,LEN` asks for, at most `max` bytes of it; the error is an errno.
pub(super) fn read(machine: &Machine, space: Space, request: &[u8], max: usize) -> Result<Vec<u8>, u8> {
    let (at, len) = parse(request).ok_or(errno::EINVAL)?;
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(usize::MAX).min(max)];
    let filled = match space {
        Space::Virtual(cpu) => machine.read_virt(cpu, VirtAddr(at), &mut bytes).filled,
        Space::Task(task) => machine.read_as_task(task, VirtAddr(at), &mut bytes).filled,
        Space::Physical => machine.backend().read_phys(PhysAddr(at), &mut bytes).filled,
    };
    if filled == 0 && len > 0 {
        return Err(errno::EFAULT);
    }
    bytes.truncate(filled);
    Ok(bytes)
}

fn parse(request: &[u8]) -> Option<(u64, u64)> {
    let comma = request.iter().position(|&b| b == b',')?;
    let (at, len) = request.split_at(comma);
    Some((rsp::parse_u64(at)?, rsp::parse_u64(len.get(1..)?)?))
}
