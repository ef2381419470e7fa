//! Code as `dis` and gdb show it.

use super::*;

/// gdb's and our spelling of one instruction, made the same: numbers in hexadecimal without sign of their width,
/// names and comments off.
fn normal(text: &str) -> String {
    let text = text.split(['#', '<']).next().unwrap().trim().replace('\t', " ");
    let words: Vec<&str> = text.split_whitespace().collect();
    let mut text = words.join(" ");
    // objdump shows displacements of zero that are encoded.
    for shift in ["shl", "shr", "sar", "rol", "ror", "rcl", "rcr"] {
        // Newer binutils show the count of one.
        text = text
            .replace(&format!("{shift} $0x1,"), &format!("{shift} "))
            .replace(&format!("{shift} $1,"), &format!("{shift} "));
    }
    text = text.replace(" 0x0(", " (").replace(",0x0(", ",(").replace("*0x0(", "*(").replace(":0x0(", ":(");
    // One opcode, two spellings: of data that is decoded.
    if let Some(rest) = text.strip_prefix("lretl ") {
        text = format!("lret {rest}");
    }
    if let Some((prefix, rest)) = text.split_once(' ')
        && prefix.starts_with("rex.")
    {
        text = rest.to_owned();
    }
    // Prefixes that do nothing, on nops, returns, and data that is decoded; on string instructions they do something.
    let strings = ["movs", "stos", "lods", "scas", "cmps", "ins", "outs"];
    while let Some((prefix, rest)) = text.split_once(' ')
        && (["data16", "cs", "repz", "repnz", "rep", "bnd", "notrack", "ds", "es", "ss"].contains(&prefix)
            // A jump to an address reads no memory.
            || ["fs", "gs"].contains(&prefix) && rest.trim_start_matches("gs ").starts_with('j') && !rest.contains('*'))
        && !strings.iter().any(|name| rest.starts_with(name))
    {
        text = rest.to_owned();
    }
    // The port of string instructions, as older and newer binutils spell it.
    text.replace("(%dx)", "%dx")
}

#[test]
fn code_is_disassembled_as_gdb_does() {
    const COUNT: usize = 24;
    let mut releases = Vec::new();
    for_each_set(&mut |set, dump, machine| {
        let what = set.name();
        if releases.contains(&set.json["release"]) {
            return;
        }
        releases.push(set.json["release"].clone());
        let kallsyms = std::fs::read_to_string(set.dir.join("facts/proc/kallsyms")).unwrap();
        let end_of_text = kallsyms.lines().find(|line| line.ends_with(" _etext")).unwrap();
        // Where code for the start of the kernel was, there are other things now.
        let functions: Vec<&str> = kallsyms
            .lines()
            .filter(|line| {
                !line.contains('[') && line.get(16..19) == Some(" T ") && line[..16] < end_of_text[..16]
            })
            .map(|line| &line[..16])
            .collect();
        let sampled: Vec<&str> = functions.iter().step_by(functions.len() / 60).copied().collect();
        let commands: Vec<String> = sampled.iter().map(|at| format!("x/{COUNT}i 0x{at}")).collect();
        let printed = gdb(dump, &commands.iter().map(String::as_str).collect::<Vec<_>>());
        let (mut compared, mut named, mut differ) = (0, 0, Vec::new());
        for (at, printed) in sampled.iter().zip(&printed) {
            let ours = ask(machine, &format!("dis 0x{at} {COUNT}"));
            let ours = ours["instructions"].as_array().unwrap();
            for (line, one) in printed.lines().zip(ours) {
                let line = line.trim_start_matches("=>").trim();
                let (place, code) = line.split_once(":\t").unwrap_or_else(|| panic!("{what}: {line}"));
                let address = place.split(' ').next().unwrap();
                if code.contains("(bad)") || one["text"] == "(bad)" {
                    break;
                }
                assert_eq!(one["address"], address, "{what}: {line} {one}");
                if let (Some((_, name)), Some(symbol)) = (place.split_once(" <"), one["symbol"].as_str()) {
                    // gdb's offsets are decimal.
                    let parts = |text: &str| {
                        let text = text.trim_end_matches([':', '>']);
                        let (name, offset) = text.split_once('+').unwrap_or((text, "0"));
                        let hexadecimal = offset.strip_prefix("0x").map(hex);
                        (name.to_owned(), hexadecimal.unwrap_or_else(|| offset.parse().unwrap()))
                    };
                    let ((our_name, our_offset), (name, offset)) = (parts(symbol), parts(name));
                    // Of names at one address, or around it, gdb may choose another.
                    if our_name == name {
                        named += 1;
                        assert_eq!(our_offset, offset, "{what}: {line} {one}");
                    }
                }
                let (ours, theirs) = (normal(one["text"].as_str().unwrap()), normal(code));
                compared += 1;
                if ours != theirs {
                    differ.push(format!("{ours} | {theirs}"));
                }
            }
        }
        differ.sort();
        differ.dedup();
        assert!(compared > 1000 && named * 10 > compared * 9, "{what}: {compared}, {named} with gdb's name");
        assert!(differ.is_empty(), "{what}: kstub | gdb, {} of {compared}: {differ:#?}", differ.len());
    });
}

#[test]
fn per_cpu_operands_are_named() {
    for_each_set(&mut |set, _, machine| {
        // On all kernels schedule() begins with current, and that is per-CPU.
        let code = ask(machine, "dis schedule");
        let names: Vec<&str> = code["instructions"]
            .as_array()
            .unwrap()
            .iter()
            .filter_map(|one| one["refers_to"].as_str())
            .collect();
        let current = ["current_task", "pcpu_hot", "const_current_task", "const_pcpu_hot"];
        assert!(names.iter().any(|name| current.contains(name)), "{}: {names:?}", set.name());
        assert!(names.iter().any(|name| name.contains("schedule")), "{}: {names:?}", set.name());
    });
}
