//! The thin shell round [`crate::resync`]: does what the machine asks for and tells it what came back.
//!
//! Fed by etcd through [`Connection`], feeds the agent through a bounded channel: while the agent is busy, nothing is
//! read from etcd. Converting one page overlaps with waiting for the next.
//!
//! No decision about the data is taken here. A silent watch is alive because the connection is: keep-alive pings
//! end a stream whose server is gone or frozen (E12), and the server ends it when it has lost its cluster.

use std::collections::BTreeSet;
use std::future::Future;
use std::time::{Duration, Instant};

use etcd_client::{EventType, GetOptions, ResponseHeader, WatchResponse, WatchStream};
use tokio::sync::mpsc::Sender;
use tokio::time::timeout;
use tracing::{info, warn};

use crate::FromDatastore;
use crate::connect::{CallError, Connection, describe, is_compaction, is_refusal};
use crate::decode::Decoder;
use crate::resync::{Answer, Change, Entry, Event, Header, ListRequest, Next, Pace, Resync, SyncState};

/// Updates per message to the agent, so that other tasks of the thread get their turn during a large list.
const UPDATES_PER_MESSAGE: usize = 500;

/// Follows `prefix` until the receiver of `out` is dropped.
pub(crate) async fn run(
    prefix: &str,
    connection: Connection,
    pace: Pace,
    mut decoder: Decoder,
    out: &Sender<FromDatastore>,
) {
    let mut machine = Resync::new(prefix.as_bytes(), pace, fastrand::Rng::new());
    let mut shell = Shell { prefix, connection, stream: None, trouble: Trouble::default() };
    let mut events = vec![Event::State(machine.state())];
    loop {
        let next = machine.next(now());
        let work = both(shell.perform(next), deliver(&mut decoder, std::mem::take(&mut events), out));
        let (answer, delivered) = tokio::select! {
            () = out.closed() => return,
            done = work => done,
        };
        if delivered.is_err() {
            return;
        }
        if let Some(answer) = answer {
            machine.handle(answer, now(), &mut events);
        }
    }
}

/// Runs both to their end; the first is started first, so that its request is under way.
async fn both<A, B>(first: impl Future<Output = A>, second: impl Future<Output = B>) -> (A, B) {
    tokio::join!(biased; first, second)
}

fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

/// The receiver is gone.
struct Closed;

async fn deliver(decoder: &mut Decoder, events: Vec<Event>, out: &Sender<FromDatastore>) -> Result<(), Closed> {
    let mut updates = Vec::new();
    for event in events {
        match event {
            Event::Put { key, value, mod_revision: _ } => decoder.decode(&key, Some(&value), &mut updates),
            Event::Delete { key } => decoder.decode(&key, None, &mut updates),
            Event::State(state) => {
                if state != SyncState::WaitForReady {
                    updates.extend(decoder.take_unstored());
                }
                flush(&mut updates, out).await?;
                info!(state = state.as_str(), "datastore synchronisation");
                out.send(FromDatastore::State(state)).await.map_err(|_| Closed)?;
            }
        }
        if updates.len() >= UPDATES_PER_MESSAGE {
            flush(&mut updates, out).await?;
            tokio::task::yield_now().await;
        }
    }
    decoder.tidy(now());
    flush(&mut updates, out).await
}

async fn flush(updates: &mut Vec<model::Update>, out: &Sender<FromDatastore>) -> Result<(), Closed> {
    if updates.is_empty() {
        return Ok(());
    }
    out.send(FromDatastore::Updates(std::mem::take(updates))).await.map_err(|_| Closed)
}

struct Shell<'a> {
    prefix: &'a str,
    connection: Connection,
    /// There while the machine watches.
    stream: Option<WatchStream>,
    trouble: Trouble,
}

