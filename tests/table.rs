//! The acceptance table of openstack.md 14 as data, and what walks it.
//!
//! All rows are probed at once, each on a thread in the namespace that it starts from: a table takes about as long as
//! its slowest row. Row 63 (metadata) belongs to the NAT table, which the agent does not program; it is not in here.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use model::Family;
use testkit::frames;
use testkit::packets::{self, Outcome, Sniffer};

use crate::bed::{Bed, Host, Place, Vm};

/// How long an answer may take (openstack.md 14).
pub const LIMIT: Duration = Duration::from_secs(1);

/// What is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Probe {
    /// An ICMP or ICMPv6 echo request, answered by a reply.
    Echo,
    /// A TCP connection to this port.
    Tcp(u16),
    /// A datagram to this port, answered by an echo.
    Udp(u16),
    /// What a DHCP client without an address broadcasts, or what a DHCPv6 client multicasts; it has to arrive.
    Dhcp,
    /// A TCP SYN with the address of this machine as source; it has to arrive.
    ForgedSyn(Vm, u16),
    /// An echo request with the address of this machine as source; it has to arrive.
    ForgedEcho(Vm),
}

impl fmt::Display for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match self {
            Self::Echo => "icmp echo".to_owned(),
            Self::Tcp(port) => format!("tcp {port}"),
            Self::Udp(port) => format!("udp {port}"),
            Self::Dhcp => "dhcp discover".to_owned(),
            Self::ForgedSyn(vm, port) => format!("tcp {port} as {}", vm.name()),
            Self::ForgedEcho(vm) => format!("icmp echo as {}", vm.name()),
        };
        f.pad(&text)
    }
}

/// What has to become of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expected {
    /// Just this.
    Exactly(Outcome),
    /// Anything but an answer: the destination is cut off, and a router may say that it has no route.
    NoAnswer,
}

impl Expected {
    /// Returns whether `seen` is as expected.
    #[must_use]
    pub fn allows(self, seen: Outcome) -> bool {
        match self {
            Self::Exactly(outcome) => outcome == seen,
            Self::NoAnswer => seen != Outcome::Ok,
        }
    }
}

impl From<Outcome> for Expected {
    fn from(outcome: Outcome) -> Self {
        Self::Exactly(outcome)
    }
}

impl fmt::Display for Expected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exactly(outcome) => outcome.fmt(f),
            Self::NoAnswer => f.pad("none"),
        }
    }
}

/// One row of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// Its number in the specification.
    pub number: u16,
    /// Where the packet comes from.
    pub from: Place,
    /// Where it goes to.
    pub to: Place,
    /// What it is.
    pub probe: Probe,
    /// What has to become of it.
    pub expected: Expected,
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { number, from, to, probe, expected } = self;
        write!(f, "{number:>2}  {:<9} -> {:<9}  {probe:<16}  expected {expected:<4}", from.name(), to.name())
    }
}

