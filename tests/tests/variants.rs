//! Two iptables and two families: what the agent decides about them has no side effects, rules of others that iptables
//! cannot read do not matter, and a family that is off is left alone.
#![allow(clippy::unwrap_used, reason = "a test that meets something unexpected fails")]

use std::time::{Duration, Instant};

use felix_tests::agent::{Start, Variant, end_to_end};
use felix_tests::data::{Event, ssh_rule_replaced};
use felix_tests::kernel::{Kernel, wait_for};
use felix_tests::solo::Solo;
use felix_tests::watch::Wrappers;
use model::Family;
use testkit::netns::Netns;

const TABLES: &[&str] = &["raw", "mangle", "nat", "filter"];

fn warnings(log: &str) -> Vec<&str> {
    log.lines().filter(|line| line.contains(" WARN ") || line.contains(" ERROR ")).collect()
}

/// Returns which legacy tables there are, in both families.
fn legacy_tables(host: &Netns) -> String {
    let script = "for file in ip_tables_names ip6_tables_names; do cat /proc/net/$file 2>/dev/null || :; done";
    host.sh(script).unwrap()
}

/// Bar U6.f: finding out about legacy makes no legacy table, neither when nft was asked for nor when the evidence is for
/// nft, and also not when the other variant is swept.
#[test]
fn looking_for_legacy_tables_makes_none() {
    if !end_to_end() {
        return;
    }
    for backend in ["nft", "auto"] {
        let solo = Solo::new().unwrap();
        if backend == "auto" {
            let evidence =
                "iptables-nft -t mangle -N KUBE-KUBELET-CANARY; ip6tables-nft -t mangle -N KUBE-KUBELET-CANARY";
            solo.host().sh(evidence).unwrap();
        }
        assert_eq!(legacy_tables(solo.host()), "");
        let settings = [("FELIX_IPTABLESBACKEND", backend)];
        let agent = solo.start(&Start { settings: &settings, ..solo.agent(Variant::Nft) }).unwrap();
        let kernel = Kernel::read(solo.host(), Variant::Nft).unwrap();
        // A change, so that everything has run once more.
        let Event::Put(key, value) = ssh_rule_replaced(solo.content()).unwrap() else { panic!("a put") };
        solo.store().put(&key, &value).unwrap();
        wait_for(solo.host(), Variant::Nft, "the change", |kernel| kernel.mentions("2222:2230")).unwrap();
        let log = agent.stop().unwrap();
        assert!(kernel.mentions("cali-tw-tap"), "{log}");
        assert_eq!(legacy_tables(solo.host()), "", "{backend}\n{log}");
    }
}

/// The other direction of bar U6.f: an agent that uses legacy makes no table of nf_tables.
#[test]
fn looking_for_nft_tables_makes_none() {
    if !end_to_end() {
        return;
    }
    let solo = Solo::new().unwrap();
    let agent = solo.start(&solo.agent(Variant::Legacy)).unwrap();
    let tables = solo.host().sh("nft list tables").unwrap();
    let log = agent.stop().unwrap();
    assert_eq!(tables, "", "{log}");
    assert!(legacy_tables(solo.host()).contains("filter"), "{log}");
}

/// Rules, chains and sets that iptables has no words for, in and beside the four tables of a family.
fn natives(family: Family) -> String {
    let (ip, loopback) = if family == Family::V4 { ("ip", "127.0.0.9") } else { ("ip6", "::9") };
    let tool = if family == Family::V4 { "iptables-nft" } else { "ip6tables-nft" };
    let chains = [("raw", "PREROUTING"), ("mangle", "FORWARD"), ("nat", "POSTROUTING"), ("filter", "FORWARD")];
    let mut script = String::new();
    for (table, chain) in chains {
        // The table as iptables-nft makes it.
        script += &format!("{tool} -t {table} -I {chain} -m comment --comment foreign -j RETURN\n");
        script +=
            &format!("nft add rule {ip} {table} {chain} meta mark set jhash {ip} saddr mod 4 comment native-{table}\n");
        script += &format!("nft add set {ip} {table} native '{{ type mark; flags interval; }}'\n");
        script += &format!("nft add chain {ip} {table} native\n");
        script += &format!("nft add rule {ip} {table} native {ip} daddr {loopback} meta mark set numgen inc mod 3\n");
    }
    script += &format!("nft add chain {ip} filter native-base '{{ type filter hook forward priority 7; }}'\n");
    script += &format!("nft add table inet native-{ip}\nnft add map inet native-{ip} m '{{ type mark : verdict; }}'\n");
    script
}

