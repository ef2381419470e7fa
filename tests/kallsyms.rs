//! The symbol table that a kernel carries in its memory: every form of it, written independently, and damaged.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod support;

use kstub::debuginfo::kallsyms::{Error, Layout, Names};
use support::kallsyms::{BASE, FORMS, Form, TEXT, symbols, write};

fn layout([num_syms, names, token_table, token_index]: [usize; 4]) -> Layout {
    Layout { num_syms, names, token_table, token_index }
}

#[test]
fn every_form_is_found_and_read() {
    for form in FORMS {
        let per_cpu =
            matches!(form, Form::Old | Form::Relative { per_cpu: true } | Form::Later { per_cpu: true });
        let symbols = symbols(per_cpu);
        let (image, places) = write(form, &symbols);
        let layout = layout(places);
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
    let (image, places) = write(Form::Later { per_cpu: true }, &symbols);
    let layout = layout(places);
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
