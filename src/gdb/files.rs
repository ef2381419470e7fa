//! The kernel's file, as gdb gets to know of it: its name, and its bytes for a gdb on another machine.
//!
//! gdb asks for the program's name (`qXfer:exec-file`) and then for its bytes (`vFile:…`); where those are not
//! served it opens the name on its own machine. No path of a client's is ever opened: what it names is compared with
//! what kstub itself has named, and the files behind those are open already.
//! Source: GDB manual, "General Query Packets", "Host I/O Packets", "Protocol-specific Representation of
//! Datatypes"; gdb `remote.c` (`remote_filesystem_is_local`), `gdb/build-id.c` (names of debug files).

use super::front::window;
use super::libraries::Libraries;
use crate::debuginfo::{Contents, DebugInfo, Error};
use crate::kernel::Machine;
use crate::rsp;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Files one client can have open; gdb keeps two.
const MAX_OPEN: usize = 16;

/// The most bytes of a file that are sent at once. gdb reads ahead as much as it gets, and mostly uses little of it.
const MAX_PREAD: usize = 0x8000;

/// errno values of the File-I/O protocol.
mod errno {
    pub const ENOENT: u8 = 2;
    pub const EIO: u8 = 5;
    pub const EBADF: u8 = 9;
    pub const EINVAL: u8 = 22;
    pub const ENFILE: u8 = 23;
    pub const EROFS: u8 = 30;
}

/// How clients are told of the kernel's file.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Tell {
    /// Not at all.
    #[default]
    Nothing,
    /// Its path, if they ask without having been told that they can: a gdb that was started with it, and whose guest
    /// becomes another.
    WhenAsked,
    /// Its path, for a gdb that can open it there.
    Path,
    /// Its bytes, too.
    Contents,
}

/// What clients are told of the kernel's file. Cheap to clone: every session has one.
#[derive(Clone, Default)]
pub struct Files {
    tell: Tell,
    offer: Option<Arc<Offer>>,
    libraries: Option<Libraries>,
}

struct Offer {
    /// The program's name: an absolute path where there is a file.
    program: Vec<u8>,
    served: Option<Served>,
    /// The kernel that it is of.
    of: Option<Identity>,
}

/// A kernel's release, build-id and vmlinux: where they are the same, so are its files.
#[derive(PartialEq, Eq)]
struct Identity(String, Option<String>, Option<PathBuf>);

impl Identity {
    fn of(machine: &Machine) -> Option<Self> {
        let found = machine.kernel()?.found();
        let vmlinux = machine.vmlinux().map(Path::to_owned);
        Some(Self(found.release.clone(), found.build_id.clone(), vmlinux))
    }
}

struct Served {
    /// The vmlinux without debug info.
    stripped: Arc<Contents>,
    /// The end of the debug file's path, and the file.
    debug: Option<(String, Arc<Contents>)>,
}

impl Files {
    /// Nothing is told.
    pub fn none() -> Self {
        Self::default()
    }

    /// The kernel's file in `machine`, its vmlinux or one made of its names, and its modules'.
    pub fn of(machine: &Machine, libraries: Libraries, tell: Tell) -> Result<Self, Error> {
        let offer = match tell {
            Tell::Nothing => None,
            _ => Some(Arc::new(Offer::of(machine, &libraries, tell)?)),
        };
        Ok(Self { tell, offer, libraries: Some(libraries) })
    }

    /// The same at another moment of `machine`, which may have another kernel.
    pub(super) fn again(&self, machine: &Arc<Machine>) -> Self {
        let libraries = self.libraries.as_ref().map(|libraries| libraries.again(Arc::clone(machine)));
        let is_same = |offer: &&Arc<Offer>| offer.of == Identity::of(machine);
        let offer = match (self.offer.as_ref().filter(is_same), &libraries) {
            (None, Some(libraries)) if self.tell != Tell::Nothing => {
                let offer = Offer::of(machine, libraries, self.tell).or_else(|error| {
                    tracing::warn!("the vmlinux cannot be served: {error}");
                    Offer::of(machine, libraries, Tell::Path)
                });
                offer.ok().map(Arc::new)
            }
            (same, _) => same.cloned(),
        };
        Self { tell: self.tell, offer, libraries }
    }

    /// These files, and the modules'.
    pub fn with_libraries(self, libraries: Libraries) -> Self {
        Self { libraries: Some(libraries), ..self }
    }

    /// The path of the vmlinux, for a gdb that can open it there.
    pub fn local(vmlinux: Option<&DebugInfo>) -> Self {
        let offer = Offer { program: program(vmlinux), served: None, of: None };
        Self { tell: Tell::Path, offer: Some(Arc::new(offer)), libraries: None }
    }

