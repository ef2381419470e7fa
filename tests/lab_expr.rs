//! Expressions, values, per-CPU memory and code in real dumps, against gdb's own answers on the same dump: its
//! DWARF for types, its arithmetic, its disassembler. Both read memory through kstub, which tests/lab_formats.rs checks.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod support;

use kstub::backend::Dump;
use kstub::command::{self, Context, Focus, Form};
use kstub::debuginfo::find::Places;
use kstub::kernel::{CpuId, Machine, Options, TypesFrom};
use serde_json::Value;
use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use support::gdb_session::gdb;
use support::lab::{self, Set};

/// The dump of a set that is read fastest.
fn dump_of(set: &Set) -> PathBuf {
    let dumps = set.dumps();
    let raw =
        dumps.iter().find(|d| d.complete && d.format == "elf" && !d.flattened && d.filter_level.is_none());
    raw.or(dumps.first()).unwrap().path.clone()
}

fn open(dump: &Path) -> Machine {
    open_with(dump, TypesFrom::Any)
}

fn open_with(dump: &Path, types: TypesFrom) -> Machine {
    let opened = Dump::open(dump).unwrap_or_else(|e| panic!("{}: {e}", dump.display()));
    let beside = dump.parent().map(Path::to_owned);
    let options = Options { vmlinux: None, places: Places { beside, ..Places::default() }, types };
    Machine::open(Arc::new(opened), &options, &|_, _| ()).unwrap()
}

/// Runs `check` on one dump of each set.
fn for_each_set(check: &mut dyn FnMut(&Set, &Path, &Machine)) {
    for set in lab::sets().unwrap_or_default() {
        let dump = dump_of(&set);
        eprintln!("{}", dump.display());
        check(&set, &dump, &open(&dump));
    }
}

/// The JSON that a command answers for `cpu`.
fn ask_on(machine: &Machine, cpu: CpuId, line: &str) -> Value {
    let focus = Focus::default();
    match command::run(&Context { machine, cpu, focus: &focus, task: None, form: Form::Both }, line) {
        Ok(output) => output.json,
        Err(error) => panic!("{line}: {error}"),
    }
}

fn ask(machine: &Machine, line: &str) -> Value {
    ask_on(machine, machine.first_cpu(), line)
}

/// What gdb prints for a Python program, line by line.
fn python(dump: &Path, program: &str) -> Vec<String> {
    let mut file = tempfile::Builder::new().suffix(".py").tempfile().unwrap();
    file.write_all(program.as_bytes()).unwrap();
    let printed = gdb(dump, &[&format!("source {}", file.path().display())]);
    printed[0].lines().map(str::to_owned).collect()
}

fn hex(text: &str) -> u64 {
    u64::from_str_radix(text.trim_start_matches("0x"), 16).unwrap_or_else(|e| panic!("{text}: {e}"))
}

/// Structures of every kind: large, with bit-fields, unions, unnamed members, flexible arrays; the last are modules'.
const STRUCTURES: [&str; 19] = [
    "task_struct",
    "mm_struct",
    "page",
    "rq",
    "list_head",
    "sk_buff",
    "inode",
    "super_block",
    "module",
    "sock",
    "cred",
    "file",
    "kmem_cache",
    "cpuinfo_x86",
    "signal_struct",
    "net",
    "xfs_mount",
    "ovl_fs",
    "fuse_conn",
];

