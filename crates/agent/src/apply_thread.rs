//! The apply thread: owns the drivers and brings the kernel to one batch at a time.
//!
//! Fed by the graph thread with batches, when it asks for one; feeds the main thread with what came
//! of them. It also comes back by itself when a driver wants to try again or to look after the kernel.
//!
//! Invariant: after each apply there is a gap that follows the measured cost, so that a kernel which
//! is slow gets larger batches and not more of them (performance.md 6.5).

use std::collections::BTreeSet;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use dataplane::{ApplyLoop, Report};
use program::{Changes, SetChange};
use tokio::sync::{mpsc, watch};
use tracing::warn;

use crate::graph_thread::ToGraph;
use crate::parts::Message;

/// How long a running apply may go on once the process wants to end. What the kernel has not got by
/// then it gets from the next agent; a transaction that is cut off has no effect.
const GRACE: Duration = Duration::from_millis(600);

/// Applies cheaper than this are followed at once.
const CHEAP: Duration = Duration::from_millis(5);
const LONGEST_GAP: Duration = Duration::from_millis(100);
/// Least time between two attempts that no batch asked for.
const LEAST_PAUSE: Duration = Duration::from_millis(10);

/// What came of one apply.
#[derive(Debug)]
pub(crate) struct Applied {
    pub(crate) cause: Cause,
    pub(crate) counts: Counts,
    pub(crate) report: Report,
}

/// Why an apply ran.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cause {
    Batch,
    /// A driver wanted to come back.
    Again(&'static str),
}

/// How much a batch asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    /// Interfaces that changed or are to be set up otherwise.
    pub(crate) links: usize,
    pub(crate) sets: usize,
    pub(crate) members: usize,
    pub(crate) chains: usize,
    pub(crate) routes: usize,
}

impl Counts {
    fn of(changes: &Changes) -> Self {
        let members = |change: &SetChange| match change {
            SetChange::Replace { spec: _, members } => members.len(),
            SetChange::Delta { added, removed } => added.len() + removed.len(),
            SetChange::Remove => 0,
        };
        Self {
            links: changes.links.keys().chain(changes.interfaces.keys()).collect::<BTreeSet<_>>().len(),
            sets: changes.sets.len(),
            members: changes.sets.values().map(members).sum(),
            chains: changes.tables.values().map(|table| table.chains.len()).sum(),
            routes: changes.routes.values().map(Vec::len).sum(),
        }
    }
}

/// The ends of the apply thread's channels.
#[derive(Debug)]
pub(crate) struct Ends {
    pub(crate) batches: mpsc::Receiver<Changes>,
    pub(crate) ready: Sender<ToGraph>,
    pub(crate) messages: mpsc::Sender<Message>,
    /// Turns true when the process wants to end.
    pub(crate) stop: watch::Receiver<bool>,
}

/// Runs until the process wants to end. Netlink sockets are opened on this thread, so it must be
/// called on the thread that lives in the host's network namespace.
pub(crate) fn run(apply: ApplyLoop, ends: Ends) -> anyhow::Result<()> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("starting the apply runtime")?;
    runtime.block_on(applies(apply, ends));
    runtime.shutdown_background();
    Ok(())
}

async fn applies(mut apply: ApplyLoop, mut ends: Ends) {
    let mut cost = Cost::default();
    let mut last_seq = 0;
    let mut again: Option<(Instant, &'static str)> = None;
    let mut asked = false;
    // Before that, only a batch leads to an apply.
    let mut rested = Instant::now();
    loop {
        if !asked && ends.ready.send(ToGraph::ReadyForBatch).is_err() {
            return;
        }
        asked = true;
        let (cause, changes) = tokio::select! {
            biased;
            () = stopped(&mut ends.stop) => return,
            changes = ends.batches.recv() => match changes {
                Some(changes) => (Cause::Batch, changes),
                None => return,
            },
            reason = until(again) => (Cause::Again(reason), Changes { seq: last_seq, ..Changes::default() }),
            reason = disturbed(&mut apply, rested) => {
                (Cause::Again(reason), Changes { seq: last_seq, ..Changes::default() })
            }
        };
        if cause == Cause::Batch {
            asked = false;
            last_seq = changes.seq;
        }
        let counts = Counts::of(&changes);
        let began = Instant::now();
        let report = tokio::select! {
            biased;
            report = apply.apply(changes) => report,
            () = stopped_for_long(&mut ends.stop) => {
                warn!(seq = last_seq, after = ?began.elapsed(), "a running apply is given up; the next start completes it");
                return;
            }
        };
        rested = Instant::now() + LEAST_PAUSE;
        again = report.again.map(|(at, reason)| (at.max(rested), reason));
        let gap = cost.gap_after(report.took);
        if ends.messages.send(Message::Applied(Box::new(Applied { cause, counts, report }))).await.is_err() {
            return;
        }
        tokio::select! {
            () = stopped(&mut ends.stop) => return,
            () = tokio::time::sleep(gap) => (),
        }
    }
}

async fn stopped(stop: &mut watch::Receiver<bool>) {
    // That the sender is gone means the same.
    stop.wait_for(|stop| *stop).await.ok();
}

async fn stopped_for_long(stop: &mut watch::Receiver<bool>) {
    stopped(stop).await;
    tokio::time::sleep(GRACE).await;
}

/// Waits until a driver has something to do of which it did not know, but at least until `rested`: others may
/// change the kernel as often as they like.
async fn disturbed(apply: &mut ApplyLoop, rested: Instant) -> &'static str {
    tokio::time::sleep_until(rested.into()).await;
    apply.disturbed().await
}

/// Waits for the moment, or for ever if there is none.
async fn until(again: Option<(Instant, &'static str)>) -> &'static str {
    match again {
        Some((at, reason)) => {
            tokio::time::sleep_until(at.into()).await;
            reason
        }
        None => std::future::pending().await,
    }
}

/// Moving average of what an apply costs.
#[derive(Debug, Default)]
struct Cost {
    average: Option<Duration>,
}

impl Cost {
    /// Takes one measurement in and returns how long to collect before the next apply.
    fn gap_after(&mut self, took: Duration) -> Duration {
        let average = self.average.map_or(took, |average| (average * 3 + took) / 4);
        self.average = Some(average);
        if average < CHEAP { Duration::ZERO } else { (average / 2).min(LONGEST_GAP) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gap_follows_the_cost_between_nothing_and_a_tenth_of_a_second() {
        let gap = |costs: &[u64]| {
            let mut cost = Cost::default();
            costs.iter().map(|ms| cost.gap_after(Duration::from_millis(*ms)).as_millis()).last()
        };
        assert_eq!(gap(&[4]), Some(0));
        assert_eq!(gap(&[20]), Some(10));
        assert_eq!(gap(&[1000]), Some(100));
        // One expensive batch is forgotten after some cheap ones.
        assert_eq!(gap(&[40, 0, 0, 0]), Some(8));
        assert_eq!(gap(&[40, 0, 0, 0, 0, 0, 0, 0, 0]), Some(0));
    }
}
