//! Page-table walks: every page size and depth, and everything that can stop one.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod support;

use kstub::addr::{PhysAddr, VirtAddr};
use kstub::arch::x86_64::paging::{AddressSpace, Level, TranslateError, VirtError, is_canonical};
use kstub::memory::Unreadable;
use support::page_tables::{KERNEL, NX, P, PAT_LARGE, PS, PageTables, RW, Size, US};
use support::tiny_kernel::{TinyKernel, VMALLOC};
use support::{FlatMemory, Rng};

const ROOT: u64 = 0x10_0000;
const TABLES: u64 = 0x10_1000;
const SME: u64 = 1 << 47;

fn space(levels: u8, sme_mask: u64) -> AddressSpace {
    AddressSpace { root: PhysAddr(ROOT), levels, sme_mask }
}

struct Case {
    what: &'static str,
    levels: u8,
    sme: u64,
    va: u64,
    pa: u64,
    size: Size,
    flags: u64,
}

fn cases() -> Vec<Case> {
    use Size::{G1, K4, M2};
    let case = |what, levels, va, pa, size, flags| Case { what, levels, sme: 0, va, pa, size, flags };
    let sme = |what, levels, va, pa, size, flags| Case { what, levels, sme: SME, va, pa, size, flags };
    vec![
        case("4K, user, lowest page", 4, 0, 0x20_0000, K4, P | RW | US),
        case("4K, kernel", 4, 0xffff_c900_0001_0000, 0x20_1000, K4, KERNEL),
        case("4K, last below the hole", 4, 0x0000_7fff_ffff_f000, 0x20_2000, K4, P | US | NX),
        case("4K, first above the hole", 4, 0xffff_8000_0000_0000, 0x20_3000, K4, KERNEL),
        case("4K, top of the address space", 4, 0xffff_ffff_ffff_f000, 0x20_4000, K4, KERNEL),
        case("4K, five levels", 5, 0xff11_0000_0000_1000, 0x20_5000, K4, KERNEL),
        case("4K, five levels, last below the hole", 5, 0x00ff_ffff_ffff_f000, 0x20_6000, K4, P | US),
        case("4K, five levels, first above the hole", 5, 0xff00_0000_0000_0000, 0x20_7000, K4, KERNEL),
        case("4K, five levels, in the four-level hole", 5, 0x0000_8000_0000_0000, 0x20_8000, K4, P | US),
        case(
            "4K with the PAT bit, which is where PS is",
            4,
            0xffff_c900_0001_1000,
            0x20_9000,
            K4,
            KERNEL | PS,
        ),
        case("2M, kernel text", 4, 0xffff_ffff_8100_0000, 0x0120_0000, M2, KERNEL & !NX),
        case("2M with the PAT bit", 4, 0xffff_c900_4000_0000, 0x0140_0000, M2, KERNEL | PAT_LARGE),
        case("2M, five levels", 5, 0xff11_0000_0020_0000, 0x0160_0000, M2, KERNEL),
        case("2M, user", 4, 0x0000_5555_5540_0000, 0x0180_0000, M2, P | RW | US | NX),
        case("1G, direct map", 4, 0xffff_8880_4000_0000, 0x4000_0000, G1, KERNEL),
        case("1G with the PAT bit", 4, 0xffff_8880_8000_0000, 0x8000_0000, G1, KERNEL | PAT_LARGE),
        case("1G, five levels", 5, 0xff11_0000_4000_0000, 0xc000_0000, G1, KERNEL),
        case("4K, address bits up to 51", 4, 0xffff_c900_0001_2000, 0x000f_ffff_ffff_e000, K4, KERNEL),
        case(
            "4K with ignored bits 52 to 62 set",
            4,
            0xffff_c900_0001_3000,
            0x20_a000,
            K4,
            KERNEL | (0x7ff << 52),
        ),
        sme("4K, encrypted", 4, 0xffff_c900_0001_0000, 0x20_b000, K4, KERNEL),
        sme("2M, encrypted", 4, 0xffff_ffff_8100_0000, 0x0120_0000, M2, KERNEL),
        sme("1G, encrypted, five levels", 5, 0xff11_0000_4000_0000, 0x4000_0000, G1, KERNEL),
    ]
}

