//! kstub's own packets, which `scripts/kstub.py` sends: commands as JSON, and many pieces of memory at once.
//!
//! `qkstub.run:CPU:LINE` (CPU in decimal or empty for the selected one, LINE in hex) answers with the JSON of
//! [`crate::command::envelope`] in hex. `qkstub.read:ADDR,LEN;ADDR,LEN;...` (hex) answers with one field each,
//! `;` between: the bytes in hex, as many as can be read. `qkstub.supported` names them.

use super::memory::{self, Space};
use super::target::errno;
use crate::command::{self, Context};
use crate::kernel::{CpuId, Machine};
use crate::rsp;

/// The most bytes that one `qkstub.read` brings; what is longer is cut, as with `m`.
const READ_MAX: usize = 4 << 20;

/// Answers `body` if it is one of these packets.
pub(super) fn answer(context: &Context<'_>, space: Space, body: &[u8]) -> Option<Result<Vec<u8>, u8>> {
    if body == b"qkstub.supported" {
        return Some(Ok(b"run;read".to_vec()));
    }
    if let Some(request) = body.strip_prefix(b"qkstub.run:") {
        return Some(run(context, request).ok_or(errno::EINVAL));
    }
    let request = body.strip_prefix(b"qkstub.read:")?;
    Some(Ok(read(context.machine, space, request)))
}

fn run(context: &Context<'_>, request: &[u8]) -> Option<Vec<u8>> {
    let colon = request.iter().position(|&byte| byte == b':')?;
    let (cpu, line) = (request.get(..colon)?, request.get(colon + 1..)?);
    let cpu = match std::str::from_utf8(cpu).ok()? {
        "" => context.cpu,
        number => CpuId(number.parse().ok()?),
    };
    context.machine.cpu(cpu)?;
    let line = String::from_utf8_lossy(&rsp::decode(line)?).into_owned();
    let result = command::run(&Context { cpu, ..*context }, line.trim());
    let mut body = Vec::new();
    rsp::encode(command::envelope(line.trim(), &result).to_string().as_bytes(), &mut body);
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
