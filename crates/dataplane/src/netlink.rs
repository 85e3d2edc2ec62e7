//! A blocking netlink socket that asks the kernel one thing at a time.
//!
//! Feeds the set driver (nfnetlink) and the route driver (rtnetlink) with whole, checked answers.
//! The kernel does the work of a request inside `send`, so an asynchronous socket would gain nothing.
//!
//! Invariants: every wait has a time limit; after a lost, cut or late answer the socket is closed and
//! the next request opens a new one, so an answer can never be taken for that of another request
//! (crates.md N2, N7). A dump says whether it is known to be complete.

use std::io;
use std::time::Duration;

use netlink_sys::{Socket, SocketAddr};
use nix::errno::Errno;
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike as _};

/// Length of `struct nlmsghdr`.
pub(crate) const HEADER_LENGTH: usize = 16;

pub(crate) const NLM_F_REQUEST: u16 = 0x1;
pub(crate) const NLM_F_ACK: u16 = 0x4;
/// Of an answer: the dumped table changed while it was read.
const NLM_F_DUMP_INTR: u16 = 0x10;
pub(crate) const NLM_F_REPLACE: u16 = 0x100;
pub(crate) const NLM_F_EXCL: u16 = 0x200;
pub(crate) const NLM_F_DUMP: u16 = 0x300;
pub(crate) const NLM_F_CREATE: u16 = 0x400;

const NLMSG_NOOP: u16 = 1;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLMSG_OVERRUN: u16 = 4;

/// Larger than any datagram the kernel makes (dumps use at most 32 KiB).
const DATAGRAM: usize = 1 << 16;
/// Room for the answers to the largest batch (crates.md N2).
const RECEIVE_BUFFER: usize = 8 << 20;

/// The kernel's answer to a request that it refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Refusal {
    /// Positive error number; ipset's own begin at 4096.
    pub(crate) code: i32,
    /// What follows the code: header and contents of the refused request, which ipset completes with
    /// the number of the failing element.
    pub(crate) request: Vec<u8>,
}

/// How a dump ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DumpEnd {
    /// The kernel said that this was all, and that nothing changed meanwhile.
    Complete,
    /// Something changed meanwhile: entries may be missing or be there twice.
    Interrupted,
    /// Refused with this (positive) error number.
    Refused(i32),
}

/// One message of an answer.
#[derive(Clone, Copy, Debug)]
struct Received<'a> {
    kind: u16,
    flags: u16,
    sequence: u32,
    payload: &'a [u8],
}

/// See the [module documentation](self).
pub(crate) struct Channel {
    protocol: isize,
    timeout: Duration,
    /// Ask the kernel to honour dump filters (kernel 4.20 and later; crates.md N9).
    strict: bool,
    socket: Option<Socket>,
    sequence: u32,
    buffer: Vec<u8>,
}

impl std::fmt::Debug for Channel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Channel").field("protocol", &self.protocol).field("open", &self.socket.is_some()).finish()
    }
}

impl Channel {
    /// Allocates; the socket is opened by the first request.
    pub(crate) fn new(protocol: isize, timeout: Duration, strict: bool) -> Self {
        Self { protocol, timeout, strict, socket: None, sequence: 0, buffer: Vec::with_capacity(DATAGRAM) }
    }

    /// Returns the port of the socket, as it stands in what the kernel tells others of our requests; `None`
    /// while it is closed.
    pub(crate) fn port(&self) -> Option<u32> {
        let mut address = SocketAddr::new(0, 0);
        self.socket.as_ref()?.get_address(&mut address).ok()?;
        Some(address.port_number())
    }

    /// Returns the first of `count` fresh sequence numbers, never 0.
    pub(crate) fn sequences(&mut self, count: u32) -> u32 {
        if self.sequence > u32::MAX / 2 {
            self.sequence = 0;
        }
        let first = self.sequence + 1;
        self.sequence += count.max(1);
        first
    }

    /// Sends one or more messages with consecutive sequence numbers from `first`, each of which asks for
    /// an acknowledgement, and returns the outcome of each.
    ///
    /// # Errors
    ///
    /// If the answer did not come or was lost; what was done then is unknown.
    pub(crate) fn acknowledged(
        &mut self,
        messages: &[u8],
        first: u32,
        count: u32,
    ) -> io::Result<Vec<Result<(), Refusal>>> {
        self.exchange(messages, |channel| {
            let mut outcomes: Vec<Option<Result<(), Refusal>>> = vec![None; count as usize];
            let mut waiting = count;
            while waiting > 0 {
                channel.receive(|message| {
                    let slot = message.sequence.checked_sub(first).and_then(|n| outcomes.get_mut(n as usize));
                    if let (Some(slot), NLMSG_ERROR) = (slot, message.kind) {
                        let outcome = outcome(message.payload)?;
                        if slot.replace(outcome).is_none() {
                            waiting -= 1;
                        }
                    }
                    Ok(())
                })?;
            }
            Ok(outcomes.into_iter().flatten().collect())
        })
    }

