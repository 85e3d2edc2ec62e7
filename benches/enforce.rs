//! From an etcd write to a rule in force: real etcd, the real agent, a real stream of packets.
//!
//! A host namespace runs etcd and the agent; two workloads hang off it. One workload sends datagrams to a port that
//! no rule allows; a rule is edited in etcd so that it does; the time runs from the write until the first datagram
//! arrives at the other workload. So what is measured is what an operator cares about: packets judged by the new
//! rule, not some text in a table.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use serde_json::{Value, json};
use testkit::etcd::Etcd;
use testkit::netns::{Netns, Process, in_new_netns};

use crate::results::Results;

const RESOURCES: &str = "/calico/resources/v3/projectcalico.org";
const SENDER: Ipv4Addr = Ipv4Addr::new(10, 65, 0, 2);
const RECEIVER: Ipv4Addr = Ipv4Addr::new(10, 65, 0, 3);
/// How long anything may take before the benchmark calls it broken.
const LIMIT: Duration = Duration::from_secs(30);

/// Measures one variant with a table of about `rules` rules that the agent itself programs.
pub(crate) fn measure(
    agent: &Path,
    variant: &str,
    rules: usize,
    rounds: u16,
    results: &mut Results,
) -> anyhow::Result<()> {
    in_new_netns(|| run(agent, variant, rules, rounds, results))
}

fn run(agent: &Path, variant: &str, rules: usize, rounds: u16, results: &mut Results) -> anyhow::Result<()> {
    let etcd = Etcd::start()?;
    let sender = workload("send", SENDER, "02:00:00:00:00:02")?;
    let receiver = workload("recv", RECEIVER, "02:00:00:00:00:03")?;
    etcd.put_all(documents(rules))?;

    let log = tempfile::NamedTempFile::new()?;
    let mut command = Command::new(agent);
    command
        .args(["--config-file", "/nonexistent/felix.cfg"])
        .env("FELIX_FELIXHOSTNAME", "bench")
        .env("FELIX_ETCDENDPOINTS", etcd.endpoint())
        .env("FELIX_IPTABLESBACKEND", variant)
        .env("FELIX_STATEDIRECTORY", "none")
        .stdin(Stdio::null())
        .stdout(log.reopen()?)
        .stderr(log.reopen()?);
    let start = Instant::now();
    let mut process = Process::start(&mut command)?;
    let outcome = edit_and_watch(&etcd, variant, rules, rounds, start, [&sender, &receiver], results);
    process.terminate(Duration::from_secs(5)).context("stopping the agent")?;
    outcome.with_context(|| {
        let text = std::fs::read_to_string(log.path()).unwrap_or_default();
        let tail: Vec<&str> = text.lines().rev().take(15).collect();
        format!("the agent said last: {}", tail.into_iter().rev().collect::<Vec<_>>().join("\n"))
    })
}

fn edit_and_watch(
    etcd: &Etcd,
    variant: &str,
    rules: usize,
    rounds: u16,
    start: Instant,
    [sender, receiver]: [&Netns; 2],
    results: &mut Results,
) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut client = runtime.block_on(etcd_client::Client::connect([etcd.endpoint()], None))?;
    let target = AtomicU16::new(0);
    let stop = AtomicBool::new(false);

    std::thread::scope(|scope| {
        let stream = scope.spawn(|| sender.enter(|| send(&target, &stop)));
        let outcome = (|| {
            for round in 0..=rounds {
                let port = 20_000 + round;
                let (listening, first) = (mpsc::channel(), mpsc::channel());
                let listener = scope.spawn({
                    let (ready, seen) = (listening.0, first.0);
                    move || receiver.enter(|| listen(port, &ready, &seen))
                });
                listening.1.recv_timeout(LIMIT).context("the listener did not start")?;
                target.store(port, Ordering::Relaxed);
                // Long enough for many datagrams: none may arrive before the rule is written.
                std::thread::sleep(Duration::from_millis(30));
                ensure!(first.1.try_recv().is_err(), "a datagram arrived before any rule allowed it");
                let begun = Instant::now();
                let key = format!("{RESOURCES}/networkpolicies/bench/edited");
                runtime.block_on(client.put(key, policy("edited", &[port]).to_string(), None))?;
                let written = Instant::now();
                let arrived = first.1.recv_timeout(LIMIT).context("no datagram arrived after the rule was written")?;
                if round == 0 {
                    // The first round also waits for the agent's start.
                    results.time(format!("enforce/{variant}/start-to-first-packet-{rules}"), arrived - start);
                } else {
                    let name = format!("enforce/{variant}/write-to-packet-{rules}");
                    results.time(name, arrived.saturating_duration_since(written));
                    let name = format!("enforce/{variant}/write-begun-to-packet-{rules}");
                    results.time(name, arrived - begun);
                }
                if listener.join().is_err() {
                    bail!("the listener failed");
                }
            }
            let saved = Command::new(format!("iptables-{variant}-save")).args(["-t", "filter"]).output()?;
            let count = String::from_utf8_lossy(&saved.stdout).lines().filter(|line| line.starts_with("-A")).count();
            results.record(format!("enforce/{variant}/rules-in-table-{rules}"), "count", count as f64);
            Ok(())
        })();
        stop.store(true, Ordering::Relaxed);
        if stream.join().is_err() {
            bail!("the sender failed");
        }
        outcome
    })
}

