//! The parts of a run, in order, and what is written at its end.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, ensure};
use clap::Parser;
use serde_json::{Value, json};

use crate::graph_runs::WORKLOADS;
use crate::results::Results;
use crate::{bars, enforce, etcd, floor};

/// Operations of each workload of the graph, each in a process of its own (performance.md 2.7: at least five).
const OPERATIONS: usize = 5;

/// Measures the agent beside the kernel's floor and the reference's figures, and writes one JSON file.
///
/// Parts: `floor` (what the kernel and its tools allow), `etcd` (a write and its event), `graph` (cold starts of the
/// calculation graph: time, live heap, resident memory; `graph/IsolatedCustomers1k` is one of them), `label-index`
/// (selectors to members alone), `relabel` (one label change among 250,000 endpoints), `decode` (bytes to objects),
/// `cold-start` (bytes to batch), `small` (selectors, keys), `enforce` (etcd write to rule in force).
#[derive(Debug, Parser)]
pub struct Arguments {
    /// Where the results go.
    #[arg(long, default_value = "target/bench.json")]
    pub output: PathBuf,
    /// The agent's binary; by default `calico-felix` beside this program.
    #[arg(long)]
    pub agent: Option<PathBuf>,
    /// Measurements per series of the end-to-end part.
    #[arg(long, default_value_t = 50)]
    pub rounds: u16,
    /// Only the parts whose name contains this text.
    #[arg(long, default_value = "")]
    pub only: String,
    /// Used by the program itself: make one measurement in this process and print it.
    #[arg(long, hide = true)]
    pub child: Option<String>,
}

/// Makes all measurements that are asked for.
///
/// # Errors
///
/// If something cannot be measured, or does not do what is measured.
pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let mut results = Results::default();
    let wanted = |part: &str| part.contains(&arguments.only);
    let this = std::env::current_exe()?;
    let mut any = false;
    if wanted("floor") {
        any = true;
        eprintln!("felix-bench: floor of the kernel and its tools …");
        floor::spawn(100, &mut results)?;
        for variant in ["legacy", "nft"] {
            floor::tables(variant, 1000, 50, &mut results)?;
        }
    }
    if wanted("etcd") {
        any = true;
        eprintln!("felix-bench: etcd …");
        testkit::netns::in_new_netns(|| etcd::measure(200, &mut results))?;
    }
    let children = Children { timing: this.clone(), counting: this.with_file_name("felix-bench-heap") };
    for workload in WORKLOADS.iter().filter(|workload| wanted(&format!("graph/{}", workload.name))) {
        any = true;
        eprintln!("felix-bench: {} …", workload.name);
        for _ in 0..OPERATIONS {
            children.time(&format!("time/{}", workload.name), &mut results)?;
        }
        children.time(&format!("resident/{}", workload.name), &mut results)?;
        children.count(&format!("heap/{}", workload.name), &mut results)?;
    }
    for (part, times, counts) in [
        ("label-index", OPERATIONS, false),
        ("relabel", OPERATIONS, true),
        ("decode", 1, true),
        ("cold-start", OPERATIONS, false),
        ("small", 1, false),
    ] {
        if wanted(part) {
            any = true;
            eprintln!("felix-bench: {part} …");
            for _ in 0..times {
                children.time(part, &mut results)?;
            }
            if counts {
                children.count(part, &mut results)?;
            }
        }
    }
    if wanted("enforce") {
        any = true;
        let agent = arguments.agent.clone().unwrap_or_else(|| this.with_file_name("calico-felix"));
        ensure!(agent.exists(), "no agent at {}: build it first (`cargo build --release -p agent`)", agent.display());
        for variant in ["legacy", "nft"] {
            eprintln!("felix-bench: etcd write to rule in force, {variant} …");
            enforce::measure(&agent, variant, 1000, arguments.rounds, &mut results)?;
        }
    }
    ensure!(any, "no part has {:?} in its name; --help lists them", arguments.only);
    for variant in ["legacy", "nft"] {
        results.ratio(
            format!("enforce/{variant}/write-to-packet-1000 : held-open rewrite"),
            &format!("enforce/{variant}/write-to-packet-1000"),
            &format!("floor/{variant}/rewrite-chain-held-open-1000"),
        );
        results.ratio(
            format!("enforce/{variant}/write-to-packet-1000 : spawned rewrite"),
            &format!("enforce/{variant}/write-to-packet-1000"),
            &format!("floor/{variant}/rewrite-chain-spawn-1000"),
        );
    }
    write(&arguments.output, &results.document(&machine()))
}

/// The two programs that measure one thing each time they are started.
struct Children {
    timing: PathBuf,
    counting: PathBuf,
}

impl Children {
    fn time(&self, child: &str, results: &mut Results) -> anyhow::Result<()> {
        merge(Command::new(&self.timing).args(["--child", child]), results)
    }

    fn count(&self, child: &str, results: &mut Results) -> anyhow::Result<()> {
        ensure!(
            self.counting.exists(),
            "no {}: build it first (`cargo build --release -p felix-benches --bins`)",
            self.counting.display()
        );
        merge(Command::new(&self.counting).arg(child), results)
    }
}

fn merge(command: &mut Command, results: &mut Results) -> anyhow::Result<()> {
    let output = command.output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr).trim());
    results.merge(&serde_json::from_slice(&output.stdout)?)
}

fn write(path: &Path, document: &Value) -> anyhow::Result<()> {
    if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        std::fs::create_dir_all(folder)?;
    }
    std::fs::write(path, format!("{document:#}\n")).with_context(|| path.display().to_string())?;
    for part in ["results", "ratios"] {
        for (name, value) in document[part].as_object().into_iter().flatten() {
            match value.as_f64() {
                Some(ratio) => println!("{name}: {ratio:.2}"),
                None => println!(
                    "{name}: {:.2} {} (min {:.2}, p99 {:.2}, n {})",
                    value["median"].as_f64().unwrap_or_default(),
                    value["unit"].as_str().unwrap_or_default(),
                    value["min"].as_f64().unwrap_or_default(),
                    value["p99"].as_f64().unwrap_or_default(),
                    value["n"]
                ),
            }
        }
    }
    for line in bars::lines(&document["comparisons"]) {
        println!("{line}");
    }
    println!("written to {}", path.display());
    Ok(())
}

/// What the figures were measured on.
fn machine() -> Value {
    let first_line = |program: &str, argument: &str| {
        Command::new(program)
            .arg(argument)
            .output()
            .ok()
            .and_then(|output| String::from_utf8_lossy(&output.stdout).lines().next().map(str::to_owned))
    };
    json!({
        "kernel": std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim(),
        "cpus": std::thread::available_parallelism().map_or(0, std::num::NonZero::get),
        "load": std::fs::read_to_string("/proc/loadavg").unwrap_or_default().trim(),
        "iptables": first_line("iptables-legacy", "--version"),
        "ipset": first_line("ipset", "--version"),
        "etcd": first_line("etcd", "--version"),
    })
}
