//! LiME memory images. Source: LiME `doc/README.md`: magic 0x4c694d45, version, first and last address (the last
//! one inclusive), 8 reserved bytes; then the range's bytes. Everything little endian.

pub const HEADER_SIZE: usize = 32;

/// The header of a range.
pub fn header(version: u32, first: u64, last: u64) -> Vec<u8> {
    let mut out = 0x4c69_4d45u32.to_le_bytes().to_vec();
    out.extend(version.to_le_bytes());
    out.extend(first.to_le_bytes());
    out.extend(last.to_le_bytes());
    out.extend([0; 8]);
    out
}

/// An image of `(address, bytes)`, in this order.
pub fn image(ranges: &[(u64, Vec<u8>)]) -> Vec<u8> {
    ranges
        .iter()
        .flat_map(|(at, bytes)| [header(1, *at, at + bytes.len() as u64 - 1), bytes.clone()].concat())
        .collect()
}
