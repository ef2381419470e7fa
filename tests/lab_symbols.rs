//! Symbols of real kernels from their own memory, with no vmlinux, against what the guest said of itself.
//!
//! Truth is the guest's own `/proc` and `/sys`, never kstub.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod support;

use kstub::addr::VirtAddr;
use kstub::backend::Dump;
use kstub::debuginfo::SymbolTable;
use kstub::kernel::Kernel;
use kstub::kernel::discover::{self, Found, START_KERNEL_MAP};
use kstub::kernel::module::Module;
use kstub::vmcoreinfo::VmcoreInfo;
use object::{Object, ObjectSection, ObjectSymbol};
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;
use support::lab::{self, DumpFile, Set};

/// Calls `check` with one dump of each kind that kstub can decode.
fn for_each_dump(check: &mut dyn FnMut(&Set, &DumpFile, Dump)) {
    let Some(sets) = lab::sets() else { return };
    for set in &sets {
        let dumps: Vec<_> = set.dumps().into_iter().filter(|d| d.complete && d.split.is_empty()).collect();
        assert!(!dumps.is_empty(), "{}", set.name());
        for dump in &dumps {
            let opened = Dump::open(&dump.path).unwrap_or_else(|e| panic!("{}: {e}", dump.path.display()));
            check(set, dump, opened);
        }
    }
}

fn facts(set: &Set, file: &str) -> String {
    let path = set.dir.join("facts").join(file);
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

type Line = (u64, char, String);

/// The kernel image's lines of the guest's own `/proc/kallsyms`.
fn told_by_guest(set: &Set) -> Vec<Line> {
    let text = facts(set, "proc/kallsyms");
    let words = text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let image = words.take_while(|words| words.len() == 3);
    let line =
        |w: Vec<&str>| (u64::from_str_radix(w[0], 16).unwrap(), w[1].chars().next().unwrap(), w[2].into());
    image.map(line).collect()
}

fn at_run_time(symbols: &SymbolTable, found: &Found) -> Vec<Line> {
    let slide = |at: u64| if at >= START_KERNEL_MAP { at + found.kaslr_offset } else { at };
    symbols.iter().map(|s| (slide(s.addr), s.letter, s.name.to_owned())).collect()
}

/// Compares every line; the text names the first that differs.
fn compare(ours: &[Line], theirs: &[Line]) -> Result<(), String> {
    if let Some((ours, theirs)) = std::iter::zip(ours, theirs).find(|(a, b)| a != b) {
        return Err(format!("kstub has {ours:x?}, the guest has {theirs:x?}"));
    }
    if ours.len() != theirs.len() {
        return Err(format!("kstub has {} symbols, the guest has {}", ours.len(), theirs.len()));
    }
    Ok(())
}

#[test]
fn every_symbol_is_where_the_guest_says_it_is() {
    for_each_dump(&mut |set, dump, opened| {
        let what = format!("{}/{}", set.name(), dump.name);
        let opened = &opened;
        let found = discover::discover(opened, &|_, _| ()).unwrap_or_else(|e| panic!("{what}: {e}"));
        let theirs = told_by_guest(set);
        assert!(theirs.len() > 10_000, "{what}: {} lines", theirs.len());
        // As VMCOREINFO tells, where it does; and by searching the image.
        let without = Found { vmcoreinfo: VmcoreInfo::default(), ..found.clone() };
        for (how, found) in [("told", &found), ("searched", &without)] {
            let start = Instant::now();
            let symbols =
                discover::find_kallsyms(opened, found).unwrap_or_else(|e| panic!("{what}: {how}: {e}"));
            eprintln!("{what}: {} symbols, {how} in {:?}", symbols.len(), start.elapsed());
            let ours = at_run_time(&symbols, found);
            compare(&ours, &theirs).unwrap_or_else(|why| panic!("{what}: {how}: {why}"));
            let wrong = Found { kaslr_offset: found.kaslr_offset.wrapping_add(8), ..found.clone() };
            let off_by_8 = at_run_time(&symbols, &wrong);
            assert!(compare(&off_by_8, &theirs).is_err(), "{what}: symbols 8 bytes off must fail");
        }
    });
}

/// The kernel in a dump, with no vmlinux: symbols and types are its own.
fn kernel_alone(what: &str, opened: Dump) -> Kernel {
    let found = discover::discover(&opened, &|_, _| ()).unwrap_or_else(|e| panic!("{what}: {e}"));
    Kernel::new(Arc::new(opened), found, None)
}

/// The guest's own lines of `/proc/modules`, by name: size, uses, users, state, address.
fn modules_told_by_guest(set: &Set) -> BTreeMap<String, (u64, i32, BTreeSet<String>, String, u64)> {
    let text = facts(set, "proc/modules");
    let line = |line: &str| {
        let words: Vec<_> = line.split_whitespace().collect();
        let users = words[3].split(',').filter(|u| !u.is_empty() && *u != "-" && !u.starts_with('['));
        let at = u64::from_str_radix(words[5].trim_start_matches("0x"), 16).unwrap();
        let users = users.map(str::to_owned).collect();
        let told = (words[1].parse().unwrap(), words[2].parse().unwrap(), users, words[4].to_owned(), at);
        (words[0].to_owned(), told)
    };
    text.lines().map(line).collect()
}

/// The file a module was loaded from; `dm_mod` is in `dm-mod.ko`.
fn file_of(set: &Set, name: &str) -> Option<PathBuf> {
    let mut directories = vec![lab::root().join(set.json["modules"].as_str()?)];
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                directories.push(path);
            } else if path.file_name().unwrap().to_string_lossy().replace('-', "_") == format!("{name}.ko") {
                return Some(path);
            }
        }
    }
    None
}

