//! What QEMU reports unasked, and what of it was not our own doing.
//!
//! Knows the events' names. A generation counts everything after which memory or registers may differ.
//! Source: QEMU `qapi/run-state.json`, `qapi/qdev.json`, `qapi/migration.json`.

use super::qmp::lock;
use crate::backend::live::Happening;
use serde_json::Value;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// What is kept of happenings that nobody asks for: the newest.
const MOST_KEPT: usize = 256;

/// What happened, and how often what was read before became old.
#[derive(Default)]
pub(super) struct Events {
    happenings: Mutex<VecDeque<Happening>>,
    /// How many of our own operations that stop or resume the guest are under way.
    ours: AtomicU32,
    generation: AtomicU64,
    /// Whether the memory map may be another.
    map_is_old: AtomicBool,
    stand: Mutex<Stand>,
    /// How the last dump ended, once it has.
    dump: Mutex<Option<Result<(), String>>>,
    dump_ended: Condvar,
}

/// When the guest stood last.
#[derive(Default)]
struct Stand {
    since: Option<Instant>,
    lasted: Option<Duration>,
    ended: Option<Instant>,
}

/// As long as it lives, stops and resumes are our own.
pub(super) struct Ours(Arc<Events>);

impl Drop for Ours {
    fn drop(&mut self) {
        self.0.ours.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Events {
    /// Says that what stops or resumes the guest from now on is our own doing.
    pub(super) fn ours(self: &Arc<Self>) -> Ours {
        self.ours.fetch_add(1, Ordering::SeqCst);
        Ours(Arc::clone(self))
    }

    /// How often the guest went on, stopped or was changed.
    pub(super) fn generation(&self) -> u64 {
        self.generation.load(Ordering::SeqCst)
    }

    /// The guest goes on, or was changed.
    pub(super) fn changed(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
    }

    /// The memory map may be another.
    pub(super) fn map_changed(&self) {
        self.map_is_old.store(true, Ordering::SeqCst);
    }

    /// Whether the memory map may have changed since this was last asked.
    pub(super) fn take_map_is_old(&self) -> bool {
        self.map_is_old.swap(false, Ordering::SeqCst)
    }

    /// How long the guest stood when it last went on after a stop.
    pub(super) fn stood(&self) -> Option<Duration> {
        lock(&self.stand).lasted
    }

    /// How long after `start` the guest last went on, if it did: known more exactly than when that was answered, since then
    /// its vCPUs want the cores that we run on.
    pub(super) fn went_on_after(&self, start: Instant) -> Option<Duration> {
        lock(&self.stand).ended?.checked_duration_since(start)
    }

    /// A dump is about to begin: how another ended does not matter.
    pub(super) fn forget_dump(&self) {
        *lock(&self.dump) = None;
    }

    /// How the dump ended, with QEMU's words for why it failed; `None` if it does not within `patience`.
    pub(super) fn dump_ended(&self, patience: Duration) -> Option<Result<(), String>> {
        let goes_on = |end: &mut Option<_>| end.is_none();
        let waited = self.dump_ended.wait_timeout_while(lock(&self.dump), patience, goes_on);
        waited.unwrap_or_else(PoisonError::into_inner).0.take()
    }

    /// All that happened since this was last asked.
    pub(super) fn take(&self) -> Vec<Happening> {
        lock(&self.happenings).drain(..).collect()
    }

    /// An event as it comes in.
    pub(super) fn happened(&self, event: &str, data: &Value) {
        let by_others = self.ours.load(Ordering::SeqCst) == 0;
        match event {
            "STOP" => {
                self.changed();
                *lock(&self.stand) = Stand { since: Some(Instant::now()), ..Stand::default() };
                if by_others {
                    self.push(Happening::Stopped);
                }
            }
            "RESUME" => {
                self.changed();
                let mut stand = lock(&self.stand);
                let now = Instant::now();
                stand.lasted = stand.since.take().map(|since| now.duration_since(since));
                stand.ended = Some(now);
                drop(stand);
                if by_others {
                    self.push(Happening::Resumed);
                }
            }
            "RESET" => {
                self.changed();
                self.map_changed();
                let reason = data.get("reason").and_then(Value::as_str);
                // Since QEMU 7.2.
                self.push(if reason == Some("snapshot-load") {
                    Happening::Replaced("a snapshot was loaded".into())
                } else {
                    Happening::Reset
                });
            }
            "MIGRATION" if data.get("status").and_then(Value::as_str) == Some("completed") => {
                self.changed();
                self.push(Happening::Replaced("it was migrated".into()));
            }
            "DUMP_COMPLETED" => {
                let error = data.get("error").and_then(Value::as_str);
                *lock(&self.dump) = Some(error.map_or(Ok(()), |why| Err(why.to_owned())));
                self.dump_ended.notify_all();
            }
            "DEVICE_DELETED" | "ACPI_DEVICE_OST" | "MEMORY_DEVICE_SIZE_CHANGE" => {
                self.map_changed();
            }
            _ => {}
        }
    }

    fn push(&self, happening: Happening) {
        let mut happenings = lock(&self.happenings);
        if happenings.len() == MOST_KEPT {
            happenings.pop_front();
        }
        happenings.push_back(happening);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_dump_ends_once() {
        let events = Events::default();
        events.happened("DUMP_COMPLETED", &json!({"result": {"status": "completed"}}));
        events.forget_dump();
        assert_eq!((events.dump_ended(Duration::ZERO), events.stood()), (None, None));
        events.happened("STOP", &Value::Null);
        events.happened("DUMP_COMPLETED", &json!({"result": {"status": "failed"}, "error": "no"}));
        events.happened("RESUME", &Value::Null);
        assert_eq!(events.dump_ended(Duration::ZERO), Some(Err("no".to_owned())));
        assert_eq!(events.dump_ended(Duration::ZERO), None);
        assert!(events.stood().is_some());
    }

    #[test]
    fn when_it_went_on_is_of_the_last_stop() {
        let events = Events::default();
        let start = Instant::now();
        assert_eq!(events.went_on_after(start), None);
        events.happened("STOP", &Value::Null);
        events.happened("RESUME", &Value::Null);
        assert!(events.went_on_after(start).is_some_and(|after| after <= start.elapsed()));
        std::thread::sleep(Duration::from_millis(1));
        assert_eq!(events.went_on_after(Instant::now()), None, "that was before");
        events.happened("STOP", &Value::Null);
        assert_eq!(events.went_on_after(start), None, "it stands");
    }

    #[test]
    fn what_others_do_is_reported_once() {
        let events = Arc::new(Events::default());
        {
            let _ours = events.ours();
            events.happened("STOP", &Value::Null);
            events.happened("RESUME", &Value::Null);
        }
        assert_eq!((events.take(), events.generation()), (vec![], 2));
        events.happened("STOP", &Value::Null);
        events.happened("RESUME", &Value::Null);
        events.happened("RESET", &json!({"guest": true, "reason": "guest-reset"}));
        events.happened("RESET", &json!({"guest": false, "reason": "snapshot-load"}));
        events.happened("NIC_RX_FILTER_CHANGED", &json!([1]));
        let loaded = Happening::Replaced("a snapshot was loaded".into());
        assert_eq!(events.take(), [Happening::Stopped, Happening::Resumed, Happening::Reset, loaded]);
        assert_eq!((events.take(), events.generation()), (vec![], 6));
        assert!(events.take_map_is_old() && !events.take_map_is_old());
        for _ in 0..2 * MOST_KEPT {
            events.happened("STOP", &Value::Null);
        }
        assert_eq!(events.take().len(), MOST_KEPT);
    }
}
