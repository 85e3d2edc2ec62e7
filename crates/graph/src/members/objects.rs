//! Endpoints and network sets in as little memory as possible: there may be hundreds of thousands.

use std::hash::{BuildHasher as _, Hash as _, Hasher as _};
use std::net::IpAddr;

use hashbrown::HashTable;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use model::{EndpointPort, HostEndpoint, Name, NetworkSet, WorkloadEndpoint, WorkloadEndpointKey};
use smallvec::SmallVec;

use super::Contribution;
use crate::kit::Seed;
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
pub(crate) enum Nets {
    #[default]
    None,
    One(IpNet),
    Many(Box<[IpNet]>),
}

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
        match *nets {
            [] => Self::None,
            [net] => Self::One(net),
            _ => Self::Many(nets.into_vec().into_boxed_slice()),
        }
    }

    pub(crate) fn iter(&self) -> std::slice::Iter<'_, IpNet> {
        match self {
            Self::None => [].iter(),
            Self::One(net) => std::slice::from_ref(net).iter(),
            Self::Many(nets) => nets.iter(),
        }
    }
}

/// Named ports of an endpoint. Most have none, so this is kept behind one thin pointer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Ports(Vec<EndpointPort>);

impl Ports {
    /// `None` rather than an empty list.
    pub(crate) fn of(ports: &[EndpointPort]) -> Option<Box<Self>> {
        (!ports.is_empty()).then(|| Box::new(Self(ports.to_vec())))
    }

    pub(crate) fn iter(&self) -> std::slice::Iter<'_, EndpointPort> {
        self.0.iter()
    }
}

/// All objects, numbered densely.
#[derive(Debug, Default)]
pub(super) struct Objects {
    slots: Vec<Option<Object>>,
    free: Vec<u32>,
    by_key: HashTable<u32>,
    seed: Seed,
}

#[derive(Debug)]
struct Object {
    /// Workload of an endpoint, which hardly two endpoints share, or the name of a network set or host endpoint.
    name: Name,
    /// Numbers of host, orchestrator and endpoint.
    place: Place,
    class: u32,
    contribution: Contribution,
}

type Place = [u32; 3];

/// Place of network sets and of host endpoints: their names are all their identity. Too high to be
/// numbers of names.
const NETWORK_SETS: Place = [u32::MAX; 3];
const HOST_ENDPOINTS: Place = [u32::MAX - 1; 3];

impl<'a> ObjectKey<'a> {
    fn name(&self) -> &'a Name {
        match self {
            Self::Endpoint(key) => &key.workload,
            Self::NetworkSet(name) | Self::HostEndpoint(name) => name,
        }
    }

    /// The place, if all its names are in use.
    fn find_place(&self, names: &Names) -> Option<Place> {
        match self {
            Self::Endpoint(key) => {
                Some([names.find(&key.host)?, names.find(&key.orchestrator)?, names.find(&key.endpoint)?])
            }
            Self::NetworkSet(_) => Some(NETWORK_SETS),
            Self::HostEndpoint(_) => Some(HOST_ENDPOINTS),
        }
    }
}

impl Objects {
    fn hash(seed: &Seed, place: Place, name: &str) -> u64 {
        let mut hasher = seed.build_hasher();
        place.hash(&mut hasher);
        name.hash(&mut hasher);
        hasher.finish()
    }

    /// Returns number, class and contribution of an object.
    pub(super) fn find(&self, names: &Names, key: &ObjectKey<'_>) -> Option<(u32, u32, &Contribution)> {
        let place = key.find_place(names)?;
        let name = key.name();
        let is_it = |id: &u32| self.object(*id).is_some_and(|object| object.place == place && object.name == *name);
        let id = *self.by_key.find(Self::hash(&self.seed, place, name), is_it)?;
        self.object(id).map(|object| (id, object.class, &object.contribution))
    }

    fn object(&self, id: u32) -> Option<&Object> {
        self.slots.get(id as usize)?.as_ref()
    }

    pub(super) fn get(&self, id: u32) -> Option<&Contribution> {
        self.object(id).map(|object| &object.contribution)
    }

    /// Adds an object that is not there.
    pub(super) fn insert(
        &mut self,
        names: &mut Names,
        key: &ObjectKey<'_>,
        class: u32,
        contribution: Contribution,
    ) -> u32 {
        let place = match key {
            ObjectKey::Endpoint(key) => [&key.host, &key.orchestrator, &key.endpoint].map(|name| names.acquire(name)),
            ObjectKey::NetworkSet(_) => NETWORK_SETS,
            ObjectKey::HostEndpoint(_) => HOST_ENDPOINTS,
        };
        let object = Object { name: Name::clone(key.name()), place, class, contribution };
        let hash = Self::hash(&self.seed, place, &object.name);
        let id = self.free.pop().unwrap_or(self.slots.len() as u32);
        match self.slots.get_mut(id as usize) {
            Some(slot) => *slot = Some(object),
            None => self.slots.push(Some(object)),
        }
        let Self { slots, by_key, seed, .. } = self;
        by_key.insert_unique(hash, id, |id| Self::rehash(slots, seed, *id));
        id
    }

    fn rehash(slots: &[Option<Object>], seed: &Seed, id: u32) -> u64 {
        let object = slots.get(id as usize).and_then(Option::as_ref);
        object.map_or(0, |object| Self::hash(seed, object.place, &object.name))
    }

    /// Replaces what an object brings, and returns what it brought.
    pub(super) fn replace(&mut self, id: u32, class: u32, new: Contribution) -> Contribution {
        match self.slots.get_mut(id as usize) {
            Some(Some(object)) => {
                object.class = class;
                std::mem::replace(&mut object.contribution, new)
            }
            Some(None) | None => {
                debug_assert!(false, "replaced an object that does not exist");
                new
            }
        }
    }

    pub(super) fn remove(&mut self, names: &mut Names, id: u32) {
        let Some(object) = self.slots.get_mut(id as usize).and_then(Option::take) else {
            debug_assert!(false, "removed an object that does not exist");
            return;
        };
        let hash = Self::hash(&self.seed, object.place, &object.name);
        if let Ok(entry) = self.by_key.find_entry(hash, |known| *known == id) {
            entry.remove();
        }
        self.free.push(id);
        if ![NETWORK_SETS, HOST_ENDPOINTS].contains(&object.place) {
            object.place.into_iter().for_each(|name| names.release(name));
        }
        let Self { slots, by_key, seed, .. } = self;
        if by_key.is_empty() {
            *self = Self { seed: seed.clone(), ..Self::default() };
        } else if by_key.capacity() > 64 && by_key.len() < by_key.capacity() / 8 {
            by_key.shrink_to(by_key.len() * 2, |id| Self::rehash(slots, seed, *id));
        }
    }

    pub(super) fn len(&self) -> usize {
        self.by_key.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.by_key.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_object_takes_no_more_than_a_cache_line() {
        assert_eq!(size_of::<Option<Object>>(), 64);
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
