//! Writes the seeds of every target, from the tests' own writers of each format:
//! `cargo run --manifest-path tests/fuzz/Cargo.toml --example seeds`.
//!
//! Run again when a target takes its input apart in another way; the seeds are committed.

#[path = "../../support/mod.rs"]
mod support;

use kstub_fuzz::pieces;
use std::path::Path;
use std::process::Command;
use support::elf_core::{DUMP_ELF_INCOMPLETE, ElfCore, Segment};
use support::flattened::Flatten;
use support::kdump::{Codec, Kdump, STATUS_INCOMPLETE, Slot};
use support::notes::{self, CpuValues};
use support::page_tables::{KERNEL, PageTables, Size};
use support::tiny_kernel::{InRam, TinyKernel};
use support::{FlatMemory, Rng, kallsyms, lime};

const INFO: &str = "OSRELEASE=6.1.0-fuzz-amd64\nPAGESIZE=4096\nSYMBOL(_stext)=ffffffff81000000\n\
                    NUMBER(phys_base)=-16777216\nOFFSET(list_head.next)=0\nSIZE(page)=64\nKERNELOFFSET=1000000\n\
                    BUILD-ID=00112233445566778899aabbccddeeff00112233\n";

fn seed(target: &str, name: &str, input: &[u8]) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
    std::fs::create_dir_all(&dir).expect("directory");
    std::fs::write(dir.join(name), input).expect("seed");
    println!("{target}/{name}: {} bytes", input.len());
}

/// As [`seed`], of a file's bytes.
fn file(target: &str, name: &str, bytes: &[u8]) {
    let input = pieces(0, bytes);
    assert!(kstub_fuzz::file(&input) == bytes, "{target}/{name}");
    if target != "debuginfo" {
        assert!(kstub_fuzz::dump(bytes.to_vec(), &[0x1000]).is_some(), "{target}/{name} is no dump");
    }
    seed(target, name, &input);
}

/// What describes `memory`.
fn memory(memory: &FlatMemory) -> Vec<u8> {
    memory.runs().iter().flat_map(|(at, bytes)| pieces(*at as u32, bytes)).collect()
}

/// Frames 1 to 4, 6, 7 and 9: mostly zeros, unlike each other, one all zero.
fn small() -> FlatMemory {
    let mut memory = FlatMemory::new();
    for pfn in [1, 2, 3, 4, 6, 7, 9u64] {
        let text = format!("frame {pfn}").repeat(pfn as usize % 4);
        memory.write(pfn * 4096, &[0; 4096]);
        memory.write(pfn * 4096 + 64 * pfn, text.as_bytes());
    }
    memory
}

/// `cpus` CPUs as the kernel writes them, and VMCOREINFO.
fn kernel_notes(cpus: u64) -> Vec<u8> {
    let cpus: Vec<_> = (0..cpus).map(CpuValues::distinct).collect();
    notes::kernel_notes(&cpus, Some(INFO))
}

fn qemu_notes() -> Vec<u8> {
    notes::qemu_notes(&[CpuValues::distinct(0)], true, Some(INFO))
}

fn elf() -> ElfCore {
    ElfCore::of(&small()).with_notes(kernel_notes(1))
}

fn kdump(codec: Codec) -> Kdump {
    Kdump {
        notes: kernel_notes(1),
        vmcoreinfo: INFO.into(),
        dump_level: 31,
        ..Kdump::of(&small()).codec(codec)
    }
}

