//! Routes of local workloads in the main table, and their static neighbours (host.md 7 to 9, 11).
//!
//! Fed by the apply loop with link states and wanted routes per interface; talks to the kernel through
//! a [`Transport`](wire::Transport). The kernel tells what others do to routes and neighbours, so that what
//! is ours is put back at once ([`Routes::disturbed`]); the refresh is for what was not told.
//!
//! An address that leaves an interface has its tracked flows forgotten, and is not routed to another one
//! before that is done ([`Conntrack`]; host.md 10).
//!
//! Invariants: a route is there only while its interface is up, and is written again whenever the
//! interface came up; routes that are not ours are never deleted, and none of ours is on the strength of
//! an incomplete reading (I3, I6); what is as wanted is not written (I5). Whatever fails is tried again
//! later and keeps no other route waiting (I8).

mod disputes;
mod news;
mod own;
mod plan;
mod wire;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use model::{Family, LinkState, Name};
use nix::libc;
use program::RouteSpec;

use crate::clock;
use crate::conntrack::{self, Conntrack};
use crate::options::Options;
use crate::report::DriverReport;
use crate::retry::Backoff;
use disputes::Disputes;
use own::{Interfaces, Ownership};
use plan::{Heard, Table, address_of};

pub use crate::neigh::Neighbour;
pub use news::{NeighbourNews, News, RouteNews};
pub use plan::{KernelRoute, RouteKey, RouteOp};
pub use wire::{Netlink, Reading, Transport};

/// How often a reading that was interrupted is repeated before it counts as incomplete (host.md 9.4).
const READINGS: u32 = 5;
/// Passes over reading and writing in one call.
const PASSES: u32 = 2;
/// So often a route may fail because its interface went away before somebody has to know.
const QUIET_FAILURES: u32 = 4;

/// Portions of news that are taken in before one call's work.
const PORTIONS: u32 = 64;
/// After news were lost, the time between two full readings is at least so many times what one takes.
const READING_SHARE: u32 = 10;

/// Totals, for metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Routes that somebody else had removed or changed, and that were put back at once (U15.d).
    pub restored: u64,
    /// Neighbours that somebody else had changed, and that are written again.
    pub restored_neighbours: u64,
    /// Times that the kernel's messages were lost, each followed by a full reading.
    pub lost_news: u64,
    /// Full readings of the main tables.
    pub readings: u64,
}

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
    conntrack: Conntrack,
    disputes: Disputes,
    /// Wanted routes that somebody else took, until they are back.
    taken: BTreeSet<(Family, RouteKey)>,
    /// When the first route in dispute may be written.
    paced_until: Option<Instant>,
    /// News were lost; everything is read again, but not before the moment below.
    lost: bool,
    reread_after: Option<Instant>,
    /// The kernel cannot be listened to, and that was said.
    deaf: bool,
    /// Room for news.
    news: Vec<News>,
    totals: Totals,
    /// The time of the last call.
    last: Option<Instant>,
}

impl Routes {
    /// Allocates; nothing is asked of the kernel before the first [`Self::sync`].
    pub fn new(options: &Options) -> Self {
        let transport = Netlink::new(options.netlink_timeout, options.ipv6);
        let flows = conntrack::Background::new(options.netlink_timeout);
        Self::with_transport(options, Box::new(transport), Box::new(flows))
    }

    /// Uses other ways to the kernel's routes and tracked flows than sockets of this host.
    pub fn with_transport(
        options: &Options,
        transport: Box<dyn Transport>,
        flows: Box<dyn conntrack::Transport>,
    ) -> Self {
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
            conntrack: Conntrack::with_transport(flows),
            disputes: Disputes::default(),
            taken: BTreeSet::new(),
            paced_until: None,
            lost: false,
            reread_after: None,
            deaf: false,
            news: Vec::new(),
            totals: Totals::default(),
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
        self.hear(now);
        // Whoever waits for the walk is woken by `disturbed`; here it is only asked for.
        while self.conntrack.poll_done(&mut Context::from_waker(Waker::noop()), now).is_ready() {}
        if let Err(error) = self.try_sync(now, &mut report) {
            self.doubt = Doubt::Everything;
            self.reading.failed(now);
            report.errors.push(format!("no answer from the kernel's routing: {error}"));
        }
        self.conntrack.start(now);
        for table in &mut self.tables {
            table.settle(&self.interfaces);
        }
        self.taken
            .retain(|(family, key)| self.tables.iter().any(|table| table.family == *family && table.is_open(key)));
        report
    }

