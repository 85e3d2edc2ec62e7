//! Packets judged twice: by the compiled program, walked rule by rule as the kernel does, and by a direct
//! reading of policy.md on the stored objects. Whatever history led to a state, both must agree.

#![allow(clippy::unwrap_used, clippy::panic, reason = "helper functions of tests fail the test that uses them")]
#![allow(clippy::wildcard_enum_match_arm, reason = "what a test does not know fails it")]

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use compiler::{Compiler, Options};
use graph::Graph;
use ipnet::IpNet;
use model::selector::LabelSource;
use model::update::UpdateKey;
use model::{
    Action as Verdict, EntityMatch, Family, Name, NetworkSet, Policy, PolicyKey, Port, PortRange, ProfileRules,
    Protocol, Selector, Tier, Update, WorkloadEndpoint, WorkloadEndpointKey,
};
use program::{
    Action, BaseChain, Chain, ChainName, Changes, ConnState, Hooks, InterfaceMatch, Match, Member, SetChange, SetName,
    Side, Table, TableId,
};
use proptest::prelude::*;
use testkit::build;

const HOST: &str = "h1";

/// A packet of a new connection that is forwarded.
#[derive(Clone, Debug)]
struct Packet {
    from: &'static str,
    to: &'static str,
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
    /// Of protocols that have ports.
    ports: (u16, u16),
    /// Of ICMP: type and code.
    icmp: (u8, u8),
    /// What somebody else has marked it with.
    mark: u32,
}

impl Packet {
    fn family(&self) -> Family {
        if self.source.is_ipv4() { Family::V4 } else { Family::V6 }
    }

    fn address(&self, side: Side) -> IpAddr {
        match side {
            Side::Source => self.source,
            Side::Destination => self.destination,
        }
    }

    fn port(&self, side: Side) -> Option<u16> {
        let (source, destination) = self.ports;
        [6, 17, 132].contains(&self.protocol).then_some(match side {
            Side::Source => source,
            Side::Destination => destination,
        })
    }
}

// === impl Kernel: a walk through the compiled program ===

#[derive(Debug, Default)]
struct Kernel {
    sets: BTreeMap<SetName, BTreeSet<Member>>,
    chains: BTreeMap<(TableId, ChainName), Arc<Chain>>,
    hooks: BTreeMap<(TableId, BaseChain), Hooks>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Accept,
    Drop,
    /// The chain's end, or a return.
    Back,
}

impl Kernel {
    fn apply(&mut self, changes: &Changes) {
        let removed = |change: &SetChange| *change == SetChange::Remove;
        for ((_, name), change) in changes.sets.iter().filter(|(_, change)| !removed(change)) {
            match change {
                SetChange::Replace { members, .. } => drop(self.sets.insert(name.clone(), members.clone())),
                SetChange::Delta { added, removed } => {
                    let members = self.sets.get_mut(name).unwrap();
                    members.retain(|member| !removed.contains(member));
                    members.extend(added);
                }
                SetChange::Remove => {}
            }
        }
        for (id, table) in &changes.tables {
            for (name, chain) in &table.chains {
                match chain {
                    Some(chain) => drop(self.chains.insert((*id, name.clone()), Arc::clone(chain))),
                    None => drop(self.chains.remove(&(*id, name.clone()))),
                }
            }
            for (base, hooks) in &table.hooks {
                self.hooks.insert((*id, *base), hooks.clone());
            }
        }
        for ((_, name), _) in changes.sets.iter().filter(|(_, change)| removed(change)) {
            self.sets.remove(name);
        }
    }

    /// Whether the packet is forwarded.
    fn forwards(&self, packet: &Packet) -> bool {
        let mut mark = packet.mark;
        for (table, base) in [(Table::Raw, BaseChain::Prerouting), (Table::Filter, BaseChain::Forward)] {
            let id = TableId { family: packet.family(), table };
            let hooks = &self.hooks[&(id, base)];
            for rules in [&hooks.inserts, &hooks.appends] {
                match self.walk(id, rules, packet, &mut mark) {
                    End::Accept => break,
                    End::Drop => return false,
                    End::Back => {}
                }
            }
        }
        true
    }

