//! Whom a page of the kernel's own is for: the area of vmalloc it is mapped in, the task whose stack that is, the module.
//!
//! Knows vmalloc's lists of pages; other pages of the kernel have nobody's name on them.
//! Source: `include/linux/vmalloc.h` (`struct vm_struct.pages`), `kernel/fork.c` (`alloc_thread_stack_node`).

use crate::addr::{Pfn, VirtAddr};
use crate::kernel::page::PageMap;
use crate::kernel::vmalloc::Area;
use crate::kernel::{Kernel, Object};
use std::cell::OnceCell;
use std::collections::HashMap;

/// Where a page is mapped, and for whom.
#[derive(Clone)]
pub struct Holder<'k> {
    /// Its address in the area.
    pub at: VirtAddr,
    /// The area.
    pub area: Area<'k>,
    /// Pid and name of the task whose kernel stack the area is. Freed stacks are kept for the next task.
    pub stack_of: Option<(i32, String)>,
    /// The module whose code or data lies there.
    pub module: Option<String>,
}

/// The holders of pages, looked through once, when one is first asked for.
pub struct Holders<'k> {
    kernel: &'k Kernel,
    map: &'k PageMap,
    pages: OnceCell<HashMap<Pfn, (Area<'k>, VirtAddr)>>,
}

impl<'k> Holders<'k> {
    /// For this kernel.
    pub fn new(kernel: &'k Kernel, map: &'k PageMap) -> Self {
        Self { kernel, map, pages: OnceCell::new() }
    }

    /// Who holds the page `pfn`; `None` if no area of vmalloc has it in its list.
    pub fn of(&self, pfn: Pfn) -> Option<Holder<'k>> {
        let (area, at) = *self.pages.get_or_init(|| self.collect()).get(&pfn)?;
        let stack_of = self.kernel.tasks().ok().and_then(|tasks| {
            let owner = |task: &Object<'_>| task.get("stack").is_ok_and(|stack| stack == area.start.0);
            let task = tasks.tasks.into_iter().find(owner)?;
            let comm = task.member("comm").and_then(|comm| comm.text()).unwrap_or_default();
            Some((task.get("pid").unwrap_or(0) as i32, comm))
        });
        let module = self.kernel.modules().at(at).map(|module| module.name.clone());
        Some(Holder { at, area, stack_of, module })
    }

    fn collect(&self) -> HashMap<Pfn, (Area<'k>, VirtAddr)> {
        let areas = self.kernel.vmap_areas().map(|all| all.areas).unwrap_or_default();
        let of_area = |area: Area<'k>| {
            let pages = self.kernel.area_pages(self.map, &area);
            pages.into_iter().map(move |(pfn, at)| (pfn, (area, at)))
        };
        areas.into_iter().flat_map(of_area).collect()
    }
}
