//! `kmem -i`, `-V` and `-h`: what the kernel's own counters say.

use crate::bytes::ByteSize;
use crate::command::page::pages_to_bytes;
use crate::command::{CommandError, Context, Output};
use crate::kernel::meminfo::HugePool;
use serde_json::{Map, Value, json};
use std::fmt::Write;

pub fn usage(context: &Context<'_>) -> Result<Output, CommandError> {
    let kernel = context.kernel()?;
    kernel.type_table()?;
    let info = kernel.meminfo();
    let used = info.total.zip(info.free).map(|(total, free)| total.saturating_sub(free));
    let slab = info.slab_reclaimable.zip(info.slab_unreclaimable).map(|(a, b)| a + b);
    let swap_used = info.swap_total.zip(info.swap_free).map(|(total, free)| total.saturating_sub(free));
    let huge: u64 = info.huge.iter().map(|pool| pool.total << pool.order.min(18)).sum();
    let huge_free: u64 = info.huge.iter().map(|pool| pool.free << pool.order.min(18)).sum();
    let rows = [
        ("total", info.total),
        ("free", info.free),
        ("used", used),
        ("shmem", info.shmem),
        ("buffers", info.buffers),
        ("cached", info.cached),
        ("anon", info.anon),
        ("mapped", info.mapped),
        ("dirty", info.dirty),
        ("writeback", info.writeback),
        ("slab", slab),
        ("slab_reclaimable", info.slab_reclaimable),
        ("slab_unreclaimable", info.slab_unreclaimable),
        ("page_tables", info.page_tables),
        ("kernel_stacks", info.kernel_stack_kb.map(|kb| kb / 4)),
        ("huge_total", Some(huge)),
        ("huge_free", Some(huge_free)),
        ("swap_total", info.swap_total),
        ("swap_used", swap_used),
        ("swap_free", info.swap_free),
        ("swap_cached", info.swap_cached),
        ("commit_limit", info.commit_limit),
        ("committed", info.committed),
    ];
    let mut text = format!("{:<19} {:>10} {:>11}  share\n", "", "pages", "bytes");
    let mut json = Map::new();
    for (name, pages) in rows {
        json.insert(name.into(), json!(pages));
        let of = match name {
            _ if name.starts_with("swap") => info.swap_total,
            "committed" => info.commit_limit,
            "total" | "commit_limit" => None,
            _ => info.total,
        };
        let _ = match pages {
            None => writeln!(text, "{name:<19} {:>10}", "not told"),
            Some(pages) => {
                let share = of.filter(|&of| of > 0 && name != "swap_total");
                let share =
                    share.map_or(String::new(), |of| format!("{:>5.1} %", pages as f64 * 100.0 / of as f64));
                writeln!(
                    text,
                    "{name:<19} {pages:>10} {:>11}{share:>9}",
                    ByteSize(pages_to_bytes(pages)).to_string()
                )
            }
        };
    }
    Ok(Output { text, json: Value::Object(json) })
}

pub fn counters(context: &Context<'_>) -> Result<Output, CommandError> {
    let kernel = context.kernel()?;
    kernel.type_table()?;
    let (mut text, mut json) = (String::new(), Map::new());
    for group in kernel.vm_counters() {
        let _ = writeln!(text, "{} counters:", group.group);
        let mut values = Map::new();
        for counter in &group.counters {
            let value = counter.global.wrapping_add(counter.pending);
            let pending = if counter.pending == 0 {
                String::new()
            } else {
                format!("  ({:+} pending)", counter.pending)
            };
            let _ = writeln!(text, "  {:>36} {value}{pending}", counter.name);
            values.insert(
                counter.name.clone(),
                json!({ "value": value, "global": counter.global, "pending": counter.pending }),
            );
        }
        json.insert(group.group.into(), Value::Object(values));
    }
    Ok(Output { text, json: Value::Object(json) })
}

pub fn hugetlb(context: &Context<'_>) -> Result<Output, CommandError> {
    let pools = context.kernel()?.hugetlb();
    if pools.is_empty() {
        return Ok(Output { text: "this kernel has no hugetlb pages\n".into(), json: json!([]) });
    }
    let mut text = format!(
        "{:<18} {:<22} {:>8} {:>8} {:>8} {:>8}\n",
        "hstate", "name", "total", "free", "reserved", "surplus"
    );
    for pool in &pools {
        let HugePool { at, name, total, free, reserved, surplus, .. } = pool;
        let at = at.to_string();
        let _ = writeln!(text, "{at:<18} {name:<22} {total:>8} {free:>8} {reserved:>8} {surplus:>8}");
    }
    let value = |pool: &HugePool| {
        json!({
            "hstate": format!("{}", pool.at), "name": pool.name, "order": pool.order, "total": pool.total,
            "free": pool.free, "reserved": pool.reserved, "surplus": pool.surplus,
        })
    };
    Ok(Output { text, json: pools.iter().map(value).collect() })
}
