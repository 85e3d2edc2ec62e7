//! The effective configuration: plain data, filled by the setters of [`crate::params`].
//!
//! Whoever needs parameters gets the few that it needs, in a struct of its own that the agent builds
//! from this one.

use std::collections::BTreeMap;
use std::time::Duration;

use model::PortRange;

use crate::value::{LogRate, ProtocolPort};

/// The effective configuration, without what only concerns the connection to the datastore.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Settings {
    pub hostname: String,
    pub log_severity: Severity,
    pub log_format: LogFormat,
    pub log_prefix: String,
    pub log_rate: Option<LogRate>,
    pub log_burst: u32,
    pub interface_prefixes: Vec<String>,
    pub ipv6: bool,
    pub link_refresh: Option<Duration>,
    pub ip_forwarding: bool,
    pub netlink_timeout: Option<Duration>,
    pub endpoint_to_host: EndpointToHost,
    pub check_invalid: bool,
    pub allow_vxlan_from_workloads: bool,
    pub allow_ipip_from_workloads: bool,
    /// Endpoints may list source addresses beyond their own.
    pub allow_source_spoofing: bool,
    pub vxlan_port: u16,
    pub failsafe_inbound: Vec<ProtocolPort>,
    pub failsafe_outbound: Vec<ProtocolPort>,
    pub kube_node_ports: Vec<PortRange>,
    pub backend: Backend,
    /// Empty: nothing is remembered.
    pub state_directory: String,
    pub feature_overrides: BTreeMap<String, String>,
    pub insert_mode: InsertMode,
    pub filter_allow: AllowAction,
    pub mangle_allow: AllowAction,
    pub filter_deny: DenyAction,
    pub mark_mask: u32,
    pub table_refresh: Option<Duration>,
    pub post_write_check: Option<Duration>,
    pub lock_probe: Option<Duration>,
    pub set_refresh: Option<Duration>,
    pub max_set_size: u32,
    pub route_refresh: Option<Duration>,
    pub route_protocol: u8,
    pub remove_external_routes: bool,
    pub route_metric_v4: u32,
    pub route_metric_v6: u32,
    pub metadata_addr: String,
    pub metadata_port: u16,
    pub cluster_guid: String,
    pub cluster_type: String,
    pub calico_version: String,
    pub variant: String,
    pub panic_after: Option<Duration>,
}

impl Settings {
    /// True if this host belongs to an OpenStack cluster (operations.md 2.9, openstack.md 9.1).
    pub fn is_openstack(&self) -> bool {
        self.cluster_type.to_ascii_lowercase().contains("openstack")
            || !matches!(self.metadata_addr.as_str(), "" | "127.0.0.1")
            || !matches!(self.metadata_port, 0 | 8775)
            || self.interface_prefixes.iter().any(|prefix| prefix == "tap")
    }

    /// True if another variant of the product is in charge: nothing is programmed (operations.md 4.6).
    pub fn is_passive(&self) -> bool {
        !matches!(self.variant.as_str(), "" | "Calico")
    }
}

/// Least severity that is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    Trace,
    Debug,
    #[default]
    Info,
    Warning,
    Error,
    Fatal,
    /// Nothing is written.
    Off,
}

impl Severity {
    /// Reads a severity as an operator writes it, `none` included.
    pub fn parse(text: &str) -> Option<Self> {
        const WORDS: [&str; 7] = ["TRACE", "DEBUG", "INFO", "WARNING", "ERROR", "FATAL", "NONE"];
        WORDS.iter().find(|word| word.eq_ignore_ascii_case(text)).map(|word| Self::from_word(word))
    }

    pub(crate) fn from_word(word: &str) -> Self {
        match word {
            "TRACE" => Self::Trace,
            "DEBUG" => Self::Debug,
            "INFO" => Self::Info,
            "WARNING" => Self::Warning,
            "ERROR" => Self::Error,
            "FATAL" => Self::Fatal,
            _ => Self::Off,
        }
    }
}

/// How log records are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    #[default]
    Text,
    Json,
}

impl LogFormat {
    pub(crate) fn from_word(word: &str) -> Self {
        if word == "json" { Self::Json } else { Self::Text }
    }
}

/// `DefaultEndpointToHostAction`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EndpointToHost {
    #[default]
    Drop,
    Accept,
    Return,
}

impl EndpointToHost {
    pub(crate) fn from_word(word: &str) -> Self {
        match word {
            "ACCEPT" => Self::Accept,
            "RETURN" => Self::Return,
            _ => Self::Drop,
        }
    }
}

/// What becomes of allowed packets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AllowAction {
    #[default]
    Accept,
    Return,
}

impl AllowAction {
    pub(crate) fn from_word(word: &str) -> Self {
        if word == "RETURN" { Self::Return } else { Self::Accept }
    }
}

/// What becomes of denied packets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DenyAction {
    #[default]
    Drop,
    Reject,
}

impl DenyAction {
    pub(crate) fn from_word(word: &str) -> Self {
        if word == "REJECT" { Self::Reject } else { Self::Drop }
    }
}

/// `IptablesBackend`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Backend {
    Legacy,
    Nft,
    /// By what is found on the host.
    #[default]
    Auto,
}

impl Backend {
    pub(crate) fn from_word(word: &str) -> Self {
        match word {
            "legacy" => Self::Legacy,
            "nft" => Self::Nft,
            _ => Self::Auto,
        }
    }
}

/// `ChainInsertMode`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum InsertMode {
    #[default]
    Insert,
    Append,
}

impl InsertMode {
    pub(crate) fn from_word(word: &str) -> Self {
        if word == "append" { Self::Append } else { Self::Insert }
    }
}

#[cfg(test)]
mod tests {
    use crate::{Raw, Source};

    #[test]
    fn openstack_is_recognised_by_any_of_four_signs_and_by_nothing_else() {
        let cases: &[(&[(&str, &str)], bool)] = &[
            (&[], false),
            (&[("ClusterType", "k8s,OpenStack,bgp")], true),
            (&[("ClusterType", "k8s,bgp")], false),
            (&[("MetadataAddr", "127.0.0.1")], false),
            (&[("MetadataAddr", "none")], false),
            (&[("MetadataAddr", "10.0.0.5")], true),
            (&[("MetadataPort", "8775")], false),
            (&[("MetadataPort", "none")], false),
            (&[("MetadataPort", "0")], false),
            (&[("MetadataPort", "9000")], true),
            (&[("InterfacePrefix", "tap,cali")], true),
            (&[("InterfacePrefix", "tapx")], false),
        ];
        for (pairs, expected) in cases {
            let mut raw = Raw::default();
            raw.set(Source::Default, "FelixHostname", "h1");
            for (name, value) in *pairs {
                raw.set(Source::File, name, value);
            }
            assert_eq!(raw.resolve().unwrap().settings.is_openstack(), *expected, "{pairs:?}");
        }
    }

    #[test]
    fn only_the_variant_of_this_product_is_active() {
        for (variant, passive) in [("Calico", false), ("", false), ("none", false), ("CalicoEnterprise", true)] {
            let mut raw = Raw::default();
            raw.set(Source::Default, "FelixHostname", "h1");
            raw.set(Source::DatastoreGlobal, "variant", variant);
            assert_eq!(raw.resolve().unwrap().settings.is_passive(), passive, "{variant:?}");
        }
    }
}
