//! Everything that is not a policy.

use std::collections::BTreeMap;

use super::*;
use crate::endpoint::{EndpointPort, HostEndpoint, NetworkSet, QosControls, WorkloadEndpoint};

#[test]
fn an_endpoint_is_converted_in_full() {
    let document = json!({
        "metadata": {"name": "host--1-k8s-pod-eth0", "namespace": "ns", "labels": {"role": "web", "pcns.env": "fake",
            "pcsa.team": "fake", "nothing": null, "projectcalico.org/serviceaccount": "fake"}},
        "spec": {"interfaceName": "cali1", "mac": "EE:ee:ee:ee:ee:01", "serviceAccountName": "web",
            "ipNetworks": ["10.0.0.1/32", "fd00::1", "10.0.0.2/24"], "profiles": ["kns.ns", "ksa.ns.web"],
            "ipNATs": [{"internalIP": "10.0.0.1", "externalIP": "203.0.113.7"}, {"internalIP": "10.0.0.1"},
                {"internalIP": "10.0.0.1", "externalIP": "fd00::9"}],
            "ports": [{"name": "http", "protocol": "TCP", "port": 8080}, {"name": "", "protocol": 6, "port": 1}],
            "qosControls": {"ingressPacketRate": 5000, "ingressPacketBurst": 4294967296_i64, "egressMaxConnections": -1},
            "ipv4Gateway": "10.0.0.254", "ipv6Gateway": "fd00::ffff"}});
    let Converted { updates, complaints } = converted(ENDPOINT_KEY, &document);
    let [Update::WorkloadEndpoint(key, Some(endpoint))] = updates.as_slice() else { panic!("{complaints:?}") };
    assert_eq!(key.to_string(), "host-1/k8s/ns/pod/eth0");
    let wanted = WorkloadEndpoint {
        active: true,
        interface: "cali1".into(),
        mac: Some([0xee, 0xee, 0xee, 0xee, 0xee, 1]),
        profiles: vec!["kns.ns".into(), "ksa.ns.web".into()],
        v4_nets: vec!["10.0.0.1/32".parse().unwrap(), "10.0.0.0/24".parse().unwrap()],
        v6_nets: vec!["fd00::1/128".parse().unwrap()],
        nats: vec![("10.0.0.1".parse().unwrap(), "203.0.113.7".parse().unwrap())],
        labels: [("role", "web"), ("nothing", ""), ("projectcalico.org/serviceaccount", "web")].into_iter().collect(),
        ports: vec![EndpointPort { name: "http".into(), protocol: 6, port: 8080 }],
        allowed_spoofed: vec![],
        qos: Some(Box::new(QosControls {
            ingress_packet_rate: 5000,
            ingress_packet_burst: u32::MAX,
            ..QosControls::default()
        })),
    };
    assert_eq!(**endpoint, wanted);
    assert_eq!(fields(&complaints), ["spec.ipNATs[1]", "spec.ipNATs[2]"]);
}

#[test]
fn an_endpoint_without_addresses_is_silently_absent() {
    for networks in [json!(null), json!([])] {
        let found = endpoint(&json!({"ipNetworks": networks, "mac": "nonsense"}), STRICT);
        assert_eq!(found, (None, vec![]));
    }
}

#[test]
fn a_part_of_an_endpoint_that_does_not_parse_costs_the_endpoint() {
    for (defect, field) in [
        (json!({"ipNetworks": ["10.0.0.1/32", "10.65.1.0/24/32"]}), "spec.ipNetworks[1]"),
        (json!({"ipv4Gateway": "10.0.0.0/24"}), "spec.ipv4Gateway"),
        (json!({"ipv6Gateway": "nonsense"}), "spec.ipv6Gateway"),
        (json!({"mac": "nonsense"}), "spec.mac"),
        (json!({"ports": [{"name": "a", "protocol": "TCP", "port": 70000}]}), ""),
    ] {
        let mut spec = json!({"ipNetworks": ["10.0.0.1"], "interfaceName": "cali1"});
        spec.as_object_mut().unwrap().extend(defect.as_object().unwrap().clone());
        let (found, complaints) = endpoint(&spec, STRICT);
        assert_eq!(found, None, "{spec}");
        assert_eq!(fields(&complaints), [field], "{spec}");
    }
}

#[test]
fn a_name_that_gives_no_identity_gives_no_record() {
    let key = "workloadendpoints/ns/only-three-parts";
    let Converted { updates, complaints } = converted(key, &json!({"spec": {"ipNetworks": ["10.0.0.1"]}}));
    assert_eq!((updates, fields(&complaints)), (vec![], vec!["metadata.name"]));
    let key = ResourceKey::parse(format!("{}{key}", crate::key::RESOURCES).as_bytes()).unwrap();
    assert_eq!(convert(&key, None, &STRICT), Converted::default());
}

