//! Loaded modules: what the kernel knows of each, its sections, symbols and types.
//!
//! Everything is optional but the name: what a kernel does not have costs one field. Addresses are run-time ones.
//! Source: `include/linux/module.h` (`struct module`), `kernel/module/{main,kallsyms,sysfs}.c`.

use super::Kernel;
use crate::addr::VirtAddr;
use crate::bytes::{cstr_at, u32_at};
use crate::debuginfo::{DebugInfo, SymbolTable, build_id_in_notes};
use std::fmt;
use std::sync::OnceLock;

/// Modules listed; distributions ship some 4000, of which a few hundred are loaded.
const MODULES_MAX: usize = 8192;
/// `MODULE_NAME_LEN` is 56 on 64-bit machines.
const NAME_LEN: usize = 56;
/// The largest modules have some 20 MiB.
const REGION_MAX: u64 = 1 << 30;
/// Symbols of one module, and bytes of their names.
const SYMBOLS_MAX: u64 = 1 << 20;
const STRINGS_MAX: u64 = 32 << 20;
/// Bytes of an `Elf64_Sym`.
const ELF_SYM: usize = 24;
/// Sections of one module; `-ffunction-sections` makes thousands.
const SECTIONS_MAX: usize = 1 << 16;
/// Modules that use one module.
const USERS_MAX: usize = 1024;
/// The largest modules' BTF has some 2 MiB.
const BTF_MAX: usize = 64 << 20;
/// `MODULE_REF_BASE`: what the count stands at while nobody uses the module.
const REF_BASE: i32 = 1;
/// `BUILD_ID_SIZE_MAX`.
const BUILD_ID_SIZE: usize = 20;

/// `enum module_state`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum State {
    /// Normal.
    Live,
    /// Fully formed, its init function is running.
    Coming,
    /// Being removed.
    Going,
    /// Still being set up.
    Unformed,
    /// No value that kernels have.
    Unknown(u32),
}

impl fmt::Display for State {
    /// As `/proc/modules` has it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Live => write!(f, "Live"),
            Self::Coming => write!(f, "Loading"),
            Self::Going => write!(f, "Unloading"),
            Self::Unformed => write!(f, "Unformed"),
            Self::Unknown(state) => write!(f, "state {state}"),
        }
    }
}

/// A piece of memory that a module occupies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Region {
    /// What the kernel calls it: `text`, `rodata`, `core`, `init` …
    pub kind: &'static str,
    /// First byte.
    pub start: VirtAddr,
    /// Length in bytes, not 0.
    pub size: u64,
}

impl Region {
    /// Whether `at` lies inside.
    pub fn contains(&self, at: VirtAddr) -> bool {
        at.offset_from(self.start).is_some_and(|offset| offset < self.size)
    }
}

/// One loaded module.
pub struct Module {
    /// Address of its `struct module`.
    pub at: VirtAddr,
    /// Its name: untrusted text, as `/proc/modules` prints it.
    pub name: String,
    /// Whether it is in use yet or still.
    pub state: Option<State>,
    /// How many uses the kernel counts: other modules', open files' and so on.
    pub uses: Option<i32>,
    /// `taints`: bits of `TAINT_*`.
    pub taints: Option<u64>,
    /// The memory it occupies; init memory is freed after init and then not listed.
    pub regions: Vec<Region>,
    /// Its GNU build-id in lower-case hex.
    pub build_id: Option<String>,
    /// Its static per-CPU variables: what is added to a CPU's per-CPU offset, and size in bytes.
    pub per_cpu: Option<(u64, u64)>,
    /// Names of the modules that use it.
    pub used_by: Vec<String>,
    symbols: OnceLock<SymbolTable>,
    /// Its own file, if there is one: see [`Kernel::locate`].
    pub(super) debug_info: OnceLock<Option<DebugInfo>>,
}

impl Module {
    /// Whether its memory holds `at`.
    pub fn contains(&self, at: VirtAddr) -> bool {
        self.regions.iter().any(|region| region.contains(at))
    }
}

/// A section of a module.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Section {
    /// Its name: untrusted text.
    pub name: String,
    /// Where it was put; sections for init are gone after init.
    pub at: VirtAddr,
}

/// Why it is not known where a module's sections are.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoSections {
    /// Without CONFIG_KALLSYMS and CONFIG_SYSFS, or without types.
    #[error("the kernel keeps no list of this module's sections")]
    NotKept,
    /// The list is out of reach.
    #[error("the list of the module's sections at {at} cannot be read: {why}")]
    Unreadable {
        /// Where it is, or a part of it.
        at: VirtAddr,
        /// Which byte could not be read, and why.
        why: String,
    },
}

