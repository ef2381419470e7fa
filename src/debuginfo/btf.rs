//! BTF, the kernel's compact type format: structure layouts by name.
//!
//! Our own reader because the known crate (btf-rs) is LGPL, which a statically linked binary under MIT or
//! Apache cannot carry. Source: `Documentation/bpf/btf.rst`, `include/uapi/linux/btf.h`.

use super::Error;
use super::types::{Class, IntKind, MemberDef, Shape, Type as Definition, TypeId, TypeSource};
use crate::bytes::{cstr_at, u16_at, u32_at};
use crate::parallel;
use hashbrown::{DefaultHashBuilder, HashTable};
use std::hash::BuildHasher;
use std::sync::{Arc, OnceLock};

/// So many types are worth a thread.
const BATCH: usize = 1 << 13;
const MAGIC: u16 = 0xeb9f;
const KIND_INT: u32 = 1;
const KIND_PTR: u32 = 2;
const KIND_ARRAY: u32 = 3;
const KIND_STRUCT: u32 = 4;
const KIND_UNION: u32 = 5;
const KIND_ENUM: u32 = 6;
const KIND_TYPEDEF: u32 = 8;
const KIND_VOLATILE: u32 = 9;
const KIND_CONST: u32 = 10;
const KIND_RESTRICT: u32 = 11;
const KIND_FWD: u32 = 7;
const KIND_FUNC: u32 = 12;
const KIND_FUNC_PROTO: u32 = 13;
const KIND_VAR: u32 = 14;
const KIND_DATASEC: u32 = 15;
const KIND_FLOAT: u32 = 16;
const KIND_DECL_TAG: u32 = 17;
const KIND_TYPE_TAG: u32 = 18;
const KIND_ENUM64: u32 = 19;

/// BTF of the kernel image, or of a module on top of it.
pub struct Btf {
    data: Vec<u8>,
    /// Offset of the string table in `data`, and its length.
    strings: (usize, usize),
    /// Offset in `data` of each type of its own.
    types: Vec<u32>,
    /// The image's BTF that a module's continues: type ids and string offsets go on where the base's end.
    base: Option<Arc<Btf>>,
    /// `TypeId::source` of the types of its own.
    source: u16,
    /// Whether enumerations say if their values have a sign. Since v6.0 they do; before, all values are signed.
    signs: bool,
    hasher: DefaultHashBuilder,
    /// Indexes into `types` of what [`Class`] covers, by hash of class and name.
    by_name: OnceLock<HashTable<u32>>,
}

/// `struct btf_type`: name, packed info, and size or type.
#[derive(Clone, Copy)]
struct Type {
    /// Offset in `data` of what follows the three words.
    tail: usize,
    name: u32,
    info: u32,
    size_or_type: u32,
}

impl Type {
    fn kind(&self) -> u32 {
        (self.info >> 24) & 0x1f
    }
    fn vlen(&self) -> usize {
        (self.info & 0xffff) as usize
    }
    /// `kind_flag`: member offsets carry a bit-field size in their top byte.
    fn kind_flag(&self) -> bool {
        self.info >> 31 != 0
    }
}

fn malformed(offset: usize, what: impl Into<String>) -> Error {
    Error::Types { format: "BTF", offset: offset as u64, what: what.into() }
}

impl Btf {
    /// Indexes the bytes of the image's `.BTF` section.
    pub fn parse(data: Vec<u8>) -> Result<Self, Error> {
        Self::read(data, None, 0)
    }

    /// Indexes a module's `.BTF` section (split BTF), whose types get `source` in their ids.
    pub fn parse_module(data: Vec<u8>, base: &Arc<Btf>, source: u16) -> Result<Self, Error> {
        Self::read(data, Some(Arc::clone(base)), source)
    }

    fn read(data: Vec<u8>, base: Option<Arc<Btf>>, source: u16) -> Result<Self, Error> {
        if u16_at(&data, 0) != Some(MAGIC) {
            return Err(malformed(0, "no magic number 0xeb9f"));
        }
        let field =
            |at| u32_at(&data, at).map(|v| v as usize).ok_or_else(|| malformed(at, "header cut short"));
        let header = field(4)?;
        let types = (field(8)?.saturating_add(header), field(12)?);
        let strings = (field(16)?.saturating_add(header), field(20)?);
        for (start, len) in [types, strings] {
            if data.get(start..).is_none_or(|rest| rest.len() < len) {
                return Err(malformed(start, "section runs past the end"));
            }
        }
        let mut btf = Self {
            data,
            strings,
            types: Vec::new(),
            signs: base.as_ref().is_some_and(|base| base.signs),
            base,
            source,
            hasher: DefaultHashBuilder::default(),
            by_name: OnceLock::new(),
        };
        let (mut at, end) = (types.0, types.0 + types.1);
        while at < end {
            let ty = btf.type_at(at).ok_or_else(|| malformed(at, "type cut short"))?;
            let tail = tail_len(&ty).ok_or_else(|| malformed(at, format!("unknown kind {}", ty.kind())))?;
            btf.signs |= ty.kind() == KIND_ENUM && ty.kind_flag();
            btf.types.push(u32::try_from(at).map_err(|_| malformed(at, "section larger than 4 GiB"))?);
            at = ty.tail + tail;
        }
        Ok(btf)
    }

