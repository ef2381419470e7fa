//! `vtop`: virtual to physical, every level of the page tables decoded.

use super::args::{self, Address};
use super::{Command, CommandError, Context, Output, expression, page, printable};
use crate::addr::VirtAddr;
use crate::arch::x86_64::AddressSpace;
use crate::arch::x86_64::entry::{self, HighBits};
use crate::arch::x86_64::paging::{Step, TranslateError, Translation};
use crate::kernel::page::about::About;
use crate::kernel::page::mapping::SwapEntry;
use crate::kernel::{Kernel, Object};
use serde_json::{Value, json};
use std::fmt::Write;

pub const COMMAND: Command = Command {
    name: "vtop",
    arguments: "[-c PID] [-u|-k] ADDR...",
    summary: "virtual to physical, with every level of the page tables",
    help: "Each ADDR is followed through the page tables; each entry is shown with its flags by name, then the physical \
           address and its struct page. For a user address the area of user memory it lies in is shown, and for a page \
           that is in swap where it is there.\n\n\
           User addresses are those of the task after -c (a pid or the address of its task_struct), else of the task \
           chosen with 'set' or running on the selected CPU. -u takes an address for a user address and -k for a \
           kernel address, which it is by its highest bit otherwise.\n\n\
           Examples:\n  vtop init_task\n  vtop $rsp\n  vtop -c 150 7f98b2864000 7f98b2400000\n",
    run,
};

/// A translation with all that was met on the way.
struct Walk {
    at: VirtAddr,
    space: AddressSpace,
    steps: Vec<Step>,
    result: Result<Translation, TranslateError>,
}

fn run(context: &Context<'_>, arguments: &[&str]) -> Result<Output, CommandError> {
    let kernel = context.kernel()?;
    let usage = |what: &str| CommandError(format!("vtop: {what}; try 'help vtop'"));
    let (mut task, mut user, mut wanted) = (None, None, Vec::new());
    let mut words = arguments.iter();
    while let Some(&word) = words.next() {
        match word {
            "-c" => task = Some(args::task(context, words.next().ok_or_else(|| usage("-c needs a pid"))?)?),
            "-u" => user = Some(true),
            "-k" => user = Some(false),
            _ if word.starts_with('-') => return Err(usage(&format!("there is no '{}'", printable(word)))),
            _ => wanted.push(word),
        }
    }
    if wanted.is_empty() {
        return Err(usage("which address?"));
    }
    let (mut text, mut json) = (String::new(), Vec::new());
    for word in wanted {
        let Address::Virtual(at) = expression::place(context, word)? else {
            return Err(usage("a physical address has no page tables"));
        };
        let is_user = user.unwrap_or(at.0 >> 63 == 0);
        let (space, mm) = if is_user { user_space(context, task)? } else { (kernel.found().space, None) };
        let mut steps = Vec::new();
        let result = space.walk(&**kernel.backend(), at, &mut |step| steps.push(step));
        let walk = Walk { at, space, steps, result };
        if !text.is_empty() {
            text.push('\n');
        }
        let (said, value) = show(context, &walk, mm)?;
        text.push_str(&said);
        json.push(value);
    }
    Ok(Output { text, json: Value::Array(json) })
}

/// The page tables of a task's user memory, and its `mm_struct`.
pub fn user_space<'a>(
    context: &Context<'a>,
    task: Option<Object<'a>>,
) -> Result<(AddressSpace, Option<Object<'a>>), CommandError> {
    let kernel = context.kernel()?;
    let task = match task {
        Some(task) => task,
        None => context.task()?,
    };
    let mm = task.at("mm")?.ok_or_else(|| {
        let comm = task.member("comm").and_then(|comm| comm.text()).unwrap_or_default();
        CommandError(format!(
            "{} is a kernel thread or exiting: it has no user memory; choose another with -c PID",
            printable(&comm)
        ))
    })?;
    kernel.user_space(mm.at).map(|space| (space, Some(mm))).map_err(CommandError)
}

