//! The life of the process: what it waits for, what it leaves in the kernel, and how it ends.
//!
//! Each test that programs a kernel does so in a network namespace of its own, with an etcd of its
//! own in it.
#![allow(clippy::unwrap_used, reason = "a test that meets something unexpected fails")]

mod common;

use std::fs::File;
use std::io::Write as _;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;
use std::time::{Duration, Instant};

use common::Agent;
use nix::sys::signal::Signal;
use testkit::etcd::Etcd;
use testkit::netns::in_new_netns;

const VECTOR: &str =
    include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/vectors/neutron_etcd/08-ports-up.json"));
const RESOURCES: &str = "/calico/resources/v3/projectcalico.org/";
/// The interface of the first machine on `compute-1`, and its address.
const HOST: &str = "compute-1";
const TAP: &str = "tap5e3e6620-c1";
const ADDRESS: &str = "10.65.0.11";

const VARIANTS: [&str; 2] = ["legacy", "nft"];
const TOOLS: &[&str] = &["etcd", "ipset", "iptables-legacy-restore", "iptables-nft-restore", "ip6tables-nft-save"];

#[test]
fn while_etcd_does_not_answer_it_waits_and_stops_within_a_second() {
    // A port that accepts connections and says nothing, and one that refuses.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let refusing = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    for address in [silent.local_addr().unwrap(), refusing] {
        let mut agent = Agent::start("h1", &format!("http://{address}"), &[]);
        if address == refusing {
            agent.await_line(&["waiting for the datastore"]);
        } else {
            std::thread::sleep(Duration::from_millis(300));
        }
        let log = agent.stop();
        assert!(log.contains("SIGTERM"), "{log}");
    }
}

#[test]
fn hangup_asks_for_a_new_start_and_interrupt_does_not() {
    for (signal, expected) in [(Signal::SIGHUP, 129), (Signal::SIGINT, 0)] {
        let mut agent = Agent::start("h1", "http://127.0.0.1:1", &[]);
        agent.await_line(&["waiting for the datastore"]);
        agent.signal(signal);
        let (code, _, log) = agent.await_end();
        assert_eq!(code, Some(expected), "{signal}: {log}");
    }
}

