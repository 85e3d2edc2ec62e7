//! The parts of a run, in order, and what is written at its end.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use clap::Parser;
use serde_json::{Value, json};

use crate::graph_runs::WORKLOADS;
use crate::results::Results;
use crate::world::Plan;
use crate::{bars, burst, edit, etcd, floor, goals, idle, member, million, startup, unused, usage};

/// Operations of each workload of the graph, each in a process of its own (performance.md 2.7: at least five).
const OPERATIONS: usize = 5;

/// Measures the agent beside the kernel's floor and the reference's figures, and writes one JSON file.
///
/// Parts: `floor` (what the kernel and its tools allow), `etcd` (a write and its event), `graph` (cold starts of the
/// calculation graph: time, live heap, resident memory; `graph/IsolatedCustomers1k` is one of them), `label-index`
/// (selectors to members alone), `relabel` (one label change among 250,000 endpoints), `decode` (bytes to objects),
/// `cold-start` (bytes to batch), `small` (selectors, keys).
///
/// With the agent itself, real etcd and the kernel, each with its floor (the goals of performance.md section 7):
/// `agent/member` (a write to a member in the kernel), `agent/edit` (to a rule in force), `agent/burst` (many local
/// endpoints), `agent/cold` and `agent/warm` (starts), `agent/idle`, `agent/unused-sets`, `agent/million` (one set of a
/// million networks). Where a part has variants, `agent/edit/nft` is one of them.
#[derive(Debug, Parser)]
pub struct Arguments {
    /// Where the results go.
    #[arg(long, default_value = "target/bench.json")]
    pub output: PathBuf,
    /// The agent's binary; by default `calico-felix` beside this program.
    #[arg(long)]
    pub agent: Option<PathBuf>,
    /// How much of the parts with the agent is done: 0.1 is a tenth of the measurements and of the objects in etcd.
    #[arg(long, default_value_t = 1.0)]
    pub share: f64,
    /// How large the table is beside which the agent is measured, where the goal says 10,000.
    #[arg(long, default_value_t = 10_000)]
    pub rules: usize,
    /// How long an idle agent is watched, for each variant and pace.
    #[arg(long, default_value_t = 120)]
    pub idle_seconds: u64,
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
    any |= with_agent(arguments, &this, &mut results)?;
    ensure!(any, "no part has {:?} in its name; --help lists them", arguments.only);
    for (variant, size) in ["legacy", "nft"].into_iter().flat_map(|variant| goals::TABLES.map(|size| (variant, size))) {
        results.ratio(
            format!("edit/{variant}/{size} : held-open rewrite"),
            &format!("edit/{variant}/{size}/put-to-packet"),
            &format!("floor/{variant}/rewrite-chain-held-open-{size}"),
        );
    }
    write(&arguments.output, &results.document(&machine()))
}

/// The parts with the agent itself; returns whether any was asked for.
fn with_agent(arguments: &Arguments, this: &Path, results: &mut Results) -> anyhow::Result<bool> {
    let agent = arguments.agent.clone().unwrap_or_else(|| this.with_file_name("calico-felix"));
    let plan = Plan { agent, share: arguments.share };
    let Arguments { rules, .. } = *arguments;
    let sets = rules / 10;
    let mut any = false;
    let mut wanted = |part: &str| {
        let wanted = part.contains(&arguments.only);
        if wanted {
            any = true;
            eprintln!("felix-bench: {part} (load {:.1}) …", usage::load());
        }
        let agent = &plan.agent;
        ensure!(
            !wanted || agent.exists(),
            "no agent at {}: build it first (`cargo build --release -p agent`)",
            agent.display()
        );
        Ok(wanted)
    };
    if wanted("agent/member")? {
        member::measure(&plan, rules, results)?;
    }
    for variant in ["legacy", "nft"] {
        for size in goals::TABLES.into_iter().filter(|size| *size <= rules) {
            if wanted(&format!("agent/edit/{variant}/{size}"))? {
                edit::measure(&plan, variant, size, results)?;
            }
        }
        if wanted(&format!("agent/burst/{variant}"))? {
            burst::measure(&plan, variant, rules.min(1_000), results)?;
        }
        if wanted(&format!("agent/cold/{variant}"))? {
            startup::cold(&plan, variant, results)?;
        }
        if wanted(&format!("agent/warm/{variant}"))? {
            startup::warm(&plan, variant, rules, sets, results)?;
        }
        if wanted(&format!("agent/unused-sets/{variant}"))? {
            unused::measure(&plan, variant, sets, results)?;
        }
        if wanted(&format!("agent/idle/{variant}"))? {
            idle::measure(&plan, variant, [rules, sets], Duration::from_secs(arguments.idle_seconds), results)?;
        }
    }
    if wanted("agent/million")? {
        million::measure(&plan, results)?;
    }
    Ok(any)
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
