//! What the graph hands to the compiler.

mod gathered;
mod members;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use model::{
    Action, Family, HostEndpoint, IcmpMatch, LinkState, Name, PolicyKey, PortRange, Protocol, SetId, WorkloadEndpoint,
    WorkloadEndpointKey,
};

pub(crate) use gathered::Gathered;
pub use members::MemberList;

/// What the compiler must do next: the net result of all updates since the last batch. The fields are
/// in the order in which they must take effect (policy.md F-2), and each object appears at most once.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Batch {
    /// Counts batches from 1.
    pub seq: u64,
    pub links: BTreeMap<Name, Option<LinkState>>,
    /// Sets that became needed, complete (F-8: never together with a delta).
    pub sets_created: BTreeMap<SetId, SetContents>,
    pub members: BTreeMap<SetId, MemberDelta>,
    pub policies: BTreeMap<PolicyKey, Option<Arc<PolicyProgram>>>,
    pub profiles: BTreeMap<Name, Option<Arc<ProfileProgram>>>,
    /// By interface name: the endpoint that owns it (host.md 8.4), or `None` when nobody does any more.
    pub endpoints: BTreeMap<Name, Option<Arc<EndpointProgram>>>,
    /// Local host endpoints by name of the resource.
    pub host_endpoints: BTreeMap<Name, Option<Arc<HostEndpointProgram>>>,
    pub sets_removed: BTreeSet<SetId>,
}

impl Batch {
    /// True if there is nothing to do.
    pub fn is_empty(&self) -> bool {
        let Self { seq: _, links, sets_created, members, policies, profiles, endpoints, host_endpoints, sets_removed } =
            self;
        links.is_empty()
            && sets_created.is_empty()
            && members.is_empty()
            && policies.is_empty()
            && profiles.is_empty()
            && endpoints.is_empty()
            && host_endpoints.is_empty()
            && sets_removed.is_empty()
    }
}

/// Kind of the members of a set (policy.md 5.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SetType {
    Net,
    AddressPort,
}

/// A member of a set; both families live in one set (M-2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SetMember {
    /// Host bits clear, never of length 0 (M-10).
    Net(IpNet),
    AddressPort {
        address: IpAddr,
        protocol: u8,
        port: u16,
    },
}

#[derive(Clone, Debug, PartialEq)]
pub struct SetContents {
    pub kind: SetType,
    pub members: MemberList,
}

/// Net change of a set that exists; no member is in both.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MemberDelta {
    pub added: MemberList,
    pub removed: MemberList,
}

/// An active policy with its selectors turned into sets (policy.md R-21).
#[derive(Clone, Debug, PartialEq)]
pub struct PolicyProgram {
    pub tier: Name,
    pub inbound: Vec<RuleProgram>,
    pub outbound: Vec<RuleProgram>,
    pub untracked: bool,
    pub pre_dnat: bool,
    /// L-24; neighbours with equal text form a group (netfilter.md 9.1).
    pub original_selector: Name,
    pub always_needed: bool,
}

/// A profile that a local endpoint lists. A missing one is denied here.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ProfileProgram {
    pub inbound: Vec<RuleProgram>,
    pub outbound: Vec<RuleProgram>,
    /// The profile is not in the datastore; the rules are its stand-in.
    pub missing: bool,
}

/// A rule whose selectors, named ports and services have become sets (policy.md 4.4).
#[derive(Clone, Debug, PartialEq)]
pub struct RuleProgram {
    pub action: Action,
    pub family: Option<Family>,
    pub protocol: Option<Protocol>,
    pub not_protocol: Option<Protocol>,
    pub icmp: Option<IcmpMatch>,
    pub not_icmp: Option<IcmpMatch>,
    pub source: SideProgram,
    pub destination: SideProgram,
    /// Sorted by key (defect D5).
    pub annotations: BTreeMap<String, String>,
    /// Position in the stored list, before anything was left out.
    pub index: u32,
}

impl RuleProgram {
    /// Returns the rule without any match: it applies to every packet.
    pub fn for_everything(action: Action) -> Self {
        Self {
            action,
            family: None,
            protocol: None,
            not_protocol: None,
            icmp: None,
            not_icmp: None,
            source: SideProgram::default(),
            destination: SideProgram::default(),
            annotations: BTreeMap::new(),
            index: 0,
        }
    }
}

/// What a rule asks of one side of a packet.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SideProgram {
    /// Both families mixed, stored order.
    pub nets: Vec<IpNet>,
    pub not_nets: Vec<IpNet>,
    pub ports: Vec<PortRange>,
    pub not_ports: Vec<PortRange>,
    /// Selector set first, then a service's address set; all are required.
    pub sets: Vec<SetId>,
    pub not_sets: Vec<SetId>,
    /// One per port name, alternatives to `ports`.
    pub named_port_sets: Vec<SetId>,
    pub not_named_port_sets: Vec<SetId>,
    /// Service set of (address, protocol, port); destination only.
    pub address_port_sets: Vec<SetId>,
}

/// A local endpoint that owns its interface, with the policies that apply to it.
#[derive(Clone, Debug, PartialEq)]
pub struct EndpointProgram {
    pub key: WorkloadEndpointKey,
    pub endpoint: Arc<WorkloadEndpoint>,
    /// Normal tiers in order; only those with a policy that applies (T-8 to T-11). Shared by all
    /// endpoints that the same policies apply to: the lists can be thousands of entries long.
    pub tiers: Arc<[TierProgram]>,
}

/// A local host endpoint with the policies that apply to it, in four lists (T-9, T-10).
#[derive(Clone, Debug, PartialEq)]
pub struct HostEndpointProgram {
    /// Name of the resource.
    pub name: Name,
    pub endpoint: Arc<HostEndpoint>,
    pub tiers: HostTiers,
}

/// The four lists of a host endpoint. In each of them a tier occurs only if a policy of it does.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HostTiers {
    /// Every tier passes at its end.
    pub untracked: Arc<[TierProgram]>,
    /// Ingress only; every tier passes at its end.
    pub pre_dnat: Arc<[TierProgram]>,
    pub normal: Arc<[TierProgram]>,
    /// Without tiers that have nothing but staged policies here: no tier at all means allow (T-17, T-21).
    pub forward: Arc<[TierProgram]>,
}

/// The policies of one tier that apply to one endpoint, in order (T-5).
#[derive(Clone, Debug, PartialEq)]
pub struct TierProgram {
    pub name: Name,
    pub ingress: Vec<PolicyRef>,
    pub egress: Vec<PolicyRef>,
    /// False: what no policy of the tier decided is denied at its end (T-13).
    pub default_pass: bool,
}

/// A policy as listed for an endpoint; the selector text decides about groups.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PolicyRef {
    pub key: PolicyKey,
    pub original_selector: Name,
}
