//! What sets cost: the driver beside bare requests to the kernel (performance.md 4.6, 7: G4, G11, G12).
//!
//! `unshare -n target/release/examples/sets [members of the large set]`, as root. Every figure of the driver comes
//! with that of the same work done by requests that were encoded beforehand.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::indexing_slicing,
    reason = "a measurement ends by panicking"
)]

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use dataplane::Options;
use dataplane::ipset::transport::{Netlink, Op};
use dataplane::ipset::{IpSets, Transport as _};
use ipnet::{IpNet, Ipv4Net};
use netlink_sys::{Socket, SocketAddr};
use program::{Family, Member, Members, SetChange, SetKind, SetName, SetSpec};

const LIMIT: Duration = Duration::from_secs(60);
const ROUNDS: usize = 200;

fn main() {
    let large = std::env::args().nth(1).and_then(|text| text.parse().ok()).unwrap_or(1_000_000);
    for sets in [1, 10, 100, 1000] {
        one_member(sets);
    }
    for sets in [1000, 2000] {
        check_and_destroy(sets);
    }
    large_set(large);
}

fn name(n: u32) -> SetName {
    SetName::new(&format!("cali40s{n}")).unwrap()
}

fn address(n: u32) -> Member {
    Member::Address(Ipv4Addr::from_bits(0x0a00_0000 + n).into())
}

fn net(n: u32) -> Member {
    Member::Net(IpNet::V4(Ipv4Net::new(Ipv4Addr::from_bits(n << 8), 24).unwrap()))
}

fn driver() -> IpSets {
    IpSets::new(&Options::default(), Box::new(Netlink::new(LIMIT)))
}

fn want(driver: &mut IpSets, n: u32, kind: SetKind, members: BTreeSet<Member>) {
    let spec = SetSpec { name: name(n), family: Family::V4, kind, max_members: 1_048_576 };
    driver.want(Family::V4, &name(n), SetChange::Replace { spec, members: members.into() });
}

