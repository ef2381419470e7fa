//! A raw GDB client, and a stub that answers at once: both ends of the protocol, to measure the other end by.
//!
//! `rsp bulk ADDRESS FROM LENGTH m|x` reads memory as fast as the stub's packets allow; `rsp small ADDRESS FROM COUNT`
//! reads 8 bytes at a time; `rsp floor SOCKET FILE FROM` serves FILE's bytes at FROM from memory, with no other work:
//! what any stub would need at least. Prints JSON. `scripts/bench` runs it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use kstub::rsp;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Instant;

trait Stream: Read + Write {}
impl<T: Read + Write> Stream for T {}

struct Client {
    stream: Box<dyn Stream>,
    /// Room for a packet of any size; `..filled` has come, `..packet` is the last packet.
    input: Vec<u8>,
    filled: usize,
    packet: usize,
    acks: bool,
    packet_size: usize,
}

/// Room for several packets of any stub.
const INPUT: usize = 1 << 20;

/// How many requests for memory are under way at once.
const AHEAD: u32 = 2;

/// What the floor stub announces: as much as kstub.
const PACKET_SIZE: usize = kstub::gdb::MAX_REQUEST;

impl Client {
    fn connect(address: &str) -> Self {
        let stream: Box<dyn Stream> = if address.starts_with('/') {
            Box::new(UnixStream::connect(address).expect("connect"))
        } else {
            let stream = TcpStream::connect(address).expect("connect");
            stream.set_nodelay(true).expect("nodelay");
            Box::new(stream)
        };
        let mut client = Self {
            stream,
            input: vec![1; INPUT + SLACK],
            filled: 0,
            packet: 0,
            acks: true,
            packet_size: 0x400,
        };
        // As gdb introduces itself; QThreadEvents tells a stub that this is gdb.
        let mut features = client
            .ask(b"qSupported:multiprocess+;swbreak+;hwbreak+;qRelocInsn+;vContSupported+;QThreadEvents+");
        // QEMU tells that it stopped the guest for us, whenever that happens.
        while !features.starts_with(b"PacketSize") {
            features = client.receive().to_vec();
        }
        let features = String::from_utf8_lossy(&features).into_owned();
        let size = features.split(';').find_map(|f| f.strip_prefix("PacketSize=")).expect("PacketSize");
        client.packet_size = usize::from_str_radix(size, 16).expect("PacketSize");
        if features.contains("QStartNoAckMode+") {
            assert_eq!(client.ask(b"QStartNoAckMode"), b"OK");
            client.acks = false;
        }
        // By this a stub knows that run lengths are understood.
        client.ask(b"vMustReplyEmpty");
        client.ask(b"?");
        client
    }

    /// Sends a packet and returns the body of the answer, still escaped.
    fn ask(&mut self, body: &[u8]) -> Vec<u8> {
        self.stream.write_all(&rsp::frame(body)).expect("write");
        self.receive().to_vec()
    }

    /// The body of the next packet, still escaped.
    fn receive(&mut self) -> &[u8] {
        self.await_packet();
        self.body()
    }

    /// The body of the packet that has come.
    fn body(&self) -> &[u8] {
        let (from, len) = self.body_and_more();
        &from[..len]
    }

    /// The same with what is behind it, and its length.
    fn body_and_more(&self) -> (&[u8], usize) {
        let end = self.packet - 3;
        let start = memchr::memchr(b'$', &self.input[..end]).expect("a packet starts with $") + 1;
        (&self.input[start..], end - start)
    }

    /// Writes the bytes that the packet that has come answers with to the start of `out`; how many.
    fn decode(&self, binary: bool, out: &mut [u8]) -> usize {
        let (from, len) = self.body_and_more();
        match decode(from, len, binary, out) {
            Some(more) if more > 0 => more,
            _ => panic!("no memory: {}", String::from_utf8_lossy(self.body())),
        }
    }

