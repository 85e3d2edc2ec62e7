//! Tests of the machine: single rules first, then any history against a simulated store.

use super::*;

const PREFIX: &[u8] = b"/p/";
const CLUSTER: u64 = 7;

// === single rules ===

#[test]
fn h_09_a_list_reads_all_pages_at_the_revision_of_the_first_and_then_watches_from_it() {
    let mut test = Test::new();
    let first = ListRequest { start: b"/p/".into(), end: b"/p0".into(), revision: 0, limit: 2 };
    assert_eq!(test.next(), Next::List(first));
    test.tell(page(50, &[("a", 3), ("b", 50)], true));
    let second = ListRequest { start: b"/p/b\0".into(), end: b"/p0".into(), revision: 50, limit: 2 };
    assert_eq!(test.next(), Next::List(second));
    assert_eq!(test.take(), "resync +a@3 +b@50");
    test.tell(page(58, &[("c", 7)], false));
    assert_eq!(test.take(), "+c@7 in-sync");
    assert_eq!(test.next(), Next::Watch { from_revision: 50 });
    test.tell(created(58));
    assert_eq!(test.next(), Next::Read);
    test.tell(changes(&[("b", 50, true), ("b", 55, false), ("d", 58, true)]));
    assert_eq!(test.take(), "-b +d@58");
}

#[test]
fn an_empty_prefix_is_in_sync() {
    let mut test = Test::new();
    assert!(matches!(test.next(), Next::List(_)));
    test.tell(page(1, &[], false));
    assert_eq!(test.take(), "resync in-sync");
}

#[test]
fn a_request_is_repeated_until_it_is_answered() {
    let mut test = Test::new();
    let list = test.next();
    assert_eq!(test.next(), list);
    test.tell(page(5, &[], false));
    let watch = test.next();
    assert_eq!(test.next(), watch);
}

#[test]
fn a_failed_page_is_asked_for_again_and_nothing_is_deleted_before_the_list_is_complete() {
    let mut test = Test::watching(50, &[("a", 3), ("b", 4), ("c", 5)]);
    test.tell(Answer::WatchCompacted);
    assert!(matches!(test.next_after_waiting(), Next::List(_)));
    test.tell(page(60, &[("b", 55), ("c", 5)], true));
    assert_eq!(test.take(), "resync +b@55");
    let request = test.next();
    for _ in 0..FAILURES_BEFORE_NEW_LIST - 1 {
        test.tell(Answer::ListFailed);
        assert!(matches!(test.next(), Next::Wait { .. }));
        assert_eq!(test.next_after_waiting(), request);
    }
    assert_eq!(test.take(), "", "a list that is interrupted deletes nothing");
    test.tell(page(99, &[("d", 60)], false));
    assert_eq!(test.take(), "+d@60 -a in-sync");
}

#[test]
fn a_page_that_keeps_failing_begins_the_list_anew() {
    let mut test = Test::new();
    assert!(matches!(test.next(), Next::List(_)));
    test.tell(page(60, &[("a", 1), ("b", 2)], true));
    for _ in 0..FAILURES_BEFORE_NEW_LIST {
        assert!(matches!(test.next_after_waiting(), Next::List(request) if request.revision == 60));
        test.tell(Answer::ListFailed);
    }
    assert!(matches!(test.next_after_waiting(), Next::List(request) if request.revision == 0));
    test.take();
    test.tell(page(60, &[("a", 1), ("b", 2)], true));
    assert_eq!(test.take(), "", "what was delivered is not delivered again");
}

#[test]
fn compaction_of_a_list_begins_it_anew_without_repeating_what_was_delivered() {
    let mut test = Test::new();
    assert!(matches!(test.next(), Next::List(_)));
    test.tell(page(50, &[("a", 3), ("b", 4)], true));
    assert!(matches!(test.next(), Next::List(_)));
    test.tell(Answer::ListCompacted);
    assert_eq!(test.take(), "resync +a@3 +b@4");
    assert!(matches!(test.next_after_waiting(), Next::List(request) if request.revision == 0));
    test.tell(page(70, &[("b", 66), ("c", 70)], false));
    assert_eq!(test.take(), "+b@66 +c@70 -a in-sync");
}

