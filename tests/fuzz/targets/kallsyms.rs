//! The kernel's own symbol table in bytes of its image: found by what it is made of, expanded, put at addresses.
#![no_main]

use kstub::debuginfo::kallsyms::{Layout, Names};

/// Where the image is said to be.
const BASE: u64 = 0xffff_ffff_8100_0000;

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    // The first bytes say where the tables are, as VMCOREINFO would; the rest is the image.
    let Some((places, image)) = input.split_at_checked(8) else { return };
    let place = |i: usize| usize::from(u16::from_le_bytes([places[2 * i], places[2 * i + 1]]));
    let told = Layout { num_syms: place(0), names: place(1), token_table: place(2), token_index: place(3) };
    for layout in Layout::find(image).into_iter().chain([told]) {
        for candidate in layout.candidates(image, BASE) {
            let Ok(names) = Names::expand(image, &layout) else { continue };
            let Ok(addresses) = candidate.decode(image, names.len()) else { continue };
            assert_eq!(addresses.len(), names.len());
            let count = names.len();
            let table = names.at_addresses(&addresses);
            assert_eq!(table.len(), count);
            for symbol in table.iter().take(64) {
                assert!(table.lookup(symbol.name).is_some());
                if symbol.size > 0 {
                    let (covers, offset) = table.at(symbol.addr).expect("a symbol covers its own address");
                    assert_eq!((covers.addr, offset), (symbol.addr, 0));
                }
            }
        }
    }
});
