//! `kill -9` at random moments, under load: no packet of the allowed streams is lost, none of the forbidden ones
//! arrives, and the next start brings the kernel to what etcd says (bars U7.b, U5.d and U20.a; I5).
//!
//! The ordinary run kills [`ORDINARY`] times with each variant; `FELIX_KILLS` (`make kills`) says how often instead.
//! All random choices follow from a seed, which a failure prints; the moments follow from it as far as the machine is
//! as fast as before.
#![allow(clippy::unwrap_used, reason = "a test that meets something unexpected fails")]
#![allow(clippy::print_stdout, reason = "what was measured is for whoever asks with --nocapture")]

use std::time::{Duration, Instant};

use felix_tests::agent::{Agent, Variant, end_to_end};
use felix_tests::bed::{Bed, Host, Vm};
use felix_tests::data::{PORTS_UP, content, dual_stack};
use felix_tests::kernel::Kernel;
use felix_tests::knobs::Knobs;
use felix_tests::table::{become_as_expected, table};
use felix_tests::traffic::{Outcome, Pair, Traffic};
use model::Family;

/// Kills in the ordinary run, with each variant.
const ORDINARY: usize = 20;

/// How long an agent may take to bring the kernel to what etcd says, with everything else that runs beside the test.
const PATIENCE: Duration = Duration::from_secs(60);

/// What passes compute-1 in both directions, whatever form the objects of [`Knobs`] have.
const ALLOWED: &[Pair] = &[(Vm::A1, Vm::A2), (Vm::A2, Vm::A1)];
const FORBIDDEN: &[Pair] = &[(Vm::A1, Vm::B1), (Vm::B2, Vm::A1)];

/// Longest time under load before a kill, and longest life of an agent that is killed while it starts.
const LOAD: u64 = 600;
const YOUTH: u64 = 400;

#[test]
fn kills_at_random_moments_under_load_lose_nothing_and_leak_nothing_legacy() {
    kills(Variant::Legacy);
}

#[test]
fn kills_at_random_moments_under_load_lose_nothing_and_leak_nothing_nft() {
    kills(Variant::Nft);
}

fn kills(variant: Variant) {
    if !end_to_end() {
        return;
    }
    let kills = std::env::var("FELIX_KILLS").map_or(ORDINARY, |text| text.parse().unwrap());
    let seed = std::env::var("FELIX_SEED").map_or(0x6b69_6c6c, |text| text.parse().unwrap());
    let content = dual_stack(&content(PORTS_UP).unwrap()).unwrap();
    let bed = Bed::new(&content).unwrap();
    bed.store().load(&content).unwrap();
    let [first, second] = Host::BOTH.map(|host| bed.start_agent(host, variant).unwrap());
    for family in Family::BOTH {
        become_as_expected(&bed, family, &table(), PATIENCE).unwrap_or_else(|error| {
            panic!("{error:#}\n{}\n{}", first.log().unwrap(), second.log().unwrap());
        });
    }

    let mut run = Run {
        bed: &bed,
        variant,
        dice: fastrand::Rng::with_seed(seed),
        knobs: Knobs::new(&content).unwrap(),
        base: Kernel::read(bed.host(Host::Compute1), variant).unwrap(),
        limit: (0, 0),
        largest: (0, 0),
    };
    run.find_limit();
    let traffic = Traffic::start(&bed, ALLOWED, FORBIDDEN).unwrap();
    let mut agent = first;
    let mut killed = 0;
    let mut slowest = Duration::ZERO;
    while killed < kills {
        run.load(LOAD);
        let mut log = agent.kill().unwrap();
        killed += 1;
        run.look();
        agent = bed.start_agent(Host::Compute1, variant).unwrap();
        // Some die again before they are done with their first batch.
        while killed < kills && run.dice.u8(..3) == 0 {
            run.load(YOUTH);
            log = agent.kill().unwrap();
            killed += 1;
            run.look();
            agent = bed.start_agent(Host::Compute1, variant).unwrap();
        }
        let began = Instant::now();
        run.converge(&agent, &log, &format!("after kill {killed}, seed {seed}"));
        slowest = slowest.max(began.elapsed());
        traffic.converse().unwrap();
    }
    let Outcome { losses, leaks, packets } = traffic.finish().unwrap();
    let log = agent.stop().unwrap();
    assert_eq!(losses, [""; 0], "seed {seed}\n{log}");
    assert_eq!(leaks, [""; 0], "seed {seed}\n{log}");
    println!(
        "{variant:?}: {killed} kills, {packets} packets, slowest convergence {slowest:?}, most chains and rules {:?} of {:?}",
        run.largest, run.limit
    );
}

