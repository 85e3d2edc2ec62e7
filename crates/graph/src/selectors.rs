//! Which selectors match which classes of objects.
//!
//! There are two of these: policy selectors against local endpoints, and the selectors of active rules
//! against all endpoints and network sets (policy.md A-1, B-4).
//! Input: objects that join and leave (labels and profile lists), labels of profiles, selectors.
//! Output: [`MatchDelta`], consumed by `active` respectively `members`.
//!
//! Law: *matches = { (selector, class) | selector matches the labels of the class }*.
//! Per pair the output alternates `Started`/`Stopped`; within one call all `Started` come first (M-31).
//!
//! Cost: an object whose class exists is a few look-ups. A new class is compared with the selectors
//! filed under its labels; each selector is filed under one label only, chosen so that few selectors
//! share it and few objects have it (L-40). A new selector is compared with the classes that have its
//! rarest label.

use std::collections::BTreeSet;
use std::sync::Arc;

use model::selector::{Restriction, Restrictions};
use model::{Labels, Name, Selector};
use smallvec::SmallVec;

use crate::kit::{Column, IdMap, Interner};
use crate::labels::{Classes, Label, ProfileChange, ProfileLabels};
use crate::names::Names;

/// A selector started or stopped matching a class of objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MatchDelta {
    Started { selector: u32, class: u32 },
    Stopped { selector: u32, class: u32 },
}

/// A label that an object must have, with this value or any.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Term {
    key: u32,
    value: Option<u32>,
}

/// Where a selector is filed.
#[derive(Clone, Debug, Default)]
enum Filed {
    /// It can match nothing (`a in {}`).
    #[default]
    Nowhere,
    /// It asks for no label: every new class is compared with it.
    Everywhere,
    /// Under these, of which an object has at most one.
    Under(SmallVec<[Term; 1]>),
}

/// See the [module documentation](self).
#[derive(Debug, Default)]
pub(crate) struct Selectors {
    classes: Classes,
    /// By class: the selectors that match, sorted.
    matches: Column<SmallVec<[u32; 4]>>,
    selectors: Interner<Arc<Selector>>,
    filed: Column<Filed>,
    by_term: IdMap<Term, SmallVec<[u32; 4]>>,
    everywhere: BTreeSet<u32>,
    scratch: Scratch,
    stats: SelectorStats,
}

#[derive(Debug, Default)]
struct Scratch {
    labels: Vec<Label>,
    matches: SmallVec<[u32; 4]>,
    stopped: Vec<MatchDelta>,
}

/// Sizes and work done so far; names as in policy.md A-10.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SelectorStats {
    /// Distinct combinations of own labels and profile lists.
    pub classes: u64,
    /// Selectors found by way of a label.
    pub optimized: u64,
    /// Selectors that every new class is compared with.
    pub full_scan: u64,
    /// Selector evaluations that matched.
    pub evals_true: u64,
    /// Selector evaluations that did not match.
    pub evals_false: u64,
}

/// How many classes are looked at to learn how rare a label is.
const SAMPLE: usize = 64;

impl Selectors {
    /// Adds one object and returns its class.
    pub(crate) fn join(
        &mut self,
        names: &mut Names,
        inherited: &ProfileLabels,
        labels: &Labels,
        profiles: &[Name],
        out: &mut Vec<MatchDelta>,
    ) -> u32 {
        let (class, new) = self.classes.acquire(names, inherited, labels, profiles);
        if new {
            let matches = self.evaluate(names, inherited, class);
            out.extend(matches.iter().map(|selector| MatchDelta::Started { selector: *selector, class }));
            self.matches.replace(class, matches);
        }
        class
    }

    /// Takes away one object of a class.
    pub(crate) fn leave(
        &mut self,
        names: &mut Names,
        inherited: &ProfileLabels,
        class: u32,
        out: &mut Vec<MatchDelta>,
    ) {
        if self.classes.is_last_use(class) {
            let matches = self.matches.take(class);
            out.extend(matches.iter().map(|selector| MatchDelta::Stopped { selector: *selector, class }));
        }
        self.classes.release(names, inherited, class);
        if self.classes.is_empty() {
            self.matches = Column::default();
        }
    }

