//! Chains that do not get their wanted contents, and why (netfilter.md 10.7; I4, I8).
//!
//! The part of the table driver that deals with refused transactions and with sets that could not be
//! written. Invariant: a policy or profile that cannot be in force as wanted is closed; any other chain
//! keeps its former contents or, if it has none, is closed; a chain that hooks lead to is never closed,
//! because that would cut the host off. Everything else goes in.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use program::{Action, Chain, Direction, Origin, Rule, SetName, Table};
use tracing::{error, info, warn};

use super::parse::View;
use super::plan::Wanted;
use super::refusal::{Complaint, Hunt, Place, Suspect, essence};
use super::table::{Content, Step, TableDriver, TableResponse, Transaction};
use crate::driver::Driver as _;
use crate::error::DriverError;

/// Refused rules that one apply looks for before it leaves the rest to the next attempt.
const MAX_REFUSALS_PER_APPLY: u32 = 32;

/// Sets that could not be written, and whether that is because they are too large.
pub type BlockedSets = BTreeMap<SetName, bool>;

/// When refused rules are tried again the first time: what refused them may have been a passing lack of memory.
const SECOND_CHANCE: Duration = Duration::from_secs(180);

/// Longest pause between such attempts.
const LAST_CHANCE: Duration = Duration::from_secs(3600);

/// When refused rules are tried again.
#[derive(Debug)]
pub(super) struct Chances {
    pub(super) due: Option<Instant>,
    pause: Duration,
}

impl Default for Chances {
    fn default() -> Self {
        Self { due: None, pause: SECOND_CHANCE }
    }
}

/// Why a chain does not have the wanted contents.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) why: Why,
    /// What it has instead; `None` keeps what the kernel has.
    pub(super) instead: Option<Wanted>,
}

#[derive(Debug)]
pub(super) enum Why {
    Refused { rule: usize, message: String },
    SetUnwritten(SetName),
}

impl TableDriver {
    /// Starts an apply. `blocked_sets` are the sets of this family that could not be written: chains that
    /// name them and are not in the kernel as wanted must wait; chains that name one that is too large are closed,
    /// also those that are in force.
    pub fn begin(&mut self, blocked_sets: &BlockedSets) {
        self.refusals = 0;
        self.fresh = false;
        let known = std::mem::replace(&mut self.blocked_sets, blocked_sets.clone());
        let too_large = |set: &SetName| blocked_sets.get(set) == Some(&true) && known.get(set) != Some(&true);
        if blocked_sets.keys().any(too_large) {
            let names_one = |wanted: &Wanted| wanted.chain.rules.iter().flat_map(Rule::sets).any(too_large);
            for (name, _) in self.chains.iter().filter(|(_, wanted)| names_one(wanted)) {
                self.dirty.insert(name.clone());
                if self.held.get(name).is_some_and(|held| held.instead.is_none()) {
                    self.held.remove(name);
                }
            }
        }
        let blocked = &self.blocked_sets;
        let dirty = &mut self.dirty;
        let previous = &mut self.previous;
        self.held.retain(|name, held| match &held.why {
            Why::SetUnwritten(set) if !blocked.contains_key(set) => {
                let written = dirty.insert(name.clone());
                if let (true, Some(instead)) = (written, &held.instead) {
                    previous.insert(name.clone(), Arc::clone(&instead.chain));
                }
                false
            }
            Why::SetUnwritten(_) | Why::Refused { .. } => true,
        });
    }

    fn has_refused(&self) -> bool {
        self.held.values().any(|held| matches!(held.why, Why::Refused { .. }))
    }

    /// Sees to it that refused rules are tried again some time: nobody else would say that the reason is gone.
    pub(super) fn plan_second_chance(&mut self, now: Instant) {
        if !self.has_refused() {
            if matches!(self.step, Step::Rest) && self.dirty.is_empty() {
                self.chances = Chances::default();
            }
        } else if self.chances.due.is_none() {
            self.chances.due = Some(now + self.chances.pause);
            self.chances.pause = self.chances.pause.saturating_mul(2).min(LAST_CHANCE);
        }
    }

    /// Takes up chains with refused rules, if it is time.
    pub(super) fn give_second_chance(&mut self, now: Instant) {
        if self.chances.due.is_none_or(|due| due > now) {
            return;
        }
        self.chances.due = None;
        let (dirty, previous) = (&mut self.dirty, &mut self.previous);
        self.held.retain(|name, held| {
            let is_refused = matches!(held.why, Why::Refused { .. });
            if is_refused
                && dirty.insert(name.clone())
                && let Some(instead) = &held.instead
            {
                previous.insert(name.clone(), Arc::clone(&instead.chain));
            }
            !is_refused
        });
    }

