//! A rule of one family, reduced to what the kernel takes (netfilter.md 10.2, 10.3, 10.7).
//!
//! Invariant: a shape can be written as rules that both iptables variants accept.

use graph::{RuleProgram, SideProgram};
use ipnet::IpNet;
use model::{Action, Family, IcmpMatch, PortRange, Protocol, SetId};
use program::{Match, SetName, Side};

/// Slots of one port match; a range takes two (10.3).
const MAX_PORT_SLOTS: usize = 15;

/// Most exclusions of ports on one side that are matches of the main rule. The tools refuse a line of
/// more than 255 words, and one exclusion is six.
const MAX_PORT_EXCLUSIONS: usize = 10;

/// Protocols that the port match works with: tcp, udp, dccp, sctp, udplite.
const PORT_PROTOCOLS: [u8; 5] = [6, 17, 33, 132, 136];

/// See the [module documentation](self).
#[derive(Debug, Default)]
pub(super) struct Shape {
    /// With a positive protocol there is never a negated one: the tools take one `-p` per rule.
    pub(super) protocol: Option<Protocol>,
    not_protocol: Option<Protocol>,
    icmp: Option<IcmpMatch>,
    not_icmp: Option<IcmpMatch>,
    pub(super) source: HalfShape,
    pub(super) destination: HalfShape,
}

/// One side of a [`Shape`].
#[derive(Debug, Default)]
pub(super) struct HalfShape {
    pub(super) nets: Vec<IpNet>,
    pub(super) not_nets: Vec<IpNet>,
    /// Pieces that fit in one match each.
    pub(super) ports: Vec<Vec<PortRange>>,
    pub(super) not_ports: Vec<Vec<PortRange>>,
    sets: Vec<SetName>,
    not_sets: Vec<SetName>,
    pub(super) named_ports: Vec<SetName>,
    pub(super) not_named_ports: Vec<SetName>,
    address_ports: Vec<SetName>,
}

/// Why and how far a rule had to be changed.
struct Checker<'a> {
    family: Family,
    set_name: &'a dyn Fn(&SetId, Family) -> Option<SetName>,
    defects: &'a mut Vec<String>,
}

impl Shape {
    /// Returns the rule's form in one family, or `None` if it matches nothing there or cannot be
    /// written. What was wrong with it is appended to `defects`.
    pub(super) fn of(
        rule: &RuleProgram,
        family: Family,
        set_name: &dyn Fn(&SetId, Family) -> Option<SetName>,
        defects: &mut Vec<String>,
    ) -> Option<Self> {
        if rule.family.is_some_and(|only| only != family) {
            return None;
        }
        let source = HalfShape::of_nets(&rule.source, family)?;
        let destination = HalfShape::of_nets(&rule.destination, family)?;
        let mut shape = Self { source, destination, ..Self::default() };
        let mut checker = Checker { family, set_name, defects };
        if checker.matches_no_packet(rule) {
            return None;
        }
        checker.protocols(rule, &mut shape);
        checker.icmp(rule, &mut shape);
        let ports_are_fine =
            shape.protocol.as_ref().and_then(Protocol::number).is_some_and(|n| PORT_PROTOCOLS.contains(&n));
        checker.half("source", &rule.source, ports_are_fine, &mut shape.source);
        checker.half("destination", &rule.destination, ports_are_fine, &mut shape.destination);
        (checker.defects.is_empty() || rule.action == Action::Deny).then_some(shape)
    }

    /// The matches of the main rule, in their fixed order (10.5). Parts that do not fit in one rule are
    /// left to the blocks.
    pub(super) fn into_matches(self, family: Family) -> Vec<Match> {
        let Self { protocol, not_protocol, icmp, not_icmp, mut source, mut destination } = self;
        // Most rules have one or two, and there are many rules: no more room than that.
        let count = usize::from(protocol.is_some()) + source.len() + destination.len();
        let mut matches = Vec::with_capacity(count.max(1));
        matches.extend(protocol.map(|protocol| Match::Protocol { negated: false, protocol }));
        source.take_positive(Side::Source, &mut matches);
        destination.take_positive(Side::Destination, &mut matches);
        matches.extend(icmp.map(|icmp| Match::Icmp { family, negated: false, icmp }));
        matches.extend(not_protocol.map(|protocol| Match::Protocol { negated: true, protocol }));
        source.take_negative(Side::Source, &mut matches);
        destination.take_negative(Side::Destination, &mut matches);
        matches.extend(not_icmp.map(|icmp| Match::Icmp { family, negated: true, icmp }));
        matches
    }
}

