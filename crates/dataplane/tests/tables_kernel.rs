//! The tables, and their order with the sets, against real kernels and tools: each test in a network
//! namespace of its own, for both variants, both families, and with restore programs held open and started
//! one by one.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test fails by panicking and says in which case it was")]

use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use dataplane::{ApplyLoop, ChainInsertMode, Options, Report, Variant};
use model::{PolicyKey, PolicyKind};
use program::{
    Action, BaseChain, Chain, ChainName, Changes, Direction, Family, Hooks, IcmpType, InterfaceMatch, Match, Member,
    Origin, Protocol, Rule, SetChange, SetKind, SetName, SetSpec, Table, TableChanges, TableId,
};
use testkit::netns::in_new_netns;

/// One way to run.
#[derive(Clone, Copy, Debug)]
struct Way {
    variant: Variant,
    family: Family,
    hold: bool,
}

/// Runs a test in every way, each in a fresh namespace.
fn every_way(test: impl Fn(Way) + Sync) {
    for variant in [Variant::Legacy, Variant::Nft] {
        for family in Family::BOTH {
            for hold in [false, true] {
                let way = Way { variant, family, hold };
                println!("{way:?}");
                in_new_netns(|| test(way));
            }
        }
    }
}

macro_rules! needs_tables {
    () => {
        testkit::kernel_test!(
            "iptables-legacy-restore",
            "iptables-nft-restore",
            "ip6tables-legacy-restore",
            "ip6tables-nft-restore",
            "ipset"
        );
    };
}

#[test]
fn a_fresh_host_gets_the_program_and_a_restart_writes_nothing() {
    needs_tables!();
    every_way(|way| {
        let mut agent = Agent::new(way);
        let report = agent.apply(program(way, 3));
        assert_sound(&report);
        assert!(report.writes() > 0);
        let after = way.save("filter");
        let hooks = lines_with(&after, "-A FORWARD");
        assert_eq!(hooks.len(), 3, "{after}");
        assert!(hooks[0].contains("cali:wUHhoiAYhphO9Mso"), "{after}");
        assert_eq!(lines_with(&after, "-A cali-pi-").len(), 9);
        assert_eq!(lines_with(&way.save("raw"), "-A PREROUTING").len(), 1);

        assert_eq!(agent.apply(Changes::default()).writes(), 0);
        let mut restarted = Agent::new(way);
        let report = restarted.apply(program(way, 3));
        assert_sound(&report);
        assert_eq!(report.writes(), 0, "{report:?}");
        assert_eq!(way.save("filter"), after);
    });
}

#[test]
fn changes_are_differences_and_leave_what_is_foreign_alone() {
    needs_tables!();
    every_way(|way| {
        way.restore("*filter\n:DOCKER - -\n-A FORWARD -j DOCKER\n-A DOCKER -j RETURN\n:calico-dhcp-x - -\n-A INPUT -j calico-dhcp-x\nCOMMIT\n");
        let mut agent = Agent::new(way);
        assert_sound(&agent.apply(program(way, 3)));
        // Somebody else works on between our transactions.
        way.restore("*filter\n-A DOCKER -p 6 -j ACCEPT\n-I FORWARD 2 -p 17 -j DOCKER\nCOMMIT\n");
        let report = agent.apply(changed_policies(way, [(1, vec![accept(), drop_all()])]));
        assert_sound(&report);
        assert_eq!(report.writes(), 1);
        let after = way.save("filter");
        assert_eq!(lines_with(&after, "-A cali-pi-1 ").len(), 2, "{after}");
        assert_eq!(lines_with(&after, "-A cali-pi-0 ").len(), 3, "{after}");
        assert_eq!(lines_with(&after, "-A DOCKER ").len(), 2, "{after}");
        assert_eq!(lines_with(&after, "-A FORWARD ").len(), 5, "{after}");
        assert_eq!(lines_with(&after, "-A INPUT -j calico-dhcp-x").len(), 1, "{after}");

        // Everything of ours goes, everything else stays.
        let report = Agent::new(way).apply(Changes::default());
        assert_sound(&report);
        let after = way.save("filter");
        assert!(!after.contains("cali-") && !after.contains("cali:"), "{after}");
        assert_eq!(lines_with(&after, "-A ").len(), 5, "{after}");
        assert!(!way.save("raw").contains("cali"));
    });
}

