//! kdump-compressed files as makedumpfile and QEMU write them.
//!
//! Sources: makedumpfile's `diskdump_mod.h` (struct disk_dump_header, kdump_sub_header, page_desc) and
//! `IMPLEMENTATION`; QEMU's `include/sysemu/dump.h`. All fields little endian, natural x86-64 alignment:
//! header 464 bytes, sub header 104, page descriptor 24.

use super::put::{pad_to, put, put_u32, put_u64};
use super::{FlatMemory, Page};
use std::collections::BTreeMap;
use std::ops::Range;

pub const FLAG_ZLIB: u32 = 0x1;
pub const FLAG_LZO: u32 = 0x2;
pub const FLAG_SNAPPY: u32 = 0x4;
pub const STATUS_INCOMPLETE: u32 = 0x8;
pub const STATUS_EXCLUDED_VMEMMAP: u32 = 0x10;
pub const FLAG_ZSTD: u32 = 0x20;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Codec {
    Raw,
    Zlib,
    Zstd,
    /// By the writers below.
    Lzo,
    Snappy,
}

impl Codec {
    pub const ALL: [Codec; 5] = [Self::Raw, Self::Zlib, Self::Zstd, Self::Lzo, Self::Snappy];

    pub fn flag(self) -> u32 {
        match self {
            Self::Raw => 0,
            Self::Zlib => FLAG_ZLIB,
            Self::Zstd => FLAG_ZSTD,
            Self::Lzo => FLAG_LZO,
            Self::Snappy => FLAG_SNAPPY,
        }
    }

    pub fn encode(self, page: &[u8]) -> Vec<u8> {
        match self {
            Self::Raw => page.to_vec(),
            Self::Zlib => {
                // Level 1, as makedumpfile's. The library's `fastest()` stores without compressing.
                let level = libdeflater::CompressionLvl::new(1).expect("level");
                let mut level = libdeflater::Compressor::new(level);
                let mut out = vec![0; level.zlib_compress_bound(page.len())];
                let n = level.zlib_compress(page, &mut out).expect("bound is enough");
                out.truncate(n);
                out
            }
            Self::Zstd => zstd::bulk::compress(page, 1).expect("zstd"),
            Self::Lzo => lzo1x(page),
            Self::Snappy => snappy(page),
        }
    }
}

