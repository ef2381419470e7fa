//! `dis -s`: the source of a function, as far as an address in it.

use super::{CommandError, Output, printable};
use crate::addr::VirtAddr;
use crate::debuginfo::Location;
use crate::kernel::Kernel;
use serde_json::json;
use std::fmt::Write;

/// No function has more lines.
const LINES_MAX: u32 = 20_000;

/// The source of the function that `code` are the instructions of, the first one first: to the line of `at`, which is
/// marked; all of it without one.
pub fn show(kernel: &Kernel, code: &[VirtAddr], at: Option<VirtAddr>) -> Result<Output, CommandError> {
    let first = code.first().copied().unwrap_or_default();
    // The last is the function itself: the others were inlined into it.
    let own = |at: VirtAddr| kernel.locate(at).and_then(|mut places| places.pop());
    let Some(Location { file: Some(file), line: Some(start), .. }) = own(first) else {
        return Err(CommandError(kernel.why_no_lines(first)));
    };
    // Its name stands before the line where its code begins.
    let named = kernel.declared(first).filter(|place| place.file.as_ref() == Some(&file));
    let start = named.and_then(|place| place.line).map_or(start, |line| line.clamp(1, start));
    let line_of = |at: VirtAddr| own(at).filter(|place| place.file.as_ref() == Some(&file))?.line;
    let marked = at.and_then(line_of);
    let end = marked.or_else(|| code.iter().copied().filter_map(line_of).max());
    let end = end.unwrap_or(start).clamp(start, start.saturating_add(LINES_MAX));
    let mut text = format!("FILE: {}\nLINE: {}\n\n", printable(&file), marked.unwrap_or(start));
    let source = kernel.source_text(&file);
    let mut rows = Vec::new();
    match &source {
        Ok(source) => {
            let numbered = (1..).zip(source.lines()).skip_while(|(number, _)| *number < start);
            for (number, line) in numbered.take_while(|(number, _)| *number <= end) {
                let mark = if marked == Some(number) { "*" } else { " " };
                let shown = line.split('\t').map(printable).collect::<Vec<_>>().join("\t");
                let _ = writeln!(text, "{}", format!("{mark} {number:>5}  {shown}").trim_end());
                rows.push(json!({ "line": number, "text": line }));
            }
        }
        Err(why) => {
            let _ = writeln!(text, "{}", printable(why));
        }
    }
    let json = json!({
        "file": file, "function_line": start, "line": marked, "source": rows, "problem": source.err(),
    });
    Ok(Output { text, json })
}
