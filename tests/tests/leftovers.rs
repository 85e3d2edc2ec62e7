//! What older releases and crashed agents have left in the kernel goes, what belongs to others stays, and it takes one
//! write of each table (netfilter.md 3.1, 16.3 to 16.9 and the `stale` scenarios of 16.8; host.md 9.3).
#![allow(clippy::unwrap_used, reason = "a test that meets something unexpected fails")]

use std::collections::BTreeMap;

use felix_tests::agent::{Start, Variant, end_to_end};
use felix_tests::kernel::Kernel;
use felix_tests::solo::Solo;
use felix_tests::watch::Wrappers;
use model::Family;
use testkit::netns::Netns;

#[test]
fn leftovers_of_older_releases_go_in_one_write_and_what_is_foreign_stays_legacy() {
    sweep(Variant::Legacy);
}

#[test]
fn leftovers_of_older_releases_go_in_one_write_and_what_is_foreign_stays_nft() {
    sweep(Variant::Nft);
}

fn sweep(variant: Variant) {
    if !end_to_end() {
        return;
    }
    let solo = Solo::new().unwrap();
    let host = solo.host();
    solo.start(&solo.agent(variant)).unwrap().stop().unwrap();
    let base = Kernel::read(host, variant).unwrap();
    let clean = rules(host, variant);
    let foreign_before = foreign(host, variant);
    assert_eq!(foreign_before, [""; 0]);

    for family in Family::BOTH {
        host.sh(&stale_sets(family)).unwrap();
        for of in Variant::BOTH {
            // The other variant has been used at some time, too, and by an agent only.
            host.sh(&stale_tables(of, family, of == variant)).unwrap();
        }
    }
    let tap = &solo.machines()[0].tap;
    host.sh(&stale_routes(tap)).unwrap();
    let theirs = foreign(host, variant);
    assert!(theirs.len() >= 16, "{theirs:#?}");
    let routes = foreign_routes(host);
    let hooked = |host: &Netns| order(host, variant, Family::V4, "FORWARD");
    assert!(hooked(host).contains(&"felix-FORWARD".to_owned()), "{:?}", hooked(host));

    let wrappers = Wrappers::new().unwrap();
    let path = wrappers.path();
    let agent = solo.start(&Start { path_prefix: Some(&path), ..solo.agent(variant) }).unwrap();
    let kernel = felix_tests::kernel::wait_for(host, variant, "sets of older releases to go", |kernel| {
        kernel.about("set ").len() == base.about("set ").len() + FOREIGN_SETS
    })
    .unwrap_or_else(|error| panic!("{error:#}\n{}", agent.log().unwrap()));

    // Of ours there is what there was, of others likewise, and in the order that hooks want.
    let ours: Vec<String> = rules(host, variant).into_iter().filter(|line| !is_foreign(line)).collect();
    assert_eq!(ours, clean, "{}", agent.log().unwrap());
    assert_eq!(foreign(host, variant), theirs);
    for family in Family::BOTH {
        let forward = order(host, variant, family, "FORWARD");
        assert_eq!(forward, ["cali-FORWARD", "DOCKER", "foreign one", "ACCEPT", "MARK"], "{family}");
    }
    // Routes of ours by interface or protocol are what they were; others stay.
    assert_eq!(kernel.about("route"), base.about("route"));
    assert_eq!(foreign_routes(host), routes);
    let sets: Vec<&str> = kernel.about("set ").into_iter().filter(|line| !line.contains("theirs")).collect();
    assert_eq!(sets, base.about("set "));

    // The other variant has nothing of ours any more.
    let other = if variant == Variant::Legacy { Variant::Nft } else { Variant::Legacy };
    let left: Vec<String> = rules(host, other).into_iter().filter(|line| line.starts_with("ip")).collect();
    assert!(left.iter().all(|line| !is_ours(line)), "{left:#?}\n{}", agent.log().unwrap());

    let log = agent.stop().unwrap();
    assert!(!log.contains("WARN") && !log.contains("ERROR"), "{log}");
    // iptables-nft deletes chains in a second transaction, as of whose start nothing refers to them (16.5).
    let most = if variant == Variant::Legacy { 1 } else { 2 };
    let writes: BTreeMap<String, usize> = wrappers.transactions(host).unwrap();
    let writes: Vec<_> = writes.iter().filter(|(table, _)| table.contains(variant.word())).collect();
    assert_eq!(writes.len(), 8, "{writes:?}");
    assert!(writes.iter().all(|(_, count)| (1..=most).contains(*count)), "{writes:?}\n{log}");
}

