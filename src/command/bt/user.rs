//! `bt -u`: user stacks.

use crate::addr::VirtAddr;
use crate::command::task::{heading, identity};
use crate::command::{CommandError, Context, Output, printable};
use crate::kernel::stack::Tracer;
use crate::kernel::user_stack::{UserFrame, UserTrace};
use serde_json::{Value, json};
use std::fmt::Write;

/// The user stacks of `tasks`.
pub fn output(
    context: &Context<'_>,
    tracer: &Tracer<'_>,
    tasks: &[VirtAddr],
    why: bool,
) -> Result<Output, CommandError> {
    let kernel = context.kernel()?;
    let reader = kernel.task_reader()?;
    let (mut text, mut rows) = (String::new(), Vec::new());
    for &task in tasks {
        let info = reader.read(task);
        let mut row = identity(&info);
        let _ = write!(text, "{}{}", if text.is_empty() { "" } else { "\n" }, heading(&info));
        let trace = tracer.task(task);
        let found: Result<UserTrace, String> = match (info.mm, trace.user()) {
            (None, _) => Err("a kernel thread or exiting: it has no user memory".to_owned()),
            (Some(_), None) => Err("its user registers were not found".to_owned()),
            (Some(mm), Some(regs)) => kernel.user_trace(mm, *regs).map_err(|error| error.to_string()),
        };
        match found {
            Ok(found) => {
                for (number, one) in found.frames.iter().enumerate() {
                    let _ = writeln!(text, "{}", line(number, one));
                    if why {
                        let _ = writeln!(text, "    {}", one.frame.why);
                    }
                }
                if let Some(problem) = &found.problem {
                    let _ = writeln!(text, "    (the user stack ends here: {})", printable(problem));
                }
                row.insert("frames".into(), found.frames.iter().map(frame_json).collect());
                row.insert("problem".into(), json!(found.problem));
            }
            Err(why) => {
                let _ = writeln!(text, "    ({why})");
                row.insert("error".into(), json!(why));
            }
        }
        rows.push(Value::Object(row));
    }
    Ok(Output { text, json: json!({ "tasks": rows }) })
}

fn line(number: usize, one: &UserFrame) -> String {
    let number = format!("#{number}");
    let at = one.frame.pc_at.unwrap_or(one.frame.sp);
    let name = match &one.symbol {
        Some((name, offset)) => format!("{}+{:#x}", printable(name), offset + u64::from(!one.frame.exact)),
        None => "(unknown)".to_owned(),
    };
    let module = one.module.as_deref().map_or(String::new(), |module| format!(" [{}]", printable(module)));
    format!("{number:>3} [{at:016x}] {name} at {:016x}{module}", one.frame.pc)
}

fn frame_json(one: &UserFrame) -> Value {
    json!({
        "pc": format!("{:#x}", one.frame.pc),
        "sp": format!("{:#x}", one.frame.sp),
        "symbol": one.symbol.as_ref().map(|(name, _)| name),
        "offset": one.symbol.as_ref().map(|(_, offset)| offset + u64::from(!one.frame.exact)),
        "module": one.module,
        "source": one.frame.source.name(),
        "why": one.frame.why.to_string(),
    })
}
