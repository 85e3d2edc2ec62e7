//! Measures what small changes cost where much is in force (graph and compiler together), and a cold
//! start of the compiler.
//!
//! `cargo run --release -p compiler --example edit [numbers of endpoints, or none]`
#![allow(clippy::print_stdout, clippy::disallowed_methods, reason = "a measurement needs a clock and an output")]

use std::time::{Duration, Instant};

use compiler::{Compiler, Options, Work};
use graph::Graph;
use model::Update;
use testkit::build::absent;
use testkit::workload::{self, Shape, one_rule_edit};

const POLICIES: u32 = 10_000;
const REPEATS: u32 = 200;

fn main() {
    let mut wanted: Vec<u32> = std::env::args().skip(1).filter_map(|number| number.parse().ok()).collect();
    if std::env::args().len() == 1 {
        wanted = vec![10, 200, 1_000];
    }
    for endpoints in wanted {
        let edits = one_rule_edit(POLICIES, endpoints);
        let (mut graph, mut compiler) = start(edits.start());
        let mut host = (&mut graph, &mut compiler);
        report(endpoints, "one rule of one policy", &mut host, (0..REPEATS).map(|n| edits.edit(n).1));
        let another = edits.another_endpoint();
        let gone = absent(&another);
        let come_and_go = (0..REPEATS).map(|n| if n % 2 == 0 { another.clone() } else { gone.clone() });
        report(endpoints, "one endpoint comes or goes", &mut host, come_and_go);
        let moves = (1..=REPEATS).map(|n| edits.moved_endpoint(n));
        report(endpoints, "other policies for one endpoint", &mut host, moves);
    }
    let (graph, compiler) = start(workload::snapshot(Shape { remote: 0, ..Shape::TAG_POLICIES_250K }));
    println!("{} policies, {:?}", graph.stats().active_policies, compiler.work());
}

/// A graph and a compiler in which everything is in force.
fn start(updates: impl Iterator<Item = Update>) -> (Graph, Compiler) {
    let mut graph = Graph::new(workload::HOST.into());
    updates.for_each(|update| graph.apply(update));
    let begin = Instant::now();
    let batch = graph.take_batch();
    let took = begin.elapsed();
    let mut compiler = Compiler::new(Options::default());
    let begin = Instant::now();
    drop(compiler.compile(&batch));
    println!("start: batch {took:?}, compile {:?}", begin.elapsed());
    (graph, compiler)
}

fn report(endpoints: u32, what: &str, host: &mut (&mut Graph, &mut Compiler), updates: impl Iterator<Item = Update>) {
    let (graph, compiler) = host;
    let updates: Vec<Update> = updates.collect();
    let before = compiler.work();
    let mut times: Vec<(Duration, Duration)> = Vec::new();
    for update in updates {
        let begin = Instant::now();
        graph.apply(update);
        let batch = graph.take_batch();
        let calculated = begin.elapsed();
        let changes = compiler.compile(&batch);
        times.push((calculated, begin.elapsed() - calculated));
        drop(changes);
    }
    let count = times.len() as u64;
    let Work { chains_rendered, chains_told } = compiler.work();
    let median = |part: fn(&(Duration, Duration)) -> Duration| {
        let mut parts: Vec<Duration> = times.iter().map(part).collect();
        parts.sort_unstable();
        parts.get(parts.len() / 2).copied().unwrap_or_default()
    };
    println!(
        "{POLICIES} policies, {endpoints} endpoints, {what}: graph {:?}, compiler {:?}; chains rendered {:.1}, told {:.1}",
        median(|(graph, _)| *graph),
        median(|(_, compiler)| *compiler),
        (chains_rendered - before.chains_rendered) as f64 / count as f64,
        (chains_told - before.chains_told) as f64 / count as f64,
    );
}
