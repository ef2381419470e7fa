//! User memory of a process: sizes, and the bytes themselves.
//!
//! Source: `include/linux/mm_types.h`, `include/linux/mm.h` (`get_mm_rss`), `include/linux/percpu_counter.h`.

use super::cpus::POSSIBLE;
use super::fields::Fields;
use super::{Kernel, ObjectError};
use crate::addr::{PAGE_SIZE, VirtAddr};
use crate::arch::x86_64::VirtOutcome;
use crate::bytes::array_at;
use std::collections::HashMap;

/// Kinds of resident pages; swapped-out ones are counted beside them and not resident.
const RESIDENT: [(&str, u64); 3] = [("MM_FILEPAGES", 0), ("MM_ANONPAGES", 1), ("MM_SHMEMPAGES", 3)];
/// Bytes of one CPU's counters that are read at once.
const STRIDE_MAX: u64 = 64;

/// How much memory an address space has, in bytes.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct MmSize {
    /// Mapped.
    pub virtual_size: Option<u64>,
    /// Resident.
    pub resident: Option<u64>,
}

/// Reads the sizes of address spaces.
pub struct MmReader<'k> {
    kernel: &'k Kernel,
    fields: Fields<'k>,
    /// Indexes of the resident kinds in `rss_stat`.
    kinds: [u64; 3],
    counter: Counter,
    per_cpu: Vec<u64>,
    /// Pages that threads have counted and not yet handed in, by `mm`.
    by_thread: HashMap<VirtAddr, i64>,
}

/// How `mm_struct.rss_stat` counts pages.
enum Counter {
    /// Since Linux commit f1a7941243c1 ("mm: convert mm's rss stats into percpu_counter") (in v6.2): size of one,
    /// offsets of `count` and, where there is more than one CPU, of `counters`.
    PerCpu {
        size: u64,
        count: u64,
        counters: Option<u64>,
    },
    /// One number for each kind.
    Plain,
    Unknown,
}

const TOTAL_VM: usize = 0;
const RSS: usize = 1;

impl Kernel {
    /// A reader for the address spaces of this kernel.
    pub fn mm_reader(&self) -> Result<MmReader<'_>, ObjectError> {
        let fields = Fields::new(self, "mm_struct", &[&["total_vm"], &["rss_stat.count", "rss_stat"]])?;
        let types = self.image_types()?;
        let kinds = RESIDENT.map(|(name, usual)| types.constant(name).map_or(usual, |value| value as u64));
        let percpu = || {
            let member = |name| Some(self.member("percpu_counter", name)?.offset);
            let size = types.size(types.composite("percpu_counter")?)?;
            Some(Counter::PerCpu { size, count: member("count")?, counters: member("counters") })
        };
        let counter = match self.has_member("mm_struct", "rss_stat.count") {
            true => Counter::Plain,
            false => percpu().unwrap_or(Counter::Unknown),
        };
        let cpus = self.cpu_mask(&POSSIBLE).unwrap_or_default();
        let per_cpu = cpus.into_iter().filter_map(|cpu| self.per_cpu_offset(cpu)).collect();
        let by_thread = self.counted_by_threads(&kinds).unwrap_or_default();
        Ok(MmReader { kernel: self, fields, kinds, counter, per_cpu, by_thread })
    }

    /// With SPLIT_RSS_COUNTING, until the counters became per-CPU ones in v6.2, each thread kept up to 64 changes to
    /// itself, which `/proc` does not show.
    fn counted_by_threads(&self, kinds: &[u64; 3]) -> Option<HashMap<VirtAddr, i64>> {
        let fields = Fields::new(self, "task_struct", &[&["mm"], &["rss_stat.count"]]).ok()?;
        let mut pages = HashMap::new();
        if !fields.has(1) {
            return Some(pages);
        }
        for task in self.tasks().ok()?.tasks {
            let row = fields.read(task.at);
            let (Some(mm), Some(counts)) = (row.pointer(0), row.bytes(1)) else { continue };
            let count = |kind: &u64| array_at(&counts, usize::try_from(kind * 4).ok()?);
            let sum: i64 = kinds.iter().filter_map(count).map(|n| i64::from(i32::from_le_bytes(n))).sum();
            *pages.entry(mm).or_insert(0) += sum;
        }
        Some(pages)
    }

    /// Reads user memory of the process with this `mm`; the error says why its page tables are unknown.
    pub fn read_user(&self, mm: VirtAddr, at: VirtAddr, buf: &mut [u8]) -> Result<VirtOutcome, String> {
        Ok(self.user_space(mm)?.read(&*self.backend, at, buf))
    }

    /// Bytes of RAM that the kernel manages.
    pub fn total_ram(&self) -> Option<u64> {
        // Since Linux commit ca79b0c211af ("mm: convert totalram_pages and totalhigh_pages variables to atomic")
        // (in v5.0).
        let at = ["_totalram_pages", "totalram_pages"].iter().find_map(|name| self.symbol(name))?;
        self.read_u64(at)?.checked_mul(PAGE_SIZE)
    }
}

impl MmReader<'_> {
    /// The sizes of the `struct mm_struct` at `mm`.
    pub fn size(&self, mm: VirtAddr) -> MmSize {
        let row = self.fields.read(mm);
        let bytes = |pages: u64| pages.checked_mul(PAGE_SIZE);
        let pages = row.bytes(RSS).and_then(|rss| self.resident(&rss));
        let pages = pages.map(|pages| pages.wrapping_add(self.by_thread.get(&mm).copied().unwrap_or(0)));
        // The sum of the parts may be a little below zero while a page moves from one to another.
        let pages = pages.map(|pages| pages.max(0) as u64);
        MmSize { virtual_size: row.u64(TOTAL_VM).and_then(bytes), resident: pages.and_then(bytes) }
    }

    fn resident(&self, rss: &[u8]) -> Option<i64> {
        let word = |at: u64| array_at(rss, usize::try_from(at).ok()?).map(i64::from_le_bytes);
        match self.counter {
            Counter::Unknown => None,
            Counter::Plain => self.kinds.iter().map(|kind| word(kind * 8)).sum(),
            Counter::PerCpu { size, count, counters } => {
                let sum = self.kinds.iter().map(|kind| word(kind * size + count)).sum::<Option<i64>>()?;
                let Some(counters) = counters else { return Some(sum) };
                let each = self.kinds.map(|kind| word(kind * size + counters).map(|at| at as u64));
                Some(sum.wrapping_add(self.on_cpus(&each.into_iter().collect::<Option<Vec<_>>>()?)?))
            }
        }
    }

    /// The sum of the `s32` at each of these per-CPU addresses on each CPU.
    fn on_cpus(&self, counters: &[u64]) -> Option<i64> {
        let (first, last) = (*counters.iter().min()?, *counters.iter().max()?);
        let mut sum = 0i64;
        for cpu in &self.per_cpu {
            // Allocated together, they lie side by side.
            if last - first <= STRIDE_MAX {
                let mut bytes = vec![0; (last - first + 4) as usize];
                let read = self.kernel.read(VirtAddr(first.wrapping_add(*cpu)), &mut bytes);
                read.stopped.is_none().then_some(())?;
                for counter in counters {
                    let value = i32::from_le_bytes(array_at(&bytes, (counter - first) as usize)?);
                    sum = sum.wrapping_add(value.into());
                }
            } else {
                for counter in counters {
                    let value = self.kernel.read_u32(VirtAddr(counter.wrapping_add(*cpu)))? as i32;
                    sum = sum.wrapping_add(value.into());
                }
            }
        }
        Some(sum)
    }
}
