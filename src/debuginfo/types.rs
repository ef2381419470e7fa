//! C types of one kernel: one model, whatever described them (BTF or DWARF), and lookups that are remembered.
//!
//! Knows layouts and names; reads no machine. Source: `Documentation/bpf/btf.rst`; the DWARF standard, chapter 5.

use super::Error;
use std::collections::HashMap;
use std::fmt::Write;
use std::hash::Hash;
use std::sync::{Arc, OnceLock, PoisonError, RwLock};

/// Typedefs, qualifiers, arrays and anonymous members nest only so deep in any sane type; more is a cycle.
const DEPTH: u32 = 32;
/// Members looked at for one path; `struct task_struct` has about 300. Also bounds the recursion.
const MEMBERS_MAX: u32 = 4096;
/// Words that change nothing about where a value lies.
const QUALIFIERS: [&str; 4] = ["const", "volatile", "restrict", "_Atomic"];

/// Types that users' casts make; more than anyone types.
const DERIVED_MAX: usize = 1 << 16;

/// A type in a [`TypeTable`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct TypeId {
    /// 0 for the kernel image, else one more than the index of a module's source.
    pub source: u16,
    /// BTF type id, or offset of the entry in `.debug_info`; 0 is `void`.
    pub id: u32,
}

impl TypeId {
    /// `void`.
    pub const VOID: Self = Self { source: 0, id: 0 };
    /// `source` of types that no debug info spells out: pointers and arrays that a user casts to.
    const DERIVED: u16 = u16::MAX;
}

/// What kind of thing a name names: C keeps tags and other names apart.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Class {
    /// `struct NAME`
    Struct,
    /// `union NAME`
    Union,
    /// `enum NAME`
    Enum,
    /// `typedef ... NAME`
    Typedef,
    /// `unsigned int` and its kin
    Base,
    /// A variable; the type found is the variable's.
    Variable,
}

/// One type.
#[derive(Clone, Debug, PartialEq)]
pub struct Type {
    /// Its name without `struct`; empty if it has none.
    pub name: String,
    /// What it is.
    pub shape: Shape,
}

/// What a type is.
#[derive(Clone, Debug, PartialEq)]
pub enum Shape {
    /// No value.
    Void,
    /// A whole number.
    Int {
        /// Bytes.
        size: u32,
        /// Whether it has a sign.
        signed: bool,
        /// Whether it is shown as something else than a number.
        kind: IntKind,
    },
    /// A floating-point number of so many bytes.
    Float(u32),
    /// A pointer.
    Pointer(TypeId),
    /// An array; 0 elements for a flexible one.
    Array {
        /// Of what.
        element: TypeId,
        /// How many; of several dimensions the outermost, `element` being the rest.
        count: u64,
    },
    /// A structure or union.
    Composite {
        /// Whether the members overlap.
        union: bool,
        /// Bytes.
        size: u64,
        /// In the order of their declaration.
        members: Vec<MemberDef>,
    },
    /// An enumeration.
    Enum {
        /// Bytes.
        size: u32,
        /// Whether values have a sign.
        signed: bool,
        /// Names and values.
        values: Vec<(String, i64)>,
    },
    /// Another name for a type.
    Typedef(TypeId),
    /// `const`, `volatile`, `restrict`, or a tag that changes nothing: the word and the type.
    Qualified(&'static str, TypeId),
    /// A function.
    Function {
        /// What it returns.
        returns: TypeId,
        /// Names (may be empty) and types.
        parameters: Vec<(String, TypeId)>,
        /// Whether `...` follows.
        variadic: bool,
    },
    /// Declared and not defined here; the word is `struct`, `union` or `enum`.
    Declared(&'static str),
}

/// What a whole number stands for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum IntKind {
    /// A number.
    Number,
    /// `char`: text, in arrays.
    Char,
    /// `_Bool`.
    Bool,
}

/// A member as declared.
#[derive(Clone, Debug, PartialEq)]
pub struct MemberDef {
    /// Empty for anonymous structures and unions, and for padding.
    pub name: String,
    /// From the start of the container, in bits.
    pub bit_offset: u64,
    /// Width in bits of a bit-field.
    pub bits: Option<u32>,
    /// Its type.
    pub ty: TypeId,
}

/// A member of a structure or union, as deep inside as its path went.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Member {
    /// Bytes from the start of the outermost structure; of a bit-field, of the storage unit that holds it.
    pub offset: u64,
    /// Size in bytes of its type, where known.
    pub size: Option<u64>,
    /// Of a bit-field: its lowest bit's number inside the storage unit of `size` bytes at `offset`, and its width.
    pub bits: Option<(u32, u32)>,
    /// Its type.
    pub ty: TypeId,
}