#[test]
fn h_07_compaction_of_the_resume_point_lists_at_once_and_only_once() {
    let mut test = Test::watching(50, &[("a", 3), ("b", 4)]);
    test.pass(Duration::from_secs(100));
    test.tell(Answer::WatchCompacted);
    assert!(matches!(test.next(), Next::List(_)), "no delay");
    assert_eq!(test.take(), "resync");
    test.tell(page(90, &[("a", 3)], false));
    assert_eq!(test.take(), "-b in-sync");
    assert_eq!(test.next(), Next::Watch { from_revision: 90 });
}

#[test]
fn a_healthy_watch_that_breaks_resumes_at_once_and_keeps_the_state() {
    let mut test = Test::watching(50, &[("a", 3)]);
    test.pass(Duration::from_secs(3600));
    test.tell(Answer::WatchFailed);
    assert_eq!(test.next(), Next::Watch { from_revision: 50 });
    test.tell(created(50));
    assert_eq!(test.take(), "");
}

/// A revision may come in several messages, and the stream may break between them.
#[test]
fn a_revision_that_may_be_incomplete_is_asked_for_again() {
    let mut test = Test::watching(50, &[("a", 3), ("b", 4)]);
    test.tell(changes(&[("a", 60, true), ("a", 70, true), ("x", 70, true)]));
    test.break_watch();
    assert_eq!(test.next_after_waiting(), Next::Watch { from_revision: 60 });
    test.tell(created(75));
    // The server sends from the resume point on: what was handled is silent, what was cut off is not.
    test.tell(changes(&[("a", 60, true), ("a", 70, true), ("b", 70, false), ("x", 70, true)]));
    assert_eq!(test.take(), "+a@60 +a@70 +x@70 -b");
    test.tell(changes(&[("a", 75, false)]));
    test.break_watch();
    assert_eq!(test.next_after_waiting(), Next::Watch { from_revision: 70 });
}

/// S-21: with 50 compacted, the server no longer knows of a deletion at 50; it was handled.
#[test]
fn events_up_to_the_resume_point_are_ignored() {
    let mut test = Test::watching(50, &[("a", 50)]);
    test.tell(changes(&[("gone", 49, true), ("a", 50, true), ("b", 50, true)]));
    assert_eq!(test.take(), "");
}

#[test]
fn progress_moves_the_resume_point_and_never_back() {
    let mut test = Test::watching(50, &[]);
    test.tell(changes(&[("a", 60, true)]));
    test.tell(Answer::WatchProgress { revision: 500 });
    test.tell(Answer::WatchProgress { revision: 55 });
    test.break_watch();
    assert_eq!(test.next_after_waiting(), Next::Watch { from_revision: 500 });
}

/// The reference began again before the deletion, for ever. Whether a value is damaged is not even known here.
#[test]
fn h_10_the_resume_point_never_steps_back_behind_a_deletion() {
    let mut test = Test::watching(50, &[("a", 3)]);
    test.tell(changes(&[("a", 60, false), ("b", 61, true), ("c", 62, true)]));
    assert_eq!(test.take(), "-a +b@61 +c@62");
    test.break_watch();
    let Next::Watch { from_revision } = test.next_after_waiting() else { panic!("a watch") };
    assert!(from_revision >= 61, "{from_revision}");
    test.tell(created(62));
    test.tell(changes(&[("c", 62, true), ("d", 63, true)]));
    assert_eq!(test.take(), "+d@63");
}

