//! The model of the kernel, held against what the kernel is known to do.

use model::Family;
use program::{ConnState, InterfaceMatch, Match, Members, Protocol, SetKind, SetSpec, Side, TableChanges};
use verdict::{Connection, Packet};

use super::*;

const BITS: Bits = Bits { ours: 0xff00, never_left: 0x8000 };

fn name(name: &str) -> ChainName {
    ChainName::new(name).unwrap()
}

fn rule(matches: Vec<Match>, action: Action) -> Rule {
    Rule::new(matches, action)
}

/// A filter table of IPv4 with hook rules in FORWARD, and chains.
fn changes(inserts: Vec<Rule>, chains: &[(&str, Vec<Rule>)]) -> Changes {
    let mut table = TableChanges::default();
    let hooks =
        Hooks { inserts, appends: vec![rule(vec![Match::MarkIs { value: 0x100, mask: 0x100 }], Action::Accept)] };
    table.hooks.insert(BaseChain::Forward, hooks);
    for (chain, rules) in chains {
        let chain = Chain { name: name(chain), rules: rules.clone() };
        table.chains.insert(chain.name.clone(), Some(Arc::new(chain)));
    }
    let id = TableId { family: Family::V4, table: Table::Filter };
    Changes { tables: [(id, table)].into(), ..Changes::default() }
}

fn set(kind: SetKind, members: &[Member]) -> ((Family, SetName), SetChange) {
    let name = SetName::new("cali40s:x").unwrap();
    let spec = SetSpec { name: name.clone(), family: Family::V4, kind, max_members: 9 };
    ((Family::V4, name), SetChange::Replace { spec, members: members.iter().copied().collect() })
}

fn in_set(with_port: bool) -> Match {
    Match::Set { side: Side::Destination, negated: false, set: SetName::new("cali40s:x").unwrap(), with_port }
}

fn packet() -> Packet {
    Packet::new([10, 0, 0, 1].into(), [10, 0, 0, 2].into(), 6).with_ports(1, 80)
}

fn walk(changes: &Changes, packet: Packet, mark: u32) -> Result<Fate, Fault> {
    let mut kernel = Kernel::new(BITS);
    kernel.apply(changes)?;
    let (way, from, to) = (Way::Forward, "cali1", "eth0");
    let passage = Passage { way, from, to, packet, mark, reverse_path_failed: false, translated: false, local: &[] };
    kernel.walk(passage).map(|journey| journey.fate)
}

fn jump(to: &str) -> Rule {
    rule(Vec::new(), Action::Jump(name(to)))
}

fn goto(to: &str) -> Rule {
    rule(Vec::new(), Action::Goto(name(to)))
}

#[test]
fn jumps_come_back_and_gotos_do_not() {
    let accept = || rule(Vec::new(), Action::Accept);
    let back = || rule(Vec::new(), Action::Return);
    let drop = || rule(Vec::new(), Action::Drop);
    for (text, inserts, chains, wanted) in [
        ("end of a chain", vec![jump("a"), drop()], vec![("a", vec![])], Fate::Dropped),
        ("return", vec![jump("a"), drop()], vec![("a", vec![back(), accept()])], Fate::Dropped),
        ("verdict", vec![jump("a"), drop()], vec![("a", vec![accept()])], Fate::Accepted),
        (
            "goto skips the rest of its own chain only",
            vec![jump("a"), drop()],
            vec![("a", vec![goto("b"), accept()]), ("b", vec![])],
            Fate::Dropped,
        ),
        ("goto from the base chain", vec![goto("a"), drop()], vec![("a", vec![])], Fate::Left),
        ("return in the base chain", vec![back(), drop()], vec![], Fate::Left),
        ("nothing", vec![], vec![], Fate::Left),
    ] {
        assert_eq!(walk(&changes(inserts, &chains), packet(), 0), Ok(wanted), "{text}");
    }
}

#[test]
fn marks_are_carried_from_rule_to_rule() {
    let mark = rule(Vec::new(), Action::SetMark(0x300));
    let clear = rule(vec![Match::MarkAny(0x200)], Action::ClearMark(0x100));
    assert_eq!(walk(&changes(vec![mark.clone()], &[]), packet(), 0), Ok(Fate::Accepted));
    assert_eq!(walk(&changes(vec![mark, clear], &[]), packet(), 0), Ok(Fate::Left));
}

#[test]
fn a_mark_that_is_not_ours_or_that_must_not_stay_is_a_fault() {
    for (action, mark, is_fine) in [
        (Action::SetMark(0x400), 0, true),
        (Action::SetMark(0x1), 0, false),
        (Action::ClearMark(0x1), 0x1, false),
        (Action::ClearMark(0x1), 0x2, true),
        (Action::SetMaskedMark { value: 0, mask: 0x10_0000 }, 0x10_0000, false),
        (Action::SetMark(0x8000), 0, false),
    ] {
        let got = walk(&changes(vec![rule(Vec::new(), action.clone())], &[]), packet(), mark);
        assert_eq!(got.is_ok(), is_fine, "{action:?} {mark:#x}: {got:?}");
    }
}

