//! Input of the three series that measure the index from selectors to members alone (performance.md 2.3).
//!
//! What goes in before the clock starts, and what one operation is:
//!
//! | Series | Before | Operation n |
//! |---|---|---|
//! | WorkloadUpdate | sets with [`update_selector`] 0, 1, 2 … | [`endpoint`] n is new |
//! | ParentUpdates | [`endpoint`] 0, 1, 2 …, then [`PARENT_SETS`] sets with [`parent_selector`] | profile [`namespace`] n gets [`parent_labels`] n |
//! | SelectorUpdates | [`endpoint`] 0, 1, 2 … | a set with [`update_selector`] (n mod 10) is new |

use std::sync::Arc;

use ipnet::Ipv4Net;
use model::{Labels, Name, Selector, WorkloadEndpoint, WorkloadEndpointKey};

use super::text;

/// How many sets ParentUpdates has.
pub const PARENT_SETS: u32 = 100;

/// Matches all endpoints for 1 and none otherwise.
pub fn update_selector(i: u32) -> Arc<Selector> {
    selector(&format!("alpha == \"beta\" && has(ipset-{i})"))
}

/// Matches endpoint `i` once its profile has got its labels.
pub fn parent_selector(i: u32) -> Arc<Selector> {
    selector(&format!("projectcalico.org/name == \"namespace-{i}\""))
}

fn selector(text: &str) -> Arc<Selector> {
    Arc::new(Selector::parse(text).expect("a selector"))
}

/// The `n`-th endpoint. Its address wraps after 65,536.
pub fn endpoint(n: u32) -> (WorkloadEndpointKey, WorkloadEndpoint) {
    let key = WorkloadEndpointKey {
        host: text("host"),
        orchestrator: text("k8s"),
        workload: text(&format!("wep-{n}")),
        endpoint: text("eth0"),
    };
    let labels = [(text("alpha"), text("beta")), (text("ipset-1"), text("true"))];
    let value = WorkloadEndpoint {
        active: true,
        profiles: vec![namespace(n)],
        labels: labels.into_iter().collect(),
        v4_nets: vec![Ipv4Net::from(std::net::Ipv4Addr::new(10, 0, (n / 256) as u8, n as u8))],
        ..WorkloadEndpoint::default()
    };
    (key, value)
}

/// Name of the profile of endpoint `n`.
pub fn namespace(n: u32) -> Name {
    text(&format!("namespace-{n}"))
}

/// What profile `n` gives to its endpoint.
pub fn parent_labels(n: u32) -> Labels {
    let labels = [
        (text("projectcalico.org/name"), namespace(n)),
        (text("update-idx"), text(&n.to_string())),
        (text("something-shared"), text("foo")),
    ];
    labels.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_series_are_those_of_the_reference() {
        let (key, value) = endpoint(65_536 + 300);
        assert_eq!(key.to_string(), "host/k8s/wep-65836/eth0");
        assert_eq!(value.v4_nets, ["10.0.1.44/32".parse().unwrap()]);
        assert_eq!(value.profiles, [Name::from("namespace-65836")]);
        assert_eq!(value.labels, [("alpha", "beta"), ("ipset-1", "true")].into_iter().collect());
        for i in 0..10 {
            assert_eq!(update_selector(i).matches(&value.labels), i == 1, "selector {i}");
        }
        assert_eq!(update_selector(7).canonical(), "(alpha == \"beta\" && has(ipset-7))");
        assert!(parent_selector(42).matches(&parent_labels(42)));
        assert!(!parent_selector(42).matches(&parent_labels(43)));
        assert_eq!(parent_labels(3).get("update-idx").map(AsRef::as_ref), Some("3"));
        assert_eq!(parent_labels(3).len(), 3);
    }
}
