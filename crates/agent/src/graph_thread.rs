//! The graph thread: owns the calculation graph and the compiler.
//!
//! Fed by the main thread with updates, when it asks for them, and by the apply thread with "ready
//! for more"; feeds the apply thread. While an apply runs it keeps taking in updates, and the next
//! batch is larger.
//!
//! Invariants: nothing is handed over before the facts are complete (I3), nor before the apply
//! thread has asked (I7). The first batch is handed over even if it asks for little: only it lets
//! the drivers sweep what an earlier agent left.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use compiler::{Compiler, Complaint};
use graph::Graph;
use model::{Name, Update};
use program::Changes;
use tokio::sync::mpsc;
use tracing::{debug, info, warn};

use crate::parts::Message;

/// What the graph thread is told.
#[derive(Debug)]
pub enum ToGraph {
    /// The answer to [`Message::WantsUpdates`].
    Updates {
        updates: Vec<Update>,
        /// These and what was sent before are all the facts there are; stays true.
        complete: bool,
    },
    /// The apply thread takes a batch.
    ReadyForBatch,
    Stop,
}

/// What the apply thread gets.
#[derive(Debug)]
pub struct Batch {
    pub changes: Changes,
    /// How many updates it sums up.
    pub updates: usize,
    /// What taking them in and working out what follows from them took.
    pub calculating: Duration,
    /// When the first of them came in.
    pub since: Instant,
}

/// How many objects' complaints are remembered.
const MOST_COMPLAINTS: usize = 4096;

/// The traffic of host endpoints is neither denied nor allowed; only their addresses are in IP sets.
const UNENFORCED: &str =
    "policies of host endpoints are not programmed by this release; its interfaces are not filtered";

/// No defect: nobody stores a tier in an OpenStack deployment.
const MISSING_TIER: &str =
    "its policies apply after those of all tiers that are there, and what they leave undecided is denied";

/// What the graph thread owns.
#[derive(Debug)]
pub struct GraphThread {
    graph: Graph,
    compiler: Compiler,
    complaints: Complaints,
    missing_tiers: MissingTiers,
    complete: bool,
    ready_for_batch: bool,
    /// Updates that were taken in since the last batch was taken out.
    updates: usize,
    first: bool,
    wants_updates: bool,
    /// Of what was taken in since the last batch: since when, and what that took.
    since: Option<Instant>,
    calculating: Duration,
}

impl GraphThread {
    /// Knows nothing yet.
    pub fn new(graph: Graph, compiler: Compiler) -> Self {
        Self {
            graph,
            compiler,
            complaints: Complaints::default(),
            missing_tiers: MissingTiers::default(),
            complete: false,
            ready_for_batch: false,
            updates: 0,
            first: true,
            wants_updates: true,
            since: None,
            calculating: Duration::ZERO,
        }
    }

    /// Runs until it is told to stop or the other threads have gone.
    pub(crate) fn run(
        mut self,
        inbox: &Receiver<ToGraph>,
        batches: &mpsc::Sender<Batch>,
        messages: &mpsc::Sender<Message>,
    ) -> anyhow::Result<()> {
        loop {
            if std::mem::take(&mut self.wants_updates) && messages.blocking_send(Message::WantsUpdates).is_err() {
                return Ok(());
            }
            let Ok(first) = inbox.recv() else { return Ok(()) };
            // What is already there goes into the same batch.
            for message in std::iter::once(first).chain(inbox.try_iter()) {
                if !self.take(message) {
                    return Ok(());
                }
            }
            if let Some(batch) = self.next_batch()
                && batches.blocking_send(batch).is_err()
            {
                return Ok(());
            }
        }
    }

    /// Takes one message in; false means stop.
    pub fn take(&mut self, message: ToGraph) -> bool {
        match message {
            ToGraph::Updates { updates, complete } => {
                debug!(updates = updates.len(), complete, "taking in updates");
                self.updates += updates.len();
                let began = Instant::now();
                for update in updates {
                    self.graph.apply(update);
                }
                self.since.get_or_insert(began);
                self.calculating += began.elapsed();
                self.complete |= complete;
                self.wants_updates = true;
            }
            ToGraph::ReadyForBatch => self.ready_for_batch = true,
            ToGraph::Stop => return false,
        }
        true
    }

