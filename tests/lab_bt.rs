//! Backtraces of real dumps: against the chains that a module built in the guest, against what every stack must end
//! with, and frame for frame against drgn and crash.
//!
//! Truth is the module's own list and the referees; where a referee is wrong, `referees::KNOWN` says why. Each comparison is
//! tried on another CPU's or task's frames, too, and must fail on them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

#[path = "lab_bt/referees.rs"]
mod referees;
mod support;

use kstub::addr::{PhysAddr, PhysRange, VirtAddr};
use kstub::backend::{Backend, Dump, Fact, SavedCpu};
use kstub::command::{self, Context, Focus, Form};
use kstub::debuginfo::Location;
use kstub::debuginfo::find::Places;
use kstub::kernel::stack::{Ended, Start, Trace, Tracer};
use kstub::kernel::{Kernel, Machine, Options};
use kstub::memory::{PhysicalMemory, ReadOutcome};
use kstub::unwind::{Frame, FrameSource};
use object::{Object, ObjectSection, ObjectSymbol};
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use support::lab::{self, DumpFile, Set};

fn open(dump: &DumpFile, with_vmlinux: bool) -> Machine {
    let opened = Dump::open(&dump.path).unwrap_or_else(|e| panic!("{}: {e}", dump.path.display()));
    let beside = dump.path.parent().map(Path::to_owned).filter(|_| with_vmlinux);
    let options =
        Options { vmlinux: None, places: Places { beside, ..Places::default() }, ..Options::default() };
    Machine::open(Arc::new(opened), &options, &|_, _| ()).unwrap()
}

/// The sets that tests are about: with `KSTUB_LAB_SETS` (names between blanks) only those.
fn sets() -> Vec<Set> {
    let only = std::env::var("KSTUB_LAB_SETS").ok();
    let wanted = |set: &Set| only.as_ref().is_none_or(|only| only.split(' ').any(|name| name == set.name()));
    lab::sets().unwrap_or_default().into_iter().filter(wanted).collect()
}

fn name_of(kernel: &Kernel, pc: u64) -> String {
    kernel.symbolize(VirtAddr(pc)).map_or_else(|| format!("{pc:#x}"), |found| found.name.to_owned())
}

fn names(kernel: &Kernel, trace: &Trace) -> Vec<String> {
    trace.frames().map(|frame| name_of(kernel, frame.lookup_pc())).collect()
}

/// Whether `wanted` are among `found` in their order.
fn in_order(found: &[String], wanted: &[String]) -> bool {
    let mut rest = found.iter();
    wanted.iter().all(|name| rest.any(|found| found == name))
}

fn task_list(kernel: &Kernel) -> Vec<VirtAddr> {
    kernel.tasks().unwrap().tasks.iter().map(|task| task.at).collect()
}

