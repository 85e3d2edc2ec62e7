//! Endpoints and network sets in as little memory as possible: there may be hundreds of thousands.
//!
//! An endpoint with one address is a record of sixteen bytes, its address with thirty-two, its name in
//! an arena, and a place in two hash tables: by name, and by address.

use std::cmp::Ordering;
use std::hash::{BuildHasher as _, Hash as _, Hasher as _};
use std::net::IpAddr;

use hashbrown::HashTable;
use hashbrown::hash_table::Entry;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use model::{EndpointPort, HostEndpoint, Name, NetworkSet, WorkloadEndpoint, WorkloadEndpointKey};
use smallvec::SmallVec;

use super::Contribution;
use crate::kit::{Bytes, Column, IdMap, Interner, Seed, Strings, make_room, shrink, words};
use crate::names::Names;

/// Identity of an object.
#[derive(Clone, Copy, Debug)]
pub(crate) enum ObjectKey<'a> {
    Endpoint(&'a WorkloadEndpointKey),
    NetworkSet(&'a Name),
    HostEndpoint(&'a Name),
}

/// Addresses of an object: sorted, each once, none of length zero. Most objects have one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Nets(SmallVec<[IpNet; 4]>);

impl Nets {
    /// The addresses of an endpoint; a prefix length, if any, is ignored (M-10).
    pub(crate) fn of_endpoint(endpoint: &WorkloadEndpoint) -> Self {
        let v4 = endpoint.v4_nets.iter().map(|net| IpNet::from(IpAddr::V4(net.addr())));
        let v6 = endpoint.v6_nets.iter().map(|net| IpNet::from(IpAddr::V6(net.addr())));
        Self::sorted(v4.chain(v6).collect())
    }

    /// The expected addresses of a host endpoint; those of its interface do not count (M-10).
    pub(crate) fn of_host_endpoint(endpoint: &HostEndpoint) -> Self {
        let v4 = endpoint.expected_v4.iter().map(|address| IpNet::from(IpAddr::V4(*address)));
        let v6 = endpoint.expected_v6.iter().map(|address| IpNet::from(IpAddr::V6(*address)));
        Self::sorted(v4.chain(v6).collect())
    }

    /// The networks of a network set. The kernel's sets cannot hold a network of length zero: it
    /// becomes two halves (M-10).
    pub(crate) fn of_network_set(set: &NetworkSet) -> Self {
        let mut nets = SmallVec::new();
        for net in &set.nets {
            match net {
                IpNet::V4(net) if net.prefix_len() == 0 => {
                    nets.extend(Ipv4Net::default().subnets(1).into_iter().flatten().map(IpNet::V4));
                }
                IpNet::V6(net) if net.prefix_len() == 0 => {
                    nets.extend(Ipv6Net::default().subnets(1).into_iter().flatten().map(IpNet::V6));
                }
                IpNet::V4(_) | IpNet::V6(_) => nets.push(net.trunc()),
            }
        }
        Self::sorted(nets)
    }

    fn sorted(mut nets: SmallVec<[IpNet; 4]>) -> Self {
        nets.sort_unstable();
        nets.dedup();
        Self(nets)
    }

    pub(crate) fn iter(&self) -> std::slice::Iter<'_, IpNet> {
        self.0.iter()
    }

    /// Holds these from now on, which are sorted.
    pub(super) fn refill(&mut self, nets: impl Iterator<Item = IpNet>) {
        self.0.clear();
        self.0.extend(nets);
    }
}

/// All objects, numbered densely.
#[derive(Debug, Default)]
pub(super) struct Objects {
    records: Column<Object>,
    /// What tells objects of one place apart: of an endpoint, the length of its workload and then workload
    /// and endpoint, which may hold any characters; of a network set or host endpoint, its name.
    names: Bytes,
    /// What many objects have in common: kind, and the numbers of host and orchestrator.
    places: Strings,
    by_key: HashTable<u32>,
    addresses: Addresses,
    /// Most have none.
    ports: IdMap<u32, u32>,
    port_lists: Interner<Box<[EndpointPort]>>,
    seed: Seed,
    /// Numbers that have ever been given out.
    numbers: u32,
    /// The first number that stands for nothing, plus one.
    free: u32,
    key: Vec<u8>,
    /// The place of the endpoint that was asked for last.
    recent: u32,
}

/// An object is not there: its place, if anything is in it, and its hash.
#[derive(Clone, Copy, Debug)]
pub(super) struct Missing(Option<(u32, u64)>);

#[derive(Clone, Copy, Debug, Default)]
struct Object {
    name: u32,
    place: u32,
    /// Of a number that stands for nothing, the next such number, plus one.
    class: u32,
    /// The first of its addresses.
    first: Link,
}

/// The networks of all objects, and who has a given one.
#[derive(Debug, Default)]
struct Addresses {
    slots: Column<Address>,
    /// The first of those that have the same network.
    by_net: HashTable<u32>,
    seed: Seed,
    numbers: u32,
    free: Link,
}

#[derive(Clone, Copy, Debug, Default)]
struct Address {
    net: IpNet,
    object: u32,
    /// The next of the object, or of the free ones.
    next: Link,
    /// The next with the same network.
    same: Link,
}

/// A number, or nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Link(u32);

impl Default for Link {
    fn default() -> Self {
        Self(u32::MAX)
    }
}

impl Link {
    fn get(self) -> Option<u32> {
        (self != Self::default()).then_some(self.0)
    }
}

/// A network that an object got or lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NetChange {
    pub(super) net: IpNet,
    pub(super) added: bool,
    /// Other objects have it too.
    pub(super) is_shared: bool,
}

