//! Whether the histories and packets were worth looking at: that two opinions agree on packets that nothing
//! ever allows says little.

use std::collections::BTreeMap;

use model::{EntityMatch, Family, Policy, Port, Rule, Update, WorkloadEndpoint};
use testkit::interpret::Fate;
use verdict::{Facts, Forwarded, Reason, RuleOwner};

/// How often what was seen.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    packets: u64,
    fates: BTreeMap<Fate, u64>,
    counts: BTreeMap<String, u64>,
}

/// What 10,000 histories show at least this often. `update …` is generated; everything else is why a packet
/// was allowed or denied, with what the deciding rule asked for.
const WANTED: &[(&str, u64)] = &[
    ("update remote endpoint", 1_000),
    ("update inactive endpoint", 1_000),
    ("update endpoint with several addresses", 1_000),
    ("update endpoint with named ports", 1_000),
    ("update host endpoint", 1_000),
    ("update tier that passes", 1_000),
    ("update tier without order", 1_000),
    ("update staged policy", 1_000),
    ("update policy without direction", 1_000),
    ("update policy of one direction", 1_000),
    ("update untracked policy", 500),
    ("update pre-DNAT policy", 500),
    ("update policy on forwarded traffic", 500),
    ("update policy needed everywhere", 500),
    ("update rule of a service", 1_000),
    ("update rule with HTTP", 1_000),
    ("update rule with 16 port slots", 1_000),
    ("update rule with 151 excluded port slots", 100),
    ("update rule with 3 lists of alternatives", 1_000),
    ("update network set of everything", 500),
    ("update absent", 1_000),
    ("reverse path", 1_000),
    ("service of the host", 500),
    ("allow KnownConnection", 1_000),
    ("deny InvalidConnection", 1_000),
    ("deny Inactive", 1_000),
    ("deny Tunnel", 1_000),
    ("deny NoEndpoint", 1_000),
    ("deny NothingAllowed", 1_000),
    ("deny MissingProfile", 1_000),
    ("deny EndOfTier", 1_000),
    ("deny EndOfTier missing", 1_000),
    ("asked two endpoints", 1_000),
    ("member of two objects", 100),
    ("member of a network set", 100),
    ("member of a host endpoint", 50),
    ("allow by profile", 1_000),
    ("deny by profile", 500),
    ("allow by policy", 1_000),
    ("deny by policy", 1_000),
    ("allow IPv4", 1_000),
    ("allow IPv6", 1_000),
    ("allow with nets", 1_000),
    ("allow with excluded nets", 300),
    ("allow with selector", 500),
    ("allow with excluded selector", 200),
    ("allow with both selectors", 10),
    ("allow with ports", 300),
    ("allow with excluded ports", 100),
    ("allow with named ports", 100),
    ("allow by named port", 50),
    ("allow with excluded named ports", 100),
    ("allow with 16 port slots", 50),
    ("allow with 3 lists of alternatives", 50),
    ("allow with protocol", 1_000),
    ("allow with excluded protocol", 300),
    ("allow with ICMP type", 30),
    ("allow with ICMP code", 10),
    ("allow with excluded ICMP type", 30),
    ("allow with one family", 300),
    ("deny with nets", 500),
    ("deny with selector", 200),
    ("deny with named ports", 50),
    ("deny with 3 lists of alternatives", 20),
];

impl Seen {
    pub(crate) fn note(&mut self, facts: &Facts, expected: &Result<Forwarded, &str>, fate: Fate) {
        self.packets += 1;
        *self.fates.entry(fate).or_default() += 1;
        let forwarded = match expected {
            Ok(forwarded) => forwarded,
            Err(before) => return self.count(*before),
        };
        let outcome = forwarded.outcome;
        if forwarded.verdicts.len() == 2 {
            self.count("asked two endpoints");
        }
        let Some(verdict) = forwarded.verdicts.last() else { return };
        let kind = format!("{:?}", verdict.reason);
        let kind = kind.split(|c: char| !c.is_alphanumeric()).next().unwrap_or_default();
        if kind != "Rule" {
            self.count(format!("{outcome} {kind}"));
        }
        if let Reason::EndOfTier { is_missing: true, .. } = &verdict.reason {
            self.count("deny EndOfTier missing");
        }
        let Reason::Rule { rule: place, contributions } = &verdict.reason else { return };
        match &place.owner {
            RuleOwner::Policy { .. } => self.count(format!("{outcome} by policy")),
            RuleOwner::Profile(_) => self.count(format!("{outcome} by profile")),
        }
        match forwarded.packet.family() {
            Family::V4 => self.count(format!("{outcome} IPv4")),
            Family::V6 => self.count(format!("{outcome} IPv6")),
        }
        let mut twice = contributions.iter().zip(contributions.iter().skip(1));
        if twice.any(|(a, b)| a.side == b.side && a.port == b.port) {
            self.count("member of two objects");
        }
        if contributions.iter().any(|one| matches!(one.object, verdict::ObjectKey::NetworkSet(_))) {
            self.count("member of a network set");
        }
        if contributions.iter().any(|one| matches!(one.object, verdict::ObjectKey::HostEndpoint(_))) {
            self.count("member of a host endpoint");
        }
        if contributions.iter().any(|one| one.port.is_some()) {
            self.count(format!("{outcome} by named port"));
        }
        for feature in features(facts.rule(place).expect("the rule that was named")) {
            self.count(format!("{outcome} with {feature}"));
        }
    }

