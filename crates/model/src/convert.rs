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

use std::sync::Arc;

use crate::intern::Pool;
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

/// Converts the value of one key by itself; `None` means that the key was deleted. Whoever has many values keeps a
/// [`Converter`].
pub fn convert(key: &ResourceKey, value: Option<&[u8]>, options: &Options) -> Converted {
    let mut updates = Vec::new();
    let complaints = Converter::new(*options).convert(key, value, &mut updates);
    Converted { updates, complaints }
}

/// Converts value after value, and keeps what recurs once.
#[derive(Debug, Default)]
pub struct Converter {
    options: Options,
    pool: Pool,
}

impl Converter {
    pub fn new(options: Options) -> Self {
        Self { options, pool: Pool::default() }
    }

    /// Texts and selectors of what was converted so far.
    pub fn pool(&mut self) -> &mut Pool {
        &mut self.pool
    }

    /// Appends what the value of a key means, or that there is none, and returns what an operator should put right.
    ///
    /// Returns `None` if the key is none of the agent's business (K-2).
    pub fn decode(&mut self, key: &[u8], value: Option<&[u8]>, updates: &mut Vec<Update>) -> Option<Vec<Complaint>> {
        // Of these there are most by far, so their key takes no detour.
        if let Some((namespace, name)) = crate::key::workload_endpoint(key) {
            let text = value.map(v3::text);
            let mut complaints = Complaints::default();
            self.endpoint((namespace, name), text.as_deref(), updates, &mut complaints);
            return Some(complaints.into_list());
        }
        let key = ResourceKey::parse(key)?;
        Some(self.convert(&key, value, updates))
    }

    /// Appends what the value of a key means, or that there is none, and returns what an operator should put right.
    pub fn convert(&mut self, key: &ResourceKey, value: Option<&[u8]>, updates: &mut Vec<Update>) -> Vec<Complaint> {
        let text = value.map(v3::text);
        let mut complaints = Complaints::default();
        self.update(key, text.as_deref(), updates, &mut complaints);
        complaints.into_list()
    }

    fn update(
        &mut self,
        key: &ResourceKey,
        value: Option<&str>,
        updates: &mut Vec<Update>,
        complaints: &mut Complaints,
    ) {
        match key {
            ResourceKey::WorkloadEndpoint { namespace, name } => {
                self.endpoint((namespace, name), value, updates, complaints);
            }
            ResourceKey::Policy(key) => self.policy(key, value, updates, complaints),
            ResourceKey::Tier(name) => {
                let tier = read(value, complaints).map(|resource| convert_tier(&resource));
                updates.push(Update::Tier(name.clone(), tier));
            }
            ResourceKey::Profile(name) if &**name == DEFAULT_ALLOW => {
                // K-6: the static profile of this name cannot be changed or removed.
                if value.is_some() {
                    complaints
                        .reject(At::root().field("metadata").field("name"), "the name is that of the built-in profile");
                }
            }
            ResourceKey::Profile(name) => {
                self.pool.released_selectors();
                if value.is_none() {
                    self.pool.deleted();
                }
                let resource = read(value, complaints);
                let profile = resource.map(|resource| profile::convert(&resource, &mut self.pool, complaints));
                let (labels, rules) = profile.unwrap_or_default();
                updates.push(Update::ProfileLabels(name.clone(), labels.map(Arc::new)));
                updates.push(Update::ProfileRules(name.clone(), rules.map(Arc::new)));
            }
            ResourceKey::NetworkSet { namespace, name } => {
                let key = self.pool.name(&format!("{namespace}/{name}"));
                self.network_set(key, namespace, value, updates, complaints);
            }
            ResourceKey::GlobalNetworkSet(name) => {
                self.network_set(name.clone(), "", value, updates, complaints);
            }
            ResourceKey::HostEndpoint(name) => {
                let resource = read(value, complaints);
                let endpoint =
                    resource.and_then(|resource| hostendpoint::convert(&resource, &mut self.pool, complaints));
                updates.push(Update::HostEndpoint(name.clone(), endpoint.map(Arc::new)));
            }
            ResourceKey::ClusterInformation(name) => {
                if config::is_used_cluster_information(name) {
                    let resource = read(value, complaints);
                    let (parameters, ready) = resource.map(config::convert_cluster_information).unzip();
                    updates.push(Update::Config(ConfigSource::ClusterInformation, parameters.map(Arc::new)));
                    updates.push(Update::Ready(ready.flatten()));
                }
            }
            ResourceKey::FelixConfiguration(name) => {
                let parameters = read(value, complaints).map(config::convert_felix_configuration);
                let source = ConfigSource::FelixConfiguration(name.clone());
                updates.push(Update::Config(source, parameters.map(Arc::new)));
            }
        }
    }

