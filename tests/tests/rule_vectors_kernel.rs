//! The text of the vectors, and what the compiler and the renderer make of all rule cases, loaded into a real kernel:
//! both iptables variants, both families (netfilter.md 20).
//!
//! Every line must be accepted, and the hashes that are read back must be the hashes that were written. A check-only
//! run of the restore programs would accept text that the kernel refuses (datastore.md H-5), so nothing less will do.
//! Needs root, iptables and ipset; all happens in a network namespace that ends with the test.

#![allow(clippy::unwrap_used, reason = "helper functions of tests fail the test that uses them")]

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::io::Write as _;
use std::process::{Command, Stdio};

use compiler::Options;
use compiler::policy::{self, Context, Owner};
use dataplane::iptables::features::Features;
use felix_tests::rule_text::{RuleCase, lines, rule_program, section, text, texts, vectors};
use graph::{RuleProgram, SideProgram};
use model::{Action, Family, IcmpMatch, PolicyKey, PolicyKind, PortRange, Protocol, SetId};
use program::{Chain, Direction, SetName, Table};
use serde_json::Value;
use testkit::kernel_test;
use testkit::netns::in_new_netns;

const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

/// The lock of the legacy programs is one for the whole host, whatever the network namespace.
const WAIT: [&str; 2] = ["-w", "60"];

/// The chains of one case in one table: they are loaded together.
#[derive(Debug)]
struct Program {
    id: String,
    family: Option<Family>,
    table: &'static str,
    /// By chain, in the order in which they are written.
    chains: BTreeMap<String, Vec<String>>,
}

impl Program {
    fn new(id: &str, family: Option<Family>, table: &'static str, lines: &[String]) -> Self {
        let mut chains: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for line in lines {
            let name = line.split(' ').nth(1).unwrap();
            chains.entry(name.to_owned()).or_default().push(line.clone());
        }
        Self { id: id.to_owned(), family, table, chains }
    }
}

fn all_lines(chains: &Value) -> Vec<String> {
    let chains = chains.as_object().unwrap().values();
    chains.flat_map(texts).map(str::to_owned).collect()
}

/// Every program of the file that iptables can load.
fn programs(vectors: &Value) -> Vec<Program> {
    let mut programs = rule_programs(vectors);
    let families = [(Some(Family::V4), "ipv4"), (Some(Family::V6), "ipv6")];
    for case in section(vectors, "policy_chains") {
        for (family, field) in families {
            programs.push(Program::new(text(case, "id"), family, "filter", &all_lines(&case[field])));
        }
    }
    for case in section(vectors, "policy_groups") {
        let lines: Vec<String> = texts(&case["chain_lines"]).into_iter().map(str::to_owned).collect();
        programs.push(Program::new(text(case, "chain"), None, "filter", &lines));
    }
    for name in ["endpoint_chains", "dispatch_chains"] {
        for case in section(vectors, name) {
            let id = text(case, "id");
            let table = match id {
                _ if id.contains("-mangle") => "mangle",
                _ if id.ends_with("-raw") => "raw",
                _ => "filter",
            };
            programs.push(Program::new(id, None, table, &all_lines(&case["chains"])));
        }
    }
    for case in section(vectors, "static_chains") {
        for table in ["raw", "mangle", "nat", "filter"] {
            let parts = &case["tables"][table];
            let mut lines = all_lines(&parts["base_inserts"]);
            lines.extend(all_lines(&parts["base_appends"]));
            lines.extend(all_lines(&parts["chains"]));
            let id = format!("{} {table}", text(case, "config"));
            programs.push(Program::new(&id, family_of(case), table, &lines));
        }
    }
    for case in section(vectors, "nat_and_misc_chains") {
        let table = match text(case, "chain") {
            "cali-cidr-block" => "filter",
            "cali-egress-dscp" => "mangle",
            "cali-rpf-skip" => "raw",
            _ => "nat",
        };
        let lines: Vec<String> = texts(&case["lines"]).into_iter().map(str::to_owned).collect();
        programs.push(Program::new(text(case, "id"), family_of(case), table, &lines));
    }
    programs
}

fn family_of(case: &Value) -> Option<Family> {
    Some(if case["ip_version"] == 4 { Family::V4 } else { Family::V6 })
}

