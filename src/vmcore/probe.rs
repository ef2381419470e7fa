//! What kind of file this is, by its first bytes.
//!
//! Knows signatures only. Sources: magic(5) for what is no dump; `lime.h` of LiME; QEMU
//! `migration/savevm.c` (QEVM); the format modules for what is.

use super::error::Error;
use super::file::Source;
use super::{flattened, kdump, lime};

/// A format that can be read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Format {
    Elf,
    Kdump,
    Lime,
}

impl Format {
    pub fn name(self) -> &'static str {
        match self {
            Self::Elf => "elf",
            Self::Kdump => "kdump-compressed",
            Self::Lime => "lime",
        }
    }
}

const DECOMPRESS: &str = "decompress it first";
const DUMP_INSTEAD: &str = "give an ELF or kdump-compressed dump";
const RAW: &str = "give a dump, or a raw image of memory as FILE@PHYSADDR";

/// What people give by mistake: signature, its offset, what it is, the cure.
const NOT_DUMPS: [(&[u8], usize, &str, &str); 11] = [
    (b"\x1f\x8b", 0, "a gzip-compressed file", DECOMPRESS),
    (b"\xfd7zXZ\0", 0, "an xz-compressed file", DECOMPRESS),
    (b"\x28\xb5\x2f\xfd", 0, "a zstd-compressed file", DECOMPRESS),
    (b"BZh", 0, "a bzip2-compressed file", DECOMPRESS),
    (b"\x04\x22\x4d\x18", 0, "an lz4-compressed file", DECOMPRESS),
    (b"\x89LZO\0", 0, "an lzop-compressed file", DECOMPRESS),
    (b"PK\x03\x04", 0, "a zip archive", DECOMPRESS),
    (b"7z\xbc\xaf\x27\x1c", 0, "a 7z archive", DECOMPRESS),
    (b"ustar", 257, "a tar archive", "unpack it first"),
    (b"HdrS", 0x202, "a compressed kernel image (vmlinuz)", "give the dump itself"),
    (b"QFI\xfb", 0, "a qcow2 disk image", "take a dump of the guest with 'virsh dump --memory-only'"),
];

/// Dumps of kinds that are not read.
const UNSUPPORTED: [(&[u8], &str, &str); 7] = [
    (b"DISKDUMP", "a dump of the diskdump format that came before kdump", DUMP_INSTEAD),
    (b"AVML", "a compressed memory image of AVML", "convert it with 'avml-convert --format lime'"),
    (b"QEVM", "a saved QEMU guest", "take a dump with 'dump-guest-memory' or 'virsh dump --memory-only'"),
    (b"LibvirtQemudSave", "a saved libvirt guest", "take a dump with 'virsh dump --memory-only'"),
    (b"LibvirtQemudPart", "an unfinished saved libvirt guest", "take a dump with 'virsh dump --memory-only'"),
    (b"PAGEDU64", "a Windows crash dump", "kstub reads dumps of Linux kernels"),
    (b"PAGEDUMP", "a Windows crash dump of 32 bits", "kstub reads dumps of Linux kernels"),
];

/// The first bytes, as many as there are.
fn start(source: &Source) -> Vec<u8> {
    let mut bytes = vec![0; 1024];
    let read = source.file.read_at(0, &mut bytes);
    bytes.truncate(read.filled);
    bytes
}

/// Whether the file is a flattened stream; what of, is for [`format`] to tell.
pub(super) fn is_flattened(source: &Source) -> bool {
    start(source).starts_with(flattened::SIGNATURE)
}

/// Tells what `source` is, or refuses it by name.
pub(super) fn format(source: &Source) -> Result<Format, Error> {
    let bytes = start(source);
    let has = |signature: &[u8], at: usize| bytes.get(at..).is_some_and(|rest| rest.starts_with(signature));
    if has(b"\x7fELF", 0) {
        return Ok(Format::Elf);
    }
    if has(kdump::SIGNATURE, 0) {
        return Ok(Format::Kdump);
    }
    if has(lime::SIGNATURE, 0) {
        return Ok(Format::Lime);
    }
    let path = || source.path.clone();
    for (signature, what, cure) in UNSUPPORTED {
        if has(signature, 0) {
            return Err(Error::Unsupported { path: path(), what: what.into(), cure });
        }
    }
    for (signature, at, looks_like, cure) in NOT_DUMPS {
        if has(signature, at) {
            return Err(Error::NotADump { path: path(), looks_like: looks_like.into(), cure });
        }
    }
    // Unreadable, or shorter than any signature: the read says which.
    source.read_exact(0, &mut [0; 8], "its signature")?;
    if bytes.iter().all(|&byte| byte == 0) {
        return Err(Error::Unsupported {
            path: path(),
            what: "a raw memory or disk image, or a dump whose start was never written".into(),
            cure: RAW,
        });
    }
    Err(Error::NotADump {
        path: path(),
        looks_like: "a file of a format unknown to kstub (a raw memory image?)".into(),
        cure: RAW,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::sync::Arc;

    fn probe(bytes: &[u8]) -> Result<Format, Error> {
        let mut bytes = bytes.to_vec();
        bytes.resize(1024, 0);
        format(&Source { path: "file".into(), file: Arc::new(bytes) })
    }

    #[test]
    fn tells_by_content() {
        assert_eq!(probe(b"\x7fELF").unwrap(), Format::Elf);
        assert_eq!(probe(b"KDUMP   ").unwrap(), Format::Kdump);
        assert!(matches!(probe(b"DISKDUMP"), Err(Error::Unsupported { .. })));
        let text = probe(b"\x1f\x8b\x08").unwrap_err().to_string();
        assert_eq!(text, "'file' is not a kernel dump but a gzip-compressed file; decompress it first");
        assert_eq!(probe(b"EMiL").unwrap(), Format::Lime);
        assert!(matches!(probe(b"AVML"), Err(Error::Unsupported { .. })));
        assert!(matches!(probe(b""), Err(Error::Unsupported { .. })));
        assert!(matches!(probe(b"hello"), Err(Error::NotADump { .. })));
        let short = Source { path: "file".into(), file: Arc::new(b"KDU".to_vec()) };
        assert!(matches!(format(&short), Err(Error::Truncated { .. })));
    }
}
