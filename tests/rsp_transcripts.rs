//! What a session answers, byte by byte, without any socket.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

#[path = "support/fake_machine.rs"]
mod fake_machine;
#[path = "support/rsp_client.rs"]
mod rsp_client;

use fake_machine::{DATA, OWN, TEXT, distinct, fake_machine, pattern};
use kstub::arch::x86_64::Reg;
use kstub::gdb::{Flow, Front, MAX_REQUEST};
use kstub::rsp::Framer;
use rsp_client::{from_hex, packet, to_hex};

const GDB: &str = "qSupported:multiprocess+;swbreak+;QThreadEvents+;no-resumed+;xmlRegisters=i386";
const LLDB: &str = "qSupported:xmlRegisters=i386,arm,mips,arc;multiprocess+;fork-events+;vfork-events+";

struct Session {
    front: Front,
    framer: Framer,
    ended: bool,
}

impl Session {
    /// A client of which nothing is known.
    fn new() -> Self {
        Self { front: Front::new(fake_machine()), framer: Framer::new(MAX_REQUEST), ended: false }
    }

    /// A client that said `hello` and turned acknowledgement off.
    fn of(hello: &str) -> Self {
        let mut session = Self::new();
        session.raw(&packet(hello));
        assert_eq!(session.text(&packet("QStartNoAckMode")), "+$OK#9a");
        session
    }

    fn raw(&mut self, bytes: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        for event in self.framer.events(bytes) {
            self.ended |= self.front.handle(event, &mut out) == Flow::End;
        }
        out
    }

    fn text(&mut self, bytes: &[u8]) -> String {
        String::from_utf8(self.raw(bytes)).unwrap()
    }

    /// The one reply's body.
    fn ask(&mut self, body: impl AsRef<[u8]>) -> String {
        let out = self.raw(&packet(body));
        let body = &out[1..out.len() - 3];
        assert_eq!(packet(body), out, "one packet");
        String::from_utf8(body.to_vec()).unwrap()
    }
}

#[test]
fn acknowledgement_and_repetition() {
    let mut s = Session::new();
    assert_eq!(s.text(b"$?#3f"), "+$T05thread:4;#da");
    assert_eq!(s.text(b"-"), "$T05thread:4;#da");
    assert_eq!(s.text(b"-+"), "$T05thread:4;#da");
    assert_eq!(s.text(b"$?#00"), "-");
    assert_eq!(s.text(b"$?#zz"), "-");
    assert_eq!(s.text(b"$QStartNoAckMode#b0"), "+$OK#9a");
    assert_eq!(s.text(b"$?#3f"), "$T05thread:4;#da");
    assert_eq!(s.text(b"-+\n\x03"), "");
    // Nobody would send it again now, so it must be answered.
    assert_eq!(s.text(b"$?#00"), "$E16#ac");
}

#[test]
fn the_first_stop_is_on_the_cpu_that_panicked() {
    let mut s = Session::of(GDB);
    assert_eq!(s.ask("?"), "T05thread:p1.4;");
    assert_eq!(s.ask("qC"), "QCp1.4");
    assert_eq!(s.ask("qfThreadInfo"), "mp01.01,p01.02,p01.04");
    assert_eq!(s.ask("qsThreadInfo"), "l");
    assert_eq!(s.ask("qAttached:1"), "1");
    assert_eq!(s.ask("vMustReplyEmpty"), "");
    // Before any selection, registers and memory are that CPU's.
    assert!(s.ask("g").starts_with(&to_hex(&distinct(3, Reg::Rax).to_le_bytes()[..8])));
    assert_eq!(from_hex(&s.ask(format!("m{OWN:x},f"))), b"memory of CPU 3");
}

#[test]
fn features_depend_on_the_client() {
    let gdb = Session::new().text(&packet(GDB));
    for feature in [
        "PacketSize=40000",
        "qXfer:features:read+",
        "qXfer:threads:read+",
        "QStartNoAckMode+",
        "multiprocess+",
        "binary-upload+",
    ] {
        assert!(gdb.contains(feature), "{feature} in {gdb}");
    }
    assert_eq!(gdb.matches("PacketSize").count(), 1);
    assert!(!Session::new().text(&packet(LLDB)).contains("binary-upload"));
    // Tools ask again in the middle of a session; nothing must change.
    let mut s = Session::of(GDB);
    let hello = s.ask(GDB);
    for again in ["qSupported", "qSupported:", "qSupported:;", "qSupported:multiprocess-", LLDB] {
        assert_eq!(s.ask(again), hello, "{again}");
    }
    assert_eq!(s.ask("?"), "T05thread:p1.4;");
    // Asked before the client has said anything of itself.
    let mut s = Session::new();
    assert!(s.text(&packet("qSupported")).contains("PacketSize=40000"));
    assert!(s.text(&packet(GDB)).contains("binary-upload+"));
    assert_eq!(s.text(&packet("?")), "+$T05thread:p1.4;#a9");
}

