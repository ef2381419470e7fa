//! DWARF of every version against what the compiled program says of itself, lines against addr2line; and damage.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use kstub::debuginfo::types::Shape;
use kstub::debuginfo::{Class, DebugInfo, Location, SectionAddresses};
use std::path::{Path, PathBuf};
use std::process::Command;

const SOURCE: &str = r"
struct bits { char before; int a : 3; unsigned b : 7; long c : 33; unsigned char d : 1; } fields;
typedef int grid_t[2][3][4];
struct holder { short x; grid_t grid; int (*call)(struct bits *, ...); struct later *later; char tail[]; } holder;
enum sign { BELOW = -2, ABOVE = 7 } sign;
enum wide { WIDE = 0xfedcba9876543210ul, LOW = 200 } wide;
static const volatile unsigned long *const pointers[5];
extern struct bits elsewhere[3];
static inline __attribute__((always_inline)) int inner(int x) { return x * 3 + fields.a; }
static inline __attribute__((always_inline)) int middle(int x)
{
    holder.x = x;
    return inner(x + 1);
}
__attribute__((noinline)) int outer(int x)
{
    int y = middle(x);

    return y ^ sign;
}
int main(void) { return outer(elsewhere[0].a) + wide + !pointers[1]; }
struct bits elsewhere[3];
";

const VERSIONS: [&[&str]; 6] = [
    &["-gdwarf-2", "-gstrict-dwarf"],
    &["-gdwarf-3", "-gstrict-dwarf"],
    &["-gdwarf-4"],
    &["-gdwarf-5"],
    &["-gdwarf-5", "-fdebug-types-section"],
    &["-gdwarf-5", "-gz", "-flto"],
];

/// Compiles `SOURCE` and `more`; `None` (said) without a compiler.
fn compile(dir: &Path, name: &str, more: &str, flags: &[&str]) -> Option<PathBuf> {
    let (c, out) = (dir.join(format!("{name}.c")), dir.join(name));
    std::fs::write(&c, format!("{SOURCE}{more}")).unwrap();
    match Command::new("gcc").args(["-g", "-O1"]).args(flags).arg("-o").arg(&out).arg(&c).status() {
        Ok(status) => assert!(status.success(), "gcc {flags:?}"),
        Err(error) => {
            assert_ne!(std::env::var("CI").as_deref(), Ok("true"), "gcc: {error}");
            eprintln!("skipped: gcc: {error}");
            return None;
        }
    }
    Some(out)
}

/// First bit and width of each bit-field, from a program that fills one at a time.
fn bit_fields(dir: &Path) -> Option<Vec<(String, u64, u32)>> {
    let fill =
        |name: &str| format!("memset(&fields, 0, sizeof fields); fields.{name} = -1; show(\"{name}\");");
    let lines: String = ["a", "b", "c", "d"].map(fill).concat();
    let more = format!(
        r#"#include <stdio.h>
        #include <string.h>
        static void show(const char *name) {{
            int first = -1, width = 0;
            for (int i = 0; i < 8 * (int)sizeof fields; i++)
                if (((unsigned char *)&fields)[i / 8] >> i % 8 & 1) {{ if (!width++) first = i; }}
            printf("%s %d %d\n", name, first, width);
        }}
        __attribute__((constructor)) static void all(void) {{ {lines} fflush(0); }}"#
    );
    let output = Command::new(compile(dir, "truth", &more, &[])?).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let words = text.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    Some(words.map(|w| (w[0].to_owned(), w[1].parse().unwrap(), w[2].parse().unwrap())).collect())
}

