//! What the files are that the user named: one dump, the parts of a split one, or raw images.
//!
//! The only place where that is decided. Never opens a file that was not named: parts that were forgotten are
//! only pointed out.

use super::elf::ElfCore;
use super::error::Error;
use super::file::{DiskFile, ReadAt, Source};
use super::flattened::{Cut, Flattened};
use super::kdump::Kdump;
use super::probe::{self, Format};
use super::raw::{self, RawImage};
use super::{About, DEFAULT_CACHE_BYTES, Vmcore, lime};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// So many files of a directory are looked at for forgotten parts.
const MAX_SIBLINGS: usize = 1024;

/// A file and what was found out before its format.
pub(super) struct File {
    pub source: Source,
    pub format: Format,
    /// Number of records, if it is a flattened stream.
    pub records: Option<u64>,
    /// Why the stream is incomplete.
    pub problem: Option<String>,
}

impl File {
    fn open(path: &Path) -> Result<Self, Error> {
        Self::new(path, Arc::new(DiskFile::open(path)?))
    }

    /// Looks at the start of `file`; `path` is its name in errors.
    pub fn new(path: &Path, file: Arc<dyn ReadAt>) -> Result<Self, Error> {
        let mut source = Source { path: path.to_path_buf(), file };
        let (mut records, mut problem) = (None, None);
        if probe::is_flattened(&source) {
            let stream = Arc::new(Flattened::open(&source)?);
            problem = stream.cut().map(|Cut { offset, why }| {
                format!(
                    "the flattened stream is incomplete: {why} (offset {offset:#x}), and what it did not \
                     write reads as truncated; copy or take the dump again"
                )
            });
            records = Some(stream.records());
            source.file = stream;
        }
        Ok(Self { format: probe::format(&source)?, source, records, problem })
    }
}

impl Vmcore {
    /// Opens what the user named: one dump, all parts of a split one in any order, or raw images as
    /// `FILE@PHYSADDR`.
    pub fn open_arguments(arguments: &[OsString]) -> Result<Self, Error> {
        let mut images = Vec::new();
        let mut paths = Vec::new();
        for argument in arguments {
            match RawImage::parse(argument)? {
                Some(image) => images.push(image),
                None => paths.push(PathBuf::from(argument)),
            }
        }
        match (images.first(), paths.first()) {
            (None, None) => Err(Error::Nothing),
            (Some(_), Some(path)) => Err(Error::NotAPart { path: path.clone() }),
            (None, _) => Self::open_parts(&paths),
            (Some(first), None) => {
                let about =
                    About { path: first.path.clone(), format: "raw", records: None, problems: Vec::new() };
                Ok(Self::new(about, raw::open(images, DEFAULT_CACHE_BYTES)?.into()))
            }
        }
    }

    /// Opens one dump, or all parts of a split one in any order.
    pub fn open_parts(paths: &[PathBuf]) -> Result<Self, Error> {
        let files = paths.iter().map(|path| File::open(path)).collect::<Result<Vec<_>, _>>()?;
        let flattened = files.iter().any(|file| file.records.is_some());
        let vmcore = Self::of_files(files, DEFAULT_CACHE_BYTES)?;
        if let Some(kdump) = vmcore.body.kdump().filter(|kdump| !kdump.missing().is_empty()) {
            forgotten_parts(paths, kdump, flattened)?;
        }
        Ok(vmcore)
    }

    /// Opens files whose formats are known.
    pub(super) fn of_files(files: Vec<File>, cache_bytes: u64) -> Result<Self, Error> {
        let Some(first) = files.first() else { return Err(Error::Nothing) };
        let format = first.format;
        let mut about = About {
            path: first.source.path.clone(),
            format: format.name(),
            records: None,
            problems: Vec::new(),
        };
        let alone = files.len() == 1;
        let mut sources = Vec::new();
        for file in files {
            if !alone && file.format != Format::Kdump {
                return Err(Error::NotAPart { path: file.source.path });
            }
            if let Some(records) = file.records {
                about.records = Some(about.records.unwrap_or(0).saturating_add(records));
            }
            about.problems.extend(file.problem);
            sources.push(file.source);
        }
        let contents = match (format, sources.pop()) {
            (_, None) => return Err(Error::Nothing),
            (Format::Elf, Some(source)) => ElfCore::open(source, cache_bytes)?.into(),
            (Format::Lime, Some(source)) => lime::open(source, cache_bytes)?.into(),
            (Format::Kdump, Some(last)) => {
                sources.push(last);
                Kdump::open(sources, cache_bytes)?.into()
            }
        };
        Ok(Self::new(about, contents))
    }
}

/// An error that names parts beside those of `kdump` that would complete it, if there are any.
fn forgotten_parts(paths: &[PathBuf], kdump: &Kdump, flattened: bool) -> Result<(), Error> {
    let mut found: Vec<(u64, PathBuf)> = kdump.parts().map(|(start, path)| (start, path.into())).collect();
    let named = found.len();
    for dir in directories(paths) {
        let Ok(entries) = std::fs::read_dir(&dir) else { continue };
        for entry in entries.take(MAX_SIBLINGS).filter_map(Result::ok) {
            // As the user would write it.
            let path = if dir == Path::new(".") { entry.file_name().into() } else { entry.path() };
            let Ok(file) = DiskFile::open(&path) else { continue };
            let source = Source { path: path.clone(), file: Arc::new(file) };
            let file = if probe::is_flattened(&source) {
                // Told apart only after its records are counted, which takes a while.
                if flattened { File::open(&path).ok() } else { None }
            } else {
                File::new(&path, Arc::clone(&source.file)).ok()
            };
            let Some(file) = file.filter(|file| file.format == Format::Kdump) else { continue };
            let start = kdump.completes(&file.source);
            if let Some(start) = start.filter(|start| found.iter().all(|(other, _)| other != start)) {
                found.push((start, path));
            }
        }
    }
    if found.len() == named {
        return Ok(());
    }
    found.sort();
    let path = paths.first().cloned().unwrap_or_default();
    Err(Error::MoreParts { path, parts: found.into_iter().map(|(_, path)| path).collect() })
}

/// The directories that the files lie in, each once.
fn directories(paths: &[PathBuf]) -> Vec<PathBuf> {
    let mut dirs: Vec<PathBuf> = paths
        .iter()
        .map(|path| match path.parent() {
            Some(dir) if !dir.as_os_str().is_empty() => dir.to_path_buf(),
            _ => PathBuf::from("."),
        })
        .collect();
    dirs.sort();
    dirs.dedup();
    dirs
}
