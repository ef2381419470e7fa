//! Addresses to source lines: the function and the functions inlined into it, each with its file and line.
//!
//! Built on gimli alone: the addr2line crate (0.27, no unsafe of its own) wants all of `.debug_info` in memory or mapped,
//! and a vmlinux has 250 MB of it. Only the unit that holds an address is read. Source: the DWARF standard, version 5,
//! sections 3.3 (subroutines, inlined ones) and 6.2 (line numbers).

use super::Error;
use super::dwarf::Dwarf;
use super::dwarf_unit::{Entry, Loaded, Slice, Unit, malformed, ranges};
use super::sections::SectionReader;
use gimli::{AttributeValue, ColumnType, LittleEndian, UnitOffset};

/// An inlined function is named by an entry that another may be the declaration of; more is a cycle.
const DEPTH: u32 = 8;
/// Rows of one unit's line table; the longest of a kernel has some hundred thousand.
const ROWS_MAX: usize = 4 << 20;
/// Functions of one unit.
const FUNCTIONS_MAX: usize = 1 << 20;
/// Functions inlined into one another at one address.
const INLINED_MAX: usize = 256;

/// A place in the source, or as much of it as is known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Location {
    /// The function.
    pub function: Option<String>,
    /// Path of the file, as the compiler was given it, behind the directory that it ran in.
    pub file: Option<String>,
    /// From 1.
    pub line: Option<u32>,
    /// From 1.
    pub column: Option<u32>,
}

/// Lines and functions of one unit.
#[derive(Default)]
pub(super) struct UnitLines {
    files: Vec<String>,
    /// Sorted by address; a row holds up to the next one.
    rows: Vec<Row>,
    /// Start, end, offset in the unit; sorted.
    functions: Vec<(u64, u64, u32)>,
}

#[derive(Clone, Copy)]
struct Row {
    address: u64,
    /// Number in [`UnitLines::files`].
    file: u32,
    /// 0 for none, and for what is between two sequences.
    line: u32,
    column: u32,
    end: bool,
}

/// Where the instruction at link-time address `addr` comes from: the innermost inlined function first, the function
/// that has the code last. `None` where no unit has code there. An assembler file has lines and no functions.
pub(super) fn locate(dwarf: &Dwarf, addr: u64) -> Result<Option<Vec<Location>>, Error> {
    each_unit(dwarf, addr, |view| {
        let row = view.lines.row(addr);
        let function = view.lines.function(addr);
        if row.is_none() && function.is_none() {
            return Ok(None);
        }
        let mut here = match row {
            Some(row) => view.location(row.file.into(), row.line, row.column),
            None => Location::default(),
        };
        let Some(function) = function else { return Ok(Some(vec![here])) };
        let mut chain = Vec::new();
        // Each function's call is where the one around it is.
        for entry in view.inlined(function, addr)?.into_iter().rev() {
            here.function = view.name(&entry, DEPTH)?;
            let number = |name| entry.attr_value(name).and_then(|v| small(&v)).unwrap_or(0);
            let line = number(gimli::DW_AT_call_line);
            let file = match entry.attr_value(gimli::DW_AT_call_file) {
                Some(AttributeValue::FileIndex(file)) => file,
                _ => u64::MAX,
            };
            let call = view.location(file, line, number(gimli::DW_AT_call_column));
            chain.push(std::mem::replace(&mut here, call));
        }
        here.function = view.name(&view.unit.entry(UnitOffset(function as usize))?, DEPTH)?;
        chain.push(here);
        Ok(Some(chain))
    })
}

/// Where the function that has the code at `addr` is declared.
pub(super) fn declared(dwarf: &Dwarf, addr: u64) -> Result<Option<Location>, Error> {
    each_unit(dwarf, addr, |view| {
        let Some(function) = view.lines.function(addr) else { return Ok(None) };
        let mut entry = view.unit.entry(UnitOffset(function as usize))?;
        let function = view.name(&entry, DEPTH)?;
        for _ in 0..DEPTH {
            if let Some(AttributeValue::FileIndex(file)) = entry.attr_value(gimli::DW_AT_decl_file) {
                let number = |name| entry.attr_value(name).and_then(|v| small(&v)).unwrap_or(0);
                let line = number(gimli::DW_AT_decl_line);
                let place = view.location(file, line, number(gimli::DW_AT_decl_column));
                return Ok(Some(Location { function, ..place }));
            }
            match origin(&entry) {
                // What is in another unit has other file numbers, and no C function is.
                Some(AttributeValue::UnitRef(at)) => entry = view.unit.entry(at)?,
                _ => break,
            }
        }
        Ok(Some(Location { function, ..Location::default() }))
    })
}

fn small(value: &AttributeValue<Slice<'_>>) -> Option<u32> {
    value.udata_value().and_then(|value| u32::try_from(value).ok())
}