/// The loaded modules in the order of the kernel's list, and what was wrong with it.
#[derive(Default)]
pub struct Modules {
    /// Newest first.
    pub list: Vec<Module>,
    /// One sentence each.
    pub problems: Vec<String>,
}

impl Modules {
    /// The module whose memory holds `at`.
    pub fn at(&self, at: VirtAddr) -> Option<&Module> {
        self.list.iter().find(|module| module.contains(at))
    }
}

impl Kernel {
    /// The loaded modules; read once.
    pub fn modules(&self) -> &Modules {
        self.modules.get_or_init(|| self.read_modules())
    }

    fn read_modules(&self) -> Modules {
        let mut modules = Modules::default();
        // A kernel without CONFIG_MODULES has none.
        let Some(head) = self.symbol("modules") else { return modules };
        let Some(list) = self.offset("module", "list") else {
            modules
                .problems
                .push("which modules are loaded is not known: struct module has no types".to_owned());
            return modules;
        };
        let walk = self.list(head);
        modules.problems.extend(walk.problem.map(|problem| format!("modules: {problem}")));
        if walk.nodes.len() > MODULES_MAX {
            modules.problems.push(format!("only the first {MODULES_MAX} modules are looked at"));
        }
        let nodes = walk.nodes.into_iter().take(MODULES_MAX);
        modules.list = nodes.map(|node| self.module(VirtAddr(node.0.wrapping_sub(list)))).collect();
        modules
    }

    fn offset(&self, container: &str, path: &str) -> Option<u64> {
        self.member(container, path).map(|member| member.offset)
    }

    fn module_member(&self, at: VirtAddr, path: &str) -> Option<VirtAddr> {
        Some(at.wrapping_add(self.offset("module", path)?))
    }

    fn module_name(&self, at: VirtAddr) -> Option<String> {
        let field = self.read_array::<NAME_LEN>(self.module_member(at, "name")?)?;
        Some(String::from_utf8_lossy(cstr_at(&field, 0, NAME_LEN)?).into_owned())
    }

    fn module(&self, at: VirtAddr) -> Module {
        let pointer = |path| self.module_member(at, path).and_then(|at| self.read_u64(at));
        let word = |path| self.module_member(at, path).and_then(|at| self.read_u32(at));
        let state = word("state").map(|state| match state {
            0 => State::Live,
            1 => State::Coming,
            2 => State::Going,
            3 => State::Unformed,
            other => State::Unknown(other),
        });
        // `taints` has 8 bytes since about v4.10.
        let taints = match self.member("module", "taints").and_then(|member| member.size) {
            Some(4) => word("taints").map(u64::from),
            _ => pointer("taints"),
        };
        let mut module = Module {
            at,
            name: self.module_name(at).unwrap_or_else(|| format!("module at {at}")),
            state,
            uses: word("refcnt").map(|count| (count as i32).wrapping_sub(REF_BASE)),
            taints,
            regions: self.regions(at),
            build_id: None,
            per_cpu: pointer("percpu").zip(word("percpu_size").map(u64::from)).filter(|&(_, size)| size != 0),
            used_by: self.users(at),
            symbols: OnceLock::new(),
            debug_info: OnceLock::new(),
        };
        module.build_id = self.module_build_id(&module);
        module
    }

