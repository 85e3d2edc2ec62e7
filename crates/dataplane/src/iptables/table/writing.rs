//! Transactions: what must be written, and what is believed when it was (netfilter.md 16.5).
//!
//! Part of the table driver; [`super::super::plan`] has the text. Invariant: only differences are written (I5).

use std::sync::Arc;
use std::time::Instant;

use super::{After, Content, Step, TableDriver, TableRequest, TableResponse, Transaction};
use crate::driver::{Driver as _, Next};
use crate::error::DriverError;
use crate::iptables::parse::{Entry, Numbered};
use crate::iptables::plan::{Edit, HookEdit, WantedHooks, restore_input};
use crate::iptables::refusal::{Complaint, essence};

impl TableDriver {
    /// Returns the transaction that is needed, `None` if there is none, or why one is needed but impossible.
    pub(super) fn plan(&mut self, now: Instant) -> Result<Option<Transaction>, String> {
        for name in std::mem::take(&mut self.hooks_wanted) {
            self.fights.insist(&name, now);
        }
        if self.dirty.is_empty() && self.dirty_hooks.is_empty() {
            return Ok(None);
        }
        self.hold_what_cannot_be_written()?;
        let kept = self.kept();
        let Some(view) = &self.view else { return Ok(None) };
        let mut edits = Vec::new();
        let mut chains = Vec::new();
        let mut unchanged = Vec::new();
        for name in self.dirty.iter().filter(|name| !kept.contains(*name)) {
            let kernel = view.ours.get(name).map(Vec::as_slice);
            match (self.content(name), kernel) {
                (Content::AsIs, _) => {}
                (Content::Rules(new), Some(old)) if new.is_in(old) => unchanged.push(name.clone()),
                (Content::Rules(new), old) => {
                    edits.push(Edit::Write { new, old });
                    chains.push((name.clone(), After::Holds(Arc::clone(&new.chain), new.hashes.clone())));
                }
                (Content::Absent, None) | (Content::Empty, None | Some([])) => unchanged.push(name.clone()),
                (Content::Absent, Some(_)) => {
                    edits.push(Edit::Delete { name });
                    chains.push((name.clone(), After::Gone));
                }
                (Content::Empty, Some(_)) => {
                    edits.push(Edit::Flush { name });
                    chains.push((name.clone(), After::Empty));
                }
            }
        }
        let nothing = WantedHooks::default();
        let mut hook_edits = Vec::new();
        let mut hooks = Vec::new();
        let mut removals = Vec::new();
        let mut unchanged_hooks = Vec::new();
        for name in self.dirty_hooks.iter().filter(|name| self.fights.waits_until(name, now).is_none()) {
            let old = view.shared.get(name).map(Vec::as_slice).unwrap_or_default();
            let new = self.hooks.get(name).unwrap_or(&nothing);
            if new.are_in(old, self.setup.insert_mode) {
                unchanged_hooks.push(name.clone());
            } else {
                hook_edits.push(HookEdit { name, new, old });
                hooks.push((name.clone(), new.written(old, &self.setup)));
                removals.extend(old.iter().filter_map(|entry| match entry {
                    Entry::Numbered { handle, .. } => Some(Numbered { chain: name.clone(), handle: *handle }),
                    Entry::Foreign | Entry::Ours { .. } => None,
                }));
            }
        }
        let text = restore_input(&self.setup, &edits, &hook_edits);
        drop((edits, hook_edits));
        for name in unchanged {
            self.previous.remove(&name);
            self.dirty.remove(&name);
        }
        for name in unchanged_hooks {
            self.dirty_hooks.remove(&name);
        }
        if text.is_empty() {
            self.removals = removals;
            return Ok(None);
        }
        Ok(Some(Transaction { text: text.into(), chains, hooks, removals }))
    }

