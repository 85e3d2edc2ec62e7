//! Which iptables variant is chosen, what looking costs the host, and what becomes of the variant that is not in use
//! (U6.a, U6.b, U6.f, U18.a; netfilter.md 16.9, 18.1). Each test in network namespaces of its own.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test fails by panicking and says in which case it was")]

#[path = "host/mod.rs"]
mod host;

use std::process::Command;
use std::time::Duration;

use dataplane::iptables::backend::decide;
use dataplane::iptables::evidence::Reason;
use dataplane::iptables::{Overrides, sticky};
use dataplane::{Options, Variant};
use host::{Agent, Host, Log, assert_sound, program};
use program::{Changes, Family, Member, SetChange, SetKind, SetName, SetSpec, TableId};
use testkit::netns::in_new_netns;

macro_rules! needs_tables {
    ($($more:literal),*) => {
        testkit::kernel_test!(
            "iptables-legacy-restore",
            "iptables-nft-restore",
            "ip6tables-legacy-restore",
            "ip6tables-nft-restore",
            "nft"
            $(, $more)*
        );
    };
}

const NFT: Host = Host { variant: Variant::Nft, family: Family::V4 };
const LEGACY: Host = Host { variant: Variant::Legacy, family: Family::V4 };

fn loaded_legacy_tables() -> String {
    let read = |name: &str| std::fs::read_to_string(format!("/proc/thread-self/net/{name}")).unwrap_or_default();
    read("ip_tables_names") + &read("ip6_tables_names")
}

fn both(host: Host) -> [Host; 2] {
    Family::BOTH.map(|family| Host { family, ..host })
}

/// Programs of both families.
fn programs(host: Host) -> Changes {
    let [mut one, two] = both(host).map(|host| program(host, 2));
    one.tables.extend(two.tables);
    one
}

/// U6.f
#[test]
fn looking_makes_no_tables_of_either_variant() {
    needs_tables!();
    in_new_netns(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let decision = runtime.block_on(decide(&Options::default()));
        assert_eq!((decision.chosen, decision.reason), (Variant::Legacy, Reason::Evidence));
        assert_eq!((loaded_legacy_tables(), NFT.ruleset()), (String::new(), String::new()));
    });
    // With one variant in use for a whole life of the agent, with its sweeps, nothing of the other comes to be.
    in_new_netns(|| {
        let options = Options { table_refresh: Some(Duration::from_millis(200)), ..Options::default() };
        let mut agent = Agent::with(Options { variant: Some(Variant::Nft), ..options.clone() });
        assert_sound(&agent.apply(programs(NFT)));
        agent.apply_for(Duration::from_millis(500));
        assert_eq!(loaded_legacy_tables(), "");
    });
    in_new_netns(|| {
        let mut agent = Agent::with(Options { variant: Some(Variant::Legacy), ..Options::default() });
        assert_sound(&agent.apply(programs(LEGACY)));
        assert!(loaded_legacy_tables().contains("filter"));
        assert_eq!(NFT.ruleset(), "");
    });
}

/// U6.a
#[test]
fn the_choice_is_logged_with_its_evidence_in_one_line_for_each_variant_and_family() {
    needs_tables!();
    in_new_netns(|| {
        for host in both(NFT) {
            host.restore("*mangle\n:KUBE-KUBELET-CANARY - -\nCOMMIT\n*filter\n:cali-a - -\n-A cali-a -j DROP\n-A INPUT -j ACCEPT\n-A INPUT -j cali-a\nCOMMIT\n");
        }
        LEGACY.restore("*raw\n-A PREROUTING -j ACCEPT\n-A PREROUTING -j ACCEPT\n-A PREROUTING -j ACCEPT\nCOMMIT\n");
        let log = Log::default();
        let mut agent = Agent::with(Options::default());
        let report = log.while_doing(|| agent.apply(programs(NFT)));
        assert_sound(&report);
        assert_eq!(agent.apply.variant(), Some(Variant::Nft));
        let text = log.text();
        let lines: Vec<&str> = text.lines().filter(|line| line.contains("iptables variant looked at")).collect();
        assert_eq!(lines.len(), 4, "{text}");
        for (number, words) in [
            ["variant=\"nft\" family=4 ", "tables=\"filter mangle\" ours=2 foreign=1", "v1."],
            ["variant=\"legacy\" family=4 ", "tables=\"raw\" ours=0 foreign=3", "legacy"],
            ["variant=\"nft\" family=6 ", "markers=\"KUBE-KUBELET-CANARY\"", "nf_tables"],
            ["variant=\"legacy\" family=6 ", "tables=\"none\" ours=0 foreign=0", "configured=\"auto\""],
        ]
        .into_iter()
        .enumerate()
        {
            for word in words.into_iter().chain(["chosen=\"nft\"", "reason=what is on the host favours it"]) {
                assert!(lines[number].contains(word), "{word}: {}", lines[number]);
            }
        }
    });
}

