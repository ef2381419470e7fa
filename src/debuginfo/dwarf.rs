//! DWARF: types by name and by entry, for kernels without BTF and for what BTF leaves out (variables).
//!
//! A type's id is the offset of its entry in `.debug_info`; names come from an index of all units, and an entry is
//! decoded when it is asked for. Types in a section of their own (`.debug_types` of version 4; no kernel is built so)
//! are `void`. Source: the DWARF standard, version 5, chapter 5; version 3, section 5.5.6 (older bit-fields).

use super::Error;
use super::dwarf_index::Index;
use super::dwarf_scan::{class, constant};
use super::dwarf_unit::{Entry, Loaded, Slice, Unit, Units, malformed};
use super::types::{Class, IntKind, MemberDef, Shape, Type, TypeId, TypeSource};
use gimli::{AttributeValue, UnitOffset};
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{OnceLock, PoisonError, RwLock};

/// Members, enumerators or parameters of one type; more is damage.
const CHILDREN_MAX: usize = 1 << 16;
/// C has no more dimensions in any kernel.
const DIMENSIONS_MAX: usize = 16;

/// The type information in the DWARF of one file.
pub(super) struct Dwarf {
    pub units: Units,
    /// `TypeId::source` of its types.
    source: u16,
    build_id: Option<String>,
    /// Where the index is kept.
    directory: Option<PathBuf>,
    index: OnceLock<Result<Index, String>>,
    /// Arrays inside arrays, which have no entry of their own, by the entry of their outermost dimension.
    inner: RwLock<HashMap<u32, Type>>,
}

impl Dwarf {
    /// Types of `units` under ids with `source`; an index is kept in `directory` if the file has a build-id.
    pub fn new(units: Units, source: u16, build_id: Option<String>, directory: Option<PathBuf>) -> Self {
        Self { units, source, build_id, directory, index: OnceLock::new(), inner: RwLock::default() }
    }

    /// What is where; made or read when first asked for.
    pub fn index(&self) -> Result<&Index, Error> {
        let open = || Index::open(&self.units, self.directory.as_deref(), self.build_id.as_deref());
        let index = self.index.get_or_init(|| open().map_err(|error| error.to_string()));
        index.as_ref().map_err(|what| malformed(0, what.as_str()))
    }

    /// The unit that holds the entry at `offset`.
    pub fn unit_of(&self, offset: u32) -> Result<std::sync::Arc<Loaded>, Error> {
        let unit = self.index()?.unit_of(offset, self.units.info.len());
        let (start, len) = unit.ok_or_else(|| malformed(offset.into(), "there is no unit"))?;
        self.units.load(start, len)
    }

    /// Calls `then` with the entry at `offset` of `.debug_info`.
    fn at<T>(
        &self,
        offset: u32,
        then: impl for<'a> FnOnce(&Decoder<'a, '_>, &Entry<'a>) -> gimli::Result<T>,
    ) -> Result<T, Error> {
        let loaded = self.unit_of(offset)?;
        let decode = || {
            let dwarf = self.units.dwarf(loaded.bytes());
            let unit = loaded.unit(&dwarf)?;
            let decoder = Decoder { types: self, dwarf: &dwarf, unit: &unit, start: loaded.start };
            let entry = unit.entry(UnitOffset(offset.saturating_sub(loaded.start) as usize))?;
            then(&decoder, &entry)
        };
        decode().map_err(|error: gimli::Error| malformed(offset.into(), error.to_string()))
    }
}

impl TypeSource for Dwarf {
    fn find(&self, wanted: Class, name: &str) -> Result<Option<TypeId>, Error> {
        let Some(offset) = self.index()?.find(wanted, name) else { return Ok(None) };
        // The index may be from a file, and files can be damaged.
        self.at(offset, |decoder, entry| {
            let declared = decoder.specification(entry)?;
            let named = declared.as_ref().unwrap_or(entry);
            if class(entry.tag()) != Some(wanted) || decoder.name(named) != name {
                return Ok(Err(()));
            }
            let ty = entry.attr_value(gimli::DW_AT_type).or_else(|| named.attr_value(gimli::DW_AT_type));
            Ok(Ok(match wanted {
                Class::Variable => decoder.reference(ty),
                _ => TypeId { source: self.source, id: offset },
            }))
        })?
        .map(Some)
        .map_err(|()| malformed(offset.into(), self.misled(name)))
    }

