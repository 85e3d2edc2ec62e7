//! Why a packet was judged as it was, as data and as text for an operator.

use std::fmt;
use std::sync::Arc;

use ipnet::IpNet;
use model::{Family, IcmpMatch, Name, PolicyKey, PortRange, Protocol, Selector, ServiceRef};

use crate::endpoint::{EndpointKey, Failsafe, List, Tunnel};
use crate::facts::ObjectKey;
use crate::packet::{Direction, Packet, Side};

/// What one list of one endpoint says about a packet.
#[derive(Clone, Debug, PartialEq)]
pub struct Verdict {
    pub outcome: Outcome,
    pub reason: Reason,
    /// `None` if no endpoint was found to ask.
    pub endpoint: Option<EndpointKey>,
    pub list: List,
    pub direction: Direction,
    /// What led here; empty unless it was asked for.
    pub steps: Vec<Step>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Outcome {
    Allow,
    Deny,
    /// This list leaves the packet to whatever comes next.
    NoVerdict,
}

/// What decided.
#[derive(Clone, Debug, PartialEq)]
pub enum Reason {
    /// A rule that allows or denies. The contributions are those of all its set matches.
    Rule { rule: RulePlace, contributions: Vec<Contribution> },
    /// No policy of the tier decided or passed, and the tier denies what it does not decide (T-13).
    EndOfTier { tier: Name, is_missing: bool },
    /// The endpoint lists a profile that does not exist or is invalid.
    MissingProfile(Name),
    /// Neither a policy nor a profile decided (T-16).
    NothingAllowed,
    /// T-18.
    KnownConnection,
    /// T-18.
    InvalidConnection,
    /// T-22.
    Inactive,
    /// T-19.
    Tunnel(Tunnel),
    /// A port of the host that stays open.
    Failsafe(Failsafe),
    /// The endpoint has no policy for traffic that passes through (T-17).
    NoForwardPolicy,
    /// Nothing in the list decided, and the list does not deny what it does not decide.
    Undecided,
    /// A workload interface that no endpoint claims (netfilter.md 7.2).
    NoEndpoint { interface: Name },
}

/// Where a rule stands.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct RulePlace {
    pub owner: RuleOwner,
    pub direction: Direction,
    /// Of the rules of this direction, from 0.
    pub index: usize,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum RuleOwner {
    Policy { tier: Name, key: PolicyKey },
    Profile(Name),
}

/// An object that made one side of a packet a member of a set.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Contribution {
    pub side: Side,
    pub object: ObjectKey,
    /// The object's address, or its network that the packet's address is in.
    pub member: IpNet,
    /// The port's name, in a set of named ports.
    pub port: Option<Name>,
}

/// The first match of a rule that a packet does not meet.
#[derive(Clone, Debug, PartialEq)]
pub enum Mismatch {
    OtherFamily(Family),
    /// The rule does not exist in the packet's family, because none of its nets is of it.
    NoNetOfFamily {
        side: Side,
        negated: bool,
        family: Family,
    },
    /// The rule excludes every address of the family.
    ExcludesFamily {
        side: Side,
        family: Family,
    },
    Protocol(Protocol),
    ExcludedProtocol(Protocol),
    Icmp(IcmpMatch),
    ExcludedIcmp(IcmpMatch),
    Net {
        side: Side,
    },
    ExcludedNet {
        side: Side,
        net: IpNet,
    },
    /// No object with the address is meant by the selector and not by the other one.
    NotInSet {
        side: Side,
        selector: Option<Arc<Selector>>,
        without: Option<Arc<Selector>>,
    },
    InExcludedSet {
        side: Side,
        selector: Arc<Selector>,
        members: Vec<Contribution>,
    },
    /// Neither in a range nor in the set of a named port.
    Port {
        side: Side,
    },
    ExcludedPort {
        side: Side,
        range: PortRange,
    },
    ExcludedNamedPort {
        side: Side,
        members: Vec<Contribution>,
    },
    /// Sets of services are empty.
    Service {
        side: Side,
        service: ServiceRef,
    },
}

/// One thing that was looked at on the way to a verdict.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    Tier {
        tier: Name,
        is_missing: bool,
    },
    /// A policy of a staged kind decides nothing (T-20).
    Staged(PolicyKey),
    NotMatched {
        rule: RulePlace,
        because: Mismatch,
    },
    Logged {
        rule: RulePlace,
        contributions: Vec<Contribution>,
    },
    Passed {
        rule: RulePlace,
        contributions: Vec<Contribution>,
    },
    /// Nothing in the tier decided, and it passes on what it does not decide.
    TierPasses(Name),
    Profile(Name),
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Allow => "allow",
            Self::Deny => "deny",
            Self::NoVerdict => "no verdict",
        })
    }
}

