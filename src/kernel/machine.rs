//! A machine and, where one was found, the kernel in it: what gdb and the commands work on.

use super::cpus::{ONLINE, PRESENT, derive_gs_base, distrust_thread_bases};
use super::discover::{self, DiscoverError, Progress};
use super::vmlinux::{choose_debug_info, types_missing};
use super::{Kernel, TypesFrom};
use crate::addr::{PhysAddr, VirtAddr};
use crate::arch::x86_64::paging::Step;
use crate::arch::x86_64::{AddressSpace, Reg, RegisterFile, Saved, TranslateError, Translation, VirtOutcome};
use crate::backend::{Backend, RegisterSource, SavedCpu};
use crate::bytes::printable;
use crate::debuginfo::{self, DebugInfo, find};
use crate::memory::MemoryError;
use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A CPU's number in the kernel (`smp_processor_id()`).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct CpuId(pub u32);

impl fmt::Display for CpuId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// One CPU and what ran on it.
#[derive(Clone, Debug)]
pub struct Cpu {
    /// Its number.
    pub id: CpuId,
    /// Its registers; nothing saved where the source has none for it.
    pub regs: RegisterFile,
    /// `comm` of the task that ran on it, if symbols and types told; untrusted text.
    pub comm: Option<String>,
    /// `pid` of that task.
    pub pid: Option<i32>,
    /// What else a reader must know: "panicked here", "offline", "user mode", "registers not saved".
    pub notes: Vec<String>,
}

/// How to open a machine.
#[derive(Default)]
pub struct Options {
    /// The vmlinux to use; refused if it is not this kernel's. Without it, one is looked for.
    pub vmlinux: Option<PathBuf>,
    /// Where to look for one besides the places that distributions use.
    pub places: find::Places,
    /// What tells the types.
    pub types: TypesFrom,
}

/// Why a machine could not be opened as asked.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The vmlinux that was asked for cannot be used at all.
    #[error(transparent)]
    DebugInfo(#[from] debuginfo::Error),
    /// The vmlinux that was asked for is another kernel's.
    #[error("'{path}' {why}")]
    Mismatch {
        /// The file.
        path: String,
        /// Both build-ids and the cure, as the rest of the sentence.
        why: String,
    },
}

/// A target for as long as kstub has it open.
pub struct Machine {
    backend: Arc<dyn Backend>,
    kernel: Result<Kernel, Option<DiscoverError>>,
    cpus: Vec<Cpu>,
    first: CpuId,
    text_base: Option<VirtAddr>,
    user_spaces: Vec<UserSpace>,
    /// Which of the backend's saved registers are whose.
    saved: Vec<(CpuId, usize)>,
    problems: Vec<String>,
    no_vmlinux: Option<String>,
}

/// Where the user addresses of the task on a CPU lead; `Err` says why nowhere.
type UserSpace = Result<AddressSpace, String>;

/// Where a virtual address leads, level by level.
#[derive(Clone, Debug)]
pub struct Why {
    /// Whose page tables were walked, as a noun phrase.
    pub tables: String,
    /// 4 or 5; 0 without tables.
    pub levels: u8,
    /// The entries read, top first.
    pub steps: Vec<Step>,
    /// The physical address, or why there is none.
    pub translation: Result<Translation, TranslateError>,
    /// Why the byte at that physical address cannot be read; `None` if it can.
    pub unreadable: Option<MemoryError>,
}

