//! A backtrace as JSON.

use super::render::{Renderer, words_of};
use crate::addr::VirtAddr;
use crate::command::task::identity;
use crate::kernel::sched::TaskInfo;
use crate::kernel::stack::{Boundary, Ended, Segment, StackBounds, Trace};
use crate::unwind::{Frame, Regs};
use serde_json::{Map, Value, json};

impl Renderer<'_> {
    /// The whole of `trace`; of a task, with what identifies it.
    pub fn json(&self, trace: &Trace, info: Option<&TaskInfo>) -> Value {
        let mut json = info.map(identity).unwrap_or_default();
        json.insert("running_on".into(), json!(trace.cpu.map(|cpu| cpu.0)));
        json.insert("start".into(), json!(trace.start.words()));
        json.insert("parked".into(), json!(trace.parked));
        json.insert("user_mode".into(), json!(trace.in_user_mode()));
        let segments: Vec<Value> = trace.segments.iter().map(|segment| self.segment(segment)).collect();
        json.insert("segments".into(), json!(segments));
        let (how, why) = match &trace.ended {
            Ended::User(_) => ("user", None),
            Ended::EntryGap { .. } => ("entry gap", None),
            Ended::Root { .. } => ("root", None),
            Ended::NotStarted => ("not started", None),
            Ended::Broken { why, .. } => ("broken", Some(why)),
        };
        json.insert("ended".into(), json!({ "how": how, "why": why, "complete": trace.ended.is_complete() }));
        json.insert("user_registers".into(), json!(trace.user().map(registers)));
        json.insert("guessed".into(), json!(trace.guessed()));
        if self.style.raw {
            let stack = |stack: StackBounds| json!({ "name": stack.kind.name(), "words": self.words_json(stack.start, stack.end) });
            json.insert("stacks".into(), self.stacks_of(trace).into_iter().map(stack).collect());
        }
        Value::Object(json)
    }

    fn segment(&self, segment: &Segment) -> Value {
        let stack = segment.stack.map(
            |stack| json!({ "name": stack.kind.name(), "start": hex(stack.start), "end": hex(stack.end) }),
        );
        let frame = |(nth, frame): (usize, &Frame)| {
            let mut json = self.frame_json(frame);
            if self.style.words {
                let (from, to) = words_of(segment, nth);
                json.insert("words".into(), self.words_json(from, to));
            }
            Value::Object(json)
        };
        let frames: Vec<Value> = segment.frames.iter().enumerate().map(frame).collect();
        let boundary = segment.boundary.as_ref().map(|boundary| self.boundary_json(boundary));
        json!({ "stack": stack, "frames": frames, "boundary": boundary })
    }

    /// Words of a stack: where, what, and its name where names are wanted (`-F`).
    fn words_json(&self, from: u64, to: u64) -> Value {
        let word = |(at, word): (VirtAddr, Option<u64>)| {
            let name = word.and_then(|word| self.name_of_word(word));
            json!({ "at": hex(at.0), "value": word.map(hex), "name": name })
        };
        self.each_word(from, to).map(word).collect()
    }

    fn frame_json(&self, frame: &Frame) -> Map<String, Value> {
        let found = self.symbol(frame);
        let lines: Option<Vec<Value>> = self.style.lines.then(|| {
            let line = |place: &crate::debuginfo::Location| {
                json!({ "function": place.function, "file": place.file, "line": place.line })
            };
            self.lines(frame).iter().map(line).collect()
        });
        let mut json = Map::new();
        let mut put = |key: &str, value: Value| json.insert(key.to_owned(), value);
        put("pc", json!(hex(frame.pc)));
        put("pc_at", json!(frame.pc_at.map(hex)));
        put("sp", json!(hex(frame.sp)));
        put("cfa", json!(frame.cfa.map(hex)));
        put("symbol", json!(found.map(|found| found.name)));
        put("offset", json!(found.map(|found| found.offset + u64::from(!frame.exact))));
        put("module", json!(found.and_then(|found| found.module)));
        put("exact", json!(frame.exact));
        put("source", json!(frame.source.name()));
        put("why", json!(frame.why.to_string()));
        put("restored", json!(frame.restored));
        if let Some(lines) = lines {
            put("lines", json!(lines));
        }
        json
    }

    fn boundary_json(&self, boundary: &Boundary) -> Value {
        json!({
            "event": boundary.event.to_string(),
            "at": hex(boundary.saved.at),
            "of_user": boundary.of_user(),
            "partial": boundary.partial,
            "orig_ax": boundary.saved.orig_ax.map(hex),
            "registers": registers(&boundary.saved.regs),
        })
    }
}

fn hex(value: u64) -> String {
    format!("{value:#x}")
}

fn registers(regs: &Regs) -> Value {
    Value::Object(regs.known().map(|(reg, value)| (reg.name().to_owned(), json!(hex(value)))).collect())
}
