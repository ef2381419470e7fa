//! Hexadecimal as the protocol writes it: two lower-case digits a byte, numbers big-endian without prefix.
//!
//! Source: GDB manual, "Overview".

/// Both digits of every byte: memory is sent through this table, so it must be fast.
const DIGITS: [[u8; 2]; 256] = {
    let symbols = b"0123456789abcdef";
    let mut table = [[0; 2]; 256];
    let mut byte = 0;
    while byte < 256 {
        table[byte] = [symbols[byte >> 4], symbols[byte & 15]];
        byte += 1;
    }
    table
};

/// Appends `bytes` to `out` as hex.
pub fn encode(bytes: &[u8], out: &mut Vec<u8>) {
    out.reserve(bytes.len() * 2);
    for &byte in bytes {
        out.extend_from_slice(&DIGITS[usize::from(byte)]);
    }
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
