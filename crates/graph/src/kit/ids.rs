//! Many sets of small numbers, most of them tiny.

use super::Column;

/// Names a set in [`IdSets`], or is the set itself if it has no more than one element.
///
/// Four bytes: whoever has a set for each of a million things has most of them with one element.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct IdSet(u32);

const EMPTY: u32 = u32::MAX;
/// Marks the number of a set of two or more elements.
const SHARED: u32 = 1 << 31;

/// A list of more elements becomes chunks, and chunks of fewer become a list.
const MAX_LIST: usize = 256;
const MIN_CHUNKED: usize = 128;

/// Numbers that a chunk covers.
const CHUNK: u32 = 4096;
const WORDS: usize = CHUNK as usize / 64;
/// More elements of a chunk become bits, and fewer become a list. A list has room for all that it may
/// ever hold, so that what fluctuates does not call the allocator whenever it is longer than ever.
const MAX_SPARSE: usize = 32;
const MIN_DENSE: usize = 16;

/// A list that is given up keeps its room for the next, unless it is larger than this.
const KEEP: usize = 16;

impl Default for IdSet {
    fn default() -> Self {
        Self(EMPTY)
    }
}

impl IdSet {
    pub(crate) const fn is_empty(self) -> bool {
        self.0 == EMPTY
    }
}

/// The sets of two and more elements that some [`IdSet`]s name.
///
/// Elements are below 2^31 and come out in order. Two elements cost a list, thousands a bit each if they
/// lie together and sixteen bytes at most. Growing and shrinking around any size calls the allocator only now and then.
#[derive(Debug, Default)]
pub(crate) struct IdSets {
    sets: Column<Elements, 64>,
    free: Vec<u32>,
    next: u32,
}

#[derive(Debug)]
enum Elements {
    /// Sorted.
    List(Vec<u32>),
    Chunked(Box<Chunked>),
}

impl Default for Elements {
    fn default() -> Self {
        Self::List(Vec::new())
    }
}

#[derive(Debug, Default)]
struct Chunked {
    /// Sorted by number. A few may be empty.
    chunks: Vec<Chunk>,
    len: usize,
    empty: usize,
}

#[derive(Debug)]
struct Chunk {
    number: u32,
    content: Content,
}

#[derive(Debug)]
enum Content {
    /// Sorted.
    Sparse(Vec<u16>),
    Dense {
        bits: Box<[u64; WORDS]>,
        len: u16,
    },
}

impl IdSets {
    /// Adds an element; false if it was there.
    pub(crate) fn insert(&mut self, set: &mut IdSet, id: u32) -> bool {
        debug_assert!(id < SHARED, "a number that is not small");
        if set.0 == EMPTY {
            set.0 = id;
            return true;
        }
        if set.0 & SHARED == 0 {
            if set.0 == id {
                return false;
            }
            let number = self.free.pop().unwrap_or_else(|| {
                self.next += 1;
                self.next - 1
            });
            let elements = self.sets.slot(number);
            if let Elements::List(list) = elements {
                list.extend([set.0.min(id), set.0.max(id)]);
            }
            set.0 = number | SHARED;
            return true;
        }
        match self.sets.get_mut(set.0 & !SHARED) {
            Some(elements) => elements.insert(id),
            None => false,
        }
    }

    /// Takes an element away; false if it was not there.
    pub(crate) fn remove(&mut self, set: &mut IdSet, id: u32) -> bool {
        if set.0 == EMPTY || set.0 & SHARED == 0 {
            let is_it = set.0 == id;
            if is_it {
                set.0 = EMPTY;
            }
            return is_it;
        }
        let number = set.0 & !SHARED;
        let Some(elements) = self.sets.get_mut(number) else { return false };
        if !elements.remove(id) {
            return false;
        }
        if let Elements::List(list) = elements
            && let [last] = **list
        {
            list.clear();
            if list.capacity() > KEEP {
                *list = Vec::new();
            }
            set.0 = last;
            self.free.push(number);
        }
        true
    }

    fn elements(&self, set: IdSet) -> Option<&Elements> {
        (set.0 != EMPTY && set.0 & SHARED != 0).then(|| self.sets.get(set.0 & !SHARED)).flatten()
    }

    pub(crate) fn len(&self, set: IdSet) -> usize {
        match self.elements(set) {
            Some(elements) => elements.len(),
            None => usize::from(!set.is_empty()),
        }
    }

