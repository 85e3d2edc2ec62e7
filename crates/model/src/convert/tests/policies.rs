//! Policies as a whole: selectors, directions, tier, names.

use super::*;
use crate::selector::{self, Selector};

#[test]
fn selectors_of_policies_are_those_of_the_vectors() {
    let vectors = vectors("ipset_ids.json");
    let cases = vectors["policy_selectors"].as_array().unwrap();
    assert_eq!(cases.len(), 12);
    for case in cases {
        let namespace = text(&case["namespace"]);
        let document = json!({"metadata": {"name": "p", "namespace": namespace}, "spec": case["spec"]});
        let key = match text(&case["kind"]) {
            "NetworkPolicy" => format!("networkpolicies/{namespace}/p"),
            "GlobalNetworkPolicy" => "globalnetworkpolicies/p".to_owned(),
            other => panic!("{other}"),
        };
        let (policy, complaints) = policy(converted(&key, &document));
        if case["spec"]["namespaceSelector"] == "not a selector" {
            // The reference widens such a policy; ours is not there (H-2).
            assert_eq!(policy, None, "{case}");
            assert_eq!(fields(&complaints), ["spec.namespaceSelector"]);
            continue;
        }
        let policy = policy.unwrap_or_else(|| panic!("{complaints:?} in {case}"));
        assert_eq!(policy.selector.canonical(), text(&case["canonical"]), "{case}");
        assert_eq!(*policy.original_selector, selector::normalise(text(&case["internal_selector"])), "{case}");
        assert_eq!(complaints, [], "{case}");
    }
}

#[test]
fn selectors_of_rules_are_those_of_the_vectors() {
    let vectors = vectors("ipset_ids.json");
    let cases = vectors["rule_conversion"].as_array().unwrap();
    assert_eq!(cases.len(), 16);
    for case in cases {
        let spec = json!({"ingress": [case["v3_rule"]]});
        let namespace = text(&case["policy_namespace"]);
        let key = if namespace.is_empty() {
            "globalnetworkpolicies/p".to_owned()
        } else {
            format!("networkpolicies/{namespace}/p")
        };
        let document = json!({"metadata": {"name": "p", "namespace": namespace}, "spec": spec});
        let (policy, complaints) = policy(converted(&key, &document));
        let policy = policy.unwrap_or_else(|| panic!("{complaints:?} in {case}"));
        let rule = &policy.inbound[0];
        let wanted = |name: &str| {
            let text = case["combined_selectors"][name].as_str()?;
            Some(Selector::parse(text).unwrap().id().clone())
        };
        let found = |selector: &Option<Arc<Selector>>| selector.as_ref().map(|selector| selector.id().clone());
        assert_eq!(found(&rule.source.selector), wanted("src_selector"), "{case}");
        assert_eq!(found(&rule.source.not_selector), wanted("not_src_selector"), "{case}");
        assert_eq!(found(&rule.destination.selector), wanted("dst_selector"), "{case}");
        assert_eq!(found(&rule.destination.not_selector), wanted("not_dst_selector"), "{case}");
        // Merging the two (R-10) gives the set of the vectors.
        if let Some([id]) = case["internal"]["src_ip_set_ids"].as_array().map(Vec::as_slice)
            && let Some(positive) = &rule.source.selector
        {
            let merged = match &rule.source.not_selector {
                Some(negative) => positive.and(&negative.negated()),
                None => Selector::clone(positive),
            };
            assert_eq!(merged.id().as_str(), text(id), "{case}");
        }
    }
}

#[test]
fn no_text_escapes_from_the_namespace() {
    for spec in [
        json!({"selector": "a == 'b') || (c == 'd'"}),
        json!({"serviceAccountSelector": "a == 'b') || (c == 'd'"}),
        json!({"ingress": [{"action": "Allow", "source": {"selector": "has(a)) || (has(b)"}}]}),
        json!({"ingress": [{"action": "Allow", "source": {"namespaceSelector": "has(a)) || (has(b)"}}]}),
        json!({"ingress": [{"action": "Allow", "source": {"serviceAccounts": {"names": ["x'} || all() || a in {'y"]}}}]}),
    ] {
        assert_eq!(namespaced(&spec).0, None, "{spec}");
    }
    let document = json!({"metadata": {"namespace": "x' || has(a) || b == 'y"}, "spec": {}});
    assert_eq!(policy(converted("networkpolicies/x' || has(a) || b == 'y/p", &document)).0, None);
}

