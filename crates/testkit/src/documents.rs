//! What the writers put into etcd, as text: keys and values of many objects of one shape.
//!
//! The Neutron driver is Python and writes blanks behind colons and commas; Go writes none. Both forms, and the order
//! of the fields, are those of the captured data, against which the tests below compare.
#![allow(clippy::expect_used, reason = "for tests and benchmarks")]
#![allow(clippy::wildcard_enum_match_arm, reason = "what the workloads do not hold is not written")]

use std::fmt::Write as _;

use model::key::RESOURCES;
use model::{PolicyKey, PolicyKind, Rule, Update, WorkloadEndpoint, WorkloadEndpointKey};

use crate::workload::{pod_labels, pseudo_random};

/// A stored key and its value.
pub type Stored = (String, String);

/// How many objects of a shape share what they have in common.
const GROUPS: u32 = 200;
const PROJECTS: u32 = 20;
const HOSTS: u32 = 100;

/// The workload endpoint of an OpenStack port, as the Neutron driver writes it (datastore.md 9.2).
pub fn neutron_endpoint(n: u32) -> Stored {
    let (workload, port) = (uuid("vm", n), uuid("port", n));
    let (group, project) = (n % GROUPS, n % PROJECTS);
    let (host, network) = (format!("compute-{}", n % HOSTS), uuid("network", project));
    let group_id = uuid("group", group);
    let doubled = |text: &str| text.replace('-', "--");
    let name = format!("{}-openstack-{}-{}", doubled(&host), doubled(&workload), doubled(&port));
    let interface = port.get(..11).expect("a UUID is longer");
    let [_, b, c, d] = (0x0a00_0000 + n).to_be_bytes();
    let value = format!(
        r#"{{"kind": "WorkloadEndpoint", "apiVersion": "projectcalico.org/v3", "metadata": {{"name": "{name}", "namespace": "openstack", "creationTimestamp": "2026-11-21T02:24:47Z", "uid": "{uid}", "annotations": {{"openstack.projectcalico.org/network-id": "{network}"}}, "labels": {{"sg.projectcalico.org/openstack-{group_id}": "sg-{group}", "sg-name.projectcalico.org/openstack-sg-{group}": "{group_id}", "projectcalico.org/namespace": "openstack", "projectcalico.org/orchestrator": "openstack", "projectcalico.org/openstack-project-id": "{project_id}", "projectcalico.org/openstack-project-name": "project-{project}", "projectcalico.org/openstack-project-parent-id": "default", "projectcalico.org/openstack-network-name": "network-{project}"}}}}, "spec": {{"orchestrator": "openstack", "workload": "{workload}", "node": "{host}", "endpoint": "{port}", "interfaceName": "tap{interface}", "mac": "fa:16:3e:{b:02x}:{c:02x}:{d:02x}", "ipv4Gateway": "10.65.0.1", "ipNetworks": ["10.{b}.{c}.{d}/32"], "allowedIps": []}}}}"#,
        uid = uuid("uid", n),
        project_id = uuid("project", project).replace('-', ""),
    );
    (format!("{RESOURCES}workloadendpoints/openstack/{name}"), value)
}

/// The policy of an OpenStack security group with a rule that names the group (datastore.md 9.3).
pub fn security_group(n: u32) -> Stored {
    let group = uuid("group", n);
    let name = format!("ossg.default.{group}");
    let value = format!(
        r#"{{"kind": "NetworkPolicy", "apiVersion": "projectcalico.org/v3", "metadata": {{"name": "{name}", "namespace": "openstack", "creationTimestamp": "2026-11-21T02:24:36Z", "uid": "{uid}"}}, "spec": {{"ingress": [{{"action": "Allow", "ipVersion": 4, "protocol": "ICMP", "source": {{"selector": "has(sg.projectcalico.org/openstack-{group})"}}}}, {{"action": "Allow", "ipVersion": 4, "protocol": 6, "destination": {{"ports": [22]}}, "source": {{"nets": ["0.0.0.0/0"]}}}}], "egress": [{{"action": "Allow", "ipVersion": 4}}, {{"action": "Allow", "ipVersion": 6}}], "selector": "has(sg.projectcalico.org/openstack-{group})"}}}}"#,
        uid = uuid("uid", n),
    );
    (format!("{RESOURCES}networkpolicies/openstack/{name}"), value)
}

