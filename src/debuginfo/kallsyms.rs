//! kallsyms: the symbol table that a kernel carries in its own memory, from bytes of its image.
//!
//! Knows the tables' encodings and how they lie beside each other, and checks a guess by their own consistency;
//! knows neither where an image is nor which kernel it is of.
//! Source: `scripts/kallsyms.c` (`write_src`), `kernel/kallsyms.c` (`kallsyms_expand_symbol`, `kallsyms_sym_address`).

use super::symbols::{Entry, SymbolTable};
use crate::bytes::{cstr_at, u16_at, u32_at, u64_at};

/// Symbols of the largest kernels are some 300,000.
const SYMBOLS_MAX: usize = 1 << 22;
/// `KSYM_NAME_LEN` is 512, 128 before v6.1.
const NAME_MAX: usize = 1024;
/// Room for a name with its letter and end: more than the average of any kernel.
const NAME_USUAL: usize = 32;
/// Most tokens are no longer.
const SHORT: usize = 16;
/// Bytes of all names together; kernels have some 6 MiB.
const STRINGS_MAX: usize = 64 << 20;
/// Tables are aligned to 8 bytes or, since they hold nothing wider (in v7.0), to 4.
const ALIGNS: [usize; 2] = [8, 4];
/// The smaller of these.
const ALIGN: usize = 4;
/// Places looked at in one search.
const STEPS_MAX: usize = 1 << 26;

/// What is wrong with a table.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A table runs past the bytes that were given.
    #[error("kallsyms: {0} runs past the end")]
    CutShort(&'static str),
    /// The number of symbols is none that a kernel has.
    #[error("kallsyms: {0} symbols")]
    Count(usize),
    /// The compressed names make no sense.
    #[error("kallsyms: name {index} makes no sense: {what}")]
    Name {
        /// Which symbol.
        index: usize,
        /// What is wrong, as half a sentence.
        what: &'static str,
    },
}

/// Where the tables of names are: offsets into the bytes of an image.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Layout {
    /// `kallsyms_num_syms`.
    pub num_syms: usize,
    /// `kallsyms_names`.
    pub names: usize,
    /// `kallsyms_token_table`.
    pub token_table: usize,
    /// `kallsyms_token_index`.
    pub token_index: usize,
}

/// Where the addresses are and what a number among them means.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Addresses {
    /// Offset of the table in the bytes of the image.
    pub table: usize,
    /// Its encoding.
    pub encoding: Encoding,
}

/// What a number in the table of addresses means.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Encoding {
    /// `kallsyms_addresses`: the address itself, 8 bytes. Without CONFIG_KALLSYMS_BASE_RELATIVE, and before v4.6.
    Absolute,
    /// `kallsyms_offsets`: 4 bytes, counted from `kallsyms_relative_base`.
    Relative {
        /// `kallsyms_relative_base`.
        base: u64,
    },
    /// The same with CONFIG_KALLSYMS_ABSOLUTE_PERCPU: a number that is not negative is an address (of a per-CPU
    /// variable), -1 is the base, -2 one above it. On x86-64 with SMP until v6.15.
    PerCpuAbsolute {
        /// `kallsyms_relative_base`.
        base: u64,
    },
    /// `kallsyms_offsets`: 4 bytes, signed, counted from the number's own place.
    // Since Linux commit a081b5789255 ("kallsyms: Get rid of kallsyms relative base") (in v7.0).
    PlaceRelative {
        /// Run-time address of the table.
        at: u64,
    },
}

impl Encoding {
    fn width(self) -> usize {
        if self == Self::Absolute { 8 } else { 4 }
    }
}

/// Names and letters of all symbols, in the order of the addresses.
pub struct Names {
    strings: Vec<u8>,
    /// Offset of each name in `strings`, and its letter.
    names: Vec<(u32, u8)>,
}

