//! One apply: takes a batch and brings the kernel to it.
//!
//! Fed with [`Changes`] by the apply thread, feeds it a [`Report`]. The order (netfilter.md 19):
//!
//! 1. Sets are made and get their new members, so that no rule names a set that is not there (I4). Chains
//!    that name a set which could not be written keep their contents or are closed.
//! 2. Settings of interfaces, then the tables of both families, side by side, each family in the order of
//!    [`FamilyTables`].
//! 3. Routes and neighbours. Nothing leads to a workload before the filter tables were in force for the first
//!    time; from then on they drop what belongs to no known interface, so that a route may come and go
//!    whatever becomes of the tables.
//! 4. Sets lose what they no longer need. This waits for a table that has just failed, so that old rules
//!    meet old sets; it does not wait for one that keeps failing, because a member that stays is a permission
//!    that stays. A set that is full loses them in step 1 if no rule changes: then there is nothing to wait for.
//!
//! Once the filter tables were in force, tables and routes go side by side, and nothing waits for a table whose
//! program takes long, most often because somebody else holds the xtables lock.
//!
//! Between applies [`ApplyLoop::disturbed`] listens for what others do to the tables and reads them now and then; a
//! batch breaks that off.
//!
//! A driver that fails does not stop the others; it comes back by itself (I8). The first batch is complete,
//! so everything of ours that no batch named is swept, but only what a complete listing shows (I3).

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use futures_util::FutureExt as _;
use futures_util::future::{join_all, select_all};
use model::{Family, Name};
use program::{Changes, SetChange, SetName, Table, TableChanges, TableId};
use tracing::{debug, error, info, warn};

use crate::budget::SweepBudget;
use crate::canary::Canary;
use crate::clock;
use crate::error::DriverError;
use crate::ipset::IpSets;
use crate::iptables::family::News;
use crate::iptables::{self, Backend, BlockedSets, Checks, FamilyTables};
use crate::kernel::Kernel;
use crate::options::{ChainInsertMode, Options, Variant};
use crate::report::{DriverReport, Report};
use crate::retry::Backoff;
use crate::routes::Routes;
use crate::sysctl::Sysctls;

/// Attempts of a failing table that step 4 waits for: 0.7 s in all.
const PATIENCE: u32 = 3;

/// Pause between looks at what the other iptables variant holds of ours, if the tables are not refreshed.
const SWEEP_PAUSE: Duration = Duration::from_secs(180);

/// Least time between two applies for the sake of foreign changes.
const REPAIR_PAUSE: Duration = Duration::from_millis(100);

/// Owns all drivers. Lives on the apply thread, inside a current-thread tokio runtime.
#[derive(Debug)]
pub struct ApplyLoop {
    options: Options,
    started: bool,
    sets: IpSets,
    sysctls: Sysctls,
    backend: Box<dyn Backend>,
    tables: Tables,
    routes: Routes,
    /// Of which it was said that they are too large.
    large_sets: BTreeSet<SetName>,
    /// When the tables were last read because a set that should go was in use.
    doubted_at: Option<Instant>,
    /// When to look again at what the other iptables variant holds of ours.
    sweep: Instant,
    /// Whether packets see our rules.
    canary: Canary,
    /// What the last sweep failed at.
    unswept: Vec<String>,
    /// Somebody calls [`ApplyLoop::disturbed`], so that applies need not read tables without a cause.
    watched: bool,
    budget: SweepBudget,
    /// When a foreign change was last repaired.
    repaired_at: Option<Instant>,
}

/// The table drivers: which variant they use is known only after the first look at the host.
#[derive(Debug)]
enum Tables {
    Unknown { wanted: BTreeMap<TableId, TableChanges>, backoff: Backoff, reason: String },
    Known { variant: Variant, families: Vec<FamilyTables> },
}

