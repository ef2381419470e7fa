//! `kmem --census` and `-p`: all pages counted by use, and struct pages one a line.

use super::usage;
use crate::addr::Pfn;
use crate::bytes::ByteSize;
use crate::command::page::{line, pages_to_bytes};
use crate::command::{CommandError, Context, Output, printable};
use crate::kernel::page::about::Pages;
use crate::kernel::page::census::Census;
use serde_json::{Map, Value, json};
use std::fmt::Write;

/// Lines shown at most, unless asked for more.
const LINES: u64 = 64;
/// As many as 1 GiB has: an answer is built before any of it is shown, and this one takes 1 GB.
const LINES_MAX: u64 = 1 << 18;

pub fn census(context: &Context<'_>) -> Result<Output, CommandError> {
    let kernel = context.kernel()?;
    let map = kernel.page_map()?;
    let census = Census::take(kernel, map);
    let mut text = format!("{:<15} {:>10} {:>11} {:>10}\n", "kind", "pages", "bytes", "tails");
    let mut kinds = Map::new();
    for &(kind, pages, tails) in census.kinds.iter().filter(|(_, pages, _)| *pages > 0) {
        let bytes = ByteSize(pages_to_bytes(pages)).to_string();
        let _ = writeln!(text, "{:<15} {pages:>10} {bytes:>11} {tails:>10}", kind.name());
        kinds.insert(kind.name().into(), json!({ "pages": pages, "tails": tails }));
    }
    let total = census.total();
    let _ = writeln!(text, "{:<15} {total:>10} {:>11}", "all", ByteSize(pages_to_bytes(total)).to_string());
    let mut flags = Map::new();
    let _ = writeln!(text, "\n{:<15} {:>10}", "flag", "pages");
    for (bit, names) in map.flags.all() {
        let pages = census.flags.get(bit as usize).copied().unwrap_or(0);
        flags.extend(names.iter().map(|name| (name.clone(), json!(pages))));
        if pages > 0 {
            let _ = writeln!(text, "{:<15} {pages:>10}", printable(&names.join("|")));
        }
    }
    if census.unreadable > 0 {
        let _ = writeln!(
            text,
            "of these {} could not be read: their struct pages are not there",
            census.unreadable
        );
    }
    if census.hwpoison > 0 {
        let _ = writeln!(text, "of these {} were hit by a memory error", census.hwpoison);
    }
    for problem in &census.problems {
        let _ = writeln!(text, "damage: {}", printable(problem));
    }
    let json = json!({
        "kinds": Value::Object(kinds), "flags": Value::Object(flags), "total": total, "unreadable": census.unreadable, "hwpoison": census.hwpoison,
        "problems": census.problems,
    });
    Ok(Output { text, json })
}

pub fn list(context: &Context<'_>, range: &[&str]) -> Result<Output, CommandError> {
    let kernel = context.kernel()?;
    let map = kernel.page_map()?;
    let hex = |text: &str| u64::from_str_radix(text.strip_prefix("0x").unwrap_or(text), 16).ok();
    let bad =
        || usage(&format!("-p takes a page frame number in hexadecimal, and a count up to {LINES_MAX}"));
    let first_of_all = map.sections.first().map_or(0, |section| section.start.0);
    let (first, count) = match range {
        [] => (first_of_all, LINES),
        [pfn] => (hex(pfn).ok_or_else(bad)?, LINES),
        [pfn, count] => {
            let count = count.parse().ok().filter(|n| (1..=LINES_MAX).contains(n)).ok_or_else(bad)?;
            (hex(pfn).ok_or_else(bad)?, count)
        }
        _ => return Err(bad()),
    };
    let pages = Pages::new(kernel, map);
    let (mut text, mut json) = (String::new(), Vec::new());
    for pfn in (first..first.saturating_add(count)).map(Pfn) {
        match pages.about(pfn) {
            Ok(about) => {
                let _ = writeln!(text, "{}", printable(&line(&about)));
                json.push(json!({
                    "page": format!("{}", about.at), "pfn": pfn.0, "kind": about.kind.name(), "refcount": about.raw.refcount,
                    "mapcount": about.mapcount.map(|count| count.page), "flags": format!("{:#x}", about.raw.flags),
                    "flag_names": about.flags, "index": about.index,
                    "mapping": format!("{:#x}", about.head.mapping),
                }));
            }
            Err(error) => {
                let _ = writeln!(text, "pfn {pfn}: {error}");
                json.push(json!({ "pfn": pfn.0, "error": error.to_string() }));
            }
        }
    }
    Ok(Output { text, json: Value::Array(json) })
}
