//! Values by dense number.

/// A value for each of a dense range of numbers; a number that was never written has the default.
///
/// The values lie in pages of `PAGE`: growing copies nothing and wastes at most a page, and numbers that
/// lie far apart cost only the pages that they are on.
#[derive(Debug)]
pub(crate) struct Column<T, const PAGE: usize = 512> {
    /// Only those that somebody has written to are there.
    pages: Vec<Option<Box<[T; PAGE]>>>,
}

impl<T, const PAGE: usize> Default for Column<T, PAGE> {
    fn default() -> Self {
        Self { pages: Vec::new() }
    }
}

impl<T: Default, const PAGE: usize> Column<T, PAGE> {
    /// Returns the value; `None` if nothing near was ever written, which means the default.
    pub(crate) fn get(&self, id: u32) -> Option<&T> {
        self.pages.get(id as usize / PAGE)?.as_ref()?.get(id as usize % PAGE)
    }

    /// Returns the value without making room for it.
    pub(crate) fn get_mut(&mut self, id: u32) -> Option<&mut T> {
        self.pages.get_mut(id as usize / PAGE)?.as_mut()?.get_mut(id as usize % PAGE)
    }

    /// Returns the value, making room first if the number is new.
    pub(crate) fn slot(&mut self, id: u32) -> &mut T {
        let (page, at) = (id as usize / PAGE, id as usize % PAGE);
        if page >= self.pages.len() {
            self.pages.resize_with(page + 1, || None);
        }
        let page = self.pages[page].get_or_insert_with(|| Box::new(std::array::from_fn(|_| T::default())));
        &mut page[at]
    }

    /// Sets the value and returns the one before.
    pub(crate) fn replace(&mut self, id: u32, value: T) -> T {
        std::mem::replace(self.slot(id), value)
    }

    /// Sets the value to the default and returns the one before.
    pub(crate) fn take(&mut self, id: u32) -> T {
        self.get_mut(id).map(std::mem::take).unwrap_or_default()
    }

    /// All values on pages that were written to, by number; most of them may be the default.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u32, &T)> {
        let pages = (0u32..).step_by(PAGE).zip(&self.pages);
        pages.flat_map(|(first, page)| (first..).zip(page.iter().flat_map(|page| page.iter())))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_number_has_the_value_that_was_last_written(
            steps in prop::collection::vec((prop_oneof![0..20u32, 1_000..1_010u32], 0..9u8, any::<bool>()), 0..60),
        ) {
            let mut column: Column<u8, 8> = Column::default();
            let mut model: BTreeMap<u32, u8> = BTreeMap::new();
            for (id, value, write) in steps {
                if write {
                    prop_assert_eq!(column.replace(id, value), model.insert(id, value).unwrap_or_default());
                } else {
                    prop_assert_eq!(column.take(id), model.remove(&id).unwrap_or_default());
                }
                for id in (0..24).chain(990..1_020) {
                    let expected = model.get(&id).copied().unwrap_or_default();
                    prop_assert_eq!(column.get(id).copied().unwrap_or_default(), expected);
                }
                let written: BTreeMap<u32, u8> =
                    column.iter().filter(|(_, value)| **value != 0).map(|(id, value)| (id, *value)).collect();
                let expected: BTreeMap<u32, u8> =
                    model.iter().filter(|(_, value)| **value != 0).map(|(id, value)| (*id, *value)).collect();
                prop_assert_eq!(written, expected);
            }
        }
    }

    #[test]
    fn numbers_far_apart_cost_only_their_pages() {
        let mut column: Column<u32, 64> = Column::default();
        *column.slot(1_000_000) = 7;
        assert_eq!(column.pages.iter().flatten().count(), 1);
    }
}