#[test]
fn ten_minutes_without_success_change_the_state_and_delete_nothing() {
    let mut test = Test::watching(50, &[("a", 3)]);
    test.pass(Duration::from_secs(3600));
    test.tell(Answer::WatchFailed);
    let lost = test.now;
    while test.take().is_empty() {
        assert!(test.now < lost + Duration::from_secs(700));
        assert_eq!(test.next_after_waiting(), Next::Watch { from_revision: 50 });
        test.tell(Answer::WatchFailed);
        if !test.events.is_empty() {
            assert_eq!(test.events, [Event::State(SyncState::WaitForReady)]);
            assert!(test.now >= lost + Duration::from_secs(600));
        }
    }
    // Everything is still known, so the watch just goes on.
    assert_eq!(test.next_after_waiting(), Next::Watch { from_revision: 50 });
    test.tell(created(80));
    test.tell(changes(&[("a", 77, false)]));
    assert_eq!(test.take(), "in-sync -a");
}

#[test]
fn a_list_after_a_long_break_goes_through_resync() {
    let mut test = Test::watching(50, &[("a", 3), ("b", 4)]);
    test.pass(Duration::from_secs(3600));
    test.tell(Answer::WatchFailed);
    test.pass(Duration::from_secs(601));
    assert!(matches!(test.next(), Next::Watch { .. }));
    test.tell(Answer::WatchFailed);
    assert_eq!(test.take(), "wait-for-ready");
    assert!(matches!(test.next_after_waiting(), Next::Watch { .. }));
    test.tell(Answer::WatchCompacted);
    assert_eq!(test.take(), "", "still not connected");
    assert!(matches!(test.next_after_waiting(), Next::List(_)));
    test.tell(Answer::ListFailed);
    assert_eq!(test.take(), "");
    assert!(matches!(test.next_after_waiting(), Next::List(_)));
    test.tell(page(90, &[("b", 4)], false));
    assert_eq!(test.take(), "resync -a in-sync");
}

/// A store restored from a backup reuses revisions, so equal revisions prove nothing.
#[test]
fn a_store_that_does_not_continue_the_history_is_read_anew_as_a_difference() {
    for (cluster, revision) in [(CLUSTER, 40), (CLUSTER + 1, 40), (CLUSTER + 1, 400)] {
        let mut test = Test::watching(50, &[("a", 3), ("b", 4), ("c", 45)]);
        test.break_watch();
        assert!(matches!(test.next_after_waiting(), Next::Watch { .. }));
        test.tell(Answer::WatchCreated(Header { cluster, revision }));
        assert!(matches!(test.next_after_waiting(), Next::List(_)));
        let entries = entries(&[("a", 3), ("b", 4)]);
        test.tell(Answer::Page { header: Header { cluster, revision }, entries, more: false });
        assert_eq!(test.take(), "resync +a@3 +b@4 -c in-sync", "cluster {cluster} revision {revision}");
        assert_eq!(test.next_after_waiting(), Next::Watch { from_revision: revision });
    }
}

#[test]
fn pages_of_different_clusters_are_not_mixed() {
    let mut test = Test::watching(50, &[("a", 3)]);
    test.tell(Answer::WatchCompacted);
    assert!(matches!(test.next_after_waiting(), Next::List(_)));
    test.tell(page(60, &[("a", 3), ("b", 4)], true));
    assert!(matches!(test.next(), Next::List(_)));
    let header = Header { cluster: CLUSTER + 1, revision: 60 };
    test.tell(Answer::Page { header, entries: vec![], more: false });
    assert_eq!(test.take(), "resync +b@4", "no deletion on the strength of two halves");
    assert!(matches!(test.next_after_waiting(), Next::List(request) if request.revision == 0));
}

/// A member that lags behind looks the same at first, but its list is confirmed by the leader.
#[test]
fn a_member_that_lags_behind_costs_one_list_and_no_events() {
    let mut test = Test::watching(50, &[("a", 3)]);
    test.break_watch();
    assert!(matches!(test.next_after_waiting(), Next::Watch { .. }));
    test.tell(created(45));
    assert!(matches!(test.next_after_waiting(), Next::List(_)));
    test.tell(page(50, &[("a", 3)], false));
    assert_eq!(test.take(), "resync in-sync");
}

#[test]
fn a_proxy_that_hides_the_cluster_is_no_other_cluster() {
    let mut test = Test::watching(50, &[("a", 3)]);
    test.break_watch();
    assert!(matches!(test.next_after_waiting(), Next::Watch { .. }));
    test.tell(Answer::WatchCreated(Header { cluster: 0, revision: 50 }));
    assert_eq!(test.next(), Next::Read);
}

