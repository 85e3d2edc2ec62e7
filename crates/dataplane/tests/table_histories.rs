//! Random histories of wishes, foreign edits, failures and lost answers: whatever happened, the next refresh
//! brings the table to what is wanted, and what is foreign is still there.
//!
//! One family: the driver knows its family by name only; `tables_kernel.rs` runs both.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use dataplane::driver::{Driver as _, Next};
use dataplane::iptables::hash::rule_hashes;
use dataplane::iptables::{Features, TableDriver, TableResponse};
use dataplane::{ChainInsertMode, Variant};
use program::{Action, BaseChain, Hooks, Match, Rule, SetName, Side, TableChanges};

use support::*;

const CHAINS: u32 = 8;
const SETS: u32 = 3;

/// What is wanted: rules by chain, and the hooks of two base chains.
#[derive(Clone, Default)]
struct Wish {
    chains: BTreeMap<String, Vec<Rule>>,
    hooks: BTreeMap<BaseChain, Hooks>,
}

#[test]
fn any_history_ends_with_what_is_wanted_and_leaves_what_is_foreign() {
    for seed in 0..400 {
        let variant = if seed % 2 == 0 { Variant::Legacy } else { Variant::Nft };
        let mode = if seed % 3 == 0 { ChainInsertMode::Append } else { ChainInsertMode::Insert };
        History::new(seed, variant, mode).run(40);
    }
}

struct History {
    seed: u64,
    random: fastrand::Rng,
    mode: ChainInsertMode,
    driver: TableDriver,
    kernel: FakeKernel,
    wish: Wish,
    now: Instant,
}

impl History {
    fn new(seed: u64, variant: Variant, mode: ChainInsertMode) -> Self {
        let mut kernel = FakeKernel::new(variant);
        kernel.chains.insert("DOCKER".to_owned(), vec!["--jump RETURN".to_owned()]);
        kernel.chains.insert("cali-stale".to_owned(), vec!["--jump DROP".to_owned()]);
        let driver = driver(variant, mode);
        let random = fastrand::Rng::with_seed(seed);
        Self { seed, random, mode, driver, kernel, wish: Wish::default(), now: Instant::now() }
    }

    fn run(mut self, steps: u32) {
        for _ in 0..steps {
            match self.random.u32(0..10) {
                0..4 => self.wish_something(),
                4..6 => self.damage(),
                6 => self.kernel.broken = self.random.bool().then_some("iptables-restore: line 2 failed"),
                7 => self.lose_an_answer(),
                8 => self.driver.distrust(),
                _ => {}
            }
            let blocked = (0..SETS).filter_map(|number| {
                let luck = self.random.u32(0..8);
                (luck < 2).then(|| (set(number), luck == 0))
            });
            let blocked = blocked.collect();
            self.driver.begin(&blocked);
            self.now += Duration::from_secs(self.random.u64(0..30));
            self.kernel.run(&mut self.driver, self.now).ok();
        }
        self.kernel.broken = None;
        self.driver.begin(&[].into());
        for _ in 0..3 {
            self.now += 2 * REFRESH;
            self.kernel.run(&mut self.driver, self.now).ok();
            self.driver.begin(&[].into());
        }
        self.check();
    }

    /// A new program: chains lead only to chains of higher number, as in ours.
    fn wish_something(&mut self) {
        let mut next = self.wish.clone();
        for number in (0..CHAINS).rev() {
            match self.random.u32(0..6) {
                0 => drop(next.chains.remove(&chain_name(number))),
                1 | 2 => {
                    let later: Vec<u32> =
                        (number + 1..CHAINS).filter(|later| next.chains.contains_key(&chain_name(*later))).collect();
                    let rules = (0..self.random.u32(0..4)).map(|_| self.rule(number, &later)).collect();
                    next.chains.insert(chain_name(number), rules);
                }
                _ => {}
            }
        }
        // Chains whose targets went lose those rules.
        let names: Vec<String> = next.chains.keys().cloned().collect();
        for rules in next.chains.values_mut() {
            rules.retain(|rule| rule.target().is_none_or(|target| names.iter().any(|name| name == target.as_str())));
        }
        let top = next.chains.keys().next().cloned();
        for base in [BaseChain::Forward, BaseChain::Input] {
            let inserts = top.iter().filter(|_| self.random.u32(0..4) > 0).map(|top| jump(top)).collect();
            let appends = if self.random.bool() { vec![Rule::new(Vec::new(), Action::SetMark(1))] } else { Vec::new() };
            next.hooks.insert(base, Hooks { inserts, appends });
        }
        let mut changes = TableChanges::default();
        for (name_text, rules) in &next.chains {
            if self.wish.chains.get(name_text) != Some(rules) {
                put(&mut changes, name_text, rules.clone());
            }
        }
        for gone in self.wish.chains.keys().filter(|gone| !next.chains.contains_key(*gone)) {
            changes.chains.insert(name(gone), None);
        }
        changes.hooks = next.hooks.clone();
        self.wish = next;
        self.driver.want(changes);
    }

