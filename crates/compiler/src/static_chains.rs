//! Chains and hook rules that depend on options only (netfilter.md 5), for the tables raw and filter.
//!
//! Fed with the operator's options, feeds the table programs of [`crate::uses`]. The tests hold every
//! configuration of the vectors against the text.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};

use model::{Family, IcmpMatch, PortRange};
use program::{
    Action, BaseChain, Chain, ChainName, ConnState, Hooks, InterfaceMatch, Match, Protocol, Rule, SetKind, Side, Table,
};

use crate::names;
use crate::options::{EndpointToHost, Failsafe, Options};
use crate::policy::split_ports;

const HOST_ACCEPTED: &str = "Host endpoint policy accepted packet.";
const POLICY_ACCEPTED: &str = "Policy explicitly accepted packet.";

/// ICMPv6 types a workload needs to talk to its router: multicast listener query, report and done,
/// router solicitation, neighbour solicitation and advertisement.
const ROUTER_ICMP_V6: [u8; 6] = [130, 131, 132, 133, 135, 136];

/// Returns the hook rules of a table (5.1); the same for both families.
pub fn hooks(options: &Options, table: Table) -> BTreeMap<BaseChain, Hooks> {
    let jump = |base, chain| {
        let inserts = vec![Rule::new(Vec::new(), Action::Jump(ChainName::fixed(chain)))];
        (base, Hooks { inserts, appends: Vec::new() })
    };
    let prerouting = || jump(BaseChain::Prerouting, names::PREROUTING);
    let output = || jump(BaseChain::Output, names::OUTPUT);
    let postrouting = || jump(BaseChain::Postrouting, names::POSTROUTING);
    match table {
        Table::Raw => [prerouting(), output()].into(),
        Table::Mangle => [prerouting(), postrouting()].into(),
        Table::Nat => {
            // Last, so that kube-proxy's masquerade clears its mark first.
            let (base, hooks) = postrouting();
            [prerouting(), output(), (base, Hooks { inserts: Vec::new(), appends: hooks.inserts })].into()
        }
        Table::Filter => {
            let (base, mut forward) = jump(BaseChain::Forward, names::FORWARD);
            // Last, so that others' rules see packets that policy allowed before we accept them.
            let accept = options.marks.accept;
            forward.appends = vec![
                accepted(options, options.filter_allow.action()).comment(POLICY_ACCEPTED),
                Rule::new(Vec::new(), Action::SetMark(accept)),
            ];
            [jump(BaseChain::Input, names::INPUT), (base, forward), output()].into()
        }
    }
}

/// Returns the static chains of the raw table (5.2).
pub fn raw(options: &Options, family: Family) -> Vec<Chain> {
    let mut chains = vec![raw_prerouting(options, family), raw_output(options, family), wireguard_mark(options)];
    chains.extend(failsafe(options, family, Table::Raw));
    chains
}

fn raw_prerouting(options: &Options, family: Family) -> Chain {
    let marks = &options.marks;
    let from_workload = || Match::MarkIs { value: marks.scratch0, mask: marks.scratch0 };
    let mut chain = Rows::new(names::PREROUTING);
    chain.rule([], Action::ClearMark(marks.all()));
    if options.wireguard_encrypt_host && Family::BOTH.iter().any(|family| options.wireguard_port(*family).is_some()) {
        chain.jump([], names::WIREGUARD_MARK);
    }
    chain.no_track_vxlan(options, family);
    for prefix in &options.interface_prefixes {
        chain.rule([Match::In(InterfaceMatch::Prefix(prefix.clone()))], Action::SetMark(marks.scratch0));
    }
    chain.jump([from_workload()], names::RPF_SKIP);
    if options.openstack && family == Family::V4 {
        // DHCPDISCOVER comes from 0.0.0.0, which some kernels' reverse path check refuses.
        let source = Match::Address { side: Side::Source, address: IpAddr::V4(Ipv4Addr::UNSPECIFIED) };
        chain.rule([udp(), source, port(Side::Source, 68), port(Side::Destination, 67)], Action::Accept);
    }
    chain.rule([from_workload(), Match::ReversePathFailed], options.deny(Table::Raw));
    chain.jump([Match::MarkClear(marks.scratch0)], names::FROM_HOST_ENDPOINT);
    chain.push(accepted(options, Action::Accept));
    chain.into_chain()
}

