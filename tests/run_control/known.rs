//! A guest whose kernel is known: the committed sample's, whose memory it has; or another that comes in its place.

use super::guest::{Client, FakeGuest, policy};
use kstub::addr::VirtAddr;
use kstub::backend::Dump;
use kstub::backend::live::{Happening, Point, StopReason};
use kstub::debuginfo::find::Places;
use kstub::gdb::{Files, Libraries, Live, Policy, Tell};
use kstub::kernel::{Machine, OpenError, Options};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

const SAMPLE: &str = "tests/data/sample";

/// The sample's memory.
fn boot(guest: &FakeGuest) {
    *guest.dump.lock().unwrap() = Some(Arc::new(Dump::open(&Path::new(SAMPLE).join("vmcore")).unwrap()));
}

fn options(vmlinux: PathBuf) -> Options {
    Options { vmlinux: Some(vmlinux), ..Options::default() }
}

fn vmlinux() -> PathBuf {
    Path::new(SAMPLE).join("vmlinux")
}

fn live(guest: &Arc<FakeGuest>, policy: Policy) -> Arc<Live> {
    live_with(guest, policy, vmlinux())
}

fn live_with(guest: &Arc<FakeGuest>, policy: Policy, vmlinux: PathBuf) -> Arc<Live> {
    let open = move |backend| Machine::open(backend, &options(vmlinux.clone()), &|_, _| ());
    Live::new(guest.clone(), policy, Box::new(open)).unwrap()
}

fn files(live: &Live) -> Files {
    let machine = live.machine();
    Files::of(&machine, Libraries::new(machine.clone(), Places::default(), None), Tell::Path).unwrap()
}

/// A vmlinux in which a function of the kernel, which has no modules, is called `do_init_module`.
fn vmlinux_with_modules(dir: &Path) -> PathBuf {
    let mut bytes = std::fs::read(vmlinux()).unwrap();
    let (old, new) = (b"\0__cond_resched\0", b"\0do_init_module\0");
    let at: Vec<_> = (0..bytes.len() - old.len()).filter(|&at| bytes[at..].starts_with(old)).collect();
    for at in at {
        bytes[at..at + new.len()].copy_from_slice(new);
    }
    let path = dir.join("vmlinux");
    std::fs::write(&path, bytes).unwrap();
    path
}

/// The guest is started again with another kernel than the vmlinux is of: that is said, once, and nothing of the old one.
#[test]
fn another_kernel_is_not_taken_for_the_one_before() {
    let guest = FakeGuest::new(true);
    boot(&guest);
    let is_other = Arc::new(Mutex::new(false));
    let other = is_other.clone();
    let open = move |backend| match *other.lock().unwrap() {
        true => Err(OpenError::Mismatch { path: "/old/vmlinux".into(), why: "is another kernel's".into() }),
        false => Machine::open(backend, &options(vmlinux()), &|_, _| ()),
    };
    let live = Live::new(guest.clone(), policy(), Box::new(open)).unwrap();
    live.offer(files(&live));
    let mut client = Client::new(&live);
    client.ask("?");
    assert!(client.ask("qOffsets").starts_with("TextSeg="));
    let number = client.ask("qkstub.kernel");
    assert_eq!(client.ask("qkstub.kernel"), number, "nothing has happened");
    *is_other.lock().unwrap() = true;
    guest.happens(Happening::Reset);
    let mut stop = || {
        client.ask("vCont;c");
        // Each is looked at: somebody has asked for it.
        guest.stops(0, StopReason::Signal(2));
        client.wait_with_news().0
    };
    let news = stop();
    assert!(news.contains("started again") && news.contains("'/old/vmlinux' is another kernel's"), "{news}");
    assert!(!news.contains("was found"), "{news}");
    assert_eq!(stop(), "", "it is said at each stop");
    assert_eq!(client.ask("qOffsets"), "");
    assert!(client.command("info").contains("'/old/vmlinux' is another kernel's"));
    // The old one comes back.
    *is_other.lock().unwrap() = false;
    guest.happens(Happening::Reset);
    client.ask("vCont;c");
    guest.stops(0, StopReason::Signal(2));
    let (news, _) = client.wait_with_news();
    assert!(news.contains("A kernel was found") && news.contains("It is where it was"), "{news}");
    assert_ne!(client.ask("qkstub.kernel"), number, "it is another boot's");
}