impl HalfShape {
    /// The nets of one side; `None` if the rule has no form in this family because of them.
    fn of_nets(side: &SideProgram, family: Family) -> Option<Self> {
        let not_nets = keep_family(&side.not_nets, family)?;
        if not_nets.iter().any(|net| net.prefix_len() == 0) {
            // Matches no packet, and iptables-nft refuses it.
            return None;
        }
        Some(Self { nets: keep_family(&side.nets, family)?, not_nets, ..Self::default() })
    }

    /// Whether ports are alternatives that need a block.
    pub(super) fn ports_need_block(&self) -> bool {
        self.ports.len() + self.named_ports.len() > 1
    }

    pub(super) fn nets_need_block(&self) -> bool {
        self.nets.len() > 1
    }

    /// A rule takes one address match per side, so that what is left of the positive nets counts.
    pub(super) fn not_nets_need_block(&self) -> bool {
        let left = if self.nets_need_block() { 0 } else { self.nets.len() };
        !self.not_nets.is_empty() && left + self.not_nets.len() > 1
    }

    /// Exclusions are matches of the main rule as long as these are few.
    pub(super) fn not_ports_need_block(&self) -> bool {
        self.not_ports.len() + self.not_named_ports.len() > MAX_PORT_EXCLUSIONS
    }

    /// How many matches this is, about.
    fn len(&self) -> usize {
        let Self { nets, not_nets, ports, not_ports, sets, not_sets, named_ports, not_named_ports, address_ports } =
            self;
        [nets.len().min(1), not_nets.len().min(1), ports.len(), not_ports.len()].into_iter().sum::<usize>()
            + [sets, not_sets, named_ports, not_named_ports, address_ports].map(Vec::len).into_iter().sum::<usize>()
    }

    fn take_positive(&mut self, side: Side, matches: &mut Vec<Match>) {
        if !self.nets_need_block() {
            matches.extend(self.nets.iter().map(|net| Match::Net { side, negated: false, net: *net }));
        }
        let set = |with_port| move |set| Match::Set { side, negated: false, set, with_port };
        matches.extend(self.sets.drain(..).map(set(false)));
        matches.extend(self.address_ports.drain(..).map(set(true)));
        if !self.ports_need_block() {
            matches.extend(self.ports.drain(..).map(|ports| Match::Ports { side, negated: false, ports }));
            matches.extend(self.named_ports.drain(..).map(set(true)));
        }
    }

    fn take_negative(&mut self, side: Side, matches: &mut Vec<Match>) {
        if !self.not_nets_need_block() {
            matches.extend(self.not_nets.iter().map(|net| Match::Net { side, negated: true, net: *net }));
        }
        let set = |with_port| move |set| Match::Set { side, negated: true, set, with_port };
        matches.extend(self.not_sets.drain(..).map(set(false)));
        if !self.not_ports_need_block() {
            matches.extend(self.not_ports.drain(..).map(|ports| Match::Ports { side, negated: true, ports }));
            matches.extend(self.not_named_ports.drain(..).map(set(true)));
        }
    }
}

