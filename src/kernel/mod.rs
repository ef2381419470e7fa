//! What the kernel in a machine's memory means. Sees [`Backend`], never dump-or-live; prints nothing.
//!
//! [`Kernel`] is one boot of one kernel: its address space, symbols and types. [`Machine`] is what gdb and the
//! commands work on: CPUs, registers and memory, with a kernel or without.

pub mod cpus;
pub mod discover;
mod fields;
mod globals;
mod jump_label;
mod lines;
pub mod list;
mod machine;
pub mod maple;
pub mod memcg;
pub mod meminfo;
pub mod mm;
pub mod module;
pub mod nmi;
pub mod object;
pub mod page;
pub mod percpu;
pub mod printk;
pub mod rbtree;
pub mod remains;
pub mod runqueue;
pub mod sched;
pub mod slab;
pub mod spin;
pub mod stack;
pub mod stack_depot;
mod switched_out;
pub mod taint;
mod task;
mod task_flags;
pub mod time;
mod types;
mod user_image;
pub mod user_stack;
pub mod vfs;
pub mod vma;
pub mod vmalloc;
mod vmlinux;
pub mod xarray;
pub mod zone;

pub use fields::{Fields, Row};
pub use machine::{Cpu, CpuId, Machine, OpenError, Options, Why};
pub use object::{Object, ObjectError};
pub use task::{Task, Tasks};
pub use types::TypesFrom;

use crate::addr::VirtAddr;
use crate::arch::x86_64::VirtOutcome;
use crate::backend::Backend;
use crate::bytes::printable;
use crate::debuginfo::{DebugInfo, Member, SymbolTable};
use discover::{Found, NoKallsyms, START_KERNEL_MAP};
use std::fmt;
use std::sync::{Arc, OnceLock};

/// One boot of a Linux kernel.
pub struct Kernel {
    backend: Arc<dyn Backend>,
    found: Found,
    debug_info: Option<Arc<DebugInfo>>,
    types: types::Types,
    kallsyms: Arc<OnceLock<Result<SymbolTable, NoKallsyms>>>,
    /// Where per-CPU memory lies; `None` without SMP or symbols.
    per_cpu: OnceLock<Option<percpu::Areas>>,
    modules: OnceLock<module::Modules>,
    /// Where the `struct page`s are, or why that is not known.
    page_map: OnceLock<Result<page::PageMap, ObjectError>>,
    /// What backtraces need to know of the kernel's stacks and code.
    stacks: OnceLock<stack::Stacks>,
}

/// A symbol that covers an address.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Symbolized<'a> {
    /// Its name: untrusted text.
    pub name: &'a str,
    /// How far into it the address lies, in bytes.
    pub offset: u64,
    /// The module it is of; `None` for the kernel image.
    pub module: Option<&'a str>,
}

impl fmt::Display for Symbolized<'_> {
    /// `name+0x12 [module]`, as the kernel's own messages have it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}+{:#x}", printable(self.name), self.offset)?;
        self.module.map_or(Ok(()), |module| write!(f, " [{}]", printable(module)))
    }
}

impl Kernel {
    /// The kernel at `found` in `backend`'s memory, with the debug info that was checked to be its own.
    pub fn new(backend: Arc<dyn Backend>, found: Found, debug_info: Option<DebugInfo>) -> Self {
        Self {
            backend,
            found,
            debug_info: debug_info.map(Arc::new),
            types: types::Types::default(),
            kallsyms: Arc::default(),
            per_cpu: OnceLock::new(),
            modules: OnceLock::new(),
            page_map: OnceLock::new(),
            stacks: OnceLock::new(),
        }
    }

    /// The same boot at another moment: what never changes is shared, the rest is read again from `backend`.
    pub(crate) fn again(&self, backend: Arc<dyn Backend>) -> Self {
        Self {
            debug_info: self.debug_info.clone(),
            types: self.types.again(),
            kallsyms: self.kallsyms.clone(),
            ..Self::new(backend, self.found.clone(), None)
        }
    }

    /// Where and how the kernel was found.
    pub fn found(&self) -> &Found {
        &self.found
    }

    /// The memory underneath.
    pub fn backend(&self) -> &Arc<dyn Backend> {
        &self.backend
    }