#[test]
fn every_listed_mapping_translates_at_every_offset() {
    for c in cases() {
        let mut mem = FlatMemory::new();
        let mut tables = PageTables::new(&mut mem, ROOT, TABLES, c.levels.into()).with_sme(c.sme);
        tables.map(c.va, c.pa, c.size, c.flags);
        let leaf_at = tables.entry_at(c.va, c.size.level());
        let (image, space) = (mem.image(), space(c.levels, c.sme));
        let len = c.size.bytes();
        for offset in [0, 1, 8, 0xfff, len / 2, len / 2 + 0x123, len - 1] {
            if offset >= len {
                continue;
            }
            let at = VirtAddr(c.va + offset);
            let t = space.translate(&image, at).unwrap_or_else(|e| panic!("{}: {e}", c.what));
            assert_eq!(t.phys, PhysAddr(c.pa + offset), "{} + {offset:#x}", c.what);
            assert_eq!(t.left_in_page, len - offset, "{} + {offset:#x}", c.what);
            assert_eq!(t.page_size, len, "{}", c.what);
            assert_eq!(t.leaf.at, PhysAddr(leaf_at), "{}: address of the leaf", c.what);
            assert_eq!(t.leaf.level as u32 + 1, c.size.level(), "{}: level of the leaf", c.what);
        }
    }
}

#[test]
fn mutation_a_wrong_expectation_is_noticed() {
    // The same comparison with an address one page off must not hold.
    for c in cases() {
        let mut mem = FlatMemory::new();
        let mut tables = PageTables::new(&mut mem, ROOT, TABLES, c.levels.into()).with_sme(c.sme);
        tables.map(c.va, c.pa, c.size, c.flags);
        let t = space(c.levels, c.sme).translate(&mem.image(), VirtAddr(c.va)).unwrap();
        assert_ne!(t.phys, PhysAddr(c.pa.wrapping_add(c.size.bytes())), "{}", c.what);
        assert_ne!(t.phys, PhysAddr(c.pa + 8), "{}", c.what);
    }
    // And a table of the wrong depth must not lead to the right page.
    let mut mem = FlatMemory::new();
    PageTables::new(&mut mem, ROOT, TABLES, 5).map(0xff11_0000_0000_1000, 0x20_5000, Size::K4, KERNEL);
    assert!(space(4, 0).translate(&mem.image(), VirtAddr(0xffff_8000_0000_1000)).is_err());
}

#[test]
fn the_walk_visits_each_level_once_from_the_top() {
    for (levels, size, want) in [
        (4, Size::K4, vec![Level::P4d, Level::Pud, Level::Pmd, Level::Pte]),
        (4, Size::M2, vec![Level::P4d, Level::Pud, Level::Pmd]),
        (4, Size::G1, vec![Level::P4d, Level::Pud]),
        (5, Size::K4, vec![Level::Pgd, Level::P4d, Level::Pud, Level::Pmd, Level::Pte]),
        (5, Size::G1, vec![Level::Pgd, Level::P4d, Level::Pud]),
    ] {
        let va = 0xffff_ffff_c000_0000;
        let mut mem = FlatMemory::new();
        let mut tables = PageTables::new(&mut mem, ROOT, TABLES, levels);
        tables.map(va, 0x4000_0000, size, KERNEL);
        let want: Vec<_> = want
            .into_iter()
            .map(|level| {
                let at = tables.entry_at(va, level as u32 + 1);
                (level, PhysAddr(at), tables.mem.read_u64(at).unwrap())
            })
            .collect();
        let mut seen = Vec::new();
        space(levels as u8, 0)
            .walk(&mem.image(), VirtAddr(va), &mut |step| seen.push((step.level, step.at, step.entry)))
            .unwrap();
        assert_eq!(seen, want, "{levels} levels, {size:?}");
    }
}

#[test]
fn canonical_addresses_end_where_the_manual_says() {
    for (levels, at, want) in [
        (4, 0x0000_7fff_ffff_ffff, true),
        (4, 0x0000_8000_0000_0000, false),
        (4, 0xffff_7fff_ffff_ffff, false),
        (4, 0xffff_8000_0000_0000, true),
        (4, u64::MAX, true),
        (4, 0x00ff_ffff_ffff_ffff, false),
        (4, 0xff11_0000_0000_0000, false),
        (4, 0x8000_0000_0000_0000, false),
        (5, 0x00ff_ffff_ffff_ffff, true),
        (5, 0x0100_0000_0000_0000, false),
        (5, 0xfeff_ffff_ffff_ffff, false),
        (5, 0xff00_0000_0000_0000, true),
        (5, u64::MAX, true),
    ] {
        assert_eq!(is_canonical(VirtAddr(at), levels), want, "{at:#x} with {levels} levels");
        let error = space(levels, 0).translate(&FlatMemory::new().image(), VirtAddr(at)).unwrap_err();
        let refused = error == TranslateError::NonCanonical { at: VirtAddr(at), levels };
        assert_eq!(refused, !want, "{at:#x} with {levels} levels: {error}");
    }
}

