//! Measures how long a cold start of the graph takes, with all input decoded beforehand, and the series
//! of the label index.
//!
//! `cargo run --release -p graph --example snapshot -- <workload>`; for memory see the example `heap`.
#![allow(clippy::print_stdout, clippy::disallowed_methods, reason = "a measurement needs a clock and an output")]

use std::hint::black_box;
use std::time::{Duration, Instant};

use graph::{Graph, MemberIndex};
use model::Update;
use testkit::workload::{self, label_index};

fn main() {
    let name = std::env::args().nth(1).unwrap_or_else(|| "tag-policies".to_owned());
    if name == "label-index" {
        label_index_series();
        return;
    }
    let Some(updates) = workload::by_name(&name) else {
        println!("workloads: label-index {}", workload::NAMES.join(" "));
        return;
    };
    let updates: Vec<Update> = updates.collect();
    let mut graph = Graph::new(workload::HOST.into());
    let started = Instant::now();
    updates.into_iter().for_each(|update| graph.apply(update));
    let applied = started.elapsed();
    let batch = graph.take_batch();
    let took = started.elapsed();
    let members: usize = batch.sets_created.values().map(|set| set.members.len()).sum();
    println!(
        "{name}: apply {applied:?}, with batch {took:?}; sets {}, policies {}, profiles {}, endpoints {}, members {members}",
        batch.sets_created.len(),
        batch.policies.len(),
        batch.profiles.len(),
        batch.endpoints.len(),
    );
    println!("{:#?}", black_box(&graph).stats());
}

/// The operations of one series, each timed.
#[derive(Default)]
struct Series(Vec<Duration>);

impl Series {
    fn run(&mut self, operation: impl FnOnce()) {
        let started = Instant::now();
        operation();
        self.0.push(started.elapsed());
    }

    fn report(mut self, name: &str) {
        let mean = self.0.iter().sum::<Duration>() / self.0.len().max(1) as u32;
        self.0.sort_unstable();
        let at = |part: usize| self.0.get(self.0.len() * part / 100).copied().unwrap_or_default();
        println!("{name}: mean {mean:?}, median {:?}, p99 {:?}", at(50), at(99));
    }
}

fn label_index_series() {
    for sets in [10, 100, 1_000, 10_000] {
        let mut index = MemberIndex::default();
        for i in 0..sets {
            index.need(i, &label_index::update_selector(i));
            index.announce(i);
        }
        let input: Vec<_> = (0..20_000).map(label_index::endpoint).collect();
        let mut series = Series::default();
        for (key, value) in &input {
            series.run(|| {
                index.on_endpoint(key, Some(value));
                assert_eq!(index.changes().count(), 1);
            });
        }
        series.report(&format!("WorkloadUpdate{sets}Sels"));
    }
    for endpoints in [100, 1_000, 10_000, 100_000] {
        let mut index = with_endpoints(endpoints);
        for i in 0..label_index::PARENT_SETS {
            index.need(i, &label_index::parent_selector(i));
            index.announce(i);
        }
        let mut series = Series::default();
        for n in 0..20_000 {
            let (name, labels) = (label_index::namespace(n), label_index::parent_labels(n));
            series.run(|| {
                index.on_profile_labels(&name, Some(&labels));
                assert_eq!(index.changes().count(), usize::from(n < label_index::PARENT_SETS.min(endpoints)));
            });
        }
        series.report(&format!("ParentUpdates{endpoints}"));
    }
    for endpoints in [100, 1_000, 10_000, 100_000] {
        let mut index = with_endpoints(endpoints);
        let (mut all, mut none) = (Series::default(), Series::default());
        let (mut first_all, mut first_none) = (Series::default(), Series::default());
        for n in 0..200 {
            let selector = label_index::update_selector(n % 10);
            selector.id();
            let series = match (n % 10, n < 10) {
                (1, true) => &mut first_all,
                (1, false) => &mut all,
                (_, true) => &mut first_none,
                (_, false) => &mut none,
            };
            series.run(|| {
                index.need(n, &selector);
                black_box(index.announce(n));
            });
        }
        first_all.report(&format!("SelectorUpdates{endpoints}, new selector, all match"));
        first_none.report(&format!("SelectorUpdates{endpoints}, new selector, none matches"));
        all.report(&format!("SelectorUpdates{endpoints}, known selector, all match"));
        none.report(&format!("SelectorUpdates{endpoints}, known selector, none matches"));
    }
}

fn with_endpoints(count: u32) -> MemberIndex {
    let mut index = MemberIndex::default();
    for (key, value) in (0..count).map(label_index::endpoint) {
        index.on_endpoint(&key, Some(&value));
    }
    index
}
