//! Addresses: one type per kind, and the only place where they are added to.
//!
//! Source: `arch/x86/include/asm/page_types.h` (PAGE_SHIFT), Intel SDM vol. 3 ch. 4 (widths).

use std::fmt;

/// Bytes in a base page.
pub const PAGE_SIZE: u64 = 4096;

macro_rules! address {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub u64);

        impl $name {
            /// The address `n` bytes up, or `None` past the end of the address space.
            pub fn checked_add(self, n: u64) -> Option<Self> {
                self.0.checked_add(n).map(Self)
            }
            /// The address `n` bytes up, wrapping: for modular arithmetic such as a slide.
            pub fn wrapping_add(self, n: u64) -> Self {
                Self(self.0.wrapping_add(n))
            }
            /// Bytes from `base` up to this address, or `None` if it lies below `base`.
            pub fn offset_from(self, base: Self) -> Option<u64> {
                self.0.checked_sub(base.0)
            }
            /// Offset inside its base page.
            pub fn page_offset(self) -> u64 {
                self.0 % PAGE_SIZE
            }
            /// The first byte of its base page.
            pub fn page_start(self) -> Self {
                Self(self.0 - self.page_offset())
            }
            /// Bytes from here to the end of its base page, 1 to 4096.
            pub fn left_in_page(self) -> u64 {
                PAGE_SIZE - self.page_offset()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }
        impl fmt::LowerHex for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::LowerHex::fmt(&self.0, f)
            }
        }
    };
}

address! {
    /// A virtual address: means something only in an address space.
    VirtAddr
}
address! {
    /// A guest-physical address.
    PhysAddr
}

impl PhysAddr {
    /// The number of the page frame this address lies in.
    pub fn pfn(self) -> Pfn {
        Pfn(self.0 / PAGE_SIZE)
    }
}

/// A page frame number: a physical address divided by 4096.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Pfn(pub u64);

impl Pfn {
    /// The first byte of the frame, or `None` where that is no 64-bit address.
    pub fn phys(self) -> Option<PhysAddr> {
        self.0.checked_mul(PAGE_SIZE).map(PhysAddr)
    }
}

impl fmt::Display for Pfn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// Physical memory from `start` up to, not including, `end`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct PhysRange {
    /// First byte.
    pub start: PhysAddr,
    /// One past the last byte; never below `start`.
    pub end: PhysAddr,
}

impl PhysRange {
    /// `len` bytes from `start`; `None` if they run past the end of the address space.
    pub fn new(start: PhysAddr, len: u64) -> Option<Self> {
        Some(Self { start, end: start.checked_add(len)? })
    }
    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.end.0 - self.start.0
    }
    /// Whether the range holds no byte.
    pub fn is_empty(&self) -> bool {
        self.end <= self.start
    }
    /// Whether `at` lies inside.
    pub fn contains(&self, at: PhysAddr) -> bool {
        self.start <= at && at < self.end
    }
}

impl fmt::Display for PhysRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}-{:#x}", self.start.0, self.end.0)
    }
}

/// Sorts `ranges`, joins those that touch or overlap, and drops empty ones.
pub fn join_ranges(mut ranges: Vec<PhysRange>) -> Vec<PhysRange> {
    ranges.sort();
    let mut joined: Vec<PhysRange> = Vec::new();
    for range in ranges {
        match joined.last_mut() {
            _ if range.is_empty() => {}
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => joined.push(range),
        }
    }
    joined
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_arithmetic() {
        let at = VirtAddr(0xffff_ffff_8100_0ff8);
        assert_eq!(at.page_offset(), 0xff8);
        assert_eq!(at.left_in_page(), 8);
        assert_eq!(at.page_start(), VirtAddr(0xffff_ffff_8100_0000));
        assert_eq!(VirtAddr(u64::MAX).checked_add(1), None);
        assert_eq!(VirtAddr(u64::MAX).left_in_page(), 1);
    }

    #[test]
    fn ranges_join_when_they_touch() {
        let range = |a, b| PhysRange { start: PhysAddr(a), end: PhysAddr(b) };
        let joined = join_ranges(vec![range(8, 9), range(0, 4), range(4, 6), range(5, 7), range(3, 3)]);
        assert_eq!(joined, [range(0, 7), range(8, 9)]);
    }
}
