//! What commands answer of pages, slabs, zones and page tables of real dumps, field by field against drgn and crash.
//!
//! Truth is made by `scripts/lab referee`: pages of every combination of flags, type, count and mapping that a dump
//! has, and of the kernel's own lists. A referee is not right by itself: [`KNOWN`] has its mistakes that were looked
//! into, each with its reason in the kernel's source.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

#[path = "lab_referee_pages/crash.rs"]
mod crash;
mod support;

use kstub::backend::Dump;
use kstub::command::{self, Context, Focus, Form};
use kstub::debuginfo::find::Places;
use kstub::kernel::{Machine, Options};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;
use std::sync::{Arc, OnceLock};
use support::lab::{self, Set};

/// Where a referee is wrong: what the case's name contains, what the row's name begins and ends with, and why.
const KNOWN: &[(&str, &str, &str, &str)] = &[
    // A panic stops the other CPUs and they are no longer online; drgn leaves out what they hold, memory has it still.
    ("zones: stopped", "", " global", "event counters of all CPUs that are possible"),
    ("objects: stopped", "", " allocated", "on the free list of a CPU that was stopped"),
    ("caches: stopped", "", " active", "on the free list of a CPU that was stopped"),
    // vm_memory_committed() adds up all CPUs' parts of the counter (about v5.9); crash takes the common part alone.
    ("crash", "memory committed", " pages", "the CPUs' parts are left out"),
];

/// A value by the name of the thing and of its property.
type Rows = BTreeMap<String, Value>;

/// One dump of a set as kstub opens it.
struct Case {
    name: String,
    /// `stopped` in front where CPUs were possible and not online.
    marked: String,
    set: Set,
    dump: String,
    machine: Machine,
}

fn cases() -> &'static [Case] {
    static CASES: OnceLock<Vec<Case>> = OnceLock::new();
    CASES.get_or_init(|| {
        let open = |set: Set| {
            let dump = set.dumps().first().unwrap().clone();
            let beside = dump.path.parent().map(std::path::Path::to_owned);
            let options = Options {
                vmlinux: None,
                places: Places { beside, ..Places::default() },
                ..Options::default()
            };
            let machine =
                Machine::open(Arc::new(Dump::open(&dump.path).unwrap()), &options, &|_, _| ()).unwrap();
            let kernel = machine.kernel().unwrap();
            let stopped = kernel.possible_cpus().into_iter().any(|cpu| kernel.is_online(cpu) == Some(false));
            let marked = format!("{}{}", if stopped { "stopped " } else { "" }, set.name());
            Case { name: set.name(), marked, set, dump: dump.name, machine }
        };
        lab::sets().unwrap_or_default().into_iter().map(open).collect()
    })
}

impl Case {
    /// What a referee says of the dump; `None` where it refuses it.
    fn referee(&self, who: &str) -> Option<Value> {
        let made = Command::new("scripts/lab")
            .args(["referee", &self.name, &self.dump, "--who", who])
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .output()
            .unwrap();
        assert!(made.status.success(), "{}: {}", self.name, String::from_utf8_lossy(&made.stderr));
        let facts: Value = serde_json::from_slice(&std::fs::read(self.facts(who)).unwrap()).unwrap();
        match &facts["refused"] {
            Value::Null => Some(facts),
            why => {
                eprintln!("{who}: {}: refused: {why}", self.name);
                None
            }
        }
    }

    fn facts(&self, who: &str) -> std::path::PathBuf {
        lab::root().join(format!("referee-cache/{}/{}.{who}.json", self.name, self.dump))
    }

    /// crash is slower than all else, so that nobody waits for it: its facts only where they are there.
    fn crash(&self) -> Option<Value> {
        if !self.facts("crash").exists() {
            eprintln!("crash: {}: not asked; scripts/lab referee {} --who crash", self.name, self.name);
            return None;
        }
        self.referee("crash")
    }

    fn try_ask(&self, line: &str) -> Result<Value, String> {
        let focus = Focus::default();
        let context = Context {
            machine: &self.machine,
            cpu: self.machine.first_cpu(),
            focus: &focus,
            task: None,
            form: Form::Both,
        };
        command::run(&context, line).map(|output| output.json).map_err(|error| error.to_string())
    }

    fn ask(&self, line: &str) -> Value {
        self.try_ask(line).unwrap_or_else(|error| panic!("{}: {line}: {error}", self.name))
    }
}

fn hex(text: &str) -> u64 {
    u64::from_str_radix(text.trim_start_matches("0x"), 16).unwrap_or_else(|e| panic!("{text}: {e}"))
}