    /// The next batch, if there is one and it may be handed over; the apply thread must ask for each.
    pub fn next_batch(&mut self) -> Option<Batch> {
        if !self.complete || !self.ready_for_batch || !(self.updates > 0 || self.first) {
            return None;
        }
        let began = Instant::now();
        let since = self.since.take().unwrap_or(began);
        let calculating = std::mem::take(&mut self.calculating);
        let updates = std::mem::take(&mut self.updates);
        let batch = self.graph.take_batch();
        if batch.is_empty() && !self.first {
            return None;
        }
        for (name, program) in &batch.host_endpoints {
            if self.complaints.is_unenforced_news(name, program.is_some()) {
                warn!(key = format!("host endpoint {name}"), reason = UNENFORCED, "host endpoint is not enforced");
            }
        }
        for tier in self.missing_tiers.news(self.graph.missing_tiers()) {
            info!(tier = %tier, effect = MISSING_TIER, "tier is not in the datastore");
        }
        let (changes, complaints) = self.compiler.compile(&batch);
        for complaint in complaints {
            self.complaints.log(complaint);
        }
        if changes.is_empty() && !self.first {
            debug!(seq = changes.seq, "batch changes nothing in the kernel");
            return None;
        }
        self.first = false;
        self.ready_for_batch = false;
        Some(Batch { changes, updates, calculating: calculating + began.elapsed(), since })
    }
}

/// What was last said about each object, so that it is said once.
#[derive(Debug, Default)]
struct Complaints {
    said: BTreeMap<String, String>,
}

impl Complaints {
    fn log(&mut self, complaint: Complaint) {
        let Complaint { object, reason } = complaint;
        if self.is_news(&object, &reason) {
            warn!(key = object, reason, "object cannot be programmed as it is");
        }
    }

    /// Tells once of each host endpoint of this host, while it is there, that nothing enforces it yet.
    fn is_unenforced_news(&mut self, name: &str, there: bool) -> bool {
        let object = format!("host endpoint {name}");
        if there {
            return self.is_news(&object, UNENFORCED);
        }
        self.said.remove(&object);
        false
    }

    fn is_news(&mut self, object: &str, reason: &str) -> bool {
        if self.said.get(object).is_some_and(|said| said == reason) {
            return false;
        }
        if self.said.len() >= MOST_COMPLAINTS {
            self.said.clear();
        }
        self.said.insert(object.to_owned(), reason.to_owned());
        true
    }
}

/// Tiers that policies name and that are not stored, as far as they were mentioned.
#[derive(Debug, Default)]
struct MissingTiers {
    said: BTreeSet<Name>,
}

