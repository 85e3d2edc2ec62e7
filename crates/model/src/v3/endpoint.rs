//! WorkloadEndpoint and HostEndpoint (datastore.md 3.1, 3.2).

use serde::Deserialize;

use super::scalars::{NumberOrText, Protocol, objects, or_default};

/// `spec` of a workload endpoint. The parts of its name are in the key and not read from here.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, remote = "Self", rename_all = "camelCase")]
pub struct WorkloadEndpointSpec {
    #[serde(deserialize_with = "or_default")]
    pub service_account_name: String,
    #[serde(deserialize_with = "or_default")]
    pub ip_networks: Vec<String>,
    #[serde(rename = "ipNATs", deserialize_with = "or_default")]
    pub ip_nats: Vec<IpNat>,
    #[serde(rename = "ipv4Gateway", deserialize_with = "or_default")]
    pub ipv4_gateway: String,
    #[serde(rename = "ipv6Gateway", deserialize_with = "or_default")]
    pub ipv6_gateway: String,
    #[serde(deserialize_with = "or_default")]
    pub profiles: Vec<String>,
    #[serde(deserialize_with = "or_default")]
    pub interface_name: String,
    #[serde(deserialize_with = "or_default")]
    pub mac: String,
    #[serde(deserialize_with = "or_default")]
    pub ports: Vec<EndpointPort>,
    #[serde(deserialize_with = "or_default")]
    pub allow_spoofed_source_prefixes: Vec<String>,
    pub qos_controls: Option<QosControls>,
}

/// `spec` of a host endpoint.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, remote = "Self", rename_all = "camelCase")]
pub struct HostEndpointSpec {
    #[serde(deserialize_with = "or_default")]
    pub node: String,
    #[serde(deserialize_with = "or_default")]
    pub interface_name: String,
    #[serde(rename = "expectedIPs", deserialize_with = "or_default")]
    pub expected_ips: Vec<String>,
    #[serde(deserialize_with = "or_default")]
    pub profiles: Vec<String>,
    #[serde(deserialize_with = "or_default")]
    pub ports: Vec<EndpointPort>,
}

/// A floating IP.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, remote = "Self")]
pub struct IpNat {
    #[serde(rename = "internalIP", deserialize_with = "or_default")]
    pub internal_ip: String,
    #[serde(rename = "externalIP", deserialize_with = "or_default")]
    pub external_ip: String,
}

/// A port that an endpoint offers; those of workloads without a name are host ports of the CNI plugin
/// (C-6).
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, remote = "Self")]
pub struct EndpointPort {
    #[serde(deserialize_with = "or_default")]
    pub name: String,
    #[serde(deserialize_with = "or_default")]
    pub protocol: Protocol,
    #[serde(deserialize_with = "or_default")]
    pub port: u16,
}

/// Limits; 0 is "not set". Bandwidths are in bit/s, bursts in bit, packet rates in packets/s.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, remote = "Self", rename_all = "camelCase")]
pub struct QosControls {
    #[serde(deserialize_with = "or_default")]
    pub ingress_bandwidth: i64,
    #[serde(deserialize_with = "or_default")]
    pub ingress_burst: i64,
    #[serde(deserialize_with = "or_default")]
    pub ingress_peakrate: i64,
    #[serde(deserialize_with = "or_default")]
    pub ingress_minburst: i64,
    #[serde(deserialize_with = "or_default")]
    pub egress_bandwidth: i64,
    #[serde(deserialize_with = "or_default")]
    pub egress_burst: i64,
    #[serde(deserialize_with = "or_default")]
    pub egress_peakrate: i64,
    #[serde(deserialize_with = "or_default")]
    pub egress_minburst: i64,
    #[serde(deserialize_with = "or_default")]
    pub ingress_packet_rate: i64,
    #[serde(deserialize_with = "or_default")]
    pub ingress_packet_burst: i64,
    #[serde(deserialize_with = "or_default")]
    pub egress_packet_rate: i64,
    #[serde(deserialize_with = "or_default")]
    pub egress_packet_burst: i64,
    #[serde(deserialize_with = "or_default")]
    pub ingress_max_connections: i64,
    #[serde(deserialize_with = "or_default")]
    pub egress_max_connections: i64,
    pub dscp: Option<NumberOrText>,
}

objects!(WorkloadEndpointSpec, HostEndpointSpec, IpNat, EndpointPort, QosControls);
