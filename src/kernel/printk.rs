//! The kernel log, read by the layout that VMCOREINFO describes: no symbols or types needed.
//!
//! Knows the lockless ring (since Linux commit 896fbe20b4e2 ("printk: use the lockless ringbuffer") (in v5.10))
//! and the record buffer before it (since v3.5). Source: `kernel/printk/printk_ringbuffer.{c,h}`,
//! `Documentation/admin-guide/kdump/vmcoreinfo.rst`.

use super::Kernel;
use crate::addr::VirtAddr;
use crate::bytes::{u16_at, u32_at, u64_at};
use crate::vmcoreinfo::VmcoreInfo;

/// `CONFIG_LOG_BUF_SHIFT` is at most 25 and `log_buf_len=` at most 2 GiB; what no log needs is not read.
const LOG_BYTES_MAX: u64 = 64 << 20;
/// Descriptors looked at: 2^20 records of 32 bytes fill 32 MiB.
const RECORDS_MAX: u64 = 1 << 20;

/// The log's structures are a few dozen bytes; a larger size or offset is damage.
const STRUCT_MAX: u64 = 4096;

/// One log record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Nanoseconds since boot.
    pub ts_nsec: u64,
    /// How grave it is: 0 (emergency) to 7 (debug).
    pub level: u8,
    /// Who said it, as syslog numbers them; 0 is the kernel.
    pub facility: u8,
    /// Where it was said; not told before about v5.1 and by kernels without CONFIG_PRINTK_CALLER before v5.10.
    pub caller: Option<Caller>,
    /// Its text, untrusted; may hold several lines.
    pub text: String,
}

/// The context that a message is from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Caller {
    /// A task, by pid.
    Task(u32),
    /// An interrupt or the like, by CPU.
    Cpu(u32),
}

impl Caller {
    fn of(id: u32) -> Self {
        // printk_caller_id()
        if id >> 31 == 1 { Self::Cpu(id & !(1 << 31)) } else { Self::Task(id) }
    }
}

/// The names of the levels, as `dmesg` has them.
pub const LEVELS: [&str; 8] = ["emerg", "alert", "crit", "err", "warn", "notice", "info", "debug"];

/// Bytes from `text_len` to `facility` in `struct printk_info`; flags (low five bits) and level follow.
const FACILITY: usize = 2;
/// The same in `struct printk_log`, which has `dict_len` between them.
const OLD_FACILITY: usize = 4;

/// What the kernel said when it failed; untrusted text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// A panic ends the kernel; after an oops it may have gone on.
    pub is_panic: bool,
    /// The line.
    pub text: String,
}

/// Why the log cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LogError {
    /// VMCOREINFO does not describe a log this reader knows.
    #[error("VMCOREINFO does not describe the kernel log ({0} is missing)")]
    NotDescribed(&'static str),
    /// Part of it is out of reach.
    #[error("the kernel log at {at} cannot be read ({what})")]
    Unreadable {
        /// Where.
        at: VirtAddr,
        /// What lies there.
        what: &'static str,
    },
}

impl Kernel {
    /// All records, oldest first. Damaged ones are left out.
    pub fn log(&self) -> Result<Vec<Record>, LogError> {
        let info = &self.found.vmcoreinfo;
        match info.symbol("prb") {
            Some(prb) => Ring { kernel: self, info }.records(prb),
            None => self.record_buffer(info),
        }
    }

    /// The last thing the kernel said of its own failure: its panic line, else its last oops.
    pub fn failure(&self) -> Option<Failure> {
        const PANIC: &str = "Kernel panic - not syncing";
        const OOPS: [&str; 5] =
            ["BUG: ", "Oops: ", "kernel BUG at ", "general protection fault", "Unable to handle kernel"];
        let log = self.log().ok()?;
        let lines = || log.iter().rev().flat_map(|record| record.text.lines());
        if let Some(line) = lines().find(|line| line.contains(PANIC)) {
            // "end Kernel panic" repeats the line in brackets.
            let text = line.get(line.find(PANIC)?..)?;
            let text = text.strip_suffix(" ]---").unwrap_or(text).trim().to_owned();
            return Some(Failure { is_panic: true, text });
        }
        let oops = lines().find(|line| OOPS.iter().any(|what| has_word(line, what)))?;
        Some(Failure { is_panic: false, text: oops.trim().to_owned() })
    }

    fn log_bytes(&self, at: VirtAddr, len: u64, what: &'static str) -> Result<Vec<u8>, LogError> {
        let unreadable = LogError::Unreadable { at, what };
        let len = usize::try_from(len.min(LOG_BYTES_MAX)).map_err(|_| unreadable.clone())?;
        let mut buf = vec![0; len];
        let filled = self.read(at, &mut buf).filled;
        buf.truncate(filled);
        // What is left of the buffer still holds records.
        if buf.is_empty() { Err(unreadable) } else { Ok(buf) }
    }

