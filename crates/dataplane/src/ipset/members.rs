//! Members of one set, packed.
//!
//! Used by the plan of each set, which keeps what is wanted, what is missing and what is too much. A set may
//! have a million members: one of IPv4 takes 8 bytes here and one of IPv6 takes 20, instead of 22 and more
//! (performance.md 7, G12).
//!
//! Invariant: packing keeps the order of members of one family, and unpacking gives back what was packed.

use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use program::Member;

/// Kind, address, and prefix length or protocol and port.
type Wide = (u8, [u8; 16], [u8; 3]);

/// See the [module documentation](self).
#[derive(Clone, Default, PartialEq, Eq)]
pub(super) struct Members {
    v4: BTreeSet<u64>,
    v6: BTreeSet<Wide>,
}

enum Packed {
    V4(u64),
    V6(Wide),
}

const ADDRESS: u8 = 0;
const NET: u8 = 1;
const ADDRESS_PORT: u8 = 2;

fn pack(member: &Member) -> Packed {
    let (kind, address, rest) = match *member {
        Member::Address(address) => (ADDRESS, address, [0; 3]),
        Member::Net(net) => (NET, net.addr(), [0, 0, net.prefix_len()]),
        Member::AddressPort { address, protocol, port } => {
            let [high, low] = port.to_be_bytes();
            (ADDRESS_PORT, address, [protocol, high, low])
        }
    };
    match address {
        IpAddr::V4(v4) => {
            let ([a, b, c, d], [x, y, z]) = (v4.octets(), rest);
            Packed::V4(u64::from_be_bytes([kind, a, b, c, d, x, y, z]))
        }
        IpAddr::V6(v6) => Packed::V6((kind, v6.octets(), rest)),
    }
}

fn unpack_v4(packed: u64) -> Member {
    let [kind, a, b, c, d, x, y, z] = packed.to_be_bytes();
    unpack(kind, IpAddr::V4(Ipv4Addr::new(a, b, c, d)), [x, y, z])
}

fn unpack_v6((kind, address, rest): Wide) -> Member {
    unpack(kind, IpAddr::V6(Ipv6Addr::from(address)), rest)
}

fn unpack(kind: u8, address: IpAddr, [protocol, high, low]: [u8; 3]) -> Member {
    match kind {
        // The length was that of a network, so that it is not too long.
        NET => IpNet::new(address, low).map_or(Member::Address(address), Member::Net),
        ADDRESS_PORT => Member::AddressPort { address, protocol, port: u16::from_be_bytes([high, low]) },
        _ => Member::Address(address),
    }
}

impl Members {
    pub(super) fn insert(&mut self, member: &Member) -> bool {
        match pack(member) {
            Packed::V4(packed) => self.v4.insert(packed),
            Packed::V6(packed) => self.v6.insert(packed),
        }
    }

    pub(super) fn remove(&mut self, member: &Member) -> bool {
        match pack(member) {
            Packed::V4(packed) => self.v4.remove(&packed),
            Packed::V6(packed) => self.v6.remove(&packed),
        }
    }

    pub(super) fn contains(&self, member: &Member) -> bool {
        match pack(member) {
            Packed::V4(packed) => self.v4.contains(&packed),
            Packed::V6(packed) => self.v6.contains(&packed),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.v4.len() + self.v6.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.v4.is_empty() && self.v6.is_empty()
    }

    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    /// In order, those of IPv4 first.
    pub(super) fn iter(&self) -> impl Iterator<Item = Member> + '_ {
        self.v4.iter().copied().map(unpack_v4).chain(self.v6.iter().copied().map(unpack_v6))
    }

    /// What the kernel is told, in order.
    pub(super) fn to_vec(&self) -> Vec<Member> {
        let mut members = Vec::with_capacity(self.len());
        members.extend(self.iter());
        members
    }

    /// The members that `other` does not have.
    pub(super) fn minus(&self, other: &Self) -> Self {
        Self {
            v4: self.v4.difference(&other.v4).copied().collect(),
            v6: self.v6.difference(&other.v6).copied().collect(),
        }
    }

    /// Takes the members of `other` in addition.
    pub(super) fn join(&mut self, mut other: Self) {
        self.v4.append(&mut other.v4);
        self.v6.append(&mut other.v6);
    }
}

/// In any order, with repetitions: sorted as numbers, which is several times faster than one by one.
impl FromIterator<Member> for Members {
    fn from_iter<I: IntoIterator<Item = Member>>(members: I) -> Self {
        let (mut v4, mut v6) = (Vec::new(), Vec::new());
        for member in members {
            match pack(&member) {
                Packed::V4(packed) => v4.push(packed),
                Packed::V6(packed) => v6.push(packed),
            }
        }
        v4.sort_unstable();
        v6.sort_unstable();
        Self { v4: v4.into_iter().collect(), v6: v6.into_iter().collect() }
    }
}

impl fmt::Debug for Members {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn member() -> impl Strategy<Value = Member> {
        let address = prop_oneof![any::<[u8; 4]>().prop_map(IpAddr::from), any::<[u8; 16]>().prop_map(IpAddr::from)];
        (address, 0..3u8, any::<u8>(), any::<u16>()).prop_map(|(address, kind, small, port)| match kind {
            0 => Member::Address(address),
            1 => {
                let length = small % (if address.is_ipv4() { 33 } else { 129 });
                Member::Net(IpNet::new(address, length).unwrap())
            }
            _ => Member::AddressPort { address, protocol: small, port },
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn packed_members_are_the_set_of_the_plain_ones(
            some in prop::collection::vec(member(), 0..40), others in prop::collection::vec(member(), 0..10)
        ) {
            let mut packed: Members = some.iter().copied().collect();
            let mut plain: BTreeSet<Member> = some.iter().copied().collect();
            let removed: Members = others.iter().chain(some.iter().step_by(3)).copied().collect();
            let rest = packed.minus(&removed);
            let expected = |member: &&Member| !others.contains(*member) && !some.iter().step_by(3).any(|other| other == *member);
            let family = |member: &Member| (member.family(), *member);
            let mut left: Vec<Member> = plain.iter().filter(expected).copied().collect();
            left.sort_by_key(family);
            prop_assert_eq!(rest.to_vec(), left);
            prop_assert!(some.iter().chain(&others).all(|member| packed.contains(member) == plain.contains(member)));
            for member in &others {
                prop_assert_eq!(packed.insert(member), plain.insert(*member));
            }
            for member in some.iter().step_by(2) {
                prop_assert_eq!(packed.remove(member), plain.remove(member));
            }
            let mut all: Vec<Member> = plain.into_iter().collect();
            all.sort_by_key(family);
            prop_assert_eq!((packed.len(), packed.is_empty()), (all.len(), all.is_empty()));
            prop_assert_eq!(packed.to_vec(), all);
        }
    }
}
