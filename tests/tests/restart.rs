//! A restart with nothing changed: writes nothing, loses no packet of a 1 ms stream and lets no forbidden one through
//! (I5, bars U1.b and U20.a), also if etcd is slow or the first list is cut half-way, twice. Until the list is complete
//! nothing is deleted, because nothing is written (U20.c).
#![allow(clippy::unwrap_used, reason = "a test that meets something unexpected fails")]
#![allow(clippy::print_stdout, reason = "what was measured is for whoever asks with --nocapture")]

use std::time::{Duration, Instant};

use felix_tests::agent::{Agent, Start, Variant, end_to_end};
use felix_tests::bed::{Bed, Host, Place};
use felix_tests::data::{PORTS_UP, content, dual_stack};
use felix_tests::kernel::Kernel;
use felix_tests::proxy::Proxy;
use felix_tests::solo::{Solo, ghosts, groups};
use felix_tests::table::{become_as_expected, table};
use felix_tests::traffic::{ALLOWED, FORBIDDEN, Outcome, Traffic};
use felix_tests::watch::{Notifications, Wrappers};
use model::Family;

/// How long a start may take, with everything else that runs beside the test.
const PATIENCE: Duration = Duration::from_secs(60);

/// Machines of another host.
const OTHERS: usize = 3000;

/// What is between the agent and etcd while it starts again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trouble {
    None,
    /// Every answer takes half a second.
    Slow,
    /// The connection ends in the middle of the first list, twice.
    Cut,
}

#[test]
fn a_restart_writes_nothing_loses_nothing_and_leaks_nothing_legacy() {
    restart(Variant::Legacy, Trouble::None);
}

#[test]
fn a_restart_writes_nothing_loses_nothing_and_leaks_nothing_nft() {
    restart(Variant::Nft, Trouble::None);
}

#[test]
fn a_restart_with_a_slow_etcd_writes_nothing_loses_nothing_and_leaks_nothing_legacy() {
    restart(Variant::Legacy, Trouble::Slow);
}

#[test]
fn a_restart_with_a_slow_etcd_writes_nothing_loses_nothing_and_leaks_nothing_nft() {
    restart(Variant::Nft, Trouble::Slow);
}

#[test]
fn a_restart_with_the_first_list_cut_twice_writes_nothing_loses_nothing_and_leaks_nothing_legacy() {
    restart(Variant::Legacy, Trouble::Cut);
}

#[test]
fn a_restart_with_the_first_list_cut_twice_writes_nothing_loses_nothing_and_leaks_nothing_nft() {
    restart(Variant::Nft, Trouble::Cut);
}

fn restart(variant: Variant, trouble: Trouble) {
    if !end_to_end() {
        return;
    }
    let content = dual_stack(&content(PORTS_UP).unwrap()).unwrap();
    let bed = Bed::new(&content).unwrap();
    bed.store().load(&content).unwrap();
    // So that a list takes a while: several pages, and sets of thousands of members.
    let others = ghosts(&content, "compute-9", OTHERS).unwrap();
    bed.store().put_all(others).unwrap();
    let [first, _second] = Host::BOTH.map(|host| bed.start_agent(host, variant).unwrap());
    for family in Family::BOTH {
        become_as_expected(&bed, family, &table(), PATIENCE).unwrap();
    }

    let host = bed.host(Host::Compute1);
    let before = Kernel::read(host, variant).unwrap();
    let wrappers = Wrappers::new().unwrap();
    let notifications = Notifications::start(host).unwrap();
    let traffic = Traffic::start(&bed, ALLOWED, FORBIDDEN).unwrap();

    let proxy = bed.fabric().proxy().unwrap();
    match trouble {
        Trouble::None => {}
        Trouble::Slow => proxy.delay(Duration::from_millis(500)),
        Trouble::Cut => proxy.cut_after(half_of_a_start(&bed, variant, &proxy), 2),
    }
    first.stop().unwrap();
    let path = wrappers.path();
    let start = Start { path_prefix: Some(&path), etcd: proxy.endpoint(), ..bed.agent(Host::Compute1, variant) };
    let again = Agent::start(&start).unwrap();
    let line = again.await_line("batch applied", PATIENCE).unwrap();
    assert_eq!(proxy.cuts(), if trouble == Trouble::Cut { 2 } else { 0 }, "{}", again.log().unwrap());
    // What it does of its own accord after the first batch belongs to the restart.
    traffic.run_for(Duration::from_secs(2)).unwrap();

    let Outcome { losses, leaks, .. } = traffic.finish().unwrap();
    let notifications = notifications.finish().unwrap();
    let after = Kernel::read(host, variant).unwrap();
    let log = again.stop().unwrap();
    assert_eq!(losses, [""; 0], "{log}");
    assert_eq!(leaks, [""; 0], "{log}");
    assert_eq!(wrappers.writes(host).unwrap(), [""; 0], "{log}");
    assert_eq!(notifications, [""; 0], "{log}");
    assert_eq!(before.differences(&after), [""; 0], "{log}");
    assert_eq!(before.seeds(), after.seeds(), "{log}");
    assert!(line.contains("writes=0"), "{line}\n{log}");
    // The wrappers have been used at all.
    let saves = format!("{}-save", variant.word());
    assert!(!wrappers.calls(host).unwrap().is_empty(), "no call of a tool, not even {saves}:\n{log}");
}