impl Names {
    /// Expands the names in `image`.
    pub fn expand(image: &[u8], layout: &Layout) -> Result<Self, Error> {
        let count = u32_at(image, layout.num_syms).ok_or(Error::CutShort("kallsyms_num_syms"))? as usize;
        if !(1..=SYMBOLS_MAX).contains(&count) {
            return Err(Error::Count(count));
        }
        let tokens = tokens(image, layout).ok_or(Error::CutShort("kallsyms_token_table"))?;
        let compressed = image.get(layout.names..).ok_or(Error::CutShort("kallsyms_names"))?;
        let (mut strings, mut names, mut at) =
            (Vec::with_capacity(count * NAME_USUAL), Vec::with_capacity(count), 0);
        for index in 0..count {
            let name = record(compressed, at).ok_or(Error::Name { index, what: "it is cut short" })?;
            at += name.len() + if name.len() > 0x7f { 2 } else { 1 };
            let start = strings.len();
            for &byte in name {
                let Some((token, padded)) = tokens.get(usize::from(byte)) else { continue };
                match SHORT.checked_sub(token.len()) {
                    // A length that the compiler knows takes two instructions.
                    Some(excess) => {
                        strings.extend_from_slice(padded);
                        strings.truncate(strings.len() - excess);
                    }
                    None => strings.extend_from_slice(token),
                }
            }
            if strings.len() - start > NAME_MAX || strings.len() > STRINGS_MAX {
                return Err(Error::Name { index, what: "it is too long" });
            }
            // The letter is the first character.
            let letter = strings.get(start).copied();
            let letter =
                letter.filter(u8::is_ascii_graphic).ok_or(Error::Name { index, what: "no letter" })?;
            names.push((start as u32 + 1, letter));
            strings.push(0);
        }
        Ok(Self { strings, names })
    }

    /// Which symbol the first one called `name` is.
    pub fn position(&self, name: &str) -> Option<usize> {
        // A search in the text: an index would be asked once.
        let wanted = [name.as_bytes(), &[0]].concat();
        memchr::memmem::find_iter(&self.strings, &wanted)
            .find_map(|at| self.names.binary_search_by_key(&at, |&(start, _)| start as usize).ok())
    }

    /// The symbols at `addresses`; each reaches to the next higher one.
    pub fn at_addresses(self, addresses: &[u64]) -> SymbolTable {
        let mut entries: Vec<Entry> = std::iter::zip(&self.names, addresses)
            .map(|(&(name, letter), &addr)| Entry { addr, size: 0, name, letter })
            .collect();
        let mut above: Option<(u64, u64)> = None;
        for entry in entries.iter_mut().rev() {
            // Pairs of an address and the next higher one.
            let next = match above {
                Some((addr, next)) if addr == entry.addr => next,
                Some((addr, _)) => addr,
                None => entry.addr,
            };
            // What lies 2 GiB further on is in another part of memory.
            entry.size = next.checked_sub(entry.addr).filter(|&size| size < 1 << 31).unwrap_or(0);
            above = Some((entry.addr, next));
        }
        SymbolTable::new(entries, self.strings)
    }

    /// How many symbols there are.
    pub fn len(&self) -> usize {
        self.names.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.names.is_empty()
    }
}

impl Addresses {
    /// The run-time addresses of `count` symbols.
    pub fn decode(&self, image: &[u8], count: usize) -> Result<Vec<u64>, Error> {
        let len = count.saturating_mul(self.encoding.width());
        let table = self.table.checked_add(len).and_then(|end| image.get(self.table..end));
        let table = table.ok_or(Error::CutShort("the table of addresses"))?;
        let words = || table.chunks_exact(4).filter_map(|word| u32_at(word, 0));
        Ok(match self.encoding {
            Encoding::Absolute => table.chunks_exact(8).filter_map(|word| u64_at(word, 0)).collect(),
            Encoding::Relative { base } => {
                words().map(|offset| base.wrapping_add(u64::from(offset))).collect()
            }
            Encoding::PerCpuAbsolute { base } => words()
                .map(|offset| match offset as i32 {
                    absolute @ 0.. => absolute as u64,
                    below => base.wrapping_sub(1).wrapping_sub(below as i64 as u64),
                })
                .collect(),
            Encoding::PlaceRelative { at } => (0..)
                .zip(words())
                .map(|(i, offset): (u64, u32)| {
                    at.wrapping_add(4 * i).wrapping_add(offset as i32 as i64 as u64)
                })
                .collect(),
        })
    }
}

