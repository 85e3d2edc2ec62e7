//! What may become of packets while the agent works: looks at every state of the kernel that the agent makes.
//!
//! A window holds every program that was handed over since one was last in force. What none of them lets through
//! must not get through at any moment in between. Three things are told apart:
//!
//! - a packet that some program of the window lets through may pass;
//! - one that none lets through, but the rules of one would with the members of sets of another, may pass as well,
//!   because rules and sets cannot be changed in one step (netfilter.md 19.2, "members added / removed"); it is
//!   counted. Between two programs, if no set was failed at, members come before the rules change and go after that,
//!   or when the tables have failed for longer than members wait for them;
//! - any other packet that passes is a violation.
//!
//! What a report says to be in force must be: all chains, hooks and sets of the program. Where the kernel refuses some
//! rules for good, the program is what it says but for the policies and profiles with such rules, which are closed.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use dataplane::iptables::parse::is_our_chain;
use dataplane::iptables::plan::PROBE_CHAIN;
use dataplane::{ChainInsertMode, clock};
use model::Family;
use program::{Action, ChainName, Changes, Match, Member, Rule, SetName, Table, TableId};
use testkit::interpret::{Bits, Fate, Fault, Kernel, Passage, Way};
use testkit::kernel::{Changed, Observer, State, TableKey};
use testkit::world::{Dice, Domain, PREFIX, Trip, UPLINK};
use verdict::Packet;

/// Protocol of our routes, by default (`RTPROT_BOOT`).
pub(crate) const OURS: u8 = 3;

/// Packets under observation.
const PROBES: usize = 12;
/// Programs in a window; beyond it nothing is judged until one is in force.
const MOST_STATES: usize = 6;
/// Sets that may be old or new; beyond it a packet may be anything.
const MOST_VARYING: usize = 5;

/// So long at least, surplus members wait for tables that fail (`dataplane::apply`).
const PATIENCE: Duration = Duration::from_millis(700);

#[derive(Clone, Debug)]
struct Probe {
    trip: Trip,
    to_host: bool,
    /// Its source is not the sender's.
    is_spoofed: bool,
    is_allowed: bool,
    is_mixed: bool,
    /// As the one before, if nothing went wrong since a program was in force.
    is_in_transit: bool,
}

#[derive(Debug)]
struct Window {
    bits: Bits,
    domain: Domain,
    dice: Dice,
    probes: Vec<Probe>,
    /// Programs since one was in force, that one first.
    states: Vec<Kernel>,
    /// The last program as it was handed over.
    program: Option<Kernel>,
    /// Chains of the last program that are closed because the kernel refuses their rules.
    refused: BTreeSet<(TableId, ChainName)>,
    /// The kernel refuses rules that ask for a type of ICMP.
    lacks_icmp: bool,
    /// Faults that met requests about sets, up to when a program was last in force.
    set_faults: u64,
    /// When the last program was handed over.
    began: Instant,
    was_in_force: bool,
    /// Chains of ours that were there when the agent started.
    found: BTreeSet<(TableId, Box<str>)>,
    findings: Vec<String>,
    judged: u64,
    forbidden: u64,
    strictly: u64,
    mixed: u64,
}

/// Numbers about what was looked at.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Judged {
    /// Packets sent through states of the kernel.
    pub(crate) packets: u64,
    /// Of these, ones that had to be dropped.
    pub(crate) forbidden: u64,
    /// Of these, ones between two programs with nothing that went wrong.
    pub(crate) strictly: u64,
    /// Of the forbidden ones, those that passed because rules and sets change one after the other.
    pub(crate) mixed: u64,
}

/// See the [module documentation](self).
#[derive(Clone, Debug)]
pub(crate) struct Probes(Arc<Mutex<Window>>);

