//! What the log says about applies.
//!
//! Fed by the main loop with what the apply thread reports. One info line per batch; a warning for each new
//! reason why a driver fails, a reminder while it keeps failing, and an info line when all is well with it again; a
//! warning for each thing that is kept from being as wanted, when that begins.
//!
//! Invariant: however much fails and however often, the lines are few and what is remembered is bounded.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::{Duration, Instant};

use dataplane::DriverReport;
use tracing::{debug, info, warn};

use crate::apply_thread::{Applied, Before, Cause, Counts};

/// Reasons that are said about one failure, or about what is held back, of one driver.
const MOST_REASONS: usize = 20;

/// Time between two lines that say that a driver keeps failing.
const REMINDER: Duration = Duration::from_secs(60);

/// Least time between two lines that say that the kernel was put right for the same reason.
const REPETITION: Duration = Duration::from_secs(10);

/// See the [module documentation](self).
#[derive(Debug, Default)]
pub(crate) struct Reports {
    /// By driver: what was said to be held back.
    held: BTreeMap<String, Vec<String>>,
    /// By driver: what was said since it began to fail.
    failing: BTreeMap<String, Failure>,
    /// By reason: when it was last said that the kernel was put right.
    put_right: BTreeMap<&'static str, Instant>,
}

/// How long each driver took; those of tables may have run side by side (performance.md section 7, rule 5).
struct Stages<'a>(&'a [DriverReport]);

impl fmt::Display for Stages<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, DriverReport { driver, took, .. }) in self.0.iter().enumerate() {
            let comma = if index > 0 { "," } else { "" };
            write!(f, "{comma}{driver}:{took:?}")?;
        }
        Ok(())
    }
}

/// A driver's failure that lasts.
#[derive(Debug)]
struct Failure {
    since: Instant,
    reminded: Instant,
    said: BTreeSet<String>,
}

/// What is worth a line about a driver's attempts.
#[derive(Clone, Debug, PartialEq, Eq)]
enum News {
    /// Reasons that were not said before, and how many more there are.
    Fails(Vec<String>, usize),
    /// As before.
    StillFails,
    /// As before, and it was not said for long.
    Lasts(Duration),
    Recovered,
    Nothing,
}

impl Reports {
    pub(crate) fn log(&mut self, applied: &Applied) {
        let Applied { cause, counts, report, before } = applied;
        for driver in &report.drivers {
            self.log_driver(report.seq, driver);
        }
        for driver in self.without_trouble(&report.drivers) {
            info!(seq = report.seq, driver, "driver has recovered");
        }
        let Counts { links, sets, members, chains, routes } = *counts;
        let (seq, writes, took, failed) = (report.seq, report.writes(), report.took, report.failed());
        match cause {
            Cause::Batch => {
                let Before { calculating, waited } = before;
                let stages = Stages(&report.drivers);
                info!(
                    seq, links, sets, members, chains, routes, writes, failed, calculating = ?calculating,
                    waited = ?waited, took = ?took, stages = %stages, "batch applied"
                );
            }
            Cause::Again(reason) if writes > 0 && self.is_worth_a_line(reason, Instant::now()) => {
                info!(seq, reason, writes, failed, took = ?took, "kernel put right");
            }
            Cause::Again(reason) => debug!(seq, reason, failed, took = ?took, "kernel looked after"),
        }
        if let Some((at, reason)) = report.again {
            debug!(seq, reason, wait = ?at.saturating_duration_since(Instant::now()), "waiting");
        }
    }

    /// Others may change the kernel ten times a second, and it is put right each time.
    fn is_worth_a_line(&mut self, reason: &'static str, now: Instant) -> bool {
        let said = self.put_right.get(reason);
        let worth = said.is_none_or(|said| now >= *said + REPETITION);
        if worth {
            self.put_right.insert(reason, now);
        }
        worth
    }