fn dumps() {
    file("elf", "kernel", &elf().build().bytes);
    file("elf", "qemu", &elf().with_notes(qemu_notes()).build().bytes);
    file("elf", "extended", &ElfCore { extended_count: true, ..elf() }.build().bytes);
    let mut odd = ElfCore { flags: DUMP_ELF_INCOMPLETE, gap: 32, ..elf() };
    odd.more_notes.push(qemu_notes());
    // Memory that is left out, cut off, listed twice; a mapping without a physical address.
    odd.segments.push(Segment::new(0x2_0000, b"left out".repeat(20)).memsz(0x3000));
    odd.segments.push(Segment::new(0x3_0000, Vec::new()).memsz(0x2000).at(0xf_0000, 0x2000));
    odd.segments.push(Segment::new(0x1000, b"twice".repeat(10)).memsz(0x2000).vaddr(0xffff_ffff_8100_0000));
    odd.segments
        .push(Segment { paddr: u64::MAX, ..Segment::new(0, Vec::new()).memsz(0x1000).at(u64::MAX, 0) });
    file("elf", "odd", &odd.build().bytes);

    let mut rng = Rng::new(7);
    for codec in Codec::ALL {
        file("kdump", &format!("{codec:?}").to_lowercase(), &kdump(codec).build().bytes);
    }
    file("kdump", "qemu", &kdump(Codec::Zlib).qemu().build().bytes);
    let mut odd =
        Kdump { version: 3, status: STATUS_INCOMPLETE, codecs: Codec::ALL.into(), ..kdump(Codec::Raw) };
    odd.slots.insert(8, Slot::Excluded);
    odd.slots.insert(10, Slot::Broken { size: 40, flags: 1, stored: rng.bytes(40), offset: None });
    odd.slots
        .insert(11, Slot::Broken { size: 5000, flags: 2, stored: Vec::new(), offset: Some(u64::MAX - 100) });
    file("kdump", "odd", &odd.build().bytes);

    let two = vec![(0x1000, b"first range".repeat(30)), (0x9000, vec![7; 0x300])];
    file("lime", "two", &lime::image(&two));
    file("lime", "cut", &[lime::header(1, 0x1000, 0x4fff), vec![1; 200]].concat());

    // Records of a few hundred bytes, for seeds that stay small.
    let flatten = Flatten { record_size: 1500, skip_zeros: Some(64), ..Flatten::default() };
    let (elf, kdump) = (elf().build().bytes, kdump(Codec::Zstd).build().bytes);
    file("flattened", "elf", &flatten.apply(&elf).bytes);
    file("flattened", "kdump", &flatten.apply(&kdump).bytes);
    let shuffled = Flatten { record_size: 4096, shuffle: true, skip_zeros: Some(64), ..Flatten::default() };
    file("flattened", "shuffled", &shuffled.apply(&kdump).bytes);
    file("flattened", "cut", &Flatten { end_mark: false, ..flatten }.apply(&elf).bytes);
    // The file's start twice: only the second record counts.
    let mut twice = support::flattened::header();
    support::flattened::record(&mut twice, 0, &[0xee; 300]);
    for (at, piece) in elf.chunks(2048).enumerate() {
        support::flattened::record(&mut twice, at as i64 * 2048, piece);
    }
    support::flattened::record(&mut twice, 0x80, &elf[0x80..0x300]);
    twice.extend([0xff; 16]);
    file("flattened", "twice", &twice);
}

fn split() {
    let parts = |version, codec, ends: &[u64]| {
        let parts = Kdump { version, ..kdump(codec) }.parts(ends);
        parts.iter().map(|part| pieces(0, &part.build().bytes)).collect::<Vec<_>>()
    };
    let set = |name: &str, choice: u8, parts: &[Vec<u8>]| {
        let mut input = vec![choice];
        for part in parts {
            input.extend((part.len() as u16).to_le_bytes());
            input.extend(part);
        }
        seed("split", name, &input);
    };
    let three = parts(6, Codec::Zlib, &[3, 6]);
    set("three", 2, &three);
    set("old", 1, &parts(2, Codec::Lzo, &[4]));
    set("snappy", 1, &parts(5, Codec::Snappy, &[2]));
    set("missing", 1, &[three[0].clone(), three[2].clone()]);
    set("forgotten", 0x80 | 1, &three);
    set("one", 0, &parts(6, Codec::Raw, &[]));
}

fn tables() {
    for levels in [4, 5] {
        for sme_mask in [0, 1 << 47] {
            let mut mem = FlatMemory::new();
            mem.write(0x8000, b"what the page tables lead to");
            mem.write(0x9ff0, b"the end of a page");
            let mut tables = PageTables::new(&mut mem, 0x1000, 0x2000, levels).with_sme(sme_mask);
            let at = 0xffff_8880_0000_0000;
            tables.map(at, 0x8000, Size::K4, KERNEL);
            tables.map(at + 0x1000, 0x9000, Size::K4, KERNEL);
            tables.map_prot_none(at + 0x2000, 0x8000, Size::K4, true);
            tables.map_prot_none(at + 0x3000, 0x9000, Size::K4, false);
            tables.map(at + 0x20_0000, 0, Size::M2, KERNEL);
            tables.map(at + 0x4000_0000, 0, Size::G1, KERNEL);
            let memory = memory(&mem);
            for (name, asked) in [("small", [at, at + 0x2000]), ("large", [at + 0x20_8000, at + 0x4000_8000])]
            {
                let mut input = vec![(levels - 4) as u8];
                for word in [0x1000 | sme_mask, sme_mask, asked[0], asked[1]] {
                    input.extend(word.to_le_bytes());
                }
                input.extend(&memory);
                let sme = if sme_mask == 0 { "" } else { "-sme" };
                seed("page_tables", &format!("{name}-{levels}{sme}"), &input);
            }
        }
    }
}