fn raw_output(options: &Options, family: Family) -> Chain {
    let mut chain = Rows::new(names::OUTPUT);
    chain.rule([], Action::ClearMark(options.marks.all()));
    chain.jump([], names::TO_HOST_ENDPOINT);
    chain.no_track_vxlan(options, family);
    chain.push(accepted(options, Action::Accept));
    chain.into_chain()
}

fn wireguard_mark(options: &Options) -> Chain {
    let mut chain = Rows::new(names::WIREGUARD_MARK);
    for name in ["lo", &options.wireguard_interface_v4, &options.wireguard_interface_v6] {
        chain.rule([Match::In(InterfaceMatch::Exact(name.to_owned()))], Action::Return);
    }
    for prefix in &options.interface_prefixes {
        chain.rule([Match::In(InterfaceMatch::Prefix(prefix.clone()))], Action::Return);
    }
    chain.rule([], Action::SetMark(options.marks.wireguard));
    chain.into_chain()
}

/// Returns the static chains of the filter table (5.5).
pub fn filter(options: &Options, family: Family) -> Vec<Chain> {
    let mut chains = vec![
        filter_forward(options),
        filter_input(options, family),
        workload_to_host(options, family),
        filter_output(options, family),
    ];
    chains.extend(failsafe(options, family, Table::Filter));
    if options.ipvs {
        chains.push(forward_check(options, family));
        chains.push(forward_endpoint_mark(options));
    }
    chains
}

fn filter_forward(options: &Options) -> Chain {
    let marks = &options.marks;
    let mut chain = Rows::new(names::FORWARD);
    chain.rule([], Action::ClearMark(marks.all() & !marks.accept));
    chain.jump([Match::MarkClear(marks.accept)], names::FROM_HOST_FORWARD);
    for prefix in &options.interface_prefixes {
        chain.jump([Match::In(InterfaceMatch::Prefix(prefix.clone()))], names::FROM_WORKLOAD_DISPATCH);
        chain.jump([Match::Out(InterfaceMatch::Prefix(prefix.clone()))], names::TO_WORKLOAD_DISPATCH);
    }
    chain.jump([], names::TO_HOST_FORWARD);
    chain.jump([], names::CIDR_BLOCK);
    chain.into_chain()
}

fn filter_input(options: &Options, family: Family) -> Chain {
    let allow = || options.filter_allow.action();
    let to_us = || local(Side::Destination);
    let digit = family.digit();
    let word = options.deny_word(Table::Filter);
    let mut chain = Rows::new(names::INPUT);
    if options.ipip_enabled && family == Family::V4 {
        chain.commented(
            [protocol(4), in_set("all-hosts-net", family, Side::Source), to_us()],
            allow(),
            "Allow IPIP packets from Calico hosts",
        );
        chain.commented(
            [protocol(4)],
            options.deny(Table::Filter),
            format!("{word} IPIP packets from non-Calico hosts"),
        );
    }
    if options.vxlan_enabled(family) {
        let vxlan = || [protocol(17), port(Side::Destination, options.vxlan_port)];
        let [udp, port] = vxlan();
        chain.commented(
            [udp, port, in_set("all-vxlan-net", family, Side::Source), to_us()],
            allow(),
            format!("Allow IPv{digit} VXLAN packets from allowed hosts"),
        );
        let (deny, word) = match family {
            Family::V4 => (Action::Drop, "Drop"),
            Family::V6 => (options.deny(Table::Filter), word),
        };
        let [udp, port] = vxlan();
        let comment = format!("{word} IPv{digit} VXLAN packets from non-allowed hosts");
        chain.commented([udp, port, to_us()], deny, comment);
    }
    if let Some(wireguard) = options.wireguard_port(family) {
        chain.commented(
            [protocol(17), port(Side::Destination, wireguard), to_us()],
            allow(),
            format!("Allow incoming IPv{digit} Wireguard packets"),
        );
    }
    if options.ipvs {
        chain.rule([], Action::ClearMark(options.marks.endpoint));
        chain.jump([], names::FORWARD_CHECK);
        chain.rule([Match::MarkAny(options.marks.endpoint)], Action::Return);
    }
    for prefix in &options.interface_prefixes {
        let from_workload = Match::In(InterfaceMatch::Prefix(prefix.clone()));
        chain.rule([from_workload], Action::Goto(ChainName::fixed(names::WORKLOAD_TO_HOST)));
    }
    chain.push(accepted(options, allow()));
    chain.rule([], Action::ClearMark(options.marks.all()));
    chain.jump([], names::FROM_HOST_ENDPOINT);
    chain.push(accepted(options, allow()).comment(HOST_ACCEPTED));
    chain.into_chain()
}

