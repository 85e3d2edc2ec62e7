//! A kernel in memory, for the dataplane's drivers: tables that execute restore input, sets, routes,
//! neighbours, interfaces and settings, and whatever may go wrong with them.
//!
//! [`SimKernel::connect`] gives an agent its [`dataplane::Kernel`]. Only one agent is connected at a time: a new
//! connection cuts the former, whose requests have no effect from then on. That is how a crash looks from here.
//!
//! Every operation is a step. Before a step somebody else may edit the kernel; the step may be slow, fail, lose
//! its answer, or be the agent's last ([`Rates`]). After each change the [`Observer`] looks at the [`State`].
//! All decisions come from one seed and time is the runtime's: with a paused clock, one seed is one history.
//!
//! What the kernel has is also there as a [`interpret::Kernel`]: rules are recognised by their hashes among
//! those that were [announced](State::announce), so that packets can be judged at any moment.
#![allow(clippy::expect_used, clippy::unwrap_used, clippy::indexing_slicing, reason = "for tests")]

pub mod faults;
mod foreign;
mod routes;
mod rules;
pub mod sets;
pub mod tables;
mod transports;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Waker;

use dataplane::iptables::Features;

use dataplane::iptables::hash::{APPENDS_SUFFIX, rule_hashes};
use dataplane::iptables::parse::is_our_chain;
use dataplane::routes::{KernelRoute, Neighbour, News, RouteKey, RouteNews};
use dataplane::{Options, Touched, Variant};
use model::{Family, Name};
use program::{Action, BaseChain, Chain, ChainName, Changes, Hooks, Rule, SetName, Table, TableId};

use crate::interpret::{self, Bits};
use faults::{Faults, Rates};
pub use routes::Link;
use rules::Line;
use sets::Set;
use tables::{Chains, Quirks, base_chains};

/// Which table of which variant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TableKey {
    pub variant: Variant,
    pub family: Family,
    pub table: Table,
}

/// What an operation of the agent changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Changed {
    Table(TableKey),
    Set,
    Route(Family),
    Neighbour,
    Setting,
}

/// Looks at every state that the agent makes.
pub trait Observer: fmt::Debug + Send {
    fn after(&mut self, state: &State, changed: Changed);
}

/// Numbers about a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Operations, reads too.
    pub steps: u64,
    /// Operations that changed something or were meant to, except for settings.
    pub writes: u64,
    /// Settings that were written.
    pub settings: u64,
    pub faults: u64,
    /// Those that met requests about sets.
    pub set_faults: u64,
    pub edits: u64,
}

/// Everything that the kernel has.
#[derive(Debug)]
pub struct State {
    /// What [`dataplane::iptables::Backend::choose`] finds.
    pub variant: Variant,
    pub quirks: Quirks,
    /// Sets can be listed without their members, and chains read one by one.
    pub is_modern: bool,
    /// What others do is told, or it is told that something was lost. They leave sets alone, of which nothing is told.
    pub tells_all: bool,
    pub tables: BTreeMap<TableKey, Chains>,
    pub sets: BTreeMap<String, Set>,
    pub routes: BTreeMap<Family, Vec<(RouteKey, KernelRoute)>>,
    pub neighbours: BTreeSet<Neighbour>,
    pub links: BTreeMap<Name, Link>,
    /// Addresses with tracked flows, and the interface that these lead to.
    pub flows: BTreeMap<IpAddr, u32>,
    /// No address may be routed to another interface while there are flows to the former one. Only where nothing goes
    /// wrong: an agent that died, or does not get flows removed, cannot see to that.
    pub guards_flows: bool,
    pub settings: BTreeMap<String, String>,
    pub counts: Counts,
    pub faults: Faults,
    /// Somebody else has changed what is ours, and it is not known to be repaired.
    pub is_tainted: bool,
    /// The agent died at an operation.
    pub has_crashed: bool,
    /// Woken when the agent dies: that may be in a task of its own.
    pub undertaker: Option<Waker>,
    view: interpret::Kernel,
    known: HashMap<Box<str>, Arc<Rule>>,
    complaints: Vec<String>,
    /// What the agent has not heard yet of what others did to routes and neighbours.
    news: Vec<News>,
    is_listened_to: bool,
    listener: Option<Waker>,
    /// The same for tables.
    table_news: Vec<(TableKey, Touched)>,
    table_listeners: Vec<Waker>,
    observer: Option<Box<dyn Observer>>,
    /// The set that the agent is reading bit by bit: it can be neither destroyed nor exchanged.
    in_reading: Option<String>,
    /// Number of the connection whose requests are heard.
    connection: u64,
    trace: u64,
}

