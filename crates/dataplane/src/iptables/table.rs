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
//! at growing intervals after a write; not before each write.

use std::collections::{BTreeMap, BTreeSet};
use std::mem;
use std::sync::Arc;
use std::time::{Duration, Instant};

use program::{Action, Chain, ChainName, Rule, Table, TableChanges, TableId};
use tracing::{info, warn};

use super::features::Features;
use super::hash::RuleHash;
use super::hold::{BlockedSets, Held};
use super::parse::{Entry, Numbered, View, parse};
use super::plan::{Edit, HookEdit, PROBE_CHAIN, Setup, Wanted, WantedHooks, probe_input, restore_input};
use super::refusal::{Complaint, Hunt, essence};
use crate::driver::{Driver, Next};
use crate::error::DriverError;
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

/// Chains that one line of the log names.
const MAX_NAMES_IN_LOG: usize = 20;

/// What the driver asks the programs to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TableRequest {
    /// List the table. With `if_loaded`, only if the kernel has it already: listing a legacy table makes it.
    Save { table: Table, if_loaded: bool },
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
    /// When the next look after a write is due, and how long it waited.
    pub(super) check: Option<(Instant, Duration)>,
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
    Writing(Transaction),
    Removing,
    Hunting(Hunt, DriverError),
}

/// A write on its way.
#[derive(Debug)]
pub(super) struct Transaction {
    pub(super) text: Arc<str>,
    /// What each chain holds afterwards; `None` if it is gone.
    pub(super) chains: Vec<(Box<str>, Option<Hashes>)>,
    pub(super) hooks: Vec<(Box<str>, Vec<Entry>)>,
    /// Rules to remove afterwards.
    removals: Vec<Numbered>,
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
            self.dirty_hooks.insert(name);
        }
    }

    fn distrust(&mut self) {
        self.view = None;
        self.removals.clear();
        self.fresh = false;
    }

    fn next(&mut self, now: Instant) -> Next<TableRequest> {
        match &self.step {
            Step::Hunting(hunt, _) => {
                let Some(probe) = hunt.probe() else { return Next::Idle };
                let rules = probe.iter().filter_map(|suspect| self.rule(suspect));
                return Next::Do(TableRequest::Restore(probe_input(&self.setup, rules).into()));
            }
            Step::Rest => {}
            Step::Reading | Step::Writing(_) | Step::Removing => {
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
        if self.view.is_none() || self.reading_due().is_some_and(|(due, _)| due <= now) {
            self.step = Step::Reading;
            let if_loaded = self.setup.variant == Variant::Legacy && self.wants_nothing();
            return Next::Do(TableRequest::Save { table: self.id.table, if_loaded });
        }
        match self.plan() {
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
            Step::Writing(transaction) => self.take_verdict(transaction, response, now),
            Step::Removing => self.take_removal(response),
            Step::Hunting(hunt, cause) => self.take_probe(hunt, cause, response),
        };
        if let Err(error) = &outcome {
            self.distrust();
            self.reason = error.full_text();
            self.backoff.failed(now);
        }
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
            undeletable: BTreeSet::new(),
            blocked_sets: BlockedSets::new(),
            view: None,
            fresh: false,
            settled_once: false,
            difference_said: None,
            read_at: None,
            check: None,
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
            && self.dirty_hooks.is_empty()
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
        let retry = self.backoff.due().map(|at| (at, "retry of a table"));
        [retry, self.reading_due()].into_iter().flatten().min_by_key(|(at, _)| *at)
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
        let view = match response {
            TableResponse::Done(output) => parse(self.id.table, &output).map_err(|unreadable| {
                DriverError::Readback { program: self.save_program(), line: unreadable.line, reason: unreadable.reason }
            })?,
            TableResponse::Listed(view) => view,
            TableResponse::NotLoaded => View::default(),
            TableResponse::Refused { program, status, stderr, .. } => {
                return Err(DriverError::Rejected { program, status, line: None, stderr: essence(&stderr) });
            }
            TableResponse::Broken(error) => return Err(error),
        };
        if self.read_at.replace(now).is_none() {
            self.expect_check(now);
        }
        self.note_check(now);
        self.release_what_is_not_as_it_was(&view);
        self.compare(view);
        Ok(())
    }

    fn save_program(&self) -> String {
        format!("{}-{}-save", tool_name(self.id), self.setup.variant.as_str())
    }

    /// Finds out what differs, and says so if nobody but somebody else can have done it.
    fn compare(&mut self, view: View) {
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
        // A chain that is held as it is still waits.
        let waiting = self.dirty.iter().filter(|name| self.held.get(*name).is_some_and(|held| held.instead.is_none()));
        differing.extend(waiting.cloned());
        self.dirty = differing;
        self.dirty_hooks = differing_hooks;
        self.view = Some(view);
        self.fresh = true;
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
            warn!(table, count, chains = %names.join(" "), "foreign changes found, repairing");
        }
    }

    // Planning and writing.

    /// Returns the transaction that is needed, `None` if there is none, or why one is needed but impossible.
    fn plan(&mut self) -> Result<Option<Transaction>, String> {
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
                    chains.push((name.clone(), Some(new.hashes.clone())));
                }
                (Content::Absent, None) | (Content::Empty, None | Some([])) => unchanged.push(name.clone()),
                (Content::Absent, Some(_)) => {
                    edits.push(Edit::Delete { name });
                    chains.push((name.clone(), None));
                }
                (Content::Empty, Some(_)) => {
                    edits.push(Edit::Flush { name });
                    chains.push((name.clone(), Some(Box::default())));
                }
            }
        }
        let nothing = WantedHooks::default();
        let mut hook_edits = Vec::new();
        let mut hooks = Vec::new();
        let mut removals = Vec::new();
        let mut unchanged_hooks = Vec::new();
        for name in &self.dirty_hooks {
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
                self.commit(transaction);
                self.expect_check(now);
                Ok(())
            }
            TableResponse::Broken(error) => Err(error),
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
            TableResponse::Refused { program, status, stderr, .. } => {
                Err(DriverError::Rejected { program, status, line: None, stderr: essence(&stderr) })
            }
        }
    }

    fn commit(&mut self, transaction: Transaction) {
        let Transaction { text, chains, hooks, removals } = transaction;
        self.removals = removals;
        self.stats.writes += 1;
        self.stats.lines += u64::try_from(text.lines().count()).unwrap_or(u64::MAX);
        self.fresh = false;
        self.blamed.clear();
        let Some(view) = &mut self.view else { return };
        for (name, hashes) in chains {
            self.dirty.remove(&name);
            self.previous.remove(&name);
            match hashes {
                Some(hashes) => view.ours.insert(name, hashes.iter().copied().map(Some).collect()),
                None => view.ours.remove(&name),
            };
        }
        for (name, rules) in hooks {
            self.dirty_hooks.remove(&name);
            view.shared.insert(name, rules);
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
