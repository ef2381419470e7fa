//! Values as C writes them, and as JSON: one tree of what was read, two renderings.
//!
//! What cannot be read is said where it would stand. Everything is bounded: a hostile type or count costs a piece of
//! the answer. Source: gdb's `print` with `set print pretty on`, as crash shows structures.

use super::printable;
use crate::addr::VirtAddr;
use crate::debuginfo::types::{IntKind, Shape, Type, TypeId, TypeTable};
use crate::kernel::{Kernel, Object};
use serde_json::{Value as Json, json};
use std::fmt::Write;

/// Elements of an array that are read; repeats count, too.
const ELEMENTS_MAX: u64 = 4096;
/// Members and elements in one answer.
const NODES_MAX: usize = 1 << 18;
/// As deep as structures nest; more is a cycle.
const DEPTH_MAX: u32 = 32;
/// Equal neighbours are folded from so many on, as in gdb.
const REPEATS: u64 = 10;
/// Text of a `char *` that is shown.
const TEXT_MAX: usize = 200;

/// How numbers are written.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct Style {
    /// Whole numbers in hexadecimal.
    pub hex: bool,
}

/// A value that was read.
#[derive(Clone, PartialEq)]
pub enum Node {
    /// A number, pointer or text: for people, for scripts.
    Leaf(String, Json),
    /// Members; without a name those of anonymous structures and unions.
    Members(Vec<(String, Node)>),
    /// Elements, each with how often it comes in a row, and how many were left out.
    Elements(Vec<(Node, u64)>, u64),
}

/// Reads `object`.
pub fn read(object: &Object<'_>, style: Style) -> Node {
    let Ok(types) = object.kernel().type_table() else { return unreadable("no types are known") };
    Reader { kernel: object.kernel(), types, style, left: NODES_MAX }.node(object, DEPTH_MAX)
}

/// A number of a type: what an expression computed.
pub fn number(kernel: &Kernel, ty: TypeId, bits: u64, style: Style) -> Node {
    let Ok(types) = kernel.type_table() else { return unreadable("no types are known") };
    let reader = Reader { kernel, types, style, left: 1 };
    match types.strip(ty) {
        Some((_, stripped)) => reader.scalar(&stripped, bits),
        None => unreadable("its type is not known"),
    }
}

/// A plain integer.
pub fn integer(bits: u64, size: u64, signed: bool, style: Style) -> Node {
    let text = if style.hex {
        let unused = 64 - 8 * size.clamp(1, 8) as u32;
        format!("{:#x}", bits << unused >> unused)
    } else if signed {
        (bits as i64).to_string()
    } else {
        bits.to_string()
    };
    Node::Leaf(text, if signed { json!(bits as i64) } else { json!(bits) })
}

fn unreadable(why: impl std::fmt::Display) -> Node {
    let why = printable(&why.to_string());
    Node::Leaf(format!("<{why}>"), json!({ "error": why }))
}

struct Reader<'k> {
    kernel: &'k Kernel,
    types: &'k TypeTable,
    style: Style,
    left: usize,
}

