//! One test for each row of datastore.md 5.1 and 5.2, named after it.

use super::*;
use crate::endpoint::HostEndpoint;

/// What is valid in an endpoint of either kind, with a field replaced or added.
fn spec_with(defect: &Value) -> Value {
    let mut spec = json!({"ipNetworks": ["10.0.0.1"], "interfaceName": "cali1", "node": "h"});
    spec.as_object_mut().unwrap().extend(defect.as_object().unwrap().clone());
    spec
}

fn host_endpoint(defect: &Value) -> (Option<Arc<HostEndpoint>>, Vec<Complaint>) {
    let Converted { updates, complaints } = converted("hostendpoints/e", &json!({"spec": spec_with(defect)}));
    let [Update::HostEndpoint(_, endpoint)] = updates.as_slice() else { panic!("{updates:?}") };
    (endpoint.clone(), complaints)
}

/// Labels and rules of a profile.
fn profile(metadata: &Value, spec: &Value) -> (bool, bool, Vec<Complaint>) {
    let Converted { updates, complaints } = converted("profiles/p", &json!({"metadata": metadata, "spec": spec}));
    let [Update::ProfileLabels(_, labels), Update::ProfileRules(_, rules)] = updates.as_slice() else { panic!() };
    (labels.is_some(), rules.is_some(), complaints)
}

/// Checks that each of these rules costs the whole policy and the whole profile, whatever its action, in
/// either direction, and that the complaint names the field.
#[track_caller]
fn reject(defects: &[(Value, &str)]) {
    for (defect, field) in defects {
        for action in ["Allow", "Deny", "Pass", "Log"] {
            let mut bad = json!({"action": action});
            bad.as_object_mut().unwrap().extend(defect.as_object().unwrap().clone());
            for direction in ["ingress", "egress"] {
                let spec = json!({direction: [{"action": "Allow"}, bad]});
                let (policy, complaints) = global(&spec);
                assert_eq!(policy, None, "{spec}");
                assert_eq!(fields(&complaints), [format!("spec.{direction}[1]{field}")], "{spec}");
                assert_eq!(complaints[0].effect, Effect::Rejected);
                assert_eq!(namespaced(&spec).0, None, "{spec}");
                let (_, rules, complaints) = profile(&json!({"name": "p"}), &spec);
                assert!(!rules, "{spec}");
                assert_eq!(complaints[0].field, format!("spec.{direction}[1]{field}"));
            }
        }
    }
}

/// Checks that each of these rules is part of the policy.
#[track_caller]
fn accept(rules: &[Value]) {
    for stored in rules {
        let mut good = json!({"action": "Allow"});
        good.as_object_mut().unwrap().extend(stored.as_object().unwrap().clone());
        let (rule, complaints) = rule(&good);
        assert!(rule.is_some(), "{good}: {complaints:?}");
    }
}

#[test]
fn v_01_a_record_that_fails_is_as_if_it_were_deleted() {
    for (key, spec) in [
        ("workloadendpoints/ns/host--1-k8s-pod-eth0", json!({"ipNetworks": ["10.0.0.1"]})),
        ("hostendpoints/e", json!({"node": ""})),
        ("networkpolicies/ns/p", json!({"selector": "no"})),
        ("globalnetworkpolicies/p", json!({"ingress": [{"action": "Allow", "protocol": 0}]})),
        ("profiles/p", json!({"ingress": [{"action": "Allow", "protocol": 0}], "labelsToApply": {"a": "b"}})),
        ("networksets/b@d/s", json!({})),
    ] {
        let namespace = key.split('/').nth(1).unwrap();
        let document = json!({"metadata": {"name": "x", "namespace": namespace}, "spec": spec});
        let Converted { updates, complaints } = converted(key, &document);
        let resource = ResourceKey::parse(format!("{}{key}", crate::key::RESOURCES).as_bytes()).unwrap();
        assert_eq!(updates, convert(&resource, None, &STRICT).updates, "{key}");
        assert_eq!(complaints[0].effect, Effect::Rejected, "{key}");
    }
    // And nothing is deleted that has no defect.
    for (key, spec) in [
        ("workloadendpoints/ns/host--1-k8s-pod-eth0", spec_with(&json!({}))),
        ("hostendpoints/e", spec_with(&json!({}))),
        ("networkpolicies/ns/p", json!({"selector": "has(a)"})),
        ("globalnetworkpolicies/p", json!({"ingress": [{"action": "Allow", "protocol": 1}]})),
        ("profiles/x", json!({"ingress": [{"action": "Allow", "protocol": 1}], "labelsToApply": {"a": "b"}})),
        ("networksets/ns/s", json!({})),
    ] {
        let document = json!({"metadata": {"name": "x", "namespace": "ns"}, "spec": spec});
        let Converted { updates, complaints } = converted(key, &document);
        assert_eq!(complaints, [], "{key}");
        let resource = ResourceKey::parse(format!("{}{key}", crate::key::RESOURCES).as_bytes()).unwrap();
        let deleted = convert(&resource, None, &STRICT).updates;
        assert_eq!(updates.len(), deleted.len(), "{key}");
        assert!(updates.iter().zip(&deleted).all(|(update, deleted)| update != deleted), "{key}: {updates:?}");
    }
}

