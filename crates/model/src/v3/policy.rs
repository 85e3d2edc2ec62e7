//! Policies and the rules that they share with profiles (datastore.md 3.3 to 3.5).

use std::collections::BTreeMap;

use serde::Deserialize;
use serde::de::IgnoredAny;

use super::scalars::{Port, Protocol, objects, or_default, string_map};

/// `spec` of a NetworkPolicy or GlobalNetworkPolicy; the former has the last four fields at zero.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, remote = "Self", rename_all = "camelCase")]
pub struct PolicySpec {
    #[serde(deserialize_with = "or_default")]
    pub tier: String,
    pub order: Option<f64>,
    #[serde(deserialize_with = "or_default")]
    pub ingress: Vec<Rule>,
    #[serde(deserialize_with = "or_default")]
    pub egress: Vec<Rule>,
    #[serde(deserialize_with = "or_default")]
    pub selector: String,
    #[serde(deserialize_with = "or_default")]
    pub types: Vec<String>,
    #[serde(deserialize_with = "or_default")]
    pub service_account_selector: String,
    #[serde(deserialize_with = "or_default")]
    pub performance_hints: Vec<String>,
    #[serde(deserialize_with = "or_default")]
    pub do_not_track: bool,
    #[serde(rename = "preDNAT", deserialize_with = "or_default")]
    pub pre_dnat: bool,
    #[serde(deserialize_with = "or_default")]
    pub apply_on_forward: bool,
    #[serde(deserialize_with = "or_default")]
    pub namespace_selector: String,
}

/// One rule.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, remote = "Self", rename_all = "camelCase")]
pub struct Rule {
    #[serde(deserialize_with = "or_default")]
    pub action: String,
    pub ip_version: Option<i64>,
    pub protocol: Option<Protocol>,
    pub not_protocol: Option<Protocol>,
    pub icmp: Option<Icmp>,
    #[serde(rename = "notICMP")]
    pub not_icmp: Option<Icmp>,
    #[serde(deserialize_with = "or_default")]
    pub source: EntityRule,
    #[serde(deserialize_with = "or_default")]
    pub destination: EntityRule,
    pub http: Option<IgnoredObject>,
    pub metadata: Option<RuleMetadata>,
}

/// A rule's ICMP match.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, remote = "Self")]
pub struct Icmp {
    #[serde(rename = "type")]
    pub kind: Option<i64>,
    pub code: Option<i64>,
}

/// One side of a rule.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, remote = "Self", rename_all = "camelCase")]
pub struct EntityRule {
    #[serde(deserialize_with = "or_default")]
    pub nets: Vec<String>,
    #[serde(deserialize_with = "or_default")]
    pub not_nets: Vec<String>,
    #[serde(deserialize_with = "or_default")]
    pub selector: String,
    #[serde(deserialize_with = "or_default")]
    pub not_selector: String,
    #[serde(deserialize_with = "or_default")]
    pub namespace_selector: String,
    #[serde(deserialize_with = "or_default")]
    pub ports: Vec<Port>,
    #[serde(deserialize_with = "or_default")]
    pub not_ports: Vec<Port>,
    pub service_accounts: Option<ServiceAccounts>,
    pub services: Option<Services>,
}

/// Service accounts by name, by label, or both.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, remote = "Self")]
pub struct ServiceAccounts {
    #[serde(deserialize_with = "or_default")]
    pub names: Vec<String>,
    #[serde(deserialize_with = "or_default")]
    pub selector: String,
}

/// A Kubernetes service.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, remote = "Self")]
pub struct Services {
    #[serde(deserialize_with = "or_default")]
    pub name: String,
    #[serde(deserialize_with = "or_default")]
    pub namespace: String,
}

/// A rule's `metadata`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, remote = "Self")]
pub struct RuleMetadata {
    #[serde(deserialize_with = "string_map")]
    pub annotations: BTreeMap<String, String>,
}

/// An object of which only the presence matters: the packet filter does not evaluate HTTP.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct IgnoredObject(BTreeMap<String, Ignored>);

#[derive(Clone, Copy, Debug, Default, Deserialize)]
struct Ignored(#[allow(dead_code, reason = "any value is accepted and forgotten")] IgnoredAny);

impl PartialEq for Ignored {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

objects!(PolicySpec, Rule, Icmp, EntityRule, ServiceAccounts, Services, RuleMetadata);