#[test]
fn every_register_has_its_own_value_and_place() {
    let mut s = Session::of(GDB);
    for (thread, cpu) in [(1, 0), (4, 3)] {
        assert_eq!(s.ask(format!("Hgp1.{thread}")), "OK");
        let all = from_hex(&s.ask("g"));
        assert_eq!(all.len(), 608);
        let mut at = 0;
        for reg in Reg::ALL {
            let bytes = &all[at..at + reg.bytes()];
            at += reg.bytes();
            assert_eq!(s.ask(format!("p{:x}", reg as usize)), to_hex(bytes), "{}", reg.name());
            if matches!(reg, Reg::Rip | Reg::Rsp | Reg::Eflags | Reg::Cr0 | Reg::Cr3 | Reg::Cr4) {
                continue;
            }
            assert_eq!(bytes, &distinct(cpu, reg).to_le_bytes()[..reg.bytes()], "{}", reg.name());
        }
    }
}

#[test]
fn what_was_not_saved_is_unavailable_never_zero() {
    let mut s = Session::of(GDB);
    assert_eq!(s.ask("Hgp1.2"), "OK");
    let all = s.ask("g");
    assert_eq!(all.len(), 2 * 608);
    assert_eq!(&all[2 * 128..2 * 136], to_hex(&(TEXT + 0x11).to_le_bytes()));
    assert_eq!(all.matches("xx").count(), 608 - 16);
    assert_eq!(s.ask("p0"), "xx".repeat(8));
    assert_eq!(s.ask("p11"), "xx".repeat(4));
    // No such register.
    assert_eq!(s.ask("p42"), "");
    assert_eq!(s.ask("pffffffffffffffffff"), "E16");
}

#[test]
fn memory_ends_exactly_at_a_hole() {
    let mut s = Session::of(GDB);
    let bytes = |from: u64, len: u64| (from..from + len).map(pattern).collect::<Vec<_>>();
    assert_eq!(from_hex(&s.ask(format!("m{DATA:x},40"))), bytes(0, 0x40));
    assert_eq!(from_hex(&s.ask(format!("m{:x},40", DATA + 0x1ff3))), bytes(0x1ff3, 13));
    assert_eq!(from_hex(&s.ask(format!("m{:x},7000000000000000", DATA + 0x1ff3))), bytes(0x1ff3, 13));
    assert_eq!(from_hex(&s.ask(format!("m{DATA:x},8000000000000000"))), bytes(0, 0x2000));
    // Excluded from the dump, not mapped, not canonical, past the end of everything.
    for at in [DATA + 0x2000, DATA + 0x3000, 0x0000_8000_0000_0000, 0, u64::MAX] {
        assert_eq!(s.ask(format!("m{at:x},8")), "E0e", "{at:#x}");
        assert_eq!(s.ask(format!("x{at:x},8")), "E0e", "{at:#x}");
    }
    assert_eq!(s.ask(format!("m{DATA:x},0")), "");
}

#[test]
fn binary_reads_give_the_same_bytes() {
    let mut s = Session::of(GDB);
    let out = s.raw(&packet(format!("x{DATA:x},1000")));
    let mut client_side = out[2..out.len() - 3].iter();
    let mut bytes = Vec::new();
    while let Some(&byte) = client_side.next() {
        bytes.push(if byte == b'}' { client_side.next().unwrap() ^ 0x20 } else { byte });
    }
    assert_eq!(out[1], b'b');
    assert_eq!(bytes, (0..0x1000).map(pattern).collect::<Vec<_>>());
    assert_eq!(s.ask("x0,0"), "b");
    // Others know another form of it, or none.
    assert_eq!(Session::of(LLDB).ask("x0,0"), "");
    assert_eq!(Session::of(LLDB).ask(format!("x{DATA:x},10")), "");
}

