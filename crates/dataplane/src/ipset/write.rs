//! Writing sets: what is planned, how it went, and what goes at the end.
//!
//! Part of the set driver.

use std::time::{Duration, Instant};

use model::Family;
use program::{Members, SetName};

use super::plan::{self, Fit, Kernel, Set};
use super::transport::{Failure, Op, Series, SetError};
use super::{BUSY_DOUBT, IpSets};
use crate::report::DriverReport;

/// Time for destroying sets in one apply (performance.md 6.6).
const DESTROY_BUDGET: Duration = Duration::from_millis(10);
/// So many sets are destroyed at once at most.
const MOST_TOGETHER: usize = 64;
/// Rules that the nft variant deleted let go of their sets some milliseconds later. After a failed attempt to destroy
/// a set the next one waits for this share of the time that it has been in use, but at least and at most so long.
const BUSY_PAUSE_SHARE: u32 = 8;
const BUSY_PAUSES: (Duration, Duration) = (Duration::from_millis(2), Duration::from_secs(10));

impl IpSets {
    pub(super) fn plan_additions(&self, now: Instant) -> Vec<Series> {
        let mut plan = Vec::new();
        let mut taken = 0;
        for (name, set) in self.busy_sets() {
            if let Some(spec) = set.wanted.as_ref().filter(|_| set.backoff.ready(now)) {
                let ops = set.additions(name, self.limit, self.tables_rest, || self.temporary(spec.family, &mut taken));
                if !ops.is_empty() {
                    plan.push(Series { set: name.clone(), ops });
                }
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

    /// Performs a plan; a set that fails does not keep others from what they need. Returns false if the kernel does
    /// not answer any more.
    pub(super) fn perform(&mut self, mut plan: Vec<Series>, now: Instant, report: &mut DriverReport) -> bool {
        let gives_up_sets = |op: &Op| matches!(op, Op::Swap { .. } | Op::Destroy { .. });
        if plan.iter().flat_map(|series| &series.ops).any(gives_up_sets) {
            self.stop_sweep();
        }
        while !plan.is_empty() {
            let mut failures = self.transport.perform_each(&plan);
            self.take_surprises(now, report);
            let mut rest = Vec::new();
            let mut lost = None;
            for (index, Series { set: owner, mut ops }) in plan.into_iter().enumerate() {
                let failure = failures.remove(&index);
                let done = failure.as_ref().map_or(ops.len(), |failure| failure.op);
                for op in ops.iter().take(done) {
                    report.writes += 1;
                    self.done(&owner, op);
                }
                let Some(failure) = failure else { continue };
                if matches!(failure.error, SetError::Lost(_)) {
                    lost = lost.or(Some(failure.error));
                    continue;
                }
                let Some(op) = ops.get(done) else {
                    debug_assert!(false, "a failure of an operation that was not asked for");
                    continue;
                };
                report.writes += u64::from(failure.done > 0);
                // Otherwise the set's other operations make no sense now.
                if let Some(more) = self.failed(&owner, op, &failure, now, report) {
                    ops.drain(..done);
                    if let Some(Op::Add { members, .. }) = ops.first_mut() {
                        *members = more;
                    }
                    rest.push(Series { set: owner, ops });
                }
            }
            if let Some(error) = lost {
                self.lost(&error, now, report);
                return false;
            }
            plan = rest;
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
            self.busy.insert(name.clone());
            return;
        }
        let Some(set) = self.sets.get_mut(owner) else {
            return;
        };
        match op {
            Op::Create { max_members, .. } => set.created(*max_members),
            Op::Add { set: target, members } if target == owner => {
                set.added(members);
                self.sweep.touch(owner, members);
            }
            Op::Add { .. } => (),
            Op::Remove { members, .. } => {
                set.removed(members);
                self.sweep.touch(owner, members);
            }
            // Built with the size that is wanted now.
            Op::Swap { .. } => match set.size(self.limit) {
                Some(size) => set.exchanged(size),
                None => set.kernel = Kernel::Unread,
            },
            Op::Destroy { .. } => set.kernel = Kernel::Absent,
        }
        if set.is_filled() {
            set.doubted = false;
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
    ) -> Option<Members> {
        if let (Op::Create { name, .. }, SetError::Exists) = (op, &failure.error)
            && name != owner
        {
            self.sets.insert(name.clone(), Set { kernel: Kernel::Unread, ..Set::default() });
            self.busy.insert(name.clone());
            return None;
        }
        let set = self.sets.get_mut(owner)?;
        let handled = match op {
            Op::Add { members, .. } | Op::Remove { members, .. } => members.iter().take(failure.done).collect(),
            Op::Create { .. } | Op::Swap { .. } | Op::Destroy { .. } => Members::default(),
        };
        match op {
            Op::Add { set: target, .. } if target == owner => {
                set.added(&handled);
                self.sweep.touch(owner, &handled);
            }
            Op::Remove { .. } => {
                set.removed(&handled);
                self.sweep.touch(owner, &handled);
            }
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
                set.must_be(Fit::Replace);
            }
            // There was room by our reckoning: somebody else has filled it.
            (Op::Add { set: target, .. }, SetError::Full) if target == owner && !set.doubted => {
                set.doubted = true;
                set.kernel = Kernel::Unread;
            }
            // Somebody lists one of the two.
            (Op::Swap { .. }, SetError::Busy) => {
                report.busy += 1;
                set.problem = Some(error.to_string());
                set.backoff.failed(now);
            }
            (Op::Add { members, .. }, SetError::Member(text)) => {
                let bad = members.get(failure.done)?;
                set.refuse(bad);
                report.errors.push(format!("set {owner}: the kernel refused {bad:?}: {text}"));
                return Some(members.iter_from(failure.done + 1).collect());
            }
            _ => {
                set.problem = Some(error.to_string());
                set.backoff.failed(now);
                report.errors.push(format!("set {owner}: {}: {error}", verb(op)));
            }
        }
        None
    }

    /// Destroys what is not wanted, until the time is used up. The first to be tried are those that failed least: if
    /// none of those that are tried together can go, the tables have most likely not let go of any yet, and all wait.
    pub(super) fn destroy_unwanted(&mut self, now: Instant, report: &mut DriverReport) {
        let mut names = Vec::new();
        let mut gone = Vec::new();
        for (name, set) in self.busy_sets().filter(|(_, set)| set.wanted.is_none() && set.backoff.ready(now)) {
            match set.kernel {
                Kernel::Unknown | Kernel::Absent => gone.push(name.clone()),
                Kernel::Unread | Kernel::Read { .. } => names.push((set.backoff.failures(), name.clone())),
            }
        }
        for name in &gone {
            self.sets.remove(name);
        }
        if names.is_empty() {
            return;
        }
        names.sort();
        self.stop_sweep();
        let start = self.transport.now();
        let (mut rest, mut count, mut began) = (names.as_slice(), 1, start);
        while !rest.is_empty() {
            let (some, later) = rest.split_at(count.min(rest.len()));
            let series: Vec<Series> = some
                .iter()
                .map(|(_, set)| Series { set: set.clone(), ops: vec![Op::Destroy { set: set.clone() }] })
                .collect();
            let mut failures = self.transport.perform_each(&series);
            let mut busy = 0;
            for (index, (_, name)) in some.iter().enumerate() {
                match failures.remove(&index).map(|failure| failure.error) {
                    None => {
                        report.writes += 1;
                        self.sets.remove(name);
                    }
                    Some(error @ SetError::Lost(_)) => {
                        self.lost(&error, now, report);
                        return;
                    }
                    Some(SetError::Busy) => {
                        busy += 1;
                        self.is_busy(name, true, now);
                    }
                    Some(error) => {
                        if let Some(set) = self.sets.get_mut(name) {
                            set.backoff.failed(now);
                            // Said with the next attempt, for as long as it lasts.
                            set.problem = Some(error.to_string());
                        }
                    }
                }
            }
            report.busy += busy as u64;
            if busy == some.len() {
                later.iter().for_each(|(_, name)| self.is_busy(name, false, now));
                return;
            }
            rest = later;
            let ended = self.transport.now();
            let left = DESTROY_BUDGET.saturating_sub(ended.saturating_duration_since(start));
            if left.is_zero() && !rest.is_empty() {
                self.unfinished = true;
                return;
            }
            count = next_count(some.len(), ended.saturating_duration_since(began), left);
            began = ended;
        }
    }

    /// A set that should go is in use; so it is found or, if it was not tried, supposed to be.
    fn is_busy(&mut self, name: &SetName, tried: bool, now: Instant) {
        let Some(set) = self.sets.get_mut(name) else { return };
        // Who uses it is found out when it has lasted.
        let since = *set.busy_since.get_or_insert(now);
        let age = now.saturating_duration_since(since);
        let pause = (age / BUSY_PAUSE_SHARE).clamp(BUSY_PAUSES.0, BUSY_PAUSES.1);
        if tried {
            set.still_busy = age >= BUSY_DOUBT;
            set.backoff.failed_for(pause, now);
        } else {
            set.backoff.wait_for(pause, now);
        }
    }

    /// Members that were as wanted already are no failure, but the set is not as believed: it is compared soon
    /// (users.md U3.d).
    fn take_surprises(&mut self, now: Instant, report: &mut DriverReport) {
        for (name, count) in self.transport.surprises() {
            tracing::debug!(set = %name, count, "members were as wanted already");
            report.unneeded += count;
            if self.sets.get(&name).is_some_and(|set| set.wanted.is_some()) {
                self.sweep.first(name, now);
            }
        }
    }

    /// The kernel did not answer: nothing is known any more.
    pub(super) fn lost(&mut self, error: &SetError, now: Instant, report: &mut DriverReport) {
        self.lost = true;
        self.distrust();
        self.reading.failed(now);
        report.errors.push(error.to_string());
    }
}

/// How many sets to destroy next, after so many took so long: as many as most likely fit into the time that is left,
/// but not at once many more than before. On some kernels one destruction waits tens of milliseconds for all
/// processors.
fn next_count(count: usize, took: Duration, left: Duration) -> usize {
    let fitting = left.as_nanos() * count as u128 / took.as_nanos().max(1);
    usize::try_from(fitting).unwrap_or(usize::MAX).clamp(1, (count * 8).min(MOST_TOGETHER))
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