/// First byte of a place.
const ENDPOINT: u8 = 0;
const NETWORK_SET: u8 = 1;
const HOST_ENDPOINT: u8 = 2;

impl ObjectKey<'_> {
    fn write_name(&self, bytes: &mut Vec<u8>) {
        match self {
            Self::Endpoint(key) => {
                push_length(bytes, key.workload.len());
                bytes.extend_from_slice(key.workload.as_bytes());
                bytes.extend_from_slice(key.endpoint.as_bytes());
            }
            Self::NetworkSet(name) | Self::HostEndpoint(name) => bytes.extend_from_slice(name.as_bytes()),
        }
    }
}

/// Appends a length in bytes of seven bits, lowest first.
fn push_length(bytes: &mut Vec<u8>, mut length: usize) {
    while length > 0x7f {
        bytes.push(length as u8 | 0x80);
        length >>= 7;
    }
    bytes.push(length as u8);
}

type Place = SmallVec<[u8; 16]>;

fn place_of_endpoint(host: u32, orchestrator: u32) -> Place {
    let mut place = Place::from_slice(&[ENDPOINT]);
    place.extend_from_slice(&host.to_le_bytes());
    place.extend_from_slice(&orchestrator.to_le_bytes());
    place
}

impl Objects {
    fn hash(seed: &Seed, place: u32, name: &[u8]) -> u64 {
        let mut hasher = seed.build_hasher();
        place.hash(&mut hasher);
        name.hash(&mut hasher);
        hasher.finish()
    }

    /// Returns the number of a place that some object is in.
    fn find_place(&self, names: &Names, key: &ObjectKey<'_>) -> Option<u32> {
        match key {
            ObjectKey::Endpoint(key) if self.is_recent(names, key) => Some(self.recent),
            ObjectKey::Endpoint(key) => {
                let (host, orchestrator) = (names.find(&key.host)?, names.find(&key.orchestrator)?);
                self.places.find(&place_of_endpoint(host, orchestrator))
            }
            ObjectKey::NetworkSet(_) => self.places.find(&[NETWORK_SET]),
            ObjectKey::HostEndpoint(_) => self.places.find(&[HOST_ENDPOINT]),
        }
    }

    /// Endpoints of one host often come one after the other.
    fn is_recent(&self, names: &Names, key: &WorkloadEndpointKey) -> bool {
        if self.places.uses(self.recent) == 0 {
            return false;
        }
        let Some((&ENDPOINT, place)) = self.places.get(self.recent).split_first() else { return false };
        words(place).map(|name| names.get_bytes(name)).eq([key.host.as_bytes(), key.orchestrator.as_bytes()])
    }

    /// Returns number and class of an object, or what [`insert`](Self::insert) needs to know.
    pub(super) fn find(&mut self, names: &Names, key: &ObjectKey<'_>) -> Result<(u32, u32), Missing> {
        self.key.clear();
        key.write_name(&mut self.key);
        let Some(place) = self.find_place(names, key) else { return Err(Missing(None)) };
        self.recent = place;
        let is_it = |id: &u32| {
            let object = self.records.get(*id);
            object.is_some_and(|object| object.place == place && self.names.get(object.name) == self.key)
        };
        let hash = Self::hash(&self.seed, place, &self.key);
        let id = self.by_key.find(hash, is_it).copied();
        let known = id.and_then(|id| self.records.get(id).map(|object| (id, object.class)));
        known.ok_or(Missing(Some((place, hash))))
    }