#[test]
fn runs_are_sent_short_to_gdb_alone() {
    let at = TEXT + 0x40;
    let mut s = Session::of(GDB);
    assert_eq!(s.ask(format!("m{at:x},40")), "cc".repeat(64));
    // gdb's probe, which no other client has.
    assert_eq!(s.ask("vMustReplyEmpty"), "");
    // 98 digits and 30: as many repetitions as the character's value less 29.
    assert_eq!(s.ask(format!("m{at:x},40")), "c*~c*:");
    assert_eq!(s.raw(&packet(format!("x{at:x},40"))), packet(b"b\xcc*\\"));
    assert_eq!(s.ask(format!("m{at:x},3f")), "cc".repeat(63), "less than a block is no run");
    let mut other = Session::of(LLDB);
    assert_eq!(other.ask("vMustReplyEmpty"), "");
    assert_eq!(other.ask(format!("m{at:x},40")), "cc".repeat(64));
}

#[test]
fn the_selected_thread_decides_whose_memory_is_read() {
    let mut s = Session::of(GDB);
    for (thread, cpu) in [("p1.1", 0), ("1", 0), ("p1.4", 3), ("p1.2", 1), ("0", 3), ("p0.0", 3), ("-1", 3)] {
        assert_eq!(s.ask(format!("Hg{thread}")), "OK", "{thread}");
        assert_eq!(from_hex(&s.ask(format!("m{OWN:x},f"))), format!("memory of CPU {cpu}").as_bytes());
    }
    assert_eq!(s.ask("Hgp1.1"), "OK");
    // Threads that there are not: CPU 2 is missing from the dump.
    for thread in ["p1.3", "3", "p1.5", "p2.1", "ffffffffffffffff", "x", ""] {
        assert!(s.ask(format!("Hg{thread}")).starts_with('E'), "{thread}");
    }
    assert_eq!(s.ask("Hc-1"), "OK");
    assert_eq!(from_hex(&s.ask(format!("m{OWN:x},f"))), b"memory of CPU 0");
}

#[test]
fn threads_are_described_and_hostile_names_defused() {
    let mut s = Session::of(GDB);
    let whole = s.raw(&packet("qXfer:threads:read::0,10000"));
    let whole = String::from_utf8(whole).unwrap();
    assert!(whole.starts_with("$l<?xml"), "{whole}");
    assert!(
        whole.contains("<thread id=\"p1.4\" core=\"3\" name=\"bash\">CPU 3, pid 231, panicked here</thread>")
    );
    assert!(whole.contains("name=\"&lt;a&amp;b&gt;&quot;\\u{1b}][2J}]}\u{3}}\u{4}}\n\""), "{whole}");
    assert!(!whole.contains('\x1b'));
    assert_eq!(s.ask("qXfer:threads:read::0,5"), "m<?xml");
    assert_eq!(s.ask("qXfer:threads:read::ffffffffffffffff,5"), "l");
    assert_eq!(s.ask("qXfer:threads:read::0"), "E16");
    assert_eq!(from_hex(&s.ask("qThreadExtraInfo,p1.1")), b"CPU 0, pid 0, idle");
    assert_eq!(s.ask("qThreadExtraInfo,p1.9"), "");
    assert_eq!(s.ask("Tp1.2"), "OK");
    assert_eq!(s.ask("Tp1.3"), "E01");
}

#[test]
fn the_description_comes_in_pieces() {
    let mut s = Session::of(GDB);
    let mut xml = String::new();
    loop {
        let piece = s.ask(format!("qXfer:features:read:target.xml:{:x},7d0", xml.len()));
        xml.push_str(&piece[1..]);
        if piece.starts_with('l') {
            break;
        }
        assert!(piece.len() > 1);
    }
    assert!(xml.starts_with("<?xml") && xml.ends_with("</target>\n"));
    assert_eq!(xml.matches("<reg ").count(), 66);
    assert_eq!(s.ask("qXfer:features:read:target.xml:ffffffffffffffff,ffffffffffffffff"), "l");
    assert_eq!(s.ask("qXfer:features:read:other.xml:0,10"), "E16");
}

