//! From a reply's body to what goes on the wire.
//!
//! Source: GDB manual, "Overview" (framing, escapes).

use super::{checksum, hex};

/// `$body#cs`. A body that holds binary data must have gone through [`escape`].
pub fn frame(body: &[u8]) -> Vec<u8> {
    let mut packet = Vec::with_capacity(body.len() + 4);
    packet.push(b'$');
    packet.extend_from_slice(body);
    packet.push(b'#');
    hex::encode(&[checksum(body)], &mut packet);
    packet
}

/// Appends binary data to a body: `#`, `$`, `}` and `*` (which would start a run length) become `}` and the
/// byte with bit 5 flipped.
pub fn escape(bytes: &[u8], body: &mut Vec<u8>) {
    body.reserve(bytes.len());
    for &byte in bytes {
        if matches!(byte, b'#' | b'$' | b'}' | b'*') {
            body.extend_from_slice(&[b'}', byte ^ 0x20]);
        } else {
            body.push(byte);
        }
    }
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
}