fn hex_of(value: &Value) -> u64 {
    hex(text(value))
}

fn rows(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().unwrap_or_else(|| panic!("no rows: {value}")).iter()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_else(|| panic!("no text: {value}"))
}

/// An address however it is written; that of nothing is null.
fn at(value: &Value) -> Value {
    match value.as_str().map(hex) {
        None | Some(0) => Value::Null,
        Some(at) => json!(format!("{at:#x}")),
    }
}

fn put(rows: &mut Rows, thing: &str, properties: Value) {
    for (name, value) in properties.as_object().unwrap() {
        rows.insert(format!("{thing} {name}"), value.clone());
    }
}

/// The rows in which two sides differ, but for what is known of the referee.
fn differences(what: &str, ours: &Rows, theirs: &Rows) -> Vec<String> {
    let keys: BTreeSet<&String> = ours.keys().chain(theirs.keys()).collect();
    let known = |key: &str| {
        let matches = |(set, start, end, _): &(&str, &str, &str, &str)| {
            what.contains(set) && key.starts_with(start) && key.ends_with(end)
        };
        KNOWN.iter().any(matches)
    };
    let differ = keys.into_iter().filter(|key| ours.get(*key) != theirs.get(*key) && !known(key));
    let shown = |side: Option<&Value>| side.map_or("nothing".into(), Value::to_string);
    differ
        .map(|key| {
            format!("{what}: {key}: kstub {}, referee {}", shown(ours.get(key)), shown(theirs.get(key)))
        })
        .collect()
}

/// Each property's values moved on to the next thing, as answers about the next page or object would be.
fn moved_on(truth: &Rows) -> Rows {
    let mut by_property: BTreeMap<&str, Vec<&String>> = BTreeMap::new();
    for key in truth.keys() {
        by_property.entry(key.rsplit(' ').next().unwrap()).or_default().push(key);
    }
    let mut moved = Rows::new();
    for keys in by_property.values() {
        for (key, next) in keys.iter().zip(keys.iter().cycle().skip(1)) {
            moved.insert((*key).clone(), truth[*next].clone());
        }
    }
    moved
}

/// Compares a family of answers in every case, and checks that wrong ones would have been seen.
fn compare(family: &str, least: usize, sides: &dyn Fn(&Case) -> Option<(Rows, Rows)>) {
    let mut all = Vec::new();
    for case in cases() {
        let Some((ours, theirs)) = sides(case) else { continue };
        eprintln!("{family}: {}: {} rows", case.name, theirs.len());
        assert!(theirs.len() >= least, "{}: only {} rows", case.name, theirs.len());
        all.extend(differences(&format!("{family}: {}", case.marked), &ours, &theirs));
        let wrong = differences(&case.name, &moved_on(&ours), &theirs).len();
        assert!(wrong * 10 > theirs.len(), "{}: answers of another thing are not seen: {wrong}", case.name);
    }
    let shown: Vec<&String> = all.iter().take(60).collect();
    assert!(all.is_empty(), "{family}: {} differences: {shown:#?}", all.len());
}

/// The bits that kstub's names of flags stand for.
fn bits_of(names: &Value, is_slab: bool, facts: &Value) -> BTreeSet<u64> {
    let bit = |name: &Value| {
        // SLUB has own names for two bits: SL_partial and SL_pfmemalloc (mm/slab.h, before: SetPageSlabPfmemalloc and
        // slab_set_node_partial in mm/slub.c).
        let name = match (text(name), is_slab) {
            ("partial", true) => "workingset",
            ("pfmemalloc", true) => "active",
            (name, _) => name,
        };
        facts["flag_bits"][name].as_u64().unwrap_or_else(|| panic!("the kernel has no flag {name}"))
    };
    rows(names).map(bit).collect()
}

