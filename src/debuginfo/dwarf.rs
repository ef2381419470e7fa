//! DWARF: structure layouts by name, for kernels without BTF.
//!
//! Reads one compilation unit at a time and stops at the first complete definition; a vmlinux has hundreds
//! of megabytes of DWARF, but what kstub asks for stands in its first units. Types in units of their own
//! (-fdebug-types-section; no kernel is built so) keep their offsets and lose their sizes. Source: the DWARF standard,
//! version 5, sections 5.7 (structures) and 7.5 (units).

use super::vmlinux::SectionReader;
use super::{Error, Member, TypeSource};
use gimli::{AttributeValue, DwAt, EndianSlice, EntriesTreeNode, LittleEndian, UnitOffset};

type Slice<'a> = EndianSlice<'a, LittleEndian>;
type Unit<'a> = gimli::Unit<Slice<'a>>;

const DEPTH: u32 = 32;
/// Members looked at for one path, anonymous ones included.
const MEMBERS_MAX: u32 = 2048;

/// The type information in the DWARF sections of one file.
pub struct Dwarf {
    info: SectionReader,
    abbrev: Vec<u8>,
    strings: Vec<u8>,
    line_strings: Vec<u8>,
    str_offsets: Vec<u8>,
}

impl Dwarf {
    /// `info` is read unit by unit; the other sections are held.
    pub fn new(
        info: SectionReader,
        abbrev: Vec<u8>,
        strings: Vec<u8>,
        line_strings: Vec<u8>,
        str_offsets: Vec<u8>,
    ) -> Self {
        Self { info, abbrev, strings, line_strings, str_offsets }
    }

    /// Bytes of the unit at `at`, its length field included (DWARF 5, 7.4: 32-bit, or 64-bit behind 0xffffffff).
    fn unit_len(&self, at: u64) -> Result<u64, Error> {
        let start = self.info.read(at, 4)?;
        let short = crate::bytes::u32_at(&start, 0).ok_or_else(|| malformed(at, "unit header cut short"))?;
        let len = if short == u32::MAX {
            let long = self.info.read(at + 4, 8)?;
            crate::bytes::u64_at(&long, 0).and_then(|n| n.checked_add(12))
        } else {
            Some(u64::from(short) + 4)
        };
        len.filter(|&len| len <= self.info.len() - at)
            .ok_or_else(|| malformed(at, "unit runs past the section"))
    }
}

/// A unit for looking at types: gimli's own constructor also wants the sections with lines and addresses.
fn bare_unit<'a>(
    dwarf: &gimli::Dwarf<Slice<'a>>,
    header: gimli::UnitHeader<Slice<'a>>,
) -> gimli::Result<Unit<'a>> {
    let abbreviations = dwarf.abbreviations(&header)?;
    let mut str_offsets_base =
        gimli::DebugStrOffsetsBase::default_for_encoding_and_file(header.encoding(), dwarf.file_type);
    let mut cursor = header.entries(&abbreviations);
    cursor.next_dfs()?;
    let declared = cursor.current().and_then(|root| root.attr_value(gimli::DW_AT_str_offsets_base));
    if let Some(AttributeValue::DebugStrOffsetsBase(base)) = declared {
        str_offsets_base = base;
    }
    Ok(gimli::Unit {
        header,
        abbreviations,
        name: None,
        comp_dir: None,
        low_pc: 0,
        str_offsets_base,
        addr_base: gimli::DebugAddrBase(0),
        loclists_base: gimli::DebugLocListsBase(0),
        rnglists_base: gimli::DebugRngListsBase(0),
        line_program: None,
        dwo_id: None,
    })
}

fn malformed(offset: u64, what: impl Into<String>) -> Error {
    Error::Types { format: "DWARF", offset, what: what.into() }
}

