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

use crate::kit::{Counted, IdMap};
use crate::names::Names;
use crate::records::Records;

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum ProfileDelta {
    /// Active with these rules, or missing.
    Set(Name, Option<Arc<ProfileRules>>),
    Deactivated(Name),
}

/// See the [module documentation](self).
#[derive(Debug)]
pub(crate) struct ActiveProfiles {
    /// Record of the rules by number of the name, without the profile that always exists.
    stored: IdMap<u32, u32>,
    listed: Counted<Name>,
    default_allow: Arc<ProfileRules>,
}

impl Default for ActiveProfiles {
    fn default() -> Self {
        let default_allow = Arc::new(ProfileRules::for_everything(Action::Allow));
        Self { stored: IdMap::default(), listed: Counted::default(), default_allow }
    }
}

impl ActiveProfiles {
    /// Stores the rules of a profile. The static profile cannot be changed (datastore.md K-6).
    pub(crate) fn on_rules(
        &mut self,
        (names, records): (&mut Names, &mut Records),
        name: &Name,
        new: Option<&Arc<ProfileRules>>,
        out: &mut Vec<ProfileDelta>,
    ) {
        if name.as_ref() == DEFAULT_ALLOW {
            return;
        }
        let id = names.acquire(name);
        let record = new.map(|new| records.store_rules(names, new));
        let old = match record {
            Some(record) => self.stored.insert(id, record),
            None => self.stored.remove(&id),
        };
        if self.stored.is_empty() {
            self.stored = IdMap::default();
        }
        let is_same = match (old, record) {
            (Some(old), Some(new)) => records.are_equal(old, new),
            (None, None) => true,
            (Some(_), None) | (None, Some(_)) => false,
        };
        if let Some(old) = old {
            records.discard_rules(names, old);
            // A stored profile holds exactly one use of its name.
            names.release(id);
        }
        if new.is_none() {
            names.release(id);
        }
        if !is_same && self.listed.contains(name) {
            out.push(ProfileDelta::Set(Name::clone(name), new.cloned()));
        }
    }

    /// Follows a change of the profile list of a local endpoint.
    pub(crate) fn on_list(
        &mut self,
        (names, records): (&Names, &Records),
        old: &[Name],
        new: &[Name],
        out: &mut Vec<ProfileDelta>,
    ) {
        for name in new {
            if self.listed.add(Name::clone(name)) {
                out.push(ProfileDelta::Set(Name::clone(name), self.rules(names, records, name)));
            }
        }
        for name in old {
            if self.listed.remove(name.as_ref() as &str) {
                out.push(ProfileDelta::Deactivated(Name::clone(name)));
            }
        }
    }

    fn rules(&self, names: &Names, records: &Records, name: &str) -> Option<Arc<ProfileRules>> {
        if name == DEFAULT_ALLOW {
            return Some(Arc::clone(&self.default_allow));
        }
        let record = self.stored.get(&names.find(name)?)?;
        Some(Arc::new(records.profile_rules(names, *record)))
    }

    /// Tells whether the profile exists.
    pub(crate) fn is_stored(&self, names: &Names, name: &str) -> bool {
        name == DEFAULT_ALLOW || names.find(name).is_some_and(|name| self.stored.contains_key(&name))
    }

    pub(crate) fn len(&self) -> usize {
        self.listed.len()
    }

    /// How much each container holds.
    #[cfg(test)]
    pub(crate) fn sizes(&self) -> [(&'static str, usize); 2] {
        [("stored profiles", self.stored.len()), ("listed profiles", self.listed.len())]
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
        let (mut names, mut records) = (Names::default(), Records::default());
        for (step, expected) in script {
            let mut out = Vec::new();
            let list = |text: &str| -> Vec<Name> {
                if text == "-" { Vec::new() } else { text.split(',').map(Name::from).collect() }
            };
            match step.split(' ').collect::<Vec<_>>()[..] {
                ["rules", name] => {
                    let rules = Arc::new(ProfileRules::default());
                    stage.on_rules((&mut names, &mut records), &name.into(), Some(&rules), &mut out);
                }
                ["delete", name] => stage.on_rules((&mut names, &mut records), &name.into(), None, &mut out),
                ["list", old, new] => stage.on_list((&names, &records), &list(old), &list(new), &mut out),
                ref other => panic!("step {other:?}"),
            }
            let got = out.iter().map(|delta| match delta {
                ProfileDelta::Set(name, Some(_)) => format!("{name} set"),
                ProfileDelta::Set(name, None) => format!("{name} missing"),
                ProfileDelta::Deactivated(name) => format!("{name} deactivated"),
            });
            assert_eq!(got.collect::<Vec<_>>().join(", "), expected, "step {step:?}");
        }
        assert!(stage.is_empty() && names.is_empty() && records.is_empty());
    }
}
