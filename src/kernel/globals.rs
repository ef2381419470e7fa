//! Types of global variables: BTF tells only those of per-CPU ones, so this table names the ones that users ask for.
//!
//! A row whose type a kernel does not have is as if it were not there. Source: the declarations in the kernel's
//! headers and files named with each group.

use super::Kernel;
use super::module::Module;
use crate::addr::VirtAddr;
use crate::debuginfo::types::{Class, Shape, TypeId};

/// Symbol and type; `[]` has as many elements as the symbol has room for.
const GLOBALS: &[(&str, &str)] = &[
    // include/linux/sched/task.h, init_task.h, sched/mm.h, nsproxy.h, cred.h
    ("init_task", "struct task_struct"),
    ("init_mm", "struct mm_struct"),
    ("init_cred", "struct cred"),
    ("init_files", "struct files_struct"),
    ("init_fs", "struct fs_struct"),
    ("init_nsproxy", "struct nsproxy"),
    ("init_uts_ns", "struct uts_namespace"),
    ("init_pid_ns", "struct pid_namespace"),
    ("init_user_ns", "struct user_namespace"),
    ("init_ipc_ns", "struct ipc_namespace"),
    ("init_cgroup_ns", "struct cgroup_namespace"),
    ("init_time_ns", "struct time_namespace"),
    ("init_net", "struct net"),
    ("init_css_set", "struct css_set"),
    ("root_task_group", "struct task_group"),
    ("task_groups", "struct list_head"),
    ("nr_threads", "int"),
    ("total_forks", "unsigned long"),
    ("max_threads", "int"),
    ("pid_max", "int"),
    // include/linux/jiffies.h, timekeeping
    ("jiffies", "unsigned long"),
    ("jiffies_64", "u64"),
    ("loops_per_jiffy", "unsigned long"),
    ("cpu_khz", "unsigned int"),
    ("tsc_khz", "unsigned int"),
    ("system_wq", "struct workqueue_struct *"),
    ("workqueues", "struct list_head"),
    // include/linux/kernel.h, panic.h, init.h, printk
    ("system_state", "enum system_states"),
    ("panic_cpu", "atomic_t"),
    ("crashing_cpu", "int"),
    ("oops_in_progress", "int"),
    ("panic_on_oops", "int"),
    ("panic_timeout", "int"),
    ("tainted_mask", "unsigned long"),
    ("saved_command_line", "char *"),
    ("boot_command_line", "char []"),
    ("linux_banner", "char []"),
    ("log_buf", "char *"),
    ("log_buf_len", "u32"),
    ("prb", "struct printk_ringbuffer *"),
    ("printk_rb_static", "struct printk_ringbuffer"),
    ("console_list", "struct hlist_head"),
    ("console_drivers", "struct console *"),
    ("vmcoreinfo_data", "unsigned char *"),
    ("vmcoreinfo_size", "unsigned long"),
    // include/linux/module.h, kallsyms
    ("modules", "struct list_head"),
    // include/linux/cpumask.h, smp.h, arch/x86/include/asm/processor.h
    ("nr_cpu_ids", "unsigned int"),
    ("__cpu_possible_mask", "struct cpumask"),
    ("__cpu_present_mask", "struct cpumask"),
    ("__cpu_online_mask", "struct cpumask"),
    ("__cpu_active_mask", "struct cpumask"),
    ("__num_online_cpus", "atomic_t"),
    ("__per_cpu_offset", "unsigned long []"),
    ("boot_cpu_data", "struct cpuinfo_x86"),
    ("idt_table", "gate_desc []"),
    // include/linux/mm.h, mmzone.h, slab, swap, vmalloc
    ("slab_caches", "struct list_head"),
    ("kmem_cache", "struct kmem_cache *"),
    ("slab_root_caches", "struct list_head"),
    ("mem_map", "struct page *"),
    ("max_mapnr", "unsigned long"),
    ("max_pfn", "unsigned long"),
    ("min_low_pfn", "unsigned long"),
    ("max_low_pfn", "unsigned long"),
    ("high_memory", "void *"),
    ("_totalram_pages", "atomic_long_t"),
    ("totalreserve_pages", "unsigned long"),
    ("vm_zone_stat", "atomic_long_t []"),
    ("vm_node_stat", "atomic_long_t []"),
    ("node_data", "struct pglist_data *[]"),
    ("contig_page_data", "struct pglist_data"),
    ("mem_section", "struct mem_section **"),
    ("phys_base", "unsigned long"),
    ("page_offset_base", "unsigned long"),
    ("vmalloc_base", "unsigned long"),
    ("vmemmap_base", "unsigned long"),
    ("sme_me_mask", "u64"),
    ("vmap_area_list", "struct list_head"),
    ("vmap_area_root", "struct rb_root"),
    ("swap_info", "struct swap_info_struct *[]"),
    ("nr_swapfiles", "unsigned int"),
    ("nr_swap_pages", "atomic_long_t"),
    ("hstates", "struct hstate []"),
    ("iomem_resource", "struct resource"),
    ("ioport_resource", "struct resource"),
    ("memblock", "struct memblock"),
    ("pcpu_base_addr", "void *"),
    ("pcpu_unit_offsets", "unsigned long *"),
    ("pcpu_unit_size", "int"),
    ("pcpu_nr_slots", "int"),
    ("pcpu_chunk_lists", "struct list_head *"),
    // Per-CPU variables, for kernels whose BTF tells none (before about v5.11).
    ("runqueues", "struct rq"),
    ("current_task", "struct task_struct *"),
    ("cpu_number", "int"),
    ("cpu_info", "struct cpuinfo_x86"),
    ("cpu_tss_rw", "struct tss_struct"),
    ("__preempt_count", "int"),
    ("irq_stat", "irq_cpustat_t"),
    ("kernel_cpustat", "struct kernel_cpustat"),
    ("kstat", "struct kernel_stat"),
    ("ksoftirqd", "struct task_struct *"),
    ("hrtimer_bases", "struct hrtimer_cpu_base"),
    ("timer_bases", "struct timer_base []"),
    ("tick_cpu_sched", "struct tick_sched"),
    ("rcu_data", "struct rcu_data"),
    ("vm_event_states", "struct vm_event_state"),
    ("softnet_data", "struct softnet_data"),
    ("cpu_tlbstate", "struct tlb_state"),
    // include/linux/fs.h, net, rcu
    ("super_blocks", "struct list_head"),
    ("file_systems", "struct file_system_type *"),
    ("net_namespace_list", "struct list_head"),
    ("tcp_hashinfo", "struct inet_hashinfo"),
    ("rcu_state", "struct rcu_state"),
    ("cgrp_dfl_root", "struct cgroup_root"),
    ("softirq_vec", "struct softirq_action []"),
];

