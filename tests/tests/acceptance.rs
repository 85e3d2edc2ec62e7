//! The acceptance test of openstack.md 14: real Neutron data in a real etcd, one agent per compute host, real packets.
//!
//! Every row of the table and every follow-up that needs no NAT, with both variants of iptables and in both families.
//! IPv4 runs on exactly what Neutron wrote (`08-ports-up.json`); IPv6 on the same data made dual-stack as vector 21 is.
//! Row 63 (metadata) and the floating-IP follow-ups need the NAT table and are not in here.
#![allow(clippy::unwrap_used, reason = "a test that meets something unexpected fails")]

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::Duration;

use felix_tests::agent::{Agent, Variant, end_to_end};
use felix_tests::bed::{Bed, Host, Place, Vm};
use felix_tests::data::{self, Content, Event, PORTS_UP, content, dual_stack};
use felix_tests::kernel::{Kernel, wait_for};
use felix_tests::table::{Probe, Row, become_as_expected, cut_off, stay_as_expected, table};
use model::Family;
use testkit::packets::Outcome;

/// How long a change may take to show, with everything else that runs beside the test.
const PATIENCE: Duration = Duration::from_secs(15);

#[test]
fn legacy_ipv4() {
    accept(Variant::Legacy, Family::V4);
}

#[test]
fn legacy_ipv6() {
    accept(Variant::Legacy, Family::V6);
}

#[test]
fn nft_ipv4() {
    accept(Variant::Nft, Family::V4);
}

#[test]
fn nft_ipv6() {
    accept(Variant::Nft, Family::V6);
}

/// The bed with its agents and what etcd holds.
struct Run {
    bed: Bed,
    agents: [Agent; 2],
    content: Content,
    variant: Variant,
    family: Family,
}

fn accept(variant: Variant, family: Family) {
    if !end_to_end() {
        return;
    }
    let mut run = Run::start(variant, family);
    let rows = table();
    become_as_expected(&run.bed, family, &rows, PATIENCE).unwrap_or_else(|error| run.fail("the table", &error));

    run = run.agent_stopped_and_restarted(&rows);
    let rows = run.ssh_rule_replaced(rows);
    let rows = run.b1_moved_to_sg_a(rows);
    run.b2_deleted(rows);

    for agent in run.agents {
        agent.stop().unwrap();
    }
}

impl Run {
    fn start(variant: Variant, family: Family) -> Self {
        let content = match family {
            Family::V4 => content(PORTS_UP).unwrap(),
            Family::V6 => dual_stack(&content(PORTS_UP).unwrap()).unwrap(),
        };
        let bed = Bed::new(&content).unwrap();
        bed.store().load(&content).unwrap();
        let agents = Host::BOTH.map(|host| bed.start_agent(host, variant).unwrap());
        Self { bed, agents, content, variant, family }
    }

    /// Ends the test with what the agents have to say.
    fn fail(&self, what: &str, error: &anyhow::Error) -> ! {
        let logs: Vec<String> = self.agents.iter().map(|agent| agent.log().unwrap()).collect();
        panic!(
            "{what} ({:?} {}): {error:#}\n\nlog of compute-1:\n{}\nlog of compute-2:\n{}",
            self.variant, self.family, logs[0], logs[1]
        );
    }

    fn write(&mut self, event: Event) {
        self.bed.store().apply(&event).unwrap();
        match event {
            Event::Put(key, value) => self.content.insert(key, value),
            Event::Delete(key) => self.content.remove(&key),
        };
    }

    fn kernel(&self, host: Host) -> Kernel {
        Kernel::read(self.bed.host(host), self.variant).unwrap()
    }

    /// Follow-ups "agent stopped on compute-1" and "agent restarted".
    fn agent_stopped_and_restarted(self, rows: &[Row]) -> Self {
        let before = self.kernel(Host::Compute1);
        let Self { bed, agents: [first, second], content, variant, family } = self;
        first.stop().unwrap();
        stay_as_expected(&bed, family, rows).unwrap();

        // No new rules are applied on compute-1; compute-2 follows.
        let Event::Put(key, replaced) = data::ssh_rule_replaced(&content).unwrap() else {
            panic!("a rule is replaced by writing its group")
        };
        bed.store().put(&key, &replaced).unwrap();
        wait_for(bed.host(Host::Compute2), variant, "the replaced rule", |kernel| kernel.mentions("2222:2230"))
            .unwrap();
        assert_eq!(before.differences(&Kernel::read(bed.host(Host::Compute1), variant).unwrap()), [""; 0]);
        bed.store().put(&key, &content[&key]).unwrap();
        wait_for(bed.host(Host::Compute2), variant, "the old rule", |kernel| !kernel.mentions("2222:2230")).unwrap();

        let first = bed.start_agent(Host::Compute1, variant).unwrap();
        let run = Self { bed, agents: [first, second], content, variant, family };
        become_as_expected(&run.bed, family, rows, PATIENCE).unwrap_or_else(|error| run.fail("restarted", &error));
        assert_eq!(before.differences(&run.kernel(Host::Compute1)), [""; 0]);
        run
    }

