//! Workload endpoints (datastore.md C-3 to C-8, V-2 to V-4).

use std::net::IpAddr;

use ipnet::IpNet;

use super::Options;
use super::complaint::{At, Complaints, Effect};
use crate::cidr;
use crate::endpoint::{EndpointPort, QosControls, WorkloadEndpoint};
use crate::intern::Pool;
use crate::labels::Labels;
use crate::v3::endpoint::IpNat;
use crate::v3::scalars::Protocol;
use crate::v3::{self, Resource, Text, TextMap, WorkloadEndpointSpec};
use crate::validate;

/// Labels of namespaces and service accounts; a workload's own labels must not look like them (C-7).
const RESERVED_PREFIXES: [&str; 2] = ["pcns.", "pcsa."];

const SERVICE_ACCOUNT: &str = "projectcalico.org/serviceaccount";

/// Converts a stored endpoint; `None` if it has no addresses or is invalid.
pub(super) fn convert(
    resource: Resource<'_, WorkloadEndpointSpec<'_>>,
    options: &Options,
    pool: &mut Pool,
    complaints: &mut Complaints,
) -> Option<WorkloadEndpoint> {
    let Resource { metadata, spec } = resource;
    // C-3: not an error, the endpoint is not ready yet.
    if spec.ip_networks.is_empty() {
        return None;
    }
    let root = At::root();
    let at = root.field("spec");
    let (v4_nets, v6_nets) = cidr::split(all_nets(&spec.ip_networks, at.field("ipNetworks"), complaints));
    for (field, gateway) in [("ipv4Gateway", &spec.ipv4_gateway), ("ipv6Gateway", &spec.ipv6_gateway)] {
        if !gateway.is_empty() && cidr::parse_ip(gateway).is_none() {
            complaints.reject(at.field(field), format_args!("{gateway:?} is not an address"));
        }
    }
    let mac = cidr::parse_mac(&spec.mac);
    if mac.is_none() && !spec.mac.is_empty() {
        complaints.reject(at.field("mac"), format_args!("{:?} is not a hardware address", spec.mac));
    }
    if spec.interface_name.is_empty() {
        complaints.reject(at.field("interfaceName"), "the endpoint has no interface");
    }
    let spoofed = at.field("allowSpoofedSourcePrefixes");
    let allowed_spoofed = all_nets(&spec.allow_spoofed_source_prefixes, spoofed, complaints);
    if !spec.allow_spoofed_source_prefixes.is_empty() && !options.allow_spoofing {
        complaints.reject(spoofed, "not allowed unless WorkloadSourceSpoofing is Any");
    }
    let endpoint = WorkloadEndpoint {
        active: true,
        // Names of interfaces are as many as endpoints; interning them would only displace others.
        interface: (*spec.interface_name).into(),
        mac,
        profiles: spec.profiles.iter().map(|name| pool.name(name)).collect(),
        v4_nets,
        v6_nets,
        nats: nats(&spec.ip_nats, at.field("ipNATs"), complaints),
        labels: labels(&metadata.labels, &spec.service_account_name, pool),
        ports: ports(&spec.ports, pool, at.field("ports"), complaints),
        allowed_spoofed,
        qos: spec.qos_controls.as_ref().and_then(qos),
    };
    complaints.unless_rejected(endpoint)
}

/// Parses a list in which every entry must be good (C-4).
fn all_nets(texts: &[Text<'_>], at: At<'_>, complaints: &mut Complaints) -> Vec<IpNet> {
    let mut nets = Vec::with_capacity(texts.len());
    for (index, text) in texts.iter().enumerate() {
        match cidr::parse_net(text) {
            Some(net) => nets.push(net),
            None => complaints.reject(at.index(index), format_args!("{text:?} is not a network")),
        }
    }
    nets
}

/// Parses floating IPs; bad ones are dropped one by one (C-5).
fn nats(stored: &[IpNat<'_>], at: At<'_>, complaints: &mut Complaints) -> Vec<(IpAddr, IpAddr)> {
    let mut nats = Vec::with_capacity(stored.len());
    for (index, IpNat { internal_ip, external_ip }) in stored.iter().enumerate() {
        match (cidr::parse_ip(internal_ip), cidr::parse_ip(external_ip)) {
            (Some(internal), Some(external)) if internal.is_ipv4() == external.is_ipv4() => {
                nats.push((internal, external));
            }
            (_, _) => complaints.add(
                at.index(index),
                format_args!("{internal_ip:?} and {external_ip:?} are not two addresses of one family"),
                Effect::PartIgnored,
            ),
        }
    }
    nats
}

/// Keeps named ports (C-6), each of which must be valid (V-4).
fn ports(
    stored: &[v3::endpoint::EndpointPort<'_>],
    pool: &mut Pool,
    at: At<'_>,
    complaints: &mut Complaints,
) -> Vec<EndpointPort> {
    let named = stored.iter().enumerate().filter(|(_, port)| !port.name.is_empty());
    named.filter_map(|(index, stored)| port(stored, pool, at.index(index), complaints)).collect()
}

/// Checks a port of an endpoint (V-4).
pub(super) fn port(
    stored: &v3::endpoint::EndpointPort<'_>,
    pool: &mut Pool,
    at: At<'_>,
    complaints: &mut Complaints,
) -> Option<EndpointPort> {
    let v3::endpoint::EndpointPort { name, protocol, port } = stored;
    if !validate::is_endpoint_port_name(name) {
        complaints.reject(at.field("name"), format_args!("{name:?} is not the name of a port"));
    }
    if *port == 0 {
        complaints.reject(at.field("port"), "the port is missing or 0");
    }
    let number = protocol_number(protocol);
    if number.is_none() {
        complaints.reject(at.field("protocol"), format_args!("protocol {protocol} where TCP, UDP or SCTP is expected"));
    }
    Some(EndpointPort { name: pool.name(name), protocol: number?, port: *port })
}

/// V-4: a number is not accepted, even that of one of the three.
fn protocol_number(protocol: &Protocol<'_>) -> Option<u8> {
    match protocol {
        Protocol::Number(_) => None,
        Protocol::Name(name) => match name.to_lowercase().as_str() {
            "tcp" => Some(6),
            "udp" => Some(17),
            "sctp" => Some(132),
            _ => None,
        },
    }
}

/// C-7.
fn labels(stored: &TextMap<'_>, service_account: &str, pool: &mut Pool) -> Labels {
    let own = stored.iter().filter(|(key, _)| !RESERVED_PREFIXES.iter().any(|prefix| key.starts_with(prefix)));
    // The last one counts.
    let account = Some((SERVICE_ACCOUNT, service_account)).filter(|(_, account)| !account.is_empty());
    own.chain(account).map(|(key, value)| (pool.name(key), pool.name(value))).collect()
}

/// The limits that become packet-filter rules; `None` if there are none.
fn qos(stored: &v3::endpoint::QosControls) -> Option<Box<QosControls>> {
    // Below zero is nonsense and counts as not set, above the largest number there is no limit worth it.
    let limit = |value: i64| u32::try_from(value.max(0)).unwrap_or(u32::MAX);
    let controls = QosControls {
        ingress_packet_rate: limit(stored.ingress_packet_rate),
        ingress_packet_burst: limit(stored.ingress_packet_burst),
        egress_packet_rate: limit(stored.egress_packet_rate),
        egress_packet_burst: limit(stored.egress_packet_burst),
        ingress_max_connections: limit(stored.ingress_max_connections),
        egress_max_connections: limit(stored.egress_max_connections),
    };
    (controls != QosControls::default()).then(|| Box::new(controls))
}