fn workload_to_host(options: &Options, family: Family) -> Chain {
    let allow = || options.filter_allow.action();
    let mut chain = Rows::new(names::WORKLOAD_TO_HOST);
    if family == Family::V6 {
        for kind in ROUTER_ICMP_V6 {
            let icmp = Match::Icmp { family, negated: false, icmp: IcmpMatch { kind, code: None } };
            chain.rule([protocol(58), icmp], allow());
        }
    }
    if options.openstack {
        if let (Family::V4, Some(address)) = (family, options.metadata_address) {
            let to = Match::Address { side: Side::Destination, address: IpAddr::V4(address) };
            chain.rule([tcp(), to, port(Side::Destination, options.metadata_port)], allow());
        }
        let (client, server) = match family {
            Family::V4 => (68, 67),
            Family::V6 => (546, 547),
        };
        chain.rule([udp(), port(Side::Source, client), port(Side::Destination, server)], allow());
        chain.rule([udp(), port(Side::Destination, 53)], allow());
    }
    chain.jump([], names::FROM_WORKLOAD_DISPATCH);
    let configured = match options.endpoint_to_host {
        EndpointToHost::Drop => Action::Drop,
        EndpointToHost::Accept => Action::Accept,
        EndpointToHost::Return => Action::Return,
    };
    chain.commented([], configured, "Configured DefaultEndpointToHostAction");
    chain.into_chain()
}

fn filter_output(options: &Options, family: Family) -> Chain {
    let allow = || options.filter_allow.action();
    let from_us = || local(Side::Source);
    let digit = family.digit();
    let mut chain = Rows::new(names::OUTPUT);
    chain.push(accepted(options, allow()));
    if options.ipvs {
        let forwarded = Match::MarkAny(options.marks.endpoint);
        chain.rule([forwarded], Action::Goto(ChainName::fixed(names::FORWARD_ENDPOINT_MARK)));
    }
    for prefix in &options.interface_prefixes {
        chain.rule([Match::Out(InterfaceMatch::Prefix(prefix.clone()))], Action::Return);
    }
    if options.ipip_enabled && family == Family::V4 {
        chain.commented(
            [protocol(4), in_set("all-hosts-net", family, Side::Destination), from_us()],
            allow(),
            "Allow IPIP packets to other Calico hosts",
        );
    }
    if options.vxlan_enabled(family) {
        let peers = in_set("all-vxlan-net", family, Side::Destination);
        chain.commented(
            [protocol(17), port(Side::Destination, options.vxlan_port), from_us(), peers],
            allow(),
            format!("Allow IPv{digit} VXLAN packets to other allowed hosts"),
        );
    }
    if let Some(wireguard) = options.wireguard_port(family) {
        chain.commented(
            [protocol(17), port(Side::Destination, wireguard), from_us()],
            allow(),
            format!("Allow outgoing IPv{digit} Wireguard packets"),
        );
    }
    chain.rule([], Action::ClearMark(options.marks.all()));
    chain.jump([Match::ConnTrack { negated: true, states: vec![ConnState::Dnat] }], names::TO_HOST_ENDPOINT);
    chain.push(accepted(options, allow()).comment(HOST_ACCEPTED));
    chain.into_chain()
}

fn forward_check(options: &Options, family: Family) -> Chain {
    let host = |negated| {
        let set = names::fixed_set("this-host", family);
        Match::Set { side: Side::Destination, negated, set, with_port: false }
    };
    let set_mark = || ChainName::fixed(names::SET_ENDPOINT_MARK);
    let known = Match::ConnTrack { negated: false, states: vec![ConnState::Related, ConnState::Established] };
    let mut chain = Rows::new(names::FORWARD_CHECK);
    chain.rule([known], Action::Return);
    for ports in split_ports(&options.kube_node_ports) {
        for protocol in [tcp(), udp()] {
            let ports = Match::Ports { side: Side::Destination, negated: false, ports: ports.clone() };
            let comment = "To kubernetes NodePort service";
            chain.commented([protocol, ports, host(false)], Action::Goto(set_mark()), comment);
        }
    }
    chain.commented([host(true)], Action::Jump(set_mark()), "To kubernetes service");
    chain.into_chain()
}

