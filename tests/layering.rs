//! The layers of `src/lib.rs`, enforced: reads the paths in every source file and fails on an edge upward.
//!
//! This reads Rust with a small scanner of its own: comments and literals are dropped, `use` trees are expanded,
//! `crate::`, `self::`, `super::` and `kstub::` paths are resolved against the module they stand in.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};

/// Rows of the diagram in `src/lib.rs`. A module may import from lower rows and from its own folder.
const LAYERS: &[(u32, &[&str])] = &[
    (8, &["main", "moments", "open"]),
    (7, &["cli", "server"]),
    (6, &["gdb"]),
    (5, &["command"]),
    (4, &["kernel"]),
    (3, &["backend", "unwind"]),
    (2, &["vmcore", "arch", "debuginfo"]),
    (1, &["memory", "vmcoreinfo"]),
    (0, &["addr", "bytes", "parallel", "rsp"]),
];

/// Crates that only some modules may name.
const CRATES: &[(&str, &[&str])] = &[
    ("gdbstub", &["gdb"]),
    ("gdbstub_arch", &["gdb"]),
    ("tokio", &["server"]),
    ("qapi", &["backend"]),
    ("gimli", &["debuginfo"]),
    ("addr2line", &["debuginfo"]),
    ("object", &["debuginfo", "vmcore"]),
    ("ureq", &["debuginfo"]),
    ("iced_x86", &["arch"]),
    ("anyhow", &["main", "moments", "open", "cli", "server"]),
];

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord, Clone)]
struct Violation {
    file: String,
    line: usize,
    text: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.file, self.line, self.text)
    }
}

fn row(module: &str) -> Option<u32> {
    LAYERS.iter().find(|(_, names)| names.contains(&module)).map(|(row, _)| *row)
}

// ---------------------------------------------------------------- tokens

#[derive(Debug, Clone, PartialEq, Eq)]
struct Token {
    line: usize,
    text: String,
}

/// Identifiers, `::` and single punctuation characters; comments, strings, characters and lifetimes are dropped.
fn tokens(source: &str) -> Vec<Token> {
    let s: Vec<char> = source.chars().collect();
    let at = |i: usize| s.get(i).copied().unwrap_or('\0');
    let ident = |c: char| c.is_alphanumeric() || c == '_';
    let (mut out, mut i, mut line) = (Vec::new(), 0, 1);
    while i < s.len() {
        let start = i;
        let c = s[i];
        if c == '/' && at(i + 1) == '/' {
            while i < s.len() && s[i] != '\n' {
                i += 1;
            }
        } else if c == '/' && at(i + 1) == '*' {
            let mut depth = 0;
            while i < s.len() {
                if at(i) == '/' && at(i + 1) == '*' {
                    (depth, i) = (depth + 1, i + 2);
                } else if at(i) == '*' && at(i + 1) == '/' {
                    (depth, i) = (depth - 1, i + 2);
                    if depth == 0 {
                        break;
                    }
                } else {
                    i += 1;
                }
            }
        } else if let Some(hashes) = raw_string(&s, i) {
            i += s[i..].iter().position(|&c| c == '"').unwrap_or(0) + 1;
            while i < s.len() && !(s[i] == '"' && (1..=hashes).all(|n| at(i + n) == '#')) {
                i += 1;
            }
            i += 1 + hashes;
        } else if c == '"' || (c == 'b' && at(i + 1) == '"') || (c == 'c' && at(i + 1) == '"') {
            i += if c == '"' { 1 } else { 2 };
            while i < s.len() && s[i] != '"' {
                i += if s[i] == '\\' { 2 } else { 1 };
            }
            i += 1;
        } else if c == '\'' {
            // A character ends in a quote within a few places; otherwise this is a lifetime or a label.
            if at(i + 1) == '\\' {
                i += 3;
                while i < s.len() && s[i] != '\'' {
                    i += 1;
                }
                i += 1;
            } else if at(i + 2) == '\'' {
                i += 3;
            } else {
                i += 1;
                while ident(at(i)) {
                    i += 1;
                }
            }
        } else if ident(c) {
            while ident(at(i)) {
                i += 1;
            }
            out.push(Token { line, text: s[start..i].iter().collect() });
        } else if c == ':' && at(i + 1) == ':' {
            out.push(Token { line, text: "::".into() });
            i += 2;
        } else {
            if !c.is_whitespace() {
                out.push(Token { line, text: c.into() });
            }
            i += 1;
        }
        line += s[start..i.min(s.len())].iter().filter(|&&c| c == '\n').count();
    }
    out
}

