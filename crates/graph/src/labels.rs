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

use std::hash::{BuildHasher as _, BuildHasherDefault};

use hashbrown::HashTable;
use model::{Labels, Name};
use rustc_hash::FxHasher;
use smallvec::SmallVec;

use crate::kit::{Column, IdSet, IdSets, make_room, shrink};
use crate::names::{Label, Names};

/// Labels of profiles (B-2). A profile without labels has no entry.
#[derive(Debug, Default)]
pub(crate) struct ProfileLabels {
    by_profile: Column<LabelSet, 64>,
    count: usize,
}

/// The number of a label set, or none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LabelSet(u32);

impl Default for LabelSet {
    fn default() -> Self {
        Self(u32::MAX)
    }
}

impl LabelSet {
    fn get(self) -> Option<u32> {
        (self != Self::default()).then_some(self.0)
    }

    fn labels(self, names: &Names) -> impl Iterator<Item = Label> {
        self.get().into_iter().flat_map(|set| names.labels_of(set))
    }
}

/// A profile whose labels have changed. Holds the old ones alive until every user has let go of them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ProfileChange {
    pub(crate) profile: u32,
    pub(crate) old: LabelSet,
}

impl ProfileLabels {
    /// Stores the labels of a profile; `None` if they are as before. To be ended with
    /// [`settle`](Self::settle).
    pub(crate) fn set(&mut self, names: &mut Names, name: &Name, labels: Option<&Labels>) -> Option<ProfileChange> {
        let labels = labels.filter(|labels| !labels.is_empty());
        let new = labels.map_or_else(LabelSet::default, |labels| LabelSet(names.acquire_labels(labels)));
        let profile = names.acquire(name);
        let old = self.of(profile);
        let change = ProfileChange { profile, old };
        if new == old {
            self.settle(names, change);
            return None;
        }
        // A use of the profile's name goes with the entry.
        if old == LabelSet::default() {
            names.acquire_again(profile);
            self.count += 1;
        }
        *self.by_profile.slot(profile) = new;
        if new == LabelSet::default() {
            self.count -= 1;
        }
        if self.count == 0 {
            self.by_profile = Column::default();
        }
        Some(change)
    }

    /// Ends a change: nobody looks at the old labels any more.
    pub(crate) fn settle(&mut self, names: &mut Names, change: ProfileChange) {
        let ProfileChange { profile, old } = change;
        if let Some(old) = old.get() {
            names.release_labels(old);
            if self.of(profile) == LabelSet::default() {
                names.release(profile);
            }
        }
        names.release(profile);
    }

    pub(crate) fn of(&self, profile: u32) -> LabelSet {
        self.by_profile.get(profile).copied().unwrap_or_default()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.count == 0
    }
}

/// Where a label comes from: an own label set or a profile, in one number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    Own(u32),
    Profile(u32),
}

impl Source {
    const fn number(self) -> u32 {
        match self {
            Self::Own(set) => set << 1,
            Self::Profile(profile) => profile << 1 | 1,
        }
    }

    const fn of(number: u32) -> Self {
        match number & 1 {
            0 => Self::Own(number >> 1),
            _ => Self::Profile(number >> 1),
        }
    }
}

/// A label that an object must have, with one value or any, in one number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Term(u32);

impl Term {
    pub(crate) const fn any_value(key: u32) -> Self {
        Self(key << 1)
    }

    pub(crate) const fn label(label: u32) -> Self {
        Self(label << 1 | 1)
    }
}

/// The classes of some population of objects, and which of them may have a given label.
///
/// A class is four numbers; the lists around it are [`IdSet`]s, most of which have one element.
#[derive(Debug, Default)]
pub(crate) struct Classes {
    sets: IdSets,
    /// By number of a label set: the classes whose own labels these are.
    by_own: Column<IdSet, 64>,
    /// By number of a profile list: the classes that have it.
    by_list: Column<IdSet, 64>,
    /// By profile: the lists that have it, of those that are in use here.
    listing: Column<IdSet, 64>,
    /// By label: the label sets and profiles that have it, of those that are in use here.
    holders: Column<IdSet, 64>,
    /// By key: the labels that have holders.
    by_key: Column<IdSet, 64>,
    /// By key: how many of the profiles in use here have it.
    inherited: Column<u32, 64>,
    records: Column<Class>,
    by_parts: HashTable<u32>,
    hasher: BuildHasherDefault<FxHasher>,
    /// Numbers that have ever been given out.
    numbers: u32,
    /// The first number that stands for nothing, plus one.
    free: u32,
}

