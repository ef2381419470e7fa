//! `kstub run` and the doors that a session in gdb opens, on the committed sample: exit codes, lines of JSON,
//! commands from standard input, `kstub.py` loaded by hand, `info os`.
//!
//! What the commands answer is checked where they are; here, that it comes through whole.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod support;

use serde_json::Value;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use support::gdb_session::KSTUB;

const DUMP: &str = "tests/data/sample/vmcore";
const EXIT_FAILURE: i32 = 1;
const EXIT_USAGE: i32 = 2;
const EXIT_UNREADABLE: i32 = 6;

fn run_with(arguments: &[&str], input: &str) -> Output {
    let mut kstub = Command::new(KSTUB)
        .arg("run")
        .args(arguments)
        .env_remove("DEBUGINFOD_URLS")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // One that fails early reads nothing.
    let _ = kstub.stdin.take().unwrap().write_all(input.as_bytes());
    kstub.wait_with_output().unwrap()
}

fn run(arguments: &[&str]) -> Output {
    run_with(arguments, "")
}

fn out(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

fn lines(output: &Output) -> Vec<Value> {
    out(output)
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}")))
        .collect()
}

fn fact(name: &str) -> String {
    let text = std::fs::read_to_string("tests/data/sample/facts.txt").unwrap();
    text.lines().find_map(|line| line.strip_prefix(&format!("{name}="))).unwrap().to_owned()
}

#[test]
fn each_command_answers_in_turn_and_a_failure_is_told_by_the_exit_code() {
    let good = run(&[DUMP, "ps 1", "sym init_task"]);
    assert_eq!(good.status.code(), Some(0), "{}", said(&good));
    let (init, symbol) = (out(&good).find("init").unwrap(), out(&good).find("init_task").unwrap());
    assert!(init < symbol, "{}", out(&good));
    let address = fact("kallsyms.init_task");
    assert!(out(&good).contains(address.trim_start_matches("0x")), "{}", out(&good));

    let mixed = run(&[DUMP, "ps 1", "sym no_such_symbol", "sym init_task"]);
    assert_eq!(mixed.status.code(), Some(EXIT_FAILURE));
    assert_eq!(out(&mixed), out(&good), "the others run all the same, and errors stay off standard output");
    assert!(said(&mixed).contains("no_such_symbol"), "{}", said(&mixed));
}

#[test]
fn json_is_one_line_for_each_command() {
    let output = run(&[DUMP, "--json", "ps 1", "sym no_such_symbol", "log"]);
    assert_eq!(output.status.code(), Some(EXIT_FAILURE));
    let answers = lines(&output);
    assert_eq!(answers.len(), 3);
    for (answer, command) in answers.iter().zip(["ps 1", "sym no_such_symbol", "log"]) {
        let answer = answer.as_object().unwrap();
        assert_eq!(answer["schema"], 1);
        assert_eq!(answer["command"], command);
        assert_ne!(answer.contains_key("result"), answer.contains_key("error"), "{command}");
        assert_eq!(answer.len(), 3, "{command}");
    }
    assert_eq!(answers[0]["result"]["tasks"][0]["comm"], "init");
    assert!(answers[1]["error"].as_str().unwrap().contains("no_such_symbol"));
    assert_eq!(said(&output), "", "with --json an error is a line of JSON");
}

#[test]
fn commands_come_from_standard_input() {
    let typed = run(&[DUMP, "--json", "ps 1", "set 1", "task", "sym init_task"]);
    let piped = run_with(&[DUMP, "--json", "ps 1", "-", "sym init_task"], "# a comment\n\n  set 1  \ntask\n");
    assert_eq!(typed.status.code(), Some(0), "{}", said(&typed));
    assert_eq!(lines(&typed).len(), 4);
    assert_eq!(lines(&piped), lines(&typed), "in their place among the arguments, comments left out");
    let none = run_with(&[DUMP, "-"], "");
    assert_eq!((none.status.code(), out(&none).as_str()), (Some(0), ""));
    let failing = run_with(&[DUMP, "-"], "nosuch\nsym init_task\n");
    assert_eq!(failing.status.code(), Some(EXIT_FAILURE));
    assert!(said(&failing).contains("unknown command 'nosuch'") && out(&failing).contains("init_task"));
}

#[test]
fn what_one_command_chooses_holds_for_those_behind_it() {
    let pid = fact("spin.pid");
    let output = run(&[DUMP, "--json", &format!("set {pid}"), "task"]);
    assert_eq!(output.status.code(), Some(0), "{}", said(&output));
    let chosen = out(&output);
    assert!(chosen.lines().nth(1).unwrap().contains("kstub-spin"), "{chosen}");
    let other = run(&[DUMP, "--json", "task"]);
    assert!(!out(&other).contains("kstub-spin") && out(&other).contains("kstub-crash"), "{}", out(&other));
    let cpu = run(&[DUMP, "--cpu", "0", "--json", "task"]);
    assert!(out(&cpu).contains("kstub-spin"), "{}", out(&cpu));
}

