//! VMCOREINFO: the `KEY=VALUE` text in which a kernel describes itself to dump tools.
//!
//! Knows the text's syntax and the three number formats in it; gives no meaning to any address. Unknown keys are kept.
//! Source: `Documentation/admin-guide/kdump/vmcoreinfo.rst`, `include/linux/crash_core.h` (later `vmcore_info.h`).

use crate::addr::VirtAddr;
use std::collections::HashMap;

/// A parsed VMCOREINFO text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VmcoreInfo {
    values: HashMap<String, String>,
}

impl VmcoreInfo {
    /// Parses the text up to its first NUL. Lines that are not `KEY=VALUE` are dropped; the first of two equal keys counts.
    pub fn parse(text: &[u8]) -> Self {
        let text = text.split(|&b| b == 0).next().unwrap_or_default();
        let mut values = HashMap::new();
        for line in String::from_utf8_lossy(text).lines() {
            if let Some((key, value)) = line.split_once('=') {
                values.entry(key.trim().to_owned()).or_insert_with(|| value.trim().to_owned());
            }
        }
        Self { values }
    }

    /// The value of `key` as written.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.values.get(key).map(String::as_str)
    }

    /// `SYMBOL(name)`: a run-time virtual address, hexadecimal.
    pub fn symbol(&self, name: &str) -> Option<VirtAddr> {
        self.hex(&format!("SYMBOL({name})")).map(VirtAddr)
    }

    /// `NUMBER(name)`: decimal and signed, as `VMCOREINFO_NUMBER` prints it, or hexadecimal with `0x`.
    /// Negative values come back in two's complement, as the kernel's `unsigned long` had them.
    pub fn number(&self, name: &str) -> Option<u64> {
        let text = self.get(&format!("NUMBER({name})"))?;
        match text.strip_prefix("0x") {
            Some(hex) => u64::from_str_radix(hex, 16).ok(),
            None => text.parse::<u64>().ok().or_else(|| text.parse::<i64>().ok().map(|n| n as u64)),
        }
    }

    /// `OFFSET(structure.member)` in bytes.
    pub fn offset(&self, member: &str) -> Option<u64> {
        self.get(&format!("OFFSET({member})"))?.parse().ok()
    }

    /// `SIZE(structure)` in bytes.
    pub fn size(&self, structure: &str) -> Option<u64> {
        self.get(&format!("SIZE({structure})"))?.parse().ok()
    }

    /// `OSRELEASE`: what `uname -r` prints.
    pub fn release(&self) -> Option<&str> {
        self.get("OSRELEASE")
            .filter(|release| !release.is_empty() && release.bytes().all(|b| b.is_ascii_graphic()))
    }

    /// `BUILD-ID` as lower-case hex. Since Linux commit 0935288c6e00 ("kdump: append kernel build-id
    /// string to VMCOREINFO") (in v5.9).
    pub fn build_id(&self) -> Option<String> {
        let id = self.get("BUILD-ID")?;
        let hex = !id.is_empty() && id.bytes().all(|b| b.is_ascii_hexdigit());
        hex.then(|| id.to_ascii_lowercase())
    }

    /// `KERNELOFFSET`: the KASLR slide of the kernel image in bytes.
    pub fn kernel_offset(&self) -> Option<u64> {
        self.hex("KERNELOFFSET")
    }

    fn hex(&self, key: &str) -> Option<u64> {
        let text = self.get(key)?;
        u64::from_str_radix(text.strip_prefix("0x").unwrap_or(text), 16).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_number_format() {
        let info = VmcoreInfo::parse(
            b"OSRELEASE=6.1.0-9-cloud-amd64\nBUILD-ID=AB12\nSYMBOL(_stext)=ffffffff9a000000\n\
              NUMBER(phys_base)=-201326592\nNUMBER(x)=0x10\nOFFSET(list_head.next)=8\nKERNELOFFSET=19000000\n\
              junk\nOSRELEASE=second\0\nAFTER=1",
        );
        assert_eq!(info.release(), Some("6.1.0-9-cloud-amd64"));
        assert_eq!(info.build_id().as_deref(), Some("ab12"));
        assert_eq!(info.symbol("_stext"), Some(VirtAddr(0xffff_ffff_9a00_0000)));
        assert_eq!(info.number("phys_base"), Some((-201_326_592i64) as u64));
        assert_eq!(info.number("x"), Some(16));
        assert_eq!(info.offset("list_head.next"), Some(8));
        assert_eq!(info.kernel_offset(), Some(0x1900_0000));
        assert_eq!(info.get("AFTER"), None);
    }

    #[test]
    fn hostile_text_is_only_text() {
        assert_eq!(VmcoreInfo::parse(b"\xff\xfe=\nKERNELOFFSET=zz\n=\n").kernel_offset(), None);
        assert_eq!(VmcoreInfo::parse(b"BUILD-ID=../../etc").build_id(), None);
        assert_eq!(VmcoreInfo::parse(b"").release(), None);
    }
}