impl Probes {
    pub(crate) fn new(seed: u64, bits: Bits, domain: Domain, lacks_icmp: bool) -> Self {
        let mut dice = Dice::new(seed ^ 0x5eed);
        let probe = |dice: &mut Dice| Probe {
            trip: domain.trip(dice),
            to_host: dice.one_in(6),
            is_spoofed: dice.one_in(3),
            is_allowed: true,
            is_mixed: true,
            is_in_transit: true,
        };
        let probes = (0..PROBES).map(|_| probe(&mut dice)).collect();
        Self(Arc::new(Mutex::new(Window {
            bits,
            domain,
            dice,
            probes,
            states: Vec::new(),
            program: None,
            refused: BTreeSet::new(),
            lacks_icmp,
            set_faults: 0,
            began: clock::now(),
            was_in_force: false,
            found: BTreeSet::new(),
            findings: Vec::new(),
            judged: 0,
            forbidden: 0,
            strictly: 0,
            mixed: 0,
        })))
    }

    /// The same eyes for another kernel.
    pub(crate) fn alone(&self) -> Self {
        let window = self.window();
        Self::new(0, window.bits, window.domain.clone(), window.lacks_icmp)
    }

    fn window(&self) -> MutexGuard<'_, Window> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A program is about to be handed over: the agent's first one, which is complete, or a change of the last.
    pub(crate) fn hand_over(&self, changes: &Changes, is_first: bool) -> Result<(), String> {
        self.window().hand_over(changes, is_first)
    }

    /// An agent starts on what an earlier one left.
    pub(crate) fn start(&self, state: &State) {
        let ours = state.tables.iter().filter(|(key, _)| key.variant == state.variant).flat_map(|(key, table)| {
            let id = TableId { family: key.family, table: key.table };
            table.chains.keys().filter(|name| is_our_chain(name)).map(move |name| (id, name.clone()))
        });
        self.window().found = ours.collect();
    }

    /// What was handed over last is in force.
    pub(crate) fn in_force(&self, state: &State) {
        self.window().in_force(state);
    }

    /// Whether a line of a report tells of a chain that is rightly closed.
    pub(crate) fn is_rightly_closed(&self, line: &str) -> bool {
        let window = self.window();
        window.refused.iter().any(|(_, name)| line.starts_with(&format!("chain {name} is closed: rule ")))
    }

    /// The kernel refuses rules of the program.
    pub(crate) fn is_refused(&self) -> bool {
        !self.window().refused.is_empty()
    }

    /// What the kernel does not have of the last program, or not where it belongs.
    pub(crate) fn lacks(&self, state: &State, mode: ChainInsertMode) -> Vec<String> {
        let window = self.window();
        let Some(program) = window.states.last() else { return vec!["a program".to_owned()] };
        let mut lacks = state.view().lacks_of(program);
        for ((id, base), hooks) in program.hooks() {
            let key = TableKey { variant: state.variant, family: id.family, table: id.table };
            let rules = state.tables.get(&key).and_then(|table| table.chains.get(base.as_str()));
            let is_ours: Vec<bool> =
                rules.into_iter().flat_map(|rules| rules.iter()).map(|it| it.hash.is_some()).collect();
            let (inserts, appends) = (hooks.inserts.len(), hooks.appends.len());
            let (first, last) = match mode {
                ChainInsertMode::Insert => (inserts, appends),
                ChainInsertMode::Append => (0, inserts + appends),
            };
            let in_place = |is_ours: &bool| *is_ours;
            if is_ours.len() < first + last
                || !is_ours.iter().take(first).all(in_place)
                || !is_ours.iter().rev().take(last).all(in_place)
            {
                lacks.push(format!("hooks of {id:?} {base:?} are not where they belong: {is_ours:?}"));
            }
        }
        lacks
    }

    /// What is wrong, and nothing of it the next time.
    pub(crate) fn take_findings(&self) -> Vec<String> {
        std::mem::take(&mut self.window().findings)
    }

    pub(crate) fn judged(&self) -> Judged {
        let window = self.window();
        Judged { packets: window.judged, forbidden: window.forbidden, strictly: window.strictly, mixed: window.mixed }
    }
}

impl Observer for Probes {
    fn after(&mut self, state: &State, changed: Changed) {
        self.window().after(state, changed);
    }
}

