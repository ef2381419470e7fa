//! `kmem -z`, `-f` and `-F`: zones, and the free memory in them.

use crate::bytes::ByteSize;
use crate::command::page::pages_to_bytes;
use crate::command::{CommandError, Context, Output, printable};
use crate::kernel::zone::{FreeBlock, Zone};
use serde_json::{Map, Value, json};
use std::fmt::Write;

pub fn zones(context: &Context<'_>) -> Result<Output, CommandError> {
    let kernel = context.kernel()?;
    let (mut text, mut json) = (String::new(), Vec::new());
    for place in kernel.zones()? {
        let number = |path: &str| place.zone.get(path).ok();
        let watermark =
            |index: u64| place.zone.member("_watermark").and_then(|marks| marks.index(index)?.u64()).ok();
        let free = free_pages(&place);
        let rows = [
            ("start_pfn", number("zone_start_pfn")),
            ("spanned", number("spanned_pages")),
            ("present", number("present_pages")),
            ("managed", number("managed_pages")),
            ("free", free),
            ("watermark_min", watermark(0)),
            ("watermark_low", watermark(1)),
            ("watermark_high", watermark(2)),
            ("watermark_boost", number("watermark_boost")),
            ("reserved_highatomic", number("nr_reserved_highatomic")),
        ];
        let name = place.name();
        let _ = writeln!(
            text,
            "node {} zone {} {}  at {}",
            place.node,
            place.index,
            printable(&name),
            place.zone.at
        );
        let mut value = Map::new();
        value.insert("node".into(), json!(place.node));
        value.insert("index".into(), json!(place.index));
        value.insert("name".into(), json!(name));
        value.insert("at".into(), json!(format!("{}", place.zone.at)));
        for (row, number) in rows {
            value.insert(row.into(), json!(number));
            if let Some(number) = number {
                let bytes = if row == "start_pfn" {
                    String::new()
                } else {
                    format!("  {}", ByteSize(pages_to_bytes(number)))
                };
                let _ = writeln!(text, "  {row:>20} {number:>10}{bytes}");
            }
        }
        let mut counters = Map::new();
        let stat = place.zone.member("vm_stat");
        let count = stat.as_ref().map_or(0, |stat| stat.count().unwrap_or(0)).min(64);
        let names = kernel.enum_values("zone_stat_item");
        for index in 0..count {
            let value = stat.as_ref().ok().and_then(|stat| stat.index(index).ok()?.u64().ok());
            let named = names.iter().rev().find(|(_, known)| *known == index as i64).map(|(name, _)| name);
            if let (Some(value), Some(name)) = (value, named) {
                let _ = writeln!(text, "  {name:>32} {}", value as i64);
                counters.insert(name.clone(), json!(value as i64));
            }
        }
        value.insert("counters".into(), Value::Object(counters));
        json.push(Value::Object(value));
    }
    Ok(Output { text, json: Value::Array(json) })
}

/// Free pages by the free areas' own counts.
fn free_pages(place: &Zone<'_>) -> Option<u64> {
    let areas = place.zone.member("free_area").ok()?;
    let count = areas.count().ok()?.min(20);
    let of = |order: u64| Some(areas.index(order).ok()?.get("nr_free").ok()? << order);
    (0..count).map(of).try_fold(0u64, |sum, pages| Some(sum.saturating_add(pages?)))
}

pub fn free(context: &Context<'_>, every: bool) -> Result<Output, CommandError> {
    let kernel = context.kernel()?;
    let map = kernel.page_map()?;
    let names = kernel.migratetypes();
    let (mut text, mut json) = (String::new(), Vec::new());
    for place in kernel.zones()? {
        if place.zone.get("present_pages").is_ok_and(|pages| pages == 0) {
            continue;
        }
        let found = place.free_lists(map)?;
        let orders = place.zone.member("free_area")?.count()?.min(20) as u32;
        let zone = place.name();
        let total: u64 = found.blocks.iter().map(|block| 1 << block.order).sum();
        let _ = writeln!(
            text,
            "node {} zone {}: {total} pages free, {}",
            place.node,
            printable(&zone),
            ByteSize(pages_to_bytes(total))
        );
        let _ = writeln!(
            text,
            "  {:>5} {}",
            "order",
            names.iter().map(|name| format!("{name:>12}")).collect::<String>()
        );
        let mut by_order = Vec::new();
        let mut problems = found.problems;
        for order in 0..orders {
            let of = |ty: usize| {
                let on = |block: &&FreeBlock| block.order == order && block.migratetype == ty as u64;
                found.blocks.iter().filter(on).count() as u64
            };
            let counts: Vec<u64> = (0..names.len()).map(of).collect();
            let _ = writeln!(
                text,
                "  {order:>5} {}",
                counts.iter().map(|count| format!("{count:>12}")).collect::<String>()
            );
            let counted = place.zone.member("free_area")?.index(order.into())?.get("nr_free")?;
            let sum: u64 = counts.iter().sum();
            if sum != counted {
                problems.push(format!("order {order}: {counted} blocks are counted, {sum} are on the lists"));
            }
            by_order.push(json!({ "order": order, "nr_free": counted, "by_migratetype": counts }));
        }
        let mut cpus: Vec<_> = place.per_cpu_lists(map).into_iter().collect();
        cpus.sort_by_key(|(cpu, _)| *cpu);
        let mut per_cpu = Vec::new();
        for (cpu, lists) in &cpus {
            let pages: u64 = lists.blocks.iter().map(|block| 1 << block.order).sum();
            let count = place.per_cpu_pages(*cpu).and_then(|own| own.get("count")).ok();
            let _ = writeln!(text, "  CPU {cpu}: {pages} pages on its lists");
            if count.is_some_and(|count| count != pages) {
                problems.push(format!(
                    "CPU {cpu}: {} pages are counted, {pages} are on its lists",
                    count.unwrap_or(0)
                ));
            }
            problems.extend(lists.problems.iter().cloned());
            per_cpu.push(json!({ "cpu": cpu.0, "pages": pages, "count": count }));
        }
        let mut blocks = Vec::new();
        if every {
            let all = found.blocks.iter().map(|block| (None, block));
            let theirs = cpus
                .iter()
                .flat_map(|(cpu, lists)| lists.blocks.iter().map(move |block| (Some(*cpu), block)));
            for (cpu, block) in all.chain(theirs) {
                let ty = names.get(block.migratetype as usize).map_or("?", String::as_str);
                let list = cpu.map_or_else(|| "buddy".to_owned(), |cpu| format!("CPU {cpu}"));
                let _ = writeln!(
                    text,
                    "  pfn {:>12}  order {:>2}  {ty:<12} {list}",
                    block.pfn.to_string(),
                    block.order
                );
                blocks.push(json!({ "pfn": block.pfn.0, "order": block.order, "migratetype": ty, "cpu": cpu.map(|cpu| cpu.0) }));
            }
        }
        for problem in &problems {
            let _ = writeln!(text, "  damage: {}", printable(problem));
        }
        json.push(json!({
            "node": place.node, "zone": zone, "free": total, "migratetypes": names, "orders": by_order, "per_cpu": per_cpu,
            "blocks": if every { Value::Array(blocks) } else { Value::Null }, "problems": problems,
        }));
    }
    Ok(Output { text, json: Value::Array(json) })
}
