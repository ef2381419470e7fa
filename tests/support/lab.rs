//! Finds the dumps of real machines that `scripts/lab` makes, and reads what is known of them without kstub.

use serde_json::Value;
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// One directory with a `set.json`.
pub struct Set {
    pub dir: PathBuf,
    pub json: Value,
}

/// One dump file of a set.
#[derive(Clone, Debug)]
pub struct DumpFile {
    pub name: String,
    pub path: PathBuf,
    /// `elf` or `kdump`, whether or not it is flattened.
    pub format: String,
    pub compression: Option<String>,
    pub flattened: bool,
    pub filter_level: Option<u64>,
    pub maker: String,
    /// Made with QEMU's `paging=true`: holds only what some page table maps.
    pub paging: bool,
    pub has_vmcoreinfo: bool,
    pub complete: bool,
    /// The files of the split set that this one is a part of.
    pub split: Vec<PathBuf>,
}

/// Whether lab tests run: `KSTUB_LAB_TESTS` 1 = they must, 0 = they must not, unset = if there is a lab; in CI
/// (`CI=true`) unset is as good as 1.
pub fn wanted(lab_tests: Option<&str>, ci: Option<&str>) -> Option<bool> {
    match lab_tests {
        Some("1") => Some(true),
        Some("0") => Some(false),
        Some("") | None => (ci == Some("true")).then_some(true),
        Some(other) => panic!("KSTUB_LAB_TESTS is {other:?}; it can be 0, 1 or unset"),
    }
}

pub fn root() -> PathBuf {
    match std::env::var_os("KSTUB_LAB") {
        Some(dir) => dir.into(),
        None => PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cache/kstub-lab"),
    }
}

/// The kind of set that has ten thousand tasks and none of what the other guests plant.
const CROWD: &str = "qemu-tasks";

/// Every set of the lab but crowds, by name; `None` if lab tests are to be skipped, which is then said.
pub fn sets() -> Option<Vec<Set>> {
    every_set().map(|sets| sets.into_iter().filter(|set| set.json["kind"] != CROWD).collect())
}

/// The set with ten thousand tasks, if the lab has one (`scripts/lab full`).
pub fn crowd() -> Option<Set> {
    let crowd = every_set()?.into_iter().find(|set| set.json["kind"] == CROWD);
    if crowd.is_none() {
        eprintln!("skipped: no set with many tasks; make it with scripts/lab set qemu-tasks-6.12");
    }
    crowd
}

fn every_set() -> Option<Vec<Set>> {
    let skip = |why: String| {
        eprintln!("skipped: {why}");
        None
    };
    let variable = |name| std::env::var(name).ok();
    let must = match wanted(variable("KSTUB_LAB_TESTS").as_deref(), variable("CI").as_deref()) {
        Some(false) => return skip("KSTUB_LAB_TESTS=0".into()),
        Some(true) => true,
        None => false,
    };
    let dir = root().join("sets");
    let mut sets: Vec<Set> = std::fs::read_dir(&dir)
        .into_iter()
        .flatten()
        .filter_map(|entry| {
            let dir = entry.ok()?.path();
            // A name that starts with a dot is a set under construction.
            if dir.file_name()?.to_string_lossy().starts_with('.') {
                return None;
            }
            let text = std::fs::read_to_string(dir.join("set.json")).ok()?;
            let json = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
            Some(Set { dir, json })
        })
        .collect();
    sets.sort_by_key(|set| set.dir.clone());
    if sets.is_empty() {
        assert!(!must, "no lab in {}; make it with scripts/lab ci", dir.display());
        return skip(format!("no lab in {}; make it with scripts/lab ci", dir.display()));
    }
    Some(sets)
}

impl Set {
    pub fn name(&self) -> String {
        self.dir.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    pub fn dumps(&self) -> Vec<DumpFile> {
        let text = |v: &Value| v.as_str().map(str::to_owned);
        let all = self.json["dumps"].as_array().unwrap_or_else(|| panic!("{}: no dumps", self.name()));
        all.iter()
            .map(|dump| {
                let name = text(&dump["file"]).expect("file");
                DumpFile {
                    path: self.dir.join(&name),
                    format: text(&dump["format"]).expect("format"),
                    compression: text(&dump["compression"]),
                    flattened: dump["flattened"].as_bool().unwrap_or(false),
                    filter_level: dump["filter_level"].as_u64(),
                    maker: text(&dump["maker"]).unwrap_or_default(),
                    paging: dump["paging"].as_bool().unwrap_or(false),
                    has_vmcoreinfo: dump["vmcoreinfo"].as_bool().unwrap_or(false),
                    complete: dump["complete"].as_bool().unwrap_or(true),
                    split: dump["split"]
                        .as_array()
                        .into_iter()
                        .flatten()
                        .filter_map(|part| Some(self.dir.join(part.as_str()?)))
                        .collect(),
                    name,
                }
            })
            .collect()
    }

    fn truth_file(&self, key: &str) -> Option<PathBuf> {
        Some(self.dir.join(self.json["truth"][key].as_str()?))
    }

    /// The registers that QEMU printed at the moment of the dump.
    pub fn registers(&self) -> Option<Vec<BTreeMap<String, u64>>> {
        let text = std::fs::read_to_string(self.truth_file("registers")?).expect("registers");
        Some(parse_info_registers(&text))
    }

    /// A `key=value` file below the facts that the guest wrote about itself.
    pub fn planted(&self, name: &str) -> Option<BTreeMap<String, String>> {
        let path = self.truth_file("facts")?.join("planted").join(name);
        let text = std::fs::read_to_string(path).ok()?;
        Some(text.lines().filter_map(|l| l.split_once('=')).map(|(k, v)| (k.into(), v.into())).collect())
    }

    /// What memory held, from files that need no parser of kstub's.
    pub fn truth(&self) -> Truth {
        let mut truth = Truth::default();
        // QEMU's own RAM files, byte for byte; then raw ELF files for what those lack (the BIOS).
        for ram in self.json["truth"]["ram"].as_array().into_iter().flatten() {
            let start = ram["start"].as_str().and_then(|s| s.strip_prefix("0x")).expect("start of RAM");
            let start = u64::from_str_radix(start, 16).expect("start of RAM");
            let path = self.dir.join(ram["file"].as_str().expect("RAM file"));
            truth.add(start, ram["size"].as_u64().expect("size of RAM"), 0, &path);
        }
        for name in ["vmcore", "dump.elf"] {
            let path = self.dir.join(name);
            if path.exists() {
                for (paddr, len, offset) in load_segments(&path) {
                    truth.add(paddr, len, offset, &path);
                }
            }
        }
        assert!(!truth.pieces.is_empty(), "{}: neither RAM files nor a raw core", self.name());
        truth.pieces.sort_by_key(|piece| piece.start);
        truth
    }
}

/// Physical memory, as pieces of raw files that do not overlap.
#[derive(Default)]
pub struct Truth {
    pub pieces: Vec<Piece>,
}

pub struct Piece {
    pub start: u64,
    pub len: u64,
    offset: u64,
    file: File,
}

impl Piece {
    pub fn end(&self) -> u64 {
        self.start + self.len
    }

