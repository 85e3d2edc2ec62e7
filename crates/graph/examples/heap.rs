//! Measures what the graph keeps after a cold start: bytes that it has from the allocator, with the
//! input generated on the fly and dropped, and what is left after everything has been deleted again.
//!
//! `cargo run --release -p graph --example heap -- <workload>`; for time see the example `snapshot`.
#![allow(clippy::print_stdout, clippy::disallowed_methods, reason = "a measurement needs an output")]

use std::alloc::System;
use std::collections::BTreeMap;
use std::hint::black_box;

use graph::{Graph, MemberIndex};
use model::Update;
use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};
use testkit::build::{absent, wep};
use testkit::workload;

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

fn main() {
    let name = std::env::args().nth(1).unwrap_or_else(|| "tag-policies".to_owned());
    if workload::by_name(&name).is_none() {
        println!("workloads: {}", workload::NAMES.join(" "));
        return;
    }
    index_alone(&name);
    let mut graph = Graph::new(workload::HOST.into());
    let start = held();
    let mut by_kind: BTreeMap<&str, i64> = BTreeMap::new();
    let mut updates = workload::by_name(&name).into_iter().flatten();
    loop {
        // Including the making of the update, which the graph consumes.
        let before = held();
        let Some(update) = updates.next() else { break };
        let kind = kind(&update);
        graph.apply(update);
        *by_kind.entry(kind).or_default() += held() - before;
    }
    drop(updates);
    for (kind, bytes) in by_kind {
        println!("{name}: {kind} {:.1} MB", megabytes(bytes));
    }
    println!("{name}: {:.1} MB before the first batch", megabytes(held() - start));
    let batch = graph.take_batch();
    println!("{name}: {:.1} MB with the first batch", megabytes(held() - start));
    drop(batch);
    let live = held() - start;
    println!("{name}: {:.1} MB live, {} objects", megabytes(live), graph.stats().objects);

    relabel(&mut graph);

    for update in workload::by_name(&name).into_iter().flatten() {
        graph.apply(absent(&update));
    }
    drop(graph.take_batch());
    let left = held() - start;
    println!(
        "{name}: {:.3} MB left after deleting everything ({:.2} %)",
        megabytes(left),
        100.0 * left as f64 / live as f64
    );
    black_box(&graph);
}

/// What the index keeps of the objects and profile labels, while no set is needed.
fn index_alone(name: &str) {
    let start = held();
    let mut index = MemberIndex::default();
    for update in workload::by_name(name).into_iter().flatten() {
        match update {
            Update::WorkloadEndpoint(key, value) => index.on_endpoint(&key, value.as_deref()),
            Update::HostEndpoint(name, value) => index.on_host_endpoint(&name, value.as_deref()),
            Update::NetworkSet(name, value) => index.on_network_set(&name, value.as_deref()),
            Update::ProfileLabels(name, value) => index.on_profile_labels(&name, value.as_deref()),
            Update::Policy(..)
            | Update::Tier(..)
            | Update::ProfileRules(..)
            | Update::Link(..)
            | Update::Config(..)
            | Update::Ready(_) => (),
        }
    }
    let (bytes, objects) = (held() - start, index.objects());
    let each = bytes / objects.max(1) as i64;
    println!("{name}: index alone {:.1} MB, {objects} objects of {each} B", megabytes(bytes));
    println!("{name}: {} classes", index.stats().classes);
}

const fn kind(update: &Update) -> &'static str {
    match update {
        Update::WorkloadEndpoint(..) => "endpoints",
        Update::Policy(..) => "policies",
        Update::ProfileLabels(..) => "labels of profiles",
        Update::NetworkSet(..) => "network sets",
        Update::HostEndpoint(..) => "host endpoints",
        Update::Tier(..) | Update::ProfileRules(..) | Update::Link(..) | Update::Config(..) | Update::Ready(_) => {
            "others"
        }
    }
}

/// Label changes of one remote endpoint that concern no set: after some rounds, none of them should
/// call the allocator.
fn relabel(graph: &mut Graph) {
    let value = |n: u32| {
        wep("remotehost/k8s/relabelled/eth0")
            .label(&format!("version={n}"))
            .label("one-in-10=none")
            .ip("10.99.99.99")
            .build()
    };
    for n in 0..1_000 {
        graph.apply(value(n));
    }
    let mut calls = 0;
    for n in 1_000..2_000 {
        let update = value(n);
        let before = ALLOCATOR.stats();
        graph.apply(update);
        let after = ALLOCATOR.stats();
        calls += after.allocations + after.reallocations - before.allocations - before.reallocations;
    }
    println!("{calls} allocations in 1,000 label changes that change no set");
    graph.apply(absent(&value(0)));
}

/// Bytes from the allocator that have not been given back.
fn held() -> i64 {
    let stats = ALLOCATOR.stats();
    stats.bytes_allocated as i64 - stats.bytes_deallocated as i64
}

fn megabytes(bytes: i64) -> f64 {
    bytes as f64 / 1e6
}
