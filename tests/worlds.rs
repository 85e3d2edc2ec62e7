//! Random worlds for the [ground](crate::ground): what is stored, step by step, and the packets to try it with.
//!
//! Invariant: a seed gives the same world wherever and after whatever it runs; only which interface a packet goes
//! through depends on the routes that are there.

mod rules;
mod trial;

use std::collections::BTreeSet;
use std::net::IpAddr;

use compiler::Marks;
use compiler::options::DenyAction;
use model::update::UpdateKey;
use model::{Family, Name, Port, PortRange, Rule, Update};
use testkit::build;
use testkit::interpret::{Bits, Kernel};
use testkit::packets;
use testkit::world::{Dice, Domain, Local};
use verdict::{Connection, Packet, Settings};

use crate::ground::{HOMES, OUTSIDE, Routes, Shot, UPLINK, WORKLOADS};
pub use rules::{FEATURES, features};
use rules::{ICMP_KINDS, fits, for_rules, let_spoof, profiles, sharpen, soften, use_real_icmp};
pub use trial::{Expected, Trial, answers};
use trial::{connection_of, payload};

/// So many worlds of neighbouring seeds have the same options.
pub const GENERATION: u64 = 20;

/// Packets per world.
pub const PACKETS: usize = 50;

/// Packets that are tried after each step but the last; there are seven at most.
const ON_THE_WAY: usize = 6;

/// How many packets are drawn in search of one that fits a rule.
const ATTEMPTS: usize = 60;

/// Types that connection tracking leaves alone; packets of others are of a connection or invalid.
const UNTRACKED_ICMP: std::ops::RangeInclusive<u8> = 130..=137;

/// What is stored, step by step.
#[derive(Clone, Debug)]
pub struct World {
    pub seed: u64,
    /// Updates that go to the kernel in one piece.
    pub steps: Vec<Step>,
    dice: Dice,
}

/// Some updates, and how many packets are tried when they are in force.
#[derive(Clone, Debug)]
pub struct Step {
    pub updates: Vec<Update>,
    pub packets: usize,
}

impl World {
    /// Makes the world of a seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let mut dice = Dice::new(seed);
        let domain = domain();
        let mut steps: Vec<Vec<Update>> = Vec::new();
        if !dice.one_in(8) {
            let locals: Vec<Local> =
                WORKLOADS.iter().zip(HOMES).take(4).map(|(name, home)| local(name, home)).collect();
            steps.push(domain.static_world(&mut dice, &locals));
            steps[0].extend(profiles(&domain, &mut dice));
        }
        if steps.is_empty() || dice.one_in(3) {
            steps.extend(domain.history(&mut dice));
        } else {
            for _ in 0..dice.roll(4) {
                steps.push((0..=dice.roll(3)).map(|_| domain.update(&mut dice)).collect());
            }
        }
        for update in steps.iter_mut().flatten() {
            let_spoof(update, &mut dice);
            for_rules(update, |rules| {
                rules.iter_mut().for_each(use_real_icmp);
                sharpen(rules, &mut dice);
                soften(rules, &mut dice);
            });
        }
        // Most packets at the end, some on the way.
        let last = steps.len() - 1;
        let packets = |index| if index == last { PACKETS - last * ON_THE_WAY } else { ON_THE_WAY };
        let steps = steps.into_iter().enumerate().map(|(index, updates)| Step { updates, packets: packets(index) });
        Self { seed, steps: steps.collect(), dice }
    }

    /// Makes packets that go through at least one workload interface. No two are of one connection.
    pub fn trials<'a>(
        &mut self,
        routes: &Routes,
        facts: impl IntoIterator<Item = &'a Update>,
        n_trials: usize,
    ) -> Vec<Trial> {
        let domain = domain();
        let mut rules: Vec<Rule> = Vec::new();
        for update in facts {
            for_rules(&mut update.clone(), |of_direction| rules.append(of_direction));
        }
        let mut connections = BTreeSet::new();
        let mut trials = Vec::new();
        // Ends, whatever the routes.
        for _ in 0..n_trials * 400 {
            if trials.len() == n_trials {
                break;
            }
            let packet = self.packet(&domain, &rules);
            let origin = routes.to(packet.source).clone();
            let anywhere = WORKLOADS.into_iter().chain([UPLINK]).collect::<Vec<_>>();
            let from = if self.dice.one_in(16) { self.dice.pick(&anywhere).into() } else { origin.clone() };
            let to = routes.to(packet.destination).clone();
            if (&*from, &*to) == (UPLINK, UPLINK) || !connections.insert(connection_of(&packet)) {
                continue;
            }
            let token = packets::token();
            let shot = Shot {
                source: packet.source,
                destination: packet.destination,
                protocol: packet.protocol,
                payload: payload(&packet, trials.len() as u16 + 1, &token),
                token,
                from: from.clone(),
            };
            let is_spoofed = *from != *UPLINK && !routes.lead_back(packet.source, &from);
            trials.push(Trial { packet, shot, to, is_spoofed });
        }
        trials
    }

    /// A packet of the domain, often one that a rule is about, or nearly so.
    fn packet(&mut self, domain: &Domain, rules: &[Rule]) -> Packet {
        let mut packet = domain.packet(&mut self.dice);
        if !rules.is_empty() && !self.dice.one_in(3) {
            let rule = self.dice.pick(rules);
            for _ in 0..ATTEMPTS {
                if fits(&rule, &packet) {
                    break;
                }
                packet = domain.packet(&mut self.dice);
            }
            self.aim_ports(&rule, &mut packet);
        }
        let is_v6 = packet.family() == Family::V6;
        let is_own = is_v6 != (packet.protocol == 1);
        let Some((kind, code)) = packet.icmp else { return packet.of(Connection::New) };
        let kinds = ICMP_KINDS[usize::from(is_v6)];
        let kind = if self.dice.one_in(6) { kind } else { kinds[usize::from(kind) % 3] };
        packet.icmp = Some((kind, code));
        // In IPv4 these numbers are those of no message (nf_conntrack_proto_icmp.c).
        let opens = kinds.contains(&kind) || is_v6 && UNTRACKED_ICMP.contains(&kind);
        packet.of(if is_own && opens { Connection::New } else { Connection::Invalid })
    }

    /// Takes the ports of a packet from those of a rule and their neighbours.
    fn aim_ports(&mut self, rule: &Rule, packet: &mut Packet) {
        let Some((source, destination)) = &mut packet.ports else { return };
        for (port, side) in [(source, &rule.source), (destination, &rule.destination)] {
            let wanted: Vec<Port> = side.ports.iter().chain(&side.not_ports).cloned().collect();
            if wanted.is_empty() || self.dice.one_in(4) {
                continue;
            }
            *port = match self.dice.pick(&wanted) {
                Port::Range(PortRange { first, last }) => {
                    self.dice.pick(&[first, last, first.saturating_sub(1).max(1), last.saturating_add(1)])
                }
                // The numbers that endpoints of the domain have for their names.
                Port::Named(_) => self.dice.pick(&[80, 1, 3]),
            };
        }
    }
}

