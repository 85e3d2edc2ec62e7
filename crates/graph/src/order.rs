//! In which order tiers and policies apply (policy.md T-1 to T-11).
//!
//! Input: tiers, and active policies (from `active`).
//! Output: the policies whose endpoints must look again because their tier has changed; and, when
//! asked, the list of tiers for a given collection of policies. Consumed by `endpoints`.
//!
//! Law: *tiers by (exists first, order, name), policies in them by (order, key)*. The result depends
//! on the stored tiers and the given policies alone.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use model::{Name, PolicyKey, Tier};

use crate::active::ActiveDelta;
use crate::batch::{HostTiers, PolicyRef, TierProgram};
use crate::records::Outline;

/// See the [module documentation](self).
#[derive(Debug, Default)]
pub(crate) struct Order {
    tiers: BTreeMap<Name, Tier>,
    /// The active policies of each tier.
    members: BTreeMap<Name, BTreeSet<u32>>,
}

impl Order {
    /// Stores a tier; collects the active policies in it if anything changed.
    pub(crate) fn on_tier(&mut self, name: &Name, new: Option<Tier>, affected: &mut Vec<u32>) {
        let old = match new {
            Some(new) => self.tiers.insert(Name::clone(name), new),
            None => self.tiers.remove(name),
        };
        if old != new {
            affected.extend(self.members.get(name).into_iter().flatten());
        }
    }

    pub(crate) fn on_active(&mut self, delta: &ActiveDelta) {
        match delta {
            ActiveDelta::Activated { id, listed, .. } => self.join(&listed.outline.tier, *id),
            ActiveDelta::Changed { listed, old_tier, .. } if listed.outline.tier == *old_tier => (),
            ActiveDelta::Changed { id, listed, old_tier, .. } => {
                self.leave(old_tier, *id);
                self.join(&listed.outline.tier, *id);
            }
            ActiveDelta::Deactivated { id, listed } => self.leave(&listed.outline.tier, *id),
        }
    }

    fn join(&mut self, tier: &Name, policy: u32) {
        match self.members.get_mut(tier) {
            Some(members) => drop(members.insert(policy)),
            None => drop(self.members.insert(Name::clone(tier), BTreeSet::from([policy]))),
        }
    }

    fn leave(&mut self, tier: &Name, policy: u32) {
        let Some(members) = self.members.get_mut(tier) else { return };
        members.remove(&policy);
        if members.is_empty() {
            self.members.remove(tier);
        }
    }

    /// The tiers that active policies name and that do not exist, in order.
    pub(crate) fn missing(&self) -> impl Iterator<Item = &Name> {
        self.members.keys().filter(|name| !self.tiers.contains_key(*name))
    }

