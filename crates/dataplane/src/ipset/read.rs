//! Reading sets: everything at the start, headers at each refresh, members beside the work.
//!
//! Part of the set driver.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use program::{Member, Members, SetName};

use super::IpSets;
use super::members::Tree;
use super::plan::{self, Fit, Kernel, Set};
use super::transport::{Contents, Header, SetError, Slice};
use crate::report::DriverReport;

/// How often a reading that was interrupted is repeated before it counts as incomplete.
const READINGS: u32 = 3;
/// Time that one slice of the comparison may take: a batch that comes meanwhile waits as long.
const SLICE: Duration = Duration::from_millis(2);
/// The comparison pauses so many times as long as it worked: it takes a fiftieth of a core.
const PAUSE_PER_WORK: u32 = 49;
/// So that many small sets do not make many small slices.
const SHORTEST_PAUSE: Duration = Duration::from_millis(20);
/// If there is more of others' than this, our sets are read one by one.
const MANY_OTHERS: usize = 100;

/// The comparison of members that goes on beside the work.
#[derive(Debug, Default)]
pub(super) struct Sweep {
    queue: VecDeque<SetName>,
    current: Option<Comparison>,
    next: Option<Instant>,
    /// All sets are compared, not some that were asked for.
    of_all: bool,
    /// That was not through when it was due again.
    late: bool,
}

/// One set that was begun.
#[derive(Debug)]
struct Comparison {
    set: SetName,
    /// What was written to it since.
    touched: Tree,
    /// Members found that should be there.
    count: usize,
    /// Found one that should not be there.
    odd: bool,
}

/// The names of all sets of ours, with headers if the transport has them.
struct Survey {
    ours: BTreeMap<SetName, Option<Header>>,
    others: usize,
    complete: bool,
}

/// What came of reading one set.
struct Reading {
    complete: bool,
    /// It was not as believed.
    news: bool,
}

impl Sweep {
    /// The next comparison is due. Says once if the one before it is not through, which happens less often than
    /// configured then (users.md U5.b); returns whether it said so.
    fn tell_if_late(&mut self, period: Option<Duration>) -> bool {
        let late = self.of_all && !self.queue.is_empty();
        let news = late && !self.late;
        if news {
            let left = self.queue.len();
            tracing::warn!(?period, left, "comparing the members of all sets takes longer than the refresh interval");
        } else if self.late && !late {
            tracing::info!(?period, "the members of all sets are compared as often as configured again");
        }
        self.late = late;
        news
    }

    /// When the next slice is due.
    pub(super) fn due(&self) -> Option<Instant> {
        self.next.filter(|_| !self.queue.is_empty())
    }

    /// Compares a set before all others.
    pub(super) fn first(&mut self, name: SetName, now: Instant) {
        self.next = Some(now);
        if self.queue.front() != Some(&name) {
            self.queue.push_front(name);
        }
    }

    /// There is something else to do.
    pub(super) fn wait(&mut self, now: Instant) {
        self.next = self.next.map(|next| next.max(now + SHORTEST_PAUSE));
    }

    /// Members of a set were written.
    pub(super) fn touch(&mut self, name: &SetName, members: &Members) {
        if let Some(current) = self.current.as_mut().filter(|current| current.set == *name) {
            current.touched.insert_all(members);
        }
    }
}

impl IpSets {
    /// Reads the names of all sets and the members of the wanted ones. On an error what was believed
    /// stays as it was.
    pub(super) fn read_everything(&mut self, now: Instant, report: &mut DriverReport) -> Result<(), SetError> {
        self.stop_sweep();
        let first = self.lost || self.sets.values().all(|set| set.kernel == Kernel::Unknown);
        let survey = self.survey(report)?;
        let mut complete = survey.complete;
        self.take_names(&survey);
        let wanted = |name: &&SetName| self.sets.get(*name).is_some_and(|set| set.wanted.is_some());
        let names: BTreeSet<SetName> = survey.ours.keys().filter(wanted).cloned().collect();
        let mut bulk: BTreeMap<SetName, Contents> = BTreeMap::new();
        if names.len() > 1
            && survey.others <= MANY_OTHERS
            && let Some(contents) = self.transport.read_all(&names)?
        {
            report.reads += 1;
            bulk.extend(contents);
        }
        for name in names {
            let known = self.sets.get(&name).is_some_and(|set| matches!(set.kernel, Kernel::Read { .. }));
            let reading = match bulk.remove(&name) {
                Some(contents) => {
                    let news = self.sets.get_mut(&name).is_some_and(|set| set.read(Some(contents), self.limit));
                    Ok(Reading { complete: true, news })
                }
                None => self.read_set(&name, report),
            };
            match reading {
                Ok(reading) => {
                    complete &= reading.complete;
                    if known && reading.news && !first {
                        tracing::warn!(set = %name, "someone else changed a set; repairing it");
                    }
                }
                Err(error @ SetError::Lost(_)) => return Err(error),
                Err(error) => self.unreadable(&name, &error, now, report),
            }
            self.busy.insert(name);
        }
        if complete {
            self.lost = false;
            self.compared(now);
        } else {
            self.read_at = None;
            self.reading.failed(now);
            report.errors.push("sets changed while they were read; nothing is removed for now".to_owned());
        }
        Ok(())
    }