#[test]
fn the_severity_before_the_configuration_is_complete_is_a_matter_of_its_own() {
    let Some(etcd) = Etcd::for_test() else { return };
    put(&etcd, "felixconfigurations/node.h1", r#"{"spec":{"logSeverityScreen":"Debug"}}"#);
    // Passive, so that nothing is programmed where the test runs.
    put(&etcd, "clusterinformations/default", r#"{"spec":{"datastoreReady":true,"variant":"Other"}}"#);
    let mut agent = Agent::start("h1", &etcd.endpoint(), &[("FELIX_EARLYLOGSEVERITYSCREEN", "none")]);
    agent.await_line(&["DEBUG", "datastore", "in-sync"]);
    let log = agent.stop();
    assert!(log.contains("calico-felix starts") && !log.contains("unknown parameter"), "{log}");
}

#[test]
fn nothing_happens_until_the_datastore_is_ready() {
    let Some(etcd) = Etcd::for_test() else { return };
    let mut agent = Agent::start(HOST, &etcd.endpoint(), &[("FELIX_LOGFORMATSCREEN", "JSON")]);
    agent.await_line(&["waiting for the datastore", "ClusterInformation"]);
    put(&etcd, "clusterinformations/default", r#"{"spec":{"datastoreReady":false}}"#);
    let line = agent.await_line(&["waiting for the datastore", "datastoreReady"]);
    assert!(line.starts_with('{') && line.contains(r#""message":"waiting for the datastore""#), "{line}");
    // A stored configuration that cannot be used is waited for as well.
    put(&etcd, "felixconfigurations/default", r#"{"spec":{"chainInsertMode":"sideways"}}"#);
    put(&etcd, "clusterinformations/default", r#"{"spec":{"datastoreReady":true}}"#);
    agent.await_line(&["stored configuration is wrong", "ChainInsertMode", "sideways"]);
    let log = agent.stop();
    assert!(!log.contains("batch applied"), "{log}");
}

#[test]
fn it_enforces_what_etcd_says_leaves_it_at_the_stop_and_writes_nothing_after_a_restart() {
    for variant in VARIANTS {
        in_a_host(|etcd| {
            let mut agent = start(etcd, variant, &[]);
            let line = agent.await_line(&["calico-felix starts"]);
            for part in [
                "host=\"compute-1\"",
                &etcd.endpoint(),
                "families=\"4,6\"",
                "prefixes=\"tap\"",
                "accept=0x10000",
                variant,
            ] {
                assert!(line.contains(part), "no {part} in {line}");
            }
            agent.await_line(&["in sync: everything wanted is in force"]);
            // The interface appears after the agent.
            sh(&format!("ip link add {TAP} type veth peer name peer0; ip link set peer0 up; ip link set {TAP} up"));
            let route = format!("{ADDRESS} dev {TAP}");
            eventually("the route of the machine", || sh("ip route").contains(&route));
            let setting = std::fs::read_to_string(format!("/proc/sys/net/ipv4/conf/{TAP}/proxy_arp")).unwrap();
            assert_eq!(setting, "1\n", "the interface answers for every address");
            let programmed = rules(variant);
            for chain in
                ["-A FORWARD", "-A cali-tw-tap5e3e6620-c1", "-A cali-fw-tap5e3e6620-c1", "--match-set cali40s:"]
            {
                assert!(programmed.contains(chain), "{variant}: no {chain} in\n{programmed}");
            }
            let sets = sh("ipset list -n");
            assert!(sets.contains("cali40s:") && sets.contains("cali60s:"), "{sets}");
            let log = agent.stop();
            assert_eq!(log.lines().filter(|line| line.contains("calico-felix starts")).count(), 1, "{log}");
            let before = (rules(variant), sorted(&sh("ipset save")), sh("ip route; ip -6 route; ip neigh"));
            assert_eq!(before.0, programmed, "the stop changed rules");

            let mut agent = start(etcd, variant, &[]);
            let line = agent.await_line(&["batch applied"]);
            assert!(line.contains("writes=0") && line.contains("failed=false"), "{variant}: {line}\n{}", agent.log());
            agent.await_line(&["in sync"]);
            agent.stop();
            let after = (rules(variant), sorted(&sh("ipset save")), sh("ip route; ip -6 route; ip neigh"));
            assert_eq!(before, after, "{variant}");
        });
    }
}

#[test]
fn a_change_of_effective_settings_restarts_it_and_others_do_not() {
    in_a_host(|etcd| {
        let mut agent = start(etcd, "nft", &[]);
        agent.await_line(&["in sync"]);
        let cluster = |version: &str, ready: bool| {
            format!(
                r#"{{"spec":{{"clusterType":"openstack,{version}","calicoVersion":"{version}","datastoreReady":{ready}}}}}"#
            )
        };
        put(etcd, "clusterinformations/default", &cluster("v9", true));
        put(etcd, "felixconfigurations/default", r#"{"spec":{"interfacePrefix":"tap","healthPort":1}}"#);
        put(etcd, "felixconfigurations/node.compute-2", r#"{"spec":{"interfacePrefix":"cali"}}"#);
        put(etcd, "felixconfigurations/default", r#"{"spec":{"interfacePrefix":"tap","chainInsertMode":"sideways"}}"#);
        agent.await_line(&["stored configuration is wrong", "keeping"]);
        put(etcd, "felixconfigurations/default", r#"{"spec":{"interfacePrefix":"tap,cali"}}"#);
        let (code, _, log) = agent.await_end();
        assert_eq!(code, Some(129), "{log}");
        let line = log.lines().find(|line| line.contains("configuration changed")).unwrap();
        assert!(
            line.contains("InterfacePrefix") && line.contains("\"tap\"") && line.contains("\"tap,cali\""),
            "{line}"
        );

        let mut agent = start(etcd, "nft", &[]);
        agent.await_line(&["in sync"]);
        put(etcd, "clusterinformations/default", &cluster("v9", false));
        let (code, took, log) = agent.await_end();
        assert_eq!(code, Some(1), "{log}");
        assert!(log.contains("datastore became unready") && took > Duration::from_secs(1), "{took:?}: {log}");
        assert!(rules("nft").contains("cali-FORWARD"), "the rules are gone");
    });
}

#[test]
fn another_variant_of_the_product_is_left_alone() {
    in_a_host(|etcd| {
        let cluster = r#"{"spec":{"datastoreReady":true,"variant":"CalicoEnterprise"}}"#;
        put(etcd, "clusterinformations/default", cluster);
        let mut agent = start(etcd, "nft", &[("FELIX_LOGSEVERITYSCREEN", "debug")]);
        agent.await_line(&["nothing is programmed", "CalicoEnterprise"]);
        agent.await_line(&["datastore", "in-sync"]);
        let log = agent.stop();
        assert!(!log.contains("batch applied"), "{log}");
        assert_eq!(rules("nft"), "");
    });
}

#[test]
fn it_stops_within_a_second_while_an_apply_hangs_and_the_next_start_completes_it() {
    in_a_host(|etcd| {
        // Programs that never come back, in front of the real ones.
        let directory = tempfile::tempdir().unwrap();
        for name in ["iptables-nft-restore", "ip6tables-nft-restore"] {
            let path = directory.path().join(name);
            let mut file = std::fs::File::create(&path).unwrap();
            // Only restoring hangs, so that the agent gets that far.
            write!(file, "#!/bin/sh\ncase \"$*\" in *noflush*) exec sleep 60;; esac\nexec /usr/sbin/{name} \"$@\"\n")
                .unwrap();
            drop(file);
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        }
        let path = format!("{}:{}", directory.path().display(), std::env::var("PATH").unwrap());
        let mut agent = start(etcd, "nft", &[("PATH", &path), ("FELIX_LOGSEVERITYSCREEN", "debug")]);
        agent.await_line(&["taking in updates", "complete=true"]);
        std::thread::sleep(Duration::from_millis(500));
        let log = agent.stop();
        assert!(!log.contains("batch applied"), "{log}");

        let mut agent = start(etcd, "nft", &[]);
        agent.await_line(&["in sync: everything wanted is in force"]);
        agent.stop();
        assert!(rules("nft").contains("cali-tw-"), "{}", rules("nft"));
    });
}

#[test]
fn without_etcd_it_keeps_what_is_programmed_and_stops_within_a_second() {
    in_a_host(|etcd| {
        let mut agent = start(etcd, "legacy", &[]);
        agent.await_line(&["in sync: everything wanted is in force"]);
        let before = rules("legacy");
        etcd.freeze().unwrap();
        // The interfaces are followed all the same.
        sh(&format!("ip link add {TAP} type veth peer name peer0; ip link set peer0 up; ip link set {TAP} up"));
        let setting = format!("/proc/sys/net/ipv4/conf/{TAP}/proxy_arp");
        eventually("the settings of the interface", || std::fs::read_to_string(&setting).unwrap() == "1\n");
        agent.stop();
        etcd.thaw().unwrap();
        assert_eq!(rules("legacy"), before);
        assert!(before.contains("cali-tw-"), "{before}");
    });
}

#[test]
fn a_lock_that_somebody_holds_at_the_start_only_delays_it() {
    in_a_host(|etcd| {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lock");
        let lock = File::create(&path).unwrap();
        lock.lock().unwrap();
        let mut agent = start(etcd, "legacy", &[("XTABLES_LOCKFILE", path.to_str().unwrap())]);
        // Longer than the self-test of the programs may take.
        std::thread::sleep(Duration::from_secs(6));
        assert!(!agent.log().contains("batch applied"), "{}", agent.log());
        drop(lock);
        agent.await_line(&["in sync: everything wanted is in force"]);
        let log = agent.stop();
        assert!(!log.contains("cannot be held open"), "{log}");
    });
}

#[test]
fn an_internal_error_ends_it_with_2_and_leaves_the_kernel_alone() {
    in_a_host(|etcd| {
        let mut agent = start(etcd, "nft", &[]);
        agent.await_line(&["in sync"]);
        agent.stop();
        let before = rules("nft");
        let mut agent = start(etcd, "nft", &[("FELIX_DEBUGPANICAFTER", "0.5")]);
        agent.await_line(&["panic", "DebugPanicAfter", "bootstrap.rs"]);
        let (code, _, log) = agent.await_end();
        assert_eq!(code, Some(2), "{log}");
        assert!(log.contains("stopping because of an internal error"), "{log}");
        assert_eq!(rules("nft"), before);
    });
}

/// Runs a test in a namespace with an etcd that holds what Neutron wrote for two hosts.
fn in_a_host(test: impl FnOnce(&Etcd) + Send) {
    if !testkit::netns::require_root_and(TOOLS) {
        return;
    }
    in_new_netns(|| {
        let etcd = Etcd::start().unwrap();
        etcd.load(VECTOR).unwrap();
        test(&etcd);
    });
}

fn start(etcd: &Etcd, variant: &str, variables: &[(&str, &str)]) -> Agent {
    let variables: Vec<_> = variables.iter().copied().chain([("FELIX_IPTABLESBACKEND", variant)]).collect();
    Agent::start(HOST, &etcd.endpoint(), &variables)
}

fn put(etcd: &Etcd, name: &str, value: &str) {
    etcd.put(&format!("{RESOURCES}{name}"), value).unwrap();
}

/// The rules of both families.
fn rules(variant: &str) -> String {
    let saved = sh(&format!("iptables-{variant}-save; ip6tables-{variant}-save"));
    // The time is in the comments, and counters move with every packet on the loopback.
    saved.lines().filter(|line| line.starts_with("-A")).map(|line| format!("{line}\n")).collect()
}

fn sorted(text: &str) -> Vec<String> {
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    lines.sort();
    lines
}

fn sh(script: &str) -> String {
    let output = Command::new("sh").args(["-ec", script]).output().unwrap();
    assert!(output.status.success(), "`{script}`: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn eventually(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(15);
    while !condition() {
        assert!(Instant::now() < deadline, "{what} does not come");
        std::thread::sleep(Duration::from_millis(20));
    }
}
