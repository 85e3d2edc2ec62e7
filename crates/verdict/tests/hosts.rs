//! The four lists of host endpoints (policy.md T-9 to T-11, T-16, T-17, T-21, T-24).

#![allow(clippy::unwrap_used, reason = "helper functions of tests fail the test that uses them")]

use model::{Policy, Update};
use testkit::build::{PolicyBuilder, hep, policy, tier, wep};
use verdict::{Direction, EndpointKey, Facts, Failsafe, Judge, List, Outcome, Packet, Reason, Settings};

const LISTS: [List; 4] = [List::Normal, List::Forward, List::Untracked, List::PreDnat];

fn facts(updates: impl IntoIterator<Item = Update>) -> Facts {
    let mut facts = Facts::new();
    updates.into_iter().for_each(|update| facts.put(update));
    facts
}

fn packet() -> Packet {
    Packet::new([10, 0, 0, 9].into(), [10, 0, 0, 1].into(), 6).with_ports(40_000, 80)
}

fn outcome(facts: &Facts, list: List, direction: Direction) -> (Outcome, Reason) {
    let settings = Settings::default();
    let key = EndpointKey::Host("me".into());
    let verdict = Judge::new(facts, &settings).judge(&key, list, direction, &packet()).unwrap();
    (verdict.outcome, verdict.reason)
}

fn outcomes(facts: &Facts, direction: Direction) -> [Outcome; 4] {
    LISTS.map(|list| outcome(facts, list, direction).0)
}

fn denying(key: &str) -> PolicyBuilder {
    policy(key).tier("t").ingress("deny").egress("deny")
}

#[test]
fn t_9_the_flags_of_a_policy_say_in_which_lists_it_is() {
    use Outcome::{Allow, Deny, NoVerdict};
    type Change = fn(&mut Policy);
    let flags: [(Change, [Outcome; 4], [Outcome; 4]); 5] = [
        (|_| {}, [Deny, Allow, NoVerdict, NoVerdict], [Deny, Allow, NoVerdict, NoVerdict]),
        (
            |policy| policy.apply_on_forward = true,
            [Deny, Deny, NoVerdict, NoVerdict],
            [Deny, Deny, NoVerdict, NoVerdict],
        ),
        // Without a policy of the normal list, profiles decide, and there are none.
        (|policy| policy.pre_dnat = true, [Deny, Allow, NoVerdict, Deny], [Deny, Allow, NoVerdict, NoVerdict]),
        (|policy| policy.do_not_track = true, [Deny, Allow, Deny, NoVerdict], [Deny, Allow, Deny, NoVerdict]),
        // T-12: `doNotTrack` wins, and `applyOnForward` is not looked at.
        (
            |policy| (policy.do_not_track, policy.pre_dnat, policy.apply_on_forward) = (true, true, true),
            [Deny, Allow, Deny, NoVerdict],
            [Deny, Allow, Deny, NoVerdict],
        ),
    ];
    for (change, ingress, egress) in flags {
        let facts = facts([hep("me", "h1").build(), tier("t", None, false), denying("gnp/p").with(change).build()]);
        assert_eq!(outcomes(&facts, Direction::Ingress), ingress);
        assert_eq!(outcomes(&facts, Direction::Egress), egress);
    }
}

#[test]
fn t_10_t_13_only_normal_and_forward_lists_deny_at_the_end_of_a_tier() {
    type Change = fn(&mut Policy);
    let flags: [(Change, List, Outcome); 3] = [
        (|policy| policy.apply_on_forward = true, List::Forward, Outcome::Deny),
        (|policy| policy.do_not_track = true, List::Untracked, Outcome::NoVerdict),
        (|policy| policy.pre_dnat = true, List::PreDnat, Outcome::NoVerdict),
    ];
    for (change, list, wanted) in flags {
        let empty = policy("gnp/p").tier("t").with(change).build();
        let facts = facts([hep("me", "h1").build(), tier("t", None, false), empty]);
        assert_eq!(outcome(&facts, list, Direction::Ingress).0, wanted, "{list}");
    }
}

