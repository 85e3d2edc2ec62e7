//! Laws of the whole graph, over random histories.
//!
//! `FELIX_HISTORIES=1000000` asks for that many, which `make histories` does.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};

use graph::{Batch, Graph};
use model::Update;
use testkit::build::absent;
use testkit::history::{Features, HOST, Histories, Step};
use testkit::naive;
use testkit::replay::Known;
use testkit::world::Dice;

/// Whatever happened and however it was cut into batches, the batches add up to what a full calculation
/// from the present facts gives (I1), keeping every promise on the way (F-3, F-7, F-8).
#[test]
fn the_batches_add_up_to_the_present_state() {
    for_all_histories(|history| {
        let mut graph = Graph::new(HOST.into());
        let mut known = Known::default();
        let mut batches: u64 = 0;
        for (index, (update, cut)) in history.iter().enumerate() {
            graph.apply(update.clone());
            let is_last = index + 1 == history.len();
            if *cut || is_last {
                known.replay(graph.take_batch())?;
                batches += 1;
                // The slow twin is asked for every other batch.
                if is_last || batches.is_multiple_of(2) {
                    let done = history.iter().take(index + 1).map(|(update, _)| update.clone());
                    let expected = naive::evaluate(HOST, &naive::facts(done));
                    if known != expected {
                        return Err(format!("after step {index}:\n{known:#?}\nshould be\n{expected:#?}"));
                    }
                }
            }
        }
        Ok(())
    });
}

/// Deleting everything leaves nothing, in the consumer or in any stage, whatever the order.
#[test]
fn nothing_is_left_after_everything_is_deleted() {
    for_all_histories(|history| {
        let (mut graph, batches) = run(history);
        let mut known = Known::default();
        for batch in batches {
            known.replay(batch)?;
        }
        let mut facts: Vec<Update> = facts(history);
        shuffle(&mut facts, history.len() as u64);
        for (index, fact) in facts.iter().enumerate() {
            graph.apply(absent(fact));
            if index % 3 == 0 {
                known.replay(graph.take_batch())?;
            }
        }
        known.replay(graph.take_batch())?;
        if known != Known::default() {
            return Err(format!("the consumer still knows {known:#?}"));
        }
        if !graph.is_empty() {
            return Err(format!("left over: {graph:#?}"));
        }
        Ok(())
    });
}

/// Two runs over one history give the same batches, byte for byte (I10).
#[test]
fn two_runs_give_equal_batches() {
    for_all_histories(|history| {
        let [first, second] = [run(history).1, run(history).1];
        // Batches are ordered throughout, so equality and equality of the bytes are one.
        if first != second || (history.len() % 16 == 0 && format!("{first:?}") != format!("{second:?}")) {
            return Err(format!("{first:#?}\nis not\n{second:#?}"));
        }
        Ok(())
    });
}

/// A full start in any order of keys gives the same first batch.
#[test]
fn the_order_of_arrival_does_not_matter() {
    for_all_histories(|history| {
        let facts = facts(history);
        let mut shuffled = facts.clone();
        shuffle(&mut shuffled, history.len() as u64);
        let [first, second] = [first_batch(facts), first_batch(shuffled)];
        if first == second { Ok(()) } else { Err(format!("{first:#?}\nis not\n{second:#?}")) }
    });
}

/// What is stored already changes nothing (A-7, M-31), in whatever order it is said again; neither does
/// the deletion of what is not there.
#[test]
fn repeating_all_facts_emits_nothing() {
    for_all_histories(|history| {
        let (mut graph, _) = run(history);
        let mut again = facts(history);
        let present: BTreeSet<_> = again.iter().map(Update::key).collect();
        again
            .extend(history.iter().map(|(update, _)| absent(update)).filter(|update| !present.contains(&update.key())));
        shuffle(&mut again, history.len() as u64);
        again.into_iter().for_each(|update| graph.apply(update));
        let batch = graph.take_batch();
        if batch.is_empty() { Ok(()) } else { Err(format!("{batch:#?}")) }
    });
}

