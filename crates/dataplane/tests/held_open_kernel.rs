//! The restore program that is held open, against real kernels and tools, each in a network namespace of its own.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::time::Duration;

use dataplane::iptables::backend::TableTransport as _;
use dataplane::iptables::lock::XtablesLock;
use dataplane::iptables::variant::{Programs, search_path};
use dataplane::iptables::{Features, TableRequest, TableResponse, TableTools};
use dataplane::{Options, Variant};
use program::Family;
use testkit::netns::in_new_netns;

/// `iptables-legacy-restore --wait 10` (1.8.9) sets an alarm when it takes the lock. It rings ten seconds later, whatever
/// the program does then, and ends it: no transaction may be given to a program that is about to end.
#[test]
fn a_program_whose_alarm_is_about_to_ring_gets_no_transaction() {
    testkit::kernel_test!("iptables-legacy-restore", "ip6tables-legacy-restore", "iptables-nft-restore");
    std::thread::scope(|scope| {
        for (variant, family) in
            [(Variant::Legacy, Family::V4), (Variant::Legacy, Family::V6), (Variant::Nft, Family::V4)]
        {
            scope.spawn(move || in_new_netns(|| wait_and_write(variant, family)));
        }
    });
}

fn wait_and_write(variant: Variant, family: Family) {
    let directory = tempfile::tempdir().unwrap();
    let options = Options { lock_file: directory.path().join("lock"), ..Options::default() };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let programs = Programs::find(family, variant, &search_path()).unwrap();
    let lock = XtablesLock::new(options.lock_file.clone(), options.lock_probe);
    let mut tools = TableTools::new(family, variant, programs, &Features::default(), lock, &options);
    runtime.block_on(async {
        tools.try_to_hold_open().await;
        assert!(tools.holds_open());
        let mut write = async |input: &str| {
            let answer = tools.perform(&TableRequest::Restore(input.into())).await;
            assert!(matches!(answer, TableResponse::Done(_)), "{variant:?} {family:?} {answer:?}");
            children_here()
        };
        let first = write("*filter\n:cali-a - -\nCOMMIT\n").await;
        assert_eq!(first.len(), 1, "{first:?}");
        assert_eq!(write("*filter\n-A cali-a -j DROP\nCOMMIT\n").await, first, "at once: the same program");
        tokio::time::sleep(Duration::from_millis(8_300)).await;
        assert_eq!(children_here(), first, "it has not ended yet");
        let second = write("*filter\n-A cali-a -j RETURN\nCOMMIT\n").await;
        assert_eq!(second.len(), 1, "{second:?}");
        assert_eq!(second == first, variant == Variant::Nft);
    });
}

/// Processes in the network namespace of this thread, other than this one.
fn children_here() -> BTreeSet<u32> {
    let here = std::fs::read_link("/proc/thread-self/ns/net").unwrap();
    let numbers =
        std::fs::read_dir("/proc").unwrap().filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok());
    let is_here = |pid: &u32| std::fs::read_link(format!("/proc/{pid}/ns/net")).is_ok_and(|netns| netns == here);
    numbers.filter(|pid| *pid != std::process::id() && is_here(pid)).collect()
}
