//! How route operations reach the kernel: rtnetlink messages, in batches (crates.md 5.3, N2, N8 to N11).
//!
//! The route driver decides, a [`Transport`] performs. [`Netlink`] is the real one.

use std::io;
use std::net::IpAddr;
use std::task::{Context, Poll};
use std::time::Duration;

use ipnet::IpNet;
use model::Family;
use netlink_packet_core::NetlinkMessage;
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;

use super::news::{Follower, News};
use super::plan::{KernelRoute, RouteKey, RouteOp};
use crate::neigh::{self, Neighbour};
use crate::netlink::{Channel, DumpEnd, NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_REPLACE, NLM_F_REQUEST, attributes};

/// Larger batches are no faster, and their answers need more room (crates.md N2).
const BATCH: usize = 200;

/// A reading of the main table of one family.
#[derive(Debug, Default)]
pub struct Reading {
    pub routes: Vec<(RouteKey, KernelRoute)>,
    pub complete: bool,
}

/// See the [module documentation](self). Error numbers are positive.
pub trait Transport: std::fmt::Debug + Send {
    /// Returns the main table of one family.
    fn read(&mut self, family: Family) -> io::Result<Reading>;

    /// Returns the permanent IPv4 neighbours; some may be missing.
    fn read_neighbours(&mut self) -> io::Result<Vec<Neighbour>>;

    /// Performs operations in order, whatever fails, and returns the outcome of each.
    fn perform(&mut self, family: Family, ops: &[RouteOp]) -> io::Result<Vec<Result<(), i32>>>;

    /// Makes neighbours permanent and returns the outcome of each.
    fn write_neighbours(&mut self, neighbours: &[Neighbour]) -> io::Result<Vec<Result<(), i32>>>;

    /// Takes what others did to routes of the main tables and to IPv4 neighbours, in order, as far as it is
    /// known already; true if there may be more. Begins with [`News::Lost`]: what was before is not told.
    fn take_news(&mut self, out: &mut Vec<News>) -> io::Result<bool>;

    /// As [`Self::take_news`], once there is something; the context is woken then. Waits for ever as long as
    /// nothing was taken without waiting.
    fn poll_news(&mut self, context: &mut Context<'_>, out: &mut Vec<News>) -> Poll<io::Result<()>>;
}

/// The kernel, through one long-lived socket, and another one that only listens.
#[derive(Debug)]
pub struct Netlink {
    channel: Channel,
    follower: Follower,
    /// Heard while writing.
    stash: Vec<News>,
}

impl Netlink {
    /// Allocates; sockets are opened by the first request. `timeout` limits the wait for each answer. Without
    /// `ipv6`, its routes are not listened to (U18.a).
    pub fn new(timeout: Duration, ipv6: bool) -> Self {
        Self { channel: Channel::new(NETLINK_ROUTE, timeout, true), follower: Follower::new(ipv6), stash: Vec::new() }
    }

    fn dump(&mut self, request: RouteNetlinkMessage, each: impl FnMut(&[u8])) -> io::Result<DumpEnd> {
        let sequence = self.channel.sequences(1);
        let bytes = serialize(request, NLM_F_REQUEST | NLM_F_DUMP, sequence);
        self.channel.dump(&bytes, sequence, each)
    }

