//! The members of a set in a batch.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use ipnet::{IpNet, Ipv4Net};

use super::SetMember;
use crate::kit::sort_numbers;

/// Members of a set: sorted, each once. There may be a million, nearly all of them networks of IPv4.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MemberList {
    /// They come first, and are sorted several times faster as numbers than as networks.
    v4: Vec<V4>,
    others: Vec<SetMember>,
}

/// A network of IPv4 as a number: the address, then a byte of prefix length. Sorts as the network does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct V4(u64);

impl V4 {
    pub(super) fn of(net: Ipv4Net) -> Self {
        Self(u64::from(u32::from(net.addr())) << 8 | u64::from(net.prefix_len()))
    }

    /// Less than 2^40.
    pub(super) fn number(self) -> u64 {
        self.0
    }

    pub(super) fn from_number(number: u64) -> Self {
        Self(number)
    }

    fn address(self) -> u32 {
        (self.0 >> 8) as u32
    }

    /// True if it is no more than its address.
    fn is_address(self) -> bool {
        self.0 as u8 == 32
    }

    fn member(self) -> SetMember {
        let address = Ipv4Addr::from(self.address());
        // It was a network when it came in, so the length is right.
        SetMember::Net(IpNet::V4(Ipv4Net::new(address, self.0 as u8).unwrap_or_else(|_| address.into())))
    }
}

impl MemberList {
    pub fn iter(&self) -> impl Iterator<Item = SetMember> {
        self.v4.iter().map(|net| net.member()).chain(self.others.iter().copied())
    }

    pub fn len(&self) -> usize {
        self.v4.len() + self.others.len()
    }

    pub fn is_empty(&self) -> bool {
        self.v4.is_empty() && self.others.is_empty()
    }

    pub fn contains(&self, member: &SetMember) -> bool {
        match member {
            SetMember::Net(IpNet::V4(net)) => self.v4.binary_search(&V4::of(*net)).is_ok(),
            SetMember::Net(IpNet::V6(_)) | SetMember::AddressPort { .. } => self.others.binary_search(member).is_ok(),
        }
    }

    /// Adds a member; false if it was there. For those who follow changes of small sets.
    pub fn insert(&mut self, member: SetMember) -> bool {
        match member {
            SetMember::Net(IpNet::V4(net)) => insert(&mut self.v4, V4::of(net)),
            SetMember::Net(IpNet::V6(_)) | SetMember::AddressPort { .. } => insert(&mut self.others, member),
        }
    }

    /// Takes a member away; false if it was not there.
    pub fn remove(&mut self, member: &SetMember) -> bool {
        match member {
            SetMember::Net(IpNet::V4(net)) => remove(&mut self.v4, &V4::of(*net)),
            SetMember::Net(IpNet::V6(_)) | SetMember::AddressPort { .. } => remove(&mut self.others, member),
        }
    }

    /// Takes lists that are sorted, with no member twice.
    pub(super) fn of_sorted(v4: Vec<V4>, others: Vec<SetMember>) -> Self {
        debug_assert!(is_sorted(&v4) && is_sorted(&others), "members out of order");
        Self { v4, others }
    }

    /// Makes room for as many networks.
    pub(crate) fn with_capacity(nets: usize) -> Self {
        Self { v4: Vec::with_capacity(nets), others: Vec::new() }
    }

    /// Appends a network. To be ended with [`sort`](Self::sort).
    #[inline]
    pub(crate) fn push_net(&mut self, net: &IpNet) {
        match net {
            IpNet::V4(net) => self.v4.push(V4::of(*net)),
            IpNet::V6(_) => self.others.push(SetMember::Net(*net)),
        }
    }

    /// Appends a member. To be ended with [`sort`](Self::sort).
    pub(crate) fn push(&mut self, member: SetMember) {
        match member {
            SetMember::Net(IpNet::V4(net)) => self.v4.push(V4::of(net)),
            SetMember::Net(IpNet::V6(_)) | SetMember::AddressPort { .. } => self.others.push(member),
        }
    }

