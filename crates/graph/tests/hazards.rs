//! Hazards of policy.md section 9 that the graph decides.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use graph::{Batch, Graph, SetMember};
use model::{SetId, Update};
use testkit::build::{absent, hep, network_set, policy, profile_labels, profile_rules, rule, tier, wep};

fn graph(updates: Vec<Update>) -> (Graph, Batch) {
    let mut graph = Graph::new("h1".into());
    let batch = step(&mut graph, updates);
    (graph, batch)
}

fn step(graph: &mut Graph, updates: Vec<Update>) -> Batch {
    updates.into_iter().for_each(|update| graph.apply(update));
    graph.take_batch()
}

/// Names and default actions of the tiers of the only endpoint in a batch.
fn tiers(batch: &Batch) -> Vec<String> {
    let programs: Vec<_> = batch.endpoints.values().flatten().collect();
    let [program] = programs.as_slice() else { panic!("{batch:?}") };
    let word = |pass: bool| if pass { "pass" } else { "deny" };
    program.tiers.iter().map(|tier| format!("{} {}", tier.name, word(tier.default_pass))).collect()
}

/// The reference keeps the default action of a deleted tier until it restarts.
#[test]
fn x_01_a_missing_tier_comes_last_and_denies_whatever_it_was_before() {
    let local = wep("h1/openstack/ns/vm/port").interface("tap1").ip("10.0.0.1").build();
    let policies = vec![policy("gnp/a").tier("a").build(), policy("gnp/b").tier("b").build()];
    let updates = [vec![local, tier("a", Some(1.0), true), tier("b", Some(2.0), false)], policies].concat();
    let (mut graph, batch) = graph(updates);
    assert_eq!(tiers(&batch), ["a pass", "b deny"]);
    assert_eq!(graph.missing_tiers().count(), 0);

    let batch = step(&mut graph, vec![absent(&tier("a", None, false))]);
    assert_eq!(tiers(&batch), ["b deny", "a deny"]);
    assert_eq!(graph.missing_tiers().map(AsRef::as_ref).collect::<Vec<&str>>(), ["a"]);

    let batch = step(&mut graph, vec![tier("a", None, true)]);
    assert_eq!(tiers(&batch), ["b deny", "a pass"]);
}

/// Kept as it is: writers that let tenants choose labels must keep them from these. Workloads cannot have
/// such labels of their own, which the conversion sees to.
#[test]
fn x_06_an_own_label_wins_over_an_inherited_one() {
    let (_, batch) = graph(vec![
        profile_labels("kns.ns", "pcns.env=prod"),
        hep("e", "h1").label("pcns.env=dev").profile("kns.ns").build(),
        policy("gnp/prod").selector("pcns.env == 'prod'").build(),
        policy("gnp/dev").selector("pcns.env == 'dev'").build(),
    ]);
    let active: Vec<String> = batch.policies.keys().map(ToString::to_string).collect();
    assert_eq!(active, ["gnp/dev"]);
}

/// The steps of M-32, without its suppression: no address that stays allowed is ever withdrawn.
#[test]
fn x_07_overlapping_members_come_and_go_without_a_gap() {
    let (mut graph, _) = graph(vec![
        wep("h1/openstack/ns/vm/port").interface("tap1").ip("10.9.9.9").build(),
        policy("gnp/p").ingress("allow from in == 'it'").build(),
    ]);
    let nets = ["10.1.2.3/32", "10.0.0.0/8", "10.1.0.0/16", "10.2.0.0/16"];
    let mut change = |net: &str, there: bool| -> String {
        let set = network_set(&net.replace(['/', '.'], "-"), "in=it", &[net]);
        let batch = step(&mut graph, vec![if there { set } else { absent(&set) }]);
        let text = |member: &SetMember, sign: char| match member {
            SetMember::Net(net) => format!("{sign}{net}"),
            SetMember::AddressPort { .. } => panic!("no ports here"),
        };
        let deltas = batch.members.values();
        let words = deltas.flat_map(|delta| {
            let added = delta.added.iter().map(|member| text(&member, '+'));
            added.chain(delta.removed.iter().map(|member| text(&member, '-')))
        });
        words.collect::<Vec<_>>().join(" ")
    };
    for net in nets {
        assert_eq!(change(net, true), format!("+{net}"));
    }
    for net in ["10.0.0.0/8", "10.1.0.0/16"] {
        assert_eq!(change(net, false), format!("-{net}"));
    }
}

