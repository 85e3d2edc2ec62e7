//! The datastore against a real etcd server.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::time::{Duration, Instant};

use datastore::{RESOURCES, SyncState};
use model::Update;
use serde_json::json;
use support::{Follower, Log, Mode, Proxy, options, tier, tier_value};
use testkit::etcd::Etcd;

const SMALL_PAGES: i64 = 10;

#[tokio::test]
async fn all_pages_are_delivered_before_in_sync() {
    let Some(etcd) = Etcd::for_test() else { return };
    etcd.put_all((0..35).map(|n| (tier(&format!("t{n:02}")), tier_value(n)))).unwrap();
    etcd.put(&format!("{RESOURCES}unheard-of/x"), "{}").unwrap();
    etcd.put("/calico/felix/v2/no-region/host/h/status", "{}").unwrap();

    let mut follower = Follower::start(options([etcd.endpoint()]), SMALL_PAGES).await;
    follower.until("in sync", |seen| seen.states.len() == 3).await;
    assert_eq!(follower.seen.states, [SyncState::WaitForReady, SyncState::Resync, SyncState::InSync]);
    assert_eq!(follower.seen.tiers.len(), 35);
    assert_eq!(follower.seen.tiers.get("t34"), Some(&34.0));
    assert_eq!(follower.seen.updates_of_tiers, 35);
    let unstored =
        |update: &Update| matches!(update, Update::ProfileLabels(name, _) if &**name == "projectcalico-default-allow");
    assert_eq!(follower.seen.others.iter().filter(|update| unstored(update)).count(), 1);
}

#[tokio::test]
async fn h_10_changes_are_followed_and_a_damaged_value_is_absent_until_it_is_mended() {
    let Some(etcd) = Etcd::for_test() else { return };
    etcd.put(&tier("a"), &tier_value(1)).unwrap();
    let mut follower = Follower::start(options([etcd.endpoint()]), SMALL_PAGES).await;
    follower.until("in sync", |seen| seen.is_in_sync()).await;

    etcd.put(&tier("a"), "no json").unwrap();
    follower.until("the damaged tier is gone", |seen| seen.tiers.is_empty()).await;
    // A damaged value right after a deletion wedged the reference (H-10).
    etcd.put(&tier("b"), &tier_value(2)).unwrap();
    etcd.delete(&tier("b")).unwrap();
    etcd.put(&tier("c"), "[]").unwrap();
    etcd.put(&tier("d"), &tier_value(4)).unwrap();
    follower.until("what follows damaged values", |seen| seen.tiers.contains_key("d")).await;
    assert_eq!(follower.seen.tiers.len(), 1);

    etcd.put(&tier("a"), &tier_value(5)).unwrap();
    follower.until("the mended tier", |seen| seen.tiers.get("a") == Some(&5.0)).await;
    etcd.delete_prefix(&tier("")).unwrap();
    follower.until("all are gone", |seen| seen.tiers.is_empty()).await;
    assert_eq!(follower.seen.states.len(), 3, "{:?}", follower.seen.states);
}

#[tokio::test]
async fn a_restart_of_etcd_is_survived_without_listing_or_repeating() {
    let Some(mut etcd) = Etcd::for_test() else { return };
    etcd.put_all((0..25).map(|n| (tier(&format!("t{n}")), tier_value(n)))).unwrap();
    let mut follower = Follower::start(options([etcd.endpoint()]), SMALL_PAGES).await;
    follower.until("in sync", |seen| seen.is_in_sync()).await;

    etcd.kill();
    follower.settle(Duration::from_secs(1)).await;
    assert_eq!(follower.seen.tiers.len(), 25, "what was delivered stays in force");
    etcd.restart().unwrap();
    etcd.put(&tier("new"), &tier_value(99)).unwrap();
    etcd.delete(&tier("t0")).unwrap();
    follower.until("changes after the restart", |seen| !seen.tiers.contains_key("t0")).await;
    assert_eq!(follower.seen.tiers.len(), 25);
    assert_eq!(follower.seen.updates_of_tiers, 27, "nothing is repeated");
    assert_eq!(follower.seen.states.len(), 3, "{:?}", follower.seen.states);
}

#[tokio::test]
async fn compaction_while_disconnected_leads_to_a_list_applied_as_a_difference() {
    let Some(etcd) = Etcd::for_test() else { return };
    etcd.put_all((0..25).map(|n| (tier(&format!("t{n:02}")), tier_value(n)))).unwrap();
    let proxy = Proxy::start(&etcd.endpoint()).await;
    let mut follower = Follower::start(options([proxy.endpoint()]), SMALL_PAGES).await;
    follower.until("in sync", |seen| seen.is_in_sync()).await;

    proxy.set(Mode::Cut);
    etcd.put(&tier("t03"), &tier_value(103)).unwrap();
    etcd.put(&tier("new"), &tier_value(99)).unwrap();
    let last = etcd.delete(&tier("t24")).unwrap();
    etcd.compact(last).unwrap();
    proxy.set(Mode::Open);

    follower.until("in sync again", |seen| seen.states.len() == 5).await;
    assert_eq!(follower.seen.states[3..], [SyncState::Resync, SyncState::InSync]);
    assert_eq!(follower.seen.tiers.len(), 25);
    assert_eq!(follower.seen.tiers.get("t03"), Some(&103.0));
    assert!(!follower.seen.tiers.contains_key("t24"));
    assert_eq!(follower.seen.updates_of_tiers, 25 + 3, "only the difference is delivered");
    etcd.put(&tier("later"), &tier_value(7)).unwrap();
    follower.until("the watch goes on", |seen| seen.tiers.contains_key("later")).await;
}

