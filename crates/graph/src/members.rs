//! Who is in which needed set (policy.md 5).
//!
//! Input: objects with addresses (all endpoints and network sets) in classes, matches of rule selectors
//! with these classes (from `selectors`), needed sets (from `references`).
//! Output: [`MemberChange`], consumed by `gather`; and the full contents of a set on demand.
//!
//! Law: *members(set) = distinct(project(join(set, objects, by selector)))*; new contributions are
//! counted before old ones (M-31). Overlapping members stay (M-33). There are no changes for a set
//! before its contents have been taken for the first time (F-8), and per set and member the changes
//! alternate.
//!
//! No set stores its members. What rule M-30 counts is known from who has an address: a member comes
//! when an object brings it and no other object that the set's selector matches has it, and goes in the
//! same way.
//!
//! Cost: of an object, its addresses times the announced sets that it is in, times the other objects
//! with the same address (hardly ever one); of the contents of a set, its members.

mod objects;

use std::mem::take;

use ipnet::IpNet;
use model::{EndpointPort, Name, SetId};
use smallvec::SmallVec;

use objects::{NetChange, Objects};
pub(crate) use objects::{Nets, ObjectKey};

use crate::batch::{MemberList, SetContents, SetMember, SetType};
use crate::kit::{Column, IdSet, IdSets, sort_numbers};
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
pub(crate) struct Contribution<'a> {
    pub(crate) nets: Nets,
    pub(crate) ports: &'a [EndpointPort],
}

/// See the [module documentation](self).
#[derive(Debug, Default)]
pub(crate) struct Members {
    objects: Objects,
    /// By class: its objects.
    by_class: Column<IdSet, 64>,
    of_classes: IdSets,
    sets: Column<Option<Box<Set>>>,
    /// How many sets are needed.
    needed: usize,
    /// How many of them have been announced.
    announced: usize,
    by_selector: Column<SmallVec<[u32; 2]>>,
    scratch: Scratch,
}

#[derive(Debug)]
struct Set {
    id: SetId,
    kind: Kind,
    /// The number of its selector; service sets have none.
    selector: Option<u32>,
    /// Its contents have been taken, so changes are told from now on.
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
    old_nets: Nets,
    nets: Vec<NetChange>,
    started: Vec<(u32, u32)>,
    stopped: Vec<(u32, u32)>,
    classes: Vec<u32>,
}

/// A buffer for classes that is larger is not kept.
const KEEP: usize = 1 << 17;