    pub(super) fn check_due(&self, now: Instant) -> bool {
        let refresh = || self.refresh.is_some_and(|period| self.read_at.is_some_and(|at| now >= at + period));
        self.reading.ready(now) && (self.suspected || refresh())
    }

    /// Compares the headers of all sets with what is believed: what vanished or has another number of members is
    /// put right by this apply. The members are compared beside the work (users.md U3.e). A failure takes no
    /// belief away.
    pub(super) fn check(&mut self, now: Instant, report: &mut DriverReport) {
        let survey = match self.survey(report) {
            Ok(survey) => survey,
            Err(error) => {
                self.reading.failed(now);
                report.errors.push(format!("sets cannot be listed: {error}"));
                return;
            }
        };
        self.take_names(&survey);
        if !survey.complete {
            self.reading.failed(now);
            report.errors.push("sets changed while they were listed".to_owned());
            return;
        }
        for (name, header) in &survey.ours {
            let (Some(set), Some(header)) = (self.sets.get_mut(name), header) else { continue };
            if set.wanted.is_some() && !set.agrees(header, self.limit) {
                tracing::warn!(set = %name, "someone else changed a set; repairing it");
                set.kernel = Kernel::Unread;
                self.busy.insert(name.clone());
            }
        }
        let suspected = self.suspected;
        self.compared(now);
        if !suspected {
            self.sweep.tell_if_late(self.refresh);
        }
        if !suspected && self.sweep.queue.is_empty() {
            let known = self.sets.iter().filter(|(_, set)| matches!(set.kernel, Kernel::Read { .. }));
            self.sweep.queue = known.map(|(name, _)| name.clone()).collect();
            self.sweep.next = Some(now);
            self.sweep.of_all = true;
        }
    }

    fn compared(&mut self, now: Instant) {
        self.read_at = Some(now);
        self.suspected = false;
        self.reading.succeeded();
    }

    /// Takes in which sets there are.
    fn take_names(&mut self, survey: &Survey) {
        let Self { sets, busy, .. } = self;
        sets.retain(|name, set| {
            if !survey.ours.contains_key(name) && (survey.complete || set.kernel == Kernel::Unknown) {
                if matches!(set.kernel, Kernel::Read { .. }) {
                    tracing::warn!(set = %name, "someone else destroyed a set; making it again");
                }
                // Creating is safe even if it is there after all: the kernel says so.
                set.kernel = Kernel::Absent;
                busy.insert(name.clone());
            }
            set.wanted.is_some() || set.kernel != Kernel::Absent
        });
        for name in survey.ours.keys() {
            let set = sets.entry(name.clone()).or_default();
            if matches!(set.kernel, Kernel::Unknown | Kernel::Absent) {
                set.kernel = Kernel::Unread;
                busy.insert(name.clone());
            }
        }
    }

    fn survey(&mut self, report: &mut DriverReport) -> Result<Survey, SetError> {
        let families = self.families.clone();
        let ours = |name: &SetName| families.iter().any(|family| plan::is_ours(name.as_str(), *family));
        let mut survey = Survey { ours: BTreeMap::new(), others: 0, complete: false };
        for _ in 0..READINGS {
            report.reads += 1;
            survey = match self.transport.headers()? {
                Some(headers) => Survey {
                    ours: headers.ours.into_iter().filter(|(name, _)| ours(name)).map(|(n, h)| (n, Some(h))).collect(),
                    others: headers.others,
                    complete: headers.complete,
                },
                None => {
                    let listing = self.transport.list()?;
                    let names = listing.names.iter().filter_map(|name| SetName::new(name));
                    let known: BTreeMap<_, _> = names.filter(|name| ours(name)).map(|name| (name, None)).collect();
                    Survey { others: listing.names.len() - known.len(), ours: known, complete: listing.complete }
                }
            };
            if survey.complete {
                break;
            }
        }
        Ok(survey)
    }

    /// Reads the wanted sets whose members are not known. Returns false if the kernel does not answer.
    pub(super) fn read_unread(&mut self, now: Instant, report: &mut DriverReport) -> bool {
        let unread = |set: &Set| set.wanted.is_some() && set.kernel == Kernel::Unread && set.backoff.ready(now);
        let names: Vec<SetName> =
            self.busy_sets().filter(|(_, set)| unread(set)).map(|(name, _)| name.clone()).collect();
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
        let news = self.sets.get_mut(name).is_some_and(|set| set.read(contents, self.limit));
        Ok(Reading { complete, news })
    }

