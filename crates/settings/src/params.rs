//! The table of parameters: all that the program, the example file and the tests know about each.
//!
//! Read by [`crate::resolve`] and [`crate::example`]. The first groups have an effect; [`inert`]
//! holds what is only recognised.

mod inert;

use crate::kind::{INT, Kind, PORT};
use crate::settings::{AllowAction, Backend, DenyAction, EndpointToHost, InsertMode, LogFormat, Settings, Severity};
use crate::value::Value;

pub use inert::{RETIRED, Retired};

/// One parameter.
#[derive(Clone, Copy, Debug)]
pub struct Param {
    /// Canonical spelling; compared without regard to case.
    pub name: &'static str,
    pub kind: Kind,
    /// Raw text; empty means unset.
    pub default: &'static str,
    /// One sentence or two for the operator.
    pub doc: &'static str,
    /// `none` is refused (flag NZ).
    pub required: bool,
    /// An invalid value stops the start instead of giving way to the default (flag DIE).
    pub strict: bool,
    /// Only the environment and the file may set it (flag LOC). Such values are never shown: they
    /// may hold credentials by mistake (I12).
    pub local: bool,
    /// A change needs no restart (flag LIVE).
    pub live: bool,
    pub support: Support,
}

/// What setting a parameter does.
#[derive(Clone, Copy, Debug)]
pub enum Support {
    /// Stores the value where the program finds it.
    Effective(fn(&mut Settings, &Value)),
    /// Effective through [`crate::Connection`].
    Connection,
    /// Will have an effect in a later version.
    Later,
    /// Deliberately without effect, and harmless.
    NoEffect,
    /// Asks for something that this agent does not do.
    Unsupported,
}

/// Parameters that belong together, under a title for the operator.
#[derive(Clone, Copy, Debug)]
pub struct Group {
    pub title: &'static str,
    pub params: &'static [Param],
}

impl Param {
    const fn new(name: &'static str, kind: Kind, default: &'static str, doc: &'static str) -> Self {
        Self {
            name,
            kind,
            default,
            doc,
            required: false,
            strict: false,
            local: false,
            live: false,
            support: Support::Later,
        }
    }

    const fn required(self) -> Self {
        Self { required: true, ..self }
    }

    const fn strict(self) -> Self {
        Self { strict: true, ..self }
    }

    const fn local(self) -> Self {
        Self { local: true, ..self }
    }

    const fn live(self) -> Self {
        Self { live: true, ..self }
    }

    const fn sets(self, set: fn(&mut Settings, &Value)) -> Self {
        Self { support: Support::Effective(set), ..self }
    }

    const fn connection(self) -> Self {
        Self { support: Support::Connection, ..self }
    }

    const fn no_effect(self) -> Self {
        Self { support: Support::NoEffect, ..self }
    }

    const fn unsupported(self) -> Self {
        Self { support: Support::Unsupported, ..self }
    }

    /// True if setting it changes what the agent does.
    pub const fn is_effective(&self) -> bool {
        matches!(self.support, Support::Effective(_) | Support::Connection)
    }
}

/// Metric of a route.
const METRIC: Kind = Kind::Int { least: 1, most: 2_147_483_646 };

/// All groups, effective ones first.
pub const GROUPS: &[Group] = &[
    Group { title: "Datastore", params: DATASTORE },
    Group { title: "Logging", params: LOGGING },
    Group { title: "Hosts and interfaces", params: HOSTS_AND_INTERFACES },
    Group { title: "Policy", params: POLICY },
    Group { title: "iptables and IP sets", params: IPTABLES_AND_SETS },
    Group { title: "Routes", params: ROUTES },
    Group { title: "OpenStack", params: OPENSTACK },
    Group { title: "Facts about the cluster", params: FACTS_ABOUT_THE_CLUSTER },
    Group { title: "Fault injection for tests", params: FAULTS },
    Group { title: "Not effective yet", params: inert::LATER },
    Group { title: "Without effect", params: inert::NO_EFFECT },
    Group { title: "Not supported", params: inert::UNSUPPORTED },
];

/// Every parameter, in the order of the groups.
pub fn all() -> impl Iterator<Item = &'static Param> {
    GROUPS.iter().flat_map(|group| group.params)
}

/// Finds a parameter whatever the spelling.
pub fn find(name: &str) -> Option<&'static Param> {
    all().find(|param| param.name.eq_ignore_ascii_case(name))
}

