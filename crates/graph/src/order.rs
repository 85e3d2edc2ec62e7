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
