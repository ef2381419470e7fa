//! An empty disk that can keep snapshots of a guest, without `qemu-img`. Source: QEMU `docs/interop/qcow2.txt`.

use std::path::Path;

const CLUSTER_BITS: u32 = 16;

/// Writes a qcow2 image of version 3 with nothing in it: a header, the table and the block of reference counts, the L1 table.
pub fn empty_qcow2(path: &Path) {
    let cluster = 1u64 << CLUSTER_BITS;
    let mut image = vec![0; 4 * cluster as usize];
    let mut put =
        |at: u64, bytes: &[u8]| image[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
    put(0, b"QFI\xfb");
    let words = [(4, 3), (20, CLUSTER_BITS), (36, 1), (56, 1), (96, 4), (100, 104)];
    words.into_iter().for_each(|(at, value): (u64, u32)| put(at, &value.to_be_bytes()));
    let longs = [(24, 64 << 20), (40, 3 * cluster), (48, cluster), (cluster, 2 * cluster)];
    longs.into_iter().for_each(|(at, value): (u64, u64)| put(at, &value.to_be_bytes()));
    (0..4).for_each(|used| put(2 * cluster + 2 * used, &1u16.to_be_bytes()));
    std::fs::write(path, image).expect("disk image");
}
