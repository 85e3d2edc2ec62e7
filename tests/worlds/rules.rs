//! What random worlds get in addition, so that packets meet their rules and that these need much of the kernel.

use std::sync::Arc;

use ipnet::IpNet;
use model::{Action, EntityMatch, Family, IcmpMatch, Port, PortRange, ProfileRules, Protocol, Rule, Update};
use testkit::build;
use testkit::world::{Dice, Domain};
use verdict::Packet;

use crate::ground::{HOMES, OUTSIDE};

/// Types of ICMP messages that begin a connection, or at least offend none (nf_conntrack_proto_icmp.c,
/// nf_conntrack_proto_icmpv6.c). They stand for the small numbers that rules and packets are drawn with.
pub(super) const ICMP_KINDS: [[u8; 3]; 2] = [[8, 13, 17], [128, 139, 135]];

/// Profiles that endpoints of random worlds list, and that the worlds do not always have rules of.
const PROFILES: [&str; 3] = ["p", "q", "kns.ns"];

/// Whether a packet has the protocol, family and networks of a rule; its ICMP type is not yet a real one.
pub(super) fn fits(rule: &Rule, packet: &Packet) -> bool {
    let of_family = rule.family.is_none_or(|family| family == packet.family());
    let of_protocol = match (&rule.protocol, &rule.not_protocol) {
        (Some(protocol), _) => protocol.number() == Some(packet.protocol),
        (None, Some(protocol)) => protocol.number() != Some(packet.protocol),
        (None, None) => true,
    };
    let sides = [(&rule.source, packet.source), (&rule.destination, packet.destination)];
    let in_nets = sides.iter().all(|(side, address)| {
        let is_in = |nets: &[IpNet]| nets.iter().any(|net| net.contains(address));
        (side.nets.is_empty() || is_in(&side.nets)) && !is_in(&side.not_nets)
    });
    let has_ports = packet.ports.is_some() || sides.iter().all(|(side, _)| side.ports.is_empty());
    of_family && of_protocol && in_nets && has_ports
}

/// The rules of profiles.
pub(super) fn profiles(domain: &Domain, dice: &mut Dice) -> Vec<Update> {
    PROFILES.iter().filter_map(|name| profile(domain, dice, name)).collect()
}

/// The rules of a profile, most of the time.
fn profile(domain: &Domain, dice: &mut Dice, name: &str) -> Option<Update> {
    let mut rules = || (0..dice.roll(4)).map(|_| domain.rule(dice)).collect();
    let rules = ProfileRules { inbound: rules(), outbound: rules() };
    (!dice.one_in(8)).then(|| Update::ProfileRules(name.into(), Some(Arc::new(rules))))
}

/// Lets a workload send from some networks that are not its own, now and then.
pub(super) fn let_spoof(update: &mut Update, dice: &mut Dice) {
    if let Update::WorkloadEndpoint(_, Some(endpoint)) = update
        && dice.one_in(4)
    {
        Arc::make_mut(endpoint).allowed_spoofed = (0..2 + dice.roll(4)).map(|_| some_net(dice)).collect();
    }
}

/// Does something to the rules of each direction of a policy or profile.
pub(super) fn for_rules(update: &mut Update, mut change: impl FnMut(&mut Vec<Rule>)) {
    let (inbound, outbound) = match update {
        Update::Policy(_, Some(policy)) => {
            let policy = Arc::make_mut(policy);
            (&mut policy.inbound, &mut policy.outbound)
        }
        Update::ProfileRules(name, Some(rules)) if **name != *model::profile::DEFAULT_ALLOW => {
            let rules = Arc::make_mut(rules);
            (&mut rules.inbound, &mut rules.outbound)
        }
        Update::WorkloadEndpoint(..)
        | Update::HostEndpoint(..)
        | Update::Policy(..)
        | Update::Tier(..)
        | Update::ProfileRules(..)
        | Update::ProfileLabels(..)
        | Update::NetworkSet(..)
        | Update::Link(..)
        | Update::Config(..)
        | Update::Ready(_) => return,
    };
    change(inbound);
    change(outbound);
}

/// Moves the ICMP types of a rule to those that packets have.
pub(super) fn use_real_icmp(rule: &mut Rule) {
    let kinds = ICMP_KINDS[usize::from(rule.family == Some(Family::V6))];
    for icmp in [&mut rule.icmp, &mut rule.not_icmp].into_iter().flatten() {
        icmp.kind = kinds[usize::from(icmp.kind) % 3];
    }
}