    /// What is closed or held back, one line each.
    pub fn held(&self) -> Vec<String> {
        let lines = self.held.iter().map(|(name, held)| {
            let state = if held.instead.is_some() { "closed" } else { "unchanged" };
            match &held.why {
                Why::Refused { rule, message } => {
                    format!("chain {name} is {state}: rule {} refused: {message}", self.describe(name, *rule))
                }
                Why::SetUnwritten(set) => format!("chain {name} is {state}: set {set} could not be written"),
            }
        });
        lines.collect()
    }

    /// A chain that was to stay as it is and has changed is taken up anew.
    pub(super) fn release_what_is_not_as_it_was(&mut self, view: &View) {
        let stay = self.held.iter().filter(|(_, held)| held.instead.is_none()).map(|(name, _)| name.clone());
        for name in stay.collect::<Vec<_>>() {
            if !self.has_former_contents(&name, view) {
                self.previous.remove(&name);
                self.held.remove(&name);
            }
        }
    }

    /// Decides what a refused transaction means: a wrong idea of the kernel (read and try again), a chain
    /// that cannot go (leave it empty), a rule that cannot be (look for it), or nothing that we can help.
    pub(super) fn take_complaint(
        &mut self,
        transaction: &Transaction,
        complaint: Complaint,
        rejected: DriverError,
    ) -> Result<(), DriverError> {
        let lines = match complaint {
            Complaint::LockBusy => return Err(DriverError::LockBusy { program: program_of(rejected) }),
            Complaint::SetMissing(set) => return Err(DriverError::SetMissing { program: program_of(rejected), set }),
            Complaint::Lines(lines) => lines,
            Complaint::Other => Vec::new(),
        };
        if !self.fresh {
            info!(table = self.label(), error = %rejected, "restore refused, reading the table again");
            self.distrust();
            return Ok(());
        }
        let places: Vec<_> = lines.iter().map(|line| Place::of(&transaction.text, *line)).collect();
        let undeletable: Vec<_> = places
            .iter()
            .filter_map(|place| if let Place::DeleteChain(name) = place { Some(*name) } else { None })
            .collect();
        if !undeletable.is_empty() {
            warn!(table = self.label(), chains = ?undeletable, "chains of ours stay, emptied: foreign rules refer to them");
            let new = undeletable.into_iter().map(Box::from).filter(|name| !self.undeletable.contains(name));
            let new: Vec<Box<str>> = new.collect();
            if new.is_empty() {
                return Err(rejected);
            }
            self.undeletable.extend(new);
            // The first of two transactions may have gone in.
            self.distrust();
            return Ok(());
        }
        let exact: Vec<_> = places.iter().filter_map(|place| self.suspect(place)).collect();
        let hunt =
            if exact.is_empty() { Hunt::by_halves(self.all_suspects(&transaction.text)) } else { Hunt::each(exact) };
        if hunt.probe().is_none() {
            return Err(rejected);
        }
        self.step = Step::Hunting(hunt, rejected);
        Ok(())
    }

    pub(super) fn take_probe(
        &mut self,
        mut hunt: Hunt,
        cause: DriverError,
        response: TableResponse,
    ) -> Result<(), DriverError> {
        match response {
            TableResponse::Done(_) | TableResponse::Listed(_) | TableResponse::NotLoaded | TableResponse::Chains(_) => {
                hunt.answer(None)
            }
            TableResponse::Refused { stderr, .. } => match Complaint::read(&stderr, 0) {
                Complaint::LockBusy => return Err(DriverError::LockBusy { program: program_of(cause) }),
                Complaint::SetMissing(set) => {
                    return Err(DriverError::SetMissing { program: program_of(cause), set });
                }
                Complaint::Lines(_) | Complaint::Other => hunt.answer(Some(essence(&stderr))),
            },
            TableResponse::Broken(error) => return Err(error),
        }
        if hunt.probe().is_some() {
            self.step = Step::Hunting(hunt, cause);
            return Ok(());
        }
        // Whatever the outcome: the failed write and the probes leave nothing to believe.
        self.distrust();
        let blamed: Vec<_> = if hunt.exact { hunt.suspects().to_vec() } else { Vec::new() };
        let mut found = hunt.into_found();
        if found.is_empty() {
            found = self.blame(blamed, &cause);
        }
        if found.is_empty() {
            return Err(cause);
        }
        for (suspect, message) in found {
            self.refuse(&suspect, message)?;
        }
        if self.refusals >= MAX_REFUSALS_PER_APPLY { Err(cause) } else { Ok(()) }
    }