const DATASTORE: &[Param] = &[
    Param::new(
        "FelixHostname",
        Kind::Hostname,
        "",
        "Name of this host in the data model, taken as it is; must equal the host part of endpoint keys. By \
         default the name of the host in lower case.",
    )
    .required()
    .local()
    .sets(|s, v| s.hostname = v.text().to_owned()),
    Param::new(
        "DatastoreType",
        Kind::OneOf(&["kubernetes", "etcdv3"]),
        "etcdv3",
        "Which datastore to use; endpoints from any source mean etcdv3, and kubernetes is refused.",
    )
    .required()
    .strict()
    .local()
    .connection(),
    Param::new(
        "EtcdEndpoints",
        Kind::Endpoints,
        "",
        "URLs of the etcd servers, all of one scheme. They beat EtcdAddr and EtcdScheme.",
    )
    .local()
    .connection(),
    Param::new("EtcdAddr", Kind::Authority, "127.0.0.1:2379", "One etcd server, combined with EtcdScheme.")
        .local()
        .connection(),
    Param::new("EtcdScheme", Kind::OneOf(&["http", "https"]), "http", "URL scheme for EtcdAddr.").local().connection(),
    Param::new(
        "EtcdKeyFile",
        Kind::ExistingFile,
        "",
        "Private key for TLS to etcd; belongs together with EtcdCertFile.",
    )
    .local()
    .connection(),
    Param::new(
        "EtcdCertFile",
        Kind::ExistingFile,
        "",
        "Certificate for TLS to etcd; belongs together with EtcdKeyFile.",
    )
    .local()
    .connection(),
    Param::new(
        "EtcdCaFile",
        Kind::ExistingFile,
        "",
        "Authorities that etcd servers are checked against; by default those of the system.",
    )
    .local()
    .connection(),
];

const LOGGING: &[Param] = &[
    Param::new(
        "LogSeverityScreen",
        Kind::OneOf(&["TRACE", "DEBUG", "INFO", "WARNING", "ERROR", "FATAL"]),
        "INFO",
        "Least severity that is written to standard output; none turns it off.",
    )
    .sets(|s, v| s.log_severity = Severity::from_word(v.text())),
    Param::new(
        "LogFormatScreen",
        Kind::OneOf(&["text", "json"]),
        "text",
        "Format of standard output: lines of text, or one JSON object per line.",
    )
    .sets(|s, v| s.log_format = LogFormat::from_word(v.text())),
    Param::new(
        "LogPrefix",
        Kind::PlainText,
        "calico-packet",
        "Text that starts the kernel log line of a rule with action Log; %t, %k, %n and %p stand for tier, \
         kind, name and namespace/name of the policy.",
    )
    .sets(|s, v| v.text().clone_into(&mut s.log_prefix)),
    Param::new(
        "LogActionRateLimit",
        Kind::LogRate,
        "",
        "How often a rule with action Log may log, e.g. 10/minute; by default without limit.",
    )
    .sets(|s, v| s.log_rate = v.rate()),
    Param::new(
        "LogActionRateLimitBurst",
        Kind::Int { least: 0, most: i64::MAX },
        "5",
        "How many packets such a rule may log before the limit counts.",
    )
    .sets(|s, v| s.log_burst = v.number()),
];

const HOSTS_AND_INTERFACES: &[Param] = &[
    Param::new(
        "InterfacePrefix",
        Kind::Interfaces,
        "cali",
        "Prefixes of the names of workload interfaces. OpenStack needs tap in it.",
    )
    .required()
    .strict()
    .sets(|s, v| s.interface_prefixes = v.list().to_vec()),
    Param::new(
        "Ipv6Support",
        Kind::Flag,
        "true",
        "Programs IPv6 as well as IPv4. Off by itself where the kernel has no IPv6.",
    )
    .sets(|s, v| s.ipv6 = v.flag()),
    Param::new(
        "IPForwarding",
        Kind::OneOf(&["Enabled", "Disabled"]),
        "Enabled",
        "Switches the forwarding of packets on, for the host and for each workload interface; Disabled \
         leaves it as it is.",
    )
    .sets(|s, v| s.ip_forwarding = v.text() == "Enabled"),
    Param::new(
        "InterfaceRefreshInterval",
        Kind::Seconds,
        "90",
        "Time between lists of all interfaces of the host; 0 turns them off.",
    )
    .sets(|s, v| s.link_refresh = v.duration()),
    Param::new("NetlinkTimeoutSecs", Kind::Seconds, "10", "Longest time to wait for an answer of the kernel.")
        .sets(|s, v| s.netlink_timeout = v.duration()),
];

