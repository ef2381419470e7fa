//! The command as a user types it: refusals say what is wrong and how to go on, each with its exit code.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use clap::CommandFactory;
use kstub::cli::Cli;
use std::io::{Seek, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};

const KSTUB: &str = env!("CARGO_BIN_EXE_kstub");

fn kstub(arguments: &[&str]) -> Output {
    Command::new(KSTUB).args(arguments).env_remove("RUST_LOG").output().unwrap()
}

/// Runs `kstub info FILE` on `contents`; the exit code and what it said.
fn info_on(contents: &[u8]) -> (i32, String) {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("dump");
    std::fs::write(&file, contents).unwrap();
    refusal(&["info", file.to_str().unwrap()])
}

fn refusal(arguments: &[&str]) -> (i32, String) {
    let output = kstub(arguments);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.stdout.is_empty(), "{arguments:?} printed {:?}", String::from_utf8_lossy(&output.stdout));
    assert!(said.starts_with("kstub: "), "{arguments:?} said {said:?}");
    assert_eq!(said.lines().count(), 1, "one line, no backtrace: {said}");
    (output.status.code().unwrap(), said)
}

/// The first bytes of an ELF core for `machine` in `class` (1 = 32 bit, 2 = 64 bit) with `data` byte order.
fn elf(class: u8, data: u8, kind: u16, machine: u16) -> Vec<u8> {
    let mut header = vec![0x7f, b'E', b'L', b'F', class, data, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let half = |value: u16| if data == 1 { value.to_le_bytes() } else { value.to_be_bytes() };
    header.extend(half(kind));
    header.extend(half(machine));
    header.resize(4096, 0);
    header
}

#[test]
fn what_is_not_a_dump_is_refused_by_name() {
    const ET_CORE: u16 = 4;
    const ET_EXEC: u16 = 2;
    for (contents, word) in [
        (b"".to_vec(), "empty"),
        (b"hello, this is not a dump\n".repeat(1000), "not a kernel dump"),
        (elf(2, 1, ET_CORE, 183), "aarch64"),
        (elf(2, 2, ET_CORE, 22), "s390"),
        (elf(1, 1, ET_CORE, 3), "i386"),
        (elf(1, 1, ET_CORE, 40), "arm"),
        (elf(2, 1, ET_EXEC, 62), "vmlinux"),
        (vec![0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 0], "gzip"),
        (b"KDUMP   ".to_vec(), "cut"),
    ] {
        let (code, said) = info_on(&contents);
        assert_eq!(code, 3, "{said}");
        assert!(said.to_lowercase().contains(word), "no '{word}' in: {said}");
    }
}

#[test]
fn files_that_cannot_be_read() {
    let dir = tempfile::tempdir().unwrap();
    let (code, said) = refusal(&["info", dir.path().join("absent").to_str().unwrap()]);
    assert_eq!(code, 6, "{said}");
    assert!(said.contains("No such file"), "{said}");
    let (code, said) = refusal(&["info", dir.path().to_str().unwrap()]);
    assert!(said.contains("directory"), "{said}");
    assert_eq!(code, 3, "{said}");
}

/// root reads everything, so the unreadable file is tried as the user nobody.
#[test]
fn an_unreadable_file_is_not_called_a_bad_dump() {
    let dir = tempfile::tempdir().unwrap();
    let set = |path: &Path, mode| std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
    let (program, file) = (dir.path().join("kstub"), dir.path().join("dump"));
    std::fs::copy(KSTUB, &program).unwrap();
    std::fs::write(&file, b"KDUMP   ").unwrap();
    set(dir.path(), 0o755);
    set(&program, 0o755);
    set(&file, 0o000);
    let mut command = Command::new(&program);
    if std::fs::File::open(&file).is_ok() {
        command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).arg(&program);
    }
    let output = command.arg("info").arg(&file).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(6), "{said}");
    assert!(said.contains("not readable for this user"), "{said}");
}

#[test]
fn a_vmlinux_that_only_serving_shows_to_be_damaged() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("vmlinux");
    let mut contents = std::fs::read("tests/data/sample/vmlinux").unwrap();
    // The first program header's p_offset and p_filesz.
    contents[64 + 8..64 + 16].copy_from_slice(&(u64::MAX - 0xff).to_le_bytes());
    contents[64 + 32..64 + 40].copy_from_slice(&0x1000u64.to_le_bytes());
    std::fs::write(&file, contents).unwrap();
    let vmlinux = file.to_str().unwrap();
    let sample = "tests/data/sample/vmcore";
    assert_eq!(kstub(&["info", sample, "--vmlinux", vmlinux]).status.code(), Some(0));
    let (code, said) = refusal(&["serve", sample, "--vmlinux", vmlinux, "--files", "serve", "--listen", "-"]);
    assert_eq!(code, 4, "{said}");
    assert!(said.contains("program header"), "{said}");
}

