//! Which physical addresses are RAM or ROM, from the text of the monitor's `info mtree -f`.
//!
//! Knows the text only. The view is that of the address space "memory", aliases resolved: what a vCPU outside system
//! management mode sees. Source: QEMU `softmmu/memory.c` (since 9.0 `system/memory.c`), `mtree_print_flatview`.

use crate::addr::{PhysAddr, PhysRange};

/// A part of the physical address space whose bytes lie in one piece in one of QEMU's memory blocks.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Region {
    /// Where the guest sees it.
    pub(super) range: PhysRange,
    /// Whether a guest's writes do not change it.
    pub(super) rom: bool,
    /// The memory region: "pc.ram", or the id of a memory backend.
    pub(super) name: String,
    /// Where the part begins in the memory region.
    pub(super) offset: u64,
}

/// The RAM and ROM of the address space "memory", in the order of their addresses; `None` if there is no such space.
pub(super) fn regions(text: &str) -> Option<Vec<Region>> {
    let view = text
        .split("FlatView #")
        .find(|view| view.lines().any(|line| line.trim_start().starts_with("AS \"memory\",")))?;
    let mut regions: Vec<Region> = Vec::new();
    for region in view.lines().filter_map(region) {
        // QEMU's ranges are in order and apart. Others are not taken.
        if regions.last().is_none_or(|last| last.range.end <= region.range.start) {
            regions.push(region);
        }
    }
    Some(regions)
}

/// `  0000000000100000-000000001fffffff (prio 0, ram): pc.ram @0000000000100000 KVM`
fn region(line: &str) -> Option<Region> {
    let (addresses, rest) = line.trim().split_once(" (prio ")?;
    let (start, last) = addresses.split_once('-')?;
    let (start, last) = (hex(start)?, hex(last)?);
    let range = PhysRange { start: PhysAddr(start), end: PhysAddr(last.checked_add(1)?) };
    let (_, rest) = rest.split_once(", ")?;
    let (kind, name) = rest.split_once("): ")?;
    let rom = match kind.strip_prefix("nv-").unwrap_or(kind) {
        "ram" => false,
        // `romd`: a flash in the state in which it is read as memory.
        "rom" | "romd" => true,
        // `ramd` is a device's registers mapped through (VFIO): reading them may have effects.
        _ => return None,
    };
    let (name, offset) = name_and_offset(name);
    (!range.is_empty()).then(|| Region { range, rom, name: name.to_owned(), offset })
}

/// A name may have blanks and `@` in it; behind it come the offset, if it is not 0, and what accelerators hold it.
fn name_and_offset(text: &str) -> (&str, u64) {
    if let Some((name, rest)) = text.rsplit_once(" @")
        && let Some(offset) = rest.split(' ').next().filter(|digits| digits.len() == 16).and_then(hex)
    {
        return (name, offset);
    }
    (text.strip_suffix(" KVM").unwrap_or(text), 0)
}

fn hex(digits: &str) -> Option<u64> {
    u64::from_str_radix(digits, 16).ok()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// QEMU 7.2, q35, after the firmware has shadowed its ROMs; a pc-dimm above 4 GiB; a view of no RAM before it.
    const TEXT: &str = "\
FlatView #0\r
 AS \"I/O\", root: io\r
 Root memory region: io\r
  0000000000000000-0000000000000007 (prio 0, i/o): dma-chan\r
\r
FlatView #1\r
 AS \"cpu-smm-3\", root: memory\r
 Root memory region: memory\r
  0000000000000000-00000000000bffff (prio 0, ram): smm only\r
\r
FlatView #2\r
 AS \"memory\", root: system\r
 AS \"cpu-memory-0\", root: system\r
 Root memory region: system\r
  0000000000000000-00000000000c2fff (prio 0, ram): pc.ram\r
  00000000000c3000-00000000000e7fff (prio 0, rom): pc.ram @00000000000c3000\r
  0000000000100000-000000001fffffff (prio 0, ram): pc.ram @0000000000100000 KVM\r
  00000000b0000000-00000000bfffffff (prio 0, i/o): pcie-mmcfg-mmio\r
  00000000d0000000-00000000d0ffffff (prio 1, ramd): 0000:01:00.0 BAR 0 mmaps[0]\r
  00000000fd000000-00000000fdffffff (prio 1, ram): vga.vram\r
  00000000fec00000-00000000fec00fff (prio 0, i/o): ioapic\r
  00000000fffc0000-00000000ffffffff (prio 0, romd): system.flash0\r
  0000000100000000-000000010fffffff (prio 0, nv-ram): /objects/mf KVM\r
\r
FlatView #3\r
 AS \"mch\", root: bus master container\r
 Root memory region: (none)\r
  No rendered FlatView\r
";

    #[test]
    fn ram_and_rom_of_the_view_memory() {
        let region = |start, last: u64, rom, name: &str, offset| Region {
            range: PhysRange { start: PhysAddr(start), end: PhysAddr(last + 1) },
            rom,
            name: name.to_owned(),
            offset,
        };
        let expected = [
            region(0, 0xc_2fff, false, "pc.ram", 0),
            region(0xc_3000, 0xe_7fff, true, "pc.ram", 0xc_3000),
            region(0x10_0000, 0x1fff_ffff, false, "pc.ram", 0x10_0000),
            region(0xfd00_0000, 0xfdff_ffff, false, "vga.vram", 0),
            region(0xfffc_0000, 0xffff_ffff, true, "system.flash0", 0),
            region(0x1_0000_0000, 0x1_0fff_ffff, false, "/objects/mf", 0),
        ];
        assert_eq!(regions(TEXT).unwrap(), expected);
        assert_eq!(regions(&TEXT.replace("\r\n", "\n")).unwrap(), expected);
    }

    #[test]
    fn names_keep_blanks_and_signs() {
        assert_eq!(name_and_offset("a b @x"), ("a b @x", 0));
        assert_eq!(name_and_offset("/rom@etc/acpi/tables @0000000000000010"), ("/rom@etc/acpi/tables", 16));
        assert_eq!(name_and_offset("/rom@etc/acpi/tables"), ("/rom@etc/acpi/tables", 0));
    }

    #[test]
    fn any_damage_is_survived() {
        for cut in 0..TEXT.len() {
            let _ = regions(&TEXT[..cut]);
        }
        let mut bytes = TEXT.as_bytes().to_vec();
        for at in 0..bytes.len() {
            let kept = std::mem::replace(&mut bytes[at], b'-');
            let found = regions(std::str::from_utf8(&bytes).unwrap()).unwrap_or_default();
            assert!(found.windows(2).all(|two| two[0].range.end <= two[1].range.start));
            assert!(found.iter().all(|region| !region.range.is_empty()));
            bytes[at] = kept;
        }
        assert_eq!(regions(""), None);
        let whole =
            "FlatView #0\n AS \"memory\", root: x\n  0000000000000000-ffffffffffffffff (prio 0, ram): r\n";
        assert_eq!(regions(whole).unwrap(), []);
    }
}