#[test]
fn every_version_describes_the_same_types() {
    let dir = tempfile::tempdir().unwrap();
    let Some(truth) = bit_fields(dir.path()) else { return };
    assert_eq!(truth.len(), 4);
    for flags in VERSIONS {
        let file = compile(dir.path(), &format!("program{}", flags.concat()), "", flags).unwrap();
        let info = DebugInfo::open(&file).unwrap();
        let types = info.types();
        assert_eq!(types.format(), "DWARF");
        let bits = types.composite("bits").unwrap_or_else(|| panic!("{flags:?}"));
        let place = |name: &str| {
            let member = types.member(bits, name).unwrap();
            let (lowest, width) = member.bits.unwrap_or_else(|| panic!("{flags:?}: {name} is no bit-field"));
            (name.to_owned(), member.offset * 8 + u64::from(lowest), width)
        };
        let got: Vec<_> = truth.iter().map(|(name, ..)| place(name)).collect();
        assert_eq!(got, truth, "{flags:?}");

        let holder = types.composite("holder").unwrap();
        let at = |path| types.member(holder, path).map(|m| (m.offset, m.size));
        // short, 2 bytes of padding, 24 numbers of 4 bytes, 4 bytes of padding, pointers.
        assert_eq!(at("grid"), Some((4, Some(96))), "{flags:?}");
        assert_eq!(at("grid[1]"), Some((4 + 48, Some(48))), "{flags:?}");
        assert_eq!(at("grid[1][2][3]"), Some((4 + 92, Some(4))), "{flags:?}");
        assert_eq!(at("tail"), Some((120, Some(0))), "{flags:?}");
        let spelled = |path| types.spell(types.member(holder, path).unwrap().ty);
        assert_eq!(spelled("grid[1]"), "int [3][4]", "{flags:?}");
        assert_eq!(spelled("call"), "int (*)(struct bits *, ...)", "{flags:?}");
        assert_eq!(spelled("later"), "struct later *", "{flags:?}");
        assert_eq!(types.composite("later"), None, "{flags:?}");

        let variable = |name| info.variable_type(name).unwrap_or_else(|| panic!("{flags:?}: no {name}"));
        assert_eq!(variable("elsewhere"), "struct bits [3]", "{flags:?}");
        // Compilers write the qualifiers of an array's elements once or twice.
        let pointers = types.parse(&variable("pointers")).unwrap();
        assert_eq!((types.spell(pointers).as_str(), types.size(pointers)), ("unsigned long *[5]", Some(40)));
        assert_eq!(types.parse(&variable("elsewhere")).and_then(|id| types.size(id)), Some(24));
        assert_eq!(info.variable_type("absent"), None);

        assert_eq!(types.constant("BELOW"), Some(-2), "{flags:?}");
        assert_eq!(types.constant("WIDE"), Some(0xfedc_ba98_7654_3210_u64 as i64), "{flags:?}");
        assert_eq!(types.constant("LOW"), Some(200), "{flags:?}");
        let shape = |name| types.get(types.find(Class::Enum, name).unwrap()).unwrap().shape.clone();
        assert!(matches!(shape("sign"), Shape::Enum { size: 4, signed: true, .. }), "{flags:?}");
        assert!(
            matches!(shape("wide"), Shape::Enum { size: 8, signed: false, .. }),
            "{flags:?}: {:?}",
            shape("wide")
        );
    }
}

/// `function file:line` from the innermost out.
fn shown(chain: &[Location]) -> Vec<String> {
    let place = |l: &Location| {
        let file = l.file.clone().unwrap_or_default();
        format!("{} {file}:{}", l.function.clone().unwrap_or_default(), l.line.unwrap_or(0))
    };
    chain.iter().map(place).collect()
}

fn addr2line(file: &Path, section: Option<&str>, addr: u64) -> Vec<String> {
    let mut command = Command::new("addr2line");
    command.args(["-f", "-i", "-e"]).arg(file).arg(format!("{addr:#x}"));
    command.args(section.map(|section| format!("--section={section}")));
    let text = String::from_utf8(command.output().unwrap().stdout).unwrap();
    let text = text.replace("??:?", ":0");
    let lines: Vec<&str> = text.lines().collect();
    lines.chunks(2).map(|pair| format!("{} {}", pair[0], pair[1].split(" (disc").next().unwrap())).collect()
}

