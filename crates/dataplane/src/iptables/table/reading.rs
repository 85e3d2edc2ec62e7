//! What a table is believed to hold: when it is read, and what a listing makes of that belief.
//!
//! Part of the table driver. Invariant: a listing that is not complete changes no belief but to take all of it away
//! (I3); what differs and was not so wanted was done by somebody else, and is said once.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use program::TableId;
use tracing::{info, warn};

use super::{Content, TableDriver, TableRequest, TableResponse};
use crate::driver::Driver as _;
use crate::error::DriverError;
use crate::iptables::parse::{Entry, View, is_our_chain, parse};
use crate::iptables::plan::{PROBE_CHAIN, WantedHooks};
use crate::iptables::refusal::essence;
use crate::nftables::{Process, ReadRule};
use crate::options::Variant;

/// Pause before the first look after a write, however short it is configured.
pub(super) const SHORTEST_CHECK: Duration = Duration::from_millis(50);

/// Looks after a write end when their pause reaches this.
const LONGEST_CHECK: Duration = Duration::from_secs(3600);

/// A table is listed for good after so many times that a proof made do for it.
const PROOFS: u32 = 20;

/// Chains that one line of the log names.
const MAX_NAMES_IN_LOG: usize = 20;

impl TableDriver {
    /// The request whose answer [`Self::take_sweep`] takes.
    pub fn save(&self) -> TableRequest {
        let if_loaded = self.setup.variant == Variant::Legacy && self.wants_nothing();
        TableRequest::Save { table: self.id.table, if_loaded }
    }

    /// Returns whether a proof that the table is as it was listed makes do for a listing. Not for a listing that was of
    /// no use, not for what we wrote since, and not for ever: proofs, too, are made by programs.
    pub fn trusts_proofs(&self) -> bool {
        self.proofs_left > 0 && self.view.is_some()
    }

    /// Takes the proof in the place of a listing.
    pub fn confirm(&mut self, now: Instant) {
        self.proofs_left = self.proofs_left.saturating_sub(1);
        self.read_at = Some(now);
        self.note_check(now);
    }

    /// Takes a listing that was made in the background, during which nothing was written. Returns whether
    /// something is to be repaired.
    ///
    /// # Errors
    ///
    /// If the listing is of no use. What was believed is believed on, and the next one comes when it is due.
    pub fn take_sweep(&mut self, response: TableResponse, now: Instant) -> Result<bool, DriverError> {
        let listed = self.listed(response);
        self.read_at = Some(now);
        self.proofs_left = 0;
        self.note_check(now);
        let (view, text) = listed?;
        self.unchecked = None;
        self.release_what_is_not_as_it_was(&view);
        self.compare(view, Some(&text), now);
        self.proofs_left = PROOFS;
        Ok(!self.dirty.is_empty() || !self.dirty_hooks.is_empty())
    }

    /// Takes note that a listing in the background was of no use. Returns whether that is news.
    pub fn could_not_check(&mut self, error: &str) -> bool {
        self.unchecked.replace(error.to_owned()).is_none_or(|before| before != error)
    }

    pub(super) fn reading_due(&self) -> Option<(Instant, &'static str)> {
        let refresh = self.read_at.zip(self.checks.refresh).map(|(at, pause)| (at + pause, "refresh of a table"));
        let check = self.check.map(|(at, _)| (at, "check of a table after a write"));
        [refresh, check].into_iter().flatten().min_by_key(|(at, _)| *at)
    }

    /// Looks after a write come at growing intervals: whoever overwrote us by accident did it soon
    /// (netfilter.md 16.7).
    pub(super) fn expect_check(&mut self, now: Instant) {
        let first = self.checks.after_write.max(SHORTEST_CHECK);
        self.check = Some((now + first, first));
    }

    pub(super) fn note_check(&mut self, now: Instant) {
        let Some((mut at, mut pause)) = self.check else { return };
        while at <= now {
            at += pause;
            pause = pause.saturating_mul(2);
        }
        self.check = (pause < LONGEST_CHECK).then_some((at, pause));
    }

    pub(super) fn take_listing(&mut self, response: TableResponse, now: Instant) -> Result<(), DriverError> {
        self.stats.reads += 1;
        let unlisted = |source| DriverError::Unlisted { table: self.label(), source: Box::new(source) };
        let (view, text) = self.listed(response).map_err(unlisted)?;
        self.unchecked = None;
        if self.read_at.replace(now).is_none() {
            self.expect_check(now);
        }
        self.note_check(now);
        self.release_what_is_not_as_it_was(&view);
        self.compare(view, Some(&text), now);
        self.proofs_left = PROOFS;
        Ok(())
    }

    /// What a listing shows, and its text as far as there is one.
    pub(super) fn listed(&self, response: TableResponse) -> Result<(View, String), DriverError> {
        match response {
            TableResponse::Done(output) => match parse(self.id.table, &output) {
                Ok(view) => Ok((view, output)),
                Err(unreadable) => Err(DriverError::Readback {
                    program: self.save_program(),
                    line: unreadable.line,
                    reason: unreadable.reason,
                }),
            },
            TableResponse::Listed(view) => Ok((view, String::new())),
            TableResponse::NotLoaded => Ok((View::default(), String::new())),
            other @ (TableResponse::Chains(_) | TableResponse::Refused { .. } | TableResponse::Broken(_)) => {
                Err(self.failure(other))
            }
        }
    }

