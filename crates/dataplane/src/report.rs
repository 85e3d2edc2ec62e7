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
    /// Tables are read in the background less often than configured, to stay within their share of the processor.
    pub sweep_stretched: bool,
}

impl Report {
    /// Returns whether something wanted is not in force: an attempt failed, or waits for its next time.
    pub fn failed(&self) -> bool {
        self.drivers.iter().any(|driver| !driver.errors.is_empty() || driver.waiting.is_some())
    }

    /// How long the xtables lock was held, over all tables.
    pub fn lock_held(&self) -> Duration {
        self.drivers.iter().flat_map(|driver| &driver.lock_held).sum()
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
    /// Why the driver is not done, if its last attempt failed and the next one is not due.
    pub waiting: Option<String>,
    /// What is closed or kept as it was instead of being as wanted, because the kernel refuses it; one line
    /// each, as long as it lasts.
    pub held: Vec<String>,
    /// Chains that somebody else had changed.
    pub repaired: u64,
    /// Lines of restore input that went in.
    pub lines: u64,
    /// Sets that could not be destroyed or exchanged because they are in use; tried again.
    pub busy: u64,
    /// Members that were there before they were added, or gone before they were removed.
    pub unneeded: u64,
    /// How long each transaction held the xtables lock; of the tables together, under the family's filter table.
    pub lock_held: Vec<Duration>,
    /// How long transactions waited for the xtables lock.
    pub lock_waited: Duration,
    /// Shared chains in which somebody else keeps displacing our rules, as long as it lasts.
    pub fighting: Vec<String>,
    /// From the beginning of each of its steps to the end.
    pub took: Duration,
}

impl DriverReport {
    /// Takes a later step of the same driver in addition.
    pub fn add(&mut self, more: Self) {
        let Self {
            driver: _,
            writes,
            reads,
            errors,
            waiting,
            held,
            repaired,
            lines,
            busy,
            unneeded,
            lock_held,
            lock_waited,
            fighting,
            took,
        } = more;
        self.took += took;
        self.lock_held.extend(lock_held);
        self.lock_waited += lock_waited;
        self.fighting.extend(fighting);
        self.writes += writes;
        self.reads += reads;
        self.repaired += repaired;
        self.lines += lines;
        self.busy += busy;
        self.unneeded += unneeded;
        self.errors.extend(errors);
        self.held.extend(held);
        self.waiting = waiting.or(self.waiting.take());
    }

    /// Takes a repetition of the driver's work: what was done adds up, what is wrong is what is still wrong.
    pub fn superseded_by(&mut self, later: Self) {
        self.errors.clear();
        self.held.clear();
        self.fighting.clear();
        self.waiting = None;
        self.add(later);
    }

    /// Returns whether the driver did something or has something to say.
    pub fn has_something(&self) -> bool {
        let Self {
            driver: _,
            writes,
            reads,
            errors,
            waiting,
            held,
            repaired,
            lines,
            busy,
            unneeded,
            lock_held,
            lock_waited: _,
            fighting,
            took: _,
        } = self;
        *writes + *reads + *repaired + *lines + *busy + *unneeded > 0
            || !errors.is_empty()
            || waiting.is_some()
            || !(held.is_empty() && lock_held.is_empty() && fighting.is_empty())
    }
}
