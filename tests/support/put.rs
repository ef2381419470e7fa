//! Fields written at given byte offsets, in either byte order.

/// Overwrites `bytes[at..]` with `value`, growing the buffer with zeros where needed.
pub fn put(bytes: &mut Vec<u8>, at: usize, value: &[u8]) {
    if bytes.len() < at + value.len() {
        bytes.resize(at + value.len(), 0);
    }
    bytes[at..at + value.len()].copy_from_slice(value);
}

pub fn put_u16(bytes: &mut Vec<u8>, at: usize, value: u16) {
    put(bytes, at, &value.to_le_bytes());
}

pub fn put_u32(bytes: &mut Vec<u8>, at: usize, value: u32) {
    put(bytes, at, &value.to_le_bytes());
}

pub fn put_u64(bytes: &mut Vec<u8>, at: usize, value: u64) {
    put(bytes, at, &value.to_le_bytes());
}

/// Zeros up to the next multiple of `to`.
pub fn pad_to(bytes: &mut Vec<u8>, to: usize) {
    bytes.resize(bytes.len().next_multiple_of(to), 0);
}
