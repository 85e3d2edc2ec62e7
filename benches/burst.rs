//! G6 without the status: local endpoints that come all at once, then one after the other.
//!
//! Their interfaces are there. A guest sends a datagram to each of them again and again; the first that arrives says
//! that chains, dispatch and route of the endpoint are in force. Before that it is dropped, because the interface is
//! unknown, or has no route to take.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use testkit::etcd::Etcd;
use testkit::netns::in_new_netns;

use crate::floor::HeldOpen;
use crate::guests::{crowd, guest};
use crate::results::Results;
use crate::world::{self, Agent, Endpoint, LIMIT, Plan, Start, Stored, Writer, allow, policy};

const SENDER: Ipv4Addr = Ipv4Addr::new(10, 65, 0, 2);
const PORT: u16 = 7777;
const BURST: usize = 100;

pub(crate) fn measure(plan: &Plan, variant: &str, rules: usize, results: &mut Results) -> Result<()> {
    let steady = plan.part_of(1_000, 50);
    let (before, after, transaction) = in_new_netns(|| run(plan, variant, rules, steady, results))?;
    in_new_netns(|| floor(variant, &before, &after, &transaction, results))
}

/// Returns the table before and after the burst, and what was written to etcd.
type Seen = (Vec<String>, Vec<String>, Vec<Stored>);

fn run(plan: &Plan, variant: &str, rules: usize, steady: usize, results: &mut Results) -> Result<Seen> {
    let etcd = Etcd::start()?;
    let sender = guest("send", SENDER)?;
    // All it sends goes to a gateway that it knows: nobody answers for an address that is not there yet, and it would ask
    // again a second later only.
    let link = world::run("ip", &["-br", "link", "show", "tap-send"], b"")?;
    let gateway = link.split_whitespace().nth(2).context("no hardware address")?;
    sender.sh(&format!(
        "ip neigh replace 10.65.0.1 lladdr {gateway} nud permanent dev eth0
         ip route replace 10.65.0.0/16 via 10.65.0.1 dev eth0 onlink"
    ))?;
    let guests: Vec<(String, Ipv4Addr)> =
        (0..BURST + steady).map(|n| (format!("g{n}"), Ipv4Addr::from(0x0a41_0100 + n as u32))).collect();
    eprintln!("felix-bench: burst, {variant}: {} interfaces …", guests.len());
    let receivers = crowd("crowd", &guests)?;
    let endpoint = |name: &str, role: &str, address| {
        let labels = vec![("role".to_owned(), role.to_owned())];
        Endpoint { host: "bench", name, labels, address }.stored()
    };
    etcd.put_all([world::base(), world::filling(rules, 0)?].concat())?;
    etcd.put_all([
        world::egress("role == 'sender'"),
        policy("receivers", "role == 'receiver'", &[allow(PORT, None)]),
        endpoint("send", "sender", SENDER),
    ])?;
    let name = format!("burst/{variant}");
    let mut agent = Start::new(&plan.agent, variant).run(&etcd)?;
    agent.in_sync(LIMIT)?;
    world::check_rules(variant, rules, results, &format!("{name}/rules"))?;
    let before = world::save(variant, None)?;

    let endpoints: Vec<Stored> = guests.iter().map(|(name, address)| endpoint(name, "receiver", *address)).collect();
    let (burst, single) = endpoints.split_at(BURST);
    let mut writer = Writer::new(&etcd)?;
    let watch = Watch::default();
    let after = std::thread::scope(|scope| {
        let send = scope.spawn(|| sender.enter(|| watch.send()));
        let listen = scope.spawn(|| receivers.enter(|| watch.listen()));
        let outcome = (|| {
            let batches = agent.batches(0).len();
            watch.want(&guests, 0..BURST);
            std::thread::sleep(Duration::from_millis(100));
            ensure!(watch.arrived() == 0, "a datagram arrived before the endpoint was there");
            let written = writer.put_together(burst)?;
            watch.wait(&mut agent, BURST)?;
            let mut took: Vec<Duration> =
                watch.times().into_values().map(|at| at.saturating_duration_since(written)).collect();
            took.sort_unstable();
            took.iter().for_each(|took| results.time(format!("{name}/put-to-in-force"), *took));
            results.time(format!("{name}/put-to-last-in-force"), took.last().copied().unwrap_or_default());
            world::record_stages(&format!("{name}/all-at-once"), &agent.batches(batches), results);
            let after = world::save(variant, None)?;

            let batches = agent.batches(0).len();
            let mut written = BTreeMap::new();
            let mut next = Instant::now();
            for (index, stored) in single.iter().enumerate() {
                std::thread::sleep(next.saturating_duration_since(Instant::now()));
                next += Duration::from_millis(10);
                watch.want(&guests, BURST + index..BURST + index + 1);
                written.insert(BURST + index, writer.put(stored)?);
            }
            watch.wait(&mut agent, guests.len())?;
            let times = watch.times();
            for (index, written) in &written {
                let arrived = times.get(index).context("an endpoint without a time")?;
                results.time(format!("{name}/steady/put-to-in-force"), arrived.saturating_duration_since(*written));
            }
            world::record_stages(&format!("{name}/steady"), &agent.batches(batches), results);
            Ok(after)
        })();
        watch.stop.store(true, Ordering::Relaxed);
        for thread in [send.join(), listen.join()] {
            match thread {
                Ok(ended) => ended?,
                Err(_) => bail!("a thread failed"),
            }
        }
        outcome
    })?;
    agent.stop()?;
    Ok((before, after, burst.to_vec()))
}

/// What the sender, the listener and the writer know of each other.
#[derive(Debug, Default)]
struct Watch {
    stop: AtomicBool,
    /// Who is sent to: by number.
    wanted: Mutex<BTreeMap<usize, Ipv4Addr>>,
    /// When the first datagram arrived.
    seen: Mutex<BTreeMap<usize, Instant>>,
}