    fn endpoint(
        &mut self,
        (namespace, name): (&str, &str),
        value: Option<&str>,
        updates: &mut Vec<Update>,
        complaints: &mut Complaints,
    ) {
        let Self { options, pool } = self;
        if value.is_none() {
            pool.deleted();
        }
        match WorkloadEndpointKey::parse(namespace, name, |part| pool.name(part)) {
            Ok(key) => {
                let resource = read(value, complaints);
                let endpoint = resource.and_then(|resource| endpoint::convert(resource, options, pool, complaints));
                updates.push(Update::WorkloadEndpoint(key, endpoint.map(Arc::new)));
            }
            Err(error) => {
                // Without an identity there never was a record.
                if value.is_some() {
                    complaints.reject(At::root().field("metadata").field("name"), error);
                }
            }
        }
    }

    fn policy(&mut self, key: &PolicyKey, value: Option<&str>, updates: &mut Vec<Update>, complaints: &mut Complaints) {
        match key.kind {
            PolicyKind::NetworkPolicy | PolicyKind::GlobalNetworkPolicy => {
                let pool = &mut self.pool;
                pool.released_selectors();
                if value.is_none() {
                    pool.deleted();
                }
                let resource = read(value, complaints);
                let policy = resource.and_then(|resource| policy::convert(&resource, key, pool, complaints));
                updates.push(Update::Policy(key.clone(), policy.map(Arc::new)));
            }
            // Not stored, or staged and deciding nothing (C-25).
            PolicyKind::KubernetesClusterNetworkPolicy
            | PolicyKind::KubernetesNetworkPolicy
            | PolicyKind::StagedGlobalNetworkPolicy
            | PolicyKind::StagedKubernetesNetworkPolicy
            | PolicyKind::StagedNetworkPolicy => (),
        }
    }

    fn network_set(
        &mut self,
        key: Name,
        namespace: &str,
        value: Option<&str>,
        updates: &mut Vec<Update>,
        complaints: &mut Complaints,
    ) {
        let pool = &mut self.pool;
        if value.is_none() {
            pool.deleted();
        }
        let resource = read(value, complaints);
        let set = resource.and_then(|resource| networkset::convert(&resource, namespace, pool, complaints));
        updates.push(Update::NetworkSet(key, set.map(Arc::new)));
    }
}

/// Returns the records that exist without being stored (K-6).
pub fn static_updates() -> Vec<Update> {
    let rules = ProfileRules::for_everything(Action::Allow);
    vec![
        Update::ProfileLabels(DEFAULT_ALLOW.into(), None),
        Update::ProfileRules(DEFAULT_ALLOW.into(), Some(Arc::new(rules))),
    ]
}

/// C-29.
fn convert_tier(resource: &v3::Resource<'_, v3::TierSpec<'_>>) -> Tier {
    Tier { order: resource.spec.order, default_pass: resource.spec.default_action == "Pass" }
}

/// Parses a value; complains and returns `None` if it does not parse.
fn read<'a, T: serde::Deserialize<'a> + Default>(
    value: Option<&'a str>,
    complaints: &mut Complaints,
) -> Option<v3::Resource<'a, T>> {
    match v3::parse(value?) {
        Ok(resource) => Some(resource),
        Err(error) => {
            complaints.reject(At::root(), format_args!("the document does not parse: {error}"));
            None
        }
    }
}

fn labels_of(map: &v3::TextMap<'_>, pool: &mut Pool) -> Labels {
    map.iter().map(|(key, value)| (pool.name(key), pool.name(value))).collect()
}

#[cfg(test)]
mod tests;
