//! ELF core files. Sources: System V gABI (Ehdr, Phdr, `PN_XNUM`); what `/proc/vmcore`, makedumpfile `-E` and
//! QEMU's `dump-guest-memory` put into them.

use super::put::{pad_to, put};
use std::ops::Range;

pub const EM_386: u16 = 3;
pub const EM_AARCH64: u16 = 183;
pub const EM_X86_64: u16 = 62;
pub const ET_EXEC: u16 = 2;
pub const ET_CORE: u16 = 4;
/// `e_flags` of a dump that makedumpfile could not finish.
pub const DUMP_ELF_INCOMPLETE: u32 = 1;

/// A `PT_LOAD` segment. `memsz` beyond `bytes` is memory that the file leaves out.
#[derive(Clone)]
pub struct Segment {
    pub paddr: u64,
    pub vaddr: u64,
    pub bytes: Vec<u8>,
    pub memsz: u64,
    /// Overrides what the header says: (p_offset, p_filesz). No data is written for such a segment.
    pub at: Option<(u64, u64)>,
}

impl Segment {
    /// A segment that is wholly in the file.
    pub fn new(paddr: u64, bytes: Vec<u8>) -> Self {
        let vaddr = 0xffff_8880_0000_0000 + paddr;
        Self { paddr, vaddr, memsz: bytes.len() as u64, bytes, at: None }
    }
    pub fn memsz(mut self, memsz: u64) -> Self {
        self.memsz = memsz;
        self
    }
    pub fn vaddr(mut self, vaddr: u64) -> Self {
        self.vaddr = vaddr;
        self
    }
    pub fn at(mut self, offset: u64, filesz: u64) -> Self {
        self.at = Some((offset, filesz));
        self
    }
}

#[derive(Clone)]
pub struct ElfCore {
    /// 2 = 64 bits.
    pub class: u8,
    /// 1 = little endian.
    pub data: u8,
    pub machine: u16,
    pub kind: u16,
    pub flags: u32,
    pub segments: Vec<Segment>,
    /// Contents of `PT_NOTE`; `None` for no such header.
    pub notes: Option<Vec<u8>>,
    /// Contents of further `PT_NOTE` segments.
    pub more_notes: Vec<Vec<u8>>,
    /// Always write the count into section 0, as for more than 65534 headers.
    pub extended_count: bool,
    /// Bytes of extra data between the headers and the notes.
    pub gap: usize,
}

impl Default for ElfCore {
    fn default() -> Self {
        Self {
            class: 2,
            data: 1,
            machine: EM_X86_64,
            kind: ET_CORE,
            flags: 0,
            segments: Vec::new(),
            notes: Some(Vec::new()),
            more_notes: Vec::new(),
            extended_count: false,
            gap: 0,
        }
    }
}

/// A finished file and where its parts lie.
pub struct ElfFile {
    pub bytes: Vec<u8>,
    pub program_headers: Range<u64>,
    pub section_header: Option<Range<u64>>,
    pub notes: Range<u64>,
    /// File range of each segment's data.
    pub segments: Vec<Range<u64>>,
}

impl ElfFile {
    /// Offsets where a structure begins or ends.
    pub fn boundaries(&self) -> Vec<u64> {
        let mut all = vec![0, 4, 16, 64, self.program_headers.start, self.program_headers.end];
        all.extend((self.program_headers.start..self.program_headers.end).step_by(56).take(64));
        all.extend(self.section_header.iter().flat_map(|r| [r.start, r.end]));
        all.extend([self.notes.start, self.notes.end]);
        all.extend(self.segments.iter().flat_map(|r| [r.start, r.end]).take(256));
        all.push(self.bytes.len() as u64);
        all.sort_unstable();
        all.dedup();
        all
    }
}

impl ElfCore {
    /// A core of `memory`, one segment for each run of frames.
    pub fn of(memory: &super::FlatMemory) -> Self {
        let segments = memory.runs().into_iter().map(|(at, bytes)| Segment::new(at, bytes)).collect();
        Self { segments, ..Self::default() }
    }

    pub fn with_notes(mut self, notes: Vec<u8>) -> Self {
        self.notes = Some(notes);
        self
    }

