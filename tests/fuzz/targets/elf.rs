//! ELF core files.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    kstub_fuzz::dump(kstub_fuzz::file(input), &kstub_fuzz::asked(input));
});
