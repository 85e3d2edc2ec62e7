//! Rules that the kernel would refuse (netfilter.md 10.7), and verdicts that must not leak.

use graph::RuleProgram;
use model::{Action as Verdict, Family, IcmpMatch, Name, PolicyKey, PolicyKind, PortRange, Protocol, SetId};
use program::{Action, Direction, Match, Side, Table};

use super::*;

fn bare(action: Verdict) -> RuleProgram {
    RuleProgram::for_everything(action)
}

fn named(name: &str) -> Option<Protocol> {
    Some(Protocol::Name(name.into()))
}

fn ping(kind: u8) -> Option<IcmpMatch> {
    Some(IcmpMatch { kind, code: None })
}

/// Rules and complaints of one rule; sets exist unless their id begins with `missing`.
fn render(rule: &RuleProgram, family: Family) -> (Vec<Rule>, Vec<Complaint>) {
    let options = Options::default();
    let key = PolicyKey { kind: PolicyKind::GlobalNetworkPolicy, namespace: "".into(), name: "p".into() };
    let owner = Owner::Policy { key: &key, tier: "default", untracked: false };
    let set_name = &|id: &SetId, family| {
        let name = SetName::new(&id.kernel_name(family));
        name.filter(|_| !id.as_str().starts_with("missing"))
    };
    let direction = Direction::Ingress;
    let context = Context { options: &options, owner, direction, family, table: Table::Filter, set_name };
    let mut complaints = Vec::new();
    let rules = super::rule(&context, rule, &mut complaints);
    (rules, complaints)
}

/// A rule with something wrong, and the matches that are left of it in a deny of family IPv4.
fn defects() -> Vec<(&'static str, RuleProgram, Vec<Match>)> {
    let ports = |ports: &[u16]| ports.iter().map(|port| PortRange::single(*port)).collect::<Vec<_>>();
    let base = || bare(Verdict::Allow);
    let with = |change: &dyn Fn(&mut RuleProgram)| {
        let mut rule = base();
        change(&mut rule);
        rule
    };
    let protocol = |name: &str| Match::Protocol { negated: false, protocol: Protocol::Name(name.into()) };
    vec![
        ("ports without a protocol", with(&|rule| rule.destination.ports = ports(&[80])), vec![]),
        (
            "ports of a protocol without ports",
            with(&|rule| {
                rule.protocol = named("icmp");
                rule.source.not_ports = ports(&[80]);
            }),
            vec![protocol("icmp")],
        ),
        (
            "ports with a negated protocol",
            with(&|rule| {
                rule.not_protocol = named("tcp");
                rule.destination.ports = ports(&[80]);
            }),
            vec![Match::Protocol { negated: true, protocol: Protocol::Name("tcp".into()) }],
        ),
        (
            "an empty port range",
            with(&|rule| {
                rule.protocol = named("tcp");
                rule.destination.ports = vec![PortRange { first: 9, last: 1 }];
            }),
            vec![protocol("tcp")],
        ),
        ("an ICMP type without a protocol", with(&|rule| rule.icmp = ping(8)), vec![]),
        (
            "an ICMP type with another protocol",
            with(&|rule| {
                rule.protocol = named("tcp");
                rule.not_icmp = ping(8);
            }),
            vec![protocol("tcp")],
        ),
        ("a protocol nobody knows", with(&|rule| rule.protocol = named("TCP; drop")), vec![]),
        ("protocol 0, which means all", with(&|rule| rule.protocol = Some(Protocol::Number(0))), vec![]),
        ("negated protocol 0", with(&|rule| rule.not_protocol = Some(Protocol::Number(0))), vec![]),
        ("a set that does not exist", with(&|rule| rule.source.sets = vec![SetId::from_text("missing")]), vec![]),
        (
            "a set whose name the kernel would not take",
            with(&|rule| rule.source.sets = vec![SetId::from_text("a b")]),
            vec![],
        ),
        (
            "alternatives of which one cannot be written",
            with(&|rule| {
                rule.protocol = named("tcp");
                rule.destination.ports = ports(&[80]);
                rule.destination.named_port_sets = vec![SetId::from_text("missing")];
            }),
            // Port 80 alone would deny less than the rule says.
            vec![protocol("tcp")],
        ),
    ]
}