/// Removes what [`natives`] made, as far as it is in the way of iptables' own programs.
fn remove_natives(host: &Netns, family: Family) {
    let ip = if family == Family::V4 { "ip" } else { "ip6" };
    let listed = host.sh("nft -a list ruleset").unwrap();
    let (mut in_family, mut table, mut chain, mut script) = (false, "", "", String::new());
    for line in listed.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            ["table", of, name, ..] => (in_family, table) = (of == ip, name),
            ["chain", name, ..] => chain = name,
            [.., "handle", handle] if in_family && line.contains("native-") && !line.contains('{') => {
                script += &format!("nft delete rule {ip} {table} {chain} handle {handle}\n");
            }
            _ => {}
        }
    }
    for table in TABLES {
        script += &format!("nft flush chain {ip} {table} native; nft delete chain {ip} {table} native\n");
        script += &format!("nft delete set {ip} {table} native\n");
    }
    script += &format!("nft delete chain {ip} filter native-base; nft delete table inet native-{ip}\n");
    host.sh(&script).unwrap();
}

/// Returns the lines of the ruleset that [`natives`] made.
fn native_lines(host: &Netns) -> Vec<String> {
    let listed = host.sh("nft list ruleset").unwrap();
    let lines = listed.lines().filter(|line| ["native", "jhash", "numgen"].iter().any(|text| line.contains(text)));
    lines.map(str::to_owned).collect()
}