    fn get(&self, id: TypeId) -> Result<Type, Error> {
        if let Some(inner) = self.inner.read().unwrap_or_else(PoisonError::into_inner).get(&id.id) {
            return Ok(inner.clone());
        }
        self.at(id.id, |decoder, entry| decoder.decode(entry))?
            .ok_or_else(|| malformed(id.id.into(), "this entry is no type"))
    }

    fn names(&self, class: Class) -> Vec<String> {
        self.index().map(|index| index.names(class)).unwrap_or_else(|error| {
            tracing::warn!("{error}");
            Vec::new()
        })
    }

    fn enumerator(&self, name: &str) -> Result<Option<i64>, Error> {
        let Some((offset, value)) = self.index()?.enumerator(name) else { return Ok(None) };
        let found = self.get(TypeId { source: self.source, id: offset })?;
        match found.shape {
            Shape::Enum { values, .. } if values.iter().any(|(n, v)| n == name && *v == value) => {
                Ok(Some(value))
            }
            _ => Err(malformed(offset.into(), self.misled(name))),
        }
    }

    fn format(&self) -> &'static str {
        "DWARF"
    }
}

impl Dwarf {
    fn misled(&self, name: &str) -> String {
        let place =
            self.directory.as_deref().map(|dir| dir.join(self.build_id.as_deref().unwrap_or_default()));
        match place {
            Some(file) => format!("'{name}' is not here; remove the index '{}'", file.display()),
            None => format!("'{name}' is not here"),
        }
    }
}

/// Decodes entries of one unit.
struct Decoder<'a, 'b> {
    types: &'b Dwarf,
    dwarf: &'b gimli::Dwarf<Slice<'a>>,
    unit: &'b Unit<'a>,
    start: u32,
}

