//! gdb's own backtraces of real dumps, in each gdb there is: with kstub's script, which helps it out of interrupts and
//! over stack switches, and without, when it has the call frame information that kstub serves.
//!
//! Truth is the list of the module that built the chain, where the guest says that its programs were, and of an argument
//! what the caller had it from. Without the script's unwinder gdb must get less far, or the test would show nothing.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod support;

use std::path::{Path, PathBuf};
use std::process::Command;
use support::gdb_session::{KSTUB, functions, has_in_order};
use support::lab::{self, Set};

/// What gdb prints for `commands`, with the script or without.
fn gdb(gdb: &Path, dump: &Path, script: bool, commands: &[&str]) -> String {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("kstub.sock");
    let listen = format!("unix:{}", socket.display());
    let mut server = Command::new(KSTUB)
        .args(["serve", dump.to_str().unwrap(), "--listen", &listen])
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    for _ in 0..600 {
        if socket.exists() {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    let connect = format!("target remote {}", socket.display());
    let source = format!("source {}/scripts/kstub.py", env!("CARGO_MANIFEST_DIR"));
    let mut session = Command::new(gdb);
    session.args(["-nx", "-batch", "-ex", "set remotetimeout 120", "-ex", &connect]);
    if script {
        session.args(["-ex", &source]);
    }
    session.args(commands.iter().flat_map(|command| ["-ex", command]));
    let output = session.output().unwrap();
    server.kill().unwrap();
    server.wait().unwrap();
    String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
}

fn gdbs() -> Vec<PathBuf> {
    let newest = lab::root().join("tools/bin/gdb-new");
    [PathBuf::from("gdb")].into_iter().chain(newest.exists().then_some(newest)).collect()
}

fn for_each(wanted: impl Fn(&Set) -> bool, check: &mut dyn FnMut(&Set, &Path, &Path, &str)) {
    let only = std::env::var("KSTUB_LAB_SETS").ok();
    let chosen = |set: &Set| only.as_ref().is_none_or(|only| only.split(' ').any(|name| name == set.name()));
    for set in lab::sets().unwrap_or_default().into_iter().filter(|set| wanted(set) && chosen(set)) {
        let dumps = set.dumps();
        let dump = dumps.iter().find(|dump| dump.complete && dump.format == "elf" && !dump.flattened);
        let Some(dump) = dump else { continue };
        for gdb in gdbs() {
            let what = format!("{} in {}", set.name(), gdb.display());
            eprintln!("{what}");
            check(&set, &dump.path, &gdb, &what);
        }
    }
}

/// The frames of each chain, innermost first, as the module has listed them.
fn chain(set: &Set) -> Option<Vec<String>> {
    let frames = set.json["chain"]["frames"].as_array()?;
    Some(frames.iter().map(|frame| frame.as_str().unwrap().to_owned()).collect())
}

#[test]
fn gdb_finds_the_whole_of_a_chain() {
    let mut chains = 0;
    for_each(|set| chain(set).is_some_and(|chain| !chain.is_empty()), &mut |set, dump, program, what| {
        chains += 1;
        let planted = chain(set).unwrap();
        let printed = gdb(program, dump, true, &["bt"]);
        let found = functions(&printed);
        assert!(has_in_order(&found, &planted), "{what}: {planted:?} are not in\n{printed}");
        assert!(printed.contains("<user mode>"), "{what}: it does not end in user mode\n{printed}");
        assert!(!printed.contains("Backtrace stopped"), "{what}:\n{printed}");
        assert!(!printed.contains("0x0000000000000000 in"), "{what}: an invented frame\n{printed}");
        // The mutation: neither unwinder nor library.
        let alone = ["set auto-solib-add off", "nosharedlibrary", "disable unwinder global kstub", "bt"];
        let alone = functions(&gdb(program, dump, true, &alone));
        assert!(!has_in_order(&alone, &planted), "{what}: gdb needs no help");
    });
    assert!(lab::sets().is_none() || chains > 0, "the lab has no chain");
}

/// Arguments that gdb has in registers kept over a stack switch or a replaced return address, that of `behind`: function
/// and argument, and the function and expression that it is from: a register of the user, or the kernel's memory.
const ARGUMENTS: [(&str, [&str; 2], [&str; 2]); 3] = [
    ("do_softirq", ["do_one_initcall", "fn"], ["do_init_module", "mod->init"]),
    ("asm_call_on_stack", ["__do_sys_finit_module", "fd"], ["do_syscall_64", "regs->di"]),
    ("kstub_traced_outer", ["param_attr_store", "len"], ["do_syscall_64", "regs->dx"]),
];

#[test]
fn arguments_outlive_what_switches_stacks() {
    // Prints what an expression is in the frame of a function.
    const SAY: &str = r#"python exec("""
def say(name, expression):
    frame = gdb.newest_frame()
    while frame.name() != name:
        frame = frame.older()
    frame.select()
    print('SAID', int(gdb.parse_and_eval(expression)) & (1 << 64) - 1)
""")"#;
    // The mutation: each word that was taken from a stack is another one, and nothing is kept.
    const MUTATION: &str = r#"python exec("""
for row in FRAMES.frames().values():
    if row['wrong'] and not row['saved'] and row['caller']:
        row['kept'] = []
        row['caller'].update({name: value + 8 for name, value in row['caller'].items() if name[:2] in ('rb', 'r1') and name != 'rbp'})
""")"#;
    let mut switches = 0;
    for_each(|set| chain(set).is_some(), &mut |_, dump, program, what| {
        let functions = functions(&gdb(program, dump, true, &["bt"]));
        let is_there = |name: &&str| functions.iter().any(|function| function == name);
        let wanted: Vec<_> = ARGUMENTS
            .into_iter()
            .filter(|(behind, [of, _], [from, _])| [behind, of, from].into_iter().all(is_there))
            .collect();
        let said = |before: &[&str], [function, expression]: [&str; 2]| {
            let say = format!("python say('{function}', '{expression}')");
            let printed = gdb(program, dump, true, &[before, &[SAY, &say]].concat());
            let said = printed.lines().find_map(|line| line.strip_prefix("SAID ")?.parse::<u64>().ok());
            said.ok_or(printed)
        };
        for (_, argument, source) in &wanted {
            let truth = said(&[], *source);
            assert!(truth.is_ok(), "{what}: {source:?}: {truth:?}");
            assert_eq!(said(&[], *argument), truth, "{what}: {argument:?}");
        }
        if wanted.is_empty() {
            return;
        }
        switches += 1;
        let holds = |(_, argument, source): &(_, _, _)| said(&[MUTATION], *argument) == said(&[], *source);
        assert!(!wanted.iter().all(holds), "{what}: none of these needs what was saved");
    });
    assert!(lab::sets().is_none() || switches > 0, "the lab has no stack switch");
}

#[test]
fn every_cpu_ends_where_it_began() {
    for_each(
        |set| set.json["kind"] == "qemu" && set.json["busy_user_cpu"].is_u64() && set.json["panic"].is_null(),
        &mut |set, dump, program, what| {
            if chain(set).is_some() {
                return;
            }
            for script in [true, false] {
                let printed = gdb(program, dump, script, &["thread apply all bt"]);
                assert!(!printed.contains("internal-error"), "{what}:\n{printed}");
                let threads: Vec<&str> = printed.split("\nThread ").skip(1).collect();
                assert_eq!(threads.len() as u64, set.json["smp"].as_u64().unwrap(), "{what}:\n{printed}");
                let busy = format!("(CPU {}, ", set.json["busy_user_cpu"].as_u64().unwrap());
                for thread in threads {
                    let frames = functions(thread);
                    // Bare gdb ends where the stack of interrupts does, if the stop came there.
                    let softirq =
                        |name: &String| ["handle_softirqs", "__do_softirq"].contains(&name.as_str());
                    if !script && frames.iter().any(softirq) {
                        continue;
                    }
                    assert!(!thread.contains("Backtrace stopped"), "{what}:\n{thread}");
                    let last = frames.last().unwrap();
                    if thread.lines().next().unwrap().contains(&busy) {
                        // The user's own frames are nobody's business but gdb's, who guesses; kstub's script does not.
                        assert!(!script || frames == ["<user"], "{what}: {frames:?}");
                    } else {
                        let roots = [
                            "<user",
                            "user_mode",
                            "secondary_startup_64",
                            "common_startup_64",
                            "ret_from_fork",
                        ];
                        let is_root = |root: &&str| last.starts_with(root);
                        assert!(roots.iter().any(is_root), "{what}: ends in {last}\n{thread}");
                    }
                }
            }
        },
    );
}