#[test]
fn t_17_forwarded_traffic_is_allowed_only_without_any_forward_tier() {
    let given =
        |policies: Vec<Update>| facts(policies.into_iter().chain([hep("me", "h1").build(), tier("t", None, true)]));
    let forward = |key: &str| policy(key).tier("t").with(|policy| policy.apply_on_forward = true);
    let ask = |facts: &Facts| outcome(facts, List::Forward, Direction::Ingress);

    assert_eq!(ask(&given(vec![])), (Outcome::Allow, Reason::NoForwardPolicy));
    // Policy for the other direction only, and policy that passes.
    let egress = forward("gnp/p").with(|policy| policy.ingress = false).egress("deny").build();
    assert_eq!(ask(&given(vec![egress])), (Outcome::NoVerdict, Reason::Undecided));
    assert_eq!(ask(&given(vec![forward("gnp/p").ingress("pass").build()])), (Outcome::NoVerdict, Reason::Undecided));
    // T-6: matched, but in no list.
    let neither = forward("gnp/p").with(|policy| (policy.ingress, policy.egress) = (false, false)).build();
    assert_eq!(ask(&given(vec![neither])), (Outcome::Allow, Reason::NoForwardPolicy));
}

#[test]
fn t_21_x_8_a_staged_policy_is_no_forward_policy() {
    let staged = policy("sgnp/p").tier("t").ingress("deny").with(|policy| policy.apply_on_forward = true).build();
    let facts = facts([hep("me", "h1").build(), tier("t", None, false), staged]);
    assert_eq!(outcome(&facts, List::Forward, Direction::Ingress), (Outcome::Allow, Reason::NoForwardPolicy));
}

#[test]
fn t_11_workloads_have_the_normal_list_only() {
    let open = |key: &str| policy(key).tier("t").ingress("allow");
    let me = wep("h1/k8s/ns/me/e").ip("10.0.0.1").interface("cali1");
    let (key, _) = me.clone().value();
    let facts = facts([
        me.build(),
        tier("t", None, false),
        open("gnp/untracked").with(|policy| policy.do_not_track = true).build(),
        open("gnp/nat").with(|policy| policy.pre_dnat = true).build(),
        open("gnp/forward").with(|policy| policy.apply_on_forward = true).build(),
    ]);
    let settings = Settings::default();
    let got = LISTS.map(|list| {
        let key = EndpointKey::Workload(key.clone());
        let verdict = Judge::new(&facts, &settings).judge(&key, list, Direction::Ingress, &packet()).unwrap();
        (verdict.outcome, verdict.to_string().contains("gnp/forward"))
    });
    let nothing = (Outcome::NoVerdict, false);
    assert_eq!(got, [(Outcome::Allow, true), nothing, nothing, nothing]);
}

#[test]
fn t_18_failsafe_ports_stay_open_except_for_forwarded_traffic() {
    let facts = facts([
        hep("me", "h1").build(),
        denying("gnp/a").build(),
        denying("gnp/b").with(|policy| policy.apply_on_forward = true).build(),
        denying("gnp/c").with(|policy| policy.do_not_track = true).build(),
        denying("gnp/d").with(|policy| policy.pre_dnat = true).build(),
    ]);
    let open = |port, net: Option<&str>| Failsafe { protocol: 6, port, net: net.map(|net| net.parse().unwrap()) };
    let inbound = |entry| Settings { failsafe_inbound: vec![entry], ..Settings::default() };
    let outbound = |entry| Settings { failsafe_outbound: vec![entry], ..Settings::default() };
    let key = EndpointKey::Host("me".into());
    for (settings, wanted) in [
        (inbound(open(80, None)), [true, false, true, true]),
        (inbound(open(80, Some("10.0.0.0/8"))), [true, false, true, true]),
        (inbound(open(80, Some("10.1.0.0/16"))), [false; 4]),
        (inbound(open(81, None)), [false; 4]),
        // An answer to a connection that the host made; nothing is tracked in the untracked list.
        (outbound(open(40_000, None)), [false, false, true, false]),
    ] {
        let judge = Judge::new(&facts, &settings);
        let got = LISTS.map(|list| {
            let verdict = judge.judge(&key, list, Direction::Ingress, &packet()).unwrap();
            matches!(verdict.reason, Reason::Failsafe(_))
        });
        assert_eq!(got, wanted, "{settings:?}");
    }
}

