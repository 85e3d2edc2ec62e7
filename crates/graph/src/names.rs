//! Strings as numbers: label keys and values, profile names, the recurring parts of endpoint keys.
//!
//! Filled at the entrance of the graph, by the stages that keep such strings; every stage that keeps a
//! number holds a use of it and gives it back, so that churn leaves nothing behind.

use model::Name;

use crate::kit::Interner;

/// All strings that the graph keeps as numbers.
#[derive(Debug, Default)]
pub(crate) struct Names(Interner<Name>);

impl Names {
    /// Returns the number of a name; one more use.
    pub(crate) fn acquire(&mut self, name: &Name) -> u32 {
        self.0.acquire_ref(name.as_ref(), |_| Name::clone(name)).0
    }

    /// One more use of a name that is in use.
    pub(crate) fn acquire_again(&mut self, id: u32) {
        self.0.retain(id);
    }

    pub(crate) fn release(&mut self, id: u32) {
        drop(self.0.release(id));
    }

    /// Returns the number of a name that is in use.
    pub(crate) fn find(&self, name: &str) -> Option<u32> {
        self.0.find(name)
    }

    pub(crate) fn get(&self, id: u32) -> Option<&str> {
        self.0.get(id).map(AsRef::as_ref)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