    /// `struct printk_log` records from `log_first_idx` to `log_next_idx`, wrapping where a length is zero.
    fn record_buffer(&self, info: &VmcoreInfo) -> Result<Vec<Record>, LogError> {
        let var = |name: &'static str| info.symbol(name).ok_or(LogError::NotDescribed(name));
        let field = |name: &'static str| {
            let offset = info.offset(name).filter(|&offset| offset < STRUCT_MAX);
            offset.map(|offset| offset as usize).ok_or(LogError::NotDescribed(name))
        };
        let word =
            |at: VirtAddr| self.read_u32(at).ok_or(LogError::Unreadable { at, what: "a log variable" });
        let pointer = var("log_buf")?;
        let buf = self.read_u64(pointer).ok_or(LogError::Unreadable { at: pointer, what: "log_buf" })?;
        let bytes = self.log_bytes(VirtAddr(buf), word(var("log_buf_len")?)?.into(), "the log buffer")?;
        let header = info
            .size("printk_log")
            .filter(|&size| size < STRUCT_MAX)
            .ok_or(LogError::NotDescribed("SIZE(printk_log)"))? as usize;
        let (ts, len, text_len) =
            (field("printk_log.ts_nsec")?, field("printk_log.len")?, field("printk_log.text_len")?);
        let next = word(var("log_next_idx")?)? as usize;
        let mut at = word(var("log_first_idx")?)? as usize;
        let mut records = Vec::new();
        let mut wrapped = false;
        while at != next {
            let (Some(size), Some(length), Some(ts_nsec)) =
                (u16_at(&bytes, at + len), u16_at(&bytes, at + text_len), u64_at(&bytes, at + ts))
            else {
                break;
            };
            if size == 0 {
                if wrapped {
                    break;
                }
                (at, wrapped) = (0, true);
                continue;
            }
            let record = bytes.get(at..at + usize::from(size)).unwrap_or_default();
            if let Some(text) = record.get(header..).and_then(|rest| rest.get(..usize::from(length))) {
                let byte = |i| bytes.get(at + text_len + i).copied().unwrap_or(0);
                let (facility, level) = (byte(OLD_FACILITY), byte(OLD_FACILITY + 1) >> 5);
                let text = String::from_utf8_lossy(text).into_owned();
                records.push(Record { ts_nsec, level, facility, caller: None, text });
            }
            at += usize::from(size);
        }
        Ok(records)
    }
}

/// The lockless ring: descriptors, their infos, and a ring of text blocks.
struct Ring<'a> {
    kernel: &'a Kernel,
    info: &'a VmcoreInfo,
}

