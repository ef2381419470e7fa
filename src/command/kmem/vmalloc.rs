//! `kmem -v`: areas of vmalloc, ioremap and their kin.

use crate::command::{CommandError, Context, Output, printable};
use serde_json::{Value, json};
use std::fmt::Write;

pub fn areas(context: &Context<'_>) -> Result<Output, CommandError> {
    let found = context.kernel()?.vmap_areas()?;
    let (mut text, mut json) = (String::new(), Vec::new());
    let _ = writeln!(
        text,
        "{:<18} {:<18} {:<37} {:>10} {:>7}  flags, caller",
        "vmap_area", "vm_struct", "addresses", "size", "pages"
    );
    for area in &found.areas {
        let size = area.end.0.saturating_sub(area.start.0);
        let vm = area.vm.map(|vm| format!("{}", vm.at));
        let pages = area.page_count().filter(|&pages| pages > 0);
        let caller = area.caller();
        let _ = writeln!(
            text,
            "{:<18} {:<18} {}-{} {size:>10} {:>7}  {} {}",
            area.area.at.to_string(),
            vm.as_deref().unwrap_or("-"),
            area.start,
            area.end,
            pages.map_or(String::new(), |pages| pages.to_string()),
            area.flags().join(","),
            caller.as_deref().unwrap_or("")
        );
        json.push(json!({
            "vmap_area": format!("{}", area.area.at), "vm_struct": vm, "start": format!("{}", area.start),
            "end": format!("{}", area.end), "size": size, "pages": pages, "flags": area.flags(), "caller": caller,
            "physical": area.vm.and_then(|vm| vm.get("phys_addr").ok()).filter(|&at| at != 0).map(|at| format!("{at:#x}")),
        }));
    }
    for problem in &found.problems {
        let _ = writeln!(text, "damage: {}", printable(problem));
    }
    Ok(Output { text, json: json!({ "areas": Value::Array(json), "problems": found.problems }) })
}