const POLICY: &[Param] = &[
    Param::new(
        "DefaultEndpointToHostAction",
        Kind::OneOf(&["DROP", "RETURN", "ACCEPT"]),
        "DROP",
        "What happens to packets from a workload to its own host after policy.",
    )
    .required()
    .strict()
    .sets(|s, v| s.endpoint_to_host = EndpointToHost::from_word(v.text())),
    Param::new(
        "DisableConntrackInvalidCheck",
        Kind::Flag,
        "false",
        "Does not drop packets that connection tracking calls invalid.",
    )
    .sets(|s, v| s.check_invalid = !v.flag()),
    Param::new(
        "AllowVXLANPacketsFromWorkloads",
        Kind::Flag,
        "false",
        "Does not drop VXLAN packets that workloads send.",
    )
    .sets(|s, v| s.allow_vxlan_from_workloads = v.flag()),
    Param::new(
        "AllowIPIPPacketsFromWorkloads",
        Kind::Flag,
        "false",
        "Does not drop IP-in-IP packets that workloads send.",
    )
    .sets(|s, v| s.allow_ipip_from_workloads = v.flag()),
    Param::new(
        "WorkloadSourceSpoofing",
        Kind::OneOf(&["Disabled", "Any"]),
        "Disabled",
        "With Any, an endpoint may list source addresses beyond its own.",
    )
    .sets(|s, v| s.allow_source_spoofing = v.text() == "Any"),
    Param::new("VXLANPort", INT, "4789", "UDP port of VXLAN.").sets(|s, v| s.vxlan_port = v.number()),
    Param::new(
        "FailsafeInboundHostPorts",
        Kind::Ports,
        "tcp:22,udp:68,tcp:179,tcp:2379,tcp:2380,tcp:5473,tcp:6443,tcp:6666,tcp:6667",
        "Ports that stay open towards the host, whatever the policy of its interfaces; none for an empty \
         list.",
    )
    .strict()
    .sets(|s, v| s.failsafe_inbound = v.ports().to_vec()),
    Param::new(
        "FailsafeOutboundHostPorts",
        Kind::Ports,
        "udp:53,udp:67,tcp:179,tcp:2379,tcp:2380,tcp:5473,tcp:6443,tcp:6666,tcp:6667",
        "Ports that stay open from the host, whatever the policy of its interfaces; none for an empty list.",
    )
    .strict()
    .sets(|s, v| s.failsafe_outbound = v.ports().to_vec()),
    Param::new(
        "KubeNodePortRanges",
        Kind::PortRanges,
        "30000:32767",
        "Node ports that the forward check knows on a host with IPVS.",
    )
    .sets(|s, v| s.kube_node_ports = v.port_ranges().to_vec()),
];

const IPTABLES_AND_SETS: &[Param] = &[
    Param::new(
        "IptablesBackend",
        Kind::OneOf(&["legacy", "nft", "auto"]),
        "auto",
        "Which variant of iptables to run; auto decides by what is found on the host.",
    )
    .sets(|s, v| s.backend = Backend::from_word(v.text())),
    Param::new(
        "StateDirectory",
        Kind::Path,
        "/var/lib/calico-felix",
        "Where the iptables variant in use is remembered, so that a host does not move to the other one by itself; \
         none forgets it.",
    )
    .sets(|s, v| v.text().clone_into(&mut s.state_directory)),
    Param::new(
        "FeatureDetectOverride",
        Kind::Pairs,
        "",
        "Force detected capabilities, e.g. SNATFullyRandom=true,MASQFullyRandom=false.",
    )
    .sets(|s, v| s.feature_overrides = v.pairs()),
    Param::new(
        "ChainInsertMode",
        Kind::OneOf(&["insert", "append"]),
        "insert",
        "Puts our jumps at the top or at the end of the chains of the kernel.",
    )
    .required()
    .strict()
    .sets(|s, v| s.insert_mode = InsertMode::from_word(v.text())),
    Param::new(
        "IptablesFilterAllowAction",
        Kind::OneOf(&["ACCEPT", "RETURN"]),
        "ACCEPT",
        "What becomes of allowed packets in the filter table.",
    )
    .required()
    .strict()
    .sets(|s, v| s.filter_allow = AllowAction::from_word(v.text())),
    Param::new(
        "IptablesMangleAllowAction",
        Kind::OneOf(&["ACCEPT", "RETURN"]),
        "ACCEPT",
        "What becomes of packets that policy before DNAT allows, in the mangle table.",
    )
    .required()
    .strict()
    .sets(|s, v| s.mangle_allow = AllowAction::from_word(v.text())),
    Param::new(
        "IptablesFilterDenyAction",
        Kind::OneOf(&["DROP", "REJECT"]),
        "DROP",
        "What becomes of denied packets in the filter table.",
    )
    .required()
    .strict()
    .sets(|s, v| s.filter_deny = DenyAction::from_word(v.text())),
    Param::new(
        "IptablesMarkMask",
        Kind::MarkMask,
        "0xffff0000",
        "Bits of the packet mark that the agent may use, at least five.",
    )
    .required()
    .strict()
    .sets(|s, v| s.mark_mask = v.number()),
    Param::new(
        "IptablesRefreshInterval",
        Kind::Seconds,
        "180",
        "Time between comparisons of all tables with the kernel; 0 turns them off.",
    )
    .sets(|s, v| s.table_refresh = v.duration()),
    Param::new(
        "IptablesPostWriteCheckIntervalSecs",
        Kind::Seconds,
        "5",
        "Time from a write to the first look at what became of it; each further look waits twice as long.",
    )
    .sets(|s, v| s.post_write_check = v.duration()),
    Param::new(
        "IptablesLockProbeIntervalMillis",
        Kind::Millis,
        "50",
        "Time between attempts to get the lock of iptables.",
    )
    .sets(|s, v| s.lock_probe = v.duration()),
    Param::new(
        "IpsetsRefreshInterval",
        Kind::Seconds,
        "90",
        "Time between comparisons of all IP sets with the kernel; 0 turns them off.",
    )
    .sets(|s, v| s.set_refresh = v.duration()),
    Param::new("MaxIpsetSize", INT, "1048576", "Most members that an IP set can have.")
        .required()
        .sets(|s, v| s.max_set_size = v.number()),
];

