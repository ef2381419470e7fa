//! What must not change the guest, and what must not end kstub.

use super::*;

/// Every packet that writes, or ends something, with nothing changed: not a byte of RAM, no register.
pub fn read_only(guest: &Guest) {
    let mut server = Server::start(guest, &[]);
    let mut client = server.owner();
    let constant = guest.fact("constant.at");
    let at = constant.trim_start_matches("0x");
    let (registers, ram) = (guest.registers(), guest.ram());
    let g = client.ask("g");
    let mut raw = format!("X{at},8:").into_bytes();
    raw.extend([1; 8]);
    let mut packets: Vec<Vec<u8>> = vec![raw];
    let texts = [
        format!("M{at},8:0101010101010101"),
        format!("M{at},1:00"),
        format!("G{}", "01".repeat(g.len() / 2)),
        "P0=0101010101010101".to_owned(),
        "P10=0101010101010101".to_owned(),
        format!("vFlashErase:{at},1000"),
        format!("vFlashWrite:{at}:aaaa"),
        "vFlashDone".to_owned(),
        "Qqemu.PhyMemMode:1".to_owned(),
        "M100000,8:0101010101010101".to_owned(),
        "Mb8000,2:4141".to_owned(),
        "Qqemu.PhyMemMode:0".to_owned(),
        "vRun;616263".to_owned(),
        "vAttach;1".to_owned(),
        "QPassSignals:e".to_owned(),
        "vFile:open:2f746d702f6b73747562,601,1ff".to_owned(),
        "vFile:pwrite:3,0,aa".to_owned(),
        "vFile:unlink:2f746d702f6b73747562".to_owned(),
    ];
    packets.extend(texts.map(String::into_bytes));
    for body in &packets {
        let answer = client.ask_bytes(body);
        let answer = String::from_utf8_lossy(&answer).into_owned();
        let body = String::from_utf8_lossy(body).chars().take(40).collect::<String>();
        assert!(guest.qemu_runs(), "{body}: QEMU is gone");
        assert_ne!(guest.run_state(), "running", "{body}: {answer}");
        assert_eq!(guest.registers(), registers, "{body}: {answer}");
    }
    for command in [
        "qemu system_reset",
        "qemu quit",
        "qemu cont",
        "qemu stop",
        "qemu nmi 0",
        "qemu x_colo",
        "qemu info registers",
    ] {
        monitor(&mut client, command);
        assert!(guest.qemu_runs() && guest.run_state() != "running", "monitor {command}");
    }
    let now = guest.ram();
    let changed = live::differences(&ram, &now);
    assert_eq!(changed, [0; 0], "addresses that changed");
    assert_eq!(guest.registers(), registers);
    // Where to go on is a register that would be written: the kernel would die of going on at 0.
    for go in ["c0", "C05;0", "s0"] {
        client.send_raw(&packet(go));
        std::thread::sleep(Duration::from_millis(300));
        client.send_raw(b"\x03");
        drop(client);
        assert!(wait_until(PATIENCE, || guest.run_state() == "running"), "{go}: {}", guest.run_state());
        guest.assert_alive(go);
        client = server.owner();
    }
    // What would end QEMU if it were passed on.
    for goodbye in ["k", "vKill;1"] {
        client.try_send_raw(&packet(goodbye));
        drop(client);
        assert!(wait_until(PATIENCE, || guest.run_state() == "running"), "{goodbye}: {}", guest.run_state());
        guest.assert_alive(goodbye);
        client = server.owner();
    }
    client.try_send_raw(&packet("R00"));
    drop(client);
    assert!(server.runs());
    assert!(wait_until(PATIENCE, || guest.run_state() == "running"));
    guest.assert_alive("after everything");
    assert_eq!(guest.boots(), 1);
    // The comparison sees a write that is allowed.
    let server = Server::start_after(server, guest, &["--allow-write"]);
    let mut client = server.owner();
    let before = guest.ram();
    assert_eq!(client.ask(format!("M{at},8:0101010101010101")), "OK");
    let after = guest.ram();
    let changed = live::differences(&before, &after);
    assert_eq!(changed.len(), 8, "{changed:x?}");
    assert_eq!(changed[0] % 4096, usize::try_from(guest.number("constant.at") % 4096).unwrap());
    let original: String =
        guest.number("constant").to_le_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(client.ask(format!("M{at},8:{original}")), "OK");
    assert!(guest.ram() == before);
}

