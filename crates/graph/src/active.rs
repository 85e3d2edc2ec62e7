//! Which policies are active on this host (policy.md A-2).
//!
//! Input: policies with the number of their selector, and matches of local endpoints (from `selectors`).
//! Output: [`ActiveDelta`], consumed by `references` and `order`; and the selectors whose list of
//! policies looks different to an endpoint, consumed by `endpoints`.
//!
//! Law: *active = { policy | always needed, or its selector matches a local endpoint }*.
//! Per policy the output alternates `Activated`/`Deactivated`; a `Changed` only appears between the
//! two, and only with a value that differs.

use std::sync::Arc;

use model::{Policy, PolicyKey};

use crate::kit::{Column, Interner};
use crate::selectors::MatchDelta;

/// What an active policy is, was, or no longer is. `id` is its number while it is stored.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum ActiveDelta {
    Activated { id: u32, key: PolicyKey, policy: Arc<Policy> },
    Changed { id: u32, key: PolicyKey, old: Arc<Policy>, policy: Arc<Policy> },
    Deactivated { id: u32, key: PolicyKey },
}

/// See the [module documentation](self).
#[derive(Debug, Default)]
pub(crate) struct ActivePolicies {
    keys: Interner<PolicyKey>,
    policies: Column<Option<Stored>>,
    by_selector: Column<Users>,
    active: u32,
}

#[derive(Debug)]
struct Stored {
    policy: Arc<Policy>,
    selector: u32,
    active: bool,
}

/// Who uses a selector, and whether it matches anybody.
#[derive(Debug, Default)]
struct Users {
    policies: Vec<u32>,
    /// How many classes of local endpoints match.
    classes: u32,
}

impl ActivePolicies {
    /// The stored value, for early cut-off.
    pub(crate) fn get(&self, key: &PolicyKey) -> Option<&Arc<Policy>> {
        self.stored(self.keys.find(key)?).map(|stored| &stored.policy)
    }

    fn stored(&self, id: u32) -> Option<&Stored> {
        self.policies.get(id)?.as_ref()
    }

    /// Stores a policy under the number of its selector, whose matches this stage has already been told.
    /// Returns the number of the selector that the policy had before; the caller gives that use up
    /// afterwards, so that a policy that is matched before and after stays active throughout.
    pub(crate) fn on_policy(
        &mut self,
        key: &PolicyKey,
        value: Option<(Arc<Policy>, u32)>,
        out: &mut Vec<ActiveDelta>,
        relisted: &mut Vec<u32>,
    ) -> Option<u32> {
        let (id, new) = self.keys.acquire_ref(key, Clone::clone);
        if !new {
            // A stored policy holds exactly one use of its number.
            self.keys.release(id);
        }
        let old = self.policies.take(id);
        if let Some(old) = &old {
            self.by_selector.slot(old.selector).policies.retain(|policy| *policy != id);
        }
        let is_active = value
            .as_ref()
            .is_some_and(|(policy, selector)| policy.always_needed || self.by_selector.slot(*selector).classes > 0);

        let as_seen = |policy: &Policy| (policy.tier.clone(), policy.original_selector.clone(), flags(policy));
        let same_list = match (&old, &value) {
            (Some(old), Some((policy, selector))) => {
                old.selector == *selector
                    && as_seen(&old.policy) == as_seen(policy)
                    && old.policy.order.map(f64::to_bits) == policy.order.map(f64::to_bits)
            }
            (None, Some(_)) | (Some(_), None) | (None, None) => false,
        };
        if !same_list {
            relisted.extend(old.as_ref().map(|old| old.selector));
            relisted.extend(value.as_ref().map(|(_, selector)| *selector));
        }

        let was_active = old.as_ref().is_some_and(|old| old.active);
        self.active = self.active + u32::from(is_active) - u32::from(was_active);
        match (&old, &value) {
            (Some(old), Some((policy, _))) if was_active && is_active => {
                out.push(ActiveDelta::Changed {
                    id,
                    key: key.clone(),
                    old: Arc::clone(&old.policy),
                    policy: Arc::clone(policy),
                });
            }
            (_, Some((policy, _))) if is_active => {
                out.push(ActiveDelta::Activated { id, key: key.clone(), policy: Arc::clone(policy) });
            }
            (_, _) if was_active => out.push(ActiveDelta::Deactivated { id, key: key.clone() }),
            (_, _) => (),
        }

        match value {
            Some((policy, selector)) => {
                self.by_selector.slot(selector).policies.push(id);
                self.policies.replace(id, Some(Stored { policy, selector, active: is_active }));
            }
            None => drop(self.keys.release(id)),
        }
        if self.keys.is_empty() {
            self.policies = Column::default();
        }
        old.map(|old| old.selector)
    }

    pub(crate) fn on_match(&mut self, delta: MatchDelta, out: &mut Vec<ActiveDelta>) {
        let (selector, started) = match delta {
            MatchDelta::Started { selector, .. } => (selector, true),
            MatchDelta::Stopped { selector, .. } => (selector, false),
        };
        let users = self.by_selector.slot(selector);
        let edge = if started {
            users.classes += 1;
            users.classes == 1
        } else {
            debug_assert!(users.classes > 0, "a selector stopped matching a class that it did not match");
            users.classes = users.classes.saturating_sub(1);
            users.classes == 0
        };
        if !edge {
            return;
        }
        for id in &users.policies {
            let Some((key, Some(stored))) = self.keys.get(*id).zip(self.policies.get_mut(*id)) else { continue };
            let is_active = started || stored.policy.always_needed;
            if is_active == stored.active {
                continue;
            }
            stored.active = is_active;
            let (id, key) = (*id, key.clone());
            if is_active {
                self.active += 1;
                out.push(ActiveDelta::Activated { id, key, policy: Arc::clone(&stored.policy) });
            } else {
                self.active -= 1;
                out.push(ActiveDelta::Deactivated { id, key });
            }
        }
    }

