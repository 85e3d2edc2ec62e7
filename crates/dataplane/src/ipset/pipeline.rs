//! Operations on many sets in few datagrams.
//!
//! Part of the netlink transport. The kernel goes through all messages of a datagram, whatever becomes of each, and
//! sends an error for every one that fails; only the last one asks for an acknowledgement, which then says that all
//! are done (`netlink_rcv_skb`; the same in every kernel that has sets).
//!
//! Invariant: a datagram has at most one message of a series: the next must not be performed if this one fails, and
//! the line that the kernel names when a member fails counts within the message.

use std::collections::{BTreeMap, VecDeque};

use program::{Members, SetName};

use super::socket::{Netlink, error_of, lost};
use super::transport::{Failure, Op, SetError};
use super::wire::{self, Command, Creation};
use crate::netlink::{NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, Refusal};

/// `IPSET_ERR_EXIST`: of an addition, the member is there; of a removal, it is not (I5).
const AS_WANTED_ALREADY: i32 = 4103;
/// Each costs a request of its own.
const MOST_SURPRISES: u64 = 32;

/// A datagram takes so many messages at most: an error for each, with the request in it, has room in any receive
/// buffer that the kernel gives us.
const MOST_MESSAGES: u32 = 256;
/// A datagram that is longer than this gets no more messages, so that with a long last one it has twice as much.
const FULL: usize = 16 << 10;

/// A series that is not through.
#[derive(Debug)]
struct Run<'a> {
    series: usize,
    ops: &'a [Op],
    /// The operation that is next, or was begun.
    op: usize,
    /// How many of its members are handled.
    done: usize,
    /// How many of those were as wanted already.
    surprises: u64,
}

/// Messages that are sent together.
#[derive(Debug)]
struct Datagram {
    bytes: Vec<u8>,
    /// Where the last message begins.
    last: usize,
    /// Sequence number of the first message; those of the others follow.
    first: u32,
    count: u32,
}

impl Datagram {
    fn new(first: u32) -> Self {
        Self { bytes: Vec::new(), last: 0, first, count: 0 }
    }

    fn has_room(&self) -> bool {
        self.bytes.len() < FULL && self.count < MOST_MESSAGES
    }

    /// The sequence number of the message that is appended next.
    fn next(&self) -> u32 {
        self.first + self.count
    }

    /// Appends a message that asks for an acknowledgement; the one before it then no longer does.
    fn push(&mut self, message: &[u8]) {
        const FLAGS: usize = 6;
        let flags = self.bytes.get_mut(self.last + FLAGS..).and_then(<[u8]>::first_chunk_mut);
        if let Some(flags) = flags {
            *flags = (u16::from_ne_bytes(*flags) & !NLM_F_ACK).to_ne_bytes();
        }
        self.last = self.bytes.len();
        self.bytes.extend_from_slice(message);
        self.count += 1;
    }
}