/// Bodies, one in each line; `!` before what `monitor` gets.
fn sessions() {
    let gdb =
        "qSupported:multiprocess+;swbreak+;QThreadEvents+;no-resumed+;xmlRegisters=i386\nQStartNoAckMode\n";
    let data = fake::DATA;
    seed(
        "rsp_front",
        "gdb",
        format!(
            "b{gdb}Hgp0.0\nqXfer:features:read:target.xml:0,ffb\nqAttached\nqTStatus\n?\nqC\nqfThreadInfo\n\
             qsThreadInfo\nqXfer:threads:read::0,1000\nqThreadExtraInfo,p1.1\ng\np10\nm{data:x},40\nx{data:x},0\n\
             x{data:x},3001\nm{:x},8\nqOffsets\nqSymbol::\nTp1.2\nvCont?\nvCont;c:p1.1\nHgp1.2\ng\nM0,1:00\nX0,0:\n\
             P0=00\nG00\nZ0,0,1\nz0,0,1\nD;1",
            fake::OWN
        )
        .as_bytes(),
    );
    seed(
        "rsp_front",
        "lldb",
        b"bqSupported:xmlRegisters=i386;multiprocess+\nQStartNoAckMode\nqHostInfo\nqProcessInfo\nqRegisterInfo0\n\
          qMemoryRegionInfo:0\njThreadsInfo\nHc-1\nvCont;s\nc\ns\nk",
    );
    let monitor = "!help\n!info\n!log\n!regs\n!regs 3\n!regs rip\n!why 0xffff888000100000\n!why phys 0x100000\n!nonsense\n\
                   !help why\n!";
    seed("rsp_front", "monitor", format!("b{monitor}").as_bytes());
    seed("rsp_front", "monitor-gdb", format!("b{gdb}{monitor}").as_bytes());
    seed(
        "rsp_front",
        "physical",
        b"bqqemu.Supported\nqqemu.PhyMemMode\nQqemu.PhyMemMode:1\nm100000,10\nqqemu.sstepbits\n\
          Qqemu.PhyMemMode:0\nm100000,10\nvFile:open:2f,0,0\nvFile:setfs:0\nqXfer:exec-file:read:1:0,100",
    );
    seed(
        "rsp_front",
        "raw",
        b"r+\n$m0,4#fd\x03-$#00garbage$X1,1:\x03}\x03#a3$g#00$g#67$?#3f-$QStartNoAckMode#b0$?#00",
    );
}

/// Where a session finds memory: see tests/support/fake_machine.rs.
#[path = "../../support/fake_machine.rs"]
#[allow(dead_code)]
mod fake;

/// VMCOREINFO lines of a kernel log before v5.10, whose variables and records lie in `mem` at `at`.
fn old_log(mem: &mut FlatMemory, at: u64, virt: u64) -> String {
    let mut records = Vec::new();
    for text in [&b"Linux version"[..], b"Kernel panic - not syncing: fuzz"] {
        let len = (16 + text.len()).next_multiple_of(8);
        records.extend(7u64.to_le_bytes());
        records.extend((len as u16).to_le_bytes());
        records.extend((text.len() as u16).to_le_bytes());
        records.extend([0; 4]);
        records.extend(text);
        records.resize(records.len().next_multiple_of(8), 0);
    }
    mem.write(at, &(virt + 64).to_le_bytes());
    mem.write(at + 8, &512u32.to_le_bytes());
    mem.write(at + 16, &0u32.to_le_bytes());
    mem.write(at + 24, &(records.len() as u32).to_le_bytes());
    mem.write(at + 64, &records);
    format!(
        "SYMBOL(log_buf)={:x}\nSYMBOL(log_buf_len)={:x}\nSYMBOL(log_first_idx)={:x}\nSYMBOL(log_next_idx)={:x}\n\
         SIZE(printk_log)=16\nOFFSET(printk_log.ts_nsec)=0\nOFFSET(printk_log.len)=8\nOFFSET(printk_log.text_len)=10\n",
        virt,
        virt + 8,
        virt + 16,
        virt + 24
    )
}

