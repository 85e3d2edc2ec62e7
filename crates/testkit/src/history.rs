//! Random histories of whatever can enter the graph, and how often they hold what matters.
//!
//! Everything comes from small domains, because collisions are where the bugs are: addresses that many
//! endpoints share, interfaces that several claim, labels that profiles give and hide, sets that lose
//! their last user and are needed again in the same batch. Unlike [`world`](crate::world), nothing here
//! is held to what the conversion guarantees.
//!
//! One seed gives one history, on every machine and in every run.
#![allow(clippy::expect_used, clippy::unwrap_used, clippy::panic, reason = "for tests")]

mod features;

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use model::{
    Action, EndpointPort, EntityMatch, Family, HostEndpoint, IcmpMatch, Labels, Name, NetworkSet, Policy, Port,
    PortRange, ProfileRules, Protocol, Rule, Selector, ServiceRef, Update, WorkloadEndpoint,
};

use crate::build;
use crate::world::Dice;

pub use features::Features;

/// Name of the host that the graph runs for.
pub const HOST: &str = "h1";

/// One step of a history: a change, and whether a batch is taken after it.
pub type Step = (Update, bool);

const SELECTORS: [&str; 22] = [
    "all()",
    "!all()",
    "global()",
    "has(a)",
    "!has(a)",
    "a == '1'",
    "a == '1'",
    "a != '1'",
    "b in {'1', '2'}",
    "b in {}",
    "b not in {'1'}",
    "has(a) && b == '2'",
    "has(c) && !has(b)",
    "a == '1' || c == '2'",
    "a == '1' || !has(c)",
    "!(a == '2' && has(b))",
    "!(!(has(b)))",
    "c starts with '1'",
    "a ends with '' && b contains '1'",
    "pcns.x == '1'",
    "has(pcns.x) && a contains ''",
    "a in {'1', '2'} && b in {'', '1'}",
];
const KEYS: [&str; 3] = ["a", "b", "c"];
const VALUES: [&str; 3] = ["", "1", "2"];
const PROFILES: [&str; 4] = ["p", "q", "kns.n", model::profile::DEFAULT_ALLOW];
const ADDRESSES: [&str; 7] =
    ["10.0.0.1/32", "10.0.0.1/32", "10.0.0.2/32", "10.0.0.2/24", "10.0.0.3/32", "fd00::1/128", "fd00::2/128"];
const SET_NETS: [&str; 11] = [
    "0.0.0.0/0",
    "::/0",
    "10.0.0.0/8",
    "10.0.0.0/16",
    "10.0.0.0/30",
    "10.0.0.1/32",
    "10.0.0.7/29",
    "fd00::/8",
    "fd00::1/128",
    "128.0.0.0/1",
    "8000::/1",
];
const RULE_NETS: [&str; 8] =
    ["10.0.0.0/8", "10.0.0.1/32", "192.0.2.0/24", "0.0.0.0/0", "fd00::/8", "fd00::1/128", "2001:db8::/32", "::/0"];
const POLICIES: [&str; 7] = ["gnp/a", "gnp/a-b", "gnp/a1", "np/n/a", "np/m/a", "sgnp/a", "snp/n/a"];
const TIERS: [&str; 3] = ["default", "t1", "t2"];
const PORT_NAMES: [&str; 3] = ["http", "dns", "x"];

/// Makes histories; holds what need not be parsed again for each.
#[derive(Clone, Debug)]
pub struct Histories {
    selectors: Vec<Arc<Selector>>,
    addresses: Vec<IpNet>,
    set_nets: Vec<IpNet>,
    rule_nets: Vec<IpNet>,
}

impl Default for Histories {
    fn default() -> Self {
        let nets = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
        Self {
            selectors: SELECTORS.iter().map(|text| build::selector(text)).collect(),
            addresses: nets(&ADDRESSES),
            set_nets: nets(&SET_NETS),
            rule_nets: nets(&RULE_NETS),
        }
    }
}

impl Histories {
    /// The history of a seed: most are short, some go on for long.
    pub fn history(&self, seed: u64) -> Vec<Step> {
        let dice = &mut Dice::new(seed);
        let length = if dice.one_in(50) { 300 } else { 1 + dice.roll(40) };
        let batches = 2 + dice.roll(8);
        let mut history: Vec<Step> = Vec::new();
        for _ in 0..length {
            let update = match dice.roll(12) {
                // Said again, perhaps after something else was said of the object.
                0 if !history.is_empty() => dice.pick(&history).0,
                1..=2 if !history.is_empty() => build::absent(&dice.pick(&history).0),
                _ => self.update(dice),
            };
            let cut = dice.one_in(batches);
            history.push((update, cut));
        }
        history
    }

