//! Source lines of code in memory, of the kernel image and of its modules.
//!
//! Knows which file is asked for an address and where its sections are; reads no DWARF. A module's file is opened when an
//! address in the module is first asked for. Source: `kernel/module/sysfs.c` (where the sections were put),
//! `kernel/module/main.c` (`do_init_module` frees those for init).

use super::Kernel;
use super::module::Module;
use crate::addr::VirtAddr;
use crate::bytes::printable;
use crate::debuginfo::find::{self, ModuleFiles};
use crate::debuginfo::{DebugInfo, Location, SectionAddresses};

/// Number of a module's file as a source of types, of which it is asked for none here; 0 is the image's.
const SOURCE: u16 = 1;

impl Kernel {
    /// Where the instruction at the run-time address `at` comes from: the innermost inlined function first, the function
    /// that has the code last. `None` where no file with DWARF covers it.
    pub fn locate(&self, at: VirtAddr) -> Option<Vec<Location>> {
        match self.modules().at(at) {
            Some(module) => self.module_debug_info(module)?.locate(at.0),
            None => self.debug_info()?.locate(at.0.checked_sub(self.found.kaslr_offset)?),
        }
    }

    /// Where the function that has the code at `at` is declared: its name, before the line where its code begins.
    pub fn declared(&self, at: VirtAddr) -> Option<Location> {
        match self.modules().at(at) {
            Some(module) => self.module_debug_info(module)?.declared(at.0),
            None => self.debug_info()?.declared(at.0.checked_sub(self.found.kaslr_offset)?),
        }
    }

    /// Why [`Kernel::locate`] tells nothing of `at`, and what would help.
    pub fn why_no_lines(&self, at: VirtAddr) -> String {
        match self.modules().at(at) {
            Some(module) if self.module_debug_info(module).is_none() => {
                let name = printable(&module.name);
                format!(
                    "no source lines: no debug file of module {name} was found; pass --debug-dir DIR that has {name}.ko.debug"
                )
            }
            None if self.debug_info().is_none() => {
                "no source lines: there is no vmlinux with debug info; 'info' tells how to get one".to_owned()
            }
            _ => "no source lines: the debug info has none there".to_owned(),
        }
    }

    /// The text of the source that debug info calls `file`, or why there is none and what would help.
    pub fn source_text(&self, file: &str) -> Result<String, String> {
        find::source_text(file, &self.found.release, &self.types.places)
    }

    /// The module's own file, at the addresses that its sections have in memory; `None` if none with its build-id is
    /// found, or if where its sections are is not known. Opened once.
    pub(super) fn module_debug_info<'m>(&self, module: &'m Module) -> Option<&'m DebugInfo> {
        module.debug_info.get_or_init(|| self.open_module_file(module)).as_ref()
    }

    fn open_module_file(&self, module: &Module) -> Option<DebugInfo> {
        let file = self.module_files().file(&module.name, module.build_id.as_deref()?)?;
        let sections = self.module_sections(module);
        let sections =
            sections.inspect_err(|error| tracing::info!("module '{}': {error}", module.name)).ok()?;
        // Sections for init are listed after they were freed.
        let still = sections.into_iter().filter(|section| module.contains(section.at));
        let addresses: SectionAddresses = still.map(|section| (section.name, section.at.0)).collect();
        let info = DebugInfo::open_module(&file.path, addresses, SOURCE);
        let info = info.inspect_err(|error| tracing::warn!("module '{}': {error}", module.name)).ok()?;
        // An index would be of these addresses, and the module's next ones are others.
        Some(info.keep_indexes_in(None))
    }

    /// The files there are for modules; looked for once.
    pub(super) fn module_files(&self) -> &ModuleFiles {
        let vmlinux = self.debug_info().map(DebugInfo::path);
        let search = || ModuleFiles::search(&self.found.release, &self.types.places, vmlinux);
        self.types.module_files.get_or_init(search)
    }
}
