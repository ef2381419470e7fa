//! `kmem ADDR`: what an address belongs to.

use super::slab;
use crate::addr::VirtAddr;
use crate::command::args::Address;
use crate::command::{CommandError, Context, Output, expression, page, printable};
use crate::kernel::Kernel;
use crate::kernel::page::about::About;
use crate::kernel::page::{Kind, PageMap};
use crate::kernel::percpu::PerCpuOwner;
use crate::kernel::slab::Cache;
use serde_json::{Map, Value, json};
use std::fmt::Write;

pub fn identify(context: &Context<'_>, addresses: &[&str]) -> Result<Output, CommandError> {
    let kernel = context.kernel()?;
    let map = kernel.page_map()?;
    let (mut text, mut json) = (String::new(), Vec::new());
    for word in addresses {
        let address = expression::place(context, word)?;
        let at = match address {
            Address::Virtual(at) => at,
            Address::Physical(phys) => map.direct(phys.pfn()).wrapping_add(phys.0 % 4096),
        };
        let mut found = Found { text: format!("{word}: {at}\n"), json: Map::new() };
        found.json.insert("address".into(), json!(format!("{at}")));
        if let Address::Physical(phys) = address {
            found.add("physical", json!(format!("{phys}")), String::new());
        }
        found.look(context, kernel, map, at)?;
        if !text.is_empty() {
            text.push('\n');
        }
        text.push_str(&found.text);
        json.push(Value::Object(found.json));
    }
    Ok(Output { text, json: Value::Array(json) })
}

struct Found {
    text: String,
    json: Map<String, Value>,
}

impl Found {
    fn add(&mut self, key: &str, value: Value, line: String) {
        self.json.insert(key.into(), value);
        if !line.is_empty() {
            let _ = writeln!(self.text, "  {}", printable(&line));
        }
    }

    fn look(
        &mut self,
        context: &Context<'_>,
        kernel: &Kernel,
        map: &PageMap,
        at: VirtAddr,
    ) -> Result<(), CommandError> {
        if at.0 >> 63 == 0 {
            return Err(CommandError(format!("{at} is a user address; 'vtop -c PID {at}' follows it")));
        }
        if let Some(found) = kernel.symbolize(at) {
            self.add(
                "symbol",
                json!({ "name": found.name, "offset": found.offset, "module": found.module }),
                format!("symbol {found}"),
            );
        }
        if let Some(place) = kernel.per_cpu_reverse(at) {
            let name = match place.owner {
                PerCpuOwner::Variable { name, .. } | PerCpuOwner::Module(name) => Some(name),
                PerCpuOwner::Allocated => None,
            };
            self.add(
                "percpu",
                json!({ "cpu": place.cpu.0, "name": name, "offset": place.offset }),
                format!("per-CPU memory: {place}"),
            );
        }
        if map.is_vmalloc(at)
            && let Some(area) = kernel.vmap_area_at(at)
        {
            let line = format!(
                "vmalloc area {}-{} {} {}",
                area.start,
                area.end,
                area.flags().join(","),
                area.caller().unwrap_or_default()
            );
            self.add("vmalloc", json!({ "start": format!("{}", area.start), "end": format!("{}", area.end), "caller": area.caller() }), line);
        }
        self.task(kernel, at);
        // An address of a struct page is about that page.
        let (pfn, is_struct) = match map.pfn(at) {
            Some(pfn) => (pfn, true),
            None => match page::physical(context, at, None) {
                Ok(phys) => (phys.pfn(), false),
                Err(error) => {
                    self.add("page", Value::Null, error.to_string());
                    return Ok(());
                }
            },
        };
        if is_struct {
            self.add("struct_page", json!(true), format!("struct page of pfn {pfn}"));
        }
        match About::new(kernel, map, pfn) {
            Ok(about) => {
                if !is_struct && about.kind == Kind::Slab {
                    let memory = map.direct(pfn).wrapping_add(at.page_offset());
                    self.slab(map, &about, memory);
                }
                let json =
                    json!({ "page": format!("{}", about.at), "pfn": pfn.0, "kind": about.kind.name() });
                self.add("page", json, page::line(&about));
            }
            Err(error) => self.add("page", Value::Null, error.to_string()),
        }
        Ok(())
    }

    /// A task, if the address lies in a `struct task_struct` or a stack.
    fn task(&mut self, kernel: &Kernel, at: VirtAddr) {
        let Ok(tasks) = kernel.tasks() else { return };
        // THREAD_SIZE: `union thread_union` is as large as a stack.
        let stack_size = kernel.object("thread_union", VirtAddr(0)).and_then(|u| u.size()).unwrap_or(0x4000);
        // A task_struct is allocated only as far as this CPU's registers reach, so sizes overlap: the nearest counts.
        let mut nearest: Option<(VirtAddr, Value, String)> = None;
        for task in tasks.tasks {
            let size = task.size().unwrap_or(0);
            let comm = task.member("comm").and_then(|comm| comm.text()).unwrap_or_default();
            let pid = task.get("pid").unwrap_or(0) as i32;
            let stack = task.get("stack").unwrap_or(u64::MAX);
            let value = json!({ "at": format!("{}", task.at), "pid": pid, "comm": comm });
            if at.offset_from(task.at).is_some_and(|offset| offset < size) {
                if nearest.as_ref().is_none_or(|(other, ..)| *other < task.at) {
                    let line = format!("task {pid} ({comm}): its task_struct {}", task.at);
                    nearest = Some((task.at, value, line));
                }
            } else if at.0.checked_sub(stack).is_some_and(|offset| offset < stack_size) {
                self.add("stack_of", value, format!("kernel stack of task {pid} ({comm})"));
            }
        }
        if let Some((_, value, line)) = nearest {
            self.add("task", value, line);
        }
    }

    fn slab(&mut self, map: &PageMap, about: &About<'_>, at: VirtAddr) {
        let Some(both) = &about.slab else { return };
        let (line, json, object) = slab::object(map, both, at);
        self.add("slab", json, format!("slab cache {}: {line}", both.0.name));
        if let Some(object) = object {
            self.tracks(&both.0, object);
        }
    }

    fn tracks(&mut self, cache: &Cache<'_>, object: VirtAddr) {
        let mut all = Vec::new();
        for track in cache.tracks(object) {
            let symbol = cache.cache.kernel().symbolize(track.addr).map(|found| found.to_string());
            let by = symbol.unwrap_or_else(|| track.addr.to_string());
            let _ = writeln!(
                self.text,
                "  last {}: {by} by pid {} on CPU {} at jiffies {}",
                track.what, track.pid, track.cpu, track.when
            );
            all.push(json!({ "what": track.what, "by": by, "pid": track.pid, "cpu": track.cpu, "jiffies": track.when }));
        }
        if !all.is_empty() {
            self.json.insert("tracks".into(), Value::Array(all));
        }
    }
}
