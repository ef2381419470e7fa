//! What the kernel in a machine's memory means. Sees [`Backend`], never dump-or-live; prints nothing.

pub mod machine;

pub use machine::{Cpu, CpuId, Machine};