/// Returns the whole table. It is the same for both families.
#[must_use]
pub fn table() -> Vec<Row> {
    use Outcome::{Drop, Ok};
    use Probe::{Dhcp, Echo, ForgedEcho, ForgedSyn, Tcp, Udp};
    const A1: Place = Place::Vm(Vm::A1);
    const B1: Place = Place::Vm(Vm::B1);
    const A2: Place = Place::Vm(Vm::A2);
    const B2: Place = Place::Vm(Vm::B2);
    const COMPUTE1: Place = Place::Host(Host::Compute1);
    const COMPUTE2: Place = Place::Host(Host::Compute2);
    const BORDER: Place = Place::Border;
    const GATEWAY: Place = Place::Gateway;

    let pairs: Vec<(Place, Place)> = Vm::ALL
        .iter()
        .flat_map(|from| Vm::ALL.iter().filter(move |to| *to != from).map(|to| (Place::Vm(*from), Place::Vm(*to))))
        .collect();
    let for_pairs =
        |probe, expected| pairs.iter().map(move |(from, to)| (*from, *to, probe, expected)).collect::<Vec<_>>();

    let rows_1_to_12 = vec![
        (A1, A2, Echo, Ok),
        (A2, A1, Echo, Ok),
        (B1, B2, Echo, Ok),
        (B2, B1, Echo, Ok),
        (A1, B1, Echo, Drop),
        (B1, A1, Echo, Drop),
        (A1, B2, Echo, Drop),
        (B2, A1, Echo, Drop),
        (A2, B1, Echo, Drop),
        (B1, A2, Echo, Drop),
        (A2, B2, Echo, Drop),
        (B2, A2, Echo, Drop),
    ];
    let rows_49_to_62 = vec![
        (BORDER, A1, Tcp(22), Ok),
        (BORDER, A1, Echo, Drop),
        (BORDER, A1, Tcp(80), Drop),
        (A1, BORDER, Echo, Ok),
        (A1, BORDER, Tcp(443), Ok),
        (COMPUTE1, A1, Echo, Ok),
        (COMPUTE1, A1, Tcp(80), Ok),
        (COMPUTE1, A2, Echo, Drop),
        (COMPUTE1, A2, Tcp(22), Ok),
        (A1, GATEWAY, Echo, Drop),
        (A1, COMPUTE1, Tcp(22), Drop),
        (A1, COMPUTE2, Tcp(22), Ok),
        (A1, GATEWAY, Udp(53), Ok),
        (A1, COMPUTE1, Dhcp, Ok),
    ];
    let rows_64_to_65 = vec![(A1, B1, ForgedSyn(Vm::A2, 22), Drop), (A1, A2, ForgedEcho(Vm::A2), Drop)];

    let up_to_62 = rows_1_to_12
        .into_iter()
        .chain(for_pairs(Tcp(22), Ok))
        .chain(for_pairs(Tcp(80), Drop))
        .chain(for_pairs(Udp(5000), Drop))
        .chain(rows_49_to_62);
    (1..)
        .zip(up_to_62)
        .chain((64..).zip(rows_64_to_65))
        .map(|(number, (from, to, probe, expected))| Row { number, from, to, probe, expected: expected.into() })
        .collect()
}

/// Returns the rows as they are when nothing passes the interfaces of these machines.
#[must_use]
pub fn cut_off(rows: Vec<Row>, machines: &[Vm]) -> Vec<Row> {
    let is_cut_off = |place: Place| machines.iter().any(|vm| place == Place::Vm(*vm));
    let cut = |mut row: Row| {
        if is_cut_off(row.from) {
            row.expected = Outcome::Drop.into();
        } else if is_cut_off(row.to) {
            row.expected = Expected::NoAnswer;
        }
        row
    };
    rows.into_iter().map(cut).collect()
}

/// Probes one row.
///
/// # Errors
///
/// If the probe cannot be sent or judged.
pub fn probe(bed: &Bed, family: Family, row: &Row) -> Result<Outcome> {
    let destination = bed.address(row.to, family)?;
    let from = bed.netns(row.from);
    match row.probe {
        Probe::Echo => from.enter(|| packets::echo(destination, LIMIT)),
        Probe::Tcp(port) => from.enter(|| packets::tcp((destination, port).into(), LIMIT)),
        Probe::Udp(port) => from.enter(|| packets::udp((destination, port).into(), LIMIT)),
        Probe::Dhcp => dhcp(bed, family, row),
        Probe::ForgedSyn(..) | Probe::ForgedEcho(_) => forged(bed, family, row, destination),
    }
}

/// Sends from `row.from` with a foreign source address and looks for the packet where it would arrive.
fn forged(bed: &Bed, family: Family, row: &Row, destination: IpAddr) -> Result<Outcome> {
    let token = packets::token();
    let sniffer = bed.netns(row.to).enter(|| Sniffer::open("eth0"))?;
    bed.netns(row.from).enter(|| match row.probe {
        Probe::ForgedSyn(vm, port) => {
            packets::forged_syn(bed.address(Place::Vm(vm), family)?, (destination, port).into(), &token)
        }
        Probe::ForgedEcho(vm) => packets::forged_echo(bed.address(Place::Vm(vm), family)?, destination, &token),
        Probe::Echo | Probe::Tcp(_) | Probe::Udp(_) | Probe::Dhcp => Ok(()),
    })?;
    Ok(if sniffer.sees(&token, LIMIT)? { Outcome::Ok } else { Outcome::Drop })
}

