//! The part of the IP set vectors that the graph decides: which rule needs which sets, and their ids.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use graph::{Batch, Graph, PolicyProgram, SetType, SideProgram};
use model::{Action, EntityMatch, Port, PortRange, Protocol, Rule, ServiceRef, SetId};
use serde_json::Value;
use testkit::build::{policy, rule_of, selector};
use testkit::replay::sets_of;

#[test]
fn rules_are_converted_as_the_vectors_say() {
    let vectors = vectors("rule_conversion");
    assert!(vectors.len() >= 16);
    for vector in vectors {
        let stored = &vector["v3_rule"];
        let mut rule = rule_of(Action::Allow);
        rule.protocol = protocol(&stored["protocol"]);
        rule.source = side(&vector, "source", "src");
        rule.destination = side(&vector, "destination", "dst");
        let (program, batch) = convert(rule);
        let [rule] = &program.inbound[..] else { panic!("{vector}") };

        let mut checked = BTreeSet::new();
        for (prefix, side) in [("src", &rule.source), ("dst", &rule.destination)] {
            let SideProgram {
                nets: _,
                not_nets: _,
                ports,
                not_ports,
                sets,
                not_sets,
                named_port_sets,
                not_named_port_sets,
                address_port_sets,
            } = side;
            let ids = |sets: &[SetId]| sets.iter().map(ToString::to_string).collect::<Vec<_>>();
            let ranges = |ports: &[PortRange]| ports.iter().map(range).collect::<Vec<_>>();
            let fields = [
                (format!("{prefix}_ip_set_ids"), ids(sets)),
                (format!("not_{prefix}_ip_set_ids"), ids(not_sets)),
                (format!("{prefix}_named_port_ip_set_ids"), ids(named_port_sets)),
                (format!("not_{prefix}_named_port_ip_set_ids"), ids(not_named_port_sets)),
                (format!("{prefix}_ip_port_set_ids"), ids(address_port_sets)),
                (format!("{prefix}_ports"), ranges(ports)),
                (format!("not_{prefix}_ports"), ranges(not_ports)),
            ];
            for (field, got) in fields {
                let expected: Vec<String> = texts(&vector["internal"][&field]);
                assert_eq!(got, expected, "{field} of {vector}");
                checked.insert(field);
            }
            // The text is there for people; its id is what is compared above.
            let text = format!("{prefix}_positive_selector_text");
            if let Some(text) = vector["internal"][&text].as_str() {
                let id = selector(text).id().clone();
                assert!(sets.contains(&id) || !named_port_sets.is_empty(), "{vector}");
            }
            checked.insert(text);
        }
        for field in vector["internal"].as_object().unwrap().keys() {
            assert!(checked.contains(field), "a field that nobody looked at: {field} of {vector}");
        }
        let named: BTreeSet<&SetId> = sets_of(rule).collect();
        assert_eq!(batch.sets_created.keys().collect::<BTreeSet<_>>(), named, "{vector}");
    }
}

#[test]
fn selector_sets_have_the_ids_of_the_vectors() {
    for vector in vectors("selector_sets") {
        let mut rule = rule_of(Action::Allow);
        rule.source.selector = Some(selector(vector["selector"].as_str().unwrap()));
        assert_eq!(
            rule.source.selector.as_ref().map(|selector| selector.canonical()).as_deref(),
            vector["canonical"].as_str()
        );
        created(rule, &vector);
    }
}

#[test]
fn named_port_sets_have_the_ids_of_the_vectors() {
    for vector in vectors("named_port_sets") {
        let mut rule = rule_of(Action::Allow);
        let protocol = vector["protocol"].as_str().unwrap();
        rule.protocol = (protocol != "any").then(|| Protocol::Name(protocol.into()));
        let positive = vector["positive_selector"].as_str().unwrap();
        rule.destination.selector = (!positive.is_empty()).then(|| selector(positive));
        rule.destination.ports = vec![Port::Named(vector["port_name"].as_str().unwrap().into())];
        created(rule, &vector);
    }
}