const ROUTES: &[Param] = &[
    Param::new(
        "RouteRefreshInterval",
        Kind::Seconds,
        "90",
        "Time between comparisons of all routes with the kernel; 0 turns them off.",
    )
    .sets(|s, v| s.route_refresh = v.duration()),
    Param::new("DeviceRouteProtocol", INT, "3", "Protocol number of routes to workloads in the kernel.")
        .sets(|s, v| s.route_protocol = v.number()),
    Param::new(
        "RemoveExternalRoutes",
        Kind::Flag,
        "true",
        "Removes routes on workload interfaces that others have made.",
    )
    .sets(|s, v| s.remove_external_routes = v.flag()),
    Param::new("IPv4NormalRoutePriority", METRIC, "1024", "Metric of IPv4 routes to workloads.")
        .sets(|s, v| s.route_metric_v4 = v.number()),
    Param::new("IPv6NormalRoutePriority", METRIC, "1024", "Metric of IPv6 routes to workloads.")
        .sets(|s, v| s.route_metric_v6 = v.number()),
];

const OPENSTACK: &[Param] = &[
    Param::new(
        "MetadataAddr",
        Kind::Hostname,
        "127.0.0.1",
        "Address of the Nova metadata service that workloads may reach; no effect unless it is an IP \
         address.",
    )
    .strict()
    .sets(|s, v| v.text().clone_into(&mut s.metadata_addr)),
    Param::new("MetadataPort", PORT, "8775", "Port of the Nova metadata service.")
        .strict()
        .sets(|s, v| s.metadata_port = v.number()),
];

const FACTS_ABOUT_THE_CLUSTER: &[Param] = &[
    Param::new("ClusterGUID", Kind::Text, "baddecaf", "Identity of the cluster, from ClusterInformation.")
        .live()
        .sets(|s, v| v.text().clone_into(&mut s.cluster_guid)),
    Param::new("ClusterType", Kind::Text, "", "Markers such as k8s, bgp, openstack, from ClusterInformation.")
        .live()
        .sets(|s, v| v.text().clone_into(&mut s.cluster_type)),
    Param::new("CalicoVersion", Kind::Text, "", "Version that the installer wrote, from ClusterInformation.")
        .live()
        .sets(|s, v| v.text().clone_into(&mut s.calico_version)),
    Param::new(
        "Variant",
        Kind::Text,
        "Calico",
        "Variant of the product, from ClusterInformation; with anything but Calico the agent programs \
         nothing.",
    )
    .sets(|s, v| v.text().clone_into(&mut s.variant)),
];
const FAULTS: &[Param] =
    &[Param::new("DebugPanicAfter", Kind::Seconds, "0", "Fails with an internal error after this time; 0 for never.")
        .sets(|s, v| s.panic_after = v.duration())];

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_name_is_there_once_and_every_doc_is_a_sentence() {
        let mut names = BTreeSet::new();
        for param in all() {
            assert!(names.insert(param.name.to_ascii_lowercase()), "{} is there twice", param.name);
            assert!(param.doc.ends_with('.'), "{}: the doc is a sentence", param.name);
        }
        for retired in RETIRED {
            assert!(!names.contains(&retired.name.to_ascii_lowercase()), "{} is retired and not", retired.name);
        }
    }

    #[test]
    fn names_are_found_whatever_the_case() {
        assert_eq!(find("felixHOSTname").map(|param| param.name), Some("FelixHostname"));
        assert!(find("NoSuchParam").is_none());
    }
}