    /// Waits for the packet after the one that has come, which is dropped. No packet is copied.
    fn await_packet(&mut self) {
        self.input.copy_within(self.packet..self.filled, 0);
        self.filled -= self.packet;
        let mut seen = 0;
        self.packet = loop {
            if let Some(at) = memchr::memchr(b'#', &self.input[seen..self.filled]).map(|at| seen + at)
                && self.filled >= at + 3
            {
                break at + 3;
            } else {
                seen = self.filled.saturating_sub(3);
            }
            let n = self.stream.read(&mut self.input[self.filled..INPUT]).expect("read");
            assert!(n > 0, "the stub closed the connection, or the packet is too long");
            self.filled += n;
        };
        if self.acks {
            self.stream.write_all(b"+").expect("write");
        }
    }

    /// Asks for `length` bytes at `at`.
    fn request(&mut self, at: u64, length: usize, binary: bool) {
        let request = format!("{}{at:x},{length:x}", if binary { 'x' } else { 'm' });
        self.stream.write_all(&rsp::frame(request.as_bytes())).expect("write");
    }
}

/// Writes the bytes of an answer to `m` or `x` to the start of `out`: run lengths and escapes, or digits, in one pass. `from` is
/// the body's `len` bytes with [`SLACK`] more behind it, and `out` has room for the answer as it is. How many, if it is an
/// answer.
fn decode(from: &[u8], len: usize, binary: bool, out: &mut [u8]) -> Option<usize> {
    let (mut at, mut filled, mut half) = (usize::from(binary), 0, None);
    if binary && !from.starts_with(b"b") {
        return None;
    }
    while at < len {
        // Behind a run is mostly the next one.
        let star = match from[at + 1] {
            b'*' if at + 1 < len => Some(at + 1),
            _ => memchr::memchr(b'*', &from[at..len]).map(|star| at + star),
        };
        let end = star.unwrap_or(len);
        filled += match binary {
            true => unescape(&from[at..], end - at, &mut out[filled..]),
            false => unhex(&from[at..end], &mut half, &mut out[filled..])?,
        };
        let Some(star) = star else { break };
        let (last, count) = (from[star - 1], usize::from(from[star + 1]) - 29);
        if binary {
            assert_ne!(last, b'}', "a run of escapes");
            out[filled..filled + count].fill(last);
            filled += count;
        } else {
            filled += unhex_run(last, count, &mut half, &mut out[filled..])?;
        }
        at = star + 2;
    }
    half.is_none().then_some(filled)
}

/// Bytes that are looked at together.
const BLOCK: usize = 64;
/// What [`unescape`] reads behind the end.
const SLACK: usize = 2 * BLOCK + 1;

/// Writes `len` bytes of an answer to `x` to the start of `out`, in blocks, and behind each escaped byte again, one further
/// back; how many that makes.
fn unescape(from: &[u8], len: usize, out: &mut [u8]) -> usize {
    const GATHER: u64 = 0x0102_0408_1020_4080;
    let (mut at, mut filled) = (0, 0);
    while at < len {
        let from: &[u8; SLACK] = from[at..].first_chunk().expect("slack");
        let block: &[u8; BLOCK] = from.first_chunk().expect("half of it");
        let to: &mut [u8; 2 * BLOCK] = out[filled..].first_chunk_mut().expect("room");
        to[..BLOCK].copy_from_slice(block);
        let wanted = BLOCK.min(len - at);
        let flags = block.map(|byte| u8::from(byte == b'}'));
        let gathered = flags.as_chunks().0.iter().map(|f| u64::from_le_bytes(*f).wrapping_mul(GATHER) >> 56);
        let mut marks = gathered.enumerate().fold(0, |all, (n, bits)| all | bits << (8 * n));
        marks &= u64::MAX >> (BLOCK - wanted);
        let (mut shorter, mut over) = (0, 0);
        while marks != 0 {
            let mark = marks.trailing_zeros() as usize;
            marks &= marks - 1;
            // The last one's byte is the next block's first.
            over = usize::from(mark == BLOCK - 1);
            to[mark - shorter] = from[mark + 1] ^ 0x20;
            shorter += 1;
            to[mark + 2 - shorter..][..BLOCK].copy_from_slice(&from[mark + 2..][..BLOCK]);
        }
        (at, filled) = (at + wanted + over, filled + wanted + over - shorter);
    }
    filled
}

