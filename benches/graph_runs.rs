//! Cold starts of the calculation graph (performance.md 2.1, 2.2), and what is left when everything has gone again.
//!
//! Time is taken with all input decoded beforehand; memory with the input generated on the way in and dropped, so that
//! what stays is the graph's.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use compiler::Compiler;
use graph::{Batch, Graph};
use model::Update;
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike as _;
use testkit::build::absent;
use testkit::workload::{self, Shape};

use crate::child::Allocator;
use crate::results::Results;

/// A workload under the name of the reference's benchmark.
pub(crate) struct Workload {
    pub(crate) name: &'static str,
    /// Its name in [`workload::by_name`].
    generator: &'static str,
    /// The variant that deletes all local endpoints at the end.
    deleting: Option<(&'static str, Shape)>,
    /// IP sets, policies and messages after the first flush, as the reference's own check says.
    check: [usize; 3],
}

const fn snapshot(
    name: &'static str,
    deleting: &'static str,
    generator: &'static str,
    shape: Shape,
    check: [usize; 3],
) -> Workload {
    Workload { name, generator, deleting: Some((deleting, shape)), check }
}

/// All of them, the largest first.
pub(crate) const WORKLOADS: [Workload; 6] = [
    snapshot(
        "Snapshot200Local250kTotal10000TagPols",
        "SnapshotThenDeleteLocal200Local250kTotal10000TagPols",
        "tag-policies",
        Shape::TAG_POLICIES_250K,
        [29, 10_000, 10_432],
    ),
    snapshot(
        "Snapshot200Local10kTotal1000NetsetPols",
        "SnapshotThenDeleteLocal200Local10kTotal1000NetsetPols",
        "network-sets-1k",
        Shape::NETWORK_SETS_1K,
        [1_000, 1_000, 2_403],
    ),
    snapshot(
        "Snapshot200Local10kTotal10000NetsetPols",
        "SnapshotThenDeleteLocal200Local10kTotal10000NetsetPols",
        "network-sets-10k",
        Shape::NETWORK_SETS_10K,
        [10_000, 10_000, 20_403],
    ),
    isolated("IsolatedCustomers1k", "isolated-1k", 1_403),
    isolated("IsolatedCustomers10k", "isolated-10k", 10_403),
    isolated("IsolatedCustomers100k", "isolated-100k", 100_403),
];

const fn isolated(name: &'static str, generator: &'static str, messages: usize) -> Workload {
    Workload { name, generator, deleting: None, check: [100, 100, messages] }
}

/// Messages of the reference that are about none of the objects: the configuration, the status of the datastore and
/// the first in-sync.
const OTHER_MESSAGES: usize = 3;

impl Workload {
    fn named(name: &str) -> anyhow::Result<&'static Self> {
        WORKLOADS.iter().find(|workload| workload.name == name).context("there is no such workload")
    }

    fn updates(&self) -> anyhow::Result<Box<dyn Iterator<Item = Update>>> {
        workload::by_name(self.generator).context("there is no such generator")
    }

    /// The figures that every implementation of the workload must arrive at.
    ///
    /// The reference counts messages: one for each policy, IP set, profile and local endpoint, one for *every*
    /// namespace, and three others. A batch of ours holds the first four; of namespaces it says nothing, because
    /// nothing depends on them, so they are counted where they enter, as profiles with labels.
    fn check(&self, batch: &Batch, namespaces: usize) -> anyhow::Result<()> {
        let Batch { sets_created, policies, profiles, endpoints, .. } = batch;
        let messages =
            policies.len() + sets_created.len() + profiles.len() + endpoints.len() + namespaces + OTHER_MESSAGES;
        let found = [sets_created.len(), policies.len(), messages];
        ensure!(
            found == self.check,
            "{}: sets, policies, messages are {found:?} instead of {:?}",
            self.name,
            self.check
        );
        Ok(())
    }
}

fn is_namespace(update: &Update) -> bool {
    matches!(update, Update::ProfileLabels(_, Some(_)))
}

