//! `kmem -s` and `-S`: slab caches, their slabs and their free lists.

use crate::addr::VirtAddr;
use crate::bytes::ByteSize;
use crate::command::{CommandError, Context, Output, printable};
use crate::kernel::page::PageMap;
use crate::kernel::slab::{BadPointer, Cache, CacheWalk, ObjectState, Place, Slab};
use serde_json::{Value, json};
use std::fmt::Write;

pub fn caches(context: &Context<'_>, names: &[&str], slabs: bool) -> Result<Output, CommandError> {
    let kernel = context.kernel()?;
    let map = kernel.page_map()?;
    let all = kernel.slab_caches()?;
    let of_name = |cache: &&Cache<'_>| {
        let at = format!("{}", cache.cache.at);
        names.is_empty() || names.iter().any(|name| *name == cache.name || *name == at)
    };
    let wanted: Vec<&Cache<'_>> = all.caches.iter().filter(of_name).collect();
    if let Some(unknown) = names.iter().find(|name| {
        wanted.iter().all(|cache| cache.name != **name && format!("{}", cache.cache.at) != **name)
    }) {
        return Err(CommandError(format!(
            "there is no slab cache '{}'; 'kmem -s' lists them",
            printable(unknown)
        )));
    }
    let every = if slabs { kernel.slab_pages(map) } else { Default::default() };
    let mut text = heading();
    let mut json = Vec::new();
    let mut problems = all.problems.clone();
    for cache in wanted {
        let own = every.get(&cache.cache.at).map(Vec::as_slice).unwrap_or_default();
        let walk = cache.walk(map, slabs.then_some(own));
        text.push_str(&row(cache, &walk));
        if slabs && !names.is_empty() {
            text.push_str(&placed(cache, &walk));
        }
        for bad in &walk.bad {
            let _ = writeln!(text, "  {}", printable(&damage(cache, bad)));
        }
        problems.extend(walk.problems.iter().cloned());
        json.push(to_json(cache, &walk, slabs));
    }
    for problem in &problems {
        let _ = writeln!(text, "damage: {}", printable(problem));
    }
    Ok(Output { text, json: json!({ "caches": Value::Array(json), "problems": problems }) })
}

fn heading() -> String {
    format!(
        "{:<18} {:>7} {:>9} {:>7} {:>9} {:>7} {:>9}  name\n",
        "kmem_cache", "objsize", "allocated", "kept", "total", "slabs", "slab size"
    )
}

fn row(cache: &Cache<'_>, walk: &CacheWalk) -> String {
    format!(
        "{:<18} {:>7} {:>9} {:>7} {:>9} {:>7} {:>9}  {}\n",
        cache.cache.at.to_string(),
        cache.object_size,
        walk.allocated(),
        walk.kept(),
        walk.objects(),
        walk.slab_count(),
        ByteSize(4096 << cache.order).to_string(),
        printable(&cache.name)
    )
}

fn place(place: Place) -> String {
    match place {
        Place::Cpu(cpu) => format!("cpu {cpu}"),
        Place::CpuPartial(cpu) => format!("cpu {cpu} partial"),
        Place::Partial(node) => format!("node {node} partial"),
        Place::Full => "full".to_owned(),
    }
}

/// Every slab of a cache, with its objects: free ones in brackets, with whose they are.
fn placed(cache: &Cache<'_>, walk: &CacheWalk) -> String {
    let mut text = String::new();
    for placed in &walk.slabs {
        let slab = &placed.slab;
        let _ = writeln!(
            text,
            "  slab {}  memory {}  {}: {} objects, {} free{}",
            slab.at,
            slab.base,
            place(placed.place),
            slab.objects,
            placed.free,
            if placed.cpu_free > 0 {
                format!(", {} on the CPU's list", placed.cpu_free)
            } else {
                String::new()
            }
        );
        for (object, state) in objects(cache, walk, placed.slab) {
            let _ = match state {
                ObjectState::Allocated => writeln!(text, "    {object:#x}"),
                other => writeln!(text, "   [{object:#x}] {}", state_name(other)),
            };
        }
    }
    text
}