    pub(crate) fn update(&mut self, update: &Update) {
        match update {
            Update::WorkloadEndpoint(key, Some(value)) => {
                self.count_if(*key.host != *testkit::world::HOST, "update remote endpoint");
                let WorkloadEndpoint { active, v4_nets, v6_nets, ports, .. } = value.as_ref();
                self.count_if(!active, "update inactive endpoint");
                self.count_if(v4_nets.len() + v6_nets.len() > 1, "update endpoint with several addresses");
                self.count_if(!ports.is_empty(), "update endpoint with named ports");
            }
            Update::HostEndpoint(_, Some(_)) => self.count("update host endpoint"),
            Update::Policy(key, Some(policy)) => {
                let Policy { ingress, egress, do_not_track, pre_dnat, apply_on_forward, always_needed, .. } = **policy;
                self.count_if(key.kind.is_staged(), "update staged policy");
                self.count_if(!ingress && !egress, "update policy without direction");
                self.count_if(ingress != egress, "update policy of one direction");
                self.count_if(do_not_track, "update untracked policy");
                self.count_if(pre_dnat, "update pre-DNAT policy");
                self.count_if(apply_on_forward, "update policy on forwarded traffic");
                self.count_if(always_needed, "update policy needed everywhere");
                self.rules(&policy.inbound, &policy.outbound);
            }
            Update::ProfileRules(_, Some(rules)) => self.rules(&rules.inbound, &rules.outbound),
            Update::Tier(_, Some(tier)) => {
                self.count_if(tier.default_pass, "update tier that passes");
                self.count_if(tier.order.is_none(), "update tier without order");
            }
            Update::NetworkSet(_, Some(set)) => {
                self.count_if(set.nets.iter().any(|net| net.prefix_len() == 0), "update network set of everything");
            }
            Update::ProfileLabels(_, Some(_)) => self.count("update profile labels"),
            Update::WorkloadEndpoint(..)
            | Update::HostEndpoint(..)
            | Update::Policy(..)
            | Update::ProfileRules(..)
            | Update::Tier(..)
            | Update::NetworkSet(..)
            | Update::ProfileLabels(..) => self.count("update absent"),
            Update::Link(..) | Update::Config(..) | Update::Ready(_) => self.count("update of something else"),
        }
    }

    fn rules(&mut self, inbound: &[Rule], outbound: &[Rule]) {
        for rule in inbound.iter().chain(outbound) {
            let sides = [&rule.source, &rule.destination];
            self.count_if(sides.iter().any(|side| side.service.is_some()), "update rule of a service");
            self.count_if(rule.has_http, "update rule with HTTP");
            let excluded = sides.iter().any(|side| slots(&side.not_ports) > 150);
            self.count_if(excluded, "update rule with 151 excluded port slots");
            for feature in features(rule) {
                self.count(format!("update rule with {feature}"));
            }
        }
    }

    /// Returns what was seen too rarely.
    pub(crate) fn gaps(&self, histories: u64) -> Vec<String> {
        let mut gaps = Vec::new();
        for (what, least) in WANTED {
            let (seen, least) = (self.counts.get(*what).copied().unwrap_or(0), least * histories / 10_000);
            if seen < least {
                gaps.push(format!("{what}: {seen} of {least}"));
            }
        }
        let allowed = self.fates.get(&Fate::Accepted).copied().unwrap_or(0);
        if allowed * 100 < self.packets * 15 {
            gaps.push(format!("{allowed} of {} packets are allowed", self.packets));
        }
        gaps
    }

    fn count(&mut self, what: impl Into<String>) {
        *self.counts.entry(what.into()).or_default() += 1;
    }

    fn count_if(&mut self, is_so: bool, what: &str) {
        if is_so {
            self.count(what);
        }
    }
}

/// What a rule asks for.
fn features(rule: &Rule) -> Vec<&'static str> {
    let either = |is: &dyn Fn(&EntityMatch) -> bool| is(&rule.source) || is(&rule.destination);
    let named = |ports: &[Port]| ports.iter().any(|port| matches!(port, Port::Named(_)));
    let ranges = |ports: &[Port]| ports.iter().any(|port| matches!(port, Port::Range(_)));
    let lists = [&rule.source, &rule.destination]
        .into_iter()
        .map(|side| usize::from(side.nets.len() > 1) + usize::from(side.ports.len() > 1))
        .sum::<usize>();
    [
        ("nets", either(&|side| !side.nets.is_empty())),
        ("excluded nets", either(&|side| !side.not_nets.is_empty())),
        ("selector", either(&|side| side.selector.is_some())),
        ("excluded selector", either(&|side| side.not_selector.is_some())),
        ("both selectors", either(&|side| side.selector.is_some() && side.not_selector.is_some())),
        ("ports", either(&|side| ranges(&side.ports))),
        ("excluded ports", either(&|side| ranges(&side.not_ports))),
        ("named ports", either(&|side| named(&side.ports))),
        ("excluded named ports", either(&|side| named(&side.not_ports))),
        ("16 port slots", either(&|side| slots(&side.ports) > 15)),
        ("3 lists of alternatives", lists >= 3),
        ("protocol", rule.protocol.is_some()),
        ("excluded protocol", rule.not_protocol.is_some()),
        ("ICMP type", rule.icmp.is_some()),
        ("ICMP code", rule.icmp.is_some_and(|icmp| icmp.code.is_some())),
        ("excluded ICMP type", rule.not_icmp.is_some()),
        ("one family", rule.family.is_some()),
    ]
    .into_iter()
    .filter_map(|(feature, is_so)| is_so.then_some(feature))
    .collect()
}

/// Slots that the numeric ports take in matches.
fn slots(ports: &[Port]) -> usize {
    ports
        .iter()
        .map(|port| match port {
            Port::Range(range) if range.first == range.last => 1,
            Port::Range(_) => 2,
            Port::Named(_) => 0,
        })
        .sum()
}
