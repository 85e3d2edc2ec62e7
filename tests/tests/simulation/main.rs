//! The whole core of the agent on a simulated kernel: datastore events, interfaces that come and go, operations that
//! fail, others that interfere, and crashes at any step. Afterwards the kernel is a function of the datastore, and on
//! the way nothing was open that should have been closed.
//!
//! Bars: U1.b (a restart writes nothing), U5.d (a restart adds nothing), U20.c (nothing is written before everything
//! is known); and what users.md calls self-healing.
//!
//! One seed is one world and one history, on every machine. `FELIX_SIMULATION=n` asks for `n` events,
//! `FELIX_SIMULATION_SEED=n` for the world of one seed, both for worlds from that seed on; `make simulate` runs a
//! million.

#![allow(clippy::unwrap_used, clippy::panic, reason = "helper functions of tests fail the test that uses them")]
#![allow(clippy::print_stderr, reason = "a long run says how far it is")]

mod agent;
mod probes;
mod run;

use std::time::{Duration, Instant};

use run::{EVENTS, Outcome, run};

/// Events of the ordinary run, beside which faults come.
const ORDINARY: u64 = 15_000;

#[allow(clippy::disallowed_methods, reason = "how much is simulated is the caller's choice")]
fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{variable} is a number")))
}

#[test]
fn whatever_goes_wrong_the_kernel_ends_as_the_datastore_says_and_is_never_open_in_between() {
    let seed = number("FELIX_SIMULATION_SEED");
    let wanted = number("FELIX_SIMULATION").unwrap_or(if seed.is_some() { 1 } else { ORDINARY });
    let started = Instant::now();
    let mut said = started;
    let mut total = Outcome::default();
    let mut failures = Vec::new();
    for at in seed.unwrap_or(0).. {
        match run(at, EVENTS) {
            Ok(outcome) => total.add(&outcome),
            Err(failure) => failures.push(failure),
        }
        let done = total.events;
        if said.elapsed() > Duration::from_secs(10) {
            said = Instant::now();
            eprintln!("{done} events after {:?}, {} failed: {total:?}", started.elapsed(), failures.len());
        }
        if done >= wanted || failures.len() >= 5 {
            let rate = done as f64 / started.elapsed().as_secs_f64();
            eprintln!("{done} events, {rate:.0} a second, seeds up to {at}: {total:?}");
            break;
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n\n"));
    if wanted >= ORDINARY {
        // Nothing of what makes this worth running is missing.
        let Outcome { events, faults, edits, crashes, steps: _, applies, judged, trace: _ } = total;
        let seen =
            [faults, edits * 6, crashes * 8, applies, judged.forbidden / 8, judged.strictly / 8, judged.mixed * 256];
        assert!(seen.into_iter().all(|count| count > events / 4), "{total:?}");
    }
}

/// 102: somebody changes a table when it has had its turn in the apply, and nothing is ever refreshed.
/// 300: a new agent finds a route of others on a workload interface, and nothing is ever refreshed.
#[test]
fn worlds_in_which_something_was_found_once_go_well() {
    for seed in [102, 300] {
        run(seed, EVENTS).unwrap_or_else(|failure| panic!("{failure}"));
    }
}

#[test]
fn one_seed_is_one_history() {
    let mut traces = Vec::new();
    for seed in [1, 2, 3, 4, 5] {
        let (first, second) = (run(seed, 200), run(seed, 200));
        let trace =
            |outcome: &Result<Outcome, String>| outcome.as_ref().map(|outcome| outcome.trace).map_err(Clone::clone);
        assert_eq!(trace(&first), trace(&second), "seed {seed}");
        traces.push(trace(&first));
    }
    traces.dedup();
    assert_eq!(traces.len(), 5, "different seeds are different histories");
}

impl Outcome {
    fn add(&mut self, other: &Self) {
        let Self { events, faults, edits, crashes, steps, applies, judged, trace } = other;
        self.events += events;
        self.faults += faults;
        self.edits += edits;
        self.crashes += crashes;
        self.steps += steps;
        self.applies += applies;
        self.judged.packets += judged.packets;
        self.judged.forbidden += judged.forbidden;
        self.judged.strictly += judged.strictly;
        self.judged.mixed += judged.mixed;
        self.trace ^= trace;
    }
}
