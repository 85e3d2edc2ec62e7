//! How set operations reach the kernel.
//!
//! The set driver decides, a [`Transport`] performs: [`Netlink`] talks to the kernel itself, the
//! [`Restore`] transport runs the `ipset` program, and [`Automatic`] takes the first where the kernel
//! understands it and the second elsewhere.
//!
//! Invariant: operations are performed in order and stop at the first that fails; what was done before
//! it stays done, and the failure says exactly how far things got.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::time::{Duration, Instant};

use model::Family;
use program::{Member, SetKind, SetName};

use super::plan;
use super::restore::Restore;
use super::wire::{self, Command, Creation, Encoder};
use crate::clock;
use crate::netlink::{Channel, DumpEnd, NLM_F_CREATE, NLM_F_EXCL, Refusal};

/// One change of the kernel's sets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Fails with [`SetError::Exists`] if the name is taken.
    Create { name: SetName, kind: SetKind, family: Family, max_members: u32, hash_size: u32 },
    /// Members that are there already are fine.
    Add { set: SetName, members: Vec<Member> },
    /// Members that are gone already are fine.
    Remove { set: SetName, members: Vec<Member> },
    /// Exchanges the contents of two sets in one step; rules see one or the other.
    Swap { set: SetName, with: SetName },
    /// A set that is gone already is fine.
    Destroy { set: SetName },
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

// === netlink ===

/// `IPSET_ERR_EXIST`: of an addition, the member is there; of a removal, it is not (I5).
const AS_WANTED_ALREADY: i32 = 4103;
/// Each costs a request of its own.
const MOST_SURPRISES: u64 = 32;

/// Talks to the kernel through one long-lived netlink socket.
#[derive(Debug)]
pub struct Netlink {
    channel: Channel,
    encoder: Encoder,
    /// Revision to create each type with, asked once per type and family.
    revisions: BTreeMap<(SetKind, Family), u8>,
    /// Has a socket of its own, so that other requests can come in between.
    background: Channel,
    reading: Option<Reading>,
    surprises: Vec<(SetName, u64)>,
}

/// A set that is read bit by bit.
#[derive(Debug)]
struct Reading {
    set: SetName,
    sequence: u32,
    gathering: Gathering,
}

/// What came so far of one set, or of all.
#[derive(Debug, Default)]
struct Gathering {
    sets: Vec<(SetName, Contents)>,
    /// A message that cannot be understood came in between.
    broken: bool,
}

impl Gathering {
    fn take(&mut self, payload: &[u8], wanted: impl Fn(&str) -> bool) {
        let Some(part) = wire::part(payload, &wanted) else {
            self.broken = true;
            return;
        };
        let Some(name) = part.name.as_deref().filter(|name| wanted(name)).and_then(SetName::new) else {
            return;
        };
        // The header comes once, the name with every message (I7).
        if let Some(header) = part.header {
            let contents = Contents {
                type_name: header.type_name,
                family: header.family,
                max_members: header.max_members,
                odd: header.special,
                ..Contents::default()
            };
            self.sets.push((name.clone(), contents));
        }
        match self.sets.last_mut() {
            Some((current, contents)) if *current == name => {
                contents.odd |= part.odd_members > 0;
                contents.members.extend(part.members);
            }
            Some(_) | None => self.broken = true,
        }
    }

    fn finish(mut self, complete: bool) -> Vec<(SetName, Contents)> {
        for (_, contents) in &mut self.sets {
            contents.complete = complete && !self.broken;
        }
        self.sets
    }
}

impl Netlink {
    /// Allocates; the socket is opened by the first request. `timeout` limits the wait for each answer.
    pub fn new(timeout: Duration) -> Self {
        Self {
            channel: Channel::new(wire::NETLINK_NETFILTER, timeout, false),
            encoder: Encoder::default(),
            revisions: BTreeMap::new(),
            background: Channel::new(wire::NETLINK_NETFILTER, timeout, false),
            reading: None,
            surprises: Vec::new(),
        }
    }

    /// Whether the kernel speaks the protocol version that this program writes (crates.md I1).
    ///
    /// # Errors
    ///
    /// If the kernel has no set subsystem or did not answer.
    pub fn understood(&mut self) -> Result<bool, SetError> {
        let sequence = self.channel.sequences(1);
        let request = self.encoder.protocol(sequence);
        let answer = self.channel.ask(request, sequence).map_err(|error| lost(&error))?;
        let answer = answer.map_err(|refusal| error_of(refusal.code))?;
        let versions = answer.as_deref().and_then(wire::protocols);
        Ok(versions.is_some_and(|(lowest, highest)| (lowest..=highest).contains(&wire::PROTOCOL)))
    }