#[test]
fn v_02_a_workload_endpoint_has_an_interface() {
    let (found, complaints) = endpoint(&spec_with(&json!({"interfaceName": ""})), STRICT);
    assert_eq!((found, fields(&complaints)), (None, vec!["spec.interfaceName"]));
    let (found, complaints) = endpoint(&spec_with(&json!({"interfaceName": "x"})), STRICT);
    assert_eq!((&*found.unwrap().interface, complaints), ("x", vec![]));
}

#[test]
fn v_03_spoofed_prefixes_are_taken_only_where_allowed() {
    let spec = |prefix: &str| spec_with(&json!({"allowSpoofedSourcePrefixes": [prefix]}));
    let (found, complaints) = endpoint(&spec("192.0.2.0/24"), STRICT);
    assert_eq!((found, fields(&complaints)), (None, vec!["spec.allowSpoofedSourcePrefixes"]));

    let options = Options { allow_spoofing: true };
    let found = endpoint(&spec("192.0.2.9/24"), options).0.unwrap();
    assert_eq!(found.allowed_spoofed, ["192.0.2.0/24".parse().unwrap()]);
    assert_eq!(endpoint(&spec("nonsense"), options).0, None);
}

#[test]
fn v_04_ports_of_endpoints_have_a_name_a_number_and_one_of_three_protocols() {
    let long = "x".repeat(129);
    for (port, field) in [
        (json!({"name": "a b", "protocol": "TCP", "port": 1}), "name"),
        (json!({"name": long, "protocol": "TCP", "port": 1}), "name"),
        (json!({"name": "a", "protocol": "TCP", "port": 0}), "port"),
        (json!({"name": "a", "protocol": "TCP"}), "port"),
        (json!({"name": "a", "protocol": 6, "port": 1}), "protocol"),
        (json!({"name": "a", "protocol": "17", "port": 1}), "protocol"),
        (json!({"name": "a", "protocol": "UDPLite", "port": 1}), "protocol"),
        (json!({"name": "a", "protocol": "ICMP", "port": 1}), "protocol"),
        (json!({"name": "a", "port": 1}), "protocol"),
    ] {
        let good = json!({"name": &long[..128], "protocol": "sctp", "port": 65535});
        let defect = json!({"ports": [good, port]});
        let field = format!("spec.ports[1].{field}");
        let (found, complaints) = endpoint(&spec_with(&defect), STRICT);
        assert_eq!((found, fields(&complaints)), (None, vec![field.as_str()]), "{port}");
        let (found, complaints) = host_endpoint(&defect);
        assert_eq!((found, fields(&complaints)), (None, vec![field.as_str()]), "{port}");
    }
    // C-6, C-10: only workloads may have ports without a name.
    let unnamed = json!({"ports": [{"name": "", "protocol": "TCP", "port": 1}]});
    assert_eq!(endpoint(&spec_with(&unnamed), STRICT).0.unwrap().ports, []);
    assert_eq!(host_endpoint(&unnamed).0, None);
    for found in [
        endpoint(&spec_with(&json!({"ports": [{"name": "a_1.-", "protocol": "Udp", "port": 1}]})), STRICT)
            .0
            .unwrap()
            .ports
            .clone(),
        host_endpoint(&json!({"ports": [{"name": "a_1.-", "protocol": "Udp", "port": 1}]})).0.unwrap().ports.clone(),
    ] {
        assert_eq!(found, [crate::EndpointPort { name: "a_1.-".into(), protocol: 17, port: 1 }]);
    }
}

