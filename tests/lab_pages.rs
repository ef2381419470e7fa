//! Real kernels: pages, slabs, zones and page tables against what the guest said of itself.
//!
//! Truth is what the guest's programs planted, `/proc/kpageflags` and its kin, `/proc/zoneinfo`, `/proc/meminfo`,
//! `/proc/slabinfo` and `/proc/vmallocinfo`; never kstub.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

#[path = "lab_pages/counts.rs"]
mod counts;
mod support;

use kstub::addr::{Pfn, PhysAddr, VirtAddr};
use kstub::backend::{Backend, Dump};
use kstub::command::{self, Context, Focus, Form};
use kstub::debuginfo::find::Places;
use kstub::kernel::page::about::About;
use kstub::kernel::page::census::{each_page, for_each_section};
use kstub::kernel::page::kind::{Kind, Marks};
use kstub::kernel::page::mapping::Held;
use kstub::kernel::page::users;
use kstub::kernel::slab::ObjectState;
use kstub::kernel::{Kernel, Machine, Options};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use support::damaged::Damaged;
use support::lab::{self, DumpFile, Set};

fn machine_of(backend: Arc<dyn Backend>, dump: &DumpFile) -> Machine {
    let beside = dump.path.parent().map(Path::to_owned);
    let options =
        Options { vmlinux: None, places: Places { beside, ..Places::default() }, ..Options::default() };
    Machine::open(backend, &options, &|_, _| ()).unwrap()
}

fn open(dump: &DumpFile) -> Machine {
    machine_of(
        Arc::new(Dump::open(&dump.path).unwrap_or_else(|e| panic!("{}: {e}", dump.path.display()))),
        dump,
    )
}

/// One dump of each set that holds all of memory, and `filtered`: one whose user pages were left out.
fn for_each_set(filtered: bool, check: &mut dyn FnMut(&Set, &DumpFile, &Machine, &str)) {
    for set in lab::sets().unwrap_or_default() {
        // After a kexec the facts are the second kernel's, and after a panic they are older still; both do.
        let readable = |d: &DumpFile| !matches!(d.compression.as_deref(), Some("lzo" | "snappy"));
        let level = |d: &DumpFile| d.filter_level.is_some_and(|level| level != 0);
        let wanted = |d: &DumpFile| {
            readable(d) && d.complete && d.split.is_empty() && !d.paging && level(d) == filtered
        };
        let Some(dump) = set.dumps().into_iter().find(wanted) else { continue };
        let what = format!("{}/{}", set.name(), dump.name);
        eprintln!("{what}");
        check(&set, &dump, &open(&dump), &what);
    }
}

fn fact(set: &Set, file: &str) -> Option<String> {
    std::fs::read_to_string(set.dir.join("facts").join(file)).ok()
}

fn hex(text: &str) -> u64 {
    u64::from_str_radix(text.trim_start_matches("0x"), 16).unwrap_or_else(|_| panic!("{text}"))
}

/// The `key=value` words of each line that begins with `word`.
fn lines(set: &Set, file: &str, word: &str) -> Vec<BTreeMap<String, String>> {
    let text = fact(set, file).unwrap_or_default();
    let wanted =
        text.lines().filter_map(|line| line.strip_prefix(word)?.strip_prefix(' ').map(str::to_owned));
    wanted
        .map(|line| {
            line.split_whitespace()
                .filter_map(|w| w.split_once('='))
                .map(|(k, v)| (k.into(), v.into()))
                .collect()
        })
        .collect()
}

fn json(machine: &Machine, line: &str) -> Value {
    let focus = Focus::default();
    let context = Context { machine, cpu: machine.first_cpu(), focus: &focus, task: None, form: Form::Both };
    command::run(&context, line).unwrap_or_else(|e| panic!("{line}: {e}")).json
}

