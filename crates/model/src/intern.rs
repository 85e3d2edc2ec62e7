//! Texts that recur from document to document, kept once.
//!
//! Fed by [`crate::convert`] with the texts of documents as they are decoded. A label key of ten thousand endpoints is
//! one [`Name`] in all of them, and a selector of a thousand rules is parsed once.
//!
//! Names are kept in a cache of fixed size, because most texts of a large cluster are identifiers that never come
//! back: a text that is new takes the place of the one in its set that was used longest ago, at constant cost.
//! Selectors are kept in a table that grows, because parsing one costs far more than keeping it while somebody
//! uses it.
//!
//! Invariants: what is given back equals what was asked for, whatever came before; at most [`Pool::MAX_NAMES`] names
//! and, beside the selectors that others hold, a fraction as many again are kept; once nobody else holds anything,
//! [`Pool::sweep`] leaves no memory.

use std::hash::BuildHasher as _;
use std::sync::Arc;

use foldhash::fast::RandomState;
use hashbrown::HashTable;

use crate::names::Name;
use crate::selector::{ParseError, Selector};

/// Names that compete for one place; a power of two would do, two is what a cache line holds.
const WAYS: usize = 2;
const SETS: usize = 8192;

/// Longer texts are not worth a place: they hardly recur, and the pool is bounded in bytes too.
const LONGEST_NAME: usize = 256;

/// Names asked for between two sweeps.
const NAMES_PER_SWEEP: usize = 4 * SETS * WAYS;

/// A deletion counts as that many names: it is what leaves names without an owner.
const DELETION: usize = 16;

/// Sweeps of selectors wait until this many documents could have let go of some.
const FEWEST_RELEASES: usize = 64;

/// A sweep comes at the latest when there are so many more selectors than twice those that the last one left: one
/// document may bring thousands and take as many out of use.
const MOST_NEW: usize = 1024;

/// Of this many selectors, one release per sweep is waited for: a sweep looks at each of them.
const SELECTORS_PER_RELEASE: usize = 8;

/// See the [module documentation](self).
#[derive(Debug, Default)]
pub struct Pool {
    hashes: RandomState,
    /// Empty until the first name is asked for, then [`SETS`] long.
    names: Vec<[Slot; WAYS]>,
    selectors: HashTable<Parsed>,
    n_asked: usize,
    n_released: usize,
    /// Selectors that the last sweep left.
    n_swept: usize,
}

#[derive(Debug, Default)]
struct Slot {
    hash: u64,
    name: Option<Name>,
}

#[derive(Debug)]
struct Parsed {
    hash: u64,
    text: Box<str>,
    selector: Arc<Selector>,
}

impl Pool {
    /// The most names that are kept.
    pub const MAX_NAMES: usize = SETS * WAYS;

    /// Returns a name with this text, the same as before if it was asked for lately.
    pub fn name(&mut self, text: &str) -> Name {
        if text.len() > LONGEST_NAME {
            return text.into();
        }
        self.asked(1);
        if self.names.is_empty() {
            self.names.resize_with(SETS, Default::default);
        }
        let hash = self.hashes.hash_one(text);
        let Some([first, second]) = self.names.get_mut(hash as usize % SETS) else { return text.into() };
        if let Some(name) = first.holding(hash, text) {
            return Arc::clone(name);
        }
        // The first is the one that was used last.
        std::mem::swap(first, second);
        if let Some(name) = first.holding(hash, text) {
            return Arc::clone(name);
        }
        let name = Name::from(text);
        *first = Slot { hash, name: Some(Arc::clone(&name)) };
        name
    }