    /// A rule that the program blames by line again and again is refused even if it passes by itself: it may be
    /// unacceptable only where it stands.
    fn blame(&mut self, suspects: Vec<Suspect>, cause: &DriverError) -> Vec<(Suspect, String)> {
        let mut found = Vec::new();
        for suspect in suspects {
            let times = self.blamed.entry(suspect.chain.clone()).or_default();
            *times += 1;
            if *times > 1 {
                found.push((suspect, cause.to_string()));
            }
        }
        found
    }

    fn suspect(&self, place: &Place<'_>) -> Option<Suspect> {
        let Place::Rule { chain, hash } = place else { return None };
        let Content::Rules(wanted) = self.content(chain) else { return None };
        let rule = wanted.hashes.iter().position(|have| have == hash)?;
        Some(Suspect { chain: (*chain).into(), rule })
    }

    /// Every rule that the transaction writes into chains of ours.
    fn all_suspects(&self, text: &str) -> Vec<Suspect> {
        text.lines().filter_map(|line| self.suspect(&Place::of(line, 1))).collect()
    }

    pub(super) fn rule(&self, suspect: &Suspect) -> Option<&Rule> {
        match self.content(&suspect.chain) {
            Content::Rules(wanted) => wanted.chain.rules.get(suspect.rule),
            Content::AsIs | Content::Empty | Content::Absent => None,
        }
    }

    /// Takes a chain with a refused rule out of the way: a policy or profile is closed, any other chain keeps
    /// its former contents or, if it has none, is closed too; a chain that hooks lead to is never closed,
    /// because that would cut the host off.
    fn refuse(&mut self, suspect: &Suspect, message: String) -> Result<(), DriverError> {
        let Suspect { chain: name, rule } = suspect;
        self.refusals += 1;
        let instead = self.instead(name).ok_or_else(|| DriverError::RuleRefused {
            table: self.label(),
            chain: name.to_string(),
            rule: self.describe(name, *rule),
            message: message.clone(),
        })?;
        error!(
            table = self.label(),
            chain = %name,
            rule = %self.describe(name, *rule),
            message,
            closed = instead.is_some(),
            "rule refused by the kernel or its tool"
        );
        self.dirty.insert(name.clone());
        self.held.insert(name.clone(), Held { why: Why::Refused { rule: *rule, message }, instead });
        Ok(())
    }

    /// Returns what a chain is to hold when its wanted contents cannot be written: `Some(None)` is what it
    /// holds now. `None` if there is nothing safe.
    fn instead(&self, name: &str) -> Option<Option<Wanted>> {
        let wanted = self.chains.get(name)?;
        let closed = || {
            // The nat table neither lets through nor stops anything, and DROP is refused there.
            let rules =
                if self.id.table == Table::Nat { Vec::new() } else { vec![Rule::new(Vec::new(), Action::Drop)] };
            let chain = Chain { name: wanted.chain.name.clone(), rules };
            Some(Some(Wanted::new(Arc::new(chain), &self.setup.features)))
        };
        if wanted.chain.rules.iter().any(|rule| rule.origin.is_some()) {
            return closed();
        }
        let stands = self.previous.contains_key(name)
            && self.view.as_ref().is_none_or(|view| self.has_former_contents(name, view));
        if stands {
            return Some(None);
        }
        let hooked = self.hooks.values().flat_map(|hooks| hooks.hooks().inserts.iter().chain(&hooks.hooks().appends));
        if hooked.filter_map(Rule::target).any(|target| target.as_str() == name) { None } else { closed() }
    }

    /// Returns whether a chain holds what was in force before the wanted contents. Somebody may have changed it,
    /// and that is not to be kept.
    fn has_former_contents(&self, name: &str, view: &View) -> bool {
        let former = self.previous.get(name).map(|chain| Wanted::new(Arc::clone(chain), &self.setup.features));
        former.zip(view.ours.get(name)).is_some_and(|(former, kernel)| former.is_in(kernel))
    }