#[test]
fn members_are_where_gdb_has_them() {
    // gdb's name, type code, offset in bits and size in bits of each member, unnamed ones looked into.
    const PROGRAM: &str = "
def walk(kind, at, name):
    for field in kind.fields():
        inner = field.type.strip_typedefs()
        if not field.name:
            if inner.code in (gdb.TYPE_CODE_STRUCT, gdb.TYPE_CODE_UNION):
                walk(inner, at + field.bitpos, name)
        else:
            print(name, field.name, at + field.bitpos, field.bitsize, field.type.sizeof)
for name in '@'.split():
    kind = gdb.lookup_type('struct ' + name)
    print(name, '-', kind.sizeof)
    walk(kind, 0, name)
";
    let mut releases = Vec::new();
    for_each_set(&mut |set, dump, machine| {
        if releases.contains(&set.json["release"]) {
            return;
        }
        releases.push(set.json["release"].clone());
        let what = set.name();
        let lines = python(dump, &PROGRAM.replace('@', &STRUCTURES.join(" ")));
        let words: Vec<Vec<&str>> = lines.iter().map(|line| line.split(' ').collect()).collect();
        let mut compared = 0;
        let by_dwarf = open_with(dump, TypesFrom::Dwarf);
        for (name, machine) in STRUCTURES.iter().flat_map(|name| [(*name, machine), (*name, &by_dwarf)]) {
            let ours = ask(machine, &format!("struct {name}"));
            let theirs = words.iter().filter(|words| words[0] == name);
            let size = theirs.clone().find(|words| words[1] == "-").unwrap()[2];
            assert_eq!(ours["size"].to_string(), size, "{what}: {name}");
            let rows = |shift: u64| -> Vec<(String, u64, u64)> {
                let members = ours["members"].as_array().unwrap().iter();
                members
                    .map(|m| {
                        let bits = &m["bits"];
                        let at =
                            8 * m["offset"].as_u64().unwrap() + bits["lowest"].as_u64().unwrap_or(0) + shift;
                        let size = bits["width"].as_u64().unwrap_or(8 * m["size"].as_u64().unwrap_or(0));
                        (m["name"].as_str().unwrap().to_owned(), at, size)
                    })
                    .collect()
            };
            let number = |text: &str| text.parse::<u64>().unwrap();
            let gdbs: Vec<(String, u64, u64)> = theirs
                .filter(|words| words[1] != "-")
                .map(|w| {
                    (w[1].to_owned(), number(w[2]), if w[3] == "0" { 8 * number(w[4]) } else { number(w[3]) })
                })
                .collect();
            assert!(!gdbs.is_empty(), "{what}: {name}: {lines:?}");
            for (our, their) in rows(0).iter().zip(&gdbs) {
                assert_eq!(our, their, "{what}: {name}");
            }
            assert_eq!(rows(0).len(), gdbs.len(), "{what}: {name}");
            assert_ne!(rows(64), gdbs, "{what}: {name}: a comparison 8 bytes off must fail");
            compared += gdbs.len();
        }
        assert!(compared > 2000, "{what}: {compared}");
    });
}

/// Every number below a value, by path. gdb's and ours are made the same: pointers and numbers in decimal, text as
/// text, enumerators by name.
fn flatten(value: &Value, path: &str, out: &mut BTreeMap<String, String>) {
    match value {
        Value::Object(object) if object.contains_key("address") && object.contains_key("text") => {
            out.insert(path.into(), hex(object["address"].as_str().unwrap()).to_string());
        }
        Value::Object(object) => {
            for (name, value) in object {
                flatten(value, &format!("{path}.{name}"), out);
            }
        }
        Value::Array(values) => {
            for (i, value) in values.iter().enumerate() {
                flatten(value, &format!("{path}[{i}]"), out);
            }
        }
        Value::String(text) if text.starts_with("0x") => {
            out.insert(path.into(), hex(text).to_string());
        }
        Value::String(text) => {
            out.insert(path.into(), text.clone());
        }
        other => {
            out.insert(path.into(), other.to_string());
        }
    }
}

/// Prints what `flatten` gives for gdb's own values.
const WALK: &str = "
U64 = (1 << 64) - 1
def walk(value, path):
    kind = value.type.strip_typedefs()
    code = kind.code
    if code in (gdb.TYPE_CODE_STRUCT, gdb.TYPE_CODE_UNION):
        for field in kind.fields():
            walk(value[field], path + '.' + field.name if field.name else path)
    elif code == gdb.TYPE_CODE_ARRAY:
        low, high = kind.range() if kind.sizeof else (0, -1)
        if kind.target().strip_typedefs().name == 'char' and high >= low:
            raw = bytes((int(value[i]) & 255) for i in range(low, high + 1))
            text, _, rest = raw.partition(b'\\0')
            if not rest.strip(b'\\0'):
                try:
                    print(path + ' ' + text.decode())
                    return
                except UnicodeDecodeError:
                    pass
        for i in range(low, min(high + 1, 4096)):
            walk(value[i], path + '[%d]' % i)
    elif code == gdb.TYPE_CODE_ENUM:
        number = int(value)
        names = [f.name for f in kind.fields() if f.enumval == number]
        print(path + ' ' + (names[0] if names else str(number)))
    elif code == gdb.TYPE_CODE_BOOL:
        print(path + ' ' + {0: 'false', 1: 'true'}.get(int(value), str(int(value))))
    elif code == gdb.TYPE_CODE_PTR:
        print(path + ' ' + str(int(value) & U64))
    elif code == gdb.TYPE_CODE_INT:
        print(path + ' ' + str(int(value)))
    else:
        print(path + ' code%d' % code)
