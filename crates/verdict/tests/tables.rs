//! The tables and examples of policy.md, row by row.

#![allow(clippy::unwrap_used, clippy::panic, reason = "helper functions of tests fail the test that uses them")]

use model::{Family, IcmpMatch, Protocol, Rule, Update, WorkloadEndpointKey};
use testkit::build::{network_set, policy, profile_labels, profile_rules, rule, tier, wep, wep_key};
use verdict::{
    Connection, Direction, EndpointKey, Facts, Judge, List, ObjectKey, Outcome, Packet, Reason, Settings, Trace,
    Verdict,
};

const ME: &str = "h1/k8s/ns/me/eth0";

fn facts(updates: impl IntoIterator<Item = Update>) -> Facts {
    let mut facts = Facts::new();
    updates.into_iter().for_each(|update| facts.put(update));
    facts
}

fn me() -> WorkloadEndpointKey {
    wep_key(ME)
}

/// A workload that takes part in everything, at 10.0.0.1 and fd00::1.
fn endpoint() -> testkit::build::WepBuilder {
    wep(ME).ip("10.0.0.1").ip("fd00::1").interface("cali1")
}

fn judge(facts: &Facts, direction: Direction, packet: &Packet) -> Verdict {
    let settings = Settings::default();
    let judge = Judge::new(facts, &settings).trace(Trace::On);
    judge.judge(&EndpointKey::Workload(me()), List::Normal, direction, packet).expect("the endpoint is there")
}

fn packet(from: &str, to: &str, protocol: u8) -> Packet {
    Packet::new(from.parse().unwrap(), to.parse().unwrap(), protocol)
}

fn tcp(port: u16) -> Packet {
    packet("10.0.0.9", "10.0.0.1", 6).with_ports(40_000, port)
}

/// What decides about a packet from 10.0.0.9 or fd00::9 if there is one more rule than nothing.
fn matches(rule: Rule, others: &[Update], packet: &Packet) -> bool {
    let decides = policy("gnp/p").with(|policy| policy.inbound = vec![rule]).build();
    let facts = facts([endpoint().build(), decides].into_iter().chain(others.iter().cloned()));
    matches!(judge(&facts, Direction::Ingress, packet).reason, Reason::Rule { .. })
}

/// Names of policies in the order in which they are looked at, from the rules that do not match.
fn order_of(facts: &Facts) -> Vec<String> {
    let steps = judge(facts, Direction::Ingress, &tcp(1)).steps;
    let line = |step: &verdict::Step| {
        if let verdict::Step::NotMatched { rule, .. } = step { Some(rule.to_string()) } else { None }
    };
    let policy = |line: String| line.split_whitespace().nth(5).map(str::to_owned);
    steps.iter().filter_map(line).filter_map(policy).collect()
}

#[test]
fn t_5_policies_are_looked_at_by_order_and_then_by_text() {
    let with =
        |key: &str, order: Option<f64>| policy(key).ingress("allow udp").with(|policy| policy.order = order).build();
    for (policies, wanted) in [
        (vec![("gnp/a", None), ("np/x/a", None)], vec!["gnp/a", "np/x/a"]),
        (vec![("np/ns1/b", None), ("np/ns2/a", None)], vec!["np/ns2/a", "np/ns1/b"]),
        (vec![("gnp/a", None), ("gnp/a-b", None), ("gnp/a.b", None)], vec!["gnp/a-b", "gnp/a.b", "gnp/a"]),
        (vec![("gnp/a", None), ("gnp/a1", None)], vec!["gnp/a", "gnp/a1"]),
        (
            vec![("gnp/a", Some(10.0)), ("gnp/b", None), ("gnp/c", Some(-1.0)), ("gnp/d", Some(10.5))],
            vec!["gnp/c", "gnp/a", "gnp/d", "gnp/b"],
        ),
        (vec![("gnp/b", Some(0.0)), ("gnp/a", Some(-0.0))], vec!["gnp/a", "gnp/b"]),
    ] {
        let policies = policies.iter().map(|(key, order)| with(key, *order));
        assert_eq!(order_of(&facts(policies.chain([endpoint().build()]))), wanted);
    }
}

