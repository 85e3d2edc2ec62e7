//! The four tables of one family, in the order that fails closed.
//!
//! Fed with changes by the apply loop, feeds its reports. Tables commit one by one, so there are moments
//! in which one is new and another old (netfilter.md 19.2). The rules:
//!
//! 1. raw, mangle and nat before filter, because what they do first is deny: the reverse-path check must be
//!    there before filter lets a workload speak. At the start, with nothing known, the same.
//! 2. A change of raw or mangle that admits more than before waits until filter is in force, and stays away if
//!    filter fails.
//! 3. A table that fails does not stop the others (I8), but for rule 2.
//! 4. A request that takes long, most often because somebody else holds the xtables lock, is left to go on by
//!    itself: the apply ends without it, and [`FamilyTables::watch`] tells when it is through. Until then the
//!    family's tables wait, as there is one program per family.
//!
//! Between applies the family listens for what others do to its tables, and reads them now and then, which whoever
//! calls may break off at any time.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use model::Family;
use program::{SetName, Table, TableChanges, TableId};

use super::backend::{FamilyTools, TableTransport};
use super::hold::BlockedSets;
use super::lock::LockFigures;
use super::plan::Setup;
use super::table::{Checks, TableDriver, TableRequest, TableResponse, label};
use crate::clock;
use crate::driver::{Driver as _, Next};
use crate::error::DriverError;
use crate::options::{ChainInsertMode, Variant};
use crate::report::DriverReport;

/// A request that takes longer goes on by itself.
const PATIENCE: Duration = Duration::from_secs(1);

/// Why a table waits for a request that goes on by itself.
const BUSY: &str = "a program of the family is still at work, or waits for the xtables lock";

/// The way to the tables of the family.
enum Link {
    Free(Box<dyn TableTransport>),
    /// A request of this table is on its way, longer than an apply waits.
    Busy(Table, BoxFuture<'static, Answered>),
    /// Only while it changes hands.
    Gone,
}

type Answered = (Box<dyn TableTransport>, TableResponse);

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Free(transport) => transport.fmt(f),
            Self::Busy(table, _) => f.debug_tuple("Busy").field(table).finish(),
            Self::Gone => f.write_str("Gone"),
        }
    }
}

/// What a family tells between applies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum News {
    /// Somebody else changed a table.
    ForeignChange,
    /// A request that took long is through.
    Answer,
}

/// The drivers of one family and the programs they share.
#[derive(Debug)]
pub struct FamilyTables {
    family: Family,
    link: Link,
    figures: LockFigures,
    patience: Duration,
    /// In the order of [`Table::ALL`].
    drivers: Vec<TableDriver>,
    missing_set: bool,
}

impl FamilyTables {
    /// Allocates; touches nothing outside the process.
    pub fn new(tools: FamilyTools, variant: Variant, insert_mode: ChainInsertMode, checks: Checks) -> Self {
        let FamilyTools { family, features, transport } = tools;
        let driver = |table| {
            TableDriver::new(TableId { family, table }, Setup { table, variant, insert_mode, features }, checks)
        };
        let drivers = Table::ALL.into_iter().map(driver).collect();
        let (link, figures) = (Link::Free(transport), LockFigures::default());
        Self { family, link, figures, patience: Duration::MAX, drivers, missing_set: false }
    }

    pub fn family(&self) -> Family {
        self.family
    }

    /// Records changes of one table.
    pub fn want(&mut self, table: Table, changes: TableChanges) {
        if let Some(driver) = self.drivers.iter_mut().find(|driver| driver.id().table == table) {
            driver.want(changes);
        }
    }

    /// The policies, profiles and chains that name a set.
    pub fn owners(&self, set: &SetName) -> BTreeSet<String> {
        self.drivers.iter().flat_map(|driver| driver.owners(set)).collect()
    }

