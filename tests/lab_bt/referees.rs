//! Backtraces frame for frame against drgn and crash.

use super::*;

/// Referee, set (or nothing for all), symbol at which it goes wrong, and why it is the referee that is.
const KNOWN: &[(&str, &str, &str, &str)] = &[
    // The dump's registers are those that __crash_kexec took before it called; they are what the dump says of the CPU.
    ("crash", "kdump-6.1", "machine_kexec", "called after the registers were taken"),
    ("crash", "kdump-6.1", "__crash_kexec", "where it called machine_kexec"),
];

/// Whether a task was stopped in what the kernel calls in place of an indirect jump or a return. The tables say nothing of
/// it: both referees then go by what is in rbp, which is none of the thunk's. kstub knows what a thunk has on the stack.
fn is_in_thunk(kernel: &Kernel, trace: &Trace) -> bool {
    let innermost = names(kernel, trace).into_iter().next().unwrap_or_default();
    ["__x86_indirect_thunk", "__x86_return_thunk"].iter().any(|thunk| innermost.contains(thunk))
}

fn referee(set: &str, dump: &str, who: &str) -> Option<Value> {
    let made = Command::new("scripts/lab")
        .args(["referee", set, dump, "--who", who])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    assert!(made.status.success(), "{set}: {}", String::from_utf8_lossy(&made.stderr));
    let path = lab::root().join(format!("referee-cache/{set}/{dump}.{who}.json"));
    let facts: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    match facts.get("refused") {
        Some(why) => {
            eprintln!("{set}: {who} refused it: {why}");
            None
        }
        None => Some(facts),
    }
}

fn is_whole(trace: &Trace) -> bool {
    trace.guessed() == 0 && trace.ended.is_complete()
}

/// As many tasks of a set can be in the middle of things.
const CPUS: usize = 4;

/// The frames of one task as drgn has them; `None` where it has none.
fn frames_of_drgn(told: &Value) -> Option<Vec<(u64, String)>> {
    let frames = told["frames"].as_array()?.iter().map(|frame| {
        let pc = frame["pc"].as_str().unwrap().trim_start_matches("0x");
        (u64::from_str_radix(pc, 16).unwrap(), frame["symbol"].as_str().unwrap_or("?").to_owned())
    });
    // What drgn shows of user mode, where it reads through tables that are not the user's, are no frames.
    Some(frames.take_while(|(pc, _)| *pc >= 0xffff_ffff_8000_0000).collect())
}

/// Frame for frame: what drgn has, kstub has, in the same order and with the same pcs.
#[test]
fn as_drgn_has_them() {
    let with_referee = ["qemu-6.1-4l", "qemu-6.12-5l", "kdump-6.1", "qemu-5.10-4l", "qemu-chain-irq-6.12"];
    for set in sets().into_iter().filter(|set| with_referee.contains(&set.name().as_str())) {
        let dump = set.dumps()[0].clone();
        let Some(facts) = referee(&set.name(), &dump.name, "stacks") else { continue };
        let machine = open(&dump, true);
        let (kernel, tracer) = (machine.kernel().unwrap(), Tracer::new(&machine).unwrap());
        let (mut compared, mut differ, mut mutated) = (0, Vec::new(), 0);
        let mut last: Option<Vec<u64>> = None;
        for (task, told) in facts["tasks"].as_object().unwrap() {
            let Some(theirs) = frames_of_drgn(told) else { continue };
            let at = VirtAddr(u64::from_str_radix(task.trim_start_matches("0x"), 16).unwrap());
            let trace = tracer.task(at);
            let (ours, pcs_of_theirs) = (pcs(&trace), theirs.iter().map(|(pc, _)| *pc).collect::<Vec<_>>());
            // drgn unwinds what lies where the stack of a task that has exited was.
            if trace.start == Start::Released {
                continue;
            }
            compared += 1;
            if ours != pcs_of_theirs {
                let at = ours.iter().zip(&pcs_of_theirs).take_while(|(a, b)| a == b).count();
                let symbol =
                    at.checked_sub(1).and_then(|at| theirs.get(at)).map_or("", |(_, name)| name.as_str());
                let known = KNOWN.iter().any(|(who, set_name, name, _)| {
                    *who == "drgn" && (set_name.is_empty() || *set_name == set.name()) && *name == symbol
                });
                let known = known || at == 1 && is_in_thunk(kernel, &trace) && is_whole(&trace);
                // No fewer frames than the referee, even where it is wrong.
                if !known || ours.len() < pcs_of_theirs.len() {
                    differ.push(format!(
                        "{} differ behind {symbol}:\n{:#?}\n{theirs:#?}",
                        told["comm"],
                        names(kernel, &trace)
                    ));
                }
            }
            mutated += usize::from(last.replace(pcs_of_theirs).is_some_and(|other| other == ours));
        }
        assert!(differ.is_empty(), "{}: {} of {compared}\n{}", set.name(), differ.len(), differ.join("\n"));
        assert!(mutated < compared, "{}: every task has the same frames", set.name());
        eprintln!("{}: {compared} tasks as drgn has them", set.name());
    }
}

