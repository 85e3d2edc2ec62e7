//! From stored resources to internal records (datastore.md sections 3 to 5).
//!
//! Fed with keys and values by the datastore, feeds the calculation graph with [`Update`]s. This is the
//! only place where bad input turns into "absent" (I2): what does not parse or fails validation becomes an
//! update with `None`, and whatever depends on it fails closed.
//!
//! # What happens to bad parts
//!
//! The unit of validation is the whole record (datastore.md 5.1, H-6). Some defects, however, the
//! reference lets through, and there two laws hold:
//!
//! * a rule that allows, passes or logs never matches **more** than what is written;
//! * a rule that denies never matches **less** than what can be read of it.
//!
//! | Defect | Allow, Pass, Log | Deny |
//! |---|---|---|
//! | some entries of `nets` are not networks | they match nothing | they match nothing |
//! | all entries of `nets` are not networks (H-1) | rule left out | rule without this match |
//! | any entry of `notNets` is not a network | rule left out: an exclusion is missing | rule without exclusions: keeping the others could lose a whole family (policy.md R-9) |
//! | ICMP type that the protocol or family cannot have (H-5) | rule left out | rule without the ICMP match |
//! | `services` without a name | rule left out | rule without this match |
//!
//! The labels of a profile need a whole resource that is valid by the API's own, stricter rules (V-20, V-22); the
//! rules of the profile do not (H-8).
//!
//! A policy is rejected, beyond what the reference rejects, for an unknown action (H-3), for namespace and
//! service-account selectors that do not parse (H-2), and if its own selector parses only together with
//! the text around it: `a == 'b') || (c == 'd'` would escape from the restriction to a namespace.
//!
//! Invariant: the same key and value always give the same updates, for the same records, whatever was
//! converted before.

mod complaint;
mod config;
mod endpoint;
mod hostendpoint;
mod networkset;
mod policy;
mod profile;
mod rule;
mod selectors;

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::key::{PolicyKey, PolicyKind, ResourceKey, WorkloadEndpointKey};
use crate::labels::Labels;
use crate::names::Name;
use crate::policy::{Action, Tier};
use crate::profile::{DEFAULT_ALLOW, ProfileRules};
use crate::update::{ConfigSource, Update};
use crate::v3;
use complaint::{At, Complaints};
pub use complaint::{Complaint, Effect};

/// What the conversion depends on besides key and value.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// `WorkloadSourceSpoofing` is `Any`: endpoints may list source prefixes to spoof (V-3).
    pub allow_spoofing: bool,
}

/// The outcome of one conversion.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Converted {
    /// Every record that the resource could give, absent ones with `None`.
    pub updates: Vec<Update>,
    /// What an operator should put right.
    pub complaints: Vec<Complaint>,
}

