//! `page`: what a page of memory is used for, and by whom.

use super::args::{self, Address};
use super::{Command, CommandError, Context, Output, printable};
use super::{expression, kmem, page_owner};
use crate::addr::{PAGE_SIZE, Pfn, PhysAddr, VirtAddr};
use crate::kernel::page::about::{About, Pages};
use crate::kernel::page::holder::{Holder, Holders};
use crate::kernel::page::mapping::{Held, Mapping};
use crate::kernel::page::page_owner::PageOwners;
use crate::kernel::page::users::{self, Users};
use crate::kernel::page::{Kind, PageMap};
use crate::kernel::{Kernel, Object};
use serde_json::{Value, json};
use std::fmt::Write;

pub const COMMAND: Command = Command {
    name: "page",
    arguments: "[-c PID] [-n COUNT] ADDR",
    summary: "what a page is used for, and by whom",
    help: "ADDR is a struct page (an address in the vmemmap, or page:ADDR), pfn:N, phys:ADDR, or any virtual address: \
           kernel (or an expression that points there: init_task.stack), or user of the task after -c (a pid or the address of its task_struct; else the task chosen with \
           'set' or running on the selected CPU). Numbers are hexadecimal; -n shows COUNT pages from there on, in \
           decimal.\n\n\
           Flags have one name each, by what the page is. A tail page shows its head's use; its own flags word holds \
           mostly other things. 'held' says what the page cache has at the page's index: this page, or something \
           else, which is damage. Of a slab 'object' is the object that ADDR lies in; of a page of vmalloc's, a \
           module's or a stack's 'vmalloc' is where it is mapped. Each user was looked up in the page tables. On a kernel with page_owner=on 'page_owner' \
           says who allocated the page or, if it is free, who freed it, and where.\n\n\
           Examples:\n  page $rdi\n  page pfn:3eb64\n  page phys:3bd7000\n  page -c 150 7f98b2864000\n  \
           page -n 5 0xffffea0000fad900\n",
    run,
};

const COUNT_MAX: u64 = 4096;

fn run(context: &Context<'_>, arguments: &[&str]) -> Result<Output, CommandError> {
    let kernel = context.kernel()?;
    let (mut task, mut count, mut wanted) = (None, 1, None);
    let mut words = arguments.iter();
    while let Some(&word) = words.next() {
        let mut value = || words.next().ok_or_else(|| usage(&format!("{word} needs a value")));
        match word {
            "-c" => task = Some(args::task(context, value()?)?),
            "-n" => {
                let text = value()?;
                let number = text.parse().ok().filter(|n| (1..=COUNT_MAX).contains(n));
                count = number.ok_or_else(|| usage(&format!("-n takes a number from 1 to {COUNT_MAX}")))?;
            }
            _ if word.starts_with('-') || wanted.is_some() => return Err(usage("it takes one address")),
            _ => wanted = Some(word),
        }
    }
    let wanted = wanted.ok_or_else(|| usage("which page?"))?;
    let map = kernel.page_map()?;
    let (first, inside) = find(context, map, wanted, task)?;
    let (mut text, mut json) = (String::new(), Vec::new());
    let pages = Pages::new(kernel, map);
    let owners = PageOwners::new(kernel, map);
    let holders = Holders::new(kernel, map);
    for i in 0..count {
        let about = pages.about(Pfn(first.0.saturating_add(i)))?;
        let users = users::of(kernel, &about.mapping, &about.indexes(), PhysAddr(about.phys()));
        if i > 0 {
            text.push('\n');
        }
        let owner = page_owner::find(&owners, about.pfn);
        text.push_str(&render(kernel, map, &about, &users));
        let inside = inside.filter(|_| i == 0).map(|inside| map.direct(about.pfn).wrapping_add(inside));
        let object = about.slab.as_ref().zip(inside).map(|(slab, at)| kmem::slab::object(map, slab, at));
        if let Some((line, ..)) = &object {
            let _ = writeln!(text, "  {:<10} {}", "", printable(line));
        }
        let holder =
            matches!(about.kind, Kind::Stack | Kind::Vmalloc).then(|| holders.of(about.pfn)).flatten();
        let mut value = to_json(map, &about, &users);
        text.push_str(&holder.as_ref().map_or_else(String::new, held_by));
        text.push_str(&page_owner::render(kernel, owner.as_ref()));
        if let Some(members) = value.as_object_mut() {
            members.insert("object".to_owned(), object.map_or(Value::Null, |(_, json, _)| json));
            members.insert("area".to_owned(), holder.as_ref().map_or(Value::Null, held_by_json));
            members.insert("page_owner".to_owned(), page_owner::to_json(kernel, owner.as_ref()));
        }
        json.push(value);
    }
    let json = match json.pop() {
        Some(only) if json.is_empty() && count == 1 => only,
        Some(last) => {
            json.push(last);
            Value::Array(json)
        }
        None => Value::Null,
    };
    Ok(Output { text, json })
}

