//! DWARF units: where they are in `.debug_info`, their bytes, and gimli's view of them.
//!
//! One unit is held at a time, and the last few used; a vmlinux has hundreds of megabytes of them. Knows nothing of
//! types or lines. Source: the DWARF standard, version 5, sections 7.4 and 7.5 (units).

use super::Error;
use super::lines::UnitLines;
use super::sections::{SectionReader, Sections};
use gimli::{AttributeValue, EndianSlice, LittleEndian};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

pub(super) type Slice<'a> = EndianSlice<'a, LittleEndian>;
pub(super) type Unit<'a> = gimli::Unit<Slice<'a>>;
pub(super) type Entry<'a> = gimli::DebuggingInformationEntry<Slice<'a>>;

/// A C unit has some hundred kilobytes, one of a kernel linked with LTO a few megabytes.
const UNIT_MAX: u64 = 128 << 20;
/// Units in one file; Debian's vmlinux has 3000.
const UNITS_MAX: usize = 1 << 20;
/// Units kept in memory.
const RECENT: usize = 8;

/// The DWARF sections of one file.
pub(super) struct Units {
    pub info: SectionReader,
    /// Line programs, read one at a time.
    pub line: SectionReader,
    sections: Held,
    recent: Mutex<Vec<Arc<Loaded>>>,
}

/// Sections that are held from when they are first needed.
struct Held {
    load: Box<dyn Fn(&'static str) -> Vec<u8> + Send + Sync>,
    /// What every unit needs: abbreviations and strings.
    text: OnceLock<[Vec<u8>; 4]>,
    /// What addresses need.
    ranges: OnceLock<[Vec<u8>; 3]>,
}

/// A unit in memory.
pub(super) struct Loaded {
    /// Offset in `.debug_info`.
    pub start: u32,
    bytes: Vec<u8>,
    abbreviations: Arc<gimli::Abbreviations>,
    /// Where its code comes from, once asked for.
    pub lines: OnceLock<UnitLines>,
}

pub(super) fn malformed(offset: u64, what: impl Into<String>) -> Error {
    Error::Types { format: "DWARF", offset, what: what.into() }
}

impl Units {
    /// The units of a file's `.debug_info`.
    pub fn open(sections: Arc<Sections>) -> Result<Self, Error> {
        let (info, line) = (sections.reader(".debug_info")?, sections.reader(".debug_line")?);
        let load = move |name: &'static str| match sections.whole(name) {
            Ok(bytes) => bytes.unwrap_or_default(),
            Err(error) => {
                tracing::warn!("{error}");
                Vec::new()
            }
        };
        Self::new(info, line, Box::new(load))
    }