/// Invariant: holds a use of its label set and of its profile list.
#[derive(Clone, Copy, Debug, Default)]
struct Class {
    /// Number of a label set; while there are no uses, the next number that stands for nothing, plus one.
    own: u32,
    list: u32,
    uses: u32,
    /// The caller's.
    matches: u32,
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
        let (own, list) = (names.acquire_labels(labels), names.acquire_profiles(profiles));
        let hash = self.hasher.hash_one((own, list));
        let is_it = |id: &u32| {
            self.records.get(*id).is_some_and(|class| (class.own, class.list, class.uses > 0) == (own, list, true))
        };
        if let Some(class) = self.by_parts.find(hash, is_it).copied() {
            self.records.slot(class).uses += 1;
            names.release_labels(own);
            names.release_profiles(list);
            return (class, false);
        }

        let class = self.free.checked_sub(1).unwrap_or(self.numbers);
        let record = self.records.slot(class);
        match self.free {
            0 => self.numbers += 1,
            _ => self.free = record.own,
        }
        *record = Class { own, list, uses: 1, matches: 0 };
        let (records, hasher) = (&self.records, &self.hasher);
        make_room(&mut self.by_parts, |id| hash_of(hasher, records, *id));
        self.by_parts.insert_unique(hash, class, |id| hash_of(hasher, records, *id));