#[test]
fn service_sets_have_the_ids_of_the_vectors() {
    for vector in vectors("service_sets") {
        let text = |field: &str| vector[field].as_str().unwrap().into();
        let service = Some(ServiceRef { namespace: text("namespace"), name: text("name") });
        let mut rule = rule_of(Action::Allow);
        match vector["used_in"].as_str() {
            Some("source") => rule.source.service = service,
            Some("destination") => rule.destination.service = service,
            other => panic!("used in {other:?}"),
        }
        created(rule, &vector);
    }
}

/// Checks that a rule creates exactly the set of a vector.
fn created(rule: Rule, vector: &Value) {
    let (_, batch) = convert(rule);
    let sets: Vec<(String, &str)> = batch
        .sets_created
        .iter()
        .map(|(id, set)| {
            let kind = match set.kind {
                SetType::Net => "NET",
                SetType::AddressPort => "IP_AND_PORT",
            };
            (id.to_string(), kind)
        })
        .collect();
    let expected = (vector["id"].as_str().unwrap().to_owned(), vector["type"].as_str().unwrap());
    assert_eq!(sets, [expected], "{vector}");
}

/// Runs a rule through a graph.
fn convert(rule: Rule) -> (Arc<PolicyProgram>, Batch) {
    let mut graph = Graph::new("h1".into());
    let builder = policy("gnp/p").selector("!all()").with(|policy| {
        policy.always_needed = true;
        policy.inbound = vec![rule];
    });
    let (key, value) = builder.value();
    graph.apply(model::Update::Policy(key.clone(), Some(value)));
    let batch = graph.take_batch();
    (batch.policies[&key].clone().unwrap(), batch)
}

/// One side of a stored rule; the selectors are those that the conversion has combined.
fn side(vector: &Value, name: &str, prefix: &str) -> EntityMatch {
    let stored = &vector["v3_rule"][name];
    let combined = |key: String| vector["combined_selectors"][&key].as_str().map(selector);
    EntityMatch {
        nets: texts(&stored["nets"]).iter().map(|net| net.parse().unwrap()).collect(),
        not_nets: texts(&stored["notNets"]).iter().map(|net| net.parse().unwrap()).collect(),
        selector: combined(format!("{prefix}_selector")),
        not_selector: combined(format!("not_{prefix}_selector")),
        ports: texts(&stored["ports"]).iter().map(|text| port(text)).collect(),
        not_ports: texts(&stored["notPorts"]).iter().map(|text| port(text)).collect(),
        service: stored["services"].as_object().map(|service| ServiceRef {
            namespace: service["namespace"].as_str().unwrap_or_default().into(),
            name: service["name"].as_str().unwrap().into(),
        }),
    }
}

fn protocol(value: &Value) -> Option<Protocol> {
    match value {
        Value::String(name) => Some(Protocol::Name(name.to_lowercase().into())),
        Value::Number(number) => Some(Protocol::Number(number.as_u64().unwrap().try_into().unwrap())),
        Value::Null | Value::Bool(_) | Value::Array(_) | Value::Object(_) => None,
    }
}

fn port(text: &str) -> Port {
    let (first, last) = text.split_once(':').unwrap_or((text, text));
    match (first.parse(), last.parse()) {
        (Ok(first), Ok(last)) => Port::Range(PortRange { first, last }),
        _ => Port::Named(text.into()),
    }
}

fn range(range: &PortRange) -> String {
    let PortRange { first, last } = range;
    if first == last { first.to_string() } else { format!("{first}:{last}") }
}

/// A list of strings and numbers as texts.
fn texts(value: &Value) -> Vec<String> {
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    value.as_array().into_iter().flatten().map(text).collect()
}

fn vectors(part: &str) -> Vec<Value> {
    let text = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/vectors/ipset_ids.json"));
    let mut vectors: BTreeMap<String, Value> = serde_json::from_str(text).unwrap();
    match vectors.remove(part) {
        Some(Value::Array(vectors)) if !vectors.is_empty() => vectors,
        other => panic!("{part}: {other:?}"),
    }
}
