//! Lets a guest run that has not booted yet, up to the first line of its kernel's C code.
//!
//! KASLR puts the image anywhere in steps of 2 MiB (`CONFIG_PHYSICAL_ALIGN`; `arch/x86/boot/compressed/kaslr.c`), so there
//! is a breakpoint at each place where `start_kernel()` may be. Under KVM a breakpoint is an instruction in memory, and
//! there is no memory yet at those addresses: there the guest is looked at until the kernel is there.

use anyhow::Context;
use kstub::addr::VirtAddr;
use kstub::arch::x86_64::Reg;
use kstub::backend::live::{Go, LiveControl, LiveError, Point, RunState};
use kstub::debuginfo::DebugInfo;
use std::ops::Range;
use std::path::Path;
use std::time::{Duration, Instant};

/// Where the image can be: `__START_KERNEL_map` to where modules begin with the largest `KERNEL_IMAGE_SIZE`.
const IMAGE: Range<u64> = 0xffff_ffff_8000_0000..0xffff_ffff_c000_0000;
const STEP: u64 = 2 << 20;

/// How long a kernel may take to appear.
const PATIENCE: Duration = Duration::from_secs(600);
/// How often a guest under KVM is looked at.
const SAMPLE: Duration = Duration::from_millis(1);

/// Stops the guest at `start_kernel()` of the kernel that `vmlinux` is of, or under KVM soon after; `tick` is called
/// from time to time. Returns what to tell the user.
pub fn wait(control: &dyn LiveControl, vmlinux: &Path, tick: &dyn Fn()) -> anyhow::Result<Option<String>> {
    let info = DebugInfo::open(vmlinux)?;
    let start = info.symbol("start_kernel").context("the vmlinux has no symbol start_kernel")?.addr;
    let kvm = control.monitor("info kvm")?.contains("enabled");
    control.attach()?;
    if kvm { sample(control, tick) } else { stop_at(control, start, tick).map(|()| None) }
}

fn stop_at(control: &dyn LiveControl, start: u64, tick: &dyn Fn()) -> anyhow::Result<()> {
    let lowest = IMAGE.start + start % STEP;
    let places: Vec<VirtAddr> = (lowest..IMAGE.end).step_by(STEP as usize).map(VirtAddr).collect();
    for &place in &places {
        control.insert(Point::Software, place, 1)?;
    }
    let stopped = run_until_stopped(control, tick);
    for &place in &places {
        control.remove(Point::Software, place, 1)?;
    }
    stopped
}

fn run_until_stopped(control: &dyn LiveControl, tick: &dyn Fn()) -> anyhow::Result<()> {
    control.resume(&[(None, Go::Continue)])?;
    let begun = Instant::now();
    while begun.elapsed() < PATIENCE {
        if control.wait_stop(Duration::from_millis(200))?.is_some() {
            return Ok(());
        }
        tick();
    }
    stop(control)?;
    anyhow::bail!(
        "no kernel reached start_kernel() within {} s; is --vmlinux the one that boots?",
        PATIENCE.as_secs()
    )
}

/// Asks for a stop and waits until it has come.
fn stop(control: &dyn LiveControl) -> Result<(), LiveError> {
    control.interrupt()?;
    let begun = Instant::now();
    while control.wait_stop(Duration::from_millis(200))?.is_none()
        && begun.elapsed() < Duration::from_secs(10)
    {}
    Ok(())
}

fn sample(control: &dyn LiveControl, tick: &dyn Fn()) -> anyhow::Result<Option<String>> {
    control.resume(&[(None, Go::Continue)])?;
    let begun = Instant::now();
    while begun.elapsed() < PATIENCE && control.run_state()? == RunState::Running {
        let snapshot = control.snapshot()?;
        let pc = |cpu: &kstub::backend::SavedCpu| cpu.regs.u64(Reg::Rip);
        if snapshot.saved_cpus().iter().filter_map(pc).any(|pc| IMAGE.contains(&pc)) {
            stop(control)?;
            return Ok(Some(
                "under KVM the kernel is found by looking: it may be past start_kernel() already".into(),
            ));
        }
        tick();
        std::thread::sleep(SAMPLE);
    }
    stop(control)?;
    anyhow::bail!("no kernel appeared within {} s", PATIENCE.as_secs())
}