/// Each chain's frames are on the CPU that panicked, in order, and on no other.
#[test]
fn chains_are_found_whole() {
    let mut seen = 0;
    for set in sets() {
        let Some(frames) = set.json["chain"]["frames"].as_array().filter(|frames| !frames.is_empty()) else {
            continue;
        };
        let wanted: Vec<String> = frames.iter().map(|name| name.as_str().unwrap().to_owned()).collect();
        let machine = open(&set.dumps()[0], false);
        let (kernel, tracer) = (machine.kernel().unwrap(), Tracer::new(&machine).unwrap());
        let panicked = kernel.panic_cpu().unwrap_or_else(|| panic!("{}: no CPU panicked", set.name()));
        for cpu in machine.cpus() {
            let trace = tracer.cpu(cpu.id);
            let found = names(kernel, &trace);
            let has = in_order(&found, &wanted);
            assert_eq!(has, cpu.id == panicked, "{} CPU {}: {wanted:?} in {found:#?}", set.name(), cpu.id);
        }
        let trace = tracer.cpu(panicked);
        assert!(trace.user().is_some(), "{}: no user registers at the bottom: {:?}", set.name(), trace.ended);
        match set.json["chain"]["how"].as_str().unwrap() {
            "nmi" => {
                let events: Vec<_> = trace.boundaries().map(|boundary| boundary.event.to_string()).collect();
                assert_eq!(events[..2], ["NMI", "interrupt"], "{}", set.name());
                assert!(events.last().unwrap().starts_with("system call"), "{}: {events:?}", set.name());
                let stacks: Vec<_> =
                    trace.segments.iter().filter_map(|s| Some(s.stack?.kind.name())).collect();
                assert_eq!(stacks[..2], ["NMI exception stack", "IRQ stack"], "{}", set.name());
            }
            "overflow" => {
                let events: Vec<_> = trace.boundaries().map(|boundary| boundary.event.to_string()).collect();
                assert!(events[0].starts_with("double fault"), "{}: {events:?}", set.name());
                assert!(found_many(&names(kernel, &trace), "kstub_recursion"), "{}", set.name());
            }
            "kprobe" => {
                let restored = trace.frames().filter(|frame| frame.restored == Some("kretprobe")).count();
                assert_eq!(restored, 1, "{}", set.name());
            }
            "graph" => {
                let traced = |frame: &&Frame| frame.restored == Some("function graph tracer");
                assert_eq!(trace.frames().filter(traced).count(), 2, "{}", set.name());
                assert_eq!(trace.guessed(), 0, "{}", set.name());
            }
            "bpf" => assert_eq!(trace.guessed(), 0, "{}", set.name()),
            // One after the other: the second interrupts what the first did, and not the entry code between them.
            "nested" => {
                let events: Vec<_> = trace.boundaries().map(|boundary| boundary.event.to_string()).collect();
                assert_eq!(events.iter().filter(|event| *event == "NMI").count(), 1, "{}", set.name());
                let torn = trace.boundaries().next().unwrap().saved.regs.pc().unwrap();
                assert!(!name_of(kernel, torn).contains("nmi"), "{}: {torn:#x}", set.name());
                assert_eq!(trace.guessed(), 0, "{}", set.name());
            }
            _ => {}
        }
        seen += 1;
    }
    eprintln!("{seen} chains");
}

fn found_many(found: &[String], name: &str) -> bool {
    found.iter().filter(|found| *found == name).count() > 50
}

/// pcs of the frames that a referee can have seen: not what an NMI left in front of the registers of the dump.
fn pcs(trace: &Trace) -> Vec<u64> {
    let remains = trace.frames().next().is_some_and(|frame| frame.source == FrameSource::Remains);
    let segments = trace.segments.iter().skip(usize::from(remains));
    segments.flat_map(|segment| &segment.frames).map(|frame| frame.pc).collect()
}

/// Where a walk may end without a user below.
const ROOTS: &[&str] = &[
    "ret_from_fork",
    "ret_from_fork_asm",
    "secondary_startup_64",
    "secondary_startup_64_no_verify",
    "common_startup_64",
];

fn check_root(kernel: &Kernel, task: VirtAddr, trace: &Trace) -> Result<(), String> {
    if trace.guessed() != 0 {
        return Err(format!("{} guesses", trace.guessed()));
    }
    let user_task = kernel.task(task).mm.flatten().is_some();
    match &trace.ended {
        Ended::User(regs) => match regs.in_user_mode() {
            Some(true) => Ok(()),
            other => Err(format!("ends in user mode with {other:?}")),
        },
        Ended::EntryGap { .. } => Ok(()),
        Ended::Root { pc } => {
            let root = name_of(kernel, pc.wrapping_sub(1));
            let root = if ROOTS.contains(&root.as_str()) { root } else { name_of(kernel, *pc) };
            match (ROOTS.contains(&root.as_str()), user_task) {
                (true, false) => Ok(()),
                (true, true) => Err(format!("a user's task ends at {root}")),
                (false, _) => Err(format!("ends at {root}")),
            }
        }
        Ended::NotStarted if trace.start == Start::Released => Ok(()),
        // makedumpfile takes pages of kernels newer than itself for a user's.
        Ended::Broken { why, .. }
            if trace.start == Start::Unreadable && why.contains("excluded by the dump's filter") =>
        {
            Ok(())
        }
        other => Err(format!("{:?}: {other:?}", trace.start)),
    }
}