    /// Sends messages with consecutive sequence numbers from `first`, of which only the last asks for an
    /// acknowledgement, and returns those that were refused, by position and in order.
    ///
    /// # Errors
    ///
    /// If the answer did not come or was lost; what was done then is unknown.
    pub(crate) fn refusals(&mut self, messages: &[u8], first: u32, count: u32) -> io::Result<Vec<(u32, Refusal)>> {
        self.exchange(messages, |channel| {
            let mut refusals: Vec<(u32, Refusal)> = Vec::new();
            let mut is_through = false;
            while !is_through {
                channel.receive(|message| {
                    let position = message.sequence.checked_sub(first).filter(|position| *position < count);
                    if let (Some(position), NLMSG_ERROR) = (position, message.kind) {
                        // The kernel answers in order.
                        is_through |= position + 1 == count;
                        if let Err(refusal) = outcome(message.payload)? {
                            refusals.push((position, refusal));
                        }
                    }
                    Ok(())
                })?;
            }
            Ok(refusals)
        })
    }

    /// Sends one request that is answered by one message; `None` if the kernel only acknowledged it.
    pub(crate) fn ask(&mut self, message: &[u8], sequence: u32) -> io::Result<Result<Option<Vec<u8>>, Refusal>> {
        self.exchange(message, |channel| {
            let mut answer = None;
            let mut end = None;
            while end.is_none() {
                channel.receive(|message| {
                    if message.sequence != sequence {
                        return Ok(());
                    }
                    if message.kind == NLMSG_ERROR {
                        end = Some(outcome(message.payload)?);
                    } else {
                        answer = Some(message.payload.to_vec());
                    }
                    Ok(())
                })?;
            }
            Ok(match end {
                Some(Err(refusal)) => Err(refusal),
                Some(Ok(())) | None => Ok(answer),
            })
        })
    }

    /// Sends a dump request and hands every message of the answer to `each`.
    pub(crate) fn dump(&mut self, message: &[u8], sequence: u32, mut each: impl FnMut(&[u8])) -> io::Result<DumpEnd> {
        self.exchange(message, |channel| {
            let mut interrupted = false;
            let mut end = None;
            while end.is_none() {
                channel.receive(|message| {
                    if message.sequence != sequence {
                        return Ok(());
                    }
                    interrupted |= message.flags & NLM_F_DUMP_INTR != 0;
                    match message.kind {
                        NLMSG_NOOP => (),
                        // DONE may carry the error that ended the dump early.
                        NLMSG_DONE if message.payload.len() < 4 => end = Some(DumpEnd::Complete),
                        NLMSG_DONE | NLMSG_ERROR => {
                            end = Some(match outcome(message.payload)? {
                                Ok(()) => DumpEnd::Complete,
                                Err(refusal) => DumpEnd::Refused(refusal.code),
                            });
                        }
                        _ => each(message.payload),
                    }
                    Ok(())
                })?;
            }
            Ok(match end {
                Some(DumpEnd::Complete) if interrupted => DumpEnd::Interrupted,
                Some(end) => end,
                None => DumpEnd::Interrupted,
            })
        })
    }

    /// Sends a dump request whose answer [`Self::dump_on`] takes piece by piece.
    pub(crate) fn begin_dump(&mut self, message: &[u8]) -> io::Result<()> {
        self.exchange(message, |_| Ok(()))
    }

    /// Waits for the next piece of the answer to a dump that was begun; returns its end if that came.
    pub(crate) fn dump_on(&mut self, sequence: u32, mut each: impl FnMut(&[u8])) -> io::Result<Option<DumpEnd>> {
        let mut end = None;
        let result = self.receive(|message| {
            if message.sequence != sequence {
                return Ok(());
            }
            let interrupted = message.flags & NLM_F_DUMP_INTR != 0;
            match message.kind {
                NLMSG_NOOP => (),
                NLMSG_DONE | NLMSG_ERROR => {
                    let outcome = if message.payload.len() < 4 { Ok(()) } else { outcome(message.payload)? };
                    end = Some(match outcome {
                        Ok(()) if interrupted => DumpEnd::Interrupted,
                        Ok(()) => DumpEnd::Complete,
                        Err(refusal) => DumpEnd::Refused(refusal.code),
                    });
                }
                _ => each(message.payload),
            }
            Ok(())
        });
        if result.is_err() {
            self.close();
        }
        result.map(|()| end)
    }

    /// Closes the socket, which ends whatever the kernel has still to say.
    pub(crate) fn close(&mut self) {
        self.socket = None;
    }

