//! The GDB stub that QEMU offers: found, or started for us and ended again.
//!
//! Knows where it listens and no packet. Source: QEMU `hmp-commands.hx` (`gdbserver`), `gdbstub/system.c`
//! (`gdbserver_start`), `chardev/char-socket.c` (how `query-chardev` shows an address).

use super::qmp::{Qmp, nonsense};
use super::stub::Stub;
use super::{QmpAddress, SocketAddress, StubAddress};
use crate::backend::live::LiveError;
use qapi::qmp::query_chardev;
use serde_json::Value;
use std::fs::Permissions;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

const ATTACHING: &str = "attaching to QEMU's GDB stub";
/// How the directory is called that a stub's socket is made in.
const DIRECTORY: &str = "kstub-";
/// How its socket is.
const SOCKET: &str = "gdb";
/// QEMU's name for the stub's character device, unless it was given one by its own.
const LABEL: &str = "gdb";

/// Where a stub listens.
pub(super) struct Offer {
    pub(super) address: StubAddress,
    /// Whether it was started for us.
    pub(super) is_ours: bool,
    /// Whether another session's is or was there, which was killed.
    pub(super) is_left_over: bool,
    directory: Option<tempfile::TempDir>,
}

impl Offer {
    /// The stub that is `given`, or that QEMU has, or that it starts now.
    pub(super) fn find(
        qmp: &Qmp,
        monitor: &QmpAddress,
        given: Option<&StubAddress>,
    ) -> Result<Self, LiveError> {
        let of = |address, is_left_over| Self { address, is_ours: false, is_left_over, directory: None };
        if let Some(address) = given {
            return Ok(of(address.clone(), false));
        }
        let Some(device) = device(qmp)? else { return Self::start(qmp, false) };
        let not_now = |why: String| LiveError::NotNow { what: ATTACHING.into(), why };
        let Some(address) = device.strip_prefix("disconnected:") else {
            return Err(not_now(format!(
                "another debugger is connected to it ({device}); disconnect that first"
            )));
        };
        match SocketAddress::parse(address) {
            Ok(SocketAddress::Unix(path)) if is_a_sessions(&path) => match path.exists() {
                true => Ok(of(SocketAddress::Unix(path), true)),
                // Nobody can connect to it any more. QEMU has one stub at a time.
                false => {
                    qmp.human("gdbserver none")?;
                    Self::start(qmp, true)
                }
            },
            Ok(SocketAddress::Unix(path)) if !path.is_absolute() || !path.exists() => Err(not_now(format!(
                "it listens at '{}', which kstub does not find from here; run kstub where that is (directory, \
                     container), or end the stub by 'gdbserver none' in QEMU's monitor: kstub then starts its own",
                path.display()
            ))),
            Ok(address) => Ok(of(as_seen_from_here(address, monitor), false)),
            Err(_) => Err(not_now(format!("it is at '{device}', where kstub cannot connect"))),
        }
    }

    /// Has QEMU start a stub that only this process finds.
    fn start(qmp: &Qmp, is_left_over: bool) -> Result<Self, LiveError> {
        let of = |address, directory| Self { address, is_ours: true, is_left_over, directory };
        // A socket in a directory of mode 0700 can be made by a QEMU of the same user, or of root.
        if let Some((_, user)) = qmp.peer()
            && let Ok(directory) = tempfile::Builder::new()
                .prefix(DIRECTORY)
                .permissions(Permissions::from_mode(0o700))
                .tempdir()
            && directory.path().metadata().is_ok_and(|made| user == made.uid() || user == 0)
        {
            let path = directory.path().join(SOCKET);
            // The monitor's words end at blanks, options at commas.
            let plain = path.to_str().is_some_and(|path| !path.contains([' ', ',', '"', '\\']));
            if plain {
                qmp.human(&format!("gdbserver unix:{},server=on,wait=off", path.display()))?;
                if path.exists() {
                    return Ok(of(SocketAddress::Unix(path), Some(directory)));
                }
            }
        }
        let answer = qmp.human("gdbserver tcp:127.0.0.1:0,server=on,wait=off")?;
        let device = device(qmp)?.ok_or_else(|| LiveError::Refused {
            what: "starting QEMU's GDB stub".into(),
            why: answer.trim().to_owned(),
        })?;
        let address = device.strip_prefix("disconnected:").unwrap_or(&device);
        let address = SocketAddress::parse(address).map_err(|_| nonsense("query-chardev", &device))?;
        Ok(of(address, None))
    }