    fn batches(&mut self, messages: Vec<(RouteNetlinkMessage, u16)>) -> io::Result<Vec<Result<(), i32>>> {
        let mut outcomes = Vec::with_capacity(messages.len());
        let mut messages = messages.into_iter().peekable();
        while messages.peek().is_some() {
            let batch: Vec<_> = messages.by_ref().take(BATCH).collect();
            let count = u32::try_from(batch.len()).unwrap_or(u32::MAX);
            let first = self.channel.sequences(count);
            let mut bytes = Vec::new();
            for ((message, flags), sequence) in batch.into_iter().zip(first..) {
                bytes.extend(serialize(message, NLM_F_REQUEST | NLM_F_ACK | flags, sequence));
            }
            let answers = self.channel.acknowledged(&bytes, first, count)?;
            outcomes.extend(answers.into_iter().map(|answer| answer.map_err(|refusal| refusal.code)));
            if messages.peek().is_some() {
                // What we do ourselves is told to us, too, and must not fill the room for what others do.
                self.follower.take(self.channel.port(), &mut self.stash)?;
            }
        }
        Ok(outcomes)
    }
}

impl Transport for Netlink {
    fn read(&mut self, family: Family) -> io::Result<Reading> {
        // Filters for kernels that check strictly; the others return everything (N8, N9).
        let mut request = RouteMessage::default();
        request.header.address_family = address_family(family);
        request.header.table = RouteHeader::RT_TABLE_MAIN;
        let mut routes = Vec::new();
        let end = self.dump(RouteNetlinkMessage::GetRoute(request), |payload| {
            // What cannot be understood is nothing this program made.
            let route = parse_route(payload).filter(|(of, ..)| *of == family);
            routes.extend(route.map(|(_, key, route)| (key, route)));
        })?;
        match end {
            DumpEnd::Complete => Ok(Reading { routes, complete: true }),
            DumpEnd::Interrupted => Ok(Reading { routes, complete: false }),
            DumpEnd::Refused(nix::libc::EINTR) => Ok(Reading { routes, complete: false }),
            // There is no such table yet.
            DumpEnd::Refused(nix::libc::ENOENT) => Ok(Reading { routes: Vec::new(), complete: true }),
            DumpEnd::Refused(code) => Err(io::Error::from_raw_os_error(code)),
        }
    }

    fn read_neighbours(&mut self) -> io::Result<Vec<Neighbour>> {
        let mut neighbours = Vec::new();
        let end = self.dump(neigh::list(), |payload| neighbours.extend(neigh::permanent(payload)))?;
        match end {
            DumpEnd::Complete | DumpEnd::Interrupted => Ok(neighbours),
            DumpEnd::Refused(code) => Err(io::Error::from_raw_os_error(code)),
        }
    }

    fn perform(&mut self, family: Family, ops: &[RouteOp]) -> io::Result<Vec<Result<(), i32>>> {
        let message = |op: &RouteOp| match op {
            RouteOp::Replace(key, route) => {
                (RouteNetlinkMessage::NewRoute(replace(family, key, route)), NLM_F_CREATE | NLM_F_REPLACE)
            }
            RouteOp::Delete(key, index) => (RouteNetlinkMessage::DelRoute(delete(family, key, *index)), 0),
        };
        self.batches(ops.iter().map(message).collect())
    }

    fn write_neighbours(&mut self, neighbours: &[Neighbour]) -> io::Result<Vec<Result<(), i32>>> {
        let messages = neighbours.iter().map(|neighbour| (neigh::replace(neighbour), NLM_F_CREATE | NLM_F_REPLACE));
        self.batches(messages.collect())
    }

    fn take_news(&mut self, out: &mut Vec<News>) -> io::Result<bool> {
        out.append(&mut self.stash);
        self.follower.take(self.channel.port(), out)
    }

    fn poll_news(&mut self, context: &mut Context<'_>, out: &mut Vec<News>) -> Poll<io::Result<()>> {
        self.follower.poll_take(context, self.channel.port(), out)
    }
}

fn serialize(message: RouteNetlinkMessage, flags: u16, sequence: u32) -> Vec<u8> {
    let mut message = NetlinkMessage::from(message);
    message.header.flags = flags;
    message.header.sequence_number = sequence;
    message.finalize();
    let mut bytes = vec![0; message.buffer_len().next_multiple_of(4)];
    message.serialize(&mut bytes);
    bytes
}

const fn address_family(family: Family) -> AddressFamily {
    match family {
        Family::V4 => AddressFamily::Inet,
        Family::V6 => AddressFamily::Inet6,
    }
}

/// The message that creates a route or replaces what has its key. Everything is set, nothing is left to
/// defaults (N8).
fn replace(family: Family, key: &RouteKey, route: &KernelRoute) -> RouteMessage {
    let mut message = keyed(family, key);
    message.header.protocol = RouteProtocol::from(route.protocol);
    message.header.scope = RouteScope::from(route.scope);
    message.header.kind = RouteType::from(route.kind);
    message.attributes.push(RouteAttribute::Oif(route.index));
    message
}

/// The message that deletes a route whatever its protocol, scope and type (host.md 7.3), but only on the
/// interface where it was seen.
fn delete(family: Family, key: &RouteKey, index: u32) -> RouteMessage {
    let mut message = keyed(family, key);
    message.header.scope = RouteScope::NoWhere;
    if index != 0 {
        message.attributes.push(RouteAttribute::Oif(index));
    }
    message
}

fn keyed(family: Family, key: &RouteKey) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = address_family(family);
    message.header.destination_prefix_length = key.destination.prefix_len();
    message.header.tos = key.tos;
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.attributes.push(RouteAttribute::Destination(RouteAddress::from(key.destination.addr())));
    if key.metric != 0 {
        message.attributes.push(RouteAttribute::Priority(key.metric));
    }
    message
}

