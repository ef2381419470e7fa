//! Finding the kernel's own symbol table in its memory: by VMCOREINFO, or by what it is made of.
//!
//! Believed only if its addresses ascend and its `_stext` or `_text` is where the kernel was found.
//! Source: `kernel/vmcore_info.c` (`SYMBOL(kallsyms_*)`), `Documentation/arch/x86/x86_64/mm.rst`.

use super::{Found, START_KERNEL_MAP};
use crate::addr::{PAGE_SIZE, VirtAddr};
use crate::arch::x86_64::{AddressSpace, TranslateError};
use crate::backend::Backend;
use crate::debuginfo::SymbolTable;
use crate::debuginfo::kallsyms::{self, Addresses, Encoding, Layout, Names};

/// How much of an image is searched; its code and constants are some 40 MiB.
const IMAGE_MAX: u64 = 128 << 20;
/// Room for all tables together, where VMCOREINFO tells their places; they take some 5 MiB.
const TABLES_MAX: u64 = 64 << 20;
/// Bit 63 of a page-table entry: no code here.
const NX: u64 = 1 << 63;

/// Why there is no symbol table.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoKallsyms {
    /// Nothing in the image looks like one.
    #[error(
        "no symbol table (kallsyms) was found in the kernel's memory (CONFIG_KALLSYMS off, or not there to be read)"
    )]
    NotFound,
    /// VMCOREINFO tells where it is, but it is not there.
    #[error("the kernel's symbol table (kallsyms) at {at} cannot be read")]
    Unreadable {
        /// Where the tables begin.
        at: VirtAddr,
    },
    /// Something like one that is damaged.
    #[error("the kernel's symbol table at {at} is damaged: {source}")]
    Damaged {
        /// Where the names begin.
        at: VirtAddr,
        /// What is wrong with it.
        source: kallsyms::Error,
    },
    /// One that does not fit the kernel.
    #[error("the symbol table with names at {at} is not this kernel's: its addresses do not fit")]
    Foreign {
        /// Where the names begin.
        at: VirtAddr,
    },
}

/// A piece of the image and where it lies.
struct Piece {
    at: VirtAddr,
    bytes: Vec<u8>,
}

/// The symbols that the kernel at `found` carries in memory, at link-time addresses: KASLR taken off those in the image.
pub fn find(backend: &dyn Backend, found: &Found) -> Result<SymbolTable, NoKallsyms> {
    let mut why = NoKallsyms::NotFound;
    let mut keep = |result| match result {
        Ok(table) => Some(table),
        Err(NoKallsyms::NotFound) => None,
        Err(error) => {
            why = error;
            None
        }
    };
    if let Some(table) = told(backend, found).and_then(&mut keep) {
        return Ok(table);
    }
    // Constants are not executable, once the kernel has protected itself: that is, but for the first second.
    for executable in [false, true] {
        let pieces = pieces(backend, &found.space, found.text, executable);
        let in_piece = |piece: Piece| {
            let layout = Layout::find(&piece.bytes).ok_or(NoKallsyms::NotFound)?;
            let candidates = layout.candidates(&piece.bytes, piece.at.0);
            read(found, &piece, &layout, &candidates)
        };
        if let Some(table) = pieces.map(in_piece).find_map(&mut keep) {
            return Ok(table);
        }
    }
    Err(why)
}

/// By VMCOREINFO. Since Linux commit 5fd8fea935a1 ("vmcoreinfo: include kallsyms symbols") (in v6.0); `None` before.
fn told(backend: &dyn Backend, found: &Found) -> Option<Result<SymbolTable, NoKallsyms>> {
    let symbol = |name: &str| found.vmcoreinfo.symbol(name);
    let (names, num_syms) = (symbol("kallsyms_names")?, symbol("kallsyms_num_syms")?);
    let (token_table, token_index) = (symbol("kallsyms_token_table")?, symbol("kallsyms_token_index")?);
    let addresses = symbol("kallsyms_offsets").or(symbol("kallsyms_addresses"))?;
    let all = [names, num_syms, token_table, token_index, addresses];
    let start = all.into_iter().chain(symbol("kallsyms_relative_base")).min()?;
    let unreadable = Err(NoKallsyms::Unreadable { at: start });

    let space = &found.space;
    let word = |at: VirtAddr| {
        let mut word = [0; 8];
        space.read(backend, at, &mut word).stopped.is_none().then(|| u64::from_le_bytes(word))
    };
    let Some(count) = word(num_syms).map(|n| n & 0xffff_ffff) else { return Some(unreadable) };
    // Names end somewhere before the tokens; the other tables' lengths are known.
    let ends =
        [token_index.checked_add(512)?, addresses.checked_add(count * 8)?, names.checked_add(PAGE_SIZE)?];
    let len = ends.into_iter().max()?.offset_from(start)?.min(TABLES_MAX);
    let mut bytes = vec![0; len as usize];
    let filled = space.read(backend, start, &mut bytes).filled;
    bytes.truncate(filled);

    let offset = |at: VirtAddr| (at.0 - start.0) as usize;
    let layout = Layout {
        num_syms: offset(num_syms),
        names: offset(names),
        token_table: offset(token_table),
        token_index: offset(token_index),
    };
    let encodings = match (symbol("kallsyms_offsets"), symbol("kallsyms_relative_base")) {
        (None, _) => vec![Encoding::Absolute],
        (Some(at), None) => vec![Encoding::PlaceRelative { at: at.0 }],
        (Some(_), Some(base)) => match word(base) {
            Some(base) => vec![Encoding::PerCpuAbsolute { base }, Encoding::Relative { base }],
            None => return Some(unreadable),
        },
    };
    let table = offset(addresses);
    let candidates: Vec<_> = encodings.into_iter().map(|encoding| Addresses { table, encoding }).collect();
    Some(read(found, &Piece { at: start, bytes }, &layout, &candidates))
}