    /// The vmlinux without debug info, and with it if gdb finds none of its own by the build-id.
    pub fn serve(vmlinux: Option<&DebugInfo>) -> Result<Self, Error> {
        let served = vmlinux.map(Served::of).transpose()?;
        let offer = Offer { program: program(vmlinux), served, of: None };
        Ok(Self { tell: Tell::Contents, offer: Some(Arc::new(offer)), libraries: None })
    }

    /// What `qSupported` is to say of it.
    pub(super) fn features(&self) -> String {
        let is_told = self.offer.is_some() && self.tell != Tell::WhenAsked;
        let program = if is_told { ";qXfer:exec-file:read+" } else { "" };
        let libraries = if self.libraries.is_some() { ";qXfer:libraries:read+" } else { "" };
        [program, libraries].concat()
    }
}

impl Offer {
    fn of(machine: &Machine, libraries: &Libraries, tell: Tell) -> Result<Self, Error> {
        let vmlinux = machine.kernel().and_then(|kernel| kernel.debug_info());
        let made = if vmlinux.is_none() { libraries.image() } else { None };
        let program = match &made {
            Some(made) => made.as_os_str().as_bytes().to_vec(),
            None => program(vmlinux),
        };
        let served = match (tell, vmlinux, &made) {
            (Tell::Contents, Some(info), _) => Some(Served::of(info)?),
            (Tell::Contents, None, Some(made)) => Some(Served::made(made)?),
            _ => None,
        };
        Ok(Self { program, served, of: Identity::of(machine) })
    }
}

impl Served {
    fn of(info: &DebugInfo) -> Result<Self, Error> {
        let link = info.build_id().and_then(|id| id.split_at_checked(2));
        let debug = match link {
            Some((dir, rest)) if info.has_dwarf() => {
                Some((format!("/.build-id/{dir}/{rest}.debug"), Arc::new(info.whole()?)))
            }
            _ => None,
        };
        Ok(Self { stripped: Arc::new(info.stripped()?), debug })
    }

    /// A file made of the kernel's names.
    fn made(path: &Path) -> Result<Self, Error> {
        let contents = Contents::of_file(path)
            .map_err(|source| Error::Io { path: path.display().to_string(), source })?;
        Ok(Self { stripped: Arc::new(contents), debug: None })
    }
}

/// The name gdb is told. Where there is no file it is a sentence's beginning: gdb completes it with "No such file or
/// directory", and without any name would say that this target cannot tell one.
fn program(vmlinux: Option<&DebugInfo>) -> Vec<u8> {
    let Some(path) = vmlinux.map(DebugInfo::path) else {
        return b"vmlinux of this kernel ('monitor info' says how to get it)".to_vec();
    };
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    absolute.as_os_str().as_bytes().to_vec()
}

/// One client's open files.
pub(super) struct OpenFiles {
    pub(super) files: Files,
    open: [Option<Arc<Contents>>; MAX_OPEN],
}

impl OpenFiles {
    pub(super) fn new(files: Files) -> Self {
        Self { files, open: [const { None }; MAX_OPEN] }
    }

    /// The answer to a packet about files; `None` if it is not one, or if nothing is served.
    pub(super) fn answer(&mut self, body: &[u8]) -> Option<Vec<u8>> {
        if let (Some(request), Some(libraries)) =
            (body.strip_prefix(b"qXfer:libraries:read:"), &self.files.libraries)
        {
            return Some(window(libraries.xml().as_bytes(), request));
        }
        let offer = Arc::clone(self.files.offer.as_ref()?);
        if let Some(request) = body.strip_prefix(b"qXfer:exec-file:read:") {
            // In front of the window stands a process, of which there is one.
            return Some(window(&offer.program, request));
        }
        let served = offer.served.as_ref()?;
        let request = body.strip_prefix(b"vFile:")?;
        let colon = request.iter().position(|&b| b == b':')?;
        let arguments: Vec<&[u8]> = request[colon + 1..].split(|&b| b == b',').collect();
        let answer = match (&request[..colon], &arguments[..]) {
            // There is one file system.
            (b"setfs", _) => Ok(b"F0".to_vec()),
            (b"open", [name, flags, _mode]) => self.open(&offer.program, served, name, flags),
            (b"close", [handle]) => self.close(handle),
            (b"pread", [handle, count, offset]) => self.pread(handle, count, offset),
            (b"fstat", [handle]) => self.get(handle).map(|contents| stat(contents)),
            (b"stat" | b"lstat", [name]) => self.find(&offer.program, served, name).map(|found| stat(&found)),
            // gdb follows links by itself, and there are none.
            (b"readlink", _) => Err(errno::EINVAL),
            (b"pwrite" | b"unlink", _) => Err(errno::EROFS),
            (b"open" | b"close" | b"pread" | b"fstat" | b"stat" | b"lstat", _) => Err(errno::EINVAL),
            _ => return None,
        };
        Some(answer.unwrap_or_else(|errno| format!("F-1,{errno:x}").into_bytes()))
    }

