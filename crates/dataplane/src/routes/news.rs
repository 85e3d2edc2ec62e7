//! What others do to routes and neighbours, as the kernel tells it at once (U15.d, crates.md N6, N16).
//!
//! Used by [`super::wire::Netlink`], which says what it wrote itself. Reads without waiting; a task may wait
//! for more. The socket is drained in portions, and messages that cannot matter are dropped after a look at a
//! few bytes, so that a routing daemon that changes a hundred thousand routes costs a microsecond each.

use std::io;
use std::task::{Context, Poll, ready};

use model::Family;
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{AsyncSocket as _, Socket, TokioSocket};
use nix::libc;

use super::plan::{KernelRoute, RouteKey};
use super::wire::parse_route;
use crate::neigh::{self, Neighbour};
use crate::netlink::{self, Message};

/// Room for bursts of messages (crates.md N3).
const RECEIVE_BUFFER: usize = 8 << 20;
/// Messages taken at a time.
const PORTION: usize = 512;
/// Larger than any message to subscribers.
const DATAGRAM: usize = 1 << 16;

const RTM_NEWROUTE: u16 = 24;
const RTM_DELROUTE: u16 = 25;
const RTM_NEWNEIGH: u16 = 28;
const RTM_DELNEIGH: u16 = 29;

const RTNLGRP_NEIGH: u32 = 3;
const RTNLGRP_IPV4_ROUTE: u32 = 7;
const RTNLGRP_IPV6_ROUTE: u32 = 11;

/// Something that this program did not do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum News {
    /// Messages were lost, or are followed only from now on.
    Lost,
    Route(RouteNews),
    Neighbour(NeighbourNews),
}

/// A route of the main table came, was replaced, or went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RouteNews {
    pub family: Family,
    pub key: RouteKey,
    pub route: KernelRoute,
    pub gone: bool,
    /// Netlink port of whoever asked for it, mostly its process id; 0 is the kernel itself.
    pub by: u32,
}

/// An IPv4 neighbour changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NeighbourNews {
    pub index: u32,
    pub address: std::net::Ipv4Addr,
    /// `None` unless it is permanent now.
    pub mac: Option<[u8; 6]>,
}

/// See the [module documentation](self).
pub(super) struct Follower {
    ipv6: bool,
    socket: Option<TokioSocket>,
    buffer: Vec<u8>,
}

impl std::fmt::Debug for Follower {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Follower").field("ipv6", &self.ipv6).field("open", &self.socket.is_some()).finish()
    }
}

impl Follower {
    /// Allocates; the socket is opened by the first look.
    pub(super) fn new(ipv6: bool) -> Self {
        Self { ipv6, socket: None, buffer: Vec::new() }
    }

    /// Takes what is there, at most a portion; true if there may be more. `own` is the port that this program
    /// writes with. To be called inside a runtime with I/O.
    pub(super) fn take(&mut self, own: Option<u32>, out: &mut Vec<News>) -> io::Result<bool> {
        let socket = match &self.socket {
            Some(socket) => socket,
            None => {
                self.buffer.reserve(DATAGRAM);
                out.push(News::Lost);
                self.socket.insert(open(self.ipv6)?)
            }
        };
        let taken = drain(socket.socket_ref(), &mut self.buffer, self.ipv6, own, out);
        if taken.is_err() {
            self.socket = None;
        }
        taken
    }

    /// As [`Self::take`], once there is something. Never, as long as nothing was taken without waiting.
    pub(super) fn poll_take(
        &mut self,
        context: &mut Context<'_>,
        own: Option<u32>,
        out: &mut Vec<News>,
    ) -> Poll<io::Result<()>> {
        let Some(socket) = &self.socket else { return Poll::Pending };
        loop {
            self.buffer.clear();
            let taken = match ready!(socket.poll_recv_from(context, &mut self.buffer)) {
                Ok(from) => {
                    if from.port_number() == 0 {
                        listen(&self.buffer, self.ipv6, own, out);
                    }
                    drain(socket.socket_ref(), &mut self.buffer, self.ipv6, own, out).map(|_| ())
                }
                Err(error) => lost(error, out),
            };
            if taken.is_err() {
                self.socket = None;
                return Poll::Ready(taken);
            }
            if !out.is_empty() {
                return Poll::Ready(taken);
            }
        }
    }
}

fn open(ipv6: bool) -> io::Result<TokioSocket> {
    let mut socket = TokioSocket::new(NETLINK_ROUTE)?;
    netlink::force_receive_buffer(socket.socket_ref(), RECEIVE_BUFFER);
    socket.socket_mut().bind_auto()?;
    let groups = [RTNLGRP_IPV4_ROUTE, RTNLGRP_NEIGH].into_iter().chain(ipv6.then_some(RTNLGRP_IPV6_ROUTE));
    for group in groups {
        socket.socket_mut().add_membership(group)?;
    }
    Ok(socket)
}

/// Takes at most a portion of what a socket has; true if there may be more.
fn drain(socket: &Socket, buffer: &mut Vec<u8>, ipv6: bool, own: Option<u32>, out: &mut Vec<News>) -> io::Result<bool> {
    for _ in 0..PORTION {
        buffer.clear();
        match socket.recv_from(buffer, 0) {
            // Anybody may send to this socket; only the kernel is listened to.
            Ok((_, from)) if from.port_number() != 0 => (),
            Ok(_) => listen(buffer, ipv6, own, out),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            Err(error) => lost(error, out)?,
        }
    }
    Ok(true)
}

/// Messages were lost if the room for them was full; the connection lives on (N6).
fn lost(error: io::Error, out: &mut Vec<News>) -> io::Result<()> {
    match error.raw_os_error() {
        Some(libc::ENOBUFS) => out.push(News::Lost),
        Some(libc::EINTR) => (),
        _ => return Err(error),
    }
    Ok(())
}

fn listen(datagram: &[u8], ipv6: bool, own: Option<u32>, out: &mut Vec<News>) {
    netlink::messages(datagram, |message| out.extend(understand(ipv6, own, &message)));
}

fn understand(ipv6: bool, own: Option<u32>, message: &Message<'_>) -> Option<News> {
    // Port 0 is the kernel, and no port of ours.
    if own == Some(message.port) && message.port != 0 {
        return None;
    }
    match message.kind {
        RTM_NEWROUTE | RTM_DELROUTE => {
            let (family, key, route) = parse_route(message.payload)?;
            let gone = message.kind == RTM_DELROUTE;
            let news = RouteNews { family, key, route, gone, by: message.port };
            (ipv6 || family == Family::V4).then_some(News::Route(news))
        }
        RTM_NEWNEIGH | RTM_DELNEIGH => {
            let (index, address) = neigh::subject(message.payload)?;
            let permanent = neigh::permanent(message.payload).filter(|_| message.kind == RTM_NEWNEIGH);
            let mac = permanent.map(|Neighbour { mac, .. }| mac);
            Some(News::Neighbour(NeighbourNews { index, address, mac }))
        }
        _ => None,
    }
}
