//! Values that cannot be used: each is named in one clear log line, what depends on it is closed, and everything else
//! converges (I2, I8).
//!
//! One family: a value is bad before anything is made of it for a family.
#![allow(clippy::unwrap_used, reason = "a test that meets something unexpected fails")]

use std::time::{Duration, Instant};

use felix_tests::agent::{Agent, Variant, end_to_end};
use felix_tests::bed::{Bed, Host, Place, Vm};
use felix_tests::data::{self, Content, Event, PORTS_UP, SG_B, content, edit, policy_key};
use felix_tests::table::{Probe, Row, become_as_expected, cut_off, table};
use model::Family;
use serde_json::json;
use testkit::packets::Outcome;

const PATIENCE: Duration = Duration::from_secs(15);

#[test]
fn bad_values_are_named_and_closed_and_nothing_else_suffers_legacy() {
    survive(Variant::Legacy);
}

#[test]
fn bad_values_are_named_and_closed_and_nothing_else_suffers_nft() {
    survive(Variant::Nft);
}

/// One bad value, and what it means.
struct Case {
    what: &'static str,
    write: Event,
    /// What the log line must name.
    names: String,
    /// What it must be about: the hosts whose agents have to tell.
    tell: &'static [Host],
    /// The table as it has to be then.
    rows: Vec<Row>,
}

fn survive(variant: Variant) {
    if !end_to_end() {
        return;
    }
    let good = content(PORTS_UP).unwrap();
    let bed = Bed::new(&good).unwrap();
    bed.store().load(&good).unwrap();
    let mut agents = Host::BOTH.map(|host| (host, bed.start_agent(host, variant).unwrap()));
    become_as_expected(&bed, Family::V4, &table(), PATIENCE).unwrap();
    for case in cases(&good) {
        let before = agents.each_ref().map(|(_, agent)| agent.log().unwrap().len());
        bed.store().apply(&case.write).unwrap();
        if let Err(error) = become_as_expected(&bed, Family::V4, &case.rows, PATIENCE) {
            panic!("{} with {variant:?}: {error:#}\n{}", case.what, agents[0].1.log().unwrap());
        }
        for ((host, agent), before) in agents.iter_mut().zip(before) {
            if case.tell.contains(host) {
                let lines = complaints(agent, before, &case.names);
                assert_eq!(lines.len(), 1, "{} on {}: {lines:#?}\n{}", case.what, host.name(), agent.log().unwrap());
            }
            assert!(agent.is_running().unwrap(), "{}: {}", case.what, agent.log().unwrap());
        }
        // Back to what is right: that it was bad must not matter any more.
        let (Event::Put(key, _) | Event::Delete(key)) = &case.write;
        bed.store().put(key, &good[key]).unwrap();
        become_as_expected(&bed, Family::V4, &table(), PATIENCE).unwrap_or_else(|error| {
            panic!("after {} with {variant:?}: {error:#}\n{}", case.what, agents[0].1.log().unwrap())
        });
    }
    for (_, agent) in agents {
        agent.stop().unwrap();
    }
}

