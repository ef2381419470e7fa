//! What CPUs were doing when the dump was made: spinning or not, and in which context, on real kernels' dumps.
//!
//! Truth is what the guest planted and said of it before the end (`set.json`), and QEMU's registers; never kstub.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod support;

use kstub::addr::VirtAddr;
use kstub::arch::x86_64::{Reg, RegisterFile};
use kstub::backend::Dump;
use kstub::debuginfo::find::Places;
use kstub::kernel::spin::{Kind, Owner, Verdict};
use kstub::kernel::{CpuId, Kernel, Machine, Options};
use serde_json::Value;
use std::sync::Arc;
use support::lab::{self, DumpFile, Set};

fn open(dump: &DumpFile) -> Machine {
    let opened = Dump::open(&dump.path).unwrap_or_else(|e| panic!("{}: {e}", dump.path.display()));
    let options = Options { vmlinux: None, places: Places::default() };
    Machine::open(Arc::new(opened), &options, &|_, _| ()).unwrap()
}

/// Calls `check` with the first dump of each set that `wanted` takes.
fn for_each_set(wanted: &dyn Fn(&Set) -> bool, check: &mut dyn FnMut(&Set, &str, &Machine)) {
    let Some(sets) = lab::sets() else { return };
    for set in sets.iter().filter(|set| wanted(set)) {
        let dumps = set.dumps();
        let Some(first) = dumps.iter().find(|d| d.complete && d.split.is_empty()) else { continue };
        let what = format!("{}/{}", set.name(), first.name);
        eprintln!("{what}");
        check(set, &what, &open(first));
    }
}

fn hex(value: &Value) -> u64 {
    u64::from_str_radix(value.as_str().unwrap().trim_start_matches("0x"), 16).unwrap()
}

fn has_spinners(set: &Set) -> bool {
    set.json["chain"]["spinners"].as_array().is_some_and(|all| !all.is_empty())
}

#[test]
fn debug_print() {
    for_each_set(&|_| true, &mut |_, what, machine| {
        let kernel = machine.kernel().unwrap();
        for cpu in machine.cpus() {
            eprintln!("{what} CPU {} {:?} {:#?}", cpu.id, cpu.comm, kernel.spinning(&cpu.regs));
        }
    });
}