    fn regions(&self, at: VirtAddr) -> Vec<Region> {
        // Since Linux commit ac3b43283923 ("module: replace module_layout with module_memory") (in v6.4).
        const KINDS: [&str; 7] =
            ["text", "data", "rodata", "ro_after_init", "init_text", "init_data", "init_rodata"];
        let mut found: Vec<(&'static str, Option<u64>, Option<u64>)> = Vec::new();
        if let Some(mem) = self.member("module", "mem") {
            let stride = mem.size.unwrap_or(0) / KINDS.len() as u64;
            let base = self.offset("module_memory", "base");
            let size = self.offset("module_memory", "size");
            for (i, kind) in (0..).zip(KINDS) {
                let here = at.wrapping_add(mem.offset).wrapping_add(stride * i);
                let start = base.and_then(|offset| self.read_u64(here.wrapping_add(offset)));
                let size = size.and_then(|offset| self.read_u32(here.wrapping_add(offset)));
                found.push((kind, start, size.map(u64::from)));
            }
        } else {
            let read = |base: &str, size: &str| {
                let base = self.module_member(at, base).and_then(|at| self.read_u64(at));
                (base, self.module_member(at, size).and_then(|at| self.read_u32(at)).map(u64::from))
            };
            let either = |new: (&str, &str), old: (&str, &str)| {
                // Since Linux commit 7523e4dc5057 ("module: use a structure to encapsulate layout.") (in v4.5).
                if self.member("module", new.0).is_some() { read(new.0, new.1) } else { read(old.0, old.1) }
            };
            let core = either(("core_layout.base", "core_layout.size"), ("module_core", "core_size"));
            let init = either(("init_layout.base", "init_layout.size"), ("module_init", "init_size"));
            found.extend([("core", core.0, core.1), ("init", init.0, init.1)]);
        }
        let region = |(kind, start, size): (&'static str, Option<u64>, Option<u64>)| {
            let (start, size) = (start?, size?);
            (start != 0 && (1..=REGION_MAX).contains(&size)).then_some(Region {
                kind,
                start: VirtAddr(start),
                size,
            })
        };
        found.into_iter().filter_map(region).collect()
    }

    /// Modules that use the one at `at`: `struct module_use` hangs in a list of each of the two.
    fn users(&self, at: VirtAddr) -> Vec<String> {
        let users = || {
            let head = self.module_member(at, "source_list")?;
            let (entry, source) =
                (self.offset("module_use", "source_list")?, self.offset("module_use", "source")?);
            let entries = self.list(head).nodes.into_iter().take(USERS_MAX);
            let user = |at: VirtAddr| {
                let user = self.read_u64(VirtAddr(at.0.wrapping_sub(entry)).wrapping_add(source))?;
                self.module_name(VirtAddr(user))
            };
            Some(entries.filter_map(user).collect())
        };
        users().unwrap_or_default()
    }

    fn module_build_id(&self, module: &Module) -> Option<String> {
        // With CONFIG_STACKTRACE_BUILD_ID, in about v5.14; else it is still in the section.
        let told =
            self.module_member(module.at, "build_id").and_then(|at| self.read_array::<BUILD_ID_SIZE>(at));
        if let Some(id) = told.filter(|id| id.iter().any(|&b| b != 0)) {
            return Some(id.iter().map(|byte| format!("{byte:02x}")).collect());
        }
        let sections = self.module_sections(module).ok()?;
        let section = sections.iter().find(|section| section.name == ".note.gnu.build-id")?;
        let mut note = [0; 12 + 4 + BUILD_ID_SIZE];
        let filled = self.read(section.at, &mut note).filled;
        build_id_in_notes(note.get(..filled)?)
    }

    /// Where the sections of `module` were put, as `/sys/module/NAME/sections` has it.
    pub fn module_sections(&self, module: &Module) -> Result<Vec<Section>, NoSections> {
        let attributes = || {
            let pointer =
                self.read_u64(self.module_member(module.at, "sect_attrs")?).filter(|&at| at != 0)?;
            Some((VirtAddr(pointer), SectionAttributes::of(self)?))
        };
        let (at, layout) = attributes().ok_or(NoSections::NotKept)?;
        let word = |at: VirtAddr| match self.read(at, &mut [0; 8]).stopped {
            None => self.read_u64(at).ok_or(NoSections::NotKept),
            Some(error) => Err(NoSections::Unreadable { at, why: error.to_string() }),
        };
        let array = VirtAddr(word(at.wrapping_add(layout.group))?);
        let mut sections = Vec::new();
        for i in 0..SECTIONS_MAX as u64 {
            let attribute = VirtAddr(word(array.wrapping_add(8 * i))?);
            if attribute.0 == 0 {
                break;
            }
            let name = self.read_u64(attribute.wrapping_add(layout.name)).map(VirtAddr);
            let address = self.read_u64(attribute.wrapping_add(layout.address));
            if let (Some(name), Some(address)) = (name.and_then(|at| self.read_text(at, 256)), address) {
                sections.push(Section { name, at: VirtAddr(address) });
            }
        }
        Ok(sections)
    }

    /// A C string of fewer than `max` bytes, shown lossily.
    fn read_text(&self, at: VirtAddr, max: usize) -> Option<String> {
        let mut text = vec![0; max];
        let filled = self.read(at, &mut text).filled;
        let text = text.get(..filled)?;
        let end = text.iter().position(|&b| b == 0)?;
        Some(String::from_utf8_lossy(text.get(..end)?).into_owned())
    }

    /// Symbols of `module` at run-time addresses; empty where the kernel keeps none. Read once.
    pub fn module_symbols<'a>(&self, module: &'a Module) -> &'a SymbolTable {
        module.symbols.get_or_init(|| self.read_symbols(module).unwrap_or_default())
    }

    fn read_symbols(&self, module: &Module) -> Option<SymbolTable> {
        let kallsyms = self.read_u64(self.module_member(module.at, "kallsyms")?).map(VirtAddr)?;
        let member = |name| Some(kallsyms.wrapping_add(self.offset("mod_kallsyms", name)?));
        let pointer = |name| self.read_u64(member(name)?).filter(|&at| at != 0).map(VirtAddr);
        let count = u64::from(self.read_u32(member("num_symtab")?)?).min(SYMBOLS_MAX);
        let some = |at: VirtAddr, len: u64| {
            let mut bytes = vec![0; len as usize];
            let filled = self.read(at, &mut bytes).filled;
            bytes.truncate(filled);
            bytes
        };
        let symtab = some(pointer("symtab")?, count * ELF_SYM as u64);
        // Nobody tells how long the strings are: to the last name, and some more for the name itself.
        let last = symtab.chunks_exact(ELF_SYM).filter_map(|symbol| u32_at(symbol, 0)).max()?;
        let strings = some(pointer("strtab")?, (u64::from(last) + 512).min(STRINGS_MAX));
        // Since Linux commit 1c7651f43777 ("kallsyms: store type information in its own array") (in v5.2).
        let letters = pointer("typetab").map(|at| some(at, count));
        Some(SymbolTable::from_elf_with_letters(&symtab, strings, &letters.unwrap_or_default()))
    }

    /// The bytes of `module`'s BTF, which counts on from the kernel's; `None` where it has none or they cannot be read.
    ///
    /// `struct module` forgets its own once the module is loaded; the copy in `btf_modules` (`kernel/bpf/btf.c`) stays, and
    /// is the one whose ids the kernel has translated for modules that were built outside its tree. Since v5.11.
    pub fn module_btf(&self, module: &Module) -> Option<Vec<u8>> {
        let entries = self.list(self.symbol("btf_modules")?).nodes;
        let of_module = entries.into_iter().find_map(|node| {
            let node = self.object("btf_module", node).ok()?;
            let entry = node.container_of("btf_module", "list").ok()?;
            (entry.member("module").ok()?.pointer().ok()? == module.at).then_some(entry)
        })?;
        let btf = of_module.at("btf").ok()??;
        let len = btf.get("data_size").ok()?;
        let mut bytes = vec![0; usize::try_from(len).ok().filter(|len| (1..=BTF_MAX).contains(len))?];
        let at = btf.member("data").and_then(|data| data.pointer()).ok()?;
        self.read(at, &mut bytes).stopped.is_none().then_some(bytes)
    }
}