fn domain() -> Domain {
    let addresses = || HOMES.into_iter().chain(OUTSIDE);
    let parse = |text: &str| text.parse::<IpAddr>();
    let v4 = addresses().filter_map(|(v4, _)| parse(v4).ok()).collect();
    let v6 = addresses().filter_map(|(_, v6)| parse(v6).ok()).collect();
    Domain::new(v4, v6, WORKLOADS.map(Name::from).to_vec())
}

fn local(interface: &str, (v4, v6): (&str, &str)) -> Local {
    match (v4.parse(), v6.parse()) {
        (Ok(v4), Ok(v6)) => Local { interface: interface.into(), v4, v6 },
        _ => panic!("{v4} and {v6} are addresses of the two families"),
    }
}

/// What the operator chose for a world, the same for a run of them: agents with all kinds of choices come and go.
#[must_use]
pub fn options(seed: u64) -> (compiler::Options, Settings) {
    let mut dice = Dice::new(seed / GENERATION);
    let masks = [0xffff_0000, 0xffff_0000, 0x0000_ffff, 0x0101_0111, 0xf800_0000];
    let log_rate = program::Rate { count: 10, per: program::RateUnit::Sec };
    let default = compiler::Options::default();
    let options = compiler::Options {
        marks: Marks::allocate(dice.pick(&masks), false, false).unwrap_or(default.marks),
        filter_deny: dice.pick(&[DenyAction::Drop, DenyAction::Reject]),
        check_invalid: !dice.one_in(4),
        allow_vxlan_from_workloads: dice.one_in(4),
        allow_ipip_from_workloads: dice.one_in(4),
        openstack: dice.one_in(4),
        flow_logs: dice.one_in(4),
        log_rate: dice.one_in(4).then_some(log_rate),
        ..compiler::Options::default()
    };
    let settings = Settings {
        check_invalid: options.check_invalid,
        allow_vxlan_from_workloads: options.allow_vxlan_from_workloads,
        allow_ipip_from_workloads: options.allow_ipip_from_workloads,
        ..Settings::default()
    };
    (options, settings)
}

/// An empty model of the kernel for a program with these options.
#[must_use]
pub fn model_of(options: &compiler::Options) -> Kernel {
    let marks = &options.marks;
    Kernel::new(Bits { ours: marks.all() | marks.drop, never_left: marks.drop })
}

/// What would be stored if all of these were deleted.
pub fn deletions<'a>(facts: impl IntoIterator<Item = (&'a UpdateKey, &'a Update)>) -> Vec<Update> {
    let is_stored = |update: &&Update| !matches!(update, Update::Link(..));
    facts.into_iter().map(|(_, update)| update).filter(is_stored).map(build::absent).collect()
}
