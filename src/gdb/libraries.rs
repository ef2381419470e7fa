//! Modules as gdb's shared libraries: a file for each, and where its sections are.
//!
//! A module's own file if one has its build-id, else one made of the names in the kernel's memory; the same for the
//! kernel image where there is no vmlinux. Made when a client first asks. One more has no code, but call frame
//! information of the kernel's entry code.
//! Source: GDB manual, "Library List Format"; gdb `solib-target.c` (one address for each section that is loaded,
//! empty ones too, in the order of the file); `Documentation/arch/x86/x86_64/mm.rst` (the hole at the top).

use super::module_index::{Indexable, ModuleIndexes, Wanted};
use super::private::PrivateDirectory;
use super::threads::xml_escape;
use crate::addr::VirtAddr;
use crate::debuginfo::call_frames::{self, Rule};
use crate::debuginfo::find::{LoadedSection, ModuleFile, ModuleFiles, Places};
use crate::debuginfo::{Contents, synth};
use crate::kernel::module::{Module, Region};
use crate::kernel::{Kernel, Machine};
use std::collections::HashMap;
use std::fmt::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

/// Nothing is ever mapped in the last 2 MiB: where gdb is told that sections are which are nowhere any more.
const HOLE: u64 = 0xffff_ffff_ffe0_0000;
/// Its length in bytes, but for the last page: gdb takes the end of the address space for damage.
const HOLE_LEN: u64 = (2 << 20) - 4096;

/// Code that is nowhere, for frames between two contexts: at the end of the hole below the kernel image.
const FRAMES: u64 = 0xffff_ffff_8000_0000 - 4096;
const FRAMES_LEN: u64 = 64;
/// The pc of frames between an interrupt's and what it interrupted; gdb also looks at the byte before.
pub(super) const INTERRUPTED: u64 = FRAMES + 8;
/// What stands for a user's code.
const USER_MODE: u64 = FRAMES + 16;

/// Bytes of files that are copied because gdb cannot take them as they are.
const COPIES_MAX: u64 = 2 << 30;

/// The directory of their indexes, beside the files that are made.
const INDEXES: &str = "index";

/// The kernel's modules as files. Cheap to clone: every session has one.
#[derive(Clone)]
pub struct Libraries(Arc<Inner>);

struct Inner {
    machine: Arc<Machine>,
    own: OnceLock<Vec<Option<Own>>>,
    list: OnceLock<List>,
    image: OnceLock<Option<PathBuf>>,
    shared: Arc<Shared>,
}

/// What stays when a guest goes on.
struct Shared {
    places: Places,
    indexes: Option<ModuleIndexes>,
    /// Where files are written that there were none of; removed in the end.
    directory: OnceLock<Option<PrivateDirectory>>,
    /// Of each file in it that is not made anew each time, what it was made of.
    made_of: Mutex<HashMap<PathBuf, String>>,
}

/// A module's own file.
struct Own {
    file: ModuleFile,
    /// Where its sections are.
    addresses: Vec<u64>,
    /// How gdb is to index it, if that is of use.
    index: Option<Indexable>,
}

impl Own {
    /// Where its code is.
    fn code(&self) -> Vec<u64> {
        let sections = std::iter::zip(&self.file.sections, &self.addresses);
        sections.filter(|(section, _)| section.is_code()).map(|(_, &at)| at).collect()
    }
}

struct List {
    xml: String,
    paths: Vec<PathBuf>,
}

impl Default for List {
    /// Of no modules: gdb wants a document all the same.
    fn default() -> Self {
        Self { xml: "<library-list version=\"1.0\"></library-list>\n".to_owned(), paths: Vec::new() }
    }
}

/// Addresses in the hole, for as many sections as fit side by side.
struct Nowhere(u64);

impl Nowhere {
    fn take(&mut self, size: u64) -> u64 {
        let size = size.clamp(1, HOLE_LEN).next_multiple_of(64);
        if self.0 + size > HOLE_LEN {
            self.0 = 0;
        }
        let at = HOLE + self.0;
        self.0 += size;
        at
    }
}

impl Libraries {
    /// The modules of the kernel in `machine`; their files are looked for in `places` too. If all is for one `gdb`, of this
    /// name or path, there are indexes for it.
    pub fn new(machine: Arc<Machine>, places: Places, gdb: Option<&Path>) -> Self {
        let indexes = gdb.and_then(ModuleIndexes::of);
        let (directory, made_of) = Default::default();
        Self::at(machine, Arc::new(Shared { places, indexes, directory, made_of }))
    }