#[test]
fn a_rule_that_cannot_be_written_is_left_out_or_denies_more() {
    for (what, rule, left) in defects() {
        for action in [Verdict::Allow, Verdict::Pass, Verdict::Log] {
            let (rules, complaints) = render(&RuleProgram { action, ..rule.clone() }, Family::V4);
            assert!(rules.is_empty(), "{what} {action:?}: {rules:?}");
            assert_eq!(complaints.len(), 1, "{what} {action:?}");
            assert_eq!(complaints[0].object, "gnp/p");
            assert!(complaints[0].reason.contains("rule 0 cannot be programmed, it is left out"), "{complaints:?}");
        }
        let (rules, complaints) = render(&RuleProgram { action: Verdict::Deny, ..rule }, Family::V4);
        let matches: Vec<_> = rules.iter().map(|rule| rule.matches.clone()).collect();
        let marked = vec![Match::MarkIs { value: 0x40000, mask: 0x40000 }];
        assert_eq!(matches, [left, marked], "{what}");
        assert_eq!(rules.last().and_then(|rule| rule.action.clone()), Some(Action::Drop), "{what}");
        assert!(complaints[0].reason.contains("denies"), "{complaints:?}");
    }
}

#[test]
fn an_icmp_type_makes_a_rule_one_of_its_protocols_family() {
    for (number, family, other) in [(1, Family::V4, Family::V6), (58, Family::V6, Family::V4)] {
        for action in [Verdict::Allow, Verdict::Deny] {
            let rule = RuleProgram { protocol: Some(Protocol::Number(number)), icmp: ping(8), ..bare(action) };
            let (rules, complaints) = render(&rule, family);
            assert_eq!((rules.len(), complaints.len()), (2, 0), "{number} {family}");
            let (rules, complaints) = render(&rule, other);
            assert_eq!((rules.len(), complaints.len()), (0, 0), "{number} {other}");
        }
    }
}

#[test]
fn a_protocol_and_a_negated_one_are_reduced_to_one_match() {
    let rule = |not: &str| RuleProgram { protocol: named("tcp"), not_protocol: named(not), ..bare(Verdict::Deny) };
    let (rules, complaints) = render(&rule("udp"), Family::V4);
    assert_eq!(rules[0].matches, [Match::Protocol { negated: false, protocol: Protocol::Name("tcp".into()) }]);
    assert!(complaints.is_empty());
    let contradiction = RuleProgram { not_protocol: Some(Protocol::Number(6)), ..rule("udp") };
    assert_eq!(render(&contradiction, Family::V4), (Vec::new(), Vec::new()));
}

#[test]
fn many_excluded_ports_are_moved_out_of_the_main_rule() {
    let excluding = |n: u16| {
        let mut rule = RuleProgram { protocol: named("tcp"), ..bare(Verdict::Allow) };
        // Every piece takes 15 of them.
        rule.destination.not_ports = (1..=n * 15).map(PortRange::single).collect();
        rule.destination.not_named_port_sets = vec![SetId::from_text("n:x")];
        render(&rule, Family::V4).0
    };
    let few = excluding(9);
    assert_eq!((few.len(), few[0].matches.len()), (2, 11), "{few:?}");
    let many = excluding(200);
    assert_eq!(many[0].action, Some(Action::SetMaskedMark { value: 0x80000, mask: 0x180000 }));
    let exclusions = &many[1..202];
    assert!(exclusions.iter().all(|rule| rule.action == Some(Action::ClearMark(0x80000))));
    assert_eq!(exclusions[0].matches.len(), 2, "protocol and ports");
    assert!(matches!(exclusions[200].matches[..], [Match::Set { negated: false, with_port: true, .. }]));
    assert_eq!(many[202].matches.len(), 2, "{:?}", many[202]);
    assert_eq!(many.len(), 204);
}