#[test]
fn lines_and_inlined_functions() {
    let dir = tempfile::tempdir().unwrap();
    // addr2line loses inlined functions where there are type units.
    let hard = |flags: &&&[&str]| flags.contains(&"-flto") || flags.contains(&"-fdebug-types-section");
    for flags in VERSIONS.iter().filter(|flags| !hard(flags)) {
        let flags = [flags, &["-no-pie"][..]].concat();
        let Some(file) = compile(dir.path(), &format!("lines{}", flags.concat()), "", &flags) else { return };
        let info = DebugInfo::open(&file).unwrap();
        let outer = info.symbol("outer").unwrap();
        let mut deepest = 0;
        for addr in outer.addr..outer.addr + outer.size {
            let got = shown(&info.locate(addr).unwrap());
            assert_eq!(got, addr2line(&file, None, addr), "{flags:?}: {addr:#x}");
            deepest = deepest.max(got.len());
        }
        assert!(deepest == 3 || flags.contains(&"-gstrict-dwarf") && deepest == 2, "{flags:?}: {deepest}");
        let declared = info.declared(outer.addr + 1).unwrap();
        assert_eq!((declared.function.as_deref(), declared.line), (Some("outer"), Some(15)), "{flags:?}");
        assert_eq!(info.locate(1), None);
    }
}

#[test]
fn a_module_is_where_it_was_loaded() {
    let dir = tempfile::tempdir().unwrap();
    for flags in [&["-c", "-gdwarf-4"][..], &["-c", "-gdwarf-5"], &["-c", "-gdwarf-5", "-gz"]] {
        let flags = [flags, &["-ffunction-sections"]].concat();
        let Some(file) = compile(dir.path(), &format!("m{}.o", flags.concat()), "", &flags) else { return };
        let base = 0xffff_ffff_c012_3000;
        let loaded_at =
            SectionAddresses::from([(".text.outer".into(), base), (".text.main".into(), base + 0x1000)]);
        let info = DebugInfo::open_module(&file, loaded_at, 0).unwrap();
        assert_eq!(info.symbol("outer").unwrap().addr, base);
        for addr in 0..info.symbol("outer").unwrap().size {
            let got = shown(&info.locate(base + addr).unwrap());
            assert_eq!(got, addr2line(&file, Some(".text.outer"), addr), "{flags:?}: {addr:#x}");
        }
        let main = info.locate(base + 0x1000).unwrap();
        assert_eq!(main.last().unwrap().function.as_deref(), Some("main"));
        assert_eq!(info.member("holder", "grid").map(|m| m.offset), Some(4));
    }
}

#[test]
fn damage_is_survived() {
    let dir = tempfile::tempdir().unwrap();
    for (name, flags) in [("four", ["-gdwarf-4", "-no-pie"]), ("five", ["-gdwarf-5", "-no-pie"])] {
        let Some(file) = compile(dir.path(), name, "", &flags) else { return };
        let good = std::fs::read(&file).unwrap();
        let outer = DebugInfo::open(&file).unwrap().symbol("outer").unwrap().addr;
        let headers = Command::new("readelf").arg("-SW").arg(&file).output().unwrap();
        let headers = String::from_utf8(headers.stdout).unwrap();
        let sections: Vec<(usize, usize)> = headers
            .lines()
            .filter(|line| line.contains(".debug_"))
            .map(|line| {
                let words: Vec<&str> = line.split(']').nth(1).unwrap().split_whitespace().collect();
                let hex = |text| usize::from_str_radix(text, 16).unwrap();
                (hex(words[3]), hex(words[4]))
            })
            .collect();
        assert!(sections.len() >= 5, "{headers}");
        let mut state = 1u64;
        let mut random = |below: usize| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as usize % below
        };
        let bad_file = dir.path().join("bad");
        for _ in 0..1500 {
            let mut bad = good.clone();
            for _ in 0..=random(3) {
                let (at, len) = sections[random(sections.len())];
                bad[at + random(len)] ^= 1 << random(8);
            }
            std::fs::write(&bad_file, &bad).unwrap();
            let Ok(info) = DebugInfo::open(&bad_file) else { continue };
            let types = info.types();
            for class in [Class::Struct, Class::Enum, Class::Typedef, Class::Variable] {
                for name in types.names(class) {
                    if let Some(id) = types.find(class, &name) {
                        let _ = (types.size(id), types.spell(id), types.member(id, "grid[1][2]"));
                    }
                }
            }
            let _ = (types.constant("WIDE"), info.locate(outer), info.declared(outer + 3));
        }
    }
}
