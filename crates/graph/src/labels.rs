//! The labels that an object has, its own and those of its profiles (policy.md B-1 to B-7).
//!
//! Fed with the labels of profiles and, through [`Classes`], with the own labels and profile lists of
//! objects; read by `selectors`.
//!
//! Objects with equal own labels and equal profile lists form one *class*: every selector gives the
//! same answer for all of them, so it is asked once a class. Security groups make few classes of many
//! endpoints.
//!
//! Law: *label(object, key) = first of (own labels, profile 1, profile 2 ...) that has the key*.

use std::collections::BTreeSet;

use model::selector::LabelSource;
use model::{Labels, Name};

use crate::kit::{Groups, IdMap, Interner};
use crate::names::Names;

/// One label; both parts are numbers of [`Names`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Label {
    pub(crate) key: u32,
    pub(crate) value: u32,
}

/// Labels of profiles (B-2). A profile without labels has no entry.
#[derive(Debug, Default)]
pub(crate) struct ProfileLabels {
    by_profile: IdMap<u32, Box<[Label]>>,
}

/// A profile whose labels have changed. Holds the old ones alive until every user has let go of them.
#[derive(Debug)]
pub(crate) struct ProfileChange {
    pub(crate) profile: u32,
    pub(crate) old: Box<[Label]>,
}

impl ProfileLabels {
    /// Stores the labels of a profile; `None` if they are as before. To be ended with
    /// [`settle`](Self::settle).
    pub(crate) fn set(&mut self, names: &mut Names, profile: &Name, labels: Option<&Labels>) -> Option<ProfileChange> {
        let new = labels.map(|labels| acquire_labels(names, labels)).unwrap_or_default();
        let profile = names.acquire(profile);
        let old = if new.is_empty() {
            self.by_profile.remove(&profile)
        } else {
            // The use of the profile's name that goes with the entry.
            if !self.by_profile.contains_key(&profile) {
                names.acquire_again(profile);
            }
            self.by_profile.insert(profile, new)
        };
        if self.by_profile.is_empty() {
            self.by_profile = IdMap::default();
        }
        let old = old.unwrap_or_default();
        let change = ProfileChange { profile, old };
        if self.of(profile) == &*change.old {
            self.settle(names, change);
            return None;
        }
        Some(change)
    }

    /// Ends a change: nobody looks at the old labels any more.
    pub(crate) fn settle(&mut self, names: &mut Names, change: ProfileChange) {
        let ProfileChange { profile, old } = change;
        if !old.is_empty() && !self.by_profile.contains_key(&profile) {
            names.release(profile);
        }
        names.release(profile);
        release_labels(names, &old);
    }

    pub(crate) fn of(&self, profile: u32) -> &[Label] {
        self.by_profile.get(&profile).map_or(&[], |labels| labels)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.by_profile.is_empty()
    }
}

/// Returns the labels as numbers, sorted by key number; a use of each number goes with them.
fn acquire_labels(names: &mut Names, labels: &Labels) -> Box<[Label]> {
    let mut result: Box<[Label]> =
        labels.iter().map(|(key, value)| Label { key: names.acquire(key), value: names.acquire(value) }).collect();
    result.sort_unstable();
    result
}

fn release_labels(names: &mut Names, labels: &[Label]) {
    for label in labels {
        names.release(label.key);
        names.release(label.value);
    }
}

/// Where a label comes from: an own label set or a profile.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Source(u32);

impl Source {
    const MIN: Self = Self(0);
    const MAX: Self = Self(u32::MAX);

    const fn own(set: u32) -> Self {
        Self(set << 1)
    }

    const fn profile(profile: u32) -> Self {
        Self(profile << 1 | 1)
    }
}

/// The classes of some population of objects, and which of them may have a given label.
#[derive(Debug, Default)]
pub(crate) struct Classes {
    /// Own labels, sorted by key number.
    own: Interner<Box<[Label]>>,
    /// Profile lists without repetitions (B-5).
    lists: Interner<Box<[u32]>>,
    /// (own labels, profile list).
    classes: Interner<(u32, u32)>,
    by_own: Groups,
    by_list: Groups,
    /// (profile, list that has it).
    listing: BTreeSet<(u32, u32)>,
    /// (key, value, where): for the own label sets and profiles that are in use here.
    holders: BTreeSet<(u32, u32, Source)>,
}

impl Classes {
    /// Returns the class of an object with these labels and profiles, and whether it is new here.
    pub(crate) fn acquire(
        &mut self,
        names: &mut Names,
        inherited: &ProfileLabels,
        labels: &Labels,
        profiles: &[Name],
    ) -> (u32, bool) {
        let labels = acquire_labels(names, labels);
        let (own, new_own) = self.own.acquire_ref(&*labels, |labels| labels.into());
        if new_own {
            self.holders.extend(labels.iter().map(|label| (label.key, label.value, Source::own(own))));
        } else {
            release_labels(names, &labels);
        }

        let mut list: smallvec::SmallVec<[u32; 4]> = smallvec::SmallVec::new();
        for profile in profiles {
            let profile = names.acquire(profile);
            if list.contains(&profile) {
                names.release(profile);
            } else {
                list.push(profile);
            }
        }
        let (list_id, new_list) = self.lists.acquire_ref(&*list, |list| list.into());
        for profile in list {
            if !new_list {
                names.release(profile);
                continue;
            }
            if self.lists_of(profile).next().is_none() {
                self.add_holders(profile, inherited.of(profile));
            }
            self.listing.insert((profile, list_id));
        }

        let (class, new) = self.classes.acquire((own, list_id));
        if new {
            self.by_own.join(own, class);
            self.by_list.join(list_id, class);
        } else {
            // An existing class holds its parts already.
            self.release_parts(names, inherited, own, list_id);
        }
        (class, new)
    }

