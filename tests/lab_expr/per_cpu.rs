//! Per-CPU variables in expressions, in gdb, and planted.

use super::*;

/// CPUs as the kernel numbers them, by the set.
fn smp(set: &Set) -> u32 {
    set.json["smp"].as_u64().unwrap() as u32
}

#[test]
fn per_cpu_values_are_those_at_the_offsets_of_each_cpu() {
    // Addresses by arithmetic on __per_cpu_offset alone: gdb moves a template linked at zero, which the kernel does not.
    const PROGRAM: &str = "
number = lambda text: int(gdb.parse_and_eval(text)) & U64
start = number('(unsigned long)&__per_cpu_start')
text = number('(unsigned long)&_text')
base = start if start > text else 0
def at(pointer, cpu):
    return (pointer + number('__per_cpu_offset[%d]' % cpu)) & U64
for cpu in range(@):
    address = at(number('(unsigned long)&runqueues') - start + base, cpu)
    rq = gdb.Value(address).cast(gdb.lookup_type('struct rq').pointer()).dereference()
    print('rq', cpu, '%#x' % address, int(rq['cpu']), int(rq['nr_running']), '%#x' % (int(rq['curr']) & U64))
    mib = gdb.parse_and_eval('init_net.mib.net_statistics')
    address = at(int(mib) & U64, cpu)
    values = gdb.Value(address).cast(mib.type).dereference()['mibs']
    print('mib', cpu, '%#x' % address, '%#x' % (int(mib) & U64), *(int(values[i]) for i in range(100)))
";
    for_each_set(&mut |set, dump, machine| {
        let what = set.name();
        let program = WALK.to_owned() + &PROGRAM.replace('@', &smp(set).to_string());
        let lines = python(dump, &program);
        let member = |path: &str| ask(machine, &format!("percpu runqueues.{path} a"))["values"].clone();
        let (cpus, running, curr) = (member("cpu"), member("nr_running"), member("curr"));
        let whole = ask(machine, "p runqueues")["addresses"].clone();
        let mib = ask(machine, "percpu init_net.mib.net_statistics")["values"].clone();
        // All possible CPUs, of which the kernel may have more than the machine.
        assert!(whole.as_array().unwrap().len() >= smp(set) as usize, "{what}");
        let mut distinct = std::collections::BTreeSet::new();
        for cpu in 0..smp(set) as usize {
            let line = |kind: &str| {
                let start = format!("{kind} {cpu} ");
                let line = lines.iter().find(|line| line.starts_with(&start));
                line.unwrap_or_else(|| panic!("{what}: {lines:?}")).split(' ').collect::<Vec<_>>()
            };
            let rq = line("rq");
            // The runqueue itself says whose it is.
            assert_eq!(
                (cpus[cpu]["value"].as_u64(), rq[3]),
                (Some(cpu as u64), cpu.to_string().as_str()),
                "{what}"
            );
            assert_eq!(whole[cpu]["address"], rq[2], "{what}");
            assert_eq!(running[cpu]["value"].to_string(), rq[4], "{what}");
            assert_eq!(curr[cpu]["value"], rq[5], "{what}");
            distinct.insert(rq[5].to_owned());
            let other = &whole[(cpu + 1) % smp(set) as usize];
            assert_ne!(other["address"], rq[2], "{what}: another CPU's must differ");
            // And back, from inside the variable and at its edges.
            let sym = |at: u64| ask(machine, &format!("sym {at:x}"))["symbols"][0].clone();
            for offset in [0, 1, 0x40] {
                let place = sym(hex(rq[2]) + offset);
                assert_eq!(place["name"], "runqueues", "{what}");
                assert_eq!(place["offset"].as_u64(), Some(offset), "{what}");
                assert_eq!(place["cpu"].as_u64(), Some(cpu as u64), "{what}");
            }
            assert_ne!(sym(hex(rq[2]) - 1)["name"], "runqueues", "{what}");
            // Allocated per-CPU memory, by its pointer and back.
            let theirs = line("mib");
            assert_eq!(mib[cpu]["address"], theirs[2], "{what}");
            let values: Vec<String> = mib[cpu]["value"]["mibs"]
                .as_array()
                .unwrap()
                .iter()
                .take(100)
                .map(Value::to_string)
                .collect();
            assert_eq!(values, theirs[4..], "{what}");
            let place = sym(hex(theirs[2]) + 8);
            assert_eq!(place["cpu"].as_u64(), Some(cpu as u64), "{what}: {place}");
            assert_eq!(place["offset"].as_u64(), Some(hex(theirs[3]) + 8), "{what}: {place}");
        }
        assert!(distinct.len() > 1, "{what}: different CPUs run different tasks");
    });
}

