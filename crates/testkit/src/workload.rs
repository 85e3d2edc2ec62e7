//! The workloads that the calculation graph is measured with: the shapes of the reference's own
//! benchmarks, so that the two compare.
//!
//! Every object owns freshly allocated strings, as decoded objects do. Generators are lazy: whoever
//! measures time collects them first, whoever measures memory does not.
#![allow(clippy::expect_used, reason = "for tests and benchmarks")]

pub mod edits;
pub mod label_index;
pub mod relabel;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

pub use edits::one_rule_edit;
use ipnet::IpNet;
use model::{
    Action, Labels, Name, NetworkSet, Policy, PolicyKey, PolicyKind, ProfileRules, Rule, Update, WorkloadEndpoint,
    WorkloadEndpointKey,
};

use crate::build::{self, rule_of};

/// Name of the host that the graph runs for.
pub const HOST: &str = "localhost";

/// How much of what there is.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub remote: u32,
    pub local: u32,
    pub tag_policies: u32,
    /// Each with a policy of its own.
    pub network_sets: u32,
    /// Real IPv4 addresses. The reference's generator makes IPv6 addresses by mistake, which is more
    /// data; comparisons use those.
    pub ipv4: bool,
}

impl Shape {
    /// 250,000 remote endpoints and 10,000 policies that select and refer by a marker label.
    pub const TAG_POLICIES_250K: Self =
        Self { remote: 250_000, local: 200, tag_policies: 10_000, network_sets: 0, ipv4: false };
    /// 1,000 network sets with 111,800 networks.
    pub const NETWORK_SETS_1K: Self =
        Self { remote: 10_000, local: 200, tag_policies: 0, network_sets: 1_000, ipv4: false };
    /// 10,000 network sets with 1,118,000 networks.
    pub const NETWORK_SETS_10K: Self =
        Self { remote: 10_000, local: 200, tag_policies: 0, network_sets: 10_000, ipv4: false };
}

/// Number of namespaces of a [`snapshot`].
pub const NAMESPACES: u32 = 100;

const MARKERS: [&str; 31] = [
    "FOO_BAR",
    "FOO_BAR",
    "BIFF_BOP",
    "calico/FizzBuzz",
    "calico/BoffBip",
    "calico/Bazzle",
    "calico/Razzle",
    "calico/DoopDeeDoo",
    "calico/SOME_LABEL",
    "calico/BORED_NOW",
    "MyMarkerLabel",
    "xFOO_BAR",
    "xBIFF_BOP",
    "xcalico/FizzBuzz",
    "xcalico/BoffBip",
    "xcalico/Bazzle",
    "xcalico/Razzle",
    "xcalico/DoopDeeDoo",
    "xcalico/SOME_LABEL",
    "xcalico/BORED_NOW",
    "yxMyMarkerLabel",
    "yxFOO_BAR",
    "yxBIFF_BOP",
    "yxcalico/FizzBuzz",
    "yxcalico/BoffBip",
    "yxcalico/Bazzle",
    "yxcalico/Razzle",
    "yxcalico/DoopDeeDoo",
    "yxcalico/SOME_LABEL",
    "yxcalico/BORED_NOW",
    "yxMyMarkerLabel",
];

const NETS_PER_SET: [u32; 10] = [1, 1, 1, 1, 2, 3, 4, 5, 100, 1000];

/// Addresses in sequence.
#[derive(Clone, Copy, Debug)]
struct Addresses {
    next: u32,
    ipv4: bool,
}

impl Addresses {
    const fn new(ipv4: bool) -> Self {
        Self { next: 0x0a00_0001, ipv4 }
    }

    fn take(&mut self) -> IpNet {
        let number = self.next;
        self.next += 1;
        let address = if self.ipv4 {
            IpAddr::V4(Ipv4Addr::from(number))
        } else {
            let (high, low) = ((number >> 16) as u16, number as u16);
            IpAddr::V6(Ipv6Addr::new(high, low, 0, 0, 0, 0xffff, 0, 0))
        };
        IpNet::from(address)
    }
}

/// The names that [`by_name`] knows.
pub const NAMES: [&str; 7] = [
    "tag-policies",
    "tag-policies-v4",
    "network-sets-1k",
    "network-sets-10k",
    "isolated-1k",
    "isolated-10k",
    "isolated-100k",
];

/// The updates of a cold start that has a name.
pub fn by_name(name: &str) -> Option<Box<dyn Iterator<Item = Update>>> {
    Some(match name {
        "tag-policies" => Box::new(snapshot(Shape::TAG_POLICIES_250K)),
        "tag-policies-v4" => Box::new(snapshot(Shape { ipv4: true, ..Shape::TAG_POLICIES_250K })),
        "network-sets-1k" => Box::new(snapshot(Shape::NETWORK_SETS_1K)),
        "network-sets-10k" => Box::new(snapshot(Shape::NETWORK_SETS_10K)),
        "isolated-1k" => Box::new(isolated_customers(1_000)),
        "isolated-10k" => Box::new(isolated_customers(10_000)),
        "isolated-100k" => Box::new(isolated_customers(100_000)),
        _ => return None,
    })
}