/// How many `#` a raw string that starts at `i` has, if one does. `r#ident` is none.
fn raw_string(s: &[char], i: usize) -> Option<usize> {
    let mut i = i;
    if matches!(s.get(i), Some('b' | 'c')) {
        i += 1;
    }
    if s.get(i) != Some(&'r') {
        return None;
    }
    let hashes = s[i + 1..].iter().take_while(|&&c| c == '#').count();
    (s.get(i + 1 + hashes) == Some(&'"')).then_some(hashes)
}

// ---------------------------------------------------------------- paths

/// A path as written, its segments resolved as far as they can be: `["crate", "memory", …]` for this crate,
/// otherwise as it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
struct FoundPath {
    line: usize,
    segments: Vec<String>,
}

/// Whether a name standing in front of `::` can be a crate: Rust's own words cannot.
fn is_word(text: &str) -> bool {
    text.chars().next().is_some_and(|c| c.is_alphabetic() || c == '_')
}

/// Every path of two segments or more, and every `use`, `extern crate` and `mod` name of one.
fn paths(source: &str, module: &[String]) -> Vec<FoundPath> {
    let tokens = tokens(source);
    let text = |i: usize| tokens.get(i).map_or("", |t| t.text.as_str());
    let mut stack: Vec<(usize, String)> = Vec::new();
    let (mut depth, mut i) = (0, 0);
    let mut found: Vec<(FoundPath, Vec<String>)> = Vec::new();
    let mut local: BTreeSet<String> = BTreeSet::new();
    while i < tokens.len() {
        let here: Vec<String> =
            module.iter().cloned().chain(stack.iter().map(|(_, name)| name.clone())).collect();
        let line = tokens[i].line;
        match text(i) {
            "{" => depth += 1,
            "}" => {
                depth -= 1;
                if stack.last().is_some_and(|(at, _)| *at == depth) {
                    stack.pop();
                }
            }
            "mod" if is_word(text(i + 1)) => {
                local.insert(text(i + 1).to_owned());
                if text(i + 2) == "{" {
                    stack.push((depth, text(i + 1).to_owned()));
                }
                i += 1;
            }
            "use" if is_word(text(i + 1)) || matches!(text(i + 1), "::" | "{") => {
                let mut end = i + 1;
                let mut all = Vec::new();
                use_tree(&tokens, &mut end, &[], &mut all);
                for (line, segments, alias) in all {
                    let inside = matches!(segments[0].as_str(), "crate" | "self" | "super" | "kstub");
                    if let (true, Some(alias)) = (inside, alias) {
                        local.insert(alias);
                    }
                    found.push((FoundPath { line, segments }, here.clone()));
                }
                i = end;
                continue;
            }
            "extern" if text(i + 1) == "crate" => {
                found.push((FoundPath { line, segments: vec![text(i + 2).to_owned()] }, here));
                i += 2;
            }
            word if is_word(word) && text(i + 1) == "::" && (i == 0 || text(i - 1) != "::") => {
                let mut segments = vec![word.to_owned()];
                while text(i + 1) == "::" && is_word(text(i + 2)) {
                    segments.push(text(i + 2).to_owned());
                    i += 2;
                }
                found.push((FoundPath { line, segments }, here));
            }
            // `::name::…`, at the start of an expression or type: surely a crate.
            "::" if is_word(text(i + 1)) && (i == 0 || !(is_word(text(i - 1)) || text(i - 1) == ">")) => {
                let segments = vec!["::".to_owned(), text(i + 1).to_owned()];
                found.push((FoundPath { line, segments }, here));
                i += 1;
            }
            _ => {}
        }
        i += 1;
    }
    found
        .into_iter()
        .filter(|(path, _)| !local.contains(&path.segments[0]))
        .map(|(path, here)| FoundPath { segments: resolve(&path.segments, &here), ..path })
        .collect()
}