#[test]
fn wrong_arguments_are_a_usage_error() {
    for arguments in
        [&["frobnicate"][..], &[], &["info"], &["serve", "x", "--listen"], &["info", "--nope", "x"]]
    {
        let output = kstub(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
    }
}

#[test]
fn help_has_examples_and_exit_codes() {
    let help = String::from_utf8(kstub(&["--help"]).stdout).unwrap();
    for word in ["Examples:", "Exit codes:", "kstub gdb vmcore", "target remote"] {
        assert!(help.contains(word), "no '{word}' in:\n{help}");
    }
    for command in ["gdb", "serve", "info"] {
        let help = String::from_utf8(kstub(&[command, "--help"]).stdout).unwrap();
        assert!(help.contains("Examples:"), "{help}");
    }
}

/// Every command and long option there is, by the definitions themselves.
fn names() -> Vec<(String, Vec<String>)> {
    let mut cli = Cli::command().disable_help_subcommand(true);
    cli.build();
    let longs = |command: &clap::Command| {
        command
            .get_arguments()
            .filter_map(|argument| argument.get_long().map(str::to_owned))
            .collect::<Vec<String>>()
    };
    let commands: Vec<_> =
        cli.get_subcommands().map(|command| (command.get_name().to_owned(), longs(command))).collect();
    assert!(commands.len() >= 5 && commands.iter().any(|(_, longs)| longs.len() > 5), "{commands:?}");
    commands
}

#[test]
fn completions_know_every_command_and_option() {
    for shell in ["bash", "zsh", "fish"] {
        let script = String::from_utf8(kstub(&["completions", shell]).stdout).unwrap();
        for (command, longs) in names() {
            assert!(script.contains(&command), "{shell}: no {command}");
            for long in longs {
                let option = if shell == "fish" { format!("-l {long}") } else { format!("--{long}") };
                assert!(script.contains(&option), "{shell}: no {option} of {command}");
            }
        }
        // A shell that is there must at least read the script.
        if let Ok(output) =
            Command::new(shell).args(["-n", "/dev/stdin"]).stdin(script_file(&script)).output()
        {
            assert!(output.status.success(), "{shell}: {}", String::from_utf8_lossy(&output.stderr));
        }
    }
    assert_eq!(kstub(&["completions", "tcsh"]).status.code(), Some(2));
}

fn script_file(text: &str) -> std::fs::File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file.seek(std::io::SeekFrom::Start(0)).unwrap();
    file
}

#[test]
fn the_manual_page_has_every_command_option_and_exit_code() {
    let page = String::from_utf8(kstub(&["man"]).stdout).unwrap();
    // roff wants a hyphen that can be copied to be escaped.
    let plain = page.replace("\\-", "-");
    for (command, longs) in names() {
        assert!(
            plain.contains(&format!(".SH \"KSTUB {}\"", command.to_uppercase())),
            "no {command}: {plain}"
        );
        for long in longs {
            assert!(plain.contains(&format!("--{long}")), "no --{long} of {command}");
        }
    }
    for wanted in [".TH kstub 1", ".SH \"EXIT CODES\"", "5  cannot listen", "kstub gdb vmcore", "KSTUB_GDB"] {
        assert!(plain.contains(wanted), "no {wanted}: {plain}");
    }
}

#[test]
fn addresses_that_cannot_be_listened_on() {
    // The address is checked before the dump is opened.
    for (listen, word) in [("192.0.2.1:1", "--allow-remote"), ("nonsense", "listen"), ("unix:", "path")] {
        let (code, said) = refusal(&["serve", "/nonexistent", "--listen", listen]);
        assert_eq!(code, 5, "{said}");
        assert!(said.contains(word), "no '{word}' in: {said}");
    }
}

const SAMPLE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/sample/vmcore");

#[test]
fn verbose_tells_how_things_were_found_without_colours_off_a_terminal() {
    assert!(kstub(&["info", SAMPLE]).stderr.is_empty());
    let said = String::from_utf8(kstub(&["-v", "info", SAMPLE]).stderr).unwrap();
    for wanted in ["was opened: format", "kernel ", "was found by", "vmlinux"] {
        assert!(said.contains(wanted), "no {wanted:?} in: {said}");
    }
    assert!(
        said.lines().all(|line| line.trim_start().starts_with("INFO ")) && !said.contains('\x1b'),
        "{said}"
    );
    assert_eq!(kstub(&["info", "-v", SAMPLE]).stdout, kstub(&["info", SAMPLE]).stdout);
}

#[test]
fn packets_are_in_the_log_abbreviated() {
    let mut command = Command::new(KSTUB);
    command.args(["serve", SAMPLE, "--listen", "-"]).env("RUST_LOG", "kstub=debug");
    let requests = format!("+$?#3f+$m{}#00+$D#44", "0".repeat(400));
    let output = command.stdin(script_file(&requests)).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    for wanted in ["<- ?", "-> T05thread:", "<- D", "-> OK", "the client detached"] {
        assert!(said.contains(wanted), "no {wanted:?} in: {said}");
    }
    assert!(said.lines().all(|line| line.len() < 400), "{said}");
}

/// What can be of no effect is refused, not ignored.
#[test]
fn options_that_do_not_go_together() {
    for arguments in [
        &["gdb", "vmcore", "--on-disconnect", "leave"][..],
        &["serve", "--qemu", "/nowhere", "--no-stop", "--on-disconnect", "resume"],
    ] {
        let output = kstub(arguments);
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.contains("--on-disconnect"), "{said}");
    }
    // Without the word there is nothing to refuse.
    for arguments in [&["serve", "--qemu", "/nowhere", "--no-stop"][..], &["gdb", "--qemu", "/nowhere"]] {
        assert_eq!(refusal(arguments).0, 7, "{arguments:?}");
    }
}