    /// Gives up one use of a class. The caller must have forgotten what it knows about the class
    /// when [`is_last_use`](Self::is_last_use) was true.
    pub(crate) fn release(&mut self, names: &mut Names, inherited: &ProfileLabels, class: u32) {
        let Some((own, list)) = self.classes.release(class) else { return };
        self.by_own.leave(own, class);
        self.by_list.leave(list, class);
        self.release_parts(names, inherited, own, list);
        if self.classes.is_empty() {
            debug_assert!(self.holders.is_empty() && self.listing.is_empty(), "labels without an object");
            *self = Self::default();
        }
    }

    fn release_parts(&mut self, names: &mut Names, inherited: &ProfileLabels, own: u32, list: u32) {
        if let Some(labels) = self.own.release(own) {
            for label in &labels {
                self.holders.remove(&(label.key, label.value, Source::own(own)));
            }
            release_labels(names, &labels);
        }
        if let Some(profiles) = self.lists.release(list) {
            for profile in profiles {
                self.listing.remove(&(profile, list));
                if self.lists_of(profile).next().is_none() {
                    self.remove_holders(profile, inherited.of(profile));
                }
                names.release(profile);
            }
        }
    }

    /// Takes note that the labels of a profile have changed to what `inherited` says now, and collects
    /// the classes whose labels may be affected.
    pub(crate) fn change_profile(
        &mut self,
        inherited: &ProfileLabels,
        change: &ProfileChange,
        affected: &mut BTreeSet<u32>,
    ) {
        let profile = change.profile;
        if self.lists_of(profile).next().is_none() {
            return;
        }
        self.remove_holders(profile, &change.old);
        self.add_holders(profile, inherited.of(profile));
        for list in self.lists_of(profile) {
            affected.extend(self.by_list.items(list));
        }
    }

    fn lists_of(&self, profile: u32) -> impl Iterator<Item = u32> {
        self.listing.range((profile, 0)..=(profile, u32::MAX)).map(|(_, list)| *list)
    }

    fn add_holders(&mut self, profile: u32, labels: &[Label]) {
        self.holders.extend(labels.iter().map(|label| (label.key, label.value, Source::profile(profile))));
    }

    fn remove_holders(&mut self, profile: u32, labels: &[Label]) {
        for label in labels {
            self.holders.remove(&(label.key, label.value, Source::profile(profile)));
        }
    }

    /// Collects the labels that objects of a class have, each key once.
    pub(crate) fn effective(&self, inherited: &ProfileLabels, class: u32, labels: &mut Vec<Label>) {
        labels.clear();
        let (own, list) = self.parts(class);
        labels.extend_from_slice(own);
        for profile in list {
            for label in inherited.of(*profile) {
                let (own, before) = labels.split_at(own.len());
                let hidden = own.binary_search_by_key(&label.key, |own| own.key).is_ok()
                    || before.iter().any(|before| before.key == label.key);
                if !hidden {
                    labels.push(*label);
                }
            }
        }
    }

    fn parts(&self, class: u32) -> (&[Label], &[u32]) {
        let Some((own, list)) = self.classes.get(class) else {
            debug_assert!(false, "asked for the labels of a class that nobody is in");
            return (&[], &[]);
        };
        (self.own.get(*own).map_or(&[], |own| own), self.lists.get(*list).map_or(&[], |list| list))
    }

    /// Returns the labels of a class in the form that selectors ask for.
    pub(crate) fn view<'a>(&'a self, names: &'a Names, inherited: &'a ProfileLabels, class: u32) -> View<'a> {
        let (own, list) = self.parts(class);
        View { names, inherited, own, list }
    }

    /// The classes that may have this key with this value, or with any value. Some may come more than
    /// once, and some have an own label that hides the one of their profile.
    pub(crate) fn candidates(&self, key: u32, value: Option<u32>) -> impl Iterator<Item = u32> {
        let (first, last) = match value {
            Some(value) => (value, value),
            None => (0, u32::MAX),
        };
        self.holders.range((key, first, Source::MIN)..=(key, last, Source::MAX)).flat_map(|(_, _, source)| {
            let id = source.0 >> 1;
            let (own, lists) = match *source == Source::own(id) {
                true => (Some(self.by_own.items(id)), None),
                false => (None, Some(self.lists_of(id).flat_map(|list| self.by_list.items(list)))),
            };
            own.into_iter().flatten().chain(lists.into_iter().flatten())
        })
    }

    /// All classes.
    pub(crate) fn all(&self) -> impl Iterator<Item = u32> {
        self.classes.iter().map(|(class, _)| class)
    }

    pub(crate) fn is_last_use(&self, class: u32) -> bool {
        self.classes.uses(class) == 1
    }

    pub(crate) fn len(&self) -> usize {
        self.classes.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        let Self { own, lists, classes, by_own: _, by_list: _, listing, holders } = self;
        own.is_empty() && lists.is_empty() && classes.is_empty() && listing.is_empty() && holders.is_empty()
    }
}

/// The labels of one class, looked up by name.
#[derive(Debug)]
pub(crate) struct View<'a> {
    names: &'a Names,
    inherited: &'a ProfileLabels,
    own: &'a [Label],
    list: &'a [u32],
}

impl LabelSource for View<'_> {
    fn label(&self, name: &str) -> Option<&str> {
        let key = self.names.find(name)?;
        let find = |labels: &[Label]| {
            let at = labels.binary_search_by_key(&key, |label| label.key).ok()?;
            labels.get(at).map(|label| label.value)
        };
        let value =
            find(self.own).or_else(|| self.list.iter().find_map(|profile| find(self.inherited.of(*profile))))?;
        self.names.get(value)
    }
}
