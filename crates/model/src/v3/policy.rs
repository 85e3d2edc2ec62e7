//! Policies and the rules that they share with profiles (datastore.md 3.3 to 3.5).

use std::fmt;

use serde::de::{IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

use super::object::objects;
use super::scalars::{Port, Protocol};
use super::text::{Text, TextMap};

objects! {
    /// `spec` of a NetworkPolicy or GlobalNetworkPolicy; the former has the last four fields at zero.
    pub struct PolicySpec<'a> {
        "tier" tier: Text<'a>,
        "order" order: Option<f64>,
        "ingress" ingress: Vec<Rule<'a>>,
        "egress" egress: Vec<Rule<'a>>,
        "selector" selector: Text<'a>,
        "types" types: Vec<Text<'a>>,
        "serviceAccountSelector" service_account_selector: Text<'a>,
        "performanceHints" performance_hints: Vec<Text<'a>>,
        "doNotTrack" do_not_track: bool,
        "preDNAT" pre_dnat: bool,
        "applyOnForward" apply_on_forward: bool,
        "namespaceSelector" namespace_selector: Text<'a>,
    }

    /// One rule.
    pub struct Rule<'a> {
        "action" action: Text<'a>,
        "ipVersion" ip_version: Option<i64>,
        "protocol" protocol: Option<Protocol<'a>>,
        "notProtocol" not_protocol: Option<Protocol<'a>>,
        "icmp" icmp: Option<Icmp>,
        "notICMP" not_icmp: Option<Icmp>,
        "source" source: EntityRule<'a>,
        "destination" destination: EntityRule<'a>,
        "http" http: Option<IgnoredObject>,
        "metadata" metadata: Option<RuleMetadata<'a>>,
    }

    /// A rule's ICMP match.
    #[derive(Copy)]
    pub struct Icmp {
        "type" kind: Option<i64>,
        "code" code: Option<i64>,
    }

    /// One side of a rule.
    pub struct EntityRule<'a> {
        "nets" nets: Vec<Text<'a>>,
        "notNets" not_nets: Vec<Text<'a>>,
        "selector" selector: Text<'a>,
        "notSelector" not_selector: Text<'a>,
        "namespaceSelector" namespace_selector: Text<'a>,
        "ports" ports: Vec<Port<'a>>,
        "notPorts" not_ports: Vec<Port<'a>>,
        "serviceAccounts" service_accounts: Option<ServiceAccounts<'a>>,
        "services" services: Option<Services<'a>>,
    }

    /// Service accounts by name, by label, or both.
    pub struct ServiceAccounts<'a> {
        "names" names: Vec<Text<'a>>,
        "selector" selector: Text<'a>,
    }

    /// A Kubernetes service.
    pub struct Services<'a> {
        "name" name: Text<'a>,
        "namespace" namespace: Text<'a>,
    }

    /// A rule's `metadata`.
    pub struct RuleMetadata<'a> {
        "annotations" annotations: TextMap<'a>,
    }
}

/// An object of which only the presence matters: the packet filter does not evaluate HTTP.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IgnoredObject;

impl<'de> Deserialize<'de> for IgnoredObject {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ObjectVisitor;

        impl<'de> Visitor<'de> for ObjectVisitor {
            type Value = IgnoredObject;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<IgnoredObject, A::Error> {
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                Ok(IgnoredObject)
            }
        }

        deserializer.deserialize_map(ObjectVisitor)
    }
}