mod attribute {
    pub(super) const DESTINATION: u16 = 1;
    pub(super) const INTERFACE: u16 = 4;
    pub(super) const GATEWAY: u16 = 5;
    pub(super) const PRIORITY: u16 = 6;
    pub(super) const PREFERRED_SOURCE: u16 = 7;
    pub(super) const METRICS: u16 = 8;
    pub(super) const MULTIPATH: u16 = 9;
    pub(super) const CACHE_INFO: u16 = 12;
    pub(super) const TABLE: u16 = 15;
    pub(super) const VIA: u16 = 18;
    pub(super) const ENCAP: u16 = 22;
    pub(super) const NEXT_HOP_ID: u16 = 30;
}

/// Reads a route; `None` if it is not in the main table. Nothing is copied: of a hundred thousand routes of a
/// routing daemon, hardly one is ours.
pub(super) fn parse_route(payload: &[u8]) -> Option<(Family, RouteKey, KernelRoute)> {
    /// Length of `struct rtmsg`.
    const LENGTH: usize = 12;
    /// `RTM_F_CLONED`: no route but what the kernel made of one for a single destination.
    const CLONED: u32 = 0x200;
    /// `RT_TABLE_COMPAT`: the number is in the attribute only.
    const ELSEWHERE: u8 = 252;
    let [family, prefix, source_prefix, tos, table, protocol, scope, kind] = *payload.first_chunk()?;
    let family = match i32::from(family) {
        nix::libc::AF_INET => Family::V4,
        nix::libc::AF_INET6 => Family::V6,
        _ => return None,
    };
    if (table != RouteHeader::RT_TABLE_MAIN && table != ELSEWHERE) || word(payload.get(8..)?)? & CLONED != 0 {
        return None;
    }
    let mut table = u32::from(table);
    let mut address = match family {
        Family::V4 => IpAddr::from([0; 4]),
        Family::V6 => IpAddr::from([0; 16]),
    };
    let (mut metric, mut index) = (0, 0);
    let mut special = source_prefix != 0;
    for attribute in attributes(payload.get(LENGTH..)?) {
        let (number, value) = attribute?;
        match number {
            // It beats the header (N10).
            attribute::TABLE => table = word(value)?,
            attribute::DESTINATION => {
                address = match family {
                    Family::V4 => IpAddr::from(*value.first_chunk::<4>()?),
                    Family::V6 => IpAddr::from(*value.first_chunk::<16>()?),
                };
            }
            attribute::PRIORITY => metric = word(value)?,
            attribute::INTERFACE => index = word(value)?,
            // The third field is the time it has left.
            attribute::CACHE_INFO => special |= word(value.get(8..)?)? != 0,
            attribute::GATEWAY
            | attribute::VIA
            | attribute::PREFERRED_SOURCE
            | attribute::METRICS
            | attribute::MULTIPATH
            | attribute::ENCAP
            | attribute::NEXT_HOP_ID => special = true,
            // Whatever is not named here does not change where packets go.
            _ => (),
        }
    }
    if table != u32::from(RouteHeader::RT_TABLE_MAIN) {
        return None;
    }
    // Routes that lead nowhere are reported on the loopback interface by IPv6 (host.md 7.2).
    if kind != u8::from(RouteType::Unicast) && index <= 1 {
        index = 0;
    }
    let destination = IpNet::new(address, prefix).ok()?;
    Some((family, RouteKey { destination, tos, metric }, KernelRoute { index, protocol, kind, scope, special }))
}

