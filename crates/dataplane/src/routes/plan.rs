//! Wanted routes of one family, what the kernel has of ours, and the changes between the two.
//!
//! Fed by the route driver with wishes, readings, outcomes and news; gives it changes, and the addresses that
//! left (host.md 10). Pure.
//!
//! A route's identity in the kernel's table is its [`RouteKey`]; several interfaces may want the same
//! key, and the newest of those that are up gets it (host.md 9.2).
//!
//! Invariants: only routes that are ours are known here, so nothing else is ever deleted; a key is
//! looked at again whenever something changed that its route depends on.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};
use std::time::Instant;

use ipnet::IpNet;
use model::{Family, Name};
use program::RouteSpec;

use super::own::{Grace, Interfaces, Ownership};

/// `RTN_UNICAST`.
pub(super) const UNICAST: u8 = 1;
/// `RT_SCOPE_LINK`.
pub(super) const SCOPE_LINK: u8 = 253;
/// What IPv6 makes of a metric of 0.
const IPV6_METRIC: u32 = 1024;

/// Identity of a route in the main table of its family (host.md 7.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct RouteKey {
    pub destination: IpNet,
    pub tos: u8,
    pub metric: u32,
}

impl RouteKey {
    fn of(spec: &RouteSpec) -> Self {
        let metric = match spec.destination {
            IpNet::V6(_) if spec.metric == 0 => IPV6_METRIC,
            IpNet::V4(_) | IpNet::V6(_) => spec.metric,
        };
        Self { destination: spec.destination.trunc(), tos: 0, metric }
    }
}

/// A route without its key, as far as it matters whether it is the wanted one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KernelRoute {
    /// Outgoing interface; 0 for routes that have none, or several.
    pub index: u32,
    pub protocol: u8,
    pub kind: u8,
    pub scope: u8,
    /// Has something that wanted routes never have: a gateway, a source, a limit.
    pub special: bool,
}

/// One change of the kernel's table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RouteOp {
    /// Creates the route, or replaces what has its key.
    Replace(RouteKey, KernelRoute),
    /// Deletes the route of this key on this interface (0: on whichever).
    Delete(RouteKey, u32),
}

/// What to do, in order.
#[derive(Debug, Default)]
pub(super) struct Plan {
    pub(super) ops: Vec<RouteOp>,
    /// When a route may be deleted that is still protected.
    pub(super) protected_until: Option<Instant>,
}

/// What a change by somebody else means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Heard {
    Nothing,
    /// A route of ours that is not wanted went.
    Vanished,
    /// A wanted route went.
    Lost,
    /// A wanted route may not be what it was.
    Doubtful,
}

/// Returns the address that a route leads to, if it is a single one: only these have flows of their own
/// (host.md 10).
pub(super) fn address_of(destination: &IpNet) -> Option<IpAddr> {
    (destination.prefix_len() == destination.max_prefix_len()).then(|| destination.addr())
}

/// Routes of one family.
#[derive(Debug)]
pub(super) struct Table {
    pub(super) family: Family,
    protocol: u8,
    /// Per interface, with the address of the workload on the link.
    wanted: BTreeMap<Name, BTreeMap<RouteKey, Option<[u8; 6]>>>,
    /// Who wants a key.
    claims: BTreeMap<RouteKey, BTreeSet<Name>>,
    /// What the kernel has of ours; several per key only if somebody else made them.
    kernel: BTreeMap<RouteKey, Vec<KernelRoute>>,
    dirty: BTreeSet<RouteKey>,
    /// Not deleted because their interface is new.
    protected: BTreeSet<RouteKey>,
    /// Interface that a destination's route was wanted on when everything was last as wanted (host.md 10.2).
    owners: BTreeMap<IpNet, u32>,
    /// Destinations whose owner may be another one by now.
    unsettled: BTreeSet<IpNet>,
    /// Routes that went without our doing, and on which interface.
    vanished: Vec<(RouteKey, u32)>,
    pub(super) grace: Grace,
}

impl Table {
    pub(super) fn new(family: Family, protocol: u8) -> Self {
        Self {
            family,
            protocol,
            wanted: BTreeMap::new(),
            claims: BTreeMap::new(),
            kernel: BTreeMap::new(),
            dirty: BTreeSet::new(),
            protected: BTreeSet::new(),
            owners: BTreeMap::new(),
            unsettled: BTreeSet::new(),
            vanished: Vec::new(),
            grace: Grace::default(),
        }
    }