/// One operation, and the deletion of its variant.
pub(crate) fn time(name: &str, results: &mut Results) -> anyhow::Result<()> {
    let workload = Workload::named(name)?;
    let updates: Vec<Update> = workload.updates()?.collect();
    let namespaces = updates.iter().filter(|update| is_namespace(update)).count();
    let mut graph = Graph::new(workload::HOST.into());
    let (start, cpu) = (Instant::now(), cpu_time()?);
    updates.into_iter().for_each(|update| graph.apply(update));
    let batch = graph.take_batch();
    let took = start.elapsed();
    // On a machine with other work this says more than the clock on the wall.
    results.time(format!("graph/{name}/cpu"), cpu_time()?.saturating_sub(cpu));
    results.time(format!("graph/{name}/time"), took);
    workload.check(&batch, namespaces)?;

    let mut compiler = Compiler::new(compiler::Options::default());
    let start = Instant::now();
    let (changes, _) = compiler.compile(&batch);
    results.time(format!("compiler/{name}/time"), start.elapsed());
    drop((changes, batch));

    if let Some((deleting, shape)) = workload.deleting {
        let keys: Vec<_> = workload::snapshot_local_keys(shape).collect();
        let start = Instant::now();
        for key in keys {
            graph.apply(Update::WorkloadEndpoint(key, None));
        }
        let batch = graph.take_batch();
        let deletion = start.elapsed();
        results.time(format!("graph/{deleting}/time"), took + deletion);
        results.time(format!("graph/{deleting}/deletion-alone"), deletion);
        let [sets, policies, _] = workload.check;
        let removed = [batch.sets_removed.len(), batch.policies.len(), batch.endpoints.len()];
        ensure!(removed == [sets, policies, 200], "{deleting}: {removed:?} sets, policies and endpoints are removed");
        ensure!(batch.policies.values().all(Option::is_none), "{deleting}: a policy stays");
    }
    Ok(())
}

/// What this thread has used so far, of the system's time too.
fn cpu_time() -> anyhow::Result<Duration> {
    let usage = getrusage(UsageWho::RUSAGE_THREAD)?;
    let micros = [usage.user_time(), usage.system_time()].map(|time| time.num_microseconds());
    Ok(Duration::from_micros(micros.iter().sum::<i64>().try_into()?))
}

/// Resident memory with the allocator of the agent.
pub(crate) fn resident(name: &str, results: &mut Results) -> anyhow::Result<()> {
    let workload = Workload::named(name)?;
    let before = status("VmRSS:")?;
    let mut graph = Graph::new(workload::HOST.into());
    let mut namespaces = 0;
    for update in workload.updates()? {
        namespaces += usize::from(is_namespace(&update));
        graph.apply(update);
    }
    workload.check(&graph.take_batch(), namespaces)?;
    // The allocator returns freed pages after a moment.
    std::thread::sleep(Duration::from_secs(1));
    let megabytes = |kib: u64| kib.saturating_sub(before) as f64 * 1024.0 / 1e6;
    results.record(format!("graph/{name}/resident"), "MB", megabytes(status("VmRSS:")?));
    results.record(format!("graph/{name}/resident-peak"), "MB", megabytes(status("VmHWM:")?));
    let objects = graph.stats().objects;
    results.record(
        format!("graph/{name}/resident-per-object"),
        "bytes",
        megabytes(status("VmRSS:")?) * 1e6 / objects as f64,
    );
    Ok(())
}

/// A line of `/proc/self/status`, in KiB.
fn status(field: &str) -> anyhow::Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix(field)).unwrap_or_default();
    line.split_whitespace().next().unwrap_or_default().parse().context("no such line in /proc/self/status")
}

/// Bytes that the graph has asked for, with the input dropped; and what is left when everything has been deleted.
pub(crate) fn heap(name: &str, allocator: Allocator, results: &mut Results) -> anyhow::Result<()> {
    let workload = Workload::named(name)?;
    let held = allocator.held;
    let mut graph = Graph::new(workload::HOST.into());
    let (start, calls) = (held(), (allocator.calls)());
    let (mut namespaces, mut peak, mut making) = (0, 0, 0);
    let mut updates = workload.updates()?;
    loop {
        let before = (allocator.calls)();
        let Some(update) = updates.next() else { break };
        making += (allocator.calls)() - before;
        namespaces += usize::from(is_namespace(&update));
        graph.apply(update);
        peak = peak.max(held() - start);
    }
    drop(updates);
    let batch = graph.take_batch();
    peak = peak.max(held() - start);
    workload.check(&batch, namespaces)?;
    drop(batch);
    let live = held() - start;
    let megabytes = |bytes: i64| bytes as f64 / 1e6;
    results.record(format!("graph/{name}/live-heap"), "MB", megabytes(live));
    results.record(format!("graph/{name}/peak-heap"), "MB", megabytes(peak));
    results.record(format!("graph/{name}/allocations"), "calls", ((allocator.calls)() - calls - making) as f64);

    for update in workload.updates()? {
        graph.apply(absent(&update));
    }
    drop(graph.take_batch());
    ensure!(graph.is_empty(), "{name}: a stage holds something after everything was deleted");
    let left = held() - start;
    results.record(format!("graph/{name}/heap-after-deletion"), "%", 100.0 * left as f64 / peak as f64);
    Ok(())
}