    /// Lists the policies that apply to a workload endpoint, by tier. Policies that workloads do not
    /// use (T-11) and those of no direction (T-6) are left out.
    pub(crate) fn arrange<'a>(
        &self,
        policies: impl Iterator<Item = (&'a PolicyKey, &'a Outline)>,
    ) -> Arc<[TierProgram]> {
        self.list(policies, List::Normal)
    }

    /// Lists the policies that apply to a host endpoint (T-9 to T-11).
    pub(crate) fn arrange_host(&self, policies: &[(&PolicyKey, &Outline)]) -> HostTiers {
        let list = |which| self.list(policies.iter().copied(), which);
        HostTiers {
            untracked: list(List::Untracked),
            pre_dnat: list(List::PreDnat),
            normal: list(List::Normal),
            forward: list(List::Forward),
        }
    }

    fn list<'a>(
        &self,
        policies: impl Iterator<Item = (&'a PolicyKey, &'a Outline)>,
        which: List,
    ) -> Arc<[TierProgram]> {
        let mut by_tier: BTreeMap<&Name, Vec<(&PolicyKey, &Outline)>> = BTreeMap::new();
        for (key, policy) in policies {
            if which.directions(policy) != (false, false) {
                by_tier.entry(&policy.tier).or_default().push((key, policy));
            }
        }
        if which == List::Forward {
            // T-21: they would take away the allowance of an endpoint without a tier, and decide nothing.
            by_tier.retain(|_, policies| policies.iter().any(|(key, _)| !key.kind.is_staged()));
        }
        let mut tiers: Vec<_> = by_tier.into_iter().collect();
        // Stable: among equals the order by name stays (T-3).
        tiers.sort_by(|(a, _), (b, _)| compare_tiers(self.tiers.get(*a), self.tiers.get(*b)));
        let program = tiers.into_iter().map(|(name, mut policies)| {
            policies.sort_by(|(a_key, a), (b_key, b)| {
                let order = |policy: &Outline| policy.order.unwrap_or(f64::INFINITY);
                compare_orders(order(a), order(b)).then_with(|| a_key.cmp(b_key))
            });
            let list = |wanted: fn((bool, bool)) -> bool| {
                let listed = policies.iter().filter(|(_, policy)| wanted(which.directions(policy)));
                let reference = |(key, policy): &(&PolicyKey, &Outline)| PolicyRef {
                    key: PolicyKey::clone(key),
                    original_selector: Name::clone(&policy.original_selector),
                };
                listed.map(reference).collect()
            };
            TierProgram {
                name: Name::clone(name),
                ingress: list(|(ingress, _)| ingress),
                egress: list(|(_, egress)| egress),
                // A missing tier denies (T-4).
                default_pass: which.always_passes() || self.tiers.get(name).is_some_and(|tier| tier.default_pass),
            }
        });
        program.collect()
    }

    /// How much each container holds.
    #[cfg(test)]
    pub(crate) fn sizes(&self) -> [(&'static str, usize); 3] {
        let members = self.members.values().map(std::collections::BTreeSet::len).sum();
        [("tiers", self.tiers.len()), ("tiers with policies", self.members.len()), ("policies in tiers", members)]
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.tiers.is_empty() && self.members.is_empty()
    }
}

/// The lists that policies are split into (T-9).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum List {
    Untracked,
    PreDnat,
    Normal,
    Forward,
}

impl List {
    /// In which directions a policy is in this list: ingress, egress.
    fn directions(self, policy: &Outline) -> (bool, bool) {
        let home = match (policy.do_not_track, policy.pre_dnat) {
            (true, _) => Self::Untracked,
            (false, true) => Self::PreDnat,
            (false, false) => Self::Normal,
        };
        let is_in = match self {
            Self::Forward => home == Self::Normal && policy.apply_on_forward,
            Self::Untracked | Self::PreDnat | Self::Normal => home == self,
        };
        (is_in && policy.ingress, is_in && policy.egress && self != Self::PreDnat)
    }

