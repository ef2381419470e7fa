//! The stack depot: stacks that the kernel's debugging keeps, each once, and names by a handle of 32 bits.
//!
//! Knows handles, pools and records; who keeps a handle, and since when, is the business of others. A record holds its
//! own handle, by which every answer is checked. Source: `lib/stackdepot.c`, `include/linux/stackdepot.h`.

use super::{Kernel, ObjectError};
use crate::addr::VirtAddr;
use crate::bytes::u64_at;

/// CONFIG_STACKDEPOT_MAX_FRAMES as it comes; page_owner keeps 16.
const FRAMES_MAX: u64 = 64;
/// Log2 of DEPOT_STACK_ALIGN: handles count in these units.
const ALIGN_BITS: u32 = 4;

/// Bits of a handle.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Bits {
    lowest: u32,
    width: u32,
}

impl Bits {
    fn mask(self) -> u32 {
        let ones = u32::MAX.checked_shr(32u32.saturating_sub(self.width)).unwrap_or(0);
        ones.checked_shl(self.lowest).unwrap_or(0)
    }

    fn of(self, handle: u32) -> u64 {
        (handle & self.mask()).checked_shr(self.lowest).unwrap_or(0).into()
    }
}

/// `union handle_parts`: what the bits of a handle say.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct HandleParts {
    pool: Bits,
    offset: Bits,
    /// Whether the member's name says that pools are counted from 1.
    from_one: bool,
}

impl HandleParts {
    /// Newest name first.
    const POOLS: [&'static str; 3] = ["pool_index_plus_1", "pool_index", "slabindex"];

    fn new(kernel: &Kernel) -> Result<Self, ObjectError> {
        let union = kernel.object("handle_parts", VirtAddr(0))?;
        let bits = |names: &[&str]| {
            let member = union.either(names)?;
            let (lowest, width) = match member.bit_field() {
                Some(bits) => bits,
                None => (0, (member.size()? * 8).min(32) as u32),
            };
            Ok::<_, ObjectError>(Bits {
                lowest: lowest.saturating_add((member.at.0 * 8).min(32) as u32),
                width,
            })
        };
        let (pool, offset) = (bits(&Self::POOLS)?, bits(&["offset"])?);
        Ok(Self { pool, offset, from_one: union.has("pool_index_plus_1") })
    }

    /// Pools that the record may be in: while it was called `pool_index` it was once counted from 0 and later from 1.
    fn pools(&self, handle: u32) -> impl Iterator<Item = u64> {
        let index = self.pool.of(handle);
        let from_zero = (!self.from_one).then_some(index);
        from_zero.into_iter().chain(index.checked_sub(1))
    }

    /// Bytes from the start of the pool.
    fn offset(&self, handle: u32) -> u64 {
        self.offset.of(handle) << ALIGN_BITS
    }

    /// Whether both name one record; other bits are the user's, or say that it is a handle at all.
    fn same(&self, a: u32, b: u32) -> bool {
        (a ^ b) & (self.pool.mask() | self.offset.mask()) == 0
    }
}

/// The kernel's stack depot.
pub struct StackDepot<'k> {
    kernel: &'k Kernel,
    parts: HandleParts,
    /// Where pointers to pools begin: since about v6.19 the variable points at them, before it held them.
    tables: [Option<VirtAddr>; 2],
}

impl<'k> StackDepot<'k> {
    /// The depot of `kernel`; an error if it has none.
    pub fn new(kernel: &'k Kernel) -> Result<Self, ObjectError> {
        let parts = HandleParts::new(kernel)?;
        // Called stack_slabs until v6.2.
        let variable = ["stack_pools", "stack_slabs"].iter().find_map(|name| kernel.symbol(name));
        let variable = variable.ok_or_else(|| ObjectError::NoSymbol("stack_pools".into()))?;
        Ok(Self { kernel, parts, tables: [Some(variable), kernel.base_of(variable)] })
    }