    /// Even chains are policies, odd ones belong to nothing; only policies can be refused.
    fn rule(&mut self, number: u32, later: &[u32]) -> Rule {
        let policy = number.is_multiple_of(2);
        let rule = match self.random.u32(0..10) {
            0 if policy => refused_rule(),
            1 | 2 => {
                let set = set(self.random.u32(0..SETS));
                let matched = Match::Set { side: Side::Source, negated: false, set, with_port: false };
                Rule::new(vec![matched], Action::Accept)
            }
            3..7 if !later.is_empty() && !policy => jump(&chain_name(later[self.random.usize(0..later.len())])),
            _ => Rule::new(vec![Match::MarkIs { value: self.random.u32(1..9), mask: 0xff }], Action::Drop),
        };
        if policy { with_origin(rule, number) } else { rule }
    }

    /// What other programs and people do.
    fn damage(&mut self) {
        let ours: Vec<String> = self.kernel.chains.keys().filter(|name| name.starts_with("cali-")).cloned().collect();
        let victim =
            if ours.is_empty() { "FORWARD".to_owned() } else { ours[self.random.usize(0..ours.len())].clone() };
        match self.random.u32(0..7) {
            0 => self.kernel.chains.get_mut(&victim).unwrap().clear(),
            1 => drop(self.kernel.chains.get_mut(&victim).unwrap().pop()),
            2 => self.kernel.chains.get_mut(&victim).unwrap().insert(0, "--jump ACCEPT".to_owned()),
            3 => self.kernel.chains.get_mut("FORWARD").unwrap().retain(|rule| !rule.contains("cali:")),
            4 => self.kernel.chains.get_mut("FORWARD").unwrap().push("--jump DOCKER".to_owned()),
            5 => self.kernel.chains.get_mut("INPUT").unwrap().insert(0, "--jump DOCKER".to_owned()),
            _ => drop(self.kernel.chains.insert("cali-foreign".to_owned(), vec!["--jump DROP".to_owned()])),
        }
    }

    /// The driver asks, the kernel acts or not, and the answer is lost or says that the program broke.
    fn lose_an_answer(&mut self) {
        let Next::Do(request) = self.driver.next(self.now) else { return };
        if let (true, dataplane::iptables::TableRequest::Restore(input)) = (self.random.bool(), &request) {
            self.kernel.restore(input);
        }
        if self.random.bool() {
            let error = dataplane::DriverError::Timeout { program: "x".to_owned(), after: REFRESH };
            self.driver.handle(TableResponse::Broken(error), self.now).unwrap_err();
        }
    }

    fn check(&mut self) {
        let seed = self.seed;
        assert!(self.driver.is_settled(), "seed {seed}: {:?} {:?}", self.driver.failing(), self.driver.held());
        let held = self.driver.held();
        let mut expected: Vec<String> = self.wish.chains.keys().cloned().collect();
        expected.extend(["DOCKER", "FORWARD", "INPUT", "OUTPUT"].map(str::to_owned));
        expected.sort();
        let chains: Vec<_> = self.kernel.chains.keys().cloned().collect();
        assert_eq!(chains, expected, "seed {seed}");
        for (chain, rules) in &self.wish.chains {
            let closed = vec![drop_all()];
            let bad = rules.iter().any(|rule| rule.matches.iter().any(|one| matches!(one, Match::Icmp { .. })));
            let rules = if bad { &closed } else { rules };
            assert_eq!(
                hashes(self.kernel.rules(chain)),
                hash_texts(chain, rules),
                "seed {seed} chain {chain} {held:?}"
            );
        }
        for base in [BaseChain::Forward, BaseChain::Input] {
            let kernel = self.kernel.rules(base.as_str());
            let hooks = self.wish.hooks.get(&base).cloned().unwrap_or_default();
            let foreign = kernel.iter().filter(|rule| !rule.contains("cali:")).count();
            let others = vec![String::new(); foreign];
            let inserts = hash_texts(base.as_str(), &hooks.inserts);
            let appends = hash_texts(&format!("{}*appends*", base.as_str()), &hooks.appends);
            let expected = match self.mode {
                ChainInsertMode::Insert => [inserts, others, appends].concat(),
                ChainInsertMode::Append => [others, inserts, appends].concat(),
            };
            assert_eq!(hashes(kernel), expected, "seed {seed} {base:?}");
        }
        assert_eq!(self.kernel.rules("DOCKER"), ["--jump RETURN"], "seed {seed}");
        // And nothing is left to do.
        let before = self.kernel.chains.clone();
        self.driver.take_stats();
        self.now += 2 * REFRESH;
        self.kernel.run(&mut self.driver, self.now).unwrap();
        assert_eq!((self.driver.take_stats().writes, &self.kernel.chains), (0, &before), "seed {seed}");
    }
}

fn hashes(rules: &[String]) -> Vec<String> {
    let hash = |rule: &String| Some(rule.split_once("\"cali:")?.1.split_once('"')?.0.to_owned());
    rules.iter().map(|rule| hash(rule).unwrap_or_default()).collect()
}

fn hash_texts(chain: &str, rules: &[Rule]) -> Vec<String> {
    rule_hashes(chain, rules, &Features::default()).iter().map(ToString::to_string).collect()
}

fn chain_name(number: u32) -> String {
    format!("cali-c{number}")
}

fn set(number: u32) -> SetName {
    SetName::new(&format!("cali40s:{number}")).unwrap()
}
