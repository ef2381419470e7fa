//! From a reply's body to what goes on the wire.
//!
//! Source: GDB manual, "Overview" (framing, escapes).

use super::{checksum, hex};

/// `$body#cs`. A body that holds binary data must have gone through [`escape`].
pub fn frame(body: &[u8]) -> Vec<u8> {
    let mut packet = Vec::with_capacity(body.len() + 4);
    frame_into(&mut packet, |packet| packet.extend_from_slice(body));
    packet
}

/// Appends `$body#cs` to `out`, with the body that `write` appends: a long one is not copied.
pub fn frame_into(out: &mut Vec<u8>, write: impl FnOnce(&mut Vec<u8>)) {
    out.push(b'$');
    let start = out.len();
    write(out);
    let sum = checksum(out.get(start..).unwrap_or_default());
    out.push(b'#');
    hex::encode(&[sum], out);
}

/// Appends binary data to a body: `#`, `$`, `}` and `*` (which would start a run length) become `}` and the
/// byte with bit 5 flipped.
pub fn escape(bytes: &[u8], body: &mut Vec<u8>) {
    escape_up_to(bytes, usize::MAX, body);
}

/// As [`escape`], as far as no more than `room` bytes are appended; how many of `bytes` that took.
pub fn escape_up_to(bytes: &[u8], room: usize, body: &mut Vec<u8>) -> usize {
    const WORD: usize = size_of::<u64>();
    // Some more than is needed where few bytes are special: what is left over is cut off below.
    let start = body.len();
    let room = room.min(bytes.len().saturating_mul(2));
    body.resize(start.saturating_add(room), 0);
    let out = body.get_mut(start..).unwrap_or_default();
    let (mut taken, mut filled) = (0, 0);
    // Eight bytes at a time, of which those up to the first special one are good. Memory is sent this way.
    while let Some(word) = bytes.get(taken..).and_then(|rest| rest.first_chunk::<WORD>())
        && let Some(to) = out.get_mut(filled..).and_then(|rest| rest.first_chunk_mut::<{ WORD + 1 }>())
    {
        to[..WORD].copy_from_slice(word);
        match first_special(*word) {
            None => (taken, filled) = (taken + WORD, filled + WORD),
            Some(at) => {
                to[at..at + 2].copy_from_slice(&escaped(word[at]));
                (taken, filled) = (taken + at + 1, filled + at + 2);
            }
        }
    }
    while let Some(&byte) = bytes.get(taken) {
        let pair = escaped(byte);
        let sent = if is_special(byte) { &pair[..] } else { &[byte] };
        let Some(to) = out.get_mut(filled..).and_then(|rest| rest.get_mut(..sent.len())) else { break };
        to.copy_from_slice(sent);
        (taken, filled) = (taken + 1, filled + sent.len());
    }
    body.truncate(start + filled);
    taken
}

const SPECIAL: [u8; 4] = *b"#$}*";

fn is_special(byte: u8) -> bool {
    SPECIAL.contains(&byte)
}

fn escaped(byte: u8) -> [u8; 2] {
    [b'}', byte ^ 0x20]
}

/// Which byte of `word` is the first special one.
fn first_special(word: [u8; 8]) -> Option<usize> {
    const ONES: u64 = u64::from_ne_bytes([1; 8]);
    const TOPS: u64 = ONES << 7;
    let word = u64::from_le_bytes(word);
    // The lowest top bit of `zeros` is set where the lowest zero byte is; those above it may be wrong.
    let zeros = |bytes: u64| bytes.wrapping_sub(ONES) & !bytes & TOPS;
    let special = SPECIAL.iter().fold(0, |all, &byte| all | zeros(word ^ (ONES * u64::from(byte))));
    (special != 0).then(|| special.trailing_zeros() as usize / 8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_carry_their_checksum() {
        assert_eq!(frame(b""), b"$#00");
        assert_eq!(frame(b"OK"), b"$OK#9a");
    }

    #[test]
    fn the_four_special_bytes_are_escaped() {
        let mut body = b"b".to_vec();
        escape(b"a#$}*\x00\xff", &mut body);
        assert_eq!(body, b"ba}\x03}\x04}\x5d}\x0a\x00\xff");
    }

    #[test]
    fn any_bytes_in_any_room_match_a_byte_by_byte_model() {
        let mut seed = 3u32;
        let mut random = |n: usize| {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (seed >> 8) as usize % n
        };
        // Special bytes, those next to them, and what a borrow may be taken for.
        let alphabet = b"#$}*\x22\x25\x29\x2b\x7c\x7e\x00\x01\x80\xa3\xa4\xfd\xff";
        for _ in 0..20_000 {
            let bytes: Vec<u8> = (0..random(70)).map(|_| alphabet[random(alphabet.len())]).collect();
            let room = random(150);
            let (mut model, mut fitting) = (b"b".to_vec(), 0);
            for &byte in &bytes {
                let sent = if b"#$}*".contains(&byte) { vec![b'}', byte ^ 0x20] } else { vec![byte] };
                if model.len() - 1 + sent.len() > room {
                    break;
                }
                model.extend(sent);
                fitting += 1;
            }
            let mut body = b"b".to_vec();
            assert_eq!(escape_up_to(&bytes, room, &mut body), fitting, "{bytes:x?} in {room}");
            assert_eq!(body, model);
        }
    }
}
