//! Byte strings as dense numbers, counted so that what nobody uses any more is forgotten.

use std::hash::BuildHasher as _;

use hashbrown::HashTable;
use hashbrown::hash_table::Entry as Place;

use super::{Bytes, Column, Seed, make_room, shrink};

/// As [`Interner`](super::Interner), for byte strings, of which there may be a million: eight bytes and
/// a place in a hash table each, besides the bytes.
#[derive(Debug, Default)]
pub(crate) struct Strings {
    bytes: Bytes,
    entries: Column<Entry>,
    by_value: HashTable<u32>,
    seed: Seed,
    /// Numbers that have ever been given out.
    numbers: u32,
    /// The first number that stands for nothing, plus one.
    free: u32,
}

#[derive(Clone, Copy, Debug, Default)]
struct Entry {
    /// Where the bytes are; while there are no uses, the next number that stands for nothing, plus one.
    handle: u32,
    uses: u32,
}

impl Strings {
    /// Returns the number of a string, and whether it is new. One more use.
    pub(crate) fn acquire(&mut self, value: &[u8]) -> (u32, bool) {
        let Self { bytes, entries, by_value, seed, numbers, free } = self;
        let of = |id: &u32| bytes.get(entries.get(*id).map_or(0, |entry| entry.handle));
        make_room(by_value, |id| seed.hash_one(of(id)));
        let id = match by_value.entry(seed.hash_one(value), |id| of(id) == value, |id| seed.hash_one(of(id))) {
            Place::Occupied(place) => {
                let id = *place.get();
                entries.slot(id).uses += 1;
                return (id, false);
            }
            Place::Vacant(place) => {
                // Four thousand million strings do not fit into memory.
                let id = free.checked_sub(1).unwrap_or(*numbers);
                place.insert(id);
                id
            }
        };
        let entry = entries.slot(id);
        match *free {
            0 => *numbers += 1,
            _ => *free = entry.handle,
        }
        *entry = Entry { handle: bytes.insert(value), uses: 1 };
        (id, true)
    }

    /// One more use of a string that is in use.
    pub(crate) fn retain(&mut self, id: u32) {
        self.retain_many(id, 1);
    }

    /// As many more uses of a string that is in use.
    pub(crate) fn retain_many(&mut self, id: u32, count: u32) {
        match self.entries.get_mut(id) {
            Some(entry) if entry.uses > 0 => entry.uses += count,
            _ => debug_assert!(false, "retained a number that stands for nothing"),
        }
    }

    /// One use less; true if it was the last, after which the number is free for another string.
    pub(crate) fn release(&mut self, id: u32) -> bool {
        self.release_many(id, 1)
    }

    /// As many uses less; true if the last was among them.
    pub(crate) fn release_many(&mut self, id: u32, count: u32) -> bool {
        let Some(entry) = self.entries.get_mut(id).filter(|entry| entry.uses >= count && count > 0) else {
            debug_assert!(false, "released a number that stands for nothing");
            return false;
        };
        entry.uses -= count;
        if entry.uses > 0 {
            return false;
        }
        let handle = std::mem::replace(&mut entry.handle, self.free);
        self.free = id + 1;
        match self.by_value.find_entry(self.seed.hash_one(self.bytes.get(handle)), |known| *known == id) {
            Ok(place) => drop(place.remove()),
            Err(_) => debug_assert!(false, "a string was not under its hash"),
        }
        self.bytes.remove(handle);
        self.shrink();
        true
    }

    /// Gives memory back after mass departures; a number in use never changes.
    fn shrink(&mut self) {
        let Self { bytes, entries, by_value, seed, .. } = self;
        if by_value.is_empty() {
            let seed = seed.clone();
            *self = Self { seed, ..Self::default() };
            return;
        }
        shrink(by_value, |id| seed.hash_one(bytes.get(entries.get(*id).map_or(0, |entry| entry.handle))));
    }

    /// Returns a string in use.
    pub(crate) fn get(&self, id: u32) -> &[u8] {
        match self.entries.get(id) {
            Some(entry) if entry.uses > 0 => self.bytes.get(entry.handle),
            _ => {
                debug_assert!(false, "asked for a number that stands for nothing");
                &[]
            }
        }
    }

    /// How often the string is in use.
    pub(crate) fn uses(&self, id: u32) -> u32 {
        self.entries.get(id).map_or(0, |entry| entry.uses)
    }

    /// Returns the number of a string in use.
    pub(crate) fn find(&self, value: &[u8]) -> Option<u32> {
        self.by_value.find(self.seed.hash_one(value), |id| self.get(*id) == value).copied()
    }

    /// How many strings are in use.
    pub(crate) fn len(&self) -> usize {
        self.by_value.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.by_value.is_empty()
    }
}

/// Reads a string that is a list of numbers of four bytes, lowest byte first.
pub(crate) fn words(bytes: &[u8]) -> impl Iterator<Item = u32> {
    let (words, _) = bytes.as_chunks::<4>();
    words.iter().map(|word| u32::from_le_bytes(*word))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn strings_and_numbers_correspond_while_in_use(
            steps in prop::collection::vec((0..12usize, 0..3u8), 0..150),
        ) {
            let mut strings = Strings::default();
            let mut uses: BTreeMap<usize, (u32, u32)> = BTreeMap::new();
            let text = |length: usize| vec![length as u8; length * 7];
            for (length, verb) in steps {
                match (uses.get_mut(&length), verb) {
                    (entry, 0) => {
                        let (id, new) = strings.acquire(&text(length));
                        prop_assert_eq!(new, entry.is_none());
                        let entry = uses.entry(length).or_insert((id, 0));
                        prop_assert_eq!(entry.0, id);
                        entry.1 += 1;
                    }
                    (Some((id, count)), 1) => {
                        strings.retain_many(*id, 2);
                        strings.retain(*id);
                        prop_assert!(!strings.release_many(*id, 2));
                        *count += 1;
                    }
                    (Some((id, count)), _) => {
                        *count -= 1;
                        prop_assert_eq!(strings.release(*id), *count == 0);
                        if *count == 0 {
                            uses.remove(&length);
                        }
                    }
                    (None, _) => prop_assert_eq!(strings.find(&text(length)), None),
                }
                prop_assert_eq!(strings.len(), uses.len());
                prop_assert_eq!(strings.is_empty(), uses.is_empty());
                for (length, (id, count)) in &uses {
                    prop_assert_eq!(strings.get(*id), text(*length));
                    prop_assert_eq!(strings.uses(*id), *count);
                    prop_assert_eq!(strings.find(&text(*length)), Some(*id));
                }
            }
        }
    }

    #[test]
    fn numbers_stay_dense_under_churn() {
        let mut strings = Strings::default();
        for round in 0..1_000u32 {
            let (a, _) = strings.acquire(&round.to_le_bytes());
            let (b, _) = strings.acquire(&(round + 1_000_000).to_le_bytes());
            assert!(a < 2 && b < 2, "numbers of round {round}: {a}, {b}");
            strings.release(a);
            if round % 2 == 0 {
                strings.release(b);
            } else {
                let (c, _) = strings.acquire(b"kept meanwhile");
                strings.release(b);
                strings.release(c);
            }
        }
        assert!(strings.is_empty());
    }
}