/// Whoever comes once the kernel is known is told of its file; and whoever was there, if asked.
#[test]
fn files_are_of_the_kernel_that_is_there() {
    let guest = FakeGuest::new(true);
    let live = live(&guest, policy());
    live.offer(files(&live));
    let mut client = Client::new(&live);
    let name = |client: &mut Client| client.ask("qXfer:exec-file:read::0,1000");
    client.ask("?");
    assert!(name(&mut client).contains("how to get it"), "{}", name(&mut client));
    let modules = client.ask("qXfer:libraries:read::0,1000");
    assert!(modules.contains("</library-list>"), "no document: {modules}");
    boot(&guest);
    client.ask("vCont;c");
    guest.stops(0, StopReason::Signal(2));
    client.wait();
    let path = std::path::absolute(vmlinux()).unwrap().display().to_string();
    assert_eq!(name(&mut client), format!("l{path}"));
    let mut other = Client::new(&live);
    assert_eq!(name(&mut other), format!("l{path}"));
    assert!(other.ask("qOffsets").starts_with("TextSeg="));
}

/// Firmware is not searched for a kernel at each of its instructions.
#[test]
fn a_step_without_a_kernel_is_no_search() {
    let guest = FakeGuest::new(true);
    let searches = Arc::new(AtomicUsize::new(0));
    let count = searches.clone();
    let open = move |backend| {
        count.fetch_add(1, Ordering::SeqCst);
        Machine::open(backend, &Options::default(), &|_, _| ())
    };
    let live = Live::new(guest.clone(), policy(), Box::new(open)).unwrap();
    let mut client = Client::new(&live);
    client.ask("?");
    let before = searches.load(Ordering::SeqCst);
    for packet in ["vCont;s:p1.1", "vCont;s:p1.1", "vCont;c", "vCont;s:p1.1"] {
        client.ask(packet);
        guest.stops(0, StopReason::Signal(5));
        client.wait();
    }
    assert_eq!(searches.load(Ordering::SeqCst), before);
    // Whoever stops it wants to know.
    client.ask("vCont;c");
    guest.stops(0, StopReason::Signal(2));
    client.wait();
    assert_eq!(searches.load(Ordering::SeqCst), before + 1);
    std::thread::sleep(Duration::from_millis(2100));
    client.ask("vCont;c");
    guest.stops(0, StopReason::Signal(5));
    client.wait();
    assert_eq!(searches.load(Ordering::SeqCst), before + 2);
}

/// A watchpoint on a per-CPU variable stays on the copy that it was put on, until its client takes it away for good.
#[test]
fn a_watchpoint_on_a_per_cpu_variable_stays_where_it_is() {
    let guest = FakeGuest::new(true);
    boot(&guest);
    let live = live(&guest, policy());
    let mut client = Client::new(&live);
    client.ask("?");
    // As gdb has it: `runqueues` at its place in the section, moved with the kernel.
    let machine = live.machine();
    let window = machine.kernel().unwrap().per_cpu_window().unwrap();
    let point = format!("2,{:x},8", window.start.0 + 0x1bdc0);
    let put = |client: &mut Client, thread: &str| {
        guest.told();
        assert_eq!(client.ask(&format!("Hgp1.{thread}")), "OK");
        assert_eq!(client.ask(&format!("Z{point}")), "OK");
        guest.told().pop().unwrap()
    };
    let stop = |client: &mut Client, thread: u32| {
        client.ask("vCont;c");
        guest.stops(thread, StopReason::Signal(5));
        client.wait();
        client.ask(&format!("z{point}"));
    };
    let first = put(&mut client, "1");
    stop(&mut client, 1);
    assert_eq!(put(&mut client, "2"), first, "it wanders with the selected thread");
    stop(&mut client, 1);
    // Away while the guest runs: what is put next is another.
    stop(&mut client, 1);
    let second = put(&mut client, "2");
    assert_ne!(second, first);
    stop(&mut client, 0);
    assert_eq!(put(&mut client, "1"), second);
}

struct Modules {
    guest: Arc<FakeGuest>,
    live: Arc<Live>,
    hook: u64,
    _dir: tempfile::TempDir,
}

/// A guest with a kernel that loads modules.
fn with_modules() -> Modules {
    let guest = FakeGuest::new(true);
    boot(&guest);
    let dir = tempfile::tempdir().unwrap();
    let live = live_with(&guest, policy(), vmlinux_with_modules(dir.path()));
    live.offer(files(&live));
    let hook = live.machine().kernel().unwrap().symbol("do_init_module").unwrap().0;
    Modules { guest, live, hook, _dir: dir }
}

