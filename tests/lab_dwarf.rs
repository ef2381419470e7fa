//! DWARF of real kernels: types against BTF of the same file, lines against addr2line and gdb.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod support;

use kstub::debuginfo::types::{Shape, TypeTable};
use kstub::debuginfo::{Class, DebugInfo, Location, SectionAddresses, TypeId};
use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;
use support::lab;

/// The kernels of the lab, each once.
fn kernels() -> Vec<PathBuf> {
    if lab::sets().is_none() {
        return Vec::new();
    }
    let entries = std::fs::read_dir(lab::root().join("kernels")).unwrap();
    let mut found: BTreeSet<PathBuf> = BTreeSet::new();
    for entry in entries {
        let vmlinux = entry.unwrap().path().canonicalize().unwrap().join("vmlinux");
        if vmlinux.exists() {
            found.insert(vmlinux);
        }
    }
    found.into_iter().collect()
}

/// By a reader of its own of the file's BTF: names that one structure or union alone has, and the values of all
/// enumerators; one name can have several.
fn raw_btf(info: &DebugInfo, path: &Path) -> (BTreeSet<String>, BTreeMap<String, BTreeSet<i64>>) {
    let readelf = Command::new("objcopy")
        .args(["-O", "binary", "--only-section=.BTF"])
        .arg(path)
        .arg("/dev/stdout")
        .output()
        .unwrap();
    let btf = readelf.stdout;
    assert!(!btf.is_empty(), "{}: {}", info.path().display(), String::from_utf8_lossy(&readelf.stderr));
    let word = |at: usize| u32::from_le_bytes(btf[at..at + 4].try_into().unwrap());
    let header = word(4) as usize;
    let (mut at, end) = (header + word(8) as usize, header + (word(8) + word(12)) as usize);
    let strings = header + word(16) as usize;
    let string = |at: usize| {
        let text = btf[strings + at..].split(|&b| b == 0).next().unwrap();
        String::from_utf8(text.to_vec()).unwrap()
    };
    let mut counts: BTreeMap<String, u32> = BTreeMap::new();
    let mut values: BTreeMap<String, BTreeSet<i64>> = BTreeMap::new();
    while at < end {
        let (name, info) = (word(at) as usize, word(at + 4));
        let (kind, vlen) = (info >> 24 & 31, (info & 0xffff) as usize);
        if kind == 4 || kind == 5 {
            *counts.entry(string(name)).or_default() += 1;
        }
        for i in 0..vlen {
            let signed = info >> 31 != 0;
            let (name, value) = match kind {
                6 if signed => (at + 12 + i * 8, i64::from(word(at + 16 + i * 8) as i32)),
                6 => (at + 12 + i * 8, word(at + 16 + i * 8).into()),
                19 => {
                    let at = at + 12 + i * 12;
                    (at, (u64::from(word(at + 8)) << 32 | u64::from(word(at + 4))) as i64)
                }
                _ => break,
            };
            values.entry(string(word(name) as usize)).or_default().insert(value);
        }
        at += 12
            + match kind {
                1 | 14 | 17 => 4,
                3 => 12,
                4 | 5 | 15 | 19 => vlen * 12,
                6 | 13 => vlen * 8,
                _ => 0,
            };
    }
    let unique = counts.into_iter().filter(|(name, count)| *count == 1 && !name.is_empty());
    (unique.map(|(name, _)| name).collect(), values)
}

/// Every member of a structure, those of nameless ones included: path, bit offset, bit-field width, size.
fn layout(types: &TypeTable, id: TypeId) -> Vec<(String, u64, Option<u32>, Option<u64>)> {
    fn add(
        types: &TypeTable,
        id: TypeId,
        base: u64,
        prefix: &str,
        out: &mut Vec<(String, u64, Option<u32>, Option<u64>)>,
    ) {
        let (_, ty) = types.strip(id).unwrap();
        let Shape::Composite { members, size, .. } = &ty.shape else { panic!("{prefix}: {ty:?}") };
        out.push((format!("{prefix}(all)"), base, None, Some(*size)));
        for (i, member) in members.iter().enumerate() {
            let at = base + member.bit_offset;
            let inner = types.strip(member.ty).unwrap().1;
            if member.name.is_empty() && matches!(inner.shape, Shape::Composite { .. }) {
                add(types, member.ty, at, &format!("{prefix}{i}."), out);
            } else {
                out.push((format!("{prefix}{}", member.name), at, member.bits, types.size(member.ty)));
            }
        }
    }
    let mut out = Vec::new();
    add(types, id, 0, "", &mut out);
    out
}

const ALWAYS: [&str; 8] =
    ["task_struct", "page", "rq", "mm_struct", "file", "super_block", "sk_buff", "sched_entity"];

