//! A guest that boots, up to the first line of its kernel's C code.
//!
//! KASLR puts the image anywhere in steps of 2 MiB (`CONFIG_PHYSICAL_ALIGN`; `arch/x86/boot/compressed/kaslr.c`), so there
//! is a breakpoint at each place where `start_kernel()` may be. Another kernel is known by its banner. Under KVM a
//! breakpoint is an instruction in memory, and there is no memory yet at those addresses: there the guest is looked at
//! until the kernel is there. Knows no session.

use crate::addr::VirtAddr;
use crate::arch::x86_64::{AddressSpace, Reg};
use crate::backend::live::{Go, LiveControl, LiveError, Point, RunState, Stop};
use crate::backend::{Backend, SavedCpu};
use crate::debuginfo::DebugInfo;
use std::ops::Range;
use std::time::{Duration, Instant};

/// Where the image can be: `__START_KERNEL_map` to where modules begin with the largest `KERNEL_IMAGE_SIZE`.
const IMAGE: Range<u64> = 0xffff_ffff_8000_0000..0xffff_ffff_c000_0000;
const STEP: u64 = 2 << 20;

/// How long a kernel may take to appear.
const PATIENCE: Duration = Duration::from_secs(600);
/// How often a guest is asked whether it has stopped.
const SLICE: Duration = Duration::from_millis(100);
/// How often it is looked whether another kernel runs.
const LOOK: Duration = Duration::from_secs(1);
/// A kernel that is seen at work so often without coming to `start_kernel()` is past that. It takes milliseconds but
/// under TCG, where code in the page of a breakpoint is slow: some kernels clear their bss from there.
const PAST: u32 = 120;
/// A kernel that is seen so often, and its banner nowhere, is another.
const OTHERS: u32 = 5;
/// How often a guest under KVM is looked at.
const SAMPLE: Duration = Duration::from_millis(1);
/// How long a guest may take to stop.
const STANDSTILL: Duration = Duration::from_secs(10);
/// More of a banner is not compared.
const BANNER_MAX: u64 = 512;

/// What is looked for: a kernel's addresses as it was linked.
pub struct Wanted {
    start: u64,
    banner: Option<(u64, Vec<u8>)>,
}

/// How a boot was followed to its end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Came {
    /// The guest stands at `start_kernel()`.
    Exactly(Stop),
    /// It stands where its kernel was first seen: under KVM.
    About(Stop),
    /// It was stopped before, by somebody else.
    Interrupted(Stop),
}

/// Why no kernel came.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The guest cannot be asked or told any more.
    #[error(transparent)]
    Guest(#[from] LiveError),
    /// One is there, and is not the one.
    #[error(
        "a kernel runs, and has not come to the start_kernel() of the vmlinux: it is another, or was past that when kstub \
         came (start the guest with -S)"
    )]
    Another,
    /// None is there.
    #[error("no kernel came to start_kernel() within {} s", PATIENCE.as_secs())]
    Never,
}

impl Wanted {
    /// The kernel that `info` is of; `None` if that has no `start_kernel`.
    pub fn of(info: &DebugInfo) -> Option<Self> {
        let start = info.symbol("start_kernel")?.addr;
        let banner = || {
            let symbol = info.symbol("linux_banner")?;
            let len = if symbol.size == 0 { 64 } else { symbol.size.min(BANNER_MAX) };
            Some((symbol.addr, info.bytes_at(symbol.addr, len)?))
        };
        Some(Self { start, banner: banner() })
    }

    fn places(&self) -> Vec<VirtAddr> {
        (IMAGE.start + self.start % STEP..IMAGE.end).step_by(STEP as usize).map(VirtAddr).collect()
    }

    /// Whether the kernel is mapped where `start_kernel()` is at `place`.
    fn is_at(&self, place: VirtAddr, memory: &dyn Backend, cpu: &SavedCpu) -> bool {
        let Some((at, banner)) = &self.banner else { return true };
        let register = |reg| cpu.regs.u64(reg);
        let space = register(Reg::Cr3).and_then(|cr3| {
            AddressSpace::from_control_registers(register(Reg::Cr0), cr3, register(Reg::Cr4))
        });
        let at = VirtAddr(at.wrapping_add(place.0.wrapping_sub(self.start)));
        let mut there = vec![0; banner.len()];
        space.is_some_and(|space| space.read(memory, at, &mut there).stopped.is_none()) && there == *banner
    }
}

