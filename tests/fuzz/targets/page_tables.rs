//! Page-table walks, against a second walker.
#![no_main]

use kstub::addr::{PhysAddr, VirtAddr};
use kstub::arch::x86_64::AddressSpace;
use kstub::memory::PhysicalMemory;
use kstub_fuzz::{memory, take, take_u64};

/// Where `at` leads and how far its page goes on. Source: Intel SDM vol. 3, 4.5 (tables 4-14 to 4-20).
fn reference(memory: &dyn PhysicalMemory, space: &AddressSpace, at: u64) -> Option<(u64, u64)> {
    let width = if space.levels == 5 { 57 } else { 48 };
    let sign = at >> (width - 1);
    if sign != 0 && sign != u64::MAX >> (width - 1) {
        return None;
    }
    let bits = 0x000f_ffff_ffff_f000 & !space.sme_mask;
    let mut table = space.root.0 & bits;
    for level in (1..=u32::from(space.levels)).rev() {
        let below = 12 + 9 * (level - 1);
        let mut word = [0; 8];
        let read = memory.read_phys(PhysAddr(table + (at >> below) % 512 * 8), &mut word);
        let entry = read.stopped.is_none().then(|| u64::from_le_bytes(word))?;
        let leaf = level == 1 || matches!(level, 2 | 3) && entry >> 7 & 1 == 1;
        let bits = if leaf { bits >> below << below } else { bits };
        let target = match (entry & 1, leaf && entry >> 8 & 1 == 1) {
            (1, _) => entry & bits,
            // Linux inverts the address of a page that nobody may access, if its version is recent enough.
            (_, true) => *[!entry & bits, entry & bits].iter().find(|&&at| memory.is_ram(PhysAddr(at)))?,
            (_, false) => return None,
        };
        if leaf {
            let offset = at % (1 << below);
            return Some((target | offset, (1 << below) - offset));
        }
        table = target;
    }
    None
}

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let mut rest = input;
    let [levels] = take(&mut rest);
    let (root, sme_mask) = (PhysAddr(take_u64(&mut rest)), take_u64(&mut rest));
    let asked = [take_u64(&mut rest), take_u64(&mut rest)];
    let memory = memory(rest);
    let space = AddressSpace { root, levels: 4 + levels % 2, sme_mask };
    for at in asked.into_iter().flat_map(|at| [at, at ^ 0x1000, at | 0xfff]) {
        let mut steps = 0;
        let walked = space.walk(&memory, VirtAddr(at), &mut |_| steps += 1);
        assert!(steps <= space.levels);
        assert_eq!(walked, space.translate(&memory, VirtAddr(at)));
        let told = walked.as_ref().ok().map(|t| (t.phys.0, t.left_in_page));
        assert_eq!(told, reference(&memory, &space, at), "{at:#x}: {walked:?}");

        let mut buf = [0xa5; 10_000];
        let read = space.read(&memory, VirtAddr(at), &mut buf);
        assert!(read.filled <= buf.len());
        assert_eq!(read.filled < buf.len(), read.stopped.is_some(), "{read:?}");
        // Byte for byte at the edges of what was read.
        for i in [0, 1, read.filled / 2, read.filled.saturating_sub(1), read.filled] {
            let Some(here) = at.checked_add(i as u64).filter(|_| i <= read.filled && i < buf.len()) else {
                continue;
            };
            let mut byte = [0];
            let one = reference(&memory, &space, here)
                .filter(|&(phys, _)| memory.read_phys(PhysAddr(phys), &mut byte).filled == 1);
            assert_eq!(one.is_some(), i < read.filled, "{here:#x}: {read:?}");
            assert!(one.is_none() || byte[0] == buf[i], "{here:#x}: a wrong byte");
        }
    }
});
