//! C expressions as users type them, on the committed sample's kernel: parsed, typed, and read where they lead.
//!
//! The first byte chooses what takes the expression.
#![no_main]

use kstub::backend::Dump;
use kstub::command::{self, Context, Focus, Form};
use kstub::debuginfo::find::Places;
use kstub::kernel::{Machine, Options};
use std::path::Path;
use std::sync::{Arc, LazyLock};

static MACHINE: LazyLock<Machine> = LazyLock::new(|| {
    let sample = Path::new(env!("CARGO_MANIFEST_DIR")).join("../data/sample");
    let dump = Dump::open(&sample.join("vmcore")).expect("the sample");
    let places = Places { beside: Some(sample), ..Places::default() };
    Machine::open(Arc::new(dump), &Options { places, ..Options::default() }, &|_, _| ())
        .expect("the sample's kernel")
});

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let Some((&how, text)) = input.split_first() else { return };
    let Ok(text) = std::str::from_utf8(text) else { return };
    let command =
        ["p", "p -x", "whatis", "struct", "struct task_struct", "sym", "percpu", "rd"][usize::from(how % 8)];
    let focus = Focus::default();
    let context =
        Context { machine: &MACHINE, cpu: MACHINE.first_cpu(), task: None, focus: &focus, form: Form::Both };
    let line = format!("{command} {text}");
    // The same question has the same answer.
    let [one, other] = [(); 2].map(|()| command::run(&context, &line));
    assert_eq!(one, other, "{line}");
    let text = match one {
        Ok(output) => output.text,
        Err(error) => error.to_string(),
    };
    assert!(!text.chars().any(|c| c.is_control() && !matches!(c, '\n' | '\t')), "{line}: {text:?}");
});
