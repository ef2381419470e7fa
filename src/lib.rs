//! kstub speaks the GDB remote protocol over a Linux crash dump or a running QEMU guest, and knows the kernel in it.
//!
//! Bytes → address spaces → debug info → machines → the kernel's meaning → commands → the GDB protocol.
//! Each row is a layer; a module imports only from lower rows, or from within its own folder.
//! `tests/layering.rs` reads this crate's `use` paths and fails on any other edge.
//!
//! ```text
//! 8  main  open  moments             what was typed, opened and run
//! 7  cli   server                     arguments | sockets
//! 6  gdb                              gdbstub glue, RSP front
//! 5  command                          text (or JSON) in, text (or JSON) out
//! 4  kernel                           Linux meaning
//! 3  backend   unwind                 machines | frames from registers, tables and stack bytes
//! 2  vmcore   arch   debuginfo        formats | page tables, registers | symbols, types
//! 1  memory   vmcoreinfo
//! 0  addr   bytes   parallel   rsp
//! ```
//!
//! - `vmcore` and below know no symbol names, no tasks, no sockets.
//! - `debuginfo` parses bytes it is *given*, and finds files that hold them; it never reads a machine.
//! - `kernel` sees [`backend::Backend`], never dump-or-live; it returns values and never prints.
//! - `command` renders values; it knows neither gdbstub nor stdout.
//! - Only `gdb` names gdbstub, only `server` names tokio, only `backend` names qapi and nix, only `debuginfo` names gimli and ureq, only `arch` names iced-x86, anyhow is for
//!   the program's own files (row 8), `cli` and `server`.

pub mod addr;
pub mod arch;
pub mod backend;
pub mod bytes;
pub mod cli;
pub mod command;
pub mod debuginfo;
pub mod gdb;
pub mod kernel;
pub mod memory;
pub mod parallel;
pub mod rsp;
pub mod server;
pub mod unwind;
pub mod vmcore;
pub mod vmcoreinfo;