fn origin<'a>(entry: &Entry<'a>) -> Option<AttributeValue<Slice<'a>>> {
    entry.attr_value(gimli::DW_AT_abstract_origin).or_else(|| entry.attr_value(gimli::DW_AT_specification))
}

/// Calls `look` with each unit that says it has code at `addr`, until one answers.
fn each_unit<T>(
    dwarf: &Dwarf,
    addr: u64,
    mut look: impl FnMut(&View<'_, '_>) -> gimli::Result<Option<T>>,
) -> Result<Option<T>, Error> {
    for start in dwarf.index()?.units_at(addr) {
        let loaded = dwarf.unit_of(start)?;
        let lines = loaded.lines.get_or_init(|| {
            read(dwarf, &loaded).unwrap_or_else(|error| {
                tracing::warn!("{}", malformed(start.into(), error.to_string()));
                UnitLines::default()
            })
        });
        let sections = dwarf.units.dwarf_with_ranges(loaded.bytes());
        let wrong = |error: gimli::Error| malformed(start.into(), error.to_string());
        let unit = loaded.unit(&sections).map_err(wrong)?;
        let view = View { types: dwarf, dwarf: &sections, unit: &unit, lines };
        if let Some(found) = look(&view).map_err(wrong)? {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

impl UnitLines {
    /// The last row that begins at or before `addr`.
    fn row(&self, addr: u64) -> Option<Row> {
        let after = self.rows.partition_point(|row| row.address <= addr);
        self.rows.get(after.checked_sub(1)?).copied().filter(|row| !row.end)
    }

    /// The function with code at `addr`: its offset in the unit.
    fn function(&self, addr: u64) -> Option<u32> {
        let after = self.functions.partition_point(|(start, ..)| *start <= addr);
        let (_, end, offset) = self.functions.get(after.checked_sub(1)?)?;
        (addr < *end).then_some(*offset)
    }
}

/// One unit, to look into.
struct View<'a, 'b> {
    types: &'b Dwarf,
    dwarf: &'b gimli::Dwarf<Slice<'a>>,
    unit: &'b Unit<'a>,
    lines: &'b UnitLines,
}

impl<'a> View<'a, '_> {
    fn location(&self, file: u64, line: u32, column: u32) -> Location {
        let known = |number: u32| (number != 0).then_some(number);
        let file = usize::try_from(file).ok().and_then(|file| self.lines.files.get(file));
        let file = file.filter(|name| !name.is_empty()).cloned();
        Location { function: None, file, line: known(line), column: known(column) }
    }

    /// The inlined calls of the function at `offset` that `addr` is in, the outermost first.
    fn inlined(&self, offset: u32, addr: u64) -> gimli::Result<Vec<Entry<'a>>> {
        let mut chain = Vec::new();
        let mut entries =
            self.unit.header.entries_raw(&self.unit.abbreviations, Some(UnitOffset(offset as usize)))?;
        let mut entry = Entry::null();
        let has_children = entries.read_entry(&mut entry)? && entry.has_children();
        while has_children && entries.next_depth() > 0 && chain.len() < INLINED_MAX {
            if entries.read_entry(&mut entry)? && entry.tag() == gimli::DW_TAG_inlined_subroutine {
                let covered = ranges(self.dwarf, self.unit, &entry)?;
                if covered.iter().any(|&(start, end)| (start..end).contains(&addr)) {
                    chain.push(entry.clone());
                }
            }
        }
        Ok(chain)
    }

    /// The name of a function, from the entry that it is an instance of if need be.
    fn name(&self, entry: &Entry<'a>, depth: u32) -> gimli::Result<Option<String>> {
        if let Some(value) = entry.attr_value(gimli::DW_AT_name) {
            let name = self.dwarf.attr_string(self.unit, value)?;
            return Ok(Some(name.to_string_lossy().into_owned()));
        }
        let Some(depth) = depth.checked_sub(1) else { return Ok(None) };
        match origin(entry) {
            Some(AttributeValue::UnitRef(at)) => self.name(&self.unit.entry(at)?, depth),
            // With LTO the function can come from another unit.
            Some(AttributeValue::DebugInfoRef(at)) => Ok(self.name_elsewhere(at.0, depth)),
            _ => Ok(None),
        }
    }

    fn name_elsewhere(&self, offset: usize, depth: u32) -> Option<String> {
        let loaded = self.types.unit_of(u32::try_from(offset).ok()?).ok()?;
        let dwarf = self.types.units.dwarf_with_ranges(loaded.bytes());
        let unit = loaded.unit(&dwarf).ok()?;
        let lines = UnitLines::default();
        let view = View { types: self.types, dwarf: &dwarf, unit: &unit, lines: &lines };
        let entry = unit.entry(UnitOffset(offset.checked_sub(loaded.start as usize)?)).ok()?;
        view.name(&entry, depth).ok()?
    }
}

/// Reads a unit's line table and finds its functions.
fn read(dwarf: &Dwarf, loaded: &Loaded) -> gimli::Result<UnitLines> {
    let sections = dwarf.units.dwarf_with_ranges(loaded.bytes());
    let unit = loaded.unit(&sections)?;
    let mut lines = UnitLines::default();
    let mut entries = unit.header.entries_raw(&unit.abbreviations, None)?;
    let mut root = Entry::null();
    entries.read_entry(&mut root)?;
    if let Some(AttributeValue::DebugLineRef(at)) = root.attr_value(gimli::DW_AT_stmt_list) {
        read_rows(&dwarf.units.line, &sections, &unit, at.0 as u64, &mut lines)?;
    }
    if root.has_children() {
        read_functions(&sections, &unit, &mut lines)?;
    }
    Ok(lines)
}

fn read_functions(
    dwarf: &gimli::Dwarf<Slice<'_>>,
    unit: &Unit<'_>,
    lines: &mut UnitLines,
) -> gimli::Result<()> {
    let mut cursor = unit.header.entries(&unit.abbreviations);
    cursor.next_entry()?;
    cursor.next_entry()?;
    while let Some(entry) = cursor.current()
        && lines.functions.len() < FUNCTIONS_MAX
    {
        if entry.tag() == gimli::DW_TAG_subprogram {
            let offset = u32::try_from(entry.offset().0).unwrap_or(0);
            for (start, end) in ranges(dwarf, unit, entry)? {
                lines.functions.push((start, end, offset));
            }
        }
        cursor.next_sibling()?;
    }
    lines.functions.sort_unstable();
    Ok(())
}

/// Runs the line program at `at` of `.debug_line`.
fn read_rows(
    section: &SectionReader,
    dwarf: &gimli::Dwarf<Slice<'_>>,
    unit: &Unit<'_>,
    at: u64,
    lines: &mut UnitLines,
) -> gimli::Result<()> {
    let Some(bytes) = program_bytes(section, at) else { return Ok(()) };
    let program = gimli::DebugLine::new(&bytes, LittleEndian).program(
        gimli::DebugLineOffset(0),
        unit.header.address_size(),
        None,
        None,
    )?;
    let mut rows = program.rows();
    while let Some((_, row)) = rows.next_row()?
        && lines.rows.len() < ROWS_MAX
    {
        lines.rows.push(Row {
            address: row.address(),
            file: u32::try_from(row.file_index()).unwrap_or(0),
            line: row.line().and_then(|line| u32::try_from(line.get()).ok()).unwrap_or(0),
            column: match row.column() {
                ColumnType::LeftEdge => 0,
                ColumnType::Column(column) => u32::try_from(column.get()).unwrap_or(0),
            },
            end: row.end_sequence(),
        });
    }
    // A sequence may begin where another ended. Of several rows at one address the last one counts.
    lines.rows.sort_by_key(|row| (row.address, !row.end));
    lines.files = files(rows.header(), dwarf, unit);
    Ok(())
}

/// The bytes of one line program, its length field included.
fn program_bytes(section: &SectionReader, at: u64) -> Option<Vec<u8>> {
    let head = section.read(at, section.len().checked_sub(at)?.min(12)).ok()?;
    let len = match crate::bytes::u32_at(&head, 0)? {
        u32::MAX => crate::bytes::u64_at(&head, 4)?.checked_add(12)?,
        short => u64::from(short) + 4,
    };
    section.read(at, len).ok()
}

/// Paths by the numbers that rows and entries use.
fn files(
    header: &gimli::LineProgramHeader<Slice<'_>>,
    dwarf: &gimli::Dwarf<Slice<'_>>,
    unit: &Unit<'_>,
) -> Vec<String> {
    let text = |value: AttributeValue<Slice<'_>>| {
        dwarf.attr_string(unit, value).map(|text| text.to_string_lossy().into_owned()).unwrap_or_default()
    };
    let compiled_in = unit.comp_dir.map(|dir| dir.to_string_lossy().into_owned()).unwrap_or_default();
    let path = |file: &gimli::FileEntry<Slice<'_>>| {
        let name = text(file.path_name());
        // Before version 5 directory 0 is where the compiler ran, and not in the table.
        let before_5 = header.version() < 5;
        let directory = match file.directory_index() {
            0 if before_5 => String::new(),
            _ => file.directory(header).map(text).unwrap_or_default(),
        };
        [directory, name].into_iter().fold(compiled_in.clone(), |path, next| join(&path, &next))
    };
    let mut files: Vec<String> = header.file_names().iter().map(path).collect();
    // Before version 5 files are counted from 1.
    if header.version() < 5 {
        files.insert(0, String::new());
    }
    files
}

/// `name` in `directory`.
fn join(directory: &str, name: &str) -> String {
    match (directory.is_empty(), name.is_empty()) {
        _ if name.starts_with('/') => name.to_owned(),
        (true, _) => name.to_owned(),
        (_, true) => directory.to_owned(),
        _ => format!("{}/{name}", directory.trim_end_matches('/')),
    }
}
