//! Sets of parts: the order in which they are named must not matter.
#![no_main]

use kstub::backend::{Backend, Dump};
use kstub_fuzz::{asked, check_memory, check_text, file, same_dump, take, take_bytes};

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let mut rest = input;
    let [choice] = take(&mut rest);
    // One file can lie beside the others without being named.
    let (named, forgotten) = (1 + choice % 4, choice >> 7);
    let Ok(dir) = tempfile::tempdir() else { return };
    let mut paths: Vec<_> = (0..named + forgotten).map(|i| dir.path().join(format!("part{i}"))).collect();
    for path in &paths {
        if std::fs::write(path, file(take_bytes(&mut rest))).is_err() {
            return;
        }
    }
    paths.truncate(named.into());
    let forward = Dump::open_parts(&paths);
    paths.reverse();
    let asked = asked(input);
    match (forward, Dump::open_parts(&paths)) {
        (Err(one), Err(other)) => [one, other].iter().for_each(|error| check_text(&error.to_string())),
        (Ok(one), Ok(other)) => {
            one.problems().iter().for_each(|text| check_text(text));
            check_memory(&one, &asked);
            same_dump(&one, &other, &asked);
        }
        (one, other) => panic!("the order matters: {:?}, {:?}", one.err(), other.err()),
    }
});
