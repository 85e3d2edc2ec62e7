//! Endpoints whose interface does not exist.
#![allow(clippy::unwrap_used, reason = "a test that meets something unexpected fails")]

use std::time::{Duration, Instant};

use felix_tests::agent::{Variant, end_to_end};
use felix_tests::solo::{Solo, ghosts};

const REPORT: &str = "in datastore, no interface";

/// How long an interface has to be absent.
const LIMIT: Duration = Duration::from_secs(600);

/// Bar U7.c: an endpoint in the datastore whose interface has been absent for more than ten minutes is reported, once, with
/// its key and its age; those that have their interfaces are not. With [`LIMIT`] as it is, that is for `make slow`, which
/// sets `FELIX_UNPLUGGED` to a time in seconds that is longer; the ordinary run, of a few seconds, sees that nothing is
/// said too early. The rules of this, with time that passes as the test wants, are tested beside the code.
#[test]
fn an_endpoint_whose_interface_is_absent_for_ten_minutes_is_reported_and_not_before() {
    if !end_to_end() {
        return;
    }
    let seconds = std::env::var("FELIX_UNPLUGGED").map_or(3, |text| text.parse().unwrap());
    let solo = Solo::new().unwrap();
    solo.store().put_all(ghosts(solo.content(), "compute-9", 3).unwrap()).unwrap();
    let agent = solo.start(&solo.agent(Variant::Nft)).unwrap();
    solo.store().put_all(ghosts(solo.content(), "compute-1", 1).unwrap()).unwrap();
    let began = Instant::now();
    let reports = || agent.log().unwrap().lines().filter(|line| line.contains(REPORT)).count();
    while began.elapsed() < Duration::from_secs(seconds) {
        let early = began.elapsed() < LIMIT;
        assert!(!early || reports() == 0, "{}", agent.log().unwrap());
        std::thread::sleep(Duration::from_millis(200));
    }
    if Duration::from_secs(seconds) > LIMIT {
        let log = agent.log().unwrap();
        let said: Vec<&str> = log.lines().filter(|line| line.contains(REPORT)).collect();
        assert_eq!(said.len(), 1, "{log}");
        for text in [" INFO ", "compute-1/openstack/", "ghost0000", "tapghost0000", "age=60"] {
            assert!(said[0].contains(text), "{text}: {}", said[0]);
        }
    }
    agent.stop().unwrap();
}