impl TypeSource for Dwarf {
    fn member(&self, container: &str, path: &str) -> Result<Option<Member>, Error> {
        let mut at = 0;
        while at < self.info.len() {
            let len = self.unit_len(at)?;
            let bytes = self.info.read(at, len)?;
            let found = self.member_in_unit(&bytes, container, path);
            if let Some(member) = found.map_err(|error| malformed(at, error.to_string()))? {
                return Ok(member);
            }
            at += len;
        }
        Ok(None)
    }
}

impl Dwarf {
    /// Looks into one unit: `None` if it does not define `container`, `Some(None)` if that lacks the member.
    fn member_in_unit(
        &self,
        unit: &[u8],
        container: &str,
        path: &str,
    ) -> gimli::Result<Option<Option<Member>>> {
        let dwarf = gimli::Dwarf {
            debug_abbrev: gimli::DebugAbbrev::new(&self.abbrev, LittleEndian),
            debug_info: gimli::DebugInfo::new(unit, LittleEndian),
            debug_str: gimli::DebugStr::new(&self.strings, LittleEndian),
            debug_line_str: EndianSlice::new(&self.line_strings, LittleEndian).into(),
            debug_str_offsets: EndianSlice::new(&self.str_offsets, LittleEndian).into(),
            ..gimli::Dwarf::default()
        };
        let Some(header) = dwarf.units().next()? else { return Ok(None) };
        let unit = bare_unit(&dwarf, header)?;
        let Some(offset) = complete_container(&dwarf, &unit, container)? else { return Ok(None) };
        Finder { dwarf: &dwarf, unit: &unit, budget: MEMBERS_MAX }.path(offset, path).map(Some)
    }
}

/// The structure or union `name` at the top of `unit`, if defined (not just declared) there.
fn complete_container(
    dwarf: &gimli::Dwarf<Slice<'_>>,
    unit: &Unit<'_>,
    name: &str,
) -> gimli::Result<Option<UnitOffset>> {
    let mut tree = unit.entries_tree(None)?;
    let mut children = tree.root()?.children();
    while let Some(child) = children.next()? {
        let entry = child.entry();
        if is_container(entry.tag())
            && entry.attr_value(gimli::DW_AT_declaration).is_none()
            && let Some(value) = entry.attr_value(gimli::DW_AT_name)
            && dwarf.attr_string(unit, value)?.slice() == name.as_bytes()
        {
            return Ok(Some(entry.offset()));
        }
    }
    Ok(None)
}

fn is_container(tag: gimli::DwTag) -> bool {
    matches!(tag, gimli::DW_TAG_structure_type | gimli::DW_TAG_union_type | gimli::DW_TAG_class_type)
}

/// Looks members up inside one unit; C types refer to nothing outside it.
struct Finder<'a, 'b> {
    dwarf: &'b gimli::Dwarf<Slice<'a>>,
    unit: &'b Unit<'a>,
    budget: u32,
}

impl Finder<'_, '_> {
    fn path(&mut self, container: UnitOffset, path: &str) -> gimli::Result<Option<Member>> {
        let mut container = Some(container);
        let mut offset = 0u64;
        let mut type_at = None;
        for name in path.split('.') {
            let Some(here) = container else { return Ok(None) };
            let Some((inner, ty)) = self.direct(here, name)? else { return Ok(None) };
            offset = offset.wrapping_add(inner);
            type_at = ty;
            container = match ty {
                Some(ty) => self.strip(ty)?.filter(|&(_, tag)| is_container(tag)).map(|(at, _)| at),
                None => None,
            };
        }
        let size = match type_at {
            Some(ty) => self.size(ty, 0)?,
            None => None,
        };
        Ok(Some(Member { offset, size }))
    }

