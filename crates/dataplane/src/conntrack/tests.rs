//! The queue of addresses against walks that end when the test says so.

use std::sync::{Arc, Mutex};
use std::task::Waker;

use super::*;

/// Walks that were begun, and the ends that the test has given.
#[derive(Debug, Default)]
struct Shared {
    begun: Vec<Vec<String>>,
    end: Option<Result<Walk, WalkError>>,
}

#[derive(Clone, Debug, Default)]
struct Manual(Arc<Mutex<Shared>>);

impl Transport for Manual {
    fn start(&mut self, addresses: &BTreeSet<IpAddr>) {
        self.0.lock().unwrap().begun.push(addresses.iter().map(ToString::to_string).collect());
    }

    fn poll_end(&mut self, _context: &mut Context<'_>) -> Poll<Result<Walk, WalkError>> {
        self.0.lock().unwrap().end.take().map_or(Poll::Pending, Poll::Ready)
    }
}

struct Bed {
    manual: Manual,
    conntrack: Conntrack,
    now: Instant,
}

impl Bed {
    fn new() -> Self {
        let manual = Manual::default();
        let conntrack = Conntrack::with_transport(Box::new(manual.clone()));
        Self { manual, conntrack, now: Instant::now() }
    }

    fn forget(&mut self, addresses: &[&str]) {
        for address in addresses {
            self.conntrack.forget(address.parse().unwrap());
        }
        self.conntrack.start(self.now);
    }

    fn done(&mut self) -> Vec<String> {
        let mut context = Context::from_waker(Waker::noop());
        match self.conntrack.poll_done(&mut context, self.now) {
            Poll::Ready(done) => done.iter().map(ToString::to_string).collect(),
            Poll::Pending => Vec::new(),
        }
    }

    fn end(&mut self, outcome: Result<Walk, WalkError>) -> Vec<String> {
        self.manual.0.lock().unwrap().end = Some(outcome);
        self.done()
    }

    fn begun(&self) -> Vec<Vec<String>> {
        std::mem::take(&mut self.manual.0.lock().unwrap().begun)
    }

    fn holds(&self, address: &str) -> bool {
        self.conntrack.holds(address.parse().unwrap())
    }
}

fn walked() -> Result<Walk, WalkError> {
    Ok(Walk { seen: 10, removed: 2, took: Duration::from_millis(5) })
}

fn broken() -> Result<Walk, WalkError> {
    Err(WalkError::Failed("no answer".to_owned()))
}

/// U14.c: one walk, whatever the number of addresses.
#[test]
fn one_walk_serves_all_addresses_and_what_comes_meanwhile_goes_into_the_next() {
    let mut bed = Bed::new();
    bed.forget(&["10.0.0.1", "fd10::1", "10.0.0.2"]);
    bed.forget(&["10.0.0.3"]);
    bed.forget(&["10.0.0.1"]);
    assert_eq!(bed.begun(), [["10.0.0.1", "10.0.0.2", "fd10::1"]]);
    assert_eq!(bed.done().len(), 0);
    // The walk may have passed the flows that 10.0.0.1 got since.
    assert_eq!(bed.end(walked()), ["10.0.0.2", "fd10::1"]);
    assert!(bed.holds("10.0.0.1") && bed.holds("10.0.0.3") && !bed.holds("10.0.0.2"));
    assert_eq!(bed.begun(), [["10.0.0.1", "10.0.0.3"]]);
    assert_eq!(bed.end(walked()), ["10.0.0.1", "10.0.0.3"]);
    assert!(bed.conntrack.is_idle() && bed.begun().is_empty());
    let Totals { walks, seen, removed, .. } = bed.conntrack.totals();
    assert_eq!((walks, seen, removed), (2, 20, 4));
}

#[test]
fn a_walk_that_fails_is_tried_three_more_times_with_pauses() {
    let mut bed = Bed::new();
    bed.forget(&["10.0.0.1"]);
    for attempt in 1..4 {
        assert_eq!(bed.begun().len(), 1, "attempt {attempt}");
        assert_eq!(bed.end(broken()).len(), 0);
        assert!(bed.holds("10.0.0.1"));
        let due = bed.conntrack.next_due().unwrap();
        bed.conntrack.start(bed.now);
        assert_eq!(bed.begun().len(), 0, "not at once");
        bed.now = due;
        bed.conntrack.start(bed.now);
    }
    bed.begun();
    assert_eq!(bed.end(broken()), ["10.0.0.1"], "given up: its route must not wait for ever");
    assert!(bed.conntrack.is_idle());
    assert_eq!((bed.conntrack.next_due(), bed.conntrack.totals().failed_walks), (None, 4));
}

#[test]
fn a_failed_address_does_not_take_attempts_from_one_that_came_later() {
    let mut bed = Bed::new();
    bed.forget(&["10.0.0.1"]);
    for _ in 0..3 {
        bed.end(broken());
        bed.now += Duration::from_secs(10);
        bed.conntrack.start(bed.now);
    }
    bed.forget(&["10.0.0.2"]);
    assert_eq!(bed.end(broken()), ["10.0.0.1"]);
    assert!(bed.holds("10.0.0.2"));
    bed.now += Duration::from_secs(10);
    bed.conntrack.start(bed.now);
    assert_eq!(bed.end(walked()), ["10.0.0.2"]);
}

#[test]
fn a_kernel_that_does_not_let_us_keeps_no_route_waiting() {
    let mut bed = Bed::new();
    for _ in 0..2 {
        bed.forget(&["10.0.0.1"]);
        let refused = Err(WalkError::Unsupported("invalid argument".to_owned()));
        assert_eq!(bed.end(refused), ["10.0.0.1"]);
        assert!(bed.conntrack.unsupported && bed.conntrack.next_due().is_none());
    }
    bed.forget(&["10.0.0.1"]);
    bed.end(walked());
    assert!(!bed.conntrack.unsupported, "said again if it comes back");
}

#[test]
fn a_thread_walks_and_wakes_whoever_waits() {
    testkit::kernel_test!();
    testkit::netns::in_new_netns(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let mut conntrack = Conntrack::new(&Options::default());
        for round in 1..3 {
            conntrack.forget("10.65.0.2".parse().unwrap());
            conntrack.start(Instant::now());
            let done = std::future::poll_fn(|context| conntrack.poll_done(context, Instant::now()));
            let done = runtime.block_on(async { tokio::time::timeout(Duration::from_secs(30), done).await }).unwrap();
            assert_eq!((done.len(), conntrack.totals().walks), (1, round));
        }
    });
}
