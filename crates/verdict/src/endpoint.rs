//! The endpoint that a packet is judged at, and what of its surroundings the operator chose.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;
use model::{Labels, Name, WorkloadEndpointKey};

use crate::facts::{ALL_INTERFACES, Effective, Facts};
use crate::packet::{Direction, Packet, Side};

const UDP: u8 = 17;
const IP_IN_IP: u8 = 4;

/// Identity of an endpoint that packets are judged at.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum EndpointKey {
    Workload(WorkloadEndpointKey),
    /// The name of a host endpoint.
    Host(Name),
}

/// What judging needs to know of an endpoint, of whichever kind.
#[derive(Clone, Debug)]
pub struct Subject<'a> {
    pub key: EndpointKey,
    /// False only for workloads that are switched off (T-22).
    pub active: bool,
    /// A host endpoint for all interfaces that have none of their own (T-24).
    pub is_wildcard: bool,
    pub labels: &'a Labels,
    pub profiles: &'a [Name],
}

/// A sequence of tiers that an endpoint is judged by (T-9).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum List {
    /// All traffic of a workload; traffic of a host endpoint to and from local processes.
    Normal,
    /// Traffic that passes through a host endpoint.
    Forward,
    /// Before connection tracking.
    Untracked,
    /// Before destination NAT.
    PreDnat,
}

/// A packet in a packet that workloads may not send (T-19).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tunnel {
    Vxlan,
    IpInIp,
}

/// A port of the host that stays open whatever policy says (netfilter.md 5.6).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failsafe {
    pub protocol: u8,
    pub port: u16,
    /// Only for peers in it.
    pub net: Option<IpNet>,
}

/// What the operator chose, as far as verdicts depend on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Beginnings of the names of workload interfaces.
    pub interface_prefixes: Vec<Name>,
    /// Addresses of the host's interfaces, for host endpoints that name none.
    pub interface_addresses: BTreeMap<Name, Vec<IpAddr>>,
    /// False with `DisableConntrackInvalidCheck`.
    pub check_invalid: bool,
    pub vxlan_port: u16,
    pub allow_vxlan_from_workloads: bool,
    pub allow_ipip_from_workloads: bool,
    pub failsafe_inbound: Vec<Failsafe>,
    pub failsafe_outbound: Vec<Failsafe>,
}

impl Default for Settings {
    /// The defaults of the parameters, without failsafe ports.
    fn default() -> Self {
        Self {
            interface_prefixes: vec!["cali".into()],
            interface_addresses: BTreeMap::new(),
            check_invalid: true,
            vxlan_port: 4789,
            allow_vxlan_from_workloads: false,
            allow_ipip_from_workloads: false,
            failsafe_inbound: Vec::new(),
            failsafe_outbound: Vec::new(),
        }
    }
}

impl Settings {
    pub fn is_workload_interface(&self, name: &str) -> bool {
        self.interface_prefixes.iter().any(|prefix| name.starts_with(prefix.as_ref()))
    }

    /// T-19.
    pub(crate) fn blocked_tunnel(&self, packet: &Packet) -> Option<Tunnel> {
        let vxlan = packet.protocol == UDP && packet.port(Side::Destination) == Some(self.vxlan_port);
        if vxlan && !self.allow_vxlan_from_workloads {
            return Some(Tunnel::Vxlan);
        }
        (packet.protocol == IP_IN_IP && !self.allow_ipip_from_workloads).then_some(Tunnel::IpInIp)
    }

    /// Returns the entry that keeps a packet's port open. Before connection tracking the answers of the other
    /// direction need it too.
    pub(crate) fn failsafe(&self, list: List, direction: Direction, packet: &Packet) -> Option<&Failsafe> {
        let (there, back, peer) = match direction {
            Direction::Ingress => (&self.failsafe_inbound, &self.failsafe_outbound, Side::Source),
            Direction::Egress => (&self.failsafe_outbound, &self.failsafe_inbound, Side::Destination),
        };
        let open = |entry: &&Failsafe, side| {
            entry.protocol == packet.protocol
                && packet.port(side) == Some(entry.port)
                && entry.net.is_none_or(|net| net.contains(&packet.address(peer)))
        };
        match list {
            List::Forward => None,
            List::Normal | List::PreDnat => there.iter().find(|entry| open(entry, Side::Destination)),
            List::Untracked => there
                .iter()
                .find(|entry| open(entry, Side::Destination))
                .or_else(|| back.iter().find(|entry| open(entry, Side::Source))),
        }
    }
}

impl<'a> Subject<'a> {
    /// Finds an endpoint among the stored objects.
    pub fn find(facts: &'a Facts, key: &EndpointKey) -> Option<Self> {
        match key {
            EndpointKey::Workload(workload) => {
                let value = facts.workload(workload)?;
                Some(Self {
                    key: key.clone(),
                    active: value.active,
                    is_wildcard: false,
                    labels: &value.labels,
                    profiles: &value.profiles,
                })
            }
            EndpointKey::Host(name) => {
                let value = facts.host_endpoint(name)?;
                Some(Self {
                    key: key.clone(),
                    active: true,
                    is_wildcard: *value.interface == *ALL_INTERFACES,
                    labels: &value.labels,
                    profiles: &value.profiles,
                })
            }
        }
    }

    pub(crate) fn effective_labels(&self, facts: &'a Facts) -> Effective<'a> {
        Effective { facts, own: self.labels, profiles: self.profiles }
    }

    pub(crate) const fn is_workload(&self) -> bool {
        matches!(self.key, EndpointKey::Workload(_))
    }
}

impl fmt::Display for EndpointKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Workload(key) => write!(f, "workload endpoint {key}"),
            Self::Host(name) => write!(f, "host endpoint {name}"),
        }
    }
}

impl fmt::Display for List {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Normal => "normal",
            Self::Forward => "forward",
            Self::Untracked => "untracked",
            Self::PreDnat => "pre-DNAT",
        })
    }
}

impl fmt::Display for Tunnel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Vxlan => "VXLAN",
            Self::IpInIp => "IP-in-IP",
        })
    }
}
