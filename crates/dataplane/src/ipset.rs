//! IP sets: brings the kernel's sets to what is wanted.
//!
//! Fed by the apply loop with [`SetChange`]s; talks to the kernel through a [`Transport`]. The apply
//! loop calls [`IpSets::write_additions`] before the tables and [`IpSets::write_removals`] after them.
//!
//! Invariants: before the tables are written, every wanted set is there with at least its wanted
//! members, or it is among [`IpSets::failed_sets`]; a set goes only after the tables were written
//! without it (I4). Nothing is taken out and no set destroyed on the strength of an incomplete reading
//! (I3). What is as wanted is not written (I5). Only sets with names of ours are touched (I6).

mod plan;
pub mod restore;
pub mod transport;
mod wire;

#[cfg(test)]
pub(crate) mod fake;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use model::Family;
use program::{Member, SetChange, SetName};

use crate::options::Options;
use crate::report::DriverReport;
use crate::retry::Backoff;
use plan::{Fit, Kernel, Set};
use transport::{Failure, Listing, Op, SetError};

pub use transport::{Automatic, Transport};

/// Time for destroying sets in one apply (performance.md 6.6).
const DESTROY_BUDGET: Duration = Duration::from_millis(10);
/// How often one apply reads and writes again when it finds that the kernel was not as believed.
const PASSES: u32 = 4;
/// How often a reading that was interrupted is repeated before it counts as incomplete.
const READINGS: u32 = 3;
/// Rules that the nft variant deleted let go of their sets a moment later; only a set that is busy
/// longer than that is worth a message.
const BUSY_ATTEMPTS: u32 = 3;

/// A wanted set that is not in force.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FailedSet {
    pub family: Family,
    pub name: SetName,
    /// A set of this name exists, so that rules can name it; its contents are not what is wanted.
    pub present: bool,
    pub reason: String,
}

/// See the [module documentation](self).
#[derive(Debug)]
pub struct IpSets {
    families: Vec<Family>,
    refresh: Option<Duration>,
    transport: Box<dyn Transport>,
    /// Wanted sets, and those of ours that are in the kernel and not wanted.
    sets: BTreeMap<SetName, Set>,
    /// When everything was last read completely; `None` if what is believed is in doubt.
    read_at: Option<Instant>,
    reading: Backoff,
    /// Destroying stopped for lack of time.
    unfinished: bool,
    /// The last apply came to the removals; if not, something else decides when there is a next one.
    came_to_removals: bool,
    /// What to report next time: wishes that cannot be met.
    complaints: Vec<String>,
    /// The time of the last call.
    last: Option<Instant>,
}

/// Operations and the sets they are for; those of one set are together.
#[derive(Debug, Default)]
struct Plan {
    ops: Vec<Op>,
    owners: Vec<SetName>,
}

impl IpSets {
    /// Allocates; nothing is asked of the kernel before the first write.
    pub fn new(options: &Options, transport: Box<dyn Transport>) -> Self {
        let families = Family::BOTH.into_iter().filter(|family| options.ipv6 || *family == Family::V4).collect();
        Self {
            families,
            refresh: options.set_refresh,
            transport,
            sets: BTreeMap::new(),
            read_at: None,
            reading: Backoff::default(),
            unfinished: false,
            came_to_removals: false,
            complaints: Vec::new(),
            last: None,
        }
    }

    /// Records what is wanted of one set. Touches only memory.
    pub fn want(&mut self, family: Family, name: &SetName, change: SetChange) {
        let refused = match change {
            SetChange::Replace { spec, members } => {
                debug_assert!(spec.family == family && spec.name == *name, "{name}: specification of another set");
                self.sets.entry(name.clone()).or_default().replace(spec, members)
            }
            SetChange::Delta { added, removed } => {
                let refused = self.sets.get_mut(name).and_then(|set| set.change(added, removed));
                debug_assert!(refused.is_some(), "{name}: members of a set that is not wanted");
                refused.unwrap_or_default()
            }
            SetChange::Remove => {
                if let Some(set) = self.sets.get_mut(name) {
                    set.unwant();
                }
                Vec::new()
            }
        };
        for member in refused {
            self.complaints.push(format!("set {name}: the kernel cannot hold {member:?}"));
        }
    }

    /// Declares everything believed about the kernel to be in doubt: the next write reads first.
    pub fn distrust(&mut self) {
        self.read_at = None;
    }