    /// Starts an apply; see [`TableDriver::begin`]. `in_haste`: something else waits, so that nobody
    /// waits for a request that took long already. `watched`: reads without a cause are left to the background.
    pub fn begin(&mut self, blocked_sets: &BlockedSets, in_haste: bool, watched: bool) {
        self.missing_set = false;
        self.patience = match (watched, in_haste && self.is_busy()) {
            // Nobody would tell when it is through.
            (false, _) => Duration::MAX,
            (true, true) => Duration::ZERO,
            (true, false) => PATIENCE,
        };
        for driver in &mut self.drivers {
            driver.begin(blocked_sets);
            driver.set_sweeping(!watched);
        }
    }

    /// Returns whether a request is on its way that took longer than an apply waits.
    pub fn is_busy(&self) -> bool {
        matches!(self.link, Link::Busy(..))
    }

    /// Declares everything believed to be stale.
    pub fn distrust(&mut self) {
        self.drivers.iter_mut().for_each(TableDriver::distrust);
    }

    /// Makes failed tables due at once.
    pub fn hurry(&mut self, now: Instant) {
        self.drivers.iter_mut().for_each(|driver| driver.hurry(now));
    }

    /// Finds out whether the restore program may be held open, and does so from then on.
    pub async fn try_to_hold_open(&mut self) {
        if let Link::Free(transport) = &mut self.link {
            transport.try_to_hold_open().await;
        }
    }

    /// Returns whether a table was refused because the kernel lacks a set that we believe is there.
    pub fn lacks_set(&self) -> bool {
        self.missing_set
    }

    pub fn is_settled(&self) -> bool {
        !self.is_busy() && self.drivers.iter().all(TableDriver::is_settled)
    }

    /// Returns whether the filter table held everything wanted at some time since the start.
    pub fn filter_was_in_force(&self) -> bool {
        self.drivers.iter().any(|driver| driver.id().table == Table::Filter && driver.was_settled())
    }

    /// Returns whether a hook is wanted in a base chain of a table.
    pub fn wants_hook(&self, table: Table, base: &str) -> bool {
        self.drivers.iter().any(|driver| driver.id().table == table && driver.wants_hook(base))
    }

    /// See [`TableDriver::may_name_old_sets`].
    pub fn may_name_old_sets(&self) -> bool {
        self.is_busy() || self.drivers.iter().any(TableDriver::may_name_old_sets)
    }

    /// Returns whether a table is about to be written: its request is on its way, or it has just failed, so that its
    /// next attempt is at hand.
    pub fn is_about_to_write(&self, attempts: u32) -> bool {
        self.is_busy() && !self.drivers.iter().any(|driver| driver.failures() > attempts)
            || self.drivers.iter().any(|driver| (1..=attempts).contains(&driver.failures()))
    }

    /// When something must be tried again, and why. Reads in the background are not that.
    pub fn due(&self) -> Option<(Instant, &'static str)> {
        if self.is_busy() {
            return None;
        }
        self.drivers.iter().filter_map(TableDriver::next_attempt).min_by_key(|(at, _)| *at)
    }

    /// Which table is to be read next in the background, and when.
    pub fn sweep_due(&self) -> Option<(Instant, Table)> {
        if self.is_busy() {
            return None;
        }
        let due = |driver: &TableDriver| Some((driver.sweep_due()?, driver.id().table));
        self.drivers.iter().filter_map(due).min_by_key(|(at, _)| *at)
    }

    /// Waits for something that calls for an apply. May be given up at any time.
    pub async fn watch(&mut self) -> News {
        if !self.is_busy() && self.drivers.iter().any(TableDriver::is_in_doubt) {
            // It was told during the last apply, when the table had had its turn.
            return News::ForeignChange;
        }
        loop {
            match &mut self.link {
                Link::Free(transport) => {
                    transport.foreign_change().await;
                    if self.take_foreign_changes() {
                        return News::ForeignChange;
                    }
                }
                Link::Busy(_, answer) => {
                    // Kept where it is until it is there: whoever calls may give up.
                    let answered = answer.await;
                    self.take_late_answer(answered);
                    return News::Answer;
                }
                Link::Gone => std::future::pending().await,
            }
        }
    }