";

fn differences(ours: &BTreeMap<String, String>, theirs: &BTreeMap<String, String>) -> Vec<String> {
    let mut all: Vec<String> = theirs
        .iter()
        .filter(|(path, value)| ours.get(*path) != Some(value))
        .map(|(path, value)| format!("{path}: gdb {value}, kstub {:?}", ours.get(path)))
        .collect();
    all.extend(
        ours.keys().filter(|path| !theirs.contains_key(*path)).map(|path| format!("{path}: only kstub")),
    );
    all
}

#[test]
fn values_are_gdbs() {
    let objects = ["init_task", "init_mm", "init_uts_ns", "boot_cpu_data", "init_cred", "iomem_resource"];
    for_each_set(&mut |set, dump, machine| {
        let what = set.name();
        let mut program = WALK.to_owned();
        for name in objects {
            program += &format!("walk(gdb.parse_and_eval('{name}'), '{name}')\n");
        }
        let mut theirs: BTreeMap<String, BTreeMap<String, String>> = BTreeMap::new();
        for line in python(dump, &program) {
            let (path, value) = line.split_once(' ').unwrap_or((&line, ""));
            let name = path.split(['.', '[']).next().unwrap();
            theirs.entry(name.into()).or_default().insert(path.into(), value.into());
        }
        for name in objects {
            let mut ours = BTreeMap::new();
            flatten(&ask(machine, &format!("p {name}"))["values"][0]["value"], name, &mut ours);
            let differ = differences(&ours, &theirs[name]);
            assert!(differ.is_empty(), "{what}: {name}: {differ:#?}");
            let mut wrong = BTreeMap::new();
            let at = ask(machine, &format!("p {name}"))["values"][0]["address"].as_str().unwrap().to_owned();
            let ty = ask(machine, &format!("p {name}"))["values"][0]["type"].as_str().unwrap().to_owned();
            let shifted = ask(machine, &format!("p *({ty} *)({at} + 8)"));
            flatten(&shifted["values"][0]["value"], name, &mut wrong);
            assert!(
                !differences(&wrong, &theirs[name]).is_empty(),
                "{what}: {name}: 8 bytes off must differ"
            );
        }
        assert!(theirs["init_task"].len() > 400, "{what}: {}", theirs["init_task"].len());
    });
}

#[test]
fn expressions_are_gdbs() {
    let expressions = [
        "1 + 2 * 3 - 4 / 2 % 3",
        "(1 << 31) >> 31",
        "1 << 4 | 3 ^ 1 & 7",
        "-1 < 0",
        "-1 < 0u",
        "0xffffffff + 1",
        "2147483647 + 1L",
        "~0 == -1",
        "!5 || 3 && 0",
        "(unsigned char)0x1ff",
        "(signed char)0xff",
        "(unsigned short)-1",
        "sizeof(struct task_struct) * 4",
        "sizeof(init_task.comm)",
        "sizeof(long)",
        "init_task.pid",
        "init_task.comm[3]",
        "*&init_task.comm[1]",
        "(&init_task + 1) - &init_task",
        "(char *)(&init_task + 1) - (char *)&init_task",
        "(unsigned long)&init_task.tasks - (unsigned long)&init_task",
        "(unsigned long)init_task.tasks.next->prev == (unsigned long)&init_task.tasks",
        "((struct task_struct *)((char *)init_task.tasks.next - (unsigned long)&((struct task_struct *)0)->tasks))->pid",
        "(long)init_task.comm",
        "(long)&init_task.comm[5]",
        "(unsigned long)init_task.mm",
        "init_mm.mm_users.counter",
        "jiffies_64",
        "nr_cpu_ids",
        "__per_cpu_offset[1]",
        "*__per_cpu_offset@2 == 0",
        "ZONE_NORMAL + 1",
        "PG_dirty",
        "((struct page *)0)->flags",
        "(long)&((struct page *)0x1000)[3]",
        "(long)((struct page *)0x1000 + 3)",
        "(unsigned long)$rip",
        "init_task.se.load.weight",
        "init_task.in_execve + 0",
        "init_uts_ns.name.sysname[0] == 76",
    ];
    for_each_set(&mut |set, dump, machine| {
        let what = set.name();
        let commands: Vec<String> = expressions.iter().map(|e| format!("print (long)({e})")).collect();
        let printed = gdb(dump, &commands.iter().map(String::as_str).collect::<Vec<_>>());
        let mut compared = 0;
        for (expression, printed) in expressions.iter().zip(&printed) {
            let focus = Focus::default();
            let context =
                Context { machine, cpu: machine.first_cpu(), focus: &focus, task: None, form: Form::Both };
            let ours = command::run(&context, &format!("p -d {expression}"));
            // What gdb refuses (a member that moved, NULL followed) we refuse, too.
            let Some((_, theirs)) = printed.split_once(" = ") else {
                assert!(
                    ours.as_ref().map_or(true, |out| out.json.to_string().contains("error")),
                    "{what}: {expression}: gdb said nothing, kstub {ours:?}"
                );
                continue;
            };
            let ours = ours.unwrap_or_else(|error| panic!("{what}: {expression}: {error}, gdb {theirs}"));
            let mut flat = BTreeMap::new();
            flatten(&ours.json["values"][0]["value"], "", &mut flat);
            let number = flat[""].clone();
            let number = machine
                .kernel()
                .unwrap()
                .type_table()
                .unwrap()
                .constant(&number)
                .map_or(number, |n| n.to_string());
            let as_i128 = |text: &str| {
                text.trim().parse::<i128>().unwrap_or_else(|e| panic!("{what}: {expression}: {text}: {e}"))
            };
            let truth = |text: &str| match text {
                "true" => 1,
                "false" => 0,
                text => as_i128(text),
            };
            // Both as they are once extended to 64 bits.
            assert_eq!(truth(&number) as u64, as_i128(theirs) as u64, "{what}: {expression}");
            compared += 1;
        }
        assert!(compared > 30, "{what}: {compared}");
    });
}

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

