//! A multiset that reports first arrivals and last departures.

use std::borrow::Borrow;
use std::hash::Hash;

use super::ValueMap;

/// A multiset. A key is present while its count is positive.
#[derive(Debug)]
pub(crate) struct Counted<K> {
    counts: ValueMap<K, u32>,
}

impl<K> Default for Counted<K> {
    fn default() -> Self {
        Self { counts: ValueMap::default() }
    }
}

impl<K: Hash + Eq> Counted<K> {
    /// Counts one more; true if the key was not present before.
    pub(crate) fn add(&mut self, key: K) -> bool {
        let count = self.counts.entry(key).or_insert(0);
        *count += 1;
        *count == 1
    }

    /// Counts one less; true if the key is no longer present.
    pub(crate) fn remove<Q: Hash + Eq + ?Sized>(&mut self, key: &Q) -> bool
    where
        K: Borrow<Q>,
    {
        let Some(count) = self.counts.get_mut(key) else {
            debug_assert!(false, "counted down what was never counted up");
            return false;
        };
        *count -= 1;
        if *count > 0 {
            return false;
        }
        self.counts.remove(key);
        // A set that has shrunk gives memory back, but not at every step of the way.
        if self.counts.capacity() > 64 && self.counts.len() < self.counts.capacity() / 8 {
            self.counts.shrink_to(self.counts.len() * 2);
        }
        true
    }

    pub(crate) fn contains<Q: Hash + Eq + ?Sized>(&self, key: &Q) -> bool
    where
        K: Borrow<Q>,
    {
        self.counts.contains_key(key)
    }

    pub(crate) fn len(&self) -> usize {
        self.counts.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.counts.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn it_reports_exactly_the_first_arrival_and_the_last_departure(
            steps in prop::collection::vec((0..6u8, any::<bool>()), 0..80),
        ) {
            let mut counted = Counted::default();
            let mut model: BTreeMap<u8, u32> = BTreeMap::new();
            for (key, up) in steps {
                let count = model.entry(key).or_insert(0);
                if up {
                    *count += 1;
                    prop_assert_eq!(counted.add(key), *count == 1);
                } else if *count > 0 {
                    *count -= 1;
                    prop_assert_eq!(counted.remove(&key), *count == 0);
                }
                model.retain(|_, count| *count > 0);
                for key in 0..6 {
                    prop_assert_eq!(counted.contains(&key), model.contains_key(&key));
                }
                prop_assert_eq!(counted.len(), model.len());
                prop_assert_eq!(counted.is_empty(), model.is_empty());
            }
        }
    }
}