fn forward_endpoint_mark(options: &Options) -> Chain {
    let marks = &options.marks;
    let mut chain = Rows::new(names::FORWARD_ENDPOINT_MARK);
    chain.jump([Match::MarkIsNot { value: marks.non_cali, mask: marks.endpoint }], names::FROM_ENDPOINT_MARK);
    for prefix in &options.interface_prefixes {
        chain.jump([Match::Out(InterfaceMatch::Prefix(prefix.clone()))], names::TO_WORKLOAD_DISPATCH);
    }
    chain.jump([], names::TO_HOST_FORWARD);
    chain.rule([], Action::ClearMark(marks.endpoint));
    chain.push(accepted(options, options.filter_allow.action()).comment(POLICY_ACCEPTED));
    chain.into_chain()
}

/// Returns the chains of ports that stay open on host endpoints (5.6). In the raw table nothing is
/// tracked yet, so that answers need rules of their own.
pub fn failsafe(options: &Options, family: Family, table: Table) -> [Chain; 2] {
    let Options { failsafe_inbound: inbound, failsafe_outbound: outbound, .. } = options;
    let rows = |name, there: &[Failsafe], back: &[Failsafe], net_side| {
        let mut chain = Rows::new(name);
        let back = if table == Table::Raw { back } else { &[] };
        let requests = there.iter().map(|entry| (Side::Destination, entry));
        let answers = back.iter().map(|entry| (Side::Source, entry));
        for (port_side, Failsafe { protocol, port: number, net }) in requests.chain(answers) {
            if net.is_some_and(|net| Family::of(&net) != family) {
                continue;
            }
            let net = net.map(|net| Match::Net { side: net_side, negated: false, net });
            let matches = [named(protocol), port(port_side, *number)].into_iter().chain(net);
            chain.push(Rule::new(matches.collect(), Action::Accept));
        }
        chain.into_chain()
    };
    [
        rows(names::FAILSAFE_IN, inbound, outbound, Side::Source),
        rows(names::FAILSAFE_OUT, outbound, inbound, Side::Destination),
    ]
}

/// Returns the sets that the static chains of these tables name. Until their owners fill them they are
/// empty: tunnelled packets are then dropped, and a table that names a missing set could not be written
/// at all.
pub fn sets(options: &Options, family: Family) -> Vec<(&'static str, SetKind)> {
    let wanted = [
        (options.ipip_enabled && family == Family::V4, "all-hosts-net", SetKind::Net),
        (options.vxlan_enabled(family), "all-vxlan-net", SetKind::Net),
        (options.ipvs, "this-host", SetKind::Address),
    ];
    wanted.into_iter().filter(|(wanted, ..)| *wanted).map(|(_, id, kind)| (id, kind)).collect()
}

/// Collects the rows of a chain.
struct Rows {
    name: &'static str,
    rules: Vec<Rule>,
}

impl Rows {
    const fn new(name: &'static str) -> Self {
        Self { name, rules: Vec::new() }
    }

    fn push(&mut self, rule: Rule) {
        self.rules.push(rule);
    }

    fn rule<const N: usize>(&mut self, matches: [Match; N], action: Action) {
        self.push(Rule::new(matches.into(), action));
    }

    fn commented<const N: usize>(&mut self, matches: [Match; N], action: Action, comment: impl Into<String>) {
        self.push(Rule::new(matches.into(), action).comment(comment));
    }

    fn jump<const N: usize>(&mut self, matches: [Match; N], chain: &str) {
        self.rule(matches, Action::Jump(ChainName::fixed(chain)));
    }

    fn no_track_vxlan(&mut self, options: &Options, family: Family) {
        if options.vxlan_enabled(family) {
            self.rule([udp(), Match::DestinationPort(options.vxlan_port)], Action::NoTrack);
        }
    }

    fn into_chain(self) -> Chain {
        Chain { name: ChainName::fixed(self.name), rules: self.rules }
    }
}

fn accepted(options: &Options, action: Action) -> Rule {
    let accept = options.marks.accept;
    Rule::new(vec![Match::MarkIs { value: accept, mask: accept }], action)
}

fn named(protocol: &str) -> Match {
    Match::Protocol { negated: false, protocol: Protocol::Name(protocol.into()) }
}

fn tcp() -> Match {
    named("tcp")
}

fn udp() -> Match {
    named("udp")
}

fn protocol(number: u8) -> Match {
    Match::Protocol { negated: false, protocol: Protocol::Number(number) }
}

fn port(side: Side, port: u16) -> Match {
    Match::Ports { side, negated: false, ports: vec![PortRange::single(port)] }
}

fn local(side: Side) -> Match {
    Match::LocalAddress { side, negated: false, limit_out: false }
}

fn in_set(id: &str, family: Family, side: Side) -> Match {
    Match::Set { side, negated: false, set: names::fixed_set(id, family), with_port: false }
}
