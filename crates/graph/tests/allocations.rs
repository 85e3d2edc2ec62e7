//! A change that concerns no set does not call the allocator (performance.md G3). A file of its own,
//! because it counts what the whole process allocates.

use std::alloc::System;

use graph::{Graph, MemberIndex};
use model::{Labels, Name, Update};
use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};
use testkit::build::{policy, profile_labels, selector, wep};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// How often the allocator is asked for memory meanwhile.
fn allocations(work: impl FnOnce()) -> usize {
    let before = ALLOCATOR.stats();
    work();
    let after = ALLOCATOR.stats();
    after.allocations + after.reallocations - before.allocations - before.reallocations
}

/// A remote machine, one of many, with a label that nobody asks for.
fn machine(n: u32, colour: u32) -> Update {
    let address = format!("10.1.{}.{}", n >> 8, n & 255);
    wep(&format!("h2/o/ns/vm-{n}/e"))
        .label(&format!("sg-{}", n % 50))
        .label(&format!("sg-{}", n % 7))
        .label(&format!("colour={colour}"))
        .profile(&format!("p{}", n % 20))
        .port("http/tcp/80")
        .ip(&address)
        .build()
}

/// Steps through machines and colours without a pattern that any list could follow.
fn dice(state: &mut u64) -> u32 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    (*state >> 33) as u32
}

const MACHINES: u32 = 2_000;

// One test for both, because tests run side by side.
#[test]
fn a_label_change_that_changes_no_set_allocates_nothing() {
    let mut state = 7;
    let mut change = |range: u32| machine(dice(&mut state) % MACHINES, dice(&mut state) % range);

    let mut index = MemberIndex::default();
    for i in 0..200 {
        index.need(i, &selector(&format!("has(sg-{i})")));
        index.announce(i);
    }
    let mut graph = Graph::new("h1".into());
    graph.apply(policy("np/ns/web").selector("has(sg-1)").ingress("allow from has(sg-2)").build());
    graph.apply(wep("h1/o/ns/local/e").label("sg-1").ip("10.255.0.1").build());
    for n in 0..20 {
        graph.apply(profile_labels(&format!("p{n}"), "inherited=yes"));
    }
    let follow = |index: &mut MemberIndex, update: &Update| {
        let Update::WorkloadEndpoint(key, value) = update else { panic!("not an endpoint") };
        index.on_endpoint(key, value.as_deref());
        index.changes().count()
    };
    for n in 0..MACHINES {
        let update = machine(n, 0);
        follow(&mut index, &update);
        graph.apply(update);
    }
    graph.take_batch();

    // One machine after the other, and each time a colour that nobody else has.
    let one = |n: u32| machine(n % 3, 1_000_000 + n);
    for n in 0..20_000 {
        let update = one(n);
        follow(&mut index, &update);
        graph.apply(update);
    }
    let updates: Vec<Update> = (20_000..25_000).map(one).collect();
    let mut changes = 0;
    let count = allocations(|| changes = updates.iter().map(|update| follow(&mut index, update)).sum());
    assert_eq!((count, changes), (0, 0), "index, one machine");
    assert_eq!(allocations(|| updates.into_iter().for_each(|update| graph.apply(update))), 0, "graph, one machine");

    // Any machine, and a few colours that many share, as many as there are machines, and a new one each
    // time. Now and then a list becomes longer than it ever was: less than once in a hundred changes.
    for range in [5, MACHINES, u32::MAX] {
        for _ in 0..20_000 {
            let update = change(range);
            follow(&mut index, &update);
            graph.apply(update);
        }
        let updates: Vec<Update> = (0..5_000).map(|_| change(range)).collect();
        let mut changes = 0;
        let count = allocations(|| changes = updates.iter().map(|update| follow(&mut index, update)).sum());
        assert!(count < 50 && changes == 0, "index, colours below {range}: {count} allocations, {changes} changes");
        let count = allocations(|| updates.into_iter().for_each(|update| graph.apply(update)));
        assert!(count < 50, "graph, colours below {range}: {count} allocations");
        assert!(graph.take_batch().is_empty());
    }

    // The labels of a profile that nobody asks for.
    let name = Name::from("p3");
    let labels = |n: u32| -> Labels { [("inherited", n.to_string().as_str())].into_iter().collect() };
    let all: Vec<Labels> = (0..200).map(labels).collect();
    let mut round = || all.iter().for_each(|labels| index.on_profile_labels(&name, Some(labels)));
    round();
    assert_eq!(allocations(round), 0, "labels of a profile");
}