fn usage(what: &str) -> CommandError {
    CommandError(format!("page: {what}; try 'help page'"))
}

/// Whom a page of vmalloc's is for.
fn held_by(holder: &Holder<'_>) -> String {
    let mut text =
        format!("  {:<10} {} in the area {}-{}", "vmalloc", holder.at, holder.area.start, holder.area.end);
    if let Some(caller) = holder.area.caller() {
        let _ = write!(text, ", from {}", printable(&caller));
    }
    text.push('\n');
    if let Some((pid, comm)) = &holder.stack_of {
        let _ = writeln!(text, "  {:<10} of task {pid} ({})", "stack", printable(comm));
    }
    if let Some(module) = &holder.module {
        let _ = writeln!(text, "  {:<10} {}", "module", printable(module));
    }
    text
}

fn held_by_json(holder: &Holder<'_>) -> Value {
    let (start, end) = (holder.area.start.to_string(), holder.area.end.to_string());
    json!({
        "at": holder.at.to_string(),
        "start": start,
        "end": end,
        "caller": holder.area.caller(),
        "stack_of": holder.stack_of.as_ref().map(|(pid, comm)| json!({ "pid": pid, "comm": comm })),
        "module": holder.module,
    })
}

/// The page frame that the user means and, if he means a byte in it, which.
pub fn find(
    context: &Context<'_>,
    map: &PageMap,
    text: &str,
    task: Option<Object<'_>>,
) -> Result<(Pfn, Option<u64>), CommandError> {
    let number = |digits: &str| {
        u64::from_str_radix(digits.strip_prefix("0x").unwrap_or(digits), 16)
            .map_err(|_| CommandError(format!("'{}' is not a hexadecimal number", printable(digits))))
    };
    if let Some(pfn) = text.strip_prefix("pfn:") {
        return Ok((Pfn(number(pfn)?), None));
    }
    let (text, is_page) = match text.strip_prefix("page:") {
        Some(rest) => (rest, true),
        None => (text, false),
    };
    let at = match expression::place(context, text)? {
        Address::Physical(at) => return Ok((at.pfn(), Some(at.0 % PAGE_SIZE))),
        Address::Virtual(at) => at,
    };
    match map.pfn(at) {
        Some(pfn) => Ok((pfn, None)),
        None if is_page => Err(CommandError(format!("{at} is not the address of a struct page"))),
        None => Ok((physical(context, at, task)?.pfn(), Some(at.page_offset()))),
    }
}

/// Where a virtual address leads: kernel addresses through the kernel's tables, user addresses through the task's.
pub fn physical(
    context: &Context<'_>,
    at: VirtAddr,
    task: Option<Object<'_>>,
) -> Result<PhysAddr, CommandError> {
    let kernel = context.kernel()?;
    let space =
        if at.0 >> 63 == 1 { kernel.found().space } else { super::vtop::user_space(context, task)?.0 };
    match space.translate(&**kernel.backend(), at) {
        Ok(translation) => Ok(translation.phys),
        Err(error) => Err(CommandError(error.to_string())),
    }
}

/// One line for a page: what `vtop` and `kmem` show of it.
pub fn line(about: &About<'_>) -> String {
    let mut line = format!("page {}  pfn {}  {}", about.at, about.pfn, about.kind.name());
    if let Some(compound) = about.compound.filter(|compound| compound.index > 0) {
        let _ = write!(line, ", tail {} of {}", compound.index, compound.head);
    }
    if let Some(block) = about.block {
        let _ = write!(line, ", of the block from pfn {}", block.head);
    }
    let _ = write!(line, "  refcount {}", about.raw.refcount);
    if let Some(count) = about.mapcount {
        let _ = write!(line, "  mapcount {}", count.page);
    }
    let _ = write!(line, "  flags {:#x}", about.raw.flags);
    if !about.flags.is_empty() {
        let _ = write!(line, " {}", about.flags.join(","));
    }
    line
}

