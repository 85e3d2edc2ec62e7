//! Replays what Neutron wrote, step by step, to agents that live through all of it, and compares the kernels that they
//! keep with those that agents make which are started at that step (I1).
//!
//! Every step is one of the vectors 00 to 46: floating IPs, every shape of rule, rules that the data model rejects,
//! ports that move between groups, dual stack, QoS, live migration in both orders, damaged values and their repair.
#![allow(clippy::unwrap_used, reason = "a test that meets something unexpected fails")]

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use felix_tests::agent::{Agent, Start, Variant, end_to_end};
use felix_tests::bed::{Fabric, Host};
use felix_tests::data::{self, Content, Event};
use felix_tests::kernel::Kernel;
use testkit::netns::Netns;

/// How long a host may take to be as a fresh one is.
const PATIENCE: Duration = Duration::from_secs(20);

#[test]
fn after_every_step_a_long_lived_agent_has_made_what_a_fresh_one_makes_legacy() {
    replay(Variant::Legacy);
}

#[test]
fn after_every_step_a_long_lived_agent_has_made_what_a_fresh_one_makes_nft() {
    replay(Variant::Nft);
}

fn replay(variant: Variant) {
    if !end_to_end() {
        return;
    }
    let fabric = Fabric::new().unwrap();
    let mut hosts = Host::BOTH.map(|host| {
        let netns = fabric.host(host.name(), host.number()).unwrap();
        let agent = start(&fabric, &netns, host, variant);
        (host, netns, agent, BTreeSet::new())
    });
    let mut content = Content::new();
    let mut compared = 0;
    for step in data::steps().unwrap() {
        let events = data::events(&step.name).unwrap();
        for event in &events {
            apply(&mut content, event);
        }
        // Nova makes a tap before the endpoint is up and removes it after the endpoint is gone.
        for (host, netns, _, taps) in &hosts {
            add_taps(netns, taps_of(&content, *host).difference(taps));
        }
        for event in &events {
            fabric.store().apply(event).unwrap();
        }
        for (host, netns, _, taps) in &mut hosts {
            let wanted = taps_of(&content, *host);
            remove_taps(netns, taps.difference(&wanted));
            *taps = wanted;
        }
        let ready = content.keys().any(|key| key.contains("/clusterinformations/"));
        std::thread::scope(|scope| {
            // The kernel takes its time to remove a namespace: never the same address twice.
            for (number, (host, netns, agent, taps)) in (21 + 2 * compared..).zip(&mut hosts) {
                let (fabric, step) = (&fabric, &step);
                let expected = Expected { ready, chains: chains_of(&content, *host) };
                scope.spawn(move || {
                    let fresh = fabric.host("fresh", number).unwrap();
                    add_taps(&fresh, taps.iter());
                    let fresh_agent = start(fabric, &fresh, *host, variant);
                    if let Err(text) = settle((netns, agent), (&fresh, fresh_agent), variant, &expected) {
                        panic!("step {} ({}) on {} with {variant:?}: {text}", step.name, step.what, host.name());
                    }
                });
            }
        });
        compared += 1;
    }
    assert_eq!(compared, 47, "the vectors are complete");
    for (_, _, agent, _) in hosts {
        agent.stop().unwrap();
    }
}

fn start(fabric: &Fabric, netns: &Netns, host: Host, variant: Variant) -> Agent {
    let etcd = fabric.store().endpoint();
    Agent::start(&Start { netns, host: host.name(), etcd, variant, path_prefix: None, settings: &[], before: "" })
        .unwrap()
}

fn apply(content: &mut Content, event: &Event) {
    match event {
        Event::Put(key, value) => content.insert(key.clone(), value.clone()),
        Event::Delete(key) => content.remove(key),
    };
}

/// Returns the taps that Nova makes.
fn taps_of(content: &Content, host: Host) -> BTreeSet<String> {
    let machines = data::machines(content).into_iter();
    machines.filter(|machine| machine.host == host.name()).map(|machine| machine.tap).collect()
}

/// Returns what the kernel of a host that is as `content` says has of each tap: a chain, or none of a damaged endpoint.
fn chains_of(content: &Content, host: Host) -> Vec<(String, bool)> {
    let machines = data::machines(content).into_iter().filter(|machine| machine.host == host.name());
    machines.map(|machine| (format!(" cali-tw-{} ", machine.tap), !machine.damaged)).collect()
}

/// Makes taps whose other end, the machine, is up too.
fn add_taps<'a>(netns: &Netns, taps: impl Iterator<Item = &'a String>) {
    for tap in taps {
        let machine = tap.replace("tap", "vm");
        netns.veth(tap, netns, &machine).unwrap();
        netns.sh(&format!("ip link set {machine} up; ip link set {tap} up")).unwrap();
    }
}

fn remove_taps<'a>(netns: &Netns, taps: impl Iterator<Item = &'a String>) {
    for tap in taps {
        netns.exec(&["ip", "link", "del", tap]).unwrap();
    }
}

/// What must be in both kernels, so that not both of them are wrong.
struct Expected {
    /// Whether the datastore is ready; nothing may be written before.
    ready: bool,
    /// Names of chains, and whether they are there.
    chains: Vec<(String, bool)>,
}

/// Waits until both kernels are the same, twice in a row.
fn settle(
    (long, agent): (&Netns, &mut Agent),
    (fresh, mut fresh_agent): (&Netns, Agent),
    variant: Variant,
    expected: &Expected,
) -> Result<(), String> {
    let deadline = Instant::now() + PATIENCE;
    let mut equal = 0;
    loop {
        let kernels = [long, fresh].map(|netns| Kernel::read(netns, variant).map_err(|error| format!("{error:#}")));
        let [kept, made] = kernels;
        let (kept, made) = (kept?, made?);
        for (name, agent) in [("long-lived", &mut *agent), ("fresh", &mut fresh_agent)] {
            if !agent.is_running().map_err(|error| error.to_string())? {
                return Err(format!("the {name} agent has ended:\n{}", agent.log().unwrap_or_default()));
            }
        }
        // A neighbour entry stays until its interface goes (host.md 11); without a route nothing uses it.
        let mut differences = made.differences(&kept);
        differences.retain(|line| !line.starts_with("+ neigh "));
        let started = fresh_agent.log().is_ok_and(|log| !log.is_empty());
        let complete = started
            && made.is_empty() != expected.ready
            && expected.chains.iter().all(|(chain, there)| made.mentions(chain) == *there);
        equal = if differences.is_empty() && complete { equal + 1 } else { 0 };
        if equal == 2 {
            return fresh_agent.stop().map(drop).map_err(|error| format!("{error:#}"));
        }
        if Instant::now() > deadline {
            return Err(format!(
                "after {PATIENCE:?} the long-lived agent has not made what a fresh one makes (-: only fresh, +: only \
                 long-lived):\n{}\n\nlog of the long-lived agent:\n{}\nlog of the fresh agent:\n{}",
                differences.join("\n"),
                agent.log().unwrap_or_default(),
                fresh_agent.log().unwrap_or_default()
            ));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}