/// VMCOREINFO lines of the lockless ring, with one record.
fn ring(mem: &mut FlatMemory, at: u64, virt: u64) -> String {
    let (descs, infos, text) = (0x100, 0x200, 0x300);
    let words = [
        // prb, and at 64 the ring: count_bits, descs, infos, head_id, tail_id, then size_bits and data.
        (0, virt + 64),
        (64, 2),
        (72, virt + descs),
        (80, virt + infos),
        (88, 1),
        (96, 1),
        (104, 8),
        (112, virt + text),
        // Descriptor 1: finalized, its text from 0 to 40.
        (descs + 24, 2 << 62 | 1),
        (descs + 32, 0),
        (descs + 40, 40),
        // Info 1: time and length.
        (infos + 16, 12345),
        (infos + 24, 32),
        (text, 1),
    ];
    for (offset, word) in words {
        mem.write(at + offset, &word.to_le_bytes());
    }
    mem.write(at + text + 8, b"Kernel panic - not syncing: fuzz");
    let mut info = format!("SYMBOL(prb)={virt:x}\nSIZE(prb_desc)=24\nSIZE(printk_info)=16\n");
    for (name, offset) in [
        ("printk_ringbuffer.desc_ring", 0),
        ("printk_ringbuffer.text_data_ring", 40),
        ("prb_desc_ring.count_bits", 0),
        ("prb_desc_ring.descs", 8),
        ("prb_desc_ring.infos", 16),
        ("prb_desc_ring.head_id", 24),
        ("prb_desc_ring.tail_id", 32),
        ("prb_data_ring.size_bits", 0),
        ("prb_data_ring.data", 8),
        ("prb_desc.state_var", 0),
        ("prb_desc.text_blk_lpos", 8),
        ("prb_data_blk_lpos.begin", 0),
        ("prb_data_blk_lpos.next", 8),
        ("printk_info.ts_nsec", 0),
        ("printk_info.text_len", 8),
    ] {
        info.push_str(&format!("OFFSET({name})={offset}\n"));
    }
    info
}

fn kernels() {
    // Where the image has nothing else.
    const FREE: u64 = 0x50_0000;
    let put = |name: &str,
               kernel: &TinyKernel,
               flags: u8,
               log: fn(&mut FlatMemory, u64, u64) -> String,
               note: bool| {
        let mut mem = kernel.memory();
        // Code, of which nobody asks what it is.
        mem.write(kernel.load_at, &[0; 8192 * 4]);
        let log = log(&mut mem, kernel.load_at + FREE, kernel.text() + FREE);
        let info = format!("{}{log}", kernel.vmcoreinfo());
        let note = if note { info } else { String::new() };
        let mut input = vec![flags];
        for word in [kernel.cr3(), if kernel.levels == 5 { 0x1020 } else { 0x20 }, kernel.phys_base()] {
            input.extend(word.to_le_bytes());
        }
        input.extend((note.len() as u16).to_le_bytes());
        input.extend(note.as_bytes());
        input.extend(memory(&mem));
        seed("discover", name, &input);
    };
    let bare = TinyKernel { in_ram: InRam::Nowhere, ..TinyKernel::default() };
    put("note", &bare, 0, old_log, true);
    put("note-cr3", &bare, 1, ring, true);
    put("scan", &TinyKernel { in_ram: InRam::Page, ..bare.clone() }, 0, |_, _, _| String::new(), false);
    put("scan-5", &TinyKernel { in_ram: InRam::Page, ..bare.clone().five_levels() }, 1, ring, false);
    put("tables", &bare, 1, |_, _, _| String::new(), false);
    put("sme", &TinyKernel { sme_mask: 1 << 47, ..bare }, 1, ring, true);
}

/// Logs of both kinds, the layout of which the input tells.
fn logs() {
    const AT: u64 = 0x1000;
    let kinds: [(&str, fn(&mut FlatMemory, u64, u64) -> String); 2] = [("ring", ring), ("buffer", old_log)];
    for (flags, (name, log)) in (2u8..).zip(kinds) {
        let mut mem = FlatMemory::new();
        let told = log(&mut mem, AT, 0xffff_ffff_8000_0000 + AT);
        let len = (told.len() as u16).to_le_bytes();
        seed("printk", name, &[&[flags][..], &len, told.as_bytes(), &memory(&mem)].concat());
    }
}

