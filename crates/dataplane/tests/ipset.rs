//! The set driver against the real kernel, with the `ipset` program as the independent witness.
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "test code")]

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use dataplane::Options;
use dataplane::ipset::restore::Restore;
use dataplane::ipset::transport::Netlink;
use dataplane::ipset::{Automatic, IpSets, Transport};
use ipnet::IpNet;
use program::{Family, Member, Members, SetChange, SetKind, SetName, SetSpec};
use testkit::netns::in_new_netns;

const LIMIT: Duration = Duration::from_secs(10);

thread_local! {
    /// Where the test finds a working `ipset` if the host's was replaced.
    static WITNESS: RefCell<Option<PathBuf>> = const { RefCell::new(None) };
}

fn sh(line: &str) -> String {
    let mut path = std::env::var("PATH").unwrap();
    if let Some(directory) = WITNESS.with_borrow(Clone::clone) {
        path = format!("{}:{path}", directory.display());
    }
    let output = Command::new("sh").args(["-ec", line]).env("LC_ALL", "C").env("PATH", path).output().unwrap();
    assert!(output.status.success(), "`{line}`: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn sh_fails(line: &str) -> bool {
    !Command::new("sh").args(["-c", line]).output().unwrap().status.success()
}

/// Runs a test in a mount namespace in which the host's `ipset` is a program that fails; the test itself asks a
/// copy (U3.a). The calling thread stays there.
fn without_a_program(test: impl FnOnce()) {
    let real = PathBuf::from(sh("readlink -f $(command -v ipset)").trim());
    let directory = tempfile::tempdir().unwrap();
    let failing = directory.path().join("failing");
    std::fs::copy(&real, directory.path().join("ipset")).unwrap();
    std::fs::write(&failing, "#!/bin/sh\necho 'ipset: out of order' >&2\nexit 1\n").unwrap();
    std::fs::set_permissions(&failing, PermissionsExt::from_mode(0o755)).unwrap();
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
    let (failing, real) = (failing.display(), real.display());
    sh(&format!("mount --make-rprivate /; mount --bind {failing} {real}"));
    assert!(sh_fails("ipset list") && sh_fails("ipset restore </dev/null"), "the program still works");
    WITNESS.set(Some(directory.path().to_owned()));
    test();
    WITNESS.set(None);
    sh(&format!("umount {real}"));
}

/// Collects what is logged above debug level on this thread.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<String>>>);

impl tracing::Subscriber for Log {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        *metadata.level() <= tracing::Level::INFO
    }

    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }

    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}

    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}

    fn event(&self, event: &tracing::Event<'_>) {
        let mut line = event.metadata().level().to_string();
        event.record(&mut |field: &tracing::field::Field, value: &dyn std::fmt::Debug| {
            write!(line, " {field}={value:?}").unwrap();
        });
        self.0.lock().unwrap().push(line);
    }

    fn enter(&self, _: &tracing::span::Id) {}

    fn exit(&self, _: &tracing::span::Id) {}
}

