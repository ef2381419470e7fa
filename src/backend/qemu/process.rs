//! QEMU's own memory, and files that it has: what they are opened by, and how they are read.
//!
//! Knows processes and files, and no guest. Source: `proc_pid_mem(5)`, `proc_pid_fd(5)`, `process_vm_readv(2)`.

use crate::memory::Unreadable;
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, IoSliceMut};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Reads of a process's memory from this on are made at once.
const AT_ONCE: usize = 16 << 10;

/// A file of RAM, or a process's memory.
pub(super) struct Opened {
    pub(super) file: File,
    pub(super) name: String,
    /// The process, if it is one's memory: that has no end that is worth telling; a file may be cut.
    pub(super) process: Option<u32>,
}

/// A mapping of a process that is shared with a file: a line of `/proc/PID/maps`.
struct SharedMapping {
    start: u64,
    end: u64,
    offset: u64,
    device: u64,
    inode: u64,
}

impl Opened {
    /// Fills `buf` from `offset` and says how far, and why not further.
    pub(super) fn read(&self, offset: u64, buf: &mut [u8]) -> (usize, Option<Unreadable>) {
        let mut filled = self.process.map_or(0, |pid| self.read_at_once(pid, offset, buf));
        while let Some(rest) = buf.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            let at = offset.wrapping_add(filled as u64);
            let why = match self.file.read_at(rest, at) {
                Ok(0) if self.process.is_some() => {
                    Unreadable::Io { offset: at, message: "QEMU's process has ended".into() }
                }
                Ok(0) => Unreadable::Truncated { offset: at },
                Ok(read) => {
                    filled += read;
                    continue;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => Unreadable::Io { offset: at, message: error.to_string() },
            };
            return (filled, Some(why));
        }
        (filled, None)
    }

    /// Reads from a process's memory what can be had in one call, and says how much that is: nothing if it is little or not
    /// allowed. The rest is for who reads the descriptor.
    fn read_at_once(&self, pid: u32, offset: u64, buf: &mut [u8]) -> usize {
        let (Ok(pid), Ok(base)) = (i32::try_from(pid), usize::try_from(offset)) else { return 0 };
        if buf.len() < AT_ONCE {
            return 0;
        }
        let from = [RemoteIoVec { base, len: buf.len() }];
        let read = process_vm_readv(Pid::from_raw(pid), &mut [IoSliceMut::new(buf)], &from).unwrap_or(0);
        // Another process may have this number now. The descriptor is of the one that was opened, and reads nothing once
        // that has ended.
        match self.file.read_at(&mut [0], offset) {
            Ok(1) => read,
            _ => 0,
        }
    }
}

/// QEMU as a process of this machine.
pub(super) struct Process {
    pid: u32,
    /// `/proc/PID/mem`, if this process may read it.
    memory: Option<Arc<Opened>>,
    /// Found only if that is not so.
    shared: Vec<SharedMapping>,
    files: HashMap<(u64, u64), Arc<Opened>>,
}

impl Process {
    pub(super) fn new(pid: u32, problems: &mut Vec<String>) -> Self {
        let path = format!("/proc/{pid}/mem");
        let memory = match File::open(&path) {
            Ok(file) => {
                Some(Arc::new(Opened { file, name: format!("QEMU's memory {path}"), process: Some(pid) }))
            }
            Err(error) => {
                problems.push(format!(
                    "QEMU's memory cannot be opened ({path}: {error}): run kstub as the user of QEMU with \
                     kernel.yama.ptrace_scope 0, or as root"
                ));
                None
            }
        };
        let shared = if memory.is_some() { Vec::new() } else { shared_mappings(pid) };
        Self { pid, memory, shared, files: HashMap::new() }
    }

    /// The way to `len` bytes at an address of QEMU's own.
    pub(super) fn source(&mut self, host: u64, len: u64) -> Option<(Arc<Opened>, u64)> {
        if let Some(memory) = &self.memory {
            return Some((Arc::clone(memory), host));
        }
        let end = host.checked_add(len)?;
        let mapping = self.shared.iter().find(|one| one.start <= host && end <= one.end)?;
        let offset = mapping.offset.checked_add(host - mapping.start)?;
        let key = (mapping.device, mapping.inode);
        if !self.files.contains_key(&key) {
            self.files.insert(key, Arc::new(open_by_descriptor(self.pid, key)?));
        }
        Some((Arc::clone(self.files.get(&key)?), offset))
    }
}

/// What the process maps shared from files. To see it needs less than to read its memory.
fn shared_mappings(pid: u32) -> Vec<SharedMapping> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
    text.lines().filter_map(shared_mapping).collect()
}

/// `7f5217ffe000-7f5227ffe000 rw-s 00000000 00:01 1089   /memfd:memory-backend-memfd (deleted)`
fn shared_mapping(line: &str) -> Option<SharedMapping> {
    let mut fields = line.split_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    fields.next().filter(|permissions| permissions.ends_with('s'))?;
    let hex = |digits: &str| u64::from_str_radix(digits, 16).ok();
    let offset = hex(fields.next()?)?;
    let (major, minor) = fields.next()?.split_once(':')?;
    let device = device_number(hex(major)?, hex(minor)?);
    let inode = fields.next()?.parse().ok().filter(|&inode| inode != 0)?;
    Some(SharedMapping { start: hex(start)?, end: hex(end)?, offset, device, inode })
}

