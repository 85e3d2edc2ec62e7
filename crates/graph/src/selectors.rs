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
//! share it and few objects have it (L-40). A new selector is compared with the label sets that have its
//! rarest label, and with single classes only where inherited labels decide. Which selectors match a
//! class is one number, that of a list: a selector that begins to match a hundred thousand classes
//! makes a few new lists.

mod program;

use std::mem::take;

use model::{Labels, Name, Selector};
use smallvec::SmallVec;

use crate::kit::{Column, IdMap, IdSet, IdSets, Strings, sort_numbers, words};
use crate::labels::{Classes, ProfileChange, ProfileLabels, Term};
use crate::names::{Label, Names};

/// A selector started or stopped matching a class of objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MatchDelta {
    Started { selector: u32, class: u32 },
    Stopped { selector: u32, class: u32 },
}

/// Counts deltas where nobody needs to know them.
#[derive(Debug, Default)]
pub(crate) struct Uncollected(pub(crate) u64);

impl Extend<MatchDelta> for Uncollected {
    fn extend<I: IntoIterator<Item = MatchDelta>>(&mut self, deltas: I) {
        self.0 += deltas.into_iter().count() as u64;
    }
}

/// Where a selector is filed.
#[derive(Clone, Debug, Default)]
enum Filed {
    /// It can match nothing (`a in {}`).
    #[default]
    Nowhere,
    /// It asks for no label: every new class is compared with it.
    Everywhere,
    Under(Term),
    /// Under these, of which an object has at most one.
    UnderEach(Box<[Term]>),
}

impl Filed {
    fn terms(&self) -> &[Term] {
        match self {
            Self::Nowhere | Self::Everywhere => &[],
            Self::Under(term) => std::slice::from_ref(term),
            Self::UnderEach(terms) => terms,
        }
    }
}

/// See the [module documentation](self).
#[derive(Debug, Default)]
pub(crate) struct Selectors {
    /// What a class keeps is the number of the list of its selectors.
    classes: Classes,
    /// Numbers of selectors, sorted.
    lists: Strings,
    /// Selectors, compiled.
    programs: Strings,
    filed: Column<Filed>,
    by_term: IdMap<Term, IdSet>,
    everywhere: IdSet,
    sets: IdSets,
    scratch: Scratch,
    stats: SelectorStats,
}

#[derive(Debug, Default)]
struct Scratch {
    labels: Vec<Label>,
    matches: Vec<u32>,
    old: Vec<u32>,
    classes: Vec<u32>,
    bytes: Vec<u8>,
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

/// Up to how many classes are counted to learn how rare a label is.
const SAMPLE: usize = 64;

/// Buffers for classes that are larger are not kept. Half a megabyte, because to get as much from the
/// kernel again for each selector that many match takes longer than to match it.
const KEEP: usize = 1 << 17;

impl Selectors {
    /// Adds one object and returns its class.
    pub(crate) fn join(
        &mut self,
        names: &mut Names,
        inherited: &ProfileLabels,
        labels: &Labels,
        profiles: &[Name],
        out: &mut impl Extend<MatchDelta>,
    ) -> u32 {
        let (class, new) = self.classes.acquire(names, inherited, labels, profiles);
        if new {
            let list = self.evaluate(names, inherited, class);
            self.classes.set_matches(class, list);
            out.extend(words(self.lists.get(list)).map(|selector| MatchDelta::Started { selector, class }));
        }
        class
    }

    /// Takes away one object of a class.
    pub(crate) fn leave(
        &mut self,
        names: &mut Names,
        inherited: &ProfileLabels,
        class: u32,
        out: &mut impl Extend<MatchDelta>,
    ) {
        if self.classes.is_last_use(class) {
            let list = self.classes.matches(class);
            out.extend(words(self.lists.get(list)).map(|selector| MatchDelta::Stopped { selector, class }));
            self.lists.release(list);
        }
        self.classes.release(names, inherited, class);
        if self.classes.is_empty() {
            self.scratch = Scratch::default();
        }
    }

