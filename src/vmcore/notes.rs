//! ELF notes: who wrote what about CPUs and the kernel, still as raw bytes.
//!
//! Knows the container and the three notes that matter; what the registers in them mean is the business
//! of `backend`. Source: gABI "Note Section"; kernel `include/uapi/linux/elf.h`, `kernel/crash_core.c`;
//! QEMU `target/i386/arch_dump.c`.

use crate::bytes::{array_at, u32_at};

const HEADER: usize = 12;
const NT_PRSTATUS: u32 = 1;
const NT_AUXV: u32 = 6;
const NT_FILE: u32 = 0x4649_4c45;
/// `sizeof(struct elf_prstatus)` on x86-64 (`include/linux/elfcore.h`).
pub const PRSTATUS_SIZE: usize = 336;
/// Linux runs on at most 8192 CPUs (`NR_CPUS`); notes for more are damage.
const MAX_CPUS: usize = 1 << 16;
/// So many problems say enough of damaged notes.
const MAX_PROBLEMS: usize = 16;

/// One note.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Note<'a> {
    /// The name without its NUL.
    pub name: &'a [u8],
    /// `n_type`: means something only with the name.
    pub kind: u32,
    /// The descriptor.
    pub desc: &'a [u8],
}

/// The notes in a byte string; `Err` with the offset of a note that is cut, as the last item.
pub struct NoteIter<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> NoteIter<'a> {
    /// Notes from the start of `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    fn parse(&self, at: usize) -> Option<(Note<'a>, usize)> {
        let name_len = usize::try_from(u32_at(self.bytes, at)?).ok()?;
        let desc_len = usize::try_from(u32_at(self.bytes, at.checked_add(4)?)?).ok()?;
        let kind = u32_at(self.bytes, at.checked_add(8)?)?;
        let name_at = at.checked_add(HEADER)?;
        let desc_at = name_at.checked_add(name_len.checked_next_multiple_of(4)?)?;
        let desc_end = desc_at.checked_add(desc_len)?;
        let name = self.bytes.get(name_at..name_at.checked_add(name_len)?)?;
        let name = name.split(|&b| b == 0).next().unwrap_or(name);
        let desc = self.bytes.get(desc_at..desc_end)?;
        // The padding after the last descriptor may be missing.
        Some((Note { name, kind, desc }, desc_end.checked_next_multiple_of(4)?))
    }
}

impl<'a> Iterator for NoteIter<'a> {
    type Item = Result<Note<'a>, usize>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let at = self.at;
            if at >= self.bytes.len() {
                return None;
            }
            // An all-zero header ends the notes of one CPU (`final_note` in kernel/crash_core.c) or is
            // padding.
            if array_at(self.bytes, at) == Some([0u8; HEADER]) {
                self.at = at.saturating_add(HEADER);
                continue;
            }
            let padding =
                self.bytes.get(at..).is_some_and(|rest| rest.len() < HEADER && rest.iter().all(|&b| b == 0));
            if padding {
                return None;
            }
            return Some(match self.parse(at) {
                Some((note, next)) => {
                    self.at = next;
                    Ok(note)
                }
                None => {
                    self.at = usize::MAX;
                    Err(at)
                }
            });
        }
    }
}

/// The notes of a dump that matter, in file order.
#[derive(Clone, Debug, Default)]
pub struct Notes {
    /// Descriptors of `CORE`/`NT_PRSTATUS`, each of at least [`PRSTATUS_SIZE`] bytes.
    pub prstatus: Vec<Vec<u8>>,
    /// Descriptors of QEMU's `QEMUCPUState`.
    pub qemu: Vec<Vec<u8>>,
    /// The text of `VMCOREINFO`.
    pub vmcoreinfo: Option<Vec<u8>>,
    /// Whether there is a note that only the core file of a process has.
    pub of_a_process: bool,
    /// What is wrong with the notes, as sentences.
    pub problems: Vec<String>,
}

