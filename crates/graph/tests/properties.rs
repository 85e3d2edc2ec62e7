//! Laws of the whole graph, over random histories in small domains: collisions are where the bugs are.

use std::collections::BTreeSet;

use graph::Graph;
use model::{Labels, Name, Update};
use proptest::prelude::*;
use proptest::sample::{select, subsequence};
use testkit::build::{self, absent, hep, network_set, policy, rule, tier, wep};
use testkit::naive::{self, Facts};
use testkit::replay::Known;

const HOST: &str = "h1";

/// One step of a history: a change, and whether a batch is taken after it.
type Step = (Update, bool);

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever happened and however it was cut into batches, the batches add up to what a full
    /// calculation from the present facts gives (I1), keeping every promise on the way (F-3, F-7, F-8).
    #[test]
    fn the_batches_add_up_to_the_present_state(history in history(40)) {
        let mut graph = Graph::new(HOST.into());
        let mut known = Known::default();
        let mut done = Vec::new();
        let last = history.len().saturating_sub(1);
        for (index, (update, cut)) in history.into_iter().enumerate() {
            done.push(update.clone());
            graph.apply(update);
            if cut || index == last {
                known.replay(graph.take_batch()).map_err(TestCaseError::fail)?;
                prop_assert_eq!(&known, &naive::evaluate(HOST, &naive::facts(done.clone())));
            }
        }

        // Deleting everything leaves nothing, in the consumer or in any stage.
        for fact in naive::facts(done).values() {
            graph.apply(absent(fact));
        }
        known.replay(graph.take_batch()).map_err(TestCaseError::fail)?;
        prop_assert_eq!(known, Known::default());
        prop_assert!(graph.is_empty(), "left over: {:#?}", graph);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    /// Two runs over one history give the same batches, byte for byte (I10).
    #[test]
    fn two_runs_give_equal_batches(history in history(40)) {
        let batches = || {
            let mut graph = Graph::new(HOST.into());
            let mut batches = Vec::new();
            for (update, cut) in &history {
                graph.apply(update.clone());
                if *cut {
                    batches.push(graph.take_batch());
                }
            }
            batches.push(graph.take_batch());
            format!("{batches:#?}")
        };
        prop_assert_eq!(batches(), batches());
    }

    /// What is stored already changes nothing (A-7, M-31), in whatever order it is said again.
    #[test]
    fn repeating_all_facts_emits_nothing(history in history(40), reverse in any::<bool>()) {
        let mut graph = Graph::new(HOST.into());
        let mut done = Vec::new();
        for (update, _) in history {
            done.push(update.clone());
            graph.apply(update);
        }
        graph.take_batch();
        let facts = naive::facts(done.clone());
        let absent_keys: BTreeSet<_> = done.iter().map(Update::key).filter(|key| !facts.contains_key(key)).collect();
        let mut again: Vec<Update> = facts.into_values().collect();
        again.extend(done.into_iter().filter(|update| absent_keys.contains(&update.key())).map(|update| absent(&update)));
        if reverse {
            again.reverse();
        }
        for update in again {
            graph.apply(update);
        }
        let batch = graph.take_batch();
        prop_assert!(batch.is_empty(), "{:#?}", batch);
    }

    /// A full start in any order of keys gives the same first batch.
    #[test]
    fn the_order_of_arrival_does_not_matter(history in history(40), seed in any::<u64>()) {
        let facts: Facts = naive::facts(history.into_iter().map(|(update, _)| update));
        let mut shuffled: Vec<Update> = facts.values().cloned().collect();
        let mut state = seed | 1;
        for at in (1..shuffled.len()).rev() {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            shuffled.swap(at, (state >> 33) as usize % (at + 1));
        }
        let first_batch = |updates: Vec<Update>| {
            let mut graph = Graph::new(HOST.into());
            updates.into_iter().for_each(|update| graph.apply(update));
            graph.take_batch()
        };
        prop_assert_eq!(first_batch(shuffled), first_batch(facts.into_values().collect()));
    }
}

fn history(longest: usize) -> impl Strategy<Value = Vec<Step>> {
    prop::collection::vec((any_update(), prop::bool::weighted(0.2)), 0..longest)
}