#[test]
fn pages_that_make_no_sense_are_failures() {
    let bad = [
        page(0, &[("a", 3)], false),
        page(50, &[], true),
        Answer::Page { header: Header { cluster: CLUSTER, revision: 50 }, entries: entries(&[("", 1)]), more: true },
    ];
    for (n, answer) in bad.into_iter().enumerate() {
        let mut test = Test::new();
        assert!(matches!(test.next(), Next::List(_)));
        if n == 2 {
            // A later page that goes back to the beginning.
            test.tell(page(50, &[("a", 1), ("b", 2)], true));
            test.take();
            assert!(matches!(test.next(), Next::List(_)));
        }
        test.tell(answer);
        assert_eq!(test.take(), "", "case {n}");
        assert!(matches!(test.next(), Next::Wait { .. }), "case {n}");
    }
}

#[test]
fn delays_grow_to_a_limit_and_are_partly_random() {
    let mut seen = Vec::new();
    for seed in 0..20 {
        let mut test = Test::with_seed(seed);
        let mut delays = Vec::new();
        for _ in 0..8 {
            assert!(matches!(test.next_after_waiting(), Next::List(_)));
            let before = test.now;
            test.tell(Answer::ListFailed);
            let Next::Wait { until, .. } = test.next() else { panic!("no delay") };
            delays.push((until - before).as_secs_f64());
        }
        for (n, delay) in delays.iter().enumerate() {
            let full = [1.0, 2.0, 4.0].get(n).copied().unwrap_or(4.0);
            assert!((full / 2.0..=full).contains(delay), "attempt {n}: {delay}");
        }
        seen.push(delays[0].to_bits());
    }
    seen.sort_unstable();
    seen.dedup();
    assert!(seen.len() > 15, "hosts must not retry in step");
}

/// S-13, also when every attempt "succeeds".
#[test]
fn watches_that_break_at_once_are_started_half_a_second_apart_at_least() {
    let mut test = Test::watching(50, &[]);
    let mut last = test.now;
    for _ in 0..20 {
        test.tell(Answer::WatchFailed);
        assert!(matches!(test.next_after_waiting(), Next::Watch { .. }));
        assert!(test.now - last >= Duration::from_millis(500));
        last = test.now;
        test.tell(created(50));
    }
}

#[test]
fn lists_that_are_compacted_at_once_are_started_half_a_second_apart() {
    let mut test = Test::new();
    let mut last = None;
    for _ in 0..10 {
        assert!(matches!(test.next_after_waiting(), Next::List(_)));
        assert!(last.is_none_or(|last| test.now - last >= Duration::from_millis(500)));
        last = Some(test.now);
        test.tell(Answer::ListCompacted);
    }
}

#[test]
fn the_end_of_a_prefix_is_the_next_text_of_its_length_or_shorter() {
    assert_eq!(end_of_prefix(b"/p/"), b"/p0");
    assert_eq!(end_of_prefix(b"a\xff\xff"), b"b");
    assert_eq!(end_of_prefix(b"\xff"), b"\0");
    assert_eq!(end_of_prefix(b""), b"\0");
}

/// Plays the shell: owns the time and collects the events.
struct Test {
    machine: Resync,
    now: Instant,
    events: Vec<Event>,
}

impl Test {
    fn new() -> Self {
        Self::with_seed(1)
    }

    fn with_seed(seed: u64) -> Self {
        let pace = Pace { page_size: 2, ..Pace::default() };
        let machine = Resync::new(PREFIX, pace, fastrand::Rng::with_seed(seed));
        Self { machine, now: Instant::now(), events: Vec::new() }
    }

    /// A machine that has listed these keys and watches.
    fn watching(revision: i64, keys: &[(&str, i64)]) -> Self {
        let mut test = Self::new();
        assert!(matches!(test.next(), Next::List(_)));
        test.tell(page(revision, keys, false));
        assert!(matches!(test.next(), Next::Watch { .. }));
        test.tell(created(revision));
        test.take();
        test
    }