/// Puts a rule in front, now and then, whose matches do not fit into one rule of the kernel, or that looks at ICMP types.
pub(super) fn sharpen(rules: &mut Vec<Rule>, dice: &mut Dice) {
    if !dice.one_in(4) {
        return;
    }
    let mut rule = build::rule_of(dice.pick(&[Action::Allow, Action::Deny]));
    if dice.one_in(3) {
        let (family, protocol) = dice.pick(&[(Family::V4, 1), (Family::V6, 58)]);
        (rule.family, rule.protocol) = (Some(family), Some(Protocol::Number(protocol)));
        let kind = dice.pick(&ICMP_KINDS[usize::from(family == Family::V6)]);
        let icmp = Some(IcmpMatch { kind, code: dice.pick(&[None, Some(0), Some(1)]) });
        if dice.one_in(3) { rule.not_icmp = icmp } else { rule.icmp = icmp }
    } else {
        rule.protocol = Some(Protocol::Number(dice.pick(&[6, 17, 132])));
        for side in [&mut rule.source, &mut rule.destination] {
            if dice.one_in(2) {
                let ports = (0..16 + dice.roll(30)).map(|_| some_ports(dice)).collect();
                if dice.one_in(3) { side.not_ports = ports } else { side.ports = ports }
            }
            if dice.one_in(3) {
                let nets = (0..2 + dice.roll(3)).map(|_| some_net(dice)).collect();
                if dice.one_in(3) { side.not_nets = nets } else { side.nets = nets }
            }
        }
    }
    rules.insert(0, rule);
}

/// One port, or a few neighbours, mostly of those that packets have.
fn some_ports(dice: &mut Dice) -> Port {
    let (low, high) = (1 + dice.roll(400) as u16, 1024 + dice.roll(60_000) as u16);
    let first = dice.pick(&[1, 3, 80, 300, low, high]);
    Port::Range(PortRange { first, last: first + dice.pick(&[0, 0, 0, 1, 7]) })
}

fn some_net(dice: &mut Dice) -> IpNet {
    let addresses: Vec<(&str, &str)> = HOMES.into_iter().chain(OUTSIDE).collect();
    let (v4, v6) = dice.pick(&addresses);
    let (address, lengths) = if dice.one_in(2) { (v4, [8, 24, 32]) } else { (v6, [8, 64, 128]) };
    match format!("{address}/{}", dice.pick(&lengths)).parse::<IpNet>() {
        Ok(net) => net.trunc(),
        Err(error) => panic!("{address}: {error}"),
    }
}

/// Lets most of what no rule decides go on, as otherwise nearly every packet ends at the end of a tier.
pub(super) fn soften(rules: &mut Vec<Rule>, dice: &mut Dice) {
    match dice.roll(8) {
        0..=2 => rules.push(build::rule_of(Action::Pass)),
        3..=5 => rules.push(build::rule_of(Action::Allow)),
        _ => {}
    }
}

/// What [`features`] looks for.
pub const FEATURES: [&str; 7] =
    ["named port", "more than 15 ports", "several networks", "several lists", "negation", "selector", "ICMP type"];

/// What a rule has that is worth having been tried on a packet of the family.
#[must_use]
pub fn features(rule: &Rule, family: Family) -> Vec<&'static str> {
    let nets = |nets: &[IpNet]| nets.iter().filter(|net| Family::of(net) == family).count() > 1;
    let ports = |ports: &[Port]| ports.iter().filter(|port| matches!(port, Port::Range(_))).count() > 15;
    let has_named = |ports: &[Port]| ports.iter().any(|port| matches!(port, Port::Named(_)));
    let any = |test: &dyn Fn(&EntityMatch) -> bool| test(&rule.source) || test(&rule.destination);
    // Lists that do not fit into one match (netfilter.md 10.3).
    let lists = [&rule.source, &rule.destination].map(|side| {
        [nets(&side.nets), nets(&side.not_nets), ports(&side.ports), ports(&side.not_ports)].map(usize::from)
    });
    let n_lists: usize = lists.iter().flatten().sum();
    let negated =
        |side: &EntityMatch| !side.not_nets.is_empty() || side.not_selector.is_some() || !side.not_ports.is_empty();
    let found = [
        any(&|side| has_named(&side.ports) || has_named(&side.not_ports)),
        any(&|side| ports(&side.ports) || ports(&side.not_ports)),
        any(&|side| nets(&side.nets) || nets(&side.not_nets)),
        n_lists > 1,
        any(&negated) || rule.not_protocol.is_some() || rule.not_icmp.is_some(),
        any(&|side| side.selector.is_some()),
        rule.icmp.is_some() || rule.not_icmp.is_some(),
    ];
    FEATURES.into_iter().zip(found).filter_map(|(name, has)| has.then_some(name)).collect()
}
