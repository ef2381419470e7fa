//! What users type for a value: C expressions over the kernel's variables, types and memory, evaluated on a CPU.
//!
//! Nothing is written and nothing is called. Pointers are followed only where the expression says so; memory that
//! cannot be read is an error that names it. Source: `p` of gdb and crash, whose habits these are.

mod number;
mod parse;

pub use number::Number;
pub use parse::{Parsed, parse};

use super::{CommandError, Context, args, printable};
use crate::addr::VirtAddr;
use crate::debuginfo::types::{Shape, TypeId, TypeTable};
use crate::kernel::{CpuId, Kernel, Object, ObjectError};
use parse::{Binary, Expr, Unary};

/// What an expression comes to.
#[derive(Clone, Copy, Debug)]
pub enum Value<'k> {
    /// Something in memory.
    Place(Object<'k>),
    /// A number that was computed, or an address that was taken.
    Number(Number),
    /// A function, or a variable whose type nothing tells.
    Symbol(VirtAddr),
}

/// An expression, ready to be evaluated.
pub struct Expression<'k> {
    kernel: &'k Kernel,
    types: &'k TypeTable,
    parsed: Parsed,
    /// The CPUs it names, or `None`.
    cpus: Option<Vec<CpuId>>,
    /// Whether it names a per-CPU variable.
    per_cpu: bool,
}

impl<'k> Expression<'k> {
    /// Reads `text`.
    pub fn new(context: &Context<'k>, text: &str) -> Result<Self, CommandError> {
        let kernel = context.kernel()?;
        let types = kernel.type_table()?;
        // A variable hides a type of the same name, as in C.
        let is_type = |name: &str| kernel.symbol_anywhere(name).is_none() && types.parse(name).is_some();
        let wrong = |why| CommandError(format!("'{}': {why}", printable(text)));
        let parsed = parse(text, &is_type).map_err(|why| wrong(printable(&why)))?;
        let cpus = parsed.cpus.as_deref().map(|list| cpu_list(kernel, list)).transpose()?;
        let per_cpu =
            parsed.any_name(&|name| kernel.symbol_anywhere(name).is_some_and(|at| kernel.is_per_cpu(at)));
        if cpus.is_some() && !per_cpu {
            return Err(wrong("it names CPUs, but no per-CPU variable".into()));
        }
        Ok(Self { kernel, types, parsed, cpus, per_cpu })
    }

    /// The CPUs that a `:` in it names.
    pub fn cpus(&self) -> Option<&[CpuId]> {
        self.cpus.as_deref()
    }

    /// Whether its value is another for each CPU.
    pub fn is_per_cpu(&self) -> bool {
        self.per_cpu
    }

    /// If it is the bare name of a per-CPU variable: that name.
    pub fn bare_per_cpu_name(&self) -> Option<&str> {
        match &self.parsed.expr {
            Expr::Name(name) if self.per_cpu => Some(name),
            _ => None,
        }
    }

    /// How to type it for one CPU.
    pub fn label(&self, cpu: CpuId) -> String {
        self.parsed.label(cpu.0)
    }

