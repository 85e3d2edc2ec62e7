//! Values by dense number.

/// A value for each of a dense range of numbers; a number that was never written has the default.
#[derive(Debug)]
pub(crate) struct Column<T> {
    values: Vec<T>,
}

impl<T> Default for Column<T> {
    fn default() -> Self {
        Self { values: Vec::new() }
    }
}

impl<T: Default> Column<T> {
    pub(crate) fn get(&self, id: u32) -> Option<&T> {
        self.values.get(id as usize)
    }

    /// Returns the value without making room for it.
    pub(crate) fn get_mut(&mut self, id: u32) -> Option<&mut T> {
        self.values.get_mut(id as usize)
    }

    /// Returns the value, making room first if the number is new.
    pub(crate) fn slot(&mut self, id: u32) -> &mut T {
        let index = id as usize;
        if index >= self.values.len() {
            self.values.resize_with(index + 1, T::default);
        }
        &mut self.values[index]
    }

    /// Sets the value and returns the one before.
    pub(crate) fn replace(&mut self, id: u32, value: T) -> T {
        std::mem::replace(self.slot(id), value)
    }

    /// Sets the value to the default and returns the one before.
    pub(crate) fn take(&mut self, id: u32) -> T {
        self.get_mut(id).map(std::mem::take).unwrap_or_default()
    }
}
