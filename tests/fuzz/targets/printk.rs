//! The kernel's log in memory that someone else filled: the lockless ring, and the record buffer before it.
//!
//! Page tables and the layout of the structures hold; what lies in the structures is the input's, and the numbers of
//! the layout are, too, where the input says so.
#![no_main]

use kstub::addr::{PhysAddr, PhysRange, VirtAddr};
use kstub::arch::x86_64::AddressSpace;
use kstub::backend::{Backend, Fact, SavedCpu};
use kstub::kernel::Kernel;
use kstub::kernel::discover::{Found, FoundBy};
use kstub::memory::{MemoryImage, PhysicalMemory, ReadOutcome};
use kstub::vmcoreinfo::VmcoreInfo;
use kstub_fuzz::{memory, take, take_bytes};
use std::sync::Arc;

/// The image's virtual addresses lead to the first GiB of memory.
const MAP: u64 = 0xffff_ffff_8000_0000;
/// Where the page tables lie: far behind what inputs of a usual size write.
const TABLES: u64 = 0x3000_0000;

const RING: &str = "SYMBOL(prb)=ffffffff80001000\nSIZE(printk_ringbuffer)=80\nOFFSET(printk_ringbuffer.desc_ring)=0\n\
                    OFFSET(printk_ringbuffer.text_data_ring)=40\nSIZE(prb_desc_ring)=40\n\
                    OFFSET(prb_desc_ring.count_bits)=0\nOFFSET(prb_desc_ring.descs)=8\nOFFSET(prb_desc_ring.infos)=16\n\
                    OFFSET(prb_desc_ring.head_id)=24\nOFFSET(prb_desc_ring.tail_id)=32\nSIZE(prb_desc)=24\n\
                    OFFSET(prb_desc.state_var)=0\nOFFSET(prb_desc.text_blk_lpos)=8\nOFFSET(prb_data_blk_lpos.begin)=0\n\
                    OFFSET(prb_data_blk_lpos.next)=8\nSIZE(printk_info)=88\nOFFSET(printk_info.ts_nsec)=8\n\
                    OFFSET(printk_info.text_len)=16\nOFFSET(printk_info.caller_id)=20\nOFFSET(prb_data_ring.size_bits)=0\n\
                    OFFSET(prb_data_ring.data)=8\n";
const BUFFER: &str = "SYMBOL(log_buf)=ffffffff80001000\nSYMBOL(log_buf_len)=ffffffff80001008\n\
                      SYMBOL(log_first_idx)=ffffffff8000100c\nSYMBOL(log_next_idx)=ffffffff80001010\n\
                      SIZE(printk_log)=16\nOFFSET(printk_log.ts_nsec)=0\nOFFSET(printk_log.len)=8\n\
                      OFFSET(printk_log.text_len)=10\n";

struct Ram(MemoryImage);

impl PhysicalMemory for Ram {
    fn read_phys(&self, at: PhysAddr, buf: &mut [u8]) -> ReadOutcome {
        self.0.read_phys(at, buf)
    }
    fn ranges(&self) -> Vec<PhysRange> {
        self.0.ranges()
    }
}

impl Backend for Ram {
    fn saved_cpus(&self) -> &[SavedCpu] {
        &[]
    }
    fn vmcoreinfo_note(&self) -> Option<&[u8]> {
        None
    }
    fn phys_base_hints(&self) -> Vec<u64> {
        Vec::new()
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
    let told = if flags & 1 == 0 { RING } else { BUFFER };
    // Of two lines with one name the first counts.
    let more = if flags & 2 == 0 { &[][..] } else { take_bytes(&mut rest) };
    let mut ram = memory(rest);
    let entry = |ram: &mut MemoryImage, at: u64, value: u64| ram.write(PhysAddr(at), &value.to_le_bytes());
    const PRESENT_AND_WRITABLE: u64 = 3;
    const HUGE: u64 = 0x80;
    entry(&mut ram, TABLES + 511 * 8, TABLES + 0x1000 + PRESENT_AND_WRITABLE);
    entry(&mut ram, TABLES + 0x1000 + 510 * 8, PRESENT_AND_WRITABLE + HUGE);
    let found = Found {
        by: FoundBy::Note,
        vmcoreinfo: VmcoreInfo::parse(&[more, b"\n", told.as_bytes()].concat()),
        release: "6.1.0-fuzz".into(),
        build_id: None,
        kaslr_offset: 0,
        phys_base: 0,
        space: AddressSpace { root: PhysAddr(TABLES), levels: 4, sme_mask: 0 },
        text: VirtAddr(MAP),
        problems: Vec::new(),
    };
    let kernel = Kernel::new(Arc::new(Ram(ram)), found, None);
    match kernel.log() {
        Ok(records) => {
            assert!(records.len() <= 32 << 20);
            assert!(records.iter().all(|record| record.level <= 7));
            // Text is what the ring has: no record may repeat what others hold for ever.
            let text: usize = records.iter().map(|record| record.text.len()).sum();
            assert!(text <= 4 * (64 << 20), "{text}");
        }
        Err(error) => kstub_fuzz::check_text(&error.to_string()),
    }
    let _ = kernel.failure();
});
