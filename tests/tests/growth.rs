//! Sets that grow beyond their size while packets depend on them.
#![allow(clippy::unwrap_used, reason = "a test that meets something unexpected fails")]

use std::time::{Duration, Instant};

use felix_tests::agent::{Agent, Start, Variant, end_to_end};
use felix_tests::bed::{Bed, Host, Place, Vm};
use felix_tests::data::{PORTS_UP, SG_A, content, dual_stack, policy_key};
use felix_tests::kernel::Kernel;
use felix_tests::solo::ghosts;
use felix_tests::table::{become_as_expected, table};
use felix_tests::traffic::{Outcome, Pair, Traffic};
use model::Family;
use testkit::packets;

const PATIENCE: Duration = Duration::from_secs(60);

/// `MaxIpsetSize`, and what sets may grow to: four times that.
const SIZE: usize = 64;
const CEILING: usize = 4 * SIZE;

const ALLOWED: &[Pair] = &[(Vm::A2, Vm::A1), (Vm::B2, Vm::B1)];
const FORBIDDEN: &[Pair] = &[(Vm::A1, Vm::B1), (Vm::B2, Vm::A1)];

/// Bar U3.b. The set of group sg-a grows in steps beyond `MaxIpsetSize`: no packet that depends on it is lost, so none
/// saw it empty, and it has become larger. Beyond the ceiling what names it is closed, one error names the set and the
/// policies, and the rest goes on. With less in it all is as before.
#[test]
fn a_set_grows_without_a_packet_noticing_and_beyond_the_ceiling_only_its_rules_are_closed_legacy() {
    grow(Variant::Legacy);
}

#[test]
fn a_set_grows_without_a_packet_noticing_and_beyond_the_ceiling_only_its_rules_are_closed_nft() {
    grow(Variant::Nft);
}

fn grow(variant: Variant) {
    if !end_to_end() {
        return;
    }
    let content = dual_stack(&content(PORTS_UP).unwrap()).unwrap();
    let bed = Bed::new(&content).unwrap();
    bed.store().load(&content).unwrap();
    let size = SIZE.to_string();
    let settings = [("FELIX_MAXIPSETSIZE", size.as_str())];
    let [first, second] =
        Host::BOTH.map(|host| Agent::start(&Start { settings: &settings, ..bed.agent(host, variant) }).unwrap());
    for family in Family::BOTH {
        become_as_expected(&bed, family, &table(), PATIENCE).unwrap();
    }
    let host = bed.host(Host::Compute1);
    let ghosts = ghosts(&content, "compute-9", CEILING + 40).unwrap();

    let traffic = Traffic::start(&bed, ALLOWED, FORBIDDEN).unwrap();
    let mut there = 0;
    while there + 20 < CEILING {
        bed.store().put_all(ghosts[there..there + 20].iter().cloned()).unwrap();
        there += 20;
        // Some steps are seen one by one, some together.
        std::thread::sleep(Duration::from_millis(if there % 60 == 0 { 400 } else { 40 }));
    }
    let set_of = |kernel: &Kernel, address: &str| {
        let lines = kernel.about(" has ");
        let line = lines.iter().find(|line| line.ends_with(&format!(" has {address}")))?;
        line.split(' ').nth(1).map(str::to_owned)
    };
    let last =
        [format!("10.67.{}.{}", (there - 1) / 200, (there - 1) % 200 + 50), format!("fd00:65::67:{:x}", there - 1)];
    let deadline = Instant::now() + PATIENCE;
    let kernel = loop {
        let kernel = Kernel::read(host, variant).unwrap();
        if last.iter().all(|address| set_of(&kernel, address).is_some()) {
            break kernel;
        }
        assert!(Instant::now() < deadline, "{}", first.log().unwrap());
    };
    let sets = last.each_ref().map(|address| set_of(&kernel, address).unwrap());
    for set in &sets {
        assert!(
            kernel.mentions(&format!("set {set} hash:net")) && kernel.mentions(&format!("maxelem {CEILING}")),
            "{set}"
        );
    }
    let Outcome { losses, leaks, packets } = traffic.finish().unwrap();
    let log = first.log().unwrap();
    assert_eq!(losses, [""; 0], "{log}");
    assert_eq!(leaks, [""; 0], "{log}");
    assert!(packets > 5000);
    assert!(!log.contains(" ERROR ") && !log.contains(" WARN "), "{log}");

    // Beyond the ceiling.
    bed.store().put_all(ghosts[there..].iter().cloned()).unwrap();
    let ping = |from: Vm, to: Vm, family: Family| {
        let address = bed.address(Place::Vm(to), family).unwrap();
        bed.machine(from).1.enter(|| packets::echo(address, Duration::from_millis(500)).unwrap())
    };
    await_pings(&first, |family| ping(Vm::A2, Vm::A1, family) == packets::Outcome::Drop);
    for family in Family::BOTH {
        assert_eq!(ping(Vm::B2, Vm::B1, family), packets::Outcome::Ok, "{family}");
    }
    let log = first.log().unwrap();
    for set in &sets {
        let said: Vec<&str> =
            log.lines().filter(|line| line.contains(" ERROR ") && line.contains(set.as_str())).collect();
        assert_eq!(said.len(), 1, "{set}: {said:#?}\n{log}");
        // The selector of the set is that of this rule.
        let rules = ingress_rules_from(&content[&policy_key(SG_A)], SG_A);
        let named = rules.iter().any(|rule| said[0].contains(&format!("ossg.default.{SG_A} ingress rule {rule}")));
        assert!(named, "no policy, or no rule of {rules:?}: {}", said[0]);
    }
    // Everything else goes on.
    let key = &bed.machine(Vm::B1).0.key;
    bed.store().delete(key).unwrap();
    await_pings(&first, |family| ping(Vm::B2, Vm::B1, family) != packets::Outcome::Ok);
    bed.store().put(key, &content[key]).unwrap();
    await_pings(&first, |family| ping(Vm::B2, Vm::B1, family) == packets::Outcome::Ok);

    for (key, _) in &ghosts[40..] {
        bed.store().delete(key).unwrap();
    }
    await_pings(&first, |family| ping(Vm::A2, Vm::A1, family) == packets::Outcome::Ok);
    for agent in [first, second] {
        agent.stop().unwrap();
    }
}

/// Returns the places of the ingress rules of a policy whose source is a group.
fn ingress_rules_from(policy: &str, group: &str) -> Vec<usize> {
    let policy: serde_json::Value = serde_json::from_str(policy).unwrap();
    let rules = policy["spec"]["ingress"].as_array().unwrap().iter().enumerate();
    let from = rules.filter(|(_, rule)| rule["source"]["selector"].as_str().is_some_and(|text| text.contains(group)));
    from.map(|(place, _)| place).collect()
}

fn await_pings(agent: &Agent, as_wanted: impl Fn(Family) -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !Family::BOTH.into_iter().all(&as_wanted) {
        assert!(Instant::now() < deadline, "{}", agent.log().unwrap());
    }
}
