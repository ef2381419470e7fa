//! Files, their paths, and what is mounted where.
//!
//! Paths are those of the mount namespace's own root, whatever a process was chrooted to; a name that cannot be read is
//! said, and a path that is no place in the tree is shown as `/proc` shows it (`pipe:[1234]`).
//! Source: `fs/d_path.c`, `fs/mount.h`, `include/linux/{fs,dcache,fdtable,mount}.h`.

use super::{Kernel, Object, ObjectError};
use crate::addr::VirtAddr;
use std::collections::HashSet;

/// `PATH_MAX`; every component takes two bytes of it.
const COMPONENTS_MAX: usize = 2048;
/// `NAME_MAX` of every filesystem, and the names that pseudo filesystems make up.
const NAME_MAX: u64 = 4096;
/// The largest `fs.nr_open` by default; a table with more is damage.
const FDS_MAX: u64 = 1 << 20;
/// `MNT_CURSOR`, a reader's place in the list of mounts and no mount itself (v5.8 to v6.7).
const MNT_CURSOR: u64 = 0x1000_0000;
/// `MINORBITS`.
const MINOR_BITS: u32 = 20;

/// An open file of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenFile {
    /// The descriptor's number.
    pub fd: u64,
    /// Its `struct file`.
    pub file: VirtAddr,
    /// What it is.
    pub what: FileInfo,
}

/// What a `struct file` is of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileInfo {
    /// `struct dentry`.
    pub dentry: Option<VirtAddr>,
    /// `struct inode`.
    pub inode: Option<VirtAddr>,
    /// The inode's number.
    pub ino: Option<u64>,
    /// `i_mode`: type and permissions.
    pub mode: Option<u64>,
    /// The filesystem's device as `(major, minor)`.
    pub device: Option<(u64, u64)>,
    /// As `/proc/PID/fd` shows it. Untrusted; `Err` says what could not be read.
    pub path: Result<String, String>,
}

impl FileInfo {
    /// The type as crash's `files` shows it.
    pub fn kind(&self) -> &'static str {
        match self.mode.map(|mode| mode >> 12) {
            Some(0o01) => "FIFO",
            Some(0o02) => "CHR",
            Some(0o04) => "DIR",
            Some(0o06) => "BLK",
            Some(0o10) => "REG",
            Some(0o12) => "LNK",
            Some(0o14) => "SOCK",
            // Anonymous inodes have no type.
            Some(_) => "UNKN",
            None => "?",
        }
    }

    /// The path, or in brackets what could not be read.
    pub fn shown(&self) -> String {
        match &self.path {
            Ok(path) => path.clone(),
            Err(why) => format!("({why})"),
        }
    }
}

/// One mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Its `struct mount`.
    pub at: VirtAddr,
    /// Its `struct super_block`.
    pub super_block: VirtAddr,
    /// The number in `/proc/PID/mountinfo`.
    pub id: Option<i32>,
    /// Its parent's.
    pub parent_id: Option<i32>,
    /// The filesystem's device.
    pub device: Option<(u64, u64)>,
    /// Type of filesystem, with the subtype of FUSE. Untrusted like all names here.
    pub kind: String,
    /// What was mounted.
    pub source: String,
    /// Where it is mounted.
    pub path: Result<String, String>,
    /// What of the filesystem is its root: `/` but for bind mounts.
    pub root: Result<String, String>,
    /// Whether the mount or the filesystem refuses writes.
    pub read_only: bool,
}

/// A mount namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mounts {
    /// In the namespace's order.
    pub mounts: Vec<Mount>,
    /// What was broken.
    pub problem: Option<String>,
}

impl Kernel {
    /// The open files of the process that `task` is of, by descriptor; `None` if it has none left.
    pub fn open_files(&self, task: Object<'_>) -> Result<Option<Vec<OpenFile>>, ObjectError> {
        let Some(files) = task.at("files")? else { return Ok(None) };
        let Some(table) = files.at("fdt")? else { return Ok(None) };
        let count = table.get("max_fds")?.min(FDS_MAX);
        let fds = table.member("fd")?.pointer()?;
        let mut open = Vec::new();
        let mut bytes = vec![0; (count * 8) as usize];
        let read = self.read(fds, &mut bytes);
        for (fd, slot) in (0..).zip(bytes.get(..read.filled).unwrap_or_default().chunks_exact(8)) {
            let file = crate::bytes::u64_at(slot, 0).map_or(VirtAddr(0), VirtAddr);
            if file.0 != 0 {
                open.push(OpenFile { fd, file, what: self.file_info(self.object("file", file)?) });
            }
        }
        match read.stopped {
            // What could be read is answered; without any of it there is no answer.
            Some(why) if open.is_empty() => {
                Err(ObjectError::Unreadable { what: "fd table".into(), at: fds, why: why.to_string() })
            }
            _ => Ok(Some(open)),
        }
    }

