//! Programs and libraries in a process's memory: their symbols and unwind tables, as far as their pages are present.
//!
//! A page is looked for where the process has it mapped, and then in the page cache of the file. Opens no file. Source:
//! the System V ABI (ELF, program headers, symbol tables), Linux Standard Base 5.0, 10.6 (`.eh_frame_hdr`).

use super::vma::Vma;
use super::{Kernel, Object};
use crate::addr::{PAGE_SIZE, VirtAddr};
use crate::bytes::{u16_at, u32_at, u64_at};
use crate::debuginfo::cfi::{CallFrames, CfiRow};

/// Program headers, section headers and dynamic entries looked at.
const HEADERS_MAX: usize = 4096;
/// Bytes of a symbol table, and of its names.
const SYMBOLS_MAX: u64 = 64 << 20;
/// Bytes of one description in an unwind table.
const ENTRY_MAX: u64 = 64 << 10;
/// Bytes of an unwind table that is read whole.
const EH_FRAME_MAX: u64 = 16 << 20;
const SYMBOL_SIZE: usize = 24;
const SECTION_SIZE: usize = 64;

const PT_LOAD: u32 = 1;
const PT_DYNAMIC: u32 = 2;
const PT_GNU_EH_FRAME: u32 = 0x6474_e550;
const SHT_SYMTAB: u32 = 2;
const DT_STRTAB: u64 = 5;
const DT_SYMTAB: u64 = 6;
const DT_STRSZ: u64 = 10;
const STT_FUNC: u8 = 2;
const STT_GNU_IFUNC: u8 = 10;
/// `DW_EH_PE_datarel | DW_EH_PE_sdata4`, which every linker writes; and `DW_EH_PE_udata4`, `DW_EH_PE_pcrel | _sdata4`.
const TABLE_ENCODING: u8 = 0x3b;
const COUNT_ENCODING: u8 = 0x03;

/// A segment of the file.
#[derive(Clone, Copy, Debug)]
struct Segment {
    kind: u32,
    offset: u64,
    vaddr: u64,
    size: u64,
}

/// One ELF file in a process.
pub struct UserImage<'k> {
    kernel: &'k Kernel,
    mm: VirtAddr,
    /// What is added to the file's addresses.
    bias: u64,
    segments: Vec<Segment>,
    /// `struct address_space` of the file.
    mapping: Option<Object<'k>>,
    /// Functions by address in the file: start, size, name.
    symbols: Vec<(u64, u64, String)>,
    /// All of `.eh_frame`, for a file without a table to search it by: a static program has none.
    frames: Option<CallFrames>,
}

impl<'k> UserImage<'k> {
    /// The file that `at` is in a mapping of; `areas` are those of the process. `None` if there is no file that can be
    /// made out.
    pub fn find(kernel: &'k Kernel, mm: VirtAddr, areas: &[Vma], at: u64) -> Option<Self> {
        let here = areas.iter().find(|area| (area.start..area.end).contains(&at))?;
        let file = here.file.as_ref();
        let of_same_file = |area: &&Vma| match file {
            Some((file, info)) => area
                .file
                .as_ref()
                .is_some_and(|(other, about)| other == file || about.path.is_ok() && about.path == info.path),
            None => area.start == here.start,
        };
        // The nearest mapping of its first page at or below.
        let first =
            areas.iter().filter(of_same_file).rfind(|area| area.offset == 0 && area.start <= here.start);
        let mapping = file.and_then(|(file, _)| kernel.object("file", *file).ok()?.at("f_mapping").ok()?);
        let mut image =
            Self { kernel, mm, bias: 0, segments: Vec::new(), mapping, symbols: Vec::new(), frames: None };
        let mut header = [0; 64];
        let start = first.map(|area| area.start);
        match start.is_some_and(|start| image.read_user(start, &mut header)) {
            true => {}
            false => image.read_file(0, &mut header).then_some(())?,
        }
        if header.get(..6)? != b"\x7fELF\x02\x01" {
            return None;
        }
        image.read_segments(&header, start)?;
        // The segment that the mapping is of tells where the file was put.
        let of_here = image.segments.iter().filter(|one| one.kind == PT_LOAD).find(|one| {
            let (from, to) = (one.offset & !(PAGE_SIZE - 1), one.offset.saturating_add(one.size));
            let offset = here.offset.wrapping_add(at - here.start);
            (from..to.max(from + 1)).contains(&offset) || here.offset == from
        });
        let segment = *of_here?;
        image.bias =
            here.start.wrapping_sub(here.offset).wrapping_sub(segment.vaddr.wrapping_sub(segment.offset));
        let sections = image.sections(&header).unwrap_or_default();
        image.read_symbols(&sections);
        if !image.segments.iter().any(|one| one.kind == PT_GNU_EH_FRAME) {
            image.frames = image.whole_eh_frame(&header, &sections);
        }
        Some(image)
    }

