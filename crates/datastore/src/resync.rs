//! List and watch of one prefix as a state machine without I/O (datastore.md 6).
//!
//! Fed by [`crate::watch`], which asks [`Resync::next`] what to do, does it, and hands the [`Answer`] to
//! [`Resync::handle`]. Feeds [`crate::decode`] with [`Event`]s. Time is an argument and randomness is injected.
//!
//! Invariants:
//!
//! * The events are at every moment a valid difference: whoever applies them holds, when the state is
//!   [`SyncState::InSync`] and the watch has caught up, exactly what the store holds (S-14).
//! * A vanished key is reported only after a list of the whole prefix at one revision is complete (I3). A list that
//!   is interrupted reports puts and nothing else.
//! * Equality of `mod_revision` is the only test for "already delivered" (S-6), as long as the store continues the
//!   history that was seen before. When it does not (another cluster, or a revision that went back, which is what
//!   a restored backup looks like), everything listed is delivered again. Not recognised is a store of the same
//!   cluster id that was rebuilt and has, before the watch is resumed, outrun every revision seen.
//! * The resume point never moves back (H-10) and only ever names a revision of which everything was handled.
//! * Memory is proportional to the number of keys (I7): the machine keeps keys and revisions, never values.
//!
//! About the resume point (S-21). A revision may arrive in several messages (E4), and a message does not say whether
//! it is the last one of its revision. So two revisions are kept: `highest`, of which something was handled, and
//! `complete`, up to which everything was. A revision is complete when a later one, a progress notification, or a
//! list says so. Watches resume at `complete` itself: if history after it is gone, the server says so, because the
//! compacted revision is then greater. Events up to `complete` are ignored, the rest is compared key by key.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use tracing::{info, warn};

/// State of the synchronisation, as metrics, health and logs name it (S-1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SyncState {
    /// Not connected: at start, and after ten minutes without success. Everything delivered stays in force.
    WaitForReady,
    /// A list is under way.
    Resync,
    /// The list is complete and the watch follows the store.
    InSync,
}

impl SyncState {
    /// The word of the reference's logs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::WaitForReady => "wait-for-ready",
            Self::Resync => "resync",
            Self::InSync => "in-sync",
        }
    }

    /// Value of the metric `felix_resync_state`.
    pub const fn metric(self) -> u8 {
        match self {
            Self::WaitForReady => 1,
            Self::Resync => 2,
            Self::InSync => 3,
        }
    }
}

/// What happened to the prefix, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The key is new or changed.
    Put { key: Vec<u8>, value: Vec<u8>, mod_revision: i64 },
    /// A key that was delivered before is gone.
    Delete { key: Vec<u8> },
    /// Everything that led to this state was reported before (S-1).
    State(SyncState),
}

/// What the shell must do now. The same request is repeated until it is answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// Read one page; answer with [`Answer::Page`], [`Answer::ListFailed`] or [`Answer::ListCompacted`].
    List(ListRequest),
    /// Start a watch of the prefix; answer with [`Answer::WatchCreated`], [`Answer::WatchFailed`] or
    /// [`Answer::WatchCompacted`].
    Watch { from_revision: i64 },
    /// Read the next message of the running watch; answer with any of the watch answers.
    Read,
    /// Nothing before this moment, for the given reason.
    Wait { until: Instant, reason: &'static str },
}

/// One page of a list: keys from `start` (inclusive) to `end` (exclusive).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListRequest {
    pub start: Vec<u8>,
    pub end: Vec<u8>,
    /// 0 asks for the newest; all further pages name the revision of the first.
    pub revision: i64,
    /// Greatest number of keys wanted.
    pub limit: i64,
}

/// What came back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    Page {
        header: Header,
        entries: Vec<Entry>,
        /// There are keys after the last entry.
        more: bool,
    },
    ListFailed,
    /// The revision of the list was compacted while its pages were read (E6).
    ListCompacted,
    WatchCreated(Header),
    WatchEvents(Vec<Change>),
    /// Everything up to this revision was delivered. Only for servers that can be trusted with it (E10).
    WatchProgress {
        revision: i64,
    },
    /// The resume point was compacted (E7).
    WatchCompacted,
    /// The watch could not be started, ended, or was cancelled for another reason than compaction.
    WatchFailed,
}

/// What the machine needs of a response header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// 0 if unknown; proxies leave it out.
    pub cluster: u64,
    /// The store's revision when it answered.
    pub revision: i64,
}

/// A listed key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub key: Vec<u8>,
    pub value: Vec<u8>,
    pub mod_revision: i64,
}

/// A watched change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    pub key: Vec<u8>,
    /// `None` is a deletion.
    pub value: Option<Vec<u8>>,
    pub mod_revision: i64,
}

