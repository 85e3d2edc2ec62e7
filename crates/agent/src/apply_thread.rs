//! The apply thread: owns the drivers and brings the kernel to one batch at a time.
//!
//! Fed by the graph thread with batches, when it asks for one; feeds the main thread with what came
//! of them. It also comes back by itself when a driver wants to try again or to look after the kernel.
//!
//! Between batches it watches what others do to the tables.
//!
//! Invariant: after each apply there is a gap that follows the measured cost, so that a kernel which
//! is slow gets larger batches and not more of them (performance.md 6.5), and neither the number of table writes
//! nor the share of the xtables lock grows with the number of changes (U2.c).

use std::collections::{BTreeSet, VecDeque};
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use dataplane::{ApplyLoop, Report};
use program::{Changes, SetChange};
use tokio::sync::{mpsc, watch};
use tracing::warn;

use crate::graph_thread::{Batch, ToGraph};
use crate::parts::Message;

/// How long a running apply may go on once the process wants to end. What the kernel has not got by
/// then it gets from the next agent; a transaction that is cut off has no effect.
const GRACE: Duration = Duration::from_millis(600);

/// Applies cheaper than this are followed at once.
const CHEAP: Duration = Duration::from_millis(5);
const LONGEST_GAP: Duration = Duration::from_millis(100);
/// After a table write that nothing came shortly before, this long it is looked whether more comes.
const PROBE: Duration = Duration::from_millis(4);
/// Writes closer together than this belong to one series.
const SERIES: Duration = Duration::from_millis(50);
/// One in so many writes of a slow series is probed.
const PROBE_EVERY: u32 = 8;
/// Below the first rate of updates per second each change goes in by itself, from the second on they are collected
/// for [`COLLECT`], so that a thousand in a second make nine writes.
const RATES: (f64, f64) = (150.0, 500.0);
const COLLECT: Duration = Duration::from_millis(150);
/// Of any [`LOCK_WINDOW`] the xtables lock may be held by us for [`LOCK_SHARE`], less than half.
const LOCK_WINDOW: Duration = Duration::from_secs(5);
const LOCK_SHARE: Duration = Duration::from_millis(2300);

/// Least time between two applies for the sake of what others do.
const LEAST_PAUSE: Duration = Duration::from_millis(10);
/// Before an attempt that no batch asked for there is a pause of so many times what the last apply took, but at least
/// and at most so long: a driver that waits for the kernel may look every few milliseconds.
const REST: (u32, Duration, Duration) = (8, Duration::from_millis(2), LEAST_PAUSE);

/// What came of one apply.
#[derive(Debug)]
pub(crate) struct Applied {
    pub(crate) cause: Cause,
    pub(crate) counts: Counts,
    pub(crate) report: Report,
    pub(crate) before: Before,
}

/// What a batch went through before its apply.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Before {
    pub(crate) calculating: Duration,
    /// From its first update to the apply, without the calculation.
    pub(crate) waited: Duration,
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
    pub(crate) batches: mpsc::Receiver<Batch>,
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
    let mut pace = Pace::default();
    let mut last_seq = 0;
    let mut again: Option<(Instant, &'static str)> = None;
    let mut asked = false;
    // Before that, only a batch leads to an apply.
    let mut rested = Instant::now();
    // Until then changes are collected; what a driver wants to try again need not wait for that.
    let mut collecting = rested;
    loop {
        let (cause, Batch { changes, updates, calculating, since }) = tokio::select! {
            biased;
            () = stopped(&mut ends.stop) => return,
            () = after(collecting, async {}), if !asked => {
                if ends.ready.send(ToGraph::ReadyForBatch).is_err() {
                    return;
                }
                asked = true;
                continue;
            }
            changes = after(collecting, ends.batches.recv()), if asked => match changes {
                Some(batch) => (Cause::Batch, batch),
                None => return,
            },
            reason = until(again) => (Cause::Again(reason), nothing(last_seq)),
            // Dropped when a batch comes: what it was reading is read later.
            reason = disturbed(&mut apply, rested) => (Cause::Again(reason), nothing(last_seq)),
        };
        if cause == Cause::Batch {
            asked = false;
            last_seq = changes.seq;
        }
        let counts = Counts::of(&changes);
        let began = Instant::now();
        let before = Before { calculating, waited: (began - since).saturating_sub(calculating) };
        let report = tokio::select! {
            biased;
            report = apply.apply(changes) => report,
            () = stopped_for_long(&mut ends.stop) => {
                warn!(seq = last_seq, after = ?began.elapsed(), "a running apply is given up; the next start completes it");
                return;
            }
        };
        let ended = Instant::now();
        let wrote_tables = report.drivers.iter().any(|driver| driver.lines > 0);
        let mut gap = Gap::default();
        // Attempts at what may not work yet are many and cheap, and say nothing about what a batch costs.
        if cause == Cause::Batch || report.writes() > 0 {
            let done = Done { began, took: report.took, lock_held: report.lock_held(), wrote_tables, updates };
            gap = pace.gap_after(&done, ended);
        }
        collecting = collecting.max(ended + gap.collecting);
        rested = collecting.max(ended + LEAST_PAUSE);
        let rest = rest_after(began.elapsed()).max(gap.for_others);
        again = report.again.map(|(at, reason)| (at.max(ended + rest), reason));
        if ends.messages.send(Message::Applied(Box::new(Applied { cause, counts, report, before }))).await.is_err() {
            return;
        }
    }
}