    /// Returns when there is something to do that no batch and no [due time](Self::next_due) asks for:
    /// somebody else changed what is ours, or flows are gone that a route waited for. Nothing is lost if the
    /// future is dropped. Never returns before the first [`Self::sync`].
    pub async fn disturbed(&mut self) {
        std::future::poll_fn(|context| self.poll_disturbed(context)).await;
    }

    fn poll_disturbed(&mut self, context: &mut Context<'_>) -> Poll<()> {
        if self.last.is_none() {
            return Poll::Pending;
        }
        let now = clock::now();
        let mut work = false;
        while let Poll::Ready(done) = self.conntrack.poll_done(context, now) {
            let mut open = self.tables.iter().flat_map(|table| table.open_addresses(&self.interfaces));
            work |= open.any(|address| done.contains(&address));
        }
        let mut news = std::mem::take(&mut self.news);
        while !work && let Poll::Ready(heard) = self.transport.poll_news(context, &mut news) {
            match heard {
                Ok(()) => work = self.take_in(&mut news, now),
                Err(error) => {
                    self.cannot_hear(&error);
                    work = true;
                }
            }
        }
        self.news = news;
        if work { Poll::Ready(()) } else { Poll::Pending }
    }

    /// Totals, for metrics.
    pub const fn totals(&self) -> Totals {
        self.totals
    }

    /// Totals of the removal of tracked flows, for metrics.
    pub fn conntrack_totals(&self) -> conntrack::Totals {
        self.conntrack.totals()
    }

    /// Routes that somebody else keeps taking away, for metrics.
    pub fn in_dispute(&self) -> usize {
        self.disputes.len(clock::now())
    }

    // === news ===

    /// Takes in what others did up to now, so that it is not mistaken for something later.
    fn hear(&mut self, now: Instant) {
        let mut news = std::mem::take(&mut self.news);
        for _ in 0..PORTIONS {
            let more = self.transport.take_news(&mut news);
            self.take_in(&mut news, now);
            match more {
                Ok(true) => (),
                Ok(false) => {
                    self.deaf = false;
                    break;
                }
                Err(error) => {
                    self.cannot_hear(&error);
                    break;
                }
            }
        }
        self.news = news;
    }

    fn cannot_hear(&mut self, error: &io::Error) {
        if !std::mem::replace(&mut self.deaf, true) {
            let effect = "what others do to routes is seen at the refresh only";
            tracing::warn!(%error, effect, "the kernel's route messages cannot be followed");
        }
    }

    /// Takes news in. Returns true if there is something to do now.
    fn take_in(&mut self, news: &mut Vec<News>, now: Instant) -> bool {
        let mut work = false;
        for news in news.drain(..) {
            work |= match news {
                News::Lost => {
                    self.totals.lost_news += u64::from(self.read_at.is_some());
                    !std::mem::replace(&mut self.lost, true)
                }
                News::Route(news) => self.take_route_in(&news, now),
                News::Neighbour(news) => self.take_neighbour_in(&news),
            };
        }
        work
    }

    fn take_route_in(&mut self, news: &RouteNews, now: Instant) -> bool {
        let RouteNews { family, key, route, gone, by } = *news;
        let Some(table) = self.tables.iter_mut().find(|table| table.family == family) else { return false };
        match table.heard(key, &route, gone) {
            Heard::Nothing => return false,
            Heard::Vanished => return true,
            Heard::Lost => (),
            Heard::Doubtful => self.doubt = self.doubt.max(Doubt::Routes),
        }
        if let Some(index) = table.wanted_on(&key, &self.interfaces) {
            self.taken.insert((family, key));
            // What the kernel does by itself, it does to interfaces that go down.
            if by != 0 && self.disputes.taken(family, key, now) {
                let RouteKey { destination, metric, .. } = key;
                let interface = self.interfaces.name(index).map_or("", |name| name);
                let process = process_of(by);
                tracing::warn!(
                    route = %destination, metric, interface, port = by, process,
                    "somebody keeps removing a route of ours: five times within a minute; it is put back each time"
                );
            }
        }
        true
    }

