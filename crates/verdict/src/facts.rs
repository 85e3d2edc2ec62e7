//! The objects that are stored at present, and what they say about labels and addresses.
//!
//! Fed with the same updates as the graph; nothing is computed before it is asked for.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use model::selector::LabelSource;
use model::{
    EndpointPort, HostEndpoint, Labels, Name, NetworkSet, Policy, PolicyKey, ProfileRules, Rule, Tier, Update,
    WorkloadEndpoint, WorkloadEndpointKey,
};

use crate::packet::Direction;
use crate::reason::{RuleOwner, RulePlace};

/// The interface name of the host endpoint that is for all interfaces.
pub(crate) const ALL_INTERFACES: &str = "*";

/// See the [module documentation](self).
#[derive(Clone, Debug)]
pub struct Facts {
    workloads: BTreeMap<WorkloadEndpointKey, Arc<WorkloadEndpoint>>,
    hosts: BTreeMap<Name, Arc<HostEndpoint>>,
    network_sets: BTreeMap<Name, Arc<NetworkSet>>,
    policies: BTreeMap<PolicyKey, Arc<Policy>>,
    tiers: BTreeMap<Name, Tier>,
    profile_rules: BTreeMap<Name, Arc<ProfileRules>>,
    profile_labels: BTreeMap<Name, Arc<Labels>>,
}

/// An object that can contribute addresses to a set (policy.md M-10).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ObjectKey {
    Workload(WorkloadEndpointKey),
    HostEndpoint(Name),
    NetworkSet(Name),
}

/// Labels of an object with those that it inherits (B-1).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Effective<'a> {
    pub(crate) facts: &'a Facts,
    pub(crate) own: &'a Labels,
    pub(crate) profiles: &'a [Name],
}

/// An object as sets see it.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Object<'a> {
    Workload(&'a WorkloadEndpointKey, &'a WorkloadEndpoint),
    Host(&'a Name, &'a HostEndpoint),
    NetworkSet(&'a Name, &'a NetworkSet),
}

impl Default for Facts {
    fn default() -> Self {
        Self::new()
    }
}

impl Facts {
    /// Makes the facts of an empty datastore: one profile is there without being stored (K-6).
    #[must_use]
    pub fn new() -> Self {
        let mut facts = Self {
            workloads: BTreeMap::new(),
            hosts: BTreeMap::new(),
            network_sets: BTreeMap::new(),
            policies: BTreeMap::new(),
            tiers: BTreeMap::new(),
            profile_rules: BTreeMap::new(),
            profile_labels: BTreeMap::new(),
        };
        model::convert::static_updates().into_iter().for_each(|update| facts.put(update));
        facts
    }

    /// Takes a change of one object. What policy does not depend on is ignored.
    pub fn put(&mut self, update: Update) {
        match update {
            Update::WorkloadEndpoint(key, value) => put(&mut self.workloads, key, value),
            Update::HostEndpoint(name, value) => put(&mut self.hosts, name, value),
            Update::NetworkSet(name, value) => put(&mut self.network_sets, name, value),
            Update::Policy(key, value) => put(&mut self.policies, key, value),
            Update::Tier(name, value) => put(&mut self.tiers, name, value),
            Update::ProfileRules(name, value) => put(&mut self.profile_rules, name, value),
            Update::ProfileLabels(name, value) => put(&mut self.profile_labels, name, value),
            Update::Link(..) | Update::Config(..) | Update::Ready(_) => {}
        }
    }

    pub fn workload(&self, key: &WorkloadEndpointKey) -> Option<&WorkloadEndpoint> {
        self.workloads.get(key).map(AsRef::as_ref)
    }

    /// Returns the workload endpoint of a host that has an interface: of several that claim it the one with
    /// the smallest orchestrator, workload and endpoint (netfilter.md 8.3).
    pub fn owner(&self, host: &str, interface: &str) -> Option<&WorkloadEndpointKey> {
        let claimants =
            self.workloads.iter().filter(|(key, value)| *key.host == *host && *value.interface == *interface);
        claimants.map(|(key, _)| key).min_by_key(|key| (&key.orchestrator, &key.workload, &key.endpoint))
    }

    pub fn host_endpoint(&self, name: &Name) -> Option<&HostEndpoint> {
        self.hosts.get(name).map(AsRef::as_ref)
    }

    /// Returns the host endpoint of a host that has an interface with certain addresses, the smallest of
    /// several: one that names the interface, or one that names none and expects one of the addresses. What
    /// has none is of the endpoint that names all interfaces (netfilter.md 14.1, 14.4).
    pub fn host_owner(&self, host: &str, interface: &str, addresses: &[IpAddr]) -> Option<&Name> {
        let find = |is: &dyn Fn(&HostEndpoint) -> bool| {
            self.hosts.iter().find(|(_, value)| *value.host == *host && is(value)).map(|(name, _)| name)
        };
        let expects = |value: &HostEndpoint| {
            let v4 = value.expected_v4.iter().map(|address| IpAddr::V4(*address));
            v4.chain(value.expected_v6.iter().map(|address| IpAddr::V6(*address))).any(|one| addresses.contains(&one))
        };
        find(&|value| *value.interface == *interface || (value.interface.is_empty() && expects(value)))
            .or_else(|| find(&|value| *value.interface == *ALL_INTERFACES))
    }

