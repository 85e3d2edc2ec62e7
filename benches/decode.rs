//! From stored bytes to typed objects, and the small ones of performance.md 2.6.

use std::hint::black_box;
use std::time::Instant;

use anyhow::ensure;
use graph::Graph;
use model::convert::{Converter, Options};
use model::{ResourceKey, Selector, Update};
use testkit::documents::{self, Stored};
use testkit::workload::{self, Shape};

use crate::child::Allocator;
use crate::results::Results;

/// Updates that the datastore hands on at once.
const MESSAGE: usize = 500;

/// Documents between two looks at the clock: few enough that some stretch of them is not disturbed.
const STRETCH: usize = 200;

fn documents() -> [(&'static str, Vec<Stored>); 4] {
    [
        ("neutron-endpoint", (0..10_000).map(documents::neutron_endpoint).collect()),
        ("pod-15-labels", (0..10_000).map(documents::pod).collect()),
        ("security-group", (0..10_000).map(documents::security_group).collect()),
        ("network-set-1000", (0..200).map(|n| documents::network_set(n, 1_000)).collect()),
    ]
}

/// Decodes documents as the datastore does, and forgets what comes out.
fn decode(converter: &mut Converter, documents: &[Stored]) -> anyhow::Result<()> {
    let mut updates = Vec::with_capacity(MESSAGE);
    for (key, value) in documents {
        let complaints = converter.decode(key.as_bytes(), Some(value.as_bytes()), &mut updates);
        ensure!(complaints.is_some_and(|complaints| complaints.is_empty()), "not decoded: {key}");
    }
    ensure!(updates.len() == documents.len(), "{} updates of {} documents", updates.len(), documents.len());
    black_box(updates);
    Ok(())
}

/// Nanoseconds per document: the median and the minimum of all stretches of a few rounds.
pub(crate) fn time(results: &mut Results) -> anyhow::Result<()> {
    for (name, documents) in documents() {
        let mut converter = Converter::new(Options::default());
        for round in 0..5 {
            for stretch in documents.chunks(STRETCH) {
                let start = Instant::now();
                decode(&mut converter, stretch)?;
                let took = start.elapsed().as_secs_f64() * 1e9 / stretch.len() as f64;
                if round > 0 {
                    results.record(format!("decode/{name}"), "ns", took);
                }
            }
        }
    }
    Ok(())
}

/// Calls of the allocator per document, beside the list that the updates go to.
pub(crate) fn calls(allocator: Allocator, results: &mut Results) -> anyhow::Result<()> {
    for (name, documents) in documents() {
        let mut converter = Converter::new(Options::default());
        decode(&mut converter, &documents)?;
        let mut updates = Vec::with_capacity(2 * documents.len());
        let before = (allocator.calls)();
        for (key, value) in &documents {
            converter.decode(key.as_bytes(), Some(value.as_bytes()), &mut updates);
        }
        let calls = (allocator.calls)() - before;
        results.record(format!("decode/{name}/allocations"), "calls", calls as f64 / documents.len() as f64);
        let bytes: usize = documents.iter().map(|(_, value)| value.len()).sum();
        results.record(format!("decode/{name}/size"), "bytes", bytes as f64 / documents.len() as f64);
    }
    Ok(())
}

/// The snapshot of 250,000 endpoints as it lies in etcd: decoding alone, then decoding and calculation as the agent
/// does them, message by message.
pub(crate) fn cold_start(results: &mut Results) -> anyhow::Result<()> {
    let stored: Vec<Stored> =
        workload::snapshot(Shape::TAG_POLICIES_250K).filter_map(|update| documents::stored(&update)).collect();
    let bytes: usize = stored.iter().map(|(key, value)| key.len() + value.len()).sum();
    results.record("cold-start/250k-from-bytes/size", "MB", bytes as f64 / 1e6);

    let mut converter = Converter::new(Options::default());
    let start = Instant::now();
    run(&mut converter, &stored, |updates| {
        black_box(updates);
    });
    results.time("cold-start/250k-from-bytes/decode-alone", start.elapsed());

    let mut converter = Converter::new(Options::default());
    let mut graph = Graph::new(workload::HOST.into());
    let start = Instant::now();
    run(&mut converter, &stored, |updates| updates.for_each(|update| graph.apply(update)));
    let batch = graph.take_batch();
    results.time("cold-start/250k-from-bytes/decode-and-calculate", start.elapsed());
    let counts = [batch.sets_created.len(), batch.policies.len(), batch.profiles.len(), batch.endpoints.len()];
    ensure!(counts == [29, 10_000, 100, 200], "{counts:?} sets, policies, profiles and endpoints");
    Ok(())
}

fn run(converter: &mut Converter, stored: &[Stored], mut hand_on: impl FnMut(std::vec::Drain<'_, Update>)) {
    let mut updates = Vec::with_capacity(MESSAGE + 1);
    for (key, value) in stored {
        converter.decode(key.as_bytes(), Some(value.as_bytes()), &mut updates);
        if updates.len() >= MESSAGE {
            hand_on(updates.drain(..));
        }
    }
    hand_on(updates.drain(..));
}

/// Parsing of a selector and of keys (performance.md 2.6).
pub(crate) fn small(results: &mut Results) -> anyhow::Result<()> {
    const SELECTOR: &str = r#"! (a == "b"&&! c != "d") || !(a == "b" && !c != "d")"#;
    Selector::parse(SELECTOR)?;
    // Of these the agent reads the last kind only: the others are of the old data model.
    const KEYS: [&str; 4] = [
        "/calico/v1/host/ip-12-23-24-52.cloud.foo.bar.baz/workload/kubernetes/some-pod-name-12346/endpoint/eth0",
        "/calico/v1/host/ip-12-23-24-53.cloud.foo.bar.baz/wireguard",
        "/calico/v1/host/ip-12-23-24-52.cloud.foo.bar.baz/endpoint/eth0",
        "/calico/resources/v3/projectcalico.org/networkpolicies/default/projectcalico-default-allow",
    ];
    let [.., policy] = KEYS;
    ensure!(ResourceKey::parse(policy.as_bytes()).is_some(), "the key of the policy is not read");
    for _ in 0..200 {
        stretch(results, "small/selector-parse", || {
            black_box(Selector::parse(black_box(SELECTOR)).is_ok());
        });
        let mut turn = KEYS.iter().cycle();
        stretch(results, "small/key-parse-four-in-turn", || {
            black_box(turn.next().and_then(|key| ResourceKey::parse(black_box(key).as_bytes())));
        });
        stretch(results, "small/key-parse-policy", || {
            black_box(ResourceKey::parse(black_box(policy).as_bytes()));
        });
    }
    Ok(())
}

/// Records nanoseconds per call over some hundred calls.
fn stretch(results: &mut Results, name: &str, mut operation: impl FnMut()) {
    let start = Instant::now();
    for _ in 0..STRETCH {
        operation();
    }
    results.record(name, "ns", start.elapsed().as_secs_f64() * 1e9 / STRETCH as f64);
}