    fn take_neighbour_in(&mut self, news: &NeighbourNews) -> bool {
        let NeighbourNews { index, address, mac } = *news;
        let Some(table) = self.tables.iter().find(|table| table.family == Family::V4) else { return false };
        let mut names = table.holders_of(address).filter(|name| self.interfaces.up(name) == Some(index));
        let Some(name) = names.next() else { return false };
        let as_wanted = table.neighbours(name).any(|(one, wanted)| one == address && mac == Some(wanted));
        if as_wanted || !table.neighbours(name).any(|(one, _)| one == address) {
            return false;
        }
        self.totals.restored_neighbours += 1;
        self.neighbours.entry(Name::clone(name)).or_default();
        true
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
        let lost = self.lost.then(|| (self.reread_after.unwrap_or(last), "route messages were lost"));
        let paced = self.paced_until.map(|due| (due, "routes in dispute"));
        let flows = self.conntrack.next_due().map(|due| (due, "flows of departed addresses"));
        [refresh, failed, neighbours, protected, lost, paced, flows].into_iter().flatten().min()
    }

    fn try_sync(&mut self, now: Instant, report: &mut DriverReport) -> io::Result<()> {
        if self.refresh.zip(self.read_at).is_some_and(|(period, read_at)| now >= read_at + period) {
            self.doubt = Doubt::Everything;
        }
        if self.lost && self.reread_after.is_none_or(|after| now >= after) {
            self.doubt = Doubt::Everything;
        }
        self.forget_departed();
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
                self.forget_departed();
            }
            self.protected_until = None;
            self.paced_until = None;
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
            let mut open = self.tables.iter().flat_map(|table| table.open_addresses(&self.interfaces));
            let held = open.find(|address| self.conntrack.holds(*address));
            let held = || held.map(|address| format!("the route to {address} waits until former flows are removed"));
            report.waiting = route.or_else(neighbour).or_else(held);
        }
        Ok(())
    }

    /// Queues the addresses of routes that went without our doing.
    fn forget_departed(&mut self) {
        for table in &mut self.tables {
            for address in table.departures(&self.interfaces) {
                self.conntrack.forget(address);
            }
        }
    }

    // === reading ===

    /// Returns whether the reading is known to be complete.
    fn read_routes(&mut self, now: Instant, report: &mut DriverReport) -> io::Result<bool> {
        let mut complete = true;
        let began = clock::now();
        self.lost = false;
        self.totals.readings += 1;
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
        let ended = clock::now();
        self.reread_after = Some(ended + ended.saturating_duration_since(began) * READING_SHARE);
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
            let key = key_of(&op);
            let ready = self.failed.get(&(family, key)).is_none_or(|backoff| backoff.ready(now));
            let paced = self.disputes.not_before(family, &key, now);
            let address = address_of(&key.destination).filter(|_| matches!(op, RouteOp::Replace(..)));
            if address.is_some_and(|address| self.conntrack.holds(address)) {
                table.retry(key);
            } else if paced.is_some() {
                self.paced_until = [self.paced_until, paced].into_iter().flatten().min();
                table.retry(key);
            } else if ready {
                ops.push(op);
            } else {
                table.retry(key);
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
                    match op {
                        RouteOp::Replace(..) => self.totals.restored += u64::from(self.taken.remove(&(family, key))),
                        RouteOp::Delete(_, index) => {
                            if let Some(address) = table.departure(&key, *index, &self.interfaces) {
                                self.conntrack.forget(address);
                            }
                        }
                    }
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

/// The process that a netlink port most likely belongs to: the first socket of a process has its id.
fn process_of(port: u32) -> Option<String> {
    /// No process id is larger.
    const LARGEST: u32 = 1 << 22;
    let name = std::fs::read_to_string(format!("/proc/{port}/comm"));
    (port <= LARGEST).then_some(name.ok()?.trim().to_owned())
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