    fn next(&mut self) -> Next {
        self.machine.next(self.now)
    }

    fn next_after_waiting(&mut self) -> Next {
        loop {
            match self.next() {
                Next::Wait { until, .. } => self.now = until,
                next @ (Next::List(_) | Next::Watch { .. } | Next::Read) => return next,
            }
        }
    }

    fn tell(&mut self, answer: Answer) {
        self.machine.handle(answer, self.now, &mut self.events);
    }

    fn break_watch(&mut self) {
        self.pass(HEALTHY_AFTER);
        self.tell(Answer::WatchFailed);
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
    }

    /// The events so far as text.
    fn take(&mut self) -> String {
        let name = |key: &[u8]| String::from_utf8_lossy(key.strip_prefix(PREFIX).unwrap()).into_owned();
        let text = |event: Event| match event {
            Event::Put { key, mod_revision, .. } => format!("+{}@{mod_revision}", name(&key)),
            Event::Delete { key } => format!("-{}", name(&key)),
            Event::State(state) => state.as_str().to_owned(),
        };
        std::mem::take(&mut self.events).into_iter().map(text).collect::<Vec<_>>().join(" ")
    }
}

fn page(revision: i64, keys: &[(&str, i64)], more: bool) -> Answer {
    Answer::Page { header: Header { cluster: CLUSTER, revision }, entries: entries(keys), more }
}

fn entries(keys: &[(&str, i64)]) -> Vec<Entry> {
    keys.iter()
        .map(|(key, mod_revision)| Entry { key: full(key), value: vec![], mod_revision: *mod_revision })
        .collect()
}

fn created(revision: i64) -> Answer {
    Answer::WatchCreated(Header { cluster: CLUSTER, revision })
}

/// Key, revision, and whether it is a put.
fn changes(changes: &[(&str, i64, bool)]) -> Answer {
    let change = |(key, mod_revision, put): &(&str, i64, bool)| Change {
        key: full(key),
        value: put.then(Vec::new),
        mod_revision: *mod_revision,
    };
    Answer::WatchEvents(changes.iter().map(change).collect())
}

fn full(key: &str) -> Vec<u8> {
    [PREFIX, key.as_bytes()].concat()
}

// === any history ===

