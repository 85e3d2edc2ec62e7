//! What the main thread does once everything is started: it owns the backlog.
//!
//! Fed by the datastore, the interface monitor and the other threads; feeds the graph thread when
//! that asks for more.
//!
//! Invariants: at most one answer is on its way to the graph thread, everything else waits in the
//! backlog, which holds one update per object (I7). The graph thread learns that the facts are
//! complete together with the last of them (I3).

use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use dataplane::links::LinkEvent;
use datastore::{Backlog, FromDatastore, SyncState};
use model::Update;
use tokio::sync::mpsc;
use tracing::{debug, info, warn};

use crate::apply_thread::Applied;
use crate::config_watch::ConfigWatch;
use crate::exit::Ended;
use crate::graph_thread::ToGraph;
use crate::parts::{How, Message};
use crate::reports::Reports;
use crate::unplugged::Unplugged;

/// Time between two lines that say what is waited for.
const REMINDER: Duration = Duration::from_secs(30);

/// See the [module documentation](self).
#[derive(Debug)]
pub(crate) struct MainLoop {
    backlog: Backlog,
    config: ConfigWatch,
    graph: Sender<ToGraph>,
    started: Instant,
    /// The datastore was in sync once.
    in_sync: bool,
    /// All interfaces were listed once.
    links_listed: bool,
    /// Another variant of the product is in charge of the host.
    passive: bool,
    told_complete: bool,
    graph_wants_updates: bool,
    applied: bool,
    /// Everything wanted was in force once.
    in_force: bool,
    /// Before the facts are complete: there was a workload endpoint of this host, and one of another.
    endpoints_here: bool,
    endpoints_elsewhere: bool,
    unplugged: Unplugged,
    reports: Reports,
}

/// What the main loop listens to.
#[derive(Debug)]
pub(crate) struct Inputs {
    pub(crate) datastore: mpsc::Receiver<FromDatastore>,
    pub(crate) links: mpsc::Receiver<LinkEvent>,
    pub(crate) messages: mpsc::Receiver<Message>,
}

impl MainLoop {
    pub(crate) fn new(
        config: ConfigWatch,
        graph: Sender<ToGraph>,
        passive: bool,
        started: Instant,
        unplugged: Unplugged,
    ) -> Self {
        Self {
            backlog: Backlog::default(),
            config,
            graph,
            started,
            in_sync: false,
            links_listed: false,
            passive,
            told_complete: false,
            graph_wants_updates: false,
            applied: false,
            in_force: false,
            endpoints_here: false,
            endpoints_elsewhere: false,
            unplugged,
            reports: Reports::default(),
        }
    }

    /// Runs until something asks for the end of the process.
    pub(crate) async fn run(&mut self, inputs: &mut Inputs) -> Ended {
        let mut reminder = tokio::time::interval_at(tokio::time::Instant::now() + REMINDER, REMINDER);
        loop {
            let unplugged = self.unplugged.next_due();
            let ended = tokio::select! {
                message = inputs.datastore.recv() => match message {
                    Some(message) => self.on_datastore(message),
                    None => Some(Ended::PartFailed("datastore", anyhow::anyhow!("the watch has ended"))),
                },
                event = inputs.links.recv() => match event {
                    Some(event) => {
                        self.on_link(event);
                        None
                    }
                    None => Some(Ended::PartFailed("links", anyhow::anyhow!("the monitor has ended"))),
                },
                message = inputs.messages.recv() => message.and_then(|message| self.on_message(message)),
                _ = reminder.tick(), if !self.complete() => {
                    self.remind();
                    None
                }
                () = until(unplugged) => {
                    self.unplugged.report(now());
                    None
                }
            };
            if let Some(ended) = ended {
                return ended;
            }
            self.feed();
        }
    }