/// The readable pieces of the image that are mapped with, or without, permission to execute. Pages that the
/// kernel freed in between are mapped and no longer in the dump.
fn pieces<'a>(
    backend: &'a dyn Backend,
    space: &'a AddressSpace,
    text: VirtAddr,
    executable: bool,
) -> impl Iterator<Item = Piece> + 'a {
    let end = VirtAddr(text.0.saturating_add(IMAGE_MAX));
    let mut at = text;
    let mut scratch = vec![0; super::IMAGE_ALIGN as usize];
    std::iter::from_fn(move || {
        let mut piece = Piece { at, bytes: Vec::new() };
        while at < end {
            let step = match space.translate(backend, at) {
                Ok(t) if (t.leaf.entry & NX == 0) == executable => {
                    let page = scratch.get_mut(..t.left_in_page.min(super::IMAGE_ALIGN) as usize)?;
                    let filled = space.read(backend, at, page).filled;
                    if piece.bytes.is_empty() {
                        piece.at = at;
                    }
                    piece.bytes.extend_from_slice(page.get(..filled)?);
                    if filled == page.len() {
                        at = at.checked_add(filled as u64)?;
                        continue;
                    }
                    filled as u64 + VirtAddr(filled as u64).left_in_page()
                }
                Ok(t) => t.left_in_page,
                Err(error) => unmapped_step(&error, at),
            };
            at = at.checked_add(step)?;
            if !piece.bytes.is_empty() {
                break;
            }
        }
        (!piece.bytes.is_empty()).then_some(piece)
    })
}

/// Bytes up to where a walk can end otherwise than it did at `at`.
fn unmapped_step(error: &TranslateError, at: VirtAddr) -> u64 {
    let span = match error {
        TranslateError::NotPresent { step, .. } => step.level.span(),
        TranslateError::TableUnreadable { level, .. } => level.span(),
        _ => PAGE_SIZE,
    };
    span - at.0 % span
}

/// The table with the first of `candidates` for its addresses that fits the kernel.
fn read(
    found: &Found,
    piece: &Piece,
    layout: &Layout,
    candidates: &[Addresses],
) -> Result<SymbolTable, NoKallsyms> {
    let at = piece.at.wrapping_add(layout.names as u64);
    let names = Names::expand(&piece.bytes, layout).map_err(|source| NoKallsyms::Damaged { at, source })?;
    let (stext, text) = (names.position("_stext"), names.position("_text"));
    let fits = |addresses: &[u64]| {
        let address = |index: Option<usize>| index.and_then(|i| addresses.get(i)).copied().map(VirtAddr);
        let in_place = match (address(stext), found.vmcoreinfo.symbol("_stext"), address(text)) {
            (Some(stext), Some(told), _) => stext == told,
            (_, _, Some(text)) => text == found.text,
            (Some(stext), None, None) => {
                stext.offset_from(found.text).is_some_and(|o| o < super::IMAGE_ALIGN)
            }
            _ => false,
        };
        in_place && addresses.is_sorted()
    };
    let decode = |candidate: &Addresses| candidate.decode(&piece.bytes, names.len()).ok();
    let fitting = candidates.iter().filter_map(decode).find(|addresses| fits(addresses));
    let mut addresses = fitting.ok_or(NoKallsyms::Foreign { at })?;
    for address in addresses.iter_mut().filter(|address| **address >= START_KERNEL_MAP) {
        *address = address.wrapping_sub(found.kaslr_offset);
    }
    Ok(names.at_addresses(&addresses))
}
