//! Whether a packet meets the conditions of a rule.

use std::net::IpAddr;

use model::Protocol;
use program::{ConnState, InterfaceMatch, Match, Member, Rule, Side, TableId};
use verdict::{Connection, Packet};

use super::{Fault, Kernel, State};

impl Kernel {
    pub(super) fn meets_all(&self, id: TableId, rule: &Rule, state: &State<'_>) -> Result<bool, Fault> {
        for condition in &rule.matches {
            if !self.meets(id, condition, state)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn meets(&self, id: TableId, condition: &Match, state: &State<'_>) -> Result<bool, Fault> {
        let State { passage, mark, is_tracked, .. } = state;
        let packet = &passage.packet;
        Ok(match condition {
            Match::MarkClear(bits) => mark & bits == 0,
            Match::MarkAny(bits) => mark & bits != 0,
            Match::MarkIs { value, mask } => state.mark & mask == *value,
            Match::MarkIsNot { value, mask } => state.mark & mask != *value,
            Match::In(wanted) => interface(wanted, passage.from),
            Match::Out(wanted) => interface(wanted, passage.to),
            Match::ReversePathFailed => passage.reverse_path_failed,
            // All addresses count as ones of the outgoing interface.
            Match::LocalAddress { side, negated, limit_out: _ } => {
                passage.local.contains(&address(packet, *side)) != *negated
            }
            Match::ConnTrack { negated, states } => {
                let is = |wanted: &ConnState| match wanted {
                    ConnState::Dnat => passage.translated,
                    ConnState::New | ConnState::Related | ConnState::Established | ConnState::Invalid => {
                        *is_tracked && *wanted == connection(packet.connection)
                    }
                };
                states.iter().any(is) != *negated
            }
            Match::Protocol { negated, protocol } => (number(protocol)? == packet.protocol) != *negated,
            Match::Net { side, negated, net } => net.contains(&address(packet, *side)) != *negated,
            Match::Address { side, address: wanted } => address(packet, *side) == *wanted,
            Match::Set { side, negated, set, with_port: _ } => {
                let Some(set) = self.sets.get(set) else {
                    return Err(Fault(format!("set {set} is not there, but a rule of {id:?} names it")));
                };
                let address = address(packet, *side);
                let is_in = set.members.iter().any(|member| match *member {
                    Member::Address(member) => member == address,
                    Member::Net(net) => net.contains(&address),
                    Member::AddressPort { address: member, protocol, port: number } => {
                        member == address && protocol == packet.protocol && port(packet, *side) == Some(number)
                    }
                });
                is_in != *negated
            }
            // A packet without ports does not get here: the tools refuse the match without a protocol that
            // has them, and the protocol is looked at first.
            Match::Ports { side, negated, ports } => match port(packet, *side) {
                Some(port) => ports.iter().any(|range| (range.first..=range.last).contains(&port)) != *negated,
                None => false,
            },
            Match::DestinationPort(wanted) => port(packet, Side::Destination) == Some(*wanted),
            Match::Icmp { family: _, negated, icmp } => match packet.icmp {
                Some((kind, code)) => (icmp.kind == kind && icmp.code.is_none_or(|wanted| wanted == code)) != *negated,
                None => false,
            },
            Match::Limit { .. } => true,
        })
    }
}

fn interface(wanted: &InterfaceMatch, name: &str) -> bool {
    match wanted {
        InterfaceMatch::Exact(exact) => name == exact,
        InterfaceMatch::Prefix(prefix) => name.starts_with(prefix.as_str()),
    }
}

const fn connection(connection: Connection) -> ConnState {
    match connection {
        Connection::New => ConnState::New,
        Connection::Established => ConnState::Established,
        Connection::Related => ConnState::Related,
        Connection::Invalid => ConnState::Invalid,
    }
}

const fn address(packet: &Packet, side: Side) -> IpAddr {
    match side {
        Side::Source => packet.source,
        Side::Destination => packet.destination,
    }
}

fn port(packet: &Packet, side: Side) -> Option<u16> {
    let (source, destination) = packet.ports?;
    Some(match side {
        Side::Source => source,
        Side::Destination => destination,
    })
}

pub(super) fn number(protocol: &Protocol) -> Result<u8, Fault> {
    protocol.number().ok_or_else(|| Fault(format!("the tools do not know protocol {protocol}")))
}
