//! Measures a cold start of the graph: time with all input decoded beforehand, memory with the input
//! generated on the fly and dropped.
//!
//! `cargo run --release -p graph --example snapshot -- <workload> <time|memory>`
#![allow(clippy::print_stdout, clippy::disallowed_methods, reason = "a measurement needs a clock and an output")]

use std::hint::black_box;
use std::time::Instant;

use graph::{Batch, Graph};
use model::Update;
use testkit::workload::{self, Shape};

fn main() {
    let mut arguments = std::env::args().skip(1);
    let name = arguments.next().unwrap_or_else(|| "tag-policies".to_owned());
    let mode = arguments.next().unwrap_or_else(|| "time".to_owned());
    let updates: Box<dyn Iterator<Item = Update>> = match name.as_str() {
        "tag-policies" => Box::new(workload::snapshot(Shape::TAG_POLICIES_250K)),
        "tag-policies-v4" => Box::new(workload::snapshot(Shape { ipv4: true, ..Shape::TAG_POLICIES_250K })),
        "network-sets-1k" => Box::new(workload::snapshot(Shape::NETWORK_SETS_1K)),
        "network-sets-10k" => Box::new(workload::snapshot(Shape::NETWORK_SETS_10K)),
        "isolated-1k" => Box::new(workload::isolated_customers(1_000)),
        "isolated-10k" => Box::new(workload::isolated_customers(10_000)),
        "isolated-100k" => Box::new(workload::isolated_customers(100_000)),
        other => {
            println!("unknown workload {other}");
            return;
        }
    };
    let mut graph = Graph::new(workload::HOST.into());
    if mode == "memory" {
        let before = resident();
        updates.for_each(|update| graph.apply(update));
        let batch = graph.take_batch();
        report(&name, &batch);
        println!("resident with batch: {} kB", resident() - before);
        drop(batch);
        println!("resident after batch: {} kB", resident() - before);
    } else {
        let updates: Vec<Update> = updates.collect();
        let started = Instant::now();
        updates.into_iter().for_each(|update| graph.apply(update));
        let applied = started.elapsed();
        let batch = graph.take_batch();
        let took = started.elapsed();
        report(&name, &batch);
        println!("apply {applied:?}, with batch {took:?}");
    }
    println!("{:#?}", black_box(&graph).stats());
}

fn report(name: &str, batch: &Batch) {
    println!(
        "{name}: sets {}, policies {}, profiles {}, endpoints {}, members {}",
        batch.sets_created.len(),
        batch.policies.len(),
        batch.profiles.len(),
        batch.endpoints.len(),
        batch.sets_created.values().map(|set| set.members.len()).sum::<usize>(),
    );
}

/// Resident set of this process in kB.
fn resident() -> i64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap_or_default();
    line.split_whitespace().nth(1).and_then(|number| number.parse().ok()).unwrap_or_default()
}