#[test]
fn chains_and_hooks_of_an_older_agent_are_swept() {
    needs_tables!();
    every_way(|way| {
        way.restore(
            "*filter\n:felix-FORWARD - -\n:cali-old - -\n:DOCKER - -\n-A FORWARD -j DOCKER\n-A FORWARD -j felix-FORWARD\n\
             -A FORWARD -m comment --comment \"cali:AAAAAAAAAAAAAAAA\" -j cali-old\n-A DOCKER -j cali-old\n\
             -A felix-FORWARD -j DROP\n-A cali-old -m comment --comment \"cali:BBBBBBBBBBBBBBBB\" -j DROP\nCOMMIT\n",
        );
        way.restore("*mangle\n:cali-PREROUTING - -\n-A PREROUTING -m comment --comment \"cali:6gwbT8clXdHdC1b1\" -j cali-PREROUTING\nCOMMIT\n");
        let report = Agent::new(way).apply(program(way, 1));
        assert_sound(&report);
        let after = way.save("filter");
        for gone in ["felix", "cali-old", "AAAAAAAAAAAAAAAA"] {
            assert!(!after.contains(gone), "{gone}: {after}");
        }
        assert_eq!(lines_with(&after, "-A FORWARD -j DOCKER").len(), 1, "{after}");
        assert!(!way.save("mangle").contains("cali"));
    });
}

#[test]
fn a_stale_chain_that_a_foreign_rule_goes_to_is_emptied_and_stops_nothing() {
    needs_tables!();
    every_way(|way| {
        way.restore("*filter\n:cali-old - -\n:X - -\n-A X -g cali-old\n-A cali-old -j DROP\nCOMMIT\n");
        let mut agent = Agent::new(way);
        assert_sound(&agent.apply(program(way, 1)));
        let after = way.save("filter");
        assert!(after.contains(":cali-old ") && after.contains("-A X -g cali-old"), "{after}");
        assert!(lines_with(&after, "-A cali-old").is_empty(), "{after}");
        assert_eq!(lines_with(&after, "-A cali-pi-0 ").len(), 3, "{after}");
        assert_eq!(agent.apply(Changes::default()).writes(), 0);
    });
}

#[test]
fn foreign_deletions_and_insertions_are_repaired_at_the_refresh() {
    needs_tables!();
    every_way(|way| {
        let mut options = way.options();
        options.table_refresh = Some(Duration::from_millis(1));
        let mut agent = Agent::with(options);
        assert_sound(&agent.apply(program(way, 2)));
        let good = way.save("filter");
        let damages = [
            "*filter\n-D cali-pi-0 2\nCOMMIT\n",
            "*filter\n-I cali-pi-0 2 -j ACCEPT\nCOMMIT\n",
            "*filter\n-A cali-pi-1 -j ACCEPT\nCOMMIT\n",
            "*filter\n:cali-pi-1 - -\nCOMMIT\n",
            "*filter\n-D FORWARD 1\nCOMMIT\n",
            "*filter\n-I FORWARD -m comment --comment \"cali:CCCCCCCCCCCCCCCC\" -j ACCEPT\nCOMMIT\n",
            "*filter\n:cali-new - -\n-A cali-new -j DROP\nCOMMIT\n",
        ];
        for damage in damages {
            way.restore(damage);
            std::thread::sleep(Duration::from_millis(2));
            let report = agent.apply(Changes::default());
            assert_sound(&report);
            assert_eq!(report.writes(), 1, "{damage}");
            assert_eq!(report.drivers.iter().map(|driver| driver.repaired).sum::<u64>(), 1, "{damage}");
            assert_eq!(way.save("filter"), good, "{damage}");
        }
        // All rules gone, as `iptables -F` does it.
        way.restore("*filter\n:FORWARD ACCEPT [0:0]\nCOMMIT\n");
        way.run("", &["-F"]);
        std::thread::sleep(Duration::from_millis(2));
        let report = agent.apply(Changes::default());
        assert_sound(&report);
        assert_eq!(way.save("filter"), good);
        assert!(report.again.is_some_and(|(due, _)| due <= Instant::now() + Duration::from_millis(10)));
    });
}

#[test]
fn a_write_that_meets_foreign_changes_is_repeated_on_what_is_there() {
    needs_tables!();
    every_way(|way| {
        let mut agent = Agent::new(way);
        assert_sound(&agent.apply(program(way, 2)));
        way.restore("*filter\n:cali-pi-0 - -\n:cali-all - -\n-D FORWARD 1\nCOMMIT\n");
        let mut changes = changed_policies(way, [(0, vec![drop_all(), accept()])]);
        changes.tables.get_mut(&way.filter()).unwrap().hooks.insert(BaseChain::Forward, Hooks::default());
        assert_sound(&agent.apply(changes));
        let after = way.save("filter");
        assert_eq!(lines_with(&after, "-A cali-pi-0 ").len(), 2, "{after}");
        assert!(lines_with(&after, "-A FORWARD").is_empty(), "{after}");
    });
}

