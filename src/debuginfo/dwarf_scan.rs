//! One pass over all units of a file, on every core: the names, enumerators and address ranges in them.
//!
//! Looks at what stands at the top of a unit and inside enumerations, and passes over the rest by `DW_AT_sibling`.
//! Names are told apart by where they are in `.debug_str`, which linkers make free of duplicates: a vmlinux names the
//! same types in thousands of units. Source: the DWARF standard, version 5, sections 5 and 7.5.

use super::Error;
use super::dwarf_unit::{Slice, Unit, Units, check_len, malformed, ranges, unit};
use super::types::Class;
use crate::bytes::cstr_at;
use gimli::{AttributeValue, UnitOffset};
use hashbrown::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Bytes of units that a thread reads at a time.
const WINDOW: usize = 4 << 20;
/// More threads do not read faster.
const THREADS: usize = 8;

/// A name: most are in `.debug_str`, short ones can stand in the unit itself.
#[derive(PartialEq, Eq, Hash)]
pub(super) enum Name {
    At(u32),
    Inline(Box<[u8]>),
}

impl Name {
    /// Its bytes, given those of `.debug_str`.
    pub fn bytes<'a>(&'a self, strings: &'a [u8]) -> &'a [u8] {
        match self {
            Self::At(at) => cstr_at(strings, *at as usize, usize::MAX).unwrap_or_default(),
            Self::Inline(bytes) => bytes,
        }
    }
}

/// A definition; the least of several is the one wanted.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Definition {
    /// 0 for what other units see too, 1 for a variable that only its own does, 2 for one that is only declared:
    /// assembly or the linker script defines it (`jiffies`).
    pub rank: u8,
    /// Offset in `.debug_info`.
    pub offset: u32,
}

/// What a pass found.
#[derive(Default)]
pub(super) struct Found {
    pub names: HashMap<(Class, Name), Definition>,
    /// The enumeration's offset, and the value.
    pub enumerators: HashMap<Name, (u32, i64)>,
    /// Start, end, offset of the unit.
    pub ranges: Vec<(u64, u64, u32)>,
    /// Signature of a type in a unit of its own, and the type's offset.
    pub signatures: Vec<(u64, u32)>,
}

/// Looks through the units in `list`. A damaged one costs what it holds from there on, which is said.
pub(super) fn scan(units: &Units, list: &[(u32, u32)]) -> Found {
    let windows = windows(list);
    let next = AtomicUsize::new(0);
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get().min(THREADS)).min(windows.len());
    let work = || {
        let (mut found, mut buf) = (Found::default(), Vec::new());
        while let Some(&window) = windows.get(next.fetch_add(1, Ordering::Relaxed)) {
            if let Err(error) = scan_window(units, window, &mut buf, &mut found) {
                tracing::warn!("{error}");
            }
        }
        found
    };
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
        let mut found = work();
        for other in others {
            match other.join() {
                Ok(other) => found.merge(other),
                Err(cause) => std::panic::resume_unwind(cause),
            }
        }
        found
    })
}

/// Neighbouring units together, so that files are read in large pieces.
fn windows(list: &[(u32, u32)]) -> Vec<&[(u32, u32)]> {
    let mut windows = Vec::new();
    let mut rest = list;
    while !rest.is_empty() {
        let mut len = 0usize;
        let fit = rest.iter().take_while(|(_, unit)| {
            len = len.saturating_add(*unit as usize);
            len <= WINDOW
        });
        let (window, left) = rest.split_at(fit.count().max(1));
        windows.push(window);
        rest = left;
    }
    windows
}

fn scan_window(
    units: &Units,
    window: &[(u32, u32)],
    buf: &mut Vec<u8>,
    found: &mut Found,
) -> Result<(), Error> {
    let (Some(&(start, first)), Some(&(last, last_len))) = (window.first(), window.last()) else {
        return Ok(());
    };
    check_len(start, first)?;
    buf.resize((last - start) as usize + last_len as usize, 0);
    units.info.read_into(start.into(), buf)?;
    for (at, len) in window {
        let from = (at - start) as usize;
        let bytes = buf.get(from..from + *len as usize).unwrap_or_default();
        if let Err(error) = scan_unit(units, *at, bytes, found) {
            tracing::warn!("{}", malformed((*at).into(), error.to_string()));
        }
    }
    Ok(())
}