/// U6.b
#[test]
fn a_host_does_not_move_to_the_other_variant_by_itself() {
    needs_tables!();
    in_new_netns(|| {
        let state = tempfile::tempdir().unwrap();
        let options = Options { state_directory: Some(state.path().to_owned()), ..Options::default() };
        NFT.restore("*filter\n-A INPUT -j ACCEPT\nCOMMIT\n");
        let mut agent = Agent::with(options.clone());
        assert_sound(&agent.apply(programs(NFT)));
        assert_eq!(sticky::recall(state.path()), Some(Variant::Nft));
        drop(agent);

        LEGACY.restore(&format!("*filter\n{}COMMIT\n", "-A INPUT -j ACCEPT\n".repeat(100)));
        let log = Log::default();
        let mut agent = Agent::with(options.clone());
        let report = log.while_doing(|| agent.apply(programs(NFT)));
        assert_sound(&report);
        assert_eq!((agent.apply.variant(), report.writes()), (Some(Variant::Nft), 0), "{report:?}");
        assert_eq!(log.count("WARN", "chosen=\"nft\" other=\"legacy\""), 1, "{}", log.text());
        assert_eq!(log.count("WARN", ""), 1, "{}", log.text());
        drop(agent);

        // The configuration decides, and that is remembered.
        let log = Log::default();
        let mut agent = Agent::with(Options { variant: Some(Variant::Legacy), ..options.clone() });
        assert_sound(&log.while_doing(|| agent.apply(programs(LEGACY))));
        assert_eq!(agent.apply.variant(), Some(Variant::Legacy));
        assert_eq!(log.count("WARN", ""), 0, "{}", log.text());
        assert_eq!(sticky::recall(state.path()), Some(Variant::Legacy));
    });
    // Nowhere to write it: one line, and everything works.
    in_new_netns(|| {
        let log = Log::default();
        let mut agent = Agent::with(Options { state_directory: Some("/proc/nowhere".into()), ..Options::default() });
        assert_sound(&log.while_doing(|| agent.apply(programs(LEGACY))));
        assert_eq!(log.count("WARN", "cannot be remembered"), 1, "{}", log.text());
    });
}

/// Chains and hooks of older releases, and of ours, in the formats that they had (netfilter.md 3.1, 5.1, 16.3).
const OLD: &str = "*filter\n\
    :felix-FORWARD - -\n:felix-from-a - -\n:califw-tap1 - -\n:calitw-tap1 - -\n:calipi-x - -\n:cali-FORWARD - -\n:cali-pi-x - -\n\
    :DOCKER - -\n:calico-dhcp-x - -\n:felixish - -\n\
    -A FORWARD -j DOCKER\n\
    -A FORWARD -j felix-FORWARD\n\
    -A FORWARD -m comment --comment \"cali:wUHhoiAYhphO9Mso\" -j cali-FORWARD\n\
    -A FORWARD -m comment --comment \"cali:S93hcgKJrXEqnTfs\" -m comment --comment \"Policy explicitly accepted packet.\" -m mark --mark 0x10000/0x10000 -j ACCEPT\n\
    -A FORWARD -m comment --comment \"cali:mp77cMpurHhyjLrM\" -j MARK --set-xmark 0x10000/0x10000\n\
    -A INPUT -i tap+ -j califw-tap1\n\
    -A INPUT -j calico-dhcp-x\n-A calico-dhcp-x -j RETURN\n-A felixish -j RETURN\n\
    -A felix-FORWARD -i tap+ -j felix-from-a\n-A felix-from-a -j DROP\n-A califw-tap1 -j calipi-x\n-A calipi-x -j ACCEPT\n\
    -A cali-FORWARD -m comment --comment \"cali:AAAAAAAAAAAAAAAA\" -j cali-pi-x\n-A DOCKER -j RETURN\nCOMMIT\n\
    *nat\n:cali-POSTROUTING - -\n-A POSTROUTING -j ACCEPT\n\
    -A POSTROUTING -o tunl0 -m addrtype ! --src-type LOCAL --limit-iface-out -m addrtype --src-type LOCAL -j MASQUERADE\n-A POSTROUTING -m comment --comment \"cali:O3lYWMrLQYEMJtB5\" -j cali-POSTROUTING\n\
    -A cali-POSTROUTING -j RETURN\nCOMMIT\n\
    *mangle\n:cali-PREROUTING - -\n-A PREROUTING -m comment --comment \"cali:6gwbT8clXdHdC1b1\" -j cali-PREROUTING\nCOMMIT\n";

