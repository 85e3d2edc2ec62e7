//! What came of an apply: feeds status, health, metrics and the log line of the batch.

use std::time::{Duration, Instant};

/// Outcome of one apply.
#[derive(Debug, Default)]
pub struct Report {
    pub seq: u64,
    pub took: Duration,
    /// One entry per driver that had something to do.
    pub drivers: Vec<DriverReport>,
    /// When the loop wants to be called again, and why.
    pub again: Option<(Instant, &'static str)>,
}

impl Report {
    pub fn failed(&self) -> bool {
        self.drivers.iter().any(|driver| !driver.errors.is_empty())
    }

    /// Writes to the kernel over all drivers; 0 when nothing differed.
    pub fn writes(&self) -> u64 {
        self.drivers.iter().map(|driver| driver.writes).sum()
    }
}

/// What one driver did.
#[derive(Debug, Default)]
pub struct DriverReport {
    /// `ipset/4`, `filter/6`, `routes/4`, `sysctl`, …
    pub driver: String,
    /// Requests that changed the kernel: restore transactions, set messages, route messages, sysctl writes.
    pub writes: u64,
    pub reads: u64,
    /// Full error chains, ready for the log.
    pub errors: Vec<String>,
}