type UsePath = (usize, Vec<String>, Option<String>);

/// Reads one tree after `use`, leaving `i` behind it.
fn use_tree(tokens: &[Token], i: &mut usize, prefix: &[String], out: &mut Vec<UsePath>) {
    let text = |i: usize| tokens.get(i).map_or("", |t| t.text.as_str());
    let line = tokens.get(*i).map_or(0, |t| t.line);
    let mut segments = prefix.to_vec();
    if prefix.is_empty() && text(*i) == "::" {
        segments.push("::".into());
        *i += 1;
    }
    loop {
        match text(*i) {
            "{" => {
                *i += 1;
                while *i < tokens.len() && text(*i) != "}" {
                    use_tree(tokens, i, &segments, out);
                    if text(*i) == "," {
                        *i += 1;
                    }
                }
                *i += 1;
                return;
            }
            "::" => *i += 1,
            "*" => {
                *i += 1;
                out.push((line, segments, None));
                return;
            }
            word if is_word(word) && word != "as" => {
                segments.push(word.to_owned());
                *i += 1;
            }
            "as" => {
                let alias = text(*i + 1).to_owned();
                *i += 2;
                out.push((line, segments, Some(alias)));
                return;
            }
            _ => {
                let alias = segments.last().cloned();
                if !segments.is_empty() {
                    out.push((line, segments, alias));
                } else {
                    *i += 1;
                }
                return;
            }
        }
    }
}

/// `self` and `super` taken out; this crate's paths start with `crate`.
fn resolve(segments: &[String], here: &[String]) -> Vec<String> {
    let mut base: Vec<String> = match segments[0].as_str() {
        "crate" | "kstub" => return with_crate(&segments[1..]),
        "::" if segments.get(1).is_some_and(|s| s == "kstub") => return with_crate(&segments[2..]),
        "::" => return segments[1..].to_vec(),
        "self" | "super" => here.to_vec(),
        _ => return segments.to_vec(),
    };
    let mut rest = segments;
    while let Some((first, after)) = rest.split_first() {
        match first.as_str() {
            "self" => {}
            "super" => {
                base.pop();
            }
            _ => break,
        }
        rest = after;
    }
    base.extend_from_slice(rest);
    with_crate(&base)
}

fn with_crate(segments: &[String]) -> Vec<String> {
    std::iter::once("crate".to_owned()).chain(segments.iter().cloned()).collect()
}

// ---------------------------------------------------------------- the check

/// The module path of a file below `src`: `memory/image.rs` is `["memory", "image"]`, `lib.rs` is empty.
fn module_of(file: &Path) -> Vec<String> {
    let mut parts: Vec<String> =
        file.with_extension("").iter().map(|part| part.to_string_lossy().into_owned()).collect();
    if matches!(parts.last().map(String::as_str), Some("mod" | "lib")) {
        parts.pop();
    }
    parts
}