    /// Type ids below this are the base's.
    fn first_id(&self) -> u32 {
        self.base.as_ref().map_or(1, |base| base.types.len() as u32 + 1)
    }

    /// A reference met in this BTF.
    fn id(&self, raw: u32) -> TypeId {
        TypeId { source: if raw < self.first_id() { 0 } else { self.source }, id: raw }
    }

    fn type_at(&self, at: usize) -> Option<Type> {
        Some(Type {
            name: u32_at(&self.data, at)?,
            info: u32_at(&self.data, at.checked_add(4)?)?,
            size_or_type: u32_at(&self.data, at.checked_add(8)?)?,
            tail: at.checked_add(12)?,
        })
    }

    fn by_id(&self, id: u32) -> Option<Type> {
        let index = usize::try_from(id.checked_sub(self.first_id())?).ok()?;
        self.type_at(*self.types.get(index)? as usize)
    }

    fn name(&self, offset: u32) -> &[u8] {
        let mut offset = offset as usize;
        if let Some(base) = &self.base {
            match offset.checked_sub(base.strings.1) {
                Some(own) => offset = own,
                None => return base.name(offset as u32),
            }
        }
        let (start, len) = self.strings;
        let table = self.data.get(start..start + len).unwrap_or_default();
        cstr_at(table, offset, len).unwrap_or_default()
    }

    fn text(&self, offset: u32) -> String {
        String::from_utf8_lossy(self.name(offset)).into_owned()
    }

    /// The type numbered `index` of this BTF's own, with the class its name is looked up in.
    fn classed(&self, index: u32) -> Option<(Class, Type)> {
        let ty = self.type_at(*self.types.get(index as usize)? as usize)?;
        let class = match ty.kind() {
            KIND_STRUCT => Class::Struct,
            KIND_UNION => Class::Union,
            KIND_ENUM | KIND_ENUM64 => Class::Enum,
            KIND_TYPEDEF => Class::Typedef,
            KIND_INT | KIND_FLOAT => Class::Base,
            KIND_VAR => Class::Variable,
            _ => return None,
        };
        Some((class, ty))
    }

    /// The members, parameters or values that follow a type: `N` words each.
    fn tail<const N: usize>(&self, ty: &Type) -> impl Iterator<Item = [u32; N]> {
        (0..ty.vlen()).map_while(move |i| {
            let at = ty.tail + i * N * 4;
            let mut words = [0; N];
            for (j, word) in words.iter_mut().enumerate() {
                *word = u32_at(&self.data, at + j * 4)?;
            }
            Some(words)
        })
    }

    fn members(&self, ty: &Type) -> Vec<MemberDef> {
        let member = |[name, id, offset]: [u32; 3]| {
            let (bit_offset, bits) = match ty.kind_flag() {
                true => (offset & 0x00ff_ffff, Some(offset >> 24).filter(|&width| width != 0)),
                false => (offset, None),
            };
            MemberDef { name: self.text(name), bit_offset: bit_offset.into(), bits, ty: self.id(id) }
        };
        self.tail(ty).map(member).collect()
    }

    fn enumerators(&self, ty: &Type) -> Vec<(u32, i64)> {
        let signed = ty.kind_flag() || !self.signs;
        if ty.kind() == KIND_ENUM64 {
            let value = |[name, low, high]: [u32; 3]| (name, (u64::from(high) << 32 | u64::from(low)) as i64);
            return self.tail(ty).map(value).collect();
        }
        let value = |[name, value]: [u32; 2]| match signed || value < 0x8000_0000 {
            true => (name, i64::from(value as i32)),
            false => (name, value.into()),
        };
        self.tail(ty).map(value).collect()
    }

