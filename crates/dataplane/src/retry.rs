//! When to try something again that failed.

use std::time::{Duration, Instant};

const FIRST: Duration = Duration::from_millis(100);

/// The reference gives up after about a second and ends the process; a driver of ours keeps trying for as
/// long as the process lives (netfilter.md 16.6).
const LONGEST: Duration = Duration::from_secs(10);

/// Growing pauses between attempts: 100 ms, doubled up to 10 s (I8).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Backoff {
    failures: u32,
    until: Option<Instant>,
}

impl Backoff {
    /// True if an attempt may be made.
    pub fn ready(&self, now: Instant) -> bool {
        self.until.is_none_or(|until| now >= until)
    }

    /// When the next attempt is due; `None` if nothing failed.
    pub fn due(&self) -> Option<Instant> {
        self.until
    }

    /// Failures in a row.
    pub fn failures(&self) -> u32 {
        self.failures
    }

    /// Notes a failure.
    pub fn failed(&mut self, now: Instant) {
        self.failed_for(FIRST.saturating_mul(1 << self.failures.min(20)).min(LONGEST), now);
    }

    /// Notes a failure after which there is this pause.
    pub fn failed_for(&mut self, pause: Duration, now: Instant) {
        self.failures = self.failures.saturating_add(1);
        self.wait_for(pause, now);
    }

    /// Puts the next attempt off although nothing failed.
    pub fn wait_for(&mut self, pause: Duration, now: Instant) {
        self.until = Some(now + pause);
    }

    /// Forgets all failures.
    pub fn succeeded(&mut self) {
        *self = Self::default();
    }

    /// Makes the next attempt due, because what it waits for may have come.
    pub fn hurry(&mut self, now: Instant) {
        self.until = self.until.map(|until| until.min(now));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_ten_seconds_and_end_with_success() {
        let now = Instant::now();
        let mut backoff = Backoff::default();
        assert!(backoff.ready(now));
        let mut pauses = Vec::new();
        for _ in 0..9 {
            backoff.failed(now);
            pauses.push((backoff.due().unwrap() - now).as_millis());
        }
        assert_eq!(pauses, [100, 200, 400, 800, 1600, 3200, 6400, 10_000, 10_000]);
        assert!(!backoff.ready(now) && backoff.ready(now + LONGEST));
        backoff.hurry(now);
        assert!(backoff.ready(now) && backoff.due().is_some());
        backoff.succeeded();
        assert!(backoff.ready(now) && backoff.due().is_none());
    }
}
