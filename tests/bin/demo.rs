//! The demonstration: real etcd, one agent per compute host, four virtual machines, real packets.
//!
//! `make demo` runs it. It builds the bed of openstack.md 14 in network namespaces, loads what Neutron wrote, walks the
//! acceptance table, and then replaces a security-group rule while traffic runs. It leaves nothing behind, also when it
//! is interrupted.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a demonstration speaks to its audience")]

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use felix_tests::agent::{self, Variant};
use felix_tests::bed::{Bed, Host, Place, Vm};
use felix_tests::data::{self, PORTS_UP};
use felix_tests::stream::{Sent, Stream};
use felix_tests::table::{Probe, Row, surprises, table, walk};
use model::Family;
use testkit::netns;
use testkit::packets::Outcome;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

const USAGE: &str = "\
usage: demo [--variant legacy|nft] [--family 4|6]

  --variant   which iptables the agents use (default: nft)
  --family    the IP version of the packets (default: 4)";

/// How long the agents may take to bring a host to what etcd says.
const PATIENCE: Duration = Duration::from_secs(20);

/// What the caller asked for.
#[derive(Clone, Copy, Debug)]
struct Choice {
    variant: Variant,
    family: Family,
}

fn main() -> ExitCode {
    let choice = match choose(std::env::args().skip(1)) {
        Ok(Some(choice)) => choice,
        Ok(None) => {
            println!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            eprintln!("demo: {error:#}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    match supervise(choice) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn choose(mut arguments: impl Iterator<Item = String>) -> Result<Option<Choice>> {
    let mut choice = Choice { variant: Variant::Nft, family: Family::V4 };
    while let Some(argument) = arguments.next() {
        if matches!(argument.as_str(), "-h" | "--help") {
            return Ok(None);
        }
        let value = arguments.next().with_context(|| format!("{argument} needs a value"))?;
        match (argument.as_str(), value.as_str()) {
            ("--variant", "legacy") => choice.variant = Variant::Legacy,
            ("--variant", "nft") => choice.variant = Variant::Nft,
            ("--family", "4" | "ipv4") => choice.family = Family::V4,
            ("--family", "6" | "ipv6") => choice.family = Family::V6,
            (option, value) => bail!("{option} {value}?"),
        }
    }
    Ok(Some(choice))
}

/// Runs the demonstration on a thread of its own and asks it to end when a signal comes; it cleans up by itself.
fn supervise(choice: Choice) -> Result<bool> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let interrupted = Arc::new(AtomicBool::new(false));
    let (done, mut finished) = oneshot::channel();
    let worker = {
        let interrupted = Arc::clone(&interrupted);
        std::thread::Builder::new().name("demo".to_owned()).spawn(move || {
            let result = demonstrate(choice, &interrupted);
            // Nobody listens any more only if the main thread has failed.
            done.send(()).ok();
            result
        })?
    };
    runtime.block_on(async {
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        loop {
            tokio::select! {
                _ = &mut finished => return Ok::<(), anyhow::Error>(()),
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
            eprintln!("demo: interrupted; cleaning up");
            interrupted.store(true, Ordering::Relaxed);
        }
    })?;
    let result = worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    if interrupted.load(Ordering::Relaxed) {
        // What broke because the signal also reached etcd and the agents says nothing.
        bail!("interrupted");
    }
    result
}

/// Ends the demonstration when a signal has come.
fn check(interrupted: &AtomicBool) -> Result<()> {
    ensure!(!interrupted.load(Ordering::Relaxed), "interrupted");
    Ok(())
}

fn demonstrate(choice: Choice, interrupted: &AtomicBool) -> Result<bool> {
    let Choice { variant, family } = choice;
    ensure!(nix::unistd::geteuid().is_root(), "network namespaces need root");
    let missing: Vec<&str> = agent::TOOLS.iter().copied().filter(|tool| !netns::is_installed(tool)).collect();
    ensure!(missing.is_empty(), "{} not found; `make setup` installs what is missing", missing.join(", "));
    let binary = agent::binary()?;
    for name in netns::cleanup()? {
        println!("demo: removed {name}, left over from a run that was killed");
    }

    println!("demo: {}, iptables-{}, {family}", binary.display(), variant.word());
    let started = Instant::now();
    let content = match family {
        Family::V4 => data::content(PORTS_UP)?,
        Family::V6 => data::dual_stack(&data::content(PORTS_UP)?)?,
    };
    let bed = Bed::new(&content)?;
    check(interrupted)?;
    println!(
        "demo: etcd, two compute hosts, one border host and four machines are up ({} ms)",
        started.elapsed().as_millis()
    );
    bed.store().load(&content)?;
    println!("demo: etcd has the {} keys of {PORTS_UP}.json, as Neutron wrote them", content.len());

    let started = Instant::now();
    let mut agents = Vec::new();
    for host in Host::BOTH {
        agents.push(bed.start_agent(host, variant)?);
    }
    while !surprises(&bed, family, &table())?.is_empty() && started.elapsed() < PATIENCE {
        check(interrupted)?;
        for agent in &mut agents {
            ensure!(agent.is_running()?, "an agent has ended:\n{}", agent.log()?);
        }
    }
    println!("demo: one agent per compute host has brought its host to that state\n");

    let mut score = Score::default();
    score.walk(&bed, family, &table())?;
    check(interrupted)?;

    println!("\ndemo: in group sg-a, \"ICMP from sg-a\" is replaced by \"ICMP from sg-b\" while packets flow");
    match replace_rule(&bed, &content, family, interrupted)? {
        Some(Judged { admitted, closed }) => {
            println!("demo: {admitted:.1} ms after the write to etcd the first ping from sg-b passed");
            println!("demo: {closed:.1} ms after it the last ping from sg-a passed");
            println!(
                "demo: from {:.1} ms after the write on, packets were judged by the new rule\n",
                admitted.max(closed)
            );
        }
        None => println!("demo: after {PATIENCE:?} packets are still judged by the old rule\n"),
    }
    score.walk(&bed, family, &after_replacement())?;
    check(interrupted)?;

    for agent in agents {
        agent.stop()?;
    }
    if !score.is_perfect() {
        println!();
    }
    drop(bed);
    println!("demo: {} of {} connections as expected", score.right, score.all);
    Ok(score.is_perfect())
}

/// How many connections went as expected.
#[derive(Debug, Default)]
struct Score {
    right: usize,
    all: usize,
}

impl Score {
    /// Probes and prints every row.
    fn walk(&mut self, bed: &Bed, family: Family, rows: &[Row]) -> Result<()> {
        for (row, seen) in rows.iter().zip(walk(bed, family, rows)?) {
            let right = row.expected.allows(seen);
            println!("{row}  seen {seen}{}", if right { "" } else { "  <-- not as expected" });
            self.right += usize::from(right);
            self.all += 1;
        }
        Ok(())
    }

    fn is_perfect(&self) -> bool {
        self.right == self.all
    }
}

/// Returns the rows of pings between machines as they are when sg-a admits sg-b and not itself.
fn after_replacement() -> Vec<Row> {
    let pings = table().into_iter().filter(|row| row.number <= 12 && row.probe == Probe::Echo);
    let judge = |mut row: Row| {
        if matches!(row.to, Place::Vm(Vm::A1 | Vm::A2)) {
            let from_b = matches!(row.from, Place::Vm(Vm::B1 | Vm::B2));
            row.expected = if from_b { Outcome::Ok } else { Outcome::Drop }.into();
        }
        row
    };
    pings.map(judge).collect()
}

/// When packets were judged by the new rule, in milliseconds after the write to etcd began.
#[derive(Clone, Copy, Debug)]
struct Judged {
    /// When the first packet was sent that only the new rule admits.
    admitted: f64,
    /// When the last packet was sent that only the old rule admits.
    closed: f64,
}

/// Replaces the rule under two streams of one ping per millisecond, each ping a connection of its own.
fn replace_rule(
    bed: &Bed,
    content: &data::Content,
    family: Family,
    interrupted: &AtomicBool,
) -> Result<Option<Judged>> {
    let a1 = bed.address(Place::Vm(Vm::A1), family)?;
    let newly = Stream::start(bed.machine(Vm::B1).1, a1)?;
    let formerly = Stream::start(bed.machine(Vm::A2).1, a1)?;
    std::thread::sleep(Duration::from_millis(500));

    let change = data::icmp_from_other_group(content)?;
    let written = Instant::now();
    bed.store().apply(&change)?;
    let switched = |newly: &[Sent], formerly: &[Sent]| {
        let settled = Instant::now().checked_sub(Duration::from_millis(300));
        let recent = |sent: &&Sent| settled.is_some_and(|settled| sent.at > settled);
        newly.iter().any(|sent| sent.answered.is_some())
            && formerly.iter().filter(recent).all(|sent| sent.answered.is_none())
    };
    while !switched(&newly.so_far(), &formerly.so_far()) && written.elapsed() < PATIENCE {
        check(interrupted)?;
        std::thread::sleep(Duration::from_millis(20));
    }
    let (newly, formerly) = (newly.finish()?, formerly.finish()?);
    let milliseconds = |sent: &Sent| sent.at.saturating_duration_since(written).as_secs_f64() * 1e3;
    let first = newly.iter().find(|sent| sent.answered.is_some());
    let last = formerly.iter().rev().find(|sent| sent.answered.is_some());
    ensure!(last.is_some(), "the old rule has never admitted anything");
    let ended = formerly.last().is_some_and(|sent| sent.answered.is_none());
    Ok(first
        .zip(last)
        .filter(|_| ended)
        .map(|(first, last)| Judged { admitted: milliseconds(first), closed: milliseconds(last) }))
}