    /// Creates missing sets and adds missing members, after reading what must be known for it.
    /// Call it before the tables are written; the first time after the first, complete batch.
    pub fn write_additions(&mut self, now: Instant) -> DriverReport {
        self.last = Some(now);
        self.came_to_removals = false;
        let mut report = DriverReport { driver: "ipset".to_owned(), ..DriverReport::default() };
        report.errors.append(&mut self.complaints);
        if self.reading_due(now) {
            if !self.reading.ready(now) {
                report.waiting = Some("sets could not be read".to_owned());
                return report;
            }
            if let Err(error) = self.read_all(now, &mut report) {
                self.distrust();
                self.reading.failed(now);
                report.errors.push(format!("sets cannot be read: {error}"));
                return report;
            }
        }
        for set in self.sets.values_mut().filter(|set| set.kernel == Kernel::Unknown) {
            // Not there when the names were read; should it be there now, creating it says so.
            set.kernel = Kernel::Absent;
        }
        for _ in 0..PASSES {
            if !self.read_unread(now, &mut report) {
                break;
            }
            let plan = self.plan_additions(now);
            if plan.ops.is_empty() || !self.perform(plan, now, &mut report) {
                break;
            }
        }
        for (name, set) in &mut self.sets {
            let waited = set.wanted.is_some() && set.backoff.due().is_some_and(|due| due <= now);
            if waited && set.removals(name).is_none() {
                // What it waited for has come about.
                set.backoff.succeeded();
            }
            // Whatever is left undone without a reason is tried again soon.
            let undone = set.wanted.is_some() && !set.is_filled() && set.refused.is_empty();
            if undone && set.backoff.due().is_none() {
                set.backoff.failed(now);
            }
        }
        report.held = self.failed_sets().map(|set| format!("set {}: {}", set.name, set.reason)).collect();
        let kept = self.sets.iter().filter(|(_, set)| set.wanted.is_none());
        report.held.extend(kept.filter_map(|(name, set)| {
            Some(format!("set {name} is not wanted but cannot be destroyed: {}", set.problem.as_ref()?))
        }));
        let waits = |set: &&Set| set.wanted.is_some() && !set.is_filled() && !set.backoff.ready(now);
        report.waiting = self.sets.values().find(waits).and_then(|set| set.problem.clone());
        report
    }

    /// Takes surplus members out and destroys sets that are not wanted. Call it after the tables were
    /// written; sets that rules still name stay and are tried again later.
    pub fn write_removals(&mut self, now: Instant) -> DriverReport {
        self.last = Some(now);
        let mut report = DriverReport { driver: "ipset".to_owned(), ..DriverReport::default() };
        self.came_to_removals = true;
        self.unfinished = false;
        if self.read_at.is_none() {
            return report;
        }
        let mut plan = Plan::default();
        for (name, set) in &self.sets {
            if let Some(op) = set.removals(name).filter(|_| set.backoff.ready(now)) {
                plan.push(name, [op]);
            }
        }
        if !plan.ops.is_empty() && !self.perform(plan, now, &mut report) {
            return report;
        }
        if self.all_known() {
            self.destroy_unwanted(now, &mut report);
        }
        report
    }

    /// The wanted sets that are not in force, in order of their names. Rules that name them must not be
    /// relied upon: a missing member may just as well be one to be denied.
    pub fn failed_sets(&self) -> impl Iterator<Item = FailedSet> {
        self.sets.iter().filter_map(|(name, set)| {
            let spec = set.wanted.as_ref().filter(|_| !set.is_filled())?;
            let reason = match (&set.problem, set.refused.first()) {
                (Some(problem), _) => problem.clone(),
                (None, Some(member)) => format!("the kernel cannot hold {member:?}"),
                (None, None) => "not written yet".to_owned(),
            };
            let present = matches!(set.kernel, Kernel::Unread | Kernel::Read { .. });
            Some(FailedSet { family: spec.family, name: name.clone(), present, reason })
        })
    }

    /// True if a set that is not wanted is kept by a rule, long after the tables were written: what is
    /// believed about the tables may be wrong.
    pub fn in_use(&self) -> bool {
        self.sets.values().any(|set| set.wanted.is_none() && set.backoff.failures() >= BUSY_ATTEMPTS)
    }

