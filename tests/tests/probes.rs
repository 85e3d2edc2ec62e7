//! The instrument before the measurement: without an agent every connection of the table is open, and the probes tell
//! silence from refusal. A table whose probes could not say "ok" would prove nothing with "drop".
#![allow(clippy::unwrap_used, reason = "a test that meets something unexpected fails")]

use felix_tests::bed::{Bed, Host};
use felix_tests::data::{PORTS_UP, content, dual_stack};
use felix_tests::stream::{Stream, lost};
use felix_tests::table::{Probe, Row, stay_as_expected, table};
use felix_tests::{agent, bed::Place, bed::Vm};
use model::Family;
use testkit::netns;
use testkit::packets::{Outcome, Sniffer};

#[test]
fn without_an_agent_everything_arrives_and_a_filter_by_hand_is_seen_as_what_it_is() {
    if !netns::require_root_and(agent::TOOLS) {
        return;
    }
    netns::cleanup().unwrap();
    let bed = Bed::new(&dual_stack(&content(PORTS_UP).unwrap()).unwrap()).unwrap();
    bed.open_by_hand().unwrap();
    let mut rows = table();
    for row in &mut rows {
        row.expected = Outcome::Ok.into();
    }
    for family in Family::BOTH {
        // The first packets resolve the neighbours.
        stay_as_expected(&bed, family, &rows).unwrap();
    }

    let passing: Vec<Row> = rows
        .into_iter()
        .filter(|row| {
            let between_machines = matches!((row.from, row.to), (Place::Vm(_), Place::Vm(_)));
            between_machines && !matches!(row.probe, Probe::ForgedSyn(..) | Probe::ForgedEcho(_))
        })
        .collect();
    for (target, expected) in [("DROP", Outcome::Drop), ("REJECT", Outcome::Refused)] {
        for host in Host::BOTH {
            for tool in ["iptables-legacy", "ip6tables-legacy"] {
                let rule = format!("{tool} -w -F FORWARD; {tool} -w -A FORWARD -i tap+ -j {target}");
                bed.host(host).sh(&rule).unwrap();
            }
        }
        let rows: Vec<Row> = passing.iter().map(|row| Row { expected: expected.into(), ..*row }).collect();
        for family in Family::BOTH {
            stay_as_expected(&bed, family, &rows).unwrap();
        }
    }
}

#[test]
fn a_stream_counts_what_a_filter_takes_out_of_it() {
    // One family: the stream is under test, not the agent.
    if !netns::require_root_and(agent::TOOLS) {
        return;
    }
    let bed = Bed::new(&content(PORTS_UP).unwrap()).unwrap();
    bed.open_by_hand().unwrap();
    let (a1, b1) = (bed.machine(Vm::A1).1, bed.machine(Vm::B1).1);
    let address = bed.address(Place::Vm(Vm::B1), Family::V4).unwrap();
    let sniffer = b1.enter(|| Sniffer::open("eth0").unwrap());
    let stream = Stream::start(a1, address).unwrap();
    while stream.so_far().len() < 100 {
        std::thread::yield_now();
    }
    assert!(sniffer.sees(&stream.token(), std::time::Duration::from_secs(1)).unwrap());
    let rule = "iptables-legacy -w -A FORWARD -i tap+ -m statistic --mode nth --every 2 --packet 0 -j DROP";
    bed.host(Host::Compute1).sh(rule).unwrap();
    while stream.so_far().len() < 300 {
        std::thread::yield_now();
    }
    let log = stream.finish().unwrap();
    assert_eq!(lost(&log[..90]), 0);
    assert!(lost(&log[150..]) > 50, "{} of {}", lost(&log[150..]), log.len());
}