/// Bits of `/proc/kpageflags` (`include/uapi/linux/kernel-page-flags.h`).
mod kpf {
    pub const DIRTY: u64 = 1 << 4;
    pub const LRU: u64 = 1 << 5;
    pub const SLAB: u64 = 1 << 7;
    pub const BUDDY: u64 = 1 << 10;
    pub const ANON: u64 = 1 << 12;
    pub const SWAPCACHE: u64 = 1 << 13;
    pub const SWAPBACKED: u64 = 1 << 14;
    pub const HEAD: u64 = 1 << 15;
    pub const TAIL: u64 = 1 << 16;
    pub const HUGE: u64 = 1 << 17;
    pub const UNEVICTABLE: u64 = 1 << 18;
    /// Bits of pages that someone has.
    pub const ANY_USE: u64 = SLAB | ANON | HEAD | TAIL | HUGE | LRU | PGTABLE;
    pub const NOPAGE: u64 = 1 << 20;
    pub const KSM: u64 = 1 << 21;
    pub const ZERO: u64 = 1 << 24;
    pub const PGTABLE: u64 = 1 << 26;
    pub const RESERVED: u64 = 1 << 32;
    pub const MLOCKED: u64 = 1 << 33;
}

/// What the guest planted on its pages, one after the other.
#[test]
fn every_planted_page_is_known() {
    let mut kinds = BTreeMap::<String, usize>::new();
    for_each_set(false, &mut |set, _, machine, what| {
        let kernel = machine.kernel().unwrap();
        let map = kernel.page_map().unwrap();
        let Some(planted) = set.planted("pages.txt") else { return };
        let (pid, child): (i32, i32) = (planted["pid"].parse().unwrap(), planted["child"].parse().unwrap());
        let files: BTreeMap<String, String> = lines(set, "planted/pages.txt", "file")
            .iter()
            .map(|f| (f["kind"].clone(), f["path"].clone()))
            .collect();
        for page in lines(set, "planted/pages.txt", "page") {
            let (kind, at, pfn) = (page["kind"].as_str(), hex(&page["virtual"]), Pfn(hex(&page["pfn"])));
            let what = format!("{what}: {kind} page {pfn} at {at:#x}");
            let about = About::new(kernel, map, pfn).unwrap_or_else(|e| panic!("{what}: {e}"));
            *kinds.entry(kind.to_owned()).or_default() += 1;
            assert_eq!(about.problems, Vec::<String>::new(), "{what}");
            let wanted: &[Kind] = match kind {
                "anon" | "anon-shared-with-child" | "mlocked" => &[Kind::Anon],
                "anon-thp" => &[Kind::AnonLarge],
                "file-clean" => &[Kind::File],
                "file-dirty" => &[Kind::FileDirty],
                "hugetlb" => &[Kind::HugeTlb],
                "ksm" | "ksm-copy" => &[Kind::Ksm],
                "shmem" => &[Kind::Shmem],
                "swapcache" => &[Kind::SwapCache],
                "zero" | "zero-huge" => &[Kind::Zero],
                other => panic!("{what}: the lab plants {other}, which this test does not know"),
            };
            assert!(wanted.contains(&about.kind), "{what}: {:?}", about.kind);
            if about.kind == Kind::Zero {
                continue;
            }
            // Who maps it, and where; and not the page next to it.
            let find = |pfn: Pfn| {
                let about = About::new(kernel, map, pfn).unwrap();
                users::of(kernel, &about.mapping, &about.indexes(), PhysAddr(about.phys()))
            };
            let users = find(pfn);
            assert_eq!(users.problems, Vec::<String>::new(), "{what}");
            let by = |who: i32| {
                let theirs = |user: &&users::User| user.tasks.iter().any(|(pid, _)| *pid == who);
                users.users.iter().filter(theirs).map(|user| user.address.0).collect::<Vec<_>>()
            };
            assert!(by(pid).contains(&at), "{what}: {users:x?}");
            assert_eq!(by(child).contains(&at), kind == "anon-shared-with-child", "{what}: {users:x?}");
            let neighbour = find(Pfn(pfn.0 + 1));
            assert!(
                neighbour
                    .users
                    .iter()
                    .all(|user| user.address.0 != at || user.tasks.iter().all(|(p, _)| *p != pid)),
                "{what}: {neighbour:x?}"
            );
            // How often, as /proc/kpagecount says.
            let count: i64 = page["kpagecount"].parse().unwrap();
            assert_eq!(about.mapcount.unwrap().page, count, "{what}");
            assert_eq!(users.users.len() as i64, count, "{what}: {users:x?}");
            let memcg: u64 = page["memcg"].parse().unwrap();
            // Before v6.3 the kernel said nothing of tails.
            if memcg != 0 {
                let known = about.memcg.as_ref().unwrap_or_else(|| panic!("{what}: no memcg"));
                // The number in the file is the directory's inode, of which the kernel keeps 64 bits.
                assert_eq!(known.ino.map(|ino| ino & 0xffff_ffff), Some(memcg), "{what}: {known:?}");
            }
            flags_agree(&about, hex(&page["kpageflags"]), &what);
            if let Some(path) = files.get(kind) {
                let file = about.file.as_ref().unwrap();
                let (fs, name) = (file.fs.as_deref(), file.path.as_deref().unwrap());
                assert_eq!(fs, Some("ext4"), "{what}");
                assert!(path.ends_with(name) && name.len() > 8, "{what}: {name}");
            }
            if matches!(about.kind, Kind::File | Kind::FileDirty | Kind::Shmem) {
                assert_eq!(about.held, Some(Held::This), "{what}");
            }
        }
    });
    assert!(lab::sets().is_none() || kinds.len() >= 12, "{kinds:?}");
}

