//! Which policies apply to an endpoint, in which order (policy.md T-1 to T-10).

use model::{Name, Policy, PolicyKey, Tier};

use crate::endpoint::{List, Subject};
use crate::facts::Facts;
use crate::packet::Direction;

/// A tier of one list of one endpoint: at least one policy of it applies.
#[derive(Debug)]
pub(crate) struct TierOf<'a> {
    pub(crate) name: &'a Name,
    /// `None`: the tier does not exist (T-4).
    pub(crate) stored: Option<Tier>,
    /// In order; staged ones too.
    pub(crate) policies: Vec<(&'a PolicyKey, &'a Policy)>,
}

impl TierOf<'_> {
    /// T-4, T-13.
    pub(crate) fn denies_at_its_end(&self) -> bool {
        self.stored.is_none_or(|tier| !tier.default_pass)
    }
}

/// Returns the tiers of a list of an endpoint, in order.
pub(crate) fn tiers<'a>(facts: &'a Facts, subject: &Subject<'a>, list: List) -> Vec<TierOf<'a>> {
    let labels = subject.effective_labels(facts);
    let mut tiers: Vec<TierOf<'a>> = Vec::new();
    for (key, policy) in facts.policies() {
        if !goes_to(key, policy, list) || !policy.selector.matches(&labels) {
            continue;
        }
        match tiers.iter_mut().find(|tier| *tier.name == policy.tier) {
            Some(tier) => tier.policies.push((key, policy)),
            None => {
                let stored = facts.tier(&policy.tier);
                tiers.push(TierOf { name: &policy.tier, stored, policies: vec![(key, policy)] });
            }
        }
    }
    tiers.sort_by(|a, b| {
        let place = |tier: &TierOf<'_>| tier.stored.map_or(f64::INFINITY, |tier| order(tier.order));
        let missing = |tier: &TierOf<'_>| tier.stored.is_none();
        missing(a).cmp(&missing(b)).then(place(a).total_cmp(&place(b))).then_with(|| a.name.cmp(b.name))
    });
    for tier in &mut tiers {
        tier.policies.sort_by(|(a_key, a), (b_key, b)| {
            order(a.order).total_cmp(&order(b.order)).then_with(|| tie_break(a_key).cmp(&tie_break(b_key)))
        });
    }
    tiers
}

/// Whether a policy has a say on packets of a list in a direction (T-6, T-9).
pub(crate) const fn governs(policy: &Policy, list: List, direction: Direction) -> bool {
    match (list, direction) {
        (List::PreDnat, Direction::Egress) => false,
        (_, Direction::Ingress) => policy.ingress,
        (_, Direction::Egress) => policy.egress,
    }
}

/// T-9, T-10, and T-21 in the way it is required.
fn goes_to(key: &PolicyKey, policy: &Policy, list: List) -> bool {
    let of_its_kind = match list {
        List::Untracked => policy.do_not_track,
        List::PreDnat => !policy.do_not_track && policy.pre_dnat,
        List::Normal => !policy.do_not_track && !policy.pre_dnat,
        List::Forward => !policy.do_not_track && !policy.pre_dnat && policy.apply_on_forward && !key.kind.is_staged(),
    };
    of_its_kind && [Direction::Ingress, Direction::Egress].iter().any(|direction| governs(policy, list, *direction))
}

/// T-2, T-5: no order is behind every order; the two zeros are one.
fn order(order: Option<f64>) -> f64 {
    order.map_or(f64::INFINITY, |order| order + 0.0)
}

/// T-5.
fn tie_break(key: &PolicyKey) -> String {
    format!("{}/{}/{}", key.name, key.namespace, key.kind.as_str())
}
