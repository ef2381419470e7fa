//! Who maps a page: the areas of user memory that its anon_vma, file or KSM node leads to, and their tasks.
//!
//! An area is where a page could be mapped; page tables say whether it is. Source: `mm/rmap.c`, `mm/ksm.c`,
//! `include/linux/rmap.h` (`struct anon_vma_chain`), `include/linux/interval_tree_generic.h`.

use super::mapping::Mapping;
use crate::addr::{PAGE_SIZE, PhysAddr, VirtAddr};
use crate::kernel::{Kernel, Object, ObjectError};
use std::collections::{HashMap, HashSet};

/// More areas than one page is shown for; a page of libc is in every process.
const AREAS_MAX: usize = 1 << 16;

/// One place where a page is mapped.
#[derive(Clone, Debug)]
pub struct User {
    /// Its `struct vm_area_struct`.
    pub vma: VirtAddr,
    /// Its `struct mm_struct`.
    pub mm: VirtAddr,
    /// The user address of the page.
    pub address: VirtAddr,
    /// pid and comm of the processes with this address space. Untrusted text.
    pub tasks: Vec<(i32, String)>,
}

/// Where a page is mapped.
#[derive(Clone, Debug, Default)]
pub struct Users {
    /// Mapped there, as the page tables say.
    pub users: Vec<User>,
    /// Areas it could be mapped in and is not.
    pub unmapped: usize,
    /// Broken trees and unreadable areas.
    pub problems: Vec<String>,
}

/// The processes of each address space.
pub fn tasks_by_mm(kernel: &Kernel) -> HashMap<u64, Vec<(i32, String)>> {
    let mut by_mm: HashMap<u64, Vec<(i32, String)>> = HashMap::new();
    for task in kernel.tasks().map(|all| all.tasks).unwrap_or_default() {
        let (Ok(mm), Ok(pid), Ok(tgid)) = (task.get("mm"), task.get("pid"), task.get("tgid")) else {
            continue;
        };
        if mm != 0 && pid == tgid {
            let comm = task.member("comm").and_then(|comm| comm.text()).unwrap_or_default();
            by_mm.entry(mm).or_default().push((pid as i32, comm));
        }
    }
    by_mm
}

/// Who maps the page at `phys` with this mapping. `indexes` are the page offsets that it may have in the mapping: one,
/// but for hugetlb pages, whose index has been counted in huge pages and in base pages.
pub fn of(kernel: &Kernel, mapping: &Mapping<'_>, indexes: &[u64], phys: PhysAddr) -> Users {
    let mut users = Users::default();
    let found = match mapping {
        Mapping::Anon(anon_vma) => anon_areas(*anon_vma, &mut users.problems),
        Mapping::File(space) => file_areas(*space, &mut users.problems),
        Mapping::Ksm(node) => ksm_areas(kernel, *node, &mut users.problems),
        Mapping::None | Mapping::Movable(_) => return users,
    };
    let areas = match found {
        Ok(areas) => areas,
        Err(error) => {
            users.problems.push(error.to_string());
            return users;
        }
    };
    let by_mm = tasks_by_mm(kernel);
    for (vma, fixed) in areas {
        match mapped_at(vma, fixed, indexes, phys) {
            Ok(Some((mm, address))) => {
                let tasks = by_mm.get(&mm.0).cloned().unwrap_or_default();
                users.users.push(User { vma: vma.at, mm, address, tasks });
            }
            Ok(None) => users.unmapped += 1,
            Err(error) => users.problems.push(format!("area at {}: {error}", vma.at)),
        }
    }
    users.users.sort_by_key(|user| (user.tasks.first().map(|(pid, _)| *pid), user.address));
    users
}

