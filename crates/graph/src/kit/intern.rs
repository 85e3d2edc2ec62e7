//! Values as dense numbers, counted so that what nobody uses any more is forgotten.

use std::borrow::Borrow;
use std::hash::{BuildHasher as _, Hash};

use hashbrown::HashTable;
use hashbrown::hash_table::Entry;

use super::Seed;

/// A two-way mapping between values and dense numbers.
///
/// Every [`acquire_ref`](Self::acquire_ref) is one use, every
/// [`release`](Self::release) gives one back; after the last the number is free for another value.
#[derive(Debug)]
pub(crate) struct Interner<T> {
    slots: Vec<Slot<T>>,
    free: Vec<u32>,
    by_value: HashTable<u32>,
    seed: Seed,
}

#[derive(Debug)]
struct Slot<T> {
    value: Option<T>,
    uses: u32,
}

impl<T> Default for Interner<T> {
    fn default() -> Self {
        Self { slots: Vec::new(), free: Vec::new(), by_value: HashTable::new(), seed: Seed::default() }
    }
}

impl<T: Hash + Eq> Interner<T> {
    /// Returns the number of a value, and whether the value is new. One more use. `own` is called only if
    /// the value is new.
    pub(crate) fn acquire_ref<Q: Hash + Eq + ?Sized>(&mut self, value: &Q, own: impl FnOnce(&Q) -> T) -> (u32, bool)
    where
        T: Borrow<Q>,
    {
        self.acquire_hashed(self.seed.hash_one(value), |known| known.borrow() == value, || own(value))
    }

    fn acquire_hashed(&mut self, hash: u64, is: impl Fn(&T) -> bool, own: impl FnOnce() -> T) -> (u32, bool) {
        let Self { slots, free, by_value, seed } = self;
        let eq = |id: &u32| slots.get(*id as usize).and_then(|slot| slot.value.as_ref()).is_some_and(&is);
        let rehash = |id: &u32| match slots.get(*id as usize).and_then(|slot| slot.value.as_ref()) {
            Some(value) => seed.hash_one(value),
            None => 0,
        };
        match by_value.entry(hash, eq, rehash) {
            Entry::Occupied(entry) => {
                let id = *entry.get();
                if let Some(slot) = slots.get_mut(id as usize) {
                    slot.uses += 1;
                }
                (id, false)
            }
            Entry::Vacant(entry) => {
                // Four thousand million values do not fit into memory.
                let id = free.last().copied().unwrap_or(slots.len() as u32);
                entry.insert(id);
                free.pop();
                let slot = Slot { value: Some(own()), uses: 1 };
                match slots.get_mut(id as usize) {
                    Some(place) => *place = slot,
                    None => slots.push(slot),
                }
                (id, true)
            }
        }
    }

    /// One use less. After the last one, forgets the value and returns it.
    pub(crate) fn release(&mut self, id: u32) -> Option<T> {
        let slot = self.slots.get_mut(id as usize).filter(|slot| slot.value.is_some());
        let Some(slot) = slot else {
            debug_assert!(false, "released a number that stands for nothing");
            return None;
        };
        slot.uses -= 1;
        if slot.uses > 0 {
            return None;
        }
        let value = slot.value.take()?;
        let hash = self.seed.hash_one(&value);
        match self.by_value.find_entry(hash, |known| *known == id) {
            Ok(entry) => drop(entry.remove()),
            Err(_) => debug_assert!(false, "a value was not under its hash"),
        }
        self.free.push(id);
        self.shrink();
        Some(value)
    }

    /// Gives memory back after mass departures; a number in use never changes.
    fn shrink(&mut self) {
        if self.by_value.is_empty() {
            let seed = self.seed.clone();
            *self = Self { seed, ..Self::default() };
        } else if self.by_value.capacity() > 64 && self.by_value.len() < self.by_value.capacity() / 8 {
            let Self { slots, by_value, seed, .. } = self;
            by_value.shrink_to(by_value.len() * 2, |id| {
                slots.get(*id as usize).and_then(|slot| slot.value.as_ref()).map_or(0, |value| seed.hash_one(value))
            });
        }
    }

    pub(crate) fn get(&self, id: u32) -> Option<&T> {
        self.slots.get(id as usize)?.value.as_ref()
    }

    /// How many values are in use.
    pub(crate) fn len(&self) -> usize {
        self.by_value.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.by_value.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn values_and_numbers_correspond_while_in_use(
            steps in prop::collection::vec((0..8u8, any::<bool>()), 0..120),
        ) {
            let mut interner: Interner<String> = Interner::default();
            let mut uses: BTreeMap<u8, (u32, u32)> = BTreeMap::new();
            for (value, up) in steps {
                let text = value.to_string();
                if up {
                    let (id, new) = interner.acquire_ref(text.as_str(), str::to_owned);
                    let entry = uses.entry(value).or_insert((id, 0));
                    prop_assert_eq!(new, entry.1 == 0);
                    prop_assert_eq!(entry.0, id);
                    entry.1 += 1;
                } else if let Some((id, count)) = uses.get_mut(&value) {
                    *count -= 1;
                    prop_assert_eq!(interner.release(*id), (*count == 0).then_some(text));
                    if *count == 0 {
                        uses.remove(&value);
                    }
                }
                prop_assert_eq!(interner.len(), uses.len());
                prop_assert_eq!(interner.is_empty(), uses.is_empty());
                for (value, (id, _)) in &uses {
                    prop_assert_eq!(interner.get(*id), Some(&value.to_string()));
                }
            }
        }
    }

    #[test]
    fn numbers_stay_dense_under_churn_and_memory_is_given_back() {
        let mut interner: Interner<u64> = Interner::default();
        for round in 0..1_000 {
            let (a, _) = interner.acquire_ref(&round, u64::clone);
            let (b, _) = interner.acquire_ref(&(round + 1_000_000), u64::clone);
            assert!(a < 2 && b < 2, "numbers of round {round}: {a}, {b}");
            interner.release(a);
            interner.release(b);
        }
        let ids: Vec<u32> = (0..10_000).map(|value| interner.acquire_ref(&value, u64::clone).0).collect();
        for id in &ids[1..] {
            interner.release(*id);
        }
        assert!(interner.by_value.capacity() < 1_000, "{}", interner.by_value.capacity());
        assert_eq!(interner.get(ids[0]), Some(&0));
    }
}