impl<'k> Reader<'k> {
    fn node(&mut self, object: &Object<'k>, depth: u32) -> Node {
        self.left = self.left.saturating_sub(1);
        let (Some(depth), 1..) = (depth.checked_sub(1), self.left) else {
            return unreadable("the rest is left out");
        };
        let Some((_, ty)) = self.types.strip(object.ty) else { return unreadable("its type is not known") };
        match &ty.shape {
            Shape::Composite { members, .. } => {
                if let Some(why) = self.not_there(object) {
                    return unreadable(why);
                }
                let mut nodes = Vec::new();
                for def in members {
                    if def.name.is_empty() && def.bits.is_some() {
                        continue;
                    }
                    // Anonymous members have no path of their own.
                    let at = object.at.wrapping_add(def.bit_offset / 8);
                    let member = match def.name.is_empty() {
                        true => self.kernel.object_of(def.ty, at),
                        false => object.member(&def.name),
                    };
                    nodes.push((
                        def.name.clone(),
                        match member {
                            Ok(member) => self.node(&member, depth),
                            Err(error) => unreadable(error),
                        },
                    ));
                }
                Node::Members(nodes)
            }
            Shape::Array { element, count } => self.array(object, *element, *count, depth),
            // freelist_full_t and its kin: two words that are exchanged at once.
            Shape::Int { size: 16, signed, .. } => self.wide(object, *signed),
            Shape::Int { signed, .. } | Shape::Enum { signed, .. } => {
                let bits = if *signed { object.i64().map(|n| n as u64) } else { object.u64() };
                bits.map_or_else(unreadable, |bits| self.scalar(&ty, bits))
            }
            Shape::Pointer(_) => object.u64().map_or_else(unreadable, |bits| self.scalar(&ty, bits)),
            Shape::Float(_) => match object.bytes() {
                Ok(bytes) => {
                    let hex =
                        bytes.iter().rev().fold("0x".to_owned(), |text, byte| format!("{text}{byte:02x}"));
                    Node::Leaf(hex.clone(), json!(hex))
                }
                Err(error) => unreadable(error),
            },
            Shape::Function { .. } => self.address(object.at),
            Shape::Declared(_) | Shape::Void | Shape::Typedef(_) | Shape::Qualified(..) => {
                unreadable("incomplete type")
            }
        }
    }

    /// A number of 16 bytes; for scripts in hexadecimal.
    fn wide(&self, object: &Object<'k>, signed: bool) -> Node {
        let bytes = match object.bytes() {
            Ok(bytes) => bytes,
            Err(error) => return unreadable(error),
        };
        let Ok(bytes) = <[u8; 16]>::try_from(bytes) else { return unreadable("its size is not known") };
        let number = u128::from_le_bytes(bytes);
        let hex = format!("{number:#x}");
        let text = match (self.style.hex, signed) {
            (true, _) => hex.clone(),
            (false, true) => (number as i128).to_string(),
            (false, false) => number.to_string(),
        };
        Node::Leaf(text, json!(hex))
    }

    /// Why nothing of a structure can be read; `None` if some of it can, and its members say what not.
    fn not_there(&self, object: &Object<'k>) -> Option<String> {
        let size = object.size().ok()?;
        let outcome = self.kernel.read(object.at, &mut [0]);
        let in_one_page = size <= object.at.left_in_page();
        match outcome.stopped {
            Some(why) if in_one_page => Some(format!("cannot be read: {why}")),
            _ => None,
        }
    }

    fn array(&mut self, object: &Object<'k>, element: TypeId, count: u64, depth: u32) -> Node {
        let stripped = self.types.strip(element).map(|(_, ty)| ty);
        let shape = stripped.as_deref().map(|ty| &ty.shape);
        if let Some(Shape::Int { size: 1, .. }) = shape
            && stripped.as_deref().is_some_and(|ty| ty.name == "char")
            && count > 0
            && let Some(text) = self.text(object)
        {
            return text;
        }
        if let (Some(why), 1..) = (self.not_there(object), count) {
            return unreadable(why);
        }
        let mut elements: Vec<(Node, u64)> = Vec::new();
        let shown = count.min(ELEMENTS_MAX);
        for i in 0..shown {
            let node = match object.index(i) {
                Ok(element) => self.node(&element, depth),
                Err(error) => unreadable(error),
            };
            match elements.last_mut() {
                Some((last, times)) if *last == node => *times += 1,
                _ => elements.push((node, 1)),
            }
            if self.left == 0 {
                return Node::Elements(elements, count - i - 1);
            }
        }
        Node::Elements(elements, count - shown)
    }

    /// A `char` array, if text and zeros are all that is in it.
    fn text(&self, object: &Object<'_>) -> Option<Node> {
        let bytes = object.bytes().ok()?;
        let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
        let (text, rest) = bytes.split_at_checked(end)?;
        let text = std::str::from_utf8(text).ok()?;
        rest.iter().all(|&byte| byte == 0).then(|| Node::Leaf(quoted(text), json!(text)))
    }

