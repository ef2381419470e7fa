//! VMCOREINFO texts, against a second reading of them.
#![no_main]

use kstub::vmcoreinfo::VmcoreInfo;

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let info = VmcoreInfo::parse(input);
    let end = input.iter().position(|&byte| byte == 0).unwrap_or(input.len());
    assert_eq!(info, VmcoreInfo::parse(&input[..end]), "what follows the first NUL counts");
    let text = String::from_utf8_lossy(&input[..end]).into_owned();
    let mut keys: Vec<&str> = text.lines().filter_map(|line| Some(line.split_once('=')?.0.trim())).collect();
    keys.truncate(64);
    for key in keys {
        let line = text.lines().find(|line| line.split_once('=').is_some_and(|(k, _)| k.trim() == key));
        let value = line.and_then(|line| line.split_once('=')).map(|(_, value)| value.trim());
        assert_eq!(info.get(key), value, "the first of {key:?} counts");
        let value = value.unwrap_or_default();
        let inner = |kind: &str| key.strip_prefix(kind)?.strip_prefix('(')?.strip_suffix(')');
        if let Some(at) = inner("SYMBOL").and_then(|name| info.symbol(name)) {
            assert_eq!(u64::from_str_radix(value.trim_start_matches("0x"), 16), Ok(at.0));
        }
        if let Some(number) = inner("NUMBER").and_then(|name| info.number(name)) {
            let same = |text: String| value.trim_start_matches(['+', '0']) == text.trim_start_matches('0');
            let negative = value.starts_with('-');
            assert!(
                same(number.to_string()) || negative && (number as i64) < 1 || value.starts_with("0x"),
                "{value:?} is not {number}"
            );
        }
        inner("OFFSET").map(|name| info.offset(name));
        inner("SIZE").map(|name| info.size(name));
    }
    assert!(info.release().is_none_or(|text| !text.is_empty() && text.bytes().all(|b| b.is_ascii_graphic())));
    let hex = |text: String| text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    assert!(info.build_id().is_none_or(hex));
    let _ = info.kernel_offset();
});
