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
    // Some more than is needed where few bytes are special: what is left over is cut off below.
    let start = body.len();
    let room = room.min(bytes.len().saturating_mul(2));
    body.resize(start.saturating_add(room), 0);
    let out = body.get_mut(start..).unwrap_or_default();
    let (mut taken, mut filled) = (0, 0);
    // Memory is sent this way, and of kernel code every 44th byte is special: blocks are copied whole, and behind each
    // special byte again, one further on.
    while let Some(from) = bytes.get(taken..).and_then(|rest| rest.first_chunk::<{ 2 * BLOCK }>())
        && let Some(to) = out.get_mut(filled..).and_then(|rest| rest.first_chunk_mut::<{ 3 * BLOCK }>())
        && let (Some(block), Some(copy)) = (from.first_chunk::<BLOCK>(), to.first_chunk_mut())
    {
        *copy = *block;
        let (mut special, mut longer) = (specials(block), 0);
        while special != 0 {
            let at = special.trailing_zeros() as usize;
            special &= special - 1;
            let from = from.get(at..).and_then(|from| from.first_chunk::<{ 1 + BLOCK }>());
            let to = to.get_mut(at + longer..).and_then(|to| to.first_chunk_mut::<{ 2 + BLOCK }>());
            if let (Some([byte, from @ ..]), Some([mark, sent, to @ ..])) = (from, to) {
                [*mark, *sent] = escaped(*byte);
                *to = *from;
                longer += 1;
            }
        }
        (taken, filled) = (taken + BLOCK, filled + BLOCK + longer);
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

/// Bytes that are looked at together: as many as there are bits in what says which are special.
pub(super) const BLOCK: usize = u64::BITS as usize;

pub(super) fn is_special(byte: u8) -> bool {
    SPECIAL.iter().fold(false, |found, &special| found | (byte == special))
}

fn escaped(byte: u8) -> [u8; 2] {
    [b'}', byte ^ 0x20]
}

/// A bit for each byte of `block` that is special. Written so that the compiler compares many at once.
fn specials(block: &[u8; BLOCK]) -> u64 {
    // Moves the lowest bit of each of eight bytes into the highest byte, without one carrying into another.
    const GATHER: u64 = 0x0102_0408_1020_4080;
    let flags = block.map(|byte| u8::from(is_special(byte)));
    let gathered =
        flags.as_chunks().0.iter().map(|eight| u64::from_le_bytes(*eight).wrapping_mul(GATHER) >> 56);
    gathered.enumerate().fold(0, |all, (n, bits)| all | bits << (8 * n))
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
        // Special bytes, those next to them, and those that differ in the highest bit.
        let alphabet = b"#$}*\x22\x25\x29\x2b\x7c\x7e\x00\x01\x80\xa3\xa4\xfd\xff";
        for _ in 0..20_000 {
            let bytes: Vec<u8> = (0..random(400)).map(|_| alphabet[random(alphabet.len())]).collect();
            let room = random(850);
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
