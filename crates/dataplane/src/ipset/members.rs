//! Members of one set that come and go.
//!
//! Used by the plan of each set, which keeps what is wanted, what is missing and what is too much. A set may
//! have a million members: one of IPv4 takes about 9 bytes here (performance.md 7, G12). Lists that are long beside
//! the tree are merged into it in one walk.

use std::cmp::Ordering;
use std::collections::BTreeSet;
use std::fmt;

use program::members::{Packed, PackedV4, PackedV6};
use program::{Member, Members};

/// See the [module documentation](self).
#[derive(Clone, Default, PartialEq, Eq)]
pub(super) struct Tree {
    v4: BTreeSet<PackedV4>,
    v6: BTreeSet<PackedV6>,
}

/// A list is looked up one by one if it is so many times shorter than the tree.
const FEW: usize = 16;

impl Tree {
    pub(super) fn remove(&mut self, member: &Member) -> bool {
        match Packed::of(member) {
            Packed::V4(packed) => self.v4.remove(&packed),
            Packed::V6(packed) => self.v6.remove(&packed),
        }
    }

    pub(super) fn contains(&self, member: &Member) -> bool {
        match Packed::of(member) {
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
        self.v4.iter().copied().map(Member::from).chain(self.v6.iter().copied().map(Member::from))
    }

    /// What the kernel is told, in order.
    pub(super) fn to_list(&self) -> Members {
        Members::of_sorted(self.v4.iter().copied().collect(), self.v6.iter().copied().collect())
    }

    /// The members that `other` does not have.
    pub(super) fn minus(&self, other: &Self) -> Self {
        Self {
            v4: self.v4.difference(&other.v4).copied().collect(),
            v6: self.v6.difference(&other.v6).copied().collect(),
        }
    }

    /// Those of a list that are here, and those that are not.
    pub(super) fn split(&self, list: &Members) -> (Members, Members) {
        let (known4, new4) = split(&self.v4, list.v4());
        let (known6, new6) = split(&self.v6, list.v6());
        (Members::of_sorted(known4, known6), Members::of_sorted(new4, new6))
    }

    pub(super) fn insert_all(&mut self, list: &Members) {
        insert_all(&mut self.v4, list.v4());
        insert_all(&mut self.v6, list.v6());
    }

    pub(super) fn remove_all(&mut self, list: &Members) {
        remove_all(&mut self.v4, list.v4());
        remove_all(&mut self.v6, list.v6());
    }
}

fn is_short<T>(list: &[T], tree: &BTreeSet<T>) -> bool {
    list.len().saturating_mul(FEW) < tree.len()
}

fn split<T: Ord + Copy>(tree: &BTreeSet<T>, list: &[T]) -> (Vec<T>, Vec<T>) {
    if is_short(list, tree) {
        return list.iter().copied().partition(|member| tree.contains(member));
    }
    let mut known = tree.iter().peekable();
    list.iter().copied().partition(|member| is_next(&mut known, member))
}

/// Goes on to where the member is, or would be, and returns whether it is there.
fn is_next<'a, T: Ord + 'a>(sorted: &mut std::iter::Peekable<impl Iterator<Item = &'a T>>, member: &T) -> bool {
    loop {
        match sorted.peek().map_or(Ordering::Greater, |next| (*next).cmp(member)) {
            Ordering::Less => drop(sorted.next()),
            Ordering::Equal => return true,
            Ordering::Greater => return false,
        }
    }
}

fn insert_all<T: Ord + Copy>(tree: &mut BTreeSet<T>, list: &[T]) {
    if is_short(list, tree) {
        tree.extend(list.iter().copied());
    } else {
        // A walk over both.
        tree.append(&mut list.iter().copied().collect());
    }
}

fn remove_all<T: Ord + Copy>(tree: &mut BTreeSet<T>, list: &[T]) {
    if is_short(list, tree) {
        for member in list {
            tree.remove(member);
        }
    } else if !list.is_empty() {
        let mut gone = list.iter().peekable();
        let left: Vec<T> = tree.iter().filter(|member| !is_next(&mut gone, member)).copied().collect();
        *tree = left.into_iter().collect();
    }
}

impl From<&Members> for Tree {
    fn from(list: &Members) -> Self {
        Self { v4: list.v4().iter().copied().collect(), v6: list.v6().iter().copied().collect() }
    }
}

/// In any order, with repetitions: sorted as numbers, which is several times faster than one by one.
impl FromIterator<Member> for Tree {
    fn from_iter<I: IntoIterator<Item = Member>>(members: I) -> Self {
        Self::from(&members.into_iter().collect::<Members>())
    }
}

impl fmt::Debug for Tree {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use ipnet::IpNet;
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

    fn sorted(members: impl Iterator<Item = Member>) -> Vec<Member> {
        let mut members: Vec<Member> = members.collect();
        members.sort_by_key(|member| (member.family(), *member));
        members
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn a_tree_is_the_set_of_its_members(
            some in prop::collection::vec(member(), 0..80), others in prop::collection::vec(member(), 0..10),
            step in prop_oneof![1..4usize, 20..60usize],
        ) {
            let plain: BTreeSet<Member> = some.iter().copied().collect();
            let tree: Tree = some.iter().copied().collect();
            prop_assert_eq!(tree.to_list().iter().collect::<Vec<_>>(), sorted(plain.iter().copied()));
            prop_assert_eq!((tree.len(), tree.is_empty()), (plain.len(), plain.is_empty()));
            prop_assert_eq!(&Tree::from(&tree.to_list()), &tree);
            prop_assert!(some.iter().chain(&others).all(|member| tree.contains(member) == plain.contains(member)));

            // Few or many of its own, and others.
            let list: Members = others.iter().chain(some.iter().step_by(step)).copied().collect();
            let listed: BTreeSet<Member> = list.iter().collect();
            let (known, new) = tree.split(&list);
            prop_assert_eq!(known.iter().collect::<Vec<_>>(), sorted((&listed & &plain).into_iter()));
            prop_assert_eq!(new.iter().collect::<Vec<_>>(), sorted((&listed - &plain).into_iter()));
            let mut more = tree.clone();
            more.insert_all(&list);
            prop_assert_eq!(more.iter().collect::<Vec<_>>(), sorted((&plain | &listed).into_iter()));
            let mut less = tree.clone();
            less.remove_all(&list);
            prop_assert_eq!(less.iter().collect::<Vec<_>>(), sorted((&plain - &listed).into_iter()));
            prop_assert_eq!(&tree.minus(&Tree::from(&list)), &less);

            let (mut tree, mut plain) = (tree, plain);
            for member in some.iter().step_by(2) {
                prop_assert_eq!(tree.remove(member), plain.remove(member));
            }
            prop_assert_eq!(tree.iter().collect::<Vec<_>>(), sorted(plain.into_iter()));
        }
    }
}