const OURS: [&str; 7] = ["tunl0", "felix-", "cali-", "califw", "calitw", "calipi", "cali:"];

fn rules(host: Host) -> Vec<String> {
    let tables = ["raw", "mangle", "nat", "filter"].map(|table| host.listing(table));
    let lines = tables.iter().flat_map(|listing| listing.lines());
    lines
        .filter(|line| line.starts_with("-A") || (line.starts_with(':') && line.contains(" - ")))
        .map(str::to_owned)
        .collect()
}

#[track_caller]
fn assert_swept(host: Host, before: &[String]) {
    let foreign = |line: &&String| !OURS.iter().any(|mark| line.contains(mark));
    let expected: Vec<&String> = before.iter().filter(foreign).collect();
    assert_eq!(rules(host).iter().collect::<Vec<_>>(), expected, "{host:?}");
    assert_eq!(expected.len(), 9, "{expected:?}");
}

/// What older releases left in the variant in use goes with the first batch: one write for each table.
#[test]
fn leftovers_of_older_releases_go_in_one_transaction_a_table_and_what_is_foreign_stays() {
    needs_tables!();
    for host in both(NFT).into_iter().chain(both(LEGACY)) {
        in_new_netns(|| {
            println!("{host:?}");
            host.restore(OLD);
            let before = rules(host);
            let mut agent = Agent::new(host);
            let report = agent.apply(Changes::default());
            assert_sound(&report);
            let writes: Vec<(&str, u64)> =
                report.drivers.iter().filter(|d| d.writes > 0).map(|d| (d.driver.as_str(), d.writes)).collect();
            let names = ["mangle", "nat", "filter"].map(|table| format!("{table}/{}", host.family.digit()));
            let expected: Vec<(&str, u64)> = names.iter().map(|name| (name.as_str(), 1)).collect();
            let tables: Vec<(&str, u64)> = writes.into_iter().filter(|(name, _)| name.contains('/')).collect();
            assert_eq!(tables, expected, "{report:?}");
            assert_swept(host, &before);
        });
    }
}

/// netfilter.md 16.9: for the agent's whole life, not only at its start.
#[test]
fn the_variant_that_is_not_in_use_is_swept_again_and_again() {
    needs_tables!();
    for (used, other) in [(NFT, LEGACY), (LEGACY, NFT)] {
        in_new_netns(|| {
            println!("{used:?}");
            let mut before = Vec::new();
            for host in both(other) {
                host.restore(OLD);
                before.push(rules(host));
            }
            used.nft("table ip calico {\nchain x {\ntype filter hook forward priority 0\ndrop\n}\n}");
            let options = Options {
                variant: Some(used.variant),
                table_refresh: Some(Duration::from_millis(300)),
                ..Options::default()
            };
            let mut agent = Agent::with(options);
            let report = agent.apply(programs(used));
            assert_sound(&report);
            for (host, before) in both(other).into_iter().zip(&before) {
                assert_swept(host, before);
            }
            assert!(!used.ruleset().contains("table ip calico"), "{}", used.ruleset());

            // Somebody starts an agent of the other variant for a moment.
            for host in both(other) {
                host.restore(
                    "*filter\n:cali-FORWARD - -\n-A FORWARD -j cali-FORWARD\n-A cali-FORWARD -j DROP\nCOMMIT\n",
                );
            }
            agent.apply_for(Duration::from_millis(700));
            for (host, before) in both(other).into_iter().zip(&before) {
                assert_swept(host, before);
            }
        });
    }
}

/// A chain that foreign rules lead to stays, empty, and is no reason to be unwell.
#[test]
fn a_leftover_chain_that_others_use_is_emptied_over_netlink() {
    needs_tables!();
    in_new_netns(|| {
        NFT.restore("*filter\n:cali-old - -\n:cali-gone - -\n-A cali-old -j DROP\n-A cali-gone -j DROP\n-A INPUT -j cali-gone\nCOMMIT\n");
        NFT.nft("table ip filter { map m { type ipv4_addr : verdict; elements = { 1.2.3.4 : jump cali-old }; }; }");
        let mut agent = Agent::with(Options { variant: Some(Variant::Legacy), ..Options::default() });
        assert_sound(&agent.apply(programs(LEGACY)));
        let after = rules(NFT);
        assert_eq!(after, [":cali-old - [0:0]"]);
    });
}

