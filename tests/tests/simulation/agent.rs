//! The agent's core on the simulated kernel: backlog, graph thread and apply loop, as the binary has them, but as one
//! task on a paused clock.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::{Duration, Instant};

use agent::graph_thread::{GraphThread, ToGraph};
use compiler::Compiler;
use dataplane::{ApplyLoop, clock};
use datastore::backlog::Backlog;
use graph::Graph;
use model::Update;
use model::update::UpdateKey;
use program::Changes;
use testkit::kernel::SimKernel;
use testkit::world::{Dice, HOST};
use tokio::sync::Notify;

use crate::probes::Probes;

/// As in the apply thread.
const LEAST_PAUSE: Duration = Duration::from_millis(10);

/// What the datastore holds and what the agent has not taken in yet.
#[derive(Debug, Default)]
pub(crate) struct Store {
    pub(crate) facts: BTreeMap<UpdateKey, Update>,
    backlog: Backlog,
    /// The agent follows: it is told of changes.
    is_watched: bool,
    /// Everything has been said.
    is_complete: bool,
}

/// What harness and agent share.
#[derive(Debug, Default)]
pub(crate) struct Shared {
    pub(crate) store: RefCell<Store>,
    pub(crate) news: Notify,
    /// The last apply left nothing undone, and nothing waits to be taken in.
    pub(crate) is_quiet: RefCell<bool>,
    /// What the last report said was wrong.
    pub(crate) trouble: RefCell<String>,
    pub(crate) applies: RefCell<u64>,
}

/// The options of one world.
#[derive(Clone, Debug)]
pub(crate) struct Setup {
    pub(crate) compiler: compiler::Options,
    pub(crate) dataplane: dataplane::Options,
}

impl Shared {
    /// Changes a fact and tells the agent, if there is one.
    pub(crate) fn put(&self, update: Update) {
        let mut store = self.store.borrow_mut();
        store.facts.insert(update.key(), update.clone());
        if store.is_watched {
            store.backlog.push(update);
            *self.is_quiet.borrow_mut() = false;
            drop(store);
            self.news.notify_one();
        }
    }
}

/// One life of an agent, from its start; ends only by being dropped.
pub(crate) async fn live(shared: Rc<Shared>, kernel: SimKernel, setup: Setup, probes: Probes, mut dice: Dice) {
    {
        let mut store = shared.store.borrow_mut();
        store.backlog = Backlog::default();
        store.is_watched = false;
        store.is_complete = false;
        *shared.is_quiet.borrow_mut() = false;
    }
    let connection = kernel.connect(&setup.dataplane);
    probes.start(&kernel.state());
    let writes = |kernel: &SimKernel| {
        let counts = kernel.state().counts;
        (counts.writes, counts.settings)
    };
    let before = writes(&kernel);
    let apply = ApplyLoop::with_kernel(setup.dataplane.clone(), connection);
    let core = GraphThread::new(Graph::new(HOST.into()), Compiler::new(setup.compiler));
    let read = async {
        // What was there comes in pieces, in any order, while the world goes on; now and then from the start again.
        let mut again = true;
        while again {
            again = dice.one_in(6);
            let mut keys: Vec<UpdateKey> = shared.store.borrow().facts.keys().cloned().collect();
            for at in (1..keys.len()).rev() {
                keys.swap(at, dice.roll(at as u64 + 1) as usize);
            }
            shared.store.borrow_mut().is_watched = true;
            for piece in keys.chunks(1 + dice.roll(20) as usize) {
                for key in piece {
                    let mut store = shared.store.borrow_mut();
                    if let Some(update) = store.facts.get(key).cloned() {
                        store.backlog.push(update);
                    }
                }
                shared.news.notify_one();
                tokio::time::sleep(Duration::from_micros(dice.roll(2000))).await;
            }
        }
        assert_eq!(writes(&kernel), before, "written before everything was known (U20.c)");
        shared.store.borrow_mut().is_complete = true;
        shared.news.notify_one();
        std::future::pending::<()>().await;
    };
    tokio::select! {
        biased;
        () = read => {}
        () = work(&shared, &kernel, core, apply, probes) => {}
    }
}

async fn work(shared: &Shared, kernel: &SimKernel, mut core: GraphThread, mut apply: ApplyLoop, probes: Probes) {
    let mut again: Option<Instant> = None;
    let mut rested = clock::now();
    let mut is_first = true;
    let mut seq = 0;
    core.take(ToGraph::ReadyForBatch);
    loop {
        let (updates, complete) = {
            let mut store = shared.store.borrow_mut();
            (store.backlog.drain(), store.is_complete)
        };
        core.take(ToGraph::Updates { updates, complete });
        let changes = core.next_batch().map(|batch| batch.changes);
        let is_batch = changes.is_some();
        let changes = match changes {
            Some(changes) => changes,
            None if again.is_some_and(|at| at <= clock::now()) => Changes { seq, ..Changes::default() },
            None => {
                let due = again;
                // Nothing to take in, nothing due now: what is wrong, if anything, waits for its time.
                *shared.is_quiet.borrow_mut() = complete && shared.trouble.borrow().is_empty();
                let wait = async {
                    match due {
                        Some(at) => tokio::time::sleep_until(at.into()).await,
                        None => std::future::pending().await,
                    }
                };
                let is_disturbed = tokio::select! {
                    biased;
                    () = shared.news.notified() => false,
                    () = wait => false,
                    () = disturbed(&mut apply, rested) => true,
                };
                if is_disturbed {
                    again = Some(clock::now());
                }
                continue;
            }
        };
        if is_batch {
            seq = changes.seq;
            kernel.state().announce(&changes);
            probes.hand_over(&changes, is_first).unwrap_or_else(|fault| panic!("{fault}"));
            is_first = false;
        }
        let report = apply.apply(changes).await;
        *shared.applies.borrow_mut() += 1;
        let is_meant = |line: &String| probes.is_rightly_closed(line);
        let held = report.drivers.iter().any(|driver| !driver.held.iter().all(is_meant));
        let is_fine = !report.failed() && !held;
        *shared.trouble.borrow_mut() = if is_fine { String::new() } else { format!("{:?}", report.drivers) };
        if is_fine {
            probes.in_force(&kernel.state());
        }
        rested = clock::now() + LEAST_PAUSE;
        again = report.again.map(|(at, _)| at.max(rested));
        if is_batch {
            core.take(ToGraph::ReadyForBatch);
        }
    }
}

/// As in the apply thread: others may change the kernel as often as they like.
async fn disturbed(apply: &mut ApplyLoop, rested: Instant) {
    tokio::time::sleep_until(rested.into()).await;
    apply.disturbed().await;
}
