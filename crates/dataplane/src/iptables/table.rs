//! One table of one family: brings our chains and hooks to what is wanted (netfilter.md 16).
//!
//! Fed with [`TableChanges`] and with answers of the save and restore programs; asks for listings and for
//! transactions. Does no I/O.
//!
//! | Invariant | How |
//! |---|---|
//! | I3 | without a complete listing nothing is written; a failed one takes all belief away |
//! | I4 | a chain that names a set which could not be written keeps its last contents, or is closed |
//! | I5 | only differences are written; nothing different, nothing asked |
//! | I6 | see [`super::parse`] |
//! | I8 | a refused rule closes its policy or profile and nothing else |
//!
//! The table is read at the start, after any failure, when distrusted, when the refresh interval is over, and
//! at growing intervals after a write; not before each write. The reads without a cause are for the background
//! ([`TableDriver::take_sweep`]): one that fails or is given up changes nothing. Of chains that somebody else is
//! known to have changed only these are read.

use std::collections::{BTreeMap, BTreeSet};
use std::mem;
use std::sync::Arc;
use std::time::{Duration, Instant};

use program::{Action, Chain, ChainName, Rule, Table, TableChanges, TableId};
use tracing::{info, warn};

use super::features::Features;
use super::fight::Fights;
use super::hash::RuleHash;
use super::hold::{BlockedSets, Chances, Held};
use super::parse::{Entry, Numbered, View, is_our_chain, parse};
use super::plan::{Edit, HookEdit, PROBE_CHAIN, Setup, Wanted, WantedHooks, probe_input, restore_input};
use super::refusal::{Complaint, Hunt, essence};
use crate::driver::{Driver, Next};
use crate::error::DriverError;
use crate::nftables::{Process, ReadRule, Touched};
use crate::options::Variant;
use crate::retry::Backoff;

/// Pause before the first look after a write, however short it is configured.
const SHORTEST_CHECK: Duration = Duration::from_millis(50);

/// Looks after a write end when their pause reaches this.
const LONGEST_CHECK: Duration = Duration::from_secs(3600);

/// When a table is read without a cause.
#[derive(Clone, Copy, Debug)]
pub struct Checks {
    /// Time between comparisons with the kernel.
    pub refresh: Option<Duration>,
    /// Pause between a write and the first look after it.
    pub after_write: Duration,
}

/// A table is listed for good after so many times that a proof made do for it.
const PROOFS: u32 = 20;

/// Chains that one line of the log names.
const MAX_NAMES_IN_LOG: usize = 20;

/// What the driver asks the programs to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TableRequest {
    /// List the table. With `if_loaded`, only if the kernel has it already: listing a legacy table makes it.
    Save { table: Table, if_loaded: bool },
    /// List these chains only.
    Chains { table: Table, names: Vec<Box<str>> },
    /// Feed this to the restore program.
    Restore(Arc<str>),
    /// Remove these rules of the table by their numbers.
    Remove { table: Table, rules: Vec<Numbered> },
}

/// What came back.
#[derive(Debug)]
pub enum TableResponse {
    /// The program succeeded and printed this.
    Done(String),
    /// The table was read without the program.
    Listed(View),
    /// The rules of each chain, in the order of the request; a chain that is not there has none.
    Chains(Vec<Vec<ReadRule>>),
    /// The kernel does not have the table, so it was not listed.
    NotLoaded,
    /// The program refused. `lines_before`: how many lines it had been given before this request.
    Refused { program: String, status: i32, stderr: String, lines_before: u32 },
    /// The program did not start, or did not end in time; what it did is unknown.
    Broken(DriverError),
}

/// What the driver did since it was last asked.
#[derive(Debug, Default)]
pub struct TableStats {
    /// Restore transactions that went in.
    pub writes: u64,
    pub reads: u64,
    /// Lines of restore input that went in.
    pub lines: u64,
    /// Chains that somebody else had changed and that were or will be put right.
    pub repaired: u64,
    /// Why something could not be written, beside what `handle` returned.
    pub errors: Vec<String>,
}

/// Something that somebody else did to a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ForeignChange {
    pub table: Table,
    pub what: Touched,
    /// Who did it, if that can be told.
    pub by: Option<Process>,
    /// It may be that nothing was done: the table is to be looked at when there is time.
    pub is_doubtful: bool,
}

/// Rules above ours that one line of the log quotes.
const MAX_RULES_IN_LOG: usize = 5;

