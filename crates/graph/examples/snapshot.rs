//! Measures how long a cold start of the graph takes, with all input decoded beforehand, the series of
//! the label index, and one label change among 250,000 endpoints and 10,000 selectors.
//!
//! `cargo run --release -p graph --example snapshot -- <workload>`; for memory see the example `heap`.
//! Processor time is given as well, which other work on the machine changes less than the clock.
#![allow(
    clippy::print_stdout,
    clippy::disallowed_methods,
    clippy::wildcard_enum_match_arm,
    reason = "a measurement needs a clock and an output, and looks at some updates only"
)]

use std::hint::black_box;
use std::time::{Duration, Instant};

use graph::{Graph, MemberIndex};
use model::Update;
use testkit::build;
use testkit::workload::{self, Shape, label_index};

/// What the agent has.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() {
    let name = std::env::args().nth(1).unwrap_or_else(|| "tag-policies".to_owned());
    match name.as_str() {
        "label-index" => return label_index_series(),
        "relabel" => return relabel(),
        _ => (),
    }
    let Some(updates) = workload::by_name(&name) else {
        println!("workloads: label-index relabel {}", workload::NAMES.join(" "));
        return;
    };
    let updates: Vec<Update> = updates.collect();
    let mut graph = Graph::new(workload::HOST.into());
    let (started, on_processor) = (Instant::now(), processor_time());
    updates.into_iter().for_each(|update| graph.apply(update));
    let applied = started.elapsed();
    let batch = graph.take_batch();
    let (took, busy) = (started.elapsed(), processor_time() - on_processor);
    let members: usize = batch.sets_created.values().map(|set| set.members.len()).sum();
    println!(
        "{name}: apply {applied:?}, with batch {took:?}, processor time {busy:?}; sets {}, policies {}, profiles {}, endpoints {}, members {members}",
        batch.sets_created.len(),
        batch.policies.len(),
        batch.profiles.len(),
        batch.endpoints.len(),
    );
    println!("{:#?}", black_box(&graph).stats());
}

/// How long this process has been on a processor.
fn processor_time() -> Duration {
    let text = std::fs::read_to_string("/proc/self/schedstat").unwrap_or_default();
    let nanoseconds = text.split_whitespace().next().and_then(|number| number.parse().ok());
    Duration::from_nanos(nanoseconds.unwrap_or_default())
}

/// One label of one remote endpoint changes: so that no set changes, and so that one does.
fn relabel() {
    let mut index = MemberIndex::default();
    let shape = Shape { tag_policies: 0, ..Shape::TAG_POLICIES_250K };
    let mut endpoints = Vec::new();
    for update in workload::snapshot(shape) {
        match update {
            Update::WorkloadEndpoint(key, Some(value)) => {
                index.on_endpoint(&key, Some(&value));
                endpoints.push((key, value));
            }
            Update::ProfileLabels(name, value) => index.on_profile_labels(&name, value.as_deref()),
            _ => (),
        }
    }
    for i in 0..10_000 {
        let selector = format!("has(one-in-10) && group == 'group-{i}'");
        index.need(i, &build::selector(&selector));
        index.announce(i);
    }
    for (name, label) in [("no set changes", "colour"), ("two sets change", "group")] {
        let mut series = Series::default();
        for n in 0..20_000u32 {
            let (key, value) = &endpoints[n.wrapping_mul(2_654_435_761) as usize % endpoints.len()];
            let mut value = value.as_ref().clone();
            let labels = value.labels.iter().map(|(key, value)| (key.clone(), value.clone()));
            value.labels = labels.chain([(label.into(), format!("group-{}", n % 10_000).into())]).collect();
            series.run(|| {
                index.on_endpoint(key, Some(&value));
                black_box(index.changes().count());
            });
        }
        series.report(&format!("one label, {name}"));
    }
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