    fn walk(&self, id: TableId, rules: &[program::Rule], packet: &Packet, mark: &mut u32) -> End {
        for rule in rules {
            if !rule.matches.iter().all(|condition| self.meets(condition, packet, *mark)) {
                continue;
            }
            let Some(action) = &rule.action else { continue };
            match action {
                Action::Accept => return End::Accept,
                Action::Drop | Action::Reject => return End::Drop,
                Action::Return => return End::Back,
                Action::Jump(chain) | Action::Goto(chain) => {
                    let chain = self.chains.get(&(id, chain.clone())).unwrap();
                    let end = self.walk(id, &chain.rules, packet, mark);
                    if end != End::Back || matches!(action, Action::Goto(_)) {
                        return end;
                    }
                }
                Action::SetMark(bits) => *mark |= bits,
                Action::ClearMark(bits) => *mark &= !bits,
                Action::SetMaskedMark { value, mask } => *mark = *mark & !mask | value,
                Action::Log { .. } | Action::NfLog { .. } => {}
                other => panic!("unexpected {other:?}"),
            }
        }
        End::Back
    }

    fn meets(&self, condition: &Match, packet: &Packet, mark: u32) -> bool {
        let interface = |wanted: &InterfaceMatch, name: &str| match wanted {
            InterfaceMatch::Exact(exact) => name == exact,
            InterfaceMatch::Prefix(prefix) => name.starts_with(prefix.as_str()),
        };
        let number = |protocol: &Protocol| protocol.number().unwrap();
        match condition {
            Match::MarkClear(bits) => mark & bits == 0,
            Match::MarkAny(bits) => mark & bits != 0,
            Match::MarkIs { value, mask: bits } => mark & bits == *value,
            Match::MarkIsNot { value, mask: bits } => mark & bits != *value,
            Match::In(wanted) => interface(wanted, packet.from),
            Match::Out(wanted) => interface(wanted, packet.to),
            Match::ReversePathFailed => false,
            Match::ConnTrack { negated, states } => states.contains(&ConnState::New) != *negated,
            Match::Protocol { negated, protocol } => (number(protocol) == packet.protocol) != *negated,
            Match::Net { side, negated, net } => net.contains(&packet.address(*side)) != *negated,
            Match::Address { side, address } => packet.address(*side) == *address,
            Match::Set { side, negated, set, with_port } => {
                let address = packet.address(*side);
                let is_in = self.sets[set].iter().any(|member| match *member {
                    Member::Address(member) => member == address,
                    Member::Net(net) => net.contains(&address),
                    Member::AddressPort { address: member, protocol, port } => {
                        assert!(with_port);
                        member == address && protocol == packet.protocol && packet.port(*side) == Some(port)
                    }
                });
                is_in != *negated
            }
            Match::Ports { side, negated, ports } => {
                let port = packet.port(*side).expect("only packets with ports get here");
                ports.iter().any(|range| (range.first..=range.last).contains(&port)) != *negated
            }
            Match::Icmp { family, negated, icmp } => {
                assert_eq!(*family, packet.family());
                let (kind, code) = packet.icmp;
                (icmp.kind == kind && icmp.code.is_none_or(|wanted| wanted == code)) != *negated
            }
            other => panic!("unexpected {other:?}"),
        }
    }
}

// === impl Store: what is stored, and what policy.md says about it ===

#[derive(Clone, Debug, Default)]
struct Store(BTreeMap<UpdateKey, Update>);

/// Something with addresses, for selectors.
struct Object<'a> {
    labels: Inherited<'a>,
    addresses: Vec<IpNet>,
    ports: &'a [model::EndpointPort],
}

/// B-1.
struct Inherited<'a> {
    own: &'a model::Labels,
    profiles: Vec<Option<&'a model::Labels>>,
}