/// The driver of one table.
#[derive(Debug)]
pub struct TableDriver {
    pub(super) id: TableId,
    pub(super) setup: Setup,
    pub(super) checks: Checks,
    pub(super) backoff: Backoff,
    /// Why the last attempt failed.
    pub(super) reason: String,

    pub(super) chains: BTreeMap<Box<str>, Wanted>,
    pub(super) hooks: BTreeMap<Box<str>, WantedHooks>,
    /// Contents that were in force until the wanted ones, for chains whose new contents are not written.
    pub(super) previous: BTreeMap<Box<str>, Arc<Chain>>,
    /// Chains that have other contents than wanted, on purpose.
    pub(super) held: BTreeMap<Box<str>, Held>,
    pub(super) chances: Chances,
    /// Chains that something foreign refers to, so that they stay.
    pub(super) undeletable: BTreeSet<Box<str>>,
    pub(super) blocked_sets: BlockedSets,

    /// What the kernel is believed to hold.
    pub(super) view: Option<View>,
    /// The view was read in this apply, and nothing was written since.
    pub(super) fresh: bool,
    /// Everything wanted was in force at some time.
    pub(super) settled_once: bool,
    /// How many chains the log says to differ since the start.
    difference_said: Option<usize>,
    pub(super) read_at: Option<Instant>,
    /// Why the last listing in the background was of no use.
    unchecked: Option<String>,
    /// How many more times a proof that nothing has changed makes do for a listing.
    proofs_left: u32,
    /// When the next look after a write is due, and how long it waited.
    pub(super) check: Option<(Instant, Duration)>,
    /// Chains that somebody else has changed.
    doubtful: BTreeSet<Box<str>>,
    /// Who did that last.
    rival: Option<Process>,
    fights: Fights,
    /// Base chains in which something else is wanted since the last plan.
    hooks_wanted: BTreeSet<Box<str>>,
    /// Reads without a cause are done when asked what is next; otherwise they are left to the background.
    sweeping: bool,
    pub(super) dirty: BTreeSet<Box<str>>,
    pub(super) dirty_hooks: BTreeSet<Box<str>>,
    /// Rules whose replacements are in force.
    removals: Vec<Numbered>,

    pub(super) step: Step,
    /// Times in a row that a rule was blamed by line but passed when tried by itself.
    pub(super) blamed: BTreeMap<Box<str>, u32>,
    pub(super) refusals: u32,
    pub(super) stats: TableStats,
}

#[derive(Debug)]
pub(super) enum Step {
    Rest,
    Reading,
    ReadingChains(Vec<Box<str>>),
    Writing(Transaction),
    Removing,
    Hunting(Hunt, DriverError),
}

/// A write on its way.
#[derive(Debug)]
pub(super) struct Transaction {
    pub(super) text: Arc<str>,
    /// What each chain holds afterwards; `None` if it is gone.
    pub(super) chains: Vec<(Box<str>, After)>,
    pub(super) hooks: Vec<(Box<str>, Vec<Entry>)>,
    /// Rules to remove afterwards.
    removals: Vec<Numbered>,
}

/// What a chain holds after a write.
#[derive(Debug)]
pub(super) enum After {
    Gone,
    Empty,
    Holds(Arc<Chain>, Hashes),
}

type Hashes = Box<[RuleHash]>;

/// What a chain is to hold.
pub(super) enum Content<'a> {
    Rules(&'a Wanted),
    /// What it holds already.
    AsIs,
    /// Nothing, because something foreign refers to it.
    Empty,
    Absent,
}

impl Driver for TableDriver {
    type Change = TableChanges;
    type Request = TableRequest;
    type Response = TableResponse;

    fn want(&mut self, change: TableChanges) {
        let TableChanges { chains, hooks } = change;
        for (name, chain) in chains {
            self.want_chain(&name, chain);
        }
        for (base, hooks) in hooks {
            let name: Box<str> = base.as_str().into();
            self.hooks.insert(name.clone(), WantedHooks::new(base, hooks, &self.setup.features));
            self.hooks_wanted.insert(name.clone());
            self.dirty_hooks.insert(name);
        }
    }

    fn distrust(&mut self) {
        self.view = None;
        self.proofs_left = 0;
        self.removals.clear();
        self.fresh = false;
        self.doubtful.clear();
    }