/// S-20 and S-21: exactly the revision that was handled last is compacted.
#[tokio::test]
async fn compaction_of_what_was_handled_needs_no_list() {
    let Some(etcd) = Etcd::for_test() else { return };
    etcd.put_all((0..5).map(|n| (tier(&format!("t{n}")), tier_value(n)))).unwrap();
    let last = etcd.delete(&tier("t4")).unwrap();
    let proxy = Proxy::start(&etcd.endpoint()).await;
    let mut follower = Follower::start(options([proxy.endpoint()]), SMALL_PAGES).await;
    follower.until("in sync", |seen| seen.is_in_sync()).await;
    proxy.set(Mode::Cut);
    etcd.compact(last).unwrap();
    etcd.delete(&tier("t3")).unwrap();
    proxy.set(Mode::Open);
    follower.until("the deletion", |seen| seen.tiers.len() == 3).await;
    assert_eq!(follower.seen.states.len(), 3, "{:?}", follower.seen.states);
}

#[tokio::test]
async fn a_cluster_that_was_lost_and_begins_anew_is_read_anew() {
    let Some(mut etcd) = Etcd::for_test() else { return };
    etcd.put_all([(tier("a"), tier_value(1)), (tier("b"), tier_value(2))]).unwrap();
    etcd.put(&tier("c"), &tier_value(3)).unwrap();
    let mut follower = Follower::start(options([etcd.endpoint()]), SMALL_PAGES).await;
    follower.until("in sync", |seen| seen.is_in_sync()).await;
    // The key gets the revision that it had before, and another value.
    etcd.restart_empty().unwrap();
    etcd.put(&tier("a"), &tier_value(11)).unwrap();
    follower
        .until("the new store", |seen| seen.is_in_sync() && seen.tiers.get("a") == Some(&11.0) && seen.tiers.len() == 1)
        .await;
}

/// Larger than what gRPC libraries accept by default, in a page as well as in a replayed watch (E3, E4, S-24).
#[tokio::test]
async fn large_answers_are_read() {
    let Some(etcd) = Etcd::for_test() else { return };
    let padding = "y".repeat(1_000_000);
    let large = |n: u32| json!({"metadata": {"annotations": {"x": padding}}, "spec": {"order": n}}).to_string();
    for n in 0..6 {
        etcd.put(&tier(&format!("t{n}")), &large(n)).unwrap();
    }
    let proxy = Proxy::start(&etcd.endpoint()).await;
    let mut follower = Follower::start(options([proxy.endpoint()]), 5_000).await;
    follower.until("in sync", |seen| seen.is_in_sync()).await;
    assert_eq!(follower.seen.tiers.len(), 6);
    proxy.set(Mode::Cut);
    for n in 6..16 {
        etcd.put(&tier(&format!("t{n}")), &large(n)).unwrap();
    }
    proxy.set(Mode::Open);
    follower.until("the replay", |seen| seen.tiers.len() == 16).await;
    assert_eq!(follower.seen.states.len(), 3, "{:?}", follower.seen.states);
    assert_eq!(follower.seen.updates_of_tiers, 16);
}

/// A frozen server keeps its connections open; only keep-alive finds out (E12).
#[tokio::test]
async fn a_frozen_etcd_is_given_up_and_found_again() {
    let Some(etcd) = Etcd::for_test_with(None, &["--grpc-keepalive-min-time=100ms"]) else { return };
    etcd.put(&tier("a"), &tier_value(1)).unwrap();
    let proxy = Proxy::start(&etcd.endpoint()).await;
    let mut follower = Follower::start(options([proxy.endpoint()]), SMALL_PAGES).await;
    follower.until("in sync", |seen| seen.is_in_sync()).await;
    follower.settle(Duration::from_secs(1)).await;
    let before = proxy.connections();

    etcd.freeze().unwrap();
    let frozen = Instant::now();
    while proxy.connections() == before {
        assert!(frozen.elapsed() < Duration::from_secs(20), "a frozen etcd is not noticed");
        follower.settle(Duration::from_millis(50)).await;
    }
    assert_eq!(follower.seen.tiers.len(), 1, "what was delivered stays in force");
    etcd.thaw().unwrap();
    etcd.put(&tier("b"), &tier_value(2)).unwrap();
    follower.until("changes after the thaw", |seen| seen.tiers.len() == 2).await;
    assert_eq!(follower.seen.updates_of_tiers, 2);
}

