//! One run of all benchmarks: our figures, the kernel's floor measured in the same run, the reference's figures, and
//! their ratios, in one JSON file. `make bench` builds what it needs and calls it. Needs root, etcd, iptables and ipset.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a command-line tool speaks to its user")]

use std::process::ExitCode;

use clap::Parser;

/// The agent's allocator, so that memory figures are the agent's.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let arguments = felix_benches::Arguments::parse();
    let done = match &arguments.child {
        Some(child) => felix_benches::run_child(child, None),
        None => felix_benches::run(&arguments),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("felix-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}