    /// What the `struct file` is of.
    pub fn file_info(&self, file: Object<'_>) -> FileInfo {
        let inode = file.at("f_inode").ok().flatten();
        let dentry = file.at("f_path.dentry").ok().flatten();
        let get = |path| inode.and_then(|inode| inode.get(path).ok());
        let device = inode.and_then(|inode| inode.at("i_sb").ok()?).and_then(|sb| device(sb));
        let path = file.member("f_path").and_then(|path| self.path(path));
        FileInfo {
            dentry: dentry.map(|dentry| dentry.at),
            inode: inode.map(|inode| inode.at),
            ino: get("i_ino"),
            mode: get("i_mode"),
            device,
            path: path.map_err(|error| error.to_string()),
        }
    }

    /// A `struct path` as text.
    pub fn path(&self, path: Object<'_>) -> Result<String, ObjectError> {
        let (Some(mnt), Some(dentry)) = (path.at("mnt")?, path.at("dentry")?) else {
            return Ok(String::new());
        };
        if let Some(name) = pseudo_name(dentry)? {
            return Ok(name);
        }
        if dentry.get("d_parent")? == dentry.at.0 && mnt.get("mnt_root")? != dentry.at.0 {
            // In no directory at all: a memfd, shared memory, a file of hugetlbfs (simple_dname).
            return Ok(format!("/{} (deleted)", name(dentry)?));
        }
        let text = tree_path(Some(mnt.container_of("mount", "mnt")?), dentry)?;
        let deleted = dentry.get("d_hash.pprev")? == 0 && dentry.get("d_parent")? != dentry.at.0;
        Ok(if deleted { text + " (deleted)" } else { text })
    }

    /// What is mounted in the mount namespace of `task`; `None` if it has none left.
    pub fn mounts(&self, task: Object<'_>) -> Result<Option<Mounts>, ObjectError> {
        let Some(proxy) = task.at("nsproxy")? else { return Ok(None) };
        let Some(namespace) = proxy.at("mnt_ns")? else { return Ok(None) };
        // Since Linux commit 2eea9ce4310d ("mounts: keep list of mounts in an rbtree") (in v6.8).
        let (walk, member) = match namespace.has("list") {
            false => (self.rb_tree(namespace.member("mounts")?.at), "mnt_node"),
            true => (self.list(namespace.member("list")?.at), "mnt_list"),
        };
        let mut mounts = Vec::new();
        let mut problem = walk.problem;
        for node in walk.nodes {
            let place = self.object("mount", node)?;
            let offset = place.member(member)?.at.0.wrapping_sub(node.0);
            let mount = self.object("mount", VirtAddr(node.0.wrapping_sub(offset)))?;
            match read_mount(mount) {
                Ok(found) => mounts.extend(found),
                Err(error) => {
                    problem.get_or_insert(format!("mount at {}: {error}", mount.at));
                }
            }
        }
        Ok(Some(Mounts { mounts, problem }))
    }
}

