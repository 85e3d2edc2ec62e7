//! Interfaces, their settings, routes and neighbours.

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;

use dataplane::routes::{KernelRoute, Neighbour, NeighbourNews, News, RouteKey, RouteOp};
use ipnet::IpNet;
use model::{Family, Name};

use super::State;

const ENOENT: i32 = 2;
const ESRCH: i32 = 3;
const ENODEV: i32 = 19;
const ENETDOWN: i32 = 100;

/// An interface that exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    pub index: u32,
    pub up: bool,
}

const PER_INTERFACE: [(&str, &str); 8] = [
    ("ipv4/conf", "route_localnet"),
    ("ipv4/conf", "proxy_arp"),
    ("ipv4/conf", "forwarding"),
    ("ipv4/conf", "rp_filter"),
    ("ipv4/neigh", "proxy_delay"),
    ("ipv6/conf", "accept_ra"),
    ("ipv6/conf", "proxy_ndp"),
    ("ipv6/conf", "forwarding"),
];

/// Settings of a host without interfaces.
pub(super) fn settings() -> BTreeMap<String, String> {
    let all = [
        ("net/ipv4/ip_forward", "0"),
        ("net/ipv6/conf/all/forwarding", "0"),
        ("net/ipv4/conf/default/rp_filter", "1"),
        ("net/netfilter/nf_conntrack_acct", "0"),
    ];
    all.into_iter().map(|(setting, value)| (setting.to_owned(), value.to_owned())).collect()
}

impl State {
    /// Makes an interface, or changes its state; `None` removes it.
    pub fn set_link(&mut self, name: &Name, link: Option<Link>) {
        let old = self.links.get(name).copied();
        let same = old.filter(|old| link.is_some_and(|link| link.index == old.index));
        if let Some(old) = old
            && (same.is_none() || link.is_none_or(|link| !link.up))
        {
            let mut gone = Vec::new();
            for (family, routes) in &mut self.routes {
                let (off, left) = routes.drain(..).partition(|(_, route)| route.index == old.index);
                *routes = left;
                let off: Vec<(RouteKey, KernelRoute)> = off;
                gone.extend(off.into_iter().map(|(key, route)| (*family, key, route)));
            }
            let neighbours: Vec<Neighbour> = self.neighbours.iter().copied().collect();
            self.neighbours.retain(|neighbour| neighbour.index != old.index);
            // Of IPv4 routes that go with their interface, the kernel says nothing.
            for (family, key, route) in gone.into_iter().filter(|(family, ..)| *family == Family::V6) {
                self.tell_route(family, key, route, true, 0);
            }
            for Neighbour { index, address, mac: _ } in neighbours.into_iter().filter(|it| it.index == old.index) {
                self.tell(News::Neighbour(NeighbourNews { index, address, mac: None }));
            }
        }
        if same.is_none() {
            for (directory, setting) in PER_INTERFACE {
                let path = format!("net/{directory}/{name}/{setting}");
                if link.is_some() {
                    self.settings.insert(path, "9".to_owned());
                } else {
                    self.settings.remove(&path);
                }
            }
        }
        match link {
            Some(link) => drop(self.links.insert(Name::clone(name), link)),
            None => drop(self.links.remove(name)),
        }
    }

    /// Performs one operation; the error is the kernel's number.
    pub fn perform_route(&mut self, family: Family, op: &RouteOp) -> Result<(), i32> {
        let routes = self.routes.entry(family).or_default();
        match op {
            RouteOp::Replace(key, route) => {
                let link = self.links.values().find(|link| link.index == route.index).ok_or(ENODEV)?;
                if !link.up {
                    return Err(ENETDOWN);
                }
                match routes.iter_mut().find(|(have, _)| have == key) {
                    Some((_, have)) => *have = *route,
                    None => routes.push((*key, *route)),
                }
            }
            RouteOp::Delete(key, index) => {
                // IPv4 takes a metric of 0 for any; the lowest goes.
                let any = family == Family::V4 && key.metric == 0;
                let is_meant = |(have, route): &(RouteKey, KernelRoute)| {
                    (have == key || any && (have.destination, have.tos) == (key.destination, key.tos))
                        && (*index == 0 || route.index == *index)
                };
                let meant = (0..routes.len()).filter(|at| is_meant(&routes[*at]));
                let at = meant.min_by_key(|at| routes[*at].0.metric).ok_or(ESRCH)?;
                routes.remove(at);
            }
        }
        Ok(())
    }

    /// Whoever has an address talks at once.
    pub(super) fn let_flow(&mut self, op: &RouteOp) {
        let RouteOp::Replace(key, route) = op else { return };
        if key.destination.prefix_len() < key.destination.max_prefix_len() {
            return;
        }
        let address = key.destination.addr();
        let former = self.flows.insert(address, route.index).filter(|former| *former != route.index);
        if let Some(former) = former.filter(|_| self.guards_flows) {
            self.complain(format!("{address} is routed to {}, but there are flows to {former}", route.index));
        }
    }

    /// Addresses with flows that have no route any more.
    pub fn orphans(&self) -> Vec<IpAddr> {
        let is_routed =
            |address: IpAddr| self.routes.values().flatten().any(|(key, _)| key.destination == IpNet::from(address));
        self.flows.keys().copied().filter(|address| !is_routed(*address)).collect()
    }

    pub(super) fn write_neighbour(&mut self, neighbour: &Neighbour) -> Result<(), i32> {
        if !self.links.values().any(|link| link.index == neighbour.index) {
            return Err(ENODEV);
        }
        self.neighbours.retain(|have| (have.index, have.address) != (neighbour.index, neighbour.address));
        self.neighbours.insert(*neighbour);
        Ok(())
    }

    pub(super) fn setting(&self, setting: &str) -> io::Result<String> {
        self.settings.get(setting).map(|value| format!("{value}\n")).ok_or_else(|| io::Error::from_raw_os_error(ENOENT))
    }

    pub(super) fn has_directory(&self, directory: &str) -> bool {
        let start = format!("{directory}/");
        self.settings.range(start.clone()..).next().is_some_and(|(setting, _)| setting.starts_with(&start))
    }
}