    fn shape(&self, ty: &Type) -> Option<Shape> {
        let to = self.id(ty.size_or_type);
        Some(match ty.kind() {
            KIND_INT => {
                let info = u32_at(&self.data, ty.tail)?;
                let kind = match (info >> 24 & 0xf, self.name(ty.name)) {
                    (4, _) | (_, b"_Bool" | b"bool") => IntKind::Bool,
                    (2, _) | (_, b"char" | b"unsigned char" | b"signed char") => IntKind::Char,
                    _ => IntKind::Number,
                };
                // pahole takes only DW_ATE_signed for signed, and `s8` is DW_ATE_signed_char.
                let signed = info >> 24 & 1 != 0 || self.name(ty.name) == b"signed char";
                Shape::Int { size: ty.size_or_type, signed, kind }
            }
            KIND_FLOAT => Shape::Float(ty.size_or_type),
            KIND_PTR => Shape::Pointer(to),
            KIND_ARRAY => Shape::Array {
                element: self.id(u32_at(&self.data, ty.tail)?),
                count: u32_at(&self.data, ty.tail + 8)?.into(),
            },
            KIND_STRUCT | KIND_UNION => Shape::Composite {
                union: ty.kind() == KIND_UNION,
                size: ty.size_or_type.into(),
                members: self.members(ty),
            },
            KIND_ENUM | KIND_ENUM64 if ty.vlen() == 0 && ty.size_or_type == 0 => Shape::Declared("enum"),
            KIND_ENUM | KIND_ENUM64 => Shape::Enum {
                size: ty.size_or_type,
                signed: ty.kind_flag(),
                values: self.enumerators(ty).into_iter().map(|(name, v)| (self.text(name), v)).collect(),
            },
            KIND_FWD => Shape::Declared(if ty.kind_flag() { "union" } else { "struct" }),
            KIND_TYPEDEF => Shape::Typedef(to),
            KIND_VOLATILE => Shape::Qualified("volatile", to),
            KIND_CONST => Shape::Qualified("const", to),
            KIND_RESTRICT => Shape::Qualified("restrict", to),
            // A variable is found by name and asked for its type; a tag or a function adds nothing to its own.
            KIND_TYPE_TAG | KIND_VAR | KIND_FUNC | KIND_DECL_TAG => Shape::Qualified("", to),
            KIND_FUNC_PROTO => {
                let mut parameters: Vec<_> =
                    self.tail(ty).map(|[name, id]: [u32; 2]| (self.text(name), self.id(id))).collect();
                let variadic = parameters.last().is_some_and(|(_, id)| *id == TypeId::VOID);
                if variadic {
                    parameters.pop();
                }
                Shape::Function { returns: to, parameters, variadic }
            }
            KIND_DATASEC => Shape::Void,
            _ => return None,
        })
    }
}

/// Bytes that follow the three words of a type, or `None` for a kind that is not known.
fn tail_len(ty: &Type) -> Option<usize> {
    Some(match ty.kind() {
        KIND_INT | KIND_VAR | KIND_DECL_TAG => 4,
        KIND_ARRAY => 12,
        KIND_STRUCT | KIND_UNION | KIND_DATASEC | KIND_ENUM64 => ty.vlen() * 12,
        KIND_ENUM | KIND_FUNC_PROTO => ty.vlen() * 8,
        1..=KIND_TYPE_TAG => 0,
        _ => return None,
    })
}

impl TypeSource for Btf {
    fn find(&self, class: Class, name: &str) -> Result<Option<TypeId>, Error> {
        let by_name = self.by_name.get_or_init(|| {
            let hash = |&index: &u32| {
                let (class, ty) = self.classed(index)?;
                Some(self.name(ty.name))
                    .filter(|name| !name.is_empty())
                    .map(|name| self.hasher.hash_one((class, name)))
            };
            let indexes: Vec<u32> = (0..self.types.len() as u32).collect();
            let hashes = parallel::map(&indexes, BATCH, hash);
            let again = |&index: &u32| hashes.get(index as usize).copied().flatten().unwrap_or_default();
            let mut table = HashTable::with_capacity(hashes.iter().flatten().count());
            for (index, hash) in indexes.iter().zip(&hashes) {
                if let Some(hash) = *hash {
                    table.insert_unique(hash, *index, again);
                }
            }
            table
        });
        let named = |index: &&u32| {
            let found = self.classed(**index);
            found.is_some_and(|(c, ty)| c == class && self.name(ty.name) == name.as_bytes())
        };
        // Of several definitions the first: the one most of the kernel uses.
        let first = by_name.iter_hash(self.hasher.hash_one((class, name.as_bytes()))).filter(named).min();
        let id = |index: &u32| TypeId { source: self.source, id: self.first_id() + index };
        Ok(match class {
            Class::Variable => {
                let ty = first.and_then(|&index| self.classed(index));
                ty.map(|(_, ty)| self.id(ty.size_or_type))
            }
            _ => first.map(id),
        })
    }

