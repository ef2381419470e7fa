//! Watchpoints: who wrote, on which CPU, and what.

use super::*;

/// Old and new value of a watchpoint that was hit.
fn change(stop: &str) -> (u64, u64) {
    let of = |what: &str| {
        let line = stop.lines().find_map(|line| line.strip_prefix(what)).unwrap_or_else(|| panic!("{stop}"));
        number(line.trim())
    };
    (of("Old value = "), of("New value = "))
}

pub fn watch(guest: &Guest) {
    let cpu = cpu_of(guest, 3);
    let mut gdb = Gdb::start(guest, &[]);
    let set = gdb.ask("watch kstub_live.count");
    assert!(set.contains("Hardware watchpoint"), "{set}");
    let mut last = None;
    for _ in 0..3 {
        let stop = gdb.ask("continue");
        let (old, new) = change(&stop);
        assert_eq!(new, old + 3, "{stop}");
        assert!(last.is_none_or(|last| last == old), "{last:?} {stop}");
        last = Some(new);
        let (seen, line) = current(&mut gdb);
        assert_eq!(seen, cpu, "{line}");
        assert!(line.contains("kstub-tick"), "{line}");
        let functions = functions(&gdb.ask("bt"));
        assert!(functions.iter().any(|name| name == "tick"), "{functions:?}");
        assert_eq!(functions[0], "kstub_live_tick", "{functions:?}");
        // QEMU's copy of that memory has the new value.
        let phys = number(&value(&mut gdb, "p/x kstub_live.count"));
        assert_eq!(phys, new);
    }
    // Reading is noticed, too, where it is asked for.
    gdb.ask("delete");
    gdb.ask("rwatch kstub_live.count");
    let stop = gdb.ask("continue");
    assert!(stop.contains("Hardware read watchpoint"), "{stop}");
    leave(guest, gdb);
}

/// The same eight bytes further on: never hit.
pub fn watch_in_vain(guest: &Guest) {
    let mut gdb = Gdb::start(guest, &[]);
    gdb.ask("watch kstub_live.magic");
    gdb.ask("watch kstub_live_constant");
    gdb.send("continue");
    guest.assert_alive("while watched");
    std::thread::sleep(Duration::from_secs(1));
    gdb.interrupt();
    let stop = gdb.wait().unwrap();
    assert!(stop.contains("SIGINT") && !stop.contains("New value"), "{stop}");
    leave(guest, gdb);
}

pub fn watch_per_cpu(guest: &Guest) {
    for cpu in [1, 3] {
        let mut gdb = Gdb::start(guest, &[]);
        gdb.ask(&format!("thread {}", cpu + 1));
        gdb.ask("watch runqueues.nr_switches");
        let stop = gdb.ask("continue");
        let (old, new) = change(&stop);
        assert_eq!(new, old + 1, "{stop}");
        let (seen, line) = current(&mut gdb);
        assert_eq!(seen, cpu, "{line}");
        assert!(functions(&gdb.ask("bt")).iter().any(|name| name == "__schedule"), "{stop}");
        // It stays on that CPU's copy, whatever is selected when the guest goes on.
        gdb.ask(&format!("thread {}", (cpu + 1) % 4 + 1));
        let stop = gdb.ask("continue");
        assert_eq!(current(&mut gdb).0, cpu, "{stop}");
        leave(guest, gdb);
    }
}