impl Netlink {
    /// Performs each series in order up to its first operation that fails; returns the failures by position.
    pub(super) fn perform_all<'a>(&mut self, series: impl Iterator<Item = &'a [Op]>) -> BTreeMap<usize, Failure> {
        let run = |(series, ops)| Run { series, ops, op: 0, done: 0, surprises: 0 };
        let mut waiting: VecDeque<Run<'_>> = series.enumerate().map(run).collect();
        let mut failures = BTreeMap::new();
        while !waiting.is_empty() {
            let mut sent = Vec::new();
            if let Err(error) = self.send_some(&mut waiting, &mut sent, &mut failures) {
                let unknown = sent.into_iter().map(|(run, _)| run).chain(waiting);
                failures.extend(unknown.map(|run| (run.series, run.failure(error.clone()))));
                break;
            }
        }
        failures
    }

    /// Sends one message each of those that wait, as many as fit into a datagram, takes the answers, and lets those
    /// wait again that are not through. If the answer is lost, it is unknown what became of those in `sent`.
    fn send_some<'a>(
        &mut self,
        waiting: &mut VecDeque<Run<'a>>,
        sent: &mut Vec<(Run<'a>, usize)>,
        failures: &mut BTreeMap<usize, Failure>,
    ) -> Result<(), SetError> {
        let mut datagram = Datagram::new(self.channel.sequences(MOST_MESSAGES));
        while datagram.has_room() {
            let Some(mut run) = waiting.pop_front() else { break };
            let Some(op) = run.next_op() else { continue };
            match self.encode(op, &run, datagram.next()) {
                Ok(members) => {
                    datagram.push(self.encoder.bytes());
                    sent.push((run, members));
                }
                Err(error @ SetError::Lost(_)) => {
                    waiting.push_front(run);
                    return Err(error);
                }
                Err(error) => drop(failures.insert(run.series, run.failure(error))),
            }
        }
        if sent.is_empty() {
            return Ok(());
        }
        let Datagram { bytes, first, count, .. } = datagram;
        let refusals = self.channel.refusals(&bytes, first, count).map_err(|error| lost(&error))?;
        let mut refusals = refusals.into_iter().peekable();
        for (index, (mut run, members)) in (0..).zip(sent.drain(..)) {
            let refusal = refusals.next_if(|(refused, _)| *refused == index).map(|(_, refusal)| refusal);
            match self.take_answer(&mut run, members, refusal) {
                Ok(()) => waiting.push_back(run),
                Err(failure) => drop(failures.insert(run.series, failure)),
            }
        }
        Ok(())
    }

    /// Writes the next message of an operation into the encoder; returns how many members it has.
    fn encode(&mut self, op: &Op, run: &Run<'_>, sequence: u32) -> Result<usize, SetError> {
        match op {
            Op::Create { name, kind, family, max_members, hash_size } => {
                let revision = self.revision(*kind, *family)?;
                let set = Creation {
                    name: name.as_str(),
                    kind: *kind,
                    revision,
                    family: *family,
                    max_members: *max_members,
                    hash_size: *hash_size,
                };
                self.encoder.create(set, NLM_F_CREATE | NLM_F_EXCL, sequence);
            }
            Op::Add { set, members } => return Ok(self.encode_members(Command::Add, set, members, run, sequence)),
            Op::Remove { set, members } => return Ok(self.encode_members(Command::Del, set, members, run, sequence)),
            Op::Swap { set, with } => {
                self.encoder.swap(set.as_str(), with.as_str(), sequence);
            }
            Op::Destroy { set } => {
                self.encoder.destroy(set.as_str(), sequence);
            }
        }
        Ok(0)
    }

    /// Asks for an error where a member is there already or gone already, so that it can be counted (users.md U3.d);
    /// no longer once there were many.
    fn encode_members(
        &mut self,
        command: Command,
        set: &SetName,
        members: &Members,
        run: &Run<'_>,
        sequence: u32,
    ) -> usize {
        let strict = run.surprises < MOST_SURPRISES;
        self.encoder.members(command, set.as_str(), members.iter_from(run.done), strict, sequence).1
    }

    /// Takes in what became of the message that was sent for a run.
    fn take_answer(&mut self, run: &mut Run<'_>, members: usize, refusal: Option<Refusal>) -> Result<(), Failure> {
        let Some(op) = run.ops.get(run.op) else { return Ok(()) };
        let outcome = match op {
            Op::Add { set, members: all } | Op::Remove { set, members: all } => {
                let outcome = run.take_members(members, refusal);
                let through = run.done >= all.len();
                if through || outcome.is_err() {
                    self.note(set, std::mem::take(&mut run.surprises));
                }
                outcome.map(|()| through)
            }
            Op::Create { .. } | Op::Swap { .. } | Op::Destroy { .. } => {
                match (op, refusal.map(|refusal| error_of(refusal.code))) {
                    (_, None) | (Op::Destroy { .. }, Some(SetError::Missing)) => Ok(true),
                    (_, Some(error)) => Err(error),
                }
            }
        };
        match outcome {
            Ok(true) => (run.op, run.done) = (run.op + 1, 0),
            Ok(false) => (),
            Err(error) => return Err(run.failure(error)),
        }
        Ok(())
    }

    fn note(&mut self, set: &SetName, surprises: u64) {
        if surprises > 0 {
            self.surprises.push((set.clone(), surprises));
        }
    }
}

