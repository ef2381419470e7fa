//! Where a kernel's types come from: BTF in its own memory, its vmlinux, the files of its modules.
//!
//! Knows which of them is asked first and nothing of their formats. Modules are read when a name is wanted that the
//! image does not have. Source: `include/asm-generic/vmlinux.lds.h` (`__start_BTF`), `kernel/bpf/btf.c`.

use super::Kernel;
use super::module::Module;
use crate::debuginfo::find::{ModuleFiles, Places};
use crate::debuginfo::types::TypeSource;
use crate::debuginfo::{Btf, DebugInfo, SectionAddresses, TypeTable};
use std::sync::{Arc, OnceLock};

/// A kernel's BTF is some 5 MiB; what claims to be larger than this is no BTF.
const BTF_MAX: u64 = 64 << 20;

/// What tells the types.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum TypesFrom {
    /// BTF, and where there is none DWARF.
    #[default]
    Any,
    /// BTF alone, in memory or in the vmlinux.
    Btf,
    /// DWARF of the vmlinux and of the modules' debug files alone.
    Dwarf,
}

/// The kernel's types, and what is needed to find them.
#[derive(Default)]
pub(super) struct Types {
    pub from: TypesFrom,
    /// Where files of modules may be.
    pub places: Arc<Places>,
    /// BTF in memory, and the table over it; `None` where there is none.
    own: OnceLock<Option<(Arc<Btf>, TypeTable)>>,
}

impl Types {
    /// The same at another moment of the kernel: modules may have come and gone.
    pub(super) fn again(&self) -> Self {
        let again = |(btf, _): &(Arc<Btf>, TypeTable)| (btf.clone(), TypeTable::new(btf.clone()));
        let own = self.own.get().map_or_else(OnceLock::new, |own| OnceLock::from(own.as_ref().map(again)));
        Self { from: self.from, places: self.places.clone(), own }
    }
}

impl Kernel {
    /// The same kernel with its types `from` there, and files of modules looked for in `places`.
    pub fn with_types(mut self, from: TypesFrom, places: Places) -> Self {
        self.types = Types { from, places: Arc::new(places), own: OnceLock::new() };
        self
    }

    /// The kernel's types: from BTF in its own memory, else from its vmlinux.
    pub fn types(&self) -> Option<&TypeTable> {
        let info = self.debug_info();
        let own = || self.own_types().map(|(_, types)| types);
        match self.types.from {
            TypesFrom::Any => own().or_else(|| info.map(DebugInfo::types)),
            TypesFrom::Btf => own().or_else(|| info.map(DebugInfo::types).filter(|t| t.format() == "BTF")),
            TypesFrom::Dwarf => info.and_then(DebugInfo::dwarf_types),
        }
    }

    fn own_types(&self) -> Option<&(Arc<Btf>, TypeTable)> {
        if self.types.from == TypesFrom::Dwarf {
            return None;
        }
        let own = self.types.own.get_or_init(|| {
            let btf = self.btf_in_memory()?;
            match Btf::parse(btf) {
                Ok(btf) => {
                    let btf = Arc::new(btf);
                    Some((Arc::clone(&btf), TypeTable::new(btf)))
                }
                Err(error) => {
                    tracing::warn!("the kernel's BTF in memory is damaged: {error}");
                    None
                }
            }
        });
        own.as_ref()
    }

    /// Makes the types of loaded modules known to [`Self::types`], once.
    pub(super) fn add_module_types(&self) {
        let Some(types) = self.types().filter(|types| !types.has_modules()) else { return };
        let image = self.own_types().map(|(image, _)| image);
        let vmlinux = self.debug_info().map(DebugInfo::path);
        let search = || ModuleFiles::search(&self.found().release, &self.types.places, vmlinux);
        let files = OnceLock::new();
        let mut sources: Vec<Arc<dyn TypeSource>> = Vec::new();
        for module in &self.modules().list {
            // A source's number is its place in the list, counted from 1.
            let Ok(number) = u16::try_from(sources.len() + 1) else { break };
            let btf = image.and_then(|image| self.module_types(module, image, number));
            let dwarf = || match self.types.from {
                TypesFrom::Btf => None,
                _ => types_in_file(files.get_or_init(search), module, number),
            };
            sources.extend(btf.or_else(dwarf));
        }
        types.set_modules(sources);
    }

    /// The module's BTF, as the kernel has it in memory.
    fn module_types(&self, module: &Module, image: &Arc<Btf>, number: u16) -> Option<Arc<dyn TypeSource>> {
        let btf = Btf::parse_module(self.module_btf(module)?, image, number);
        let btf = btf.inspect_err(|error| tracing::warn!("BTF of module '{}': {error}", module.name)).ok()?;
        Some(Arc::new(btf))
    }

    /// The bytes between `__start_BTF` and `__stop_BTF` (`include/asm-generic/vmlinux.lds.h`).
    fn btf_in_memory(&self) -> Option<Vec<u8>> {
        let (start, stop) = (self.symbol("__start_BTF")?, self.symbol("__stop_BTF")?);
        let len = stop.0.checked_sub(start.0).filter(|&len| len <= BTF_MAX)?;
        let mut btf = vec![0; usize::try_from(len).ok()?];
        self.read(start, &mut btf).stopped.is_none().then_some(btf)
    }
}

/// The types in the module's own file, if there is one with its build-id and with debug info: for kernels before v5.11,
/// and for modules that were built without BTF. Nothing of the file is read before it is asked for a name.
fn types_in_file(files: &ModuleFiles, module: &Module, number: u16) -> Option<Arc<dyn TypeSource>> {
    let file = files.file(&module.name, module.build_id.as_deref()?)?;
    // Types do not depend on where sections are.
    let info = DebugInfo::open_module(&file.path, SectionAddresses::new(), number);
    let info = info.inspect_err(|error| tracing::warn!("module '{}': {error}", module.name)).ok()?;
    info.dwarf_source()
}
