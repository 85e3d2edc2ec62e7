//! Forgets the tracked flows of addresses that left this host (host.md 10).
//!
//! Fed by the route driver with addresses; tells it which of them are done, because a route to an address
//! waits until the flows of its former holder are gone (host.md 10.4). One walk over the kernel's table
//! serves all addresses that were queued when it began (performance.md 6.9); what comes meanwhile is for the
//! next one. Walks run behind a [`Transport`], on a thread of their own: nothing here waits.
//!
//! Invariant: an address is [held](Conntrack::holds) from the moment it is queued until a walk that began
//! after that has ended, or has failed for good.

mod background;
mod walk;
mod wire;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use crate::options::Options;
use crate::retry::Backoff;

pub use background::Background;

/// So often a walk is tried for an address before its flows are left to their time limits (host.md 10.1).
const ATTEMPTS: u32 = 4;

/// What came of one walk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Walk {
    /// Flows that were looked at.
    pub seen: u64,
    pub removed: u64,
    pub took: Duration,
}

/// Why a walk did not do its work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WalkError {
    /// This kernel lets nobody look at its flows; trying again is of no use.
    Unsupported(String),
    Failed(String),
}

/// Walks over the kernel's table of flows, one at a time, in the background.
pub trait Transport: std::fmt::Debug + Send {
    /// Begins to remove all flows that name one of these addresses. Returns at once; not called again before
    /// the walk has ended.
    fn start(&mut self, addresses: &BTreeSet<IpAddr>);

    /// Ready when the walk has ended; the context is woken then.
    fn poll_end(&mut self, context: &mut Context<'_>) -> Poll<Result<Walk, WalkError>>;
}

/// Totals, for metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    pub walks: u64,
    pub failed_walks: u64,
    pub seen: u64,
    pub removed: u64,
    /// Of the last walk that succeeded.
    pub last_took: Duration,
}

/// See the [module documentation](self).
#[derive(Debug)]
pub struct Conntrack {
    transport: Box<dyn Transport>,
    /// For the next walk, with the number of walks that failed for it.
    queued: BTreeMap<IpAddr, u32>,
    /// Served by the walk that runs.
    walking: BTreeMap<IpAddr, u32>,
    backoff: Backoff,
    /// It was said that this kernel does not let us.
    unsupported: bool,
    totals: Totals,
}

impl Conntrack {
    /// Allocates; a thread is started with the first address.
    pub fn new(options: &Options) -> Self {
        Self::with_transport(Box::new(Background::new(options.netlink_timeout)))
    }

    /// Uses another way to the kernel's flows than a socket of this host.
    pub fn with_transport(transport: Box<dyn Transport>) -> Self {
        Self {
            transport,
            queued: BTreeMap::new(),
            walking: BTreeMap::new(),
            backoff: Backoff::default(),
            unsupported: false,
            totals: Totals::default(),
        }
    }

    /// Queues an address for the next walk.
    pub fn forget(&mut self, address: IpAddr) {
        self.queued.insert(address, 0);
    }

    /// Returns whether flows of an address may still be there.
    pub fn holds(&self, address: IpAddr) -> bool {
        self.queued.contains_key(&address) || self.walking.contains_key(&address)
    }

    /// Returns whether there is nothing to do and nothing is being done.
    pub fn is_idle(&self) -> bool {
        self.queued.is_empty() && self.walking.is_empty()
    }

    pub fn totals(&self) -> Totals {
        self.totals
    }

    /// When a walk that failed is due again.
    pub fn next_due(&self) -> Option<Instant> {
        self.backoff.due().filter(|_| self.walking.is_empty() && !self.queued.is_empty())
    }

    /// Begins a walk for everything queued, unless one runs or the last one failed a moment ago.
    pub fn start(&mut self, now: Instant) {
        if self.walking.is_empty() && !self.queued.is_empty() && self.backoff.ready(now) {
            self.walking = std::mem::take(&mut self.queued);
            self.transport.start(&self.walking.keys().copied().collect());
        }
    }

    /// Ready with the addresses that are not held any more, as soon as there are some.
    pub fn poll_done(&mut self, context: &mut Context<'_>, now: Instant) -> Poll<BTreeSet<IpAddr>> {
        loop {
            if self.walking.is_empty() {
                return Poll::Pending;
            }
            let Poll::Ready(outcome) = self.transport.poll_end(context) else { return Poll::Pending };
            let done = self.end(outcome, now);
            self.start(now);
            if !done.is_empty() {
                return Poll::Ready(done);
            }
        }
    }

    fn end(&mut self, outcome: Result<Walk, WalkError>, now: Instant) -> BTreeSet<IpAddr> {
        let walked = std::mem::take(&mut self.walking);
        let addresses = walked.len();
        let mut done: BTreeSet<IpAddr> = BTreeSet::new();
        match outcome {
            Ok(walk) => {
                self.backoff.succeeded();
                self.unsupported = false;
                self.totals.walks += 1;
                self.totals.seen += walk.seen;
                self.totals.removed += walk.removed;
                self.totals.last_took = walk.took;
                let Walk { seen, removed, took } = walk;
                tracing::debug!(addresses, seen, removed, ?took, "flows of departed addresses removed");
                done.extend(walked.into_keys());
            }
            Err(WalkError::Unsupported(reason)) => {
                self.totals.failed_walks += 1;
                self.backoff.succeeded();
                if !std::mem::replace(&mut self.unsupported, true) {
                    let effect = "flows of an address that left stay until they time out";
                    tracing::warn!(reason, effect, "the kernel does not let us remove tracked flows");
                }
                done.extend(walked.into_keys());
            }
            Err(WalkError::Failed(reason)) => {
                self.totals.failed_walks += 1;
                self.backoff.failed(now);
                let mut given_up = BTreeSet::new();
                for (address, failures) in walked {
                    if failures + 1 >= ATTEMPTS {
                        given_up.insert(address);
                    } else {
                        // What was queued again meanwhile has all its attempts before it.
                        self.queued.entry(address).or_insert(failures + 1);
                    }
                }
                if let Some(example) = given_up.first() {
                    let count = given_up.len();
                    tracing::error!(reason, %example, count, "flows of departed addresses could not be removed");
                }
                // One that was queued again is not done.
                done.extend(given_up.into_iter().filter(|address| !self.queued.contains_key(address)));
                if self.queued.is_empty() {
                    self.backoff.succeeded();
                }
            }
        }
        done.retain(|address| !self.queued.contains_key(address));
        done
    }
}