/// Every task of every dump, with its vmlinux and without; and none with a stack pointer that is off by a word.
#[test]
fn every_task_reaches_its_root() {
    for set in sets() {
        let dumps: Vec<_> = set.dumps().into_iter().filter(|d| d.complete && d.split.is_empty()).collect();
        let filtered = dumps.iter().find(|dump| dump.filter_level == Some(31));
        for (dump, with_vmlinux) in [(dumps.first(), true), (dumps.first(), false), (filtered, false)] {
            let Some(dump) = dump else { continue };
            let machine = open(dump, with_vmlinux);
            let (kernel, tracer) = (machine.kernel().unwrap(), Tracer::new(&machine).unwrap());
            let tasks = task_list(kernel);
            let traces = tracer.tasks(&tasks);
            assert_eq!(traces.len(), tasks.len());
            let mut bad = Vec::new();
            let mut passed_when_wrong = Vec::new();
            for (task, trace) in tasks.iter().zip(&traces) {
                assert_eq!(trace.task, Some(*task), "in the order of the tasks");
                let who = || format!("{:?}", kernel.task(*task).comm);
                if let Err(why) = check_root(kernel, *task, trace) {
                    bad.push(format!("{}: {why}\n{:#?}", who(), names(kernel, trace)));
                }
                let Some(first) = trace.frames().next().filter(|_| trace.start == Start::SwitchedOut) else {
                    continue;
                };
                let wrong = tracer.from(None, Some(*task), None, Some(first.sp + 8));
                if names(kernel, &wrong) == names(kernel, trace) {
                    passed_when_wrong.push(who());
                }
            }
            assert!(bad.is_empty(), "{}/{}: {}", set.name(), dump.name, bad.join("\n"));
            // What goes on by rbp finds its way again; what goes by rsp must not.
            assert!(
                passed_when_wrong.len() < tasks.len() / 2 || tasks.len() < 8 || by_rbp(&traces),
                "{}: a wrong stack pointer makes no difference to {passed_when_wrong:?}",
                set.name()
            );
            eprintln!("{}/{}: {} tasks", set.name(), dump.name, tasks.len());
        }
    }
}

/// Whether `__schedule` keeps a frame pointer in this kernel.
fn by_rbp(traces: &[Trace]) -> bool {
    let second = traces.iter().filter_map(|trace| trace.frames().nth(1));
    second.clone().filter(|frame| frame.why.to_string().contains("sp:bp")).count() * 2 > second.count()
}

/// The command: a CPU in user mode has its registers and no frames, and JSON has what text has.
#[test]
fn the_command_says_what_the_walk_found() {
    for set in sets().iter().take(6) {
        let machine = open(&set.dumps()[0], false);
        let run = |line: &str| {
            let context = Context {
                machine: &machine,
                cpu: machine.first_cpu(),
                task: None,
                focus: &Focus::default(),
                form: Form::Both,
            };
            command::run(&context, line).unwrap_or_else(|error| panic!("{line}: {error}"))
        };
        let all = run("bt -a");
        let traces = all.json["traces"].as_array().unwrap();
        assert_eq!(traces.len(), machine.cpus().len());
        for (cpu, trace) in machine.cpus().iter().zip(traces) {
            let alone = run(&format!("bt -c {}", cpu.id));
            assert_eq!(alone.json["traces"][0], *trace, "{}", set.name());
            let user = cpu.regs.in_user_mode() == Some(true);
            let frames =
                trace["segments"].as_array().unwrap().iter().map(|s| s["frames"].as_array().unwrap().len());
            if user && trace["parked"].is_null() {
                assert_eq!(frames.sum::<usize>(), 0, "{}", set.name());
                assert!(alone.text.contains("(in user mode)"), "{}", alone.text);
            } else {
                let shown = alone.text.lines().filter(|line| line.trim_start().starts_with('#')).count();
                assert_eq!(frames.sum::<usize>(), shown, "{}", alone.text);
            }
        }
        let each = run("foreach bt --why");
        assert!(each.text.contains("ORC type:call"), "{}", set.name());
        let overflow =
            if set.json["chain"]["how"] == "overflow" { "it has overflowed" } else { "No stack overflows" };
        assert!(run("bt -v").text.contains(overflow), "{}", set.name());
        let nobody = run("bt -R no_such_function -a");
        assert_eq!(nobody.json["traces"].as_array().unwrap().len(), 0);
        assert_eq!(nobody.text, "no backtrace has 'no_such_function' in it\n");
    }
}

