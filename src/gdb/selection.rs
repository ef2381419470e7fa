//! Which thread the user means by a command, as far as gdb's packets tell.
//!
//! `qRcmd` names no thread. gdb 16 selects one (`Hg`) before each; gdb 13 does so only before it reads registers or
//! memory that it does not have yet, of whatever thread it reads. What it always does is to ask whether the thread is
//! alive (`T`) when the user types `thread N`, and at each step of `thread apply`; and `info threads` and `thread apply
//! all` read the list of threads first. (Seen with gdb 13.1 and 18.1, `set debug remote 1`.)

use super::threads::Thread;

/// What is known of the thread that the user has selected in gdb.
pub(super) struct Selection {
    user: Thread,
    /// Selected by the packet just before.
    just_selected: Option<Thread>,
    phase: Phase,
}

/// What may be going on in gdb.
enum Phase {
    /// The user selects threads.
    Usual,
    /// The list of threads was read, or the last of them shown: gdb selects them one by one to show them. `next`: no
    /// packet came since the list.
    Listing { next: bool },
    /// `thread apply all`: from the last thread to the first, and back to where the user was.
    Walk(Walk),
}

struct Walk {
    before: Thread,
    /// Threads yet to come.
    left: usize,
    /// Commands run on the first of them, so that many belong to each.
    commands: Option<usize>,
    /// Commands run on this one.
    here: usize,
}

impl Selection {
    pub(super) fn new(user: Thread) -> Self {
        Self { user, just_selected: None, phase: Phase::Usual }
    }

    /// The thread a command is about, which the client sends now.
    pub(super) fn for_command(&mut self) -> Thread {
        let thread = self.just_selected.take().unwrap_or(self.user);
        match &mut self.phase {
            Phase::Usual => {}
            Phase::Listing { .. } => self.phase = Phase::Usual,
            Phase::Walk(walk) => walk.here += 1,
        }
        self.end_walk();
        thread
    }

    /// The thread that would run.
    pub(super) fn user(&self) -> Thread {
        self.user
    }

    /// The client was told that it stopped on `thread`, and selects it.
    pub(super) fn stopped_on(&mut self, thread: Thread) {
        *self = Self::new(thread);
    }

    /// The client reads the list of threads.
    pub(super) fn listed(&mut self) {
        self.just_selected = None;
        self.phase = Phase::Listing { next: true };
    }

    /// `Hg` with a thread.
    pub(super) fn selected(&mut self, thread: Thread) {
        self.other();
        self.just_selected = Some(thread);
        if let Phase::Usual = self.phase {
            self.user = thread;
        }
    }

    /// `T`; `threads` are all of them in their order, `count` in number.
    pub(super) fn asked_alive(
        &mut self,
        thread: Thread,
        count: usize,
        threads: impl DoubleEndedIterator<Item = Thread>,
    ) {
        self.just_selected = None;
        let before = self.user;
        self.user = thread;
        let mut from_last = threads.rev();
        match &mut self.phase {
            Phase::Listing { next: true } if count > 1 && from_last.next() == Some(thread) => {
                self.phase = Phase::Walk(Walk { before, left: count - 1, commands: None, here: 0 });
            }
            Phase::Walk(walk) if walk.left > 0 && from_last.nth(count - walk.left) == Some(thread) => {
                walk.commands.get_or_insert(walk.here);
                walk.here = 0;
                walk.left -= 1;
            }
            phase => *phase = Phase::Usual,
        }
        self.end_walk();
    }

    /// Any other packet.
    pub(super) fn other(&mut self) {
        self.just_selected = None;
        if let Phase::Listing { next } = &mut self.phase {
            *next = false;
        }
    }

    /// Goes back to where the user was, once the last thread has had its commands.
    fn end_walk(&mut self) {
        if let Phase::Walk(Walk { before, left: 0, commands: Some(commands), here }) = &self.phase
            && here >= commands
        {
            self.user = *before;
            // What it still reads of the last thread is no choice of the user's.
            self.phase = Phase::Listing { next: false };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::CpuId;

    const CPUS: [u32; 3] = [0, 1, 3];

    /// Feeds packets: `L` the list, `T3`, `H3`, `g` any other; `c3`: a command, which must be about CPU 3.
    fn follow(packets: &str) {
        let mut selection = Selection::new(Thread::Cpu(CpuId(3)));
        for (i, packet) in packets.split(' ').enumerate() {
            let cpu = || Thread::Cpu(CpuId(packet[1..].parse().unwrap_or_default()));
            match &packet[..1] {
                "L" => selection.listed(),
                "T" => selection.asked_alive(
                    cpu(),
                    CPUS.len(),
                    CPUS.into_iter().map(|cpu| Thread::Cpu(CpuId(cpu))),
                ),
                "H" => selection.selected(cpu()),
                "c" => assert_eq!(selection.for_command(), cpu(), "packet {i} of {packets}"),
                _ => selection.other(),
            }
        }
    }

    #[test]
    fn the_users_thread_is_told_from_those_gdb_looks_at() {
        for packets in [
            "c3 T1 c1 T0 c0",
            // `info threads` shows the others; `thread 2`.
            "L H0 g H1 g H3 g c3 T1 c1",
            "L H0 g H1 g c3 c3 T0 H0 g c0",
            "L T1 c1 L T0 c0",
            // A selection without asking, as scripts make it.
            "c3 H1 g c1 H0 g H0 g c0",
            // Newer gdb selects for each command.
            "L H0 g H1 g H3 c3 H0 c0",
            // `thread apply all p 1`, then a command; with registers to be read on the way, too.
            "L T3 T1 T0 c3",
            "T1 L T3 T1 T0 c1 c1",
            "T1 L T3 H3 g T1 H1 g T0 H0 g m c1",
            // `thread apply all monitor regs`, then a command; two commands each.
            "T1 L T3 c3 T1 c1 T0 c0 c1 c1",
            "T1 L T3 c3 c3 T1 c1 c1 T0 c0 c0 c1",
            // Other orders are the user's own.
            "L T0 T1 T3 c3 L T3 T0 c0 T1 c1",
            "L g T3 T1 T0 c0",
        ] {
            follow(packets);
        }
    }
}