    fn log_driver(&mut self, seq: u64, report: &DriverReport) {
        let DriverReport { driver, errors, waiting, held, repaired, .. } = report;
        match self.news(driver, errors, waiting.is_some(), Instant::now()) {
            News::Fails(reasons, more) => {
                for error in reasons {
                    warn!(seq, driver, error, "driver failed, it will try again");
                }
                if more > 0 {
                    warn!(seq, driver, more, "driver failed for further reasons");
                }
            }
            News::StillFails => debug!(seq, driver, error = errors.join("; "), "driver failed again"),
            News::Lasts(since) => {
                let error = errors.first();
                warn!(seq, driver, seconds = since.as_secs(), errors = errors.len(), error, "driver keeps failing");
            }
            News::Recovered => info!(seq, driver, "driver has recovered"),
            News::Nothing => (),
        }
        if let Some(reason) = waiting {
            debug!(seq, driver, reason, "driver waits for its next attempt");
        }
        if *repaired > 0 {
            warn!(seq, driver, chains = repaired, "chains that somebody else had changed are repaired");
        }
        let new_held = self.new_held(driver, held);
        let more = new_held.len().saturating_sub(MOST_REASONS);
        for reason in new_held.into_iter().take(MOST_REASONS) {
            warn!(seq, driver, reason, "kernel refuses what is wanted; it is closed or kept as it was");
        }
        if more > 0 {
            warn!(seq, driver, more, "kernel refuses more of what is wanted");
        }
    }

    /// Takes in the outcome of a driver's attempt. `waiting` means that something is still not as wanted, although
    /// this attempt met no error.
    fn news(&mut self, driver: &str, errors: &[String], waiting: bool, now: Instant) -> News {
        if errors.is_empty() {
            return match self.failing.remove(driver) {
                Some(failure) if waiting => {
                    self.failing.insert(driver.to_owned(), failure);
                    News::Nothing
                }
                Some(_) => News::Recovered,
                None => News::Nothing,
            };
        }
        let new = || Failure { since: now, reminded: now, said: BTreeSet::new() };
        let failure = self.failing.entry(driver.to_owned()).or_insert_with(new);
        let begins = failure.said.is_empty();
        let mut reasons = Vec::new();
        let mut more = 0;
        for error in errors.iter().filter(|error| !failure.said.contains(*error)).collect::<BTreeSet<_>>() {
            if failure.said.len() < MOST_REASONS {
                failure.said.insert(error.clone());
                reasons.push(error.clone());
            } else {
                more += 1;
            }
        }
        if begins || !reasons.is_empty() {
            return News::Fails(reasons, more);
        }
        if now.saturating_duration_since(failure.reminded) < REMINDER {
            return News::StillFails;
        }
        failure.reminded = now;
        News::Lasts(now.saturating_duration_since(failure.since))
    }

    /// Returns the drivers that failed before and have nothing to report now: whatever was wrong is gone.
    fn without_trouble(&mut self, reports: &[DriverReport]) -> Vec<String> {
        let reported: BTreeSet<&str> = reports.iter().map(|report| report.driver.as_str()).collect();
        self.held.retain(|driver, _| reported.contains(driver.as_str()));
        let well =
            self.failing.keys().filter(|driver| !reported.contains(driver.as_str())).cloned().collect::<Vec<_>>();
        for driver in &well {
            self.failing.remove(driver);
        }
        well
    }

