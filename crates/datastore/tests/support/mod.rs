//! What the tests of this folder share: a reader of the datastore's output, and a proxy that can fail.
#![allow(dead_code, reason = "each test program uses a part of it")]

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Once};
use std::time::{Duration, Instant};

use datastore::{ConnectOptions, Datastore, FromDatastore, Limits, Pace, RESOURCES, SyncState};
use model::Update;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

/// Longer than anything takes on a busy machine.
const DEADLINE: Duration = Duration::from_secs(60);

/// Key of a tier.
pub(crate) fn tier(name: &str) -> String {
    format!("{RESOURCES}tiers/{name}")
}

/// A tier of this order.
pub(crate) fn tier_value(order: impl Into<f64>) -> String {
    serde_json::json!({"metadata": {}, "spec": {"order": order.into()}}).to_string()
}

/// Connection settings that notice failures within seconds.
pub(crate) fn options<const N: usize>(endpoints: [String; N]) -> ConnectOptions {
    let mut options = ConnectOptions::new(endpoints);
    options.limits = Limits {
        connect: Duration::from_secs(2),
        keep_alive_interval: Duration::from_secs(1),
        keep_alive_timeout: Duration::from_secs(1),
        call: Duration::from_secs(2),
        page: Duration::from_secs(10),
    };
    options
}

/// What the datastore has said so far.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    pub(crate) states: Vec<SyncState>,
    /// Tiers that exist, with their order.
    pub(crate) tiers: BTreeMap<String, f64>,
    pub(crate) updates_of_tiers: usize,
    pub(crate) others: Vec<Update>,
}

impl Seen {
    pub(crate) fn is_in_sync(&self) -> bool {
        self.states.last() == Some(&SyncState::InSync)
    }

    fn take(&mut self, message: FromDatastore) {
        let updates = match message {
            FromDatastore::State(state) => return self.states.push(state),
            FromDatastore::Updates(updates) => updates,
        };
        for update in updates {
            if let Update::Tier(name, tier) = update {
                self.updates_of_tiers += 1;
                match tier {
                    Some(tier) => self.tiers.insert(name.to_string(), tier.order.unwrap()),
                    None => self.tiers.remove(&*name),
                };
            } else {
                self.others.push(update);
            }
        }
    }
}

/// A running datastore and what it says.
pub(crate) struct Follower {
    pub(crate) seen: Seen,
    receiver: mpsc::Receiver<FromDatastore>,
    task: JoinHandle<()>,
}

impl Follower {
    pub(crate) async fn start(options: ConnectOptions, page_size: i64) -> Self {
        let pace = Pace { page_size, ..Pace::default() };
        let datastore = Datastore::new(options).await.unwrap().with_pace(pace);
        let (sender, receiver) = mpsc::channel(1);
        let task = tokio::spawn(async move { datastore.run(model::convert::Options::default(), sender).await });
        Self { seen: Seen::default(), receiver, task }
    }

    /// Reads until something holds.
    pub(crate) async fn until(&mut self, what: &str, mut holds: impl FnMut(&Seen) -> bool) {
        let deadline = Instant::now() + DEADLINE;
        while !holds(&self.seen) {
            let left = deadline.saturating_duration_since(Instant::now());
            match tokio::time::timeout(left, self.receiver.recv()).await {
                Ok(Some(message)) => self.seen.take(message),
                Ok(None) => panic!("the datastore has ended before: {what}"),
                Err(_) => panic!("not within {DEADLINE:?}: {what}; seen {:?}", self.seen),
            }
        }
    }

    /// Reads for some time.
    pub(crate) async fn settle(&mut self, time: Duration) {
        let deadline = Instant::now() + time;
        while let Ok(message) =
            tokio::time::timeout(deadline.saturating_duration_since(Instant::now()), self.receiver.recv()).await
        {
            self.seen.take(message.expect("the datastore runs"));
        }
    }