    /// Fills `buf` from `at`, which must lie inside.
    pub fn read(&self, at: u64, buf: &mut [u8]) {
        assert!(self.start <= at && at + buf.len() as u64 <= self.end());
        self.file.read_exact_at(buf, self.offset + (at - self.start)).expect("raw file");
    }
}

impl Truth {
    /// Adds what of `start..start+len` no piece covers yet.
    fn add(&mut self, start: u64, len: u64, offset: u64, path: &Path) {
        let mut gaps = vec![(start, start + len)];
        for piece in &self.pieces {
            gaps = gaps
                .into_iter()
                .flat_map(|(from, to)| [(from, to.min(piece.start)), (from.max(piece.end()), to)])
                .filter(|(from, to)| from < to)
                .collect();
        }
        for (from, to) in gaps {
            let file = File::open(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            self.pieces.push(Piece { start: from, len: to - from, offset: offset + (from - start), file });
        }
    }

    pub fn contains(&self, at: u64) -> bool {
        self.pieces.iter().any(|piece| (piece.start..piece.end()).contains(&at))
    }
}

/// `PT_LOAD` headers of a raw ELF64 core: (p_paddr, p_filesz, p_offset).
fn load_segments(path: &Path) -> Vec<(u64, u64, u64)> {
    load_headers(path).into_iter().map(|[offset, _, paddr, filesz]| (paddr, filesz, offset)).collect()
}

/// `PT_LOAD` headers of a raw ELF64 core: p_offset, p_vaddr, p_paddr, p_filesz.
pub fn load_headers(path: &Path) -> Vec<[u64; 4]> {
    let file = File::open(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let bytes = |at: u64, len: usize| {
        let mut buf = vec![0; len];
        file.read_exact_at(&mut buf, at).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        buf
    };
    let word = |at: u64| u64::from_le_bytes(bytes(at, 8).try_into().expect("8 bytes"));
    assert_eq!(bytes(0, 6), b"\x7fELF\x02\x01", "{}", path.display());
    let (phoff, phentsize) = (word(32), u64::from(bytes(54, 1)[0]));
    let count = u16::from_le_bytes(bytes(56, 2).try_into().expect("2 bytes"));
    assert_ne!(count, 0xffff, "{}: too many segments for this reader", path.display());
    (0..u64::from(count))
        .map(|i| phoff + i * phentsize)
        .filter(|&at| bytes(at, 4) == [1, 0, 0, 0])
        .map(|at| [8, 16, 24, 32].map(|field| word(at + field)))
        .collect()
}

/// QEMU's `info registers -a`, one map for each CPU, by gdb's names. Selectors and bases of segments are
/// `cs`, `gs_base` and so on.
pub fn parse_info_registers(text: &str) -> Vec<BTreeMap<String, u64>> {
    let mut cpus: Vec<BTreeMap<String, u64>> = Vec::new();
    for line in text.lines() {
        if line.starts_with("CPU#") {
            cpus.push(BTreeMap::new());
            continue;
        }
        let Some(cpu) = cpus.last_mut() else { continue };
        let hex = |s: &str| u64::from_str_radix(s, 16).ok();
        // Segments: `CS =0010 0000000000000000 ffffffff 00af9b00 …`.
        if let Some((name, rest)) = line.split_once('=')
            && let name = name.trim().to_lowercase()
            && ["es", "cs", "ss", "ds", "fs", "gs"].contains(&name.as_str())
        {
            let mut words = rest.split_whitespace();
            if let (Some(selector), Some(base)) = (words.next().and_then(hex), words.next().and_then(hex)) {
                cpu.insert(name.clone(), selector);
                cpu.insert(format!("{name}_base"), base);
            }
            continue;
        }
        // Everything else of interest: `NAME=hex`, with blanks before the sign for R8 and R9.
        for field in line.replace(" =", "=").split_whitespace() {
            let Some((name, value)) = field.split_once('=') else { continue };
            let name = match name {
                "RFL" => "eflags".to_owned(),
                _ => name.to_lowercase(),
            };
            let general =
                name.starts_with('r') || name.starts_with("cr") || name == "eflags" || name == "efer";
            if let (true, Some(value)) = (general, hex(value)) {
                cpu.insert(name, value);
            }
        }
    }
    cpus
}
