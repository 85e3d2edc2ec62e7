//! An apply loop against the tools and the kernel of the calling thread's network namespace, and a small program.

#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    reason = "shared by test programs that each use a part; a test fails by panicking"
)]

use std::fmt::Write as _;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use dataplane::{ApplyLoop, Options, Report, Variant};
use program::{
    Action, BaseChain, Chain, ChainName, Changes, Family, Hooks, InterfaceMatch, Match, Rule, Table, TableChanges,
    TableId,
};

pub const LIMIT: Duration = Duration::from_secs(30);

/// The tables of one family in one variant.
#[derive(Clone, Copy, Debug)]
pub struct Host {
    pub variant: Variant,
    pub family: Family,
}

impl Host {
    pub fn command(self, suffix: &str) -> Command {
        let stem = if self.family == Family::V4 { "iptables" } else { "ip6tables" };
        Command::new(format!("{stem}-{}{suffix}", self.variant.as_str()))
    }

    /// What the save program prints of a table.
    pub fn listing(self, table: &str) -> String {
        let output = self.command("-save").args(["-t", table]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Writes as somebody else would.
    pub fn restore(self, input: &str) {
        let mut command = self.command("-restore");
        feed(command.args(["--noflush", "--wait", "10"]), input);
    }

    pub fn nft(self, script: &str) {
        feed(Command::new("nft").args(["-f", "-"]), script);
    }

    /// Everything in nf_tables, of all families.
    pub fn ruleset(self) -> String {
        let output = Command::new("nft").args(["-s", "list", "ruleset"]).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    }

    /// Lines of the rule set that no iptables made.
    pub fn foreign_native_rules(self) -> Vec<String> {
        let native = ["jhash", "vmap", "@friends", "numgen", "friends {", "ways {", "watcher"];
        let all = self.ruleset();
        all.lines().filter(|line| native.iter().any(|mark| line.contains(mark))).map(str::to_owned).collect()
    }
}

fn feed(command: &mut Command, input: &str) {
    let mut child = command.stdin(Stdio::piped()).stderr(Stdio::inherit()).spawn().unwrap();
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), input.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success(), "{input}");
}

/// An apply loop with a runtime of its own.
pub struct Agent {
    runtime: tokio::runtime::Runtime,
    pub apply: ApplyLoop,
}

impl Agent {
    pub fn new(host: Host) -> Self {
        Self::holding(host, false)
    }

    pub fn holding(host: Host, hold: bool) -> Self {
        Self::with(Options { variant: Some(host.variant), hold_restore_open: hold, ..Options::default() })
    }

    pub fn with(options: Options) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        Self { runtime, apply: ApplyLoop::new(options) }
    }

    pub fn apply(&mut self, changes: Changes) -> Report {
        self.runtime.block_on(self.apply.apply(changes))
    }

    /// Does what is due for some time.
    pub fn apply_for(&mut self, time: Duration) {
        let end = Instant::now() + time;
        let mut report = self.apply(Changes::default());
        loop {
            let due = report.again.map_or(end, |(due, _)| due.min(end));
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            if Instant::now() >= end {
                return;
            }
            report = self.apply(Changes::default());
        }
    }

    /// Applies nothing new for as long as something is to be done within the next second.
    pub fn settle(&mut self, mut report: Report) -> Report {
        let deadline = Instant::now() + LIMIT;
        while let Some((due, _)) = report.again.filter(|(due, _)| *due < Instant::now() + Duration::from_secs(1)) {
            assert!(Instant::now() < deadline, "{report:?}");
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            report = self.apply(Changes::default());
        }
        report
    }
}

#[track_caller]
pub fn assert_sound(report: &Report) {
    assert!(!report.failed(), "{report:?}");
    assert!(report.drivers.iter().all(|driver| driver.held.is_empty()), "{report:?}");
}

