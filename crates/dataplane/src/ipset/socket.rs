//! Sets through one long-lived netlink socket.
//!
//! Used by [`Automatic`](super::transport::Automatic); `pipeline` has how operations are performed.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::time::Duration;

use model::Family;
use program::{SetKind, SetName};

use super::plan;
use super::transport::{Contents, Failure, Header, Headers, Listing, Op, Series, SetError, Slice, Transport};
use super::wire::{self, Encoder};
use crate::netlink::{Channel, DumpEnd};

/// Talks to the kernel through one long-lived netlink socket.
#[derive(Debug)]
pub struct Netlink {
    pub(super) channel: Channel,
    pub(super) encoder: Encoder,
    /// Revision to create each type with, asked once per type and family.
    revisions: BTreeMap<(SetKind, Family), u8>,
    /// Has a socket of its own, so that other requests can come in between.
    background: Channel,
    reading: Option<Reading>,
    pub(super) surprises: Vec<(SetName, u64)>,
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
    pub(super) fn revision(&mut self, kind: SetKind, family: Family) -> Result<u8, SetError> {
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
        self.perform_all(std::iter::once(ops)).into_values().next().map_or(Ok(()), Err)
    }

    fn perform_each(&mut self, series: &[Series]) -> BTreeMap<usize, Failure> {
        self.perform_all(series.iter().map(|series| series.ops.as_slice()))
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

pub(super) fn lost(error: &io::Error) -> SetError {
    SetError::Lost(format!("no answer from the kernel's set subsystem: {error}"))
}

/// Says what a (positive) error number of the set subsystem means; those from 4096 on are its own (I5).
pub(super) fn error_of(code: i32) -> SetError {
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