    /// The directory that was made for the socket.
    pub(super) fn directory(&self) -> Option<PathBuf> {
        Some(self.directory.as_ref()?.path().to_owned())
    }

    /// Ends the stub, if it was started for us.
    pub(super) fn withdraw(self, qmp: &Qmp) {
        if self.is_ours
            && let Err(error) = qmp.human("gdbserver none")
        {
            tracing::warn!("QEMU's GDB stub was not ended: {error}");
        }
    }

    /// Leaves it as it is, for who comes later.
    pub(super) fn leave(self) {
        if let Some(directory) = self.directory {
            let _ = directory.keep();
        }
    }
}

/// Sees to it that the stub that answered at `address` is that of the guest whose monitor we have: in QEMU's network (a
/// container's, another machine's) the address may be another's than in ours.
pub(super) fn of_this_guest(qmp: &Qmp, address: &StubAddress, mut stub: Stub) -> Result<Stub, LiveError> {
    if !device(qmp)?.is_some_and(|device| device.starts_with("disconnected:")) {
        return Ok(stub);
    }
    // The other guest goes on.
    let _ = stub.detach();
    Err(LiveError::NotNow {
        what: ATTACHING.into(),
        why: format!(
            "another guest answers at {address}: this one's QEMU has that address in another network; run kstub there, \
             or end the stub by 'gdbserver none' in QEMU's monitor and connect by its unix QMP socket"
        ),
    })
}

/// What QEMU's character device for its stub is connected to.
fn device(qmp: &Qmp) -> Result<Option<String>, LiveError> {
    let answer = qmp.execute(query_chardev {})?;
    let devices = answer.as_array().map(Vec::as_slice).unwrap_or_default();
    let text = |device: &Value, key: &str| device.get(key).and_then(Value::as_str).map(str::to_owned);
    let labelled = |label: &str| {
        let device = devices.iter().find(|device| text(device, "label").as_deref() == Some(label))?;
        text(device, "filename")
    };
    Ok(labelled(LABEL).or_else(|| labelled(&own_label(qmp)?)))
}

/// The name of the device in `-gdb chardev:NAME`, if QEMU was started so. While the stub has it it is `gdb` no more.
fn own_label(qmp: &Qmp) -> Option<String> {
    let (pid, _) = qmp.peer()?;
    let words = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    label_in(&words)
}

/// The same in a command line whose words end at NULs.
fn label_in(words: &[u8]) -> Option<String> {
    let words: Vec<_> = words.split(|&byte| byte == 0).map(String::from_utf8_lossy).collect();
    let mut values = words.windows(2).filter_map(|two| match two {
        [option, value] if option == "-gdb" || option == "--gdb" => value.strip_prefix("chardev:"),
        _ => None,
    });
    // QEMU takes the last.
    values.next_back().map(str::to_owned)
}

/// Whether a socket is one that a session of kstub made.
fn is_a_sessions(path: &Path) -> bool {
    let directory = path.parent().and_then(Path::file_name).and_then(|name| name.to_str());
    path.file_name().is_some_and(|name| name == SOCKET)
        && directory.is_some_and(|name| name.starts_with(DIRECTORY))
}

/// An address that QEMU says, where its monitor is reached at another machine.
fn as_seen_from_here(address: StubAddress, monitor: &QmpAddress) -> StubAddress {
    let (SocketAddress::Tcp(stub), SocketAddress::Tcp(monitor)) = (&address, monitor) else { return address };
    let (Some((host, port)), Some((machine, _))) = (stub.rsplit_once(':'), monitor.rsplit_once(':')) else {
        return address;
    };
    if is_any_or_this(host) && !is_any_or_this(machine) {
        return SocketAddress::Tcp(format!("{machine}:{port}"));
    }
    address
}

