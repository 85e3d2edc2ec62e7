//! A many-to-many relation, readable from both sides.

use std::borrow::Borrow;
use std::collections::{BTreeMap, BTreeSet};

/// A many-to-many relation. Both directions are ordered.
#[derive(Debug)]
pub(crate) struct Links<L, R> {
    rights: BTreeMap<L, BTreeSet<R>>,
    lefts: BTreeMap<R, BTreeSet<L>>,
}

/// What changed for the left side of a [`Links`].
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Relinked<R> {
    pub(crate) added: Vec<R>,
    pub(crate) removed: Vec<R>,
}

impl<L, R> Default for Links<L, R> {
    fn default() -> Self {
        Self { rights: BTreeMap::new(), lefts: BTreeMap::new() }
    }
}

impl<L: Ord + Clone, R: Ord + Clone> Links<L, R> {
    /// Links `left` to exactly these, and says what that changed.
    pub(crate) fn set_left(&mut self, left: &L, rights: impl IntoIterator<Item = R>) -> Relinked<R> {
        let new: BTreeSet<R> = rights.into_iter().collect();
        let old = self.rights.remove(left).unwrap_or_default();
        let added: Vec<R> = new.difference(&old).cloned().collect();
        let removed: Vec<R> = old.difference(&new).cloned().collect();
        for right in &added {
            self.lefts.entry(right.clone()).or_default().insert(left.clone());
        }
        for right in &removed {
            let Some(lefts) = self.lefts.get_mut(right) else { continue };
            lefts.remove(left);
            if lefts.is_empty() {
                self.lefts.remove(right);
            }
        }
        if !new.is_empty() {
            self.rights.insert(left.clone(), new);
        }
        Relinked { added, removed }
    }

    /// Who is linked to `right`, in order.
    pub(crate) fn lefts<Q: Ord + ?Sized>(&self, right: &Q) -> impl Iterator<Item = &L>
    where
        R: Borrow<Q>,
    {
        self.lefts.get(right).into_iter().flatten()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.rights.is_empty() && self.lefts.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn both_sides_tell_the_same_story(
            steps in prop::collection::vec((0..5u8, prop::collection::btree_set(0..5u8, 0..4)), 0..60),
        ) {
            let mut links = Links::default();
            let mut model: BTreeMap<u8, BTreeSet<u8>> = BTreeMap::new();
            for (left, rights) in steps {
                let old = model.insert(left, rights.clone()).unwrap_or_default();
                let Relinked { added, removed } = links.set_left(&left, rights.clone());
                prop_assert_eq!(added, rights.difference(&old).copied().collect::<Vec<_>>());
                prop_assert_eq!(removed, old.difference(&rights).copied().collect::<Vec<_>>());
                for right in 0..5 {
                    let expected: Vec<u8> =
                        model.iter().filter(|(_, rights)| rights.contains(&right)).map(|(left, _)| *left).collect();
                    prop_assert_eq!(links.lefts(&right).copied().collect::<Vec<_>>(), expected);
                }
                prop_assert_eq!(links.is_empty(), model.values().all(BTreeSet::is_empty));
            }
        }
    }
}