fn read_mount(mount: Object<'_>) -> Result<Option<Mount>, ObjectError> {
    let flags = mount.get("mnt.mnt_flags")?;
    // The bit has had other meanings since there are no cursors.
    if flags & MNT_CURSOR != 0 && mount.get("mnt.mnt_sb")? == 0 {
        return Ok(None);
    }
    let Some(sb) = mount.at("mnt.mnt_sb")? else { return Ok(None) };
    let source = mount.member("mnt_devname")?;
    let source = if source.pointer()?.0 == 0 { Ok("none".to_owned()) } else { source.text() };
    let said = |name: Result<String, ObjectError>| name.unwrap_or_else(|error| format!("({error})"));
    let (kind, source) = (said(kind_of(sb)), said(source));
    let root = mount.at("mnt.mnt_root")?;
    let path = match root {
        Some(root) => tree_path(Some(mount), root),
        None => Ok("?".to_owned()),
    };
    let root = root.map_or(Ok("?".to_owned()), |root| tree_path(None, root));
    let parent = mount.at("mnt_parent")?;
    // MNT_READONLY and SB_RDONLY.
    let read_only = flags & 0x40 != 0 || sb.get("s_flags").is_ok_and(|flags| flags & 1 != 0);
    Ok(Some(Mount {
        at: mount.at,
        super_block: sb.at,
        id: mount.get("mnt_id").ok().map(|id| id as i32),
        parent_id: parent.and_then(|parent| parent.get("mnt_id").ok()).map(|id| id as i32),
        device: device(sb),
        kind,
        source,
        path: path.map_err(|error| error.to_string()),
        root: root.map_err(|error| error.to_string()),
        read_only,
    }))
}

/// The type of filesystem, with the subtype of FUSE.
fn kind_of(sb: Object<'_>) -> Result<String, ObjectError> {
    let kind = match sb.at("s_type")? {
        Some(kind) => kind.member("name")?.text()?,
        None => "?".to_owned(),
    };
    let subtype = sb.member("s_subtype").ok().filter(|subtype| subtype.u64().is_ok_and(|at| at != 0));
    Ok(match subtype.map(|subtype| subtype.text()).transpose()? {
        Some(subtype) if !subtype.is_empty() => format!("{kind}.{subtype}"),
        _ => kind,
    })
}

/// The path from `dentry` up, over the mounts around it; without a mount, up to its filesystem's root.
fn tree_path(mount: Option<Object<'_>>, dentry: Object<'_>) -> Result<String, ObjectError> {
    let (mut mount, mut dentry) = (mount, dentry);
    let mut parts = Vec::new();
    let mut seen = HashSet::new();
    while parts.len() < COMPONENTS_MAX {
        if !seen.insert((mount.map(|mount| mount.at), dentry.at)) {
            parts.push("(cycle)".to_owned());
            break;
        }
        let at_root = match mount {
            Some(mount) => mount.get("mnt.mnt_root")? == dentry.at.0,
            None => false,
        };
        if let Some(here) = mount.filter(|_| at_root) {
            let parent = here.at("mnt_parent")?.filter(|parent| parent.at != here.at);
            let (Some(parent), Some(point)) = (parent, here.at("mnt_mountpoint")?) else { break };
            (mount, dentry) = (Some(parent), point);
            continue;
        }
        let Some(parent) = dentry.at("d_parent")?.filter(|parent| parent.at != dentry.at) else { break };
        parts.push(name(dentry)?);
        dentry = parent;
    }
    parts.reverse();
    Ok(format!("/{}", parts.join("/")))
}

/// The name of a dentry.
fn name(dentry: Object<'_>) -> Result<String, ObjectError> {
    let len = dentry.get("d_name.len")?.min(NAME_MAX);
    let at = dentry.member("d_name.name")?.pointer()?;
    dentry.kernel().text_at(at, len)
}

/// What files without a place in the tree are called: pipes, sockets and the like, whose filesystems make up names.
fn pseudo_name(dentry: Object<'_>) -> Result<Option<String>, ObjectError> {
    let Some(sb) = dentry.at("d_sb")? else { return Ok(None) };
    let Some(kind) = sb.at("s_type")? else { return Ok(None) };
    let kind = kind.member("name")?.text()?;
    let ino = || match dentry.at("d_inode")? {
        Some(inode) => inode.get("i_ino"),
        None => Ok(0),
    };
    Ok(Some(match kind.as_str() {
        "pipefs" => format!("pipe:[{}]", ino()?),
        "sockfs" => format!("socket:[{}]", ino()?),
        "anon_inodefs" => format!("anon_inode:{}", name(dentry)?),
        // Their dentries have the kind of namespace for d_fsdata; the number tells which it is.
        "nsfs" => format!("nsfs:[{}]", ino()?),
        "pidfs" => format!("pidfd:[{}]", ino()?),
        _ => return Ok(None),
    }))
}

fn device(sb: Object<'_>) -> Option<(u64, u64)> {
    let device = sb.get("s_dev").ok()?;
    Some((device >> MINOR_BITS, device & ((1 << MINOR_BITS) - 1)))
}