/// Whether a host's name means the machine that says it.
fn is_any_or_this(host: &str) -> bool {
    host == "localhost" || host == "0.0.0.0" || host == "[::]" || host == "[::1]" || host.starts_with("127.")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::qmp::tests::{fake, reply};
    use super::*;

    #[test]
    fn a_session_of_kstub_is_known_by_its_socket() {
        for (path, ours) in [
            ("/tmp/kstub-abc123/gdb", true),
            ("/tmp/kstub-abc123/other", false),
            ("/run/vm/gdb", false),
            ("gdb", false),
            ("/gdb", false),
        ] {
            assert_eq!(is_a_sessions(Path::new(path)), ours, "{path}");
        }
    }

    #[test]
    fn addresses_of_another_machine() {
        let seen = |stub: &str, monitor: &str| {
            let [stub, monitor] = [stub, monitor].map(|text| SocketAddress::parse(text).unwrap());
            as_seen_from_here(stub, &monitor).to_string()
        };
        assert_eq!(seen("tcp:0.0.0.0:1234", "far:4444"), "tcp:far:1234");
        assert_eq!(seen("tcp:[::]:1234", "[2001:db8::1]:4444"), "tcp:[2001:db8::1]:1234");
        assert_eq!(seen("tcp:127.0.0.1:1234", "127.0.0.1:4444"), "tcp:127.0.0.1:1234");
        assert_eq!(seen("tcp:10.0.0.1:1234", "far:4444"), "tcp:10.0.0.1:1234");
        assert_eq!(seen("tcp:0.0.0.0:1234", "/run/qmp"), "tcp:0.0.0.0:1234");
        assert_eq!(seen("unix:/a", "far:4444"), "unix:/a");
    }

    #[test]
    fn a_device_of_another_name() {
        let label = |line: &str| label_in(line.replace(' ', "\0").as_bytes());
        assert_eq!(label("qemu -gdb chardev:gdb0 -S"), Some("gdb0".to_owned()));
        assert_eq!(label("qemu --gdb chardev:a --gdb chardev:b"), Some("b".to_owned()));
        assert_eq!(label("qemu -gdb tcp::1234 -s chardev:x"), None);
        assert_eq!(label("qemu -gdb"), None);
    }

    /// A stub that is the user's own is never ended, wherever it is.
    #[test]
    fn a_users_stub_is_not_ended() {
        for (filename, ends) in [
            ("disconnected:unix:/nowhere/gdb,server=on", false),
            ("disconnected:unix:relative/gdb,server=on", false),
            ("disconnected:unix:@abstract,abstract=on,server=on", false),
            ("disconnected:unix:/tmp/kstub-gone00/gdb,server=on", true),
        ] {
            let told = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
            let log = std::sync::Arc::clone(&told);
            let (qmp, _) = fake(move |command, to| {
                let value = match command["execute"].as_str().unwrap() {
                    "query-chardev" if log.lock().unwrap().is_empty() => {
                        format!("[{{\"label\": \"gdb\", \"filename\": \"{filename}\"}}]")
                    }
                    "query-chardev" => "[]".to_owned(),
                    _ => {
                        let line = command["arguments"]["command-line"].as_str().unwrap().to_owned();
                        log.lock().unwrap().push(line);
                        "\"\"".to_owned()
                    }
                };
                reply(command, &value, to);
            });
            let found = Offer::find(&qmp, &SocketAddress::Unix("/qmp".into()), None);
            let error = found.err().unwrap().to_string();
            assert_eq!(told.lock().unwrap().iter().any(|line| line == "gdbserver none"), ends, "{filename}");
            assert_eq!(error.contains("gdbserver none"), !ends, "{error}");
        }
    }
}