fn rest_after(took: Duration) -> Duration {
    let (times, least, most) = REST;
    took.saturating_mul(times).clamp(least, most)
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

/// Waits for the moment, then for the event.
async fn after<T>(at: Instant, event: impl Future<Output = T>) -> T {
    // The timer would round a moment of the past up to the next millisecond.
    if at > Instant::now() {
        tokio::time::sleep_until(at.into()).await;
    }
    event.await
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

fn nothing(seq: u64) -> Batch {
    let changes = Changes { seq, ..Changes::default() };
    Batch { changes, updates: 0, calculating: Duration::ZERO, since: Instant::now() }
}

/// One apply, as far as the pace depends on it.
#[derive(Clone, Copy, Debug)]
struct Done {
    began: Instant,
    took: Duration,
    lock_held: Duration,
    wrote_tables: bool,
    /// That came since the apply before.
    updates: usize,
}

/// How long to wait after an apply.
#[derive(Clone, Copy, Debug, Default)]
struct Gap {
    /// Before the next batch.
    collecting: Duration,
    /// Before anything that may take the xtables lock again.
    for_others: Duration,
}

/// How long to collect changes between applies.
#[derive(Debug, Default)]
struct Pace {
    /// Moving average of what an apply costs.
    average: Option<Duration>,
    /// When the tables were last written.
    last_write: Option<Instant>,
    writes_since_probe: u32,
    /// When, and for how long, the lock was held.
    locks: VecDeque<(Instant, Duration)>,
}

impl Pace {
    /// Takes one apply in and returns how long to wait before the next.
    fn gap_after(&mut self, done: &Done, now: Instant) -> Gap {
        let average = self.average.map_or(done.took, |average| (average * 3 + done.took) / 4);
        self.average = Some(average);
        // No longer than this apply took: what is to follow a cheap one does not pay for an expensive one before it, like
        // the first of all (U17.b: a route that waits for the flows of its former holder).
        let by_cost = if average < CHEAP { Duration::ZERO } else { (average / 2).min(LONGEST_GAP).min(done.took) };
        let for_others = self.by_lock(done, now);
        Gap { collecting: by_cost.max(self.by_rate(done)).max(for_others), for_others }
    }

    /// Many changes in a short time are collected; a lone one, or one that waits for the one before, is not.
    fn by_rate(&mut self, done: &Done) -> Duration {
        if !done.wrote_tables {
            return Duration::ZERO;
        }
        let since = self.last_write.replace(done.began).map(|last| done.began.saturating_duration_since(last));
        let Some(since) = since.filter(|since| *since < SERIES + COLLECT + done.took) else {
            self.writes_since_probe = 0;
            return PROBE;
        };
        let rate = done.updates as f64 / since.as_secs_f64().max(0.001);
        // Two may come together by chance.
        if done.updates > 2 && rate > RATES.0 {
            self.writes_since_probe = 0;
            return COLLECT.mul_f64(((rate - RATES.0) / (RATES.1 - RATES.0)).min(1.0));
        }
        self.writes_since_probe += 1;
        if self.writes_since_probe >= PROBE_EVERY {
            self.writes_since_probe = 0;
            return PROBE;
        }
        Duration::ZERO
    }

    /// Others need the xtables lock too.
    fn by_lock(&mut self, done: &Done, now: Instant) -> Duration {
        if done.lock_held > Duration::ZERO {
            self.locks.push_back((now, done.lock_held));
        }
        while self.locks.front().is_some_and(|(at, _)| now.saturating_duration_since(*at) > LOCK_WINDOW) {
            self.locks.pop_front();
        }
        // The next write is taken to last as long as the last one.
        let mut held = self.locks.iter().map(|(_, held)| *held).sum::<Duration>()
            + self.locks.back().map_or(Duration::ZERO, |(_, held)| *held);
        let mut gap = Duration::ZERO;
        for (at, oldest) in &self.locks {
            if held <= LOCK_SHARE {
                break;
            }
            gap = (*at + LOCK_WINDOW).saturating_duration_since(now);
            held = held.saturating_sub(*oldest);
        }
        gap
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn the_gap_follows_the_cost_between_nothing_and_a_tenth_of_a_second() {
        let gap = |costs: &[u64]| {
            let mut pace = Pace::default();
            let now = Instant::now();
            let done = |ms: &u64| Done {
                began: now,
                took: Duration::from_millis(*ms),
                lock_held: Duration::ZERO,
                wrote_tables: false,
                updates: 1,
            };
            costs.iter().map(|ms| pace.gap_after(&done(ms), now).collecting.as_millis()).last()
        };
        assert_eq!(gap(&[4]), Some(0));
        assert_eq!(gap(&[20]), Some(10));
        assert_eq!(gap(&[1000]), Some(100));
        // Cheap ones do not pay for an expensive one before them.
        assert_eq!(gap(&[1000, 0]), Some(0));
        assert_eq!(gap(&[40, 40, 6]), Some(6));
        // It is forgotten after some cheap ones.
        assert_eq!(gap(&[40, 0, 0, 0, 30]), Some(10));
        assert_eq!(gap(&[40, 0, 0, 0, 0, 0, 0, 0, 0, 4]), Some(0));
    }

    #[test]
    fn attempts_that_no_batch_asks_for_take_a_ninth_of_the_time_or_come_ten_milliseconds_apart() {
        let cases = [(0, 2000), (100, 2000), (250, 2000), (500, 4000), (1250, 10_000), (100_000, 10_000)];
        for (took, rest) in cases {
            assert_eq!(rest_after(Duration::from_micros(took)), Duration::from_micros(rest), "{took} us");
        }
    }

    /// Applies that last `took` each, with `per_second` updates per second for `time`, of which each needs a table
    /// write. Returns the number of writes and for how long each held the lock.
    fn simulate(per_second: u64, time: Duration, took: Duration, locks: bool) -> Vec<(Duration, Duration)> {
        let start = Instant::now();
        let mut pace = Pace::default();
        let mut writes = Vec::new();
        let (mut at, mut taken) = (Duration::ZERO, 0);
        let total = u64::try_from(time.as_millis()).unwrap() * per_second / 1000;
        while taken < total {
            let arrived = (u64::try_from(at.as_micros()).unwrap() * per_second / 1_000_000 + 1).min(total);
            if arrived == taken {
                at += MS / 10;
                continue;
            }
            let updates = usize::try_from(arrived - taken).unwrap();
            taken = arrived;
            let lock_held = if locks { took } else { Duration::ZERO };
            let done = Done { began: start + at, took, lock_held, wrote_tables: true, updates };
            writes.push((at, took));
            at += took;
            at += pace.gap_after(&done, start + at).collecting;
        }
        writes
    }

    /// U2.c, the part that is arithmetic.
    #[test]
    fn a_thousand_changes_in_a_second_make_at_most_ten_writes() {
        for took in [MS / 2, MS, 3 * MS, 10 * MS, 40 * MS, 200 * MS] {
            let writes = simulate(1000, Duration::from_secs(1), took, false).len();
            assert!(writes <= 10, "{writes} writes of {took:?}");
        }
    }

    /// U2.c, likewise.
    #[test]
    fn the_lock_is_held_less_than_half_of_any_five_seconds() {
        for took in [MS, 10 * MS, 40 * MS, 200 * MS, 900 * MS] {
            let writes = simulate(1000, Duration::from_secs(30), took, true);
            for (from, _) in &writes {
                let until = *from + LOCK_WINDOW;
                let inside = writes.iter().filter(|(at, _)| at >= from && *at < until);
                let held: Duration = inside.map(|(at, held)| (*held).min(until - *at)).sum();
                assert!(held < LOCK_WINDOW / 2, "{held:?} from {from:?}, {took:?} each");
            }
        }
    }

    #[test]
    fn lone_changes_and_slow_series_are_not_held_up() {
        let now = Instant::now();
        let mut pace = Pace::default();
        let mut gaps = Vec::new();
        for n in 0..40u32 {
            let began = now + n * 10 * MS;
            let done = Done { began, took: 2 * MS, lock_held: Duration::ZERO, wrote_tables: true, updates: 1 };
            gaps.push(pace.gap_after(&done, began + done.took).collecting);
        }
        assert!(gaps.iter().all(|gap| *gap <= PROBE), "{gaps:?}");
        assert!(gaps.iter().filter(|gap| **gap > Duration::ZERO).count() <= 6, "{gaps:?}");
        // Batches without tables are never held up, however many there are.
        let done = Done { began: now, took: MS, lock_held: Duration::ZERO, wrote_tables: false, updates: 100_000 };
        assert_eq!(Pace::default().gap_after(&done, now).collecting, Duration::ZERO);
    }
}