/// U3.c: the usual cause of a set that is in use for ever.
#[test]
fn a_set_that_the_other_variant_holds_on_to_goes_once_that_is_swept() {
    needs_tables!("ipset");
    for (used, other) in [(NFT, LEGACY), (LEGACY, NFT)] {
        in_new_netns(|| {
            println!("{used:?}");
            let made = Command::new("ipset").args(["create", "cali40s:old", "hash:net"]).status().unwrap();
            assert!(made.success());
            other.restore("*filter\n:cali-x - -\n-A FORWARD -j cali-x\n-A cali-x -m set --match-set cali40s:old src -j DROP\nCOMMIT\n");
            let mut agent = Agent::with(Options { variant: Some(used.variant), ..Options::default() });
            let mut changes = programs(used);
            let name = SetName::new("cali40s:new").unwrap();
            let spec = SetSpec { name: name.clone(), family: Family::V4, kind: SetKind::Address, max_members: 8 };
            let members = [Member::Address([10, 0, 0, 1].into())].into();
            changes.sets.insert((Family::V4, name), SetChange::Replace { spec, members });
            let report = agent.apply(changes);
            assert_sound(&agent.settle(report));
            let left = Command::new("ipset").args(["list", "-name"]).output().unwrap();
            assert_eq!(String::from_utf8(left.stdout).unwrap(), "cali40s:new\n");
        });
    }
}

/// netfilter.md 18.2: the arguments of the restore program follow `FeatureDetectOverride`.
#[test]
fn the_operator_knows_better_what_the_tools_can_do() {
    needs_tables!();
    in_new_netns(|| {
        let (features, complaints) = Overrides::parse([("MASQFullyRandom", "false")]);
        assert!(complaints.is_empty());
        for (features, random) in [(features, false), (Overrides::default(), true)] {
            let mut agent = Agent::with(Options { variant: Some(Variant::Nft), features, ..Options::default() });
            let mut changes = programs(NFT);
            let nat = TableId { family: Family::V4, table: program::Table::Nat };
            let chain = program::ChainName::new("cali-POSTROUTING").unwrap();
            let rule = program::Rule::new(Vec::new(), program::Action::Masquerade { ports: None });
            let rules = std::sync::Arc::new(program::Chain { name: chain.clone(), rules: vec![rule] });
            changes.tables.get_mut(&nat).unwrap().chains.insert(chain, Some(rules));
            assert_sound(&agent.apply(changes));
            let listing = NFT.listing("nat");
            assert_eq!(listing.contains("--random-fully"), random, "{listing}");
        }
    });
}

