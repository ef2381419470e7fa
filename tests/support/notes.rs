//! ELF notes that carry registers and VMCOREINFO.
//!
//! Sources: ELF-64 object file format (notes); Linux `include/uapi/linux/elfcore.h`, `include/linux/elfcore.h`
//! (struct elf_prstatus), `arch/x86/include/asm/user_64.h` (struct user_regs_struct), `arch/x86/include/asm/elf.h`
//! (`ELF_CORE_COPY_REGS`: slot 22 is the *inactive* GS base); QEMU `target/i386/arch_dump.c`.

use super::put::{pad_to, put_u32, put_u64};
use std::collections::BTreeMap;

pub const NT_PRSTATUS: u32 = 1;

/// One note with name and descriptor padded to 4 bytes. `name` is written with its NUL.
pub fn note(name: &str, kind: u32, desc: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    out.extend_from_slice(&(name.len() as u32 + 1).to_le_bytes());
    out.extend_from_slice(&(desc.len() as u32).to_le_bytes());
    out.extend_from_slice(&kind.to_le_bytes());
    out.extend_from_slice(name.as_bytes());
    out.push(0);
    pad_to(&mut out, 4);
    out.extend_from_slice(desc);
    pad_to(&mut out, 4);
    out
}

/// A note that lies about its sizes.
pub fn note_with_sizes(name: &str, namesz: u32, descsz: u32, kind: u32, desc: &[u8]) -> Vec<u8> {
    let mut out = note(name, kind, desc);
    put_u32(&mut out, 0, namesz);
    put_u32(&mut out, 4, descsz);
    out
}

/// Bytes from the start of [`note`]'s result to its descriptor.
pub fn desc_offset(name: &str) -> usize {
    12 + (name.len() + 1).next_multiple_of(4)
}

/// The `VMCOREINFO` note of a core file.
pub fn vmcoreinfo_note(text: &str) -> Vec<u8> {
    note("VMCOREINFO", 0, text.as_bytes())
}

/// `struct user_regs_struct` of x86-64: 27 words.
pub const USER_REGS: [&str; 27] = [
    "r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi",
    "orig_rax", "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs",
];

/// `struct QEMUCPUState`, its plain words in order after `version` and `size`.
pub const QEMU_WORDS: [&str; 18] = [
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "r8", "r9", "r10", "r11", "r12", "r13", "r14",
    "r15", "rip", "eflags",
];
/// Its segments in order.
pub const QEMU_SEGMENTS: [&str; 10] = ["cs", "ds", "es", "fs", "gs", "ss", "ldt", "tr", "gdt", "idt"];

/// Everything a CPU holds that some note records, by gdb's names. Values differ between any two registers of
/// a CPU and between CPUs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuValues {
    pub values: BTreeMap<&'static str, u64>,
    pub pid: u32,
}

impl CpuValues {
    /// Registers of CPU number `cpu` (below 16) stopped in the kernel.
    pub fn distinct(cpu: u64) -> Self {
        let mut values = BTreeMap::new();
        let wide = [
            "rax",
            "rbx",
            "rcx",
            "rdx",
            "rsi",
            "rdi",
            "rbp",
            "rsp",
            "r8",
            "r9",
            "r10",
            "r11",
            "r12",
            "r13",
            "r14",
            "r15",
            "rip",
            "orig_rax",
            "fs_base",
            "gs_base",
            "k_gs_base",
            "cr0",
            "cr1",
            "cr2",
            "cr3",
            "cr4",
        ];
        for (i, name) in wide.into_iter().enumerate() {
            values.insert(
                name,
                0xa0b0_c000_0000_0000 + (cpu << 40) + ((i as u64 + 1) << 20) + 0x8765 + i as u64,
            );
        }
        // Selectors are 16 bits; the low two bits of cs are the privilege level, here 0.
        for (i, name) in ["cs", "ss", "ds", "es", "fs", "gs", "ldt", "tr"].into_iter().enumerate() {
            values.insert(name, 0x1008 + cpu * 0x200 + i as u64 * 0x10);
        }
        values.insert("eflags", 0x4_0246 + (cpu << 8));
        Self { values, pid: 0x700 + cpu as u32 }
    }

    /// The same, stopped in user mode: privilege level 3.
    pub fn in_user_mode(mut self) -> Self {
        for name in ["cs", "ss"] {
            *self.values.get_mut(name).expect("selector") |= 3;
        }
        self
    }

    pub fn set(mut self, name: &'static str, value: u64) -> Self {
        self.values.insert(name, value);
        self
    }

