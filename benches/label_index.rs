//! The index from selectors to members alone (performance.md 2.3), with the operation counts of its section 2.8.

use std::time::{Duration, Instant};

use anyhow::ensure;
use graph::MemberIndex;
use testkit::workload::label_index as input;

use crate::results::Results;

/// Times of the operations of one series.
#[derive(Default)]
struct Series(Vec<Duration>);

impl Series {
    fn add<T>(&mut self, operation: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let outcome = operation();
        self.0.push(start.elapsed());
        outcome
    }

    fn report(mut self, name: &str, results: &mut Results) {
        self.0.sort_unstable();
        let mean = self.0.iter().sum::<Duration>().as_secs_f64() / self.0.len().max(1) as f64;
        let at = |share: f64| {
            let index = (self.0.len().saturating_sub(1) as f64 * share).round() as usize;
            self.0.get(index).copied().unwrap_or_default().as_secs_f64()
        };
        for (what, seconds) in [("mean", mean), ("median", at(0.5)), ("p99", at(0.99))] {
            results.record(format!("label-index/{name}/{what}"), "us", seconds * 1e6);
        }
    }
}

pub(crate) fn measure(results: &mut Results) -> anyhow::Result<()> {
    for (sets, operations) in [(10, 20_000), (100, 20_000), (1_000, 20_000), (10_000, 1_000)] {
        workload_updates(sets, operations, results)?;
    }
    for endpoints in [100, 1_000, 10_000, 100_000] {
        parent_updates(endpoints, 20_000, results)?;
    }
    for (endpoints, operations) in [(100, 1_000), (1_000, 1_000), (10_000, 200), (100_000, 50)] {
        selector_updates(endpoints, operations, results)?;
    }
    Ok(())
}

fn workload_updates(sets: u32, operations: u32, results: &mut Results) -> anyhow::Result<()> {
    let mut index = MemberIndex::default();
    for i in 0..sets {
        index.need(i, &input::update_selector(i));
        index.announce(i);
    }
    let endpoints: Vec<_> = (0..operations).map(input::endpoint).collect();
    let mut series = Series::default();
    for (key, value) in &endpoints {
        let changes = series.add(|| {
            index.on_endpoint(key, Some(value));
            index.changes().count()
        });
        ensure!(changes == 1, "a new endpoint changes {changes} sets instead of one");
    }
    series.report(&format!("WorkloadUpdate{sets}Sels"), results);
    Ok(())
}

fn parent_updates(endpoints: u32, operations: u32, results: &mut Results) -> anyhow::Result<()> {
    let mut index = with_endpoints(endpoints);
    for i in 0..input::PARENT_SETS {
        index.need(i, &input::parent_selector(i));
        index.announce(i);
    }
    let profiles: Vec<_> = (0..operations).map(|n| (input::namespace(n), input::parent_labels(n))).collect();
    let mut series = Series::default();
    for (n, (name, labels)) in (0..).zip(&profiles) {
        let changes = series.add(|| {
            index.on_profile_labels(name, Some(labels));
            index.changes().count()
        });
        let wanted = usize::from(n < input::PARENT_SETS.min(endpoints));
        ensure!(changes == wanted, "profile {n} changes {changes} sets instead of {wanted}");
    }
    series.report(&format!("ParentUpdates{endpoints}"), results);
    Ok(())
}

/// One operation in ten matches all endpoints. Operations ten apart have the same selector, which the reference
/// evaluates anew and we know already; so the first of each is reported by itself.
fn selector_updates(endpoints: u32, operations: u32, results: &mut Results) -> anyhow::Result<()> {
    let mut index = with_endpoints(endpoints);
    // Once before the clock runs: what the parts before have left behind is given back meanwhile.
    let warm_up = testkit::build::selector("has(alpha)");
    index.need(operations, &warm_up);
    ensure!(index.announce(operations).is_some_and(|contents| !contents.members.is_empty()), "no members");
    index.unneed(operations);
    let (mut every, mut all, mut none) = (Series::default(), Series::default(), Series::default());
    let (mut first_all, mut first_none) = (Series::default(), Series::default());
    for n in 0..operations {
        // Parsed and named by another part, in the reference too.
        let selector = input::update_selector(n % 10);
        selector.id();
        let members = every.add(|| {
            index.need(n, &selector);
            index.announce(n).map_or(0, |contents| contents.members.len())
        });
        let took = every.0.last().copied().unwrap_or_default();
        let wanted = if n % 10 == 1 { endpoints.min(65_536) as usize } else { 0 };
        ensure!(members == wanted, "operation {n}: {members} members instead of {wanted}");
        let (of_kind, first) = if n % 10 == 1 { (&mut all, &mut first_all) } else { (&mut none, &mut first_none) };
        of_kind.0.push(took);
        if n < 10 {
            first.0.push(took);
        }
    }
    let name = format!("SelectorUpdates{endpoints}");
    every.report(&name, results);
    all.report(&format!("{name}/all-match"), results);
    none.report(&format!("{name}/none-match"), results);
    first_all.report(&format!("{name}/all-match-first"), results);
    first_none.report(&format!("{name}/none-match-first"), results);
    Ok(())
}

fn with_endpoints(count: u32) -> MemberIndex {
    let mut index = MemberIndex::default();
    for (key, value) in (0..count).map(input::endpoint) {
        index.on_endpoint(&key, Some(&value));
    }
    index
}
