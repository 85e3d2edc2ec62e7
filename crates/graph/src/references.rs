//! What active rules refer to: rules become programs, selectors, named ports and services become sets.
//!
//! Input: active policies (from `active`) and profiles (from `profiles`).
//! Output: [`RefDelta`], consumed by `members` (sets) and `gather` (programs).
//!
//! Law: *needed sets = distinct(sets of the rules of all active policies and profiles)* (A-4), rules of
//! both directions and all flags. For one owner the output says what is needed, then the program, then
//! what is no longer needed, so that a program never names a set that is not needed.

mod convert;

use std::collections::BTreeSet;
use std::sync::Arc;

use model::{Action, Name, Policy, PolicyKey, ProfileRules, Rule, Selector, SetId};

pub(crate) use convert::SetSource;

use crate::active::ActiveDelta;
use crate::batch::{PolicyProgram, ProfileProgram, RuleProgram};
use crate::kit::{IdMap, Interner, ValueMap};
use crate::profiles::ProfileDelta;

/// A change of what the active rules are and need. `set` numbers a set while it is needed.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum RefDelta {
    Needed { set: u32, id: SetId, source: SetSource },
    Unneeded { set: u32, id: SetId },
    Policy(PolicyKey, Option<Arc<PolicyProgram>>),
    Profile(Name, Option<Arc<ProfileProgram>>),
}

/// See the [module documentation](self).
#[derive(Debug)]
pub(crate) struct References {
    /// A use per policy or profile that refers to the set.
    sets: Interner<SetId>,
    of_policies: IdMap<u32, Box<[u32]>>,
    of_profiles: ValueMap<Name, Box<[u32]>>,
    match_all: Arc<Selector>,
}

impl Default for References {
    fn default() -> Self {
        Self {
            sets: Interner::default(),
            of_policies: IdMap::default(),
            of_profiles: ValueMap::default(),
            match_all: Arc::new(Selector::all()),
        }
    }
}

impl References {
    pub(crate) fn on_active(&mut self, delta: ActiveDelta, out: &mut Vec<RefDelta>) {
        match delta {
            ActiveDelta::Changed { old, policy, .. } if same_program(&old, &policy) => (),
            ActiveDelta::Activated { id, key, policy } | ActiveDelta::Changed { id, key, policy, .. } => {
                let (inbound, outbound, needs) = self.convert(&policy.inbound, &policy.outbound);
                let program = PolicyProgram {
                    tier: Name::clone(&policy.tier),
                    inbound,
                    outbound,
                    untracked: policy.do_not_track,
                    pre_dnat: policy.pre_dnat,
                    original_selector: Name::clone(&policy.original_selector),
                    always_needed: policy.always_needed,
                };
                let new = self.acquire(needs, out);
                let old = if new.is_empty() { self.of_policies.remove(&id) } else { self.of_policies.insert(id, new) };
                out.push(RefDelta::Policy(key, Some(Arc::new(program))));
                self.release(old, out);
            }
            ActiveDelta::Deactivated { id, key } => {
                out.push(RefDelta::Policy(key, None));
                let old = self.of_policies.remove(&id);
                self.release(old, out);
            }
        }
    }

    pub(crate) fn on_profile(&mut self, delta: ProfileDelta, out: &mut Vec<RefDelta>) {
        match delta {
            ProfileDelta::Set(name, rules) => {
                let missing = rules.is_none();
                let rules = rules.unwrap_or_else(|| Arc::new(ProfileRules::for_everything(Action::Deny)));
                let (inbound, outbound, needs) = self.convert(&rules.inbound, &rules.outbound);
                let new = self.acquire(needs, out);
                let old = if new.is_empty() {
                    self.of_profiles.remove(&name)
                } else {
                    self.of_profiles.insert(Name::clone(&name), new)
                };
                out.push(RefDelta::Profile(name, Some(Arc::new(ProfileProgram { inbound, outbound, missing }))));
                self.release(old, out);
            }
            ProfileDelta::Deactivated(name) => {
                let old = self.of_profiles.remove(&name);
                out.push(RefDelta::Profile(name, None));
                self.release(old, out);
            }
        }
    }

    fn convert(&self, inbound: &[Rule], outbound: &[Rule]) -> (Vec<RuleProgram>, Vec<RuleProgram>, Vec<Need>) {
        let mut needs = Vec::new();
        let mut convert = |rules: &[Rule]| -> Vec<RuleProgram> {
            (0u32..).zip(rules).map(|(index, rule)| convert::rule(rule, index, &self.match_all, &mut needs)).collect()
        };
        (convert(inbound), convert(outbound), needs)
    }

    /// Takes one use of each distinct set.
    fn acquire(&mut self, needs: Vec<Need>, out: &mut Vec<RefDelta>) -> Box<[u32]> {
        let mut used = BTreeSet::new();
        for (id, source) in needs {
            let (set, new) = self.sets.acquire_ref(&id, SetId::clone);
            if new {
                out.push(RefDelta::Needed { set, id, source });
            }
            if !used.insert(set) {
                self.sets.release(set);
            }
        }
        used.into_iter().collect()
    }

