//! Several members of many structures of one type: looked up once, then read in one go for each structure.
//!
//! For tables such as `ps`, where [`super::Object`] would look every name up again for every row.

use super::{Kernel, ObjectError};
use crate::addr::VirtAddr;
use crate::debuginfo::Member;
use std::borrow::Cow;

/// Longest structure read as a whole; members further apart are read one by one.
const SPAN_MAX: u64 = 64 << 10;

/// Members of one type, by their place in the list they were asked for in.
pub struct Fields<'k> {
    kernel: &'k Kernel,
    found: Vec<Option<Member>>,
    /// The part of the structure that holds all of them.
    start: u64,
    len: usize,
}

/// One structure's members.
pub struct Row<'f, 'k> {
    fields: &'f Fields<'k>,
    /// The structure.
    pub at: VirtAddr,
    /// As much of the part as could be read at once.
    bytes: Vec<u8>,
}

impl<'k> Fields<'k> {
    /// For each of `members` the first of its names that this kernel's `container` has: name the newest first.
    pub fn new(kernel: &'k Kernel, container: &str, members: &[&[&str]]) -> Result<Self, ObjectError> {
        let types = kernel.image_types()?;
        let ty = types.composite(container).ok_or_else(|| ObjectError::NoType(container.to_owned()))?;
        let found: Vec<Option<Member>> = members
            .iter()
            .map(|names| names.iter().find_map(|name| types.member(ty, name)).filter(|m| m.size.is_some()))
            .collect();
        let here = || found.iter().flatten();
        let start = here().map(|member| member.offset).min().unwrap_or(0);
        let end = here().map(|member| member.offset.saturating_add(member.size.unwrap_or(0))).max();
        let len = end.map_or(0, |end| end.saturating_sub(start).min(SPAN_MAX)) as usize;
        Ok(Self { kernel, found, start, len })
    }

    /// Reads the structure at `at`.
    pub fn read(&self, at: VirtAddr) -> Row<'_, 'k> {
        let mut bytes = vec![0; self.len];
        let filled = self.kernel.read(at.wrapping_add(self.start), &mut bytes).filled;
        bytes.truncate(filled);
        Row { fields: self, at, bytes }
    }

    /// Whether the kernel has the member at this place of the list.
    pub fn has(&self, column: usize) -> bool {
        self.found.get(column).is_some_and(Option::is_some)
    }
}

impl Row<'_, '_> {
    /// The bytes of a member; `None` if it is not in this kernel or cannot be read.
    pub fn bytes(&self, column: usize) -> Option<Cow<'_, [u8]>> {
        let member = (*self.fields.found.get(column)?)?;
        let size = usize::try_from(member.size?).ok().filter(|&size| size as u64 <= SPAN_MAX)?;
        let from = usize::try_from(member.offset - self.fields.start).ok()?;
        if let Some(bytes) = self.bytes.get(from..from.checked_add(size)?) {
            return Some(Cow::Borrowed(bytes));
        }
        // Behind what could be read at once; it may lie in a page that can be read.
        let mut bytes = vec![0; size];
        let at = self.at.wrapping_add(member.offset);
        self.fields.kernel.read(at, &mut bytes).stopped.is_none().then_some(Cow::Owned(bytes))
    }

    /// A number or pointer, zero-extended.
    pub fn u64(&self, column: usize) -> Option<u64> {
        let mut word = [0; 8];
        let bytes = self.bytes(column)?;
        word.get_mut(..bytes.len())?.copy_from_slice(&bytes);
        let value = u64::from_le_bytes(word);
        let (lowest, width) = match (*self.fields.found.get(column)?)?.bits {
            Some(bits) => bits,
            None => return Some(value),
        };
        let mask = u64::MAX.checked_shr(64u32.saturating_sub(width)).unwrap_or(0);
        Some(value.checked_shr(lowest).unwrap_or(0) & mask)
    }

    /// An `int`.
    pub fn i32(&self, column: usize) -> Option<i32> {
        self.u64(column).map(|value| value as i32)
    }

    /// A pointer; `None` for NULL as well.
    pub fn pointer(&self, column: usize) -> Option<VirtAddr> {
        self.u64(column).filter(|&at| at != 0).map(VirtAddr)
    }

    /// The text in a `char` array. Untrusted.
    pub fn text(&self, column: usize) -> Option<String> {
        let bytes = self.bytes(column)?;
        let text = bytes.split(|&byte| byte == 0).next().unwrap_or_default();
        Some(String::from_utf8_lossy(text).into_owned())
    }

    /// Where a member lies.
    pub fn place(&self, column: usize) -> Option<VirtAddr> {
        Some(self.at.wrapping_add((*self.fields.found.get(column)?)?.offset))
    }
}