    fn next(&mut self, now: Instant) -> Next<TableRequest> {
        match &self.step {
            Step::Hunting(hunt, _) => {
                let Some(probe) = hunt.probe() else { return Next::Idle };
                let rules = probe.iter().filter_map(|suspect| self.rule(suspect));
                return Next::Do(TableRequest::Restore(probe_input(&self.setup, rules).into()));
            }
            Step::Rest => {}
            Step::Reading | Step::ReadingChains(_) | Step::Writing(_) | Step::Removing => {
                // The answer never came: anything may have happened.
                self.step = Step::Rest;
                self.distrust();
            }
        }
        if let Some(until) = self.backoff.due().filter(|until| *until > now) {
            return Next::NotBefore(until);
        }
        if self.view.is_some() && !self.removals.is_empty() {
            return self.remove_numbered();
        }
        self.give_second_chance(now);
        if self.view.is_none() || (self.sweeping && self.reading_due().is_some_and(|(due, _)| due <= now)) {
            self.step = Step::Reading;
            return Next::Do(self.save());
        }
        if !self.doubtful.is_empty() {
            let names: Vec<_> = std::mem::take(&mut self.doubtful).into_iter().collect();
            self.step = Step::ReadingChains(names.clone());
            return Next::Do(TableRequest::Chains { table: self.id.table, names });
        }
        if self.wants_listing_for_a_fight() {
            self.step = Step::Reading;
            return Next::Do(self.save());
        }
        for chain in self.fights.calm_down(now, self.checks.refresh) {
            info!(table = self.label(), chain = %chain, "nobody displaces our rules any more");
        }
        match self.plan(now) {
            Ok(None) => {
                self.backoff.succeeded();
                self.settled_once = true;
                self.remove_numbered()
            }
            Ok(Some(transaction)) => {
                let request = TableRequest::Restore(Arc::clone(&transaction.text));
                self.step = Step::Writing(transaction);
                Next::Do(request)
            }
            Err(reason) => {
                self.stats.errors.push(reason.clone());
                self.reason = reason;
                self.backoff.failed(now);
                self.backoff.due().map_or(Next::Idle, Next::NotBefore)
            }
        }
    }

    fn handle(&mut self, response: TableResponse, now: Instant) -> Result<(), DriverError> {
        let outcome = match mem::replace(&mut self.step, Step::Rest) {
            Step::Rest => Ok(()),
            Step::Reading => self.take_listing(response, now),
            Step::ReadingChains(names) => self.take_chains(&names, response, now),
            Step::Writing(transaction) => self.take_verdict(transaction, response, now),
            Step::Removing => self.take_removal(response),
            Step::Hunting(hunt, cause) => self.take_probe(hunt, cause, response),
        };
        if let Err(error) = &outcome {
            self.distrust();
            self.reason = error.full_text();
            self.backoff.failed(now);
        }
        self.plan_second_chance(now);
        outcome
    }
}

impl TableDriver {
    /// Makes a driver that knows nothing about the kernel. With nothing wanted it removes what is ours.
    pub fn new(id: TableId, setup: Setup, checks: Checks) -> Self {
        Self {
            id,
            setup,
            checks,
            backoff: Backoff::default(),
            reason: String::new(),
            chains: BTreeMap::new(),
            hooks: BTreeMap::new(),
            previous: BTreeMap::new(),
            held: BTreeMap::new(),
            chances: Chances::default(),
            undeletable: BTreeSet::new(),
            blocked_sets: BlockedSets::new(),
            view: None,
            fresh: false,
            settled_once: false,
            difference_said: None,
            read_at: None,
            unchecked: None,
            proofs_left: 0,
            check: None,
            doubtful: BTreeSet::new(),
            rival: None,
            fights: Fights::default(),
            hooks_wanted: BTreeSet::new(),
            sweeping: true,
            dirty: BTreeSet::new(),
            dirty_hooks: BTreeSet::new(),
            removals: Vec::new(),
            step: Step::Rest,
            blamed: BTreeMap::new(),
            refusals: 0,
            stats: TableStats::default(),
        }
    }

    pub fn id(&self) -> TableId {
        self.id
    }

    /// Makes the next attempt due at once, because what it waited for may have come.
    pub fn hurry(&mut self, now: Instant) {
        self.backoff.hurry(now);
    }

    /// Attempts in a row that failed.
    pub fn failures(&self) -> u32 {
        self.backoff.failures()
    }