/// 10.4: ports and nets of both sides make four blocks, each of which uses the bit of the one before.
#[test]
#[allow(clippy::wildcard_enum_match_arm, reason = "anything else does not belong in such a rule")]
fn a_rule_with_four_blocks_matches_what_passes_all_of_them_and_nothing_else() {
    let mut rule = RuleProgram { protocol: named("tcp"), ..bare(Verdict::Allow) };
    for half in [&mut rule.source, &mut rule.destination] {
        half.ports = (1..=20).map(PortRange::single).collect();
        half.nets = ["10.0.0.0/8", "192.0.2.0/24"].map(|net| net.parse().unwrap()).to_vec();
    }
    let rules = render(&rule, Family::V4).0;
    for packet in 0..16_u32 {
        // What of the packet fits: source ports, destination ports, source nets, destination nets.
        let fits = |bit: u32, side: Side| packet >> (bit + u32::from(side == Side::Destination)) & 1 == 1;
        let mut mark = u32::MAX;
        let mut is_matched = false;
        for rule in &rules {
            let all = rule.matches.iter().all(|wanted| match wanted {
                Match::Ports { side, negated: false, .. } => fits(0, *side),
                Match::Net { side, negated: false, .. } => fits(2, *side),
                Match::MarkClear(mask) => mark & mask == 0,
                Match::MarkIs { value, mask } => mark & mask == *value,
                Match::Protocol { negated: false, .. } => true,
                other => panic!("{other:?} in {rules:#?}"),
            });
            match rule.action.as_ref().filter(|_| all) {
                Some(Action::SetMaskedMark { value, mask }) => mark = mark & !mask | value,
                Some(Action::ClearMark(bits)) => mark &= !bits,
                Some(Action::SetMark(bits)) if *bits == Options::default().marks.accept => is_matched = true,
                Some(Action::SetMark(bits)) => mark |= bits,
                Some(Action::Return) | None => (),
                other => panic!("{other:?} in {rules:#?}"),
            }
        }
        assert_eq!(is_matched, packet == 15, "{packet:04b} in {rules:#?}");
    }
}

/// 10.3: `n` for a port and `n-m` for a range, pieces by ` | `.
#[test]
fn port_lists_are_cut_in_order_where_the_next_item_does_not_fit() {
    let cases = [
        ("", ""),
        ("1", "1"),
        ("1-2", "1-2"),
        ("1 2 3 4 5 6 7 8 9 10 11 12 13 14 15", "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15"),
        ("1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16", "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 | 16"),
        // Seven ranges and no eighth: the piece stays at 14 slots unless a single port follows.
        ("1-2 3-4 5-6 7-8 9-10 11-12 13-14 15-16", "1-2 3-4 5-6 7-8 9-10 11-12 13-14 | 15-16"),
        ("1-2 3-4 5-6 7-8 9-10 11-12 13-14 15 16-17", "1-2 3-4 5-6 7-8 9-10 11-12 13-14 15 | 16-17"),
        ("1-2 3-4 5-6 7-8 9-10 11-12 13-14 15-16 17", "1-2 3-4 5-6 7-8 9-10 11-12 13-14 | 15-16 17"),
    ];
    for (ranges, expected) in cases {
        let ranges: Vec<PortRange> = ranges
            .split_whitespace()
            .map(|range| {
                let (first, last) = range.split_once('-').unwrap_or((range, range));
                PortRange { first: first.parse().unwrap(), last: last.parse().unwrap() }
            })
            .collect();
        let text = |range: &PortRange| match range.first == range.last {
            true => range.first.to_string(),
            false => format!("{}-{}", range.first, range.last),
        };
        let pieces: Vec<String> =
            split_ports(&ranges).iter().map(|piece| piece.iter().map(text).collect::<Vec<_>>().join(" ")).collect();
        assert_eq!(pieces.join(" | "), expected);
    }
}