impl Machine {
    /// Finds the kernel in `backend`, its vmlinux, and whose registers are whose.
    /// Only a vmlinux that was asked for and does not fit is an error; all else is a problem to report.
    pub fn open(
        backend: Arc<dyn Backend>,
        options: &Options,
        progress: Progress<'_>,
    ) -> Result<Self, OpenError> {
        let (mut problems, mut no_vmlinux) = (Vec::new(), None);
        let found = discover::discover(&*backend, progress);
        let kernel = match found {
            Ok(mut found) => {
                tracing::info!(
                    "kernel {} was found by {}: KASLR offset {:#x}, {}-level page tables at {}",
                    printable(&found.release),
                    found.by,
                    found.kaslr_offset,
                    found.space.levels,
                    found.space.root
                );
                problems.append(&mut found.problems);
                let debug_info = choose_debug_info(&*backend, &mut found, options, &mut problems)?
                    .map_err(|why| no_vmlinux = Some(why))
                    .ok();
                let (beside, debug_dirs) = (options.places.beside.clone(), options.places.debug_dirs.clone());
                let places = find::Places { beside, debug_dirs, ..find::Places::default() };
                let kernel =
                    Kernel::new(backend.clone(), found, debug_info).with_types(options.types, places);
                problems.extend(types_missing(&kernel, options.types));
                if let Err(why) = kernel.symbols() {
                    problems.push(format!("{why}: no symbols; pass --vmlinux FILE that has a symbol table"));
                }
                Ok(kernel)
            }
            Err(error) => {
                tracing::info!("{error}");
                problems.push(error.to_string());
                Err(Some(error))
            }
        };
        Ok(Self { no_vmlinux, ..Self::with_kernel(backend, kernel, problems) })
    }

    /// The same machine at another moment, which `backend` has memory and registers of: the kernel is known, and not
    /// looked for again, but nothing that changes while it runs is kept. The caller knows that it is the same boot.
    pub fn again(&self, backend: Arc<dyn Backend>) -> Self {
        let kernel = match &self.kernel {
            Ok(kernel) => Ok(kernel.again(backend.clone())),
            Err(error) => Err(error.clone()),
        };
        Self::with_kernel(backend, kernel, Vec::new())
    }

    /// A machine whose kernel is not known, because of `why`.
    pub fn without_kernel(backend: Arc<dyn Backend>, why: String) -> Self {
        Self::with_kernel(backend, Err(None), vec![why])
    }

    fn with_kernel(
        backend: Arc<dyn Backend>,
        kernel: Result<Kernel, Option<DiscoverError>>,
        mut problems: Vec<String>,
    ) -> Self {
        let mut machine = match &kernel {
            Ok(kernel) => {
                let (cpus, saved) = kernel_cpus(kernel, &*backend, &mut problems);
                let first = first_cpu(kernel, &cpus);
                let machine = Self::from_parts(backend, cpus, first, Some(text_base(kernel)));
                Self { saved, ..machine }
            }
            Err(_) => {
                let (cpus, saved) = by_order(&*backend);
                let first = cpus.first().map_or(CpuId(0), |cpu| cpu.id);
                Self { saved, ..Self::from_parts(backend, cpus, first, None) }
            }
        };
        if let Ok(kernel) = &kernel {
            machine.user_spaces = machine.cpus.iter().map(|cpu| user_space(kernel, cpu)).collect();
        }
        machine.kernel = kernel;
        machine.problems = problems;
        machine
    }

    /// A machine of given CPUs without a known kernel: addresses lead through each CPU's CR3.
    /// `cpus` may be empty: then there is one CPU without registers. `first` is where a debugger starts.
    pub fn from_parts(
        backend: Arc<dyn Backend>,
        mut cpus: Vec<Cpu>,
        first: CpuId,
        text_base: Option<VirtAddr>,
    ) -> Self {
        if cpus.is_empty() {
            cpus.push(Cpu {
                id: CpuId(0),
                regs: RegisterFile::default(),
                comm: None,
                pid: None,
                notes: vec!["registers not saved".to_owned()],
            });
        }
        cpus.sort_by_key(|cpu| cpu.id);
        if cpus.iter().all(|cpu| cpu.regs.u64(Reg::Rip).is_none())
            && let Some(cpu) = cpus.iter_mut().find(|cpu| cpu.id == first)
        {
            place_pc(cpu, text_base);
        }
        let user_spaces = cpus.iter().map(|cpu| cr3_space(&cpu.regs)).collect();
        let (saved, problems) = (Vec::new(), Vec::new());
        let no_vmlinux = None;
        Self { backend, kernel: Err(None), cpus, first, text_base, user_spaces, saved, problems, no_vmlinux }
    }