/// The updates of a cold start, in the reference's order: policies, namespaces, remote endpoints,
/// network sets with their policies, local endpoints.
pub fn snapshot(shape: Shape) -> impl Iterator<Item = Update> {
    let mut addresses = Addresses::new(shape.ipv4);
    let mut endpoint_number = 0;
    let mut endpoint = move |host: &str, n: u32, addresses: &mut Addresses| {
        endpoint_number += 1;
        snapshot_endpoint(host, n, endpoint_number, addresses.take())
    };
    // The reference makes all endpoints in one go, and counts the networks of sets by themselves.
    let mut local_addresses = Addresses { next: addresses.next + shape.remote, ..addresses };
    let mut networks = Addresses::new(shape.ipv4);
    let local_endpoint = {
        let mut number = shape.remote;
        move |n: u32| {
            number += 1;
            snapshot_endpoint(HOST, n, number, local_addresses.take())
        }
    };

    let policies = (0..shape.tag_policies).map(tag_policy);
    let namespaces = (0..NAMESPACES).flat_map(|i| {
        let labels = [(text("pcns.projectcalico.org/name"), text(&format!("namespace-{i}")))];
        namespace(&format!("kns.namespace-{i}"), labels.into_iter().collect())
    });
    let remote = (0..shape.remote).map(move |n| endpoint("remotehost", n, &mut addresses));
    let network_sets = (0..shape.network_sets).flat_map(move |i| {
        let name = format!("network-set-{i}");
        let set = NetworkSet {
            nets: (0..NETS_PER_SET[i as usize % 10]).map(|_| networks.take()).collect(),
            labels: [(text("network-set-name"), text(&name))].into_iter().collect(),
            profiles: Vec::new(),
        };
        let rule = allow_from(&format!("network-set-name == '{name}'"));
        let policy = policy(global_policy(&format!("network-set-pol-{i}")), "all()", [rule], []);
        [Update::NetworkSet(text(&name), Some(Arc::new(set))), policy]
    });
    let local = (0..shape.local).map(local_endpoint);
    policies.chain(namespaces).chain(remote).chain(network_sets).chain(local)
}

/// The keys of the local endpoints of a [`snapshot`].
pub fn snapshot_local_keys(shape: Shape) -> impl Iterator<Item = WorkloadEndpointKey> {
    (0..shape.local).map(|n| snapshot_key(HOST, n))
}

fn snapshot_key(host: &str, n: u32) -> WorkloadEndpointKey {
    WorkloadEndpointKey {
        host: text(host),
        orchestrator: text("k8s"),
        workload: text(&format!("wep-{n}")),
        endpoint: text("eth0"),
    }
}

fn snapshot_endpoint(host: &str, n: u32, s: u32, address: IpNet) -> Update {
    let one_in = |m: u32| (text(&format!("one-in-{m}")), text(&format!("value-{}", s % m)));
    let marker = MARKERS.iter().cycle().nth(s as usize % MARKERS.len()).expect("a cycle has no end");
    let labels = [one_in(10), one_in(11), one_in(20), one_in(30), one_in(40), (text(marker), text("true"))];
    endpoint(snapshot_key(host, n), labels.into_iter().collect(), &format!("kns.namespace-{}", n % NAMESPACES), address)
}

fn tag_policy(i: u32) -> Update {
    let marker = |i: u32| format!("has({})", MARKERS[i as usize % MARKERS.len()]);
    let rules = [0, 1, 2, 3, 4].map(|j| allow_from(&marker(i + j)));
    policy(global_policy(&format!("tag-pol-{i}")), &marker(i), rules, [])
}

/// Customers with a namespace, a policy and a pod each that see only themselves; every
/// (`customers` / 100)th pod is local.
pub fn isolated_customers(customers: u32) -> impl Iterator<Item = Update> {
    let local_every = (customers / 100).max(1);
    let is_local = move |n: u32| n.is_multiple_of(local_every);
    let policies = (0..customers).map(customer_policy);
    let namespaces = (0..customers).flat_map(|n| {
        let labels = [
            (text("pcns.projectcalico.org/name"), text(&format!("customer-{n}"))),
            (text("namespace-id"), pseudo_random(n.into(), 20)),
            (text("production"), text(if n.is_multiple_of(2) { "true" } else { "false" })),
        ];
        namespace(&format!("kns.customer-{n}"), labels.into_iter().collect())
    });
    let pods = move |local: bool| {
        (0..customers).filter(move |n| is_local(*n) == local).map(move |n| {
            let mut addresses = Addresses::new(false);
            addresses.next += n;
            customer_pod(if local { HOST } else { "remotehost" }, n, addresses.take())
        })
    };
    policies.chain(namespaces).chain(pods(false)).chain(pods(true))
}