    pub(super) fn take_verdict(
        &mut self,
        transaction: Transaction,
        response: TableResponse,
        now: Instant,
    ) -> Result<(), DriverError> {
        match response {
            TableResponse::Done(_) | TableResponse::Listed(_) | TableResponse::NotLoaded => {
                self.commit(transaction, now);
                self.expect_check(now);
                Ok(())
            }
            TableResponse::Broken(error) => Err(error),
            chains @ TableResponse::Chains(_) => Err(self.failure(chains)),
            TableResponse::Refused { program, status, stderr, lines_before } => {
                let complaint = Complaint::read(&stderr, lines_before);
                let line = if let Complaint::Lines(lines) = &complaint { lines.first().copied() } else { None };
                let rejected = DriverError::Rejected { program, status, line, stderr: essence(&stderr) };
                self.take_complaint(&transaction, complaint, rejected)
            }
        }
    }

    /// Rules of ours without a text go when what replaces them is in force.
    pub(super) fn remove_numbered(&mut self) -> Next<TableRequest> {
        if self.removals.is_empty() {
            return Next::Idle;
        }
        self.step = Step::Removing;
        Next::Do(TableRequest::Remove { table: self.id.table, rules: self.removals.clone() })
    }

    pub(in crate::iptables) fn has_numbered_rules_to_remove(&self) -> bool {
        let shared = self.view.iter().flat_map(|view| &view.shared);
        let mut dirty = shared.filter(|(name, _)| self.dirty_hooks.contains(*name)).flat_map(|(_, entries)| entries);
        !self.removals.is_empty() || dirty.any(|entry| matches!(entry, Entry::Numbered { .. }))
    }

    /// The chains that the removed rules led to can go now; the next listing shows them.
    pub(super) fn take_removal(&mut self, response: TableResponse) -> Result<(), DriverError> {
        match response {
            TableResponse::Done(_) | TableResponse::Listed(_) | TableResponse::NotLoaded => {
                self.stats.writes += 1;
                self.distrust();
                Ok(())
            }
            TableResponse::Broken(error) => Err(error),
            chains @ TableResponse::Chains(_) => Err(self.failure(chains)),
            TableResponse::Refused { program, status, stderr, .. } => {
                Err(DriverError::Rejected { program, status, line: None, stderr: essence(&stderr) })
            }
        }
    }

    /// Takes what went in into the view. What is wanted may have changed while it was on its way.
    fn commit(&mut self, transaction: Transaction, now: Instant) {
        let Transaction { text, chains, hooks, removals } = transaction;
        self.removals = removals;
        self.stats.writes += 1;
        self.stats.lines += u64::try_from(text.lines().count()).unwrap_or(u64::MAX);
        self.fresh = false;
        self.proofs_left = 0;
        self.blamed.clear();
        let Some(mut view) = self.view.take() else { return };
        for (name, after) in chains {
            let in_force = match after {
                After::Gone => {
                    view.ours.remove(&name);
                    None
                }
                After::Empty => {
                    view.ours.insert(name.clone(), Vec::new());
                    None
                }
                After::Holds(chain, hashes) => {
                    view.ours.insert(name.clone(), hashes.iter().copied().map(Some).collect());
                    Some(chain)
                }
            };
            let kernel = view.ours.get(&name);
            let as_wanted = match self.content(&name) {
                Content::Rules(wanted) => kernel.is_some_and(|kernel| wanted.is_in(kernel)),
                Content::AsIs => true,
                Content::Empty => kernel.is_none_or(Vec::is_empty),
                Content::Absent => kernel.is_none(),
            };
            if as_wanted {
                self.dirty.remove(&name);
                self.previous.remove(&name);
            } else if let Some(chain) = in_force {
                self.previous.insert(name, chain);
            } else {
                self.previous.remove(&name);
            }
        }
        for (name, rules) in hooks {
            let as_wanted = self.hooks.get(&name).is_none_or(|wanted| wanted.are_in(&rules, self.setup.insert_mode));
            if as_wanted {
                self.dirty_hooks.remove(&name);
            }
            self.fights.repaired(&name, now, self.checks.refresh);
            view.shared.insert(name, rules);
        }
        self.view = Some(view);
    }
}
