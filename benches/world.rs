//! The world of the end-to-end parts: documents in a real etcd, the real agent, and what it did.
//!
//! All of it lives in the network namespace of the calling thread. A table of n rules is in the many-chains layout of
//! performance.md section 0, rule 4: policies of one endpoint, ten rules to the chain of each.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use etcd_client::Client;
use serde_json::{Value, json};
use testkit::etcd::Etcd;
use testkit::netns::Process;

use crate::results::Results;

pub(crate) const RESOURCES: &str = "/calico/resources/v3/projectcalico.org";
/// How long anything may take before the benchmark calls it broken.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);
const IN_SYNC: &str = "in sync: everything wanted is in force";

pub(crate) type Stored = (String, String);

/// A running agent and its log.
#[derive(Debug)]
pub(crate) struct Agent {
    process: Process,
    log: tempfile::NamedTempFile,
    began: Instant,
    /// The agent itself, where a helper was started in front of it.
    pid: u32,
}

/// How an agent is started.
#[derive(Clone, Debug)]
pub(crate) struct Start<'a> {
    pub(crate) binary: &'a Path,
    pub(crate) variant: &'a str,
    pub(crate) settings: Vec<(String, String)>,
    /// In a process namespace of its own, where the kernel counts what is started.
    pub(crate) counted: bool,
}

impl<'a> Start<'a> {
    /// Without IPv6, so that a table is one table: with it there are two, and the floor would have to be that of two.
    pub(crate) fn new(binary: &'a Path, variant: &'a str) -> Self {
        let start = Self { binary, variant, settings: Vec::new(), counted: false };
        start.with("FELIX_IPV6SUPPORT", "false")
    }

    pub(crate) fn with(mut self, name: &str, value: &str) -> Self {
        self.settings.push((name.to_owned(), value.to_owned()));
        self
    }

    /// The intervals at which the kernel is looked at for foreign changes: their defaults divided by this.
    pub(crate) fn intervals_divided_by(self, divisor: u64) -> Self {
        [("IPTABLES", 180), ("IPSETS", 90), ("ROUTE", 90), ("INTERFACE", 90)].into_iter().fold(
            self,
            |start, (name, seconds)| {
                start.with(&format!("FELIX_{name}REFRESHINTERVAL"), &(seconds / divisor).to_string())
            },
        )
    }