/// Parameters of the machine. The default is what the product uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pace {
    /// Keys per page. Small pages are quadratic on etcd 3.4 (performance.md 4.8).
    pub page_size: i64,
    /// Smallest distance between the starts of two lists, and of two watches (S-13).
    pub min_gap: Duration,
    /// Delay after the first failure; doubles with each further one. Half of each delay is random.
    pub first_delay: Duration,
    /// Longest delay between attempts.
    pub max_delay: Duration,
    /// Without success for this long the state becomes [`SyncState::WaitForReady`] (S-12).
    pub disconnected_after: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            page_size: 5_000,
            min_gap: Duration::from_millis(500),
            first_delay: Duration::from_secs(1),
            max_delay: Duration::from_secs(4),
            disconnected_after: Duration::from_secs(600),
        }
    }
}

/// A watch that lived this long was healthy: its end is answered without delay.
const HEALTHY_AFTER: Duration = Duration::from_secs(10);

/// So many failures in a row of one page begin the list anew, in case its revision is what is wrong.
const FAILURES_BEFORE_NEW_LIST: u32 = 5;

/// Revision of a delivered key whose history is no longer comparable. Real revisions are greater.
const UNKNOWN_REVISION: i64 = 0;

/// See the [module documentation](self).
#[derive(Debug)]
pub struct Resync {
    prefix: Vec<u8>,
    prefix_end: Vec<u8>,
    pace: Pace,
    rng: fastrand::Rng,

    phase: Phase,
    state: SyncState,
    /// Everything delivered and not deleted, by key without the prefix.
    delivered: BTreeMap<Box<[u8]>, Delivered>,
    /// Everything up to this revision was handled: where a watch resumes.
    complete: i64,
    /// Something of this revision was handled.
    highest: i64,
    /// Cluster of the last complete first page; 0 if unknown.
    cluster: u64,
    list_number: u32,

    not_before: Option<Instant>,
    last_list: Option<Instant>,
    last_watch: Option<Instant>,
    failures: u32,
    failing_since: Option<Instant>,
}

#[derive(Clone, Copy, Debug)]
struct Delivered {
    mod_revision: i64,
    /// Number of the last list that contained the key, or was current when a watch delivered it.
    list: u32,
}

#[derive(Clone, Debug)]
enum Phase {
    ListDue,
    /// `revision` is 0 until the first page has come.
    Listing {
        revision: i64,
        start: Vec<u8>,
    },
    WatchDue,
    WatchStarting,
    Watching {
        since: Instant,
    },
}

impl Resync {
    /// Returns a machine for all keys that begin with `prefix`.
    pub fn new(prefix: &[u8], pace: Pace, rng: fastrand::Rng) -> Self {
        Self {
            prefix: prefix.to_vec(),
            prefix_end: end_of_prefix(prefix),
            pace,
            rng,
            phase: Phase::ListDue,
            state: SyncState::WaitForReady,
            delivered: BTreeMap::new(),
            complete: 0,
            highest: 0,
            cluster: 0,
            list_number: 0,
            not_before: None,
            last_list: None,
            last_watch: None,
            failures: 0,
            failing_since: None,
        }
    }

    /// The state last reported; [`SyncState::WaitForReady`] at the beginning.
    pub fn state(&self) -> SyncState {
        self.state
    }

    /// Number of keys that are delivered and not deleted.
    pub fn len(&self) -> usize {
        self.delivered.len()
    }

    pub fn is_empty(&self) -> bool {
        self.delivered.is_empty()
    }

    /// Returns what to do at `now`.
    #[must_use]
    pub fn next(&mut self, now: Instant) -> Next {
        match &self.phase {
            Phase::ListDue => {
                let gap = self.last_list.map(|at| at + self.pace.min_gap);
                if let Some(until) = gap.max(self.not_before).filter(|until| *until > now) {
                    return Next::Wait { until, reason: "next list" };
                }
                self.last_list = Some(now);
                self.list_number = self.list_number.wrapping_add(1);
                self.phase = Phase::Listing { revision: 0, start: self.prefix.clone() };
                self.list_request(0, self.prefix.clone())
            }
            Phase::Listing { revision, start } => {
                if let Some(until) = self.not_before.filter(|until| *until > now) {
                    return Next::Wait { until, reason: "next attempt to list" };
                }
                self.list_request(*revision, start.clone())
            }
            Phase::WatchDue => {
                let gap = self.last_watch.map(|at| at + self.pace.min_gap);
                if let Some(until) = gap.max(self.not_before).filter(|until| *until > now) {
                    return Next::Wait { until, reason: "next attempt to watch" };
                }
                self.last_watch = Some(now);
                self.phase = Phase::WatchStarting;
                Next::Watch { from_revision: self.complete }
            }
            Phase::WatchStarting => Next::Watch { from_revision: self.complete },
            Phase::Watching { .. } => Next::Read,
        }
    }

