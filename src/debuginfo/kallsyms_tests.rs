//! The tables written by hand, in every form that kernels have had, and damaged.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use super::*;

/// How a kernel writes its tables.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Form {
    /// Addresses, number, names, markers of 8 bytes, tokens.
    Old,
    /// The same with offsets, base and markers of 4 bytes; per-CPU variables absolute or not.
    Relative { per_cpu: bool },
    /// Number, names, markers, tokens, offsets, base, sequence numbers.
    Later { per_cpu: bool },
    /// Number, names, markers, tokens, offsets from their own places, sequence numbers.
    Place,
}

const FORMS: [Form; 6] = [
    Form::Old,
    Form::Relative { per_cpu: true },
    Form::Relative { per_cpu: false },
    Form::Later { per_cpu: true },
    Form::Later { per_cpu: false },
    Form::Place,
];

/// Where the image begins.
const BASE: u64 = 0xffff_ffff_9ac0_0000;
/// Where the lowest symbol of the image is.
const TEXT: u64 = BASE + 0x1000;

/// 700 symbols: letter, name, address. Some addresses are shared, one name needs a length of two bytes.
fn symbols(per_cpu: bool) -> Vec<(char, String, u64)> {
    let mut all = Vec::new();
    if per_cpu {
        all.extend([('A', "__per_cpu_start".to_owned(), 0), ('A', "gdt_page".to_owned(), 0xb000)]);
    }
    all.extend([('T', "_stext".to_owned(), TEXT), ('T', "_text".to_owned(), TEXT)]);
    for i in 0..700u64 {
        let name = if i == 333 { format!("big_{}", "Xy".repeat(120)) } else { format!("sys_call_{i}") };
        all.push((if i % 2 == 0 { 't' } else { 'D' }, name, TEXT + 0x10 + i / 3 * 0x40));
    }
    all
}

/// Bytes, and what tables are aligned to.
struct Writer(Vec<u8>, usize);

impl Writer {
    fn align(&mut self) -> usize {
        while !self.0.len().is_multiple_of(self.1) {
            self.0.push(0);
        }
        self.0.len()
    }
    fn u32s(&mut self, words: impl IntoIterator<Item = u32>) {
        self.align();
        self.0.extend(words.into_iter().flat_map(u32::to_le_bytes));
    }
    fn u64s(&mut self, words: impl IntoIterator<Item = u64>) {
        self.align();
        self.0.extend(words.into_iter().flat_map(u64::to_le_bytes));
    }
}

/// Tokens: each ASCII character stands for itself, 0x80 and up for words, some bytes for nothing.
fn token(byte: u8) -> Vec<u8> {
    match byte {
        0x80 => b"sys_".to_vec(),
        0x81 => b"call_".to_vec(),
        0x82 => b"sys_call_".to_vec(),
        b'!'..=b'~' => vec![byte],
        _ => Vec::new(),
    }
}

fn compress(text: &str) -> Vec<u8> {
    let text = text.replace("sys_call_", "\u{82}").replace("sys_", "\u{80}");
    text.chars().map(|c| u8::try_from(u32::from(c)).unwrap()).collect()
}

/// The image, and where the tables were put.
fn write(form: Form, symbols: &[(char, String, u64)]) -> (Vec<u8>, Layout) {
    let mut w = Writer(b"Linux version 6.1.0 is in front of it\n\0".to_vec(), 8);
    // Things that look a little like an index of tokens.
    w.u64s([0, 0x0003_0002_0001_0000, 0x0001_0000_0001_0000, 5]);
    if form == Form::Place {
        w.1 = 4;
        w.u32s([7]);
    }
    let base = TEXT;
    let per_cpu = matches!(form, Form::Relative { per_cpu: true } | Form::Later { per_cpu: true });
    let offset = |addr: u64| match (per_cpu, addr < BASE) {
        (true, true) => addr as u32,
        (true, false) => (base.wrapping_sub(1).wrapping_sub(addr)) as u32,
        (false, _) => (addr - base) as u32,
    };
    let addresses = |w: &mut Writer| {
        let table = w.align() as u64;
        match form {
            Form::Old => w.u64s(symbols.iter().map(|s| s.2)),
            Form::Place => {
                let places = (0..).map(|i: u64| BASE + table + 4 * i);
                w.u32s(symbols.iter().zip(places).map(|(s, place)| s.2.wrapping_sub(place) as u32));
            }
            _ => {
                w.u32s(symbols.iter().map(|s| offset(s.2)));
                w.u64s([base]);
            }
        }
    };
    let first = matches!(form, Form::Old | Form::Relative { .. });
    if first {
        addresses(&mut w);
    }
    let num_syms = w.align();
    w.u32s([symbols.len() as u32]);
    let names = w.align();
    let mut markers = Vec::new();
    for (i, (letter, name, _)) in symbols.iter().enumerate() {
        if i % 256 == 0 {
            markers.push((w.0.len() - names) as u32);
        }
        let text = compress(&format!("{letter}{name}"));
        match text.len() {
            short @ ..0x80 => w.0.push(short as u8),
            long => w.0.extend([(long & 0x7f | 0x80) as u8, (long >> 7) as u8]),
        }
        w.0.extend(text);
    }
    match form {
        Form::Old => w.u64s(markers.into_iter().map(u64::from)),
        _ => w.u32s(markers),
    }
    let token_table = w.align();
    let mut index = Vec::new();
    for byte in 0..=255 {
        index.push((w.0.len() - token_table) as u16);
        w.0.extend(token(byte));
        w.0.push(0);
    }
    let token_index = w.align();
    w.0.extend(index.into_iter().flat_map(u16::to_le_bytes));
    if !first {
        addresses(&mut w);
        w.align();
        w.0.extend((0..symbols.len() as u32).flat_map(|seq| seq.to_be_bytes()[1..].to_vec()));
    }
    w.align();
    w.0.extend([0xee; 64]);
    (w.0, Layout { num_syms, names, token_table, token_index })
}

