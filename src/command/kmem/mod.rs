//! `kmem`: what memory is used for, and what an address belongs to.

mod address;
mod pages;
pub mod slab;
mod stat;
mod vmalloc;
mod zones;

use super::{Command, CommandError, Context, Output};

pub const COMMAND: Command = Command {
    name: "kmem",
    arguments: "-i|--census|-s|-S|-z|-f|-F|-V|-v|-h|-p|ADDR...",
    summary: "what memory is used for, and what an address belongs to",
    help: "  -i            memory by use, as the kernel counts it\n  \
             --census      all pages counted by use and by flag, by a look at every struct page\n  \
             -s [CACHE...] slab caches: objects, slabs, memory\n  \
             -S [CACHE...] the same with every slab, and all free lists checked; without a cache only damage is shown\n  \
             -z            zones: size, watermarks, counters\n  \
             -f            free memory by zone, order and migrate type\n  \
             -F            the same with every free block, per-CPU lists included\n  \
             -V            counters of /proc/vmstat, with what CPUs have not added yet\n  \
             -v            areas of vmalloc and ioremap\n  \
             -h            pools of hugetlb pages\n  \
             -p [PFN [N]]  struct pages, one a line; N of them, up to 262144, from PFN (hexadecimal) on\n  \
             ADDR          what the address belongs to: a symbol, a slab's object, a page, an area of vmalloc, a task\n\n\
           'allocated' objects are in use; 'kept' ones are free and kept by CPUs and nodes (per-CPU free lists, \
           slabs that a CPU owns, sheaves). /proc/slabinfo counts both as active. CPUs that are offline count as well.\n\n\
           Examples:\n  kmem -i\n  kmem -s task_struct dentry\n  kmem -S kmalloc-64\n  kmem $rdi\n  kmem -p 3eb64 4\n",
    run,
};

fn run(context: &Context<'_>, arguments: &[&str]) -> Result<Output, CommandError> {
    let alone = |run: fn(&Context<'_>) -> Result<Output, CommandError>| match arguments {
        [_] => run(context),
        _ => Err(usage("it takes no argument here")),
    };
    match arguments {
        [] => Err(usage("of what?")),
        ["-i", ..] => alone(stat::usage),
        ["--census", ..] => alone(pages::census),
        ["-s", names @ ..] => slab::caches(context, names, false),
        ["-S", names @ ..] => slab::caches(context, names, true),
        ["-z", ..] => alone(zones::zones),
        ["-f", ..] => alone(|context| zones::free(context, false)),
        ["-F", ..] => alone(|context| zones::free(context, true)),
        ["-V", ..] => alone(stat::counters),
        ["-v", ..] => alone(vmalloc::areas),
        ["-h", ..] => alone(stat::hugetlb),
        ["-p", range @ ..] => pages::list(context, range),
        [word, ..] if word.starts_with('-') => {
            Err(usage(&format!("there is no '{}'", super::printable(word))))
        }
        addresses => address::identify(context, addresses),
    }
}

fn usage(what: &str) -> CommandError {
    CommandError(format!("kmem: {what}; try 'help kmem'"))
}