#[test]
fn pages_are_drgns() {
    compare("pages", 3000, &|case| {
        let facts = case.referee("pages")?;
        assert_eq!(facts["errors"], json!({}), "{}", case.name);
        let (mut ours, mut theirs) = (Rows::new(), Rows::new());
        let named: u64 = facts["flag_bits"]
            .as_object()
            .unwrap()
            .values()
            .map(|b| 1 << b.as_u64().unwrap())
            .fold(0, |a, b| a | b);
        for page in rows(&facts["pages"]) {
            let pfn = page["pfn"].as_u64().unwrap();
            let name = format!("page {pfn:#x}");
            let said = case.ask(&format!("page pfn:{pfn:x}"));
            assert_eq!(said["problems"], json!([]), "{}: {name}", case.name);
            let kind = text(&said["kind"]);
            let order = page["order"].as_u64().unwrap_or(0);
            let tail = page["head_pfn"] != page["pfn"];
            let mut put_both = |property: &str, of_us: Value, of_them: Value| {
                ours.insert(format!("{name} {property}"), of_us);
                theirs.insert(format!("{name} {property}"), of_them);
            };
            for same in ["page", "physical", "flags"] {
                put_both(same, at(&said[same]), at(&page[same]));
            }
            put_both("direct-map", at(&said["direct_map"]), at(&page["virtual"]));
            put_both("refcount", said["refcount"].clone(), page["refcount"].clone());
            let head = said["compound"]["head_pfn"].as_u64().unwrap_or(pfn);
            put_both("head", json!(head), page["head_pfn"].clone());
            put_both("order", json!(said["compound"]["order"].as_u64().unwrap_or(0)), json!(order));
            // A tail's flags word is its compound page's; drgn takes it for flags.
            if !tail {
                let flags = hex_of(&page["flags"]) & named;
                let set: BTreeSet<u64> = (0..64).filter(|bit| flags >> bit & 1 == 1).collect();
                put_both("bits", json!(bits_of(&said["flag_names"], kind == "slab", &facts)), json!(set));
            }
            if let (Some(mapped), 0) = (said["mapcount"]["page"].as_i64(), order) {
                put_both("mapcount", json!(mapped), json!(page["mapcount"].as_i64().unwrap() + 1));
            }
            if let (Some(entire), Some(of_them)) =
                (said["mapcount"]["entire"].as_i64(), page["entire_mapcount"].as_i64())
            {
                put_both("entire", json!(entire), json!(of_them));
            }
            // What lists say it is.
            let lists = page["lists"].as_object().unwrap();
            for (list, what) in lists {
                match list.as_str() {
                    "buddy" => put_both("free", json!([kind, said["free"]["order"]]), json!(["free", what])),
                    "pcp" => {
                        put_both("free", json!([kind, said["free"]["cpu"]]), json!(["free-per-cpu", what]))
                    }
                    "table" => put_both("kind", json!(kind), json!("page-table")),
                    "hugetlb" => put_both("kind", json!(kind), json!("hugetlb")),
                    "vmalloc" => put_both(
                        "kind",
                        json!(if kind == "kernel-stack" { "vmalloc" } else { kind }),
                        json!("vmalloc"),
                    ),
                    other => panic!("{other}"),
                }
            }
            let slab = page["slab"] == true;
            put_both("slab", json!(kind == "slab"), json!(slab));
            if slab {
                put_both(
                    "cache",
                    json!([said["slab"]["cache"], at(&said["slab"]["at"])]),
                    json!([page["cache"]["name"], at(&page["cache"]["cache"])]),
                );
            }
            // An LRU page's mapping; the index is of pages that have one.
            let mapping = hex_of(&page["mapping"]);
            let lru = rows(&page["flag_names"]).any(|flag| flag == "lru");
            if lru && !tail && lists.is_empty() {
                let (what, leads) = match mapping & 3 {
                    _ if mapping == 0 => ("none", 0),
                    0 => ("file", mapping),
                    1 => ("anon", mapping & !3),
                    3 => ("ksm", mapping & !3),
                    other => panic!("{name}: {other}"),
                };
                put_both(
                    "mapping",
                    json!([said["mapping"]["kind"], at(&said["mapping"]["at"])]),
                    json!([what, at(&json!(format!("{leads:#x}")))]),
                );
                if matches!(what, "anon" | "file") {
                    put_both("index", said["index"].clone(), page["index"].clone());
                }
                if let Some(file) = page["file"].as_object().filter(|file| file.contains_key("inode")) {
                    let of = |file: &Value| json!([at(&file["inode"]), file["ino"], file["fs"]]);
                    put_both(
                        "file",
                        of(&said["file"]),
                        json!([at(&file["inode"]), file["ino"], file["fstype"]]),
                    );
                }
            }
        }
        Some((ours, theirs))
    });
}

/// Pages whose use only their holders tell.
#[test]
fn pages_are_their_holders() {
    compare("holders", 300, &|case| {
        let facts = case.referee("pages")?;
        let (mut ours, mut theirs) = (Rows::new(), Rows::new());
        for (kind, pfns) in facts["holders"].as_object().unwrap() {
            for (i, pfn) in rows(pfns).enumerate() {
                // One of each holder after the other, so that the next row is about another kind.
                let name = format!("{i:04} page {:#x} kind", pfn.as_u64().unwrap());
                let said = case.ask(&format!("page pfn:{:x}", pfn.as_u64().unwrap()));
                theirs.insert(name.clone(), json!(kind));
                ours.insert(name, said["kind"].clone());
            }
        }
        Some((ours, theirs))
    });
}