    /// The units of `info`; `load` gives the other sections by name, empty if there is none.
    pub fn new(
        info: SectionReader,
        line: SectionReader,
        load: Box<dyn Fn(&'static str) -> Vec<u8> + Send + Sync>,
    ) -> Result<Self, Error> {
        if info.len() > u64::from(u32::MAX) {
            return Err(malformed(
                0,
                ".debug_info is larger than 4 GiB; BTF (CONFIG_DEBUG_INFO_BTF) has the types",
            ));
        }
        let sections = Held { load, text: OnceLock::new(), ranges: OnceLock::new() };
        Ok(Self { info, line, sections, recent: Mutex::new(Vec::new()) })
    }

    /// Offset and length of every unit, the length field included (DWARF 5, 7.4: 32-bit, or 64-bit behind 0xffffffff).
    pub fn list(&self) -> Result<Vec<(u32, u32)>, Error> {
        let mut units = Vec::new();
        let (mut at, end) = (0, self.info.len());
        while at < end {
            let head = self.info.read(at, (end - at).min(12))?;
            let short =
                crate::bytes::u32_at(&head, 0).ok_or_else(|| malformed(at, "unit header cut short"))?;
            let len = match short {
                u32::MAX => crate::bytes::u64_at(&head, 4).and_then(|n| n.checked_add(12)),
                _ => Some(u64::from(short) + 4),
            };
            let len = len
                .filter(|&len| len <= end - at)
                .ok_or_else(|| malformed(at, "unit runs past the section"))?;
            if units.len() >= UNITS_MAX {
                return Err(malformed(at, format!("more than {UNITS_MAX} units")));
            }
            // Both are within a section that is smaller than 4 GiB.
            units.push((at as u32, len as u32));
            at += len;
        }
        Ok(units)
    }

    /// The abbreviations and strings: `.debug_abbrev`, `.debug_str`, `.debug_line_str`, `.debug_str_offsets`.
    fn text(&self) -> &[Vec<u8>; 4] {
        self.sections.text.get_or_init(|| {
            [".debug_abbrev", ".debug_str", ".debug_line_str", ".debug_str_offsets"]
                .map(|s| (self.sections.load)(s))
        })
    }

    /// `.debug_str`.
    pub fn strings(&self) -> &[u8] {
        let [_, strings, ..] = self.text();
        strings
    }

    /// gimli's view of a unit's bytes, for names and types.
    pub fn dwarf<'a>(&'a self, unit: &'a [u8]) -> gimli::Dwarf<Slice<'a>> {
        let [abbrev, strings, line_strings, str_offsets] = self.text();
        gimli::Dwarf {
            debug_abbrev: gimli::DebugAbbrev::new(abbrev, LittleEndian),
            debug_info: gimli::DebugInfo::new(unit, LittleEndian),
            debug_str: gimli::DebugStr::new(strings, LittleEndian),
            debug_line_str: EndianSlice::new(line_strings, LittleEndian).into(),
            debug_str_offsets: EndianSlice::new(str_offsets, LittleEndian).into(),
            ..gimli::Dwarf::default()
        }
    }

    /// The same, for addresses too.
    pub fn dwarf_with_ranges<'a>(&'a self, unit: &'a [u8]) -> gimli::Dwarf<Slice<'a>> {
        let [addr, ranges, lists] = self.sections.ranges.get_or_init(|| {
            [".debug_addr", ".debug_ranges", ".debug_rnglists"].map(|name| (self.sections.load)(name))
        });
        let ranges = gimli::DebugRanges::new(ranges, LittleEndian);
        gimli::Dwarf {
            debug_addr: EndianSlice::new(addr, LittleEndian).into(),
            ranges: gimli::RangeLists::new(ranges, gimli::DebugRngLists::new(lists, LittleEndian)),
            ..self.dwarf(unit)
        }
    }

    /// The unit at `start`, `len` bytes of it.
    pub fn load(&self, start: u32, len: u32) -> Result<Arc<Loaded>, Error> {
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(place) = recent.iter().position(|loaded| loaded.start == start) {
            // The last one is the one used last.
            let loaded = recent.remove(place);
            recent.push(Arc::clone(&loaded));
            return Ok(loaded);
        }
        drop(recent);
        check_len(start, len)?;
        let bytes = self.info.read(start.into(), len.into())?;
        let wrong = |error: gimli::Error| malformed(start.into(), error.to_string());
        let abbreviations = {
            let dwarf = self.dwarf(&bytes);
            let header = dwarf.units().next().map_err(wrong)?;
            let header = header.ok_or_else(|| malformed(start.into(), "the unit is empty"))?;
            dwarf.abbreviations(&header).map_err(wrong)?
        };
        let loaded = Arc::new(Loaded { start, bytes, abbreviations, lines: OnceLock::new() });
        recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        if recent.len() >= RECENT {
            recent.remove(0);
        }
        recent.push(Arc::clone(&loaded));
        Ok(loaded)
    }
}

/// Refuses to hold a unit that no compiler makes.
pub(super) fn check_len(start: u32, len: u32) -> Result<(), Error> {
    match u64::from(len) <= UNIT_MAX {
        true => Ok(()),
        false => Err(malformed(start.into(), format!("a unit of {len} bytes"))),
    }
}

impl Loaded {
    /// The unit's bytes, its header included.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// gimli's unit, for which `dwarf` must be [`Units::dwarf`] of these bytes.
    pub fn unit<'a>(&'a self, dwarf: &gimli::Dwarf<Slice<'a>>) -> gimli::Result<Unit<'a>> {
        let header = dwarf.units().next()?.ok_or(gimli::Error::MissingUnitDie)?;
        Ok(unit(dwarf, header, Arc::clone(&self.abbreviations))?.0)
    }
}

/// A unit, and its root: gimli's own constructor also wants the section with lines.
pub(super) fn unit<'a>(
    dwarf: &gimli::Dwarf<Slice<'a>>,
    header: gimli::UnitHeader<Slice<'a>>,
    abbreviations: Arc<gimli::Abbreviations>,
) -> gimli::Result<(Unit<'a>, Entry<'a>)> {
    let mut root = Entry::null();
    let found = header.entries_raw(&abbreviations, None)?.read_entry(&mut root)?;
    if !found {
        return Err(gimli::Error::MissingUnitDie);
    }
    let encoding = header.encoding();
    let mut unit = gimli::Unit {
        header,
        abbreviations,
        name: None,
        comp_dir: None,
        low_pc: 0,
        str_offsets_base: gimli::DebugStrOffsetsBase::default_for_encoding_and_file(
            encoding,
            dwarf.file_type,
        ),
        addr_base: gimli::DebugAddrBase(0),
        loclists_base: gimli::DebugLocListsBase::default_for_encoding_and_file(encoding, dwarf.file_type),
        rnglists_base: gimli::DebugRngListsBase::default_for_encoding_and_file(encoding, dwarf.file_type),
        line_program: None,
        dwo_id: None,
    };
    for attribute in root.attrs() {
        match attribute.value() {
            AttributeValue::DebugStrOffsetsBase(base) => unit.str_offsets_base = base,
            AttributeValue::DebugAddrBase(base) => unit.addr_base = base,
            AttributeValue::DebugRngListsBase(base) => unit.rnglists_base = base,
            _ => {}
        }
    }
    let string = |name| root.attr_value(name).and_then(|value| dwarf.attr_string(&unit, value).ok());
    let (name, comp_dir) = (string(gimli::DW_AT_name), string(gimli::DW_AT_comp_dir));
    let low_pc = root.attr_value(gimli::DW_AT_low_pc).and_then(|v| dwarf.attr_address(&unit, v).ok()?);
    (unit.name, unit.comp_dir, unit.low_pc) = (name, comp_dir, low_pc.unwrap_or(0));
    Ok((unit, root))
}

