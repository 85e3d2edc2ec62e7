//! G4: from an etcd write to a member in the kernel's sets.
//!
//! One endpoint of another host comes and goes, in 1, 10 and 100 active sets, beside a table of 10,000 rules. The sets
//! are asked by raw netlink, one question of about three microseconds after the other, the last set first.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use testkit::etcd::Etcd;
use testkit::netns::in_new_netns;

use crate::rawset::RawSets;
use crate::results::Results;
use crate::world::{self, Endpoint, LIMIT, Plan, Start, Stored, Writer, allow, policy};

const SETS: usize = 100;
const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);

pub(crate) fn measure(plan: &Plan, rules: usize, results: &mut Results) -> Result<()> {
    in_new_netns(|| run(plan, rules, results))
}

fn run(plan: &Plan, rules: usize, results: &mut Results) -> Result<()> {
    let etcd = Etcd::start()?;
    etcd.put_all([world::base(), world::filling(rules, 0)?, policies()].concat())?;
    let mut agent = Start::new(&plan.agent, "legacy").run(&etcd)?;
    agent.in_sync(LIMIT)?;
    world::check_rules("legacy", rules, results, "member/rules")?;
    let mut writer = Writer::new(&etcd)?;
    let mut sets = RawSets::open()?;
    for count in [1, 10, 100] {
        let mut probe = Probe::find(&mut writer, &mut sets, count)?;
        for (series, changes, apart) in [("a", 500, 150), ("b", 1000, 10)] {
            let changes = plan.part_of(changes, 20);
            eprintln!("felix-bench: member in {count} sets, series {series}: {changes} changes …");
            let before = agent.batches(0).len();
            let name = format!("member/{count}-sets/{series}");
            probe.series(&mut writer, &mut sets, &name, changes, Duration::from_millis(apart), results)?;
            world::record_stages(&name, &agent.batches(before), results);
        }
    }
    ensure!(!agent.log().contains("driver failed"), "a driver failed; {}", agent.last_words());
    agent.stop().map(drop)
}

/// An endpoint of another host, and the sets it is a member of.
struct Probe {
    stored: Stored,
    sets: Vec<String>,
}

impl Probe {
    /// Finds the sets by what the kernel has when the endpoint is there.
    fn find(writer: &mut Writer, sets: &mut RawSets, count: usize) -> Result<Self> {
        let labels = (0..count).map(|set| (format!("in-set-{set}"), "yes".to_owned())).collect();
        let stored = Endpoint { host: "elsewhere", name: "probe", labels, address: ADDRESS }.stored();
        writer.put(&stored)?;
        let names: Vec<String> = world::set_names()?.into_iter().filter(|name| name.starts_with("cali40s:")).collect();
        let deadline = Instant::now() + LIMIT;
        let mut found = Vec::new();
        while found.len() != count {
            ensure!(Instant::now() < deadline, "the endpoint is in {} sets instead of {count}", found.len());
            found.clear();
            for name in &names {
                if sets.contains(name, ADDRESS)? {
                    found.push(name.clone());
                }
            }
        }
        // The agent writes in the order of names; asking for the last one first makes few questions.
        found.sort_unstable_by(|one, other| other.cmp(one));
        let probe = Self { stored, sets: found };
        writer.delete(&probe.stored.0)?;
        probe.wait(sets, false)?;
        Ok(probe)
    }

    fn series(
        &mut self,
        writer: &mut Writer,
        sets: &mut RawSets,
        name: &str,
        changes: usize,
        apart: Duration,
        results: &mut Results,
    ) -> Result<()> {
        let mut next = Instant::now() + apart;
        for change in 0..changes {
            std::thread::sleep(next.saturating_duration_since(Instant::now()));
            next += apart;
            let appears = change % 2 == 0;
            let written = if appears { writer.put(&self.stored)? } else { writer.delete(&self.stored.0)? };
            let visible = self.wait(sets, appears)?;
            results.time(format!("{name}/put-to-member"), visible.saturating_duration_since(written));
        }
        writer.delete(&self.stored.0)?;
        self.wait(sets, false).map(drop)
    }

    /// Waits until all sets have the member, or none.
    fn wait(&self, sets: &mut RawSets, present: bool) -> Result<Instant> {
        let expected: Vec<_> = self.sets.iter().map(|set| (set.as_str(), ADDRESS, present)).collect();
        sets.wait(&expected, LIMIT)
    }
}

/// A policy with a rule for each of the sets, for the endpoint that is here.
fn policies() -> Vec<Stored> {
    let rules: Vec<_> = (0..SETS).map(|set| allow(2000 + set as u16, Some(&format!("has(in-set-{set})")))).collect();
    vec![policy("sets", "role == 'filler'", &rules)]
}
