//! What is asked of a guest and of its dump, and where the answers may differ: for each place a reason.

use serde_json::Value;

/// What the command lines are made of.
pub struct Planted {
    pub magic: u64,
    /// A process with sleeping threads, and a kernel thread's `struct task_struct`.
    pub pid: u64,
    pub task: u64,
    pub cpus: u32,
}

/// Arguments for every command, but those of [`EXCLUDED`]. `set` comes last: what it chooses counts for those behind.
pub fn command_lines(planted: &Planted) -> Vec<String> {
    let Planted { magic, pid, task, .. } = planted;
    let mut lines: Vec<String> = [
        "bt",
        "bt -a",
        "bt -a -l",
        "bt -c 0 --why",
        "bt -f 1",
        "bt -g 1",
        "bt -e",
        "bt -E",
        "bt -t",
        "bt -r",
        "bt -v",
        "bt --group",
        "dis schedule",
        "dis -l schedule 20",
        "dis -r schedule+20",
        "files 1",
        "foreach bt",
        "foreach files",
        "foreach user vm",
        "foreach task -R pid,comm,mm",
        "help",
        "help dump",
        "info",
        "info version",
        "kmem -i",
        "kmem --census",
        "kmem -s",
        "kmem -S kmalloc-64",
        "kmem -z",
        "kmem -f",
        "kmem -F",
        "kmem -V",
        "kmem -v",
        "kmem -h",
        "list task_struct.tasks -s task_struct.pid,comm -h init_task",
        "list -H modules -o module.list -s module.name",
        "log",
        "log -T -m",
        "mod",
        "mod -t",
        "mod -s kstub_live",
        "mount",
        "nmi",
        "nmi -l",
        "p jiffies",
        "p init_task",
        "p -x init_mm",
        "p *(u64 *)((char *)&kstub_live + 8)",
        "percpu runqueues.nr_running",
        "percpu kstub_live_percpu a",
        "percpu runqueues",
        "ps",
        "ps -A",
        "ps -s",
        "ps -l",
        "ps -m",
        "ps -t",
        "ps -a",
        "ps -p",
        "ps -c 1",
        "ps -S",
        "ps -G",
        "rd -a linux_banner",
        "rd -p 1000 200",
        "runq",
        "runq -t",
        "runq -T",
        "runq -m",
        "runq -g",
        "runq -c 0",
        "struct -o task_struct",
        "struct task_struct init_task",
        "struct rq.nr_running runqueues:a",
        "sym schedule",
        "sym -m kstub_live",
        "sym -q kstub_live",
        "sys",
        "task 1",
        "tree -t maple -s vm_area_struct.vm_start &init_mm.mm_mt",
        "union futex_key",
        "vm 1",
        "vm -v 1",
        "vtop init_task linux_banner",
        "whatis jiffies",
        "whatis struct file",
        "why 0",
        "why init_task",
        "why 7ffffffff000",
        "why ffff800000000000",
        "why phys:100000000000",
    ]
    .map(str::to_owned)
    .to_vec();
    lines.extend([
        format!("bt -u {pid}"),
        format!("files {pid}"),
        format!("kmem {task:x}"),
        format!("kmem {magic:x}"),
        format!("mount -n {pid}"),
        format!("page {task:x}"),
        format!("page -n 4 {task:x}"),
        format!("rd {magic:x} 64"),
        format!("rd -8 {magic:x} 512"),
        format!("rd -S {task:x} 200"),
        format!("struct task_struct.comm,pid {task:x}"),
        format!("sym {magic:x}"),
        format!("task {task:x}"),
        format!("vm -v {pid}"),
        format!("vtop -c {pid} {magic:x}"),
        format!("why {magic:x}"),
    ]);
    lines.extend((0..planted.cpus).map(|cpu| format!("regs {cpu}")));
    lines.extend((0..planted.cpus).map(|cpu| format!("why -c {cpu} $rsp")));
    lines.extend(["set", "set -c 0", "vm", "files", "set 1", "bt"].map(str::to_owned));
    lines.push(format!("set {pid}"));
    lines.push("vm".to_owned());
    lines
}

/// Commands that cannot be compared, and why.
pub const EXCLUDED: &[(&str, &str)] = &[
    ("dump", "writes the dump that is compared; on a dump it is refused, which is checked apart"),
    ("qemu", "asks QEMU itself, which a dump has none of"),
];

/// Differences between a guest and its dump that are as they should be.
struct Known {
    command: &'static str,
    /// Keys and indexes; `*` is any one, `**` at the end any more.
    path: &'static str,
    /// The format that it is about, or all of them.
    format: Option<&'static str>,
    why: &'static str,
    holds: fn(&Value, &Value) -> bool,
}