#[test]
fn append_mode_puts_hooks_after_foreign_rules() {
    needs_tables!();
    every_way(|way| {
        way.restore("*filter\n:X - -\n-A FORWARD -j X\nCOMMIT\n");
        let mut options = way.options();
        options.insert_mode = ChainInsertMode::Append;
        assert_sound(&Agent::with(options.clone()).apply(program(way, 1)));
        let after = way.save("filter");
        let hooks = lines_with(&after, "-A FORWARD");
        assert!(hooks[0].ends_with("-j X") && hooks[1].contains("cali:wUHhoiAYhphO9Mso"), "{after}");
        assert_eq!(Agent::with(options).apply(program(way, 1)).writes(), 0);

        // The other mode moves them.
        assert_sound(&Agent::new(way).apply(program(way, 1)));
        let after = way.save("filter");
        let hooks = lines_with(&after, "-A FORWARD");
        assert!(hooks[0].contains("cali:wUHhoiAYhphO9Mso") && hooks[1].ends_with("-j X"), "{after}");
    });
}

#[test]
fn a_rule_that_the_kernel_refuses_closes_its_policy_and_nothing_else() {
    needs_tables!();
    every_way(|way| {
        let mut agent = Agent::new(way);
        let mut changes = program(way, 50);
        put(changes.tables.get_mut(&way.filter()).unwrap(), "cali-pi-23", policy_rules(23, Some(way.family)));
        let report = agent.apply(changes);
        assert!(!report.failed(), "{report:?}");
        let held: Vec<_> = report.drivers.iter().flat_map(|driver| &driver.held).collect();
        assert_eq!(held.len(), 1, "{held:?}");
        assert!(held[0].contains("policy np/ns/policy-23 ingress rule 1"), "{held:?}");
        assert!(!held[0].contains("deprecated"), "{held:?}");
        let after = way.save("filter");
        let bad = lines_with(&after, "-A cali-pi-23 ");
        assert!(bad.len() == 1 && bad[0].ends_with("-j DROP"), "{after}");
        assert_eq!(lines_with(&after, "-A cali-pi-").len(), 49 * 3 + 1, "{after}");
        assert_eq!(lines_with(&after, "-A cali-all ").len(), 50, "{after}");
        assert!(!after.contains("cali-probe"), "{after}");

        // Other changes go in while it is closed; a repair of the policy opens it.
        let report = agent.apply(changed_policies(way, [(22, vec![accept()])]));
        assert!(!report.failed() && report.writes() == 1, "{report:?}");
        let report = agent.apply(changed_policies(way, [(23, vec![accept(), drop_all()])]));
        assert!(report.drivers.iter().all(|driver| driver.held.is_empty()), "{report:?}");
        assert_eq!(lines_with(&way.save("filter"), "-A cali-pi-23 ").len(), 2);
        // And a policy that goes bad while it is in force is closed.
        let report = agent.apply(changed_policies(way, [(7, policy_rules(7, Some(way.family)))]));
        assert!(!report.failed(), "{report:?}");
        assert_eq!(lines_with(&way.save("filter"), "-A cali-pi-7 ").len(), 1);
    });
}

/// The tools read lines in pieces of 10,239 bytes and take a piece for a line: a rule must never be so
/// long that its text becomes one.
#[test]
fn no_text_of_a_rule_becomes_a_rule_of_its_own() {
    needs_tables!();
    every_way(|way| {
        let mut agent = Agent::new(way);
        assert_sound(&agent.apply(program(way, 2)));
        let smuggled = "-A FORWARD -j ACCEPT -m comment --comment ";
        let mut commented = accept();
        commented.comments = (0..200).map(|n| format!("{}{smuggled}", "x".repeat(n))).collect();
        let log = Rule::new(vec![], Action::Log { prefix: format!(" {smuggled}").repeat(500) });
        let nowhere = Match::Protocol { negated: true, protocol: Protocol::Number(6) };
        let too_long = Rule::new(vec![nowhere; 2000], Action::Accept);
        let report = agent.apply(changed_policies(way, [(1, vec![commented, log, too_long])]));
        assert_sound(&report);
        let after = way.save("filter");
        let rules = lines_with(&after, "-A cali-pi-1 ");
        assert_eq!(rules.len(), 3, "{after}");
        assert!(rules[0].contains("-j MARK") && rules[2].ends_with("-j DROP"), "{after}");
        assert_eq!(lines_with(&after, "-A FORWARD").len(), 3, "{after}");
    });
}

#[test]
fn a_restore_program_that_is_killed_is_replaced() {
    // One family: each has a program of its own, which the same code starts.
    needs_tables!();
    for variant in [Variant::Legacy, Variant::Nft] {
        in_new_netns(|| {
            let way = Way { variant, family: Family::V4, hold: true };
            let mut agent = Agent::new(way);
            assert_sound(&agent.apply(program(way, 1)));
            let held = children_named(&format!("iptables-{}-restore", variant.as_str()));
            assert_eq!(held.len(), 1, "a restore program is held open");
            for pid in held {
                nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
            }
            assert_sound(&agent.apply(changed_policies(way, [(0, vec![accept()])])));
            assert_eq!(lines_with(&way.save("filter"), "-A cali-pi-0 ").len(), 1);
        });
    }
}

