//! The whole output of the graph from the whole input, with nested loops.
//!
//! Written from policy.md 2 to 6 and host.md 8.4 and not from the graph: it is the slow twin that the
//! graph is compared with. Nothing here is incremental, indexed or shared.
#![allow(clippy::expect_used, clippy::unwrap_used, reason = "for tests")]

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use graph::{
    EndpointProgram, HostEndpointProgram, HostTiers, PolicyProgram, PolicyRef, ProfileProgram, RuleProgram,
    SetContents, SetMember, SetType, SideProgram, TierProgram,
};
use ipnet::IpNet;
use model::selector::LabelSource;
use model::update::UpdateKey;
use model::{
    Action, EndpointPort, EntityMatch, HostEndpoint, Labels, Name, NetworkSet, Policy, PolicyKey, Port, ProfileRules,
    Rule, Selector, SetId, Tier, Update, WorkloadEndpoint, WorkloadEndpointKey,
};

use crate::build::{rule, selector};
use crate::replay::Known;

/// The present facts, one per object.
pub type Facts = BTreeMap<UpdateKey, Update>;

/// Makes the facts that a history of updates ends with.
pub fn facts(history: impl IntoIterator<Item = Update>) -> Facts {
    let mut facts = Facts::new();
    for update in history {
        if crate::build::is_absent(&update) {
            facts.remove(&update.key());
        } else {
            facts.insert(update.key(), update);
        }
    }
    facts
}

#[derive(Debug, Default)]
struct World {
    endpoints: Vec<(WorkloadEndpointKey, Arc<WorkloadEndpoint>)>,
    policies: Vec<(PolicyKey, Arc<Policy>)>,
    tiers: BTreeMap<Name, Tier>,
    profile_rules: BTreeMap<Name, Arc<ProfileRules>>,
    profile_labels: BTreeMap<Name, Arc<Labels>>,
    network_sets: Vec<Arc<NetworkSet>>,
    host_endpoints: Vec<(Name, Arc<HostEndpoint>)>,
}

#[derive(Debug)]
struct EffectiveLabels(BTreeMap<Name, Name>);

impl LabelSource for EffectiveLabels {
    fn label(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(AsRef::as_ref)
    }
}