    /// Follows a change of the labels of a profile, which `inherited` has already made.
    pub(crate) fn change_profile(
        &mut self,
        names: &Names,
        inherited: &ProfileLabels,
        change: &ProfileChange,
        out: &mut Vec<MatchDelta>,
    ) {
        let mut affected = BTreeSet::new();
        self.classes.change_profile(inherited, change, &mut affected);
        let mut stopped = std::mem::take(&mut self.scratch.stopped);
        for class in affected {
            let new = self.evaluate(names, inherited, class);
            let old = self.matches.take(class);
            for selector in new.iter().filter(|selector| old.binary_search(selector).is_err()) {
                out.push(MatchDelta::Started { selector: *selector, class });
            }
            for selector in old.iter().filter(|selector| new.binary_search(selector).is_err()) {
                stopped.push(MatchDelta::Stopped { selector: *selector, class });
            }
            self.matches.replace(class, new);
        }
        out.append(&mut stopped);
        self.scratch.stopped = stopped;
    }

    /// Compares a class with the selectors filed under its labels.
    fn evaluate(&mut self, names: &Names, inherited: &ProfileLabels, class: u32) -> SmallVec<[u32; 4]> {
        let Self { classes, selectors, by_term, everywhere, scratch, stats, .. } = self;
        let Scratch { labels, matches, stopped: _ } = scratch;
        classes.effective(inherited, class, labels);
        matches.clear();
        let view = classes.view(names, inherited, class);
        let under = labels.iter().flat_map(|label| {
            [Term { key: label.key, value: None }, Term { key: label.key, value: Some(label.value) }]
        });
        let filed_here = under.filter_map(|term| by_term.get(&term)).flatten().chain(&*everywhere);
        for id in filed_here {
            if selectors.get(*id).is_some_and(|selector| selector.matches(&view)) {
                matches.push(*id);
                stats.evals_true += 1;
            } else {
                stats.evals_false += 1;
            }
        }
        matches.sort_unstable();
        debug_assert!(matches.is_sorted_by(|a, b| a < b), "a selector was found in two ways");
        matches.clone()
    }

    /// Adds one user of a selector; returns its number and whether it is the first. Only then is it
    /// compared with anything, and only then are there deltas.
    pub(crate) fn register(
        &mut self,
        names: &mut Names,
        inherited: &ProfileLabels,
        selector: &Arc<Selector>,
        out: &mut Vec<MatchDelta>,
    ) -> (u32, bool) {
        let (id, new) = self.selectors.acquire_ref(selector.as_ref(), |_| Arc::clone(selector));
        if !new {
            return (id, false);
        }
        let choices = self.choices(names, selector);
        let mut matching = Vec::new();
        self.scan(choices.as_deref(), |class| {
            if selector.matches(&self.classes.view(names, inherited, class)) {
                matching.push(class);
            }
        });
        for class in matching {
            let matches = self.matches.slot(class);
            if let Err(at) = matches.binary_search(&id) {
                matches.insert(at, id);
                out.push(MatchDelta::Started { selector: id, class });
            }
        }
        let filed = self.choose(names, selector);
        match &filed {
            Filed::Nowhere => (),
            Filed::Everywhere => drop(self.everywhere.insert(id)),
            Filed::Under(terms) => terms.iter().for_each(|term| self.by_term.entry(*term).or_default().push(id)),
        }
        self.filed.replace(id, filed);
        (id, true)
    }

    /// Takes away one user of a selector.
    pub(crate) fn unregister(&mut self, names: &mut Names, id: u32, out: &mut Vec<MatchDelta>) {
        if self.selectors.uses(id) == 1 {
            let mut matching = Vec::new();
            self.matching(names, id, &mut matching);
            for class in matching {
                if let Some(matches) = self.matches.get_mut(class) {
                    matches.retain(|selector| *selector != id);
                }
                out.push(MatchDelta::Stopped { selector: id, class });
            }
            match self.filed.take(id) {
                Filed::Nowhere => (),
                Filed::Everywhere => drop(self.everywhere.remove(&id)),
                Filed::Under(terms) => terms.iter().for_each(|term| self.unfile(names, *term, id)),
            }
        }
        self.selectors.release(id);
        if self.selectors.is_empty() {
            self.filed = Column::default();
            self.by_term = IdMap::default();
        }
    }

    fn unfile(&mut self, names: &mut Names, term: Term, id: u32) {
        if let Some(selectors) = self.by_term.get_mut(&term) {
            selectors.retain(|selector| *selector != id);
            if selectors.is_empty() {
                self.by_term.remove(&term);
            }
        }
        names.release(term.key);
        if let Some(value) = term.value {
            names.release(value);
        }
    }

    /// Collects the classes that a selector matches now.
    pub(crate) fn matching(&self, names: &Names, id: u32, out: &mut Vec<u32>) {
        let Some(selector) = self.selectors.get(id) else { return };
        let choices = self.choices(names, selector);
        let first = out.len();
        self.scan(choices.as_deref(), |class| {
            if self.matches_of(class).binary_search(&id).is_ok() {
                out.push(class);
            }
        });
        // A class can be found in more than one way.
        let found = out.split_off(first);
        out.extend(found.into_iter().collect::<BTreeSet<u32>>());
    }

