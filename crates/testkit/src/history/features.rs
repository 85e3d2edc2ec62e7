//! What a history holds, found by looking at it and not by asking who made it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::ops::AddAssign;

use ipnet::IpNet;
use model::{EntityMatch, Labels, Name, Port, Rule, Update};

use super::{HOST, Step};
use crate::build::is_absent;
use crate::naive::facts;

/// Names of features and in how many histories each was found.
#[derive(Clone, Debug, Default)]
pub struct Features(BTreeMap<&'static str, u64>);

impl Features {
    /// Counts what one history holds.
    pub fn note(&mut self, history: &[Step]) {
        for feature in features(history) {
            self.0.entry(feature).or_default().add_assign(1);
        }
    }

    pub fn of(&self, feature: &str) -> u64 {
        self.0.get(feature).copied().unwrap_or_default()
    }
}

fn features(history: &[Step]) -> BTreeSet<&'static str> {
    let mut found = BTreeSet::new();
    for (update, _) in history {
        let rules: Vec<&Rule> = match update {
            Update::Policy(_, Some(policy)) => policy.inbound.iter().chain(&policy.outbound).collect(),
            Update::ProfileRules(_, Some(rules)) => rules.inbound.iter().chain(&rules.outbound).collect(),
            Update::WorkloadEndpoint(..)
            | Update::Policy(_, None)
            | Update::Tier(..)
            | Update::ProfileRules(_, None)
            | Update::ProfileLabels(..)
            | Update::NetworkSet(..)
            | Update::HostEndpoint(..)
            | Update::Link(..)
            | Update::Config(..)
            | Update::Ready(_) => Vec::new(),
        };
        rules.into_iter().for_each(|rule| of_rule(rule, &mut found));
    }
    if history.iter().filter(|(_, cut)| *cut).count() > 1 {
        found.insert("several batches");
    }
    let mut gone = BTreeSet::new();
    for (update, _) in history {
        let back = !is_absent(update) && gone.contains(&update.key());
        if back {
            found.insert("an object that comes back");
        }
        if is_absent(update) {
            gone.insert(update.key());
        }
    }
    of_facts(history, &mut found);
    found
}

fn of_rule(rule: &Rule, found: &mut BTreeSet<&'static str>) {
    if rule.icmp.is_some() || rule.not_icmp.is_some() {
        found.insert("ICMP types");
    }
    for EntityMatch { nets, not_nets, selector, not_selector, ports, not_ports, service } in
        [&rule.source, &rule.destination]
    {
        let is_named = |port: &Port| matches!(port, Port::Named(_));
        let families = |nets: &[IpNet]| {
            let v4 = nets.iter().filter(|net| matches!(net, IpNet::V4(_))).count();
            v4 > 0 && v4 < nets.len()
        };
        let tests = [
            ("named ports", ports.iter().any(is_named)),
            ("negated named ports", not_ports.iter().any(is_named)),
            ("named and numeric ports", ports.iter().any(is_named) && !ports.iter().all(is_named)),
            ("negated ports", not_ports.iter().any(|port| !is_named(port))),
            ("more than 15 ports", ports.len() > 15 || not_ports.len() > 15),
            ("negated selector alone", not_selector.is_some() && selector.is_none()),
            ("negated selector beside a selector", not_selector.is_some() && selector.is_some()),
            ("several CIDR blocks", nets.len() > 1),
            ("negated CIDR blocks", !not_nets.is_empty()),
            ("CIDR blocks of both families", families(nets) || families(not_nets)),
            ("services", service.is_some()),
        ];
        found.extend(tests.into_iter().filter(|(_, is_there)| *is_there).map(|(feature, _)| feature));
    }
}

/// What two objects have in common at the end of the history.
fn of_facts(history: &[Step], found: &mut BTreeSet<&'static str>) {
    let facts = facts(history.iter().map(|(update, _)| update.clone()));
    // By address: labels and profile lists of its owners, which are a class.
    let mut owners: BTreeMap<IpAddr, Vec<(Labels, Vec<Name>)>> = BTreeMap::new();
    let mut tiers = BTreeSet::new();
    let mut passes = false;
    for fact in facts.values() {
        let (addresses, class): (Vec<IpAddr>, _) = match fact {
            Update::WorkloadEndpoint(_, Some(value)) => {
                let v4 = value.v4_nets.iter().map(|net| IpAddr::V4(net.addr()));
                let v6 = value.v6_nets.iter().map(|net| IpAddr::V6(net.addr()));
                (v4.chain(v6).collect(), (value.labels.clone(), value.profiles.clone()))
            }
            Update::HostEndpoint(_, Some(value)) => {
                found.insert(if *value.host == *HOST { "local host endpoints" } else { "remote host endpoints" });
                let v4 = value.expected_v4.iter().map(|address| IpAddr::V4(*address));
                let v6 = value.expected_v6.iter().map(|address| IpAddr::V6(*address));
                (v4.chain(v6).collect(), (value.labels.clone(), value.profiles.clone()))
            }
            Update::NetworkSet(_, Some(value)) => {
                let overlaps = |a: &IpNet, b: &IpNet| a != b && (a.contains(b) || b.contains(a));
                if value.nets.iter().any(|a| value.nets.iter().any(|b| overlaps(a, b))) {
                    found.insert("overlapping networks");
                }
                continue;
            }
            Update::Policy(_, Some(value)) => {
                tiers.insert(value.tier.clone());
                continue;
            }
            Update::Tier(_, Some(value)) => {
                passes |= value.default_pass;
                continue;
            }
            Update::WorkloadEndpoint(_, None)
            | Update::Policy(_, None)
            | Update::Tier(_, None)
            | Update::ProfileRules(..)
            | Update::ProfileLabels(..)
            | Update::NetworkSet(_, None)
            | Update::HostEndpoint(_, None)
            | Update::Link(..)
            | Update::Config(..)
            | Update::Ready(_) => continue,
        };
        if addresses.iter().any(IpAddr::is_ipv4) && addresses.iter().any(IpAddr::is_ipv6) {
            found.insert("endpoints of both families");
        }
        let distinct: BTreeSet<&Name> = class.1.iter().collect();
        if distinct.len() < class.1.len() {
            found.insert("profiles listed twice");
        }
        for address in addresses.iter().copied().collect::<BTreeSet<_>>() {
            owners.entry(address).or_default().push(class.clone());
        }
    }
    for classes in owners.values() {
        for (index, class) in classes.iter().enumerate() {
            for other in &classes[..index] {
                found.insert(if class == other { "an address twice in a class" } else { "an address in two classes" });
            }
        }
    }
    if passes && tiers.len() > 1 {
        found.insert("several tiers, one with pass");
    }
}