/// In how many of a thousand histories at least each of these occurs.
const EXPECTED: [(&str, u64); 22] = [
    ("ICMP types", 300),
    ("named ports", 300),
    ("negated named ports", 100),
    ("named and numeric ports", 200),
    ("negated ports", 150),
    ("more than 15 ports", 150),
    ("negated selector alone", 300),
    ("negated selector beside a selector", 300),
    ("several CIDR blocks", 200),
    ("negated CIDR blocks", 200),
    ("CIDR blocks of both families", 150),
    ("services", 150),
    ("endpoints of both families", 300),
    ("local host endpoints", 300),
    ("remote host endpoints", 300),
    ("overlapping networks", 150),
    ("profiles listed twice", 300),
    ("an address twice in a class", 15),
    ("an address in two classes", 300),
    ("several tiers, one with pass", 150),
    // Of the history itself.
    ("several batches", 600),
    ("an object that comes back", 400),
];

#[test]
fn the_histories_hold_what_matters_often_enough() {
    let histories = Histories::default();
    let mut features = Features::default();
    (0..1000).for_each(|seed| features.note(&histories.history(seed)));
    let rare: Vec<_> = EXPECTED
        .iter()
        .map(|(name, least)| (name, features.of(name), least))
        .filter(|(_, n, least)| n < least)
        .collect();
    assert!(rare.is_empty(), "too rare (name, found, wanted): {rare:#?} of {features:#?}");
}

/// The graph at the end of a history, and its batches.
fn run(history: &[Step]) -> (Graph, Vec<Batch>) {
    let mut graph = Graph::new(HOST.into());
    let mut batches = Vec::new();
    for (update, cut) in history {
        graph.apply(update.clone());
        if *cut {
            batches.push(graph.take_batch());
        }
    }
    batches.push(graph.take_batch());
    (graph, batches)
}

fn first_batch(updates: Vec<Update>) -> Batch {
    let mut graph = Graph::new(HOST.into());
    updates.into_iter().for_each(|update| graph.apply(update));
    graph.take_batch()
}

fn facts(history: &[Step]) -> Vec<Update> {
    naive::facts(history.iter().map(|(update, _)| update.clone())).into_values().collect()
}

fn shuffle(updates: &mut [Update], seed: u64) {
    let mut dice = Dice::new(seed);
    for at in (1..updates.len()).rev() {
        updates.swap(at, dice.roll(at as u64 + 1) as usize);
    }
}

/// Checks a law for as many histories as were asked for. One that breaks it is made as short as it can
/// be by leaving out steps, and shown.
#[allow(clippy::disallowed_methods, reason = "how long a test goes on is up to whoever runs it")]
fn for_all_histories(law: fn(&[Step]) -> Result<(), String>) {
    let number = std::env::var("FELIX_HISTORIES").map_or(10_000, |text| text.parse().expect("FELIX_HISTORIES"));
    // A long run is for all processors; an ordinary one shares them with other tests.
    let threads = if number > 100_000 { std::thread::available_parallelism().map_or(1, |n| n.get() as u64) } else { 1 };
    std::thread::scope(|scope| {
        for first in 0..threads {
            scope.spawn(move || {
                let histories = Histories::default();
                for seed in (first..number).step_by(threads as usize) {
                    let history = histories.history(seed);
                    if outcome(law, &history).is_err() {
                        panic!("history {seed} breaks the law; {}", shortest(law, history));
                    }
                }
            });
        }
    });
}

/// A broken promise inside the graph panics; that counts too.
fn outcome(law: fn(&[Step]) -> Result<(), String>, history: &[Step]) -> Result<(), String> {
    catch_unwind(AssertUnwindSafe(|| law(history))).unwrap_or_else(|_| Err("a panic, see above".to_owned()))
}

fn shortest(law: fn(&[Step]) -> Result<(), String>, mut history: Vec<Step>) -> String {
    let mut at = history.len();
    while at > 0 {
        at -= 1;
        let mut shorter = history.clone();
        let (_, cut) = shorter.remove(at);
        // The batch that ended here ends one step earlier.
        if let Some(before) = at.checked_sub(1).and_then(|before| shorter.get_mut(before)) {
            before.1 |= cut;
        }
        if outcome(law, &shorter).is_err() {
            history = shorter;
        }
    }
    let error = outcome(law, &history).err();
    format!("this part of it does: {history:#?}\n{}", error.unwrap_or_default())
}