#[test]
fn tiers_pass_only_for_the_exact_word() {
    for (stored, order, default_pass) in [
        (json!({"order": 500, "defaultAction": "Pass"}), Some(500.0), true),
        (json!({"defaultAction": "pass"}), None, false),
        (json!({"defaultAction": "Deny"}), None, false),
        (json!(null), None, false),
    ] {
        let Converted { updates, complaints } = converted("tiers/t", &json!({"spec": stored}));
        assert_eq!(updates, [Update::Tier("t".into(), Some(Tier { order, default_pass }))]);
        assert_eq!(complaints, []);
    }
}

#[test]
fn a_profile_gives_labels_and_then_rules() {
    let document = json!({"metadata": {"name": "kns.a"}, "spec": {"ingress": [{"action": "Allow"}],
        "labelsToApply": {"pcns.env": "prod"}}});
    let Converted { updates, complaints } = converted("profiles/kns.a", &document);
    let [Update::ProfileLabels(_, Some(labels)), Update::ProfileRules(_, Some(rules))] = updates.as_slice() else {
        panic!("{updates:?}");
    };
    assert_eq!(labels.get("pcns.env").map(AsRef::as_ref), Some("prod"));
    assert_eq!((rules.inbound.len(), rules.outbound.len()), (1, 0));
    assert_eq!(complaints, []);
}

#[test]
fn a_profile_without_labels_or_without_rules_has_none() {
    let Converted { updates, complaints } = converted("profiles/p", &json!({"metadata": {"name": "p"}, "spec": {}}));
    let [Update::ProfileLabels(_, None), Update::ProfileRules(_, Some(rules))] = updates.as_slice() else { panic!() };
    assert_eq!((rules.inbound.len(), rules.outbound.len(), complaints.len()), (0, 0, 0));
}

#[test]
fn the_built_in_profile_allows_all_and_cannot_be_stored() {
    let updates = static_updates();
    let [Update::ProfileLabels(_, None), Update::ProfileRules(name, Some(rules))] = updates.as_slice() else {
        panic!()
    };
    assert_eq!(&**name, "projectcalico-default-allow");
    for rules in [&rules.inbound, &rules.outbound] {
        let [rule] = rules.as_slice() else { panic!() };
        assert_eq!(
            (rule.action, &rule.source, &rule.destination),
            (Action::Allow, &EntityMatch::default(), &EntityMatch::default())
        );
    }
    let stored = converted("profiles/projectcalico-default-allow", &json!({"spec": {"ingress": [{"action": "Deny"}]}}));
    assert_eq!((stored.updates, stored.complaints.len()), (vec![], 1));
    assert_eq!(convert(&ResourceKey::Profile(DEFAULT_ALLOW.into()), None, &STRICT), Converted::default());
}

#[test]
fn network_sets_belong_to_the_namespace_of_their_key() {
    let document = json!({"metadata": {"name": "a", "namespace": "ns", "labels": {"type": "office",
        "projectcalico.org/namespace": "fake"}}, "spec": {"nets": ["192.0.2.1/24", "bad", "fd00::1"]}});
    let Converted { updates, complaints } = converted("networksets/ns/a", &document);
    let wanted = NetworkSet {
        nets: vec!["192.0.2.0/24".parse().unwrap(), "fd00::1/128".parse().unwrap()],
        labels: [("type", "office"), ("projectcalico.org/namespace", "ns")].into_iter().collect(),
        profiles: vec!["kns.ns".into()],
    };
    assert_eq!(updates, [Update::NetworkSet("ns/a".into(), Some(Arc::new(wanted)))]);
    assert_eq!(fields(&complaints), ["spec.nets[1]"]);

    let Converted { updates, complaints } = converted("globalnetworksets/a", &document);
    let [Update::NetworkSet(name, Some(set))] = updates.as_slice() else { panic!() };
    assert_eq!((&**name, set.profiles.len(), fields(&complaints)), ("a", 0, vec!["spec.nets[1]"]));
    assert_eq!(set.labels.get("projectcalico.org/namespace").map(AsRef::as_ref), Some("fake"));

    let Converted { updates, complaints } = converted("networksets/b@d/a", &json!({"metadata": {"namespace": "b@d"}}));
    assert_eq!(updates, [Update::NetworkSet("b@d/a".into(), None)]);
    assert_eq!(fields(&complaints), ["metadata.namespace"]);
}