fn tool(variant: Variant, family: Family) -> String {
    let tool = if family == Family::V4 { "iptables" } else { "ip6tables" };
    format!("{tool}-{}", variant.word())
}

/// Sets of others that [`stale_sets`] makes, of both families.
const FOREIGN_SETS: usize = 4;

/// Sets of older releases, of a crashed agent, and of others.
fn stale_sets(family: Family) -> String {
    let (digit, inet, address) = match family {
        Family::V4 => (4, "inet", "192.0.2.1"),
        Family::V6 => (6, "inet6", "2001:db8::1"),
    };
    let mut script = String::new();
    let pools = if family == Family::V4 { "felix-masq-ipam-pools felix-all-ipam-pools" } else { "" };
    for name in format!("felix-{digit}-old cali{digit}0s:old cali{digit}0t0 {pools} theirs-{digit}").split_whitespace()
    {
        script += &format!("ipset create {name} hash:net family {inet}; ipset add {name} {address}\n");
    }
    script
}

/// Chains, hooks and rules of older releases, none of which drops what the test lives on, and, beside them or not, of others.
fn stale_tables(variant: Variant, family: Family, with_foreign: bool) -> String {
    let digit = family.digit();
    let mut text = String::new();
    let foreign = |line: &str| if with_foreign { format!("{line}\n") } else { String::new() };
    // Every prefix of netfilter.md 3.1, and the names of policies in older releases (3.2).
    let chains = [
        "felix-FORWARD",
        "felix-INPUT",
        "cali-old",
        "cali-pi-default.foo",
        "cali-po-default/default.foo",
        "califw-abc",
        "calitw-abc",
        "califh-abc",
        "calith-abc",
        "calipi-abc",
        "calipo-abc",
    ];
    text += "*filter\n";
    text += &foreign(":DOCKER - [0:0]\n:calico-dhcp-x - [0:0]");
    for chain in chains {
        text += &format!(":{chain} - [0:0]\n-A {chain} -j RETURN\n");
    }
    text += &foreign("-A FORWARD -j DOCKER");
    text += "-A INPUT -j felix-INPUT\n-A FORWARD -j felix-FORWARD\n-A felix-FORWARD -j califw-abc\n";
    text += "-A FORWARD -m comment --comment \"cali:AAAAAAAAAAAAAAAA\" -j cali-old\n";
    text += &foreign("-A FORWARD -m comment --comment \"foreign one\" -j ACCEPT");
    // Hooks of today twice, as a crash may leave them.
    text += "-A FORWARD -m comment --comment \"cali:wUHhoiAYhphO9Mso\" -j cali-old\n";
    text += &foreign("-A DOCKER -m comment --comment \"foreign two\" -j RETURN");
    text += &foreign("-A calico-dhcp-x -m comment --comment \"foreign three\" -j RETURN");
    if with_foreign {
        text += "-A DOCKER -m comment --comment \"cali:CCCCCCCCCCCCCCCC\" -j RETURN\n";
    }
    text += &format!("-A cali-old -m set --match-set felix-{digit}-old src -j RETURN\n");
    text += &format!("-A cali-old -m set --match-set cali{digit}0s:old dst -j RETURN\nCOMMIT\n");

    text += "*nat\n:felix-PREROUTING - [0:0]\n:felix-POSTROUTING - [0:0]\n:cali-nat-old - [0:0]\n";
    text += &foreign("-A POSTROUTING -m comment --comment \"foreign four\" -j MASQUERADE");
    text += "-A PREROUTING -j felix-PREROUTING\n-A POSTROUTING -j felix-POSTROUTING\n";
    // Rules that agents before 2.0 put straight into the chain. They knew no nft; when that is not in use, what it holds
    // is recognised by names of chains and by comments only (16.9).
    if family == Family::V4 && (variant == Variant::Legacy || with_foreign) {
        text += "-A POSTROUTING -m set --match-set felix-masq-ipam-pools src -m set ! --match-set felix-all-ipam-pools dst \
                 -j MASQUERADE\n";
        text += "-A POSTROUTING -o tunl0 -m addrtype ! --src-type LOCAL --limit-iface-out -m addrtype --src-type LOCAL \
                 -j MASQUERADE\n";
    }
    text += "COMMIT\n";
    for table in ["mangle", "raw"] {
        text += &format!("*{table}\n:felix-PREROUTING - [0:0]\n:cali-{table}-old - [0:0]\n");
        text += &foreign(&format!("-A PREROUTING -m comment --comment \"foreign {table}\" -j RETURN"));
        text += "-A PREROUTING -j felix-PREROUTING\n-A felix-PREROUTING -j RETURN\n";
        text += &format!("-A PREROUTING -m comment --comment \"cali:DDDDDDDDDDDDDDDD\" -j cali-{table}-old\nCOMMIT\n");
    }
    format!("{}-restore --noflush <<'END'\n{text}END\n", tool(variant, family))
}

