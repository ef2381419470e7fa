//! BTF, the kernel's compact type format: structure layouts by name.
//!
//! Our own reader because the known crate (btf-rs) is LGPL, which a statically linked binary under MIT or
//! Apache cannot carry. Source: `Documentation/bpf/btf.rst`, `include/uapi/linux/btf.h`.

use super::{Error, Member, TypeSource};
use crate::bytes::{u16_at, u32_at};

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
const KIND_FUNC_PROTO: u32 = 13;
const KIND_VAR: u32 = 14;
const KIND_DATASEC: u32 = 15;
const KIND_FLOAT: u32 = 16;
const KIND_DECL_TAG: u32 = 17;
const KIND_TYPE_TAG: u32 = 18;
const KIND_ENUM64: u32 = 19;

/// Typedefs and arrays nest only so deep in any sane type; more is a cycle.
const DEPTH: u32 = 32;
/// Members looked at for one path; `struct task_struct` has about 300. Also bounds the recursion.
const MEMBERS_MAX: u32 = 2048;

/// BTF of one module, `vmlinux` itself for us.
pub struct Btf {
    data: Vec<u8>,
    /// Offset of the string table in `data`, and its length.
    strings: (usize, usize),
    /// Offset in `data` of each type; index 0 is type id 1.
    types: Vec<u32>,
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
    /// Indexes the bytes of a `.BTF` section.
    pub fn parse(data: Vec<u8>) -> Result<Self, Error> {
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
        let mut btf = Self { data, strings, types: Vec::new() };
        let (mut at, end) = (types.0, types.0 + types.1);
        while at < end {
            let ty = btf.type_at(at).ok_or_else(|| malformed(at, "type cut short"))?;
            let tail = tail_len(&ty).ok_or_else(|| malformed(at, format!("unknown kind {}", ty.kind())))?;
            btf.types.push(u32::try_from(at).map_err(|_| malformed(at, "section larger than 4 GiB"))?);
            at = ty.tail + tail;
        }
        Ok(btf)
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
        let index = usize::try_from(id).ok()?.checked_sub(1)?;
        self.type_at(*self.types.get(index)? as usize)
    }

    fn name(&self, offset: u32) -> &[u8] {
        let (start, len) = self.strings;
        let table = self.data.get(start..start + len).unwrap_or_default();
        crate::bytes::cstr_at(table, offset as usize, len).unwrap_or_default()
    }

    /// The first complete structure or union with this name.
    fn container(&self, name: &str) -> Option<Type> {
        (1u32..)
            .zip(&self.types)
            .filter_map(|(id, _)| self.by_id(id))
            .find(|ty| matches!(ty.kind(), KIND_STRUCT | KIND_UNION) && self.name(ty.name) == name.as_bytes())
    }

    /// The type behind typedefs and qualifiers.
    fn strip(&self, id: u32) -> Option<Type> {
        let mut ty = self.by_id(id)?;
        for _ in 0..DEPTH {
            match ty.kind() {
                KIND_TYPEDEF | KIND_VOLATILE | KIND_CONST | KIND_RESTRICT | KIND_TYPE_TAG => {
                    ty = self.by_id(ty.size_or_type)?;
                }
                _ => return Some(ty),
            }
        }
        None
    }

    /// Size in bytes of type `id`.
    fn size(&self, id: u32, depth: u32) -> Option<u64> {
        let ty = self.strip(id)?;
        match ty.kind() {
            KIND_INT | KIND_STRUCT | KIND_UNION | KIND_ENUM | KIND_FLOAT | KIND_ENUM64 => {
                Some(ty.size_or_type.into())
            }
            KIND_PTR => Some(8),
            KIND_ARRAY if depth < DEPTH => {
                let element = u32_at(&self.data, ty.tail)?;
                let count = u32_at(&self.data, ty.tail + 8)?;
                self.size(element, depth + 1)?.checked_mul(count.into())
            }
            _ => None,
        }
    }

    /// The member `name` of `container`, looking through anonymous members: offset in bits and type id.
    /// `budget` bounds the members looked at: damaged types can contain themselves many times over.
    fn direct_member(&self, container: &Type, name: &str, budget: &mut u32) -> Option<(u64, u32)> {
        for i in 0..container.vlen() {
            *budget = budget.checked_sub(1)?;
            let at = container.tail + i * 12;
            let member_name = self.name(u32_at(&self.data, at)?);
            let type_id = u32_at(&self.data, at + 4)?;
            let raw = u32_at(&self.data, at + 8)?;
            let bits = u64::from(if container.kind_flag() { raw & 0x00ff_ffff } else { raw });
            if member_name == name.as_bytes() {
                return Some((bits, type_id));
            }
            if member_name.is_empty()
                && let Some(inner) = self.strip(type_id)
                && matches!(inner.kind(), KIND_STRUCT | KIND_UNION)
                && let Some((inner_bits, id)) = self.direct_member(&inner, name, budget)
            {
                return Some((bits + inner_bits, id));
            }
        }
        None
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
    fn member(&self, container: &str, path: &str) -> Result<Option<Member>, Error> {
        let Some(mut ty) = self.container(container) else { return Ok(None) };
        let mut bits = 0;
        let mut type_id = 0;
        let mut budget = MEMBERS_MAX;
        for (i, name) in path.split('.').enumerate() {
            if i > 0 {
                match self.strip(type_id) {
                    Some(inner) if matches!(inner.kind(), KIND_STRUCT | KIND_UNION) => ty = inner,
                    _ => return Ok(None),
                }
            }
            let Some((offset, id)) = self.direct_member(&ty, name, &mut budget) else { return Ok(None) };
            bits += offset;
            type_id = id;
        }
        Ok(Some(Member { offset: bits / 8, size: self.size(type_id, 0) }))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

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
        let btf = Btf::parse(sample()).unwrap();
        let member = |path| btf.member("s", path).unwrap();
        assert_eq!(member("a"), Some(Member { offset: 0, size: Some(4) }));
        assert_eq!(member("p"), Some(Member { offset: 8, size: Some(8) }));
        assert_eq!(member("y"), Some(Member { offset: 12, size: Some(4) }));
        assert_eq!(member("name"), Some(Member { offset: 16, size: Some(16) }));
        assert_eq!(member("name.x"), None);
        assert_eq!(member("nope"), None);
        assert_eq!(btf.member("t", "a").unwrap(), None);
    }

    #[test]
    fn damaged_btf_is_an_error_or_an_absence_never_a_panic() {
        let good = sample();
        for cut in 0..good.len() {
            if let Ok(btf) = Btf::parse(good[..cut].to_vec()) {
                let _ = btf.member("s", "name");
            }
        }
        for at in 0..good.len() {
            for bit in 0..8 {
                let mut bad = good.clone();
                bad[at] ^= 1 << bit;
                if let Ok(btf) = Btf::parse(bad) {
                    let _ = btf.member("s", "y");
                }
            }
        }
    }
}