    /// Gives the elements in order to `found`; of a set of one element faster than [`iter`](Self::iter).
    #[inline]
    pub(crate) fn for_each(&self, set: IdSet, mut found: impl FnMut(u32)) {
        if set.0 & SHARED == 0 {
            found(set.0);
        } else {
            self.iter(set).for_each(found);
        }
    }

    /// The elements in order.
    pub(crate) fn iter(&self, set: IdSet) -> impl Iterator<Item = u32> {
        let single = (set.0 & SHARED == 0).then_some(set.0);
        let (list, chunks) = match self.elements(set) {
            Some(Elements::List(list)) => (&**list, &[][..]),
            Some(Elements::Chunked(chunked)) => (&[][..], &*chunked.chunks),
            None => (&[][..], &[][..]),
        };
        single.into_iter().chain(list.iter().copied()).chain(chunks.iter().flat_map(Chunk::iter))
    }
}

impl Elements {
    fn len(&self) -> usize {
        match self {
            Self::List(list) => list.len(),
            Self::Chunked(chunked) => chunked.len,
        }
    }

    fn insert(&mut self, id: u32) -> bool {
        match self {
            Self::List(list) => {
                let Err(at) = list.binary_search(&id) else { return false };
                list.insert(at, id);
                if list.len() > MAX_LIST {
                    let mut chunked = Chunked::default();
                    for id in list.iter() {
                        chunked.insert(*id);
                    }
                    *self = Self::Chunked(Box::new(chunked));
                }
                true
            }
            Self::Chunked(chunked) => chunked.insert(id),
        }
    }

    fn remove(&mut self, id: u32) -> bool {
        match self {
            Self::List(list) => match list.binary_search(&id) {
                Ok(at) => {
                    list.remove(at);
                    true
                }
                Err(_) => false,
            },
            Self::Chunked(chunked) => {
                let was_there = chunked.remove(id);
                if chunked.len < MIN_CHUNKED {
                    *self = Self::List(chunked.chunks.iter().flat_map(Chunk::iter).collect());
                }
                was_there
            }
        }
    }
}

impl Chunked {
    fn insert(&mut self, id: u32) -> bool {
        let (number, low) = (id / CHUNK, (id % CHUNK) as u16);
        let at = match self.chunks.binary_search_by_key(&number, |chunk| chunk.number) {
            Ok(at) => at,
            Err(at) => {
                self.chunks.insert(at, Chunk { number, content: Content::Sparse(Vec::with_capacity(MAX_SPARSE)) });
                self.empty += 1;
                at
            }
        };
        let Some(chunk) = self.chunks.get_mut(at) else { return false };
        let was_empty = chunk.is_empty();
        let is_new = chunk.insert(low);
        self.empty -= usize::from(was_empty);
        self.len += usize::from(is_new);
        is_new
    }

    fn remove(&mut self, id: u32) -> bool {
        let number = id / CHUNK;
        let Ok(at) = self.chunks.binary_search_by_key(&number, |chunk| chunk.number) else { return false };
        let Some(chunk) = self.chunks.get_mut(at) else { return false };
        if !chunk.remove((id % CHUNK) as u16) {
            return false;
        }
        self.len -= 1;
        if chunk.is_empty() {
            self.empty += 1;
            // Some may stay, so that an element that comes and goes does not allocate every time.
            if self.empty > 4 + self.chunks.len() / 2 {
                self.chunks.retain(|chunk| !chunk.is_empty());
                self.chunks.shrink_to(self.chunks.len() * 2);
                self.empty = 0;
            }
        }
        true
    }
}

impl Chunk {
    fn is_empty(&self) -> bool {
        match &self.content {
            Content::Sparse(list) => list.is_empty(),
            Content::Dense { len, .. } => *len == 0,
        }
    }

    fn insert(&mut self, low: u16) -> bool {
        match &mut self.content {
            Content::Sparse(list) => {
                let Err(at) = list.binary_search(&low) else { return false };
                if list.len() < MAX_SPARSE {
                    list.insert(at, low);
                    return true;
                }
                let mut bits = Box::new([0; WORDS]);
                for low in list.iter().copied().chain([low]) {
                    bits[usize::from(low) / 64 % WORDS] |= 1 << (low % 64);
                }
                let len = list.len() as u16 + 1;
                self.content = Content::Dense { bits, len };
                true
            }
            Content::Dense { bits, len } => {
                let word = &mut bits[usize::from(low) / 64 % WORDS];
                let bit = 1 << (low % 64);
                let is_new = *word & bit == 0;
                *word |= bit;
                *len += u16::from(is_new);
                is_new
            }
        }
    }