#[test]
fn leftovers_in_the_other_variant_are_removed_after_ours_are_in_force() {
    needs_tables!();
    for (variant, other) in [(Variant::Legacy, Variant::Nft), (Variant::Nft, Variant::Legacy)] {
        for family in Family::BOTH {
            in_new_netns(|| {
                let old = Way { variant: other, family, hold: false };
                let way = Way { variant, family, hold: false };
                assert_sound(&Agent::new(old).apply(program(old, 2)));
                old.restore("*filter\n:X - -\n-A FORWARD -j X\nCOMMIT\n");
                assert_sound(&Agent::new(way).apply(program(way, 2)));
                assert_eq!(lines_with(&way.save("filter"), "-A cali-pi-").len(), 6);
                for table in ["filter", "raw"] {
                    assert!(!old.save(table).contains("cali"), "{}", old.save(table));
                }
                assert!(old.save("filter").contains("-A FORWARD -j X"));
            });
        }
    }
}

#[test]
fn the_variant_follows_the_evidence() {
    // One family: the evidence of both is added up.
    needs_tables!();
    let detected = |prepare: &[(Variant, &str)]| {
        in_new_netns(|| {
            for (variant, input) in prepare {
                Way { variant: *variant, family: Family::V4, hold: false }.restore(input);
            }
            let mut agent = Agent::with(Options { variant: None, ..Options::default() });
            agent.apply(Changes::default());
            agent.apply.variant().unwrap()
        })
    };
    let rule = "*filter\n-A INPUT -p 6\nCOMMIT\n";
    let hint = "*mangle\n:KUBE-KUBELET-CANARY - -\nCOMMIT\n";
    let legacy = (Variant::Legacy, rule);
    let nft = (Variant::Nft, rule);
    assert_eq!(detected(&[]), Variant::Legacy, "nothing");
    assert_eq!(detected(&[nft]), Variant::Nft, "rules in nft");
    assert_eq!(detected(&[legacy]), Variant::Legacy, "rules in legacy");
    assert_eq!(detected(&[legacy, nft]), Variant::Legacy, "rules in both");
    assert_eq!(detected(&[legacy, (Variant::Nft, hint)]), Variant::Nft, "a hint in nft");
}

#[test]
fn legacy_tables_that_nobody_made_are_not_made_by_looking() {
    // One family: `tests/tests/variants.rs` looks at both.
    needs_tables!();
    in_new_netns(|| {
        let way = Way { variant: Variant::Legacy, family: Family::V4, hold: false };
        assert_sound(&Agent::new(way).apply(program(way, 1)));
        let made = std::fs::read_to_string("/proc/thread-self/net/ip_tables_names").unwrap();
        let mut made: Vec<_> = made.lines().collect();
        made.sort_unstable();
        assert_eq!(made, ["filter", "raw"]);
    });
}

// Order of tables (netfilter.md 19.2).

#[test]
fn raw_lets_more_through_only_after_filter_is_in_force() {
    needs_tables!();
    every_way(|way| {
        let mut agent = Agent::new(way);
        assert_sound(&agent.apply(program(way, 1)));
        let raw = TableId { family: way.family, table: Table::Raw };
        let batch = |hook: Rule| {
            let mut changes = Changes::default();
            let accept = Rule::new(Vec::new(), Action::Accept);
            put(changes.tables.entry(raw).or_default(), "cali-PREROUTING", vec![accept]);
            let hooks = Hooks { inserts: vec![hook], appends: Vec::new() };
            changes.tables.entry(way.filter()).or_default().hooks.insert(BaseChain::Input, hooks);
            changes
        };
        // A hook cannot be closed or left out: the filter table fails as a whole.
        let [_, refused, _] = policy_rules(0, Some(way.family)).try_into().unwrap();
        let report = agent.apply(batch(refused));
        assert!(report.failed(), "{report:?}");
        assert!(!way.save("raw").contains("-j ACCEPT"), "{report:?}");
        let waiting = report.drivers.iter().find(|driver| driver.driver.starts_with("raw/"));
        assert!(waiting.is_some_and(|raw| raw.waiting.is_some()), "{report:?}");
        assert_sound(&agent.apply_soon(batch(drop_all())));
        assert!(way.save("raw").contains("-j ACCEPT"));
    });
}

// Routes.

