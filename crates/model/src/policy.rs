//! Policies, tiers and rules as internal records: selectors are already combined with namespaces.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use ipnet::IpNet;

use crate::family::Family;
use crate::names::Name;
use crate::selector::Selector;

/// A policy (policy.md 3). Everything in it has passed validation.
#[derive(Clone, Debug, PartialEq)]
pub struct Policy {
    /// Never empty; `default` if the document names none.
    pub tier: Name,
    /// `None` sorts after every number.
    pub order: Option<f64>,
    pub selector: Arc<Selector>,
    /// Normalised text of the selector (policy.md L-24); neighbours with equal text form groups.
    pub original_selector: Name,
    /// T-6: an empty list of types means both.
    pub ingress: bool,
    pub egress: bool,
    pub do_not_track: bool,
    pub pre_dnat: bool,
    pub apply_on_forward: bool,
    /// Performance hint `AssumeNeededOnEveryNode`.
    pub always_needed: bool,
    pub inbound: Vec<Rule>,
    pub outbound: Vec<Rule>,
}

/// A tier (policy.md T-2, datastore.md C-29).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tier {
    /// `None` sorts after every number.
    pub order: Option<f64>,
    /// True only for the exact stored word `Pass`.
    pub default_pass: bool,
}

/// One rule of a policy or profile.
#[derive(Clone, Debug, PartialEq)]
pub struct Rule {
    pub action: Action,
    /// explicit, or implied by the protocol *name* `icmp` or `icmpv6`.
    pub family: Option<Family>,
    pub protocol: Option<Protocol>,
    pub not_protocol: Option<Protocol>,
    pub icmp: Option<IcmpMatch>,
    pub not_icmp: Option<IcmpMatch>,
    pub source: EntityMatch,
    pub destination: EntityMatch,
    /// The rule carries an HTTP match, which the packet filter does not evaluate.
    pub has_http: bool,
    pub annotations: BTreeMap<String, String>,
}

impl Rule {
    /// Returns the rule without any match: it applies to every packet.
    pub fn for_everything(action: Action) -> Self {
        Self {
            action,
            family: None,
            protocol: None,
            not_protocol: None,
            icmp: None,
            not_icmp: None,
            source: EntityMatch::default(),
            destination: EntityMatch::default(),
            has_http: false,
            annotations: BTreeMap::new(),
        }
    }
}

/// What a rule asks of one side of a packet.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct EntityMatch {
    /// Host bits cleared, stored order.
    pub nets: Vec<IpNet>,
    pub not_nets: Vec<IpNet>,
    /// Combined selector of datastore.md 4.2.
    pub selector: Option<Arc<Selector>>,
    pub not_selector: Option<Arc<Selector>>,
    pub ports: Vec<Port>,
    pub not_ports: Vec<Port>,
    pub service: Option<ServiceRef>,
}

/// A reference to a Kubernetes service; the namespace is not defaulted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceRef {
    pub namespace: Name,
    pub name: Name,
}

///
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Action {
    Allow,
    Deny,
    Log,
    /// Leave this tier (or this profile) undecided.
    Pass,
}

/// An IP protocol, number or lower-case name, as it will be printed in a rule.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    Number(u8),
    Name(Name),
}

impl Protocol {
    /// Returns the protocol number, if the name is one of those of R-3.
    pub fn number(&self) -> Option<u8> {
        match self {
            Self::Number(number) => Some(*number),
            Self::Name(name) => match name.as_ref() {
                "icmp" => Some(1),
                "tcp" => Some(6),
                "udp" => Some(17),
                "icmpv6" => Some(58),
                "sctp" => Some(132),
                "udplite" => Some(136),
                _ => None,
            },
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => write!(f, "{number}"),
            Self::Name(name) => f.write_str(name),
        }
    }
}

/// An ICMP type, with or without a code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IcmpMatch {
    pub kind: u8,
    pub code: Option<u8>,
}

/// A port of a rule: numeric or named.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Port {
    Range(PortRange),
    Named(Name),
}

/// An inclusive range of ports, `first` ≤ `last`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortRange {
    pub first: u16,
    pub last: u16,
}

impl PortRange {
    pub const fn single(port: u16) -> Self {
        Self { first: port, last: port }
    }
}
