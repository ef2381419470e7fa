//! The user stack of a task: from the registers that it entered the kernel with, through the unwind tables of its
//! programs where their pages are present, else through frame pointers.
//!
//! Never scans: a user stack has no guard against a wrong guess. Source: the System V ABI for x86-64, 3.4 (frames);
//! `arch/x86/kernel/signal_64.c` (`rt_sigreturn` frames are described by the vdso's and libc's tables).

use super::user_image::UserImage;
use super::vma::{Vma, Vmas};
use super::{Kernel, ObjectError};
use crate::addr::VirtAddr;
use crate::arch::x86_64::disasm;
use crate::debuginfo::cfi::CfiRow;
use crate::debuginfo::orc::OrcEntry;
use crate::unwind::{Frame, FrameSource, Regs, Stack, Step, Tables, by_frame_pointer, step};
use std::cell::RefCell;
use std::collections::HashMap;

/// Deepest user stack shown.
const FRAMES_MAX: usize = 512;
/// Files looked at.
const IMAGES_MAX: usize = 256;
/// Longest call instruction, with an operand in memory and a prefix.
const CALL_MAX: u64 = 8;

/// One frame of a user stack.
#[derive(Clone, Debug)]
pub struct UserFrame {
    /// The frame.
    pub frame: Frame,
    /// The function and how far into it; untrusted text.
    pub symbol: Option<(String, u64)>,
    /// The file or area that the code is in; untrusted text.
    pub module: Option<String>,
}

/// A user stack.
#[derive(Clone, Debug, Default)]
pub struct UserTrace {
    /// Innermost first.
    pub frames: Vec<UserFrame>,
    /// Why it ends, half a sentence; `None` if its outermost frame is one that has no caller.
    pub problem: Option<String>,
}

struct Space<'k> {
    kernel: &'k Kernel,
    mm: VirtAddr,
    areas: Vec<Vma>,
    /// By start of the area that led to them; `None` is one that has none.
    images: RefCell<HashMap<u64, Option<UserImage<'k>>>>,
}

impl Space<'_> {
    fn area(&self, at: u64) -> Option<&Vma> {
        self.areas.iter().find(|area| (area.start..area.end).contains(&at))
    }

    /// `f` of the file that `at` is in.
    fn with_image<R>(&self, at: u64, f: impl Fn(&UserImage<'_>) -> Option<R>) -> Option<R> {
        let start = self.area(at)?.start;
        let mut images = self.images.borrow_mut();
        if images.len() > IMAGES_MAX {
            return None;
        }
        let image =
            images.entry(start).or_insert_with(|| UserImage::find(self.kernel, self.mm, &self.areas, at));
        f(image.as_ref()?)
    }
}

impl Stack for Space<'_> {
    fn word(&self, at: u64) -> Option<u64> {
        let mut word = [0; 8];
        let read = self.kernel.read_user(self.mm, VirtAddr(at), &mut word).ok()?;
        read.stopped.is_none().then(|| u64::from_le_bytes(word))
    }
}

impl Tables for Space<'_> {
    fn orc(&self, _: u64) -> Option<OrcEntry> {
        None
    }

    fn cfi(&self, pc: u64) -> Option<CfiRow> {
        self.with_image(pc, |image| image.cfi(pc))
    }

    /// Any of the lengths that a call can have; the code may be in no page that is present, which is no proof against.
    fn follows_call(&self, pc: u64) -> bool {
        self.area(pc).is_some_and(|area| area.permissions().contains('x'))
            && (2..=CALL_MAX).any(|len| {
                let mut code = vec![0; len as usize];
                let at = pc.wrapping_sub(len);
                let read = self.kernel.read_user(self.mm, VirtAddr(at), &mut code);
                match read {
                    Ok(read) if read.stopped.is_none() => disasm::decode(&code, at, disasm::Syntax::Att)
                        .first()
                        .is_some_and(|one| one.bytes.len() as u64 == len && one.text.contains("call")),
                    _ => true,
                }
            })
    }
}

impl Kernel {
    /// The user stack below `regs`, the user registers of a task whose `mm` this is.
    pub fn user_trace(&self, mm: VirtAddr, regs: Regs) -> Result<UserTrace, ObjectError> {
        let Vmas { areas, problem } = self.vmas(mm)?;
        let space = Space { kernel: self, mm, areas, images: RefCell::new(HashMap::new()) };
        let mut trace = UserTrace::default();
        const WHY: &str = "the registers that it entered the kernel with";
        let Some(mut frame) = Frame::first(regs, FrameSource::PtRegs, WHY) else {
            trace.problem = Some("its user registers are not known".to_owned());
            return Ok(trace);
        };
        loop {
            let pc = frame.lookup_pc();
            let area = space.area(pc);
            let symbol = space
                .with_image(pc, |image| image.symbolize(pc).map(|(name, offset)| (name.to_owned(), offset)));
            let module = area.and_then(|area| match &area.file {
                Some((_, info)) => Some(info.shown()),
                None => area.name.clone(),
            });
            let is_code = area.is_some_and(|area| area.permissions().contains('x'));
            let next = match step(&mut frame, &space, &space) {
                Ok(Step::Caller(caller)) => Ok(caller),
                // The outermost function says that it has no caller by having no return address.
                Err(crate::unwind::NoStep::Undefined) => Err(None),
                Ok(_) => Err(None),
                Err(no) => match by_frame_pointer(&mut frame, &space, &space) {
                    Some(Step::Caller(caller)) => Ok(caller),
                    _ => Err(Some(format!("{no}, and rbp leads nowhere"))),
                },
            };
            let sp = frame.sp;
            trace.frames.push(UserFrame { frame, symbol, module });
            if !is_code {
                trace.problem = Some(match (area, problem) {
                    // Not all that it has mapped may be known.
                    (None, Some(problem)) => format!("what code its pc is in is not known: {problem}"),
                    _ => "its pc is in no code that the process has mapped".to_owned(),
                });
                break;
            }
            match next {
                Ok(caller) if caller.pc == 0 => break,
                Ok(caller) if caller.sp <= sp => {
                    trace.problem = Some("the stack does not go on upwards".to_owned());
                    break;
                }
                Ok(_) if trace.frames.len() >= FRAMES_MAX => {
                    trace.problem = Some(format!("more than {FRAMES_MAX} frames"));
                    break;
                }
                Ok(caller) => frame = caller,
                Err(problem) => {
                    trace.problem = problem;
                    break;
                }
            }
        }
        Ok(trace)
    }
}