    /// Reads a table in the background, unless it is proven that nobody has changed it. Returns whether something is to be repaired, and what it cost. May be given
    /// up at any time, which changes nothing.
    pub async fn sweep(&mut self, table: Table) -> (bool, Duration) {
        let Self { link, drivers, .. } = self;
        let Some(driver) = drivers.iter_mut().find(|driver| driver.id().table == table) else {
            return (false, Duration::ZERO);
        };
        let Link::Free(transport) = link else { return (false, Duration::ZERO) };
        let began = clock::now();
        if driver.trusts_proofs() && transport.is_unchanged(table).await {
            driver.confirm(clock::now());
            return (false, clock::now().saturating_duration_since(began));
        }
        let before = transport.cpu_time();
        let response = transport.perform(&driver.save()).await;
        let read = clock::now();
        let differs = driver.take_sweep(response, read).unwrap_or_else(|error| {
            let error = error.full_text();
            // It comes again at every refresh for as long as nobody does something about it.
            if driver.could_not_check(&error) {
                tracing::warn!(table = label(driver.id()), error, "table cannot be checked for what others change");
            }
            false
        });
        let parsed = clock::now().saturating_duration_since(read);
        (differs, transport.cpu_time().saturating_sub(before) + parsed)
    }

    /// Lets the drivers doubt what others have changed. Returns whether something is to be looked at.
    fn take_foreign_changes(&mut self) -> bool {
        let Self { link, drivers, .. } = self;
        let Link::Free(transport) = link else { return false };
        let mut concerns = false;
        for change in transport.foreign_changes() {
            if let Some(driver) = drivers.iter_mut().find(|driver| driver.id().table == change.table) {
                concerns |= driver.doubt(&change, clock::now());
            }
        }
        concerns
    }

    /// Takes the answer to the request that took long.
    fn take_late_answer(&mut self, (mut transport, response): Answered) -> Option<(Table, String)> {
        self.figures.add(transport.take_lock_figures());
        let Link::Busy(table, _) = std::mem::replace(&mut self.link, Link::Free(transport)) else { return None };
        let driver = self.drivers.iter_mut().find(|driver| driver.id().table == table)?;
        let error = driver.handle(response, clock::now()).err()?;
        self.missing_set |= matches!(error, DriverError::SetMissing { .. });
        Some((table, error.full_text()))
    }

    /// Chains and rules wanted per table.
    pub fn sizes(&self) -> impl Iterator<Item = (TableId, usize, usize)> {
        self.drivers.iter().map(|driver| {
            let (chains, rules) = driver.size();
            (driver.id(), chains, rules)
        })
    }

    /// Brings all tables to what is wanted, as far as it is due.
    pub async fn run(&mut self) -> Vec<DriverReport> {
        let mut reports = Vec::new();
        if let Some((table, error)) = self.wait_for_late_answer().await {
            reports.push(DriverReport {
                driver: label(TableId { family: self.family, table }),
                errors: vec![error],
                ..DriverReport::default()
            });
        }
        if let Link::Free(transport) = &mut self.link
            && let Some(features) = transport.changed_features().await
        {
            self.drivers.iter_mut().for_each(|driver| driver.set_features(features));
        }
        self.take_foreign_changes();
        let (late, early): (Vec<_>, Vec<_>) =
            Table::ALL.into_iter().filter(|table| *table != Table::Filter).partition(|table| self.must_wait(*table));
        for table in early.into_iter().chain([Table::Filter]) {
            let report = self.run_one(table).await;
            add_to(&mut reports, report);
        }
        let filter_settled = !self.is_busy() && self.driver(Table::Filter).is_some_and(|filter| filter.is_settled());
        for table in late {
            if filter_settled {
                let report = self.run_one(table).await;
                add_to(&mut reports, report);
            } else {
                reports.push(DriverReport {
                    driver: label(TableId { family: self.family, table }),
                    waiting: Some("lets more through and waits for the filter table, which failed".to_owned()),
                    ..DriverReport::default()
                });
            }
        }
        let LockFigures { held, waited } = std::mem::take(&mut self.figures);
        let filter = label(TableId { family: self.family, table: Table::Filter });
        if let Some(report) = reports.iter_mut().find(|report| report.driver == filter) {
            report.lock_held = held;
            report.lock_waited = waited;
        }
        reports
    }