fn render(kernel: &Kernel, map: &PageMap, about: &About<'_>, users: &Users) -> String {
    let mut text = format!(
        "page {}  pfn {}  physical {:#x}  direct map {}\n",
        about.at,
        about.pfn,
        about.phys(),
        map.direct(about.pfn)
    );
    let mut row = |name: &str, value: String| {
        let _ = writeln!(text, "  {name:<10} {}", printable(&value));
    };
    row("kind", kind(about));
    let flags = if about.flags.is_empty() { "none".to_owned() } else { about.flags.join(" ") };
    row("flags", format!("{:#x}: {flags}", about.raw.flags));
    if !about.compound_flags.is_empty() {
        row("", format!("of the whole: {}", about.compound_flags.join(" ")));
    }
    if let Some((node, zone)) = &about.zone {
        row("zone", format!("{zone}, node {node}"));
    }
    row("counts", counts(about));
    if let Some(free) = about.free {
        row("free", free_block(kernel, about, free));
    } else if let Some(migratetype) = &about.migratetype {
        row("pageblock", migratetype.clone());
    }
    for (name, value) in mapping(about) {
        row(name, value);
    }
    if let Some(lru) = about.lru {
        let generation = about.generation.map_or(String::new(), |g| format!(", generation {g}"));
        row("lru", format!("{lru}{generation}"));
    }
    if let Some(memcg) = &about.memcg {
        let path = memcg.path.as_deref().unwrap_or("?");
        row("memcg", format!("{path} (mem_cgroup {})", memcg.at));
    }
    if let Some((cache, slab)) = &about.slab {
        row(
            "slab",
            format!(
                "{}, {} of {} objects in use or kept by a CPU, from {}",
                cache.name, slab.inuse, slab.objects, slab.base
            ),
        );
    }
    for user in &users.users {
        let tasks: Vec<String> = user.tasks.iter().map(|(pid, comm)| format!("{pid} ({comm})")).collect();
        let who = if tasks.is_empty() { "no task that is known".to_owned() } else { tasks.join(", ") };
        row("mapped at", format!("{} by {who}", user.address));
    }
    for problem in about.problems.iter().chain(&users.problems) {
        row("problem", problem.clone());
    }
    text
}

fn kind(about: &About<'_>) -> String {
    let mut text = about.kind.name().to_owned();
    if !about.types.is_empty() && about.types.iter().all(|ty| ty != about.kind.name()) {
        let _ = write!(text, " (type {})", about.types.join(", "));
    }
    match about.compound {
        Some(compound) if compound.index > 0 => {
            let _ = write!(
                text,
                ", tail {} of the {} pages from {} (pfn {})",
                compound.index,
                1u64 << compound.order.min(63),
                compound.head,
                compound.head_pfn
            );
        }
        Some(compound) => {
            let _ =
                write!(text, ", head of {} pages (order {})", 1u64 << compound.order.min(63), compound.order);
        }
        None => {}
    }
    if let Some(block) = about.block {
        let (number, count) = (about.pfn.0.wrapping_sub(block.head.0), 1u64 << block.order.min(63));
        let _ = write!(text, ", page {number} of {count} from pfn {} that are no compound page", block.head);
    }
    text
}

fn counts(about: &About<'_>) -> String {
    let mut text = format!("refcount {}", about.raw.refcount);
    if about.compound.is_some_and(|compound| compound.index > 0) {
        let _ = write!(text, " (its head's: {})", about.head.refcount);
    }
    if let Some(count) = about.mapcount {
        let _ = write!(text, ", mapcount {}", count.page);
        if let Some(entire) = count.entire {
            let _ = write!(text, " (the whole {entire} times");
            let _ = match count.total {
                Some(total) => write!(text, ", {total} entries in all)"),
                None => write!(text, ")"),
            };
        }
    }
    text
}

fn free_block(kernel: &Kernel, about: &About<'_>, free: crate::kernel::page::Free) -> String {
    let list = match free.cpu {
        Some(cpu) => format!("on the list of CPU {cpu}"),
        None => "in the buddy allocator".to_owned(),
    };
    let names = kernel.migratetypes();
    let of_list = free.migratetype.and_then(|number| names.get(number as usize).cloned());
    let ty = of_list.or_else(|| about.migratetype.clone()).unwrap_or_else(|| "?".into());
    format!("{list}, order {} from pfn {}, {ty}", free.order, free.head)
}

