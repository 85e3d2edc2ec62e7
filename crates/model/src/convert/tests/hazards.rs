//! Hazards that are decided by the conversion: policy.md section 9 and datastore.md section 11. H-1, H-4
//! and H-5 are tested with the rules and policies they are about.

use super::*;

/// C-7: namespaces are labelled through profiles, and a workload's own labels cannot look like that.
#[test]
fn x_06_a_workload_cannot_label_itself_like_a_namespace_or_service_account() {
    let document = json!({
        "metadata": {"labels": {"pcns.env": "prod", "pcsa.team": "a", "pcns": "own", "projectcalico.org/serviceaccount": "root"}},
        "spec": {"ipNetworks": ["10.0.0.1"], "interfaceName": "cali1", "serviceAccountName": "web"}});
    let Converted { updates, .. } = converted(ENDPOINT_KEY, &document);
    let [Update::WorkloadEndpoint(_, Some(endpoint))] = updates.as_slice() else { panic!() };
    let labels: Vec<_> = endpoint.labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
    assert_eq!(labels, ["pcns=own", "projectcalico.org/serviceaccount=web"]);
}

/// The reference's renderer stops the process for such a word, in a profile as in a policy.
#[test]
fn x_03_an_unknown_action_in_a_profile_closes_the_profile() {
    let document = json!({"metadata": {"name": "p"}, "spec": {"ingress": [{"action": "Allow"}, {"action": "Reject"}]}});
    let Converted { updates, complaints } = converted("profiles/p", &document);
    assert!(matches!(updates.as_slice(), [Update::ProfileLabels(_, None), Update::ProfileRules(_, None)]));
    assert_eq!(complaints[0].field, "spec.ingress[1].action");
}

#[test]
fn h_03_an_unknown_action_costs_the_policy_and_is_reported() {
    for word in ["Reject", "drop", "allow ", "next_tier"] {
        for (spec, field) in [
            (json!({"ingress": [{"action": word}]}), "spec.ingress[0].action"),
            (json!({"egress": [{"action": "Deny"}, {"action": word}]}), "spec.egress[1].action"),
        ] {
            let (policy, complaints) = namespaced(&spec);
            assert_eq!((policy, fields(&complaints)), (None, vec![field]), "{word}");
            assert_eq!(complaints[0].effect, Effect::Rejected);
            assert!(complaints[0].reason.contains(word));
        }
    }
}

#[test]
fn x_05_an_http_match_is_reported_once_per_policy_and_the_rest_of_the_rule_applies() {
    let http =
        json!({"action": "Allow", "protocol": "TCP", "destination": {"ports": [80]}, "http": {"methods": ["GET"]}});
    let (policy, complaints) = namespaced(&json!({"ingress": [http, http], "egress": [http]}));
    let policy = policy.unwrap();
    assert!(
        policy.inbound.iter().chain(&policy.outbound).all(|rule| rule.has_http && rule.destination.ports.len() == 1)
    );
    assert_eq!((policy.inbound.len(), policy.outbound.len()), (2, 1));
    assert_eq!(fields(&complaints), ["spec.ingress[0].http"]);
    assert_eq!(complaints[0].effect, Effect::PartIgnored);
}

#[test]
fn h_06_a_bad_rule_costs_the_whole_policy_and_is_named_with_index_and_field() {
    let spec = json!({"ingress": [{"action": "Deny"}, {"action": "Allow", "protocol": "gre"}], "egress": [{"action": "Allow"}]});
    for (policy, complaints) in [namespaced(&spec), global(&spec)] {
        assert_eq!(policy, None);
        let [complaint] = complaints.as_slice() else { panic!("{complaints:?}") };
        assert_eq!(
            complaint.to_string(),
            "spec.ingress[1].protocol: \"gre\" is neither a protocol number nor one of tcp, udp, icmp, icmpv6, sctp, \
             udplite (treated as absent)"
        );
    }
}

/// The reference drops the selector, and the policy or rule applies to more.
#[test]
fn h_02_a_policy_with_a_namespace_or_service_account_selector_that_does_not_parse_is_rejected() {
    for (spec, field) in [
        (json!({"namespaceSelector": "env = 'prod'"}), "spec.namespaceSelector"),
        (json!({"serviceAccountSelector": "role == db"}), "spec.serviceAccountSelector"),
        (
            json!({"ingress": [{"action": "Allow", "source": {"serviceAccounts": {"names": ["it's \"so\""]}}}]}),
            "spec.ingress[0].source.serviceAccounts.names",
        ),
        (
            json!({"egress": [{"action": "Deny", "destination": {"namespaceSelector": "has(a"}}]}),
            "spec.egress[0].destination.namespaceSelector",
        ),
    ] {
        let (policy, complaints) = global(&spec);
        assert_eq!((policy, fields(&complaints)), (None, vec![field]), "{spec}");
        assert_eq!(complaints[0].effect, Effect::Rejected);
    }
}

#[test]
fn h_08_a_profile_that_keeps_its_rules_and_loses_its_labels_is_reported() {
    let document = json!({"metadata": {"name": "kns.a"}, "spec": {
        "ingress": [{"action": "Allow", "source": {"nets": ["10.0.0.1"]}}], "labelsToApply": {"pcns.env": "prod"}}});
    let Converted { updates, complaints } = converted("profiles/kns.a", &document);
    assert!(matches!(updates.as_slice(), [Update::ProfileLabels(_, None), Update::ProfileRules(_, Some(_))]));
    let [complaint] = complaints.as_slice() else { panic!("{complaints:?}") };
    assert_eq!(
        complaint.to_string(),
        "spec.ingress[0].source.nets[0]: \"10.0.0.1\" is not a network with a prefix length \
         (labels of the profile are not inherited)"
    );
}
