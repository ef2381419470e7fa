//! Typed places in kernel memory: members by path, pointers followed, arrays indexed, bit-fields cut out.
//!
//! An [`Object`] is an address and a type; nothing is read until a value is asked for, and a value is what memory
//! says now. Every failure names the member or the address. Source: the kernel's own BTF or DWARF.

use super::Kernel;
use crate::addr::VirtAddr;
use crate::arch::x86_64::VirtError;
use crate::debuginfo::types::{Shape, TypeId, TypeTable};
use std::fmt;

/// The longest text read from memory at once.
const TEXT_MAX: u64 = 4096;

/// A place in kernel memory and the type of what lies there.
#[derive(Clone, Copy)]
pub struct Object<'k> {
    kernel: &'k Kernel,
    types: &'k TypeTable,
    /// Where it lies; of a bit-field, its storage unit.
    pub at: VirtAddr,
    /// What lies there.
    pub ty: TypeId,
    /// Of a bit-field: lowest bit in the storage unit, width, and bytes of the unit.
    bits: Option<(u32, u32, u64)>,
}

impl fmt::Debug for Object<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "({}) {}", self.types.spell(self.ty), self.at)
    }
}

/// Why a value could not be had.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ObjectError {
    /// Neither BTF in the target's memory nor a vmlinux told any types.
    #[error("no types are known: the kernel has no BTF in memory that can be read; pass --vmlinux FILE")]
    NoTypes,
    /// This kernel has no such type.
    #[error("this kernel has no type '{0}'")]
    NoType(String),
    /// This kernel has no such symbol.
    #[error("this kernel has no symbol '{0}'")]
    NoSymbol(String),
    /// The type has no such member.
    #[error("'{container}' has no member '{path}' in this kernel")]
    NoMember {
        /// The type.
        container: String,
        /// What was looked for.
        path: String,
    },
    /// The memory cannot be read.
    #[error("'{what}' at {at} cannot be read: {why}")]
    Unreadable {
        /// The type of what lies there.
        what: String,
        /// First byte wanted.
        at: VirtAddr,
        /// Why not.
        why: String,
    },
    /// The type is not of the kind that was asked for.
    #[error("'{what}' is not {wanted}")]
    NotA {
        /// The type.
        what: String,
        /// "a pointer", "an array", ...
        wanted: &'static str,
    },
}

impl Kernel {
    /// The types of the kernel and its modules, or the error that says what would bring them: for names that users
    /// type. Finding the modules needs the kernel's own types, [`Self::image_types`].
    pub fn type_table(&self) -> Result<&TypeTable, ObjectError> {
        let types = self.image_types()?;
        self.add_module_types();
        Ok(types)
    }

    /// The kernel image's types, or the error that says what would bring them.
    pub(super) fn image_types(&self) -> Result<&TypeTable, ObjectError> {
        self.types().ok_or(ObjectError::NoTypes)
    }

    /// The structure or union `name` at `at`.
    pub fn object(&self, name: &str, at: VirtAddr) -> Result<Object<'_>, ObjectError> {
        let types = self.image_types()?;
        let ty = types.composite(name).ok_or_else(|| ObjectError::NoType(name.to_owned()))?;
        Ok(Object { kernel: self, types, at, ty, bits: None })
    }

    /// What lies at `at`, of type `ty`.
    pub fn object_of(&self, ty: TypeId, at: VirtAddr) -> Result<Object<'_>, ObjectError> {
        Ok(Object { kernel: self, types: self.image_types()?, at, ty, bits: None })
    }

    /// A value of the type spelled `name` (`"unsigned long"`, `"struct page *"`) at `at`.
    pub fn value(&self, name: &str, at: VirtAddr) -> Result<Object<'_>, ObjectError> {
        let types = self.image_types()?;
        let ty = types.parse(name).ok_or_else(|| ObjectError::NoType(name.to_owned()))?;
        Ok(Object { kernel: self, types, at, ty, bits: None })
    }

    /// The structure or union `name` at the symbol `symbol`.
    pub fn global(&self, name: &str, symbol: &str) -> Result<Object<'_>, ObjectError> {
        self.object(name, self.symbol(symbol).ok_or_else(|| ObjectError::NoSymbol(symbol.to_owned()))?)
    }

    /// Whether this kernel's `container` has a member at `path`.
    pub fn has_member(&self, container: &str, path: &str) -> bool {
        self.member(container, path).is_some()
    }
}

