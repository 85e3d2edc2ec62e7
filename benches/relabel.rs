//! One label change on a remote endpoint among 250,000, with 10,000 selectors.

use std::time::{Duration, Instant};

use anyhow::ensure;
use graph::Graph;
use model::Update;
use testkit::workload::{self, relabel as input};

use crate::child::Allocator;
use crate::results::Results;

const CHANGES: u32 = 10_000;

/// Changes before the first that counts: buffers and tables grow to their size.
const WARM_UP: u32 = 500_000;

fn filled() -> anyhow::Result<Graph> {
    let mut graph = Graph::new(workload::HOST.into());
    input::all().for_each(|update| graph.apply(update));
    let batch = graph.take_batch();
    let sets = batch.sets_created.len();
    ensure!(sets == input::GROUPS as usize, "{sets} sets instead of {}", input::GROUPS);
    Ok(graph)
}

/// An endpoint that is far from the one before.
fn chosen(change: u32) -> u32 {
    change.wrapping_mul(7_919) % input::ENDPOINTS
}

/// A label that no selector names.
fn quiet(change: u32) -> Update {
    let n = chosen(change);
    input::remote(n, n % input::GROUPS, input::any_version(change ^ n))
}

/// Another group: one set loses a member, one gains it.
fn regrouping(change: u32) -> Update {
    let n = chosen(change);
    input::remote(n, (n + 1) % input::GROUPS, 0)
}

pub(crate) fn time(results: &mut Results) -> anyhow::Result<()> {
    let mut graph = filled()?;
    for (name, change, sets) in
        [("no-set-changes", quiet as fn(u32) -> Update, 0), ("two-sets-change", regrouping as fn(u32) -> Update, 2)]
    {
        let updates: Vec<Update> = (0..CHANGES).map(change).collect();
        let mut took: Vec<Duration> = Vec::with_capacity(updates.len());
        for update in updates {
            let start = Instant::now();
            graph.apply(update);
            let batch = graph.take_batch();
            took.push(start.elapsed());
            ensure!(batch.members.len() == sets, "{name}: {} sets change", batch.members.len());
        }
        took.sort_unstable();
        let at = |share: usize| took.get((took.len() - 1) * share / 100).copied().unwrap_or_default();
        for (what, duration) in [("median", at(50)), ("p99", at(99))] {
            let name = format!("relabel/250k-endpoints-10k-selectors/{name}/{what}");
            results.record(name, "us", duration.as_secs_f64() * 1e6);
        }
    }
    Ok(())
}

pub(crate) fn calls(allocator: Allocator, results: &mut Results) -> anyhow::Result<()> {
    let mut graph = filled()?;
    for change in 0..WARM_UP {
        graph.apply(quiet(change));
    }
    let mut calls = 0;
    for change in WARM_UP..WARM_UP + CHANGES {
        let update = quiet(change);
        let before = (allocator.calls)();
        graph.apply(update);
        calls += (allocator.calls)() - before;
    }
    ensure!(graph.take_batch().is_empty(), "a set has changed");
    results.record(
        "relabel/250k-endpoints-10k-selectors/no-set-changes/allocations",
        "calls",
        calls as f64 / f64::from(CHANGES),
    );
    Ok(())
}
