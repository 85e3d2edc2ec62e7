//! Operations on many sets in one request, against the real kernel: netlink does what the `ipset` program does, and says
//! the same about what fails.
//!
//! One family: what is tested is how messages are put together and answered; that members of both are written as they
//! must be is tested for one message at a time.
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "test code")]

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::process::Command;
use std::time::{Duration, Instant};

use dataplane::ipset::Transport;
use dataplane::ipset::restore::Restore;
use dataplane::ipset::transport::{Netlink, Op, Series, SetError};
use program::{Family, Member, Members, SetKind, SetName};
use testkit::netns::in_new_netns;

const LIMIT: Duration = Duration::from_secs(30);

fn sh(line: &str) -> String {
    let output = Command::new("sh").args(["-ec", line]).env("LC_ALL", "C").output().unwrap();
    assert!(output.status.success(), "`{line}`: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn name(text: &str) -> SetName {
    SetName::new(text).unwrap()
}

fn series(set: &str, ops: Vec<Op>) -> Series {
    Series { set: name(set), ops }
}

fn create(set: &str, kind: SetKind, max_members: u32) -> Op {
    Op::Create { name: name(set), kind, family: Family::V4, max_members, hash_size: 64 }
}

/// 10.0.0.0 plus so much.
fn addresses(numbers: std::ops::Range<u32>) -> Members {
    numbers.map(|n| Member::Address(IpAddr::V4(Ipv4Addr::from_bits(0x0a00_0000 + n)))).collect()
}

/// Port 80 of 10.0.0.0 plus so much; no set can hold one of protocol 0, which `bad` has.
fn ports(numbers: std::ops::Range<u32>, bad: u32) -> Members {
    let member = |n| Member::AddressPort {
        address: IpAddr::V4(Ipv4Addr::from_bits(0x0a00_0000 + n)),
        protocol: if n == bad { 0 } else { 6 },
        port: 80,
    };
    numbers.map(member).collect()
}

fn add(set: &str, members: Members) -> Op {
    Op::Add { set: name(set), members }
}

fn remove(set: &str, members: Members) -> Op {
    Op::Remove { set: name(set), members }
}

fn swap(set: &str, with: &str) -> Op {
    Op::Swap { set: name(set), with: name(with) }
}

fn destroy(set: &str) -> Op {
    Op::Destroy { set: name(set) }
}

/// What is there, without what the kernel chooses by itself.
fn saved() -> Vec<String> {
    let mut lines: Vec<String> =
        sh("ipset save | sed 's/ hashsize.*maxelem/ maxelem/; s/ bucketsize.*//'").lines().map(str::to_owned).collect();
    lines.sort();
    lines
}

/// By position of the series: which operation failed, how many members were handled before, and why.
type Failures = BTreeMap<usize, (usize, usize, SetError)>;

/// Both transports, each in a namespace of its own that `prepare` has filled; returns failures and what is there then.
fn each(prepare: &str, series: &[Series]) -> [(Failures, Vec<String>); 2] {
    ["netlink", "restore"].map(|label| {
        in_new_netns(|| {
            sh(prepare);
            let mut transport: Box<dyn Transport> = match label {
                "netlink" => Box::new(Netlink::new(LIMIT)),
                _ => Box::new(Restore::new(LIMIT)),
            };
            let failures = transport.perform_each(series);
            let told = |failure: dataplane::ipset::transport::Failure| {
                // The text is each one's own.
                let is_member = matches!(failure.error, SetError::Member(_));
                (failure.op, failure.done, if is_member { SetError::Member(String::new()) } else { failure.error })
            };
            (failures.into_iter().map(|(index, failure)| (index, told(failure))).collect(), saved())
        })
    })
}

#[test]
fn each_series_stops_at_its_first_failure_and_the_others_go_on() {
    testkit::kernel_test!("ipset", "iptables-legacy");
    let prepare = "ipset create there hash:ip maxelem 10; ipset add there 10.0.0.1; ipset create full hash:ip maxelem 2
        ipset create net hash:net maxelem 10; ipset create used hash:ip maxelem 10; ipset create gone hash:ip maxelem 10
        iptables-legacy -w -A INPUT -m set --match-set used src -j DROP";
    let all = [
        series("new", vec![create("new", SetKind::Address, 100), add("new", addresses(0..3))]),
        // Nothing behind a failure is done.
        series("there", vec![create("there", SetKind::Address, 100), add("there", addresses(50..60))]),
        series("absent", vec![add("absent", addresses(0..3)), create("absent", SetKind::Address, 100)]),
        // A member is at fault.
        series(
            "bad",
            vec![
                create("bad", SetKind::Address, 100),
                add("bad", [[0, 0, 0, 0].into(), [10, 0, 0, 1].into()].map(Member::Address).into()),
                create("after-bad", SetKind::Address, 100),
            ],
        ),
        series("full", vec![add("full", addresses(0..4)), destroy("full")]),
        series("used", vec![destroy("used"), create("used", SetKind::Net, 9)]),
        series("gone", vec![destroy("gone"), destroy("gone"), destroy("never-there")]),
        series("net", vec![swap("net", "there"), destroy("net")]),
        series("nobody", vec![swap("nobody", "there")]),
        series("nothing", vec![]),
        series(
            "empty",
            vec![
                add("empty", Members::default()),
                remove("there", Members::default()),
                create("empty", SetKind::Address, 7),
            ],
        ),
        series(
            "built",
            vec![
                create("t0", SetKind::Address, 100),
                add("t0", addresses(7..9)),
                create("built", SetKind::Address, 100),
                add("built", addresses(1..2)),
                swap("built", "t0"),
                destroy("t0"),
            ],
        ),
        series("last", vec![create("last", SetKind::Address, 5)]),
    ];
    let [netlink, restore] = each(prepare, &all);
    let member = || SetError::Member(String::new());
    let expected: Failures = [
        (1, (0, 0, SetError::Exists)),
        (2, (0, 0, SetError::Missing)),
        (3, (1, 0, member())),
        (4, (0, 2, SetError::Full)),
        (5, (0, 0, SetError::Busy)),
        (7, (0, 0, SetError::TypesDiffer)),
        (8, (0, 0, SetError::Missing)),
    ]
    .into();
    assert_eq!(netlink.0, expected);
    assert_eq!(restore.0, expected);
    let left = [
        "add built 10.0.0.7",
        "add built 10.0.0.8",
        "add full 10.0.0.0",
        "add full 10.0.0.1",
        "add new 10.0.0.0",
        "add new 10.0.0.1",
        "add new 10.0.0.2",
        "add there 10.0.0.1",
        "create bad hash:ip family inet maxelem 100",
        "create built hash:ip family inet maxelem 100",
        "create empty hash:ip family inet maxelem 7",
        "create full hash:ip family inet maxelem 2",
        "create last hash:ip family inet maxelem 5",
        "create net hash:net family inet maxelem 10",
        "create new hash:ip family inet maxelem 100",
        "create there hash:ip family inet maxelem 10",
        "create used hash:ip family inet maxelem 10",
    ];
    assert_eq!(netlink.1, left);
    assert_eq!(restore.1, left);
}

/// The program refuses such a member before it asks the kernel.
#[test]
fn members_before_one_that_the_kernel_refuses_are_there() {
    testkit::kernel_test!("ipset");
    in_new_netns(|| {
        let mut netlink = Netlink::new(LIMIT);
        let sets = ["a", "b", "c"].map(|set| {
            series(set, vec![create(set, SetKind::AddressPort, 100), add(set, ports(0..6, 2)), destroy(set)])
        });
        for (index, failure) in netlink.perform_each(&sets) {
            assert_eq!(
                (index, failure.op, failure.done, matches!(failure.error, SetError::Member(_))),
                (index, 1, 2, true)
            );
        }
        let added = saved().into_iter().filter(|line| line.starts_with("add ")).collect::<Vec<_>>();
        let expected = ["a", "b", "c"].map(|set| [0, 1].map(|n| format!("add {set} 10.0.0.{n},tcp:80")));
        assert_eq!(added, expected.concat());
    });
}

/// U3.d
#[test]
fn members_that_are_as_wanted_already_are_counted_in_each_of_many_sets() {
    testkit::kernel_test!("ipset");
    in_new_netns(|| {
        let mut netlink = Netlink::new(LIMIT);
        let sets: Vec<String> = (0..60).map(|n| format!("s{n:03}")).collect();
        let make = |set: &String| series(set, vec![create(set, SetKind::Address, 9999), add(set, addresses(0..20))]);
        assert!(netlink.perform_each(&sets.iter().map(make).collect::<Vec<_>>()).is_empty());
        assert_eq!(netlink.surprises(), []);
        // Set n has n % 50 of the members already, among others: the first ones.
        let more: Vec<Series> = sets
            .iter()
            .zip(0u32..)
            .map(|(set, n)| series(set, vec![add(set, addresses(20 - (n % 50).min(20)..1400))]))
            .collect();
        let start = Instant::now();
        assert!(netlink.perform_each(&more).is_empty());
        eprintln!("{} members in {} sets: {:?}", 1380 * sets.len(), sets.len(), start.elapsed());
        let counted: BTreeMap<String, u64> =
            netlink.surprises().into_iter().map(|(set, count)| (set.to_string(), count)).collect();
        let expected = sets.iter().zip(0u64..).map(|(set, n)| (set.clone(), (n % 50).min(20)));
        assert_eq!(counted, expected.filter(|(_, count)| *count > 0).collect());
        assert!(saved().iter().filter(|line| line.starts_with("add s057 ")).count() == 1400);
        let less: Vec<Series> = sets.iter().map(|set| series(set, vec![remove(set, addresses(1390..1410))])).collect();
        assert!(netlink.perform_each(&less).is_empty());
        let surprises = netlink.surprises();
        assert!(surprises.len() == 60 && surprises.iter().all(|(_, count)| *count == 10), "{surprises:?}");
    });
}

#[test]
fn ten_thousand_operations_are_all_performed_also_if_every_other_fails() {
    testkit::kernel_test!("ipset");
    in_new_netns(|| {
        let mut netlink = Netlink::new(LIMIT);
        let sets: Vec<String> = (0..500).map(|n| format!("a-set-with-quite-a-long-name{n:03}")).collect();
        let make: Vec<Series> = sets.iter().map(|set| series(set, vec![create(set, SetKind::Address, 100)])).collect();
        assert!(netlink.perform_each(&make).is_empty());
        // Ten thousand additions, of which the odd ones go to sets that do not exist.
        let ops: Vec<Series> = (0..10_000u32)
            .map(|n| {
                let set =
                    sets.get(n as usize % 500).filter(|_| n % 2 == 0).cloned().unwrap_or_else(|| format!("no{n}"));
                series(&set, vec![add(&set, addresses(n..n + 1))])
            })
            .collect();
        let start = Instant::now();
        let failures = netlink.perform_each(&ops);
        eprintln!("10,000 additions, half of which fail: {:?}", start.elapsed());
        assert_eq!(failures.len(), 5000);
        let right = |(index, failure): (&usize, &dataplane::ipset::transport::Failure)| {
            index % 2 == 1 && (failure.op, failure.done, &failure.error) == (0, 0, &SetError::Missing)
        };
        assert!(failures.iter().all(right));
        assert_eq!(saved().iter().filter(|line| line.starts_with("add ")).count(), 5000);
        let destroy: Vec<Series> = sets.iter().map(|set| series(set, vec![destroy(set)])).collect();
        let start = Instant::now();
        assert!(netlink.perform_each(&destroy).is_empty());
        eprintln!("500 destroyed: {:?}", start.elapsed());
        assert!(saved().is_empty());
    });
}