    /// Adds an object that is not there, as [`find`](Self::find) has just said.
    pub(super) fn insert(
        &mut self,
        names: &mut Names,
        key: &ObjectKey<'_>,
        missing: Missing,
        class: u32,
        new: &Contribution<'_>,
        changes: &mut Vec<NetChange>,
    ) -> u32 {
        let place = match (missing.0, key) {
            (Some((place, _)), _) => {
                self.places.retain(place);
                place
            }
            // The uses of the names go with the place.
            (None, ObjectKey::Endpoint(key)) => {
                let [host, orchestrator] = [&key.host, &key.orchestrator].map(|name| names.acquire(name));
                self.places.acquire(&place_of_endpoint(host, orchestrator)).0
            }
            (None, ObjectKey::NetworkSet(_)) => self.places.acquire(&[NETWORK_SET]).0,
            (None, ObjectKey::HostEndpoint(_)) => self.places.acquire(&[HOST_ENDPOINT]).0,
        };
        let hash = missing.0.map_or_else(|| Self::hash(&self.seed, place, &self.key), |(_, hash)| hash);
        let id = self.free.checked_sub(1).unwrap_or(self.numbers);
        let record = self.records.slot(id);
        match self.free {
            0 => self.numbers += 1,
            _ => self.free = record.class,
        }
        *record = Object { name: self.names.insert(&self.key), place, class, first: Link::default() };
        record.first = self.addresses.replace(id, Link::default(), &new.nets, changes);
        self.set_ports(id, new.ports);
        let Self { records, names, by_key, seed, .. } = self;
        make_room(by_key, |id| Self::rehash(records, names, seed, *id));
        by_key.insert_unique(hash, id, |id| Self::rehash(records, names, seed, *id));
        id
    }

    fn rehash(records: &Column<Object>, names: &Bytes, seed: &Seed, id: u32) -> u64 {
        records.get(id).map_or(0, |object| Self::hash(seed, object.place, names.get(object.name)))
    }

    /// Replaces what an object is and brings; appends the networks that it got and lost, in order, to `changes`.
    pub(super) fn replace(&mut self, id: u32, class: u32, new: &Contribution<'_>, changes: &mut Vec<NetChange>) {
        if let Some(object) = self.records.get_mut(id) {
            object.class = class;
            object.first = self.addresses.replace(id, object.first, &new.nets, changes);
        }
        self.set_ports(id, new.ports);
    }

    /// Forgets an object; appends its networks to `changes`.
    pub(super) fn remove(&mut self, names: &mut Names, id: u32, changes: &mut Vec<NetChange>) {
        let Some(object) = self.records.get_mut(id) else {
            debug_assert!(false, "removed an object that does not exist");
            return;
        };
        let Object { name, place, first, .. } = *object;
        *object = Object { class: std::mem::replace(&mut self.free, id + 1), ..Object::default() };
        self.addresses.replace(id, first, &Nets::default(), changes);
        self.set_ports(id, &[]);
        let hash = Self::hash(&self.seed, place, self.names.get(name));
        match self.by_key.find_entry(hash, |known| *known == id) {
            Ok(entry) => drop(entry.remove()),
            Err(_) => debug_assert!(false, "an object was not under its hash"),
        }
        self.names.remove(name);
        if self.places.uses(place) == 1
            && let Some((&ENDPOINT, numbers)) = self.places.get(place).split_first()
        {
            words(numbers).for_each(|name| names.release(name));
        }
        self.places.release(place);

        let Self { records, names, by_key, seed, .. } = self;
        if by_key.is_empty() {
            *self = Self { seed: seed.clone(), ..Self::default() };
            return;
        }
        shrink(by_key, |id| Self::rehash(records, names, seed, *id));
    }

    fn set_ports(&mut self, id: u32, ports: &[EndpointPort]) {
        if ports.is_empty() && self.ports.is_empty() {
            return;
        }
        let old = if ports.is_empty() {
            self.ports.remove(&id)
        } else {
            let (list, _) = self.port_lists.acquire_ref(ports, |ports| ports.into());
            self.ports.insert(id, list)
        };
        if let Some(old) = old {
            self.port_lists.release(old);
        }
        if self.ports.is_empty() {
            self.ports = IdMap::default();
        }
    }