mod any_history {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig { cases: 2_000, ..ProptestConfig::default() })]

        /// Whatever happens to the store and to the connection, the events are a valid difference at every moment,
        /// and end in what the store holds.
        #[test]
        fn the_delivered_stream_always_ends_equal_to_the_store(
            steps in prop::collection::vec(any_step(), 0..60),
            seed in any::<u64>(),
        ) {
            let mut world = World::new(seed);
            for step in steps {
                world.step(step);
            }
            world.heal();
            for _ in 0..2_000 {
                if world.is_caught_up() {
                    break;
                }
                world.act();
            }
            prop_assert!(world.is_caught_up(), "the machine does not get there");
            prop_assert_eq!(&world.delivered, &world.store.at(world.store.revision));
            prop_assert_eq!(world.machine.len(), world.delivered.len());
            prop_assert_eq!(world.machine.state(), SyncState::InSync);
        }
    }

    #[derive(Clone, Debug)]
    enum Step {
        /// One transaction: keys, each put (true) or deleted.
        Write(BTreeMap<u8, bool>),
        /// Writes outside the prefix.
        WriteElsewhere,
        /// Compacts so many revisions before the current one.
        Compact(i64),
        /// So many requests of the machine are served.
        Act(u8),
        BreakWatch,
        /// So many requests fail.
        Fail(u8),
        /// The store goes back so many revisions and becomes another cluster.
        Restore(i64),
        PassSeconds(u64),
    }

    fn any_step() -> impl Strategy<Value = Step> {
        prop_oneof![
            8 => prop::collection::btree_map(0..8u8, any::<bool>(), 1..5).prop_map(Step::Write),
            1 => Just(Step::WriteElsewhere),
            2 => (0..4i64).prop_map(Step::Compact),
            12 => (1..6u8).prop_map(Step::Act),
            2 => Just(Step::BreakWatch),
            2 => (1..8u8).prop_map(Step::Fail),
            1 => (1..6i64).prop_map(Step::Restore),
            1 => (1..700u64).prop_map(Step::PassSeconds),
        ]
    }

    type Content = BTreeMap<Vec<u8>, (Vec<u8>, i64)>;

    /// etcd, as far as it matters here.
    struct Store {
        cluster: u64,
        revision: i64,
        compacted: i64,
        /// Every change there ever was, with its revision; compaction only forbids to look.
        log: Vec<Change>,
    }

    impl Store {
        fn write(&mut self, changes: &BTreeMap<u8, bool>) {
            let now = self.at(self.revision);
            self.revision += 1;
            let mod_revision = self.revision;
            for (n, put) in changes {
                let key = full(&format!("key{n}"));
                let value = put.then(|| format!("{}-{mod_revision}", self.cluster).into_bytes());
                // Deleting what is not there is no change.
                if value.is_some() || now.contains_key(&key) {
                    self.log.push(Change { key, value, mod_revision });
                }
            }
        }

        fn at(&self, revision: i64) -> Content {
            let mut content = Content::new();
            for Change { key, value, mod_revision } in &self.log {
                if *mod_revision > revision {
                    break;
                }
                match value {
                    Some(value) => {
                        content.insert(key.clone(), (value.clone(), *mod_revision));
                    }
                    None => {
                        content.remove(key);
                    }
                }
            }
            content
        }

        fn range(&self, request: &ListRequest) -> Answer {
            let revision = if request.revision == 0 { self.revision } else { request.revision };
            if revision < self.compacted {
                return Answer::ListCompacted;
            }
            if revision > self.revision {
                return Answer::ListFailed;
            }
            let limit = usize::try_from(request.limit).unwrap();
            let content = self.at(revision);
            let mut found = content.range(request.start.clone()..request.end.clone());
            let entries = found.by_ref().take(limit).map(|(key, (value, mod_revision))| Entry {
                key: key.clone(),
                value: value.clone(),
                mod_revision: *mod_revision,
            });
            let entries = entries.collect();
            Answer::Page { header: self.header(), entries, more: found.next().is_some() }
        }

        /// What a watch from `revision` is sent (S-20).
        fn events_from(&self, revision: i64) -> Vec<Change> {
            let sent = |change: &&Change| {
                let lost = change.value.is_none() && change.mod_revision == self.compacted;
                change.mod_revision >= revision && change.key.starts_with(PREFIX) && !lost
            };
            self.log.iter().filter(sent).cloned().collect()
        }

        fn header(&self) -> Header {
            Header { cluster: self.cluster, revision: self.revision }
        }
    }

    #[derive(Debug)]
    enum Stream {
        Broken,
        Compacted,
        /// What the server still has to send, and up to which revision it has looked.
        Open {
            unsent: Vec<Change>,
            looked_until: i64,
        },
    }

    struct World {
        store: Store,
        machine: Resync,
        now: Instant,
        rng: fastrand::Rng,
        failing: u8,
        stream: Stream,
        delivered: Content,
        /// The store was replaced and the machine may deliver equal revisions again.
        replaced: bool,
    }

    impl World {
        fn new(seed: u64) -> Self {
            let mut rng = fastrand::Rng::with_seed(seed);
            let pace = Pace { page_size: rng.i64(1..5), ..Pace::default() };
            Self {
                store: Store { cluster: 1, revision: 1, compacted: 0, log: Vec::new() },
                machine: Resync::new(PREFIX, pace, rng.fork()),
                now: Instant::now(),
                rng,
                failing: 0,
                stream: Stream::Broken,
                delivered: Content::new(),
                replaced: false,
            }
        }

        fn step(&mut self, step: Step) {
            match step {
                Step::Write(changes) => {
                    self.store.write(&changes);
                    self.notify();
                }
                Step::WriteElsewhere => {
                    self.store.revision += 1;
                    self.notify();
                }
                Step::Compact(back) => {
                    self.store.compacted = self.store.compacted.max(self.store.revision - back);
                }
                Step::Act(times) => (0..times).for_each(|_| self.act()),
                Step::BreakWatch => self.stream = Stream::Broken,
                Step::Fail(times) => self.failing = times,
                Step::Restore(back) => {
                    let revision = (self.store.revision - back).max(1);
                    self.store.log.retain(|change| change.mod_revision <= revision);
                    self.store.cluster += 1;
                    self.store.revision = revision;
                    self.store.compacted = self.store.compacted.min(revision);
                    self.stream = Stream::Broken;
                    self.replaced = true;
                }
                Step::PassSeconds(seconds) => self.now += Duration::from_secs(seconds),
            }
        }

        fn heal(&mut self) {
            self.failing = 0;
        }

        /// Serves one request of the machine and checks what it says.
        fn act(&mut self) {
            let next = self.machine.next(self.now);
            let failing = self.failing > 0 && !matches!(next, Next::Wait { .. });
            if failing {
                self.failing -= 1;
            }
            let answer = match next {
                Next::Wait { until, .. } => {
                    assert!(until > self.now, "a wait that is over");
                    self.now = until;
                    return;
                }
                Next::List(_) if failing => Answer::ListFailed,
                Next::Watch { .. } | Next::Read if failing => {
                    self.stream = Stream::Broken;
                    Answer::WatchFailed
                }
                Next::List(request) => self.store.range(&request),
                Next::Watch { from_revision } => {
                    self.stream = if from_revision < self.store.compacted {
                        Stream::Compacted
                    } else {
                        let unsent = self.store.events_from(from_revision);
                        Stream::Open { unsent, looked_until: self.store.revision.max(from_revision - 1) }
                    };
                    Answer::WatchCreated(self.store.header())
                }
                Next::Read => match self.read() {
                    Some(answer) => answer,
                    None => return,
                },
            };
            let may_delete =
                matches!(&answer, Answer::WatchEvents(_)) || matches!(&answer, Answer::Page { more: false, .. });
            let mut events = Vec::new();
            self.machine.handle(answer, self.now, &mut events);
            for event in events {
                self.apply(event, may_delete);
            }
        }

        /// A watch that follows is given each change as it happens, before it can be compacted.
        fn notify(&mut self) {
            if let Stream::Open { unsent, looked_until } = &mut self.stream {
                unsent.extend(self.store.events_from(*looked_until + 1));
                *looked_until = (*looked_until).max(self.store.revision);
            }
        }

        fn read(&mut self) -> Option<Answer> {
            let unsent = match &mut self.stream {
                Stream::Broken => return Some(Answer::WatchFailed),
                Stream::Compacted => return Some(Answer::WatchCompacted),
                Stream::Open { unsent, looked_until: _ } => unsent,
            };
            if unsent.is_empty() {
                let revision = self.store.revision;
                return self.rng.bool().then_some(Answer::WatchProgress { revision });
            }
            // Cut anywhere, also within a revision.
            let size = self.rng.usize(1..=unsent.len());
            Some(Answer::WatchEvents(unsent.drain(..size).collect()))
        }

        fn apply(&mut self, event: Event, may_delete: bool) {
            match event {
                Event::Put { key, value, mod_revision } => {
                    let old = self.delivered.insert(key, (value, mod_revision));
                    let repeated = old.is_some_and(|(_, revision)| revision == mod_revision);
                    assert!(!repeated || self.replaced, "delivered twice");
                }
                Event::Delete { key } => {
                    assert!(may_delete, "deleted on the strength of an incomplete list");
                    assert!(self.delivered.remove(&key).is_some(), "deleted without having been delivered");
                }
                Event::State(_) => {}
            }
        }

        fn is_caught_up(&mut self) -> bool {
            let reading = matches!(self.machine.next(self.now), Next::Read);
            match &self.stream {
                Stream::Open { unsent, looked_until: _ } => reading && unsent.is_empty(),
                Stream::Broken | Stream::Compacted => false,
            }
        }
    }
}