/// Both halves of an apply, as often as there is something to do.
fn apply(driver: &mut IpSets, now: Instant) -> (u64, u32) {
    let (mut writes, mut applies) = (0, 0);
    loop {
        let (first, second) = (driver.write_additions(now), driver.write_removals(now));
        assert!(first.errors.is_empty() && second.errors.is_empty(), "{first:?} {second:?}");
        writes += first.writes + second.writes;
        applies += 1;
        if driver.next_due().is_none_or(|(due, _)| due > now) {
            return (writes, applies);
        }
    }
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

fn timed<T>(work: impl FnOnce() -> T) -> (T, Duration) {
    let start = Instant::now();
    let result = work();
    (result, start.elapsed())
}

/// One member comes and goes in each of so many sets of 1,000.
fn one_member(sets: u32) {
    let now = Instant::now();
    let mut driver = driver();
    for n in 0..1000 {
        want(&mut driver, n, SetKind::Address, (0..if n < sets { 1000 } else { 10 }).map(address).collect());
    }
    apply(&mut driver, now);
    let rounds = ROUNDS / (1 + sets as usize / 100);
    let (mut ours, mut wanting) = (Vec::new(), Vec::new());
    for round in 0..rounds {
        let one = Members::from([address(5000)]);
        let (mut added, mut removed) = (one, Members::default());
        if round % 2 == 1 {
            std::mem::swap(&mut added, &mut removed);
        }
        let changes: Vec<_> =
            (0..sets).map(|n| (name(n), SetChange::Delta { added: added.clone(), removed: removed.clone() })).collect();
        let start = Instant::now();
        for (name, change) in changes {
            driver.want(Family::V4, &name, change);
        }
        wanting.push(start.elapsed());
        let writes = driver.write_additions(now).writes + driver.write_removals(now).writes;
        ours.push(start.elapsed());
        assert_eq!(writes, u64::from(sets));
    }
    let mut raw = Raw::new();
    let add: Vec<Vec<u8>> = (0..sets).map(|n| raw.members(9, &name(n), &[address(6000)])).collect();
    let del: Vec<Vec<u8>> = (0..sets).map(|n| raw.members(10, &name(n), &[address(6000)])).collect();
    let (mut single, mut joined) = (Vec::new(), Vec::new());
    for round in 0..rounds {
        let messages = if round % 2 == 0 { &add } else { &del };
        single.push(timed(|| messages.iter().for_each(|message| raw.ask(message))).1);
    }
    for round in 0..rounds {
        let messages = if round % 2 == 0 { &add } else { &del };
        let parts: Vec<Vec<u8>> = messages.chunks(100).map(<[_]>::concat).collect();
        joined.push(timed(|| parts.iter().zip(messages.chunks(100)).for_each(|(part, m)| raw.send(part, m.len()))).1);
    }
    let (ours, wanting, single, joined) = (median(ours), median(wanting), median(single), median(joined));
    println!(
        "one member in {sets} sets: driver {ours:?} (of it noted {wanting:?}), bare {single:?}, bare in joint sends \
         {joined:?}; over bare per set {:?}",
        ours.saturating_sub(single) / sets
    );
    (0..1000).for_each(|n| driver.want(Family::V4, &name(n), SetChange::Remove));
    apply(&mut driver, now);
}

/// So many sets of ten: made, read by a successor, looked after, destroyed.
fn check_and_destroy(sets: u32) {
    let now = Instant::now();
    let fill = |driver: &mut IpSets| {
        (0..sets).for_each(|n| want(driver, n, SetKind::Address, (0..10).map(address).collect()));
    };
    let mut first = driver();
    fill(&mut first);
    let ((writes, _), made) = timed(|| apply(&mut first, now));
    let mut driver = driver();
    fill(&mut driver);
    let ((none, _), read) = timed(|| apply(&mut driver, now));
    assert_eq!((writes, none), (u64::from(sets) * 2, 0));
    let mut bare = Netlink::new(LIMIT);
    let (_, one_by_one) = timed(|| (0..sets).for_each(|n| assert!(bare.read(&name(n)).unwrap().is_some())));
    let (headers, listed) = timed(|| bare.headers().unwrap().unwrap());
    assert_eq!(headers.ours.len(), sets as usize);
    driver.suspect();
    let (_, checked) = timed(|| driver.write_additions(now));
    let (_, idle) = timed(|| driver.write_additions(now));
    (0..sets).for_each(|n| driver.want(Family::V4, &name(n), SetChange::Remove));
    let ((_, applies), destroyed) = timed(|| apply(&mut driver, now));

    fill(&mut first);
    first.distrust();
    apply(&mut first, now);
    let mut raw = Raw::new();
    let messages: Vec<Vec<u8>> = (0..sets).map(|n| raw.destroy(&name(n))).collect();
    let (_, floor) = timed(|| messages.iter().for_each(|message| raw.ask(message)));
    println!(
        "{sets} sets of 10: made {made:?}, read {read:?} (one by one {one_by_one:?}), headers compared {checked:?} (of it \
         listed {listed:?}), apply with nothing to do {idle:?}, destroyed {destroyed:?} in {applies} applies, bare {floor:?}"
    );
}

/// One set of many networks.
fn large_set(count: u32) {
    let now = Instant::now();
    let nets: Vec<Member> = (0..count).map(net).collect();
    let mut raw = Raw::new();
    let size = count.next_power_of_two();
    let mut bare = Netlink::new(LIMIT);
    let create = |n: u32| Op::Create {
        name: name(n),
        kind: SetKind::Net,
        family: Family::V4,
        max_members: 1_048_576.max(count),
        hash_size: size,
    };
    let messages: Vec<Vec<u8>> = nets.chunks(1000).map(|nets| raw.members(9, &name(1), nets)).collect();
    let (_, floor) = timed(|| {
        bare.perform(&[create(1)]).unwrap();
        messages.iter().for_each(|message| raw.ask(message));
    });
    let twentieth: Vec<Vec<u8>> = nets[..count as usize / 20]
        .chunks(1000)
        .flat_map(|nets| [raw.members(10, &name(1), nets), raw.members(9, &name(1), nets)])
        .collect();
    let (_, part_floor) = timed(|| twentieth.iter().for_each(|message| raw.ask(message)));
    let (contents, dumped) = timed(|| bare.read(&name(1)).unwrap().unwrap());
    assert_eq!(contents.members.len(), count as usize);
    drop(contents);
    bare.perform(&[Op::Destroy { set: name(1) }]).unwrap();
    drop((messages, twentieth));

    let mut driver = driver();
    apply(&mut driver, now);
    let members: BTreeSet<Member> = nets.iter().copied().collect();
    drop(nets);
    let before = memory("VmRSS");
    let (_, noted) = timed(|| want(&mut driver, 1, SetKind::Net, members));
    let (_, written) = timed(|| apply(&mut driver, now));
    let (after, peak) = (memory("VmRSS"), memory("VmHWM"));
    let (added, removed) = ((count..count + count / 20).map(net).collect(), (0..count / 20).map(net).collect());
    let change = SetChange::Delta { added, removed };
    let (_, part) = timed(|| {
        driver.want(Family::V4, &name(1), change);
        apply(&mut driver, now);
    });
    let later = now + Duration::from_secs(90);
    let mut slices = Vec::new();
    let mut at = later;
    loop {
        slices.push(timed(|| (driver.write_additions(at), driver.write_removals(at))).1);
        match driver.next_due() {
            Some((due, "set comparison")) => at = due,
            _ => break,
        }
    }
    slices.sort();
    driver.distrust();
    let (_, read) = timed(|| driver.write_additions(later));
    println!(
        "{count} nets: driver {:?} (of it noted {noted:?}), bare {floor:?}; a twentieth exchanged {part:?}, bare \
         {part_floor:?}; read and compared {read:?}, bare dump {dumped:?}; compared beside the work in {} slices over {:?}, \
         the longest {:?}; resident {before} kB before, {after} kB after, {peak} kB at most",
        noted + written,
        slices.len(),
        at - later,
        slices[slices.len() - 1],
    );
}

/// A line of `/proc/self/status`, in kB.
fn memory(key: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with(key)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Bare requests (crates.md 6.3).
struct Raw {
    socket: Socket,
}

impl Raw {
    fn new() -> Self {
        let mut socket = Socket::new(12).unwrap();
        socket.bind_auto().unwrap();
        socket.connect(&SocketAddr::new(0, 0)).unwrap();
        Self { socket }
    }

    fn ask(&mut self, message: &[u8]) {
        self.send(message, 1);
    }

    /// Sends joint messages and takes as many acknowledgements.
    fn send(&mut self, messages: &[u8], count: usize) {
        self.socket.send(messages, 0).unwrap();
        let mut buffer = Vec::with_capacity(1 << 16);
        let mut taken = 0;
        while taken < count {
            buffer.clear();
            self.socket.recv(&mut buffer, 0).unwrap();
            let mut rest = buffer.as_slice();
            while !rest.is_empty() {
                let length = u32::from_ne_bytes(rest[..4].try_into().unwrap()) as usize;
                assert_eq!(rest[16..20], [0; 4], "refused");
                rest = &rest[length.next_multiple_of(4).min(rest.len())..];
                taken += 1;
            }
        }
    }

    fn message(&mut self, command: u16, body: &[Vec<u8>]) -> Vec<u8> {
        let body: Vec<u8> = [attribute(1, &[6])].iter().chain(body).flatten().copied().collect();
        let mut message = (20 + body.len() as u32).to_ne_bytes().to_vec();
        message.extend((6 << 8 | command).to_ne_bytes());
        message.extend(5u16.to_ne_bytes());
        message.extend([0; 8]);
        message.extend([2, 0, 0, 0]);
        message.extend(body);
        message
    }

    fn destroy(&mut self, set: &SetName) -> Vec<u8> {
        self.message(3, &[text(set)])
    }

    fn members(&mut self, command: u16, set: &SetName, members: &[Member]) -> Vec<u8> {
        let element = |member: &Member| {
            let (address, rest) = match member {
                Member::Address(address) => (*address, Vec::new()),
                Member::Net(net) => (net.addr(), attribute(3, &[net.prefix_len()])),
                Member::AddressPort { .. } => panic!("no ports here"),
            };
            let std::net::IpAddr::V4(address) = address else { panic!("IPv4 only") };
            let mut data = attribute(0x8001, &attribute(0x4001, &address.octets()));
            data.extend(rest);
            data.extend(attribute(9, &[0; 4]));
            attribute(0x8007, &data)
        };
        let list: Vec<u8> = members.iter().flat_map(element).collect();
        self.message(command, &[text(set), attribute(9, &[0; 4]), attribute(0x8008, &list)])
    }
}

fn text(set: &SetName) -> Vec<u8> {
    attribute(2, &[set.as_str().as_bytes(), &[0]].concat())
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let mut bytes = (4 + value.len() as u16).to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}