/// The workload endpoint of a Kubernetes pod with the 15 labels of performance.md 2.2, as Go writes it.
pub fn pod(n: u32) -> Stored {
    let labels = pod_labels(n);
    let labels: Vec<_> = labels.iter().map(|(key, value)| (&**key, &**value)).collect();
    let pod = format!("app-{:09x}-{:05x}", 7 * u64::from(n) + 3, (17 * u64::from(n) + 5) & 0xffff);
    let namespace = format!("customer-{n}");
    let [_, b, c, d] = (0x0a00_0000 + n).to_be_bytes();
    let profiles = [format!("kns.{namespace}")];
    go_endpoint(
        &WorkloadEndpointKey {
            host: format!("node-{}", n % HOSTS).into(),
            orchestrator: "k8s".into(),
            workload: format!("{namespace}/{pod}").into(),
            endpoint: "eth0".into(),
        },
        &labels,
        &[format!("10.{b}.{c}.{d}/32")],
        &profiles.each_ref().map(String::as_str),
        &format!("cali{}", &*pseudo_random(n.into(), 11)),
    )
}

/// A network set with this many networks, as Go writes it.
pub fn network_set(n: u32, nets: u32) -> Stored {
    let nets = (0..nets).map(|i| {
        let [_, b, c, d] = (0x0a00_0000 + n.wrapping_mul(1000) + i).to_be_bytes();
        format!("{}.{b}.{c}.{d}/32", 11 + n % 100)
    });
    stored_network_set(&format!("network-set-{n}"), &format!("network-set-{n}"), nets)
}

/// The documents that decode to an update of [`crate::workload`], as Go writes them. An endpoint without a namespace
/// is stored in that of its first profile, because every stored endpoint has one.
///
/// Returns `None` for what is part of another document (the rules of a profile) or not stored at all.
pub fn stored(update: &Update) -> Option<Stored> {
    match update {
        Update::WorkloadEndpoint(key, Some(endpoint)) => Some(stored_endpoint(key, endpoint)),
        Update::Policy(key, Some(policy)) => {
            let rules = |rules: &[Rule]| rules.iter().map(rule).collect::<Vec<_>>().join(",");
            let (folder, place) = match key.kind {
                PolicyKind::NetworkPolicy => ("networkpolicies", format!("{}/{}", key.namespace, flat(key))),
                PolicyKind::GlobalNetworkPolicy => ("globalnetworkpolicies", flat(key)),
                _ => return None,
            };
            let value = format!(
                r#"{{"kind":"{}","apiVersion":"projectcalico.org/v3","metadata":{{"name":"{}","namespace":"{}","uid":"{}","creationTimestamp":"2026-11-21T02:24:36Z"}},"spec":{{"tier":"{}","ingress":[{}],"egress":[{}],"selector":{},"types":["Ingress","Egress"]}}}}"#,
                key.kind.as_str(),
                flat(key),
                key.namespace,
                uuid("uid", 0),
                policy.tier,
                rules(&policy.inbound),
                rules(&policy.outbound),
                quoted(&policy.selector.canonical()),
            );
            Some((format!("{RESOURCES}{folder}/{place}"), value))
        }
        Update::ProfileLabels(name, Some(labels)) => {
            let labels: Vec<_> = labels.iter().map(|(key, value)| (&**key, &**value)).collect();
            let value = format!(
                r#"{{"kind":"Profile","apiVersion":"projectcalico.org/v3","metadata":{{"name":"{name}","uid":"{}","creationTimestamp":"2026-11-21T02:24:36Z"}},"spec":{{"labelsToApply":{}}}}}"#,
                uuid("uid", 0),
                object(&labels),
            );
            Some((format!("{RESOURCES}profiles/{name}"), value))
        }
        Update::NetworkSet(name, Some(set)) => {
            let label = set.labels.get("network-set-name").map_or("", |value| value);
            Some(stored_network_set(name, label, set.nets.iter().map(ToString::to_string)))
        }
        _ => None,
    }
}

/// The name of a policy as a path segment: the generators put slashes into names, which no stored name has.
fn flat(key: &PolicyKey) -> String {
    key.name.replace('/', ".")
}