/// By QEMU's word of where each CPU was.
#[test]
fn a_chosen_cpu_is_the_one_that_registers_are_of() {
    let told = std::fs::read_to_string("tests/data/sample/registers.txt").unwrap();
    let rips: Vec<String> = told
        .lines()
        .filter_map(|line| Some(format!("0x{}", line.strip_prefix("RIP=")?.split(' ').next()?)))
        .collect();
    let [first, second] = rips.as_slice() else { panic!("{told}") };
    let answers =
        lines(&run(&[DUMP, "--json", "regs", "set -c 0", "regs", "set -p", "regs", "set 1", "regs"]));
    let rip = |i: usize| &answers[i]["result"]["registers"]["rip"]["value"];
    // CPU 1 panicked, and a task that sleeps has no registers on any CPU: then it is that again.
    assert_eq!([rip(0), rip(2), rip(4), rip(6)], [second, first, second, second], "{answers:?}");
    assert_ne!(first, second);
}

#[test]
fn wrong_arguments_have_their_own_exit_codes() {
    let none = run(&[DUMP]);
    assert_eq!(none.status.code(), Some(EXIT_USAGE));
    assert!(said(&none).contains("kstub run DUMP help"), "{}", said(&none));
    assert_eq!(run(&[]).status.code(), Some(EXIT_USAGE));
    assert_eq!(run(&["/no/such/dump", "ps"]).status.code(), Some(EXIT_UNREADABLE));
    let cpu = run(&[DUMP, "--cpu", "77", "ps"]);
    assert_eq!(cpu.status.code(), Some(EXIT_FAILURE));
    assert!(said(&cpu).contains("no CPU 77"), "{}", said(&cpu));
    let typo = run(&[DUMP, "pss"]);
    assert_eq!(typo.status.code(), Some(EXIT_FAILURE));
    assert!(said(&typo).contains("unknown command 'pss'"), "{}", said(&typo));
}

/// What stock gdb prints for `commands`, which connect it themselves; `None` where there is no gdb.
fn plain_gdb(commands: &[&str]) -> Option<String> {
    if Command::new("gdb").arg("--version").output().is_err() {
        assert_ne!(std::env::var("CI").as_deref(), Ok("true"), "no gdb: install it");
        eprintln!("skipped: no gdb");
        return None;
    }
    let mut gdb = Command::new("gdb");
    gdb.args(["-nx", "-batch"]).env_remove("DEBUGINFOD_URLS");
    for command in commands {
        gdb.args(["-ex", command]);
    }
    let output = gdb.output().unwrap();
    Some(String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned())
}

#[test]
fn the_script_is_loaded_by_hand_before_or_behind_the_connection() {
    let connect = format!("target remote | {KSTUB} serve {DUMP} --listen -");
    let source = "source scripts/kstub.py";
    assert!(Path::new("scripts/kstub.py").exists());
    for order in [[source, &connect], [&connect, source]] {
        let commands = [order[0], order[1], "ps 1", "kstub sym init_task", "p $task(1)->comm", "help ps"];
        let Some(printed) = plain_gdb(&commands) else { return };
        for want in ["COMM", "\"init\"", fact("kallsyms.init_task").trim_start_matches("0x"), "Which tasks"] {
            assert!(printed.contains(want), "{order:?}: no {want} in {printed}");
        }
        assert!(!printed.contains("Undefined command"), "{order:?}: {printed}");
    }
    // Without a connection there is nobody to answer, and that is what it says.
    let Some(printed) = plain_gdb(&[source, "kstub ps"]) else { return };
    assert!(printed.contains("not connected to kstub") && !printed.contains("Traceback"), "{printed}");
}

#[test]
fn tables_of_info_os() {
    let connect = format!("target remote | {KSTUB} serve {DUMP} --listen -");
    let Some(printed) =
        plain_gdb(&[&connect, "info os", "info os tasks", "info os cpus", "info os nosuch", "p 40+2"])
    else {
        return;
    };
    for want in ["mounts", "kstub-crash", "there is no table 'nosuch'; there are: tasks", "$1 = 42"] {
        assert!(printed.contains(want), "no {want} in {printed}");
    }
    let cpu = printed.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let mut crashed = cpu.filter(|words| words.first() == Some(&fact("crash.cpu").as_str()));
    let here =
        crashed.any(|words| words.contains(&fact("crash.pid").as_str()) && words.contains(&"panicked"));
    assert!(here, "{printed}");
}

