//! Routes of local workloads in the main table, and their static neighbours (host.md 7 to 9, 11).
//!
//! Fed by the apply loop with link states and wanted routes per interface; talks to the kernel through
//! a [`Transport`](wire::Transport).
//!
//! Invariants: a route is there only while its interface is up, and is written again whenever the
//! interface came up; routes that are not ours are never deleted, and none of ours is on the strength of
//! an incomplete reading (I3, I6); what is as wanted is not written (I5). Whatever fails is tried again
//! later and keeps no other route waiting (I8).

mod own;
mod plan;
mod wire;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::time::{Duration, Instant};

use model::{Family, LinkState, Name};
use nix::libc;
use program::RouteSpec;

use crate::options::Options;
use crate::report::DriverReport;
use crate::retry::Backoff;
use own::{Interfaces, Ownership};
use plan::Table;

pub use crate::neigh::Neighbour;
pub use plan::{KernelRoute, RouteKey, RouteOp};
pub use wire::{Netlink, Reading, Transport};

/// How often a reading that was interrupted is repeated before it counts as incomplete (host.md 9.4).
const READINGS: u32 = 5;
/// Passes over reading and writing in one call.
const PASSES: u32 = 2;
/// So often a route may fail because its interface went away before somebody has to know.
const QUIET_FAILURES: u32 = 4;

/// How much of what is believed about the kernel is in doubt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Doubt {
    Nothing,
    Routes,
    /// Neighbours too.
    Everything,
}

/// See the [module documentation](self).
#[derive(Debug)]
pub struct Routes {
    interfaces: Interfaces,
    ownership: Ownership,
    /// One per family.
    tables: Vec<Table>,
    refresh: Option<Duration>,
    transport: Box<dyn Transport>,
    doubt: Doubt,
    /// When everything was last read.
    read_at: Option<Instant>,
    reading: Backoff,
    failed: BTreeMap<(Family, RouteKey), Backoff>,
    /// Interfaces whose neighbours must be written.
    neighbours: BTreeMap<Name, Backoff>,
    protected_until: Option<Instant>,
    /// The time of the last call.
    last: Option<Instant>,
}

impl Routes {
    /// Allocates; nothing is asked of the kernel before the first [`Self::sync`].
    pub fn new(options: &Options) -> Self {
        Self::with_transport(options, Box::new(Netlink::new(options.netlink_timeout)))
    }

    /// Uses another way to the kernel's routes than a socket of this host.
    pub fn with_transport(options: &Options, transport: Box<dyn Transport>) -> Self {
        let families = Family::BOTH.into_iter().filter(|family| options.ipv6 || *family == Family::V4);
        Self {
            interfaces: Interfaces::new(options),
            ownership: Ownership::new(options),
            tables: families.map(|family| Table::new(family, options.route_protocol)).collect(),
            refresh: options.route_refresh,
            transport,
            doubt: Doubt::Everything,
            read_at: None,
            reading: Backoff::default(),
            failed: BTreeMap::new(),
            neighbours: BTreeMap::new(),
            protected_until: None,
            last: None,
        }
    }

    /// Takes the state of an interface; `None` if it is gone.
    pub fn want_link(&mut self, name: &Name, link: Option<LinkState>) {
        let change = self.interfaces.update(name, link);
        for table in &mut self.tables {
            if let Some(index) = change.gone {
                table.forget_index(index);
            }
            table.touch(name);
        }
        if change.reread {
            // The kernel drops routes of an interface that goes down, and whoever made a new one may have
            // put routes there.
            self.doubt = self.doubt.max(Doubt::Routes);
        }
        if change.came_up {
            self.neighbours.insert(Name::clone(name), Backoff::default());
        } else if self.interfaces.up(name).is_none() {
            // It gets them when it comes up.
            self.neighbours.remove(name);
        }
    }

    /// Takes the complete list of one interface's routes of one family; empty means none are wanted.
    pub fn want_routes(&mut self, family: Family, name: &Name, routes: Vec<RouteSpec>) {
        if let Some(table) = self.tables.iter_mut().find(|table| table.family == family)
            && table.want(name, &routes)
            && family == Family::V4
        {
            self.neighbours.insert(Name::clone(name), Backoff::default());
        }
    }

    /// Declares everything believed about the kernel to be in doubt: the next call reads first.
    pub fn distrust(&mut self) {
        self.doubt = Doubt::Everything;
    }