impl Watch {
    fn want(&self, guests: &[(String, Ipv4Addr)], range: std::ops::Range<usize>) {
        let wanted = guests.iter().enumerate().skip(range.start).take(range.len());
        lock(&self.wanted).extend(wanted.map(|(index, (_, address))| (index, *address)));
    }

    fn arrived(&self) -> usize {
        lock(&self.seen).len()
    }

    fn times(&self) -> BTreeMap<usize, Instant> {
        lock(&self.seen).clone()
    }

    fn wait(&self, agent: &mut Agent, count: usize) -> Result<()> {
        agent.await_until(LIMIT, "all endpoints", |_| Ok(self.arrived() >= count))
    }

    /// Sends to all that nothing has reached, about every two tenths of a millisecond.
    fn send(&self) -> Result<()> {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        while !self.stop.load(Ordering::Relaxed) {
            let wanted = lock(&self.wanted).clone();
            for (index, address) in wanted {
                // No route yet is what is waited out.
                drop(socket.send_to(&(index as u32).to_be_bytes(), SocketAddr::from((address, PORT))));
            }
            std::thread::sleep(Duration::from_micros(150));
        }
        Ok(())
    }

    fn listen(&self) -> Result<()> {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, PORT))?;
        socket.set_read_timeout(Some(Duration::from_millis(100)))?;
        let mut datagram = [0; 4];
        while !self.stop.load(Ordering::Relaxed) {
            if socket.recv_from(&mut datagram).is_ok() {
                let index = u32::from_be_bytes(datagram) as usize;
                lock(&self.seen).entry(index).or_insert_with(Instant::now);
                lock(&self.wanted).remove(&index);
            }
        }
        Ok(())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// One commit of everything that the burst changed in the filter table, held open, beside a table of the same size;
/// and one transaction with the same documents.
fn floor(
    variant: &str,
    before: &[String],
    after: &[String],
    transaction: &[Stored],
    results: &mut Results,
) -> Result<()> {
    let program = format!("iptables-{variant}-restore");
    let commit = difference(&section(before, "*filter"), &section(after, "*filter"));
    for _ in 0..5 {
        let whole = before.join("\n") + "\n";
        world::run(&program, &[], whole.as_bytes())?;
        let mut open = HeldOpen::start(&program)?;
        // The first commit of a process also loads what later ones know.
        open.commit("*filter\nCOMMIT\n")?;
        let start = Instant::now();
        open.commit(&commit)?;
        results.time(format!("burst/{variant}/floor-commit"), start.elapsed());
        open.end()?;
    }
    let count = world::save(variant, Some("filter"))?.iter().filter(|line| line.starts_with("-A")).count();
    let expected = section(after, "*filter").iter().filter(|line| line.starts_with("-A")).count();
    ensure!(count == expected, "the floor's table has {count} rules instead of {expected}");

    let etcd = Etcd::start()?;
    let mut writer = Writer::new(&etcd)?;
    for _ in 0..10 {
        let start = Instant::now();
        let written = writer.put_together(transaction)?;
        results.time("burst/floor-transaction", written - start);
    }
    let commit = results.median(&format!("burst/{variant}/floor-commit"));
    if let (Some(commit), Some(transaction)) = (commit, results.median("burst/floor-transaction")) {
        results.record(format!("burst/{variant}/floor"), "ms", commit + transaction);
    }
    Ok(())
}

/// The lines of one table in what `iptables-save` prints.
pub(crate) fn section(lines: &[String], table: &str) -> Vec<String> {
    let of_table = lines.iter().skip_while(|line| line.as_str() != table).skip(1);
    of_table.take_while(|line| line.as_str() != "COMMIT").cloned().collect()
}

/// Restore input that brings the chains of one table to another: each chain that differs is written whole.
pub(crate) fn difference(before: &[String], after: &[String]) -> String {
    let chains = |lines: &[String]| {
        let mut chains: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for line in lines {
            let mut words = line.split(' ');
            match (words.next(), words.next()) {
                (Some("-A"), Some(chain)) => chains.entry(chain.to_owned()).or_default().push(line.clone()),
                (Some(chain), Some(_)) if chain.starts_with(':') => {
                    chains.entry(chain.trim_start_matches(':').to_owned()).or_default();
                }
                _ => (),
            }
        }
        chains
    };
    let (before, after) = (chains(before), chains(after));
    let changed: Vec<_> = after.iter().filter(|(name, rules)| before.get(*name) != Some(rules)).collect();
    let mut text = String::from("*filter\n");
    for (name, _) in &changed {
        text += &format!(":{name} - [0:0]\n");
    }
    for rule in changed.iter().flat_map(|(_, rules)| *rules) {
        text += rule;
        text += "\n";
    }
    text + "COMMIT\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_writes_the_chains_that_differ() {
        let lines = |text: &str| text.lines().map(str::to_owned).collect::<Vec<_>>();
        let before = lines(":a - [0:0]\n:b - [0:0]\n-A a -j b");
        let after = lines(":a - [5:9]\n:b - [0:0]\n:c - [0:0]\n-A a -j b\n-A a -j c\n-A c -j DROP");
        let expected = "*filter\n:a - [0:0]\n:c - [0:0]\n-A a -j b\n-A a -j c\n-A c -j DROP\nCOMMIT\n";
        assert_eq!(difference(&before, &after), expected);
    }

    #[test]
    fn a_section_is_one_table() {
        let lines = ["*raw", "x", "COMMIT", "*filter", ":a", "COMMIT"].map(str::to_owned);
        assert_eq!(section(&lines, "*filter"), [":a"]);
    }
}