/// See the [module documentation](self).
#[derive(Clone, Debug)]
pub struct SimKernel(Arc<Mutex<State>>);

impl SimKernel {
    /// An empty kernel on which nothing goes wrong until rates are set.
    #[must_use]
    pub fn new(seed: u64, variant: Variant, bits: Bits) -> Self {
        Self(Arc::new(Mutex::new(State {
            variant,
            quirks: Quirks::default(),
            is_modern: true,
            tells_all: false,
            in_reading: None,
            tables: BTreeMap::new(),
            sets: BTreeMap::new(),
            routes: BTreeMap::new(),
            neighbours: BTreeSet::new(),
            links: BTreeMap::new(),
            flows: BTreeMap::new(),
            guards_flows: false,
            settings: routes::settings(),
            counts: Counts::default(),
            faults: Faults::new(seed, Rates::default()),
            is_tainted: false,
            has_crashed: false,
            undertaker: None,
            view: interpret::Kernel::new(bits),
            known: HashMap::new(),
            complaints: Vec::new(),
            news: Vec::new(),
            is_listened_to: false,
            listener: None,
            table_news: Vec::new(),
            table_listeners: Vec::new(),
            observer: None,
            connection: 0,
            trace: 0xcbf2_9ce4_8422_2325,
        })))
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives a new agent its kernel and cuts off the one before.
    #[must_use]
    pub fn connect(&self, options: &Options) -> dataplane::Kernel {
        let connection = {
            let mut state = self.state();
            state.connection += 1;
            state.has_crashed = false;
            state.in_reading = None;
            state.is_listened_to = false;
            state.listener = None;
            state.table_news.clear();
            state.table_listeners.clear();
            state.connection
        };
        transports::kernel(self, connection, options)
    }
}

impl State {
    pub fn observe(&mut self, observer: Box<dyn Observer>) {
        self.observer = Some(observer);
    }

    /// The packet filter as packets meet it now.
    pub const fn view(&self) -> &interpret::Kernel {
        &self.view
    }

    /// Says which rules an agent is about to write, so that they are recognised by their hashes.
    pub fn announce(&mut self, changes: &Changes) {
        let features = Features::default();
        let mut learn = |chain: &str, rules: &[Rule]| {
            for (rule, hash) in rules.iter().zip(rule_hashes(chain, rules, &features)) {
                self.known.entry(hash.as_str().into()).or_insert_with(|| Arc::new(rule.clone()));
            }
        };
        for table in changes.tables.values() {
            for chain in table.chains.values().flatten() {
                learn(chain.name.as_str(), &chain.rules);
            }
            for (base, hooks) in &table.hooks {
                learn(base.as_str(), &hooks.inserts);
                learn(&format!("{}{APPENDS_SUFFIX}", base.as_str()), &hooks.appends);
            }
        }
    }

    /// Chains of ours and rules in them, over all tables of both variants.
    pub fn size_of_ours(&self) -> (usize, usize) {
        let ours = self.tables.values().flat_map(|table| table.chains.iter()).filter(|(name, _)| is_our_chain(name));
        ours.fold((0, 0), |(chains, rules), (_, lines)| (chains + 1, rules + lines.len()))
    }

    /// A digest of everything that has happened.
    pub const fn trace(&self) -> u64 {
        self.trace
    }