#[test]
fn running_is_refused_in_words_on_the_selected_thread() {
    let words = format!("O{}", to_hex(b"This is a crash dump: it cannot run or step.\n"));
    let reply = |stop: &str| String::from_utf8([packet(&words), packet(stop)].concat()).unwrap();
    let mut gdb = Session::of(GDB);
    assert_eq!(gdb.ask("vCont?"), "vCont;c;C;s;S");
    assert_eq!(gdb.text(&packet("vCont;c:p1.-1")), reply("T00thread:p1.4;"));
    assert_eq!(gdb.text(&packet("vCont;s:p1.1;c:p1.-1")), reply("T00thread:p1.1;"));
    // gdb takes the thread of a stop for selected.
    assert_eq!(from_hex(&gdb.ask(format!("m{OWN:x},f"))), b"memory of CPU 0");
    assert_eq!(gdb.ask("Hgp1.2"), "OK");
    for resume in ["c", "s", "C05", "S05", "cffffffff9a000000", "vCont;c", "vCont;C05:p1.-1", "vCont;s:p1.9"]
    {
        assert_eq!(gdb.text(&packet(resume)), reply("T00thread:p1.2;"), "{resume}");
    }
    // lldb goes on at once after signal 0.
    let why = to_hex(b"this is a crash dump");
    let exception = format!("T05thread:p1.4;reason:exception;description:{why};");
    assert_eq!(Session::of(LLDB).text(&packet("vCont;c")), reply(&exception));
}

#[test]
fn nothing_is_written() {
    let mut s = Session::of(GDB);
    assert_eq!(s.ask(format!("M{DATA:x},1:00")), "E1e");
    assert_eq!(s.ask([format!("X{DATA:x},2:").as_bytes(), b"}\x03\xff"].concat()), "E1e");
    assert!(s.ask("P0=0100000000000000").starts_with("E.this is a crash dump"));
    assert!(s.ask("G00").starts_with("E."));
    assert_eq!(Session::of(LLDB).ask("P0=0100000000000000"), "E1e");
    // gdb then tries memory writes, which fail.
    for breakpoint in ["Z0,ffffffff9a000000,1", "Z1,0,1", "Z2,0,8", "z0,ffffffff9a000000,1"] {
        assert_eq!(s.ask(breakpoint), "", "{breakpoint}");
    }
}

#[test]
fn commands_answer_each_client_in_its_way() {
    let command = format!("qRcmd,{}", to_hex(b"no-such-command"));
    let text = String::from_utf8(from_hex(&Session::of(GDB).ask(&command))).unwrap();
    assert!(text.contains("no-such-command") && text.ends_with('\n'), "{text}");
    let lldb = Session::of(LLDB).text(&packet(&command));
    assert_eq!(
        lldb,
        String::from_utf8([packet(format!("O{}", to_hex(text.as_bytes()))), packet("OK")].concat()).unwrap()
    );
    // Bytes that are no text, and no command at all.
    assert!(!Session::of(GDB).ask("qRcmd,ff1b0a").starts_with('E'));
    assert!(!Session::of(GDB).ask("qRcmd,").is_empty());
}

#[test]
fn qemus_packets() {
    let mut s = Session::of(GDB);
    assert_eq!(s.ask("qOffsets"), format!("TextSeg={TEXT:x}"));
    assert!(s.ask("Qqemu.sstepbits").starts_with("ENABLE="));
    assert_eq!(s.ask("qqemu.PhyMemMode"), "0");
    assert_eq!(s.ask("m100000,1"), "E0e");
    assert_eq!(s.ask("Qqemu.PhyMemMode:1"), "OK");
    assert_eq!(s.ask("qqemu.PhyMemMode"), "1");
    assert_eq!(from_hex(&s.ask("m100001,2")), [pattern(1), pattern(2)]);
    assert_eq!(s.ask("m102000,1"), "E0e");
    assert_eq!(s.ask("Qqemu.PhyMemMode:2"), "");
    assert_eq!(s.ask("Qqemu.PhyMemMode:0"), "OK");
    assert_eq!(s.ask("m100001,2"), "E0e");
}

#[test]
fn goodbye() {
    for last in ["k", "vKill;1", "vKill;a410", "D", "D;1"] {
        let mut s = Session::of(GDB);
        assert_eq!(s.ask(last), "OK");
        assert!(s.ended, "{last}");
    }
}

