//! What `page.mapping` leads to: an anon_vma, a KSM node, or a file with its inode and path.
//!
//! Also whether the mapping still holds the page at its index. Source: `include/linux/fs.h` (`struct address_space`),
//! `include/linux/page-flags.h` (`PAGE_MAPPING_ANON`), `include/linux/xarray.h`, `include/linux/swapops.h`.

use super::{Kind, RawPage};
use crate::addr::VirtAddr;
use crate::kernel::{Kernel, Object, ObjectError};

/// Names on a path, and steps of other walks.
const DEPTH: usize = 256;

/// What a page belongs to.
#[derive(Clone, Copy)]
pub enum Mapping<'k> {
    /// Nothing.
    None,
    /// Anonymous memory: its `struct anon_vma`.
    Anon(Object<'k>),
    /// Merged by KSM: address of its stable node.
    Ksm(VirtAddr),
    /// A kernel page that can be moved: address of what moves it.
    Movable(VirtAddr),
    /// A file's page cache: its `struct address_space`.
    File(Object<'k>),
}

/// A file, as far as an inode tells it.
#[derive(Clone, Debug, Default)]
pub struct FileIdentity {
    /// Address of its `struct inode`.
    pub inode: VirtAddr,
    /// `i_ino`.
    pub ino: Option<u64>,
    /// Type of the file system, `ext4`.
    pub fs: Option<String>,
    /// `s_id` of the superblock: a device's name for most. Untrusted text.
    pub device: Option<String>,
    /// Path from the root of its file system, by one of its names. Untrusted text.
    pub path: Option<String>,
}

/// What the page cache holds at an index.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Held {
    /// This very page, or the compound page that it is part of.
    This,
    /// Nothing.
    Nothing,
    /// Another page.
    Other(VirtAddr),
    /// No page but a value: a shadow of one that was evicted, or a swap entry.
    Value(u64),
}

/// A swap entry: which swap area, and the slot in it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SwapEntry {
    /// Number of the area; the highest are no areas but marks (migration, poison).
    pub area: u64,
    /// Slot.
    pub offset: u64,
}

impl SwapEntry {
    /// From a `swp_entry_t` (`SWP_TYPE_SHIFT` is 58: an xarray value of 63 bits less 5 of type).
    pub fn from_value(value: u64) -> Self {
        Self { area: value >> 58 & 0x1f, offset: value & ((1 << 58) - 1) }
    }

    /// From a page-table entry that is not present (`arch/x86/include/asm/pgtable_64.h`); `None` for an empty one.
    pub fn from_pte(pte: u64) -> Option<Self> {
        (pte != 0 && pte & 1 == 0).then_some(Self { area: pte >> 59, offset: !pte << 5 >> 14 })
    }
}

/// What `mapping` of a page of this kind leads to.
pub fn of<'k>(kernel: &'k Kernel, raw: &RawPage, kind: Kind) -> Result<Mapping<'k>, ObjectError> {
    let at = VirtAddr(raw.mapping & !3);
    if at.0 >> 63 != 1 {
        return Ok(Mapping::None);
    }
    Ok(match (kind, raw.mapping & 3) {
        (Kind::Movable, _) => Mapping::Movable(at),
        (Kind::Anon | Kind::AnonLarge | Kind::SwapCache | Kind::HugeTlb, 1) => {
            Mapping::Anon(kernel.object("anon_vma", at)?)
        }
        (Kind::Ksm, _) => Mapping::Ksm(at),
        (Kind::File | Kind::FileDirty | Kind::Shmem | Kind::HugeTlb, 0) => {
            Mapping::File(kernel.object("address_space", at)?)
        }
        _ => Mapping::None,
    })
}

/// What the page cache `space` holds at `index`, seen from the page at `page` (of the compound page at `head`).
pub fn held(space: Object<'_>, index: u64, page: VirtAddr, head: VirtAddr) -> Result<Held, ObjectError> {
    let root = space.member("i_pages")?.at;
    let unreadable = |why| ObjectError::Unreadable { what: "xarray".into(), at: root, why };
    let entry = space.kernel().xarray_load(root, index).map_err(unreadable)?;
    Ok(match entry.unwrap_or(0) {
        0 => Held::Nothing,
        value if value & 1 == 1 => Held::Value(value >> 1),
        // Before multi-index entries each index had its own page.
        at if at == head.0 || at == page.0 => Held::This,
        other => Held::Other(VirtAddr(other)),
    })
}

/// Names the file whose page cache `space` is.
pub fn identity(space: Object<'_>) -> Result<FileIdentity, ObjectError> {
    let Some(inode) = space.at("host")? else { return Ok(FileIdentity::default()) };
    let sb = inode.at("i_sb").ok().flatten();
    let fs =
        sb.and_then(|sb| sb.at("s_type").ok().flatten()).and_then(|ty| ty.member("name").ok()?.text().ok());
    Ok(FileIdentity {
        inode: inode.at,
        ino: inode.get("i_ino").ok(),
        fs,
        device: sb.and_then(|sb| sb.member("s_id").ok()?.text().ok()),
        path: alias(inode).and_then(path),
    })
}

/// A dentry of the inode.
fn alias(inode: Object<'_>) -> Option<Object<'_>> {
    let first = inode.get("i_dentry.first").ok().filter(|&at| at != 0)?;
    let member =
        ["d_alias", "d_u.d_alias"].into_iter().find(|path| inode.kernel().has_member("dentry", path))?;
    inode.kernel().object("hlist_node", VirtAddr(first)).ok()?.container_of("dentry", member).ok()
}

/// The names from the root of the file system down to `dentry`.
pub fn path(dentry: Object<'_>) -> Option<String> {
    let mut names = Vec::new();
    let mut here = dentry;
    for _ in 0..DEPTH {
        let name = here.either(&["d_name.name", "__d_name.name"]).ok()?.text().ok()?;
        let parent = here.at("d_parent").ok()??;
        if parent.at == here.at {
            // An unlinked file or a socket has no root, only its name.
            if name != "/" {
                names.push(name);
                names.reverse();
                return Some(names.join("/"));
            }
            names.reverse();
            return Some(format!("/{}", names.join("/")));
        }
        names.push(name);
        here = parent;
    }
    None
}
