//! Which registers QEMU's stub has, from its target description.
//!
//! Versions of QEMU differ in the registers and their order; numbers and widths are read from the XML and never
//! assumed. Knows elements `reg` and `xi:include` and no other XML. Source: GDB manual, "Target Description Format".

use crate::arch::x86_64::{Reg, RegisterFile, Saved};

/// Bounds for a hostile description: QEMU's own has some hundred registers at most.
const MOST_REGISTERS: usize = 4096;
const MOST_BITS: usize = 1 << 14;

/// The registers by their numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Description {
    /// Name and width in bytes; a number that is left out has no name.
    registers: Vec<(String, usize)>,
}

impl Description {
    /// Reads the whole of a description, its included parts asked for by name.
    pub(super) fn read<E>(mut fetch: impl FnMut(&str) -> Result<Vec<u8>, E>) -> Result<Self, E> {
        let mut this = Self::default();
        // Includes nest nowhere in QEMU; two levels are harmless.
        let mut budget = 32;
        this.add("target.xml", 2, &mut budget, &mut fetch)?;
        Ok(this)
    }

    fn add<E>(
        &mut self,
        annex: &str,
        depth: u32,
        budget: &mut u32,
        fetch: &mut impl FnMut(&str) -> Result<Vec<u8>, E>,
    ) -> Result<(), E> {
        if *budget == 0 {
            return Ok(());
        }
        *budget -= 1;
        let text = fetch(annex)?;
        let text = without_comments(&String::from_utf8_lossy(&text));
        for tag in text.split('<').skip(1).filter_map(|rest| rest.split('>').next()) {
            if tag.starts_with("reg ") {
                self.add_register(tag);
            } else if tag.starts_with("xi:include ")
                && depth > 0
                && let Some(annex) = attribute(tag, "href")
            {
                self.add(annex, depth - 1, budget, fetch)?;
            }
        }
        Ok(())
    }

    /// One without a number follows the last.
    fn add_register(&mut self, tag: &str) {
        let bits = attribute(tag, "bitsize").and_then(|bits| bits.parse::<usize>().ok());
        let (Some(name), Some(bits)) = (attribute(tag, "name"), bits) else { return };
        let number = attribute(tag, "regnum").and_then(|number| number.parse().ok());
        let number = number.unwrap_or(self.registers.len());
        if number >= MOST_REGISTERS || bits > MOST_BITS {
            return;
        }
        if number >= self.registers.len() {
            self.registers.resize(number + 1, Default::default());
        }
        if let Some(register) = self.registers.get_mut(number) {
            *register = (name.to_owned(), bits.div_ceil(8));
        }
    }

    /// Whether it describes x86-64.
    pub(super) fn is_x86_64(&self) -> bool {
        self.find("rip").is_some() && self.find("r15").is_some()
    }

    /// Number and width in bytes of the register with this name.
    pub(super) fn find(&self, name: &str) -> Option<(usize, usize)> {
        let number = self.registers.iter().position(|(known, _)| known == name)?;
        Some((number, self.registers.get(number)?.1))
    }

    /// Where the register's bytes lie in the answer to `g`.
    pub(super) fn offset(&self, number: usize) -> usize {
        self.registers.iter().take(number).map(|(_, bytes)| bytes).sum()
    }

    /// The registers in the bytes that `g` answered, which may end before the last; `x` digits are `None`.
    pub(super) fn decode(&self, bytes: &[Option<u8>]) -> RegisterFile {
        let mut regs = RegisterFile::default();
        let mut rest = bytes;
        for (name, width) in &self.registers {
            let Some((value, after)) = rest.split_at_checked(*width) else { break };
            rest = after;
            let reg = Reg::ALL.into_iter().find(|reg| reg.name() == name);
            // QEMU has zeros there, whatever the guest's are.
            let invented =
                matches!(reg, Some(Reg::Ftag | Reg::Fiseg | Reg::Fioff | Reg::Foseg | Reg::Fooff | Reg::Fop));
            if let (Some(reg), false) = (reg, invented)
                && let Some(value) = little_endian(value)
            {
                regs.set(reg, Saved::Known(value));
            }
        }
        if may_be_narrow(&regs) {
            EXTENDED.into_iter().for_each(|reg| regs.set(reg, Saved::NotSaved));
        }
        regs
    }
}

/// What QEMU has zeros for in code that is not 64-bit, whatever the guest's are.
const EXTENDED: [Reg; 8] = [Reg::R8, Reg::R9, Reg::R10, Reg::R11, Reg::R12, Reg::R13, Reg::R14, Reg::R15];

