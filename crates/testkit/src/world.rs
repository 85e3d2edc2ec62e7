//! Random histories of stored objects, and packets that meet them.
//!
//! Everything is drawn from small domains, because collisions are where the bugs are: addresses that several
//! endpoints share, interfaces that several endpoints claim, tiers that come and go under their policies.
//! What is made obeys what the conversion guarantees (`model::convert`), and nothing more.
//!
//! One seed gives one history, on every machine and in every run.
#![allow(clippy::expect_used, clippy::unwrap_used, reason = "for tests")]

mod dice;
mod rules;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use ipnet::IpNet;
use model::{Name, ProfileRules, Selector, Update};
use verdict::{Connection, Packet};

use crate::build::{self, WepBuilder};
pub use dice::Dice;

/// Name of the host that local endpoints are on.
pub const HOST: &str = "h1";

/// How the names of workload interfaces begin, in [`Domain::small`].
pub const PREFIX: &str = "cali";

/// An interface that is no workload's, in [`Domain::small`].
pub const UPLINK: &str = "eth0";

const SELECTORS: [&str; 14] = [
    "all()",
    "has(a)",
    "!has(a)",
    "a == '1'",
    "a != '1'",
    "a in {'1', '2'}",
    "a not in {'1'}",
    "b == '1' || a == '2'",
    "has(a) && !(b == '1')",
    "!(!(has(b)))",
    "a starts with '1' && has(b)",
    "a contains '1' || pcns.x == '1'",
    "a ends with '2' || has(pcns.x)",
    "b in {}",
];
const LABELS: [&str; 5] = ["a=1", "a=2", "a=12", "b=1", "b"];
const PROFILE_LABELS: [&str; 7] = ["a=1", "a=2", "a=12", "b=1", "b", "pcns.x=1", "pcns.x=2"];
const PORTS: [&str; 6] = ["http/tcp/80", "http/udp/80", "http/tcp/1", "dns/udp/3", "dns/tcp/3", "http/sctp/1"];
/// `kns.ns` has labels at most and never rules: what lists it stays closed.
const PROFILES: [&str; 7] = ["p", "p", "p", "q", "q", "kns.ns", model::profile::DEFAULT_ALLOW];
const TIERS: [&str; 3] = ["default", "t", "u"];
const POLICIES: [&str; 8] = ["gnp/a", "gnp/b", "gnp/c", "np/ns/a", "np/ns/b", "np/ns/c", "np/other/a", "sgnp/s"];

/// A workload endpoint that is there from the beginning and stays as it is.
#[derive(Clone, Debug)]
pub struct Local {
    pub interface: Name,
    pub v4: Ipv4Addr,
    pub v6: Ipv6Addr,
}

/// What histories and packets are drawn from.
#[derive(Clone, Debug)]
pub struct Domain {
    v4: Vec<IpAddr>,
    v6: Vec<IpAddr>,
    nets: Vec<IpNet>,
    interfaces: Vec<Name>,
    selectors: Vec<Arc<Selector>>,
}

/// A packet and the interfaces it comes from and goes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trip {
    pub from: Name,
    pub to: Name,
    pub packet: Packet,
}

impl Domain {
    /// Four interfaces, five addresses of each family.
    #[must_use]
    pub fn small() -> Self {
        let parse = |texts: [&str; 5]| texts.map(|text| text.parse().unwrap()).to_vec();
        let interfaces = ["cali1", "cali12", "cali2", PREFIX].map(Name::from).to_vec();
        Self::new(
            parse(["10.0.0.1", "10.0.0.2", "10.0.1.1", "192.0.2.1", "172.16.0.1"]),
            parse(["fd00::1", "fd00::2", "fd00:0:0:1::1", "2001:db8::1", "fe80::1"]),
            interfaces,
        )
    }