fn check(file: &Path, source: &str) -> Vec<Violation> {
    let module = module_of(file);
    // `lib.rs` only declares and re-exports; it may name every module, and no restricted crate.
    let own = module.first().map_or("lib", String::as_str);
    let here = if own == "lib" { Some(u32::MAX) } else { row(own) };
    let violation = |line, text| Violation { file: file.display().to_string(), line, text };
    let Some(here) = here else {
        return vec![violation(1, format!("module '{own}' is in no row of the layer table"))];
    };
    // `main.rs` is its own crate: its paths into the library start with `kstub::`.
    let scope = if own == "main" { Vec::new() } else { module.clone() };
    let mut out = BTreeSet::new();
    for path in paths(source, &scope) {
        let name = path.segments.join("::");
        if path.segments[0] != "crate" {
            let only = CRATES.iter().find(|(krate, _)| *krate == path.segments[0]);
            if let Some((krate, only)) = only
                && !only.contains(&own)
            {
                out.insert(violation(
                    path.line,
                    format!("'{own}' names {krate}; only {only:?} may ({name})"),
                ));
            }
            continue;
        }
        let Some(target) = path.segments.get(1) else { continue };
        if target == own {
            continue;
        }
        match row(target) {
            Some(there) if there < here => {}
            Some(there) => {
                let text = format!("'{own}' (row {here}) names '{target}' (row {there}): {name}");
                out.insert(violation(path.line, text));
            }
            None if own == "lib" || own == "main" => {}
            None => {
                out.insert(violation(
                    path.line,
                    format!("'{own}' names '{target}', which is no layer: {name}"),
                ));
            }
        }
    }
    out.into_iter().collect()
}

fn rust_files(dir: &Path, out: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            rust_files(&path, out);
        } else if path.extension().is_some_and(|e| e == "rs") {
            out.push(path);
        }
    }
}

fn sources() -> Vec<(PathBuf, String)> {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    rust_files(&src, &mut files);
    files.sort();
    let relative = |path: &PathBuf| path.strip_prefix(&src).unwrap().to_owned();
    files.iter().map(|path| (relative(path), std::fs::read_to_string(path).unwrap())).collect()
}

#[test]
fn imports_go_down() {
    let sources = sources();
    assert!(sources.len() >= 15, "only {} source files found", sources.len());
    let bad: Vec<String> =
        sources.iter().flat_map(|(file, text)| check(file, text)).map(|v| v.to_string()).collect();
    assert!(bad.is_empty(), "edges that the layers forbid:\n{}", bad.join("\n"));
}

#[test]
fn the_table_is_the_diagram_in_lib_rs() {
    let lib = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/lib.rs")).unwrap();
    let mut rows = 0;
    for line in lib.lines().filter_map(|l| l.strip_prefix("//! ")) {
        let mut words = line.split_whitespace();
        let Some(number) = words.next().and_then(|w| w.parse::<u32>().ok()) else { continue };
        let allowed = LAYERS.iter().find(|(row, _)| *row == number).map(|(_, names)| *names);
        let allowed = allowed.unwrap_or_else(|| panic!("row {number} of src/lib.rs is not in the table"));
        // Names stand before the explanation, which two spaces or more and a phrase set apart.
        let names = line[1..].trim_start();
        let named: Vec<&str> = names.split_whitespace().take_while(|w| allowed.contains(w)).collect();
        assert!(!named.is_empty(), "row {number} of src/lib.rs names none of {allowed:?}: {line}");
        rows += 1;
    }
    assert_eq!(rows, LAYERS.len(), "rows of the diagram in src/lib.rs");
}

#[test]
fn every_module_has_a_row() {
    for (file, _) in sources() {
        let module = module_of(&file);
        if let Some(first) = module.first() {
            assert!(row(first).is_some(), "{} is in no row", file.display());
        }
    }
}

