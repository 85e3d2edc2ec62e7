//! One label change among very many endpoints and selectors (issue: at most 10 microseconds at the median).
//!
//! [`ENDPOINTS`] remote endpoints in [`GROUPS`] groups of equal size; one local endpoint, and a policy for it per group
//! that admits the group. So every change of a label meets [`GROUPS`] selectors, each with a set of its own.

use model::Update;

use super::{HOST, allow_from, endpoint, global_policy, policy, snapshot_key, text};

/// Remote endpoints.
pub const ENDPOINTS: u32 = 250_000;

/// Groups, selectors and sets.
pub const GROUPS: u32 = 10_000;

/// Policies, the local endpoint, then the remote endpoints.
pub fn all() -> impl Iterator<Item = Update> {
    let policies = (0..GROUPS).map(|i| {
        policy(global_policy(&format!("group-pol-{i}")), "all()", [allow_from(&format!("has(group-{i})"))], [])
    });
    let local = std::iter::once_with(|| labelled(HOST, 0, 0, 0));
    policies.chain(local).chain((0..ENDPOINTS).map(|n| remote(n, n % GROUPS, any_version(n))))
}

/// A version without a pattern, so that changes from one to another leave the whole as it was.
pub fn any_version(number: u32) -> u32 {
    number.wrapping_mul(2_654_435_761) >> 16
}

/// Endpoint `n`, with a group and the value of a label that no selector names.
pub fn remote(n: u32, group: u32, version: u32) -> Update {
    labelled("remotehost", n, group, version)
}

fn labelled(host: &str, n: u32, group: u32, version: u32) -> Update {
    let mut labels = vec![
        (text(&format!("group-{group}")), text("true")),
        (text("version"), text(&format!("value-{}", version % 40))),
    ];
    labels.extend([10, 11, 20, 30].map(|m| (text(&format!("one-in-{m}")), text(&format!("value-{}", n % m)))));
    let [_, b, c, d] = n.to_be_bytes();
    let first = if host == HOST { 11 } else { 10 };
    let address = std::net::IpAddr::from([first, b, c, d]);
    endpoint(snapshot_key(host, n), labels.into_iter().collect(), "kns.namespace-0", address.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_of_version_changes_nothing_that_a_selector_names() {
        let value = |update: Update| {
            let Update::WorkloadEndpoint(_, Some(value)) = update else { panic!("{update:?}") };
            value
        };
        let (before, after) = (value(remote(7, 7, 0)), value(remote(7, 7, 1)));
        assert_ne!(before.labels, after.labels);
        assert_eq!(before.labels.get("group-7"), after.labels.get("group-7"));
        assert_eq!(before.v4_nets, after.v4_nets);
        assert_eq!(all().count(), (GROUPS + 1 + ENDPOINTS) as usize);
    }
}