#[test]
fn objects_of_slabs_are_drgns() {
    compare("objects", 400, &|case| {
        let facts = case.referee("pages")?;
        let (mut ours, mut theirs) = (Rows::new(), Rows::new());
        for object in rows(&facts["objects"]) {
            let name = text(&object["at"]);
            let said = &case.ask(&format!("kmem {name}"))[0]["slab"];
            // What was given to kfree_rcu() and waits in a CPU's rcu_free sheaf drgn does not look for.
            let allocated = said["state"] == "allocated" || text(&said["state"]).contains("waits for RCU");
            put(
                &mut theirs,
                name,
                json!({ "object": at(&object["object"]), "cache": object["cache"], "allocated": object["allocated"] }),
            );
            put(
                &mut ours,
                name,
                json!({ "object": at(&said["object"]), "cache": said["cache"], "allocated": allocated }),
            );
        }
        Some((ours, theirs))
    });
}

#[test]
fn zones_and_counters_are_drgns() {
    compare("zones", 150, &|case| {
        let facts = case.referee("pages")?;
        let (mut ours, mut theirs) = (Rows::new(), Rows::new());
        let names: Vec<String> =
            case.ask("kmem -z")[0]["counters"].as_object().unwrap().keys().cloned().collect();
        assert!(names.len() > 5, "{}", case.name);
        for (i, zone) in rows(&facts["zones"]).enumerate() {
            let name = format!("zone {}", text(&zone["name"]));
            let said = &case.ask("kmem -z")[i];
            let marks = ["watermark_min", "watermark_low", "watermark_high"].map(|mark| said[mark].clone());
            let free: u64 =
                rows(&zone["nr_free"]).enumerate().map(|(order, n)| n.as_u64().unwrap() << order).sum();
            for property in ["start_pfn", "spanned", "present", "managed"] {
                put(&mut theirs, &name, json!({ property: zone[property] }));
                put(&mut ours, &name, json!({ property: said[property] }));
            }
            put(
                &mut theirs,
                &name,
                json!({ "at": at(&zone["at"]), "watermarks": zone["watermarks"], "free": free }),
            );
            put(
                &mut ours,
                &name,
                json!({ "at": at(&said["at"]), "watermarks": marks, "free": said["free"] }),
            );
            let sum =
                |values: &mut dyn Iterator<Item = &Value>| values.map(|n| n.as_i64().unwrap()).sum::<i64>();
            put(&mut theirs, &name, json!({ "counters": sum(&mut rows(&zone["counters"])) }));
            put(
                &mut ours,
                &name,
                json!({ "counters": sum(&mut said["counters"].as_object().unwrap().values()) }),
            );
        }
        for zone in rows(&case.ask("kmem -f")) {
            let name = text(&zone["zone"]);
            let known = rows(&facts["zones"]).find(|known| known["name"] == name).unwrap();
            for (order, area) in rows(&zone["orders"]).enumerate() {
                let listed: u64 = rows(&area["by_migratetype"]).map(|n| n.as_u64().unwrap()).sum();
                put(
                    &mut ours,
                    &format!("zone {name} order {order}"),
                    json!({ "blocks": area["nr_free"], "listed": listed }),
                );
                put(
                    &mut theirs,
                    &format!("zone {name} order {order}"),
                    json!({ "blocks": known["nr_free"][order], "listed": known["nr_free"][order] }),
                );
            }
        }
        let counters = case.ask("kmem -V");
        for (group, known) in facts["counters"].as_object().unwrap() {
            for (name, value) in known.as_object().unwrap() {
                // An enumerator that stands for the same number as another (NR_LRU_BASE) is not a counter of its own.
                let Some(said) = counters[group].get(name) else { continue };
                let global = said["global"].as_i64().unwrap();
                // drgn shows what is below zero as zero, as the kernel does.
                put(&mut ours, name, json!({ "global": global.max(0) }));
                put(&mut theirs, name, json!({ "global": value }));
            }
        }
        Some((ours, theirs))
    });
}

