//! What the log says about applies.
//!
//! Fed by the main loop with what the apply thread reports. One info line per batch; a warning when a
//! driver begins to fail or fails differently, and an info line when it succeeds again; a warning for
//! each thing that is kept from being as wanted, when that begins.

use std::collections::BTreeMap;
use std::time::Instant;

use dataplane::DriverReport;
use tracing::{debug, info, warn};

use crate::apply_thread::{Applied, Cause, Counts};

/// See the [module documentation](self).
#[derive(Debug, Default)]
pub(crate) struct Reports {
    /// By driver: what was said to be held back.
    held: BTreeMap<String, Vec<String>>,
    /// By driver: the errors of its last attempt, if that failed.
    failing: BTreeMap<String, Vec<String>>,
}

/// What is worth a line about a driver's attempts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum News {
    Fails,
    /// As before.
    StillFails,
    Recovered,
    Nothing,
}

impl Reports {
    pub(crate) fn log(&mut self, applied: &Applied) {
        let Applied { cause, counts, report } = applied;
        for driver in &report.drivers {
            self.log_driver(report.seq, driver);
        }
        let Counts { sets, members, chains, routes } = *counts;
        let (seq, writes, took, failed) = (report.seq, report.writes(), report.took, report.failed());
        match cause {
            Cause::Batch => {
                info!(seq, sets, members, chains, routes, writes, failed, took = ?took, "batch applied");
            }
            Cause::Again(reason) if writes > 0 => {
                info!(seq, reason, writes, failed, took = ?took, "kernel put right");
            }
            Cause::Again(reason) => debug!(seq, reason, failed, took = ?took, "kernel looked after"),
        }
        if let Some((at, reason)) = report.again {
            debug!(seq, reason, wait = ?at.saturating_duration_since(Instant::now()), "waiting");
        }
    }

    fn log_driver(&mut self, seq: u64, report: &DriverReport) {
        let DriverReport { driver, writes: _, reads: _, errors, waiting, held, repaired, lines: _ } = report;
        match self.news(driver, errors, waiting.is_some()) {
            News::Fails => {
                for error in errors {
                    warn!(seq, driver, error, "driver failed, it will try again");
                }
            }
            News::StillFails => debug!(seq, driver, error = errors.join("; "), "driver failed again"),
            News::Recovered => info!(seq, driver, "driver has recovered"),
            News::Nothing => (),
        }
        if let Some(reason) = waiting {
            debug!(seq, driver, reason, "driver waits for its next attempt");
        }
        if *repaired > 0 {
            warn!(seq, driver, chains = repaired, "chains that somebody else had changed are repaired");
        }
        for reason in self.new_held(driver, held) {
            warn!(seq, driver, reason, "kernel refuses what is wanted; it is closed or kept as it was");
        }
    }

    /// Takes in the outcome of a driver's attempt; `waiting` means that there was none.
    fn news(&mut self, driver: &str, errors: &[String], waiting: bool) -> News {
        if waiting && errors.is_empty() {
            return News::Nothing;
        }
        if errors.is_empty() {
            return if self.failing.remove(driver).is_some() { News::Recovered } else { News::Nothing };
        }
        let before = self.failing.insert(driver.to_owned(), errors.to_vec());
        if before.as_deref() == Some(errors) { News::StillFails } else { News::Fails }
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
    fn a_failure_is_said_when_it_begins_or_changes_and_so_is_the_recovery() {
        let mut reports = Reports::default();
        let steps: &[(&[&str], bool, News)] = &[
            (&[], false, News::Nothing),
            (&["busy"], false, News::Fails),
            (&[], true, News::Nothing),
            (&["busy"], false, News::StillFails),
            (&["refused"], false, News::Fails),
            (&[], false, News::Recovered),
            (&[], false, News::Nothing),
        ];
        for (number, (errors, waiting, expected)) in steps.iter().enumerate() {
            let errors: Vec<String> = errors.iter().map(ToString::to_string).collect();
            assert_eq!(reports.news("filter/4", &errors, *waiting), *expected, "step {number}");
        }
        // Another driver is another matter.
        assert_eq!(reports.news("filter/6", &["busy".to_owned()], false), News::Fails);
    }

    #[test]
    fn what_is_held_back_is_said_when_it_begins_and_not_again_while_it_lasts() {
        let mut reports = Reports::default();
        let steps: &[(&[&str], &[&str])] =
            &[(&["a"], &["a"]), (&["a"], &[]), (&["a", "b"], &["b"]), (&[], &[]), (&["a"], &["a"])];
        for (number, (held, expected)) in steps.iter().enumerate() {
            let held: Vec<String> = held.iter().map(ToString::to_string).collect();
            assert_eq!(&reports.new_held("filter/4", &held), expected, "step {number}");
        }
    }
}