/// The words of a frame are on its stack, and one that is a return address has the name of the frame that it leads to,
/// also behind a call that never returns.
#[test]
fn words_of_frames_are_on_their_stack_and_named_as_frames_are() {
    let (mut switched, mut compared, mut shifted) = (0, 0, 0);
    for set in sets() {
        let machine = open(&set.dumps()[0].clone(), true);
        let context = Context {
            machine: &machine,
            cpu: machine.first_cpu(),
            task: None,
            focus: &Focus::default(),
            form: Form::Both,
        };
        let answer = command::run(&context, "bt -a -F").unwrap_or_else(|why| panic!("{}: {why}", set.name()));
        let what = set.name();
        let hex = |value: &Value| {
            u64::from_str_radix(value.as_str().unwrap().trim_start_matches("0x"), 16).unwrap()
        };
        for trace in answer.json["traces"].as_array().unwrap() {
            let segments = trace["segments"].as_array().unwrap();
            switched += segments.windows(2).filter(|two| two[0]["boundary"].is_null()).count();
            let frames = segments.iter().flat_map(|segment| segment["frames"].as_array().unwrap());
            let names: std::collections::BTreeMap<u64, &str> = frames
                .filter(|frame| !frame["pc_at"].is_null() && frame["restored"].is_null())
                .filter_map(|frame| Some((hex(&frame["pc_at"]), frame["symbol"].as_str()?)))
                .collect();
            for segment in segments.iter().filter(|segment| !segment["stack"].is_null()) {
                let stack = hex(&segment["stack"]["start"])..hex(&segment["stack"]["end"]);
                let words =
                    segment["frames"].as_array().unwrap().iter().flat_map(|f| f["words"].as_array().unwrap());
                for word in words {
                    let at = hex(&word["at"]);
                    assert!(stack.contains(&at), "{what}: {word} is not on {stack:x?}");
                    let Some(name) = names.get(&at) else { continue };
                    compared += 1;
                    let shown = word["name"].as_str().unwrap_or_else(|| panic!("{what}: {word}: {name}"));
                    let found = shown.split(['+', ' ']).next().unwrap();
                    assert!(found == *name, "{what}: {word}: {name}");
                    shifted += usize::from(names.get(&(at + 8)) == Some(name));
                }
            }
        }
    }
    assert!(lab::sets().is_none() || switched > 3 && compared > 50, "{switched} {compared}");
    // Mutation check: but for recursions the next word has another name.
    assert!(shifted * 10 <= compared, "{shifted} {compared}");
}

/// Code that the tables leave out, entered as if the task's last call had gone there: thunks, an address that is no code, and
/// the system call's entry with the user's stack pointer.
#[test]
fn thunks_bad_calls_and_the_entry_gap() {
    for set in sets() {
        let machine = open(&set.dumps()[0], false);
        let (kernel, tracer) = (machine.kernel().unwrap(), Tracer::new(&machine).unwrap());
        let sleeping = task_list(kernel).into_iter().map(|task| (task, tracer.task(task)));
        let (task, whole) = sleeping.filter(|(_, trace)| trace.start == Start::SwitchedOut).nth(1).unwrap();
        let first = whole.frames().next().unwrap();
        let thunk = |name: &str| kernel.symbol(name).map(|at| at.0);
        let codes =
            [thunk("__x86_indirect_thunk_rax"), thunk("__x86_return_thunk"), Some(0), Some(0xdead_0000)];
        for pc in codes.into_iter().flatten() {
            let trace = tracer.from(None, Some(task), Some(pc), first.pc_at);
            let (found, expected): (Vec<_>, Vec<_>) = (trace.frames().collect(), whole.frames().collect());
            assert_eq!(found[0].pc, pc);
            let pcs =
                |frames: &[&kstub::unwind::Frame]| frames.iter().map(|frame| frame.pc).collect::<Vec<_>>();
            assert_eq!(pcs(&found[1..]), pcs(&expected), "{} at {pc:#x}: {}", set.name(), found[1].why);
            assert_eq!((trace.guessed(), trace.ended.is_complete()), (0, true), "{}", set.name());
            // A word off, the top of the stack is another.
            let wrong = tracer.from(None, Some(task), Some(pc), first.pc_at.map(|at| at + 16));
            assert_ne!(wrong.frames().nth(1).map(|frame| frame.pc), Some(first.pc), "{}", set.name());
        }
        let entry = kernel.symbol("entry_SYSCALL_64").unwrap();
        let cpu = machine.first_cpu();
        let trace = tracer.from(Some(cpu), None, Some(entry.0), Some(0x7ffd_1234_5678));
        let Ended::EntryGap { pc, user } = &trace.ended else { panic!("{}: {:?}", set.name(), trace.ended) };
        assert_eq!((*pc, user.sp()), (entry.0, Some(0x7ffd_1234_5678)), "{}", set.name());
    }
}