#[test]
fn t_2_to_t_4_tiers_are_looked_at_by_order_then_name_and_missing_ones_last() {
    let of = |name: &str, tier: &str| policy(name).tier(tier).ingress("allow udp").build();
    let facts = facts([
        endpoint().build(),
        of("gnp/1", "missing-b"),
        of("gnp/2", "missing-a"),
        of("gnp/3", "none"),
        of("gnp/4", "late"),
        of("gnp/5", "early"),
        of("gnp/6", "also-early"),
        tier("none", None, true),
        tier("late", Some(2.5), true),
        tier("early", Some(-7.0), true),
        tier("also-early", Some(-7.0), true),
    ]);
    // The first missing tier denies, so that the second is never asked.
    assert_eq!(order_of(&facts), ["gnp/6", "gnp/5", "gnp/4", "gnp/3", "gnp/2"]);
    let verdict = judge(&facts, Direction::Ingress, &tcp(1));
    assert_eq!(verdict.reason, Reason::EndOfTier { tier: "missing-a".into(), is_missing: true });
}

#[test]
fn t_25_worked_decisions() {
    let sec = |key: &str| policy(key).tier("sec");
    let web = || policy("gnp/web").ingress("allow tcp to-ports 80").build();
    let allow_all = || profile_rules("open", &["allow"], &["allow"]);
    let udp = packet("10.0.0.9", "10.0.0.1", 17).with_ports(1, 53);
    let end = |tier: &str| Reason::EndOfTier { tier: tier.into(), is_missing: false };
    let allowed = |verdict: &Verdict| verdict.outcome == Outcome::Allow;
    let by_profile = |verdict: &Verdict| verdict.to_string().contains("ingress rule 0 of profile open");

    let judge_with = |policies: Vec<Update>, profile: bool, packet: &Packet| {
        let me = if profile { endpoint().profile("open") } else { endpoint() };
        let common = [tier("sec", Some(100.0), false), tier("default", None, false), allow_all(), me.build()];
        judge(&facts(common.into_iter().chain(policies)), Direction::Ingress, packet)
    };
    let pass_all = || sec("gnp/pass").ingress("pass").build();
    let pass_tcp = || sec("gnp/pass").ingress("pass tcp").build();

    assert!(allowed(&judge_with(vec![pass_all(), web()], true, &tcp(80))));
    assert_eq!(judge_with(vec![pass_all(), web()], true, &tcp(81)).reason, end("default"));
    assert_eq!(judge_with(vec![pass_tcp()], true, &udp).reason, end("sec"));
    assert!(by_profile(&judge_with(vec![pass_tcp()], true, &tcp(80))));
    assert!(by_profile(&judge_with(vec![], true, &udp)));
    assert_eq!(judge_with(vec![], false, &udp).reason, Reason::NothingAllowed);
    assert!(by_profile(&judge_with(vec![sec("sgnp/staged").ingress("deny").build()], true, &udp)));
    let egress_only = sec("gnp/out").with(|policy| policy.ingress = false).ingress("deny").build();
    assert!(by_profile(&judge_with(vec![egress_only], true, &udp)));
    let empty = sec("gnp/empty").with(|policy| policy.egress = false).build();
    let all = policy("gnp/all").ingress("allow").build();
    assert_eq!(judge_with(vec![empty, all], true, &udp).reason, end("sec"));
}

#[test]
fn r_9_a_rule_has_a_form_of_its_own_in_each_family() {
    let own = network_set("own", "role=s", &["fd00::9/128", "10.0.0.9/32"]);
    let numbered = |protocol| Rule { protocol: Some(Protocol::Number(protocol)), ..rule("allow") };
    // Validation ties a rule with a type to the family of its protocol.
    let echo = Rule { family: Some(Family::V6), icmp: Some(IcmpMatch { kind: 128, code: None }), ..numbered(58) };
    let plain =
        |protocol| [("10.0.0.9", "10.0.0.1"), ("fd00::9", "fd00::1")].map(|(from, to)| packet(from, to, protocol));
    for (text, given, protocol, wanted) in [
        ("no match", rule("allow"), 47, [true, true]),
        ("IPv4 net", rule("allow from-nets 10.0.0.0/8"), 47, [true, false]),
        ("both nets", rule("allow from-nets 10.0.0.0/8,fd00::/8"), 47, [true, true]),
        ("other IPv4 net", rule("allow from-nets 10.1.0.0/16,fd00::/8"), 47, [false, true]),
        ("nets of sides", rule("allow from-nets 10.0.0.0/8,fd00::/8 to-nets 10.0.0.0/24"), 47, [true, false]),
        ("excluded other", rule("deny from-not-nets 10.9.0.0/16"), 47, [true, false]),
        ("excluded own", rule("deny from-not-nets 10.0.0.0/8"), 47, [false, false]),
        ("excluded all", rule("deny from-not-nets 10.9.0.0/16,::/0"), 47, [true, false]),
        ("icmp by name", rule("allow icmp"), 1, [true, false]),
        ("icmp by number", numbered(1), 1, [true, true]),
        ("icmpv6 type", echo, 58, [false, true]),
        ("selector, IPv6", rule("deny v6 from role == 's'"), 47, [false, true]),
    ] {
        let with_type = plain(protocol).map(|packet| if protocol == 58 { packet.with_icmp(128, 0) } else { packet });
        let got = with_type.map(|packet| matches(given.clone(), std::slice::from_ref(&own), &packet));
        assert_eq!(got, wanted, "{text}");
    }
}