/// The rule cases as this program renders them: as the only rule of their policy.
fn rule_programs(vectors: &Value) -> Vec<Program> {
    let mut programs = Vec::new();
    for case in section(vectors, "rule_cases") {
        let case = RuleCase::read(case);
        for family in FAMILIES {
            let context = case.context(family);
            let mut complaints = Vec::new();
            let chain = policy::chain(&context, std::slice::from_ref(&case.rule), &mut complaints);
            // Trailing returns are cut from chains; here they are to be loaded too.
            let whole = Chain { rules: policy::rule(&context, &case.rule, &mut complaints), ..chain.clone() };
            assert!(complaints.is_empty(), "{}: {complaints:?}", case.id);
            for chain in [chain, whole] {
                programs.push(Program::new(case.id, Some(family), "filter", &lines(&chain, &case.features)));
            }
        }
    }
    programs
}

/// Loads packed programs, so that a few hundred of them do not take a few hundred processes each.
fn pack(programs: Vec<&Program>) -> Vec<Vec<&Program>> {
    let mut rounds: Vec<(BTreeSet<&str>, Vec<&Program>)> = Vec::new();
    for program in programs {
        let names: BTreeSet<&str> = program.chains.keys().map(String::as_str).collect();
        match rounds.iter_mut().find(|(taken, _)| taken.is_disjoint(&names)) {
            Some((taken, members)) => {
                taken.extend(names);
                members.push(program);
            }
            None => rounds.push((names, vec![program])),
        }
    }
    rounds.into_iter().map(|(_, members)| members).collect()
}

fn run(program: &str, arguments: &[&str], input: &str) -> Result<String, String> {
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| format!("{program}: {error}"))?;
    // All of these programs read their input to the end before they answer.
    child.stdin.take().unwrap().write_all(input.as_bytes()).map_err(|error| format!("{program}: {error}"))?;
    let output = child.wait_with_output().map_err(|error| format!("{program}: {error}"))?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        return Err(format!("{program} {arguments:?}: {}: {stderr}", output.status));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn is_base_chain(name: &str) -> bool {
    matches!(name, "PREROUTING" | "INPUT" | "FORWARD" | "OUTPUT" | "POSTROUTING")
}

/// The word after each occurrence of any of the words.
fn words_after<'a>(line: &'a str, words: &'a [&str]) -> impl Iterator<Item = &'a str> {
    let all: Vec<&str> = line.split(' ').collect();
    let pairs: Vec<&str> = all.windows(2).filter(|pair| words.contains(&pair[0])).map(|pair| pair[1]).collect();
    pairs.into_iter()
}

fn restore_input(table: &str, round: &[&Program]) -> String {
    let lines = || round.iter().flat_map(|program| program.chains.values().flatten());
    let mut chains: BTreeSet<&str> = lines().flat_map(|line| words_after(line, &["--jump", "--goto"])).collect();
    chains.retain(|name| name.starts_with("cali-"));
    chains.extend(round.iter().flat_map(|program| program.chains.keys()).map(String::as_str));
    let mut input = format!("*{table}\n");
    for chain in chains.iter().filter(|name| !is_base_chain(name)) {
        writeln!(input, ":{chain} - -").unwrap();
    }
    for line in lines() {
        writeln!(input, "{line}").unwrap();
    }
    input.push_str("COMMIT\n");
    input
}

/// The hash of a line of restore input or of save output.
fn hash_of(line: &str) -> Option<&str> {
    let rest = line.split_once("--comment \"cali:").or_else(|| line.split_once("--comment cali:"))?.1;
    rest.get(..16)
}

fn hashes_by_chain(save_output: &str) -> BTreeMap<String, Vec<String>> {
    let mut hashes: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for line in save_output.lines().filter(|line| line.starts_with("-A ")) {
        let chain = line.split(' ').nth(1).unwrap();
        hashes.entry(chain.to_owned()).or_default().push(hash_of(line).unwrap_or("none").to_owned());
    }
    hashes
}

/// Loads a round; on an error loads its programs one by one, to name the one that is refused.
fn load(restore: &str, table: &str, round: &[&Program]) {
    let Err(error) = run(restore, &WAIT, &restore_input(table, round)) else { return };
    for program in round {
        let input = restore_input(table, &[program]);
        if let Err(error) = run(restore, &WAIT, &input) {
            panic!("{}: {error}\n{input}", program.id);
        }
    }
    panic!("{error}");
}

