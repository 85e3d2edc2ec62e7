//! What the operator chose, as far as programs depend on it (netfilter.md 6).

use std::net::Ipv4Addr;

use model::{Family, PortRange};
use program::{Action, Table};

use crate::marks::Marks;

/// Options of the compiler; plain data, built by the agent from the settings.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// Families that are programmed at all.
    pub ipv6: bool,
    pub marks: Marks,
    /// `InterfacePrefix`.
    pub interface_prefixes: Vec<String>,
    pub openstack: bool,
    /// `MetadataAddr`, if it is an IPv4 literal.
    pub metadata_address: Option<Ipv4Addr>,
    pub metadata_port: u16,
    pub filter_allow: AllowAction,
    pub mangle_allow: AllowAction,
    /// `IptablesFilterDenyAction`; tables other than filter always drop (D2).
    pub filter_deny: DenyAction,
    pub endpoint_to_host: EndpointToHost,
    pub check_invalid: bool,
    pub vxlan_port: u16,
    pub allow_vxlan_from_workloads: bool,
    pub allow_ipip_from_workloads: bool,
    pub ipip_enabled: bool,
    pub vxlan_enabled_v4: bool,
    pub vxlan_enabled_v6: bool,
    /// WireGuard listening ports of the families it is enabled for.
    pub wireguard_port_v4: Option<u16>,
    pub wireguard_port_v6: Option<u16>,
    pub wireguard_interface_v4: String,
    pub wireguard_interface_v6: String,
    pub wireguard_encrypt_host: bool,
    pub ipvs: bool,
    pub kube_node_ports: Vec<PortRange>,
    pub failsafe_inbound: Vec<Failsafe>,
    pub failsafe_outbound: Vec<Failsafe>,
    pub flow_logs: bool,
    pub log_prefix: String,
    /// Count and unit of `LogActionRateLimit`.
    pub log_rate: Option<program::Rate>,
    pub log_burst: u32,
    pub max_set_size: u32,
    /// `IPv4NormalRoutePriority`, `IPv6NormalRoutePriority`.
    pub route_metric_v4: u32,
    pub route_metric_v6: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AllowAction {
    Accept,
    Return,
}

impl AllowAction {
    pub const fn action(self) -> Action {
        match self {
            Self::Accept => Action::Accept,
            Self::Return => Action::Return,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DenyAction {
    Drop,
    Reject,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndpointToHost {
    Drop,
    Accept,
    Return,
}

/// A port that stays open whatever policy says (netfilter.md 5.6).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failsafe {
    /// `tcp` or `udp`.
    pub protocol: &'static str,
    pub port: u16,
    pub net: Option<ipnet::IpNet>,
}

impl Options {
    /// The families that are programmed, in the order in which they are written.
    pub fn families(&self) -> &'static [Family] {
        if self.ipv6 { &Family::BOTH } else { &[Family::V4] }
    }

    /// DENY of a table (netfilter.md 1): the kernel takes REJECT in `filter` only (defect D2).
    pub fn deny(&self, table: Table) -> Action {
        if self.rejects_in(table) { Action::Reject } else { Action::Drop }
    }

    /// DENY as a word of a comment.
    pub fn deny_word(&self, table: Table) -> &'static str {
        if self.rejects_in(table) { "Reject" } else { "Drop" }
    }

    fn rejects_in(&self, table: Table) -> bool {
        table == Table::Filter && self.filter_deny == DenyAction::Reject
    }

    pub(crate) fn vxlan_enabled(&self, family: Family) -> bool {
        match family {
            Family::V4 => self.vxlan_enabled_v4,
            Family::V6 => self.vxlan_enabled_v6,
        }
    }

    pub(crate) fn wireguard_port(&self, family: Family) -> Option<u16> {
        match family {
            Family::V4 => self.wireguard_port_v4,
            Family::V6 => self.wireguard_port_v6,
        }
    }

    /// The metric of routes to local workloads.
    pub fn route_metric(&self, family: Family) -> u32 {
        match family {
            Family::V4 => self.route_metric_v4,
            Family::V6 => self.route_metric_v6,
        }
    }
}

impl Default for Options {
    /// The defaults of the reference (operations.md 3).
    fn default() -> Self {
        let tcp = |port| Failsafe { protocol: "tcp", port, net: None };
        let udp = |port| Failsafe { protocol: "udp", port, net: None };
        Self {
            ipv6: true,
            marks: Marks::default(),
            interface_prefixes: vec!["cali".to_owned()],
            openstack: false,
            metadata_address: Some(Ipv4Addr::LOCALHOST),
            metadata_port: 8775,
            filter_allow: AllowAction::Accept,
            mangle_allow: AllowAction::Accept,
            filter_deny: DenyAction::Drop,
            endpoint_to_host: EndpointToHost::Drop,
            check_invalid: true,
            vxlan_port: 4789,
            allow_vxlan_from_workloads: false,
            allow_ipip_from_workloads: false,
            ipip_enabled: false,
            vxlan_enabled_v4: false,
            vxlan_enabled_v6: false,
            wireguard_port_v4: None,
            wireguard_port_v6: None,
            wireguard_interface_v4: "wireguard.cali".to_owned(),
            wireguard_interface_v6: "wg-v6.cali".to_owned(),
            wireguard_encrypt_host: false,
            ipvs: false,
            kube_node_ports: vec![PortRange { first: 30000, last: 32767 }],
            failsafe_inbound: vec![
                tcp(22),
                udp(68),
                tcp(179),
                tcp(2379),
                tcp(2380),
                tcp(5473),
                tcp(6443),
                tcp(6666),
                tcp(6667),
            ],
            failsafe_outbound: vec![
                udp(53),
                udp(67),
                tcp(179),
                tcp(2379),
                tcp(2380),
                tcp(5473),
                tcp(6443),
                tcp(6666),
                tcp(6667),
            ],
            flow_logs: false,
            log_prefix: "calico-packet".to_owned(),
            log_rate: None,
            log_burst: 5,
            max_set_size: 1_048_576,
            route_metric_v4: 1024,
            route_metric_v6: 1024,
        }
    }
}
