//! What active rules refer to: rules become programs, selectors, named ports and services become sets.
//!
//! Input: active policies (from `active`) and profiles (from `profiles`).
//! Output: [`RefDelta`], consumed by `members` (sets) and `gather` (programs).
//!
//! Law: *needed sets = distinct(sets of the rules of all active policies and profiles)* (A-4), rules of
//! both directions and all flags. For one owner the output says what is needed, then the program, then
//! what is no longer needed, so that a program never names a set that is not needed.

mod convert;

use std::sync::Arc;

use model::{Action, Name, PolicyKey, ProfileRules, Rule, Selector, SetId};

pub(crate) use convert::SetSource;

use crate::active::{ActiveDelta, Listed};
use crate::batch::{PolicyProgram, ProfileProgram, RuleProgram};
use crate::kit::{Bytes, IdMap, Interner, ValueMap};
use crate::names::Names;
use crate::profiles::ProfileDelta;
use crate::records::{Outline, Records};

/// A change of what the active rules are and need. `set` numbers a set while it is needed.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum RefDelta {
    Needed {
        set: u32,
        id: SetId,
        source: SetSource,
    },
    Unneeded {
        set: u32,
        id: SetId,
    },
    /// With the number of the policy while it is stored.
    Policy(u32, PolicyKey, Option<Arc<PolicyProgram>>),
    Profile(Name, Option<Arc<ProfileProgram>>),
}

/// See the [module documentation](self).
#[derive(Debug)]
pub(crate) struct References {
    /// A use per policy or profile that refers to the set.
    sets: Interner<SetId>,
    /// What a policy or profile refers to, if anything: a list in `lists`.
    of_policies: IdMap<u32, u32>,
    of_profiles: ValueMap<Name, u32>,
    lists: Bytes,
    match_all: Arc<Selector>,
}

impl Default for References {
    fn default() -> Self {
        Self {
            sets: Interner::default(),
            of_policies: IdMap::default(),
            of_profiles: ValueMap::default(),
            lists: Bytes::default(),
            match_all: Arc::new(Selector::all()),
        }
    }
}

impl References {
    pub(crate) fn on_active(
        &mut self,
        (names, records): (&Names, &Records),
        delta: ActiveDelta,
        out: &mut Vec<RefDelta>,
    ) {
        match delta {
            ActiveDelta::Changed { same_program: true, .. } => (),
            ActiveDelta::Activated { id, record, listed } | ActiveDelta::Changed { id, record, listed, .. } => {
                let Listed { key, outline } = listed;
                let Outline { tier, original_selector, do_not_track, pre_dnat, .. } = outline;
                let (inbound, outbound) = records.policy_rules(names, record);
                let (inbound, outbound, needs) = self.convert(inbound, outbound);
                let program = PolicyProgram {
                    tier,
                    inbound,
                    outbound,
                    untracked: do_not_track,
                    pre_dnat,
                    original_selector,
                    always_needed: records.is_always_needed(record),
                };
                let new = self.acquire(needs, out);
                let old = match new {
                    Some(new) => self.of_policies.insert(id, new),
                    None => self.of_policies.remove(&id),
                };
                out.push(RefDelta::Policy(id, key, Some(Arc::new(program))));
                self.release(old, out);
            }
            ActiveDelta::Deactivated { id, listed } => {
                out.push(RefDelta::Policy(id, listed.key, None));
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
                let ProfileRules { inbound, outbound } = Arc::unwrap_or_clone(rules);
                let (inbound, outbound, needs) = self.convert(inbound, outbound);
                let old = match self.acquire(needs, out) {
                    Some(new) => self.of_profiles.insert(Name::clone(&name), new),
                    None => self.of_profiles.remove(&name),
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

    fn convert(&self, inbound: Vec<Rule>, outbound: Vec<Rule>) -> (Vec<RuleProgram>, Vec<RuleProgram>, Vec<Need>) {
        let mut needs = Vec::new();
        let mut convert = |rules: Vec<Rule>| -> Vec<RuleProgram> {
            (0u32..).zip(rules).map(|(index, rule)| convert::rule(rule, index, &self.match_all, &mut needs)).collect()
        };
        (convert(inbound), convert(outbound), needs)
    }

    /// Takes one use of each distinct set; returns the list of them unless it is empty.
    fn acquire(&mut self, needs: Vec<Need>, out: &mut Vec<RefDelta>) -> Option<u32> {
        let mut used = Vec::with_capacity(needs.len());
        for (id, source) in needs {
            let (set, new) = self.sets.acquire_ref(&id, SetId::clone);
            if new {
                out.push(RefDelta::Needed { set, id, source });
            }
            used.push(set);
        }
        used.sort_unstable();
        used.dedup_by(|again, first| {
            let is_same = again == first;
            if is_same {
                self.sets.release(*again);
            }
            is_same
        });
        if used.is_empty() {
            return None;
        }
        let list: Vec<u8> = used.into_iter().flat_map(u32::to_le_bytes).collect();
        Some(self.lists.insert(&list))
    }

    fn release(&mut self, list: Option<u32>, out: &mut Vec<RefDelta>) {
        let Some(list) = list else { return };
        for set in self.lists.get(list).chunks_exact(4).filter_map(|set| set.try_into().ok()).map(u32::from_le_bytes) {
            if let Some(id) = self.sets.release(set) {
                out.push(RefDelta::Unneeded { set, id });
            }
        }
        self.lists.remove(list);
        if self.lists.is_empty() {
            self.of_policies = IdMap::default();
            self.of_profiles = ValueMap::default();
        }
    }

    /// How many sets are needed.
    pub(crate) fn sets(&self) -> usize {
        self.sets.len()
    }

    /// How much each container holds.
    #[cfg(test)]
    pub(crate) fn sizes(&self) -> [(&'static str, usize); 4] {
        [
            ("needed sets", self.sets.len()),
            ("policies with sets", self.of_policies.len()),
            ("profiles with sets", self.of_profiles.len()),
            ("lists of sets", self.lists.len()),
        ]
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.sets.is_empty() && self.of_policies.is_empty() && self.of_profiles.is_empty() && self.lists.is_empty()
    }
}

/// A set that a rule refers to, and where its members come from.
type Need = (SetId, SetSource);

#[cfg(test)]
mod tests {
    use testkit::build::policy;

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
        let (mut names, mut records) = (Names::default(), Records::default());
        let mut stored = [None; 2];
        let mut numbers: Vec<u32> = Vec::new();
        for (step, expected) in script {
            let mut out = Vec::new();
            let (verb, rest) = step.split_once(' ').unwrap();
            let (name, text) = rest.split_once(' ').unwrap_or((rest, ""));
            let id = u32::from(name == "gnp/b");
            match verb {
                "+" => {
                    let (key, value) = policy(name).ingress(text).value();
                    let record = records.store_policy(&mut names, &value);
                    let listed = Listed { key, outline: Outline::of(&value) };
                    let delta = match stored[id as usize].replace(record) {
                        Some(old) => ActiveDelta::Changed {
                            id,
                            record,
                            old_tier: listed.outline.tier.clone(),
                            listed,
                            same_program: records.have_equal_programs(old, record),
                        },
                        None => ActiveDelta::Activated { id, record, listed },
                    };
                    stage.on_active((&names, &records), delta, &mut out);
                }
                "-" => {
                    stored[id as usize] = None;
                    let (key, value) = policy(name).value();
                    let listed = Listed { key, outline: Outline::of(&value) };
                    stage.on_active((&names, &records), ActiveDelta::Deactivated { id, listed }, &mut out);
                }
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
                    RefDelta::Policy(_, key, program) => {
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