#[test]
fn h_04_the_namespace_of_the_key_counts() {
    for stored in [json!("other"), json!(""), json!(null)] {
        let document = json!({"metadata": {"name": "p", "namespace": stored}, "spec": {}});
        let (policy, complaints) = policy(converted("networkpolicies/ns/p", &document));
        assert_eq!(policy.unwrap().selector.canonical(), "projectcalico.org/namespace == \"ns\"");
        assert_eq!(fields(&complaints), ["metadata.namespace"]);
        assert_eq!(complaints[0].effect, Effect::PartIgnored);
    }
}

#[test]
fn directions_follow_the_types() {
    for (types, wanted, n_complaints) in [
        (json!(null), (true, true), 0),
        (json!([]), (true, true), 0),
        (json!(["Ingress"]), (true, false), 0),
        (json!(["eGRESS"]), (false, true), 0),
        (json!(["Egress", "Ingress"]), (true, true), 0),
        (json!(["Sideways"]), (false, false), 1),
    ] {
        let (policy, complaints) = namespaced(&json!({"types": types, "ingress": [{"action": "Allow"}]}));
        let policy = policy.unwrap();
        assert_eq!(((policy.ingress, policy.egress), complaints.len()), (wanted, n_complaints), "{types}");
    }
}

#[test]
fn the_other_fields_are_carried() {
    let spec = json!({"tier": "platform", "order": -1.5, "doNotTrack": true, "preDNAT": true, "applyOnForward": true,
        "performanceHints": ["AssumeNeededOnEveryNode"]});
    let (policy, complaints) = global(&spec);
    let policy = policy.unwrap();
    assert_eq!((&*policy.tier, policy.order, policy.always_needed), ("platform", Some(-1.5), true));
    assert!(policy.do_not_track && policy.pre_dnat && policy.apply_on_forward);
    assert_eq!(&*policy.original_selector, "all()");
    assert_eq!(complaints, []);

    // C-22: not for namespaced policies, whatever is stored.
    let policy = namespaced(&spec).0.unwrap();
    assert!(!(policy.do_not_track || policy.pre_dnat || policy.apply_on_forward));

    let policy = namespaced(&json!({})).0.unwrap();
    assert_eq!((&*policy.tier, policy.order, policy.always_needed), ("default", None, false));
}

#[test]
fn the_name_of_the_key_counts_but_the_annotation_must_parse() {
    for (annotation, survives) in [("{\"name\": \"foo\"}", true), ("", true), ("{", false), ("[]", false)] {
        let document = json!({"metadata": {"name": "default.foo", "namespace": "ns",
            "annotations": {"projectcalico.org/metadata": annotation}}, "spec": {}});
        let Converted { updates, .. } = converted("networkpolicies/ns/default.foo", &document);
        let [Update::Policy(key, policy)] = updates.as_slice() else { panic!() };
        assert_eq!(&*key.name, "default.foo");
        assert_eq!(policy.is_some(), survives, "{annotation}");
    }
}

#[test]
fn deleted_and_unparsable_policies_are_absent() {
    let key = ResourceKey::parse(format!("{}networkpolicies/ns/p", crate::key::RESOURCES).as_bytes()).unwrap();
    let deleted = convert(&key, None, &STRICT);
    assert_eq!((policy(deleted.clone()).0, deleted.complaints), (None, vec![]));
    for value in ["{not json", "null", "[]", r#"{"spec": {"order": "100"}}"#] {
        let Converted { updates, complaints } = convert(&key, Some(value.as_bytes()), &STRICT);
        assert!(matches!(updates.as_slice(), [Update::Policy(_, None)]), "{value}");
        let [complaint] = complaints.as_slice() else { panic!() };
        assert!(complaint.to_string().starts_with("the document does not parse: "), "{complaint}");
    }
}

#[test]
fn a_hopeless_document_gives_a_bounded_number_of_complaints() {
    let rules = vec![json!({"action": "Nonsense"}); 1000];
    let (policy, complaints) = global(&json!({"ingress": rules}));
    assert_eq!((policy, complaints.len()), (None, 21));
    assert_eq!(complaints[3].to_string(), "spec.ingress[3].action: \"Nonsense\" is not an action (treated as absent)");
    assert_eq!(complaints[20].to_string(), "980 further defects are not listed (treated as absent)");
}