/// Writes the bytes of `digits` to the start of `out`, by arithmetic that is done for many at once; how many, if they are
/// digits. `half` is the first digit of a byte whose second is still to come.
fn unhex(mut digits: &[u8], half: &mut Option<u8>, out: &mut [u8]) -> Option<usize> {
    let byte = |pair: [u8; 2]| {
        let digits = u16::from_le_bytes(pair);
        let nibbles = (digits & 0x0f0f) + (digits >> 6 & 0x0101) * 9;
        (nibbles << 4 | nibbles >> 8) as u8
    };
    let is_hex = |digit: u8| (digit.wrapping_sub(b'0') < 10) | (digit.wrapping_sub(b'a') < 6);
    if !digits.iter().fold(true, |all, &digit| all & is_hex(digit)) {
        return None;
    }
    let mut filled = 0;
    if let Some((&second, rest)) = digits.split_first()
        && let Some(first) = half.take()
    {
        out[0] = byte([first, second]);
        (filled, digits) = (1, rest);
    }
    let (pairs, over) = digits.as_chunks::<2>();
    *half = over.first().copied();
    let out = &mut out[filled..filled + pairs.len()];
    let (blocks, rest) = pairs.as_chunks::<32>();
    let (to, to_rest) = out.as_chunks_mut::<32>();
    for (block, to) in blocks.iter().zip(to) {
        to.iter_mut().zip(block).for_each(|(out, pair)| *out = byte(*pair));
    }
    to_rest.iter_mut().zip(rest).for_each(|(out, pair)| *out = byte(*pair));
    Some(filled + pairs.len())
}

/// As [`unhex`], of `count` times the same digit.
fn unhex_run(digit: u8, mut count: usize, half: &mut Option<u8>, out: &mut [u8]) -> Option<usize> {
    let nibble = |digit: u8| Some(char::from(digit).to_digit(16)? as u8);
    let (last, mut filled) = (nibble(digit)?, 0);
    if let Some(first) = half.take() {
        out[0] = nibble(first)? << 4 | last;
        (filled, count) = (1, count - 1);
    }
    *half = (count % 2 == 1).then_some(digit);
    out[filled..filled + count / 2].fill(last << 4 | last);
    Some(filled + count / 2)
}

fn sum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |sum, &b| (sum ^ u64::from(b)).wrapping_mul(0x100_0000_01b3))
}

