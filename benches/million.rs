//! G12: one set of a million networks, fed by twenty network sets.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use model::convert::{Converter, Options};
use testkit::etcd::Etcd;
use testkit::netns::in_new_netns;

use crate::rawset::RawSets;
use crate::results::Results;
use crate::usage::megabytes;
use crate::world::{self, Plan, Start, Stored, Writer, allow, policy};

const FEEDERS: usize = 20;
const LIMIT: Duration = Duration::from_secs(180);

pub(crate) fn measure(plan: &Plan, results: &mut Results) -> Result<()> {
    let nets = plan.part_of(50_000, 1_000);
    in_new_netns(|| floor(nets, results))?;
    in_new_netns(|| run(plan, nets, results))
}

/// Networks `from` to `from + count` of one feeder; feeders do not overlap, nor do generations.
fn addresses(feeder: usize, generation: usize, count: usize) -> impl Iterator<Item = Ipv4Addr> {
    let first = ((11 + generation) as u32) << 24 | (feeder * count) as u32;
    (0..count as u32).map(move |n| Ipv4Addr::from(first + n))
}

fn feeder(feeder: usize, members: impl Iterator<Item = Ipv4Addr>) -> Stored {
    let nets: Vec<String> = members.map(|address| format!("{address}/32")).collect();
    world::network_set(&format!("feeder-{feeder}"), "feeds", "million", &nets)
}

fn floor(nets: usize, results: &mut Results) -> Result<()> {
    let mut sets = RawSets::open()?;
    for _ in 0..3 {
        let start = Instant::now();
        sets.create("floor", (nets * FEEDERS) as u32)?;
        for index in 0..FEEDERS {
            sets.add("floor", addresses(index, 0, nets))?;
        }
        results.time("million/floor-create", start.elapsed());
        sets.destroy("floor")?;
    }
    let feeders: Vec<Stored> = (0..FEEDERS).map(|index| feeder(index, addresses(index, 0, nets))).collect();
    for _ in 0..3 {
        let mut converter = Converter::new(Options::default());
        let mut updates = Vec::new();
        let mut sum = Duration::ZERO;
        for (key, value) in &feeders {
            let start = Instant::now();
            let complaints = converter.decode(key.as_bytes(), Some(value.as_bytes()), &mut updates);
            let took = start.elapsed();
            ensure!(complaints.is_some_and(|complaints| complaints.is_empty()), "not decoded: {key}");
            results.time("million/floor-decode-one", took);
            sum += took;
        }
        results.time("million/floor-decode-all", sum);
    }
    let median = |results: &Results, name: &str| results.median(name).context("no floor");
    let one = median(results, "million/floor-decode-one")?;
    let all = 2.0 * median(results, "million/floor-create")? + median(results, "million/floor-decode-all")?;
    results.record("million/bar-one-net", "ms", one + 5.0);
    results.record("million/bar-all", "ms", all);
    Ok(())
}

