//! Run lengths: `0*~` in a reply is 98 times `0`. Memory is full of pages of one byte, of which little is left this way.
//!
//! Runs are looked for in memory and by the block, not in what is sent and by the byte: memory without any costs a
//! comparison of a word for each block. Source: GDB manual, "Overview" ("run-length encoded").

use super::encode::{BLOCK, escape_up_to, is_special};
use super::hex;

/// The character for a count is this much more.
const COUNT_BASE: usize = 29;
/// The most repetitions of a character that one count stands for: it is to be printable.
const MOST_REPEATS: usize = b'~' as usize - COUNT_BASE;
/// A run's first character, `*` and the count.
const RUN: usize = 3;

/// Appends `bytes` as [`hex::encode`] does, but for runs.
pub fn encode_runs(bytes: &[u8], body: &mut Vec<u8>) {
    let has_digit = |byte: u8| byte >> 4 == byte & 0xf;
    for (part, run_of) in parts(bytes, has_digit) {
        match run_of {
            Some(byte) => repeat(hex::digits(byte)[0], 2 * part.len(), body),
            None => hex::encode(part, body),
        }
    }
}

/// Appends `bytes` as [`escape_up_to`] does, but for runs, and as far as no more than `room` bytes are appended; how many of
/// `bytes` that took.
pub fn escape_runs_up_to(bytes: &[u8], room: usize, body: &mut Vec<u8>) -> usize {
    let end = body.len().saturating_add(room);
    let mut taken = 0;
    for (part, run_of) in parts(bytes, |byte| !is_special(byte)) {
        let left = end.saturating_sub(body.len());
        let took = match run_of {
            Some(byte) => {
                // What is over at the end takes more room than a whole run, but not more than two.
                let fitting = (left / RUN).saturating_sub(2) * (1 + MOST_REPEATS);
                let took = part.len().min(fitting);
                repeat(byte, took, body);
                took
            }
            None => escape_up_to(part, left, body),
        };
        taken += took;
        if took < part.len() {
            break;
        }
    }
    taken
}

/// Cuts memory into parts that are runs of one byte, for which `may_run` is true, and parts that are not.
fn parts(bytes: &[u8], may_run: impl Fn(u8) -> bool) -> impl Iterator<Item = (&[u8], Option<u8>)> {
    let run_of = move |block: &[u8; BLOCK]| only_byte(block).filter(|&byte| may_run(byte));
    let mut rest = bytes;
    let mut ahead = None;
    std::iter::from_fn(move || {
        let blocks = rest.as_chunks::<BLOCK>().0;
        if let Some(byte) = ahead.take().or_else(|| blocks.first().and_then(&run_of)) {
            let len = blocks.iter().take_while(|block| is_all(block, byte)).count() * BLOCK;
            return Some((rest.split_off(..len)?, Some(byte)));
        }
        let next = blocks.iter().position(|block| {
            ahead = run_of(block);
            ahead.is_some()
        });
        let len = next.map_or(rest.len(), |next| next * BLOCK);
        let part = rest.split_off(..len)?;
        (!part.is_empty()).then_some((part, None))
    })
}

/// The byte that is all of `block`. Mostly the first word tells that there is none.
fn only_byte(block: &[u8; BLOCK]) -> Option<u8> {
    let first = block[0];
    (block[..8] == [first; 8] && is_all(block, first)).then_some(first)
}

/// Written so that the compiler compares many bytes at once, and calls nothing.
fn is_all(block: &[u8; BLOCK], byte: u8) -> bool {
    block.iter().fold(0, |differ, &one| differ | (one ^ byte)) == 0
}

/// Appends `count` times the character `byte`, which is none of those that are escaped.
fn repeat(byte: u8, mut count: usize, body: &mut Vec<u8>) {
    while count > 0 {
        body.push(byte);
        let repeats = match (count - 1).min(MOST_REPEATS) {
            // Shorter so.
            0..=2 => 0,
            // These would be `#`, `$`, `+` and `-`.
            6 | 7 => 5,
            n @ (14 | 16) => n - 1,
            n => n,
        };
        if repeats > 0 {
            body.extend([b'*', (COUNT_BASE + repeats) as u8]);
        }
        count -= 1 + repeats;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// As gdb expands a packet before it looks for escapes (`read_frame` in gdb/remote.c).
    fn expand(body: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        let mut rest = body.iter();
        while let Some(&byte) = rest.next() {
            assert!(!b"#$".contains(&byte));
            if byte != b'*' {
                out.push(byte);
                continue;
            }
            let &count = rest.next().unwrap();
            assert!((b' '..=b'~').contains(&count) && !b"#$+-".contains(&count), "{count}");
            let last = *out.last().unwrap();
            out.extend(std::iter::repeat_n(last, usize::from(count) - 29));
        }
        out
    }

    #[test]
    fn any_count_is_expanded_to_itself() {
        for count in 0..1000 {
            let mut body = Vec::new();
            repeat(b'0', count, &mut body);
            assert_eq!(expand(&body), vec![b'0'; count]);
            assert!(body.len() <= RUN * (count / (1 + MOST_REPEATS)) + 2 * RUN, "{count}: {}", body.len());
        }
    }

    #[test]
    fn zeros_shrink_and_text_does_not_grow() {
        let mut body = Vec::new();
        encode_runs(&[0; 4096], &mut body);
        assert!(body.len() < 300, "{}", body.len());
        body.clear();
        assert_eq!(escape_runs_up_to(&[0xcc; 4096], 4096, &mut body), 4096);
        assert!(body.len() < 200, "{}", body.len());
        let text: Vec<u8> = (0..4096u32).map(|n| n as u8).collect();
        let (mut plain, mut runs) = (Vec::new(), Vec::new());
        hex::encode(&text, &mut plain);
        encode_runs(&text, &mut runs);
        assert_eq!(plain, runs);
    }

    #[test]
    fn runs_among_other_bytes_come_back_in_any_room() {
        let mut seed = 5u32;
        let mut random = |n: usize| {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (seed >> 8) as usize % n
        };
        // Characters that may run and that may not, in hex or escaped.
        let alphabet = b"\x00\xff\x11\x12#$}*\x03";
        for _ in 0..5000 {
            let mut bytes = Vec::new();
            for _ in 0..random(12) {
                let len = [random(5), random(700)][random(2)];
                bytes.extend(std::iter::repeat_n(alphabet[random(alphabet.len())], len));
            }
            let mut body = Vec::new();
            encode_runs(&bytes, &mut body);
            assert_eq!(hex::decode(&expand(&body)).unwrap(), bytes);
            let room = random(900);
            let mut body = b"b".to_vec();
            let taken = escape_runs_up_to(&bytes, room, &mut body);
            assert!(body.len() <= 1 + room, "{} in {room}", body.len());
            assert_eq!(crate::rsp::unescape(&expand(&body[1..])).unwrap(), bytes[..taken]);
            // No room is left that two more runs or an escape would fit into.
            assert!(taken == bytes.len() || body.len() + 3 * RUN >= room, "{} of {room}", body.len());
        }
    }
}
