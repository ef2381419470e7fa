//! kstub's own packets, which `scripts/kstub.py` sends: commands as JSON, and many pieces of memory at once.
//!
//! `qkstub.run:THREAD:LINE` (a thread-id, or nothing for the selected one; LINE in hex) answers with the JSON of
//! [`crate::command::envelope`] in hex, `qkstub.text:THREAD:LINE` with the text for people.
//! `qkstub.read:ADDR,LEN;ADDR,LEN;...` (hex) answers with one field each, `;` between: the bytes in hex, as many as can be
//! read. `qkstub.unwind:THREAD` answers with the JSON of [`super::frames`] in hex. `qkstub.kernel` answers with a number (hex)
//! that is another once there is another kernel, or the guest was started again; [`super::front`] does.
//! `qkstub.supported` names them.

use super::frames;
use super::memory::{self, Space};
use super::target::{Target, errno};
use super::threads::{Choice, Thread};
use crate::command::{self, CommandError, Form, Output};
use crate::kernel::Machine;
use crate::rsp;

/// The most bytes that one `qkstub.read` brings; what is longer is cut, as with `m`.
const READ_MAX: usize = 4 << 20;

/// Answers `body` if it is one of these packets.
pub(super) fn answer(target: &Target, space: Space, body: &[u8]) -> Option<Result<Vec<u8>, u8>> {
    if body == b"qkstub.supported" {
        return Some(Ok(b"run;text;read;unwind;kernel".to_vec()));
    }
    if let Some(request) = body.strip_prefix(b"qkstub.run:") {
        let json = |line: &str, result| command::envelope(line, result).to_string();
        return Some(run(target, request, Form::Json, json).ok_or(errno::EINVAL));
    }
    if let Some(request) = body.strip_prefix(b"qkstub.text:") {
        let text =
            |_: &str, result: Answer| result.map_or_else(|error| format!("{error}\n"), |output| output.text);
        return Some(run(target, request, Form::Text, text).ok_or(errno::EINVAL));
    }
    if let Some(id) = body.strip_prefix(b"qkstub.unwind:") {
        let frames =
            thread(target, id).and_then(|thread| frames::of(&target.machine, &target.threads, thread));
        return Some(frames.map(|frames| hex(&frames.to_string())).ok_or(errno::ESRCH));
    }
    let request = body.strip_prefix(b"qkstub.read:")?;
    Some(Ok(read(&target.machine, space, request)))
}

type Answer = Result<Output, CommandError>;

fn run(
    target: &Target,
    request: &[u8],
    form: Form,
    render: impl Fn(&str, Answer) -> String,
) -> Option<Vec<u8>> {
    let colon = request.iter().position(|&byte| byte == b':')?;
    let (id, line) = (request.get(..colon)?, request.get(colon + 1..)?);
    let thread = thread(target, id)?;
    let line = String::from_utf8_lossy(&rsp::decode(line)?).into_owned();
    let result = command::run(&target.context(thread, form), line.trim());
    Some(hex(&render(line.trim(), result)))
}

/// The thread with this thread-id; without one the selected one.
fn thread(target: &Target, id: &[u8]) -> Option<Thread> {
    match id {
        b"" => Some(target.selected),
        id => match Choice::parse(id)? {
            Choice::One(thread) if target.threads.has(thread) => Some(thread),
            _ => None,
        },
    }
}

fn hex(text: &str) -> Vec<u8> {
    let mut body = Vec::new();
    rsp::encode(text.as_bytes(), &mut body);
    body
}

fn read(machine: &Machine, space: Space, request: &[u8]) -> Vec<u8> {
    let mut left = READ_MAX;
    let (mut body, mut room) = (Vec::new(), Vec::new());
    for (i, piece) in request.split(|&byte| byte == b';').enumerate() {
        if i > 0 {
            body.push(b';');
        }
        // An unreadable piece is an empty field.
        let bytes = memory::read(machine, space, piece, left, &mut room).unwrap_or_default();
        left -= bytes.len().min(left);
        rsp::encode(bytes, &mut body);
    }
    body
}
