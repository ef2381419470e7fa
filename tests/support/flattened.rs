//! makedumpfile's flattened format: a stream of (offset, size, data) records in big-endian byte order.
//!
//! Source: makedumpfile's `makedumpfile.h` (struct makedumpfile_header, struct makedumpfile_data_header); QEMU's
//! `include/sysemu/dump.h`. The header fills 4096 bytes; offset and size −1 end the stream.

use super::Rng;

pub const HEADER_SIZE: usize = 4096;

/// How to cut a file into records.
#[derive(Clone)]
pub struct Flatten {
    /// Largest record; each is between half of it and all of it.
    pub record_size: usize,
    /// Write the records in another order.
    pub shuffle: bool,
    /// Write the first block as junk first and properly at the very end, as makedumpfile does with its header.
    pub header_last: bool,
    /// Make some records overlap what an earlier record already wrote.
    pub overlap: bool,
    /// Leave out runs of zeros of at least this many bytes: nobody writes them.
    pub skip_zeros: Option<usize>,
    /// Write the record that ends the stream.
    pub end_mark: bool,
    pub seed: u64,
}

impl Default for Flatten {
    fn default() -> Self {
        Self {
            record_size: 10_000,
            shuffle: false,
            header_last: false,
            overlap: false,
            skip_zeros: None,
            end_mark: true,
            seed: 1,
        }
    }
}

/// One record: where its header lies in the stream, and what part of the file it carries.
#[derive(Clone, Debug)]
pub struct Record {
    pub stream_offset: u64,
    pub offset: u64,
    pub size: u64,
}

pub struct FlattenedFile {
    pub bytes: Vec<u8>,
    pub records: Vec<Record>,
}

impl FlattenedFile {
    /// Offsets where a structure begins or ends.
    pub fn boundaries(&self) -> Vec<u64> {
        let mut all = vec![0, 12, 16, 24, 32, HEADER_SIZE as u64, self.bytes.len() as u64];
        for record in self.records.iter().take(40).chain(self.records.iter().rev().take(10)) {
            all.extend([record.stream_offset, record.stream_offset + 8, record.stream_offset + 16]);
        }
        all.sort_unstable();
        all.dedup();
        all
    }
}

pub fn header() -> Vec<u8> {
    let mut out = vec![0; HEADER_SIZE];
    out[..12].copy_from_slice(b"makedumpfile");
    out[16..24].copy_from_slice(&1i64.to_be_bytes());
    out[24..32].copy_from_slice(&1i64.to_be_bytes());
    out
}

pub fn record(out: &mut Vec<u8>, offset: i64, data: &[u8]) {
    out.extend_from_slice(&offset.to_be_bytes());
    out.extend_from_slice(&(data.len() as i64).to_be_bytes());
    out.extend_from_slice(data);
}

impl Flatten {
    pub fn apply(&self, file: &[u8]) -> FlattenedFile {
        let mut rng = Rng::new(self.seed);
        let mut pieces: Vec<(usize, Vec<u8>)> = Vec::new();
        let mut at = 0;
        while at < file.len() {
            let half = (self.record_size / 2).max(1);
            let want = half + rng.below((self.record_size - half + 1) as u64) as usize;
            let end = (at + want.max(1)).min(file.len());
            pieces.push((at, file[at..end].to_vec()));
            at = end;
        }
        if let Some(run) = self.skip_zeros {
            pieces = pieces.into_iter().flat_map(|(at, data)| without_zeros(at, data, run)).collect();
        }
        if self.shuffle {
            rng.shuffle(&mut pieces);
        }
        if self.overlap {
            // Later records win: first junk over a stretch, then the stretch again.
            let stretches: Vec<_> = (0..8)
                .map(|_| {
                    let at = rng.below(file.len() as u64) as usize;
                    (at, (at + 1 + rng.below(9000) as usize).min(file.len()))
                })
                .collect();
            let mut first: Vec<_> =
                stretches.iter().map(|&(from, to)| (from, rng.bytes(to - from))).collect();
            first.append(&mut pieces);
            pieces = first;
            pieces.extend(stretches.iter().map(|&(from, to)| (from, file[from..to].to_vec())));
        }
        if self.header_last {
            let n = 4096.min(file.len());
            pieces.insert(0, (0, rng.bytes(n)));
            pieces.push((0, file[..n].to_vec()));
        }

        let mut bytes = header();
        let mut records = Vec::new();
        for (offset, data) in pieces {
            let stream_offset = bytes.len() as u64;
            records.push(Record { stream_offset, offset: offset as u64, size: data.len() as u64 });
            record(&mut bytes, offset as i64, &data);
        }
        if self.end_mark {
            bytes.extend_from_slice(&(-1i64).to_be_bytes());
            bytes.extend_from_slice(&(-1i64).to_be_bytes());
        }
        FlattenedFile { bytes, records }
    }
}

fn without_zeros(at: usize, data: Vec<u8>, run: usize) -> Vec<(usize, Vec<u8>)> {
    let mut out = Vec::new();
    let mut from = 0;
    let mut i = 0;
    while i < data.len() {
        let zeros = data[i..].iter().take_while(|&&b| b == 0).count();
        if zeros >= run {
            if from < i {
                out.push((at + from, data[from..i].to_vec()));
            }
            from = i + zeros;
        }
        i += zeros.max(1);
    }
    if from < data.len() {
        out.push((at + from, data[from..].to_vec()));
    }
    out
}