    /// Takes the answer to the request most recently returned by [`Self::next`] and appends what follows from it to
    /// `out`. An answer that does not fit the request changes nothing.
    pub fn handle(&mut self, answer: Answer, now: Instant, out: &mut Vec<Event>) {
        let phase = self.phase.clone();
        match (phase, answer) {
            (Phase::Listing { revision, start }, Answer::Page { header, entries, more }) => {
                self.on_page(revision, start, header, entries, more, now, out);
            }
            (Phase::Listing { .. }, Answer::ListFailed) => self.on_list_failed(now, out),
            (Phase::Listing { .. }, Answer::ListCompacted) => {
                info!("history was compacted while listing, starting over");
                self.phase = Phase::ListDue;
            }
            (Phase::WatchStarting, Answer::WatchCreated(header)) => self.on_watch_created(header, now, out),
            (Phase::Watching { .. }, Answer::WatchEvents(changes)) => self.on_changes(changes, out),
            (Phase::Watching { .. }, Answer::WatchProgress { revision }) => {
                self.succeeded();
                if revision >= self.highest {
                    self.highest = revision;
                    self.complete = revision;
                }
            }
            (Phase::WatchStarting | Phase::Watching { .. }, Answer::WatchCompacted) => {
                info!(resume_revision = self.complete, "history after the resume point was compacted, listing anew");
                self.relist(out);
            }
            (Phase::WatchStarting, Answer::WatchFailed) => {
                self.phase = Phase::WatchDue;
                self.failed(now, out);
            }
            (Phase::Watching { since }, Answer::WatchFailed) => {
                self.phase = Phase::WatchDue;
                if now.saturating_duration_since(since) >= HEALTHY_AFTER {
                    self.failures = 0;
                    self.not_before = None;
                    self.failing_since.get_or_insert(now);
                } else {
                    self.failed(now, out);
                }
            }
            (phase, answer) => debug_assert!(false, "{answer:?} does not answer {phase:?}"),
        }
    }

    fn list_request(&self, revision: i64, start: Vec<u8>) -> Next {
        Next::List(ListRequest { start, end: self.prefix_end.clone(), revision, limit: self.pace.page_size })
    }

    // === lists ===

    #[expect(clippy::too_many_arguments, reason = "the fields of one answer and of the request it belongs to")]
    fn on_page(
        &mut self,
        mut revision: i64,
        start: Vec<u8>,
        header: Header,
        entries: Vec<Entry>,
        more: bool,
        now: Instant,
        out: &mut Vec<Event>,
    ) {
        if revision == 0 {
            revision = header.revision;
            if self.is_other_cluster(header) || revision < self.highest {
                self.forget_revisions(header);
            }
            if header.cluster != 0 {
                self.cluster = header.cluster;
            }
            self.highest = revision;
        } else if self.is_other_cluster(header) {
            // The pages before came from somewhere else.
            self.phase = Phase::ListDue;
            return;
        }
        // A page that does not advance would be asked for again without end.
        let next_start = entries.last().map(|entry| key_after(&entry.key));
        let advances = next_start.as_ref().is_some_and(|next| *next > start);
        if revision <= 0 || (more && !advances) {
            warn!(revision, more, "etcd sent a page that cannot be part of a list");
            self.on_list_failed(now, out);
            return;
        }

        self.succeeded();
        self.become_state(SyncState::Resync, out);
        for Entry { key, value, mod_revision } in entries {
            self.admit(key, value, mod_revision, out);
        }
        match next_start {
            Some(start) if more => self.phase = Phase::Listing { revision, start },
            Some(_) | None => self.finish_list(revision, out),
        }
    }

    fn finish_list(&mut self, revision: i64, out: &mut Vec<Event>) {
        let list = self.list_number;
        let before = self.delivered.len();
        let prefix = &self.prefix;
        self.delivered.retain(|suffix, delivered| {
            let stays = delivered.list == list;
            if !stays {
                out.push(Event::Delete { key: [prefix, &**suffix].concat() });
            }
            stays
        });
        self.complete = revision;
        self.highest = revision;
        self.phase = Phase::WatchDue;
        info!(revision, objects = self.delivered.len(), vanished = before - self.delivered.len(), "list complete");
        self.become_state(SyncState::InSync, out);
    }

    fn on_list_failed(&mut self, now: Instant, out: &mut Vec<Event>) {
        self.failed(now, out);
        if self.failures.is_multiple_of(FAILURES_BEFORE_NEW_LIST) {
            self.phase = Phase::ListDue;
        }
    }