    /// Takes the complete list of one interface's routes. Routes of the other family are left out.
    /// Returns true if it differs from before.
    pub(super) fn want(&mut self, name: &Name, specs: &[RouteSpec]) -> bool {
        let new: BTreeMap<RouteKey, Option<[u8; 6]>> = specs
            .iter()
            .filter(|spec| Family::of(&spec.destination) == self.family)
            .map(|spec| (RouteKey::of(spec), spec.mac))
            .collect();
        let old = self.wanted.remove(name).unwrap_or_default();
        for key in old.keys().filter(|key| !new.contains_key(key)) {
            if let Some(names) = self.claims.get_mut(key) {
                names.remove(name);
                if names.is_empty() {
                    self.claims.remove(key);
                }
            }
            self.dirty.insert(*key);
        }
        for key in new.keys().filter(|key| !old.contains_key(key)) {
            self.claims.entry(*key).or_default().insert(Name::clone(name));
            self.dirty.insert(*key);
        }
        let changed = old != new;
        if !new.is_empty() {
            self.wanted.insert(Name::clone(name), new);
        }
        changed
    }

    /// The interface changed its state: everything it wants is looked at again.
    pub(super) fn touch(&mut self, name: &Name) {
        self.dirty.extend(self.wanted.get(name).into_iter().flat_map(BTreeMap::keys));
    }

    /// The interface is gone, and with it, the kernel's routes through it.
    pub(super) fn forget_index(&mut self, index: u32) {
        self.grace.forget(index);
        let vanished = &mut self.vanished;
        self.kernel.retain(|key, routes| {
            let known = routes.len();
            routes.retain(|route| route.index != index);
            if routes.len() < known {
                vanished.push((*key, index));
            }
            !routes.is_empty()
        });
    }

    /// Takes what was read: everything if `complete`, otherwise only additions to what was known.
    pub(super) fn read(&mut self, routes: BTreeMap<RouteKey, Vec<KernelRoute>>, complete: bool) {
        if complete {
            for (key, old) in std::mem::replace(&mut self.kernel, routes) {
                let new = self.kernel.get(&key).map_or(&[][..], Vec::as_slice);
                let went = old.iter().filter(|old| !new.iter().any(|new| new.index == old.index));
                self.vanished.extend(went.map(|old| (key, old.index)));
            }
        } else {
            self.kernel.extend(routes);
        }
        self.dirty.extend(self.kernel.keys());
        self.dirty.extend(self.claims.keys());
    }

    /// Plans for all keys that changed. Protected routes are looked at again at every call.
    pub(super) fn plan(&mut self, interfaces: &Interfaces, now: Instant, may_delete: bool) -> Plan {
        for name in self.wanted.keys() {
            if let Some(index) = interfaces.up(name) {
                self.grace.end(index);
            }
        }
        let mut dirty = std::mem::take(&mut self.dirty);
        dirty.append(&mut self.protected);
        self.unsettled.extend(dirty.iter().map(|key| key.destination));
        let (mut early, mut replace, mut late) = (Vec::new(), Vec::new(), Vec::new());
        let mut protected_until: Option<Instant> = None;
        for key in dirty {
            let desired = self.desired(&key, interfaces);
            let present = self.kernel.get(&key).map_or(&[][..], Vec::as_slice);
            if let Some(route) = desired
                && !present.contains(&route)
            {
                let moves = self.moves(&key, route.index, present, interfaces);
                if moves && !may_delete {
                    self.dirty.insert(key);
                } else if moves {
                    // It is written when the flows of its former holder are gone (host.md 10.3, 10.4).
                    early.extend(present.iter().map(|route| RouteOp::Delete(key, route.index)));
                    self.dirty.insert(key);
                } else {
                    // Whatever else has this key is replaced, or seen and deleted at the next reading.
                    replace.push(RouteOp::Replace(key, route));
                }
                continue;
            }
            for route in present.iter().filter(|route| Some(**route) != desired) {
                if let Some(until) = self.grace.until(route.index, interfaces, now) {
                    self.protected.insert(key);
                    protected_until = Some(protected_until.map_or(until, |earlier| earlier.min(until)));
                } else if !may_delete {
                    self.dirty.insert(key);
                } else if self.has_successor(&key, route.index, interfaces) {
                    late.push(RouteOp::Delete(key, route.index));
                } else {
                    early.push(RouteOp::Delete(key, route.index));
                }
            }
        }
        early.append(&mut replace);
        early.append(&mut late);
        Plan { ops: early, protected_until }
    }

