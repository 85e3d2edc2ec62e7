//! Single rules: validation rejects the record, other defects stay closed.

use super::*;
use crate::family::Family;
use crate::policy::{IcmpMatch, Port, PortRange, Protocol};

const SAFE: [&str; 3] = ["Allow", "Pass", "Log"];

#[test]
fn fields_are_converted() {
    let (rule, complaints) = rule(&json!({"action": "Deny", "ipVersion": 6, "protocol": "SCTP",
        "source": {"nets": ["fd00::1/64", "10.1.2.3/8"], "notNets": ["fd00::1"], "ports": [1, "2:3", "http"]},
        "destination": {"notPorts": ["a-b", 65535], "services": {"name": "web", "namespace": "default"}},
        "http": {"methods": ["GET"]}, "metadata": {"annotations": {"ticket": "NET-1"}}}));
    let rule = rule.unwrap();
    assert_eq!((rule.action, rule.family), (Action::Deny, Some(Family::V6)));
    assert_eq!(rule.protocol, Some(Protocol::Name("sctp".into())));
    assert_eq!(rule.source.nets, ["fd00::/64".parse().unwrap(), "10.0.0.0/8".parse().unwrap()]);
    assert_eq!(rule.source.not_nets, ["fd00::1/128".parse().unwrap()]);
    assert_eq!(
        rule.source.ports,
        [single(1), Port::Range(PortRange { first: 2, last: 3 }), Port::Named("http".into())]
    );
    assert_eq!(rule.destination.not_ports, [Port::Named("a-b".into()), single(65535)]);
    let service = rule.destination.service.unwrap();
    assert_eq!((&*service.namespace, &*service.name), ("default", "web"));
    assert!(rule.has_http);
    assert_eq!(rule.annotations, [("ticket".to_owned(), "NET-1".to_owned())].into());
    assert_eq!(complaints, [("spec.ingress[0].http".to_owned(), Effect::PartIgnored)]);
}

#[test]
fn actions_are_words_in_any_case() {
    for (word, wanted) in [
        (json!("Allow"), Some(Action::Allow)),
        (json!("ALLOW"), Some(Action::Allow)),
        (json!(null), Some(Action::Allow)),
        (json!("deny"), Some(Action::Deny)),
        (json!("Log"), Some(Action::Log)),
        (json!("Pass"), Some(Action::Pass)),
        (json!("next-tier"), Some(Action::Pass)),
        (json!("Reject"), None),
    ] {
        assert_eq!(rule(&json!({"action": word})).0.map(|rule| rule.action), wanted, "{word}");
    }
}

#[test]
fn the_family_is_explicit_or_that_of_a_protocol_name() {
    for (version, protocol, wanted) in [
        (json!(null), json!(null), None),
        (json!(4), json!(null), Some(Family::V4)),
        (json!(6), json!("ICMP"), Some(Family::V6)),
        (json!(null), json!("ICMP"), Some(Family::V4)),
        (json!(null), json!("ICMPv6"), Some(Family::V6)),
        (json!(null), json!(1), None),
        (json!(null), json!("58"), None),
        (json!(null), json!("TCP"), None),
    ] {
        let rule = rule(&json!({"action": "Allow", "ipVersion": version, "protocol": protocol})).0.unwrap();
        assert_eq!(rule.family, wanted, "{version} {protocol}");
    }
}

#[test]
fn h_01_nets_that_are_none_match_nothing() {
    let defect = json!({"nets": ["10.0.0.0/24/32", "garbage"]});
    for action in SAFE {
        let (rule, complaints) = rule(&json!({"action": action, "source": defect}));
        assert_eq!(rule, None, "{action}");
        assert_eq!(complaints.last(), Some(&("spec.ingress[0].source.nets".to_owned(), Effect::RuleLeftOut)));
    }
    // A deny keeps its other matches.
    let (rule, complaints) = rule(&json!({"action": "Deny", "source": defect, "destination": {"nets": ["10.0.0.1"]}}));
    let rule = rule.unwrap();
    assert_eq!((rule.source.nets.len(), rule.destination.nets.len()), (0, 1));
    assert_eq!(complaints.last(), Some(&("spec.ingress[0].source.nets".to_owned(), Effect::RuleWidened)));
}

#[test]
fn a_bad_net_among_good_ones_is_dropped() {
    for action in ["Allow", "Deny", "Pass", "Log"] {
        let (rule, complaints) = rule(&json!({"action": action, "source": {"nets": ["bad", "10.0.0.0/8"]}}));
        assert_eq!(rule.unwrap().source.nets, ["10.0.0.0/8".parse().unwrap()]);
        assert_eq!(complaints, [("spec.ingress[0].source.nets[0]".to_owned(), Effect::PartIgnored)]);
    }
}