    fn get(&self, id: TypeId) -> Result<Definition, Error> {
        let no_such = || malformed(0, format!("there is no type {}", id.id));
        let ty = self.by_id(id.id).ok_or_else(no_such)?;
        let shape = self.shape(&ty).ok_or_else(|| malformed(ty.tail, "type cut short"))?;
        Ok(Definition { name: self.text(ty.name), shape })
    }

    fn names(&self, class: Class) -> Vec<String> {
        let all = (0..self.types.len() as u32).filter_map(|index| self.classed(index));
        let of_class = all.filter(|(c, _)| *c == class).map(|(_, ty)| self.text(ty.name));
        let mut names: Vec<String> = of_class.filter(|name| !name.is_empty()).collect();
        names.sort_unstable();
        names.dedup();
        names
    }

    fn enumerator(&self, name: &str) -> Result<Option<i64>, Error> {
        let enums = (0..self.types.len() as u32).filter_map(|index| self.classed(index));
        let mut values =
            enums.filter(|(class, _)| *class == Class::Enum).flat_map(|(_, ty)| self.enumerators(&ty));
        Ok(values.find(|(at, _)| self.name(*at) == name.as_bytes()).map(|(_, value)| value))
    }

    fn format(&self) -> &'static str {
        "BTF"
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::debuginfo::types::TypeTable;

    /// `struct s { int a; union { int *p; struct { int x; int y; }; }; char name[16]; }` written by hand.
    fn sample() -> Vec<u8> {
        let strings = b"\0int\0s\0a\0p\0x\0y\0name\0char\0";
        let name = |n: &str| {
            let at = strings
                .windows(n.len() + 2)
                .position(|w| w[0] == 0 && &w[1..=n.len()] == n.as_bytes() && w[n.len() + 1] == 0);
            at.unwrap() as u32 + 1
        };
        let mut types: Vec<u32> = Vec::new();
        types.extend([name("int"), 1 << 24, 4, 32]); // 1
        types.extend([0, 2 << 24, 1]); // 2: int *
        types.extend([0, (4 << 24) | 2, 8, name("x"), 1, 0, name("y"), 1, 32]); // 3
        types.extend([0, (5 << 24) | 2, 8, name("p"), 2, 0, 0, 3, 0]); // 4
        types.extend([name("char"), 1 << 24, 1, 8]); // 5
        types.extend([0, 3 << 24, 0, 5, 1, 16]); // 6: char[16]
        types.extend([name("s"), (4 << 24) | 3, 32, name("a"), 1, 0, 0, 4, 64, name("name"), 6, 128]); // 7
        let types: Vec<u8> = types.into_iter().flat_map(u32::to_le_bytes).collect();
        let mut data = vec![0x9f, 0xeb, 1, 0];
        for word in [24, 0, types.len() as u32, types.len() as u32, strings.len() as u32] {
            data.extend(word.to_le_bytes());
        }
        data.extend(types);
        data.extend(strings);
        data
    }

    #[test]
    fn members_by_path_and_through_anonymous_ones() {
        let table = TypeTable::new(Arc::new(Btf::parse(sample()).unwrap()));
        let s = table.composite("s").unwrap();
        let member = |path| table.member(s, path).map(|m| (m.offset, m.size));
        assert_eq!(member("a"), Some((0, Some(4))));
        assert_eq!(member("p"), Some((8, Some(8))));
        assert_eq!(member("y"), Some((12, Some(4))));
        assert_eq!(member("name"), Some((16, Some(16))));
        assert_eq!(member("name[3]"), Some((19, Some(1))));
        assert_eq!(member("name.x"), None);
        assert_eq!(member("nope"), None);
        assert_eq!(table.composite("t"), None);
        let spelled = |path| table.declare(table.member(s, path).unwrap().ty, "v");
        assert_eq!(spelled("p"), "int *v");
        assert_eq!(spelled("name"), "char v[16]");
    }

    fn look_at_everything(btf: Btf) {
        let types = btf.types.len() as u32;
        let table = TypeTable::new(Arc::new(btf));
        for id in 0..=types + 1 {
            let id = TypeId { source: 0, id };
            table.declare(id, "v");
            table.size(id);
            table.member(id, "y");
        }
    }

    #[test]
    fn damaged_btf_is_an_error_or_an_absence_never_a_panic() {
        let good = sample();
        for cut in 0..good.len() {
            if let Ok(btf) = Btf::parse(good[..cut].to_vec()) {
                look_at_everything(btf);
            }
        }
        for at in 0..good.len() {
            for bit in 0..8 {
                let mut bad = good.clone();
                bad[at] ^= 1 << bit;
                if let Ok(btf) = Btf::parse(bad) {
                    look_at_everything(btf);
                }
            }
        }
    }
}
