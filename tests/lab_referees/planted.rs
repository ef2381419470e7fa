//! What the module planted in the guest, by its own words.

use super::*;

/// The numbers that the module said it planted.
fn planted(case: &Case) -> BTreeMap<String, String> {
    case.set.planted("kstub_plant.txt").unwrap()
}

/// Types of modules are in the dump where the kernel has BTF of modules; without a vmlinux there is no other source.
fn has_module_types(case: &Case) -> bool {
    !case.release().starts_with("5.10")
}

#[test]
fn planted_per_cpu_data_is_found() {
    for case in cases().iter().filter(|case| has_module_types(case)) {
        let what = &case.name;
        let planted = planted(case);
        let each = |expression: &str| case.ask(&format!("percpu -x {expression}"))["values"].clone();
        let value = each("kstub_percpu_value");
        let structure = each("kstub_percpu_struct");
        let dynamic = each(&format!("(u64 *){}", planted["percpu.dynamic"]));
        let mut compared = 0;
        for cpu in 0..case.set.json["smp"].as_u64().unwrap() as usize {
            let said = |key: &str| hex(&planted[&key.replace('#', &cpu.to_string())]);
            for (kind, ours) in [("value", &value), ("struct", &structure), ("dynamic", &dynamic)] {
                let one = &ours[cpu];
                assert_eq!(one["cpu"], cpu, "{what}");
                assert_eq!(
                    hex(text(&one["address"])),
                    said(&format!("percpu.{kind}.#.address")),
                    "{what}: {kind}"
                );
                let (number, key) = match kind {
                    "struct" => (&one["value"]["magic"], "percpu.struct.#.magic".to_owned()),
                    _ => (&one["value"], format!("percpu.{kind}.#")),
                };
                let number = number.as_u64().unwrap_or_else(|| hex(text(number)));
                assert_eq!(number, said(&key), "{what}: {kind} of CPU {cpu}");
                let next = (cpu + 1) % 4;
                assert_ne!(number, hex(&planted[&key.replace('#', &next.to_string())]), "{what}: CPU + 1");
                compared += 2;
            }
        }
        eprintln!("planted per-CPU data: {what}: {compared}");
        assert!(compared >= 24, "{what}");
    }
}

#[test]
fn planted_lists_are_walked_as_far_as_they_go() {
    // How many of the six entries are reached, and whether the break is said.
    const LISTS: [(&str, usize, Option<&str>); 6] = [
        ("good", 6, None),
        ("empty", 0, None),
        ("bad_prev", 6, None),
        ("cycle", 4, Some("circle")),
        ("poisoned", 3, Some("breaks off")),
        ("unmapped", 3, Some("breaks off")),
    ];
    for case in cases().iter().filter(|case| has_module_types(case)) {
        let what = &case.name;
        let planted = planted(case);
        for (name, count, problem) in LISTS {
            let head = &planted[&format!("list.{name}.head")];
            let said = |i: usize| hex(&planted[&format!("list.{name}.{i}")]);
            let walk =
                |offset: &str| case.ask(&format!("list -H {head} -o {offset} -s kstub_item.magic,number -x"));
            let ours = walk("kstub_item.list");
            let entries: Vec<u64> = rows(&ours["entries"]).map(|e| hex(text(&e["address"]))).collect();
            assert_eq!(entries, (0..count).map(said).collect::<Vec<_>>(), "{what}: {name}");
            for (i, entry) in rows(&ours["entries"]).enumerate() {
                let magic = &entry["value"]["magic"];
                let magic = magic.as_u64().unwrap_or_else(|| hex(text(magic)));
                assert_eq!(magic, hex(&planted[&format!("list.{name}.{i}.magic")]), "{what}: {name}");
            }
            match (ours["problem"].as_str(), problem) {
                (None, None) => {}
                (Some(ours), Some(problem)) if ours.contains(problem) => {}
                differ => panic!("{what}: {name}: {differ:?}"),
            }
            let shifted = walk("0");
            assert!(
                count == 0 || shifted["entries"] != ours["entries"],
                "{what}: another offset must differ"
            );
        }
        // Singly linked ones, from the last planted to the first.
        for (kind, member) in [("hlist", "hash"), ("llist", "lockless")] {
            let first = case.value(&format!("*(unsigned long *){}", planted[&format!("{kind}.head")]));
            let first = first.as_u64().unwrap_or_else(|| hex(text(&first)));
            let offset = case.ask("struct kstub_item");
            let offset =
                rows(&offset["members"]).find(|m| m["name"] == member).unwrap()["offset"].as_u64().unwrap();
            // Each leads to the next one's node, not to its structure.
            let ours = case.ask(&format!("list {first:#x} -s kstub_item.number -l kstub_item.{member}"));
            assert_eq!(ours["problem"], Value::Null, "{what}");
            let mut entries: Vec<u64> =
                rows(&ours["entries"]).map(|e| hex(text(&e["address"])) - offset).collect();
            entries.sort();
            let mut said: Vec<u64> = (0..20).map(|i| hex(&planted[&format!("{kind}.{i}")])).collect();
            said.sort();
            assert_eq!(entries, said, "{what}: {kind}");
        }
    }
}

