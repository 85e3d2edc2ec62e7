//! Runs the scenario files and everything they expand to.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use graph::Graph;
use testkit::naive::{self, Facts};
use testkit::replay::Known;
use testkit::scenario::Scenario;

macro_rules! scenarios {
    ($($name:ident,)*) => {
        $(
            #[test]
            fn $name() {
                run(stringify!($name), include_str!(concat!("scenarios/", stringify!($name), ".txt")));
            }
        )*

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
}

fn run(name: &str, text: &str) {
    let scenario = Scenario::parse(name, text);
    assert!(scenario.states.len() > 1, "{name} has too few states to be expanded");
    scenario.expand().iter().for_each(check);
}

/// The only place here that calls the graph.
fn check(scenario: &Scenario) {
    let mut graph = Graph::new(scenario.host.as_str().into());
    let mut known = Known::default();
    let mut facts = Facts::new();
    let last = scenario.states.len() - 1;
    for (index, state) in scenario.states.iter().enumerate() {
        let place = format!("{}, state {:?}", scenario.name, state.name);
        for update in scenario.way(&facts, &state.facts) {
            graph.apply(update);
        }
        facts = state.facts.clone();
        if scenario.squash && index != last {
            continue;
        }
        known.replay(graph.take_batch()).unwrap_or_else(|error| panic!("{place}: {error}"));
        assert_eq!(state.render(&known).join("\n"), state.expected_lines().join("\n"), "{place}");
        assert_eq!(known, naive::evaluate(&scenario.host, &facts), "{place}, compared with the naive evaluator");
    }
    for update in scenario.way(&facts, &Facts::new()) {
        graph.apply(update);
    }
    known.replay(graph.take_batch()).unwrap_or_else(|error| panic!("{}, at the end: {error}", scenario.name));
    assert_eq!(known, Known::default(), "{}: left over", scenario.name);
    assert!(graph.is_empty(), "{}: left over: {graph:#?}", scenario.name);
}
