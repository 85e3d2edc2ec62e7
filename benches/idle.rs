//! G10: what an agent costs that has nothing to do.
//!
//! Processor time of the agent and all it starts, and how many processes it starts, beside a table of 10,000 rules and
//! 1,000 sets: with the refresh intervals at a tenth of their defaults, and with the defaults.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use testkit::etcd::Etcd;
use testkit::netns::in_new_netns;

use crate::results::Results;
use crate::world::{self, Agent, Endpoint, LIMIT, Plan, Start, policy};
use crate::{foreign, guests, usage};

const GUEST: std::net::Ipv4Addr = std::net::Ipv4Addr::new(10, 65, 0, 9);

/// How long to let an agent come to rest before it is watched: it looks again at what it has just written.
const SETTLE: Duration = Duration::from_secs(30);
/// The longest of the intervals, compressed.
const REFRESH: Duration = Duration::from_secs(18);

pub(crate) fn measure(
    plan: &Plan,
    variant: &str,
    [rules, sets]: [usize; 2],
    length: Duration,
    results: &mut Results,
) -> Result<()> {
    in_new_netns(|| {
        let etcd = Etcd::start()?;
        // A guest, so that there is a route.
        let _guest = guests::guest("idle", GUEST)?;
        let guest = Endpoint {
            host: "bench",
            name: "idle",
            labels: vec![("role".to_owned(), "idle".to_owned())],
            address: GUEST,
        };
        let documents = [guest.stored(), policy("idle", "role == 'idle'", &[world::allow(7777, None)])];
        etcd.put_all([world::base(), world::filling(rules, sets)?, documents.to_vec()].concat())?;
        for (pace, divisor) in [("tenth-of-the-intervals", 10), ("default-intervals", 1)] {
            eprintln!("felix-bench: idle, {variant}, {pace}: {} s …", length.as_secs());
            let mut start = Start::new(&plan.agent, variant).intervals_divided_by(divisor);
            start.counted = true;
            let mut agent = start.run(&etcd)?;
            agent.in_sync(LIMIT)?;
            world::check_rules(variant, rules, results, &format!("idle/{variant}/rules"))?;
            std::thread::sleep(SETTLE);
            let name = format!("idle/{variant}/{pace}");
            watch(&agent, &name, length, results)?;
            ensure!(agent.put_right() == 0, "an idle agent wrote; {}", agent.last_words());
            if divisor > 1 {
                // Idle as it is, it must see this.
                let route = format!("{GUEST} dev tap-idle");
                foreign::check(&mut agent, variant, Some(&route), REFRESH + Duration::from_secs(1), &name, results)?;
            }
            agent.stop()?;
        }
        Ok(())
    })
}

fn watch(agent: &Agent, name: &str, length: Duration, results: &mut Results) -> Result<()> {
    let began = Instant::now();
    let (cpu, started) = (usage::cpu_seconds(agent.pid())?, usage::started_in_namespace_of(agent.pid())?);
    std::thread::sleep(length);
    // The second look counts itself.
    let started = usage::started_in_namespace_of(agent.pid())?.saturating_sub(started + 1);
    let cpu = usage::cpu_seconds(agent.pid())? - cpu;
    let seconds = began.elapsed().as_secs_f64();
    results.record(format!("{name}/cpu"), "s", cpu);
    results.record(format!("{name}/share-of-a-core"), "%", 100.0 * cpu / seconds);
    results.record(format!("{name}/processes-and-threads-started"), "count", started as f64);
    results.record(format!("{name}/resident"), "MB", usage::megabytes(agent.pid(), "VmRSS")?);
    Ok(())
}