    /// Its vmlinux, where there is one.
    pub fn debug_info(&self) -> Option<&DebugInfo> {
        self.debug_info.as_deref()
    }

    /// Reads kernel virtual memory through the kernel's own tables, whatever any CPU was doing.
    pub fn read(&self, at: VirtAddr, buf: &mut [u8]) -> VirtOutcome {
        self.found.space.read(&*self.backend, at, buf)
    }

    /// `N` bytes of kernel memory, or `None` if any of them cannot be read.
    pub fn read_array<const N: usize>(&self, at: VirtAddr) -> Option<[u8; N]> {
        let mut buf = [0; N];
        self.read(at, &mut buf).stopped.is_none().then_some(buf)
    }

    /// The `u64` or pointer at `at`.
    pub fn read_u64(&self, at: VirtAddr) -> Option<u64> {
        self.read_array(at).map(u64::from_le_bytes)
    }

    /// The `u32` at `at`.
    pub fn read_u32(&self, at: VirtAddr) -> Option<u32> {
        self.read_array(at).map(u32::from_le_bytes)
    }

    /// Symbols of the kernel image at link-time addresses: its vmlinux's or else those that the kernel carries in
    /// memory. `Err` says why there are none.
    pub fn symbols(&self) -> Result<&SymbolTable, &NoKallsyms> {
        if let Some(info) = self.debug_info().filter(|info| info.has_symbols()) {
            return Ok(info.symbols());
        }
        self.kallsyms.get_or_init(|| discover::find_kallsyms(&*self.backend, &self.found)).as_ref()
    }

    /// Run-time address of a symbol of the kernel image, by whose presence kernels are told apart too. Per-CPU
    /// symbols come back as they stand in their section: see [`Self::per_cpu`].
    pub fn symbol(&self, name: &str) -> Option<VirtAddr> {
        self.symbol_and_size(name).map(|(at, _)| at)
    }

    /// Run-time address and size in bytes of a symbol.
    pub fn symbol_and_size(&self, name: &str) -> Option<(VirtAddr, u64)> {
        let symbol = self.symbols().ok()?.lookup(name)?;
        Some((self.slide(symbol.addr), symbol.size))
    }

    /// Run-time address of a symbol of the kernel image or else of any module: what a user means by a name.
    pub fn symbol_anywhere(&self, name: &str) -> Option<VirtAddr> {
        let in_module = |module| self.module_symbols(module).lookup(name).map(|symbol| VirtAddr(symbol.addr));
        self.symbol(name).or_else(|| self.modules().list.iter().find_map(in_module))
    }

    /// The symbol of the kernel image or a module that covers the run-time address `at`.
    pub fn symbolize(&self, at: VirtAddr) -> Option<Symbolized<'_>> {
        if let Some((name, offset)) = self.symbolize_in_image(at) {
            return Some(Symbolized { name, offset, module: None });
        }
        let Some(module) = self.modules().at(at) else { return self.symbolize_runtime(at) };
        let (symbol, offset) = self.module_symbols(module).at(at.0)?;
        Some(Symbolized { name: symbol.name, offset, module: Some(&module.name) })
    }

    fn symbolize_in_image(&self, at: VirtAddr) -> Option<(&str, u64)> {
        let link = at.0.checked_sub(self.found.kaslr_offset).filter(|&link| link >= START_KERNEL_MAP)?;
        // Modules lie above the image, where the last of its symbols without a size would seem to reach.
        if self.symbol("_end").is_some_and(|end| at >= end) {
            return None;
        }
        self.symbols().ok()?.at(link).map(|(symbol, offset)| (symbol.name, offset))
    }

    /// The member at `path` of the structure or union `container`.
    pub fn member(&self, container: &str, path: &str) -> Option<Member> {
        let types = self.types()?;
        types.member(types.composite(container)?, path)
    }

    /// Link-time to run-time address. KASLR moves the image only: per-CPU symbols linked at zero
    /// (before Linux commit 9d7de2aa8b41 ("x86/percpu/64: Use relative percpu offsets") (in v6.15)) and
    /// absolute symbols stay.
    pub fn slide(&self, link: u64) -> VirtAddr {
        let by = if link >= START_KERNEL_MAP { self.found.kaslr_offset } else { 0 };
        VirtAddr(link.wrapping_add(by))
    }
}