#[test]
fn v_05_host_endpoints_name_an_interface_and_profiles_that_can_be() {
    let long = "p".repeat(129);
    for (name, valid) in [
        ("", true),
        ("*", true),
        ("eth0", true),
        ("bond0.100_-", true),
        ("abcdefghijklmno", true),
        ("abcdefghijklmnop", false),
        ("**", false),
        ("eth*", false),
        ("a b", false),
        ("a/b", false),
        ("a:1", false),
        ("ü", false),
    ] {
        let (found, complaints) = host_endpoint(&json!({"interfaceName": name}));
        assert_eq!(found.is_some(), valid, "{name:?}");
        assert_eq!(fields(&complaints), if valid { vec![] } else { vec!["spec.interfaceName"] });
    }
    for (name, valid) in [("kns.a_B-1", true), (&long[..128], true), (&long, false), ("", false), ("a/b", false)] {
        let (found, complaints) = host_endpoint(&json!({"profiles": ["p", name]}));
        assert_eq!(found.is_some(), valid, "{name:?}");
        assert_eq!(fields(&complaints), if valid { vec![] } else { vec!["spec.profiles[1]"] });
    }
}

#[test]
fn v_06_a_network_set_has_a_namespace_that_can_be_part_of_a_profile() {
    let long = "n".repeat(125);
    for (namespace, valid) in [("ns", true), (&long[..124], true), (&long, false), ("b@d", false)] {
        let document = json!({"metadata": {"namespace": namespace}, "spec": {"nets": ["10.0.0.0/8"]}});
        let Converted { updates, complaints } = converted(&format!("networksets/{namespace}/s"), &document);
        let [Update::NetworkSet(_, set)] = updates.as_slice() else { panic!() };
        assert_eq!(set.is_some(), valid, "{namespace}");
        assert_eq!(fields(&complaints), if valid { vec![] } else { vec!["metadata.namespace"] });
    }
}

#[test]
fn v_07_a_policy_has_a_selector_that_parses_and_hints_that_are_known() {
    for (spec, field) in [
        (json!({"selector": "a = 'b'"}), "spec.selector"),
        (json!({"selector": "a == 'b'\n"}), "spec.selector"),
        (json!({"selector": "  "}), "spec.selector"),
        (json!({"selector": "a == 'b"}), "spec.selector"),
        (json!({"performanceHints": ["Hurry"]}), "spec.performanceHints[0]"),
        (json!({"performanceHints": ["assumeneededoneverynode"]}), "spec.performanceHints[0]"),
        (
            json!({"performanceHints": ["AssumeNeededOnEveryNode", "AssumeNeededOnEveryNode"]}),
            "spec.performanceHints[1]",
        ),
    ] {
        let (policy, complaints) = namespaced(&spec);
        assert_eq!(policy, None, "{spec}");
        assert_eq!(fields(&complaints), [field], "{spec}");
        assert_eq!(complaints[0].effect, Effect::Rejected);
    }
    for (selector, canonical) in [("", "all()"), ("a == 'b'", "a == \"b\"")] {
        assert_eq!(global(&json!({"selector": selector})).0.unwrap().selector.canonical(), canonical);
    }
    assert!(global(&json!({"performanceHints": ["AssumeNeededOnEveryNode"]})).0.unwrap().always_needed);
    assert_eq!(global(&json!({"selector": "a = 'b'"})).0, None);
}

#[test]
fn v_08_every_selector_of_a_rule_parses() {
    let mut defects = Vec::new();
    for side in ["source", "destination"] {
        for (entity, field) in [
            (json!({"selector": "no"}), "selector"),
            (json!({"notSelector": "no"}), "notSelector"),
            (json!({"notSelector": "has(a) &&"}), "notSelector"),
            (json!({"namespaceSelector": "no"}), "namespaceSelector"),
            (json!({"serviceAccounts": {"selector": "no"}}), "serviceAccounts.selector"),
            (json!({"serviceAccounts": {"names": ["it's"]}}), "serviceAccounts.names"),
        ] {
            defects.push((json!({side: entity}), format!(".{side}.{field}")));
        }
    }
    let defects: Vec<_> = defects.iter().map(|(rule, field)| (rule.clone(), field.as_str())).collect();
    reject(&defects);
    // Blanks alone are a selector, but not one that can stand in brackets after the namespace.
    assert_eq!(namespaced(&json!({"ingress": [{"action": "Allow", "source": {"selector": " "}}]})).0, None);
}

#[test]
fn v_09_the_ip_version_is_4_or_6() {
    reject(&[5, 0, -4, 46].map(|version| (json!({"ipVersion": version}), ".ipVersion")));
    accept(&[json!({"ipVersion": null}), json!({"ipVersion": 4}), json!({"ipVersion": 6})]);
}