/// Where types come from: BTF of the image, BTF of a module, DWARF of a file.
pub trait TypeSource: Send + Sync {
    /// The complete definition called `name`, if this source has one.
    fn find(&self, class: Class, name: &str) -> Result<Option<TypeId>, Error>;
    /// The type with this id; never asked for [`TypeId::VOID`].
    fn get(&self, id: TypeId) -> Result<Type, Error>;
    /// All names of a class, sorted; for completion and search.
    fn names(&self, class: Class) -> Vec<String>;
    /// The value of the enumerator called `name`, of whichever enumeration.
    fn enumerator(&self, name: &str) -> Result<Option<i64>, Error>;
    /// `"BTF"` or `"DWARF"`.
    fn format(&self) -> &'static str;
}

/// Stands in where there is neither BTF nor DWARF.
pub struct NoTypes;

impl TypeSource for NoTypes {
    fn find(&self, _class: Class, _name: &str) -> Result<Option<TypeId>, Error> {
        Ok(None)
    }
    fn get(&self, id: TypeId) -> Result<Type, Error> {
        Err(Error::Types { format: "no types", offset: id.id.into(), what: "nothing is here".into() })
    }
    fn names(&self, _class: Class) -> Vec<String> {
        Vec::new()
    }
    fn enumerator(&self, _name: &str) -> Result<Option<i64>, Error> {
        Ok(None)
    }
    fn format(&self) -> &'static str {
        "no types"
    }
}

/// The types of one kernel and its modules.
pub struct TypeTable {
    image: Arc<dyn TypeSource>,
    modules: OnceLock<Vec<Arc<dyn TypeSource>>>,
    types: Remembered<TypeId, Option<Arc<Type>>>,
    names: Remembered<(Class, String), Option<TypeId>>,
    members: Remembered<(TypeId, String), Option<Member>>,
    constants: Remembered<String, Option<i64>>,
    derived: RwLock<Vec<Arc<Type>>>,
}

/// What was looked up once. Bounded by what the debug info holds.
struct Remembered<K, V>(RwLock<HashMap<K, V>>);

impl<K: Eq + Hash, V: Clone> Remembered<K, V> {
    fn new() -> Self {
        Self(RwLock::new(HashMap::new()))
    }

    fn get(&self, key: &K) -> Option<V> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).get(key).cloned()
    }

    fn put(&self, key: K, value: V) -> V {
        self.0.write().unwrap_or_else(PoisonError::into_inner).entry(key).or_insert(value).clone()
    }
}

impl TypeTable {
    /// A table over the image's types; modules' may follow.
    pub fn new(image: Arc<dyn TypeSource>) -> Self {
        Self {
            image,
            modules: OnceLock::new(),
            types: Remembered::new(),
            names: Remembered::new(),
            members: Remembered::new(),
            constants: Remembered::new(),
            derived: RwLock::new(Vec::new()),
        }
    }

    /// The image's own source, which modules' BTF builds upon.
    pub fn image(&self) -> &Arc<dyn TypeSource> {
        &self.image
    }

