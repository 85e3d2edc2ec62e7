//! IP sets: brings the kernel's sets to what is wanted.
//!
//! Fed by the apply loop with [`SetChange`]s; talks to the kernel through a [`Transport`]. The apply
//! loop calls [`IpSets::write_additions`] before the tables and [`IpSets::write_removals`] after them.
//!
//! Everything is read once, at the start. After that nothing is read before a write: at each refresh the
//! headers of all sets are compared with what is believed, and then the members, set by set, in slices of
//! time that leave the apply loop to others (performance.md 6.4).
//!
//! Invariants: before the tables are written, every wanted set is there with at least its wanted
//! members, or it is among [`IpSets::failed_sets`]; a set goes only after the tables were written
//! without it (I4). Nothing is taken out and no set destroyed on the strength of an incomplete reading
//! (I3). What is as wanted is not written, and costs nothing when something else is (I5). Only sets with
//! names of ours are touched (I6).

mod members;
mod pipeline;
mod plan;
mod read;
pub mod restore;
mod socket;
pub mod transport;
mod wire;
mod write;

#[cfg(test)]
pub(crate) mod fake;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use model::Family;
use program::{SetChange, SetName};

use crate::options::Options;
use crate::report::DriverReport;
use crate::retry::Backoff;
use plan::{Kernel, Set};
use read::Sweep;
use transport::Series;

pub use transport::{Automatic, Transport};

/// How often one apply reads and writes again when it finds that the kernel was not as believed.
const PASSES: u32 = 4;
/// How long a set that should go may be in use before the tables are suspected.
const BUSY_DOUBT: Duration = Duration::from_millis(500);
/// Rules that the nft variant deleted let go of their sets a moment later, and a listing holds a set as long as
/// it lasts; only what is busy longer than this is worth a message (users.md U3.c).
const BUSY_TIME: Duration = Duration::from_secs(60);

/// A wanted set that is not in force.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FailedSet {
    pub family: Family,
    pub name: SetName,
    /// A set of this name exists, so that rules can name it; its contents are not what is wanted.
    pub present: bool,
    /// It will not come into force before less is wanted.
    pub too_large: bool,
    pub reason: String,
}

/// See the [module documentation](self).
#[derive(Debug)]
pub struct IpSets {
    families: Vec<Family>,
    refresh: Option<Duration>,
    /// Members that a set may have at most, however much it grows.
    limit: u32,
    transport: Box<dyn Transport>,
    /// Wanted sets, and those of ours that are in the kernel and not wanted.
    sets: BTreeMap<SetName, Set>,
    /// Those of them about which there is something to do or to say.
    busy: BTreeSet<SetName>,
    /// When everything was last compared; `None` if what is believed is in doubt.
    read_at: Option<Instant>,
    /// Somebody saw that the kernel is not as believed.
    suspected: bool,
    reading: Backoff,
    sweep: Sweep,
    /// Work was found or left over for lack of time: the next apply is due at once.
    unfinished: bool,
    /// An answer was lost: what is read next may differ from what is believed for no other reason.
    lost: bool,
    /// See [`Self::tables_rest`].
    tables_rest: bool,
    /// The last apply came to the removals; if not, something else decides when there is a next one.
    came_to_removals: bool,
    /// What to report next time: wishes that cannot be met.
    complaints: Vec<String>,
    /// The time of the last call.
    last: Option<Instant>,
}

