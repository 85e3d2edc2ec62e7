//! A host as a network namespace whose wires all end in this program: what a test puts on one, and what comes out of
//! the others, is seen frame by frame.
//!
//! ```text
//!   yard                      host (forwards)
//!   cali1  ───────────────── cali1     one address of each family routed to each, below whatever the agent routes
//!   …                        …
//!   eth0   ───────────────── eth0      everything else
//! ```
//!
//! Nothing here is ever waited for but a packet: interfaces do not resolve neighbours, nobody has an address, no
//! machine is behind the wires.
//!
//! Invariant: a packet that was not seen was dropped. All packets of an exchange, and the one that ends it, are
//! sent on one processor, whose queue the kernel works off in order.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use ipnet::IpNet;
use model::{LinkState, Name, Update};
use nix::sched::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity};
use nix::unistd::Pid;
use testkit::frames::{self, Token};
use testkit::netns::Netns;
use testkit::packets::{self, Wire};

/// The interfaces that workloads may have. One name is the beginning of another, and one is nothing but the prefix.
pub const WORKLOADS: [&str; 5] = ["cali1", "cali12", "cali2", "cali", "cali7"];

/// The interface that leads elsewhere.
pub const UPLINK: &str = "eth0";

/// What the host always routes to each of [`WORKLOADS`], in order.
pub const HOMES: [(&str, &str); 5] = [
    ("10.0.0.1", "fd00::1"),
    ("10.0.0.2", "fd00::2"),
    ("10.0.1.1", "fd00:0:0:1::1"),
    ("192.0.2.1", "2001:db8::1"),
    ("172.16.0.1", "fd00:0:0:2::7"),
];

/// Addresses that are behind [`UPLINK`] until an endpoint claims them.
pub const OUTSIDE: [(&str, &str); 2] = [("203.0.113.1", "2001:db8:203::1"), ("10.0.1.9", "fd00:0:0:1::9")];

/// The metric of the routes to [`HOMES`]: the agent's routes come first.
const METRIC: u32 = 4096;

/// Nobody's addresses, between which the packet travels that ends an exchange.
const SENTINEL: [Ipv4Addr; 2] = [Ipv4Addr::new(100, 64, 0, 1), Ipv4Addr::new(100, 65, 0, 1)];

/// How long the kernel may take to work off its queue.
const PATIENCE: Duration = Duration::from_secs(20);

/// See the [module documentation](self).
#[derive(Debug)]
pub struct Ground {
    host: Netns,
    _yard: Netns,
    wires: BTreeMap<&'static str, Wire>,
}

/// A packet to send, and through which interface it enters the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shot {
    pub from: Name,
    pub source: IpAddr,
    pub destination: IpAddr,
    pub protocol: u8,
    /// Ends with the token.
    pub payload: Vec<u8>,
    pub token: Token,
}

/// Where the host sends what it forwards.
#[derive(Clone, Debug, Default)]
pub struct Routes(Vec<(IpNet, u32, Name)>);

/// All interfaces in the order of their numbers.
fn interfaces() -> impl Iterator<Item = &'static str> {
    WORKLOADS.into_iter().chain([UPLINK])
}

/// The address of the host's end of a wire.
fn mac(interface: &str) -> [u8; 6] {
    let number = interfaces().position(|name| name == interface).map_or(0xff, |number| number as u8);
    [0x02, 0, 0, 0, 0x01, number]
}

