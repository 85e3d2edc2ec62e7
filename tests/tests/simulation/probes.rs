//! What may become of packets while the agent works: looks at every state of the kernel that the agent makes.
//!
//! A window holds every program that was handed over since one was last in force. What none of them lets through
//! must not get through at any moment in between. Three things are told apart:
//!
//! - a packet that some program of the window lets through may pass;
//! - one that none lets through, but the rules of one would with the members of sets of another, may pass as well,
//!   because rules and sets cannot be changed in one step (netfilter.md 19.2, "members added / removed"); it is
//!   counted;
//! - any other packet that passes is a violation.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use dataplane::iptables::parse::is_our_chain;
use dataplane::iptables::plan::PROBE_CHAIN;
use model::Family;
use program::{ChainName, Changes, Member, SetName, TableId};
use testkit::interpret::{Bits, Fate, Kernel, Passage, Way};
use testkit::kernel::{Changed, Observer, State, TableKey};
use testkit::world::{Dice, Domain, PREFIX, Trip, UPLINK};
use verdict::Packet;

/// Protocol of our routes, by default (`RTPROT_BOOT`).
const OURS: u8 = 3;

/// Packets under observation.
const PROBES: usize = 12;
/// Programs in a window; beyond it nothing is judged until one is in force.
const MOST_STATES: usize = 6;
/// Sets that may be old or new; beyond it a packet may be anything.
const MOST_VARYING: usize = 5;

#[derive(Clone, Debug)]
struct Probe {
    trip: Trip,
    to_host: bool,
    is_allowed: bool,
    is_mixed: bool,
}

#[derive(Debug)]
struct Window {
    bits: Bits,
    domain: Domain,
    dice: Dice,
    probes: Vec<Probe>,
    /// Programs since one was in force, that one first.
    states: Vec<Kernel>,
    was_in_force: bool,
    /// Chains of ours that were there when the agent started.
    found: BTreeSet<(TableId, Box<str>)>,
    findings: Vec<String>,
    judged: u64,
    forbidden: u64,
    mixed: u64,
}

/// Numbers about what was looked at.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Judged {
    /// Packets sent through states of the kernel.
    pub(crate) packets: u64,
    /// Of these, ones that had to be dropped.
    pub(crate) forbidden: u64,
    /// Of these, ones that passed because rules and sets change one after the other.
    pub(crate) mixed: u64,
}

/// See the [module documentation](self).
#[derive(Clone, Debug)]
pub(crate) struct Probes(Arc<Mutex<Window>>);

impl Probes {
    pub(crate) fn new(seed: u64, bits: Bits, domain: Domain) -> Self {
        let mut dice = Dice::new(seed ^ 0x5eed);
        let probe = |dice: &mut Dice| Probe {
            trip: domain.trip(dice),
            to_host: dice.one_in(6),
            is_allowed: true,
            is_mixed: true,
        };
        let probes = (0..PROBES).map(|_| probe(&mut dice)).collect();
        Self(Arc::new(Mutex::new(Window {
            bits,
            domain,
            dice,
            probes,
            states: Vec::new(),
            was_in_force: false,
            found: BTreeSet::new(),
            findings: Vec::new(),
            judged: 0,
            forbidden: 0,
            mixed: 0,
        })))
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
    pub(crate) fn in_force(&self) {
        self.window().in_force();
    }

    /// What is wrong, and nothing of it the next time.
    pub(crate) fn take_findings(&self) -> Vec<String> {
        std::mem::take(&mut self.window().findings)
    }

    pub(crate) fn judged(&self) -> Judged {
        let window = self.window();
        Judged { packets: window.judged, forbidden: window.forbidden, mixed: window.mixed }
    }
}

impl Observer for Probes {
    fn after(&mut self, state: &State, changed: Changed) {
        self.window().after(state, changed);
    }
}

impl Window {
    fn hand_over(&mut self, changes: &Changes, is_first: bool) -> Result<(), String> {
        let mut next = match self.states.last() {
            Some(last) if !is_first => last.clone(),
            _ => Kernel::new(self.bits),
        };
        next.apply(changes).map_err(|fault| fault.to_string())?;
        self.states.push(next);
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
        for probe in &mut self.probes {
            probe.is_mixed = probe.is_allowed || may_pass_mixed(states, &varying, probe);
        }
    }