#[test]
fn gdbs_per_cpu_variables_follow_the_thread() {
    for_each_set(&mut |set, dump, machine| {
        let what = set.name();
        let busy = set.planted("spin-user.txt").unwrap();
        let mut commands = Vec::new();
        for cpu in 0..smp(set) {
            commands.extend([
                format!("thread {}", cpu + 1),
                "p runqueues.cpu".into(),
                "p runqueues.curr->comm".into(),
                "p/x (unsigned long)runqueues.curr".into(),
            ]);
        }
        commands.push("thread apply all p runqueues.cpu".into());
        let answers = gdb(dump, &commands.iter().map(String::as_str).collect::<Vec<_>>());
        for cpu in 0..smp(set) as usize {
            let [_, id, comm, curr] = &answers[4 * cpu..4 * cpu + 4] else { panic!() };
            assert!(id.ends_with(&format!(" = {cpu}")), "{what}: {id}");
            let ours = machine.cpu(CpuId(cpu as u32)).unwrap();
            assert!(comm.contains(&format!("\"{}", ours.comm.as_ref().unwrap())), "{what}: {comm}");
            let task = ask_on(machine, CpuId(cpu as u32), "p runqueues.curr")["values"][0]["value"].clone();
            assert!(curr.ends_with(task.as_str().unwrap()), "{what}: {curr} {task}");
            assert_eq!(busy["cpu"] == cpu.to_string(), comm.contains(&busy["comm"]), "{what}: {comm}");
        }
        let mut order = Vec::new();
        for line in answers.last().unwrap().lines() {
            if let Some((_, rest)) = line.split_once("(CPU ") {
                order.push(rest.split(',').next().unwrap().to_owned());
            } else if let Some((_, value)) = line.split_once(" = ") {
                assert_eq!(order.last().map(String::as_str), Some(value), "{what}: {:?}", answers.last());
            }
        }
        assert_eq!(order.len() as u32, smp(set), "{what}: {:?}", answers.last());
    });
}

