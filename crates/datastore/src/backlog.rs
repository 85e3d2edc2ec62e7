//! A queue that holds at most one pending update per object (datastore.md S-15, I7).
//!
//! Filled by whoever receives updates (datastore and interface monitor), drained at once by the graph's thread.
//! However long draining takes, the queue is never larger than the number of objects, because a later value of an
//! object replaces the pending one in its place. So objects come out in the order in which their first pending
//! update arrived, each with its latest value.
//!
//! A deletion stays in the queue even when the creation that it follows was still pending: the queue does not know
//! what was drained before, and an absent value is right in any case (datastore.md S-14).

use std::collections::HashMap;

use model::Update;
use model::update::UpdateKey;

/// See the [module documentation](self).
#[derive(Debug, Default)]
pub struct Backlog {
    /// In order of first arrival.
    updates: Vec<Update>,
    /// Where in `updates` an object is.
    places: HashMap<UpdateKey, usize>,
}

impl Backlog {
    /// Adds an update, or replaces the pending one of the same object.
    pub fn push(&mut self, update: Update) {
        let next = self.updates.len();
        let place = *self.places.entry(update.key()).or_insert(next);
        match self.updates.get_mut(place) {
            Some(pending) => *pending = update,
            None => self.updates.push(update),
        }
    }

    /// Takes everything that is pending.
    #[must_use]
    pub fn drain(&mut self) -> Vec<Update> {
        // Not cleared but let go: after a full load the tables are large, and clearing them costs their size each time.
        self.places = HashMap::new();
        std::mem::take(&mut self.updates)
    }

    /// Number of objects with a pending update.
    pub fn len(&self) -> usize {
        self.updates.len()
    }

    pub fn is_empty(&self) -> bool {
        self.updates.is_empty()
    }
}

impl Extend<Update> for Backlog {
    fn extend<I: IntoIterator<Item = Update>>(&mut self, updates: I) {
        for update in updates {
            self.push(update);
        }
    }
}

#[cfg(test)]
mod tests {
    use model::{LinkState, Name};

    use super::*;

    #[test]
    fn the_latest_value_takes_the_first_place() {
        let mut backlog = Backlog::default();
        backlog.extend([link("a", 1), link("b", 1), link("a", 2), gone("b"), link("c", 1), link("a", 3)]);
        assert_eq!(backlog.len(), 3);
        assert_eq!(backlog.drain(), [link("a", 3), gone("b"), link("c", 1)]);
        assert!(backlog.is_empty());
    }

    #[test]
    fn draining_begins_a_new_order() {
        let mut backlog = Backlog::default();
        backlog.extend([link("a", 1), link("b", 1)]);
        assert_eq!(backlog.drain().len(), 2);
        backlog.extend([link("b", 2), link("a", 2)]);
        assert_eq!(backlog.drain(), [link("b", 2), link("a", 2)]);
        assert_eq!(backlog.drain(), []);
    }

    #[test]
    fn different_kinds_with_one_name_are_different_objects() {
        let mut backlog = Backlog::default();
        let name = Name::from("x");
        backlog.extend([Update::Tier(name.clone(), None), Update::ProfileRules(name.clone(), None), gone("x")]);
        assert_eq!(backlog.len(), 3);
    }

    fn link(name: &str, index: u32) -> Update {
        Update::Link(name.into(), Some(LinkState { index, up: true, generation: 0 }))
    }

    fn gone(name: &str) -> Update {
        Update::Link(name.into(), None)
    }
}