    fn update(&self, dice: &mut Dice) -> Update {
        match dice.roll(24) {
            0..=5 => self.workload_endpoint(dice),
            6..=8 => self.host_endpoint(dice),
            9..=14 => self.policy(dice),
            15..=16 => {
                let order = dice.pick(&[None, Some(1.0), Some(2.0), Some(0.0), Some(-0.0), Some(-7.5)]);
                build::tier(dice.pick(&TIERS), order, dice.one_in(2))
            }
            17..=18 => {
                let mut labels: Vec<_> = labels(dice).iter().map(|(key, value)| (key.clone(), value.clone())).collect();
                if dice.one_in(3) {
                    labels.push(("pcns.x".into(), dice.pick(&VALUES).into()));
                }
                Update::ProfileLabels(dice.pick(&PROFILES).into(), Some(Arc::new(labels.into_iter().collect())))
            }
            19..=20 => {
                let rules = ProfileRules { inbound: self.rules(dice), outbound: self.rules(dice) };
                Update::ProfileRules(dice.pick(&PROFILES).into(), Some(Arc::new(rules)))
            }
            21..=22 => {
                // A host endpoint may have the first name too.
                let key = dice.pick(&["global", "n/set", "m/set"]);
                let set = NetworkSet {
                    nets: dice.some(&self.set_nets, 4),
                    labels: labels(dice),
                    profiles: key
                        .split_once('/')
                        .map(|(namespace, _)| format!("kns.{namespace}").into())
                        .into_iter()
                        .collect(),
                };
                Update::NetworkSet(key.into(), Some(Arc::new(set)))
            }
            _ => build::link(dice.pick(&["tap1", "tap2", "eth0"]), 1 + dice.roll(3) as u32, dice.one_in(2)),
        }
    }

    fn workload_endpoint(&self, dice: &mut Dice) -> Update {
        let host = dice.pick(&["h1", "h1", "h1", "h2", "h2", "H1"]);
        let orchestrator = dice.pick(&["k8s", "openstack"]);
        let workload = dice.pick(&["n/w1", "n/w2", "w"]);
        let key = build::wep_key(&format!("{host}/{orchestrator}/{workload}/{}", dice.pick(&["e1", "e2"])));
        let mut value = WorkloadEndpoint {
            active: !dice.one_in(8),
            interface: dice.pick(&["tap1", "tap2", "tap3"]).into(),
            mac: dice.one_in(4).then(|| [dice.roll(3) as u8; 6]),
            profiles: profiles(dice),
            labels: labels(dice),
            ports: ports(dice),
            ..WorkloadEndpoint::default()
        };
        for net in dice.some(&self.addresses, 3) {
            match net {
                IpNet::V4(net) => value.v4_nets.push(net),
                IpNet::V6(net) => value.v6_nets.push(net),
            }
        }
        Update::WorkloadEndpoint(key, Some(Arc::new(value)))
    }

    fn host_endpoint(&self, dice: &mut Dice) -> Update {
        let mut value = HostEndpoint {
            host: dice.pick(&["h1", "h1", "h2", "H1"]).into(),
            interface: dice.pick(&["eth0", "*", ""]).into(),
            profiles: profiles(dice),
            labels: labels(dice),
            ports: ports(dice),
            dscp: dice.one_in(6).then_some(46),
            ..HostEndpoint::default()
        };
        for net in dice.some(&self.addresses, 2) {
            match net.addr() {
                IpAddr::V4(address) => value.expected_v4.push(address),
                IpAddr::V6(address) => value.expected_v6.push(address),
            }
        }
        Update::HostEndpoint(dice.pick(&["hep1", "hep2", "global"]).into(), Some(Arc::new(value)))
    }

    fn policy(&self, dice: &mut Dice) -> Update {
        let selector = dice.pick(&self.selectors);
        let policy = Policy {
            tier: dice.pick(&TIERS).into(),
            order: dice.pick(&[None, Some(1.0), Some(1.5), Some(0.0), Some(-0.0), Some(-3.0)]),
            original_selector: selector.canonical().into(),
            selector,
            ingress: !dice.one_in(5),
            egress: !dice.one_in(5),
            do_not_track: dice.one_in(8),
            pre_dnat: dice.one_in(8),
            apply_on_forward: dice.one_in(2),
            always_needed: dice.one_in(10),
            inbound: self.rules(dice),
            outbound: self.rules(dice),
        };
        Update::Policy(build::policy_key(dice.pick(&POLICIES)), Some(Arc::new(policy)))
    }

