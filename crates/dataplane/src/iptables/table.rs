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
//! Here is what is wanted and what comes next; `reading` has what is believed, `writing` the transactions, `rivals`
//! what others do, [`super::hold`] what is refused.
//!
//! The table is read at the start, after any failure, when distrusted, when the refresh interval is over, and
//! at growing intervals after a write; not before each write. The reads without a cause are for the background
//! ([`TableDriver::take_sweep`]): one that fails or is given up changes nothing. Of chains that somebody else is
//! known to have changed only these are read.

mod loosening;
mod reading;
mod rivals;
mod writing;

use std::collections::{BTreeMap, BTreeSet};
use std::mem;
use std::sync::Arc;
use std::time::{Duration, Instant};

use program::{Chain, ChainName, Table, TableChanges, TableId};
use tracing::info;

use super::features::Features;
use super::fight::Fights;
use super::hash::RuleHash;
use super::hold::{BlockedSets, Chances, Held};
use super::parse::{Entry, Numbered, View};
use super::plan::{Setup, Wanted, WantedHooks, probe_input};
use super::refusal::Hunt;
use crate::driver::{Driver, Next};
use crate::error::DriverError;
use crate::nftables::{Process, ReadRule, Touched};
use crate::retry::Backoff;

/// When a table is read without a cause.
#[derive(Clone, Copy, Debug)]
pub struct Checks {
    /// Time between comparisons with the kernel.
    pub refresh: Option<Duration>,
    /// Pause between a write and the first look after it.
    pub after_write: Duration,
}

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

    /// Returns whether the table was read once and must be read again, in whole or in part, with nothing in the way.
    pub fn is_in_doubt(&self) -> bool {
        let is_doubted = self.view.is_none() || !self.doubtful.is_empty();
        is_doubted && self.read_at.is_some() && matches!(self.step, Step::Rest) && self.backoff.due().is_none()
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

    pub(super) fn content(&self, name: &str) -> Content<'_> {
        match (self.held.get(name), self.chains.get(name)) {
            (Some(Held { instead: Some(instead), .. }), _) => Content::Rules(instead),
            (Some(Held { instead: None, .. }), _) => Content::AsIs,
            (None, Some(wanted)) => Content::Rules(wanted),
            (None, None) if self.undeletable.contains(name) => Content::Empty,
            (None, None) => Content::Absent,
        }
    }

    pub(super) fn label(&self) -> String {
        label(self.id)
    }
}

/// `filter/4`, as reports call a table.
pub fn label(id: TableId) -> String {
    format!("{}/{}", id.table.as_str(), id.family.digit())
}
