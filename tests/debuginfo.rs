//! Structure layouts from BTF and DWARF against the compiler's own `offsetof` and `sizeof`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use kstub::debuginfo::DebugInfo;
use std::path::{Path, PathBuf};
use std::process::Command;

const TYPES: &str = r"
struct inner { long a; union { int *p; struct { short x, y; }; }; };
typedef const struct inner inner_t;
struct outer {
    char pad[3];
    unsigned flag : 5;
    inner_t several[4];
    volatile inner_t one;
    union { struct { int deep; union { char deeper; long deepest[2]; }; }; double d; };
    enum { ONE, TWO } choice;
    char comm[16];
};
struct outer task;
";

/// Paths asked for; bit-fields have no address to compare with.
const PATHS: [&str; 13] = [
    "pad", "several", "one", "one.a", "one.p", "one.x", "one.y", "deep", "deeper", "deepest", "d", "choice",
    "comm",
];

/// Compiles `source`, or says why not. `scripts/test` installs a compiler, and CI must have one.
fn compile(dir: &Path, name: &str, source: &str, flags: &[&str]) -> Option<PathBuf> {
    let (c, out) = (dir.join(format!("{name}.c")), dir.join(name));
    std::fs::write(&c, source).unwrap();
    let status = match Command::new("gcc").args(flags).arg("-o").arg(&out).arg(&c).status() {
        Ok(status) => status,
        Err(error) => {
            assert_ne!(std::env::var("CI").as_deref(), Ok("true"), "gcc: {error}");
            eprintln!("skipped: gcc: {error}");
            return None;
        }
    };
    assert!(status.success(), "gcc {flags:?}");
    Some(out)
}

/// What the compiler says: (path, offset, size), printed by a program.
fn truth(dir: &Path) -> Option<Vec<(&'static str, u64, u64)>> {
    let lines: String = PATHS
        .iter()
        .map(|p| {
            format!(
                "printf(\"%zu %zu\\n\", offsetof(struct outer, {p}), sizeof(((struct outer *)0)->{p}));\n"
            )
        })
        .collect();
    let source =
        format!("#include <stddef.h>\n#include <stdio.h>\n{TYPES}\nint main(void) {{\n{lines}return 0; }}\n");
    let output = Command::new(compile(dir, "truth", &source, &[])?).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let numbers = text.lines().map(|line| line.split_once(' ').unwrap());
    Some(
        PATHS
            .into_iter()
            .zip(numbers)
            .map(|(p, (o, s))| (p, o.parse().unwrap(), s.parse().unwrap()))
            .collect(),
    )
}

/// Each path's member as `info` has it; the text names the first that differs.
fn compare(info: &DebugInfo, truth: &[(&'static str, u64, u64)]) -> Result<(), String> {
    for &(path, offset, size) in truth {
        let want = Some((offset, Some(size)));
        let got = info.member("outer", path).map(|member| (member.offset, member.size));
        if got != want {
            return Err(format!("{path} is {got:?}, not {want:?}"));
        }
    }
    Ok(())
}

#[test]
fn every_source_agrees_with_the_compiler() {
    let dir = tempfile::tempdir().unwrap();
    let Some(truth) = truth(dir.path()) else { return };
    let program = format!("{TYPES}\nint main(void) {{ return task.pad[0]; }}\n");
    for flags in [
        &["-gbtf"][..],
        &["-g", "-gdwarf-4"],
        &["-g", "-gdwarf-5"],
        &["-g", "-gdwarf-5", "-gz"],
        &["-g", "-O2", "-flto"],
    ] {
        let name = format!("program{}", flags.concat());
        let file = compile(dir.path(), &name, &program, flags).unwrap();
        let info = DebugInfo::open(&file).unwrap();
        compare(&info, &truth).unwrap_or_else(|why| panic!("{flags:?}: {why}"));
        assert_eq!(info.member("outer", "absent"), None, "{flags:?}");
        assert_eq!(info.member("outer", "comm.x"), None, "{flags:?}");
        assert_eq!(info.member("absent", "comm"), None, "{flags:?}");
        let shifted: Vec<_> = truth.iter().map(|&(path, offset, size)| (path, offset + 8, size)).collect();
        assert!(compare(&info, &shifted).is_err(), "a comparison with offset + 8 must fail");
    }
}

#[test]
fn symbols_of_an_executable_match_nm() {
    let dir = tempfile::tempdir().unwrap();
    let program = format!("{TYPES}\nint main(void) {{ return task.pad[0]; }}\n");
    let Some(file) = compile(dir.path(), "symbols", &program, &["-g", "-no-pie"]) else { return };
    let info = DebugInfo::open(&file).unwrap();
    let nm = Command::new("nm").args(["-S", "--defined-only"]).arg(&file).output().unwrap();
    let nm = String::from_utf8(nm.stdout).unwrap();
    let mut checked = 0;
    for line in nm.lines() {
        if let [addr, size, _, name] = line.split_whitespace().collect::<Vec<_>>()[..] {
            let symbol = info.symbol(name).unwrap_or_else(|| panic!("no symbol {name}"));
            let hex = |text| u64::from_str_radix(text, 16).unwrap();
            assert_eq!((symbol.addr, symbol.size), (hex(addr), hex(size)), "{name}");
            checked += 1;
        }
    }
    assert!(checked >= 3, "{nm}");
}

#[test]
fn what_is_no_vmlinux_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("vmlinux");
    let opened = |bytes: &[u8]| {
        std::fs::write(&file, bytes).unwrap();
        DebugInfo::open(&file).err().map(|error| error.to_string())
    };
    for bytes in [&b""[..], b"no ELF", b"\x7fELF\x02\x01\x01"] {
        let said = opened(bytes).expect("refused");
        assert!(said.contains("not a usable vmlinux"), "{said}");
    }
    assert!(DebugInfo::open(dir.path()).err().expect("refused").to_string().contains("directory"));
    assert!(
        DebugInfo::open(&dir.path().join("absent"))
            .err()
            .expect("refused")
            .to_string()
            .contains("No such file")
    );
}