/// One line, and one more per step.
impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { outcome, reason, endpoint, list, direction, steps } = self;
        if let Some(endpoint) = endpoint {
            write!(f, "{endpoint}, ")?;
        }
        write!(f, "{list} {direction}: {outcome}, {reason}")?;
        steps.iter().try_for_each(|step| write!(f, "\n  {step}"))
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rule { rule, contributions } => write!(f, "by {rule}{}", Because(contributions)),
            Self::EndOfTier { tier, is_missing: false } => write!(f, "by the end of tier {tier}"),
            Self::EndOfTier { tier, is_missing: true } => {
                write!(f, "by the end of tier {tier}, which does not exist and therefore denies")
            }
            Self::MissingProfile(name) => write!(f, "because profile {name} does not exist or is invalid"),
            Self::NothingAllowed => f.write_str("because neither a policy nor a profile allows it"),
            Self::KnownConnection => f.write_str("because its connection was allowed before"),
            Self::InvalidConnection => f.write_str("because it belongs to no valid connection"),
            Self::Inactive => f.write_str("because the endpoint is switched off"),
            Self::Tunnel(tunnel) => write!(f, "because workloads may not send {tunnel}"),
            Self::Failsafe(Failsafe { protocol, port, net }) => {
                write!(f, "because port {port} of protocol {protocol} is failsafe")?;
                net.map_or(Ok(()), |net| write!(f, " for {net}"))
            }
            Self::NoForwardPolicy => f.write_str("because the endpoint has no policy for forwarded traffic"),
            Self::Undecided => f.write_str("because nothing in the list decides"),
            Self::NoEndpoint { interface } => write!(f, "because no endpoint has interface {interface}"),
        }
    }
}

impl fmt::Display for RulePlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { owner, direction, index } = self;
        match owner {
            RuleOwner::Policy { tier, key } => write!(f, "{direction} rule {index} of policy {key} in tier {tier}"),
            RuleOwner::Profile(name) => write!(f, "{direction} rule {index} of profile {name}"),
        }
    }
}

impl fmt::Display for Contribution {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { side, object, member, port } = self;
        write!(f, "{side} ")?;
        match port {
            Some(port) => write!(f, "is port {port} of {object} at {}", member.addr()),
            None => write!(f, "is {member} of {object}"),
        }
    }
}

/// Contributions in brackets, if there are any.
struct Because<'a>(&'a [Contribution]);

impl fmt::Display for Because<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, contribution) in self.0.iter().enumerate() {
            write!(f, "{}{contribution}", if index == 0 { " (" } else { "; " })?;
        }
        f.write_str(if self.0.is_empty() { "" } else { ")" })
    }
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OtherFamily(family) => write!(f, "it is for {family}"),
            Self::NoNetOfFamily { side, negated, family } => {
                let word = if *negated { "excluded " } else { "" };
                write!(f, "it does not exist for {family}: no {word}network of its {side} is of that family")
            }
            Self::ExcludesFamily { side, family } => write!(f, "its {side} excludes all of {family}"),
            Self::Protocol(wanted) => write!(f, "the protocol is not {wanted}"),
            Self::ExcludedProtocol(excluded) => write!(f, "the protocol is {excluded}"),
            Self::Icmp(wanted) => write!(f, "the ICMP type is not {}", IcmpText(wanted)),
            Self::ExcludedIcmp(excluded) => write!(f, "the ICMP type is {}", IcmpText(excluded)),
            Self::Net { side } => write!(f, "the {side} is in none of its networks"),
            Self::ExcludedNet { side, net } => write!(f, "the {side} is in {net}"),
            Self::NotInSet { side, selector, without } => {
                let selector = selector.as_ref().map_or_else(|| "all()".to_owned(), |selector| selector.canonical());
                write!(f, "the {side} is no address of an object with {selector}")?;
                without.as_ref().map_or(Ok(()), |without| write!(f, " and not {}", without.canonical()))
            }
            Self::InExcludedSet { side, selector, members } => {
                write!(f, "the {side} is an address of an object with {}{}", selector.canonical(), Because(members))
            }
            Self::Port { side } => write!(f, "the {side} port is none of its ports"),
            Self::ExcludedPort { side, range } => write!(f, "the {side} port is in {}-{}", range.first, range.last),
            Self::ExcludedNamedPort { side, members } => write!(f, "the {side} port is excluded{}", Because(members)),
            Self::Service { side, service: ServiceRef { namespace, name } } => {
                write!(f, "the {side} is not in the empty set of service {namespace}/{name}")
            }
        }
    }
}

/// `8`, or `8 code 0`.
struct IcmpText<'a>(&'a IcmpMatch);

impl fmt::Display for IcmpText<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0.kind)?;
        self.0.code.map_or(Ok(()), |code| write!(f, " code {code}"))
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tier { tier, is_missing: false } => write!(f, "tier {tier}"),
            Self::Tier { tier, is_missing: true } => write!(f, "tier {tier}, which does not exist"),
            Self::Staged(key) => write!(f, "policy {key} is staged and decides nothing"),
            Self::NotMatched { rule, because } => write!(f, "{rule} does not match: {because}"),
            Self::Logged { rule, contributions } => write!(f, "{rule} logs{}", Because(contributions)),
            Self::Passed { rule, contributions } => write!(f, "{rule} passes{}", Because(contributions)),
            Self::TierPasses(tier) => write!(f, "tier {tier} passes what it does not decide"),
            Self::Profile(name) => write!(f, "profile {name}"),
        }
    }
}

/// What became of a packet that is forwarded: the verdicts of all endpoints that were asked, in order.
#[derive(Clone, Debug, PartialEq)]
pub struct Forwarded {
    pub packet: Packet,
    pub outcome: Outcome,
    pub verdicts: Vec<Verdict>,
}

impl fmt::Display for Forwarded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.packet, self.outcome)?;
        self.verdicts.iter().try_for_each(|verdict| write!(f, "\n{verdict}"))
    }
}
