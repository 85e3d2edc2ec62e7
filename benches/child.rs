//! What one process measures: the name of a measurement in, a list of figures out.

use anyhow::bail;

use crate::results::Results;
use crate::{decode, graph_runs, label_index, relabel};

/// How to ask an allocator that counts.
#[derive(Clone, Copy, Debug)]
pub struct Allocator {
    /// Bytes that were asked for and not given back.
    pub held: fn() -> i64,
    /// Allocations and reallocations so far.
    pub calls: fn() -> u64,
}

/// Makes one measurement and prints it. With an allocator that counts, measures bytes and calls; otherwise times.
///
/// # Errors
///
/// If there is no such measurement, or what was measured is not what it should be.
pub fn run(child: &str, allocator: Option<&Allocator>) -> anyhow::Result<()> {
    let mut results = Results::default();
    let results_ref = &mut results;
    match (child.split_once('/').unwrap_or((child, "")), allocator) {
        (("time", workload), None) => graph_runs::time(workload, results_ref)?,
        (("resident", workload), None) => graph_runs::resident(workload, results_ref)?,
        (("heap", workload), Some(allocator)) => graph_runs::heap(workload, *allocator, results_ref)?,
        (("label-index", ""), None) => label_index::measure(results_ref)?,
        (("relabel", ""), None) => relabel::time(results_ref)?,
        (("relabel", ""), Some(allocator)) => relabel::calls(*allocator, results_ref)?,
        (("decode", ""), None) => decode::time(results_ref)?,
        (("decode", ""), Some(allocator)) => decode::calls(*allocator, results_ref)?,
        (("cold-start", ""), None) => decode::cold_start(results_ref)?,
        (("small", ""), None) => decode::small(results_ref)?,
        ((_, _), _) => bail!("there is no such measurement"),
    }
    println!("{}", results.as_measurements());
    Ok(())
}
