//! Flattened streams: what they describe, put together by a second reader, must be the same dump.
#![no_main]

use kstub_fuzz::{FILE_MAX, asked, dump, file, same_dump};

const HEADER: usize = 4096;

/// The file that `makedumpfile -R` would write; `None` without an end mark, or if it is too large.
fn reassembled(stream: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    let mut rest = stream.get(HEADER..)?;
    loop {
        let (offset, tail) = rest.split_first_chunk()?;
        let (size, tail) = tail.split_first_chunk()?;
        let (offset, size) = (i64::from_be_bytes(*offset), i64::from_be_bytes(*size));
        if (offset, size) == (-1, -1) {
            return Some(out);
        }
        let (at, size) =
            (usize::try_from(offset).ok()?, usize::try_from(size).ok().filter(|&size| size > 0)?);
        let end = at.checked_add(size).filter(|&end| end <= FILE_MAX)?;
        let (data, tail) = tail.split_at_checked(size)?;
        out.resize(out.len().max(end), 0);
        out[at..end].copy_from_slice(data);
        rest = tail;
    }
}

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let stream = file(input);
    let asked = asked(input);
    let flattened = dump(stream.clone(), &asked);
    if !stream.starts_with(b"makedumpfile\0\0\0\0") || stream.get(16..32) != Some(&VERSION) {
        return;
    }
    // A stream is not walked further than its own length, so one of mostly holes can have less.
    let Some(plain) = reassembled(&stream).filter(|plain| plain.len() <= stream.len()) else { return };
    if plain.starts_with(b"makedumpfile\0\0\0\0") {
        return;
    }
    match (flattened, dump(plain, &asked)) {
        (None, None) => {}
        (Some(flattened), Some(plain)) => same_dump(&flattened, &plain, &asked),
        (flattened, _) => panic!("only one can be read; the stream: {}", flattened.is_some()),
    }
});

/// Type and version, both 1.
const VERSION: [u8; 16] = [0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1];