/// Frame for frame: what crash has, kstub has, in the same order and with the same pcs. crash names aliases otherwise, does
/// not number what was interrupted or does so twice, and shows remains for CPUs in user mode. In a task that was stopped in
/// the middle of things it takes words that earlier calls left for frames: there drgn may outvote it.
#[test]
fn as_crash_has_them() {
    let with_referee = ["qemu-6.1-4l", "qemu-6.12-5l", "kdump-6.1", "qemu-5.10-4l"];
    for set in sets().into_iter().filter(|set| with_referee.contains(&set.name().as_str())) {
        let dump = set.dumps()[0].clone();
        let Some(facts) = referee(&set.name(), &dump.name, "crash_stacks") else { continue };
        let drgn = referee(&set.name(), &dump.name, "stacks").unwrap_or_default();
        let machine = open(&dump, true);
        let (kernel, tracer) = (machine.kernel().unwrap(), Tracer::new(&machine).unwrap());
        let known = |name: &str| {
            KNOWN
                .iter()
                .any(|(who, set_name, at, _)| *who == "crash" && *set_name == set.name() && *at == name)
        };
        let (mut compared, mut outvoted, mut differ, mut mutated) = (0, 0, Vec::new(), 0);
        let mut last: Vec<u64> = Vec::new();
        for (task, told) in facts["tasks"].as_object().unwrap() {
            let at = VirtAddr(u64::from_str_radix(task.trim_start_matches("0x"), 16).unwrap());
            let trace = tracer.task(at);
            // crash shows what the last interrupt left there.
            if trace.in_user_mode() || trace.start == Start::Released {
                continue;
            }
            let mut theirs: Vec<u64> = told["frames"]
                .as_array()
                .unwrap()
                .iter()
                .filter(|frame| !known(frame["symbol"].as_str().unwrap()))
                .filter_map(|frame| {
                    u64::from_str_radix(frame["pc"].as_str()?.trim_start_matches("0x"), 16).ok()
                })
                .collect();
            theirs.dedup();
            // What an interrupted frame has no return address for, crash names in "[exception RIP: ...]" only.
            let interrupted = |pc: u64| {
                trace.frames().any(|frame| {
                    frame.pc == pc && matches!(frame.source, FrameSource::PtRegs | FrameSource::Registers)
                })
            };
            let ours: Vec<u64> = trace.frames().map(|frame| frame.pc).collect();
            let both = |theirs: &[u64]| {
                let mut rest = theirs.iter().peekable();
                ours.iter().all(|pc| rest.next_if_eq(&pc).is_some() || interrupted(*pc))
                    && rest.next().is_none()
            };
            compared += 1;
            let is_drgns = || {
                let frames = frames_of_drgn(&drgn["tasks"][task]).unwrap_or_default();
                frames.iter().map(|(pc, _)| *pc).eq(pcs(&trace)) && !frames.is_empty()
            };
            if !both(&theirs) && is_drgns() {
                eprintln!("{}: {}: drgn has the frames of kstub", set.name(), told["comm"]);
                outvoted += 1;
            } else if !both(&theirs) && is_in_thunk(kernel, &trace) && is_whole(&trace) {
                eprintln!("{}: {}: stopped in a thunk", set.name(), told["comm"]);
                outvoted += 1;
            } else if !both(&theirs) {
                differ.push(format!("{}:\n{:#?}\n{:#}", told["comm"], names(kernel, &trace), told["frames"]));
            }
            mutated += usize::from(both(&last));
            last = theirs;
        }
        assert!(differ.is_empty(), "{}: {} of {compared}\n{}", set.name(), differ.len(), differ.join("\n"));
        assert!(mutated < compared, "{}: every task has the same frames", set.name());
        assert!(compared > 20, "{}: only {compared} tasks", set.name());
        assert!(outvoted <= CPUS, "{}: {outvoted} tasks are not as crash has them", set.name());
        eprintln!("{}: {compared} tasks as crash has them", set.name());
    }
}
