//! ELF files that look like a vmlinux, made by the compiler.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Where the files are linked, as kernels are.
pub const LINKED_AT: u64 = 0xffff_ffff_8100_0000;

/// A source with a function, a variable in each kind of section, and a type that only debug info knows.
const SOURCE: &str = r"
struct planted_type { long number; char text[16]; };
struct planted_type planted = { 4711, `kstub` };
const int planted_constant = 7;
static int planted_zero[100];
int planted_function(int x)
{
    return x + planted_zero[x];
}
void _start(void)
{
    planted_function((int)planted.number + planted_constant);
    for (;;) {
    }
}
";

/// An x86-64 program at a kernel's addresses with this build-id (hex) and debug info; `None` without a compiler, which is
/// then said. `scripts/test` installs one, and CI must have it.
pub fn vmlinux(path: &Path, build_id: &str) -> Option<PathBuf> {
    let source = path.with_extension("c");
    std::fs::write(&source, SOURCE.replace('`', "\"")).unwrap();
    let built = Command::new("gcc")
        .args(["-g", "-O0", "-nostdlib", "-static", "-ffreestanding", "-fno-pie", "-no-pie"])
        .args(["-fno-stack-protector", "-fno-asynchronous-unwind-tables", "-mcmodel=kernel"])
        .arg(format!("-Wl,-Ttext-segment={LINKED_AT:#x},--build-id=0x{build_id}"))
        .arg("-o")
        .args([path, &source])
        .status();
    let removed = std::fs::remove_file(&source);
    match built {
        Ok(status) => assert!(status.success() && removed.is_ok(), "gcc"),
        Err(error) => {
            skip(&format!("gcc: {error}"));
            return None;
        }
    }
    Some(path.to_owned())
}

/// Says that a test is skipped; in CI that is an error.
pub fn skip(why: &str) {
    assert_ne!(std::env::var("CI").as_deref(), Ok("true"), "{why}");
    eprintln!("skipped: {why}");
}
