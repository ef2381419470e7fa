//! An index of DWARF: names to entries, enumerators to values, addresses to units; made by reading everything once.
//!
//! It is one run of bytes, the same in memory and in the user's cache directory, and is believed no further than its
//! offsets lead: whoever follows one checks what is there. Source: the DWARF standard, version 5, chapter 7.

use super::dwarf_scan::{Found, scan};
use super::dwarf_unit::{Units, malformed};
use super::types::Class;
use super::{Error, find::user_caches};
use crate::bytes::{cstr_at, u32_at, u64_at};
use hashbrown::HashMap;
use std::cmp::Ordering;
use std::io::{Read, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

const MAGIC: &[u8; 8] = b"kstubdwi";
/// Changes with everything that changes what is in the bytes.
const VERSION: u32 = 1;
/// Magic, version, checksum, length of `.debug_info`, number of records in each table, length of the strings.
const HEADER: usize = 8 + 4 + 4 + 8 + TABLES * 4 + 4;
const TABLES: usize = 5;
/// Bytes of a record: unit offset; start, end, unit; class, name, entry; name, entry, value; signature, type.
const RECORDS: [usize; TABLES] = [4, 20, 12, 16, 12];
/// A file with less DWARF is indexed about as fast as its index is read.
const WORTH_KEEPING: u64 = 8 << 20;
/// An index of Debian's kernels has some ten megabytes.
const KEPT_MAX: u64 = 512 << 20;
/// Indexes kept at a time.
const KEPT_FILES: usize = 16;

/// What can be found in the DWARF of one file without reading it all.
pub(super) struct Index {
    bytes: Vec<u8>,
    tables: [Range<usize>; TABLES],
    strings: Range<usize>,
}

/// Where indexes are kept: `kstub/dwarf` below the user's caches.
pub(super) fn user_directory() -> Option<PathBuf> {
    Some(user_caches()?.join("kstub/dwarf"))
}

const UNITS: usize = 0;
const RANGES: usize = 1;
const NAMES: usize = 2;
const ENUMERATORS: usize = 3;
const SIGNATURES: usize = 4;

fn class_number(class: Class) -> u32 {
    match class {
        Class::Struct => 1,
        Class::Union => 2,
        Class::Enum => 3,
        Class::Typedef => 4,
        Class::Base => 5,
        Class::Variable => 6,
    }
}

impl Index {
    /// The index of `units`: the one kept in `directory` for `build_id`, else a new one, which is then kept there.
    pub fn open(units: &Units, directory: Option<&Path>, build_id: Option<&str>) -> Result<Self, Error> {
        let hex = build_id.filter(|id| id.len() > 2 && id.bytes().all(|b| b.is_ascii_hexdigit()));
        let kept = directory.zip(hex).filter(|_| units.info.len() >= WORTH_KEEPING);
        if let Some((directory, build_id)) = kept
            && let Some(index) = recall(&directory.join(build_id), units.info.len())
        {
            return Ok(index);
        }
        let began = std::time::Instant::now();
        let index = Self::build(units)?;
        tracing::info!("indexed {} bytes of DWARF in {:?}", units.info.len(), began.elapsed());
        if let Some((directory, build_id)) = kept
            && let Err(error) = remember(directory, build_id, &index.bytes)
        {
            tracing::debug!("the index of DWARF was not kept in {}: {error}", directory.display());
        }
        Ok(index)
    }

    /// Reads all units.
    pub fn build(units: &Units) -> Result<Self, Error> {
        let list = units.list()?;
        let found = scan(units, &list);
        let bytes = write(units, &list, found);
        Self::parse(bytes, units.info.len()).ok_or_else(|| malformed(0, "more names than an index can hold"))
    }

    /// Looks whether `bytes` are an index of a `.debug_info` of `info_len` bytes, and whole.
    fn parse(bytes: Vec<u8>, info_len: u64) -> Option<Self> {
        let header = bytes.get(..HEADER)?;
        let sound = header.starts_with(MAGIC)
            && u32_at(header, 8)? == VERSION
            && u32_at(header, 12)? == libdeflater::crc32(bytes.get(16..)?)
            && u64_at(header, 16)? == info_len;
        if !sound {
            return None;
        }
        let mut at = HEADER;
        let mut tables: [Range<usize>; TABLES] = Default::default();
        for (i, (table, record)) in tables.iter_mut().zip(RECORDS).enumerate() {
            let count = u32_at(header, 24 + i * 4)? as usize;
            let end = at.checked_add(count.checked_mul(record)?)?;
            *table = at..end;
            at = end;
        }
        let end = at.checked_add(u32_at(header, 24 + TABLES * 4)? as usize)?;
        (end == bytes.len()).then_some(Self { strings: at..end, tables, bytes })
    }

    #[cfg(test)]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// An index of `bytes` whatever their checksum was.
    #[cfg(test)]
    pub fn sealed(mut bytes: Vec<u8>, info_len: u64) -> Option<Self> {
        let sum = libdeflater::crc32(bytes.get(16..)?);
        bytes.get_mut(12..16)?.copy_from_slice(&sum.to_le_bytes());
        Self::parse(bytes, info_len)
    }

    fn len(&self, table: usize) -> usize {
        let (Some(range), Some(record)) = (self.tables.get(table), RECORDS.get(table)) else { return 0 };
        range.len() / record
    }

    /// Record `i` of a table; empty past its end.
    fn record(&self, table: usize, i: usize) -> &[u8] {
        let (Some(range), Some(&record)) = (self.tables.get(table), RECORDS.get(table)) else { return &[] };
        let at = i.checked_mul(record).and_then(|at| range.start.checked_add(at));
        at.and_then(|at| self.bytes.get(at..at.checked_add(record)?)).unwrap_or_default()
    }

    fn word(&self, table: usize, i: usize, at: usize) -> u32 {
        u32_at(self.record(table, i), at).unwrap_or(0)
    }

    fn long(&self, table: usize, i: usize, at: usize) -> u64 {
        u64_at(self.record(table, i), at).unwrap_or(0)
    }

    fn string(&self, at: u32) -> &[u8] {
        let strings = self.bytes.get(self.strings.clone()).unwrap_or_default();
        cstr_at(strings, at as usize, usize::MAX).unwrap_or_default()
    }

    /// The first record that is not less by `order`; the tables are sorted.
    fn first(&self, table: usize, order: impl Fn(usize) -> Ordering) -> usize {
        let (mut low, mut high) = (0, self.len(table));
        while low < high {
            let middle = low + (high - low) / 2;
            if order(middle) == Ordering::Less { low = middle + 1 } else { high = middle }
        }
        low
    }

    fn by_name(&self, class: Class, name: &[u8], i: usize) -> Ordering {
        let this = (self.word(NAMES, i, 0), self.string(self.word(NAMES, i, 4)));
        this.cmp(&(class_number(class), name))
    }

    /// The entry that defines `name`: its offset in `.debug_info`.
    pub fn find(&self, class: Class, name: &str) -> Option<u32> {
        let i = self.first(NAMES, |i| self.by_name(class, name.as_bytes(), i));
        (self.by_name(class, name.as_bytes(), i) == Ordering::Equal).then(|| self.word(NAMES, i, 8))
    }

    /// All names of a class, sorted.
    pub fn names(&self, class: Class) -> Vec<String> {
        let start = self.first(NAMES, |i| self.word(NAMES, i, 0).cmp(&class_number(class)));
        let of_class =
            (start..self.len(NAMES)).take_while(|&i| self.word(NAMES, i, 0) == class_number(class));
        of_class.map(|i| String::from_utf8_lossy(self.string(self.word(NAMES, i, 4))).into_owned()).collect()
    }

    /// The value of an enumerator, and the enumeration's entry.
    pub fn enumerator(&self, name: &str) -> Option<(u32, i64)> {
        let order = |i| self.string(self.word(ENUMERATORS, i, 0)).cmp(name.as_bytes());
        let i = self.first(ENUMERATORS, order);
        let found = i < self.len(ENUMERATORS) && order(i) == Ordering::Equal;
        found.then(|| (self.word(ENUMERATORS, i, 4), self.long(ENUMERATORS, i, 8) as i64))
    }

    /// The unit that holds the entry at `offset`: start and length.
    pub fn unit_of(&self, offset: u32, info_len: u64) -> Option<(u32, u32)> {
        let after = self.first(UNITS, |i| match self.word(UNITS, i, 0) <= offset {
            true => Ordering::Less,
            false => Ordering::Greater,
        });
        let start = self.word(UNITS, after.checked_sub(1)?, 0);
        let end = if after < self.len(UNITS) { self.word(UNITS, after, 0).into() } else { info_len };
        let len = u32::try_from(end.checked_sub(start.into())?).ok()?;
        (u64::from(offset) < end).then_some((start, len))
    }

    /// Offsets of the units with code at `addr`.
    pub fn units_at(&self, addr: u64) -> Vec<u32> {
        /// Ranges do not overlap in what linkers make; a damaged file must not cost a long search.
        const BACK: usize = 16;
        let after = self.first(RANGES, |i| match self.long(RANGES, i, 0) <= addr {
            true => Ordering::Less,
            false => Ordering::Greater,
        });
        let near = (after.saturating_sub(BACK)..after).rev();
        near.filter(|&i| addr < self.long(RANGES, i, 8)).map(|i| self.word(RANGES, i, 16)).collect()
    }

    /// The type with this signature: its offset in `.debug_info`.
    pub fn signature(&self, signature: u64) -> Option<u32> {
        let i = self.first(SIGNATURES, |i| self.long(SIGNATURES, i, 0).cmp(&signature));
        let found = i < self.len(SIGNATURES) && self.long(SIGNATURES, i, 0) == signature;
        found.then(|| self.word(SIGNATURES, i, 8))
    }
}

/// Puts what was found in order, as bytes.
fn write(units: &Units, list: &[(u32, u32)], mut found: Found) -> Vec<u8> {
    let debug_str = units.strings();
    let (names, enumerators) = (std::mem::take(&mut found.names), std::mem::take(&mut found.enumerators));
    let mut names: Vec<_> = names
        .iter()
        .map(|((class, name), entry)| (class_number(*class), name.bytes(debug_str), *entry))
        .collect();
    // Of several definitions the one that other units see, else the first.
    names.sort_unstable();
    names.dedup_by_key(|(class, name, _)| (*class, *name));
    let mut constants: Vec<_> =
        enumerators.iter().map(|(name, (entry, value))| (name.bytes(debug_str), *entry, *value)).collect();
    constants.sort_unstable();
    constants.dedup_by_key(|(name, ..)| *name);
    found.ranges.sort_unstable();
    found.signatures.sort_unstable();

    let mut strings: Vec<u8> = vec![0];
    let mut offsets: HashMap<&[u8], u32> = HashMap::new();
    let mut place = |name| {
        *offsets.entry(name).or_insert_with(|| {
            let at = strings.len() as u32;
            strings.extend_from_slice(name);
            strings.push(0);
            at
        })
    };
    let mut body = Vec::new();
    for (start, _) in list {
        body.extend(start.to_le_bytes());
    }
    for (start, end, unit) in &found.ranges {
        body.extend([start.to_le_bytes(), end.to_le_bytes()].concat());
        body.extend(unit.to_le_bytes());
    }
    for (class, name, entry) in &names {
        body.extend([*class, place(name), entry.offset].map(u32::to_le_bytes).concat());
    }
    for (name, entry, value) in &constants {
        body.extend([place(name), *entry].map(u32::to_le_bytes).concat());
        body.extend(value.to_le_bytes());
    }
    for (signature, at) in &found.signatures {
        body.extend(signature.to_le_bytes());
        body.extend(at.to_le_bytes());
    }
    let counts =
        [list.len(), found.ranges.len(), names.len(), constants.len(), found.signatures.len(), strings.len()];
    let mut checked = units.info.len().to_le_bytes().to_vec();
    checked.extend(counts.iter().flat_map(|&count| (count as u32).to_le_bytes()));
    checked.extend(body);
    checked.extend(strings);
    let mut bytes = MAGIC.to_vec();
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend(libdeflater::crc32(&checked).to_le_bytes());
    bytes.extend(checked);
    bytes
}

/// The index kept in `file`, if it is one of a `.debug_info` of `info_len` bytes.
fn recall(file: &Path, info_len: u64) -> Option<Index> {
    let file = std::fs::File::open(file).ok()?;
    let len = file.metadata().ok()?.len();
    if len > KEPT_MAX {
        return None;
    }
    let mut bytes = Vec::with_capacity(len as usize);
    file.take(KEPT_MAX).read_to_end(&mut bytes).ok()?;
    Index::parse(bytes, info_len)
}

/// Keeps an index in `directory` for `build_id`, which must be hex, and drops the oldest of too many.
fn remember(directory: &Path, build_id: &str, bytes: &[u8]) -> std::io::Result<()> {
    std::fs::create_dir_all(directory)?;
    // Readers see the old file or the new one, never half of one.
    let mut file = tempfile::NamedTempFile::new_in(directory)?;
    file.write_all(bytes)?;
    file.persist(directory.join(build_id)).map_err(|error| error.error)?;
    let mut kept: Vec<_> = std::fs::read_dir(directory)?
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let name = entry.file_name();
            let ours = name.as_encoded_bytes().iter().all(u8::is_ascii_hexdigit);
            ours.then_some((entry.metadata().ok()?.modified().ok()?, entry.path()))
        })
        .collect();
    kept.sort_unstable();
    kept.truncate(kept.len().saturating_sub(KEPT_FILES));
    for (_, path) in kept {
        std::fs::remove_file(path)?;
    }
    Ok(())
}