impl ApplyLoop {
    /// Allocates; touches nothing outside the process.
    pub fn new(options: Options) -> Self {
        let kernel = Kernel::real(&options);
        Self::with_kernel(options, kernel)
    }

    /// Uses another kernel than that of this host.
    pub fn with_kernel(options: Options, kernel: Kernel) -> Self {
        let Kernel { sets, routes, flows, tables: backend, settings } = kernel;
        let tables = Tables::Unknown { wanted: BTreeMap::new(), backoff: Backoff::default(), reason: String::new() };
        Self {
            started: false,
            sets: IpSets::new(&options, sets),
            sysctls: Sysctls::with_tree(&options, settings),
            backend,
            tables,
            routes: Routes::with_transport(&options, routes, flows),
            large_sets: BTreeSet::new(),
            doubted_at: None,
            sweep: clock::now(),
            canary: Canary::default(),
            unswept: Vec::new(),
            watched: false,
            budget: SweepBudget::default(),
            repaired_at: None,
            options,
        }
    }

    /// Applies one batch (an empty one retries what is due, and refreshes if nobody watches). The first batch is
    /// complete: everything of ours that it does not name is swept, after proven-complete reads (I3).
    pub async fn apply(&mut self, changes: Changes) -> Report {
        let started = clock::now();
        let in_haste = !changes.is_empty();
        let Changes { seq, links, sets, tables, interfaces, routes } = changes;
        let mut drivers = Vec::new();
        self.sets.tables_rest(tables.is_empty() && self.tables_are_settled());
        self.want_sets(sets);
        self.want_tables(tables);
        for (name, link) in &links {
            self.sysctls.want_link(name, *link);
            self.routes.want_link(name, *link);
        }
        for (name, spec) in &interfaces {
            self.sysctls.want_interface(name, *spec);
        }
        for ((family, name), routes) in routes {
            self.routes.want_routes(family, &name, routes);
        }
        let mut sysctls = DriverReport { driver: "sysctl".to_owned(), ..DriverReport::default() };
        if !std::mem::replace(&mut self.started, true) {
            sysctls.add(self.sysctls.start(clock::now()));
        }
        self.settle_on_variant(&mut drivers).await;

        let mut sets = timed(|| self.sets.write_additions(clock::now()));
        sysctls.add(timed(|| self.sysctls.sync(clock::now())));
        drivers.push(sysctls);
        self.tell_of_large_sets();
        let (mut tables, routes) = self.run_tables_and_routes(in_haste).await;
        if self.tables_lack_a_set() {
            // Somebody removed it behind our back: once more, after a look at the sets.
            warn!("a table names a set that is gone, reading the sets again");
            self.sets.suspect();
            sets.superseded_by(self.sets.write_additions(clock::now()));
            self.hurry_tables();
            let blocked = self.blocked_sets();
            rerun(&mut tables, run_tables(&mut self.tables, &blocked, in_haste, self.watched).await);
        }
        let routes = match routes {
            Some(routes) => routes,
            None => self.sync_routes().await,
        };
        if !self.old_rules_may_need_old_members() {
            sets.add(timed(|| self.sets.write_removals(clock::now())));
            self.doubt_tables_that_keep_sets();
            self.explain_sets_in_use().await;
        }
        drivers.push(sets);
        drivers.extend(tables);
        drivers.push(routes);
        drivers.extend(self.sweep_other_variant().await);
        drivers.extend(self.prove_packet_path().await);
        drivers.retain(DriverReport::has_something);
        // Tables count their own.
        let asked = drivers.iter().filter(|report| report.lines == 0).map(|report| report.writes + report.reads);
        self.options.progress.batches(asked.sum::<u64>() + 1);
        let took = clock::now().saturating_duration_since(started);
        Report { seq, took, drivers, again: self.again(), sweep_stretched: self.budget.is_stretched() }
    }