/// The flags' names against the guest's own, bit by bit.
fn flags_agree(about: &About<'_>, flags: u64, what: &str) {
    let set = |name: &str| about.flags.iter().any(|flag| flag == name);
    let is_tail = about.compound.is_some_and(|compound| compound.index > 0);
    assert_eq!(is_tail, flags & kpf::TAIL != 0, "{what}");
    assert_eq!(about.compound.is_some_and(|compound| compound.index == 0), flags & kpf::HEAD != 0, "{what}");
    assert_eq!(about.kind == Kind::HugeTlb, flags & kpf::HUGE != 0, "{what}");
    if is_tail {
        let shown = about.flags.iter().all(|flag| flag == "hwpoison" || flag == "anon_exclusive");
        assert!(shown, "{what}: {:?}", about.flags);
        return;
    }
    // Being dirty, referenced or on a list may have changed since; these may not.
    for (bit, name) in [
        (kpf::SWAPBACKED, "swapbacked"),
        (kpf::MLOCKED, "mlocked"),
        (kpf::UNEVICTABLE, "unevictable"),
        (kpf::RESERVED, "reserved"),
        (kpf::SWAPCACHE, "swapcache"),
    ] {
        assert_eq!(set(name), flags & bit != 0, "{what}: {name} in {:?}, {flags:#x}", about.flags);
    }
    // A dirty page may have been written since; a clean one is not touched any more.
    assert!(set("dirty") || flags & kpf::DIRTY == 0 || about.kind == Kind::File, "{what}: {:?}", about.flags);
    for alias in ["checked", "reported", "savepinned", "pinned", "slab", "error"] {
        assert!(!set(alias), "{what}: {alias} in {:?}", about.flags);
    }
}