fn any_update() -> impl Strategy<Value = Update> {
    let present = prop_oneof![
        6 => any_endpoint(),
        6 => any_policy(),
        2 => any_tier(),
        2 => any_profile_labels(),
        2 => any_profile_rules(),
        2 => any_network_set(),
        3 => any_host_endpoint(),
        1 => (select(vec!["tap1", "tap2"]), 1..4u32, any::<bool>()).prop_map(|(name, index, up)| build::link(name, index, up)),
    ];
    (present, prop::bool::weighted(0.25)).prop_map(|(update, gone)| if gone { absent(&update) } else { update })
}

fn any_labels() -> impl Strategy<Value = Labels> {
    subsequence(vec!["a", "b", "c"], 0..=3)
        .prop_flat_map(|keys| keys.into_iter().map(|key| (Just(key), select(vec!["", "1", "2"]))).collect::<Vec<_>>())
        .prop_map(|labels| labels.into_iter().collect())
}

/// With repetitions, in any order.
fn any_profiles() -> impl Strategy<Value = Vec<Name>> {
    prop::collection::vec(select(vec!["p", "q", "kns.n", "projectcalico-default-allow"]).prop_map(Name::from), 0..4)
}

fn any_endpoint() -> impl Strategy<Value = Update> {
    let key = (
        prop_oneof![3 => Just("h1"), 1 => Just("h2")],
        select(vec!["k8s", "openstack"]),
        select(vec!["n/w1", "n/w2", "w"]),
        select(vec!["e1", "e2"]),
    );
    let addresses = subsequence(vec!["10.0.0.1", "10.0.0.2", "10.0.0.2/24", "fd00::1", "fd00::2"], 0..4);
    let ports = subsequence(vec!["http/tcp/80", "http/tcp/8080", "http/udp/80", "dns/udp/53", "dns/sctp/53"], 0..4);
    (key, select(vec!["tap1", "tap2"]), any_labels(), any_profiles(), addresses, ports).prop_map(
        |((host, orchestrator, workload, endpoint), interface, labels, profiles, addresses, ports)| {
            let mut builder = wep(&format!("{host}/{orchestrator}/{workload}/{endpoint}")).interface(interface);
            for address in addresses {
                builder = builder.ip(address);
            }
            for port in ports {
                builder = builder.port(port);
            }
            let (key, value) = builder.with(|value| value.profiles = profiles).value();
            let value = model::WorkloadEndpoint { labels, ..value.as_ref().clone() };
            Update::WorkloadEndpoint(key, Some(value.into()))
        },
    )
}

fn any_host_endpoint() -> impl Strategy<Value = Update> {
    let addresses = subsequence(vec!["10.0.0.1", "10.0.0.3", "fd00::1"], 0..3);
    let ports = subsequence(vec!["http/tcp/80", "dns/udp/53", "dns/sctp/53"], 0..3);
    (
        // The same name on another host is the same endpoint, and a network set may have that name too.
        select(vec!["hep1", "hep2", "global"]),
        prop_oneof![3 => Just("h1"), 1 => Just("h2")],
        select(vec!["eth0", "*", ""]),
        any_labels(),
        any_profiles(),
        addresses,
        ports,
    )
        .prop_map(|(name, host, interface, labels, profiles, addresses, ports)| {
            let mut builder = hep(name, host).interface(interface);
            for address in addresses {
                builder = builder.ip(address);
            }
            for port in ports {
                builder = builder.port(port);
            }
            let change = |value: &mut model::HostEndpoint| (value.labels, value.profiles) = (labels, profiles);
            builder.with(change).build()
        })
}

fn any_selector() -> impl Strategy<Value = &'static str> {
    select(vec![
        "all()",
        "!all()",
        "global()",
        "has(a)",
        "!has(a)",
        "a == '1'",
        "a != '1'",
        "b in {'1', '2'}",
        "b in {}",
        "b not in {'1'}",
        "has(a) && b == '2'",
        "has(c) && !has(b)",
        "a == '1' || c == '2'",
        "a == '1' || !has(c)",
        "!(a == '2' && has(b))",
        "c starts with '1'",
        "pcns.x == '1'",
        "has(pcns.x) && a contains ''",
    ])
}

