//! The shapes are those of performance.md 2.1 and 2.2.

use super::*;

#[test]
fn the_shapes_are_those_of_the_reference() {
    let shape = Shape { remote: 3, local: 2, tag_policies: 2, network_sets: 1_000, ipv4: false };
    let updates: Vec<Update> = snapshot(shape).collect();
    assert_eq!(updates.len(), 2 + 200 + 3 + 2_000 + 2);
    let mut nets = 0;
    for update in &updates {
        if let Update::NetworkSet(_, Some(set)) = update {
            nets += set.nets.len();
        }
    }
    assert_eq!(nets, 111_800);
    let Some(Update::WorkloadEndpoint(key, Some(first))) =
        updates.iter().find(|update| matches!(update, Update::WorkloadEndpoint(..)))
    else {
        panic!("no endpoint");
    };
    assert_eq!(key.to_string(), "remotehost/k8s/wep-0/eth0");
    assert_eq!(first.v6_nets[0].to_string(), "a00:1::ffff:0:0/128");
    assert_eq!(first.labels.get("one-in-40").map(AsRef::as_ref), Some("value-1"));
    let mut markers = MARKERS.to_vec();
    markers.sort_unstable();
    markers.dedup();
    assert_eq!(markers.len(), 29);
}

#[test]
fn objects_of_a_snapshot_come_in_the_reference_s_order() {
    let shape = Shape { remote: 32, local: 2, tag_policies: 33, network_sets: 10, ipv4: false };
    let updates: Vec<Update> = snapshot(shape).collect();
    let (policies, rest) = updates.split_at(33);
    let (namespaces, rest) = rest.split_at(200);
    let (remote, rest) = rest.split_at(32);
    let (sets, local) = rest.split_at(20);

    let [Update::Policy(key, Some(first)), .., Update::Policy(_, Some(last))] = policies else { panic!() };
    assert_eq!(key.to_string(), "gnp/tag-pol-0");
    assert_eq!((&*first.tier, first.order, first.outbound.len()), ("default", None, 0));
    // Policy 32 is one turn and one further: it selects by entry 1 and refers to entries 1 to 5.
    assert_eq!(last.selector.canonical(), "has(FOO_BAR)");
    let sources = |policy: &Policy| -> Vec<String> {
        let rules = policy.inbound.iter();
        rules.map(|rule| rule.source.selector.as_ref().unwrap().canonical()).collect()
    };
    let wanted = ["has(FOO_BAR)", "has(BIFF_BOP)", "has(calico/FizzBuzz)", "has(calico/BoffBip)", "has(calico/Bazzle)"];
    assert_eq!(sources(last), wanted);

    for (i, pair) in namespaces.chunks(2).enumerate() {
        let [Update::ProfileLabels(name, Some(labels)), Update::ProfileRules(same, Some(rules))] = pair else {
            panic!("{pair:?}");
        };
        assert_eq!((&**name, name), (format!("kns.namespace-{i}").as_str(), same));
        let wanted = format!("namespace-{i}");
        assert_eq!(labels.iter().len(), 1);
        assert_eq!(labels.get("pcns.projectcalico.org/name").map(AsRef::as_ref), Some(wanted.as_str()));
        assert_eq!(**rules, ProfileRules::default());
    }

    let [.., Update::WorkloadEndpoint(key, Some(last))] = remote else { panic!() };
    assert_eq!(key.to_string(), "remotehost/k8s/wep-31/eth0");
    // The 32nd endpoint: s = 32.
    let wanted = [
        ("one-in-10", "value-2"),
        ("one-in-11", "value-10"),
        ("one-in-20", "value-12"),
        ("one-in-30", "value-2"),
        ("one-in-40", "value-32"),
        ("FOO_BAR", "true"),
    ];
    assert_eq!(last.labels, wanted.into_iter().collect());
    assert_eq!(last.v6_nets[0].to_string(), "a00:20::ffff:0:0/128");
    assert_eq!(last.profiles, [Name::from("kns.namespace-31")]);

    let mut sizes = Vec::new();
    for (i, pair) in sets.chunks(2).enumerate() {
        let [Update::NetworkSet(name, Some(set)), Update::Policy(key, Some(policy))] = pair else {
            panic!("{pair:?}");
        };
        assert_eq!(
            (&**name, key.to_string()),
            (format!("network-set-{i}").as_str(), format!("gnp/network-set-pol-{i}"))
        );
        assert_eq!(set.labels.get("network-set-name").map(AsRef::as_ref), Some(&**name));
        assert_eq!(policy.selector.canonical(), "all()");
        assert_eq!(sources(policy), [format!("network-set-name == \"{name}\"")]);
        if i == 0 {
            assert_eq!(set.nets[0].to_string(), "a00:1::ffff:0:0/128");
        }
        sizes.push(set.nets.len());
    }
    assert_eq!(sizes, [1, 1, 1, 1, 2, 3, 4, 5, 100, 1000]);

    let [Update::WorkloadEndpoint(key, Some(first)), _] = local else { panic!() };
    assert_eq!(key.to_string(), "localhost/k8s/wep-0/eth0");
    assert_eq!(first.v6_nets[0].to_string(), "a00:21::ffff:0:0/128");
    assert_eq!(first.labels.get("one-in-40").map(AsRef::as_ref), Some("value-33"));
    assert_eq!(first.profiles, [Name::from("kns.namespace-0")]);
}