/// Where a kernel keeps the sections' names and addresses: offsets in bytes. The structures changed over time, but
/// all have an array of pointers to attributes, which ends in NULL.
struct SectionAttributes {
    /// From `struct module_sect_attrs` to the pointer to that array.
    group: u64,
    /// From an attribute to the pointer to its name.
    name: u64,
    /// From an attribute to the section's address; an attribute lies inside a structure with more, so it wraps.
    address: u64,
}

impl SectionAttributes {
    fn of(kernel: &Kernel) -> Option<Self> {
        let offset = |container: &str, path: &str| kernel.offset(container, path);
        let address = offset("module_sect_attr", "address");
        // Since Linux commit ed66f991bb19 ("module: Refactor section attr into bin attribute") (in v5.8).
        let binary = offset("module_sect_attr", "battr");
        let group = |names: &[&str]| names.iter().find_map(|name| offset("module_sect_attrs", name));
        match (address, binary) {
            // Since about v6.14 the address is the attribute's private pointer.
            (None, _) => Some(Self {
                group: group(&["grp.bin_attrs", "grp.bin_attrs_new"])?,
                name: offset("bin_attribute", "attr.name")?,
                address: offset("bin_attribute", "private")?,
            }),
            (Some(address), Some(binary)) => Some(Self {
                group: group(&["grp.bin_attrs", "grp.bin_attrs_new"])?,
                name: offset("bin_attribute", "attr.name")?,
                address: address.wrapping_sub(binary),
            }),
            (Some(address), None) => Some(Self {
                group: group(&["grp.attrs"])?,
                name: offset("attribute", "name")?,
                address: address.wrapping_sub(offset("module_sect_attr", "mattr.attr")?),
            }),
        }
    }
}