/// Where the members of a set come from.
#[derive(Clone, Debug)]
enum Source {
    Selector(Arc<Selector>),
    NamedPort(Arc<Selector>, &'static str, Name),
    Service(SetType),
}

/// Computes everything that follows from the facts for a host.
pub fn evaluate(host: &str, facts: &Facts) -> Known {
    let mut world = World::default();
    let mut known = Known::default();
    for fact in facts.values().cloned() {
        match fact {
            Update::WorkloadEndpoint(key, Some(value)) => world.endpoints.push((key, value)),
            Update::Policy(key, Some(value)) => world.policies.push((key, value)),
            Update::Tier(name, Some(value)) => drop(world.tiers.insert(name, value)),
            Update::ProfileRules(name, Some(value)) => drop(world.profile_rules.insert(name, value)),
            Update::ProfileLabels(name, Some(value)) => drop(world.profile_labels.insert(name, value)),
            Update::NetworkSet(_, Some(value)) => world.network_sets.push(value),
            Update::HostEndpoint(name, Some(value)) => world.host_endpoints.push((name, value)),
            Update::Link(name, Some(value)) => drop(known.links.insert(name, value)),
            Update::WorkloadEndpoint(_, None)
            | Update::Policy(_, None)
            | Update::Tier(_, None)
            | Update::ProfileRules(_, None)
            | Update::ProfileLabels(_, None)
            | Update::NetworkSet(_, None)
            | Update::HostEndpoint(_, None)
            | Update::Link(_, None)
            | Update::Config(..)
            | Update::Ready(_) => (),
        }
    }
    // K-6: one profile is always there.
    let allow = vec![rule("allow")];
    world.profile_rules.insert(
        "projectcalico-default-allow".into(),
        Arc::new(ProfileRules { inbound: allow.clone(), outbound: allow }),
    );

    let mut needs: BTreeMap<SetId, Source> = BTreeMap::new();
    let local: Vec<_> = world.endpoints.iter().filter(|(key, _)| key.host.as_ref() == host).collect();
    let local_hosts: Vec<_> = world.host_endpoints.iter().filter(|(_, hep)| hep.host.as_ref() == host).collect();

    //
    for (key, policy) in &world.policies {
        let matches = local.iter().any(|(_, wep)| world.matches(&policy.selector, &wep.labels, &wep.profiles))
            || local_hosts.iter().any(|(_, hep)| world.matches(&policy.selector, &hep.labels, &hep.profiles));
        if matches || policy.always_needed {
            let program = PolicyProgram {
                tier: policy.tier.clone(),
                inbound: programs(&policy.inbound, &mut needs),
                outbound: programs(&policy.outbound, &mut needs),
                untracked: policy.do_not_track,
                pre_dnat: policy.pre_dnat,
                original_selector: policy.original_selector.clone(),
                always_needed: policy.always_needed,
            };
            known.policies.insert(key.clone(), Arc::new(program));
        }
    }

    //
    let listed_by_workloads = local.iter().flat_map(|(_, wep)| &wep.profiles);
    let listed_by_hosts = local_hosts.iter().flat_map(|(_, hep)| &hep.profiles);
    let listed: BTreeSet<&Name> = listed_by_workloads.chain(listed_by_hosts).collect();
    for name in listed {
        let program = match world.profile_rules.get(name) {
            Some(rules) => ProfileProgram {
                inbound: programs(&rules.inbound, &mut needs),
                outbound: programs(&rules.outbound, &mut needs),
                missing: false,
            },
            None => ProfileProgram {
                inbound: programs(&[rule("deny")], &mut needs),
                outbound: programs(&[rule("deny")], &mut needs),
                missing: true,
            },
        };
        known.profiles.insert(name.clone(), Arc::new(program));
    }

    known.sets = needs.iter().map(|(id, source)| (id.clone(), world.contents(source))).collect();

    // host.md 8.4.
    let interfaces: BTreeSet<&Name> = local.iter().map(|(_, wep)| &wep.interface).collect();
    for interface in interfaces {
        let claimants = local.iter().filter(|(_, wep)| wep.interface == *interface);
        let owner = claimants
            .min_by_key(|(key, _)| (key.orchestrator.to_string(), key.workload.to_string(), key.endpoint.to_string()));
        let (key, endpoint) = owner.expect("somebody named the interface");
        let program = EndpointProgram {
            key: key.clone(),
            endpoint: Arc::clone(endpoint),
            tiers: world.tiers_of(&endpoint.labels, &endpoint.profiles, Chain::Normal).into(),
        };
        known.endpoints.insert(interface.clone(), Arc::new(program));
    }

    for (name, endpoint) in local_hosts {
        let tiers = |chain| world.tiers_of(&endpoint.labels, &endpoint.profiles, chain).into();
        let program = HostEndpointProgram {
            name: name.clone(),
            endpoint: Arc::clone(endpoint),
            tiers: HostTiers {
                untracked: tiers(Chain::Untracked),
                pre_dnat: tiers(Chain::PreDnat),
                normal: tiers(Chain::Normal),
                forward: tiers(Chain::Forward),
            },
        };
        known.host_endpoints.insert(name.clone(), Arc::new(program));
    }
    known
}

/// The four lists of T-9.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Chain {
    Untracked,
    PreDnat,
    Normal,
    Forward,
}

/// The table of T-9: whether a policy goes to a list for ingress, and for egress.
fn goes_to(policy: &Policy, chain: Chain) -> [bool; 2] {
    let lists: &[Chain] = if policy.do_not_track {
        &[Chain::Untracked]
    } else if policy.pre_dnat {
        &[Chain::PreDnat]
    } else if policy.apply_on_forward {
        &[Chain::Normal, Chain::Forward]
    } else {
        &[Chain::Normal]
    };
    let there = lists.contains(&chain);
    [there && policy.ingress, there && policy.egress && chain != Chain::PreDnat]
}

impl World {
    /// B-1: own labels, then those of the profiles in the order of the list.
    fn effective(&self, own: &Labels, profiles: &[Name]) -> EffectiveLabels {
        let mut labels = BTreeMap::new();
        for profile in profiles.iter().rev() {
            for (key, value) in self.profile_labels.get(profile).iter().flat_map(|labels| labels.iter()) {
                labels.insert(key.clone(), value.clone());
            }
        }
        labels.extend(own.iter().map(|(key, value)| (key.clone(), value.clone())));
        EffectiveLabels(labels)
    }

    fn matches(&self, selector: &Selector, own: &Labels, profiles: &[Name]) -> bool {
        selector.matches(&self.effective(own, profiles))
    }