    /// The memory and saved registers underneath.
    pub fn backend(&self) -> &Arc<dyn Backend> {
        &self.backend
    }

    /// The kernel, where one was found.
    pub fn kernel(&self) -> Option<&Kernel> {
        self.kernel.as_ref().ok()
    }

    /// What is missing or doubtful, one sentence each, with the cure: the source's problems and our own.
    pub fn problems(&self) -> Vec<String> {
        let own = self.no_vmlinux.iter().chain(&self.problems).cloned();
        self.backend.problems().into_iter().chain(own).collect()
    }

    /// That of the problems which is about the vmlinux: many commands do as well without one.
    pub fn no_vmlinux(&self) -> Option<&str> {
        self.no_vmlinux.as_deref()
    }

    /// The CPUs in ascending order of number; never empty (a source without registers has one CPU with none).
    pub fn cpus(&self) -> &[Cpu] {
        &self.cpus
    }

    /// The CPU with this number.
    pub fn cpu(&self, id: CpuId) -> Option<&Cpu> {
        self.cpus.get(self.index_of(id)?)
    }

    fn index_of(&self, id: CpuId) -> Option<usize> {
        self.cpus.binary_search_by_key(&id, |cpu| cpu.id).ok()
    }

    /// The CPU that the backend's saved registers with this index are of: which CPU a guest's vCPU is.
    pub fn cpu_of_saved(&self, index: usize) -> Option<CpuId> {
        self.saved.iter().find_map(|&(cpu, saved)| (saved == index).then_some(cpu))
    }

    /// Index of the backend's saved registers of a CPU: which vCPU a guest's CPU is.
    pub fn saved_of_cpu(&self, cpu: CpuId) -> Option<usize> {
        self.saved.iter().find_map(|&(id, saved)| (id == cpu).then_some(saved))
    }

    /// The CPU a debugger should start on: the one that panicked, else the first.
    pub fn first_cpu(&self) -> CpuId {
        self.first
    }

    /// Reads virtual memory as `cpu` should see it: kernel addresses through the kernel's tables, user
    /// addresses through those of the task that ran on `cpu`. Stops exactly at the first unreadable byte.
    pub fn read_virt(&self, cpu: CpuId, at: VirtAddr, buf: &mut [u8]) -> VirtOutcome {
        match self.space_for(cpu, at) {
            Ok((space, _)) => space.read(&*self.backend, at, buf),
            Err(why) => {
                let error = TranslateError::NoTables { at, why };
                VirtOutcome { filled: 0, stopped: (!buf.is_empty()).then_some(error.into()) }
            }
        }
    }

    /// Reads virtual memory as the task at `task` (its `struct task_struct`) sees it, whether it runs or not.
    pub fn read_as_task(&self, task: VirtAddr, at: VirtAddr, buf: &mut [u8]) -> VirtOutcome {
        let no_tables = |why: &str| {
            let error = TranslateError::NoTables { at, why: why.to_owned() };
            VirtOutcome { filled: 0, stopped: (!buf.is_empty()).then_some(error.into()) }
        };
        let Ok(kernel) = &self.kernel else { return no_tables("no kernel was found") };
        if at.0 >> 63 == 1 {
            return kernel.read(at, buf);
        }
        match kernel.task(task).mm.flatten().map(|mm| kernel.user_space(mm)) {
            Some(Ok(space)) => space.read(&*self.backend, at, buf),
            Some(Err(why)) => no_tables(&why),
            None => no_tables("the task is a kernel thread or exiting: it has no user memory"),
        }
    }