    /// When the driver wants to be called again, and why. A moment in the past means at once.
    pub fn next_due(&self) -> Option<(Instant, &'static str)> {
        let last = self.last?;
        let Some(read_at) = self.read_at else {
            // Nothing else is done before.
            return Some((self.reading.due().unwrap_or(last), "sets must be read"));
        };
        let refresh = self.refresh.map(|period| (read_at + period, "set refresh"));
        let may_remove = self.came_to_removals && self.all_known();
        let retries = self.sets.values().filter_map(|set| match &set.wanted {
            Some(_) => Some((set.backoff.due()?, "set retry")),
            None => Some((set.backoff.due().filter(|_| may_remove)?, "set removal")),
        });
        let unfinished = (self.unfinished && may_remove).then_some((last, "set removal"));
        refresh.into_iter().chain(retries).chain(unfinished).min()
    }

    /// True if the contents of all wanted sets are known; only then sets that are not wanted go (I3).
    fn all_known(&self) -> bool {
        let known = |set: &Set| set.wanted.is_none() || matches!(set.kernel, Kernel::Read { .. } | Kernel::Absent);
        self.sets.values().all(known)
    }

    // === reading ===

    fn reading_due(&self, now: Instant) -> bool {
        match (self.read_at, self.refresh) {
            (None, _) => true,
            (Some(read_at), Some(refresh)) => now >= read_at + refresh,
            (Some(_), None) => false,
        }
    }

    /// Reads the names of all sets and the members of the wanted ones. On an error what was believed
    /// stays as it was.
    fn read_all(&mut self, now: Instant, report: &mut DriverReport) -> Result<(), SetError> {
        let first = self.sets.values().all(|set| set.kernel == Kernel::Unknown);
        let listing = self.list(report)?;
        let ours: BTreeSet<SetName> = listing
            .names
            .iter()
            .filter(|name| self.families.iter().any(|family| plan::is_ours(name, *family)))
            .filter_map(|name| SetName::new(name))
            .collect();
        let mut complete = listing.complete;
        self.sets.retain(|name, set| {
            if !ours.contains(name) && (listing.complete || set.kernel == Kernel::Unknown) {
                // Creating is safe even if it is there after all: the kernel says so.
                set.kernel = Kernel::Absent;
            }
            set.wanted.is_some() || set.kernel != Kernel::Absent
        });
        for name in ours {
            let set = self.sets.entry(name.clone()).or_default();
            if matches!(set.kernel, Kernel::Unknown | Kernel::Absent) {
                set.kernel = Kernel::Unread;
            }
            if set.wanted.is_some() {
                let known = matches!(set.kernel, Kernel::Read { .. });
                match self.read_set(&name, report) {
                    Ok(reading) => {
                        complete &= reading.complete;
                        if known && reading.news && !first {
                            tracing::warn!(set = %name, "someone else changed a set; repairing it");
                        }
                    }
                    Err(error @ SetError::Lost(_)) => return Err(error),
                    Err(error) => self.unreadable(&name, &error, now, report),
                }
            }
        }
        if complete {
            self.read_at = Some(now);
            self.reading.succeeded();
        } else {
            self.read_at = None;
            self.reading.failed(now);
            report.errors.push("sets changed while they were read; nothing is removed for now".to_owned());
        }
        Ok(())
    }

    fn list(&mut self, report: &mut DriverReport) -> Result<Listing, SetError> {
        let mut listing = Listing::default();
        for _ in 0..READINGS {
            report.reads += 1;
            listing = self.transport.list()?;
            if listing.complete {
                break;
            }
        }
        Ok(listing)
    }

    /// Reads the wanted sets whose members are not known. Returns false if the kernel does not answer.
    fn read_unread(&mut self, now: Instant, report: &mut DriverReport) -> bool {
        let unread = |set: &Set| set.wanted.is_some() && set.kernel == Kernel::Unread && set.backoff.ready(now);
        let names: Vec<SetName> =
            self.sets.iter().filter(|(_, set)| unread(set)).map(|(name, _)| name.clone()).collect();
        for name in names {
            match self.read_set(&name, report) {
                Ok(reading) if reading.complete => (),
                Ok(_) => {
                    self.distrust();
                    self.reading.failed(now);
                }
                Err(error @ SetError::Lost(_)) => {
                    self.lost(&error, now, report);
                    return false;
                }
                Err(error) => self.unreadable(&name, &error, now, report),
            }
        }
        true
    }