/// Every page of the machine against the kernel's own census.
#[test]
fn every_page_is_what_kpageflags_says() {
    let mut machines = 0;
    for_each_set(false, &mut |set, _, machine, what| {
        let Ok(bytes) = std::fs::read(set.dir.join("facts/proc/kpageflags")) else { return };
        let truth: Vec<u64> =
            bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().unwrap())).collect();
        let kernel = machine.kernel().unwrap();
        let map = kernel.page_map().unwrap();
        let marks = Marks::new(kernel, map);
        let pages: Vec<(Pfn, Option<Kind>, u64, bool)> = for_each_section(kernel, map, |section| {
            let mut pages = Vec::new();
            each_page(kernel, section, &marks, |pfn, raw, kind, tail| {
                pages.push((pfn, kind, raw.flags, tail))
            });
            pages
        })
        .into_iter()
        .flatten()
        .collect();
        machines += 1;
        // KSM: 6.12 sets it on every anonymous page.
        let ksm_is_told =
            truth.iter().filter(|&&flags| flags & kpf::KSM != 0).all(|flags| flags & kpf::ANON != 0)
                && truth.iter().filter(|&&flags| flags & kpf::KSM != 0).count() < 200;
        let compare = |shift: usize| {
            let mut differ = BTreeMap::<&str, (u64, u64)>::new();
            let mut note = |name, ours: bool, theirs: bool| {
                let entry = differ.entry(name).or_default();
                entry.0 += u64::from(ours != theirs);
                entry.1 += u64::from(theirs);
            };
            for (pfn, kind, flags, tail) in &pages {
                let Some(&told) = truth.get(pfn.0 as usize + shift).filter(|&&told| told & kpf::NOPAGE == 0)
                else {
                    continue;
                };
                let kind = kind.unwrap();
                let is = |bit| told & bit != 0;
                // The guest went on: some pages were freed, others taken. (Free on a CPU's list shows as unknown.)
                let is_free = matches!(kind, Kind::Free | Kind::Unknown);
                note("moved", is_free && told & kpf::ANY_USE != 0, is(kpf::BUDDY) && kind != Kind::Free);
                if is_free || is(kpf::BUDDY) {
                    continue;
                }
                note("tail", *tail, is(kpf::TAIL));
                note(
                    "reserved",
                    flags & map.flags.mask("reserved") != 0 && !tail && kind != Kind::Free,
                    is(kpf::RESERVED),
                );
                note("page-table", kind == Kind::PageTable, is(kpf::PGTABLE));
                note("hugetlb", kind == Kind::HugeTlb, is(kpf::HUGE));
                if !tail {
                    note("slab", kind == Kind::Slab, is(kpf::SLAB));
                    let anon = matches!(kind, Kind::Anon | Kind::AnonLarge | Kind::Ksm | Kind::SwapCache);
                    // A page of tmpfs in the swap cache is not; and 6.12 says it of slabs.
                    if !matches!(kind, Kind::HugeTlb | Kind::SwapCache | Kind::Slab) {
                        note("anon", anon, is(kpf::ANON));
                    }
                    let shmem =
                        is(kpf::SWAPBACKED) && !is(kpf::ANON) && !is(kpf::HUGE) && !is(kpf::SWAPCACHE);
                    note("shmem", kind == Kind::Shmem, shmem && is(kpf::LRU | kpf::UNEVICTABLE));
                    if ksm_is_told {
                        note("ksm", kind == Kind::Ksm, is(kpf::KSM));
                    }
                }
            }
            differ
        };
        let right = compare(0);
        eprintln!("  {right:?}");
        assert!(
            right["slab"].1 > 500 && right["anon"].1 > 100 && right["tail"].1 > 1000,
            "{what}: {right:?}"
        );
        // Some were freed and taken for something else; what moves is whole blocks of the buddy system, of up to 1024
        // pages each, so that it is compared with all there are. The program that made the record has ended since, and one
        // or two more, each with some dozen page tables and pages of its own.
        for (name, (differ, told)) in &right {
            let slack = match *name {
                "moved" => 20 + pages.len() as u64 / 50,
                "page-table" | "anon" | "tail" => 60 + told / 50,
                _ => 20 + told / 50,
            };
            assert!(*differ <= slack, "{what}: {name}: {differ} of {told} differ");
        }
        // Mutation check: of every page's neighbour it is not true.
        let wrong = compare(1);
        let sum = |all: &BTreeMap<&str, (u64, u64)>| -> u64 {
            all.iter().filter(|(name, _)| **name != "moved").map(|(_, (differ, _))| differ).sum()
        };
        assert!(sum(&wrong) > 3 * sum(&right) + 500, "{what}: {wrong:?}, right {right:?}");
        let zero =
            truth.iter().position(|flags| flags & kpf::ZERO != 0 && flags & kpf::RESERVED != 0).unwrap();
        assert_eq!(About::new(kernel, map, Pfn(zero as u64)).unwrap().kind, Kind::Zero, "{what}");
    });
    assert!(lab::sets().is_none() || machines > 0, "no set has kpageflags");
}