impl Window {
    fn hand_over(&mut self, changes: &Changes, is_first: bool) -> Result<(), String> {
        let mut next = match self.program.take() {
            Some(last) if !is_first => last,
            _ => Kernel::new(self.bits),
        };
        next.apply(changes).map_err(|fault| fault.to_string())?;
        self.program = Some(next.clone());
        self.refused = if self.lacks_icmp { close_refused(&mut next) } else { BTreeSet::new() };
        self.states.push(next);
        self.began = clock::now();
        if self.states.len() <= MOST_STATES {
            self.judge_last();
        }
        Ok(())
    }

    /// Says which packets may pass now that there is one more program.
    fn judge_last(&mut self) {
        let Some(last) = self.states.last() else { return };
        for probe in &mut self.probes {
            probe.is_allowed |= passes(last, probe);
        }
        let (varying, states) = (self.varying(), &self.states);
        if states.len() < 2 {
            return;
        }
        let crossings = crossings(states);
        for probe in &mut self.probes {
            if crossings.iter().any(|crossing| passes(crossing, probe)) {
                (probe.is_mixed, probe.is_in_transit) = (true, true);
                continue;
            }
            probe.is_mixed = probe.is_allowed || may_pass_mixed(states, &varying, probe);
            probe.is_in_transit = match &states[..] {
                [old, new] => {
                    let before = varied(old, old, new);
                    let after = varied(new, new, old);
                    probe.is_allowed || may_pass(old, &before, probe) || may_pass(new, &after, probe)
                }
                _ => probe.is_mixed,
            };
        }
    }

    /// Sets whose members differ between the programs: all that any has, and what all have.
    fn varying(&self) -> Varying {
        let mut all: BTreeMap<SetName, Vec<&BTreeSet<Member>>> = BTreeMap::new();
        for state in &self.states {
            for (name, members) in state.sets() {
                all.entry(name.clone()).or_default().push(members);
            }
        }
        let mut varying = BTreeMap::new();
        for (name, versions) in all {
            let Some(first) = versions.first() else { continue };
            if versions.len() == self.states.len() && versions.iter().all(|members| members == first) {
                continue;
            }
            let any = versions.iter().flat_map(|members| members.iter().copied()).collect();
            let mut common: BTreeSet<Member> = BTreeSet::clone(first);
            common.retain(|member| versions.iter().all(|members| members.contains(member)));
            // One that is made or goes may be empty on the way.
            if versions.len() < self.states.len() {
                common.clear();
            }
            varying.insert(name, [any, common]);
        }
        varying
    }

    fn in_force(&mut self, state: &State) {
        self.was_in_force = true;
        self.set_faults = state.counts.set_faults;
        let Some(last) = self.states.pop() else { return };
        self.states.clear();
        if !state.is_tainted {
            let lacks = state.view().lacks_of(&last);
            self.findings.extend(lacks.into_iter().map(|lack| format!("said to be in force, but {lack}")));
        }
        // Other packets, now and then: a window is a good moment to look elsewhere.
        for probe in &mut self.probes {
            if self.dice.one_in(4) {
                probe.trip = self.domain.trip(&mut self.dice);
                probe.to_host = self.dice.one_in(6);
                probe.is_spoofed = self.dice.one_in(3);
            }
            probe.is_allowed = passes(&last, probe);
            probe.is_mixed = probe.is_allowed;
            probe.is_in_transit = probe.is_allowed;
        }
        self.states.push(last);
    }

