//! The kernel's own type information: BTF bytes in its image, for whoever parses them.
//!
//! Knows where they lie, not what they mean. Source: `include/asm-generic/vmlinux.lds.h` (`BTF`).

use super::Kernel;
use crate::addr::VirtAddr;

/// BTF of the largest kernels has some 7 MiB.
const BTF_MAX: u64 = 64 << 20;

/// Why there are no bytes of BTF.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoBtf {
    /// The kernel was built without.
    #[error("the kernel has no types in memory (CONFIG_DEBUG_INFO_BTF off)")]
    NotBuilt,
    /// Its bounds make no sense.
    #[error("the kernel's BTF from {start} to {end} is no such size as BTF has")]
    Size {
        /// `__start_BTF`.
        start: VirtAddr,
        /// `__stop_BTF`.
        end: VirtAddr,
    },
    /// Part of it is out of reach.
    #[error("the kernel's BTF at {at} cannot be read: {why}")]
    Unreadable {
        /// Where it begins.
        at: VirtAddr,
        /// Which byte could not be read, and why.
        why: String,
    },
}

impl Kernel {
    /// The bytes of the image's BTF. Since Linux commit 341dfcf8d78e ("btf: expose BTF info through sysfs") (in v5.4).
    pub fn btf_bytes(&self) -> Result<Vec<u8>, NoBtf> {
        let bound = |name| self.symbol(name).ok_or(NoBtf::NotBuilt);
        let (start, end) = (bound("__start_BTF")?, bound("__stop_BTF")?);
        match end.offset_from(start) {
            Some(0) => Err(NoBtf::NotBuilt),
            Some(len @ ..=BTF_MAX) => self.bytes_of_btf(start, len),
            _ => Err(NoBtf::Size { start, end }),
        }
    }

    pub(super) fn bytes_of_btf(&self, at: VirtAddr, len: u64) -> Result<Vec<u8>, NoBtf> {
        let mut bytes = vec![0; len.min(BTF_MAX) as usize];
        match self.read(at, &mut bytes).stopped {
            None => Ok(bytes),
            Some(error) => Err(NoBtf::Unreadable { at, why: error.to_string() }),
        }
    }
}