impl LabelSource for Inherited<'_> {
    fn label(&self, name: &str) -> Option<&str> {
        let inherited = || self.profiles.iter().flatten().find_map(|labels| labels.get(name));
        self.own.get(name).or_else(inherited).map(AsRef::as_ref)
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Result {
    Allow,
    Drop,
    Pass,
    NoMatch,
}

impl Store {
    fn put(&mut self, update: Update) {
        if build::is_absent(&update) {
            self.0.remove(&update.key());
        } else {
            self.0.insert(update.key(), update);
        }
    }

    fn endpoints(&self) -> impl Iterator<Item = (&WorkloadEndpointKey, &WorkloadEndpoint)> {
        self.0.values().filter_map(|update| match update {
            Update::WorkloadEndpoint(key, Some(value)) => Some((key, value.as_ref())),
            _ => None,
        })
    }

    fn network_sets(&self) -> impl Iterator<Item = &NetworkSet> {
        self.0.values().filter_map(|update| match update {
            Update::NetworkSet(_, Some(value)) => Some(value.as_ref()),
            _ => None,
        })
    }

    fn policies(&self) -> impl Iterator<Item = (&PolicyKey, &Policy)> {
        self.0.values().filter_map(|update| match update {
            Update::Policy(key, Some(value)) => Some((key, value.as_ref())),
            _ => None,
        })
    }

    fn tier(&self, name: &Name) -> Option<Tier> {
        match self.0.get(&UpdateKey::Tier(name.clone())) {
            Some(Update::Tier(_, tier)) => *tier,
            _ => None,
        }
    }

    fn profile(&self, name: &Name) -> Option<&ProfileRules> {
        match self.0.get(&UpdateKey::ProfileRules(name.clone())) {
            Some(Update::ProfileRules(_, rules)) => rules.as_deref(),
            _ => None,
        }
    }

    fn inherited<'a>(&'a self, own: &'a model::Labels, profiles: &'a [Name]) -> Inherited<'a> {
        let labels = |name: &Name| match self.0.get(&UpdateKey::ProfileLabels(name.clone())) {
            Some(Update::ProfileLabels(_, labels)) => labels.as_deref(),
            _ => None,
        };
        Inherited { own, profiles: profiles.iter().map(labels).collect() }
    }

    fn objects(&self) -> Vec<Object<'_>> {
        let single = |address: IpAddr| IpNet::from(address);
        let endpoints = self.endpoints().map(|(_, endpoint)| Object {
            labels: self.inherited(&endpoint.labels, &endpoint.profiles),
            addresses: {
                let v4 = endpoint.v4_nets.iter().map(|net| single(net.addr().into()));
                v4.chain(endpoint.v6_nets.iter().map(|net| single(net.addr().into()))).collect()
            },
            ports: &endpoint.ports,
        });
        let sets = self.network_sets().map(|set| Object {
            labels: self.inherited(&set.labels, &set.profiles),
            addresses: set.nets.clone(),
            ports: &[],
        });
        endpoints.chain(sets).collect()
    }

    /// The endpoint that has an interface (netfilter.md 8.3).
    fn owner(&self, interface: &str) -> Option<(&WorkloadEndpointKey, &WorkloadEndpoint)> {
        self.endpoints()
            .filter(|(key, value)| &*key.host == HOST && &*value.interface == interface)
            .min_by_key(|(key, _)| (key.orchestrator.as_bytes(), key.workload.as_bytes(), key.endpoint.as_bytes()))
    }

    /// T-23.
    fn allows(&self, packet: &Packet) -> bool {
        let objects = self.objects();
        let judged =
            |interface: &str, ingress| !interface.starts_with("cali") || self.one(&objects, interface, ingress, packet);
        judged(packet.from, false) && judged(packet.to, true)
    }

    /// Section 3.3 for one endpoint.
    fn one(&self, objects: &[Object<'_>], interface: &str, ingress: bool, packet: &Packet) -> bool {
        let Some((_, endpoint)) = self.owner(interface) else { return false };
        if !endpoint.active || (!ingress && packet.protocol == 4) {
            return false;
        }
        if !ingress && packet.protocol == 17 && packet.ports.1 == 4789 {
            return false;
        }
        let labels = self.inherited(&endpoint.labels, &endpoint.profiles);
        let mut policies: Vec<(&PolicyKey, &Policy)> = self
            .policies()
            .filter(|(_, policy)| policy.selector.matches(&labels) && !policy.do_not_track && !policy.pre_dnat)
            .filter(|(_, policy)| if ingress { policy.ingress } else { policy.egress })
            .collect();
        let order = |order: Option<f64>| order.unwrap_or(f64::INFINITY);
        policies.sort_by(|(a_key, a), (b_key, b)| {
            let tier = |policy: &Policy| match self.tier(&policy.tier) {
                Some(tier) => (0, order(tier.order)),
                None => (1, 0.0),
            };
            let text = |key: &PolicyKey| format!("{}/{}/{}", key.name, key.namespace, key.kind.as_str());
            tier(a)
                .partial_cmp(&tier(b))
                .unwrap()
                .then_with(|| a.tier.cmp(&b.tier))
                .then_with(|| order(a.order).partial_cmp(&order(b.order)).unwrap())
                .then_with(|| text(a_key).cmp(&text(b_key)))
        });
        for tier in policies.chunk_by(|(_, a), (_, b)| a.tier == b.tier) {
            let mut result = Result::NoMatch;
            for (_, policy) in tier {
                let rules = if ingress { &policy.inbound } else { &policy.outbound };
                result = judge(objects, rules, packet);
                if result != Result::NoMatch {
                    break;
                }
            }
            match result {
                Result::Allow => return true,
                Result::Drop => return false,
                Result::Pass => {}
                Result::NoMatch => {
                    if !tier.iter().any(|(_, policy)| self.tier(&policy.tier).is_some_and(|tier| tier.default_pass)) {
                        return false;
                    }
                }
            }
        }
        for name in &endpoint.profiles {
            let Some(profile) = self.profile(name) else { return false };
            let rules = if ingress { &profile.inbound } else { &profile.outbound };
            match judge(objects, rules, packet) {
                Result::Allow => return true,
                Result::Drop => return false,
                Result::Pass | Result::NoMatch => {}
            }
        }
        false
    }
}