    /// Follows `at` level by level, as [`Self::read_virt`] would.
    pub fn why(&self, cpu: CpuId, at: VirtAddr) -> Why {
        let (space, tables) = match self.space_for(cpu, at) {
            Ok(found) => found,
            Err(why) => {
                let translation = Err(TranslateError::NoTables { at, why });
                return Why {
                    tables: "none".into(),
                    levels: 0,
                    steps: Vec::new(),
                    translation,
                    unreadable: None,
                };
            }
        };
        let mut steps = Vec::new();
        let translation = space.walk(&*self.backend, at, &mut |step| steps.push(step));
        let unreadable = translation.as_ref().ok().and_then(|t| self.why_phys(t.phys));
        Why { tables, levels: space.levels, steps, translation, unreadable }
    }

    /// Where in physical memory the byte is that `cpu`, or the task at `task`, has at `at`.
    pub fn phys_of(
        &self,
        cpu: CpuId,
        task: Option<VirtAddr>,
        at: VirtAddr,
    ) -> Result<PhysAddr, TranslateError> {
        let space = match (task, &self.kernel) {
            (Some(task), Ok(kernel)) if at.0 >> 63 == 0 => match kernel.task(task).mm.flatten() {
                Some(mm) => kernel.user_space(mm),
                None => Err("the task is a kernel thread or exiting: it has no user memory".to_owned()),
            },
            _ => self.space_for(cpu, at).map(|(space, _)| space),
        };
        let space = space.map_err(|why| TranslateError::NoTables { at, why })?;
        space.walk(&*self.backend, at, &mut |_| ()).map(|translation| translation.phys)
    }

    /// Why the byte at a physical address cannot be read; `None` if it can.
    pub fn why_phys(&self, at: PhysAddr) -> Option<MemoryError> {
        self.backend.read_phys_exact(at, &mut [0]).err()
    }

    /// Run-time address of the kernel's first loaded segment (`_text` with KASLR): what `qOffsets` reports.
    pub fn text_base(&self) -> Option<VirtAddr> {
        self.text_base
    }

    /// The vmlinux that belongs to this kernel, if one was found.
    pub fn vmlinux(&self) -> Option<&Path> {
        Some(self.kernel()?.debug_info()?.path())
    }

    /// The tables that `at` belongs to on `cpu`, and whose they are.
    fn space_for(&self, cpu: CpuId, at: VirtAddr) -> Result<(AddressSpace, String), String> {
        let is_kernel = at.0 >> 63 == 1;
        if let (true, Ok(kernel)) = (is_kernel, &self.kernel) {
            return Ok((kernel.found().space, "the kernel's page tables".to_owned()));
        }
        let (one, space) = self
            .index_of(cpu)
            .and_then(|i| Some((self.cpus.get(i)?, self.user_spaces.get(i)?)))
            .ok_or_else(|| format!("there is no CPU {cpu}"))?;
        let tables = match (self.kernel.is_ok(), one.pid, &one.comm) {
            (true, Some(pid), Some(comm)) => format!("the page tables of task {pid} ({comm}) on CPU {cpu}"),
            _ => format!("the page tables in CPU {cpu}'s cr3"),
        };
        space.clone().map(|space| (space, tables))
    }
}

fn text_base(kernel: &Kernel) -> VirtAddr {
    let found = kernel.found();
    match kernel.debug_info().and_then(DebugInfo::first_load) {
        Some(linked) => VirtAddr(linked.wrapping_add(found.kaslr_offset)),
        None => found.text,
    }
}

