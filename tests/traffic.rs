//! Traffic that must flow and probes that must not, all the time: what a restart, a crash or a rival is held against.
//!
//! Allowed and forbidden are streams of echo requests, one per millisecond, between the machines of the bed. What
//! arrives is counted by a rule in the namespace of the receiver, so that nothing is missed however busy this process
//! is; the counters count the allowed streams too, which proves that they can.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use model::Family;
use testkit::netns::Netns;

use crate::bed::{Bed, Place, Vm};
use crate::stream::{Stream, lost};

/// How long the session may take to answer.
const PATIENCE: Duration = Duration::from_secs(15);

/// From where to where a stream goes.
pub type Pair = (Vm, Vm);

/// Rows 1 to 4 of the acceptance table: they pass compute-1 in both directions.
pub const ALLOWED: &[Pair] = &[(Vm::A1, Vm::A2), (Vm::A2, Vm::A1), (Vm::B1, Vm::B2), (Vm::B2, Vm::B1)];
/// Rows 5 and 8: compute-1 has to drop them.
pub const FORBIDDEN: &[Pair] = &[(Vm::A1, Vm::B1), (Vm::B2, Vm::A1)];

/// See the [module documentation](self).
#[derive(Debug)]
pub struct Traffic<'a> {
    allowed: Vec<Flow<'a>>,
    forbidden: Vec<Flow<'a>>,
    session: TcpStream,
}

/// What became of the traffic; both lists are empty if all is well.
#[derive(Debug, Default)]
pub struct Outcome {
    /// The allowed streams that lost something.
    pub losses: Vec<String>,
    /// The forbidden streams of which something arrived.
    pub leaks: Vec<String>,
    /// How many packets were sent in all.
    pub packets: usize,
}

#[derive(Debug)]
struct Flow<'a> {
    name: String,
    stream: Stream,
    counter: Counter<'a>,
}

impl<'a> Traffic<'a> {
    /// Starts a session that the rules allow and streams in both families, and lets them run for half a second.
    ///
    /// # Errors
    ///
    /// If the session is refused or a stream cannot be started.
    pub fn start(bed: &'a Bed, allowed: &[Pair], forbidden: &[Pair]) -> Result<Self> {
        let flows = |pairs: &[Pair]| {
            let each = pairs.iter().flat_map(|pair| Family::BOTH.map(|family| (pair, family)));
            each.map(|((from, to), family)| Flow::start(bed, *from, *to, family)).collect::<Result<Vec<_>>>()
        };
        let session = session(bed)?;
        let traffic = Self { allowed: flows(allowed)?, forbidden: flows(forbidden)?, session };
        traffic.run_for(Duration::from_millis(500))?;
        Ok(traffic)
    }

    /// Lets the streams run, and keeps the session busy.
    ///
    /// # Errors
    ///
    /// If the session is cut.
    pub fn run_for(&self, duration: Duration) -> Result<()> {
        let end = Instant::now() + duration;
        loop {
            self.converse()?;
            if Instant::now() >= end {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Says something in the session and has it repeated.
    ///
    /// # Errors
    ///
    /// If the session is cut.
    pub fn converse(&self) -> Result<()> {
        let mut heard = [0; 4];
        (&self.session).write_all(b"ping").context("the session")?;
        (&self.session).read_exact(&mut heard).context("the session")?;
        ensure!(&heard == b"ping", "the session said {heard:?}");
        Ok(())
    }

    /// Ends the streams and returns what was lost and what leaked.
    ///
    /// # Errors
    ///
    /// If a stream failed, was too short to say anything, or was not counted.
    pub fn finish(self) -> Result<Outcome> {
        let mut outcome = Outcome::default();
        for Flow { name, stream, counter } in self.allowed {
            let log = stream.finish()?;
            outcome.packets += log.len();
            ensure!(log.len() > 500, "{name}: only {} packets", log.len());
            let answered = log.len() - lost(&log);
            ensure!(counter.read()? >= answered as u64, "{name}: the counter does not count what arrives");
            if lost(&log) > 0 {
                let start = log[0].at;
                let when = log.iter().filter(|sent| sent.answered.is_none()).map(|sent| sent.at - start);
                let when: Vec<String> = when.take(20).map(|at| format!("{at:?}")).collect();
                outcome.losses.push(format!("{name}: {} of {} lost: {}", lost(&log), log.len(), when.join(", ")));
            }
        }
        for Flow { name, stream, counter } in self.forbidden {
            let log = stream.finish()?;
            outcome.packets += log.len();
            ensure!(log.len() > 500, "{name}: only {} packets", log.len());
            let arrived = counter.read()?;
            let answered = log.len() - lost(&log);
            if arrived > 0 || answered > 0 {
                let start = log[0].at;
                let when = log.iter().filter(|sent| sent.answered.is_some()).map(|sent| sent.at - start);
                let when: Vec<String> = when.take(20).map(|at| format!("{at:?}")).collect();
                let when = when.join(", ");
                outcome.leaks.push(format!("{name}: of {} {arrived} arrived, {answered} answered: {when}", log.len()));
            }
        }
        Ok(outcome)
    }
}

impl<'a> Flow<'a> {
    fn start(bed: &'a Bed, from: Vm, to: Vm, family: Family) -> Result<Self> {
        let (source, destination) = (bed.address(Place::Vm(from), family)?, bed.address(Place::Vm(to), family)?);
        let counter = Counter::new(bed.machine(to).1, family, source)?;
        let stream = Stream::start(bed.machine(from).1, destination)?;
        Ok(Self { name: format!("{} -> {} {family}", from.name(), to.name()), stream, counter })
    }
}

/// A rule that counts the echo requests which come from an address.
#[derive(Debug)]
struct Counter<'a> {
    netns: &'a Netns,
    tool: &'static str,
    source: IpAddr,
}

impl<'a> Counter<'a> {
    fn new(netns: &'a Netns, family: Family, source: IpAddr) -> Result<Self> {
        let (tool, what) = match family {
            Family::V4 => ("iptables-legacy", "-p icmp --icmp-type echo-request"),
            Family::V6 => ("ip6tables-legacy", "-p icmpv6 --icmpv6-type echo-request"),
        };
        netns.sh(&format!("{tool} -w -t raw -A PREROUTING -s {source} {what}"))?;
        Ok(Self { netns, tool, source })
    }

    fn read(&self) -> Result<u64> {
        let rules = self.netns.exec(&[self.tool, "-w", "-t", "raw", "-nvxL", "PREROUTING"])?;
        let source = self.source.to_string();
        // An earlier traffic between the same two has counted in a rule of its own, which comes first.
        let line = rules.lines().rfind(|line| line.split_ascii_whitespace().any(|word| word == source));
        let count = line.and_then(|line| line.split_ascii_whitespace().next()).context("the rule that counts")?;
        Ok(count.parse()?)
    }
}

/// Opens a session that the rules allow.
fn session(bed: &Bed) -> Result<TcpStream> {
    let address = bed.address(Place::Vm(Vm::A1), Family::V4)?;
    let session = bed.machine(Vm::B2).1.enter(|| TcpStream::connect((address, 22)))?;
    session.set_read_timeout(Some(PATIENCE))?;
    Ok(session)
}
