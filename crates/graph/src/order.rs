//! In which order tiers and policies apply (policy.md T-1 to T-11).
//!
//! Input: tiers, and active policies (from `active`).
//! Output: the policies whose endpoints must look again because their tier has changed; and, when
//! asked, the list of tiers for a given collection of policies. Consumed by `endpoints`.
//!
//! Law: *tiers by (exists first, order, name), policies in them by (order, key)*. The result depends
//! on the stored tiers and the given policies alone.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::sync::Arc;

use model::{Name, Policy, PolicyKey, Tier};

use crate::active::ActiveDelta;
use crate::batch::{PolicyRef, TierProgram};
use crate::kit::Links;

/// See the [module documentation](self).
#[derive(Debug, Default)]
pub(crate) struct Order {
    tiers: BTreeMap<Name, Tier>,
    /// Active policies and their tiers.
    members: Links<u32, Name>,
}

impl Order {
    /// Stores a tier; collects the active policies in it if anything changed.
    pub(crate) fn on_tier(&mut self, name: &Name, new: Option<Tier>, affected: &mut Vec<u32>) {
        let old = match new {
            Some(new) => self.tiers.insert(Name::clone(name), new),
            None => self.tiers.remove(name),
        };
        if old != new {
            affected.extend(self.members.lefts(name.as_ref() as &str));
        }
    }

    pub(crate) fn on_active(&mut self, delta: &ActiveDelta) {
        match delta {
            ActiveDelta::Activated { id, policy, .. } | ActiveDelta::Changed { id, policy, .. } => {
                self.members.set_left(id, [Name::clone(&policy.tier)]);
            }
            ActiveDelta::Deactivated { id, .. } => drop(self.members.set_left(id, [])),
        }
    }

    /// The tiers that active policies name and that do not exist, in order.
    pub(crate) fn missing(&self) -> impl Iterator<Item = &Name> {
        self.members.rights().filter(|name| !self.tiers.contains_key(*name))
    }

    /// Lists the policies that apply to a workload endpoint, by tier. Policies that workloads do not
    /// use (T-11) and those of no direction (T-6) are left out.
    pub(crate) fn arrange<'a>(
        &self,
        policies: impl Iterator<Item = (&'a PolicyKey, &'a Policy)>,
    ) -> Arc<[TierProgram]> {
        let mut by_tier: BTreeMap<&Name, Vec<(&PolicyKey, &Policy)>> = BTreeMap::new();
        for (key, policy) in policies {
            let normal = !policy.do_not_track && !policy.pre_dnat;
            if normal && (policy.ingress || policy.egress) {
                by_tier.entry(&policy.tier).or_default().push((key, policy));
            }
        }
        let mut tiers: Vec<_> = by_tier.into_iter().collect();
        // Stable: among equals the order by name stays (T-3).
        tiers.sort_by(|(a, _), (b, _)| compare_tiers(self.tiers.get(*a), self.tiers.get(*b)));
        let program = tiers.into_iter().map(|(name, mut policies)| {
            policies.sort_by(|(a_key, a), (b_key, b)| {
                let order = |policy: &Policy| policy.order.unwrap_or(f64::INFINITY);
                compare_orders(order(a), order(b)).then_with(|| a_key.cmp(b_key))
            });
            let list = |wanted: fn(&Policy) -> bool| {
                let listed = policies.iter().filter(|(_, policy)| wanted(policy));
                let reference = |(key, policy): &(&PolicyKey, &Policy)| PolicyRef {
                    key: PolicyKey::clone(key),
                    original_selector: Name::clone(&policy.original_selector),
                };
                listed.map(reference).collect()
            };
            TierProgram {
                name: Name::clone(name),
                ingress: list(|policy| policy.ingress),
                egress: list(|policy| policy.egress),
                // A missing tier denies (T-4).
                default_pass: self.tiers.get(name).is_some_and(|tier| tier.default_pass),
            }
        });
        program.collect()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.tiers.is_empty() && self.members.is_empty()
    }
}