impl Found {
    fn merge(&mut self, other: Self) {
        for (name, definition) in other.names {
            self.define(name, definition);
        }
        for (name, (entry, value)) in other.enumerators {
            self.enumerate(name, entry, value);
        }
        self.ranges.extend(other.ranges);
        self.signatures.extend(other.signatures);
    }

    fn define(&mut self, name: (Class, Name), definition: Definition) {
        let known = self.names.entry(name).or_insert(definition);
        *known = definition.min(*known);
    }

    fn enumerate(&mut self, name: Name, entry: u32, value: i64) {
        let known = self.enumerators.entry(name).or_insert((entry, value));
        *known = (entry, value).min(*known);
    }
}

/// The attributes of an entry that matter here.
#[derive(Default)]
struct Facts {
    name: Option<Name>,
    sibling: Option<UnitOffset>,
    specification: Option<UnitOffset>,
    value: Option<i64>,
    declaration: bool,
    external: bool,
}

fn scan_unit(units: &Units, start: u32, bytes: &[u8], found: &mut Found) -> gimli::Result<()> {
    let dwarf = units.dwarf_with_ranges(bytes);
    let Some(header) = dwarf.units().next()? else { return Ok(()) };
    let abbreviations = dwarf.abbreviations(&header)?;
    if let gimli::UnitType::Type { type_signature, type_offset } = header.type_() {
        found.signatures.push((type_signature.0, start.wrapping_add(type_offset.0 as u32)));
    }
    let (unit, root) = unit(&dwarf, header, abbreviations)?;
    found.ranges.extend(ranges(&dwarf, &unit, &root)?.into_iter().map(|(low, high)| (low, high, start)));
    if !root.has_children() {
        return Ok(());
    }
    let scanner = Scanner { dwarf: &dwarf, unit: &unit, start };
    let mut entries = unit.header.entries_raw(&unit.abbreviations, None)?;
    let Some(root) = entries.read_abbreviation()? else { return Ok(()) };
    entries.skip_attributes(root.attributes())?;
    loop {
        let offset = entries.next_offset();
        if entries.is_empty() {
            return Ok(());
        }
        let Some(abbreviation) = entries.read_abbreviation()? else { return Ok(()) };
        let facts = scanner.facts(&mut entries, abbreviation)?;
        let sibling = facts.sibling;
        if abbreviation.has_children() && abbreviation.tag() == gimli::DW_TAG_enumeration_type {
            scanner.define(abbreviation.tag(), offset, facts, found)?;
            scanner.enumerators(&mut entries, offset, found)?;
            continue;
        }
        scanner.define(abbreviation.tag(), offset, facts, found)?;
        if !abbreviation.has_children() {
            continue;
        }
        match sibling.filter(|at| *at > entries.next_offset()) {
            Some(at) => entries = unit.header.entries_raw(&unit.abbreviations, Some(at))?,
            None => {
                let depth = entries.next_depth() - 1;
                while entries.next_depth() > depth {
                    if let Some(inner) = entries.read_abbreviation()? {
                        entries.skip_attributes(inner.attributes())?;
                    }
                }
            }
        }
    }
}

struct Scanner<'a, 'b> {
    dwarf: &'b gimli::Dwarf<Slice<'a>>,
    unit: &'b Unit<'a>,
    start: u32,
}