    /// Takes something into the digest.
    pub fn note(&mut self, what: &str) {
        for byte in what.bytes() {
            self.trace = (self.trace ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }

    /// What the agent did that it must never do: to what belongs to others. Nothing of it the next time.
    pub fn take_complaints(&mut self) -> Vec<String> {
        std::mem::take(&mut self.complaints)
    }

    fn complain(&mut self, text: String) {
        self.complaints.push(text);
    }

    /// Tells the agent what somebody else did, or that something was lost on the way.
    fn tell(&mut self, news: News) {
        if !self.is_listened_to {
            return;
        }
        if self.faults.fault().is_some() {
            self.news.clear();
            self.news.push(News::Lost);
        } else {
            self.news.push(news);
        }
        if let Some(listener) = self.listener.take() {
            listener.wake();
        }
    }

    fn tell_route(&mut self, family: Family, key: RouteKey, route: KernelRoute, gone: bool, by: u32) {
        self.tell(News::Route(RouteNews { family, key, route, gone, by }));
    }

    fn tell_table(&mut self, key: TableKey, chains: &[Box<str>]) {
        let touched = match (self.faults.fault().is_some(), self.tells_all) {
            // Lost without a trace: only a look at the table finds it.
            (true, false) => return,
            (true, true) => Touched::All,
            // Of these no more is told than that they changed.
            (false, _) if key.variant == Variant::Legacy => Touched::All,
            (false, _) => Touched::Chains(chains.iter().cloned().collect()),
        };
        self.table_news.push((key, touched));
        self.table_listeners.drain(..).for_each(Waker::wake);
    }

    const fn edited(&mut self) {
        self.is_tainted = true;
    }

    fn changed(&mut self, changed: Changed) {
        if let Some(mut observer) = self.observer.take() {
            observer.after(self, changed);
            self.observer = Some(observer);
        }
    }

    // What packets meet.

    fn set_changed(&mut self, name: &str) {
        let Some(known) = SetName::new(name) else { return };
        match self.sets.get(name) {
            Some(set) => self.view.put_set(known, set.kind, set.family, set.members.clone()),
            None => self.view.remove_set(&known),
        }
    }

    fn view_chain(&mut self, id: TableId, name: &str) {
        let key = TableKey { variant: self.variant, family: id.family, table: id.table };
        let lines = self.tables.get(&key).and_then(|table| table.chains.get(name)).cloned();
        if base_chains(id.table).contains(&name) {
            let base = [
                BaseChain::Prerouting,
                BaseChain::Input,
                BaseChain::Forward,
                BaseChain::Output,
                BaseChain::Postrouting,
            ];
            let Some(base) = base.into_iter().find(|base| base.as_str() == name) else { return };
            let inserts = lines.iter().flat_map(|lines| lines.iter()).filter_map(|line| self.meaning(line)).collect();
            self.view.put_hooks(id, base, Hooks { inserts, appends: Vec::new() });
            return;
        }
        let Some(name) = ChainName::new(name) else { return };
        let chain = lines.map(|lines| {
            let rules = lines.iter().filter_map(|line| self.meaning(line)).collect();
            Arc::new(Chain { name: name.clone(), rules })
        });
        self.view.put_chain(id, name, chain);
    }

    fn view_everything(&mut self) {
        let chains: Vec<(TableKey, Box<str>)> = self
            .tables
            .iter()
            .filter(|(key, _)| key.variant == self.variant)
            .flat_map(|(key, table)| table.chains.keys().map(|name| (*key, name.clone())))
            .collect();
        for (key, name) in chains {
            self.view_chain(TableId { family: key.family, table: key.table }, &name);
        }
        let sets: Vec<String> = self.sets.keys().cloned().collect();
        sets.iter().for_each(|name| self.set_changed(name));
    }

    /// What a rule does, if it was announced or is plain. Other rules are those of others: they stop nothing.
    fn meaning(&self, line: &Line) -> Option<Rule> {
        if let Some(rule) = line.hash.as_ref().and_then(|hash| self.known.get(hash)) {
            return Some(Rule::clone(rule));
        }
        match line.target.as_deref() {
            Some("DROP") => Some(Rule::new(Vec::new(), Action::Drop)).filter(|_| line.is_bare()),
            Some("RETURN") => Some(Rule::new(Vec::new(), Action::Return)).filter(|_| line.is_bare()),
            Some("ACCEPT") => Some(Rule::new(Vec::new(), Action::Accept)).filter(|_| line.is_bare()),
            _ => None,
        }
    }
}