impl MissingTiers {
    /// Returns the tiers that have begun to be missing.
    fn news<'a>(&mut self, missing: impl Iterator<Item = &'a Name>) -> Vec<Name> {
        let missing: BTreeSet<Name> = missing.cloned().collect();
        let news = missing.difference(&self.said).cloned().collect();
        self.said = missing;
        news
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_handed_over_before_the_facts_are_complete_and_the_apply_thread_asks() {
        // Steps, and how many batches there are after each.
        let steps = [
            (updates(&["tap1"], false), 0),
            (ToGraph::ReadyForBatch, 0),
            (updates(&["tap2"], true), 1),
            // The apply thread is busy.
            (updates(&["tap3"], false), 1),
            (updates(&["tap4"], false), 1),
            (ToGraph::ReadyForBatch, 2),
            // Nothing has changed.
            (ToGraph::ReadyForBatch, 2),
            (updates(&["tap4"], false), 2),
            (updates(&["tap5"], false), 3),
        ];
        let mut thread = thread();
        let mut batches = Vec::new();
        for (number, (message, expected)) in steps.into_iter().enumerate() {
            assert!(thread.take(message));
            if let Some(changes) = thread.next_batch() {
                batches.push(changes.changes);
            }
            assert_eq!(batches.len(), expected, "step {number}");
        }
        // A number is used up only where something came in.
        assert_eq!(batches.iter().map(|batch| batch.seq).collect::<Vec<_>>(), [1, 2, 4]);
        let links = |batch: usize| batches[batch].links.keys().map(|name| name.to_string()).collect::<Vec<_>>();
        assert_eq!((links(0), links(1)), (vec!["tap1".into(), "tap2".into()], vec!["tap3".into(), "tap4".into()]));
    }

    #[test]
    fn the_first_batch_is_handed_over_even_without_any_fact() {
        let mut thread = thread();
        thread.take(ToGraph::ReadyForBatch);
        thread.take(updates(&[], true));
        let Batch { changes, .. } = thread.next_batch().expect("a first batch");
        assert!(!changes.tables.is_empty(), "static chains are always wanted");
    }

    #[test]
    fn the_thread_asks_for_updates_once_each_time_it_has_none() {
        let (to_graph, inbox) = std::sync::mpsc::channel();
        let (messages, mut heard) = mpsc::channel(1);
        let (batches, mut handed_over) = mpsc::channel(1);
        let joined = std::thread::spawn(move || thread().run(&inbox, &batches, &messages));
        for name in ["tap1", "tap2"] {
            assert!(matches!(heard.blocking_recv(), Some(Message::WantsUpdates)));
            to_graph.send(updates(&[name], true)).unwrap();
        }
        assert!(matches!(heard.blocking_recv(), Some(Message::WantsUpdates)));
        to_graph.send(ToGraph::ReadyForBatch).unwrap();
        assert_eq!(handed_over.blocking_recv().unwrap().changes.links.len(), 2);
        to_graph.send(ToGraph::Stop).unwrap();
        joined.join().unwrap().unwrap();
        assert!(heard.try_recv().is_err(), "nothing was asked for twice");
    }

    fn thread() -> GraphThread {
        GraphThread::new(Graph::new("h1".into()), Compiler::new(compiler::Options::default()))
    }

    fn updates(links: &[&str], complete: bool) -> ToGraph {
        let state = model::LinkState { index: 7, up: true, generation: 0 };
        let updates = links.iter().map(|name| Update::Link((*name).into(), Some(state))).collect();
        ToGraph::Updates { updates, complete }
    }

    #[test]
    fn a_complaint_is_news_once_until_its_reason_changes() {
        let mut complaints = Complaints::default();
        let news: Vec<bool> = [("a", "x"), ("a", "x"), ("b", "x"), ("a", "y"), ("a", "x")]
            .iter()
            .map(|(object, reason)| complaints.is_news(object, reason))
            .collect();
        assert_eq!(news, [true, false, true, true, true]);
    }

    #[test]
    fn a_host_endpoint_is_called_unenforced_once_while_it_is_there() {
        let mut complaints = Complaints::default();
        let steps = [("a", true, true), ("a", true, false), ("b", true, true), ("a", false, false), ("a", true, true)];
        for (step, (name, there, expected)) in steps.into_iter().enumerate() {
            assert_eq!(complaints.is_unenforced_news(name, there), expected, "step {step}");
        }
    }

    /// Nothing is programmed for them, so what is said about them is all there is.
    #[test]
    fn a_batch_with_a_local_host_endpoint_makes_the_thread_speak_of_it() {
        let mut thread = thread();
        thread.take(ToGraph::ReadyForBatch);
        let hosts = [("local", "h1"), ("remote", "h2")].map(|(name, host)| testkit::build::hep(name, host).build());
        thread.take(ToGraph::Updates { updates: hosts.to_vec(), complete: true });
        thread.next_batch().expect("a first batch");
        assert_eq!(thread.complaints.said.keys().collect::<Vec<_>>(), ["host endpoint local"]);
    }

    #[test]
    fn x_01_a_missing_tier_is_mentioned_when_it_begins_to_be_missing() {
        let steps: [(&[&str], &[&str]); 5] = [
            (&["default"], &["default"]),
            (&["default"], &[]),
            (&["a", "default"], &["a"]),
            (&[], &[]),
            (&["a"], &["a"]),
        ];
        let mut tiers = MissingTiers::default();
        for (missing, expected) in steps {
            let missing: Vec<Name> = missing.iter().map(|name| Name::from(*name)).collect();
            let news = tiers.news(missing.iter());
            assert_eq!(news.iter().map(AsRef::as_ref).collect::<Vec<&str>>(), expected);
        }

        let mut thread = thread();
        thread.take(ToGraph::ReadyForBatch);
        let updates = vec![
            testkit::build::wep("h1/openstack/ns/vm/port").interface("tap1").ip("10.0.0.1").build(),
            testkit::build::policy("gnp/p").build(),
        ];
        thread.take(ToGraph::Updates { updates, complete: true });
        thread.next_batch().expect("a first batch");
        assert_eq!(thread.missing_tiers.said.iter().map(AsRef::as_ref).collect::<Vec<&str>>(), ["default"]);
    }

    #[test]
    fn remembered_complaints_are_bounded() {
        let mut complaints = Complaints::default();
        for number in 0..3 * MOST_COMPLAINTS {
            complaints.is_news(&number.to_string(), "x");
        }
        assert!(complaints.said.len() <= MOST_COMPLAINTS);
    }
}
