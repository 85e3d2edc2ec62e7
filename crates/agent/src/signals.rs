//! The signals that end the process (operations.md 4.5).

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::exit::Ended;

/// From the moment that this exists, these signals no longer kill the process.
#[derive(Debug)]
pub(crate) struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    pub(crate) fn new() -> std::io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    /// Waits for a signal. Nothing is lost if the future is dropped.
    pub(crate) async fn next(&mut self) -> Ended {
        tokio::select! {
            _ = self.terminate.recv() => Ended::Signal("SIGTERM"),
            _ = self.interrupt.recv() => Ended::Signal("SIGINT"),
            _ = self.hangup.recv() => Ended::Hangup,
        }
    }

    /// Waits for a signal that allows no delay.
    pub(crate) async fn stop(&mut self) {
        while !matches!(self.next().await, Ended::Signal(_)) {}
    }
}