    /// The networks of an object, sorted.
    pub(super) fn nets(&self, id: u32) -> impl Iterator<Item = IpNet> {
        self.addresses.chain(self.records.get(id).map_or(Link::default(), |object| object.first))
    }

    /// As [`nets`](Self::nets), for one object after the other.
    #[inline]
    pub(super) fn for_each_net(&self, id: u32, mut found: impl FnMut(&IpNet)) {
        let mut at = self.records.get(id).map_or(Link::default(), |object| object.first);
        while let Some(address) = at.get().and_then(|number| self.addresses.slots.get(number)) {
            found(&address.net);
            at = address.next;
        }
    }

    pub(super) fn ports(&self, id: u32) -> &[EndpointPort] {
        let list = (!self.ports.is_empty()).then(|| self.ports.get(&id)).flatten();
        list.and_then(|list| self.port_lists.get(*list)).map_or(&[], |ports| ports)
    }

    /// The objects that have exactly this network, with their classes.
    pub(super) fn owners(&self, net: IpNet) -> impl Iterator<Item = (u32, u32)> {
        self.addresses.owners(net).filter_map(|id| Some((id, self.records.get(id)?.class)))
    }

    pub(super) fn len(&self) -> usize {
        self.by_key.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.by_key.is_empty()
    }
}

/// As `cmp`, but nearly all are networks of IPv4.
fn compare(one: &IpNet, other: &IpNet) -> Ordering {
    match (one, other) {
        (IpNet::V4(one), IpNet::V4(other)) => {
            (one.addr().to_bits(), one.prefix_len()).cmp(&(other.addr().to_bits(), other.prefix_len()))
        }
        (IpNet::V6(_), _) | (IpNet::V4(_), IpNet::V6(_)) => one.cmp(other),
    }
}

impl Addresses {
    /// Makes the chain of an object that of these networks, and returns its first link.
    fn replace(&mut self, object: u32, first: Link, nets: &Nets, changes: &mut Vec<NetChange>) -> Link {
        let mut result = first;
        // The link behind which we are, and the one that follows.
        let (mut before, mut at) = (Link::default(), first);
        let mut new = nets.iter().peekable();
        loop {
            let old = at.get().and_then(|number| self.slots.get(number));
            let order = match (old, new.peek()) {
                (None, None) => break,
                (None, Some(_)) => Ordering::Greater,
                (Some(_), None) => Ordering::Less,
                (Some(old), Some(new)) => compare(&old.net, new),
            };
            let (net, next) = old.map(|old| (old.net, old.next)).unwrap_or_default();
            match order {
                Ordering::Equal => {
                    (before, at) = (at, next);
                    new.next();
                }
                Ordering::Less => {
                    let is_shared = self.remove(at.0);
                    changes.push(NetChange { net, added: false, is_shared });
                    *self.place_behind(before, &mut result) = next;
                    at = next;
                }
                Ordering::Greater => {
                    let Some(net) = new.next() else { break };
                    let (added, is_shared) = self.insert(*net, object, at);
                    changes.push(NetChange { net: *net, added: true, is_shared });
                    *self.place_behind(before, &mut result) = Link(added);
                    before = Link(added);
                }
            }
        }
        result
    }

    fn place_behind<'a>(&'a mut self, before: Link, first: &'a mut Link) -> &'a mut Link {
        match before.get().and_then(|number| self.slots.get_mut(number)) {
            Some(address) => &mut address.next,
            None => first,
        }
    }

    /// Returns the number and whether somebody else has the network too.
    fn insert(&mut self, net: IpNet, object: u32, next: Link) -> (u32, bool) {
        let Self { slots, by_net, seed, numbers, free } = self;
        let number = free.get().unwrap_or(*numbers);
        let of = |number: &u32| slots.get(*number).map(|address| address.net);
        let hash = |number: &u32| seed.hash_one(of(number).unwrap_or_default());
        make_room(by_net, hash);
        let place = by_net.entry(seed.hash_one(net), |number| of(number) == Some(net), hash);
        let same = match place {
            Entry::Occupied(mut place) => Link(std::mem::replace(place.get_mut(), number)),
            Entry::Vacant(place) => {
                place.insert(number);
                Link::default()
            }
        };
        let slot = slots.slot(number);
        match free.get() {
            None => *numbers += 1,
            Some(_) => *free = slot.next,
        }
        *slot = Address { net, object, next, same };
        (number, same.get().is_some())
    }

