//! Whatever a policy says, its record says the same.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use model::{Action, EntityMatch, Family, IcmpMatch, Port, PortRange, Protocol, ServiceRef};
use proptest::option::of;
use proptest::prelude::*;

use super::*;

fn any_name() -> impl Strategy<Value = Name> {
    prop::sample::select(vec!["", "a", "http", "tcp", "default", "größer", "openstack"]).prop_map(Name::from)
}

fn any_selector() -> impl Strategy<Value = Arc<Selector>> {
    prop::sample::select(vec!["", "has(a)", "a == 'x'", "!(!has(a))", "a in {'x', 'y'} || b != 'z'", "!has(a)"])
        .prop_map(|text| Arc::new(Selector::parse(text).unwrap()))
}

fn any_nets() -> impl Strategy<Value = Vec<IpNet>> {
    let net = prop_oneof![
        (any::<[u8; 4]>(), 0..=32u8).prop_map(|(address, length)| IpNet::new(IpAddr::from(address), length).unwrap()),
        (any::<[u8; 16]>(), 0..=128u8).prop_map(|(address, length)| IpNet::new(IpAddr::from(address), length).unwrap()),
    ];
    prop_oneof![3 => Just(Vec::new()), 1 => prop::collection::vec(net, 0..4)]
}

fn any_ports() -> impl Strategy<Value = Vec<Port>> {
    let port = prop_oneof![
        any::<u16>().prop_map(|port| Port::Range(PortRange::single(port))),
        any::<(u16, u16)>().prop_map(|(first, last)| Port::Range(PortRange { first, last })),
        any_name().prop_map(Port::Named),
    ];
    prop_oneof![3 => Just(Vec::new()), 1 => prop::collection::vec(port, 0..20)]
}

fn any_entity() -> impl Strategy<Value = EntityMatch> {
    let service = of((any_name(), any_name()).prop_map(|(namespace, name)| ServiceRef { namespace, name }));
    let entity = (any_nets(), any_nets(), of(any_selector()), of(any_selector()), any_ports(), any_ports(), service)
        .prop_map(|(nets, not_nets, selector, not_selector, ports, not_ports, service)| EntityMatch {
            nets,
            not_nets,
            selector,
            not_selector,
            ports,
            not_ports,
            service,
        });
    prop_oneof![1 => Just(EntityMatch::default()), 3 => entity]
}

fn any_protocol() -> impl Strategy<Value = Option<Protocol>> {
    of(prop_oneof![any::<u8>().prop_map(Protocol::Number), any_name().prop_map(Protocol::Name)])
}

fn any_icmp() -> impl Strategy<Value = Option<IcmpMatch>> {
    of((any::<u8>(), of(any::<u8>())).prop_map(|(kind, code)| IcmpMatch { kind, code }))
}

fn any_rules() -> impl Strategy<Value = Vec<Rule>> {
    let action = prop::sample::select(vec![Action::Allow, Action::Deny, Action::Log, Action::Pass]);
    let family = prop::sample::select(vec![None, Some(Family::V4), Some(Family::V6)]);
    let matches = (any_protocol(), any_protocol(), any_icmp(), any_icmp(), any_entity(), any_entity());
    let annotations = prop::collection::btree_map("[a-z]{0,3}", "\\PC{0,5}", 0..3);
    let rule = (action, family, matches, any::<bool>(), annotations).prop_map(
        |(action, family, matches, has_http, annotations)| {
            let (protocol, not_protocol, icmp, not_icmp, source, destination) = matches;
            Rule { action, family, protocol, not_protocol, icmp, not_icmp, source, destination, has_http, annotations }
        },
    );
    prop::collection::vec(rule, 0..4)
}

fn any_policy() -> impl Strategy<Value = Policy> {
    let order = prop::sample::select(vec![None, Some(0.0), Some(-0.0), Some(10.5), Some(f64::MAX), Some(-1e-300)]);
    let own_text = of(prop::sample::select(vec!["", "all()", "has(a)", "what does not parse (", "ä"]));
    (any_name(), order, any_selector(), own_text, any::<[bool; 6]>(), any_rules(), any_rules()).prop_map(
        |(tier, order, selector, own_text, flags, inbound, outbound)| {
            let [ingress, egress, do_not_track, pre_dnat, apply_on_forward, always_needed] = flags;
            Policy {
                tier,
                order,
                original_selector: own_text.map_or_else(|| selector.canonical().into(), Name::from),
                selector,
                ingress,
                egress,
                do_not_track,
                pre_dnat,
                apply_on_forward,
                always_needed,
                inbound,
                outbound,
            }
        },
    )
}

/// Reads everything back.
fn read(records: &Records, names: &Names, record: u32) -> Policy {
    let Outline { tier, order, original_selector, ingress, egress, do_not_track, pre_dnat, apply_on_forward } =
        records.outline(names, record, None).unwrap();
    let (inbound, outbound) = records.policy_rules(names, record);
    Policy {
        tier,
        order,
        selector: Arc::clone(records.selector(record).unwrap()),
        original_selector,
        ingress,
        egress,
        do_not_track,
        pre_dnat,
        apply_on_forward,
        always_needed: records.is_always_needed(record),
        inbound,
        outbound,
    }
}

/// The laws of references and endpoints, on values.
fn same_program(a: &Policy, b: &Policy) -> bool {
    a.tier == b.tier
        && a.inbound == b.inbound
        && a.outbound == b.outbound
        && a.do_not_track == b.do_not_track
        && a.pre_dnat == b.pre_dnat
        && a.original_selector == b.original_selector
        && a.always_needed == b.always_needed
}