    fn at(machine: Arc<Machine>, shared: Arc<Shared>) -> Self {
        let (own, list, image) = Default::default();
        Self(Arc::new(Inner { machine, own, list, image, shared }))
    }

    /// The modules of the same kernel at another moment. Files that were made are made anew where they are asked for
    /// again, and gdb may still have the old ones open.
    pub(super) fn again(&self, machine: Arc<Machine>) -> Self {
        Self::at(machine, Arc::clone(&self.0.shared))
    }

    /// How many modules gdb has yet to index.
    pub fn unindexed(&self) -> usize {
        let has = |module| self.0.shared.indexes.as_ref().is_none_or(|indexes| indexes.has(module));
        self.0.own().iter().flatten().filter_map(|own| own.index.as_ref()).filter(|index| !has(index)).count()
    }

    /// Writes all files; modules that gdb has yet to index are, and `progress` is called meanwhile.
    pub fn prepare(&self, progress: &mut dyn FnMut(Duration)) {
        self.0.list(Some(progress));
    }

    /// The directory that is to be gdb's index cache while it reads the modules; `None` if it would be empty.
    pub fn index_cache(&self) -> Option<PathBuf> {
        self.0.shared.indexes.as_ref()?;
        self.0.own().iter().flatten().find(|own| own.index.is_some())?;
        self.0.shared.path(INDEXES)
    }

    /// A file with the names of the kernel image, made from its memory; `None` where it has none.
    /// It lasts as long as `self` or a clone of it, or until another kernel's is made.
    pub fn image(&self) -> Option<PathBuf> {
        let make = || {
            let kernel = self.0.machine.kernel()?;
            let found = kernel.found();
            let write = |path: &Path| match image(kernel) {
                Some(image) => std::fs::write(path, image).map(|()| true),
                None => Ok(false),
            };
            let path = self.0.shared.path("vmlinux")?;
            self.0.shared.once(path, format!("{} {:?}", found.release, found.build_id), &write)
        };
        self.0.image.get_or_init(make).clone()
    }

    /// `qXfer:libraries:read`: the document.
    pub(super) fn xml(&self) -> &str {
        &self.0.list(None).xml
    }

    /// The file that was named `name`.
    pub(super) fn open(&self, name: &[u8]) -> Option<Contents> {
        let image = self.0.image.get().cloned().flatten();
        let list = self.0.list(None);
        let path = list.paths.iter().chain(&image).find(|path| path.as_os_str().as_bytes() == name)?;
        Contents::of_file(path).inspect_err(|error| tracing::warn!("'{}': {error}", path.display())).ok()
    }
}

impl Inner {
    /// With `progress`, gdb indexes what it has yet to.
    fn list(&self, progress: Option<&mut dyn FnMut(Duration)>) -> &List {
        self.list.get_or_init(|| {
            self.machine.kernel().map(|kernel| self.make_list(kernel, progress)).unwrap_or_default()
        })
    }

    /// Of each module of the kernel its own file, if there is one.
    fn own(&self) -> &[Option<Own>] {
        let find = |kernel: &Kernel| {
            let files =
                ModuleFiles::search(&kernel.found().release, &self.shared.places, self.machine.vmlinux());
            let mut nowhere = Nowhere(0);
            let own = |module: &Module| {
                let build_id = module.build_id.as_deref()?;
                let file = files.file(&module.name, build_id)?;
                let addresses = place(kernel, module, &file, &mut nowhere)?;
                let index = Indexable::new(build_id, &file);
                Some(Own { file, addresses, index })
            };
            kernel.modules().list.iter().map(own).collect()
        };
        self.own.get_or_init(|| self.machine.kernel().map(find).unwrap_or_default())
    }

    fn make_list(&self, kernel: &Kernel, progress: Option<&mut dyn FnMut(Duration)>) -> List {
        let mut room = COPIES_MAX;
        let all = std::iter::zip(&kernel.modules().list, self.own());
        let own = all.map(|(module, own)| {
            let own = own.as_ref()?;
            Some((own, self.for_gdb(module, &own.file, &mut room)?))
        });
        let own: Vec<_> = own.collect();
        self.index(own.iter().flatten(), progress);
        let modules = std::iter::zip(&kernel.modules().list, own).filter_map(|(module, own)| match own {
            Some((own, path)) => Some((path, own.addresses.clone())),
            None => self.made(kernel, module),
        });
        let modules: Vec<_> = modules.collect();
        let frames = self.shared.write("kstub-frames", &frames(kernel)).map(|path| (path, vec![FRAMES]));
        let mut list = List { xml: "<library-list version=\"1.0\">\n".to_owned(), paths: Vec::new() };
        for (path, addresses) in modules.into_iter().chain(frames) {
            let _ = writeln!(list.xml, "<library name=\"{}\">", xml_escape(&path.to_string_lossy()));
            for address in addresses {
                let _ = writeln!(list.xml, "  <section address=\"{address:#x}\"/>");
            }
            list.xml.push_str("</library>\n");
            list.paths.push(path);
        }
        list.xml.push_str("</library-list>\n");
        list
    }