impl<'k> Object<'k> {
    /// The kernel whose memory this is.
    pub fn kernel(&self) -> &'k Kernel {
        self.kernel
    }

    /// Lowest bit and width, for a bit-field.
    pub fn bit_field(&self) -> Option<(u32, u32)> {
        self.bits.map(|(lowest, width, _)| (lowest, width))
    }

    /// Its type as C spells it.
    pub fn type_name(&self) -> String {
        self.types.spell(self.ty)
    }

    /// Bytes it takes.
    pub fn size(&self) -> Result<u64, ObjectError> {
        self.types.size(self.ty).ok_or_else(|| self.is_not("of known size"))
    }

    fn is_not(&self, wanted: &'static str) -> ObjectError {
        ObjectError::NotA { what: self.type_name(), wanted }
    }

    fn no_member(&self, path: &str) -> ObjectError {
        ObjectError::NoMember { container: self.type_name(), path: path.to_owned() }
    }

    /// The member at `path` (`"thread.sp"`, `"mem[0].base"`); pointers are not followed.
    pub fn member(&self, path: &str) -> Result<Self, ObjectError> {
        self.find(path).ok_or_else(|| self.no_member(path))
    }

    /// The first of these members that this kernel has: name the newest first.
    pub fn either(&self, paths: &[&str]) -> Result<Self, ObjectError> {
        paths.iter().find_map(|path| self.find(path)).ok_or_else(|| self.no_member(&paths.join("' or '")))
    }

    /// Whether it has a member at `path`.
    pub fn has(&self, path: &str) -> bool {
        self.types.member(self.ty, path).is_some()
    }

    fn find(&self, path: &str) -> Option<Self> {
        let found = self.types.member(self.ty, path)?;
        let bits = found.bits.map(|(lowest, width)| (lowest, width, found.size.unwrap_or(8)));
        Some(Self { at: self.at.wrapping_add(found.offset), ty: found.ty, bits, ..*self })
    }

    /// The structure `container` whose member `path` this is.
    pub fn container_of(&self, container: &str, path: &str) -> Result<Self, ObjectError> {
        let outer = self.kernel.object(container, self.at)?;
        let member = self.types.member(outer.ty, path).ok_or_else(|| outer.no_member(path))?;
        Ok(Self { at: VirtAddr(self.at.0.wrapping_sub(member.offset)), ..outer })
    }

    /// The same place seen as `struct` or `union` `name`.
    pub fn cast(&self, name: &str) -> Result<Self, ObjectError> {
        self.kernel.object(name, self.at)
    }

    /// Element `index` of an array, whatever its declared length: flexible arrays have none.
    pub fn index(&self, index: u64) -> Result<Self, ObjectError> {
        let (_, ty) = self.types.strip(self.ty).ok_or_else(|| self.is_not("an array"))?;
        let Shape::Array { element, .. } = ty.shape else { return Err(self.is_not("an array")) };
        let one = Self { ty: element, bits: None, ..*self };
        Ok(Self { at: self.at.wrapping_add(one.size()?.wrapping_mul(index)), ..one })
    }

    /// Declared number of elements of an array; 0 for a flexible one.
    pub fn count(&self) -> Result<u64, ObjectError> {
        match self.types.strip(self.ty).map(|(_, ty)| ty) {
            Some(ty) => match ty.shape {
                Shape::Array { count, .. } => Ok(count),
                _ => Err(self.is_not("an array")),
            },
            None => Err(self.is_not("an array")),
        }
    }

    /// Its bytes.
    pub fn bytes(&self) -> Result<Vec<u8>, ObjectError> {
        let size = self.size()?;
        let mut buf =
            vec![
                0;
                usize::try_from(size).ok().filter(|&n| n <= 1 << 20).ok_or_else(|| self.is_not("small"))?
            ];
        self.fill(self.at, &mut buf)?;
        Ok(buf)
    }

    fn fill(&self, at: VirtAddr, buf: &mut [u8]) -> Result<(), ObjectError> {
        match self.kernel.read(at, buf).stopped {
            None => Ok(()),
            Some(why) => Err(self.unreadable(at, &why)),
        }
    }

    fn unreadable(&self, at: VirtAddr, why: &VirtError) -> ObjectError {
        ObjectError::Unreadable { what: self.type_name(), at, why: why.to_string() }
    }

    /// A number, pointer or enumeration, zero-extended.
    pub fn u64(&self) -> Result<u64, ObjectError> {
        let size = match self.bits {
            Some((.., unit)) => unit,
            None => self.size()?,
        };
        let mut buf = [0; 8];
        let wanted = usize::try_from(size).ok().and_then(|size| buf.get_mut(..size));
        self.fill(self.at, wanted.ok_or_else(|| self.is_not("a number of at most 8 bytes"))?)?;
        let value = u64::from_le_bytes(buf);
        Ok(match self.bits {
            Some((lowest, width, _)) => low_bits(value.checked_shr(lowest).unwrap_or(0), width),
            None => value,
        })
    }

    /// A number, sign-extended from its own width whatever its type says.
    pub fn i64(&self) -> Result<i64, ObjectError> {
        let width = match self.bits {
            Some((_, width, _)) => width,
            None => (self.size()? * 8) as u32,
        };
        let unused = 64u32.saturating_sub(width).min(63);
        Ok((self.u64()? << unused) as i64 >> unused)
    }

    /// The value of member `path`, zero-extended.
    pub fn get(&self, path: &str) -> Result<u64, ObjectError> {
        self.member(path)?.u64()
    }

    /// The value of a pointer, or of a `long` used as one.
    pub fn pointer(&self) -> Result<VirtAddr, ObjectError> {
        self.u64().map(VirtAddr)
    }

    /// What a pointer points at; `None` for NULL.
    pub fn follow(&self) -> Result<Option<Self>, ObjectError> {
        let (_, ty) = self.types.strip(self.ty).ok_or_else(|| self.is_not("a pointer"))?;
        let Shape::Pointer(to) = ty.shape else { return Err(self.is_not("a pointer")) };
        let at = self.pointer()?;
        Ok((at.0 != 0).then_some(Self { at, ty: to, bits: None, ..*self }))
    }

    /// What the pointer in member `path` points at; `None` for NULL.
    pub fn at(&self, path: &str) -> Result<Option<Self>, ObjectError> {
        self.member(path)?.follow()
    }

    /// The text in a `char` array, or that a `char *` points at; bytes that are no UTF-8 are replaced. Untrusted.
    pub fn text(&self) -> Result<String, ObjectError> {
        let (_, ty) = self.types.strip(self.ty).ok_or_else(|| self.is_not("text"))?;
        match ty.shape {
            Shape::Array { .. } => self.kernel.text_at(self.at, self.size()?.clamp(1, TEXT_MAX)),
            Shape::Pointer(_) => self.kernel.text_at(self.pointer()?, TEXT_MAX),
            _ => Err(self.is_not("text")),
        }
    }
}

impl Kernel {
    /// The NUL-terminated text at `at`, at most `max` bytes of it.
    pub fn text_at(&self, at: VirtAddr, max: u64) -> Result<String, ObjectError> {
        let mut text = Vec::new();
        while (text.len() as u64) < max {
            // To the end of the page: the next one may be unreadable and not needed.
            let here = at.wrapping_add(text.len() as u64);
            let mut buf = vec![0; here.left_in_page().min(max - text.len() as u64).min(256) as usize];
            if let Some(why) = self.read(here, &mut buf).stopped {
                return Err(ObjectError::Unreadable { what: "text".into(), at: here, why: why.to_string() });
            }
            match buf.iter().position(|&byte| byte == 0) {
                Some(end) => {
                    text.extend(buf.iter().take(end));
                    break;
                }
                None => text.extend(buf),
            }
        }
        Ok(String::from_utf8_lossy(&text).into_owned())
    }
}

fn low_bits(value: u64, width: u32) -> u64 {
    if width >= 64 { value } else { value & ((1 << width) - 1) }
}