/// Whether a vCPU may be in such code, which QEMU does not say: nothing in its registers needs more than 32 bits.
/// Source: QEMU `target/i386/gdbstub.c`, `x86_cpu_gdb_read_register`.
fn may_be_narrow(regs: &RegisterFile) -> bool {
    use Reg::{Rax, Rbp, Rbx, Rcx, Rdi, Rdx, Rip, Rsi, Rsp};
    let narrow = |reg| regs.u64(reg).is_none_or(|value| value <= u64::from(u32::MAX));
    EXTENDED.into_iter().all(|reg| regs.u64(reg).is_none_or(|value| value == 0))
        && [Rax, Rbx, Rcx, Rdx, Rsi, Rdi, Rbp, Rsp, Rip].into_iter().all(narrow)
}

fn little_endian(bytes: &[Option<u8>]) -> Option<u128> {
    bytes.iter().take(16).rev().try_fold(0, |value, &byte| Some(value << 8 | u128::from(byte?)))
}

/// The value of `name="value"` in a tag.
fn attribute<'a>(tag: &'a str, name: &str) -> Option<&'a str> {
    let mut rest = tag;
    loop {
        let (before, after) = rest.split_once('=')?;
        let found = before.split_whitespace().next_back() == Some(name);
        let after = after.trim_start();
        let quote = after.chars().next().filter(|quote| matches!(quote, '"' | '\''))?;
        let (value, after) = after.get(1..)?.split_once(quote)?;
        if found {
            return Some(value);
        }
        rest = after;
    }
}

fn without_comments(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, comment)) = rest.split_once("<!--") {
        out.push_str(before);
        rest = comment.split_once("-->").map_or("", |(_, after)| after);
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn read(files: &[(&str, &str)]) -> Description {
        let fetch = |annex: &str| -> Result<Vec<u8>, String> {
            let file = files.iter().find(|(name, _)| *name == annex);
            file.map(|(_, text)| text.as_bytes().to_vec()).ok_or_else(|| annex.to_owned())
        };
        Description::read(fetch).unwrap()
    }

    const TARGET: &str = "<?xml version=\"1.0\"?><target><!-- <reg name=\"no\" bitsize=\"8\"/> -->\
        <xi:include href=\"core.xml\"/><xi:include href='more.xml'/></target>";
    const CORE: &str = "<feature name=\"x\">\n<reg name=\"rax\" bitsize=\"64\" type=\"int64\" regnum=\"0\"/>\n\
        <reg name=\"rip\" bitsize=\"64\" type=\"code_ptr\"/><reg name=\"r15\"\n bitsize=\"64\"/></feature>";
    const MORE: &str = "<reg name=\"st0\" bitsize='80'/><reg name=\"odd\" bitsize=\"8\" regnum=\"6\"/>";

    #[test]
    fn included_parts_count_on() {
        let description = read(&[("target.xml", TARGET), ("core.xml", CORE), ("more.xml", MORE)]);
        assert!(description.is_x86_64());
        assert_eq!(description.find("rip"), Some((1, 8)));
        assert_eq!(description.find("st0"), Some((3, 10)));
        assert_eq!(description.find("odd"), Some((6, 1)));
        assert_eq!(description.find("no"), None);
        assert_eq!(description.offset(3), 24);
        let mut bytes: Vec<Option<u8>> = (0..34).map(Some).collect();
        bytes[8] = None;
        let regs = description.decode(&bytes);
        assert_eq!(regs.u64(Reg::Rax), Some(0x0706_0504_0302_0100));
        assert_eq!(regs.get(Reg::Rip), Saved::NotSaved);
        assert_eq!(regs.get(Reg::St0), Saved::Known(0x2120_1f1e_1d1c_1b1a_1918));
        assert_eq!(description.decode(&bytes[..33]).get(Reg::St0), Saved::NotSaved);
    }

    /// QEMU has zeros for r8 and up where code is not 64-bit; which it is it does not say.
    #[test]
    fn zeros_that_may_be_none() {
        let description =
            read(&[("target.xml", "<reg name=\"rip\" bitsize=\"64\"/><reg name=\"r15\" bitsize=\"64\"/>")]);
        let decode = |rip: u64, r15: u64| {
            let bytes = [rip.to_le_bytes(), r15.to_le_bytes()].concat();
            description.decode(&bytes.into_iter().map(Some).collect::<Vec<_>>()).get(Reg::R15)
        };
        assert_eq!(decode(0x0804_8000, 0), Saved::NotSaved);
        assert_eq!(decode(0x0804_8000, 7), Saved::Known(7));
        assert_eq!(decode(0xffff_ffff_8100_0000, 0), Saved::Known(0));
    }

    #[test]
    fn hostile_descriptions_end() {
        let itself = "<xi:include href=\"target.xml\"/>".repeat(100);
        assert_eq!(read(&[("target.xml", &itself)]), Description::default());
        let far = "<reg name=\"a\" bitsize=\"8\" regnum=\"4000000000\"/><reg name=\"b\" bitsize=\"99999999999999999999\"/>";
        assert_eq!(read(&[("target.xml", far)]), Description::default());
        for cut in 0..CORE.len() {
            read(&[("target.xml", &CORE[..cut])]);
        }
        read(&[("target.xml", "<reg =\"\" name<reg <reg name='<!-- --><")]);
    }
}