    pub fn build(&self) -> ElfFile {
        assert_eq!(self.class, 2, "32-bit files: see build_foreign");
        let count = self.segments.len() + usize::from(self.notes.is_some()) + self.more_notes.len();
        let extended = self.extended_count || count >= 0xffff;
        let mut out = vec![0; 64];
        let phoff = out.len() as u64;
        out.resize(out.len() + count * 56, 0);
        let program_headers = phoff..out.len() as u64;
        let section_header = extended.then(|| {
            let at = out.len() as u64;
            out.resize(out.len() + 64, 0);
            at..at + 64
        });
        out.resize(out.len() + self.gap, 0xee);

        put(&mut out, 0, b"\x7fELF");
        out[4] = self.class;
        out[5] = self.data;
        out[6] = 1;
        let w = Writer { big: self.data == 2 };
        w.u16(&mut out, 16, self.kind);
        w.u16(&mut out, 18, self.machine);
        w.u32(&mut out, 20, 1);
        w.u64(&mut out, 32, phoff);
        w.u64(&mut out, 40, section_header.as_ref().map_or(0, |r| r.start));
        w.u32(&mut out, 48, self.flags);
        w.u16(&mut out, 52, 64);
        w.u16(&mut out, 54, 56);
        w.u16(&mut out, 56, if extended { 0xffff } else { count as u16 });
        w.u16(&mut out, 58, 64);
        w.u16(&mut out, 60, u16::from(extended));
        if let Some(at) = &section_header {
            // Section 0: sh_size holds e_shnum and sh_info the number of program headers.
            w.u64(&mut out, at.start as usize + 32, 1);
            w.u32(&mut out, at.start as usize + 44, count as u32);
        }

        let mut header = phoff as usize;
        let mut notes = 0..0;
        if let Some(text) = &self.notes {
            notes = out.len() as u64..(out.len() + text.len()) as u64;
            out.extend_from_slice(text);
            let size = text.len() as u64;
            w.phdr(&mut out, header, 4, [notes.start, 0, 0, size, size, 4]);
            header += 56;
        }
        for more in &self.more_notes {
            let (at, size) = (out.len() as u64, more.len() as u64);
            out.extend_from_slice(more);
            w.phdr(&mut out, header, 4, [at, 0, 0, size, size, 4]);
            header += 56;
        }
        let mut segments = Vec::with_capacity(self.segments.len());
        for segment in &self.segments {
            let (offset, filesz) = match segment.at {
                Some(at) => at,
                None => {
                    if segment.bytes.len() >= 4096 {
                        pad_to(&mut out, 4096);
                    }
                    let at = out.len() as u64;
                    out.extend_from_slice(&segment.bytes);
                    (at, segment.bytes.len() as u64)
                }
            };
            segments.push(offset..offset.saturating_add(filesz));
            w.phdr(&mut out, header, 1, [offset, segment.vaddr, segment.paddr, filesz, segment.memsz, 4096]);
            header += 56;
        }
        ElfFile { bytes: out, program_headers, section_header, notes, segments }
    }

    /// A 32-bit core header with one empty segment: only good for being refused.
    pub fn build_32bit(&self) -> Vec<u8> {
        let mut out = vec![0; 52 + 32 + 4096];
        put(&mut out, 0, b"\x7fELF");
        (out[4], out[5], out[6]) = (1, self.data, 1);
        let w = Writer { big: self.data == 2 };
        w.u16(&mut out, 16, self.kind);
        w.u16(&mut out, 18, self.machine);
        w.u32(&mut out, 20, 1);
        w.u32(&mut out, 28, 52);
        w.u16(&mut out, 40, 52);
        w.u16(&mut out, 42, 32);
        w.u16(&mut out, 44, 1);
        for (i, value) in [1, 84, 0, 0, 4096, 4096, 7, 0].into_iter().enumerate() {
            w.u32(&mut out, 52 + i * 4, value);
        }
        out
    }
}

struct Writer {
    big: bool,
}

impl Writer {
    fn bytes<const N: usize>(&self, out: &mut Vec<u8>, at: usize, mut little: [u8; N]) {
        if self.big {
            little.reverse();
        }
        put(out, at, &little);
    }
    fn u16(&self, out: &mut Vec<u8>, at: usize, value: u16) {
        self.bytes(out, at, value.to_le_bytes());
    }
    fn u32(&self, out: &mut Vec<u8>, at: usize, value: u32) {
        self.bytes(out, at, value.to_le_bytes());
    }
    fn u64(&self, out: &mut Vec<u8>, at: usize, value: u64) {
        self.bytes(out, at, value.to_le_bytes());
    }
    /// Elf64_Phdr: p_type, p_flags, then six words.
    fn phdr(&self, out: &mut Vec<u8>, at: usize, kind: u32, words: [u64; 6]) {
        self.u32(out, at, kind);
        self.u32(out, at + 4, 7);
        for (i, word) in words.into_iter().enumerate() {
            self.u64(out, at + 8 + i * 8, word);
        }
    }
}