    /// Follow-up "sg-a's SSH rule replaced by tcp 2222-2230 from 10.0.0.0/8": an open session stays.
    fn ssh_rule_replaced(&mut self, mut rows: Vec<Row>) -> Vec<Row> {
        let mut session = self.bed.machine(Vm::B1).1.enter(|| {
            let address = self.bed.address(Place::Vm(Vm::A1), self.family).unwrap();
            TcpStream::connect((address, 22)).unwrap()
        });
        session.set_read_timeout(Some(PATIENCE)).unwrap();
        converse(&mut session);

        self.write(data::ssh_rule_replaced(&self.content).unwrap());
        for row in &mut rows {
            // Rows 13-24 towards a1 and a2, row 49 from 203.0.113.9 and row 57 from 192.168.0.11.
            if row.probe == Probe::Tcp(22) && matches!(row.to, Place::Vm(Vm::A1 | Vm::A2)) {
                row.expected = Outcome::Drop.into();
            }
        }
        let (a1, b1) = (Place::Vm(Vm::A1), Place::Vm(Vm::B1));
        let additional = |number, from, expected: Outcome| Row {
            number,
            from,
            to: a1,
            probe: Probe::Tcp(2225),
            expected: expected.into(),
        };
        rows.push(additional(101, b1, Outcome::Ok));
        rows.push(additional(102, Place::Border, Outcome::Drop));
        become_as_expected(&self.bed, self.family, &rows, PATIENCE)
            .unwrap_or_else(|error| self.fail("SSH rule replaced", &error));
        converse(&mut session);
        rows
    }

    /// Follow-up "b1 moved to sg-a", whose rules are those that it has been given before.
    fn b1_moved_to_sg_a(&mut self, mut rows: Vec<Row>) -> Vec<Row> {
        let key = self.bed.machine(Vm::B1).0.key.clone();
        self.write(data::moved_to_sg_a(&self.content, &key).unwrap());
        let b1 = Place::Vm(Vm::B1);
        for row in &mut rows {
            let pair = (row.from, row.to, row.probe);
            row.expected = match pair {
                (Place::Vm(Vm::A1 | Vm::A2), to, Probe::Echo) if to == b1 => Outcome::Ok.into(),
                (from, Place::Vm(Vm::A1 | Vm::A2), Probe::Echo) if from == b1 => Outcome::Ok.into(),
                (Place::Vm(Vm::B2), to, Probe::Echo) if to == b1 => Outcome::Drop.into(),
                (from, Place::Vm(Vm::B2), Probe::Echo) if from == b1 => Outcome::Drop.into(),
                (_, to, Probe::Tcp(22)) if to == b1 => Outcome::Drop.into(),
                _ => row.expected,
            };
        }
        rows.push(Row {
            number: 103,
            from: Place::Vm(Vm::B2),
            to: b1,
            probe: Probe::Tcp(2225),
            expected: Outcome::Ok.into(),
        });
        become_as_expected(&self.bed, self.family, &rows, PATIENCE)
            .unwrap_or_else(|error| self.fail("b1 moved to sg-a", &error));
        rows
    }

    /// Follow-up "b2 deleted": nothing passes its interface, and no host has a route to it.
    fn b2_deleted(&mut self, rows: Vec<Row>) {
        let b2 = self.bed.machine(Vm::B2).0.clone();
        self.write(Event::Delete(b2.key.clone()));
        self.bed.withdraw(Vm::B2).unwrap();
        let address = b2.address(self.family).unwrap().to_string();
        // Neighbour entries go with the interface (host.md 11), settings likewise.
        let traces = |kernel: &Kernel| {
            let lines = [kernel.about(&b2.tap), kernel.about(&address)].concat();
            lines.iter().filter(|line| !line.starts_with("setting ") && !line.starts_with("neigh ")).count()
        };
        for host in Host::BOTH {
            wait_for(self.bed.host(host), self.variant, "no trace of b2", |kernel| traces(kernel) == 0)
                .unwrap_or_else(|error| self.fail("b2 deleted", &error));
        }

        let services = [(Place::Host(Host::Compute2), Probe::Tcp(22)), (Place::Border, Probe::Echo)];
        let outwards = (104..).zip(services).map(|(number, (to, probe))| {
            let expected = Outcome::Drop.into();
            Row { number, from: Place::Vm(Vm::B2), to, probe, expected }
        });
        let rows: Vec<Row> = cut_off(rows, &[Vm::B2]).into_iter().chain(outwards).collect();
        become_as_expected(&self.bed, self.family, &rows, PATIENCE)
            .unwrap_or_else(|error| self.fail("b2 deleted", &error));
    }
}

/// Says something in a session and has it repeated.
fn converse(session: &mut TcpStream) {
    let mut heard = [0; 5];
    session.write_all(b"hello").unwrap();
    session.read_exact(&mut heard).unwrap();
    assert_eq!(&heard, b"hello");
}