impl Ring<'_> {
    fn offset(&self, name: &'static str) -> Result<u64, LogError> {
        self.info.offset(name).filter(|&offset| offset < STRUCT_MAX).ok_or(LogError::NotDescribed(name))
    }

    fn word(&self, at: VirtAddr, what: &'static str) -> Result<u64, LogError> {
        self.kernel.read_u64(at).ok_or(LogError::Unreadable { at, what })
    }

    fn records(&self, prb: VirtAddr) -> Result<Vec<Record>, LogError> {
        let ring = VirtAddr(self.word(prb, "prb")?);
        let descs_at = ring.wrapping_add(self.offset("printk_ringbuffer.desc_ring")?);
        let data_at = ring.wrapping_add(self.offset("printk_ringbuffer.text_data_ring")?);
        let in_descs = |name| Ok(descs_at.wrapping_add(self.offset(name)?));
        let in_data = |name| Ok(data_at.wrapping_add(self.offset(name)?));

        let count_bits = self.word(in_descs("prb_desc_ring.count_bits")?, "count_bits")? as u32;
        let size_bits = self.word(in_data("prb_data_ring.size_bits")?, "size_bits")? as u32;
        let too_large = |at, what| LogError::Unreadable { at, what };
        let count = 1u64.checked_shl(count_bits).filter(|&n| n <= RECORDS_MAX);
        let count = count.ok_or(too_large(descs_at, "more descriptors than any log has"))?;
        let size = 1u64.checked_shl(size_bits).filter(|&n| n <= LOG_BYTES_MAX);
        let size = size.ok_or(too_large(data_at, "more text than any log has"))?;

        let size_of = |name, key| {
            self.info.size(name).filter(|&size| size < STRUCT_MAX).ok_or(LogError::NotDescribed(key))
        };
        let desc_size = size_of("prb_desc", "SIZE(prb_desc)")?;
        let info_size = size_of("printk_info", "SIZE(printk_info)")?;
        let array = |at: VirtAddr, element: u64, what| {
            let start = VirtAddr(self.word(at, what)?);
            self.kernel.log_bytes(start, element.saturating_mul(count), what)
        };
        let descs = array(in_descs("prb_desc_ring.descs")?, desc_size, "log descriptors")?;
        let infos = array(in_descs("prb_desc_ring.infos")?, info_size, "log infos")?;
        let data = VirtAddr(self.word(in_data("prb_data_ring.data")?, "log text pointer")?);
        let data = self.kernel.log_bytes(data, size, "log text")?;

        let state = self.offset("prb_desc.state_var")? as usize;
        let lpos = self.offset("prb_desc.text_blk_lpos")?;
        let begin = (lpos + self.offset("prb_data_blk_lpos.begin")?) as usize;
        let next = (lpos + self.offset("prb_data_blk_lpos.next")?) as usize;
        let (ts, text_at) =
            (self.offset("printk_info.ts_nsec")? as usize, self.offset("printk_info.text_len")? as usize);
        let caller = self.offset("printk_info.caller_id").ok().map(|offset| offset as usize);

        let head = self.word(in_descs("prb_desc_ring.head_id")?, "head_id")?;
        let tail = self.word(in_descs("prb_desc_ring.tail_id")?, "tail_id")?;
        let ids = ID_MASK & head.wrapping_sub(tail);
        let mut records = Vec::new();
        // No two records share text, so all of it together is no longer than the ring.
        let mut text_left = data.len();
        for id in (0..=ids.min(count - 1)).map(|i| tail.wrapping_add(i) & ID_MASK) {
            let slot = id % count;
            let (desc, info) = ((slot * desc_size) as usize, (slot * info_size) as usize);
            let Some(state) = u64_at(&descs, desc + state) else { continue };
            // 1 committed, 2 finalized; 0 is being written and 3 is free to be reused.
            if state & ID_MASK != id || !matches!(state >> 62, 1 | 2) {
                continue;
            }
            let (Some(begin), Some(next)) = (u64_at(&descs, desc + begin), u64_at(&descs, desc + next))
            else {
                continue;
            };
            let (Some(ts_nsec), Some(text_len)) = (u64_at(&infos, info + ts), u16_at(&infos, info + text_at))
            else {
                continue;
            };
            let text = block(&data, size_bits, begin, next);
            if let Some(text) = text.and_then(|block| block.get(..block.len().min(text_len.into()))) {
                let Some(left) = text_left.checked_sub(text.len()) else { break };
                text_left = left;
                let byte = |i| infos.get(info + text_at + i).copied().unwrap_or(0);
                let (facility, level) = (byte(FACILITY), byte(FACILITY + 1) >> 5);
                let caller = caller.and_then(|caller| u32_at(&infos, info + caller)).map(Caller::of);
                let text = String::from_utf8_lossy(text).into_owned();
                records.push(Record { ts_nsec, level, facility, caller, text });
            }
        }
        Ok(records)
    }
}

/// The id part of a descriptor's state variable; the top two bits are the state.
const ID_MASK: u64 = u64::MAX >> 2;

/// The text between two logical positions of the data ring, behind the block's id word.
fn block(data: &[u8], size_bits: u32, begin: u64, next: u64) -> Option<&[u8]> {
    // EMPTY_LINE_LPOS: a record with no text on purpose. Other odd positions mark text that was lost.
    if (begin, next) == (3, 3) {
        return Some(&[]);
    }
    if begin & 1 == 1 || next & 1 == 1 || begin == next {
        return None;
    }
    let size = 1u64 << size_bits;
    let wraps = |lpos: u64| lpos >> size_bits;
    let end = next % size;
    let (start, end) = if wraps(begin) == wraps(next) {
        (begin % size, end)
    } else if end == 0 {
        (begin % size, size)
    } else {
        // A block that would not fit at the end starts over at the beginning of the ring.
        (0, end)
    };
    data.get((start + 8) as usize..end as usize)
}

/// Whether `what` stands in `line` at the start of a word: "DEBUG: " is no "BUG: ".
fn has_word(line: &str, what: &str) -> bool {
    line.match_indices(what).any(|(at, _)| !line[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_wrap_as_a_whole() {
        let data: Vec<u8> = (0..64).collect();
        assert_eq!(block(&data, 6, 0, 16), Some(&data[8..16]));
        assert_eq!(block(&data, 6, 48, 64), Some(&data[56..64]), "ends exactly at the ring's end");
        assert_eq!(block(&data, 6, 48, 64 + 24), Some(&data[8..24]), "wrapped to the start");
        assert_eq!(block(&data, 6, 1, 1), None, "lost");
        assert_eq!(block(&data, 6, 3, 3), Some(&[][..]), "an empty line");
        assert_eq!(block(&data, 6, 60, 60), None);
        assert_eq!(block(&data, 6, 8, 12), None, "shorter than its id");
    }

    #[test]
    fn an_oops_is_a_word() {
        assert!(has_word("BUG: kernel NULL pointer dereference", "BUG: "));
        assert!(has_word("watchdog: BUG: soft lockup", "BUG: "));
        assert!(!has_word("mydrv: DEBUG: probe ok", "BUG: "));
    }
}
