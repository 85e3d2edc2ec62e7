//! Rules of policies and profiles (datastore.md 4.3, V-8 to V-13, H-1, H-3, H-5).
//!
//! Two kinds of defects are told apart. Those that the reference's validation finds reject the whole
//! record. Those that it lets through cost the rule only, in the direction that stays closed; see the
//! table in [`super`].

use std::collections::BTreeMap;
use std::fmt;

use ipnet::IpNet;

use super::complaint::{At, Complaints, Effect};
use super::selectors::Selectors;
use crate::cidr;
use crate::family::Family;
use crate::policy::{Action, EntityMatch, IcmpMatch, Port, PortRange, Protocol, Rule, ServiceRef};
use crate::v3;
use crate::v3::policy::{EntityRule, Icmp, Services};
use crate::validate;

/// Protocols that may be given by name (V-10), in lower case.
const PROTOCOL_NAMES: [&str; 6] = ["tcp", "udp", "icmp", "icmpv6", "sctp", "udplite"];

/// Protocols whose packets have ports, as far as rules may ask for them (V-13): TCP, UDP, SCTP.
const PORT_PROTOCOLS: [u8; 3] = [6, 17, 132];

/// Words for actions, in lower case.
const ACTIONS: [(&str, Action); 6] = [
    ("allow", Action::Allow),
    ("", Action::Allow),
    ("deny", Action::Deny),
    ("log", Action::Log),
    ("pass", Action::Pass),
    ("next-tier", Action::Pass),
];

const ICMP: u8 = 1;
const ICMPV6: u8 = 58;

const MAX_ICMP_TYPE: i64 = 254;
const MAX_ICMP_CODE: i64 = 255;

/// Converts the rules of one document.
#[derive(Debug)]
pub(super) struct Rules<'a, 'p> {
    /// Of the policy; empty for global policies and profiles.
    namespace: &'a str,
    selectors: Selectors<'p>,
    /// X-5 is reported once per document.
    http_reported: bool,
}

/// Takes note of defects that cost only the rule they are in.
struct Defects<'a> {
    complaints: &'a mut Complaints,
    action: Action,
    leave_out: bool,
}

impl Defects<'_> {
    /// Records a match that cannot be made. The caller leaves the match away, which widens a deny rule;
    /// any other rule is left out.
    fn unusable(&mut self, at: At<'_>, reason: impl fmt::Display) {
        let effect = match self.action {
            Action::Deny => Effect::RuleWidened,
            Action::Allow | Action::Log | Action::Pass => {
                self.leave_out = true;
                Effect::RuleLeftOut
            }
        };
        self.complaints.add(at, reason, effect);
    }
}

impl<'a, 'p> Rules<'a, 'p> {
    pub(super) fn new(namespace: &'a str, selectors: Selectors<'p>) -> Self {
        Self { namespace, selectors, http_reported: false }
    }

