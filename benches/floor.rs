//! What the kernel and its tools allow, measured in the same run: the product is the ratio to these figures.
//!
//! A table of n rules in the many-chains layout of performance.md section 0, rule 4: n/10 chains of ten rules
//! and a dispatch chain that jumps to each. Everything happens in a network namespace of its own.

use std::fmt::Write as _;
use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};

use crate::results::Results;

/// Measures one variant: load of the table, then the rewrite of one ten-rule chain by a process of its own and
/// through a process that stays open.
pub(crate) fn tables(variant: &str, rules: usize, rounds: usize, results: &mut Results) -> anyhow::Result<()> {
    testkit::netns::in_new_netns(|| {
        let program = format!("iptables-{variant}-restore");
        let start = Instant::now();
        restore(&program, &table(rules))?;
        results.time(format!("floor/{variant}/load-{rules}"), start.elapsed());

        for round in 0..rounds {
            let start = Instant::now();
            restore(&program, &rewrite(round))?;
            results.time(format!("floor/{variant}/rewrite-chain-spawn-{rules}"), start.elapsed());
        }
        let mut open = HeldOpen::start(&program)?;
        // As far apart as the changes that the agent is measured with: after a deletion the kernel's next commit on
        // the nft variant may wait for a grace period, so back-to-back figures are another question.
        for (series, pause) in [("held-open", Duration::from_millis(30)), ("held-open-back-to-back", Duration::ZERO)] {
            for round in 0..rounds {
                std::thread::sleep(pause);
                let start = Instant::now();
                open.commit(&rewrite(round + 1))?;
                results.time(format!("floor/{variant}/rewrite-chain-{series}-{rules}"), start.elapsed());
            }
        }
        open.end()?;

        for _ in 0..rounds.min(10) {
            let start = Instant::now();
            let saved = Command::new(format!("iptables-{variant}-save")).args(["-t", "filter"]).output()?;
            if !saved.status.success() {
                bail!("iptables-{variant}-save failed");
            }
            results.time(format!("floor/{variant}/save-{rules}"), start.elapsed());
        }
        Ok(())
    })
}

/// The cost of starting and ending any process here.
pub(crate) fn spawn(rounds: usize, results: &mut Results) -> anyhow::Result<()> {
    for _ in 0..rounds {
        let start = Instant::now();
        Command::new("true").status().context("starting `true`")?;
        results.time("floor/spawn-true", start.elapsed());
    }
    Ok(())
}

fn table(rules: usize) -> String {
    let chains = rules / 10;
    let mut text = String::from("*filter\n:dispatch - -\n");
    for chain in 0..chains {
        _ = writeln!(text, ":chain-{chain} - -");
    }
    for chain in 0..chains {
        _ = writeln!(text, "-A dispatch -j chain-{chain}");
        for rule in 0..10 {
            push_rule(&mut text, chain, rule, chain);
        }
    }
    text += "-A FORWARD -j dispatch\nCOMMIT\n";
    text
}

fn rewrite(round: usize) -> String {
    let mut text = String::from("*filter\n:chain-0 - -\n");
    for rule in 0..10 {
        push_rule(&mut text, 0, rule, round);
    }
    text += "COMMIT\n";
    text
}

fn push_rule(text: &mut String, chain: usize, rule: usize, salt: usize) {
    let port = 1024 + (chain * 10 + rule + salt) % 60_000;
    _ = writeln!(
        text,
        "-A chain-{chain} -m comment --comment \"cali:{chain:08}{rule:08}\" -p tcp -m multiport --destination-ports \
         {port},{} -j MARK --set-mark 0x10000/0x10000",
        port + 1
    );
}

fn restore(program: &str, input: &str) -> anyhow::Result<()> {
    let mut child = Command::new(program)
        .args(["--noflush", "-w", "10"])
        .stdin(Stdio::piped())
        .spawn()
        .context(program.to_owned())?;
    child.stdin.take().context("no standard input")?.write_all(input.as_bytes())?;
    let status = child.wait()?;
    if !status.success() {
        bail!("{program} failed: {status}");
    }
    Ok(())
}

/// A restore process that acts at each COMMIT and says so (performance.md 4.4).
pub(crate) struct HeldOpen {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    sent: u64,
}

impl HeldOpen {
    pub(crate) fn start(program: &str) -> anyhow::Result<Self> {
        let mut child = Command::new(program)
            .args(["--noflush", "--verbose", "-w", "10"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context(program.to_owned())?;
        let input = child.stdin.take().context("no standard input")?;
        let output = BufReader::new(child.stdout.take().context("no standard output")?);
        Ok(Self { child, input, output, sent: 0 })
    }

    pub(crate) fn commit(&mut self, text: &str) -> anyhow::Result<()> {
        self.sent += 1;
        let mark = format!("# ack-{}", self.sent);
        self.input.write_all(format!("{text}{mark}\n").as_bytes())?;
        self.input.flush()?;
        let mut line = String::new();
        loop {
            line.clear();
            if self.output.read_line(&mut line)? == 0 {
                bail!("the restore process ended: {}", self.child.wait()?);
            }
            if line.trim_end() == mark {
                return Ok(());
            }
        }
    }

    pub(crate) fn end(mut self) -> anyhow::Result<()> {
        drop(self.input);
        let status = self.child.wait()?;
        if !status.success() {
            bail!("the restore process failed: {status}");
        }
        Ok(())
    }
}