    /// Follows a change of the labels of a profile, which `inherited` has already made.
    pub(crate) fn change_profile(
        &mut self,
        names: &Names,
        inherited: &ProfileLabels,
        change: &ProfileChange,
        out: &mut impl Extend<MatchDelta>,
    ) {
        let mut affected = take(&mut self.scratch.classes);
        let mut stopped = take(&mut self.scratch.stopped);
        self.classes.change_profile(names, inherited, change, &mut affected);
        for class in affected.drain(..) {
            let (old, new) = (self.classes.matches(class), self.evaluate(names, inherited, class));
            self.classes.set_matches(class, new);
            if old != new {
                // What the new list is made of is still at hand.
                let Scratch { matches, old: before, .. } = &mut self.scratch;
                before.clear();
                before.extend(words(self.lists.get(old)));
                let started = matches.iter().filter(|selector| before.binary_search(selector).is_err());
                out.extend(started.map(|selector| MatchDelta::Started { selector: *selector, class }));
                let gone = before.iter().filter(|selector| matches.binary_search(selector).is_err());
                stopped.extend(gone.map(|selector| MatchDelta::Stopped { selector: *selector, class }));
            }
            self.lists.release(old);
        }
        out.extend(stopped.drain(..));
        self.scratch.stopped = stopped;
        self.keep_classes(affected);
    }

    /// Compares a class with the selectors filed under its labels. Returns the number of the list of
    /// those that match, with a use; the list itself is left in `scratch.matches`.
    fn evaluate(&mut self, names: &Names, inherited: &ProfileLabels, class: u32) -> u32 {
        let Self { classes, lists, programs, by_term, everywhere, sets, scratch, stats, .. } = self;
        let Scratch { labels, matches, bytes, .. } = scratch;
        classes.effective(names, inherited, class, labels);
        matches.clear();
        let under = labels.iter().flat_map(|label| [Term::any_value(label.key), Term::label(label.label)]);
        let filed_here = under.filter_map(|term| by_term.get(&term)).chain([&*everywhere]);
        for id in filed_here.flat_map(|selectors| sets.iter(*selectors)) {
            if program::evaluate(names, programs.get(id), labels, |_| false) == Some(true) {
                matches.push(id);
                stats.evals_true += 1;
            } else {
                stats.evals_false += 1;
            }
        }
        matches.sort_unstable();
        debug_assert!(matches.is_sorted_by(|a, b| a < b), "a selector was found in two ways");
        bytes.clear();
        bytes.extend(matches.iter().flat_map(|selector| selector.to_le_bytes()));
        lists.acquire(bytes).0
    }

    /// Adds one user of a selector; returns its number and whether it is the first. Only then is it
    /// compared with anything, and only then are there deltas.
    pub(crate) fn register(
        &mut self,
        names: &mut Names,
        inherited: &ProfileLabels,
        selector: &Selector,
        out: &mut impl Extend<MatchDelta>,
    ) -> (u32, bool) {
        let mut program = take(&mut self.scratch.bytes);
        program.clear();
        program::compile(names, selector, &mut program);
        let (id, new) = self.programs.acquire(&program);
        if new {
            let filed = match program::choices(&program) {
                None => Filed::Nowhere,
                Some(choices) => {
                    let mut found = take(&mut self.scratch.classes);
                    self.find(names, inherited, &program, &choices, &mut found);
                    self.relist(&found, id, true);
                    out.extend(found.drain(..).map(|class| MatchDelta::Started { selector: id, class }));
                    self.keep_classes(found);
                    self.choose(choices)
                }
            };
            for term in filed.terms() {
                self.sets.insert(self.by_term.entry(*term).or_default(), id);
            }
            if matches!(filed, Filed::Everywhere) {
                self.sets.insert(&mut self.everywhere, id);
            }
            self.filed.replace(id, filed);
        } else {
            program::release(names, &program);
        }
        self.scratch.bytes = program;
        (id, new)
    }

    /// Collects the classes that a program matches, in order.
    fn find(
        &self,
        names: &Names,
        inherited: &ProfileLabels,
        program: &[u8],
        choices: &[SmallVec<[Term; 1]>],
        out: &mut Vec<u32>,
    ) {
        let classes = &self.classes;
        let mut labels = Vec::new();
        let own = |own: &[Label]| program::evaluate(names, program, own, |key| classes.may_inherit(key));
        let found = |class: u32, is_decided: bool| {
            let is_match = is_decided || {
                classes.effective(names, inherited, class, &mut labels);
                program::evaluate(names, program, &labels, |_| false) == Some(true)
            };
            if is_match {
                out.push(class);
            }
        };
        match self.rarest(choices) {
            Some(terms) => classes.search(names, terms, own, found),
            None => classes.search_all(names, own, found),
        }
        // A class can be found in more than one way.
        sort_numbers(out);
    }