    async fn wait_for_late_answer(&mut self) -> Option<(Table, String)> {
        let Link::Busy(_, answer) = &mut self.link else { return None };
        let answered = tokio::time::timeout(self.patience, answer).await.ok()?;
        self.take_late_answer(answered)
    }

    /// Performs a request; `None` if it takes long and goes on by itself.
    async fn perform(&mut self, table: Table, request: TableRequest) -> Option<TableResponse> {
        let was_in_force = self.filter_was_in_force();
        let Link::Free(mut transport) = std::mem::replace(&mut self.link, Link::Gone) else { return None };
        let answer = async move {
            let response = transport.perform(&request).await;
            (transport, response)
        };
        self.link = Link::Busy(table, answer.boxed());
        let Link::Busy(_, answer) = &mut self.link else { return None };
        // Before the filter is in force nothing is to be gained by going on without.
        let patience = if was_in_force { self.patience.max(PATIENCE) } else { Duration::MAX };
        let (mut transport, response) = tokio::time::timeout(patience, answer).await.ok()?;
        self.figures.add(transport.take_lock_figures());
        self.link = Link::Free(transport);
        Some(response)
    }

    fn must_wait(&mut self, table: Table) -> bool {
        matches!(table, Table::Raw | Table::Mangle) && self.driver(table).is_some_and(|driver| driver.loosens())
    }

    fn driver(&mut self, table: Table) -> Option<&mut TableDriver> {
        self.drivers.iter_mut().find(|driver| driver.id().table == table)
    }

    async fn run_one(&mut self, table: Table) -> DriverReport {
        let mut errors = Vec::new();
        let mut waits = None;
        let began = clock::now();
        loop {
            if self.is_busy() {
                waits = Some(BUSY.to_owned());
                break;
            }
            // Nothing is planned on the strength of what somebody else has changed meanwhile.
            self.take_foreign_changes();
            let Some(driver) = self.driver(table) else { break };
            let Next::Do(request) = driver.next(clock::now()) else { break };
            let Some(response) = self.perform(table, request).await else { continue };
            let Some(driver) = self.driver(table) else { break };
            if let Err(error) = driver.handle(response, clock::now()) {
                self.missing_set |= matches!(error, DriverError::SetMissing { .. });
                errors.push(error.full_text());
            }
        }
        let Some(driver) = self.driver(table) else { return DriverReport::default() };
        let stats = driver.take_stats();
        errors.extend(stats.errors);
        let fighting = driver.fighting();
        let fought = || (!fighting.is_empty()).then(|| "somebody else keeps displacing our rules".to_owned());
        let waiting = waits.or_else(|| driver.failing().map(str::to_owned)).or_else(fought);
        DriverReport {
            driver: label(driver.id()),
            took: clock::now().saturating_duration_since(began),
            writes: stats.writes,
            reads: stats.reads,
            waiting: waiting.filter(|_| errors.is_empty()),
            errors,
            held: driver.held(),
            repaired: stats.repaired,
            lines: stats.lines,
            fighting,
            ..DriverReport::default()
        }
    }
}

/// Takes a driver's report in, beside one that it may have already.
fn add_to(reports: &mut Vec<DriverReport>, report: DriverReport) {
    match reports.iter_mut().find(|known| known.driver == report.driver) {
        Some(known) => known.add(report),
        None => reports.push(report),
    }
}
