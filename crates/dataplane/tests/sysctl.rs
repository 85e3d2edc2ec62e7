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
