//! Members of a set on their way to the kernel: packed, because there may be a million (performance.md 7, G12).
//!
//! Invariant: packing keeps the order of members of one family, and unpacking gives back what was packed.

use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

use crate::set::Member;

/// A member of IPv4 in eight bytes: kind, address, and prefix length or protocol and port.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PackedV4(u64);

/// A member of IPv6 in twenty bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PackedV6(u8, [u8; 16], [u8; 3]);

/// A member of either family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packed {
    V4(PackedV4),
    V6(PackedV6),
}

const ADDRESS: u8 = 0;
const NET: u8 = 1;
const ADDRESS_PORT: u8 = 2;

impl Packed {
    pub fn of(member: &Member) -> Self {
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
                Self::V4(PackedV4(u64::from_be_bytes([kind, a, b, c, d, x, y, z])))
            }
            IpAddr::V6(v6) => Self::V6(PackedV6(kind, v6.octets(), rest)),
        }
    }
}

impl From<PackedV4> for Member {
    fn from(PackedV4(packed): PackedV4) -> Self {
        let [kind, a, b, c, d, x, y, z] = packed.to_be_bytes();
        unpack(kind, IpAddr::V4(Ipv4Addr::new(a, b, c, d)), [x, y, z])
    }
}

impl From<PackedV6> for Member {
    fn from(PackedV6(kind, address, rest): PackedV6) -> Self {
        unpack(kind, IpAddr::V6(Ipv6Addr::from(address)), rest)
    }
}

fn unpack(kind: u8, address: IpAddr, [protocol, high, low]: [u8; 3]) -> Member {
    match kind {
        // The length was that of a network, so that it is not too long.
        NET => IpNet::new(address, low).map_or(Member::Address(address), Member::Net),
        ADDRESS_PORT => Member::AddressPort { address, protocol, port: u16::from_be_bytes([high, low]) },
        _ => Member::Address(address),
    }
}

impl fmt::Debug for PackedV4 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Member::from(*self).fmt(f)
    }
}

impl fmt::Debug for PackedV6 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Member::from(*self).fmt(f)
    }
}

/// Members of one set: sorted, those of IPv4 first, each once.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Members {
    v4: Vec<PackedV4>,
    v6: Vec<PackedV6>,
}

impl Members {
    /// Takes lists that are sorted, with no member twice.
    pub fn of_sorted(v4: Vec<PackedV4>, v6: Vec<PackedV6>) -> Self {
        debug_assert!(is_sorted(&v4) && is_sorted(&v6), "members out of order");
        Self { v4, v6 }
    }

    pub fn len(&self) -> usize {
        self.v4.len() + self.v6.len()
    }

    pub fn is_empty(&self) -> bool {
        self.v4.is_empty() && self.v6.is_empty()
    }

    pub fn contains(&self, member: &Member) -> bool {
        match Packed::of(member) {
            Packed::V4(packed) => self.v4.binary_search(&packed).is_ok(),
            Packed::V6(packed) => self.v6.binary_search(&packed).is_ok(),
        }
    }

    pub fn get(&self, position: usize) -> Option<Member> {
        self.iter_from(position).next()
    }

    /// In order.
    pub fn iter(&self) -> impl Iterator<Item = Member> + '_ {
        self.iter_from(0)
    }

    /// In order, without the first ones.
    pub fn iter_from(&self, position: usize) -> impl Iterator<Item = Member> + '_ {
        let v4 = self.v4.get(position..).unwrap_or_default();
        let v6 = self.v6.get(position.saturating_sub(self.v4.len())..).unwrap_or_default();
        v4.iter().map(|packed| Member::from(*packed)).chain(v6.iter().map(|packed| Member::from(*packed)))
    }

    /// The first ones.
    pub fn up_to(&self, count: usize) -> impl Iterator<Item = Member> + '_ {
        self.iter().take(count)
    }

    pub fn v4(&self) -> &[PackedV4] {
        &self.v4
    }

    pub fn v6(&self) -> &[PackedV6] {
        &self.v6
    }
}

fn is_sorted<T: Ord>(list: &[T]) -> bool {
    list.is_sorted_by(|a, b| a < b)
}

/// In any order, with repetitions.
impl FromIterator<Member> for Members {
    fn from_iter<I: IntoIterator<Item = Member>>(members: I) -> Self {
        fn sort<T: Ord>(list: &mut Vec<T>) {
            if !is_sorted(list) {
                // Stable, because that is fast where long parts are sorted already.
                list.sort();
                list.dedup();
            }
        }
        let members = members.into_iter();
        let mut list = Self::default();
        for member in members {
            match Packed::of(&member) {
                Packed::V4(packed) => list.v4.push(packed),
                Packed::V6(packed) => list.v6.push(packed),
            }
        }
        sort(&mut list.v4);
        sort(&mut list.v6);
        list
    }
}

impl From<BTreeSet<Member>> for Members {
    fn from(members: BTreeSet<Member>) -> Self {
        members.into_iter().collect()
    }
}

/// In any order, with repetitions.
impl From<Vec<Member>> for Members {
    fn from(members: Vec<Member>) -> Self {
        members.into_iter().collect()
    }
}

impl<const N: usize> From<[Member; N]> for Members {
    fn from(members: [Member; N]) -> Self {
        members.into_iter().collect()
    }
}

impl fmt::Debug for Members {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_come_back_as_they_were_sorted_and_each_once() {
        let mut plain = BTreeSet::new();
        for address in ["0.0.0.0", "10.0.0.1", "255.255.255.255", "::", "fd00::1", "ffff::ffff"] {
            let address: IpAddr = address.parse().unwrap();
            plain.insert(Member::Address(address));
            let longest = if address.is_ipv4() { 32 } else { 128 };
            plain.extend([1, 8, longest].map(|length| Member::Net(IpNet::new(address, length).unwrap())));
            for (protocol, port) in [(0, 0), (6, 80), (255, 65_535)] {
                plain.insert(Member::AddressPort { address, protocol, port });
            }
        }
        let mut sorted: Vec<Member> = plain.iter().copied().collect();
        sorted.sort_by_key(|member| (member.family(), *member));
        let members: Members = plain.iter().rev().chain(&plain).copied().collect();
        assert_eq!(members.iter().collect::<Vec<_>>(), sorted);
        assert_eq!((members.len(), members.is_empty()), (sorted.len(), false));
        assert!(plain.iter().all(|member| members.contains(member)));
        assert!(!members.contains(&Member::Address([10, 0, 0, 2].into())));
        for position in 0..sorted.len() + 2 {
            let rest: Vec<Member> = members.iter_from(position).collect();
            assert_eq!(rest, sorted.get(position..).unwrap_or_default());
            assert_eq!(members.get(position), sorted.get(position).copied());
            assert!(members.up_to(position).eq(sorted.iter().copied().take(position)));
        }
        assert_eq!(Members::of_sorted(members.v4().to_vec(), members.v6().to_vec()), members);
        assert_eq!(size_of::<(PackedV4, [PackedV6; 2])>(), 48);
    }
}