    /// The policies that have this selector.
    pub(crate) fn with_selector(&self, selector: u32) -> impl Iterator<Item = (&PolicyKey, &Policy)> {
        let users = self.by_selector.get(selector).into_iter().flat_map(|users| &users.policies);
        users.filter_map(|id| Some((self.keys.get(*id)?, self.stored(*id)?.policy.as_ref())))
    }

    pub(crate) fn selector_of(&self, id: u32) -> Option<u32> {
        self.stored(id).map(|stored| stored.selector)
    }

    pub(crate) fn active(&self) -> u32 {
        self.active
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.keys.is_empty() && self.active == 0
    }
}

/// What decides in which lists of an endpoint a policy appears (T-9).
fn flags(policy: &Policy) -> [bool; 4] {
    [policy.ingress, policy.egress, policy.do_not_track, policy.pre_dnat]
}

#[cfg(test)]
mod tests {
    use testkit::build;

    use super::*;

    #[test]
    fn a_policy_is_active_from_its_first_match_to_its_last() {
        check(&[
            ("policy web 1", "relist 1"),
            ("match 1 7", "Activated np/ns/web"),
            ("match 1 8", ""),
            ("unmatch 1 7", ""),
            ("unmatch 1 8", "Deactivated np/ns/web"),
        ]);
    }

    #[test]
    fn updates_while_inactive_are_silent_and_a_deletion_while_matched_deactivates() {
        check(&[
            ("policy web 1 order=1", "relist 1"),
            ("policy web 1 order=2", "relist 1 1"),
            ("match 1 7", "Activated np/ns/web"),
            ("policy web 1 order=3", "Changed np/ns/web, relist 1 1"),
            ("delete web", "Deactivated np/ns/web, relist 1"),
            ("unmatch 1 7", ""),
        ]);
    }

    #[test]
    fn the_order_of_match_and_value_does_not_matter() {
        check(&[
            ("match 1 7", ""),
            ("policy web 1", "Activated np/ns/web, relist 1"),
            ("policy db 1", "Activated np/ns/db, relist 1"),
        ]);
    }

    #[test]
    fn a_change_of_rules_alone_concerns_no_endpoint() {
        check(&[
            ("match 1 7", ""),
            ("policy web 1", "Activated np/ns/web, relist 1"),
            ("policy web 1 rule", "Changed np/ns/web"),
            ("policy web 1 rule egress=no", "Changed np/ns/web, relist 1 1"),
        ]);
    }

    #[test]
    fn a_policy_that_is_matched_by_another_selector_stays_active() {
        check(&[
            ("match 1 7", ""),
            ("match 2 7", ""),
            ("policy web 1", "Activated np/ns/web, relist 1"),
            ("policy web 2", "Changed np/ns/web, relist 1 2"),
            ("policy web 3", "Deactivated np/ns/web, relist 2 3"),
        ]);
    }

    #[test]
    fn a_policy_that_is_always_needed_does_not_wait_for_a_match() {
        check(&[
            ("policy web 1 always", "Activated np/ns/web, relist 1"),
            ("match 1 7", ""),
            ("unmatch 1 7", ""),
            ("policy web 1", "Deactivated np/ns/web"),
        ]);
    }

    /// Runs a script and compares what the stage emits at each step. The only place that calls it.
    #[track_caller]
    fn check(script: &[(&str, &str)]) {
        let mut stage = ActivePolicies::default();
        for (step, expected) in script {
            let (mut out, mut relisted) = (Vec::new(), Vec::new());
            let number = |text: &str| text.parse::<u32>().unwrap();
            match step.split(' ').collect::<Vec<_>>()[..] {
                ["policy", name, selector, ref options @ ..] => {
                    let (key, policy) = policy(name, options);
                    stage.on_policy(&key, Some((policy, number(selector))), &mut out, &mut relisted);
                }
                ["delete", name] => {
                    stage.on_policy(&policy(name, &[]).0, None, &mut out, &mut relisted);
                }
                ["match", selector, class] => {
                    let delta = MatchDelta::Started { selector: number(selector), class: number(class) };
                    stage.on_match(delta, &mut out);
                }
                ["unmatch", selector, class] => {
                    let delta = MatchDelta::Stopped { selector: number(selector), class: number(class) };
                    stage.on_match(delta, &mut out);
                }
                ref other => panic!("step {other:?}"),
            }
            let mut got: Vec<String> = Vec::new();
            for delta in out {
                got.push(match delta {
                    ActiveDelta::Activated { key, .. } => format!("Activated {key}"),
                    ActiveDelta::Changed { key, .. } => format!("Changed {key}"),
                    ActiveDelta::Deactivated { key, .. } => format!("Deactivated {key}"),
                });
            }
            if !relisted.is_empty() {
                let selectors: Vec<String> = relisted.iter().map(ToString::to_string).collect();
                got.push(format!("relist {}", selectors.join(" ")));
            }
            assert_eq!(got.join(", "), *expected, "step {step:?} of {script:?}");
        }
    }

    fn policy(name: &str, options: &[&str]) -> (PolicyKey, Arc<Policy>) {
        let mut builder = build::policy(&format!("np/ns/{name}"));
        for option in options {
            builder = match option.split_once('=') {
                Some(("order", order)) => builder.order(order.parse().unwrap()),
                Some(("egress", _)) => builder.with(|policy| policy.egress = false),
                None if *option == "rule" => builder.ingress("allow"),
                None if *option == "always" => builder.with(|policy| policy.always_needed = true),
                Some(_) | None => panic!("option {option:?}"),
            };
        }
        builder.value()
    }
}
