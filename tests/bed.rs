//! The set-up of openstack.md 14 in network namespaces.
//!
//! ```text
//!   a1 (sg-a)   b1 (sg-b)                 a2 (sg-a)   b2 (sg-b)      eth0 in each, /24 and /64, default via the gateway
//!       \        /                            \        /
//!     tap…\    /tap…                        tap…\    /tap…
//!       compute-1                             compute-2              ns-…: 10.65.0.1, fd00:65::1 on both
//!           \ 192.168.0.11, fd00:192::11      / .12
//!            +----------- fabric ------------+                       bridge; etcd on 192.168.0.10
//!                           |  192.168.0.9, fd00:192::9
//!                         border                                     203.0.113.9, 2001:db8:203::9
//! ```
//!
//! Which machine runs where, behind which interface and with which MAC comes from the endpoints in etcd. What BIRD, the
//! DHCP agent and the operator do on a real host is done here: routes between hosts, the gateway's addresses, and the
//! IPv6 proxy entries without which Linux answers no neighbour solicitation for an address behind another interface.
//! Everything on a `tap…` interface beyond that is the agent's.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Context as _, Result};
use model::Family;
use testkit::netns::Netns;

use crate::agent::{Agent, Start, Variant};
use crate::data::{self, Content, Machine, gateway};
use crate::proxy::Proxy;
use crate::services::{Services, Sockets};
use crate::store::Store;

/// The interface of the DHCP agent for network demo: `ns-` and the first 11 characters of its id (openstack.md 10.1).
const GATEWAY_INTERFACE: &str = "ns-56525f49-99";

/// The routing protocol that the bed's own routes carry: BIRD's, as they stand in for it.
const BIRD: &str = "12";

/// The virtual machines of the acceptance test.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Vm {
    /// 10.65.0.11 on compute-1, group sg-a.
    A1,
    /// 10.65.0.21 on compute-1, group sg-b.
    B1,
    /// 10.65.0.12 on compute-2, group sg-a.
    A2,
    /// 10.65.0.22 on compute-2, group sg-b.
    B2,
}

impl Vm {
    /// All four, in the order in which the table forms pairs.
    pub const ALL: [Self; 4] = [Self::A1, Self::A2, Self::B1, Self::B2];

    /// Returns the name that the specification has for it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::A1 => "a1",
            Self::B1 => "b1",
            Self::A2 => "a2",
            Self::B2 => "b2",
        }
    }

    /// Returns the IPv4 address, by which a machine is recognised in etcd.
    #[must_use]
    pub fn address(self) -> Ipv4Addr {
        Ipv4Addr::new(
            10,
            65,
            0,
            match self {
                Self::A1 => 11,
                Self::B1 => 21,
                Self::A2 => 12,
                Self::B2 => 22,
            },
        )
    }
}

/// The compute hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Host {
    /// 192.168.0.11.
    Compute1,
    /// 192.168.0.12.
    Compute2,
}

impl Host {
    /// Both hosts.
    pub const BOTH: [Self; 2] = [Self::Compute1, Self::Compute2];

    /// Returns the name in etcd.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Compute1 => "compute-1",
            Self::Compute2 => "compute-2",
        }
    }

    /// Returns the last part of its address on the management network.
    #[must_use]
    pub fn number(self) -> u8 {
        match self {
            Self::Compute1 => 11,
            Self::Compute2 => 12,
        }
    }
}

/// Somewhere a packet can come from or go to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Place {
    /// A virtual machine.
    Vm(Vm),
    /// A compute host itself.
    Host(Host),
    /// The border: 203.0.113.9, routed, not a virtual machine.
    Border,
    /// The gateway of the virtual machines, an address of every compute host. Only a destination.
    Gateway,
}

impl Place {
    /// Returns the name to print.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Vm(vm) => vm.name(),
            Self::Host(host) => host.name(),
            Self::Border => "border",
            Self::Gateway => "gateway",
        }
    }
}

/// Returns an address on the management network.
#[must_use]
pub fn management(family: Family, number: u8) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::new(192, 168, 0, number).into(),
        // Written like the IPv4 address: 11 is fd00:192::11.
        Family::V6 => {
            let number = u16::from(number / 10) << 4 | u16::from(number % 10);
            Ipv6Addr::new(0xfd00, 0x192, 0, 0, 0, 0, 0, number).into()
        }
    }
}

