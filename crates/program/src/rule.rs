//! Rules: matches, one action, comments.

use ipnet::IpNet;
use model::Family;
pub use model::{PortRange, Protocol};

use crate::chain::ChainName;
use crate::origin::Origin;
use crate::set::SetName;

/// One rule. Matches are and-ed and keep their order, which is part of the rule hash.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rule {
    pub matches: Vec<Match>,
    /// `None`: the rule only counts.
    pub action: Option<Action>,
    pub comments: Vec<String>,
    /// Where the rule comes from; never part of what is written.
    pub origin: Option<Origin>,
}

impl Rule {
    pub fn new(matches: Vec<Match>, action: Action) -> Self {
        Self { matches, action: Some(action), comments: Vec::new(), origin: None }
    }

    #[must_use]
    pub fn comment(mut self, comment: impl Into<String>) -> Self {
        self.comments.push(comment.into());
        self
    }

    /// The chain that the rule jumps or goes to.
    pub fn target(&self) -> Option<&ChainName> {
        match &self.action {
            Some(Action::Jump(chain) | Action::Goto(chain)) => Some(chain),
            _ => None,
        }
    }

    /// The sets that the rule looks into.
    pub fn sets(&self) -> impl Iterator<Item = &SetName> {
        self.matches.iter().filter_map(|m| if let Match::Set { set, .. } = m { Some(set) } else { None })
    }
}

/// Which end of the packet a match looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Side {
    Source,
    Destination,
}

/// One condition (netfilter.md 4.1).
#[derive(Clone, Debug, PartialEq)]
pub enum Match {
    /// All bits of the mask are clear.
    MarkClear(u32),
    /// At least one bit of the mask is set.
    MarkAny(u32),
    MarkIs {
        value: u32,
        mask: u32,
    },
    MarkIsNot {
        value: u32,
        mask: u32,
    },
    In(InterfaceMatch),
    Out(InterfaceMatch),
    /// The packet came in through an interface that is not the way back to its source.
    ReversePathFailed,
    /// Whether the address is one of this host's; `limit_out` looks only at the outgoing interface's.
    LocalAddress {
        side: Side,
        negated: bool,
        limit_out: bool,
    },
    ConnTrack {
        negated: bool,
        states: Vec<ConnState>,
    },
    Protocol {
        negated: bool,
        protocol: Protocol,
    },
    Net {
        side: Side,
        negated: bool,
        net: IpNet,
    },
    /// A bare address: matches like a network of full length but is written without a length.
    Address {
        side: Side,
        address: std::net::IpAddr,
    },
    /// `with_port`: the set holds (address, protocol, port) and both are looked up.
    Set {
        side: Side,
        negated: bool,
        set: SetName,
        with_port: bool,
    },
    /// At most 15 slots, a range takes two.
    Ports {
        side: Side,
        negated: bool,
        ports: Vec<PortRange>,
    },
    /// A single destination port in the short form (VXLAN NOTRACK rules only).
    DestinationPort(u16),
    Icmp {
        family: Family,
        negated: bool,
        icmp: IcmpType,
    },
    Limit {
        rate: Rate,
        burst: u32,
    },
}

pub use model::IcmpMatch as IcmpType;

/// An interface by exact name, or all whose names begin with a prefix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum InterfaceMatch {
    Exact(String),
    Prefix(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConnState {
    New,
    Related,
    Established,
    Invalid,
    Dnat,
}

/// So many per unit of time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    pub count: u32,
    pub per: RateUnit,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RateUnit {
    /// Written `sec`.
    Sec,
    /// Written `second`.
    Second,
    Minute,
    Hour,
    Day,
}

/// What happens to a packet that meets all matches (netfilter.md 4.2).
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    Accept,
    Drop,
    Return,
    Reject,
    Jump(ChainName),
    /// Like a jump, but a return goes to the caller of the present chain.
    Goto(ChainName),
    SetMark(u32),
    ClearMark(u32),
    SetMaskedMark {
        value: u32,
        mask: u32,
    },
    NoTrack,
    /// The kernel log; the tool's separator after the prefix is not included.
    Log {
        prefix: String,
    },
    NfLog {
        group: u16,
        prefix: String,
    },
    /// Sets the mark on packets within the rate; the limit is part of the action's text, after the matches.
    MarkWithinRate {
        rate: Rate,
        burst: u32,
        mark: u32,
    },
    /// Resets TCP connections above the number, counted over all sources.
    RejectConnectionsAbove(u32),
    Dnat {
        to: std::net::IpAddr,
        port: Option<u16>,
    },
    Snat {
        to: std::net::IpAddr,
        ports: Option<PortRange>,
    },
    Masquerade {
        ports: Option<PortRange>,
    },
    Dscp(u8),
}