    fn after(&mut self, state: &State, changed: Changed) {
        if state.is_tainted {
            // Somebody else let packets through; whatever is open now is not the agent's work.
            return;
        }
        match changed {
            Changed::Table(key) => self.count_chains(state, key),
            Changed::Route(family) => self.follow_routes(state, family),
            Changed::Set | Changed::Neighbour | Changed::Setting => {}
        }
        let matters = matches!(changed, Changed::Table(_) | Changed::Set);
        if !self.was_in_force || !matters || self.states.len() > MOST_STATES {
            return;
        }
        let is_orderly = self.states.len() == 2
            && state.counts.set_faults == self.set_faults
            && clock::now() < self.began + PATIENCE;
        if is_orderly {
            self.follow_members(state, changed);
        }
        for probe in &self.probes {
            self.judged += 1;
            if probe.is_allowed {
                continue;
            }
            self.forbidden += 1;
            self.strictly += u64::from(is_orderly);
            match fate(state.view(), probe) {
                Ok(Fate::Dropped) => continue,
                Ok(Fate::Accepted | Fate::Left) => {}
                Err(fault) => {
                    self.findings.push(format!("after {changed:?}, a packet cannot be walked: {fault}"));
                    continue;
                }
            }
            if if is_orderly { probe.is_in_transit } else { probe.is_mixed } {
                self.mixed += 1;
                continue;
            }
            let Probe { trip, to_host, is_spoofed, .. } = probe;
            let programs = self.states.len();
            let mut finding = format!(
                "after {changed:?}: {trip:?}, to the host: {to_host}, spoofed: {is_spoofed}, passes, though none of {programs} programs lets it"
            );
            if self.findings.is_empty() {
                for (number, program) in self.states.iter().enumerate() {
                    let differences = state.view().lacks_of(program).join("\n");
                    finding += &format!("\nwhat is not as in program {number}:\n{differences}");
                }
            }
            self.findings.push(finding);
        }
    }
}

impl Window {
    /// Nothing but old, new and the one chain that rules are tried in (U5.d).
    fn count_chains(&mut self, state: &State, key: TableKey) {
        let id = TableId { family: key.family, table: key.table };
        let Some(table) = state.tables.get(&key).filter(|_| key.variant == state.variant) else { return };
        for name in table.chains.keys().filter(|name| is_our_chain(name) && ***name != *PROBE_CHAIN) {
            let is_known = self.found.contains(&(id, name.clone()))
                || ChainName::new(name).is_some_and(|name| self.states.iter().any(|state| state.has_chain(id, &name)));
            if !is_known {
                self.findings.push(format!("chain {name} of {id:?} is of no program and was not there before"));
            }
        }
    }

    /// Members that come are there before the rules change, members that go stay until then (netfilter.md 19.1).
    fn follow_members(&mut self, state: &State, changed: Changed) {
        let [old, new] = &self.states[..] else { return };
        let view = state.view();
        let of = |name: &SetName| if name.as_str().starts_with("cali4") { Family::V4 } else { Family::V6 };
        let lacks =
            |name: &SetName, members: &BTreeSet<Member>| view.members(name).is_none_or(|now| !members.is_subset(now));
        let finding = match changed {
            Changed::Table(key) => new
                .sets()
                .find(|(name, members)| of(name) == key.family && lacks(name, members))
                .map(|(name, _)| format!("{key:?} was written before {name} had all members")),
            Changed::Set | Changed::Route(_) | Changed::Neighbour | Changed::Setting => old
                .sets()
                .find(|(name, members)| lacks(name, members) && !view.has_rules_of(new, of(name)))
                .map(|(name, _)| format!("{name} lost members before the rules changed")),
        };
        self.findings.extend(finding);
    }

    /// No way leads to a workload before its filter is there.
    fn follow_routes(&mut self, state: &State, family: Family) {
        for (key, route) in state.routes.get(&family).into_iter().flatten() {
            let link = state.links.iter().find(|(_, link)| link.index == route.index);
            let Some((to, _)) = link.filter(|(name, _)| name.starts_with(PREFIX)) else { continue };
            if route.protocol != OURS {
                continue;
            }
            let destination = key.destination.addr();
            let source = if family == Family::V4 { IpAddr::from([192, 0, 2, 9]) } else { IpAddr::from([9; 16]) };
            let packet = Packet::new(source, destination, 6).with_ports(1, 1);
            let probe = Probe {
                trip: Trip { from: UPLINK.into(), to: to.clone(), packet },
                to_host: false,
                is_spoofed: false,
                is_allowed: false,
                is_mixed: false,
                is_in_transit: false,
            };
            let is_judged = fate(state.view(), &probe).is_ok_and(|fate| fate != Fate::Left);
            if !is_judged {
                self.findings.push(format!("a route to {destination} on {to}, but no filter in front of it"));
            }
        }
    }
}

