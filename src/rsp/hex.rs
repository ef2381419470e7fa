//! Hexadecimal as the protocol writes it: two lower-case digits a byte, numbers big-endian without prefix.
//!
//! Source: GDB manual, "Overview".

/// Bytes written together: few enough for the compiler to keep them in vector registers.
const BLOCK: usize = 32;

/// Both digits of a byte, by arithmetic that the compiler can do for many bytes at once: memory is sent this way.
pub(super) fn digits(byte: u8) -> [u8; 2] {
    let nibbles = u16::from(byte) >> 4 | (u16::from(byte) & 0xf) << 8;
    // 1 for each nibble above 9, whose digits are not '0' and up, but 'a' and up.
    let letters = (nibbles + 0x0606) >> 4 & 0x0101;
    const TO_LETTER: u16 = (b'a' - b'0' - 10) as u16;
    (nibbles + 0x3030 + letters * TO_LETTER).to_le_bytes()
}

/// Appends `bytes` to `out` as hex.
pub fn encode(bytes: &[u8], out: &mut Vec<u8>) {
    out.reserve(bytes.len() * 2);
    let (blocks, rest) = bytes.as_chunks::<BLOCK>();
    for block in blocks {
        let mut text = [[0; 2]; BLOCK];
        text.iter_mut().zip(block).for_each(|(text, &byte)| *text = digits(byte));
        out.extend_from_slice(text.as_flattened());
    }
    rest.iter().for_each(|&byte| out.extend_from_slice(&digits(byte)));
}

/// The bytes behind `text`; `None` for an odd length or a character that is no hex digit.
pub fn decode(text: &[u8]) -> Option<Vec<u8>> {
    if !text.len().is_multiple_of(2) {
        return None;
    }
    text.chunks_exact(2).map(|pair| Some(nibble(pair[0])? << 4 | nibble(pair[1])?)).collect()
}

/// A number; `None` if there is no digit, a foreign character, or more than 64 bits.
pub fn parse_u64(text: &[u8]) -> Option<u64> {
    if text.is_empty() {
        return None;
    }
    text.iter().try_fold(0u64, |value, &digit| {
        let shifted = value.checked_mul(16)?;
        Some(shifted | u64::from(nibble(digit)?))
    })
}

pub(super) fn nibble(digit: u8) -> Option<u8> {
    char::from(digit).to_digit(16).and_then(|n| u8::try_from(n).ok())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn every_byte_survives() {
        let all: Vec<u8> = (0..=255).collect();
        let mut text = Vec::new();
        encode(&all, &mut text);
        assert!(text.starts_with(b"000102") && text.ends_with(b"fdfeff"));
        let plain: String = all.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(text, plain.as_bytes());
        for from in 0..all.len() {
            let mut part = b"b".to_vec();
            encode(&all[from..], &mut part);
            assert_eq!(part[1..], text[from * 2..]);
        }
        assert_eq!(decode(&text).unwrap(), all);
        assert_eq!(decode(b"aAfF").unwrap(), [0xaa, 0xff]);
    }

    #[test]
    fn what_is_no_hex_is_none() {
        assert_eq!(decode(b"abc"), None);
        assert_eq!(decode(b"zz"), None);
        assert_eq!(decode(b""), Some(vec![]));
        assert_eq!(parse_u64(b""), None);
        assert_eq!(parse_u64(b"-1"), None);
        assert_eq!(parse_u64(b"0x1"), None);
        assert_eq!(parse_u64(b"ffffffffffffffff"), Some(u64::MAX));
        assert_eq!(parse_u64(b"10000000000000000"), None);
        assert_eq!(parse_u64(b"00000000000000000000001F"), Some(0x1f));
    }
}
