//! Tests of the stored types: what reads as what, and what does not read.

mod oracle;

use proptest::prelude::*;
use serde_json::json;

use super::scalars::{Port, Protocol};
use super::*;

#[test]
fn ports_are_numbers_ranges_or_names() {
    for (given, wanted) in [
        (json!(0), Some(Port::Range(0, 0))),
        (json!(65535), Some(Port::Range(65535, 65535))),
        (json!("80"), Some(Port::Range(80, 80))),
        (json!("080"), Some(Port::Range(80, 80))),
        (json!("80:90"), Some(Port::Range(80, 90))),
        (json!("90:90"), Some(Port::Range(90, 90))),
        (json!("http"), Some(Port::Named("http".into()))),
        (json!("1a_.-"), Some(Port::Named("1a_.-".into()))),
        (json!("90:80"), None),
        (json!("80:"), None),
        (json!("128:None"), None),
        (json!("-1"), Some(Port::Named("-1".into()))),
        (json!("70000"), None),
        (json!("1:70000"), None),
        (json!(70000), None),
        (json!(-1), None),
        (json!(80.0), None),
        (json!(""), None),
        (json!("a b"), None),
        (json!("x".repeat(129)), None),
        (json!(null), None),
        (json!([80]), None),
    ] {
        assert_eq!(Port::deserialize(&given).ok(), wanted, "{given}");
    }
}

#[test]
fn protocols_are_numbers_or_names() {
    for (given, wanted) in [
        (json!(0), Some(Protocol::Number(0))),
        (json!(255), Some(Protocol::Number(255))),
        (json!("17"), Some(Protocol::Number(17))),
        (json!("TCP"), Some(Protocol::Name("TCP".into()))),
        (json!("256"), Some(Protocol::Name("256".into()))),
        (json!(""), Some(Protocol::Name("".into()))),
        (json!(256), None),
        (json!(-1), None),
        (json!(6.0), None),
        (json!(true), None),
    ] {
        assert_eq!(Protocol::deserialize(&given).ok(), wanted, "{given}");
    }
}