/// Converts the value of one key; `None` means that the key was deleted.
pub fn convert(key: &ResourceKey, value: Option<&[u8]>, options: &Options) -> Converted {
    let mut complaints = Complaints::default();
    let updates = match key {
        ResourceKey::WorkloadEndpoint { namespace, name } => {
            match WorkloadEndpointKey::from_resource_name(namespace, name) {
                Ok(key) => {
                    let resource = read(value, &mut complaints);
                    let endpoint = resource.and_then(|resource| endpoint::convert(resource, options, &mut complaints));
                    vec![Update::WorkloadEndpoint(key, endpoint.map(Arc::new))]
                }
                Err(error) => {
                    // Without an identity there never was a record.
                    if value.is_some() {
                        complaints.reject(At::root().field("metadata").field("name"), error);
                    }
                    Vec::new()
                }
            }
        }
        ResourceKey::Policy(key) => convert_policy(key, value, &mut complaints),
        ResourceKey::Tier(name) => {
            let tier = read(value, &mut complaints).map(|resource| convert_tier(&resource));
            vec![Update::Tier(name.clone(), tier)]
        }
        ResourceKey::Profile(name) if &**name == DEFAULT_ALLOW => {
            // K-6: the static profile of this name cannot be changed or removed.
            if value.is_some() {
                complaints
                    .reject(At::root().field("metadata").field("name"), "the name is that of the built-in profile");
            }
            Vec::new()
        }
        ResourceKey::Profile(name) => {
            let resource = read(value, &mut complaints);
            let (labels, rules) =
                resource.map(|resource| profile::convert(resource, &mut complaints)).unwrap_or_default();
            vec![
                Update::ProfileLabels(name.clone(), labels.map(Arc::new)),
                Update::ProfileRules(name.clone(), rules.map(Arc::new)),
            ]
        }
        ResourceKey::NetworkSet { namespace, name } => {
            let set = read(value, &mut complaints)
                .and_then(|resource| networkset::convert(resource, namespace, &mut complaints));
            vec![Update::NetworkSet(format!("{namespace}/{name}").into(), set.map(Arc::new))]
        }
        ResourceKey::GlobalNetworkSet(name) => {
            let set =
                read(value, &mut complaints).and_then(|resource| networkset::convert(resource, "", &mut complaints));
            vec![Update::NetworkSet(name.clone(), set.map(Arc::new))]
        }
        ResourceKey::HostEndpoint(name) => {
            let endpoint =
                read(value, &mut complaints).and_then(|resource| hostendpoint::convert(resource, &mut complaints));
            vec![Update::HostEndpoint(name.clone(), endpoint.map(Arc::new))]
        }
        ResourceKey::ClusterInformation(name) => {
            if config::is_used_cluster_information(name) {
                let resource = read(value, &mut complaints);
                let (parameters, ready) = resource.map(config::convert_cluster_information).unzip();
                vec![
                    Update::Config(ConfigSource::ClusterInformation, parameters.map(Arc::new)),
                    Update::Ready(ready.flatten()),
                ]
            } else {
                Vec::new()
            }
        }
        ResourceKey::FelixConfiguration(name) => {
            let parameters = read(value, &mut complaints).map(config::convert_felix_configuration);
            vec![Update::Config(ConfigSource::FelixConfiguration(name.clone()), parameters.map(Arc::new))]
        }
    };
    Converted { updates, complaints: complaints.into_list() }
}

/// Returns the records that exist without being stored (K-6).
pub fn static_updates() -> Vec<Update> {
    let rules = ProfileRules::for_everything(Action::Allow);
    vec![
        Update::ProfileLabels(DEFAULT_ALLOW.into(), None),
        Update::ProfileRules(DEFAULT_ALLOW.into(), Some(Arc::new(rules))),
    ]
}

fn convert_policy(key: &PolicyKey, value: Option<&[u8]>, complaints: &mut Complaints) -> Vec<Update> {
    match key.kind {
        PolicyKind::NetworkPolicy | PolicyKind::GlobalNetworkPolicy => {
            let policy = read(value, complaints).and_then(|resource| policy::convert(resource, key, complaints));
            vec![Update::Policy(key.clone(), policy.map(Arc::new))]
        }
        // Not stored, or staged and deciding nothing (C-25).
        PolicyKind::KubernetesClusterNetworkPolicy
        | PolicyKind::KubernetesNetworkPolicy
        | PolicyKind::StagedGlobalNetworkPolicy
        | PolicyKind::StagedKubernetesNetworkPolicy
        | PolicyKind::StagedNetworkPolicy => Vec::new(),
    }
}

/// C-29.
fn convert_tier(resource: &v3::Resource<v3::TierSpec>) -> Tier {
    Tier { order: resource.spec.order, default_pass: resource.spec.default_action == "Pass" }
}

/// Parses a value; complains and returns `None` if it does not parse.
fn read<T: serde::de::DeserializeOwned + Default>(
    value: Option<&[u8]>,
    complaints: &mut Complaints,
) -> Option<v3::Resource<T>> {
    match v3::parse(value?) {
        Ok(resource) => Some(resource),
        Err(error) => {
            complaints.reject(At::root(), format_args!("the document does not parse: {error}"));
            None
        }
    }
}

fn labels_of(map: BTreeMap<String, String>) -> Labels {
    map.into_iter().map(|(key, value)| (Name::from(key), Name::from(value))).collect()
}

#[cfg(test)]
mod tests;
