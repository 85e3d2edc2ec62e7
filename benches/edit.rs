//! G5: from an etcd write to a rule in force, with real etcd, the real agent and a real stream of packets.
//!
//! A host namespace runs etcd and the agent; two workloads hang off it. One workload sends datagrams to a port that
//! no rule allows; a rule is edited in etcd so that it does; the time runs from the write until the first datagram
//! arrives at the other workload. So what is measured is what an operator cares about: packets judged by the new
//! rule, not some text in a table. The sender's pace, a tenth of a millisecond, is part of the figure.

use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use testkit::etcd::Etcd;
use testkit::netns::{Netns, in_new_netns};

use crate::guests::{guest, listen, send};
use crate::results::Results;
use crate::world::{self, Endpoint, LIMIT, Plan, Start, Stored, Writer, allow, policy};
use crate::{floor, foreign};

const SENDER: Ipv4Addr = Ipv4Addr::new(10, 65, 0, 2);
const RECEIVER: Ipv4Addr = Ipv4Addr::new(10, 65, 0, 3);
/// The interval within which a foreign change must be repaired here.
const REFRESH: Duration = Duration::from_secs(18);

/// Measures one variant with a table of about `rules` rules, after its floor.
pub(crate) fn measure(plan: &Plan, variant: &str, rules: usize, results: &mut Results) -> Result<()> {
    let rounds = plan.part_of(50, 10);
    floor::tables(variant, rules, rounds, results)?;
    in_new_netns(|| run(plan, variant, rules, rounds, results))
}

fn run(plan: &Plan, variant: &str, rules: usize, rounds: usize, results: &mut Results) -> Result<()> {
    let etcd = Etcd::start()?;
    let sender = guest("send", SENDER)?;
    let receiver = guest("recv", RECEIVER)?;
    etcd.put_all(documents(rules)?)?;
    let name = format!("edit/{variant}/{rules}");
    let mut agent = Start::new(&plan.agent, variant).intervals_divided_by(10).run(&etcd)?;
    let took = agent.in_sync(LIMIT)?;
    results.time(format!("{name}/start-to-in-sync"), took);
    world::check_rules(variant, rules, results, &format!("{name}/rules"))?;
    let before = agent.batches(0).len();
    let outcome = edit_and_watch(&etcd, &name, rounds, [&sender, &receiver], results);
    outcome.with_context(|| agent.last_words())?;
    world::record_stages(&name, &agent.batches(before), results);
    let route = format!("{RECEIVER} dev tap-recv");
    // A second for what comes after the interval.
    foreign::check(&mut agent, variant, Some(&route), REFRESH + Duration::from_secs(1), &name, results)?;
    agent.stop().map(drop)
}

fn edit_and_watch(
    etcd: &Etcd,
    name: &str,
    rounds: usize,
    [sender, receiver]: [&Netns; 2],
    results: &mut Results,
) -> Result<()> {
    let mut writer = Writer::new(etcd)?;
    let target = AtomicU16::new(0);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let stream = scope.spawn(|| sender.enter(|| send(RECEIVER, &target, &stop)));
        let outcome = (|| {
            for round in 0..rounds as u16 {
                let port = 20_000 + round;
                let (listening, first) = (mpsc::channel(), mpsc::channel());
                let listener = scope.spawn({
                    let (ready, seen) = (listening.0, first.0);
                    move || receiver.enter(|| listen(port, &ready, &seen))
                });
                listening.1.recv_timeout(LIMIT).context("the listener did not start")?;
                target.store(port, Ordering::Relaxed);
                // Long enough for many datagrams: none may arrive before the rule is written. Long enough, too, for
                // the agent to have rested after the change before.
                std::thread::sleep(Duration::from_millis(150));
                ensure!(first.1.try_recv().is_err(), "a datagram arrived before any rule allowed it");
                let begun = Instant::now();
                let written = writer.put(&edited(port))?;
                let arrived = first.1.recv_timeout(LIMIT).context("no datagram arrived after the rule was written")?;
                results.time(format!("{name}/put-to-packet"), arrived.saturating_duration_since(written));
                results.time(format!("{name}/put-begun-to-packet"), arrived - begun);
                if listener.join().is_err() {
                    bail!("the listener failed");
                }
            }
            Ok(())
        })();
        stop.store(true, Ordering::Relaxed);
        if stream.join().is_err() {
            bail!("the sender failed");
        }
        outcome
    })
}

/// The policy of which one rule is edited; the other four stay.
fn edited(port: u16) -> Stored {
    let rules: Vec<_> = [port, 40_000, 40_002, 40_004, 40_006].into_iter().map(|port| allow(port, None)).collect();
    policy("edited", "role == 'receiver'", &rules)
}

fn documents(rules: usize) -> Result<Vec<Stored>> {
    let endpoint = |name, role: &str, address| {
        let labels = vec![("role".to_owned(), role.to_owned())];
        Endpoint { host: "bench", name, labels, address }.stored()
    };
    // One set, so that a member can be taken out of it.
    let mut all = [world::base(), world::filling(rules, 1)?].concat();
    all.extend([
        world::egress("role == 'sender'"),
        edited(19_999),
        endpoint("send", "sender", SENDER),
        endpoint("recv", "receiver", RECEIVER),
    ]);
    Ok(all)
}
