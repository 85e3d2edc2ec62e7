//! Counts bytes and calls of the allocator; started by `felix-bench`, which tells what to measure.
#![allow(clippy::print_stderr, reason = "a command-line tool speaks to its user")]

use std::alloc::System;
use std::process::ExitCode;

use felix_benches::Allocator;
use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

fn main() -> ExitCode {
    let allocator = Allocator {
        held: || {
            let stats = ALLOCATOR.stats();
            stats.bytes_allocated as i64 - stats.bytes_deallocated as i64
        },
        calls: || {
            let stats = ALLOCATOR.stats();
            (stats.allocations + stats.reallocations) as u64
        },
    };
    let child = std::env::args().nth(1).unwrap_or_default();
    match felix_benches::run_child(&child, Some(&allocator)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("felix-bench-heap {child}: {error:#}");
            ExitCode::FAILURE
        }
    }
}
