//! Packets out of a stream of bytes, however it is cut and whatever is in it.
//!
//! Source: GDB manual, "Overview", "Interrupts", "Packet Acknowledgment".

use super::{checksum, hex};

/// What the peer sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A packet's body, checksum correct, escapes still in it.
    Packet(Vec<u8>),
    /// A packet whose checksum is wrong or no number; the body is not to be believed.
    BadChecksum,
    /// A packet beyond the size limit, dropped.
    TooLong,
    /// `0x03` between packets: Ctrl-C.
    Interrupt,
    /// `+`
    Ack,
    /// `-`: the peer wants the last packet again.
    Nak,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Between,
    Body,
    Checksum,
    ChecksumEnd { high: u8 },
}

/// Cuts a byte stream into [`Event`]s; keeps at most one packet of at most `limit` bytes.
pub struct Framer {
    state: State,
    body: Vec<u8>,
    too_long: bool,
    limit: usize,
}

impl Framer {
    /// A framer that drops packets whose body is longer than `limit`.
    pub fn new(limit: usize) -> Self {
        Self { state: State::Between, body: Vec::new(), too_long: false, limit }
    }

    /// Takes the next bytes of the stream and hands over every event that they complete.
    pub fn push(&mut self, bytes: &[u8], mut sink: impl FnMut(Event)) {
        for &byte in bytes {
            if let Some(event) = self.step(byte) {
                sink(event);
            }
        }
    }

    /// [`Self::push`] into a list.
    pub fn events(&mut self, bytes: &[u8]) -> Vec<Event> {
        let mut events = Vec::new();
        self.push(bytes, |event| events.push(event));
        events
    }

    fn step(&mut self, byte: u8) -> Option<Event> {
        match (self.state, byte) {
            // A raw `$` cannot be part of a packet: the peer gave the last one up.
            (_, b'$') => self.start(),
            (State::Between, 0x03) => return Some(Event::Interrupt),
            (State::Between, b'+') => return Some(Event::Ack),
            (State::Between, b'-') => return Some(Event::Nak),
            // Stray bytes such as a newline that someone typed.
            (State::Between, _) => {}
            (State::Body, b'#') => self.state = State::Checksum,
            (State::Body, _) if self.body.len() < self.limit => self.body.push(byte),
            (State::Body, _) => self.too_long = true,
            (State::Checksum, high) => self.state = State::ChecksumEnd { high },
            (State::ChecksumEnd { high }, low) => {
                self.state = State::Between;
                return Some(self.finish(high, low));
            }
        }
        None
    }

    fn start(&mut self) {
        self.state = State::Body;
        self.body.clear();
        self.too_long = false;
    }

    fn finish(&mut self, high: u8, low: u8) -> Event {
        let body = std::mem::take(&mut self.body);
        let sent = hex::nibble(high).zip(hex::nibble(low)).map(|(high, low)| high << 4 | low);
        if self.too_long {
            Event::TooLong
        } else if sent == Some(checksum(&body)) {
            Event::Packet(body)
        } else {
            Event::BadChecksum
        }
    }
}

/// The bytes of binary data in a packet, whose escapes are taken out; `None` if it ends in the middle of one.
pub fn unescape(body: &[u8]) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(body.len());
    let mut rest = body.iter();
    while let Some(&byte) = rest.next() {
        bytes.push(if byte == b'}' { rest.next()? ^ 0x20 } else { byte });
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rsp::frame;

    fn packet(body: &[u8]) -> Event {
        Event::Packet(body.to_vec())
    }

    #[test]
    fn any_cut_gives_the_same_events() {
        let stream = b"+\n$m0,4#fd\x03-$#00garbage$X1,1:\x03}\x03#a3";
        let whole = Framer::new(64).events(stream);
        let expected = [
            Event::Ack,
            packet(b"m0,4"),
            Event::Interrupt,
            Event::Nak,
            packet(b""),
            // 0x03 inside a packet is data, not an interrupt.
            packet(b"X1,1:\x03}\x03"),
        ];
        assert_eq!(whole, expected);
        for cut in 0..=stream.len() {
            let mut framer = Framer::new(64);
            let mut events = framer.events(&stream[..cut]);
            events.extend(framer.events(&stream[cut..]));
            assert_eq!(events, expected, "cut at {cut}");
        }
    }

    #[test]
    fn damage_is_reported_and_the_next_packet_is_read() {
        let mut framer = Framer::new(8);
        assert_eq!(framer.events(b"$g#00$g#67"), [Event::BadChecksum, packet(b"g")]);
        assert_eq!(framer.events(b"$g#zz$g#67"), [Event::BadChecksum, packet(b"g")]);
        // A packet given up half way, at each stage.
        assert_eq!(framer.events(b"$qSu$g#67"), [packet(b"g")]);
        assert_eq!(framer.events(b"$g#$g#67"), [packet(b"g")]);
        assert_eq!(framer.events(b"$g#6$g#67"), [packet(b"g")]);
    }

    #[test]
    fn a_giant_packet_costs_no_memory() {
        let mut framer = Framer::new(8);
        assert_eq!(framer.events(&frame(b"12345678")), [packet(b"12345678")]);
        assert_eq!(framer.events(&frame(b"123456789")), [Event::TooLong]);
        assert_eq!(framer.events(b"$"), []);
        for _ in 0..1000 {
            assert_eq!(framer.events(&[b'a'; 1000]), []);
        }
        assert!(framer.body.capacity() <= 16);
        assert_eq!(framer.events(b"#00$g#67"), [Event::TooLong, packet(b"g")]);
    }
}
