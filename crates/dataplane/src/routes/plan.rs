//! Wanted routes of one family, what the kernel has of ours, and the changes between the two.
//!
//! Fed by the route driver with wishes, readings and outcomes; gives it changes. Pure.
//!
//! A route's identity in the kernel's table is its [`RouteKey`]; several interfaces may want the same
//! key, and the newest of those that are up gets it (host.md 9.2).
//!
//! Invariants: only routes that are ours are known here, so nothing else is ever deleted; a key is
//! looked at again whenever something changed that its route depends on.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
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
        self.kernel.retain(|_, routes| {
            routes.retain(|route| route.index != index);
            !routes.is_empty()
        });
    }

    /// Takes what was read: everything if `complete`, otherwise only additions to what was known.
    pub(super) fn read(&mut self, routes: BTreeMap<RouteKey, Vec<KernelRoute>>, complete: bool) {
        if complete {
            self.kernel = routes;
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
        let (mut early, mut replace, mut late) = (Vec::new(), Vec::new(), Vec::new());
        let mut protected_until: Option<Instant> = None;
        for key in dirty {
            let desired = self.desired(&key, interfaces);
            let present = self.kernel.get(&key).map_or(&[][..], Vec::as_slice);
            if let Some(route) = desired
                && !present.contains(&route)
            {
                // Whatever else has this key is replaced, or seen and deleted at the next reading.
                replace.push(RouteOp::Replace(key, route));
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