#[test]
fn every_member_is_where_btf_has_it() {
    for path in kernels() {
        let dir = tempfile::tempdir().unwrap();
        let info = DebugInfo::open(&path).unwrap().keep_indexes_in(Some(dir.path().to_owned()));
        let (btf, dwarf) = (info.types(), info.dwarf_types().unwrap());
        assert_eq!((btf.format(), dwarf.format()), ("BTF", "DWARF"));
        let (unique, values) = raw_btf(&info, &path);
        let names = btf.names(Class::Struct);
        let step = names.len() / 400 + 1;
        let sampled = names.iter().step_by(step).map(String::as_str);
        let sampled: BTreeSet<&str> = sampled.filter(|name| unique.contains(*name)).chain(ALWAYS).collect();
        let (mut members, mut bit_fields, mut mutations, mut inside_functions) = (0, 0, 0, 0);
        for name in &sampled {
            let want = layout(btf, btf.find(Class::Struct, name).unwrap());
            // BTF also has types that a function defines for itself.
            let Some(id) = dwarf.find(Class::Struct, name) else {
                assert!(!ALWAYS.contains(name), "no {name} in DWARF");
                inside_functions += 1;
                continue;
            };
            let got = layout(dwarf, id);
            assert_eq!(got, want, "{}: struct {name}", path.display());
            members += want.len();
            bit_fields += want.iter().filter(|(_, _, bits, _)| bits.is_some()).count();
            // The comparison sees one member that is 8 bytes further on.
            let mut moved = got.clone();
            if let Some(last) = moved.last_mut() {
                last.1 += 64;
                mutations += usize::from(moved != want);
            }
        }
        assert!(
            sampled.len() >= 200 && members > 2000 && bit_fields > 20,
            "{} {members} {bit_fields}",
            sampled.len()
        );
        assert_eq!(mutations + inside_functions, sampled.len());
        assert!(inside_functions * 50 <= sampled.len(), "{inside_functions} are missing");

        let enums = btf.names(Class::Enum);
        let shape = |name: &String| btf.get(btf.find(Class::Enum, name)?).map(|ty| ty.shape.clone());
        // BTF has a sign bit for enumerations and values of 64 bits since Linux 6.0; DWARF always had both.
        let signs = enums.iter().filter_map(shape).any(|s| matches!(s, Shape::Enum { signed: true, .. }));
        let same = |a: i64, b: i64| a == b || !signs && a as u32 == b as u32;
        let mut enumerators = 0;
        for (enumerator, values) in values.iter().step_by(8) {
            let Some(got) = dwarf.constant(enumerator) else {
                inside_functions += 1;
                continue;
            };
            assert!(values.iter().any(|v| same(got, *v)), "{enumerator}: {values:?} in BTF, {got} in DWARF");
            if let [only] = Vec::from_iter(values)[..] {
                assert!(!same(got + 1, *only));
            }
            enumerators += 1;
        }
        assert!(inside_functions * 50 <= sampled.len() + enumerators, "{inside_functions} are missing");
        assert!(enumerators > 500, "{enumerators}");
        eprintln!(
            "{}: {} structures, {members} members, {enumerators} enumerators",
            path.display(),
            sampled.len()
        );

        for (variable, spelled) in [
            ("init_task", "struct task_struct"),
            ("jiffies", "unsigned long"),
            ("init_mm", "struct mm_struct"),
            ("super_blocks", "struct list_head"),
            ("saved_command_line", "char *"),
        ] {
            let got = info.variable_type(variable).unwrap_or_else(|| panic!("no {variable}"));
            assert_eq!(got.trim_start_matches("volatile "), spelled, "{variable}");
            assert!(btf.parse(&got).is_some(), "{got}");
        }
    }
}

#[test]
fn the_index_is_quick_and_kept() {
    for path in kernels() {
        let dir = tempfile::tempdir().unwrap();
        let find = |what: &str| {
            let info = DebugInfo::open(&path).unwrap().keep_indexes_in(Some(dir.path().to_owned()));
            let began = Instant::now();
            let types = info.dwarf_types().unwrap();
            let id = types.find(Class::Struct, "task_struct").unwrap();
            let took = began.elapsed();
            let size = types.size(id).unwrap();
            eprintln!("{}: {what} in {took:?}, struct task_struct has {size} bytes", path.display());
            let began = Instant::now();
            let addr = info.symbol("do_exit").unwrap().addr;
            eprintln!("  symbols {:?}", began.elapsed());
            let began = Instant::now();
            let place = info.locate(addr).unwrap();
            eprintln!("  located {:?} in {:?}", place.last().unwrap(), began.elapsed());
            size
        };
        let new = find("made");
        let kept: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().path()).collect();
        let [file] = kept.as_slice() else { panic!("{kept:?}") };
        eprintln!("  index of {} bytes", file.metadata().unwrap().len());
        assert_eq!(find("read"), new);
        // What is damaged is made anew.
        let mut bytes = std::fs::read(file).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 0x40;
        std::fs::write(file, &bytes).unwrap();
        assert_eq!(find("made again"), new);
        assert_ne!(std::fs::read(file).unwrap(), bytes);
    }
}