/// gdb's and our spelling of one instruction, made the same: numbers in hexadecimal without sign of their width,
/// names and comments off.
fn normal(text: &str) -> String {
    let text = text.split(['#', '<']).next().unwrap().trim().replace('\t', " ");
    let words: Vec<&str> = text.split_whitespace().collect();
    let mut text = words.join(" ");
    // objdump shows displacements of zero that are encoded.
    for shift in ["shl", "shr", "sar", "rol", "ror", "rcl", "rcr"] {
        // Newer binutils show the count of one.
        text = text
            .replace(&format!("{shift} $0x1,"), &format!("{shift} "))
            .replace(&format!("{shift} $1,"), &format!("{shift} "));
    }
    text = text.replace(" 0x0(", " (").replace(",0x0(", ",(").replace("*0x0(", "*(").replace(":0x0(", ":(");
    // One opcode, two spellings: of data that is decoded.
    if let Some(rest) = text.strip_prefix("lretl ") {
        text = format!("lret {rest}");
    }
    if let Some((prefix, rest)) = text.split_once(' ')
        && prefix.starts_with("rex.")
    {
        text = rest.to_owned();
    }
    // Prefixes that do nothing, on nops, returns, and data that is decoded; on string instructions they do something.
    let strings = ["movs", "stos", "lods", "scas", "cmps", "ins", "outs"];
    while let Some((prefix, rest)) = text.split_once(' ')
        && (["data16", "cs", "repz", "repnz", "rep", "bnd", "notrack", "ds", "es", "ss"].contains(&prefix)
            // A jump to an address reads no memory.
            || ["fs", "gs"].contains(&prefix) && rest.trim_start_matches("gs ").starts_with('j') && !rest.contains('*'))
        && !strings.iter().any(|name| rest.starts_with(name))
    {
        text = rest.to_owned();
    }
    // The port of string instructions, as older and newer binutils spell it.
    text.replace("(%dx)", "%dx")
}