    /// Adds the modules' types, once: a source's `TypeId::source` is its place in the list, counted from 1.
    pub fn set_modules(&self, modules: Vec<Arc<dyn TypeSource>>) {
        // A second list would be the same: modules of a dump do not change.
        let _ = self.modules.set(modules);
    }

    /// Whether the modules' types were added.
    pub fn has_modules(&self) -> bool {
        self.modules.get().is_some()
    }

    fn modules(&self) -> &[Arc<dyn TypeSource>] {
        self.modules.get().map_or(&[], Vec::as_slice)
    }

    /// `"BTF"` or `"DWARF"`.
    pub fn format(&self) -> &'static str {
        self.image.format()
    }

    /// The definition called `name`: the image's, else the first module's.
    pub fn find(&self, class: Class, name: &str) -> Option<TypeId> {
        let key = (class, name.to_owned());
        // What was not found in the image may be in modules that were added since.
        if let Some(known) = self.names.get(&key)
            && (known.is_some() || self.modules.get().is_none())
        {
            return known;
        }
        let sources = std::iter::once(&self.image).chain(self.modules());
        let found = sources.into_iter().find_map(|source| {
            source.find(class, name).unwrap_or_else(|error| {
                tracing::warn!("{error}");
                None
            })
        });
        if found.is_none() && self.modules.get().is_some() {
            return None;
        }
        self.names.put(key, found)
    }

    /// `struct NAME` or `union NAME`.
    pub fn composite(&self, name: &str) -> Option<TypeId> {
        self.find(Class::Struct, name).or_else(|| self.find(Class::Union, name))
    }

    /// A type as C spells it: `struct page`, `enum zone_type`, `unsigned long`, `atomic_t`, `char *`, `char [16]`, and,
    /// as crash takes them, the names of structures and unions without the word.
    pub fn parse(&self, text: &str) -> Option<TypeId> {
        let end = text.find(['*', '[']).unwrap_or(text.len());
        let (base, mut rest) = text.split_at_checked(end)?;
        let words: Vec<&str> = base.split_whitespace().filter(|w| !QUALIFIERS.contains(w)).collect();
        let mut id = match words.as_slice() {
            ["void"] => TypeId::VOID,
            ["struct", name] => self.find(Class::Struct, name)?,
            ["union", name] => self.find(Class::Union, name)?,
            ["enum", name] => self.find(Class::Enum, name)?,
            [name] => {
                let classes = [Class::Typedef, Class::Base, Class::Struct, Class::Union, Class::Enum];
                classes
                    .into_iter()
                    .find_map(|class| self.find(class, name))
                    .or_else(|| self.find(Class::Base, base_type(&words)?))?
            }
            _ => self.find(Class::Base, base_type(&words)?)?,
        };
        loop {
            rest = rest.trim_start();
            if let Some(after) = rest.strip_prefix('*') {
                id = self.pointer_to(id)?;
                rest = after;
            } else if let Some(word) = QUALIFIERS.iter().find(|word| rest.starts_with(**word)) {
                rest = rest.get(word.len()..)?;
            } else {
                break;
            }
        }
        // The dimension next to the name is the outermost.
        let mut dimensions = Vec::new();
        while let Some(after) = rest.trim_start().strip_prefix('[') {
            let (count, after) = after.split_once(']')?;
            dimensions.push(if count.trim().is_empty() { 0 } else { count.trim().parse().ok()? });
            rest = after;
        }
        for count in dimensions.into_iter().rev() {
            id = self.array_of(id, count)?;
        }
        rest.trim().is_empty().then_some(id)
    }

    /// The type of a pointer to `id`.
    pub fn pointer_to(&self, id: TypeId) -> Option<TypeId> {
        self.derive(Shape::Pointer(id))
    }

    /// The type of `count` of `id` in a row.
    pub fn array_of(&self, id: TypeId, count: u64) -> Option<TypeId> {
        self.derive(Shape::Array { element: id, count })
    }

    fn derive(&self, shape: Shape) -> Option<TypeId> {
        let mut derived = self.derived.write().unwrap_or_else(PoisonError::into_inner);
        let index = match derived.iter().position(|ty| ty.shape == shape) {
            Some(index) => index,
            None if derived.len() < DERIVED_MAX => {
                derived.push(Arc::new(Type { name: String::new(), shape }));
                derived.len() - 1
            }
            None => return None,
        };
        let id = u32::try_from(index).ok()? + 1;
        Some(TypeId { source: TypeId::DERIVED, id })
    }

    /// All names of a class in image and modules, sorted.
    pub fn names(&self, class: Class) -> Vec<String> {
        let mut names = self.image.names(class);
        names.extend(self.modules().iter().flat_map(|source| source.names(class)));
        names.sort_unstable();
        names.dedup();
        names
    }

    /// The type with this id; `None` for one that the debug info does not hold.
    pub fn get(&self, id: TypeId) -> Option<Arc<Type>> {
        if id.source == TypeId::DERIVED {
            let derived = self.derived.read().unwrap_or_else(PoisonError::into_inner);
            return derived.get((id.id as usize).checked_sub(1)?).cloned();
        }
        if let Some(known) = self.types.get(&id) {
            return known;
        }
        let source = match usize::from(id.source).checked_sub(1) {
            None => Some(&self.image),
            Some(module) => self.modules().get(module),
        };
        let found = if id.id == 0 {
            Some(Arc::new(Type { name: "void".into(), shape: Shape::Void }))
        } else {
            source.and_then(|source| match source.get(id) {
                Ok(found) => Some(Arc::new(found)),
                Err(error) => {
                    tracing::warn!("{error}");
                    None
                }
            })
        };
        self.types.put(id, found)
    }

    /// The type behind typedefs and qualifiers.
    pub fn strip(&self, id: TypeId) -> Option<(TypeId, Arc<Type>)> {
        let mut id = id;
        for _ in 0..DEPTH {
            let ty = self.get(id)?;
            match ty.shape {
                Shape::Typedef(inner) | Shape::Qualified(_, inner) => id = inner,
                Shape::Declared(_) => return Some(self.complete(&ty).unwrap_or((id, ty))),
                _ => return Some((id, ty)),
            }
        }
        None
    }

    /// The definition of a type that is only declared where it was met.
    fn complete(&self, declared: &Type) -> Option<(TypeId, Arc<Type>)> {
        let class = match declared.shape {
            Shape::Declared("struct") => Class::Struct,
            Shape::Declared("union") => Class::Union,
            Shape::Declared(_) => Class::Enum,
            _ => return None,
        };
        let id = self.find(class, &declared.name)?;
        let ty = self.get(id)?;
        (!matches!(ty.shape, Shape::Declared(_))).then_some((id, ty))
    }

    /// Size in bytes of a value; `None` for functions, `void`, and what is only declared.
    pub fn size(&self, id: TypeId) -> Option<u64> {
        self.size_within(id, DEPTH)
    }

    fn size_within(&self, id: TypeId, depth: u32) -> Option<u64> {
        match self.strip(id)?.1.shape {
            Shape::Int { size, .. } | Shape::Float(size) | Shape::Enum { size, .. } => Some(size.into()),
            Shape::Pointer(_) => Some(8),
            Shape::Composite { size, .. } => Some(size),
            Shape::Array { element, count } => {
                self.size_within(element, depth.checked_sub(1)?)?.checked_mul(count)
            }
            _ => None,
        }
    }

    /// The member at `path` (`"thread.sp"`, `"mem[0].base"`) of `container`; anonymous members are looked through.
    pub fn member(&self, container: TypeId, path: &str) -> Option<Member> {
        let key = (container, path.to_owned());
        match self.members.get(&key) {
            Some(known) => known,
            None => self.members.put(key, self.find_member(container, path)),
        }
    }

    fn find_member(&self, container: TypeId, path: &str) -> Option<Member> {
        let mut budget = MEMBERS_MAX;
        let mut here = Member { offset: 0, size: None, bits: None, ty: container };
        for step in path.split('.') {
            let (name, indexes) = step.split_once('[').map_or((step, ""), |(name, rest)| (name, rest));
            let found = self.direct_member(here.ty, name, &mut budget)?;
            here = Member { offset: here.offset.wrapping_add(found.offset), ..found };
            for index in indexes.split_terminator(']') {
                let index: u64 = index.trim_start_matches('[').parse().ok()?;
                let Shape::Array { element, .. } = self.strip(here.ty)?.1.shape else { return None };
                let size = self.size(element);
                let offset = here.offset.wrapping_add(index.wrapping_mul(size?));
                here = Member { offset, size, bits: None, ty: element };
            }
        }
        Some(here)
    }

    /// The member `name` of `container` itself or of its anonymous members.
    fn direct_member(&self, container: TypeId, name: &str, budget: &mut u32) -> Option<Member> {
        let (_, ty) = self.strip(container)?;
        let Shape::Composite { members, .. } = &ty.shape else { return None };
        for def in members {
            *budget = budget.checked_sub(1)?;
            if def.name == name {
                return Some(self.place(def));
            }
            if def.name.is_empty()
                && let Some(inner) = self.direct_member(def.ty, name, budget)
            {
                return Some(Member { offset: inner.offset.wrapping_add(def.bit_offset / 8), ..inner });
            }
        }
        None
    }

    /// Where a member lies in its container.
    pub fn place(&self, def: &MemberDef) -> Member {
        let size = self.size(def.ty);
        match (def.bits, size) {
            // The storage unit is the aligned one of the declared type that holds the first bit.
            (Some(width), Some(size @ 1..=8)) => {
                let unit = def.bit_offset / (size * 8);
                let lowest = (def.bit_offset % (size * 8)) as u32;
                Member { offset: unit * size, size: Some(size), bits: Some((lowest, width)), ty: def.ty }
            }
            (Some(width), _) => {
                let lowest = (def.bit_offset % 8) as u32;
                Member { offset: def.bit_offset / 8, size: Some(8), bits: Some((lowest, width)), ty: def.ty }
            }
            (None, size) => Member { offset: def.bit_offset / 8, size, bits: None, ty: def.ty },
        }
    }

    /// The type as C spells it in a cast: `struct task_struct *`, `char [16]`, `void (*)(int)`.
    pub fn spell(&self, id: TypeId) -> String {
        self.declare(id, "")
    }

    /// A declaration of `name` with this type: `char comm[16]`, `int (*probe)(struct device *)`.
    pub fn declare(&self, id: TypeId, name: &str) -> String {
        self.declare_within(id, name.to_owned(), DEPTH)
    }

    fn declare_within(&self, id: TypeId, inner: String, depth: u32) -> String {
        let (Some(ty), Some(depth)) = (self.get(id), depth.checked_sub(1)) else {
            return format!("? {inner}");
        };
        let join = |word: &str| if inner.is_empty() { word.to_owned() } else { format!("{word} {inner}") };
        let tagged = |tag: &str, name: &str| {
            if name.is_empty() { join(&format!("{tag} {{...}}")) } else { join(&format!("{tag} {name}")) }
        };
        match &ty.shape {
            Shape::Void => join("void"),
            Shape::Int { .. } => join(short_name(&ty.name)),
            Shape::Float(_) | Shape::Typedef(_) => join(&ty.name),
            Shape::Composite { union: false, .. } => tagged("struct", &ty.name),
            Shape::Composite { union: true, .. } => tagged("union", &ty.name),
            Shape::Enum { .. } => tagged("enum", &ty.name),
            Shape::Declared(word) => tagged(word, &ty.name),
            Shape::Pointer(to) => {
                let target = self.get(*to);
                let needs_parentheses =
                    target.is_some_and(|t| matches!(t.shape, Shape::Array { .. } | Shape::Function { .. }));
                let inner = if needs_parentheses { format!("(*{inner})") } else { format!("*{inner}") };
                self.declare_within(*to, inner, depth)
            }
            Shape::Array { element, count } => {
                let count = if *count == 0 { String::new() } else { count.to_string() };
                self.declare_within(*element, format!("{inner}[{count}]"), depth)
            }
            // A qualified pointer's word stands behind the star.
            Shape::Qualified(word, to) => match self.get(*to).map(|t| matches!(t.shape, Shape::Pointer(_))) {
                Some(true) => self.declare_within(*to, join(word), depth),
                _ if word.is_empty() => self.declare_within(*to, inner, depth),
                _ => format!("{word} {}", self.declare_within(*to, inner, depth)),
            },
            Shape::Function { returns, parameters, variadic } => {
                let mut list = String::new();
                for (i, (name, ty)) in parameters.iter().enumerate() {
                    let _ = write!(list, "{}{}", if i > 0 { ", " } else { "" }, {
                        self.declare_within(*ty, name.clone(), depth)
                    });
                }
                match (parameters.is_empty(), variadic) {
                    (true, false) => list.push_str("void"),
                    (true, true) => list.push_str("..."),
                    (false, true) => list.push_str(", ..."),
                    (false, false) => {}
                }
                self.declare_within(*returns, format!("{inner}({list})"), depth)
            }
        }
    }

    /// The name of an enumeration's value.
    pub fn enumerator(&self, id: TypeId, value: i64) -> Option<String> {
        match &self.strip(id)?.1.shape {
            Shape::Enum { values, .. } => {
                values.iter().find(|(_, v)| *v == value).map(|(name, _)| name.clone())
            }
            _ => None,
        }
    }

    /// The value of the enumerator called `name` (`PG_locked`), of whichever enumeration.
    pub fn constant(&self, name: &str) -> Option<i64> {
        if let Some(known) = self.constants.get(&name.to_owned()) {
            return known;
        }
        let mut sources = std::iter::once(&self.image).chain(self.modules());
        let found = sources.find_map(|source| source.enumerator(name).ok().flatten());
        self.constants.put(name.to_owned(), found)
    }
}