/// Routes that an older agent has left and, on other interfaces and of other protocols, those of others.
fn stale_routes(tap: &str) -> String {
    format!(
        "ip route add 10.65.0.99 dev {tap} scope link proto boot
         ip route add 10.65.0.98 dev {tap} scope link proto static metric 77
         ip -6 route add fd00:65::99 dev {tap} proto boot
         ip -6 route add fd00:65::98 dev {tap} proto static metric 77
         ip route add 10.65.7.0/26 via 192.168.0.9 dev eth0 proto 80 onlink
         ip route add 10.65.5.0/26 via 192.168.0.9 dev eth0 proto bird
         ip route add blackhole 10.65.6.0/26 proto bird
         ip -6 route add fd00:65:7::/64 via fd00:192::9 dev eth0 proto 80
         ip -6 route add fd00:65:5::/64 via fd00:192::9 dev eth0 proto bird"
    )
}

fn foreign_routes(host: &Netns) -> Vec<String> {
    let listed = host.sh("ip route show table main; ip -6 route show table main").unwrap();
    let lines = listed.lines().filter(|line| !line.contains(" dev tap") && !line.contains("proto 80"));
    let lines = lines.map(|line| line.trim_end().to_owned());
    assert!(listed.contains("10.65.5.0/26") && listed.contains("fd00:65:5::/64"), "{listed}");
    lines.collect()
}

/// Returns all chains and rules of both families, in order, without counters.
fn rules(host: &Netns, variant: Variant) -> Vec<String> {
    let mut rules = Vec::new();
    for family in Family::BOTH {
        let tool = tool(variant, family);
        let saved = host.exec(&[&format!("{tool}-save")]).unwrap();
        let mut table = "";
        for line in saved.lines() {
            match line.split_at_checked(1) {
                Some(("*", name)) => table = name,
                Some((":", chain)) => {
                    let name = chain.split(' ').next().unwrap();
                    // An empty table of others' making is as good as none.
                    if !chain.contains(" ACCEPT ") {
                        rules.push(format!("{tool} {table} :{name}"));
                    }
                }
                Some(("-", _)) => rules.push(format!("{tool} {table} {line}")),
                _ => {}
            }
        }
    }
    rules.sort();
    rules
}

fn is_foreign(line: &str) -> bool {
    let foreign = ["foreign ", ":DOCKER", "-j DOCKER", ":calico-dhcp-x"];
    foreign.iter().any(|text| line.contains(text))
}

fn is_ours(line: &str) -> bool {
    ["cali-", "cali:", "felix-", "califw-", "calitw-", "califh-", "calith-", "calipi-", "calipo-"]
        .iter()
        .any(|text| line.contains(text))
}

fn foreign(host: &Netns, variant: Variant) -> Vec<String> {
    rules(host, variant).into_iter().filter(|line| is_foreign(line)).collect()
}

/// Returns what the rules of a chain are, in order: their own word for themselves, or where they lead.
fn order(host: &Netns, variant: Variant, family: Family, chain: &str) -> Vec<String> {
    let saved = host.exec(&[&format!("{}-save", tool(variant, family)), "-t", "filter"]).unwrap();
    let rules = saved.lines().filter_map(|line| line.strip_prefix(&format!("-A {chain} ")));
    let word = |rule: &str| match rule.split("--comment \"foreign ").nth(1) {
        Some(rest) => format!("foreign {}", rest.split('"').next().unwrap()),
        None => rule.split("-j ").nth(1).unwrap().split(' ').next().unwrap().to_owned(),
    };
    rules.map(word).collect()
}
