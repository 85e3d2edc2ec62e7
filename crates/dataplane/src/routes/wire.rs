//! How route operations reach the kernel: rtnetlink messages, in batches (crates.md 5.3, N2, N8 to N11).
//!
//! The route driver decides, a [`Transport`] performs. [`Netlink`] is the real one.

use std::io;
use std::net::IpAddr;
use std::time::Duration;

use ipnet::IpNet;
use model::Family;
use netlink_packet_core::{NetlinkMessage, Parseable as _};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;

use super::plan::{KernelRoute, RouteKey, RouteOp};
use crate::neigh::{self, Neighbour};
use crate::netlink::{Channel, DumpEnd, NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_REPLACE, NLM_F_REQUEST};

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
}

/// The kernel, through one long-lived socket.
#[derive(Debug)]
pub struct Netlink {
    channel: Channel,
}

impl Netlink {
    /// Allocates; the socket is opened by the first request. `timeout` limits the wait for each answer.
    pub fn new(timeout: Duration) -> Self {
        Self { channel: Channel::new(NETLINK_ROUTE, timeout, true) }
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
            routes.extend(RouteMessage::parse(payload).ok().and_then(|message| understand(family, &message)));
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

/// Reads a route; `None` if it is not in the main table of the family.
fn understand(family: Family, message: &RouteMessage) -> Option<(RouteKey, KernelRoute)> {
    let header = &message.header;
    if header.address_family != address_family(family) || header.flags.contains(RouteFlags::Cloned) {
        return None;
    }
    let mut table = u32::from(header.table);
    let mut address = match family {
        Family::V4 => IpAddr::from([0; 4]),
        Family::V6 => IpAddr::from([0; 16]),
    };
    let (mut metric, mut index) = (0, 0);
    let mut special = header.source_prefix_length != 0;
    for attribute in &message.attributes {
        // Whatever is not named here does not change where packets go.
        if let RouteAttribute::Table(id) = attribute {
            table = *id;
        } else if let RouteAttribute::Destination(RouteAddress::Inet(destination)) = attribute {
            address = (*destination).into();
        } else if let RouteAttribute::Destination(RouteAddress::Inet6(destination)) = attribute {
            address = (*destination).into();
        } else if let RouteAttribute::Priority(priority) = attribute {
            metric = *priority;
        } else if let RouteAttribute::Oif(oif) = attribute {
            index = *oif;
        } else if let RouteAttribute::CacheInfo(info) = attribute {
            special |= info.expires != 0;
        } else {
            special |= matches!(
                attribute,
                RouteAttribute::Gateway(_)
                    | RouteAttribute::Via(_)
                    | RouteAttribute::PrefSource(_)
                    | RouteAttribute::Metrics(_)
                    | RouteAttribute::MultiPath(_)
                    | RouteAttribute::Encap(_)
                    | RouteAttribute::NhId(_)
            );
        }
    }
    if table != u32::from(RouteHeader::RT_TABLE_MAIN) {
        return None;
    }
    // Routes that lead nowhere are reported on the loopback interface by IPv6 (host.md 7.2).
    if header.kind != RouteType::Unicast && index <= 1 {
        index = 0;
    }
    let destination = IpNet::new(address, header.destination_prefix_length).ok()?;
    let route = KernelRoute {
        index,
        protocol: u8::from(header.protocol),
        kind: u8::from(header.kind),
        scope: u8::from(header.scope),
        special,
    };
    Some((RouteKey { destination, tos: header.tos, metric }, route))
}

#[cfg(test)]
mod tests {
    use super::super::plan::{SCOPE_LINK, UNICAST};
    use super::*;

    fn key(destination: &str, metric: u32) -> RouteKey {
        RouteKey { destination: destination.parse().unwrap(), tos: 0, metric }
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
            assert_eq!(understand(family, &message), Some((key(destination, 1024), route)));
        }
    }

    #[test]
    fn routes_of_other_tables_and_families_are_left_out() {
        let route = KernelRoute { index: 7, protocol: 3, kind: UNICAST, scope: SCOPE_LINK, special: false };
        let mut message = replace(Family::V4, &key("10.65.0.2/32", 0), &route);
        assert_eq!(understand(Family::V6, &message), None);
        message.attributes.push(RouteAttribute::Table(1000));
        assert_eq!(understand(Family::V4, &message), None, "the attribute beats the header (N10)");
        message.attributes.pop();
        message.header.table = 255;
        assert_eq!(understand(Family::V4, &message), None);
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
            assert!(understand(Family::V4, &message).unwrap().1.special);
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