    /// M-10, M-20.
    fn contents(&self, source: &Source) -> SetContents {
        let mut members = BTreeSet::new();
        let kind = match source {
            Source::Selector(selector) => {
                for (_, wep) in &self.endpoints {
                    if self.matches(selector, &wep.labels, &wep.profiles) {
                        members.extend(addresses(wep).map(|address| SetMember::Net(IpNet::from(address))));
                    }
                }
                for (_, hep) in &self.host_endpoints {
                    if self.matches(selector, &hep.labels, &hep.profiles) {
                        members.extend(expected(hep).map(|address| SetMember::Net(IpNet::from(address))));
                    }
                }
                for set in &self.network_sets {
                    if self.matches(selector, &set.labels, &set.profiles) {
                        members.extend(set.nets.iter().flat_map(halves).map(SetMember::Net));
                    }
                }
                SetType::Net
            }
            Source::NamedPort(selector, protocol, name) => {
                for (_, wep) in &self.endpoints {
                    if self.matches(selector, &wep.labels, &wep.profiles) {
                        let addresses: Vec<IpAddr> = addresses(wep).collect();
                        members.extend(cross(&addresses, &wep.ports, protocol, name));
                    }
                }
                for (_, hep) in &self.host_endpoints {
                    if self.matches(selector, &hep.labels, &hep.profiles) {
                        let addresses: Vec<IpAddr> = expected(hep).collect();
                        members.extend(cross(&addresses, &hep.ports, protocol, name));
                    }
                }
                SetType::AddressPort
            }
            Source::Service(kind) => *kind,
        };
        SetContents { kind, members: members.into() }
    }

    /// T-2 to T-11, T-21.
    fn tiers_of(&self, labels: &Labels, profiles: &[Name], chain: Chain) -> Vec<TierProgram> {
        let mut applying: Vec<_> = self
            .policies
            .iter()
            .filter(|(_, policy)| self.matches(&policy.selector, labels, profiles))
            .filter(|(_, policy)| goes_to(policy, chain) != [false, false])
            .collect();
        applying.sort_by(|(a_key, a), (b_key, b)| {
            let order = |policy: &Policy| policy.order.unwrap_or(f64::INFINITY);
            let text = |key: &PolicyKey| format!("{}/{}/{}", key.name, key.namespace, key.kind.as_str());
            order(a).partial_cmp(&order(b)).expect("no NaN").then(text(a_key).cmp(&text(b_key)))
        });

        let mut names: Vec<&Name> = applying.iter().map(|(_, policy)| &policy.tier).collect();
        names.sort();
        names.dedup();
        let existing_with_order =
            names.iter().filter(|name| self.tiers.get(**name).is_some_and(|tier| tier.order.is_some()));
        let mut sequence: Vec<&Name> = existing_with_order.copied().collect();
        sequence.sort_by(|a, b| {
            let order = |name: &Name| self.tiers[name].order.unwrap();
            order(a).partial_cmp(&order(b)).expect("no NaN")
        });
        sequence.extend(names.iter().filter(|name| self.tiers.get(**name).is_some_and(|tier| tier.order.is_none())));
        sequence.extend(names.iter().filter(|name| !self.tiers.contains_key(**name)));

        let mut tiers = Vec::new();
        for name in sequence {
            let list = |direction: usize| -> Vec<PolicyRef> {
                let listed =
                    applying.iter().filter(|(_, policy)| policy.tier == *name && goes_to(policy, chain)[direction]);
                listed
                    .map(|(key, policy)| PolicyRef {
                        key: key.clone(),
                        original_selector: policy.original_selector.clone(),
                    })
                    .collect()
            };
            let (ingress, egress) = (list(0), list(1));
            let staged = |policy: &PolicyRef| policy.key.kind.as_str().starts_with("Staged");
            if chain == Chain::Forward && ingress.iter().chain(&egress).all(staged) {
                continue;
            }
            let default_pass = match chain {
                Chain::Untracked | Chain::PreDnat => true,
                Chain::Normal | Chain::Forward => self.tiers.get(name).is_some_and(|tier| tier.default_pass),
            };
            tiers.push(TierProgram { name: name.clone(), ingress, egress, default_pass });
        }
        tiers
    }
}

fn addresses(wep: &WorkloadEndpoint) -> impl Iterator<Item = IpAddr> {
    let v4 = wep.v4_nets.iter().map(|net| IpAddr::V4(net.addr()));
    v4.chain(wep.v6_nets.iter().map(|net| IpAddr::V6(net.addr())))
}

/// M-10: nothing else of a host endpoint counts.
fn expected(hep: &HostEndpoint) -> impl Iterator<Item = IpAddr> {
    let v4 = hep.expected_v4.iter().map(|address| IpAddr::V4(*address));
    v4.chain(hep.expected_v6.iter().map(|address| IpAddr::V6(*address)))
}