#[test]
fn nothing_leads_to_a_workload_before_the_filter_is_in_force() {
    needs_tables!();
    every_way(|way| {
        let ip = |args: &[&str]| {
            let output = Command::new("ip").args(args).output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            String::from_utf8(output.stdout).unwrap()
        };
        ip(&["link", "add", "cali1", "type", "veth", "peer", "name", "peer1"]);
        ip(&["link", "set", "cali1", "up"]);
        ip(&["link", "set", "peer1", "up"]);
        let index = ip(&["-o", "link", "show", "cali1"]).split(':').next().unwrap().parse().unwrap();
        let (destination, flag) = match way.family {
            Family::V4 => ("10.65.0.2/32", "-4"),
            Family::V6 => ("fd00::2/128", "-6"),
        };
        let destination = destination.parse().unwrap();
        let address =
            |routes: String| routes.lines().any(|line| line.contains("10.65.0.2") || line.contains("fd00::2"));

        let mut changes = program(way, 1);
        changes.links.insert("cali1".into(), Some(model::LinkState { index, up: true, generation: 1 }));
        let route = program::RouteSpec { destination, metric: 0, mac: Some([2, 0, 0, 0, 0, 1]) };
        changes.routes.insert((way.family, "cali1".into()), vec![route]);
        // The filter table is of no use at first.
        let [_, refused, _] = policy_rules(0, Some(way.family)).try_into().unwrap();
        let broken = Hooks { inserts: vec![refused], appends: Vec::new() };
        changes.tables.get_mut(&way.filter()).unwrap().hooks.insert(BaseChain::Input, broken);
        let mut agent = Agent::new(way);
        let report = agent.apply(changes);
        assert!(report.failed(), "{report:?}");
        assert!(!address(ip(&[flag, "route", "show", "dev", "cali1"])));

        let mut changes = Changes::default();
        let mut filter = TableChanges::default();
        filter.hooks.insert(BaseChain::Input, Hooks::default());
        changes.tables.insert(way.filter(), filter);
        assert_sound(&agent.apply_soon(changes));
        assert!(address(ip(&[flag, "route", "show", "dev", "cali1"])));
    });
}

// Sets and tables (I4).

#[test]
fn sets_come_before_the_rules_that_name_them_and_go_after() {
    needs_tables!();
    every_way(|way| {
        let mut agent = Agent::new(way);
        assert_sound(&agent.apply(program(way, 2)));
        let mut changes = changed_policies(way, [(0, vec![in_set(&way.named("one")), drop_all()])]);
        changes.sets.insert((way.family, set_name(&way.named("one"))), way.set(&way.named("one"), 8, 3));
        assert_sound(&agent.apply(changes));
        assert!(way.save("filter").contains(&format!("--match-set {} src", way.named("one"))));
        assert_eq!(way.sets(), [way.named("one")]);

        // One set takes the place of the other in one batch; members of the new one are judged at once.
        let mut changes = changed_policies(way, [(0, vec![in_set(&way.named("two")), drop_all()])]);
        changes.sets.insert((way.family, set_name(&way.named("one"))), SetChange::Remove);
        changes.sets.insert((way.family, set_name(&way.named("two"))), way.set(&way.named("two"), 8, 3));
        let report = agent.apply(changes);
        assert_sound(&report);
        // The nft variant lets go of a set a moment after the rule went.
        agent.settle(report);
        assert!(way.save("filter").contains(&format!("--match-set {} src", way.named("two"))));
        assert_eq!(way.sets(), [way.named("two")]);

        // A new agent recognises all of it, and one that wants nothing removes all of it.
        let mut changes = program(way, 2);
        let policy = changed_policies(way, [(0, vec![in_set(&way.named("two")), drop_all()])]);
        changes.tables.get_mut(&way.filter()).unwrap().chains.extend(policy.tables[&way.filter()].chains.clone());
        changes.sets.insert((way.family, set_name(&way.named("two"))), way.set(&way.named("two"), 8, 3));
        let report = Agent::new(way).apply(changes);
        assert_sound(&report);
        assert_eq!(report.writes(), 0, "{report:?}");
        let mut nothing = Agent::new(way);
        let report = nothing.apply(Changes::default());
        nothing.settle(report);
        assert!(way.sets().is_empty() && !way.save("filter").contains("cali"));
    });
}

