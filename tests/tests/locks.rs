//! Others who want the tables too: somebody who sits on the xtables lock, somebody who writes back what he read long
//! ago, and a storm of changes.
//!
//! Timing is compared with what the kernel and the tools need, measured in the same run.
#![allow(clippy::unwrap_used, reason = "a test that meets something unexpected fails")]
#![allow(clippy::print_stdout, reason = "what was measured is for whoever asks with --nocapture")]

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use dataplane::iptables::native::Native;
use felix_tests::agent::{Start, Variant, end_to_end};
use felix_tests::bed::Vm;
use felix_tests::data::{self, Event, Machine, SG_A, SG_B};
use felix_tests::kernel::{Kernel, wait_for};
use felix_tests::locks::{Hold, Watcher, children, hog, holder_of};
use felix_tests::solo::{Solo, ghosts, groups_of};
use felix_tests::watch::Wrappers;
use model::Family;
use testkit::netns::Netns;

/// How long anything else may take, with what else runs beside the test.
const PATIENCE: Duration = Duration::from_secs(20);

/// Bar U2.a. The lock is held 5 s of every 6 s; a change of policy that is made while it is held is in force within
/// 12 s, in both families. At no time is there more than one process per family (the one that is held open), and the
/// one episode of waiting is one warning that names the holder.
///
/// iptables-nft has no such lock: the same change does not wait, and nothing is said.
#[test]
fn a_change_gets_through_though_somebody_holds_the_lock_most_of_the_time_and_he_is_named_legacy() {
    hogged(Variant::Legacy);
}

#[test]
fn a_lock_that_nft_does_not_have_delays_nothing_nft() {
    hogged(Variant::Nft);
}

fn hogged(variant: Variant) {
    if !end_to_end() {
        return;
    }
    let solo = Solo::new().unwrap();
    let agent = solo.start(&solo.agent(variant)).unwrap();
    let hog = hog(solo.host(), &solo.lock(), 5, 1).unwrap();
    let deadline = Instant::now() + PATIENCE;
    let pid = loop {
        if let Some(pid) = holder_of(&solo.lock()).unwrap() {
            break pid;
        }
        assert!(Instant::now() < deadline, "the lock is not held");
        std::thread::sleep(Duration::from_millis(5));
    };

    let Event::Put(key, value) = data::ssh_rule_replaced(solo.content()).unwrap() else { panic!("a put") };
    let began = Instant::now();
    solo.store().put(&key, &value).unwrap();
    let mut most = 0;
    let took = loop {
        most = most.max(children(agent.pid()).len());
        let kernel = Kernel::read(solo.host(), variant).unwrap();
        let in_force = |tool| kernel.about("2222:2230").iter().any(|line| line.starts_with(tool));
        if in_force("iptables ") && in_force("ip6tables ") {
            break began.elapsed();
        }
        assert!(began.elapsed() < PATIENCE, "{}", agent.log().unwrap());
    };
    drop(hog);
    let log = agent.stop().unwrap();
    let said: Vec<&str> = log.lines().filter(|line| line.contains("WARN") && line.contains("holder_pid")).collect();
    assert!(most <= 2, "{most} processes at once\n{log}");
    match variant {
        Variant::Legacy => {
            assert!(took > Duration::from_secs(3), "{took:?}: it did not wait at all\n{log}");
            assert!(took <= Duration::from_secs(12), "{took:?}\n{log}");
            assert_eq!(said.len(), 1, "{log}");
            for text in ["waited_ms=".to_owned(), format!("holder_pid={pid}"), "holder_comm=flock".to_owned()] {
                assert!(said[0].contains(&text), "{text}: {}", said[0]);
            }
        }
        Variant::Nft => {
            assert!(took < Duration::from_secs(3), "{took:?}\n{log}");
            assert_eq!(said, [""; 0], "{log}");
        }
    }
    println!("{variant:?}: in force after {took:?}; at most {most} processes");
}

/// Bar U2.c. A thousand changes of endpoints in a second, each of which changes chains, are at most ten writes of each
/// table, and the lock is held less than half of the time.
#[test]
fn a_thousand_changes_in_a_second_are_few_writes_legacy() {
    storm(Variant::Legacy);
}

#[test]
fn a_thousand_changes_in_a_second_are_few_writes_nft() {
    storm(Variant::Nft);
}

