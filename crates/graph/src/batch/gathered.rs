//! Members that a set got and lost since the last batch.

use super::{MemberDelta, MemberList, SetMember};
use crate::batch::members::V4;
use ipnet::IpNet;

/// Additions and removals of members of one set, which alternate per member.
///
/// They are only written down; what comes and goes again is found when they are looked at, and before they are twice
/// as many as the members that they were about the last time (I7). There may be a million of each in one batch, nearly
/// all of them networks of IPv4.
#[derive(Debug)]
pub(crate) struct Gathered {
    /// The network as a number, and whether it was added in the lowest bit.
    v4: Vec<u64>,
    others: Vec<(SetMember, bool)>,
    /// How many there may be before what cancels out is thrown away.
    limit: usize,
}

const LEAST_LIMIT: usize = 4096;

impl Default for Gathered {
    fn default() -> Self {
        Self { v4: Vec::new(), others: Vec::new(), limit: LEAST_LIMIT }
    }
}

impl Gathered {
    #[inline]
    pub(crate) fn push(&mut self, member: SetMember, added: bool) {
        match member {
            SetMember::Net(IpNet::V4(net)) => self.v4.push(V4::of(net).number() << 1 | u64::from(added)),
            SetMember::Net(IpNet::V6(_)) | SetMember::AddressPort { .. } => self.others.push((member, added)),
        }
        if self.v4.len() + self.others.len() > self.limit {
            self.settle();
            self.limit = LEAST_LIMIT.max(2 * (self.v4.len() + self.others.len()));
        }
    }

    /// The net result: no member is in both lists.
    pub(crate) fn take(mut self) -> MemberDelta {
        self.settle();
        let part = |wanted: bool| {
            let v4 = self
                .v4
                .iter()
                .filter(|change| (**change & 1 == 1) == wanted)
                .map(|change| V4::from_number(change >> 1));
            let others = self.others.iter().filter(|(_, added)| *added == wanted).map(|(member, _)| *member);
            MemberList::of_sorted(v4.collect(), others.collect())
        };
        MemberDelta { added: part(true), removed: part(false) }
    }

    /// Sorts, and leaves at most one change of each member.
    fn settle(&mut self) {
        cancel(&mut self.v4, |change| change >> 1, |change| change & 1 == 1);
        cancel(&mut self.others, |(member, _)| member, |(_, added)| added);
    }
}

/// Keeps one change of each member that is not as it was. As additions and removals of a member alternate, that is
/// known from their numbers alone.
fn cancel<T: Ord + Copy, M: PartialEq>(changes: &mut Vec<T>, member: impl Fn(T) -> M, added: impl Fn(T) -> bool) {
    // Stable, because that is fast where long parts are sorted already.
    changes.sort();
    let (mut kept, mut at) = (0, 0);
    while let Some(first) = changes.get(at).copied() {
        let of_member = changes.iter().skip(at).take_while(|change| member(**change) == member(first));
        let (mut count, mut balance, mut last) = (0, 0, first);
        for change in of_member {
            count += 1;
            balance += if added(*change) { 1 } else { -1 };
            last = *change;
        }
        debug_assert!((-1..=1).contains(&balance), "a member was added or removed twice");
        // Removals are sorted before additions.
        let change = if balance > 0 { last } else { first };
        if balance != 0
            && let Some(place) = changes.get_mut(kept)
        {
            *place = change;
            kept += 1;
        }
        at += count;
    }
    changes.truncate(kept);
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::prelude::*;

    use super::*;

    fn member(number: u32) -> SetMember {
        match number % 4 {
            0 => SetMember::Net(format!("fd00::{number:x}/128").parse().unwrap()),
            1 => SetMember::AddressPort { address: [10, 0, 0, number as u8].into(), protocol: 6, port: 80 },
            2 => SetMember::Net(format!("10.{}.0.0/16", number % 256).parse().unwrap()),
            _ => SetMember::Net(format!("192.0.2.{}/32", number % 256).parse().unwrap()),
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn what_is_taken_is_the_difference_between_the_set_then_and_now(
            first in prop::collection::btree_set(0..60u32, 0..60), toggled in prop::collection::vec(0..60u32, 0..200),
            limit in 1..40usize,
        ) {
            let mut now = first.clone();
            let mut gathered = Gathered { limit, ..Gathered::default() };
            for number in toggled {
                let added = now.insert(number);
                if !added {
                    now.remove(&number);
                }
                gathered.push(member(number), added);
            }
            let delta = gathered.take();
            let members = |numbers: BTreeSet<u32>| -> MemberList { numbers.into_iter().map(member).collect() };
            prop_assert_eq!(delta.added, members(&now - &first));
            prop_assert_eq!(delta.removed, members(&first - &now));
        }
    }

    #[test]
    fn the_same_members_coming_and_going_for_ever_take_no_more_room() {
        let mut gathered = Gathered::default();
        let mut there: BTreeMap<u32, bool> = BTreeMap::new();
        for round in 0..1_000_000u32 {
            let added = there.entry(round % 100).or_default();
            *added = !*added;
            gathered.push(member(round % 100), *added);
            assert!(gathered.v4.len() + gathered.others.len() <= LEAST_LIMIT);
        }
        assert_eq!(gathered.take(), MemberDelta::default());
    }
}