/// Types are in the kernel's own memory: without a vmlinux commands answer the same, and only those that miss the source
/// say so, with the cure.
#[test]
fn without_a_vmlinux_only_what_misses_it_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let alone = dir.path().join("vmcore");
    std::fs::copy(DUMP, &alone).unwrap();
    let run_alone = |line: &str| {
        let mut kstub = Command::new(KSTUB);
        kstub.arg("run").arg(&alone).arg(line).env_remove("DEBUGINFOD_URLS").env_remove("KSTUB_DEBUG_DIR");
        kstub.env("XDG_CACHE_HOME", dir.path()).output().unwrap()
    };
    for line in ["ps", "log", "files 1", "struct list_head"] {
        let output = run_alone(line);
        assert_eq!((out(&output), said(&output).as_str()), (out(&run(&[DUMP, line])), ""), "{line}");
    }
    for line in ["dis -l schedule 2", "bt -l"] {
        let text = out(&run_alone(line));
        assert!(text.contains("no vmlinux with debug info") && text.contains("'info'"), "{line}: {text}");
        assert!(!out(&run(&[DUMP, line])).contains("no vmlinux"), "{line}");
    }
    // BTF has no types of most variables, and an address is not passed off as a value.
    let untyped = out(&run_alone("p console_printk"));
    assert!(untyped.contains("type that is not known") && untyped.contains("*(TYPE *)&"), "{untyped}");
    let info = out(&run_alone("info"));
    assert!(info.contains("no vmlinux with debug info") && info.contains("--vmlinux FILE"), "{info}");
}

/// A page, an area and a walk of the tables are of whatever an expression points at.
#[test]
fn addresses_may_be_expressions() {
    let json = |line: &str| {
        let output = run(&[DUMP, "--json", line]);
        assert_eq!(output.status.code(), Some(0), "{line}: {}", said(&output));
        lines(&output)[0]["result"].clone()
    };
    let address = fact("kallsyms.init_task");
    assert_eq!(json("vtop &init_task")[0]["virtual"], address.as_str());
    assert_eq!(json("page &init_task")["pfn"], json(&format!("page {address}"))["pfn"]);
    assert_eq!(json("kmem &init_task")[0]["symbol"]["name"], "init_task");
    assert_eq!(json("why &init_task")["virtual"], address.as_str());
    let stack = json("p init_task.stack")["values"][0]["value"].clone();
    assert_eq!(json("vtop init_task.stack")[0]["virtual"], stack);
    assert_ne!(stack, address.as_str());
    let failed = run(&[DUMP, "page init_task.nosuch"]);
    assert!(said(&failed).contains("has no member 'nosuch'"), "{}", said(&failed));
}

/// The source of a function begins where gdb has its declaration; it is found below a directory that was named.
#[test]
fn the_source_of_a_function() {
    let gdb = ["-nx", "-batch", "-ex", "info functions -q ^panic$", "tests/data/sample/vmlinux"];
    let Ok(told) = Command::new("gdb").args(gdb).output() else { return };
    let told = String::from_utf8(told.stdout).unwrap();
    let line = told.lines().find_map(|line| line.strip_suffix(");")?.split_once(":\t")).unwrap();
    let line: u64 = line.0.parse().unwrap();
    let tree = tempfile::tempdir().unwrap();
    std::fs::create_dir(tree.path().join("kernel")).unwrap();
    let text: String = (1..2000).map(|line| format!("this is line {line}\n")).collect();
    std::fs::write(tree.path().join("kernel/panic.c"), text).unwrap();
    let ask = |line: &str| {
        let output = run(&["--debug-dir", tree.path().to_str().unwrap(), DUMP, "--json", line]);
        lines(&output)[0]["result"].clone()
    };
    let whole = ask("dis -s panic");
    assert_eq!((&whole["source"][0]["line"], &whole["line"]), (&Value::from(line), &Value::Null), "{whole}");
    assert_eq!(whole["source"][0]["text"], format!("this is line {line}"));
    let part = ask("dis -s panic+0x40");
    let marked = part["line"].as_u64().unwrap();
    assert!(marked > line, "{part}");
    assert_eq!(part["source"].as_array().unwrap().last().unwrap()["line"], marked);
    assert!(part["source"].as_array().unwrap().len() < whole["source"].as_array().unwrap().len());
    let nowhere = out(&run(&[DUMP, "dis -s panic"]));
    assert!(nowhere.contains("panic.c") && nowhere.contains("--debug-dir DIR"), "{nowhere}");
}

/// gdb's spelling of options is taken, and what is misspelt has a cure.
#[test]
fn habits_from_gdb() {
    let text = |line: &str| out(&run(&[DUMP, line]));
    assert_eq!(text("p/x 255"), "255 = 0xff\n");
    assert_eq!(text("p/d 0x10"), text("p -d 0x10"));
    assert!(said(&run(&[DUMP, "p/t 1"])).contains("unknown command 'p/t'"));
    assert!(text("p schedule").contains("<schedule>"));
    let missing = said(&run(&[DUMP, "p no_such_name"]));
    assert!(missing.contains("'sym -q TEXT'"), "{missing}");
}