    /// Puts what gdb has found in the modules' files where it looks for it. Without only speed is lost.
    fn index<'a>(
        &self,
        own: impl Iterator<Item = &'a (&'a Own, PathBuf)> + Clone,
        progress: Option<&mut dyn FnMut(Duration)>,
    ) {
        let Some((indexes, directory)) = self.shared.indexes.as_ref().zip(self.shared.path(INDEXES)) else {
            return;
        };
        let own = own.filter_map(|(own, file)| Some((own, Wanted { module: own.index.as_ref()?, file })));
        let missing: Vec<_> =
            own.clone().map(|(_, one)| one).filter(|one| !indexes.has(one.module)).collect();
        if let (Some(progress), false) = (progress, missing.is_empty()) {
            match indexes.make(&missing, progress) {
                Ok(made) => tracing::info!("gdb's indexes of modules: {made} of {} were made", missing.len()),
                Err(error) => tracing::warn!("no indexes of modules, so gdb starts slowly: {error}"),
            }
        }
        for (own, Wanted { module, .. }) in own {
            let code = own.code();
            let path = directory.join(module.cache_name());
            self.shared.once(path, format!("{code:x?}"), &|path| indexes.write(module, &code, path));
        }
    }

    /// The file, or a copy that gdb can take; takes from `room` what is copied.
    fn for_gdb(&self, module: &Module, file: &ModuleFile, room: &mut u64) -> Option<PathBuf> {
        if file.suits_gdb {
            return Some(file.path.clone());
        }
        *room = room.checked_sub(file.len)?;
        let path = self.shared.path(&format!("{}.ko.debug", module.name))?;
        let write = |path: &Path| file.write_for_gdb(path).map(|()| true);
        self.shared.once(path, format!("{:?}", module.build_id), &write)
    }

    /// A file for `module` made of the names in memory, and the addresses of its sections.
    fn made(&self, kernel: &Kernel, module: &Module) -> Option<(PathBuf, Vec<u64>)> {
        let names: Vec<String> = module.regions.iter().map(|region| format!(".{}", region.kind)).collect();
        // Before v6.4 one region holds code and data.
        let executable =
            |region: &Region| region.kind.contains("text") || matches!(region.kind, "core" | "init");
        let sections: Vec<_> = std::iter::zip(&module.regions, &names)
            .map(|(region, name)| synth::Section {
                name,
                address: region.start.0,
                size: region.size,
                executable: executable(region),
            })
            .collect();
        let symbols = kernel.module_symbols(module).iter().map(|symbol| synth::Named {
            name: symbol.name,
            address: symbol.addr,
            size: symbol.size,
            global: symbol.letter.is_ascii_uppercase(),
        });
        let file = synth::write(synth::Kind::Relocatable, &sections, symbols);
        let path = self.shared.write(&format!("{}.ko", module.name), &file)?;
        Some((path, sections.iter().map(|section| section.address).collect()))
    }
}

impl Shared {
    /// Writes a file of this name into the private directory.
    fn write(&self, name: &str, bytes: &[u8]) -> Option<PathBuf> {
        let path = self.path(name)?;
        // gdb may have mapped an earlier one.
        let _ = std::fs::remove_file(&path);
        let written = std::fs::write(&path, bytes);
        written.inspect_err(|error| tracing::warn!("'{}': {error}", path.display())).ok().map(|()| path)
    }