/// Bars U6.d and U6.e: in all four tables of both families are rules, sets and chains that iptables cannot list, and
/// legacy tables exist too. The agent starts on them, converges, follows changes and repairs; a restart on them writes
/// nothing; they stay as they are; the log has no warning and names each table once.
#[test]
fn rules_that_iptables_cannot_list_stop_nothing() {
    if !end_to_end() {
        return;
    }
    let solo = Solo::new().unwrap();
    let host = solo.host();
    solo.start(&solo.agent(Variant::Nft)).unwrap().stop().unwrap();
    let base = Kernel::read(host, Variant::Nft).unwrap();
    host.sh("nft flush ruleset").unwrap();
    for family in Family::BOTH {
        host.sh(&natives(family)).unwrap();
    }
    host.sh("iptables-legacy -t filter -A FORWARD -m comment --comment legacy -j RETURN").unwrap();
    let natives = native_lines(host);
    assert!(natives.len() >= 20, "{natives:#?}");
    let unreadable = host.sh("iptables-nft-save -t filter 2>/dev/null").unwrap();
    assert!(unreadable.contains("is incompatible"), "iptables can list it: {unreadable}");

    let mut agent = solo.start(&solo.agent(Variant::Nft)).unwrap();
    // A change, and a change of somebody else's making.
    let Event::Put(key, value) = ssh_rule_replaced(solo.content()).unwrap() else { panic!("a put") };
    solo.store().put(&key, &value).unwrap();
    let listed = |family: &str| host.sh(&format!("nft list table {family} filter")).unwrap();
    agent.await_line("batch applied seq=2", Duration::from_secs(30)).unwrap();
    for family in ["ip", "ip6"] {
        host.sh(&format!("nft flush chain {family} filter cali-FORWARD")).unwrap();
        let deadline = Instant::now() + Duration::from_secs(30);
        let body = |text: &str| {
            let chain = text.split("chain cali-FORWARD {").nth(1).unwrap();
            chain.split('}').next().unwrap().trim().lines().count()
        };
        while body(&listed(family)) == 0 {
            assert!(Instant::now() < deadline, "{family}: not repaired\n{}", agent.log().unwrap());
            std::thread::sleep(Duration::from_millis(50));
        }
    }
    assert!(agent.is_running().unwrap());
    let log = agent.stop().unwrap();
    for table in TABLES {
        for digit in [4, 6] {
            let label = format!("{table}/{digit}");
            let said: Vec<&str> =
                log.lines().filter(|line| line.contains("read over netlink") && line.contains(&label)).collect();
            assert_eq!(said.len(), 1, "{label}: {said:#?}\n{log}");
            assert!(said[0].contains(" INFO "), "{}", said[0]);
        }
    }
    // That somebody flushed a chain of ours is worth a warning; the rest is not.
    let loud = warnings(&log);
    assert!(loud.iter().all(|line| line.contains("foreign changes") || line.contains("repaired")), "{loud:#?}");

    let wrappers = Wrappers::new().unwrap();
    let path = wrappers.path();
    let agent = solo.start(&Start { path_prefix: Some(&path), ..solo.agent(Variant::Nft) }).unwrap();
    std::thread::sleep(Duration::from_secs(1));
    let log = agent.stop().unwrap();
    assert_eq!(wrappers.writes(host).unwrap(), [""; 0], "{log}");
    assert_eq!(warnings(&log), [""; 0]);
    assert_eq!(native_lines(host), natives);

    // What the agent has made is what it makes where nobody else is.
    for family in Family::BOTH {
        remove_natives(host, family);
    }
    let agent = solo.start(&solo.agent(Variant::Nft)).unwrap();
    solo.store().put(&key, &solo.content()[&key]).unwrap();
    let same = |kernel: &Kernel| {
        let differences = base.differences(kernel);
        // The foreign rules of iptables' own kind, after ours in each chain, move those that we append.
        differences.iter().all(|line| line.contains("foreign") || line.contains(" FORWARD 0"))
    };
    wait_for(host, Variant::Nft, "the state of a clean start", same)
        .unwrap_or_else(|error| panic!("{error:#}\n{}", agent.log().unwrap()));
    agent.stop().unwrap();
}

/// Bar U18.a: with IPv6 off no program of IPv6 is started and no netlink message of that family is sent, in a whole life
/// with changes; what there is of IPv6 stays as it is.
#[test]
fn with_ipv6_off_nothing_of_ipv6_is_touched_legacy() {
    ipv6_off(Variant::Legacy);
}

#[test]
fn with_ipv6_off_nothing_of_ipv6_is_touched_nft() {
    ipv6_off(Variant::Nft);
}