    pub fn get(&self, name: &str) -> u64 {
        *self.values.get(name).unwrap_or_else(|| panic!("no register '{name}'"))
    }
}

/// `struct elf_prstatus` of x86-64: 336 bytes, `pr_pid` at 32, `pr_reg` at 112. `gs_base` fills slot 22.
pub fn prstatus_desc(cpu: &CpuValues, gs_base: u64) -> Vec<u8> {
    let mut desc = vec![0; 336];
    put_u32(&mut desc, 32, cpu.pid);
    for (i, name) in USER_REGS.into_iter().enumerate() {
        let value = if name == "gs_base" { gs_base } else { cpu.get(name) };
        put_u64(&mut desc, 112 + i * 8, value);
    }
    desc
}

/// As the crashing kernel writes it (`crash_save_cpu`): slot 22 holds what the *other* GS base register holds,
/// which for a CPU in the kernel is the user's.
pub fn kernel_prstatus(cpu: &CpuValues) -> Vec<u8> {
    note("CORE", NT_PRSTATUS, &prstatus_desc(cpu, cpu.get("k_gs_base")))
}

/// As QEMU writes it: slot 22 is the active GS base, `pr_pid` the vCPU's index + 1, `orig_rax` 0.
pub fn qemu_prstatus(cpu: &CpuValues, index: u32) -> Vec<u8> {
    let cpu = CpuValues { pid: index + 1, ..cpu.clone() }.set("orig_rax", 0);
    note("CORE", NT_PRSTATUS, &prstatus_desc(&cpu, cpu.get("gs_base")))
}

/// `struct QEMUCPUState`: 432 bytes, 440 with `kernel_gs_base` (QEMU 2.12 and later).
pub fn qemu_state_desc(cpu: &CpuValues, with_kernel_gs_base: bool) -> Vec<u8> {
    let mut desc = Vec::new();
    put_u32(&mut desc, 0, 1);
    for (i, name) in QEMU_WORDS.into_iter().enumerate() {
        put_u64(&mut desc, 8 + i * 8, cpu.get(name));
    }
    for (i, name) in QEMU_SEGMENTS.into_iter().enumerate() {
        let at = 152 + i * 24;
        put_u32(&mut desc, at, cpu.values.get(name).map_or(0, |&v| v as u32));
        put_u32(&mut desc, at + 4, 0x00ff_fff0 + i as u32);
        put_u32(&mut desc, at + 8, 0x00af_9b00 + i as u32);
        let base = match name {
            "fs" => cpu.get("fs_base"),
            "gs" => cpu.get("gs_base"),
            _ => 0x5e60_0000 + i as u64,
        };
        put_u64(&mut desc, at + 16, base);
    }
    for (i, name) in ["cr0", "cr1", "cr2", "cr3", "cr4"].into_iter().enumerate() {
        put_u64(&mut desc, 392 + i * 8, cpu.get(name));
    }
    if with_kernel_gs_base {
        put_u64(&mut desc, 432, cpu.get("k_gs_base"));
    }
    let size = desc.len() as u32;
    put_u32(&mut desc, 4, size);
    desc
}

pub fn qemu_state(cpu: &CpuValues, with_kernel_gs_base: bool) -> Vec<u8> {
    note("QEMU", 0, &qemu_state_desc(cpu, with_kernel_gs_base))
}

/// QEMU's order: the `CORE` notes of all CPUs, then their `QEMU` notes, then what the guest handed over.
pub fn qemu_notes(cpus: &[CpuValues], with_kernel_gs_base: bool, vmcoreinfo: Option<&str>) -> Vec<u8> {
    let mut out = Vec::new();
    for (i, cpu) in cpus.iter().enumerate() {
        out.extend(qemu_prstatus(cpu, i as u32));
    }
    for cpu in cpus {
        out.extend(qemu_state(cpu, with_kernel_gs_base));
    }
    out.extend(vmcoreinfo.map(vmcoreinfo_note).unwrap_or_default());
    out
}

/// The kernel's order in `/proc/vmcore`: one `NT_PRSTATUS` per CPU that answered, then VMCOREINFO.
pub fn kernel_notes(cpus: &[CpuValues], vmcoreinfo: Option<&str>) -> Vec<u8> {
    let mut out: Vec<u8> = cpus.iter().flat_map(kernel_prstatus).collect();
    out.extend(vmcoreinfo.map(vmcoreinfo_note).unwrap_or_default());
    out
}