/// Known addresses: 10.0.0.9 is P, .10 is P and N, .11 is N, .12 is nobody's. All have port http at tcp/8080.
#[test]
fn r_18_selectors_and_ports_of_one_side() {
    let object = |n: u8, labels: &str| {
        let mut object = wep(&format!("h2/k8s/ns/w{n}/e")).ip(&format!("10.0.0.{n}")).port("http/tcp/8080");
        for label in labels.split_whitespace() {
            object = object.label(label);
        }
        object.build()
    };
    let objects = [object(9, "p"), object(10, "p n"), object(11, "n")];
    // For the sources .9, .10, .11, .12: which of the ports 80 and 8080 match.
    let (none, first, second, both) = ("", "80", "8080", "80 8080");
    for (text, wanted) in [
        ("", [both, both, both, both]),
        ("from has(p)", [both, both, none, none]),
        ("from has(p) from-ports 80", [first, first, none, none]),
        ("from has(p) from-ports http", [second, second, none, none]),
        ("from has(p) from-ports 80,http", [both, both, none, none]),
        ("from-ports http", [second, second, second, none]),
        ("from-not has(n)", [both, none, none, both]),
        ("from-not has(n) from-ports http", [second, none, none, none]),
        ("from has(p) from-not has(n)", [both, none, none, none]),
        ("from has(p) from-not has(n) from-ports http", [second, none, none, none]),
        ("from has(p) from-not-ports http", [first, first, none, none]),
        ("from-not-ports http", [first, first, first, both]),
    ] {
        let got = [9, 10, 11, 12].map(|n| {
            let at = |port| packet(&format!("10.0.0.{n}"), "10.0.0.1", 6).with_ports(port, 1);
            let ports =
                [80, 8080].into_iter().filter(|port| matches(rule(&format!("allow tcp {text}")), &objects, &at(*port)));
            ports.map(|port: u16| port.to_string()).collect::<Vec<_>>().join(" ")
        });
        assert_eq!(got, wanted, "{text}");
    }
}

#[test]
fn r_4_other_protocols_are_never_in_a_set_of_ports() {
    let objects = [wep("h2/k8s/ns/w/e").ip("10.0.0.9").port("http/tcp/80").build()];
    let gre = packet("10.0.0.9", "10.0.0.1", 47);
    assert!(!matches(rule("allow from-ports http"), &objects, &gre));
    assert!(matches(rule("allow from-not-ports http"), &objects, &gre));
}

#[test]
fn r_7_a_pass_ends_its_profile_and_no_other() {
    let facts = facts([
        endpoint().profile("first").profile("second").build(),
        profile_rules("first", &["pass"], &[]),
        profile_rules("second", &["pass from-nets 192.0.2.1/32", "allow"], &[]),
    ]);
    let verdict = judge(&facts, Direction::Ingress, &tcp(1));
    assert!(verdict.to_string().starts_with(
        "workload endpoint h1/k8s/ns/me/eth0, normal ingress: allow, by ingress rule 1 of profile second"
    ));
}

#[test]
fn r_9_x_2_an_excluded_net_of_one_family_lets_the_other_through_and_says_so() {
    let facts =
        facts([endpoint().build(), policy("gnp/p").ingress("deny from-not-nets 10.0.0.0/8").ingress("allow").build()]);
    let verdict = judge(&facts, Direction::Ingress, &packet("fd00::9", "fd00::1", 47));
    assert_eq!(verdict.outcome, Outcome::Allow);
    assert_eq!(
        verdict.to_string(),
        "workload endpoint h1/k8s/ns/me/eth0, normal ingress: allow, by ingress rule 1 of policy gnp/p in tier default\n  \
         tier default, which does not exist\n  \
         ingress rule 0 of policy gnp/p in tier default does not match: it does not exist for IPv6: no excluded \
         network of its source is of that family"
    );
}