    fn relist(&mut self, out: &mut Vec<Event>) {
        self.phase = Phase::ListDue;
        self.not_before = None;
        // While disconnected the state changes with the first page instead (S-3).
        if self.state == SyncState::InSync {
            self.become_state(SyncState::Resync, out);
        }
    }

    /// Makes the next list deliver everything, whatever its revisions are.
    fn forget_revisions(&mut self, header: Header) {
        if self.delivered.is_empty() {
            return;
        }
        warn!(
            cluster = format_args!("{:x}", header.cluster),
            revision = header.revision,
            seen_revision = self.highest,
            "the store does not continue the history seen so far (restored or replaced), reading all of it anew"
        );
        for delivered in self.delivered.values_mut() {
            delivered.mod_revision = UNKNOWN_REVISION;
        }
    }

    fn is_other_cluster(&self, header: Header) -> bool {
        header.cluster != 0 && self.cluster != 0 && header.cluster != self.cluster
    }

    // === watches ===

    fn on_watch_created(&mut self, header: Header, now: Instant, out: &mut Vec<Event>) {
        self.failing_since = None;
        self.not_before = None;
        if self.is_other_cluster(header) || header.revision < self.highest {
            // Either a restored store or a member that lags behind; the list, which the leader confirms, decides.
            info!(revision = header.revision, seen_revision = self.highest, "the store is behind, listing anew");
            self.relist(out);
            return;
        }
        self.phase = Phase::Watching { since: now };
        // A watch that resumes after a long break brings what was missed; nothing needs to be listed.
        self.become_state(SyncState::InSync, out);
    }

    fn on_changes(&mut self, changes: Vec<Change>, out: &mut Vec<Event>) {
        self.succeeded();
        for Change { key, value, mod_revision } in changes {
            if mod_revision <= self.complete {
                continue;
            }
            if mod_revision > self.highest {
                self.complete = self.highest;
                self.highest = mod_revision;
            }
            match value {
                Some(value) => self.admit(key, value, mod_revision, out),
                None => self.remove(key, mod_revision, out),
            }
        }
    }

    fn admit(&mut self, key: Vec<u8>, value: Vec<u8>, mod_revision: i64, out: &mut Vec<Event>) {
        let list = self.list_number;
        let Some(suffix) = key.strip_prefix(self.prefix.as_slice()) else {
            return;
        };
        if let Some(delivered) = self.delivered.get_mut(suffix) {
            delivered.list = list;
            // While watching, an older revision is a replay; a list is always right.
            let watching = matches!(self.phase, Phase::Watching { .. });
            if delivered.mod_revision == mod_revision || (watching && delivered.mod_revision > mod_revision) {
                return;
            }
            delivered.mod_revision = mod_revision;
        } else {
            self.delivered.insert(suffix.into(), Delivered { mod_revision, list });
        }
        out.push(Event::Put { key, value, mod_revision });
    }

    fn remove(&mut self, key: Vec<u8>, mod_revision: i64, out: &mut Vec<Event>) {
        let Some(suffix) = key.strip_prefix(self.prefix.as_slice()) else {
            return;
        };
        let current = self.delivered.get(suffix).is_some_and(|delivered| delivered.mod_revision < mod_revision);
        if current {
            self.delivered.remove(suffix);
            out.push(Event::Delete { key });
        }
    }

    // === success and failure ===

    fn succeeded(&mut self) {
        self.failures = 0;
        self.failing_since = None;
        self.not_before = None;
    }

    /// Plans the next attempt and notices when nothing has worked for too long (S-12). Nothing is deleted.
    fn failed(&mut self, now: Instant, out: &mut Vec<Event>) {
        let since = *self.failing_since.get_or_insert(now);
        let doubled = self.pace.first_delay.saturating_mul(1 << self.failures.min(16));
        let delay = doubled.min(self.pace.max_delay);
        self.failures = self.failures.saturating_add(1);
        self.not_before = Some(now + delay.mul_f64(0.5 + 0.5 * self.rng.f64()));
        if now.saturating_duration_since(since) >= self.pace.disconnected_after {
            self.become_state(SyncState::WaitForReady, out);
        }
    }

    fn become_state(&mut self, state: SyncState, out: &mut Vec<Event>) {
        if self.state != state {
            self.state = state;
            out.push(Event::State(state));
        }
    }
}

/// The smallest key greater than `key`.
fn key_after(key: &[u8]) -> Vec<u8> {
    [key, &[0]].concat()
}

/// The smallest key greater than all keys that begin with `prefix`; etcd reads `\0` as "no end".
fn end_of_prefix(prefix: &[u8]) -> Vec<u8> {
    let mut end = prefix.to_vec();
    while let Some(last) = end.pop() {
        if last < u8::MAX {
            end.push(last + 1);
            return end;
        }
    }
    vec![0]
}

#[cfg(test)]
#[path = "resync_tests.rs"]
mod tests;