#[test]
fn code_is_disassembled_as_gdb_does() {
    const COUNT: usize = 24;
    let mut releases = Vec::new();
    for_each_set(&mut |set, dump, machine| {
        let what = set.name();
        if releases.contains(&set.json["release"]) {
            return;
        }
        releases.push(set.json["release"].clone());
        let kallsyms = std::fs::read_to_string(set.dir.join("facts/proc/kallsyms")).unwrap();
        let end_of_text = kallsyms.lines().find(|line| line.ends_with(" _etext")).unwrap();
        // Where code for the start of the kernel was, there are other things now.
        let functions: Vec<&str> = kallsyms
            .lines()
            .filter(|line| {
                !line.contains('[') && line.get(16..19) == Some(" T ") && line[..16] < end_of_text[..16]
            })
            .map(|line| &line[..16])
            .collect();
        let sampled: Vec<&str> = functions.iter().step_by(functions.len() / 60).copied().collect();
        let commands: Vec<String> = sampled.iter().map(|at| format!("x/{COUNT}i 0x{at}")).collect();
        let printed = gdb(dump, &commands.iter().map(String::as_str).collect::<Vec<_>>());
        let (mut compared, mut named, mut differ) = (0, 0, Vec::new());
        for (at, printed) in sampled.iter().zip(&printed) {
            let ours = ask(machine, &format!("dis 0x{at} {COUNT}"));
            let ours = ours["instructions"].as_array().unwrap();
            for (line, one) in printed.lines().zip(ours) {
                let line = line.trim_start_matches("=>").trim();
                let (place, code) = line.split_once(":\t").unwrap_or_else(|| panic!("{what}: {line}"));
                let address = place.split(' ').next().unwrap();
                if code.contains("(bad)") || one["text"] == "(bad)" {
                    break;
                }
                assert_eq!(one["address"], address, "{what}: {line} {one}");
                if let (Some((_, name)), Some(symbol)) = (place.split_once(" <"), one["symbol"].as_str()) {
                    // gdb's offsets are decimal.
                    let parts = |text: &str| {
                        let text = text.trim_end_matches([':', '>']);
                        let (name, offset) = text.split_once('+').unwrap_or((text, "0"));
                        let hexadecimal = offset.strip_prefix("0x").map(hex);
                        (name.to_owned(), hexadecimal.unwrap_or_else(|| offset.parse().unwrap()))
                    };
                    let ((our_name, our_offset), (name, offset)) = (parts(symbol), parts(name));
                    // Of names at one address, or around it, gdb may choose another.
                    if our_name == name {
                        named += 1;
                        assert_eq!(our_offset, offset, "{what}: {line} {one}");
                    }
                }
                let (ours, theirs) = (normal(one["text"].as_str().unwrap()), normal(code));
                compared += 1;
                if ours != theirs {
                    differ.push(format!("{ours} | {theirs}"));
                }
            }
        }
        differ.sort();
        differ.dedup();
        assert!(compared > 1000 && named * 10 > compared * 9, "{what}: {compared}, {named} with gdb's name");
        assert!(differ.is_empty(), "{what}: kstub | gdb, {} of {compared}: {differ:#?}", differ.len());
    });
}

#[test]
fn per_cpu_operands_are_named() {
    for_each_set(&mut |set, _, machine| {
        // On all kernels schedule() begins with current, and that is per-CPU.
        let code = ask(machine, "dis schedule");
        let names: Vec<&str> = code["instructions"]
            .as_array()
            .unwrap()
            .iter()
            .filter_map(|one| one["refers_to"].as_str())
            .collect();
        let current = ["current_task", "pcpu_hot", "const_current_task", "const_pcpu_hot"];
        assert!(names.iter().any(|name| current.contains(name)), "{}: {names:?}", set.name());
        assert!(names.iter().any(|name| name.contains("schedule")), "{}: {names:?}", set.name());
    });
}

#[test]
fn memory_is_read_as_gdb_does() {
    for_each_set(&mut |set, dump, machine| {
        let what = set.name();
        for (width, letter, count) in [(8, 'b', 48), (16, 'h', 24), (32, 'w', 14), (64, 'g', 10)] {
            for place in ["linux_banner", "init_task", "schedule", "init_mm"] {
                let printed = gdb(dump, &[&format!("x/{count}x{letter} &{place}")]).concat();
                let theirs: Vec<u64> = printed
                    .lines()
                    .flat_map(|line| line.split_once(':').unwrap().1.split_whitespace())
                    .map(hex)
                    .collect();
                let values = |line: &str| -> Vec<u64> {
                    let json = ask(machine, line);
                    json["values"].as_array().unwrap().iter().map(|v| hex(v.as_str().unwrap())).collect()
                };
                assert_eq!(values(&format!("rd -{width} {place} {count}")), theirs, "{what}: {place}");
                let zeros = theirs.iter().all(|&value| value == 0);
                let shifted = values(&format!("rd -{width} -o 8 {place} {count}"));
                assert!(zeros || shifted != theirs, "{what}: {place}: 8 bytes off must differ");
            }
            if width == 8 && set.name() != "qemu-6.1-4l" {
                // One width is enough to tell that the rest of the dumps is read the same way.
                break;
            }
        }
        let banner = ask(machine, "rd -a linux_banner")["text"].as_str().unwrap().to_owned();
        assert!(
            banner.starts_with(&format!("Linux version {}", set.json["release"].as_str().unwrap())),
            "{what}"
        );
    });
}