fn word(bytes: &[u8]) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.first_chunk()?))
}

#[cfg(test)]
mod tests {
    use netlink_packet_core::Emitable as _;

    use super::super::plan::{SCOPE_LINK, UNICAST};
    use super::*;

    fn key(destination: &str, metric: u32) -> RouteKey {
        RouteKey { destination: destination.parse().unwrap(), tos: 0, metric }
    }

    fn bytes(message: &RouteMessage) -> Vec<u8> {
        let mut bytes = vec![0; message.buffer_len()];
        message.emit(&mut bytes);
        bytes
    }

    fn read(message: &RouteMessage) -> Option<(Family, RouteKey, KernelRoute)> {
        parse_route(&bytes(message))
    }

    #[test]
    fn cut_routes_are_no_routes_and_do_no_harm() {
        let route = KernelRoute { index: 7, protocol: 80, kind: UNICAST, scope: SCOPE_LINK, special: false };
        let bytes = bytes(&replace(Family::V4, &key("10.65.0.2/32", 1024), &route));
        let whole = parse_route(&bytes);
        for cut in 0..bytes.len() {
            assert!(parse_route(&bytes[..cut]) != whole, "{cut}");
        }
    }

    #[test]
    fn what_is_written_is_read_back() {
        for (family, destination, scope) in [
            (Family::V4, "10.65.0.2/32", SCOPE_LINK),
            (Family::V4, "0.0.0.0/0", SCOPE_LINK),
            (Family::V6, "fd10::2/128", 0),
        ] {
            let route = KernelRoute { index: 7, protocol: 80, kind: UNICAST, scope, special: false };
            let message = replace(family, &key(destination, 1024), &route);
            assert_eq!(read(&message), Some((family, key(destination, 1024), route)));
        }
    }

    #[test]
    fn routes_of_other_tables_are_left_out() {
        let route = KernelRoute { index: 7, protocol: 3, kind: UNICAST, scope: SCOPE_LINK, special: false };
        let mut message = replace(Family::V4, &key("10.65.0.2/32", 0), &route);
        message.attributes.push(RouteAttribute::Table(1000));
        assert_eq!(read(&message), None, "the attribute beats the header (N10)");
        message.attributes.pop();
        message.header.table = 255;
        assert_eq!(read(&message), None);
    }

    #[test]
    fn a_gateway_or_a_source_makes_another_route_of_it() {
        let route = KernelRoute { index: 7, protocol: 3, kind: UNICAST, scope: SCOPE_LINK, special: false };
        let address = RouteAddress::from(IpAddr::from([10, 0, 0, 1]));
        for attribute in [
            RouteAttribute::Gateway(address.clone()),
            RouteAttribute::PrefSource(address),
            RouteAttribute::NhId(3),
            RouteAttribute::Metrics(Vec::new()),
        ] {
            let mut message = replace(Family::V4, &key("10.65.0.2/32", 0), &route);
            message.attributes.push(attribute);
            assert!(read(&message).unwrap().2.special);
        }
    }

    #[test]
    fn a_deletion_names_the_key_and_the_interface_and_leaves_the_rest_open() {
        let message = delete(Family::V4, &key("10.65.0.2/32", 1024), 7);
        let header = &message.header;
        let fields = (u8::from(header.protocol), u8::from(header.scope), u8::from(header.kind), header.table);
        assert_eq!(fields, (0, 255, 0, 254));
        assert!(message.attributes.contains(&RouteAttribute::Oif(7)));
        assert!(message.attributes.contains(&RouteAttribute::Priority(1024)));
        assert!(!delete(Family::V4, &key("10.65.0.0/26", 0), 0).attributes.contains(&RouteAttribute::Oif(0)));
    }
}