/// A base type as people and gdb write it, by the name that compilers give it.
fn short_name(name: &str) -> &str {
    match name {
        "long unsigned int" => "unsigned long",
        "long int" => "long",
        "long long unsigned int" => "unsigned long long",
        "long long int" => "long long",
        "short unsigned int" => "unsigned short",
        "short int" => "short",
        other => other,
    }
}

/// The name that compilers give a base type, however it was typed: `unsigned long` is `long unsigned int`.
fn base_type(words: &[&str]) -> Option<&'static str> {
    let count = |word: &str| words.iter().filter(|w| **w == word).count();
    let known = ["signed", "unsigned", "long", "short", "int", "char"];
    if words.is_empty() || words.iter().any(|w| !known.contains(w)) {
        return None;
    }
    let unsigned = count("unsigned") > 0;
    Some(match (count("char") > 0, count("short") > 0, count("long"), unsigned) {
        (true, _, _, true) => "unsigned char",
        (true, ..) if count("signed") > 0 => "signed char",
        (true, ..) => "char",
        (_, true, _, true) => "short unsigned int",
        (_, true, _, false) => "short int",
        (_, _, 0, true) => "unsigned int",
        (_, _, 0, false) => "int",
        (_, _, 1, true) => "long unsigned int",
        (_, _, 1, false) => "long int",
        (_, _, _, true) => "long long unsigned int",
        (_, _, _, false) => "long long int",
    })
}