    fn read_set(&mut self, name: &SetName, report: &mut DriverReport) -> Result<Reading, SetError> {
        let mut contents = None;
        for _ in 0..READINGS {
            report.reads += 1;
            contents = self.transport.read(name)?;
            if contents.as_ref().is_none_or(|contents| contents.complete) {
                break;
            }
        }
        let complete = contents.as_ref().is_none_or(|contents| contents.complete);
        let news = self.sets.get_mut(name).is_some_and(|set| set.read(contents));
        Ok(Reading { complete, news })
    }

    /// A set that cannot be read is built anew, beside it (netfilter.md 17.4).
    fn unreadable(&mut self, name: &SetName, error: &SetError, now: Instant, report: &mut DriverReport) {
        report.errors.push(format!("set {name} cannot be read: {error}"));
        let Some(set) = self.sets.get_mut(name) else {
            return;
        };
        if set.backoff.failures() < READINGS {
            set.kernel = Kernel::Unread;
            set.problem = Some(error.to_string());
            set.backoff.failed(now);
        } else {
            set.kernel = Kernel::Read { fit: Fit::Rebuild, missing: set.members.clone(), surplus: BTreeSet::new() };
        }
    }

    // === writing ===

    fn plan_additions(&self, now: Instant) -> Plan {
        let mut plan = Plan::default();
        let mut taken = 0;
        for (name, set) in &self.sets {
            if let Some(spec) = set.wanted.as_ref().filter(|_| set.backoff.ready(now)) {
                let ops = set.additions(name, || self.temporary(spec.family, &mut taken));
                plan.push(name, ops);
            }
        }
        plan
    }

    /// Returns a name for a temporary set that is not in use; `taken` numbers of this plan are passed over.
    fn temporary(&self, family: Family, taken: &mut u32) -> Option<SetName> {
        loop {
            let name = plan::temporary_name(family, *taken)?;
            *taken += 1;
            if !self.sets.contains_key(&name) {
                return Some(name);
            }
        }
    }

    /// Performs a plan; goes on with the next set after a failure. Returns false if the kernel does not
    /// answer any more.
    fn perform(&mut self, mut plan: Plan, now: Instant, report: &mut DriverReport) -> bool {
        let mut start = 0;
        while let Some(ops) = plan.ops.get(start..).filter(|ops| !ops.is_empty()) {
            let failure = self.transport.perform(ops).err();
            let done = failure.as_ref().map_or(ops.len(), |failure| failure.op);
            for (op, owner) in plan.ops.iter().zip(&plan.owners).skip(start).take(done) {
                report.writes += 1;
                self.done(owner, op);
            }
            let Some(failure) = failure else {
                return true;
            };
            if matches!(failure.error, SetError::Lost(_)) {
                self.lost(&failure.error, now, report);
                return false;
            }
            let at = start + done;
            let (Some(op), Some(owner)) = (plan.ops.get_mut(at), plan.owners.get(at)) else {
                debug_assert!(false, "a failure of an operation that was not asked for");
                return true;
            };
            report.writes += u64::from(failure.done > 0);
            let rest = self.failed(owner, op, &failure, now, report);
            start = match rest {
                Some(members) => {
                    if let Op::Add { members: old, .. } = op {
                        *old = members;
                    }
                    at
                }
                // The set's other operations make no sense now.
                None => plan.owners.iter().skip(at).position(|other| other != owner).map_or(plan.ops.len(), |n| at + n),
            };
        }
        true
    }

    /// Records that an operation was performed.
    fn done(&mut self, owner: &SetName, op: &Op) {
        if let Op::Create { name, .. } = op
            && name != owner
        {
            // A temporary set: ours, and not wanted as such.
            self.sets.insert(name.clone(), Set { kernel: Kernel::Unread, ..Set::default() });
            return;
        }
        let Some(set) = self.sets.get_mut(owner) else {
            return;
        };
        match op {
            Op::Create { .. } => set.created(),
            Op::Add { set: target, members } if target == owner => set.added(members),
            Op::Add { .. } => (),
            Op::Remove { members, .. } => set.removed(members),
            Op::Swap { .. } => {
                set.created();
                let members: Vec<Member> = set.members.iter().copied().collect();
                set.added(&members);
            }
            Op::Destroy { .. } => set.kernel = Kernel::Absent,
        }
        if set.is_filled() {
            set.backoff.succeeded();
            set.problem = None;
        }
    }