fn stored_endpoint(key: &WorkloadEndpointKey, endpoint: &WorkloadEndpoint) -> Stored {
    let mut key = key.clone();
    if !key.workload.contains('/') {
        let profile = endpoint.profiles.first().map_or("default", |profile| profile);
        key.workload = format!("{}/{}", profile.trim_start_matches("kns."), key.workload).into();
    }
    let labels: Vec<_> = endpoint.labels.iter().map(|(key, value)| (&**key, &**value)).collect();
    let nets = endpoint.v4_nets.iter().map(ToString::to_string).chain(endpoint.v6_nets.iter().map(ToString::to_string));
    let profiles: Vec<_> = endpoint.profiles.iter().map(|profile| &**profile).collect();
    go_endpoint(&key, &labels, &nets.collect::<Vec<_>>(), &profiles, &endpoint.interface)
}

fn go_endpoint(
    key: &WorkloadEndpointKey,
    labels: &[(&str, &str)],
    nets: &[String],
    profiles: &[&str],
    interface: &str,
) -> Stored {
    let stored = key.resource_key().to_string();
    let (namespace, pod) = (key.namespace(), key.workload_name());
    let name = stored.rsplit('/').next().unwrap_or_default();
    let value = format!(
        r#"{{"kind":"WorkloadEndpoint","apiVersion":"projectcalico.org/v3","metadata":{{"name":"{name}","generateName":"app-","namespace":"{namespace}","uid":"{uid}","creationTimestamp":"2026-11-21T02:24:47Z","labels":{labels}}},"spec":{{"orchestrator":"{orchestrator}","node":"{host}","containerID":"{uid}","pod":"{pod}","endpoint":"{endpoint}","ipNetworks":[{nets}],"profiles":[{profiles}],"interfaceName":"{interface}"}}}}"#,
        uid = uuid("uid", 0),
        labels = object(labels),
        orchestrator = key.orchestrator,
        host = key.host,
        endpoint = key.endpoint,
        nets = list(nets.iter().map(String::as_str)),
        profiles = list(profiles.iter().copied()),
    );
    (stored, value)
}

fn stored_network_set(name: &str, label: &str, nets: impl Iterator<Item = String>) -> Stored {
    let nets: Vec<String> = nets.collect();
    let value = format!(
        r#"{{"kind":"GlobalNetworkSet","apiVersion":"projectcalico.org/v3","metadata":{{"name":"{name}","uid":"{}","creationTimestamp":"2026-11-21T02:24:36Z","labels":{}}},"spec":{{"nets":[{}]}}}}"#,
        uuid("uid", 0),
        object(&[("network-set-name", label)]),
        list(nets.iter().map(String::as_str)),
    );
    (format!("{RESOURCES}globalnetworksets/{name}"), value)
}

