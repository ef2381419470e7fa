//! x86-64: registers, page tables and machine code.

mod argument;
pub mod disasm;
pub mod entry;
pub mod loops;
pub mod paging;
pub mod regs;

pub use paging::{AddressSpace, TranslateError, Translation, VirtError, VirtOutcome};
pub use regs::{Reg, RegisterFile, Saved};