    /// A number of a stripped type; `bits` are extended as its sign says.
    fn scalar(&self, ty: &Type, bits: u64) -> Node {
        match &ty.shape {
            Shape::Int { kind: IntKind::Bool, .. } if bits <= 1 => {
                Node::Leaf((bits == 1).to_string(), json!(bits == 1))
            }
            Shape::Int { size, signed, .. } => {
                let node = integer(bits, (*size).into(), *signed, self.style);
                match (node, u8::try_from(bits)) {
                    (Node::Leaf(text, json), Ok(byte @ b' '..=b'~')) if ty.name == "char" => {
                        Node::Leaf(format!("{text} '{}'", char::from(byte).escape_default()), json)
                    }
                    (node, _) => node,
                }
            }
            Shape::Enum { size, signed, values } => match enumerators(values, bits as i64) {
                Some(names) => Node::Leaf(printable(&names), json!(names)),
                None => integer(bits, (*size).into(), *signed, self.style),
            },
            Shape::Pointer(to) => self.pointer(*to, VirtAddr(bits)),
            _ => unreadable("not a number"),
        }
    }

    fn pointer(&self, to: TypeId, at: VirtAddr) -> Node {
        let target = self.types.strip(to).map(|(_, ty)| ty);
        let is_char =
            target.is_some_and(|ty| ty.name == "char" && matches!(ty.shape, Shape::Int { size: 1, .. }));
        if !is_char {
            return self.address(at);
        }
        // What is no text is a pointer to bytes.
        let is_text = |text: &String| {
            text.chars()
                .all(|c| c != char::REPLACEMENT_CHARACTER && (!c.is_control() || "\n\t\r".contains(c)))
        };
        let text = if at.0 == 0 { None } else { self.kernel.text_at(at, TEXT_MAX as u64 + 1).ok() };
        let text = text.filter(is_text);
        let json = json!({ "address": at.to_string(), "text": text });
        let Some(text) = text else { return Node::Leaf(at.to_string(), json) };
        let cut: String = text.chars().take(TEXT_MAX).collect();
        let dots = if cut.len() < text.len() { "..." } else { "" };
        Node::Leaf(format!("{at} {}{dots}", quoted(&cut)), json)
    }

    fn address(&self, at: VirtAddr) -> Node {
        let name = self.kernel.describe_address(at).map_or(String::new(), |name| format!(" <{name}>"));
        Node::Leaf(format!("{at}{name}"), json!(at.to_string()))
    }
}

/// The name of a value, or of its bits, if no two of the enumeration's values share one.
fn enumerators(values: &[(String, i64)], value: i64) -> Option<String> {
    if let Some((name, _)) = values.iter().find(|(_, v)| *v == value) {
        return Some(name.clone());
    }
    let mut seen = 0;
    for (_, v) in values {
        if *v < 0 || seen & v != 0 {
            return None;
        }
        seen |= v;
    }
    let names: Vec<&str> =
        values.iter().filter(|(_, v)| *v != 0 && value & v == *v).map(|(name, _)| name.as_str()).collect();
    let rest = value & !seen;
    match (names.is_empty(), rest) {
        (true, _) => None,
        (false, 0) => Some(names.join("|")),
        (false, rest) => Some(format!("{}|{rest:#x}", names.join("|"))),
    }
}

/// Text between quotes, as C writes it.
fn quoted(text: &str) -> String {
    let escaped = text.chars().fold(String::new(), |mut out, c| {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            '\n' => out.push_str("\\n"),
            '\t' => out.push_str("\\t"),
            '\r' => out.push_str("\\r"),
            c => out.push(c),
        }
        out
    });
    format!("\"{}\"", printable(&escaped))
}