    /// Returns whether the kernel holds everything wanted, as far as we know; chains that are held back on
    /// purpose do not count as wanted.
    pub fn is_settled(&self) -> bool {
        self.view.is_some()
            && self.backoff.due().is_none()
            && self.doubtful.is_empty()
            // What is fought over is as good as it gets.
            && self.dirty_hooks.iter().all(|name| self.fights.chains().any(|chain| chain == &**name))
            && self.removals.is_empty()
            && (self.dirty.is_empty() || self.dirty.is_subset(&self.kept()))
    }

    /// Returns whether everything wanted was in force at some time since the start.
    pub fn was_settled(&self) -> bool {
        self.settled_once
    }

    /// Returns whether rules in the kernel may still name sets that are no longer wanted: something is
    /// unwritten or keeps its former contents.
    pub fn may_name_old_sets(&self) -> bool {
        !self.is_settled() || self.held.values().any(|held| held.instead.is_none())
    }

    /// Returns whether a hook is wanted in a base chain.
    pub fn wants_hook(&self, base: &str) -> bool {
        self.hooks.get(base).is_some_and(|hooks| !hooks.is_empty())
    }

    /// When the driver wants to be asked again, and why.
    pub fn due(&self) -> Option<(Instant, &'static str)> {
        [self.next_attempt(), self.reading_due()].into_iter().flatten().min_by_key(|(at, _)| *at)
    }

    /// When something must be written that could not be before, and why that waits.
    pub fn next_attempt(&self) -> Option<(Instant, &'static str)> {
        let retry = self.backoff.due().map(|at| (at, "retry of a table"));
        let fought = self.dirty_hooks.iter().filter_map(|name| self.fights.repair_at(name)).min();
        let fought = fought.map(|at| (at, "repair of a chain that is fought over"));
        let chance = self.chances.due.map(|at| (at, "another attempt to write refused rules"));
        [retry, fought, chance].into_iter().flatten().min_by_key(|(at, _)| *at)
    }

    /// When the table wants to be read in the background; `None` if it is to be read anyway.
    pub fn sweep_due(&self) -> Option<Instant> {
        let at_rest = matches!(self.step, Step::Rest) && self.view.is_some() && self.doubtful.is_empty();
        self.reading_due().filter(|_| at_rest).map(|(at, _)| at)
    }

    /// Leaves reads without a cause to the background, or not.
    pub fn set_sweeping(&mut self, sweeping: bool) {
        self.sweeping = sweeping;
    }

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

    /// Takes note of what somebody else did. Returns whether it concerns us, so that it must be looked at.
    pub fn doubt(&mut self, change: &ForeignChange, now: Instant) -> bool {
        if change.is_doubtful {
            let pause = SHORTEST_CHECK;
            self.check = Some(self.check.map_or((now, pause), |(at, pause)| (at.min(now), pause)));
            return false;
        }
        let concerns = match &change.what {
            Touched::All => {
                self.distrust();
                true
            }
            Touched::Chains(names) => {
                let ours: Vec<_> = names.iter().filter(|name| self.knows(name)).cloned().collect();
                let before = self.doubtful.len();
                if self.view.is_some() {
                    self.doubtful.extend(ours);
                }
                self.doubtful.len() > before
            }
        };
        if concerns {
            self.rival.clone_from(&change.by);
        }
        concerns
    }

    /// Whether changes of the chain concern us: it is ours, a base chain, or foreign with a rule of ours in it.
    fn knows(&self, name: &str) -> bool {
        is_our_chain(name)
            || super::base_chain(name).is_some()
            || self.view.as_ref().is_some_and(|view| view.shared.contains_key(name))
    }

    /// Base chains in which somebody else keeps displacing our rules.
    pub fn fighting(&self) -> Vec<String> {
        self.fights.chains().map(str::to_owned).collect()
    }

    /// Why the next attempt is needed, if the last one failed.
    pub fn failing(&self) -> Option<&str> {
        self.backoff.due().map(|_| self.reason.as_str())
    }

    /// Number of wanted chains and of rules in them and in hooks.
    pub fn size(&self) -> (usize, usize) {
        let hooks = self.hooks.values().map(|hooks| hooks.hooks().inserts.len() + hooks.hooks().appends.len());
        let rules = self.chains.values().map(|wanted| wanted.hashes.len());
        (self.chains.len(), rules.sum::<usize>() + hooks.sum::<usize>())
    }