/// Symbols of `module` in the guest's own `/proc/kallsyms`, sorted. There, upper case means exported, not global.
fn symbols_of_module(set: &Set, module: &str) -> Vec<Line> {
    let text = facts(set, "proc/kallsyms");
    let tag = format!("[{module}]");
    let words = text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let line = |w: Vec<&str>| {
        (u64::from_str_radix(w[0], 16).unwrap(), w[1].to_lowercase().chars().next().unwrap(), w[2].into())
    };
    let mut lines: Vec<Line> = words.filter(|w| w.len() == 4 && w[3] == tag).map(line).collect();
    lines.sort();
    lines
}

/// Build-id and section addresses that follow from the module's file and where the guest has its symbols.
fn by_file(path: &PathBuf, symbols: &[Line]) -> (String, BTreeMap<String, u64>) {
    let bytes = std::fs::read(path).unwrap();
    let elf = object::File::parse(&*bytes).unwrap();
    let id = elf.build_id().unwrap().unwrap().iter().map(|b| format!("{b:02x}")).collect();
    let at: BTreeMap<&str, Vec<u64>> = symbols.iter().fold(BTreeMap::new(), |mut all, (at, _, name)| {
        all.entry(name.as_str()).or_insert_with(Vec::new).push(*at);
        all
    });
    let mut in_file: BTreeMap<&str, usize> = BTreeMap::new();
    for name in elf.symbols().filter_map(|symbol| symbol.name().ok()) {
        *in_file.entry(name).or_default() += 1;
    }
    let mut sections = BTreeMap::new();
    for symbol in elf.symbols() {
        let Some([at]) = symbol.name().ok().and_then(|name| at.get(name)).map(Vec::as_slice) else {
            continue;
        };
        let same_name = symbol.name().ok().and_then(|name| in_file.get(name));
        if let (Some(section), Some(1)) = (symbol.section_index(), same_name) {
            let name = elf.section_by_index(section).unwrap().name().unwrap().to_owned();
            let start = at - symbol.address();
            assert_eq!(*sections.entry(name.clone()).or_insert(start), start, "{}: {name}", path.display());
        }
    }
    (id, sections)
}

