//! Growing and shrinking of hash tables whose elements are numbers of things that lie elsewhere.

use hashbrown::HashTable;

use super::sort_numbers;

/// Tables of fewer elements are as they are.
const SMALL: usize = 64;

/// Makes room for one more element.
///
/// A table that is full is filled anew in the order of the numbers: what is hashed then comes one after
/// the other out of memory, which is several times faster than in the order of the hashes.
pub(crate) fn make_room(table: &mut HashTable<u32>, hash: impl Fn(&u32) -> u64) {
    let is_full = table.len() == table.capacity();
    // Otherwise it is full of what has gone, and cleans itself.
    let is_used = table.len() * 8 >= table.num_buckets() * 5;
    if !is_full || !is_used || table.len() < SMALL {
        return;
    }
    let mut numbers: Vec<u32> = table.drain().collect();
    sort_numbers(&mut numbers);
    *table = HashTable::with_capacity(numbers.len() * 2);
    for number in numbers {
        table.insert_unique(hash(&number), number, &hash);
    }
}

/// Gives memory back after mass departures.
pub(crate) fn shrink(table: &mut HashTable<u32>, hash: impl Fn(&u32) -> u64) {
    if table.capacity() > SMALL && table.len() < table.capacity() / 8 {
        table.shrink_to(table.len() * 2, hash);
    }
}

#[cfg(test)]
mod tests {
    use std::hash::BuildHasher as _;

    use super::*;
    use crate::kit::Seed;

    #[test]
    fn a_table_keeps_its_elements_while_it_grows_and_shrinks() {
        let (mut table, seed) = (HashTable::new(), Seed::default());
        let hash = |number: &u32| seed.hash_one(*number);
        for number in 0..10_000 {
            make_room(&mut table, hash);
            let room = table.capacity();
            table.insert_unique(hash(&number), number, hash);
            assert!(table.len() < SMALL || table.capacity() == room, "it grew by itself at {number}");
        }
        let has = |table: &HashTable<u32>, number: u32| table.find(hash(&number), |known| *known == number).is_some();
        assert!((0..10_000).all(|number| has(&table, number)));
        for number in 0..9_900 {
            table.find_entry(hash(&number), |known| *known == number).unwrap().remove();
            shrink(&mut table, hash);
        }
        assert!(table.capacity() < 1_000 && (9_900..10_000).all(|number| has(&table, number)));
    }
}