    /// Records that an operation failed. Returns the members to go on with if only one was at fault.
    fn failed(
        &mut self,
        owner: &SetName,
        op: &Op,
        failure: &Failure,
        now: Instant,
        report: &mut DriverReport,
    ) -> Option<Vec<Member>> {
        if let (Op::Create { name, .. }, SetError::Exists) = (op, &failure.error)
            && name != owner
        {
            self.sets.insert(name.clone(), Set { kernel: Kernel::Unread, ..Set::default() });
            return None;
        }
        let set = self.sets.get_mut(owner)?;
        let handled = match op {
            Op::Add { members, .. } | Op::Remove { members, .. } => members.get(..failure.done).unwrap_or_default(),
            Op::Create { .. } | Op::Swap { .. } | Op::Destroy { .. } => &[],
        };
        match op {
            Op::Add { set: target, .. } if target == owner => set.added(handled),
            Op::Remove { .. } => set.removed(handled),
            Op::Add { .. } | Op::Create { .. } | Op::Swap { .. } | Op::Destroy { .. } => (),
        }
        let error = &failure.error;
        match (op, error) {
            // The kernel is not as believed: another pass reads and plans again.
            (Op::Create { .. }, SetError::Exists) => set.kernel = Kernel::Unread,
            (Op::Add { set: target, .. } | Op::Remove { set: target, .. }, SetError::Missing) if target == owner => {
                set.kernel = Kernel::Absent;
            }
            (Op::Swap { .. }, SetError::Missing) => set.kernel = Kernel::Unread,
            (Op::Swap { .. }, SetError::TypesDiffer) => {
                set.kernel = Kernel::Read { fit: Fit::Replace, missing: set.members.clone(), surplus: BTreeSet::new() };
            }
            (Op::Add { members, .. }, SetError::Member(text)) => {
                let (bad, rest) = members.get(failure.done..).and_then(<[Member]>::split_first)?;
                set.refuse(*bad);
                report.errors.push(format!("set {owner}: the kernel refused {bad:?}: {text}"));
                return (!rest.is_empty()).then(|| rest.to_vec()).or(Some(Vec::new()));
            }
            _ => {
                set.problem = Some(error.to_string());
                set.backoff.failed(now);
                report.errors.push(format!("set {owner}: {}: {error}", verb(op)));
            }
        }
        None
    }

    fn destroy_unwanted(&mut self, now: Instant, report: &mut DriverReport) {
        let names: Vec<SetName> = self
            .sets
            .iter()
            .filter(|(_, set)| set.wanted.is_none() && set.backoff.ready(now))
            .map(|(name, _)| name.clone())
            .collect();
        let start = self.transport.now();
        for name in names {
            if self.transport.now().saturating_duration_since(start) >= DESTROY_BUDGET {
                self.unfinished = true;
                return;
            }
            if self.sets.get(&name).is_some_and(|set| matches!(set.kernel, Kernel::Unknown | Kernel::Absent)) {
                self.sets.remove(&name);
                continue;
            }
            match self.transport.perform(&[Op::Destroy { set: name.clone() }]) {
                Ok(()) => {
                    report.writes += 1;
                    self.sets.remove(&name);
                }
                Err(Failure { error: error @ SetError::Lost(_), .. }) => {
                    self.lost(&error, now, report);
                    return;
                }
                Err(Failure { error, .. }) => {
                    if let Some(set) = self.sets.get_mut(&name) {
                        set.backoff.failed(now);
                        if error != SetError::Busy || set.backoff.failures() >= BUSY_ATTEMPTS {
                            // Said with the next attempt, for as long as it lasts.
                            set.problem = Some(error.to_string());
                        }
                    }
                }
            }
        }
    }

    /// The kernel did not answer: nothing is known any more.
    fn lost(&mut self, error: &SetError, now: Instant, report: &mut DriverReport) {
        self.distrust();
        self.reading.failed(now);
        report.errors.push(error.to_string());
    }
}

/// What came of reading one set.
struct Reading {
    complete: bool,
    /// It was not as believed.
    news: bool,
}

impl Plan {
    fn push(&mut self, owner: &SetName, ops: impl IntoIterator<Item = Op>) {
        self.ops.extend(ops);
        self.owners.resize(self.ops.len(), owner.clone());
    }
}

fn verb(op: &Op) -> &'static str {
    match op {
        Op::Create { .. } => "cannot be created",
        Op::Add { .. } => "cannot take a member",
        Op::Remove { .. } => "cannot let a member go",
        Op::Swap { .. } => "cannot be exchanged",
        Op::Destroy { .. } => "has another type than wanted and cannot be destroyed",
    }
}