    fn release(&mut self, sets: Option<Box<[u32]>>, out: &mut Vec<RefDelta>) {
        for set in sets.into_iter().flatten() {
            if let Some(id) = self.sets.release(set) {
                out.push(RefDelta::Unneeded { set, id });
            }
        }
    }

    /// How many sets are needed.
    pub(crate) fn sets(&self) -> usize {
        self.sets.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.sets.is_empty() && self.of_policies.is_empty() && self.of_profiles.is_empty()
    }
}

/// A set that a rule refers to, and where its members come from.
type Need = (SetId, SetSource);

/// Order and direction concern only the endpoints.
fn same_program(a: &Policy, b: &Policy) -> bool {
    a.tier == b.tier
        && a.inbound == b.inbound
        && a.outbound == b.outbound
        && a.do_not_track == b.do_not_track
        && a.pre_dnat == b.pre_dnat
        && a.original_selector == b.original_selector
        && a.always_needed == b.always_needed
}

#[cfg(test)]
mod tests {
    use testkit::build::{policy, policy_key};

    use super::*;

    #[test]
    fn a_set_is_needed_from_its_first_user_to_its_last() {
        let script = [
            ("+ gnp/a allow from has(x)", "+s1, gnp/a"),
            ("+ gnp/b deny from has(x) to has(x)", "gnp/b"),
            ("+ gnp/a allow from has(y)", "+s2, gnp/a"),
            ("+ gnp/a allow from has(y)", ""),
            ("- gnp/b", "gnp/b gone, -s1"),
            ("- gnp/a", "gnp/a gone, -s2"),
            ("profile p allow from has(x)", "+s3, profile p"),
            ("+ gnp/a allow from has(x)", "gnp/a"),
            ("profile p", "profile p missing"),
            ("- gnp/a", "gnp/a gone, -s3"),
            ("unlisted p", "profile p gone"),
        ];
        let mut stage = References::default();
        let mut last: Option<Arc<Policy>> = None;
        let mut numbers: Vec<u32> = Vec::new();
        for (step, expected) in script {
            let mut out = Vec::new();
            let (verb, rest) = step.split_once(' ').unwrap();
            let (name, text) = rest.split_once(' ').unwrap_or((rest, ""));
            let id = u32::from(name == "gnp/b");
            match verb {
                "+" => {
                    let (key, value) = policy(name).ingress(text).value();
                    let old = last.take().filter(|_| name == "gnp/a" && stage.of_policies.contains_key(&0));
                    let delta = match old {
                        Some(old) => ActiveDelta::Changed { id, key, old, policy: Arc::clone(&value) },
                        None => ActiveDelta::Activated { id, key, policy: Arc::clone(&value) },
                    };
                    stage.on_active(delta, &mut out);
                    last = Some(value);
                }
                "-" => stage.on_active(ActiveDelta::Deactivated { id, key: policy_key(name) }, &mut out),
                "profile" => {
                    let rules = (!text.is_empty()).then(|| {
                        Arc::new(ProfileRules { inbound: vec![testkit::build::rule(text)], outbound: vec![] })
                    });
                    stage.on_profile(ProfileDelta::Set(name.into(), rules), &mut out);
                }
                "unlisted" => stage.on_profile(ProfileDelta::Deactivated(name.into()), &mut out),
                _ => panic!("step {step:?}"),
            }
            let got: Vec<String> = out
                .iter()
                .map(|delta| match delta {
                    RefDelta::Needed { set, .. } => {
                        numbers.push(*set);
                        format!("+s{}", numbers.len())
                    }
                    RefDelta::Unneeded { set, .. } => {
                        let at = numbers.iter().rposition(|number| number == set).unwrap();
                        numbers[at] = u32::MAX;
                        format!("-s{}", at + 1)
                    }
                    RefDelta::Policy(key, program) => {
                        format!("{key}{}", if program.is_some() { "" } else { " gone" })
                    }
                    RefDelta::Profile(name, program) => match program {
                        None => format!("profile {name} gone"),
                        Some(program) if program.missing => format!("profile {name} missing"),
                        Some(_) => format!("profile {name}"),
                    },
                })
                .collect();
            assert_eq!(got.join(", "), expected, "step {step:?}");
        }
        assert!(stage.is_empty());
    }

    #[test]
    fn a_missing_profile_denies_in_both_directions() {
        let mut stage = References::default();
        let mut out = Vec::new();
        stage.on_profile(ProfileDelta::Set("p".into(), None), &mut out);
        let [RefDelta::Profile(_, Some(program))] = &out[..] else { panic!("{out:?}") };
        for rules in [&program.inbound, &program.outbound] {
            let [rule] = &rules[..] else { panic!("{rules:?}") };
            assert_eq!(rule.action, Action::Deny);
            assert_eq!((&rule.source, &rule.destination), (&Default::default(), &Default::default()));
        }
        assert!(program.missing);
    }
}