#[test]
fn x_02_nets_of_one_family_make_a_rule_of_one_family() {
    let mut rule = bare(Verdict::Deny);
    rule.source.not_nets = vec!["10.0.0.0/8".parse().unwrap(), "::/0".parse().unwrap()];
    assert_eq!(render(&rule, Family::V4).0.len(), 2);
    assert_eq!(render(&rule, Family::V6), (Vec::new(), Vec::new()));
    rule.source.not_nets.pop();
    assert_eq!(render(&rule, Family::V6), (Vec::new(), Vec::new()));
}

/// A rule that the kernel refuses would cost the whole batch of the table.
#[test]
fn x_04_an_icmp_type_that_the_family_does_not_have_costs_its_rule_only() {
    for (protocol, possible) in [
        (named("icmp"), Some(Family::V4)),
        (named("icmpv6"), Some(Family::V6)),
        (Some(Protocol::Number(1)), Some(Family::V4)),
        (Some(Protocol::Number(58)), Some(Family::V6)),
        (named("tcp"), None),
        (Some(Protocol::Number(17)), None),
        (None, None),
    ] {
        let mut rule = bare(Verdict::Allow);
        (rule.protocol, rule.icmp) = (protocol, ping(8));
        for family in Family::BOTH {
            let (rules, _) = render(&rule, family);
            assert_eq!(!rules.is_empty(), possible == Some(family), "{:?} in {family}", rule.protocol);
        }
    }
}

#[test]
fn x_09_a_pass_of_an_earlier_tier_or_profile_does_not_end_a_profile() {
    let options = Options::default();
    let name: Name = "p".into();
    let rules = [bare(Verdict::Allow), bare(Verdict::Pass), bare(Verdict::Pass), bare(Verdict::Deny)];
    let set_name = &|_: &SetId, _| None;
    let (family, table, direction) = (Family::V4, Table::Filter, Direction::Ingress);
    let clears = |owner| {
        let context = Context { options: &options, owner, direction, family, table, set_name };
        let chain = chain(&context, &rules, &mut Vec::new());
        let pass = Some(Action::ClearMark(options.marks.pass));
        chain.rules.iter().positions_of(|rule| rule.action == pass)
    };
    // Right before the first pass rule; the second finds the bit clear.
    assert_eq!(clears(Owner::Profile { name: &name }), [2]);
    let key = PolicyKey { kind: PolicyKind::GlobalNetworkPolicy, namespace: "".into(), name: "p".into() };
    // A tier clears the bit before its policies.
    assert_eq!(clears(Owner::Policy { key: &key, tier: "default", untracked: false }), [0_usize; 0]);
}

#[test]
fn reject_is_used_in_the_filter_table_only() {
    let options = Options { filter_deny: crate::options::DenyAction::Reject, ..Options::default() };
    let name: Name = "p".into();
    let set_name = &|_: &SetId, _| None;
    for (table, expected) in
        [(Table::Filter, Action::Reject), (Table::Raw, Action::Drop), (Table::Mangle, Action::Drop)]
    {
        let owner = Owner::Profile { name: &name };
        let (family, direction) = (Family::V4, Direction::Ingress);
        let context = Context { options: &options, owner, direction, family, table, set_name };
        let rules = super::rule(&context, &bare(Verdict::Deny), &mut Vec::new());
        assert_eq!(rules.last().and_then(|rule| rule.action.clone()), Some(expected), "{table:?}");
    }
}

trait PositionsOf: Iterator + Sized {
    fn positions_of(self, wanted: impl Fn(Self::Item) -> bool) -> Vec<usize> {
        self.enumerate().filter_map(|(index, item)| wanted(item).then_some(index)).collect()
    }
}

impl<I: Iterator> PositionsOf for I {}
