//! The shape every driver has.

use std::time::Instant;

use crate::error::DriverError;

/// One kernel subsystem, as a state machine that does no I/O itself.
///
/// The apply loop owns the I/O: it performs each [`Next::Do`] and hands the answer back through
/// [`Driver::handle`], until the driver is [`Next::Idle`]. A driver never sleeps, never reads a clock
/// and never logs an error it also returns.
pub trait Driver {
    /// A change to what should be in the kernel.
    type Change;
    /// Something to ask of, or do to, the kernel.
    type Request;
    /// What came back.
    type Response;

    /// Records desired state. Cheap; touches nothing but memory.
    fn want(&mut self, change: Self::Change);

    /// Declares everything believed about the kernel to be stale.
    fn distrust(&mut self);

    /// The next thing to do. `now` is the only clock a driver ever sees.
    #[must_use]
    fn next(&mut self, now: Instant) -> Next<Self::Request>;

    /// Takes the answer to the request most recently returned by [`Self::next`].
    ///
    /// # Errors
    ///
    /// Why the work could not be done. The driver has already taken note of it and comes back by itself
    /// after its back-off; the caller reports and goes on with the other drivers (I8).
    fn handle(&mut self, response: Self::Response, now: Instant) -> Result<(), DriverError>;
}

/// What a driver asks of the loop around it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next<R> {
    /// Perform this and hand the answer back.
    Do(R),
    /// Nothing before this instant.
    NotBefore(Instant),
    /// The kernel is as wanted.
    Idle,
}