fn storm(variant: Variant) {
    const ENDPOINTS: usize = 100;
    const ROUNDS: usize = 10;
    if !end_to_end() {
        return;
    }
    let solo = Solo::new().unwrap();
    let ghosts = ghosts(solo.content(), "compute-1", ENDPOINTS).unwrap();
    solo.store().put_all(ghosts.clone()).unwrap();
    let wrappers = Wrappers::new().unwrap();
    let path = wrappers.path();
    let agent = solo.start(&Start { path_prefix: Some(&path), ..solo.agent(variant) }).unwrap();
    let before = wrappers.transactions(solo.host()).unwrap();

    // The last round leaves all of them in sg-b, the one before in no group.
    let jump = policy_jump(&Kernel::read(solo.host(), variant).unwrap(), &machine(&solo, Vm::B1).tap);
    let watcher = Watcher::start(&solo.lock()).unwrap();
    let began = Instant::now();
    for round in 1..=ROUNDS {
        let group = if round % 2 == 0 { SG_B } else { "none" };
        solo.store().put_all(ghosts.iter().map(|(key, value)| (key.clone(), value.replace(SG_A, group)))).unwrap();
        let due = began + Duration::from_millis(100) * u32::try_from(round).unwrap();
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
    }
    let sent = began.elapsed();
    let in_sg_b = |line: &&&str| line.contains("cali-tw-tapghost") && line.ends_with(&jump);
    let all = |kernel: &Kernel| kernel.about("tapghost").iter().filter(in_sg_b).count() == 2 * ENDPOINTS;
    wait_for(solo.host(), variant, "the last change of every endpoint", all).unwrap();
    let took = began.elapsed();
    // Half of the time is meant of five seconds.
    std::thread::sleep(Duration::from_secs(5).saturating_sub(took));
    let holds = watcher.finish().unwrap();
    let after = wrappers.transactions(solo.host()).unwrap();
    let log = agent.stop().unwrap();

    let writes: BTreeMap<&String, usize> =
        after.iter().map(|(table, count)| (table, count - before.get(table).unwrap_or(&0))).collect();
    let held: Duration = holds.iter().map(|hold| hold.until - hold.from).sum();
    println!("{variant:?}: sent in {sent:?}, in force after {took:?}, writes {writes:?}, lock held {held:?}");
    assert!(writes.values().any(|count| *count > 0), "nothing was written?\n{log}");
    assert!(writes.values().all(|count| *count <= 10), "{writes:?}\n{log}");
    assert!(held < took.max(Duration::from_secs(5)) / 2, "{held:?} of {took:?}\n{log}");
    if variant == Variant::Nft {
        assert!(holds.is_empty(), "nft has no lock: {holds:?}");
    }
}

/// Returns the jump to the policy of the group that the machine behind an interface is in.
fn policy_jump(kernel: &Kernel, tap: &str) -> String {
    let chain = format!("cali-tw-{tap} ");
    let rules = kernel.about(&chain);
    let jumps = rules.iter().filter_map(|rule| rule.rfind("-j cali-pi-").map(|at| rule[at..].to_owned()));
    let jumps: BTreeSet<String> = jumps.collect();
    assert_eq!(jumps.len(), 1, "{rules:?}");
    jumps.into_iter().next().unwrap()
}

fn machine(solo: &Solo, vm: Vm) -> Machine {
    solo.machines().into_iter().find(|machine| machine.addresses.contains(&vm.address().into())).unwrap()
}

/// Bar U2.d: somebody who reads all tables, changes a rule of his own and writes all tables back, over and over, without
/// the lock (felix#1325). Policy changes meanwhile. No rule is ever there twice, and when he stops the tables become
/// what they have to be within one refresh.
///
/// [`CLOBBERING`] in the ordinary run; `FELIX_CLOBBER` says how many seconds instead (`make clobber`: ten minutes).
#[test]
fn tables_survive_somebody_who_writes_back_what_he_read_long_ago_legacy() {
    clobbered(Variant::Legacy);
}

#[test]
fn tables_survive_somebody_who_writes_back_what_he_read_long_ago_nft() {
    clobbered(Variant::Nft);
}

const CLOBBERING: u64 = 15;

/// What one refresh may take, and the refresh interval that the agent has.
const REFRESH: Duration = Duration::from_secs(5);

