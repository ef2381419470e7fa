//! Page types: what `page_type`, which lies over `_mapcount`, says of pages that no one can map.
//!
//! Three encodings have been: inverted bits that only macros name, inverted bits in `enum pagetype`, and since about
//! v6.12 a number in the top byte. Source: `include/linux/page-flags.h` (`enum pagetype`).

use crate::debuginfo::types::{Class, Shape};
use crate::kernel::Kernel;

/// How this kernel writes page types.
pub enum PageTypes {
    /// Top byte: (value, name without prefix).
    Values(Vec<(u8, String)>),
    /// A cleared bit below a base: (bits, name).
    Inverted {
        /// Bits that are set in every page with a type.
        base: u32,
        /// Bits that are all clear in a page of the type.
        bits: Vec<(u32, String)>,
    },
}

/// `PG_buddy` and its kin before they were in an enumeration; hugetlb and slab were the last to come.
const MACROS: [(u32, &str); 6] = [
    (0x80, "buddy"),
    (0x100, "offline"),
    (0x200, "table"),
    (0x400, "guard"),
    (0x800, "hugetlb"),
    (0x1000, "slab"),
];
/// The same while pages charged to a memory cgroup had a type: v4.18 to v5.10.
const MACROS_WITH_KMEMCG: [(u32, &str); 5] =
    [(0x80, "buddy"), (0x100, "offline"), (0x200, "kmemcg"), (0x400, "table"), (0x800, "guard")];

impl PageTypes {
    pub(super) fn new(kernel: &Kernel) -> Self {
        let named: Vec<(String, i64)> = kernel
            .types()
            .and_then(|types| Some((types, types.find(Class::Enum, "pagetype")?)))
            .and_then(|(types, id)| types.strip(id))
            .map(|(_, ty)| match &ty.shape {
                Shape::Enum { values, .. } => values.clone(),
                _ => Vec::new(),
            })
            .unwrap_or_default();
        let with = |prefix: &str| -> Vec<(u32, String)> {
            let stripped = named.iter().filter_map(|(name, value)| Some((name.strip_prefix(prefix)?, value)));
            stripped.map(|(name, &value)| (value as u32, name.to_owned())).collect()
        };
        let values = with("PGTY_");
        if !values.is_empty() {
            let byte = |(value, name): (u32, String)| Some((u8::try_from(value).ok()?, name));
            return Self::Values(values.into_iter().filter_map(byte).filter(|(v, _)| *v != 0xff).collect());
        }
        let bits = with("PG_");
        if !bits.is_empty() {
            return Self::Inverted { base: 0x8000_0000, bits };
        }
        let own = |list: &[(u32, &str)]| list.iter().map(|&(bit, name)| (bit, name.to_owned())).collect();
        // Since Linux commit 18b2db3b0385 ("mm: Convert page kmemcg type to a page memcg flag") (in v5.11).
        let bits =
            if kernel.has_member("page", "mem_cgroup") { own(&MACROS_WITH_KMEMCG) } else { own(&MACROS) };
        Self::Inverted { base: 0xf000_0000, bits }
    }

    /// The types of a page with this `page_type`; none if the word is a map count.
    pub fn of(&self, word: u32) -> impl Iterator<Item = &str> {
        let (value, bits) = match self {
            Self::Values(values) => {
                let found = values.iter().find(|(value, _)| u32::from(*value) == word >> 24);
                (found.map(|(_, name)| name.as_str()), [].as_slice())
            }
            // A page that was unmapped too often has a small negative count, and no type.
            Self::Inverted { base, bits } if word & base == *base && (word as i32) < -128 => {
                (None, bits.as_slice())
            }
            Self::Inverted { .. } => (None, [].as_slice()),
        };
        let cleared = bits.iter().filter(move |(bit, _)| word & bit == 0);
        value.into_iter().chain(cleared.map(|(_, name)| name.as_str()))
    }

    /// Whether `word` says that the page is of type `name`.
    pub fn is(&self, word: u32, name: &str) -> bool {
        self.of(word).any(|known| known == name)
    }
}