/// U18.a: everything that the apply loop does, under strace.
#[test]
fn without_ipv6_no_program_and_no_message_of_that_family_is_used() {
    needs_tables!("strace");
    const INNER: &str = "DETECTION_TEST_VARIANT";
    if let Ok(variant) = std::env::var(INNER) {
        let variant = if variant == "nft" { Variant::Nft } else { Variant::Legacy };
        in_new_netns(|| {
            let options = Options {
                ipv6: false,
                variant: Some(variant),
                table_refresh: Some(Duration::from_millis(200)),
                set_refresh: Some(Duration::from_millis(200)),
                route_refresh: Some(Duration::from_millis(200)),
                ..Options::default()
            };
            let mut agent = Agent::with(options);
            assert_sound(&agent.apply(program(Host { variant, family: Family::V4 }, 3)));
            agent.apply_for(Duration::from_millis(500));
        });
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    for variant in ["nft", "legacy"] {
        let trace = directory.path().join(variant);
        let output = Command::new("strace")
            .args(["-f", "-qq", "-v", "-e", "trace=%network,execve", "-o"])
            .arg(&trace)
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", "without_ipv6_no_program_and_no_message_of_that_family_is_used"])
            .env(INNER, variant)
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
        let trace = std::fs::read_to_string(&trace).unwrap();
        assert!(trace.contains("NETLINK_NETFILTER") && trace.contains("NETLINK_ROUTE"), "{trace}");
        assert!(trace.contains(&format!("iptables-{variant}-restore")), "{trace}");
        let family_6: Vec<&str> =
            trace.lines().filter(|line| line.contains("AF_INET6") || line.contains("ip6tables")).collect();
        assert!(family_6.is_empty(), "{family_6:#?}");
    }
}

fn link_names() -> Vec<String> {
    let links = Command::new("ip").args(["-o", "link"]).output().unwrap();
    let text = String::from_utf8(links.stdout).unwrap();
    text.lines().filter_map(|line| Some(line.split(": ").nth(1)?.split('@').next()?.to_owned())).collect()
}

/// U6.c: the proof succeeds, on hosts that drop whatever they can, and leaves nothing behind.
#[test]
fn a_packet_proves_that_rules_are_in_force() {
    needs_tables!();
    for host in [NFT, LEGACY] {
        in_new_netns(|| {
            println!("{host:?}");
            // As a killed agent leaves it; and a host that lets nothing out.
            let pair = ["link", "add", "felix-canary-a", "type", "veth", "peer", "name", "felix-canary-b"];
            assert!(Command::new("ip").args(pair).status().unwrap().success());
            for host in both(host) {
                host.restore("*filter\n:INPUT DROP\n:OUTPUT DROP\n:FORWARD DROP\nCOMMIT\n");
            }
            let log = Log::default();
            let mut agent = Agent::with(Options { variant: Some(host.variant), ..Options::default() });
            assert_sound(&log.while_doing(|| agent.apply(programs(host))));
            assert_eq!(log.count("INFO", "packets pass our rules family="), 2, "{}", log.text());
            assert_eq!(link_names(), ["lo"]);
        });
    }
}

/// U6.c: rules that no packet meets are an error, until packets meet them.
#[test]
fn rules_that_packets_do_not_meet_are_complained_about_once_and_tried_again() {
    needs_tables!();
    for host in [NFT, LEGACY] {
        in_new_netns(|| {
            println!("{host:?}");
            // Somebody's verdict before all tables of iptables, for one family.
            host.nft("table ip early {\nchain x {\ntype filter hook prerouting priority -400\ndrop\n}\n}");
            let log = Log::default();
            let mut agent = Agent::with(Options { variant: Some(host.variant), ..Options::default() });
            let report = log.while_doing(|| {
                agent.apply(programs(host));
                agent.apply_for(Duration::from_millis(800));
                agent.apply(Changes::default())
            });
            let canary: Vec<_> = report.drivers.iter().filter(|driver| driver.driver.starts_with("canary/")).collect();
            assert!(report.failed() && canary.len() == 1 && canary[0].driver == "canary/4", "{report:?}");
            assert_eq!(log.count("ERROR", "rules are not in the packet path family=4"), 1, "{}", log.text());
            assert_eq!(log.count("INFO", "packets pass our rules family=6"), 1, "{}", log.text());
            assert_eq!(link_names(), ["lo"]);

            host.nft("delete table ip early");
            log.while_doing(|| agent.apply_for(Duration::from_secs(2)));
            assert_sound(&agent.apply(Changes::default()));
            assert_eq!(log.count("INFO", "packets pass our rules family=4"), 1, "{}", log.text());
        });
    }
}

/// U6.c: the pair has no address, and nothing but the one packet is on it.
#[test]
fn the_proof_configures_no_address_and_sends_nothing_out() {
    needs_tables!("tcpdump");
    in_new_netns(|| {
        let sh =
            |script: &str| assert!(Command::new("sh").args(["-c", script]).status().unwrap().success(), "{script}");
        sh(
            "ip link add out type veth peer name wire && ip link set wire up && ip link set out up && ip addr add 192.0.2.1/24 dev out && \
            ip route add default via 192.0.2.2",
        );
        let mut monitor = Command::new("ip")
            .args(["-o", "monitor", "address", "route"])
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut sniffer = Command::new("tcpdump")
            .args(["-n", "-l", "-i", "out"])
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(700));
        let log = Log::default();
        let mut agent = Agent::with(Options { variant: Some(Variant::Nft), ..Options::default() });
        assert_sound(&log.while_doing(|| agent.apply(programs(NFT))));
        assert_eq!(log.count("INFO", "packets pass our rules family="), 2, "{}", log.text());
        std::thread::sleep(Duration::from_millis(300));
        let output = |child: &mut std::process::Child| {
            child.kill().unwrap();
            let mut text = String::new();
            std::io::Read::read_to_string(&mut child.stdout.take().unwrap(), &mut text).unwrap();
            child.wait().unwrap();
            text
        };
        let changes = output(&mut monitor);
        // The kernel's own route for multicast is all that there is of the pair.
        let of_the_pair: Vec<&str> = changes.lines().filter(|line| line.contains("felix-canary")).collect();
        assert!(of_the_pair.iter().all(|line| line.contains("multicast ff00::/8")), "{changes}");
        let packets = output(&mut sniffer);
        assert!(!packets.contains("224.0.0.1") && !packets.contains("ip-proto-253"), "{packets}");
    });
}