impl IpSets {
    /// Allocates; nothing is asked of the kernel before the first write.
    pub fn new(options: &Options, transport: Box<dyn Transport>) -> Self {
        let families = Family::BOTH.into_iter().filter(|family| options.ipv6 || *family == Family::V4).collect();
        Self {
            families,
            refresh: options.set_refresh,
            limit: options.largest_set,
            transport,
            sets: BTreeMap::new(),
            busy: BTreeSet::new(),
            read_at: None,
            suspected: false,
            reading: Backoff::default(),
            sweep: Sweep::default(),
            unfinished: false,
            lost: false,
            tables_rest: false,
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
        if self.sets.contains_key(name) {
            self.busy.insert(name.clone());
        }
    }

    /// Declares everything believed about the kernel to be in doubt: the next write reads first.
    pub fn distrust(&mut self) {
        self.read_at = None;
    }

    /// Somebody found a set missing: the next write compares the headers of all sets first.
    pub fn suspect(&mut self) {
        self.suspected = true;
    }

    /// Says whether the rules in force are those that the wanted members are meant for. If so, a set that has no room
    /// for new members beside old ones loses these first, instead of being rebuilt for them.
    pub fn tables_rest(&mut self, rest: bool) {
        self.tables_rest = rest;
    }

    /// Creates missing sets and adds missing members, after reading what must be known for it.
    /// Call it before the tables are written; the first time after the first, complete batch.
    pub fn write_additions(&mut self, now: Instant) -> DriverReport {
        self.last = Some(now);
        self.came_to_removals = false;
        self.unfinished = false;
        let mut report = DriverReport { driver: "ipset".to_owned(), ..DriverReport::default() };
        report.errors.append(&mut self.complaints);
        if self.read_at.is_none() {
            if !self.reading.ready(now) {
                report.waiting = Some("sets could not be read".to_owned());
                return report;
            }
            if let Err(error) = self.read_everything(now, &mut report) {
                self.distrust();
                self.reading.failed(now);
                report.errors.push(format!("sets cannot be read: {error}"));
                return report;
            }
        } else if self.check_due(now) {
            self.check(now, &mut report);
        }
        for name in &self.busy {
            // Not there when the names were read; should it be there now, creating it says so.
            if let Some(set) = self.sets.get_mut(name).filter(|set| set.kernel == Kernel::Unknown) {
                set.kernel = Kernel::Absent;
            }
        }
        for _ in 0..PASSES {
            if !self.read_unread(now, &mut report) {
                break;
            }
            let plan = self.plan_additions(now);
            if plan.is_empty() || !self.perform(plan, now, &mut report) {
                break;
            }
            // What is done is not gone through again: a member may have come into hundreds of sets.
            self.forget_what_rests();
        }
        self.settle(now);
        report.held = self.failed_sets().map(|set| format!("set {}: {}", set.name, set.reason)).collect();
        let kept = self.busy_sets().filter(|(_, set)| set.wanted.is_none());
        report.held.extend(kept.filter_map(|(name, set)| {
            Some(format!("set {name} is not wanted but cannot be destroyed: {}", set.problem.as_ref()?))
        }));
        let waits = |name: &SetName, set: &Set| {
            let undone = !set.is_filled() || set.removals(name).is_some();
            set.wanted.is_some() && undone && !set.backoff.ready(now)
        };
        let waiting = self.busy_sets().find(|(name, set)| waits(name, set));
        report.waiting = waiting.and_then(|(_, set)| set.problem.clone());
        report
    }

    /// Takes surplus members out and destroys sets that are not wanted. Call it after the tables were
    /// written; sets that rules still name stay and are tried again later.
    pub fn write_removals(&mut self, now: Instant) -> DriverReport {
        self.last = Some(now);
        let mut report = DriverReport { driver: "ipset".to_owned(), ..DriverReport::default() };
        self.came_to_removals = true;
        if self.read_at.is_none() {
            return report;
        }
        let ready = self.busy_sets().filter(|(_, set)| set.backoff.ready(now));
        let plan = ready.filter_map(|(name, set)| Some(Series { set: name.clone(), ops: vec![set.removals(name)?] }));
        if !self.perform(plan.collect(), now, &mut report) {
            return report;
        }
        if self.all_known() {
            self.destroy_unwanted(now, &mut report);
        }
        if report.writes == 0 && !self.unfinished {
            self.sweep_on(now, &mut report);
        } else {
            self.sweep.wait(now);
        }
        self.forget_what_rests();
        report
    }

    fn forget_what_rests(&mut self) {
        let Self { sets, busy, .. } = self;
        busy.retain(|name| sets.get(name).is_some_and(|set| !set.is_at_rest()));
    }

    /// The wanted sets that are not in force, in order of their names. Rules that name them must not be
    /// relied upon: a missing member may just as well be one to be denied.
    pub fn failed_sets(&self) -> impl Iterator<Item = FailedSet> {
        self.busy_sets().filter_map(|(name, set)| {
            let spec = set.wanted.as_ref().filter(|_| !set.is_filled())?;
            let too_large = set.size(self.limit).is_none();
            let reason = match (&set.problem, set.refused.first()) {
                (_, _) if too_large => {
                    format!(
                        "{} members are wanted, {} are allowed",
                        set.members.len(),
                        self.limit.max(spec.max_members)
                    )
                }
                (Some(problem), _) => problem.clone(),
                (None, Some(member)) => format!("the kernel cannot hold {member:?}"),
                (None, None) => "not written yet".to_owned(),
            };
            let present = matches!(set.kernel, Kernel::Unread | Kernel::Read { .. });
            Some(FailedSet { family: spec.family, name: name.clone(), present, too_large, reason })
        })
    }

    /// True if a set that is not wanted is kept by a rule, long after the tables were written: what is
    /// believed about the tables may be wrong.
    pub fn in_use(&self) -> bool {
        self.busy_sets().any(|(_, set)| set.wanted.is_none() && set.still_busy)
    }

    /// Sets that are not wanted and have been in use for so long that the operator must know by whom; each until
    /// [`Self::explain`] says it.
    pub fn unexplained(&self, now: Instant) -> impl Iterator<Item = &SetName> {
        let long =
            move |set: &Set| set.busy_since.is_some_and(|since| now.saturating_duration_since(since) >= BUSY_TIME);
        self.busy_sets().filter(move |(_, set)| long(set) && set.problem.is_none()).map(|(name, _)| name)
    }

    /// Takes down who uses a set that is not wanted.
    pub fn explain(&mut self, name: &SetName, users: &[String]) {
        if let Some(set) = self.sets.get_mut(name).filter(|set| set.busy_since.is_some()) {
            set.problem = Some(match users {
                [] => "it is in use, but no rule of this host's tables names it".to_owned(),
                users => format!("it is in use by {}", users.join("; ")),
            });
        }
    }

    /// When the driver wants to be called again, and why. A moment in the past means at once.
    pub fn next_due(&self) -> Option<(Instant, &'static str)> {
        let last = self.last?;
        let Some(read_at) = self.read_at else {
            // Nothing else is done before.
            return Some((self.reading.due().unwrap_or(last), "sets must be read"));
        };
        let suspected = self.suspected.then_some(last);
        let check = suspected.or_else(|| Some(read_at + self.refresh?));
        let check = check.map(|at| (self.reading.due().map_or(at, |due| due.max(at)), "set refresh"));
        let may_remove = self.came_to_removals && self.all_known();
        let retries = self.busy_sets().filter_map(|(_, set)| match &set.wanted {
            Some(_) => Some((set.backoff.due()?, "set retry")),
            None => Some((set.backoff.due().filter(|_| may_remove)?, "set removal")),
        });
        let unfinished = (self.unfinished && self.came_to_removals).then_some((last, "set removal"));
        let sweep = self.sweep.due().filter(|_| self.came_to_removals).map(|at| (at, "set comparison"));
        check.into_iter().chain(retries).chain(unfinished).chain(sweep).min()
    }

    /// True if the contents of all wanted sets are known; only then sets that are not wanted go (I3).
    fn all_known(&self) -> bool {
        let known = |set: &Set| set.wanted.is_none() || matches!(set.kernel, Kernel::Read { .. } | Kernel::Absent);
        self.busy_sets().all(|(_, set)| known(set))
    }

    fn busy_sets(&self) -> impl Iterator<Item = (&SetName, &Set)> {
        self.busy.iter().filter_map(|name| Some((name, self.sets.get(name)?)))
    }

    /// Whatever is left undone without a reason is tried again soon.
    fn settle(&mut self, now: Instant) {
        for name in &self.busy {
            let Some(set) = self.sets.get_mut(name).filter(|set| set.wanted.is_some()) else { continue };
            let waited = set.backoff.due().is_some_and(|due| due <= now);
            if set.size(self.limit).is_none() || (waited && set.removals(name).is_none()) {
                // Nothing more can be done, or what it waited for has come about.
                set.backoff.succeeded();
            }
            let undone = !set.is_filled() && set.refused.is_empty() && set.size(self.limit).is_some();
            if undone && set.backoff.due().is_none() {
                set.backoff.failed(now);
            }
        }
    }
}
