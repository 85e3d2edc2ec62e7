//! Cold start of the calculation graph with 250,000 remote endpoints and 10,000 policies (performance.md 2.1).
//!
//! Each measurement runs in a process of its own. Time is taken with all input decoded beforehand, memory with the
//! input generated on the way in and dropped, so that what stays is the graph's.

use std::time::Instant;

use anyhow::ensure;
use clap::ValueEnum;
use compiler::Compiler;
use graph::{Batch, Graph};
use model::Update;
use testkit::workload::{self, Shape};

use crate::results::Results;

const SHAPE: Shape = Shape::TAG_POLICIES_250K;

/// What a child process measures.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Measure {
    Time,
    Memory,
}

impl Measure {
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Time => "time",
            Self::Memory => "memory",
        }
    }
}

pub(crate) fn measure(what: Measure, results: &mut Results) -> anyhow::Result<()> {
    match what {
        Measure::Time => time(results),
        Measure::Memory => memory(results),
    }
}

fn time(results: &mut Results) -> anyhow::Result<()> {
    let updates: Vec<Update> = workload::snapshot(SHAPE).collect();
    let mut graph = Graph::new(workload::HOST.into());
    let start = Instant::now();
    updates.into_iter().for_each(|update| graph.apply(update));
    let batch = graph.take_batch();
    results.time("snapshot/250k/calculate", start.elapsed());
    check(&batch)?;
    let mut compiler = Compiler::new(compiler::Options::default());
    let start = Instant::now();
    let (changes, _) = compiler.compile(&batch);
    results.time("snapshot/250k/compile", start.elapsed());
    drop(changes);

    let keys: Vec<_> = workload::snapshot_local_keys(SHAPE).collect();
    let start = Instant::now();
    for key in keys {
        graph.apply(Update::WorkloadEndpoint(key, None));
    }
    drop(graph.take_batch());
    results.time("snapshot/250k/delete-local", start.elapsed());
    Ok(())
}

fn memory(results: &mut Results) -> anyhow::Result<()> {
    let before = resident()?;
    let mut graph = Graph::new(workload::HOST.into());
    workload::snapshot(SHAPE).for_each(|update| graph.apply(update));
    check(&graph.take_batch())?;
    // The allocator returns freed pages after a moment.
    std::thread::sleep(std::time::Duration::from_secs(1));
    let used = resident()?.saturating_sub(before) as f64;
    results.record("snapshot/250k/resident", "MiB", used / 1024.0);
    results.record(
        "snapshot/250k/resident-per-endpoint",
        "bytes",
        used * 1024.0 / f64::from(SHAPE.remote + SHAPE.local),
    );
    drop(graph);
    Ok(())
}

/// The figures that every implementation of this workload must arrive at.
fn check(batch: &Batch) -> anyhow::Result<()> {
    let counts = [batch.sets_created.len(), batch.policies.len(), batch.profiles.len(), batch.endpoints.len()];
    // 200 local endpoints in 100 namespaces, each with a profile.
    ensure!(counts[..2] == [29, 10_000], "sets and policies: {counts:?} instead of 29 and 10,000");
    ensure!(counts[3] == 200, "endpoints: {counts:?} instead of 200");
    Ok(())
}

/// Resident set of this process in KiB.
fn resident() -> anyhow::Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or_default();
    Ok(line.split_whitespace().next().unwrap_or_default().parse()?)
}