/// Closes what holds rules that the kernel refuses; they are in policies and profiles only.
fn close_refused(program: &mut Kernel) -> BTreeSet<(TableId, ChainName)> {
    let asks = |rule: &Rule| rule.matches.iter().any(|it| matches!(it, Match::Icmp { .. }));
    program.close_chains(&Rule::new(Vec::new(), Action::Drop), |id, chain| {
        id.family == Family::V4 && chain.rules.iter().any(asks)
    })
}

/// What cannot be walked does not pass.
fn passes(kernel: &Kernel, probe: &Probe) -> bool {
    fate(kernel, probe).is_ok_and(|fate| fate != Fate::Dropped)
}

fn fate(kernel: &Kernel, probe: &Probe) -> Result<Fate, Fault> {
    let Trip { from, to, packet } = &probe.trip;
    let passage = Passage {
        way: if probe.to_host { Way::ToHost } else { Way::Forward },
        from,
        to: if probe.to_host { "" } else { to },
        packet: *packet,
        mark: 0,
        reverse_path_failed: probe.is_spoofed,
        translated: false,
        local: &[],
    };
    kernel.walk(passage).map(|journey| journey.fate)
}

/// Known and not programmed: where a change of the raw table lets some more packets through and others no longer
/// (`allowSourcePrefixes` that come and go in one batch), the whole table waits for the filter, so that for a moment the
/// old raw table stands before the new filter.
fn crossings(states: &[Kernel]) -> Vec<Kernel> {
    let mut crossings = Vec::new();
    for (at, new) in states.iter().enumerate() {
        for old in states.iter().take(at) {
            if old.has_more_rules_than(new, Table::Raw) && new.has_more_rules_than(old, Table::Raw) {
                crossings.push(new.with_table_of(old, Table::Raw));
            }
        }
    }
    crossings
}

/// Sets and two kinds of members that each may have, independently of the others.
type Varying = BTreeMap<SetName, [BTreeSet<Member>; 2]>;

fn may_pass_mixed(states: &[Kernel], varying: &Varying, probe: &Probe) -> bool {
    states.iter().any(|state| may_pass(state, varying, probe))
}

/// What the sets that the rules of `rules` name may hold while these are in force: their own members, and those of
/// both programs.
fn varied(rules: &Kernel, one: &Kernel, other: &Kernel) -> Varying {
    let mut varying = Varying::new();
    for (name, members) in rules.sets() {
        let of =
            |program: &Kernel| program.sets().find(|(known, _)| *known == name).map(|(_, members)| members.clone());
        if let (Some(one), Some(other)) = (of(one), of(other))
            && one != other
        {
            varying.insert(name.clone(), [members.clone(), one.union(&other).copied().collect()]);
        }
    }
    varying
}

/// Whether the packet passes the rules of a program with some choice of members.
fn may_pass(state: &Kernel, varying: &Varying, probe: &Probe) -> bool {
    let packet = &probe.trip.packet;
    let relevant: Vec<(&SetName, &[BTreeSet<Member>; 2])> = varying
        .iter()
        .filter(|(_, [one, other])| {
            let meets = |members: &BTreeSet<Member>| {
                [packet.source, packet.destination].map(|address| members.iter().any(|member| covers(member, address)))
            };
            let has_port =
                |members: &BTreeSet<Member>| members.iter().any(|it| matches!(it, Member::AddressPort { .. }));
            meets(one) != meets(other) || has_port(one) || has_port(other)
        })
        .collect();
    if relevant.len() > MOST_VARYING {
        return true;
    }
    let mut mixture = state.clone();
    (0..1_usize << relevant.len()).any(|choice| {
        for (bit, (name, versions)) in relevant.iter().enumerate() {
            mixture.replace_members(name, versions[choice >> bit & 1].clone());
        }
        passes(&mixture, probe)
    })
}

fn covers(member: &Member, address: IpAddr) -> bool {
    match member {
        Member::Address(member) | Member::AddressPort { address: member, .. } => *member == address,
        Member::Net(net) => net.contains(&address),
    }
}