/// What the file says of a page frame.
#[derive(Clone)]
pub enum Slot {
    /// In both bitmaps, with data.
    Data(Page),
    /// In bitmap 1 only: RAM that the filter left out.
    Excluded,
    /// In both bitmaps, with this descriptor and these bytes in place of sound ones.
    Broken { size: u32, flags: u32, stored: Vec<u8>, offset: Option<u64> },
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Style {
    /// Bitmap 1 = RAM, bitmap 2 = dumped. Zero pages share one raw descriptor if the dump level has bit 0.
    Makedumpfile,
    /// Both bitmaps equal; zero pages share one raw descriptor; dump level 1.
    Qemu,
}

#[derive(Clone)]
pub struct Kdump {
    pub signature: [u8; 8],
    pub version: u32,
    pub block_size: u32,
    pub status: u32,
    pub nr_cpus: u32,
    pub current_cpu: u32,
    /// sysname, nodename, release, version, machine, domainname.
    pub utsname: [String; 6],
    pub phys_base: u64,
    pub dump_level: u32,
    /// When the dump was made, in seconds: the same in all parts of a split set.
    pub time: u64,
    /// `start_pfn..end_pfn` of this part of a split set.
    pub split: Option<Range<u64>>,
    /// Frames; one that is missing is not RAM.
    pub slots: BTreeMap<u64, Slot>,
    /// One past the last frame; by default the last slot's.
    pub max_mapnr: Option<u64>,
    /// The codec of each page, by frame number; a page that does not shrink is stored raw, as the tools do.
    pub codecs: Vec<Codec>,
    /// Contents of the note area (header version 4 and later).
    pub notes: Vec<u8>,
    /// VMCOREINFO text (header version 3 and later), stored after the notes.
    pub vmcoreinfo: Vec<u8>,
    /// Instead of a copy of its own, VMCOREINFO is this part of the notes.
    pub vmcoreinfo_in_notes: Option<Range<u64>>,
    pub style: Style,
}

impl Default for Kdump {
    fn default() -> Self {
        Self {
            signature: *b"KDUMP   ",
            version: 6,
            block_size: 4096,
            status: 0,
            nr_cpus: 2,
            current_cpu: 0,
            utsname: ["Linux", "host", "6.1.0-test-amd64", "#1 SMP", "x86_64", "(none)"].map(str::to_owned),
            phys_base: 0,
            dump_level: 0,
            time: 1_700_000_000,
            split: None,
            slots: BTreeMap::new(),
            max_mapnr: None,
            codecs: vec![Codec::Zlib],
            notes: Vec::new(),
            vmcoreinfo: Vec::new(),
            vmcoreinfo_in_notes: None,
            style: Style::Makedumpfile,
        }
    }
}

/// A finished file and where its parts lie.
pub struct KdumpFile {
    pub bytes: Vec<u8>,
    pub sub_header: Range<u64>,
    pub notes: Range<u64>,
    pub vmcoreinfo: Range<u64>,
    pub bitmap1: Range<u64>,
    pub bitmap2: Range<u64>,
    pub descriptors: Range<u64>,
    /// Frame → file offset of its descriptor.
    pub descriptor_of: BTreeMap<u64, u64>,
    /// Frame → file range of its stored data.
    pub data_of: BTreeMap<u64, Range<u64>>,
}

impl KdumpFile {
    /// Offsets where a structure begins or ends.
    pub fn boundaries(&self) -> Vec<u64> {
        let mut all = vec![0, 8, 12, 402, 424, 464, 4096];
        for part in
            [&self.sub_header, &self.notes, &self.vmcoreinfo, &self.bitmap1, &self.bitmap2, &self.descriptors]
        {
            all.extend([part.start, part.end]);
        }
        all.extend(self.descriptor_of.values().take(20));
        all.extend(self.data_of.values().flat_map(|r| [r.start, r.end]));
        all.push(self.bytes.len() as u64);
        all.sort_unstable();
        all.dedup();
        all
    }
}

impl Kdump {
    /// A dump of all of `memory`.
    pub fn of(memory: &FlatMemory) -> Self {
        let slots = memory.pages.iter().map(|(&pfn, page)| (pfn, Slot::Data(page.clone()))).collect();
        Self { slots, ..Self::default() }
    }

    pub fn codec(mut self, codec: Codec) -> Self {
        self.codecs = vec![codec];
        self
    }

    /// As QEMU's `dump-guest-memory -z` and its siblings.
    pub fn qemu(mut self) -> Self {
        self.style = Style::Qemu;
        self.dump_level = 1;
        self.utsname = ["", "", "", "", "x86_64", ""].map(str::to_owned);
        self
    }

    /// The parts of a split set, each of which ends at one of `ends` or at the end of memory.
    pub fn parts(&self, ends: &[u64]) -> Vec<Kdump> {
        let end = self.slots.keys().last().map_or(0, |&pfn| pfn + 1);
        let starts = [0].into_iter().chain(ends.iter().copied());
        let ends = ends.iter().copied().chain([end]);
        starts.zip(ends).map(|(from, to)| Kdump { split: Some(from..to), ..self.clone() }).collect()
    }

    fn has_data(&self, pfn: u64) -> bool {
        match self.slots.get(&pfn) {
            Some(Slot::Excluded) | None => false,
            Some(_) => true,
        }
    }