    /// Returns the rule that a verdict names.
    pub fn rule(&self, place: &RulePlace) -> Option<&Rule> {
        let (inbound, outbound) = match &place.owner {
            RuleOwner::Policy { key, .. } => {
                let policy = self.policies.get(key)?;
                (&policy.inbound, &policy.outbound)
            }
            RuleOwner::Profile(name) => {
                let profile = self.profile_rules.get(name)?;
                (&profile.inbound, &profile.outbound)
            }
        };
        match place.direction {
            Direction::Ingress => inbound.get(place.index),
            Direction::Egress => outbound.get(place.index),
        }
    }

    pub(crate) fn policies(&self) -> impl Iterator<Item = (&PolicyKey, &Policy)> {
        self.policies.iter().map(|(key, policy)| (key, policy.as_ref()))
    }

    pub(crate) fn tier(&self, name: &Name) -> Option<Tier> {
        self.tiers.get(name).copied()
    }

    pub(crate) fn profile_rules(&self, name: &Name) -> Option<&ProfileRules> {
        self.profile_rules.get(name).map(AsRef::as_ref)
    }

    /// Everything that takes part in rule selectors and named ports (B-4): local and remote endpoints in any
    /// state (M-11), and network sets.
    pub(crate) fn objects(&self) -> impl Iterator<Item = Object<'_>> {
        let workloads = self.workloads.iter().map(|(key, value)| Object::Workload(key, value));
        let endpoints = workloads.chain(self.hosts.iter().map(|(name, value)| Object::Host(name, value)));
        endpoints.chain(self.network_sets.iter().map(|(name, value)| Object::NetworkSet(name, value)))
    }
}

fn put<K: Ord, V>(map: &mut BTreeMap<K, V>, key: K, value: Option<V>) {
    match value {
        Some(value) => drop(map.insert(key, value)),
        None => drop(map.remove(&key)),
    }
}

impl LabelSource for Effective<'_> {
    fn label(&self, name: &str) -> Option<&str> {
        let labels = |profile| self.facts.profile_labels.get(profile);
        let inherited = || self.profiles.iter().filter_map(labels).find_map(|labels| labels.get(name));
        self.own.get(name).or_else(inherited).map(AsRef::as_ref)
    }
}

impl<'a> Object<'a> {
    pub(crate) fn key(self) -> ObjectKey {
        match self {
            Self::Workload(key, _) => ObjectKey::Workload(key.clone()),
            Self::Host(name, _) => ObjectKey::HostEndpoint(name.clone()),
            Self::NetworkSet(name, _) => ObjectKey::NetworkSet(name.clone()),
        }
    }

    pub(crate) fn labels(self, facts: &'a Facts) -> Effective<'a> {
        match self {
            Self::Workload(_, value) => Effective { facts, own: &value.labels, profiles: &value.profiles },
            Self::Host(_, value) => Effective { facts, own: &value.labels, profiles: &value.profiles },
            Self::NetworkSet(_, value) => Effective { facts, own: &value.labels, profiles: &value.profiles },
        }
    }

    /// Returns what the object contributes that an address is in (M-10): an address of an endpoint, whatever
    /// prefix length it is stored with, one that a host endpoint expects, or a network of a network set.
    pub(crate) fn holds(self, address: IpAddr) -> Option<IpNet> {
        match self {
            Self::Workload(_, value) => {
                let v4 = value.v4_nets.iter().map(|net| IpAddr::V4(net.addr()));
                let mut all = v4.chain(value.v6_nets.iter().map(|net| IpAddr::V6(net.addr())));
                all.find(|own| *own == address).map(IpNet::from)
            }
            Self::Host(_, value) => {
                let v4 = value.expected_v4.iter().map(|own| IpAddr::V4(*own));
                let mut all = v4.chain(value.expected_v6.iter().map(|own| IpAddr::V6(*own)));
                all.find(|own| *own == address).map(IpNet::from)
            }
            Self::NetworkSet(_, value) => value.nets.iter().find(|net| net.contains(&address)).copied(),
        }
    }

    /// Named ports; network sets have none (M-20).
    pub(crate) fn ports(self) -> &'a [EndpointPort] {
        match self {
            Self::Workload(_, value) => &value.ports,
            Self::Host(_, value) => &value.ports,
            Self::NetworkSet(..) => &[],
        }
    }
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Workload(key) => write!(f, "workload endpoint {key}"),
            Self::HostEndpoint(name) => write!(f, "host endpoint {name}"),
            Self::NetworkSet(name) => write!(f, "network set {name}"),
        }
    }
}
