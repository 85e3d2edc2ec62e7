//! Packets judged twice: by the compiled program, walked rule by rule as the kernel does, and by a direct
//! reading of policy.md on the stored objects. Whatever history led to a state, both must agree, on the
//! outcome and on the rule that decided.
//!
//! `FELIX_HISTORIES=n` asks for another number of histories.

#![allow(clippy::unwrap_used, clippy::panic, reason = "helper functions of tests fail the test that uses them")]

mod bench;
mod coverage;
mod hazards;

use std::ops::Range;

use bench::{Bench, Probe, options_of};
use coverage::Seen;
use testkit::world::{Dice, Domain};

/// Histories in the ordinary run.
const HISTORIES: u64 = 10_000;

/// Packets after each batch.
const PACKETS: usize = 20;

#[allow(clippy::disallowed_methods, reason = "the number of histories is the caller's choice")]
fn histories() -> u64 {
    std::env::var("FELIX_HISTORIES").map_or(HISTORIES, |text| text.parse().expect("FELIX_HISTORIES is a number"))
}

// Two tests, so that they can share the work of two cores.

#[test]
fn after_any_history_program_and_policy_agree_on_every_packet() {
    compare(0..histories() / 2);
}

#[test]
fn after_any_other_history_program_and_policy_agree_on_every_packet() {
    compare(histories() / 2..histories());
}

fn compare(seeds: Range<u64>) {
    let domain = Domain::small();
    let mut seen = Seen::default();
    for seed in seeds.clone() {
        let mut dice = Dice::new(seed);
        let mut bench = Bench::new(options_of(&mut dice));
        let mut done = Vec::new();
        for batch in domain.history(&mut dice) {
            batch.iter().for_each(|update| seen.update(update));
            bench.apply(&batch).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
            done.extend(batch);
            for _ in 0..PACKETS {
                let probe = Probe::draw(&domain, &mut dice);
                if let Err(error) = bench.judge(&probe, &mut seen) {
                    let cause = bench::smallest_cause(bench.options(), done, &probe);
                    panic!("seed {seed}: {error}\nafter\n{cause}");
                }
            }
        }
    }
    let gaps = seen.gaps(seeds.end - seeds.start);
    assert!(gaps.is_empty(), "not enough of {gaps:#?}\nin {seen:#?}");
}

/// Two runs over one history ask for the same changes (I10), the program does not depend on how the present
/// state came about, and when everything is gone nothing is left of it.
#[test]
fn programs_depend_on_the_present_state_and_on_nothing_else() {
    let domain = Domain::small();
    for seed in 0..histories() {
        let mut dice = Dice::new(seed);
        let options = options_of(&mut dice);
        let bench = || Bench::new(options.clone());
        let (mut first, mut second) = (bench(), bench());
        let mut done = Vec::new();
        for batch in domain.history(&mut dice) {
            assert_eq!(first.apply(&batch).unwrap(), second.apply(&batch).unwrap(), "seed {seed}");
            done.extend(batch);
        }
        let present: Vec<_> = testkit::naive::facts(done).into_values().collect();
        let mut fresh = bench();
        fresh.apply(&present).unwrap();
        assert!(first.kernel.holds_the_same_as(&fresh.kernel), "seed {seed}\n{first:#?}\n{fresh:#?}");

        let nothing: Vec<_> = present.iter().map(testkit::build::absent).collect();
        first.apply(&nothing).unwrap();
        let mut empty = bench();
        empty.apply(&[]).unwrap();
        assert!(first.kernel.holds_the_same_as(&empty.kernel), "seed {seed}\n{first:#?}");
        // The text is long.
        if seed.is_multiple_of(20) {
            assert_eq!(first.memory(), empty.memory(), "seed {seed}");
        }
    }
}