#[test]
fn v_10_protocols_are_numbers_from_1_or_one_of_six_names() {
    for field in ["protocol", "notProtocol"] {
        let values = [json!(0), json!("0"), json!("gre"), json!(""), json!("256"), json!("tcp "), json!("ip")];
        let at = format!(".{field}");
        reject(&values.map(|value| (json!({field: value}), at.as_str())));
        let names = ["tcp", "UDP", "Icmp", "ICMPv6", "sctp", "UDPLite", "1", "255"];
        accept(&names.map(|name| json!({field: name})));
        accept(&[1, 6, 255].map(|number| json!({field: number})));
    }
}

#[test]
fn v_11_icmp_types_go_to_254_and_codes_to_255() {
    reject(&[
        (json!({"protocol": 1, "icmp": {"type": 255}}), ".icmp.type"),
        (json!({"protocol": 1, "icmp": {"type": -1}}), ".icmp.type"),
        (json!({"protocol": 1, "icmp": {"type": 8, "code": 256}}), ".icmp.code"),
        (json!({"protocol": 1, "icmp": {"type": 8, "code": -1}}), ".icmp.code"),
        (json!({"protocol": 58, "notICMP": {"type": 300}}), ".notICMP.type"),
    ]);
    accept(&[
        json!({"protocol": 1, "icmp": {"type": 254, "code": 255}}),
        json!({"protocol": "ICMPv6", "notICMP": {"type": 0}}),
        // Without a type: ignored, not rejected.
        json!({"protocol": 1, "icmp": {"code": 3}}),
    ]);
}

#[test]
fn v_12_ports_are_numbers_from_1_or_names_as_iana_gives_them() {
    let mut defects = Vec::new();
    for (side, field) in
        [("source", "ports"), ("source", "notPorts"), ("destination", "ports"), ("destination", "notPorts")]
    {
        for port in [
            json!(0),
            json!("0"),
            json!("0:5"),
            json!("HTTP"),
            json!("80-90"),
            json!("a--b"),
            json!("-a"),
            json!("abcdefghijklmnop"),
            json!("a_b"),
        ] {
            defects.push((json!({"protocol": 6, side: {field: [443, port]}}), format!(".{side}.{field}[1]")));
        }
        accept(&[json!({"protocol": "TCP", side: {field: [1, 65535, "1:65535", "7:7", "http", "a-1"]}})]);
    }
    let defects: Vec<_> = defects.iter().map(|(rule, field)| (rule.clone(), field.as_str())).collect();
    reject(&defects);
    // The document does not even parse (J-3), which costs the policy as well.
    for port in [json!("90:80"), json!(65536), json!(-1), json!("a b"), json!(""), json!(null)] {
        let spec = json!({"ingress": [{"action": "Allow", "protocol": 6, "destination": {"ports": [port]}}]});
        let (policy, complaints) = global(&spec);
        assert_eq!((policy, fields(&complaints)), (None, vec![""]), "{spec}");
    }
}

#[test]
fn v_13_ports_need_a_protocol_that_has_them() {
    let mut defects = Vec::new();
    for (side, field) in
        [("source", "ports"), ("source", "notPorts"), ("destination", "ports"), ("destination", "notPorts")]
    {
        let at = format!(".{side}.{field}");
        for protocol in [json!(1), json!("UDPLite"), json!("icmpv6"), json!(136), json!(255)] {
            for port in [json!("http"), json!(80)] {
                defects.push((json!({"protocol": protocol, side: {field: [port]}}), at.clone()));
            }
        }
        defects.push((json!({side: {field: ["http", 80]}}), at.clone()));
        defects.push((json!({"notProtocol": 17, side: {field: [80]}}), at.clone()));
        accept(&[json!({side: {field: ["http", "dns"]}})]);
        accept(
            &[json!(6), json!(17), json!(132), json!("tcp"), json!("udp"), json!("SCTP")]
                .map(|protocol| json!({"protocol": protocol, side: {field: ["http", 80]}})),
        );
    }
    let defects: Vec<_> = defects.iter().map(|(rule, field)| (rule.clone(), field.as_str())).collect();
    reject(&defects);
}