#[test]
fn null_and_missing_are_the_zero_value() {
    let nulls = r#"{"metadata": null, "spec": {"tier": null, "order": null, "ingress": null, "types": null,
        "preDNAT": null, "egress": [{"action": null, "ipVersion": null, "icmp": null, "source": null,
        "destination": {"nets": null, "selector": null, "serviceAccounts": null, "services": null},
        "http": null, "metadata": null, "protocol": null}]}}"#;
    let parsed: Resource<'_, PolicySpec<'_>> = parse(nulls).unwrap();
    let wanted =
        Resource { spec: PolicySpec { egress: vec![Rule::default()], ..PolicySpec::default() }, ..Resource::default() };
    assert_eq!(parsed, wanted);
    assert_eq!(parse::<PolicySpec<'_>>("{}").unwrap(), Resource::default());
    assert_eq!(parse::<WorkloadEndpointSpec<'_>>(r#"{"spec": null, "extra": [{}]}"#).unwrap(), Resource::default());
}

#[test]
fn null_label_values_are_empty_texts() {
    let parsed: Resource<'_, TierSpec<'_>> = parse(r#"{"metadata": {"labels": {"a": null, "b": "x"}}}"#).unwrap();
    assert_eq!(parsed.metadata.labels.iter().collect::<Vec<_>>(), [("a", ""), ("b", "x")]);
}

#[test]
fn the_last_of_repeated_keys_counts() {
    let parsed: Resource<'_, TierSpec<'_>> =
        parse(r#"{"spec": {"order": 1, "order": 2}, "metadata": {"labels": {"a": "x", "a": "y"}}}"#).unwrap();
    assert_eq!(parsed.spec.order, Some(2.0));
    assert_eq!(parsed.metadata.labels.get("a").map(|text| &**text), Some("y"));
}

#[test]
fn bytes_that_are_not_text_become_replacement_characters() {
    let text = text(b"{\"metadata\": {\"name\": \"a\xff\"}}");
    let parsed: Resource<'_, TierSpec<'_>> = parse(&text).unwrap();
    assert_eq!(parsed.metadata.name, "a\u{fffd}");
}

#[test]
fn a_wrong_type_in_a_known_field_makes_the_document_unparsable() {
    for text in [
        "{not json",
        "",
        "null",
        "[]",
        "{} {}",
        r#"{"metadata": []}"#,
        r#"{"spec": []}"#,
        r#"{"spec": {"ingress": [[]]}}"#,
        r#"{"spec": {"ingress": [{"source": []}]}}"#,
        r#"{"spec": {"ingress": [{"source": [["10.0.0.0/8"]]}]}}"#,
        r#"{"spec": {"ingress": [{"icmp": [8, 0]}]}}"#,
        r#"{"spec": {"ingress": [{"metadata": []}]}}"#,
        r#"{"metadata": {"name": 1}}"#,
        r#"{"metadata": {"labels": {"a": 1}}}"#,
        r#"{"spec": {"order": "100"}}"#,
        r#"{"spec": {"order": 1e999}}"#,
        r#"{"spec": {"types": ["Ingress", 1]}}"#,
        r#"{"spec": {"ingress": [null]}}"#,
        r#"{"spec": {"ingress": [{"ipVersion": "4"}]}}"#,
        r#"{"spec": {"ingress": [{"protocol": 300}]}}"#,
        r#"{"spec": {"ingress": [{"icmp": {"type": 8.5}}]}}"#,
        r#"{"spec": {"ingress": [{"source": {"ports": ["128:None"]}}]}}"#,
        r#"{"spec": {"ingress": [{"source": {"nets": "10.0.0.0/8"}}]}}"#,
        r#"{"spec": {"ingress": [{"http": true}]}}"#,
        r#"{"spec": {"preDNAT": "true"}}"#,
    ] {
        assert!(parse::<PolicySpec<'_>>(text).is_err(), "{text}");
    }
}

#[test]
fn the_documented_endpoint_is_read() {
    let parsed: Resource<'_, WorkloadEndpointSpec<'_>> = parse(
        r#"{"kind":"WorkloadEndpoint","apiVersion":"projectcalico.org/v3",
         "metadata":{"name":"node--1-k8s-web--6d4f-eth0","namespace":"default","creationTimestamp":null,
          "labels":{"role":"web"}},
         "spec":{"orchestrator":"k8s","node":"node-1","pod":"web-6d4f","endpoint":"eth0",
          "serviceAccountName":"web","ipNetworks":["192.168.12.7/32"],"profiles":["kns.default","ksa.default.web"],
          "ipNATs":[{"internalIP":"10.65.0.5","externalIP":"203.0.113.77"}],
          "interfaceName":"cali0a1b2c3d4e5","mac":"ee:ee:ee:ee:ee:ee",
          "ports":[{"name":"http","protocol":"TCP","port":8080,"hostPort":0,"hostIP":""}],
          "qosControls":{"egressBandwidth":10000000,"egressBurst":4294967296,"ingressMaxConnections":5000,"dscp":"EF"}}}"#,
    )
    .unwrap();
    let spec = parsed.spec;
    assert_eq!(spec.service_account_name, "web");
    assert_eq!(spec.ip_nats[0].external_ip, "203.0.113.77");
    assert_eq!(spec.ports[0].protocol, Protocol::Name("TCP".into()));
    let qos = spec.qos_controls.unwrap();
    assert_eq!((qos.egress_burst, qos.ingress_max_connections), (4_294_967_296, 5000));
}

proptest! {
    #[test]
    fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let text = text(&bytes);
        let _result: Result<Resource<'_, PolicySpec<'_>>, _> = parse(&text);
        let _result: Result<Resource<'_, FelixConfigurationSpec>, _> = parse(&text);
    }
}