#[test]
fn caches_are_drgns() {
    compare("caches", 300, &|case| {
        let facts = case.referee("drgn")?;
        let (mut ours, mut theirs) = (Rows::new(), Rows::new());
        for cache in rows(&facts["slabs"]) {
            let name = format!("{} {}", text(&cache["name"]), text(&cache["cache"]));
            put(
                &mut theirs,
                &name,
                json!({
                    "size": cache["size"], "object_size": cache["object_size"], "per_slab": cache["objects_per_slab"],
                    "slab_bytes": 4096u64 << cache["order"].as_u64().unwrap(), "slabs": cache["slabs"],
                    "total": cache["objects"], "active": cache["active"],
                }),
            );
        }
        for cache in rows(&case.ask("kmem -S")["caches"]) {
            let name = format!("{} {}", text(&cache["name"]), text(&cache["at"]));
            // drgn takes all of a CPU's slab for used but what is on the CPU's list; other CPUs may have freed objects
            // of it to the slab's own list (__slab_free() of a frozen slab), and crash counts those as free, too.
            let own = rows(&cache["slab_list"]).filter(|slab| {
                text(&slab["place"]).strip_prefix("cpu ").is_some_and(|cpu| !cpu.ends_with("partial"))
            });
            // Nor does it count what waits for RCU.
            let waiting = cache["waiting_for_rcu"].as_u64().unwrap();
            let own: u64 =
                own.map(|slab| slab["objects"].as_u64().unwrap() - slab["inuse"].as_u64().unwrap()).sum();
            put(
                &mut ours,
                &name,
                json!({
                    "size": cache["size"], "object_size": cache["object_size"], "per_slab": cache["objects_per_slab"],
                    "slab_bytes": cache["slab_bytes"], "slabs": cache["slabs"], "total": cache["total"],
                    "active": cache["allocated"].as_u64().unwrap() + own + waiting,
                }),
            );
        }
        Some((ours, theirs))
    });
}

/// vtop's answer: the physical address and the entry that maps it.
fn vtop(case: &Case, pid: &Value, address: &str) -> Value {
    let task = if pid.is_null() { "-k".to_owned() } else { format!("-u -c {pid}") };
    case.ask(&format!("vtop {task} {address}"))[0].clone()
}

/// drgn and crash do not follow PROT_NONE pages, whose present bit is clear; the program has said where it is.
fn unprotected(case: &Case, address: u64) -> Option<String> {
    let memory = std::fs::read_to_string(case.set.dir.join("facts/planted/memory.txt")).ok()?;
    let page = memory.lines().find_map(|line| line.strip_prefix("page name=protnone virtual="))?;
    let (start, physical) = page.split_once(" physical=")?;
    (hex(start) == address).then(|| physical.to_owned())
}

#[test]
fn addresses_lead_where_referees_say() {
    let mut by_crash = 0;
    compare("vtop", 150, &|case| {
        let facts = case.referee("drgn")?;
        let (mut ours, mut theirs) = (Rows::new(), Rows::new());
        let mut large = 0;
        for one in rows(&facts["translations"]) {
            let address = text(&one["virtual"]);
            let name = format!("{} {} {address}", text(&one["kind"]), one["pid"]);
            let said = vtop(case, &one["pid"], address);
            large += usize::from(said["page_size"].as_u64() > Some(4096) && !one["pid"].is_null());
            ours.insert(format!("{name} physical"), at(&said["physical"]));
            let known = unprotected(case, hex(address)).map_or_else(|| one["physical"].clone(), Value::from);
            theirs.insert(format!("{name} physical"), at(&known));
        }
        assert!(large > 0, "{}: no huge page of a user among them", case.name);
        Some((ours, theirs))
    });
    for case in cases() {
        let Some(facts) = case.crash() else { continue };
        let (mut ours, mut theirs) = (Rows::new(), Rows::new());
        for one in rows(&facts["translations"]) {
            let address = text(&one["virtual"]);
            let name = format!("{} {address} physical", one["pid"]);
            let known = unprotected(case, hex(address)).map_or_else(|| one["physical"].clone(), Value::from);
            theirs.insert(name.clone(), at(&known));
            ours.insert(name, at(&vtop(case, &one["pid"], address)["physical"]));
        }
        by_crash += theirs.len();
        let differ = differences(&format!("crash vtop: {}", case.name), &ours, &theirs);
        assert!(differ.is_empty(), "{} of {}: {differ:#?}", differ.len(), theirs.len());
        assert!(differences("", &moved_on(&ours), &theirs).len() * 10 > theirs.len(), "{}", case.name);
    }
    eprintln!("vtop: {by_crash} by crash");
}