    /// The revision to create a type with: the highest that the kernel and this program know (I2).
    fn revision(&mut self, kind: SetKind, family: Family) -> Result<u8, SetError> {
        if let Some(revision) = self.revisions.get(&(kind, family)) {
            return Ok(*revision);
        }
        let sequence = self.channel.sequences(1);
        let request = self.encoder.revisions(kind, family, sequence);
        let answer = self.channel.ask(request, sequence).map_err(|error| lost(&error))?;
        let answer = answer.map_err(|refusal| error_of(refusal.code))?;
        let (lowest, highest) = answer
            .as_deref()
            .and_then(wire::revisions)
            .ok_or_else(|| SetError::Other(format!("no revision of type {} in the answer", wire::type_name(kind))))?;
        let revision = highest.min(wire::highest_revision(kind)).max(lowest);
        self.revisions.insert((kind, family), revision);
        Ok(revision)
    }

    fn perform_one(&mut self, op: &Op) -> Result<(), (usize, SetError)> {
        match op {
            Op::Create { name, kind, family, max_members, hash_size } => {
                let revision = self.revision(*kind, *family).map_err(|error| (0, error))?;
                let set = Creation {
                    name: name.as_str(),
                    kind: *kind,
                    revision,
                    family: *family,
                    max_members: *max_members,
                    hash_size: *hash_size,
                };
                let sequence = self.channel.sequences(1);
                let request = self.encoder.create(set, NLM_F_CREATE | NLM_F_EXCL, sequence);
                self.channel.acknowledge(request, sequence).map_err(|error| (0, error))
            }
            Op::Add { set, members } => self.change_members(Command::Add, set, members),
            Op::Remove { set, members } => self.change_members(Command::Del, set, members),
            Op::Swap { set, with } => {
                let sequence = self.channel.sequences(1);
                let request = self.encoder.swap(set.as_str(), with.as_str(), sequence);
                self.channel.acknowledge(request, sequence).map_err(|error| (0, error))
            }
            Op::Destroy { set } => {
                let sequence = self.channel.sequences(1);
                let request = self.encoder.destroy(set.as_str(), sequence);
                match self.channel.acknowledge(request, sequence) {
                    Ok(()) | Err(SetError::Missing) => Ok(()),
                    Err(error) => Err((0, error)),
                }
            }
        }
    }

    /// Asks for an error where a member is there already or gone already, so that it can be counted, and goes on
    /// behind it (users.md U3.d); no longer once there were many.
    fn change_members(&mut self, command: Command, set: &SetName, members: &[Member]) -> Result<(), (usize, SetError)> {
        let mut done = 0;
        let mut surprises = 0;
        while let Some(rest) = members.get(done..).filter(|rest| !rest.is_empty()) {
            let sequence = self.channel.sequences(1);
            let strict = surprises < MOST_SURPRISES;
            let (request, count) = self.encoder.members(command, set.as_str(), rest, strict, sequence);
            let answer = self.channel.acknowledged(request, sequence, 1).map_err(|error| (done, lost(&error)))?;
            match answer.into_iter().next() {
                Some(Err(Refusal { code, request })) => {
                    let line = wire::failed_line(&request).filter(|line| (1..=count).contains(line));
                    if let (AS_WANTED_ALREADY, Some(line)) = (code, line) {
                        surprises += 1;
                        done += line;
                        continue;
                    }
                    self.note(set, surprises);
                    let error = match (error_of(code), line) {
                        (SetError::Other(text), Some(_)) => SetError::Member(text),
                        (error, _) => error,
                    };
                    return Err((done + line.map_or(0, |line| line - 1), error));
                }
                Some(Ok(())) | None => done += count,
            }
        }
        self.note(set, surprises);
        Ok(())
    }

    fn note(&mut self, set: &SetName, surprises: u64) {
        if surprises > 0 {
            self.surprises.push((set.clone(), surprises));
        }
    }
}

impl Channel {
    fn acknowledge(&mut self, request: &[u8], sequence: u32) -> Result<(), SetError> {
        let answers = self.acknowledged(request, sequence, 1).map_err(|error| lost(&error))?;
        answers.into_iter().collect::<Result<(), _>>().map_err(|refusal| error_of(refusal.code))
    }
}

impl Transport for Netlink {
    fn list(&mut self) -> Result<Listing, SetError> {
        let sequence = self.channel.sequences(1);
        let request = self.encoder.list_names(sequence);
        let mut names = Vec::new();
        let mut understood = true;
        let end = self.channel.dump(request, sequence, |payload| match wire::part(payload, |_| true) {
            Some(part) => names.extend(part.name),
            None => understood = false,
        });
        match end.map_err(|error| lost(&error))? {
            DumpEnd::Complete => Ok(Listing { names, complete: understood }),
            DumpEnd::Interrupted => Ok(Listing { names, complete: false }),
            DumpEnd::Refused(code) => Err(error_of(code)),
        }
    }