    /// Converts the rules of one direction. Whether the record survives is known to `complaints`.
    pub(super) fn convert(&mut self, stored: &[v3::Rule<'_>], at: At<'_>, complaints: &mut Complaints) -> Vec<Rule> {
        let rules = stored.iter().enumerate();
        rules.filter_map(|(index, rule)| self.convert_one(rule, at.index(index), complaints)).collect()
    }

    fn convert_one(&mut self, stored: &v3::Rule<'_>, at: At<'_>, complaints: &mut Complaints) -> Option<Rule> {
        let names = &mut self.selectors;
        let protocol = protocol(stored.protocol.as_ref(), names, at.field("protocol"), complaints);
        let mut not_protocol = self::protocol(stored.not_protocol.as_ref(), names, at.field("notProtocol"), complaints);
        let explicit_family = family(stored.ip_version, at.field("ipVersion"), complaints);
        let icmp = icmp(stored.icmp.as_ref(), at.field("icmp"), complaints);
        let not_icmp = self::icmp(stored.not_icmp.as_ref(), at.field("notICMP"), complaints);
        for (field, entity) in [("source", &stored.source), ("destination", &stored.destination)] {
            check_ports_fit(entity, protocol.as_ref(), at.field(field), complaints);
        }
        if stored.http.is_some() && !self.http_reported {
            self.http_reported = true;
            let reason = "the packet filter does not evaluate HTTP; the rest of the rule applies";
            complaints.add(at.field("http"), reason, Effect::PartIgnored);
        }
        let action = action(&stored.action, at.field("action"), complaints)?;
        let mut defects = Defects { complaints, action, leave_out: false };
        if let (Some(wanted), Some(unwanted)) = (&protocol, &not_protocol) {
            if wanted.number() == unwanted.number() {
                // No packet matches, whatever the action.
                let reason = "the protocol is both wanted and excluded";
                defects.complaints.add(at.field("notProtocol"), reason, Effect::RuleLeftOut);
                defects.leave_out = true;
            }
            // Beside a wanted protocol it says nothing more, and iptables takes only one of the two.
            not_protocol = None;
        }
        let mut rule = Rule {
            action,
            family: explicit_family.or_else(|| implied_family(protocol.as_ref())),
            protocol,
            not_protocol,
            icmp,
            not_icmp,
            source: self.entity(&stored.source, at.field("source"), &mut defects),
            destination: self.entity(&stored.destination, at.field("destination"), &mut defects),
            has_http: stored.http.is_some(),
            annotations: annotations(stored),
        };
        fit_icmp(&mut rule, explicit_family, at, &mut defects);
        (!defects.leave_out).then_some(rule)
    }

    fn entity(&mut self, stored: &EntityRule<'_>, at: At<'_>, defects: &mut Defects<'_>) -> EntityMatch {
        let nets = nets(&stored.nets, at.field("nets"), defects.complaints);
        if nets.is_empty() && !stored.nets.is_empty() {
            // H-1. An empty list would match every address.
            defects.unusable(at.field("nets"), "no entry is a network");
        }
        let at_not_nets = at.field("notNets");
        let mut not_nets = self::nets(&stored.not_nets, at_not_nets, defects.complaints);
        if not_nets.len() < stored.not_nets.len() {
            defects.unusable(at_not_nets, "not every exclusion is a network");
            not_nets.clear();
        }
        EntityMatch {
            nets,
            not_nets,
            selector: self.selectors.of_entity(stored, self.namespace, at, defects.complaints),
            not_selector: self.selectors.of_exclusion(stored, at, defects.complaints),
            ports: ports(&stored.ports, &mut self.selectors, at.field("ports"), defects.complaints),
            not_ports: ports(&stored.not_ports, &mut self.selectors, at.field("notPorts"), defects.complaints),
            service: service(stored.services.as_ref(), &mut self.selectors, at.field("services"), defects),
        }
    }
}

/// R-6, H-3. A missing action allows, as it always did.
fn action(word: &str, at: At<'_>, complaints: &mut Complaints) -> Option<Action> {
    let known = ACTIONS.into_iter().find(|(known, _)| word.eq_ignore_ascii_case(known));
    if known.is_none() {
        complaints.reject(at, format_args!("{word:?} is not an action"));
    }
    known.map(|(_, action)| action)
}

/// The annotations of a rule; of a repeated key the last one counts.
fn annotations(stored: &v3::Rule<'_>) -> BTreeMap<String, String> {
    let entries = stored.metadata.iter().flat_map(|metadata| metadata.annotations.iter());
    entries.map(|(key, value)| (key.to_owned(), value.to_owned())).collect()
}

/// V-9.
fn family(version: Option<i64>, at: At<'_>, complaints: &mut Complaints) -> Option<Family> {
    match version? {
        4 => Some(Family::V4),
        6 => Some(Family::V6),
        other => {
            complaints.reject(at, format_args!("IP version {other} where 4 or 6 is expected"));
            None
        }
    }
}

/// only the names say something about the family.
fn implied_family(protocol: Option<&Protocol>) -> Option<Family> {
    match protocol? {
        Protocol::Name(name) if &**name == "icmp" => Some(Family::V4),
        Protocol::Name(name) if &**name == "icmpv6" => Some(Family::V6),
        Protocol::Name(_) | Protocol::Number(_) => None,
    }
}

/// V-10.
fn protocol(
    stored: Option<&v3::scalars::Protocol<'_>>,
    names: &mut Selectors<'_>,
    at: At<'_>,
    complaints: &mut Complaints,
) -> Option<Protocol> {
    match stored? {
        v3::scalars::Protocol::Number(0) => complaints.reject(at, "protocol 0 is not a protocol of packets"),
        v3::scalars::Protocol::Number(number) => return Some(Protocol::Number(*number)),
        v3::scalars::Protocol::Name(name) => {
            if let Some(known) = PROTOCOL_NAMES.into_iter().find(|known| name.eq_ignore_ascii_case(known)) {
                return Some(Protocol::Name(names.name(known)));
            }
            let known = PROTOCOL_NAMES.join(", ");
            complaints.reject(at, format_args!("{name:?} is neither a protocol number nor one of {known}"));
        }
    }
    None
}

/// V-11, H-5. Without a type there is no match.
fn icmp(stored: Option<&Icmp>, at: At<'_>, complaints: &mut Complaints) -> Option<IcmpMatch> {
    let Icmp { kind, code } = *stored?;
    let mut in_range = |field, value: Option<i64>, largest| {
        if let Some(value) = value.filter(|value| !(0..=largest).contains(value)) {
            complaints.reject(at.field(field), format_args!("{value} where 0 to {largest} is expected"));
        }
    };
    in_range("type", kind, MAX_ICMP_TYPE);
    in_range("code", code, MAX_ICMP_CODE);
    if kind.is_none() && code.is_some() {
        complaints.add(at.field("code"), "a code without a type", Effect::PartIgnored);
    }
    let kind = u8::try_from(kind?).ok()?;
    Some(IcmpMatch { kind, code: code.and_then(|code| u8::try_from(code).ok()) })
}

/// Ties a rule with an ICMP type to the family of its protocol; the type is unusable with any other
/// (H-5, X-4).
fn fit_icmp(rule: &mut Rule, explicit: Option<Family>, at: At<'_>, defects: &mut Defects<'_>) {
    let field = match (rule.icmp, rule.not_icmp) {
        (Some(_), _) => "icmp",
        (None, Some(_)) => "notICMP",
        (None, None) => return,
    };
    let possible = match rule.protocol.as_ref().and_then(Protocol::number) {
        Some(ICMP) => Some(Family::V4),
        Some(ICMPV6) => Some(Family::V6),
        Some(_) | None => None,
    };
    match possible {
        Some(family) if explicit.is_none_or(|explicit| explicit == family) => rule.family = Some(family),
        Some(family) => {
            defects.unusable(at.field(field), format_args!("the protocol has ICMP types in {family} only"));
            (rule.icmp, rule.not_icmp) = (None, None);
        }
        None => {
            defects.unusable(at.field(field), "an ICMP type needs protocol ICMP or ICMPv6");
            (rule.icmp, rule.not_icmp) = (None, None);
        }
    }
}

/// Parses networks; entries that are none are reported and dropped.
fn nets(stored: &[v3::Text<'_>], at: At<'_>, complaints: &mut Complaints) -> Vec<IpNet> {
    let mut nets = Vec::with_capacity(stored.len());
    for (index, text) in stored.iter().enumerate() {
        match cidr::parse_net(text) {
            Some(net) => nets.push(net),
            None => complaints.add(at.index(index), format_args!("{text:?} is not a network"), Effect::PartIgnored),
        }
    }
    nets
}

/// V-12.
fn ports(
    stored: &[v3::scalars::Port<'_>],
    names: &mut Selectors<'_>,
    at: At<'_>,
    complaints: &mut Complaints,
) -> Vec<Port> {
    let mut ports = Vec::with_capacity(stored.len());
    for (index, port) in stored.iter().enumerate() {
        match port {
            v3::scalars::Port::Range(0, _) => complaints.reject(at.index(index), "port 0 is not a port of packets"),
            v3::scalars::Port::Range(first, last) => {
                ports.push(Port::Range(PortRange { first: *first, last: *last }));
            }
            v3::scalars::Port::Named(name) if validate::is_rule_port_name(name) => {
                ports.push(Port::Named(names.name(name)));
            }
            v3::scalars::Port::Named(name) => {
                complaints.reject(at.index(index), format_args!("{name:?} is neither a port nor the name of one"));
            }
        }
    }
    ports
}

/// V-13: which ports a rule may ask for depends on its protocol.
fn check_ports_fit(entity: &EntityRule<'_>, protocol: Option<&Protocol>, at: At<'_>, complaints: &mut Complaints) {
    for (field, ports) in [("ports", &entity.ports), ("notPorts", &entity.not_ports)] {
        match protocol {
            None => {
                if ports.iter().any(|port| matches!(port, v3::scalars::Port::Range(_, _))) {
                    complaints.reject(at.field(field), "port numbers need protocol TCP, UDP or SCTP");
                }
            }
            Some(protocol) if protocol.number().is_some_and(|number| PORT_PROTOCOLS.contains(&number)) => (),
            Some(protocol) => {
                if !ports.is_empty() {
                    complaints.reject(at.field(field), format_args!("protocol {protocol} has no ports to ask for"));
                }
            }
        }
    }
}

fn service(
    stored: Option<&Services<'_>>,
    names: &mut Selectors<'_>,
    at: At<'_>,
    defects: &mut Defects<'_>,
) -> Option<ServiceRef> {
    let Services { name, namespace } = stored?;
    if name.is_empty() {
        defects.unusable(at.field("name"), "the service has no name");
        return None;
    }
    Some(ServiceRef { namespace: names.name(namespace), name: names.name(name) })
}