fn check_module(set: &Set, filtered: bool, kernel: &Kernel, module: &Module) -> Result<(), String> {
    let guest = symbols_of_module(set, &module.name);
    let symbols = kernel.module_symbols(module);
    let mut ours: Vec<Line> =
        symbols.iter().map(|s| (s.addr, s.letter.to_ascii_lowercase(), s.name.to_owned())).collect();
    ours.sort();
    compare(&ours, &guest)?;
    let function = symbols.iter().find(|s| s.letter.eq_ignore_ascii_case(&'t') && s.size > 16).unwrap();
    let named =
        kernel.symbolize(VirtAddr(function.addr + 4)).ok_or("a function is not named by its address")?;
    assert_eq!((named.offset, named.module), (4, Some(module.name.as_str())), "{named}");
    let Some(path) = file_of(set, &module.name) else { return Ok(()) };
    let (build_id, sections) = by_file(&path, &guest);
    let ours: BTreeMap<_, _> = match kernel.module_sections(module) {
        Ok(sections) => sections.into_iter().map(|s| (s.name, s.at.0)).collect(),
        // makedumpfile takes large kmalloc pages of the newest kernels for something to leave out.
        Err(error) if filtered && error.to_string().contains("excluded") => return Ok(()),
        Err(error) => return Err(error.to_string()),
    };
    if module.build_id.as_ref() != Some(&build_id) {
        let note = ours.get(".note.gnu.build-id").map(|&at| (at, kernel.read(VirtAddr(at), &mut [0; 36])));
        return Err(format!(
            "kstub has build-id {:?}, the file {build_id}; the note: {note:x?}",
            module.build_id
        ));
    }
    let mut checked = 0;
    for (name, at) in sections {
        // Per-CPU symbols of a module are offsets, and discarded sections are nowhere.
        let Some(&our) = ours.get(&name).filter(|_| name != ".data..percpu") else { continue };
        checked += 1;
        if our != at {
            return Err(format!("kstub has {name} at {our:#x}, by the guest's symbols it is at {at:#x}"));
        }
    }
    if checked == 0 { Err(format!("no section could be compared: kstub has {ours:x?}")) } else { Ok(()) }
}

#[test]
fn modules_are_what_the_guest_says_they_are() {
    for_each_dump(&mut |set, dump, opened| {
        let what = format!("{}/{}", set.name(), dump.name);
        let kernel = kernel_alone(&what, opened);
        let modules = kernel.modules();
        assert_eq!(modules.problems, Vec::<String>::new(), "{what}");
        let told = modules_told_by_guest(set);
        // The guest loads this one last, when it has told what it has: its init function makes what the set is for.
        let late = |m: &&Module| m.name == "kstub_chain" && !told.contains_key(&m.name);
        let known: Vec<&Module> = modules.list.iter().filter(|m| !late(m)).collect();
        let ours: BTreeMap<_, _> = known
            .iter()
            .map(|m| {
                let size = m.regions.iter().map(|region| region.size).sum::<u64>();
                let users = m.used_by.iter().cloned().collect::<BTreeSet<_>>();
                let state = m.state.map_or(String::new(), |state| state.to_string());
                (m.name.clone(), (size, m.uses.unwrap_or(-1), users, state, m.regions[0].start.0))
            })
            .collect();
        assert_eq!(ours, told, "{what}");
        // Files are slow to read and the same for all dumps of a set: one dump has all modules looked into.
        let first = set.dumps().iter().position(|d| d.name == dump.name) == Some(0);
        for module in known.iter().filter(|m| first || m.name == "xfs") {
            let what = format!("{what}: {}", module.name);
            check_module(set, dump.filter_level.is_some_and(|level| level > 1), &kernel, module)
                .unwrap_or_else(|why| panic!("{what}: {why}"));
            let other = known.iter().find(|m| m.name != module.name && m.name != "xfs").unwrap();
            if first {
                assert!(
                    compare(&symbols_of_module(set, &other.name), &symbols_of_module(set, &module.name))
                        .is_err()
                );
            }
        }
    });
}

/// What gdb says of a dump, started by `kstub gdb`; `cache` keeps the vmlinux's index between runs.
fn gdb_says(
    gdb: &std::path::Path,
    dump: &std::path::Path,
    cache: &std::path::Path,
    commands: &[&str],
) -> String {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_kstub"));
    command.arg("gdb").arg("--gdb").arg(gdb).arg(dump).args(["--", "-nx", "-batch", "-ex", "set width 0"]);
    command.args(commands.iter().flat_map(|command| ["-ex", command]));
    let output = command.env("XDG_CACHE_HOME", cache).env_remove("DEBUGINFOD_URLS").output().unwrap();
    String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
}

/// Where the guest says that a symbol is, of a module's too.
fn at(set: &Set, name: &str) -> Option<u64> {
    let told = facts(set, "proc/kallsyms");
    let line = told.lines().find(|line| line.split_whitespace().nth(2) == Some(name))?;
    u64::from_str_radix(line.split_whitespace().next()?, 16).ok()
}