#[test]
fn a_set_that_cannot_be_written_closes_only_what_names_it() {
    needs_tables!();
    every_way(|way| {
        let mut agent = Agent::new(way);
        assert_sound(&agent.apply(program(way, 2)));
        let mut changes = changed_policies(
            way,
            [
                (0, vec![in_set(&way.named("full")), drop_all()]),
                (1, vec![accept()]),
                (9, vec![in_set(&way.named("full")), drop_all()]),
            ],
        );
        let all = ["cali-pi-0", "cali-pi-1", "cali-pi-9"].map(jump).to_vec();
        put(changes.tables.get_mut(&way.filter()).unwrap(), "cali-all", all);
        changes.sets.insert((way.family, set_name(&way.named("full"))), way.set(&way.named("full"), 2, 100));
        let report = agent.apply(changes);
        let held: Vec<&String> = report.drivers.iter().flat_map(|driver| &driver.held).collect();
        assert!(held[0].contains("100 members are wanted, 64 are allowed"), "{report:?}");
        let after = way.save("filter");
        for chain in ["-A cali-pi-0 ", "-A cali-pi-9 "] {
            let lines = lines_with(&after, chain);
            assert!(lines.len() == 1 && lines[0].ends_with("-j DROP"), "closed: {after}");
        }
        assert_eq!(lines_with(&after, "-A cali-pi-1 ").len(), 1, "others proceed: {after}");

        // The set is made smaller; nothing about the policies changes.
        let mut changes = Changes::default();
        changes.sets.insert((way.family, set_name(&way.named("full"))), way.set(&way.named("full"), 200, 100));
        let report = agent.apply(changes);
        let report = agent.settle(report);
        assert!(!report.failed(), "{report:?}");
        let after = way.save("filter");
        for chain in ["-A cali-pi-0 ", "-A cali-pi-9 "] {
            assert!(
                lines_with(&after, chain)[0].contains(&format!("--match-set {} src", way.named("full"))),
                "{after}"
            );
        }
    });
}

/// U3.b
#[test]
fn a_set_that_becomes_too_large_closes_what_names_it_until_less_is_wanted() {
    needs_tables!();
    every_way(|way| {
        let mut agent = Agent::new(way);
        let set = way.named("grows");
        let mut changes = program(way, 3);
        let policy = changed_policies(way, [(0, vec![in_set(&set), accept()])]);
        changes.tables.get_mut(&way.filter()).unwrap().chains.extend(policy.tables[&way.filter()].chains.clone());
        changes.sets.insert((way.family, set_name(&set)), way.set(&set, 2, 1));
        let report = agent.apply(changes);
        agent.settle(report);
        let count = |chain: &str| lines_with(&way.save("filter"), &format!("-A {chain} ")).len();
        let (zero, one) = (count("cali-pi-0"), count("cali-pi-1"));

        let resize = |members: u8| {
            let mut changes = Changes::default();
            changes.sets.insert((way.family, set_name(&set)), way.set(&set, 2, members));
            changes
        };
        let report = agent.apply(resize(65));
        let held: Vec<&String> = report.drivers.iter().flat_map(|driver| &driver.held).collect();
        assert!(held.iter().any(|line| line.contains("65 members are wanted, 64 are allowed")), "{report:?}");
        let after = way.save("filter");
        let closed = lines_with(&after, "-A cali-pi-0 ");
        assert!(closed.len() == 1 && closed[0].ends_with("-j DROP"), "closed: {after}");
        assert_eq!(count("cali-pi-1"), one, "others stay");
        // Nothing is done again and again.
        assert_eq!(agent.apply(Changes::default()).writes(), 0);

        // It grows as far as it may, and what was closed is open again.
        let report = agent.apply(resize(64));
        agent.settle(report);
        assert_eq!((count("cali-pi-0"), count("cali-pi-1")), (zero, one));
        let header = Command::new("ipset").args(["list", "-t", &set]).output().unwrap();
        assert!(String::from_utf8_lossy(&header.stdout).contains("maxelem 64"), "{header:?}");
    });
}

/// U3.c
#[test]
fn who_uses_a_set_is_found_in_both_variants_and_families() {
    needs_tables!();
    every_way(|way| {
        if way.hold || way.variant == dataplane::Variant::Nft {
            // One way per family looks at all tables.
            return;
        }
        let set = way.named("used");
        let six = if way.family == Family::V6 { "6" } else { "" };
        let family = if way.family == Family::V6 { "inet6" } else { "inet" };
        let line = format!(
            "ipset create {set} hash:net family {family}
             ip{six}tables-nft -w -A OUTPUT -m set --match-set {set} dst -j ACCEPT
             ip{six}tables-legacy -w -t mangle -A INPUT -j SET --add-set {set} src"
        );
        assert!(Command::new("sh").args(["-ec", &line]).status().unwrap().success());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let mut backend = dataplane::iptables::Installed::default();
        let options = way.options();
        let users = runtime.block_on(async {
            dataplane::iptables::Backend::users_of_set(&mut backend, &set_name(&set), &options).await
        });
        assert_eq!(users.len(), 2, "{users:?}");
        assert!(
            users[0].contains("-A INPUT") && users[0].contains("mangle") && users[0].contains("legacy"),
            "{users:?}"
        );
        assert!(users[1].contains("-A OUTPUT") && users[1].contains("filter") && users[1].contains("nft"), "{users:?}");
    });
}

