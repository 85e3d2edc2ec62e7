//! Kernel settings on a real kernel.
#![allow(clippy::unwrap_used, reason = "test code")]

use std::fs;
use std::process::Command;
use std::time::Instant;

use dataplane::Options;
use dataplane::sysctl::Sysctls;
use model::{LinkState, Name};
use testkit::netns::in_new_netns;

fn value(path: &str) -> String {
    fs::read_to_string(format!("/proc/sys/net/{path}")).unwrap().trim().to_owned()
}

#[test]
fn a_real_interface_is_configured_once() {
    testkit::kernel_test!();
    // `/proc/sys/net` shows the namespace of the thread that looks.
    in_new_netns(|| {
        let ip = Command::new("ip").args(["link", "add", "tap1.x", "type", "veth", "peer", "name", "p1"]).status();
        assert!(ip.unwrap().success());
        for forwarding in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
            fs::write(format!("/proc/sys/net/{forwarding}"), "0").unwrap();
        }
        let options = Options { interface_prefixes: vec!["cali".into(), "tap".into()], ..Options::default() };
        let name: Name = "tap1.x".into();
        let configure = || {
            let mut driver = Sysctls::new(&options);
            let start = driver.start(Instant::now());
            driver.want_link(&name, Some(LinkState { index: 2, up: true, generation: 0 }));
            let sync = driver.sync(Instant::now());
            assert_eq!([start.errors, sync.errors].concat(), Vec::<String>::new());
            start.writes + sync.writes
        };
        assert!(configure() > 0);
        let expected = [
            ("ipv4/ip_forward", "1"),
            ("ipv6/conf/all/forwarding", "1"),
            ("ipv6/conf/tap1.x/accept_ra", "0"),
            ("ipv4/conf/tap1.x/route_localnet", "1"),
            ("ipv4/neigh/tap1.x/proxy_delay", "0"),
            ("ipv4/conf/tap1.x/proxy_arp", "1"),
            ("ipv4/conf/tap1.x/forwarding", "1"),
            ("ipv6/conf/tap1.x/proxy_ndp", "1"),
            ("ipv6/conf/tap1.x/forwarding", "1"),
        ];
        for (path, expected) in expected {
            assert_eq!(value(path), expected, "{path}");
        }
        assert_eq!(value("ipv4/conf/tap1.x/rp_filter"), value("ipv4/conf/default/rp_filter"));
        assert_eq!(configure(), 0);
    });
}

/// A kernel without IPv6 has no `/proc/sys/net/ipv6`. With IPv6 support off, which the agent sees to there, everything
/// that there is is configured, nothing fails and nothing waits for what will never come.
#[test]
fn a_host_without_settings_of_ipv6_is_configured_for_ipv4() {
    testkit::kernel_test!();
    in_new_netns(|| {
        let ip = Command::new("ip").args(["link", "add", "tap1", "type", "veth", "peer", "name", "p1"]).status();
        assert!(ip.unwrap().success());
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("net")).unwrap();
        for part in ["ipv4", "netfilter"] {
            std::os::unix::fs::symlink(format!("/proc/sys/net/{part}"), root.path().join("net").join(part)).unwrap();
        }
        let ipv6_before = value("ipv6/conf/tap1/accept_ra");
        assert_eq!((value("ipv4/conf/tap1/proxy_arp"), ipv6_before.as_str()), ("0".to_owned(), "1"));
        let options = Options {
            ipv6: false,
            interface_prefixes: vec!["tap".into()],
            sysctl_root: root.path().to_owned(),
            ..Options::default()
        };
        let mut driver = Sysctls::new(&options);
        let start = driver.start(Instant::now());
        driver.want_link(&"tap1".into(), Some(LinkState { index: 2, up: true, generation: 0 }));
        let sync = driver.sync(Instant::now());
        assert_eq!([start.errors, sync.errors].concat(), Vec::<String>::new());
        assert_eq!((sync.waiting, driver.pending().count(), driver.next_due()), (None, 0, None));
        for path in ["ipv4/ip_forward", "ipv4/conf/tap1/proxy_arp", "ipv4/conf/tap1/forwarding"] {
            assert_eq!(value(path), "1", "{path}");
        }
        assert_eq!(value("ipv6/conf/tap1/accept_ra"), ipv6_before);
    });
}
