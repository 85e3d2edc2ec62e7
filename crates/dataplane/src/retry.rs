//! Back-off of one driver: why it waits and until when.

use std::time::{Duration, Instant};

/// First wait after a failure; doubles up to [`LONGEST`].
const SHORTEST: Duration = Duration::from_millis(100);

/// Longest wait between two attempts. The reference gives up after about a second and ends the
/// process; a driver of ours keeps trying for as long as the process lives (netfilter.md 16.6).
const LONGEST: Duration = Duration::from_secs(10);

/// Remembers failures in a row (I8).
#[derive(Debug, Default)]
pub struct Backoff {
    failures: u32,
    waiting: Option<Waiting>,
}

#[derive(Debug)]
struct Waiting {
    until: Instant,
    reason: String,
}

impl Backoff {
    /// Notes a failure; the next attempt is due after 0.1, 0.2, 0.4 … 10 s.
    pub fn failed(&mut self, now: Instant, reason: impl Into<String>) {
        let factor = 1_u32.checked_shl(self.failures).unwrap_or(u32::MAX);
        let wait = SHORTEST.saturating_mul(factor).min(LONGEST);
        self.failures = self.failures.saturating_add(1);
        self.waiting = Some(Waiting { until: now + wait, reason: reason.into() });
    }

    /// Forgets all failures.
    pub fn succeeded(&mut self) {
        *self = Self::default();
    }

    /// Makes the next attempt due at once, because what it waited for may have changed.
    pub fn hurry(&mut self) {
        self.waiting = None;
    }

    /// Returns until when to wait, or `None` if an attempt may be made.
    pub fn wait_until(&self, now: Instant) -> Option<Instant> {
        self.waiting.as_ref().map(|waiting| waiting.until).filter(|until| *until > now)
    }

    /// Returns when the next attempt is due and why it is needed; `None` without a failure.
    pub fn due(&self) -> Option<(Instant, &str)> {
        self.waiting.as_ref().map(|waiting| (waiting.until, waiting.reason.as_str()))
    }

    /// Number of failures in a row.
    pub fn failures(&self) -> u32 {
        self.failures
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_ten_seconds_and_success_forgets_them() {
        let start = Instant::now();
        let mut backoff = Backoff::default();
        assert_eq!(backoff.wait_until(start), None);
        let mut waits = Vec::new();
        for _ in 0..40 {
            backoff.failed(start, "no luck");
            waits.push(backoff.due().unwrap().0 - start);
        }
        assert_eq!(waits[..4], [100, 200, 400, 800].map(Duration::from_millis));
        assert!(waits[7..].iter().all(|wait| *wait == LONGEST), "{waits:?}");
        assert_eq!(backoff.wait_until(start + LONGEST), None);
        assert_eq!(backoff.due().unwrap().1, "no luck");
        backoff.succeeded();
        assert_eq!(backoff.failures(), 0);
        assert!(backoff.due().is_none());
    }
}