/// Every packet here ends a bare gdbstub session, and some more that might.
#[test]
fn a_session_survives_everything() {
    let hostile: &[&[u8]] = &[
        b"Hg-2",
        b"Hx1",
        b"H",
        b"Hg",
        b"T0",
        b"T",
        b"T-1",
        b"Tp",
        b"m1",
        b"m",
        b"mzz,1",
        b"m,",
        b"m1,",
        b"m1,zz",
        b"m1,1,1",
        b"m10000000000000000,1",
        b"x1",
        b"xzz,1",
        b"k1",
        b"Dx",
        b"vKillx",
        b"qRcmd,z",
        b"qRcmd,zz",
        b"qRcmd",
        b"qXfer:features:read:target.xml:zz,1",
        b"qXfer:features:read:target.xml:0",
        b"qXfer:features:read",
        b"qXfer:features:read:::",
        b"qXfer:threads:read:",
        b"qXfer:threads:read:::::,,",
        b"qThreadExtraInfo",
        b"qThreadExtraInfo,",
        b"qThreadExtraInfo,0",
        b"qThreadExtraInfo,zz",
        b"p",
        b"pzz",
        b"P",
        b"G",
        b"M",
        b"X",
        b"X1,ffffffffffffffff:",
        b"Z",
        b"Z9,0,0",
        b"Z0",
        b"Z0,zz,1",
        b"z",
        b"vCont",
        b"vCont;",
        b"vCont;x",
        b"vCont;;;:",
        b"vFile:open:",
        b"vFile:pread:zz",
        b"vRun;",
        b"vAttach;zz",
        b"R00",
        b"r",
        b"b",
        b"bs",
        b"bc",
        b"!",
        b"QAgent:1",
        b"QTinit",
        b"QTStart",
        b"qTStatus",
        b"qTfP",
        b"QTDP:zz",
        b"QTFrame:zz",
        b"QCatchSyscalls:1",
        b"QNonStop:1",
        b"qSearch:memory:0;1;x",
        b"qCRC:0,1",
        b"jThreadsInfo",
        b"qHostInfo",
        b"qProcessInfo",
        b"qRegisterInfo0",
        b"qWasmLocal:0",
        b"",
        b"\xff\xfe\x00",
        b"}",
        b"}}",
        b"*",
        b"****",
        b"qOffsets:",
        b"?1",
        b"g1",
        b"gg",
    ];
    let mut s = Session::of(GDB);
    assert_eq!(s.ask("Hgp1.2"), "OK");
    for body in hostile {
        let name = body.escape_ascii().to_string();
        assert!(!s.raw(&packet(body)).is_empty(), "{name} is answered");
        assert!(!s.ended, "{name} does not end the session");
        // What was negotiated and selected still holds.
        assert_eq!(s.ask("p10"), to_hex(&(TEXT + 0x11).to_le_bytes()), "after {name}");
        assert_eq!(s.ask("qfThreadInfo"), "mp01.01,p01.02,p01.04", "after {name}");
        assert_eq!(from_hex(&s.ask(format!("m{OWN:x},f"))), b"memory of CPU 1", "after {name}");
    }
    let giant = vec![b'q'; MAX_REQUEST + 1];
    assert_eq!(s.ask(giant), "E07");
    // As long as allowed, and far longer than gdbstub's own buffer: merely unknown.
    assert_eq!(s.ask(vec![b'q'; MAX_REQUEST]), "");
    assert_eq!(s.ask("qfThreadInfo"), "mp01.01,p01.02,p01.04");
}

#[test]
fn noise_is_never_fatal() {
    // A small generator of our own, so that a failure is the same in every run.
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let seeds = [
        "m0,8",
        "Hgp1.1",
        "qXfer:features:read:target.xml:0,100",
        "vCont;s:p1.1",
        "qRcmd,6869",
        "p10",
        "Tp1.1",
    ];
    let mut s = Session::of(GDB);
    for _ in 0..20_000 {
        let mut body = seeds[random() as usize % seeds.len()].as_bytes().to_vec();
        for _ in 0..random() % 4 {
            let at = random() as usize % (body.len() + 1);
            match random() % 3 {
                0 => body.insert(at, random() as u8),
                1 if at < body.len() => body[at] = random() as u8,
                _ => body.truncate(at),
            }
        }
        s.raw(&packet(&body));
        let noise: Vec<u8> = (0..random() % 8).map(|_| random() as u8).collect();
        s.raw(&noise);
    }
    s.raw(b"#00");
    assert_eq!(s.ask("qfThreadInfo"), "mp01.01,p01.02,p01.04");
}