impl Notes {
    /// Adds the notes in `bytes`, which lie at `offset` in the file.
    pub fn add(&mut self, bytes: &[u8], offset: u64) {
        for note in NoteIter::new(bytes) {
            let note = match note {
                Ok(note) => note,
                Err(at) => {
                    let at = offset.saturating_add(at as u64);
                    self.problems.push(format!(
                        "the ELF notes are cut or damaged at offset {at:#x}: registers or VMCOREINFO may \
                         be missing; copy or take the dump again"
                    ));
                    return;
                }
            };
            match (note.name, note.kind) {
                (b"CORE", NT_PRSTATUS) if note.desc.len() >= PRSTATUS_SIZE => {
                    let room = MAX_CPUS.saturating_sub(self.prstatus.len());
                    self.prstatus.extend(Some(note.desc.to_vec()).filter(|_| room > 0));
                }
                (b"CORE", NT_PRSTATUS) if self.problems.len() >= MAX_PROBLEMS => {}
                (b"CORE", NT_PRSTATUS) => self.problems.push(format!(
                    "an NT_PRSTATUS note has {} bytes instead of {PRSTATUS_SIZE} (not written by an \
                     x86-64 kernel?): the registers of that CPU are left out",
                    note.desc.len()
                )),
                (b"CORE", NT_AUXV | NT_FILE) => self.of_a_process = true,
                (b"QEMU", 0) if self.qemu.len() < MAX_CPUS => self.qemu.push(note.desc.to_vec()),
                // The first one is the kernel's; makedumpfile can add that of a hypervisor's under another
                // name.
                (b"VMCOREINFO", _) if self.vmcoreinfo.is_none() => {
                    self.vmcoreinfo = Some(without_padding(note.desc));
                }
                _ => {}
            }
        }
    }
}

/// `text` without the NULs after it.
pub(super) fn without_padding(text: &[u8]) -> Vec<u8> {
    let len = text.iter().rposition(|&b| b != 0).map_or(0, |last| last + 1);
    text.get(..len).unwrap_or(text).to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn note(name: &str, kind: u32, desc: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend((name.len() as u32 + 1).to_le_bytes());
        bytes.extend((desc.len() as u32).to_le_bytes());
        bytes.extend(kind.to_le_bytes());
        for part in [format!("{name}\0").as_bytes(), desc] {
            bytes.extend(part);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
        }
        bytes
    }

    #[test]
    fn order_padding_and_unknown_notes() {
        let bytes = [
            note("CORE", 1, &[1; 336]),
            vec![0; 12],
            note("LINUX", 7, b"odd"),
            note("CORE", 1, &[2; 340]),
            note("VMCOREINFO", 0, b"OSRELEASE=6.1\nX=1\0\0"),
            note("VMCOREINFO", 0, b"second"),
            note("QEMU", 0, &[3; 440]),
            vec![0; 5],
        ]
        .concat();
        let mut notes = Notes::default();
        notes.add(&bytes, 0);
        assert_eq!(notes.prstatus.iter().map(|d| d[0]).collect::<Vec<_>>(), [1, 2]);
        assert_eq!(notes.qemu.len(), 1);
        assert_eq!(notes.vmcoreinfo.as_deref(), Some(&b"OSRELEASE=6.1\nX=1"[..]));
        assert!(notes.problems.is_empty() && !notes.of_a_process, "{:?}", notes.problems);
    }

    #[test]
    fn every_cut_is_reported_and_what_came_before_is_kept() {
        let first = note("CORE", 1, &[1; 336]);
        let bytes = [first.clone(), note("CORE", 1, &[2; 336])].concat();
        for len in 0..bytes.len() {
            let mut notes = Notes::default();
            notes.add(&bytes[..len], 0x1000);
            assert_eq!(notes.prstatus.len(), usize::from(len >= first.len()), "{len}");
            let whole = len == 0 || len == first.len();
            assert_eq!(notes.problems.is_empty(), whole, "{len}: {:?}", notes.problems);
        }
    }

    #[test]
    fn hostile_lengths_end_the_walk() {
        for (name, desc) in [(u32::MAX, 0), (0, u32::MAX), (u32::MAX, u32::MAX), (5, u32::MAX - 3)] {
            let mut bytes = Vec::new();
            bytes.extend(name.to_le_bytes());
            bytes.extend(desc.to_le_bytes());
            bytes.extend([1; 64]);
            assert_eq!(NoteIter::new(&bytes).collect::<Vec<_>>(), [Err(0)]);
        }
        let mut notes = Notes::default();
        notes.add(&note("CORE", 1, &[1; 144]), 0);
        assert!(notes.prstatus.is_empty() && notes.problems[0].contains("144"));
    }
}
