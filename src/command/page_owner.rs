//! What `page` shows of page_owner's record: text like `/sys/kernel/debug/page_owner`, and JSON.
//!
//! Finding and decoding the record is the kernel layer's. Source: `mm/page_owner.c` (`__dump_page_owner`).

use super::printable;
use crate::addr::{Pfn, VirtAddr};
use crate::kernel::page::page_owner::{PageOwner, PageOwners, Stack};
use crate::kernel::{Kernel, ObjectError};
use serde_json::{Value, json};
use std::fmt::Write;

/// What the kernel keeps of a page, and the names of the flags that it was allocated with.
pub struct Known {
    owner: PageOwner,
    gfp_names: Option<Vec<String>>,
}

/// What the kernel keeps of a page: `Ok(None)` if it does not track that page. Or why that is not known.
pub type Found = Result<Option<Known>, ObjectError>;

/// `None` on a kernel without page_owner.
pub fn find(owners: &Result<Option<PageOwners<'_>>, ObjectError>, pfn: Pfn) -> Option<Found> {
    let owners = match owners {
        Ok(owners) => owners.as_ref()?,
        Err(error) => return Some(Err(error.clone())),
    };
    let known = |owner: PageOwner| {
        let gfp_names = owner.gfp_mask.and_then(|mask| owners.gfp_names(mask));
        Known { owner, gfp_names }
    };
    Some(owners.of(pfn).map(|owner| owner.map(known)))
}

/// Rows of `page`; empty on a kernel without page_owner.
pub fn render(kernel: &Kernel, found: Option<&Found>) -> String {
    let mut text = String::new();
    let mut row = |name: &str, value: &str| {
        let _ = writeln!(text, "  {name:<10} {value}");
    };
    match found {
        None => {}
        Some(Err(error)) => row("page_owner", &printable(&error.to_string())),
        Some(Ok(None)) => row("page_owner", "not tracked: it was never allocated since page_owner began"),
        Some(Ok(Some(Known { owner, gfp_names }))) => {
            let allocation = allocation(owner, gfp_names.as_deref());
            if owner.allocated {
                row("page_owner", &format!("allocated: {allocation}"));
            } else {
                row("page_owner", &format!("freed: {}", release(owner)));
                lines(kernel, &owner.free_stack, &mut row);
                row("", &format!("was allocated: {allocation}"));
            }
            lines(kernel, &owner.stack, &mut row);
            if let Some(reason) = &owner.migrate_reason {
                row("", &format!("moved here: {}", printable(reason)));
            }
        }
    }
    text
}

fn number<T: ToString>(value: Option<T>) -> String {
    value.map_or("?".to_owned(), |value| value.to_string())
}

fn allocation(owner: &PageOwner, gfp_names: Option<&[String]>) -> String {
    let names = gfp_names.map_or(String::new(), |names| format!(" ({})", names.join("|")));
    format!(
        "order {}, gfp {}{names}, pid {}, tgid {} ({}), ts {} ns",
        number(owner.order),
        owner.gfp_mask.map_or("?".to_owned(), |mask| format!("{mask:#x}")),
        number(owner.pid),
        number(owner.tgid),
        printable(owner.comm.as_deref().unwrap_or("?")),
        number(owner.ts_nsec),
    )
}

fn release(owner: &PageOwner) -> String {
    let mut text = format!("ts {} ns", number(owner.free_ts_nsec));
    if let (Some(pid), Some(tgid)) = (owner.free_pid, owner.free_tgid) {
        let _ = write!(text, ", pid {pid}, tgid {tgid}");
    }
    text
}

fn symbol(kernel: &Kernel, at: VirtAddr) -> String {
    kernel.symbolize(at).map_or(at.to_string(), |symbol| symbol.to_string())
}

fn lines(kernel: &Kernel, stack: &Stack, row: &mut dyn FnMut(&str, &str)) {
    match stack {
        None => row("", "  no stack was kept"),
        Some(Err(error)) => row("", &format!("  its stack: {}", printable(&error.to_string()))),
        Some(Ok(stack)) => stack.iter().for_each(|&at| row("", &format!("  {}", symbol(kernel, at)))),
    }
}

/// The value of `page_owner`: null on a kernel without it.
pub fn to_json(kernel: &Kernel, found: Option<&Found>) -> Value {
    let Known { owner, gfp_names } = match found {
        None => return Value::Null,
        Some(Err(error)) => return json!({ "error": error.to_string() }),
        Some(Ok(None)) => return json!({ "tracked": false }),
        Some(Ok(Some(known))) => known,
    };
    let stack = |stack: &Stack| match stack {
        None => Value::Null,
        Some(Err(error)) => json!({ "error": error.to_string() }),
        Some(Ok(stack)) => {
            let frame = |&at: &VirtAddr| {
                let symbol = kernel.symbolize(at).map(|symbol| symbol.to_string());
                json!({ "address": format!("{:#x}", at.0), "symbol": symbol })
            };
            Value::Array(stack.iter().map(frame).collect())
        }
    };
    json!({
        "tracked": true,
        "allocated": owner.allocated,
        "order": owner.order,
        "gfp_mask": owner.gfp_mask.map(|mask| format!("{mask:#x}")),
        "gfp_names": gfp_names,
        "pid": owner.pid,
        "tgid": owner.tgid,
        "comm": owner.comm,
        "ts_ns": owner.ts_nsec,
        "free_ts_ns": owner.free_ts_nsec,
        "free_pid": owner.free_pid,
        "free_tgid": owner.free_tgid,
        "migrate_reason": owner.migrate_reason,
        "stack": stack(&owner.stack),
        "free_stack": stack(&owner.free_stack),
    })
}