    /// The return addresses of the stack with this handle, innermost first.
    pub fn fetch(&self, handle: u32) -> Result<Vec<VirtAddr>, ObjectError> {
        let mut problem = ObjectError::NotA {
            what: format!("stack depot handle {handle:#x}"),
            wanted: "the handle of a stack in the depot",
        };
        for table in self.tables.into_iter().flatten() {
            for pool in self.parts.pools(handle) {
                let Some(pool) = self.kernel.base_of(table.wrapping_add(pool.wrapping_mul(8))) else {
                    continue;
                };
                let record =
                    self.kernel.object("stack_record", pool.wrapping_add(self.parts.offset(handle)))?;
                match record.get("handle.handle") {
                    Ok(own) if self.parts.same(own as u32, handle) => return self.entries(record),
                    Ok(_) => {}
                    Err(error) => problem = error,
                }
            }
        }
        Err(problem)
    }

    fn entries(&self, record: super::Object<'_>) -> Result<Vec<VirtAddr>, ObjectError> {
        let count = record.get("size")?;
        if count > FRAMES_MAX {
            return Err(ObjectError::NotA {
                what: format!("stack of {count} entries at {}", record.at),
                wanted: "one that the kernel would keep",
            });
        }
        let at = record.member("entries")?.at;
        let mut bytes = vec![0; count as usize * 8];
        match self.kernel.read(at, &mut bytes).stopped {
            Some(why) => Err(ObjectError::Unreadable { what: "stack".into(), at, why: why.to_string() }),
            None => Ok(bytes.chunks_exact(8).filter_map(|word| u64_at(word, 0)).map(VirtAddr).collect()),
        }
    }
}

impl Kernel {
    /// The kernel address that is stored at `at`.
    fn base_of(&self, at: VirtAddr) -> Option<VirtAddr> {
        self.read_u64(at).map(VirtAddr).filter(|at| at.0 >> 63 == 1)
    }
}

#[cfg(test)]
mod tests {
    use super::{Bits, HandleParts};

    /// v6.1: 16 bits of `slabindex`, 10 of `offset`, `valid`, 5 of `extra`.
    const SLABS: HandleParts = HandleParts {
        pool: Bits { lowest: 0, width: 16 },
        offset: Bits { lowest: 16, width: 10 },
        from_one: false,
    };
    /// v6.12: 17 bits of `pool_index_plus_1`, 10 of `offset`, 5 of `extra`.
    const POOLS: HandleParts = HandleParts {
        pool: Bits { lowest: 0, width: 17 },
        offset: Bits { lowest: 17, width: 10 },
        from_one: true,
    };

    #[test]
    fn a_handle_names_a_pool_and_a_place_in_it() {
        let handle = 3 | 0x155 << 16 | 1 << 26;
        assert_eq!(SLABS.pools(handle).collect::<Vec<_>>(), [3, 2]);
        assert_eq!(SLABS.offset(handle), 0x1550);
        let handle = 3 | 0x155 << 17;
        assert_eq!(POOLS.pools(handle).collect::<Vec<_>>(), [2]);
        assert_eq!(POOLS.offset(handle), 0x1550);
        // The largest offset is below the four pages of a pool.
        assert_eq!(POOLS.offset(u32::MAX), 0x3ff0);
        assert_eq!(POOLS.pools(u32::MAX).collect::<Vec<_>>(), [0x1fffe]);
    }

    #[test]
    fn there_is_no_pool_before_the_first() {
        assert_eq!(SLABS.pools(1 << 26).collect::<Vec<_>>(), [0]);
        assert_eq!(POOLS.pools(0x155 << 17).count(), 0);
    }

    #[test]
    fn extra_bits_are_the_users() {
        assert!(POOLS.same(3 | 0x155 << 17, 3 | 0x155 << 17 | 0x1f << 27));
        assert!(!POOLS.same(3 | 0x155 << 17, 3 | 0x156 << 17));
        assert!(!SLABS.same(3, 2));
        assert!(SLABS.same(3 | 1 << 26, 3));
    }

    #[test]
    fn absurd_widths_are_no_panic() {
        let absurd = Bits { lowest: 40, width: 64 };
        assert_eq!((absurd.mask(), absurd.of(u32::MAX)), (0, 0));
        assert_eq!(Bits { lowest: 0, width: 0 }.mask(), 0);
        assert_eq!(Bits { lowest: 0, width: 32 }.of(7), 7);
    }
}
