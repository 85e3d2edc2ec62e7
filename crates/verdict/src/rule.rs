//! Whether a rule matches a packet (policy.md section 4), and because of which objects.

use std::sync::Arc;

use model::{EndpointPort, EntityMatch, Family, IcmpMatch, Name, Port, PortRange, Protocol, Rule};

use crate::facts::{Facts, Object};
use crate::packet::{Packet, Side};
use crate::reason::{Contribution, Mismatch};

/// Returns what the sets of a rule that matches contributed, or the first match that is not met.
pub(crate) fn meets(facts: &Facts, rule: &Rule, packet: &Packet) -> Result<Vec<Contribution>, Mismatch> {
    exists_in(rule, packet.family())?;
    protocol(rule, packet)?;
    icmp(rule, packet)?;
    let mut found = Vec::new();
    for (side, entity) in [(Side::Source, &rule.source), (Side::Destination, &rule.destination)] {
        let half = Half { facts, rule, packet, side, entity };
        half.nets()?;
        half.sets(&mut found)?;
        half.service()?;
        half.ports(&mut found)?;
    }
    Ok(found)
}

/// a rule may have no form at all in the packet's family.
fn exists_in(rule: &Rule, family: Family) -> Result<(), Mismatch> {
    if let Some(only) = rule.family.filter(|only| *only != family) {
        return Err(Mismatch::OtherFamily(only));
    }
    for (side, entity) in [(Side::Source, &rule.source), (Side::Destination, &rule.destination)] {
        for (negated, nets) in [(false, &entity.nets), (true, &entity.not_nets)] {
            if !nets.is_empty() && !nets.iter().any(|net| Family::of(net) == family) {
                return Err(Mismatch::NoNetOfFamily { side, negated, family });
            }
        }
        if entity.not_nets.iter().any(|net| Family::of(net) == family && net.prefix_len() == 0) {
            return Err(Mismatch::ExcludesFamily { side, family });
        }
    }
    Ok(())
}

fn protocol(rule: &Rule, packet: &Packet) -> Result<(), Mismatch> {
    let is = |protocol: &&Protocol| protocol.number() == Some(packet.protocol);
    if let Some(wanted) = rule.protocol.as_ref().filter(|wanted| !is(wanted)) {
        return Err(Mismatch::Protocol(wanted.clone()));
    }
    match rule.not_protocol.as_ref().filter(is) {
        Some(excluded) => Err(Mismatch::ExcludedProtocol(excluded.clone())),
        None => Ok(()),
    }
}

/// Only ICMP in its own family has types.
fn icmp(rule: &Rule, packet: &Packet) -> Result<(), Mismatch> {
    let own = match packet.family() {
        Family::V4 => 1,
        Family::V6 => 58,
    };
    let message = packet.icmp.filter(|_| packet.protocol == own);
    let is = |icmp: &IcmpMatch| {
        message.is_some_and(|(kind, code)| icmp.kind == kind && icmp.code.is_none_or(|wanted| wanted == code))
    };
    if let Some(wanted) = rule.icmp.filter(|wanted| !is(wanted)) {
        return Err(Mismatch::Icmp(wanted));
    }
    match rule.not_icmp.filter(is) {
        Some(excluded) => Err(Mismatch::ExcludedIcmp(excluded)),
        None => Ok(()),
    }
}

/// One side of a rule and of a packet.
#[derive(Clone, Copy)]
struct Half<'a> {
    facts: &'a Facts,
    rule: &'a Rule,
    packet: &'a Packet,
    side: Side,
    entity: &'a EntityMatch,
}

impl<'a> Half<'a> {
    fn nets(self) -> Result<(), Mismatch> {
        let (side, address) = (self.side, self.packet.address(self.side));
        let Self { entity: EntityMatch { nets, not_nets, .. }, .. } = self;
        if !nets.is_empty() && !nets.iter().any(|net| net.contains(&address)) {
            return Err(Mismatch::Net { side });
        }
        match not_nets.iter().find(|net| net.contains(&address)) {
            Some(net) => Err(Mismatch::ExcludedNet { side, net: *net }),
            None => Ok(()),
        }
    }