    /// Records that a change was made. Returns true if the table must be read to know its effect.
    pub(super) fn done(&mut self, op: &RouteOp) -> bool {
        match op {
            RouteOp::Replace(key, route) => {
                // Which one of several was replaced is not known.
                self.kernel.insert(*key, vec![*route]).is_some_and(|routes| routes.len() > 1)
            }
            RouteOp::Delete(key, index) => {
                if let Some(routes) = self.kernel.get_mut(key) {
                    if let Some(at) = routes.iter().position(|route| route.index == *index) {
                        routes.remove(at);
                    }
                    if routes.is_empty() {
                        self.kernel.remove(key);
                    }
                }
                // IPv4 takes a metric of 0 in a deletion for "any": if the route was gone already, another
                // one of the same destination went in its place.
                let others = self.kernel_of(key.destination).any(|(_, route)| route.index == *index);
                self.family == Family::V4 && key.metric == 0 && others
            }
        }
    }

    /// Takes what somebody else did to a route.
    pub(super) fn heard(&mut self, key: RouteKey, route: &KernelRoute, gone: bool) -> Heard {
        let wanted = self.claims.contains_key(&key);
        let known = self.kernel.get_mut(&key);
        if !gone {
            // Which of several routes of this key it has replaced, if any, is not always told; and that a
            // flag of a known one changed is no news.
            let news = wanted && known.is_none_or(|routes| !routes.contains(route));
            return if news { Heard::Doubtful } else { Heard::Nothing };
        }
        let Some(routes) = known else { return Heard::Nothing };
        let Some(at) = routes.iter().position(|known| known.index == route.index) else { return Heard::Nothing };
        routes.remove(at);
        if routes.is_empty() {
            self.kernel.remove(&key);
        }
        self.vanished.push((key, route.index));
        self.dirty.insert(key);
        if wanted { Heard::Lost } else { Heard::Vanished }
    }

    /// Returns the addresses whose flows must be forgotten because of routes that went without our doing
    /// (host.md 10.2).
    pub(super) fn departures(&mut self, interfaces: &Interfaces) -> Vec<IpAddr> {
        let vanished = std::mem::take(&mut self.vanished);
        vanished.into_iter().filter_map(|(key, index)| self.departure(&key, index, interfaces)).collect()
    }

    /// Returns the address whose flows must be forgotten, if any, now that a route of this key through this
    /// interface is gone (the table of host.md 10.2).
    pub(super) fn departure(&self, key: &RouteKey, index: u32, interfaces: &Interfaces) -> Option<IpAddr> {
        let address = address_of(&key.destination)?;
        match self.owner(key.destination, interfaces) {
            None => Some(address),
            Some(owner) if owner == index => None,
            Some(owner) => (self.owners.get(&key.destination) != Some(&owner)).then_some(address),
        }
    }

    /// Notes who owns what, for what is as wanted.
    pub(super) fn settle(&mut self, interfaces: &Interfaces) {
        let open: BTreeSet<IpNet> = self.dirty.iter().map(|key| key.destination).collect();
        for destination in std::mem::take(&mut self.unsettled) {
            if open.contains(&destination) {
                self.unsettled.insert(destination);
            } else if let Some(owner) = self.owner(destination, interfaces) {
                self.owners.insert(destination, owner);
            } else {
                self.owners.remove(&destination);
            }
        }
    }

    /// Whether this route may be written only after that of its former holder was deleted and his flows were
    /// forgotten (host.md 10.3).
    fn moves(&self, key: &RouteKey, index: u32, present: &[KernelRoute], interfaces: &Interfaces) -> bool {
        present.iter().all(|route| route.index != index)
            && present.iter().any(|route| self.departure(key, route.index, interfaces).is_some())
    }