fn any_rule() -> impl Strategy<Value = String> {
    let side = prop_oneof![
        2 => Just(String::new()),
        4 => any_selector().prop_map(|text| format!("- {text}")),
        2 => any_selector().prop_map(|text| format!("-not {text}")),
        2 => (any_selector(), any_selector()).prop_map(|(p, n)| format!("- {p} @-not {n}")),
        1 => any_selector().prop_map(|text| format!("- {text} @-ports http,80")),
        2 => any_selector().prop_map(|text| format!("- {text} @-ports http,dns @-not-ports 53,dns")),
        1 => Just("-not-ports http".to_owned()),
        1 => Just("-nets 10.0.0.0/8,fd00::/8 @-not-nets 10.0.0.1/32".to_owned()),
        1 => Just("-service n/web".to_owned()),
    ];
    // "@" stands for the word of the side; "- " begins a plain selector.
    let on = |word: &'static str| {
        move |text: String| match text.as_str() {
            "" => String::new(),
            text => format!("@{text}").replace('@', word).replace(&format!("{word}- "), &format!("{word} ")),
        }
    };
    (
        select(vec!["allow", "deny", "pass", "log"]),
        select(vec!["", "tcp", "udp", "protocol 132", "v6", "icmp icmp-type 8,0"]),
        side.clone().prop_map(on("from")),
        side.prop_map(on("to")),
    )
        .prop_map(|(action, protocol, from, to)| format!("{action} {protocol} {from} {to}"))
}

fn any_policy() -> impl Strategy<Value = Update> {
    let key = select(vec!["gnp/a", "gnp/a-b", "gnp/a1", "np/n/a", "np/m/a", "sgnp/a"]);
    let rules = || prop::collection::vec(any_rule(), 0..3);
    (
        key,
        any_selector(),
        select(vec!["default", "t1", "t2"]),
        select(vec![None, Some(1.0), Some(1.5), Some(0.0), Some(-0.0), Some(-3.0)]),
        (prop::bool::weighted(0.8), prop::bool::weighted(0.8), prop::bool::weighted(0.1), prop::bool::weighted(0.1)),
        (prop::bool::weighted(0.1), prop::bool::weighted(0.4)),
        rules(),
        rules(),
    )
        .prop_map(
            |(
                key,
                selector,
                tier,
                order,
                (ingress, egress, untracked, pre_dnat),
                (always, forward),
                inbound,
                outbound,
            )| {
                let rules = |texts: Vec<String>| texts.iter().map(|text| rule(text)).collect();
                policy(key)
                    .selector(selector)
                    .tier(tier)
                    .with(|policy| {
                        policy.order = order;
                        policy.ingress = ingress;
                        policy.egress = egress;
                        policy.do_not_track = untracked;
                        policy.pre_dnat = pre_dnat;
                        policy.always_needed = always;
                        policy.apply_on_forward = forward;
                        policy.inbound = rules(inbound);
                        policy.outbound = rules(outbound);
                    })
                    .build()
            },
        )
}

fn any_tier() -> impl Strategy<Value = Update> {
    let order = select(vec![None, Some(1.0), Some(2.0), Some(0.0), Some(-0.0)]);
    (select(vec!["default", "t1", "t2"]), order, any::<bool>()).prop_map(|(name, order, pass)| tier(name, order, pass))
}

fn any_profile_labels() -> impl Strategy<Value = Update> {
    let labels = prop_oneof![
        any_labels(),
        select(vec!["1", "2"]).prop_map(|value| [("pcns.x", value), ("a", value)].into_iter().collect()),
    ];
    (select(vec!["p", "q", "kns.n"]), labels)
        .prop_map(|(name, labels)| Update::ProfileLabels(name.into(), Some(std::sync::Arc::new(labels))))
}

fn any_profile_rules() -> impl Strategy<Value = Update> {
    let name = select(vec!["p", "q", "kns.n", "projectcalico-default-allow"]);
    (name, prop::collection::vec(any_rule(), 0..2)).prop_map(|(name, rules)| {
        let rules: Vec<&str> = rules.iter().map(String::as_str).collect();
        build::profile_rules(name, &rules, &[])
    })
}

fn any_network_set() -> impl Strategy<Value = Update> {
    let nets = subsequence(vec!["0.0.0.0/0", "::/0", "10.0.0.0/8", "10.0.0.1/32", "fd00::1/128", "128.0.0.0/1"], 0..4);
    let labels = select(vec!["", "a=1", "a=2,b=2", "c=1"]);
    (select(vec!["global", "n/set"]), labels, nets).prop_map(|(key, labels, nets)| network_set(key, labels, &nets))
}