impl<'a> Decoder<'a, '_> {
    fn name(&self, entry: &Entry<'a>) -> String {
        let value = entry.attr_value(gimli::DW_AT_name);
        let text = value.and_then(|value| self.dwarf.attr_string(self.unit, value).ok());
        text.map(|text| text.to_string_lossy().into_owned()).unwrap_or_default()
    }

    /// The declaration that a definition refers to for what it does not repeat.
    fn specification(&self, entry: &Entry<'a>) -> gimli::Result<Option<Entry<'a>>> {
        match entry.attr_value(gimli::DW_AT_specification) {
            Some(AttributeValue::UnitRef(at)) => self.unit.entry(at).map(Some),
            _ => Ok(None),
        }
    }

    /// The type that an attribute refers to; `void` if there is none.
    fn reference(&self, value: Option<AttributeValue<Slice<'a>>>) -> TypeId {
        let offset = match value {
            Some(AttributeValue::UnitRef(at)) => {
                u32::try_from(at.0).ok().and_then(|at| self.start.checked_add(at))
            }
            Some(AttributeValue::DebugInfoRef(at)) => u32::try_from(at.0).ok(),
            Some(AttributeValue::DebugTypesRef(signature)) => {
                self.types.index().ok().and_then(|index| index.signature(signature.0))
            }
            _ => None,
        };
        offset.map_or(TypeId::VOID, |id| TypeId { source: self.types.source, id })
    }

    /// The children of an entry.
    fn children(&self, entry: &Entry<'a>) -> gimli::Result<Vec<Entry<'a>>> {
        let mut children = Vec::new();
        if !entry.has_children() {
            return Ok(children);
        }
        let mut tree = self.unit.entries_tree(Some(entry.offset()))?;
        let mut nodes = tree.root()?.children();
        while let Some(node) = nodes.next()?
            && children.len() < CHILDREN_MAX
        {
            children.push(node.entry().clone());
        }
        Ok(children)
    }

    /// The type that an entry describes; `None` for one that is no type.
    fn decode(&self, entry: &Entry<'a>) -> gimli::Result<Option<Type>> {
        let number = |name| entry.attr_value(name).and_then(|value| value.udata_value());
        let to = || self.reference(entry.attr_value(gimli::DW_AT_type));
        let size = number(gimli::DW_AT_byte_size).unwrap_or(0);
        let declared = matches!(entry.attr_value(gimli::DW_AT_declaration), Some(AttributeValue::Flag(true)));
        let name = self.name(entry);
        let signature = self.reference(entry.attr_value(gimli::DW_AT_signature));
        let shape = match entry.tag() {
            // Stands in for a type in a unit of its own.
            _ if signature != TypeId::VOID => Shape::Qualified("", signature),
            gimli::DW_TAG_base_type => self.base(entry, size),
            gimli::DW_TAG_pointer_type
            | gimli::DW_TAG_reference_type
            | gimli::DW_TAG_rvalue_reference_type => Shape::Pointer(to()),
            gimli::DW_TAG_structure_type | gimli::DW_TAG_class_type if declared => Shape::Declared("struct"),
            gimli::DW_TAG_union_type if declared => Shape::Declared("union"),
            gimli::DW_TAG_enumeration_type if declared => Shape::Declared("enum"),
            gimli::DW_TAG_structure_type | gimli::DW_TAG_class_type | gimli::DW_TAG_union_type => {
                let union = entry.tag() == gimli::DW_TAG_union_type;
                Shape::Composite { union, size, members: self.members(entry)? }
            }
            gimli::DW_TAG_enumeration_type => self.enumeration(entry, size)?,
            gimli::DW_TAG_array_type => self.array(entry)?,
            gimli::DW_TAG_typedef => Shape::Typedef(to()),
            gimli::DW_TAG_const_type => Shape::Qualified("const", to()),
            gimli::DW_TAG_volatile_type => Shape::Qualified("volatile", to()),
            gimli::DW_TAG_restrict_type => Shape::Qualified("restrict", to()),
            gimli::DW_TAG_atomic_type => Shape::Qualified("_Atomic", to()),
            gimli::DW_TAG_packed_type | gimli::DW_TAG_shared_type | gimli::DW_TAG_immutable_type => {
                Shape::Qualified("", to())
            }
            gimli::DW_TAG_subroutine_type | gimli::DW_TAG_subprogram => {
                let children = self.children(entry)?;
                let parameters =
                    children.iter().filter(|child| child.tag() == gimli::DW_TAG_formal_parameter);
                let parameter = |child: &Entry<'a>| {
                    (self.name(child), self.reference(child.attr_value(gimli::DW_AT_type)))
                };
                Shape::Function {
                    returns: to(),
                    parameters: parameters.map(parameter).collect(),
                    variadic: children.iter().any(|c| c.tag() == gimli::DW_TAG_unspecified_parameters),
                }
            }
            gimli::DW_TAG_unspecified_type => Shape::Void,
            _ => return Ok(None),
        };
        Ok(Some(Type { name, shape }))
    }

    fn base(&self, entry: &Entry<'a>, size: u64) -> Shape {
        // No number has more bytes than this can tell.
        let size = u32::try_from(size).unwrap_or(0);
        let int = |signed, kind| Shape::Int { size, signed, kind };
        match entry.attr_value(gimli::DW_AT_encoding) {
            Some(AttributeValue::Encoding(encoding)) => match encoding {
                gimli::DW_ATE_boolean => int(false, IntKind::Bool),
                gimli::DW_ATE_signed_char => int(true, IntKind::Char),
                gimli::DW_ATE_unsigned_char => int(false, IntKind::Char),
                gimli::DW_ATE_signed => int(true, IntKind::Number),
                gimli::DW_ATE_float | gimli::DW_ATE_complex_float | gimli::DW_ATE_decimal_float => {
                    Shape::Float(size)
                }
                _ => int(false, IntKind::Number),
            },
            _ => int(false, IntKind::Number),
        }
    }

    fn members(&self, entry: &Entry<'a>) -> gimli::Result<Vec<MemberDef>> {
        let children = self.children(entry)?;
        let members = children.iter().filter(|child| child.tag() == gimli::DW_TAG_member);
        // A static member of a C++ class is a declaration and has no place.
        let placed = members.filter(|member| !member.has_attr(gimli::DW_AT_external));
        placed
            .map(|member| {
                let (bit_offset, bits) = self.place(member)?;
                let ty = self.reference(member.attr_value(gimli::DW_AT_type));
                Ok(MemberDef { name: self.name(member), bit_offset, bits, ty })
            })
            .collect()
    }

    /// Where a member is, in bits, and the width of a bit-field.
    fn place(&self, member: &Entry<'a>) -> gimli::Result<(u64, Option<u32>)> {
        let number = |name| member.attr_value(name).and_then(|value| constant(&value));
        let location = match member.attr_value(gimli::DW_AT_data_member_location) {
            Some(AttributeValue::Exprloc(expression)) => plus_constant(expression, self.unit.encoding())?,
            Some(value) => value.udata_value(),
            None => None,
        };
        let start = location.unwrap_or(0).wrapping_mul(8);
        let Some(width) = number(gimli::DW_AT_bit_size).and_then(|bits| u32::try_from(bits).ok()) else {
            return Ok((start, None));
        };
        if let Some(bits) = number(gimli::DW_AT_data_bit_offset) {
            return Ok((start.wrapping_add(bits as u64), Some(width)));
        }
        // Before version 4 it was counted from the highest bit of the storage unit to that of the field.
        let Some(from_top) = number(gimli::DW_AT_bit_offset) else { return Ok((start, Some(width))) };
        let storage = match number(gimli::DW_AT_byte_size) {
            Some(size) => size as u64,
            None => self.storage(member)?,
        };
        let above = (from_top as u64).wrapping_add(width.into());
        Ok((start.wrapping_add(storage.wrapping_mul(8)).wrapping_sub(above), Some(width)))
    }

    /// Bytes of the type that a bit-field is declared with, behind typedefs and qualifiers.
    fn storage(&self, member: &Entry<'a>) -> gimli::Result<u64> {
        const DEPTH: u32 = 32;
        let mut next = member.attr_value(gimli::DW_AT_type);
        for _ in 0..DEPTH {
            let Some(AttributeValue::UnitRef(at)) = next else { break };
            let entry = self.unit.entry(at)?;
            if let Some(size) = entry.attr_value(gimli::DW_AT_byte_size) {
                return Ok(size.udata_value().unwrap_or(0));
            }
            next = entry.attr_value(gimli::DW_AT_type);
        }
        Ok(0)
    }

    fn enumeration(&self, entry: &Entry<'a>, size: u64) -> gimli::Result<Shape> {
        let children = self.children(entry)?;
        let values: Vec<(String, i64)> = children
            .iter()
            .filter(|child| child.tag() == gimli::DW_TAG_enumerator)
            .filter_map(|child| {
                Some((self.name(child), constant(&child.attr_value(gimli::DW_AT_const_value)?)?))
            })
            .collect();
        // Only what is written with its sign is negative: a large value of 8 bytes only looks so.
        let negative = |child: &Entry<'a>| matches!(child.attr_value(gimli::DW_AT_const_value), Some(AttributeValue::Sdata(value)) if value < 0);
        let signed = children.iter().any(negative)
            || match (entry.attr_value(gimli::DW_AT_encoding), entry.attr_value(gimli::DW_AT_type)) {
                (Some(AttributeValue::Encoding(encoding)), _) => encoding == gimli::DW_ATE_signed,
                (_, Some(AttributeValue::UnitRef(at))) => {
                    let base = self.unit.entry(at)?;
                    matches!(self.base(&base, size), Shape::Int { signed: true, .. })
                }
                _ => false,
            };
        Ok(Shape::Enum { size: u32::try_from(size).unwrap_or(0), signed, values })
    }

    /// An array. Of several dimensions the outermost is the type; the others get the ids of their own entries.
    fn array(&self, entry: &Entry<'a>) -> gimli::Result<Shape> {
        let children = self.children(entry)?;
        let dimensions = children.iter().filter(|child| child.tag() == gimli::DW_TAG_subrange_type);
        let dimensions: Vec<&Entry<'a>> = dimensions.take(DIMENSIONS_MAX).collect();
        let mut element = self.reference(entry.attr_value(gimli::DW_AT_type));
        let Some((outermost, inner)) = dimensions.split_first() else {
            return Ok(Shape::Array { element, count: 0 });
        };
        for dimension in inner.iter().rev() {
            let offset = u32::try_from(dimension.offset().0).ok().and_then(|at| self.start.checked_add(at));
            let Some(id) = offset else { break };
            let ty = Type { name: String::new(), shape: Shape::Array { element, count: count(dimension) } };
            self.types.inner.write().unwrap_or_else(PoisonError::into_inner).insert(id, ty);
            element = TypeId { source: self.types.source, id };
        }
        Ok(Shape::Array { element, count: count(outermost) })
    }
}