/// What a module planted in its own per-CPU variables and in allocated ones, by its own word.
#[test]
fn planted_per_cpu_values_and_lists_are_found() {
    let mut sets = 0;
    for_each_set(&mut |set, _, machine| {
        let Some(said) = set.planted("kstub_plant.txt") else { return };
        let what = set.name();
        sets += 1;
        let pointer = &said["percpu.dynamic"];
        for (kind, line) in [
            ("value", "percpu -x *(u64 *)&kstub_percpu_value".to_owned()),
            ("dynamic", "percpu -x *(u64 **)&kstub_percpu_dynamic".to_owned()),
            ("dynamic", format!("percpu -x (u64 *){pointer}")),
        ] {
            let values = ask(machine, &line)["values"].clone();
            for cpu in 0..smp(set) as usize {
                let (address, value) =
                    (&said[&format!("percpu.{kind}.{cpu}.address")], &said[&format!("percpu.{kind}.{cpu}")]);
                assert_eq!(values[cpu]["address"], **address, "{what}: {line}");
                assert_eq!(values[cpu]["value"].as_u64(), Some(hex(value)), "{what}: {line}");
                let other = &values[(cpu + 1) % smp(set) as usize]["value"];
                assert_ne!(other.as_u64(), Some(hex(value)), "{what}: another CPU's must differ");
            }
        }
        for cpu in 0..smp(set) {
            let sym = |key: String| ask(machine, &format!("sym {}", said[&key]))["symbols"][0].clone();
            let value = sym(format!("percpu.value.{cpu}.address"));
            assert_eq!(value["name"], "kstub_percpu_value", "{what}: {value}");
            assert_eq!(value["module"], "kstub_plant", "{what}: {value}");
            assert_eq!(
                (value["cpu"].as_u64(), value["offset"].as_u64()),
                (Some(cpu.into()), Some(0)),
                "{what}"
            );
            let value = sym(format!("percpu.dynamic.{cpu}.address"));
            assert_eq!(value["cpu"].as_u64(), Some(cpu.into()), "{what}: {value}");
            assert_eq!(value["offset"].as_u64(), Some(hex(pointer)), "{what}: {value}");
        }
        // Lists, good and broken: their items have the list_head behind a u64 and an int.
        for (name, items, problem) in [
            ("good", 6, None),
            ("bad_prev", 6, None),
            ("cycle", 4, Some("comes a second time")),
            ("poisoned", 3, Some("cannot be read")),
            ("unmapped", 3, Some("cannot be read")),
        ] {
            let list = ask(machine, &format!("list -o 16 -H {}", said[&format!("list.{name}.head")]));
            let entries = list["entries"].as_array().unwrap();
            assert_eq!(entries.len(), items, "{what}: {name}: {list}");
            for (i, entry) in entries.iter().enumerate() {
                assert_eq!(entry["address"], *said[&format!("list.{name}.{i}")], "{what}: {name}");
            }
            match problem {
                None => assert_eq!(list["problem"], Value::Null, "{what}: {name}"),
                Some(words) => {
                    assert!(list["problem"].as_str().unwrap().contains(words), "{what}: {name}: {list}")
                }
            }
        }
        // Trees: rb_nodes are 56 bytes into their items; the others hold the items themselves.
        for (kind, root, key, node) in [
            ("rbtree", "rbtree.root", "rbtree.", 56),
            ("xarray", "xarray", "xarray.", 0),
            ("radix", "radix_tree", "radix_tree.", 0),
            ("radix", "idr", "idr.", 0),
            ("maple", "maple_tree", "maple_tree.", 0),
        ] {
            // Kernels before 6.1 have no maple trees.
            let Some(at) = said.get(root) else { continue };
            let tree = ask(machine, &format!("tree -t {kind} -o {node} {at}"));
            assert_eq!(tree["problem"], Value::Null, "{what}: {kind}");
            let ours: Vec<(u64, u64, u64)> = tree["entries"]
                .as_array()
                .unwrap()
                .iter()
                .enumerate()
                .map(|(i, entry)| {
                    let index = |end: &str| entry["indexes"][end].as_u64().unwrap_or(i as u64);
                    let stored = match entry["address"].as_str() {
                        Some(at) => hex(at),
                        None => entry["number"].as_u64().unwrap() << 1 | 1,
                    };
                    (index("first"), index("last"), stored)
                })
                .collect();
            let mut theirs: Vec<(u64, u64, u64)> = said
                .iter()
                .filter_map(|(name, value)| {
                    let indexes = name.strip_prefix(key)?;
                    let (first, last) = indexes.split_once('-').unwrap_or((indexes, indexes));
                    Some((first.parse().ok()?, last.parse().ok()?, hex(value)))
                })
                .collect();
            theirs.sort();
            assert_eq!(ours, theirs, "{what}: {kind} {root}");
            assert!(theirs.len() >= 5, "{what}: {kind}");
        }
        let words = ask(machine, &format!("rd -S {}", said["rbtree.root"]));
        let cache = words["symbols"][0].as_str().unwrap_or_else(|| panic!("{what}: {words}"));
        assert!(cache.starts_with("[kmalloc-") && cache.ends_with("96]"), "{what}: {cache}");
        let empty = ask(machine, &format!("list -o 16 -H {}", said["list.empty.head"]));
        assert_eq!(empty["entries"], Value::Array(Vec::new()), "{what}");
    });
    assert!(lab::sets().is_none() || sets > 0, "no set has a planted module");
}