/// Returns the routed address of the border.
#[must_use]
pub fn border(family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::new(203, 0, 113, 9).into(),
        Family::V6 => Ipv6Addr::new(0x2001, 0xdb8, 0x203, 0, 0, 0, 0, 9).into(),
    }
}

/// The management network: a bridge in a namespace of its own, with etcd on 192.168.0.10.
#[derive(Debug)]
pub struct Fabric {
    store: Store,
    netns: Netns,
}

impl Fabric {
    /// Makes the network and starts etcd.
    ///
    /// # Errors
    ///
    /// If the kernel refuses or etcd does not start.
    pub fn new() -> Result<Self> {
        let netns = Netns::new("fabric")?;
        // The bridge has an address of its own. Without one it takes that of a port, and another one when ports come and
        // go: then its neighbours lose it for seconds.
        netns.sh("ip link add mgmt address 02:00:c0:a8:00:0a type bridge")?;
        netns.sh("ip addr add 192.168.0.10/24 dev mgmt; ip link set mgmt up")?;
        let store = Store::start(&netns, Ipv4Addr::new(192, 168, 0, 10))?;
        Ok(Self { store, netns })
    }

    /// Returns etcd.
    #[must_use]
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Starts a proxy in front of etcd, on a port of its own.
    ///
    /// # Errors
    ///
    /// If there is one already.
    pub fn proxy(&self) -> Result<Proxy> {
        let (from, to) = (Ipv4Addr::new(192, 168, 0, 10), Ipv4Addr::LOCALHOST);
        Proxy::start(&self.netns, SocketAddr::from((from, 12379)), SocketAddr::from((to, 2379)))
    }

    /// Makes a host with an address on the management network that forwards, as calico-compute sets it up.
    ///
    /// # Errors
    ///
    /// If the kernel refuses.
    pub fn host(&self, label: &str, number: u8) -> Result<Netns> {
        let host = Netns::new(label)?;
        let port = format!("port{number}");
        self.netns.veth(&port, &host, "eth0")?;
        self.netns.sh(&format!("ip link set {port} master mgmt up"))?;
        host.sysctl(&[("net/ipv4/ip_forward", "1"), ("net/ipv6/conf/all/forwarding", "1")])?;
        let (v4, v6) = (management(Family::V4, number), management(Family::V6, number));
        host.sh(&format!(
            "ip addr add {v4}/24 dev eth0
             ip -6 addr add {v6}/64 dev eth0 nodad
             ip link set eth0 up"
        ))?;
        host.await_up("eth0")?;
        Ok(host)
    }
}

/// See the [module documentation](self).
#[derive(Debug)]
pub struct Bed {
    // Dropped in this order: what has sockets in the namespaces goes before them.
    _services: Services,
    machines: Vec<(Vm, Machine, Netns)>,
    hosts: [Netns; 2],
    border: Netns,
    fabric: Fabric,
}

impl Bed {
    /// Makes the hosts and the machines that `content` describes; loads nothing and starts no agent.
    ///
    /// # Errors
    ///
    /// If `content` does not have the four machines, or the kernel refuses.
    pub fn new(content: &Content) -> Result<Self> {
        let fabric = Fabric::new()?;
        let border_netns = fabric.host("border", 9)?;
        let hosts = [fabric.host("compute-1", 11)?, fabric.host("compute-2", 12)?];
        for host in &hosts {
            add_gateway(host)?;
        }
        let described = data::machines(content);
        let mut machines = Vec::new();
        for vm in Vm::ALL {
            let machine = described.iter().find(|machine| machine.addresses.contains(&vm.address().into()));
            machines.push((
                vm,
                machine.with_context(|| format!("no endpoint for {}", vm.name()))?.clone(),
                Netns::new(vm.name())?,
            ));
        }
        let mut sockets = Sockets::default();
        for (_, machine, netns) in &machines {
            add_machine(machine, netns, host_of(&hosts, machine)?)?;
            netns.enter(|| sockets.open(&[22, 80, 443, 2225], &["[::]:5000".parse()?]))?;
        }
        for host in &hosts {
            // DNS on the very address: an answer from another one is none.
            let dns = Family::BOTH.map(|family| SocketAddr::new(gateway(family), 53));
            host.enter(|| sockets.open(&[22, 80], &dns))?;
        }
        border_netns.enter(|| sockets.open(&[22, 80, 443], &[]))?;
        add_border(&border_netns)?;
        let services = sockets.serve()?;
        let bed = Self { _services: services, machines, hosts, border: border_netns, fabric };
        for vm in Vm::ALL {
            bed.announce(vm)?;
        }
        bed.proxy_ipv6()?;
        Ok(bed)
    }

