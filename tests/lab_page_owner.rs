//! Who allocated and freed a page, on a kernel with page_owner (`scripts/lab small`).
//!
//! Truth is what the kernel itself said in `/sys/kernel/debug/page_owner` before the end, and which frames the guest's
//! first program had given back; never kstub.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod support;

use kstub::addr::{Pfn, VirtAddr};
use kstub::backend::{Backend, Dump};
use kstub::command::{self, Context, Focus, Form, Output};
use kstub::debuginfo::find::Places;
use kstub::kernel::{Kernel, Machine, Options};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use support::damaged::Damaged;
use support::lab;

/// One record of the kernel's file.
#[derive(Debug)]
struct Record {
    pfn: u64,
    order: u64,
    mask: String,
    /// `GFP_KERNEL|__GFP_ZERO`.
    flags: String,
    pid: i64,
    tgid: i64,
    comm: String,
    ts: u64,
    /// Newer kernels do not print it.
    free_ts: Option<u64>,
    /// `function+0x12`, innermost first.
    stack: Vec<String>,
}

fn between<'t>(text: &'t str, before: &str, after: &str) -> &'t str {
    let (_, rest) = text.split_once(before).unwrap_or_else(|| panic!("no {before:?} in {text:?}"));
    rest.split_once(after).unwrap_or_else(|| panic!("no {after:?} in {text:?}")).0
}

impl Record {
    fn parse(text: &str) -> Self {
        let line = text.lines().next().unwrap();
        let number = |before, after| between(text, before, after).parse::<u64>().unwrap();
        Self {
            pfn: match between(text, "\nPFN ", " ") {
                pfn if pfn.starts_with("0x") => u64::from_str_radix(&pfn[2..], 16).unwrap(),
                pfn => pfn.parse().unwrap(),
            },
            order: number("via order ", ","),
            mask: between(line, "mask ", "(").to_owned(),
            flags: between(line.split_once("mask ").unwrap().1, "(", ")").to_owned(),
            pid: number(" pid ", ",") as i64,
            tgid: number(" tgid ", " ") as i64,
            comm: between(line.split_once(" tgid ").unwrap().1, "(", "), ts ").to_owned(),
            ts: number(", ts ", " ns"),
            free_ts: line.contains("free_ts ").then(|| number("free_ts ", " ns")),
            stack: text
                .lines()
                .filter_map(|line| line.strip_prefix(' '))
                .map(|line| line.split('/').next().unwrap().to_owned())
                .collect(),
        }
    }

    /// Whether only the pages are not the same.
    fn says_the_same(&self, other: &Self) -> bool {
        let said = |record: &Self| {
            let (who, when) = ((record.pid, record.tgid, record.comm.clone()), (record.ts, record.free_ts));
            (who, when, record.order, record.mask.clone(), record.stack.clone())
        };
        said(self) == said(other)
    }

    /// Whether this `page_owner` of a page says the same.
    fn check(&self, owner: &Value) -> Result<(), String> {
        let same = [
            owner["tracked"] == true,
            owner["allocated"] == true,
            owner["order"] == self.order,
            owner["gfp_mask"] == self.mask,
            owner["pid"] == self.pid,
            owner["tgid"] == self.tgid,
            owner["comm"] == self.comm,
            owner["ts_ns"] == self.ts,
            self.free_ts.is_none_or(|free_ts| owner["free_ts_ns"] == free_ts),
            symbols(&owner["stack"]) == self.stack,
        ];
        // What has a name of its own is named; the others are sets of them.
        let named = |names: &[Value]| {
            let single =
                self.flags.split('|').filter(|name| name.starts_with("__GFP_") && *name != "__GFP_RECLAIM");
            single.into_iter().all(|name| names.iter().any(|known| known == name))
        };
        if !owner["gfp_names"].as_array().is_none_or(|names| named(names)) {
            return Err(format!("{}: {owner:#}", self.flags));
        }
        if same.iter().all(|&same| same) { Ok(()) } else { Err(format!("{same:?}: {self:#?}: {owner:#}")) }
    }
}

fn symbols(stack: &Value) -> Vec<String> {
    let frames = stack.as_array().map(Vec::as_slice).unwrap_or_default();
    frames.iter().map(|frame| frame["symbol"].as_str().unwrap_or("?").to_owned()).collect()
}

