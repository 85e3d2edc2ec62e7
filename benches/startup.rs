//! G8 and G9: cold and warm starts.
//!
//! Cold: a hundred thousand endpoints and ten thousand policies in etcd, of which 200 and 500 matter here, and a kernel
//! without anything of ours. Warm: everything right in the kernel already, which the agent must find out without
//! writing anything.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use testkit::etcd::Etcd;
use testkit::netns::in_new_netns;

use crate::results::Results;
use crate::world::{self, Agent, Endpoint, LIMIT, Plan, Start, Stored, Writer, allow, policy};

const LOCAL: usize = 200;
const GROUPS_OF_A_LOCAL: usize = 5;
const ACTIVE: usize = 500;

/// Starts per series.
const STARTS: usize = 3;

pub(crate) fn cold(plan: &Plan, variant: &str, results: &mut Results) -> Result<()> {
    let (endpoints, policies) = (plan.part_of(100_000, 2_000), plan.part_of(10_000, ACTIVE));
    eprintln!("felix-bench: cold start: writing {endpoints} endpoints and {policies} policies …");
    in_new_netns(|| cold_in_netns(plan, variant, endpoints, policies, results))
}

fn cold_in_netns(plan: &Plan, variant: &str, endpoints: usize, policies: usize, results: &mut Results) -> Result<()> {
    let etcd = Etcd::start_with(None, &["--quota-backend-bytes=4294967296"])?;
    etcd.put_all([world::base(), groups(policies)].concat())?;
    etcd.put_all((0..LOCAL).map(local))?;
    etcd.put_all((0..endpoints).map(|n| remote(n, policies)))?;
    let name = format!("cold/{variant}");
    for round in 0..STARTS {
        eprintln!("felix-bench: cold start, {variant} …");
        let mut agent = Start::new(&plan.agent, variant).run(&etcd)?;
        let took = agent.in_sync(LIMIT)?;
        results.time(format!("{name}/start-to-in-sync"), took);
        results.record(format!("{name}/resident-peak"), "MB", crate::usage::megabytes(agent.pid(), "VmHWM")?);
        check_cold(variant)?;
        world::record_stages(&name, &agent.batches(0), results);
        agent.stop()?;

        // The same world again: what a restart costs here.
        let mut agent = Start::new(&plan.agent, variant).run(&etcd)?;
        results.time(format!("{name}/restart-to-in-sync"), agent.in_sync(LIMIT)?);
        check_quiet(&agent)?;
        world::record_stages(&format!("{name}/restart"), &agent.batches(0), results);
        agent.stop()?;

        if round == 0 {
            floor(&etcd, variant, &name, endpoints, results)?;
        }
        empty(variant)?;
    }
    Ok(())
}

/// List of all, one load and one restore of the sets, with what the agent made.
fn floor(etcd: &Etcd, variant: &str, name: &str, endpoints: usize, results: &mut Results) -> Result<()> {
    let tables = world::save(variant, None)?.join("\n") + "\n";
    let sets = world::run("ipset", &["save"], b"")?;
    let mut writer = Writer::new(etcd)?;
    let mut sum = Duration::ZERO;
    let mut listed = 0;
    let kinds = ["workloadendpoints", "networkpolicies", "networksets", "clusterinformations", "felixconfigurations"];
    let mut note = |results: &mut Results, what: &str, took: Duration| {
        results.time(format!("{name}/floor-{what}"), took);
        sum += took;
    };
    let mut lists = Vec::new();
    for _ in 0..STARTS {
        let start = Instant::now();
        listed = writer.list_all(&kinds)?;
        lists.push(start.elapsed());
    }
    ensure!(listed >= endpoints + LOCAL, "{listed} keys listed");
    note(results, "list", lists.into_iter().min().unwrap_or_default());
    let (load, restore) = in_new_netns(|| {
        let start = Instant::now();
        world::run("ipset", &["restore"], sets.as_bytes())?;
        let restore = start.elapsed();
        let start = Instant::now();
        world::run(&format!("iptables-{variant}-restore"), &[], tables.as_bytes())?;
        anyhow::Ok((start.elapsed(), restore))
    })?;
    note(results, "load", load);
    note(results, "set-restore", restore);
    results.time(format!("{name}/floor"), sum);
    Ok(())
}