struct Run<'a> {
    bed: &'a Bed,
    variant: Variant,
    dice: fastrand::Rng,
    knobs: Knobs,
    /// The kernel as it has to be when every object has its first form.
    base: Kernel,
    /// Chains and rules when every object has its largest form.
    limit: (usize, usize),
    /// Most chains and rules that were seen after a kill.
    largest: (usize, usize),
}

impl Run<'_> {
    /// Reads the kernel; while somebody writes, the tools may fail for a while.
    fn kernel(&self) -> Kernel {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match Kernel::read(self.bed.host(Host::Compute1), self.variant) {
                Ok(kernel) => return kernel,
                Err(error) => assert!(Instant::now() < deadline, "{error:#}"),
            }
        }
    }

    /// Learns how many chains and rules the largest forms of all objects need.
    fn find_limit(&mut self) {
        self.knobs.all(self.bed.store()).unwrap();
        let deadline = Instant::now() + PATIENCE;
        let mut before = self.base.clone();
        loop {
            std::thread::sleep(Duration::from_millis(500));
            let kernel = self.kernel();
            if kernel.differences(&before).is_empty() && !kernel.differences(&self.base).is_empty() {
                self.limit = kernel.sizes();
                break;
            }
            assert!(Instant::now() < deadline, "the kernel does not come to rest");
            before = kernel;
        }
        self.knobs.reset(self.bed.store()).unwrap();
        loop {
            let differences = self.base.differences(&self.kernel());
            if differences.is_empty() {
                return;
            }
            assert!(Instant::now() < deadline, "not as before:\n{}", differences.join("\n"));
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Changes objects without a pause worth mentioning, for up to so many milliseconds.
    fn load(&mut self, longest: u64) {
        let end = Instant::now() + Duration::from_millis(self.dice.u64(..longest));
        while Instant::now() < end {
            self.knobs.turn(self.bed.store(), &mut self.dice).unwrap();
            let pause = Duration::from_millis(self.dice.u64(..8));
            std::thread::sleep(pause.min(end.saturating_duration_since(Instant::now())));
        }
    }

    /// Looks at what a killed agent has left: never more than all objects together could need (U5.d).
    fn look(&mut self) {
        let (chains, rules) = self.kernel().sizes();
        self.largest = (self.largest.0.max(chains), self.largest.1.max(rules));
        let (most_chains, most_rules) = self.limit;
        assert!(chains <= most_chains, "{chains} chains where {most_chains} are the most that is wanted");
        assert!(rules <= most_rules, "{rules} rules where {most_rules} are the most that is wanted");
    }

    /// Gives every object its first form and waits until the kernel is as it was at first, down to the last set.
    fn converge(&mut self, agent: &Agent, log_before: &str, when: &str) {
        self.knobs.reset(self.bed.store()).unwrap();
        let deadline = Instant::now() + PATIENCE;
        loop {
            let differences = self.base.differences(&self.kernel());
            if differences.is_empty() {
                return;
            }
            let log = agent.log().unwrap();
            assert!(
                Instant::now() < deadline,
                "{when}: not as before:\n{}\n\nlog:\n{log}\n\nlog of the agent before:\n{log_before}",
                differences.join("\n")
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}
