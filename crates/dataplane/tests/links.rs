//! The link monitor on a real kernel.
//!
//! One family: an interface has none.
#![allow(clippy::unwrap_used, reason = "test code")]

use std::collections::BTreeMap;
use std::process::Command;
use std::time::Duration;

use dataplane::Options;
use dataplane::links::{LinkEvent, LinkMonitor};
use model::{LinkState, Name};
use testkit::netns::in_new_netns;
use tokio::sync::mpsc;

fn sh(line: &str) {
    let output = Command::new("sh").args(["-ec", line]).output().unwrap();
    assert!(output.status.success(), "`{line}`: {}", String::from_utf8_lossy(&output.stderr));
}

/// A monitor and what it reported.
struct Watch {
    events: mpsc::Receiver<LinkEvent>,
}

impl Watch {
    fn start(options: &Options) -> Self {
        let (out, events) = mpsc::channel(16);
        let monitor = LinkMonitor::new(options);
        tokio::spawn(async move { monitor.run(out).await.unwrap() });
        Self { events }
    }

    async fn next(&mut self) -> LinkEvent {
        tokio::time::timeout(Duration::from_secs(10), self.events.recv()).await.unwrap().unwrap()
    }

    /// Waits until the interface has this state, and returns what was reported for it on the way.
    async fn until(&mut self, name: &str, up: Option<bool>) -> Vec<Option<LinkState>> {
        let mut seen = Vec::new();
        loop {
            if let LinkEvent::Changed(which, state) = self.next().await
                && &*which == name
            {
                seen.push(state);
                if state.map(|state| state.up) == up {
                    return seen;
                }
            }
        }
    }

    async fn in_sync(&mut self) -> Vec<(Name, Option<LinkState>)> {
        let mut seen = Vec::new();
        loop {
            match self.next().await {
                LinkEvent::Changed(name, state) => seen.push((name, state)),
                LinkEvent::InSync => return seen,
            }
        }
    }
}

fn run(test: impl AsyncFnOnce() + Send) {
    in_new_netns(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(test());
    });
}

#[test]
fn interfaces_are_listed_then_followed_through_their_life() {
    testkit::kernel_test!();
    run(async || {
        sh("ip link add tap0 type veth peer name p0; ip link set tap0 up; ip link set p0 up");
        // The kernel may take a second to say so.
        sh("until ip link show tap0 | grep -q 'state UP'; do sleep 0.01; done");
        let mut watch = Watch::start(&Options::default());
        let first = watch.in_sync().await;
        let state = |name: &str| first.iter().find(|(which, _)| &**which == name).and_then(|(_, state)| *state);
        assert!(state("lo").is_some() && state("tap0").unwrap().up, "{first:?}");
        assert_eq!(state("lo").unwrap().index, 1);

        sh("ip link add tap1 type veth peer name p1");
        let created = watch.until("tap1", Some(false)).await;
        assert_eq!(created.len(), 1);
        // Administratively up alone is not enough: the peer must be up too.
        sh("ip link set tap1 up; ip link set p1 up");
        let up = watch.until("tap1", Some(true)).await.pop().unwrap().unwrap();
        assert_eq!(up.index, created[0].unwrap().index);

        sh("ip link set p1 down");
        watch.until("tap1", Some(false)).await;
        sh("ip link set p1 up");
        assert!(watch.until("tap1", Some(true)).await[0].unwrap().generation > up.generation);

        sh("ip link set tap1 down; ip link set tap1 name tap2; ip link set tap2 up");
        assert_eq!(watch.until("tap1", None).await.last(), Some(&None));
        assert_eq!(watch.until("tap2", Some(true)).await.last().unwrap().unwrap().index, up.index);

        sh("ip link del tap2");
        watch.until("tap2", None).await;
    });
}

#[test]
fn a_port_that_leaves_its_bridge_stays_known() {
    testkit::kernel_test!();
    run(async || {
        sh(
            "ip link add br0 type bridge; ip link add tap0 type veth peer name p0; ip link set tap0 up; ip link set p0 up",
        );
        let mut watch = Watch::start(&Options::default());
        watch.in_sync().await;
        sh("ip link set tap0 master br0; ip link set tap0 nomaster; ip link add marker type bridge");
        loop {
            match watch.next().await {
                LinkEvent::Changed(name, state) if &*name == "tap0" => assert!(state.unwrap().up),
                LinkEvent::Changed(name, _) if &*name == "marker" => break,
                LinkEvent::Changed(..) | LinkEvent::InSync => (),
            }
        }
    });
}

#[test]
fn a_short_outage_reaches_even_those_who_see_only_the_last_state() {
    testkit::kernel_test!();
    run(async || {
        sh("ip link add tap0 type veth peer name p0; ip link set tap0 up; ip link set p0 up");
        let mut watch = Watch::start(&Options::default());
        let first = watch.in_sync().await;
        let before = first.iter().find(|(name, _)| &**name == "tap0").unwrap().1.unwrap();
        sh("ip link set tap0 down; ip link set tap0 up");
        let seen = watch.until("tap0", Some(false)).await;
        assert_eq!(seen.len(), 1);
        let after = watch.until("tap0", Some(true)).await.pop().unwrap().unwrap();
        assert!(after.generation > before.generation && after.index == before.index);
    });
}

#[test]
fn all_interfaces_are_listed_again_at_every_refresh() {
    testkit::kernel_test!();
    run(async || {
        let mut watch = Watch::start(&Options { link_refresh: Some(Duration::from_millis(20)), ..Options::default() });
        watch.in_sync().await;
        // Nothing changed, so nothing but the end of each list is reported.
        for _ in 0..3 {
            assert_eq!(watch.next().await, LinkEvent::InSync);
        }
    });
}

#[test]
fn thousands_of_changes_end_with_the_right_states() {
    testkit::kernel_test!();
    run(async || {
        let mut watch = Watch::start(&Options::default());
        watch.in_sync().await;
        // The receiver stays behind: nothing is read while these happen.
        sh("for n in $(seq 200); do echo link add tap$n type veth peer name p$n; echo link set tap$n up; echo link set p$n up; done | ip -batch -
            for n in $(seq 2 2 200); do echo link del tap$n; done | ip -batch -");
        let expected: BTreeMap<Name, bool> = (1..200)
            .step_by(2)
            .flat_map(|n| [(format!("tap{n}").into(), true), (format!("p{n}").into(), true)])
            .collect();
        let mut states = BTreeMap::new();
        // The kernel says only some time later that a carrier is there; `next` fails the test if it stays silent.
        while states != expected {
            match watch.next().await {
                LinkEvent::Changed(name, Some(state)) if name.starts_with("tap") || name.starts_with('p') => {
                    states.insert(name, state.up);
                }
                LinkEvent::Changed(name, None) => {
                    states.remove(&name);
                }
                LinkEvent::Changed(..) | LinkEvent::InSync => (),
            }
        }
    });
}

#[test]
fn the_monitor_ends_when_nobody_listens() {
    testkit::kernel_test!();
    run(async || {
        let (out, mut events) = mpsc::channel(1);
        let task = tokio::spawn(LinkMonitor::new(&Options::default()).run(out));
        events.recv().await.unwrap();
        drop(events);
        tokio::time::timeout(Duration::from_secs(10), task).await.unwrap().unwrap().unwrap();
    });
}