impl Modules {
    /// The guest comes to the hook.
    fn load(&self) {
        *self.guest.pc.lock().unwrap() = self.hook;
        self.guest.stops(0, StopReason::Signal(5));
    }
}

fn follow(client: &mut Client) {
    client.ask("?");
    client.ask("qXfer:libraries:read::0,1000");
}

#[test]
fn each_client_is_told_of_a_module_and_the_owner_of_its_breakpoint() {
    let modules = with_modules();
    let (mut owner, mut reader) = (Client::new(&modules.live), Client::new(&modules.live));
    follow(&mut owner);
    follow(&mut reader);
    assert_eq!(owner.ask(&format!("Z0,{:x},1", modules.hook)), "OK");
    reader.ask("vCont;c");
    owner.ask("vCont;c");
    modules.load();
    // Whoever hears of it first takes nothing from the others.
    assert_eq!(reader.wait(), "T05library:;thread:p1.1;");
    assert_eq!(owner.wait(), "T05library:;thread:p1.1;");
    reader.ask("?");
    modules.guest.told();
    assert_eq!(owner.ask("vCont;c"), "T05thread:p1.1;");
    assert_eq!(modules.guest.told(), [""; 0], "it has gone on");
}

/// Whoever takes control between a stop and the end of what that causes waits for the next.
#[test]
fn a_stop_wakes_only_those_who_waited_before_it() {
    let modules = with_modules();
    let (mut owner, mut other) = (Client::new(&modules.live), Client::new(&modules.live));
    follow(&mut owner);
    follow(&mut other);
    owner.ask("vCont;c");
    modules.load();
    assert_eq!(owner.wait(), "T05library:;thread:p1.1;");
    // The hook is away for a step, and is put back at the next stop, when there is time.
    let (stopped, has_stopped) = std::sync::mpsc::channel();
    let (go_on, goes_on) = std::sync::mpsc::channel::<()>();
    owner.ask("vCont;s:p1.1");
    *modules.guest.on_insert.lock().unwrap() = Some(Box::new(move || {
        stopped.send(()).unwrap();
        goes_on.recv().unwrap();
    }));
    *modules.guest.pc.lock().unwrap() = modules.hook + 4;
    modules.guest.stops(0, StopReason::Signal(5));
    has_stopped.recv().unwrap();
    assert!(other.command("control take").starts_with("This client"));
    assert_eq!(other.ask("vCont;c"), "");
    go_on.send(()).unwrap();
    assert_eq!(&owner.wait()[..3], "T05");
    assert!(!other.is_woken(), "it hears of a stop of before");
    modules.guest.stops(0, StopReason::Signal(2));
    assert_eq!(other.wait(), "T02thread:p1.1;");
}

/// What stops the guest on its way over kstub's own breakpoint is told, whatever it is.
#[test]
fn a_stop_on_the_way_over_the_hook_is_told() {
    let modules = with_modules();
    let mut client = Client::new(&modules.live);
    follow(&mut client);
    client.ask("vCont;c");
    modules.load();
    assert_eq!(client.wait(), "T05library:;thread:p1.1;");
    modules.guest.told();
    modules.guest.stops(0, StopReason::Watch(Point::Write, VirtAddr(0x10)));
    assert_eq!(client.ask("vCont;c"), "T05watch:10;thread:p1.1;");
    let hook = format!("{:#x} 1", modules.hook);
    assert_eq!(
        modules.guest.told(),
        [
            format!("remove Software {hook}"),
            "resume [(Some(0), Step)]".to_owned(),
            format!("insert Software {hook}"),
        ]
    );
}

/// An instruction that does not end is stopped, and that stop is told.
#[test]
fn an_instruction_at_the_hook_that_does_not_end() {
    let modules = with_modules();
    let mut client = Client::new(&modules.live);
    follow(&mut client);
    client.ask("vCont;c");
    modules.load();
    assert_eq!(client.wait(), "T05library:;thread:p1.1;");
    modules.guest.told();
    // Nothing stops it but the interrupt.
    assert_eq!(client.ask("vCont;c"), "T02thread:p1.2;");
    let hook = format!("{:#x} 1", modules.hook);
    assert_eq!(
        modules.guest.told(),
        [
            format!("remove Software {hook}"),
            "resume [(Some(0), Step)]".to_owned(),
            "interrupt".to_owned(),
            format!("insert Software {hook}"),
        ]
    );
}
