//! Whether the dataplane moves: what a watchdog looks at.
//!
//! Touched by the apply loop, the programs that it runs and the drivers; read by the agent from any thread, without
//! a lock. A dataplane that is slow moves, one that hangs does not (U5.c).

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::clock;

/// A shared set of counters; clones count into the same ones.
#[derive(Clone, Default)]
pub struct Progress(Arc<Counters>);

impl std::fmt::Debug for Progress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Progress")
    }
}

struct Counters {
    start: Instant,
    commits: AtomicU64,
    chunks: AtomicU64,
    batches: AtomicU64,
    /// Milliseconds from `start` to the last movement.
    moved: AtomicU64,
}

/// What was counted so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Movement {
    /// Transactions and writes that the kernel took.
    pub commits: u64,
    /// Pieces read from or fed to a program.
    pub chunks: u64,
    /// Requests answered over netlink.
    pub batches: u64,
    /// How long nothing of this has happened.
    pub still_for: Duration,
}

impl Default for Counters {
    fn default() -> Self {
        let zero = || AtomicU64::new(0);
        Self { start: clock::now(), commits: zero(), chunks: zero(), batches: zero(), moved: zero() }
    }
}

impl Progress {
    /// A transaction went in.
    pub fn commits(&self, count: u64) {
        self.note(&self.0.commits, count);
    }

    /// A program took or gave a piece.
    pub fn chunk(&self) {
        self.note(&self.0.chunks, 1);
    }

    /// Netlink requests were answered.
    pub fn batches(&self, count: u64) {
        self.note(&self.0.batches, count);
    }

    fn note(&self, counter: &AtomicU64, count: u64) {
        if count > 0 {
            counter.fetch_add(count, Ordering::Relaxed);
            let since = clock::now().saturating_duration_since(self.0.start).as_millis();
            self.0.moved.fetch_max(u64::try_from(since).unwrap_or(u64::MAX), Ordering::Relaxed);
        }
    }

    /// Returns what was counted so far, and for how long nothing was, as of `now`.
    pub fn movement(&self, now: Instant) -> Movement {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let moved = self.0.start + Duration::from_millis(read(&self.0.moved));
        Movement {
            commits: read(&self.0.commits),
            chunks: read(&self.0.chunks),
            batches: read(&self.0.batches),
            still_for: now.saturating_duration_since(moved),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_is_counted_is_movement() {
        let progress = Progress::default();
        let seen_elsewhere = progress.clone();
        let later = clock::now() + Duration::from_secs(60);
        assert!(seen_elsewhere.movement(later).still_for >= Duration::from_secs(59));
        let notes: [&dyn Fn(); 3] = [&|| progress.commits(2), &|| progress.chunk(), &|| progress.batches(3)];
        for note in notes {
            std::thread::sleep(Duration::from_millis(5));
            let still_for = |at| seen_elsewhere.movement(at).still_for;
            let (now, before) = (clock::now(), still_for(clock::now()));
            note();
            assert!(still_for(now) < before, "{before:?}");
        }
        progress.commits(0);
        let Movement { commits, chunks, batches, .. } = progress.movement(clock::now());
        assert_eq!((commits, chunks, batches), (2, 1, 3));
    }
}