    fn rules(&self, dice: &mut Dice) -> Vec<Rule> {
        (0..dice.roll(4)).map(|_| self.rule(dice)).collect()
    }

    fn rule(&self, dice: &mut Dice) -> Rule {
        let mut rule = Rule::for_everything(dice.pick(&[Action::Allow, Action::Deny, Action::Pass, Action::Log]));
        rule.family = dice.pick(&[None, None, Some(Family::V4), Some(Family::V6)]);
        let named = |name: &str| Some(Protocol::Name(name.into()));
        rule.protocol = match dice.roll(9) {
            0..=1 => None,
            2 => named("tcp"),
            3 => named("udp"),
            4 => Some(Protocol::Number(132)),
            5 => Some(Protocol::Number(17)),
            6 => named("icmp"),
            7 => named("icmpv6"),
            _ => Some(Protocol::Number(dice.roll(256) as u8)),
        };
        if dice.one_in(8) {
            rule.not_protocol = dice.pick(&[named("udp"), Some(Protocol::Number(6)), named("icmp")]);
        }
        let icmp = |dice: &mut Dice| {
            Some(IcmpMatch { kind: dice.pick(&[0, 8, 254]), code: dice.pick(&[None, Some(0), Some(255)]) })
        };
        if dice.one_in(6) {
            rule.icmp = icmp(dice);
        }
        if dice.one_in(8) {
            rule.not_icmp = icmp(dice);
        }
        rule.has_http = dice.one_in(12);
        if dice.one_in(8) {
            let annotation = |dice: &mut Dice| (dice.pick(&KEYS).to_owned(), dice.pick(&VALUES).to_owned());
            rule.annotations = (0..=dice.roll(2)).map(|_| annotation(dice)).collect();
        }
        rule.source = self.entity(dice);
        rule.destination = self.entity(dice);
        rule
    }

    fn entity(&self, dice: &mut Dice) -> EntityMatch {
        let mut entity = EntityMatch::default();
        if dice.one_in(3) {
            return entity;
        }
        if dice.one_in(2) {
            entity.selector = Some(dice.pick(&self.selectors));
        }
        if dice.one_in(4) {
            entity.not_selector = Some(dice.pick(&self.selectors));
        }
        if dice.one_in(5) {
            entity.nets = dice.some(&self.rule_nets, 3);
        }
        if dice.one_in(6) {
            entity.not_nets = dice.some(&self.rule_nets, 2);
        }
        if dice.one_in(3) {
            entity.ports = rule_ports(dice);
        }
        if dice.one_in(6) {
            entity.not_ports = rule_ports(dice);
        }
        if dice.one_in(12) {
            let (namespace, name) = dice.pick(&[("n", "web"), ("", "web"), ("n", "db")]);
            entity.service = Some(ServiceRef { namespace: namespace.into(), name: name.into() });
        }
        entity
    }
}

/// With repetitions, in any order.
fn profiles(dice: &mut Dice) -> Vec<Name> {
    dice.some(&PROFILES, 4).into_iter().map(Name::from).collect()
}

fn labels(dice: &mut Dice) -> Labels {
    (0..dice.roll(4)).map(|_| (dice.pick(&KEYS), dice.pick(&VALUES))).collect()
}

fn ports(dice: &mut Dice) -> Vec<EndpointPort> {
    let port = |dice: &mut Dice| EndpointPort {
        name: dice.pick(&PORT_NAMES).into(),
        protocol: dice.pick(&[6, 6, 17, 132]),
        port: dice.pick(&[53, 80, 8080, u16::MAX]),
    };
    (0..dice.roll(4)).map(|_| port(dice)).collect()
}

/// Numbers and names mixed; sometimes more than one rule of iptables can hold.
fn rule_ports(dice: &mut Dice) -> Vec<Port> {
    if dice.one_in(6) {
        return (0..16 + dice.roll(20)).map(|n| Port::Range(PortRange::single(1000 + 7 * n as u16))).collect();
    }
    let port = |dice: &mut Dice| match dice.roll(3) {
        0 => Port::Named(dice.pick(&PORT_NAMES).into()),
        1 => Port::Range(PortRange::single(dice.pick(&[53, 80]))),
        _ => Port::Range(dice.pick(&[PortRange { first: 1, last: u16::MAX }, PortRange { first: 80, last: 90 }])),
    };
    (0..1 + dice.roll(3)).map(|_| port(dice)).collect()
}