    /// Brings the kernel's routes and neighbours to what is wanted; the first time after the first,
    /// complete batch.
    #[allow(clippy::unused_async, reason = "the apply loop runs its drivers side by side")]
    pub async fn sync(&mut self, now: Instant) -> DriverReport {
        self.last = Some(now);
        let mut report = DriverReport { driver: "routes".to_owned(), ..DriverReport::default() };
        for table in &mut self.tables {
            table.grace.see(&self.interfaces, now);
        }
        if let Err(error) = self.try_sync(now, &mut report) {
            self.doubt = Doubt::Everything;
            self.reading.failed(now);
            report.errors.push(format!("no answer from the kernel's routing: {error}"));
        }
        report
    }

    /// When the driver wants to be called again, and why. A moment in the past means at once.
    pub fn next_due(&self) -> Option<(Instant, &'static str)> {
        let last = self.last?;
        if self.doubt != Doubt::Nothing {
            // Nothing else is done before.
            return Some((self.reading.due().unwrap_or(last), "routes must be read"));
        }
        let refresh = self.read_at.zip(self.refresh).map(|(read_at, period)| (read_at + period, "route refresh"));
        let failed = self.failed.values().filter_map(Backoff::due).min().map(|due| (due, "route retry"));
        let neighbours = self.neighbours.values().map(|backoff| backoff.due().unwrap_or(last)).min();
        let neighbours = neighbours.map(|due| (due, "neighbour retry"));
        let protected = self.protected_until.map(|due| (due, "routes of unknown workloads"));
        [refresh, failed, neighbours, protected].into_iter().flatten().min()
    }

    fn try_sync(&mut self, now: Instant, report: &mut DriverReport) -> io::Result<()> {
        if self.refresh.zip(self.read_at).is_some_and(|(period, read_at)| now >= read_at + period) {
            self.doubt = Doubt::Everything;
        }
        let mut permanent = None;
        for _ in 0..PASSES {
            let mut complete = true;
            if self.doubt != Doubt::Nothing {
                if !self.reading.ready(now) {
                    report.waiting = Some("routes could not be read".to_owned());
                    return Ok(());
                }
                if self.doubt == Doubt::Everything {
                    permanent = Some(self.read_neighbours(now, report)?);
                }
                complete = self.read_routes(now, report)?;
            }
            self.protected_until = None;
            for at in 0..self.tables.len() {
                self.write_routes(at, now, complete, report)?;
            }
            if self.doubt == Doubt::Nothing || !complete {
                break;
            }
        }
        self.write_neighbours(permanent.unwrap_or_default(), now, report)?;
        if report.errors.is_empty() && report.waiting.is_none() {
            // What has failed before and is not due is not well because the rest is.
            let route = self.failed.keys().next();
            let route = route.map(|(_, key)| format!("route {} waits for its next attempt", key.destination));
            let neighbour =
                || self.neighbours.keys().next().map(|name| format!("neighbours on {name} wait for the next attempt"));
            report.waiting = route.or_else(neighbour);
        }
        Ok(())
    }

    // === reading ===

    /// Returns whether the reading is known to be complete.
    fn read_routes(&mut self, now: Instant, report: &mut DriverReport) -> io::Result<bool> {
        let mut complete = true;
        for table in &mut self.tables {
            let mut reading = wire::Reading::default();
            for _ in 0..READINGS {
                report.reads += 1;
                reading = self.transport.read(table.family)?;
                if reading.complete {
                    break;
                }
            }
            complete &= reading.complete;
            let ours = table.ours(reading.routes, self.ownership, &self.interfaces);
            table.read(ours, reading.complete);
        }
        if complete {
            self.doubt = Doubt::Nothing;
            self.reading.succeeded();
        } else {
            self.doubt = self.doubt.max(Doubt::Routes);
            self.reading.failed(now);
            report.errors.push("routes changed while they were read; none is deleted for now".to_owned());
        }
        Ok(complete)
    }

    /// Every interface's neighbours are looked at, and those that are there already are not written.
    fn read_neighbours(&mut self, now: Instant, report: &mut DriverReport) -> io::Result<BTreeSet<Neighbour>> {
        self.read_at = Some(now);
        let wanted = self.tables.iter().filter(|table| table.family == Family::V4).flat_map(Table::interfaces);
        for name in wanted {
            self.neighbours.entry(Name::clone(name)).or_default();
        }
        report.reads += 1;
        Ok(self.transport.read_neighbours()?.into_iter().collect())
    }

