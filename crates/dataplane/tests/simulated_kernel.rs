//! The simulated kernel of `testkit` against the real one: random restore inputs and set operations go through
//! both, and both must give the same answers and hold the same afterwards. What the simulation says about the
//! agent is worth as much as this.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::Write as _;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use dataplane::Variant;
use dataplane::ipset::transport::{Netlink, Op, SetError, Transport as _};
use dataplane::iptables::refusal::Complaint;
use model::Family;
use program::{Member, Members, SetKind, SetName, Table};
use testkit::interpret::Bits;
use testkit::kernel::tables::{self, Chains, Quirks};
use testkit::kernel::{SimKernel, TableKey};
use testkit::netns::in_new_netns;
use testkit::world::Dice;

/// Inputs per variant and family.
const INPUTS: u32 = 250;
/// Set operations.
const OPS: u32 = 3000;

const CHAINS: [&str; 5] = ["cali-a", "cali-b", "cali-c", "cali-d", "felix-e"];
const SETS: [&str; 3] = ["cali40s", "cali40t", "nosuch"];

#[test]
fn restore_inputs_do_to_the_simulated_tables_what_they_do_to_the_real_ones() {
    testkit::kernel_test!("iptables-legacy-restore", "iptables-nft-restore", "ip6tables-nft-restore", "ipset");
    for variant in [Variant::Legacy, Variant::Nft] {
        for family in Family::BOTH {
            in_new_netns(|| compare_tables(variant, family));
        }
    }
}

fn compare_tables(variant: Variant, family: Family) {
    for set in ["cali40s", "cali40t"] {
        let version = if family == Family::V4 { "inet" } else { "inet6" };
        run("ipset", &["create", set, "hash:net", "family", version], "");
    }
    let stem = if family == Family::V4 { "iptables" } else { "ip6tables" };
    let program = |verb: &str| format!("{stem}-{}-{verb}", variant.as_str());
    let mut dice = Dice::new(7);
    let mut simulated = [Chains::default(), Chains::default()];
    let (mut went_in, mut refused) = (0, 0);
    for number in 0..INPUTS {
        let input = some_input(&mut dice, family, &simulated[0]);
        let (status, _, stderr) = run(&program("restore"), &["--noflush"], &input);
        let contents = |table| simulated[usize::from(table == Table::Mangle)].clone();
        let has_set = |set: &str| set != "nosuch";
        let (done, refusal) = tables::restore(variant, Quirks::default(), &input, contents, has_set);
        for transaction in done {
            simulated[usize::from(transaction.table == Table::Mangle)] = transaction.after;
        }
        let told =
            format!("{variant:?} {family:?} input {number}:\n{input}\nreal: {status} {stderr}\nsimulated: {refusal:?}");
        assert_eq!(status == 0, refusal.is_none(), "{told}");
        if let Some(refusal) = refusal {
            refused += 1;
            assert_eq!(status, refusal.status, "{told}");
            assert_eq!(Complaint::read(&stderr, 0), Complaint::read(&refusal.stderr, 0), "{told}");
        } else {
            went_in += 1;
        }
        for (table, chains) in [Table::Filter, Table::Mangle].into_iter().zip(&mut simulated) {
            // Listing a legacy table makes it.
            if variant == Variant::Legacy {
                chains.make(table);
            }
            let (_, listing, _) = run(&program("save"), &["-t", table.as_str()], "");
            assert_eq!(essence(&listing), essence(&chains.save(variant, table)), "{told}");
        }
    }
    assert!(went_in > INPUTS / 4 && refused > INPUTS / 10, "{went_in} went in, {refused} refused");
}

/// The lines that count, chains sorted: the programs have an order of their own.
fn essence(listing: &str) -> Vec<String> {
    let plain = listing.lines().filter(|line| !line.starts_with('#'));
    let mut lines: Vec<String> = plain
        .map(|line| if line.starts_with(':') { line.split(" [").next().unwrap_or(line) } else { line }.to_owned())
        .collect();
    let chain = |line: &String| {
        let of = line.strip_prefix("-A ").and_then(|rest| rest.split(' ').next()).unwrap_or_default().to_owned();
        (!line.starts_with('*'), !line.starts_with(':'), of)
    };
    // Stable: rules of one chain keep their order.
    let rank = |line: &String| if line == "COMMIT" { (true, true, "~".to_owned()) } else { chain(line) };
    lines.sort_by(|a, b| {
        let names = if a.starts_with(':') && b.starts_with(':') { a.cmp(b) } else { std::cmp::Ordering::Equal };
        rank(a).cmp(&rank(b)).then(names)
    });
    lines
}