const CLOBBER: &str = r#"
n=0
while :; do
  n=$((n + 1))
  for tool in iptables ip6tables; do
    $tool-$1-save 2>/dev/null > $2/$tool || continue
    sed -e '/foreign-/d' -e "s/^COMMIT/-A OUTPUT -m comment --comment foreign-$n -j RETURN\nCOMMIT/" $2/$tool > $2/$tool.new
    XTABLES_LOCKFILE=/dev/null $tool-$1-restore < $2/$tool.new 2>/dev/null && echo $n > $2/$tool.count
  done
done"#;

fn clobbered(variant: Variant) {
    if !end_to_end() {
        return;
    }
    let duration = std::env::var("FELIX_CLOBBER").map_or(CLOBBERING, |text| text.parse().unwrap());
    let solo = Solo::new().unwrap();
    let refresh = REFRESH.as_secs().to_string();
    let settings = [("FELIX_IPTABLESREFRESHINTERVAL", refresh.as_str())];
    let agent = solo.start(&Start { settings: &settings, ..solo.agent(variant) }).unwrap();
    let base = Kernel::read(solo.host(), variant).unwrap();
    let Event::Put(key, other) = data::ssh_rule_replaced(solo.content()).unwrap() else { panic!("a put") };

    let directory = solo.directory().to_str().unwrap();
    let clobber = solo.host().spawn(&["bash", "-c", CLOBBER, "clobber", variant.word(), directory]).unwrap();
    let end = Instant::now() + Duration::from_secs(duration);
    let (mut samples, mut listings) = (0, 0);
    while Instant::now() < end {
        let value = if samples % 2 == 0 { &other } else { &solo.content()[&key] };
        solo.store().put(&key, value).unwrap();
        std::thread::sleep(Duration::from_millis(100));
        samples += 1;
        let (twice, listed) = duplicates(solo.host(), variant);
        listings += listed;
        assert_eq!(twice, [""; 0], "sample {samples}\n{}", agent.log().unwrap());
    }
    drop(clobber);
    assert!(listings > 10, "only {listings} listings of {samples} samples can be relied on");
    // His last program may live a little longer than he.
    solo.store().put(&key, &solo.content()[&key]).unwrap();
    let rounds: Vec<u64> = ["iptables", "ip6tables"]
        .iter()
        .map(|tool| {
            std::fs::read_to_string(solo.directory().join(format!("{tool}.count"))).unwrap().trim().parse().unwrap()
        })
        .collect();
    assert!(rounds.iter().all(|rounds| *rounds > 10), "he clobbered only {rounds:?} times");
    let began = Instant::now();
    loop {
        let kernel = Kernel::read(solo.host(), variant).unwrap();
        let differences = ours(&base.differences(&kernel));
        if differences.is_empty() {
            break;
        }
        assert!(began.elapsed() < REFRESH + Duration::from_secs(3), "{differences:#?}\n{}", agent.log().unwrap());
        std::thread::sleep(Duration::from_millis(50));
    }
    println!("{variant:?}: clobbered {rounds:?} times, {samples} samples, right after {:?}", began.elapsed());
    assert_eq!(duplicates(solo.host(), variant).0, [""; 0]);
    agent.stop().unwrap();
}

/// Returns the differences that are not about the clobberer's own rules.
fn ours(differences: &[String]) -> Vec<String> {
    differences.iter().filter(|line| !line.contains("foreign-")).cloned().collect()
}

/// Returns the rules of ours that are more than once in a chain, and how many listings could be made.
fn duplicates(netns: &Netns, variant: Variant) -> (Vec<String>, usize) {
    let (mut twice, mut listings) = (Vec::new(), 0);
    for tool in ["iptables", "ip6tables"] {
        let before = generation(netns, variant);
        // The reader may meet a writer; of nf_tables he then prints twice what he began to read once more.
        let Ok(text) = netns.exec(&[&format!("{tool}-{}-save", variant.word())]) else { continue };
        if generation(netns, variant) != before {
            continue;
        }
        listings += 1;
        let mut seen = BTreeSet::new();
        for line in text.lines() {
            if line.starts_with('*') {
                seen.clear();
            }
            if line.contains("cali:") && !seen.insert(line) {
                twice.push(format!("{tool} {line}"));
            }
        }
    }
    (twice, listings)
}