#[test]
fn every_kind_of_member_is_shown_as_planted() {
    for case in cases().iter().filter(|case| has_module_types(case)) {
        let what = &case.name;
        let planted = planted(case);
        let base = &planted["everything"];
        let shown = case.ask(&format!("struct kstub_everything {base}"));
        let json = &shown["values"][0]["value"];
        let it = |member: &str| case.value(&format!("((struct kstub_everything *){base})->{member}"));
        let number = |value: &Value| value.as_i64().unwrap_or_else(|| panic!("{what}: no number: {value}"));
        let mut compared = 0;
        for member in [
            "byte",
            "negative",
            "half",
            "word",
            "quad",
            "bits_a",
            "bits_b",
            "bits_signed",
            "bits_wide",
            "count",
        ] {
            let said: i64 = planted[&format!("everything.{member}")].parse().unwrap();
            assert_eq!(number(&json[member]), said, "{what}: {member}");
            assert_eq!(number(&it(member)), said, "{what}: {member}");
            compared += 2;
        }
        for (member, key) in [
            ("shape.number", "shape.number"),
            ("shape.halves.high", "shape.halves.high"),
            ("inside_x", "inside_x"),
            ("inside_byte", "inside_byte"),
            // pahole writes int [2][3] into BTF as int [6].
            ("matrix[5]", "matrix.1.2"),
            ("points[2].y", "points.2.y"),
            ("flexible[0]", "flexible.0"),
            ("flexible[3]", "flexible.3"),
        ] {
            let said: i64 = planted[&format!("everything.{key}")].parse().unwrap();
            assert_eq!(number(&it(member)), said, "{what}: {member}");
            compared += 1;
        }
        assert!(
            it("color").to_string().contains(&planted["everything.color.name"]),
            "{what}: {}",
            it("color")
        );
        assert!(it("text").to_string().contains(&planted["everything.text"]), "{what}: {}", it("text"));
        assert!(it("string").to_string().contains("a string of the module"), "{what}: {}", it("string"));
        assert!(matches!(it("yes"), Value::Bool(true)), "{what}: {}", it("yes"));
        let layout = case.ask("struct kstub_everything");
        assert_eq!(layout["size"].to_string(), planted["everything.sizeof"], "{what}");
        for member in ["matrix", "flexible"] {
            let row = rows(&layout["members"]).find(|row| row["name"] == member).unwrap();
            assert_eq!(row["offset"].to_string(), planted[&format!("everything.offset.{member}")], "{what}");
        }
        // Eight bytes on, it is another thing.
        let wrong = case.ask(&format!("struct kstub_everything {:#x}", hex(base) + 8));
        assert_ne!(wrong["values"][0]["value"]["quad"], json["quad"], "{what}");
        assert_ne!(wrong["values"][0]["value"]["bits_wide"], json["bits_wide"], "{what}");
        eprintln!("planted structure: {what}: {}", compared + 7);
    }
}

#[test]
fn planted_words_are_read_and_threads_found() {
    for case in cases() {
        let what = &case.name;
        let planted = planted(case);
        let seed = hex(&planted["seed"]);
        let word = |at: u64| hex(text(&case.ask(&format!("rd {at:#x}"))["values"][0]));
        let mut compared = 0;
        for (key, value) in &planted {
            let is_memory = key.starts_with("kmalloc.") || key == "vmalloc";
            let is_pages = key.starts_with("pages.") && key.ends_with(".virtual");
            if is_memory || is_pages {
                for at in [hex(value), hex(value) + 8, hex(value) + 24] {
                    assert_eq!(word(at), at ^ seed, "{what}: {key}");
                    assert_ne!(word(at + 8), at ^ seed, "{what}: {key}: eight bytes on");
                    compared += 1;
                }
            }
            if let Some((i, "magic")) = key.strip_prefix("slab.live.").and_then(|rest| rest.split_once('.')) {
                assert_eq!(word(hex(&planted[&format!("slab.live.{i}")])), hex(value), "{what}: {key}");
                compared += 1;
            }
        }
        let tasks = case.ask("ps");
        for (key, pid) in
            planted.iter().filter(|(key, _)| key.starts_with("thread.") && key.ends_with(".pid"))
        {
            let thread = key.trim_end_matches(".pid");
            let task = rows(&tasks["tasks"]).find(|task| task["pid"].as_i64() == pid.parse().ok()).unwrap();
            assert_eq!(task["task"], json!(planted[&format!("{thread}.task")]), "{what}: {thread}");
            assert_eq!(task["state"], json!(planted[&format!("{thread}.state")]), "{what}: {thread}");
            compared += 2;
        }
        eprintln!("planted memory and threads: {what}: {compared}");
        assert!(compared > 100, "{what}: {compared}");
    }
}