    /// Member `name` of the container at `at`, through anonymous members: byte offset and type.
    fn direct(&mut self, at: UnitOffset, name: &str) -> gimli::Result<Option<(u64, Option<UnitOffset>)>> {
        let mut tree = self.unit.entries_tree(Some(at))?;
        let mut children = tree.root()?.children();
        while let Some(child) = children.next()? {
            if child.entry().tag() != gimli::DW_TAG_member {
                continue;
            }
            match self.budget.checked_sub(1) {
                Some(left) => self.budget = left,
                None => return Ok(None),
            }
            let offset = member_offset(&child);
            let ty = reference(&child, gimli::DW_AT_type);
            match child.entry().attr_value(gimli::DW_AT_name) {
                Some(value) => {
                    if self.dwarf.attr_string(self.unit, value)?.slice() == name.as_bytes() {
                        return Ok(Some((offset, ty)));
                    }
                }
                None => {
                    if let Some(ty) = ty
                        && let Some((inner, tag)) = self.strip(ty)?
                        && is_container(tag)
                        && let Some((inner_offset, found)) = self.direct(inner, name)?
                    {
                        return Ok(Some((offset.wrapping_add(inner_offset), found)));
                    }
                }
            }
        }
        Ok(None)
    }

    /// The type behind typedefs and qualifiers, and its tag.
    fn strip(&self, at: UnitOffset) -> gimli::Result<Option<(UnitOffset, gimli::DwTag)>> {
        let mut at = at;
        for _ in 0..DEPTH {
            let entry = self.unit.entry(at)?;
            let transparent = matches!(
                entry.tag(),
                gimli::DW_TAG_typedef
                    | gimli::DW_TAG_const_type
                    | gimli::DW_TAG_volatile_type
                    | gimli::DW_TAG_restrict_type
                    | gimli::DW_TAG_atomic_type
            );
            if !transparent {
                return Ok(Some((at, entry.tag())));
            }
            match entry.attr_value(gimli::DW_AT_type) {
                Some(AttributeValue::UnitRef(next)) => at = next,
                _ => return Ok(None),
            }
        }
        Ok(None)
    }

    /// Size in bytes of the type at `at`.
    fn size(&self, at: UnitOffset, depth: u32) -> gimli::Result<Option<u64>> {
        let Some((at, tag)) = self.strip(at)? else { return Ok(None) };
        let entry = self.unit.entry(at)?;
        if let Some(size) = entry.attr_value(gimli::DW_AT_byte_size).and_then(|v| v.udata_value()) {
            return Ok(Some(size));
        }
        if tag == gimli::DW_TAG_pointer_type {
            return Ok(Some(8));
        }
        if tag != gimli::DW_TAG_array_type || depth >= DEPTH {
            return Ok(None);
        }
        let Some(AttributeValue::UnitRef(element)) = entry.attr_value(gimli::DW_AT_type) else {
            return Ok(None);
        };
        let Some(mut size) = self.size(element, depth + 1)? else { return Ok(None) };
        let mut tree = self.unit.entries_tree(Some(at))?;
        let mut dimensions = tree.root()?.children();
        while let Some(dimension) = dimensions.next()? {
            let entry = dimension.entry();
            let value = |name: DwAt| entry.attr_value(name).and_then(|v| v.udata_value());
            let count = value(gimli::DW_AT_count)
                .or_else(|| value(gimli::DW_AT_upper_bound).and_then(|n| n.checked_add(1)));
            size = size.saturating_mul(count.unwrap_or(0));
        }
        Ok(Some(size))
    }
}

fn reference(node: &EntriesTreeNode<'_, '_, Slice<'_>>, name: DwAt) -> Option<UnitOffset> {
    match node.entry().attr_value(name) {
        Some(AttributeValue::UnitRef(at)) => Some(at),
        _ => None,
    }
}

/// `DW_AT_data_member_location`; absent in unions, in bits for DWARF 4+ bit-fields.
fn member_offset(node: &EntriesTreeNode<'_, '_, Slice<'_>>) -> u64 {
    let value = |name: DwAt| node.entry().attr_value(name).and_then(|v| v.udata_value());
    value(gimli::DW_AT_data_member_location)
        .or_else(|| value(gimli::DW_AT_data_bit_offset).map(|bits| bits / 8))
        .unwrap_or(0)
}