#[test]
fn b_7_labels_are_inherited_from_the_first_profile_that_has_them() {
    let given = |profiles: [&str; 2], with_p: bool| {
        let mut me = wep("h1/k8s/ns/me/eth0").ip("10.0.0.1").label("role=web").label("color=blue");
        for profile in profiles {
            me = me.profile(profile);
        }
        let p = with_p.then(|| profile_labels("P", "color=red,zone=1,size=big"));
        facts(p.into_iter().chain([me.build(), profile_labels("Q", "zone=2,tier=gold")]))
    };
    // A policy that applies is one whose tier ends.
    let has = |facts: &Facts, selector: &str| {
        let mut facts = facts.clone();
        facts.put(policy("gnp/p").selector(selector).build());
        matches!(judge(&facts, Direction::Ingress, &tcp(1)).reason, Reason::EndOfTier { .. })
    };
    for (facts, selectors) in [
        (given(["P", "Q"], true), ["role == 'web'", "color == 'blue'", "zone == '1'", "tier == 'gold'", "!has(env)"]),
        (given(["Q", "P"], true), ["role == 'web'", "color == 'blue'", "zone == '2'", "size == 'big'", "!has(env)"]),
        (given(["P", "Q"], false), ["role == 'web'", "color == 'blue'", "zone == '2'", "!has(size)", "!has(env)"]),
    ] {
        for selector in selectors {
            assert!(has(&facts, selector), "{selector}");
        }
    }
}

#[test]
fn m_22_named_ports_of_an_endpoint() {
    let mut object = wep("h2/k8s/ns/w/e").ip("10.0.0.9").ip("fd00::9");
    for port in ["http/tcp/80", "http/tcp/8080", "dns/udp/53", "dns/tcp/53"] {
        object = object.port(port);
    }
    let objects = [object.build()];
    for (protocol, name, wanted) in [
        ("tcp", "http", vec![(6, 80), (6, 8080)]),
        ("udp", "dns", vec![(17, 53)]),
        ("", "dns", vec![(6, 53), (17, 53)]),
        ("udp", "http", vec![]),
    ] {
        let given = rule(&format!("allow {protocol} from-ports {name}"));
        for (from, to) in [("10.0.0.9", "10.0.0.1"), ("fd00::9", "fd00::1")] {
            let mut got = Vec::new();
            for protocol in [6, 17] {
                let at = |port| packet(from, to, protocol).with_ports(port, 1);
                let ports = [53, 80, 8080].into_iter().filter(|port| matches(given.clone(), &objects, &at(*port)));
                got.extend(ports.map(|port| (protocol, port)));
            }
            assert_eq!(got, wanted, "{protocol} {name} from {from}");
        }
    }
}

#[test]
fn section_8_one_security_group() {
    let group = "has(sg.projectcalico.org/openstack-5c2fe04e-1b8f-4c5f-93ab-0d7c8d1f3a21)";
    let label = &group[4..group.len() - 1];
    let port = |host: &str, vm: &str, ip: &str| {
        let wep = wep(&format!("{host}/openstack/openstack/{vm}/eth0")).ip(ip).interface("cali1");
        wep.label(label).label("projectcalico.org/namespace=openstack").build()
    };
    let members = format!("(projectcalico.org/namespace == 'openstack') && ({group})");
    let mut facts = facts([
        port("h1", "local", "10.65.0.5"),
        port("h2", "remote", "10.65.0.9"),
        policy("np/openstack/ossg.default.5c2fe04e")
            .selector(&format!("({group}) && projectcalico.org/namespace == 'openstack'"))
            .ingress(&format!("allow v4 from {members}"))
            .ingress(&format!("allow v6 from {members}"))
            .ingress("allow v4 tcp from-nets 203.0.113.0/24 to-ports 22")
            .ingress("allow v4 udp to-ports 6000:6100")
            .ingress("allow icmp icmp-type 8,0 from-nets 0.0.0.0/0")
            .egress("allow v4")
            .egress("allow v6")
            .build(),
    ]);
    let settings = Settings::default();
    let ingress = |facts: &Facts, packet: &Packet| {
        let key = EndpointKey::Workload(wep_key("h1/openstack/openstack/local/eth0"));
        Judge::new(facts, &settings).judge(&key, List::Normal, Direction::Ingress, packet).unwrap()
    };
    let from = |ip: &str, protocol| packet(ip, "10.65.0.5", protocol);
    for (packet, wanted) in [
        (from("10.65.0.9", 6).with_ports(1, 2), Outcome::Allow),
        (from("10.65.0.8", 6).with_ports(1, 2), Outcome::Deny),
        (from("203.0.113.7", 6).with_ports(1, 22), Outcome::Allow),
        (from("203.0.113.7", 6).with_ports(1, 23), Outcome::Deny),
        (from("203.0.114.7", 6).with_ports(1, 22), Outcome::Deny),
        (from("8.8.8.8", 17).with_ports(1, 6000), Outcome::Allow),
        (from("8.8.8.8", 17).with_ports(1, 6100), Outcome::Allow),
        (from("8.8.8.8", 17).with_ports(1, 6101), Outcome::Deny),
        (from("8.8.8.8", 1).with_icmp(8, 0), Outcome::Allow),
        (from("8.8.8.8", 1).with_icmp(8, 1), Outcome::Deny),
        (from("8.8.8.8", 1).with_icmp(0, 0), Outcome::Deny),
    ] {
        assert_eq!(ingress(&facts, &packet).outcome, wanted, "{packet}");
    }

    let peer = from("10.65.0.9", 6).with_ports(1, 2);
    let Reason::Rule { contributions, .. } = ingress(&facts, &peer).reason else { panic!("no rule") };
    let remote = ObjectKey::Workload(wep_key("h2/openstack/openstack/remote/eth0"));
    assert_eq!(contributions.iter().map(|one| &one.object).collect::<Vec<_>>(), [&remote]);

    // The remote endpoint goes away: the tier, which does not exist, ends with a deny.
    facts.put(Update::WorkloadEndpoint(wep_key("h2/openstack/openstack/remote/eth0"), None));
    assert_eq!(ingress(&facts, &peer).reason, Reason::EndOfTier { tier: "default".into(), is_missing: true });
}