    /// Parses a selector, unless one of the same text is there.
    ///
    /// # Errors
    ///
    /// If the text is not a selector.
    pub fn selector(&mut self, text: &str) -> Result<Arc<Selector>, ParseError> {
        let hash = self.hashes.hash_one(text);
        if let Some(known) = self.selectors.find(hash, |known| known.hash == hash && *known.text == *text) {
            return Ok(Arc::clone(&known.selector));
        }
        let selector = Arc::new(Selector::parse(text)?);
        let parsed = Parsed { hash, text: text.into(), selector: Arc::clone(&selector) };
        self.selectors.insert_unique(hash, parsed, |known| known.hash);
        Ok(selector)
    }

    /// Takes note that an object was deleted.
    pub(crate) fn deleted(&mut self) {
        self.asked(DELETION);
    }

    /// Takes note that an object with selectors was replaced or deleted, before its new ones are asked for.
    pub(crate) fn released_selectors(&mut self) {
        self.n_released += 1;
        let enough = FEWEST_RELEASES.max(self.selectors.len() / SELECTORS_PER_RELEASE);
        if self.n_released >= enough || self.selectors.len() > 2 * self.n_swept + MOST_NEW {
            self.sweep_selectors();
        }
    }

    fn asked(&mut self, n: usize) {
        self.n_asked += n;
        if self.n_asked >= NAMES_PER_SWEEP {
            self.sweep_names();
        }
    }

    /// Drops what nobody else holds. The pool does so by itself as it is used; whoever owns it does so too when
    /// nothing has happened for a while.
    pub fn sweep(&mut self) {
        self.sweep_names();
        self.sweep_selectors();
    }

    fn sweep_names(&mut self) {
        self.n_asked = 0;
        let mut any_left = false;
        for slot in self.names.iter_mut().flatten() {
            if slot.name.as_ref().is_some_and(|name| Arc::strong_count(name) == 1) {
                slot.name = None;
            }
            any_left |= slot.name.is_some();
        }
        if !any_left {
            self.names = Vec::new();
        }
    }

    fn sweep_selectors(&mut self) {
        self.n_released = 0;
        self.selectors.retain(|parsed| Arc::strong_count(&parsed.selector) > 1);
        self.n_swept = self.selectors.len();
        if self.selectors.len() * 4 <= self.selectors.capacity() {
            self.selectors.shrink_to(self.selectors.len() * 2, |known| known.hash);
        }
    }

    /// Number of names and of selectors that are kept.
    pub fn len(&self) -> (usize, usize) {
        (self.names.iter().flatten().filter(|slot| slot.name.is_some()).count(), self.selectors.len())
    }

    /// True if nothing is kept, and no memory for it.
    pub fn is_empty(&self) -> bool {
        self.names.capacity() == 0 && self.selectors.capacity() == 0
    }
}

