//! Page tables of real kernels: addresses translated here against those that QEMU translated itself.
//!
//! QEMU's `dump-guest-memory -p` walks the guest's tables and writes what it found as (p_vaddr, p_paddr) pairs. It
//! sets the bits above those that the tables translate in every address, also in those of the lower half.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod support;

use kstub::addr::{PhysAddr, VirtAddr};
use kstub::arch::x86_64::AddressSpace;
use kstub::arch::x86_64::paging::Translation;
use kstub::backend::Dump;
use std::collections::BTreeMap;
use support::Rng;
use support::lab::{self, Set};

/// The address spaces that the CPUs of a set were in, from what QEMU printed.
fn spaces(set: &Set) -> Option<Vec<AddressSpace>> {
    let levels = set.json["page_table_levels"].as_u64()? as u8;
    let cpus = set.registers()?;
    // CR4.LA57, bit 12, is what the processor goes by.
    assert!(cpus.iter().all(|cpu| (cpu["cr4"] >> 12 & 1 == 1) == (levels == 5)), "{}", set.name());
    let space =
        |cpu: &BTreeMap<String, u64>| AddressSpace { root: PhysAddr(cpu["cr3"]), levels, sme_mask: 0 };
    Some(cpus.iter().map(space).collect())
}

fn translate(spaces: &[AddressSpace], dump: &Dump, at: u64) -> Vec<Translation> {
    spaces.iter().filter_map(|space| space.translate(dump, VirtAddr(at)).ok()).collect()
}

#[test]
fn translations_are_qemus() {
    let Some(sets) = lab::sets() else { return };
    for set in sets {
        let Some(spaces) = spaces(&set) else { continue };
        let Some(paging) = set.dumps().into_iter().find(|dump| dump.paging) else { continue };
        let raw = set.dumps().into_iter().find(|dump| !dump.paging && dump.format == "elf").unwrap();
        let dump = Dump::open(&raw.path).unwrap_or_else(|e| panic!("{}: {e}", raw.path.display()));
        let mut rng = Rng::new(5);
        let (mut checked, mut sizes) = (0, BTreeMap::<u64, u64>::new());
        for [_, vaddr, paddr, len] in lab::load_headers(&paging.path) {
            for offset in (0..8).map(|_| rng.below(len)).chain([0, len - 1]) {
                let unused = if spaces[0].levels == 5 { 64 - 57 } else { 64 - 48 };
                let at = ((((vaddr + offset) << unused) as i64) >> unused) as u64;
                let want = PhysAddr(paddr + offset);
                let found = translate(&spaces, &dump, at);
                let right: Vec<_> = found.iter().filter(|t| t.phys == want).collect();
                assert!(
                    !right.is_empty(),
                    "{}: {at:#x} is {want} to QEMU, here {found:x?} on {} CPUs",
                    set.name(),
                    spaces.len()
                );
                // Mutation check: the next page is not as good.
                let next = PhysAddr(want.0 + 4096);
                assert!(right.iter().all(|t| t.phys != next), "{}: {at:#x}", set.name());
                *sizes.entry(right[0].page_size).or_default() += 1;
                checked += 1;
            }
        }
        eprintln!("{}: {checked} addresses, by page size {sizes:x?}", set.name());
        assert!(checked > 1000 && sizes.len() >= 2, "{}: {checked} addresses, {sizes:x?}", set.name());
    }
}

#[test]
fn every_cpu_can_read_where_it_stands() {
    let Some(sets) = lab::sets() else { return };
    for set in sets {
        let Some(spaces) = spaces(&set) else { continue };
        let cpus = set.registers().unwrap();
        for file in set.dumps() {
            let dump = Dump::open(&file.path).unwrap_or_else(|e| panic!("{}: {e}", file.path.display()));
            for (i, (space, cpu)) in spaces.iter().zip(&cpus).enumerate() {
                let what = format!("{}/{}, CPU {i}", set.name(), file.name);
                for register in ["rip", "rsp"] {
                    let mut word = [0; 8];
                    let got = space.read(&dump, VirtAddr(cpu[register]), &mut word);
                    assert_eq!(got.stopped, None, "{what}: {register} = {:#x}", cpu[register]);
                    assert!(register != "rip" || word != [0; 8], "{what}: no code at rip");
                }
                // With the other number of levels the same tables must not make sense.
                let wrong = AddressSpace { levels: 9 - space.levels, ..*space };
                let mut word = [0; 8];
                assert!(wrong.read(&dump, VirtAddr(cpu["rip"]), &mut word).stopped.is_some(), "{what}");
            }
        }
    }
}