    /// Drops the receiver and returns the task.
    pub(crate) fn stop_listening(self) -> JoinHandle<()> {
        self.task
    }
}

/// What a [`Proxy`] does with its connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    Open,
    /// Ends them and accepts no others.
    Cut,
    /// Keeps them open and moves nothing, for good; new ones are accepted and silent too.
    Silent,
}

/// Stands between client and server.
pub(crate) struct Proxy {
    port: u16,
    mode: watch::Sender<Mode>,
    connections: Arc<AtomicUsize>,
}

impl Proxy {
    pub(crate) async fn start(endpoint: &str) -> Self {
        let target = endpoint.strip_prefix("http://").unwrap().to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (mode, receiver) = watch::channel(Mode::Open);
        let connections = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&connections);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                counter.fetch_add(1, Ordering::Relaxed);
                tokio::spawn(serve(stream, target.clone(), receiver.clone()));
            }
        });
        Self { port, mode, connections }
    }

    pub(crate) fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// Number of connections ever accepted.
    pub(crate) fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }

    pub(crate) fn set(&self, mode: Mode) {
        self.mode.send_replace(mode);
    }
}

async fn serve(mut client: TcpStream, target: String, mut mode: watch::Receiver<Mode>) {
    if *mode.borrow_and_update() == Mode::Open {
        let Ok(mut server) = TcpStream::connect(target).await else { return };
        let copied = tokio::io::copy_bidirectional(&mut client, &mut server);
        tokio::select! {
            _ = copied => return,
            _ = mode.wait_for(|mode| *mode != Mode::Open) => {}
        }
        if *mode.borrow_and_update() == Mode::Silent {
            mode.wait_for(|mode| *mode == Mode::Cut).await.ok();
        }
        drop(server);
    } else if *mode.borrow_and_update() == Mode::Silent {
        mode.wait_for(|mode| *mode == Mode::Cut).await.ok();
    }
    drop(client);
}

/// The log of this thread while it lives, one line per event.
#[derive(Clone, Debug, Default)]
pub(crate) struct Log(Arc<Mutex<Vec<String>>>);

thread_local! {
    static OF_THIS_THREAD: RefCell<Option<Log>> = const { RefCell::new(None) };
}

/// Ends the recording of this thread when it is dropped.
#[derive(Debug)]
pub(crate) struct Recording;

impl Drop for Recording {
    fn drop(&mut self) {
        OF_THIS_THREAD.take();
    }
}

impl Log {
    /// Starts to record what this thread logs.
    pub(crate) fn record() -> (Self, Recording) {
        // One subscriber for the process: with one per thread, a place in the code that logs first on a thread
        // without any may be taken for one that nobody listens to.
        static INSTALLED: Once = Once::new();
        INSTALLED.call_once(|| tracing::subscriber::set_global_default(Recorder).expect("no other subscriber"));
        let log = Self::default();
        OF_THIS_THREAD.set(Some(log.clone()));
        (log, Recording)
    }

    pub(crate) fn lines_with(&self, text: &str) -> Vec<String> {
        let lines = self.0.lock().expect("no panic while logging");
        lines.iter().filter(|line| line.contains(text)).cloned().collect()
    }
}

/// Hands every event to the log of its thread.
#[derive(Debug)]
struct Recorder;

impl tracing::Subscriber for Recorder {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        metadata.target().starts_with("datastore")
    }

    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }

    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}

    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}

    fn event(&self, event: &tracing::Event<'_>) {
        let mut line = event.metadata().level().to_string();
        event.record(&mut |field: &tracing::field::Field, value: &dyn std::fmt::Debug| {
            write!(line, " {field}={value:?}").expect("writing to memory");
        });
        OF_THIS_THREAD.with_borrow(|log| {
            if let Some(Log(lines)) = log {
                lines.lock().expect("no panic while logging").push(line);
            }
        });
    }

    fn enter(&self, _: &tracing::span::Id) {}

    fn exit(&self, _: &tracing::span::Id) {}
}
