//! WorkloadEndpoint and HostEndpoint (datastore.md 3.1, 3.2).

use super::object::objects;
use super::scalars::{NumberOrText, Protocol};
use super::text::Text;

objects! {
    /// `spec` of a workload endpoint. The parts of its name are in the key and not read from here.
    pub struct WorkloadEndpointSpec<'a> {
        "serviceAccountName" service_account_name: Text<'a>,
        "ipNetworks" ip_networks: Vec<Text<'a>>,
        "ipNATs" ip_nats: Vec<IpNat<'a>>,
        "ipv4Gateway" ipv4_gateway: Text<'a>,
        "ipv6Gateway" ipv6_gateway: Text<'a>,
        "profiles" profiles: Vec<Text<'a>>,
        "interfaceName" interface_name: Text<'a>,
        "mac" mac: Text<'a>,
        "ports" ports: Vec<EndpointPort<'a>>,
        "allowSpoofedSourcePrefixes" allow_spoofed_source_prefixes: Vec<Text<'a>>,
        "qosControls" qos_controls: Option<QosControls>,
    }

    /// `spec` of a host endpoint.
    pub struct HostEndpointSpec<'a> {
        "node" node: Text<'a>,
        "interfaceName" interface_name: Text<'a>,
        "expectedIPs" expected_ips: Vec<Text<'a>>,
        "profiles" profiles: Vec<Text<'a>>,
        "ports" ports: Vec<EndpointPort<'a>>,
    }

    /// A floating IP.
    pub struct IpNat<'a> {
        "internalIP" internal_ip: Text<'a>,
        "externalIP" external_ip: Text<'a>,
    }

    /// A port that an endpoint offers; those of workloads without a name are host ports of the CNI plugin (C-6).
    pub struct EndpointPort<'a> {
        "name" name: Text<'a>,
        "protocol" protocol: Protocol<'a>,
        "port" port: u16,
    }

    /// Limits; 0 is "not set". Bandwidths are in bit/s, bursts in bit, packet rates in packets/s.
    pub struct QosControls {
        "ingressBandwidth" ingress_bandwidth: i64,
        "ingressBurst" ingress_burst: i64,
        "ingressPeakrate" ingress_peakrate: i64,
        "ingressMinburst" ingress_minburst: i64,
        "egressBandwidth" egress_bandwidth: i64,
        "egressBurst" egress_burst: i64,
        "egressPeakrate" egress_peakrate: i64,
        "egressMinburst" egress_minburst: i64,
        "ingressPacketRate" ingress_packet_rate: i64,
        "ingressPacketBurst" ingress_packet_burst: i64,
        "egressPacketRate" egress_packet_rate: i64,
        "egressPacketBurst" egress_packet_burst: i64,
        "ingressMaxConnections" ingress_max_connections: i64,
        "egressMaxConnections" egress_max_connections: i64,
        "dscp" dscp: Option<NumberOrText>,
    }
}