    pub fn take_stats(&mut self) -> TableStats {
        mem::take(&mut self.stats)
    }

    /// Takes new features: they change texts and thus hashes.
    pub fn set_features(&mut self, features: Features) {
        if self.setup.features == features {
            return;
        }
        self.setup.features = features;
        for wanted in self.chains.values_mut() {
            *wanted = Wanted::new(Arc::clone(&wanted.chain), &features);
        }
        for (name, hooks) in &mut self.hooks {
            if let Some(base) = super::base_chain(name) {
                *hooks = WantedHooks::new(base, hooks.hooks().clone(), &features);
            }
        }
        self.held.clear();
        self.distrust();
    }

    /// Returns whether the waiting changes let through packets that the rules in force do not, as far as a
    /// look at the single rules tells: an action that accepts or marks is new, or one that drops goes away.
    /// Such changes of a table that comes before the filter wait for the filter (netfilter.md 19.2).
    pub fn loosens(&self) -> bool {
        self.dirty.iter().any(|name| {
            let old = self.previous.get(name).map(|chain| chain.rules.as_slice());
            if old.is_none() && !self.settled_once {
                return false;
            }
            let old = old.unwrap_or_default();
            let new = self.chains.get(name).map(|wanted| wanted.chain.rules.as_slice()).unwrap_or_default();
            new.iter().any(|rule| admits(rule) && !old.contains(rule))
                || old.iter().any(|rule| rejects(rule) && !new.contains(rule))
        })
    }

    fn want_chain(&mut self, name: &ChainName, chain: Option<Arc<Chain>>) {
        let name: Box<str> = name.as_str().into();
        self.blamed.remove(&name);
        let mut in_force = match chain {
            Some(chain) => {
                let wanted = Wanted::new(chain, &self.setup.features);
                self.chains.insert(name.clone(), wanted)
            }
            None => self.chains.remove(&name),
        };
        // Changed contents get a new chance.
        if let Some(held) = self.held.remove(&name) {
            in_force = held.instead;
        }
        if !self.dirty.contains(&name)
            && let Some(in_force) = in_force
        {
            self.previous.insert(name.clone(), in_force.chain);
        }
        self.dirty.insert(name);
    }

    fn wants_nothing(&self) -> bool {
        self.chains.is_empty() && self.hooks.values().all(WantedHooks::is_empty)
    }

    fn reading_due(&self) -> Option<(Instant, &'static str)> {
        let refresh = self.read_at.zip(self.checks.refresh).map(|(at, pause)| (at + pause, "refresh of a table"));
        let check = self.check.map(|(at, _)| (at, "check of a table after a write"));
        [refresh, check].into_iter().flatten().min_by_key(|(at, _)| *at)
    }

    /// Looks after a write come at growing intervals: whoever overwrote us by accident did it soon
    /// (netfilter.md 16.7).
    fn expect_check(&mut self, now: Instant) {
        let first = self.checks.after_write.max(SHORTEST_CHECK);
        self.check = Some((now + first, first));
    }

    fn note_check(&mut self, now: Instant) {
        let Some((mut at, mut pause)) = self.check else { return };
        while at <= now {
            at += pause;
            pause = pause.saturating_mul(2);
        }
        self.check = (pause < LONGEST_CHECK).then_some((at, pause));
    }

