//! A restart with nothing changed: writes nothing, loses no packet of a 1 ms stream and lets no forbidden one through
//! (I5).
#![allow(clippy::unwrap_used, reason = "a test that meets something unexpected fails")]

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use felix_tests::agent::{Agent, Start, Variant, end_to_end};
use felix_tests::bed::{Bed, Host, Place, Vm};
use felix_tests::data::{PORTS_UP, content, dual_stack};
use felix_tests::kernel::Kernel;
use felix_tests::stream::{Stream, lost};
use felix_tests::table::{become_as_expected, table};
use felix_tests::watch::{Notifications, Wrappers};
use model::Family;
use testkit::packets::Sniffer;

const PATIENCE: Duration = Duration::from_secs(15);

#[test]
fn a_restart_writes_nothing_loses_nothing_and_leaks_nothing_legacy() {
    restart(Variant::Legacy);
}

#[test]
fn a_restart_writes_nothing_loses_nothing_and_leaks_nothing_nft() {
    restart(Variant::Nft);
}

fn restart(variant: Variant) {
    if !end_to_end() {
        return;
    }
    let content = dual_stack(&content(PORTS_UP).unwrap()).unwrap();
    let bed = Bed::new(&content).unwrap();
    bed.store().load(&content).unwrap();
    let [first, _second] = Host::BOTH.map(|host| bed.start_agent(host, variant).unwrap());
    for family in Family::BOTH {
        become_as_expected(&bed, family, &table(), PATIENCE).unwrap();
    }

    let host = bed.host(Host::Compute1);
    let before = Kernel::read(host, variant).unwrap();
    let wrappers = Wrappers::new().unwrap();
    let notifications = Notifications::start(host).unwrap();
    let traffic = Traffic::start(&bed);

    first.stop().unwrap();
    let path = wrappers.path();
    let again = Agent::start(&Start { path_prefix: Some(&path), ..bed.agent(Host::Compute1, variant) }).unwrap();
    let line = wait_for_batch(&again);
    // What it does of its own accord after the first batch belongs to the restart.
    traffic.run_for(Duration::from_secs(2));

    let (losses, leaks) = traffic.finish();
    let notifications = notifications.finish().unwrap();
    let after = Kernel::read(host, variant).unwrap();
    let log = again.stop().unwrap();
    assert_eq!(losses, [""; 0], "{log}");
    assert_eq!(leaks, [""; 0], "{log}");
    assert_eq!(wrappers.writes(host).unwrap(), [""; 0], "{log}");
    assert_eq!(notifications, [""; 0], "{log}");
    assert_eq!(before.differences(&after), [""; 0], "{log}");
    assert_eq!(before.seeds(), after.seeds(), "{log}");
    assert!(line.contains("writes=0"), "{line}\n{log}");
    // The wrappers have been used at all.
    let saves = format!("{}-save", variant.word());
    assert!(!wrappers.calls(host).unwrap().is_empty(), "no call of a tool, not even {saves}:\n{log}");
}

/// Waits for the agent's first batch and returns its log line.
fn wait_for_batch(agent: &Agent) -> String {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let log = agent.log().unwrap();
        if let Some(line) = log.lines().find(|line| line.contains("batch applied")) {
            return line.to_owned();
        }
        assert!(Instant::now() < deadline, "no batch applied:\n{log}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Streams that must pass, streams that must not, and a session.
struct Traffic {
    allowed: Vec<(String, Stream)>,
    forbidden: Vec<(String, Stream, Sniffer)>,
    session: TcpStream,
}

impl Traffic {
    fn start(bed: &Bed) -> Self {
        let mut traffic = Self { allowed: Vec::new(), forbidden: Vec::new(), session: session(bed) };
        for family in Family::BOTH {
            // Rows 1 to 4 pass compute-1; rows 5 and 8 are to be dropped by it.
            for (from, to) in [(Vm::A1, Vm::A2), (Vm::A2, Vm::A1), (Vm::B1, Vm::B2), (Vm::B2, Vm::B1)] {
                let address = bed.address(Place::Vm(to), family).unwrap();
                let stream = Stream::start(bed.machine(from).1, address).unwrap();
                traffic.allowed.push((format!("{} -> {} {family}", from.name(), to.name()), stream));
            }
            for (from, to) in [(Vm::A1, Vm::B1), (Vm::B2, Vm::A1)] {
                let address = bed.address(Place::Vm(to), family).unwrap();
                let sniffer = bed.machine(to).1.enter(|| Sniffer::open("eth0").unwrap());
                let stream = Stream::start(bed.machine(from).1, address).unwrap();
                traffic.forbidden.push((format!("{} -> {} {family}", from.name(), to.name()), stream, sniffer));
            }
        }
        traffic.run_for(Duration::from_millis(500));
        traffic
    }

    /// Lets the streams run, and keeps the session busy.
    fn run_for(&self, duration: Duration) {
        let end = Instant::now() + duration;
        while Instant::now() < end {
            let mut heard = [0; 4];
            (&self.session).write_all(b"ping").unwrap();
            (&self.session).read_exact(&mut heard).unwrap();
            assert_eq!(&heard, b"ping");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Returns what was lost and what leaked.
    fn finish(self) -> (Vec<String>, Vec<String>) {
        let (mut losses, mut leaks) = (Vec::new(), Vec::new());
        for (name, stream) in self.allowed {
            let log = stream.finish().unwrap();
            assert!(log.len() > 500, "{name}: only {} packets", log.len());
            if lost(&log) > 0 {
                losses.push(format!("{name}: {} of {} lost", lost(&log), log.len()));
            }
        }
        for (name, stream, sniffer) in self.forbidden {
            let token = stream.token();
            let log = stream.finish().unwrap();
            assert!(log.len() > 500, "{name}: only {} packets", log.len());
            if lost(&log) != log.len() || sniffer.sees(&token, Duration::from_millis(1)).unwrap() {
                let start = log[0].at;
                let when: Vec<String> = log
                    .iter()
                    .enumerate()
                    .filter_map(|(number, sent)| Some((number, sent.at, sent.answered?)))
                    .map(|(number, at, answered)| format!("#{number} at {:?} after {:?}", at - start, answered - at))
                    .collect();
                leaks.push(format!("{name}: {} of {} answered: {}", when.len(), log.len(), when.join(", ")));
            }
        }
        (losses, leaks)
    }
}

/// Opens a session that the rules allow.
fn session(bed: &Bed) -> TcpStream {
    let address = bed.address(Place::Vm(Vm::A1), Family::V4).unwrap();
    let session = bed.machine(Vm::B2).1.enter(|| TcpStream::connect((address, 22)).unwrap());
    session.set_read_timeout(Some(PATIENCE)).unwrap();
    session
}
