//! A packet, what must become of it by each of the two opinions, and what answers it.

use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, SocketAddr};

use model::Name;
use testkit::frames::{self, Token};
use testkit::interpret::{Fate, Fault, Kernel, Passage, Way};
use testkit::packets;
use testkit::world::HOST;
use verdict::{Connection, Facts, Forwarded, Judge, Outcome, Packet, Settings, Trace};

use crate::ground::{Routes, Shot, UPLINK};

/// A packet with all that is to be known of it.
#[derive(Clone, Debug)]
pub struct Trial {
    pub packet: Packet,
    pub shot: Shot,
    /// The interface that its destination is behind.
    pub to: Name,
    /// The source is not behind the interface that it comes from.
    pub is_spoofed: bool,
}

/// What must become of a packet.
#[derive(Clone, Debug)]
pub enum Expected {
    /// A workload sends from an address that is not routed to it (netfilter.md 5.2).
    Spoofed,
    Judged(Forwarded),
}

/// Both ends of a connection, in no order.
type Ends = BTreeSet<(IpAddr, u16)>;

/// How many packets of a world are answered, at most.
const ANSWERS: usize = 6;

/// What connection tracking tells connections apart by; both directions are one. The id of ICMP differs anyway.
pub(super) fn connection_of(packet: &Packet) -> (u8, Ends, Option<(u8, u8)>) {
    let (source, destination) = packet.ports.unwrap_or_default();
    let ends = BTreeSet::from([(packet.source, source), (packet.destination, destination)]);
    (packet.protocol, ends, packet.icmp)
}

/// Makes what comes behind the IP header. It ends with the token.
pub(super) fn payload(packet: &Packet, id: u16, token: &Token) -> Vec<u8> {
    let (source, destination) = (packet.source, packet.destination);
    let (source_port, destination_port) = packet.ports.unwrap_or_default();
    let from = SocketAddr::new(source, source_port);
    let to = SocketAddr::new(destination, destination_port);
    match (packet.protocol, packet.icmp) {
        (6, _) => frames::syn_between(from, to, token),
        (17, _) => frames::udp(from, to, token),
        (132, _) => frames::sctp_init(from, to, token),
        (1 | 58, Some((kind, code))) => frames::icmp(source, destination, kind, code, id, token),
        _ => [&[0; 8], token.as_slice()].concat(),
    }
}

/// Answers to some of the packets that came through, and errors about them: they belong to known connections.
#[must_use]
pub fn answers(trials: &[Trial], arrived: &[Option<Name>], routes: &Routes) -> Vec<Trial> {
    let mut answers = Vec::new();
    for (trial, arrived) in trials.iter().zip(arrived) {
        let Some(from) = arrived else { continue };
        let Trial { packet: Packet { source, destination, protocol, ports, icmp, .. }, shot, .. } = trial;
        let answer = Packet::new(*destination, *source, *protocol);
        let to = routes.to(answer.destination);
        if (&**from, &**to) == (UPLINK, UPLINK) {
            continue; // To a source that a workload has borrowed; policy is not asked.
        }
        let token = packets::token();
        let (answer, payload) = match (*protocol, *ports, *icmp) {
            (17, Some((there, back)), _) if answers.len() % 2 == 0 => {
                let answer = answer.with_ports(back, there).of(Connection::Established);
                (answer, payload(&answer, 0, &token))
            }
            (1, _, Some((8, code))) | (58, _, Some((128, code))) => {
                let kind = if *protocol == 1 { 0 } else { 129 };
                let answer = answer.with_icmp(kind, code).of(Connection::Established);
                (answer, frames::icmp(answer.source, answer.destination, kind, code, icmp_id(shot), &token))
            }
            (6 | 17, _, _) => {
                let (protocol, kind) = if source.is_ipv4() { (1, 3) } else { (58, 1) };
                let answer = Packet { protocol, ..answer }.with_icmp(kind, 0).of(Connection::Related);
                let Ok(quoted) = frames::ip(*source, *destination, shot.protocol, &shot.payload) else { continue };
                (answer, frames::icmp_error(answer.source, answer.destination, kind, &quoted, &token))
            }
            _ => continue,
        };
        answers.push(Trial {
            packet: answer,
            shot: Shot {
                from: from.clone(),
                source: answer.source,
                destination: answer.destination,
                protocol: answer.protocol,
                payload,
                token,
            },
            to: to.clone(),
            is_spoofed: **from != *UPLINK && !routes.lead_back(answer.source, from),
        });
        if answers.len() == ANSWERS {
            break;
        }
    }
    answers
}

/// The id of an echo request that [`payload`] made.
fn icmp_id(shot: &Shot) -> u16 {
    shot.payload.get(4..6).map_or(0, |bytes| u16::from_be_bytes([bytes[0], bytes[1]]))
}

impl Trial {
    /// Says what policy makes of the packet.
    #[must_use]
    pub fn expected(&self, facts: &Facts, settings: &Settings, trace: Trace) -> Expected {
        if self.is_spoofed && !self.may_be_spoofed(facts) {
            return Expected::Spoofed;
        }
        let judge = Judge::new(facts, settings).trace(trace);
        Expected::Judged(judge.judge_forwarded(HOST, &self.shot.from, &self.to, &self.packet))
    }

    /// Whether the endpoint that the packet comes from may use its source (netfilter.md 13.6).
    #[must_use]
    pub fn may_be_spoofed(&self, facts: &Facts) -> bool {
        let owner = facts.owner(HOST, &self.shot.from).and_then(|key| facts.workload(key));
        owner.is_some_and(|owner| owner.allowed_spoofed.iter().any(|net| net.contains(&self.packet.source)))
    }

    /// Says whether the program lets the packet through.
    ///
    /// # Errors
    ///
    /// If the program does something that it must not do.
    pub fn interpreted(&self, kernel: &Kernel) -> Result<bool, Fault> {
        let journey = kernel.walk(Passage {
            way: Way::Forward,
            from: &self.shot.from,
            to: &self.to,
            packet: self.packet,
            mark: 0,
            reverse_path_failed: self.is_spoofed,
            translated: false,
            local: &[],
        })?;
        Ok(journey.fate == Fate::Accepted)
    }
}

impl Expected {
    /// Returns whether the packet must come out.
    #[must_use]
    pub fn arrives(&self) -> bool {
        match self {
            Self::Spoofed => false,
            Self::Judged(forwarded) => forwarded.outcome == Outcome::Allow,
        }
    }
}

impl fmt::Display for Expected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Spoofed => f.write_str("deny, because the source is not behind the interface it comes from"),
            Self::Judged(forwarded) => forwarded.fmt(f),
        }
    }
}