/// Mutation check: each planted edge must be found, at its line; each innocent file must pass.
#[test]
fn planted_edges_are_found() {
    let bad: &[(&str, &str, usize)] = &[
        ("vmcore/elf.rs", "use crate::kernel::Machine;", 1),
        ("vmcore/elf.rs", "\n\npub(crate) use crate::{addr::Pfn, command};", 3),
        ("vmcore/elf.rs", "use crate::{\n    addr::{Pfn, PhysAddr},\n    backend::Dump as D,\n};", 3),
        ("memory/mod.rs", "fn f() { let _ = crate::vmcore::probe(); }", 1),
        ("memory/mod.rs", "use super::kernel::x;", 1),
        ("memory/image.rs", "mod deep { use super::super::super::vmcore::x; }", 1),
        ("memory/image.rs", "#[cfg(test)]\nmod tests {\n    use crate::backend::Dump;\n}", 3),
        ("arch/x86_64/paging.rs", "use crate::debuginfo::x;", 1),
        ("arch/x86_64/paging.rs", "type T = Vec<crate::vmcore::Vmcore>;", 1),
        ("cli.rs", "use crate::server::listen;", 1),
        ("addr.rs", "use crate::bytes::u32_at;", 1),
        ("kernel/task.rs", "fn f(r: &gdbstub::stub::X) {}", 1),
        ("kernel/task.rs", "use tokio::sync::Mutex;", 1),
        ("backend/mod.rs", "use ::tokio as t;", 1),
        ("backend/mod.rs", "extern crate gimli;", 1),
        ("kernel/mod.rs", "use {std::fmt, anyhow::Context};", 1),
        ("kernel/mod.rs", "impl From<::anyhow::Error> for X {}", 1),
        ("command/mod.rs", "use crate::gdb;", 1),
        ("command/bt.rs", "use iced_x86::Decoder;", 1),
        ("gdb/mod.rs", "let s = \"/*\"; use crate::cli::Args; // */", 1),
        ("gdb/mod.rs", "let c = '\"'; use crate::cli::Args; let d = '\"';", 1),
        ("gdb/mod.rs", "let r = r#\"a\"#; use crate::server; let q = r\"b\";", 1),
        ("gdb/mod.rs", "fn f<'a>(x: &'a str) { crate::server::run() }", 1),
        ("newlayer/mod.rs", "", 1),
        ("kernel/mod.rs", "use crate::Reexported;", 1),
        ("kernel/mod.rs", "macro_rules! m { () => { $crate::command::run() } }", 1),
        ("lib.rs", "pub use gdbstub::Connection;", 1),
    ];
    for (file, source, line) in bad {
        let found = check(Path::new(file), source);
        assert_eq!(found.len(), 1, "{file}: {source:?}: {found:?}");
        assert_eq!(found[0].line, *line, "{file}: {source:?}: {found:?}");
    }
    let good: &[(&str, &str)] = &[
        ("main.rs", "use kstub::cli::Args; use anyhow::Result; use crate::local;"),
        ("lib.rs", "pub mod kernel; pub use kernel::Machine; pub use crate::gdb::x;"),
        ("vmcore/elf.rs", "use super::kdump; use super::super::addr::Pfn; use object::read::elf;"),
        ("vmcore/mod.rs", "mod elf; pub use elf::Elf; use crate::memory::PhysicalMemory;"),
        ("kernel/task.rs", "use super::object; fn f() { object::read() }"),
        ("kernel/mod.rs", "mod object; pub use object::Typed;"),
        ("kernel/mod.rs", "// use crate::gdb::x;\n/* use crate::gdb /* nested */ ; */ use std::fmt;"),
        ("kernel/mod.rs", "//! See [`crate::gdb`].\nconst S: &str = \"use crate::gdb::x\";"),
        ("kernel/mod.rs", "const S: &str = r#\"\" crate::gdb::x \"#;"),
        ("gdb/target.rs", "use gdbstub::target::Target; use crate::{kernel::Machine, rsp, command::run};"),
        ("memory/image.rs", "#[cfg(test)] mod tests { use super::*; use super::super::Unreadable; }"),
        ("server.rs", "use tokio::net::TcpListener; use crate::gdb::Session;"),
    ];
    for (file, source) in good {
        assert_eq!(check(Path::new(file), source), [], "{file}: {source:?}");
    }
}

/// Mutation check on the real tree: an edge added to a real file is found there.
#[test]
fn an_edge_added_to_a_real_file_is_found() {
    for (file, text) in sources() {
        let module = module_of(&file);
        // The program's own files may name all of the library.
        let Some(own) = module.first().filter(|own| row(own) <= row("server")) else { continue };
        let target = if own == "server" { "cli" } else { "server" };
        let before = check(&file, &text).len();
        let after = check(&file, &format!("{text}\nuse crate::{target}::planted;\n")).len();
        assert_eq!(after, before + 1, "{}", file.display());
    }
}