impl Members {
    /// Stores an object, or with `None` forgets it. `selectors` knows the classes of both the new and
    /// the old value. Returns the class that one use has to be given up of: that of the old value, or
    /// that of the new one if nothing has changed.
    pub(crate) fn on_object(
        &mut self,
        names: &mut Names,
        key: &ObjectKey<'_>,
        new: Option<(u32, Contribution<'_>)>,
        selectors: &Selectors,
        out: &mut Vec<MemberChange>,
    ) -> Option<u32> {
        let mut scratch = take(&mut self.scratch);
        let left = self.store(&mut scratch, names, key, new, selectors, out);
        scratch.nets.clear();
        if self.objects.is_empty() {
            self.by_class = Column::default();
            self.of_classes = IdSets::default();
        } else {
            if scratch.nets.capacity() > KEEP {
                scratch.nets = Vec::new();
            }
            self.scratch = scratch;
        }
        left
    }

    fn store(
        &mut self,
        scratch: &mut Scratch,
        names: &mut Names,
        key: &ObjectKey<'_>,
        new: Option<(u32, Contribution<'_>)>,
        selectors: &Selectors,
        out: &mut Vec<MemberChange>,
    ) -> Option<u32> {
        let (id, old_class) = match self.objects.find(names, key) {
            Ok(known) => known,
            Err(missing) => {
                let (class, new) = new?;
                let id = self.objects.insert(names, key, missing, class, &new, &mut scratch.nets);
                self.of_classes.insert(self.by_class.slot(class), id);
                if new.ports.is_empty() {
                    self.tell(scratch, selectors, id, class, out);
                } else {
                    self.compare(scratch, selectors, id, None, Some((class, &new)), out);
                }
                return None;
            }
        };
        if self.objects.ports(id).is_empty()
            && let Some((class, new)) = &new
            && *class == old_class
            && new.ports.is_empty()
        {
            self.objects.replace(id, *class, new, &mut scratch.nets);
            self.tell(scratch, selectors, id, *class, out);
            return Some(*class);
        }
        let mut old = Contribution { nets: take(&mut scratch.old_nets), ports: self.objects.ports(id) };
        old.nets.refill(self.objects.nets(id));
        let new_class = new.as_ref().map(|(class, _)| *class);
        let is_same = new.as_ref().is_some_and(|(class, new)| *class == old_class && *new == old);
        if !is_same {
            let new = new.as_ref().map(|(class, new)| (*class, new));
            self.compare(scratch, selectors, id, Some((old_class, &old)), new, out);
        }
        scratch.old_nets = old.nets;
        if is_same {
            return new_class;
        }

        if new_class != Some(old_class) {
            if let Some(objects) = self.by_class.get_mut(old_class) {
                self.of_classes.remove(objects, id);
            }
            if let Some(class) = new_class {
                self.of_classes.insert(self.by_class.slot(class), id);
            }
        }
        match new {
            Some((class, new)) => self.objects.replace(id, class, &new, &mut scratch.nets),
            None => self.objects.remove(names, id, &mut scratch.nets),
        }
        Some(old_class)
    }

    /// Tells what the networks that an object got and lost bring into announced sets and take out of them. The object
    /// has no ports and its class has not changed, as those of network sets, which have up to a million.
    fn tell(&self, scratch: &mut Scratch, selectors: &Selectors, id: u32, class: u32, out: &mut Vec<MemberChange>) {
        if self.announced == 0 || scratch.nets.is_empty() {
            return;
        }
        self.announced_sets_of(selectors, Some(class), &mut scratch.new_sets);
        for added in [true, false] {
            for number in &scratch.new_sets {
                // Without ports it brings nothing into sets of another kind.
                let Some(set) = self.set(*number).filter(|set| matches!(set.kind, Kind::Nets)) else { continue };
                for change in scratch.nets.iter().filter(|change| change.added == added) {
                    let member = SetMember::Net(change.net);
                    if change.is_shared && self.others_have(selectors, set, &member, id) {
                        continue;
                    }
                    out.push(match added {
                        true => MemberChange::Added { set: *number, member },
                        false => MemberChange::Removed { set: *number, member },
                    });
                }
            }
        }
    }

    /// Tells what an object that changes from `old` to `new` brings into announced sets and takes out
    /// of them. What it itself is stored as does not matter.
    fn compare(
        &self,
        scratch: &mut Scratch,
        selectors: &Selectors,
        id: u32,
        old: Option<(u32, &Contribution<'_>)>,
        new: Option<(u32, &Contribution<'_>)>,
        out: &mut Vec<MemberChange>,
    ) {
        if self.announced == 0 {
            return;
        }
        let Scratch { new: new_members, old: old_members, new_sets, old_sets, .. } = scratch;
        self.announced_sets_of(selectors, new.map(|(class, _)| class), new_sets);
        self.announced_sets_of(selectors, old.map(|(class, _)| class), old_sets);
        for number in &*new_sets {
            let Some(set) = self.set(*number) else { continue };
            let before = old.filter(|_| old_sets.binary_search(number).is_ok());
            set.kind.members(new.map(|(_, new)| new), new_members);
            set.kind.members(before.map(|(_, old)| old), old_members);
            for member in not_in(new_members, old_members) {
                if !self.others_have(selectors, set, member, id) {
                    out.push(MemberChange::Added { set: *number, member: *member });
                }
            }
        }
        for number in &*old_sets {
            let Some(set) = self.set(*number) else { continue };
            let after = new.filter(|_| new_sets.binary_search(number).is_ok());
            set.kind.members(after.map(|(_, new)| new), new_members);
            set.kind.members(old.map(|(_, old)| old), old_members);
            for member in not_in(old_members, new_members) {
                if !self.others_have(selectors, set, member, id) {
                    out.push(MemberChange::Removed { set: *number, member: *member });
                }
            }
        }
    }

    fn set(&self, number: u32) -> Option<&Set> {
        let set = self.sets.get(number).and_then(Option::as_deref);
        debug_assert!(set.is_some(), "a selector has a set that is not needed");
        set
    }

    /// Collects the announced sets that objects of a class are in, sorted.
    fn announced_sets_of(&self, selectors: &Selectors, class: Option<u32>, sets: &mut Vec<u32>) {
        sets.clear();
        let matches = class.into_iter().flat_map(|class| selectors.matches_of(class));
        let all = matches.filter_map(|selector| self.by_selector.get(selector)).flatten().copied();
        sets.extend(all.filter(|set| self.is_announced(*set)));
        sets.sort_unstable();
    }

    /// True if an object other than this one has a member in a set.
    fn others_have(&self, selectors: &Selectors, set: &Set, member: &SetMember, id: u32) -> bool {
        let Some(selector) = set.selector else { return false };
        self.owners(member)
            .any(|(owner, class)| owner != id && selectors.is_match(selector, class) && self.brings(set, owner, member))
    }

    /// True if an object brings a member into a set and is of a class that `is_match` is true of.
    fn is_owned(&self, set: &Set, member: &SetMember, is_match: impl Fn(u32, u32) -> bool) -> bool {
        let Some(selector) = set.selector else { return false };
        self.owners(member).any(|(owner, class)| is_match(selector, class) && self.brings(set, owner, member))
    }

    /// The objects that have the address or network of a member, with their classes.
    fn owners(&self, member: &SetMember) -> impl Iterator<Item = (u32, u32)> {
        self.objects.owners(match member {
            SetMember::Net(net) => *net,
            SetMember::AddressPort { address, .. } => IpNet::from(*address),
        })
    }

    /// True if an object that has the address of a member has its port too. There may be thousands of
    /// ports, so whoever asks knows that nothing else decides.
    fn brings(&self, set: &Set, id: u32, member: &SetMember) -> bool {
        match member {
            SetMember::Net(_) => true,
            SetMember::AddressPort { protocol, port, .. } => {
                set.kind.ports(self.objects.ports(id)).any(|known| known == (*protocol, *port))
            }
        }
    }

    /// Follows selectors that have started or stopped matching classes of objects, all at once;
    /// `selectors` knows how it is now.
    pub(crate) fn on_matches(
        &mut self,
        deltas: impl Iterator<Item = MatchDelta>,
        selectors: &Selectors,
        out: &mut Vec<MemberChange>,
    ) {
        let mut started = take(&mut self.scratch.started);
        let mut stopped = take(&mut self.scratch.stopped);
        let concerns = |selector: u32| {
            let sets = self.by_selector.get(selector).into_iter().flatten();
            sets.into_iter().any(|set| self.is_announced(*set))
        };
        for delta in deltas {
            match delta {
                MatchDelta::Started { selector, class } if concerns(selector) => started.push((selector, class)),
                MatchDelta::Stopped { selector, class } if concerns(selector) => stopped.push((selector, class)),
                MatchDelta::Started { .. } | MatchDelta::Stopped { .. } => (),
            }
        }
        started.sort_unstable();
        stopped.sort_unstable();
        let has = |list: &[(u32, u32)], selector, class| list.binary_search(&(selector, class)).is_ok();

        // A member comes if nobody had it before.
        for (number, member) in self.members_with(&started) {
            let Some(set) = self.set(number) else { continue };
            let was_there = self.is_owned(set, &member, |selector, class| {
                has(&stopped, selector, class)
                    || (selectors.is_match(selector, class) && !has(&started, selector, class))
            });
            if !was_there {
                out.push(MemberChange::Added { set: number, member });
            }
        }
        // A member goes if nobody has it now.
        for (number, member) in self.members_with(&stopped) {
            let Some(set) = self.set(number) else { continue };
            if !self.is_owned(set, &member, |selector, class| selectors.is_match(selector, class)) {
                out.push(MemberChange::Removed { set: number, member });
            }
        }
        started.clear();
        stopped.clear();
        self.scratch.started = started;
        self.scratch.stopped = stopped;
    }

    /// What the objects of these classes bring into the announced sets of these selectors, each member of
    /// a set once: thousands of objects may have one address, and all of them are asked about it.
    fn members_with(&self, matches: &[(u32, u32)]) -> Vec<(u32, SetMember)> {
        let mut all = Vec::new();
        let mut members = Vec::new();
        for (selector, class) in matches {
            let sets = self.by_selector.get(*selector).into_iter().flatten();
            for number in sets.filter(|set| self.is_announced(**set)) {
                let Some(set) = self.set(*number) else { continue };
                for id in self.objects_of(*class) {
                    self.members_of(set, id, &mut members);
                    all.extend(members.iter().map(|member| (*number, *member)));
                }
            }
        }
        all.sort_unstable();
        all.dedup();
        all
    }

    fn objects_of(&self, class: u32) -> impl Iterator<Item = u32> {
        self.of_classes.iter(self.by_class.get(class).copied().unwrap_or_default())
    }

    /// Collects what a stored object brings into a set, each member once.
    fn members_of(&self, set: &Set, id: u32, members: &mut Vec<SetMember>) {
        members.clear();
        set.kind.project(self.objects.nets(id), || self.objects.ports(id), members);
    }

    /// Adds a set.
    pub(crate) fn on_needed(&mut self, set: u32, id: SetId, source: SetSource, selector: Option<u32>) {
        let kind = match source {
            SetSource::Selector(_) | SetSource::ServiceAddresses => Kind::Nets,
            SetSource::NamedPort { protocol, port, .. } => Kind::NamedPort { protocol, port },
            SetSource::Service => Kind::Service,
        };
        let new = Set { id, kind, selector, announced: false };
        let old = self.sets.replace(set, Some(Box::new(new)));
        debug_assert!(old.is_none(), "a set became needed twice");
        self.needed += 1;
        if let Some(selector) = selector {
            self.by_selector.slot(selector).push(set);
        }
    }

    /// Drops a set as a whole (M-35) and returns the number of its selector.
    pub(crate) fn on_unneeded(&mut self, set: u32) -> Option<u32> {
        let Some(old) = self.sets.take(set) else {
            debug_assert!(false, "a set became unneeded that was not needed");
            return None;
        };
        self.needed -= 1;
        self.announced -= usize::from(old.announced);
        if let Some(sets) = old.selector.and_then(|selector| self.by_selector.get_mut(selector)) {
            sets.retain(|other| *other != set);
        }
        if self.needed == 0 {
            self.sets = Column::default();
            self.by_selector = Column::default();
        }
        old.selector
    }

    /// Returns the contents of a set; from now on its changes are told.
    pub(crate) fn announce(&mut self, names: &Names, set: u32, selectors: &Selectors) -> Option<SetContents> {
        let announced = &mut self.sets.get_mut(set)?.as_mut()?.announced;
        self.announced += usize::from(!*announced);
        *announced = true;
        let mut classes = take(&mut self.scratch.classes);
        let set = self.set(set)?;
        let kind = match set.kind {
            Kind::Nets => SetType::Net,
            Kind::NamedPort { .. } | Kind::Service => SetType::AddressPort,
        };
        classes.clear();
        if let Some(selector) = set.selector {
            selectors.matching_unordered(names, selector, &mut classes);
        }
        // Objects and addresses are then met in the order in which they came, and so out of memory.
        sort_numbers(&mut classes);
        // Most classes have one object with one address.
        let mut members = MemberList::with_capacity(classes.len());
        let mut of_object = Vec::new();
        for class in &classes {
            let objects = self.by_class.get(*class).copied().unwrap_or_default();
            self.of_classes.for_each(objects, |id| match set.kind {
                Kind::Nets => self.objects.for_each_net(id, |net| members.push_net(net)),
                Kind::NamedPort { .. } | Kind::Service => {
                    set.kind.project(self.objects.nets(id), || self.objects.ports(id), &mut of_object);
                    of_object.drain(..).for_each(|member| members.push(member));
                }
            });
        }
        if classes.capacity() <= KEEP {
            self.scratch.classes = classes;
        }
        Some(SetContents { kind, members: members.sort() })
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
        self.objects.is_empty() && self.needed == 0
    }
}

/// Those of one sorted list that another does not have: in one walk, because a network set has thousands.
fn not_in<'a>(list: &'a [SetMember], other: &'a [SetMember]) -> impl Iterator<Item = &'a SetMember> {
    let mut other = other.iter().peekable();
    list.iter().filter(move |member| {
        while other.next_if(|known| known < member).is_some() {}
        other.peek() != Some(member)
    })
}

impl Kind {
    /// Numbers of the ports that fit, with their protocols; some may come twice.
    fn ports<'a>(&self, ports: &'a [EndpointPort]) -> impl Iterator<Item = (u8, u16)> + use<'a, '_> {
        let (wanted, name) = match self {
            Self::NamedPort { protocol, port } => (*protocol, Some(port)),
            Self::Nets | Self::Service => (None, None),
        };
        let fits = move |port: &&EndpointPort| {
            Some(&port.name) == name && wanted.is_none_or(|protocol| protocol == port.protocol)
        };
        ports.iter().filter(fits).map(|port| (port.protocol, port.port))
    }

    /// Appends what an object with these networks and ports brings into a set of this kind, each once.
    fn project<'a>(
        &self,
        nets: impl Iterator<Item = IpNet>,
        ports: impl FnOnce() -> &'a [EndpointPort],
        members: &mut Vec<SetMember>,
    ) {
        match self {
            Self::Nets => members.extend(nets.map(SetMember::Net)),
            Self::NamedPort { .. } => {
                let mut ports: SmallVec<[(u8, u16); 4]> = self.ports(ports()).collect();
                ports.sort_unstable();
                ports.dedup();
                for address in nets.map(|net| net.addr()) {
                    let member = |&(protocol, port): &_| SetMember::AddressPort { address, protocol, port };
                    members.extend(ports.iter().map(member));
                }
            }
            Self::Service => (),
        }
    }

    /// Collects what an object brings into a set of this kind, sorted, each member once.
    fn members(&self, object: Option<&Contribution<'_>>, members: &mut Vec<SetMember>) {
        members.clear();
        if let Some(object) = object {
            self.project(object.nets.iter().copied(), || object.ports, members);
            members.sort_unstable();
        }
    }
}