    ///
    fn sets(self, found: &mut Vec<Contribution>) -> Result<(), Mismatch> {
        let side = self.side;
        let Self { entity: EntityMatch { selector, not_selector, ports, .. }, .. } = self;
        let only_named_ports = !ports.is_empty() && ports.iter().all(|port| matches!(port, Port::Named(_)));
        if selector.is_some() && !only_named_ports {
            let members = self.contributors(|object| self.is_meant(object), |_| true, None);
            if members.is_empty() {
                let (selector, without) = (selector.clone(), not_selector.clone());
                return Err(Mismatch::NotInSet { side, selector, without });
            }
            found.extend(members);
        }
        if let (None, Some(excluded)) = (selector, not_selector) {
            let matches = |object: Object<'_>| excluded.matches(&object.labels(self.facts));
            let members = self.contributors(matches, |_| true, None);
            if !members.is_empty() {
                return Err(Mismatch::InExcludedSet { side, selector: Arc::clone(excluded), members });
            }
        }
        Ok(())
    }

    /// nothing fills these sets.
    fn service(self) -> Result<(), Mismatch> {
        match &self.entity.service {
            Some(service) => Err(Mismatch::Service { side: self.side, service: service.clone() }),
            None => Ok(()),
        }
    }

    fn ports(self, found: &mut Vec<Contribution>) -> Result<(), Mismatch> {
        let side = self.side;
        let Self { entity: EntityMatch { ports, not_ports, .. }, .. } = self;
        if !ports.is_empty() && self.range(ports).is_none() {
            let members = self.named(ports);
            if members.is_empty() {
                return Err(Mismatch::Port { side });
            }
            found.extend(members);
        }
        if let Some(range) = self.range(not_ports) {
            return Err(Mismatch::ExcludedPort { side, range });
        }
        match self.named(not_ports) {
            members if members.is_empty() => Ok(()),
            members => Err(Mismatch::ExcludedNamedPort { side, members }),
        }
    }

    /// The first range that the port is in. Only some protocols have ports.
    fn range(self, ports: &[Port]) -> Option<PortRange> {
        let port = self.packet.port(self.side)?;
        ports.iter().find_map(|wanted| match wanted {
            Port::Range(range) => (range.first..=range.last).contains(&port).then_some(*range),
            Port::Named(_) => None,
        })
    }

    /// What makes (address, protocol, port) a member of the set of one of the names (R-12, M-20).
    fn named(self, ports: &[Port]) -> Vec<Contribution> {
        let mut members = Vec::new();
        let Some(number) = self.packet.port(self.side) else { return members };
        for wanted in ports {
            let Port::Named(name) = wanted else { continue };
            let is = |port: &EndpointPort| {
                port.name == *name
                    && port.port == number
                    && port.protocol == self.packet.protocol
                    && fits(self.rule.protocol.as_ref(), port.protocol)
            };
            let has = |object: Object<'_>| object.ports().iter().any(is);
            members.extend(self.contributors(|object| self.is_meant(object), has, Some(name)));
        }
        members
    }

    /// What the positive selector means, less what the negative one does; everything if there is no
    /// positive one.
    fn is_meant(self, object: Object<'_>) -> bool {
        let labels = object.labels(self.facts);
        let Some(selector) = &self.entity.selector else { return true };
        selector.matches(&labels) && !self.entity.not_selector.as_ref().is_some_and(|not| not.matches(&labels))
    }

    fn contributors(
        self,
        is_meant: impl Fn(Object<'a>) -> bool,
        has_port: impl Fn(Object<'a>) -> bool,
        port: Option<&Name>,
    ) -> Vec<Contribution> {
        let address = self.packet.address(self.side);
        let mut members = Vec::new();
        for object in self.facts.objects() {
            // The address first: it is the cheapest question.
            let Some(member) = object.holds(address) else { continue };
            if has_port(object) && is_meant(object) {
                members.push(Contribution { side: self.side, object: object.key(), member, port: port.cloned() });
            }
        }
        members
    }
}

/// whether a port of an endpoint is in the set that a rule asks.
fn fits(wanted: Option<&Protocol>, of_port: u8) -> bool {
    match wanted.map(Protocol::number) {
        None => true,
        Some(Some(number @ (17 | 132))) => number == of_port,
        Some(_) => of_port == 6,
    }
}