#[test]
fn a_6_x_13_a_missing_profile_denies_where_it_stands_and_is_named() {
    let given = |updates: Vec<Update>| {
        let me = endpoint().profile("first").profile("gone").build();
        judge(&facts(updates.into_iter().chain([me])), Direction::Ingress, &tcp(80))
    };
    let verdict = given(vec![profile_rules("first", &["allow tcp to-ports 81"], &[])]);
    assert_eq!(verdict.reason, Reason::MissingProfile("gone".into()));
    let verdict = given(vec![profile_rules("first", &["allow tcp to-ports 80"], &[])]);
    assert_eq!(verdict.outcome, Outcome::Allow);
}

#[test]
fn t_18_t_19_t_22_what_comes_before_the_tiers() {
    let open = || endpoint().profile(model::profile::DEFAULT_ALLOW);
    let off = || open().with(|wep| wep.active = false);
    let vxlan = packet("10.0.0.1", "10.0.0.9", 17).with_ports(1, 4789);
    let ipip = packet("10.0.0.1", "10.0.0.9", 4);
    let other = packet("10.0.0.1", "10.0.0.9", 6).with_ports(1, 2);
    let (ingress, egress) = (Direction::Ingress, Direction::Egress);
    for (me, direction, packet, wanted) in [
        (open(), egress, other, "allow"),
        (open(), egress, vxlan, "VXLAN"),
        (open(), ingress, vxlan, "allow"),
        (open(), egress, ipip, "IP-in-IP"),
        (open(), ingress, ipip, "allow"),
        (endpoint(), egress, vxlan.of(Connection::Established), "allow, because its connection"),
        (endpoint(), egress, other.of(Connection::Related), "allow, because its connection"),
        (open(), egress, other.of(Connection::Invalid), "no valid connection"),
        (off(), ingress, other, "switched off"),
        (off(), ingress, other.of(Connection::Established), "switched off"),
    ] {
        let verdict = judge(&facts([me.build()]), direction, &packet).to_string();
        assert!(verdict.contains(wanted), "{wanted}: {verdict}");
    }
}

#[test]
fn t_23_traffic_between_two_workloads_is_judged_twice() {
    let end = |n: u8, interface: &str| {
        let wep = wep(&format!("h1/k8s/ns/w{n}/e")).ip(&format!("10.0.0.{n}")).interface(interface);
        wep.profile(&format!("p{n}")).build()
    };
    let packet = packet("10.0.0.1", "10.0.0.2", 47);
    let settings = Settings::default();
    for (sends, receives, outcome, asked) in [
        ("allow", "allow", Outcome::Allow, 2),
        ("allow", "deny", Outcome::Deny, 2),
        ("deny", "allow", Outcome::Deny, 1),
    ] {
        let facts = facts([
            end(1, "cali1"),
            end(2, "cali2"),
            profile_rules("p1", &["deny"], &[sends]),
            profile_rules("p2", &[receives], &["deny"]),
        ]);
        let judge = Judge::new(&facts, &settings);
        let forwarded = judge.judge_forwarded("h1", "cali1", "cali2", &packet);
        assert_eq!((forwarded.outcome, forwarded.verdicts.len()), (outcome, asked), "{forwarded}");
        // Past the host's own interfaces nobody is asked.
        assert_eq!(judge.judge_forwarded("h1", "eth0", "eth1", &packet).outcome, Outcome::NoVerdict);
    }
}
