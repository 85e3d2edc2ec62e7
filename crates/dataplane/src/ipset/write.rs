//! Writing sets: what is planned, how it went, and what goes at the end.
//!
//! Part of the set driver.

use std::time::{Duration, Instant};

use model::Family;
use program::{Member, SetName};

use super::plan::{self, Fit, Kernel, Set};
use super::transport::{Failure, Op, SetError};
use super::{BUSY_PAUSE, IpSets, Plan};
use crate::report::DriverReport;

/// Time for destroying sets in one apply (performance.md 6.6).
const DESTROY_BUDGET: Duration = Duration::from_millis(10);

impl IpSets {
    pub(super) fn plan_additions(&self, now: Instant) -> Plan {
        let mut plan = Plan::default();
        let mut taken = 0;
        for (name, set) in self.busy_sets() {
            if let Some(spec) = set.wanted.as_ref().filter(|_| set.backoff.ready(now)) {
                let ops = set.additions(name, self.limit, || self.temporary(spec.family, &mut taken));
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
    pub(super) fn perform(&mut self, mut plan: Plan, now: Instant, report: &mut DriverReport) -> bool {
        if plan.ops.iter().any(|op| matches!(op, Op::Swap { .. } | Op::Destroy { .. })) {
            self.stop_sweep();
        }
        let mut start = 0;
        while let Some(ops) = plan.ops.get(start..).filter(|ops| !ops.is_empty()) {
            let failure = self.transport.perform(ops).err();
            self.take_surprises(now, report);
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
    ) -> Option<Vec<Member>> {
        if let (Op::Create { name, .. }, SetError::Exists) = (op, &failure.error)
            && name != owner
        {
            self.sets.insert(name.clone(), Set { kernel: Kernel::Unread, ..Set::default() });
            self.busy.insert(name.clone());
            return None;
        }
        let set = self.sets.get_mut(owner)?;
        let handled = match op {
            Op::Add { members, .. } | Op::Remove { members, .. } => members.get(..failure.done).unwrap_or_default(),
            Op::Create { .. } | Op::Swap { .. } | Op::Destroy { .. } => &[],
        };
        match op {
            Op::Add { set: target, .. } if target == owner => {
                set.added(handled);
                self.sweep.touch(owner, handled);
            }
            Op::Remove { .. } => {
                set.removed(handled);
                self.sweep.touch(owner, handled);
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

    pub(super) fn destroy_unwanted(&mut self, now: Instant, report: &mut DriverReport) {
        let gone = |set: &Set| set.wanted.is_none() && set.backoff.ready(now);
        let names: Vec<SetName> = self.busy_sets().filter(|(_, set)| gone(set)).map(|(name, _)| name.clone()).collect();
        if !names.is_empty() {
            self.stop_sweep();
        }
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
                    report.busy += u64::from(error == SetError::Busy);
                    if let Some(set) = self.sets.get_mut(&name) {
                        if error == SetError::Busy {
                            set.backoff.failed_with(BUSY_PAUSE, now);
                            // Who uses it is found out when it has lasted.
                            set.busy_since.get_or_insert(now);
                        } else {
                            set.backoff.failed(now);
                            // Said with the next attempt, for as long as it lasts.
                            set.problem = Some(error.to_string());
                        }
                    }
                }
            }
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
        self.distrust();
        self.reading.failed(now);
        report.errors.push(error.to_string());
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