    /// Draws addresses and networks from those given and their surroundings, and nothing else.
    #[must_use]
    pub fn new(v4: Vec<IpAddr>, v6: Vec<IpAddr>, interfaces: Vec<Name>) -> Self {
        let mut nets: Vec<IpNet> =
            ["0.0.0.0/0", "128.0.0.0/1", "::/0", "8000::/1"].map(|text| text.parse().unwrap()).to_vec();
        for (address, lengths) in
            v4.iter().map(|address| (address, [8, 24, 32])).chain(v6.iter().map(|address| (address, [8, 64, 128])))
        {
            nets.extend(lengths.map(|length| IpNet::new(*address, length).unwrap().trunc()));
        }
        nets.sort();
        nets.dedup();
        let selectors = SELECTORS.iter().map(|text| build::selector(text)).collect();
        Self { v4, v6, nets, interfaces, selectors }
    }

    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.v4.iter().chain(&self.v6).copied()
    }

    /// A packet between two addresses of the domain, most often the first of its connection.
    pub fn packet(&self, dice: &mut Dice) -> Packet {
        let addresses = if dice.one_in(2) { &self.v4 } else { &self.v6 };
        let (source, destination) = (dice.pick(addresses), dice.pick(addresses));
        let protocol = dice.pick(&[6, 6, 6, 6, 6, 6, 17, 17, 17, 17, 132, 132, 1, 1, 58, 58, 47, 4]);
        let packet = Packet::new(source, destination, protocol).of(match dice.roll(16) {
            0 => Connection::Established,
            1 => Connection::Related,
            2 => Connection::Invalid,
            _ => Connection::New,
        });
        match protocol {
            6 | 17 | 132 => {
                packet.with_ports(dice.pick(&[1, 3, 80, 300]), dice.pick(&[1, 1, 3, 3, 53, 80, 80, 300, 4789]))
            }
            1 | 58 => packet.with_icmp(dice.pick(&[0, 1, 2, 0, 1, 2, 135]), dice.roll(2) as u8),
            _ => packet,
        }
    }

    /// A packet to, from or between workload interfaces; some of them have no endpoint.
    pub fn trip(&self, dice: &mut Dice) -> Trip {
        let uplink = || Name::from(UPLINK);
        let (from, to) = match dice.roll(5) {
            0 | 1 => (dice.pick(&self.interfaces), uplink()),
            2 | 3 => (uplink(), dice.pick(&self.interfaces)),
            _ => (dice.pick(&self.interfaces), dice.pick(&self.interfaces)),
        };
        Trip { from, to, packet: self.packet(dice) }
    }

    /// What the agent is told before the first update from the datastore: K-6.
    pub fn beginning() -> Vec<Update> {
        model::convert::static_updates()
    }

    /// A random history, cut into batches. It begins with [`Self::beginning`] and enough objects that most
    /// packets meet something.
    pub fn history(&self, dice: &mut Dice) -> Vec<Vec<Update>> {
        let mut first = Self::beginning();
        for (n, interface) in self.interfaces.iter().enumerate() {
            if !dice.one_in(8) {
                let wep = build::wep(&format!("{HOST}/k8s/ns/w{n}/e")).interface(interface);
                first.push(self.addressed(dice, wep));
            }
        }
        first.extend((0..dice.roll(3)).map(|_| self.any_profile_rules(dice)));
        first.extend((0..dice.roll(10)).map(|_| self.update(dice)));
        let mut batches = vec![first];
        for _ in 0..=dice.roll(4) {
            batches.push((0..=dice.roll(6)).map(|_| self.update(dice)).collect());
        }
        batches
    }

    /// A change of one object: a new value, or none.
    pub fn update(&self, dice: &mut Dice) -> Update {
        let update = match dice.roll(19) {
            18 => self.any_host_endpoint(dice),
            0..=3 => self.any_endpoint(dice),
            4..=9 => self.any_policy(dice),
            10..=12 => self.any_profile_rules(dice),
            13 => self.any_profile_labels(dice),
            14 | 15 => self.any_tier(dice),
            _ => self.any_network_set(dice),
        };
        if dice.one_in(6) { build::absent(&update) } else { update }
    }

    /// A world that does not change: the given endpoints with random labels, profiles and named ports, and
    /// random policies, tiers, profiles, network sets and remote endpoints around them. The caller makes
    /// the domain from the endpoints' addresses and those of their surroundings.
    pub fn static_world(&self, dice: &mut Dice, locals: &[Local]) -> Vec<Update> {
        let mut updates = Self::beginning();
        for (n, local) in locals.iter().enumerate() {
            let wep = build::wep(&format!("{HOST}/k8s/ns/local{n}/eth0")).interface(&local.interface);
            let wep = wep.ip(&local.v4.to_string()).ip(&local.v6.to_string());
            updates.push(self.dress(dice, wep));
        }
        updates.extend((0..=dice.roll(6)).map(|_| self.any_policy(dice)));
        updates.extend((0..=dice.roll(3)).map(|_| self.any_profile_rules(dice)));
        updates.extend((0..=dice.roll(2)).map(|_| self.any_profile_labels(dice)));
        updates.extend((0..=dice.roll(3)).map(|_| self.any_tier(dice)));
        updates.extend((0..=dice.roll(2)).map(|_| self.any_network_set(dice)));
        updates.extend((0..=dice.roll(2)).map(|_| self.remote_endpoint(dice)));
        updates
    }

    fn any_endpoint(&self, dice: &mut Dice) -> Update {
        let host = dice.pick(&[HOST, HOST, HOST, "h2"]);
        let n = dice.roll(self.interfaces.len() as u64 + 1) as usize;
        // Mostly its own interface, now and then one that another claims too.
        let own = self.interfaces.get(n).filter(|_| !dice.one_in(4)).cloned();
        let interface = own.unwrap_or_else(|| dice.pick(&self.interfaces));
        let wep = build::wep(&format!("{host}/k8s/ns/w{n}/e")).interface(&interface);
        self.addressed(dice, wep)
    }

    /// On an interface that no packet takes: it counts as an object with addresses, ports and labels.
    fn any_host_endpoint(&self, dice: &mut Dice) -> Update {
        let mut hep = build::hep(dice.pick(&["first", "second"]), dice.pick(&[HOST, "h2"]));
        for ip in dice.some(&self.v4, 2).into_iter().chain(dice.some(&self.v6, 2)) {
            hep = hep.ip(&ip.to_string());
        }
        for label in dice.some(&LABELS, 2) {
            hep = hep.label(label);
        }
        for port in dice.some(&PORTS, 2) {
            hep = hep.port(port);
        }
        hep.interface(dice.pick(&["eth8", "eth9"])).build()
    }

    fn remote_endpoint(&self, dice: &mut Dice) -> Update {
        let wep = build::wep(&format!("h2/k8s/ns/w{}/e", dice.roll(5)));
        self.addressed(dice, wep)
    }

    fn addressed(&self, dice: &mut Dice, mut wep: WepBuilder) -> Update {
        for ip in dice.some(&self.v4, 2).into_iter().chain(dice.some(&self.v6, 2)) {
            // Any prefix length is ignored (M-10).
            let length = if dice.one_in(8) { "/8" } else { "" };
            wep = wep.ip(&format!("{ip}{length}"));
        }
        self.dress(dice, wep)
    }

    /// Labels, profiles, named ports, state.
    fn dress(&self, dice: &mut Dice, mut wep: WepBuilder) -> Update {
        for label in dice.some(&LABELS, 2) {
            wep = wep.label(label);
        }
        for profile in dice.some(&PROFILES, 3) {
            wep = wep.profile(profile);
        }
        for port in dice.some(&PORTS, 3) {
            wep = wep.port(port);
        }
        let active = !dice.one_in(12);
        wep.with(|wep| wep.active = active).build()
    }

    fn any_profile_rules(&self, dice: &mut Dice) -> Update {
        let rules = ProfileRules { inbound: self.rules(dice), outbound: self.rules(dice) };
        Update::ProfileRules(dice.pick(&["p", "q"]).into(), Some(Arc::new(rules)))
    }

    fn any_profile_labels(&self, dice: &mut Dice) -> Update {
        build::profile_labels(dice.pick(&["p", "q", "kns.ns"]), &dice.some(&PROFILE_LABELS, 2).join(","))
    }

    fn any_tier(&self, dice: &mut Dice) -> Update {
        build::tier(dice.pick(&TIERS), order(dice), dice.one_in(2))
    }

    fn any_network_set(&self, dice: &mut Dice) -> Update {
        let nets: Vec<String> = dice.some(&self.nets, 3).iter().map(ToString::to_string).collect();
        let nets: Vec<&str> = nets.iter().map(String::as_str).collect();
        build::network_set(dice.pick(&["ns/s", "g"]), &dice.some(&LABELS, 2).join(","), &nets)
    }

    fn any_policy(&self, dice: &mut Dice) -> Update {
        let selector = if dice.one_in(2) { dice.pick(&self.selectors) } else { Arc::clone(&self.selectors[0]) };
        let key = dice.pick(&POLICIES);
        let (order, inbound, outbound) = (order(dice), self.rules(dice), self.rules(dice));
        let directions = [(true, true), (true, true), (true, true), (true, false), (false, true), (false, false)];
        let (ingress, egress) = dice.pick(&directions);
        // C-22: these exist for global policies only.
        let mut flag = || key.starts_with("gnp") && dice.one_in(12);
        let (do_not_track, pre_dnat, apply_on_forward) = (flag(), flag(), flag());
        let always_needed = dice.one_in(12);
        let tier = dice.pick(&TIERS);
        let change = |policy: &mut model::Policy| {
            policy.original_selector = selector.canonical().into();
            policy.selector = selector;
            policy.order = order;
            (policy.inbound, policy.outbound) = (inbound, outbound);
            (policy.ingress, policy.egress) = (ingress, egress);
            (policy.do_not_track, policy.pre_dnat) = (do_not_track, pre_dnat);
            (policy.apply_on_forward, policy.always_needed) = (apply_on_forward, always_needed);
        };
        build::policy(key).tier(tier).with(change).build()
    }
}

fn order(dice: &mut Dice) -> Option<f64> {
    dice.pick(&[None, Some(0.0), Some(-0.0), Some(1.0), Some(1.5), Some(-1.5)])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_seed_gives_one_history() {
        let run = |seed| {
            let (domain, mut dice) = (Domain::small(), Dice::new(seed));
            let history = domain.history(&mut dice);
            (format!("{history:?}"), domain.trip(&mut dice))
        };
        assert_eq!(run(1), run(1));
        assert_ne!(run(1), run(2));
    }

    #[test]
    fn a_static_world_has_the_endpoints_it_was_given() {
        let local = Local { interface: "cali7".into(), v4: Ipv4Addr::new(10, 9, 8, 7), v6: Ipv6Addr::LOCALHOST };
        let domain = Domain::new(vec![local.v4.into()], vec![local.v6.into()], vec![local.interface.clone()]);
        let world = domain.static_world(&mut Dice::new(1), std::slice::from_ref(&local));
        let found = world.iter().any(|update| {
            let Update::WorkloadEndpoint(key, Some(wep)) = update else { return false };
            &*key.host == HOST && wep.interface == local.interface && wep.v4_nets[0].addr() == local.v4
        });
        assert!(found, "{world:#?}");
    }
}