    /// Waits, between applies, for something that calls for one although neither a batch nor [`Report::again`] does,
    /// and returns the reason: somebody else changed what is ours, what a driver waited for has come (U15.d), or a
    /// program that took long is through. Meanwhile reads tables that are due for it. An empty [`Self::apply`] does
    /// the rest. May be given up at any time, above all because a batch came: a read is then broken off and comes
    /// again (U5.a), and nothing else is lost.
    pub async fn disturbed(&mut self) -> &'static str {
        self.watched = true;
        let Self { routes, tables, budget, repaired_at, options, .. } = self;
        tokio::select! {
            biased;
            () = routes.disturbed() => "routes were changed by others",
            reason = watch_tables(tables, budget, repaired_at, options.table_refresh) => reason,
        }
    }

    /// Interfaces whose kernel settings are not as wanted yet; their endpoints are down.
    pub fn pending_interfaces(&self) -> impl Iterator<Item = &Name> {
        self.sysctls.pending()
    }

    /// Returns the iptables variant in use, once it is known.
    pub fn variant(&self) -> Option<Variant> {
        match &self.tables {
            Tables::Unknown { .. } => None,
            Tables::Known { variant, .. } => Some(*variant),
        }
    }

    /// Returns chains and rules wanted per table, for metrics.
    pub fn table_sizes(&self) -> Vec<(TableId, usize, usize)> {
        match &self.tables {
            Tables::Unknown { .. } => Vec::new(),
            Tables::Known { families, .. } => families.iter().flat_map(FamilyTables::sizes).collect(),
        }
    }

    fn again(&self) -> Option<(Instant, &'static str)> {
        let tables = match &self.tables {
            Tables::Unknown { backoff, .. } => backoff.due().map(|at| (at, "no iptables")),
            Tables::Known { families, .. } => families.iter().filter_map(FamilyTables::due).min_by_key(|(at, _)| *at),
        };
        // Until everything wanted is in force, the sweep waits for that and not for a time.
        let settled =
            matches!(&self.tables, Tables::Known { families, .. } if families.iter().all(FamilyTables::is_settled));
        let sweep = settled.then_some((self.sweep, "sweep of the other iptables variant"));
        let canary = self.canary.next_due().filter(|_| settled).map(|at| (at, "proof that packets see our rules"));
        // Whoever does not watch reads tables by applying nothing.
        let unwatched = match &self.tables {
            Tables::Known { families, .. } if !self.watched => {
                families.iter().filter_map(FamilyTables::sweep_due).map(|(at, _)| (at, "refresh of a table")).min()
            }
            Tables::Known { .. } | Tables::Unknown { .. } => None,
        };
        let sets = self.sets.next_due();
        let sysctls = self.sysctls.next_due();
        let routes = self.routes.next_due().filter(|_| self.filter_was_in_force());
        [tables, sweep, canary, unwatched, sets, sysctls, routes].into_iter().flatten().min_by_key(|(at, _)| *at)
    }

    // Routes.

    async fn sync_routes(&mut self) -> DriverReport {
        if self.filter_was_in_force() {
            return timed_routes(&mut self.routes).await;
        }
        DriverReport {
            driver: "routes".to_owned(),
            waiting: Some("no routes to workloads before the filter tables are in force".to_owned()),
            ..DriverReport::default()
        }
    }

    fn filter_was_in_force(&self) -> bool {
        match &self.tables {
            Tables::Unknown { .. } => false,
            Tables::Known { families, .. } => families.iter().all(FamilyTables::filter_was_in_force),
        }
    }

    // Sets.

    fn want_sets(&mut self, sets: BTreeMap<(Family, SetName), SetChange>) {
        for ((family, name), change) in sets {
            self.sets.want(family, &name, change);
        }
    }

    /// Sets that rules must not come to rely on, by family.
    fn blocked_sets(&self) -> BTreeMap<Family, BlockedSets> {
        let mut blocked: BTreeMap<Family, BlockedSets> = BTreeMap::new();
        for set in self.sets.failed_sets() {
            blocked.entry(set.family).or_default().insert(set.name, set.too_large);
        }
        blocked
    }

    /// Says once of each set that more members are wanted than it may have, and who named it (users.md U3.b).
    fn tell_of_large_sets(&mut self) {
        let large: BTreeMap<SetName, String> =
            self.sets.failed_sets().filter(|set| set.too_large).map(|set| (set.name, set.reason)).collect();
        for (set, reason) in large.iter().filter(|(set, _)| !self.large_sets.contains(*set)) {
            let owners: BTreeSet<String> = match &self.tables {
                Tables::Unknown { .. } => BTreeSet::new(),
                Tables::Known { families, .. } => families.iter().flat_map(|tables| tables.owners(set)).collect(),
            };
            let owners = owners.into_iter().collect::<Vec<_>>().join(", ");
            error!(%set, reason, owners, "set is too large; what names it is closed");
        }
        self.large_sets = large.into_keys().collect();
    }

    /// Finds out who keeps a set that should have gone long ago (users.md U3.c). One an apply: it takes a look at
    /// all tables.
    async fn explain_sets_in_use(&mut self) {
        let Some(set) = self.sets.unexplained(clock::now()).next().cloned() else { return };
        let users = self.backend.users_of_set(&set, &self.options).await;
        self.sets.explain(&set, &users);
    }

    /// A set that should go and is in use long after the tables were written means that the tables are not
    /// what we believe, unless we keep old rules on purpose. Reads the tables once per refresh of the sets.
    fn doubt_tables_that_keep_sets(&mut self) {
        let Tables::Known { families, .. } = &mut self.tables else { return };
        if !self.sets.in_use() || families.iter().any(FamilyTables::may_name_old_sets) {
            return;
        }
        let pause = self.options.set_refresh.unwrap_or(SWEEP_PAUSE);
        if self.doubted_at.is_none_or(|at| clock::now().saturating_duration_since(at) >= pause) {
            self.doubted_at = Some(clock::now());
            debug!("a set that is not wanted is in use, reading the tables again");
            families.iter_mut().for_each(FamilyTables::distrust);
        }
    }

    // Tables.

    fn tables_lack_a_set(&self) -> bool {
        matches!(&self.tables, Tables::Known { families, .. } if families.iter().any(FamilyTables::lacks_set))
    }

    fn tables_are_settled(&self) -> bool {
        matches!(&self.tables, Tables::Known { families, .. } if families.iter().all(FamilyTables::is_settled))
    }

    fn hurry_tables(&mut self) {
        if let Tables::Known { families, .. } = &mut self.tables {
            families.iter_mut().for_each(|tables| tables.hurry(clock::now()));
        }
    }

    /// Returns whether the sets must wait with what they lose: the tables could not be looked at at all, or one
    /// has just failed.
    fn old_rules_may_need_old_members(&self) -> bool {
        match &self.tables {
            Tables::Unknown { backoff, .. } => backoff.failures() <= PATIENCE,
            Tables::Known { families, .. } => families.iter().any(|tables| tables.is_about_to_write(PATIENCE)),
        }
    }

    fn want_tables(&mut self, tables: BTreeMap<TableId, TableChanges>) {
        match &mut self.tables {
            Tables::Unknown { wanted, .. } => {
                for (id, TableChanges { chains, hooks }) in tables {
                    let all = wanted.entry(id).or_default();
                    all.chains.extend(chains);
                    all.hooks.extend(hooks);
                }
            }
            Tables::Known { families, .. } => {
                for (id, changes) in tables {
                    if let Some(family) = families.iter_mut().find(|tables| tables.family() == id.family) {
                        family.want(id.table, changes);
                    }
                }
            }
        }
    }

    /// Finds the programs and makes the table drivers, unless that is done.
    async fn settle_on_variant(&mut self, drivers: &mut Vec<DriverReport>) {
        let Tables::Unknown { wanted, backoff, reason } = &mut self.tables else { return };
        let mut report = DriverReport { driver: "iptables".to_owned(), ..DriverReport::default() };
        if !backoff.ready(clock::now()) {
            report.waiting = Some(reason.clone());
            drivers.push(report);
            return;
        }
        match prepare(self.backend.as_mut(), &self.options).await {
            Ok((variant, families)) => {
                let wanted = std::mem::take(wanted);
                self.tables = Tables::Known { variant, families };
                self.want_tables(wanted);
            }
            Err(error) => {
                backoff.failed(clock::now());
                *reason = error.full_text();
                report.errors.push(reason.clone());
                drivers.push(report);
            }
        }
    }

    /// Runs the tables, and the routes beside them if those need not wait for the filter.
    async fn run_tables_and_routes(&mut self, in_haste: bool) -> (Vec<DriverReport>, Option<DriverReport>) {
        let blocked = self.blocked_sets();
        let beside = self.filter_was_in_force();
        let Self { tables, routes, watched, .. } = self;
        let tables = run_tables(tables, &blocked, in_haste, *watched);
        if beside {
            let (tables, routes) = futures_util::join!(tables, timed_routes(routes));
            return (tables, Some(routes));
        }
        (tables.await, None)
    }

    /// Sends a packet through our rules when everything wanted is in force for the first time (U6.c).
    async fn prove_packet_path(&mut self) -> Vec<DriverReport> {
        let Tables::Known { variant, families } = &self.tables else { return Vec::new() };
        for tables in families.iter().filter(|tables| self.options.canary && tables.is_settled()) {
            let family = tables.family();
            let due = self.canary.is_due(family, clock::now());
            if due
                && tables.wants_hook(Table::Raw, "PREROUTING")
                && let Some(outcome) = self.backend.prove(family, *variant, &self.options).await
            {
                self.canary.take(family, &outcome, clock::now());
            }
        }
        self.canary.report().collect()
    }

    /// Removes what the variant that is not in use holds of ours, after everything wanted is in force
    /// (netfilter.md 16.9). Tables that the kernel has not loaded are not looked at.
    async fn sweep_other_variant(&mut self) -> Vec<DriverReport> {
        let Tables::Known { variant, families } = &self.tables else { return Vec::new() };
        let settled = families.iter().all(FamilyTables::is_settled);
        if !settled || self.sweep > clock::now() {
            let waits = |driver: &String| DriverReport {
                driver: driver.clone(),
                waiting: Some("what the other variant holds of ours is not removed yet".to_owned()),
                ..DriverReport::default()
            };
            return self.unswept.iter().map(waits).collect();
        }
        let mut reports = Vec::new();
        for family in iptables::backend::families(&self.options) {
            reports.extend(sweep(self.backend.as_mut(), family, variant.other(), &self.options).await);
            reports.extend(self.backend.sweep_nft(family, *variant, &self.options).await);
        }
        let failed = reports.iter().filter(|report: &&DriverReport| !report.errors.is_empty());
        self.unswept = failed.map(|report| report.driver.clone()).collect();
        // Whoever brings something of ours back there must not find it stay.
        self.sweep = clock::now() + self.options.table_refresh.unwrap_or(SWEEP_PAUSE);
        reports.retain(|report| report.writes > 0 || !report.errors.is_empty());
        reports
    }
}