    /// T-10.
    fn always_passes(self) -> bool {
        matches!(self, Self::Untracked | Self::PreDnat)
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
    use crate::active::Listed;

    /// The table of T-9, and T-10, T-20, T-21.
    #[test]
    fn the_policies_of_a_host_endpoint_are_split_into_four_lists() {
        // Of each case: the policies with their flags, and what is in which list.
        let cases: &[(&[&str], &str)] = &[
            (&["gnp/a"], "normal: t deny in gnp/a out gnp/a"),
            (&["gnp/a untracked"], "untracked: t pass in gnp/a out gnp/a"),
            (&["gnp/a untracked pre-dnat forward"], "untracked: t pass in gnp/a out gnp/a"),
            (&["gnp/a untracked egress"], "untracked: t pass out gnp/a"),
            (&["gnp/a pre-dnat"], "pre-dnat: t pass in gnp/a"),
            (&["gnp/a pre-dnat forward egress"], ""),
            (&["gnp/a forward"], "normal: t deny in gnp/a out gnp/a; forward: t deny in gnp/a out gnp/a"),
            (&["gnp/a forward egress"], "normal: t deny out gnp/a; forward: t deny out gnp/a"),
            (&["gnp/a forward none"], ""),
            (&["sgnp/a forward"], "normal: t deny in sgnp/a out sgnp/a"),
            (
                &["sgnp/a forward", "gnp/b forward ingress"],
                "normal: t deny in sgnp/a gnp/b out sgnp/a; forward: t deny in sgnp/a gnp/b out sgnp/a",
            ),
            (
                &["gnp/a", "gnp/b forward", "gnp/c pre-dnat", "gnp/d untracked ingress"],
                "untracked: t pass in gnp/d; pre-dnat: t pass in gnp/c; \
                 normal: t deny in gnp/a gnp/b out gnp/a gnp/b; forward: t deny in gnp/b out gnp/b",
            ),
        ];
        let mut stage = Order::default();
        stage.on_tier(&"t".into(), Some(Tier { order: None, default_pass: false }), &mut Vec::new());
        for (policies, expected) in cases {
            let policies: Vec<_> = policies.iter().map(|text| host_policy(text)).collect();
            let policies: Vec<_> = policies.iter().map(|(key, policy)| (key, policy)).collect();
            let HostTiers { untracked, pre_dnat, normal, forward } = stage.arrange_host(&policies);
            let lists = [("untracked", untracked), ("pre-dnat", pre_dnat), ("normal", normal), ("forward", forward)];
            let got: Vec<String> = lists
                .iter()
                .filter_map(|(word, tiers)| tiers.first().map(|tier| format!("{word}: {}", text(tier))))
                .collect();
            assert_eq!(got.join("; "), *expected, "{policies:?}");
        }
    }

    fn host_policy(text: &str) -> (PolicyKey, Outline) {
        let mut words = text.split(' ');
        let mut builder = build::policy(words.next().unwrap()).tier("t");
        for word in words {
            builder = builder.with(|policy| match word {
                "untracked" => policy.do_not_track = true,
                "pre-dnat" => policy.pre_dnat = true,
                "forward" => policy.apply_on_forward = true,
                "ingress" => policy.egress = false,
                "egress" => policy.ingress = false,
                "none" => (policy.ingress, policy.egress) = (false, false),
                _ => panic!("word {word:?}"),
            });
        }
        let (key, policy) = builder.value();
        (key, Outline::of(&policy))
    }

    fn text(tier: &TierProgram) -> String {
        let mut text = format!("{} {}", tier.name, if tier.default_pass { "pass" } else { "deny" });
        for (word, list) in [("in", &tier.ingress), ("out", &tier.egress)] {
            if !list.is_empty() {
                let keys: Vec<String> = list.iter().map(|policy| policy.key.to_string()).collect();
                text += &format!(" {word} {}", keys.join(" "));
            }
        }
        text
    }

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
                let tiers = Order::default().arrange(policies.iter().map(|(key, policy)| (key, policy)));
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
        let got = stage.arrange(policies.iter().map(|(key, policy)| (key, policy)));
        let got: Vec<String> = got.iter().map(|tier| format!("{} {}", tier.name, tier.default_pass)).collect();
        assert_eq!(got.join(", "), "z true, b true, c true, a true, y true, Missing-2 false, missing-1 false");
    }

    #[test]
    fn a_tier_that_changes_names_the_active_policies_in_it() {
        let mut stage = Order::default();
        let mut affected = Vec::new();
        let (key, outline) = policy("gnp/p", "t");
        let listed = Listed { key, outline };
        stage.on_active(&ActiveDelta::Activated { id: 4, record: 0, listed: listed.clone() });
        let tier = Some(Tier { order: Some(1.0), default_pass: false });
        assert_eq!(stage.missing().map(AsRef::as_ref).collect::<Vec<_>>(), ["t"]);
        stage.on_tier(&"t".into(), tier, &mut affected);
        assert_eq!(stage.missing().count(), 0);
        stage.on_tier(&"t".into(), tier, &mut affected);
        stage.on_tier(&"other".into(), tier, &mut affected);
        assert_eq!(affected, [4]);
        stage.on_active(&ActiveDelta::Deactivated { id: 4, listed });
        stage.on_tier(&"t".into(), None, &mut affected);
        assert_eq!(affected, [4]);
    }

    /// A policy from its key and, behind a blank, its order.
    fn policy(text: &str, tier: &str) -> (PolicyKey, Outline) {
        let (key, order) = text.split_once(' ').map_or((text, None), |(key, order)| (key, Some(order)));
        let builder = build::policy(key).tier(tier);
        let (key, policy) = order.map_or(builder.clone(), |order| builder.order(order.parse().unwrap())).value();
        (key, Outline::of(&policy))
    }
}
