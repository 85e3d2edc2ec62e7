//! Hazards of policy.md section 9, shown by what becomes of packets.

use compiler::Options;
use model::Update;
use testkit::build::{policy, profile_rules, tier, wep};
use testkit::interpret::Fate;
use testkit::world::{HOST, Trip};
use verdict::Packet;

use crate::bench::{Bench, Probe};
use crate::coverage::Seen;

/// What becomes of a packet of a protocol to the workload at 10.0.0.1, with one tier that passes to the profiles p and q.
/// Program and policy must agree on it.
fn fate(from: &str, protocol: u8, rules: &[Update]) -> Fate {
    let workload = wep(&format!("{HOST}/k8s/ns/w/eth0")).interface("cali1").ip("10.0.0.1").profile("p").profile("q");
    let mut bench = Bench::new(Options::default());
    bench.apply(&[&[workload.build(), tier("default", None, true)], rules].concat()).unwrap();
    let packet = Packet::new(from.parse().unwrap(), "10.0.0.1".parse().unwrap(), protocol).with_ports(40_000, 80);
    let probe = Probe::plain(Trip { from: "eth0".into(), to: "cali1".into(), packet });
    bench.judge(&probe, &mut Seen::default()).unwrap();
    bench.fate(&probe).unwrap()
}

/// The reference leaves the mark of a pass where it is, and a later pass rule ends its profile without a match.
#[test]
fn x_09_a_pass_of_an_earlier_tier_or_profile_does_not_end_a_profile() {
    let second = profile_rules("q", &["pass from-nets 192.0.2.1/32", "allow"], &[]);
    let passing_profile = profile_rules("p", &["pass"], &[]);
    let silent_profile = profile_rules("p", &[], &[]);
    let passing_tier = policy("gnp/p").ingress("pass").build();

    let after_a_profile = [passing_profile.clone(), second.clone()];
    let after_a_tier = [passing_tier.clone(), silent_profile, second.clone()];
    let after_both = [passing_tier, passing_profile, second];
    for rules in [&after_a_profile[..], &after_a_tier, &after_both] {
        assert_eq!(fate("127.0.0.1", 6, rules), Fate::Accepted, "{rules:?}");
        // Whom the pass rule means, nothing allows.
        assert_eq!(fate("192.0.2.1", 6, rules), Fate::Dropped, "{rules:?}");
    }
}