    /// The choice with the fewest candidates; `None` if there is nothing to choose from.
    fn rarest<'a>(&self, choices: &'a [SmallVec<[Term; 1]>]) -> Option<&'a [Term]> {
        // Growing limits find the rarest choice at a cost in proportion to it.
        let mut limit = SAMPLE;
        loop {
            let counts = choices.iter().map(|terms| (self.classes.count(terms, limit), terms));
            let (count, terms) = counts.min_by_key(|(count, _)| *count)?;
            if count < limit || choices.len() == 1 {
                return Some(terms);
            }
            limit = limit.saturating_mul(8);
        }
    }

    /// Puts a selector on the lists of these classes, or takes it off.
    fn relist(&mut self, classes: &[u32], id: u32, add: bool) {
        // Few lists turn into few others: (old, new, how many classes). Each is in use once more while
        // it is in here, so that no number changes its meaning.
        let mut changes: Vec<(u32, u32, u32)> = Vec::new();
        let count = |changes: &mut Vec<(u32, u32, u32)>, at: usize, more: u32| {
            changes.get_mut(at).into_iter().for_each(|(_, _, count)| *count += more);
        };
        let mut by_old: IdMap<u32, usize> = IdMap::default();
        // Most have the same list as the one before: its number, where it is, and how many so far.
        let (mut last, mut at, mut same) = ((u32::MAX, u32::MAX), 0, 0);
        for class in classes {
            let Some(matches) = self.classes.matches_mut(*class) else { continue };
            if *matches != last.0 || same == 0 {
                count(&mut changes, at, same);
                let old = *matches;
                at = *by_old.entry(old).or_insert_with(|| {
                    self.lists.retain(old);
                    changes.push((old, relisted(&mut self.lists, &mut self.scratch.matches, old, id, add), 0));
                    changes.len() - 1
                });
                last = changes.get(at).map_or(last, |(old, new, _)| (*old, *new));
                same = 0;
            }
            *matches = last.1;
            same += 1;
        }
        count(&mut changes, at, same);
        for (old, new, count) in &changes {
            self.lists.retain_many(*new, *count);
            self.lists.release_many(*old, *count);
        }
        for (old, new, _) in changes {
            self.lists.release(old);
            self.lists.release(new);
        }
    }

    /// Takes away one user of a selector.
    pub(crate) fn unregister(&mut self, names: &mut Names, id: u32, out: &mut impl Extend<MatchDelta>) {
        if self.programs.uses(id) == 1 {
            let mut found = take(&mut self.scratch.classes);
            self.matching(id, &mut found);
            self.relist(&found, id, false);
            out.extend(found.drain(..).map(|class| MatchDelta::Stopped { selector: id, class }));
            self.keep_classes(found);
            let filed = self.filed.take(id);
            for term in filed.terms() {
                let Some(selectors) = self.by_term.get_mut(term) else { continue };
                self.sets.remove(selectors, id);
                if selectors.is_empty() {
                    self.by_term.remove(term);
                }
            }
            if matches!(filed, Filed::Everywhere) {
                self.sets.remove(&mut self.everywhere, id);
            }
            program::release(names, self.programs.get(id));
        }
        self.programs.release(id);
        if self.programs.is_empty() {
            self.filed = Column::default();
            self.by_term = IdMap::default();
            self.sets = IdSets::default();
            self.scratch = Scratch::default();
        }
    }

    /// Collects the classes that a selector matches now, in order; none if nobody uses the selector.
    pub(crate) fn matching(&self, id: u32, out: &mut Vec<u32>) {
        if self.programs.uses(id) == 0 {
            return;
        }
        let Some(choices) = program::choices(self.programs.get(id)) else { return };
        let mut is_on_list = self.is_on_list(id);
        let mut look = |class: u32| {
            if is_on_list(class) {
                out.push(class);
            }
        };
        match self.rarest(&choices) {
            Some(terms) => self.classes.candidates(terms).for_each(&mut look),
            None => self.classes.all().for_each(&mut look),
        }
        // A class can be found in more than one way.
        sort_numbers(out);
    }

    /// As [`matching`](Self::matching), in no particular order, and a class may come more than once. What
    /// own labels decide is true of all classes with them, which are then not looked at.
    pub(crate) fn matching_unordered(&self, names: &Names, id: u32, out: &mut Vec<u32>) {
        if self.programs.uses(id) == 0 {
            return;
        }
        let (classes, program) = (&self.classes, self.programs.get(id));
        let Some(choices) = program::choices(program) else { return };
        let own = |own: &[Label]| program::evaluate(names, program, own, |key| classes.may_inherit(key));
        let mut is_on_list = self.is_on_list(id);
        let found = |class: u32, is_decided: bool| {
            if is_decided || is_on_list(class) {
                out.push(class);
            }
        };
        match self.rarest(&choices) {
            Some(terms) => classes.search(names, terms, own, found),
            None => classes.search_all(names, own, found),
        }
    }

    /// Tells whether a selector is on the list of a class. Most have the same list as the one before.
    fn is_on_list(&self, id: u32) -> impl FnMut(u32) -> bool {
        let mut last = (None, false);
        move |class| {
            let list = self.classes.matches(class);
            if last.0 != Some(list) {
                last = (Some(list), is_on(self.lists.get(list), id));
            }
            last.1
        }
    }

    /// The selectors that match a class, in order.
    pub(crate) fn matches_of(&self, class: u32) -> impl Iterator<Item = u32> {
        words(self.lists.get(self.list_of(class)))
    }

    /// A number that two classes have in common while the same selectors match them.
    pub(crate) fn list_of(&self, class: u32) -> u32 {
        self.classes.matches(class)
    }

    /// True if a selector matches a class.
    pub(crate) fn is_match(&self, id: u32, class: u32) -> bool {
        is_on(self.lists.get(self.list_of(class)), id)
    }

    /// Chooses where to file a selector.
    fn choose(&self, choices: Vec<SmallVec<[Term; 1]>>) -> Filed {
        let cost = |terms: &SmallVec<[Term; 1]>| {
            let filed = terms.iter().filter_map(|term| self.by_term.get(term)).map(|here| self.sets.len(*here)).max();
            let (selectors, objects) = (filed.unwrap_or(0), self.classes.count(terms, SAMPLE));
            // What is not known yet is what the first objects will share.
            ((selectors + 1) * (objects + 1), selectors)
        };
        match choices.into_iter().min_by_key(cost) {
            None => Filed::Everywhere,
            Some(terms) => match *terms {
                [term] => Filed::Under(term),
                _ => Filed::UnderEach(terms.into_vec().into_boxed_slice()),
            },
        }
    }

    fn keep_classes(&mut self, mut buffer: Vec<u32>) {
        if buffer.capacity() <= KEEP {
            buffer.clear();
            self.scratch.classes = buffer;
        }
    }

    pub(crate) fn stats(&self) -> SelectorStats {
        let full_scan = self.sets.len(self.everywhere) as u64;
        SelectorStats {
            classes: self.classes.len() as u64,
            optimized: self.programs.len() as u64 - full_scan,
            full_scan,
            ..self.stats
        }
    }

    /// How much each container holds.
    #[cfg(test)]
    #[allow(clippy::disallowed_methods, reason = "a sum has no order")]
    pub(crate) fn sizes(&self) -> [(&'static str, usize); 11] {
        let uses = |strings: &Strings| (0..1_000).map(|id| strings.uses(id) as usize).sum();
        let Self { classes, lists, programs, filed, by_term, everywhere, sets, scratch: _, stats: _ } = self;
        let [own, of_lists, holders, inherited] = classes.sizes();
        let filed: Vec<&Filed> = filed.iter().map(|(_, filed)| filed).collect();
        // Where a selector is filed depends on what there was when it came.
        let terms: usize = filed.iter().map(|filed| filed.terms().len()).sum();
        let found: usize = by_term.values().map(|selectors| sets.len(*selectors)).sum();
        [
            own,
            of_lists,
            holders,
            inherited,
            ("classes", classes.len()),
            ("lists of selectors", lists.len()),
            ("uses of lists of selectors", uses(lists)),
            ("programs", programs.len()),
            ("uses of programs", uses(programs)),
            ("selectors filed everywhere", sets.len(*everywhere)),
            ("selectors not filed where they are found", terms.abs_diff(found)),
        ]
    }

    pub(crate) fn is_empty(&self) -> bool {
        let Self { classes, lists, programs, filed: _, by_term, everywhere, sets: _, scratch: _, stats: _ } = self;
        classes.is_empty() && lists.is_empty() && programs.is_empty() && by_term.is_empty() && everywhere.is_empty()
    }
}

fn is_on(list: &[u8], id: u32) -> bool {
    let (list, _) = list.as_chunks::<4>();
    list.binary_search_by_key(&id, |known| u32::from_le_bytes(*known)).is_ok()
}

/// Returns the number of a list with a selector more or less, with a use.
fn relisted(lists: &mut Strings, buffer: &mut Vec<u32>, old: u32, id: u32, add: bool) -> u32 {
    buffer.clear();
    buffer.extend(words(lists.get(old)));
    match (buffer.binary_search(&id), add) {
        (Err(at), true) => buffer.insert(at, id),
        (Ok(at), false) => drop(buffer.remove(at)),
        (Ok(_), true) | (Err(_), false) => debug_assert!(false, "a selector was not on the list that it is on"),
    }
    let bytes: Vec<u8> = buffer.iter().flat_map(|selector| selector.to_le_bytes()).collect();
    lists.acquire(&bytes).0
}

#[cfg(test)]
mod tests;
