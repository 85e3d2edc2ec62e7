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
use model::{Action, Name, ProfileRules};

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
        let default_allow = Arc::new(ProfileRules::for_everything(Action::Allow));
        Self { stored: ValueMap::default(), listed: Counted::default(), default_allow }
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

    /// Tells whether the profile exists.
    pub(crate) fn is_stored(&self, name: &str) -> bool {
        self.rules(name).is_some()
    }

    pub(crate) fn len(&self) -> usize {
        self.listed.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.stored.is_empty() && self.listed.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listed_profile_is_set_and_a_missing_one_is_missing() {
        let script = [
            ("rules p", ""),
            ("list - p,q,p", "p set, q missing"),
            ("list - q", ""),
            ("rules q", "q set"),
            ("rules q", ""),
            ("delete p", "p missing"),
            ("list p,q,p q", "p deactivated"),
            ("list q -", ""),
            ("delete q", "q missing"),
            ("list q -", "q deactivated"),
            ("list - projectcalico-default-allow", "projectcalico-default-allow set"),
            ("rules projectcalico-default-allow", ""),
            ("delete projectcalico-default-allow", ""),
            ("list projectcalico-default-allow -", "projectcalico-default-allow deactivated"),
        ];
        let mut stage = ActiveProfiles::default();
        for (step, expected) in script {
            let mut out = Vec::new();
            let names = |text: &str| -> Vec<Name> {
                if text == "-" { Vec::new() } else { text.split(',').map(Name::from).collect() }
            };
            match step.split(' ').collect::<Vec<_>>()[..] {
                ["rules", name] => stage.on_rules(&name.into(), Some(&Arc::new(ProfileRules::default())), &mut out),
                ["delete", name] => stage.on_rules(&name.into(), None, &mut out),
                ["list", old, new] => stage.on_list(&names(old), &names(new), &mut out),
                ref other => panic!("step {other:?}"),
            }
            let got = out.iter().map(|delta| match delta {
                ProfileDelta::Set(name, Some(_)) => format!("{name} set"),
                ProfileDelta::Set(name, None) => format!("{name} missing"),
                ProfileDelta::Deactivated(name) => format!("{name} deactivated"),
            });
            assert_eq!(got.collect::<Vec<_>>().join(", "), expected, "step {step:?}");
        }
        assert!(stage.is_empty());
    }
}
