//! Static IPv4 neighbours of workload interfaces, as netlink messages (host.md 11).
//!
//! Used by the route driver, which decides what is written when. IPv6 has none.

use std::net::Ipv4Addr;

use netlink_packet_core::Parseable as _;
use netlink_packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState};
use netlink_packet_route::route::RouteType;
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use crate::netlink;

/// An address on a link and who answers for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Neighbour {
    /// Interface.
    pub index: u32,
    pub address: Ipv4Addr,
    pub mac: [u8; 6],
}

/// Asks for all IPv4 neighbours.
pub(crate) fn list() -> RouteNetlinkMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Inet;
    RouteNetlinkMessage::GetNeighbour(message)
}

/// Makes a neighbour permanent, whatever was known of the address before.
pub(crate) fn replace(neighbour: &Neighbour) -> RouteNetlinkMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Inet;
    message.header.ifindex = neighbour.index;
    message.header.state = NeighbourState::Permanent;
    message.header.kind = RouteType::Unicast;
    message.attributes.push(NeighbourAttribute::Destination(NeighbourAddress::Inet(neighbour.address)));
    message.attributes.push(NeighbourAttribute::LinkLayerAddress(neighbour.mac.to_vec()));
    RouteNetlinkMessage::NewNeighbour(message)
}

/// Returns which IPv4 neighbour a message is about.
pub(crate) fn subject(payload: &[u8]) -> Option<(u32, Ipv4Addr)> {
    const LENGTH: usize = 12;
    const DESTINATION: u16 = 1;
    const INET: u8 = 2;
    if *payload.first()? != INET {
        return None;
    }
    let index = u32::from_ne_bytes(*payload.get(4..)?.first_chunk()?);
    let attributes = netlink::attributes(payload.get(LENGTH..)?).map_while(|attribute| attribute);
    let address = attributes.into_iter().find_map(|(kind, value)| (kind == DESTINATION).then_some(value))?;
    let octets: [u8; 4] = address.try_into().ok()?;
    Some((index, octets.into()))
}

/// Reads one entry of a list; `None` unless it is a permanent IPv4 neighbour.
pub(crate) fn permanent(payload: &[u8]) -> Option<Neighbour> {
    let message = NeighbourMessage::parse(payload).ok()?;
    if message.header.family != AddressFamily::Inet || message.header.state != NeighbourState::Permanent {
        return None;
    }
    let (mut address, mut mac) = (None, None);
    for attribute in message.attributes {
        if let NeighbourAttribute::Destination(NeighbourAddress::Inet(found)) = attribute {
            address = Some(found);
        } else if let NeighbourAttribute::LinkLayerAddress(bytes) = attribute {
            mac = <[u8; 6]>::try_from(bytes).ok();
        }
    }
    Some(Neighbour { index: message.header.ifindex, address: address?, mac: mac? })
}

#[cfg(test)]
mod tests {
    use super::*;
    use netlink_packet_core::Emitable as _;

    #[test]
    fn what_is_written_is_read_back_and_only_if_permanent() {
        let neighbour = Neighbour { index: 7, address: Ipv4Addr::new(10, 65, 0, 2), mac: [0xee; 6] };
        let RouteNetlinkMessage::NewNeighbour(mut message) = replace(&neighbour) else { panic!() };
        let bytes = |message: &NeighbourMessage| {
            let mut bytes = vec![0; message.buffer_len()];
            message.emit(&mut bytes);
            bytes
        };
        assert_eq!(permanent(&bytes(&message)), Some(neighbour));
        assert_eq!(subject(&bytes(&message)), Some((neighbour.index, neighbour.address)));
        message.header.state = NeighbourState::Reachable;
        assert_eq!(permanent(&bytes(&message)), None);
        assert_eq!(subject(&bytes(&message)), Some((neighbour.index, neighbour.address)), "whatever its state");
        assert_eq!((permanent(&[2, 0]), subject(&[2, 0])), (None, None));
    }
}
