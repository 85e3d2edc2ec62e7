//! Random rules, of every shape that the conversion lets through (datastore.md V-8 to V-13, H-5).

use ipnet::IpNet;
use model::{Action, EntityMatch, Family, IcmpMatch, Port, PortRange, Protocol, Rule, ServiceRef};

use super::{Dice, Domain};
use crate::build;

/// What ports a rule may ask for, given its protocol (V-13).
#[derive(Clone, Copy, PartialEq, Eq)]
enum PortKinds {
    None,
    Named,
    Both,
}

impl Domain {
    pub(super) fn rules(&self, dice: &mut Dice) -> Vec<Rule> {
        (0..dice.roll(5)).map(|_| self.rule(dice)).collect()
    }

    /// One rule. It has few matches, so that packets meet it now and then.
    pub fn rule(&self, dice: &mut Dice) -> Rule {
        let actions = [Action::Allow, Action::Allow, Action::Allow, Action::Deny, Action::Pass, Action::Log];
        let mut rule = build::rule_of(dice.pick(&actions));
        rule.family = dice.pick(&[None, None, None, None, None, None, Some(Family::V4), Some(Family::V6)]);
        if dice.one_in(10) {
            self.alternatives(dice, &mut rule);
            return rule;
        }
        let kinds = protocol(dice, &mut rule);
        rule.source = self.entity(dice, kinds);
        rule.destination = self.entity(dice, kinds);
        // T-12 says on which side services may stand; stored data may hold them on either.
        if dice.one_in(40) {
            let service = || Some(ServiceRef { namespace: "ns".into(), name: "web".into() });
            if dice.one_in(2) { rule.source.service = service() } else { rule.destination.service = service() }
        }
        // Neither has an effect on packets.
        rule.has_http = dice.one_in(40);
        if dice.one_in(40) {
            rule.annotations.insert("note".to_owned(), "any".to_owned());
        }
        rule
    }

    /// Three or four lists of alternatives in one rule: each needs a block of its own in the program.
    fn alternatives(&self, dice: &mut Dice, rule: &mut Rule) {
        rule.protocol = Some(Protocol::Number(dice.pick(&[6, 6, 17])));
        let nets = |dice: &mut Dice| (0..2 + dice.roll(5)).map(|_| dice.pick(&self.nets)).collect();
        let ports = |dice: &mut Dice| {
            let mut ports = vec![Port::Named(dice.pick(&["http", "dns"]).into())];
            let range = |dice: &mut Dice| PortRange { first: dice.roll(90) as u16 + 1, last: 90 };
            ports.extend((0..1 + dice.roll(3)).map(|_| Port::Range(range(dice))));
            ports
        };
        let missing = dice.roll(8);
        for (n, side) in [&mut rule.source, &mut rule.destination].into_iter().enumerate() {
            if missing != n as u64 {
                side.nets = nets(dice);
            }
            if missing != 2 + n as u64 {
                side.ports = ports(dice);
            }
            if dice.one_in(4) {
                side.not_nets = self.some_nets(dice);
            }
            if dice.one_in(8) {
                side.selector = Some(dice.pick(&self.selectors));
            }
        }
    }

    fn entity(&self, dice: &mut Dice, kinds: PortKinds) -> EntityMatch {
        let mut entity = EntityMatch::default();
        for _ in 0..dice.pick(&[0, 0, 0, 1, 1, 2]) {
            match dice.roll(11) {
                0 | 1 => entity.nets = self.some_nets(dice),
                2 => entity.not_nets = self.some_nets(dice),
                3..=5 => entity.selector = Some(dice.pick(&self.selectors)),
                6 => entity.not_selector = Some(dice.pick(&self.selectors)),
                7..=9 if kinds != PortKinds::None => entity.ports = ports(dice, kinds),
                10 if kinds != PortKinds::None => entity.not_ports = ports(dice, kinds),
                _ => {}
            }
        }
        entity
    }

    fn some_nets(&self, dice: &mut Dice) -> Vec<IpNet> {
        (0..=dice.roll(4)).map(|_| dice.pick(&self.nets)).collect()
    }
}

fn protocol(dice: &mut Dice, rule: &mut Rule) -> PortKinds {
    let name = |name: &str| Some(Protocol::Name(name.into()));
    match dice.roll(8) {
        0 | 1 => PortKinds::Named,
        2..=4 => {
            let tcp = Protocol::Number(6);
            rule.protocol = Some(dice.pick(&[tcp, Protocol::Name("udp".into()), Protocol::Number(132)]));
            PortKinds::Both
        }
        5 => {
            let (number, word, family) = dice.pick(&[(1, "icmp", Family::V4), (58, "icmpv6", Family::V6)]);
            rule.protocol = Some(Protocol::Number(number));
            if dice.one_in(2) {
                rule.protocol = name(word);
                rule.family = Some(family);
            }
            let mut icmp = || {
                let code = dice.pick(&[None, Some(0), Some(1)]);
                dice.one_in(2).then(|| IcmpMatch { kind: dice.roll(3) as u8, code })
            };
            (rule.icmp, rule.not_icmp) = (icmp(), icmp());
            if rule.icmp.is_some() || rule.not_icmp.is_some() {
                rule.family = Some(family);
            }
            PortKinds::None
        }
        6 => {
            let others = [Protocol::Number(6), Protocol::Name("udp".into()), Protocol::Number(47)];
            rule.not_protocol = Some(dice.pick(&others));
            PortKinds::Named
        }
        _ => {
            rule.protocol = dice.pick(&[Some(Protocol::Number(47)), name("udplite"), None]);
            // V-13 refuses any port for a protocol that has none.
            if rule.protocol.is_none() { PortKinds::Named } else { PortKinds::None }
        }
    }
}

/// Few, more than fit in one match, or more than fit in one rule.
fn ports(dice: &mut Dice, kinds: PortKinds) -> Vec<Port> {
    let numeric = kinds == PortKinds::Both;
    let most = match dice.roll(24) {
        0 if numeric => 200,
        1..=5 if numeric => 40,
        _ => 3,
    };
    let names = if most > 3 { 100 } else { 4 };
    let port = |dice: &mut Dice| match dice.roll(names) {
        1..=2 if numeric => Port::Range(PortRange::single(dice.pick(&[1, 3, 5, 80, 300]))),
        3.. if numeric => Port::Range(PortRange { first: dice.roll(6) as u16 + 1, last: 6 }),
        _ => Port::Named(dice.pick(&["http", "dns"]).into()),
    };
    (0..=dice.roll(most)).map(|_| port(dice)).collect()
}
