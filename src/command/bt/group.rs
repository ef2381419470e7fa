//! `bt --group`: identical backtraces folded, with who has them: who else is stuck there, and who is different.

use super::render::Renderer;
use crate::addr::VirtAddr;
use crate::command::task::identity;
use crate::command::{Form, Output, object, printable};
use crate::kernel::sched::TaskInfo;
use crate::kernel::stack::{Event, Trace};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::fmt::Write;

/// Pids and names shown before a list is cut; JSON has all.
const SHOWN: usize = 40;

/// The backtraces of tasks by what is the same in them: the code that called, whatever stack it is on, and what entered.
pub fn groups(traces: &[&Trace]) -> Vec<Vec<usize>> {
    let key = |trace: &Trace| -> Vec<(u64, Option<String>)> {
        let segments = trace.segments.iter().flat_map(|segment| {
            let by = segment.boundary.as_ref().map(|boundary| match boundary.event {
                // A fault is the same fault whatever its error code.
                Event::Exception(vector, _) => Event::Exception(vector, None).to_string(),
                event => event.to_string(),
            });
            segment.frames.iter().map(|frame| (frame.pc, None)).chain(by.map(|by| (0, Some(by))))
        });
        segments.collect()
    };
    let mut by_key: HashMap<_, usize> = HashMap::new();
    let mut groups: Vec<Vec<usize>> = Vec::new();
    for (i, trace) in traces.iter().enumerate() {
        // Those without a frame differ in why.
        let key = (key(trace), format!("{:?}", trace.start), trace.in_user_mode());
        let group = *by_key.entry(key).or_insert_with(|| {
            groups.push(Vec::new());
            groups.len() - 1
        });
        if let Some(group) = groups.get_mut(group) {
            group.push(i);
        }
    }
    groups.sort_by_key(|group| std::cmp::Reverse(group.len()));
    groups
}

/// The answer: the largest groups first, each with its backtrace once.
pub fn output(traced: &[(TaskInfo, Trace)], renderer: &Renderer<'_>, form: Form) -> Output {
    let (mut text, mut rows) = (String::new(), Vec::new());
    let all = groups(&traced.iter().map(|(_, trace)| trace).collect::<Vec<_>>());
    for group in &all {
        let members: Vec<&(TaskInfo, Trace)> = group.iter().filter_map(|&i| traced.get(i)).collect();
        let Some((_, trace)) = members.first() else { continue };
        let counted = |what: &dyn Fn(&TaskInfo) -> String| {
            let mut counts: Vec<(String, usize)> = Vec::new();
            for (info, _) in &members {
                let name = what(info);
                match counts.iter_mut().find(|(other, _)| *other == name) {
                    Some((_, count)) => *count += 1,
                    None => counts.push((name, 1)),
                }
            }
            counts.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
            counts
        };
        let names = counted(&|info| info.comm.as_deref().map_or("?".to_owned(), printable));
        let states = counted(&|info| info.state.map_or("??", |state| state.short()).to_owned());
        let shown = |counts: &[(String, usize)]| {
            let one = |(name, count): &(String, usize)| match count {
                1 => name.clone(),
                count => format!("{name} ×{count}"),
            };
            let more = match counts.len().checked_sub(SHOWN) {
                Some(more) if more > 0 => format!(", … {more} more"),
                _ => String::new(),
            };
            counts.iter().take(SHOWN).map(one).collect::<Vec<_>>().join(", ") + &more
        };
        let pids: Vec<String> = members.iter().map(|(info, _)| info.pid.unwrap_or(0).to_string()).collect();
        let more = match pids.len().checked_sub(SHOWN) {
            Some(more) if more > 0 => format!(" … {more} more"),
            _ => String::new(),
        };
        let some = pids.get(..SHOWN).unwrap_or(&pids).join(" ");
        let _ = writeln!(
            text,
            "{} task{}: {}\n  names:  {}\n  states: {}\n  pids:   {some}{more}",
            members.len(),
            if members.len() == 1 { "" } else { "s" },
            first_symbol(trace, renderer).unwrap_or_else(|| trace.start.words().to_owned()),
            shown(&names),
            shown(&states),
        );
        text.push_str(&renderer.text(trace, None));
        text.push('\n');
        if form.has_json() {
            rows.push(object([
                ("count", members.len().into()),
                ("tasks", members.iter().map(|(info, _)| Value::Object(identity(info))).collect()),
                ("names", json!(names)),
                ("states", json!(states)),
                ("trace", renderer.json(trace, None)),
            ]));
        }
    }
    let _ = match (traced.len(), all.len()) {
        (1, _) => writeln!(text, "one task"),
        (tasks, 1) => writeln!(text, "{tasks} tasks have the same backtrace"),
        (tasks, groups) => writeln!(text, "{tasks} tasks have {groups} different backtraces"),
    };
    Output { text, json: object([("groups", Value::Array(rows)), ("tasks", traced.len().into())]) }
}

/// The innermost function that is not the scheduler's own: where the task waits.
fn first_symbol(trace: &Trace, renderer: &Renderer<'_>) -> Option<String> {
    const SCHEDULER: [&str; 8] = [
        "context_switch",
        "__schedule",
        "schedule",
        "schedule_timeout",
        "schedule_idle",
        "schedule_preempt_disabled",
        "schedule_hrtimeout_range",
        "schedule_hrtimeout_range_clock",
    ];
    let name = |pc: u64| renderer.kernel.symbolize(VirtAddr(pc)).map(|symbol| symbol.name);
    let found = trace.frames().filter_map(|frame| name(frame.lookup_pc()));
    found.into_iter().find(|name| !SCHEDULER.contains(name)).map(printable)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::arch::x86_64::Reg;
    use crate::kernel::stack::{Ended, Segment, Start};
    use crate::unwind::{Frame, FrameSource, Regs};

    fn traced(at: u64, pcs: &[u64], sp: u64) -> (VirtAddr, Trace) {
        let frame = |(i, pc): (usize, &u64)| {
            let mut regs = Regs::default();
            regs.set(Reg::Rip, *pc);
            regs.set(Reg::Rsp, sp + i as u64 * 16);
            Frame::first(regs, FrameSource::InactiveTask, "").unwrap()
        };
        let frames = pcs.iter().enumerate().map(frame).collect();
        let segments = vec![Segment { stack: None, frames, boundary: None }];
        let trace = Trace {
            cpu: None,
            task: Some(VirtAddr(at)),
            start: Start::SwitchedOut,
            segments,
            ended: Ended::Root { pc: 0 },
            parked: None,
        };
        (VirtAddr(at), trace)
    }

    /// The same code on other stacks is the same backtrace; one call more or less is not.
    #[test]
    fn who_is_different_stands_alone() {
        let all = [
            traced(1, &[10, 20], 0x1000),
            traced(2, &[10, 20, 30], 0x2000),
            traced(3, &[10, 20], 0x3000),
            traced(4, &[11, 20], 0x4000),
            traced(5, &[10, 20], 0x5000),
        ];
        let traces: Vec<&Trace> = all.iter().map(|(_, trace)| trace).collect();
        assert_eq!(groups(&traces), [vec![0, 2, 4], vec![1], vec![3]]);
        assert!(groups(&[]).is_empty());
    }
}