    /// Returns whether somebody else still has the network.
    fn remove(&mut self, number: u32) -> bool {
        let Self { slots, by_net, seed, free, .. } = self;
        let Some(Address { net, same, .. }) = slots.get(number).copied() else { return false };
        let mut is_shared = true;
        let of = |number: &u32| slots.get(*number).map(|address| address.net);
        match by_net.find_entry(seed.hash_one(net), |number| of(number) == Some(net)) {
            Ok(mut place) => {
                let first = *place.get();
                if first != number {
                    let mut at = Link(first);
                    while let Some(address) = at.get().and_then(|at| slots.get_mut(at)) {
                        if address.same == Link(number) {
                            address.same = same;
                            break;
                        }
                        at = address.same;
                    }
                } else if let Some(next) = same.get() {
                    *place.get_mut() = next;
                } else {
                    is_shared = false;
                    place.remove();
                }
            }
            Err(_) => debug_assert!(false, "a network was not under its hash"),
        }
        *slots.slot(number) = Address { next: std::mem::replace(free, Link(number)), ..Address::default() };
        if by_net.is_empty() {
            *self = Self { seed: seed.clone(), ..Self::default() };
            return is_shared;
        }
        shrink(by_net, |number| seed.hash_one(slots.get(*number).map_or(IpNet::default(), |address| address.net)));
        is_shared
    }

    fn chain(&self, first: Link) -> impl Iterator<Item = IpNet> {
        let mut at = first;
        std::iter::from_fn(move || {
            let address = self.slots.get(at.get()?)?;
            at = address.next;
            Some(address.net)
        })
    }

