//! Which iptables is in use: why, and for how long; and the proof that packets see the rules.
#![allow(clippy::unwrap_used, reason = "a test that meets something unexpected fails")]

use std::time::Duration;

use felix_tests::agent::{Agent, Start, Variant, end_to_end};
use felix_tests::kernel::Kernel;
use felix_tests::solo::Solo;
use model::Family;
use testkit::netns::Netns;

const PATIENCE: Duration = Duration::from_secs(30);

/// Returns the lines of a level that contain a text.
fn lines<'a>(log: &'a str, level: &str, text: &str) -> Vec<&'a str> {
    log.lines().filter(|line| line.contains(&format!(" {level} ")) && line.contains(text)).collect()
}

/// Returns how many chains of ours a variant has, in each family.
fn chains(host: &Netns, variant: Variant) -> [usize; 2] {
    let kernel = Kernel::read(host, variant).unwrap();
    ["iptables filter chain cali", "ip6tables filter chain cali"].map(|start| kernel.about(start).len())
}

/// Adds a hundred rules of somebody else to the forward chain of each family.
fn crowd(host: &Netns, variant: Variant) {
    let rules: String = (0..100).map(|n| format!("-A FORWARD -m comment --comment foreign-{n} -j RETURN\\n")).collect();
    for tool in ["iptables", "ip6tables"] {
        let restore = format!("{tool}-{}-restore --noflush", variant.word());
        host.sh(&format!("printf '*filter\\n{rules}COMMIT\\n' | {restore}")).unwrap();
    }
}

/// Bar U6.a: the log of the start says what was found in each variant and family, and what came of it.
#[test]
fn the_log_gives_the_evidence_for_the_variant() {
    if !end_to_end() {
        return;
    }
    for (marked, other) in [(Variant::Nft, Variant::Legacy), (Variant::Legacy, Variant::Nft)] {
        let solo = Solo::new().unwrap();
        for tool in ["iptables", "ip6tables"] {
            solo.host().sh(&format!("{tool}-{} -w -t mangle -N KUBE-KUBELET-CANARY", marked.word())).unwrap();
        }
        // Rules alone would speak for the other one.
        crowd(solo.host(), other);
        let settings = [("FELIX_IPTABLESBACKEND", "auto")];
        let agent = solo.start(&Start { settings: &settings, ..solo.agent(marked) }).unwrap();
        let chosen = chains(solo.host(), marked);
        let log = agent.stop().unwrap();
        assert!(chosen[0] > 0 && chosen[1] > 0, "{chosen:?}\n{log}");
        assert_eq!(chains(solo.host(), other), [0, 0], "{log}");
        for family in Family::BOTH {
            let about = |variant: Variant| {
                let of = |line: &&&str| {
                    line.contains(&format!("variant=\"{}\"", variant.word()))
                        && line.contains(&format!("family={}", family.digit()))
                };
                let evidence = lines(&log, "INFO", "foreign=");
                let found: Vec<&str> = evidence.iter().filter(of).copied().collect();
                assert_eq!(found.len(), 1, "{variant:?} {family}: {found:#?}\n{log}");
                found[0].to_owned()
            };
            let (of_marked, of_other) = (about(marked), about(other));
            assert!(of_marked.contains("KUBE-KUBELET-CANARY"), "{of_marked}");
            assert!(of_marked.contains("ours=0") && of_other.contains("ours=0"), "{of_marked}\n{of_other}");
            assert!(of_other.contains("foreign=100"), "{of_other}");
            assert!(of_other.contains("filter"), "{of_other}");
            assert!(of_other.contains("1.8") && of_marked.contains("1.8"), "no version: {of_other}");
        }
        let chosen = lines(&log, "INFO", "auto");
        assert!(chosen.iter().any(|line| line.contains(marked.word())), "{log}");
    }
}