/// The addresses that an entry covers; `dwarf` must be [`Units::dwarf_with_ranges`]. gimli's own adds without a check.
pub(super) fn ranges(
    dwarf: &gimli::Dwarf<Slice<'_>>,
    unit: &Unit<'_>,
    entry: &Entry<'_>,
) -> gimli::Result<Vec<(u64, u64)>> {
    // So many in one list; the longest of a kernel has some thousand.
    const MAX: usize = 1 << 16;
    let mut found = Vec::new();
    if let Some(value) = entry.attr_value(gimli::DW_AT_ranges) {
        if let Some(mut list) = dwarf.attr_ranges(unit, value)? {
            while let Some(range) = list.next()?
                && found.len() < MAX
            {
                found.push((range.begin, range.end));
            }
        }
    } else if let Some(value) = entry.attr_value(gimli::DW_AT_low_pc)
        && let Some(low) = dwarf.attr_address(unit, value)?
        && let Some(high) = entry.attr_value(gimli::DW_AT_high_pc)
    {
        let high = match high.udata_value() {
            Some(size) => low.checked_add(size),
            None => dwarf.attr_address(unit, high)?,
        };
        found.extend(high.map(|high| (low, high)));
    }
    // What the linker dropped is at 0.
    found.retain(|&(low, high)| low != 0 && low < high);
    Ok(found)
}
