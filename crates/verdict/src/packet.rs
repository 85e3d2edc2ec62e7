//! A packet, as far as policy looks at it.

use std::fmt;
use std::net::IpAddr;

use model::Family;

/// A packet at the moment it is judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    pub source: IpAddr,
    pub destination: IpAddr,
    pub protocol: u8,
    /// Source and destination port of protocols that have ports.
    pub ports: Option<(u16, u16)>,
    /// Type and code of ICMP and ICMPv6.
    pub icmp: Option<(u8, u8)>,
    pub connection: Connection,
}

/// What connection tracking says about a packet (policy.md T-18).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Connection {
    /// The first of its connection.
    #[default]
    New,
    /// Of a connection that was allowed before.
    Established,
    /// Caused by such a connection, for instance an ICMP error.
    Related,
    /// Of no connection, and not able to begin one.
    Invalid,
}

/// Which way a packet goes, as seen from an endpoint: for a workload, ingress is traffic to it; for a host
/// endpoint, ingress is traffic that arrives on its interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Direction {
    Ingress,
    Egress,
}

/// One end of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Side {
    Source,
    Destination,
}

impl Packet {
    /// Makes a packet of a new connection without ports. Both addresses are of one family; a packet whose
    /// addresses are not meets no rule with an address of the other family.
    #[must_use]
    pub const fn new(source: IpAddr, destination: IpAddr, protocol: u8) -> Self {
        Self { source, destination, protocol, ports: None, icmp: None, connection: Connection::New }
    }

    #[must_use]
    pub const fn with_ports(self, source: u16, destination: u16) -> Self {
        Self { ports: Some((source, destination)), ..self }
    }

    #[must_use]
    pub const fn with_icmp(self, kind: u8, code: u8) -> Self {
        Self { icmp: Some((kind, code)), ..self }
    }

    #[must_use]
    pub const fn of(self, connection: Connection) -> Self {
        Self { connection, ..self }
    }

    /// The family is that of the source.
    pub const fn family(&self) -> Family {
        match self.source {
            IpAddr::V4(_) => Family::V4,
            IpAddr::V6(_) => Family::V6,
        }
    }

    pub const fn address(&self, side: Side) -> IpAddr {
        match side {
            Side::Source => self.source,
            Side::Destination => self.destination,
        }
    }

    pub fn port(&self, side: Side) -> Option<u16> {
        let (source, destination) = self.ports?;
        Some(match side {
            Side::Source => source,
            Side::Destination => destination,
        })
    }
}

impl fmt::Display for Packet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { source, destination, protocol, ports, icmp, connection } = self;
        write!(f, "{} from {source}", protocol_name(*protocol))?;
        if let Some((port, _)) = ports {
            write!(f, " port {port}")?;
        }
        write!(f, " to {destination}")?;
        if let Some((_, port)) = ports {
            write!(f, " port {port}")?;
        }
        if let Some((kind, code)) = icmp {
            write!(f, " type {kind} code {code}")?;
        }
        match connection {
            Connection::New => Ok(()),
            Connection::Established => f.write_str(" of a known connection"),
            Connection::Related => f.write_str(" related to a known connection"),
            Connection::Invalid => f.write_str(" of no valid connection"),
        }
    }
}

/// The usual word for a protocol, or its number.
fn protocol_name(number: u8) -> String {
    match number {
        1 => "icmp".to_owned(),
        6 => "tcp".to_owned(),
        17 => "udp".to_owned(),
        58 => "icmpv6".to_owned(),
        132 => "sctp".to_owned(),
        other => format!("protocol {other}"),
    }
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
        })
    }
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Source => "source",
            Self::Destination => "destination",
        })
    }
}