fn mapping(about: &About<'_>) -> Vec<(&'static str, String)> {
    let mut rows = Vec::new();
    let index = about.index.map_or(String::new(), |index| format!(", index {index:#x}"));
    match &about.mapping {
        Mapping::None if about.kind == Kind::Kernel && about.raw.mapping != 0 => {
            rows.push(("mapping", format!("{:#x}", about.raw.mapping)));
        }
        Mapping::None => {}
        Mapping::Anon(anon_vma) => rows.push(("mapping", format!("anon_vma {}{index}", anon_vma.at))),
        Mapping::Ksm(node) => rows.push(("mapping", format!("KSM node {node}"))),
        Mapping::Movable(ops) => rows.push(("mapping", format!("moved by {ops}"))),
        Mapping::File(space) => rows.push(("mapping", format!("address_space {}{index}", space.at))),
    }
    if let Some(file) = &about.file {
        let text = |value: &Option<String>| value.clone().unwrap_or_else(|| "?".into());
        let ino = file.ino.map_or("?".to_owned(), |ino| ino.to_string());
        rows.push((
            "file",
            format!(
                "{} on {} {}, inode {ino} at {}",
                text(&file.path),
                text(&file.fs),
                text(&file.device),
                file.inode
            ),
        ));
    }
    if let Some(held) = about.held {
        let said = match held {
            Held::This => "the page cache holds this page at its index".to_owned(),
            Held::Nothing => "NOT held: the page cache holds nothing at its index".to_owned(),
            Held::Other(other) => format!("NOT held: the page cache holds {other} at its index"),
            Held::Value(value) => format!("NOT held: the page cache holds the value {value:#x} at its index"),
        };
        rows.push(("held", said));
    }
    if let Some(swap) = about.swap {
        rows.push(("swap", format!("area {}, slot {:#x}", swap.area, swap.offset)));
    }
    rows
}

fn to_json(map: &PageMap, about: &About<'_>, users: &Users) -> Value {
    let hex = |n: u64| format!("{n:#x}");
    let held = about.held.map(|held| match held {
        Held::This => "this",
        Held::Nothing => "nothing",
        Held::Other(_) => "other",
        Held::Value(_) => "value",
    });
    let mapping = match &about.mapping {
        Mapping::None => ("none", None),
        Mapping::Anon(at) => ("anon", Some(at.at)),
        Mapping::Ksm(at) => ("ksm", Some(*at)),
        Mapping::Movable(at) => ("movable", Some(*at)),
        Mapping::File(at) => ("file", Some(at.at)),
    };
    let user = |user: &users::User| {
        let tasks = user.tasks.iter().map(|(pid, comm)| json!({ "pid": pid, "comm": comm }));
        json!({ "address": hex(user.address.0), "vma": hex(user.vma.0), "mm": hex(user.mm.0), "tasks": tasks.collect::<Vec<_>>() })
    };
    json!({
        "page": hex(about.at.0),
        "pfn": about.pfn.0,
        "physical": hex(about.phys()),
        "direct_map": hex(map.direct(about.pfn).0),
        "kind": about.kind.name(),
        "flags": hex(about.raw.flags),
        "flag_names": about.flags,
        "compound_flag_names": about.compound_flags,
        "types": about.types,
        "node": about.zone.as_ref().map(|(node, _)| *node),
        "zone": about.zone.as_ref().map(|(_, zone)| zone),
        "refcount": about.raw.refcount,
        "mapcount": about.mapcount.map(|count| json!({ "page": count.page, "entire": count.entire, "total": count.total })),
        "compound": about.compound.map(|c| json!({ "head": hex(c.head.0), "head_pfn": c.head_pfn.0, "order": c.order, "index": c.index })),
        "block": about.block.map(|block| json!({ "head_pfn": block.head.0, "order": block.order })),
        "free": about.free.map(|free| json!({ "head_pfn": free.head.0, "order": free.order, "cpu": free.cpu.map(|cpu| cpu.0) })),
        "migratetype": about.migratetype,
        "mapping": { "kind": mapping.0, "at": mapping.1.map(|at| hex(at.0)) },
        "index": about.index,
        "held": held,
        "file": about.file.as_ref().map(|file| json!({
            "inode": hex(file.inode.0), "ino": file.ino, "fs": file.fs, "device": file.device, "path": file.path,
        })),
        "swap": about.swap.map(|swap| json!({ "area": swap.area, "offset": swap.offset })),
        "lru": about.lru,
        "generation": about.generation,
        "memcg": about.memcg.as_ref().map(|memcg| json!({ "at": hex(memcg.at.0), "path": memcg.path, "ino": memcg.ino })),
        "slab": about.slab.as_ref().map(|(cache, slab)| json!({
            "cache": cache.name, "at": hex(cache.cache.at.0), "objects": slab.objects, "inuse": slab.inuse, "base": hex(slab.base.0),
        })),
        "users": users.users.iter().map(user).collect::<Vec<_>>(),
        "not_mapped_in": users.unmapped,
        "problems": about.problems.iter().chain(&users.problems).collect::<Vec<_>>(),
    })
}

/// Bytes as `vtop` and `kmem` give them.
pub fn pages_to_bytes(pages: u64) -> u64 {
    pages.saturating_mul(PAGE_SIZE)
}
