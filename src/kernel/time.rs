//! Clocks: how long the kernel has been up, what time it is, and how often it ticks.
//!
//! Never assumes HZ: the timekeeper holds the length of a tick, and jiffies since boot confirm it. Values are those
//! of the timekeeper's last update, which is less than a tick before the end on a kernel that was not wedged.
//! Source: `include/linux/timekeeper_internal.h`, `kernel/time/timekeeping.c`, `include/linux/jiffies.h`.

use super::{Kernel, Object, ObjectError};
use std::fmt;

/// `NTP_SCALE_SHIFT`: fixed-point bits of the timekeeper's tick length.
const NTP_SCALE_SHIFT: u32 = 32;
/// `FSHIFT`: fixed-point bits of the load averages.
const FSHIFT: u32 = 11;

/// The timekeeper's time, in nanoseconds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Clock {
    /// Since boot, without the time asleep: what timestamps of tasks and of most of the kernel are of.
    pub monotonic: u64,
    /// Since boot: the uptime.
    pub boottime: u64,
    /// Since 1970 in UTC.
    pub real: u64,
    /// Ticks a second.
    pub hz: Option<u32>,
    /// What jiffies since boot divided by the uptime say HZ is; `None` without jiffies or within the first second.
    pub hz_by_jiffies: Option<u32>,
}

impl Kernel {
    fn timekeeper(&self) -> Result<Object<'_>, ObjectError> {
        // Since about v6.13 struct tk_data has a name, and since about v6.17 there is one for each clock.
        for symbol in ["timekeeper_data", "tk_core"] {
            if let Ok(data) = self.global("tk_data", symbol) {
                return data.member("timekeeper");
            }
        }
        // Before, the structure around the timekeeper has no name; its shadow is the copy that updates are made in.
        self.global("timekeeper", "shadow_timekeeper")
    }

    /// The clocks.
    pub fn clock(&self) -> Result<Clock, ObjectError> {
        let tk = self.timekeeper()?;
        let mono = tk.member("tkr_mono")?;
        let shift = (mono.get("shift")? as u32).min(63);
        let nsec = mono.get("xtime_nsec")? >> shift;
        let monotonic = mono.get("base")?.wrapping_add(nsec);
        let seconds = tk.get("xtime_sec")?;
        // ntp_tick is the length of a tick; what NTP slews it by is far below one part in a hundred.
        let tick = tk.get("ntp_tick")? >> NTP_SCALE_SHIFT;
        let hz = 1_000_000_000u64.saturating_add(tick / 2).checked_div(tick);
        let hz = hz.and_then(|hz| u32::try_from(hz).ok()).filter(|hz| (1..=10_000).contains(hz));
        Ok(Clock {
            monotonic,
            boottime: monotonic.wrapping_add(tk.get("offs_boot")?),
            real: seconds.wrapping_mul(1_000_000_000).wrapping_add(nsec),
            hz,
            hz_by_jiffies: self.hz_by_jiffies(monotonic),
        })
    }

    /// `jiffies_64` starts five minutes before 32 bits wrap: after `t` seconds it is 2³² − 300·HZ + t·HZ.
    fn hz_by_jiffies(&self, monotonic: u64) -> Option<u32> {
        let jiffies = self.read_u64(self.symbol("jiffies_64").or_else(|| self.symbol("jiffies"))?)?;
        let beyond = jiffies.wrapping_sub(1 << 32) as i64 as f64;
        let seconds = monotonic as f64 / 1e9 - 300.0;
        // Near five minutes of uptime the two say nothing of each other.
        let hz = (seconds.abs() > 1.0).then(|| (beyond / seconds).round())?;
        (1.0..=10_000.0).contains(&hz).then_some(hz as u32)
    }

    /// The load averages of 1, 5 and 15 minutes.
    pub fn load_average(&self) -> Option<[f64; 3]> {
        let words: [u8; 24] = self.read_array(self.symbol("avenrun")?)?;
        let word = |i: usize| crate::bytes::u64_at(&words, i * 8).unwrap_or(0) as f64;
        Some([0, 1, 2].map(|i| word(i) / f64::from(1u32 << FSHIFT)))
    }
}

/// Nanoseconds since 1970, shown as a date in UTC.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Date(pub u64);

impl fmt::Display for Date {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.0 / 1_000_000_000;
        let (days, second) = (seconds / 86_400, seconds % 86_400);
        // Years that begin on 1 March, so that the leap day is the last; 400 of them have 146097 days.
        let day = days + 719_468;
        let (era, day) = (day / 146_097, day % 146_097);
        let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
        let day = day - (365 * year + year / 4 - year / 100);
        let month = (5 * day + 2) / 153;
        let (date, month) = (day - (153 * month + 2) / 5 + 1, if month < 10 { month + 3 } else { month - 9 });
        let year = era * 400 + year + u64::from(month <= 2);
        let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
        write!(f, "{year:04}-{month:02}-{date:02} {hour:02}:{minute:02}:{second:02} UTC")
    }
}

/// Nanoseconds shown as days, hours, minutes and seconds: `2 days, 03:04:05`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Span(pub u64);

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.0 / 1_000_000_000;
        match seconds / 86_400 {
            0 => {}
            1 => write!(f, "1 day, ")?,
            days => write!(f, "{days} days, ")?,
        }
        write!(f, "{:02}:{:02}:{:02}", seconds / 3600 % 24, seconds / 60 % 60, seconds % 60)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By `date -u -d @N`.
    #[test]
    fn dates() {
        let shown = |seconds: u64| Date(seconds * 1_000_000_000).to_string();
        assert_eq!(shown(0), "1970-01-01 00:00:00 UTC");
        assert_eq!(shown(951_782_400), "2000-02-29 00:00:00 UTC");
        assert_eq!(shown(951_868_799), "2000-02-29 23:59:59 UTC");
        assert_eq!(shown(1_735_689_599), "2024-12-31 23:59:59 UTC");
        assert_eq!(shown(4_107_542_400), "2100-03-01 00:00:00 UTC");
        assert_eq!(Date(u64::MAX).to_string(), "2554-07-21 23:34:33 UTC");
    }

    #[test]
    fn spans() {
        assert_eq!(Span(59_999_999_999).to_string(), "00:00:59");
        assert_eq!(Span((86_400 + 3_661) * 1_000_000_000).to_string(), "1 day, 01:01:01");
        assert_eq!(Span(2 * 86_400 * 1_000_000_000).to_string(), "2 days, 00:00:00");
    }
}