#[test]
fn every_form_is_found_and_read() {
    for form in FORMS {
        let per_cpu =
            matches!(form, Form::Old | Form::Relative { per_cpu: true } | Form::Later { per_cpu: true });
        let symbols = symbols(per_cpu);
        let (image, layout) = write(form, &symbols);
        assert_eq!(Layout::find(&image), Some(layout), "{form:?}");
        let names = Names::expand(&image, &layout).unwrap();
        let wanted: Vec<u64> = symbols.iter().map(|s| s.2).collect();
        let candidates = layout.candidates(&image, BASE);
        let fitting: Vec<_> =
            candidates.iter().filter(|c| c.decode(&image, names.len()) == Ok(wanted.clone())).collect();
        assert_eq!(fitting.len(), 1, "{form:?}: {fitting:x?}");
        let stext = names.position("_stext").unwrap();
        assert_eq!(
            (symbols[stext].1.as_str(), names.position("_stex"), names.position("stext")),
            ("_stext", None, None)
        );
        let table = names.at_addresses(&wanted);
        let ours: Vec<_> = table.iter().map(|s| (s.letter, s.name.to_owned(), s.addr)).collect();
        assert_eq!(ours, symbols, "{form:?}");
        assert_eq!(table.lookup("sys_call_8").map(|s| s.size), Some(0x40));
        // Of several at one address the first is named, as in the kernel's own messages.
        assert_eq!(table.at(TEXT + 8).map(|(s, o)| (s.name, o)), Some(("_stext", 8)));
        // Nothing reaches from the per-CPU section into the image, and nothing past the last symbol.
        assert_eq!(table.lookup("gdt_page").map(|s| s.size), per_cpu.then_some(0));
        assert_eq!(table.lookup("sys_call_699").map(|s| s.size), Some(0));
    }
}

#[test]
fn what_is_damaged_is_an_error_or_nothing_never_a_panic() {
    let symbols = symbols(true);
    let (image, layout) = write(Form::Later { per_cpu: true }, &symbols);
    let read = |image: &[u8]| {
        for layout in Layout::find(image).into_iter().chain([layout]) {
            for candidate in layout.candidates(image, BASE) {
                let _ = candidate.decode(image, symbols.len());
                let _ = candidate.decode(image, usize::MAX);
            }
        }
        Names::expand(image, &layout)
    };
    for cut in (0..image.len()).step_by(7) {
        let _ = read(&image[..cut]);
    }
    for at in (0..image.len()).step_by(3) {
        for bit in [0, 4, 7] {
            let mut bad = image.clone();
            bad[at] ^= 1 << bit;
            let _ = read(&bad);
        }
    }
    // Numbers of symbols that no kernel has.
    for count in [0, u32::MAX] {
        let mut bad = image.clone();
        bad[layout.num_syms..layout.num_syms + 4].copy_from_slice(&count.to_le_bytes());
        assert_eq!(read(&bad).err(), Some(Error::Count(count as usize)));
    }
    // A name that is cut short: the number is one too many, and the markers follow.
    let mut bad = image.clone();
    bad[layout.names] = 0;
    assert!(matches!(read(&bad), Err(Error::Name { index: 0, .. })));
    assert_eq!(Layout::find(&bad), None, "names that end nowhere must not be found");
}