/// The records, each page once.
fn records(dir: &Path) -> Vec<Record> {
    let text = std::fs::read_to_string(dir.join("page_owner.txt")).unwrap();
    let mut all: Vec<Record> = text.split("Page allocated ").skip(1).map(Record::parse).collect();
    all.dedup_by_key(|record| record.pfn);
    all
}

fn freed(dir: &Path) -> Vec<u64> {
    let text = std::fs::read_to_string(dir.join("freed.txt")).unwrap();
    text.lines().map(|line| line.parse().unwrap()).collect()
}

/// Small kernels with page_owner; none if lab tests are to be skipped or it was not made, which is then said.
fn kernels() -> Vec<PathBuf> {
    if lab::sets().is_none() {
        return Vec::new();
    }
    let small = lab::root().join("small");
    let all = std::fs::read_dir(&small).into_iter().flatten().map(|entry| entry.unwrap().path());
    let found: Vec<PathBuf> = all.filter(|dir| dir.join("page_owner.txt").exists()).collect();
    if found.is_empty() {
        eprintln!(
            "skipped: no kernel with page_owner in {}; make it with scripts/lab small",
            small.display()
        );
    }
    found
}

fn dump_of(dir: &Path) -> Dump {
    Dump::open(&dir.join("dump.elf")).unwrap()
}

fn open(backend: Arc<dyn Backend>, beside: Option<&Path>) -> Machine {
    let places = Places { beside: beside.map(Path::to_owned), ..Places::default() };
    let options = Options { vmlinux: None, places, ..Options::default() };
    Machine::open(backend, &options, &|_, _| ()).unwrap()
}

/// With DWARF, and with what the kernel has in its own memory.
fn machines(dir: &Path) -> [(String, Machine); 2] {
    [true, false].map(|with_vmlinux| {
        let machine = open(Arc::new(dump_of(dir)), with_vmlinux.then_some(dir));
        assert_eq!(machine.vmlinux().is_some(), with_vmlinux);
        (format!("{}, with vmlinux: {with_vmlinux}", dir.display()), machine)
    })
}

fn run(machine: &Machine, line: &str) -> Output {
    let context =
        Context { machine, cpu: machine.first_cpu(), task: None, focus: &Focus::default(), form: Form::Both };
    command::run(&context, line).unwrap_or_else(|error| panic!("{line}: {error}"))
}

fn owner(machine: &Machine, pfn: u64) -> Value {
    run(machine, &format!("page pfn:{pfn:x}")).json["page_owner"].clone()
}

#[test]
fn records_are_the_kernels_own() {
    for dir in kernels() {
        let records = records(&dir);
        assert!(records.len() > 100, "{}", records.len());
        let last = records.iter().map(|record| record.ts).max().unwrap();
        for (what, machine) in machines(&dir) {
            let (mut same, mut other_than_next, mut with_free, mut large, mut named) = (0, 0, 0, 0, 0);
            for (i, record) in records.iter().enumerate() {
                let known = owner(&machine, record.pfn);
                // Some have gone, or gone to somebody else, between the file and the end.
                if known["allocated"] == false || known["ts_ns"].as_u64().unwrap() > last {
                    continue;
                }
                record.check(&known).unwrap_or_else(|why| panic!("{what}: {why}"));
                same += 1;
                with_free += usize::from(record.free_ts.is_some_and(|free_ts| free_ts != 0));
                named += usize::from(known["gfp_names"].as_array().is_some_and(|names| !names.is_empty()));
                large += usize::from(record.order > 0);
                // Early pages have all the same record; what differs from this one is not this page's.
                let Some(other) = records[i..].iter().find(|other| !other.says_the_same(record)) else {
                    continue;
                };
                assert!(other.check(&known).is_err(), "{what}: pfn {:#x} and {:#x}", record.pfn, other.pfn);
                other_than_next += usize::from(record.check(&owner(&machine, other.pfn)).is_err());
            }
            eprintln!(
                "{what}: {same} of {} records; {with_free} freed before, {large} large, {named} with names of flags",
                records.len()
            );
            assert!(same * 20 > records.len() * 19, "{what}: only {same} of {}", records.len());
            assert!(other_than_next > 100, "{what}: {other_than_next} pages differ from their next");
            assert!(large > 20, "{what}: {large} large");
            // The kernels that have names for the flags no longer print when a page was freed before.
            let prints_free = records.iter().any(|record| record.free_ts.is_some());
            let wanted =
                if prints_free { (with_free > 5, named == 0) } else { (with_free == 0, named > 100) };
            assert_eq!(wanted, (true, true), "{what}: {with_free} freed before, {named} with names");
        }
    }
}

