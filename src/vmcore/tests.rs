//! Opening whole files.

#![allow(clippy::unwrap_used)]

use super::*;

/// An ELF core with 4 KiB at physical address 1 MiB, each byte 0x5a.
fn core() -> Vec<u8> {
    let mut bytes = b"\x7fELF\x02\x01\x01".to_vec();
    bytes.resize(64 + 56, 0);
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(16, &4u16.to_le_bytes());
    put(18, &62u16.to_le_bytes());
    put(32, &64u64.to_le_bytes());
    put(54, &56u16.to_le_bytes());
    put(56, &1u16.to_le_bytes());
    put(64, &1u32.to_le_bytes());
    for (at, value) in [(72, 0x1000u64), (88, 0x10_0000), (96, 0x1000), (104, 0x1000)] {
        put(at, &value.to_le_bytes());
    }
    bytes.resize(0x1000, 0);
    bytes.resize(0x2000, 0x5a);
    bytes
}

fn flattened(file: &[u8]) -> Vec<u8> {
    let mut bytes = flattened::SIGNATURE.to_vec();
    bytes.extend([1i64.to_be_bytes(), 1i64.to_be_bytes()].concat());
    bytes.resize(4096, 0);
    // As writers do: pages first, headers last.
    for (i, piece) in file.chunks(700).enumerate().collect::<Vec<_>>().into_iter().rev() {
        bytes.extend((i as i64 * 700).to_be_bytes());
        bytes.extend((piece.len() as i64).to_be_bytes());
        bytes.extend(piece);
    }
    bytes.extend([0xff; 16]);
    bytes
}

fn open(bytes: Vec<u8>) -> Result<Vmcore, Error> {
    Vmcore::from_file(Path::new("dump"), Arc::new(bytes), 1 << 20)
}

fn fact(vmcore: &Vmcore, name: &str) -> String {
    vmcore.facts().iter().find(|(n, _)| *n == name).map(|(_, value)| value.clone()).unwrap_or_default()
}

#[test]
fn a_flattened_file_is_the_file_it_describes() {
    for (bytes, records) in [(core(), "no"), (flattened(&core()), "yes (12 records)")] {
        let vmcore = open(bytes).unwrap();
        assert_eq!((fact(&vmcore, "format"), fact(&vmcore, "flattened")), ("elf".into(), records.into()));
        assert_eq!((fact(&vmcore, "complete"), vmcore.problems().len()), ("yes".into(), 0));
        assert_eq!(fact(&vmcore, "ram"), "4096 bytes in 1 range");
        let mut page = [0; 4096];
        for len in [4096, 8] {
            assert!(vmcore.read_phys_exact(PhysAddr(0x10_0000), &mut page[..len]).is_ok());
            assert!(page[..len].iter().all(|&byte| byte == 0x5a));
        }
        assert!(vmcore.read_phys_exact(PhysAddr(0x10_0ffc), &mut page[..8]).is_err());
    }
}

#[test]
fn a_cut_flattened_file_says_so() {
    let whole = flattened(&core());
    let vmcore = open(whole[..whole.len() - 8].to_vec()).unwrap();
    assert_eq!(fact(&vmcore, "complete"), "no");
    assert!(vmcore.problems()[0].contains("end mark"), "{:?}", vmcore.problems());
    // The last record has the headers, 120 bytes of its 700.
    let headers = whole.len() - 16 - 700 + 120;
    for len in (0..whole.len()).step_by(13) {
        assert_eq!(open(whole[..len].to_vec()).is_ok(), len >= headers, "{len}");
    }
}

#[test]
fn flattened_nonsense_is_refused_by_what_is_inside() {
    let error = open(flattened(b"\x1f\x8b and so on")).err().unwrap();
    assert!(matches!(error, Error::NotADump { .. }), "{error}");
    let mut other_version = flattened(&core());
    other_version[31] = 2;
    assert!(matches!(open(other_version), Err(Error::Unsupported { .. })));
}

#[test]
fn open_names_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vmcore");
    std::fs::write(&path, core()).unwrap();
    assert_eq!(Vmcore::open(&path).unwrap().path(), path);
    std::fs::write(&path, b"\x89LZO\0").unwrap();
    let text = Vmcore::open(&path).err().unwrap().to_string();
    assert!(text.contains("vmcore' is not a kernel dump but an lzop-compressed file"), "{text}");
}