        let classes = self.by_own.slot(own);
        let is_first = classes.is_empty();
        self.sets.insert(classes, class);
        if is_first {
            for label in names.labels_of(own) {
                self.add_holder(label, Source::Own(own));
            }
        }
        let classes = self.by_list.slot(list);
        let is_first = classes.is_empty();
        self.sets.insert(classes, class);
        if is_first {
            for profile in names.profiles_of(list) {
                let lists = self.listing.slot(profile);
                let is_first = lists.is_empty();
                self.sets.insert(lists, list);
                if is_first {
                    inherited.of(profile).labels(names).for_each(|label| self.add_inherited(label, profile));
                }
            }
        }
        (class, true)
    }

    /// Gives up one use of a class. The caller must have forgotten what it knows about the class
    /// when [`is_last_use`](Self::is_last_use) was true.
    pub(crate) fn release(&mut self, names: &mut Names, inherited: &ProfileLabels, class: u32) {
        let Some(record) = self.records.get_mut(class).filter(|class| class.uses > 0) else {
            debug_assert!(false, "released a class that nobody is in");
            return;
        };
        record.uses -= 1;
        if record.uses > 0 {
            return;
        }
        let Class { own, list, .. } = *record;
        let hash = self.hasher.hash_one((own, list));
        match self.by_parts.find_entry(hash, |id| *id == class) {
            Ok(entry) => drop(entry.remove()),
            Err(_) => debug_assert!(false, "a class was not under its hash"),
        }
        record.own = std::mem::replace(&mut self.free, class + 1);

        let classes = self.by_own.slot(own);
        self.sets.remove(classes, class);
        if classes.is_empty() {
            for label in names.labels_of(own) {
                self.remove_holder(label, Source::Own(own));
            }
        }
        let classes = self.by_list.slot(list);
        self.sets.remove(classes, class);
        if classes.is_empty() {
            for profile in names.profiles_of(list) {
                let lists = self.listing.slot(profile);
                self.sets.remove(lists, list);
                if lists.is_empty() {
                    inherited.of(profile).labels(names).for_each(|label| self.remove_inherited(label, profile));
                }
            }
        }
        names.release_labels(own);
        names.release_profiles(list);
        self.shrink();
    }

    /// Gives memory back after mass departures.
    fn shrink(&mut self) {
        let Self { records, by_parts, hasher, .. } = self;
        if by_parts.is_empty() {
            *self = Self::default();
            return;
        }
        shrink(by_parts, |id| hash_of(hasher, records, *id));
    }

    /// Takes note that the labels of a profile have changed to what `inherited` says now, and collects
    /// the classes whose labels may be affected, in order.
    pub(crate) fn change_profile(
        &mut self,
        names: &Names,
        inherited: &ProfileLabels,
        change: &ProfileChange,
        affected: &mut Vec<u32>,
    ) {
        let profile = change.profile;
        let lists = self.listing.get(profile).copied().unwrap_or_default();
        if lists.is_empty() {
            return;
        }
        let new: SmallVec<[Label; 8]> = inherited.of(profile).labels(names).collect();
        let old: SmallVec<[Label; 8]> = change.old.labels(names).collect();
        let is_in = |labels: &[Label], label: &Label| labels.binary_search(label).is_ok();
        for label in new.iter().filter(|label| !is_in(&old, label)) {
            self.add_inherited(*label, profile);
        }
        for label in old.iter().filter(|label| !is_in(&new, label)) {
            self.remove_inherited(*label, profile);
        }
        for list in self.sets.iter(lists) {
            affected.extend(self.with_list(list));
        }
        affected.sort_unstable();
        affected.dedup();
    }

    fn with_own(&self, own: u32) -> impl Iterator<Item = u32> {
        self.sets.iter(self.by_own.get(own).copied().unwrap_or_default())
    }

    fn with_list(&self, list: u32) -> impl Iterator<Item = u32> {
        self.sets.iter(self.by_list.get(list).copied().unwrap_or_default())
    }

    fn add_inherited(&mut self, label: Label, profile: u32) {
        self.add_holder(label, Source::Profile(profile));
        *self.inherited.slot(label.key) += 1;
    }

    fn remove_inherited(&mut self, label: Label, profile: u32) {
        self.remove_holder(label, Source::Profile(profile));
        *self.inherited.slot(label.key) -= 1;
    }

    fn add_holder(&mut self, label: Label, source: Source) {
        let holders = self.holders.slot(label.label);
        if holders.is_empty() {
            self.sets.insert(self.by_key.slot(label.key), label.label);
        }
        self.sets.insert(holders, source.number());
    }

    fn remove_holder(&mut self, label: Label, source: Source) {
        let holders = self.holders.slot(label.label);
        self.sets.remove(holders, source.number());
        if holders.is_empty() {
            self.sets.remove(self.by_key.slot(label.key), label.label);
        }
    }

    /// Collects the labels that objects of a class have, each key once, sorted by key number.
    pub(crate) fn effective(&self, names: &Names, inherited: &ProfileLabels, class: u32, labels: &mut Vec<Label>) {
        labels.clear();
        let Some(class) = self.records.get(class).filter(|class| class.uses > 0) else {
            debug_assert!(false, "asked for the labels of a class that nobody is in");
            return;
        };
        labels.extend(names.labels_of(class.own));
        let own = labels.len();
        for profile in names.profiles_of(class.list) {
            labels.extend(inherited.of(profile).labels(names));
        }
        if labels.len() > own {
            // Stable, so that of equal keys the first stays: the own one, then those of earlier profiles.
            labels.sort_by_key(|label| label.key);
            labels.dedup_by_key(|label| label.key);
        }
    }

    /// True if some profile in use here has a label with this key.
    pub(crate) fn may_inherit(&self, key: u32) -> bool {
        self.inherited.get(key).is_some_and(|count| *count > 0)
    }

    fn sources(&self, term: Term) -> impl Iterator<Item = Source> {
        let number = term.0 >> 1;
        let (label, labels) = match term == Term::label(number) {
            true => (Some(number), IdSet::default()),
            false => (None, self.by_key.get(number).copied().unwrap_or_default()),
        };
        let labels = label.into_iter().chain(self.sets.iter(labels));
        labels.flat_map(|label| self.sets.iter(self.holders.get(label).copied().unwrap_or_default())).map(Source::of)
    }

    /// The classes that may have one of these labels. Some come more than once, and some have an own
    /// label that hides the one of their profile.
    pub(crate) fn candidates(&self, terms: &[Term]) -> impl Iterator<Item = u32> {
        terms.iter().flat_map(|term| self.sources(*term)).flat_map(|source| {
            let (own, profile) = match source {
                Source::Own(own) => (Some(own), None),
                Source::Profile(profile) => (None, Some(profile)),
            };
            let lists = profile.and_then(|profile| self.listing.get(profile)).copied().unwrap_or_default();
            let inheriting = self.sets.iter(lists).flat_map(|list| self.with_list(list));
            own.into_iter().flat_map(|own| self.with_own(own)).chain(inheriting)
        })
    }

    /// All classes.
    pub(crate) fn all(&self) -> impl Iterator<Item = u32> {
        self.records.iter().filter(|(_, class)| class.uses > 0).map(|(class, _)| class)
    }

    /// How many candidates these terms have, counting no further than `limit`.
    pub(crate) fn count(&self, terms: &[Term], limit: usize) -> usize {
        let mut count = 0;
        for source in terms.iter().flat_map(|term| self.sources(*term)) {
            let len = |set: Option<&IdSet>| self.sets.len(set.copied().unwrap_or_default());
            count += match source {
                Source::Own(own) => len(self.by_own.get(own)),
                Source::Profile(profile) => {
                    let lists = self.listing.get(profile).copied().unwrap_or_default();
                    self.sets.iter(lists).map(|list| len(self.by_list.get(list))).sum()
                }
            };
            if count >= limit {
                return limit;
            }
        }
        count
    }

    /// Looks at the classes that may have one of these labels, by their own label sets as far as
    /// possible: `own` is asked about a label set, and says whether its classes must be asked one by
    /// one (`None`) or what is true of all of them. Those that are or may be are given to `found`,
    /// some more than once.
    pub(crate) fn search(
        &self,
        names: &Names,
        terms: &[Term],
        own: impl FnMut(&[Label]) -> Option<bool>,
        found: impl FnMut(u32, bool),
    ) {
        self.search_sources(names, terms.iter().flat_map(|term| self.sources(*term)), own, found);
    }

    /// As [`search`](Self::search), among all classes.
    pub(crate) fn search_all(
        &self,
        names: &Names,
        own: impl FnMut(&[Label]) -> Option<bool>,
        found: impl FnMut(u32, bool),
    ) {
        let all = self.by_own.iter().filter(|(_, classes)| !classes.is_empty());
        self.search_sources(names, all.map(|(own, _)| Source::Own(own)), own, found);
    }

    fn search_sources(
        &self,
        names: &Names,
        sources: impl Iterator<Item = Source>,
        mut own: impl FnMut(&[Label]) -> Option<bool>,
        mut found: impl FnMut(u32, bool),
    ) {
        let mut labels = Vec::new();
        for source in sources {
            match source {
                Source::Own(set) => {
                    labels.clear();
                    labels.extend(names.labels_of(set));
                    let verdict = own(&labels);
                    if verdict != Some(false) {
                        self.with_own(set).for_each(|class| found(class, verdict.is_some()));
                    }
                }
                Source::Profile(profile) => {
                    let lists = self.listing.get(profile).copied().unwrap_or_default();
                    for list in self.sets.iter(lists) {
                        self.with_list(list).for_each(|class| found(class, false));
                    }
                }
            }
        }
    }

    /// What the caller keeps for a class; 0 at first.
    pub(crate) fn matches(&self, class: u32) -> u32 {
        self.records.get(class).map_or(0, |class| class.matches)
    }

    pub(crate) fn set_matches(&mut self, class: u32, matches: u32) {
        if let Some(known) = self.matches_mut(class) {
            *known = matches;
        }
    }

    /// What the caller keeps for a class, to be changed.
    pub(crate) fn matches_mut(&mut self, class: u32) -> Option<&mut u32> {
        self.records.get_mut(class).map(|class| &mut class.matches)
    }

    pub(crate) fn is_last_use(&self, class: u32) -> bool {
        self.records.get(class).is_some_and(|class| class.uses == 1)
    }

    pub(crate) fn len(&self) -> usize {
        self.by_parts.len()
    }

    /// How much each container holds.
    #[cfg(test)]
    pub(crate) fn sizes(&self) -> [(&'static str, usize); 4] {
        let all = |column: &Column<IdSet, 64>| column.iter().map(|(_, set)| self.sets.len(*set)).sum();
        [
            ("classes by own labels", all(&self.by_own)),
            ("classes by profile list", all(&self.by_list)),
            ("holders of labels", all(&self.holders) + all(&self.by_key) + all(&self.listing)),
            ("inherited keys", self.inherited.iter().map(|(_, count)| *count as usize).sum()),
        ]
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.by_parts.is_empty()
    }
}

fn hash_of(hasher: &BuildHasherDefault<FxHasher>, records: &Column<Class>, id: u32) -> u64 {
    records.get(id).map_or(0, |class| hasher.hash_one((class.own, class.list)))
}
