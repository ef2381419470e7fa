//! `target.xml`: the registers' names, order and types, generated from the register table.
//!
//! Same order as QEMU's, so scripts made for QEMU work. gdb's own names for the parts (`i386.core`,
//! `i386.sse`) make it map DWARF's xmm registers. `osabi` is `none`: with Linux's, gdb would look for
//! user-space things (signal frames, a dynamic linker) in a kernel. Source: GDB manual, "Target Descriptions";
//! bit names: Intel SDM vol. 1 3.4.3 and 10.2.3, vol. 3 2.5; AMD APM vol. 2 3.1.7 (EFER).

use super::registers::{GdbRegister, Kind};
use crate::arch::x86_64::Reg;
use gdbstub_arch::x86::reg::id::X86_64CoreRegId as Core;
use std::fmt::Write;
use std::sync::LazyLock;

/// The whole document.
pub(super) static TARGET_XML: LazyLock<String> = LazyLock::new(generate);

/// A register made of named bits: its type's name, its size in bytes, and `(name, first bit, last bit)`.
struct Flags(&'static str, usize, &'static [(&'static str, u32, u32)]);

const EFLAGS: Flags = Flags(
    "x64_eflags",
    4,
    &[
        ("CF", 0, 0),
        ("", 1, 1),
        ("PF", 2, 2),
        ("AF", 4, 4),
        ("ZF", 6, 6),
        ("SF", 7, 7),
        ("TF", 8, 8),
        ("IF", 9, 9),
        ("DF", 10, 10),
        ("OF", 11, 11),
        ("IOPL", 12, 13),
        ("NT", 14, 14),
        ("RF", 16, 16),
        ("VM", 17, 17),
        ("AC", 18, 18),
        ("VIF", 19, 19),
        ("VIP", 20, 20),
        ("ID", 21, 21),
    ],
);
const CR0: Flags = Flags(
    "x64_cr0",
    8,
    &[
        ("PE", 0, 0),
        ("MP", 1, 1),
        ("EM", 2, 2),
        ("TS", 3, 3),
        ("ET", 4, 4),
        ("NE", 5, 5),
        ("WP", 16, 16),
        ("AM", 18, 18),
        ("NW", 29, 29),
        ("CD", 30, 30),
        ("PG", 31, 31),
    ],
);
const CR3: Flags = Flags("x64_cr3", 8, &[("PCID", 0, 11), ("PDBR", 12, 63)]);
const CR4: Flags = Flags(
    "x64_cr4",
    8,
    &[
        ("VME", 0, 0),
        ("PVI", 1, 1),
        ("TSD", 2, 2),
        ("DE", 3, 3),
        ("PSE", 4, 4),
        ("PAE", 5, 5),
        ("MCE", 6, 6),
        ("PGE", 7, 7),
        ("PCE", 8, 8),
        ("OSFXSR", 9, 9),
        ("OSXMMEXCPT", 10, 10),
        ("UMIP", 11, 11),
        ("LA57", 12, 12),
        ("VMXE", 13, 13),
        ("SMXE", 14, 14),
        ("FSGSBASE", 16, 16),
        ("PCIDE", 17, 17),
        ("OSXSAVE", 18, 18),
        ("SMEP", 20, 20),
        ("SMAP", 21, 21),
        ("PKE", 22, 22),
        ("CET", 23, 23),
        ("PKS", 24, 24),
        ("UINTR", 25, 25),
    ],
);
const EFER: Flags = Flags(
    "x64_efer",
    8,
    &[
        ("SCE", 0, 0),
        ("LME", 8, 8),
        ("LMA", 10, 10),
        ("NXE", 11, 11),
        ("SVME", 12, 12),
        ("LMSLE", 13, 13),
        ("FFXSR", 14, 14),
        ("TCE", 15, 15),
    ],
);
const MXCSR: Flags = Flags(
    "x64_mxcsr",
    4,
    &[
        ("IE", 0, 0),
        ("DE", 1, 1),
        ("ZE", 2, 2),
        ("OE", 3, 3),
        ("UE", 4, 4),
        ("PE", 5, 5),
        ("DAZ", 6, 6),
        ("IM", 7, 7),
        ("DM", 8, 8),
        ("ZM", 9, 9),
        ("OM", 10, 10),
        ("UM", 11, 11),
        ("PM", 12, 12),
        ("RC", 13, 14),
        ("FZ", 15, 15),
    ],
);

/// The members of `$xmm0`, under the names gdb uses.
const XMM_VIEWS: [(&str, &str, u32); 6] = [
    ("v4_float", "ieee_single", 4),
    ("v2_double", "ieee_double", 2),
    ("v16_int8", "int8", 16),
    ("v8_int16", "int16", 8),
    ("v4_int32", "int32", 4),
    ("v2_int64", "int64", 2),
];

fn generate() -> String {
    let mut xml = String::from(concat!(
        "<?xml version=\"1.0\"?>\n",
        "<!DOCTYPE target SYSTEM \"gdb-target.dtd\">\n",
        "<target version=\"1.0\">\n",
        "<architecture>i386:x86-64</architecture>\n",
        "<osabi>none</osabi>\n",
    ));
    let first_sse = Reg::Xmm0 as usize;
    let (core, sse) = Reg::ALL.split_at(first_sse);
    feature(&mut xml, "org.gnu.gdb.i386.core", &[EFLAGS, CR0, CR3, CR4, EFER], "", core);
    feature(&mut xml, "org.gnu.gdb.i386.sse", &[MXCSR], &xmm_type(), sse);
    xml.push_str("</target>\n");
    xml
}

fn feature(xml: &mut String, name: &str, flags: &[Flags], types: &str, registers: &[Reg]) {
    let _ = writeln!(xml, "<feature name=\"{name}\">");
    for Flags(id, size, fields) in flags {
        let _ = writeln!(xml, "<flags id=\"{id}\" size=\"{size}\">");
        for (name, start, end) in *fields {
            let _ = writeln!(xml, "<field name=\"{name}\" start=\"{start}\" end=\"{end}\"/>");
        }
        xml.push_str("</flags>\n");
    }
    xml.push_str(types);
    for &reg in registers {
        let (name, bits) = (reg.name(), reg.bits());
        let (kind, group) = kind_and_group(reg);
        let _ = write!(xml, "<reg name=\"{name}\" bitsize=\"{bits}\" type=\"{kind}\"");
        if let Some(group) = group {
            let _ = write!(xml, " group=\"{group}\"");
        }
        // Numbers follow from the order, which is the register table's.
        xml.push_str("/>\n");
    }
    xml.push_str("</feature>\n");
}

/// A register's type and, where gdb would not guess it, its group in `info registers GROUP`.
fn kind_and_group(reg: Reg) -> (&'static str, Option<&'static str>) {
    match (reg, GdbRegister::of(reg).map(|register| register.kind)) {
        (Reg::Rsp | Reg::Rbp, _) => ("data_ptr", None),
        (Reg::Cr0, _) => (CR0.0, None),
        (Reg::Cr3, _) => (CR3.0, None),
        (Reg::Cr4, _) => (CR4.0, None),
        (Reg::Efer, _) => (EFER.0, None),
        (_, Some(Kind::Core(Core::Rip))) => ("code_ptr", None),
        (_, Some(Kind::Core(Core::Eflags))) => (EFLAGS.0, None),
        (_, Some(Kind::Core(Core::Segment(_)))) => ("int32", None),
        (_, Some(Kind::Core(Core::St(_)))) => ("i387_ext", None),
        (_, Some(Kind::Core(Core::Fpu(_)))) => ("int", Some("float")),
        (_, Some(Kind::Core(Core::Xmm(_)))) => ("vec128", None),
        (_, Some(Kind::Core(Core::Mxcsr))) => (MXCSR.0, Some("vector")),
        _ => ("int64", None),
    }
}

fn xmm_type() -> String {
    let mut xml = String::new();
    for (name, element, count) in XMM_VIEWS {
        let _ = writeln!(xml, "<vector id=\"{name}_vec\" type=\"{element}\" count=\"{count}\"/>");
    }
    xml.push_str("<union id=\"vec128\">\n");
    for (name, ..) in XMM_VIEWS {
        let _ = writeln!(xml, "<field name=\"{name}\" type=\"{name}_vec\"/>");
    }
    xml.push_str("<field name=\"uint128\" type=\"uint128\"/>\n</union>\n");
    xml
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_stand_in_protocol_order() {
        let names: Vec<&str> =
            TARGET_XML.split("<reg name=\"").skip(1).filter_map(|rest| rest.split('"').next()).collect();
        assert_eq!(names, Reg::ALL.map(Reg::name));
        assert!(TARGET_XML.is_ascii());
    }

    #[test]
    fn flag_fields_do_not_overlap() {
        for Flags(id, size, fields) in [EFLAGS, CR0, CR3, CR4, EFER, MXCSR] {
            let mut next = 0;
            for (name, start, end) in fields {
                assert!(*start >= next && end >= start && *end < 8 * size as u32, "{id} {name}");
                next = end + 1;
            }
        }
    }
}