impl Layout {
    /// Finds the tables in `image`, whose first byte lies on a page boundary, by what they are made of; the
    /// first that are consistent with each other.
    pub fn find(image: &[u8]) -> Option<Self> {
        let mut steps = STEPS_MAX;
        let starts = (0..).step_by(ALIGN).zip(image.chunks_exact(ALIGN));
        let mut indexes = starts.filter(|(_, word)| {
            // The index begins with 0 and the length of the first token; zeros and text do not.
            matches!((u16_at(word, 0), u16_at(word, 2)), (Some(0), Some(1..=0xff)))
        });
        indexes.find_map(|(token_index, _): (usize, _)| {
            let token_table = find_token_table(image, token_index)?;
            let (num_syms, names) = find_names(image, token_table, &mut steps)?;
            Some(Self { num_syms, names, token_table, token_index })
        })
    }

    /// Where the addresses can be, for each order that kernels have had; `base` is the image's run-time address.
    pub fn candidates(&self, image: &[u8], base: u64) -> Vec<Addresses> {
        let Some(count) = u32_at(image, self.num_syms) else { return Vec::new() };
        let count = count as usize;
        let narrow = count.saturating_mul(4).next_multiple_of(8);
        let mut found = Vec::new();
        let relative = |table: usize, base_at: usize| {
            let base = u64_at(image, base_at)?;
            Some(
                [Encoding::PerCpuAbsolute { base }, Encoding::Relative { base }]
                    .map(|encoding| Addresses { table, encoding }),
            )
        };
        // Since about v6.5 they follow the tokens: addresses, then the base.
        let after = self.token_index.saturating_add(512);
        let place = Encoding::PlaceRelative { at: base.wrapping_add(after as u64) };
        found.extend(relative(after, after.saturating_add(narrow)).into_iter().flatten());
        found.push(Addresses { table: after, encoding: place });
        found.push(Addresses { table: after, encoding: Encoding::Absolute });
        // Before, they stood in front of the number of symbols: addresses, then the base.
        if let Some(base_at) = self.num_syms.checked_sub(8)
            && let Some(table) = base_at.checked_sub(narrow)
        {
            found.extend(relative(table, base_at).into_iter().flatten());
        }
        if let Some(table) = self.num_syms.checked_sub(count.saturating_mul(8)) {
            found.push(Addresses { table, encoding: Encoding::Absolute });
        }
        found
    }
}

/// The compressed name at `at` of `names`: behind its length in one byte or, since Linux commit 73bbb94466fd
/// ("kallsyms: support "big" kernel symbols") (in v6.1), two if the first has its top bit set.
fn record(names: &[u8], at: usize) -> Option<&[u8]> {
    let first = usize::from(*names.get(at)?);
    let (start, len) = match first {
        0..=0x7f => (at + 1, first),
        _ => (at + 2, first & 0x7f | usize::from(*names.get(at + 1)?) << 7),
    };
    names.get(start..start.checked_add(len)?).filter(|name| !name.is_empty())
}

/// What each byte of a compressed name stands for, and the same with zeros behind it, if it is short.
fn tokens<'a>(image: &'a [u8], layout: &Layout) -> Option<Vec<(&'a [u8], [u8; SHORT])>> {
    let padded = |token: &'a [u8]| {
        let mut padded = [0; SHORT];
        padded.iter_mut().zip(token).for_each(|(to, &from)| *to = from);
        (token, padded)
    };
    let table = image.get(layout.token_table..)?;
    (0..256)
        .map(|i| {
            cstr_at(table, usize::from(u16_at(image, layout.token_index + 2 * i)?), NAME_MAX).map(padded)
        })
        .collect()
}