/// Sends what a DHCP client sends and waits for it on the host that has the machine.
fn dhcp(bed: &Bed, family: Family, row: &Row) -> Result<Outcome> {
    let Place::Vm(vm) = row.from else { anyhow::bail!("only machines ask for an address") };
    let token = packets::token();
    let tap = &bed.machine(vm).0.tap;
    let server = bed.netns(row.to).enter(|| -> Result<UdpSocket> {
        match family {
            Family::V4 => Ok(UdpSocket::bind("0.0.0.0:67")?),
            Family::V6 => {
                let server = UdpSocket::bind("[::]:547")?;
                server.join_multicast_v6(&ALL_DHCP_SERVERS, nix::net::if_::if_nametoindex(tap.as_str())?)?;
                Ok(server)
            }
        }
    })?;
    bed.netns(row.from).enter(|| match family {
        Family::V4 => packets::dhcp_broadcast("eth0", &token),
        Family::V6 => {
            let interface = nix::net::if_::if_nametoindex("eth0")?;
            let client = UdpSocket::bind("[::]:546")?;
            client.send_to(&token, SocketAddr::V6(SocketAddrV6::new(ALL_DHCP_SERVERS, 547, 0, interface)))?;
            Ok(())
        }
    })?;
    let deadline = Instant::now() + LIMIT;
    let mut buffer = [0; 1500];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(Outcome::Drop);
        }
        server.set_read_timeout(Some(left))?;
        if let Ok(length) = server.recv(&mut buffer)
            && frames::contains(&buffer[..length], &token)
        {
            return Ok(Outcome::Ok);
        }
    }
}

/// All_DHCP_Relay_Agents_and_Servers (RFC 8415, 7.1).
const ALL_DHCP_SERVERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 1, 2);

/// Probes all rows at once; the verdicts are in the order of the rows.
///
/// # Errors
///
/// If a probe cannot be sent or judged.
pub fn walk(bed: &Bed, family: Family, rows: &[Row]) -> Result<Vec<Outcome>> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = rows.iter().map(|row| scope.spawn(move || probe(bed, family, row))).collect();
        let verdicts =
            threads.into_iter().map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        rows.iter().zip(verdicts).map(|(row, verdict)| verdict.with_context(|| format!("row {row}"))).collect()
    })
}

/// Returns a line for every row that did not go as expected.
///
/// # Errors
///
/// As [`walk`].
pub fn surprises(bed: &Bed, family: Family, rows: &[Row]) -> Result<Vec<String>> {
    let seen = walk(bed, family, rows)?;
    let wrong = rows.iter().zip(seen).filter(|(row, seen)| !row.expected.allows(*seen));
    Ok(wrong.map(|(row, seen)| format!("row {row}  seen {seen}")).collect())
}

/// Probes until everything is as expected, then once more, because that must stay so.
///
/// For use after a change, while the old verdicts may still hold.
///
/// # Errors
///
/// With the rows that are wrong if that is still so at the end of `patience`, or again wrong afterwards.
pub fn become_as_expected(bed: &Bed, family: Family, rows: &[Row], patience: Duration) -> Result<()> {
    let deadline = Instant::now() + patience;
    loop {
        let wrong = surprises(bed, family, rows)?;
        if wrong.is_empty() {
            break;
        }
        anyhow::ensure!(Instant::now() < deadline, "{family}: still wrong after {patience:?}:\n{}", wrong.join("\n"));
    }
    stay_as_expected(bed, family, rows)
}

/// Probes once.
///
/// # Errors
///
/// With the rows that are wrong.
pub fn stay_as_expected(bed: &Bed, family: Family, rows: &[Row]) -> Result<()> {
    let wrong = surprises(bed, family, rows)?;
    anyhow::ensure!(wrong.is_empty(), "{family}: not as expected:\n{}", wrong.join("\n"));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_has_every_row_of_the_specification_but_the_metadata_row() {
        let rows = table();
        let numbers: Vec<u16> = rows.iter().map(|row| row.number).collect();
        let expected: Vec<u16> = (1..=62).chain(64..=65).collect();
        assert_eq!(numbers, expected);
        let open = rows.iter().filter(|row| row.expected == Outcome::Ok.into()).count();
        // Rows 1-4, 13-24, 49, 52-55, 57 and 60-62.
        assert_eq!(open, 4 + 12 + 1 + 4 + 1 + 3);
        let line = rows[48].to_string();
        assert_eq!(line, "49  border    -> a1         tcp 22            expected ok  ");
    }
}
