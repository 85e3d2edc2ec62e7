//! The set driver against the real kernel, with the `ipset` program as the independent witness.
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "test code")]

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::process::Command;
use std::time::{Duration, Instant};

use dataplane::Options;
use dataplane::ipset::restore::Restore;
use dataplane::ipset::transport::Netlink;
use dataplane::ipset::{IpSets, Transport};
use ipnet::IpNet;
use program::{Family, Member, SetChange, SetKind, SetName, SetSpec};
use testkit::netns::in_new_netns;

const LIMIT: Duration = Duration::from_secs(10);

fn sh(line: &str) -> String {
    let output = Command::new("sh").args(["-ec", line]).env("LC_ALL", "C").output().unwrap();
    assert!(output.status.success(), "`{line}`: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn sh_fails(line: &str) -> bool {
    !Command::new("sh").args(["-c", line]).output().unwrap().status.success()
}

fn name(text: &str) -> SetName {
    SetName::new(text).unwrap()
}

fn spec(set: &str, kind: SetKind, max_members: u32) -> SetSpec {
    let family = if set.starts_with("cali6") { Family::V6 } else { Family::V4 };
    SetSpec { name: name(set), family, kind, max_members }
}

fn member(kind: SetKind, text: &str) -> Member {
    match kind {
        SetKind::Address => Member::Address(text.parse().unwrap()),
        SetKind::Net => Member::Net(text.parse().unwrap()),
        SetKind::AddressPort => {
            let (address, rest) = text.split_once(',').unwrap();
            let (protocol, port) = rest.split_once(':').unwrap();
            let protocol = match protocol {
                "tcp" => 6,
                "udp" => 17,
                "sctp" => 132,
                other => other.parse().unwrap(),
            };
            Member::AddressPort { address: address.parse().unwrap(), protocol, port: port.parse().unwrap() }
        }
    }
}

fn members(kind: SetKind, text: &str) -> BTreeSet<Member> {
    text.split_whitespace().map(|text| member(kind, text)).collect()
}

fn want(sets: &mut IpSets, spec: &SetSpec, text: &str) {
    let members = members(spec.kind, text);
    sets.want(spec.family, &spec.name, SetChange::Replace { spec: spec.clone(), members });
}

fn change(sets: &mut IpSets, spec: &SetSpec, added: &str, removed: &str) {
    let change = SetChange::Delta { added: members(spec.kind, added), removed: members(spec.kind, removed) };
    sets.want(spec.family, &spec.name, change);
}

/// What the `ipset` program says is in a set, sorted.
fn listed(set: &str) -> Vec<String> {
    let text = sh(&format!("ipset list {set}"));
    let mut members: Vec<String> =
        text.lines().skip_while(|line| *line != "Members:").skip(1).map(str::to_owned).collect();
    members.sort();
    members
}

fn names() -> Vec<String> {
    let mut names: Vec<String> = sh("ipset list -name").lines().map(str::to_owned).collect();
    names.sort();
    names
}

/// Both halves of an apply, repeated while destroying sets needs more time; fails the test on an error and
/// returns the writes.
fn apply(sets: &mut IpSets, now: Instant) -> u64 {
    let mut writes = 0;
    loop {
        let additions = sets.write_additions(now);
        let removals = sets.write_removals(now);
        assert_eq!([additions.errors, removals.errors].concat(), Vec::<String>::new());
        writes += additions.writes + removals.writes;
        if sets.next_due().is_none_or(|(due, _)| due > now) {
            return writes;
        }
    }
}

/// Runs a test over both real transports, each in a namespace of its own.
fn each_transport(test: impl Fn(&dyn Fn() -> IpSets) + Sync) {
    for label in ["netlink", "restore"] {
        eprintln!("transport: {label}");
        let transport = || -> Box<dyn Transport> {
            match label {
                "netlink" => Box::new(Netlink::new(LIMIT)),
                _ => Box::new(Restore::new(LIMIT)),
            }
        };
        in_new_netns(|| test(&|| IpSets::new(&Options::default(), transport())));
    }
}

#[test]
fn sets_of_every_kind_and_family_are_made_changed_and_destroyed() {
    testkit::kernel_test!("ipset");
    // name, kind, first members, added, removed, what `ipset` then prints
    let cases = [
        ("cali40a", SetKind::Address, "10.0.0.1 10.0.0.2", "10.0.0.3", "10.0.0.1", "10.0.0.2 10.0.0.3"),
        ("cali60a", SetKind::Address, "fd00::1 fd00::2", "fd00::3", "fd00::1", "fd00::2 fd00::3"),
        (
            "cali40n",
            SetKind::Net,
            "10.0.0.0/8 1.2.3.4/32",
            "0.0.0.0/1 128.0.0.0/1",
            "10.0.0.0/8",
            "0.0.0.0/1 1.2.3.4 128.0.0.0/1",
        ),
        ("cali60n", SetKind::Net, "fd00::/8 fe00::1/128", "::/1 8000::/1", "fd00::/8", "8000::/1 ::/1 fe00::1"),
        (
            "cali40p",
            SetKind::AddressPort,
            "10.0.0.1,tcp:80 10.0.0.1,udp:53",
            "10.0.0.1,sctp:1",
            "10.0.0.1,tcp:80",
            "10.0.0.1,sctp:1 10.0.0.1,udp:53",
        ),
        (
            "cali60p",
            SetKind::AddressPort,
            "fd00::1,tcp:80 fd00::1,udp:53",
            "fd00::1,sctp:1",
            "fd00::1,tcp:80",
            "fd00::1,sctp:1 fd00::1,udp:53",
        ),
    ];
    each_transport(|driver| {
        let now = Instant::now();
        let mut sets = driver();
        for (set, kind, first, ..) in cases {
            want(&mut sets, &spec(set, kind, 1000), first);
        }
        apply(&mut sets, now);
        for (set, kind, first, added, removed, _) in cases {
            assert_eq!(listed(set).len(), first.split(' ').count(), "{set}");
            let header = sh(&format!("ipset list -t {set}"));
            let kind_name = ["hash:ip", "hash:net", "hash:ip,port"][kind as usize];
            assert!(header.contains(&format!("Type: {kind_name}\n")) && header.contains("maxelem 1000"), "{header}");
            change(&mut sets, &spec(set, kind, 1000), added, removed);
        }
        apply(&mut sets, now);
        for (set, .., expected) in cases {
            assert_eq!(listed(set).join(" "), expected, "{set}");
        }

        // A successor finds everything as it wants it.
        let mut successor = driver();
        for (set, kind, .., expected) in cases {
            let text: String = expected
                .split(' ')
                .map(|text| match kind {
                    SetKind::Net if text == "1.2.3.4" => "1.2.3.4/32 ".to_owned(),
                    SetKind::Net if text == "fe00::1" => "fe00::1/128 ".to_owned(),
                    SetKind::Address | SetKind::Net | SetKind::AddressPort => format!("{text} "),
                })
                .collect();
            want(&mut successor, &spec(set, kind, 1000), &text);
        }
        assert_eq!(apply(&mut successor, now), 0);

        for (set, kind, ..) in cases {
            let spec = spec(set, kind, 1000);
            successor.want(spec.family, &spec.name, SetChange::Remove);
        }
        apply(&mut successor, now);
        assert_eq!(names().len(), 0);
    });
}

#[test]
fn another_agents_sets_are_taken_over_corrected_or_swept() {
    testkit::kernel_test!("ipset");
    each_transport(|driver| {
        sh("ipset create cali40same hash:net maxelem 1000; ipset add cali40same 10.0.0.0/8
            ipset create cali40limit hash:net maxelem 5; ipset add cali40limit 10.0.0.0/8
            ipset create cali40type hash:ip maxelem 1000; ipset add cali40type 10.0.0.1
            ipset create cali40time hash:net maxelem 1000 timeout 600; ipset add cali40time 10.0.0.0/8
            ipset create cali40not hash:net maxelem 1000; ipset add cali40not 10.0.0.0/8 nomatch
            ipset create cali60family hash:net maxelem 1000
            ipset create cali40stale hash:net; ipset create cali4t0 hash:net; ipset create felix-4-old hash:ip
            ipset create foreign hash:net; ipset add foreign 10.0.0.0/8; ipset create xcali40 list:set");
        let mut sets = driver();
        for set in ["cali40same", "cali40limit", "cali40type", "cali40time", "cali40not"] {
            want(&mut sets, &spec(set, SetKind::Net, 1000), "10.0.0.0/8 11.0.0.0/8");
        }
        want(&mut sets, &spec("cali60family", SetKind::Net, 1000), "fd00::/8");
        apply(&mut sets, Instant::now());
        for set in ["cali40same", "cali40limit", "cali40type", "cali40time", "cali40not"] {
            assert_eq!(listed(set), ["10.0.0.0/8", "11.0.0.0/8"], "{set}");
            assert!(sh(&format!("ipset list -t {set}")).contains("maxelem 1000"), "{set}");
        }
        assert_eq!(listed("cali60family"), ["fd00::/8"]);
        let left = "cali40limit cali40not cali40same cali40time cali40type cali60family foreign xcali40";
        assert_eq!(names().join(" "), left);
        assert_eq!(listed("foreign"), ["10.0.0.0/8"]);
    });
}

#[test]
fn a_set_that_a_rule_names_stays_until_the_rule_is_gone() {
    testkit::kernel_test!("ipset", "iptables-legacy", "iptables-nft");
    for iptables in ["iptables-legacy", "iptables-nft"] {
        each_transport(|driver| {
            let mut now = Instant::now();
            let mut sets = driver();
            let spec = spec("cali40a", SetKind::Net, 1000);
            want(&mut sets, &spec, "10.0.0.0/8");
            apply(&mut sets, now);
            sh(&format!("{iptables} -w -A INPUT -m set --match-set cali40a src -j DROP"));
            sets.want(Family::V4, &spec.name, SetChange::Remove);
            for _ in 0..3 {
                sets.write_additions(now);
                let report = sets.write_removals(now);
                assert_eq!(report.writes, 0);
                now += Duration::from_secs(1);
            }
            assert!(sets.in_use());
            assert_eq!(names(), ["cali40a"]);
            sh(&format!("{iptables} -w -F INPUT"));
            // The nft variant lets go of the set some time after the rule is gone.
            let deadline = Instant::now() + LIMIT;
            while !names().is_empty() {
                assert!(Instant::now() < deadline, "{iptables}: the set is still there");
                now += Duration::from_secs(10);
                sets.write_additions(now);
                sets.write_removals(now);
            }
        });
    }
}

#[test]
fn a_full_set_is_named_in_the_report_and_filled_as_far_as_it_goes() {
    testkit::kernel_test!("ipset");
    each_transport(|driver| {
        let now = Instant::now();
        let mut sets = driver();
        want(&mut sets, &spec("cali40full", SetKind::Address, 3), "10.0.0.1 10.0.0.2 10.0.0.3 10.0.0.4 10.0.0.5");
        want(&mut sets, &spec("cali40good", SetKind::Address, 3), "10.0.0.1");
        let report = sets.write_additions(now);
        assert_eq!(report.errors.len(), 1, "{:?}", report.errors);
        assert!(report.errors[0].contains("cali40full") && report.errors[0].contains("full"), "{:?}", report.errors);
        assert_eq!((listed("cali40full").len(), listed("cali40good").len()), (3, 1));
        assert_eq!(sets.failed_sets().map(|set| set.name.to_string()).collect::<Vec<_>>(), ["cali40full"]);
    });
}

#[test]
fn a_member_the_kernel_refuses_is_named_and_the_others_are_there() {
    testkit::kernel_test!("ipset");
    each_transport(|driver| {
        let mut sets = driver();
        want(&mut sets, &spec("cali40a", SetKind::Address, 100), "0.0.0.0 10.0.0.1 10.0.0.2");
        want(&mut sets, &spec("cali40n", SetKind::Net, 100), "0.0.0.0/0 10.0.0.0/8");
        let report = sets.write_additions(Instant::now());
        assert_eq!(report.errors.len(), 2, "{:?}", report.errors);
        assert!(report.errors.iter().any(|error| error.contains("cali40a") && error.contains("0.0.0.0")));
        assert!(report.errors.iter().any(|error| error.contains("cali40n") && error.contains("0.0.0.0/0")));
        assert_eq!(
            (listed("cali40a"), listed("cali40n")),
            (vec!["10.0.0.1".into(), "10.0.0.2".into()], vec!["10.0.0.0/8".into()])
        );
        assert_eq!(sets.failed_sets().count(), 2);
    });
}

#[test]
fn foreign_changes_are_repaired_after_distrust_and_at_the_refresh() {
    testkit::kernel_test!("ipset");
    each_transport(|driver| {
        let now = Instant::now();
        let mut sets = driver();
        want(&mut sets, &spec("cali40a", SetKind::Address, 100), "10.0.0.1 10.0.0.2");
        want(&mut sets, &spec("cali60a", SetKind::Address, 100), "fd00::1");
        apply(&mut sets, now);
        sh("ipset del cali40a 10.0.0.1; ipset add cali40a 10.0.0.9; ipset destroy cali60a");
        sets.distrust();
        apply(&mut sets, now);
        assert_eq!(
            (listed("cali40a").join(" "), listed("cali60a").join(" ")),
            ("10.0.0.1 10.0.0.2".into(), "fd00::1".into())
        );
        sh("ipset flush cali40a");
        assert_eq!(apply(&mut sets, now), 0);
        apply(&mut sets, now + Duration::from_secs(90));
        assert_eq!(listed("cali40a"), ["10.0.0.1", "10.0.0.2"]);
    });
}

#[test]
fn large_sets_are_written_in_full_read_in_full_and_not_written_again() {
    testkit::kernel_test!("ipset");
    in_new_netns(|| {
        let count = 100_000u32;
        let v4: BTreeSet<Member> =
            (0..count).map(|n| Member::Address(IpAddr::V4(Ipv4Addr::from_bits(0x0a00_0001 + n)))).collect();
        let v6: BTreeSet<Member> = (0..count)
            .map(|n| {
                Member::Net(IpNet::new(Ipv6Addr::from_bits(0xfd << 120 | u128::from(n) << 64).into(), 64).unwrap())
            })
            .collect();
        let mut sets = IpSets::new(&Options::default(), Box::new(Netlink::new(LIMIT)));
        let fill = |sets: &mut IpSets| {
            for (set, kind, members) in [("cali40a", SetKind::Address, &v4), ("cali60n", SetKind::Net, &v6)] {
                let spec = spec(set, kind, 1_048_576);
                sets.want(spec.family, &name(set), SetChange::Replace { spec, members: members.clone() });
            }
        };
        let now = Instant::now();
        fill(&mut sets);
        let start = Instant::now();
        apply(&mut sets, now);
        eprintln!("two sets of {count} members: {:?}", start.elapsed());
        assert_eq!((listed("cali40a").len(), listed("cali60n").len()), (count as usize, count as usize));
        assert!(sh("ipset list -t cali40a").contains("hashsize 131072"));

        let mut successor = IpSets::new(&Options::default(), Box::new(Netlink::new(LIMIT)));
        fill(&mut successor);
        let start = Instant::now();
        assert_eq!(apply(&mut successor, now), 0);
        eprintln!("read and compared: {:?}", start.elapsed());

        let spec = spec("cali40a", SetKind::Address, 1_048_576);
        let mut took = Vec::new();
        for n in 0..200u32 {
            change(&mut successor, &spec, &Ipv4Addr::from_bits(0x0b00_0000 + n).to_string(), "");
            let start = Instant::now();
            let report = successor.write_additions(now);
            took.push(start.elapsed());
            assert_eq!((report.writes, report.reads), (1, 0));
        }
        took.sort();
        eprintln!("one member: median {:?}, longest {:?}", took[100], took[199]);
        for (set, family) in [("cali40a", Family::V4), ("cali60n", Family::V6)] {
            successor.want(family, &name(set), SetChange::Remove);
        }
        apply(&mut successor, now);
        assert!(sh_fails("ipset list cali40a") && sh_fails("ipset list cali60n"));
    });
}