/// Addresses of functions, some instructions into them, as System.map has them.
fn addresses(kernel: &Path, wanted: usize) -> Vec<u64> {
    let map = std::fs::read_to_string(kernel.with_file_name("System.map")).unwrap();
    let functions: Vec<u64> = map
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        // Padding before functions has no line.
        .filter(|words| matches!(words[1], "t" | "T") && !words[2].starts_with("__pfx_"))
        .map(|words| u64::from_str_radix(words[0], 16).unwrap())
        .collect();
    let step = functions.len() / wanted;
    let picked = functions.windows(2).step_by(step);
    picked.enumerate().map(|(i, pair)| pair[0] + ((pair[1] - pair[0]) / 4 * (i as u64 % 3))).collect()
}

/// Path without `.` and `..`.
fn plain(path: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "." => {}
            ".." if parts.last().is_some_and(|p| !p.is_empty() && *p != "..") => _ = parts.pop(),
            part => parts.push(part),
        }
    }
    parts.join("/")
}

/// What addr2line says of each address: function, file and line from the innermost out.
fn addr2line(file: &Path, section: Option<&str>, addresses: &[u64]) -> Vec<Vec<(String, String)>> {
    let mut child = Command::new("addr2line")
        .args(["-a", "-f", "-i", "-e"])
        .arg(file)
        .args(section.map(|section| format!("--section={section}")))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let text: String = addresses.iter().map(|at| format!("{at:#x}\n")).collect();
    let mut stdin = child.stdin.take().unwrap();
    let writer = std::thread::spawn(move || stdin.write_all(text.as_bytes()).unwrap());
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let mut answers: Vec<Vec<(String, String)>> = Vec::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        if line.starts_with("0x") {
            answers.push(Vec::new());
            continue;
        }
        let place = lines.next().unwrap();
        let place = place.split(" (disc").next().unwrap();
        let (path, number) = place.rsplit_once(':').unwrap();
        answers.last_mut().unwrap().push((line.to_owned(), format!("{}:{number}", plain(path))));
    }
    answers
}

fn ours(chain: &[Location]) -> Vec<(String, String)> {
    let line = |l: &Location| l.line.map_or("?".to_owned(), |n| n.to_string());
    chain
        .iter()
        .map(|l| {
            let file = l.file.as_deref().unwrap_or("??");
            (l.function.clone().unwrap_or("??".into()), format!("{}:{}", plain(file), line(l)))
        })
        .collect()
}

#[test]
fn lines_are_those_of_addr2line() {
    for path in kernels() {
        let info = DebugInfo::open(&path).unwrap().keep_indexes_in(None);
        let addresses = addresses(&path, 280);
        let want = addr2line(&path, None, &addresses);
        let (mut same, mut inlined, mut unknown, mut moved) = (0, 0, 0, 0);
        let mut disputed = Vec::new();
        for (addr, want) in addresses.iter().zip(&want) {
            let got = info.locate(*addr).map(|chain| ours(&chain)).unwrap_or_default();
            if got.is_empty() && want[0].1.ends_with(":?") {
                unknown += 1;
                continue;
            }
            inlined += usize::from(want.len() > 1);
            if agree(&got, want) {
                same += 1;
            } else {
                disputed.push((*addr, got, want));
            }
            // Far away is another place.
            let elsewhere = info.locate(addr + 0x1000).map(|chain| ours(&chain)).unwrap_or_default();
            moved += usize::from(!agree(&elsewhere, want));
        }
        let asked = addresses.len() - unknown;
        let by_gdb = gdb_lines(&path, &disputed.iter().map(|(addr, ..)| *addr).collect::<Vec<_>>());
        let mut wrong = 0;
        for ((addr, got, want), gdb) in disputed.iter().zip(&by_gdb) {
            // addr2line names the unit's own file for a header's lines in DWARF 5.
            if !got.first().is_some_and(|(_, place)| place.ends_with(gdb.as_str())) {
                eprintln!("{addr:#x}: {got:?}, addr2line {want:?}, gdb {gdb}");
                wrong += 1;
            }
        }
        eprintln!(
            "{}: {same} of {asked} as addr2line, {} as gdb, {inlined} inlined, {unknown} unknown",
            path.display(),
            disputed.len() - wrong
        );
        assert!(asked >= 150 && inlined >= 20, "{asked} {inlined}");
        assert!(same * 100 >= asked * 90, "{same} of {asked}");
        assert!(wrong * 100 <= asked, "{wrong} of {asked}");
        assert!(moved * 100 >= asked * 95, "{moved} of {asked} do not notice that they are elsewhere");
    }
}

