//! Real return addresses, for those that a tracer has replaced on the stack.
//!
//! A task keeps what was replaced, with the place on the stack; the place is what tells two of them apart.
//! Source: `include/linux/rethook.h` (`struct rethook_node`), `include/linux/kprobes.h` (`struct kretprobe_instance`),
//! `include/linux/ftrace.h` (`struct ftrace_ret_stack`), `kernel/trace/fgraph.c`.

use super::entry::Hook;
use crate::addr::VirtAddr;
use crate::bytes::u64_at;
use crate::kernel::Kernel;

/// Replaced return addresses of one task: as deep as calls go.
const NODES_MAX: usize = 4096;
/// `SHADOW_STACK_SIZE`, and what 50 entries of older kernels take.
const SHADOW_STACK_SIZE: usize = 4096;

/// Where a kernel keeps replaced return addresses: offsets in bytes.
#[derive(Default)]
pub struct ReturnLayout {
    /// In `task_struct`: the head of the list; in a node: the next one, the address, and the place.
    kretprobe: Option<[u64; 4]>,
    /// In `task_struct`: `ret_stack`; in a `struct ftrace_ret_stack`: the address, the place, and its size.
    graph: Option<[u64; 4]>,
}

impl ReturnLayout {
    pub fn of(kernel: &Kernel) -> Self {
        let offset = |container: &str, path: &str| kernel.member(container, path).map(|member| member.offset);
        let all = |task: &str, node: &str, [next, address, place]: [&str; 3]| {
            Some([
                offset("task_struct", task)?,
                offset(node, next)?,
                offset(node, address)?,
                offset(node, place)?,
            ])
        };
        // Since Linux commit 54ecbe6f1ed5 ("rethook: Add a generic return hook") (in v5.18) the list is of rethooks; before,
        // since d741bf41d7c7 ("kprobes: Remove kretprobe hash") (in v5.11), of kretprobe's own.
        let rethook = || all("rethooks.first", "rethook_node", ["llist.next", "ret_addr", "frame"]);
        let own = || all("kretprobe_instances.first", "kretprobe_instance", ["llist.next", "ret_addr", "fp"]);
        let graph = || {
            let place = offset("ftrace_ret_stack", "retp")?;
            let size = kernel.types().and_then(|types| types.size(types.composite("ftrace_ret_stack")?))?;
            Some([offset("task_struct", "ret_stack")?, offset("ftrace_ret_stack", "ret")?, place, size])
        };
        Self { kretprobe: rethook().or_else(own), graph: graph() }
    }

    /// The return address that `hook` replaced at `place` on the stack of `task`. `before`: how many of the tracer's the
    /// walk has met already, for where places do not tell.
    pub fn real(
        &self,
        kernel: &Kernel,
        task: VirtAddr,
        hook: Hook,
        place: u64,
        before: usize,
    ) -> Option<u64> {
        match hook {
            Hook::Kretprobe => self.kretprobe(kernel, task, place, before),
            Hook::FunctionGraph => self.graph(kernel, task, place),
        }
    }

    fn kretprobe(&self, kernel: &Kernel, task: VirtAddr, place: u64, before: usize) -> Option<u64> {
        let [head, next, address, frame] = self.kretprobe?;
        let trampolines = &kernel.stacks().code(kernel).return_trampolines;
        let mut at = kernel.read_u64(task.wrapping_add(head))?;
        // Several probes of one function: all but the last found the trampoline already there.
        let (mut real, mut met) = (None, 0);
        for _ in 0..NODES_MAX {
            if at == 0 {
                break;
            }
            // The list leads from `llist` to `llist` inside the nodes.
            let word = |offset: u64| kernel.read_u64(VirtAddr(at.wrapping_sub(next)).wrapping_add(offset));
            let found = word(address)?;
            let is_real = !trampolines.iter().any(|(trampoline, _)| *trampoline == found);
            if is_real {
                if word(frame)? == place {
                    return Some(found);
                }
                if met == before {
                    real = real.or(Some(found));
                }
                met += 1;
            }
            at = word(next)?;
        }
        real
    }

    fn graph(&self, kernel: &Kernel, task: VirtAddr, place: u64) -> Option<u64> {
        let [stack, address, retp, size] = self.graph?;
        let at = kernel.read_u64(task.wrapping_add(stack)).filter(|&at| at != 0)?;
        let mut words = vec![0; SHADOW_STACK_SIZE];
        let filled = kernel.read(VirtAddr(at), &mut words).filled;
        words.truncate(filled);
        // Since about v6.11 the entries
        // have no common size; they begin at words all the same.
        let (address, retp, size) = (address as usize, retp as usize, size as usize);
        (0..words.len().saturating_sub(size.saturating_sub(8)))
            .step_by(8)
            .find(|base| u64_at(&words, base.saturating_add(retp)) == Some(place))
            .and_then(|base| u64_at(&words, base.saturating_add(address)))
    }
}
