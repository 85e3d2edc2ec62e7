//! Things with addresses and labels: workload endpoints, host endpoints and network sets.

use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::labels::Labels;
use crate::names::Name;

/// A workload endpoint (datastore.md 3.1). Everything in it has passed validation.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct WorkloadEndpoint {
    /// Stored state; the conversion always says active (C-8), an inactive endpoint drops everything (T-22).
    pub active: bool,
    /// Never empty (V-2).
    pub interface: Name,
    pub mac: Option<[u8; 6]>,
    pub profiles: Vec<Name>,
    pub v4_nets: Vec<Ipv4Net>,
    pub v6_nets: Vec<Ipv6Net>,
    /// Floating IPs: (internal, external), both of one family.
    pub nats: Vec<(std::net::IpAddr, std::net::IpAddr)>,
    pub labels: Labels,
    /// Named ports only.
    pub ports: Vec<EndpointPort>,
    /// Sources that may be spoofed; the reverse path check is off for this endpoint if not empty.
    pub allowed_spoofed: Vec<IpNet>,
    pub qos: Option<Box<QosControls>>,
}

/// A host endpoint: one or all interfaces of a host (datastore.md 3.2). Everything in it has passed
/// validation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostEndpoint {
    /// `spec.node`; never empty (C-9). The name of the resource is the endpoint's identity, so that one
    /// that moves to another host (C-11) is the same object with another host.
    pub host: Name,
    /// `*`, the name of an interface, or empty: then it is the interface that has an expected address
    /// (V-5).
    pub interface: Name,
    pub expected_v4: Vec<Ipv4Addr>,
    pub expected_v6: Vec<Ipv6Addr>,
    pub profiles: Vec<Name>,
    pub labels: Labels,
    pub ports: Vec<EndpointPort>,
    /// What packets are marked with, 0 to 63 (C-10).
    pub dscp: Option<u8>,
}

/// A named port of an endpoint.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EndpointPort {
    pub name: Name,
    /// 6, 17 or 132 (V-4).
    pub protocol: u8,
    pub port: u16,
}

/// The part of the QoS controls that becomes packet-filter rules; 0 means not set (netfilter.md 8.2).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct QosControls {
    pub ingress_packet_rate: u32,
    pub ingress_packet_burst: u32,
    pub egress_packet_rate: u32,
    pub egress_packet_burst: u32,
    pub ingress_max_connections: u32,
    pub egress_max_connections: u32,
}

/// A network set, namespaced or global (datastore.md 3.9).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NetworkSet {
    /// Host bits cleared, both families.
    pub nets: Vec<IpNet>,
    pub labels: Labels,
    /// `kns.<namespace>` for a namespaced set, otherwise empty.
    pub profiles: Vec<Name>,
}