/// Lets a guest under run control go until `wanted` starts. `goes_on` is asked from time to time: when it says no, the
/// guest is stopped. Nothing is left behind in the guest.
pub fn run(
    control: &dyn LiveControl,
    wanted: &Wanted,
    goes_on: &dyn Fn() -> bool,
) -> Result<Came, BootError> {
    if control.monitor("info kvm")?.contains("enabled") {
        return sample(control, goes_on);
    }
    let places = wanted.places();
    let put = places.iter().try_for_each(|&place| control.insert(Point::Software, place, 1));
    let came = match put {
        Ok(()) => run_to(control, wanted, &places, goes_on),
        Err(error) => Err(error.into()),
    };
    // As many as can be, whatever happened.
    let mut removed = Ok(());
    for &place in &places {
        removed = removed.and(control.remove(Point::Software, place, 1));
    }
    let came = came?;
    removed?;
    Ok(came)
}

fn run_to(
    control: &dyn LiveControl,
    wanted: &Wanted,
    places: &[VirtAddr],
    goes_on: &dyn Fn() -> bool,
) -> Result<Came, BootError> {
    let (begun, mut looked) = (Instant::now(), Instant::now());
    let (mut others, mut seen) = (0, 0);
    control.resume(&[(None, Go::Continue)])?;
    while begun.elapsed() < PATIENCE {
        if let Some(stop) = control.wait_stop(SLICE)? {
            return came_to(control, stop, wanted, places);
        }
        if !goes_on() {
            return came_to(control, halt(control)?, wanted, places);
        }
        if looked.elapsed() < LOOK {
            continue;
        }
        looked = Instant::now();
        let snapshot = control.snapshot()?;
        if let Some(cpu) = in_image(&*snapshot) {
            seen += 1;
            others += u32::from(!places.iter().any(|place| wanted.is_at(*place, &*snapshot, cpu)));
        }
        if seen > PAST || others > OTHERS {
            halt(control)?;
            return Err(BootError::Another);
        }
    }
    halt(control)?;
    Err(BootError::Never)
}

fn came_to(
    control: &dyn LiveControl,
    stop: Stop,
    wanted: &Wanted,
    places: &[VirtAddr],
) -> Result<Came, BootError> {
    let snapshot = control.snapshot()?;
    let cpu = usize::try_from(stop.cpu).ok().and_then(|cpu| snapshot.saved_cpus().get(cpu));
    let Some((cpu, at)) = cpu.and_then(|cpu| Some((cpu, VirtAddr(cpu.regs.u64(Reg::Rip)?)))) else {
        return Ok(Came::Interrupted(stop));
    };
    match places.contains(&at) {
        true if wanted.is_at(at, &*snapshot, cpu) => Ok(Came::Exactly(stop)),
        true => Err(BootError::Another),
        false => Ok(Came::Interrupted(stop)),
    }
}

/// A CPU that executes the kernel image.
pub fn in_image(snapshot: &dyn Backend) -> Option<&SavedCpu> {
    snapshot.saved_cpus().iter().find(|cpu| cpu.regs.u64(Reg::Rip).is_some_and(|pc| IMAGE.contains(&pc)))
}

/// Has the guest stop, and waits until it stands.
fn halt(control: &dyn LiveControl) -> Result<Stop, LiveError> {
    control.interrupt()?;
    let what = || LiveError::Timeout { what: "stopping the guest".into(), seconds: STANDSTILL.as_secs() };
    control.wait_stop(STANDSTILL)?.ok_or_else(what)
}

fn sample(control: &dyn LiveControl, goes_on: &dyn Fn() -> bool) -> Result<Came, BootError> {
    control.resume(&[(None, Go::Continue)])?;
    let begun = Instant::now();
    while begun.elapsed() < PATIENCE {
        if control.run_state()? != RunState::Running || !goes_on() {
            return Ok(Came::Interrupted(halt(control)?));
        }
        if in_image(&*control.snapshot()?).is_some() {
            return Ok(Came::About(halt(control)?));
        }
        std::thread::sleep(SAMPLE);
    }
    halt(control)?;
    Err(BootError::Never)
}