#[test]
fn a_set_removed_behind_our_back_is_made_again_for_the_rule_that_needs_it() {
    needs_tables!();
    every_way(|way| {
        let mut agent = Agent::new(way);
        let mut changes = program(way, 1);
        changes.sets.insert((way.family, set_name(&way.named("one"))), way.set(&way.named("one"), 8, 3));
        assert_sound(&agent.apply(changes));
        assert!(Command::new("ipset").args(["destroy", &way.named("one")]).status().unwrap().success());
        let report = agent.apply(changed_policies(way, [(0, vec![in_set(&way.named("one")), drop_all()])]));
        assert_sound(&report);
        assert!(way.save("filter").contains(&format!("--match-set {} src", way.named("one"))));
    });
}

// Helpers.

/// An apply loop with a runtime of its own.
struct Agent {
    runtime: tokio::runtime::Runtime,
    apply: ApplyLoop,
}

impl Agent {
    fn new(way: Way) -> Self {
        Self::with(way.options())
    }

    fn with(options: Options) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        Self { runtime, apply: ApplyLoop::new(options) }
    }

    fn apply(&mut self, changes: Changes) -> Report {
        self.runtime.block_on(self.apply.apply(changes))
    }

    /// Applies when the back-off of what failed is over.
    fn apply_soon(&mut self, changes: Changes) -> Report {
        let report = self.apply(changes);
        self.settle(report)
    }

    /// Applies nothing new for as long as something is to be done within the next second.
    fn settle(&mut self, mut report: Report) -> Report {
        let deadline = Instant::now() + Duration::from_secs(10);
        while let Some((due, _)) = report.again.filter(|(due, _)| *due < Instant::now() + Duration::from_secs(1)) {
            assert!(Instant::now() < deadline, "{report:?}");
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            report = self.apply(Changes::default());
        }
        report
    }
}

impl Way {
    fn options(self) -> Options {
        Options { variant: Some(self.variant), hold_restore_open: self.hold, largest_set: 64, ..Options::default() }
    }

    fn filter(self) -> TableId {
        TableId { family: self.family, table: Table::Filter }
    }