    /// The interface through which a destination is to be reached: by the route that the kernel would choose.
    fn owner(&self, destination: IpNet, interfaces: &Interfaces) -> Option<u32> {
        self.claims
            .range(RouteKey { destination, tos: 0, metric: 0 }..)
            .take_while(|(key, _)| key.destination == destination)
            .find_map(|(key, _)| self.desired(key, interfaces))
            .map(|route| route.index)
    }

    /// Whether a wanted route has a key and where it should lead.
    pub(super) fn wanted_on(&self, key: &RouteKey, interfaces: &Interfaces) -> Option<u32> {
        self.desired(key, interfaces).map(|route| route.index)
    }

    /// Interfaces that want an address.
    pub(super) fn holders_of(&self, address: Ipv4Addr) -> impl Iterator<Item = &Name> {
        let destination = IpNet::from(IpAddr::from(address));
        let keys = self.claims.range(RouteKey { destination, tos: 0, metric: 0 }..);
        keys.take_while(move |(key, _)| key.destination == destination).flat_map(|(_, names)| names)
    }

    /// Whether a key is to be looked at again.
    pub(super) fn is_open(&self, key: &RouteKey) -> bool {
        self.dirty.contains(key)
    }

    /// Addresses whose routes are to be looked at again, and wanted.
    pub(super) fn open_addresses(&self, interfaces: &Interfaces) -> impl Iterator<Item = IpAddr> {
        let wanted = self.dirty.iter().filter(|key| self.desired(key, interfaces).is_some());
        wanted.filter_map(|key| address_of(&key.destination))
    }

    /// Looks at a key again at the next plan.
    pub(super) fn retry(&mut self, key: RouteKey) {
        self.dirty.insert(key);
    }

    /// Static neighbours of an interface: every single address with the workload's link address.
    pub(super) fn neighbours(&self, name: &Name) -> impl Iterator<Item = (Ipv4Addr, [u8; 6])> {
        self.wanted.get(name).into_iter().flatten().filter_map(|(key, mac)| match key.destination {
            IpNet::V4(net) if net.prefix_len() == 32 => Some((net.addr(), (*mac)?)),
            IpNet::V4(_) | IpNet::V6(_) => None,
        })
    }

    /// Interfaces that want routes.
    pub(super) fn interfaces(&self) -> impl Iterator<Item = &Name> {
        self.wanted.keys()
    }

    /// Keeps of what was read those routes that are ours.
    pub(super) fn ours(
        &self,
        routes: Vec<(RouteKey, KernelRoute)>,
        ownership: Ownership,
        interfaces: &Interfaces,
    ) -> BTreeMap<RouteKey, Vec<KernelRoute>> {
        let mut ours: BTreeMap<RouteKey, Vec<KernelRoute>> = BTreeMap::new();
        for (key, route) in routes {
            if ownership.is_ours(&key.destination, &route, interfaces) {
                ours.entry(key).or_default().push(route);
            }
        }
        ours
    }

    /// The route that a key should have: through the newest interface that wants it and is up.
    fn desired(&self, key: &RouteKey, interfaces: &Interfaces) -> Option<KernelRoute> {
        let index = self.claims.get(key)?.iter().filter_map(|name| interfaces.up(name)).max()?;
        let scope = match self.family {
            Family::V4 => SCOPE_LINK,
            // The kernel knows no other (host.md 7.2).
            Family::V6 => 0,
        };
        Some(KernelRoute { index, protocol: self.protocol, kind: UNICAST, scope, special: false })
    }

    /// Whether another route is wanted for the same destination through the same interface: then that
    /// one is written before this one is deleted (host.md 9.7, trace A).
    fn has_successor(&self, key: &RouteKey, index: u32, interfaces: &Interfaces) -> bool {
        let first = RouteKey { tos: 0, metric: 0, ..*key };
        self.claims
            .range(first..)
            .take_while(|(other, _)| other.destination == key.destination)
            .any(|(other, _)| other != key && self.desired(other, interfaces).is_some_and(|route| route.index == index))
    }

    fn kernel_of(&self, destination: IpNet) -> impl Iterator<Item = (&RouteKey, &KernelRoute)> {
        self.kernel
            .range(RouteKey { destination, tos: 0, metric: 0 }..)
            .take_while(move |(key, _)| key.destination == destination)
            .flat_map(|(key, routes)| routes.iter().map(move |route| (key, route)))
    }
}