#[test]
fn planted_user_memory_is_where_the_guest_says() {
    for_each_set(false, &mut |set, _, machine, what| {
        let planted = set.planted("memory.txt").unwrap();
        let pid = &planted["pid"];
        let maps = fact(set, &format!("proc/{pid}/maps")).unwrap();
        let mut seen = BTreeSet::new();
        for page in lines(set, "planted/memory.txt", "page") {
            let (at, phys) = (hex(&page["virtual"]), hex(&page["physical"]));
            let answer = json(machine, &format!("vtop -c {pid} {at:x}"));
            let walk = &answer[0];
            let told = walk["physical"].as_str().map_or(0, hex);
            assert_eq!(told, phys, "{what}: {} at {at:#x}: {walk}", page["name"]);
            let area = maps.lines().find(|line| {
                let (start, end) = line.split_whitespace().next().unwrap().split_once('-').unwrap();
                (hex(start)..hex(end)).contains(&at)
            });
            let words: Vec<&str> = area
                .unwrap_or_else(|| panic!("{what}: {at:#x} in no line of maps"))
                .split_whitespace()
                .collect();
            let (start, end) = words[0].split_once('-').unwrap();
            let vma = &walk["vma"];
            assert_eq!(hex(vma["start"].as_str().unwrap()), hex(start), "{what}: {walk}");
            assert_eq!(hex(vma["end"].as_str().unwrap()), hex(end), "{what}: {walk}");
            assert_eq!(vma["permissions"].as_str(), Some(words[1]), "{what}: {walk}");
            let last = walk["steps"].as_array().unwrap().last().unwrap();
            let flags: Vec<&str> =
                last["flags"].as_array().unwrap().iter().map(|f| f.as_str().unwrap()).collect();
            match page["name"].as_str() {
                "protnone" => assert_eq!(flags, ["PROTNONE"], "{what}"),
                "untouched" => assert_eq!((told, flags.len()), (0, 0), "{what}"),
                name => {
                    assert!(flags.contains(&"PRESENT") && flags.contains(&"USER"), "{what}: {flags:?}");
                    let large = name == "hugetlb" || name == "transparent-huge";
                    assert_eq!(flags.contains(&"PSE"), large, "{what}: {name} {flags:?}");
                    assert_eq!(
                        walk["page_size"].as_u64(),
                        Some(if large { 2 << 20 } else { 4096 }),
                        "{what}"
                    );
                }
            }
            seen.insert(page["name"].clone());
        }
        assert!(seen.len() >= 6, "{what}: {seen:?}");
        // Mutation check: another process has something else there.
        let at = lines(set, "planted/memory.txt", "page")[0]["virtual"].clone();
        assert_ne!(
            json(machine, &format!("vtop -c 1 {at}"))[0]["physical"],
            json(machine, &format!("vtop -c {pid} {at}"))[0]["physical"],
            "{what}"
        );
    });
}

#[test]
fn swapped_pages_are_in_their_slots() {
    let mut checked = 0;
    for_each_set(false, &mut |set, _, machine, what| {
        let Some(planted) = set.planted("pages.txt") else { return };
        for page in lines(set, "planted/pages.txt", "swapped") {
            let walk = &json(machine, &format!("vtop -c {} {}", planted["pid"], page["virtual"]))[0];
            let number = |key: &str| page[key].parse::<u64>().unwrap();
            assert_eq!(walk["swap"]["area"].as_u64(), Some(number("type")), "{what}: {walk}");
            assert_eq!(walk["swap"]["offset"].as_u64(), Some(number("offset")), "{what}: {walk}");
            checked += 1;
        }
    });
    assert!(lab::sets().is_none() || checked > 0);
}

