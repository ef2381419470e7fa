//! One client: a loop of read, answer, write on a thread of its own.
//!
//! The kernel's socket buffers are the only queues: a client that sends without reading, stalls or vanishes
//! blocks this loop and no other. (Measured: handing requests and replies between threads or async tasks
//! doubles or triples the time of a small request, of which gdb makes thousands. Being woken for each takes as long
//! as all the rest, so the loop looks for the next request for a moment before it sleeps.)

use super::Source;
use crate::gdb::{Flow, Front, MAX_REQUEST, Settings};
use crate::rsp::Framer;
use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::RecvFlags;
use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::panic::AssertUnwindSafe;
use std::time::{Duration, Instant};

/// How long the loop looks for the next request: what a client takes that asks at once.
const ATTENTIVE: Duration = Duration::from_micros(50);

/// A socket that is asked for a moment before it is slept on.
struct Attentive<'a, S>(&'a S);

impl<S: AsFd> AsFd for Attentive<'_, S> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl<S: AsFd> Read for Attentive<'_, S>
where
    for<'s> &'s S: Read,
{
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let start = Instant::now();
        while start.elapsed() < ATTENTIVE {
            match rustix::net::recv(self.0, &mut *buf, RecvFlags::DONTWAIT) {
                // Whoever else wants this core has it, the client among them.
                Err(Errno::AGAIN) => std::thread::yield_now(),
                Ok((n, _)) => return Ok(n),
                Err(error) => return Err(error.into()),
            }
        }
        let mut stream = self.0;
        stream.read(buf)
    }
}

/// A client's connection, blocking.
pub(super) enum Client {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Client {
    /// What to call it in the log.
    fn name(&self) -> String {
        match self {
            Self::Tcp(stream) => stream.peer_addr().map_or("TCP".to_owned(), |address| address.to_string()),
            Self::Unix(_) => "unix".to_owned(),
        }
    }
}

/// Serves one client in the background until either side ends it.
pub(super) fn start(source: Source, settings: Settings, client: Client) {
    let work = move || {
        // A defect met by one client must not take the others' sessions along.
        let name = client.name();
        let _span = tracing::info_span!("session", client = name).entered();
        tracing::info!("a client came");
        let session = AssertUnwindSafe(|| match client {
            Client::Tcp(stream) => converse(source.front(settings)?, Attentive(&stream), &stream),
            Client::Unix(stream) => {
                make_room(&stream);
                converse(source.front(settings)?, Attentive(&stream), &stream)
            }
        });
        match std::panic::catch_unwind(session) {
            Ok(Ok(end)) => tracing::info!("{end}"),
            Ok(Err(error)) => tracing::info!("the client is gone: {error}"),
            Err(_) => tracing::error!("a session failed and was closed; this is a defect in kstub"),
        }
    };
    if let Err(error) = std::thread::Builder::new().name("kstub-session".to_owned()).spawn(work) {
        tracing::warn!("no thread for a new client: {error}");
    }
}

/// Has the kernel keep two of the longest replies for a client that is still at the last one. Of what there is room for by
/// default such a reply does not fit, and who waits for room is woken when three quarters are empty: neither side works
/// meanwhile. (TCP's buffers grow by themselves.)
fn make_room(stream: &UnixStream) {
    if let Err(error) = rustix::net::sockopt::set_socket_send_buffer_size(stream, 2 * MAX_REQUEST) {
        tracing::info!("replies have the room that there is: {error}");
    }
}

/// The only session, on standard input and output, until it ends or the input does.
pub(super) fn over_stdio(source: &Source, settings: Settings) -> anyhow::Result<()> {
    match converse(source.front(settings)?, std::io::stdin().lock(), std::io::stdout().lock()) {
        // The client ended the session by going away, which is no failure of ours.
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        outcome => {
            tracing::info!("{}", outcome?);
            Ok(())
        }
    }
}

/// Answers everything that comes, until the client says goodbye or its input ends; says which of the two it was.
fn converse(
    mut front: Front,
    mut input: impl Read + AsFd,
    mut output: impl Write,
) -> io::Result<&'static str> {
    let mut framer = Framer::new(MAX_REQUEST);
    let mut chunk = vec![0; MAX_REQUEST];
    let mut reply = Vec::new();
    loop {
        if front.is_running() && stops_first(&input, &front)? {
            reply.clear();
            front.woken(&mut reply);
            output.write_all(&reply)?;
            output.flush()?;
            continue;
        }
        let n = match input.read(&mut chunk) {
            Ok(0) => return Ok("the client closed the connection"),
            Ok(n) => n,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        for event in framer.events(&chunk[..n]) {
            // One reply at a time: many small requests may ask for much memory each.
            reply.clear();
            reply.shrink_to(MAX_REQUEST);
            let flow = front.handle(event, &mut reply);
            output.write_all(&reply)?;
            output.flush()?;
            if flow == Flow::End {
                return Ok("the client detached");
            }
        }
    }
}

/// Waits for the client or for the guest to stop; whether it was the guest.
fn stops_first(input: &impl AsFd, front: &Front) -> io::Result<bool> {
    let Some(guest) = front.wake() else { return Ok(false) };
    let mut both = [PollFd::new(&guest, PollFlags::IN), PollFd::new(input, PollFlags::IN)];
    match rustix::event::poll(&mut both, None) {
        Ok(_) => Ok(!both[0].revents().is_empty()),
        Err(Errno::INTR) => Ok(false),
        Err(error) => Err(error.into()),
    }
}
