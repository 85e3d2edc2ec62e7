//! Walks on a thread of their own, so that a table of a million flows keeps no commit waiting.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use super::walk::walk;
use super::wire::NETLINK_NETFILTER;
use super::{Transport, Walk, WalkError};
use crate::netlink::Channel;

type Outcome = Result<Walk, WalkError>;

/// See the [module documentation](self). The thread starts with the first walk, in the network namespace of
/// its caller, and ends with this value (after the walk that runs then).
#[derive(Debug)]
pub struct Background {
    timeout: Duration,
    thread: Option<Thread>,
    /// Why the last walk could not be given to a thread.
    refused: Option<String>,
}

/// At most one walk is under way at a time, so neither channel holds more than one message.
#[derive(Debug)]
struct Thread {
    jobs: Sender<BTreeSet<IpAddr>>,
    outcomes: UnboundedReceiver<Outcome>,
}

impl Background {
    /// Allocates. `timeout` limits the wait for each answer of the kernel.
    pub fn new(timeout: Duration) -> Self {
        Self { timeout, thread: None, refused: None }
    }

    fn give(&mut self, addresses: BTreeSet<IpAddr>) -> io::Result<()> {
        let thread = match &mut self.thread {
            Some(thread) => thread,
            none @ None => none.insert(Thread::start(self.timeout)?),
        };
        thread.jobs.send(addresses).map_err(|_| io::Error::other("the thread has ended"))
    }
}

impl Thread {
    fn start(timeout: Duration) -> io::Result<Self> {
        let (jobs, inbox) = channel();
        let (results, outcomes) = unbounded_channel();
        std::thread::Builder::new().name("conntrack".to_owned()).spawn(move || run(timeout, &inbox, &results))?;
        Ok(Self { jobs, outcomes })
    }
}

fn run(timeout: Duration, inbox: &Receiver<BTreeSet<IpAddr>>, results: &UnboundedSender<Outcome>) {
    let mut channel = Channel::new(NETLINK_NETFILTER, timeout, false);
    for addresses in inbox {
        if results.send(walk(&mut channel, &addresses)).is_err() {
            return;
        }
    }
}

impl Transport for Background {
    fn start(&mut self, addresses: &BTreeSet<IpAddr>) {
        self.refused = self.give(addresses.clone()).err().map(|error| error.to_string());
    }

    fn poll_end(&mut self, context: &mut Context<'_>) -> Poll<Outcome> {
        if let Some(reason) = self.refused.take() {
            self.thread = None;
            return Poll::Ready(Err(WalkError::Failed(reason)));
        }
        let Some(thread) = &mut self.thread else { return Poll::Pending };
        thread.outcomes.poll_recv(context).map(|outcome| {
            outcome.unwrap_or_else(|| {
                self.thread = None;
                Err(WalkError::Failed("the thread has ended".to_owned()))
            })
        })
    }
}
