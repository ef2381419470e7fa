//! Static branches: places in the code where the kernel puts a jump, or takes it away.
//!
//! Source: `include/linux/jump_label.h` (`struct jump_entry`).

use super::Kernel;
use crate::addr::VirtAddr;
use crate::bytes::{u32_at, u64_at};
use std::collections::HashMap;
use std::ops::Range;

/// Most bytes that are read of the table: kernels have some 10,000 entries.
const TABLE_MAX: u64 = 4 << 20;

impl Kernel {
    /// Static branches in `code` of the kernel image, with where each leads while it is on; none where the table or its
    /// types are not known. Modules' are in tables of their own.
    pub(super) fn static_branches(&self, code: Range<VirtAddr>) -> HashMap<u64, u64> {
        self.jump_table(&code).unwrap_or_default()
    }

    fn jump_table(&self, code: &Range<VirtAddr>) -> Option<HashMap<u64, u64>> {
        let start = self.symbol("__start___jump_table")?;
        let len = self.symbol("__stop___jump_table")?.offset_from(start).filter(|&len| len <= TABLE_MAX)?;
        let (from, to) = (self.member("jump_entry", "code")?, self.member("jump_entry", "target")?);
        let types = self.types()?;
        let size =
            usize::try_from(types.size(types.composite("jump_entry")?)?).ok().filter(|&size| size != 0)?;
        let mut bytes = vec![0; len as usize];
        let filled = self.read(start, &mut bytes).filled;
        // With CONFIG_HAVE_ARCH_JUMP_LABEL_RELATIVE four bytes, from where they stand.
        let place = |at: usize| match from.size {
            Some(4) => {
                let distance = u32_at(&bytes, at)?.cast_signed();
                Some(start.0.wrapping_add(at as u64).wrapping_add_signed(distance.into()))
            }
            Some(8) => u64_at(&bytes, at),
            _ => None,
        };
        let entry = |at: usize| {
            let member = |offset: u64| place(at.checked_add(usize::try_from(offset).ok()?)?);
            Some((member(from.offset)?, member(to.offset)?))
        };
        let entries = (0..filled).step_by(size).filter_map(entry);
        Some(entries.filter(|&(at, _)| code.contains(&VirtAddr(at))).collect())
    }
}
