//! The last value per key, since it was last asked for.

use std::collections::{BTreeMap, BTreeSet};

/// What a consumer must be told, key by key: the net result since it was last told (policy.md F-7).
///
/// Invariant: a removal is only ever reported for a key whose value the consumer was given.
#[derive(Debug)]
pub(crate) struct Pending<K, V> {
    changed: BTreeMap<K, Option<V>>,
    known: BTreeSet<K>,
}

impl<K, V> Default for Pending<K, V> {
    fn default() -> Self {
        Self { changed: BTreeMap::new(), known: BTreeSet::new() }
    }
}

impl<K: Ord + Clone, V> Pending<K, V> {
    pub(crate) fn set(&mut self, key: K, value: V) {
        self.changed.insert(key, Some(value));
    }

    pub(crate) fn remove(&mut self, key: K) {
        if self.known.contains(&key) {
            self.changed.insert(key, None);
        } else {
            self.changed.remove(&key);
        }
    }

    /// Returns what is new, in order; the consumer knows it from now on.
    pub(crate) fn take(&mut self) -> BTreeMap<K, Option<V>> {
        let changed = std::mem::take(&mut self.changed);
        for (key, value) in &changed {
            if value.is_none() {
                self.known.remove(key);
            } else if !self.known.contains(key) {
                self.known.insert(key.clone());
            }
        }
        changed
    }

    /// True if the consumer knows nothing and there is nothing to tell it.
    pub(crate) fn is_empty(&self) -> bool {
        self.changed.is_empty() && self.known.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_consumer_that_follows_knows_the_last_values(
            steps in prop::collection::vec((0..5u8, prop::option::of(0..9u32), any::<bool>()), 0..80),
        ) {
            let mut pending = Pending::default();
            let mut model = BTreeMap::new();
            let mut consumer = BTreeMap::new();
            for (key, value, cut) in steps {
                match value {
                    Some(value) => {
                        pending.set(key, value);
                        model.insert(key, value);
                    }
                    None => {
                        pending.remove(key);
                        model.remove(&key);
                    }
                }
                if cut {
                    for (key, value) in pending.take() {
                        match value {
                            Some(value) => drop(consumer.insert(key, value)),
                            None => prop_assert!(consumer.remove(&key).is_some(), "removal of an unknown key"),
                        }
                    }
                    prop_assert_eq!(&consumer, &model);
                    prop_assert_eq!(pending.is_empty(), model.is_empty());
                }
            }
        }
    }
}