/// The debug file of a module that the lab built or unpacked; `dm_mod` is in `dm-mod.ko.debug`.
fn debug_file(set: &Set, module: &str) -> Option<PathBuf> {
    let mut directories = vec![lab::root().join(set.json["modules"].as_str()?)];
    while let Some(directory) = directories.pop() {
        for path in std::fs::read_dir(&directory).unwrap().map(|entry| entry.unwrap().path()) {
            let name = path.file_name()?.to_string_lossy().replace('-', "_");
            if path.is_dir() {
                directories.push(path);
            } else if name == format!("{module}.ko.debug") {
                return Some(path);
            }
        }
    }
    None
}

fn build_id_of(file: &Path) -> String {
    let bytes = std::fs::read(file).unwrap();
    let elf = object::File::parse(&*bytes).unwrap();
    elf.build_id().unwrap().unwrap().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What addr2line says of the place `offset` bytes into the function `name` of a module's file: function, file and line
/// from the innermost out.
fn addr2line(file: &Path, name: &str, offset: u64) -> Vec<(String, String, String)> {
    let bytes = std::fs::read(file).unwrap();
    let elf = object::File::parse(&*bytes).unwrap();
    let symbol = elf.symbols().find(|symbol| symbol.name() == Ok(name)).unwrap();
    let section = elf.section_by_index(symbol.section_index().unwrap()).unwrap();
    let output = Command::new("addr2line")
        .args(["-f", "-i", "-e"])
        .arg(file)
        .arg(format!("--section={}", section.name().unwrap()))
        .arg(format!("{:#x}", symbol.address() + offset))
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    let place = |place: &str| {
        let (path, line) = place.split(" (disc").next().unwrap().rsplit_once(':').unwrap();
        (path.rsplit('/').next().unwrap().to_owned(), line.to_owned())
    };
    let pair = |pair: &[&str]| {
        let (file, line) = place(pair[1]);
        (pair[0].to_owned(), file, line)
    };
    lines.chunks(2).map(pair).collect()
}

/// The lines of frames in modules, by the modules' own files where their sections are in memory; none by a file of
/// another build, which the lab may have by now.
#[test]
fn lines_of_modules_are_those_of_addr2line() {
    let (mut same, mut inlined, mut elsewhere, mut modules) = (0, 0, 0, BTreeSet::new());
    for set in sets().iter().filter(|set| set.name().contains("chain")) {
        let machine = open(&set.dumps()[0], true);
        let (kernel, tracer) = (machine.kernel().unwrap(), Tracer::new(&machine).unwrap());
        let cpus = machine.cpus().iter().map(|cpu| tracer.cpu(cpu.id));
        let traces: Vec<Trace> = tracer.tasks(&task_list(kernel)).into_iter().chain(cpus).collect();
        let pcs: BTreeSet<u64> =
            traces.iter().flat_map(Trace::frames).map(|frame| frame.lookup_pc()).collect();
        for pc in pcs {
            let found = kernel.symbolize(VirtAddr(pc));
            let Some((found, module)) = found.and_then(|found| Some((found, found.module?))) else {
                continue;
            };
            let Some(file) = debug_file(set, module) else { continue };
            let shown = |at: u64| -> Vec<(String, String, String)> {
                let places = kernel.locate(VirtAddr(at)).unwrap_or_default();
                let last = |path: &str| path.rsplit('/').next().unwrap_or_default().to_owned();
                let one = |place: Location| {
                    let file = place.file.as_deref().map_or_else(|| "??".to_owned(), last);
                    (place.function.unwrap_or_default(), file, place.line.unwrap_or(0).to_string())
                };
                places.into_iter().map(one).collect()
            };
            let build_id = kernel.modules().at(VirtAddr(pc)).and_then(|module| module.build_id.clone());
            if Some(build_id_of(&file)) != build_id {
                assert!(shown(pc).is_empty(), "{}: {found} by the file of another build", set.name());
                continue;
            }
            let wanted = addr2line(&file, found.name, found.offset);
            assert_eq!(shown(pc), wanted, "{}: {pc:#x} {found}", set.name());
            same += 1;
            inlined += usize::from(wanted.len() > 1);
            elsewhere += usize::from(shown(pc + 0x20) != wanted);
            modules.insert(module.to_owned());
        }
    }
    if !sets().is_empty() {
        println!("{same} frames, {inlined} with inlined functions, in {modules:?}");
        assert!(same >= 40 && inlined >= 3 && elsewhere * 10 >= same * 9, "{same} {inlined} {elsewhere}");
    }
}

/// Without ORC: call frame information finds the same frames, for stacks that no probe is on.
#[test]
fn call_frames_find_the_same() {
    for name in ["qemu-6.1-4l", "qemu-6.12-5l", "qemu-chain-irq-6.12"] {
        let Some(set) = sets().into_iter().find(|set| set.name() == name) else { continue };
        let machine = open(&set.dumps()[0], true);
        let kernel = machine.kernel().unwrap();
        let (by_orc, by_cfi) = (Tracer::new(&machine).unwrap(), Tracer::new(&machine).unwrap().without_orc());
        let (mut same, mut bad, mut modules) = (0, Vec::new(), 0);
        for task in task_list(kernel) {
            let (orc, cfi) = (by_orc.task(task), by_cfi.task(task));
            if orc.start == Start::Released {
                continue;
            }
            if orc.frames().any(|frame| kernel.symbolize(VirtAddr(frame.pc)).is_none()) {
                continue;
            }
            modules += usize::from(orc.frames().any(|frame| {
                kernel.symbolize(VirtAddr(frame.pc)).is_some_and(|found| found.module.is_some())
            }));
            match pcs(&orc) == pcs(&cfi) && cfi.guessed() == 0 && cfi.ended.is_complete() {
                true => same += 1,
                false => bad.push(format!(
                    "{:#?}\n{:#?}\n{:?}",
                    names(kernel, &orc),
                    names(kernel, &cfi),
                    cfi.ended
                )),
            }
        }
        assert!(bad.is_empty(), "{name}: {} differ, {same} do not\n{}", bad.len(), bad.join("\n"));
        assert!(same > 80, "{name}: {same}");
        assert!(modules > 3 || !name.contains("chain"), "{name}: {modules} have been in modules");
        let used = by_cfi
            .tasks(&task_list(kernel))
            .iter()
            .flat_map(|t| t.frames())
            .any(|f| f.source == FrameSource::Orc);
        assert!(!used, "{name}: ORC was used");
    }
}

/// A dump in which the words of some pages are others.
struct Corrupt {
    dump: Arc<Dump>,
    /// By page: what the words in it are mixed with.
    pages: std::collections::BTreeMap<u64, u64>,
}

impl PhysicalMemory for Corrupt {
    fn read_phys(&self, at: PhysAddr, buf: &mut [u8]) -> ReadOutcome {
        let outcome = self.dump.read_phys(at, buf);
        for (at, byte) in (at.0..).zip(buf.iter_mut()) {
            if let Some(seed) = self.pages.get(&(at >> 12)) {
                // Some words stay, some lead a little off, some are anything.
                let word = (at >> 3).wrapping_mul(*seed | 1).rotate_left(23);
                match word % 8 {
                    0 => *byte ^= (word >> (at % 8 * 8)) as u8,
                    1 if at % 8 == 0 => *byte = byte.wrapping_add(8),
                    2 if at % 8 == 1 => *byte ^= 1,
                    _ => {}
                }
            }
        }
        outcome
    }
    fn ranges(&self) -> Vec<PhysRange> {
        self.dump.ranges()
    }
}

impl Backend for Corrupt {
    fn saved_cpus(&self) -> &[SavedCpu] {
        self.dump.saved_cpus()
    }
    fn vmcoreinfo_note(&self) -> Option<&[u8]> {
        self.dump.vmcoreinfo_note()
    }
    fn phys_base_hints(&self) -> Vec<u64> {
        self.dump.phys_base_hints()
    }
    fn facts(&self) -> Vec<Fact> {
        self.dump.facts()
    }
    fn problems(&self) -> Vec<String> {
        self.dump.problems()
    }
}

/// Stacks with wrong words in them: walks end, none comes to the same frame twice, and frames after a break are either
/// guesses that say so or proven by the tables.
#[test]
fn corrupt_stacks_are_bounded() {
    for set in sets().iter().take(3) {
        let dump = Arc::new(Dump::open(&set.dumps()[0].path).unwrap());
        let whole = Machine::open(dump.clone(), &Options::default(), &|_, _| ()).unwrap();
        let kernel = whole.kernel().unwrap();
        let mut stacks: Vec<_> = whole.cpus().iter().flat_map(|cpu| kernel.cpu_stacks(cpu.id)).collect();
        stacks.extend(task_list(kernel).into_iter().filter_map(|task| kernel.task_stack(task)));
        let space = kernel.found().space;
        let frames_of_stacks = stacks.iter().flat_map(|stack| (stack.start..stack.end).step_by(4096));
        let pages: Vec<u64> = frames_of_stacks
            .filter_map(|at| Some(space.translate(&*dump, VirtAddr(at)).ok()?.phys.0 >> 12))
            .collect();
        let untouched: usize = {
            let tracer = Tracer::new(&whole).unwrap();
            tracer.tasks(&task_list(kernel)).iter().map(|trace| trace.frames().count()).sum()
        };
        for seed in [3, 0x9e37_79b9_7f4a_7c15, 0x1234_5678_9abc_def1] {
            let pages = pages.iter().map(|page| (*page, seed)).collect();
            let corrupt = Corrupt { dump: dump.clone(), pages };
            let machine = Machine::open(Arc::new(corrupt), &Options::default(), &|_, _| ()).unwrap();
            let (kernel, tracer) = (machine.kernel().unwrap(), Tracer::new(&machine).unwrap());
            let started = std::time::Instant::now();
            let tasks = task_list(kernel);
            let traces = tracer.tasks(&tasks);
            assert!(started.elapsed().as_secs() < 60, "{}: {:?}", set.name(), started.elapsed());
            let mut broken = 0;
            for trace in &traces {
                let mut seen = std::collections::BTreeSet::new();
                for segment in &trace.segments {
                    let mut last = 0;
                    for frame in &segment.frames {
                        assert!(
                            seen.insert((frame.pc, frame.sp, frame.exact)),
                            "{}: twice at {:#x}",
                            set.name(),
                            frame.sp
                        );
                        assert!(frame.sp >= last, "{}: down to {:#x}", set.name(), frame.sp);
                        last = frame.sp;
                    }
                }
                broken += usize::from(!trace.ended.is_complete() || trace.guessed() > 0);
            }
            let found: usize = traces.iter().map(|trace| trace.frames().count()).sum();
            assert!(broken > tasks.len() / 4, "{}: only {broken} of {} are broken", set.name(), tasks.len());
            assert!(found < untouched * 8, "{}: {found} frames of {untouched}", set.name());
            eprintln!("{}: {broken} of {} broken, {found} frames of {untouched}", set.name(), tasks.len());
        }
    }
}