/// The parts of a rule that the workloads use.
fn rule(rule: &Rule) -> String {
    let mut text = r#"{"action":"Allow""#.to_owned();
    if let Some(protocol) = &rule.protocol {
        let _infallible = write!(text, r#","protocol":{}"#, quoted(&protocol.to_string().to_uppercase()));
    }
    for (side, entity) in [("source", &rule.source), ("destination", &rule.destination)] {
        let mut parts = Vec::new();
        if let Some(selector) = &entity.selector {
            parts.push(format!(r#""selector":{}"#, quoted(&selector.canonical())));
        }
        if !entity.nets.is_empty() {
            let nets: Vec<String> = entity.nets.iter().map(ToString::to_string).collect();
            parts.push(format!(r#""nets":[{}]"#, list(nets.iter().map(String::as_str))));
        }
        let ports: Vec<String> = entity
            .ports
            .iter()
            .map(|port| match port {
                model::Port::Range(range) if range.first == range.last => range.first.to_string(),
                model::Port::Range(range) => quoted(&format!("{}:{}", range.first, range.last)),
                model::Port::Named(name) => quoted(name),
            })
            .collect();
        if !ports.is_empty() {
            parts.push(format!(r#""ports":[{}]"#, ports.join(",")));
        }
        // Go writes both sides, empty or not.
        let _infallible = write!(text, r#","{side}":{{{}}}"#, parts.join(","));
    }
    text.push('}');
    text
}

fn object(entries: &[(&str, &str)]) -> String {
    let entries: Vec<String> =
        entries.iter().map(|(key, value)| format!("{}:{}", quoted(key), quoted(value))).collect();
    format!("{{{}}}", entries.join(","))
}

fn list<'a>(texts: impl Iterator<Item = &'a str>) -> String {
    texts.map(quoted).collect::<Vec<_>>().join(",")
}

fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// A text in the form of a UUID that is the same in every run.
fn uuid(kind: &str, n: u32) -> String {
    let seed = kind.bytes().fold(u64::from(n), |seed, byte| seed.wrapping_mul(257).wrapping_add(byte.into()));
    let digits = pseudo_random(seed, 32);
    let parts = [0..8, 8..12, 12..16, 16..20, 20..32].map(|part| digits.get(part).unwrap_or_default());
    parts.join("-")
}

#[cfg(test)]
mod tests {
    use model::convert::{Converter, Options};

    use super::*;
    use crate::workload::{self, Shape};

    #[test]
    fn the_documents_are_those_that_were_captured() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/vectors/neutron_etcd/08-ports-up.json");
        let captured: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        let find = |folder: &str| {
            let entries = captured.as_array().unwrap().iter();
            let text = |entry: &serde_json::Value, field: &str| entry[field].as_str().unwrap().to_owned();
            let mut found = entries.filter(|entry| text(entry, "key").contains(folder));
            let entry = found.next().unwrap();
            (text(entry, "key"), text(entry, "value"))
        };
        for (ours, theirs) in
            [(neutron_endpoint(12_345), find("/workloadendpoints/")), (security_group(7), find("/networkpolicies/"))]
        {
            assert_eq!(skeleton(&ours.1), skeleton(&theirs.1));
            assert_eq!(ours.0.matches('/').count(), theirs.0.matches('/').count());
            assert!(ours.1.len().abs_diff(theirs.1.len()) < 40, "{} and {}", ours.1.len(), theirs.1.len());
        }
    }

    #[test]
    fn every_document_decodes_without_complaint() {
        let mut converter = Converter::new(Options::default());
        for (key, value) in [neutron_endpoint(1), security_group(2), pod(3), network_set(4, 1000)] {
            let mut updates = Vec::new();
            let complaints = converter.decode(key.as_bytes(), Some(value.as_bytes()), &mut updates);
            assert_eq!(complaints, Some(Vec::new()), "{value}");
            match updates.as_slice() {
                [Update::WorkloadEndpoint(key, Some(endpoint))] => {
                    assert_eq!(endpoint.labels.len(), if &*key.orchestrator == "k8s" { 15 } else { 8 });
                }
                [Update::NetworkSet(_, Some(set))] => assert_eq!(set.nets.len(), 1000),
                [Update::Policy(_, Some(policy))] => assert_eq!((policy.inbound.len(), policy.outbound.len()), (2, 2)),
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn the_documents_of_a_workload_decode_to_its_updates() {
        let shape = Shape { remote: 40, local: 3, tag_policies: 40, network_sets: 10, ipv4: false };
        let mut converter = Converter::new(Options::default());
        let mut n_compared = 0;
        for update in workload::snapshot(shape).chain(workload::isolated_customers(20)) {
            let Some((key, value)) = stored(&update) else { continue };
            let mut updates = Vec::new();
            let complaints = converter.decode(key.as_bytes(), Some(value.as_bytes()), &mut updates);
            assert_eq!(complaints, Some(Vec::new()), "{value}");
            match (&update, updates.first()) {
                (Update::WorkloadEndpoint(_, wanted), Some(Update::WorkloadEndpoint(_, found))) => {
                    assert_eq!(found, wanted);
                }
                (Update::NetworkSet(_, wanted), Some(Update::NetworkSet(_, found))) => assert_eq!(found, wanted),
                (Update::ProfileLabels(_, wanted), Some(Update::ProfileLabels(_, found))) => assert_eq!(found, wanted),
                (Update::Policy(_, Some(wanted)), Some(Update::Policy(_, Some(found)))) => {
                    assert_eq!(found.inbound.len(), wanted.inbound.len());
                    assert_eq!(found.outbound.len(), wanted.outbound.len());
                }
                other => panic!("{other:?}"),
            }
            n_compared += 1;
        }
        assert_eq!(n_compared, (40 + 100 + 40 + 20 + 3) + (20 + 20 + 20));
    }

    /// The keys of a document and what stands between its texts; identifiers in keys are cut.
    fn skeleton(text: &str) -> Vec<String> {
        let parts: Vec<&str> = text.split('"').collect();
        let key = |i: usize| parts.get(i + 1).is_some_and(|after| after.starts_with(':'));
        parts
            .iter()
            .enumerate()
            .filter(|(i, _)| i % 2 == 0 || key(*i))
            .map(|(_, part)| part.split_once("openstack-").map_or(*part, |(before, _)| before).to_owned())
            .collect()
    }
}
