//! The binary: reads, builds, connects, waits.
//!
//! [`main`] reads what is local, [`bootstrap`] builds the parts in order, [`main_loop`] is what
//! the main thread does. The work is done by two more threads: [`graph_thread`] and [`apply_thread`].
//! [`exit`] says why the process ends.
//!
//! Invariant: no lock is shared between the threads; what crosses is owned values (ARCHITECTURE.md).

pub mod bootstrap;
pub mod graph_thread;

mod apply_thread;
mod arguments;
mod config_watch;
mod exit;
mod local;
mod main_loop;
mod options;
mod parts;
mod reports;
mod signals;
mod unplugged;

use std::ffi::OsString;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

use anyhow::Context as _;

use arguments::Parsed;
use exit::Ended;

/// Runs the agent until it ends; the value is the exit code of the process.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let arguments = match arguments::parse(arguments) {
        Parsed::Run(arguments) => arguments,
        Parsed::Answered(code) => return code,
    };
    parts::log_panics();
    match catch_unwind(AssertUnwindSafe(|| run(&arguments))) {
        Ok(Ok(ended)) => ExitCode::from(ended.code()),
        Ok(Err(error)) => {
            // The log may not exist yet, or be turned off; standard error goes to the journal.
            #[allow(clippy::print_stderr, reason = "last words before the exit")]
            {
                eprintln!("calico-felix: {error:#}");
            }
            ExitCode::FAILURE
        }
        Err(_) => ExitCode::from(Ended::Panicked("main").code()),
    }
}

fn run(arguments: &arguments::Arguments) -> anyhow::Result<Ended> {
    let local = local::read(arguments)?;
    let log = telemetry::log::start(options::early_log(&local)).context("setting up the log")?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("starting the runtime")?;
    let ended = runtime.block_on(bootstrap::run(local, log));
    // Whatever still runs on it must not delay the end.
    runtime.shutdown_background();
    ended
}