impl Node {
    /// As C would initialise it, without a newline at the end; further lines begin with `indent` blanks.
    pub fn text(&self, indent: usize) -> String {
        match self {
            Self::Leaf(text, _) => text.clone(),
            Self::Members(members) if members.is_empty() => "{}".to_owned(),
            Self::Members(members) => {
                let mut text = "{\n".to_owned();
                for (i, (name, node)) in members.iter().enumerate() {
                    let comma = if i + 1 < members.len() { "," } else { "" };
                    let equals = if name.is_empty() { "" } else { " = " };
                    let value = node.text(indent + 2);
                    let _ = writeln!(text, "{:indent$}  {}{equals}{value}{comma}", "", printable(name));
                }
                let _ = write!(text, "{:indent$}}}", "");
                text
            }
            Self::Elements(elements, left_out) => {
                let mut pieces = Vec::new();
                for (node, times) in elements {
                    let text = node.text(indent);
                    match *times {
                        REPEATS.. => pieces.push(format!("{text} <repeats {times} times>")),
                        times => pieces.extend(std::iter::repeat_n(text, times as usize)),
                    }
                }
                if *left_out > 0 {
                    pieces.push(format!("... <{left_out} more>"));
                }
                format!("{{{}}}", pieces.join(", "))
            }
        }
    }

    /// For scripts: structures are objects, with the members of anonymous ones among their own; pointers are text,
    /// those to text objects of `address` and `text`; what cannot be read is an object of `error`.
    pub fn json(&self) -> Json {
        match self {
            Self::Leaf(_, json) => json.clone(),
            Self::Members(members) => {
                let mut object = serde_json::Map::new();
                for (name, node) in members {
                    match (name.is_empty(), node.json()) {
                        (true, Json::Object(inner)) => object.extend(inner),
                        (_, value) => {
                            object.insert(name.clone(), value);
                        }
                    }
                }
                Json::Object(object)
            }
            Self::Elements(elements, left_out) => {
                let each = elements.iter().flat_map(|(node, times)| {
                    std::iter::repeat_n(node.json(), usize::try_from(*times).unwrap_or(0))
                });
                let more = (*left_out > 0).then(|| json!({ "more": left_out }));
                each.chain(more).collect()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(n: u64) -> Node {
        integer(n, 4, false, Style::default())
    }

    #[test]
    fn flags_are_told_from_counts() {
        let values = |list: &[(&str, i64)]| list.iter().map(|(n, v)| (n.to_string(), *v)).collect::<Vec<_>>();
        let flags = values(&[("NONE", 0), ("A", 1), ("B", 2), ("C", 12)]);
        let name = |v| enumerators(&flags, v);
        assert_eq!(name(0).as_deref(), Some("NONE"));
        assert_eq!(name(3).as_deref(), Some("A|B"));
        assert_eq!(name(0x1d).as_deref(), Some("A|C|0x10"));
        assert_eq!(name(0x10), None);
        let count = values(&[("X", 1), ("Y", 2), ("Z", 3)]);
        assert_eq!(enumerators(&count, 7), None);
        assert_eq!(enumerators(&count, 3).as_deref(), Some("Z"));
    }

    #[test]
    fn text_and_json_of_trees() {
        let inner = Node::Members(vec![
            ("c".into(), leaf(3)),
            (String::new(), Node::Members(vec![("d".into(), leaf(4))])),
        ]);
        let tree = Node::Members(vec![
            ("a".into(), Node::Elements(vec![(leaf(0), 12), (leaf(1), 2)], 5)),
            ("b".into(), inner),
        ]);
        let text = "{\n  a = {0 <repeats 12 times>, 1, 1, ... <5 more>},\n  b = {\n    c = 3,\n    {\n      d = 4\n    }\n  }\n}";
        assert_eq!(tree.text(0), text);
        let zeros = vec![0; 12];
        let mut a: Vec<Json> = zeros.into_iter().map(|n| json!(n)).collect();
        a.extend([json!(1), json!(1), json!({ "more": 5 })]);
        assert_eq!(tree.json(), json!({ "a": a, "b": { "c": 3, "d": 4 } }));
        assert_eq!(integer(u64::MAX, 4, true, Style { hex: true }).text(0), "0xffffffff");
        assert_eq!(integer(u64::MAX, 4, true, Style::default()).text(0), "-1");
        assert_eq!(quoted("a\"b\\\n\u{1b}"), "\"a\\\"b\\\\\\n\\u{1b}\"");
    }
}
