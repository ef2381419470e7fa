//! Memory, pages and caches as crash counts them.

use super::*;

/// crash's sum of a cache leaves out a CPU that has partial slabs and none that it allocates from, and so takes their
/// free objects for allocated; its own list of those slabs (`kmem -S`) says that they are free.
fn free_where_crash_does_not_look(cache: &Value) -> u64 {
    let slabs: Vec<&Value> = rows(&cache["slab_list"]).collect();
    let allocates = |cpu: &str| slabs.iter().any(|slab| text(&slab["place"]) == cpu);
    let partial = slabs.iter().filter(|slab| {
        let place = text(&slab["place"]);
        place.starts_with("cpu ") && place.strip_suffix(" partial").is_some_and(|cpu| !allocates(cpu))
    });
    partial.map(|slab| slab["objects"].as_u64().unwrap() - slab["inuse"].as_u64().unwrap()).sum()
}

#[test]
fn memory_is_crashs() {
    compare("crash", 600, &|case| {
        let facts = case.crash()?;
        let (mut ours, mut theirs) = (Rows::new(), Rows::new());
        for (pfn, page) in facts["pages"].as_object().unwrap() {
            let pfn: u64 = pfn.parse().unwrap();
            let name = format!("page {pfn:#x}");
            let said = case.ask(&format!("page pfn:{pfn:x}"));
            put(
                &mut theirs,
                &name,
                json!({ "page": at(&page["page"]), "physical": at(&page["physical"]), "refcount": page["refcount"], "flags": at(&page["flags"]) }),
            );
            put(
                &mut ours,
                &name,
                json!({ "page": at(&said["page"]), "physical": at(&said["physical"]), "refcount": said["refcount"], "flags": at(&said["flags"]) }),
            );
            if let Some(cache) = page["slab"].as_str() {
                put(&mut theirs, &name, json!({ "cache": cache }));
                put(&mut ours, &name, json!({ "cache": said["slab"]["cache"] }));
            }
        }
        let counters = case.ask("kmem -V");
        for (key, of_crash) in [
            ("total", "TOTAL MEM"),
            ("free", "FREE"),
            ("used", "USED"),
            ("buffers", "BUFFERS"),
            ("cached", "CACHED"),
            ("slab", "SLAB"),
            ("huge_total", "TOTAL HUGE"),
            ("huge_free", "HUGE FREE"),
            ("swap_total", "TOTAL SWAP"),
            ("swap_used", "SWAP USED"),
            ("swap_free", "SWAP FREE"),
            ("commit_limit", "COMMIT LIMIT"),
            ("committed", "COMMITTED"),
        ] {
            // crash leaves out what CPUs have counted and not yet added up.
            let counted = |group: &str, name: &str| counters[group][name]["pending"].as_i64().unwrap_or(0);
            let pending = match key {
                "free" => counted("zone", "NR_FREE_PAGES"),
                "used" => -counted("zone", "NR_FREE_PAGES"),
                "cached" => counted("node", "NR_FILE_PAGES"),
                "slab" => {
                    counted("node", "NR_SLAB_RECLAIMABLE_B") + counted("node", "NR_SLAB_UNRECLAIMABLE_B")
                }
                _ => 0,
            };
            let value = facts["memory_pages"][of_crash].as_i64().map(|pages| pages + pending);
            theirs.insert(format!("memory {key} pages"), json!(value));
            ours.insert(format!("memory {key} pages"), case.ask("kmem -i")[key].clone());
        }
        let mut missed = BTreeMap::new();
        for cache in rows(&case.ask("kmem -S")["caches"]) {
            missed.insert(text(&cache["name"]).to_owned(), free_where_crash_does_not_look(cache));
        }
        for (side, caches) in [(&mut ours, &case.ask("kmem -s")["caches"]), (&mut theirs, &facts["slabs"])] {
            for cache in rows(caches) {
                let name = format!("cache {}", text(&cache["name"]));
                // Once ours are done there is nothing to add.
                let missed = missed.get_mut(text(&cache["name"])).map_or(0, std::mem::take);
                let allocated = cache["allocated"].as_u64().map(|allocated| allocated + missed);
                let bytes =
                    cache["slab_bytes"].as_u64().unwrap_or_else(|| cache["slab_kb"].as_u64().unwrap() * 1024);
                put(
                    side,
                    &name,
                    json!({ "object_size": cache["object_size"], "allocated": allocated, "total": cache["total"], "slabs": cache["slabs"], "slab_bytes": bytes }),
                );
            }
        }
        for zone in rows(&case.ask("kmem -z")) {
            let name = text(&zone["name"]);
            let Some(known) = facts["zones"].get(name) else { continue };
            let marks = ["watermark_min", "watermark_low", "watermark_high"].map(|mark| zone[mark].clone());
            put(
                &mut theirs,
                &format!("zone {name}"),
                json!({ "spanned": known["spanned"], "watermarks": known["watermarks"], "counters": known["counters"] }),
            );
            put(
                &mut ours,
                &format!("zone {name}"),
                json!({ "spanned": zone["spanned"], "watermarks": marks, "counters": zone["counters"] }),
            );
        }
        for zone in rows(&case.ask("kmem -f")) {
            let name = text(&zone["zone"]);
            for area in rows(&zone["orders"]) {
                put(
                    &mut ours,
                    &format!("zone {name} order {}", area["order"]),
                    json!({ "blocks": area["nr_free"] }),
                );
                put(
                    &mut theirs,
                    &format!("zone {name} order {}", area["order"]),
                    json!({ "blocks": facts["free_blocks"][name][area["order"].to_string()] }),
                );
            }
        }
        for group in ["zone", "node", "event"] {
            for (name, value) in counters[group].as_object().unwrap() {
                let Some(known) = facts["counters"].get(name) else { continue };
                put(&mut theirs, &format!("{group} {name}"), json!({ "counter": known }));
                put(&mut ours, &format!("{group} {name}"), json!({ "counter": value["global"] }));
            }
        }
        for pool in rows(&case.ask("kmem -h")) {
            let name = text(&pool["name"]);
            put(&mut ours, name, json!({ "free": pool["free"], "total": pool["total"] }));
            put(&mut theirs, name, facts["huge_pools"][name].clone());
        }
        // Objects of the slabs that crash lists: those of CPUs and partial ones.
        for (cache, objects) in facts["objects"].as_object().unwrap() {
            let objects = objects.as_object().unwrap();
            if objects.is_empty() {
                continue;
            }
            let said = case.ask(&format!("kmem -S {cache}"));
            let lists = rows(&said["caches"][0]["slab_list"]);
            let free: BTreeSet<u64> =
                lists.flat_map(|slab| rows(&slab["free"]).map(|o| hex_of(&o["at"]))).collect();
            for (object, used) in objects {
                theirs.insert(format!("{cache} {object} used"), used.clone());
                ours.insert(format!("{cache} {object} used"), json!(!free.contains(&hex(object))));
            }
        }
        Some((ours, theirs))
    });
}