    fn headers(&mut self) -> Result<Option<Headers>, SetError> {
        let sequence = self.channel.sequences(1);
        let request = self.encoder.list_headers(sequence);
        let mut headers = Headers::default();
        let mut understood = true;
        let end = self.channel.dump(request, sequence, |payload| match wire::part(payload, plan::is_of_this_program) {
            Some(wire::Part { name: Some(name), header: Some(header), .. }) => {
                let wire::Header { type_name, family, max_members, special, count } = header;
                let header = Header { type_name, family, max_members, special, members: count };
                headers.ours.extend(SetName::new(&name).map(|name| (name, header)));
            }
            Some(_) => headers.others += 1,
            None => understood = false,
        });
        match end.map_err(|error| lost(&error))? {
            DumpEnd::Complete => headers.complete = understood,
            DumpEnd::Interrupted => (),
            DumpEnd::Refused(code) => return Err(error_of(code)),
        }
        Ok(Some(headers))
    }

    fn read_all(&mut self, sets: &BTreeSet<SetName>) -> Result<Option<Vec<(SetName, Contents)>>, SetError> {
        let sequence = self.channel.sequences(1);
        let request = self.encoder.list_all(sequence);
        let names: BTreeSet<&str> = sets.iter().map(SetName::as_str).collect();
        let mut gathering = Gathering::default();
        let end = self.channel.dump(request, sequence, |payload| gathering.take(payload, |name| names.contains(name)));
        match end.map_err(|error| lost(&error))? {
            DumpEnd::Complete if !gathering.broken => Ok(Some(gathering.finish(true))),
            DumpEnd::Complete | DumpEnd::Interrupted | DumpEnd::Refused(_) => Ok(None),
        }
    }

    fn read(&mut self, set: &SetName) -> Result<Option<Contents>, SetError> {
        let sequence = self.channel.sequences(1);
        let request = self.encoder.list(set.as_str(), sequence);
        let mut gathering = Gathering::default();
        let end = self.channel.dump(request, sequence, |payload| gathering.take(payload, |name| name == set.as_str()));
        one_set(end.map_err(|error| lost(&error))?, gathering)
    }

    fn read_on(&mut self, set: &SetName, budget: Duration) -> Result<Slice, SetError> {
        let start = self.now();
        let mut reading = match self.reading.take() {
            Some(reading) if reading.set == *set => reading,
            Some(_) | None => {
                self.background.close();
                let sequence = self.background.sequences(1);
                let request = self.encoder.list(set.as_str(), sequence);
                self.background.begin_dump(request).map_err(|error| lost(&error))?;
                Reading { set: set.clone(), sequence, gathering: Gathering::default() }
            }
        };
        loop {
            let gathering = &mut reading.gathering;
            let take = |payload: &[u8]| gathering.take(payload, |name| name == set.as_str());
            let end = self.background.dump_on(reading.sequence, take).map_err(|error| lost(&error))?;
            if let Some(end) = end {
                return one_set(end, reading.gathering).map(Slice::Done);
            }
            if self.now().saturating_duration_since(start) >= budget {
                let last = reading.gathering.sets.last_mut();
                let members = last.map(|(_, contents)| std::mem::take(&mut contents.members)).unwrap_or_default();
                self.reading = Some(reading);
                return Ok(Slice::More(members));
            }
        }
    }

    fn stop_reading(&mut self) {
        if self.reading.take().is_some() {
            self.background.close();
        }
    }

    fn surprises(&mut self) -> Vec<(SetName, u64)> {
        std::mem::take(&mut self.surprises)
    }

    fn perform(&mut self, ops: &[Op]) -> Result<(), Failure> {
        for (index, op) in ops.iter().enumerate() {
            self.perform_one(op).map_err(|(done, error)| Failure { op: index, done, error })?;
        }
        Ok(())
    }
}

/// What the answer about one set amounts to.
fn one_set(end: DumpEnd, gathering: Gathering) -> Result<Option<Contents>, SetError> {
    let complete = match end {
        DumpEnd::Complete => true,
        DumpEnd::Interrupted => false,
        DumpEnd::Refused(code) => {
            let error = error_of(code);
            return if error == SetError::Missing { Ok(None) } else { Err(error) };
        }
    };
    let contents = gathering.finish(complete).pop().map(|(_, contents)| contents);
    contents.map(Some).ok_or_else(|| SetError::Other("the answer has no header".to_owned()))
}

fn lost(error: &io::Error) -> SetError {
    SetError::Lost(format!("no answer from the kernel's set subsystem: {error}"))
}

/// Says what a (positive) error number of the set subsystem means; those from 4096 on are its own (I5).
fn error_of(code: i32) -> SetError {
    let text = match code {
        2 => return SetError::Missing,
        17 => return SetError::Exists,
        // EBUSY: somebody lists the set at this moment.
        16 | 4100 | 4108 => return SetError::Busy,
        4352 => return SetError::Full,
        4098 => return SetError::TypeUnknown,
        4101 => return SetError::Missing,
        4102 => return SetError::TypesDiffer,
        4097 => "malformed, or the kernel does not know a part of it",
        4099 => "there are too many sets",
        4104 => "invalid prefix length",
        4106 => "wrong address family",
        4096.. => return SetError::Other(format!("set subsystem error {code}")),
        _ => return SetError::Other(io::Error::from_raw_os_error(code).to_string()),
    };
    SetError::Other(text.to_owned())
}

// === choice ===

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