/// Existing tiers first (T-4), those with an order before those without (T-2).
fn compare_tiers(a: Option<&Tier>, b: Option<&Tier>) -> Ordering {
    let rank = |tier: Option<&Tier>| match tier {
        Some(Tier { order: Some(order), .. }) => (0, *order),
        Some(Tier { order: None, .. }) => (1, 0.0),
        None => (2, 0.0),
    };
    let ((a_rank, a_order), (b_rank, b_order)) = (rank(a), rank(b));
    a_rank.cmp(&b_rank).then_with(|| compare_orders(a_order, b_order))
}

/// Zero and negative zero are equal.
fn compare_orders(a: f64, b: f64) -> Ordering {
    (a + 0.0).total_cmp(&(b + 0.0))
}

#[cfg(test)]
mod tests {
    use testkit::build;

    use super::*;

    #[test]
    fn policies_of_a_tier_are_ordered_by_order_and_then_by_name_namespace_and_kind() {
        // The table of T-5.
        let cases: &[(&[&str], &str)] = &[
            (&["np/x/a", "gnp/a"], "gnp/a np/x/a"),
            (&["np/ns1/b", "np/ns2/a"], "np/ns2/a np/ns1/b"),
            (&["gnp/a", "gnp/a-b", "gnp/a.b"], "gnp/a-b gnp/a.b gnp/a"),
            (&["gnp/a1", "gnp/a"], "gnp/a gnp/a1"),
            (&["gnp/1 10", "gnp/2", "gnp/3 -1", "gnp/4 10.5"], "gnp/3 gnp/1 gnp/4 gnp/2"),
            (&["gnp/b 0", "gnp/a -0"], "gnp/a gnp/b"),
        ];
        for (policies, expected) in cases {
            let mut policies: Vec<_> = policies.iter().map(|text| policy(text, "default")).collect();
            for _ in 0..2 {
                let tiers = Order::default().arrange(policies.iter().map(|(key, policy)| (key, policy.as_ref())));
                let [tier] = &*tiers else { panic!("{tiers:?}") };
                let got: Vec<String> = tier.ingress.iter().map(|policy| policy.key.to_string()).collect();
                assert_eq!(got.join(" "), *expected);
                policies.reverse();
            }
        }
    }

    #[test]
    fn tiers_are_ordered_by_order_then_name_and_missing_ones_come_last_and_deny() {
        let mut stage = Order::default();
        let tiers = [("c", Some(1.0)), ("b", Some(1.0)), ("a", None), ("z", Some(-0.5)), ("y", None)];
        for (name, order) in tiers {
            stage.on_tier(&name.into(), Some(Tier { order, default_pass: true }), &mut Vec::new());
        }
        let policies = ["a", "b", "c", "missing-1", "Missing-2", "y", "z"].map(|tier| policy("gnp/p", tier));
        let got = stage.arrange(policies.iter().map(|(key, policy)| (key, policy.as_ref())));
        let got: Vec<String> = got.iter().map(|tier| format!("{} {}", tier.name, tier.default_pass)).collect();
        assert_eq!(got.join(", "), "z true, b true, c true, a true, y true, Missing-2 false, missing-1 false");
    }

    #[test]
    fn a_tier_that_changes_names_the_active_policies_in_it() {
        let mut stage = Order::default();
        let mut affected = Vec::new();
        let (key, value) = policy("gnp/p", "t");
        stage.on_active(&ActiveDelta::Activated { id: 4, key: key.clone(), policy: value });
        let tier = Some(Tier { order: Some(1.0), default_pass: false });
        assert_eq!(stage.missing().map(AsRef::as_ref).collect::<Vec<_>>(), ["t"]);
        stage.on_tier(&"t".into(), tier, &mut affected);
        assert_eq!(stage.missing().count(), 0);
        stage.on_tier(&"t".into(), tier, &mut affected);
        stage.on_tier(&"other".into(), tier, &mut affected);
        assert_eq!(affected, [4]);
        stage.on_active(&ActiveDelta::Deactivated { id: 4, key });
        stage.on_tier(&"t".into(), None, &mut affected);
        assert_eq!(affected, [4]);
    }

    /// A policy from its key and, behind a blank, its order.
    fn policy(text: &str, tier: &str) -> (PolicyKey, Arc<Policy>) {
        let (key, order) = text.split_once(' ').map_or((text, None), |(key, order)| (key, Some(order)));
        let builder = build::policy(key).tier(tier);
        order.map_or(builder.clone(), |order| builder.order(order.parse().unwrap())).value()
    }
}