#[test]
fn planted_objects_are_allocated_and_freed() {
    let mut checked = (0, 0);
    for_each_set(false, &mut |set, _, machine, what| {
        let Some(planted) =
            set.planted("kstub_plant.txt").filter(|planted| planted.contains_key("slab.cache"))
        else {
            return;
        };
        let kernel = machine.kernel().unwrap();
        let map = kernel.page_map().unwrap();
        let cache = kernel.slab_cache(VirtAddr(hex(&planted["slab.cache"]))).unwrap();
        assert_eq!(cache.name, planted["slab.cache.name"], "{what}");
        assert_eq!(cache.object_size.to_string(), planted["slab.cache.object_size"], "{what}");
        let every = kernel.slab_pages(map);
        let walk = cache.walk(map, every.get(&cache.cache.at).map(Vec::as_slice));
        assert_eq!((walk.bad.as_slice(), walk.problems.as_slice()), (&[][..], &[][..]), "{what}");
        let objects = |prefix: &str| {
            let is_object =
                |key: &str| key.strip_prefix(prefix).is_some_and(|n| n.bytes().all(|b| b.is_ascii_digit()));
            planted.iter().filter(|(key, _)| is_object(key)).map(|(_, at)| hex(at)).collect::<Vec<_>>()
        };
        let (live, freed) = (objects("slab.live."), objects("slab.freed."));
        assert!(live.len() > 20 && freed.len() > 3, "{what}: {} {}", live.len(), freed.len());
        for &at in &live {
            assert_eq!(walk.state(VirtAddr(at)), ObjectState::Allocated, "{what}: {at:#x}");
            let found = &json(machine, &format!("kmem {:x}", at + 8))[0];
            assert_eq!(found["slab"]["cache"], planted["slab.cache.name"].as_str(), "{what}: {found}");
            assert_eq!(found["slab"]["object"].as_str().map(hex), Some(at), "{what}: {found}");
            assert_eq!(found["slab"]["state"], "allocated", "{what}: {found}");
            let page = &json(machine, &format!("page {:x}", at + 8))["object"];
            assert_eq!(page, &found["slab"], "{what}");
            assert_eq!(
                (page["object"].as_str().map(hex), page["offset"].as_i64()),
                (Some(at), Some(8)),
                "{what}"
            );
        }
        for &at in &freed {
            assert_ne!(walk.state(VirtAddr(at)), ObjectState::Allocated, "{what}: {at:#x}");
        }
        assert_eq!(walk.allocated(), live.len() as u64, "{what}");
        checked.0 += live.len();
        checked.1 += freed.len();
    });
    assert!(lab::sets().is_none() || checked.0 > 0 && checked.1 > 0);
}

#[test]
fn what_an_address_belongs_to() {
    for_each_set(false, &mut |set, _, machine, what| {
        let ask = |at: &str| json(machine, &format!("kmem {at}"))[0].clone();
        assert_eq!(ask("init_task")["symbol"]["name"], "init_task", "{what}");
        assert_eq!(ask("init_task")["task"]["pid"], 0, "{what}");
        let pid: i32 = set.planted("memory.txt").unwrap()["pid"].parse().unwrap();
        let task = machine.kernel().unwrap().find_task(pid).unwrap().unwrap();
        let of_task = ask(&format!("{:x}", task.at.0 + 64));
        assert_eq!(of_task["task"]["pid"], pid, "{what}: {of_task}");
        assert_eq!(of_task["slab"]["cache"], "task_struct", "{what}: {of_task}");
        assert_eq!(of_task["slab"]["object"].as_str().map(hex), Some(task.at.0), "{what}: {of_task}");
        let stack = ask(&format!("{:x}", task.get("stack").unwrap() + 0x100));
        assert_eq!(stack["stack_of"]["pid"], pid, "{what}: {stack}");
        assert_eq!(stack["page"]["kind"], "kernel-stack", "{what}: {stack}");
        let Some(planted) = set.planted("kstub_plant.txt") else { return };
        for cpu in 0..2u32 {
            let at = ask(&planted[&format!("percpu.dynamic.{cpu}.address")]);
            assert_eq!(at["percpu"]["cpu"].as_u64(), Some(cpu.into()), "{what}: {at}");
            assert_eq!(at["page"]["kind"], "percpu", "{what}: {at}");
        }
        let Some(start) = planted.get("vmalloc").map(|at| hex(at)) else { return };
        let found = ask(&format!("{start:x}"));
        assert_eq!(found["vmalloc"]["start"].as_str().map(hex), Some(start), "{what}: {found}");
        assert_eq!(found["page"]["kind"], "vmalloc", "{what}: {found}");
    });
}