/// Returns the number of the last transaction of nf_tables. A listing of a legacy table is one answer of the kernel.
fn generation(netns: &Netns, variant: Variant) -> Option<u32> {
    (variant == Variant::Nft).then(|| {
        let ask = || Native::new(Family::V4, Duration::from_secs(10)).generation();
        netns.enter(ask).unwrap()
    })
}

/// Bar U2.b: with 20,000 rules in the table, the agent never holds the lock for longer than a restore by hand has to that
/// writes a chain with the same rules. The bar is 1.2 times that on an idle machine (`make bench` has the exact figure); here the least of a
/// few is compared, with 1.3 times, on a machine that has other things to do.
#[test]
fn the_lock_is_held_no_longer_than_the_kernel_needs_ipv4_legacy() {
    shortly_held(Family::V4);
}

#[test]
fn the_lock_is_held_no_longer_than_the_kernel_needs_ipv6_legacy() {
    shortly_held(Family::V6);
}

fn shortly_held(family: Family) {
    const GROUPS: usize = 100;
    const RULES: usize = 100;
    if !end_to_end() {
        return;
    }
    let tool = if family == Family::V4 { "iptables-legacy" } else { "ip6tables-legacy" };
    let solo = Solo::new().unwrap();
    solo.store().put_all(groups_of(solo.content(), family, GROUPS, RULES, 0).unwrap()).unwrap();
    let agent = solo.start(&solo.agent(Variant::Legacy)).unwrap();
    let count = format!("{tool}-save -t filter | grep -c ^-A");
    let rules = solo.host().sh(&count).unwrap().trim().parse::<usize>().unwrap();
    assert!(rules > 2 * GROUPS * RULES, "{rules} rules");

    let (mut ours, mut floor) = (Vec::new(), Vec::new());
    let enough = |ours: &[Duration], floor: &[Duration]| {
        let (Some(ours), Some(floor)) = (ours.iter().min(), floor.iter().min()) else { return false };
        *ours <= *floor * 13 / 10 + Duration::from_millis(2)
    };
    for round in 1..=25 {
        let watcher = Watcher::start(&solo.lock()).unwrap();
        solo.store().put_all(groups_of(solo.content(), family, 1, RULES, round).unwrap()).unwrap();
        let first_rule =
            if family == Family::V4 { format!("198.51.{round}.") } else { format!("2001:db8:{round}::/64") };
        wait_for(solo.host(), Variant::Legacy, "the changed rule", |kernel| kernel.mentions(&first_rule)).unwrap();
        ours.push(longest(&watcher.finish().unwrap()));

        // The same chain under another name. Its text is made before the lock is watched.
        let text = solo.directory().join("by-hand");
        let chain = solo.host().sh(&chain_with(tool, &first_rule)).unwrap();
        let lines = chain.lines().count();
        // Two of each, without the return at the end.
        assert_eq!(lines, 2 * RULES - 1, "rules in the chain");
        let renamed = chain.lines().map(|line| {
            let (_, rest) = line["-A ".len()..].split_once(' ').unwrap();
            format!("-A by-hand {rest}\n")
        });
        let renamed: String = renamed.collect();
        std::fs::write(&text, format!("*filter\n:by-hand - [0:0]\n{renamed}COMMIT\n")).unwrap();
        let watcher = Watcher::start(&solo.lock()).unwrap();
        let by_hand = format!(
            "XTABLES_LOCKFILE={} {tool}-restore --noflush --wait 10 < {}",
            solo.lock().display(),
            text.display()
        );
        solo.host().sh(&by_hand).unwrap();
        floor.push(longest(&watcher.finish().unwrap()));
        if round >= 3 && enough(&ours, &floor) {
            break;
        }
    }
    let log = agent.stop().unwrap();
    println!("{family}, {rules} rules: lock held for {ours:?}; by hand for {floor:?}");
    assert!(enough(&ours, &floor), "{ours:?} where {floor:?} is needed\n{log}");
}

/// Returns the command that prints the rules of the chain that has a text.
fn chain_with(tool: &str, text: &str) -> String {
    format!(
        "saved=$({tool}-save -t filter)
         chain=$(printf '%s\n' \"$saved\" | grep -F -- '{text}' | head -1 | cut -d' ' -f2)
         printf '%s\n' \"$saved\" | grep \"^-A $chain \""
    )
}

fn longest(holds: &[Hold]) -> Duration {
    holds.iter().map(|hold| hold.until - hold.from).max().unwrap_or_default()
}