    /// Returns etcd.
    #[must_use]
    pub fn store(&self) -> &Store {
        self.fabric.store()
    }

    /// Returns the network that etcd is on.
    #[must_use]
    pub fn fabric(&self) -> &Fabric {
        &self.fabric
    }

    /// Returns the namespace of a host.
    #[must_use]
    pub fn host(&self, host: Host) -> &Netns {
        match host {
            Host::Compute1 => &self.hosts[0],
            Host::Compute2 => &self.hosts[1],
        }
    }

    /// Returns the endpoint and the namespace of a machine.
    ///
    /// # Panics
    ///
    /// Never: every bed has all machines.
    #[must_use]
    pub fn machine(&self, vm: Vm) -> (&Machine, &Netns) {
        match self.machines.iter().find(|(name, _, _)| *name == vm) {
            Some((_, machine, netns)) => (machine, netns),
            None => panic!("a bed without {}", vm.name()),
        }
    }

    /// Returns the namespace of a place; the gateway is where compute-1 is.
    #[must_use]
    pub fn netns(&self, place: Place) -> &Netns {
        match place {
            Place::Vm(vm) => self.machine(vm).1,
            Place::Host(host) => self.host(host),
            Place::Border => &self.border,
            Place::Gateway => self.host(Host::Compute1),
        }
    }

    /// Returns the address at which a place is reached.
    ///
    /// # Errors
    ///
    /// If the machine has none of this family.
    pub fn address(&self, place: Place, family: Family) -> Result<IpAddr> {
        match place {
            Place::Vm(vm) => {
                let address = self.machine(vm).0.address(family);
                address.with_context(|| format!("{} has no {family} address", vm.name()))
            }
            Place::Host(host) => Ok(management(family, host.number())),
            Place::Border => Ok(border(family)),
            Place::Gateway => Ok(gateway(family)),
        }
    }

    /// Starts the agent of a host.
    ///
    /// # Errors
    ///
    /// If there is no binary.
    pub fn start_agent(&self, host: Host, variant: Variant) -> Result<Agent> {
        Agent::start(&self.agent(host, variant))
    }

    /// Returns how the agent of a host is started.
    #[must_use]
    pub fn agent(&self, host: Host, variant: Variant) -> Start<'_> {
        let netns = self.host(host);
        Start {
            netns,
            host: host.name(),
            etcd: self.store().endpoint(),
            variant,
            path_prefix: None,
            settings: &[],
            before: "",
        }
    }

    /// Lets the other host and the border know where a machine is, as BIRD does.
    ///
    /// # Errors
    ///
    /// If the route exists.
    pub fn announce(&self, vm: Vm) -> Result<()> {
        self.advertise(vm, "add")
    }

    /// Withdraws what [`Bed::announce`] made known.
    ///
    /// # Errors
    ///
    /// If the route does not exist.
    pub fn withdraw(&self, vm: Vm) -> Result<()> {
        self.advertise(vm, "del")
    }

    fn advertise(&self, vm: Vm, verb: &str) -> Result<()> {
        let machine = self.machine(vm).0;
        for address in &machine.addresses {
            let family = if address.is_ipv4() { Family::V4 } else { Family::V6 };
            for host in Host::BOTH {
                let next_hop = management(family, host.number());
                if host.name() == machine.host {
                    let source = border(family);
                    self.border.sh(&format!("ip route {verb} {address} via {next_hop} src {source} proto {BIRD}"))?;
                } else {
                    let owner = Host::BOTH.into_iter().find(|owner| owner.name() == machine.host);
                    let next_hop = management(family, owner.context("a machine on an unknown host")?.number());
                    self.host(host).sh(&format!("ip route {verb} {address} via {next_hop} proto {BIRD}"))?;
                }
            }
        }
        Ok(())
    }

    /// Lets every host answer its machines' neighbour solicitations for the gateway and for all other machines.
    ///
    /// Linux does so only where `proxy_ndp` is on, which is the agent's work.
    fn proxy_ipv6(&self) -> Result<()> {
        for (vm, machine, _) in &self.machines {
            let host = host_of(&self.hosts, machine)?;
            let others = self.machines.iter().filter(|(other, _, _)| other != vm);
            let addresses = others.filter_map(|(_, other, _)| other.address(Family::V6)).chain([gateway(Family::V6)]);
            let script: String =
                addresses.map(|address| format!("ip -6 neigh add proxy {address} dev {}\n", machine.tap)).collect();
            host.sh(&script)?;
            host.sysctl(&[(&format!("net/ipv6/neigh/{}/proxy_delay", machine.tap), "0")])?;
        }
        Ok(())
    }

    /// Does by hand what an agent does for reachability, and nothing for protection: every connection is open.
    ///
    /// This is how the bed proves that its probes can say "ok" where a test wants "drop".
    ///
    /// # Errors
    ///
    /// If the kernel refuses.
    pub fn open_by_hand(&self) -> Result<()> {
        for (_, machine, _) in &self.machines {
            let (host, tap) = (host_of(&self.hosts, machine)?, &machine.tap);
            let routes: String =
                machine.addresses.iter().map(|address| format!("ip route add {address} dev {tap}\n")).collect();
            host.sh(&routes)?;
            host.sysctl(&[
                (&format!("net/ipv4/conf/{tap}/proxy_arp"), "1"),
                (&format!("net/ipv4/neigh/{tap}/proxy_delay"), "0"),
                (&format!("net/ipv6/conf/{tap}/proxy_ndp"), "1"),
            ])?;
        }
        Ok(())
    }
}