/// The CPU that panicked, else the first; but one with a pc, without which gdb refuses the whole target.
fn first_cpu(kernel: &Kernel, cpus: &[Cpu]) -> CpuId {
    let panicked = kernel.panic_cpu();
    let with_pc = || cpus.iter().filter(|cpu| cpu.regs.u64(Reg::Rip).is_some());
    let is_panicked = |cpu: &&Cpu| Some(cpu.id) == panicked;
    let without_pc = || cpus.iter().find(is_panicked).or(cpus.first());
    let chosen = with_pc().find(is_panicked).or_else(|| with_pc().next()).or_else(without_pc);
    chosen.map_or(CpuId(0), |cpu| cpu.id)
}

/// Gives a CPU a pc, so that gdb takes a target on which no CPU's was saved: it refuses one without.
fn place_pc(cpu: &mut Cpu, text_base: Option<VirtAddr>) {
    const FROM: &str = "as a placeholder: no CPU's pc was saved, and gdb wants one";
    let pc = text_base.unwrap_or_default();
    cpu.regs.set(Reg::Rip, Saved::Derived(pc.0.into(), FROM));
    cpu.notes.push("pc is a placeholder".to_owned());
}

/// CPUs numbered by the order of their saved registers.
fn by_order(backend: &dyn Backend) -> (Vec<Cpu>, Vec<(CpuId, usize)>) {
    let cpus = numbered_cpus(backend);
    let saved = cpus.iter().map(|cpu| cpu.id).zip(0..).collect();
    (cpus, saved)
}

/// Register sets numbered in the order of the source: all that can be said without a kernel.
fn numbered_cpus(backend: &dyn Backend) -> Vec<Cpu> {
    let numbered = (0..).zip(backend.saved_cpus());
    numbered
        .map(|(id, saved)| {
            let mut cpu =
                Cpu { id: CpuId(id), regs: saved.regs.clone(), comm: None, pid: None, notes: Vec::new() };
            if saved.source == RegisterSource::KernelPrstatus {
                cpu.notes.push("CPU number by order of notes".to_owned());
                cpu.pid = saved.pid.map(|pid| pid as i32);
            }
            note_mode(&mut cpu);
            cpu
        })
        .collect()
}

fn note_mode(cpu: &mut Cpu) {
    if cpu.regs.in_user_mode() == Some(true) {
        cpu.notes.push("user mode".to_owned());
    }
}