    fn find(&self, program: &[u8], served: &Served, name: &[u8]) -> Result<Arc<Contents>, u8> {
        let library = || self.files.libraries.as_ref()?.open(&rsp::decode(name)?).map(Arc::new);
        find(program, served, name).or_else(|errno| library().ok_or(errno))
    }

    fn open(&mut self, program: &[u8], served: &Served, name: &[u8], flags: &[u8]) -> Result<Vec<u8>, u8> {
        const O_RDONLY: u64 = 0;
        if rsp::parse_u64(flags) != Some(O_RDONLY) {
            return Err(errno::EROFS);
        }
        let found = self.find(program, served, name)?;
        let free = self.open.iter().position(Option::is_none).ok_or(errno::ENFILE)?;
        self.open[free] = Some(found);
        Ok(format!("F{free:x}").into_bytes())
    }

    fn close(&mut self, handle: &[u8]) -> Result<Vec<u8>, u8> {
        self.get(handle)?;
        let slot = number(handle).and_then(|handle| self.open.get_mut(handle)).ok_or(errno::EBADF)?;
        *slot = None;
        Ok(b"F0".to_vec())
    }

    fn pread(&self, handle: &[u8], count: &[u8], offset: &[u8]) -> Result<Vec<u8>, u8> {
        let contents = self.get(handle)?;
        let offset = rsp::parse_u64(offset).ok_or(errno::EINVAL)?;
        let mut buf = vec![0; number(count).ok_or(errno::EINVAL)?.min(MAX_PREAD)];
        let n = contents.read(offset, &mut buf).map_err(|error| {
            tracing::warn!("the vmlinux cannot be read any more: {error}");
            errno::EIO
        })?;
        let mut body = format!("F{n:x};").into_bytes();
        rsp::escape(&buf[..n], &mut body);
        Ok(body)
    }

    fn get(&self, handle: &[u8]) -> Result<&Arc<Contents>, u8> {
        number(handle).and_then(|handle| self.open.get(handle)?.as_ref()).ok_or(errno::EBADF)
    }
}

fn number(text: &[u8]) -> Option<usize> {
    rsp::parse_u64(text).and_then(|n| usize::try_from(n).ok())
}

/// The file called `name` (in hex): the program, or its debug file below any directory for such files, since that
/// directory is set in gdb.
fn find(program: &[u8], served: &Served, name: &[u8]) -> Result<Arc<Contents>, u8> {
    let name = rsp::decode(name).ok_or(errno::EINVAL)?;
    if name == program {
        return Ok(Arc::clone(&served.stripped));
    }
    match &served.debug {
        Some((end, contents)) if name.starts_with(b"/") && name.ends_with(end.as_bytes()) => {
            // Without a directory in front: gdb was told to look for debug files nowhere.
            if name.len() == end.len() { Err(errno::ENOENT) } else { Ok(Arc::clone(contents)) }
        }
        _ => Err(errno::ENOENT),
    }
}

/// `struct stat` of the File-I/O protocol, big-endian.
fn stat(contents: &Contents) -> Vec<u8> {
    const REGULAR_AND_READABLE: u32 = 0o100_444;
    const BLOCK: u64 = 512;
    let len = contents.len();
    let time = u32::try_from(contents.mtime()).unwrap_or_default();
    let mut stat = Vec::with_capacity(64);
    // st_dev, st_ino, st_mode, st_nlink, st_uid, st_gid, st_rdev
    for word in [0, 0, REGULAR_AND_READABLE, 1, 0, 0, 0] {
        stat.extend_from_slice(&word.to_be_bytes());
    }
    // st_size, st_blksize, st_blocks
    for long in [len, 4096, len.div_ceil(BLOCK)] {
        stat.extend_from_slice(&long.to_be_bytes());
    }
    // st_atime, st_mtime, st_ctime
    for _ in 0..3 {
        stat.extend_from_slice(&time.to_be_bytes());
    }
    let mut body = format!("F{:x};", stat.len()).into_bytes();
    rsp::escape(&stat, &mut body);
    body
}
