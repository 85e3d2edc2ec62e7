//! Which routes of the kernel's main table are ours, and which of those may not be deleted yet
//! (host.md 9.3, 9.5).
//!
//! Pure. Invariant: a route on an interface that is not known is never ours.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use model::{LinkState, Name};

use super::plan::KernelRoute;
use crate::options::Options;

/// `RTPROT_BOOT`, the default of `DeviceRouteProtocol`.
const BOOT: u8 = 3;
/// Protocol of routes that only agents like this one make.
const OURS: u8 = 80;
/// Time in which whoever set up an interface may have routes there before its endpoint is known.
const GRACE: Duration = Duration::from_secs(10);

/// The interfaces, by name and by index.
#[derive(Debug, Default)]
pub(super) struct Interfaces {
    links: BTreeMap<Name, LinkState>,
    names: BTreeMap<u32, Name>,
    prefixes: Vec<String>,
}

/// What a link update means for routes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct LinkChange {
    /// This index is gone, with all its routes.
    pub(super) gone: Option<u32>,
    /// The interface is new, or may have been down: routes may be there, or not be there any more.
    pub(super) reread: bool,
    pub(super) came_up: bool,
}

impl Interfaces {
    pub(super) fn new(options: &Options) -> Self {
        Self { prefixes: options.interface_prefixes.clone(), ..Self::default() }
    }

    pub(super) fn update(&mut self, name: &Name, state: Option<LinkState>) -> LinkChange {
        let old = match state {
            Some(state) => self.links.insert(Name::clone(name), state),
            None => self.links.remove(name),
        };
        let gone = old.map(|old| old.index).filter(|index| state.is_none_or(|state| state.index != *index));
        // The index may have another name by now.
        let gone = gone.filter(|index| self.names.get(index) == Some(name));
        if let Some(index) = gone {
            self.names.remove(&index);
        }
        let Some(state) = state else {
            return LinkChange { gone, ..LinkChange::default() };
        };
        self.names.insert(state.index, Name::clone(name));
        let same = old.filter(|old| old.index == state.index);
        let came_up = state.up && same.is_none_or(|old| !old.up || old.generation != state.generation);
        LinkChange { gone, reread: came_up || same.is_none(), came_up }
    }

    /// Returns the index of an interface that is up.
    pub(super) fn up(&self, name: &Name) -> Option<u32> {
        self.links.get(name).filter(|link| link.up).map(|link| link.index)
    }

    pub(super) fn name(&self, index: u32) -> Option<&Name> {
        self.names.get(&index)
    }

    pub(super) fn indexes(&self) -> impl Iterator<Item = u32> {
        self.names.keys().copied()
    }

    fn is_workload(&self, index: u32) -> bool {
        self.name(index).is_some_and(|name| self.prefixes.iter().any(|prefix| name.starts_with(prefix.as_str())))
    }
}

/// The rules of host.md 9.3 as far as they matter without tunnels; their numbers are in the comments.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ownership {
    protocol: u8,
    remove_external: bool,
}

impl Ownership {
    pub(super) fn new(options: &Options) -> Self {
        Self { protocol: options.route_protocol, remove_external: options.remove_external_routes }
    }

    pub(super) fn is_ours(self, destination: &IpNet, route: &KernelRoute, interfaces: &Interfaces) -> bool {
        // 1
        if is_link_local(destination) {
            return false;
        }
        // 2
        if route.index != 0 && interfaces.name(route.index).is_none() {
            return false;
        }
        // 3
        let exclusive = if self.protocol == BOOT { OURS } else { self.protocol };
        if route.protocol == exclusive {
            return true;
        }
        // 4 and 10; 5 is about local BGP peers, which are not programmed yet.
        if route.index == 0 || !interfaces.is_workload(route.index) {
            return false;
        }
        // 6, 7
        self.remove_external || route.protocol == self.protocol
    }
}

fn is_link_local(destination: &IpNet) -> bool {
    matches!(destination, IpNet::V6(net) if net.prefix_len() == 64 && net.addr().segments() == [0xfe80, 0, 0, 0, 0, 0, 0, 0])
}

/// Interfaces whose unknown routes are left alone for a while (host.md 9.5).
#[derive(Debug, Default)]
pub(super) struct Grace {
    first_seen: BTreeMap<u32, Instant>,
    /// Had wanted routes: there is nothing to wait for any more.
    over: BTreeSet<u32>,
}

impl Grace {
    /// Notes which interfaces there are.
    pub(super) fn see(&mut self, interfaces: &Interfaces, now: Instant) {
        for index in interfaces.indexes() {
            self.first_seen.entry(index).or_insert(now);
        }
    }

    pub(super) fn forget(&mut self, index: u32) {
        self.first_seen.remove(&index);
        self.over.remove(&index);
    }

    pub(super) fn end(&mut self, index: u32) {
        self.over.insert(index);
    }