    /// Brings members that were pushed in any order, with repetitions, into order.
    pub(crate) fn sort(mut self) -> Self {
        // What workloads have are single addresses, and those lie close together.
        if !is_sorted(&self.v4) && self.v4.iter().all(|net| net.is_address()) {
            let mut addresses: Vec<u32> = self.v4.drain(..).map(|net| net.address()).collect();
            sort_numbers(&mut addresses);
            self.v4.extend(addresses.into_iter().map(|address| V4::of(Ipv4Addr::from(address).into())));
        }
        sort(&mut self.v4);
        sort(&mut self.others);
        self
    }
}

fn insert<T: Ord>(list: &mut Vec<T>, member: T) -> bool {
    let place = list.binary_search(&member);
    if let Err(at) = place {
        list.insert(at, member);
    }
    place.is_err()
}

fn remove<T: Ord>(list: &mut Vec<T>, member: &T) -> bool {
    let place = list.binary_search(member);
    if let Ok(at) = place {
        list.remove(at);
    }
    place.is_ok()
}

fn is_sorted<T: Ord>(list: &[T]) -> bool {
    list.is_sorted_by(|a, b| a < b)
}

fn sort<T: Ord>(list: &mut Vec<T>) {
    if !is_sorted(list) {
        // Stable, because that is fast where long parts are sorted already.
        list.sort();
        list.dedup();
    }
}

/// In any order, with repetitions.
impl FromIterator<SetMember> for MemberList {
    fn from_iter<I: IntoIterator<Item = SetMember>>(members: I) -> Self {
        let mut list = Self::default();
        members.into_iter().for_each(|member| list.push(member));
        list.sort()
    }
}

impl From<BTreeSet<SetMember>> for MemberList {
    fn from(members: BTreeSet<SetMember>) -> Self {
        members.into_iter().collect()
    }
}

/// In any order, with repetitions.
impl From<Vec<SetMember>> for MemberList {
    fn from(members: Vec<SetMember>) -> Self {
        members.into_iter().collect()
    }
}

impl<const N: usize> From<[SetMember; N]> for MemberList {
    fn from(members: [SetMember; N]) -> Self {
        members.into_iter().collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn a_list_of_members_is_the_set_of_them_in_order(
            nets in prop::collection::vec((any::<u32>(), 0..=32u8, 0..40u8), 0..60),
            repeated in 0..3usize,
            only_addresses in any::<bool>(),
        ) {
            let net = |(address, length, what): (u32, u8, u8)| match what {
                0..=25 if only_addresses => Ipv4Net::from(Ipv4Addr::from(address & 0xff)).into(),
                26..=35 if only_addresses => Ipv4Net::from(Ipv4Addr::from(address)).into(),
                // Few different ones, so that some are equal.
                0..=9 => IpNet::from(Ipv4Net::new_assert(Ipv4Addr::from(address & 3), length)),
                10..=35 => Ipv4Net::new_assert(Ipv4Addr::from(address), length).into(),
                _ => format!("fd00:{}::/{}", address & 3, 32 + length).parse().unwrap(),
            };
            let mut nets: Vec<IpNet> = nets.into_iter().map(net).collect();
            nets.extend_from_within(..nets.len() * repeated / 2);
            let mut members: Vec<SetMember> = nets.into_iter().map(SetMember::Net).collect();
            let ports = members.iter().take(repeated).map(|member| {
                let SetMember::Net(net) = member else { panic!("{member:?}") };
                SetMember::AddressPort { address: net.addr(), protocol: 6, port: 80 }
            });
            members.extend(ports.collect::<Vec<_>>());
            let expected: BTreeSet<SetMember> = members.iter().copied().collect();
            let mut list = MemberList::from(members.clone());
            prop_assert!(list.iter().eq(expected.iter().copied()));
            prop_assert_eq!((list.len(), list.is_empty()), (expected.len(), expected.is_empty()));

            let mut one_by_one = MemberList::default();
            let mut known = BTreeSet::new();
            for member in &members {
                prop_assert_eq!(one_by_one.contains(member), known.contains(member));
                prop_assert_eq!(one_by_one.insert(*member), known.insert(*member));
            }
            prop_assert_eq!(&one_by_one, &list);
            for member in &expected {
                prop_assert!(list.contains(member) && list.remove(member) && !list.remove(member));
                prop_assert!(list.iter().all(|other| other > *member));
            }
            prop_assert!(list.is_empty());
        }
    }
}