    fn read_segments(&mut self, header: &[u8], start: Option<u64>) -> Option<()> {
        let (offset, size, count) = (u64_at(header, 32)?, u16_at(header, 54)?, u16_at(header, 56)?);
        let len = (usize::from(size) * usize::from(count)).min(HEADERS_MAX * 56);
        let mut bytes = vec![0; len];
        let mapped = start.is_some_and(|start| self.read_user(start.wrapping_add(offset), &mut bytes));
        if !mapped && !self.read_file(offset, &mut bytes) {
            return None;
        }
        for one in bytes.chunks_exact(usize::from(size).max(56)) {
            self.segments.push(Segment {
                kind: u32_at(one, 0)?,
                offset: u64_at(one, 8)?,
                vaddr: u64_at(one, 16)?,
                size: u64_at(one, 32)?,
            });
        }
        Some(())
    }

    /// Whether all of the process's memory at `at` could be read.
    fn read_user(&self, at: u64, buf: &mut [u8]) -> bool {
        self.kernel.read_user(self.mm, VirtAddr(at), buf).is_ok_and(|read| read.stopped.is_none())
    }

    /// Whether all of the file at `offset` is in the page cache.
    fn read_file(&self, offset: u64, buf: &mut [u8]) -> bool {
        let Some(pages) = self.mapping.and_then(|mapping| mapping.member("i_pages").ok()) else {
            return false;
        };
        let Ok(map) = self.kernel.page_map() else { return false };
        let mut done = 0;
        while done < buf.len() {
            let here = offset.wrapping_add(done as u64);
            let index = here / PAGE_SIZE;
            let Ok(Some(entry)) = self.kernel.xarray_load(pages.at, index) else { return false };
            // A value is a page that is gone: swapped out, or a shadow.
            let page = VirtAddr(entry);
            let (Some(pfn), Ok(head)) = (map.pfn(page), map.read(self.kernel, page)) else { return false };
            // The entry is the head of a large folio.
            let Some(inside) =
                index.checked_sub(head.index).filter(|&inside| entry & 3 == 0 && inside < 1 << 18)
            else {
                return false;
            };
            let at = map.direct(pfn).wrapping_add(inside * PAGE_SIZE + here % PAGE_SIZE);
            let len = (PAGE_SIZE - here % PAGE_SIZE).min((buf.len() - done) as u64) as usize;
            let Some(part) = buf.get_mut(done..done + len) else { return false };
            if self.kernel.read(at, part).stopped.is_some() {
                return false;
            }
            done += len;
        }
        true
    }

    /// Whether all of what the file has at its address `vaddr` could be read: mapped, or from the page cache.
    fn read(&self, vaddr: u64, buf: &mut [u8]) -> bool {
        if self.read_user(vaddr.wrapping_add(self.bias), buf) {
            return true;
        }
        let within = |one: &&Segment| one.kind == PT_LOAD && vaddr.wrapping_sub(one.vaddr) < one.size;
        let Some(segment) = self.segments.iter().find(within) else { return false };
        self.read_file(segment.offset.wrapping_add(vaddr - segment.vaddr), buf)
    }