#[test]
fn an_interface_belongs_to_the_smallest_endpoint_that_names_it_or_expects_its_address() {
    let facts = facts([
        hep("a", "h1").interface("").ip("10.0.0.1").build(),
        hep("b", "h1").interface("eth1").ip("10.0.0.2").build(),
        hep("c", "h1").interface("eth1").build(),
        hep("d", "h1").interface("*").build(),
        hep("0", "h2").interface("eth1").build(),
    ]);
    for (interface, address, wanted) in [
        ("eth0", "10.0.0.1", "a"),
        ("eth1", "10.0.0.1", "a"),
        ("eth1", "10.0.0.9", "b"),
        // A host endpoint with a name never matches by address.
        ("eth2", "10.0.0.2", "d"),
    ] {
        let owner = facts.host_owner("h1", interface, &[address.parse().unwrap()]);
        assert_eq!(owner.map(AsRef::as_ref), Some(wanted), "{interface} {address}");
    }
    assert_eq!(facts.host_owner("h2", "eth0", &[]), None);
}

#[test]
fn t_24_the_endpoint_of_all_interfaces_has_no_untracked_list() {
    let deny = denying("gnp/c").with(|policy| policy.do_not_track = true).build();
    for (interface, wanted) in [("eth0", Outcome::Deny), ("*", Outcome::NoVerdict)] {
        let facts = facts([hep("me", "h1").interface(interface).build(), deny.clone()]);
        assert_eq!(outcome(&facts, List::Untracked, Direction::Ingress).0, wanted);
    }
}

#[test]
fn t_23_forwarded_traffic_meets_the_forward_lists_of_both_interfaces() {
    let forward = |key: &str, selector: &str| {
        policy(key).tier("t").selector(selector).with(|policy| policy.apply_on_forward = true)
    };
    let facts = facts([
        hep("in", "h1").interface("eth0").label("side=in").build(),
        hep("out", "h1").interface("eth1").label("side=out").build(),
        wep("h1/k8s/ns/w/e").ip("10.0.0.1").interface("cali1").profile(model::profile::DEFAULT_ALLOW).build(),
        tier("t", None, false),
        forward("gnp/in", "side == 'in'").ingress("allow tcp").build(),
        forward("gnp/out", "side == 'out'").with(|policy| policy.egress = false).ingress("allow").build(),
    ]);
    let settings = Settings::default();
    let udp = Packet { protocol: 17, ..packet() };
    for (from, to, packet, wanted, asked) in [
        ("eth0", "cali1", packet(), Outcome::Allow, 2),
        ("eth0", "cali1", udp, Outcome::Deny, 1),
        // The last that is asked leaves the packet to others (netfilter.md 14.3).
        ("cali1", "eth1", packet(), Outcome::NoVerdict, 2),
        ("cali1", "eth2", packet(), Outcome::Allow, 1),
        ("eth0", "eth1", packet(), Outcome::NoVerdict, 2),
    ] {
        let forwarded = Judge::new(&facts, &settings).judge_forwarded("h1", from, to, &packet);
        assert_eq!((forwarded.outcome, forwarded.verdicts.len()), (wanted, asked), "{forwarded}");
    }
}
