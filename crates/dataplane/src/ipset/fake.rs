//! The kernel's sets, in memory, for tests.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use model::Family;
use program::{Member, SetKind, SetName};

use super::transport::{
    Contents, Failure, Header, Headers, Listing, Op, Series, SetError, Transport, one_after_the_other,
};
use super::wire;

/// A set in the fake kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct FakeSet {
    pub(crate) kind: SetKind,
    pub(crate) family: Family,
    pub(crate) max_members: u32,
    pub(crate) odd: bool,
    /// A rule names it.
    pub(crate) referenced: bool,
    pub(crate) members: BTreeSet<Member>,
}

#[derive(Debug)]
pub(crate) struct FakeKernel {
    pub(crate) sets: BTreeMap<String, FakeSet>,
    /// Everything that was performed since the test last took it.
    pub(crate) log: Vec<Op>,
    /// How many series each joint request had.
    pub(crate) sends: Vec<usize>,
    pub(crate) reads: u64,
    /// Fails so many of the next calls as if the kernel did not answer.
    pub(crate) deaf: u32,
    /// Does not answer any more after so many calls.
    pub(crate) deaf_after: Option<u32>,
    /// Leaves out so many of the next answers' proof that they are complete, and half of their contents.
    pub(crate) interrupted: u32,
    /// Errors for the next reads of single sets.
    pub(crate) unreadable: VecDeque<SetError>,
    /// Has no headers to give, as the program.
    pub(crate) plain: bool,
    /// What each destruction costs.
    pub(crate) destroy_time: Duration,
    pub(crate) clock: Instant,
}

/// Gives the driver one end and the test the other.
#[derive(Clone, Debug)]
pub(crate) struct FakeTransport(Arc<Mutex<FakeKernel>>);

impl FakeTransport {
    pub(crate) fn new(now: Instant) -> Self {
        Self(Arc::new(Mutex::new(FakeKernel {
            sets: BTreeMap::new(),
            log: Vec::new(),
            sends: Vec::new(),
            reads: 0,
            deaf: 0,
            deaf_after: None,
            interrupted: 0,
            unreadable: VecDeque::new(),
            plain: false,
            destroy_time: Duration::ZERO,
            clock: now,
        })))
    }

    pub(crate) fn kernel(&self) -> MutexGuard<'_, FakeKernel> {
        self.0.lock().unwrap()
    }
}

impl FakeKernel {
    fn hears(&mut self) -> Result<(), SetError> {
        match &mut self.deaf_after {
            Some(0) => return Err(SetError::Lost("no answer".to_owned())),
            Some(calls) => *calls -= 1,
            None => (),
        }
        if self.deaf == 0 {
            return Ok(());
        }
        self.deaf -= 1;
        Err(SetError::Lost("no answer".to_owned()))
    }

    fn complete(&mut self) -> bool {
        let complete = self.interrupted == 0;
        self.interrupted = self.interrupted.saturating_sub(1);
        complete
    }

    fn set(&mut self, name: &SetName) -> Result<&mut FakeSet, SetError> {
        self.sets.get_mut(name.as_str()).ok_or(SetError::Missing)
    }

    fn perform(&mut self, op: &Op) -> Result<(), (usize, SetError)> {
        self.hears().map_err(|error| (0, error))?;
        self.log.push(op.clone());
        match op {
            Op::Create { name, kind, family, max_members, .. } => {
                if self.sets.contains_key(name.as_str()) {
                    return Err((0, SetError::Exists));
                }
                let set = FakeSet {
                    kind: *kind,
                    family: *family,
                    max_members: *max_members,
                    odd: false,
                    referenced: false,
                    members: BTreeSet::new(),
                };
                self.sets.insert(name.as_str().to_owned(), set);
            }
            Op::Add { set, members } => {
                let set = self.set(set).map_err(|error| (0, error))?;
                for (done, member) in members.iter().enumerate() {
                    if set.members.contains(&member) {
                        continue;
                    }
                    if member == Member::Address([0, 0, 0, 0].into()) {
                        return Err((done, SetError::Member("unspecified address".to_owned())));
                    }
                    if set.members.len() >= set.max_members as usize {
                        return Err((done, SetError::Full));
                    }
                    set.members.insert(member);
                }
            }
            Op::Remove { set, members } => {
                let set = self.set(set).map_err(|error| (0, error))?;
                for member in members.iter() {
                    set.members.remove(&member);
                }
            }
            Op::Swap { set, with } => {
                let mut first = self.set(set).map_err(|error| (0, error))?.clone();
                let mut second = self.set(with).map_err(|error| (0, error))?.clone();
                if (first.kind, first.family) != (second.kind, second.family) {
                    return Err((0, SetError::TypesDiffer));
                }
                // References stay with the name.
                std::mem::swap(&mut first.referenced, &mut second.referenced);
                self.sets.insert(set.as_str().to_owned(), second);
                self.sets.insert(with.as_str().to_owned(), first);
            }
            Op::Destroy { set } => {
                self.clock += self.destroy_time;
                if self.set(set).is_ok_and(|set| set.referenced) {
                    return Err((0, SetError::Busy));
                }
                self.sets.remove(set.as_str());
            }
        }
        Ok(())
    }
}

impl Transport for FakeTransport {
    fn list(&mut self) -> Result<Listing, SetError> {
        let mut kernel = self.kernel();
        kernel.hears()?;
        kernel.reads += 1;
        let complete = kernel.complete();
        let names = kernel.sets.keys().enumerate().filter(|(n, _)| complete || n % 2 == 0);
        Ok(Listing { names: names.map(|(_, name)| name.clone()).collect(), complete })
    }

    fn read(&mut self, set: &SetName) -> Result<Option<Contents>, SetError> {
        let mut kernel = self.kernel();
        kernel.hears()?;
        kernel.reads += 1;
        if let Some(error) = kernel.unreadable.pop_front() {
            return Err(error);
        }
        let complete = kernel.complete();
        Ok(kernel.sets.get(set.as_str()).map(|set| Contents {
            type_name: wire::type_name(set.kind).to_owned(),
            family: Some(set.family),
            max_members: Some(set.max_members),
            odd: set.odd,
            members: set.members.iter().enumerate().filter(|(n, _)| complete || n % 2 == 0).map(|(_, m)| *m).collect(),
            complete,
        }))
    }

    fn perform(&mut self, ops: &[Op]) -> Result<(), Failure> {
        let mut kernel = self.kernel();
        for (op, one) in ops.iter().enumerate() {
            kernel.perform(one).map_err(|(done, error)| Failure { op, done, error })?;
        }
        Ok(())
    }

    fn perform_each(&mut self, series: &[Series]) -> BTreeMap<usize, Failure> {
        self.kernel().sends.push(series.len());
        one_after_the_other(self, series)
    }

    fn headers(&mut self) -> Result<Option<Headers>, SetError> {
        let mut kernel = self.kernel();
        if kernel.plain {
            return Ok(None);
        }
        kernel.hears()?;
        kernel.reads += 1;
        let mut headers = Headers { complete: kernel.complete(), ..Headers::default() };
        for (n, (name, set)) in kernel.sets.iter().enumerate() {
            if !headers.complete && n % 2 == 1 {
                continue;
            }
            let header = Header {
                type_name: wire::type_name(set.kind).to_owned(),
                family: Some(set.family),
                max_members: Some(set.max_members),
                special: set.odd,
                members: Some(set.members.len() as u32),
            };
            headers.ours.extend(SetName::new(name).map(|name| (name, header)));
        }
        Ok(Some(headers))
    }

    fn now(&self) -> Instant {
        self.kernel().clock
    }
}