/// Whether two chains are the same. For what has no entry in DWARF, addr2line names the symbol.
fn agree(got: &[(String, String)], want: &[(String, String)]) -> bool {
    got.len() == want.len()
        && got.iter().zip(want).all(|((f, place), (g, other))| place == other && (f == g || f == "??"))
}

/// What gdb says of each address: `file.c:12`.
fn gdb_lines(file: &Path, addresses: &[u64]) -> Vec<String> {
    if addresses.is_empty() {
        return Vec::new();
    }
    let mut gdb = Command::new("gdb");
    gdb.args(["-nx", "-batch", "-q", "-iex", "set debuginfod enabled off"]);
    for addr in addresses {
        gdb.args(["-ex", &format!("info line *{addr:#x}")]);
    }
    let output = gdb.arg(file).stderr(Stdio::null()).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let line = |line: &str| {
        let (number, rest) = line.strip_prefix("Line ")?.split_once(" of \"")?;
        let path = rest.split('"').next()?;
        Some(format!("/{}:{number}", path.rsplit('/').next()?))
    };
    let answers: Vec<String> = text
        .lines()
        .filter(|l| l.starts_with("Line ") || l.starts_with("No line"))
        .map(|l| line(l).unwrap_or_else(|| "?".into()))
        .collect();
    assert_eq!(answers.len(), addresses.len(), "{text}");
    answers
}

/// Debian's separate files of modules are not linked: what is in them is relative to sections.
#[test]
fn modules_have_lines_and_types() {
    for path in kernels() {
        let found =
            Command::new("find").arg(path.with_file_name("lib")).args(["-name", "*.ko.debug"]).output();
        let found = String::from_utf8(found.unwrap().stdout).unwrap();
        let mut modules: Vec<&str> = found.lines().collect();
        // The largest: a small one has a handful of functions.
        modules.sort_by_key(|module| std::cmp::Reverse(std::fs::metadata(module).unwrap().len()));
        assert!(modules.len() >= 2, "{}", path.display());
        for module in modules.iter().take(2).map(Path::new) {
            let base = 0xffff_ffff_c000_0000;
            let loaded_at = SectionAddresses::from([(".text".to_owned(), base)]);
            let began = Instant::now();
            let info = DebugInfo::open_module(module, loaded_at, 0).unwrap();
            let nm = Command::new("nm").arg("-S").arg(module).output().unwrap();
            let nm = String::from_utf8(nm.stdout).unwrap();
            let words = nm.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
            let functions = words.filter(|w| w.len() == 4 && matches!(w[2], "t" | "T"));
            // The sections of a separate file have no bytes: only their names tell code from .init.text and .exit.text.
            let (mut asked, mut wrong) = (0, 0);
            let addresses: Vec<u64> = functions
                .filter(|w| info.symbol(w[3]).is_some_and(|symbol| symbol.addr >= base))
                .map(|w| u64::from_str_radix(w[0], 16).unwrap() + u64::from_str_radix(w[1], 16).unwrap() / 2)
                .step_by(7)
                .take(40)
                .collect();
            for (addr, want) in addresses.iter().zip(&addr2line(module, Some(".text"), &addresses)) {
                let Some(got) = info.locate(base + addr).map(|chain| ours(&chain)) else { continue };
                asked += 1;
                // addr2line's own mistake is a file that is not the header's.
                let lines = |chain: &[(String, String)]| -> Vec<(String, String)> {
                    let number = |place: &str| place.rsplit(':').next().unwrap().to_owned();
                    chain.iter().map(|(f, place)| (f.clone(), number(place))).collect()
                };
                if !agree(&lines(&got), &lines(want)) {
                    eprintln!("{}: {addr:#x}: {got:?}, addr2line {want:?}", module.display());
                    wrong += 1;
                }
            }
            eprintln!("{}: {asked} places, {wrong} wrong, {:?}", module.display(), began.elapsed());
            assert!(asked > 20 && wrong * 20 <= asked, "{}: {wrong} of {asked}", module.display());
            let types = info.dwarf_types().unwrap();
            let size = types.find(Class::Struct, "module").and_then(|id| types.size(id)).unwrap();
            let image = DebugInfo::open(&path).unwrap();
            let image = image.types();
            assert_eq!(Some(size), image.find(Class::Struct, "module").and_then(|id| image.size(id)));
        }
    }
}