async fn run_tables(
    tables: &mut Tables,
    blocked: &BTreeMap<Family, BlockedSets>,
    in_haste: bool,
    watched: bool,
) -> Vec<DriverReport> {
    let Tables::Known { families, .. } = tables else { return Vec::new() };
    let none = BlockedSets::new();
    for tables in families.iter_mut() {
        tables.begin(blocked.get(&tables.family()).unwrap_or(&none), in_haste, watched);
    }
    let runs = families.iter_mut().map(FamilyTables::run);
    join_all(runs).await.into_iter().flatten().collect()
}

/// Listens for what others do to the tables and for programs that took long, and reads tables that are due for it,
/// until there is something to apply.
async fn watch_tables(
    tables: &mut Tables,
    budget: &mut SweepBudget,
    repaired_at: &mut Option<Instant>,
    period: Option<Duration>,
) -> &'static str {
    let Tables::Known { families, .. } = tables else { return std::future::pending().await };
    loop {
        let due = families.iter().enumerate().filter_map(|(index, family)| {
            let (at, table) = family.sweep_due()?;
            Some((at, index, table))
        });
        let next = due.min_by_key(|(at, ..)| *at);
        let begin = next.map(|(at, ..)| budget.allows(at));
        let news = families.iter_mut().map(|family| family.watch().boxed());
        let news = tokio::select! {
            biased;
            (news, ..) = select_all(news) => Some(news),
            () = until(begin) => None,
        };
        match news {
            Some(News::Answer) => return "a slow program is through",
            Some(News::ForeignChange) => {
                // What is changed in the meantime goes into the same apply.
                if let Some(last) = *repaired_at {
                    until(Some(last + REPAIR_PAUSE)).await;
                }
                *repaired_at = Some(clock::now());
                return "foreign change of a table";
            }
            None => {}
        }
        let Some((_, index, table)) = next else { continue };
        let Some(family) = families.get_mut(index) else { continue };
        let id = TableId { family: family.family(), table };
        let began = clock::now();
        budget.begins(id, began);
        let (differs, cost) = family.sweep(table).await;
        budget.done(id, began, cost, period);
        if differs {
            return "foreign change of a table, found by the refresh";
        }
    }
}