    pub fn build(&self) -> KdumpFile {
        let block = self.block_size as usize;
        let max_mapnr = self.max_mapnr.unwrap_or_else(|| self.slots.keys().last().map_or(0, |&pfn| pfn + 1));
        let mut out = vec![0; block];

        // Sub header, notes, VMCOREINFO: sub_hdr_size blocks from block 1 on.
        let sub = out.len();
        let sub_len = 104;
        out.resize(sub + sub_len, 0);
        let notes = out.len() as u64..(out.len() + self.notes.len()) as u64;
        out.extend_from_slice(&self.notes);
        let vmcoreinfo = match &self.vmcoreinfo_in_notes {
            Some(part) => notes.start + part.start..notes.start + part.end,
            None => {
                let at = out.len() as u64;
                out.extend_from_slice(&self.vmcoreinfo);
                at..out.len() as u64
            }
        };
        pad_to(&mut out, block);
        let sub_blocks = (out.len() - sub) / block;

        // Two bitmaps, each a whole number of blocks.
        let bitmap_len = (max_mapnr.div_ceil(8) as usize).next_multiple_of(block);
        let bitmap1 = out.len() as u64..(out.len() + bitmap_len) as u64;
        let bitmap2 = bitmap1.end..bitmap1.end + bitmap_len as u64;
        out.resize(bitmap2.end as usize, 0);
        for &pfn in self.slots.keys() {
            let (byte, bit) = ((pfn / 8) as usize, 1u8 << (pfn % 8));
            let dumped = self.has_data(pfn);
            if dumped || self.style == Style::Makedumpfile {
                out[bitmap1.start as usize + byte] |= bit;
            }
            if dumped {
                out[bitmap2.start as usize + byte] |= bit;
            }
        }

        // One descriptor for each dumped frame of this file, in ascending order; then the data.
        let window = self.split.clone().unwrap_or(0..u64::MAX);
        let dumped: Vec<u64> =
            self.slots.keys().copied().filter(|pfn| window.contains(pfn) && self.has_data(*pfn)).collect();
        let descriptors = out.len() as u64..(out.len() + dumped.len() * 24) as u64;
        // Each part of a split set leaves room for the descriptors of all parts.
        let all = self.slots.keys().filter(|pfn| self.has_data(**pfn)).count();
        out.resize(out.len() + all * 24, 0);
        let zero_at = out.len() as u64;
        let shares_zero = self.style == Style::Qemu || self.dump_level & 1 != 0;
        if shares_zero {
            out.resize(out.len() + block, 0);
        }
        let mut descriptor_of = BTreeMap::new();
        let mut data_of = BTreeMap::new();
        for (i, &pfn) in dumped.iter().enumerate() {
            let desc = descriptors.start as usize + i * 24;
            let (offset, size, flags) = match &self.slots[&pfn] {
                Slot::Data(page) if shares_zero && page.iter().all(|&b| b == 0) => {
                    (zero_at, self.block_size, 0)
                }
                Slot::Data(page) => {
                    let mut codec = self.codecs[(pfn % self.codecs.len() as u64) as usize];
                    let mut stored = codec.encode(&page[..]);
                    if stored.len() >= page.len() {
                        (codec, stored) = (Codec::Raw, page.to_vec());
                    }
                    let at = out.len() as u64;
                    out.extend_from_slice(&stored);
                    (at, stored.len() as u32, codec.flag())
                }
                Slot::Broken { size, flags, stored, offset } => {
                    let at = out.len() as u64;
                    out.extend_from_slice(stored);
                    (offset.unwrap_or(at), *size, *flags)
                }
                Slot::Excluded => unreachable!("filtered above"),
            };
            put_u64(&mut out, desc, offset);
            put_u32(&mut out, desc + 8, size);
            put_u32(&mut out, desc + 12, flags);
            descriptor_of.insert(pfn, desc as u64);
            data_of.insert(pfn, offset..offset.saturating_add(size.into()));
        }

        self.put_header(&mut out, max_mapnr, sub_blocks, bitmap_len * 2 / block, dumped.len());
        self.put_sub_header(&mut out, sub, max_mapnr, &notes, &vmcoreinfo);
        KdumpFile {
            bytes: out,
            sub_header: sub as u64..(sub + sub_len) as u64,
            notes,
            vmcoreinfo,
            bitmap1,
            bitmap2,
            descriptors,
            descriptor_of,
            data_of,
        }
    }

    fn put_header(
        &self,
        out: &mut Vec<u8>,
        max_mapnr: u64,
        sub_blocks: usize,
        bitmap_blocks: usize,
        dumped: usize,
    ) {
        put(out, 0, &self.signature);
        put_u32(out, 8, self.version);
        for (i, field) in self.utsname.iter().enumerate() {
            put(out, 12 + i * 65, field.as_bytes());
        }
        put_u64(out, 408, self.time);
        put_u64(out, 416, 123_456);
        let codec = self.codecs.first().map_or(0, |codec| codec.flag());
        put_u32(out, 424, self.status | codec);
        put_u32(out, 428, self.block_size);
        put_u32(out, 432, sub_blocks as u32);
        put_u32(out, 436, bitmap_blocks as u32);
        put_u32(out, 440, max_mapnr.min(u32::MAX.into()) as u32);
        put_u32(out, 444, self.slots.len() as u32);
        put_u32(out, 448, dumped as u32);
        put_u32(out, 452, 0);
        put_u32(out, 456, self.current_cpu);
        put_u32(out, 460, self.nr_cpus);
    }