impl<'a> Scanner<'a, '_> {
    fn facts(
        &self,
        entries: &mut gimli::EntriesRaw<'_, Slice<'a>>,
        abbreviation: &gimli::Abbreviation,
    ) -> gimli::Result<Facts> {
        let mut facts = Facts::default();
        let named = class(abbreviation.tag()).is_some() || abbreviation.tag() == gimli::DW_TAG_enumerator;
        let mut rest = abbreviation.attributes();
        while !rest.is_empty() {
            let wanted = |name| match name {
                gimli::DW_AT_sibling => true,
                gimli::DW_AT_name
                | gimli::DW_AT_declaration
                | gimli::DW_AT_external
                | gimli::DW_AT_specification
                | gimli::DW_AT_const_value => named,
                _ => false,
            };
            let skipped = rest.iter().take_while(|spec| !wanted(spec.name())).count();
            let (unwanted, from) = rest.split_at(skipped);
            entries.skip_attributes(unwanted)?;
            let Some((spec, left)) = from.split_first() else { break };
            let attribute = entries.read_attribute_inline(*spec)?;
            match (spec.name(), attribute.value()) {
                (gimli::DW_AT_name, value) => facts.name = self.name(value),
                (gimli::DW_AT_sibling, AttributeValue::UnitRef(at)) => facts.sibling = Some(at),
                (gimli::DW_AT_specification, AttributeValue::UnitRef(at)) => facts.specification = Some(at),
                (gimli::DW_AT_declaration, AttributeValue::Flag(set)) => facts.declaration = set,
                (gimli::DW_AT_external, AttributeValue::Flag(set)) => facts.external = set,
                (gimli::DW_AT_const_value, value) => facts.value = constant(&value),
                _ => {}
            }
            rest = left;
        }
        Ok(facts)
    }

    fn name(&self, value: AttributeValue<Slice<'a>>) -> Option<Name> {
        match value {
            AttributeValue::DebugStrRef(at) => u32::try_from(at.0).ok().map(Name::At),
            value => {
                let text = self.dwarf.attr_string(self.unit, value).ok()?;
                Some(Name::Inline(text.slice().into()))
            }
        }
    }

    fn define(
        &self,
        tag: gimli::DwTag,
        offset: UnitOffset,
        mut facts: Facts,
        found: &mut Found,
    ) -> gimli::Result<()> {
        let Some(class) = class(tag) else { return Ok(()) };
        let declaration = facts.declaration;
        if declaration && class != Class::Variable {
            return Ok(());
        }
        // The definition of what was declared before has its name and linkage there.
        if let Some(at) = facts.specification.filter(|_| facts.name.is_none()) {
            let mut entries = self.unit.header.entries_raw(&self.unit.abbreviations, Some(at))?;
            if let Some(abbreviation) = entries.read_abbreviation()? {
                facts = self.facts(&mut entries, abbreviation)?;
            }
        }
        if let Some(name) = facts.name {
            let rank = match class {
                Class::Variable if declaration => 2,
                Class::Variable if !facts.external => 1,
                _ => 0,
            };
            let offset = self.start.wrapping_add(offset.0 as u32);
            found.define((class, name), Definition { rank, offset });
        }
        Ok(())
    }

    /// Reads the children of the enumeration at `offset`, behind whose attributes `entries` stands.
    fn enumerators(
        &self,
        entries: &mut gimli::EntriesRaw<'_, Slice<'a>>,
        offset: UnitOffset,
        found: &mut Found,
    ) -> gimli::Result<()> {
        let depth = entries.next_depth() - 1;
        let entry = self.start.wrapping_add(offset.0 as u32);
        while entries.next_depth() > depth {
            let Some(abbreviation) = entries.read_abbreviation()? else { continue };
            let facts = self.facts(entries, abbreviation)?;
            if let (Some(name), Some(value)) = (facts.name, facts.value)
                && abbreviation.tag() == gimli::DW_TAG_enumerator
            {
                found.enumerate(name, entry, value);
            }
        }
        Ok(())
    }
}

/// The class that a definition with this tag is looked up in.
pub(super) fn class(tag: gimli::DwTag) -> Option<Class> {
    Some(match tag {
        gimli::DW_TAG_structure_type | gimli::DW_TAG_class_type => Class::Struct,
        gimli::DW_TAG_union_type => Class::Union,
        gimli::DW_TAG_enumeration_type => Class::Enum,
        gimli::DW_TAG_typedef => Class::Typedef,
        gimli::DW_TAG_base_type => Class::Base,
        gimli::DW_TAG_variable => Class::Variable,
        _ => return None,
    })
}

/// A constant: compilers use the signed form for negative values, and any other for the rest.
pub(super) fn constant(value: &AttributeValue<Slice<'_>>) -> Option<i64> {
    match value {
        AttributeValue::Sdata(value) => Some(*value),
        value => value.udata_value().map(|value| value as i64),
    }
}