pub fn hostile(guest: &Guest) {
    let mut server = Server::start(guest, &[]);
    let mut rng = Rng::new(7);
    let (text, text_end) = (b"$#+-\x03}*,;:=/mMgGzZvXqQHTcCsSkKDRj0123456789abcdef", 200);
    for round in 0..150 {
        let Ok(mut stream) = UnixStream::connect(&server.socket) else {
            panic!("round {round}: nobody listens")
        };
        stream.set_write_timeout(Some(Duration::from_secs(5))).unwrap();
        let mut bytes = Vec::new();
        for _ in 0..1 + rng.next() % 30 {
            let body: Vec<u8> = match rng.next() % 3 {
                0 => (0..rng.next() % text_end).map(|_| (rng.next() & 0xff) as u8).collect(),
                1 => (0..rng.next() % text_end).map(|_| text[rng.next() as usize % text.len()]).collect(),
                _ => {
                    let starts = [
                        "vCont;",
                        "Z0,",
                        "Z2,ffffffff",
                        "z1,",
                        "X",
                        "M",
                        "P",
                        "qRcmd,",
                        "Hg",
                        "T",
                        "vCont;c:",
                        "bc",
                        "bs",
                        "?",
                    ];
                    let mut body = starts[rng.next() as usize % starts.len()].as_bytes().to_vec();
                    body.extend((0..rng.next() % 20).map(|_| text[rng.next() as usize % text.len()]));
                    body
                }
            };
            match rng.next() % 4 {
                0 => bytes.extend(body),
                _ => bytes.extend(packet(&body)),
            }
        }
        let _ = stream.write_all(&bytes);
        if rng.next().is_multiple_of(2) {
            std::thread::sleep(Duration::from_millis(rng.next() % 30));
        }
    }
    assert!(server.runs(), "the server is gone");
    assert!(
        guest.qemu_runs() && wait_until(PATIENCE, || guest.run_state() == "running"),
        "{}",
        guest.run_state()
    );
    guest.assert_alive("after hostile clients");
    assert_eq!(guest.boots(), 1);
    assert_eq!(guest.ask_facts("cat /proc/kstub_live")["constant"], guest.fact("constant"));
    // It still serves.
    let mut client = server.owner();
    assert!(monitor(&mut client, "ps").contains("kstub-tick"));
    drop(client);
    server.end();
    assert_free(guest, "after hostile clients");
}

/// A server of nonsense in QEMU's place: an error in words, soon, and no panic.
#[test]
fn hostile_qemu() {
    let greeting = r#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": ""}, "capabilities": ["oob"]}}"#;
    let deep = "[".repeat(100_000);
    let long = format!("{{\"QMP\": \"{}\"}}", "a".repeat(1 << 20));
    let lines: Vec<Vec<u8>> = vec![
        b"".to_vec(),
        b"\n".to_vec(),
        b"220 mail.example SMTP\r\n".to_vec(),
        b"{}\n".to_vec(),
        b"null\n".to_vec(),
        vec![0xff; 5000],
        deep.into_bytes(),
        long.into_bytes(),
        format!("{greeting}\r\n").into_bytes(),
        format!("{greeting}\r\n{{\"return\": {{}}}}\r\n").into_bytes(),
        format!("{greeting}\r\n{{\"return\": {{}}, \"id\": 99}}\r\nnonsense\r\n").into_bytes(),
        format!("{greeting}\r\n{{\"error\": {{\"class\": \"x\", \"desc\": \"\\u0000\\u001b[31m\"}}}}\r\n")
            .into_bytes(),
    ];
    let directory = tempfile::tempdir().unwrap();
    let mut rng = Rng::new(3);
    for (number, line) in lines.iter().enumerate() {
        for closes in [true, false] {
            let path = directory.path().join(format!("{number}-{closes}"));
            let listener = UnixListener::bind(&path).unwrap();
            let line = line.clone();
            let noise: Vec<u8> = (0..2000).map(|_| (rng.next() & 0xff) as u8).collect();
            std::thread::spawn(move || {
                let Ok((mut stream, _)) = listener.accept() else { return };
                let _ = stream.write_all(&line);
                if !closes {
                    std::thread::sleep(Duration::from_millis(300));
                    let _ = stream.write_all(&noise);
                    std::thread::sleep(PATIENCE);
                }
            });
            let mut kstub = Command::new(KSTUB);
            kstub.args(["run", "--qemu", &format!("unix:{}", path.display()), "ps"]);
            let ended = finish_within(&mut kstub, PATIENCE + Duration::from_secs(10));
            let failed = ended.status.is_some_and(|status| !status.success() && status.code() != Some(101));
            assert!(failed, "line {number}, closed {closes}: {ended:?}");
            assert!(!ended.err.is_empty() && !ended.err.contains("panicked"), "{number}: {}", ended.err);
            assert!(!ended.err.contains('\x1b'), "{number}: {:?}", ended.err);
        }
    }
}
