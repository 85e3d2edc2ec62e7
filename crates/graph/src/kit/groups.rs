//! Which items are in which group: many to one, both numbered densely.

use super::Column;

/// Marks the end of a list and an empty group.
const NONE: u32 = u32::MAX;

/// Lists of items by group. Joining and leaving take constant time and allocate nothing once the
/// columns have grown: eight bytes an item and four a group.
///
/// Invariant: an item is in at most one group. The order inside a group follows history and must not
/// reach the output.
#[derive(Debug, Default)]
pub(crate) struct Groups {
    first: Column<Head>,
    around: Column<Around>,
}

#[derive(Clone, Copy, Debug)]
struct Head(u32);

#[derive(Clone, Copy, Debug)]
struct Around {
    before: u32,
    after: u32,
}

impl Default for Head {
    fn default() -> Self {
        Self(NONE)
    }
}

impl Default for Around {
    fn default() -> Self {
        Self { before: NONE, after: NONE }
    }
}

impl Groups {
    /// Puts an item that is in no group into one.
    pub(crate) fn join(&mut self, group: u32, item: u32) {
        let first = std::mem::replace(self.first.slot(group), Head(item)).0;
        debug_assert_ne!(first, item, "an item joined its group twice");
        *self.around.slot(item) = Around { before: NONE, after: first };
        if let Some(around) = self.around.get_mut(first) {
            around.before = item;
        }
    }

    /// Takes an item out of the group that it is in.
    pub(crate) fn leave(&mut self, group: u32, item: u32) {
        let Around { before, after } = self.around.take(item);
        if let Some(around) = self.around.get_mut(after) {
            around.before = before;
        }
        if let Some(around) = self.around.get_mut(before) {
            around.after = after;
        } else if self.first.get(group).is_some_and(|first| first.0 == item) {
            *self.first.slot(group) = Head(after);
        } else {
            debug_assert!(false, "an item left a group that it was not in");
        }
    }

    /// The items of a group, in no particular order.
    pub(crate) fn items(&self, group: u32) -> impl Iterator<Item = u32> {
        let mut next = self.first(group);
        std::iter::from_fn(move || {
            let item = next?;
            next = self.after(item);
            Some(item)
        })
    }

    /// The first of the items of a group.
    pub(crate) fn first(&self, group: u32) -> Option<u32> {
        self.first.get(group).map(|first| first.0).filter(|item| *item != NONE)
    }

    /// The item after one of the same group.
    pub(crate) fn after(&self, item: u32) -> Option<u32> {
        self.around.get(item).map(|around| around.after).filter(|item| *item != NONE)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_group_holds_who_joined_and_did_not_leave(steps in prop::collection::vec((0..12u32, 0..4u32), 0..80)) {
            let mut groups = Groups::default();
            let mut model: BTreeMap<u32, u32> = BTreeMap::new();
            for (item, group) in steps {
                match model.remove(&item) {
                    Some(old) => groups.leave(old, item),
                    None => {
                        groups.join(group, item);
                        model.insert(item, group);
                    }
                }
                for group in 0..4 {
                    let items: Vec<u32> = groups.items(group).collect();
                    let expected: BTreeSet<u32> =
                        model.iter().filter(|(_, of)| **of == group).map(|(item, _)| *item).collect();
                    prop_assert_eq!(items.len(), expected.len());
                    prop_assert_eq!(items.iter().copied().collect::<BTreeSet<_>>(), expected);
                }
            }
        }
    }
}