/// Which of the high bits left to software the kernel uses, by functions that came and went with them.
fn high_bits(kernel: &Kernel) -> HighBits {
    let has = |name: &str| kernel.symbol(name).is_some();
    // Since about v6.6 bit 58 is SAVED_DIRTY, and pte_mkwrite() a function; DEVMAP moved to 57, and went in about v6.17.
    let shadow_stacks = has("pte_mkwrite");
    let devmap = if shadow_stacks { 57 } else { 58 };
    HighBits {
        devmap: (has("follow_devmap_pmd") || has("follow_devmap_pud")).then_some(devmap),
        saved_dirty: shadow_stacks.then_some(58),
    }
}

fn show(context: &Context<'_>, walk: &Walk, mm: Option<Object<'_>>) -> Result<(String, Value), CommandError> {
    let kernel = context.kernel()?;
    let levels = walk.space.levels;
    let mut text = format!("virtual {}", walk.at);
    if let Ok(found) = &walk.result {
        let _ = write!(text, "  physical {}", found.phys);
    }
    if let Some(place) = kernel.describe_address(walk.at).filter(|_| mm.is_none()) {
        let _ = write!(text, "  <{place}>");
    }
    text.push('\n');
    let high = high_bits(kernel);
    let mut steps = Vec::new();
    for step in &walk.steps {
        let flags = entry::flags(step, walk.space.sme_mask, high);
        let name = step.level.name(levels);
        let _ =
            writeln!(text, "  {name:<3} at {:#014x}: {:#018x}  {}", step.at.0, step.entry, flags.join(" "));
        steps.push(json!({ "level": name, "at": format!("{}", step.at), "entry": format!("{:#x}", step.entry), "flags": flags }));
    }
    let mut swap = None;
    let mut about = Value::Null;
    let mut size = None;
    match &walk.result {
        Ok(found) => {
            size = Some(found.page_size);
            let size = match found.page_size {
                0x1000 => "4 KiB",
                0x20_0000 => "2 MiB",
                _ => "1 GiB",
            };
            let _ = writeln!(text, "  {size} page at {:#x}", found.phys.0 & !(found.page_size - 1));
            if let Some(error) = context.machine.why_phys(found.phys) {
                let _ = writeln!(text, "  its memory cannot be read: {error}");
            }
            match kernel.page_map().and_then(|map| About::new(kernel, map, found.phys.pfn())) {
                Ok(page) => {
                    let _ = writeln!(text, "  {}", printable(&page::line(&page)));
                    about = json!({ "page": format!("{}", page.at), "pfn": page.pfn.0, "kind": page.kind.name() });
                }
                Err(error) => {
                    let _ = writeln!(text, "  no struct page: {error}");
                }
            }
        }
        Err(error) => {
            let _ = writeln!(text, "  {error}");
            let last = walk.steps.last().filter(|step| entry::is_leaf(step));
            swap = last.filter(|_| mm.is_some()).and_then(|step| SwapEntry::from_pte(step.entry));
            if let Some(swap) = swap {
                let _ = writeln!(text, "  swap area {}, slot {:#x}", swap.area, swap.offset);
            }
        }
    }
    let mut area = Value::Null;
    if let Some(mm) = mm {
        match kernel.vma_at(mm.at, walk.at) {
            Ok(Some(vma)) => {
                let what = super::vm::what(&vma);
                let name = if what.is_empty() { "anonymous" } else { &what };
                let _ = writeln!(
                    text,
                    "  vma {}  {:#x}-{:#x} {} {}",
                    vma.at,
                    vma.start,
                    vma.end,
                    vma.permissions(),
                    printable(name)
                );
                area = json!({
                    "at": vma.at.to_string(), "start": format!("{:#x}", vma.start), "end": format!("{:#x}", vma.end),
                    "permissions": vma.permissions(), "file": vma.file.as_ref().map(|(_, file)| file.shown()),
                });
            }
            Ok(None) => text.push_str("  in no area of user memory\n"),
            Err(error) => {
                let _ = writeln!(text, "  its area cannot be found: {error}");
            }
        }
    }
    let json = json!({
        "virtual": format!("{}", walk.at),
        "physical": walk.result.as_ref().ok().map(|found| format!("{}", found.phys)),
        "page_size": size,
        "steps": steps,
        "status": walk.result.as_ref().err().map_or("mapped", TranslateError::kind),
        "text": walk.result.as_ref().err().map(ToString::to_string),
        "swap": swap.map(|swap| json!({ "area": swap.area, "offset": swap.offset })),
        "page": about,
        "vma": area,
    });
    Ok((text, json))
}