fn customer_policy(n: u32) -> Update {
    let own = format!("pcns.projectcalico.org/name == 'customer-{n}'");
    let key = PolicyKey {
        kind: PolicyKind::NetworkPolicy,
        namespace: text(&format!("customer-{n}")),
        name: text(&format!("customer-{n}/isolation")),
    };
    let to_own = build::rule(&format!("allow to {own}"));
    let dns = build::rule("allow udp to-nets 10.96.0.10/32 to-ports 53");
    policy(key, &own, [allow_from(&own)], [to_own, dns])
}

fn customer_pod(host: &str, n: u32, address: IpNet) -> Update {
    let i = u64::from(n);
    let key = WorkloadEndpointKey {
        host: text(host),
        orchestrator: text("k8s"),
        workload: text(&format!("customer-{n}/app-{:09x}-{:05x}", 7 * i + 3, (17 * i + 5) & 0xffff)),
        endpoint: text("eth0"),
    };
    endpoint(key, pod_labels(n), &format!("kns.customer-{n}"), address)
}

/// The 15 labels of the pod of customer `n`.
pub(crate) fn pod_labels(n: u32) -> Labels {
    let i = u64::from(n);
    let choice = |of: &[&str]| text(of.iter().cycle().nth(n as usize % of.len()).expect("a cycle has no end"));
    let bit = |shift: u32| text(if (n >> shift) & 1 == 1 { "true" } else { "false" });
    let labels = [
        (text("pod-id"), pseudo_random(5 * i, 20)),
        (text("instance-id"), pseudo_random(5 * i + 1, 20)),
        (text("short-id"), pseudo_random(5 * i + 2, 10)),
        (text("config-hash"), pseudo_random(5 * i + 3, 20)),
        (text("version-tag"), pseudo_random(5 * i + 4, 8)),
        (text("enabled"), bit(0)),
        (text("debug"), bit(1)),
        (text("canary"), bit(2)),
        (text("managed"), bit(3)),
        (text("environment"), choice(&["dev", "staging", "prod"])),
        (text("tier"), choice(&["frontend", "backend", "middleware", "data"])),
        (text("region"), choice(&["us-east", "us-west", "eu-west", "ap-south"])),
        (text("team"), choice(&["platform", "payments", "identity", "growth", "infra"])),
        (text("managed-by"), text("saas-controller")),
        (text("tenant-id"), pseudo_random(i % 5000, 10)),
    ];
    labels.into_iter().collect()
}

/// Text that looks random and is the same in every run and language.
pub(crate) fn pseudo_random(n: u64, length: usize) -> Name {
    let mut v = n.wrapping_mul(2_654_435_761).wrapping_add(1);
    let mut text = String::with_capacity(length);
    for _ in 0..length {
        text.push(char::from(b"abcdef0123456789"[(v % 16) as usize]));
        v = v.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    }
    text.into()
}

fn endpoint(key: WorkloadEndpointKey, labels: Labels, profile: &str, address: IpNet) -> Update {
    let mut value = WorkloadEndpoint {
        active: true,
        interface: text(&format!("cali-{}", key.workload)),
        profiles: vec![text(profile)],
        labels,
        ..WorkloadEndpoint::default()
    };
    match address {
        IpNet::V4(net) => value.v4_nets.push(net),
        IpNet::V6(net) => value.v6_nets.push(net),
    }
    Update::WorkloadEndpoint(key, Some(Arc::new(value)))
}

fn namespace(profile: &str, labels: Labels) -> [Update; 2] {
    [
        Update::ProfileLabels(text(profile), Some(Arc::new(labels))),
        Update::ProfileRules(text(profile), Some(Arc::new(ProfileRules::default()))),
    ]
}

fn global_policy(name: &str) -> PolicyKey {
    PolicyKey { kind: PolicyKind::GlobalNetworkPolicy, namespace: text(""), name: text(name) }
}

/// A policy as [`crate::build::policy`] starts it, from rules that are there already.
fn policy(
    key: PolicyKey,
    selector: &str,
    inbound: impl IntoIterator<Item = Rule>,
    outbound: impl IntoIterator<Item = Rule>,
) -> Update {
    let with_rules = |value: &mut Policy| {
        value.inbound = inbound.into_iter().collect();
        value.outbound = outbound.into_iter().collect();
    };
    build::policy_of(key).selector(selector).with(with_rules).build()
}

fn allow_from(selector: &str) -> Rule {
    let mut rule = rule_of(Action::Allow);
    rule.source.selector = Some(build::selector(selector));
    rule
}

/// A freshly allocated string.
fn text(text: &str) -> Name {
    text.into()
}

#[cfg(test)]
mod tests;