    /// Why a read did not give what it should.
    pub(super) fn failure(&self, response: TableResponse) -> DriverError {
        match response {
            TableResponse::Refused { program, status, stderr, .. } => {
                DriverError::Rejected { program, status, line: None, stderr: essence(&stderr) }
            }
            TableResponse::Broken(error) => error,
            TableResponse::Done(_) | TableResponse::Listed(_) | TableResponse::Chains(_) | TableResponse::NotLoaded => {
                DriverError::Readback {
                    program: self.save_program(),
                    line: 0,
                    reason: "the answer is of another kind".to_owned(),
                }
            }
        }
    }

    /// Takes the contents of single chains into the view. Whatever is not quite clear leads to a whole listing.
    pub(super) fn take_chains(
        &mut self,
        names: &[Box<str>],
        response: TableResponse,
        now: Instant,
    ) -> Result<(), DriverError> {
        let TableResponse::Chains(chains) = response else {
            // Where single chains cannot be read.
            return self.take_listing(response, now);
        };
        self.stats.reads += 1;
        let Some(mut view) = self.view.take() else { return Ok(()) };
        for (name, rules) in names.iter().zip(chains) {
            if is_our_chain(name) {
                if rules.is_empty() && !view.ours.contains_key(name) {
                    continue;
                }
                view.ours.insert(name.clone(), rules.iter().map(|rule| rule.hash).collect());
                continue;
            }
            let known = view.shared.get(name).map(Vec::as_slice).unwrap_or_default();
            let entry = |rule: &ReadRule| match rule {
                ReadRule { is_ours: false, .. } => Some(Entry::Foreign),
                ReadRule { hash: Some(hash), .. } => known.iter().find(|entry| entry.hash() == Some(*hash)).cloned(),
                ReadRule { hash: None, .. } => None,
            };
            let Some(entries) = rules.iter().map(entry).collect::<Option<Vec<_>>>() else {
                // A rule of ours that we have never seen: its text is needed to remove it.
                self.distrust();
                return Ok(());
            };
            view.shared.insert(name.clone(), entries);
        }
        self.release_what_is_not_as_it_was(&view);
        self.compare(view, None, now);
        self.proofs_left = 0;
        Ok(())
    }

    fn save_program(&self) -> String {
        format!("{}-{}-save", tool_name(self.id), self.setup.variant.as_str())
    }

    /// Finds out what differs, and says so if nobody but somebody else can have done it.
    pub(super) fn compare(&mut self, view: View, listing: Option<&str>, now: Instant) {
        let mut differing: BTreeSet<Box<str>> = BTreeSet::new();
        for name in self.chains.keys().chain(view.ours.keys()) {
            let kernel = view.ours.get(name);
            let same = match self.content(name) {
                Content::Rules(wanted) => kernel.is_some_and(|kernel| wanted.is_in(kernel)),
                Content::AsIs => true,
                Content::Empty => kernel.is_none_or(Vec::is_empty),
                Content::Absent => kernel.is_none(),
            };
            if !same {
                differing.insert(name.clone());
            }
        }
        let nothing = WantedHooks::default();
        let mut differing_hooks: BTreeSet<Box<str>> = BTreeSet::new();
        for name in self.hooks.keys().chain(view.shared.keys()) {
            let kernel = view.shared.get(name).map(Vec::as_slice).unwrap_or_default();
            let wanted = self.hooks.get(name).unwrap_or(&nothing);
            if !wanted.are_in(kernel, self.setup.insert_mode) {
                differing_hooks.insert(name.clone());
            }
        }
        self.report_differences(&differing, &differing_hooks);
        self.note_fights(&view, &differing_hooks, listing, now);
        // A chain that is held as it is still waits.
        let waiting = self.dirty.iter().filter(|name| self.held.get(*name).is_some_and(|held| held.instead.is_none()));
        differing.extend(waiting.cloned());
        self.dirty = differing;
        self.dirty_hooks = differing_hooks;
        self.view = Some(view);
        self.fresh = true;
        if !self.wants_listing_for_a_fight() {
            self.rival = None;
        }
    }

    fn report_differences(&mut self, chains: &BTreeSet<Box<str>>, hooks: &BTreeSet<Box<str>>) {
        let table = self.label();
        if !self.settled_once {
            let count = chains.len() + hooks.len();
            // Attempts that fail read it again and again.
            if count > 0 && self.difference_said != Some(count) {
                self.difference_said = Some(count);
                info!(table, chains = count, "table differs from what is wanted");
            }
            return;
        }
        let foreign = |all: &BTreeSet<Box<str>>, known: &BTreeSet<Box<str>>| {
            all.difference(known).filter(|name| ***name != *PROBE_CHAIN).cloned().collect::<Vec<_>>()
        };
        let mut names = foreign(hooks, &self.dirty_hooks);
        names.extend(foreign(chains, &self.dirty));
        if !names.is_empty() {
            let count = names.len();
            self.stats.repaired += u64::try_from(count).unwrap_or(u64::MAX);
            names.truncate(MAX_NAMES_IN_LOG);
            let by = self.rival.as_ref().map(|Process { pid, name }| format!("{name} ({pid})"));
            let by = by.as_deref().unwrap_or("unknown");
            warn!(table, count, chains = %names.join(" "), by, "foreign changes found, repairing");
        }
    }
}

fn tool_name(id: TableId) -> &'static str {
    match id.family {
        program::Family::V4 => "iptables",
        program::Family::V6 => "ip6tables",
    }
}
