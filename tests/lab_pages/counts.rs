//! What the kernel counts of its memory, and what is counted in a dump.

use super::*;

#[test]
fn zones_are_those_of_zoneinfo() {
    for_each_set(false, &mut |set, _, machine, what| {
        let text = fact(set, "proc/zoneinfo").unwrap();
        let zones = json(machine, "kmem -z");
        let mut here: Option<&Value> = None;
        let mut compared = 0;
        for line in text.lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            if line.starts_with("Node") {
                let (node, name) = (words[1].trim_end_matches(','), words[3]);
                let same = |zone: &&Value| zone["name"] == name && zone["node"].as_u64() == node.parse().ok();
                here = Some(
                    zones.as_array().unwrap().iter().find(same).unwrap_or_else(|| panic!("{what}: {line}")),
                );
                continue;
            }
            let keys = [
                ("min", "watermark_min"),
                ("low", "watermark_low"),
                ("high", "watermark_high"),
                ("boost", "watermark_boost"),
                ("spanned", "spanned"),
                ("present", "present"),
                ("managed", "managed"),
                ("start_pfn:", "start_pfn"),
            ];
            // 'high' of a CPU's list has a colon, and pages free have two words.
            let [word, value] = words.as_slice() else { continue };
            if let (Some((_, key)), Some(zone)) = (keys.iter().find(|(told, _)| told == word), here) {
                // With a boost the marks that are shown are higher by it.
                let boost = if key.starts_with("watermark_") && *key != "watermark_boost" {
                    zone["watermark_boost"].as_u64().unwrap_or(0)
                } else {
                    0
                };
                assert_eq!(
                    zone[key].as_u64().map(|n| n + boost),
                    value.parse().ok(),
                    "{what}: {line} in {}",
                    zone["name"]
                );
                compared += 1;
            }
        }
        assert!(compared >= 14, "{what}: {compared}");
    });
}

#[test]
fn memory_by_use_is_that_of_meminfo() {
    for_each_set(false, &mut |set, _, machine, what| {
        let text = fact(set, "proc/meminfo").unwrap();
        let told: BTreeMap<&str, u64> = text
            .lines()
            .filter_map(|line| line.split_once(':'))
            .filter_map(|(name, rest)| Some((name, rest.split_whitespace().next()?.parse().ok()?)))
            .collect();
        let info = json(machine, "kmem -i");
        // (file, here, how far it may have moved in KiB)
        let rows = [
            ("MemTotal", "total", 0),
            ("SwapTotal", "swap_total", 0),
            ("CommitLimit", "commit_limit", 8),
            // A CPU may keep some thousand free pages to itself, which counts as used.
            ("MemFree", "free", 80 << 10),
            ("SwapFree", "swap_free", 512),
            ("SwapCached", "swap_cached", 256),
            ("Buffers", "buffers", 256),
            ("Shmem", "shmem", 24 << 10),
            ("Cached", "cached", 24 << 10),
            ("AnonPages", "anon", 4 << 10),
            ("Slab", "slab", 12 << 10),
            ("SUnreclaim", "slab_unreclaimable", 10 << 10),
            ("PageTables", "page_tables", 512),
            ("KernelStack", "kernel_stacks", 512),
            ("Committed_AS", "committed", 32 << 10),
        ];
        for (name, key, slack) in rows {
            let Some(&told) = told.get(name) else { continue };
            let found = info[key].as_u64().unwrap_or_else(|| panic!("{what}: {name}")) * 4;
            assert!(found.abs_diff(told) <= slack, "{what}: {name} is {told} kB, here {found}");
        }
        let pools = json(machine, "kmem -h");
        let pool = pools.as_array().unwrap().iter().find(|pool| pool["name"] == "hugepages-2048kB").unwrap();
        for (name, key) in
            [("HugePages_Total", "total"), ("HugePages_Free", "free"), ("HugePages_Rsvd", "reserved")]
        {
            assert_eq!(pool[key].as_u64(), told.get(name).copied(), "{what}: {name}");
        }
    });
}

