//! Tables that others have put things into which iptables cannot express, and what earlier agents left behind: read
//! without being changed, written without being stopped (U6.d, U6.e). Each test in network namespaces of its own.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test fails by panicking and says in which case it was")]

#[path = "host/mod.rs"]
mod host;

use dataplane::Variant;
use dataplane::iptables::native::Native;
use dataplane::iptables::parse::{Entry, Judgement, judge, parse};
use host::{Agent, Host, LIMIT, assert_sound, program};
use program::{Changes, Family, Table};
use testkit::netns::in_new_netns;

macro_rules! needs_tables {
    () => {
        testkit::kernel_test!(
            "iptables-legacy-restore",
            "iptables-nft-restore",
            "ip6tables-legacy-restore",
            "ip6tables-nft-restore",
            "nft"
        );
    };
}

/// Something in every table of the family that iptables cannot list.
fn native_rules(host: Host) {
    let address = if host.family == Family::V4 { "ip" } else { "ip6" };
    for (table, chain, hook, priority) in [
        ("raw", "PREROUTING", "type filter hook prerouting", "-300"),
        ("mangle", "PREROUTING", "type filter hook prerouting", "-150"),
        ("nat", "POSTROUTING", "type nat hook postrouting", "100"),
        ("filter", "FORWARD", "type filter hook forward", "0"),
    ] {
        host.nft(
            &format!(
                "add table {address} {table}\n\
             add chain {address} {table} {chain} {{ {hook} priority {priority}; }}\n\
             add chain {address} {table} watcher {{ type filter hook input priority 7; }}\n\
             add set {address} {table} friends {{ type {address}v_addr; }}\n\
             add map {address} {table} ways {{ type mark : verdict; }}\n\
             add rule {address} {table} {chain} meta mark set jhash {address} saddr mod 4\n\
             add rule {address} {table} {chain} meta mark vmap @ways\n\
             add rule {address} {table} {chain} {address} saddr @friends counter accept\n\
             add rule {address} {table} watcher meta mark set numgen inc mod 3\n"
            )
            .replace("ipv_addr", "ipv4_addr")
            .replace("ip6v_addr", "ipv6_addr"),
        );
    }
}

/// U6.e: each row of its table, with real tools; all exit with status 0.
#[test]
fn listings_are_judged_by_what_they_hold() {
    needs_tables!();
    for family in Family::BOTH {
        in_new_netns(|| {
            let host = Host { variant: Variant::Nft, family };
            let address = if family == Family::V4 { "ip" } else { "ip6" };
            let judged = || judge(Table::Nat, &host.listing("nat"));
            host.restore("*nat\n-A POSTROUTING -j ACCEPT\nCOMMIT\n");
            assert_eq!(judged(), Judgement::Complete { hides_base_chains: false });
            host.nft(&format!("add chain {address} nat c {{ type nat hook prerouting priority -100; }}"));
            let hidden = host.listing("nat");
            assert_eq!(judged(), Judgement::Complete { hides_base_chains: true }, "{hidden}");
            assert_eq!(parse(Table::Nat, &hidden).unwrap().shared["POSTROUTING"].len(), 1, "{hidden}");
            Host { variant: Variant::Legacy, ..host }.listing("raw");
            assert_eq!(judged(), Judgement::Complete { hides_base_chains: true });
            host.nft(&format!("add rule {address} nat POSTROUTING meta mark set jhash {address} saddr mod 4"));
            assert_eq!(judged(), Judgement::Incompatible);
        });
    }
}

/// What the save program and netlink say of one table is the same, and looking makes nothing.
#[test]
fn a_table_is_the_same_over_netlink() {
    needs_tables!();
    for family in Family::BOTH {
        in_new_netns(|| {
            let host = Host { variant: Variant::Nft, family };
            let mut native = Native::new(family, LIMIT);
            assert_eq!(native.view(Table::Filter).unwrap(), dataplane::iptables::parse::View::default());
            assert_eq!(host.ruleset(), "");
            assert_sound(&Agent::new(host).apply(program(host, 5)));
            host.restore("*filter\n:DOCKER - -\n-A FORWARD -j DOCKER\n-A DOCKER -m comment --comment \"cali:AAAAAAAAAAAAAAAA\" -j cali-pi-1\nCOMMIT\n");
            for table in Table::ALL {
                let printed = parse(table, &host.listing(table.as_str())).unwrap();
                let seen = native.view(table).unwrap();
                // Over netlink there are numbers in place of texts.
                assert_eq!(seen.ours, printed.ours);
                let marks = |entries: &[Entry]| {
                    entries.iter().map(|entry| (*entry == Entry::Foreign, entry.hash())).collect::<Vec<_>>()
                };
                for (name, entries) in &printed.shared {
                    let over_netlink = seen.shared.get(name).map(Vec::as_slice).unwrap_or_default();
                    assert_eq!(marks(over_netlink), marks(entries), "{name}");
                }
            }
        });
    }
}

/// U6.d
#[test]
fn rules_that_iptables_cannot_express_stop_nothing_and_stay() {
    needs_tables!();
    for family in Family::BOTH {
        for hold in [false, true] {
            in_new_netns(|| {
                println!("{family:?} hold {hold}");
                let host = Host { variant: Variant::Nft, family };
                native_rules(host);
                // An earlier agent was here, too: hooks with and without text, and chains.
                host.restore(
                    "*filter\n:felix-FORWARD - -\n:cali-old - -\n-A FORWARD -j felix-FORWARD\n\
                     -A FORWARD -m comment --comment \"cali:AAAAAAAAAAAAAAAA\" -j cali-old\n\
                     -A FORWARD -p 6 -m comment --comment \"cali:CCCCCCCCCCCCCCCC\" -j cali-old\n\
                     -A FORWARD -m comment --comment \"cali:S93hcgKJrXEqnTfs\" -m mark --mark 0x80000/0x80000 -j ACCEPT\n\
                     -A felix-FORWARD -j DROP\n-A cali-old -m comment --comment \"cali:BBBBBBBBBBBBBBBB\" -j DROP\nCOMMIT\n",
                );
                let foreign = host.foreign_native_rules();
                let (mut agent, log) = (Agent::holding(host, hold), host::Log::default());
                let report = log.while_doing(|| {
                    let report = agent.apply(program(host, 3));
                    agent.settle(report)
                });
                assert_sound(&report);
                let after = host.ruleset();
                for gone in ["felix-FORWARD", "cali-old"] {
                    assert!(!after.contains(gone), "{gone}: {after}");
                }
                assert_eq!(host.foreign_native_rules(), foreign, "{after}");
                for table in ["raw", "mangle", "nat", "filter"] {
                    let said = log.count("read over netlink", table);
                    assert_eq!(said, 1, "{table}: {}", log.text());
                }
                // A change, a look, and a restart without a write.
                assert_sound(&agent.apply(host::changed_policy(host, 1)));
                let mut restarted = Agent::new(host);
                let mut wanted = program(host, 3);
                let changed = host::changed_policy(host, 1);
                for (id, changes) in changed.tables {
                    wanted.tables.get_mut(&id).unwrap().chains.extend(changes.chains);
                }
                let report = restarted.apply(wanted);
                assert_sound(&report);
                assert_eq!(report.writes(), 0, "{report:?}");
                // And away again.
                let mut nothing = Agent::new(host);
                let report = nothing.apply(Changes::default());
                assert_sound(&nothing.settle(report));
                let after = host.ruleset();
                assert!(!after.contains("cali"), "{after}");
                assert_eq!(host.foreign_native_rules(), foreign, "{after}");
            });
        }
    }
}
