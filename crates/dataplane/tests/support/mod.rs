//! A table in memory and short ways to write programs, for the tests of the table driver.

#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    reason = "shared by test programs that each use a part; a test fails by panicking"
)]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use dataplane::driver::{Driver as _, Next};
use dataplane::iptables::plan::Setup;
use dataplane::iptables::{Checks, Features, TableDriver, TableRequest, TableResponse};
use dataplane::{ChainInsertMode, DriverError, Variant};
use program::{
    Action, Chain, ChainName, Direction, Family, IcmpType, Match, Origin, Protocol, Rule, Table, TableChanges, TableId,
};

pub const FILTER: TableId = TableId { family: Family::V4, table: Table::Filter };
pub const REFRESH: Duration = Duration::from_secs(180);
/// No look after a write comes before the refresh.
pub const CHECKS: Checks = Checks { refresh: Some(REFRESH), after_write: Duration::from_secs(3599) };

/// A table that refuses any line with an ICMP match, as the kernel does without the protocol.
pub struct FakeKernel {
    variant: Variant,
    pub chains: Chains,
    pub requests: u32,
    /// Says this to every transaction.
    pub broken: Option<&'static str>,
    /// Refuses no rule any more.
    pub forgives: bool,
}

impl FakeKernel {
    pub fn new(variant: Variant) -> Self {
        let chains = ["INPUT", "FORWARD", "OUTPUT"].map(|base| (base.to_owned(), Vec::new()));
        Self { variant, chains: chains.into(), requests: 0, broken: None, forgives: false }
    }

    pub fn has(&self, chain: &str) -> bool {
        self.chains.contains_key(chain)
    }

    pub fn rules(&self, chain: &str) -> &[String] {
        self.chains.get(chain).map(Vec::as_slice).unwrap_or_default()
    }

    /// Runs the driver until it is idle or must wait; returns the last error.
    pub fn run(&mut self, driver: &mut TableDriver, now: Instant) -> Result<(), DriverError> {
        let mut outcome = Ok(());
        for _ in 0..1_000 {
            let response = match driver.next(now) {
                Next::Do(TableRequest::Save { .. } | TableRequest::Chains { .. }) => TableResponse::Done(self.list()),
                Next::Do(TableRequest::Restore(input)) => self.restore(&input),
                Next::Do(TableRequest::Remove { .. }) => panic!("the listing has no rules without text"),
                Next::NotBefore(_) | Next::Idle => return outcome,
            };
            self.requests += 1;
            if let Err(error) = driver.handle(response, now) {
                outcome = Err(error);
            }
        }
        panic!("the driver does not come to an end");
    }

    pub fn list(&self) -> String {
        let mut text = "*filter\n".to_owned();
        for chain in self.chains.keys() {
            text += &format!(":{chain} - [0:0]\n");
        }
        for (chain, rules) in &self.chains {
            for rule in rules {
                text += &format!("-A {chain} {}\n", rule.replace("--jump", "-j").replace("--goto", "-g"));
            }
        }
        text + "COMMIT\n# Completed on a day\n"
    }

    pub fn restore(&mut self, input: &str) -> TableResponse {
        if let Some(stderr) = self.broken {
            return refused(stderr);
        }
        let mut next = self.chains.clone();
        let mut bad = Vec::new();
        for (number, line) in (1..).zip(input.lines()) {
            if line.contains("--icmp-type") && !self.forgives {
                bad.push(number);
            }
            if line == "COMMIT" {
                if let Some(complaint) = self.complain(&next, &bad, number) {
                    return refused(&complaint);
                }
                self.chains.clone_from(&next);
            } else if take_line(&mut next, line).is_none() {
                return refused(&format!("iptables-restore: line {number} failed\n"));
            }
        }
        TableResponse::Done(String::new())
    }

