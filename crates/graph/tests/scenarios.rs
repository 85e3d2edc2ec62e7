//! Runs the scenario files and everything they expand to.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use graph::Graph;
use testkit::naive;
use testkit::replay::Known;
use testkit::scenario::{Scenario, Stop};

macro_rules! scenarios {
    ($($name:ident,)*) => {
        $(
            #[test]
            fn $name() {
                run(stringify!($name), include_str!(concat!("scenarios/", stringify!($name), ".txt")));
            }
        )*

        const FILES: &[(&str, &str)] =
            &[$((stringify!($name), include_str!(concat!("scenarios/", stringify!($name), ".txt")))),*];

        #[test]
        fn every_scenario_file_is_run() {
            let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/scenarios");
            let mut files: Vec<String> = std::fs::read_dir(folder)
                .unwrap()
                .map(|file| file.unwrap().path().file_stem().unwrap().to_str().unwrap().to_owned())
                .collect();
            files.sort();
            let mut names = vec![$(stringify!($name).to_owned()),*];
            names.sort();
            assert_eq!(files, names);
        }
    };
}

scenarios! {
    security_group,
    labels_and_profiles,
    tiers,
    named_ports,
    negation_and_services,
    moving_endpoints,
    contested_interface,
    network_sets,
    host_endpoints,
    policy_order,
    tier_order,
    missing_tiers,
    directions,
    inheritance,
    shared_addresses,
    overlapping_networks,
    set_lifetime,
    missing_profiles,
    activity,
    net_results,
    worked_example,
    rule_sets,
    host_forward,
}

fn run(name: &str, text: &str) {
    let scenario = Scenario::parse(name, text);
    assert!(scenario.states.len() > 1, "{name} has too few states to be expanded");
    assert!(scenario.states.iter().all(|state| state.expected.is_some()), "{name} does not say what it expects");
    scenario.expand().iter().for_each(check);
}

/// Two scenarios on one host: what one does must not disturb what the other knows.
#[test]
fn scenarios_without_common_objects_run_interleaved() {
    let scenarios: Vec<Scenario> = FILES.iter().map(|(name, text)| Scenario::parse(name, text)).collect();
    let mut pairs = 0;
    for (at, first) in scenarios.iter().enumerate() {
        for second in scenarios.iter().skip(at + 1) {
            if let Some(both) = first.interleaved(second) {
                pairs += 1;
                both.cuts_and_keys().iter().for_each(check);
            }
        }
    }
    assert!(pairs >= 20, "only {pairs} pairs have no object in common");
}

/// The only place here that calls the graph.
fn check(scenario: &Scenario) {
    let mut graph = Graph::new(scenario.host.as_str().into());
    let mut known = Known::default();
    for Stop { place, updates, facts, state, is_quiet } in scenario.stops() {
        updates.into_iter().for_each(|update| graph.apply(update));
        let batch = graph.take_batch();
        assert!(!is_quiet || batch.is_empty(), "{place}: news where nothing is new: {batch:#?}");
        known.replay(batch).unwrap_or_else(|error| panic!("{place}: {error}"));
        if let Some(expected) = state.and_then(|state| state.expected_lines()) {
            let got = state.map(|state| state.render(&known)).unwrap_or_default();
            assert_eq!(got.join("\n"), expected.join("\n"), "{place}");
        }
        assert_eq!(known, naive::evaluate(&scenario.host, &facts), "{place}, compared with the naive evaluator");
    }
    assert_eq!(known, Known::default(), "{}: left over", scenario.name);
    assert!(graph.is_empty(), "{}: left over: {graph:#?}", scenario.name);
}