#[test]
fn text_has_the_allocation_and_its_stack() {
    for dir in kernels() {
        let records = records(&dir);
        for (what, machine) in machines(&dir) {
            let stays = |record: &&Record| record.check(&owner(&machine, record.pfn)).is_ok();
            let record = records.iter().filter(|record| record.stack.len() > 4).find(stays).unwrap();
            let text = run(&machine, &format!("page pfn:{:x}", record.pfn)).text;
            let (_, shown) =
                text.split_once("  page_owner allocated: ").unwrap_or_else(|| panic!("{what}: {text}"));
            let first = shown.lines().next().unwrap();
            assert!(
                first.starts_with(&format!("order {}, gfp {}", record.order, record.mask)),
                "{what}: {text}"
            );
            let who =
                format!("pid {}, tgid {} ({}), ts {} ns", record.pid, record.tgid, record.comm, record.ts);
            assert!(first.ends_with(&who), "{what}: {text}");
            let stack: Vec<&str> = shown.lines().skip(1).take(record.stack.len()).map(str::trim).collect();
            assert_eq!(stack, record.stack, "{what}");
        }
    }
}

#[test]
fn freed_pages_say_where_they_were_freed() {
    for dir in kernels() {
        let frames = freed(&dir);
        let records = records(&dir);
        let has = |stack: &Value, name: &str| symbols(stack).iter().any(|symbol| symbol.contains(name));
        for (what, machine) in machines(&dir) {
            let knows_who_frees = machine.kernel().unwrap().has_member("page_owner", "free_pid");
            let known: Vec<Value> = frames.iter().map(|&pfn| owner(&machine, pfn)).collect();
            let free: Vec<&Value> = known.iter().filter(|owner| owner["allocated"] == false).collect();
            let munmapped = free.iter().filter(|owner| has(&owner["free_stack"], "munmap")).count();
            eprintln!("{what}: {} of {} still free, {munmapped} by munmap", free.len(), frames.len());
            assert!(munmapped * 2 > frames.len(), "{what}: {munmapped} of {}: {free:#?}", frames.len());
            for owner in free.iter().filter(|owner| has(&owner["free_stack"], "munmap")) {
                let who = (&owner["pid"], &owner["tgid"], &owner["comm"], &owner["order"]);
                assert_eq!(who, (&1.into(), &1.into(), &"init".into(), &0.into()), "{what}: {owner:#}");
                assert!(has(&owner["stack"], "handle_mm_fault"), "{what}: {owner:#}");
                let by = (&owner["free_pid"], &owner["free_tgid"]);
                let unknown = owner["free_pid"].is_null() && !knows_who_frees;
                assert!(unknown || by == (&1.into(), &1.into()), "{what}: {owner:#}");
                assert!(owner["free_ts_ns"].as_u64() > owner["ts_ns"].as_u64(), "{what}: {owner:#}");
            }
            // Pages of others were not freed there.
            let others = records.iter().map(|record| owner(&machine, record.pfn));
            let by_munmap = others.filter(|owner| has(&owner["free_stack"], "munmap")).count();
            assert!(by_munmap * 4 < records.len(), "{what}: {by_munmap}");
            let pfn = frames.iter().zip(&known).find(|(_, owner)| owner["allocated"] == false).unwrap().0;
            let text = run(&machine, &format!("page pfn:{pfn:x}")).text;
            let at = |what: &str| text.find(what).unwrap_or_else(|| panic!("no {what:?} in {text}"));
            assert!(at("  page_owner freed: ts ") < at("was allocated: order 0"), "{what}: {text}");
        }
    }
}

