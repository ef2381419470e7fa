//! A guest of a running QEMU as a machine.
//!
//! Memory is read from QEMU's RAM file or process, registers come from its monitor or, once it has run control, from
//! its GDB stub; all that changes the guest goes through QEMU. Nothing here knows a kernel. What QEMU says is
//! hostile input: every answer is bounded in size and time, and one that makes no sense is an error.
//! Source: QEMU `docs/interop/qmp-spec.rst`, `docs/system/gdb.rst`, `gdbstub/`.

mod control;
mod description;
mod dump;
mod events;
#[doc(hidden)]
pub mod fuzzing;
mod glimpse;
pub mod guard;
mod guest;
mod hold;
mod memory;
mod mtree;
mod new_file;
mod offer;
mod patches;
mod process;
mod qmp;
mod registers;
mod replies;
mod snapshot;
mod socket;
mod state;
mod stub;

pub use guest::Guest;
pub use snapshot::Snapshot;
pub use socket::SocketAddress;

/// Where QEMU listens for QMP.
pub type QmpAddress = SocketAddress;
/// Where QEMU's own GDB stub listens.
pub type StubAddress = SocketAddress;