/// The number in gdb's answer to `p/x`, whose value's number is `n`.
fn value(said: &str, n: u32) -> Option<u64> {
    let line = said.lines().find_map(|line| line.strip_prefix(&format!("${n} = 0x")))?;
    u64::from_str_radix(line.trim(), 16).ok()
}

#[test]
fn gdb_has_the_symbols_of_modules_with_their_files_and_without() {
    let Some(sets) = lab::sets() else { return };
    let newer = lab::root().join("tools/bin/gdb-new");
    let gdbs = [PathBuf::from("gdb"), newer];
    let cache = tempfile::tempdir().unwrap();
    for set in sets.iter().filter(|set| set.name().starts_with("kdump-")) {
        let dump = set.dumps()[0].path.clone();
        // Away from its vmlinux and its modules a dump has nothing but itself.
        let alone = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink(&dump, alone.path().join("alone")).unwrap();
        let wanted = ["xfs_fs_type", "xfs_fs_statfs", "__x64_sys_getpid"].map(|name| at(set, name).unwrap());
        let commands = [
            "p/x (unsigned long)&xfs_fs_type",
            "p/x (unsigned long)&xfs_fs_statfs",
            "p/x (unsigned long)&__x64_sys_getpid",
            &format!("info symbol {:#x}", wanted[1] + 5),
            &format!("info line *{:#x}", wanted[1]),
            "info sharedlibrary",
            &format!("info symbol {:#x}", wanted[0] + 1),
        ];
        for gdb in gdbs.iter().filter(|gdb| std::process::Command::new(gdb).arg("-v").output().is_ok()) {
            for (dump, files) in [(dump.clone(), true), (alone.path().join("alone"), false)] {
                let what = format!(
                    "{}: {} {}",
                    gdb.display(),
                    set.name(),
                    if files { "with files" } else { "alone" }
                );
                let said = gdb_says(gdb, &dump, cache.path(), &commands);
                let ours = [1, 2, 3].map(|n| value(&said, n));
                assert_eq!(ours, wanted.map(Some), "{what}: {said}");
                assert_ne!(ours[0], Some(wanted[1]), "{what}");
                assert!(said.contains("xfs_fs_statfs + 5 in section "), "{what}: {said}");
                assert!(said.contains("xfs_fs_type + 1 in section "), "{what}: {said}");
                let (line, file) = ("of \"fs/xfs/xfs_super.c\" starts at address", "xfs.ko.debug");
                assert_eq!((said.contains(line), said.contains(file)), (files, files), "{what}: {said}");
                for complaint in
                    ["wrong number of ALLOC sections", "Could not load", ".gdb_index", "file transfer"]
                {
                    assert!(!said.contains(complaint), "{what}: {complaint} in {said}");
                }
            }
        }
        // gdb itself must not keep indexes of modules: they hold the addresses of one dump.
        let kept = std::fs::read_dir(cache.path().join("gdb")).unwrap().count();
        assert!(kept <= sets.len(), "{}: {kept} indexes are kept", set.name());
    }
}

/// Asked about modules, by name: in every kind of section, of code, data and types.
const ABOUT_MODULES: &[&str] = &[
    "info line xfs_fs_statfs",
    "info scope xfs_fs_statfs",
    "break xfs_file_write_iter",
    "info line init_xfs_fs",
    "info line exit_xfs_fs",
    "info line xfs_super.c:1000",
    "list xfs_fs_statfs",
    "p &xfs_fs_type",
    "p xfs_fs_type.name",
    "p sizeof(struct xfs_inode)",
    "ptype struct xfs_perag",
    "info types ^xfs_perag$",
    "info functions ^xfs_iget",
    "break loop_init",
    "p &dm_mod",
];