impl Ground {
    /// Makes the host and its wires.
    ///
    /// # Errors
    ///
    /// If the kernel refuses.
    pub fn new() -> Result<Self> {
        let host = Netns::new("host")?;
        let yard = Netns::new("yard")?;
        yard.sysctl(&[("net/ipv6/conf/all/disable_ipv6", "1"), ("net/ipv6/conf/default/disable_ipv6", "1")])?;
        host.sysctl(&[
            ("net/ipv4/ip_forward", "1"),
            ("net/ipv6/conf/all/forwarding", "1"),
            ("net/ipv4/conf/all/rp_filter", "0"),
            ("net/ipv4/conf/default/rp_filter", "0"),
            ("net/ipv4/conf/all/send_redirects", "0"),
            ("net/ipv4/conf/default/send_redirects", "0"),
        ])?;
        let (mut in_host, mut in_yard) = (String::new(), String::new());
        for interface in interfaces() {
            host.veth(interface, &yard, interface)?;
            let [a, b, c, d, e, f] = mac(interface);
            in_host += &format!(
                "ip link set {interface} address {a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}
                 ip link set {interface} arp off addrgenmode none up\n"
            );
            in_yard += &format!("ip link set {interface} arp off up\n");
        }
        host.sh(&in_host)?;
        yard.sh(&in_yard)?;
        interfaces().try_for_each(|interface| host.await_up(interface))?;
        let mut routes = format!("ip route add default dev {UPLINK}\nip -6 route add default dev {UPLINK}\n");
        for (interface, (v4, v6)) in WORKLOADS.iter().zip(HOMES) {
            for address in [v4, v6] {
                // The agent's own are of protocol boot, which is also the default.
                routes += &format!("ip route add {address} dev {interface} metric {METRIC} proto static\n");
            }
        }
        host.sh(&routes)?;
        let wires = yard.enter(|| {
            let wire = |name| Ok((name, Wire::open(name).with_context(|| format!("wire to {name}"))?));
            interfaces().map(wire).collect::<Result<_>>()
        })?;
        Ok(Self { host, _yard: yard, wires })
    }

    /// Returns the namespace of the host.
    #[must_use]
    pub fn host(&self) -> &Netns {
        &self.host
    }

    /// Returns the interfaces as the link monitor would report them.
    ///
    /// # Errors
    ///
    /// If the kernel does not say.
    pub fn links(&self) -> Result<Vec<Update>> {
        let link = |name: &'static str| {
            let index = self.host.enter(|| nix::net::if_::if_nametoindex(name))?;
            Ok(Update::Link(name.into(), Some(LinkState { index, up: true, generation: 0 })))
        };
        interfaces().map(link).collect()
    }

    /// Reads the host's routes.
    ///
    /// # Errors
    ///
    /// If there is a route that this does not understand.
    pub fn routes(&self) -> Result<Routes> {
        let listed = self.host.sh("ip -4 route show table main; echo v6; ip -6 route show table main")?;
        let (v4, v6) = listed.split_once("v6\n").context("two lists")?;
        let mut routes = Routes::default();
        for (lines, default) in [(v4, "0.0.0.0/0"), (v6, "::/0")] {
            for line in lines.lines() {
                routes.0.push(route(line, default).with_context(|| format!("route {line:?}"))?);
            }
        }
        Ok(routes)
    }

    /// Sends the packets and returns for each the interface that it came out of, if it did. The host has forgotten
    /// all earlier connections if `anew`.
    ///
    /// # Errors
    ///
    /// If a packet cannot be sent, comes out twice, or the exchange does not end.
    pub fn exchange(&self, shots: &[Shot], anew: bool) -> Result<Vec<Option<Name>>> {
        if anew {
            self.host.enter(packets::forget_connections)?;
        }
        // What came late to an earlier exchange that failed.
        for wire in self.wires.values() {
            while wire.receive(Duration::ZERO)?.is_some() {}
        }
        let sentinel = sentinel()?;
        let here = Pid::from_raw(0);
        let everywhere = sched_getaffinity(here)?;
        let mut one = CpuSet::new();
        one.set(sched_getcpu()?)?;
        sched_setaffinity(here, &one)?;
        let sent = shots.iter().chain([&sentinel]).try_for_each(|shot| self.send(shot));
        sched_setaffinity(here, &everywhere)?;
        sent?;
        self.collect(shots, &sentinel)
    }

    fn send(&self, shot: &Shot) -> Result<()> {
        let packet = frames::ip(shot.source, shot.destination, shot.protocol, &shot.payload)?;
        self.wire(&shot.from)?.send(&frames::ethernet(mac(&shot.from), &packet))
    }

    fn wire(&self, interface: &str) -> Result<&Wire> {
        self.wires.get(interface).with_context(|| format!("no wire to {interface}"))
    }

    fn collect(&self, shots: &[Shot], sentinel: &Shot) -> Result<Vec<Option<Name>>> {
        let mut seen = vec![None; shots.len()];
        let mut take = |interface: &str, frame: &[u8]| {
            let Some(contents) = frames::read(frame) else { return Ok(false) };
            let is_whole = |shot: &&Shot| {
                (shot.source, shot.destination, shot.protocol, shot.payload.as_slice())
                    == (contents.source, contents.destination, contents.protocol, contents.payload)
            };
            if is_whole(&sentinel) {
                return Ok(true);
            }
            if let Some(number) = shots.iter().position(|shot| is_whole(&shot)) {
                ensure!(seen[number].is_none(), "packet {number} came out twice: {:?}", shots[number]);
                seen[number] = Some(Name::from(interface));
            }
            Ok(false)
        };
        let uplink = self.wire(UPLINK)?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            ensure!(!left.is_zero(), "the packet that ends the exchange did not come out");
            if let Some(frame) = uplink.receive(left)?
                && take(UPLINK, &frame)?
            {
                break;
            }
        }
        for (interface, wire) in &self.wires {
            while let Some(frame) = wire.receive(Duration::ZERO)? {
                take(interface, &frame)?;
            }
        }
        Ok(seen)
    }
}

