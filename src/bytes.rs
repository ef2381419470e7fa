//! Bounds-checked little-endian reads over byte slices: every field of an untrusted file goes through here.

/// `N` bytes at `at`, or `None` past the end.
pub fn array_at<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

/// The little-endian `u16` at byte offset `at`, or `None` past the end.
pub fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    array_at(bytes, at).map(u16::from_le_bytes)
}

/// The little-endian `u32` at byte offset `at`, or `None` past the end.
pub fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    array_at(bytes, at).map(u32::from_le_bytes)
}

/// The little-endian `u64` at byte offset `at`, or `None` past the end.
pub fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    array_at(bytes, at).map(u64::from_le_bytes)
}

/// The bytes from `at` up to the first NUL, at most `max` of them: a C string field of fixed width.
pub fn cstr_at(bytes: &[u8], at: usize, max: usize) -> Option<&[u8]> {
    let rest = bytes.get(at..)?;
    let field = &rest[..rest.len().min(max)];
    Some(field.split(|&b| b == 0).next().unwrap_or(field))
}

/// Untrusted text with what a terminal or an XML reader would act on escaped: control characters, and those
/// that reorder the text around them.
pub fn printable(text: &str) -> String {
    let reorders =
        |c: char| matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        let harmful = c.is_control() || reorders(c) || matches!(c, '\u{fffe}' | '\u{ffff}');
        if harmful { out.extend(c.escape_unicode()) } else { out.push(c) }
    }
    out
}

/// A number of bytes as people read it: `636 KiB`, `766.9 MiB`, `1.00 GiB`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ByteSize(pub u64);

impl std::fmt::Display for ByteSize {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let bytes = self.0;
        match bytes {
            0..1024 => write!(f, "{bytes} bytes"),
            1024..0x10_0000 => write!(f, "{} KiB", bytes / 1024),
            0x10_0000..0x4000_0000 => write!(f, "{:.1} MiB", bytes as f64 / 1_048_576.0),
            _ => write!(f, "{:.2} GiB", bytes as f64 / 1_073_741_824.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_acts_on_a_terminal_is_escaped() {
        assert_eq!(printable("a\x1b[2J\u{9b}\u{202e}b\n"), "a\\u{1b}[2J\\u{9b}\\u{202e}b\\u{a}");
        assert_eq!(printable("kworker/0:1H-kblockd é"), "kworker/0:1H-kblockd é");
    }

    #[test]
    fn past_the_end_is_none() {
        let bytes = [1, 2, 3, 4];
        assert_eq!(u32_at(&bytes, 0), Some(0x0403_0201));
        assert_eq!(u32_at(&bytes, 1), None);
        assert_eq!(u16_at(&bytes, usize::MAX), None);
        assert_eq!(cstr_at(b"ab\0c", 0, 8), Some(&b"ab"[..]));
        assert_eq!(cstr_at(b"abcd", 1, 2), Some(&b"bc"[..]));
        assert_eq!(cstr_at(b"abcd", 5, 2), None);
    }
}
