//! One run of all benchmarks: our figures, the kernel's floor measured in the same run, and their ratios, in one
//! JSON file. `make bench` builds what it needs and calls it. Needs root, etcd, iptables and ipset.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a command-line tool speaks to its user")]

mod enforce;
mod etcd;
mod floor;
mod results;
mod snapshot;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context as _, ensure};
use clap::Parser;
use serde_json::{Value, json};

use results::Results;

/// The agent's allocator, so that memory figures are the agent's.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Measures the agent beside the kernel's floor and writes one JSON file.
#[derive(Debug, Parser)]
struct Arguments {
    /// Where the results go.
    #[arg(long, default_value = "target/bench.json")]
    output: PathBuf,
    /// The agent's binary; by default `calico-felix` beside this program.
    #[arg(long)]
    agent: Option<PathBuf>,
    /// Measurements per series of the end-to-end part.
    #[arg(long, default_value_t = 50)]
    rounds: u16,
    /// Only the parts whose name contains this text: `floor`, `etcd`, `snapshot`, `enforce`.
    #[arg(long, default_value = "")]
    only: String,
    /// Used by the program itself: measure one snapshot in this process and print it.
    #[arg(long, hide = true)]
    snapshot_child: Option<snapshot::Measure>,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("felix-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let mut results = Results::default();
    if let Some(what) = arguments.snapshot_child {
        snapshot::measure(what, &mut results)?;
        println!("{}", results.as_measurements());
        return Ok(());
    }
    let wanted = |part: &str| part.contains(&arguments.only);
    let this = std::env::current_exe()?;
    let agent = arguments.agent.clone().unwrap_or_else(|| this.with_file_name("calico-felix"));
    ensure!(agent.exists(), "no agent at {}: build it first (`cargo build --release -p agent`)", agent.display());

    if wanted("floor") {
        eprintln!("felix-bench: floor of the kernel and its tools …");
        floor::spawn(100, &mut results)?;
        for variant in ["legacy", "nft"] {
            floor::tables(variant, 1000, 50, &mut results)?;
        }
    }
    if wanted("etcd") {
        eprintln!("felix-bench: etcd …");
        testkit::netns::in_new_netns(|| etcd::measure(200, &mut results))?;
    }
    if wanted("snapshot") {
        eprintln!("felix-bench: snapshot of 250,000 endpoints and 10,000 policies …");
        for what in [snapshot::Measure::Time, snapshot::Measure::Memory].into_iter().cycle().take(6) {
            let output = Command::new(&this).args(["--snapshot-child", what.as_str()]).output()?;
            ensure!(output.status.success(), "snapshot: {}", String::from_utf8_lossy(&output.stderr));
            results.merge(&serde_json::from_slice(&output.stdout)?)?;
        }
    }
    if wanted("enforce") {
        for variant in ["legacy", "nft"] {
            eprintln!("felix-bench: etcd write to rule in force, {variant} …");
            enforce::measure(&agent, variant, 1000, arguments.rounds, &mut results)?;
        }
    }
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
                    "{name}: {} {} (min {}, p99 {}, n {})",
                    value["median"],
                    value["unit"].as_str().unwrap_or(""),
                    value["min"],
                    value["p99"],
                    value["n"]
                ),
            }
        }
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