impl Slot {
    fn holding(&self, hash: u64, text: &str) -> Option<&Name> {
        self.name.as_ref().filter(|name| self.hash == hash && ***name == *text)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_text_that_recurs_is_one_name() {
        let mut pool = Pool::default();
        let (first, other, second) = (pool.name("a"), pool.name("b"), pool.name("a"));
        assert!(Arc::ptr_eq(&first, &second));
        assert_eq!((&*first, &*other, pool.len().0), ("a", "b", 2));
        let long = "x".repeat(LONGEST_NAME + 1);
        assert!(!Arc::ptr_eq(&pool.name(&long), &pool.name(&long)));
        assert_eq!(pool.len().0, 2);
    }

    #[test]
    fn a_selector_of_one_text_is_parsed_once_and_a_text_that_is_none_is_refused_every_time() {
        let mut pool = Pool::default();
        let (first, second) = (pool.selector("a == 'b'").unwrap(), pool.selector("a == 'b'").unwrap());
        assert!(Arc::ptr_eq(&first, &second));
        assert!(!Arc::ptr_eq(&first, &pool.selector("a == \"b\"").unwrap()), "another text, though the same selector");
        assert_eq!(pool.selector("a =="), Selector::parse("a ==").map(Arc::new));
        assert_eq!(pool.selector("a =="), Selector::parse("a ==").map(Arc::new));
        assert_eq!(pool.len().1, 2);
    }

    #[test]
    fn names_that_are_used_stay_while_others_come_and_go() {
        let mut pool = Pool::default();
        let used = pool.name("used");
        for n in 0..100_000 {
            pool.name(&format!("once-{n}"));
            assert!(Arc::ptr_eq(&used, &pool.name("used")), "after {n} others");
        }
    }

    #[test]
    fn churn_keeps_the_pool_bounded() {
        let mut pool = Pool::default();
        let kept: Vec<_> = (0..1000).map(|n| pool.selector(&format!("has(kept-{n})")).unwrap()).collect();
        let mut most = (0, 0);
        for n in 0..200_000 {
            let (names, selectors) = pool.len_after(n);
            most = (most.0.max(names), most.1.max(selectors));
        }
        assert!(most.0 <= Pool::MAX_NAMES, "{most:?}");
        assert!(most.1 <= 2 * kept.len() + 4 * FEWEST_RELEASES, "{most:?}");
    }

    #[test]
    fn documents_of_many_selectors_leave_the_pool_bounded_too() {
        let mut pool = Pool::default();
        let mut most = 0;
        for document in 0..1000 {
            pool.released_selectors();
            let selectors: Vec<_> = (0..40).map(|n| pool.selector(&format!("has(d{document}-{n})")).unwrap()).collect();
            most = most.max(pool.len().1);
            drop(selectors);
        }
        assert!(most <= MOST_NEW + 2 * 40, "{most}");
    }

    #[test]
    fn what_nobody_else_holds_goes_as_objects_are_deleted() {
        let mut pool = Pool::default();
        let names: Vec<_> = (0..5000).map(|n| pool.name(&n.to_string())).collect();
        let selectors: Vec<_> = (0..5000).map(|n| pool.selector(&format!("has(a{n})")).unwrap()).collect();
        pool.sweep();
        // Two names may share a set with a third.
        assert!(pool.len().0 > 4000 && pool.len().1 == 5000, "{:?}", pool.len());
        drop((names, selectors));
        for _ in 0..5000 {
            pool.deleted();
            pool.released_selectors();
        }
        assert_eq!(pool.len(), (0, 0));
        pool.sweep();
        assert!(pool.is_empty());
    }

    #[test]
    fn a_sweep_leaves_what_is_used_and_no_memory_for_nothing() {
        let mut pool = Pool::default();
        let used = (pool.name("used"), pool.selector("has(used)").unwrap());
        drop((pool.name("unused"), pool.selector("has(unused)").unwrap()));
        pool.sweep();
        assert_eq!(pool.len(), (1, 1));
        assert!(Arc::ptr_eq(&used.0, &pool.name("used")));
        assert!(Arc::ptr_eq(&used.1, &pool.selector("has(used)").unwrap()));
        drop(used);
        pool.sweep();
        assert!(pool.is_empty());
    }

    impl Pool {
        /// Replaces an object with a name and a selector of its own.
        fn len_after(&mut self, n: u32) -> (usize, usize) {
            self.released_selectors();
            self.name(&format!("name-{n}"));
            drop(self.selector(&format!("has(label-{n})")).unwrap());
            // Counting the names looks at every place.
            if n.is_multiple_of(1000) { self.len() } else { (0, self.selectors.len()) }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn every_name_has_the_text_that_was_asked_for(
            texts in prop::collection::vec("[ab]{0,4}|\\PC{0,8}", 0..300),
            sweeps in prop::collection::vec(any::<bool>(), 300),
        ) {
            let mut pool = Pool::default();
            let mut held = Vec::new();
            for (n, (text, sweep)) in texts.iter().zip(sweeps).enumerate() {
                let name = pool.name(text);
                prop_assert_eq!(&*name, text.as_str());
                if n % 3 == 0 {
                    held.push(name);
                }
                if sweep && n % 10 == 0 {
                    pool.sweep();
                }
            }
        }
    }
}