    /// The file at this path in the private directory, made by `write` unless it is of `what` already; `None` if `write` has
    /// nothing for it, or fails.
    fn once(
        &self,
        path: PathBuf,
        what: String,
        write: &dyn Fn(&Path) -> std::io::Result<bool>,
    ) -> Option<PathBuf> {
        let mut made_of = self.made_of.lock().unwrap_or_else(PoisonError::into_inner);
        if made_of.get(&path).is_some_and(|before| *before == what) {
            return Some(path);
        }
        // gdb may have mapped an earlier one, or look for it now.
        let new = path.with_extension("new");
        let made = path.parent().map_or(Ok(()), std::fs::create_dir_all).and_then(|()| write(&new));
        match made.and_then(|made| if made { std::fs::rename(&new, &path).map(|()| true) } else { Ok(false) })
        {
            Ok(true) => {
                made_of.insert(path.clone(), what);
                Some(path)
            }
            Ok(false) => None,
            Err(error) => {
                tracing::warn!("'{}': {error}", path.display());
                None
            }
        }
    }

    /// Where in the private directory a file of this name goes.
    fn path(&self, name: &str) -> Option<PathBuf> {
        let make = || {
            PrivateDirectory::new()
                .inspect_err(|error| tracing::warn!("no directory for files with symbols: {error}"))
                .ok()
        };
        // The name is the dump's word.
        let plain = |b: u8| b.is_ascii_alphanumeric() || b"_-.".contains(&b);
        if !name.bytes().all(plain) || name.starts_with('.') {
            return None;
        }
        Some(self.directory.get_or_init(make).as_ref()?.path().join(name))
    }
}

/// Addresses for all sections of `file`; `None` where the kernel does not tell.
fn place(kernel: &Kernel, module: &Module, file: &ModuleFile, nowhere: &mut Nowhere) -> Option<Vec<u64>> {
    let sections = kernel.module_sections(module);
    let sections = sections.inspect_err(|error| tracing::info!("module {}: {error}", module.name)).ok()?;
    let at: HashMap<&str, VirtAddr> = sections.iter().map(|s| (s.name.as_str(), s.at)).collect();
    let address = |LoadedSection { name, size, .. }: &LoadedSection| match at.get(name.as_str()) {
        // Sections for init are listed after they were freed.
        Some(&at) if *size != 0 && module.contains(at) => at.0,
        _ if name == ".data..percpu" => module.per_cpu.map_or_else(|| nowhere.take(*size), |(at, _)| at),
        _ => nowhere.take(*size),
    };
    Some(file.sections.iter().map(address).collect())
}

/// Call frame information of code that has none, and the code that stands for what lies between two contexts.
fn frames(kernel: &Kernel) -> Vec<u8> {
    let mut writer = call_frames::Writer::new(USER_MODE);
    writer.add(FRAMES, USER_MODE - FRAMES, Rule::Interrupted);
    writer.add(USER_MODE, FRAMES + FRAMES_LEN - USER_MODE, Rule::End);
    for (from, length, row) in kernel.assembly_rows() {
        writer.add(from, length, Rule::Orc(row));
    }
    let text = synth::Section { name: ".text", address: FRAMES, size: FRAMES_LEN, executable: true };
    let named = |name, address, size| synth::Named { name, address, size, global: false };
    let symbols = [
        named("interrupted", FRAMES, USER_MODE - FRAMES),
        named("user_mode", USER_MODE, FRAMES + FRAMES_LEN - USER_MODE),
    ];
    let debug = writer.finish();
    synth::write_with(synth::Kind::Relocatable, &[text], symbols.into_iter(), &[(".debug_frame", &debug)])
}

/// The names of the kernel image at link-time addresses, as a file.
fn image(kernel: &Kernel) -> Option<Vec<u8>> {
    let symbols = kernel.symbols().ok()?;
    let at = |name| symbols.lookup(name).map(|symbol| symbol.addr);
    let (text, end) = (at("_text").or(at("_stext"))?, at("_end")?);
    let etext = at("_etext").filter(|etext| (text..end).contains(etext))?;
    let init =
        at("_sinittext").zip(at("_einittext")).filter(|&(from, to)| etext <= from && from < to && to <= end);
    let (from, to) = init.unwrap_or((end, end));
    let section = |name, start, end: u64, executable| {
        let size = end.checked_sub(start).filter(|&size| size != 0)?;
        Some(synth::Section { name, address: start, size, executable })
    };
    let sections = [
        section(".text", text, etext, true),
        section(".rodata", etext, from, false),
        section(".init.text", from, to, true),
        section(".data", to, end, false),
    ];
    let sections: Vec<_> = sections.into_iter().flatten().collect();
    let symbols = symbols.iter().map(|symbol| synth::Named {
        name: symbol.name,
        address: symbol.addr,
        size: symbol.size,
        global: symbol.letter.is_ascii_uppercase(),
    });
    Some(synth::write(synth::Kind::Executable, &sections, symbols))
}