    /// Sends, then runs `answer`; closes the socket if either fails.
    fn exchange<T>(&mut self, bytes: &[u8], answer: impl FnOnce(&mut Self) -> io::Result<T>) -> io::Result<T> {
        let result = self.send(bytes).and_then(|()| answer(self));
        if result.is_err() {
            self.socket = None;
        }
        result
    }

    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        let socket = match &mut self.socket {
            Some(socket) => socket,
            closed @ None => closed.insert(open(self.protocol, self.timeout, self.strict)?),
        };
        loop {
            match socket.send(bytes, 0) {
                Ok(n) if n == bytes.len() => return Ok(()),
                Ok(_) => return Err(io::Error::new(io::ErrorKind::WriteZero, "netlink request was cut")),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
                Err(error) => return Err(error),
            }
        }
    }

    /// Waits for one datagram and hands its messages to `each`.
    fn receive(&mut self, mut each: impl FnMut(Received<'_>) -> io::Result<()>) -> io::Result<()> {
        let Some(socket) = &self.socket else {
            return Err(io::ErrorKind::NotConnected.into());
        };
        let length = loop {
            self.buffer.clear();
            match socket.recv(&mut self.buffer, nix::libc::MSG_TRUNC) {
                Ok(length) => break length,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Err(io::Error::new(io::ErrorKind::TimedOut, "the kernel did not answer in time"));
                }
                Err(error) if error.raw_os_error() == Some(Errno::ENOBUFS as i32) => {
                    return Err(io::Error::new(error.kind(), "an answer was lost: receive buffer too small"));
                }
                Err(error) => return Err(error),
            }
        };
        if length > self.buffer.len() {
            return Err(invalid("an answer was cut"));
        }
        let mut rest = self.buffer.as_slice();
        while !rest.is_empty() {
            let (message, after) = split_message(rest).ok_or_else(|| invalid("malformed answer"))?;
            if message.kind == NLMSG_OVERRUN {
                return Err(invalid("an answer was lost: overrun"));
            }
            each(message)?;
            rest = after;
        }
        Ok(())
    }
}

fn open(protocol: isize, timeout: Duration, strict: bool) -> io::Result<Socket> {
    let mut socket = Socket::new(protocol)?;
    let timeout = TimeVal::milliseconds(i64::try_from(timeout.as_millis()).unwrap_or(i64::MAX / 1_000_000));
    setsockopt(&socket, sockopt::ReceiveTimeout, &timeout)?;
    force_receive_buffer(&socket, RECEIVE_BUFFER);
    if strict {
        // Unknown to kernels before 4.20; filters are then ours to apply, as they are anyway.
        socket.set_netlink_get_strict_chk(true).ok();
    }
    socket.bind_auto()?;
    // A connected socket takes messages from the kernel (port 0) only.
    socket.connect(&SocketAddr::new(0, 0))?;
    Ok(socket)
}

/// Raises the receive buffer beyond the system's limit, which needs `CAP_NET_ADMIN`; without it as far
/// as the limit goes (crates.md N3).
pub(crate) fn force_receive_buffer(socket: &Socket, bytes: usize) {
    if setsockopt(socket, sockopt::RcvBufForce, &bytes).is_err() {
        setsockopt(socket, sockopt::RcvBuf, &bytes).ok();
    }
}

/// Begins a message in an empty or filled buffer; [`finish_message`] fills in its length.
pub(crate) fn start_message(buffer: &mut Vec<u8>, kind: u16, flags: u16, sequence: u32) {
    buffer.clear();
    buffer.extend([0; 4]);
    buffer.extend(kind.to_ne_bytes());
    buffer.extend(flags.to_ne_bytes());
    buffer.extend(sequence.to_ne_bytes());
    buffer.extend([0; 4]);
}

/// Fills in the length of the message that the buffer holds.
pub(crate) fn finish_message(buffer: &mut [u8]) {
    let length = u32::try_from(buffer.len()).unwrap_or(u32::MAX);
    if let Some(field) = buffer.first_chunk_mut() {
        *field = length.to_ne_bytes();
    }
}

/// Iterates over attributes, without the flag bits of their kinds; an item is `None` where the bytes
/// are malformed, and is then the last.
pub(crate) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = Option<(u16, &[u8])>> {
    const KIND_MASK: u16 = 0x3fff;
    std::iter::from_fn(move || {
        if bytes.is_empty() {
            return None;
        }
        let item = (|| {
            let length = usize::from(u16::from_ne_bytes(*bytes.first_chunk()?));
            let kind = u16::from_ne_bytes(*bytes.get(2..)?.first_chunk()?);
            let value = bytes.get(4..length)?;
            bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
            Some((kind & KIND_MASK, value))
        })();
        if item.is_none() {
            bytes = &[];
        }
        Some(item)
    })
}