fn check_cold(variant: &str) -> Result<()> {
    let saved = world::save(variant, Some("filter"))?;
    let count = |prefix: &str| saved.iter().filter(|line| line.starts_with(prefix)).count();
    let (policies, endpoints) = (count(":cali-pi-"), count(":cali-tw-"));
    ensure!(policies == ACTIVE, "{policies} chains of policies instead of {ACTIVE}");
    ensure!(endpoints >= LOCAL, "{endpoints} chains of endpoints instead of {LOCAL}");
    let sets = world::set_names()?.iter().filter(|name| name.starts_with("cali40s:")).count();
    ensure!(sets == ACTIVE, "{sets} sets instead of {ACTIVE}");
    Ok(())
}

/// Takes away all that the agent made.
fn empty(variant: &str) -> Result<()> {
    for table in ["filter", "nat", "mangle", "raw"] {
        for action in ["-F", "-X"] {
            world::run(&format!("iptables-{variant}"), &["-w", "-t", table, action], b"")?;
        }
    }
    world::run("ipset", &["destroy"], b"")?;
    Ok(())
}

/// Fails if the agent wrote anything to the kernel.
fn check_quiet(agent: &Agent) -> Result<()> {
    let writes: u64 = agent.batches(0).iter().map(|batch| batch.writes).sum();
    ensure!(writes == 0 && agent.put_right() == 0, "{writes} writes at a warm start; {}", agent.last_words());
    Ok(())
}

pub(crate) fn warm(plan: &Plan, variant: &str, rules: usize, sets: usize, results: &mut Results) -> Result<()> {
    in_new_netns(|| {
        let etcd = Etcd::start()?;
        etcd.put_all([world::base(), world::filling(rules, sets)?].concat())?;
        let name = format!("warm/{variant}");
        let mut agent = Start::new(&plan.agent, variant).run(&etcd)?;
        results.time(format!("{name}/first-start-to-in-sync"), agent.in_sync(LIMIT)?);
        world::record_stages(&format!("{name}/first"), &agent.batches(0), results);
        world::check_rules(variant, rules, results, &format!("{name}/rules"))?;
        agent.stop()?;
        let listed = world::set_names()?.iter().filter(|name| name.starts_with("cali40s:")).count();
        ensure!(listed == sets, "{listed} sets instead of {sets}");
        let kernel = || Ok::<_, anyhow::Error>((rules_of(variant)?, world::run("ipset", &["save", "-sorted"], b"")?));
        let before = kernel()?;
        for _ in 0..plan.part_of(10, 3) {
            let mut agent = Start::new(&plan.agent, variant).run(&etcd)?;
            results.time(format!("{name}/start-to-in-sync"), agent.in_sync(LIMIT)?);
            let writes: u64 = agent.batches(0).iter().map(|batch| batch.writes).sum();
            results.record(format!("{name}/writes"), "calls", writes as f64);
            check_quiet(&agent)?;
            world::record_stages(&name, &agent.batches(0), results);
            agent.stop()?;
        }
        ensure!(kernel()? == before, "warm starts have changed the kernel");
        Ok(())
    })
}

/// All rules of all tables, without counters.
fn rules_of(variant: &str) -> Result<Vec<String>> {
    Ok(world::save(variant, None)?.into_iter().filter(|line| line.starts_with("-A")).collect())
}

// The world of the cold start: security groups, each with a rule that names the group.

fn groups(count: usize) -> Vec<Stored> {
    let group = |n: usize| {
        let rules: Vec<_> = (0..5)
            .map(|rule| {
                let selector = format!("has(sg-{n})");
                allow(
                    2000 + ((n * 5 + rule) % 30_000) as u16,
                    Some(&selector).filter(|_| rule == 0).map(String::as_str),
                )
            })
            .collect();
        policy(&format!("group-{n}"), &format!("has(sg-{n})"), &rules)
    };
    (0..count).map(group).collect()
}

fn in_groups(groups: impl IntoIterator<Item = usize>) -> Vec<(String, String)> {
    groups.into_iter().map(|group| (format!("sg-{group}"), "member".to_owned())).collect()
}

/// An endpoint of this host; each group that is active has two.
fn local(n: usize) -> Stored {
    let labels = in_groups((0..GROUPS_OF_A_LOCAL).map(|group| (n * GROUPS_OF_A_LOCAL + group) % ACTIVE));
    let address = Ipv4Addr::from(0x0a41_0000 + n as u32 + 2);
    Endpoint { host: "bench", name: &format!("l{n}"), labels, address }.stored()
}

fn remote(n: usize, groups: usize) -> Stored {
    let labels = in_groups([n % groups, (7 * n + 3) % groups]);
    let address = Ipv4Addr::from(0x0a80_0000 + n as u32);
    Endpoint { host: &format!("host{}", n % 500), name: &format!("r{n}"), labels, address }.stored()
}
