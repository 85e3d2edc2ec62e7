//! What enters the calculation graph, as one closed enum.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::endpoint::{HostEndpoint, NetworkSet, WorkloadEndpoint};
use crate::key::{PolicyKey, WorkloadEndpointKey};
use crate::labels::Labels;
use crate::names::Name;
use crate::policy::{Policy, Tier};
use crate::profile::ProfileRules;

/// A change of one fact. `None` means absent: deleted, never there, unparsable or invalid (I2).
#[derive(Clone, Debug, PartialEq)]
pub enum Update {
    WorkloadEndpoint(WorkloadEndpointKey, Option<Arc<WorkloadEndpoint>>),
    Policy(PolicyKey, Option<Arc<Policy>>),
    Tier(Name, Option<Tier>),
    ProfileRules(Name, Option<Arc<ProfileRules>>),
    /// Labels that endpoints listing the profile inherit (policy.md B-2).
    ProfileLabels(Name, Option<Arc<Labels>>),
    /// Key is `<namespace>/<name>` or, for global sets, `<name>` (C-32, C-33).
    NetworkSet(Name, Option<Arc<NetworkSet>>),
    /// Key is the name of the resource, whatever the host: a deleted or damaged resource no longer says
    /// which host it was for, and one that moves needs no delete of its own (C-9, C-11).
    HostEndpoint(Name, Option<Arc<HostEndpoint>>),
    /// A network interface of this host.
    Link(Name, Option<LinkState>),
    /// Raw parameters of one configuration resource: `default` and `node.<host>` FelixConfigurations,
    /// and ClusterInformation. Not for the graph; the agent compares them with what it runs with.
    Config(ConfigSource, Option<Arc<BTreeMap<String, String>>>),
    /// `datastoreReady` of ClusterInformation; only `Some(true)` is ready (C-49).
    Ready(Option<bool>),
}

/// Which resource a configuration map came from.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ConfigSource {
    ClusterInformation,
    /// FelixConfiguration of this name (`default`, `node.<host>`, or selector-scoped).
    FelixConfiguration(Name),
}

/// Identity of the object that an update is about: a queue holds at most one update per key (I7).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum UpdateKey {
    WorkloadEndpoint(WorkloadEndpointKey),
    Policy(PolicyKey),
    Tier(Name),
    ProfileRules(Name),
    ProfileLabels(Name),
    NetworkSet(Name),
    HostEndpoint(Name),
    Link(Name),
    Config(ConfigSource),
    Ready,
}

impl Update {
    pub fn key(&self) -> UpdateKey {
        match self {
            Self::WorkloadEndpoint(key, _) => UpdateKey::WorkloadEndpoint(key.clone()),
            Self::Policy(key, _) => UpdateKey::Policy(key.clone()),
            Self::Tier(name, _) => UpdateKey::Tier(name.clone()),
            Self::ProfileRules(name, _) => UpdateKey::ProfileRules(name.clone()),
            Self::ProfileLabels(name, _) => UpdateKey::ProfileLabels(name.clone()),
            Self::NetworkSet(name, _) => UpdateKey::NetworkSet(name.clone()),
            Self::HostEndpoint(name, _) => UpdateKey::HostEndpoint(name.clone()),
            Self::Link(name, _) => UpdateKey::Link(name.clone()),
            Self::Config(source, _) => UpdateKey::Config(source.clone()),
            Self::Ready(_) => UpdateKey::Ready,
        }
    }
}

/// State of an interface that exists.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LinkState {
    pub index: u32,
    /// `IFF_RUNNING` (host.md 2.2).
    pub up: bool,
    /// Grows whenever the interface may have gone down and come up again. The kernel drops routes and
    /// neighbours of an interface that goes down, and a queue that keeps only the last value would
    /// otherwise hide a short outage from those who must write them again.
    pub generation: u32,
}