/// Policies behind the FORWARD hook, and a hook in each other table.
pub fn program(host: Host, policies: u32) -> Changes {
    let mut changes = Changes::default();
    let from_workload = Match::In(InterfaceMatch::Prefix("cali".to_owned()));
    let mut filter = TableChanges::default();
    for number in 0..policies {
        put(&mut filter, &format!("cali-pi-{number}"), vec![rule(Action::SetMark(0x10000)), rule(Action::Drop)]);
    }
    put(&mut filter, "cali-all", (0..policies).map(|number| jump(&format!("cali-pi-{number}"))).collect());
    put(&mut filter, "cali-FORWARD", vec![Rule::new(vec![from_workload.clone()], Action::Jump(name("cali-all")))]);
    let accepted = Rule::new(vec![Match::MarkIs { value: 0x10000, mask: 0x10000 }], Action::Accept)
        .comment("Policy explicitly accepted packet.");
    let hooks = Hooks { inserts: vec![jump("cali-FORWARD")], appends: vec![accepted, rule(Action::SetMark(0x10000))] };
    filter.hooks.insert(BaseChain::Forward, hooks);
    changes.tables.insert(TableId { family: host.family, table: Table::Filter }, filter);
    for (table, base) in [
        (Table::Raw, BaseChain::Prerouting),
        (Table::Mangle, BaseChain::Prerouting),
        (Table::Nat, BaseChain::Postrouting),
    ] {
        let mut other = TableChanges::default();
        let chain = format!("cali-{}", base.as_str());
        put(&mut other, &chain, vec![Rule::new(vec![from_workload.clone()], Action::Return)]);
        other.hooks.insert(base, Hooks { inserts: vec![jump(&chain)], appends: Vec::new() });
        changes.tables.insert(TableId { family: host.family, table }, other);
    }
    changes
}

/// One policy with other rules.
pub fn changed_policy(host: Host, number: u32) -> Changes {
    let mut filter = TableChanges::default();
    put(&mut filter, &format!("cali-pi-{number}"), vec![rule(Action::Drop), rule(Action::Return)]);
    Changes { tables: [(TableId { family: host.family, table: Table::Filter }, filter)].into(), ..Changes::default() }
}

fn put(changes: &mut TableChanges, chain: &str, rules: Vec<Rule>) {
    changes.chains.insert(name(chain), Some(Arc::new(Chain { name: name(chain), rules })));
}

fn jump(target: &str) -> Rule {
    rule(Action::Jump(name(target)))
}

fn rule(action: Action) -> Rule {
    Rule::new(Vec::new(), action)
}

fn name(text: &str) -> ChainName {
    ChainName::new(text).unwrap()
}

/// What is logged on this thread, one line an event.
#[derive(Clone, Default)]
pub struct Log(Arc<Mutex<String>>);

impl Log {
    pub fn while_doing<T>(&self, work: impl FnOnce() -> T) -> T {
        tracing::subscriber::with_default(self.clone(), work)
    }

    pub fn text(&self) -> String {
        self.0.lock().unwrap().clone()
    }

    /// Lines that have both.
    pub fn count(&self, one: &str, two: &str) -> usize {
        self.text().lines().filter(|line| line.contains(one) && line.contains(two)).count()
    }
}

impl tracing::Subscriber for Log {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        *metadata.level() <= tracing::Level::INFO
    }

    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }

    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}

    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}

    fn event(&self, event: &tracing::Event<'_>) {
        let mut line = event.metadata().level().to_string();
        event.record(&mut Fields(&mut line));
        writeln!(self.0.lock().unwrap(), "{line}").unwrap();
    }

    fn enter(&self, _: &tracing::span::Id) {}

    fn exit(&self, _: &tracing::span::Id) {}
}

struct Fields<'a>(&'a mut String);

impl tracing::field::Visit for Fields<'_> {
    fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn std::fmt::Debug) {
        write!(self.0, " {field}={value:?}").unwrap();
    }
}