fn judge(objects: &[Object<'_>], rules: &[model::Rule], packet: &Packet) -> Result {
    for rule in rules.iter().filter(|rule| applies(objects, rule, packet)) {
        match rule.action {
            Verdict::Allow => return Result::Allow,
            Verdict::Deny => return Result::Drop,
            Verdict::Pass => return Result::Pass,
            Verdict::Log => {}
        }
    }
    Result::NoMatch
}

///
fn applies(objects: &[Object<'_>], rule: &model::Rule, packet: &Packet) -> bool {
    let family = packet.family();
    if rule.family.is_some_and(|only| only != family) {
        return false;
    }
    let is = |protocol: &Option<Protocol>| protocol.as_ref().map(|protocol| protocol.number() == Some(packet.protocol));
    if is(&rule.protocol) == Some(false) || is(&rule.not_protocol) == Some(true) {
        return false;
    }
    let pings =
        |icmp: model::IcmpMatch| icmp.kind == packet.icmp.0 && icmp.code.is_none_or(|code| code == packet.icmp.1);
    if rule.icmp.is_some_and(|icmp| !pings(icmp)) || rule.not_icmp.is_some_and(pings) {
        return false;
    }
    let wanted = rule.protocol.as_ref();
    side_applies(objects, &rule.source, wanted, Side::Source, packet)
        && side_applies(objects, &rule.destination, wanted, Side::Destination, packet)
}

fn side_applies(
    objects: &[Object<'_>],
    entity: &EntityMatch,
    wanted: Option<&Protocol>,
    side: Side,
    packet: &Packet,
) -> bool {
    let (address, family) = (packet.address(side), packet.family());
    for nets in [&entity.nets, &entity.not_nets] {
        if !nets.is_empty() && !nets.iter().any(|net| Family::of(net) == family) {
            return false;
        }
    }
    if !entity.nets.is_empty() && !entity.nets.iter().any(|net| net.contains(&address)) {
        return false;
    }
    if entity.not_nets.iter().any(|net| net.contains(&address)) {
        return false;
    }
    // An object that is meant by the positive and not by the negative selector.
    let positive = |object: &&Object<'_>| {
        entity.selector.as_ref().is_none_or(|selector| selector.matches(&object.labels))
            && (entity.selector.is_none()
                || entity.not_selector.as_ref().is_none_or(|selector| !selector.matches(&object.labels)))
    };
    let has = |object: &&Object<'_>| object.addresses.iter().any(|net| net.contains(&address));
    let numeric = |ports: &[Port]| {
        ports.iter().any(|port| match port {
            Port::Range(PortRange { first, last }) => {
                packet.port(side).is_some_and(|port| (*first..=*last).contains(&port))
            }
            Port::Named(_) => false,
        })
    };
    let named = |ports: &[Port]| {
        let fits = |protocol: u8| match wanted {
            None => true,
            Some(wanted) => match wanted.number() {
                Some(number @ (17 | 132)) => number == protocol,
                _ => protocol == 6,
            },
        };
        ports.iter().any(|port| match port {
            Port::Range(_) => false,
            Port::Named(name) => objects.iter().filter(positive).filter(has).any(|object| {
                object.ports.iter().any(|port| {
                    port.name == *name
                        && fits(port.protocol)
                        && port.protocol == packet.protocol
                        && packet.port(side) == Some(port.port)
                })
            }),
        })
    };
    let only_named = !entity.ports.is_empty() && entity.ports.iter().all(|port| matches!(port, Port::Named(_)));
    if entity.selector.is_some() && !only_named && !objects.iter().filter(positive).any(|object| has(&object)) {
        return false;
    }
    if let (None, Some(negative)) = (&entity.selector, &entity.not_selector)
        && objects.iter().filter(|object| negative.matches(&object.labels)).any(|object| has(&object))
    {
        return false;
    }
    if !entity.ports.is_empty() && !numeric(&entity.ports) && !named(&entity.ports) {
        return false;
    }
    !numeric(&entity.not_ports) && !named(&entity.not_ports)
}

// === impl Dice: random states and packets, small enough that things meet ===

struct Dice(u64);

const SELECTORS: [&str; 12] = [
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
    "b in {}",
];
const V4: [&str; 5] = ["10.0.0.1", "10.0.0.2", "10.0.1.1", "192.0.2.1", "172.16.0.1"];
const V6: [&str; 5] = ["fd00::1", "fd00::2", "fd00:0:0:1::1", "2001:db8::1", "fe80::1"];
const NETS: [&str; 12] = [
    "10.0.0.0/24",
    "10.0.0.0/8",
    "10.0.1.1/32",
    "192.0.2.0/24",
    "0.0.0.0/0",
    "128.0.0.0/1",
    "fd00::/64",
    "fd00::/8",
    "fd00::1/128",
    "2001:db8::/32",
    "::/0",
    "8000::/1",
];
const INTERFACES: [&str; 4] = ["cali1", "cali12", "cali2", "cali"];
const PROFILES: [&str; 3] = ["p", "q", "projectcalico-default-allow"];
const TIERS: [&str; 3] = ["default", "t", "u"];

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % sides
    }

    fn one_in(&mut self, sides: u64) -> bool {
        self.roll(sides) == 0
    }

    fn pick<T: Clone>(&mut self, of: &[T]) -> T {
        of[self.roll(of.len() as u64) as usize].clone()
    }

    fn some<T: Clone>(&mut self, of: &[T], at_most: u64) -> Vec<T> {
        (0..self.roll(at_most + 1)).map(|_| self.pick(of)).collect()
    }

    fn selector(&mut self) -> Arc<Selector> {
        build::selector(self.pick(&SELECTORS))
    }

    fn nets(&mut self) -> Vec<IpNet> {
        (0..=self.roll(4)).map(|_| self.pick(&NETS).parse().unwrap()).collect()
    }

    fn ports(&mut self, numeric: bool) -> Vec<Port> {
        let most = if self.one_in(3) { 40 } else { 3 };
        let port = |dice: &mut Self| match dice.roll(3) {
            0 if numeric => Port::Range(PortRange { first: dice.roll(6) as u16 + 1, last: 6 }),
            1 if numeric => Port::Range(PortRange::single(dice.pick(&[1, 3, 5, 80, 300]))),
            _ => Port::Named(dice.pick(&["http", "dns"]).into()),
        };
        (0..=self.roll(most)).map(|_| port(self)).collect()
    }

    /// Few fields, so that rules match now and then.
    fn entity(&mut self, named: bool, numeric: bool) -> EntityMatch {
        let mut entity = EntityMatch::default();
        for _ in 0..self.roll(3) {
            match self.roll(9) {
                0..=2 => entity.nets = self.nets(),
                3 => entity.not_nets = self.nets(),
                4 | 5 => entity.selector = Some(self.selector()),
                6 => entity.not_selector = Some(self.selector()),
                7 if named => entity.ports = self.ports(numeric),
                8 if named => entity.not_ports = self.ports(numeric),
                _ => {}
            }
        }
        entity
    }

    fn rule(&mut self) -> model::Rule {
        let mut rule =
            build::rule_of(self.pick(&[Verdict::Allow, Verdict::Allow, Verdict::Deny, Verdict::Pass, Verdict::Log]));
        rule.family = self.pick(&[None, None, None, None, Some(Family::V4), Some(Family::V6)]);
        let (mut named, mut numeric) = (false, false);
        match self.roll(6) {
            0 => named = true,
            1 | 2 => {
                let ports = [Protocol::Number(6), Protocol::Name("udp".into()), Protocol::Number(132)];
                rule.protocol = Some(self.pick(&ports));
                (named, numeric) = (true, true);
            }
            3 => {
                let number = self.pick(&[1, 58]);
                rule.protocol = Some(Protocol::Number(number));
                let icmp = |dice: &mut Self| {
                    let code = dice.pick(&[None, Some(0), Some(1)]);
                    dice.one_in(2).then(|| model::IcmpMatch { kind: dice.roll(3) as u8, code })
                };
                (rule.icmp, rule.not_icmp) = (icmp(self), icmp(self));
                if rule.icmp.is_some() || rule.not_icmp.is_some() {
                    rule.family = Some(if number == 1 { Family::V4 } else { Family::V6 });
                }
            }
            4 => rule.not_protocol = Some(Protocol::Number(self.pick(&[6, 17, 47]))),
            _ => {}
        }
        rule.source = self.entity(named, numeric);
        rule.destination = self.entity(named, numeric);
        rule
    }

    fn rules(&mut self) -> Vec<model::Rule> {
        (0..self.roll(4)).map(|_| self.rule()).collect()
    }

    fn labels(&mut self) -> Vec<&'static str> {
        self.some(&["a=1", "a=2", "a=12", "b=1", "b"], 2)
    }

    fn order(&mut self) -> Option<f64> {
        self.pick(&[None, Some(0.0), Some(-0.0), Some(1.0), Some(-1.5)])
    }

    fn update(&mut self) -> Update {
        let update = match self.roll(9) {
            0..=2 => {
                let host = self.pick(&[HOST, HOST, "h2"]);
                let name = self.roll(5);
                let mut wep = build::wep(&format!("{host}/k8s/ns/w{name}/e")).interface(self.pick(&INTERFACES));
                for ip in self.some(&V4, 2).into_iter().chain(self.some(&V6, 2)) {
                    wep = wep.ip(ip);
                }
                for label in self.labels() {
                    wep = wep.label(label);
                }
                for profile in self.some(&PROFILES, 2) {
                    wep = wep.profile(profile);
                }
                for port in self.some(&["http/tcp/80", "http/udp/80", "dns/udp/3", "dns/tcp/3", "http/sctp/1"], 3) {
                    wep = wep.port(port);
                }
                let active = !self.one_in(10);
                wep.with(|wep| wep.active = active).build()
            }
            3..=5 => {
                let key = self.pick(&["gnp/a", "gnp/b", "np/ns/a", "np/ns/b", "np/ns/c", "np/other/a", "gnp/c"]);
                let mut policy = build::policy(key).tier(self.pick(&TIERS));
                // Few selectors, so that groups form.
                policy = policy.selector(if self.one_in(2) { "all()" } else { self.pick(&SELECTORS) });
                let (order, inbound, outbound) = (self.order(), self.rules(), self.rules());
                let types = self.pick(&[(true, true), (true, true), (true, false), (false, true), (false, false)]);
                let flags = (self.one_in(12), self.one_in(12), self.one_in(12), self.one_in(12));
                policy
                    .with(|policy| {
                        policy.order = order;
                        (policy.inbound, policy.outbound) = (inbound, outbound);
                        (policy.ingress, policy.egress) = types;
                        (policy.do_not_track, policy.pre_dnat, policy.apply_on_forward, policy.always_needed) = flags;
                    })
                    .build()
            }
            6 => {
                let rules = ProfileRules { inbound: self.rules(), outbound: self.rules() };
                Update::ProfileRules(self.pick(&["p", "q"]).into(), Some(Arc::new(rules)))
            }
            7 => match self.roll(2) {
                0 => build::profile_labels(self.pick(&["p", "q", "kns.ns"]), self.labels().join(",").as_str()),
                _ => build::tier(self.pick(&TIERS), self.order(), self.one_in(2)),
            },
            _ => {
                let nets = self.some(&NETS, 3);
                build::network_set(self.pick(&["ns/s", "g"]), &self.labels().join(","), &nets)
            }
        };
        if self.one_in(4) { build::absent(&update) } else { update }
    }

    fn packet(&mut self) -> Packet {
        let addresses = if self.one_in(2) { V4 } else { V6 };
        let (mut from, mut to) = ("eth0", "eth0");
        match self.roll(5) {
            0 | 1 => from = self.pick(&INTERFACES),
            2 | 3 => to = self.pick(&INTERFACES),
            _ => (from, to) = (self.pick(&INTERFACES), self.pick(&INTERFACES)),
        }
        Packet {
            from,
            to,
            source: self.pick(&addresses).parse().unwrap(),
            destination: self.pick(&addresses).parse().unwrap(),
            protocol: self.pick(&[6, 6, 17, 17, 132, 1, 58, 47, 4]),
            ports: (self.pick(&[1, 3, 80, 300]), self.pick(&[1, 3, 80, 300, 4789])),
            icmp: (self.roll(3) as u8, self.roll(2) as u8),
            mark: (self.roll(1 << 16) as u32) << 16 & !Options::default().marks.drop,
        }
    }
}