    /// Each header version wrote only its own fields; what lies behind them is zero.
    fn put_sub_header(
        &self,
        out: &mut Vec<u8>,
        sub: usize,
        max_mapnr: u64,
        notes: &Range<u64>,
        info: &Range<u64>,
    ) {
        let range_or_zero = |range: &Range<u64>| {
            if range.is_empty() { (0, 0) } else { (range.start, range.end - range.start) }
        };
        put_u64(out, sub, self.phys_base);
        if self.version >= 1 {
            put_u32(out, sub + 8, self.dump_level);
        }
        if let (2.., Some(part)) = (self.version, &self.split) {
            put_u32(out, sub + 12, 1);
            put_u64(out, sub + 16, part.start);
            put_u64(out, sub + 24, part.end);
        }
        if self.version >= 3 {
            let (at, len) = range_or_zero(info);
            put_u64(out, sub + 32, at);
            put_u64(out, sub + 40, len);
        }
        if self.version >= 4 {
            let (at, len) = range_or_zero(notes);
            put_u64(out, sub + 48, at);
            put_u64(out, sub + 56, len);
        }
        if self.version >= 6 {
            let part = self.split.clone().unwrap_or(0..0);
            put_u64(out, sub + 80, part.start);
            put_u64(out, sub + 88, part.end);
            put_u64(out, sub + 96, max_mapnr);
        }
    }
}

/// A page in Snappy's raw format: its length, then literals and copies from 8 bytes back.
/// Source: google/snappy `format_description.txt`.
fn snappy(page: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut len = page.len();
    while len >= 0x80 {
        out.push(len as u8 | 0x80);
        len >>= 7;
    }
    out.push(len as u8);
    for (literals, mut copies) in steps(page) {
        for chunk in literals.chunks(60) {
            out.push(((chunk.len() - 1) << 2) as u8);
            out.extend_from_slice(chunk);
        }
        while copies > 0 {
            // A copy with a two-byte offset carries 1 to 64 bytes.
            let n = copies.min(64);
            out.push((((n - 1) << 2) | 2) as u8);
            out.extend_from_slice(&8u16.to_le_bytes());
            copies -= n;
        }
    }
    out
}

/// A page in LZO1X: literal runs and matches from 8 bytes back, then the end mark.
/// Source: Linux `Documentation/staging/lzo.rst`.
fn lzo1x(page: &[u8]) -> Vec<u8> {
    /// The rest of a length: a zero byte for each 255, then one that is not zero.
    fn long(out: &mut Vec<u8>, mut rest: usize) {
        while rest > 255 {
            out.push(0);
            rest -= 255;
        }
        out.push(rest as u8);
    }
    let mut out = Vec::new();
    for (literals, copies) in steps(page) {
        // 0000LLLL: 3 + L literals, or with L = 0 18 + what follows.
        if literals.len() <= 18 {
            out.push((literals.len() - 3) as u8);
        } else {
            out.push(0);
            long(&mut out, literals.len() - 18);
        }
        out.extend_from_slice(literals);
        if copies > 0 {
            // 001LLLLL: 2 + L bytes, or with L = 0 33 + what follows; then (distance - 1) << 2 with no literals after.
            if copies <= 33 {
                out.push(0x20 | (copies - 2) as u8);
            } else {
                out.push(0x20);
                long(&mut out, copies - 33);
            }
            out.extend_from_slice(&((8u16 - 1) << 2).to_le_bytes());
        }
    }
    out.extend_from_slice(&[0x11, 0, 0]);
    out
}

/// The page as (literals, then so many bytes that repeat those 8 before them). Each run of literals has at least
/// 4 bytes; only the last copy can be empty.
fn steps(page: &[u8]) -> Vec<(&[u8], usize)> {
    let mut out: Vec<(usize, usize, usize)> = Vec::new();
    let (mut from, mut at) = (0, 0);
    while at < page.len() {
        let repeats = (at..page.len()).take_while(|&i| i >= 8 && page[i] == page[i - 8]).count();
        if repeats < 40 {
            at += 1;
            continue;
        }
        let short = 4usize.saturating_sub(at - from);
        out.push((from, at + short, repeats - short));
        at += repeats;
        from = at;
    }
    if from < page.len() {
        let short = 4usize.saturating_sub(page.len() - from);
        if let Some(last) = out.last_mut() {
            last.2 -= short;
            from -= short;
        }
        out.push((from, page.len(), 0));
    }
    out.into_iter().map(|(from, to, copies)| (&page[from..to], copies)).collect()
}
