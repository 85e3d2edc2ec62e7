//! Who is in which needed set (policy.md 5).
//!
//! Input: objects with addresses (all endpoints and network sets) in classes, matches of rule selectors
//! with these classes (from `selectors`), needed sets (from `references`).
//! Output: [`MemberChange`], consumed by `gather`; and the full contents of a set on demand.
//!
//! Law: *members(set) = distinct(project(join(set, objects, by selector)))*, counted per contribution
//! (M-30); new contributions are counted before old ones (M-31). Overlapping members stay (M-33).
//! There are no deltas for a set before its contents have been taken for the first time (F-8), and per
//! set and member the deltas alternate.
//!
//! Cost: of an object, its addresses times the sets that it is in; of a set, its members.

mod objects;

use std::mem::take;

use model::{EndpointPort, Name, SetId};
use smallvec::SmallVec;

use objects::Objects;
pub(crate) use objects::{Nets, ObjectKey, Ports};

use crate::batch::{SetContents, SetMember, SetType};
use crate::kit::{Column, Counted, Groups};
use crate::names::Names;
use crate::references::SetSource;
use crate::selectors::{MatchDelta, Selectors};

/// A set got or lost a member. `set` is the number that its user gave it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemberChange {
    Added { set: u32, member: SetMember },
    Removed { set: u32, member: SetMember },
}

/// What an object brings into sets.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Contribution {
    pub(crate) nets: Nets,
    pub(crate) ports: Option<Box<Ports>>,
}

/// See the [module documentation](self).
#[derive(Debug, Default)]
pub(crate) struct Members {
    objects: Objects,
    by_class: Groups,
    sets: Column<Option<Box<Set>>>,
    by_selector: Column<SmallVec<[u32; 2]>>,
    scratch: Scratch,
}

#[derive(Debug)]
struct Set {
    id: SetId,
    kind: Kind,
    /// The number of its selector; service sets have none.
    selector: Option<u32>,
    counts: Counted<SetMember>,
    /// Its contents have been taken, so changes are deltas from now on.
    announced: bool,
}

#[derive(Debug)]
enum Kind {
    Nets,
    NamedPort { protocol: Option<u8>, port: Name },
    Service,
}

#[derive(Debug, Default)]
struct Scratch {
    new: Vec<SetMember>,
    old: Vec<SetMember>,
    new_sets: Vec<u32>,
    old_sets: Vec<u32>,
}

impl Members {
    /// Stores an object, or with `None` forgets it. `selectors` knows the classes of both the new and
    /// the old value. Returns the class that one use has to be given up of: that of the old value, or
    /// that of the new one if nothing has changed.
    pub(crate) fn on_object(
        &mut self,
        names: &mut Names,
        key: &ObjectKey<'_>,
        new: Option<(u32, Contribution)>,
        selectors: &Selectors,
        out: &mut Vec<MemberChange>,
    ) -> Option<u32> {
        let Some((id, old_class, known)) = self.objects.find(names, key) else {
            let (class, new) = new?;
            let mut sets = take(&mut self.scratch.new_sets);
            self.sets_of(selectors, class, &mut sets);
            for set in &sets {
                self.count(*set, Some(&new), None, out);
            }
            self.scratch.new_sets = sets;
            let id = self.objects.insert(names, key, class, new);
            self.by_class.join(class, id);
            return None;
        };
        if new.as_ref().is_some_and(|(class, new)| *class == old_class && new == known) {
            return Some(old_class);
        }

        let (new_class, new) = new.unzip();
        let old = self.objects.replace(id, old_class, Contribution::default());
        let mut new_sets = take(&mut self.scratch.new_sets);
        let mut old_sets = take(&mut self.scratch.old_sets);
        new_sets.clear();
        if let Some(class) = new_class {
            self.sets_of(selectors, class, &mut new_sets);
        }
        self.sets_of(selectors, old_class, &mut old_sets);
        for set in &new_sets {
            let before = old_sets.binary_search(set).is_ok().then_some(&old);
            self.count(*set, new.as_ref(), before, out);
        }
        for set in &old_sets {
            let after = new.as_ref().filter(|_| new_sets.binary_search(set).is_ok());
            self.discount(*set, &old, after, out);
        }
        self.scratch.new_sets = new_sets;
        self.scratch.old_sets = old_sets;

        self.by_class.leave(old_class, id);
        match new_class.zip(new) {
            Some((class, new)) => {
                self.by_class.join(class, id);
                self.objects.replace(id, class, new);
            }
            None => self.objects.remove(names, id),
        }
        if self.objects.is_empty() {
            self.by_class = Groups::default();
        }
        Some(old_class)
    }

    /// Collects the needed sets that objects of a class are in, sorted.
    fn sets_of(&self, selectors: &Selectors, class: u32, sets: &mut Vec<u32>) {
        sets.clear();
        let matches = selectors.matches_of(class);
        sets.extend(matches.iter().filter_map(|selector| self.by_selector.get(*selector)).flatten());
        sets.sort_unstable();
    }

    /// Follows a selector that starts or stops matching a class of objects.
    pub(crate) fn on_match(&mut self, delta: MatchDelta, out: &mut Vec<MemberChange>) {
        let (selector, class, started) = match delta {
            MatchDelta::Started { selector, class } => (selector, class, true),
            MatchDelta::Stopped { selector, class } => (selector, class, false),
        };
        let sets = self.by_selector.get(selector).cloned().unwrap_or_default();
        for set in sets {
            self.on_class(set, class, started, out);
        }
    }

