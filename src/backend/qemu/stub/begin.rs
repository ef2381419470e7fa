//! How a connection begins: what the stub can do, what the guest's vCPUs and registers are, and an end to what an earlier
//! client has left behind.
//!
//! Source: QEMU `gdbstub/gdbstub.c` (`handle_target_halt`, `handle_set_qemu_sstep`), `gdbstub/system.c` (`gdb_chr_event`).

use super::*;

impl Stub {
    /// Connects, which stops the guest, and learns its registers and vCPUs. All breakpoints that an earlier client
    /// left are removed. Also says where the guest stopped.
    pub(in crate::backend::qemu) fn connect(address: &SocketAddress) -> Result<(Self, StopReply), LiveError> {
        Self::connect_within(address, SOON)
    }

    /// The same where QEMU may be busy for so long.
    pub(in crate::backend::qemu) fn connect_within(
        address: &SocketAddress,
        patience: Duration,
    ) -> Result<(Self, StopReply), LiveError> {
        Self::begin(Socket::connect(address)?, patience)
    }

    pub(in crate::backend::qemu) fn over(socket: Socket) -> Result<(Self, StopReply), LiveError> {
        Self::begin(socket, SOON)
    }

    fn begin(socket: Socket, patience: Duration) -> Result<(Self, StopReply), LiveError> {
        let mut this = Self {
            socket,
            framer: Framer::new(LONGEST_PACKET),
            arrived: VecDeque::new(),
            acks: true,
            features: String::new(),
            description: Description::default(),
            threads: Vec::new(),
            selected: None,
            stopped_on: None,
            running: false,
            steps: BTreeSet::new(),
            seen: BTreeMap::new(),
            step: None,
            early: None,
        };
        // QEMU stops the guest first, and that takes as long as its disks do.
        let features =
            this.ask_bytes(b"qSupported:multiprocess+;vContSupported+;xmlRegisters=i386", patience)?;
        this.features = String::from_utf8_lossy(&features).into_owned();
        if this.offers("QStartNoAckMode+") && this.ask("QStartNoAckMode")? == b"OK" {
            this.acks = false;
        }
        let stopped = this.ask("?")?;
        let stop = stop_reply(&stopped).ok_or_else(|| garbled("?", &stopped))?;
        this.stopped_on = stop.thread;
        this.description = Description::read(|annex| this.annex(annex))?;
        if !this.description.is_x86_64() {
            return Err(LiveError::NotNow {
                what: "attaching to the guest".into(),
                why: "QEMU's target description is not of x86-64; kstub knows no other machine yet".into(),
            });
        }
        this.threads = this.list_threads()?;
        this.remove_all_points()?;
        this.allow_steps()?;
        Ok((this, stop))
    }

    /// Removes whatever breakpoints and watchpoints there are. For `?` QEMU removes those of one vCPU under TCG, and under
    /// KVM all, by whichever vCPU's page tables have them.
    pub(in crate::backend::qemu) fn remove_all_points(&mut self) -> Result<(), LiveError> {
        for thread in self.threads.clone() {
            if self.is_about(thread)? {
                self.ask("?")?;
            }
        }
        self.about_the_stop()
    }

    /// Has packets without a CPU be about this one; `false` if it is no longer there.
    pub(super) fn is_about(&mut self, thread: ThreadId) -> Result<bool, LiveError> {
        match self.expect_ok(format!("Hc{thread}").as_bytes(), "choosing a CPU") {
            Err(LiveError::Refused { .. }) => Ok(false),
            other => other.map(|()| true),
        }
    }

    /// Has them be about the CPU that stopped the guest again: QEMU names it with the next stop that no CPU causes.
    pub(super) fn about_the_stop(&mut self) -> Result<(), LiveError> {
        self.stopped_on.map_or(Ok(()), |thread| self.is_about(thread).map(drop))
    }

    /// Sees to it that a step is one: a session that was killed while it ended steps leaves QEMU with flags for none,
    /// which outlive connections.
    fn allow_steps(&mut self) -> Result<(), LiveError> {
        if self.ask("qqemu.sstep")? != NO_STEPS {
            return Ok(());
        }
        let bits = self.ask("qqemu.sstepbits")?;
        let bits = String::from_utf8_lossy(&bits).into_owned();
        let all = bits
            .split(',')
            .filter_map(|bit| bit.split_once('='))
            .filter_map(|(_, bit)| u8::from_str_radix(bit, 16).ok());
        let all = all.fold(0, |all, bit| all | bit);
        self.expect_ok(format!("Qqemu.sstep={all:#x}").as_bytes(), "letting CPUs step")
    }

    /// Lists the vCPUs anew: some may have come or gone.
    pub(in crate::backend::qemu) fn list_threads_anew(&mut self) -> Result<(), LiveError> {
        self.threads = self.list_threads()?;
        self.selected = None;
        Ok(())
    }

    fn list_threads(&mut self) -> Result<Vec<ThreadId>, LiveError> {
        let mut threads = Vec::new();
        let mut packet = "qfThreadInfo";
        loop {
            let reply = self.ask(packet)?;
            let text = String::from_utf8_lossy(&reply);
            let Some(list) = text.strip_prefix('m') else { break };
            let more: Option<Vec<ThreadId>> = list.split(',').map(ThreadId::parse).collect();
            threads.extend(more.ok_or_else(|| garbled(packet, &reply))?);
            if threads.len() > MOST_THREADS {
                return Err(garbled(packet, &reply));
            }
            packet = "qsThreadInfo";
        }
        if threads.is_empty() { Err(garbled(packet, b"no threads")) } else { Ok(threads) }
    }

    /// A part of the target description, piece by piece.
    fn annex(&mut self, annex: &str) -> Result<Vec<u8>, LiveError> {
        // Names are put into packets: those of QEMU are plain.
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
        let mut whole = Vec::new();
        while annex.chars().all(plain) && whole.len() < LONGEST_ANNEX {
            let packet = format!("qXfer:features:read:{annex}:{:x},{:x}", whole.len(), 0x800);
            let reply = self.ask(&packet)?;
            match reply.split_first() {
                Some((b'm', data)) if !data.is_empty() => whole.extend(unescape(data)),
                Some((b'l', data)) => {
                    whole.extend(unescape(data));
                    return Ok(whole);
                }
                _ => return Err(garbled(&packet, &reply)),
            }
        }
        Err(garbled("qXfer:features:read", annex.as_bytes()))
    }
}