/// As the C library packs the two numbers (`makedev(3)`).
fn device_number(major: u64, minor: u64) -> u64 {
    (major & 0xffff_f000) << 32 | (major & 0xfff) << 8 | (minor & 0xffff_ff00) << 12 | minor & 0xff
}

/// Opens the file with this device and inode, which has no name any more or never had one, by QEMU's descriptor of it.
fn open_by_descriptor(pid: u32, file: (u64, u64)) -> Option<Opened> {
    let descriptors: PathBuf = Path::new("/proc").join(pid.to_string()).join("fd");
    let found = std::fs::read_dir(descriptors).ok()?.flatten().map(|entry| entry.path()).find(|path| {
        std::fs::metadata(path).is_ok_and(|meta| meta.is_file() && (meta.dev(), meta.ino()) == file)
    })?;
    let name = format!("the file {}", found.display());
    Some(Opened { file: File::open(&found).ok()?, name, process: None })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// A number that another process has now is noticed by the descriptor, which has nothing to read any more.
    #[test]
    fn a_process_of_the_same_number_is_another() {
        let mut gone = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let of = |pid: u32| {
            let file = File::open(format!("/proc/{pid}/mem")).unwrap();
            Opened { file, name: String::new(), process: Some(std::process::id()) }
        };
        let (ended, ours) = (of(gone.id()), of(std::process::id()));
        gone.kill().unwrap();
        gone.wait().unwrap();
        let bytes: Vec<u8> = (0..2 * AT_ONCE).map(|n| n as u8).collect();
        let (at, mut buf) = (bytes.as_ptr() as u64, vec![0; bytes.len()]);
        assert_eq!(ended.read_at_once(std::process::id(), at, &mut buf), 0);
        assert!(ended.read(at, &mut buf).1.is_some());
        assert_eq!(ours.read_at_once(std::process::id(), at, &mut buf), bytes.len());
        assert_eq!(buf, bytes);
        // Where nothing is mapped it stops as a `pread` does.
        let start = u64::MAX >> 17;
        assert_eq!(ours.read_at_once(std::process::id(), start, &mut buf), 0);
        assert_eq!(ours.read(start, &mut buf).0, 0);
    }

    #[test]
    fn mappings_that_are_shared() {
        let line =
            "7f5217ffe000-7f5227ffe000 rw-s 00001000 00:01 1089       /memfd:memory-backend-memfd (deleted)";
        let mapping = shared_mapping(line).unwrap();
        assert_eq!((mapping.start, mapping.end), (0x7f52_17ff_e000, 0x7f52_27ff_e000));
        assert_eq!((mapping.offset, mapping.inode, mapping.device), (0x1000, 1089, 1));
        assert!(shared_mapping(&line.replace("rw-s", "rw-p")).is_none());
        assert!(shared_mapping(&line.replace("1089", "0")).is_none());
        assert!(shared_mapping("garbage").is_none());
    }

    /// As where `/proc/PID/mem` may not be opened, but the descriptors may be seen (yama's `ptrace_scope` 1).
    #[test]
    fn a_memfd_is_found_by_qemus_descriptor() {
        const SIZE: u64 = 8 << 20;
        let object = format!("memory-backend-memfd,id=m,size={SIZE},share=on");
        let arguments = ["-nodefaults", "-display", "none", "-machine", "none", "-S", "-object", &object];
        let started = std::process::Command::new("qemu-system-x86_64").args(arguments).spawn();
        let Ok(mut qemu) = started else {
            return eprintln!("skipped: no qemu-system-x86_64");
        };
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
        let mut shared = Vec::new();
        while shared.is_empty() && std::time::Instant::now() < deadline {
            std::thread::sleep(std::time::Duration::from_millis(20));
            shared = shared_mappings(qemu.id());
            shared.retain(|one| one.end - one.start == SIZE);
        }
        let start = shared.first().map_or(0, |one| one.start);
        let mut process = Process { pid: qemu.id(), memory: None, shared, files: HashMap::new() };
        let found = process.source(start + 0x1000, SIZE - 0x1000);
        let beyond = process.source(start + 0x1000, SIZE);
        qemu.kill().unwrap();
        qemu.wait().unwrap();
        let Some((opened, offset)) = found else { unreachable!("not found") };
        assert_eq!((opened.file.metadata().unwrap().len(), offset), (SIZE, 0x1000));
        assert!(beyond.is_none());
        // Cut under the reader: a short read, and no signal.
        let mut buf = [0; 16];
        assert_eq!(opened.read(SIZE - 16, &mut buf), (16, None));
        assert_eq!(opened.read(SIZE - 8, &mut buf), (8, Some(Unreadable::Truncated { offset: SIZE })));
    }
}