/// A packet that no policy is asked about: it comes from elsewhere and goes elsewhere.
fn sentinel() -> Result<Shot> {
    let token = packets::token();
    let [source, destination] = SENTINEL.map(IpAddr::from);
    let port = 0x8000 | u16::from_be_bytes([token[14], token[15]]);
    let payload = frames::udp(SocketAddr::new(source, port), SocketAddr::new(destination, 9), &token);
    Ok(Shot { from: UPLINK.into(), source, destination, protocol: 17, payload, token })
}

/// Reads a line of `ip route show`.
fn route(line: &str, default: &str) -> Result<(IpNet, u32, Name)> {
    let words: Vec<&str> = line.split_ascii_whitespace().collect();
    let after = |wanted: &str| words.windows(2).find(|pair| pair[0] == wanted).map(|pair| pair[1]);
    let destination = match words.first() {
        Some(&"default") => default.parse()?,
        Some(text) => text.parse::<IpAddr>().map(IpNet::from).or_else(|_| text.parse())?,
        None => bail!("empty line"),
    };
    let metric = after("metric").map_or(Ok(0), str::parse)?;
    Ok((destination, metric, after("dev").context("no interface")?.into()))
}

impl Routes {
    /// Returns the interface that leads to an address.
    ///
    /// # Panics
    ///
    /// If there is none: the host has default routes.
    #[must_use]
    pub fn to(&self, address: IpAddr) -> &Name {
        let fitting = self.0.iter().filter(|(net, _, _)| net.contains(&address));
        match fitting.max_by_key(|(net, metric, _)| (net.prefix_len(), std::cmp::Reverse(*metric))) {
            Some((_, _, interface)) => interface,
            None => panic!("no route to {address}"),
        }
    }

    /// Returns whether the kernel's reverse path check lets a source come from an interface. For IPv4 it wants the best
    /// route to the source; for IPv6 any of those with the longest prefix will do, whatever their metrics
    /// (ip6t_rpfilter.c sets `flowi6_oif`).
    #[must_use]
    pub fn lead_back(&self, source: IpAddr, from: &str) -> bool {
        let longest = self.0.iter().filter(|(net, ..)| net.contains(&source)).map(|(net, ..)| net.prefix_len()).max();
        match source {
            IpAddr::V4(_) => **self.to(source) == *from,
            IpAddr::V6(_) => self.0.iter().any(|(net, _, interface)| {
                net.contains(&source) && Some(net.prefix_len()) == longest && **interface == *from
            }),
        }
    }
}
