//! A short cut from pairs of strings to numbers.

use std::hash::Hasher as _;

use rustc_hash::FxHasher;

/// Pairs that are longer together are not kept.
const LONGEST: usize = 52;

const SHELVES: usize = 512;

/// Pairs of strings that were asked for lately, with two numbers each.
///
/// Objects come with the same labels again and again, and here such a label is found in a quarter of the
/// time that interning it anew takes: one look at one place, without any way from there to others.
///
/// Law: *what get(a, b) returns is what the last put(a, b) said, unless forget(a, b) came later*. It may
/// return nothing at any time.
#[derive(Debug, Default)]
pub(crate) struct Recent {
    /// By hash. Empty until something is put.
    shelves: Vec<[Place; 2]>,
}

/// One line of the processor's cache.
#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
struct Place {
    /// One string behind the other.
    text: [u8; LONGEST],
    numbers: (u32, u32),
    /// No pair has a length like [`VACANT`].
    lengths: [u8; 2],
}

const VACANT: [u8; 2] = [u8::MAX; 2];

impl Default for Place {
    fn default() -> Self {
        Self { text: [0; LONGEST], numbers: (0, 0), lengths: VACANT }
    }
}

impl Place {
    fn is(&self, a: &[u8], b: &[u8]) -> bool {
        let [of_a, of_b] = self.lengths.map(usize::from);
        (of_a, of_b) == (a.len(), b.len())
            && self.text.get(..of_a) == Some(a)
            && self.text.get(of_a..of_a + of_b) == Some(b)
    }
}

/// Where a pair is kept.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Shelf(u16);

impl Shelf {
    pub(crate) fn of(a: &[u8], b: &[u8]) -> Self {
        let mut hasher = FxHasher::default();
        hasher.write(a);
        hasher.write(b);
        Self((hasher.finish() % SHELVES as u64) as u16)
    }
}

impl Recent {
    pub(crate) fn get(&self, a: &[u8], b: &[u8]) -> Option<(u32, u32)> {
        self.get_at(Shelf::of(a, b), a, b)
    }

    /// As [`get`](Self::get) for who knows the shelf.
    pub(crate) fn get_at(&self, shelf: Shelf, a: &[u8], b: &[u8]) -> Option<(u32, u32)> {
        let shelf = self.shelves.get(usize::from(shelf.0))?;
        shelf.iter().find(|place| place.is(a, b)).map(|place| place.numbers)
    }

    /// Keeps a pair that is not kept, in the place of one that came earlier.
    pub(crate) fn put(&mut self, a: &[u8], b: &[u8], numbers: (u32, u32)) {
        if a.len() + b.len() > LONGEST {
            return;
        }
        if self.shelves.is_empty() {
            self.shelves = vec![Default::default(); SHELVES];
        }
        let Some([newer, older]) = self.shelves.get_mut(usize::from(Shelf::of(a, b).0)) else { return };
        *older = *newer;
        for (from, text) in [(0, a), (a.len(), b)] {
            let place = newer.text.get_mut(from..from + text.len());
            place.into_iter().for_each(|place| place.copy_from_slice(text));
        }
        // Both fit, because both together are that short.
        newer.lengths = [a.len() as u8, b.len() as u8];
        newer.numbers = numbers;
    }

    /// Forgets a pair, if it is kept.
    pub(crate) fn forget(&mut self, a: &[u8], b: &[u8]) {
        let Some(shelf) = self.shelves.get_mut(usize::from(Shelf::of(a, b).0)) else { return };
        shelf.iter_mut().filter(|place| place.is(a, b)).for_each(|place| place.lengths = VACANT);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    /// Around the longest that is kept, some that are the same text put together, and many that differ in
    /// one of the two only, of which some share a shelf.
    fn text(which: u32) -> (String, String) {
        match which {
            0..=3 => ("a".repeat(which as usize), "a".repeat(3 - which as usize)),
            4..=9 => ("k".repeat(which as usize), "v".repeat(LONGEST - 6)),
            1_000..1_500 => (format!("key-{which}"), "value".to_owned()),
            1_500.. => ("key".to_owned(), format!("value-{which}")),
            _ => (format!("key-{}", which % 30), format!("value-{which}")),
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn what_is_found_is_what_was_put_and_not_forgotten(
            steps in prop::collection::vec((0..2_000u32, prop::option::weighted(0.8, any::<(u32, u32)>())), 0..600),
        ) {
            let mut recent = Recent::default();
            let mut model: BTreeMap<u32, (u32, u32)> = BTreeMap::new();
            for (which, value) in steps {
                // Half of the steps among a few.
                let which = if which < 1_000 { which % 16 } else { which };
                let (a, b) = text(which);
                let (a, b) = (a.as_bytes(), b.as_bytes());
                let found = recent.get(a, b);
                prop_assert!(found.is_none() || found == model.get(&which).copied());
                match value {
                    Some(numbers) if found.is_none() => {
                        recent.put(a, b, numbers);
                        let is_kept = a.len() + b.len() <= LONGEST;
                        prop_assert_eq!(recent.get(a, b), is_kept.then_some(numbers));
                        model.insert(which, numbers);
                    }
                    Some(_) => (),
                    None => {
                        recent.forget(a, b);
                        prop_assert_eq!(recent.get(a, b), None);
                        model.remove(&which);
                    }
                }
            }
        }
    }

    #[test]
    fn a_few_hundred_pairs_are_kept_together() {
        let mut recent = Recent::default();
        let pairs: Vec<(String, String)> = (10..150).map(text).collect();
        for _ in 0..2 {
            for (n, (a, b)) in (0..).zip(&pairs) {
                if recent.get(a.as_bytes(), b.as_bytes()).is_none() {
                    recent.put(a.as_bytes(), b.as_bytes(), (n, n + 1));
                }
            }
        }
        let kept = (0..).zip(&pairs).filter(|(n, (a, b))| recent.get(a.as_bytes(), b.as_bytes()) == Some((*n, n + 1)));
        assert!(kept.count() > 100);
        assert_eq!(size_of::<Place>(), 64);
    }
}