#[test]
fn cluster_information_gives_parameters_and_the_ready_flag() {
    let spec = json!({"clusterGUID": "ba6a", "clusterType": "openstack", "datastoreReady": true, "variant": ""});
    let Converted { updates, .. } = converted("clusterinformations/default", &json!({"spec": spec}));
    let wanted = config(&[("ClusterGUID", "ba6a"), ("ClusterType", "openstack")]);
    assert_eq!(updates, [Update::Config(ConfigSource::ClusterInformation, wanted), Update::Ready(Some(true))]);

    let absent = [Update::Config(ConfigSource::ClusterInformation, None), Update::Ready(None)];
    let unparsable = converted("clusterinformations/default", &json!({"spec": {"datastoreReady": "true"}}));
    assert_eq!((unparsable.updates.as_slice(), unparsable.complaints.len()), (absent.as_slice(), 1));
    let key = ResourceKey::ClusterInformation("default".into());
    assert_eq!(convert(&key, None, &STRICT).updates, absent);
    assert_eq!(converted("clusterinformations/other", &json!({"spec": spec})).updates, []);
}

#[test]
fn annotations_override_the_fields_of_a_configuration() {
    let document = json!({"metadata": {"name": "node.a", "annotations": {"config.projectcalico.org/logseverityscreen": "Debug",
        "config.projectcalico.org/SomeFutureParam": "7", "config.projectcalico.org/": "x", "other": "y"}},
        "spec": {"logSeverityScreen": "Info", "reportingInterval": "90s", "ipv6Support": null}});
    let Converted { updates, complaints } = converted("felixconfigurations/node.a", &document);
    let wanted = config(&[("logseverityscreen", "Debug"), ("ReportingIntervalSecs", "90"), ("SomeFutureParam", "7")]);
    assert_eq!(updates, [Update::Config(ConfigSource::FelixConfiguration("node.a".into()), wanted)]);
    assert_eq!(complaints, []);

    let bad = converted("felixconfigurations/default", &json!({"spec": {"reportingInterval": "soon"}}));
    assert_eq!(bad.updates, [Update::Config(ConfigSource::FelixConfiguration("default".into()), None)]);
    assert!(bad.complaints[0].reason.contains("reportingInterval"), "{:?}", bad.complaints);
}

fn config(parameters: &[(&str, &str)]) -> Option<Arc<BTreeMap<String, String>>> {
    Some(Arc::new(parameters.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect()))
}

/// The example of datastore.md 3.2.
#[test]
fn a_host_endpoint_is_converted_in_full() {
    let document = json!({
        "metadata": {"name": "compute-1-eth0", "labels": {"role": "hypervisor", "pcns.env": "own"},
            "annotations": {"qos.projectcalico.org/dscp": "EF"}},
        "spec": {"node": "compute-1", "interfaceName": "eth0",
            "expectedIPs": ["192.0.2.11", "192.0.2.0/24", "2001:db8::11", "nonsense"],
            "profiles": ["projectcalico-default-allow"],
            "ports": [{"name": "libvirt", "protocol": "TCP", "port": 16509}]}});
    let Converted { updates, complaints } = converted("hostendpoints/compute-1-eth0", &document);
    let wanted = HostEndpoint {
        host: "compute-1".into(),
        interface: "eth0".into(),
        expected_v4: vec!["192.0.2.11".parse().unwrap()],
        expected_v6: vec!["2001:db8::11".parse().unwrap()],
        profiles: vec!["projectcalico-default-allow".into()],
        labels: [("role", "hypervisor"), ("pcns.env", "own")].into_iter().collect(),
        ports: vec![EndpointPort { name: "libvirt".into(), protocol: 6, port: 16509 }],
        dscp: Some(46),
    };
    assert_eq!(updates, [Update::HostEndpoint("compute-1-eth0".into(), Some(Arc::new(wanted)))]);
    assert_eq!(fields(&complaints), ["spec.expectedIPs[1]", "spec.expectedIPs[3]"]);
}

#[test]
fn a_host_endpoint_without_a_node_is_absent_and_a_bad_dscp_is_ignored() {
    let Converted { updates, complaints } = converted("hostendpoints/e", &json!({"spec": {"interfaceName": "eth0"}}));
    assert_eq!(updates, [Update::HostEndpoint("e".into(), None)]);
    assert_eq!(fields(&complaints), ["spec.node"]);

    let document = json!({"metadata": {"annotations": {"qos.projectcalico.org/dscp": "fast"}}, "spec": {"node": "h", "ports": null}});
    let Converted { updates, complaints } = converted("hostendpoints/e", &document);
    let wanted = HostEndpoint { host: "h".into(), ..HostEndpoint::default() };
    assert_eq!(updates, [Update::HostEndpoint("e".into(), Some(Arc::new(wanted)))]);
    assert_eq!(fields(&complaints), ["metadata.annotations"]);
}

/// C-11: the record of another host is the same record, so that nothing has to be remembered.
#[test]
fn a_host_endpoint_that_moves_replaces_itself() {
    let of = |node: &str| converted("hostendpoints/e", &json!({"spec": {"node": node, "interfaceName": "*"}})).updates;
    let [first, second] = ["h1", "h2"].map(of);
    assert_ne!(first, second);
    assert_eq!(first[0].key(), second[0].key());
}
