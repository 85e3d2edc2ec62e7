//! How set operations reach the kernel.
//!
//! The set driver decides, a [`Transport`] performs: [`Netlink`] talks to the kernel itself, the
//! [`Restore`] transport runs the `ipset` program, and [`Automatic`] takes the first where the kernel
//! understands it and the second elsewhere.
//!
//! Invariant: the operations of a [`Series`] are performed in order and stop at its first that fails; what was done
//! before it stays done, and the failure says exactly how far things got. Series do not wait for each other.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::{Duration, Instant};

use model::Family;
use program::{Member, Members, SetKind, SetName};

use super::restore::Restore;
pub use super::socket::Netlink;
use crate::clock;

/// One change of the kernel's sets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Fails with [`SetError::Exists`] if the name is taken.
    Create { name: SetName, kind: SetKind, family: Family, max_members: u32, hash_size: u32 },
    /// Members that are there already are fine.
    Add { set: SetName, members: Members },
    /// Members that are gone already are fine.
    Remove { set: SetName, members: Members },
    /// Exchanges the contents of two sets in one step; rules see one or the other.
    Swap { set: SetName, with: SetName },
    /// A set that is gone already is fine.
    Destroy { set: SetName },
}

/// Operations for the sake of one set. None depends on those of another series.
#[derive(Clone, Debug)]
pub struct Series {
    /// The wanted set that they are about; some may be on a temporary one.
    pub set: SetName,
    pub ops: Vec<Op>,
}

/// Where a series of operations stopped.
#[derive(Clone, Debug)]
pub struct Failure {
    /// Index of the operation that failed.
    pub op: usize,
    /// How many of its members were handled before; the next one is at fault.
    pub done: usize,
    pub error: SetError,
}

/// One variant per thing the driver does differently.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SetError {
    #[error("the set does not exist")]
    Missing,
    #[error("a set of this name exists already")]
    Exists,
    #[error("the set is in use")]
    Busy,
    #[error("the set is full")]
    Full,
    #[error("the sets have different types")]
    TypesDiffer,
    #[error("the kernel does not know the set type")]
    TypeUnknown,
    /// This member, and only this, was refused.
    #[error("the member was refused: {0}")]
    Member(String),
    #[error("{0}")]
    Other(String),
    /// No answer: what was done is unknown, everything must be read again.
    #[error("{0}")]
    Lost(String),
}

/// Names of all sets of this network namespace, ours and others'.
#[derive(Clone, Debug, Default)]
pub struct Listing {
    pub names: Vec<String>,
    /// Proven: the answer had an end, and nothing changed while it was read.
    pub complete: bool,
}

/// A set without its members.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Header {
    pub type_name: String,
    pub family: Option<Family>,
    pub max_members: Option<u32>,
    /// Has options that change what it matches.
    pub special: bool,
    /// How many members it has, if the kernel says so (since 4.9).
    pub members: Option<u32>,
}

/// All sets of this network namespace, ours and others', with the headers of ours.
#[derive(Clone, Debug, Default)]
pub struct Headers {
    pub ours: BTreeMap<SetName, Header>,
    /// Sets of others.
    pub others: usize,
    /// Proven: the answer had an end, and nothing changed while it was read.
    pub complete: bool,
}

/// How far reading a set bit by bit has come.
#[derive(Debug)]
pub enum Slice {
    /// Some members, and there are more.
    More(Vec<Member>),
    /// The set with the members that were not told before; `None` if it does not exist.
    Done(Option<Contents>),
}

/// A set as the kernel has it.
#[derive(Clone, Debug, Default)]
pub struct Contents {
    pub type_name: String,
    pub family: Option<Family>,
    pub max_members: Option<u32>,
    /// Has options that change what it matches, or members of a form this program never writes.
    pub odd: bool,
    pub members: Vec<Member>,
    /// Proven: the answer had an end, and nothing changed while it was read.
    pub complete: bool,
}

/// See the [module documentation](self).
pub trait Transport: fmt::Debug + Send {
    /// Returns the names of all sets.
    fn list(&mut self) -> Result<Listing, SetError>;

    /// Returns a set with all members; `None` if it does not exist.
    fn read(&mut self, set: &SetName) -> Result<Option<Contents>, SetError>;

    /// Performs operations in order up to the first that fails.
    fn perform(&mut self, ops: &[Op]) -> Result<(), Failure>;

    /// Performs each series as [`Self::perform`] does, whatever becomes of the others, and returns the failures by
    /// position. All of those that may not be done have one: after a lost answer, the rest have [`SetError::Lost`].
    fn perform_each(&mut self, series: &[Series]) -> BTreeMap<usize, Failure> {
        one_after_the_other(self, series)
    }