/// Marks of include/linux/poison.h are named: that of compound pages' tails, and of what was freed with poisoning on.
#[test]
fn poison_is_named() {
    let mut checked = 0;
    for_each_set(false, &mut |set, _, machine, what| {
        let pages = set.planted("memory.txt").map(|_| lines(set, "planted/memory.txt", "page"));
        let pages = pages.unwrap_or_default();
        let Some(huge) = pages.iter().filter(|page| page["name"] == "transparent-huge").nth(5) else {
            return;
        };
        checked += 1;
        let page = json(machine, &format!("page phys:{}", huge["physical"].trim_start_matches("0x")));
        let at = hex(page["page"].as_str().unwrap());
        let words = |option: &str| json(machine, &format!("rd {option} {at:x} 8"));
        let (values, names) = (words("-S")["values"].clone(), words("-S")["symbols"].clone());
        let marked = values.as_array().unwrap().iter().position(|value| value == "0xdead000000000400");
        assert_eq!(names[marked.unwrap()], "TAIL_MAPPING", "{what}: {values} {names}");
        assert_eq!(words("-s")["symbols"][marked.unwrap()], Value::Null, "{what}");
    });
    assert!(lab::sets().is_none() || checked > 3);
}

/// A page that vmalloc has given out says where it is mapped, and for whom.
#[test]
fn pages_of_vmalloc_name_their_holders() {
    let mut checked = 0;
    for_each_set(false, &mut |set, _, machine, what| {
        let area = |page: &str| json(machine, &format!("page {page}"))["area"].clone();
        let pid: i32 = set.planted("memory.txt").unwrap()["pid"].parse().unwrap();
        let task = machine.kernel().unwrap().find_task(pid).unwrap().unwrap();
        let stack = task.get("stack").unwrap();
        let found = area(&format!("{:x}", stack + 0x1008));
        assert_eq!(found["stack_of"]["pid"], pid, "{what}: {found}");
        assert_eq!(found["at"].as_str().map(hex), Some(stack + 0x1000), "{what}: {found}");
        let Some(planted) = set.planted("kstub_plant.txt") else { return };
        let (module, start) = (&planted["module"], planted.get("vmalloc").map(|at| hex(at)));
        assert_eq!(area(module)["module"], "kstub_plant", "{what}");
        assert_eq!(area("init_task"), Value::Null, "{what}: the image is not of vmalloc");
        let Some(start) = start else { return };
        for page in 0.. {
            let Some(pfn) = planted.get(&format!("vmalloc.{page}.pfn")) else { break };
            let found = area(&format!("pfn:{}", pfn.trim_start_matches("0x")));
            assert_eq!(found["at"].as_str().map(hex), Some(start + 4096 * page), "{what}: {found}");
            assert_eq!(found["start"].as_str().map(hex), Some(start), "{what}: {found}");
            assert_eq!((&found["stack_of"], &found["module"]), (&Value::Null, &Value::Null), "{what}");
            checked += 1;
        }
    });
    assert!(lab::sets().is_none() || checked > 3);
}