impl Shell<'_> {
    /// Does what the machine wants; `None` if that was only to wait.
    async fn perform(&mut self, next: Next) -> Option<Answer> {
        match next {
            Next::Wait { until, reason: _ } => {
                tokio::time::sleep_until(until.into()).await;
                None
            }
            Next::List(request) => Some(self.list(request).await),
            Next::Watch { from_revision } => Some(self.start_watch(from_revision).await),
            Next::Read => Some(self.read().await),
        }
    }

    async fn list(&mut self, request: ListRequest) -> Answer {
        let ListRequest { start, end, revision, limit } = request;
        let options = GetOptions::new().with_range(end).with_limit(limit).with_revision(revision);
        let time_limit = self.connection.limits().page;
        let mut response = match self.connection.get(&start, Some(options), time_limit).await {
            Ok(response) => response,
            Err(CallError::Compacted) => return Answer::ListCompacted,
            Err(error) => {
                self.trouble.happened("cannot list", &error);
                return Answer::ListFailed;
            }
        };
        self.trouble.ended(self.connection.endpoint());
        let more = response.more();
        let header = header(response.header());
        let entries = response.take_kvs().into_iter().map(|kv| {
            let mod_revision = kv.mod_revision();
            let (key, value) = kv.into_key_value();
            Entry { key, value, mod_revision }
        });
        Answer::Page { header, entries: entries.collect(), more }
    }

    async fn start_watch(&mut self, from_revision: i64) -> Answer {
        self.stream = None;
        match self.connection.watch(self.prefix.as_bytes(), from_revision).await {
            Ok(stream) => self.stream = Some(stream),
            Err(CallError::Compacted) => return Answer::WatchCompacted,
            Err(error) => {
                self.trouble.happened("cannot watch", &error);
                return Answer::WatchFailed;
            }
        }
        // The first message says whether the watch was accepted (E9, E16).
        let limit = self.connection.limits().call;
        let Ok(answer) = timeout(limit, self.read()).await else {
            let endpoint = self.connection.endpoint().to_owned();
            self.end_watch(&CallError::TimedOut { endpoint, call: "start of the watch", limit });
            return Answer::WatchFailed;
        };
        if let Answer::WatchCreated(_) = &answer {
            self.connection.has_sound_progress().await;
            self.trouble.ended(self.connection.endpoint());
        }
        answer
    }

    /// Reads messages until one says something to the machine.
    async fn read(&mut self) -> Answer {
        loop {
            let message = match &mut self.stream {
                Some(stream) => stream.message().await,
                None => Ok(None),
            };
            let problem = match message {
                Ok(Some(message)) if message.canceled() => {
                    if message.compact_revision() != 0 || is_compaction(message.cancel_reason()) {
                        // The stream would stay silent from now on (E7).
                        self.stream = None;
                        return Answer::WatchCompacted;
                    }
                    format!("cancelled by the server: {}", message.cancel_reason())
                }
                Ok(Some(message)) => match self.understand(&message).await {
                    Some(answer) => return answer,
                    None => continue,
                },
                Ok(None) => "the stream ended".to_owned(),
                Err(error) => describe(&error),
            };
            let endpoint = self.connection.endpoint().to_owned();
            let error = if is_refusal(&problem) {
                CallError::Refused { endpoint, problem }
            } else if is_compaction(&problem) {
                self.stream = None;
                return Answer::WatchCompacted;
            } else {
                CallError::Failed { endpoint, call: "watch", problem }
            };
            self.end_watch(&error);
            return Answer::WatchFailed;
        }
    }

    async fn understand(&mut self, message: &WatchResponse) -> Option<Answer> {
        if message.created() {
            return Some(Answer::WatchCreated(header(message.header())));
        }
        if !message.events().is_empty() {
            let changes = message.events().iter().filter_map(|event| {
                let kv = event.kv()?;
                let value = match event.event_type() {
                    EventType::Put => Some(kv.value().to_vec()),
                    EventType::Delete => None,
                };
                Some(Change { key: kv.key().to_vec(), value, mod_revision: kv.mod_revision() })
            });
            return Some(Answer::WatchEvents(changes.collect()));
        }
        // Notifications that were asked for have a negative id, and nothing here asks.
        let revision = header(message.header()).revision;
        let sound = message.watch_id() >= 0 && revision > 0 && self.connection.has_sound_progress().await;
        sound.then_some(Answer::WatchProgress { revision })
    }

    fn end_watch(&mut self, error: &CallError) {
        self.stream = None;
        self.trouble.happened("watch broke", error);
        self.connection.give_up_endpoint();
    }
}

fn header(header: Option<&ResponseHeader>) -> Header {
    match header {
        Some(header) => Header { cluster: header.cluster_id(), revision: header.revision() },
        None => Header { cluster: 0, revision: 0 },
    }
}

/// Says each problem once, again every minute while it lasts, and once that it is over.
#[derive(Debug, Default)]
pub(crate) struct Trouble {
    since: Option<Instant>,
    last_reminder: Option<Instant>,
    said: BTreeSet<String>,
}

impl Trouble {
    const REMINDER: Duration = Duration::from_secs(60);
    /// Bounds the memory of what was said.
    const MAX_SAID: usize = 16;

    pub(crate) fn happened(&mut self, what: &'static str, error: &CallError) {
        let now = now();
        let since = *self.since.get_or_insert(now);
        let last = *self.last_reminder.get_or_insert(now);
        if now.duration_since(last) >= Self::REMINDER {
            self.last_reminder = Some(now);
            self.said.clear();
        }
        let text = error.to_string();
        if self.said.len() < Self::MAX_SAID && self.said.insert(text) {
            let error = with_causes(error);
            warn!(error, seconds = now.duration_since(since).as_secs(), "etcd: {what}, retrying");
        }
    }

    pub(crate) fn ended(&mut self, endpoint: &str) {
        if let Some(since) = std::mem::take(self).since {
            info!(endpoint, seconds = now().duration_since(since).as_secs(), "etcd works again");
        }
    }
}

fn with_causes(error: &CallError) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