    /// Sets whose members differ between the programs: all that any has, and what all have.
    fn varying(&self) -> BTreeMap<SetName, [BTreeSet<Member>; 2]> {
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

    fn in_force(&mut self) {
        self.was_in_force = true;
        let Some(last) = self.states.pop() else { return };
        self.states.clear();
        // Other packets, now and then: a window is a good moment to look elsewhere.
        for probe in &mut self.probes {
            if self.dice.one_in(4) {
                probe.trip = self.domain.trip(&mut self.dice);
                probe.to_host = self.dice.one_in(6);
            }
            probe.is_allowed = passes(&last, probe);
            probe.is_mixed = probe.is_allowed;
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
        for probe in &self.probes {
            self.judged += 1;
            if probe.is_allowed {
                continue;
            }
            self.forbidden += 1;
            if !passes(state.view(), probe) {
                continue;
            }
            if probe.is_mixed {
                self.mixed += 1;
                continue;
            }
            let Probe { trip, to_host, .. } = probe;
            let programs = self.states.len();
            let mut finding = format!(
                "after {changed:?}: {trip:?}, to the host: {to_host}, passes, though none of {programs} programs lets it"
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
                is_allowed: false,
                is_mixed: false,
            };
            let is_judged = fate(state.view(), &probe).is_some_and(|fate| fate != Fate::Left);
            if !is_judged {
                self.findings.push(format!("a route to {destination} on {to}, but no filter in front of it"));
            }
        }
    }
}

/// What cannot be walked is found by the interpreter's own checks; here it does not pass.
fn passes(kernel: &Kernel, probe: &Probe) -> bool {
    fate(kernel, probe).is_some_and(|fate| fate != Fate::Dropped)
}

fn fate(kernel: &Kernel, probe: &Probe) -> Option<Fate> {
    let Trip { from, to, packet } = &probe.trip;
    let passage = Passage {
        way: if probe.to_host { Way::ToHost } else { Way::Forward },
        from,
        to: if probe.to_host { "" } else { to },
        packet: *packet,
        mark: 0,
        reverse_path_failed: false,
        translated: false,
        local: &[],
    };
    kernel.walk(passage).ok().map(|journey| journey.fate)
}

fn may_pass_mixed(states: &[Kernel], varying: &BTreeMap<SetName, [BTreeSet<Member>; 2]>, probe: &Probe) -> bool {
    let packet = &probe.trip.packet;
    let relevant: Vec<(&SetName, &[BTreeSet<Member>; 2])> = varying
        .iter()
        .filter(|(_, [any, common])| {
            let meets = |members: &BTreeSet<Member>| {
                [packet.source, packet.destination].map(|address| members.iter().any(|member| covers(member, address)))
            };
            meets(any) != meets(common) || any.iter().any(|member| matches!(member, Member::AddressPort { .. }))
        })
        .collect();
    if relevant.len() > MOST_VARYING {
        return true;
    }
    states.iter().any(|state| {
        let mut mixture = state.clone();
        (0..1_usize << relevant.len()).any(|choice| {
            for (bit, (name, versions)) in relevant.iter().enumerate() {
                mixture.replace_members(name, versions[choice >> bit & 1].clone());
            }
            passes(&mixture, probe)
        })
    })
}

fn covers(member: &Member, address: IpAddr) -> bool {
    match member {
        Member::Address(member) | Member::AddressPort { address: member, .. } => *member == address,
        Member::Net(net) => net.contains(&address),
    }
}
