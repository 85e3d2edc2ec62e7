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

use std::collections::BTreeSet;
use std::time::Instant;

use model::Family;
use program::{SetName, Table, TableChanges, TableId};

use super::backend::{FamilyTools, TableTransport};
use super::hold::BlockedSets;
use super::plan::Setup;
use super::table::{Checks, TableDriver, label};
use crate::clock;
use crate::driver::{Driver as _, Next};
use crate::error::DriverError;
use crate::options::{ChainInsertMode, Variant};
use crate::report::DriverReport;

/// The drivers of one family and the programs they share.
#[derive(Debug)]
pub struct FamilyTables {
    family: Family,
    transport: Box<dyn TableTransport>,
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
        Self { family, transport, drivers: Table::ALL.into_iter().map(driver).collect(), missing_set: false }
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

    /// Starts an apply; see [`TableDriver::begin`].
    pub fn begin(&mut self, blocked_sets: &BlockedSets) {
        self.missing_set = false;
        self.drivers.iter_mut().for_each(|driver| driver.begin(blocked_sets));
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
        self.transport.try_to_hold_open().await;
    }

    /// Returns whether a table was refused because the kernel lacks a set that we believe is there.
    pub fn lacks_set(&self) -> bool {
        self.missing_set
    }

    pub fn is_settled(&self) -> bool {
        self.drivers.iter().all(TableDriver::is_settled)
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
        self.drivers.iter().any(TableDriver::may_name_old_sets)
    }

    /// Returns whether a table has just failed, so that its next attempt is at hand.
    pub fn fails_since_recently(&self, attempts: u32) -> bool {
        self.drivers.iter().any(|driver| (1..=attempts).contains(&driver.failures()))
    }

    /// When the tables want to be run again, and why.
    pub fn due(&self) -> Option<(Instant, &'static str)> {
        self.drivers.iter().filter_map(TableDriver::due).min_by_key(|(at, _)| *at)
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
        if let Some(features) = self.transport.changed_features().await {
            self.drivers.iter_mut().for_each(|driver| driver.set_features(features));
        }
        let (late, early): (Vec<_>, Vec<_>) =
            Table::ALL.into_iter().filter(|table| *table != Table::Filter).partition(|table| self.must_wait(*table));
        let mut reports = Vec::new();
        for table in early.into_iter().chain([Table::Filter]) {
            reports.extend(self.run_one(table).await);
        }
        let filter_settled = self.driver(Table::Filter).is_some_and(|filter| filter.is_settled());
        for table in late {
            if filter_settled {
                reports.extend(self.run_one(table).await);
            } else {
                reports.push(DriverReport {
                    driver: label(TableId { family: self.family, table }),
                    waiting: Some("lets more through and waits for the filter table, which failed".to_owned()),
                    ..DriverReport::default()
                });
            }
        }
        reports
    }

    fn must_wait(&mut self, table: Table) -> bool {
        matches!(table, Table::Raw | Table::Mangle) && self.driver(table).is_some_and(|driver| driver.loosens())
    }

    fn driver(&mut self, table: Table) -> Option<&mut TableDriver> {
        self.drivers.iter_mut().find(|driver| driver.id().table == table)
    }

    async fn run_one(&mut self, table: Table) -> Option<DriverReport> {
        let Self { transport, drivers, missing_set, .. } = self;
        let driver = drivers.iter_mut().find(|driver| driver.id().table == table)?;
        let mut errors = Vec::new();
        while let Next::Do(request) = driver.next(clock::now()) {
            let response = transport.perform(&request).await;
            if let Err(error) = driver.handle(response, clock::now()) {
                *missing_set |= matches!(error, DriverError::SetMissing { .. });
                errors.push(error.full_text());
            }
        }
        let stats = driver.take_stats();
        errors.extend(stats.errors);
        let waiting = driver.failing().filter(|_| errors.is_empty()).map(str::to_owned);
        Some(DriverReport {
            driver: label(driver.id()),
            writes: stats.writes,
            reads: stats.reads,
            errors,
            waiting,
            held: driver.held(),
            repaired: stats.repaired,
            lines: stats.lines,
            ..DriverReport::default()
        })
    }
}
