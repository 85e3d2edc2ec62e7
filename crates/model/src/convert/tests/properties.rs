//! Nothing that is stored can stop the process, and what comes out can be rendered.

use proptest::prelude::*;

use super::*;
use crate::policy::Protocol;

const KEYS: [&str; 10] = [
    "workloadendpoints/ns/a-b-c-d",
    "networkpolicies/ns/a",
    "globalnetworkpolicies/a",
    "tiers/a",
    "profiles/a",
    "networksets/ns/a",
    "globalnetworksets/a",
    "hostendpoints/a",
    "clusterinformations/default",
    "felixconfigurations/default",
];

proptest! {
    #[test]
    fn no_bytes_stop_the_conversion(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
        for key in KEYS {
            assert_consistent(key, &bytes);
        }
    }

    #[test]
    fn no_document_stops_the_conversion(document in any_json()) {
        for key in KEYS {
            assert_consistent(key, document.to_string().as_bytes());
        }
    }

    #[test]
    fn what_was_converted_before_makes_no_difference(
        documents in prop::collection::vec((0..KEYS.len(), any_json(), any::<bool>()), 0..12),
    ) {
        let mut converter = Converter::new(STRICT);
        for (key, document, sweep) in documents {
            let key = format!("{}{}", crate::key::RESOURCES, KEYS[key]);
            let value = document.to_string();
            let mut updates = Vec::new();
            let complaints = converter.decode(key.as_bytes(), Some(value.as_bytes()), &mut updates);
            let key = ResourceKey::parse(key.as_bytes()).unwrap();
            let alone = convert(&key, Some(value.as_bytes()), &STRICT);
            assert_eq!((updates, complaints), (alone.updates, Some(alone.complaints)));
            if sweep {
                converter.pool().sweep();
            }
        }
        converter.pool().sweep();
        assert!(converter.pool().is_empty());
    }

    #[test]
    fn bytes_that_are_no_text_read_as_replacement_characters(at in 0..60_usize, byte in 0x80..=0xff_u8) {
        let document = r#"{"metadata": {"labels": {"key": "value", "k": "v"}}, "spec": {"nets": ["10.0.0.1"]}}"#;
        let mut bytes = document.as_bytes().to_vec();
        bytes[at] = byte;
        let key = ResourceKey::GlobalNetworkSet("s".into());
        let replaced = String::from_utf8_lossy(&bytes).into_owned();
        assert_eq!(convert(&key, Some(&bytes), &STRICT), convert(&key, Some(replaced.as_bytes()), &STRICT));
    }

    #[test]
    fn every_rule_that_comes_out_can_be_rendered(rules in prop::collection::vec(any_rule(), 1..5)) {
        let document = json!({"metadata": {"namespace": "ns"}, "spec": {"ingress": rules}});
        for key in ["networkpolicies/ns/p", "globalnetworkpolicies/p"] {
            let (policy, _) = policy(converted(key, &document));
            for rule in policy.iter().flat_map(|policy| &policy.inbound) {
                assert_can_be_rendered(rule);
            }
        }
    }
}

/// Converting gives the same twice, absent records when deleted, and for the same keys.
fn assert_consistent(key: &str, value: &[u8]) {
    let key = ResourceKey::parse(format!("{}{key}", crate::key::RESOURCES).as_bytes()).unwrap();
    let once = convert(&key, Some(value), &STRICT);
    assert_eq!(once, convert(&key, Some(value), &STRICT));
    let deleted = convert(&key, None, &STRICT);
    assert_eq!(deleted.complaints, []);
    let keys = |converted: &Converted| converted.updates.iter().map(Update::key).collect::<Vec<_>>();
    assert_eq!(keys(&once), keys(&deleted));
}

/// netfilter.md 10.7: what iptables would refuse must not get this far.
fn assert_can_be_rendered(rule: &Rule) {
    let protocol = rule.protocol.as_ref().and_then(Protocol::number);
    assert!(protocol.is_none() || rule.not_protocol.is_none(), "{rule:?}");
    assert_ne!(protocol, Some(0), "{rule:?}");
    if rule.icmp.is_some() || rule.not_icmp.is_some() {
        let family = rule.family.expect("an ICMP type ties to a family");
        assert_eq!(protocol, Some(if family.digit() == 4 { 1 } else { 58 }), "{rule:?}");
    }
    for entity in [&rule.source, &rule.destination] {
        let mut ports = entity.ports.iter().chain(&entity.not_ports);
        let numeric = ports.any(|port| matches!(port, crate::policy::Port::Range(_)));
        assert!(!numeric || matches!(protocol, Some(6 | 17 | 132)), "{rule:?}");
    }
}

/// Any JSON, with words of the data model in it more often than not.
fn any_json() -> impl Strategy<Value = Value> {
    let word = prop_oneof![
        prop::sample::select(vec![
            "metadata",
            "spec",
            "ingress",
            "egress",
            "source",
            "selector",
            "namespaceSelector",
            "nets",
            "notNets",
            "ports",
            "protocol",
            "icmp",
            "type",
            "code",
            "types",
            "order",
            "action",
            "Allow",
            "labels",
            "annotations",
            "ipNetworks",
            "interfaceName",
            "10.0.0.1/32",
            "10.0.0.0/33",
            "has(a)",
            "80:90",
            "tcp",
            "labelsToApply",
            "reportingInterval",
            "90s",
            "failsafeInboundHostPorts",
            "datastoreReady",
            "serviceAccounts",
            "names",
        ])
        .prop_map(str::to_owned),
        "\\PC{0,6}",
    ];
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        word.clone().prop_map(Value::from),
    ];
    leaf.prop_recursive(6, 60, 6, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::vec((word.clone(), inner), 0..6)
                .prop_map(|entries| Value::Object(entries.into_iter().collect())),
        ]
    })
}

fn any_rule() -> impl Strategy<Value = Value> {
    let one_of = |values: Vec<Value>| prop::sample::select(values);
    let protocol = one_of(vec![
        json!(null),
        json!(1),
        json!("ICMP"),
        json!(58),
        json!("icmpv6"),
        json!(6),
        json!("UDP"),
        json!("132"),
        json!(47),
    ]);
    let icmp =
        one_of(vec![json!(null), json!({"type": 8}), json!({"code": 3}), json!({"type": 8, "code": 0}), json!({})]);
    let entity = one_of(vec![
        json!(null),
        json!({"nets": ["10.0.0.0/8", "fd00::/8"]}),
        json!({"nets": ["bad"]}),
        json!({"notNets": ["10.0.0.0/8", "bad"]}),
        json!({"ports": ["http"]}),
        json!({"ports": [80, "90:91", "http"]}),
        json!({"notPorts": [80]}),
        json!({"selector": "has(a)", "notSelector": "has(b)"}),
    ]);
    (
        one_of(vec![json!("Allow"), json!("Deny"), json!("Log"), json!("Pass")]),
        one_of(vec![json!(null), json!(4), json!(6)]),
        (protocol.clone(), protocol),
        (icmp.clone(), icmp),
        (entity.clone(), entity),
    )
        .prop_map(|(action, version, (protocol, not_protocol), (icmp, not_icmp), (source, destination))| {
            json!({"action": action, "ipVersion": version, "protocol": protocol, "notProtocol": not_protocol,
                "icmp": icmp, "notICMP": not_icmp, "source": source, "destination": destination})
        })
}