fn run(plan: &Plan, nets: usize, results: &mut Results) -> Result<()> {
    let etcd = Etcd::start_with(None, &["--quota-backend-bytes=4294967296", "--max-request-bytes=8388608"])?;
    let sum = nets * FEEDERS;
    etcd.put_all([world::base(), world::filling(100, 0)?].concat())?;
    etcd.put_all([policy("million", "role == 'filler'", &[allow(7777, Some("feeds == 'million'"))])])?;
    let mut agent = Start::new(&plan.agent, "legacy").run(&etcd)?;
    agent.in_sync(LIMIT)?;
    results.record("million/resident-without-it", "MB", megabytes(agent.pid(), "VmRSS")?);
    let names: Vec<String> = world::set_names()?.into_iter().filter(|name| name.starts_with("cali40s:")).collect();
    ensure!(names.len() == 1, "sets: {names:?}");
    let set = names.first().context("no set")?.as_str();
    let mut kernel = RawSets::open()?;
    let mut writer = Writer::new(&etcd)?;

    let mut fill = |writer: &mut Writer, generation: usize, gone: Option<usize>| -> Result<Duration> {
        let feeders: Vec<Stored> =
            (0..FEEDERS).map(|index| feeder(index, addresses(index, generation, nets))).collect();
        let mut written = Instant::now();
        for feeder in &feeders {
            written = writer.put(feeder)?;
        }
        let gone = gone.map_or(Vec::new(), |gone| ends(gone, nets));
        Ok(wait(&mut kernel, set, &ends(generation, nets), &gone)?.saturating_duration_since(written))
    };
    eprintln!("felix-bench: million: filling a set of {sum} …");
    let took = fill(&mut writer, 0, None)?;
    results.time("million/fill", took);
    check_size(set, sum)?;
    std::thread::sleep(Duration::from_secs(2));
    results.record("million/resident-with-it", "MB", megabytes(agent.pid(), "VmRSS")?);
    results.record("million/resident-peak-of-filling", "MB", megabytes(agent.pid(), "VmHWM")?);

    eprintln!("felix-bench: million: one net …");
    let mut sets = RawSets::open()?;
    let before = agent.batches(0).len();
    let rounds = plan.part_of(20, 5);
    let mut last = addresses(0, 0, 1).next().context("no address")?;
    for round in 0..rounds as u32 {
        let new = Ipv4Addr::from(0x0a00_0000 + round);
        let changed = feeder(0, std::iter::once(new).chain(addresses(0, 0, nets).skip(1)));
        std::thread::sleep(Duration::from_millis(300));
        let written = writer.put(&changed)?;
        let right = wait(&mut sets, set, &[new], &[last])?;
        results.time("million/one-net", right.saturating_duration_since(written));
        last = new;
    }
    world::record_stages("million/one-net", &agent.batches(before), results);
    check_size(set, sum)?;

    eprintln!("felix-bench: million: one network set of {nets} …");
    let before = agent.batches(0).len();
    let mut old: Vec<Ipv4Addr> = vec![last];
    for round in 0..3 {
        let feeder = feeder(0, addresses(0, 20 + round, nets));
        let new: Vec<Ipv4Addr> = addresses(0, 20 + round, nets).collect();
        std::thread::sleep(Duration::from_secs(1));
        let written = writer.put(&feeder)?;
        let right = wait(&mut sets, set, &new, &old)?;
        results.time("million/one-network-set", right.saturating_duration_since(written));
        old = new;
    }
    world::record_stages("million/one-network-set", &agent.batches(before), results);
    check_size(set, sum)?;

    eprintln!("felix-bench: million: all …");
    for generation in 1..=2 {
        std::thread::sleep(Duration::from_secs(2));
        let before = agent.batches(0).len();
        let gone = if generation == 1 { None } else { Some(1) };
        let took = fill(&mut writer, generation, gone)?;
        results.time("million/all", took);
        agent.await_until(LIMIT, "its report", |agent| Ok(!agent.batches(before).is_empty()))?;
        world::record_stages("million/all", &agent.batches(before), results);
        check_size(set, sum)?;
    }
    let peak = megabytes(agent.pid(), "VmHWM")?;
    results.record("million/resident-peak", "MB", peak);
    if let Some(idle) = results.median("million/resident-without-it") {
        results.record("million/resident-peak-over-idle", "MB", peak - idle);
    }
    agent.stop().map(drop)
}

/// First and last of every feeder.
fn ends(generation: usize, nets: usize) -> Vec<Ipv4Addr> {
    let ends =
        |index| addresses(index, generation, nets).take(1).chain(addresses(index, generation, nets).skip(nets - 1));
    (0..FEEDERS).flat_map(ends).collect()
}

/// Waits until the set has these members and not those; what goes, goes last, and in order.
fn wait(kernel: &mut RawSets, set: &str, present: &[Ipv4Addr], absent: &[Ipv4Addr]) -> Result<Instant> {
    let absent = absent.iter().rev().map(|address| (set, *address, false));
    let present = present.iter().rev().map(|address| (set, *address, true));
    kernel.wait(&absent.chain(present).collect::<Vec<_>>(), LIMIT)
}

/// Fails unless the kernel's set has so many members, soon.
fn check_size(set: &str, members: usize) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        let header = world::run("ipset", &["list", "-t", set], b"")?;
        let count = header.lines().find_map(|line| line.strip_prefix("Number of entries: ")?.parse::<usize>().ok());
        if count == Some(members) {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "{set} has {count:?} members instead of {members}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