/// Waits for and returns the warnings and errors since `offset` that name `name`.
fn complaints(agent: &Agent, offset: usize, name: &str) -> Vec<String> {
    let deadline = Instant::now() + Duration::from_secs(2);
    loop {
        let log = agent.log().unwrap();
        let lines = log[offset..].lines().filter(|line| line.contains("WARN") || line.contains("ERROR"));
        let named: Vec<String> = lines.filter(|line| line.contains(name)).map(str::to_owned).collect();
        if !named.is_empty() || Instant::now() > deadline {
            return named;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn cases(good: &Content) -> Vec<Case> {
    let b1 =
        data::machines(good).into_iter().find(|machine| machine.addresses.contains(&Vm::B1.address().into())).unwrap();
    let group = policy_key(SG_B);
    let policy_name = format!("ossg.default.{SG_B}");
    let bad_policy = |change: &dyn Fn(&mut serde_json::Value)| {
        let value = edit(&good[&group], |object| {
            change(object);
            Ok(())
        });
        Event::Put(group.clone(), value.unwrap())
    };
    vec![
        Case {
            what: "an endpoint that is no JSON",
            write: Event::Put(b1.key.clone(), "{not json".to_owned()),
            names: b1.key.clone(),
            tell: &[Host::Compute1],
            rows: closed(&[Vm::B1]),
        },
        Case {
            what: "an endpoint with a bad address",
            write: Event::Put(b1.key.clone(), good[&b1.key].replace("10.65.0.21/32", "10.65.0.321/32")),
            names: b1.key.clone(),
            tell: &[Host::Compute1],
            rows: closed(&[Vm::B1]),
        },
        Case {
            what: "a policy that is no JSON",
            write: Event::Put(group.clone(), "[1, 2".to_owned()),
            names: group.clone(),
            tell: &Host::BOTH,
            rows: closed(&[Vm::B1, Vm::B2]),
        },
        Case {
            what: "a policy whose selector does not parse",
            write: bad_policy(&|object| object["spec"]["selector"] = json!("has(")),
            names: group.clone(),
            tell: &Host::BOTH,
            rows: closed(&[Vm::B1, Vm::B2]),
        },
        Case {
            what: "a rule with a selector that does not parse",
            write: bad_policy(&|object| object["spec"]["ingress"][0]["source"]["selector"] = json!("a == ")),
            names: group.clone(),
            tell: &Host::BOTH,
            rows: closed(&[Vm::B1, Vm::B2]),
        },
        Case {
            what: "a rule that allows what the kernel cannot express",
            write: bad_policy(&|object| {
                // An ICMP type of TCP packets (netfilter.md 10.7): the rule goes, the others stay.
                object["spec"]["ingress"][0]["protocol"] = json!(6);
                object["spec"]["ingress"][0]["icmp"] = json!({"type": 8});
            }),
            names: policy_name.clone(),
            tell: &Host::BOTH,
            rows: without_ping_of_sg_b(),
        },
        Case {
            what: "a rule that denies what the kernel cannot express",
            write: bad_policy(&|object| {
                // An ICMP type of TCP packets (netfilter.md 10.7): what is left denies all of TCP, more and not less.
                let deny = json!({"action": "Deny", "ipVersion": 4, "protocol": 6, "icmp": {"type": 8}});
                object["spec"]["ingress"].as_array_mut().unwrap().insert(0, deny);
            }),
            names: policy_name,
            tell: &Host::BOTH,
            rows: without_tcp_to_sg_b(),
        },
        Case {
            what: "a rule with ports of a protocol that has none",
            write: bad_policy(&|object| {
                let allow =
                    json!({"action": "Allow", "ipVersion": 4, "protocol": "ICMP", "destination": {"ports": [80]}});
                object["spec"]["ingress"].as_array_mut().unwrap().insert(0, allow);
            }),
            names: group.clone(),
            tell: &Host::BOTH,
            rows: closed(&[Vm::B1, Vm::B2]),
        },
    ]
}

/// Returns the table with these machines cut off from everything that passes their interfaces.
fn closed(machines: &[Vm]) -> Vec<Row> {
    cut_off(table(), machines)
}

/// Returns the table without the pings that group sg-b allows.
fn without_ping_of_sg_b() -> Vec<Row> {
    let close = |mut row: Row| {
        if row.probe == Probe::Echo && matches!(row.to, Place::Vm(Vm::B1 | Vm::B2)) {
            row.expected = Outcome::Drop.into();
        }
        row
    };
    table().into_iter().map(close).collect()
}

/// Returns the table without the TCP connections that group sg-b allows.
fn without_tcp_to_sg_b() -> Vec<Row> {
    let close = |mut row: Row| {
        if row.probe == Probe::Tcp(22) && matches!(row.to, Place::Vm(Vm::B1 | Vm::B2)) {
            row.expected = Outcome::Drop.into();
        }
        row
    };
    table().into_iter().map(close).collect()
}