    fn on_datastore(&mut self, message: FromDatastore) -> Option<Ended> {
        match message {
            FromDatastore::Updates(updates) => {
                for update in updates {
                    if let Some(update) = self.config.take(update) {
                        self.note_endpoint(&update);
                        self.backlog.push(update);
                    }
                }
            }
            FromDatastore::State(state) => {
                debug!(state = state.as_str(), "datastore");
                self.in_sync |= state == SyncState::InSync;
            }
        }
        // Before the first sync the configuration may be known in part only.
        if self.in_sync { self.config.check() } else { None }
    }

    fn note_endpoint(&mut self, update: &Update) {
        let Update::WorkloadEndpoint(key, endpoint) = update else { return };
        let here = *key.host == *self.config.hostname();
        if here {
            self.unplugged.on_endpoint(key, endpoint.as_ref().map(|endpoint| &endpoint.interface), now());
        }
        if endpoint.is_some() {
            self.endpoints_here |= here;
            self.endpoints_elsewhere |= !here;
        }
    }

    /// Returns whether everything looks as if the host had another name in the datastore than it thinks, or as if it
    /// had no workloads yet.
    fn may_be_misnamed(&self) -> bool {
        self.endpoints_elsewhere && !self.endpoints_here
    }

    fn on_link(&mut self, event: LinkEvent) {
        match event {
            LinkEvent::Changed(name, state) => {
                self.unplugged.on_link(&name, state.is_some(), now());
                self.backlog.push(Update::Link(name, state));
            }
            LinkEvent::InSync => self.links_listed = true,
        }
    }

    fn on_message(&mut self, message: Message) -> Option<Ended> {
        match message {
            Message::WantsUpdates => self.graph_wants_updates = true,
            Message::Applied(applied) => self.on_applied(&applied),
            Message::Ended(part, How::Panicked) => return Some(Ended::Panicked(part)),
            Message::Ended(part, How::Failed(error)) => return Some(Ended::PartFailed(part, error)),
            Message::Ended(part, How::Finished) => {
                return Some(Ended::PartFailed(part, anyhow::anyhow!("the thread has ended")));
            }
        }
        None
    }

    fn on_applied(&mut self, applied: &Applied) {
        self.reports.log(applied);
        let since_start = self.started.elapsed();
        if !applied.report.failed() {
            if !std::mem::replace(&mut self.in_force, true) {
                info!(?since_start, "in sync: everything wanted is in force");
            }
        } else if !self.applied {
            warn!(?since_start, "first batch applied, but not everything wanted is in force yet");
        }
        self.applied = true;
    }

    /// True once all facts are known that the first batch depends on.
    fn complete(&self) -> bool {
        self.in_sync && self.links_listed && !self.passive
    }

    /// Answers the graph thread, if it waits and there is something to say.
    fn feed(&mut self) {
        if self.complete() {
            self.unplugged.begin(now());
        }
        let news = self.complete() && !self.told_complete;
        if !self.graph_wants_updates || (self.backlog.is_empty() && !news) {
            return;
        }
        let complete = self.complete();
        let message = ToGraph::Updates { updates: self.backlog.drain(), complete };
        self.graph_wants_updates = false;
        if news && self.may_be_misnamed() {
            warn!(
                host = self.config.hostname(),
                "no workload endpoint in the datastore is of this host, although there are some of others; if machines \
                 run here, FelixHostname is not what the orchestrator calls this host, and they get no connection"
            );
        }
        self.told_complete = complete;
        // A graph thread that has gone says so in a message of its own.
        self.graph.send(message).ok();
    }

    fn remind(&self) {
        let datastore = (!self.in_sync).then_some("the first complete list of the datastore");
        let links = (!self.links_listed).then_some("the first list of interfaces");
        for waiting_for in [datastore, links].into_iter().flatten() {
            info!(waiting_for, since_start = ?self.started.elapsed(), "nothing is written to the kernel yet");
        }
    }
}

/// The time, as timers see it.
fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