#[test]
fn an_absent_entry_is_named_by_level_address_and_value() {
    for levels in [4u8, 5] {
        let va = 0xffff_ffff_c0de_d000;
        for missing in (1..=u32::from(levels)).rev() {
            for entry in [0, 0xdead_0000 & !1, 0x8000_0000_0000_0062] {
                let mut mem = FlatMemory::new();
                let mut tables = PageTables::new(&mut mem, ROOT, TABLES, levels.into());
                tables.set(va, missing, entry);
                let at = tables.entry_at(va, missing);
                let error = space(levels, 0).translate(&mem.image(), VirtAddr(va)).unwrap_err();
                let TranslateError::NotPresent { at: asked, step, levels: told } = &error else {
                    panic!("level {missing} = {entry:#x}: {error}");
                };
                assert_eq!((*asked, *told), (VirtAddr(va), levels));
                assert_eq!(
                    (step.level as u32 + 1, step.at, step.entry),
                    (missing, PhysAddr(at), entry),
                    "{error}"
                );
                assert_eq!(error.kind(), "not-mapped");
                let name = match (missing, levels) {
                    (1, _) => "PTE",
                    (2, _) => "PMD",
                    (3, _) => "PUD",
                    (4, 5) => "P4D",
                    _ => "PGD",
                };
                assert_eq!(
                    error.to_string(),
                    format!("{va:#x} is not mapped: {name} at {at:#x} is {entry:#x}")
                );
            }
        }
    }
}

#[test]
fn an_unreadable_table_is_named_with_its_reason() {
    for levels in [4u8, 5] {
        let va = 0xffff_ffff_c0de_d000;
        for unreadable in (1..=u32::from(levels)).rev() {
            let mut mem = FlatMemory::new();
            let mut tables = PageTables::new(&mut mem, ROOT, TABLES, levels.into());
            tables.map(va, 0x20_0000, Size::K4, KERNEL);
            let at = tables.entry_at(va, unreadable);
            for why in [
                Unreadable::Excluded,
                Unreadable::ZeroOrExcluded,
                Unreadable::NotRam,
                Unreadable::Truncated { offset: 0x1234 },
            ] {
                let mut image = mem.image();
                image.set_unreadable(PhysAddr(at), why.clone());
                let error = space(levels, 0).translate(&image, VirtAddr(va)).unwrap_err();
                let TranslateError::TableUnreadable { level, source, .. } = &error else {
                    panic!("level {unreadable}: {error}");
                };
                assert_eq!(*level as u32 + 1, unreadable);
                assert_eq!(source.at, PhysAddr(at));
                assert_eq!(source.why, why);
                assert_eq!(error.kind(), "table-unreadable");
                assert!(error.to_string().contains(&format!("{at:#x}")), "{error}");
            }
        }
    }
}

#[test]
fn a_table_beyond_ram_is_unreadable_not_absent() {
    let va = 0xffff_ffff_c0de_d000;
    let mut mem = FlatMemory::new();
    PageTables::new(&mut mem, ROOT, TABLES, 4).set(va, 2, 0x000f_0000_0000_0000 | P | RW);
    let error = space(4, 0).translate(&mem.image(), VirtAddr(va)).unwrap_err();
    assert!(matches!(error, TranslateError::TableUnreadable { level: Level::Pte, .. }), "{error}");
}

#[test]
fn prot_none_pages_are_found_inverted_and_plain() {
    for (what, levels, va, pa, size) in [
        ("4K", 4, 0x0000_7f00_1234_5000, 0x30_0000, Size::K4),
        ("2M", 4, 0x0000_7f00_1220_0000, 0x40_0000, Size::M2),
        ("1G", 4, 0x0000_7f00_4000_0000, 0x0, Size::G1),
        ("4K, five levels", 5, 0x007f_7f00_1234_5000, 0x30_0000, Size::K4),
    ] {
        for inverted in [true, false] {
            let mut mem = FlatMemory::new();
            mem.write(pa + 0x18, b"behind PROT_NONE");
            PageTables::new(&mut mem, ROOT, TABLES, levels).map_prot_none(va, pa, size, inverted);
            let t = space(levels as u8, 0)
                .translate(&mem.image(), VirtAddr(va + 0x18))
                .unwrap_or_else(|e| panic!("{what}, inverted {inverted}: {e}"));
            assert_eq!(t.phys, PhysAddr(pa + 0x18), "{what}, inverted {inverted}");
        }
    }
}