    pub(super) fn content(&self, name: &str) -> Content<'_> {
        match (self.held.get(name), self.chains.get(name)) {
            (Some(Held { instead: Some(instead), .. }), _) => Content::Rules(instead),
            (Some(Held { instead: None, .. }), _) => Content::AsIs,
            (None, Some(wanted)) => Content::Rules(wanted),
            (None, None) if self.undeletable.contains(name) => Content::Empty,
            (None, None) => Content::Absent,
        }
    }

    // Reading.

    fn take_listing(&mut self, response: TableResponse, now: Instant) -> Result<(), DriverError> {
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
    fn listed(&self, response: TableResponse) -> Result<(View, String), DriverError> {
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
    fn failure(&self, response: TableResponse) -> DriverError {
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
    fn take_chains(&mut self, names: &[Box<str>], response: TableResponse, now: Instant) -> Result<(), DriverError> {
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
    fn compare(&mut self, view: View, listing: Option<&str>, now: Instant) {
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

    /// Counts the shared chains in which our rules are not where we have put them, and tells of fights.
    fn note_fights(&mut self, view: &View, hooks: &BTreeSet<Box<str>>, listing: Option<&str>, now: Instant) {
        if !self.settled_once {
            return;
        }
        for name in hooks {
            let ours_are_there = |entries: &Vec<Entry>| entries.iter().any(|entry| *entry != Entry::Foreign);
            let was_right = !self.dirty_hooks.contains(name) && self.hooks.contains_key(name);
            // Rules that are gone altogether were flushed, not displaced: that is put right as often as it happens.
            if was_right && view.shared.get(name).is_some_and(ours_are_there) {
                self.fights.displaced(name, now, self.checks.refresh);
            }
            if self.fights.is_news(name)
                && let Some(listing) = listing
            {
                self.fights.said(name);
                let rules = rules_above_ours(listing, name);
                let by = self
                    .rival
                    .as_ref()
                    .map_or_else(|| "unknown".to_owned(), |Process { pid, name }| format!("{name} ({pid})"));
                warn!(
                    event = "fighting",
                    table = self.label(),
                    chain = %name,
                    above = rules.join("; "),
                    by,
                    "somebody keeps displacing our rules; from now on they are put back once per refresh period"
                );
            }
        }
    }

    /// A fight is told of with the rules above ours, which only a listing shows.
    fn wants_listing_for_a_fight(&self) -> bool {
        self.dirty_hooks.iter().any(|name| self.fights.is_news(name))
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

    // Planning and writing.

    /// Returns the transaction that is needed, `None` if there is none, or why one is needed but impossible.
    fn plan(&mut self, now: Instant) -> Result<Option<Transaction>, String> {
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

    fn take_verdict(
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
    fn remove_numbered(&mut self) -> Next<TableRequest> {
        if self.removals.is_empty() {
            return Next::Idle;
        }
        self.step = Step::Removing;
        Next::Do(TableRequest::Remove { table: self.id.table, rules: self.removals.clone() })
    }

    pub(super) fn has_numbered_rules_to_remove(&self) -> bool {
        let shared = self.view.iter().flat_map(|view| &view.shared);
        let mut dirty = shared.filter(|(name, _)| self.dirty_hooks.contains(*name)).flat_map(|(_, entries)| entries);
        !self.removals.is_empty() || dirty.any(|entry| matches!(entry, Entry::Numbered { .. }))
    }

    /// The chains that the removed rules led to can go now; the next listing shows them.
    fn take_removal(&mut self, response: TableResponse) -> Result<(), DriverError> {
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

    pub(super) fn label(&self) -> String {
        label(self.id)
    }
}

/// `filter/4`, as reports call a table.
pub fn label(id: TableId) -> String {
    format!("{}/{}", id.table.as_str(), id.family.digit())
}

/// The first rules of a chain in a listing, up to the first of ours.
fn rules_above_ours(listing: &str, chain: &str) -> Vec<String> {
    let start = format!("-A {chain} ");
    let rules = listing.lines().filter_map(|line| line.strip_prefix(&start));
    let foreign = rules.take_while(|rule| !rule.contains("\"cali:") && !rule.contains("-j cali-"));
    foreign.take(MAX_RULES_IN_LOG).map(str::to_owned).collect()
}

fn tool_name(id: TableId) -> &'static str {
    match id.family {
        program::Family::V4 => "iptables",
        program::Family::V6 => "ip6tables",
    }
}

/// Whether the rule lets packets through or marks them for others to do so.
fn admits(rule: &Rule) -> bool {
    match &rule.action {
        Some(
            Action::Accept
            | Action::Return
            | Action::SetMark(_)
            | Action::SetMaskedMark { .. }
            | Action::NoTrack
            | Action::MarkWithinRate { .. },
        ) => true,
        Some(
            Action::Drop
            | Action::Reject
            | Action::Jump(_)
            | Action::Goto(_)
            | Action::ClearMark(_)
            | Action::Log { .. }
            | Action::NfLog { .. }
            | Action::RejectConnectionsAbove(_)
            | Action::Dnat { .. }
            | Action::Snat { .. }
            | Action::Masquerade { .. }
            | Action::Dscp(_),
        )
        | None => false,
    }
}

/// Whether the rule stops packets, now or by taking back a mark.
fn rejects(rule: &Rule) -> bool {
    matches!(
        rule.action,
        Some(Action::Drop | Action::Reject | Action::ClearMark(_) | Action::RejectConnectionsAbove(_))
    )
}