fn same_outline(a: &Policy, b: &Policy) -> bool {
    let flags = |p: &Policy| (p.ingress, p.egress, p.do_not_track, p.pre_dnat, p.apply_on_forward);
    a.tier == b.tier
        && a.order.map(f64::to_bits) == b.order.map(f64::to_bits)
        && a.selector == b.selector
        && a.original_selector == b.original_selector
        && flags(a) == flags(b)
}

fn same(a: &Policy, b: &Policy) -> bool {
    a == b && a.order.map(f64::to_bits) == b.order.map(f64::to_bits)
}

/// Changes one thing of a policy.
fn altered(policy: &Policy, what: u8, other: &Policy) -> Policy {
    let mut new = policy.clone();
    match what {
        0 => new.tier = Name::clone(&other.tier),
        1 => new.order = other.order,
        2 => new.selector = Arc::clone(&other.selector),
        3 => new.original_selector = Name::clone(&other.original_selector),
        4 => new.ingress = !new.ingress,
        5 => new.egress = !new.egress,
        6 => new.do_not_track = !new.do_not_track,
        7 => new.pre_dnat = !new.pre_dnat,
        8 => new.apply_on_forward = !new.apply_on_forward,
        9 => new.always_needed = !new.always_needed,
        10 => new.inbound = other.inbound.clone(),
        11 => new.outbound = other.outbound.clone(),
        12 => std::mem::swap(&mut new.inbound, &mut new.outbound),
        _ => new = other.clone(),
    }
    new
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(1_000) })]

    #[test]
    fn every_field_of_a_policy_survives_and_equality_is_that_of_records(
        a in any_policy(), other in any_policy(), what in 0..14u8,
    ) {
        let b = altered(&a, what, &other);
        let (mut names, mut records) = (Names::default(), Records::default());
        let noise = records.store_policy(&mut names, &other);
        let stored = [&a, &b].map(|policy| records.store_policy(&mut names, policy));
        let [of_a, of_b] = stored;
        for (record, policy) in stored.into_iter().zip([&a, &b]) {
            prop_assert!(same(&read(&records, &names, record), policy), "{policy:?}");
            let like = records.outline(&names, of_a, None).unwrap();
            let shared = records.outline(&names, record, Some((of_a, &like)));
            prop_assert_eq!(shared, records.outline(&names, record, None));
        }
        prop_assert_eq!(records.are_equal(of_a, of_b), same(&a, &b));
        prop_assert_eq!(records.have_equal_programs(of_a, of_b), same_program(&a, &b));
        prop_assert_eq!(records.have_equal_outlines(of_a, of_b), same_outline(&a, &b));
        records.discard_policy(&mut names, noise);
        records.discard_policy(&mut names, of_b);
        prop_assert!(same(&read(&records, &names, of_a), &a));
        records.discard_policy(&mut names, of_a);
        prop_assert!(records.is_empty() && names.is_empty());
    }

    #[test]
    fn rules_of_profiles_survive_too(
        a in (any_rules(), any_rules()), b in (any_rules(), any_rules()), equal in any::<bool>(),
    ) {
        let rules = |(inbound, outbound)| ProfileRules { inbound, outbound };
        let (a, b) = (rules(a), rules(b));
        let b = if equal { a.clone() } else { b };
        let (mut names, mut records) = (Names::default(), Records::default());
        let [of_a, of_b] = [&a, &b].map(|rules| records.store_rules(&mut names, rules));
        prop_assert_eq!(&records.profile_rules(&names, of_a), &a);
        prop_assert_eq!(records.are_equal(of_a, of_b), a == b);
        records.discard_rules(&mut names, of_a);
        prop_assert_eq!(&records.profile_rules(&names, of_b), &b);
        records.discard_rules(&mut names, of_b);
        prop_assert!(records.is_empty() && names.is_empty());
    }
}

#[test]
fn selectors_of_all_records_are_one_pool() {
    let (mut names, mut records) = (Names::default(), Records::default());
    let allow_from = |text: &str| testkit::build::rule(&format!("allow from {text}"));
    for n in 0..100 {
        let selector = format!("has(a{})", n % 3);
        let mut policy = testkit::build::policy("gnp/p").selector(&selector).value().1.as_ref().clone();
        policy.inbound = vec![allow_from("has(a0)"), allow_from("has(a1)"), allow_from(&selector)];
        let record = records.store_policy(&mut names, &policy);
        assert!(records.bytes.get(record).len() < 32, "{:?}", records.bytes.get(record));
    }
    assert_eq!(records.selectors.len(), 3);
}

#[test]
fn a_policy_with_thousands_of_selectors_is_stored() {
    let (mut names, mut records) = (Names::default(), Records::default());
    let mut policy = testkit::build::policy("gnp/p").value().1.as_ref().clone();
    policy.inbound = (0..3_000).map(|n| testkit::build::rule(&format!("allow from has(a{n})"))).collect();
    policy.inbound.push(Rule {
        annotations: BTreeMap::from([("k".repeat(300), "v".repeat(70_000))]),
        ..policy.inbound[0].clone()
    });
    let record = records.store_policy(&mut names, &policy);
    assert_eq!(read(&records, &names, record), policy);
    records.discard_policy(&mut names, record);
    assert!(records.is_empty() && names.is_empty());
}