    /// The selectors that match a class, sorted.
    pub(crate) fn matches_of(&self, class: u32) -> &[u32] {
        self.matches.get(class).map_or(&[], |matches| matches)
    }

    /// Looks at every class that a selector with these choices may match, by the choice with the
    /// fewest candidates.
    fn scan(&self, choices: Option<&[SmallVec<[Term; 1]>]>, look: impl FnMut(u32)) {
        let Some(choices) = choices else { return };
        if choices.is_empty() {
            self.classes.all().for_each(look);
            return;
        }
        // Doubling limits find the rarest choice at a cost in proportion to it.
        let mut limit = SAMPLE;
        let rarest = loop {
            let counts = choices.iter().map(|terms| (self.candidates(terms).take(limit).count(), terms));
            match counts.min_by_key(|(count, _)| *count) {
                Some((count, terms)) if count < limit => break terms,
                Some(_) => limit = limit.saturating_mul(8),
                None => return,
            }
        };
        self.candidates(rarest).for_each(look);
    }

    fn candidates(&self, terms: &[Term]) -> impl Iterator<Item = u32> {
        terms.iter().flat_map(|term| self.classes.candidates(term.key, term.value))
    }

    /// What a selector asks for: every element is a list of alternatives, at least one of which every
    /// match has. Names that no object has are left out: nobody can be found under them. `None` if the
    /// selector can match nothing.
    fn choices(&self, names: &Names, selector: &Selector) -> Option<Vec<SmallVec<[Term; 1]>>> {
        let Restrictions::Labels(restrictions) = selector.restrictions() else { return None };
        let positive = restrictions.iter().filter_map(|(key, restriction)| {
            let terms = match restriction {
                Restriction::Absent => return None,
                Restriction::Present => names.find(key).map(|key| Term { key, value: None }).into_iter().collect(),
                Restriction::OneOf(values) => {
                    let term = |value: &Name| Some(Term { key: names.find(key)?, value: Some(names.find(value)?) });
                    values.iter().filter_map(term).collect()
                }
            };
            Some(terms)
        });
        Some(positive.collect())
    }

    /// Chooses where to file a selector, and takes a use of the names in the place.
    fn choose(&self, names: &mut Names, selector: &Selector) -> Filed {
        let Restrictions::Labels(restrictions) = selector.restrictions() else { return Filed::Nowhere };
        let positive = restrictions.iter().filter(|(_, restriction)| **restriction != Restriction::Absent);
        let terms = positive.map(|(key, restriction)| {
            let key = names.acquire(key);
            let terms: SmallVec<[Term; 1]> = match restriction {
                Restriction::OneOf(values) => values
                    .iter()
                    .enumerate()
                    .map(|(index, value)| {
                        if index > 0 {
                            names.acquire_again(key);
                        }
                        Term { key, value: Some(names.acquire(value)) }
                    })
                    .collect(),
                Restriction::Present | Restriction::Absent => SmallVec::from_iter([Term { key, value: None }]),
            };
            terms
        });
        let mut terms: Vec<_> = terms.collect();
        let cost = |terms: &SmallVec<[Term; 1]>| {
            let selectors = terms.iter().filter_map(|term| self.by_term.get(term)).map(|list| list.len()).max();
            let objects = self.candidates(terms).take(SAMPLE).count();
            (selectors.unwrap_or(0) + 1) * (objects + 1)
        };
        let Some((cheapest, _)) = terms.iter().enumerate().min_by_key(|(_, terms)| cost(terms)) else {
            return Filed::Everywhere;
        };
        let chosen = terms.swap_remove(cheapest);
        for term in terms.iter().flatten() {
            names.release(term.key);
            if let Some(value) = term.value {
                names.release(value);
            }
        }
        Filed::Under(chosen)
    }

    pub(crate) fn stats(&self) -> SelectorStats {
        let full_scan = self.everywhere.len() as u64;
        SelectorStats {
            classes: self.classes.len() as u64,
            optimized: self.selectors.len() as u64 - full_scan,
            full_scan,
            ..self.stats
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        let Self { classes, matches: _, selectors, filed: _, by_term, everywhere, scratch: _, stats: _ } = self;
        classes.is_empty() && selectors.is_empty() && by_term.is_empty() && everywhere.is_empty()
    }
}

#[cfg(test)]
mod tests;