fn bulk(address: &str, from: u64, length: u64, binary: bool) {
    let mut client = Client::connect(address);
    // As much as fits, in binary if no more than one byte in sixteen must be escaped.
    let chunk = (client.packet_size - 16) / if binary { 17 } else { 2 } * if binary { 16 } else { 1 };
    let length = length as usize;
    let wanted = |had: usize| chunk.min(length - had);
    // Touched once, so that it is not the system's handing out of memory that is measured.
    let mut bytes = vec![1u8; length + INPUT];
    let start = Instant::now();
    // Several requests are under way, so that the stub is at the next ones while an answer is decoded; `asked` is how far.
    let (mut had, mut asked, mut under_way) = (0, 0, 0);
    while had < length {
        while under_way < AHEAD && asked < length {
            client.request(from + asked as u64, wanted(asked), binary);
            asked += wanted(asked);
            under_way += 1;
        }
        let all = had + wanted(had);
        client.await_packet();
        under_way -= 1;
        had += client.decode(binary, &mut bytes[had..]);
        if had < all {
            // It took more room than it had: what was asked for ahead is from further on.
            (0..std::mem::take(&mut under_way)).for_each(|_| client.await_packet());
            asked = had;
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    let bytes = &bytes[..length];
    let zero = bytes.chunks(4096).filter(|page| page.iter().all(|&byte| byte == 0)).count();
    println!(
        "{{\"bytes\": {length}, \"zero_pages\": {zero}, \"sum\": \"{:016x}\", \"packet\": {chunk}, \"seconds\": {seconds:.6}}}",
        sum(bytes)
    );
}

fn small(address: &str, from: u64, count: u64) {
    let mut client = Client::connect(address);
    let mut bytes = vec![0; 8 * count as usize];
    let start = Instant::now();
    for (i, word) in bytes.chunks_mut(8).enumerate() {
        client.request(from + i as u64 * 8 % 4096, 8, false);
        client.await_packet();
        assert_eq!(client.decode(false, word), 8);
    }
    let seconds = start.elapsed().as_secs_f64();
    println!("{{\"reads\": {count}, \"sum\": \"{:016x}\", \"seconds\": {seconds:.6}}}", sum(&bytes));
}

/// Serves one client and ends with it.
fn floor(socket: &str, file: &str, from: u64) {
    let bytes = std::fs::read(file).expect("FILE");
    let listener = UnixListener::bind(socket).expect("SOCKET");
    let (mut stream, _) = listener.accept().expect("accept");
    let mut input = Vec::new();
    let mut chunk = vec![0; 1 << 16];
    let mut acks = true;
    loop {
        let n = stream.read(&mut chunk).unwrap_or(0);
        if n == 0 {
            return;
        }
        input.extend_from_slice(&chunk[..n]);
        while let Some(start) = input.iter().position(|&b| b == b'$')
            && let Some(end) = input[start..].iter().position(|&b| b == b'#').map(|at| start + at)
            && input.len() >= end + 3
        {
            let body = String::from_utf8_lossy(&input[start + 1..end]).into_owned();
            input.drain(..end + 3);
            let mut out = if acks { vec![b'+'] } else { Vec::new() };
            let answer = answer(&body, &bytes, from);
            rsp::frame_into(&mut out, |packet| packet.extend_from_slice(&answer));
            stream.write_all(&out).expect("write");
            acks &= body != "QStartNoAckMode";
        }
    }
}

fn answer(body: &str, bytes: &[u8], from: u64) -> Vec<u8> {
    let range = |text: &str| {
        let (at, length) = text.split_once(',')?;
        let at = u64::from_str_radix(at, 16).ok()?.checked_sub(from)? as usize;
        let end = (at + usize::from_str_radix(length, 16).ok()?).min(bytes.len());
        bytes.get(at..end).filter(|range| !range.is_empty())
    };
    match body {
        _ if body.starts_with("qSupported") => {
            format!("PacketSize={PACKET_SIZE:x};QStartNoAckMode+;qXfer:features:read+;binary-upload+")
                .into_bytes()
        }
        "QStartNoAckMode" => b"OK".to_vec(),
        "?" => b"S05".to_vec(),
        "g" => vec![b'0'; 1072],
        "qAttached" => b"1".to_vec(),
        _ if body.starts_with("qXfer:features:read:target.xml") => {
            b"l<?xml version=\"1.0\"?><target><architecture>i386:x86-64</architecture></target>".to_vec()
        }
        _ if body.starts_with('m') => match range(&body[1..]) {
            Some(range) => {
                let mut out = Vec::new();
                rsp::encode(range, &mut out);
                out
            }
            None => b"E0e".to_vec(),
        },
        _ if body.starts_with('x') && body != "x0,0" => match range(&body[1..]) {
            Some(range) => {
                // As many as fit; gdb asks for the rest.
                let mut out = vec![b'b'];
                rsp::escape_up_to(range, PACKET_SIZE - 16, &mut out);
                out
            }
            None => b"E0e".to_vec(),
        },
        "D" | "Hg0" | "Hc-1" => b"OK".to_vec(),
        _ => Vec::new(),
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let hex = |text: &str| u64::from_str_radix(text.trim_start_matches("0x"), 16).expect("hexadecimal");
    match words[..] {
        ["bulk", address, from, length, kind] => bulk(address, hex(from), hex(length), kind == "x"),
        ["small", address, from, count] => small(address, hex(from), count.parse().expect("COUNT")),
        ["floor", socket, file, from] => floor(socket, file, hex(from)),
        _ => eprintln!(
            "usage: rsp bulk ADDRESS FROM LENGTH m|x | small ADDRESS FROM COUNT | floor SOCKET FILE FROM"
        ),
    }
}