#[test]
fn gdb_says_the_same_of_modules_by_an_index_made_on_another_dump() {
    let Some(sets) = lab::sets() else { return };
    let of = |name: &str| sets.iter().find(|set| set.name() == name);
    let (Some(first), Some(second)) = (of("qemu-6.1-4l"), of("kdump-6.1")) else {
        eprintln!("skipped: sets qemu-6.1-4l and kdump-6.1 are not in this lab");
        return;
    };
    assert_eq!(first.json["modules"], second.json["modules"]);
    let newer = lab::root().join("tools/bin/gdb-new");
    for gdb in [PathBuf::from("gdb"), newer] {
        if std::process::Command::new(&gdb).arg("-v").output().is_err() {
            continue;
        }
        let ask = |set: &Set, cache: Option<&std::path::Path>| {
            // First by an address, when gdb has read nothing of the module but the index.
            let by_address = format!("info line *{:#x}", at(set, "xfs_fs_statfs").unwrap() + 20);
            let commands = [&["echo ANSWERS\\n", &by_address], ABOUT_MODULES].concat();
            let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_kstub"));
            command.arg("gdb").arg("--gdb").arg(&gdb).arg(&set.dumps()[0].path);
            command.args(["--", "-nx", "-batch", "-ex", "set width 0"]);
            command.args(commands.iter().flat_map(|command| ["-ex", command]));
            command.env_remove("DEBUGINFOD_URLS").env_remove("XDG_CACHE_HOME").env_remove("HOME");
            command.envs(cache.map(|cache| ("XDG_CACHE_HOME", cache)));
            let output = command.stderr(std::process::Stdio::inherit()).output().unwrap();
            let said = String::from_utf8_lossy(&output.stdout).into_owned();
            let answers = said.split_once("ANSWERS\n").unwrap_or_else(|| panic!("{said}")).1.to_owned();
            assert!(answers.lines().count() > ABOUT_MODULES.len(), "{answers}");
            answers
        };
        let cache = tempfile::tempdir().unwrap();
        let kept = || {
            let kept = std::fs::read_dir(cache.path().join("kstub/gdb")).unwrap();
            kept.map(|entry| entry.unwrap().path()).collect::<BTreeSet<_>>()
        };
        ask(first, Some(cache.path()));
        let made = kept();
        assert!(made.iter().filter(|path| path.metadata().unwrap().len() > 1000).count() >= 5, "{made:?}");
        // Without a place for a cache there is no index.
        let alone = ask(second, None);
        let file = alone.strip_prefix("Line ").and_then(|rest| rest.split_once(" of ")).unwrap_or_default();
        assert!(file.0.parse::<u32>().is_ok() && file.1.starts_with("\"fs/xfs/xfs_super.c\""), "{alone}");
        assert_eq!(ask(second, Some(cache.path())), alone, "{}", gdb.display());
        assert_eq!(kept(), made, "{}: indexes were made again", gdb.display());
        // All code in the first unit: this must be seen, or the indexes were not used.
        for path in made {
            let mut index = std::fs::read(&path).unwrap();
            let word = |n: usize| u32::from_le_bytes(*index[n * 4..].first_chunk().unwrap()) as usize;
            let addresses = word(3)..word(4);
            for entry in index[addresses].chunks_exact_mut(20) {
                entry[16..].fill(0);
            }
            std::fs::write(&path, index).unwrap();
        }
        let wrong = ask(second, Some(cache.path()));
        assert!(wrong.starts_with("No line number information"), "{}: {wrong}", gdb.display());
    }
}

/// The letters of the vmlinux's symbols are those that the kernel was given by nm, but for the few that say more there.
#[test]
fn letters_of_a_vmlinux_are_the_guests() {
    let mut checked = 0;
    for set in lab::sets().unwrap_or_default() {
        let Some(path) = set.json["vmlinux"].as_str().map(|path| lab::root().join(path)) else {
            continue;
        };
        // Static functions and variables share names.
        let mut theirs: BTreeMap<String, BTreeSet<char>> = BTreeMap::new();
        // Absolute ones are the per-CPU variables of an image that has them at 0; nm calls them data.
        for (_, letter, name) in told_by_guest(&set).into_iter().filter(|line| line.1 != 'A') {
            theirs.entry(name).or_default().insert(letter.to_ascii_lowercase());
        }
        let info = kstub::debuginfo::DebugInfo::open(&path).unwrap();
        let ours: Vec<(char, &BTreeSet<char>)> = info
            .symbols()
            .iter()
            .filter_map(|symbol| Some((symbol.letter.to_ascii_lowercase(), theirs.get(symbol.name)?)))
            .collect();
        let other = ours.iter().filter(|(ours, theirs)| !theirs.contains(ours)).count();
        assert!(ours.len() > 50_000 && other < 10, "{}: {other} of {}", set.name(), ours.len());
        let no_data =
            ours.iter().filter(|(ours, theirs)| !theirs.contains(if *ours == 'd' { &'t' } else { ours }));
        assert!(no_data.count() > 1000, "{}: text in place of data must fail", set.name());
        checked += 1;
    }
    assert!(lab::sets().is_none() || checked > 0);
}
