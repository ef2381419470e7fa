//! A vmlinux: symbols, BTF, DWARF, and what is left of it when it is stripped.
#![no_main]

use kstub::debuginfo::{DebugInfo, build_id_in_notes};
use kstub_fuzz::FILE_MAX;

const NAMES: [&str; 6] = ["outer", "task", "main", "init_task", "task_struct", ""];
const PATHS: [&str; 8] = ["pad", "one.a", "one.x", "deepest", "deeper", "choice", "comm", "several.a"];

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let _ = build_id_in_notes(input);
    let file = kstub_fuzz::file(input);
    let Ok(dir) = tempfile::tempdir() else { return };
    let path = dir.path().join("vmlinux");
    if std::fs::write(&path, &file).is_err() {
        return;
    }
    let Ok(info) = DebugInfo::open(&path) else { return };
    let symbols = info.symbols();
    for name in NAMES {
        if let Some(symbol) = symbols.lookup(name) {
            assert_eq!(symbol.name, name);
            if symbol.size > 0 {
                let (covers, offset) = symbols.at(symbol.addr).expect("a symbol covers its own address");
                assert_eq!((covers.addr, offset), (symbol.addr, 0));
            }
        }
        for path in PATHS {
            assert_eq!(info.member(name, path), info.member(name, path));
        }
        let _ = info.variable_type(name).map(|spelled| info.types().parse(&spelled));
        if let Some(symbol) = info.symbol(name) {
            let _ = (info.locate(symbol.addr), info.declared(symbol.addr));
        }
    }
    let first = info.first_load().unwrap_or(0);
    assert!(info.bytes_at(first, 16).is_none_or(|bytes| bytes.len() == 16));

    let mut buf = vec![0; FILE_MAX];
    if let Ok(whole) = info.whole() {
        assert_eq!(whole.len(), file.len() as u64);
        assert!(whole.read(0, &mut buf).is_ok_and(|n| buf[..n] == file));
        assert!(whole.read(whole.len(), &mut buf).is_ok_and(|n| n == 0));
    }
    let Ok(stripped) = info.stripped() else { return };
    let Ok(n) = stripped.read(0, &mut buf) else { return };
    assert_eq!(n as u64, stripped.len().min(FILE_MAX as u64));
    if n as u64 == stripped.len() {
        let path = dir.path().join("stripped");
        if std::fs::write(&path, &buf[..n]).is_err() {
            return;
        }
        let again = DebugInfo::open(&path).expect("what was stripped is still a vmlinux");
        assert_eq!(again.first_load(), info.first_load());
        // A damaged file can have it where nothing is loaded, and that is stripped.
        assert!(again.build_id().is_none() || again.build_id() == info.build_id());
        for name in NAMES {
            assert_eq!(again.symbol(name), info.symbol(name), "{name}");
        }
    }
});