#[test]
fn a_bad_exclusion_never_opens_anything() {
    let defect = json!({"notNets": ["10.0.0.0/8", "fd00::/129"]});
    for action in SAFE {
        assert_eq!(rule(&json!({"action": action, "destination": defect})).0, None, "{action}");
    }
    // With the IPv4 exclusion alone the rule would not exist for IPv6.
    let (rule, complaints) = rule(&json!({"action": "Deny", "destination": defect}));
    assert_eq!(rule.unwrap().destination, EntityMatch::default());
    assert_eq!(complaints.last(), Some(&("spec.ingress[0].destination.notNets".to_owned(), Effect::RuleWidened)));
}

#[test]
fn h_05_an_icmp_type_ties_the_rule_to_the_family_of_its_protocol() {
    let echo = Some(IcmpMatch { kind: 8, code: None });
    for (protocol, version, wanted) in [
        (json!(1), json!(null), Some(Family::V4)),
        (json!("1"), json!(4), Some(Family::V4)),
        (json!("ICMP"), json!(null), Some(Family::V4)),
        (json!(58), json!(null), Some(Family::V6)),
        (json!("ICMPv6"), json!(6), Some(Family::V6)),
        (json!(1), json!(6), None),
        (json!("ICMP"), json!(6), None),
        (json!(58), json!(4), None),
        (json!("TCP"), json!(null), None),
        (json!(null), json!(null), None),
        (json!(null), json!(4), None),
    ] {
        for field in ["icmp", "notICMP"] {
            let stored =
                |action| json!({"action": action, "protocol": protocol, "ipVersion": version, field: {"type": 8}});
            for action in SAFE {
                let found = rule(&stored(action)).0;
                assert_eq!(found.as_ref().and_then(|rule| rule.family), wanted, "{}", stored(action));
                if let Some(rule) = found {
                    assert_eq!(rule.icmp.or(rule.not_icmp), echo);
                }
            }
            let (deny, complaints) = rule(&stored("Deny"));
            let deny = deny.unwrap();
            if wanted.is_some() {
                assert_eq!((deny.family, deny.icmp.or(deny.not_icmp)), (wanted, echo));
            } else {
                assert_eq!((deny.icmp, deny.not_icmp), (None, None));
                assert_eq!(deny.protocol.is_some(), !protocol.is_null());
                assert_eq!(complaints, [(format!("spec.ingress[0].{field}"), Effect::RuleWidened)]);
            }
        }
    }
}

#[test]
fn an_icmp_code_needs_a_type() {
    let (rule, complaints) = rule(&json!({"action": "Allow", "protocol": "ICMP", "icmp": {"code": 3}}));
    assert_eq!(rule.unwrap().icmp, None);
    assert_eq!(complaints, [("spec.ingress[0].icmp.code".to_owned(), Effect::PartIgnored)]);
}

#[test]
fn an_excluded_protocol_beside_a_wanted_one_says_nothing_or_everything() {
    let both =
        |wanted: Value, excluded: Value| rule(&json!({"action": "Deny", "protocol": wanted, "notProtocol": excluded}));
    let kept = both(json!("TCP"), json!(17)).0.unwrap();
    assert_eq!((kept.protocol, kept.not_protocol), (Some(Protocol::Name("tcp".into())), None));
    let (rule, complaints) = both(json!("TCP"), json!(6));
    assert_eq!(rule, None);
    assert_eq!(complaints, [("spec.ingress[0].notProtocol".to_owned(), Effect::RuleLeftOut)]);
    let alone = both(json!(null), json!("Udp")).0.unwrap();
    assert_eq!((alone.protocol, alone.not_protocol), (None, Some(Protocol::Name("udp".into()))));
}

#[test]
fn a_service_without_a_name_is_no_match_at_all() {
    let stored = |action| json!({"action": action, "destination": {"services": {"namespace": "x"}}});
    assert_eq!(rule(&stored("Allow")).0, None);
    assert_eq!(rule(&stored("Deny")).0.unwrap().destination.service, None);
}

#[test]
fn equal_selectors_of_one_policy_are_one_object() {
    let from_a = json!({"action": "Allow", "source": {"selector": "has(a)"}});
    let policy = namespaced(&json!({"ingress": [from_a, from_a], "egress": [from_a]})).0.unwrap();
    let selectors: Vec<_> =
        policy.inbound.iter().chain(&policy.outbound).map(|rule| rule.source.selector.clone().unwrap()).collect();
    assert!(selectors.iter().all(|selector| Arc::ptr_eq(selector, &selectors[0])));
}

fn single(port: u16) -> Port {
    Port::Range(PortRange::single(port))
}