    pub(crate) fn run(&self, etcd: &Etcd) -> Result<Agent> {
        let log = tempfile::NamedTempFile::new()?;
        let mut command = if self.counted {
            let mut command = Command::new("unshare");
            command.args(["--fork", "--pid", "--mount-proc", "--kill-child"]).arg(self.binary);
            command
        } else {
            Command::new(self.binary)
        };
        command
            .args(["--config-file", "/nonexistent/felix.cfg"])
            .env("FELIX_FELIXHOSTNAME", "bench")
            .env("FELIX_ETCDENDPOINTS", etcd.endpoint())
            .env("FELIX_IPTABLESBACKEND", self.variant)
            .env("FELIX_LOGSEVERITYSCREEN", "info")
            .env("FELIX_LOGFILEPATH", "none")
            .env("FELIX_STATEDIRECTORY", "none")
            .envs(self.settings.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(log.reopen()?)
            .stderr(log.reopen()?);
        let began = Instant::now();
        let process = Process::start(&mut command)?;
        let pid = process.pid();
        let mut agent = Agent { process, log, began, pid };
        if self.counted {
            agent.await_until(LIMIT, "the agent below unshare", |agent| {
                agent.pid = crate::usage::descendants(agent.process.pid()).first().copied().unwrap_or(pid);
                Ok(agent.pid != pid)
            })?;
        }
        Ok(agent)
    }
}

impl Agent {
    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    pub(crate) fn log(&self) -> String {
        let bytes = std::fs::read(self.log.path()).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Waits until the agent says that all is in force; returns the time from the start of the process.
    pub(crate) fn in_sync(&mut self, limit: Duration) -> Result<Duration> {
        let began = self.began;
        self.await_until(limit, IN_SYNC, |agent| Ok(agent.log().contains(IN_SYNC)))?;
        Ok(began.elapsed())
    }

    /// Waits until something is so; fails with the end of the log when the agent has ended or time is up.
    pub(crate) fn await_until(
        &mut self,
        limit: Duration,
        what: &str,
        mut is_so: impl FnMut(&mut Self) -> Result<bool>,
    ) -> Result<()> {
        let deadline = Instant::now() + limit;
        while !is_so(self)? {
            if !self.process.is_running()? {
                bail!("the agent has ended while waiting for {what}; {}", self.last_words());
            }
            ensure!(Instant::now() < deadline, "waited {limit:?} in vain for {what}; {}", self.last_words());
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    pub(crate) fn last_words(&self) -> String {
        let log = self.log();
        let tail: Vec<&str> = log.lines().rev().take(15).collect();
        format!("the agent said last:\n{}", tail.into_iter().rev().collect::<Vec<_>>().join("\n"))
    }

    /// The batches that the agent has reported from the `skip`-th on.
    pub(crate) fn batches(&self, skip: usize) -> Vec<Batch> {
        let log = self.log();
        log.lines().filter(|line| line.contains("batch applied")).skip(skip).map(Batch::parse).collect()
    }

    /// How often the agent wrote to the kernel without being asked to.
    pub(crate) fn put_right(&self) -> usize {
        self.log().lines().filter(|line| line.contains("kernel put right")).count()
    }

    pub(crate) fn stop(mut self) -> Result<String> {
        if self.pid == self.process.pid() {
            self.process.terminate(Duration::from_secs(10)).context("stopping the agent")?;
        } else {
            // `unshare` would be ended and not hand it on.
            let pid = nix::unistd::Pid::from_raw(i32::try_from(self.pid)?);
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM)?;
            let deadline = Instant::now() + Duration::from_secs(10);
            while self.process.is_running()? {
                ensure!(Instant::now() < deadline, "the agent does not end");
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        Ok(self.log())
    }
}

/// What a line about a batch says.
#[derive(Clone, Debug, Default)]
pub(crate) struct Batch {
    pub(crate) writes: u64,
    /// Name of the stage and its milliseconds.
    pub(crate) stages: Vec<(String, f64)>,
}

impl Batch {
    fn parse(line: &str) -> Self {
        let mut batch = Self::default();
        for (name, value) in line.split_whitespace().filter_map(|word| word.split_once('=')) {
            match name {
                "writes" => batch.writes = value.parse().unwrap_or_default(),
                "calculating" | "waited" | "took" => {
                    batch.stages.extend(milliseconds(value).map(|ms| (name.into(), ms)))
                }
                "stages" => {
                    let stages = value.trim_matches('"').split(',').filter_map(|stage| stage.rsplit_once(':'));
                    batch
                        .stages
                        .extend(stages.filter_map(|(name, value)| Some((name.to_owned(), milliseconds(value)?))));
                }
                _ => (),
            }
        }
        batch
    }
}

/// Parses a duration as Rust prints it.
fn milliseconds(text: &str) -> Option<f64> {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.')?;
    let (number, unit) = text.split_at(end);
    let factor = match unit {
        "s" => 1e3,
        "ms" => 1.0,
        "µs" => 1e-3,
        "ns" => 1e-6,
        _ => return None,
    };
    Some(number.parse::<f64>().ok()? * factor)
}

/// Records how long each stage of these batches took (performance.md section 7, rule 5). What is missing to the whole
/// is the way from etcd: event and decoding.
pub(crate) fn record_stages(prefix: &str, batches: &[Batch], results: &mut Results) {
    for (name, ms) in batches.iter().flat_map(|batch| &batch.stages) {
        let name = if name == "took" { "apply" } else { name };
        results.record(format!("{prefix}/stage/{name}"), "ms", *ms);
    }
}

/// A client for single writes, with a runtime of its own.
pub(crate) struct Writer {
    runtime: tokio::runtime::Runtime,
    client: Client,
}

impl Writer {
    pub(crate) fn new(etcd: &Etcd) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let client = runtime.block_on(Client::connect([etcd.endpoint()], None))?;
        Ok(Self { runtime, client })
    }

    /// Writes and returns when the put has returned.
    pub(crate) fn put(&mut self, (key, value): &Stored) -> Result<Instant> {
        self.runtime.block_on(self.client.put(key.as_str(), value.as_str(), None))?;
        Ok(Instant::now())
    }

    pub(crate) fn delete(&mut self, key: &str) -> Result<Instant> {
        self.runtime.block_on(self.client.delete(key, None))?;
        Ok(Instant::now())
    }

    /// Writes many keys in one transaction; etcd takes 128 at most.
    pub(crate) fn put_together(&mut self, stored: &[Stored]) -> Result<Instant> {
        let puts = stored.iter().map(|(key, value)| etcd_client::TxnOp::put(key.as_str(), value.as_str(), None));
        let transaction = etcd_client::Txn::new().and_then(puts.collect::<Vec<_>>());
        self.runtime.block_on(self.client.txn(transaction))?;
        Ok(Instant::now())
    }

    /// Lists everything under the Calico prefix, kind by kind, in requests without pages; returns the keys.
    pub(crate) fn list_all(&mut self, kinds: &[&str]) -> Result<usize> {
        let mut client = self.client.kv_client().max_decoding_message_size(usize::MAX);
        let mut keys = 0;
        for kind in kinds {
            let options = etcd_client::GetOptions::new().with_prefix();
            keys += self.runtime.block_on(client.get(format!("{RESOURCES}/{kind}/"), Some(options)))?.kvs().len();
        }
        Ok(keys)
    }
}

// Documents.

fn stored(kind: &str, name: &str, document: &Value) -> Stored {
    (format!("{RESOURCES}/{kind}/{name}"), document.to_string())
}

/// What every datastore has.
pub(crate) fn base() -> Vec<Stored> {
    vec![
        stored(
            "clusterinformations",
            "default",
            &json!({"metadata": {"name": "default"}, "spec": {"datastoreReady": true}}),
        ),
        stored(
            "felixconfigurations",
            "default",
            &json!({"metadata": {"name": "default"}, "spec": {"interfacePrefix": "tap"}}),
        ),
    ]
}

/// A rule that allows UDP to two ports: two lines in the table, one that marks and one that returns.
pub(crate) fn allow(port: u16, source: Option<&str>) -> Value {
    let mut rule = json!({"action": "Allow", "protocol": "UDP", "destination": {"ports": [port, port + 1000]}});
    if let Some(selector) = source {
        rule["source"] = json!({ "selector": selector });
    }
    rule
}

/// A policy for incoming traffic of what the selector matches.
pub(crate) fn policy(name: &str, selector: &str, rules: &[Value]) -> Stored {
    let document = json!({
        "kind": "NetworkPolicy", "apiVersion": "projectcalico.org/v3",
        "metadata": {"name": name, "namespace": "bench"},
        "spec": {"selector": selector, "types": ["Ingress"], "order": 100, "ingress": rules},
    });
    stored("networkpolicies/bench", name, &document)
}

/// A policy that lets everything out.
pub(crate) fn egress(selector: &str) -> Stored {
    let document = json!({
        "metadata": {"name": "egress", "namespace": "bench"},
        "spec": {"selector": selector, "types": ["Egress"], "egress": [{"action": "Allow"}]},
    });
    stored("networkpolicies/bench", "egress", &document)
}

/// An endpoint; its interface is `tap-` and its name.
#[derive(Clone, Debug)]
pub(crate) struct Endpoint<'a> {
    pub(crate) host: &'a str,
    /// Without a dash, which would have to be doubled.
    pub(crate) name: &'a str,
    pub(crate) labels: Vec<(String, String)>,
    pub(crate) address: std::net::Ipv4Addr,
}

impl Endpoint<'_> {
    pub(crate) fn stored(&self) -> Stored {
        let Self { host, name, labels, address } = self;
        let resource = format!("{host}-openstack-{name}-{name}");
        let mut all = json!({"projectcalico.org/namespace": "bench", "projectcalico.org/orchestrator": "openstack"});
        for (key, value) in labels {
            all[key] = json!(value);
        }
        let document = json!({
            "kind": "WorkloadEndpoint", "apiVersion": "projectcalico.org/v3",
            "metadata": {"name": resource, "namespace": "bench", "labels": all},
            "spec": {
                "orchestrator": "openstack", "node": host, "workload": name, "endpoint": name,
                "interfaceName": format!("tap-{name}"), "mac": mac(*address), "ipNetworks": [format!("{address}/32")],
            },
        });
        stored("workloadendpoints/bench", &resource, &document)
    }
}

/// The hardware address that goes with an address.
pub(crate) fn mac(address: std::net::Ipv4Addr) -> String {
    let [a, b, c, d] = address.octets();
    format!("02:00:{a:02x}:{b:02x}:{c:02x}:{d:02x}")
}

/// The label of the endpoint that the filling is for.
fn filler_endpoint() -> Stored {
    let labels = vec![("role".to_owned(), "filler".to_owned())];
    Endpoint { host: "bench", name: "filler", labels, address: std::net::Ipv4Addr::new(10, 64, 0, 2) }.stored()
}

/// A table of `rules` rules: ten to the chain of each policy, all for one endpoint that has no interface. In the first
/// rule of the first `sets` policies the source is a set of ten networks.
pub(crate) fn filling(rules: usize, sets: usize) -> Result<Vec<Stored>> {
    let policies = rules / 10;
    ensure!(sets <= policies, "{sets} sets in {policies} policies");
    let mut all = vec![filler_endpoint()];
    for index in 0..policies {
        let selector = (index < sets).then(|| format!("filler-set == 'f{index}'"));
        let rules: Vec<Value> = (0..5)
            .map(|rule| allow(2000 + ((index * 5 + rule) % 30_000) as u16, selector.as_deref().filter(|_| rule == 0)))
            .collect();
        all.push(policy(&format!("filler-{index}"), "role == 'filler'", &rules));
    }
    for index in 0..sets {
        let nets: Vec<String> =
            (0..10).map(|n| format!("172.{}.{}.{}/32", 16 + index / 250, index % 250, n + 1)).collect();
        all.push(network_set(&format!("filler-{index}"), "filler-set", &format!("f{index}"), &nets));
    }
    Ok(all)
}

pub(crate) fn network_set(name: &str, label: &str, value: &str, nets: &[String]) -> Stored {
    let document = json!({
        "kind": "NetworkSet", "apiVersion": "projectcalico.org/v3",
        "metadata": {"name": name, "namespace": "bench", "labels": {label: value}},
        "spec": {"nets": nets},
    });
    stored("networksets/bench", name, &document)
}

// The kernel as its tools show it.

/// Returns the lines of `iptables-save`, of one table or of all.
pub(crate) fn save(variant: &str, table: Option<&str>) -> Result<Vec<String>> {
    let mut command = Command::new(format!("iptables-{variant}-save"));
    command.args(table.iter().flat_map(|table| ["-t", table]));
    let output = command.output()?;
    ensure!(output.status.success(), "iptables-{variant}-save: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect())
}

/// Fails unless the filter table has at least this many rules and not half as many more.
pub(crate) fn check_rules(variant: &str, rules: usize, results: &mut Results, name: &str) -> Result<()> {
    let count = save(variant, Some("filter"))?.iter().filter(|line| line.starts_with("-A")).count();
    ensure!(
        (rules..=rules + rules / 2 + 150).contains(&count),
        "the filter table has {count} rules, where about {rules} were expected"
    );
    results.record(name, "count", count as f64);
    Ok(())
}

/// Names of all sets of the namespace.
pub(crate) fn set_names() -> Result<Vec<String>> {
    let output = Command::new("ipset").args(["list", "-n"]).output()?;
    ensure!(output.status.success(), "ipset list: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect())
}

/// Runs a program to its end.
pub(crate) fn run(program: &str, arguments: &[&str], input: &[u8]) -> Result<String> {
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context(program.to_owned())?;
    if let Some(mut stdin) = child.stdin.take() {
        std::io::Write::write_all(&mut stdin, input)?;
    }
    let output = child.wait_with_output()?;
    ensure!(
        output.status.success(),
        "{program} {}: {}",
        arguments.join(" "),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The agent's binary and how much of each part is to be done.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) agent: PathBuf,
    /// 1 is what performance.md says; a tenth is a tenth of the measurements.
    pub(crate) share: f64,
}

impl Plan {
    /// So many of `whole` measurements, at least `least`.
    pub(crate) fn part_of(&self, whole: usize, least: usize) -> usize {
        ((whole as f64 * self.share).round() as usize).max(least)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_of_a_batch_is_taken_apart() {
        let line = "INFO batch applied seq=7 writes=2 failed=false calculating=12.5µs waited=1.25s took=3ms \
                    stages=ipset:1.5ms,filter/4:500ns";
        let batch = Batch::parse(line);
        assert_eq!(batch.writes, 2);
        let stages: Vec<(&str, f64)> = batch.stages.iter().map(|(name, ms)| (name.as_str(), *ms)).collect();
        assert_eq!(
            stages,
            [("calculating", 0.0125), ("waited", 1250.0), ("took", 3.0), ("ipset", 1.5), ("filter/4", 0.0005)]
        );
        assert_eq!(milliseconds("x"), None);
    }

    #[test]
    fn a_filling_has_ten_rules_for_each_policy_and_ten_networks_for_each_set() {
        let all = filling(100, 2).unwrap();
        assert_eq!(all.len(), 1 + 10 + 2);
        let selectors = all.iter().filter(|(_, value)| value.contains("filler-set ==")).count();
        assert_eq!(selectors, 2);
        assert!(filling(10, 2).is_err());
    }
}