fn host_of<'a>(hosts: &'a [Netns; 2], machine: &Machine) -> Result<&'a Netns> {
    let index = Host::BOTH.iter().position(|host| host.name() == machine.host);
    index.and_then(|index| hosts.get(index)).with_context(|| format!("no host {}", machine.host))
}

/// Adds the DHCP agent's interface: the gateway's addresses, without routes to the subnets (openstack.md 10.1).
fn add_gateway(host: &Netns) -> Result<()> {
    let (v4, v6) = (gateway(Family::V4), gateway(Family::V6));
    host.veth(GATEWAY_INTERFACE, host, "ns-peer")?;
    host.sh(&format!(
        "ip addr add {v4}/24 dev {GATEWAY_INTERFACE} noprefixroute
         ip -6 addr add {v6}/64 dev {GATEWAY_INTERFACE} nodad noprefixroute
         ip link set ns-peer up
         ip link set {GATEWAY_INTERFACE} up
         ip route add {border_v4} via 192.168.0.9 proto {BIRD}
         ip route add {border_v6} via fd00:192::9 proto {BIRD}",
        border_v4 = border(Family::V4),
        border_v6 = border(Family::V6),
    ))
    .map(drop)
}

/// Joins a machine to its host; it knows a /24, a /64 and a default route, as DHCP and router advertisements say.
fn add_machine(machine: &Machine, netns: &Netns, host: &Netns) -> Result<()> {
    let tap = &machine.tap;
    host.veth(tap, netns, "eth0")?;
    // libvirt gives the host's end the MAC of the machine with fe in front.
    let tap_mac = format!("fe{}", machine.mac.get(2..).context("a MAC address")?);
    host.sh(&format!("ip link set {tap} address {tap_mac} up"))?;
    let mut script = format!("ip link set eth0 address {} up\n", machine.mac);
    for address in &machine.addresses {
        let family = if address.is_ipv4() { Family::V4 } else { Family::V6 };
        let length = if address.is_ipv4() { "24" } else { "64 nodad" };
        let default = gateway(family);
        let flag = format!("-{}", family.digit());
        script +=
            &format!("ip {flag} addr add {address}/{length} dev eth0\nip {flag} route add default via {default}\n");
    }
    netns.sh(&script)?;
    netns.await_up("eth0")?;
    host.await_up(tap)
}

/// Gives the border its routed addresses.
fn add_border(netns: &Netns) -> Result<()> {
    let (v4, v6) = (border(Family::V4), border(Family::V6));
    netns.sh(&format!("ip addr add {v4}/32 dev lo; ip -6 addr add {v6}/128 dev lo nodad")).map(drop)
}