fn ipv6_off(variant: Variant) {
    if !end_to_end() || !testkit::netns::require_root_and(&["strace"]) {
        return;
    }
    let solo = Solo::new().unwrap();
    let host = solo.host();
    let tap = &solo.machines()[0].tap;
    host.sh(&format!("ip -6 route add 2001:db8::7 dev {tap}; ip6tables-{} -w -N cali-old", variant.word())).unwrap();
    let trace = solo.directory().join("trace");
    let calls = "execve,sendto,sendmsg,sendmmsg,socket,bind";
    let before = format!(
        "{}\nset -- strace -f -qq -s 256 -e trace={calls} -e signal=none -o {} \"$0\" \"$@\"\nset -- \"$@\"",
        solo.agent(variant).before,
        trace.display()
    );
    // `$0` is the agent, which strace starts.
    let before = format!("{before}\nexec \"$@\"");
    for ipv6 in ["false", "true"] {
        drop(std::fs::remove_file(&trace));
        let settings = [("FELIX_IPV6SUPPORT", ipv6)];
        let agent = solo.start(&Start { settings: &settings, before: &before, ..solo.agent(variant) }).unwrap();
        let Event::Put(key, value) = ssh_rule_replaced(solo.content()).unwrap() else { panic!("a put") };
        solo.store().put(&key, &value).unwrap();
        agent.await_line("batch applied seq=2", Duration::from_secs(30)).unwrap();
        let kernel = Kernel::read(host, variant).unwrap();
        solo.store().put(&key, &solo.content()[&key]).unwrap();
        drop(agent);
        let text = std::fs::read_to_string(&trace).unwrap();
        let of_ipv6 = |line: &&str| {
            let program = line.contains("execve(") && line.contains("ip6tables");
            // What is asked of netlink in the name of the family; a resolver's socket is not.
            program || (!line.contains("socket(") && !line.contains("bind(") && line.contains("AF_INET6"))
        };
        let touched: Vec<&str> = text.lines().filter(of_ipv6).collect();
        assert!(text.contains("AF_INET"), "nothing was traced");
        if ipv6 == "false" {
            assert_eq!(touched, [""; 0]);
            assert_eq!(kernel.about("ip6tables"), ["ip6tables filter chain cali-old -"]);
            assert!(kernel.mentions("route6 2001:db8::7"), "{:?}", kernel.about("route6"));
            assert_eq!(kernel.about("set cali6"), [""; 0]);
            assert!(kernel.mentions("iptables filter cali-tw-tap"));
        } else {
            // The trace can see it.
            assert!(!touched.is_empty());
        }
    }
}

/// Bar U18.a: on a kernel without IPv6 (`ipv6.disable=1`: no sysctls, no ip6tables) the agent runs and IPv4 is in force.
#[test]
fn on_a_kernel_without_ipv6_the_agent_runs_legacy() {
    without_ipv6(Variant::Legacy);
}

#[test]
fn on_a_kernel_without_ipv6_the_agent_runs_nft() {
    without_ipv6(Variant::Nft);
}

fn without_ipv6(variant: Variant) {
    if !end_to_end() {
        return;
    }
    let solo = Solo::new().unwrap();
    let bin = solo.directory().join("bin");
    std::fs::create_dir(&bin).unwrap();
    for program in
        ["", "-save", "-restore", "-legacy", "-legacy-save", "-legacy-restore", "-nft", "-nft-save", "-nft-restore"]
    {
        let script = "#!/bin/sh\necho \"can't initialize ip6tables table: Address family not supported\" >&2\nexit 3\n";
        std::fs::write(bin.join(format!("ip6tables{program}")), script).unwrap();
    }
    solo.host().sh(&format!("chmod 755 {}/*", bin.display())).unwrap();
    let without = format!(
        "mkdir {0}; for part in core ipv4 netfilter; do mkdir {0}/$part; mount --bind /proc/sys/net/$part {0}/$part; done
         mount --rbind {0} /proc/sys/net",
        solo.directory().join("net").display()
    );
    let before = format!("{}\n{without}", solo.agent(variant).before);
    let start = Start { path_prefix: Some(&bin), before: &before, ..solo.agent(variant) };
    let mut agent = felix_tests::agent::Agent::start(&start).unwrap();
    let in_force = |kernel: &Kernel| {
        solo.machines().iter().all(|machine| {
            let address = machine.address(Family::V4).unwrap();
            kernel.mentions(&format!("iptables filter cali-tw-{}", machine.tap))
                && kernel.mentions(&format!("route4 {address}"))
        })
    };
    wait_for(solo.host(), variant, "IPv4 in force", in_force)
        .unwrap_or_else(|error| panic!("{error:#}\n{}", agent.log().unwrap()));
    std::thread::sleep(Duration::from_secs(2));
    assert!(agent.is_running().unwrap());
    let log = agent.stop().unwrap();
    assert!(log.contains("families=\"4\""), "{log}");
    assert!(!log.contains("panicked"), "{log}");
}
