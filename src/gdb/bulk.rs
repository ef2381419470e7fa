//! kstub's own packets, which `scripts/kstub.py` sends: commands as JSON, and many pieces of memory at once.
//!
//! `qkstub.run:THREAD:LINE` (a thread-id, or nothing for the selected one; LINE in hex) answers with the JSON of
//! [`crate::command::envelope`] in hex, `qkstub.text:THREAD:LINE` with the text for people. `qkstub.read:ADDR,LEN;ADDR,LEN;...` (hex) answers with one field each,
//! `;` between: the bytes in hex, as many as can be read. `qkstub.supported` names them.

use super::memory::{self, Space};
use super::target::{Target, errno};
use super::threads::Choice;
use crate::command::{self, CommandError, Output};
use crate::kernel::Machine;
use crate::rsp;

/// The most bytes that one `qkstub.read` brings; what is longer is cut, as with `m`.
const READ_MAX: usize = 4 << 20;

/// Answers `body` if it is one of these packets.
pub(super) fn answer(target: &Target, space: Space, body: &[u8]) -> Option<Result<Vec<u8>, u8>> {
    if body == b"qkstub.supported" {
        return Some(Ok(b"run;text;read".to_vec()));
    }
    if let Some(request) = body.strip_prefix(b"qkstub.run:") {
        let json = |line: &str, result| command::envelope(line, &result).to_string();
        return Some(run(target, request, json).ok_or(errno::EINVAL));
    }
    if let Some(request) = body.strip_prefix(b"qkstub.text:") {
        let text =
            |_: &str, result: Answer| result.map_or_else(|error| format!("{error}\n"), |output| output.text);
        return Some(run(target, request, text).ok_or(errno::EINVAL));
    }
    let request = body.strip_prefix(b"qkstub.read:")?;
    Some(Ok(read(&target.machine, space, request)))
}

type Answer = Result<Output, CommandError>;

fn run(target: &Target, request: &[u8], render: impl Fn(&str, Answer) -> String) -> Option<Vec<u8>> {
    let colon = request.iter().position(|&byte| byte == b':')?;
    let (thread, line) = (request.get(..colon)?, request.get(colon + 1..)?);
    let thread = match thread {
        b"" => target.selected,
        id => match Choice::parse(id)? {
            Choice::One(thread) if target.threads.has(thread) => thread,
            _ => return None,
        },
    };
    let line = String::from_utf8_lossy(&rsp::decode(line)?).into_owned();
    let result = command::run(&target.context(thread), line.trim());
    let mut body = Vec::new();
    rsp::encode(render(line.trim(), result).as_bytes(), &mut body);
    Some(body)
}

fn read(machine: &Machine, space: Space, request: &[u8]) -> Vec<u8> {
    let mut left = READ_MAX;
    let mut body = Vec::new();
    for (i, piece) in request.split(|&byte| byte == b';').enumerate() {
        if i > 0 {
            body.push(b';');
        }
        // An unreadable piece is an empty field.
        let bytes = memory::read(machine, space, piece, left).unwrap_or_default();
        left -= bytes.len().min(left);
        rsp::encode(&bytes, &mut body);
    }
    body
}