impl Kernel {
    /// The type of the variable `name`: the debug info's word, else the table's. A per-CPU variable's is that of one
    /// copy.
    pub fn variable_type(&self, name: &str) -> Option<TypeId> {
        let types = self.types()?;
        if let Some(ty) = types.find(Class::Variable, name) {
            return Some(ty);
        }
        let known = GLOBALS.iter().find(|(symbol, _)| *symbol == name).map(|(_, spelled)| *spelled);
        let Some(spelled) = known else {
            // Last, because DWARF's index is not always there yet.
            return types.parse(&self.debug_info()?.variable_type(name)?);
        };
        let ty = types.parse(spelled)?;
        if let Shape::Array { element, count: 0 } = types.get(ty)?.shape
            && let (_, room) = self.symbol_and_size(name)?
            && let Some(count) = room.checked_div(types.size(element)?)
        {
            return types.array_of(element, count);
        }
        Some(ty)
    }

    /// Whether `at` is in the code of the kernel image or a module.
    pub fn is_text(&self, at: VirtAddr) -> bool {
        let within =
            |start, end| self.symbol(start).is_some_and(|start| start <= at) && self.symbol(end) > Some(at);
        let of_module = |module: &Module| {
            module.regions.iter().any(|region| region.kind.contains("text") && region.contains(at))
        };
        within("_stext", "_etext")
            || within("_sinittext", "_einittext")
            || self.modules().list.iter().any(of_module)
    }
}
