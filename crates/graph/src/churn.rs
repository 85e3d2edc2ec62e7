//! Test: what comes and goes leaves nothing behind in a graph that is never empty.
//!
//! [`Graph::is_empty`] cannot tell this: some stages drop a container as soon as nothing is in use, and
//! with it whatever was forgotten there.

use std::collections::BTreeMap;

use model::Update;
use testkit::build::absent;
use testkit::history::{HOST, Histories};
use testkit::naive;
use testkit::world::Dice;

use super::*;

/// More than a thousand, as most are short.
const HISTORIES: u64 = 3_000;

/// How much every container of every stage holds.
fn sizes(graph: &Graph) -> BTreeMap<&'static str, usize> {
    let Graph {
        local,
        policy_selectors,
        records,
        active,
        profiles,
        order,
        references,
        index,
        endpoints,
        hosts,
        gather,
        scratch: _,
        flow: _,
    } = graph;
    let found = [
        &local.sizes()[..],
        &policy_selectors.sizes(),
        &records.sizes(),
        &active.sizes(),
        &profiles.sizes(),
        &order.sizes(),
        &references.sizes(),
        &index.known_names().sizes(),
        &[("objects", index.objects()), ("classes of objects", index.stats().classes as usize)],
        &[("selectors of rules", (index.stats().optimized + index.stats().full_scan) as usize)],
        &endpoints.sizes(),
        &hosts.sizes(),
        &gather.sizes(),
    ];
    let sizes: BTreeMap<_, _> = found.iter().copied().flatten().copied().collect();
    assert_eq!(sizes.len(), found.iter().map(|sizes| sizes.len()).sum::<usize>(), "two sizes have one name");
    sizes
}

/// Takes one to three objects that exist at the end of a history, and deletes everything else, in some
/// order: what is left must be what a graph holds that never knew anything else.
#[test]
fn what_was_there_beside_lasting_objects_leaves_nothing_behind() {
    let histories = Histories::default();
    let mut lasting_policies = 0;
    for seed in 0..HISTORIES {
        let history = histories.history(seed);
        let dice = &mut Dice::new(seed);
        let facts = naive::facts(history.iter().map(|(update, _)| update.clone()));
        let mut passing: Vec<Update> = facts.into_values().collect();
        let mut lasting = Vec::new();
        while !passing.is_empty() && lasting.len() < 1 + seed as usize % 3 {
            lasting.push(passing.swap_remove(dice.roll(passing.len() as u64) as usize));
        }
        lasting_policies += lasting.iter().filter(|fact| matches!(fact, Update::Policy(..))).count();

        let mut graph = Graph::new(HOST.into());
        // They are there from the beginning, or come and change with the rest.
        let from_the_start = dice.one_in(2);
        let is_lasting = |update: &Update| lasting.iter().any(|fact| fact.key() == update.key());
        if from_the_start {
            lasting.iter().for_each(|fact| graph.apply(fact.clone()));
        }
        for (update, cut) in history.iter().filter(|(update, _)| !(from_the_start && is_lasting(update))) {
            graph.apply(update.clone());
            if *cut {
                graph.take_batch();
            }
        }
        while !passing.is_empty() {
            graph.apply(absent(&passing.swap_remove(dice.roll(passing.len() as u64) as usize)));
            if dice.one_in(3) {
                graph.take_batch();
            }
        }
        graph.take_batch();

        let mut alone = Graph::new(HOST.into());
        lasting.iter().for_each(|fact| alone.apply(fact.clone()));
        alone.take_batch();
        let (found, wanted) = (sizes(&graph), sizes(&alone));
        let differing: Vec<_> = found.iter().filter(|(name, size)| wanted.get(*name) != Some(size)).collect();
        assert!(
            differing.is_empty(),
            "history {seed} leaves {differing:?} beside {lasting:#?}, which alone have {wanted:?}"
        );
    }
    assert!(lasting_policies > 500, "{lasting_policies}");
}