    /// Until when unknown routes of an interface may not be deleted; `None` if they may.
    pub(super) fn until(&self, index: u32, interfaces: &Interfaces, now: Instant) -> Option<Instant> {
        if !interfaces.is_workload(index) || self.over.contains(&index) {
            return None;
        }
        let until = self.first_seen.get(&index).map_or(now, |first| *first) + GRACE;
        (now < until).then_some(until)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interfaces() -> Interfaces {
        let options = Options { interface_prefixes: vec!["cali".into(), "tap".into()], ..Options::default() };
        let mut interfaces = Interfaces::new(&options);
        for (index, name) in [(1, "lo"), (2, "eth0"), (7, "cali7"), (8, "tap8")] {
            interfaces.update(&name.into(), Some(LinkState { index, up: true, generation: 0 }));
        }
        interfaces
    }

    #[test]
    fn ownership_follows_the_table() {
        // (destination, protocol, index, ours with the defaults, without RemoveExternalRoutes, with protocol 99)
        let cases = [
            ("fe80::/64", 2, 7, false, false, false),
            ("fe80::/64", 80, 7, false, false, false),
            ("fe80::1/128", 2, 7, true, false, true),
            ("10.65.0.9/32", 4, 77, false, false, false),
            ("10.65.0.9/32", 80, 77, false, false, false),
            ("10.65.5.0/26", 80, 2, true, true, false),
            ("10.65.5.0/26", 99, 2, false, false, true),
            ("10.65.0.0/26", 80, 0, true, true, false),
            ("10.65.0.0/26", 12, 0, false, false, false),
            ("10.65.5.0/26", 12, 2, false, false, false),
            ("0.0.0.0/0", 16, 2, false, false, false),
            ("10.65.0.9/32", 4, 7, true, false, true),
            ("10.65.0.9/32", 3, 8, true, true, true),
            ("169.254.0.0/16", 2, 8, true, false, true),
            ("fd10::9/128", 3, 8, true, true, true),
            ("10.65.0.9/32", 99, 8, true, false, true),
        ];
        let interfaces = interfaces();
        for (destination, protocol, index, default, internal, other) in cases {
            let destination: IpNet = destination.parse().unwrap();
            let route = KernelRoute { index, protocol, kind: 1, scope: 253, special: false };
            let ours = |protocol, remove_external| {
                Ownership { protocol, remove_external }.is_ours(&destination, &route, &interfaces)
            };
            let got = (ours(3, true), ours(3, false), ours(99, true));
            assert_eq!(got, (default, internal, other), "{destination} proto {protocol} index {index}");
        }
    }

    #[test]
    fn an_interface_has_ten_seconds_unless_it_had_routes() {
        let interfaces = interfaces();
        let start = Instant::now();
        let mut grace = Grace::default();
        grace.see(&interfaces, start);
        grace.see(&interfaces, start + Duration::from_secs(5));
        let end = start + GRACE;
        assert_eq!(grace.until(7, &interfaces, start), Some(end));
        assert_eq!(grace.until(7, &interfaces, end - Duration::from_millis(1)), Some(end));
        assert_eq!(grace.until(7, &interfaces, end), None);
        assert_eq!(grace.until(2, &interfaces, start), None, "not a workload interface");
        grace.end(8);
        assert_eq!(grace.until(8, &interfaces, start), None);
        grace.forget(8);
        grace.see(&interfaces, end);
        assert_eq!(grace.until(8, &interfaces, end), Some(end + GRACE));
    }

    #[test]
    fn link_updates_say_what_they_mean_for_routes() {
        let mut interfaces = Interfaces::default();
        let (a, b): (Name, Name) = ("a".into(), "b".into());
        let up = |index, generation| Some(LinkState { index, up: true, generation });
        let down = |index| Some(LinkState { index, up: false, generation: 1 });
        let nothing = LinkChange::default();
        let new_up = LinkChange { gone: None, reread: true, came_up: true };
        assert_eq!(interfaces.update(&a, up(1, 1)), new_up);
        assert_eq!(interfaces.update(&a, up(1, 1)), nothing);
        assert_eq!(interfaces.update(&a, up(1, 2)), new_up, "a short outage");
        assert_eq!(interfaces.update(&a, down(1)), nothing);
        assert_eq!(interfaces.update(&a, up(2, 3)), LinkChange { gone: Some(1), ..new_up });
        assert_eq!(interfaces.update(&b, down(3)), LinkChange { reread: true, ..nothing });
        // A rename seen in the wrong order: the index lives on under its new name.
        assert_eq!(interfaces.update(&b, up(2, 4)), LinkChange { gone: Some(3), ..new_up });
        assert_eq!(interfaces.update(&a, None), nothing);
        assert_eq!(interfaces.name(2), Some(&b));
        assert_eq!(interfaces.update(&b, None), LinkChange { gone: Some(2), ..nothing });
    }
}