/// Counters that only grow, and do by what is written down of the guest between the file and the dump.
const GROW: [&str; 9] = [
    "NR_DIRTIED",
    "NR_WRITTEN",
    "NR_FOLL_PIN_ACQUIRED",
    "NR_FOLL_PIN_RELEASED",
    "PGPGIN",
    "PGPGOUT",
    "PGALLOC_DMA32",
    "PGACTIVATE",
    "PGFAULT",
];

#[test]
fn free_lists_hold_what_is_counted() {
    for_each_set(false, &mut |set, _, machine, what| {
        let zones = json(machine, "kmem -F");
        let free = json(machine, "kmem --census")["kinds"]["free"]["pages"].as_u64().unwrap();
        let listed: u64 = zones.as_array().unwrap().iter().map(|zone| zone["free"].as_u64().unwrap()).sum();
        // CPU 2 may be in the middle of something; a panic stops it anywhere.
        assert!(
            free.abs_diff(listed) <= 64,
            "{what}: {free} pages are marked free, {listed} are on the lists"
        );
        let busy = set.json["panic"].is_object();
        for zone in zones.as_array().unwrap() {
            assert!(busy || zone["problems"].as_array().unwrap().is_empty(), "{what}: {}", zone["problems"]);
        }
        // Every counter that has a twin in vmstat was near that.
        let text = fact(set, "proc/vmstat").unwrap();
        let counters = json(machine, "kmem -V");
        let (mut near, mut all) = (0, 0);
        for line in text.lines() {
            let (name, told) = line.split_once(' ').unwrap();
            let name = name.to_uppercase();
            let value =
                ["zone", "node", "event"].iter().find_map(|group| counters[group][&name]["value"].as_i64());
            let Some(value) = value else { continue };
            let told: i64 = told.trim().parse().unwrap();
            if GROW.contains(&name.as_str()) {
                assert!(value >= told, "{what}: {name}: {told} then, {value} now");
                continue;
            }
            all += 1;
            let is_near = value.abs_diff(told) <= 500 + told.unsigned_abs() / 4;
            near += usize::from(is_near);
            if !is_near {
                eprintln!("  {name}: {told} then, {value} now");
            }
        }
        assert!(all > 60 && near * 10 >= all * 9, "{what}: {near} of {all} counters are near");
    });
}

#[test]
fn caches_are_those_of_slabinfo() {
    for_each_set(false, &mut |set, _, machine, what| {
        let text = fact(set, "proc/slabinfo").unwrap();
        let answer = json(machine, "kmem -s");
        let caches: BTreeMap<&str, &Value> =
            answer["caches"].as_array().unwrap().iter().map(|c| (c["name"].as_str().unwrap(), c)).collect();
        assert_eq!(answer["problems"], serde_json::json!([]), "{what}");
        let (mut same, mut all) = (0, 0);
        // Nobody touches the planted cache between the file and the dump.
        let planted = set.planted("kstub_plant.txt").and_then(|p| p.get("slab.cache.name").cloned());
        for line in text.lines().skip(2) {
            let words: Vec<&str> = line.split_whitespace().collect();
            let cache = caches.get(words[0]).unwrap_or_else(|| panic!("{what}: no cache {}", words[0]));
            let number = |i: usize| words[i].parse::<u64>().unwrap();
            // What slabinfo calls the object's size is the distance between objects.
            assert_eq!(cache["size"].as_u64(), Some(number(3)), "{what}: {line}");
            assert_eq!(cache["objects_per_slab"].as_u64(), Some(number(4)), "{what}: {line}");
            assert_eq!(cache["slab_bytes"].as_u64(), Some(number(5) * 4096), "{what}: {line}");
            assert_eq!(cache["bad_pointers"], serde_json::json!([]), "{what}: {line}");
            all += 1;
            let near = |told: u64, found: u64| found.abs_diff(told) <= 64 + told / 5;
            let (total, active) =
                (cache["total"].as_u64().unwrap(), cache["allocated_or_kept"].as_u64().unwrap());
            assert_eq!(
                cache["allocated"].as_u64().unwrap() + cache["kept"].as_u64().unwrap(),
                active,
                "{what}"
            );
            same += usize::from(near(number(2), total) && near(number(1), active));
            if planted.as_deref() == Some(words[0]) {
                assert_eq!((active, total), (number(1), number(2)), "{what}: {line}: {cache}");
            }
        }
        assert!(
            all > 60 && same * 20 >= all * 18,
            "{what}: {same} of {all} caches have about as many objects"
        );
        // A task_struct for every thread and every CPU but the first, whose is in the image.
        let tasks = json(machine, "kmem -s task_struct")["caches"][0]["allocated"].as_u64().unwrap() as usize;
        let known = machine.kernel().unwrap().tasks().unwrap().tasks.len();
        assert!(tasks + 1 >= known && tasks < known + 8, "{what}: {tasks} task_structs for {known} tasks");
    });
}