impl fmt::Display for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.values().try_for_each(|update| writeln!(f, "{update:?}"))
    }
}

/// A store with its own graph, compiler and kernel.
struct World {
    store: Store,
    graph: Graph,
    compiler: Compiler,
    kernel: Kernel,
}

impl World {
    fn new() -> Self {
        let (graph, compiler) = (Graph::new(HOST.into()), Compiler::new(Options::default()));
        let mut world = Self { store: Store::default(), graph, compiler, kernel: Kernel::default() };
        model::convert::static_updates().into_iter().for_each(|update| world.put(update));
        world
    }

    fn put(&mut self, update: Update) {
        self.store.put(update.clone());
        self.graph.apply(update);
    }

    fn judge(&mut self, dice: &mut Dice, n_packets: usize) -> std::result::Result<(), TestCaseError> {
        let (changes, complaints) = self.compiler.compile(&self.graph.take_batch());
        prop_assert!(complaints.is_empty(), "{:?}", complaints);
        self.kernel.apply(&changes);
        for _ in 0..n_packets {
            let packet = dice.packet();
            let (expected, got) = (self.store.allows(&packet), self.kernel.forwards(&packet));
            prop_assert_eq!(got, expected, "{:?}\n{}", packet, self.store);
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn after_any_history_packets_are_judged_as_the_specification_says(seed in any::<u64>(), steps in 1..60_usize) {
        let mut dice = Dice(seed);
        let mut world = World::new();
        for step in 0..steps {
            world.put(dice.update());
            if step + 1 == steps || dice.one_in(3) {
                world.judge(&mut dice, 40)?;
            }
        }
    }

    /// Less happens than above, and more of it matches.
    #[test]
    fn rules_of_all_shapes_judge_packets_as_the_specification_says(seed in any::<u64>()) {
        let mut dice = Dice(seed);
        let mut world = World::new();
        let endpoint = |n: usize, interface: &str| {
            let profiles = |wep: build::WepBuilder| wep.profile("p").profile("q");
            profiles(build::wep(&format!("{HOST}/k8s/ns/w{n}/e")).interface(interface).ip(V4[n]).ip(V6[n]))
        };
        world.put(endpoint(0, "cali1").label("a=1").port("http/tcp/80").port("dns/udp/3").build());
        world.put(endpoint(1, "cali2").label("b=1").port("http/tcp/1").port("dns/udp/300").build());
        world.put(build::network_set("g", "a=2", &["192.0.2.0/24", "2001:db8::/32"]));
        for (tier, name) in [("t", "gnp/a"), ("u", "gnp/b"), ("u", "gnp/c")] {
            world.put(build::tier(tier, None, dice.one_in(2)));
            if dice.one_in(3) {
                let (inbound, outbound) = (dice.rules(), dice.rules());
                let rules = |policy: &mut Policy| (policy.inbound, policy.outbound) = (inbound, outbound);
                world.put(build::policy(name).tier(tier).with(rules).build());
            }
        }
        for profile in ["p", "q"] {
            let rules = ProfileRules { inbound: dice.rules(), outbound: dice.rules() };
            world.put(Update::ProfileRules(profile.into(), Some(Arc::new(rules))));
        }
        world.judge(&mut dice, 200)?;
    }
}