    fn remove(&mut self, low: u16) -> bool {
        match &mut self.content {
            Content::Sparse(list) => match list.binary_search(&low) {
                Ok(at) => {
                    list.remove(at);
                    true
                }
                Err(_) => false,
            },
            Content::Dense { bits, len } => {
                let word = &mut bits[usize::from(low) / 64 % WORDS];
                let bit = 1 << (low % 64);
                let was_there = *word & bit != 0;
                *word &= !bit;
                *len -= u16::from(was_there);
                if usize::from(*len) < MIN_DENSE {
                    let mut list = Vec::with_capacity(MAX_SPARSE);
                    list.extend(self.iter().map(|id| (id % CHUNK) as u16));
                    self.content = Content::Sparse(list);
                }
                was_there
            }
        }
    }

    fn iter(&self) -> impl Iterator<Item = u32> {
        let first = self.number * CHUNK;
        let (list, words) = match &self.content {
            Content::Sparse(list) => (&**list, &[][..]),
            Content::Dense { bits, .. } => (&[][..], &bits[..]),
        };
        let bits = (first..).step_by(64).zip(words).flat_map(|(first, word)| {
            let mut rest = *word;
            std::iter::from_fn(move || {
                let bit = rest.trailing_zeros();
                rest &= rest.checked_sub(1)?;
                Some(first + bit)
            })
        });
        list.iter().map(move |low| first + u32::from(*low)).chain(bits)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    /// Whole ranges come and go, so that every representation and every way between two is passed.
    #[derive(Clone, Debug)]
    enum Step {
        Add { first: u32, count: u32, stride: u32 },
        Remove { first: u32, count: u32, stride: u32 },
    }

    fn any_step() -> impl Strategy<Value = Step> {
        let first = prop_oneof![0..10u32, 4_090..4_100u32, 1_000_000..1_000_010u32];
        let count = prop_oneof![5 => 1..4u32, 3 => 20..80u32, 1 => 200..600u32];
        (first, count, prop_oneof![Just(1u32), Just(2), Just(97)], any::<bool>()).prop_map(
            |(first, count, stride, add)| match add {
                true => Step::Add { first, count, stride },
                false => Step::Remove { first, count, stride },
            },
        )
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn sets_hold_what_was_inserted_and_not_removed(
            steps in prop::collection::vec((0..3usize, any_step()), 0..40),
        ) {
            let mut sets = IdSets::default();
            let mut handles = [IdSet::default(); 3];
            let mut model: [BTreeSet<u32>; 3] = Default::default();
            for (which, step) in steps {
                let (Step::Add { first, count, stride } | Step::Remove { first, count, stride }) = step;
                for id in (0..count).map(|n| first + n * stride) {
                    if matches!(step, Step::Add { .. }) {
                        prop_assert_eq!(sets.insert(&mut handles[which], id), model[which].insert(id));
                    } else {
                        prop_assert_eq!(sets.remove(&mut handles[which], id), model[which].remove(&id));
                    }
                    prop_assert_eq!(sets.len(handles[which]), model[which].len());
                }
                for (handle, model) in handles.iter().zip(&model) {
                    prop_assert!(sets.iter(*handle).eq(model.iter().copied()));
                    let mut all = Vec::new();
                    sets.for_each(*handle, |id| all.push(id));
                    prop_assert!(all.iter().eq(model));
                    prop_assert_eq!(handle.is_empty(), model.is_empty());
                }
            }
            for (handle, model) in handles.iter_mut().zip(model) {
                for id in model {
                    prop_assert!(sets.remove(handle, id));
                }
                prop_assert!(handle.is_empty());
            }
            prop_assert_eq!(sets.free.len(), sets.next as usize);
        }
    }

    #[test]
    fn many_elements_cost_little_more_than_a_bit_each() {
        let (mut sets, mut set) = (IdSets::default(), IdSet::default());
        (0..100_000).for_each(|id| assert!(sets.insert(&mut set, id)));
        let Some(Elements::Chunked(chunked)) = sets.elements(set) else { panic!("no chunks") };
        assert!(chunked.chunks.iter().all(|chunk| matches!(chunk.content, Content::Dense { .. })));
        assert_eq!(chunked.chunks.len(), 25);
        assert_eq!(size_of::<IdSet>(), 4);
        assert!(size_of::<Elements>() <= 24);
    }
}