/// M-20: every address with every port of this name whose protocol fits.
fn cross(addresses: &[IpAddr], ports: &[EndpointPort], protocol: &str, name: &str) -> Vec<SetMember> {
    let mut members = Vec::new();
    for port in ports {
        let fits = match protocol {
            "any" => true,
            "tcp" => port.protocol == 6,
            "udp" => port.protocol == 17,
            _ => port.protocol == 132,
        };
        for address in addresses.iter().filter(|_| fits && *port.name == *name) {
            members.push(SetMember::AddressPort { address: *address, protocol: port.protocol, port: port.port });
        }
    }
    members
}

/// The kernel's sets hold no network of length zero.
fn halves(net: &IpNet) -> Vec<IpNet> {
    let halves: &[&str] = match net.to_string().as_str() {
        "0.0.0.0/0" => &["0.0.0.0/1", "128.0.0.0/1"],
        "::/0" => &["::/1", "8000::/1"],
        _ => return vec![net.trunc()],
    };
    halves.iter().map(|half| half.parse().unwrap()).collect()
}

fn programs(rules: &[Rule], needs: &mut BTreeMap<SetId, Source>) -> Vec<RuleProgram> {
    let mut programs = Vec::new();
    for (index, rule) in rules.iter().enumerate() {
        let protocol = match rule.protocol.as_ref().map(ToString::to_string).as_deref() {
            None => "any",
            Some("udp" | "17") => "udp",
            Some("sctp" | "132") => "sctp",
            Some(_) => "tcp",
        };
        let mut source = side(&rule.source, protocol, needs);
        let mut destination = side(&rule.destination, protocol, needs);
        if let Some(service) = &rule.source.service {
            let id = SetId::for_service_addresses(&service.namespace, &service.name);
            needs.insert(id.clone(), Source::Service(SetType::Net));
            source.sets.push(id);
        }
        if let Some(service) = &rule.destination.service {
            let id = SetId::for_service(&service.namespace, &service.name);
            needs.insert(id.clone(), Source::Service(SetType::AddressPort));
            destination.address_port_sets.push(id);
        }
        programs.push(RuleProgram {
            action: match rule.action {
                Action::Allow => Action::Allow,
                Action::Deny => Action::Deny,
                Action::Log => Action::Log,
                Action::Pass => Action::Pass,
            },
            family: rule.family,
            protocol: rule.protocol.clone(),
            not_protocol: rule.not_protocol.clone(),
            icmp: rule.icmp,
            not_icmp: rule.not_icmp,
            source,
            destination,
            annotations: rule.annotations.clone(),
            index: u32::try_from(index).unwrap(),
        });
    }
    programs
}

/// The table of R-18, row by row.
fn side(entity: &EntityMatch, protocol: &'static str, needs: &mut BTreeMap<SetId, Source>) -> SideProgram {
    let (mut positive, mut negative) = (entity.selector.clone(), entity.not_selector.clone());
    if let (Some(p), Some(n)) = (&positive, &negative) {
        // From the trees, because the canonical text of a double negation parses as another one (L-23).
        positive = Some(Arc::new(p.and(&n.negated())));
        negative = None;
    }
    let mut program =
        SideProgram { nets: entity.nets.clone(), not_nets: entity.not_nets.clone(), ..SideProgram::default() };
    let of = positive.clone().unwrap_or_else(|| selector("all()"));
    let mut named = |name: &Name| {
        let id = SetId::for_named_port(of.id(), protocol, name);
        needs.insert(id.clone(), Source::NamedPort(Arc::clone(&of), protocol, name.clone()));
        id
    };
    for port in &entity.ports {
        match port {
            Port::Range(range) => program.ports.push(*range),
            Port::Named(name) => program.named_port_sets.push(named(name)),
        }
    }
    for port in &entity.not_ports {
        match port {
            Port::Range(range) => program.not_ports.push(*range),
            Port::Named(name) => program.not_named_port_sets.push(named(name)),
        }
    }
    let named_only = !program.named_port_sets.is_empty() && program.ports.is_empty();
    if let Some(positive) = positive.filter(|_| !named_only) {
        program.sets.push(positive.id().clone());
        needs.insert(positive.id().clone(), Source::Selector(positive));
    }
    if let Some(negative) = negative {
        program.not_sets.push(negative.id().clone());
        needs.insert(negative.id().clone(), Source::Selector(negative));
    }
    program
}
