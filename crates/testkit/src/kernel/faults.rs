//! What goes wrong, by seed.

use std::time::Duration;

use crate::world::Dice;

/// How often things go wrong; all numbers are "one in", 0 is never.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rates {
    /// An operation fails, or its answer is lost.
    pub failures: u64,
    /// Somebody else edits what is ours between two operations.
    pub foreign: u64,
    /// An operation takes long.
    pub slow: u64,
    /// The agent dies at an operation.
    pub crash: u64,
}

/// One thing that goes wrong with an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Fault {
    /// Refused, for no reason of the request's.
    Refused,
    /// The xtables lock is held.
    LockBusy,
    /// The answer is lost (ENOBUFS, a program that dies); nothing was done.
    LostBefore,
    /// The answer is lost; a part was done.
    LostWithin,
    /// The answer is lost; everything was done.
    LostAfter,
    /// No answer within the time limit; a part was done.
    Hung,
    /// The answer is cut but looks like one.
    Truncated,
}

/// Faults, drawn one after the other.
#[derive(Clone, Debug)]
pub struct Faults {
    pub rates: Rates,
    dice: Dice,
}

impl Faults {
    pub const fn new(seed: u64, rates: Rates) -> Self {
        Self { rates, dice: Dice::new(seed) }
    }

    const fn one_in(&mut self, rate: u64) -> bool {
        rate > 0 && self.dice.one_in(rate)
    }

    pub(super) fn fault(&mut self) -> Option<Fault> {
        use Fault::{Hung, LockBusy, LostAfter, LostBefore, LostWithin, Refused, Truncated};
        self.one_in(self.rates.failures)
            .then(|| self.dice.pick(&[Refused, LockBusy, LostBefore, LostWithin, LostAfter, Hung, Truncated]))
    }

    pub(super) const fn crash(&mut self) -> bool {
        self.one_in(self.rates.crash)
    }

    pub(super) const fn foreign(&mut self) -> bool {
        self.one_in(self.rates.foreign)
    }

    pub(super) fn delay(&mut self) -> Duration {
        if self.one_in(self.rates.slow) {
            Duration::from_millis(self.dice.pick(&[50, 200, 1000, 5000]))
        } else {
            Duration::from_micros(self.dice.roll(3000))
        }
    }

    pub(super) const fn dice(&mut self) -> &mut Dice {
        &mut self.dice
    }
}