    /// Holds dirty chains that name a set which could not be written, or a chain that nobody wants.
    pub(super) fn hold_what_cannot_be_written(&mut self) -> Result<(), String> {
        let Some(view) = &self.view else { return Ok(()) };
        let mut hold = Vec::new();
        for name in &self.dirty {
            let (None, Some(wanted)) = (self.held.get(name), self.chains.get(name)) else { continue };
            let rules = || wanted.chain.rules.iter();
            let too_large = rules().flat_map(Rule::sets).find(|set| self.blocked_sets.get(*set) == Some(&true));
            if too_large.is_none() && view.ours.get(name).is_some_and(|kernel| wanted.is_in(kernel)) {
                continue;
            }
            let blocked = || rules().flat_map(Rule::sets).find(|set| self.blocked_sets.contains_key(*set));
            if let Some(set) = too_large.or_else(blocked) {
                // Former contents first, even for policies: the set is ours to get right, not the policy's; see
                // below for when that is not good enough. One that is too large will not get right: what relies
                // on it is closed (users.md U3.b).
                let former = (too_large.is_none() && self.has_former_contents(name, view)).then_some(None);
                let instead = former.or_else(|| self.instead(name)).ok_or_else(|| {
                    format!("chain {name} waits for set {set}, which could not be written, and cannot be closed")
                })?;
                hold.push((name.clone(), Held { why: Why::SetUnwritten(set.clone()), instead }));
            } else if let Some(rule) =
                rules().position(|rule| rule.target().is_some_and(|target| !self.chains.contains_key(target.as_str())))
            {
                let message = "refers to a chain that is not there".to_owned();
                let instead = self.instead(name).ok_or_else(|| format!("chain {name} {message}"))?;
                error!(table = self.label(), chain = %name, rule = %self.describe(name, rule), message);
                hold.push((name.clone(), Held { why: Why::Refused { rule, message }, instead }));
            }
        }
        self.held.extend(hold);
        self.close_what_must_not_stay();
        Ok(())
    }

    /// Closes policies and profiles that were to keep their former contents while other chains get new ones: the two
    /// together may let through what neither the former program nor the new one lets through. Alone they may stay.
    fn close_what_must_not_stay(&mut self) {
        let Some(view) = &self.view else { return };
        let kept = self.kept();
        let changes = |name: &str| {
            let is_closed = self.held.get(name).is_some_and(|held| held.instead.is_some());
            let content = self.content(name);
            !is_closed
                && !kept.contains(name)
                && matches!(content, Content::Rules(new) if view.ours.get(name).is_none_or(|old| !new.is_in(old)))
        };
        if !self.dirty.iter().any(|name| changes(name)) {
            return;
        }
        let stays = |held: &Held| matches!((&held.why, &held.instead), (Why::SetUnwritten(_), None));
        let names: Vec<Box<str>> =
            self.held.iter().filter(|(_, held)| stays(held)).map(|(name, _)| name.clone()).collect();
        for name in names {
            let instead = self.instead(&name).flatten();
            if let (Some(held), Some(instead)) = (self.held.get_mut(&name), instead) {
                held.instead = Some(instead);
            }
        }
    }

    /// Chains that stay as they are: the held ones without a substitute, and unwanted ones that those refer to.
    pub(super) fn kept(&self) -> BTreeSet<Box<str>> {
        let held = self.held.iter().filter(|(_, held)| held.instead.is_none()).map(|(name, _)| name.clone());
        let mut todo: Vec<Box<str>> = held.collect();
        let mut kept = BTreeSet::new();
        while let Some(name) = todo.pop() {
            let targets = self.previous.get(&name).into_iter().flat_map(|chain| chain.targets());
            let unwanted = targets.filter(|target| !self.chains.contains_key(target.as_str()));
            todo.extend(unwanted.map(|target| Box::from(target.as_str())).filter(|target| !kept.contains(target)));
            kept.insert(name);
        }
        // Rules that are still to be removed may lead to any chain that is to go.
        if let Some(view) = self.view.as_ref().filter(|_| self.has_numbered_rules_to_remove()) {
            kept.extend(view.ours.keys().filter(|name| matches!(self.content(name), Content::Absent)).cloned());
        }
        kept
    }

    /// `<policy> <direction> rule <n>` if the rule comes from an object in the datastore, else its position.
    fn describe(&self, chain: &str, rule: usize) -> String {
        let origin = self.chains.get(chain).and_then(|wanted| wanted.chain.rules.get(rule)?.origin.as_ref());
        match origin {
            Some(Origin::Policy { key, direction, index }) => {
                format!("policy {key} {} rule {index}", direction_word(*direction))
            }
            Some(Origin::Profile { name, direction, index }) => {
                format!("profile {name} {} rule {index}", direction_word(*direction))
            }
            None => format!("{chain} {}", rule + 1),
        }
    }
}

pub(super) const fn direction_word(direction: Direction) -> &'static str {
    match direction {
        Direction::Ingress => "ingress",
        Direction::Egress => "egress",
    }
}

fn program_of(error: DriverError) -> String {
    if let DriverError::Rejected { program, .. } = error { program } else { "restore".to_owned() }
}
