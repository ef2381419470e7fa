//! A crash dump as a machine.

/// An opened dump.
pub struct Dump;