const KNOWN: &[Known] = &[
    Known {
        command: "info",
        path: "source/**",
        format: None,
        why: "the header of the source: a guest has a state and ways to its memory, a file a format and a size",
        holds: |_, _| true,
    },
    Known {
        command: "sys",
        path: "dump",
        format: None,
        why: "names the source",
        holds: |live, _| live.as_str().is_some_and(|text| text.starts_with("live guest of QEMU ")),
    },
    Known {
        command: "info",
        path: "ram/**",
        format: Some("elf --paging"),
        why: "has only what page tables map: not what firmware keeps at the end of RAM, nor its ROM; how much is missing \
              is seen by reading all of it",
        holds: |live, dump| live.is_string() && dump.is_string(),
    },
    Known {
        command: "info",
        path: "ram#length",
        format: Some("elf --paging"),
        why: "has only what page tables map: not the firmware's ROM",
        holds: |live, dump| live.as_u64() > dump.as_u64(),
    },
    Known {
        command: "info",
        path: "cpus/*/derived/k_gs_base",
        format: None,
        why: "QEMU's notes have the inactive gs base, its monitor does not show it; that the derived value is the same \
              is seen by 'regs'",
        holds: |live, dump| live.is_string() && dump.is_null(),
    },
    Known {
        command: "regs",
        path: "registers/k_gs_base/*",
        format: None,
        why: "the same",
        holds: |live, dump| live.is_null() != dump.is_null() || live != "known" && dump == "known",
    },
    Known {
        command: "regs",
        path: "registers/*/*",
        format: None,
        why: "QEMU's notes have no efer, x87 and SSE state",
        holds: |live, dump| live == "known" && dump == "not saved" || live.is_string() && dump.is_null(),
    },
];

/// The registers that no note of QEMU's has; all others are compared.
fn not_in_notes(register: &str) -> bool {
    let numbered =
        |prefix: &str| register.strip_prefix(prefix).is_some_and(|number| number.parse::<u8>().is_ok());
    matches!(
        register,
        "efer" | "fctrl" | "fstat" | "ftag" | "fiseg" | "fioff" | "foseg" | "fooff" | "fop" | "mxcsr"
    ) || numbered("st")
        || numbered("xmm")
}

/// Whether a difference is as it should be; with the reason if there is one, and it does not hold.
fn is_known(command: &str, format: &str, (path, live, dump): &Difference) -> Result<(), &'static str> {
    let segments: Vec<&str> = path.split('/').collect();
    let fits = |pattern: &str| {
        let wanted: Vec<&str> = pattern.split('/').collect();
        let (wanted, open) = match wanted.split_last() {
            Some((&"**", first)) => (first.to_vec(), true),
            _ => (wanted, false),
        };
        (segments.len() == wanted.len() || open && segments.len() > wanted.len())
            && wanted.iter().zip(&segments).all(|(want, has)| *want == "*" || want == has)
    };
    let about_register = |known: &Known| {
        known.path != "registers/*/*" || segments.get(1).is_some_and(|register| not_in_notes(register))
    };
    let mut all = KNOWN.iter().filter(|known| {
        known.command == command
            && known.format.is_none_or(|only| only == format)
            && fits(known.path)
            && about_register(known)
    });
    all.next().map_or(Err(""), |known| if (known.holds)(live, dump) { Ok(()) } else { Err(known.why) })
}

/// A path, and what is there on the guest and in the dump.
type Difference = (String, Value, Value);

/// Where two values differ.
fn differences(path: &str, live: &Value, dump: &Value, found: &mut Vec<Difference>) {
    let below = |key: &str| if path.is_empty() { key.to_owned() } else { format!("{path}/{key}") };
    match (live, dump) {
        (Value::Object(a), Value::Object(b)) => {
            for key in a.keys().chain(b.keys().filter(|key| !a.contains_key(*key))) {
                let value = |of: &serde_json::Map<String, Value>| of.get(key).cloned().unwrap_or_default();
                differences(&below(key), &value(a), &value(b), found);
            }
        }
        (Value::Array(a), Value::Array(b)) => {
            if a.len() != b.len() {
                found.push((format!("{path}#length"), a.len().into(), b.len().into()));
            }
            for (index, (a, b)) in a.iter().zip(b).enumerate() {
                differences(&below(&index.to_string()), a, b, found);
            }
        }
        (a, b) if a != b => found.push((path.to_owned(), a.clone(), b.clone())),
        _ => {}
    }
}

/// What is not as it should be: of each command line the differences that nobody has a reason for.
pub fn unexplained(lines: &[String], format: &str, live: &[Value], dump: &[Value]) -> Vec<String> {
    let mut all = Vec::new();
    for ((line, live), dump) in lines.iter().zip(live).zip(dump) {
        let command = line.split(' ').next().unwrap();
        let mut found = Vec::new();
        differences("", live, dump, &mut found);
        let short = |value: &Value| value.to_string().chars().take(200).collect::<String>();
        all.extend(found.iter().filter_map(|one| {
            let why = is_known(command, format, one).err()?;
            let (path, live, dump) = one;
            Some(format!("{line}: {path}: {} on the guest, {} in {format} {why}", short(live), short(dump)))
        }));
    }
    all
}