/// A network namespace with one interface, set up as a cloud's guest is: a /24 and a default route, nothing else.
fn workload(name: &str, address: Ipv4Addr, mac: &str) -> anyhow::Result<Netns> {
    let netns = Netns::new(name)?;
    let status = Command::new("ip")
        .args(["link", "add", &format!("tap-{name}"), "up", "type", "veth"])
        .args(["peer", "name", "eth0", "address", mac, "netns", netns.name()])
        .status()?;
    ensure!(status.success(), "cannot make the interface of workload {name}");
    netns.sh(&format!("ip link set eth0 up; ip addr add {address}/24 dev eth0; ip route add default via 10.65.0.1"))?;
    netns.await_up("eth0")?;
    Ok(netns)
}

/// Sends to whatever port is wanted, about ten times a millisecond.
fn send(target: &AtomicU16, stop: &AtomicBool) -> anyhow::Result<()> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    while !stop.load(Ordering::Relaxed) {
        let port = target.load(Ordering::Relaxed);
        if port != 0 {
            // Refused while nobody listens, unreachable until the agent has set the host up: both are fine.
            drop(socket.send_to(b"x", SocketAddr::from((RECEIVER, port))));
        }
        std::thread::sleep(Duration::from_micros(50));
    }
    Ok(())
}

fn listen(port: u16, ready: &mpsc::Sender<()>, seen: &mpsc::Sender<Instant>) -> anyhow::Result<()> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port))?;
    socket.set_read_timeout(Some(LIMIT))?;
    ready.send(())?;
    socket.recv_from(&mut [0; 16])?;
    seen.send(Instant::now())?;
    Ok(())
}

/// A policy that allows UDP to these ports, in the shape of the table's other rules.
fn policy(name: &str, ports: &[u16]) -> Value {
    let rules: Vec<Value> = ports
        .iter()
        .map(|port| json!({"action": "Allow", "protocol": "UDP", "destination": {"ports": [port, port + 1000]}}))
        .collect();
    json!({
        "kind": "NetworkPolicy", "apiVersion": "projectcalico.org/v3",
        "metadata": {"name": name, "namespace": "bench"},
        "spec": {"selector": "role == 'receiver'", "types": ["Ingress"], "order": 100, "ingress": rules},
    })
}

fn documents(rules: usize) -> Vec<(String, String)> {
    let mut all = vec![
        (
            format!("{RESOURCES}/clusterinformations/default"),
            json!({"metadata": {"name": "default"}, "spec": {"datastoreReady": true}}),
        ),
        (
            format!("{RESOURCES}/felixconfigurations/default"),
            json!({"metadata": {"name": "default"}, "spec": {"interfacePrefix": "tap"}}),
        ),
        (
            format!("{RESOURCES}/networkpolicies/bench/egress"),
            json!({
                "metadata": {"name": "egress", "namespace": "bench"},
                "spec": {"selector": "role == 'sender'", "types": ["Egress"], "egress": [{"action": "Allow"}]},
            }),
        ),
    ];
    for (name, role, address, mac) in
        [("send", "sender", SENDER, "02:00:00:00:00:02"), ("recv", "receiver", RECEIVER, "02:00:00:00:00:03")]
    {
        let resource = format!("bench-openstack-{name}-{name}");
        all.push((
            format!("{RESOURCES}/workloadendpoints/bench/{resource}"),
            json!({
                "metadata": {
                    "name": resource, "namespace": "bench",
                    "labels": {"projectcalico.org/namespace": "bench", "role": role},
                },
                "spec": {
                    "orchestrator": "openstack", "node": "bench", "workload": name, "endpoint": name,
                    "interfaceName": format!("tap-{name}"), "mac": mac, "ipNetworks": [format!("{address}/32")],
                },
            }),
        ));
    }
    // An allow rule takes two lines in the table: one marks, one returns.
    for index in 0..rules / 20 {
        let base = 2000 + (index * 10 % 15_000) as u16;
        let ports: Vec<u16> = (base..base + 10).collect();
        let name = format!("filler-{index}");
        all.push((format!("{RESOURCES}/networkpolicies/bench/{name}"), policy(&name, &ports)));
    }
    all.into_iter().map(|(key, value)| (key, value.to_string())).collect()
}