    fn read_symbols(&mut self, sections: &[u8]) {
        let mut all = self.symtab(sections).unwrap_or_default();
        all.extend(self.dynsym().unwrap_or_default());
        all.sort();
        all.dedup_by_key(|(start, ..)| *start);
        self.symbols = all;
    }

    /// The section headers, which are in no segment: only the page cache has them.
    fn sections(&self, header: &[u8]) -> Option<Vec<u8>> {
        let (offset, count) = (u64_at(header, 40)?, u16_at(header, 60)?);
        let mut bytes = vec![0; usize::from(count).min(HEADERS_MAX) * SECTION_SIZE];
        (!bytes.is_empty() && self.read_file(offset, &mut bytes)).then_some(bytes)
    }

    /// The bytes of the section that `header` is of.
    fn section_bytes(&self, header: &[u8], max: u64) -> Option<Vec<u8>> {
        let size = u64_at(header, 32).filter(|&size| size <= max)?;
        let mut bytes = vec![0; size as usize];
        self.read_file(u64_at(header, 24)?, &mut bytes).then_some(bytes)
    }

    /// `.symtab`
    fn symtab(&self, sections: &[u8]) -> Option<Vec<(u64, u64, String)>> {
        let mut all = sections.chunks_exact(SECTION_SIZE);
        let table = all.clone().find(|one| u32_at(one, 4) == Some(SHT_SYMTAB))?;
        let names = all.nth(u32_at(table, 40)? as usize)?;
        Some(functions(&self.section_bytes(table, SYMBOLS_MAX)?, &self.section_bytes(names, SYMBOLS_MAX)?))
    }

    /// `.eh_frame`, by its section.
    fn whole_eh_frame(&self, header: &[u8], sections: &[u8]) -> Option<CallFrames> {
        let mut all = sections.chunks_exact(SECTION_SIZE);
        let names = self.section_bytes(all.clone().nth(u16_at(header, 62)?.into())?, EH_FRAME_MAX)?;
        let is_it = |one: &&[u8]| {
            let name = u32_at(one, 0).and_then(|at| names.get(at as usize..));
            name.is_some_and(|name| name.starts_with(b".eh_frame\0"))
        };
        let section = all.find(is_it)?;
        Some(CallFrames::from_eh_frame(self.section_bytes(section, EH_FRAME_MAX)?, u64_at(section, 16)?))
    }

    /// `.dynsym`, which the dynamic linker uses: mapped.
    fn dynsym(&self) -> Option<Vec<(u64, u64, String)>> {
        let segment = self.segments.iter().find(|one| one.kind == PT_DYNAMIC)?;
        let mut bytes = vec![0; segment.size.min(HEADERS_MAX as u64 * 16) as usize];
        self.read(segment.vaddr, &mut bytes).then_some(())?;
        let entry = |tag: u64| {
            let found = bytes.chunks_exact(16).find(|one| u64_at(one, 0) == Some(tag))?;
            u64_at(found, 8)
        };
        // The dynamic linker has made addresses of them.
        let vaddr = |at: u64| if at >= self.bias { at - self.bias } else { at };
        let (symbols, names) = (vaddr(entry(DT_SYMTAB)?), vaddr(entry(DT_STRTAB)?));
        // How many there are is nowhere said; every linker puts the names behind them.
        let size = names.checked_sub(symbols).filter(|&size| size <= SYMBOLS_MAX)?;
        let mut table = vec![0; size as usize];
        let mut text = vec![0; entry(DT_STRSZ)?.min(SYMBOLS_MAX) as usize];
        (self.read(symbols, &mut table) && self.read(names, &mut text)).then(|| functions(&table, &text))
    }

    /// The function that `at` is in, and how far: by a size, or, without one, up to the next.
    pub fn symbolize(&self, at: u64) -> Option<(&str, u64)> {
        let vaddr = at.wrapping_sub(self.bias);
        let below = self.symbols.partition_point(|(start, ..)| *start <= vaddr);
        let (start, size, name) = self.symbols.get(below.checked_sub(1)?)?;
        let offset = vaddr - start;
        (*size == 0 || offset < *size).then_some((name.as_str(), offset))
    }