fn create_sets(programs: &[Program], family: Family) {
    let inet = match family {
        Family::V4 => "inet",
        Family::V6 => "inet6",
    };
    let prefix = format!("cali{}", family.digit());
    let mut kinds: BTreeMap<&str, &str> = BTreeMap::new();
    for line in programs.iter().flat_map(|program| program.chains.values().flatten()) {
        let words: Vec<&str> = line.split(' ').collect();
        for triple in words.windows(3).filter(|triple| triple[0] == "--match-set" && triple[1].starts_with(&prefix)) {
            let kind = if triple[2].contains(',') { "hash:ip,port" } else { "hash:net" };
            kinds.insert(triple[1], kind);
        }
    }
    let input: String = kinds.iter().map(|(name, kind)| format!("create {name} {kind} family {inet}\n")).collect();
    run("ipset", &["restore"], &input).unwrap();
}

/// Rules as nobody should write them, together with those that somebody will: every combination of fields that a
/// datastore can hold, under names that try to break out of their line.
fn random_programs(count: usize) -> Vec<Program> {
    let mut dice = fastrand::Rng::with_seed(7);
    let names = ["p", "a b", "x\" -j ACCEPT", "n\nCOMMIT\n*filter", "ä'\\", "-A", "a/b", &"long".repeat(70)];
    let options = Options { flow_logs: true, log_prefix: "%k \"%n %p".to_owned(), ..Options::default() };
    let mut programs = Vec::new();
    for number in 0..count {
        let name = format!("{number}-{}", dice.choice(names).unwrap());
        let kind = if dice.bool() { PolicyKind::GlobalNetworkPolicy } else { PolicyKind::NetworkPolicy };
        let namespace = if kind == PolicyKind::NetworkPolicy { *dice.choice(&names).unwrap() } else { "" };
        let key = PolicyKey { kind, namespace: namespace.into(), name: name.as_str().into() };
        let rule = random_rule(&mut dice);
        let policy = Owner::Policy { key: &key, tier: "t\" x", untracked: false };
        let profile_name = name.as_str().into();
        let owner = if dice.bool() { policy } else { Owner::Profile { name: &profile_name } };
        for family in FAMILIES {
            let direction = if dice.bool() { Direction::Ingress } else { Direction::Egress };
            let set_name = &|id: &SetId, family| SetName::new(&id.kernel_name(family));
            let context = Context { options: &options, owner, direction, family, table: Table::Filter, set_name };
            let chain = policy::chain(&context, std::slice::from_ref(&rule), &mut Vec::new());
            let lines = lines(&chain, &Features::default());
            assert!(lines.iter().all(|line| !line.contains('\n')), "{lines:?}");
            programs.push(Program::new(&format!("{rule:?}"), Some(family), "filter", &lines));
        }
    }
    programs
}

fn random_rule(dice: &mut fastrand::Rng) -> RuleProgram {
    let mut rule = rule_program(&serde_json::json!({}));
    rule.action = *dice.choice(&[Action::Allow, Action::Deny, Action::Pass, Action::Log]).unwrap();
    let protocols = ["icmp", "tcp", "udp", "icmpv6", "sctp", "udplite", "none of these"];
    let protocol = |dice: &mut fastrand::Rng| match dice.u8(..4) {
        0 => Some(Protocol::Number(dice.u8(..))),
        1 => Some(Protocol::Number(*dice.choice(&[0, 1, 6, 17, 33, 58, 132, 136]).unwrap())),
        2 => Some(Protocol::Name((*dice.choice(&protocols).unwrap()).into())),
        _ => None,
    };
    rule.protocol = protocol(dice);
    if dice.u8(..4) == 0 {
        rule.not_protocol = protocol(dice);
    }
    let icmp = |dice: &mut fastrand::Rng| {
        let code = dice.bool().then(|| dice.u8(..));
        (dice.u8(..5) == 0).then(|| IcmpMatch { kind: dice.u8(..255), code })
    };
    rule.icmp = icmp(dice);
    rule.not_icmp = icmp(dice);
    rule.source = random_side(dice);
    rule.destination = random_side(dice);
    if dice.u8(..3) == 0 {
        rule.annotations.insert("why\"".to_owned(), "a\nb".repeat(dice.usize(..200)));
    }
    rule
}