#[test]
fn what_is_not_there_is_a_fault() {
    let fault = |changes: &Changes| Kernel::new(BITS).apply(changes).unwrap_err().to_string();
    assert!(fault(&changes(vec![jump("gone")], &[])).contains("chain gone is not there"));
    let with_set = |matches| changes(vec![rule(matches, Action::Drop)], &[]);
    assert!(fault(&with_set(vec![in_set(false)])).contains("set cali40s:x is not there"));

    let mut delta = Changes::default();
    let name = SetName::new("cali40s:x").unwrap();
    let change = SetChange::Delta { added: Members::default(), removed: Members::default() };
    delta.sets.insert((Family::V4, name.clone()), change);
    assert!(fault(&delta).contains("which is not there"));
    delta.sets.insert((Family::V4, name), SetChange::Remove);
    assert!(fault(&delta).contains("removed, which is not there"));

    // A set that goes away under its rule.
    let mut first = with_set(vec![in_set(false)]);
    first.sets.extend([set(SetKind::Net, &[])]);
    let mut kernel = Kernel::new(BITS);
    kernel.apply(&first).unwrap();
    assert!(kernel.apply(&delta).unwrap_err().to_string().contains("set cali40s:x is not there"));
}

#[test]
fn what_the_tools_refuse_is_a_fault() {
    let ports = |n: u16| Match::Ports {
        side: Side::Source,
        negated: false,
        ports: (1..=n).map(model::PortRange::single).collect(),
    };
    let tcp = || Match::Protocol { negated: false, protocol: Protocol::Number(6) };
    let not_tcp = || Match::Protocol { negated: true, protocol: Protocol::Number(6) };
    let icmp = |family| Match::Icmp { family, negated: false, icmp: model::IcmpMatch { kind: 8, code: None } };
    let net = |net: &str, negated| Match::Net { side: Side::Source, negated, net: net.parse().unwrap() };
    let is_fine = |matches: Vec<Match>| {
        let mut changes = changes(vec![rule(matches, Action::Drop)], &[]);
        changes.sets.extend([set(SetKind::Net, &[])]);
        Kernel::new(BITS).apply(&changes).is_ok()
    };
    for (matches, wanted) in [
        (vec![tcp(), ports(15)], true),
        (vec![tcp(), ports(16)], false),
        (vec![ports(1)], false),
        (vec![not_tcp(), ports(1)], false),
        (vec![tcp(), not_tcp()], false),
        (vec![tcp(), icmp(Family::V4)], false),
        (vec![Match::Protocol { negated: false, protocol: Protocol::Number(1) }, icmp(Family::V4)], true),
        (vec![Match::Protocol { negated: false, protocol: Protocol::Number(58) }, icmp(Family::V6)], false),
        (vec![net("10.0.0.0/8", true)], true),
        (vec![net("10.0.0.0/8", true), net("11.0.0.0/8", true)], false),
        (vec![net("0.0.0.0/0", true)], false),
        (vec![net("10.0.0.1/8", false)], false),
        (vec![net("fd00::/8", false)], false),
        (vec![in_set(false)], true),
        (vec![in_set(true)], false),
    ] {
        assert_eq!(is_fine(matches.clone()), wanted, "{matches:?}");
    }
}

#[test]
fn members_meet_packets_by_address_network_or_port() {
    let address: IpAddr = [10, 0, 0, 2].into();
    let port = |protocol, port| Member::AddressPort { address, protocol, port };
    for (kind, members, wanted) in [
        (SetKind::Net, vec![Member::Net("10.0.0.0/24".parse().unwrap())], Fate::Dropped),
        (SetKind::Net, vec![Member::Net("10.0.1.0/24".parse().unwrap())], Fate::Left),
        (SetKind::Address, vec![Member::Address(address)], Fate::Dropped),
        (SetKind::AddressPort, vec![port(6, 80)], Fate::Dropped),
        (SetKind::AddressPort, vec![port(17, 80), port(6, 81)], Fate::Left),
        (SetKind::Net, vec![], Fate::Left),
    ] {
        let with_port = kind == SetKind::AddressPort;
        let mut changes = changes(vec![rule(vec![in_set(with_port)], Action::Drop)], &[]);
        changes.sets.extend([set(kind, &members)]);
        assert_eq!(walk(&changes, packet(), 0), Ok(wanted), "{members:?}");
    }
}

#[test]
fn states_and_interfaces_are_looked_at() {
    let known = |negated| Match::ConnTrack { negated, states: vec![ConnState::Related, ConnState::Established] };
    let from = |name: &str| Match::In(InterfaceMatch::Exact(name.to_owned()));
    for (matches, packet, wanted) in [
        (vec![known(false)], packet(), Fate::Left),
        (vec![known(false)], packet().of(Connection::Related), Fate::Dropped),
        (vec![known(true)], packet(), Fate::Dropped),
        (vec![from("cali1")], packet(), Fate::Dropped),
        (vec![from("cali")], packet(), Fate::Left),
        (vec![Match::In(InterfaceMatch::Prefix("cali".to_owned()))], packet(), Fate::Dropped),
        (vec![Match::Out(InterfaceMatch::Prefix("cali".to_owned()))], packet(), Fate::Left),
        (vec![Match::ReversePathFailed], packet(), Fate::Left),
    ] {
        let got = walk(&changes(vec![rule(matches.clone(), Action::Drop)], &[]), packet, 0);
        assert_eq!(got, Ok(wanted), "{matches:?}");
    }
}