#[test]
fn prot_none_pages_are_found_with_memory_encryption() {
    // The encryption bit is not part of what Linux inverts: `__PHYSICAL_MASK` leaves it out.
    for (what, sme_in_leaf) in [("encrypted", true), ("shared", false)] {
        for inverted in [true, false] {
            let (va, pa) = (0x0000_7f00_1234_5000, 0x30_0000);
            let mut mem = FlatMemory::new();
            mem.write(pa, b"x");
            let mut tables = PageTables::new(&mut mem, ROOT, TABLES, 4).with_sme(SME);
            tables.map_prot_none(va, pa, Size::K4, inverted);
            if !sme_in_leaf {
                let at = tables.entry_at(va, 1);
                let entry = mem.read_u64(at).unwrap() & !SME;
                mem.write_u64(at, entry);
            }
            let t = space(4, SME)
                .translate(&mem.image(), VirtAddr(va))
                .unwrap_or_else(|e| panic!("{what}, inverted {inverted}: {e}"));
            assert_eq!(t.phys, PhysAddr(pa), "{what}, inverted {inverted}");
        }
    }
}

#[test]
fn an_entry_that_is_neither_present_nor_prot_none_stays_absent() {
    // Swap entries keep bits 0 and 8 clear; their other bits can look like an address in RAM.
    let va = 0x0000_7f00_1234_5000;
    let mut mem = FlatMemory::new();
    mem.write(0x30_0000, b"innocent");
    for entry in [0x30_0000u64, 0x30_0000 | 0x62, !0x30_0000u64 & 0x000f_ffff_ffff_f000 & !P] {
        let entry = entry & !(1 << 8);
        PageTables::new(&mut mem, ROOT, TABLES, 4).set(va, 1, entry);
        let error = space(4, 0).translate(&mem.image(), VirtAddr(va)).unwrap_err();
        assert!(matches!(error, TranslateError::NotPresent { .. }), "{entry:#x}: {error}");
    }
}

/// Virtual pages in a row on scattered frames of noise; what a read of them must give.
fn scattered(va: u64, pages: u64, levels: u32) -> (FlatMemory, Vec<u8>) {
    let mut rng = Rng::new(7);
    let mut frames: Vec<u64> = (0x400..0x400 + pages).collect();
    rng.shuffle(&mut frames);
    let mut mem = FlatMemory::new();
    let mut want = Vec::new();
    for &frame in &frames {
        let page = rng.noise_page();
        want.extend_from_slice(&page[..]);
        mem.pages.insert(frame, page);
    }
    let mut tables = PageTables::new(&mut mem, ROOT, TABLES, levels);
    for (i, frame) in frames.iter().enumerate() {
        tables.map(va + i as u64 * 4096, frame * 4096, Size::K4, KERNEL);
    }
    (mem, want)
}