#[test]
fn v_20_metadata_that_the_api_refuses_costs_a_profile_its_labels() {
    let spec = json!({"ingress": [{"action": "Allow"}], "labelsToApply": {"pcns.env": "prod"}});
    let huge = "x".repeat(256 << 10);
    for (metadata, field) in [
        (json!({"name": "kns.default"}), None),
        (json!({"name": "p", "annotations": {"a/B": "anything at all"}, "labels": {"k": "v", "e": ""}}), None),
        (json!({"name": "p", "annotations": {"a": &huge[1..]}}), None),
        (json!({"name": "P"}), Some("metadata.name")),
        (json!({"name": "a_b"}), Some("metadata.name")),
        (json!({"name": ""}), Some("metadata.name")),
        (json!({}), Some("metadata.name")),
        (json!({"name": "a".repeat(254)}), Some("metadata.name")),
        (json!({"name": "p", "annotations": {"a b": ""}}), Some("metadata.annotations")),
        (json!({"name": "p", "annotations": {"a": huge}}), Some("metadata.annotations")),
        (json!({"name": "p", "labels": {"a/b/c": ""}}), Some("metadata.labels")),
        (json!({"name": "p", "labels": {"a": "b c"}}), Some("metadata.labels")),
    ] {
        let (labels, rules, complaints) = profile(&metadata, &spec);
        let text = metadata.to_string();
        let text = &text[..text.len().min(100)];
        assert_eq!((labels, rules), (field.is_none(), true), "{text}");
        assert_eq!(fields(&complaints), field.into_iter().collect::<Vec<_>>(), "{text}");
        assert!(complaints.iter().all(|complaint| complaint.effect == Effect::LabelsIgnored), "{complaints:?}");
    }
}

/// Nodes are not read yet; their checks come with them.
#[test]
fn v_21_a_node_gives_no_record() {
    let key = format!("{}nodes/compute-1", crate::key::RESOURCES);
    assert_eq!(ResourceKey::parse(key.as_bytes()), None);
}

#[test]
fn v_22_a_profile_that_the_api_refuses_loses_its_labels_and_keeps_its_rules() {
    let with_rule = |rule: &Value| json!({"egress": [{"action": "Deny"}, rule], "labelsToApply": {"pcns.env": "prod"}});
    let metadata = json!({"name": "p"});
    for (rule, field) in [
        (json!({"action": "Allow", "protocol": "ICMPv6", "notProtocol": "UDPLite"}), None),
        (json!({"action": "Pass", "protocol": 6, "destination": {"ports": [80, "http"]}}), None),
        (json!({"action": "Allow", "ipVersion": 6, "source": {"nets": ["fd00::/8"], "notNets": ["fd01::/16"]}}), None),
        (json!({"action": "Allow", "source": {"nets": ["0.0.0.0/0"]}}), None),
        (json!({"action": "allow"}), Some(".action")),
        (json!({}), Some(".action")),
        (json!({"action": "next-tier"}), Some(".action")),
        (json!({"action": "Allow", "protocol": "tcp"}), Some(".protocol")),
        (json!({"action": "Allow", "notProtocol": "Udp"}), Some(".notProtocol")),
        (json!({"action": "Allow", "protocol": "ICMP", "icmp": {"code": 1}}), Some(".icmp.code")),
        (json!({"action": "Allow", "source": {"nets": ["10.0.0.1"]}}), Some(".source.nets[0]")),
        (json!({"action": "Allow", "destination": {"nets": ["10.0.0.0/8"], "notNets": ["fd00::/8"]}}), Some("")),
        (
            json!({"action": "Allow", "source": {"nets": ["10.0.0.0/8"]}, "destination": {"nets": ["fd00::/8"]}}),
            Some(""),
        ),
        (json!({"action": "Allow", "ipVersion": 4, "source": {"nets": ["fd00::/8"]}}), Some("")),
        (json!({"action": "Allow", "ipVersion": 6, "source": {"notNets": ["10.0.0.0/8"]}}), Some("")),
        (json!({"action": "Allow", "source": {"notNets": ["0.0.0.0/0"]}}), Some(".source.notNets[0]")),
        (json!({"action": "Allow", "destination": {"notNets": ["::/0"]}}), Some(".destination.notNets[0]")),
    ] {
        let (labels, rules, complaints) = profile(&metadata, &with_rule(&rule));
        assert_eq!((labels, rules), (field.is_none(), true), "{rule}");
        let of_labels: Vec<&str> = complaints
            .iter()
            .filter(|complaint| complaint.effect == Effect::LabelsIgnored)
            .map(|complaint| complaint.field.as_str())
            .collect();
        assert_eq!(
            of_labels,
            field.map(|field| format!("spec.egress[1]{field}")).into_iter().collect::<Vec<_>>(),
            "{rule}"
        );
    }
    // What costs the rules (V-8 to V-13) costs the labels too.
    let (labels, rules, _) = profile(&metadata, &with_rule(&json!({"action": "Allow", "protocol": 0})));
    assert_eq!((labels, rules), (false, false));

    for labels in [json!({"a b": ""}), json!({"a": "b c"}), json!({"/a": "b"})] {
        let (labels, rules, complaints) = profile(&metadata, &json!({"labelsToApply": labels}));
        assert_eq!((labels, rules, fields(&complaints)), (false, true, vec!["spec.labelsToApply"]));
    }
}