    /// The row of call frame information for `pc`, from the file's `.eh_frame`.
    pub fn cfi(&self, pc: u64) -> Option<CfiRow> {
        if let Some(frames) = &self.frames {
            return frames.row(pc.wrapping_sub(self.bias));
        }
        let header = self.segments.iter().find(|one| one.kind == PT_GNU_EH_FRAME)?;
        let mut start = [0; 12];
        self.read(header.vaddr, &mut start).then_some(())?;
        let [version, _, count_encoding, table_encoding, ..] = start;
        if (version, count_encoding, table_encoding) != (1, COUNT_ENCODING, TABLE_ENCODING) {
            return None;
        }
        // The table is of pairs of 32 bits, from the header's own address: code, and its description; sorted by code.
        let count = u64::from(u32_at(&start, 8)?).min(header.size / 8);
        let entry = |i: u64| {
            let mut pair = [0; 8];
            self.read(header.vaddr.wrapping_add(12 + i * 8), &mut pair).then_some(())?;
            let word = |at| Some(header.vaddr.wrapping_add_signed((u32_at(&pair, at)? as i32).into()));
            Some((word(0)?, word(4)?))
        };
        let vaddr = pc.wrapping_sub(self.bias);
        let (mut low, mut high) = (0, count);
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            if entry(middle)?.0 <= vaddr { low = middle } else { high = middle }
        }
        let (_, at) = entry(low).filter(|(code, _)| *code <= vaddr)?;
        let fde = self.description(at)?;
        let to_cie = u64::from(u32_at(&fde, 4)?);
        let cie = self.description(at.wrapping_add(4).wrapping_sub(to_cie))?;
        // One of each, at the distance that the description then says: code is told from where the description is.
        let mut bytes = cie.clone();
        bytes.extend(fde.get(..4)?);
        bytes.extend((cie.len() as u32 + 4).to_le_bytes());
        bytes.extend(fde.get(8..)?);
        CallFrames::from_eh_frame(bytes, at.wrapping_sub(cie.len() as u64)).row(vaddr)
    }

    /// One entry of `.eh_frame`, its length included.
    fn description(&self, at: u64) -> Option<Vec<u8>> {
        let mut len = [0; 4];
        self.read(at, &mut len).then_some(())?;
        let len = u64::from(u32::from_le_bytes(len)).checked_add(4).filter(|&len| len <= ENTRY_MAX)?;
        let mut bytes = vec![0; len as usize];
        self.read(at, &mut bytes).then_some(bytes)
    }
}

/// The functions in a symbol table: start, size, name.
fn functions(table: &[u8], names: &[u8]) -> Vec<(u64, u64, String)> {
    let one = |symbol: &[u8]| {
        let (kind, section) = (symbol.get(4)? & 0xf, u16_at(symbol, 6)?);
        if !matches!(kind, STT_FUNC | STT_GNU_IFUNC) || section == 0 {
            return None;
        }
        let name = names.get(u32_at(symbol, 0)? as usize..)?.split(|&byte| byte == 0).next()?;
        Some((u64_at(symbol, 8)?, u64_at(symbol, 16)?, String::from_utf8_lossy(name).into_owned()))
    };
    table.chunks_exact(SYMBOL_SIZE).filter_map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn functions_of_a_damaged_table() {
        let mut symbol = vec![1, 0, 0, 0, 0x12, 0, 1, 0];
        symbol.extend(0x1000u64.to_le_bytes());
        symbol.extend(0x20u64.to_le_bytes());
        let expected = [(0x1000, 0x20, "main".to_owned())];
        assert_eq!(functions(&symbol, b"\0main\0"), expected);
        assert_eq!(functions(&symbol, b""), []);
        for end in 0..symbol.len() {
            assert_eq!(functions(symbol.get(..end).unwrap_or_default(), b"\0main\0"), []);
        }
        symbol[4] = 0x11;
        assert_eq!(functions(&symbol, b"\0main\0"), [], "a variable");
    }
}