/// Waits for the moment, or for ever if there is none.
async fn until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::unplugged::LIMIT;
    use model::{LinkState, WorkloadEndpoint, WorkloadEndpointKey};
    use settings::{Raw, Source};
    use std::sync::Arc;
    use std::sync::mpsc::Receiver;

    #[test]
    fn the_graph_thread_hears_that_the_facts_are_complete_once_both_lists_are() {
        for datastore_first in [true, false] {
            let (mut main_loop, graph) = main_loop(false);
            ask(&mut main_loop);
            ready(&mut main_loop);
            link(&mut main_loop, "tap1");
            assert_eq!(answers(&graph), [(1, false)]);
            ask(&mut main_loop);
            assert_eq!(answers(&graph), []);
            let steps: [fn(&mut MainLoop); 2] = if datastore_first { [in_sync, listed] } else { [listed, in_sync] };
            steps[0](&mut main_loop);
            assert_eq!(answers(&graph), []);
            steps[1](&mut main_loop);
            assert_eq!(answers(&graph), [(0, true)], "said without any update to say it with");
            ask(&mut main_loop);
            link(&mut main_loop, "tap2");
            assert_eq!(answers(&graph), [(1, true)]);
        }
    }

    #[test]
    fn updates_wait_in_the_backlog_until_the_graph_thread_asks_one_per_object() {
        let (mut main_loop, graph) = main_loop(false);
        for name in ["tap1", "tap2", "tap1", "tap1"] {
            link(&mut main_loop, name);
        }
        assert_eq!(answers(&graph), []);
        ask(&mut main_loop);
        assert_eq!(answers(&graph), [(2, false)]);
        link(&mut main_loop, "tap1");
        assert_eq!(answers(&graph), [], "it has not asked again");
    }

    #[test]
    fn a_passive_agent_never_says_that_the_facts_are_complete() {
        let (mut main_loop, graph) = main_loop(true);
        ready(&mut main_loop);
        in_sync(&mut main_loop);
        listed(&mut main_loop);
        ask(&mut main_loop);
        link(&mut main_loop, "tap1");
        assert_eq!(answers(&graph), [(1, false)]);
    }

    #[test]
    fn a_host_whose_name_no_endpoint_has_may_be_misnamed() {
        let cases: &[(&[&str], bool)] = &[
            (&[], false),
            (&["h1"], false),
            (&["h2"], true),
            (&["h2", "h1"], false),
            (&["H1", "h1.example.org"], true),
        ];
        for (hosts, expected) in cases {
            let (mut main_loop, _graph) = main_loop(false);
            for host in *hosts {
                let key = WorkloadEndpointKey {
                    host: (*host).into(),
                    orchestrator: "openstack".into(),
                    workload: "openstack/w".into(),
                    endpoint: "e".into(),
                };
                let endpoint = Some(Arc::new(WorkloadEndpoint::default()));
                let updates = vec![Update::WorkloadEndpoint(key, endpoint)];
                assert!(main_loop.on_datastore(FromDatastore::Updates(updates)).is_none());
            }
            assert_eq!(main_loop.may_be_misnamed(), *expected, "{hosts:?}");
        }
    }

    #[test]
    fn an_unready_datastore_ends_the_process_only_once_it_is_in_sync() {
        let (mut main_loop, _graph) = main_loop(false);
        let unready = || FromDatastore::Updates(vec![Update::Ready(Some(false))]);
        assert!(main_loop.on_datastore(unready()).is_none());
        let ended = main_loop.on_datastore(FromDatastore::State(SyncState::InSync));
        assert!(matches!(ended, Some(Ended::DatastoreUnready)));
    }

    #[test]
    fn a_thread_that_ends_ends_the_process() {
        let (mut main_loop, _graph) = main_loop(false);
        for (how, code) in [(How::Finished, 1), (How::Failed(anyhow::anyhow!("x")), 1), (How::Panicked, 2)] {
            let ended = main_loop.on_message(Message::Ended("graph", how));
            assert_eq!(ended.map(|ended| ended.code()), Some(code));
        }
    }

    /// U7.c: all that it takes passes by here, and the time comes by itself.
    #[tokio::test]
    async fn an_endpoint_of_this_host_is_reported_when_its_interface_has_been_absent_for_long() {
        let (mut main_loop, _graph) = main_loop(false);
        main_loop.unplugged = Unplugged::new(Duration::from_millis(40));
        let (datastore, from_datastore) = mpsc::channel(8);
        let (link_events, links) = mpsc::channel(8);
        let (_messages, messages) = mpsc::channel(8);
        let mut inputs = Inputs { datastore: from_datastore, links, messages };
        let endpoints =
            [("h1", "a", "tap1"), ("h1", "b", "tap2"), ("h2", "c", "tap3")].map(|(host, name, interface)| {
                let (orchestrator, workload) = ("openstack".into(), "openstack/w".into());
                let key = WorkloadEndpointKey { host: host.into(), orchestrator, workload, endpoint: name.into() };
                let endpoint = WorkloadEndpoint { interface: interface.into(), ..WorkloadEndpoint::default() };
                Update::WorkloadEndpoint(key, Some(Arc::new(endpoint)))
            });
        let updates = endpoints.into_iter().chain([Update::Ready(Some(true))]).collect();
        datastore.send(FromDatastore::Updates(updates)).await.unwrap();
        link_events.send(LinkEvent::Changed("tap2".into(), Some(LinkState::default()))).await.unwrap();
        link_events.send(LinkEvent::InSync).await.unwrap();
        let state = async |main_loop: &mut MainLoop, inputs: &mut Inputs| {
            drop(tokio::time::timeout(Duration::from_millis(10), main_loop.run(inputs)).await);
            let figures = main_loop.unplugged.figures(now());
            (figures.without_interface, figures.reported)
        };
        for _ in 0..10 {
            assert_eq!(state(&mut main_loop, &mut inputs).await.1, 0, "the datastore is not in sync");
        }
        datastore.send(FromDatastore::State(SyncState::InSync)).await.unwrap();
        let deadline = now() + Duration::from_secs(20);
        while state(&mut main_loop, &mut inputs).await != (1, 1) {
            assert!(now() < deadline, "{:?}", main_loop.unplugged);
        }
        link_events.send(LinkEvent::Changed("tap1".into(), Some(LinkState::default()))).await.unwrap();
        while state(&mut main_loop, &mut inputs).await != (0, 0) {
            assert!(now() < deadline, "{:?}", main_loop.unplugged);
        }
    }

    fn main_loop(passive: bool) -> (MainLoop, Receiver<ToGraph>) {
        let (graph, inbox) = std::sync::mpsc::channel();
        let mut raw = Raw::default();
        raw.set(Source::Default, "FelixHostname", "h1");
        let config = ConfigWatch::new(raw.clone(), raw.resolve().unwrap());
        (MainLoop::new(config, graph, passive, Instant::now(), Unplugged::new(LIMIT)), inbox)
    }

    fn ask(main_loop: &mut MainLoop) {
        assert!(main_loop.on_message(Message::WantsUpdates).is_none());
        main_loop.feed();
    }

    fn ready(main_loop: &mut MainLoop) {
        assert!(main_loop.on_datastore(FromDatastore::Updates(vec![Update::Ready(Some(true))])).is_none());
        main_loop.feed();
    }

    fn in_sync(main_loop: &mut MainLoop) {
        assert!(main_loop.on_datastore(FromDatastore::State(SyncState::InSync)).is_none());
        main_loop.feed();
    }

    fn listed(main_loop: &mut MainLoop) {
        main_loop.on_link(LinkEvent::InSync);
        main_loop.feed();
    }

    fn link(main_loop: &mut MainLoop, name: &str) {
        main_loop.on_link(LinkEvent::Changed(name.into(), Some(LinkState::default())));
        main_loop.feed();
    }

    /// What the graph thread has been sent: the number of updates, and whether they are complete.
    fn answers(graph: &Receiver<ToGraph>) -> Vec<(usize, bool)> {
        let answer = |message| match message {
            ToGraph::Updates { updates, complete } => (updates.len(), complete),
            ToGraph::ReadyForBatch | ToGraph::Stop => panic!("not from the main loop"),
        };
        graph.try_iter().map(answer).collect()
    }
}