#[tokio::test]
async fn another_endpoint_takes_over_from_one_that_is_silent_or_dead() {
    let Some(etcd) = Etcd::for_test_with(None, &["--grpc-keepalive-min-time=100ms"]) else { return };
    etcd.put(&tier("a"), &tier_value(1)).unwrap();
    let proxy = Proxy::start(&etcd.endpoint()).await;
    // Nothing listens on the first.
    let dead = "http://127.0.0.1:9".to_owned();
    let mut follower = Follower::start(options([dead, proxy.endpoint(), etcd.endpoint()]), SMALL_PAGES).await;
    follower.until("in sync", |seen| seen.is_in_sync()).await;
    assert_eq!(proxy.connections(), 1, "the first that works is used");
    proxy.set(Mode::Silent);
    etcd.put(&tier("b"), &tier_value(2)).unwrap();
    follower.until("the change, from another endpoint", |seen| seen.tiers.len() == 2).await;
}

#[tokio::test]
async fn a_slow_reader_slows_the_datastore_and_loses_nothing() {
    let Some(etcd) = Etcd::for_test() else { return };
    etcd.put_all((0..3_000).map(|n| (tier(&format!("t{n}")), tier_value(n)))).unwrap();
    let mut follower = Follower::start(options([etcd.endpoint()]), 700).await;
    // Nothing is taken from the channel, which holds one message, while the store changes.
    tokio::time::sleep(Duration::from_millis(500)).await;
    etcd.put_all((0..3_000).map(|n| (tier(&format!("t{n}")), tier_value(n + 1)))).unwrap();
    etcd.delete_prefix(&tier("t29")).unwrap();
    // t29, t290 to t299 and t2900 to t2999 are gone.
    let is_new = |(name, order): (&String, &f64)| format!("t{}", order - 1.0) == *name;
    follower
        .until("all changes", |seen| {
            seen.is_in_sync() && seen.tiers.len() == 3_000 - 111 && seen.tiers.iter().all(is_new)
        })
        .await;
}

#[tokio::test]
async fn it_ends_when_nobody_listens() {
    let Some(etcd) = Etcd::for_test() else { return };
    let mut follower = Follower::start(options([etcd.endpoint()]), SMALL_PAGES).await;
    follower.until("in sync", |seen| seen.is_in_sync()).await;
    let task = follower.stop_listening();
    tokio::time::timeout(Duration::from_secs(5), task).await.expect("it ends").expect("without panic");
}

#[tokio::test]
async fn a_damaged_value_is_logged_once_for_each_change() {
    let (log, _guard) = Log::record();
    let Some(mut etcd) = Etcd::for_test() else { return };
    etcd.put(&tier("bad"), "no json").unwrap();
    let proxy = Proxy::start(&etcd.endpoint()).await;
    let mut follower = Follower::start(options([proxy.endpoint()]), SMALL_PAGES).await;
    follower.until("in sync", |seen| seen.is_in_sync()).await;
    let lines = log.lines_with("invalid resource treated as absent");
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert!(lines[0].contains(&format!("key={:?}", tier("bad"))) && lines[0].contains("reason="), "{lines:?}");

    // Neither a resumed watch nor a new list repeats it.
    etcd.restart().unwrap();
    etcd.put(&tier("a"), &tier_value(1)).unwrap();
    follower.until("the watch has resumed", |seen| seen.tiers.contains_key("a")).await;
    proxy.set(Mode::Cut);
    etcd.put(&tier("b"), &tier_value(1)).unwrap();
    etcd.compact(etcd.put(&tier("c"), &tier_value(1)).unwrap()).unwrap();
    proxy.set(Mode::Open);
    follower.until("a new list", |seen| seen.tiers.contains_key("b") && seen.is_in_sync()).await;
    assert_eq!(log.lines_with("invalid resource").len(), 1);

    etcd.put(&tier("bad"), "still no json").unwrap();
    etcd.put(&tier("d"), &tier_value(1)).unwrap();
    follower.until("a later change", |seen| seen.tiers.contains_key("d")).await;
    assert_eq!(log.lines_with("invalid resource").len(), 2);
}

#[tokio::test]
async fn an_outage_is_logged_once_with_its_end() {
    let (log, _guard) = Log::record();
    let Some(mut etcd) = Etcd::for_test() else { return };
    let mut follower = Follower::start(options([etcd.endpoint()]), SMALL_PAGES).await;
    follower.until("in sync", |seen| seen.is_in_sync()).await;
    etcd.kill();
    follower.settle(Duration::from_secs(5)).await;
    let problems = log.lines_with("retrying");
    assert!((1..=3).contains(&problems.len()), "each kind of problem once: {problems:?}");
    assert!(problems.iter().all(|line| line.contains(&etcd.endpoint())), "{problems:?}");
    etcd.restart().unwrap();
    etcd.put(&tier("a"), &tier_value(1)).unwrap();
    follower.until("the change", |seen| seen.tiers.contains_key("a")).await;
    assert_eq!(log.lines_with("etcd works again").len(), 1);
}
