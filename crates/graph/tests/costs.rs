//! What an update costs, counted in deltas and evaluations and not in seconds (policy.md A-9).

use graph::{Flow, Graph};
use model::{EndpointPort, Update};
use testkit::build::{absent, network_set, policy, profile_labels, tier, wep};

/// A host with one security group rule, and `n` other machines in the group.
fn cluster(n: u32) -> Graph {
    let mut graph = Graph::new("h1".into());
    graph.apply(policy("np/ns/web").selector("has(sg-web)").ingress("allow from has(sg-db)").build());
    graph.apply(wep("h1/o/ns/local/e").label("sg-web").ip("10.255.0.1").build());
    for i in 0..n {
        graph.apply(remote(i));
    }
    graph.take_batch();
    graph
}

fn remote(i: u32) -> Update {
    let address = format!("10.{}.{}.{}", i >> 16, (i >> 8) & 255, i & 255);
    wep(&format!("h2/o/ns/vm-{i}/e")).label("sg-db").label(&format!("id={i}")).profile("p").ip(&address).build()
}

/// What one update lets flow, and how many selectors are evaluated for it.
fn cost(graph: &mut Graph, update: Update) -> (Flow, u64) {
    let evals = |graph: &Graph| {
        let stats = graph.stats();
        let of = |selectors: graph::SelectorStats| selectors.evals_true + selectors.evals_false;
        of(stats.policy_selectors) + of(stats.rule_selectors)
    };
    let (before, evals_before) = (graph.stats().flow, evals(graph));
    graph.apply(update);
    graph.take_batch();
    let after = graph.stats().flow;
    let flow = Flow {
        updates: after.updates - before.updates,
        local: after.local - before.local,
        local_matches: after.local_matches - before.local_matches,
        active: after.active - before.active,
        profiles: after.profiles - before.profiles,
        references: after.references - before.references,
        rule_matches: after.rule_matches - before.rule_matches,
        members: after.members - before.members,
        output: after.output - before.output,
    };
    (flow, evals(graph) - evals_before)
}

#[test]
fn a_change_costs_the_same_in_a_small_and_in_a_large_cluster() {
    let changes: Vec<(&str, Update)> = vec![
        ("a new member", remote(70_000)),
        ("the member goes", absent(&remote(70_000))),
        ("a machine outside the group", wep("h2/o/ns/other/e").label("sg-x").ip("10.200.0.1").build()),
        ("a network set", network_set("office", "sg-db=", &["192.0.2.0/24", "198.51.100.0/24"])),
        ("a tier", tier("default", Some(1.0), false)),
        ("labels of a profile that nobody has", profile_labels("nobody", "sg-db=")),
        ("a policy of another host", policy("np/ns/x").selector("has(sg-x)").ingress("allow from has(sg-y)").build()),
        (
            "a rule without selector",
            policy("np/ns/web").selector("has(sg-web)").ingress("allow from has(sg-db)").ingress("allow tcp").build(),
        ),
    ];
    let (mut small, mut large) = (cluster(10), cluster(5_000));
    for (name, update) in changes {
        let in_small = cost(&mut small, update.clone());
        assert_eq!(in_small, cost(&mut large, update), "{name}");
        assert!(in_small.1 <= 2, "{name}: {in_small:?}");
    }
}

#[test]
fn what_stays_a_member_is_neither_withdrawn_nor_announced() {
    let mut graph = cluster(3);
    // Other labels, another class, the same set and address (M-31).
    let relabelled = wep("h2/o/ns/vm-1/e").label("sg-db").label("id=new").profile("q").ip("10.0.0.1").build();
    let (flow, _) = cost(&mut graph, relabelled);
    assert_eq!((flow.members, flow.output), (0, 0), "{flow:?}");
    // A second contribution of the same address, and its end (M-30).
    let twin = wep("h3/o/ns/twin/e").label("sg-db").ip("10.0.0.1").build();
    for update in [twin.clone(), absent(&twin)] {
        let (flow, _) = cost(&mut graph, update);
        assert_eq!((flow.members, flow.output), (0, 0), "{flow:?}");
    }
}

#[test]
fn one_network_of_a_large_set_is_one_delta() {
    let mut graph = cluster(1);
    let nets: Vec<String> = (0..2_000).map(|i| format!("172.16.{}.{}/32", i >> 8, i & 255)).collect();
    let nets: Vec<&str> = nets.iter().map(String::as_str).collect();
    let (flow, _) = cost(&mut graph, network_set("big", "sg-db=", &nets));
    assert_eq!((flow.members, flow.output), (2_000, 1));
    let (flow, _) = cost(&mut graph, network_set("big", "sg-db=", &nets[1..]));
    assert_eq!((flow.members, flow.output), (1, 1));
}

#[test]
fn local_groups_do_not_flap_when_an_endpoint_changes_class() {
    let mut graph = cluster(3);
    // The policy stays active and its set needed while the only local endpoint changes its labels.
    let relabelled = wep("h1/o/ns/local/e").label("sg-web").label("new").ip("10.255.0.1").build();
    let (flow, _) = cost(&mut graph, relabelled);
    assert_eq!((flow.active, flow.references, flow.members), (0, 0, 0), "{flow:?}");
}

/// With work in proportion to the square of the endpoints or of the ports this would take a minute.
#[test]
fn an_address_that_thousands_share_and_thousands_of_ports_of_one_name_come_and_go_once() {
    let mut graph = cluster(0);
    for i in 0..20_000 {
        graph.apply(wep(&format!("h2/o/ns/vm-{i}/e")).label(&format!("id={i}")).profile("p").ip("10.0.0.1").build());
    }
    graph.take_batch();
    let labels = profile_labels("p", "sg-db=");
    assert_eq!(cost(&mut graph, labels.clone()).0.members, 1);
    assert_eq!(cost(&mut graph, absent(&labels)).0.members, 1);

    let rule = "allow tcp to has(sg-db) to-ports http";
    graph.apply(policy("np/ns/ports").selector("has(sg-web)").ingress(rule).build());
    graph.take_batch();
    let ports = wep("h2/o/ns/ports/e").label("sg-db").ip("10.0.0.2").with(|endpoint| {
        endpoint.ports = (1..=20_000).map(|port| EndpointPort { name: "http".into(), protocol: 6, port }).collect();
    });
    let ports = ports.build();
    // The address is in the other set.
    assert_eq!(cost(&mut graph, ports.clone()).0.members, 20_001);
    assert_eq!(cost(&mut graph, absent(&ports)).0.members, 20_001);
}