impl Log {
    fn of(test: impl FnOnce()) -> Vec<String> {
        let log = Self::default();
        tracing::subscriber::with_default(log.clone(), test);
        let lines = log.0.lock().unwrap();
        lines.clone()
    }
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

fn members(kind: SetKind, text: &str) -> Members {
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

/// Both halves of an apply, repeated while there is work for which time was too short; fails the test on an error
/// and returns the writes.
fn apply(sets: &mut IpSets, mut now: Instant) -> u64 {
    let mut writes = 0;
    loop {
        let additions = sets.write_additions(now);
        let removals = sets.write_removals(now);
        assert_eq!([additions.errors, removals.errors].concat(), Vec::<String>::new());
        writes += additions.writes + removals.writes;
        match sets.next_due() {
            Some((due, reason)) if due <= now || reason == "set comparison" => now = due.max(now),
            _ => return writes,
        }
    }
}

/// What a set may grow to in these tests.
const LARGEST: u32 = 4096;

fn options() -> Options {
    Options { largest_set: LARGEST, ..Options::default() }
}

/// Runs a test over both real transports, and over the one that a host without a working `ipset` gets (U3.a),
/// each in a namespace of its own.
fn each_transport(test: impl Fn(&dyn Fn() -> IpSets) + Sync) {
    for label in ["netlink", "restore", "no program"] {
        eprintln!("transport: {label}");
        let transport = || -> Box<dyn Transport> {
            match label {
                "netlink" => Box::new(Netlink::new(LIMIT)),
                "restore" => Box::new(Restore::new(LIMIT)),
                _ => Box::new(Automatic::new(LIMIT, LIMIT)),
            }
        };
        let driver = || IpSets::new(&options(), transport());
        in_new_netns(|| if label == "no program" { without_a_program(|| test(&driver)) } else { test(&driver) });
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
            for _ in 0..7 {
                sets.write_additions(now);
                let report = sets.write_removals(now);
                assert_eq!(report.writes, 0);
                now += Duration::from_secs(1);
            }
            assert!(sets.in_use());
            assert_eq!((names(), sets.unexplained(now).count()), (vec!["cali40a".to_owned()], 0));
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

fn addresses(numbers: std::ops::Range<u32>) -> Members {
    numbers.map(|n| Member::Address(Ipv4Addr::from_bits(0x0a00_0000 + n).into())).collect()
}

/// U3.b
#[test]
fn a_set_grows_beyond_its_size_and_one_beyond_the_limit_keeps_no_other_back() {
    testkit::kernel_test!("ipset");
    each_transport(|driver| {
        let now = Instant::now();
        let mut sets = driver();
        let (small, large) = (spec("cali40grow", SetKind::Address, 3), spec("cali40large", SetKind::Address, 3));
        want(&mut sets, &small, "10.0.0.1 10.0.0.2 10.0.0.3");
        apply(&mut sets, now);
        assert!(sh("ipset list -t cali40grow").contains("maxelem 3"));
        change(&mut sets, &small, "10.0.0.4 10.0.0.5", "");
        let members = addresses(1..LARGEST + 2);
        sets.want(Family::V4, &large.name, SetChange::Replace { spec: large.clone(), members });
        want(&mut sets, &spec("cali40other", SetKind::Address, 3), "10.0.0.1");
        apply(&mut sets, now);
        assert!(sh("ipset list -t cali40grow").contains("maxelem 8"));
        assert_eq!((listed("cali40grow").len(), listed("cali40other").len()), (5, 1));
        assert_eq!(names(), ["cali40grow", "cali40other"]);
        let failed: Vec<_> = sets.failed_sets().map(|set| (set.name.to_string(), set.too_large, set.reason)).collect();
        let reason = format!("{} members are wanted, {LARGEST} are allowed", LARGEST + 1);
        assert_eq!(failed, [("cali40large".to_owned(), true, reason)]);
        // One less, and it fits.
        sets.want(Family::V4, &large.name, SetChange::Delta { added: Members::default(), removed: addresses(1..2) });
        apply(&mut sets, now);
        assert_eq!((listed("cali40large").len(), sets.failed_sets().count()), (LARGEST as usize, 0));
    });
}

/// U3.b: somebody looks into the set all the time while it grows, as a packet does.
#[test]
fn nobody_sees_a_growing_set_without_its_members() {
    testkit::kernel_test!("ipset");
    in_new_netns(|| {
        let now = Instant::now();
        let mut sets = IpSets::new(&options(), Box::new(Netlink::new(LIMIT)));
        let spec = spec("cali40grow", SetKind::Address, 8);
        sets.want(Family::V4, &spec.name, SetChange::Replace { spec: spec.clone(), members: addresses(1..9) });
        apply(&mut sets, now);
        sh("iptables-legacy -w -A OUTPUT -p udp --dport 9 -m set ! --match-set cali40grow dst -j REJECT
            ip route add 10.0.0.0/24 dev lo");
        let (stop, sent) = (AtomicBool::new(false), AtomicU32::new(0));
        std::thread::scope(|scope| {
            let sender = scope.spawn(|| {
                let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
                while !stop.load(Ordering::Relaxed) {
                    // A packet to a member of before; a reject is an error of the call.
                    let number = sent.fetch_add(1, Ordering::Relaxed);
                    socket.send_to(b"x", "10.0.0.3:9").unwrap_or_else(|error| panic!("packet {number}: {error}"));
                }
            });
            // So that there are packets before, between and after the steps, however busy the machine is.
            let some_packets = || {
                let enough = sent.load(Ordering::Relaxed) + 20;
                while sent.load(Ordering::Relaxed) < enough && !sender.is_finished() {
                    std::thread::sleep(Duration::from_micros(100));
                }
            };
            some_packets();
            for step in 0..8 {
                let more = addresses(9 << step >> 1..9 << step);
                sets.want(Family::V4, &spec.name, SetChange::Delta { added: more, removed: Members::default() });
                apply(&mut sets, now);
                some_packets();
            }
            stop.store(true, Ordering::Relaxed);
            sender.join().unwrap();
        });
        assert!(sh("ipset list -t cali40grow").contains("maxelem 2048"));
        let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
        assert!(socket.send_to(b"x", "10.0.0.0:9").is_err(), "the rule is not in force");
    });
}

/// U3.a
#[test]
fn others_sets_of_any_type_and_name_cause_no_error_no_repetition_and_no_line_in_the_log() {
    testkit::kernel_test!("ipset");
    each_transport(|driver| {
        sh(r#"ipset create f-list list:set size 4 timeout 100; ipset create f-ports bitmap:port range 0-1000
            ipset create f-map bitmap:ip range 10.0.0.0/24 timeout 50; ipset create f-iface hash:net,iface
            ipset create f-all hash:ip timeout 600 counters comment skbinfo forceadd netmask 24
            ipset add f-all 10.0.0.1 comment 'a \ b' skbmark 0x1/0x2 packets 5; ipset add f-list f-all
            ipset add f-ports 7-9; ipset add f-iface 10.0.0.0/8,eth0 nomatch; ipset create 'with space' hash:ip
            ipset create 'cali40 space' hash:ip; ipset create "$(printf 'caf\351')" hash:ip
            ipset create "$(printf 'two\nlines')" hash:ip; ipset create '"' hash:ip"#);
        // Not every kernel has these.
        for kind in ["hash:mac", "hash:ip,mark", "hash:net,net", "hash:net,port,net", "hash:ip,mac"] {
            sh(&format!("ipset create f-{kind} {kind} counters || true"));
        }
        let others = sh("ipset list -name | sort | cat -v");
        let now = Instant::now();
        let log = Log::of(|| {
            let mut sets = driver();
            let spec = spec("cali40a", SetKind::Net, 1000);
            want(&mut sets, &spec, "10.0.0.0/8");
            let first = sets.write_additions(now);
            assert_eq!((first.errors.len(), first.held.len()), (0, 0), "{first:?}");
            assert_eq!(sets.write_removals(now).errors, Vec::<String>::new());
            // At the refresh nothing differs, and nothing is due before the next one but the comparison.
            let later = now + Duration::from_secs(90);
            assert_eq!(apply(&mut sets, later), 0);
            assert_eq!(sets.next_due().unwrap().1, "set refresh");
            sets.want(Family::V4, &spec.name, SetChange::Remove);
            apply(&mut sets, later);
        });
        assert_eq!(log, Vec::<String>::new());
        assert_eq!(sh("ipset list -name | sort | cat -v"), others);
    });
}

/// U3.d
#[test]
fn members_that_are_as_wanted_already_are_counted_and_never_lead_to_a_rewrite() {
    testkit::kernel_test!("ipset");
    in_new_netns(|| {
        let now = Instant::now();
        let mut sets = IpSets::new(&options(), Box::new(Netlink::new(LIMIT)));
        let spec = spec("cali40a", SetKind::Address, 1000);
        sets.want(Family::V4, &spec.name, SetChange::Replace { spec: spec.clone(), members: addresses(1..101) });
        apply(&mut sets, now);
        sh("ipset add cali40a 10.0.1.1; ipset del cali40a 10.0.0.5; ipset del cali40a 10.0.0.6");
        change(&mut sets, &spec, "10.0.1.1 10.0.1.2", "10.0.0.5 10.0.0.7");
        let (additions, removals) = (sets.write_additions(now), sets.write_removals(now));
        assert_eq!((additions.unneeded, additions.writes, additions.errors.len()), (1, 1, 0), "{additions:?}");
        assert_eq!((removals.unneeded, removals.writes, removals.errors.len()), (1, 1, 0), "{removals:?}");
        // A set of which this was seen is compared soon, and what else is wrong with it put right.
        assert_eq!(apply(&mut sets, now), 1);
        let expected: Vec<String> = (1..101).filter(|n| ![5, 7].contains(n)).map(|n| format!("10.0.0.{n}")).collect();
        let listed: BTreeSet<String> = listed("cali40a").into_iter().collect();
        assert_eq!(listed, expected.into_iter().chain(["10.0.1.1".into(), "10.0.1.2".into()]).collect());
        // Many of them.
        sh("ipset flush cali40a");
        let removed = addresses(10..101);
        sets.want(Family::V4, &spec.name, SetChange::Delta { added: Members::default(), removed });
        sets.write_additions(now);
        let removals = sets.write_removals(now);
        assert!(removals.unneeded >= 32 && removals.writes == 1 && removals.errors.is_empty(), "{removals:?}");
    });
}

/// U3.e
#[test]
fn among_two_thousand_sets_those_that_somebody_touched_are_repaired_without_a_write_to_the_others() {
    testkit::kernel_test!("ipset");
    in_new_netns(|| {
        let now = Instant::now();
        let mut sets = IpSets::new(&options(), Box::new(Netlink::new(LIMIT)));
        for n in 0..2000 {
            want(&mut sets, &spec(&format!("cali40s{n}"), SetKind::Address, 1000), "10.0.0.1 10.0.0.2 10.0.0.3");
        }
        let start = Instant::now();
        apply(&mut sets, now);
        eprintln!("2,000 sets made: {:?}", start.elapsed());
        sh("ipset destroy cali40s7; ipset del cali40s8 10.0.0.1; ipset add cali40s9 10.0.0.9
            ipset del cali40s10 10.0.0.1; ipset add cali40s10 10.0.0.9");
        let later = now + Duration::from_secs(90);
        let start = Instant::now();
        let (additions, removals) = (sets.write_additions(later), sets.write_removals(later));
        eprintln!("looked after: {:?}", start.elapsed());
        // One creation with its members, one addition, one removal; the fourth has as many members as expected.
        assert_eq!((additions.writes, removals.writes), (3, 1), "{additions:?} {removals:?}");
        let more = sets.next_due().unwrap();
        assert!(more.0 < later + Duration::from_secs(1) && more.1 == "set comparison", "{more:?}");
        assert_eq!(apply(&mut sets, later), 2);
        for set in [7, 8, 9, 10, 11] {
            assert_eq!(listed(&format!("cali40s{set}")), ["10.0.0.1", "10.0.0.2", "10.0.0.3"]);
        }
        let mut successor = IpSets::new(&options(), Box::new(Netlink::new(LIMIT)));
        for n in 0..2000 {
            want(&mut successor, &spec(&format!("cali40s{n}"), SetKind::Address, 1000), "10.0.0.1 10.0.0.2 10.0.0.3");
        }
        let start = Instant::now();
        let report = successor.write_additions(now);
        eprintln!("2,000 sets read: {:?}", start.elapsed());
        assert_eq!((report.reads, report.writes), (2, 0));
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
        let v4: Members =
            (0..count).map(|n| Member::Address(IpAddr::V4(Ipv4Addr::from_bits(0x0a00_0001 + n)))).collect();
        let v6: Members = (0..count)
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
        // The comparison beside the work takes many slices, is not confused by what is written meanwhile, and finds
        // a member that somebody exchanged.
        for foreign in [false, true] {
            let mut at = now + Duration::from_secs(if foreign { 1000 } else { 500 });
            if foreign {
                sh("ipset del cali40a 10.0.0.7; ipset add cali40a 10.255.0.7");
            }
            let mut slices = 0;
            let log = Log::of(|| {
                loop {
                    let text = Ipv4Addr::from_bits(0x0c00_0000 + slices).to_string();
                    change(&mut successor, &spec, &text, &Ipv4Addr::from_bits(0x0b00_0000 + slices).to_string());
                    let writes = successor.write_additions(at).writes + successor.write_removals(at).writes;
                    successor.write_additions(at);
                    successor.write_removals(at);
                    slices += 1;
                    assert!(writes > 0 && slices < 1000, "{slices}");
                    match successor.next_due() {
                        Some((due, "set comparison")) => at = due,
                        _ => break,
                    }
                }
            });
            assert_eq!((log.len(), slices > 2), (usize::from(foreign), true), "{slices}: {log:?}");
            apply(&mut successor, at);
            assert!(sh_fails("ipset test cali40a 10.255.0.7") && !sh_fails("ipset test cali40a 10.0.0.7"));
            // The next round has the same members to change.
            for n in 0..slices {
                let (old, new) = (Ipv4Addr::from_bits(0x0c00_0000 + n), Ipv4Addr::from_bits(0x0b00_0000 + n));
                change(&mut successor, &spec, &new.to_string(), &old.to_string());
            }
            apply(&mut successor, at);
        }
        for (set, family) in [("cali40a", Family::V4), ("cali60n", Family::V6)] {
            successor.want(family, &name(set), SetChange::Remove);
        }
        apply(&mut successor, now + Duration::from_secs(1000));
        assert!(sh_fails("ipset list cali40a") && sh_fails("ipset list cali60n"));
    });
}
