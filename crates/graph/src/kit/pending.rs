//! The last value per key, since it was last asked for.

use std::collections::{BTreeMap, BTreeSet};

use super::Column;

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

/// As [`Pending`], for keys that have a dense number of their own while they have a value: remembers what
/// the consumer knows as one byte a number instead of by key.
///
/// A number may go to another key as soon as its key was [`remove`](Self::remove)d.
#[derive(Debug)]
pub(crate) struct PendingById<K, V> {
    changed: BTreeMap<K, News<V>>,
    /// By number: whether the consumer knows the key, unless `changed` says so.
    known: Column<bool>,
    known_count: usize,
}

#[derive(Debug)]
struct News<V> {
    id: u32,
    value: Option<V>,
    /// The consumer knows a value before this one.
    known: bool,
}

impl<K, V> Default for PendingById<K, V> {
    fn default() -> Self {
        Self { changed: BTreeMap::new(), known: Column::default(), known_count: 0 }
    }
}

impl<K: Ord, V> PendingById<K, V> {
    pub(crate) fn set(&mut self, id: u32, key: K, value: V) {
        let known = self.forget(id, &key);
        self.changed.insert(key, News { id, value: Some(value), known });
    }

    pub(crate) fn remove(&mut self, id: u32, key: K) {
        if self.forget(id, &key) {
            self.changed.insert(key, News { id, value: None, known: true });
        } else {
            self.changed.remove(&key);
        }
    }

    /// Tells whether the consumer knows the key, from now on to be remembered in `changed`.
    fn forget(&mut self, id: u32, key: &K) -> bool {
        if let Some(news) = self.changed.get(key) {
            return news.known;
        }
        let known = self.known.take(id);
        self.known_count -= usize::from(known);
        if self.known_count == 0 {
            self.known = Column::default();
        }
        known
    }

    /// Returns what is new, in order; the consumer knows it from now on.
    pub(crate) fn take(&mut self) -> BTreeMap<K, Option<V>> {
        let Self { changed, known, known_count } = self;
        let news = std::mem::take(changed).into_iter().map(|(key, News { id, value, .. })| {
            if value.is_some() {
                *known_count += 1;
                *known.slot(id) = true;
            }
            (key, value)
        });
        news.collect()
    }

    /// True if the consumer knows nothing and there is nothing to tell it.
    pub(crate) fn is_empty(&self) -> bool {
        self.changed.is_empty() && self.known_count == 0
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
            let mut by_id = PendingById::default();
            // Numbers are given to keys as they come, and given again when they go.
            let mut ids: BTreeMap<u8, u32> = BTreeMap::new();
            let mut model = BTreeMap::new();
            let mut consumer = BTreeMap::new();
            for (key, value, cut) in steps {
                match value {
                    Some(value) => {
                        pending.set(key, value);
                        let free = (0..).find(|id| !ids.values().any(|used| used == id)).unwrap_or_default();
                        by_id.set(*ids.entry(key).or_insert(free), key, value);
                        model.insert(key, value);
                    }
                    None => {
                        pending.remove(key);
                        if let Some(id) = ids.remove(&key) {
                            by_id.remove(id, key);
                        }
                        model.remove(&key);
                    }
                }
                if cut {
                    let news = pending.take();
                    prop_assert_eq!(&by_id.take(), &news);
                    prop_assert_eq!(by_id.is_empty(), ids.is_empty());
                    for (key, value) in news {
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