    fn owners(&self, net: IpNet) -> impl Iterator<Item = u32> {
        let is_it = |number: &u32| self.slots.get(*number).is_some_and(|address| address.net == net);
        let mut at = self.by_net.find(self.seed.hash_one(net), is_it).map_or(Link::default(), |number| Link(*number));
        std::iter::from_fn(move || {
            let address = self.slots.get(at.get()?)?;
            at = address.same;
            Some(address.object)
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::prelude::*;
    use proptest::sample::subsequence;

    use super::*;

    #[test]
    fn records_are_small() {
        assert_eq!((size_of::<Object>(), size_of::<Address>()), (16, 32));
    }

    fn any_nets() -> impl Strategy<Value = Vec<&'static str>> {
        subsequence(vec!["10.0.0.1/32", "10.0.0.2/32", "10.0.0.0/8", "192.0.2.0/24", "fd00::1/128", "fd00::/64"], 0..=6)
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn objects_have_what_they_were_given_and_networks_know_their_owners(
            steps in prop::collection::vec((0..15usize, prop::option::weighted(0.7, (0..3u32, any_nets(), 0..3usize))), 0..60),
        ) {
            let endpoint = |host: &str, orchestrator: &str, workload: &str, endpoint: &str| WorkloadEndpointKey {
                host: host.into(),
                orchestrator: orchestrator.into(),
                workload: workload.into(),
                endpoint: endpoint.into(),
            };
            // The last ones are the same text where workload and endpoint are put together.
            let endpoints = [
                endpoint("h", "o", "w", "e"),
                endpoint("h", "o", "w", "f"),
                endpoint("h", "p", "w", "e"),
                endpoint("i", "o", "w", "e"),
                endpoint("h", "o", "w\0e", "e"),
                endpoint("h", "o", "w", "e\0e"),
                endpoint("h", "o", "we", "e"),
            ];
            let sets: Vec<Name> = ["w", "x", "w\0e", ""].into_iter().map(Name::from).collect();
            let key = |which: usize| match endpoints.get(which) {
                Some(key) => ObjectKey::Endpoint(key),
                None if which.is_multiple_of(2) => ObjectKey::NetworkSet(&sets[(which - endpoints.len()) / 2]),
                None => ObjectKey::HostEndpoint(&sets[(which - endpoints.len()) / 2]),
            };
            let port = |name: &str, port| EndpointPort { name: name.into(), protocol: 6, port };
            let ports = [vec![], vec![port("http", 80)], vec![port("http", 80), port("dns", 53)]];
            let (mut objects, mut names) = (Objects::default(), Names::default());
            let mut model: BTreeMap<usize, (u32, u32, BTreeSet<IpNet>, usize)> = BTreeMap::new();
            for (which, value) in steps {
                let found = objects.find(&names, &key(which));
                let known = found.ok();
                let before = model.clone();
                let mut changes = Vec::new();
                prop_assert_eq!(known, model.get(&which).map(|(id, class, ..)| (*id, *class)));
                match (known, value) {
                    (None, None) => (),
                    (Some((id, _)), None) => {
                        objects.remove(&mut names, id, &mut changes);
                        model.remove(&which);
                    }
                    (known, Some((class, nets, of))) => {
                        let nets: BTreeSet<IpNet> = nets.iter().map(|net| net.parse().unwrap()).collect();
                        let new = Contribution { nets: Nets(nets.iter().copied().collect()), ports: &ports[of] };
                        let id = match known {
                            Some((id, _)) => {
                                objects.replace(id, class, &new, &mut changes);
                                id
                            }
                            None => objects.insert(&mut names, &key(which), found.unwrap_err(), class, &new, &mut changes),
                        };
                        model.insert(which, (id, class, nets, of));
                    }
                }
                let nets_of = |model: &BTreeMap<usize, (u32, u32, BTreeSet<IpNet>, usize)>| {
                    model.get(&which).map(|(_, _, nets, _)| nets.clone()).unwrap_or_default()
                };
                let (old, new) = (nets_of(&before), nets_of(&model));
                let is_shared = |net: &IpNet| model.iter().any(|(other, (_, _, nets, _))| *other != which && nets.contains(net));
                let expected: Vec<NetChange> = old
                    .symmetric_difference(&new)
                    .map(|net| NetChange { net: *net, added: new.contains(net), is_shared: is_shared(net) })
                    .collect();
                prop_assert_eq!(changes, expected);
                prop_assert_eq!(objects.len(), model.len());
                let mut owners: BTreeMap<IpNet, BTreeSet<(u32, u32)>> = BTreeMap::new();
                for (id, class, nets, of) in model.values() {
                    prop_assert!(objects.nets(*id).eq(nets.iter().copied()));
                    prop_assert_eq!(objects.ports(*id), &ports[*of][..]);
                    for net in nets {
                        prop_assert!(owners.entry(*net).or_default().insert((*id, *class)));
                    }
                }
                for (net, expected) in owners {
                    let owners: Vec<(u32, u32)> = objects.owners(net).collect();
                    prop_assert_eq!(owners.len(), expected.len());
                    prop_assert_eq!(owners.into_iter().collect::<BTreeSet<_>>(), expected);
                }
            }
            for (id, ..) in model.into_values() {
                objects.remove(&mut names, id, &mut Vec::new());
            }
            prop_assert!(objects.is_empty() && names.is_empty());
            prop_assert_eq!((objects.numbers, objects.addresses.numbers), (0, 0));
        }
    }

    #[test]
    fn zero_length_networks_are_split_and_repetitions_merged() {
        let cases = [
            ("", ""),
            ("0.0.0.0/0", "0.0.0.0/1 128.0.0.0/1"),
            ("::/0", "::/1 8000::/1"),
            ("::/0 10.0.0.0/8 0.0.0.0/0", "0.0.0.0/1 10.0.0.0/8 128.0.0.0/1 ::/1 8000::/1"),
            ("10.0.0.1/8 10.0.0.0/8 10.0.0.0/16", "10.0.0.0/8 10.0.0.0/16"),
            ("192.0.2.7/32 192.0.2.7/32", "192.0.2.7/32"),
        ];
        for (nets, expected) in cases {
            let set = NetworkSet {
                nets: nets.split_whitespace().map(|net| net.parse().unwrap()).collect(),
                ..NetworkSet::default()
            };
            let got: Vec<String> = Nets::of_network_set(&set).iter().map(ToString::to_string).collect();
            assert_eq!(got.join(" "), expected, "networks {nets:?}");
        }
    }

    #[test]
    fn an_endpoint_contributes_addresses_whatever_their_prefix_length() {
        let endpoint = WorkloadEndpoint {
            v4_nets: vec!["10.0.0.7/24".parse().unwrap(), "10.0.0.7/32".parse().unwrap()],
            v6_nets: vec!["fd00::5/64".parse().unwrap()],
            ..WorkloadEndpoint::default()
        };
        let got: Vec<String> = Nets::of_endpoint(&endpoint).iter().map(ToString::to_string).collect();
        assert_eq!(got, ["10.0.0.7/32", "fd00::5/128"]);
    }
}
