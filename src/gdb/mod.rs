//! The GDB side: what a debugger asks of a machine and how the answers are worded.
//!
//! [`Front`] holds one client's session: packets in, bytes out. It answers itself what gdbstub lacks or gets
//! wrong for a target that cannot run, and asks gdbstub for the rest. Knows no socket and no async runtime;
//! it is the only layer that names gdbstub. Source: GDB manual, "Remote Serial Protocol".

mod bulk;
mod description;
mod engine;
mod files;
mod frames;
mod front;
pub mod index;
mod libraries;
mod live;
mod memory;
mod module_index;
mod osdata;
mod private;
mod registers;
mod run_control;
mod selection;
mod target;
mod threads;

pub use files::{Files, Tell};
pub use front::{Flow, Front, MAX_REQUEST};
pub use libraries::Libraries;
pub use live::{Live, OnDisconnect, OpenLive, Policy, boot};
pub use private::PrivateDirectory;
pub use threads::Show;

/// What a server offers its clients.
#[derive(Clone)]
pub struct Settings {
    /// Files of the kernel's.
    pub files: Files,
    /// What are threads.
    pub show: Show,
}

impl From<Files> for Settings {
    fn from(files: Files) -> Self {
        Self { files, show: Show::default() }
    }
}