#[test]
fn areas_are_those_of_vmallocinfo() {
    for_each_set(false, &mut |set, _, machine, what| {
        let text = fact(set, "proc/vmallocinfo").unwrap();
        let answer = json(machine, "kmem -v");
        assert_eq!(answer["problems"], serde_json::json!([]), "{what}");
        // Addresses are hashed in the file: an area is told by its size, caller and pages.
        let mut found = BTreeMap::<(u64, String, Option<u64>), i64>::new();
        for area in answer["areas"].as_array().unwrap() {
            let caller = area["caller"].as_str().unwrap_or("");
            *found
                .entry((area["size"].as_u64().unwrap(), caller.to_owned(), area["pages"].as_u64()))
                .or_default() += 1;
        }
        let (mut all, mut missing) = (0, Vec::new());
        for line in text.lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            let (size, Some(caller)) = (words[1].parse::<u64>().unwrap(), words.get(2)) else { continue };
            // Areas in modules have callers that only modules' symbols name.
            if line.contains('[')
                || !caller.contains("+0x")
                || line.contains("unpurged")
                || line.contains("vm_map_ram")
            {
                continue;
            }
            let pages = words.iter().find_map(|word| word.strip_prefix("pages=")?.parse::<u64>().ok());
            let key = (size, caller.split('/').next().unwrap().to_owned(), pages);
            all += 1;
            match found.get_mut(&key) {
                Some(count) if *count > 0 => *count -= 1,
                _ => missing.push(line),
            }
        }
        assert!(
            all > 100 && missing.len() * 20 <= all,
            "{what}: {} of {all} are missing: {missing:#?}",
            missing.len()
        );
    });
}

/// The census and the list of all pages are two ways to the same.
#[test]
fn the_census_is_what_each_page_says() {
    let mut releases = BTreeSet::new();
    for_each_set(false, &mut |set, _, machine, what| {
        if !releases.insert(set.json["release"].to_string()) {
            return;
        }
        let map = machine.kernel().unwrap().page_map().unwrap();
        let census = json(machine, "kmem --census");
        let mut kinds = BTreeMap::<String, u64>::new();
        for section in &map.sections {
            for page in json(machine, &format!("kmem -p {:x} 32768", section.start.0)).as_array().unwrap() {
                *kinds.entry(page["kind"].as_str().unwrap().to_owned()).or_default() += 1;
            }
        }
        for (kind, told) in census["kinds"].as_object().unwrap() {
            assert_eq!(kinds.remove(kind), told["pages"].as_u64(), "{what}: {kind}");
        }
        assert!(kinds.is_empty(), "{what}: {kinds:?}");
        // What has no references and is not free is the rest of a block.
        assert_eq!(census["kinds"]["unknown"], Value::Null, "{what}: {census}");
    });
    assert!(lab::sets().is_none() || !releases.is_empty());
}

/// A dump that lacks user memory and free pages still has its struct pages.
#[test]
fn a_filtered_dump_has_its_census() {
    for_each_set(true, &mut |_, _, machine, what| {
        let census = json(machine, "kmem --census");
        assert_eq!(census["unreadable"], 0, "{what}: {census}");
        let pages = |kind: &str| census["kinds"][kind]["pages"].as_u64().unwrap_or(0);
        assert!(pages("free") > 1000 && pages("slab") > 1000 && pages("anon") > 10, "{what}: {census}");
    });
}