    /// Its value on the selected CPU: registers are that CPU's, per-CPU variables are its copies.
    pub fn value(&self, context: &Context<'k>) -> Result<Value<'k>, CommandError> {
        self.value_on(context, context.cpu)
    }

    /// Its value with `cpu`'s copies of per-CPU variables.
    pub fn value_on(&self, context: &Context<'k>, cpu: CpuId) -> Result<Value<'k>, CommandError> {
        Evaluation { kernel: self.kernel, types: self.types, context, cpu }.value(&self.parsed.expr)
    }

    /// Each value with the CPU it is of, if it is of one: those the `:` names, else the selected one.
    pub fn values(&self, context: &Context<'k>) -> Result<Vec<(Option<CpuId>, Value<'k>)>, CommandError> {
        match (&self.cpus, self.per_cpu) {
            (Some(cpus), _) => {
                cpus.iter().map(|&cpu| Ok((Some(cpu), self.value_on(context, cpu)?))).collect()
            }
            (None, true) => Ok(vec![(Some(context.cpu), self.value(context)?)]),
            (None, false) => Ok(vec![(None, self.value(context)?)]),
        }
    }
}

/// CPUs as crash has them behind a `:`: `a` or `all` for all possible ones, else numbers and ranges.
pub fn cpu_list(kernel: &Kernel, list: &str) -> Result<Vec<CpuId>, CommandError> {
    let possible = kernel.possible_cpus();
    if let "a" | "all" = list {
        return Ok(possible);
    }
    let wrong = || {
        CommandError(format!("'{}' is not a list of CPUs; use a, or numbers such as 2,4-5", printable(list)))
    };
    let number = |text: &str| text.parse::<u32>().map_err(|_| wrong());
    let mut cpus = Vec::new();
    for part in list.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (number(first)?, number(last)?);
        let before = cpus.len();
        cpus.extend(possible.iter().filter(|cpu| (first..=last).contains(&cpu.0)));
        if cpus.len() == before {
            let ids: Vec<String> = possible.iter().map(CpuId::to_string).collect();
            return Err(CommandError(format!(
                "there is no CPU {}; possible are {}",
                printable(part),
                ids.join(", ")
            )));
        }
    }
    Ok(cpus)
}

/// An address as typed: as [`args::address`] reads it (numbers are hexadecimal), else what an expression points at.
pub fn address(context: &Context<'_>, text: &str) -> Result<VirtAddr, CommandError> {
    let places = addresses(context, text)?;
    match places.as_slice() {
        [(_, at)] => Ok(*at),
        _ => Err(CommandError(format!("'{}' names {} CPUs; one is wanted", printable(text), places.len()))),
    }
}

/// The same, or `phys:ADDR`.
pub fn place(context: &Context<'_>, text: &str) -> Result<args::Address, CommandError> {
    match text.starts_with("phys:") {
        true => args::address(context, text),
        false => address(context, text).map(args::Address::Virtual),
    }
}

/// The same, of several CPUs if `text` names them.
pub fn addresses(context: &Context<'_>, text: &str) -> Result<Vec<(Option<CpuId>, VirtAddr)>, CommandError> {
    let plain = match args::address(context, text) {
        Ok(args::Address::Virtual(at)) => {
            // A per-CPU symbol alone is the selected CPU's copy; a number is an address.
            let name = text.split('+').next().unwrap_or(text);
            let symbol =
                |kernel: &&Kernel| kernel.symbol_anywhere(name).is_some_and(|at| kernel.is_per_cpu(at));
            match context.kernel().ok().filter(symbol) {
                Some(kernel) => kernel.per_cpu_pointer(at, context.cpu).map(|at| (Some(context.cpu), at)),
                None => Some((None, at)),
            }
        }
        Ok(args::Address::Physical(_)) => {
            return Err(CommandError(format!(
                "'{}' is physical; a virtual address is wanted",
                printable(text)
            )));
        }
        Err(error) => {
            // What is a single word of no expression is explained as an address.
            if text.chars().all(|c| c.is_ascii_alphanumeric()) {
                return Err(error);
            }
            None
        }
    };
    if let Some(plain) = plain {
        return Ok(vec![plain]);
    }
    let expression = Expression::new(context, text)?;
    let values = expression.values(context)?;
    values.into_iter().map(|(cpu, value)| Ok((cpu, points_at(&value)?))).collect()
}

/// The address a value means: a pointer's or number's value, else where it lies.
pub fn points_at(value: &Value<'_>) -> Result<VirtAddr, CommandError> {
    match value {
        Value::Number(number) => Ok(VirtAddr(number.bits)),
        Value::Symbol(at) => Ok(*at),
        Value::Place(place) => {
            let shape = place.kernel().type_table()?.strip(place.ty).map(|(_, ty)| ty);
            match shape.as_deref().map(|ty| &ty.shape) {
                // An unsigned long may be an address; what is shorter is none.
                Some(Shape::Pointer(_) | Shape::Int { size: 8, .. }) => Ok(VirtAddr(place.u64()?)),
                _ => Ok(place.at),
            }
        }
    }
}

struct Evaluation<'a, 'k> {
    kernel: &'k Kernel,
    types: &'k TypeTable,
    context: &'a Context<'k>,
    cpu: CpuId,
}

fn fail<T>(text: impl Into<String>) -> Result<T, CommandError> {
    Err(CommandError(text.into()))
}

impl<'k> Evaluation<'_, 'k> {
    fn value(&self, expr: &Expr) -> Result<Value<'k>, CommandError> {
        match expr {
            Expr::Number(n) => Ok(Value::Number(Number::new(n.value, n.size, n.signed))),
            Expr::Name(name) => self.name(name),
            Expr::Register(name) => {
                let at = args::register(self.context, name)?;
                Ok(Value::Number(Number::long(at.0)))
            }
            Expr::Unary(operator, inner) => self.unary(*operator, self.value(inner)?),
            Expr::Binary(operator, left, right) => self.binary(*operator, left, right),
            Expr::Member(container, name) => self.member(self.value(container)?, name),
            Expr::Index(base, index) => {
                let index = self.number(&self.value(index)?)?;
                self.index(self.value(base)?, index.bits)
            }
            Expr::Cast(name, inner) => self.cast(self.type_named(name)?, self.value(inner)?),
            Expr::SizeOfType(name) => self.size_of(self.type_named(name)?),
            Expr::SizeOf(inner) => match self.value(inner)? {
                Value::Place(place) => self.size_of(place.ty),
                Value::Number(number) => Ok(Value::Number(Number::long(number.size))),
                Value::Symbol(at) => fail(self.untyped(at)),
            },
        }
    }

    fn type_named(&self, name: &str) -> Result<TypeId, CommandError> {
        self.types.parse(name).ok_or_else(|| ObjectError::NoType(printable(name)).into())
    }

    fn size_of(&self, ty: TypeId) -> Result<Value<'k>, CommandError> {
        match self.types.size(ty) {
            Some(size) => Ok(Value::Number(Number::long(size))),
            None => fail(format!("the size of '{}' is not known", printable(&self.types.spell(ty)))),
        }
    }

    fn untyped(&self, at: VirtAddr) -> String {
        let what = self.kernel.describe_address(at).unwrap_or_else(|| "the symbol".into());
        format!("the type of what is at {at} ({what}) is not known; say *(TYPE *)&SYMBOL")
    }

    /// Variables before enumerators before what has no type, as a debugger looks for them.
    fn name(&self, name: &str) -> Result<Value<'k>, CommandError> {
        let at = self.kernel.symbol_anywhere(name);
        if let Some(at) = at
            && let Some(ty) = self.kernel.variable_type(name)
        {
            let at = if self.kernel.is_per_cpu(at) {
                self.kernel.per_cpu_pointer(at, self.cpu).ok_or_else(|| {
                    CommandError(format!("where the per-CPU variables of CPU {} are is not known", self.cpu))
                })?
            } else {
                at
            };
            return Ok(Value::Place(self.kernel.object_of(ty, at)?));
        }
        if let Some(value) = self.types.constant(name) {
            let signed = value < 0;
            let size = if i32::try_from(value).is_ok() || u32::try_from(value).is_ok() { 4 } else { 8 };
            return Ok(Value::Number(Number::new(value as u64, size, signed || value <= i32::MAX.into())));
        }
        match at {
            Some(at) if self.kernel.is_per_cpu(at) => {
                Ok(Value::Symbol(self.kernel.per_cpu_pointer(at, self.cpu).unwrap_or(at)))
            }
            Some(at) => Ok(Value::Symbol(at)),
            None => {
                let hex = u64::from_str_radix(name, 16).is_ok();
                let cure = if hex {
                    "write 0x before a hexadecimal number"
                } else {
                    "'sym -q TEXT' looks for names"
                };
                fail(format!("there is neither a symbol nor an enumerator '{}'; {cure}", printable(name)))
            }
        }
    }

    /// The number that a value is: read, if it lies in memory; an array is the address of its first element.
    fn number(&self, value: &Value<'k>) -> Result<Number, CommandError> {
        match value {
            Value::Number(number) => Ok(*number),
            // Functions are their addresses; of a variable without a type only its address can be had.
            Value::Symbol(at) => match self.kernel.is_text(*at) {
                true => Ok(Number::long(at.0)),
                false => fail(self.untyped(*at)),
            },
            Value::Place(place) => {
                let stripped = self.types.strip(place.ty).map(|(_, ty)| ty);
                match stripped.as_deref().map(|ty| &ty.shape) {
                    Some(Shape::Int { size, signed, .. } | Shape::Enum { size, signed, .. }) => {
                        let bits = if *signed { place.i64()? as u64 } else { place.u64()? };
                        Ok(Number::new(bits, (*size).into(), *signed).of(place.ty))
                    }
                    Some(Shape::Pointer(_)) => Ok(Number::long(place.u64()?).of(place.ty)),
                    Some(Shape::Array { element, .. }) => self.pointer(*element, place.at),
                    Some(Shape::Function { .. }) => self.pointer(place.ty, place.at),
                    _ => fail(format!("'{}' is not a number", printable(&place.type_name()))),
                }
            }
        }
    }

    fn pointer(&self, to: TypeId, at: VirtAddr) -> Result<Number, CommandError> {
        let ty = self.types.pointer_to(to);
        ty.map(|ty| Number::long(at.0).of(ty)).ok_or_else(|| CommandError("too many types were made".into()))
    }

    /// What a pointer type points at.
    fn target(&self, number: &Number) -> Option<TypeId> {
        match self.types.strip(number.ty?)?.1.shape {
            Shape::Pointer(to) => Some(to),
            _ => None,
        }
    }

    /// Bytes that one step of a pointer takes; 1 for `void *` and functions, as with gcc.
    fn step(&self, to: TypeId) -> u64 {
        self.types.size(to).unwrap_or(1)
    }

    fn follow(&self, value: &Value<'k>) -> Result<Object<'k>, CommandError> {
        let number = self.number(value)?;
        let Some(to) = self.target(&number) else {
            return fail(format!(
                "{:#x} is not a pointer; cast it: *(TYPE *){:#x}",
                number.bits, number.bits
            ));
        };
        if let Some(Shape::Void) = self.types.strip(to).map(|(_, ty)| ty.shape.clone()) {
            return fail(format!("{:#x} points at void; cast it: *(TYPE *){:#x}", number.bits, number.bits));
        }
        Ok(self.kernel.object_of(to, VirtAddr(number.bits))?)
    }

    fn member(&self, value: Value<'k>, name: &str) -> Result<Value<'k>, CommandError> {
        let container = match value {
            Value::Place(place) => {
                let shape = self.types.strip(place.ty).map(|(_, ty)| ty);
                let is_pointer = matches!(shape.as_deref().map(|ty| &ty.shape), Some(Shape::Pointer(_)));
                if is_pointer { self.follow(&value)? } else { place }
            }
            Value::Number(_) => self.follow(&value)?,
            Value::Symbol(at) => return fail(self.untyped(at)),
        };
        Ok(Value::Place(container.member(name)?))
    }

    fn index(&self, base: Value<'k>, index: u64) -> Result<Value<'k>, CommandError> {
        if let Value::Place(place) = base
            && let Some((_, ty)) = self.types.strip(place.ty)
            && matches!(ty.shape, Shape::Array { .. })
        {
            return Ok(Value::Place(place.index(index)?));
        }
        let first = self.follow(&base)?;
        let at = first.at.wrapping_add(self.step(first.ty).wrapping_mul(index));
        Ok(Value::Place(self.kernel.object_of(first.ty, at)?))
    }

    fn unary(&self, operator: Unary, inner: Value<'k>) -> Result<Value<'k>, CommandError> {
        let number = |number| Ok(Value::Number(number));
        match operator {
            Unary::Minus => number(self.number(&inner)?.minus()),
            Unary::Plus => number(self.number(&inner)?.promoted()),
            Unary::Complement => number(self.number(&inner)?.complement()),
            Unary::Not => number(Number::int((self.number(&inner)?.bits == 0).into())),
            Unary::Follow => match inner {
                // `*schedule` is the function again.
                Value::Symbol(at) if self.kernel.is_text(at) => Ok(inner),
                _ => Ok(Value::Place(self.follow(&inner)?)),
            },
            Unary::Address => match inner {
                Value::Place(place) if place.bit_field().is_some() => fail("a bit-field has no address"),
                Value::Place(place) => number(self.pointer(place.ty, place.at)?),
                Value::Symbol(at) => number(self.pointer(TypeId::VOID, at)?),
                Value::Number(_) => fail("only something in memory has an address"),
            },
        }
    }

    fn binary(&self, operator: Binary, left: &Expr, right: &Expr) -> Result<Value<'k>, CommandError> {
        let truth = |expr| Ok::<_, CommandError>(self.number(&self.value(expr)?)?.bits != 0);
        let result = match operator {
            Binary::LogicalAnd => Number::int((truth(left)? && truth(right)?).into()),
            Binary::LogicalOr => Number::int((truth(left)? || truth(right)?).into()),
            Binary::Repeat => {
                let Value::Place(first) = self.value(left)? else {
                    return fail("left of '@' stands what is in memory, such as *POINTER");
                };
                let count = self.number(&self.value(right)?)?.bits;
                let ty = self.types.array_of(first.ty, count);
                let ty = ty.ok_or_else(|| CommandError("too many types were made".into()))?;
                return Ok(Value::Place(self.kernel.object_of(ty, first.at)?));
            }
            _ => {
                let (a, b) = (self.number(&self.value(left)?)?, self.number(&self.value(right)?)?);
                self.arithmetic(operator, a, b)?
            }
        };
        Ok(Value::Number(result))
    }

    fn arithmetic(&self, operator: Binary, a: Number, b: Number) -> Result<Number, CommandError> {
        let moved = |pointer: Number, to: TypeId, by: u64| Number {
            bits: pointer.bits.wrapping_add(by.wrapping_mul(self.step(to))),
            ..pointer
        };
        match (operator, self.target(&a), self.target(&b)) {
            (Binary::Add, Some(to), None) => return Ok(moved(a, to, b.bits)),
            (Binary::Add, None, Some(to)) => return Ok(moved(b, to, a.bits)),
            (Binary::Subtract, Some(to), None) => return Ok(moved(a, to, b.bits.wrapping_neg())),
            (Binary::Subtract, Some(to), Some(_)) => {
                let bytes = a.bits.wrapping_sub(b.bits) as i64;
                let items = bytes.checked_div(self.step(to) as i64);
                return match items {
                    Some(items) => Ok(Number::new(items as u64, 8, true)),
                    None => fail("what they point at has no size"),
                };
            }
            _ => {}
        }
        a.binary(operator, b).map_err(|why| CommandError(why.into()))
    }

    fn cast(&self, ty: TypeId, inner: Value<'k>) -> Result<Value<'k>, CommandError> {
        let stripped = self.types.strip(ty).map(|(_, ty)| ty);
        let kind = stripped.as_deref().map(|ty| &ty.shape);
        match (kind, inner) {
            (Some(Shape::Int { size, signed, kind }), _) => {
                let number = self.number_or_address(&inner)?;
                let bits = match kind {
                    crate::debuginfo::types::IntKind::Bool => u64::from(number.bits != 0),
                    _ => number.bits,
                };
                Ok(Value::Number(Number::new(bits, (*size).into(), *signed).of(ty)))
            }
            (Some(Shape::Enum { size, signed, .. }), _) => {
                let number = self.number(&inner)?;
                Ok(Value::Number(Number::new(number.bits, (*size).into(), *signed).of(ty)))
            }
            (Some(Shape::Pointer(_)), _) => {
                Ok(Value::Number(Number::long(self.number_or_address(&inner)?.bits).of(ty)))
            }
            // gdb sees what lies there as another type.
            (Some(Shape::Composite { .. } | Shape::Array { .. }), Value::Place(place)) => {
                Ok(Value::Place(self.kernel.object_of(ty, place.at)?))
            }
            (Some(Shape::Composite { .. } | Shape::Array { .. }), Value::Symbol(at)) => {
                Ok(Value::Place(self.kernel.object_of(ty, at)?))
            }
            _ => fail(format!("nothing can be cast to '{}'", printable(&self.types.spell(ty)))),
        }
    }

    /// As [`Self::number`]; a symbol without a type is read as the address that assembly takes it for.
    fn number_or_address(&self, value: &Value<'k>) -> Result<Number, CommandError> {
        match value {
            Value::Symbol(at) => Ok(Number::long(at.0)),
            _ => self.number(value),
        }
    }
}