fn some_input(dice: &mut Dice, family: Family, now: &Chains) -> String {
    let mut text = String::new();
    for _ in 0..1 + dice.roll(2) {
        text += if dice.one_in(5) { "*mangle\n" } else { "*filter\n" };
        let declared: Vec<&str> = CHAINS.into_iter().filter(|_| dice.one_in(2)).collect();
        for chain in &declared {
            text += &format!(":{chain} - -\n");
        }
        for _ in 0..dice.roll(7) {
            let chain = if dice.one_in(4) { "FORWARD" } else { dice.pick(&CHAINS) };
            let position = 1 + dice.roll(3);
            let rule = some_rule(dice, family, chain);
            // The nft program goes by what was in a chain before it was flushed. The driver does not go there.
            // Nor does it use numbers in base chains.
            let ops = match chain {
                "FORWARD" => 6,
                _ if declared.contains(&chain) => 5,
                _ => 10,
            };
            text += &match dice.roll(ops) {
                0..=4 => format!("-A {chain} {rule}\n"),
                5 => format!("-I {chain} {rule}\n"),
                6 => format!("-R {chain} {position} {rule}\n"),
                7 => format!("-D {chain} {position}\n"),
                _ => match now.chains.get(chain).and_then(|rules| rules.first()) {
                    Some(rule) => format!("-D {chain} {}\n", rule.text),
                    None => format!("-D {chain} {rule}\n"),
                },
            };
        }
        for _ in 0..dice.roll(2) {
            text += &format!("--delete-chain {}\n", dice.pick(&CHAINS));
        }
        text += "COMMIT\n";
    }
    text
}

fn some_rule(dice: &mut Dice, family: Family, chain: &str) -> String {
    let mut rule = String::new();
    if dice.one_in(2) {
        rule += &format!("-m comment --comment \"cali:AAAAAAAAAAAAAAA{}\" ", dice.roll(4));
    }
    if dice.one_in(6) {
        rule += "-m comment --comment \"Policy np/a b\" ";
    }
    if dice.one_in(3) {
        rule += if dice.one_in(2) { "-p 6 " } else { "-p udp " };
    }
    if dice.one_in(3) {
        let (address, net) = if family == Family::V4 { ("10.0.0.1", "10.0.0.0/8") } else { ("fd00::1", "fd00::/8") };
        rule += &format!("{}--source {} ", if dice.one_in(2) { "! " } else { "" }, dice.pick(&[address, net]));
    }
    if dice.one_in(4) {
        rule += &format!("--in-interface {} ", dice.pick(&["cali1", "cali+"]));
    }
    if dice.one_in(4) {
        let set = if dice.one_in(8) { SETS[2] } else { dice.pick(&SETS[..2]) };
        rule += &format!("-m set --match-set {set} {} ", dice.pick(&["src", "dst"]));
    }
    rule += &match dice.roll(8) {
        0..=2 => "--jump DROP".to_owned(),
        3 | 4 => "--jump RETURN".to_owned(),
        // No loops: the compiler makes none.
        _ if chain == "felix-e" => "--jump ACCEPT".to_owned(),
        5 | 6 => "--jump felix-e".to_owned(),
        _ => "--goto felix-e".to_owned(),
    };
    rule
}

fn run(program: &str, args: &[&str], input: &str) -> (i32, String, String) {
    let mut command = Command::new(program);
    command.args(args).env("LC_ALL", "C").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).ok();
    let output = child.wait_with_output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap_or(-1), text(output.stdout), text(output.stderr))
}

#[test]
fn set_operations_do_to_the_simulated_sets_what_they_do_to_the_real_ones() {
    testkit::kernel_test!("iptables-legacy-restore", "ipset");
    in_new_netns(compare_sets);
}

