//! G11: many sets that nothing needs any longer, all at once.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use testkit::etcd::Etcd;
use testkit::netns::in_new_netns;

use crate::burst::{difference, section};
use crate::floor::HeldOpen;
use crate::rawset::RawSets;
use crate::results::Results;
use crate::world::{self, LIMIT, Plan, Start, Stored, Writer, allow, policy};

pub(crate) fn measure(plan: &Plan, variant: &str, sets: usize, results: &mut Results) -> Result<()> {
    let name = format!("unused-sets/{variant}");
    let seen = in_new_netns(|| run(plan, variant, sets, &name, results))?;
    in_new_netns(|| floor(variant, sets, &seen, &name, results))
}

/// What the kernel had while the sets were in use, and the table when they no longer were.
struct Seen {
    sets: String,
    before: Vec<String>,
    after: Vec<String>,
}

fn run(plan: &Plan, variant: &str, count: usize, name: &str, results: &mut Results) -> Result<Seen> {
    let etcd = Etcd::start()?;
    etcd.put_all([world::base(), world::filling(1000, 0)?].concat())?;
    etcd.put_all((0..count).map(networks))?;
    let mut agent = Start::new(&plan.agent, variant).run(&etcd)?;
    agent.in_sync(LIMIT)?;
    let mut writer = Writer::new(&etcd)?;
    let mut kernel = RawSets::open()?;
    let mut seen = Seen { sets: String::new(), before: Vec::new(), after: Vec::new() };
    for _ in 0..plan.part_of(5, 3) {
        writer.put(&naming(count))?;
        let mut sets = Vec::new();
        agent.await_until(LIMIT, "all sets", |_| {
            sets = world::set_names()?.into_iter().filter(|name| name.starts_with("cali40s:")).collect();
            Ok(sets.len() == count)
        })?;
        // The batch is through when the agent has said so.
        let batches = agent.batches(0).len();
        std::thread::sleep(Duration::from_millis(500));
        let before = agent.batches(0).len().max(batches);
        seen.sets = world::run("ipset", &["save"], b"")?;
        seen.before = world::save(variant, Some("filter"))?;
        let written = writer.put(&naming(0))?;
        let deadline = Instant::now() + LIMIT;
        for set in &sets {
            while kernel.exists(set)? {
                ensure!(Instant::now() < deadline, "{set} stays; {}", agent.last_words());
                std::thread::sleep(Duration::from_micros(50));
            }
        }
        results.time(format!("{name}/put-to-last-gone"), written.elapsed());
        seen.after = world::save(variant, Some("filter"))?;
        let left = world::set_names()?.iter().filter(|name| name.starts_with("cali40s:")).count();
        ensure!(left == 0, "{left} sets stay");
        agent.await_until(LIMIT, "the report", |agent| Ok(agent.batches(0).len() > before))?;
        world::record_stages(name, &agent.batches(before), results);
    }
    agent.stop()?;
    Ok(seen)
}

/// As many raw destroys of sets of the same size; and, because rules hold the sets until they go, the commit that takes
/// those rules away with the destroys after it.
fn floor(variant: &str, count: usize, seen: &Seen, name: &str, results: &mut Results) -> Result<()> {
    let mut sets = RawSets::open()?;
    for _ in 0..5 {
        for index in 0..count {
            let set = format!("floor-{index}");
            sets.create(&set, 10)?;
            sets.add(&set, (0..10).map(|n| Ipv4Addr::from(0x0a00_0000 + index as u32 * 10 + n)))?;
        }
        let start = Instant::now();
        for index in 0..count {
            sets.destroy(&format!("floor-{index}"))?;
        }
        results.time(format!("{name}/floor-destroys"), start.elapsed());
    }
    let program = format!("iptables-{variant}-restore");
    let names = seen.sets.lines().filter_map(|line| line.strip_prefix("create ")?.split(' ').next());
    let names: Vec<&str> = names.collect();
    ensure!(names.len() == count, "{} sets were saved instead of {count}", names.len());
    let table = |lines: &[String]| lines.join("\n") + "\n";
    let commit = difference(&section(&seen.before, "*filter"), &section(&seen.after, "*filter"));
    for _ in 0..5 {
        world::run("ipset", &["restore"], seen.sets.as_bytes())?;
        world::run(&program, &[], table(&seen.before).as_bytes())?;
        let mut open = HeldOpen::start(&program)?;
        open.commit("*filter\nCOMMIT\n")?;
        let start = Instant::now();
        open.commit(&commit)?;
        results.time(format!("{name}/floor-commit"), start.elapsed());
        for set in &names {
            // The nft variant lets go of them some time after the commit.
            while sets.destroy(set).is_err() {
                ensure!(start.elapsed() < LIMIT, "{set} cannot be destroyed");
                std::thread::sleep(Duration::from_micros(50));
            }
        }
        results.time(format!("{name}/floor-commit-and-destroys"), start.elapsed());
        open.end()?;
    }
    Ok(())
}

/// One policy whose rules name so many sets, one each.
fn naming(sets: usize) -> Stored {
    let rules: Vec<_> = (0..sets).map(|set| allow(7777, Some(&format!("unused == 'u{set}'")))).collect();
    policy("naming", "role == 'filler'", &rules)
}

fn networks(index: usize) -> Stored {
    let nets: Vec<String> = (0..10).map(|n| format!("172.{}.{}.{}/32", 16 + index / 250, index % 250, n + 1)).collect();
    world::network_set(&format!("unused-{index}"), "unused", &format!("u{index}"), &nets)
}
