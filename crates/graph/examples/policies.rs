//! Measures what policies and profiles cost in the graph: bytes of live heap each, with the input dropped,
//! and what is left when all have gone.
//!
//! `cargo run --release -p graph --example policies`
#![allow(clippy::print_stdout, clippy::disallowed_methods, reason = "a measurement needs a clock and an output")]

use std::alloc::System;
use std::time::{Duration, Instant};

use graph::Graph;
use model::Update;
use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};
use testkit::workload::{self, Shape};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

fn main() {
    let tags = Shape { remote: 0, local: 0, tag_policies: 10_000, network_sets: 0, ipv4: false };
    measure("tag policy, inactive", || workload::snapshot(tags), is_policy);
    measure("tag policy, active", || workload::snapshot(Shape { local: 200, ..tags }), is_policy);
    measure("customer policy", || workload::isolated_customers(100_000), is_policy);
    let is_profile: fn(&Update) -> bool =
        |update| matches!(update, Update::ProfileRules(..) | Update::ProfileLabels(..));
    measure("customer profile with labels", || workload::isolated_customers(100_000), is_profile);
    measure(
        "customer profile, rules only",
        || workload::isolated_customers(100_000),
        |update| matches!(update, Update::ProfileRules(..)),
    );
}

fn is_policy(update: &Update) -> bool {
    matches!(update, Update::Policy(..))
}

/// What the graph holds with the objects of a workload that count, and without them.
fn measure<I: Iterator<Item = Update>>(name: &str, updates: impl Fn() -> I, counts: fn(&Update) -> bool) {
    let is_present = |update: &Update| {
        counts(update)
            || matches!(update, Update::WorkloadEndpoint(key, _) if &*key.host == workload::HOST && name.ends_with(", active"))
    };
    let mut graph = Graph::new(workload::HOST.into());
    let mut number = 0;
    let mut took = Duration::ZERO;
    for update in updates().filter(|update| is_present(update) && !counts(update)) {
        graph.apply(update);
    }
    drop(graph.take_batch());
    let before = live();
    for update in updates().filter(counts) {
        number += 1;
        let begin = Instant::now();
        graph.apply(update);
        took += begin.elapsed();
    }
    let begin = Instant::now();
    let batch = graph.take_batch();
    let batching = begin.elapsed();
    drop(batch);
    let full = live();
    for update in updates().filter(counts) {
        graph.apply(testkit::build::absent(&update));
    }
    drop(graph.take_batch());
    println!(
        "{name}: {:.1} bytes each of {number}; {:.1} % of them left behind; {:?} each, batch {batching:?}",
        (full - before) as f64 / f64::from(number),
        (live() - before) as f64 * 100.0 / (full - before) as f64,
        took / number,
    );
}

fn live() -> i64 {
    let stats = ALLOCATOR.stats();
    stats.bytes_allocated as i64 - stats.bytes_deallocated as i64
}
