//! The measurements, in one library because two programs make them: `felix-bench` with the agent's allocator, for
//! times and resident memory, and `felix-bench-heap` with one that counts, for bytes and calls.
//!
//! Whatever is measured in memory runs in a process of its own, started by `felix-bench`; so a measurement is never
//! warm from the one before.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a command-line tool speaks to its user")]

mod bars;
mod burst;
mod child;
mod decode;
mod edit;
mod etcd;
mod floor;
mod foreign;
mod goals;
mod graph_runs;
mod guests;
mod idle;
mod label_index;
mod member;
mod million;
mod parts;
mod rawset;
mod relabel;
mod results;
mod startup;
mod unused;
mod usage;
mod world;

pub use child::{Allocator, run as run_child};
pub use parts::{Arguments, run};