/// Bar U1.b: a restart with nothing changed has everything in force 500 ms after the time at the latest that it takes to
/// read the kernel back, which the operator's tools show in the same run; that it writes nothing is what the tests above
/// are about. From the start of the process to its own word. An agent that is not optimised may take three times as long.
#[test]
fn a_restart_is_in_sync_half_a_second_after_the_kernel_can_be_read_legacy() {
    in_sync_soon(Variant::Legacy);
}

#[test]
fn a_restart_is_in_sync_half_a_second_after_the_kernel_can_be_read_nft() {
    in_sync_soon(Variant::Nft);
}

fn in_sync_soon(variant: Variant) {
    const ATTEMPTS: usize = 3;
    const IN_SYNC: &str = "in sync: everything wanted is in force";
    const BAR: Duration = Duration::from_millis(if cfg!(debug_assertions) { 3 * 500 } else { 500 });
    if !end_to_end() {
        return;
    }
    let solo = Solo::new().unwrap();
    solo.store().put_all(groups(solo.content(), 20, 100, 0).unwrap()).unwrap();
    solo.store().put_all(ghosts(solo.content(), "compute-9", 500).unwrap()).unwrap();
    solo.start(&solo.agent(variant)).unwrap().stop().unwrap();
    let before = Kernel::read(solo.host(), variant).unwrap();
    assert!(before.sizes().1 > 2 * 20 * 100, "{:?}", before.sizes());
    let (mut measured, mut last) = (Vec::new(), String::new());
    for _ in 0..ATTEMPTS {
        let began = Instant::now();
        Kernel::read(solo.host(), variant).unwrap();
        let floor = began.elapsed();
        let began = Instant::now();
        let again = Agent::start(&solo.agent(variant)).unwrap();
        again.await_line(IN_SYNC, PATIENCE).unwrap();
        let took = began.elapsed();
        let log = again.stop().unwrap();
        let first = log.lines().find(|line| line.contains("batch applied")).unwrap();
        assert!(first.contains("writes=0"), "{log}");
        measured.push((took, floor));
        last = log;
        if took <= floor * 13 / 10 + BAR {
            break;
        }
    }
    println!("{variant:?}: in sync after, read by hand: {measured:?}");
    let (took, floor) = measured.last().unwrap();
    assert!(*took <= *floor * 13 / 10 + BAR, "{measured:?}\n{last}");
}

/// Returns half of what etcd sends to an agent on the connection with the most, from its start to its first batch: that
/// of an agent on a host without machines, which wants the same lists.
fn half_of_a_start(bed: &Bed, variant: Variant, proxy: &Proxy) -> u64 {
    let netns = bed.netns(Place::Border);
    let start = Start { netns, host: "border", etcd: proxy.endpoint(), ..bed.agent(Host::Compute1, variant) };
    let agent = Agent::start(&start).unwrap();
    agent.await_line("batch applied", PATIENCE).unwrap();
    agent.stop().unwrap();
    proxy.most_sent() / 2
}