/// Bar U6.b: started with nft; then a hundred legacy rules of others, and a restart: still nft, and one warning. Only
/// the configuration moves it.
#[test]
fn the_choice_is_kept_unless_the_configuration_says_otherwise() {
    if !end_to_end() {
        return;
    }
    let solo = Solo::new().unwrap();
    let state = solo.directory().join("state").to_str().unwrap().to_owned();
    let auto = [("FELIX_IPTABLESBACKEND", "auto"), ("FELIX_STATEDIRECTORY", state.as_str())];
    let start =
        |settings: &[(&str, &str)]| -> Agent { solo.start(&Start { settings, ..solo.agent(Variant::Nft) }).unwrap() };
    crowd(solo.host(), Variant::Nft);
    let first = start(&auto).stop().unwrap();
    assert_eq!(lines(&first, "WARN", ""), [""; 0]);
    let before = chains(solo.host(), Variant::Nft);
    assert!(before[0] > 0 && before[1] > 0, "{first}");

    solo.host().sh("iptables-nft -F FORWARD; ip6tables-nft -F FORWARD").unwrap();
    for _ in 0..2 {
        crowd(solo.host(), Variant::Legacy);
    }
    let second = start(&auto).stop().unwrap();
    assert_eq!(chains(solo.host(), Variant::Nft), before, "{second}");
    assert_eq!(chains(solo.host(), Variant::Legacy), [0, 0], "{second}");
    let warned = lines(&second, "WARN", "variant");
    assert_eq!(warned.len(), 1, "{second}");
    assert!(warned[0].contains("legacy") && warned[0].contains("nft"), "{}", warned[0]);

    let legacy = [("FELIX_IPTABLESBACKEND", "legacy"), ("FELIX_STATEDIRECTORY", state.as_str())];
    let third = start(&legacy);
    assert_eq!(chains(solo.host(), Variant::Legacy), before, "{}", third.log().unwrap());
    let deadline = std::time::Instant::now() + PATIENCE;
    while chains(solo.host(), Variant::Nft) != [0, 0] {
        assert!(std::time::Instant::now() < deadline, "{}", third.log().unwrap());
        std::thread::sleep(Duration::from_millis(100));
    }
    third.stop().unwrap();
}

/// Bar U6.c: packets that never meet our rules, because somebody drops them before. The agent says so as an error, once
/// for each family, and is not in sync until they do; its rules are programmed all the same.
#[test]
fn rules_that_no_packet_meets_are_an_error_legacy() {
    out_of_the_path(Variant::Legacy);
}

#[test]
fn rules_that_no_packet_meets_are_an_error_nft() {
    out_of_the_path(Variant::Nft);
}

fn out_of_the_path(variant: Variant) {
    if !end_to_end() {
        return;
    }
    let solo = Solo::new().unwrap();
    let good = solo.start(&solo.agent(variant)).unwrap();
    for family in Family::BOTH {
        good.await_line(&format!("packets pass our rules family={}", family.digit()), PATIENCE).unwrap();
    }
    let log = good.stop().unwrap();
    assert_eq!(lines(&log, "ERROR", ""), [""; 0]);

    // Before any table of iptables.
    let gone = "nft add table inet early
        nft 'add chain inet early first { type filter hook prerouting priority -500; }'
        nft add rule inet early first iifname != '{ lo, eth0 }' drop";
    solo.host().sh(gone).unwrap();
    let agent = Agent::start(&solo.agent(variant)).unwrap();
    agent.await_line("rules are not in the packet path", PATIENCE).unwrap();
    std::thread::sleep(Duration::from_secs(2));
    let log = agent.log().unwrap();
    let errors = lines(&log, "ERROR", "rules are not in the packet path");
    assert_eq!(errors.len(), 2, "one for each family: {errors:#?}");
    assert!(!log.contains("in sync: everything wanted is in force"), "{log}");
    // Rules are programmed all the same.
    assert!(chains(solo.host(), variant)[0] > 0);

    solo.host().sh("nft delete table inet early").unwrap();
    agent.await_line("in sync: everything wanted is in force", PATIENCE).unwrap();
    agent.stop().unwrap();
}
