//! Expressions, values, per-CPU memory and code in real dumps, against gdb's own answers on the same dump: its
//! DWARF for types, its arithmetic, its disassembler. Both read memory through kstub, which tests/lab_formats.rs checks.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

#[path = "lab_expr/code.rs"]
mod code;
#[path = "lab_expr/per_cpu.rs"]
mod per_cpu;
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
