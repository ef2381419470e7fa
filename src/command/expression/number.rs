//! Arithmetic on C's integers: promotion, wrapping at the type's width, comparisons by signedness.
//!
//! Source: C11 6.3.1 (conversions), 6.5 (operators); what C leaves undefined wraps, as on the machine.

use super::parse::Binary;
use crate::debuginfo::types::TypeId;

/// An integer, pointer or enumerator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Number {
    /// Its value: extended to 64 bits by sign or zeros, as `signed` says.
    pub bits: u64,
    /// Bytes of its type: 1, 2, 4 or 8.
    pub size: u64,
    /// Whether its type has a sign.
    pub signed: bool,
    /// Its type, where it is more than a plain integer, or has a name: pointers, enumerations, what it was cast to.
    pub ty: Option<TypeId>,
}

impl Number {
    /// `bits` cut to `size` bytes and extended again.
    pub fn new(bits: u64, size: u64, signed: bool) -> Self {
        let unused = 64u32.saturating_sub(8 * size.clamp(1, 8) as u32);
        let bits = if signed { ((bits << unused) as i64 >> unused) as u64 } else { bits << unused >> unused };
        Self { bits, size, signed, ty: None }
    }

    /// An `int`: what comparisons give.
    pub fn int(value: i64) -> Self {
        Self::new(value as u64, 4, true)
    }

    /// An `unsigned long`.
    pub fn long(value: u64) -> Self {
        Self::new(value, 8, false)
    }

    /// The same with a type.
    pub fn of(self, ty: TypeId) -> Self {
        Self { ty: Some(ty), ..self }
    }

    /// Integer promotion: nothing is computed in less than an `int`.
    pub fn promoted(self) -> Self {
        if self.size < 4 { Self::new(self.bits, 4, true) } else { Self { ty: None, ..self } }
    }

    /// `-self`
    pub fn minus(self) -> Self {
        let n = self.promoted();
        Self::new(n.bits.wrapping_neg(), n.size, n.signed)
    }

    /// `~self`
    pub fn complement(self) -> Self {
        let n = self.promoted();
        Self::new(!n.bits, n.size, n.signed)
    }

    /// `self OP other`; the error is half a sentence. Never asked for `&&`, `||` and `@`.
    pub fn binary(self, operator: Binary, other: Self) -> Result<Self, &'static str> {
        let (a, b) = (self.promoted(), other.promoted());
        // Shifts have the type of what is shifted.
        if let Binary::ShiftLeft | Binary::ShiftRight = operator {
            let by = if b.bits >= 8 * a.size { 64 } else { b.bits as u32 };
            let bits = match (operator, a.signed) {
                (Binary::ShiftLeft, _) => a.bits.checked_shl(by).unwrap_or(0),
                (_, true) => ((a.bits as i64) >> by.min(63)) as u64,
                (_, false) => a.bits.checked_shr(by).unwrap_or(0),
            };
            return Ok(Self::new(bits, a.size, a.signed));
        }
        let size = a.size.max(b.size);
        let unsigned = |n: Self| !n.signed && n.size == size;
        let signed = !unsigned(a) && !unsigned(b);
        let (a, b) = (Self::new(a.bits, size, signed), Self::new(b.bits, size, signed));
        let (x, y) = (a.bits, b.bits);
        let order = if signed { (x as i64).cmp(&(y as i64)) } else { x.cmp(&y) };
        let truth = |truth: bool| Ok(Self::int(truth.into()));
        let bits = match operator {
            Binary::Multiply => x.wrapping_mul(y),
            Binary::Divide | Binary::Remainder if y == 0 => return Err("division by zero"),
            Binary::Divide if signed => (x as i64).wrapping_div(y as i64) as u64,
            Binary::Divide => x.wrapping_div(y),
            Binary::Remainder if signed => (x as i64).wrapping_rem(y as i64) as u64,
            Binary::Remainder => x.wrapping_rem(y),
            Binary::Add => x.wrapping_add(y),
            Binary::Subtract => x.wrapping_sub(y),
            Binary::And => x & y,
            Binary::Xor => x ^ y,
            Binary::Or => x | y,
            Binary::Less => return truth(order.is_lt()),
            Binary::LessEqual => return truth(order.is_le()),
            Binary::Greater => return truth(order.is_gt()),
            Binary::GreaterEqual => return truth(order.is_ge()),
            Binary::Equal => return truth(order.is_eq()),
            Binary::NotEqual => return truth(order.is_ne()),
            Binary::ShiftLeft
            | Binary::ShiftRight
            | Binary::Repeat
            | Binary::LogicalAnd
            | Binary::LogicalOr => return Err("that is no arithmetic"),
        };
        Ok(Self::new(bits, size, signed))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn arithmetic_is_that_of_c() {
        let int = Number::int;
        let uint = |n| Number::new(n, 4, false);
        let long = |n: i64| Number::new(n as u64, 8, true);
        for (a, op, b, bits, size, signed) in [
            (int(i32::MAX.into()), Binary::Add, int(1), i32::MIN as i64 as u64, 4, true),
            (uint(u32::MAX.into()), Binary::Add, int(1), 0, 4, false),
            (int(-1), Binary::Add, uint(0), u32::MAX.into(), 4, false),
            (int(-1), Binary::Add, long(0), u64::MAX, 8, true),
            (uint(u32::MAX.into()), Binary::Add, long(1), 1 << 32, 8, true),
            (int(-7), Binary::Divide, int(2), -3i64 as u64, 4, true),
            (int(-7), Binary::Remainder, int(2), -1i64 as u64, 4, true),
            (int(-1), Binary::Less, uint(1), 0, 4, true),
            (int(-1), Binary::Less, int(1), 1, 4, true),
            (int(-8), Binary::ShiftRight, int(1), -4i64 as u64, 4, true),
            (int(1), Binary::ShiftLeft, int(31), i32::MIN as i64 as u64, 4, true),
            (int(1), Binary::ShiftLeft, int(32), 0, 4, true),
            (long(1), Binary::ShiftLeft, int(32), 1 << 32, 8, true),
            (int(-1), Binary::ShiftRight, int(99), u64::MAX, 4, true),
            (Number::new(0xff, 1, false), Binary::Add, Number::new(1, 1, false), 0x100, 4, true),
            (long(i64::MIN), Binary::Divide, int(-1), i64::MIN as u64, 8, true),
        ] {
            assert_eq!(a.binary(op, b).unwrap(), Number::new(bits, size, signed), "{a:?} {op:?} {b:?}");
        }
        assert!(int(1).binary(Binary::Divide, int(0)).is_err());
        assert!(int(1).binary(Binary::Remainder, int(0)).is_err());
        assert_eq!(Number::new(0x1ff, 1, true).bits, u64::MAX);
        assert_eq!(Number::new(1, 1, false).complement(), int(-2));
    }
}