/// Notes in the report how long the work took.
fn timed(work: impl FnOnce() -> DriverReport) -> DriverReport {
    let began = clock::now();
    let report = work();
    DriverReport { took: clock::now().saturating_duration_since(began), ..report }
}

async fn timed_routes(routes: &mut Routes) -> DriverReport {
    let began = clock::now();
    let report = routes.sync(began).await;
    DriverReport { took: clock::now().saturating_duration_since(began), ..report }
}

async fn until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

/// Takes a second run of drivers into the reports of the first.
fn rerun(first: &mut Vec<DriverReport>, second: Vec<DriverReport>) {
    for report in second {
        match first.iter_mut().find(|known| known.driver == report.driver) {
            Some(known) => known.superseded_by(report),
            None => first.push(report),
        }
    }
}

/// Chooses the variant and makes the table drivers.
async fn prepare(backend: &mut dyn Backend, options: &Options) -> Result<(Variant, Vec<FamilyTables>), DriverError> {
    let tools = backend.choose(options).await?;
    let checks = Checks { refresh: options.table_refresh, after_write: options.post_write_check };
    let family = |family| FamilyTables::new(family, tools.variant, options.insert_mode, checks);
    let mut families: Vec<_> = tools.families.into_iter().map(family).collect();
    if options.hold_restore_open {
        join_all(families.iter_mut().map(FamilyTables::try_to_hold_open)).await;
    }
    Ok((tools.variant, families))
}

/// Removes everything of ours from the tables of a variant that is not in use.
async fn sweep(backend: &mut dyn Backend, family: Family, variant: Variant, options: &Options) -> Vec<DriverReport> {
    let Some(tools) = backend.leftovers(family, variant, options).await else { return Vec::new() };
    info!(variant = variant.as_str(), family = %family, "removing what an earlier agent left in the other iptables variant");
    let checks = Checks { refresh: None, after_write: options.post_write_check };
    let mut tables = FamilyTables::new(tools, variant, ChainInsertMode::Insert, checks);
    let mut reports = tables.run().await;
    while tables.is_busy() {
        rerun(&mut reports, tables.run().await);
    }
    for report in &mut reports {
        report.driver = format!("{} ({})", report.driver, variant.as_str());
    }
    reports
}
