//! Finding a kernel in memory that someone else filled, and reading its log.
#![no_main]

use kstub::addr::{PhysAddr, PhysRange};
use kstub::arch::x86_64::{Reg, RegisterFile};
use kstub::backend::{Backend, Fact, RegisterSource, SavedCpu};
use kstub::kernel::Kernel;
use kstub::kernel::discover::{FoundBy, discover, runs_on};
use kstub::memory::{MemoryImage, PhysicalMemory, ReadOutcome};
use kstub_fuzz::{memory, take, take_bytes, take_u64};
use std::sync::Arc;

struct Ram {
    memory: MemoryImage,
    cpus: Vec<SavedCpu>,
    note: Option<Vec<u8>>,
    hint: u64,
}

impl PhysicalMemory for Ram {
    fn read_phys(&self, at: PhysAddr, buf: &mut [u8]) -> ReadOutcome {
        self.memory.read_phys(at, buf)
    }
    fn ranges(&self) -> Vec<PhysRange> {
        self.memory.ranges()
    }
}

impl Backend for Ram {
    fn saved_cpus(&self) -> &[SavedCpu] {
        &self.cpus
    }
    fn vmcoreinfo_note(&self) -> Option<&[u8]> {
        self.note.as_deref()
    }
    fn phys_base_hints(&self) -> Vec<u64> {
        vec![self.hint]
    }
    fn facts(&self) -> Vec<Fact> {
        Vec::new()
    }
    fn problems(&self) -> Vec<String> {
        Vec::new()
    }
}

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let mut rest = input;
    let [flags] = take(&mut rest);
    let mut regs = RegisterFile::default();
    regs.set_known(Reg::Cr3, take_u64(&mut rest));
    regs.set_known(Reg::Cr4, take_u64(&mut rest));
    let hint = take_u64(&mut rest);
    let note = Some(take_bytes(&mut rest).to_vec()).filter(|note| !note.is_empty());
    let cpu = SavedCpu { regs, source: RegisterSource::Qemu, pid: None, prstatus: Vec::new() };
    let cpus = if flags & 1 == 1 { vec![cpu.clone()] } else { Vec::new() };
    let backend = Arc::new(Ram { memory: memory(rest), cpus, note, hint });
    let found = match discover(&*backend, &|_, _| ()) {
        Ok(found) => found,
        Err(error) => return kstub_fuzz::check_text(&error.to_string()),
    };
    match found.by {
        FoundBy::Note => assert!(backend.note.is_some()),
        FoundBy::Scan(at) => assert_eq!(backend.read_phys(at, &mut [0; 10]).filled, 10),
        FoundBy::PageTables => assert!(flags & 1 == 1),
    }
    assert!(!found.release.is_empty() && found.release.bytes().all(|byte| byte.is_ascii_graphic()));
    found.problems.iter().for_each(|text| kstub_fuzz::check_text(text));
    let _ = runs_on(&*backend, &found.space, found.phys_base, &cpu.regs);
    let kernel = Kernel::new(backend, found, None);
    if let Ok(records) = kernel.log() {
        assert!(records.len() <= 1 << 20);
    }
    let _ = kernel.failure();
});