/// The table of tokens that ends where the index at `token_index` begins, if that is one.
fn find_token_table(image: &[u8], token_index: usize) -> Option<usize> {
    let index: Vec<usize> =
        (0..256).map_while(|i| u16_at(image, token_index + 2 * i).map(usize::from)).collect();
    let last = *index.get(255)?;
    if !index.is_sorted_by(|a, b| a < b) {
        return None;
    }
    // The last token's length is not known, nor how much padding follows it.
    let nearest = token_index.checked_sub(last + 1)? / ALIGN * ALIGN;
    let mut starts = (0..NAME_MAX / ALIGN).map_while(|i| nearest.checked_sub(i * ALIGN));
    let fits = |&start: &usize| {
        let Some(table) = image.get(start..token_index) else { return false };
        let Some(tail) = table.get(last..) else { return false };
        let padding = tail.iter().position(|&b| b == 0).and_then(|end| tail.get(end + 1..));
        let ends = index.iter().skip(1).map(|&next| next - 1);
        let zeros = table.iter().take(last).enumerate().filter(|&(_, &b)| b == 0).map(|(at, _)| at);
        let text = |&b: &u8| b == 0 || b.is_ascii_graphic();
        padding.is_some_and(|p| p.len() < 8 && p.iter().all(|&b| b == 0))
            && ends.eq(zeros)
            && table.iter().all(text)
    };
    starts.find(fits)
}

/// The number of symbols and their names somewhere in front of the tokens, told by the markers behind the names:
/// the offset of every 256th name. Takes from `steps` for each place looked at.
fn find_names(image: &[u8], token_table: usize, steps: &mut usize) -> Option<(usize, usize)> {
    let front = image.get(..token_table)?;
    let mut at = token_table / ALIGN * ALIGN;
    loop {
        at = at.checked_sub(ALIGN)?;
        *steps = steps.checked_sub(1)?;
        if u32_at(front, at) != Some(0) {
            continue;
        }
        // A marker has 4 bytes since about v4.20.
        for width in [4, 8] {
            let markers = Markers::at(front, at, width);
            if let Some(names) = markers.and_then(|markers| markers.find_names(front, steps)) {
                return Some(names);
            }
        }
    }
}

/// What looks like markers.
struct Markers {
    /// Offset of the first.
    at: usize,
    marks: Vec<usize>,
}

impl Markers {
    /// Names of 256 symbols take this many bytes.
    const BLOCK: std::ops::RangeInclusive<usize> = 512..=256 * (NAME_MAX + 2);

    /// From the first, which is 0, as far as they ascend as markers do; at least two.
    fn at(front: &[u8], at: usize, width: usize) -> Option<Self> {
        let mut marks = vec![0];
        for i in 1..=SYMBOLS_MAX / 256 {
            let at = at + i * width;
            let next = if width == 4 { u32_at(front, at).map(u64::from) } else { u64_at(front, at) };
            let (Some(next), Some(&last)) = (next.and_then(|n| usize::try_from(n).ok()), marks.last()) else {
                break;
            };
            if !next.checked_sub(last).is_some_and(|block| Self::BLOCK.contains(&block)) {
                break;
            }
            marks.push(next);
        }
        (marks.len() > 1).then_some(Self { at, marks })
    }

    /// The number of symbols and the names that have these markers.
    fn find_names(&self, front: &[u8], steps: &mut usize) -> Option<(usize, usize)> {
        let nearest = self.at.checked_sub(*self.marks.last()?)? / ALIGN * ALIGN;
        for back in (0..*Self::BLOCK.end()).step_by(ALIGN) {
            let names = nearest.checked_sub(back)?;
            *steps = steps.checked_sub(1)?;
            for num_syms in ALIGNS.into_iter().filter_map(|align| names.checked_sub(align)) {
                let count = u32_at(front, num_syms).map_or(0, |n| n as usize);
                if count.div_ceil(256) == self.marks.len() && self.fit(front, names, count, steps) {
                    return Some((num_syms, names));
                }
            }
        }
        None
    }

    /// Whether these are the markers of `count` names at `names`, which end where the markers begin.
    fn fit(&self, front: &[u8], names: usize, count: usize, steps: &mut usize) -> bool {
        let Some(compressed) = front.get(names..self.at) else { return false };
        *steps = steps.saturating_sub(count);
        let mut at = 0;
        for i in 0..count {
            if i % 256 == 0 && self.marks.get(i / 256) != Some(&at) {
                return false;
            }
            let Some(name) = record(compressed, at) else { return false };
            at += name.len() + if name.len() > 0x7f { 2 } else { 1 };
        }
        compressed.len() - at < 8
    }
}