    /// Takes in what a driver holds back; returns what was not said before.
    fn new_held<'a>(&mut self, driver: &str, held: &'a [String]) -> Vec<&'a str> {
        let said = self.held.get(driver).map_or(&[][..], Vec::as_slice);
        let new = held.iter().filter(|reason| !said.contains(reason)).map(String::as_str).collect();
        if held.is_empty() {
            self.held.remove(driver);
        } else {
            self.held.insert(driver.to_owned(), held.to_vec());
        }
        new
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn putting_the_kernel_right_is_said_every_ten_seconds_at_most_for_each_reason() {
        let start = Instant::now();
        let mut reports = Reports::default();
        let mut said = |reason, second| reports.is_worth_a_line(reason, start + Duration::from_secs(second));
        let steps =
            [("a", 0, true), ("a", 1, false), ("b", 2, true), ("a", 9, false), ("a", 10, true), ("a", 19, false)];
        for (reason, second, expected) in steps {
            assert_eq!(said(reason, second), expected, "{reason} {second}");
        }
    }

    #[test]
    fn a_failure_is_said_when_it_begins_or_has_a_new_reason_and_so_is_the_recovery() {
        let mut reports = Reports::default();
        let fails = |reason: &str| News::Fails(vec![reason.to_owned()], 0);
        let steps: &[(&[&str], bool, News)] = &[
            (&[], false, News::Nothing),
            (&["busy"], false, fails("busy")),
            // Others of the driver's things are well, this one is not.
            (&[], true, News::Nothing),
            (&["busy"], false, News::StillFails),
            (&["refused"], false, fails("refused")),
            (&["busy", "refused"], false, News::StillFails),
            (&["busy"], false, News::StillFails),
            (&[], false, News::Recovered),
            (&[], false, News::Nothing),
            (&["busy"], false, fails("busy")),
        ];
        let now = Instant::now();
        for (number, (errors, waiting, expected)) in steps.iter().enumerate() {
            assert_eq!(reports.news("filter/4", &strings(errors), *waiting, now), *expected, "step {number}");
        }
        // Another driver is another matter.
        assert_eq!(reports.news("filter/6", &strings(&["busy"]), false, now), fails("busy"));
    }

    #[test]
    fn a_failure_that_lasts_is_said_again_once_a_minute_whatever_its_reasons() {
        let mut reports = Reports::default();
        let start = Instant::now();
        let mut lines = 0;
        for second in 0..600 {
            let reason = format!("refused, process {second}");
            match reports.news("filter/4", &[reason], false, start + Duration::from_secs(second)) {
                News::Fails(reasons, more) => lines += reasons.len() + usize::from(more > 0),
                News::Lasts(since) => {
                    assert_eq!(since.as_secs(), second);
                    lines += 1;
                }
                News::StillFails => (),
                news @ (News::Recovered | News::Nothing) => panic!("{news:?}"),
            }
        }
        assert_eq!(lines, MOST_REASONS + 9);
    }

    #[test]
    fn a_thousand_errors_of_one_attempt_are_a_few_lines() {
        let errors: Vec<String> = (0..1000).map(|number| format!("route {number}")).collect();
        let news = Reports::default().news("routes", &errors, false, Instant::now());
        assert!(matches!(news, News::Fails(reasons, more) if (reasons.len(), more) == (MOST_REASONS, 980)));
    }

    #[test]
    fn a_driver_that_has_nothing_left_to_do_is_well_and_its_next_failure_is_news() {
        let mut reports = Reports::default();
        let now = Instant::now();
        for _ in 0..2 {
            assert!(matches!(reports.news("routes", &strings(&["bad"]), false, now), News::Fails(..)));
            reports.new_held("routes", &strings(&["x"]));
            assert_eq!(reports.without_trouble(&[report("routes")]), [""; 0]);
            assert_eq!(reports.without_trouble(&[report("ipset")]), ["routes"]);
            assert_eq!(reports.new_held("routes", &strings(&["x"])), ["x"]);
        }
    }

    #[test]
    fn what_is_held_back_is_said_when_it_begins_and_not_again_while_it_lasts() {
        let mut reports = Reports::default();
        let steps: &[(&[&str], &[&str])] =
            &[(&["a"], &["a"]), (&["a"], &[]), (&["a", "b"], &["b"]), (&[], &[]), (&["a"], &["a"])];
        for (number, (held, expected)) in steps.iter().enumerate() {
            assert_eq!(&reports.new_held("filter/4", &strings(held)), expected, "step {number}");
        }
    }

    fn strings(texts: &[&str]) -> Vec<String> {
        texts.iter().map(ToString::to_string).collect()
    }

    fn report(driver: &str) -> DriverReport {
        DriverReport { driver: driver.to_owned(), ..DriverReport::default() }
    }
}