#[test]
fn a_customer_is_a_namespace_a_policy_and_a_pod() {
    let updates: Vec<Update> = isolated_customers(1_000).collect();
    assert_eq!(updates.len(), 1_000 + 2_000 + 1_000);
    let Update::Policy(key, Some(policy)) = &updates[999] else { panic!() };
    assert_eq!((&*key.namespace, &*key.name), ("customer-999", "customer-999/isolation"));
    let own = "pcns.projectcalico.org/name == \"customer-999\"";
    assert_eq!((policy.selector.canonical().as_str(), policy.ingress, policy.egress), (own, true, true));
    assert_eq!(policy.inbound[0].source.selector.as_ref().unwrap().canonical(), own);
    let [to_own, dns] = policy.outbound.as_slice() else { panic!() };
    assert_eq!(to_own.destination.selector.as_ref().unwrap().canonical(), own);
    assert_eq!(dns.destination.nets, ["10.96.0.10/32".parse().unwrap()]);
    assert_eq!(dns.protocol.as_ref().and_then(model::Protocol::number), Some(17));
    assert_eq!(dns.destination.ports, [model::Port::Range(model::PortRange::single(53))]);

    let Update::ProfileLabels(name, Some(labels)) = &updates[1_000 + 2 * 7] else { panic!() };
    assert_eq!(&**name, "kns.customer-7");
    assert_eq!(labels.get("production").map(AsRef::as_ref), Some("false"));
    assert_eq!(labels.get("namespace-id"), Some(&pseudo_random(7, 20)));

    let hosts: Vec<&str> = updates[3_000..]
        .iter()
        .map(|update| {
            let Update::WorkloadEndpoint(key, _) = update else { panic!() };
            &*key.host
        })
        .collect();
    assert!(hosts[..900].iter().all(|host| *host == "remotehost"));
    assert!(hosts[900..].iter().all(|host| *host == HOST));
    // The second local pod is that of customer 10.
    let Update::WorkloadEndpoint(key, Some(pod)) = &updates[3_000 + 900 + 1] else { panic!() };
    assert_eq!(&*key.workload, "customer-10/app-000000049-000af");
    assert_eq!(pod.profiles, [Name::from("kns.customer-10")]);
    assert_eq!(pod.labels.len(), 15);
    for (key, wanted) in [
        ("pod-id", &*pseudo_random(50, 20)),
        ("instance-id", &*pseudo_random(51, 20)),
        ("short-id", &*pseudo_random(52, 10)),
        ("config-hash", &*pseudo_random(53, 20)),
        ("version-tag", &*pseudo_random(54, 8)),
        ("enabled", "false"),
        ("debug", "true"),
        ("canary", "false"),
        ("managed", "true"),
        ("environment", "staging"),
        ("tier", "middleware"),
        ("region", "eu-west"),
        ("team", "platform"),
        ("managed-by", "saas-controller"),
        ("tenant-id", &*pseudo_random(10, 10)),
    ] {
        assert_eq!(pod.labels.get(key).map(AsRef::as_ref), Some(wanted), "{key}");
    }
}

#[test]
fn pseudo_random_text_follows_its_definition() {
    // v = 1: character 1 of the alphabet, then (1 * a + c) mod 16 = (13 + 15) mod 16 = 12.
    assert_eq!(&pseudo_random(0, 2)[..], "b6");
}