#[test]
fn reads_cross_page_boundaries() {
    for (levels, va) in [(4, 0xffff_c900_001f_c000), (5, 0xff11_0000_001f_c000)] {
        let (mem, want) = scattered(va, 8, levels);
        let (image, space) = (mem.image(), space(levels as u8, 0));
        for (from, len) in
            [(0, 8 * 4096), (1, 4096), (4095, 2), (4090, 4096 * 3), (5, 0), (4096, 4096), (3 * 4096 - 1, 1)]
        {
            let mut buf = vec![0x5a; len];
            let got = space.read(&image, VirtAddr(va + from as u64), &mut buf);
            assert_eq!((got.filled, got.stopped), (len, None), "{from} + {len}");
            assert_eq!(buf, want[from..from + len], "{from} + {len}");
        }
        // The end of the mapping stops a read at that very byte.
        let mut buf = vec![0; 4096];
        let got = space.read(&image, VirtAddr(va + 8 * 4096 - 100), &mut buf);
        assert_eq!(got.filled, 100);
        assert_eq!(buf[..100], want[8 * 4096 - 100..]);
        match got.stopped {
            Some(VirtError::Translate(TranslateError::NotPresent { at, .. })) => {
                assert_eq!(at, VirtAddr(va + 8 * 4096));
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_read_stops_at_a_mapped_page_that_memory_lacks() {
    let va = 0xffff_c900_0000_0000;
    let (mem, want) = scattered(va, 4, 4);
    let space = space(4, 0);
    for hole in 0..4u64 {
        let frame = space.translate(&mem.image(), VirtAddr(va + hole * 4096)).unwrap().phys;
        let mut image = mem.image();
        image.set_unreadable(frame, Unreadable::Excluded);
        let mut buf = vec![0; 4 * 4096 - 16];
        let got = space.read(&image, VirtAddr(va + 16), &mut buf);
        let filled = (hole * 4096).saturating_sub(16) as usize;
        assert_eq!(got.filled, filled);
        assert_eq!(buf[..filled], want[16..16 + filled]);
        match got.stopped {
            Some(VirtError::Memory { at, source }) => {
                let skipped = if hole == 0 { 16 } else { 0 };
                assert_eq!(at, VirtAddr(va + hole * 4096 + skipped));
                assert_eq!(source.at, PhysAddr(frame.0 + skipped));
                assert_eq!(source.why, Unreadable::Excluded);
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_hole_inside_a_large_page_stops_a_read_there() {
    let (va, pa) = (0xffff_ffff_8100_0000, 0x20_0000);
    let mut mem = FlatMemory::new();
    mem.add_varied(pa / 4096, 512, &mut Rng::new(3));
    PageTables::new(&mut mem, ROOT, TABLES, 4).map(va, pa, Size::M2, KERNEL);
    let mut image = mem.image();
    image.set_unreadable(PhysAddr(pa + 5 * 4096), Unreadable::Excluded);
    let mut buf = vec![0; 0x20_0000];
    let got = space(4, 0).read(&image, VirtAddr(va + 0x10), &mut buf);
    assert_eq!(got.filled, 5 * 4096 - 0x10);
    assert_eq!(buf[..got.filled], mem.read(pa + 0x10, got.filled).unwrap());
    assert!(
        matches!(got.stopped, Some(VirtError::Memory { at, .. }) if at == VirtAddr(va + 5 * 4096)),
        "{:?}",
        got.stopped
    );
}

#[test]
fn the_top_of_the_address_space_is_readable_to_its_last_byte() {
    let va = 0xffff_ffff_ffff_f000;
    for levels in [4u8, 5] {
        let mut mem = FlatMemory::new();
        let page = Rng::new(9).noise_page();
        mem.write(0x20_0000, &page[..]);
        PageTables::new(&mut mem, ROOT, TABLES, levels.into()).map(va, 0x20_0000, Size::K4, KERNEL);
        let (image, space) = (mem.image(), space(levels, 0));
        let mut buf = [0; 16];
        let got = space.read(&image, VirtAddr(u64::MAX - 15), &mut buf);
        assert_eq!((got.filled, got.stopped), (16, None));
        assert_eq!(buf, page[4080..]);
        // One byte more does not wrap around to address 0, even if that is mapped.
        let mut tables = PageTables::new(&mut mem, ROOT, TABLES, levels.into());
        tables.map(va, 0x20_0000, Size::K4, KERNEL);
        tables.map(0, 0x20_0000, Size::K4, KERNEL);
        let mut buf = [0; 17];
        let got = space.read(&mem.image(), VirtAddr(u64::MAX - 15), &mut buf);
        assert_eq!(got.filled, 16);
        assert!(got.stopped.is_some());
    }
}

#[test]
fn a_read_into_the_canonical_hole_stops_at_its_edge() {
    let va = 0x0000_7fff_ffff_f000;
    let mut mem = FlatMemory::new();
    mem.write(0x20_0000, &[7; 4096]);
    PageTables::new(&mut mem, ROOT, TABLES, 4).map(va, 0x20_0000, Size::K4, KERNEL);
    let mut buf = [0; 64];
    let got = space(4, 0).read(&mem.image(), VirtAddr(va + 4096 - 8), &mut buf);
    assert_eq!(got.filled, 8);
    let at = VirtAddr(0x0000_8000_0000_0000);
    assert_eq!(got.stopped, Some(TranslateError::NonCanonical { at, levels: 4 }.into()));
}

#[test]
fn cr3_may_be_given_as_the_processor_has_it() {
    // PCID in bits 11:0 and bit 63 (no flush) are not address.
    let mut mem = FlatMemory::new();
    PageTables::new(&mut mem, ROOT, TABLES, 4).map(0xffff_c900_0000_0000, 0x20_0000, Size::K4, KERNEL);
    for extra in [0x1, 0xfff, 1 << 63, (1 << 63) | 0x18] {
        let space = AddressSpace { root: PhysAddr(ROOT | extra), levels: 4, sme_mask: 0 };
        let t = space.translate(&mem.image(), VirtAddr(0xffff_c900_0000_0000)).unwrap();
        assert_eq!(t.phys, PhysAddr(0x20_0000), "{extra:#x}");
    }
}

#[test]
fn a_tiny_kernel_reads_itself_through_its_own_tables() {
    for kernel in [
        TinyKernel::default(),
        TinyKernel::default().five_levels(),
        TinyKernel { sme_mask: SME, ..TinyKernel::default() },
        TinyKernel { uts_name_offset: 4, ..TinyKernel::earlier() },
    ] {
        let image = kernel.memory_after(&TinyKernel { load_at: 52 << 20, ..TinyKernel::earlier() }).image();
        let space = AddressSpace {
            root: PhysAddr(kernel.cr3()),
            levels: kernel.levels as u8,
            sme_mask: kernel.sme_mask,
        };
        let string = |at: u64, len: usize| {
            let mut buf = vec![0; len];
            let got = space.read(&image, VirtAddr(at), &mut buf);
            assert_eq!(got.stopped, None, "{}", kernel.release);
            String::from_utf8(buf).unwrap()
        };
        let release = kernel.uts_ns_virt() + kernel.uts_name_offset + 2 * 65;
        assert_eq!(string(release, kernel.release.len()), kernel.release);
        let banner = kernel.banner();
        assert_eq!(string(kernel.banner_virt(), banner.len()), banner);
        assert_eq!(string(VMALLOC + 0x400, banner.len()), banner);
        let phys = kernel.uts_ns_virt().wrapping_sub(0xffff_ffff_8000_0000).wrapping_add(kernel.phys_base());
        assert_eq!(phys, kernel.uts_ns_phys());
        assert_eq!(string(kernel.direct(phys) + kernel.uts_name_offset, 5), "Linux");
    }
}

#[test]
fn a_tiny_kernel_reads_itself_out_of_dump_files() {
    let kernel = TinyKernel::default();
    let mem = kernel.memory_after(&TinyKernel::earlier());
    for (what, bytes) in [
        ("elf of QEMU", kernel.qemu_elf(&mem, 2, false)),
        ("kdump", kernel.kdump(&mem, 2)),
        ("flattened", support::flattened::Flatten::default().apply(&kernel.kdump(&mem, 2)).bytes),
    ] {
        let file = support::TempFile::new(&bytes);
        let dump = kstub::backend::Dump::open(file.path()).unwrap_or_else(|e| panic!("{what}: {e}"));
        let space = AddressSpace { root: PhysAddr(kernel.cr3()), levels: 4, sme_mask: 0 };
        let mut banner = vec![0; kernel.banner().len()];
        let got = space.read(&dump, VirtAddr(kernel.banner_virt()), &mut banner);
        assert_eq!(got.stopped, None, "{what}");
        assert_eq!(banner, kernel.banner().as_bytes(), "{what}");
    }
}

#[test]
fn random_tables_never_panic_or_loop() {
    let mut rng = Rng::new(0x7ab1e);
    for round in 0..40 {
        let mut mem = FlatMemory::new();
        for pfn in 0x100..0x110 {
            // Entries that mostly point back into the tables.
            let page: Vec<u8> = (0..512)
                .flat_map(|_| {
                    let target = (0x100 + rng.below(18)) << 12;
                    (target | (rng.next() & 0xfff) | (rng.next() & NX)).to_le_bytes()
                })
                .collect();
            mem.write(pfn << 12, &page);
        }
        let image = mem.image();
        for levels in [4, 5] {
            for _ in 0..200 {
                let va = VirtAddr((rng.next() as i64 >> rng.below(40)) as u64);
                let mut steps = 0;
                let _ = space(levels, 0).walk(&image, va, &mut |_| steps += 1);
                assert!(steps <= u32::from(levels), "round {round}: {steps} steps for {va}");
                let mut buf = [0; 64];
                let got = space(levels, 0).read(&image, va, &mut buf);
                assert!(got.filled <= 64);
                assert_eq!(got.stopped.is_none(), got.filled == 64);
            }
        }
    }
}
