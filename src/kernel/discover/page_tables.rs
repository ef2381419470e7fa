//! Finding a kernel by the page tables a CPU runs on: for kernels without VMCOREINFO, or where its page is gone.
//!
//! The image is the first thing mapped above `__START_KERNEL_map`; it begins at `_text`. The banner in it
//! tells the release. The build-id is not looked for: the vDSOs inside the image carry build-ids too.

use super::{DEFAULT_LINK_TEXT, Found, FoundBy, IMAGE_ALIGN, KERNEL_IMAGE_SIZE, START_KERNEL_MAP};
use crate::addr::VirtAddr;
use crate::arch::x86_64::AddressSpace;
use crate::backend::Backend;
use crate::vmcoreinfo::VmcoreInfo;

/// `linux_banner` begins so (`init/version.c`).
const BANNER: &[u8] = b"Linux version ";

/// The kernel mapped by `space`, if there is one with a banner.
pub fn find(backend: &dyn Backend, space: AddressSpace) -> Option<Found> {
    let slots =
        (START_KERNEL_MAP..START_KERNEL_MAP + KERNEL_IMAGE_SIZE).step_by(IMAGE_ALIGN as usize).map(VirtAddr);
    let mapped: Vec<VirtAddr> = slots.filter(|&slot| space.translate(backend, slot).is_ok()).collect();
    let text = *mapped.first()?;
    let release = mapped.iter().find_map(|&slot| banner_in(backend, &space, slot))?;
    let phys = space.translate(backend, text).ok()?.phys;
    Some(Found {
        by: FoundBy::PageTables,
        vmcoreinfo: VmcoreInfo::default(),
        release,
        build_id: None,
        kaslr_offset: text.0.wrapping_sub(DEFAULT_LINK_TEXT),
        phys_base: phys.0.wrapping_sub(text.0 - START_KERNEL_MAP),
        space,
        text,
        problems: vec![
            "no VMCOREINFO: the kernel was found by a CPU's page tables, and its build-id is not known"
                .to_owned(),
        ],
    })
}

/// The release in a banner inside the 2 MiB at `slot`.
fn banner_in(backend: &dyn Backend, space: &AddressSpace, slot: VirtAddr) -> Option<String> {
    let mut buf = vec![0; IMAGE_ALIGN as usize];
    let filled = space.read(backend, slot, &mut buf).filled;
    let buf = buf.get(..filled)?;
    memchr::memmem::find_iter(buf, BANNER).find_map(|at| {
        let rest = buf.get(at + BANNER.len()..)?;
        let release = rest.get(..rest.len().min(64))?.split(|&b| b == b' ').next()?;
        // "Linux version %s" is in the image too.
        let plausible = release.first()?.is_ascii_digit() && release.iter().all(u8::is_ascii_graphic);
        plausible.then(|| String::from_utf8_lossy(release).into_owned())
    })
}
