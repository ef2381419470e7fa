//! Declarations of types, with offsets where they are wanted: what `struct`, `union`, `whatis` print.
//!
//! Source: gdb's `ptype`, crash's `struct -o`.

use super::printable;
use crate::debuginfo::types::{MemberDef, Shape, TypeId, TypeTable};
use serde_json::{Value, json};
use std::fmt::Write;

/// Members and enumerators in one declaration.
const LINES_MAX: usize = 1 << 14;
/// As deep as unnamed structures nest; more is a cycle.
const DEPTH_MAX: u32 = 16;

/// How to show where members lie.
#[derive(Clone, Copy, Default)]
pub struct Offsets {
    /// Whether to.
    pub shown: bool,
    /// In hexadecimal.
    pub hex: bool,
    /// Added to them: the address of a structure.
    pub base: Option<u64>,
}

struct Declaration<'t> {
    types: &'t TypeTable,
    offsets: Offsets,
    text: String,
    lines: usize,
}

/// The declaration of a structure, union, enumeration or typedef, with a `;` where C has one, and a newline.
pub fn declaration(types: &TypeTable, id: TypeId, offsets: Offsets) -> String {
    let mut one = Declaration { types, offsets, text: String::new(), lines: LINES_MAX };
    one.definition(id);
    one.text
}

/// Only the members of `id` that `names` chooses: each a path of names, and the declared member at its end.
pub fn chosen(types: &TypeTable, id: TypeId, names: &[&str], offsets: Offsets) -> Option<String> {
    let mut one = Declaration { types, offsets, text: String::new(), lines: LINES_MAX };
    let _ = writeln!(one.text, "{} {{", printable(&types.spell(id)));
    for name in names {
        let member = types.member(id, name)?;
        let bit = member.offset * 8 + u64::from(member.bits.map_or(0, |(lowest, _)| lowest));
        let def = MemberDef {
            name: (*name).to_owned(),
            bit_offset: bit,
            bits: member.bits.map(|(_, width)| width),
            ty: member.ty,
        };
        one.member(&def, 0, 1, 0);
    }
    one.text.push_str("}\n");
    Some(one.text)
}

impl Declaration<'_> {
    fn definition(&mut self, id: TypeId) {
        let Some(ty) = self.types.get(id) else { return };
        let spelled = printable(&self.types.spell(id));
        match &ty.shape {
            Shape::Composite { .. } => {
                let word = if ty.name.is_empty() { spelled.replace(" {...}", "") } else { spelled };
                let _ = writeln!(self.text, "{word} {{");
                self.members(id, 0, 1, DEPTH_MAX);
                self.text.push_str("}\n");
            }
            Shape::Enum { values, .. } => {
                let _ = writeln!(self.text, "{} {{", spelled.replace(" {...}", ""));
                for (name, value) in values.iter().take(LINES_MAX) {
                    let _ = writeln!(self.text, "    {} = {value},", printable(name));
                }
                self.text.push_str("}\n");
            }
            Shape::Typedef(inner) => {
                let unnamed = self.types.get(*inner).is_some_and(|inner| {
                    inner.name.is_empty()
                        && matches!(inner.shape, Shape::Composite { .. } | Shape::Enum { .. })
                });
                if unnamed {
                    self.text.push_str("typedef ");
                    self.definition(*inner);
                    self.text.truncate(self.text.trim_end().len());
                    let _ = writeln!(self.text, " {};", printable(&ty.name));
                } else {
                    let declared = self.types.declare(*inner, &ty.name);
                    let _ = writeln!(self.text, "typedef {};", printable(&declared));
                }
            }
            _ => {
                let _ = writeln!(self.text, "{spelled};");
            }
        }
    }

    fn members(&mut self, id: TypeId, from: u64, indent: usize, depth: u32) {
        let Some((_, ty)) = self.types.strip(id) else { return };
        let (Shape::Composite { members, .. }, Some(depth)) = (&ty.shape, depth.checked_sub(1)) else {
            return;
        };
        for def in members {
            self.member(def, from, indent, depth);
        }
    }

    /// `from`: offset in bits of the structure it is in.
    fn member(&mut self, def: &MemberDef, from: u64, indent: usize, depth: u32) {
        let Some(left) = self.lines.checked_sub(1) else { return };
        self.lines = left;
        let bit = from.wrapping_add(def.bit_offset);
        let unnamed = self
            .types
            .get(def.ty)
            .is_some_and(|ty| ty.name.is_empty() && matches!(ty.shape, Shape::Composite { .. }));
        if unnamed && depth > 0 {
            let word = self.types.spell(def.ty).replace(" {...}", "");
            let _ = writeln!(self.text, "{}{}{word} {{", self.margin(None), "    ".repeat(indent));
            self.members(def.ty, bit, indent + 1, depth);
            let name = if def.name.is_empty() { String::new() } else { format!(" {}", printable(&def.name)) };
            let _ = writeln!(self.text, "{}{}}}{name};", self.margin(None), "    ".repeat(indent));
            return;
        }
        let declared = printable(&self.types.declare(def.ty, &def.name));
        let width = def.bits.map_or(String::new(), |width| format!(" : {width}"));
        let margin = self.margin(Some((bit, def.bits.is_some())));
        let _ = writeln!(self.text, "{margin}{}{declared}{width};", "    ".repeat(indent));
    }

    /// What stands before a member: `[24]`, `[24:3]` for a bit-field, blanks for what has no place.
    fn margin(&self, at: Option<(u64, bool)>) -> String {
        if !self.offsets.shown {
            return String::new();
        }
        let Some((bit, is_field)) = at else {
            return " ".repeat(if self.offsets.base.is_some() { 20 } else { 10 });
        };
        let byte = bit / 8;
        let field = if is_field { format!(":{}", bit % 8) } else { String::new() };
        let place = match self.offsets.base {
            Some(base) => format!("[{:x}{field}]", base.wrapping_add(byte)),
            None if self.offsets.hex => format!("[{byte:#x}{field}]"),
            None => format!("[{byte}{field}]"),
        };
        if self.offsets.base.is_some() { format!("{place:<20}") } else { format!("{place:>10}") }
    }
}

/// The members for scripts: name, type, offset in bytes, size, and of bit-fields lowest bit and width.
pub fn members_json(types: &TypeTable, id: TypeId) -> Value {
    let mut rows = Vec::new();
    collect(types, id, 0, DEPTH_MAX, &mut rows);
    Value::Array(rows)
}

/// Members of anonymous structures and unions stand among those of what they are in.
fn collect(types: &TypeTable, id: TypeId, from: u64, depth: u32, rows: &mut Vec<Value>) {
    let Some((_, ty)) = types.strip(id) else { return };
    let (Shape::Composite { members, .. }, Some(depth)) = (&ty.shape, depth.checked_sub(1)) else { return };
    for def in members {
        let bit = from.wrapping_add(def.bit_offset);
        if def.name.is_empty() {
            if def.bits.is_none() {
                collect(types, def.ty, bit, depth, rows);
            }
        } else if rows.len() < LINES_MAX {
            rows.push(json!({
                "name": def.name,
                "type": types.spell(def.ty),
                "offset": bit / 8,
                "size": types.size(def.ty),
                "bits": def.bits.map(|width| json!({ "lowest": bit % 8, "width": width })),
            }));
        }
    }
}