/// One message, as it was sent to a subscriber.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Message<'a> {
    pub(crate) kind: u16,
    /// Netlink port of whoever caused it; 0 is the kernel.
    pub(crate) port: u32,
    pub(crate) payload: &'a [u8],
}

/// Hands every whole message of a datagram to `each`.
pub(crate) fn messages(mut bytes: &[u8], mut each: impl FnMut(Message<'_>)) {
    const PORT_AT: usize = 12;
    while let Some((message, rest)) = split_message(bytes) {
        let port = bytes.get(PORT_AT..).and_then(|port| port.first_chunk()).map_or(0, |port| u32::from_ne_bytes(*port));
        each(Message { kind: message.kind, port, payload: message.payload });
        bytes = rest;
    }
}

/// Cuts the first message off a datagram; `None` if there is no whole message.
fn split_message(bytes: &[u8]) -> Option<(Received<'_>, &[u8])> {
    let length = u32::from_ne_bytes(*bytes.first_chunk()?) as usize;
    let half = |at: usize| Some(u16::from_ne_bytes(*bytes.get(at..)?.first_chunk()?));
    let word = |at: usize| Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?));
    let payload = bytes.get(HEADER_LENGTH..length)?;
    let message = Received { kind: half(4)?, flags: half(6)?, sequence: word(8)?, payload };
    Some((message, bytes.get(length.next_multiple_of(4)..).unwrap_or_default()))
}

/// Iterates over the messages of a datagram, as kind and contents; an item is `None` where the bytes are malformed,
/// and is then the last.
pub(crate) fn each_message(mut bytes: &[u8]) -> impl Iterator<Item = Option<(u16, &[u8])>> {
    std::iter::from_fn(move || {
        if bytes.is_empty() {
            return None;
        }
        let message = split_message(bytes);
        bytes = message.map(|(_, rest)| rest).unwrap_or_default();
        Some(message.map(|(message, _)| (message.kind, message.payload)))
    })
}

/// Reads the contents of an error message or of the end of a dump: a code, 0 for success, and the request.
fn outcome(payload: &[u8]) -> io::Result<Result<(), Refusal>> {
    let (code, request) = payload.split_first_chunk::<4>().ok_or_else(|| invalid("error message without a code"))?;
    Ok(match i32::from_ne_bytes(*code) {
        0 => Ok(()),
        code => Err(Refusal { code: code.saturating_neg(), request: request.to_vec() }),
    })
}

fn invalid(text: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u16, flags: u16, sequence: u32, payload: &[u8]) -> Vec<u8> {
        let mut bytes = ((HEADER_LENGTH + payload.len()) as u32).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.extend(sequence.to_ne_bytes());
        bytes.extend(0u32.to_ne_bytes());
        bytes.extend(payload);
        bytes
    }

    #[test]
    fn a_datagram_is_cut_into_its_messages() {
        let mut datagram = message(20, 2, 7, b"abcde");
        datagram.extend([0; 3]);
        datagram.extend(message(NLMSG_DONE, 2, 7, &0i32.to_ne_bytes()));
        let (first, rest) = split_message(&datagram).unwrap();
        assert_eq!((first.kind, first.flags, first.sequence, first.payload), (20, 2, 7, b"abcde".as_slice()));
        let (second, rest) = split_message(rest).unwrap();
        assert_eq!((second.kind, second.payload.len(), rest.len()), (NLMSG_DONE, 4, 0));
    }

    #[test]
    fn a_message_that_lies_about_its_length_is_refused() {
        let mut bytes = message(20, 0, 1, b"abcd");
        for length in [0u32, 15, 21, u32::MAX] {
            bytes[..4].copy_from_slice(&length.to_ne_bytes());
            assert!(split_message(&bytes).is_none(), "{length}");
        }
        assert!(split_message(&bytes[..10]).is_none());
    }

    #[test]
    fn an_error_carries_a_positive_code_and_the_request() {
        let mut payload = (-4100i32).to_ne_bytes().to_vec();
        payload.extend(b"request");
        let refusal = outcome(&payload).unwrap().unwrap_err();
        assert_eq!(refusal, Refusal { code: 4100, request: b"request".to_vec() });
        assert_eq!(outcome(&0i32.to_ne_bytes()).unwrap(), Ok(()));
        assert!(outcome(&[1]).is_err());
    }

    #[test]
    fn sequence_numbers_are_fresh_and_never_zero() {
        let mut channel = Channel::new(0, Duration::from_secs(1), false);
        assert_eq!((channel.sequences(1), channel.sequences(200), channel.sequences(1)), (1, 2, 202));
        channel.sequence = u32::MAX - 5;
        assert_eq!(channel.sequences(10), 1);
    }
}