    /// Runs `ip[6]tables-<variant><suffix>` and returns what it printed.
    fn run(self, suffix: &str, args: &[&str]) -> String {
        let output = self.command(suffix).args(args).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    fn command(self, suffix: &str) -> Command {
        let stem = if self.family == Family::V4 { "iptables" } else { "ip6tables" };
        Command::new(format!("{stem}-{}{suffix}", self.variant.as_str()))
    }

    /// A table as the save program shows it, without times and counters.
    fn save(self, table: &str) -> String {
        let all = self.run("-save", &["-t", table]);
        let plain = all.lines().filter(|line| !line.starts_with('#')).map(|line| {
            if line.starts_with(':') { line.rsplit_once(' ').map_or(line, |(head, _)| head) } else { line }
        });
        plain.map(|line| format!("{line}\n")).collect()
    }

    /// A wanted set of `count` members that can hold `room`.
    fn set(self, name: &str, room: u32, count: u8) -> SetChange {
        let spec = SetSpec { name: set_name(name), family: self.family, kind: SetKind::Address, max_members: room };
        let address = |last: u8| -> std::net::IpAddr {
            match self.family {
                Family::V4 => [10, 0, 0, last].into(),
                Family::V6 => [0xfd00, 0, 0, 0, 0, 0, 0, u16::from(last)].into(),
            }
        };
        SetChange::Replace { spec, members: (1..=count).map(|last| Member::Address(address(last))).collect() }
    }

    /// The name of a set of ours; the family is part of it.
    fn named(self, id: &str) -> String {
        format!("cali{}0s:{id}", self.family.digit())
    }

    fn sets(self) -> Vec<String> {
        let output = Command::new("ipset").args(["list", "-name"]).output().unwrap();
        String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect()
    }

    /// Writes as somebody else would.
    fn restore(self, input: &str) {
        let mut child = self
            .command("-restore")
            .args(["--noflush", "--wait", "10"])
            .stdin(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        std::io::Write::write_all(&mut child.stdin.take().unwrap(), input.as_bytes()).unwrap();
        assert!(child.wait().unwrap().success(), "{input}");
    }
}

/// Policies of three rules behind a chain behind the FORWARD hook, the reference's hooks, and a raw table.
fn program(way: Way, policies: u32) -> Changes {
    let mut filter = TableChanges::default();
    for number in 0..policies {
        put(&mut filter, &format!("cali-pi-{number}"), policy_rules(number, None));
    }
    put(&mut filter, "cali-all", (0..policies).map(|number| jump(&format!("cali-pi-{number}"))).collect());
    let from_workload = Match::In(InterfaceMatch::Prefix("cali".to_owned()));
    put(
        &mut filter,
        "cali-FORWARD",
        vec![Rule::new(vec![from_workload.clone()], Action::Jump(name("cali-all"))).comment("a comment, \"quoted\"")],
    );
    let mark = 0x10000;
    let accepted = Rule::new(vec![Match::MarkIs { value: mark, mask: mark }], Action::Accept)
        .comment("Policy explicitly accepted packet.");
    let hooks = Hooks {
        inserts: vec![jump("cali-FORWARD")],
        appends: vec![accepted, Rule::new(Vec::new(), Action::SetMark(mark))],
    };
    filter.hooks.insert(BaseChain::Forward, hooks);
    let mut raw = TableChanges::default();
    put(
        &mut raw,
        "cali-PREROUTING",
        vec![
            Rule::new(Vec::new(), Action::ClearMark(0xffff_0000)),
            Rule::new(vec![from_workload, Match::ReversePathFailed], Action::Drop),
        ],
    );
    raw.hooks.insert(BaseChain::Prerouting, Hooks { inserts: vec![jump("cali-PREROUTING")], appends: Vec::new() });
    let tables = [(Table::Filter, filter), (Table::Raw, raw)];
    let tables = tables.map(|(table, changes)| (TableId { family: way.family, table }, changes));
    Changes { tables: tables.into(), ..Changes::default() }
}

fn changed_policies<const N: usize>(way: Way, policies: [(u32, Vec<Rule>); N]) -> Changes {
    let mut filter = TableChanges::default();
    for (number, rules) in policies {
        put(
            &mut filter,
            &format!("cali-pi-{number}"),
            rules.into_iter().map(|rule| with_origin(rule, number)).collect(),
        );
    }
    Changes { tables: [(way.filter(), filter)].into(), ..Changes::default() }
}

/// With `refused`, the second rule is one that the kernel refuses: an ICMP type in TCP.
fn policy_rules(number: u32, refused: Option<Family>) -> Vec<Rule> {
    let ports =
        Match::Ports { side: program::Side::Destination, negated: false, ports: vec![model::PortRange::single(80)] };
    let second = match refused {
        None => Rule::new(vec![tcp(), ports], Action::Accept),
        Some(family) => {
            let icmp = Match::Icmp { family, negated: false, icmp: IcmpType { kind: 8, code: None } };
            Rule::new(vec![tcp(), icmp], Action::Accept)
        }
    };
    let mut rules: Vec<_> = [accept(), second, drop_all()].into_iter().map(|rule| with_origin(rule, number)).collect();
    for (place, rule) in (0..).zip(&mut rules) {
        if let Some(Origin::Policy { index, .. }) = &mut rule.origin {
            *index = place;
        }
    }
    rules
}

fn in_set(name: &str) -> Rule {
    let set = Match::Set { side: program::Side::Source, negated: false, set: set_name(name), with_port: false };
    Rule::new(vec![set], Action::SetMark(0x10000))
}

fn set_name(text: &str) -> SetName {
    SetName::new(text).unwrap()
}

fn tcp() -> Match {
    Match::Protocol { negated: false, protocol: Protocol::Number(6) }
}

fn with_origin(mut rule: Rule, number: u32) -> Rule {
    let key =
        PolicyKey { kind: PolicyKind::NetworkPolicy, namespace: "ns".into(), name: format!("policy-{number}").into() };
    rule.origin = Some(Origin::Policy { key, direction: Direction::Ingress, index: 0 });
    rule
}

fn put(changes: &mut TableChanges, chain: &str, rules: Vec<Rule>) {
    changes.chains.insert(name(chain), Some(Arc::new(Chain { name: name(chain), rules })));
}

fn jump(target: &str) -> Rule {
    Rule::new(Vec::new(), Action::Jump(name(target)))
}

fn accept() -> Rule {
    Rule::new(Vec::new(), Action::SetMark(0x10000))
}

fn drop_all() -> Rule {
    Rule::new(Vec::new(), Action::Drop)
}

fn name(text: &str) -> ChainName {
    ChainName::new(text).unwrap()
}

#[track_caller]
fn assert_sound(report: &Report) {
    assert!(!report.failed(), "{report:?}");
    assert!(report.drivers.iter().all(|driver| driver.held.is_empty()), "{report:?}");
}

fn lines_with<'a>(text: &'a str, start: &str) -> Vec<&'a str> {
    text.lines().filter(|line| line.starts_with(start)).collect()
}

/// Children of this thread's process that run in this thread's network namespace under this name.
fn children_named(program: &str) -> Vec<nix::unistd::Pid> {
    let here = std::fs::read_link("/proc/thread-self/ns/net").unwrap();
    let processes =
        std::fs::read_dir("/proc").unwrap().filter_map(|entry| entry.unwrap().file_name().into_string().ok());
    let numbers = processes.filter_map(|name| name.parse::<i32>().ok());
    let ours = numbers.filter(|pid| {
        let command = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let namespace = std::fs::read_link(format!("/proc/{pid}/ns/net"));
        command.split('\0').next().is_some_and(|first| first.ends_with(program))
            && namespace.is_ok_and(|namespace| namespace == here)
    });
    ours.map(nix::unistd::Pid::from_raw).collect()
}