/// The image was never allocated, and the kernel does not list it.
#[test]
fn the_image_is_not_tracked() {
    for dir in kernels() {
        let records = records(&dir);
        for (what, machine) in machines(&dir) {
            let page = run(&machine, "page init_task");
            assert!(records.iter().all(|record| page.json["pfn"] != record.pfn), "{what}");
            assert_eq!(page.json["page_owner"], serde_json::json!({ "tracked": false }), "{what}");
            assert!(page.text.contains("  page_owner not tracked"), "{what}: {}", page.text);
        }
    }
}

/// Where the record of a stack lies, by the layouts of `lib/stackdepot.c` in v6.1 and v6.12: its pool's pointer, and
/// itself.
fn stack_record(kernel: &Kernel, handle: u64) -> (VirtAddr, VirtAddr) {
    let old = kernel.has_member("handle_parts", "slabindex");
    let (symbol, index, offset) = match old {
        true => ("stack_slabs", handle & 0xffff, handle >> 16 & 0x3ff),
        false => ("stack_pools", (handle & 0x1_ffff) - 1, handle >> 17 & 0x3ff),
    };
    let pointer = kernel.symbol(symbol).unwrap().wrapping_add(index * 8);
    (pointer, VirtAddr(kernel.read_u64(pointer).unwrap() + offset * 16))
}

#[test]
fn what_is_broken_is_told_and_costs_only_itself() {
    for dir in kernels() {
        let [(what, machine), _] = machines(&dir);
        let kernel = machine.kernel().unwrap();
        let stays = |record: &Record| record.check(&owner(&machine, record.pfn)).is_ok();
        let record = records(&dir).into_iter().filter(|record| record.stack.len() > 4).find(stays).unwrap();
        let page = format!("page pfn:{:x}", record.pfn);
        let whole = run(&machine, &page).json;

        let size = kernel.symbol("page_ext_size").unwrap();
        let operations = kernel.global("page_ext_operations", "page_owner_ops").unwrap();
        let offset = operations.member("offset").unwrap();
        let section = kernel.page_map().unwrap().section(Pfn(record.pfn)).unwrap().page_ext;
        let extension = VirtAddr(section.wrapping_add(kernel.read_u64(size).unwrap() * record.pfn));
        let kept = kernel.object("page_owner", extension.wrapping_add(offset.u64().unwrap())).unwrap();
        let handle = kept.member("handle").unwrap();
        let (pool, stack) = stack_record(kernel, handle.u64().unwrap());
        let count = kernel.object("stack_record", stack).unwrap().member("size").unwrap();
        assert_eq!(count.u64().unwrap(), record.stack.len() as u64, "{what}");

        let said = |at: VirtAddr, value: u64| {
            let space = kernel.found().space;
            let words = BTreeMap::from([(space.translate(&**kernel.backend(), at).unwrap().phys.0, value)]);
            let damaged = open(Arc::new(Damaged { dump: dump_of(&dir), words }), Some(dir.as_path()));
            let mut answer = run(&damaged, &page).json;
            let owner = answer["page_owner"].take();
            let mut others = whole.clone();
            others["page_owner"].take();
            assert_eq!(answer, others, "{what}: {at} {value:#x}");
            owner
        };
        let error = |value: &Value| value["error"].as_str().unwrap_or_default().to_owned();
        for value in [u64::MAX, 1 << 13] {
            assert!(error(&said(size, value)).contains("page_ext"), "{what}: size {value:#x}");
        }
        assert!(error(&said(offset.at, 1 << 40)).contains("page_ext"), "{what}");
        // The depot's error is in place of the stack, and the rest is as it was.
        // Sixteen bytes behind or before a record there is none.
        let beside = if kernel.has_member("handle_parts", "slabindex") { 1 << 16 } else { 1 << 17 };
        let handles = [u64::MAX, handle.u64().unwrap() ^ beside];
        let broken = [(pool, 0), (pool, 0x4141_4141_4141_4141), (count.at, u64::MAX), (count.at, 65)];
        for (at, value) in broken.into_iter().chain(handles.map(|value| (handle.at, value))) {
            let owner = said(at, value);
            assert!(error(&owner["stack"]).contains("stack"), "{what}: {at} {value:#x}: {owner:#}");
            assert_eq!((&owner["pid"], &owner["ts_ns"]), (&record.pid.into(), &record.ts.into()), "{what}");
        }
        // No flag, no record.
        assert_eq!(said(extension, 0), serde_json::json!({ "tracked": false }), "{what}");
    }
}