fn random_side(dice: &mut fastrand::Rng) -> SideProgram {
    const NETS: [&str; 6] = ["10.0.0.0/8", "10.1.0.0/16", "0.0.0.0/0", "fd00::/8", "fd01::1/128", "::/0"];
    let nets = |dice: &mut fastrand::Rng| {
        let count = dice.usize(..8).saturating_sub(4);
        (0..count).map(|_| dice.choice(NETS).unwrap().parse().unwrap()).collect()
    };
    let ports = |dice: &mut fastrand::Rng| {
        let count = dice.usize(..40).saturating_sub(20);
        let port = |first: u16| PortRange { first, last: first.saturating_add(first % 3) };
        (0..count).map(|_| port(dice.u16(..))).collect()
    };
    let sets = |dice: &mut fastrand::Rng, kind: &str| {
        let count = dice.usize(..6).saturating_sub(3);
        (0..count).map(|number| SetId::from_text(format!("{kind}:{number}"))).collect()
    };
    SideProgram {
        nets: nets(dice),
        not_nets: nets(dice),
        ports: ports(dice),
        not_ports: ports(dice),
        sets: sets(dice, "s"),
        not_sets: sets(dice, "s"),
        named_port_sets: sets(dice, "n"),
        not_named_port_sets: sets(dice, "n"),
        address_port_sets: sets(dice, "svc"),
    }
}

fn accepted_and_read_back(variant: &str, all: &[Program]) {
    in_new_netns(|| {
        let mut compared = 0;
        for family in FAMILIES {
            create_sets(all, family);
            let tool = match family {
                Family::V4 => "iptables",
                Family::V6 => "ip6tables",
            };
            let (restore, save) = (format!("{tool}-{variant}-restore"), format!("{tool}-{variant}-save"));
            for table in ["raw", "mangle", "nat", "filter"] {
                let fits = |program: &&Program| program.table == table && program.family.is_none_or(|f| f == family);
                // What names sets of one family only is of that family.
                let other = format!("cali{}0", if family == Family::V4 { 6 } else { 4 });
                let foreign = |program: &&Program| {
                    let mut lines = program.chains.values().flatten();
                    lines.any(|line| words_after(line, &["--match-set"]).any(|set| set.starts_with(&other)))
                };
                let programs = all.iter().filter(fits).filter(|program| !foreign(program)).collect();
                for round in pack(programs) {
                    load(&restore, table, &round);
                    let read = hashes_by_chain(&run(&save, &["-t", table], "").unwrap());
                    for program in round {
                        for (chain, lines) in &program.chains {
                            let written: Vec<&str> = lines.iter().map(|line| hash_of(line).unwrap()).collect();
                            let read = read.get(chain).map_or(&[] as &[String], Vec::as_slice);
                            assert_eq!(read, written, "{} {family} {table} {chain}", program.id);
                            compared += written.len();
                        }
                    }
                }
            }
        }
        assert!(compared > 3000, "only {compared} hashes were compared");
    });
}

fn vector_programs() -> Vec<Program> {
    let all = programs(&vectors());
    assert!(all.len() > 300, "only {} programs", all.len());
    all
}

#[test]
fn iptables_legacy_takes_all_text_and_shows_the_same_hashes() {
    kernel_test!("iptables-legacy-restore", "ip6tables-legacy-restore", "ipset");
    accepted_and_read_back("legacy", &vector_programs());
}

#[test]
fn iptables_nft_takes_all_text_and_shows_the_same_hashes() {
    kernel_test!("iptables-nft-restore", "ip6tables-nft-restore", "ipset");
    accepted_and_read_back("nft", &vector_programs());
}

#[test]
fn iptables_legacy_takes_whatever_a_datastore_may_hold() {
    kernel_test!("iptables-legacy-restore", "ip6tables-legacy-restore", "ipset");
    accepted_and_read_back("legacy", &random_programs(2000));
}

#[test]
fn iptables_nft_takes_whatever_a_datastore_may_hold() {
    kernel_test!("iptables-nft-restore", "ip6tables-nft-restore", "ipset");
    accepted_and_read_back("nft", &random_programs(2000));
}