impl Checker<'_> {
    /// True for combinations that no packet of this family meets; not a defect.
    fn matches_no_packet(&self, rule: &RuleProgram) -> bool {
        let number = rule.protocol.as_ref().and_then(Protocol::number);
        // Protocol and negated protocol are the same.
        let contradiction =
            number.is_some_and(|number| rule.not_protocol.as_ref().and_then(Protocol::number) == Some(number));
        // A type of the other family's ICMP: such a rule is one of that family (datastore.md H-5).
        let has_icmp = rule.icmp.is_some() || rule.not_icmp.is_some();
        let other = match self.family {
            Family::V4 => icmp_protocol(Family::V6),
            Family::V6 => icmp_protocol(Family::V4),
        };
        contradiction || (has_icmp && number == Some(other))
    }

    fn protocols(&mut self, rule: &RuleProgram, shape: &mut Shape) {
        shape.protocol = rule.protocol.as_ref().and_then(|protocol| self.protocol(protocol));
        let not_protocol = rule.not_protocol.as_ref().and_then(|protocol| self.protocol(protocol));
        // Beside a positive protocol a different negated one says nothing.
        shape.not_protocol = not_protocol.filter(|_| rule.protocol.is_none());
    }

    fn protocol(&mut self, protocol: &Protocol) -> Option<Protocol> {
        // Number 0 means every protocol to the tools.
        if protocol.number().is_some_and(|number| number != 0) {
            return Some(protocol.clone());
        }
        self.defects.push(format!("protocol {protocol:?} is not known"));
        None
    }

    fn icmp(&mut self, rule: &RuleProgram, shape: &mut Shape) {
        if rule.icmp.is_none() && rule.not_icmp.is_none() {
            return;
        }
        if shape.protocol.as_ref().and_then(Protocol::number) == Some(icmp_protocol(self.family)) {
            (shape.icmp, shape.not_icmp) = (rule.icmp, rule.not_icmp);
        } else {
            self.defects.push("an ICMP type needs an ICMP protocol".to_owned());
        }
    }

    fn half(&mut self, word: &str, side: &SideProgram, ports_are_fine: bool, out: &mut HalfShape) {
        out.sets = self.sets(&side.sets);
        out.not_sets = self.sets(&side.not_sets);
        out.address_ports = self.sets(&side.address_port_sets);
        out.not_named_ports = self.sets(&side.not_named_port_sets);
        out.not_ports = self.ports(word, &side.not_ports, ports_are_fine);
        // Numbers and names are alternatives: if one of them cannot be written the others alone would
        // match less than the rule says.
        out.named_ports = self.sets(&side.named_port_sets);
        out.ports = self.ports(word, &side.ports, ports_are_fine);
        let complete =
            out.named_ports.len() == side.named_port_sets.len() && out.ports.is_empty() == side.ports.is_empty();
        if !complete {
            out.ports.clear();
            out.named_ports.clear();
        }
    }

    /// All of the ranges in pieces, or none of them.
    fn ports(&mut self, word: &str, ranges: &[PortRange], ports_are_fine: bool) -> Vec<Vec<PortRange>> {
        if ranges.is_empty() {
            return Vec::new();
        }
        if !ports_are_fine {
            self.defects.push(format!("{word} ports need protocol tcp, udp, udplite, sctp or dccp"));
            return Vec::new();
        }
        if let Some(range) = ranges.iter().find(|range| range.first > range.last) {
            self.defects.push(format!("{word} port range {}-{} is empty", range.first, range.last));
            return Vec::new();
        }
        split_ports(ranges)
    }

    fn sets(&mut self, ids: &[SetId]) -> Vec<SetName> {
        let mut names = Vec::with_capacity(ids.len());
        for id in ids {
            match (self.set_name)(id, self.family) {
                Some(name) => names.push(name),
                None if SetName::new(&id.kernel_name(self.family)).is_some() => {
                    self.defects.push(format!("set {id} does not exist"));
                }
                None => self.defects.push(format!("set {id:?} has no valid name")),
            }
        }
        names
    }
}

const fn icmp_protocol(family: Family) -> u8 {
    match family {
        Family::V4 => 1,
        Family::V6 => 58,
    }
}

/// The nets of one family. `None` if there were nets but none is left: no packet of this family is in
/// one of them, and for negated nets too the rule has no form in it.
fn keep_family(nets: &[IpNet], family: Family) -> Option<Vec<IpNet>> {
    let kept: Vec<IpNet> = nets.iter().filter(|net| Family::of(net) == family).copied().collect();
    (nets.is_empty() || !kept.is_empty()).then_some(kept)
}

/// Cuts ranges into pieces that fit in one match, in order (10.3).
pub(crate) fn split_ports(ranges: &[PortRange]) -> Vec<Vec<PortRange>> {
    let mut pieces: Vec<Vec<PortRange>> = Vec::new();
    let mut free = 0;
    for range in ranges {
        let slots = if range.first == range.last { 1 } else { 2 };
        match pieces.last_mut() {
            Some(piece) if slots <= free => {
                piece.push(*range);
                free -= slots;
            }
            Some(_) | None => {
                pieces.push(vec![*range]);
                free = MAX_PORT_SLOTS - slots;
            }
        }
    }
    pieces
}