fn phys(kernel: &Kernel, at: VirtAddr) -> u64 {
    kernel.found().space.translate(&**kernel.backend(), at).unwrap().phys.0
}

#[test]
fn a_broken_free_list_is_told_and_costs_only_itself() {
    let mut machines = 0;
    for_each_set(false, &mut |set, dump, machine, what| {
        if set.json["kind"] != "qemu" || dump.format != "elf" {
            return;
        }
        let kernel = machine.kernel().unwrap();
        let map = kernel.page_map().unwrap();
        let all = kernel.slab_caches().unwrap();
        // A slab with two free objects or more: the second is lost when the first one's pointer is broken.
        let (cache, before, victim) = all
            .caches
            .iter()
            .find_map(|cache| {
                let walk = cache.walk(map, None);
                let victim = walk.slabs.iter().find(|placed| placed.free >= 2)?.slab;
                Some((cache, walk, victim))
            })
            .unwrap_or_else(|| panic!("{what}: no slab has free objects"));
        let is_it = |row: &Value| row["at"].as_str().map(hex) == Some(cache.cache.at.0);
        let broken = cache.pointer_at(victim.freelist);
        let words = BTreeMap::from([(phys(kernel, broken), 0x4141_4141_4141_4141)]);
        let damaged = machine_of(Arc::new(Damaged { dump: Dump::open(&dump.path).unwrap(), words }), dump);
        let answer = json(&damaged, "kmem -s");
        let rows = answer["caches"].as_array().unwrap();
        let cache = rows.iter().find(|row| is_it(row)).unwrap();
        let bad = cache["bad_pointers"].as_array().unwrap();
        assert_eq!(bad.len(), 1, "{what}: {cache}");
        assert_eq!(bad[0]["slab"].as_str().map(hex), Some(victim.at.0), "{what}: {cache}");
        assert_eq!(bad[0]["object"].as_str().map(hex), Some(victim.freelist), "{what}: {cache}");
        assert_eq!(bad[0]["stored"].as_str().map(hex), Some(0x4141_4141_4141_4141), "{what}: {cache}");
        // The slab's own count is whole, so the cache's is.
        assert_eq!(cache["allocated"].as_u64(), Some(before.allocated()), "{what}");
        let others = rows.iter().filter(|row| !is_it(row));
        assert!(others.clone().count() > 60, "{what}");
        for other in others {
            assert_eq!(other["bad_pointers"], serde_json::json!([]), "{what}: {other}");
        }
        machines += 1;
    });
    assert!(lab::sets().is_none() || machines > 0);
}

#[test]
fn a_page_that_its_file_lost_is_told() {
    let mut machines = 0;
    for_each_set(false, &mut |set, dump, machine, what| {
        let Some(page) =
            lines(set, "planted/pages.txt", "page").into_iter().find(|page| page["kind"] == "file-clean")
        else {
            return;
        };
        if dump.format != "elf" {
            return;
        }
        let pfn = Pfn(hex(&page["pfn"]));
        let kernel = machine.kernel().unwrap();
        let map = kernel.page_map().unwrap();
        assert_eq!(About::new(kernel, map, pfn).unwrap().held, Some(Held::This), "{what}");
        // The index is moved by one, to where another page of the file is.
        let at = map.page(pfn).unwrap();
        let index = kernel.object("page", at).unwrap().either(&["__folio_index", "index"]).unwrap();
        let words = BTreeMap::from([(phys(kernel, index.at), index.u64().unwrap() + 1)]);
        let damaged = machine_of(Arc::new(Damaged { dump: Dump::open(&dump.path).unwrap(), words }), dump);
        let kernel = damaged.kernel().unwrap();
        let about = About::new(kernel, kernel.page_map().unwrap(), pfn).unwrap();
        assert!(matches!(about.held, Some(Held::Other(_))), "{what}: {:?}", about.held);
        machines += 1;
    });
    assert!(lab::sets().is_none() || machines > 0);
}
