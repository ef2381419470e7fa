//! Guests that die of their QEMU, and tests that are then begun again.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

/// How often a guest is booted, and a test begun, before it counts.
pub const BOOTS: u32 = 3;

/// What the kernel says of an `int3` that it does not expect; 6.12 has "Oops: " in front, 6.1 has not.
pub const INT3: &str = "int3: 0000 [#";

thread_local! {
    /// A guest of this thread's test has died of its QEMU while the test failed.
    static DIED: Cell<bool> = const { Cell::new(false) };
}

/// Whether a guest died because it changed its own code: up to version 8.0, QEMU may run an `int3` on one emulated CPU when
/// another has put the instruction back already, and the kernel no longer expects it. It is reported for guests that no
/// debugger looks at. What the oops shows of the code has no breakpoint in it then; one that a debugger had left would be.
pub fn died_of_qemu(console: &str) -> bool {
    let mut codes =
        console.split(INT3).skip(1).filter_map(|oops| oops.split("Code: ").nth(1)?.lines().next());
    let first = codes.next();
    first.into_iter().chain(codes).all(|code| !code.contains("cc <")) && first.is_some()
}

/// Whether what a guest has reported, and its kernel printed, since it was told to start is of the boot that was to come. Of
/// the one before there may be a beat yet, and that it ends.
pub fn says_of_its_boot(report: &str, console: &str) -> bool {
    let is_of_the_end = |line: &str| line.trim().is_empty() || line.contains("reboot: ");
    !report.lines().all(|line| line.starts_with("beat ")) || !console.lines().all(is_of_the_end)
}

/// Tells [`again`] of a failed test's guest whether its QEMU is to blame.
pub fn note_end(by_qemu: impl FnOnce() -> bool) {
    if std::thread::panicking() && by_qemu() {
        DIED.set(true);
    }
}

/// Runs a test in which guests boot that somebody looks at; from its beginning if one has [died of its QEMU](died_of_qemu).
pub fn again(test: fn()) {
    for _ in 1..BOOTS {
        DIED.set(false);
        match catch_unwind(AssertUnwindSafe(test)) {
            Ok(()) => return,
            Err(_) if DIED.get() => eprintln!("once more: the guest died of its QEMU"),
            Err(failure) => resume_unwind(failure),
        }
    }
    test();
}
