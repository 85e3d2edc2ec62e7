//! Removal of tracked flows on the real kernel (host.md 10), with the table of a namespace filled by messages,
//! and counted by the kernel itself.
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "test code")]

use std::collections::BTreeSet;
use std::future::poll_fn;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use dataplane::conntrack::{Background, Transport as _, Walk};
use testkit::flows::Filler;
use testkit::netns::in_new_netns;

/// One flow from `original[0]` to `original[1]`, answered as `reply` says.
fn add(filler: &mut Filler, original: [&str; 2], reply: [&str; 2]) {
    let parse = |pair: [&str; 2]| pair.map(|text| text.parse::<IpAddr>().unwrap());
    filler.add(parse(original), parse(reply)).unwrap();
}

/// Flows of this thread's namespace.
fn count() -> u64 {
    testkit::flows::count().unwrap()
}

fn addresses(text: &str) -> BTreeSet<IpAddr> {
    text.split_whitespace().map(|text| text.parse().unwrap()).collect()
}

fn walk(transport: &mut Background, wanted: &BTreeSet<IpAddr>) -> Walk {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    transport.start(wanted);
    let ended = poll_fn(|context| transport.poll_end(context));
    runtime.block_on(async { tokio::time::timeout(Duration::from_secs(60), ended).await }).unwrap().unwrap()
}

#[test]
fn all_flows_of_the_departed_go_and_all_others_stay_in_both_families() {
    testkit::kernel_test!();
    in_new_netns(|| {
        let mut transport = Background::new(Duration::from_secs(10));
        let mut filler = Filler::new().unwrap();
        let flows = [
            (["10.65.0.2", "8.8.8.8"], ["8.8.8.8", "10.65.0.2"]),
            (["8.8.8.8", "10.65.0.2"], ["10.65.0.2", "8.8.8.8"]),
            // Through a floating IP, and from behind one.
            (["8.8.8.8", "192.0.2.2"], ["10.65.0.2", "8.8.8.8"]),
            (["10.65.0.2", "8.8.8.8"], ["8.8.8.8", "192.0.2.2"]),
            (["10.65.0.3", "8.8.8.8"], ["8.8.8.8", "10.65.0.3"]),
            (["fd10::2", "fd20::8"], ["fd20::8", "fd10::2"]),
            (["fd20::8", "fd10::2"], ["fd10::2", "fd20::8"]),
            (["fd10::3", "fd20::8"], ["fd20::8", "fd10::3"]),
        ];
        for (original, reply) in flows {
            add(&mut filler, original, reply);
        }
        filler.flush().unwrap();
        assert_eq!(count(), 8);
        let walked = walk(&mut transport, &addresses("10.65.0.99 fd10::99"));
        assert_eq!((walked.seen, walked.removed, count()), (8, 0, 8));
        let walked = walk(&mut transport, &addresses("192.0.2.2"));
        assert_eq!((walked.seen, walked.removed, count()), (5, 2, 6), "one family is asked for; {walked:?}");
        let walked = walk(&mut transport, &addresses("10.65.0.2 fd10::2"));
        assert_eq!((walked.removed, count()), (4, 2));
        let walked = walk(&mut transport, &addresses("10.65.0.3 fd10::3"));
        assert_eq!((walked.removed, count()), (2, 0));
    });
}

/// U14.c: a hundred addresses leave a host with 200,000 flows. One walk removes exactly theirs; the thread that
/// asked for it is free meanwhile.
#[test]
fn a_hundred_addresses_cost_one_walk_over_two_hundred_thousand_flows() {
    // One family: there is one table for both, and the walk is what is measured.
    const FLOWS: u32 = 200_000;
    testkit::kernel_test!();
    in_new_netns(|| {
        let mut transport = Background::new(Duration::from_secs(30));
        let mut filler = Filler::new().unwrap();
        let server: IpAddr = "8.8.8.8".parse().unwrap();
        let client = |n: u32| IpAddr::from(std::net::Ipv4Addr::from(0x0a41_0000 + n % 2000));
        let began = Instant::now();
        for n in 0..FLOWS {
            let own = client(n);
            filler.add([own, server], [server, own]).unwrap();
        }
        filler.flush().unwrap();
        let filled = began.elapsed();
        let present = count();
        assert!(present > u64::from(FLOWS) * 99 / 100, "{present}");
        let wanted: BTreeSet<IpAddr> = (0..100).map(client).collect();
        let began = Instant::now();
        transport.start(&wanted);
        let start = began.elapsed();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let ended = poll_fn(|context| transport.poll_end(context));
        let walked = runtime.block_on(async { tokio::time::timeout(Duration::from_secs(60), ended).await });
        let walked = walked.unwrap().unwrap();
        eprintln!("filled {present} in {filled:?}; start {start:?}, {walked:?}");
        assert_eq!(walked.seen, present, "one walk");
        assert_eq!((walked.removed, count()), (u64::from(FLOWS / 20), present - u64::from(FLOWS / 20)));
        // What is asked for on the apply thread; a machine under load may preempt it once.
        assert!(start < Duration::from_millis(100), "{start:?}");
    });
}
