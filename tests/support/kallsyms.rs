//! Writes kallsyms tables in every form that kernels have had.
//!
//! Source: Linux `scripts/kallsyms.c` (`write_src`) of v4.4, v5.10, v6.1, v6.12 and v7.0.

/// How a kernel writes its tables.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Form {
    /// Addresses, number, names, markers of 8 bytes, tokens.
    Old,
    /// The same with offsets, base and markers of 4 bytes; per-CPU variables absolute or not.
    Relative { per_cpu: bool },
    /// Number, names, markers, tokens, offsets, base, sequence numbers.
    Later { per_cpu: bool },
    /// Number, names, markers, tokens, offsets from their own places, sequence numbers.
    Place,
}

pub const FORMS: [Form; 6] = [
    Form::Old,
    Form::Relative { per_cpu: true },
    Form::Relative { per_cpu: false },
    Form::Later { per_cpu: true },
    Form::Later { per_cpu: false },
    Form::Place,
];

/// Where the image begins.
pub const BASE: u64 = 0xffff_ffff_9ac0_0000;
/// Where the lowest symbol of the image is.
pub const TEXT: u64 = BASE + 0x1000;

/// 700 symbols: letter, name, address. Some addresses are shared, one name needs a length of two bytes.
pub fn symbols(per_cpu: bool) -> Vec<(char, String, u64)> {
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

/// The image, and where in it are: the number of symbols, the names, the table and the index of tokens.
pub fn write(form: Form, symbols: &[(char, String, u64)]) -> (Vec<u8>, [usize; 4]) {
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
    (w.0, [num_syms, names, token_table, token_index])
}
