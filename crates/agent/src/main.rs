//! The per-host agent. Read [`agent::bootstrap`] next: it is the map of the process.

use std::process::ExitCode;

#[cfg(feature = "mimalloc")]
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    agent::main(std::env::args_os())
}