fn compare_sets() {
    let kernel = SimKernel::new(1, Variant::Legacy, Bits { ours: 0, never_left: 0 });
    let mut real = Netlink::new(Duration::from_secs(5));
    let mut dice = Dice::new(3);
    let mut outcomes = std::collections::BTreeMap::<String, u32>::new();
    let key = TableKey { variant: Variant::Legacy, family: Family::V4, table: Table::Filter };
    for number in 0..OPS {
        if dice.one_in(30) {
            // A rule names a set, or none does.
            let mut input = "*filter\n:cali-a - -\n".to_owned();
            let name = dice.pick(&NAMES);
            let is_v4 = kernel
                .state()
                .sets
                .get(name)
                .is_some_and(|set| set.family == Family::V4 && set.kind != SetKind::AddressPort);
            if is_v4 && !dice.one_in(3) {
                input += &format!("-A cali-a -m set --match-set {name} src -j DROP\n");
            }
            input += "COMMIT\n";
            let (status, _, stderr) = run("iptables-legacy-restore", &["--noflush"], &input);
            assert_eq!(status, 0, "{stderr}");
            let mut state = kernel.state();
            let (mut done, _) =
                tables::restore(Variant::Legacy, Quirks::default(), &input, |_| Chains::default(), |_| true);
            state.tables.insert(key, done.pop().unwrap().after);
            continue;
        }
        let kinds = |name: &str| kernel.state().sets.get(name).map(|set| set.kind);
        let op = some_op(&mut dice, kinds);
        let mut wanted = real.perform(std::slice::from_ref(&op)).map_err(|failure| (failure.done, failure.error));
        let got = kernel.state().perform_set(&op, None);
        for _ in 0..50 {
            if wanted != Err((0, SetError::Busy)) || got.is_err() {
                break;
            }
            // Rules that went let go of their sets a moment later.
            sleep(Duration::from_millis(20));
            wanted = real.perform(std::slice::from_ref(&op)).map_err(|failure| (failure.done, failure.error));
        }
        let plain = |outcome: &Result<(), (usize, SetError)>| match outcome {
            Err((done, SetError::Member(_))) => Err((*done, SetError::Member(String::new()))),
            // What is wrong with a member of another family is told in several ways.
            Err((done, SetError::Other(_))) => Err((*done, SetError::Member(String::new()))),
            other => other.clone(),
        };
        let is_full = |outcome: &Result<_, (usize, SetError)>| matches!(outcome, Err((_, SetError::Full)));
        if (is_full(&got) || is_full(&wanted)) && got != wanted {
            // The kernel counts members by regions and lets now and then one more in.
            let Op::Add { set, .. } = &op else { panic!("{op:?}") };
            let members = real.read(set).unwrap().unwrap().members.into_iter().collect();
            kernel.state().sets.get_mut(set.as_str()).unwrap().members = members;
            continue;
        }
        assert_eq!(plain(&got), plain(&wanted), "operation {number}: {op:?}");
        *outcomes.entry(format!("{:?}", plain(&got).map_err(|(_, error)| error))).or_default() += 1;
        for name in NAMES {
            let name = SetName::new(name).unwrap();
            let real = real.read(&name).unwrap();
            let state = kernel.state();
            let simulated = state.sets.get(name.as_str());
            let members = real.as_ref().map(|contents| {
                let mut members = contents.members.clone();
                members.sort();
                (contents.max_members, contents.family, members)
            });
            let expected =
                simulated.map(|set| (Some(set.max_members), Some(set.family), set.members.iter().copied().collect()));
            assert_eq!(members, expected, "operation {number}: {op:?}");
        }
    }
    for needed in ["Ok(())", "Err(Busy)", "Err(Full)", "Err(Missing)", "Err(Exists)", "Err(TypesDiffer)"] {
        assert!(outcomes.get(needed).is_some_and(|count| *count > 3), "{needed} is too rare in {outcomes:?}");
    }
}

const NAMES: [&str; 4] = ["cali40a", "cali40b", "cali40c", "cali60a"];

/// Members are of the form that the set has, if there is one: the driver sees to that.
fn some_op(dice: &mut Dice, kind_of: impl Fn(&str) -> Option<SetKind>) -> Op {
    let name = SetName::new(dice.pick(&NAMES)).unwrap();
    let with = SetName::new(dice.pick(&NAMES)).unwrap();
    let v4 = name.as_str() != "cali60a";
    let first = match name.as_str() {
        "cali40a" | "cali60a" => SetKind::Net,
        "cali40b" => SetKind::Address,
        _ => dice.pick(&[SetKind::Net, SetKind::Address]),
    };
    let kind = kind_of(name.as_str()).unwrap_or(first);
    let members = |dice: &mut Dice| -> Members {
        let member = |dice: &mut Dice| {
            let last = dice.roll(9);
            let address = if v4 { format!("10.0.0.{last}") } else { format!("fd00::{last}") };
            let full = if v4 { 32 } else { 128 };
            match kind {
                SetKind::Net => Member::Net(format!("{address}/{full}").parse().unwrap()),
                SetKind::Address | SetKind::AddressPort => Member::Address(address.parse().unwrap()),
            }
        };
        (0..=dice.roll(4)).map(|_| member(dice)).collect()
    };
    match dice.roll(10) {
        0 | 1 => {
            let family = if v4 { Family::V4 } else { Family::V6 };
            Op::Create { name, kind: first, family, max_members: 4 + dice.roll(3) as u32, hash_size: 64 }
        }
        2..=4 => Op::Add { set: name, members: members(dice) },
        5 | 6 => Op::Remove { set: name, members: members(dice) },
        7 => Op::Swap { set: name, with },
        _ => Op::Destroy { set: name },
    }
}