#[test]
fn lists_and_symbols_are_the_guests() {
    const PROGRAM: &str = "
head = gdb.parse_and_eval('&init_task.tasks')
offset = int(head) - int(gdb.parse_and_eval('&init_task'))
node = head['next']
while node != head:
    task = gdb.Value(int(node) - offset).cast(gdb.lookup_type('struct task_struct').pointer())
    print('task', int(task['pid']), '%#x' % (int(task) & U64))
    node = node['next']
";
    for_each_set(&mut |set, dump, machine| {
        let what = set.name();
        let theirs: Vec<String> = python(dump, &(WALK.to_owned() + PROGRAM));
        let list = |line: &str| -> Vec<String> {
            let json = ask(machine, line);
            assert_eq!(json["problem"], Value::Null, "{what}");
            let entries = json["entries"].as_array().unwrap().iter();
            entries
                .map(|e| format!("task {} {}", e["value"]["pid"], e["address"].as_str().unwrap()))
                .collect()
        };
        let ours = list("list task_struct.tasks -s task_struct.pid -h init_task");
        assert_eq!(ours[1..], theirs, "{what}");
        let mut backwards = list("list -r task_struct.tasks -s task_struct.pid -h init_task");
        backwards[1..].reverse();
        assert_eq!(backwards, ours, "{what}");
        // The modules that the guest had.
        let modules = ask(machine, "list -H modules -o module.list -s module.name");
        let mut ours: Vec<&str> = modules["entries"]
            .as_array()
            .unwrap()
            .iter()
            .map(|e| e["value"]["name"].as_str().unwrap())
            .collect();
        let kallsyms = std::fs::read_to_string(set.dir.join("facts/proc/kallsyms")).unwrap();
        let names = kallsyms.lines().filter_map(|line| line.split_once('[')?.1.strip_suffix(']'));
        let mut said: Vec<&str> = names
            .filter(|name| !matches!(*name, "bpf" | "__builtin__kprobes" | "__builtin__ftrace"))
            .collect();
        ours.sort();
        said.sort();
        said.dedup();
        // A module that panicked while it was loaded came after the guest told.
        ours.retain(|name| *name != "kstub_chain" || said.contains(name));
        assert_eq!(ours, said, "{what}");
        // Symbols by name.
        let image: Vec<Vec<&str>> = kallsyms
            .lines()
            .filter(|line| !line.contains('[') && line.starts_with("ffff"))
            .map(|line| line.split(' ').collect())
            .collect();
        let mut found = 0;
        for words in image.iter().step_by(image.len() / 200) {
            let (at, name) = (hex(words[0]), words[2]);
            let rows = ask(machine, &format!("sym {name}"))["symbols"].clone();
            let addresses: Vec<u64> =
                rows.as_array().unwrap().iter().map(|row| hex(row["address"].as_str().unwrap())).collect();
            assert!(addresses.contains(&at), "{what}: {name} at {at:#x}, not {addresses:x?}");
            found += 1;
        }
        assert!(found >= 200, "{what}");
    });
}

/// Numbers of 16 bytes, which newer kernels exchange at once.
#[test]
fn wide_numbers_are_gdbs() {
    let mut checked = 0;
    for_each_set(&mut |set, dump, machine| {
        if machine.kernel().unwrap().types().unwrap().parse("freelist_full_t").is_none() {
            return;
        }
        // gdb's Python cannot make an int of one.
        const PROGRAM: &str = "
at = int(gdb.parse_and_eval('(unsigned long)linux_banner'))
print('%#x' % int.from_bytes(gdb.selected_inferior().read_memory(at, 16), 'little'))
";
        let expression = "*(freelist_full_t *)linux_banner";
        let theirs = python(dump, PROGRAM);
        let ours = ask(machine, &format!("p {expression}"))["values"][0]["value"].clone();
        assert_eq!(ours, theirs[0].as_str(), "{}", set.name());
        assert_ne!(
            ask(machine, "p *(freelist_full_t *)((char *)linux_banner + 8)")["values"][0]["value"],
            ours
        );
        checked += 1;
    });
    assert!(lab::sets().is_none() || checked > 0);
}