    fn on_class(&mut self, set: u32, class: u32, started: bool, out: &mut Vec<MemberChange>) {
        let Some(Some(target)) = self.sets.get_mut(set) else {
            debug_assert!(false, "a selector has a set that is not needed");
            return;
        };
        let members = &mut self.scratch.new;
        for object in self.by_class.items(class).filter_map(|id| self.objects.get(id)) {
            target.kind.members(object, members);
            for member in members.iter() {
                if started {
                    target.add(set, *member, out);
                } else {
                    target.remove(set, *member, out);
                }
            }
        }
    }

    /// Adds an empty set. Its members come with matches if the selector is new, otherwise by
    /// [`fill`](Self::fill).
    pub(crate) fn on_needed(&mut self, set: u32, id: SetId, source: SetSource, selector: Option<u32>) {
        let kind = match source {
            SetSource::Selector(_) | SetSource::ServiceAddresses => Kind::Nets,
            SetSource::NamedPort { protocol, port, .. } => Kind::NamedPort { protocol, port },
            SetSource::Service => Kind::Service,
        };
        let new = Set { id, kind, selector, counts: Counted::default(), announced: false };
        let old = self.sets.replace(set, Some(Box::new(new)));
        debug_assert!(old.is_none(), "a set became needed twice");
        if let Some(selector) = selector {
            self.by_selector.slot(selector).push(set);
        }
    }

    /// Counts the objects of these classes into a set.
    pub(crate) fn fill(&mut self, set: u32, classes: &[u32], out: &mut Vec<MemberChange>) {
        for class in classes {
            self.on_class(set, *class, true, out);
        }
    }

    /// Drops a set as a whole (M-35) and returns the number of its selector.
    pub(crate) fn on_unneeded(&mut self, set: u32) -> Option<u32> {
        let Some(old) = self.sets.take(set) else {
            debug_assert!(false, "a set became unneeded that was not needed");
            return None;
        };
        let selector = old.selector?;
        if let Some(sets) = self.by_selector.get_mut(selector) {
            sets.retain(|other| *other != set);
        }
        Some(selector)
    }

    /// Counts up what `new` brings into a set and `old` does not.
    fn count(&mut self, set: u32, new: Option<&Contribution>, old: Option<&Contribution>, out: &mut Vec<MemberChange>) {
        let Some((target, new, old)) = self.compare(set, new, old) else { return };
        for member in new.iter().filter(|member| old.binary_search(member).is_err()) {
            target.add(set, *member, out);
        }
    }

    /// Counts down what `old` brought into a set and `new` does not.
    fn discount(&mut self, set: u32, old: &Contribution, new: Option<&Contribution>, out: &mut Vec<MemberChange>) {
        let Some((target, new, old)) = self.compare(set, new, Some(old)) else { return };
        for member in old.iter().filter(|member| new.binary_search(member).is_err()) {
            target.remove(set, *member, out);
        }
    }

    fn compare(
        &mut self,
        set: u32,
        new: Option<&Contribution>,
        old: Option<&Contribution>,
    ) -> Option<(&mut Set, &[SetMember], &[SetMember])> {
        let Some(Some(target)) = self.sets.get_mut(set) else {
            debug_assert!(false, "a selector has a set that is not needed");
            return None;
        };
        let Scratch { new: new_members, old: old_members, .. } = &mut self.scratch;
        for (contribution, members) in [(new, &mut *new_members), (old, &mut *old_members)] {
            members.clear();
            if let Some(contribution) = contribution {
                target.kind.members(contribution, members);
            }
        }
        Some((target, new_members, old_members))
    }

    /// Returns the contents of a set; from now on its changes are deltas.
    pub(crate) fn announce(&mut self, set: u32) -> Option<SetContents> {
        let set = self.sets.get_mut(set)?.as_mut()?;
        set.announced = true;
        let kind = match set.kind {
            Kind::Nets => SetType::Net,
            Kind::NamedPort { .. } | Kind::Service => SetType::AddressPort,
        };
        Some(SetContents { kind, members: set.counts.unordered().copied().collect() })
    }

    pub(crate) fn is_announced(&self, set: u32) -> bool {
        self.sets.get(set).and_then(Option::as_ref).is_some_and(|set| set.announced)
    }

    pub(crate) fn id_of(&self, set: u32) -> Option<&SetId> {
        self.sets.get(set)?.as_ref().map(|set| &set.id)
    }

    /// How many endpoints and network sets there are.
    pub(crate) fn objects(&self) -> usize {
        self.objects.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.objects.is_empty()
    }
}

impl Set {
    fn add(&mut self, set: u32, member: SetMember, out: &mut Vec<MemberChange>) {
        if self.counts.add(member) && self.announced {
            out.push(MemberChange::Added { set, member });
        }
    }

    fn remove(&mut self, set: u32, member: SetMember, out: &mut Vec<MemberChange>) {
        if self.counts.remove(&member) && self.announced {
            out.push(MemberChange::Removed { set, member });
        }
    }
}

impl Kind {
    /// Collects what an object brings into a set of this kind, sorted, each member once.
    fn members(&self, object: &Contribution, members: &mut Vec<SetMember>) {
        members.clear();
        match self {
            Self::Nets => members.extend(object.nets.iter().copied().map(SetMember::Net)),
            Self::NamedPort { protocol, port } => {
                let fits = |candidate: &&EndpointPort| {
                    candidate.name == *port && protocol.is_none_or(|protocol| protocol == candidate.protocol)
                };
                for port in object.ports.iter().flat_map(|ports| ports.iter()).filter(fits) {
                    members.extend(object.nets.iter().map(|net| SetMember::AddressPort {
                        address: net.addr(),
                        protocol: port.protocol,
                        port: port.port,
                    }));
                }
                members.sort_unstable();
                members.dedup();
            }
            Self::Service => (),
        }
    }
}