/// T-21: with a forward tier in which nothing decides, forwarded packets would lose their allowance.
#[test]
fn x_08_a_forward_tier_of_staged_policies_only_is_not_listed() {
    let forward = |key: &str| policy(key).with(|policy| policy.apply_on_forward = true).build();
    let (mut graph, batch) = graph(vec![hep("e", "h1").build(), forward("sgnp/try")]);
    let lists = |batch: &Batch| {
        let program = batch.host_endpoints.values().next().cloned().flatten().unwrap();
        (program.tiers.normal.len(), program.tiers.forward.len())
    };
    assert_eq!(lists(&batch), (1, 0));
    // A staged one beside one that decides does no harm.
    let batch = step(&mut graph, vec![forward("gnp/real")]);
    assert_eq!(lists(&batch), (1, 1));
}

/// L-23: the canonical text of a double negation parses as something else.
#[test]
fn x_11_the_id_of_a_set_is_that_of_the_selector_as_it_was_written() {
    let twice = "!(!(has(x)))";
    let (_, batch) = graph(vec![
        wep("h1/openstack/ns/vm/port").interface("tap1").label("x").ip("10.0.0.1").build(),
        policy("gnp/p").selector(twice).ingress(&format!("allow from {twice}")).build(),
    ]);
    let id = SetId::for_selector("!!has(x)");
    assert_ne!(id, SetId::for_selector("has(x)"));
    assert_eq!(batch.sets_created.keys().collect::<Vec<_>>(), [&id]);
    let program = batch.policies.values().next().cloned().flatten().unwrap();
    assert_eq!(program.inbound[0].source.sets, [id]);
    assert_eq!(&*program.original_selector, "!!has(x)");

    // R-10 writes both into one selector, and keeps them as they were written too.
    let merged = rule(&format!("allow from {twice} from-not {twice}"));
    let (_, batch) = graph(vec![
        policy("gnp/p")
            .with(|policy| {
                policy.always_needed = true;
                policy.inbound = vec![merged];
            })
            .build(),
    ]);
    let id = SetId::for_selector("(!!has(x) && !!!has(x))");
    assert_eq!(batch.sets_created.keys().collect::<Vec<_>>(), [&id]);
}

/// H-6: the unit is the policy. The log names it; everything else stays in force, and a tier without a
/// policy does not apply (T-8).
#[test]
fn x_12_a_policy_that_is_rejected_takes_nothing_with_it_but_itself() {
    let deny = policy("gnp/deny").tier("sec").ingress("deny from has(x)").build();
    let other = policy("gnp/other").tier("sec").ingress("deny from has(x)").build();
    let (mut graph, batch) = graph(vec![
        wep("h1/openstack/ns/vm/port").interface("tap1").ip("10.0.0.1").build(),
        tier("sec", Some(1.0), false),
        deny.clone(),
        other.clone(),
        policy("gnp/allow").ingress("allow").build(),
    ]);
    assert_eq!(tiers(&batch), ["sec deny", "default deny"]);
    let batch = step(&mut graph, vec![absent(&deny)]);
    assert_eq!(tiers(&batch), ["sec deny", "default deny"]);
    assert_eq!((batch.policies.len(), batch.sets_removed.len()), (1, 0));
    let batch = step(&mut graph, vec![absent(&other)]);
    assert_eq!(tiers(&batch), ["default deny"]);
    assert_eq!((batch.policies.len(), batch.sets_removed.len()), (1, 1));
}

#[test]
fn x_13_endpoints_with_a_missing_profile_are_counted() {
    let local = wep("h1/k8s/ns/a/eth0").interface("cali1").ip("10.0.0.1");
    let (mut graph, batch) = graph(vec![
        local.clone().profile("p").profile("q").build(),
        wep("h1/k8s/ns/b/eth0").interface("cali2").profile("p").profile("projectcalico-default-allow").build(),
        hep("e", "h1").profile("q").build(),
        hep("remote", "h2").profile("nowhere").build(),
        wep("h2/k8s/ns/c/eth0").profile("nowhere").build(),
        profile_rules("p", &["allow"], &[]),
    ]);
    assert_eq!(graph.stats().endpoints_missing_a_profile, 2);
    assert!(batch.profiles[&*model::Name::from("q")].as_ref().unwrap().missing);

    let mut count = |update: Update| {
        step(&mut graph, vec![update]);
        graph.stats().endpoints_missing_a_profile
    };
    assert_eq!(count(absent(&profile_rules("p", &[], &[]))), 3);
    assert_eq!(count(profile_rules("q", &[], &[])), 2);
    assert_eq!(count(local.build()), 1);
    assert_eq!(count(profile_rules("p", &[], &[])), 0);
}