    /// A set that cannot be read is built anew, beside it (netfilter.md 17.4).
    fn unreadable(&mut self, name: &SetName, error: &SetError, now: Instant, report: &mut DriverReport) {
        report.errors.push(format!("set {name} cannot be read: {error}"));
        let Some(set) = self.sets.get_mut(name) else {
            return;
        };
        self.busy.insert(name.clone());
        if set.backoff.failures() < READINGS {
            set.kernel = Kernel::Unread;
            set.problem = Some(error.to_string());
            set.backoff.failed(now);
        } else {
            set.must_be(Fit::Rebuild);
        }
    }

    /// Goes on with the comparison of members, for one slice of time.
    pub(super) fn sweep_on(&mut self, now: Instant, report: &mut DriverReport) {
        if self.sweep.queue.is_empty() || self.sweep.next.is_some_and(|next| next > now) {
            return;
        }
        let start = self.transport.now();
        let mut used = Duration::ZERO;
        while let Some(name) = self.sweep.queue.front().filter(|_| used < SLICE).cloned() {
            let compared = self.sets.get(&name).is_some_and(|set| matches!(set.kernel, Kernel::Read { .. }));
            if !compared {
                // Gone, or to be read anyway.
                self.stop_sweep();
                self.sweep.queue.pop_front();
                continue;
            }
            report.reads += 1;
            match self.transport.read_on(&name, SLICE.saturating_sub(used)) {
                Ok(Slice::More(members)) => self.compare(&name, &members),
                Ok(Slice::Done(contents)) => {
                    self.sweep.queue.pop_front();
                    self.finish_comparison(&name, contents);
                }
                Err(error) => {
                    // What is believed stays; the next refresh begins anew.
                    report.errors.push(format!("set {name} cannot be compared: {error}"));
                    self.stop_sweep();
                    self.sweep.queue.clear();
                }
            }
            used = self.transport.now().saturating_duration_since(start);
        }
        self.sweep.of_all &= !self.sweep.queue.is_empty();
        self.sweep.next = Some(now + used.saturating_mul(PAUSE_PER_WORK).max(SHORTEST_PAUSE));
    }

    /// Compares a part of a set, so that no slice has to do it for the whole.
    fn compare(&mut self, name: &SetName, part: &[Member]) {
        if self.sweep.current.as_ref().is_none_or(|current| current.set != *name) {
            let touched = Tree::default();
            self.sweep.current = Some(Comparison { set: name.clone(), touched, count: 0, odd: false });
        }
        let (Some(current), Some(set)) = (&mut self.sweep.current, self.sets.get(name)) else { return };
        match set.count(part, &current.touched) {
            Some(count) => current.count += count,
            None => current.odd = true,
        }
    }

    /// A set that is not as believed is read in full and repaired by the next apply.
    fn finish_comparison(&mut self, name: &SetName, contents: Option<Contents>) {
        if let Some(contents) = &contents {
            self.compare(name, &contents.members);
        }
        let current = self.sweep.current.take();
        let (Some(set), Some(contents)) = (self.sets.get_mut(name), &contents) else {
            return self.found_changed(name);
        };
        let same = current.is_some_and(|current| {
            // What did not come says nothing.
            let all = !contents.complete || set.is_all(current.count, &current.touched);
            set.fits(contents, self.limit) && !current.odd && all
        });
        if !same {
            self.found_changed(name);
        }
    }

    fn found_changed(&mut self, name: &SetName) {
        if let Some(set) = self.sets.get_mut(name) {
            tracing::warn!(set = %name, "someone else changed a set; repairing it");
            set.kernel = Kernel::Unread;
            self.busy.insert(name.clone());
            self.unfinished = true;
        }
    }

    /// Gives up the set that is being compared; it is begun anew.
    pub(super) fn stop_sweep(&mut self) {
        self.sweep.current = None;
        self.transport.stop_reading();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_comparison_that_outlasts_its_interval_is_said_once_until_one_does_not() {
        let mut sweep = Sweep { of_all: true, ..Sweep::default() };
        let period = Some(Duration::from_secs(90));
        let steps = [(0, false), (2, true), (1, false), (0, false), (1, true)];
        for (step, (left, news)) in steps.into_iter().enumerate() {
            sweep.queue = (0..left).map(|number| SetName::fixed(&format!("cali40s:{number}"))).collect();
            assert_eq!(sweep.tell_if_late(period), news, "step {step}");
        }
        // A set that is compared because somebody asked for it is none of all.
        let mut sweep = Sweep::default();
        sweep.first(SetName::fixed("cali40s:a"), Instant::now());
        assert!(!sweep.tell_if_late(period));
    }
}