    /// Returns all sets without their members, in one cheap request; `None` if there is no such request.
    fn headers(&mut self) -> Result<Option<Headers>, SetError> {
        Ok(None)
    }

    /// Returns those of `sets` that exist, in one request for everything there is; `None` if there is no such
    /// request, or not everything is known to have come.
    fn read_all(&mut self, _sets: &BTreeSet<SetName>) -> Result<Option<Vec<(SetName, Contents)>>, SetError> {
        Ok(None)
    }

    /// Begins to read a set or goes on with it, for about `budget` of time. Other requests may come in between;
    /// a read of another set ends this one.
    fn read_on(&mut self, set: &SetName, _budget: Duration) -> Result<Slice, SetError> {
        self.read(set).map(Slice::Done)
    }

    /// Gives up a read that [`Self::read_on`] has begun: the kernel neither exchanges nor destroys a set that
    /// is being read.
    fn stop_reading(&mut self) {}

    /// Returns the sets of which members were there before they were added, or gone before they were removed,
    /// and how many, since the last call. Empty if the transport cannot tell.
    fn surprises(&mut self) -> Vec<(SetName, u64)> {
        Vec::new()
    }

    /// The clock that time budgets are measured with.
    fn now(&self) -> Instant {
        clock::now()
    }
}

/// Performs series by [`Transport::perform`], for transports that have no better way.
pub fn one_after_the_other<T: Transport + ?Sized>(transport: &mut T, series: &[Series]) -> BTreeMap<usize, Failure> {
    let mut failures = BTreeMap::new();
    let mut lost: Option<SetError> = None;
    for (index, series) in series.iter().enumerate() {
        let outcome = match &lost {
            Some(error) => Err(Failure { op: 0, done: 0, error: error.clone() }),
            None => transport.perform(&series.ops),
        };
        if let Err(failure) = outcome {
            lost = lost.or_else(|| matches!(failure.error, SetError::Lost(_)).then(|| failure.error.clone()));
            failures.insert(index, failure);
        }
    }
    failures
}

/// Chooses between [`Netlink`] and the `ipset` program at the first use.
#[derive(Debug)]
pub struct Automatic {
    netlink: Netlink,
    restore: Restore,
    chosen: Option<Choice>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Choice {
    Netlink,
    Restore,
}

impl Automatic {
    /// Allocates. `netlink_timeout` limits the wait for an answer, `program_timeout` one run of `ipset`.
    pub fn new(netlink_timeout: Duration, program_timeout: Duration) -> Self {
        Self { netlink: Netlink::new(netlink_timeout), restore: Restore::new(program_timeout), chosen: None }
    }

    fn chosen(&mut self) -> &mut dyn Transport {
        let choice = *self.chosen.get_or_insert_with(|| match self.netlink.understood() {
            Ok(true) => Choice::Netlink,
            Ok(false) => {
                tracing::warn!("the kernel's set protocol is unknown; sets are written through the `ipset` program");
                Choice::Restore
            }
            Err(error) => {
                tracing::warn!(%error, "no netlink access to sets; they are written through the `ipset` program");
                Choice::Restore
            }
        });
        match choice {
            Choice::Netlink => &mut self.netlink,
            Choice::Restore => &mut self.restore,
        }
    }
}

impl Transport for Automatic {
    fn list(&mut self) -> Result<Listing, SetError> {
        self.chosen().list()
    }

    fn read(&mut self, set: &SetName) -> Result<Option<Contents>, SetError> {
        self.chosen().read(set)
    }

    fn perform(&mut self, ops: &[Op]) -> Result<(), Failure> {
        self.chosen().perform(ops)
    }

    fn perform_each(&mut self, series: &[Series]) -> BTreeMap<usize, Failure> {
        self.chosen().perform_each(series)
    }

    fn headers(&mut self) -> Result<Option<Headers>, SetError> {
        self.chosen().headers()
    }

    fn read_all(&mut self, sets: &BTreeSet<SetName>) -> Result<Option<Vec<(SetName, Contents)>>, SetError> {
        self.chosen().read_all(sets)
    }

    fn read_on(&mut self, set: &SetName, budget: Duration) -> Result<Slice, SetError> {
        self.chosen().read_on(set, budget)
    }

    fn stop_reading(&mut self) {
        self.chosen().stop_reading();
    }

    fn surprises(&mut self) -> Vec<(SetName, u64)> {
        self.chosen().surprises()
    }
}