fn objects(cache: &Cache<'_>, walk: &CacheWalk, slab: crate::kernel::slab::Slab) -> Vec<(u64, ObjectState)> {
    let at = |index: u64| cache.object_at(&slab, slab.base.wrapping_add(index.wrapping_mul(cache.size)));
    (0..slab.objects).filter_map(at).map(|(_, object)| (object.0, walk.state(object))).collect()
}

/// The object of a slab that `at` (in the direct map) lies in: as a line, for JSON, and its address.
pub fn object(
    map: &PageMap,
    (cache, slab): &(Cache<'_>, Slab),
    at: VirtAddr,
) -> (String, Value, Option<VirtAddr>) {
    let Some((index, object)) = cache.object_at(slab, at) else {
        let json = json!({ "cache": cache.name, "object": null });
        return ("behind the last object".to_owned(), json, None);
    };
    let state = state_name(cache.walk(map, Some(&[slab.at])).state(object));
    let offset = at.0.wrapping_sub(object.0) as i64;
    let line = format!("object {object} (number {index} in its slab), {state}, offset {offset:#x}");
    let json = json!({ "cache": cache.name, "object": format!("{object}"), "index": index, "state": state, "offset": offset });
    (line, json, Some(object))
}

/// Whose free object it is, in words.
pub fn state_name(state: ObjectState) -> String {
    match state {
        ObjectState::Allocated => "allocated".to_owned(),
        ObjectState::Free => "free".to_owned(),
        ObjectState::FreeOnCpu(cpu) => format!("free, on the list of CPU {cpu}"),
        ObjectState::FreeInSheaf(Some(cpu)) => format!("free, in a sheaf of CPU {cpu}"),
        ObjectState::FreeInSheaf(None) => "free, in a sheaf of the node".to_owned(),
        ObjectState::FreeAfterRcu(cpu) => format!("freed, waits for RCU in a sheaf of CPU {cpu}"),
    }
}

fn damage(cache: &Cache<'_>, bad: &BadPointer) -> String {
    let whose = bad.cpu.map_or(String::new(), |cpu| format!(" of CPU {cpu}"));
    let held = match bad.object {
        Some(object) if cache.is_hardened() => {
            format!(
                "free object {object} holds {:#x}, which decodes to {:#x}, which",
                bad.stored, bad.decoded
            )
        }
        Some(object) => format!("free object {object} holds {:#x}, which", bad.stored),
        None => format!("its head {:#x}", bad.decoded),
    };
    format!(
        "invalid freepointer: {}: free list{whose} in the slab at {}: {held} {}",
        cache.name, bad.slab, bad.why
    )
}

fn to_json(cache: &Cache<'_>, walk: &CacheWalk, slabs: bool) -> Value {
    let bad = |bad: &BadPointer| {
        json!({
            "cpu": bad.cpu.map(|cpu| cpu.0), "slab": format!("{}", bad.slab), "object": bad.object.map(|at| format!("{at}")),
            "stored": format!("{:#x}", bad.stored), "decoded": format!("{:#x}", bad.decoded), "text": damage(cache, bad),
        })
    };
    let slab = |placed: &crate::kernel::slab::PlacedSlab| {
        let free = objects(cache, walk, placed.slab)
            .into_iter()
            .filter(|(_, state)| *state != ObjectState::Allocated);
        let free: Vec<Value> =
            free.map(|(at, state)| json!({ "at": format!("{at:#x}"), "state": state_name(state) })).collect();
        json!({
            "at": format!("{}", placed.slab.at), "memory": format!("{}", placed.slab.base), "place": place(placed.place),
            "objects": placed.slab.objects, "inuse": placed.slab.inuse, "free": free,
        })
    };
    json!({
        "at": format!("{}", cache.cache.at),
        "name": cache.name,
        "object_size": cache.object_size,
        "size": cache.size,
        "objects_per_slab": cache.per_slab,
        "slab_bytes": 4096u64 << cache.order,
        "allocated": walk.allocated(),
        "kept": walk.kept(),
        "waiting_for_rcu": walk.waiting(),
        "allocated_or_kept": walk.allocated_or_kept(),
        "total": walk.objects(),
        "slabs": walk.slab_count(),
        "slab_list": if slabs { Value::Array(walk.slabs.iter().map(slab).collect()) } else { Value::Null },
        "bad_pointers": walk.bad.iter().map(bad).collect::<Vec<_>>(),
    })
}