/// The CPUs that are present or left registers, with their tasks, and which saved registers are whose.
fn kernel_cpus(
    kernel: &Kernel,
    backend: &dyn Backend,
    problems: &mut Vec<String>,
) -> (Vec<Cpu>, Vec<(CpuId, usize)>) {
    let saved = backend.saved_cpus();
    let Some(attributed) = kernel.attribute(saved) else {
        if kernel.symbols().is_ok() {
            problems.push(
                "which CPUs the kernel has cannot be read: registers are numbered by order only".to_owned(),
            );
        }
        return by_order(backend);
    };
    // Before the kernel has brought a CPU up it knows of none.
    if attributed.is_empty() && !saved.is_empty() {
        return by_order(backend);
    }
    if attributed.len() < saved.len() {
        problems.push(format!(
            "{} of {} register sets are of no CPU this kernel can have, and are not shown",
            saved.len() - attributed.len(),
            saved.len()
        ));
    }
    let by_cpu: HashMap<CpuId, _> = attributed.iter().map(|a| (a.cpu, a)).collect();
    let online = kernel.cpu_mask(&ONLINE);
    let panicked = kernel.panic_cpu();
    let mut ids: Vec<CpuId> = by_cpu.keys().copied().collect();
    ids.extend(kernel.cpu_mask(&PRESENT).unwrap_or_default());
    ids.sort();
    ids.dedup();
    let cpu = |id: CpuId| {
        let one = by_cpu.get(&id).and_then(|a| Some((a, saved.get(a.index)?)));
        // A guest's vCPUs come by their index, which is the number that the kernel gives them.
        let by_index = |one: &SavedCpu| one.source == RegisterSource::Qemu && backend.live().is_some();
        let certain = one.is_none_or(|(a, one)| a.certain || by_index(one));
        let mut regs = one.map(|(_, one)| one.regs.clone()).unwrap_or_default();
        if one.is_some_and(|(_, one)| one.source == RegisterSource::KernelPrstatus) {
            distrust_thread_bases(kernel, &mut regs);
        }
        if let Some(base) = kernel.per_cpu_offset(id).filter(|_| certain) {
            derive_gs_base(&mut regs, base);
        }
        let (comm, pid) = kernel.current(id).map_or((None, None), |task| (task.comm, task.pid));
        let mut cpu = Cpu { id, regs, comm, pid, notes: Vec::new() };
        if panicked == Some(id) {
            cpu.notes.push("panicked here".to_owned());
        }
        if online.as_ref().is_some_and(|online| !online.contains(&id)) {
            cpu.notes.push("offline".to_owned());
        }
        match one {
            Some(_) => note_mode(&mut cpu),
            None => cpu.notes.push("registers not saved".to_owned()),
        }
        if !certain {
            cpu.notes.push(BY_ORDER.to_owned());
        }
        let found = kernel.found();
        // The tables of a program that has ended meanwhile are nothing's.
        if discover::runs_on(backend, &found.space, found.phys_base, &cpu.regs) == Some(false)
            && !backend.has_gone_on()
        {
            cpu.notes.push(FOREIGN_TABLES.to_owned());
        }
        cpu
    };
    let cpus: Vec<Cpu> = ids.into_iter().map(cpu).collect();
    let with_note = |note: &str| {
        let ids = cpus.iter().filter(|cpu| cpu.notes.iter().any(|n| n == note)).map(|cpu| cpu.id.to_string());
        Some(ids.collect::<Vec<_>>().join(", ")).filter(|ids| !ids.is_empty())
    };
    if let Some(ids) = with_note(BY_ORDER) {
        problems.push(format!(
            "no crash note, gs base or pid says whose the registers shown for CPU {ids} are: given by order only"
        ));
    }
    if let Some(ids) = with_note(FOREIGN_TABLES) {
        problems.push(format!(
            "CPU {ids} walks page tables of something else than this kernel (firmware, or a kernel started after it)"
        ));
    }
    (cpus, attributed.iter().map(|one| (one.cpu, one.index)).collect())
}

/// Note on a CPU whose registers were given to it without evidence.
const BY_ORDER: &str = "registers by order of notes";
/// Note on a CPU whose CR3 is not of this kernel.
const FOREIGN_TABLES: &str = "not in this kernel's page tables";

/// User addresses of the task on `cpu`: through its `mm`; where types do not tell, through CR3.
fn user_space(kernel: &Kernel, cpu: &Cpu) -> UserSpace {
    let mm = kernel.current(cpu.id).and_then(|task| task.mm);
    match mm {
        Some(Some(mm)) => kernel.user_space(mm),
        Some(None) => {
            let task = match (&cpu.comm, cpu.pid) {
                (Some(comm), Some(pid)) => format!("{comm} (pid {pid})"),
                _ => "the task".to_owned(),
            };
            Err(format!("CPU {} runs {task}, a kernel thread or exiting: it has no user memory", cpu.id))
        }
        None => cr3_space(&cpu.regs)
            .map(|space| AddressSpace { sme_mask: kernel.found().space.sme_mask, ..space }),
    }
}

/// The tables in a CPU's CR3.
fn cr3_space(regs: &RegisterFile) -> UserSpace {
    let cr3 = regs.u64(Reg::Cr3).ok_or(
        "no page tables are known for it: cr3 was not saved, and without symbols and types the task's own are out of \
         reach (pass --vmlinux FILE)",
    )?;
    AddressSpace::from_control_registers(regs.u64(Reg::Cr0), cr3, regs.u64(Reg::Cr4)).ok_or_else(|| {
        "the CPU does not walk 64-bit page tables: paging is off, or it is in a 32-bit mode".to_owned()
    })
}