/// Elements in one dimension; 0 if it is not said.
fn count(dimension: &Entry<'_>) -> u64 {
    let number = |name| dimension.attr_value(name).and_then(|value| constant(&value));
    let last = |bound: i64| bound.checked_add(1).filter(|&n| n >= 0);
    let count = number(gimli::DW_AT_count).or_else(|| number(gimli::DW_AT_upper_bound).and_then(last));
    count.unwrap_or(0) as u64
}

/// The offset in a location that is one addition: how version 2 places members.
fn plus_constant(
    expression: gimli::Expression<Slice<'_>>,
    encoding: gimli::Encoding,
) -> gimli::Result<Option<u64>> {
    match expression.operations(encoding).next()? {
        Some(gimli::Operation::PlusConstant { value }) => Ok(Some(value)),
        _ => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::sections::SectionReader;
    use super::*;
    use crate::debuginfo::types::TypeTable;
    use std::sync::Arc;

    /// Abbreviations: number, tag, has children, attributes with forms.
    fn abbreviations() -> Vec<u8> {
        let (name, size, ty) = ([0x03, 0x08], [0x0b, 0x0b], [0x49, 0x13]);
        let table: [(u8, &[[u8; 2]]); 9] = [
            (0x11, &[]),                                                   // 1: compile_unit
            (0x24, &[name, size, [0x3e, 0x0b]]),                           // 2: base_type
            (0x13, &[name, size]),                                         // 3: structure_type
            (0x0d, &[name, ty, [0x38, 0x0b], [0x0d, 0x0b], [0x0c, 0x0b]]), // 4: member, bit-field of version 3
            (0x0d, &[name, ty, [0x0d, 0x0b], [0x6b, 0x0b]]), // 5: member, bit-field of version 4
            (0x0d, &[name, [0x49, 0x10], [0x38, 0x0a]]),     // 6: member, ref_addr, block1
            (0x01, &[ty]),                                   // 7: array_type
            (0x21, &[[0x2f, 0x0b]]),                         // 8: subrange_type, upper bound
            (0x34, &[name, ty]),                             // 9: variable
        ];
        let mut out = Vec::new();
        for (i, (tag, attributes)) in table.iter().enumerate() {
            let children = u8::from(matches!(i + 1, 1 | 3 | 7));
            out.extend([i as u8 + 1, *tag, children]);
            out.extend(attributes.concat());
            out.extend([0, 0]);
        }
        out.push(0);
        out
    }

    /// A unit of version 4 around `entries`.
    fn unit(entries: &[u8]) -> Vec<u8> {
        let mut unit = (entries.len() as u32 + 9).to_le_bytes().to_vec();
        unit.extend([4, 0, 0, 0, 0, 0, 8, 1]);
        unit.extend(entries);
        unit.push(0);
        unit
    }

    fn open(info: Vec<u8>) -> Dwarf {
        let load = |name: &'static str| if name == ".debug_abbrev" { abbreviations() } else { Vec::new() };
        let reader = |bytes| SectionReader::held(bytes, "test");
        let units = Units::new(reader(info), reader(Vec::new()), Box::new(load)).unwrap();
        Dwarf::new(units, 3, None, None)
    }

    /// Two units: `int` and `int grid[2][3]` in one; in the other `struct s` with bit-fields of both kinds and an `int`
    /// of the first unit 8 bytes on.
    fn sample() -> Vec<u8> {
        let first = unit(
            &[
                &b"\x02int\0\x04\x05"[..],           // at 12
                b"\x07\x0c\0\0\0\x08\x01\x08\x02\0", // at 19: int [2][3]
                b"\x09grid\0\x13\0\0\0",
            ]
            .concat(),
        );
        let second = unit(
            &[
                &b"\x02unsigned int\0\x04\x07"[..], // at 12
                b"\x03s\0\x10",                     // at 28
                // 3 bits from the top of 4 bytes at 4: bits 27 to 31 are above.
                b"\x04old\0\x0c\0\0\0\x04\x03\x05",
                b"\x05new\0\x0c\0\0\0\x02\x3d",
                b"\x06far\0\x0c\0\0\0\x02\x23\x08",
                b"\0",
            ]
            .concat(),
        );
        [first, second].concat()
    }

    #[test]
    fn bit_fields_arrays_and_other_units() {
        let table = TypeTable::new(Arc::new(open(sample())));
        assert_eq!(table.format(), "DWARF");
        // The ids of source 3 are asked of the third module.
        table.set_modules((0..3).map(|_| Arc::new(open(sample())) as Arc<dyn TypeSource>).collect());
        let s = table.composite("s").unwrap();
        let member = |name| table.member(s, name).map(|m| (m.offset, m.size, m.bits));
        assert_eq!(member("old"), Some((4, Some(4), Some((24, 3)))));
        assert_eq!(member("new"), Some((4, Some(4), Some((29, 2)))));
        assert_eq!(member("far"), Some((8, Some(4), None)));
        assert_eq!(table.spell(table.member(s, "far").unwrap().ty), "int");
        let grid = table.find(Class::Variable, "grid").unwrap();
        assert_eq!((table.spell(grid), table.size(grid)), ("int [2][3]".into(), Some(24)));
        let parsed = table.parse("int [2][3]").unwrap();
        assert_eq!((table.spell(parsed), table.size(parsed)), ("int [2][3]".into(), Some(24)));
        let parsed = table.parse("const struct s *const *[4]").unwrap();
        assert_eq!((table.spell(parsed).as_str(), table.size(parsed)), ("struct s **[4]", Some(32)));
        assert_eq!(table.parse("struct s *[4]x"), None);
        assert_eq!(table.parse("struct s *x"), None);
        assert_eq!(table.names(Class::Base), ["int", "unsigned int"]);
    }

    #[test]
    fn a_misleading_index_is_an_error() {
        let dwarf = open(sample());
        let needle = b"\x03s\0\x10";
        let place = sample().windows(needle.len()).position(|w| w == needle).unwrap() as u32;
        assert_eq!(dwarf.index().unwrap().find(Class::Struct, "s"), Some(place));
        // An index that says of one place what is at another.
        let other = open([unit(b"\x02int\0\x04\x05"), unit(b"\x03s\0\x10\0")].concat());
        let wrong =
            Dwarf { index: OnceLock::from(Ok(Index::build(&other.units).unwrap())), ..open(sample()) };
        let said = wrong.find(Class::Struct, "s").unwrap_err().to_string();
        assert!(said.contains("'s' is not here") || said.contains("DWARF at"), "{said}");
    }

    /// Asks for everything; nothing may panic or take long.
    fn ask(dwarf: Dwarf) {
        let source: Arc<dyn TypeSource> = Arc::new(dwarf);
        let table = TypeTable::new(Arc::clone(&source));
        for class in [Class::Struct, Class::Base, Class::Variable, Class::Typedef, Class::Enum] {
            for name in source.names(class) {
                if let Ok(Some(id)) = source.find(class, &name) {
                    let _ = source.get(id);
                    let id = TypeId { source: 0, ..id };
                    let _ = (table.size(id), table.spell(id), table.member(id, "far.x"));
                }
            }
        }
        let _ = source.enumerator("x");
    }

    #[test]
    fn damage_is_survived() {
        let good = sample();
        for at in 0..good.len() {
            for bit in 0..8 {
                let mut bad = good.clone();
                bad[at] ^= 1 << bit;
                ask(open(bad));
            }
            ask(open(good[..at].to_vec()));
        }
        let index = open(good.clone());
        let bytes = index.index().unwrap().bytes().to_vec();
        for at in 24..bytes.len() {
            for bit in 0..8 {
                let mut bad = bytes.clone();
                bad[at] ^= 1 << bit;
                if let Some(index) = Index::sealed(bad, good.len() as u64) {
                    let _ = (index.units_at(1), index.signature(1), index.enumerator("x"));
                    ask(Dwarf { index: OnceLock::from(Ok(index)), ..open(good.clone()) });
                }
            }
        }
    }
}
