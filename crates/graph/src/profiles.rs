//! Which profiles are active on this host, and what stands in for those that are missing.
//!
//! Input: rules of profiles, profile lists of local endpoints (from `local`).
//! Output: [`ProfileDelta`], consumed by `references`.
//!
//! Law: *active = { profile | a local endpoint lists it }* (policy.md A-3); the rules of an active
//! profile that is not stored are `None`, which everyone downstream reads as "deny".
//! A `Set` is only ever sent with a value that differs from the one before.

use std::sync::Arc;

use model::profile::DEFAULT_ALLOW;
use model::{Action, EntityMatch, Name, ProfileRules, Rule};

use crate::kit::{Counted, ValueMap};

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum ProfileDelta {
    /// Active with these rules, or missing.
    Set(Name, Option<Arc<ProfileRules>>),
    Deactivated(Name),
}

/// See the [module documentation](self).
#[derive(Debug)]
pub(crate) struct ActiveProfiles {
    /// Without the one that always exists.
    stored: ValueMap<Name, Arc<ProfileRules>>,
    listed: Counted<Name>,
    default_allow: Arc<ProfileRules>,
}

impl Default for ActiveProfiles {
    fn default() -> Self {
        let allow = vec![rule(Action::Allow)];
        let default_allow = Arc::new(ProfileRules { inbound: allow.clone(), outbound: allow });
        Self { stored: ValueMap::default(), listed: Counted::default(), default_allow }
    }
}

/// A rule that matches everything.
pub(crate) fn rule(action: Action) -> Rule {
    Rule {
        action,
        family: None,
        protocol: None,
        not_protocol: None,
        icmp: None,
        not_icmp: None,
        source: EntityMatch::default(),
        destination: EntityMatch::default(),
        has_http: false,
        annotations: std::collections::BTreeMap::new(),
    }
}

impl ActiveProfiles {
    /// Stores the rules of a profile. The static profile cannot be changed (datastore.md K-6).
    pub(crate) fn on_rules(&mut self, name: &Name, new: Option<&Arc<ProfileRules>>, out: &mut Vec<ProfileDelta>) {
        if name.as_ref() == DEFAULT_ALLOW {
            return;
        }
        let old = match new {
            Some(new) => self.stored.insert(Name::clone(name), Arc::clone(new)),
            None => self.stored.remove(name),
        };
        if self.stored.is_empty() {
            self.stored = ValueMap::default();
        }
        if old.as_ref() != new && self.listed.contains(name) {
            out.push(ProfileDelta::Set(Name::clone(name), new.cloned()));
        }
    }

    /// Follows a change of the profile list of a local endpoint.
    pub(crate) fn on_list(&mut self, old: &[Name], new: &[Name], out: &mut Vec<ProfileDelta>) {
        for name in new {
            if self.listed.add(Name::clone(name)) {
                out.push(ProfileDelta::Set(Name::clone(name), self.rules(name).cloned()));
            }
        }
        for name in old {
            if self.listed.remove(name.as_ref() as &str) {
                out.push(ProfileDelta::Deactivated(Name::clone(name)));
            }
        }
    }

    fn rules(&self, name: &str) -> Option<&Arc<ProfileRules>> {
        if name == DEFAULT_ALLOW { Some(&self.default_allow) } else { self.stored.get(name) }
    }

    pub(crate) fn len(&self) -> usize {
        self.listed.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.stored.is_empty() && self.listed.is_empty()
    }
}