    // === writing ===

    fn write_routes(&mut self, at: usize, now: Instant, may_delete: bool, report: &mut DriverReport) -> io::Result<()> {
        let Some(table) = self.tables.get_mut(at) else {
            return Ok(());
        };
        let family = table.family;
        let plan = table.plan(&self.interfaces, now, may_delete);
        self.protected_until = [self.protected_until, plan.protected_until].into_iter().flatten().min();
        let planned: BTreeSet<RouteKey> = plan.ops.iter().map(key_of).collect();
        self.failed.retain(|(other, key), _| *other != family || planned.contains(key));
        let mut ops = Vec::with_capacity(plan.ops.len());
        for op in plan.ops {
            if self.failed.get(&(family, key_of(&op))).is_none_or(|backoff| backoff.ready(now)) {
                ops.push(op);
            } else {
                table.retry(key_of(&op));
            }
        }
        if ops.is_empty() {
            return Ok(());
        }
        let outcomes = self.transport.perform(family, &ops)?;
        for (op, outcome) in ops.iter().zip(outcomes) {
            let key = key_of(op);
            let gone = matches!((op, outcome), (RouteOp::Delete(..), Err(libc::ESRCH)));
            match outcome {
                Err(code) if !gone => {
                    table.retry(key);
                    let backoff = self.failed.entry((family, key)).or_default();
                    backoff.failed(now);
                    let text = describe(op, code, &self.interfaces);
                    if interface_went(code) && backoff.failures() < QUIET_FAILURES {
                        report.waiting = Some(text);
                    } else {
                        report.errors.push(text);
                    }
                }
                Ok(()) | Err(_) => {
                    report.writes += u64::from(!gone);
                    self.failed.remove(&(family, key));
                    if table.done(op) {
                        self.doubt = self.doubt.max(Doubt::Routes);
                    }
                }
            }
        }
        Ok(())
    }

    fn write_neighbours(
        &mut self,
        permanent: BTreeSet<Neighbour>,
        now: Instant,
        report: &mut DriverReport,
    ) -> io::Result<()> {
        let Some(table) = self.tables.iter().find(|table| table.family == Family::V4) else {
            return Ok(());
        };
        let mut due = Vec::new();
        for (name, backoff) in &self.neighbours {
            if let Some(index) = self.interfaces.up(name).filter(|_| backoff.ready(now)) {
                due.extend(table.neighbours(name).map(|(address, mac)| Neighbour { index, address, mac }));
            }
        }
        due.retain(|neighbour| !permanent.contains(neighbour));
        let outcomes = if due.is_empty() { Vec::new() } else { self.transport.write_neighbours(&due)? };
        let mut failed: BTreeSet<&Name> = BTreeSet::new();
        for (neighbour, outcome) in due.iter().zip(outcomes) {
            let Err(code) = outcome else {
                report.writes += 1;
                continue;
            };
            let Some(name) = self.interfaces.name(neighbour.index) else {
                continue;
            };
            failed.insert(name);
            let cause = io::Error::from_raw_os_error(code);
            let text = format!("neighbour {} on {name} cannot be written: {cause}", neighbour.address);
            if interface_went(code) {
                report.waiting = Some(text);
            } else {
                report.errors.push(text);
            }
        }
        self.neighbours.retain(|name, backoff| {
            if failed.contains(name) {
                backoff.failed(now);
                return true;
            }
            !backoff.ready(now)
        });
        Ok(())
    }
}

const fn key_of(op: &RouteOp) -> RouteKey {
    match op {
        RouteOp::Replace(key, _) | RouteOp::Delete(key, _) => *key,
    }
}

/// Errors that mean that the interface is down or gone, of which the link monitor will tell (crates.md N5).
const fn interface_went(code: i32) -> bool {
    matches!(code, libc::ENODEV | libc::ENETDOWN | libc::ENETUNREACH | libc::ENOENT)
}

fn describe(op: &RouteOp, code: i32, interfaces: &Interfaces) -> String {
    let (verb, index) = match op {
        RouteOp::Replace(_, route) => ("written", route.index),
        RouteOp::Delete(_, index) => ("deleted", *index),
    };
    let RouteKey { destination, metric, .. } = key_of(op);
    let name = interfaces.name(index).map_or("no interface", |name| name);
    let cause = io::Error::from_raw_os_error(code);
    format!("route {destination} metric {metric} on {name} cannot be {verb}: {cause}")
}