fn expressions() {
    let texts = [
        "init_task.comm",
        "-x ((struct task_struct *)&init_task)->flags & ~0xffUL",
        "runqueues:a.nr_running",
        "*(struct list_head *)(&init_task.tasks)@2",
        "sizeof(struct page) * 4 << 3 || !jiffies ? 1 : 0",
        "(unsigned char)-1 >= 0x80u",
        "&((struct task_struct *)0)->se.run_node",
        "$rsp[1] + $rip",
        "modules.next->prev == &modules",
        "linux_banner[3]",
    ];
    for (i, text) in (0u8..).zip(texts) {
        seed("expression", &format!("{i}"), &[&[i][..], text.as_bytes()].concat());
    }
}

/// By the compiler, as in tests/debuginfo.rs.
fn vmlinux() {
    const SOURCE: &str = "
        struct inner { long a; union { int *p; struct { short x, y; }; }; };
        typedef const struct inner inner_t;
        struct outer { char pad[3]; unsigned flag : 5; inner_t several[4]; volatile inner_t one;
            union { struct { int deep; union { char deeper; long deepest[2]; }; }; double d; };
            enum { ONE, TWO } choice; char comm[16]; };
        struct outer task;
        int main(void) { return task.pad[0]; }";
    let dir = tempfile::tempdir().expect("directory");
    let (source, out) = (dir.path().join("vmlinux.c"), dir.path().join("vmlinux"));
    std::fs::write(&source, SOURCE).expect("source");
    for (name, debug) in [
        ("btf", &["-gbtf"][..]),
        ("dwarf4", &["-g", "-gdwarf-4"]),
        ("dwarf5", &["-g", "-gdwarf-5"]),
        ("packed", &["-g", "-gz"]),
    ] {
        let status = Command::new("gcc")
            .args(debug)
            .args([
                "-nostdlib",
                "-static",
                "-no-pie",
                "-fno-asynchronous-unwind-tables",
                "-Wl,--build-id=0x000102030405060708090a0b0c0d0e0f10111213",
            ])
            .args(["-Wl,-z,noseparate-code", "-Wl,-z,max-page-size=4096", "-Wl,-e,main", "-o"])
            .args(["vmlinux", "vmlinux.c"])
            // No name of a temporary directory in the seeds.
            .arg(format!("-ffile-prefix-map={}=.", dir.path().display()))
            .current_dir(dir.path())
            .status()
            .expect("gcc");
        assert!(status.success(), "gcc {debug:?}");
        let mut bytes = std::fs::read(&out).expect("vmlinux");
        // BTF has the directory all the same.
        let dir = dir.path().as_os_str().as_encoded_bytes();
        while let Some(at) = bytes.windows(dir.len()).position(|window| window == dir) {
            bytes[at..at + dir.len()].fill(b'.');
        }
        file("debuginfo", name, &bytes);
    }
}

fn main() {
    dumps();
    split();
    seed("notes", "kernel", &kernel_notes(2));
    seed("notes", "qemu", &qemu_notes());
    let sizes = [notes::note_with_sizes("CORE", 5, 5000, 1, b"cut"), kernel_notes(1)].concat();
    seed("notes", "damaged", &sizes);
    for (form, name) in
        kallsyms::FORMS.iter().zip(["old", "per-cpu", "relative", "later", "later-relative", "place"])
    {
        let (image, places) = kallsyms::write(
            *form,
            &kallsyms::symbols(name != "relative" && name != "later-relative" && name != "place"),
        );
        let told = places.map(|place| u16::try_from(place).expect("a small image").to_le_bytes());
        seed("kallsyms", name, &[&told.concat()[..], &image].concat());
    }
    seed("vmcoreinfo", "small", INFO.as_bytes());
    seed("vmcoreinfo", "kernel", TinyKernel::default().vmcoreinfo().as_bytes());
    seed(
        "vmcoreinfo",
        "odd",
        b"OSRELEASE=\nA=1\nA=2\n junk\nNUMBER(x)=0x10\nNUMBER(y)=-1\nSYMBOL(z)=0xff\n=\n\xff=\0AFTER=1",
    );
    tables();
    sessions();
    kernels();
    logs();
    expressions();
    vmlinux();
}