    /// What is wrong with the table as a whole. The legacy variant blames the COMMIT for everything.
    fn complain(&self, next: &Chains, bad: &[u32], commit: u32) -> Option<String> {
        let targets = next.values().flatten().filter_map(|rule| Some(target(rule)?.to_owned()));
        let loose = targets.filter(|target| !next.contains_key(target)).count() > 0;
        if bad.is_empty() && !loose {
            return None;
        }
        let lines = bad.iter().map(|bad| format!("line {bad}: RULE_APPEND failed (Invalid argument): rule\n"));
        Some(match self.variant {
            Variant::Nft if !loose => {
                format!("iptables-nft-restore v1.8.9 (nf_tables): \n{}", lines.collect::<String>())
            }
            Variant::Nft | Variant::Legacy => format!("iptables-restore: line {commit} failed\n"),
        })
    }
}

pub type Chains = BTreeMap<String, Vec<String>>;

/// The chain that a rule leads to, unless that is a verdict.
fn target(rule: &str) -> Option<&str> {
    let (rest, target) = rule.rsplit_once(' ')?;
    (rest.ends_with("--jump") || rest.ends_with("--goto")).then_some(target).filter(|name| *name != name.to_uppercase())
}

/// Does what one line says; `None` if it is impossible.
fn take_line(chains: &mut Chains, line: &str) -> Option<()> {
    let (op, rest) = line.split_once(' ').unwrap_or((line, ""));
    let (chain, rule) = rest.split_once(' ').unwrap_or((rest, ""));
    match op {
        "-A" => chains.get_mut(chain)?.push(rule.to_owned()),
        "-I" => chains.get_mut(chain)?.insert(0, rule.to_owned()),
        "-R" => {
            let (position, rule) = rule.split_once(' ')?;
            let place = chains.get_mut(chain)?.get_mut(position.parse::<usize>().ok()?.checked_sub(1)?)?;
            rule.clone_into(place);
        }
        "-D" => {
            let rules = chains.get_mut(chain)?;
            let text = rule.replace("-j ", "--jump ").replace("-g ", "--goto ");
            let position = rule.parse::<usize>().ok().and_then(|at| at.checked_sub(1));
            let position = position.or_else(|| rules.iter().position(|have| *have == text))?;
            (position < rules.len()).then(|| rules.remove(position))?;
        }
        "--delete-chain" => {
            let used = chains.values().flatten().any(|rule| target(rule) == Some(chain));
            chains.remove(chain).filter(|rules| !used && rules.is_empty())?;
        }
        _ if op.starts_with(':') => drop(chains.insert(op[1..].to_owned(), Vec::new())),
        _ => assert!(op.starts_with('*'), "{line}"),
    }
    Some(())
}

pub fn refused(stderr: &str) -> TableResponse {
    TableResponse::Refused { program: "restore".to_owned(), status: 1, stderr: stderr.to_owned(), lines_before: 0 }
}

pub fn setup(variant: Variant, insert_mode: ChainInsertMode) -> Setup {
    Setup { table: Table::Filter, variant, insert_mode, features: Features::default() }
}

pub fn driver(variant: Variant, insert_mode: ChainInsertMode) -> TableDriver {
    TableDriver::new(FILTER, setup(variant, insert_mode), CHECKS)
}

pub fn with_origin(mut rule: Rule, number: u32) -> Rule {
    let key = model::PolicyKey {
        kind: model::PolicyKind::NetworkPolicy,
        namespace: "ns".into(),
        name: format!("policy-{number}").into(),
    };
    rule.origin = Some(Origin::Policy { key, direction: Direction::Ingress, index: 0 });
    rule
}

pub fn refused_rule() -> Rule {
    let tcp = Match::Protocol { negated: false, protocol: Protocol::Number(6) };
    let icmp = Match::Icmp { family: Family::V4, negated: false, icmp: IcmpType { kind: 8, code: None } };
    Rule::new(vec![tcp, icmp], Action::Accept)
}

pub fn put(changes: &mut TableChanges, chain_name: &str, rules: Vec<Rule>) {
    changes.chains.insert(name(chain_name), Some(chain(chain_name, rules)));
}

pub fn chain(chain_name: &str, rules: Vec<Rule>) -> Arc<Chain> {
    Arc::new(Chain { name: name(chain_name), rules })
}

pub fn jump(target: &str) -> Rule {
    Rule::new(Vec::new(), Action::Jump(name(target)))
}

pub fn drop_all() -> Rule {
    Rule::new(Vec::new(), Action::Drop)
}

pub fn name(text: &str) -> ChainName {
    ChainName::new(text).unwrap()
}