impl<'a> Run<'a> {
    fn next_op(&mut self) -> Option<&'a Op> {
        loop {
            let op = self.ops.get(self.op)?;
            if !matches!(op, Op::Add { members, .. } | Op::Remove { members, .. } if members.is_empty()) {
                return Some(op);
            }
            self.op += 1;
        }
    }

    fn failure(&self, error: SetError) -> Failure {
        Failure { op: self.op, done: self.done, error }
    }

    /// Counts what was handled of a message of so many members; a member that was as wanted already is no failure, but
    /// those behind it have not been looked at yet.
    fn take_members(&mut self, members: usize, refusal: Option<Refusal>) -> Result<(), SetError> {
        let Some(Refusal { code, request }) = refusal else {
            self.done += members;
            return Ok(());
        };
        let line = wire::failed_line(&request).filter(|line| (1..=members).contains(line));
        if let (AS_WANTED_ALREADY, Some(line)) = (code, line) {
            self.surprises += 1;
            self.done += line;
            return Ok(());
        }
        self.done += line.map_or(0, |line| line - 1);
        Err(match (error_of(code), line) {
            (SetError::Other(text), Some(_)) => SetError::Member(text),
            (error, _) => error,
        })
    }
}

#[cfg(test)]
mod tests {
    use program::Member;

    use super::*;
    use crate::netlink::{HEADER_LENGTH, each_message};

    #[test]
    fn only_the_last_message_of_a_datagram_asks_for_an_acknowledgement() {
        let mut encoder = wire::Encoder::default();
        let mut datagram = Datagram::new(7);
        for set in ["cali40a", "cali40bcdefgh", "cali40c"] {
            encoder.destroy(set, datagram.next());
            datagram.push(encoder.bytes());
        }
        assert_eq!(each_message(&datagram.bytes).map(|message| message.is_some()).collect::<Vec<_>>(), [true; 3]);
        let word = |at: usize| u32::from_ne_bytes(datagram.bytes[at..at + 4].try_into().unwrap());
        let (mut at, mut seen) = (0, Vec::new());
        while at + HEADER_LENGTH <= datagram.bytes.len() {
            let flags = u16::from_ne_bytes(datagram.bytes[at + 6..at + 8].try_into().unwrap());
            seen.push((word(at + 8), flags & NLM_F_ACK != 0));
            at += word(at) as usize;
        }
        assert_eq!((seen, at), (vec![(7, false), (8, false), (9, true)], datagram.bytes.len()));
    }

    #[test]
    fn a_datagram_is_bounded_in_messages_and_bytes() {
        let mut encoder = wire::Encoder::default();
        let mut datagram = Datagram::new(1);
        while datagram.has_room() {
            encoder.destroy("c", datagram.next());
            datagram.push(encoder.bytes());
        }
        assert_eq!(datagram.count, MOST_MESSAGES);
        let members: Members = (0..5000u32).map(|n| Member::Address(n.to_be_bytes().into())).collect();
        for start in [0, 100] {
            let mut datagram = Datagram::new(1);
            for _ in 0..start {
                encoder.destroy("cali40s:abcdefghijklmnopqrstuvwx", datagram.next());
                datagram.push(encoder.bytes());
            }
            while datagram.has_room() {
                encoder.members(Command::Add, "c", members.iter(), true, datagram.next());
                datagram.push(encoder.bytes());
            }
            assert!((FULL..FULL * 2 + 512).contains(&datagram.bytes.len()), "{}", datagram.bytes.len());
        }
    }
}