/// Where in the area the page is, by the page tables of its address space. `fixed` is the address if it is known.
fn mapped_at(
    vma: Object<'_>,
    fixed: Option<VirtAddr>,
    indexes: &[u64],
    phys: PhysAddr,
) -> Result<Option<(VirtAddr, VirtAddr)>, ObjectError> {
    let (start, end) = (vma.get("vm_start")?, vma.get("vm_end")?);
    // In v7.3, not yet in v6.12: anonymous pages of a private mapping of a file have offsets of their own.
    let own = |half: &str| vma.get(half).ok();
    let anon = own("__vm_anon_pgoff_hi").zip(own("__vm_anon_pgoff_lo")).map(|(high, low)| high << 32 | low);
    let offsets: Vec<u64> = [Some(vma.get("vm_pgoff")?), anon].into_iter().flatten().collect();
    let mm = VirtAddr(vma.get("vm_mm")?);
    let kernel = vma.kernel();
    let Ok(space) = kernel.user_space(mm) else { return Ok(None) };
    let at = |offset: u64, index: u64| start.wrapping_add(index.wrapping_sub(offset).wrapping_mul(PAGE_SIZE));
    let by_index = offsets.iter().flat_map(|&offset| indexes.iter().map(move |&index| at(offset, index)));
    let candidates: Vec<u64> = fixed.map(|at| at.0).into_iter().chain(by_index).collect();
    let is_there = |at: &u64| {
        let translated = space.translate(&**kernel.backend(), VirtAddr(*at));
        (start..end).contains(at) && translated.is_ok_and(|t| t.phys.page_start() == phys.page_start())
    };
    Ok(candidates.into_iter().find(is_there).map(|at| (mm, VirtAddr(at))))
}

type Found<'k> = Result<Vec<(Object<'k>, Option<VirtAddr>)>, ObjectError>;

fn anon_areas<'k>(anon_vma: Object<'k>, problems: &mut Vec<String>) -> Found<'k> {
    let walk = anon_vma.kernel().rb_tree(anon_vma.member("rb_root.rb_root")?.at);
    problems.extend(walk.problem);
    let mut areas = Vec::new();
    for node in walk.nodes {
        let chain = anon_vma.kernel().object("rb_node", node)?.container_of("anon_vma_chain", "rb")?;
        areas.extend(chain.at("vma")?.map(|vma| (vma, None)));
    }
    Ok(areas)
}

fn file_areas<'k>(space: Object<'k>, problems: &mut Vec<String>) -> Found<'k> {
    let walk = space.kernel().rb_tree(space.member("i_mmap.rb_root")?.at);
    problems.extend(walk.problem);
    let of = |node| {
        Ok((space.kernel().object("rb_node", node)?.container_of("vm_area_struct", "shared.rb")?, None))
    };
    walk.nodes.into_iter().map(of).collect()
}

/// A stable node's list has one item for each address that was merged; forks share the item's anon_vma.
fn ksm_areas<'k>(kernel: &'k Kernel, node: VirtAddr, problems: &mut Vec<String>) -> Found<'k> {
    // Since Linux commit 21fbd59136e0 ("ksm: add the ksm prefix to the names of the ksm private structures") (in v6.1).
    let names = [("ksm_stable_node", "ksm_rmap_item"), ("stable_node", "rmap_item")];
    let known = names.into_iter().find(|(name, _)| kernel.object(name, node).is_ok());
    let (stable, item) = known.ok_or_else(|| ObjectError::NoType("ksm_stable_node".into()))?;
    let mut next = kernel.object(stable, node)?.get("hlist.first")?;
    let mut areas = Vec::new();
    let mut seen = HashSet::new();
    while next != 0 && areas.len() < AREAS_MAX {
        if !seen.insert(next) {
            problems.push(format!("KSM node at {node}: its list has a cycle at {next:#x}"));
            break;
        }
        let item = kernel.object("hlist_node", VirtAddr(next))?.container_of(item, "hlist")?;
        let address = VirtAddr(item.get("address")?).page_start();
        if let Some(anon_vma) = item.at("anon_vma")? {
            let theirs = anon_areas(anon_vma, problems)?;
            areas.extend(theirs.into_iter().map(|(vma, _)| (vma, Some(address))));
        }
        next = kernel.read_u64(VirtAddr(next)).unwrap_or(0);
    }
    Ok(areas)
}
